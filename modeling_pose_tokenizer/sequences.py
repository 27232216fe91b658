"""Pose sequences as files hold them: the checks every reader passes through, its errors, and its limits.

Letters: T frames, N keypoints, D values per keypoint (confidence last).
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .normalization_pose_tokenizer import interpolate
from .skeleton_pose_tokenizer import Skeleton, likely_layout

FilePath = str | os.PathLike[str]

# A position further away than this is no position but broken bytes, and its square would leave float32.
MAX_COORDINATE = 1e9
# Resampling makes frames of a rate: a lie of the file must not make millions of them.
MIN_FPS, MAX_FPS = 0.1, 10_000.0
_MAX_REASON = 400  # characters
_FRAMES_AT_ONCE = 4096


class PoseDataError(ValueError):
    """Pose data that cannot be used as a whole; `str` is one sentence with the path."""


class PoseFileError(ValueError):
    """A pose file that cannot be used; `str` is one sentence with its path.

    Args:
        path: The file.
        reason: What was found and what was expected.
    """

    def __init__(self, path: FilePath, reason: str) -> None:
        self.path = os.fspath(path)
        self.reason = one_line(reason)  # it may quote the file
        super().__init__(self.path, self.reason)  # as args, so that the error survives the way back from a worker

    def __str__(self) -> str:
        return f"{one_line(self.path, None)}: {self.reason}"


def one_line(text: str, limit: int | None = _MAX_REASON) -> str:
    """Text that a terminal can show: no line breaks, no control characters, not longer than `limit`."""
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if limit is None or len(text) <= limit else f"{text[: limit - 4]} ..."


def check_rejected(folder: FilePath, rejected: Sequence[dict[str, str]], num_files: int, limit: float) -> None:
    """Raises `PoseDataError` when more than the share `limit` of the files of a folder had to be left out."""
    if len(rejected) > limit * num_files:
        raise PoseDataError(
            f"{len(rejected)} of {num_files} files in {os.fspath(folder)} cannot be used, more than {limit:.0%}; "
            f"the first is {rejected[0]['path']}: {rejected[0]['reason']}."
        )


def walk_folders(top: FilePath) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that follows links to folders, each folder once, so that a link that leads back is no endless tree."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield os.fspath(folder), folders, names


def write_rejected(folder: FilePath, rejected: Sequence[dict[str, str]]) -> None:
    """Writes `rejected.jsonl` into a folder: one line (path, reason) for each file that was left out."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    with replacing(Path(folder) / "rejected.jsonl") as temporary:
        # A name that is no UTF-8 holds surrogates, which a backslash makes JSON of.
        temporary.write_text(lines, encoding="utf-8", errors="backslashreplace")


@dataclass
class PoseSequence:
    """One sequence as files hold it.

    Attributes:
        id: Name of the sequence, unique within a data folder.
        poses: (T, N, D) float32 raw coordinates, confidence last; a missing keypoint is all zeros.
        mask: (T,) bool, True on valid frames.
        fps: Frames per second, or None where the file does not say.
    """

    id: str
    poses: np.ndarray
    mask: np.ndarray
    fps: float | None = None


def make_sequence(
    path: FilePath,
    id: str,
    poses: np.ndarray,
    mask: np.ndarray | None = None,
    fps: Any = None,
    *,
    num_keypoints: int | None = None,
    keypoint_dim: int | None = None,
) -> PoseSequence:
    """Checks what a file holds and makes a sequence of it.

    Args:
        path: Where the data comes from, for messages.
        id: Name of the sequence.
        poses: (T, N, D) numbers. A keypoint with a NaN or infinite value (in float32) becomes a missing one.
        mask: (T,) of valid frames; None means all.
        fps: Frames per second, a scalar or an array of one; None or NaN means unknown.
        num_keypoints: Expected N, or None for any.
        keypoint_dim: Expected D, or None for any.

    Raises:
        PoseFileError: Something of it cannot be used.
    """
    poses = np.asarray(poses)
    check_poses(path, poses, num_keypoints, keypoint_dim)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, hence missing
        poses = poses.astype(np.float32, copy=False)
    if not (poses.max() <= MAX_COORDINATE and poses.min() >= -MAX_COORDINATE):  # or NaN
        poses = _without_broken(path, poses)
    num_frames = len(poses)
    mask = _check_mask(path, mask, num_frames)
    if not mask.any():
        raise PoseFileError(path, f"all {num_frames} frames are masked, expected at least 1 valid one")
    if not (poses[..., -1].max(1)[mask] > 0).any():
        raise PoseFileError(path, "no keypoint has a confidence above 0 on a valid frame, expected at least one")
    return PoseSequence(id, poses, mask, _check_fps(path, fps))


