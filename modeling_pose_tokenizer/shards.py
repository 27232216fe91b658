"""Pose data as a stream of shards: for data that would not fit on the disk twice, or not at all.

Letters: T frames, N keypoints, D values per keypoint (confidence last).
"""

import copy
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfFileSystem, snapshot_download

from .augmentation import PoseAugmentation
from .dataset import check_resampling, find_files, fit_length, normalise, spread_starts
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import (
    FilePath,
    PoseDataError,
    PoseFileError,
    PoseSequence,
    check_npz,
    check_rejected,
    read_npz,
    write_rejected,
)

# How the address of a folder of the Hub begins.
_HUB = "hf://"
# Files that the statistics of the feature extractor are measured on, at most; spread evenly over the split.
_MAX_FIT_FILES = 32


class PoseStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The sequences of one split, read as a stream, without a cache: for data that would not fit on the disk.

    Items are those of `PoseDataset`. The files are dealt out to the ranks, and by `DataLoader` to its workers: their
    number should be a multiple of ranks times workers, otherwise ranks read what others use, and workers stand idle.
    Ranks and workers may come to the end of an epoch after different numbers of items. The order depends on seed,
    epoch, and the numbers of ranks and workers. To go on in the middle of an epoch, skip what was read before: those
    shards are read again, from the Hub too.

    Args:
        root: Folder that holds a folder for each split, or one of the Hub: `hf://datasets/USER/NAME`.
        split: Name of the split's folder, of packed shards (files of one sequence work too, slower).
        feature_extractor: Normalises the sequences.
        sequence_length: As for `PoseDataset`.
        random_windows: As for `PoseDataset`.
        rank: This process among those that share the stream.
        world_size: Number of those processes.
        shuffle_buffer: Shuffle the files, and the items within a buffer of so many; 0 keeps the order.
        max_rejected: Share of files that may be left out: local ones at once when their headers say that they cannot
            be used, any whose data prove broken when it is read, with a warning.
        strict: Stop at the first such file.
        fit: Measure the feature extractor's statistics on some of the files first.
        augmentation: Applied to each window.
        seed: Seed of the shuffling, of windows and of augmentation; the same on every rank.

    Attributes:
        files: Paths or addresses of the shards.
        rejected: One {"path", "reason"} for each local file whose header says that it cannot be used.

    Raises:
        PoseDataError: There are no data, or too many files cannot be used.
    """

    def __init__(
        self,
        root: FilePath,
        split: str = "train",
        *,
        feature_extractor: PoseFeatureExtractor,
        sequence_length: int | None = None,
        random_windows: bool | None = None,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 0,
        max_rejected: float = 0.01,
        strict: bool = False,
        fit: bool = False,
        augmentation: PoseAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.folder = f"{os.fspath(root).rstrip('/')}/{split}"
        self.feature_extractor = feature_extractor
        self.sequence_length = sequence_length
        self.random_windows = split == "train" if random_windows is None else random_windows
        self.rank, self.world_size = rank, world_size
        self.shuffle_buffer = shuffle_buffer
        self.augmentation = augmentation
        self.seed = seed
        self.rejected: list[dict[str, str]] = []
        self.files = _find_on_hub(self.folder) if is_on_hub(root) else self._find_usable(root, split, strict)
        total = len(self.files) + len(self.rejected)
        check_rejected(self.folder, self.rejected, total, max_rejected)
        # How many more may prove broken.
        self._spare = 0 if strict else int(max_rejected * total) - len(self.rejected)
        if fit:
            sequences = self._read(self.files[:: math.ceil(len(self.files) / _MAX_FIT_FILES)])
            feature_extractor.fit((sequence.poses, sequence.mask) for sequence in sequences)
        # In shared memory, because workers that outlive an epoch must learn of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draws another order, other windows and augmentations for this epoch, in running workers too."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = int(self._epoch)
        # `datasets` shuffles, and deals out shards to ranks and to DataLoader's workers.
        stream = datasets.IterableDataset.from_generator(self._items, gen_kwargs={"files": self.files, "epoch": epoch})
        if self.shuffle_buffer:
            stream = stream.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        stream = split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size)
        stream.set_epoch(epoch)
        yield from stream

    def of_rank(self, rank: int, world_size: int) -> "PoseStream":
        """The same stream, another part of it."""
        other = copy.copy(self)
        other.rank, other.world_size = rank, world_size
        return other

    def write_rejected(self, folder: FilePath) -> None:
        """Writes `rejected.jsonl` into a folder."""
        write_rejected(folder, self.rejected)

    def _find_usable(self, root: FilePath, split: str, strict: bool) -> list[str]:
        """Files of a local split whose headers say that they can be used; the others become `rejected`."""
        files = []
        for file in find_files(root, split):
            try:
                check_npz(file, **self._expected)
                files.append(os.fspath(file))
            except PoseFileError as error:
                self.rejected.append({"path": error.path, "reason": error.reason})
                if strict:
                    raise PoseDataError(f"{error}.") from None
        return files

    @property
    def _expected(self) -> dict[str, int]:
        return {
            "num_keypoints": self.feature_extractor.num_keypoints,
            "keypoint_dim": self.feature_extractor.keypoint_dim,
        }

    def _read(self, files: list[str]) -> Iterator[PoseSequence]:
        """The sequences of the files; passes over as many broken ones as may be left out."""
        broken = 0
        for file in files:
            try:
                sequences = _read_file(file, **self._expected)
                check_resampling(file, self.feature_extractor, sequences)
                yield from sequences
            except PoseFileError as error:
                broken += 1
                if broken > self._spare:
                    raise PoseDataError(f"{error}.") from None
                warnings.warn(f"{error}; the stream goes on without it.", stacklevel=2)

    def _items(self, files: list[str], epoch: int) -> Iterator[dict[str, Any]]:
        augmentation = self.augmentation
        for sequence in self._read(files):
            item = normalise(self.feature_extractor, sequence) | {"id": sequence.id}
            values, mask = item["input_values"], item["padding_mask"]
            length = self.sequence_length or len(values)
            span = math.ceil(length * (augmentation.max_speed if augmentation and self.sequence_length else 1.0))
            parts = np.arange(-(-len(values) // length))
            starts = parts * length
            # Seeded by the name, so that a window does not depend on who reads it.
            seed = (self.seed, epoch, zlib.crc32(sequence.id.encode()))
            if self.random_windows:
                draws = np.random.default_rng(seed).random(len(parts))
                starts = spread_starts(len(values), span, parts, len(parts), draws)
            for part, start in enumerate(starts):
                window = values[start : start + span], mask[start : start + span]
                if augmentation is not None:
                    window = augmentation(*window, np.random.default_rng((*seed, part)))
                size = length if self.sequence_length else len(window[1])
                yield item | {
                    "input_values": fit_length(window[0], size),
                    "padding_mask": fit_length(window[1], size),
                }


def is_on_hub(root: FilePath) -> bool:
    """Whether data lie on the Hub."""
    return os.fspath(root).startswith(_HUB)


def download_split(root: str, split: str) -> Path:
    """Downloads a split of a dataset repository, for what must be read more than once.

    Returns:
        The local folder that holds the split's.
    """
    files = _find_on_hub(f"{root.rstrip('/')}/{split}")
    hub: Any = HfFileSystem()  # a bucket's paths, which are other objects, are no repository
    try:
        place = hub.resolve_path(root)
        folder = snapshot_download(
            place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            allow_patterns=[hub.resolve_path(file).path_in_repo for file in files],
        )
    except (OSError, ValueError) as error:
        raise PoseDataError(f"{root}/{split} cannot be downloaded ({_one_line(error)}).") from None
    return Path(folder, place.path_in_repo)


def _find_on_hub(folder: str) -> list[str]:
    """Files of a split of a dataset repository."""
    try:
        found = HfFileSystem().find(folder)
    except (OSError, ValueError) as error:  # no such repository, no connection, no name of a repository
        raise PoseDataError(f"{folder} cannot be read ({_one_line(error)}).") from None
    files = sorted(_HUB + path for path in found if path.endswith(".npz"))
    if not files:
        raise PoseDataError(f"{folder} is empty: there are no .npz files in it.")
    return files


def _read_file(file: str, **expected: int) -> list[PoseSequence]:
    """The sequences of a file; one of the Hub is on the disk while it is read."""
    if not file.startswith(_HUB):
        return read_npz(file, **expected)
    with TemporaryDirectory(prefix="shard-") as folder:
        local = os.path.join(folder, os.path.basename(file))
        HfFileSystem().get_file(file, local)
        try:
            return read_npz(local, **expected)
        except PoseFileError as error:
            raise PoseFileError(file, error.reason) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
