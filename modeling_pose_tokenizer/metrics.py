"""How far a reconstruction lies from its original, and what the tokens in between cost.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last), Q codebooks, K codebook size, S code
steps, M pck thresholds.

A keypoint is *scored* in a frame when the frame is not padding, the reference confidence reaches the threshold and the
reference coordinates are finite. What the reconstruction says about a keypoint that the reference lacks is not judged.
All means are micro-averages over scored keypoints: a long sequence weighs as much as its keypoints.

Over the scored keypoints, with e = reconstruction - reference (a vector of D - 1 coordinates):

==================  =====================================================  ====================  ====================
key                 definition                                             unit                  source
==================  =====================================================  ====================  ====================
mpjpe               mean of |e|, the Euclidean distance                    shoulder widths       Ionescu et al. 2014
mse                 mean of e squared, over keypoints and coordinates      shoulder widths^2     textbook
mae                 mean of abs(e), over keypoints and coordinates         shoulder widths       textbook
rmse                square root of mse                                     shoulder widths       textbook
pck@a               share of keypoints with |e| <= a shoulder widths       share, 0 to 1         Yang & Ramanan 2013
velocity_error      mean of |e[t] - e[t-1]| over pairs of frames in        shoulder widths per   arXiv 1811.11742
                    which the keypoint is scored twice in a row            frame                 (MPJVE)
acceleration_error  mean of |e[t+1] - 2 e[t] + e[t-1]| over triples of     shoulder widths per   arXiv 1812.01601
                    frames in which it is scored three times in a row      frame^2
==================  =====================================================  ====================  ====================

Of the tokens:

====================  ===============================================================================  ===============
key                   definition                                                                       unit
====================  ===============================================================================  ===============
codebook_utilization  per codebook, the share of its K codes that were used at least once              share, 0 to 1
perplexity            per codebook, exp of the entropy of its codes: how many equally frequent codes   codes, 1 to K
                      would be as varied (arXiv 1711.00937)
quantization_error    mean squared difference between latent and quantized latent, as the model        latent units^2
                      reports it, weighted by valid code steps
compression_ratio     bits of the input's coordinates as float32, 32 N (D - 1) per frame, over the     ratio
                      tokens' bits per frame; confidences are not counted, though the tokens carry them
beam_size             paths of codes that the search for them went on with; 1: the nearest           paths
bits_per_frame        bits of all codebooks per input frame at the model's sampling rate               bits / frame
bitrate               bits per second                                                                  bits / s
token_rate            tokens of all codebooks per second                                               tokens / s
====================  ===============================================================================  ===============
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    import numpy as np

    from .configuration_pose_tokenizer import PoseTokenizerConfig
    from .skeleton_pose_tokenizer import Skeleton

    ArrayLike = torch.Tensor | np.ndarray

__all__ = ["DISTANCE_KEYS", "PCK_THRESHOLDS", "ReconstructionMetrics", "reference_scale"]

PCK_THRESHOLDS = (0.05, 0.1, 0.2)
DISTANCE_KEYS = ("mpjpe", "mse", "mae", "rmse", "velocity_error", "acceleration_error")
# Speeds of keypoints, in shoulder widths per second, between which errors are told apart; the last bin has no end.
SPEED_EDGES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
SHOULDER_WIDTHS, INPUT_UNITS = 0, 1


def ratio(total: float, count: float) -> float | None:
    """A mean for JSON: `None` where nothing was counted or the sum is not a finite number."""
    return total / count if count > 0 and math.isfinite(total) else None


def scored_keypoints(references: torch.Tensor, padding_mask: torch.Tensor | None, threshold: float) -> torch.Tensor:
    """Which keypoints of `references` (B, T, N, D) count: (B, T, N) bool."""
    # The comparison stays in the data's own precision, as in the model: float32(0.7) < 0.7 once widened.
    valid = (references[..., -1] >= threshold) & references.isfinite().all(-1)
    return valid if padding_mask is None else valid & padding_mask.bool()[..., None]


def reference_scale(
    references: ArrayLike, skeleton: Skeleton, padding_mask: ArrayLike | None = None, confidence_threshold: float = 0.3
) -> torch.Tensor:
    """The length of one shoulder width in the units of `references`: the median over frames that show both shoulders.

    Args:
        references: (B, T, N, D) poses in any units, confidence last.
        skeleton: the layout; its `scale_pair` names the two keypoints.
        padding_mask: (B, T), 1 on real frames.
        confidence_threshold: least confidence of a visible keypoint.

    Returns:
        (B,) float64.

    Raises:
        ValueError: the layout has no scale pair, or a sequence never shows both of its keypoints apart.
    """
    if skeleton.scale_pair is None:
        raise ValueError(f"The layout {skeleton.name!r} has no scale_pair to measure lengths by; pass scale= instead.")
    references = torch.as_tensor(references)
    mask = None if padding_mask is None else torch.as_tensor(padding_mask)
    pair = list(skeleton.scale_pair)
    visible = scored_keypoints(references, mask, confidence_threshold)[:, :, pair].all(-1)  # (B, T)
    left, right = references[:, :, pair, :-1].double().unbind(2)  # (B, T, D - 1) each
    widths = (left - right).norm(dim=-1)
    scales = [row[seen & (row > 0)].quantile(0.5).item() if (seen & (row > 0)).any() else math.nan
              for row, seen in zip(widths, visible, strict=True)]  # fmt: skip
    if any(math.isnan(scale) for scale in scales):
        names = " and ".join(skeleton.keypoint_names[index] for index in pair)
        index = next(index for index, scale in enumerate(scales) if math.isnan(scale))
        raise ValueError(
            f"Sequence {index} never shows {names} apart, so it has no unit of length; pass scale= instead."
        )
    return torch.tensor(scales, dtype=torch.float64)


class MetricSums:
    """Sums and counts in float64, which add up over batches and ranks.

    Args:
        shapes: name -> shape of what is summed up.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._state = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def merge(self, other: Self) -> None:
        """Adds what another object of the same layout and configuration has counted."""
        for name, value in other._state.items():
            self._state[name] += value

    def reduce(self) -> Self:
        """A new object with the totals over all ranks of the `torch.distributed` job (a plain copy outside of one)."""
        total = copy.copy(self)
        flat = torch.cat([value.flatten() for value in self._state.values()])
        if dist.is_available() and dist.is_initialized():
            flat = flat.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(flat)
        sizes = [value.numel() for value in self._state.values()]
        parts = zip(self._state.items(), flat.cpu().split(sizes), strict=True)
        total._state = {name: part.view_as(value).clone() for (name, value), part in parts}
        return total

    def reset(self) -> None:
        """Forgets everything counted so far."""
        for value in self._state.values():
            value.zero_()


