"""Training from a stream of shards: exact after a kill, on one rank and on two, and from the Hub."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hub_server import HubServer, Repository
from modeling_pose_tokenizer.formats import PoseSequence, write_shard
from runs import ROOT, TRAIN, arguments, has_reached, read_log, run_script, write_sequences
from test_resume import final_hashes, finish, kill, start

STREAM = {"data__streaming": True, "data__shuffle_buffer": 4, "training__max_steps": 16, "training__batch_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of three sequences to train on, files to validate with."""
    folder = tmp_path_factory.mktemp("data")
    write_sequences(folder / "files", 12, seed=1)
    write_sequences(folder / "val", 5, seed=2)
    (folder / "train").mkdir()
    sequences = []
    for path in sorted((folder / "files").iterdir()):
        with np.load(path) as file:
            poses = file["poses"]
        sequences.append(PoseSequence(path.stem, poses, np.ones(len(poses), bool), 25.0))
    for shard in range(4):
        write_shard(folder / "train" / f"{shard}.npz", sequences[3 * shard : 3 * shard + 3])
    return folder


def test_a_killed_run_goes_on_in_the_stream(data: Path, tmp_path: Path) -> None:
    finish(arguments(data, tmp_path / "calm", **STREAM))
    args = arguments(data, tmp_path / "killed", **STREAM)
    process = start(args)
    while not has_reached(tmp_path / "killed", 8):  # behind the first epoch of six batches
        assert process.is_alive()
        time.sleep(0.005)
    assert kill(process)
    finish(args)
    assert final_hashes(tmp_path / "killed", 16) == final_hashes(tmp_path / "calm", 16)


@pytest.mark.slow
def test_two_ranks_that_are_killed_go_on_in_their_streams(data: Path, tmp_path: Path) -> None:
    def launch(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TRAIN)]
        return subprocess.Popen(
            [*command, *arguments(data, output, **STREAM)], start_new_session=True, stderr=subprocess.DEVNULL
        )

    assert launch(tmp_path / "calm").wait(240) == 0
    killed = launch(tmp_path / "killed")
    while not has_reached(tmp_path / "killed", 8):
        assert killed.poll() is None
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert launch(tmp_path / "killed").wait(240) == 0
    assert final_hashes(tmp_path / "killed", 16) == final_hashes(tmp_path / "calm", 16)


def test_a_run_reads_the_hub(data: Path, tmp_path: Path) -> None:
    calm = STREAM | {"training__max_steps": 4}
    finish(arguments(data, tmp_path / "local", **calm))
    with HubServer() as hub:
        paths = [*(data / "train").iterdir(), *(data / "val").glob("*.npz")]
        files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}
        hub.repositories["datasets", "someone/signs"] = Repository(branches={"main": files})
        args = arguments("hf://datasets/someone/signs", tmp_path / "run", **calm)  # type: ignore[arg-type]
        done = subprocess.run(
            [sys.executable, TRAIN, *args],
            check=False, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
    assert not done.returncode, done.stderr
    assert read_log(tmp_path / "run") == read_log(tmp_path / "local")


def test_a_stream_is_refused_where_its_length_must_be_known(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, sentence in (
        ({"training__max_steps": None}, "training.max_steps is null, but data.streaming is true"),
        ({"data__sequence_length": None}, "data.sequence_length is null, but data.streaming is true"),
    ):
        assert run_script(arguments(data, tmp_path / "run", **STREAM | changes)) == 1
        assert sentence in capsys.readouterr().err
    hub: Path = "hf://datasets/someone/signs"  # type: ignore[assignment]
    assert run_script(arguments(hub, tmp_path / "run")) == 1
    assert "data.path is hf://datasets/someone/signs, on the Hub; say --data.streaming true" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
