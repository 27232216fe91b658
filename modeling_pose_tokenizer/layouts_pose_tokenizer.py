"""Raw tables of the named keypoint layouts; `skeleton_pose_tokenizer` turns them into skeletons.

Left and right are the signer's own. Edges and parts are written for one side and mirrored, so that a layout cannot
differ between its sides. A chain `"a b c"` stands for the edges a-b and b-c, outward from the root.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

_SWAP = {"left": "right", "right": "left"}


def _swap_side(name: str) -> str:
    """Mirror image of a name that tells its side: `left_eye` -> `right_eye`, `nose` -> `nose`."""
    return "_".join(_SWAP.get(word, word) for word in name.split("_"))


def _face(points: str | Iterable[int]) -> str:
    """Names of face keypoints: `"30 29"` or `[30, 29]` -> `"face_30 face_29"`."""
    return " ".join(f"face_{point}" for point in (points.split() if isinstance(points, str) else points))


def _layout(
    names: str,
    chains: Iterable[str],
    parts: Mapping[str, Mapping[str, str]] | None,
    pairs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Turns a table of names into the arguments of `build_skeleton`, which are indices.

    Args:
        names: The N keypoint names, separated by spaces.
        chains: Chains of edges; each also stands for its mirror image.
        parts: Token group -> part node -> names of its keypoints; each also stands for its mirror image.
        pairs: Left name -> right name, for keypoints whose names do not tell the side.
    """
    index = {name: number for number, name in enumerate(names.split())}
    mirror = {name: _swap_side(name) for name in index}
    for left, right in (pairs or {}).items():
        if left in index:
            mirror |= {left: right, right: left}
    is_left = set(pairs or ()) | {name for name in index if "left" in name.split("_")}

    edges: dict[tuple[int, int], None] = {}
    for links in (list(pairwise(chain.split())) for chain in chains):
        edges |= dict.fromkeys((index[parent], index[child]) for parent, child in links)
        edges |= dict.fromkeys((index[mirror[parent]], index[mirror[child]]) for parent, child in links)
    members: dict[str, dict[str, set[int]]] = {}
    for group, nodes in (parts or {}).items():
        for node, keypoints in ((node, names.split()) for node, names in nodes.items()):
            members.setdefault(group, {}).setdefault(node, set()).update(index[k] for k in keypoints)
            mirrored = members.setdefault(_swap_side(group), {}).setdefault(_swap_side(node), set())
            mirrored.update(index[mirror[k]] for k in keypoints)
    return {
        "keypoint_names": tuple(index),
        "edges": tuple(edges),
        "parts": {g: {n: tuple(sorted(k)) for n, k in nodes.items()} for g, nodes in members.items()} or None,
        "flip_pairs": tuple((index[name], index[mirror[name]]) for name in index if name in is_left),
        "scale_pair": (index["left_shoulder"], index["right_shoulder"]),
    }


def _subset(layout: Mapping[str, Any], keypoints: Sequence[int]) -> dict[str, Any]:
    """The layout of some of the keypoints, in the given order; an edge leaps over those that are left out."""
    index = {keypoint: number for number, keypoint in enumerate(keypoints)}
    parents: dict[int, list[int]] = {}
    for parent, child in layout["edges"]:
        parents.setdefault(child, []).append(parent)

    def nearest(keypoint: int) -> set[int]:
        above = parents.get(keypoint, [])
        return {kept for parent in above for kept in ({index[parent]} if parent in index else nearest(parent))}

    parts = {
        group: {node: tuple(index[k] for k in members if k in index) for node, members in nodes.items()}
        for group, nodes in layout["parts"].items()
    }
    return {
        "keypoint_names": tuple(layout["keypoint_names"][keypoint] for keypoint in keypoints),
        "edges": tuple((parent, child) for keypoint, child in index.items() for parent in sorted(nearest(keypoint))),
        "parts": {group: {node: k for node, k in nodes.items() if k} for group, nodes in parts.items()},
        "flip_pairs": tuple((index[left], index[right]) for left, right in layout["flip_pairs"] if left in index),
        "scale_pair": tuple(index[keypoint] for keypoint in layout["scale_pair"]),
    }


