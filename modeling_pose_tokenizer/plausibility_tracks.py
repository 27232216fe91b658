"""Pose sequences as the plausibility checks need them: which keypoint is what, how far and how fast it moves.

Letters: T frames, N keypoints, D values per keypoint (confidence last). A unit is the length of the layout's scale
pair in the sequence, a shoulder width.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .sequences import PoseSequence
from .skeleton_pose_tokenizer import Skeleton

# A keypoint below it is not looked at: the model's own default for a missing one.
MIN_CONFIDENCE = 0.3
# Fewer frames than these tell nothing.
MIN_FRAMES = 5
# A frame so many times smaller or larger than the median one was written in another unit, not seen from elsewhere.
FRAME_RATIO = 50.0
# A body is about so many units long and wide, for layouts without a scale pair.
UNITS_OF_A_BODY = 4.0
# Keypoints of a sequence that are looked at, ten minutes of 133: of a longer one so many excerpts, spread evenly.
MAX_KEYPOINTS, EXCERPTS = 2_000_000, 32
# Units per second under which a person is at rest, and what moves is the estimator's jitter: it tells no rate.
REST_SPEED = 0.1
# Steps over two frames that count as motion, in units; and how near to half-way, in such steps, is computed.
STILL, HALFWAY = 2e-3, 1e-3
# Share of the steps that are estimators' jumps, which hide how a body moves.
OUTLIERS = 0.02


@dataclass
class Histogram:
    """Counts in fixed bins, of which quantiles can be told.

    Attributes:
        low, high: Range; what lies outside goes into the first or the last bin.
        log: Whether the bins are of equal ratio rather than of equal width.
        counts: (bins,) int64.
    """

    low: float
    high: float
    log: bool = False
    bins: int = 120
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.counts):
            self.counts = np.zeros(self.bins, np.int64)

    @property
    def edges(self) -> np.ndarray:
        """(bins + 1,)."""
        space = np.geomspace if self.log else np.linspace
        return space(self.low, self.high, self.bins + 1)

    @property
    def total(self) -> int:
        """How many values it has seen."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray | float) -> None:
        """Counts values of any shape; those that are not finite are left out."""
        values = np.ravel(values)
        values = np.clip(values[np.isfinite(values)], self.low, self.high)
        if self.log:
            values, low, high = np.log(values), np.log(self.low), np.log(self.high)
        else:
            low, high = self.low, self.high
        self.counts += np.histogram(values, self.bins, (low, high))[0]  # ten times as fast as by edges

    def quantile(self, share: float) -> float:
        """The middle of the bin that a share of the values lies under or in; NaN where there are none."""
        if not self.total:
            return float("nan")
        place = int(np.searchsorted(np.cumsum(self.counts), share * self.total))
        pair = self.edges[min(place, self.bins - 1) :][:2]
        return float(np.sqrt(pair.prod()) if self.log else pair.mean())


class Landmarks:
    """Which keypoints of a layout stand where on a body, told by their names; empty where the layout has none."""

    def __init__(self, layout: Skeleton) -> None:
        names = layout.keypoint_names
        index = {name: number for number, name in enumerate(names)}
        words = [set(name.lower().split("_")) for name in names]
        self.shoulders = layout.scale_pair
        face = [bool({"eye", "ear"} & own) or name.startswith("face_") for own, name in zip(words, names, strict=True)]
        self.head = [k for k in range(len(names)) if face[k] or {"nose", "head"} & words[k]]
        self.eyes = [pair for pair in layout.flip_pairs if face[pair[0]]]
        self.hips = [pair for pair in layout.flip_pairs if "hip" in names[pair[0]].lower()]
        self.hands = {side: layout.group_keypoints.get(f"{side}_hand", ()) for side in ("left", "right")}
        for side, keypoints in self.hands.items():
            if not keypoints and f"{side}_wrist" in index:
                self.hands[side] = (index[f"{side}_wrist"],)
        roots = [[index.get(f"{side}{part}_wrist") for side in self.hands] for part in ("_hand", "")]
        self.wrists = [k for pair in roots for k in pair if k is not None]  # left and right hand, left and right arm
        self.wrists = self.wrists if len(self.wrists) == 4 else []


