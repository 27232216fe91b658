"""Preparation of data: every sequence lands whole in its split, and what fails leaves no split behind."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pose_format import Pose
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

from modeling_pose_tokenizer import conversion
from modeling_pose_tokenizer.checking import check_data, check_from_json, check_to_json
from modeling_pose_tokenizer.conversion import SplitRule, find_input, prepare_data, resample
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseDataError, PoseSequence, read_npz, write_npz, write_shard
from modeling_pose_tokenizer.plausibility import PlausibilityCheck
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"
N = 17


def make_sequence(id: str, num_frames: int = 6, fps: float | None = 25.0) -> PoseSequence:
    generator = np.random.default_rng(sum(id.encode()))
    poses = generator.normal(size=(num_frames, N, 3)).astype(np.float32)
    poses[..., -1] = generator.uniform(0.5, 1.0, poses.shape[:2])
    mask = np.arange(num_frames) % 3 < 2
    return PoseSequence(id, poses, mask, fps)


def write_pose(path: Path, num_frames: int = 4) -> None:
    names = ["NOSE", "LEFT_SHOULDER", "RIGHT_SHOULDER"]
    header = PoseHeader(
        0.2, PoseHeaderDimensions(9, 9, 0), [PoseHeaderComponent("POSE_LANDMARKS", names, [], [], "XYZC")]
    )
    data = np.random.default_rng(0).normal(size=(num_frames, 1, 3, 3)).astype(np.float32)
    with path.open("wb") as file:
        Pose(header, NumPyPoseBody(30.0, data, np.ones((num_frames, 1, 3), np.float32))).write(file)


LANGUAGES = {"ase": 4, "bzs": 5, "csq": 3, "swl": 2}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder for each language, as in the lexicon of the demo."""
    for language, count in LANGUAGES.items():
        (tmp_path / "source" / language).mkdir(parents=True)
        for number in range(count):
            sequence = make_sequence(f"{language}_{number}", 3 + number, None if number == 1 else 25.0)
            write_npz(tmp_path / "source" / language / f"{number}.npz", sequence)
    return tmp_path / "source"


@pytest.fixture
def prepare(source: Path, tmp_path: Path) -> Callable[..., Any]:
    def prepare(*inputs: Path | str, **options: Any) -> Any:
        given = [str(path) for path in inputs or (source,)]
        return prepare_data(given, tmp_path / "data", **{"layout": "coco_17", "num_proc": 2} | options)

    return prepare


def read_split(folder: Path) -> dict[str, PoseSequence]:
    return {sequence.id: sequence for path in sorted(folder.glob("*.npz")) for sequence in read_npz(path)}


BY_LANGUAGE: dict[str, Any] = {"split_by": "prefix", "splits": {"val": "csq,swl", "test": "ase"}}
EXPECTED = {"train": ["bzs"], "val": ["csq", "swl"], "test": ["ase"]}


@pytest.mark.parametrize("shards", [None, 1, 3, 100])
def test_sequences_land_whole_in_their_split(prepare: Any, tmp_path: Path, shards: int | None) -> None:
    result = prepare(shards=shards, **BY_LANGUAGE)
    assert result.rejected == [] and (tmp_path / "data" / "rejected.jsonl").read_text() == ""
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["rejected.jsonl", "test", "train", "val"]
    for split, languages in EXPECTED.items():
        found = read_split(tmp_path / "data" / split)
        ids = [f"{language}_{number}" for language in languages for number in range(LANGUAGES[language])]
        assert sorted(found) == ids
        files = list((tmp_path / "data" / split).iterdir())
        assert len(files) <= (shards or len(ids))
        assert all(file.name.startswith("shard-") == bool(shards) for file in files)
        for id in ids:
            number = int(id[-1])
            expected = make_sequence(id, 3 + number, None if number == 1 else 25.0)
            np.testing.assert_array_equal(found[id].poses, expected.poses)
            np.testing.assert_array_equal(found[id].mask, expected.mask)
            assert found[id].fps == expected.fps


