"""Raw tables of the named keypoint layouts; `skeleton_pose_tokenizer` turns them into skeletons.

Left and right are the signer's own. Every table is written for one side and mirrored, so that a layout cannot
differ between its sides: a chain `"a b c"` stands for the edges a-b and b-c, outward from the root, and for
their mirror image.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

_SWAP = {"left": "right", "right": "left"}
_FINGERS = ("thumb", "index", "middle", "ring", "little")


def _swap_side(name: str) -> str:
    """Name of the mirrored keypoint, where the name itself tells the side: `left_eye` -> `right_eye`."""
    return "_".join(_SWAP.get(word, word) for word in name.split("_"))


def _face(numbers: str) -> str:
    """Names of face keypoints: `"30 29"` -> `"face_30 face_29"`."""
    return " ".join(f"face_{number}" for number in numbers.split())


def _both_sides(nodes: Mapping[str, str]) -> dict[str, str]:
    """Part nodes of the left side and their mirror images."""
    mirrored = {_swap_side(node): " ".join(map(_swap_side, names.split())) for node, names in nodes.items()}
    return {**nodes, **mirrored}


# Hands: wrist, then four joints for each finger, thumb first, fingertip last (MediaPipe, OpenPose, COCO-WholeBody).
_LEFT_HAND = " ".join(
    ["left_hand_wrist", *(f"left_hand_{finger}_{joint}" for finger in _FINGERS for joint in range(1, 5))]
)
_RIGHT_HAND = " ".join(map(_swap_side, _LEFT_HAND.split()))
_HAND_CHAINS = (
    "left_wrist left_hand_wrist",
    *(" ".join(["left_hand_wrist", *(f"left_hand_{finger}_{joint}" for joint in range(1, 5))]) for finger in _FINGERS),
)


def _hand_joints(fingers: str, joints: Iterable[int]) -> str:
    return " ".join(f"left_hand_{finger}_{joint}" for finger in fingers.split() for joint in joints)


# Knuckles go with the palm: they move with the wrist, the rest of a finger moves with its neighbour.
_HAND_NODES = {
    "palm": "left_hand_wrist " + _hand_joints("index middle ring little", [1]),
    "thumb": _hand_joints("thumb", range(1, 5)),
    "index_middle": _hand_joints("index middle", range(2, 5)),
    "ring_little": _hand_joints("ring little", range(2, 5)),
}
_HAND_PARTS = {
    "left_hand": _HAND_NODES,
    "right_hand": {node: " ".join(map(_swap_side, names.split())) for node, names in _HAND_NODES.items()},
}

# Body of COCO. It has no neck, so the nose is the root.
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

# Face of iBUG-300W, 68 points: jaw 0-16 and brows 17-26 run from the signer's right to the left.
_IBUG_LEFT = "16 15 14 13 12 11 10 9 26 25 24 23 22 35 34 45 44 43 42 47 46 54 53 52 56 55 64 63 65"
_IBUG_RIGHT = "0 1 2 3 4 5 6 7 17 18 19 20 21 31 32 36 37 38 39 40 41 48 49 50 58 59 60 61 67"
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


def _numbers(*ranges: range) -> str:
    return " ".join(str(number) for part in ranges for number in part)


_IBUG_NODES = {
    "jaw": _face(_numbers(range(17))),
    "nose": _face(_numbers(range(27, 36))),
    "eyes": _face(_numbers(range(17, 27), range(36, 48))),
    "mouth": _face(_numbers(range(48, 68))),
}


def _layout(
    names: str,
    chains: Iterable[str],
    parts: Mapping[str, Mapping[str, str]] | None,
    pairs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Turns a table of names into the arguments of `build_skeleton`, which are indices.

    Args:
        names: The N keypoint names, separated by spaces.
        chains: Chains of edges, each also taken in its mirror image.
        parts: Token group -> part node -> names of its keypoints.
        pairs: Left name -> right name, for keypoints whose names do not tell the side.
    """
    keypoints = names.split()
    index = {name: number for number, name in enumerate(keypoints)}
    mirror_of = {**(pairs or {}), **{right: left for left, right in (pairs or {}).items()}}

    def mirror(name: str) -> str:
        return mirror_of.get(name) or _swap_side(name)

    edges: dict[tuple[int, int], None] = {}
    same: Callable[[str], str] = str
    for chain in chains:
        for side in (same, mirror):
            for parent, child in pairwise(map(side, chain.split())):
                edges.setdefault((index[parent], index[child]))
    return {
        "keypoint_names": tuple(keypoints),
        "edges": tuple(edges),
        "parts": parts
        and {g: {n: tuple(index[k] for k in members.split()) for n, members in p.items()} for g, p in parts.items()},
        "flip_pairs": tuple(
            (index[name], index[mirror(name)])
            for name in keypoints
            if name in (pairs or {}) or "left" in name.split("_")
        ),
        "scale_pair": (index["left_shoulder"], index["right_shoulder"]),
    }


_WHOLEBODY_PARTS = {
    "body": {
        "head": "nose left_eye right_eye left_ear right_ear",
        "torso": "left_shoulder right_shoulder left_hip right_hip",
        **_both_sides({"left_arm": "left_elbow left_wrist"}),
        "legs": "left_knee right_knee left_ankle right_ankle " + _COCO_FEET,
    },
    "face": _IBUG_NODES,
    **_HAND_PARTS,
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "coco_wholebody_133": _layout(
        " ".join([_COCO_BODY, _COCO_FEET, _face(_numbers(range(68))), _LEFT_HAND, _RIGHT_HAND]),
        [*_COCO_BODY_CHAINS, *_COCO_FEET_CHAINS, "nose face_30", *map(_face, _IBUG_CHAINS), *_HAND_CHAINS],
        _WHOLEBODY_PARTS,
        _IBUG_PAIRS,
    ),
    "coco_17": _layout(_COCO_BODY, _COCO_BODY_CHAINS, None),
}
