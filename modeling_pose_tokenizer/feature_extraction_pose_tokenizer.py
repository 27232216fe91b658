"""Raw keypoints -> model input, and back to the input's own coordinates, frame rate and length.

Letters: B batch, T frames, N keypoints, D values per keypoint (x, y[, z], confidence last).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

from .normalization_pose_tokenizer import PoseNormalizer, to_numpy
from .skeleton_pose_tokenizer import Skeleton, build_skeleton, get_skeleton, likely_layout

Array = np.ndarray | torch.Tensor

# How far a keypoint may lie from the origin, in units of the reference pair. Two of the demo's 426 training recordings
# have hands at 27 shoulder widths, enough to drag codebooks along; a custom layout's unit may be any.
_NAMED_BOUND, _CUSTOM_BOUND = 10.0, 100.0


class PoseFeatureExtractor(PoseNormalizer, SequenceFeatureExtractor):
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
                observed &= to_numpy(mask).astype(bool)[:, None]
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
        return self.pad(self.features(poses, fps), padding=padding, return_tensors=return_tensors)

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
        lengths = [len(each["input_values"]) for each in processed_features]
        padded = padding in (True, "longest")
        if not padded and len(set(lengths)) > 1 and return_tensors is not None:
            raise ValueError(f"sequences have {min(lengths)} to {max(lengths)} frames; expected padding=True.")
        return BatchFeature(self.stack(processed_features, padded), tensor_type=return_tensors)

    def _likely_layout(self, num_keypoints: int) -> str:
        return likely_layout(num_keypoints)


PoseFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["PoseFeatureExtractor"]
