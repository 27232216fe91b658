"""Poses of one named layout in another, where that is faithful, and what is approximate about it.

Letters: T frames, N keypoints, D values per keypoint (confidence last).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .pose_files import IBUG_MESH_POINTS
from .sequences import PoseDataError
from .skeleton_pose_tokenizer import SKELETONS, Skeleton, get_skeleton

# Layouts whose face is the mesh; the others have points of iBUG-300W, of which `face_68` and `face_69` are the pupils.
_MESH_LAYOUTS = ("mediapipe_holistic_543", "mediapipe_holistic_178")
# What can stand for a keypoint that a layout lacks: the mean of others, and how true that is.
_BODY_STANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "neck": (("left_shoulder", "right_shoulder"), "midway between the shoulders"),
    "mid_hip": (("left_hip", "right_hip"), "midway between the hips"),
    "left_big_toe": (("left_foot_index",), "MediaPipe's foot index"),
    "right_big_toe": (("right_foot_index",), "MediaPipe's foot index"),
    "left_foot_index": (("left_big_toe",), "the big toe"),
    "right_foot_index": (("right_big_toe",), "the big toe"),
    "left_pinky": (("left_hand_little_1",), "the knuckle of the hand"),
    "right_pinky": (("right_hand_little_1",), "the knuckle of the hand"),
    "left_index": (("left_hand_index_1",), "the knuckle of the hand"),
    "right_index": (("right_hand_index_1",), "the knuckle of the hand"),
    "left_thumb": (("left_hand_thumb_2",), "the knuckle of the hand"),
    "right_thumb": (("right_hand_thumb_2",), "the knuckle of the hand"),
}
# The same from the face mesh, for layouts that have no head among their body keypoints.
_MESH_STANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "nose": (("face_4",), "the tip of the nose of the face mesh"),
    "left_eye": (("face_263", "face_362"), "midway between the corners of the eye"),
    "right_eye": (("face_33", "face_133"), "midway between the corners of the eye"),
    "left_ear": (("face_454",), "the edge of the face mesh before the ear"),
    "right_ear": (("face_234",), "the edge of the face mesh before the ear"),
    "face_68": (("face_33", "face_133"), "midway between the corners of the eye"),
    "face_69": (("face_263", "face_362"), "midway between the corners of the eye"),
}
# The same from the points of iBUG-300W: corners of the eyes.
_IBUG_STANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "face_68": (("face_36", "face_39"), "midway between the corners of the eye"),
    "face_69": (("face_42", "face_45"), "midway between the corners of the eye"),
}
# A conversion is refused where a token group would keep less than this share of its keypoints.
_MIN_SHARE = 0.5


@dataclass(frozen=True)
class LayoutConversion:
    """How one layout becomes another; call it with poses.

    Attributes:
        source: Name of the layout that poses have.
        target: Name of the layout that they get.
        points: For each keypoint of the target, the keypoints of the source whose mean it is; none: it is missing.
        notes: What is approximate or missing, a sentence each.
    """

    source: str
    target: str
    points: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]

    def __call__(self, poses: np.ndarray) -> np.ndarray:
        """Poses (T, N, D) of the source as (T, N', D) of the target.

        A keypoint that stands for several has the lowest of their confidences, and is missing (all zeros) where one
        of them is.

        Raises:
            ValueError: The poses do not have the source's keypoints.
        """
        expected = get_skeleton(self.source).num_keypoints
        if poses.ndim != 3 or poses.shape[1] != expected:
            raise ValueError(f"poses have the shape {poses.shape}, expected (T, {expected}, D) of {self.source}")
        converted = np.zeros((len(poses), len(self.points), poses.shape[2]), poses.dtype)
        for number, points in enumerate(self.points):
            if points:
                chosen = poses[:, list(points)]  # (T, points, D)
                converted[:, number, :-1] = chosen[..., :-1].mean(1)
                converted[:, number, -1] = chosen[..., -1].min(1)
        converted[~(converted[..., -1] > 0)] = 0
        return converted


@cache
def find_conversion(source: str, target: str) -> LayoutConversion:
    """The conversion from one named layout to another.

    Raises:
        PoseDataError: It would not be faithful: a part of the target has no or too few counterparts in the source.
    """
    origin, goal = get_skeleton(source), get_skeleton(target)
    points, notes = [], []
    for name in goal.keypoint_names:
        found, note = _stand_for(name, source, origin, target)
        points.append(tuple(origin.keypoint_names.index(one) for one in found))
        notes += [f"{name} is {note}"] if note else []
    for group, keypoints in goal.group_keypoints.items():
        kept = sum(bool(points[keypoint]) for keypoint in keypoints)
        if kept < _MIN_SHARE * len(keypoints):
            able = ", ".join(name for name in SKELETONS if name != source and is_convertible(source, name)) or "none"
            raise PoseDataError(
                f"{source} does not convert to {target}: only {kept} of {len(keypoints)} keypoints of {group} have a "
                f"counterpart; it converts to: {able}."
            )
    missing = [name for name, found in zip(goal.keypoint_names, points, strict=True) if not found]
    if missing:
        notes.append(f"missing: {', '.join(missing)}")
    if source in _MESH_LAYOUTS and target not in _MESH_LAYOUTS and "face" in goal.groups:
        notes.append("the points of the face are the nearest vertices of MediaPipe's mesh")
    return LayoutConversion(source, target, tuple(points), tuple(notes))


def is_convertible(source: str, target: str) -> bool:
    """Whether `find_conversion` finds one."""
    origin, goal = get_skeleton(source), get_skeleton(target)
    found = [bool(_stand_for(name, source, origin, target)[0]) for name in goal.keypoint_names]
    return all(
        sum(found[keypoint] for keypoint in keypoints) >= _MIN_SHARE * len(keypoints)
        for keypoints in goal.group_keypoints.values()
    )


def _stand_for(name: str, source: str, origin: Skeleton, target: str) -> tuple[Sequence[str], str]:
    """The keypoints of the source that a keypoint of the target is the mean of, and what is approximate about it."""
    meshes = source in _MESH_LAYOUTS, target in _MESH_LAYOUTS
    twin: str | None = name
    if name.startswith("face_") and meshes[0] != meshes[1]:
        number = int(name.removeprefix("face_"))
        known = meshes[0] and number < len(IBUG_MESH_POINTS)
        twin = f"face_{IBUG_MESH_POINTS[number]}" if known else None
    if twin in origin.keypoint_names:
        return (twin,), ""
    from_mesh = _MESH_STANDS if meshes == (True, False) else {} if meshes[0] else _IBUG_STANDS
    others, note = (_BODY_STANDS | from_mesh).get(name, ((), ""))
    return (others, note) if others and set(others) <= set(origin.keypoint_names) else ((), "")
