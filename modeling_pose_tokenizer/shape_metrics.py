"""Whether hands keep their shape and motion their course: figures that a mean distance alone does not show.

Letters: T frames, N keypoints, n keypoints of a part, D values per keypoint (confidence last), d = D - 1 coordinates,
F features.

Every figure is measured over a part (a token group of the layout) and over all keypoints (`overall`); which keypoints
are scored is as in `metrics`. With r the original, p the reconstruction and e = p - r, in shoulder widths:

====================  =========================================================  ===============  ===================
key                   definition                                                 unit             source
====================  =========================================================  ===============  ===================
pa_mpjpe              mean of |e| after the scored keypoints of a frame are      shoulder widths  arXiv 1712.06584
                      moved, turned and scaled (not mirrored) onto the original
                      by least squares, in frames with more than d of them
wrist_relative_error  mean of |e - e(wrist)| over a hand's other keypoints,      shoulder widths  as in benchmarks/
                      where both are scored: handshape without its place
hand_angle_error      mean difference of the angle, 0 to 180 degrees, between a  degrees          -
                      bone of the hand and the next outward
bone_length_error     mean difference of the length of the layout's edges with   shoulder widths  arXiv 1704.00159
                      both ends scored
dtw_mje               least sum of mean |p[j] - r[i]| along a path of frame      shoulder widths  arXiv 2004.14874
                      pairs (i, j) from the first to the last, over the number                    and its code; Huang
                      of frames of the original                                                   et al. 2021
jitter                mean of |p[t+3] - 3 p[t+2] + 3 p[t+1] - p[t]| fps^3 over   shoulder widths  Flash & Hogan 1985
                      four frames in which the keypoint is scored                per second^3
reference_jitter      the same of the original                                   the same         the same
jitter_ratio          jitter over reference_jitter: above 1 it trembles more     ratio            -
frechet_distance      |m(r) - m(p)|^2 + tr(C(r) + C(p) - 2 (C(r) C(p))^(1/2))    squared, mixed   arXiv 1706.08500
                      of means and covariances of features
====================  =========================================================  ===============  ===================

- The wrist is the one keypoint of a hand to which no bone inside the hand leads. A layout whose hand has none or
  several has no wrist_relative_error; the figures of hands are `None` elsewhere, and `overall` is over all hands.
- Angles need bones of the original that are longer than 0; a bone of the reconstruction that is not counts as being
  at right angles.
- Time is warped by frames in which the part is seen, at most `DTW_BAND` of them either way, over the keypoints that
  are scored in both frames of a pair. All frames weigh the same. The authors' code sums absolute differences of
  coordinates over joints; here, as in Huang et al., an error is the distance of a joint, and a mean over joints.
- Features of a frame: positions (shoulder widths) and velocities (shoulder widths per second, from the frame before)
  of the part's keypoints, at most `FEATURE_KEYPOINTS` spread evenly over them. A keypoint that is not scored in both
  frames is 0 in both poses; frames without any are left out. Covariances divide by the number of frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .metrics import MetricSums, ratio, scored_keypoints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .metrics import ArrayLike
    from .skeleton_pose_tokenizer import Skeleton

__all__ = ["DTW_BAND", "FEATURE_KEYPOINTS", "SHAPE_KEYS", "ShapeMetrics", "hand_root"]

DTW_BAND = 25
FEATURE_KEYPOINTS = 32
# What has a sum and a count; ratio and Fréchet distance follow from more.
MEANS = (
    "pa_mpjpe",
    "wrist_relative_error",
    "hand_angle_error",
    "bone_length_error",
    "dtw_mje",
    "jitter",
    "reference_jitter",
)
SHAPE_KEYS = (*MEANS, "jitter_ratio", "frechet_distance")
OVERALL = "overall"


def hand_root(skeleton: Skeleton, group: str) -> int | None:
    """The wrist of a hand: its one keypoint to which no edge inside the group leads, if there is just one."""
    inside = set(skeleton.group_keypoints[group])
    children = {child for parent, child in skeleton.edges if parent in inside and child in inside}
    roots = sorted(inside - children)
    return roots[0] if len(roots) == 1 else None


class _Block:
    """A part, or all of them, as indices of keypoints: what its figures are measured on."""

    def __init__(self, skeleton: Skeleton, groups: Sequence[str]) -> None:
        members = [skeleton.group_keypoints[group] for group in groups]
        self.keypoints = np.array(sorted(k for keypoints in members for k in keypoints))
        inside = set(self.keypoints.tolist())
        bones = [edge for edge in skeleton.edges if inside.issuperset(edge)]
        self.bones = np.array(bones, dtype=np.int64).reshape(-1, 2)
        hands = [group for group in groups if "hand" in group]
        self.hands = [(hand_root(skeleton, group), list(skeleton.group_keypoints[group])) for group in hands]
        own = [[e for e in bones if set(keypoints).issuperset(e)] for _, keypoints in self.hands]
        joints = [(a, b, c) for edges in own for a, b in edges for start, c in edges if start == b]
        self.joints = np.array(joints, dtype=np.int64).reshape(-1, 3)
        places = np.linspace(0, len(self.keypoints) - 1, min(FEATURE_KEYPOINTS, len(self.keypoints)))
        self.features = self.keypoints[places.round().astype(int)]


class ShapeMetrics(MetricSums):
    """Sums up the figures above over batches and ranks, in memory that does not grow with them.

    Args:
        skeleton: the layout.
        dimensions: d, coordinates of a keypoint.
        sampling_rate: frames per second of the poses.
        confidence_threshold: least reference confidence of a scored keypoint.
    """

    def __init__(
        self, skeleton: Skeleton, dimensions: int, sampling_rate: float, confidence_threshold: float = 0.3
    ) -> None:
        self.skeleton, self.sampling_rate = skeleton, float(sampling_rate)
        self.confidence_threshold = confidence_threshold
        self.blocks = {OVERALL: _Block(skeleton, skeleton.groups)}
        self.blocks |= {group: _Block(skeleton, [group]) for group in skeleton.groups}
        shapes: dict[str, tuple[int, ...]] = {key: (len(self.blocks), 2) for key in MEANS}  # sum, count
        for name, block in self.blocks.items():
            size = 2 * dimensions * len(block.features)
            # of the original and of the reconstruction; the number of frames is that of either
            shapes |= {f"{name} frames": (1,), f"{name} sum": (2, size), f"{name} products": (2, size, size)}
        super().__init__(shapes)

    def update(self, predictions: ArrayLike, references: ArrayLike, padding_mask: ArrayLike | None = None) -> None:
        """Adds reconstructions of a batch.

        Args:
            predictions: (B, T, N, D) reconstructed poses in shoulder widths; only coordinates are read. A scored
                coordinate that is not finite makes the figures it enters `None`.
            references: (B, T, N, D) the original poses in shoulder widths, confidence last.
            padding_mask: (B, T), 1 on real frames. Default: all real.
        """
        predictions, references = torch.as_tensor(predictions).cpu(), torch.as_tensor(references).cpu()
        mask = None if padding_mask is None else torch.as_tensor(padding_mask).cpu()
        scored = scored_keypoints(references, mask, self.confidence_threshold).numpy()  # (B, T, N)
        pairs = zip(predictions.double().numpy(), references.double().numpy(), scored, strict=True)
        with np.errstate(invalid="ignore", over="ignore"):  # what a broken reconstruction holds ends as None
            for prediction, reference, seen in pairs:
                p, r = (np.where(seen[..., None], poses[..., :-1], 0.0) for poses in (prediction, reference))
                for number, (name, block) in enumerate(self.blocks.items()):
                    for key, values in self._measure(block, p, r, seen).items():
                        self._state[key][number] += torch.from_numpy(np.array([values.sum(), len(values)]))
                    self._add_features(name, block, p, r, seen)

    def _measure(
        self, block: _Block, prediction: np.ndarray, reference: np.ndarray, seen: np.ndarray
    ) -> dict[str, np.ndarray]:
        """For each key of `MEANS` the values whose mean it is, of one sequence (T, N, d)."""
        p, r, s = prediction[:, block.keypoints], reference[:, block.keypoints], seen[:, block.keypoints]
        four = s[3:] & s[2:-1] & s[1:-2] & s[:-3]  # (T - 3, n)
        start, stop = block.bones.T
        p_length, r_length = (np.linalg.norm(x[:, stop] - x[:, start], axis=-1) for x in (prediction, reference))
        p_jerk, r_jerk = (np.linalg.norm(np.diff(x, 3, axis=0), axis=-1) * self.sampling_rate**3 for x in (p, r))
        return {
            "pa_mpjpe": aligned_errors(p, r, s),
            "wrist_relative_error": _wrist_errors(prediction - reference, seen, block),
            "hand_angle_error": _angle_errors(prediction, reference, seen, block.joints),
            "bone_length_error": np.abs(p_length - r_length)[seen[:, start] & seen[:, stop]],
            "dtw_mje": warped_errors(p, r, s),
            "jitter": p_jerk[four],
            "reference_jitter": r_jerk[four],
        }

    def _add_features(
        self, name: str, block: _Block, prediction: np.ndarray, reference: np.ndarray, seen: np.ndarray
    ) -> None:
        both = seen[1:, block.features] & seen[:-1, block.features]  # (T - 1, n)
        rows = both.any(1)
        for which, poses in enumerate((reference, prediction)):
            points = poses[:, block.features]
            features = np.concatenate([points[1:], np.diff(points, axis=0) * self.sampling_rate], -1)  # (T - 1, n, 2d)
            features = np.where(both[..., None], features, 0.0)[rows].reshape(-1, 2 * points[0].size)
            self._state[f"{name} sum"][which] += torch.from_numpy(features.sum(0))
            self._state[f"{name} products"][which] += torch.from_numpy(features.T @ features)
        self._state[f"{name} frames"] += int(rows.sum())

    def means(self) -> dict[str, dict[str, tuple[float | None, int]]]:
        """`overall` and group -> key of `MEANS` -> mean and count, where something was counted."""
        return {
            name: {
                key: (ratio(total, count), int(count))
                for key in MEANS
                for total, count in [self._state[key][number].tolist()]
                if count
            }
            for number, name in enumerate(self.blocks)
        }

    def compute(self) -> dict[str, Any]:
        """All figures as plain numbers for JSON, as `ReconstructionMetrics.compute` has them: `{"overall": {key:
        figure}, "parts": {group: {key: figure}}}`; `None` wherever nothing was counted or a figure is not finite."""
        tables: dict[str, dict[str, float | None]] = {}
        for name, found in self.means().items():
            table: dict[str, float | None] = {key: found.get(key, (None, 0))[0] for key in MEANS}
            jitter, before = table["jitter"], table["reference_jitter"]
            table["jitter_ratio"] = None if jitter is None or not before else ratio(jitter, before)
            frames = self._state[f"{name} frames"].item()
            sums = (self._state[f"{name} {what}"].numpy() for what in ("sum", "products"))
            table["frechet_distance"] = frechet_distance(frames, *sums)
            tables[name] = table
        return {OVERALL: tables.pop(OVERALL), "parts": tables}


def aligned_errors(prediction: np.ndarray, reference: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Distances after each frame of the prediction is moved, turned and scaled onto the reference.

    Args:
        prediction: (T, n, d).
        reference: (T, n, d).
        seen: (T, n) bool.

    Returns:
        (V,) of the seen keypoints of all frames that have more than d of them.
    """
    rows = seen.sum(1) > reference.shape[-1]
    p, r, s = prediction[rows], reference[rows], seen[rows]
    weight, count = s[..., None].astype(float), s.sum(1)[:, None, None]
    p0, r0 = (weight * (x - (weight * x).sum(1, keepdims=True) / count) for x in (p, r))
    broken = ~np.isfinite(p0).all((1, 2))
    p0[broken] = 0.0  # for the decomposition
    u, values, vt = np.linalg.svd(p0.transpose(0, 2, 1) @ r0)
    sign = np.ones_like(values)
    sign[:, -1] = np.where(np.linalg.det(u @ vt) < 0, -1.0, 1.0)  # a mirror image is another hand
    spread = np.square(p0).sum((1, 2))
    scale = np.divide((values * sign).sum(1), spread, out=np.zeros(len(p0)), where=spread > 0)
    turned = p0 @ ((u * sign[:, None]) @ vt) * scale[:, None, None]
    distance = np.linalg.norm(turned - r0, axis=-1)
    distance[broken] = np.nan
    return distance[s]


