"""Runs that are killed with SIGKILL at any moment and started again equal the run that nobody killed, bit for bit."""

import multiprocessing
import os
import runpy
import time
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

import pytest

from runs import ROOT, TRAIN, arguments, has_reached, read_log, write_sequences

# Real processes from a server that has imported everything: what is killed is the run, not the import of libraries.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["accelerate", "datasets", "modeling_pose_tokenizer.evaluation"])


def run_quietly(args: list[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os._exit(runpy.run_path(str(TRAIN))["main"](args))


def start(args: list[str]) -> BaseProcess:
    """The real script in a process of its own."""
    process = PROCESSES.Process(target=run_quietly, args=(args,))
    process.start()
    return process


def finish(args: list[str]) -> float:
    """Runs to the end; returns seconds."""
    begin = time.perf_counter()
    process = start(args)
    process.join(timeout=240)
    assert process.exitcode == 0
    return time.perf_counter() - begin


def kill(process: BaseProcess) -> bool:
    """Whether it was still running."""
    process.kill()
    process.join()
    return process.exitcode == -9


def final_hashes(output: Path, step: int) -> list[object]:
    """Hashes of everything in the last checkpoint (weights, codebooks, optimizer, average, random states, place in the
    data), the weights of best and last, and every number of the log."""
    manifest = output / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    weights = [(output / name / "model.safetensors").read_bytes() for name in ("best", "last")]
    return [manifest.read_text("utf-8"), *weights, read_log(output)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_sequences(folder / "train", 13, seed=1)
    write_sequences(folder / "val", 5, seed=2)
    return folder


def test_three_kills(data: Path, tmp_path: Path) -> None:
    options = {"training__max_steps": 24, "training__save_every": 2}
    finish(arguments(data, tmp_path / "calm", **options))
    args, random = arguments(data, tmp_path / "killed", **options), Random()
    for step in (3, 11, 19):
        process = start(args)
        while not has_reached(tmp_path / "killed", step):
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))  # into the next steps, a validation or the writing of a checkpoint
        assert kill(process)
    finish(args)
    assert final_hashes(tmp_path / "killed", 24) == final_hashes(tmp_path / "calm", 24)


@pytest.mark.slow
def test_fifty_kills_of_the_small_preset(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_sequences(data / "train", 40, seed=1, num_keypoints=133)
    write_sequences(data / "val", 5, seed=2, num_keypoints=133)

    def command(output: Path) -> list[str]:
        changes = {"max_steps": 12, "init_batches": 4, "save_every": 2, "eval_every": 4}
        changes |= {"log_every": 1, "num_threads": 1}
        options = {"data.path": data, "training.output_dir": output, "tracking.pictures": 0}
        options |= {f"training.{key}": value for key, value in changes.items()}
        preset = ["--config", str(ROOT / "configuration" / "small.yaml")]
        return preset + [f"--{key}={value}" for key, value in options.items()]

    finish(command(tmp_path / "first"))  # builds the cache
    seconds = finish(command(tmp_path / "calm"))
    expected, random, kills = final_hashes(tmp_path / "calm", 12), Random(), 0
    for number in count():
        if kills == 50:
            break
        output = tmp_path / f"killed-{number}"
        process = start(command(output))
        time.sleep(random.uniform(0, 0.9 * seconds))
        if not kill(process):
            continue  # it had ended: another one
        kills += 1
        finish(command(output))
        assert final_hashes(output, 12) == expected, f"after kill {kills}"