# --- Hands: wrist, then four joints of each finger outward, thumb first (MediaPipe, OpenPose, COCO-WholeBody alike).
_FINGERS = [
    [f"left_hand_{finger}_{joint}" for joint in range(1, 5)]
    for finger in ("thumb", "index", "middle", "ring", "little")
]
_LEFT_HAND = " ".join(["left_hand_wrist", *(joint for finger in _FINGERS for joint in finger)])
_RIGHT_HAND = " ".join(map(_swap_side, _LEFT_HAND.split()))
# The body's wrist and the hand's own stay two keypoints: trackers find them apart, and either may be missing.
_HAND_CHAINS = ("left_wrist left_hand_wrist", *(" ".join(["left_hand_wrist", *finger]) for finger in _FINGERS))
_HAND_PARTS = {
    "left_hand": {
        # Knuckles go with the palm: they move with the wrist, the rest of a finger moves with its neighbour.
        "palm": " ".join(["left_hand_wrist", *(finger[0] for finger in _FINGERS[1:])]),
        "thumb": " ".join(_FINGERS[0]),
        "index_middle": " ".join(_FINGERS[1][1:] + _FINGERS[2][1:]),
        "ring_little": " ".join(_FINGERS[3][1:] + _FINGERS[4][1:]),
    }
}

# --- Body of COCO. It has no neck, so the nose is the root.
_COCO_BODY = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
)
_COCO_FEET = "left_big_toe left_small_toe left_heel right_big_toe right_small_toe right_heel"
_COCO_BODY_CHAINS = (
    "nose left_eye left_ear",
    "nose left_shoulder left_elbow left_wrist",
    "left_shoulder left_hip left_knee left_ankle",
)
_COCO_FEET_CHAINS = ("left_ankle left_big_toe", "left_ankle left_small_toe", "left_ankle left_heel")
_COCO_PARTS = {
    "head": "nose left_eye left_ear",
    "torso": "left_shoulder left_hip",
    "left_arm": "left_elbow left_wrist",
    "legs": "left_knee left_ankle left_big_toe left_small_toe left_heel",
}

# --- Face of iBUG-300W, 68 points. Jaw 0-16 and brows 17-26 run from the signer's right to the left.
_IBUG_RIGHT = "0 1 2 3 4 5 6 7 17 18 19 20 21 31 32 36 37 38 39 40 41 48 49 50 58 59 60 61 67"
_IBUG_LEFT = "16 15 14 13 12 11 10 9 26 25 24 23 22 35 34 45 44 43 42 47 46 54 53 52 56 55 64 63 65"
_IBUG_PAIRS = dict(zip(_face(_IBUG_LEFT).split(), _face(_IBUG_RIGHT).split(), strict=True))
_IBUG_CHAINS = (
    "30 29 28 27",  # bridge of the nose, upward
    "30 33 32 31",  # nostrils
    "27 21 20 19 18 17",  # brow
    "27 39 38 37 36",  # eye, upper lid
    "39 40 41 36",  # eye, lower lid
    "33 51 50 49 48 59 58 57",  # outer lips
    "51 62 61 60 67 66",  # inner lips
    "48 60",
    "57 66",
    "57 8 7 6 5 4 3 2 1 0",  # chin and jaw
)
_IBUG_PARTS = {
    "jaw": _face(range(17)),
    "nose": _face(range(27, 36)),
    "eyes": _face([*range(17, 27), *range(36, 48)]),
    "mouth": _face(range(48, 68)),
}
# OpenPose adds the pupils, right and left.
_PUPIL_PAIRS = {**_IBUG_PAIRS, "face_69": "face_68"}
_PUPIL_PARTS = {**_IBUG_PARTS, "eyes": _IBUG_PARTS["eyes"] + " face_68"}

