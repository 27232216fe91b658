"""The laws of the codec, over random shapes, on warmed and perturbed models of every variant."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VARIANTS, differing, random_poses, small_config, train_model, trained_model

from modeling_pose_tokenizer import PoseTokenizerModel, PoseTokenizerStream

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
            values = model.decode(prefix).pose_values[:, :frames]
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
