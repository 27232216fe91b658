"""Pose data as a stream of shards: for data that would not fit on the disk twice, or not at all.

Letters: T frames, N keypoints, D values per keypoint (confidence last).
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfFileSystem

from .dataset import find_files, fit_length, normalise, spread_starts
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import FilePath, PoseDataError, PoseFileError, PoseSequence, check_npz, check_rejected, read_npz

# How the address of a folder of the Hub begins.
_HUB = "hf://"


def stream_shards(
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
    seed: int = 0,
    epoch: int = 0,
) -> datasets.IterableDataset:
    """Reads a split as a stream, without a cache: for data that would not fit on the disk twice.

    The files are dealt out to the ranks, and by `DataLoader` to its workers. Their number should be a multiple of
    ranks times workers: otherwise ranks read what others use, and workers stand idle. Every epoch takes a new stream.
    The order depends on seed and epoch, and on the numbers of ranks and workers. To go on in the middle of an epoch,
    skip the batches that were read (`accelerate.skip_first_batches`): their shards are read again, from the Hub too.

    Args:
        root: Folder that holds a folder for each split, or one of the Hub: `hf://datasets/USER/NAME`.
        split: Name of the split's folder, of packed shards (files of one sequence work too, slower).
        feature_extractor: Normalises the sequences.
        sequence_length: As for `PoseDataset`.
        random_windows: As for `PoseDataset`.
        rank: This process among those that share the stream.
        world_size: Number of those processes.
        shuffle_buffer: Shuffle the files, and the items within a buffer of so many; 0 keeps the order.
        max_rejected: Share of files that may be left out because their headers say that they cannot be used. A file
            whose data then prove broken ends the stream, as does any broken one of the Hub.
        strict: Stop at the first such file.
        seed: Seed of the shuffling and of random windows; the same on every rank.
        epoch: Number of the epoch, which draws other windows and another order.

    Returns:
        An iterable dataset of items as `PoseDataset` has them; read it with `DataLoader(..., collate_fn=collate)`.

    Raises:
        PoseDataError: There are no data, or too many files cannot be used.
    """
    if os.fspath(root).startswith(_HUB):
        files = _find_on_hub(os.fspath(root), split)
    else:
        files = _find_usable(root, split, feature_extractor, max_rejected, strict)
    stream = datasets.IterableDataset.from_generator(
        _stream_items,
        gen_kwargs={
            "files": files,
            "feature_extractor": feature_extractor,
            "sequence_length": sequence_length,
            "seed": (seed, epoch) if (split == "train" if random_windows is None else random_windows) else None,
        },
    )
    if shuffle_buffer:
        stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
    stream = split_dataset_by_node(stream, rank=rank, world_size=world_size)
    stream.set_epoch(epoch)
    return stream


def _find_usable(
    root: FilePath, split: str, feature_extractor: PoseFeatureExtractor, max_rejected: float, strict: bool
) -> list[str]:
    """Files of a local split whose headers say that they can be used."""
    files, rejected = [], []
    for file in find_files(root, split):
        try:
            check_npz(file, num_keypoints=feature_extractor.num_keypoints, keypoint_dim=feature_extractor.keypoint_dim)
            files.append(os.fspath(file))
        except PoseFileError as error:
            rejected.append({"path": error.path, "reason": error.reason})
            if strict:
                raise PoseDataError(f"{error}.") from None
    check_rejected(Path(root) / split, rejected, len(files) + len(rejected), max_rejected)
    return files


def _find_on_hub(root: str, split: str) -> list[str]:
    """Files of a split of a dataset repository."""
    folder = f"{root.rstrip('/')}/{split}"
    try:
        found = HfFileSystem().find(folder)
    except (OSError, ValueError) as error:  # no such repository, no connection, no name of a repository
        raise PoseDataError(f"{folder} cannot be read ({' '.join(str(error).split()).rstrip('.')}).") from None
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


def _stream_items(
    files: list[str],
    feature_extractor: PoseFeatureExtractor,
    sequence_length: int | None,
    seed: tuple[int, int] | None,
) -> Iterator[dict[str, Any]]:
    expected = {"num_keypoints": feature_extractor.num_keypoints, "keypoint_dim": feature_extractor.keypoint_dim}
    for file in files:
        for sequence in _read_file(file, **expected):
            item = normalise(feature_extractor, sequence) | {"id": sequence.id}
            values, mask = item["input_values"], item["padding_mask"]
            length = sequence_length or len(values)
            parts = np.arange(-(-len(values) // length))
            if seed is None:
                starts = parts * length
            else:
                # Seeded by the name, so that a window does not depend on who reads it.
                draws = np.random.default_rng((*seed, zlib.crc32(sequence.id.encode()))).random(len(parts))
                starts = spread_starts(len(values), length, parts, len(parts), draws)
            for start in starts:
                window = slice(start, start + length)
                yield item | {
                    "input_values": fit_length(values[window], length),
                    "padding_mask": fit_length(mask[window], length),
                }
