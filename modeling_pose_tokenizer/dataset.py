"""Pose data for training: folders of npz files and packed shards, normalised once and read at memory speed.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last).
"""

import hashlib
import inspect
import json
import math
import os
import shutil
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from .augmentation import PoseAugmentation
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import (
    FilePath,
    PoseDataError,
    PoseFileError,
    PoseSequence,
    check_rejected,
    make_sequence,
    nearest_frames,
    read_npz,
    walk_folders,
    write_rejected,
)

# Part of the key of every cache: raise it when the rows below change their meaning.
_CACHE_VERSION = 2
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
        "checksum": datasets.Value("int64"),  # of poses and mask
        "center": datasets.List(datasets.Value("float32")),  # (D - 1,)
        "scale": datasets.Value("float32"),
        "fps": datasets.Value("float32"),
        "num_frames": datasets.Value("int64"),
    }
)
# What has a frame for each of the sequence, and is padded to the longest of the batch.
_PADDED = ("input_values", "padding_mask")
# Sequences that are collected in memory before they are written to the cache.
_ROWS_PER_WRITE = 100
# Rows whose checksums are looked at when a cache is opened: to read all would take as long as to build it.
_CHECKED_ROWS = 64
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
        self._load_cache(cache_dir, num_proc)
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
        check_resampling(path, self.feature_extractor, sequences)
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

    def _load_cache(self, cache_dir: FilePath | None, num_proc: int | None) -> None:
        """Opens the cache. It is built if there is none, and built again if what is there turns out damaged."""
        root, key = Path(cache_dir or datasets.config.HF_DATASETS_CACHE), self._cache_key()
        found = [path.parent for path in root.glob(f"generator/*{key}/[0-9]*/dataset_info.json")]
        try:
            try:
                self._build_cache(root, key, num_proc)
            except Exception as error:  # broken bytes surface as many types
                if not found or isinstance(error, PoseDataError):
                    raise
                reason = " ".join(str(error).split()).rstrip(".")
                warnings.warn(f"The cache {found[0]} is damaged ({reason}); it is built again.", stacklevel=4)
                _remove(found[0])
                self._build_cache(root, key, num_proc)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, PoseFileError):
                raise PoseDataError(f"{error.__cause__}.") from None
            raise
        except OSError as error:
            raise PoseDataError(f"The cache in {root} cannot be written ({error.strerror or error}).") from None

    def _build_cache(self, root: Path, key: str, num_proc: int | None) -> None:
        """Writes the cache, or finds it written. `datasets` locks it and renames it into place when complete."""
        self._cache = datasets.Dataset.from_generator(
            _cache_rows,
            features=_FEATURES,
            cache_dir=os.fspath(root),
            gen_kwargs={"files": [os.fspath(file) for file in self.files], "dataset": self},
            num_proc=None if self.strict else num_proc,
            fingerprint=key,
            writer_batch_size=_ROWS_PER_WRITE,
        )
        self._open_cache()
        self._check_cache()

    def _check_cache(self) -> None:
        """Raises `ValueError` when the cache is not as it was written, as far as a look at some rows can tell."""
        written = sum(split.num_examples for split in self._cache.info.splits.values())
        if len(self._cache) != written:
            raise ValueError(f"holds {len(self._cache)} rows, expected {written}")
        if (self._poses.lengths != self.lengths).any():
            raise ValueError("poses and masks differ in length")
        rows = np.unique(np.linspace(0, len(self.ids) - 1, min(len(self.ids), _CHECKED_ROWS)).astype(np.int64))
        whole = rows, np.zeros_like(rows), self.lengths[rows]
        for row, poses, mask in zip(rows, self._poses.read(*whole), self._mask.read(*whole), strict=True):
            if _checksum(poses, mask) != self._checksums[row]:
                raise ValueError(f"the checksum of {self.ids[row]} is another")

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
            poses, mask = row.pop("input_values"), row.pop("padding_mask")
            row |= {"poses": poses.tobytes(), "mask": mask.tobytes(), "checksum": _checksum(poses, mask)}
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
        table.validate(full=True)  # of the poses the offsets; wrong ones would end the process
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
        self._checksums = small["checksum"].to_numpy()
        shape = (self.feature_extractor.num_keypoints, self.feature_extractor.keypoint_dim)
        self._poses = _BytesColumn(table["poses"], used, np.float32, shape)
        self._mask = _BytesColumn(table["mask"], used, np.int64)
        self.lengths = self._mask.lengths
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

    @property
    def epoch(self) -> int:
        """The epoch that was set last, 0 before."""
        return int(self._epoch)

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
        ((values, mask),), (row,) = self._windows([index])
        length = self.sequence_length or len(values)
        return {
            "input_values": fit_length(values, length),
            "padding_mask": fit_length(mask, length),
            "id": self.ids[row],
            "center": self._center[row],
            "scale": self._scale[row],
            "fps": self.fps[row],
            "num_frames": self.num_frames[row],
        }

    def __getitems__(self, indices: Sequence[int]) -> "_Joined":
        """The items of a batch, as `DataLoader` asks for them: read to where `collate` wants them, copied once."""
        windows, rows = self._windows(indices)
        sizes = [min(len(mask), self.sequence_length or len(mask)) for _, mask in windows]
        length = self.sequence_length or max(sizes)
        poses = np.empty((len(windows), length, *self._poses.shape), np.float32)
        masks = np.empty((len(windows), length), np.int64)
        for number, ((values, mask), size) in enumerate(zip(windows, sizes, strict=True)):
            poses[number, :size] = values[:size]
            masks[number, :size] = mask[:size]
            if size < length:
                poses[number, size:], masks[number, size:] = 0, 0
        arrays = {
            "input_values": poses,
            "padding_mask": masks,
            "id": [self.ids[row] for row in rows],
            "center": self._center[rows],
            "scale": self._scale[rows],
            "fps": self.fps[rows],
            "num_frames": self.num_frames[rows],
        }
        return _Joined(arrays, sizes if self.sequence_length is None else [length] * len(windows))

    def _windows(self, indices: Sequence[int]) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """Poses (T', N, D) and mask (T',) of windows, not yet cut or padded, and the rows of their sequences."""
        epoch, index = self.epoch, np.asarray(indices)
        wrong = (index < -len(self)) | (index >= len(self))
        if wrong.any():
            raise IndexError(f"index is {index[wrong][0]}, but the dataset has {len(self)} items.")
        index = index % len(self)
        rows = self._window_row[index]
        starts, frames = np.zeros(len(rows), np.int64), self.lengths[rows]
        if self.sequence_length is not None:
            # A sequence that augmentation makes faster needs more frames than it gives.
            span = math.ceil(self.sequence_length * (self.augmentation.max_speed if self.augmentation else 1.0))
            if self.random_windows:
                starts = self._window_starts(epoch, span)[index]
            else:
                starts = self._window_part[index] * self.sequence_length
            frames = np.minimum(span, frames - starts)
        windows = list(zip(self._poses.read(rows, starts, frames), self._mask.read(rows, starts, frames), strict=True))
        if self.augmentation is not None:
            windows = [
                self.augmentation(values, mask, np.random.default_rng((self.seed, epoch, number)))
                for number, (values, mask) in zip(index.tolist(), windows, strict=True)
            ]
        return windows, rows

    def write_rejected(self, folder: FilePath) -> None:
        """Writes `rejected.jsonl` into a folder."""
        write_rejected(folder, self.rejected)


