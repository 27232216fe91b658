"""The real training/train.py on tiny data: it runs, is launched in every way, dies, goes on, and refuses nonsense."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from modeling_pose_tokenizer import PoseTokenizerModel, PoseTokenizerStream, tracking
from modeling_pose_tokenizer.checkpoints import WeightAverage
from modeling_pose_tokenizer.hub import load_pretrained
from modeling_pose_tokenizer.presets import load_run_config
from modeling_pose_tokenizer.tracking import describe_codes
from runs import MEASURED, ROOT, TRAIN, arguments, has_reached, read_log, run_script, write_sequences

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_sequences(folder / "train", 13, seed=1)
    write_sequences(folder / "val", 5, seed=2)
    (folder / "train" / "broken.npz").write_bytes(b"not an npz")
    return folder


def launch(*command: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:  # with the ranks that it has started
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not has_reached(output, step):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@contextmanager
def terminated_at(output: Path, step: int) -> Iterator[None]:
    """Sends this process SIGTERM as soon as the run in it has logged a step."""

    def wait_and_send() -> None:
        while not has_reached(output, step):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the run be over before
    Thread(target=wait_and_send, daemon=True).start()
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert run_script(arguments(data, output, tracking__pictures=1)) == 0
    return output


def test_a_run_leaves_what_its_manual_says(data: Path, finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "best", "last", "checkpoints", "pictures", "config.yaml", "log.jsonl", "rejected.jsonl",
    }  # fmt: skip
    log = read_log(finished, without=())
    steps = [line for line in log if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(np.isfinite(list(line.values())).all() for line in log)
    tracked = {"grad_norm", "learning_rate", "codebook_use", "token_entropy", "skipped_steps", "loss"}
    assert {f"train/{name}" for name in tracked} | MEASURED <= set(steps[0])
    assert all(0 <= line["train/data_wait"] <= 1 and line["train/memory_gib"] > 0.1 for line in steps)
    validations = [line["val/mpjpe"] for line in log if "val/mpjpe" in line]
    assert len(validations) == 3 and validations[-1] < validations[0]
    assert len(list((finished / "pictures").glob("reconstruction-0-*.png"))) == 3
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-00000009", "step-00000012"]
    (rejected,) = (finished / "rejected.jsonl").read_text("utf-8").splitlines()
    assert json.loads(rejected)["path"].endswith("broken.npz")
    repeated = load_run_config(["--config", str(finished / "config.yaml")])
    assert repeated == load_run_config(arguments(data, finished, tracking__pictures=1))


def test_the_model_is_gone_before_the_ranks_part(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else gloo waits in the model's destructor for a thread that waits for Python: runs hung at their end."""
    models, left = [], []
    initialize = PoseTokenizerModel.initialize_from_data

    def remember(self: PoseTokenizerModel, *args: object) -> None:
        models.append(weakref.ref(self))
        initialize(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PoseTokenizerModel, "initialize_from_data", remember)
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda self: left.extend(model() for model in models))
    assert run_script(arguments(data, tmp_path / "run", training__max_steps=2)) == 0
    assert left == [None]


def test_best_and_last_load_as_they_are(data: Path, finished: Path) -> None:
    with np.load(data / "val" / "000.npz") as file:
        poses = file["poses"]
    for name in ("best", "last"):
        model, feature_extractor = load_pretrained(finished / name)
        assert feature_extractor.mean is not None  # statistics of the training data travel with the model
        inputs = feature_extractor(poses, fps=25, return_tensors="pt")
        with torch.no_grad():
            output = model(inputs["input_values"], inputs["padding_mask"])
        (reconstruction,) = feature_extractor.postprocess(output.pose_values, inputs)
        assert reconstruction.shape == poses.shape
    # What is saved are the averaged weights; the checkpoint has those of the last step.
    own = load_file(finished / "checkpoints" / "step-00000012" / "model.safetensors")
    averaged = load_file(finished / "last" / "model.safetensors")
    assert torch.equal(own["quantizer.codebook"], averaged["quantizer.codebook"])
    assert not torch.equal(own["decoder.head.weight"], averaged["decoder.head.weight"])


