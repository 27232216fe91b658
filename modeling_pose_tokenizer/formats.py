"""Pose files: npz with one sequence or many (packed shards), and `.pose` files of MediaPipe Holistic.

Every file is checked before its data is loaded, since files come from anywhere; what is wrong with one is a
`PoseFileError`, one sentence with its path. Letters: T frames, N keypoints, D values per keypoint (confidence last).
"""

import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .normalization_pose_tokenizer import interpolate
from .skeleton_pose_tokenizer import Skeleton, get_skeleton

# Largest array that is read from one file. Bytes are declared by the file itself: without a limit a few kilobytes of
# well-compressed zeros could ask for all memory.
MAX_ARRAY_BYTES = 4 * 2**30
# Deflate never compresses better than this, so a member that claims more does not hold what it declares.
_MAX_DEFLATE_RATIO = 1040

FilePath = str | os.PathLike[str]


class PoseDataError(ValueError):
    """Pose data that cannot be used as a whole; `str` is one sentence with the path."""


class PoseFileError(ValueError):
    """A pose file that cannot be used; `str` is one sentence with its path.

    Args:
        path: The file.
        reason: What was found and what was expected.
    """

    def __init__(self, path: FilePath, reason: str) -> None:
        super().__init__(os.fspath(path), reason)  # as args, so that the error survives the way back from a worker
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def check_rejected(folder: FilePath, rejected: Sequence[dict[str, str]], num_files: int, limit: float) -> None:
    """Raises `PoseDataError` when more than the share `limit` of the files of a folder had to be left out."""
    if len(rejected) > limit * num_files:
        raise PoseDataError(
            f"{len(rejected)} of {num_files} files in {os.fspath(folder)} cannot be used, more than {limit:.0%}; "
            f"the first is {rejected[0]['path']}: {rejected[0]['reason']}."
        )


def write_rejected(folder: FilePath, rejected: Sequence[dict[str, str]]) -> None:
    """Writes `rejected.jsonl` into a folder: one line (path, reason) for each file that was left out."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    with _replacing(Path(folder) / "rejected.jsonl") as temporary:
        temporary.write_text(lines, encoding="utf-8")


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
        poses: (T, N, D) numbers. A keypoint with a NaN or infinite value becomes a missing one.
        mask: (T,) of valid frames; None means all.
        fps: Frames per second, a scalar or an array of one; None or NaN means unknown.
        num_keypoints: Expected N, or None for any.
        keypoint_dim: Expected D, or None for any.

    Raises:
        PoseFileError: Something of it cannot be used.
    """
    poses = np.asarray(poses)
    _check_poses(path, poses, num_keypoints, keypoint_dim)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, hence missing
        poses = poses.astype(np.float32, copy=False)
    broken = ~np.isfinite(poses).all(-1)  # (T, N)
    if broken.any():
        poses = np.where(broken[..., None], np.float32(0), poses)
    num_frames = len(poses)
    mask = _check_mask(path, mask, num_frames)
    if not mask.any():
        raise PoseFileError(path, f"all {num_frames} frames are masked, expected at least 1 valid one")
    if not (poses[mask, :, -1] > 0).any():
        raise PoseFileError(path, "no keypoint has a confidence above 0 on a valid frame, expected at least one")
    return PoseSequence(id, poses, mask, _check_fps(path, fps))


def _check_poses(path: FilePath, poses: np.ndarray, num_keypoints: int | None, keypoint_dim: int | None) -> None:
    if poses.dtype.kind not in "fiu":
        raise PoseFileError(path, f"poses have dtype {poses.dtype}, expected numbers")
    if poses.ndim != 3:
        raise PoseFileError(path, f"poses have shape {poses.shape}, expected 3 axes (frames, keypoints, values)")
    frames, keypoints, values = poses.shape
    if num_keypoints is not None and keypoints != num_keypoints:
        raise PoseFileError(path, f"poses have {keypoints} keypoints, expected {num_keypoints}")
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
    if not 0 < value < math.inf:
        raise PoseFileError(path, f"fps is {value}, expected a positive number")
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
    confidence = poses[..., -1]
    points, confidence, _ = interpolate(poses[..., :-1], confidence, confidence > 0, times)
    sampled = np.concatenate([points, confidence[..., None]], -1).astype(poses.dtype)
    return sampled, mask[nearest_frames(times, len(mask))]