def test_the_summary_counts_what_was_written(prepare: Any, tmp_path: Path) -> None:
    result = prepare(**BY_LANGUAGE)
    for split, summary in result.splits.items():
        sequences = list(read_split(tmp_path / "data" / split).values())
        assert summary.sequences == len(sequences)
        assert summary.frames == sum(len(sequence.poses) for sequence in sequences)
        assert summary.seconds == pytest.approx(sum(len(s.poses) / s.fps for s in sequences if s.fps))
        assert summary.rates[None] == sum(sequence.fps is None for sequence in sequences)
    assert list(result.splits) == ["train", "val", "test"]
    lines = result.table().splitlines()
    assert lines[0].split() == ["split", "sequences", "frames", "hours", "layout", "fps", "body", "missing"]
    assert lines[1].split() == ["train", "5", "25", "0.00", "coco_17", "25,", "unknown", "0.0%"]


def test_missing_keypoints_are_counted_per_group(tmp_path: Path) -> None:
    poses = np.ones((4, 133, 3), np.float32)
    poses[:, 91:112] = 0
    poses[:2, 23:91] = 0
    (tmp_path / "source" / "train").mkdir(parents=True)
    write_npz(tmp_path / "source" / "train" / "a.npz", PoseSequence("a", poses, np.ones(4, bool), 30.0))
    table = prepare_data([str(tmp_path / "source")], tmp_path / "data").table().splitlines()
    groups = ("body", "face", "left_hand", "right_hand")
    assert table[0].split()[6:] == [word for group in groups for word in (group, "missing")]
    assert table[1].split() == [
        "train",
        "1",
        "4",
        "0.00",
        "coco_wholebody_133",
        "30",
        "0.0%",
        "50.0%",
        "100.0%",
        "0.0%",
    ]


def test_shards_and_files_convert_into_each_other(prepare: Any, tmp_path: Path) -> None:
    prepare(shards=2, **BY_LANGUAGE)
    prepare_data([str(tmp_path / "data")], tmp_path / "single", layout="coco_17")
    prepare_data([str(tmp_path / "single")], tmp_path / "packed", layout="coco_17", shards=3)
    for split in EXPECTED:
        first, *others = (read_split(tmp_path / name / split) for name in ("data", "single", "packed"))
        for other in others:
            assert first.keys() == other.keys()
            assert all(np.array_equal(first[id].poses, other[id].poses) for id in first)


def test_a_dataset_reads_the_result(prepare: Any, tmp_path: Path) -> None:
    for options in ({}, {"shards": 2, "overwrite": True}):
        prepare(**BY_LANGUAGE, **options)
        dataset = PoseDataset(
            tmp_path / "data", feature_extractor=PoseFeatureExtractor("coco_17"), cache_dir=tmp_path / "cache"
        )
        assert sorted(dataset.ids) == [f"bzs_{number}" for number in range(5)]


def test_pose_files_become_npz(source: Path, tmp_path: Path) -> None:
    (tmp_path / "poses" / "ase").mkdir(parents=True)
    write_pose(tmp_path / "poses" / "ase" / "one.pose")
    result = prepare_data([str(tmp_path / "poses")], tmp_path / "data", split_by="prefix", splits={"test": "ase"})
    assert list(result.splits) == ["test"]
    (sequence,) = read_split(tmp_path / "data" / "test").values()
    assert sequence.id == "ase_one" and sequence.poses.shape == (4, 133, 3) and sequence.fps == 30.0
    assert np.flatnonzero(sequence.poses[0, :, -1]).tolist() == [0, 5, 6]