def _wrist_errors(error: np.ndarray, seen: np.ndarray, block: _Block) -> np.ndarray:
    values = [np.zeros(0)]
    for root, keypoints in block.hands:
        others = [k for k in keypoints if k != root]
        if root is not None:
            shift = np.linalg.norm(error[:, others] - error[:, [root]], axis=-1)
            values.append(shift[seen[:, others] & seen[:, [root]]])
    return np.concatenate(values)


def _angle_errors(prediction: np.ndarray, reference: np.ndarray, seen: np.ndarray, joints: np.ndarray) -> np.ndarray:
    angles, defined = [], seen[:, joints].all(-1)  # (T, joints)
    for points in (prediction, reference):
        bones = np.diff(points[:, joints], axis=2)  # (T, joints, 2, d)
        length = np.linalg.norm(bones, axis=-1, keepdims=True)
        unit = np.divide(bones, length, out=np.zeros_like(bones), where=length != 0)
        inner, outer = unit[:, :, 0], unit[:, :, 1]
        # Kahan's formula, exact for small angles too; a bone of no length gives 90 degrees
        sine, cosine = np.linalg.norm(inner - outer, axis=-1), np.linalg.norm(inner + outer, axis=-1)
        angles.append(np.where((length > 0).all((2, 3)), 2 * np.degrees(np.arctan2(sine, cosine)), 90.0))
        broken = ~np.isfinite(length).all((2, 3))
        angles[-1][broken] = np.nan
    defined &= (length > 0).all((2, 3))  # of the reference, which came last
    return np.abs(angles[0] - angles[1])[defined]


