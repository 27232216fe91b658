"""Laws of several ranks, by two real gloo processes: equal codebooks everywhere, and the losses of one rank."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from modeling_pose_tokenizer import PoseTokenizerModel
from ranks import CASES
from runs import ROOT, TRAIN, arguments, read_log, write_sequences

LAUNCHES = ROOT / "training" / "accelerate"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tests/ranks.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_equal_on_different_data(case: str, results: dict[str, Any]) -> None:
    first, second = results[case]["hashes"]
    assert first == second
    assert results[case].get("replaced", True)  # else the test has seen no dead code


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_with_half_batches_follow_one_with_whole_batches(kind: str, results: dict[str, Any]) -> None:
    whole, halves = results["curves"]["whole"], results["curves"][kind]
    assert len(whole) == len(halves) == 20 and whole[-1] < whole[1]
    assert halves == pytest.approx(whole, rel=1e-5)


def test_every_launch_configuration_is_read_and_named() -> None:
    page = (LAUNCHES / "README.md").read_text("utf-8")
    for path in LAUNCHES.iterdir():
        assert path.name == "README.md" or path.name in page
        if path.suffix == ".yaml":
            assert load_config_from_file(str(path)).main_training_function == "main"
            assert yaml.safe_load(path.read_text("utf-8"))["num_machines"] == 1


def launch(script: Path, args: list[str]) -> str:
    """Two ranks on the CPU by the launch configuration for FSDP; what they said."""
    options = ["--config_file", str(LAUNCHES / "fsdp.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*command, str(script), *args], check=False, env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert not done.returncode, done.stderr
    return done.stderr


@pytest.mark.slow  # three launches; what FSDP does to codebooks is tested above in one
def test_a_sharded_run_by_its_launch_configuration_follows_ddp_and_goes_on(tmp_path: Path) -> None:
    """Where accelerate does not shard, on a CPU, the same launch is DDP, and says so."""
    write_sequences(tmp_path / "data" / "train", 8, seed=1)
    write_sequences(tmp_path / "data" / "val", 2, seed=2)
    shared = {"training__scheduler_type": "constant", "training__save_every": 4}
    said = launch(TRAIN, arguments(tmp_path / "data", tmp_path / "ddp", **shared, training__max_steps=8))
    assert "FSDP" in said
    for steps in (4, 8):  # the second goes on from the first one's checkpoint
        args = arguments(tmp_path / "data", tmp_path / "fsdp", **shared, training__max_steps=steps)
        assert "every rank holds the whole model" not in launch(ROOT / "tests" / "sharded_training.py", args)
    names = {path.name for path in (tmp_path / "fsdp" / "checkpoints" / "step-00000008").iterdir()}
    assert "pytorch_model_fsdp.bin" in names  # it was sharded
    logs = [read_log(tmp_path / name) for name in ("ddp", "fsdp")]
    assert len(logs[0]) == len(logs[1])
    for whole, sharded in zip(*logs, strict=True):
        assert sharded == pytest.approx(whole, rel=1e-5)
    models = [PoseTokenizerModel.from_pretrained(tmp_path / name / "last") for name in ("ddp", "fsdp")]
    for weight, other in zip(*(model.state_dict().values() for model in models), strict=True):
        torch.testing.assert_close(weight, other)


def test_the_slurm_script_trains_ranks_with_uneven_batches(tmp_path: Path) -> None:
    """Whole sequences in batches that two cannot share evenly, one to validate on; only the scheduler is not real."""
    write_sequences(tmp_path / "data" / "train", 5, seed=1)
    write_sequences(tmp_path / "data" / "val", 1, seed=2)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", 'exec "$@"'), ("scontrol", "echo localhost")):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    paths = [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths), "MASTER_PORT": "0", "SLURM_GPUS_ON_NODE": "2"}
    environment |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    args = arguments(tmp_path / "data", tmp_path / "run", data__sequence_length=None, training__max_steps=6)
    command = [shutil.which("bash") or "bash", LAUNCHES / "slurm.sh", *args]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert not done.returncode, done.stderr
    assert read_log(tmp_path / "run")[-1]["step"] == 6
