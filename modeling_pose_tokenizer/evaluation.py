"""What a trained tokenizer keeps of signing: the whole evaluation of a model on a split, and what it writes.

Letters: B batch, T frames, N keypoints, D values per keypoint, Q codebooks, K codebook size.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .dataset import PoseDataset, collate
from .hub import load_pretrained
from .metrics import ReconstructionMetrics
from .modeling_pose_tokenizer import PoseTokenizerModel
from .visualization import PosePair, replacing, write_report

__all__ = [
    "Evaluation",
    "OutputError",
    "evaluate_folder",
    "evaluate_model",
    "format_table",
    "representative_sequences",
]

# Frames per sequence of a micro-batch: 8 sequences of 64 frames encode fastest on a CPU, more thrash its cache.
FRAMES_PER_SEQUENCE = 64
# Ranks of the sequences that the report shows; of two or three sequences the first of these remain.
SHOWN_RANKS = {"Best": 0.0, "Worst": 1.0, "Median": 0.5, "First quartile": 0.25, "Third quartile": 0.75}


class OutputError(ValueError):
    """An output folder that cannot be written; `str` is one sentence with its path."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a dataset.

    Attributes:
        metrics: what `ReconstructionMetrics.compute` returns.
        sequences: one row per sequence, in the dataset's order: id, frames, and in shoulder widths mpjpe, hand_error
            and parts (group -> mpjpe).
        code_counts: (Q, K) how often each code was used.
    """

    metrics: dict[str, Any]
    sequences: list[dict[str, Any]]
    code_counts: np.ndarray


def micro_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of sequences of like length, at most `batch_size` of them and that many times 64 frames with padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # in ascending order the newcomer is the longest and sets the padded length
        fits = batches and (len(batches[-1]) + 1) * max(lengths[index], FRAMES_PER_SEQUENCE)
        if fits and fits <= batch_size * FRAMES_PER_SEQUENCE:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def evaluate_model(
    model: PoseTokenizerModel, dataset: PoseDataset, batch_size: int = 8, progress: bool = True
) -> Evaluation:
    """Encodes and decodes every sequence of a dataset of whole sequences and measures what came back.

    Args:
        model: in eval mode, on any device.
        dataset: with `sequence_length=None`, normalised by the model's own feature extractor.
        batch_size: sequences of 64 frames per step; longer ones count for more.
        progress: show a progress bar on stderr.
    """
    total = ReconstructionMetrics(model.config.layout, model.config)
    sequences: list[dict[str, Any]] = [{} for _ in range(len(dataset))]
    with tqdm(total=len(dataset), desc="evaluate", unit="seq", disable=not progress) as bar:
        for indices in micro_batches(dataset.lengths.tolist(), batch_size):
            batch = collate([dataset[index] for index in indices])
            values, mask = batch["input_values"], batch["padding_mask"]
            output = model(values.to(model.device), mask.to(model.device))
            total.update_codes(output.pose_codes, model.get_pose_codes_mask(mask), output.quantization_error)
            for row, index in enumerate(indices):
                one = ReconstructionMetrics(model.config.layout, model.config)
                span = slice(row, row + 1)
                one.update(output.pose_values[span], values[span], mask[span], batch["scale"][span])
                total.merge(one)
                sequences[index] = {"id": batch["id"][row], "frames": int(mask[row].sum()), **_errors(one)}
            bar.update(len(indices))
    return Evaluation(total.compute(), sequences, total.code_counts.numpy())


def _errors(metrics: ReconstructionMetrics) -> dict[str, Any]:
    groups = metrics.skeleton.group_keypoints
    return {
        "mpjpe": metrics.summary()["mpjpe"],
        "hand_error": metrics.hand_error(),
        "parts": {group: metrics.summary(keypoints)["mpjpe"] for group, keypoints in groups.items()},
    }


def representative_sequences(sequences: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Indices and labels of the sequences to look at: best, quartiles, median and worst by hand error.

    Where no hand is to be seen the error of the whole pose decides. Few sequences give fewer entries.
    """
    key = "hand_error" if any(row["hand_error"] is not None for row in sequences) else "mpjpe"
    order = sorted((i for i, row in enumerate(sequences) if row[key] is not None), key=lambda i: sequences[i][key])
    by_hands = key == "hand_error" and any("hand" in part for row in sequences for part in row["parts"])
    chosen: dict[int, str] = {}
    for label, rank in SHOWN_RANKS.items() if order else ():
        index = order[round(rank * (len(order) - 1))]
        chosen.setdefault(index, f"{label}, by hands" if by_hands else label)
    return {index: chosen[index] for index in order if index in chosen}


