"""Pose reconstruction error as an `evaluate` metric: `evaluate.load("metrics/pose_reconstruction")`."""

from typing import Any

import datasets
import evaluate
import torch

from modeling_pose_tokenizer.metrics import ReconstructionMetrics, reference_scale
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton

_DESCRIPTION = """
How far reconstructed pose sequences lie from their originals: MPJPE, MSE, MAE, RMSE, PCK, velocity and acceleration
error in shoulder widths, overall, per part of the body and per keypoint, over keypoints that the reference shows.
The definitions stand in `modeling_pose_tokenizer.metrics`.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: a list of sequences, each (T, N, D): frames, keypoints, coordinates and the confidence last.
    references: the originals, in the same order and of the same shapes and units.
    skeleton: name of the layout; default "coco_wholebody_133".
    scale: per sequence, the length of one shoulder width in the units of the poses; 1.0 for poses that are in shoulder
        widths already. Default: measured on each reference, as the median distance of the layout's shoulders.
    confidence_threshold: least reference confidence of a keypoint that counts; default 0.3.
Returns:
    "overall", "parts" and "per_keypoint", in shoulder widths; "input_units", the same in units of the poses; "data".
Example:
    >>> metric = evaluate.load("metrics/pose_reconstruction")
    >>> metric.compute(predictions=reconstructed, references=originals)["parts"]["left_hand"]["mpjpe"]
"""


class PoseReconstruction(evaluate.Metric):
    """`ReconstructionMetrics` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        pose = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))  # (T, N, D)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": pose, "references": pose}),
        )

    def _compute(
        self,
        predictions: list[Any],
        references: list[Any],
        skeleton: str = "coco_wholebody_133",
        scale: list[float] | None = None,
        confidence_threshold: float = 0.3,
    ) -> dict[str, Any]:
        layout = get_skeleton(skeleton)
        metrics = ReconstructionMetrics(layout, confidence_threshold=confidence_threshold)
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            prediction, reference = torch.tensor(prediction)[None], torch.tensor(reference)[None]  # (1, T, N, D)
            if scale is None:
                unit = reference_scale(reference, layout, confidence_threshold=confidence_threshold)
            else:
                unit = torch.tensor([scale[index]], dtype=torch.float64)
            # only the coordinates have a length: the confidence stays
            metrics.update(
                torch.cat([prediction[..., :-1] / unit, prediction[..., -1:]], -1),
                torch.cat([reference[..., :-1] / unit, reference[..., -1:]], -1),
                scale=unit,
            )
        result = metrics.compute()
        del result["tokens"]  # a metric of poses sees none
        return result
