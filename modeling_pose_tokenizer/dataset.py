"""Pose data for training: folders of npz files and packed shards, normalised once and read at memory speed.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last).
"""

import hashlib
import inspect
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node

from .augmentation import PoseAugmentation
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import (
    FilePath,
    PoseDataError,
    PoseFileError,
    PoseSequence,
    check_npz,
    check_rejected,
    make_sequence,
    nearest_frames,
    read_npz,
    write_rejected,
)

# Part of the key of every cache: raise it when the rows below change their meaning.
_CACHE_VERSION = 1
# What a row of the cache holds. Arrays are bytes, because `datasets` copies bytes into Arrow at the speed of the disk
# and lists of numbers thirty times slower, and because they are read back without a copy. A file that was left out is
# a row with a reason and nothing else, so that it is not read again either.
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "path": datasets.Value("string"),
        "reason": datasets.Value("string"),
        "poses": datasets.Value("large_binary"),  # (T, N, D) float32
        "mask": datasets.Value("large_binary"),  # (T,) int64
        "center": datasets.List(datasets.Value("float32")),  # (D - 1,)
        "scale": datasets.Value("float32"),
        "fps": datasets.Value("float32"),
        "num_frames": datasets.Value("int64"),
    }
)
# Sequences that are collected in memory before they are written to the cache.
_ROWS_PER_WRITE = 100
# Files that the statistics of the feature extractor are measured on, at most; spread evenly over the split.
_MAX_FIT_FILES = 10_000


class PoseDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The sequences of one split, `root/split/**/*.npz`, normalised by the feature extractor.

    Files hold one sequence or many (packed shards). They are read once: the normalised sequences go to an Arrow cache
    that is keyed by the files' names, sizes and times, the feature extractor's settings and the code that loads them.
    Any number of processes may start at once, one of them writes the cache. Files that cannot be used are left out,
    listed in `rejected`, and an error beyond the share `max_rejected`.

    To read another file format, override `load_sample` and `extensions`:

    ```python
    class CsvDataset(PoseDataset):
        extensions = (".csv",)

        def load_sample(self, path):
            values = np.loadtxt(path, delimiter=",", dtype=np.float32)
            return values.reshape(len(values), 133, 3), np.ones(len(values), dtype=bool)
    ```

    Args:
        root: Folder that holds a folder for each split.
        split: Name of the split's folder.
        feature_extractor: Normalises the sequences.
        sequence_length: Cut windows of so many frames, padded where a sequence is shorter; None gives whole sequences.
            A sequence has ceil(T / sequence_length) windows, so that every frame counts alike.
        random_windows: Draw each window's place anew in every epoch (see `set_epoch`) instead of cutting at multiples
            of `sequence_length`. None means for the split `train`.
        cache_dir: Where the cache goes; None means the cache of the `datasets` library.
        strict: Stop at the first file that cannot be used. The cache is then written by one process.
        max_rejected: Share of files that may be left out.
        num_proc: Processes that read files for the cache.
        fit: Measure the feature extractor's statistics on this split first.
        augmentation: Applied to each window.
        seed: Seed of windows and augmentation. What is drawn depends on it, the epoch and the index alone.

    Attributes:
        ids: Names of the sequences.
        fps: Their frames per second, as the files say.
        num_frames: Their frames, at the files' frame rate.
        lengths: Their frames at the feature extractor's `sampling_rate`.
        rejected: One {"path", "reason"} for each file that was left out.

    Raises:
        PoseDataError: There are no data, too many files cannot be used, or the cache cannot be written.
    """

    extensions: tuple[str, ...] = (".npz",)
    # Part of the cache's key: change it when `load_sample` gives other values for a reason that is not in its class.
    version: str = ""

    def __init__(
        self,
        root: FilePath,
        split: str = "train",
        *,
        feature_extractor: PoseFeatureExtractor,
        sequence_length: int | None = None,
        random_windows: bool | None = None,
        cache_dir: FilePath | None = None,
        strict: bool = False,
        max_rejected: float = 0.01,
        num_proc: int | None = None,
        fit: bool = False,
        augmentation: PoseAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        if sequence_length is not None and sequence_length < 1:
            raise ValueError(f"sequence_length is {sequence_length}, expected at least 1 frame, or None.")
        self.folder = Path(root) / split
        self.files = find_files(root, split, self.extensions)
        self.feature_extractor = feature_extractor
        self.sequence_length = sequence_length
        self.random_windows = split == "train" if random_windows is None else random_windows
        self.strict = strict
        self.augmentation = augmentation
        self.seed = seed
        if fit:
            step = math.ceil(len(self.files) / _MAX_FIT_FILES)
            sequences = self.read_sequences(self.files[::step])
            feature_extractor.fit((sequence.poses, sequence.mask) for sequence in sequences)
        self._cache = self._build_cache(cache_dir, num_proc)
        self._open_cache()
        if self.rejected and strict:
            raise PoseDataError("{path}: {reason}.".format(**self.rejected[0]))
        check_rejected(self.folder, self.rejected, len(self.files), max_rejected)
        if not self.ids:
            raise PoseDataError(f"{self.folder} holds no data: none of the {len(self.files)} files can be used.")
        self._index_windows()
        # In shared memory, because workers that outlive an epoch must learn of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    # ---- reading files ----------------------------------------------------------------------------------------------

    def load_sample(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Reads one file; override it for another format. The frame rate is taken to be the `sampling_rate`.

        Args:
            path: A file with one of the `extensions`.

        Returns:
            Poses (T, N, D), raw coordinates with the confidence last, and the mask (T,) of valid frames.
        """
        sequence, *others = self._read_npz(path)
        if others:
            raise PoseFileError(path, f"holds {1 + len(others)} sequences, expected 1")
        return sequence.poses, sequence.mask

    def read_sequences(self, files: Sequence[FilePath]) -> Iterator[PoseSequence]:
        """Raw sequences of those of the files that can be used."""
        for file in files:
            try:
                yield from self._load(Path(file))
            except PoseFileError:  # reported when the cache is built
                continue

    def _load(self, path: Path) -> list[PoseSequence]:
        """All sequences of a file, of any format."""
        if type(self).load_sample is PoseDataset.load_sample:
            sequences = self._read_npz(path)
        else:
            try:
                poses, mask = self.load_sample(path)
            except PoseFileError:
                raise
            except Exception as error:  # whatever a user's reader makes of a broken file, the run goes on without it
                raise PoseFileError(path, f"load_sample failed ({type(error).__name__}: {error})") from error
            sequences = [make_sequence(path, path.stem, poses, mask, None, **self._expected)]
        if len(sequences) == 1 and sequences[0].id == path.stem:
            sequences[0].id = path.relative_to(self.folder).with_suffix("").as_posix()
        return sequences

    def _read_npz(self, path: Path) -> list[PoseSequence]:
        return read_npz(path, **self._expected)

    @property
    def _expected(self) -> dict[str, int]:
        return {
            "num_keypoints": self.feature_extractor.num_keypoints,
            "keypoint_dim": self.feature_extractor.keypoint_dim,
        }

    # ---- the cache --------------------------------------------------------------------------------------------------

    def _build_cache(self, cache_dir: FilePath | None, num_proc: int | None) -> datasets.Dataset:
        """Writes the cache, or finds it written. `datasets` locks it and renames it into place when complete."""
        try:
            return datasets.Dataset.from_generator(
                _cache_rows,
                features=_FEATURES,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                gen_kwargs={"files": [os.fspath(file) for file in self.files], "dataset": self},
                num_proc=None if self.strict else num_proc,
                fingerprint=self._cache_key(),
                writer_batch_size=_ROWS_PER_WRITE,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, PoseFileError):
                raise PoseDataError(f"{error.__cause__}.") from None
            raise
        except OSError as error:
            place = datasets.config.HF_DATASETS_CACHE if cache_dir is None else cache_dir
            raise PoseDataError(f"The cache in {place} cannot be written ({error.strerror or error}).") from None

    def _rows_of(self, file: str) -> Iterator[dict[str, Any]]:
        """The rows of the cache that a file gives."""
        path = Path(file)
        name = path.relative_to(self.folder).as_posix()
        try:
            sequences = self._load(path)
        except PoseFileError as error:
            if self.strict:
                raise
            yield dict.fromkeys(_FEATURES) | {"path": name, "reason": error.reason}
            return
        for sequence in sequences:
            features = normalise(self.feature_extractor, sequence)
            row = features | {"id": sequence.id, "path": name, "reason": None}
            row["poses"] = row.pop("input_values").tobytes()
            row["mask"] = row.pop("padding_mask").tobytes()
            yield row

    def _cache_key(self) -> str:
        files = []
        for file in self.files:
            status = file.stat()
            files.append((file.relative_to(self.folder).as_posix(), status.st_size, status.st_mtime_ns))
        own = [kind for kind in type(self).__mro__ if issubclass(kind, PoseDataset) and kind is not PoseDataset]
        settings = self.feature_extractor.to_dict()
        settings.pop("auto_map", None)  # a saved one names its code; it normalises no differently
        parts = {
            "version": (_CACHE_VERSION, self.version),
            "files": files,
            "load_sample": [_source_of(kind) for kind in own],
            "feature_extractor": settings,
            "normalise": _source_of(inspect.getmodule(type(self.feature_extractor))),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _open_cache(self) -> None:
        """Loads the small columns, and prepares the large ones for reading without a copy."""
        table = self._cache.data.table
        reasons = table["reason"].to_pylist()
        used = np.flatnonzero([reason is None for reason in reasons])
        self.rejected = [
            {"path": os.fspath(self.folder / path), "reason": reason}
            for path, reason in zip(table["path"].to_pylist(), reasons, strict=True)
            if reason is not None
        ]
        small = table.drop_columns(["poses", "mask"]).take(used)
        self.ids: list[str] = small["id"].to_pylist()
        self.fps = small["fps"].to_numpy()
        self.num_frames = small["num_frames"].to_numpy()
        self._center = np.array(small["center"].to_pylist(), dtype=np.float32)  # (sequences, D - 1)
        self._scale = small["scale"].to_numpy()
        self._poses = _BytesColumn(table["poses"], used)
        self._mask = _BytesColumn(table["mask"], used)
        self.lengths = self._mask.sizes // np.dtype(np.int64).itemsize
        twice, count = Counter(self.ids).most_common(1)[0] if self.ids else ("", 0)
        if count > 1:
            raise PoseDataError(f"{self.folder} holds two sequences named {twice}, expected unique names.")

    def __getstate__(self) -> dict[str, Any]:
        # The views into the memory map would be copied; each process opens the file itself.
        return {key: value for key, value in self.__dict__.items() if key not in ("_poses", "_mask")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_cache" in state:
            self._open_cache()

    # ---- reading windows --------------------------------------------------------------------------------------------

    def _index_windows(self) -> None:
        """Numbers the windows: which sequence, and which of its parts."""
        if self.sequence_length is None:
            parts = np.ones(len(self.ids), dtype=np.int64)
        else:
            parts = -(-self.lengths // self.sequence_length)
        self._window_row = np.repeat(np.arange(len(parts)), parts)
        self._window_parts = parts[self._window_row]
        first = np.cumsum(parts) - parts
        self._window_part = np.arange(len(self._window_row)) - first[self._window_row]
        self._starts_epoch = -1

    def set_epoch(self, epoch: int) -> None:
        """Draws other windows and augmentations for this epoch, in running workers too."""
        self._epoch.fill_(epoch)

    def _window_starts(self, epoch: int, span: int) -> np.ndarray:
        """First frame of each window, drawn for all at once since a generator per window would take longer to make
        than the window to read."""
        if self._starts_epoch != epoch:
            draws = np.random.default_rng((self.seed, epoch)).random(len(self._window_row))
            self._starts = spread_starts(
                self.lengths[self._window_row], span, self._window_part, self._window_parts, draws
            )
            self._starts_epoch = epoch
        return self._starts

    def __len__(self) -> int:
        return len(self._window_row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One window.

        Returns:
            `input_values` (T, N, D) float32, `padding_mask` (T,) int64 (1 = real, valid frame), `id`, and for
            `postprocess` `center` (D - 1,), `scale`, `fps` and `num_frames` of the sequence.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}, but the dataset has {len(self)} items.")
        index = int(index) % len(self)
        row = self._window_row[index]
        start, frames = 0, int(self.lengths[row])
        epoch = int(self._epoch)
        if self.sequence_length is not None:
            # A sequence that augmentation makes faster needs more frames than it gives.
            span = math.ceil(self.sequence_length * (self.augmentation.max_speed if self.augmentation else 1.0))
            if self.random_windows:
                start = int(self._window_starts(epoch, span)[index])
            else:
                start = int(self._window_part[index]) * self.sequence_length
            frames = min(span, frames - start)
        shape = (self.feature_extractor.num_keypoints, self.feature_extractor.keypoint_dim)
        values = self._poses.read(row, np.float32, start, frames, shape)
        mask = self._mask.read(row, np.int64, start, frames)
        if self.augmentation is not None:
            values, mask = self.augmentation(values, mask, np.random.default_rng((self.seed, epoch, index)))
        length = self.sequence_length or len(values)
        return {
            "input_values": _fit_length(values, length),
            "padding_mask": _fit_length(mask, length),
            "id": self.ids[row],
            "center": self._center[row],
            "scale": self._scale[row],
            "fps": self.fps[row],
            "num_frames": self.num_frames[row],
        }

    def write_rejected(self, folder: FilePath) -> None:
        """Writes `rejected.jsonl` into a folder."""
        write_rejected(folder, self.rejected)


class _BytesColumn:
    """Rows of a column of bytes, as arrays that share the memory of the Arrow table."""

    def __init__(self, column: pa.ChunkedArray, rows: np.ndarray) -> None:
        starts, sizes, chunk_of, self._buffers = [], [], [], []
        for number, chunk in enumerate(column.chunks):
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            starts.append(ends[:-1])
            sizes.append(np.diff(ends))
            chunk_of.append(np.full(len(chunk), number))
            self._buffers.append(data)
        self._starts = np.concatenate(starts)[rows]
        self._chunks = np.concatenate(chunk_of)[rows]
        self.sizes = np.concatenate(sizes)[rows]

    def read(self, row: int, dtype: Any, start: int, count: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """`count` elements of `shape` from `start` on: (count, *shape), read-only."""
        width = math.prod(shape)
        place = int(self._starts[row]) + start * width * np.dtype(dtype).itemsize
        flat = np.frombuffer(self._buffers[self._chunks[row]], dtype, count * width, place)
        return flat.reshape(count, *shape)


def _cache_rows(files: list[str], dataset: PoseDataset) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from dataset._rows_of(file)


def _source_of(thing: Any) -> str:
    """Source code of a class or module; of a class typed into an interpreter, which has none, the compiled code."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        codes = [value.__code__ for value in vars(thing).values() if inspect.isfunction(value)]
        return repr([(code.co_code, code.co_names, code.co_consts) for code in codes])


def find_files(root: FilePath, split: str, extensions: Sequence[str] = (".npz",)) -> list[Path]:
    """The files of a split, in every folder below `root/split`, sorted.

    Raises:
        PoseDataError: There are none.
    """
    root, folder = Path(root), Path(root) / split
    if not root.is_dir():
        raise PoseDataError(f"There is no data folder {root}.")
    if split in ("", ".", "..") or Path(split).name != split:  # files are named after it
        raise PoseDataError(f"The split is {split!r}; expected the name of a folder in {root}.")
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
        raise PoseDataError(f"{root} has no folder for the split {split}; its folders: {found}.")
    files = [
        Path(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(tuple(extensions)) and not name.startswith(".")
    ]
    if not files:
        raise PoseDataError(f"{folder} is empty: there are no {' or '.join(extensions)} files in it.")
    return sorted(files)


def normalise(feature_extractor: PoseFeatureExtractor, sequence: PoseSequence) -> dict[str, Any]:
    """Model input of one sequence; its masked frames hold no keypoint and are 0 in `padding_mask`.

    Returns:
        What the feature extractor gives for a batch, of this one sequence: `input_values` (T, N, D), `padding_mask`
        (T,), `center`, `scale`, `fps`, `num_frames`.
    """
    poses, mask = sequence.poses, sequence.mask
    if not mask.all():
        poses = np.where(mask[:, None, None], poses, np.float32(0))
    features = {key: value[0] for key, value in feature_extractor(poses, fps=sequence.fps).items()}
    # After resampling, a frame is as valid as the frame of the file that is nearest to it.
    times = np.arange(len(features["padding_mask"])) * (float(features["fps"]) / feature_extractor.sampling_rate)
    features["padding_mask"] = features["padding_mask"] * mask[nearest_frames(times, len(mask))]
    return features


def spread_starts(lengths: Any, span: Any, part: Any, parts: Any, draws: Any) -> np.ndarray:
    """First frames of random windows: the places where a window of `span` frames fits are dealt out evenly to the
    `parts` windows of a sequence, and `draws` in [0, 1) choose among those of each."""
    places = np.maximum(lengths - span, 0) + 1
    return np.minimum(((part + draws) * places / parts).astype(np.int64), places - 1)


def _fit_length(values: np.ndarray, length: int) -> np.ndarray:
    """(T, ...) cut or padded with zeros to (length, ...), as memory of its own."""
    fitted = np.empty((length, *values.shape[1:]), values.dtype)
    fitted[: len(values)] = values[:length]
    fitted[len(values) :] = 0
    return fitted


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins items to a batch, padded on the right to the longest.

    Returns:
        `input_values` (B, T, N, D) and `padding_mask` (B, T), the other numbers as tensors, text as lists.
    """
    length = max(len(item["input_values"]) for item in items)
    batch: dict[str, Any] = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if key in ("input_values", "padding_mask"):
            values = [value if len(value) == length else _fit_length(value, length) for value in values]
        batch[key] = values if isinstance(first, str) else torch.from_numpy(np.stack(values))
    return batch


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

    Args:
        root: Folder that holds a folder for each split.
        split: Name of the split's folder, of packed shards (files of one sequence work too, slower).
        feature_extractor: Normalises the sequences.
        sequence_length: As for `PoseDataset`.
        random_windows: As for `PoseDataset`.
        rank: This process among those that share the stream.
        world_size: Number of those processes.
        shuffle_buffer: Shuffle the files, and the items within a buffer of so many; 0 keeps the order.
        max_rejected: Share of files that may be left out because their headers say that they cannot be used. A file
            whose data then prove broken ends the stream.
        strict: Stop at the first such file.
        seed: Seed of the shuffling and of random windows; the same on every rank.
        epoch: Number of the epoch, which draws other windows and another order.

    Returns:
        An iterable dataset of items as `PoseDataset` has them; read it with `DataLoader(..., collate_fn=collate)`.

    Raises:
        PoseDataError: There are no data, or too many files cannot be used.
    """
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


def _stream_items(
    files: list[str],
    feature_extractor: PoseFeatureExtractor,
    sequence_length: int | None,
    seed: tuple[int, int] | None,
) -> Iterator[dict[str, Any]]:
    expected = {"num_keypoints": feature_extractor.num_keypoints, "keypoint_dim": feature_extractor.keypoint_dim}
    for file in files:
        for sequence in read_npz(file, **expected):
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
                    "input_values": _fit_length(values[window], length),
                    "padding_mask": _fit_length(mask[window], length),
                }
