"""The expected scale of what codebooks look up: its fit, its bounds, and that it pays."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.gain_pose_tokenizer import PRIOR_COUNT, SMALLEST_FACTOR, PoseTokenizerGain
from modeling_pose_tokenizer.quantization_pose_tokenizer import QUANTIZERS
from modeling_pose_tokenizer.residual_pose_tokenizer import ResidualQuantizer
from models import random_poses, small_config, trained_model


def test_weights_of_the_squares_are_found_again() -> None:
    """Residuals whose variance is known: 0.5 + 2 z_0^2 + 0.1 z_2^2."""
    torch.manual_seed(0)
    gain = PoseTokenizerGain([(0, 0)], num_codes=4, dim=4)
    before = torch.randn(20_000, 4)
    truth = torch.tensor([2.0, 0.0, 0.1, 0.0])
    residual = torch.randn(20_000, 4) * (0.5 + before.square() @ truth).sqrt()[:, None]
    every = torch.ones(20_000, dtype=torch.bool)
    gain.fit_start(0, residual, before, every, ~every)
    torch.testing.assert_close(gain.past[0, :-1], truth, atol=0.05, rtol=0.05)
    torch.testing.assert_close(gain.past[0, -1], torch.tensor(0.5), atol=0.05, rtol=0.05)


@given(count=st.integers(1, 60), dim=st.integers(1, 5), spread=st.floats(0, 3), seed=st.integers(0, 2**16))
def test_the_fit_is_at_least_as_likely_as_a_constant(count: int, dim: int, spread: float, seed: int) -> None:
    """Itakura-Saito divergence, which is a Gaussian's likelihood but for a constant, over what counts."""
    generator = torch.Generator().manual_seed(seed)
    gain = PoseTokenizerGain([(0, 0)], num_codes=4, dim=dim)
    before = torch.randn(count, dim, generator=generator)
    residual = (
        torch.randn(count, dim, generator=generator) * torch.randn(count, 1, generator=generator).mul(spread).exp()
    )
    weight, key = (torch.rand(count, generator=generator) < share for share in (0.8, 0.2))
    gain.fit_start(0, residual, before, weight, key)
    energy, rows = residual.square().mean(-1), [row for row in range(count) if weight[row] and not key[row]]
    if not rows:
        assert torch.equal(gain.past, PoseTokenizerGain([(0, 0)], 4, dim).past)
        return
    mean = sum(energy[row] for row in rows) / len(rows)
    fitted = constant = torch.zeros(())
    for row in rows:
        variance = before[row].square() @ gain.past[0, :-1] + gain.past[0, -1]
        assert variance <= gain.largest[0] * 1.0001
        fitted, constant = fitted + energy[row] / variance + variance.log(), constant + energy[row] / mean + mean.log()
    # At rest a little more is expected than there may be.
    assert fitted <= constant + 0.05 * len(rows)


@given(count=st.integers(0, 80), seed=st.integers(0, 2**16))
def test_factors_equal_a_loop_over_codes(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gain = PoseTokenizerGain([(0, 0), (0, 1)], num_codes=5, dim=3)
    residual = torch.randn(count, 3, generator=generator)
    codes, weight = torch.randint(5, (count,), generator=generator), torch.rand(count, generator=generator) < 0.7
    gain.fit_factor(0, residual, codes, weight)
    assert torch.equal(gain.factor[1], torch.ones(5))
    energy = [residual[row].square().mean() for row in range(count) if weight[row]]
    if not energy:
        assert torch.equal(gain.factor[0], torch.ones(5))
        return
    usual = sum(energy) / len(energy)
    for code in range(5):
        own = [residual[row].square().mean() for row in range(count) if weight[row] and codes[row] == code]
        expected = ((sum(own) + PRIOR_COUNT * usual) / (len(own) + PRIOR_COUNT)) ** 0.5
        torch.testing.assert_close(gain.factor[0, code], expected.clamp(min=SMALLEST_FACTOR))


@pytest.mark.parametrize("interval", [0, 7])
def test_no_sequence_of_codes_runs_off(interval: int) -> None:
    """However much a latent raises the next scale, random codes decode to numbers of bounded size."""
    torch.manual_seed(0)
    quantizer = QUANTIZERS["rvq"](small_config("parts", key_interval=interval)).eval()
    quantizer.gain.past.fill_(10.0)
    quantizer.gain.largest.fill_(4.0)
    codes = torch.randint(quantizer.num_codes, (8, quantizer.num_codebooks, 500))
    largest = quantizer.codebook.norm(dim=-1).max() * 2.0 * quantizer.num_levels
    assert quantizer.decode(codes).norm(dim=-1).max() <= largest


def bursts(sequences: int, steps: int, groups: int, dim: int, size: float = 1.0) -> torch.Tensor:
    """Latents `(B, S, G, d)` of people who move much or little: noise about what went before, each of a size."""
    latents = size * torch.randn(sequences, steps, groups, dim) * torch.randn(sequences, 1, 1, 1).exp()
    for step in range(1, steps):
        latents[:, step] += 0.7 * latents[:, step - 1]
    return latents


def fixed_scales(quantizer: ResidualQuantizer) -> None:
    """Turns the adaptation off: nothing is fitted, all scales stay 1."""
    quantizer.gain.fit_start = quantizer.gain.fit_factor = lambda *_: None  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("kind", ["rvq", "fsq"])
def test_expected_scales_pay_where_motion_comes_in_bursts(kind: str) -> None:
    """With the same codebooks less is lost relative to the motion, also of larger motion than that of training."""
    errors = {}
    for adapts in (True, False):
        torch.manual_seed(0)
        quantizer = QUANTIZERS[kind](small_config("parts", quantizer=kind)).eval()
        if not adapts:
            fixed_scales(quantizer)
        valid = torch.ones(400, 20, dtype=torch.bool)
        quantizer.initialize(bursts(400, 20, quantizer.num_groups, quantizer.dim), valid)
        for size in (1.0, 4.0):
            latents = bursts(400, 20, quantizer.num_groups, quantizer.dim, size)
            decoded = quantizer.decode(quantizer.encode(latents, valid))
            share = (decoded - latents).norm(dim=-1).mean((1, 2)) / latents.norm(dim=-1).mean((1, 2))
            errors[adapts, size] = share.mean().item()
    assert errors[True, 1.0] < 0.8 * errors[False, 1.0], errors
    assert errors[True, 4.0] < 0.95 * errors[False, 4.0], errors


def test_weights_of_before_there_were_scales_decode_as_they_did(tmp_path: Path) -> None:
    model = trained_model("parts")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if ".gain." not in key}, tmp_path / "model.safetensors")
    loaded = PoseTokenizerModel.from_pretrained(tmp_path)
    codes = loaded.encode(random_poses(loaded.config, 2, 30, seed=0)).pose_codes
    quantizer = loaded.quantizer
    before = PoseTokenizerGain(quantizer.owners, quantizer.num_codes, quantizer.dim)
    for name, value in before.state_dict().items():
        assert torch.equal(quantizer.gain.state_dict()[name], value), name
    assert codes.unique().numel() > 10
