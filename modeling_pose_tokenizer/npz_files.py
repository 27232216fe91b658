"""npz and npy files: one sequence, or many in a packed shard.

Every array is checked by its header before its data is loaded. Letters: T frames, N keypoints, D values per keypoint
(confidence last).
"""

import errno
import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .sequences import (
    LIMITS,
    FilePath,
    Limits,
    PoseFileError,
    PoseSequence,
    ReadOptions,
    check_poses,
    check_size,
    first_line,
    make_sequence,
    one_sentence,
    replacing,
)

_MAX_DEFLATE = 1040  # bytes that a byte can become
_MAX_HEADER = 10_000  # bytes of an array's header, as numpy has it


def read_npz(
    path: FilePath,
    *,
    num_keypoints: int | None = None,
    keypoint_dim: int | None = None,
    max_bytes: int = LIMITS.array_bytes,
) -> list[PoseSequence]:
    """Reads one sequence, or all sequences of a packed shard.

    A file of one sequence holds `poses` (T, N, D), optionally `mask` (T,) and `fps`; its id is the file's name. A
    shard of M sequences holds `poses` and `mask` of all frames, `offsets` (M + 1,), `ids` (M,) and `fps` (M,).

    Args:
        path: The npz file.
        num_keypoints: Expected N, or None for any.
        keypoint_dim: Expected D, or None for any.
        max_bytes: Largest array that is loaded.

    Raises:
        PoseFileError: The file is broken or holds something else.
    """
    return _read_sequences(path, num_keypoints, keypoint_dim, Limits(max_bytes))