def test_a_run_that_was_stopped_and_killed_equals_one_that_was_not(
    data: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    with terminated_at(output, step=2):
        assert run_script(arguments(data, output)) == 0
    assert "the same command goes on from there" in capfd.readouterr().out
    assert len(read_log(output)) < len(read_log(finished))

    process = launch(sys.executable, TRAIN, *arguments(data, output))
    wait_for_step(output, 8, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    damaged = max((output / "checkpoints").glob("step-*"))
    (damaged / "optimizer.bin").write_bytes(b"half")

    assert run_script(arguments(data, output)) == 0
    assert f"{damaged} is passed over: optimizer.bin is not what manifest.json says" in capfd.readouterr().out
    assert read_log(output) == read_log(finished)
    for name in ("best", "last"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (output, finished))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_both_launchers(data: Path, tmp_path: Path, launcher: str) -> None:
    small = {"training__gradient_accumulation_steps": 2, "training__max_steps": 4, "training__batch_size": 2}
    presets = ["--config", "configuration/small.yaml", "--config", "configuration/streaming.yaml"]
    args = [*presets, *arguments(data, tmp_path / "run", **small)]
    if launcher == "torchrun":
        command = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", TRAIN]
    else:
        command = [BIN / "accelerate", "launch", "--config_file", ROOT / "training" / "accelerate" / "cpu.yaml", TRAIN]
    output = finish(launch(*command, *args))
    windows = 8 if launcher == "torchrun" else 4
    assert f"each of {windows} windows of 8 frames" in output
    assert len(read_log(tmp_path / "run")) == 5  # by one rank only
    model, _ = load_pretrained(tmp_path / "run" / "best")
    stream, poses = PoseTokenizerStream(model.eval()), torch.rand(1, 8, model.config.num_keypoints, 3)
    assert torch.equal(stream.push(poses), model.encode(poses).pose_codes)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__mixed_precision": "bf16", "training__gradient_checkpointing": True, "model__num_joint_layers": 1},
        {"training__optimizer_type": "sgd", "training__scheduler_type": "linear", "training__batch_size": 99},
        {"training__optimizer_type": "adam", "training__scheduler_type": "constant", "training__max_grad_norm": 0},
        {"data__sequence_length": None, "training__mixed_precision": "bf16", "training__max_steps": 12},
        {"model__quantizer": "fsq", "model__codebook_size": 64, "data__num_workers": 1, "data__val_windows": 2},
        {"training__mixed_precision": "fp16", "training__scheduler_type": "polynomial",
         "training__scheduler_options": {"power": 3}},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)  # fmt: skip
def test_options(data: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    changes = {"training__max_steps": None, "training__num_epochs": 1} | changes
    assert run_script(arguments(data, tmp_path / "run", **changes)) == 0
    assert read_log(tmp_path / "run")[-1]["step"] == (1 if changes.get("training__batch_size") == 99 else 12)
    load_pretrained(tmp_path / "run" / "last")


def test_a_compiled_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as accelerate launch does; inductor takes minutes
    assert run_script(arguments(data, tmp_path / "run", training__max_steps=2, training__save_every=1)) == 0
    assert run_script(arguments(data, tmp_path / "run", training__max_steps=3, training__save_every=1)) == 0
    load_pretrained(tmp_path / "run" / "best")
    torch.compiler.reset()


@pytest.mark.slow
def test_a_run_compiled_by_inductor(data: Path, tmp_path: Path) -> None:
    assert run_script(arguments(data, tmp_path / "run", training__max_steps=2, training__compile=True)) == 0
    load_pretrained(tmp_path / "run" / "best")
    torch.compiler.reset()


def test_a_tracker_that_is_not_installed_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    assert run_script(arguments(data, tmp_path / "run", tracking__tracker="wandb")) == 1
    assert capfd.readouterr().err == (
        "tracking.tracker is wandb, which is not installed; `pip install wandb`, or say none.\n"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__path": "nowhere"}, "nowhere"),
        ({"data__val_split": "test"}, "test"),
        ({"data__val_split": "empty"}, "empty"),
        ({"data__max_rejected": 0.01}, "broken.npz"),
        ({"data__strict": True}, "broken.npz"),
        ({"model__skeleton": "coco_wholebody_133"}, "17 keypoints"),
        ({"model__keypoint_dim": 4}, "3 values"),
        ({"model__kernel_size": 2}, "kernel_size is 2"),
        ({"training__scheduler_options": {"speed": 1}}, "training.scheduler_options do not suit"),
        ({"training__bath_size": 3}, "the nearest valid one is training.batch_size"),
    ],
)
def test_mistakes_are_refused_in_one_sentence_and_nothing_is_written(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture, changes: dict[str, object], words: str
) -> None:
    (data / "empty").mkdir(exist_ok=True)
    assert run_script(arguments(data, tmp_path / "run", **changes)) == 1
    sentence = capfd.readouterr().err.strip().splitlines()[-1]
    assert words in sentence and sentence.endswith(".")
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_or_is_taken_is_refused(
    data: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    before = sorted(finished.rglob("*"))
    for output, changes, words in [
        (tmp_path / "file", {}, f"{tmp_path / 'file'} is no folder that can be written"),
        (tmp_path / "file" / "run", {}, f"{tmp_path / 'file'} is no folder that can be written"),
        (finished, {"training__resume": False}, "holds a run and training.resume is false"),
        (finished, {"model__hidden_size": 12}, "holds a run whose model.hidden_size is 8, and now it is 12"),
    ]:
        assert run_script(arguments(data, output, **changes)) == 1
        assert words in capfd.readouterr().err
    assert run_script([argument for argument in arguments(data, tmp_path) if "output_dir" not in argument]) == 1
    assert "training.output_dir is not given" in capfd.readouterr().err
    assert sorted(finished.rglob("*")) == before


def test_the_exit_code_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", f"--data.path={tmp_path}", f"--training.output_dir={tmp_path}/run"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert exit_info.value.code == 1
    assert "train" in capfd.readouterr().err


@given(st.floats(0, 1), st.integers(1, 20), st.integers(0, 2**16))
def test_averaged_weights_follow_the_formula(decay: float, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((2, 3), (4,))]
    average = WeightAverage(weights, decay)
    expected = [weight.detach().clone() for weight in weights]
    for step in range(1, steps + 1):
        keep = min(decay, (1 + step) / (10 + step))
        for index, weight in enumerate(weights):
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
            expected[index] = keep * expected[index] + (1 - keep) * weight.detach()
        average.update()
    own = [weight.detach().clone() for weight in weights]
    with average.in_place():
        for weight, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.detach(), value)
    assert all(torch.equal(weight, value) for weight, value in zip(weights, own, strict=True))
    other = WeightAverage(weights, decay)
    other.load_state_dict(average.state_dict())
    assert other.updates == steps
    assert all(torch.equal(first, second) for first, second in zip(other.average, average.average, strict=True))


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=4))
def test_codebook_use_is_the_share_of_equally_used_codes(counts: list[list[int]]) -> None:
    use, entropy = [], []
    for row in counts:
        shares = [count / sum(row) for count in row if count]
        entropy.append(-sum(share * math.log2(share) for share in shares))
        use.append(2 ** entropy[-1] / len(row))
    measured = describe_codes(torch.tensor(counts, dtype=torch.float64))
    assert measured["train/codebook_use"].item() == pytest.approx(sum(use) / len(use))
    assert measured["train/token_entropy"].item() == pytest.approx(sum(entropy) / len(entropy))
