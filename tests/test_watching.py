"""Nothing goes wrong in silence: bad steps are skipped, counted and named, collapsed codebooks are named, a dry run
writes nothing and says what a run costs."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerLoss
from modeling_pose_tokenizer.checkpoints import Progress
from modeling_pose_tokenizer.loss_pose_tokenizer import LossInputs
from modeling_pose_tokenizer.watching import TrainingError, TrainingWatch
from models import random_poses, small_config, train_model
from runs import arguments, read_log, run_script, write_sequences


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_sequences(folder / "train", 13, seed=1)
    write_sequences(folder / "val", 5, seed=2)
    return folder


def make_watch() -> TrainingWatch:
    config = {"skeleton": "coco_17", "token_groups": "whole", "num_quantizers": 1, "codebook_size": 16}
    return TrainingWatch(Accelerator(cpu=True), Progress(), Path("data/train"), PoseTokenizerConfig(**config))


def test_ten_bad_steps_in_a_row_end_the_run_and_name_the_sequences(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert run_script(arguments(data, tmp_path / "run", training__learning_rate=1e20, training__save_every=5)) == 1
    sentence = capfd.readouterr().err.strip().splitlines()[-1]
    assert "the loss or its gradient is no finite number for the 10th step in a row" in sentence
    assert "lower training.learning_rate" in sentence and str(data / "train") in sentence
    assert all(
        name in {f"{number:03}" for number in range(13)} for name in sentence.rsplit(": ", 1)[1][:-1].split(", ")
    )
    log = [line for line in read_log(tmp_path / "run") if "train/loss" in line]
    assert log[-1]["train/skipped_steps"] == 9  # the tenth ended the run
    assert (tmp_path / "run" / "checkpoints" / "step-00000005" / "manifest.json").exists()


def test_a_bad_step_is_skipped_and_the_run_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch of sane files does it, since coordinates are checked when they are read: the loss is made to."""
    calls, loss_position = [], PoseTokenizerLoss.loss_position

    def sometimes_bad(self: PoseTokenizerLoss, inputs: LossInputs) -> torch.Tensor:
        calls.append(self.training)
        loss = loss_position(self, inputs)
        return loss * math.inf if len(calls) in (3, 4, 7) else loss

    monkeypatch.setattr(PoseTokenizerLoss, "loss_position", sometimes_bad)
    assert run_script(arguments(data, tmp_path / "run")) == 0
    log = [line for line in read_log(tmp_path / "run") if "train/loss" in line]
    assert [line["train/skipped_steps"] for line in log] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert [math.isfinite(line["train/loss"]) for line in log] == [number not in (3, 4, 7) for number in range(1, 13)]
    for folder in ("best", "last", "checkpoints/step-00000012"):
        weights = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())


@given(st.lists(st.booleans(), max_size=40))
def test_skipped_steps_are_counted_and_ten_in_a_row_are_the_end(good: list[bool]) -> None:
    watch, in_row = make_watch(), 0
    batch = {"input_values": torch.tensor([1.0, math.nan, 3.0]).view(3, 1, 1, 1), "id": ["a", "b", "c"]}
    for number, fine in enumerate(good):
        watch.see(batch, torch.tensor(1.0 if fine else math.inf), torch.zeros(3, 1, 4, dtype=torch.long))
        in_row = 0 if fine else in_row + 1
        if in_row == 10:
            with pytest.raises(TrainingError, match=r"largest coordinates first\): b, c, a\.$"):
                watch.passes(torch.tensor(1.0))
            break
        assert watch.passes(torch.tensor(1.0)) == fine
        assert watch.progress.skipped == good[: number + 1].count(False)
    assert not watch.passes(torch.tensor(math.nan)) or in_row == 10  # a gradient alone is reason enough


@given(st.lists(st.integers(1, 400), min_size=1, max_size=15), st.integers(0, 500))
def test_collapse_follows_its_definition(counts: list[int], silent: int) -> None:
    """`counts` of so many of the 15 codes that speak; the others are never chosen."""
    watch = make_watch()
    codes = torch.cat([torch.full((count,), code + 1) for code, count in enumerate(counts)])
    codes = torch.cat([codes, torch.zeros(silent, dtype=torch.long)])
    watch.see({}, torch.tensor(1.0), codes.view(-1, 1, 1))
    said = watch.find_collapsed()
    total = sum(counts)
    entropy = -sum(count / total * math.log2(count / total) for count in counts)
    collapsed = entropy < 0.3 * math.log2(15) or len(counts) < 7.5
    assert len(said) == (total >= 20 * 16 and collapsed)
    if said:
        assert "Level 0 of whole has collapsed" in said[0] and "fewer levels (model.num_quantizers)" in said[0]
        watch.see({}, torch.tensor(1.0), codes.view(-1, 1, 1))
        assert not watch.find_collapsed()  # once is enough


def test_a_group_that_says_nothing_is_named() -> None:
    watch = make_watch()
    watch.see({}, torch.tensor(1.0), torch.zeros(20 * 16 * 100, 1, 1, dtype=torch.long))
    assert "it said nothing in 100.0% of the code steps" in watch.find_collapsed()[0]


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert run_script([*arguments(data, tmp_path / "run"), "--dry-run"]) == 0
    output = capfd.readouterr().out
    assert (
        "A full run: 12 steps of" in output and "GiB memory per process" in output and "on a disk that has" in output
    )
    assert not (tmp_path / "run").exists()
    assert run_script([*arguments(data, tmp_path / "run", model__kernel_size=2), "--dry-run"]) == 1


def test_codebooks_outlive_a_step_whose_latents_are_no_numbers() -> None:
    model = train_model(small_config("parts"), seed=0, steps=2, batch=4, frames=24).train()
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(math.nan)
    assert not model(random_poses(model.config, 2, 24, seed=1)).loss.isfinite()
    for name, buffer in model.quantizer.named_buffers():
        assert not buffer.is_floating_point() or buffer.isfinite().all(), name