def read_npz_within(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads an npz file as `read_npz` does, given what is wanted."""
    return _read_sequences(path, options.num_keypoints, options.keypoint_dim, options.limits)


def _read_sequences(
    path: FilePath, num_keypoints: int | None, keypoint_dim: int | None, limits: Limits
) -> list[PoseSequence]:
    arrays = read_arrays(path, ("poses", "mask", "fps", "offsets", "ids"), limits)
    poses, mask, fps = arrays["poses"], arrays.get("mask"), arrays.get("fps")
    expected = {"num_keypoints": num_keypoints, "keypoint_dim": keypoint_dim}
    if "offsets" not in arrays:
        return [make_sequence(path, Path(path).stem, poses, mask, fps, **expected)]
    check_poses(path, poses, num_keypoints, keypoint_dim)
    offsets, ids = _check_index(path, arrays)
    if mask is not None and mask.shape != (len(poses),):
        raise PoseFileError(path, f"mask has shape {mask.shape}, expected ({len(poses)},), one value per frame")
    if fps is not None and fps.shape not in ((), (len(ids),)):
        raise PoseFileError(path, f"fps has shape {fps.shape}, expected ({len(ids)},), one value per sequence")
    rates = [None] * len(ids) if fps is None else np.broadcast_to(fps, len(ids))
    return [
        make_sequence(path, id, poses[start:stop], None if mask is None else mask[start:stop], rate, **expected)
        for id, start, stop, rate in zip(ids, offsets[:-1], offsets[1:], rates, strict=True)
    ]


def check_npz(path: FilePath, *, num_keypoints: int | None = None, keypoint_dim: int | None = None) -> list[str]:
    """Checks all that can be known of an npz file without loading its poses.

    Returns:
        The ids of its sequences.

    Raises:
        PoseFileError: The file cannot be read or holds something else.
    """
    arrays = read_arrays(path, ("poses", "offsets", "ids"), LIMITS, header_only=("poses",))
    check_poses(path, arrays["poses"], num_keypoints, keypoint_dim)
    return _check_index(path, arrays)[1] if "offsets" in arrays else [Path(path).stem]


def _check_index(path: FilePath, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Offsets (M + 1,) and M ids of a packed shard."""
    offsets, num_frames = arrays["offsets"], len(arrays["poses"])
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype.kind not in "iu":
        raise PoseFileError(
            path, f"offsets have shape {offsets.shape} and dtype {offsets.dtype}, expected at least 2 whole numbers"
        )
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != num_frames or (np.diff(offsets) < 1).any():
        raise PoseFileError(path, f"offsets do not rise from 0 to {num_frames}, the number of frames that poses have")
    count = len(offsets) - 1
    if "ids" not in arrays:
        return offsets, [f"{Path(path).stem}_{index:06d}" for index in range(count)]
    ids = arrays["ids"]
    if ids.shape != (count,) or ids.dtype.kind != "U":
        raise PoseFileError(path, f"ids have shape {ids.shape} and dtype {ids.dtype}, expected {count} texts")
    if len(set(ids.tolist())) < count:
        raise PoseFileError(path, "ids name two sequences alike, expected unique names")
    return offsets, ids.tolist()


def names_in_npz(path: FilePath) -> set[str]:
    """Names of the arrays in an npz file; none where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # whoever reads the arrays says what is wrong
        return set()


def read_arrays(
    path: FilePath,
    keys: Sequence[str],
    limits: Limits,
    header_only: Sequence[str] = (),
    required: Sequence[str] = ("poses",),
) -> dict[str, np.ndarray]:
    """The arrays of an npz file that are among `keys`. Those in `header_only` come without data.

    Raises:
        PoseFileError: The file is broken, lacks one of the `required` arrays, or asks for more than the limits.
    """
    check_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(names) < len(archive.infolist()):
                raise PoseFileError(path, "holds two arrays of one name, expected unique names")
            lacking = [key for key in required if key not in names]
            if lacking:
                found = ", ".join(sorted(names)[:8]) or "nothing"
                raise PoseFileError(path, f"holds no array named {lacking[0]}, only {found}")
            return {
                key: _read_member(path, archive, names[key], limits, key not in header_only)
                for key in keys
                if key in names
            }
    except PoseFileError:
        raise
    except zipfile.BadZipFile as error:
        raise PoseFileError(path, f"is not an npz file, or a truncated one ({first_line(error)})") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # its directory points before its beginning
            raise PoseFileError(path, "is not an npz file, or a truncated one (its directory is wrong)") from None
        raise PoseFileError(path, f"cannot be read ({error.strerror or first_line(error)})") from None
    # Broken bytes surface as a dozen types (zlib.error, EOFError, SyntaxError, MemoryError ...); none may stop a run.
    except Exception as error:
        raise PoseFileError(path, f"is broken ({type(error).__name__}: {first_line(error)})") from None


def _read_member(
    path: FilePath, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: Limits, load: bool
) -> np.ndarray:
    """Reads one member of an npz file."""
    most = 1 if info.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE
    held = min(info.file_size, info.compress_size * most)
    if info.header_offset + info.compress_size > os.path.getsize(path):
        held = 0
    key = info.filename.removesuffix(".npy")
    with archive.open(info) as stream:
        shape, dtype = _read_header(path, key, stream, held, info.compress_size, limits)
    if not load:
        return np.broadcast_to(np.zeros((), dtype), shape)
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _read_header(
    path: FilePath, key: str, stream: IO[bytes], held: float, packed: int, limits: Limits
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, after its declared size has proved possible and its dtype harmless.

    `held` are the bytes that its data can have at most, `packed` those that it has in the file.
    """
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise PoseFileError(path, f"{key} has npy version {version}, expected plain numbers or text")
    first = version == (1, 0)
    prefix = stream.read(2 if first else 4)
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER:  # numpy would read it first
        raise PoseFileError(path, f"{key} declares a header of {length} bytes, expected {_MAX_HEADER} at most")
    header = io.BytesIO(prefix + stream.read(length))
    read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(header)
    held -= len(np.lib.format.magic(*version)) + len(header.getvalue())
    if dtype.hasobject or dtype.kind not in "biufU":
        raise PoseFileError(path, f"{key} has dtype {dtype}, expected numbers")
    if min(shape, default=0) < 0:
        raise PoseFileError(path, f"{key} declares the shape {shape}, expected no negative length")
    declared = math.prod(shape) * dtype.itemsize
    if declared > held:
        raise PoseFileError(path, f"{key} declares {declared} bytes of data, more than the file holds")
    limits.check(path, key, declared, packed)
    return shape, dtype


def read_npy(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads an npy file of poses (T, N, D) with the confidence last; its id is the file's name.

    Raises:
        PoseFileError: The file is broken or holds something else.
    """
    size = check_size(path, options.limits.array_bytes)
    with one_sentence(path, "an npy file"), path.open("rb") as stream:
        _read_header(path, "the array", stream, size, size, options.limits)
        stream.seek(0)
        poses = np.lib.format.read_array(stream, allow_pickle=False)
    return [
        make_sequence(path, path.stem, poses, num_keypoints=options.num_keypoints, keypoint_dim=options.keypoint_dim)
    ]


def write_npz(path: FilePath, sequence: PoseSequence) -> None:
    """Writes one sequence; a file of this name is there whole or not at all. `read_npz` is the inverse."""
    arrays = {"poses": sequence.poses, "mask": sequence.mask}
    if sequence.fps is not None:
        arrays["fps"] = np.array(sequence.fps, np.float32)
    _save(path, arrays)


def write_shard(path: FilePath, sequences: Sequence[PoseSequence]) -> None:
    """Writes sequences of one layout to a packed shard; `read_npz` is the inverse."""
    lengths = [len(sequence.poses) for sequence in sequences]
    arrays = {
        "poses": np.concatenate([sequence.poses for sequence in sequences]),
        "mask": np.concatenate([sequence.mask for sequence in sequences]),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "ids": np.array([sequence.id for sequence in sequences], dtype=np.str_),
        "fps": np.array([math.nan if sequence.fps is None else sequence.fps for sequence in sequences], np.float32),
    }
    _save(path, arrays)


def _save(path: FilePath, arrays: dict[str, Any]) -> None:
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
