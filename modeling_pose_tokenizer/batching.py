"""Batches of whole sequences: like lengths together, so that little of a batch is padding."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .dataset import PoseDataset

# The shortest sequence of a batch has at least this share of the longest one's frames, where there are enough of such.
_LIKE = 0.8


class LengthBatchSampler(Sampler[list[int]]):
    """Shuffled batches of indices of whole sequences, for `DataLoader(dataset, batch_sampler=...)`.

    Sequences of like length share a bucket, which every epoch cuts anew into batches of as many as fit. The order
    depends on the dataset's seed and epoch (`set_epoch`) alone, and every epoch has as many batches. Ranks take turns
    (accelerate deals batches out, and starts again from the first when they do not come out even); to go on in the
    middle of an epoch, skip batches, which reads nothing.

    Args:
        dataset: With `sequence_length` None.
        max_frames: Frames of a batch with its padding, before augmentation. A longer sequence is a batch of its own.
    """

    def __init__(self, dataset: PoseDataset, max_frames: int) -> None:
        self.dataset = dataset
        order = np.argsort(-dataset.lengths, kind="stable")
        lengths, start = dataset.lengths[order], 0
        self._buckets: list[tuple[np.ndarray, int]] = []  # indices, and how many of them make a batch
        while start < len(order):
            size = max(1, max_frames // int(lengths[start]))
            like = int(np.searchsorted(-lengths, -_LIKE * lengths[start], side="right")) - start
            stop = start + -(-like // size) * size  # whole batches, with a few shorter sequences
            self._buckets.append((order[start:stop], size))
            start = stop

    def __len__(self) -> int:
        return sum(-(-len(rows) // size) for rows, size in self._buckets)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.dataset.seed, self.dataset.epoch))
        batches = []
        for rows, size in self._buckets:
            rows = generator.permutation(rows)
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]
        for number in generator.permutation(len(batches)):
            yield batches[number].tolist()
