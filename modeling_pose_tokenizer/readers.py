"""What pose estimators write: OpenPose, MediaPipe Holistic, MMPose and rtmlib, and the dictionaries of Uni-Sign.

A keypoint that was not found has confidence 0. Letters: T frames, N keypoints, D values per keypoint (confidence
last).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .npz_files import names_in_npz, read_arrays, read_npz_within
from .plain_pickle import read_plain_pickle
from .pose_files import HAND_POINTS, holistic_points, place_holistic
from .sequences import (
    FilePath,
    Limits,
    PoseFileError,
    PoseSequence,
    ReadOptions,
    check_size,
    choose_person,
    make_sequence,
    one_sentence,
    place_keypoints,
)
from .skeleton_pose_tokenizer import get_skeleton
from .tables import read_table

# Layouts whose keypoints estimators give without their names.
_LAYOUT_OF_COUNT = {133: "coco_wholebody_133", 17: "coco_17"}
_MAX_PEOPLE = 256  # in one frame

Frames = list[list[np.ndarray]]  # frame -> person -> (N, D)


def _read_json(path: Path, limits: Limits) -> Any:
    check_size(path, limits.text_bytes)
    with one_sentence(path, "a JSON file"):
        return json.loads(path.read_bytes())


def _numbers(values: Any, what: str) -> np.ndarray:
    """Values as float32; None is NaN.

    Raises:
        ValueError: Some are no numbers, for example text.
    """
    array = np.asarray(values)
    if array.dtype == object:
        array = np.asarray([np.nan if value is None else value for value in np.ravel(array)]).reshape(array.shape)
    if array.dtype.kind not in "fiu" and array.size:
        raise ValueError(f"{what} holds {array.dtype}, expected numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


# ---- several people -------------------------------------------------------------------------------------------------


def link_people(path: FilePath, frames: Frames, tracks: Sequence[Sequence[Any]] | None, limits: Limits) -> np.ndarray:
    """Follows people through frames that list them in any order.

    Those that have track numbers keep them. Otherwise each person goes on as the one seen nearest before, by the mean
    of the keypoints found, nearest pair first; who is left over is a new person.

    Args:
        path: The file, for messages.
        frames: Frame -> person -> (N, D) with the confidence last.
        tracks: Track numbers of the same form, or None.
        limits: How much may be asked for.

    Returns:
        (people, T, N, D), numbered as they appear, zeros where a person is not seen.
    """
    shapes = {person.shape for people in frames for person in people}
    if len(shapes) != 1:
        found = " and ".join(str(shape) for shape in sorted(shapes)[:2]) or "no person"
        raise PoseFileError(path, f"holds {found}, expected people of the same number of keypoints")
    most = max(map(len, frames))
    if most > _MAX_PEOPLE:
        raise PoseFileError(path, f"has {most} people in a frame, expected {_MAX_PEOPLE} at most")
    numbers: list[list[int]] = []
    centers: list[np.ndarray] = []  # where each person was seen last
    known: dict[Any, int] = {}
    for index, people in enumerate(frames):
        if tracks is not None:
            numbers.append([known.setdefault(track, len(known)) for track in tracks[index]])
            continue
        now = np.array([_center(person) for person in people]).reshape(-1, 2)
        numbers.append(_match(np.array(centers).reshape(-1, 2), now))
        for number, center in sorted(zip(numbers[-1], now, strict=True), key=lambda pair: pair[0]):
            centers[number : number + 1] = [center]
    count = 1 + max(number for own in numbers for number in own)
    shape = (count, len(frames), *next(iter(shapes)))
    held = sum(person.nbytes for people in frames for person in people)
    limits.check(path, f"{count} people in {len(frames)} frames", np.prod(shape, dtype=float) * 4, held)
    poses = np.zeros(shape, np.float32)
    for index, (own, people) in enumerate(zip(numbers, frames, strict=True)):
        for number, person in zip(own, people, strict=True):
            poses[number, index] = person
    return poses


def _center(person: np.ndarray) -> np.ndarray:
    """Mean x and y of the keypoints that are seen."""
    seen = person[person[:, -1] > 0, :2]
    if not len(seen):
        return np.zeros(2)
    with np.errstate(invalid="ignore"):  # infinite ones of both signs
        return np.clip(np.nan_to_num(seen.mean(0, dtype=np.float64)), -1e9, 1e9)


def _match(known: np.ndarray, found: np.ndarray) -> list[int]:
    """For each center found, (F, 2), the number of the known one it continues, (K, 2), or the next free number."""
    distance = np.linalg.norm(found[:, None] - known[None], axis=-1)  # (F, K)
    numbers = [-1] * len(found)
    for _ in range(min(distance.shape)):
        person, number = divmod(int(np.argmin(distance)), distance.shape[1])
        numbers[person] = number
        distance[person, :] = distance[:, number] = np.inf
    free = len(known)
    for person, number in enumerate(numbers):
        if number < 0:
            numbers[person], free = free, free + 1
    return numbers


def _make(
    path: Path,
    id: str,
    names: Sequence[str] | None,
    people: np.ndarray,
    options: ReadOptions,
    fps: Any = None,
) -> PoseSequence:
    """A sequence of one of the people, (people, T, N, D), in the layout wanted."""
    poses = people[choose_person(path, people[..., -1], options.person)]
    broken = ~np.isfinite(poses).all(-1, keepdims=True) | (poses[..., -1:] <= 0)
    poses = np.where(broken, np.float32(0), poses)
    if names is not None:
        poses = place_keypoints(path, names, poses, options.layout)
    mask = poses[..., -1].max(1, initial=0) > 0
    if not mask.any() and len(mask):
        raise PoseFileError(path, f"has no keypoint in any of {len(mask)} frames, expected at least one")
    return make_sequence(
        path, id, poses, mask, fps, num_keypoints=options.num_keypoints, keypoint_dim=options.keypoint_dim
    )


def _names(count: int) -> tuple[str, ...] | None:
    return get_skeleton(_LAYOUT_OF_COUNT[count]).keypoint_names if count in _LAYOUT_OF_COUNT else None


# ---- OpenPose -------------------------------------------------------------------------------------------------------

_OPENPOSE_FILE = re.compile(r"(.*?)_?(\d+)?_keypoints\.json")
_OPENPOSE_PARTS = {
    "pose_keypoints_2d": 25,
    "face_keypoints_2d": 70,
    "hand_left_keypoints_2d": 21,
    "hand_right_keypoints_2d": 21,
}


def is_openpose(path: Path, head: bytes) -> bool:
    """Whether a file is what OpenPose writes for a frame, or a folder holds such files."""
    if head:
        return b'"people"' in head and (b"_keypoints_2d" in head or b'"version"' in head)
    return path.is_dir() and any(_OPENPOSE_FILE.fullmatch(file.name) for file in path.iterdir())


def read_openpose(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads a folder that OpenPose wrote, a JSON file for each frame, or one such file.

    BODY_25, face and hands become `openpose_137`, or a layout whose keypoints are among its own. A part that was not
    asked for is missing. A folder is one sequence; one of several videos (names before the frame's number) has one for
    each. Frames come in the order of their numbers, people are followed as `link_people` says.

    Raises:
        PoseFileError: A file is broken or not OpenPose's.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in path.iterdir() if _OPENPOSE_FILE.fullmatch(file.name)]
        size = sum(check_size(file, options.limits.text_bytes) for file in files)
        if size > options.limits.text_bytes:
            raise PoseFileError(path, f"has {size} bytes, more than the limit of {options.limits.text_bytes}")
    keys = {file: _OPENPOSE_FILE.fullmatch(file.name) for file in files}
    order = {file: (key[1], int(key[2] or 0)) if key else ("", 0) for file, key in keys.items()}
    videos = groupby(sorted(files, key=order.__getitem__), key=lambda file: order[file][0])
    videos_of = {name: list(own) for name, own in videos}
    names = get_skeleton("openpose_137").keypoint_names
    sequences = []
    for name, own in videos_of.items():
        frames = [_openpose_frame(file, options.limits) for file in own]
        people = link_people(path, frames, None, options.limits)
        id = path.stem if len(videos_of) == 1 else f"{path.stem}/{name}"
        sequences.append(_make(path, id, names, people, options))
    return sequences


def _openpose_frame(path: Path, limits: Limits) -> list[np.ndarray]:
    """The people of a frame, (137, 3) each."""
    content = _read_json(path, limits)
    people = content.get("people") if isinstance(content, dict) else None
    if not isinstance(people, list) or not all(isinstance(person, dict) for person in people):
        raise PoseFileError(path, "holds no list of people, expected a frame of OpenPose")
    frame = []
    for person in people:
        parts = []
        for key, count in _OPENPOSE_PARTS.items():
            with one_sentence(path, "a frame of OpenPose"):
                values = _numbers(person.get(key) or [0] * 3 * count, key).reshape(-1)
            if values.size != 3 * count:
                raise PoseFileError(path, f"{key} has {values.size} numbers, expected {3 * count} (BODY_25)")
            parts.append(values.reshape(count, 3))
        frame.append(np.concatenate(parts))
    return frame


# ---- MediaPipe Holistic ---------------------------------------------------------------------------------------------

_BODY_POINTS = tuple(point for part, point in holistic_points("mediapipe_holistic_543") if part == "POSE_LANDMARKS")
_PARTS = {  # as JSON and tables name the parts of Holistic -> component, its points
    "pose": ("POSE_LANDMARKS", _BODY_POINTS),
    "face": ("FACE_LANDMARKS", tuple(map(str, range(478)))),
    "left_hand": ("LEFT_HAND_LANDMARKS", HAND_POINTS),
    "right_hand": ("RIGHT_HAND_LANDMARKS", HAND_POINTS),
}
_HOLISTIC = tuple((component, point) for component, points in _PARTS.values() for point in points)
_FIRST = {"pose": 0, "face": 33, "left_hand": 511, "right_hand": 532}  # of each part among those 553 points
_LANDMARKS = re.compile(r"(pose|face|left_?hand|right_?hand)(_?landmarks|_?keypoints)?", re.IGNORECASE)
_JSON_HEAD = re.compile(rb'"(pose|face|left_?hand|right_?hand)(_?landmarks)?"\s*:', re.IGNORECASE)


def is_mediapipe_json(path: Path, head: bytes) -> bool:
    """Whether a file is JSON with landmarks of MediaPipe Holistic."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") and bool(_JSON_HEAD.search(head))


