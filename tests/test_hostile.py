"""Hostile input: a sentence with the path for each broken or malicious file, nothing run, nothing written elsewhere.

The short fuzzing runs with the other tests; 10,000 cases: `python -m pytest tests/test_hostile.py -m slow`.
"""

import json
import os
import pickle
import re
import resource
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from hostile import FILES, FOLDERS, GOOD, MARK, SEEDS, YAML, Hostile, N, npz_bytes, poses
from modeling_pose_tokenizer import dataset as dataset_module
from modeling_pose_tokenizer.checkpoints import newest_state
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseDataError, PoseFileError, read_sequences
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained
from modeling_pose_tokenizer.presets import RunConfigError, load_run_config
from modeling_pose_tokenizer.sequences import one_line
from modeling_pose_tokenizer.shards import PoseStream
from motions import ASF

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prepare_data.py"
# A command that converts it writes 200 MB, too.
MOST_SECONDS = {"a million frames": 3}
# Reads each file and looks at it, in a process that may have 1 GiB beyond what its libraries take.
READER = """
import io, json, os, resource, sys, time
import numpy as np
import pyarrow.csv, pyarrow.parquet, pose_format, pybvh
pyarrow.csv.read_csv(io.BytesIO(b"a\\n1\\n"))  # starts its threads, whose stacks count
from modeling_pose_tokenizer.formats import PoseFileError, read_sequences
from modeling_pose_tokenizer.plausibility import PlausibilityCheck
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton
layout = get_skeleton("coco_17")
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
def memory(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024
for path in json.load(sys.stdin):
    if os.path.isfile(path) and os.path.getsize(path) > 2**24:
        np.ones(2**29, np.uint8)  # large pages, which take a virtual machine long when it first needs them
    print(5, file=open("/proc/self/clear_refs", "w"), flush=True)  # the peak is counted from here
    before, started = memory("VmRSS"), time.process_time()
    try:
        sequences = read_sequences(path, layout=layout)
        says = [len(sequence.poses) for sequence in sequences]
        check = PlausibilityCheck(layout)
        for sequence in sequences:
            check.add(path, sequence)
    except PoseFileError as error:
        says = str(error)
    sequences = sequence = None
    print(json.dumps([path, says, time.process_time() - started, memory("VmHWM") - before]), flush=True)
"""


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def run(monkeypatch: pytest.MonkeyPatch, *options: Any) -> Any:
    """Runs the script; returns its exit code, which for an error is the sentence that Python prints."""
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, options)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as error:
        return error.code
    return 0


def cpu_seconds() -> float:
    """Of this process and those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def assert_sentence(says: str, path: Path | str, expected: str) -> None:
    assert expected in says
    assert one_line(os.fspath(path), None) in says
    assert says.isprintable() and len(says) < 600 + len(os.fspath(path)) and "Traceback" not in says


def path_named(case: str, path: Path, source: Path | None = None) -> Path | str:
    """What the sentence must name."""
    if case == "ASF in a circle":
        return path.with_name("01.asf")
    if case in FOLDERS:
        return {"two files of one name": "a_b"}.get(case, source or path)
    return path


# ---- the corpus -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the reader makes of each file, in one process of bounded memory."""
    folder, paths = tmp_path_factory.mktemp("hostile"), {}
    for number, (case, hostile) in enumerate(FILES.items()):
        paths[case] = folder / str(number) / hostile.name
        paths[case].parent.mkdir()
        hostile.make(paths[case])
    before = listing(folder)
    given = json.dumps([os.fspath(path) for path in paths.values()])
    command = [sys.executable, "-c", READER]
    settings = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, cwd=folder, env=settings, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert listing(folder) == before  # no mark of a payload either
    return dict(zip(paths, map(json.loads, done.stdout.splitlines()), strict=True))


def test_the_corpus_is_large() -> None:
    assert len(FILES) + len(FOLDERS) + len(YAML) >= 60


@pytest.mark.parametrize("case", FILES)
def test_the_reader_says_what_is_wrong(case: str, readings: dict[str, Any]) -> None:
    path, says, seconds, memory = readings[case]
    expected = FILES[case].says
    if expected is None:
        assert isinstance(says, list) and says
    else:
        assert isinstance(says, str), f"it was read: {says}"
        assert_sentence(says, path_named(case, Path(path)), expected)
        assert "MemoryError" not in says
    assert seconds < 1 and memory < (2**26 if "parquet" in case else 2**29)


