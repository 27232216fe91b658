"""Beam search against a loop over single paths, and what it must not change."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer import PoseTokenizerModel, PoseTokenizerStream
from modeling_pose_tokenizer.residual_pose_tokenizer import ResidualQuantizer
from models import VARIANTS, differing, random_poses, trained_model

variants = pytest.mark.parametrize("variant", VARIANTS)
seeds = st.integers(0, 2**16)


def with_beams(variant: str, beam_size: int) -> PoseTokenizerModel:
    model = copy.deepcopy(trained_model(variant)).eval()
    model.config.beam_size = beam_size
    return model


def search_alone(
    quantizer: ResidualQuantizer, before: torch.Tensor, key: bool, goals: torch.Tensor, beam_size: int
) -> list[int]:
    """Codes of one step of one sequence, path by path: the best `beam_size` of all continuations of the paths of a
    group go on; `before` is `(L + 1, G, d)` and `goals` `(G, d)`."""
    predictor, gain, dim = quantizer.predictor, quantizer.gain, quantizer.dim
    zero, codes = torch.zeros(dim), [0] * quantizer.num_codebooks
    num_paths = min(beam_size, quantizer.num_codes)
    trunk: list[torch.Tensor] = []
    for group in range(quantizer.num_groups):
        scale = gain.start(before[1, :, None], key)[group, 0]
        # What is missed, codes, latents by level, scale of the next level.
        paths = [(torch.zeros(()), [], [zero], scale)]
        books = [book for book, (owner, _) in enumerate(quantizer.owners) if owner == group]
        for level, book in enumerate(books):
            one = slice(book, book + 1)
            vectors = quantizer.read(torch.arange(quantizer.num_codes)[None], one)[0]
            found = []
            for _, said, latents, scale in paths:
                present, past = [latents[-1]], [before[level + 1, group], before[level, group]]
                if predictor.num_latents == 2:
                    present += [trunk[level + 1], trunk[level]] if group else [zero, zero]
                    past += [before[level + 1, 0], before[level, 0]] if group else [zero, zero]
                expected = predictor.bias[int(key), book, 0] + torch.cat(present) @ predictor.present[int(key), book]
                expected = expected if key else expected + torch.cat(past) @ predictor.past[book]
                for code, vector in enumerate(vectors):
                    reached = expected + scale * vector
                    path = ([*said, code], [*latents, reached], scale * gain.factor[book, code])
                    found.append(((goals[group] - reached).square().sum(), *path))
            paths = sorted(found, key=lambda path: float(path[0]))[:num_paths]
        for book, code in zip(books, paths[0][1], strict=True):
            codes[book] = code
        if group == 0:
            trunk = paths[0][2] + paths[0][2][-1:] * (quantizer.num_levels + 1 - len(paths[0][2]))
    return codes


@pytest.mark.parametrize("variant", ["parts", "whole", "fsq", "custom"])
@given(steps=st.integers(1, 3), beam_size=st.integers(2, 9), seed=seeds)
def test_search_is_that_of_single_paths(variant: str, steps: int, beam_size: int, seed: int) -> None:
    quantizer = trained_model(variant).quantizer
    generator = torch.Generator().manual_seed(seed)
    goals = 0.1 * torch.randn(1, steps, quantizer.num_groups, quantizer.dim, generator=generator)
    with torch.no_grad():
        codes = quantizer.encode(goals, torch.ones(1, steps, dtype=torch.bool), beam_size=beam_size)
        state = quantizer.new_state(1, goals.device)
        for step in range(steps):
            before, key = state.latents[:, :, 0], bool(quantizer._is_key(step))
            assert codes[0, :, step].tolist() == search_alone(quantizer, before, key, goals[0, step], beam_size)
            quantizer.decode(codes[..., step : step + 1], state)


@variants
@given(batch=st.integers(1, 3), frames=st.integers(1, 30), beam_size=st.integers(1, 8), seed=seeds)
def test_decode_of_encode_is_forward(variant: str, batch: int, frames: int, beam_size: int, seed: int) -> None:
    model = with_beams(variant, beam_size)
    poses = random_poses(model.config, batch, frames, seed)
    lengths = torch.randint(1, frames + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(frames) < lengths
    with torch.inference_mode():
        codes, output = model.encode(poses, mask).pose_codes, model(poses, mask)
        assert torch.equal(codes, output.pose_codes)
        torch.testing.assert_close(model.decode(codes, mask).pose_values, output.pose_values)


@variants
def test_batch_and_padding_change_no_code(variant: str) -> None:
    model, flips, total = with_beams(variant, 4), 0.0, 0
    for seed in range(4):
        alone = [random_poses(model.config, 1, length, seed) for length in (5 + seed, 23, 14)]
        batch, mask = torch.full((3, 30, *alone[0].shape[2:]), float("nan")), torch.zeros(3, 30, dtype=torch.long)
        for row, poses in enumerate(alone):
            batch[row, : poses.shape[1]], mask[row, : poses.shape[1]] = poses[0], 1
        with torch.inference_mode():
            together = model.encode(batch, mask).pose_codes
            for row, poses in enumerate(alone):
                single = model.encode(poses).pose_codes
                flips += differing(together[row : row + 1, :, : single.shape[2]], single) * single.numel()
                total += single.numel()
    assert flips <= 1e-3 * total


def test_a_stream_says_what_the_whole_says() -> None:
    model = with_beams("causal", 4)
    poses = random_poses(model.config, 2, 22, seed=3)
    stream = PoseTokenizerStream(model)
    pieces = [stream.push(piece) for piece in poses.split(5, dim=1)] + [stream.flush()]
    with torch.inference_mode():
        whole = model.encode(poses).pose_codes
    assert torch.equal(torch.cat([piece for piece in pieces if piece is not None], -1), whole)


@variants
def test_search_errs_less(variant: str) -> None:
    model = with_beams(variant, 8)
    poses = random_poses(model.config, 32, 40, seed=1)
    with torch.inference_mode():
        searched = model(poses).quantization_error
        model.config.beam_size = 1
        greedy = model(poses).quantization_error
    assert searched < (0.99 * greedy if model.config.num_levels > 1 else 1.001 * greedy)


def test_nothing_is_said_of_what_is_not_seen() -> None:
    quantizer = trained_model("parts").quantizer
    latents = torch.randn(2, 9, quantizer.num_groups, quantizer.dim, generator=torch.Generator().manual_seed(0))
    seen = torch.rand(latents.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.5
    codes = quantizer.encode(latents, torch.ones(2, 9, dtype=torch.bool), seen, beam_size=4)
    for book, (group, _) in enumerate(quantizer.owners):
        assert not codes[:, book][~seen[..., group]].any()


def test_training_takes_the_nearest_codes() -> None:
    """Of each prefix of levels, since a sequence may keep any."""
    states = []
    for beam_size in (1, 4):
        model = with_beams("parts", beam_size).train()
        torch.manual_seed(0)
        model(random_poses(model.config, 2, 12, seed=0)).loss.backward()
        states.append(model.state_dict())
    assert all(torch.equal(*(state[name] for state in states)) for name in states[0])