# --- Face mesh of MediaPipe, 468 points. Points 0-247 are the signer's right half and the midline; the left half,
# 248-467, is in the order of the right one.
_MESH_MIDLINE = (0, 1, 2, 4, 5, 6, *range(8, 20), 94, 151, 152, 164, 168, 175, 195, 197, 199, 200)
_MESH_RIGHT = [point for point in range(248) if point not in _MESH_MIDLINE]
_MESH_PAIRS = dict(zip(_face(range(248, 468)).split(), _face(_MESH_RIGHT).split(), strict=True))
# The contours that MediaPipe names, 128 points in all: lips, eye and brow, the oval of the face.
_MESH_CONTOURS = {
    "mouth": ("0 37 39 40 185 61 146 91 181 84 17", "0 13 82 81 80 191 78 95 88 178 87 14", "61 78"),
    "right_eye": (
        "133 173 157 158 159 160 161 246 33",
        "133 155 154 153 145 144 163 7 33",
        "55 65 52 53 46",
        "55 107 66 105 63 70",
    ),
    "jaw": ("152 148 176 149 150 136 172 58 132 93 234 127 162 21 54 103 67 109 10",),
}
_MESH_NOSE = ("1 4 5 195 197 6 168", "1 19 94 2", "4 45 220 115 48 64", "2 97 98 64")
# Every other point hangs on a contour or on the nose: the parents of the points 0-247, -1 on the contours themselves.
# They are shortest paths along the edges of the mesh on a mean face, so each point joins the part it is nearest to.
_MESH_PARENTS = (
    "-1 -1 -1 195 -1 -1 -1 -1 168 8 -1 0 13 -1 -1 14 17 -1 17 -1 99 -1 153 145 144 7 154 159 158 160 161 25 140 -1 "
    "127 226 203 -1 82 -1 -1 81 80 146 1 -1 -1 121 -1 48 123 5 -1 -1 -1 -1 157 61 -1 235 99 -1 78 -1 -1 -1 -1 -1 54 "
    "67 -1 21 37 39 40 240 61 146 -1 218 -1 -1 -1 84 -1 84 87 -1 -1 88 91 -1 40 -1 -1 -1 95 -1 -1 97 120 119 64 -1 "
    "103 -1 91 -1 109 -1 163 116 133 247 128 -1 227 228 229 230 231 232 6 137 46 19 209 -1 233 64 33 115 -1 -1 220 "
    "136 -1 93 172 162 176 94 129 34 -1 -1 -1 177 -1 -1 -1 10 -1 -1 -1 -1 46 -1 -1 -1 -1 -1 -1 -1 2 98 219 97 -1 "
    "150 150 148 -1 -1 196 152 -1 132 -1 178 181 -1 181 191 185 -1 185 147 196 190 173 -1 138 168 182 -1 197 -1 131 "
    "175 18 83 43 98 106 206 203 216 171 131 169 170 57 215 135 58 186 236 115 48 -1 55 65 52 53 46 130 234 25 24 "
    "23 22 26 112 -1 64 51 220 241 237 98 125 141 133 243 244 -1 33"
)


def _points(chains: Iterable[str]) -> list[int]:
    """The points of some chains in ascending order."""
    return sorted({int(point) for chain in chains for point in chain.split()})


def _mesh_parts() -> tuple[list[str], dict[str, str]]:
    """Edges from the contours to every other point of the mesh, and the parts that grow along them."""
    parents = [int(parent) for parent in _MESH_PARENTS.split()]
    contours = {**_MESH_CONTOURS, "nose": _MESH_NOSE}
    part_of = {point: part for part, chains in contours.items() for point in _points(chains)}
    parts: dict[str, list[int]] = {part: [] for part in contours}
    for point in range(248):
        contour = point
        while parents[contour] >= 0:
            contour = parents[contour]
        parts[part_of[contour]].append(point)
    edges = [f"{parent} {point}" for point, parent in enumerate(parents) if parent >= 0]
    return edges, {part: _face(points) for part, points in parts.items()}


_MESH_EDGES, _MESH_PARTS = _mesh_parts()
_CONTOUR_CHAINS = [_face(chain) for chains in _MESH_CONTOURS.values() for chain in chains] + [_face("17 152")]
_CONTOUR_RIGHT = _points(chain for chains in _MESH_CONTOURS.values() for chain in chains)
_CONTOUR_LEFT = [point for point in range(248, 468) if _MESH_RIGHT[point - 248] in _CONTOUR_RIGHT]

# --- Body of MediaPipe, 33 points.
_MEDIAPIPE_BODY = (
    "nose left_eye_inner left_eye left_eye_outer right_eye_inner right_eye right_eye_outer left_ear right_ear "
    "mouth_left mouth_right left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_pinky "
    "right_pinky left_index right_index left_thumb right_thumb left_hip right_hip left_knee right_knee left_ankle "
    "right_ankle left_heel right_heel left_foot_index right_foot_index"
)
_MEDIAPIPE_BODY_CHAINS = (
    "nose left_eye_inner left_eye left_eye_outer left_ear",
    "nose mouth_left",
    "nose left_shoulder left_elbow left_wrist left_thumb",
    "left_wrist left_index",
    "left_wrist left_pinky",
    "left_shoulder left_hip left_knee left_ankle left_heel left_foot_index",
)
_MEDIAPIPE_PARTS = {
    "head": "nose left_eye_inner left_eye left_eye_outer left_ear mouth_left",
    "torso": "left_shoulder left_hip",
    "left_arm": "left_elbow left_wrist left_thumb left_index left_pinky",
    "legs": "left_knee left_ankle left_heel left_foot_index",
}

