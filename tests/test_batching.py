"""Batches of whole sequences: all of them, of like length, the same on any number of ranks."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer.batching import LengthBatchSampler


class Lengths:
    """All that the sampler looks at, for more sequences than a test can write."""

    def __init__(self, lengths: list[int], seed: int = 0, epoch: int = 0) -> None:
        self.lengths, self.seed, self.epoch = np.array(lengths), seed, epoch


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=200),
    max_frames=st.integers(1, 4000),
    epoch=st.integers(0),
)
def test_batches_hold_every_sequence_once_and_bounded_frames(lengths: list[int], max_frames: int, epoch: int) -> None:
    sampler = LengthBatchSampler(Lengths(lengths, epoch=epoch % 1000), max_frames)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= max_frames or len(batch) == 1


def test_batches_of_like_length_have_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 2000)
    batches = list(LengthBatchSampler(Lengths(lengths.tolist()), 32 * 64))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.2 * lengths.sum()
    assert len(batches) < 1.2 * lengths.sum() / (32 * 64) * 1.2


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 300).tolist()

    def batches(**options: int) -> list[list[int]]:
        return list(LengthBatchSampler(Lengths(lengths, **options), 2000))

    assert batches() == batches() and len(batches()) == len(batches(epoch=1))
    assert batches() != batches(epoch=1) and batches() != batches(seed=1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ranks_share_batches_evenly(ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 40).tolist()
    sampler = LengthBatchSampler(Lengths(lengths), 400)
    shares = [list(BatchSamplerShard(sampler, ranks, rank)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(BatchSamplerShard(sampler, ranks))}  # or a rank waits for ever
    turns = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert turns[: len(sampler)] == list(sampler) and len(turns) < len(sampler) + ranks