# ---- npz ------------------------------------------------------------------------------------------------------------


def read_npz(
    path: FilePath,
    *,
    num_keypoints: int | None = None,
    keypoint_dim: int | None = None,
    max_bytes: int = MAX_ARRAY_BYTES,
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
    arrays = _read_arrays(path, ("poses", "mask", "fps", "offsets", "ids"), max_bytes)
    poses, mask, fps = arrays["poses"], arrays.get("mask"), arrays.get("fps")
    expected = {"num_keypoints": num_keypoints, "keypoint_dim": keypoint_dim}
    if "offsets" not in arrays:
        return [make_sequence(path, Path(path).stem, poses, mask, fps, **expected)]
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
    arrays = _read_arrays(path, ("poses", "offsets", "ids"), MAX_ARRAY_BYTES, header_only=("poses",))
    _check_poses(path, arrays["poses"], num_keypoints, keypoint_dim)
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


def _read_arrays(
    path: FilePath, keys: Sequence[str], max_bytes: int, header_only: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of an npz file that are among `keys`; `poses` must be. Those in `header_only` come without data."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if "poses" not in names:
                found = ", ".join(sorted(names)[:8]) or "nothing"
                raise PoseFileError(path, f"holds no array named poses, only {found}")
            return {
                key: _read_array(path, archive, names[key], max_bytes, key not in header_only)
                for key in keys
                if key in names
            }
    except PoseFileError:
        raise
    except zipfile.BadZipFile as error:
        raise PoseFileError(path, f"is not an npz file, or a truncated one ({_first_line(error)})") from None
    except OSError as error:
        raise PoseFileError(path, f"cannot be read ({error.strerror or _first_line(error)})") from None
    # Broken bytes surface as a dozen types (zlib.error, EOFError, SyntaxError, MemoryError ...); none may stop a run.
    except Exception as error:
        raise PoseFileError(path, f"is broken ({type(error).__name__}: {_first_line(error)})") from None


def _read_array(
    path: FilePath, archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int, load: bool
) -> np.ndarray:
    """Reads one member of an npz file, after its declared size has proved possible and its dtype harmless."""
    key = info.filename.removesuffix(".npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise PoseFileError(path, f"{key} has npy version {version}, expected plain numbers or text")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        header_bytes = stream.tell()
    if dtype.hasobject or dtype.kind not in "biufU":
        raise PoseFileError(path, f"{key} has dtype {dtype}, expected numbers")
    if min(shape, default=0) < 0:
        raise PoseFileError(path, f"{key} declares the shape {shape}, expected no negative length")
    declared = math.prod(shape) * dtype.itemsize
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE_RATIO
    end = info.header_offset + info.compress_size
    held = min(info.file_size, info.compress_size * ratio) - header_bytes
    if declared > held or end > os.path.getsize(path):
        raise PoseFileError(path, f"{key} declares {declared} bytes of data, more than the file holds")
    if declared > max_bytes:
        raise PoseFileError(path, f"{key} declares {declared} bytes of data, more than the limit of {max_bytes}")
    if not load:
        return np.broadcast_to(np.zeros((), dtype), shape)
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


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
    with _replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` once what is written there is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- .pose ----------------------------------------------------------------------------------------------------------

# MediaPipe's face mesh vertices nearest to the 68 points of iBUG-300W, in their order.
_IBUG_MESH_POINTS = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),  # jaw
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301),  # brows
    *(168, 197, 5, 4, 75, 97, 2, 326, 305),  # nose
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer lips
    *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lips
)
_NEEDS_POSE_FORMAT = ".pose files need pose-format: pip install 'pose-tokenizer[formats]'"
_MAX_POSE_SIZE = 2**16 - 1  # of a picture: the header has two bytes for it
# Red, green and blue of the limbs of each component, for viewers.
_COLORS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167))
# Layouts that MediaPipe Holistic converts to -> mesh vertex of each face keypoint, None where the name holds it.
_HOLISTIC_LAYOUTS: dict[str, tuple[int, ...] | None] = {
    "coco_wholebody_133": _IBUG_MESH_POINTS,
    "mediapipe_holistic_543": None,
    "mediapipe_holistic_178": None,
}
_HAND_POINTS = (
    "WRIST",
    *(f"THUMB_{joint}" for joint in ("CMC", "MCP", "IP", "TIP")),
    *(
        f"{finger}_{joint}"
        for finger in ("INDEX_FINGER", "MIDDLE_FINGER", "RING_FINGER", "PINKY")
        for joint in ("MCP", "PIP", "DIP", "TIP")
    ),
)
_BODY_POINTS = {"left_big_toe": "LEFT_FOOT_INDEX", "right_big_toe": "RIGHT_FOOT_INDEX"}


@cache
def _holistic_points(layout: str) -> tuple[tuple[str, str], ...]:
    """For each keypoint of a layout, the (component, point) of a `.pose` file of MediaPipe Holistic that it is."""
    mesh_points = _HOLISTIC_LAYOUTS[layout]
    hand_points = {"left": iter(_HAND_POINTS), "right": iter(_HAND_POINTS)}  # the same order in every layout
    points = []
    for name in get_skeleton(layout).keypoint_names:
        side, of_hand, _ = name.partition("_hand_")
        if of_hand:
            points.append((f"{side.upper()}_HAND_LANDMARKS", next(hand_points[side])))
        elif name.startswith("face_"):
            number = int(name.removeprefix("face_"))
            points.append(("FACE_LANDMARKS", str(mesh_points[number] if mesh_points else number)))
        else:
            points.append(("POSE_LANDMARKS", _BODY_POINTS.get(name, name.upper())))
    return tuple(points)


def read_pose(path: FilePath, layout: str = "coco_wholebody_133", keypoint_dim: int = 3) -> PoseSequence:
    """Reads a `.pose` file of MediaPipe Holistic and brings it into a layout. Needs the package pose-format.

    The body comes from the pose landmarks (confidence: their visibility), the face from the vertices of the face mesh
    that lie nearest to the layout's points, the hands as they are. What Holistic lacks (the small toes), and what was
    cut from the file, is missing: confidence 0. Of several people the first is read. Left and right are the signer's.

    Args:
        path: The `.pose` file.
        layout: `coco_wholebody_133`, `mediapipe_holistic_543` or `mediapipe_holistic_178`.
        keypoint_dim: D: 3 for x, y, confidence; 4 with Holistic's rough z.

    Raises:
        PoseFileError: The file is broken or not of MediaPipe Holistic.
        ValueError: Holistic does not convert to this layout.
        ImportError: pose-format is not installed.
    """
    if layout not in _HOLISTIC_LAYOUTS:
        raise ValueError(f"layout is {layout!r}, but .pose files convert to {', '.join(_HOLISTIC_LAYOUTS)}")
    try:
        from pose_format import Pose
    except ImportError:
        raise ImportError(_NEEDS_POSE_FORMAT) from None
    try:
        pose = Pose.read(Path(path).read_bytes())
        coordinates = np.asarray(pose.body.data.data[:, 0], dtype=np.float32)  # (T, points, 3)
        confidence = np.asarray(pose.body.confidence[:, 0], dtype=np.float32)  # (T, points)
    except OSError as error:
        raise PoseFileError(path, f"cannot be read ({error.strerror or _first_line(error)})") from None
    except Exception as error:  # pose-format has no error of its own: broken bytes surface as many types
        raise PoseFileError(path, f"is not a .pose file, or broken ({_first_line(error)})") from None
    points = [(component.name, point) for component in pose.header.components for point in component.points]
    place = {point: index for index, point in enumerate(points)}
    components = {component for component, _ in place}
    if "POSE_LANDMARKS" not in components or len(points) != coordinates.shape[1]:
        raise PoseFileError(path, f"holds {', '.join(sorted(components))}, expected MediaPipe Holistic")
    if coordinates.shape[2] < keypoint_dim - 1:
        raise PoseFileError(path, f"has {coordinates.shape[2]} coordinates per point, expected {keypoint_dim - 1}")
    sources = np.array([place.get(point, -1) for point in _holistic_points(layout)])  # (N,)
    values = np.concatenate([coordinates[..., : keypoint_dim - 1], confidence[..., None]], -1)
    poses = np.where(sources[:, None] >= 0, values[:, sources], np.float32(0))  # (T, N, D)
    poses = np.where(poses[..., -1:] > 0, poses, np.float32(0))
    return make_sequence(path, Path(path).stem, poses, poses[..., -1].max(1) > 0, pose.body.fps)


def write_pose(path: FilePath, sequence: PoseSequence, layout: Skeleton, size: tuple[int, int] | None = None) -> None:
    """Writes a `.pose` file; it is there whole or not at all. Needs the package pose-format.

    Keypoints of a layout that Holistic converts to go by Holistic's names, and `read_pose` is the inverse. Those of
    other layouts make a component for each token group, under their own names.

    Args:
        path: The file.
        sequence: One sequence with a frame rate. A frame that is masked has no keypoint.
        layout: The N keypoints.
        size: Width and height of the picture; None means as large as the coordinates need.

    Raises:
        ValueError: The sequence has no frame rate.
        ImportError: pose-format is not installed.
    """
    if sequence.fps is None:
        raise ValueError(f"{sequence.id} has no frame rate, which .pose files need.")
    try:
        from pose_format import Pose
        from pose_format.numpy import NumPyPoseBody
        from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions
    except ImportError:
        raise ImportError(_NEEDS_POSE_FORMAT) from None
    if layout.name in _HOLISTIC_LAYOUTS:
        points = _holistic_points(layout.name)
    else:
        group_of = {keypoint: group for group, own in layout.group_keypoints.items() for keypoint in own}
        points = tuple((group_of[number].upper(), name) for number, name in enumerate(layout.keypoint_names))
    members: dict[str, list[int]] = {}  # keypoints of each component, in the order of the layout
    for keypoint, (component, _) in enumerate(points):
        members.setdefault(component, []).append(keypoint)
    order = [keypoint for own in members.values() for keypoint in own]
    poses = np.where(sequence.mask[:, None, None], sequence.poses, np.float32(0))[:, None, order]  # (T, 1, N, D)
    if size is None:
        width, height = np.clip(np.ceil(poses[..., :2].max((0, 1, 2))), 1, _MAX_POSE_SIZE).astype(int).tolist()
        size = (width, height)
    components = []
    for (name, own), color in zip(members.items(), cycle(_COLORS), strict=False):
        place = {keypoint: number for number, keypoint in enumerate(own)}
        limbs = [(place[first], place[last]) for first, last in layout.edges if first in place and last in place]
        values = "XYZ"[: poses.shape[-1] - 1] + "C"
        names = [points[keypoint][1] for keypoint in own]
        components.append(PoseHeaderComponent(name, names, limbs, [color] * len(limbs), values))
    header = PoseHeader(0.2, PoseHeaderDimensions(*size), components)
    body = NumPyPoseBody(sequence.fps, poses[..., :-1], poses[..., -1])
    with _replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        Pose(header, body).write(file)
