"""Motion capture: BVH (through pybvh) and Acclaim's ASF/AMC, to positions of joints.

BVH gives a keypoint for each joint and each tip (End Site), AMC one for the far end of each bone. Coordinates are the
file's own, confidence is 1 everywhere. Letters: T frames, N keypoints, D = 4 (x, y, z, confidence).
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .sequences import (
    PoseFileError,
    PoseSequence,
    ReadOptions,
    check_size,
    make_sequence,
    one_sentence,
    place_keypoints,
)

_NEEDS_PYBVH = ".bvh files need pybvh: pip install 'pose-tokenizer[formats]'"
_COLUMNS = {"tx": 0, "ty": 1, "tz": 2, "rx": 3, "ry": 4, "rz": 5}
_MAX_BONES = 1000


def is_bvh(path: Path, head: bytes) -> bool:
    """Whether a file begins as BVH does."""
    return head.lstrip().startswith(b"HIERARCHY")


def read_bvh(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads a BVH file. Needs the package pybvh, which takes three rotations per joint and a root that moves.

    Raises:
        PoseFileError: The file is broken, or its joints do not come into the layout.
        ImportError: pybvh is not installed.
    """
    try:
        from pybvh import read_bvh_file
    except ImportError:
        raise ImportError(_NEEDS_PYBVH) from None
    check_size(path, options.limits.text_bytes)
    if path.suffix.lower() != ".bvh":  # which pybvh insists on
        raise PoseFileError(path, "is a BVH file of another name: end it in .bvh")
    with one_sentence(path, "a BVH file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        motion = read_bvh_file(path, world_up="+y")  # the axis is not used
        positions = motion.node_positions()  # (T, N, 3)
        names = [f"{node.parent.name}_end" if node.is_end_site() else node.name for node in motion.nodes]
        fps = 1 / motion.frame_time
    return _make(path, names, positions, fps, options)


def _make(
    path: Path, names: list[str], positions: np.ndarray, fps: float | None, options: ReadOptions
) -> list[PoseSequence]:
    """A sequence of positions (T, N, 3), in the layout's order where its names are these, and of as many otherwise."""
    poses = np.concatenate([positions, np.ones_like(positions[..., :1])], -1)
    layout = options.layout
    if layout is not None and len(names) == layout.num_keypoints and set(names) == set(layout.keypoint_names):
        poses = place_keypoints(path, names, poses, layout)
    return [
        make_sequence(
            path, path.stem, poses, fps=fps, num_keypoints=options.num_keypoints, keypoint_dim=options.keypoint_dim
        )
    ]


# ---- ASF and AMC ----------------------------------------------------------------------------------------------------
# No library on PyPI that computes positions from them is kept up, and the format is a page long:
# research.cs.wisc.edu/graphics/Courses/cs-838-1999/Jeff/ASF-AMC.html


@dataclass
class _Bone:
    """A bone: its direction at rest, its length, the axes it turns about, and the numbers that a frame has for it."""

    parent: str | None = None
    direction: np.ndarray = field(default_factory=lambda: np.zeros(3))
    length: float = 0.0
    axis: np.ndarray = field(default_factory=lambda: np.eye(3))
    dof: tuple[str, ...] = ()


def is_amc(path: Path, head: bytes) -> bool:
    """Whether a file begins as AMC does."""
    lines = [line.strip() for line in head[:2000].upper().splitlines()]
    return b":FULLY-SPECIFIED" in lines or b":DEGREES" in lines


def read_amc(path: Path, options: ReadOptions) -> list[PoseSequence]:
    """Reads an AMC file with its skeleton: the ASF file of the same name, or whose name this one begins with.

    AMC states no frame rate (CMU's recordings have 120).

    Raises:
        PoseFileError: One of the files is broken, or there is no skeleton.
    """
    skeleton = _find_asf(path)
    for file in (path, skeleton):
        check_size(file, options.limits.text_bytes)
    with one_sentence(skeleton, "an ASF file"):
        bones, degrees = _read_asf(skeleton)
    with one_sentence(path, "an AMC file"):
        values = _read_frames(path, bones)
        degrees = re.search(r"(?mi)^\s*:RADIANS", path.read_text("utf-8")[:2000]) is None and degrees
        positions = _positions(bones, values, degrees)
    return _make(path, list(bones), positions, None, options)


def _find_asf(path: Path) -> Path:
    skeletons = sorted(file for file in path.parent.iterdir() if file.suffix.lower() == ".asf")
    fitting = [file for file in skeletons if path.stem.lower().startswith(file.stem.lower())]
    if not fitting and len(skeletons) != 1:
        raise PoseFileError(path, f"has no skeleton: expected {path.stem}.asf or one .asf file beside it")
    return max(fitting or skeletons, key=lambda file: len(file.stem))


def _sections(text: str) -> dict[str, list[list[str]]]:
    """The sections of an ASF file: name -> lines -> words."""
    sections: dict[str, list[list[str]]] = {}
    lines: list[list[str]] = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words and words[0].startswith(":"):
            lines = sections.setdefault(words[0][1:].lower(), [])
            words = words[1:]
        if words:
            lines.append(words)
    return sections


def _read_asf(path: Path) -> tuple[dict[str, _Bone], bool]:
    """The bones by name, parents first, and whether angles are degrees."""
    sections = _sections(path.read_text("utf-8"))
    missing = {"root", "bonedata", "hierarchy"} - sections.keys()
    if missing:
        raise PoseFileError(path, f"has no section :{min(missing)}, expected an ASF skeleton")
    units = {words[0].lower(): words[-1].lower() for words in sections.get("units", [])}
    degrees = not units.get("angle", "deg").startswith("rad")
    root = {words[0].lower(): words[1:] for words in sections["root"]}
    turned = _numbers(root.get("orientation", ["0"] * 3), 3)
    bones = {"root": _Bone(axis=_rotation(turned, root.get("axis", ["XYZ"])[0], degrees))}
    bones["root"].dof = tuple(name.lower() for name in root.get("order", _COLUMNS))
    words_of: dict[str, list[str]] = {}
    for words in sections["bonedata"]:
        key = words[0].lower()
        if key == "begin":
            words_of = {}
        elif key == "end":
            name = words_of["name"][0]
            *angles, order = words_of["axis"]
            axis = _rotation(_numbers(angles, 3), order, degrees)
            length = float(words_of["length"][0])
            dof = tuple(word.lower() for word in words_of.get("dof", ()))
            bones[name] = _Bone(None, _numbers(words_of["direction"], 3), length, axis, dof)
        else:
            words_of[key] = words[1:]
    ordered = {"root": bones["root"]}
    for parent, *children in sections["hierarchy"]:
        for child in children:
            if parent not in ordered or child in ordered:
                raise PoseFileError(path, f"hangs {child} on {parent}, expected each bone once, below another")
            bones[child].parent = parent
            ordered[child] = bones[child]
    if len(ordered) > _MAX_BONES:
        raise PoseFileError(path, f"has {len(ordered)} bones, expected {_MAX_BONES} at most")
    for name, bone in ordered.items():
        unknown = set(bone.dof) - _COLUMNS.keys() - {"l"}
        if unknown:
            raise PoseFileError(path, f"moves {name} by {min(unknown)}, expected {', '.join(_COLUMNS)}")
    return ordered, degrees


def _read_frames(path: Path, bones: dict[str, _Bone]) -> dict[str, np.ndarray]:
    """The numbers of each bone in every frame, (T, dof)."""
    frames = 0
    rows: dict[str, list[list[str]]] = {name: [] for name, bone in bones.items() if bone.dof}
    for line in path.read_text("utf-8").splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0].startswith(":"):
            continue
        if len(words) == 1 and words[0].isdigit():
            frames += 1
        elif frames and words[0] in rows and len(rows[words[0]]) == frames - 1:
            rows[words[0]].append(words[1:])
        else:
            raise PoseFileError(
                path, f"moves {words[0][:40]} in frame {frames}, which its skeleton does not, or twice"
            )
    for name, row in rows.items():
        if len(row) != frames:
            raise PoseFileError(path, f"moves {name} in {len(row)} of {frames} frames, expected all")
        if {len(words) for words in row} - {len(bones[name].dof)}:
            raise PoseFileError(path, f"has other than {len(bones[name].dof)} numbers for {name} in a frame")
    return {name: np.array(row, dtype=np.float64).reshape(frames, -1) for name, row in rows.items()}


