"""Raw keypoints -> model input, and back to the input's own coordinates, frame rate and length.

Letters: B batch, T frames, N keypoints, D values per keypoint (x, y[, z], confidence last).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

from .skeleton_pose_tokenizer import SKELETONS, Skeleton, build_skeleton, get_skeleton

Array = np.ndarray | torch.Tensor
Placement = tuple[np.ndarray, float]  # centre (D-1,), scale

# Coordinates further than this many times the median distance from the median point are wreckage (1e30 from a
# diverged estimator), not motion: they go before anything is measured. Real outliers stay far below it.
_WRECK_FACTOR = 1e4
# How far a keypoint may lie from the origin, in units of the reference pair. Two of the demo's 426 training recordings
# have hands at 27 shoulder widths, enough to drag codebooks along; a custom layout's unit may be any.
_NAMED_BOUND, _CUSTOM_BOUND = 10.0, 100.0
# A reference pair closer together than this share of the median distance cannot be a unit of length.
_DEGENERATE_FACTOR = 1e-6


class PoseFeatureExtractor(SequenceFeatureExtractor):
    """Normalises pose sequences for `PoseTokenizerModel` and brings its output back.

    Each sequence is moved and scaled once, as a whole (aspect ratio and motion stay): the origin becomes the midpoint
    of the layout's reference pair (the shoulders), the unit their distance, both as medians over the frames that show
    the pair. Without any such frame the sequence is laid on the stored mean pose, and without a mean its own extent
    is the unit. A keypoint is missing when its confidence is under `confidence_threshold`, when a value of it is NaN
    or infinite, or when it lies further than `coordinate_bound` from the origin; missing keypoints are all zeros.

    Args:
        skeleton (`str`, *optional*, defaults to `"coco_wholebody_133"`): A named layout; ignored when
            `keypoint_names` describes a custom one.
        keypoint_names, edges, parts, flip_pairs, scale_pair: A custom layout, as for `build_skeleton`.
        keypoint_dim (`int`, *optional*, defaults to 3): D, values per keypoint, confidence last.
        sampling_rate (`float`, *optional*, defaults to 25.0): Frames per second that the model sees.
        confidence_threshold (`float`, *optional*, defaults to 0.3): Confidence under which a keypoint is missing.
        mean (`list`, *optional*): (N, D-1) mean pose in units of the reference pair; None where never observed.
        std (`list`, *optional*): (N, D-1) standard deviation beside it.
        coordinate_bound (`float`, *optional*): Largest distance from the origin, per axis. By default 10 for named
            layouts (a standing person reaches 5; beyond it lies what an estimator threw away) and 100 for custom ones.
        padding_value (`float`, *optional*, defaults to 0.0): Value of padded frames.

    Example:

    ```python
    >>> inputs = feature_extractor(poses, fps=30, return_tensors="pt")
    >>> outputs = model(inputs["input_values"], inputs["padding_mask"])
    >>> reconstructions = feature_extractor.postprocess(outputs.pose_values, inputs)
    ```
    """

    model_input_names = ["input_values", "padding_mask"]

    def __init__(
        self,
        skeleton: str | None = "coco_wholebody_133",
        keypoint_names: Sequence[str] | None = None,
        edges: Sequence[Sequence[int]] | None = None,
        parts: dict[str, Any] | None = None,
        flip_pairs: Sequence[Sequence[int]] | None = None,
        scale_pair: Sequence[int] | None = None,
        keypoint_dim: int = 3,
        sampling_rate: float = 25.0,
        confidence_threshold: float = 0.3,
        mean: Sequence[Sequence[float | None]] | None = None,
        std: Sequence[Sequence[float | None]] | None = None,
        coordinate_bound: float | None = None,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.skeleton = skeleton if keypoint_names is None else None
        self.keypoint_names = keypoint_names
        self.edges = edges
        self.parts = parts
        self.flip_pairs = flip_pairs
        layout = self._build_layout(scale_pair)
        self.num_keypoints = layout.num_keypoints
        self.scale_pair = None if layout.scale_pair is None else list(layout.scale_pair)
        self.keypoint_dim = keypoint_dim
        self.confidence_threshold = confidence_threshold
        self.coordinate_bound = coordinate_bound or (_CUSTOM_BOUND if self.skeleton is None else _NAMED_BOUND)
        if keypoint_dim < 3:
            raise ValueError(f"keypoint_dim is {keypoint_dim}; expected at least 3 (x, y, confidence).")
        if not (math.isfinite(sampling_rate) and sampling_rate > 0):
            raise ValueError(f"sampling_rate is {sampling_rate}; expected a positive number of frames per second.")
        self.mean = self._statistic("mean", mean)
        self.std = self._statistic("std", std)
        for derived in ("feature_size", "num_keypoints"):  # written by save_pretrained, recomputed here
            kwargs.pop(derived, None)
        super().__init__(
            feature_size=self.num_keypoints * keypoint_dim,
            sampling_rate=sampling_rate,  # type: ignore[arg-type]  # frames per second need not be whole
            padding_value=padding_value,
            **kwargs,
        )

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> "PoseFeatureExtractor":
        """Returns the feature extractor that matches a `PoseTokenizerConfig`; `kwargs` override its fields."""
        values = config.skeleton_fields()
        if config.skeleton is None:
            values["keypoint_names"] = list(config.layout.keypoint_names)  # the configuration may leave them out
        values |= {"sampling_rate": config.sampling_rate, "confidence_threshold": config.confidence_threshold}
        return cls(**(values | kwargs))

    @property
    def layout(self) -> Skeleton:
        """The skeleton whose keypoints the poses hold."""
        return self._build_layout(self.scale_pair)

    def _build_layout(self, scale_pair: Sequence[int] | None) -> Skeleton:
        if self.keypoint_names is None:
            if self.skeleton is None:
                raise ValueError("skeleton is None and keypoint_names is not given; expected one of the two.")
            layout = get_skeleton(self.skeleton)
            if scale_pair is not None and tuple(scale_pair) != layout.scale_pair:
                raise ValueError(
                    f"scale_pair is {tuple(scale_pair)}, but the layout {self.skeleton} has {layout.scale_pair};"
                    " leave scale_pair out, or give a custom layout with keypoint_names."
                )
            return layout
        return build_skeleton(
            self.keypoint_names, self.edges or (), self.parts, self.flip_pairs or (), scale_pair=scale_pair
        )

    def _statistic(self, name: str, values: Any) -> list[list[float | None]] | None:
        """(N, D-1) values as JSON keeps them: rounded, None where a keypoint was never observed."""
        if values is None:
            return None
        array = np.asarray(values, dtype=np.float64)
        expected = (self.num_keypoints, self.keypoint_dim - 1)
        if array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}; expected {expected} (keypoints, coordinates).")
        return [[round(v, 6) if math.isfinite(v) else None for v in row] for row in array.tolist()]

    # ---- statistics -------------------------------------------------------------------------------------------

    def fit(self, samples: Iterable[tuple[Array, Array | None]]) -> "PoseFeatureExtractor":
        """Measures the mean pose and its deviation over training sequences and stores them.

        Args:
            samples: Pairs of poses (T, N, D) and a mask (T,) of valid frames, or None for all.

        Returns:
            The feature extractor itself.

        Raises:
            ValueError: When no sequence shows the reference pair (or, for a layout without one, any keypoint).
        """
        count = np.zeros((self.num_keypoints, 1))
        total = np.zeros((self.num_keypoints, self.keypoint_dim - 1))
        squares = np.zeros_like(total)
        # A mean from an earlier fit must not shape the new one: only sequences with their own unit are counted.
        place = self._extent_placement if self.scale_pair is None else self._pair_placement
        for poses, mask in samples:
            points, _, observed = self._read(poses)
            if mask is not None:
                if len(mask) != len(points):
                    raise ValueError(f"mask has {len(mask)} frames; expected {len(points)}, as the poses have.")
                observed &= _to_numpy(mask).astype(bool)[:, None]
            placement = place(points, observed)
            if placement is None:
                continue
            points, observed = self._apply(points, observed, placement)
            count += observed.sum(0)[:, None]
            total += points.sum(0)
            squares += (points**2).sum(0)
        if not count.any():
            raise ValueError("no sequence shows the layout's reference pair; expected at least one to fit on.")
        with np.errstate(invalid="ignore"):  # 0 / 0 where a keypoint never appears: stored as None
            mean = total / count
            std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
        self.mean, self.std = self._statistic("mean", mean), self._statistic("std", std)
        return self

    # ---- normalise and its inverse ------------------------------------------------------------------------------

    def __call__(
        self,
        poses: Array | Sequence[Array],
        fps: float | Sequence[float | None] | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Normalises one sequence or several.

        Args:
            poses: (T, N, D) array, numpy or torch, or a list of such arrays of any lengths. Raw coordinates.
            fps: Frames per second of the input, one for all or one each; None: already at `sampling_rate`.
            padding: True or "longest" pads to the longest sequence; False or "do_not_pad" returns lists of arrays.
            return_tensors: "pt" for torch tensors, "np" or None for numpy arrays.

        Returns:
            BatchFeature with `input_values` (B, T, N, D) float32 and `padding_mask` (B, T) int64 (1 = real frame),
            and for `postprocess`: `center` (B, D-1), `scale` (B,), `fps` (B,) and `num_frames` (B,) of the input.

        Raises:
            ValueError: When a sequence has another N or D, no frame or no numbers, or when fps is not positive.
        """
        sequences = _as_list(poses)
        rates = _as_rates(fps, len(sequences), float(self.sampling_rate))
        features = [self._normalise(sequence, rate) for sequence, rate in zip(sequences, rates, strict=True)]
        return self.pad(features, padding=padding, return_tensors=return_tensors)

    def postprocess(self, pose_values: Array | Sequence[Array], inputs: Any) -> list[np.ndarray]:
        """Brings model output back to where its input came from: coordinates, frame rate and length.

        Args:
            pose_values: (B, T, N, D) normalised poses, or a list of (T, N, D); longer than the sequence is fine.
            inputs: What `__call__` returned, or a mapping with its `center`, `scale`, `fps` and `num_frames`.

        Returns:
            One (num_frames, N, D) float32 array per sequence, confidence in [0, 1]. A keypoint of confidence 0 has
            coordinates 0, as in pose files.
        """
        center, scale, fps, num_frames = (_to_numpy(inputs[key]) for key in ("center", "scale", "fps", "num_frames"))
        sequences = _as_list(pose_values)
        if len(sequences) != len(scale):
            raise ValueError(f"pose_values holds {len(sequences)} sequences; expected {len(scale)}, as inputs does.")
        results = []
        for index, sequence in enumerate(sequences):
            frames, rate = int(num_frames[index]), float(fps[index])
            length = self.resampled_length(frames, rate)
            if len(sequence) < length:
                raise ValueError(f"pose_values[{index}] has {len(sequence)} frames; expected at least {length}.")
            points, confidence, observed = self._read(sequence[:length])
            if not _same_rate(rate, float(self.sampling_rate)):
                times = np.arange(frames) * (self.sampling_rate / rate)
                points, confidence, observed = _interpolate(points, confidence, observed, times)
            points = points * float(scale[index]) + center[index].astype(np.float64)
            points[confidence <= 0] = 0.0
            results.append(np.concatenate([points, confidence[..., None]], -1).astype(np.float32))
        return results

    def resampled_length(self, num_frames: int, fps: float | None) -> int:
        """Frames at `sampling_rate` of a sequence of `num_frames` at `fps`; at least 1."""
        if fps is None or _same_rate(fps, float(self.sampling_rate)):
            return num_frames
        return round((num_frames - 1) * self.sampling_rate / float(np.float32(fps))) + 1

    def pad(  # type: ignore[override]  # the parent pads (T, C) features and knows no postprocess keys
        self,
        processed_features: Sequence[dict[str, Any]],
        padding: bool | str = True,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Joins sequences to a batch; `input_values` (T, N, D) is padded on the right, the mask tells where.

        Args:
            processed_features: One mapping per sequence, all with the same keys.
            padding: As in `__call__`.
            return_tensors: As in `__call__`.

        Returns:
            BatchFeature of stacked arrays; with `padding=False` a list of arrays for every key with a time axis.
        """
        if padding not in (True, False, "longest", "do_not_pad"):
            raise ValueError(f"padding is {padding!r}; expected True, 'longest', False or 'do_not_pad'.")
        if return_tensors not in (None, "np", "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; expected 'pt', 'np' or None.")
        batch: dict[str, Any] = {key: [f[key] for f in processed_features] for key in processed_features[0]}
        lengths = [len(values) for values in batch["input_values"]]
        for key, fill in (("input_values", self.padding_value), ("padding_mask", 0)):
            if padding in (True, "longest") or len(set(lengths)) == 1:
                batch[key] = np.stack([_pad_to(values, max(lengths), fill) for values in batch[key]])
            elif return_tensors is not None:
                raise ValueError(f"sequences have {min(lengths)} to {max(lengths)} frames; expected padding=True.")
        for key in batch.keys() - {"input_values", "padding_mask"}:
            batch[key] = np.stack(batch[key])
        return BatchFeature(batch, tensor_type=return_tensors)

    def _normalise(self, poses: Array, fps: float) -> dict[str, Any]:
        points, confidence, observed = self._read(poses)
        placement = self._place(points, observed)
        num_frames = len(points)
        points, observed = self._apply(points, observed, placement)
        if not _same_rate(fps, float(self.sampling_rate)):
            times = np.arange(self.resampled_length(num_frames, fps)) * (fps / self.sampling_rate)
            points, confidence, observed = _interpolate(points, confidence, observed, times)
        values = np.concatenate([points, confidence[..., None]], -1)  # (T, N, D)
        return {
            "input_values": np.where(observed[..., None], values, 0.0).astype(np.float32),
            "padding_mask": np.ones(len(values), dtype=np.int64),
            "center": placement[0].astype(np.float32),
            "scale": np.float32(placement[1]),
            "fps": np.float32(fps),
            "num_frames": np.int64(num_frames),
        }

    def _read(self, poses: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checks one sequence; returns points (T, N, D-1), confidence (T, N) in [0, 1], observed (T, N) bool."""
        array = _to_numpy(poses)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"poses have dtype {array.dtype}; expected numbers.")
        if array.ndim != 3:
            raise ValueError(f"poses have shape {array.shape}; expected (frames, keypoints, values).")
        num_frames, num_keypoints, keypoint_dim = array.shape
        if num_frames == 0:
            raise ValueError("poses have no frames; expected at least one.")
        if num_keypoints != self.num_keypoints:
            known = [name for name, layout in SKELETONS.items() if layout.num_keypoints == num_keypoints]
            hint = f" ({num_keypoints} is the layout {' or '.join(known)})" if known else ""
            raise ValueError(
                f"poses have {num_keypoints} keypoints; the layout {self.skeleton or 'given in keypoint_names'}"
                f" has {self.num_keypoints}{hint}."
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


def _interpolate(
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


def _to_numpy(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
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


PoseFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["PoseFeatureExtractor"]
