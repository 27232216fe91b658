"""The laws of the codec, over random shapes, on warmed and perturbed models of every variant."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer import PoseTokenizerModel, PoseTokenizerStream
from models import VARIANTS, differing, random_poses, small_config, train_model, trained_model

# Codes may flip where two are equally near to the last bit and a differently shaped product rounds differently.
MAX_FLIPS = 1e-3
GARBAGE = (0.0, 1e3, float("nan"), float("inf"))

variants = pytest.mark.parametrize("variant", VARIANTS)
lengths = st.integers(1, 40)
seeds = st.integers(0, 2**16)


@variants
@given(batch=st.integers(1, 4), frames=lengths, seed=seeds)
def test_decode_of_encode_is_forward(variant: str, batch: int, frames: int, seed: int) -> None:
    model = trained_model(variant)
    poses = random_poses(model.config, batch, frames, seed)
    lengths = torch.randint(1, frames + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(frames) < lengths
    with torch.inference_mode():
        codes = model.encode(poses, mask).pose_codes
        output = model(poses, mask)
        assert torch.equal(codes, output.pose_codes)
        torch.testing.assert_close(model.decode(codes, mask).pose_values, output.pose_values)
        assert torch.equal(model(poses, mask, pose_codes=codes).pose_values, model.decode(codes, mask).pose_values)
    assert output.loss is None
    assert codes.shape == (batch, model.config.num_codebooks, model.get_encoded_length(frames))


@variants
@given(frames=lengths, seed=seeds)
def test_a_prefix_of_levels_is_a_prefix_of_codebooks(variant: str, frames: int, seed: int) -> None:
    model = trained_model(variant)
    poses = random_poses(model.config, 2, frames, seed)
    index = model.config.codebook_index
    with torch.inference_mode():
        codes = model.encode(poses).pose_codes
        for levels in range(1, model.config.num_levels + 1):
            prefix = model.encode(poses, num_quantizers=levels).pose_codes
            assert prefix.shape[1] == sum(level < levels for _, level in index)
            assert torch.equal(prefix, codes[:, : prefix.shape[1]])
            values = model.decode(codes, num_quantizers=levels).pose_values[:, :frames]
            assert torch.equal(values, model.decode(prefix).pose_values[:, :frames])
            torch.testing.assert_close(values, model(poses, num_quantizers=levels).pose_values)


@variants
@given(frames=lengths)
def test_any_length_comes_back_exactly(variant: str, frames: int) -> None:
    model = trained_model(variant)
    poses = random_poses(model.config, 1, frames, seed=frames)
    with torch.inference_mode():
        values = model(poses).pose_values
    assert values.shape == poses.shape
    assert values.isfinite().all()
    assert values[..., -1].min() >= 0 and values[..., -1].max() <= 1


@variants
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_nothing(variant: str, garbage: float) -> None:
    model = trained_model(variant)
    flips, total = 0.0, 0
    for seed in range(6):
        frames = torch.randint(1, 40, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        alone = [random_poses(model.config, 1, length, seed) for length in frames]
        longest = max(frames) + seed
        batch = torch.full((4, longest, *alone[0].shape[2:]), garbage)
        mask = torch.zeros(4, longest, dtype=torch.long)
        for row, (poses, length) in enumerate(zip(alone, frames, strict=True)):
            batch[row, :length], mask[row, :length] = poses[0], 1
        with torch.inference_mode():
            together = model(batch, mask)
            steps_mask = model.get_pose_codes_mask(mask)
            for row, (poses, length) in enumerate(zip(alone, frames, strict=True)):
                single = model(poses)
                steps = model.get_encoded_length(length)
                assert steps_mask[row].sum() == steps
                codes = together.pose_codes[row : row + 1, :, :steps]
                flips += differing(codes, single.pose_codes) * codes.numel()
                total += codes.numel()
                if torch.equal(codes, single.pose_codes):
                    torch.testing.assert_close(
                        together.pose_values[row, :length], single.pose_values[0], rtol=1e-4, atol=1e-5
                    )
                assert not together.pose_codes[row, :, steps:].any()
    assert flips <= MAX_FLIPS * total


@variants
@given(frames=st.integers(4, 40), seed=seeds, garbage=st.sampled_from(GARBAGE[1:]))
def test_a_hole_in_the_mask_is_a_frame_without_keypoints(variant: str, frames: int, seed: int, garbage: float) -> None:
    model = trained_model(variant)
    poses = random_poses(model.config, 1, frames, seed)
    mask = torch.rand(1, frames, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, -1] = True
    empty = torch.where(mask[..., None, None], poses, 0.0)
    dirty = torch.where(mask[..., None, None], poses, garbage)
    with torch.inference_mode():
        expected = model.encode(empty).pose_codes
        assert torch.equal(model.encode(empty, mask).pose_codes, expected)
        assert torch.equal(model.encode(dirty, mask).pose_codes, expected)


@variants
@given(seed=seeds, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_keypoints_that_are_not_numbers_are_missing(variant: str, seed: int, bad: float) -> None:
    model = trained_model(variant)
    poses = random_poses(model.config, 2, 9, seed)
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(poses.shape[:-1], generator=generator) < 0.2
    axis = int(torch.randint(poses.shape[-1], (), generator=generator))
    dirty, clean = poses.clone(), poses.clone()
    dirty[..., axis][hit] = bad
    clean[hit] = 0.0
    with torch.inference_mode():
        assert torch.equal(model.encode(dirty).pose_codes, model.encode(clean).pose_codes)


@variants
def test_eval_changes_no_parameter_or_buffer(variant: str) -> None:
    model = trained_model(variant)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    poses = random_poses(model.config, 3, 17, seed=1)
    with torch.no_grad():
        model.decode(model.encode(poses).pose_codes)
        model(poses)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]), name


@variants
@pytest.mark.parametrize("garbage", GARBAGE[1:])
def test_what_is_masked_never_reaches_a_codebook_or_a_gradient(variant: str, garbage: float) -> None:
    states = []
    for filling in (0.0, garbage):
        model = copy.deepcopy(trained_model(variant)).train()
        poses = random_poses(model.config, 3, 16, seed=2)
        mask = torch.ones(3, 16, dtype=torch.long)
        mask[0, 5:], mask[1, 11:], mask[2, 3:6] = 0, 0, 0
        poses = torch.where(mask[..., None, None].bool(), poses, filling)
        torch.manual_seed(0)
        output = model(poses, mask)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        states.append({**dict(model.named_buffers()), **gradients, "loss": output.loss.detach()})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert value.isfinite().all(), name


@variants
def test_save_and_load_give_the_same_codes(variant: str, tmp_path: Path) -> None:
    model = trained_model(variant)
    model.save_pretrained(tmp_path)
    loaded = PoseTokenizerModel.from_pretrained(tmp_path)
    poses = random_poses(model.config, 2, 21, seed=3)
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded.encode(poses).pose_codes, model.encode(poses).pose_codes)
        assert torch.equal(loaded(poses).pose_values, model(poses).pose_values)
    assert loaded.quantizer.initialized


@given(
    pieces=st.lists(st.integers(1, 11), min_size=1, max_size=8),
    batch=st.integers(1, 3),
    levels=st.sampled_from([None, 1, 2]),
    seed=seeds,
)
def test_streamed_codes_equal_offline_codes(pieces: list[int], batch: int, levels: int | None, seed: int) -> None:
    model = trained_model("causal")
    poses = random_poses(model.config, batch, sum(pieces), seed)
    stream = PoseTokenizerStream(model, num_quantizers=levels)
    for _ in range(2):  # a flushed stream starts afresh
        codes = [*map(stream.push, poses.split(pieces, 1)), stream.flush()]
        streamed = torch.cat([piece for piece in codes if piece is not None], -1)
        with torch.inference_mode():
            offline = model.encode(poses, num_quantizers=levels).pose_codes
        assert differing(streamed, offline) <= MAX_FLIPS


@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6), batch=st.integers(1, 3), seed=seeds)
def test_streamed_poses_equal_offline_poses(pieces: list[int], batch: int, seed: int) -> None:
    model = trained_model("causal")
    codes = model.encode(random_poses(model.config, batch, 2 * sum(pieces), seed)).pose_codes
    assert codes is not None and codes.shape[-1] == sum(pieces)
    stream = PoseTokenizerStream(model)
    with torch.inference_mode():
        offline = model.decode(codes).pose_values
    for _ in range(2):  # a stream that was reset starts afresh
        streamed = torch.cat([stream.decode(piece) for piece in codes.split(pieces, -1)], 1)
        torch.testing.assert_close(streamed, offline, rtol=1e-4, atol=1e-4)
        stream.push(random_poses(model.config, batch, 3, seed))  # the other direction does not touch this one
        stream.flush()
        stream.reset()


def test_a_stream_keeps_no_more_than_it_needs() -> None:
    model = trained_model("causal")
    stream, sizes = PoseTokenizerStream(model), []
    for seed in range(6):
        codes = stream.push(random_poses(model.config, 2, 9, seed))
        assert codes is not None
        stream.decode(codes)
        caches = (stream._cache, stream._decoder_cache)
        tensors = [tensor for cache in caches if cache for tensor in cache.states]
        sizes.append(sum(tensor.numel() for tensor in tensors if tensor is not None))
    assert len(set(sizes[1:])) == 1 and sizes[0] > 0


def spent_bits(codes: torch.Tensor, model: PoseTokenizerModel, steps: int) -> float:
    """Bits per frame of codes (Q, S), counted one by one."""
    config, bits = model.config, 0.0
    for step in range(steps):
        for group, levels in zip(config.group_names, config.levels_per_group, strict=True):
            bits += math.log2(levels + 1)
            own = [row for row, (owner, _) in enumerate(config.codebook_index) if owner == group and row < len(codes)]
            while own and codes[own[-1], step] == 0:
                own.pop()
            bits += len(own) * math.log2(config.codebook_size)
    return bits / (steps * config.hop_length)


@pytest.mark.parametrize("variant", ["parts", "whole", "custom"])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), share=st.floats(0.2, 1.1), seed=seeds)
def test_a_target_rate_is_kept_and_decodes(variant: str, lengths: list[int], share: float, seed: int) -> None:
    model = trained_model(variant)
    poses = random_poses(model.config, len(lengths), max(lengths), seed)
    mask = torch.zeros(poses.shape[:2])
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    with torch.inference_mode():
        every = model.encode(poses, mask).pose_codes
        target = share * model.get_spent_bits(every, mask).max().item()
        try:
            codes = model.encode(poses, mask, target_bits_per_frame=target).pose_codes
        except ValueError as error:
            assert "at least" in str(error)
            return
        alone = model.encode(poses[:1, : lengths[0]], target_bits_per_frame=target).pose_codes
        spent = model.get_spent_bits(codes, mask)
        assert model.decode(codes, mask).pose_values.shape == poses.shape
    for row, length in enumerate(lengths):
        steps = model.get_encoded_length(length)
        assert spent[row].item() == pytest.approx(spent_bits(codes[row], model, steps), abs=1e-4)
        assert spent[row] <= target + 1e-4
        if share > 1:
            assert torch.equal(codes[row], every[row])
    assert differing(codes[:1, :, : alone.shape[-1]], alone) <= MAX_FLIPS


def test_bits_go_where_motion_is() -> None:
    model = trained_model("parts")
    poses = random_poses(model.config, 1, 64, seed=1)
    poses[:, :32] = poses[:, :1]  # nothing moves
    with torch.inference_mode():
        every = model.encode(poses).pose_codes
        codes = model.encode(poses, target_bits_per_frame=model.get_spent_bits(every).item() / 2).pose_codes
        errors = [(model.decode(c).pose_values - poses)[..., :-1].square().mean() for c in (every, codes)]
    still, moving = (model.get_spent_bits(codes[..., part]).item() for part in (slice(1, 8), slice(8, 16)))
    assert moving > 2 * still
    assert errors[1] < 4 * errors[0]


def test_a_target_rate_is_refused_where_it_cannot_be() -> None:
    poses = random_poses(trained_model("fsq").config, 1, 8, seed=0)
    with pytest.raises(ValueError, match="quantizer: rvq"):
        trained_model("fsq").encode(poses, target_bits_per_frame=20)
    with pytest.raises(ValueError, match="whole sequence"):
        trained_model("causal").encode(poses, target_bits_per_frame=20, use_streaming=True)
    with pytest.raises(ValueError, match=r"at least 1\.54"):
        trained_model("parts").encode(poses, target_bits_per_frame=1)


def test_a_stream_refuses_what_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="use_causal_conv"):
        PoseTokenizerStream(trained_model("parts"))
    with pytest.raises(ValueError, match="eval mode"):
        PoseTokenizerStream(copy.deepcopy(trained_model("causal")).train())
    with pytest.raises(ValueError, match="multiple of hop_length"):
        model = trained_model("causal")
        model.encode(random_poses(model.config, 1, 3, seed=0), use_streaming=True)


@variants
def test_a_causal_model_sees_no_future_and_another_does(variant: str) -> None:
    model = trained_model(variant)
    poses = random_poses(model.config, 1, 24, seed=4)
    changed = poses.clone()
    changed[:, 12:, :, :-1] += 1.0
    with torch.inference_mode():
        values = [model(p).pose_values[:, :12] for p in (poses, changed)]
    assert torch.equal(*values) == model.config.use_causal_conv


@variants
def test_training_is_deterministic_for_a_seed(variant: str) -> None:
    config = small_config(variant)
    runs = [train_model(config, seed=5, steps=2, batch=4, frames=12).state_dict() for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
