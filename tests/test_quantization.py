"""Quantizers against naive loops, and their own laws."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer.codebook_pose_tokenizer import (
    code_statistics,
    draw_badly_served,
    kmeans,
    nearest_code,
)
from modeling_pose_tokenizer.quantization_pose_tokenizer import (
    QUANTIZERS,
    ResidualFiniteScalarQuantizer,
    ResidualVectorQuantizer,
)
from modeling_pose_tokenizer.walk_pose_tokenizer import QuantizerState
from models import small_config, trained_model

quantizers = pytest.mark.parametrize("variant", ["parts", "fsq", "whole"])


@given(
    groups=st.integers(1, 3),
    count=st.integers(1, 300),
    dim=st.integers(1, 9),
    codes=st.sampled_from([2, 7, 32, 64, 96, 100]),
    seed=st.integers(0, 2**16),
)
def test_nearest_code_is_the_nearest(groups: int, count: int, dim: int, codes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(groups, count, dim, generator=generator)
    codebook = torch.randn(groups, codes, dim, generator=generator)
    found = nearest_code(vectors, codebook)
    for group in range(groups):
        for row in range(count):
            distances = (vectors[group, row] - codebook[group]).double().square().sum(-1)
            assert distances[found[group, row]] <= distances.min() + 1e-5


def test_of_equal_codes_the_lowest_is_found() -> None:
    codebook = torch.randn(1, 1, 4).expand(1, 64, 4)
    assert not nearest_code(torch.randn(1, 10, 4), codebook).any()


@given(count=st.integers(0, 40), seed=st.integers(0, 2**16))
def test_code_statistics_equal_a_loop(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, count, 3, generator=generator)
    codes = torch.randint(5, (2, count), generator=generator)
    weight = torch.rand(2, count, generator=generator) < 0.7
    counts, sums = code_statistics(vectors, codes, 5, weight)
    expected_counts, expected_sums = torch.zeros(2, 5), torch.zeros(2, 5, 3)
    for group in range(2):
        for row in range(count):
            if weight[group, row]:
                expected_counts[group, codes[group, row]] += 1
                expected_sums[group, codes[group, row]] += vectors[group, row]
    torch.testing.assert_close(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums)


def test_kmeans_finds_well_separated_clusters() -> None:
    torch.manual_seed(0)  # twice as many centres as clusters: a random start leaves none without
    truth = torch.tensor([[[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]]])
    points = truth.repeat_interleave(50, 1) + 0.1 * torch.randn(1, 200, 2)
    centres = kmeans(points, 8)
    distances = (points[:, :, None] - centres[:, None]).norm(dim=-1).amin(-1)
    assert distances.mean() < 0.5
    assert kmeans(points[:, :3], 8).shape == (1, 8, 2)  # fewer samples than codes


@quantizers
@given(steps=st.integers(1, 20), interval=st.sampled_from([1, 4]), seed=st.integers(0, 2**16))
def test_encode_equals_a_walk_over_steps_levels_and_groups(variant: str, steps: int, interval: int, seed: int) -> None:
    """The closed loop written out for one sequence: prediction, scale, lookup, and what the decoder then has."""
    quantizer = copy.deepcopy(trained_model(variant).quantizer)
    quantizer.key_interval = interval
    config = trained_model(variant).config
    predictor, gain, dim = quantizer.predictor, quantizer.gain, quantizer.dim
    generator = torch.Generator().manual_seed(seed)
    # Of the size of those that it knows: far away, rounding decides between codes.
    latents = 0.1 * torch.randn(1, steps, quantizer.num_groups, dim, generator=generator)
    seen = torch.rand(1, steps, quantizer.num_groups, generator=generator) < 0.8
    valid = torch.ones(1, steps, dtype=torch.bool)
    codes = quantizer.encode(latents, valid, seen)
    decoded = quantizer.decode(codes)
    zero = torch.zeros(dim)
    past: dict[tuple[int, int], torch.Tensor] = {}
    for step in range(steps):
        key = step % interval == 0
        now = {(group, -1): zero for group in range(quantizer.num_groups)}
        scales = {}
        for level in range(quantizer.num_levels):
            for group, name in enumerate(config.group_names):
                now[group, level] = now[group, level - 1]
                if (name, level) not in config.codebook_index:
                    continue
                book = config.codebook_index.index((name, level))
                trunk = [now[0, level], now[0, level - 1]] if group else [zero, zero]
                inputs = [now[group, level - 1], *trunk][: 1 if quantizer.num_groups == 1 else 3]
                expected = predictor.bias[int(key), book, 0] + torch.cat(inputs) @ predictor.present[int(key), book]
                if not key:
                    trunk = [past[0, level], past[0, level - 1]] if group else [zero, zero]
                    inputs = [past[group, level], past[group, level - 1], *trunk]
                    expected = expected + torch.cat(inputs)[: len(predictor.past[book])] @ predictor.past[book]
                residual = latents[0, step, group] - expected if seen[0, step, group] else zero
                if level == 0 and key:
                    scales[group] = gain.key[group].sqrt()
                elif level == 0:
                    variance = past[group, 0].square() @ gain.past[group, :-1] + gain.past[group, -1]
                    scales[group] = min(variance, gain.largest[group]).sqrt()
                one = slice(book, book + 1)
                found = quantizer.lookup((residual / scales[group])[None, None], one)
                assert found == codes[0, book, step]
                now[group, level] = expected + scales[group] * quantizer.read(found, one)[0, 0].detach()
                scales[group] = scales[group] * gain.factor[book, found[0, 0]]
        past = now
        for group in range(quantizer.num_groups):
            torch.testing.assert_close(decoded[0, step, group], now[group, quantizer.num_levels - 1])


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("variant", ["parts", "fsq"])
def test_a_stream_says_what_the_whole_says(variant: str, interval: int) -> None:
    """What lies between key steps is quantized side by side; where a sequence is cut, and who is in its batch, changes
    nothing."""
    quantizer = copy.deepcopy(trained_model(variant).quantizer)
    quantizer.key_interval = interval
    latents = torch.randn(3, 12, quantizer.num_groups, quantizer.dim, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 12, dtype=torch.bool)
    whole = quantizer.encode(latents, valid)
    state, pieces = quantizer.new_state(3, latents.device), []
    for piece in latents.split(5, 1):
        pieces.append(quantizer.encode(piece, valid[:, : piece.shape[1]], state=state))
    assert state.step == 12 and state.latents.shape[2] == 3
    assert torch.equal(torch.cat(pieces, -1), whole)
    rows, state = [quantizer.decode(codes[None]) for codes in whole], quantizer.new_state(3, latents.device)
    torch.testing.assert_close(quantizer.decode(whole), torch.cat(rows))
    pieces = [quantizer.decode(piece, state) for piece in whole.split(5, -1)]
    torch.testing.assert_close(quantizer.decode(whole), torch.cat(pieces, 1))


@quantizers
@pytest.mark.parametrize("interval", [0, 1, 3])
def test_the_losses_and_their_gradients_are_those_of_the_formula(variant: str, interval: int) -> None:
    """Written down in the code, differentiated here: what the prediction missed, and how far latents are from what is
    decoded of them."""
    quantizer = copy.deepcopy(trained_model(variant).quantizer).train()
    quantizer.key_interval = interval
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 7, quantizer.num_groups, quantizer.dim, generator=generator, requires_grad=True)
    seen = torch.rand(4, 7, quantizer.num_groups, generator=generator) < 0.8
    valid = torch.arange(7) < torch.tensor([[7], [7], [4], [2]])
    variables = [latents, *quantizer.predictor.parameters()]
    inputs, there = quantizer._arrange(latents, valid, seen)
    found, levels = quantizer.walk(inputs.detach(), there, quantizer.num_levels), quantizer.num_levels
    counts = quantizer._counts(there, torch.tensor([levels, 1, levels, levels]), levels)
    loss, _ = quantizer._losses(inputs, found, counts, torch.full((4,), levels), levels)
    total, goals = torch.zeros(()), inputs.detach().transpose(0, 1).flatten(1, 2)
    for level, groups, own in quantizer.stages:
        present, past = quantizer._inputs(found.latents, level, groups, own)
        expected = quantizer._expected(present, past, own, quantizer._key_rows(inputs))
        missed = (goals[groups] - expected).unflatten(1, (7, 4))
        far = (inputs[:, groups] - found.latents[:, level + 1, groups]).transpose(0, 1)
        for difference in (missed, far):
            robust = 2 * ((1 + difference.square().mean(-1)).sqrt() - 1)
            total = total + (robust * counts[own]).sum()
    total = total / counts.sum()
    torch.testing.assert_close(loss, total)
    gradients = (torch.autograd.grad(value, variables, retain_graph=True) for value in (loss, total))
    for mine, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-7)


def test_spares_are_drawn_only_when_a_code_has_died() -> None:
    quantizer = copy.deepcopy(trained_model("whole").quantizer).train()
    assert isinstance(quantizer, ResidualVectorQuantizer)
    quantizer.dropout = 0.0
    latents, valid = torch.randn(2, 5, 1, quantizer.dim), torch.ones(2, 5, dtype=torch.bool)
    drawn = []
    for size in (1.0, 0.0):
        quantizer.cluster_size[0, 5], before = size, torch.get_rng_state()
        quantizer(latents, valid)
        drawn.append(not torch.equal(torch.get_rng_state(), before))
    assert drawn == [False, True]


def test_what_is_not_seen_says_that_the_prediction_stands() -> None:
    quantizer = trained_model("parts").quantizer
    latents = torch.randn(2, 9, quantizer.num_groups, quantizer.dim, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(2, 9, quantizer.num_groups, dtype=torch.bool)
    seen[:, 3:6, 2] = False
    codes = quantizer.encode(latents, torch.ones(2, 9, dtype=torch.bool), seen)
    unseen = [book for book, (group, _) in enumerate(trained_model("parts").config.codebook_index) if "left" in group]
    assert not codes[:, unseen, 3:6].any()
    assert not quantizer.codebook[:, 0].any()


@pytest.mark.parametrize(("interval", "steps"), [(0, 40), (1, 1), (7, 7), (64, 40)])
def test_the_walk_is_no_longer_than_from_key_step_to_key_step(interval: int, steps: int) -> None:
    """Nor does it take each level of each step by itself: it ends when the last step has reached the last level, here
    the first group's third and the others' second, two turns behind the first."""
    quantizer = copy.deepcopy(trained_model("parts").quantizer)
    quantizer.key_interval, count = interval, 0
    lookup = quantizer.lookup

    def counted(*inputs: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return lookup(*inputs)

    quantizer.lookup = counted
    quantizer.encode(torch.randn(2, 40, quantizer.num_groups, quantizer.dim), torch.ones(2, 40, dtype=torch.bool))
    assert count == steps + 2


def test_prediction_pays_where_motion_is_smooth() -> None:
    """The same codebook sizes lose far less of a slow walk when each step is predicted from the last."""
    errors = {}
    for interval in (0, 1):
        torch.manual_seed(0)
        config = small_config("parts", key_interval=interval)
        quantizer = QUANTIZERS["rvq"](config).eval()
        latents = 0.1 * torch.randn(64, 40, quantizer.num_groups, quantizer.dim).cumsum(1)
        latents += torch.randn(64, 1, quantizer.num_groups, quantizer.dim)
        valid = torch.ones(64, 40, dtype=torch.bool)
        quantizer.initialize(latents, valid)
        errors[interval] = quantizer(latents, valid).quantization_error
    assert errors[0] < 0.7 * errors[1]


@quantizers
@given(
    clips=st.integers(1, 4),
    steps=st.integers(2, 12),
    growth=st.floats(0.5, 2.0),
    seed=st.integers(0, 2**16),
)
def test_a_fitted_prediction_forgets(variant: str, clips: int, steps: int, growth: float, seed: int) -> None:
    """However few latents it is fitted to, growing ones too: what two streams differ in dies out without key steps."""
    generator = torch.Generator().manual_seed(seed)
    config = small_config(variant, key_interval=0)
    quantizer = QUANTIZERS[config.quantizer](config).eval()
    latents = torch.randn(clips, steps, quantizer.num_groups, quantizer.dim, generator=generator)
    latents *= growth ** torch.arange(steps)[:, None, None]
    quantizer.initialize(latents, torch.ones(clips, steps, dtype=torch.bool))
    quantizer.gain.reset_parameters()  # bounded, but no linear map
    codes = torch.randint(quantizer.num_codes, (1, quantizer.num_codebooks, 1), generator=generator)

    start = quantizer.new_state(1, latents.device).latents

    def next_state(before: torch.Tensor) -> torch.Tensor:
        state = QuantizerState(1, torch.cat([start[:1], before]))  # nothing is decoded before the first level
        quantizer.decode(codes, state)
        return state.latents[1:]

    jacobian = torch.autograd.functional.jacobian(next_state, start[1:]).reshape(2 * (start[1:].numel(),))
    assert torch.linalg.eigvals(jacobian.double()).abs().max() < 1


def test_every_level_adds_to_what_those_before_it_said() -> None:
    """Also in directions of little energy, which a prediction that is drawn to 0 would forget at every level."""
    torch.manual_seed(0)
    quantizer = QUANTIZERS["rvq"](small_config("whole", num_quantizers=16)).eval()
    latents, valid = torch.randn(400, 8, 1, quantizer.dim), torch.ones(400, 8, dtype=torch.bool)
    latents = latents.cumsum(1) * torch.logspace(0, -2, quantizer.dim)
    quantizer.initialize(latents, valid)
    errors = [quantizer(latents, valid, num_quantizers=levels).quantization_error for levels in (4, 8, 12, 16)]
    assert all(after < 0.6 * before for before, after in pairwise(errors)), errors


def test_without_a_step_before_the_levels_stay_a_plain_residual_quantizer() -> None:
    """Sequences of one step say nothing of usual steps: there a level expects what the levels before it say."""
    torch.manual_seed(0)
    quantizer = QUANTIZERS["rvq"](small_config("parts")).eval()
    latents, valid = torch.randn(300, 1, quantizer.num_groups, quantizer.dim), torch.ones(300, 1, dtype=torch.bool)
    quantizer.initialize(latents, valid)
    identity = torch.eye(quantizer.dim).expand(quantizer.num_codebooks, -1, -1)
    assert torch.equal(quantizer.predictor.present[0, :, : quantizer.dim], identity)
    assert not quantizer.predictor.past.any() and not quantizer.predictor.bias[0].any()


@quantizers
def test_read_then_lookup_is_the_identity(variant: str) -> None:
    quantizer = trained_model(variant).quantizer
    codes = torch.arange(quantizer.num_codes)[None].expand(quantizer.num_codebooks, -1)
    books = slice(0, quantizer.num_codebooks)
    vectors = quantizer.read(codes, books)
    if isinstance(quantizer, ResidualFiniteScalarQuantizer):
        # The projections are perturbed, so only the grid is an exact inverse.
        assert torch.equal(quantizer._to_codes(quantizer._to_grid(codes)), codes)
    else:
        torch.testing.assert_close(quantizer.read(quantizer.lookup(vectors, books), books), vectors)


def test_running_means_equal_the_formula() -> None:
    """One step of the update, written out code by code."""
    model = copy.deepcopy(trained_model("whole"))
    quantizer = model.quantizer
    assert isinstance(quantizer, ResidualVectorQuantizer)
    quantizer.threshold, quantizer.dropout = 0.0, 0.0
    quantizer.train()
    size, codebook = quantizer.cluster_size.clone(), quantizer.codebook.clone()
    latents = torch.randn(2, 15, 1, quantizer.dim, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[1, 9:] = False
    observed = valid.clone()
    observed[0, 2] = False
    with torch.no_grad():
        found = quantizer.walk(*quantizer._arrange(latents, valid, observed[..., None]), quantizer.num_levels)
    output = quantizer(latents, valid, observed[..., None])
    rows = [(b, s) for b in range(2) for s in range(15) if observed[b, s]]
    for book in range(quantizer.num_codebooks):
        count, summed = torch.zeros(quantizer.num_codes), torch.zeros(quantizer.num_codes, quantizer.dim)
        for b, s in rows:
            code = int(output.codes[b, book, s])
            count[code] += 1
            summed[code] += found.residuals[book, s, b] / found.scales[book, s, b]
        total = codebook[book] * quantizer._smoothed(size[book])[:, None]
        new_size = quantizer.decay * size[book] + (1 - quantizer.decay) * count
        new_total = quantizer.decay * total + (1 - quantizer.decay) * summed
        mass = new_size.sum()
        smoothed = (new_size + 1e-5) / (mass + quantizer.num_codes * 1e-5) * mass
        torch.testing.assert_close(quantizer.cluster_size[book], new_size)
        expected = new_total / smoothed[:, None]
        expected[0] = 0.0
        torch.testing.assert_close(quantizer.codebook[book], expected)
    assert not output.codes[~valid[:, None].expand_as(output.codes)].any()


def test_new_codes_are_not_drawn_from_what_is_served_already() -> None:
    """Nine of ten vectors are the same, as of a hand that is missing: the new codes are among the tenth."""
    torch.manual_seed(0)
    vectors = torch.randn(2, 500, 3)
    served = vectors.clone()
    served[:, ::10] += 1.0
    drawn = draw_badly_served(vectors, served, 200)
    distances = torch.cdist(drawn, vectors[:, ::10]).amin(-1)
    assert distances.max() < 1e-2  # cdist rounds
    assert draw_badly_served(vectors, vectors, 5).isnan().all()
    repeated = torch.cat([torch.zeros(1, 450, 3), vectors[:1, :50]], 1)
    assert kmeans(repeated, 40)[0].unique(dim=0).shape[0] >= 36


def test_dead_codes_come_back_as_vectors_of_the_batch() -> None:
    torch.manual_seed(0)
    quantizer = copy.deepcopy(trained_model("whole").quantizer).train()
    assert isinstance(quantizer, ResidualVectorQuantizer)
    quantizer.dropout = 0.0
    quantizer.cluster_size[0, 1:10] = 0.0
    latents = torch.randn(1, 40, 1, quantizer.dim)
    valid = torch.ones(1, 40, dtype=torch.bool)
    quantizer.codebook[0, 1:10] = 1e3  # far from everything: never chosen
    found = quantizer.walk(*quantizer._arrange(latents, valid, None), quantizer.num_levels)
    residuals = found.looked_up(slice(1))[0, :, 0]
    quantizer(latents, valid)
    distances = torch.cdist(quantizer.codebook[0, 1:10], residuals)
    # Laplace smoothing moves a code by a few millionths, and cdist rounds.
    assert distances.amin(-1).max() < 1e-2
    assert (quantizer.cluster_size[0, 1:10] > 0).all()


def run_rank(rank: int, folder: str, latents: torch.Tensor) -> None:
    """One of two ranks: a few training steps on its half of the latents."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = copy.deepcopy(trained_model("whole"))
    quantizer = model.quantizer.train()
    quantizer.dropout = 0.0
    torch.manual_seed(rank)  # each draws other vectors for dead codes
    for step, batch in enumerate(latents):
        quantizer.threshold = 0.5 if step == len(latents) - 1 else 0.0  # the last step replaces codes
        if step == len(latents) - 1:
            torch.save(copy.deepcopy(quantizer.state_dict()), f"{folder}/before-{rank}.pt")
        mine = batch[rank::2]
        quantizer(mine, torch.ones(mine.shape[:2], dtype=torch.bool))
    torch.save(quantizer.state_dict(), f"{folder}/after-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_the_codebooks_of_one(tmp_path: Path) -> None:
    """Statistics are summed over ranks and replaced codes are rank 0's: both hold the same, and what one would."""
    alone = copy.deepcopy(trained_model("whole")).quantizer.train()
    alone.dropout, alone.threshold = 0.0, 0.0
    latents = torch.randn(4, 4, 9, 1, alone.dim, generator=torch.Generator().manual_seed(0))
    torch.multiprocessing.start_processes(run_rank, (str(tmp_path), latents), nprocs=2, start_method="fork")
    for batch in latents[:-1]:
        alone(batch, torch.ones(batch.shape[:2], dtype=torch.bool))
    before, after = (
        [torch.load(tmp_path / f"{when}-{rank}.pt", weights_only=True) for rank in range(2)]
        for when in ("before", "after")
    )
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(before[0][name], value)
        assert torch.equal(before[0][name], before[1][name]), name
        assert torch.equal(after[0][name], after[1][name]), name
    assert not torch.equal(before[0]["codebook"], after[0]["codebook"])


@quantizers
def test_utilisation_recovers_from_a_collapse(variant: str) -> None:
    """All codes but a few start dead; training on varied latents brings them back."""
    torch.manual_seed(0)
    config = small_config(variant, quantizer_dropout=0.0)
    quantizer = QUANTIZERS[config.quantizer](config).train()
    latents = torch.randn(400, 1, quantizer.num_groups, quantizer.dim)
    valid = torch.ones(400, 1, dtype=torch.bool)
    if isinstance(quantizer, ResidualVectorQuantizer):
        quantizer.codebook[:, 3:] = 1e3
        quantizer.cluster_size[:, 3:] = 0.0
    else:
        quantizer.initialize(latents, valid)
    for _ in range(30):
        quantizer(latents, valid)
    used = [book.unique().numel() / quantizer.num_codes for book in quantizer.encode(latents, valid).unbind(1)]
    assert min(used) > 0.5, used


@quantizers
def test_dropout_decodes_prefixes_and_its_gradient_reaches_the_encoder(variant: str) -> None:
    torch.manual_seed(0)
    quantizer = copy.deepcopy(trained_model(variant).quantizer).train()
    quantizer.dropout = 1.0
    latents = torch.randn(6, 5, quantizer.num_groups, quantizer.dim, requires_grad=True)
    valid = torch.ones(6, 5, dtype=torch.bool)
    output = quantizer(latents, valid)
    output.quantized.sum().backward()
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad, torch.ones_like(latents))
    errors = (output.quantized - latents).square().mean((1, 2, 3))
    assert errors.unique().numel() > 1