class _Joined(Sequence[dict[str, Any]]):
    """Items that lie in the memory of their batch; any collator can use them, and `collate` need not copy them.

    Args:
        arrays: The batch, as `collate` has it.
        sizes: Frames of each item.
    """

    def __init__(self, arrays: dict[str, Any], sizes: Sequence[int]) -> None:
        self.arrays, self.sizes = arrays, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: Any) -> Any:
        item = {key: values[number] for key, values in self.arrays.items()}
        return item | {key: item[key][: self.sizes[number]] for key in _PADDED}


class _BytesColumn:
    """Rows of a column of bytes, as arrays that share the memory of the Arrow table.

    Args:
        column: Every row holds whole frames.
        rows: Those that are read.
        dtype: Of the numbers.
        shape: Of a frame.
    """

    def __init__(self, column: pa.ChunkedArray, rows: np.ndarray, dtype: Any, shape: tuple[int, ...] = ()) -> None:
        self.shape = shape
        width = math.prod(shape) * np.dtype(dtype).itemsize
        ends, chunk_of, self._chunks = [], [], []
        for number, chunk in enumerate(column.chunks):
            _, offsets, data = chunk.buffers()
            ends.append(np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1] // width)
            chunk_of.append(np.full(len(chunk), number))
            frames = len(data) // width if data else 0
            self._chunks.append(np.frombuffer(data or b"", dtype, frames * math.prod(shape)).reshape(frames, *shape))
        self._starts = np.concatenate([own[:-1] for own in ends])[rows]
        self.lengths = np.concatenate([np.diff(own) for own in ends])[rows]
        self._chunk_of = np.concatenate(chunk_of)[rows]

    def read(self, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """`counts` frames of each row from `starts` on: (count, *shape), read-only."""
        first = self._starts[rows] + starts
        places = zip(self._chunk_of[rows].tolist(), first.tolist(), (first + counts).tolist(), strict=True)
        return [self._chunks[chunk][begin:end] for chunk, begin, end in places]


def _cache_rows(files: list[str], dataset: PoseDataset) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from dataset._rows_of(file)


def _checksum(poses: np.ndarray, mask: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(mask).data, zlib.crc32(np.ascontiguousarray(poses).data))


def _remove(folder: Path) -> None:
    """Removes a folder, at once for everyone who looks; another process may do the same."""
    gone = folder.with_name(f".{folder.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


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
        for place, _, names in walk_folders(folder)
        for name in names
        if name.endswith(tuple(extensions)) and not name.startswith(".")
    ]
    if not files:
        raise PoseDataError(f"{folder} is empty: there are no {' or '.join(extensions)} files in it.")
    return sorted(files)


def check_resampling(
    path: FilePath, feature_extractor: PoseFeatureExtractor, sequences: Sequence[PoseSequence]
) -> None:
    """Raises `PoseFileError` when a sequence of a file would become far too long at the model's frame rate."""
    for sequence in sequences:
        try:
            feature_extractor.resampled_length(len(sequence.poses), sequence.fps)
        except ValueError as error:
            raise PoseFileError(path, str(error)) from None


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


def fit_length(values: np.ndarray, length: int) -> np.ndarray:
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
    if isinstance(items, _Joined):
        batch = items.arrays
    else:
        length = max(len(item["input_values"]) for item in items)
        batch = {}
        for key, first in items[0].items():
            values = [item[key] for item in items]
            if key in _PADDED:
                values = [value if len(value) == length else fit_length(value, length) for value in values]
            batch[key] = values if isinstance(first, str) else np.stack(values)
    return {key: values if isinstance(values, list) else torch.from_numpy(values) for key, values in batch.items()}