class ReconstructionMetrics(MetricSums):
    """Reconstruction and token metrics of the module's tables, exact over batches, objects and ranks.

    Only sums and counts are kept, in float64: updating in any batching, merging objects and reducing over ranks give
    the same figures as one pass over everything.

    Args:
        skeleton: the layout; its token groups are the `parts`.
        config: the model's configuration, for the `tokens` figures and the confidence threshold. Without it the
            reconstruction alone is measured and the `tokens` figures are `None`.
        confidence_threshold: least reference confidence of a scored keypoint; default the configuration's, else 0.3.

    Example:
        >>> metrics = ReconstructionMetrics(model.config.layout, model.config)
        >>> for batch in batches:
        ...     output = model(**batch)
        ...     metrics.update(output.pose_values, batch["input_values"], batch["padding_mask"])
        >>> metrics.reduce().compute()["parts"]["left_hand"]["mpjpe"]
    """

    def __init__(
        self,
        skeleton: Skeleton,
        config: PoseTokenizerConfig | None = None,
        confidence_threshold: float | None = None,
    ) -> None:
        if confidence_threshold is None:
            confidence_threshold = 0.3 if config is None else config.confidence_threshold
        self.skeleton = skeleton
        self.config = config
        self.confidence_threshold = confidence_threshold
        num_keypoints = len(skeleton.keypoint_names)
        codes_shape = (0, 0) if config is None else (config.num_codebooks, config.codebook_size)
        shapes: dict[str, tuple[int, ...]] = {
            "points": (num_keypoints,),
            "pairs": (num_keypoints,),
            "triples": (num_keypoints,),
            # sums over scored keypoints, in shoulder widths and in input units
            "distance": (2, num_keypoints),
            "squared": (2, num_keypoints),
            "absolute": (2, num_keypoints),
            "velocity": (2, num_keypoints),
            "acceleration": (2, num_keypoints),
            "hits": (len(PCK_THRESHOLDS), num_keypoints),
            # by bins of the original's speed, where the frame rate is known
            "speed_points": (len(SPEED_EDGES) + 1, num_keypoints),
            "speed_distance": (len(SPEED_EDGES) + 1, num_keypoints),
            "codes": codes_shape,
            "quantization": (2,),  # weighted sum, weight
            "data": (2,),  # sequences, frames
        }
        super().__init__(shapes)

    def update(
        self,
        predictions: ArrayLike,
        references: ArrayLike,
        padding_mask: ArrayLike | None = None,
        scale: ArrayLike | Sequence[float] | None = None,
    ) -> None:
        """Adds reconstructions of a batch.

        Args:
            predictions: (B, T, N, D) reconstructed poses in shoulder widths; only coordinates are read. A coordinate
                that is not finite makes the distances it enters `None` and misses every pck: it is never left out.
            references: (B, T, N, D) the original poses in shoulder widths, confidence last.
            padding_mask: (B, T), 1 on real frames; a row without any is filler and not a sequence. Default: all real.
            scale: (B,) the length of one shoulder width in input units, for the figures in input units; without it
                they are `None`.

        Raises:
            ValueError: the shapes do not agree with each other or with the layout.
        """
        predictions, references = torch.as_tensor(predictions).cpu(), torch.as_tensor(references).cpu()
        num_keypoints = len(self.skeleton.keypoint_names)
        if predictions.shape != references.shape or references.ndim != 4 or references.shape[2] != num_keypoints:
            raise ValueError(
                f"Metrics compare two arrays of shape (B, T, {num_keypoints}, D), but the predictions have the shape "
                f"{tuple(predictions.shape)} and the references {tuple(references.shape)}."
            )
        batch, frames = references.shape[:2]
        mask = torch.ones(batch, frames) if padding_mask is None else torch.as_tensor(padding_mask).cpu()
        if mask.shape != (batch, frames):
            raise ValueError(f"padding_mask has the shape {tuple(mask.shape)}, but the poses need {(batch, frames)}.")
        lengths = torch.as_tensor([math.nan] * batch if scale is None else scale).to("cpu", torch.float64)  # (B,)
        if lengths.shape != (batch,):
            raise ValueError(f"scale has the shape {tuple(lengths.shape)}, but a batch of {batch} needs {(batch,)}.")
        units = torch.stack([torch.ones_like(lengths), lengths])  # (2, B)

        scored = scored_keypoints(references, mask, self.confidence_threshold)  # (B, T, N)
        pairs = scored[:, 1:] & scored[:, :-1]
        triples = pairs[:, 1:] & pairs[:, :-1]
        error = predictions[..., :-1].double() - references[..., :-1].double()
        error = torch.where(scored[..., None], error, 0.0)  # (B, T, N, D - 1)
        velocity = error[:, 1:] - error[:, :-1]
        acceleration = velocity[:, 1:] - velocity[:, :-1]
        distance = error.norm(dim=-1)  # (B, T, N)

        sums = {
            "points": scored.sum((0, 1)),
            "pairs": pairs.sum((0, 1)),
            "triples": triples.sum((0, 1)),
            "distance": torch.einsum("ub,btn->un", units, distance),
            "squared": torch.einsum("ub,btn->un", units.square(), error.square().mean(-1)),
            "absolute": torch.einsum("ub,btn->un", units, error.abs().mean(-1)),
            "velocity": torch.einsum("ub,btn->un", units, torch.where(pairs, velocity.norm(dim=-1), 0.0)),
            "acceleration": torch.einsum("ub,btn->un", units, torch.where(triples, acceleration.norm(dim=-1), 0.0)),
            "hits": torch.stack([((distance <= a) & scored).sum((0, 1)) for a in PCK_THRESHOLDS]),  # (M, N)
            "data": torch.stack([mask.bool().any(1).sum(), mask.bool().sum()]),
        }
        if self.config is not None:
            steps = (references[:, 1:, :, :-1].double() - references[:, :-1, :, :-1].double()).norm(dim=-1)
            bins = torch.bucketize(steps * self.config.sampling_rate, torch.tensor(SPEED_EDGES, dtype=torch.float64))
            here = [pairs & (bins == number) for number in range(len(SPEED_EDGES) + 1)]  # (B, T - 1, N) each
            sums["speed_points"] = torch.stack([each.sum((0, 1)) for each in here])
            sums["speed_distance"] = torch.stack([torch.where(e, distance[:, 1:], 0.0).sum((0, 1)) for e in here])
        for name, value in sums.items():
            self._state[name] += value

    def update_codes(
        self,
        pose_codes: ArrayLike,
        codes_mask: ArrayLike | None = None,
        quantization_error: torch.Tensor | float | None = None,
    ) -> None:
        """Adds the codes of a batch.

        Args:
            pose_codes: (B, Q, S) integers in [0, K).
            codes_mask: (B, S), 1 where the step is real. Default: all real.
            quantization_error: the model's mean over the real steps of this batch.

        Raises:
            ValueError: the object was made without a configuration, or codes and configuration disagree.
        """
        if self.config is None:
            raise ValueError("Codes need the model's configuration: make ReconstructionMetrics(skeleton, config).")
        codes = torch.as_tensor(pose_codes).cpu().long()
        num_codebooks, codebook_size = self._state["codes"].shape
        if codes.ndim != 3 or codes.shape[1] != num_codebooks:
            raise ValueError(f"pose_codes has the shape {tuple(codes.shape)}; expected (B, {num_codebooks}, S).")
        mask = torch.ones(len(codes), codes.shape[2]) if codes_mask is None else torch.as_tensor(codes_mask).cpu()
        kept = codes.transpose(1, 2)[mask.bool()]  # (real steps, Q)
        if kept.numel() and not 0 <= kept.min() <= kept.max() < codebook_size:
            raise ValueError(f"pose_codes lie in [{kept.min()}, {kept.max()}]; expected [0, {codebook_size}).")
        offsets = torch.arange(num_codebooks) * codebook_size  # one bincount for all codebooks
        counts = torch.bincount((kept + offsets).flatten(), minlength=num_codebooks * codebook_size)
        self._state["codes"] += counts.view(num_codebooks, codebook_size)
        if quantization_error is not None and len(kept):
            weighted = [float(quantization_error) * len(kept), len(kept)]
            self._state["quantization"] += torch.tensor(weighted, dtype=torch.float64)

    @property
    def code_counts(self) -> torch.Tensor:
        """(Q, K) int64, how often each code of each codebook was seen."""
        return self._state["codes"].long()

    def summary(self, keypoints: Sequence[int] | None = None, unit: int = SHOULDER_WIDTHS) -> dict[str, float | None]:
        """The reconstruction metrics over some keypoints (default all), in shoulder widths or input units.

        pck is given in shoulder widths only, for its thresholds are.
        """
        index = list(range(len(self.skeleton.keypoint_names))) if keypoints is None else list(keypoints)

        def mean(name: str, counts: str) -> float | None:
            return ratio(self._state[name][unit, index].sum().item(), self._state[counts][index].sum().item())

        mse = mean("squared", "points")
        result = {"mpjpe": mean("distance", "points"), "mse": mse, "mae": mean("absolute", "points")}
        result["rmse"] = None if mse is None else math.sqrt(mse)
        if unit == SHOULDER_WIDTHS:
            points = self._state["points"][index].sum().item()
            hits = self._state["hits"][:, index].sum(1).tolist()
            result |= {f"pck@{a}": ratio(hit, points) for a, hit in zip(PCK_THRESHOLDS, hits, strict=True)}
        result["velocity_error"] = mean("velocity", "pairs")
        result["acceleration_error"] = mean("acceleration", "triples")
        return result

    def count_points(self, keypoints: Sequence[int] | None = None) -> int:
        """How often some keypoints (default all) were scored."""
        points = self._state["points"]
        return int((points if keypoints is None else points[list(keypoints)]).sum().item())

    def hand_error(self) -> float | None:
        """mpjpe over the keypoints of all hands, in shoulder widths; over all keypoints where there are no hands."""
        hands = [group for group in self.skeleton.groups if "hand" in group]
        return self.summary([k for group in hands for k in self.skeleton.group_keypoints[group]] or None)["mpjpe"]

    def by_speed(self, keypoints: Sequence[int]) -> list[dict[str, float | int | None]]:
        """mpjpe over frames in which a keypoint of the original moves `from` so many shoulder widths per second `to`
        so many, since the frame before; without a configuration nothing is counted."""
        index = list(keypoints)
        counts = self._state["speed_points"][:, index].sum(1).tolist()
        totals = self._state["speed_distance"][:, index].sum(1).tolist()
        return [
            {"from": start, "to": stop, "mpjpe": ratio(total, count), "count": int(count)}
            for start, stop, total, count in zip(
                (0.0, *SPEED_EDGES), (*SPEED_EDGES, None), totals, counts, strict=True
            )
        ]

    def compute(self) -> dict[str, Any]:
        """All figures as plain numbers for JSON; `None` wherever nothing was counted or a figure is not finite.

        Returns:
            `{"overall", "parts": {group: ...}, "per_keypoint": {name: ...}}` in shoulder widths, `"input_units"` with
            the same three in the units of the input files, `"by_speed"` (group -> bins), `"tokens"` (its lists in
            codebook order, level-major, as named by `codebooks`) and `"data"`.
        """

        def tables(unit: int) -> dict[str, Any]:
            groups: Mapping[str, Sequence[int]] = self.skeleton.group_keypoints
            return {
                "overall": self.summary(unit=unit),
                "parts": {group: self.summary(keypoints, unit) for group, keypoints in groups.items()},
                "per_keypoint": {name: self.summary([i], unit) for i, name in enumerate(self.skeleton.keypoint_names)},
            }

        sequences, frames = self._state["data"].long().tolist()
        return {
            **tables(SHOULDER_WIDTHS),
            "input_units": tables(INPUT_UNITS),
            "by_speed": {
                group: self.by_speed(keypoints) for group, keypoints in self.skeleton.group_keypoints.items()
            },
            "tokens": self._compute_tokens(),
            "data": {
                "sequences": sequences,
                "frames": frames,
                "keypoints_scored": int(self._state["points"].sum().item()),
            },
        }

    def _compute_tokens(self) -> dict[str, Any]:
        config = self.config
        utilization: list[float | None] = []
        perplexity: list[float | None] = []
        for counts in self._state["codes"]:  # (K,)
            total = counts.sum().item()
            share = counts / max(total, 1.0)
            utilization.append((counts > 0).double().mean().item() if total else None)
            # xlogy takes 0 log 0 as 0: an unused code has no surprise to add
            perplexity.append(torch.exp(-torch.special.xlogy(share, share).sum()).item() if total else None)
        coordinates = 0 if config is None else len(self.skeleton.keypoint_names) * (config.keypoint_dim - 1)
        return {
            "beam_size": None if config is None else config.beam_size,
            "bits_per_frame": None if config is None else config.bits_per_frame,
            "bitrate": None if config is None else config.bitrate,
            "token_rate": None if config is None else config.token_rate,
            "codebook_utilization": utilization,
            "perplexity": perplexity,
            "quantization_error": ratio(*self._state["quantization"].tolist()),
            "compression_ratio": None if config is None else 32 * coordinates / config.bits_per_frame,
            "codebooks": [] if config is None else [f"{group}/{level}" for group, level in config.codebook_index],
        }
