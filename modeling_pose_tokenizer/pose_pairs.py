"""What pictures of reconstructions show: a sequence and what came back of it, the windows on it, and its errors.

Figures, animations and the report draw from here, so that all of them leave out the same keypoints and show the same
windows. Letters: T frames, N keypoints, D values per keypoint (x, y[, z], confidence last; z is not drawn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .metrics import reference_scale
from .skeleton_pose_tokenizer import Skeleton

__all__ = [
    "CONFIDENCE_THRESHOLD",
    "PosePair",
    "TokenStrip",
    "View",
    "frame_errors",
    "skeleton_lines",
    "typical_poses",
    "views_of",
    "visible",
]

CONFIDENCE_THRESHOLD = 0.3
# Frames of a sequence among which a typical pose is looked for.
CANDIDATES = 40


@dataclass(frozen=True)
class TokenStrip:
    """The tokens of a sequence, to show under it.

    Attributes:
        codes: (Q, S) integers in [0, K).
        codebooks: (group, level) of each of the Q codebooks, as `PoseTokenizerConfig.codebook_index` has them.
        codebook_size: K.
        frames_per_step: frames of the sequence, at its own frame rate, for each of the S code steps.
    """

    codes: np.ndarray
    codebooks: Sequence[tuple[str, int]]
    codebook_size: int
    frames_per_step: float


@dataclass(frozen=True)
class PosePair:
    """A sequence to look at.

    Attributes:
        id: its name.
        reference: (T, N, D) the original, in any units.
        reconstruction: (T, N, D) in the same units, or None where only the original is shown.
        fps: frames per second.
        label: why it is shown, in a word or two.
        errors: part -> mean keypoint error in shoulder widths.
        tokens: what lies between the two, for players to show.
        scale: length of a shoulder width in the units of the poses; default measured in the original.
    """

    id: str
    reference: np.ndarray
    reconstruction: np.ndarray | None = None
    fps: float = 25.0
    label: str = ""
    errors: Mapping[str, float | None] = field(default_factory=dict)
    tokens: TokenStrip | None = None
    scale: float | None = None

    def upside_down(self) -> PosePair:
        """The same with y mirrored, for data whose y axis points up."""
        sign = np.ones(self.reference.shape[-1], dtype=np.float32)
        sign[1] = -1.0
        return self._mapped(lambda poses: poses * sign)

    def turned(self, degrees: float) -> PosePair:
        """The same turned about the y axis, to see poses in 3D from another side.

        Raises:
            ValueError: the poses have no z.
        """
        if self.reference.shape[-1] < 4:
            raise ValueError(f"{self.id} has no z: only poses in 3D can be turned.")
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

        def turn(poses: np.ndarray) -> np.ndarray:
            x, y, z = np.moveaxis(poses[..., :3], -1, 0)
            turned = poses.copy()
            turned[..., :3] = np.stack([cosine * x + sine * z, y, cosine * z - sine * x], -1)
            return turned

        return self._mapped(turn)

    def _mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> PosePair:
        reconstruction = None if self.reconstruction is None else change(self.reconstruction)
        return replace(self, reference=change(self.reference), reconstruction=reconstruction)


@dataclass(frozen=True)
class View:
    """A window on the poses: its centre in every frame (T, 2) and half of its width and height (2,)."""

    name: str
    center: np.ndarray
    half: np.ndarray


def visible(poses: np.ndarray, threshold: float) -> np.ndarray:
    """(T, N) bool: keypoints to draw."""
    return (poses[..., -1] >= threshold) & np.isfinite(poses[..., :2]).all(-1)


def _whole_view(reference: np.ndarray, seen: np.ndarray) -> View:
    """A fixed window on everything visible but a stray half percent."""
    low, high = np.array([[-1.0, -1.0], [1.0, 1.0]])
    if seen.any():
        low, high = np.percentile(reference[seen][:, :2].astype(np.float64), [0.5, 99.5], axis=0)
    half = np.maximum((high - low) / 2, max(np.max(high - low) * 0.3, 1e-6)) * 1.15
    return View("whole", np.tile((low + high) / 2, (len(reference), 1)), half)


def _group_view(reference: np.ndarray, seen: np.ndarray, skeleton: Skeleton, group: str, gliding: bool) -> View | None:
    """A window that follows a group of keypoints; None where it is seen in fewer than a tenth of the frames."""
    keypoints = list(skeleton.group_keypoints[group])
    own = seen[:, keypoints]
    frames = np.flatnonzero(own.sum(1) >= max(2, len(keypoints) // 3))
    if not len(frames) or len(frames) < 0.1 * len(reference):
        return None
    boxes = [reference[t, keypoints][own[t], :2].astype(np.float64) for t in frames]
    centers = np.array([(box.min(0) + box.max(0)) / 2 for box in boxes])
    half = np.percentile([np.ptp(box, axis=0).max() / 2 for box in boxes], 95) * 1.5
    every = np.arange(len(reference))
    track = np.stack([np.interp(every, frames, centers[:, axis]) for axis in range(2)], -1)
    # Gliding, it shows the motion of the hand instead of hiding it.
    width = min(9, len(track)) if gliding else 1
    padded = np.pad(track, ((width // 2, width - 1 - width // 2), (0, 0)), mode="edge")
    track = np.stack([np.convolve(padded[:, axis], np.full(width, 1 / width), "valid") for axis in range(2)], -1)
    return View(group, track, np.full(2, max(half, 1e-6)))


def close_groups(skeleton: Skeleton) -> list[str]:
    """Groups that are worth a window of their own: hands and face."""
    return [group for group in skeleton.groups if "hand" in group or group == "face"]


def views_of(reference: np.ndarray, skeleton: Skeleton, threshold: float, gliding: bool = True) -> list[View]:
    """The window on everything, and one on each hand and the face where they are seen."""
    seen = visible(reference, threshold)
    views = [_group_view(reference, seen, skeleton, group, gliding) for group in close_groups(skeleton)]
    return [_whole_view(reference, seen), *(view for view in views if view is not None)]


def skeleton_lines(skeleton: Skeleton) -> list[tuple[int, int, int, bool]]:
    """The lines to draw: from one keypoint to the middle of two (mostly the same one twice), and whether it is fine.

    Lines within a hand or the face are fine. Where a keypoint is the parent of both shoulders, which makes a tree of
    bones but no shoulders, the lines are drawn that people expect: between the shoulders, and from there to the head.
    """
    fine = {k for g, keypoints in skeleton.group_keypoints.items() if "hand" in g or g == "face" for k in keypoints}
    edges = [(parent, child, child) for parent, child in skeleton.edges]
    if skeleton.scale_pair is not None:
        left, right = skeleton.scale_pair
        above = {parent for parent, child in skeleton.edges if child == left}
        above &= {parent for parent, child in skeleton.edges if child == right}
        edges = [edge for edge in edges if not (edge[0] in above and edge[1] in (left, right))]
        edges += [(left, right, right), *((parent, left, right) for parent in sorted(above))]
    return [(*edge, fine.issuperset(edge)) for edge in edges]


def _scale(pair: PosePair, skeleton: Skeleton, threshold: float) -> float:
    if pair.scale is not None:
        return pair.scale
    try:
        return float(reference_scale(pair.reference[None], skeleton, None, threshold)[0])
    except ValueError:  # a layout without shoulders, or nobody in the picture: the units of the poses remain
        return 1.0


def frame_errors(pair: PosePair, skeleton: Skeleton, threshold: float) -> dict[str, np.ndarray]:
    """When the errors happen: part -> (T,) mean distance of its scored keypoints from the original.

    In shoulder widths. NaN where no keypoint of the part is scored, or the reconstruction is not a number. A keypoint
    is scored as in `metrics`: confident and finite in the original. Without a reconstruction there is no part.
    """
    if pair.reconstruction is None:
        return {}
    points = pair.reference[..., :-1].astype(np.float64)
    scored = (pair.reference[..., -1] >= threshold) & np.isfinite(pair.reference).all(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.linalg.norm(pair.reconstruction[..., :-1].astype(np.float64) - points, axis=-1)
    distance = np.where(scored, distance, 0.0) / _scale(pair, skeleton, threshold)  # (T, N)
    errors = {}
    for part, own in skeleton.group_keypoints.items():
        counts = scored[:, list(own)].sum(1)
        sums = distance[:, list(own)].sum(1)
        errors[part] = np.where((counts > 0) & np.isfinite(sums), sums / np.maximum(counts, 1), np.nan)
    return errors


def typical_poses(
    pairs: Sequence[PosePair], skeleton: Skeleton, threshold: float
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Real poses to colour by the error of each keypoint: of the whole, of each hand and of the face.

    Each is the frame of the originals that shows most of these keypoints: of several, for the whole the one nearest
    to their mean, for a hand the one that spreads it widest. (The mean itself is no pose: hands turn, and the fingers
    would fall together.)

    Yields:
        Name, the keypoints that are seen, and their positions (keypoints, 2).
    """
    frames = [
        pair.reference[np.unique(np.linspace(0, len(pair.reference) - 1, CANDIDATES).round().astype(int))]
        / np.array([*([_scale(pair, skeleton, threshold)] * (pair.reference.shape[-1] - 1)), 1.0])
        for pair in pairs
    ]
    poses = np.concatenate(frames or [np.zeros((0, skeleton.num_keypoints, 3))])
    windows = {"whole": tuple(range(skeleton.num_keypoints))}
    windows |= {group: skeleton.group_keypoints[group] for group in close_groups(skeleton)}
    for name, own in windows.items():
        seen = visible(poses[:, list(own)], threshold)
        counts = seen.sum(1)
        if counts.max(initial=0) < 2:
            continue
        complete = np.flatnonzero(counts == counts.max())
        seen, points = seen[complete, :, None], poses[complete][:, list(own), :2].astype(np.float64)
        points = np.where(seen, points, np.nan)
        points = points - np.nanmean(points, axis=1, keepdims=True)
        if name == "whole":
            columns = seen.any((0, 2))  # keypoints that no frame shows have no mean
            mean = np.nanmean(points[:, columns], axis=0)
            score = -np.nanmean(np.abs(points[:, columns] - mean), axis=(1, 2))
        else:
            score = np.prod(np.nanmax(points, axis=1) - np.nanmin(points, axis=1), axis=-1)
        chosen = int(score.argmax())
        shown = seen[chosen, :, 0]
        yield name, [k for k, there in zip(own, shown, strict=True) if there], points[chosen][shown]