def _without_broken(path: FilePath, poses: np.ndarray) -> np.ndarray:
    """(T, N, D) with zeros for keypoints that have NaN or infinity; coordinates that are too far are an error."""
    broken = ~np.isfinite(poses).all(-1)  # (T, N)
    with np.errstate(invalid="ignore"):
        far = (np.abs(poses[..., :-1]) > MAX_COORDINATE).any(-1) & ~broken
    seen = far & (poses[..., -1] > 0)
    if seen.any():
        frame, keypoint = np.argwhere(seen)[0]
        value = np.abs(poses[frame, keypoint, :-1]).max()
        raise PoseFileError(
            path, f"frame {frame} has the coordinate {value:.4g}, expected {MAX_COORDINATE:.0e} at most"
        )
    return np.where((broken | far)[..., None], np.float32(0), poses)


def check_poses(path: FilePath, poses: np.ndarray, num_keypoints: int | None, keypoint_dim: int | None) -> None:
    """Raises `PoseFileError` unless poses are numbers of shape (T, N, D), of the N and D that are expected."""
    if poses.dtype.kind not in "fiu":
        raise PoseFileError(path, f"poses have dtype {poses.dtype}, expected numbers")
    if poses.ndim != 3:
        raise PoseFileError(path, f"poses have shape {poses.shape}, expected 3 axes (frames, keypoints, values)")
    frames, keypoints, values = poses.shape
    if num_keypoints is not None and keypoints != num_keypoints:
        hint = likely_layout(keypoints)
        raise PoseFileError(path, f"poses have {keypoints} keypoints, expected {num_keypoints}{hint}")
    if keypoint_dim is not None and values != keypoint_dim:
        raise PoseFileError(path, f"poses have {values} values per keypoint, expected {keypoint_dim}")
    if keypoints == 0 or values < 3:
        raise PoseFileError(path, f"poses have shape {poses.shape}, expected keypoints of x, y[, z], confidence")
    if frames == 0:
        raise PoseFileError(path, "poses have 0 frames, expected at least 1")


def _check_mask(path: FilePath, mask: np.ndarray | None, num_frames: int) -> np.ndarray:
    if mask is None:
        return np.ones(num_frames, dtype=bool)
    mask = np.asarray(mask)
    if mask.shape != (num_frames,):
        raise PoseFileError(path, f"mask has shape {mask.shape}, expected ({num_frames},), one value per frame")
    if mask.dtype.kind not in "biuf":
        raise PoseFileError(path, f"mask has dtype {mask.dtype}, expected bool")
    return np.nan_to_num(mask).astype(bool)


def _check_fps(path: FilePath, fps: Any) -> float | None:
    if fps is None:
        return None
    fps = np.asarray(fps)
    if fps.size != 1 or fps.dtype.kind not in "fiu":
        raise PoseFileError(path, f"fps has shape {fps.shape} and dtype {fps.dtype}, expected one number")
    value = float(fps.reshape(()))
    if math.isnan(value):
        return None
    if not MIN_FPS <= value <= MAX_FPS:
        raise PoseFileError(path, f"fps is {value}, expected a number from {MIN_FPS:g} to {MAX_FPS:g}")
    return value


def nearest_frames(times: np.ndarray, num_frames: int) -> np.ndarray:
    """The frame nearest to each time (in frames), of a sequence that is held past its end."""
    return np.minimum(np.floor(times + 0.5).astype(np.int64), num_frames - 1)


