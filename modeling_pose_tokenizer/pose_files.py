"""`.pose` files (pose-format), and how the points of MediaPipe Holistic and OpenPose become keypoints of a layout.

Letters: T frames, N keypoints, D values per keypoint (confidence last).
"""

import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from .sequences import (
    FilePath,
    PoseFileError,
    PoseSequence,
    ReadOptions,
    check_size,
    choose_person,
    make_sequence,
    one_sentence,
    place_keypoints,
    replacing,
)
from .skeleton_pose_tokenizer import Skeleton, get_skeleton

# MediaPipe's face mesh vertices nearest to the 68 points of iBUG-300W, in their order.
IBUG_MESH_POINTS = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),  # jaw
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301),  # brows
    *(168, 197, 5, 4, 75, 97, 2, 326, 305),  # nose
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer lips
    *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lips
)
_NEEDS_POSE_FORMAT = ".pose files need pose-format: pip install 'pose-tokenizer[formats]'"
_MAX_POSE_SIZE = 2**16 - 1  # of a picture: the header has two bytes for it
# Layouts that MediaPipe Holistic converts to -> mesh vertex of each face keypoint, None where the name holds it.
HOLISTIC_LAYOUTS: dict[str, tuple[int, ...] | None] = {
    "coco_wholebody_133": IBUG_MESH_POINTS,
    "mediapipe_holistic_543": None,
    "mediapipe_holistic_178": None,
}
HAND_POINTS = (
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
def holistic_points(layout: str) -> tuple[tuple[str, str], ...]:
    """For each keypoint of a layout, the (component, point) of a `.pose` file of MediaPipe Holistic that it is."""
    mesh_points = HOLISTIC_LAYOUTS[layout]
    hand_points = {"left": iter(HAND_POINTS), "right": iter(HAND_POINTS)}  # the same order in every layout
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


_VERSIONS = tuple(struct.pack("<f", version) for version in (0.1, 0.2))


def place_holistic(
    path: FilePath, points: Sequence[tuple[str, str]], values: np.ndarray, layout: Skeleton | None
) -> np.ndarray:
    """Brings points of MediaPipe Holistic into a layout; what they lack is missing: zeros.

    Args:
        path: The file, for messages.
        points: (component, point) of each of the K points, as `.pose` files name them.
        values: (T, K, D).
        layout: The layout wanted; None means `coco_wholebody_133`.

    Returns:
        (T, N, D).

    Raises:
        PoseFileError: Holistic does not convert to this layout.
    """
    wholebody = get_skeleton("coco_wholebody_133")
    layout = layout or wholebody
    if layout.name not in HOLISTIC_LAYOUTS and not set(layout.keypoint_names) <= set(wholebody.keypoint_names):
        expected = ", ".join(HOLISTIC_LAYOUTS)
        raise PoseFileError(path, f"is of MediaPipe Holistic, which converts to {expected}, but not to {layout.name}")
    target = layout if layout.name in HOLISTIC_LAYOUTS else wholebody
    place = {point: index for index, point in enumerate(points)}
    sources = np.array([place.get(point, -1) for point in holistic_points(str(target.name))])  # (N,)
    poses = np.where(sources[:, None] >= 0, values[:, sources], np.float32(0))  # (T, N, D)
    return place_keypoints(path, target.keypoint_names, poses, layout)


def openpose_name(component: str, point: str, number: int) -> str:
    """The keypoint of our layout that a point of OpenPose is: ("pose_keypoints_2d", "RBigToe") -> "right_big_toe"."""
    if component == "face_keypoints_2d":
        return "face_" + point.rpartition("_")[2]
    if component.startswith("hand_"):
        side = component.split("_")[1]
        first = get_skeleton("openpose_137").keypoint_names.index(f"{side}_hand_wrist")
        return get_skeleton("openpose_137").keypoint_names[first + number] if number < 21 else f"{side}_hand_{number}"
    sided = re.sub(r"^([LR])(?=[A-Z])", lambda found: {"L": "Left", "R": "Right"}[found[1]], point)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", sided).lower()


def is_pose_file(path: Path, head: bytes) -> bool:
    """Whether a file begins as a `.pose` file does."""
    return head[:4] in _VERSIONS


def read_pose_file(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads a `.pose` file, see `read_pose`."""
    try:
        from pose_format import Pose
    except ImportError:
        raise ImportError(_NEEDS_POSE_FORMAT) from None
    check_size(path, options.limits.array_bytes)
    with one_sentence(path, "a .pose file"):  # pose-format has no error of its own
        pose = Pose.read(path.read_bytes())
        coordinates = np.asarray(pose.body.data.data, dtype=np.float32)  # (T, people, K, 2 or 3)
        confidence = np.asarray(pose.body.confidence, dtype=np.float32)  # (T, people, K)
    person = choose_person(path, confidence.swapaxes(0, 1), options.person)
    coordinates, confidence = coordinates[:, person], confidence[:, person]
    components = {component.name: component.points for component in pose.header.components}
    points = [(component, point) for component, own in components.items() for point in own]
    if not points or len(points) != coordinates.shape[1]:
        raise PoseFileError(path, f"names {len(points)} points, but holds {coordinates.shape[1]}")
    dim = options.keypoint_dim or 3
    if coordinates.shape[2] < dim - 1:
        raise PoseFileError(path, f"has {coordinates.shape[2]} coordinates per point, expected {dim - 1}")
    values = np.concatenate([coordinates[..., : dim - 1], confidence[..., None]], -1)
    values = np.where(confidence[..., None] > 0, values, np.float32(0))
    if "POSE_LANDMARKS" in components:
        poses = place_holistic(path, points, values, options.layout)
    else:
        names = [point for _, point in points]
        if "pose_keypoints_2d" in components:
            names = [openpose_name(c, point, n) for c, own in components.items() for n, point in enumerate(own)]
        poses = place_keypoints(path, names, values, options.layout)
    return [make_sequence(path, path.stem, poses, poses[..., -1].max(1, initial=0) > 0, pose.body.fps)]


def read_pose(
    path: FilePath, layout: str = "coco_wholebody_133", keypoint_dim: int = 3, person: int | None = None
) -> PoseSequence:
    """Reads a `.pose` file and brings it into a layout by the names of its points. Needs the package pose-format.

    Of MediaPipe Holistic, the body comes from the pose landmarks (confidence: their visibility), the face from the
    vertices of the face mesh that lie nearest to the layout's points, the hands as they are. What Holistic lacks (the
    small toes), and what was cut from the file, is missing: confidence 0. Of OpenPose and others, every keypoint of
    the layout must be there by its name. Left and right are the signer's.

    Args:
        path: The `.pose` file.
        layout: Name of the layout.
        keypoint_dim: D: 3 for x, y, confidence; 4 with Holistic's rough z.
        person: The person to read, from 0 on; None means the one of whom most keypoints are seen.

    Raises:
        PoseFileError: The file is broken, or does not convert to this layout.
        ValueError: No layout has this name.
        ImportError: pose-format is not installed.
    """
    options = ReadOptions(get_skeleton(layout), keypoint_dim, person)
    return read_pose_file(Path(path), options)[0]


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
    if layout.name in HOLISTIC_LAYOUTS:
        points = holistic_points(layout.name)
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
    color_of = {
        k: bytes.fromhex(layout.colors[group][1:]) for group, own in layout.group_keypoints.items() for k in own
    }
    for name, own in members.items():
        place = {keypoint: number for number, keypoint in enumerate(own)}
        limbs = [(place[first], place[last]) for first, last in layout.edges if first in place and last in place]
        values = "XYZ"[: poses.shape[-1] - 1] + "C"
        names = [points[keypoint][1] for keypoint in own]
        components.append(PoseHeaderComponent(name, names, limbs, [tuple(color_of[own[0]])] * len(limbs), values))
    header = PoseHeader(0.2, PoseHeaderDimensions(*size), components)
    body = NumPyPoseBody(sequence.fps, poses[..., :-1], poses[..., -1])
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        Pose(header, body).write(file)