@quantizers
def test_more_levels_lose_less(variant: str) -> None:
    quantizer = copy.deepcopy(trained_model(variant).quantizer)
    torch.manual_seed(0)
    latents = torch.randn(500, 4, quantizer.num_groups, quantizer.dim)
    before = latents.clone()
    valid = torch.ones(500, 4, dtype=torch.bool)
    quantizer.initialize(latents, valid)
    assert torch.equal(latents, before)
    errors = []
    for levels in range(1, quantizer.num_levels + 1):
        decoded = quantizer.decode(quantizer.encode(latents, valid, num_quantizers=levels))
        errors.append((decoded - latents).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * latents.square().mean().item()


def test_what_cannot_be_decoded_is_refused() -> None:
    model = trained_model("parts")
    codes = torch.zeros(1, model.config.num_codebooks, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="5 codebooks; this model's levels need 4 or 7 or 8"):
        model.decode(codes[:, :5])
    with pytest.raises(ValueError, match="codes from 0 to 64; expected 0 to 63"):
        model.decode(codes + 64 * (torch.arange(3) == 1))
    with pytest.raises(ValueError, match="codes from -1"):
        model.decode(codes - 1)
    with pytest.raises(ValueError, match="num_quantizers is 4; this model has 1 to 3"):
        model.encode(torch.zeros(1, 4, 69, 3), num_quantizers=4)