def sample_frames(poses: np.ndarray, mask: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses between frames, by linear interpolation; where a keypoint is missing, the nearest frame decides.

    Args:
        poses: (T, N, D).
        mask: (T,) of valid frames.
        times: (T',) in frames of the poses, from 0 on.

    Returns:
        Poses (T', N, D), and mask (T',): a new frame is as valid as the one nearest to it.
    """
    sampled = np.empty((len(times), *poses.shape[1:]), poses.dtype)
    for start in range(0, len(times), _FRAMES_AT_ONCE):  # in float64, of which few are in memory at a time
        own = times[start : start + _FRAMES_AT_ONCE]
        first = min(int(own[0]), len(poses) - 1)
        part = poses[first : math.floor(own[-1]) + 2]
        points, confidence, _ = interpolate(part[..., :-1], part[..., -1], part[..., -1] > 0, own - first)
        sampled[start : start + len(own), :, :-1] = points
        sampled[start : start + len(own), :, -1] = confidence
    return sampled, mask[nearest_frames(times, len(mask))]


# ---- limits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How much one file may ask for, checked before it is loaded.

    Bytes are declared by the file itself: without limits a few kilobytes of well-compressed zeros could ask for all
    memory.

    Attributes:
        array_bytes: Largest array, in bytes. It holds for parquet tables and binary files as a whole.
        text_bytes: Largest text file or pickle, in bytes; a parsed one takes some ten times as much memory.
        ratio: Most bytes of data per byte that the file has for them, where they are more than 16 MiB. Deflate reaches
            1040 on zeros, poses seldom 20.
    """

    array_bytes: int = 4 * 2**30
    text_bytes: int = 2**28
    ratio: float = 200.0

    def check(self, path: FilePath, what: str, declared: float, held: float) -> None:
        """Raises `PoseFileError` when `declared` bytes of data, for which a file holds `held`, are too many."""
        if declared > self.array_bytes:
            raise PoseFileError(
                path, f"{what} declares {declared:.0f} bytes of data, more than the limit of {self.array_bytes}"
            )
        if declared > max(held * self.ratio, _HARMLESS_BYTES):
            raise PoseFileError(
                path,
                f"{what} declares {declared:.0f} bytes of data in {held:.0f}, more than the limit of {self.ratio:g} "
                "for each",
            )


LIMITS = Limits()
# Masks and silence compress as well as bombs do; so little harms nobody.
_HARMLESS_BYTES = 2**24


def check_size(path: FilePath, max_bytes: float = math.inf) -> int:
    """The size of a file, in bytes.

    Raises:
        PoseFileError: It cannot be read, is no file, or is larger than `max_bytes`.
    """
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise PoseFileError(path, f"cannot be read ({error.strerror or first_line(error)})") from None
    if not os.path.isfile(path):  # a pipe or a device would never end
        raise PoseFileError(path, "cannot be read (is no regular file)")
    if size > max_bytes:
        raise PoseFileError(path, f"has {size} bytes, more than the limit of {max_bytes}")
    return size


@contextmanager
def one_sentence(path: FilePath, kind: str) -> Iterator[None]:
    """Turns whatever a library makes of broken bytes into a `PoseFileError`: the file is not of `kind`, or broken."""
    try:
        yield
    except (PoseFileError, ImportError):
        raise
    except OSError as error:
        raise PoseFileError(path, f"cannot be read ({error.strerror or first_line(error)})") from None
    # Broken bytes surface as a dozen types (zlib.error, EOFError, SyntaxError, MemoryError ...); none may stop a run.
    except Exception as error:
        raise PoseFileError(path, f"is not {kind}, or broken ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` once what is written there is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- several people -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadOptions:
    """What is wanted of a file.

    Attributes:
        layout: Layout to bring the sequence into, or None for the file's own.
        keypoint_dim: Expected D, or None for what the file has.
        person: Number of the person to read, from 0 on, or None for the most complete one.
        limits: How much the file may ask for.
    """

    layout: Skeleton | None = None
    keypoint_dim: int | None = None
    person: int | None = None
    limits: Limits = LIMITS

    @property
    def num_keypoints(self) -> int | None:
        """Expected N, or None for any."""
        return self.layout.num_keypoints if self.layout else None


def choose_person(path: FilePath, confidence: np.ndarray, person: int | None) -> int:
    """The person asked for, or the one of whom most keypoints are seen over all frames; the first of equals.

    Args:
        path: The file, for messages.
        confidence: (people, T, N).
        person: The person asked for, from 0 on, or None.

    Raises:
        PoseFileError: There is no such person, or none at all.
    """
    people = len(confidence)
    if people == 0:
        raise PoseFileError(path, "holds no person, expected at least 1")
    if person is None:
        return int(np.argmax((confidence > 0).sum((1, 2))))
    if not 0 <= person < people:
        raise PoseFileError(path, f"holds {people} people, expected one numbered {person} (they count from 0)")
    return person


def place_keypoints(path: FilePath, names: Sequence[str], poses: np.ndarray, layout: Skeleton | None) -> np.ndarray:
    """Brings keypoints into a layout by their names.

    Args:
        path: The file, for messages.
        names: The names of its K keypoints.
        poses: (T, K, D).
        layout: The layout wanted, or None to leave them as they are.

    Returns:
        (T, N, D).

    Raises:
        PoseFileError: The file lacks keypoints of the layout.
    """
    if layout is None or tuple(names) == layout.keypoint_names:
        return poses
    place = {name: index for index, name in enumerate(names)}
    lacking = [name for name in layout.keypoint_names if name not in place]
    if lacking:
        raise PoseFileError(
            path,
            f"has {len(names)} keypoints, but lacks {len(lacking)} of the {layout.num_keypoints} of "
            f"{layout.name or 'the layout'}, the first is {lacking[0]}{likely_layout(len(names))}",
        )
    return poses[:, [place[name] for name in layout.keypoint_names]]