@pytest.mark.parametrize("case", FILES | FOLDERS)
def test_the_command_says_what_is_wrong(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile: Hostile = (FILES | FOLDERS)[case]
    path = tmp_path / "in" / hostile.name
    path.parent.mkdir()
    hostile.make(path)
    monkeypatch.chdir(tmp_path / "in")
    before = listing(tmp_path)
    source = path if case in FOLDERS else path.parent
    options = ["--layout", "any"] if case.startswith("mixed") else ["--layout", "coco_17"]
    options += ["--split-by", "prefix", "--strict", "--num-proc", "1", "--output", tmp_path / "out"]
    started = cpu_seconds()
    code = run(monkeypatch, "--input", source, *options)
    assert cpu_seconds() - started < MOST_SECONDS.get(case, 1)
    assert "Traceback" not in capfd.readouterr().err
    written = {name for name in listing(tmp_path) - before if not name.startswith("out/")} - {"out"}
    assert not written and before <= listing(tmp_path)
    if hostile.says is None:
        assert code == 0 and list((tmp_path / "out" / "train").glob("*.npz"))
    else:
        assert isinstance(code, str)
        assert_sentence(code, path_named(case, path, source), hostile.says)
        assert not (tmp_path / "out" / "train").exists()


def test_the_payloads_are_payloads(tmp_path: Path) -> None:
    """Loaded the unsafe way, which nothing but this test does, each leaves its mark: that readers leave none tells."""
    for case in ("pickle with a payload", "payload in a pickle of keypoints"):
        FILES[case].make(tmp_path / "a.pkl")
        assert not (tmp_path / MARK).exists()
        pickle.loads((tmp_path / "a.pkl").read_bytes())
        assert (tmp_path / MARK).exists()
        (tmp_path / MARK).unlink()
    FILES["object array"].make(tmp_path / "a.npz")
    np.load(tmp_path / "a.npz", allow_pickle=True)["poses"]
    assert (tmp_path / MARK).exists()


def test_as_a_program_it_ends_with_1_and_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    FILES["pickle with a payload"].make(tmp_path / "in" / "a.pkl")
    (tmp_path / "in" / os.fsdecode(b"b\xff.npz")).write_bytes(b"PK")
    command = [sys.executable, SCRIPT, "--input", tmp_path / "in", "--split-by", "prefix"]
    for options in (["--output", tmp_path / "out"], ["--check"]):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "a.pkl: is not a pickle of numpy arrays" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["a.pkl", os.fsdecode(b"b\xff.npz")]
    assert not (tmp_path / "in" / MARK).exists()


def test_limits_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    FILES["bomb of zeros"].make(tmp_path / "in" / "a.npz")
    (tmp_path / "in" / "b.npz").write_bytes(GOOD)
    base = ["--input", tmp_path / "in", "--layout", "coco_17", "--split-by", "prefix", "--max-rejected", 0.5]
    out = [["--output", tmp_path / str(number)] for number in range(4)]
    assert run(monkeypatch, *base, *out[0]) == 0
    assert [path.name for path in (tmp_path / "0" / "train").iterdir()] == ["b.npz"]
    # A bomb that may go off holds nothing but zeros.
    run(monkeypatch, *base, *out[1], "--max-ratio", 2000)
    assert "no keypoint has a confidence above 0" in (tmp_path / "1" / "rejected.jsonl").read_text()
    assert "limit of 100" in run(monkeypatch, *base, *out[2], "--max-array-bytes", 100)
    (tmp_path / "in" / "c.json").write_text(json.dumps([{"keypoints": [[1, 2]] * 17, "scores": [1] * 17}]))
    run(monkeypatch, *base, *out[3], "--max-text-bytes", 50)
    assert "bytes, more than the limit of 50" in (tmp_path / "3" / "rejected.jsonl").read_text()


# Frames, their fps, the fps asked for, what is said.
RATES = [
    (
        1000,
        0.1,
        5000,
        "1000 frames at 0.1 fps are 49950001 at 5000, which declares 10189800204 bytes of data, more than",
    ),
    (10, 0.1, 10_000, "10 frames at 0.1 fps are 900001 at 10000, which declares 183600204 bytes of data in 2040"),
    (200_000, 0.1, 25, "200000 frames at 0.1 fps are 49999751 at 25, which declares 10199949204 bytes of data, more"),
]


@pytest.mark.parametrize(("frames", "fps", "wanted", "expected"), RATES)
def test_a_frame_rate_is_no_bomb(
    frames: int, fps: float, wanted: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.npz").write_bytes(npz_bytes(poses=np.ones((frames, N, 3), np.uint8), fps=fps))
    base = ["--input", tmp_path / "slow.npz", "--layout", "coco_17", "--split-by", "prefix", "--strict"]
    says = run(monkeypatch, *base, "--output", tmp_path / "out", "--fps", wanted)
    assert_sentence(says, tmp_path / "slow.npz", expected)
    says = run(monkeypatch, *base, "--output", tmp_path / "out", "--fps", 1e9)
    assert says == "fps is 1e+09, expected a number from 0.1 to 10000."


@pytest.mark.parametrize("frames", [1000, 200_000])
def test_a_frame_rate_is_no_bomb_in_training(frames: int, tmp_path: Path) -> None:
    """Neither in a folder of files nor in a stream, whatever prepared them."""
    many_files(tmp_path / "train", 3)
    (tmp_path / "train" / "slow.npz").write_bytes(npz_bytes(poses=np.ones((frames, N, 3), np.uint8), fps=0.1))
    options: dict[str, Any] = {"feature_extractor": PoseFeatureExtractor("coco_17"), "max_rejected": 0.5}
    many = (frames - 1) * 25 / float(np.float32(0.1))
    expected = f"{frames} frames at 0.1 fps would become {many:.0f} at 25; expected {200 * frames} at most"
    dataset = PoseDataset(tmp_path, cache_dir=tmp_path / "cache", **options)
    (row,) = dataset.rejected
    assert row["path"] == str(tmp_path / "train" / "slow.npz") and expected in row["reason"] and len(dataset.ids) == 3
    with pytest.warns(UserWarning, match=re.escape(expected)):
        assert len(list(PoseStream(tmp_path, **options))) == 3
    with pytest.raises(PoseDataError, match=re.escape(f"{row['path']}: {expected}")):
        list(PoseStream(tmp_path, **options | {"max_rejected": 0, "strict": True}))


def test_resampling_takes_the_memory_of_what_it_makes(tmp_path: Path) -> None:
    """400,000 frames from 20,000, in a process that may have as much again as they take."""
    program = """
import resource, sys
import numpy as np
from modeling_pose_tokenizer.conversion import resample
from modeling_pose_tokenizer.sequences import PoseSequence
sequence = PoseSequence("a", np.ones((20_000, 133, 3), np.float32), np.ones(20_000, bool), 1.0)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
made = 400_000 * 133 * 3 * 4
resource.setrlimit(resource.RLIMIT_AS, (size + made + 2**26, size + made + 2**26))
assert resample(sequence, 20.0).poses.nbytes > 0.99 * made
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- what is written ------------------------------------------------------------------------------------------------


def many_files(folder: Path, count: int = 40) -> None:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.npz").write_bytes(npz_bytes(poses=poses(100)))


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("shards", [[], ["--shards", "2"]])
def test_a_full_disk_loses_nothing(shards: list[str], tmp_path: Path) -> None:
    """The kernel refuses to write beyond a size: one sentence, no split, and the same command goes on afterwards."""
    many_files(tmp_path / "in")
    options = ["--input", tmp_path / "in", "--layout", "coco_17", "--split-by", "prefix", "--num-proc", "1", *shards]
    command = [SCRIPT, *options, "--output", tmp_path / "out"]
    full = subprocess.run([sys.executable, "-c", FULL, *command], capture_output=True, text=True, check=False)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert f"{tmp_path / 'out'} cannot be written (File too large)." in full.stderr
    assert not (tmp_path / "out" / "train").exists() and not list((tmp_path / "out").rglob("*.npz"))
    subprocess.run([sys.executable, *command], capture_output=True, check=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rejected.jsonl", "train"]


def test_a_disk_without_space_loses_nothing(tmp_path: Path) -> None:
    """A real disk that is full; where nobody may mount one, the test above has the kernel refuse to write."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts a disk of 300 kB")
    try:
        many_files(tmp_path / "in")
        command = [sys.executable, SCRIPT, "--input", tmp_path / "in", "--layout", "coco_17", "--split-by", "prefix"]
        done = subprocess.run([*command, "--output", disk / "out"], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{disk / 'out'} cannot be written (No space left on device)." in done.stderr
        assert not (disk / "out" / "train").exists()
        assert not list((disk / "out").rglob("*.tmp"))  # nothing half written under any name
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_output_that_is_a_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_files(tmp_path / "in", 1)
    (tmp_path / "file").write_text("mine")
    base = ["--input", tmp_path / "in", "--layout", "coco_17", "--split-by", "prefix"]
    for output in (tmp_path / "file", tmp_path / "file" / "data", tmp_path / ("x" * 300)):
        assert str(run(monkeypatch, *base, "--output", output)).startswith(f"{output} cannot be written (")
    report = ["--check", "--data-report", tmp_path / "file" / "report.html"]
    assert "the report cannot be written" in run(monkeypatch, *base, *report)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_another_version_left_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_files(tmp_path / "in", 1)
    unfinished = tmp_path / "out" / ".unfinished"
    (unfinished / "done").mkdir(parents=True)
    (unfinished / "key").write_text("of another version")
    (unfinished / "done" / "000000000.json").write_text('{"files": 1, "sequences": {}}')
    base = ["--input", tmp_path / "in", "--layout", "coco_17", "--split-by", "prefix"]
    assert run(monkeypatch, *base, "--output", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rejected.jsonl", "train"]


def test_a_cache_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_files(tmp_path / "train", 2)

    def open_dataset() -> PoseDataset:
        return PoseDataset(tmp_path, feature_extractor=PoseFeatureExtractor("coco_17"), cache_dir=tmp_path / "cache")

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "_CACHE_VERSION", -1)
        patch.setattr(PoseDataset, "_checked", True, raising=False)
        open_dataset()
    before = listing(tmp_path / "cache")
    assert open_dataset().ids == ["0", "1"]
    assert listing(tmp_path / "cache") > before  # built anew beside the old one
    for arrow in (tmp_path / "cache").rglob("*.arrow"):  # of a version with other columns, under the same name
        shutil.copyfile(__file__, arrow)
    with pytest.warns(UserWarning, match=r"The cache .* is damaged .*; it is built again"):
        assert open_dataset().ids == ["0", "1"]


# ---- configurations and checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", YAML)
def test_a_preset_says_what_is_wrong(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, expected = YAML[case]
    path = tmp_path / "run.yaml"
    path.write_text(content)
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    with pytest.raises(RunConfigError) as error:
        load_run_config(["--config", str(path)]).model_config()
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert "run.yaml" in str(error.value) or expected.startswith("model: ")
    assert time.process_time() - started < 1
    assert listing(tmp_path) == {"run.yaml"}


def damage(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def edit_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))


DAMAGE: dict[str, Any] = {
    "cut off": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1000]),
    "header of terabytes": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x00" + b"{}"),
    "offsets flipped": lambda f: damage(f / "model.safetensors", b'"data_offsets":[0', b'"data_offsets":[9'),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "pickle for weights": lambda f: (f / "model.safetensors").write_bytes(pickle.dumps([1])),
    "config cut off": lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:-30]),
    "config a list": lambda f: (f / "config.json").write_text("[]"),
    "config of another size": lambda f: edit_config(f, hidden_size=32),
    "config of text": lambda f: edit_config(f, hidden_size="64 channels"),
    "config of 10**9 channels": lambda f: edit_config(f, hidden_size=10**9),
    "config of 10**9 layers": lambda f: edit_config(f, num_part_layers=10**9),
    "config of 10**9 levels": lambda f: edit_config(f, num_quantizers=10**9),
    "extractor cut off": lambda f: (f / "preprocessor_config.json").write_text("{"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named(case: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    DAMAGE[case](folder)
    with pytest.raises(ModelFolderError) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_training_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, manifest in ((1, "{}"), (2, "{"), (3, '{"model.safetensors": {"size": 1, "sha256": "0"}}')):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "manifest.json").write_text(manifest)
    (tmp_path / "step-3" / "model.safetensors").write_bytes(b"x")
    assert newest_state(Accelerator(cpu=True), tmp_path) == tmp_path / "step-1"
    third, second = capsys.readouterr().out.splitlines()
    assert "step-3 is passed over: model.safetensors is not what manifest.json says." in third
    assert "step-2 is passed over: manifest.json is damaged." in second


# ---- fuzzing --------------------------------------------------------------------------------------------------------

NUMBERS = [b"0", b"-1", b"4294967295", b"99999999999999999999", b"1e999", b"nan", b'"x"', b"[]", b"null"]
WORDS = [(2**31 - 1).to_bytes(4, "little"), b"\xff" * 4, bytes(4), b"\xff\xff", bytes(8), b"\x80"]


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of one kind after some bit flips, cuts, splices, and edits of numbers and of what stands in headers."""
    name = draw(st.sampled_from(sorted(SEEDS)))
    content = bytearray(SEEDS[name]())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        stop = min(len(content), start + draw(st.integers(0, 64)))
        kind = draw(st.sampled_from(["flip", "cut", "splice", "drop", "number", "word", "bytes"]))
        if kind == "flip" and content:
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[start:]
        elif kind == "splice":
            place = draw(st.integers(0, len(content)))
            content[place:place] = content[start:stop] * draw(st.sampled_from([1, 2, 100]))
        elif kind == "drop":
            del content[start:stop]
        elif kind == "word":
            word = draw(st.sampled_from(WORDS))
            content[start : start + len(word)] = word
        elif kind == "bytes":
            content[start:stop] = draw(st.binary(max_size=16))
        elif found := list(re.finditer(rb"-?\d+(\.\d+)?", bytes(content))):
            place = draw(st.sampled_from(found))
            content[place.start() : place.end()] = draw(st.sampled_from(NUMBERS))
    return name, bytes(content)


KEYS = ["keypoints", "scores", "keypoint_scores", "instances", "instance_info", "frames", "fps", "track_id", "bbox"]
KEYS += ["pose_landmarks", "leftHandLandmarks", "landmarks", "landmark", "x", "y", "z", "visibility", "predictions"]
KEYS += ["people", "version", "pose_keypoints_2d", "face_keypoints_2d"]
PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3)
TREES = st.recursive(
    PLAIN | st.lists(st.lists(st.floats(width=16), min_size=2, max_size=3), max_size=18),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
ARRAYS = st.builds(
    lambda shape, kind, seed: (np.random.default_rng(seed).normal(size=shape) * 9).astype(kind),
    st.lists(st.integers(0, 5), max_size=4).map(tuple) | st.just((3, 17, 3)) | st.just((3, 1, 17, 2)),
    st.sampled_from(["f4", "f8", "f2", "i4", "u1", "?", "U3", "S2", "c8"]),
    st.integers(0, 9),
)
NAMES = st.sampled_from(["poses", "mask", "fps", "offsets", "ids", "keypoints", "scores"])


@st.composite
def structures(draw: st.DrawFn) -> tuple[str, bytes]:
    """A whole file of any structure: JSON, a pickle, or arrays of any shape and kind."""
    kind = draw(st.sampled_from(["json", "pkl", "npz"]))
    if kind == "json":
        objects = st.dictionaries(st.sampled_from(KEYS), TREES, min_size=1, max_size=4)
        tree = draw(objects | st.lists(objects | TREES, max_size=4))
        return "a.json", json.dumps(tree).encode()
    if kind == "pkl":
        tree = draw(st.dictionaries(st.sampled_from(["keypoints", "scores", "fps", "x"]), ARRAYS | TREES, max_size=4))
        return "a.pkl", pickle.dumps(tree, draw(st.integers(0, 5)))
    return "a.npz", npz_bytes(draw(st.booleans()), **draw(st.dictionaries(NAMES, ARRAYS, max_size=5)))


def assert_refused_or_read(case: tuple[str, bytes], folder: Path) -> None:
    name, content = case
    path = folder / name
    path.write_bytes(content)
    (folder / "01.asf").write_text(ASF)
    started = time.process_time()
    try:
        sequences = read_sequences(path)
    except PoseFileError as error:
        event("refused")
        assert str(folder) in str(error) and str(error).isprintable() and len(error.reason) <= 400
    else:
        event("read")
        for sequence in sequences:
            assert np.isfinite(sequence.poses).all() and sequence.mask.any()
            assert len(sequence.poses) == len(sequence.mask) and sequence.poses.dtype == np.float32
    assert time.process_time() - started < 1
    path.unlink()
    assert listing(folder) == {"01.asf"}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(case=damaged_files() | structures())
def test_no_file_is_a_crash(case: tuple[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    assert_refused_or_read(case, folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::RuntimeWarning")
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(case=damaged_files() | structures())
def test_no_file_of_ten_thousand_is_a_crash(case: tuple[str, bytes], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    assert_refused_or_read(case, folder)