def test_pose_files_do_not_become_any_layout(tmp_path: Path) -> None:
    (tmp_path / "poses" / "train").mkdir(parents=True)
    write_pose(tmp_path / "poses" / "train" / "one.pose")
    with pytest.raises(PoseDataError, match=r"one.pose: is of MediaPipe Holistic, .* but not to phoenix_50"):
        prepare_data([str(tmp_path / "poses")], tmp_path / "data", layout="phoenix_50")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["rejected.jsonl"]


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_folders_name_splits(source: Path, tmp_path: Path) -> None:
    for folder in ("a/dev", "b/validation/deep", "train", "c/test"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
        write_npz(tmp_path / "tree" / folder / f"{folder[0]}.npz", make_sequence(folder))
    prepare_data([str(tmp_path / "tree")], tmp_path / "data", layout="coco_17")
    found = {split: sorted(read_split(tmp_path / "data" / split)) for split in ("train", "val", "test")}
    assert found == {"train": ["t"], "val": ["a", "deep_b"], "test": ["c"]}
    prepare_data([str(tmp_path / "tree" / "c" / "test")], tmp_path / "one", layout="coco_17")
    prepare_data([str(tmp_path / "tree" / "c" / "test" / "c.npz")], tmp_path / "two", layout="coco_17")
    assert list(read_split(tmp_path / "one" / "test")) == list(read_split(tmp_path / "two" / "test")) == ["c"]


@given(
    st.lists(st.text(min_size=1), unique=True, min_size=200, max_size=200), st.floats(0.05, 0.4), st.floats(0.05, 0.4)
)
def test_a_hash_gives_shares_that_stay(ids: list[str], val: float, test: float) -> None:
    rule = SplitRule("hash", {"val": str(val), "test": str(test)})
    splits = [rule(id, None) for id in ids]
    assert splits == [SplitRule("hash", {"val": str(val), "test": str(test)})(id, "train") for id in ids]
    for split, share in (("val", val), ("test", test)):
        assert splits.count(split) / 200 == pytest.approx(share, abs=0.2)
    larger = SplitRule("hash", {"val": str(val + 0.1), "test": str(test)})
    assert all(larger(id, None) == "val" for id, split in zip(ids, splits, strict=True) if split == "val")


def test_a_json_file_names_splits(prepare: Any, tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(json.dumps({"val": ["ase_0", "csq_2"], "test": ["swl_1"]}))
    prepare(split_by=str(tmp_path / "splits.json"))
    assert sorted(read_split(tmp_path / "data" / "val")) == ["ase_0", "csq_2"]
    assert sorted(read_split(tmp_path / "data" / "test")) == ["swl_1"]
    assert len(read_split(tmp_path / "data" / "train")) == 11


# ---- frame rate -----------------------------------------------------------------------------------------------------


@given(num_frames=st.integers(1, 20), rate=st.floats(10, 60), fps=st.floats(10, 60))
def test_resampling_keeps_duration_and_straight_motion(num_frames: int, rate: float, fps: float) -> None:
    poses = np.ones((num_frames, 2, 3), np.float32)
    poses[..., 0] = np.arange(num_frames)[:, None] / rate
    found = resample(PoseSequence("a", poses, np.ones(num_frames, bool), rate), fps)
    assert found.fps == fps and len(found.mask) == len(found.poses)
    assert (len(found.poses) - 1) / fps == pytest.approx((num_frames - 1) / rate, abs=0.51 / fps)
    seconds = np.minimum(np.arange(len(found.poses)) / fps, (num_frames - 1) / rate)
    np.testing.assert_allclose(found.poses[:, 0, 0], seconds, atol=1e-4)


def test_files_come_to_the_frame_rate_asked_for(prepare: Any, tmp_path: Path) -> None:
    prepare(fps=50.0, **BY_LANGUAGE)
    found = read_split(tmp_path / "data" / "train")
    assert {sequence.fps for sequence in found.values()} == {50.0}
    assert len(found["bzs_0"].poses) == 5  # 3 frames at 25 per second
    assert len(found["bzs_1"].poses) == 4  # of unknown rate: as they are


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_bad_files_are_left_out_and_listed(prepare: Any, source: Path, tmp_path: Path) -> None:
    (source / "ase" / "broken.npz").write_bytes(b"PK")
    np.savez(source / "ase" / "other.npz", poses=np.ones((3, N + 1, 3)))
    result = prepare(max_rejected=0.2, **BY_LANGUAGE)
    assert [Path(row["path"]).name for row in result.rejected] == ["broken.npz", "other.npz"]
    lines = (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.rejected
    assert len(read_split(tmp_path / "data" / "test")) == 4


def test_too_many_bad_files_leave_the_list_alone(prepare: Any, source: Path, tmp_path: Path) -> None:
    (source / "ase" / "broken.npz").write_bytes(b"PK")
    with pytest.raises(PoseDataError, match=r"1 of 15 files in .* more than 1%; the first is .*broken.npz: is not"):
        prepare(**BY_LANGUAGE)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["rejected.jsonl"]
    with pytest.raises(PoseDataError, match=r"broken.npz: is not an npz file.*\.$"):
        prepare(strict=True, max_rejected=1.0, **BY_LANGUAGE)


def test_what_is_no_pose_file_is_listed_and_not_counted(prepare: Any, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("about")
    (source / "ase" / "labels.csv").write_text("path,sign\n")
    (source / ".hidden").write_text("")
    result = prepare(max_rejected=0.0, **BY_LANGUAGE)
    assert [Path(row["path"]).name for row in result.rejected] == ["README.md", "labels.csv"]
    assert all("is of no known kind, expected" in row["reason"] for row in result.rejected)
    assert len((tmp_path / "data" / "rejected.jsonl").read_text().splitlines()) == 2


def test_content_decides_over_the_name(prepare: Any, source: Path, tmp_path: Path) -> None:
    (source / "bzs" / "0.npz").rename(source / "bzs" / "0.data")
    prepare(**BY_LANGUAGE)
    assert "bzs_0" in read_split(tmp_path / "data" / "train")


@pytest.mark.parametrize("shards", [None, 1])
def test_sequences_of_several_shapes_are_not_mixed(
    prepare: Any, source: Path, tmp_path: Path, shards: int | None
) -> None:
    np.savez(source / "ase" / "other.npz", poses=np.ones((3, N + 1, 3)))
    with pytest.raises(PoseDataError, match=r"mixes 17 keypoints of 3 values \(.*\) with 18 of 3 \(.*other\.npz\)"):
        prepare(layout=None, shards=shards, **BY_LANGUAGE)
    assert not (tmp_path / "data").exists()


def test_openpose_folders_are_sequences(tmp_path: Path) -> None:
    video = tmp_path / "in" / "val" / "hello"
    video.mkdir(parents=True)
    for frame in range(3):
        person = {"pose_keypoints_2d": [float(frame + 1)] * 75}
        (video / f"hello_{frame:012d}_keypoints.json").write_text(json.dumps({"version": 1.3, "people": [person]}))
    prepare_data([str(tmp_path / "in")], tmp_path / "data", layout="openpose_137", fps=25.0)
    (sequence,) = read_split(tmp_path / "data" / "val").values()
    assert sequence.id == "hello" and sequence.poses[:, 0, 0].tolist() == [1.0, 2.0, 3.0]


# ---- killed runs ----------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shards", [None, 8])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, shards: int | None) -> None:
    """SIGKILL in the middle: no split is there; the same command does the rest, and gives the same as one run."""
    for number in range(200):
        (tmp_path / "in" / "train").mkdir(parents=True, exist_ok=True)
        write_npz(tmp_path / "in" / "train" / f"{number}.npz", make_sequence(str(number), 40))
    output = tmp_path / "data"
    command = [sys.executable, str(SCRIPT), "--input", str(tmp_path / "in"), "--layout", "coco_17", "--num-proc", "1"]
    command += ["--shards", str(shards)] if shards else []
    process = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.DEVNULL)
    done = output / ".unfinished" / "done"
    deadline = time.monotonic() + 60
    while len(list(done.glob("[!.]*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    stopped, kept = time.time_ns(), len(list(done.glob("[!.]*.json")))
    assert not (output / "train").exists()
    again = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    subprocess.run([*command, "--output", str(tmp_path / "whole")], capture_output=True, check=True)
    assert snapshot(output) == snapshot(tmp_path / "whole")
    files = list((output / "train").iterdir())
    before = [path for path in files if path.stat().st_mtime_ns <= stopped]
    assert kept * (1 if shards else 16) <= len(before) < len(files)  # what was done is not done again
    assert again.stdout.splitlines()[1].split()[:3] == ["train", "200", "8000"]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"inputs": "nowhere"}, "There is no file or folder nowhere."),
    "no files": ({"inputs": "empty"}, r"There are no pose files in .*empty, expected .*\.pose, npy, npz\."),
    "no package": ({"inputs": "no_such_package:assets"}, "package no_such_package of .* is not installed"),
    "no package folder": ({"inputs": "json:assets"}, "package json has no file or folder assets"),
    "no split folder": (
        {"split_by": "folder", "splits": {}},
        "ase_0 is in no folder named train, val, test: split by",
    ),
    "no split file": (
        {"split_by": "nowhere.json", "splits": {}},
        "nowhere.json is not folder, prefix, hash or a JSON",
    ),
    "no JSON": ({"split_by": str(SCRIPT), "splits": {}}, "is not a JSON file that maps train, val, test"),
    "prefix misspelt": ({"splits": {"val": "csq", "test": "asl"}}, "prefix expects asl, but no sequence"),
    "share of text": ({"split_by": "hash"}, "takes shares such as 0.1, not csq,swl, ase"),
    "share too large": ({"split_by": "hash", "splits": {"val": "0.7", "test": "0.6"}}, "sum to 1 at most"),
    "share too small": ({"split_by": "hash", "splits": {"val": "0"}}, "above 0"),
    "empty split": ({"split_by": "hash", "splits": {"test": "1e-9"}}, "split test is empty: none of 14"),
    "split not by rule": ({"split_by": "folder"}, "split.val goes with a split by prefix or hash"),
    "another layout": ({"layout": "phoenix_50"}, "14 of 14 files .* poses have 17 keypoints, expected 50"),
    "unknown layout": ({"layout": "coco_71"}, "Did you mean 'coco_17'"),
    "another D": ({"keypoint_dim": 4}, "poses have 3 values per keypoint, expected 4"),
    "no frame rate": ({"fps": 0.0}, "fps is 0, expected a number from 0.1 to 10000"),
    "no shards": ({"shards": 0}, "shards is 0"),
    "endless frame rate": ({"fps": float("inf")}, "fps is inf"),
    "no share": ({"max_rejected": float("nan")}, "max_rejected is nan, expected a share from 0 to 1"),
    "unfaithful layout": ({"to_layout": "phoenix_50"}, "coco_17 does not convert to phoenix_50"),
    "no layout to convert": ({"layout": None, "to_layout": "coco_17"}, "layout is None, expected the name of one"),
    "no such layout file": ({"layout": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    "no processes": ({"num_proc": 0}, "num_proc is 0"),
    "nothing usable": ({"keypoint_dim": 4, "max_rejected": 1.0}, "None of the input files can be used"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence_and_leave_nothing(prepare: Any, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    options, message = ERRORS[case]
    options = {**BY_LANGUAGE, **options}
    inputs = [
        str(tmp_path / "empty") if text == "empty" else text for text in filter(None, [options.pop("inputs", "")])
    ]
    with pytest.raises(ValueError, match=message) as error:
        prepare(*inputs, **options)
    assert "\n" not in str(error.value)
    # The files that were left out are listed even so.
    rejected = ["rejected.jsonl"] if case in ("another layout", "another D", "nothing usable") else []
    assert rejected == [path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*")]


def test_names_must_differ(prepare: Any, source: Path, tmp_path: Path) -> None:
    write_shard(source / "shard.npz", [make_sequence("bzs/1")])
    with pytest.raises(PoseDataError, match="2 sequences of the input would be named bzs_1 in train"):
        prepare(**BY_LANGUAGE)


def test_a_name_from_a_file_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "train").mkdir(parents=True)
    write_shard(tmp_path / "in" / "train" / "a.npz", [make_sequence("../../../evil"), make_sequence("...")])
    prepare_data([str(tmp_path / "in")], tmp_path / "data", layout="coco_17")
    names = {path.name for path in (tmp_path / "data" / "train").iterdir()}
    assert names == {"_.._.._evil.npz", "_.npz"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "in"]


def test_what_is_there_is_not_replaced_unasked(prepare: Any, tmp_path: Path) -> None:
    prepare(**BY_LANGUAGE)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.npz")}
    with pytest.raises(PoseDataError, match=r"holds train, val, test already: give another output, or --overwrite"):
        prepare(**BY_LANGUAGE)
    with pytest.raises(PoseDataError, match="asl"):  # found out before anything is replaced
        prepare(split_by="prefix", splits={"test": "asl"}, overwrite=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.npz")}
    prepare(split_by="prefix", splits={"test": "bzs"}, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["rejected.jsonl", "test", "train"]
    assert len(read_split(tmp_path / "data" / "test")) == 5


def test_an_unwritable_output_is_an_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(PoseDataError, match=f"^{output} cannot be written"):
            prepare_data([str(source)], output, layout="coco_17", **BY_LANGUAGE)
    assert (tmp_path / "file").read_text() == ""


# ---- layouts, and what cannot be right ------------------------------------------------------------------------------


def moving(frames: int = 40) -> PoseSequence:
    """A person of 133 keypoints who waves; the right hand jumps far away in frame 20."""
    generator = np.random.default_rng(0)
    poses = np.ones((frames, 133, 3), np.float32)
    poses[..., :2] = generator.uniform(0, 60, (133, 2)) + generator.normal(size=(frames, 133, 2)).cumsum(0) * 0.2
    poses[:, 5, :2], poses[:, 6, :2], poses[:, :5, :2] = (90, 100), (10, 100), (50, 20)
    poses[20, 112:, :2] += 1000
    return PoseSequence("waving", poses, np.ones(frames, bool), 25.0)


@pytest.fixture
def waving(tmp_path: Path) -> Path:
    folder = tmp_path / "waving" / "train"
    folder.mkdir(parents=True)
    write_npz(folder / "waving.npz", moving())
    return tmp_path / "waving"


JUMP = r"waving\.npz, frame 20: teleporting hand: the right hand jumps"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_conversion_warns_of_its_input(waving: Path, tmp_path: Path, monkeypatch: Any, resumed: bool) -> None:
    """With the frame of the file, whatever the frame rate that is asked for; a run that goes on says it too."""
    if resumed:
        move = "modeling_pose_tokenizer.conversion._move"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(move, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            prepare_data([str(waving)], tmp_path / "data", fps=50.0)
        monkeypatch.setattr("modeling_pose_tokenizer.conversion.read_sequences", None)  # nothing is read again
    result = prepare_data([str(waving)], tmp_path / "data", fps=50.0)
    assert any(re.search(JUMP, str(problem)) for problem in result.check.problems)
    assert result.check.sequences == 1 and result.splits["train"].frames == 79


def test_a_check_comes_back_from_json(waving: Path) -> None:
    check, rejected, unknown = check_data([str(waving)], layout=get_skeleton("coco_wholebody_133"), num_proc=1)
    assert check.problems and not rejected and not unknown
    content = json.loads(json.dumps(check_to_json(check)))
    again = check_from_json(content, check.layout)
    assert check_to_json(again) == check_to_json(check)
    assert again.problems == check.problems and again.table() == check.table()
    assert vars(again).keys() == vars(PlausibilityCheck()).keys()


def test_check_reads_only_and_tells(
    waving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "reports" / "data.html"
    options = ["--input", waving, "--check", "--num-proc", 1]
    assert run(monkeypatch, *options, "--data-report", report) == 1
    out, err = capfd.readouterr()
    assert re.search("warning: .*" + JUMP, err) and "1 sequences, 40 frames; 0 files cannot be used" in out
    assert "teleporting hand" in report.read_text() and "<script" not in report.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reports", "waving"]
    sequence = moving()
    sequence.poses[20] = sequence.poses[19] + 0.01
    write_npz(waving / "train" / "waving.npz", sequence)
    (waving / "README.md").write_text("about")
    assert run(monkeypatch, *options) == 0
    (waving / "broken.npz").write_bytes(b"PK")
    assert run(monkeypatch, *options) == 1
    assert "broken.npz: is not an npz file" in capfd.readouterr().err
    assert run(monkeypatch, "--input", waving) == 2
    assert "expected --output DIR, or --check" in capfd.readouterr().err


def test_layouts_convert(waving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, "--input", waving, "--output", tmp_path / "data", "--to-layout", "unisign_69") == 0
    sequence = read_split(tmp_path / "data" / "train")["waving"]
    source, target = (get_skeleton(name).keypoint_names for name in ("coco_wholebody_133", "unisign_69"))
    np.testing.assert_array_equal(sequence.poses, moving().poses[:, [source.index(name) for name in target]])
    assert capsys.readouterr().out.splitlines()[1].split()[4] == "unisign_69"
    assert run(monkeypatch, "--input", waving, "--output", tmp_path / "b", "--to-layout", "openpose_137") == 0
    assert "neck is midway between the shoulders" in capsys.readouterr().out


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("keypoint_names: a b c\nedges: [a b c]\nparts: {body: a b, left_hand: c}\n")
    (tmp_path / "in" / "train").mkdir(parents=True)
    write_npz(tmp_path / "in" / "train" / "x.npz", PoseSequence("x", np.ones((3, 3, 4)), np.ones(3, bool), 25.0))
    result = prepare_data([str(tmp_path / "in")], tmp_path / "data", layout=str(tmp_path / "own.yaml"))
    assert dict(result.splits["train"].keypoints) == {"body": 6, "left_hand": 3}


# ---- links and names ------------------------------------------------------------------------------------------------


def test_links_are_followed_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "train").symlink_to(source / "ase", target_is_directory=True)
    (source / "ase" / "back").symlink_to(tmp_path / "tree", target_is_directory=True)
    prepare_data([str(tmp_path / "tree")], tmp_path / "data", layout="coco_17")
    assert sorted(read_split(tmp_path / "data" / "train")) == ["0", "1", "2", "3"]


@given(st.text(min_size=1, max_size=300))
def test_any_id_is_a_file_name(id: str) -> None:
    name = conversion._file_name(id)
    assert 0 < len(name.encode()) <= 200 and "/" not in name and not name.startswith(".") and name.isprintable()
    assert name != conversion._file_name(id + "x" * 300)


def test_ctrl_c_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "in" / "train").mkdir(parents=True)
    for number in range(200):
        write_npz(tmp_path / "in" / "train" / f"{number}.npz", make_sequence(str(number), 40))
    command = [sys.executable, str(SCRIPT), "--input", str(tmp_path / "in"), "--layout", "coco_17"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "data"), "--num-proc", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    done, deadline = tmp_path / "data" / ".unfinished" / "done", time.monotonic() + 60
    while not list(done.glob("[!.]*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "Stopped: what is converted is kept, and the same command goes on from here."


# ---- the command ----------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *options: Any) -> Any:
    """Runs the script; returns its exit code, which for an error is the message that Python prints."""
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, options)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as error:
        return error.code
    return 0


def test_the_command_prepares_a_python_package(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's own options, on a package of the same form."""
    package = tmp_path / "site" / "some_lexicon"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package itself is not needed')")
    source.rename(package / "assets")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_input("some_lexicon:assets/ase") == package / "assets" / "ase"
    options = ["--input", "some_lexicon:assets", "--output", tmp_path / "data", "--layout", "coco_17"]
    options += ["--split-by", "prefix", "--split.val", "csq,swl", "--split.test", "ase"]
    assert run(monkeypatch, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["train", "5"], ["val", "5"], ["test", "4"]]
    assert "holds train, val, test already" in run(monkeypatch, *options)
    (package / "assets" / "ase" / "bad.npz").write_text("")
    assert run(monkeypatch, *options, "--overwrite", "--max-rejected", 0.2) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 files were left out: see rejected.jsonl."
    assert "bad.npz: is not an npz file" in run(monkeypatch, *options, "--overwrite", "--strict")


def test_the_command_says_what_is_wrong_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = run(monkeypatch, "--input", tmp_path / "nowhere", "--output", tmp_path / "data")
    assert message == f"There is no file or folder {tmp_path / 'nowhere'}."
    assert run(monkeypatch, "--input", "a", "--output", "b", "--colour", "red") == 2
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