class Track:
    """One sequence, as the checks need it: unseen keypoints are NaN.

    Of a very long sequence excerpts are looked at: what a file may cost is bounded. The last frame of each counts as
    unseen, so that nothing steps from one to the next.

    Attributes:
        frames: (M,) numbers of the frames that are looked at.
        points: (M, N, D-1) float32.
        found: (M, N), the keypoint has a confidence.
        seen: (M, N), it has one that counts.
        unit: Length of the scale pair, a median over the frames; NaN without one.
    """

    def __init__(self, sequence: PoseSequence, layout: Skeleton | None) -> None:
        length, num_keypoints = sequence.poses.shape[:2]
        poses, mask, self.frames = sequence.poses, sequence.mask, np.arange(length)
        if length * num_keypoints > MAX_KEYPOINTS:
            size = max(MAX_KEYPOINTS // (EXCERPTS * num_keypoints), MIN_FRAMES)
            starts = np.linspace(0, length - size, EXCERPTS).astype(np.int64)
            self.frames = (starts[:, None] + np.arange(size)).ravel()
            poses, mask = poses[self.frames], mask[self.frames]
            mask[size - 1 :: size] = False
        self.mask, self.fps, self.layout = mask, sequence.fps, layout
        self.confidence = poses[..., -1]  # (M, N)
        self.found = (self.confidence > 0) & mask[:, None]
        most = self.confidence.max(initial=0)
        self.seen = self.found & (self.confidence >= (MIN_CONFIDENCE if most >= MIN_CONFIDENCE else 0))
        self.points = np.where(self.seen[..., None], poses[..., :-1], np.float32("nan"))
        self.unit = float("nan")
        if layout is not None and layout.scale_pair is not None:
            left, right = layout.scale_pair
            unit = median(lengths(self.points[:, left] - self.points[:, right]))
            self.unit = unit if unit > 0 else self.unit

    @cached_property
    def sizes(self) -> np.ndarray:
        """(M,) largest extent along an axis, NaN where less than 3 keypoints are seen."""
        planes = np.moveaxis(self.points, -1, 0)
        spans = [np.fmax.reduce(plane, 1) - np.fmin.reduce(plane, 1) for plane in planes]
        return np.where(self.seen.sum(1) >= 3, np.maximum.reduce(spans), np.nan)

    @cached_property
    def odd(self) -> np.ndarray:
        """(M,): the keypoints span much more or much less than in most frames."""
        usual = median(self.sizes)
        with np.errstate(invalid="ignore"):
            small = (self.sizes * FRAME_RATIO < usual) & (self.sizes > 0)
            return (small | (self.sizes > FRAME_RATIO * usual)) & (usual > 0)

    @cached_property
    def same(self) -> np.ndarray:
        """(M, N): the keypoint is seen, and has the very coordinates of the frame before."""
        same = np.zeros(self.seen.shape, bool)
        planes = np.moveaxis(self.points, -1, 0)
        same[1:] = np.logical_and.reduce([plane[1:] == plane[:-1] for plane in planes])  # NaN equals nothing
        return same

    @cached_property
    def repeated(self) -> np.ndarray:
        """(M,): every keypoint that is seen here or in the frame before has not moved at all."""
        repeated = np.zeros(len(self.seen), bool)
        either = self.seen[1:] | self.seen[:-1]
        repeated[1:] = (self.same[1:] | ~either).all(-1) & (either.sum(-1) >= 3)
        return repeated

    @cached_property
    def between(self) -> tuple[np.ndarray, np.ndarray]:
        """(M,) twice: most that moves here is just half-way between the frames before and after; enough moves."""
        before, here, after = self.points[:-2], self.points[1:-1], self.points[2:]
        step, bend = lengths(after - before), lengths(after - here + (before - here))
        with np.errstate(invalid="ignore"):
            moves = step > STILL * self.any_unit
            halfway = moves & (bend <= HALFWAY * step)
        enough = moves.sum(1) >= np.maximum(self.seen[1:-1].sum(1) // 2, 3)
        found = enough & (halfway.sum(1) >= 0.9 * moves.sum(1))
        return np.pad(found, 1), np.pad(enough, 1)

    @property
    def any_unit(self) -> float:
        """The unit, or without a scale pair a share of the body."""
        return self.unit if self.unit > 0 else median(self.sizes) / UNITS_OF_A_BODY

    @cached_property
    def speed(self) -> float:
        """What 9 of 10 keypoints stay under, in units per second, frames that only repeat left out."""
        if not self.fps or len(self.points) < MIN_FRAMES:
            return float("nan")
        steps = lengths(np.diff(self.points, axis=0))[~self.repeated[1:]]
        steps = steps[np.isfinite(steps)]
        if not len(steps) or not self.any_unit > 0:
            return float("nan")
        return float(np.quantile(steps, 0.9)) / self.any_unit * self.fps

    @cached_property
    def tempo(self) -> float:
        """How quickly motion changes, whatever its size: the acceleration by the speed, 1/s (a swing's 2 pi times its
        frequency). Of people at rest and where nothing is known, NaN.

        Jitter adds to it in proportion to the frame rate, which is why files of one set alone can be compared.
        """
        points = self.points[~self.repeated]
        if not self.fps or len(points) < MIN_FRAMES:
            return float("nan")
        steps = np.diff(points, axis=0)
        speed, change = _usual(lengths(steps)), _usual(lengths(np.diff(steps, axis=0)))
        return change / speed * self.fps if speed > 0 else float("nan")

    def mean(self, keypoints: "list[int] | tuple[int, ...]") -> np.ndarray:
        """(M, D-1) mean of those keypoints that are seen."""
        chosen, count = self.points[:, list(keypoints)], self.seen[:, list(keypoints)].sum(1)
        with np.errstate(invalid="ignore"):
            return np.nansum(chosen, 1) / count[:, None]


def lengths(vectors: np.ndarray) -> np.ndarray:
    """(..., D-1) -> (...). A norm over so short an axis costs five times as much."""
    return np.sqrt(sum(np.square(plane) for plane in np.moveaxis(vectors, -1, 0)))


def median(values: np.ndarray) -> float:
    """The median of what is finite, NaN where nothing is."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")


def _usual(values: np.ndarray) -> float:
    """Root of the mean square of what is finite, the largest cut down: a few of them are an estimator's jumps."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan")
    return float(np.sqrt(np.mean(np.minimum(values, np.quantile(values, 1 - OUTLIERS)) ** 2, dtype=np.float64)))


__all__ = ["MIN_FRAMES", "REST_SPEED", "Histogram", "Landmarks", "Track", "lengths", "median"]