@torch.inference_mode()
def reconstruct(model: PoseTokenizerModel, item: dict[str, Any]) -> np.ndarray:
    """The reconstruction (T, N, D) of one item of a dataset, in shoulder widths."""
    batch = collate([item])
    output = model(batch["input_values"].to(model.device), batch["padding_mask"].to(model.device))
    return output.pose_values[0].float().cpu().numpy()


def write_evaluation_report(
    path: Path,
    model: PoseTokenizerModel,
    dataset: PoseDataset,
    evaluation: Evaluation,
    subtitle: str,
    y_up: bool = False,
) -> None:
    """Writes the HTML report with the representative sequences, which are reconstructed once more."""
    pairs = []
    for index, label in representative_sequences(evaluation.sequences).items():
        item, row = dataset[index], evaluation.sequences[index]
        poses = item["input_values"], reconstruct(model, item)
        pair = PosePair(row["id"], *poses, float(model.config.sampling_rate), label, row["parts"])
        pairs.append(pair.upside_down() if y_up else pair)
    write_report(
        path,
        pairs,
        model.config.layout,
        evaluation.metrics,
        evaluation.code_counts,
        subtitle=subtitle,
        confidence_threshold=model.config.confidence_threshold,
    )


def evaluate_folder(
    model: str,
    data: str,
    output: str,
    split: str = "test",
    batch_size: int = 8,
    visualize: bool = False,
    y_up: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on a data folder and writes the results.

    Args:
        model: checkpoint folder or repository on the Hub.
        data: folder that holds a folder per split.
        output: folder for `metrics.json`, `sequences.jsonl` (the error of each sequence), `rejected.jsonl` if a file
            could not be used, and with `visualize` `report/index.html`. It is made after model and data are read.
        split: which split.
        batch_size: sequences of 64 frames per step.
        visualize: write the report.
        y_up: the data's y axis points up.
        device: where to run; default the GPU if there is one.

    Returns:
        What `metrics.json` holds.

    Raises:
        ModelFolderError, PoseDataError, OutputError: one sentence on the model, the data or the output.
    """
    codec, feature_extractor = load_pretrained(model)
    codec = codec.float().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = PoseDataset(data, split, feature_extractor=feature_extractor)
    folder = Path(output)
    _check_writable(folder)
    evaluation = evaluate_model(codec, dataset, batch_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "sequences.jsonl") as partial:
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in evaluation.sequences)
            partial.write_text("".join(lines), encoding="utf-8")
        if dataset.rejected:
            dataset.write_rejected(folder)
        if visualize:
            (folder / "report").mkdir(exist_ok=True)
            subtitle = f"{model}, {data}, split {split}"
            write_evaluation_report(folder / "report" / "index.html", codec, dataset, evaluation, subtitle, y_up)
        with replacing(folder / "metrics.json") as partial:
            partial.write_text(json.dumps(evaluation.metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: the results cannot be written ({error.strerror or error}).") from error
    return evaluation.metrics


def _check_writable(folder: Path) -> None:
    """Finds out before the long work, and without leaving anything behind, whether `folder` can be made and filled."""
    parent = folder
    while not parent.exists():
        parent = parent.parent
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file")
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); give a folder you may write."
        ) from error


def format_table(metrics: dict[str, Any]) -> str:
    """The figures that a person looks at first: per part, in percent of shoulder width."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %"

    keys = {"error": "mpjpe", "within 5 %": "pck@0.05", "within 10 %": "pck@0.1", "velocity": "velocity_error"}
    blocks = {"overall": metrics["overall"], **metrics["parts"]}
    rows = [["part", *keys]] + [
        [name, *(percent(block[key]) for key in keys.values())] for name, block in blocks.items()
    ]
    tokens, data = metrics["tokens"], metrics["data"]
    lines = ["".join([f"{row[0]:<12}", *(f"{cell:>13}" for cell in row[1:])]) for row in rows]
    summary = (
        f"{data['sequences']} sequences, {data['frames']} frames; {tokens['bits_per_frame']:g} bits per frame, "
        f"{tokens['token_rate']:g} tokens per second, {tokens['compression_ratio']:.0f} times smaller than float32"
    )
    return os.linesep.join(["mean distance from the original, in percent of shoulder width", *lines, summary])
