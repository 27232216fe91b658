"""Ctrl-C: every command ends with one sentence and exit code 130, and leaves nothing half-written.

Real processes and real signals, sent to all of the session as a terminal does, at a place that the test chooses.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.extraction import extract_tokens
from modeling_pose_tokenizer.hub import load_pretrained
from runs import TRAIN, arguments, write_sequences

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
# Ctrl-C when a module is asked for: while the program still imports.
AT_IMPORT = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == WHERE:
            os.killpg(0, signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
"""
# Ctrl-C when a function is called, for the TIMES-th time; then it does its work.
AT_CALL = """
import functools, importlib, itertools, os, runpy, signal, sys
import modeling_pose_tokenizer.commands
place, _, name = WHERE.rpartition(".")
module, *names = place.split(":")
holder = functools.reduce(getattr, names, importlib.import_module(module))
original, calls = getattr(holder, name), itertools.count(1)
@functools.wraps(original)  # which pickles by name, for workers
def stop(*args, **options):
    if next(calls) == TIMES:
        os.killpg(0, signal.SIGINT)
    return original(*args, **options)
setattr(holder, name, stop)
"""
RUN = "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"


def interrupt(before: str, where: str, command: list[Any], times: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a script and has Ctrl-C pressed somewhere in it."""
    program = f"WHERE, TIMES = {where!r}, {times}\n{before}{RUN}"
    line = [sys.executable, "-c", program, *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, start_new_session=True)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_stopped(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("Stopped") == 1
    assert done.stderr.splitlines()[-1] == f"Stopped: {says}"


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and tokens of it."""
    folder = tmp_path_factory.mktemp("interrupted")
    for split in ("train", "val"):
        write_sequences(folder / "data" / split, 40, seed=1)
    model, feature_extractor = load_pretrained(checkpoint)
    dataset = PoseDataset(folder / "data", feature_extractor=feature_extractor, cache_dir=folder / "cache")
    extract_tokens(model, dataset, folder / "tokens", shard_frames=200)
    for name, error in (("a", 0.5), ("b", 0.25)):
        (folder / name).mkdir()
        rows = [{"id": f"{number}", "frames": 7, "figures": {"overall": {"mpjpe": [error, 9]}}} for number in range(3)]
        (folder / name / "sequences.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (folder / name / "metrics.json").write_text("{}")
    return folder


@pytest.mark.parametrize("path", [*SCRIPTS, TRAIN], ids=lambda path: path.stem)
def test_every_command_answers_from_its_first_import_on(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert isinstance(first, ast.ImportFrom) and first.module == "modeling_pose_tokenizer.commands"
    assert "run_command(" in ast.unparse(tree.body[-1]) and "__name__ == '__main__'" in ast.unparse(tree.body[-1])


def test_nothing_else_touches_signals_on_import() -> None:
    """A library that answers Ctrl-C takes it from the notebook that imports it."""
    for path in (ROOT / "modeling_pose_tokenizer").glob("*.py"):
        assert "from .commands import" not in path.read_text("utf-8")


@pytest.mark.parametrize("where", ["numpy", "torch"])
def test_while_it_imports(where: str, folder: Path, tmp_path: Path) -> None:
    done = interrupt(AT_IMPORT, where, [ROOT / "scripts" / "extract_tokens.py", "--help"])
    assert done.returncode == 130 and not done.stdout
    assert done.stderr == "\nStopped before anything was done: the same command begins again.\n"


def test_a_job_in_the_background_goes_on() -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + AT_IMPORT
    done = interrupt(program, "torch", [ROOT / "scripts" / "compare.py", "--help"])
    assert done.returncode == 0 and done.stdout.startswith("usage:")


# What is said, and a place in the middle of the work: the function, and the call that is interrupted.
STOPPED = {
    "animate": ("nothing was written; the same command begins again.", "visualization._draw", 5),
    "compare": ("nothing was written; the same command compares again.", "comparison.compare", 1),
    "decode_tokens": (
        "the files that are there are whole; the same command decodes all again.",
        "decoding.write_npz",
        5,
    ),
    "evaluate": ("metrics.json is written last; the same command measures again.", "evaluation._measure", 1),
    "export": ("only files that passed their check are kept; the same command exports again.", "export._write", 1),
    "extract_tokens": (
        "the shards that are complete stay; the same command goes on from there.",
        "extraction._encode_shard",
        2,
    ),
    "prepare_data": ("what is converted is kept, and the same command goes on from here.", "conversion._convert", 2),
    "push_to_hub": (
        "the repository has all of the commit or nothing of it; the same command commits again.",
        "hub.load_pretrained",
        1,
    ),
    "train": (
        "the same command begins again, from the newest checkpoint if there is one.",
        "preparation.make_optimizer",
        1,
    ),
}


def command(name: str, folder: Path, model: Path, out: Path) -> list[Any]:
    """The script and its options."""
    if name == "train":
        return [TRAIN, *arguments(folder / "data", out)]
    data = ["--data", folder / "data"]
    options: dict[str, list[Any]] = {
        "animate": ["--input", folder / "data" / "val" / "000.npz", "--output", out / "a.gif", "--layout", "coco_17"],
        "compare": [folder / "a", folder / "b", "--output", out / "a.json"],
        "decode_tokens": ["--model", model, "--tokens", folder / "tokens", "--output", out],
        "evaluate": ["--model", model, *data, "--split", "val", "--output", out, "--visualize", "--sequences", 1],
        "export": ["--model", model, "--format", "torchscript", "--output", out],
        "extract_tokens": ["--model", model, *data, "--output", out, "--shard-frames", 200, "--num-proc", 2],
        "prepare_data": ["--input", folder / "data", "--layout", "coco_17", "--output", out],
        "push_to_hub": ["--model", model, "--repo-id", "me/mine", "--card", out / "card.md", "--plain-card"],
    }
    return [ROOT / "scripts" / f"{name}.py", *options[name]]


def in_the_middle_or_before_the_name() -> list[Any]:
    """Two interruptions of each command; one of the second kind runs with the other tests."""
    cases = [pytest.param(name, *place, marks=pytest.mark.slow) for name, (_, *place) in STOPPED.items()]
    named = [name for name in STOPPED if name not in ("push_to_hub", "train")]
    return cases + [
        pytest.param(name, "os.replace", 1, marks=() if name == "extract_tokens" else pytest.mark.slow)
        for name in named
    ]


@pytest.mark.parametrize(("name", "place", "times"), in_the_middle_or_before_the_name())
def test_ctrl_c(name: str, place: str, times: int, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """One sentence; what is there is whole; the same command makes of it what an uninterrupted run makes."""
    (tmp_path / "out").mkdir()
    line = command(name, folder, checkpoint, tmp_path / "out")
    done = interrupt(AT_CALL, place if place == "os.replace" else f"modeling_pose_tokenizer.{place}", line, times)
    assert_stopped(done, STOPPED[name][0])
    left = {path: own for path, own in listing(tmp_path / "out").items() if not path.startswith(".unfinished/")}
    assert not [path for path in left if Path(path).name.startswith(".")]
    if name == "push_to_hub":
        return  # no Hub here
    again = subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    final = listing(tmp_path / "out")
    if name != "train":  # whose log goes on
        assert {path: final[path] for path in left if path != "manifest.json"} == {
            path: own for path, own in left.items() if path != "manifest.json"
        }
    assert final and not [path for path in final if Path(path).name.startswith(".")]


@pytest.mark.slow
def test_ctrl_c_reaches_every_rank(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A launcher passes it on: the first rank speaks, none goes on. The launcher's own words are not ours."""
    line = command("extract_tokens", folder, checkpoint, tmp_path / "out")
    program = tmp_path / "program.py"
    where = "modeling_pose_tokenizer.extraction._encode_shard"
    at_launcher = AT_CALL.replace("os.killpg(0, signal.SIGINT)", "os.kill(os.getppid(), signal.SIGINT)")
    program.write_text(f"WHERE, TIMES = {where!r}, 2\n{at_launcher}{RUN}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    ranks = [*map(str, launcher), str(program), *map(str, line)]
    done = subprocess.run(ranks, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count(f"Stopped: {STOPPED['extract_tokens'][0]}") == 1 == done.stderr.count("Stopped")
    assert not [path for path in listing(tmp_path / "out") if Path(path).name.startswith(".")]
    subprocess.run([sys.executable, *map(str, line)], capture_output=True, check=True)
    assert listing(tmp_path / "out").keys() == listing(folder / "tokens").keys()


@pytest.mark.parametrize(("handler", "code"), [("pass", 130), ("signal.signal(signal.SIGINT, lambda *_: None)", 0)])
def test_workers_outlive_ctrl_c_as_long_as_their_parent_does(handler: str, code: int) -> None:
    """Training answers Ctrl-C by going on to the end of the step, however often a launcher passes it on."""
    program = f"""
import os, signal
from modeling_pose_tokenizer.commands import run_command
def main():
    {handler}
    if worker := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    os.kill(os.getpid(), signal.SIGINT)
    os.write(1, b"works\\n")
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(0)
run_command(main, "")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "works\n", "")


def test_ctrl_c_twice_ends_at_once(folder: Path, tmp_path: Path) -> None:
    """The second comes while the first is answered: Python itself would wait for its workers without an end."""
    twice = AT_CALL.replace("os.killpg(0, signal.SIGINT)", "os.killpg(0, signal.SIGINT), time.sleep(2)")
    line = command("prepare_data", folder, folder, tmp_path / "out")
    where = "modeling_pose_tokenizer.conversion._convert"
    done = interrupt(twice.replace("import functools", "import time, functools"), where, [*line, "--num-proc", 2], 1)
    assert_stopped(done, STOPPED["prepare_data"][0])
    assert not (tmp_path / "out" / "train").exists()