def _numbers(words: list[str], count: int) -> np.ndarray:
    if len(words) != count:
        raise ValueError(f"{' '.join(words)} is not {count} numbers")
    return np.array([float(word) for word in words])


def _rotation(angles: np.ndarray, order: str, degrees: bool) -> np.ndarray:
    """(..., 3) angles about the axes of `order`, the first turned about first, to matrices (..., 3, 3)."""
    angles = np.deg2rad(angles) if degrees else angles
    cos, sin = np.cos(angles), np.sin(angles)
    rotation = np.broadcast_to(np.eye(3), (*angles.shape[:-1], 3, 3))
    for number, axis in enumerate(order.upper()):
        first, second = {"X": (1, 2), "Y": (2, 0), "Z": (0, 1)}[axis]
        turn = np.zeros((*angles.shape[:-1], 3, 3))
        turn[..., :, :] = np.eye(3)
        turn[..., first, first] = turn[..., second, second] = cos[..., number]
        turn[..., second, first] = sin[..., number]
        turn[..., first, second] = -sin[..., number]
        rotation = turn @ rotation
    return rotation


def _positions(bones: dict[str, _Bone], values: dict[str, np.ndarray], degrees: bool) -> np.ndarray:
    """Forward kinematics: the far end of each bone, (T, bones, 3)."""
    num_frames = len(next(iter(values.values())))
    turned: dict[str, np.ndarray] = {}
    ends: dict[str, np.ndarray] = {}
    for name, bone in bones.items():
        moved = np.zeros((num_frames, 3))
        turns = [column for column, dof in enumerate(bone.dof) if dof.startswith("r")]
        order = "".join(bone.dof[column][1] for column in turns)
        motion = _rotation(values[name][:, turns], order, degrees) if turns else np.eye(3)
        local = bone.axis @ motion @ bone.axis.T
        for column, dof in enumerate(bone.dof):
            if dof.startswith("t"):
                moved[:, _COLUMNS[dof]] = values[name][:, column]
        parent = np.eye(3) if bone.parent is None else turned[bone.parent]
        start = np.zeros(3) if bone.parent is None else ends[bone.parent]
        turned[name] = np.broadcast_to(parent @ local, (num_frames, 3, 3))
        ends[name] = start + moved + bone.length * (turned[name] @ bone.direction)
    return np.stack(list(ends.values()), 1)
