"""The arithmetic of normalisation, with numpy alone: raw keypoints -> model input, and back.

`PoseFeatureExtractor` is this with files and tensors around it; the ONNX runtime is this without torch.

Letters: B batch, T frames, N keypoints, D values per keypoint (x, y[, z], confidence last).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Placement = tuple[np.ndarray, float]  # centre (D-1,), scale

# Coordinates further than this many times the median distance from the median point are wreckage (1e30 from a
# diverged estimator), not motion: they go before anything is measured. Real outliers stay far below it.
_WRECK_FACTOR = 1e4
# What resampling makes at most: so many times the frames, beyond a few, and so many numbers (1 GiB of float32). A
# wrong frame rate must not fill the memory.
_MAX_GROWTH, _FREE_FRAMES, _MAX_NUMBERS = 200, 10_000, 2**28
# A reference pair closer together than this share of the median distance cannot be a unit of length.
_DEGENERATE_FACTOR = 1e-6


class PoseNormalizer:
    """What `PoseFeatureExtractor` does to poses, for whoever sets these attributes.

    Attributes:
        skeleton (`str`, *optional*): Name of the layout, for messages.
        num_keypoints (`int`): N.
        keypoint_dim (`int`): D.
        scale_pair: The two keypoints whose distance is the unit of length, or None.
        sampling_rate (`float`): Frames per second of the model.
        confidence_threshold (`float`): Confidence under which a keypoint is missing.
        coordinate_bound (`float`): Largest distance from the origin, per axis.
        mean: (N, D-1) mean pose in units of the reference pair, None where never observed, or None.
        padding_value (`float`): Value of padded frames.
    """

    skeleton: str | None
    num_keypoints: int
    keypoint_dim: int
    scale_pair: Sequence[int] | None
    sampling_rate: float
    confidence_threshold: float
    coordinate_bound: float
    mean: Sequence[Sequence[float | None]] | None
    padding_value: float

    def features(self, poses: Any, fps: Any) -> list[dict[str, Any]]:
        """What is said of each sequence in `poses`: see `PoseFeatureExtractor.__call__`."""
        sequences = _as_list(poses)
        rates = _as_rates(fps, len(sequences), float(self.sampling_rate))
        return [self._normalise(sequence, rate) for sequence, rate in zip(sequences, rates, strict=True)]

    def stack(self, features: Sequence[dict[str, Any]], padded: bool = True) -> dict[str, Any]:
        """One array per key, `input_values` and `padding_mask` padded on the right to the longest sequence; where
        they are of unlike lengths and not `padded`, these two are lists."""
        batch: dict[str, Any] = {key: [each[key] for each in features] for key in features[0]}
        lengths = [len(values) for values in batch["input_values"]]
        for key, fill in (("input_values", self.padding_value), ("padding_mask", 0)):
            if padded or len(set(lengths)) == 1:
                batch[key] = np.stack([_pad_to(values, max(lengths), fill) for values in batch[key]])
        for key in batch.keys() - {"input_values", "padding_mask"}:
            batch[key] = np.stack(batch[key])
        return batch

    def postprocess(self, pose_values: Any, inputs: Any) -> list[np.ndarray]:
        """Brings model output back to where its input came from: coordinates, frame rate and length.

        Args:
            pose_values: (B, T, N, D) normalised poses, or a list of (T, N, D); longer than the sequence is fine.
            inputs: What `__call__` returned, or a mapping with its `center`, `scale`, `fps` and `num_frames`.

        Returns:
            One (num_frames, N, D) float32 array per sequence, confidence in [0, 1]. A keypoint of confidence 0 has
            coordinates 0, as in pose files.
        """
        center, scale, fps, num_frames = (to_numpy(inputs[key]) for key in ("center", "scale", "fps", "num_frames"))
        sequences = _as_list(pose_values)
        if len(sequences) != len(scale):
            raise ValueError(f"pose_values holds {len(sequences)} sequences; expected {len(scale)}, as inputs does.")
        results = []
        for index, sequence in enumerate(sequences):
            frames, rate = int(num_frames[index]), float(fps[index])
            length = self.resampled_length(frames, rate)
            self.check_frames(frames, len(sequence))
            if len(sequence) < length:
                raise ValueError(f"pose_values[{index}] has {len(sequence)} frames; expected at least {length}.")
            points, confidence, observed = self._read(sequence[:length])
            if not _same_rate(rate, float(self.sampling_rate)):
                times = np.arange(frames) * (self.sampling_rate / rate)
                points, confidence, observed = interpolate(points, confidence, observed, times)
            points = points * float(scale[index]) + center[index].astype(np.float64)
            points[confidence <= 0] = 0.0
            results.append(np.concatenate([points, confidence[..., None]], -1).astype(np.float32))
        return results

    def resampled_length(self, num_frames: int, fps: float | None) -> int:
        """Frames at `sampling_rate` of a sequence of `num_frames` at `fps`; at least 1.

        Raises:
            ValueError: They would be far too many.
        """
        if fps is None or _same_rate(fps, float(self.sampling_rate)):
            return num_frames
        length = (num_frames - 1) * self.sampling_rate / float(np.float32(fps))
        most = max(_MAX_GROWTH * num_frames, _FREE_FRAMES)
        if not length < most:
            raise ValueError(
                f"{num_frames} frames at {fps:g} fps would become {length:.0f} at {self.sampling_rate:g};"
                f" expected {most} at most, is the frame rate right?"
            )
        self.check_frames(round(length) + 1, num_frames)
        return round(length) + 1

    def check_frames(self, num_frames: int, before: int) -> None:
        """Raises `ValueError` when resampling would make more frames than memory should hold."""
        most = _MAX_NUMBERS // (self.num_keypoints * self.keypoint_dim)
        if num_frames > max(most, before):
            raise ValueError(
                f"{before} frames would become {num_frames} at another frame rate; expected {most} at most:"
                " is the rate right? If so, cut the sequence."
            )

    def _normalise(self, poses: Any, fps: float) -> dict[str, Any]:
        points, confidence, observed = self._read(poses)
        placement = self._place(points, observed)
        num_frames = len(points)
        points, observed = self._apply(points, observed, placement)
        if not _same_rate(fps, float(self.sampling_rate)):
            times = np.arange(self.resampled_length(num_frames, fps)) * (fps / self.sampling_rate)
            points, confidence, observed = interpolate(points, confidence, observed, times)
        values = np.concatenate([points, confidence[..., None]], -1)  # (T, N, D)
        return {
            "input_values": np.where(observed[..., None], values, 0.0).astype(np.float32),
            "padding_mask": np.ones(len(values), dtype=np.int64),
            "center": placement[0].astype(np.float32),
            "scale": np.float32(placement[1]),
            "fps": np.float32(fps),
            "num_frames": np.int64(num_frames),
        }

    def _likely_layout(self, num_keypoints: int) -> str:
        """What a refusal of so many keypoints adds: the layout that has them, as far as layouts are known here."""
        return ""

    def _read(self, poses: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checks one sequence; returns points (T, N, D-1), confidence (T, N) in [0, 1], observed (T, N) bool."""
        array = to_numpy(poses)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"poses have dtype {array.dtype}; expected numbers.")
        if array.ndim != 3:
            raise ValueError(f"poses have shape {array.shape}; expected (frames, keypoints, values).")
        num_frames, num_keypoints, keypoint_dim = array.shape
        if num_frames == 0:
            raise ValueError("poses have no frames; expected at least one.")
        if num_keypoints != self.num_keypoints:
            raise ValueError(
                f"poses have {num_keypoints} keypoints; the layout {self.skeleton or 'given in keypoint_names'}"
                f" has {self.num_keypoints}{self._likely_layout(num_keypoints)}."
            )
        if keypoint_dim != self.keypoint_dim:
            names = ["x", "y", "z"][: self.keypoint_dim - 1] if self.keypoint_dim <= 4 else ["coordinates"]
            raise ValueError(
                f"poses have {keypoint_dim} values per keypoint; expected {self.keypoint_dim}"
                f" ({', '.join(names)}, confidence)."
            )
        values = array.astype(np.float64)
        points, confidence = values[..., :-1], values[..., -1]
        # Larger than float32 holds is as good as infinite; what remains is safe to square in float64.
        finite = _all_within(points, float(np.finfo(np.float32).max)) & np.isfinite(confidence)  # (T, N)
        confidence = np.where(finite, np.clip(confidence, 0.0, 1.0), 0.0)
        observed = (confidence >= self.confidence_threshold) & (confidence > 0)
        return np.where(finite[..., None], points, 0.0), confidence, observed

    # ---- placement: where the origin lies and how long the unit is ------------------------------------------------

    def _place(self, points: np.ndarray, observed: np.ndarray) -> Placement:
        """The first of reference pair, mean pose and extent that holds; nothing observed: the identity."""
        for candidate in (self._pair_placement, self._mean_placement, self._extent_placement):
            placement = candidate(points, observed)
            if placement is not None:
                return placement
        return np.zeros(points.shape[-1]), 1.0

    def _pair_placement(self, points: np.ndarray, observed: np.ndarray) -> Placement | None:
        if self.scale_pair is None:
            return None
        left, right = self.scale_pair
        keep = self._sane(points, observed)
        frames = keep[:, left] & keep[:, right]
        if not frames.any():
            return None
        ends = points[frames][:, [left, right]]  # (T', 2, D-1)
        center = np.median(ends.mean(1), axis=0)
        scale = float(np.median(np.linalg.norm(ends[:, 0] - ends[:, 1], axis=-1)))
        return self._accept(points, keep, (center, scale))

    def _mean_placement(self, points: np.ndarray, observed: np.ndarray) -> Placement | None:
        if self.mean is None:
            return None
        mean = np.array(self.mean, dtype=np.float64)  # (N, D-1), None -> NaN
        keep = self._sane(points, observed)
        common = keep.any(0) & np.isfinite(mean).all(-1)
        if common.sum() < 2:
            return None
        weight = keep.sum(0)[common, None] / keep[:, common].sum()
        seen = np.nanmedian(np.where(keep[..., None], points, np.nan)[:, common], axis=0)  # (N', D-1)
        seen_center, mean_center = (weight * seen).sum(0), (weight * mean[common]).sum(0)
        seen_extent = np.sqrt((weight * (seen - seen_center) ** 2).sum())
        mean_extent = np.sqrt((weight * (mean[common] - mean_center) ** 2).sum())
        if mean_extent <= 0:
            return None
        scale = float(seen_extent / mean_extent)
        return self._accept(points, keep, (seen_center - scale * mean_center, scale))

    def _extent_placement(self, points: np.ndarray, observed: np.ndarray) -> Placement | None:
        seen = points[self._sane(points, observed)]  # (M, D-1)
        if len(seen) == 0:
            return None
        center = seen.mean(0)
        scale = float(np.sqrt(((seen - center) ** 2).sum(-1).mean()))
        # One point that never moves has no extent and any unit will do.
        return center, scale if scale > 0 else 1.0

    def _sane(self, points: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """(T, N) bool: observed, and not so far from everything else that it must be wreckage."""
        center, spread = _spread(points, observed)
        if spread <= 0:
            return observed
        return observed & _all_within(points - center, _WRECK_FACTOR * spread)

    def _accept(self, points: np.ndarray, keep: np.ndarray, placement: Placement) -> Placement | None:
        """The placement, unless its unit is degenerate: next to nothing, or so short that most points fall out."""
        center, scale = placement
        if scale <= _DEGENERATE_FACTOR * _spread(points, keep)[1]:
            return None
        within = _all_within(points - center, self.coordinate_bound * scale) & keep
        return placement if 2 * within.sum() >= keep.sum() else None

    def _apply(self, points: np.ndarray, observed: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
        """Normalised points, zero where missing, and what is still observed within the bound."""
        points = (points - placement[0]) / placement[1]
        observed = observed & _all_within(points, self.coordinate_bound)
        return np.where(observed[..., None], points, 0.0), observed


def _spread(points: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, float]:
    """Median point (D-1,) of the observed ones and their median distance from it, over all axes."""
    seen = points[observed]
    if len(seen) == 0:
        return np.zeros(points.shape[-1]), 0.0
    center = np.median(seen, axis=0)
    return center, float(np.median(np.abs(seen - center)))


def _all_within(points: np.ndarray, bound: float) -> np.ndarray:
    """Whether every coordinate of a point is finite and within the bound: (..., D-1) -> (...)."""
    # One plane per coordinate: `all(-1)` over so short an axis costs ten times as much.
    return np.logical_and.reduce([np.abs(plane) <= bound for plane in np.moveaxis(points, -1, 0)])


def interpolate(
    points: np.ndarray, confidence: np.ndarray, observed: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear interpolation at `times` (in frames of the input, held past its end).

    Between an observed and a missing keypoint there is nothing to interpolate: the nearer frame decides for both.
    """
    times = np.minimum(times, len(points) - 1)
    low = np.floor(times).astype(np.int64)
    high = np.minimum(low + 1, len(points) - 1)
    fraction = (times - low)[:, None]  # (T', 1)
    nearest = np.where(fraction < 0.5, 0.0, 1.0)
    weight = np.where(observed[low] == observed[high], fraction, nearest)  # (T', N)
    return (
        points[low] * (1 - weight[..., None]) + points[high] * weight[..., None],
        confidence[low] * (1 - weight) + confidence[high] * weight,
        np.where(nearest > 0, observed[high], observed[low]),
    )


def to_numpy(values: Any) -> np.ndarray:
    """An array of an array, a list or a tensor of torch, which need not be installed."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()  # unknown to numpy
    return np.asarray(values)


def _as_list(poses: Any) -> list[Any]:
    """One sequence (T, N, D), a batch (B, T, N, D) or a list of sequences, as a list of sequences."""
    if isinstance(poses, (list, tuple)):
        if not poses:
            raise ValueError("poses is an empty list; expected at least one sequence.")
        return list(poses)
    return list(poses) if poses.ndim == 4 else [poses]


def _as_rates(fps: Any, count: int, default: float) -> list[float]:
    rates = list(fps) if isinstance(fps, (list, tuple)) or getattr(fps, "ndim", 0) == 1 else [fps] * count
    if len(rates) != count:
        raise ValueError(f"fps has {len(rates)} values; expected one, or {count}, as there are sequences.")
    # The rate is handed on as float32: rounded now, so that `postprocess` finds the same length.
    rates = [default if rate is None else float(np.float32(rate)) for rate in rates]
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"fps is {rate}; expected a positive number of frames per second.")
    return rates


def _same_rate(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-6)  # a float32 29.97 is 29.97


def _pad_to(values: np.ndarray, length: int, fill: float) -> np.ndarray:
    width = [(0, length - len(values))] + [(0, 0)] * (values.ndim - 1)
    return np.pad(values, width, constant_values=fill)


__all__ = ["PoseNormalizer", "interpolate", "to_numpy"]