# --- Body of OpenPose, BODY_25. The Phoenix skeleton begins with the same numbers, a head for the nose; its sides are
# named by them too, though the published Phoenix data look mirrored: joints 2-4 have the larger x.
_BODY_25 = (
    "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist mid_hip right_hip "
    "right_knee right_ankle left_hip left_knee left_ankle right_eye left_eye right_ear left_ear left_big_toe "
    "left_small_toe left_heel right_big_toe right_small_toe right_heel"
)
_BODY_25_CHAINS = (
    "neck nose left_eye left_ear",
    "neck left_shoulder left_elbow left_wrist",
    "neck mid_hip left_hip left_knee left_ankle left_heel",
    "left_ankle left_big_toe left_small_toe",
)
_BODY_25_PARTS = {**_COCO_PARTS, "torso": "neck mid_hip left_shoulder left_hip"}
_PHOENIX_BODY = "head neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist"
_PHOENIX_PARTS = {"head": "head", "torso": "neck left_shoulder", "left_arm": "left_elbow left_wrist"}

_WHOLEBODY_133 = _layout(
    " ".join([_COCO_BODY, _COCO_FEET, _face(range(68)), _LEFT_HAND, _RIGHT_HAND]),
    [*_COCO_BODY_CHAINS, *_COCO_FEET_CHAINS, "nose face_30", *map(_face, _IBUG_CHAINS), *_HAND_CHAINS],
    {"body": _COCO_PARTS, "face": _IBUG_PARTS, **_HAND_PARTS},
    _IBUG_PAIRS,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "coco_wholebody_133": _WHOLEBODY_133,
    "mediapipe_holistic_543": _layout(
        " ".join([_MEDIAPIPE_BODY, _face(range(468)), _LEFT_HAND, _RIGHT_HAND]),
        [
            *_MEDIAPIPE_BODY_CHAINS,
            "nose face_1",
            *map(_face, [*_MESH_NOSE, "168 55", "168 133", "2 0"]),
            *_CONTOUR_CHAINS,
            *map(_face, _MESH_EDGES),
            *_HAND_CHAINS,
        ],
        {"body": _MEDIAPIPE_PARTS, "face": _MESH_PARTS, **_HAND_PARTS},
        _MESH_PAIRS,
    ),
    # The reduction of pose-format: shoulders, elbows, wrists, hips; the contours of the mesh, without the nose; hands.
    "mediapipe_holistic_178": _layout(
        " ".join(
            [
                "left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip right_hip",
                _face([*_CONTOUR_RIGHT, *_CONTOUR_LEFT]),
                _LEFT_HAND,
                _RIGHT_HAND,
            ]
        ),
        [
            # Without a nose, the root is the upper lip, and the brows hang on the forehead.
            *_CONTOUR_CHAINS,
            *map(_face, ["10 55", "55 133"]),
            "face_152 left_shoulder left_elbow left_wrist",
            "left_shoulder left_hip",
            *_HAND_CHAINS,
        ],
        {
            "body": {"torso": "left_shoulder left_hip", "left_arm": "left_elbow left_wrist"},
            "face": {part: _face(_points(chains)) for part, chains in _MESH_CONTOURS.items()},
            **_HAND_PARTS,
        },
        _MESH_PAIRS,
    ),
    "openpose_137": _layout(
        " ".join([_BODY_25, _face(range(70)), _LEFT_HAND, _RIGHT_HAND]),
        [*_BODY_25_CHAINS, "nose face_30", *map(_face, [*_IBUG_CHAINS, "39 68"]), *_HAND_CHAINS],
        {"body": _BODY_25_PARTS, "face": _PUPIL_PARTS, **_HAND_PARTS},
        _PUPIL_PAIRS,
    ),
    "phoenix_50": _layout(
        " ".join([_PHOENIX_BODY, _LEFT_HAND, _RIGHT_HAND]),
        ["neck head", "neck left_shoulder left_elbow left_wrist", *_HAND_CHAINS],
        {"body": _PHOENIX_PARTS, **_HAND_PARTS},
    ),
    # Few enough keypoints for one part node each.
    "coco_17": _layout(_COCO_BODY, _COCO_BODY_CHAINS, None),
    # Nose, ears and arms; both hands; every second point of the jaw, inner lips, tip of the nose.
    "unisign_69": _subset(_WHOLEBODY_133, [0, *range(3, 11), *range(91, 133), *range(23, 40, 2), *range(83, 91), 53]),
}