def warped_errors(prediction: np.ndarray, reference: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What time warping leaves of the error, as a mean per frame of the reference.

    Args:
        prediction: (T, n, d).
        reference: (T, n, d).
        seen: (T, n) bool.

    Returns:
        (frames with a seen keypoint,), all of them the same: their sum is that along the best path.
    """
    rows = seen.any(1)
    p, r, s = prediction[rows].transpose(2, 0, 1), reference[rows].transpose(2, 0, 1), seen[rows]  # (d, V, n)
    frames, band = len(s), min(DTW_BAND, len(s) - 1)
    if not frames:
        return np.zeros(0)
    # steps[i + j, j - i + band + 1] is the cost of the pair (i, j); inf where there is none, and at both borders
    steps = np.full((2 * frames - 1, 2 * band + 3), np.inf)
    for shift in range(-band, band + 1):
        i = np.arange(max(0, -shift), min(frames, frames - shift))
        here, there = slice(i[0], i[-1] + 1), slice(i[0] + shift, i[-1] + 1 + shift)
        distance = np.sqrt(np.square(p[:, there] - r[:, here]).sum(0))  # (pairs, n)
        both = s[there] & s[here]
        count = both.sum(1)
        total = np.where(both, distance, 0.0).sum(1)
        steps[2 * i + shift, shift + band + 1] = np.divide(total, count, out=np.full(len(i), np.inf), where=count > 0)
    before, last = np.full((2, 2 * band + 3), np.inf)
    last[band + 1] = steps[0, band + 1]
    for costs in steps[1:]:
        best = np.full_like(last, np.inf)
        best[1:-1] = np.minimum(np.minimum(last[:-2], last[2:]), before[1:-1])
        before, last = last, best + costs
    return np.full(frames, last[band + 1] / frames)


def frechet_distance(frames: float, sums: np.ndarray, products: np.ndarray) -> float | None:
    """The squared Fréchet distance between two normal distributions, from their moments.

    Args:
        frames: how many samples were summed up in each.
        sums: (2, F) of samples.
        products: (2, F, F) of samples with themselves.

    Returns:
        `None` without samples, or where one of them was not finite.
    """
    if not frames or not (np.isfinite(sums).all() and np.isfinite(products).all()):
        return None
    means = sums / frames
    first, second = products / frames - means[:, :, None] * means[:, None, :]
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ second @ root
    shared = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    return float(max(np.square(means[0] - means[1]).sum() + np.trace(first + second) - 2 * shared, 0.0))