def read_mediapipe_json(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads landmarks of MediaPipe Holistic: a list of frames, alone or as `frames` of an object that may hold `fps`.

    A frame is an object with `pose_landmarks`, `face_landmarks`, `left_hand_landmarks`, `right_hand_landmarks`
    (`poseLandmarks`, `pose` ... are the same), each null or a list of landmarks, which are objects of x, y, z and
    perhaps visibility, or lists of these. Confidence is the visibility where the body has one, and 1 otherwise.

    Raises:
        PoseFileError: The file is broken or holds something else.
    """
    content = _read_json(path, options.limits)
    size = path.stat().st_size
    fps = content.get("fps") if isinstance(content, dict) else None
    if isinstance(content, dict):
        content = next((content[key] for key in ("frames", "landmarks", "data") if key in content), [content])
    if not isinstance(content, list) or not all(isinstance(frame, dict) for frame in content):
        raise PoseFileError(path, "holds no list of frames, expected one object of landmarks for each")
    values = _empty(path, len(content), size, options.limits)
    values[:] = 0
    for index, frame in enumerate(content):
        frame = frame["landmarks"] if isinstance(frame.get("landmarks"), dict) else frame
        for key, landmarks in frame.items():
            named = _LANDMARKS.fullmatch(key)
            if named and landmarks:
                part = "_".join(re.findall("pose|face|left|right|hand", named[1].lower()))
                with one_sentence(path, "a file of MediaPipe Holistic"):
                    _fill_landmarks(values[index], part, landmarks, index)
    return [_make_holistic(path, path.stem, values, options, fps)]


def _fill_landmarks(frame: np.ndarray, part: str, landmarks: Any, number: int) -> None:
    """Writes the landmarks of a part into a frame of all points, (553, 4)."""
    if isinstance(landmarks, Mapping):
        landmarks = next(iter(landmarks.values()))
    if isinstance(landmarks[0], list) and landmarks[0] and isinstance(landmarks[0][0], list | Mapping):
        landmarks = landmarks[0]  # the first person of MediaPipe's tasks
    if isinstance(landmarks[0], Mapping):
        keys = ["x", "y", "z", *(key for key in ("visibility",) if part == "pose" and key in landmarks[0])]
        landmarks = [[landmark.get(key, 0.0 if key == "z" else None) for key in keys] for landmark in landmarks]
    points = _numbers(landmarks, f"{part} of frame {number}")
    first, limit = _FIRST[part], len(_PARTS[part][1])
    fits = len(points) in ((468, 478) if part == "face" else (limit,))
    if points.ndim != 2 or points.shape[1] not in (2, 3, 4) or not fits:
        raise ValueError(f"{part} of frame {number} has shape {points.shape}, expected ({limit}, 3)")
    own = frame[first : first + len(points)]
    own[:, : min(points.shape[1], 3)] = points[:, :3]
    own[:, 3] = points[:, 3] if points.shape[1] == 4 and part == "pose" else 1.0
    own[~np.isfinite(own).all(-1)] = 0.0


def _make_holistic(path: Path, id: str, values: np.ndarray, options: ReadOptions, fps: Any = None) -> PoseSequence:
    """A sequence of all points, (T, 553, 4), in the layout wanted."""
    if options.person:
        raise PoseFileError(path, f"holds 1 person, expected one numbered {options.person} (they count from 0)")
    if options.keypoint_dim != 4:
        values = values[..., [0, 1, 3]]
    poses = place_holistic(path, _HOLISTIC, values, options.layout)
    return _make(path, id, None, poses[None], options, fps)


_COLUMN = re.compile(r"(x|y|z|v|visibility)_(pose|face|left_hand|right_hand)_(\d{1,3})")
_LONG_COLUMNS = {"frame", "type", "landmark_index", "x", "y"}


def is_mediapipe_table(path: Path, head: bytes) -> bool:
    """Whether a file is CSV with landmarks of MediaPipe Holistic, by its first line."""
    columns = head.partition(b"\n")[0].decode("utf-8", "replace").strip("\ufeff\r ").replace('"', "").split(",")
    return set(columns) >= _LONG_COLUMNS or any(map(_COLUMN.fullmatch, columns[:1000]))


def is_parquet(path: Path, head: bytes) -> bool:
    """Whether a file begins as parquet does."""
    return head.startswith(b"PAR1")


def read_mediapipe_table(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads landmarks of MediaPipe Holistic from CSV or parquet (needs pyarrow), as Kaggle's competitions have them.

    Long: the columns frame, type (face, pose, left_hand, right_hand), landmark_index, x, y, z and a row for each
    landmark. Wide: the columns x_face_0, y_face_0 ... and a row for each frame. A column `sequence_id` tells several
    sequences apart. A landmark without numbers is missing; confidence is 1 otherwise, or the column visibility.

    Raises:
        PoseFileError: The file is broken or holds something else.
        ImportError: pyarrow is not installed.
    """
    columns = _read_table(path, options.limits)
    groups = columns.pop("sequence_id", None)
    size = sum(column.nbytes for column in columns.values())

    def empty(num_frames: int) -> np.ndarray:
        return _empty(path, num_frames, size, options.limits)

    with one_sentence(path, "a table of MediaPipe Holistic"):
        place = _place_long if "landmark_index" in columns else _place_wide
        if groups is None:
            return [_make_holistic(path, path.stem, place(columns, empty), options)]
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        sequences = []
        for number in np.argsort(first):
            own = {name: values[inverse == number] for name, values in columns.items()}
            id = f"{path.stem}/{groups[first[number]]}"
            sequences.append(_make_holistic(path, id, place(own, empty), options))
        return sequences


def _is_wanted(column: str) -> bool:
    return column in _LONG_COLUMNS or column in ("z", "visibility", "sequence_id") or bool(_COLUMN.fullmatch(column))


def _read_table(path: Path, limits: Limits) -> dict[str, np.ndarray]:
    """The columns that matter of a CSV or parquet file."""
    columns = read_table(path, limits, _is_wanted)
    if not columns.keys() >= _LONG_COLUMNS and not any(map(_COLUMN.fullmatch, columns)):
        found = ", ".join(list(columns)[:8]) or "none that matter"
        raise PoseFileError(
            path, f"has the columns {found}, expected frame, type, landmark_index, x, y or x_pose_0 ..."
        )
    return columns


def _empty(path: FilePath, num_frames: int, size: int, limits: Limits) -> np.ndarray:
    """All points of so many frames, (T, 553, 4), all NaN; the file has `size` bytes for them."""
    limits.check(path, f"{num_frames} frames", num_frames * len(_HOLISTIC) * 16, size)
    return np.full((num_frames, len(_HOLISTIC), 4), np.nan, np.float32)


def _place_long(columns: Mapping[str, np.ndarray], empty: Callable[[int], np.ndarray]) -> np.ndarray:
    """Rows of landmarks to all points, (T, 553, 4)."""
    frames, rows = np.unique(_numbers(columns["frame"], "frame"), return_inverse=True)
    order = {part: number for number, part in enumerate(_FIRST)}
    parts = np.array([order.get(part, -1) for part in columns["type"].tolist()], np.int64)
    if (parts < 0).any():
        raise ValueError(f"type is {columns['type'][parts.argmin()]}, expected {', '.join(_FIRST)}")
    index = _numbers(columns["landmark_index"], "landmark_index").astype(np.int64)
    if not ((index >= 0) & (index < np.array([len(_PARTS[part][1]) for part in _FIRST])[parts])).all():
        raise ValueError("landmark_index is out of range")
    points = np.array(list(_FIRST.values()))[parts] + index
    values = empty(len(frames))
    for axis, name in enumerate(("x", "y", "z", "visibility")):
        missing = 0.0 if name == "z" else 1.0
        values[rows, points, axis] = _numbers(columns[name], name) if name in columns else missing
    return _without_holes(values)


def _place_wide(columns: Mapping[str, np.ndarray], empty: Callable[[int], np.ndarray]) -> np.ndarray:
    """Rows of frames to all points, (T, 553, 4)."""
    values = empty(len(next(iter(columns.values()))))
    values[..., 2:] = 0.0, 1.0
    for name, column in columns.items():
        named = _COLUMN.fullmatch(name)
        if named:
            axis, part, number = "xyzv".index(named[1][0]), named[2], int(named[3])
            if number >= len(_PARTS[part][1]):
                raise ValueError(f"there is a column {name}, expected at most {len(_PARTS[part][1])} landmarks")
            values[:, _FIRST[part] + number, axis] = _numbers(column, name)
    order = np.argsort(_numbers(columns["frame"], "frame"), kind="stable") if "frame" in columns else slice(None)
    return _without_holes(values[order])


def _without_holes(values: np.ndarray) -> np.ndarray:
    """Zeros for each landmark that lacks a number."""
    return np.where(np.isfinite(values).all(-1, keepdims=True), values, np.float32(0))


# ---- MMPose, rtmlib, Uni-Sign ---------------------------------------------------------------------------------------


def is_mmpose(path: Path, head: bytes) -> bool:
    """Whether a file is JSON with keypoints as MMPose and rtmlib have them."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")
    return start and any(key in head for key in (b'"keypoints"', b'"keypoint_scores"', b'"instance_info"'))


def read_mmpose(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads JSON of MMPose or rtmlib; 133 keypoints are `coco_wholebody_133`, 17 are `coco_17`.

    Frames are a list, alone or as `instance_info`, `predictions` or `frames` of an object that may hold `fps`. A frame
    is an object with `instances`, a list of people, or an object with `keypoints` and `scores` of its own. A person is
    an object with `keypoints` (N, 2) and `keypoint_scores` (N,), perhaps `track_id`. The file may also be the
    dictionary of a video, as `read_keypoint_pickle` reads it.

    Raises:
        PoseFileError: The file is broken or holds something else.
    """
    content = _read_json(path, options.limits)
    fps = content.get("fps") if isinstance(content, dict) else None
    if isinstance(content, dict) and not (content.keys() >= {"instances"} or content.keys() & {"keypoints"}):
        keys = ("instance_info", "predictions", "frames")
        content = next((content[key] for key in keys if key in content), None)
    if isinstance(content, dict) and "keypoints" in content:
        return [_read_video(path, path.stem, content, options)]
    with one_sentence(path, "a file of MMPose"):
        instances = list(_mmpose_frames(content))
        frames = [[person for one in people for person in _people_of(one, number)] for number, people in instances]
        tracked = all("track_id" in one for _, people in instances for one in people)
        tracks = [[str(one["track_id"]) for one in people] for _, people in instances] if tracked else None
        if tracks and any(len(own) != len(people) for own, people in zip(tracks, frames, strict=True)):
            tracks = None
        people = link_people(path, frames, tracks, options.limits)
    return [_make(path, path.stem, _names(people.shape[2]), people, options, fps)]


def _mmpose_frames(content: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The people of each frame, as objects."""
    if not isinstance(content, list) or not content:
        raise ValueError("it has no list of frames")
    single = all(isinstance(one, dict) and "keypoint_scores" in one and "bbox" in one for one in content)
    for number, frame in enumerate([content] if single else content):
        people = frame.get("instances", [frame]) if isinstance(frame, dict) else frame
        if not isinstance(people, list) or not all(isinstance(one, dict) for one in people):
            raise ValueError(f"frame {number} is no list of people")
        yield number, people


def _people_of(holder: Mapping[str, Any], number: int) -> list[np.ndarray]:
    """The people that an object with keypoints and scores holds, (N, D) each."""
    scores = holder.get("keypoint_scores", holder.get("scores"))
    return _split_people(holder.get("keypoints", ()), scores, number)


def _split_people(keypoints: Any, scores: Any, number: int) -> list[np.ndarray]:
    """Keypoints (people, N, 2 or 3) and scores (people, N) of a frame, or those of one person, as (N, D) each."""
    points = _numbers(keypoints, f"keypoints of frame {number}")
    if points.size == 0:
        return []
    points = points[None] if points.ndim == 2 else points
    if scores is None and points.ndim == 3 and points.shape[2] == 3:
        return list(points)
    confidence = _numbers(scores, f"scores of frame {number}").reshape(-1)
    if points.ndim != 3 or points.shape[2] not in (2, 3) or confidence.size != points.shape[0] * points.shape[1]:
        raise ValueError(
            f"keypoints of frame {number} have shape {points.shape} and {confidence.size} scores, expected "
            "(people, N, 2) and a score for each"
        )
    return list(np.concatenate([points, confidence.reshape(*points.shape[:2], 1)], -1))


def is_pickle(path: Path, head: bytes) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later does."""
    return len(head) > 2 and head[0] == 0x80 and head[1] in (2, 3, 4, 5)


def read_keypoint_pickle(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads the dictionary of a video, as Uni-Sign pickles it, or a dictionary of such. Nothing is unpickled.

    `keypoints` (T, people, N, 2) or a list of T arrays, and `scores` (T, people, N); people may be left out. The file
    may hold numpy arrays, numbers, text and plain containers; anything else is refused, and never carried out.

    Raises:
        PoseFileError: The file is broken or holds something else.
    """
    size = check_size(path, options.limits.text_bytes)
    with one_sentence(path, "a pickle of numpy arrays"):
        content = read_plain_pickle(path.read_bytes())
    videos = {path.stem: content}
    if isinstance(content, dict) and "keypoints" not in content:
        videos = {f"{path.stem}/{name}": video for name, video in content.items()}
    if not videos or not all(isinstance(video, dict) and "keypoints" in video for video in videos.values()):
        raise PoseFileError(path, "holds no dictionary with keypoints and scores")
    for video in videos.values():
        _check_bulk(path, video, size, options.limits)
    return [_read_video(path, id, video, options) for id, video in videos.items()]


def _check_bulk(path: FilePath, video: Mapping[str, Any], size: int, limits: Limits) -> None:
    """Refuses a pickle that names one array a thousand times: what it holds must not outgrow the file without end."""
    numbers = 0.0
    pending = [video["keypoints"], video.get("scores")]
    while pending:
        value = pending.pop()
        if isinstance(value, np.ndarray):
            numbers += value.size
        elif isinstance(value, list | tuple):
            numbers += len(value)
            pending += value
        if numbers > size or numbers * 4 > limits.array_bytes or len(pending) > size:
            raise PoseFileError(path, f"repeats itself: {size} bytes hold more than {numbers:.0f} numbers")


def _read_video(path: Path, id: str, video: Mapping[str, Any], options: ReadOptions) -> PoseSequence:
    """A sequence of `keypoints` and `scores`."""
    keypoints, scores = video["keypoints"], video.get("scores", video.get("keypoint_scores"))
    with one_sentence(path, "a file of keypoints and scores"):
        if scores is None or len(keypoints) != len(scores):
            found = "no scores" if scores is None else f"{len(scores)} frames of scores"
            raise PoseFileError(path, f"has {len(keypoints)} frames of keypoints, but {found}")
        frames = [_split_people(*frame, number) for number, frame in enumerate(zip(keypoints, scores, strict=True))]
        people = link_people(path, frames, None, options.limits)
    return _make(path, id, _names(people.shape[2]), people, options, video.get("fps"))


def read_npz_file(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads an npz file: poses (see `read_npz`), or `keypoints` and `scores` as `read_keypoint_pickle` has them.

    Raises:
        PoseFileError: The file is broken or holds something else.
    """
    keys = ("keypoints", "scores")
    if not names_in_npz(path) >= set(keys):
        return read_npz_within(path, options)
    video = read_arrays(path, (*keys, "fps"), options.limits, required=keys)
    return [_read_video(path, path.stem, video, options)]
