"""What a trained tokenizer keeps of signing: the whole evaluation of a model on a split, and what it writes.

Letters: B batch, T frames, N keypoints, D values per keypoint, Q codebooks, K codebook size.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from .dataset import PoseDataset, collate
from .extraction import process_state
from .figures import write_figures
from .hub import load_pretrained
from .metrics import ReconstructionMetrics
from .modeling_pose_tokenizer import PoseTokenizerModel
from .pose_pairs import PosePair, TokenStrip
from .report import write_report
from .sequences import replacing
from .shape_metrics import OVERALL, ShapeMetrics

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
# Sequences that are measured and written at a time, by one process; batches do not reach over them.
CHUNK_SEQUENCES = 32
# Ranks of the sequences that the report shows first; of two or three sequences the first of these remain.
SHOWN_RANKS = {"Best": 0.0, "Worst": 1.0, "Median": 0.5, "First quartile": 0.25, "Third quartile": 0.75}
# Rows of sequences.jsonl that the report looks through for the worst.
REPORTED_ROWS = 10_000


class OutputError(ValueError):
    """An output folder that cannot be written; `str` is one sentence with its path."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a dataset.

    Attributes:
        metrics: what `ReconstructionMetrics.compute` returns, with the figures of `ShapeMetrics.compute` in `overall`
            and `parts`, and `rate_distortion` if it was asked for: for each prefix of levels num_quantizers,
            bits_per_frame, overall and parts (group -> mpjpe).
        sequences: one row per sequence, in the dataset's order: id, frames, and in shoulder widths mpjpe, hand_error
            and parts (group -> mpjpe); `figures` has, of `overall` and each group, metric -> [mean, count].
        code_counts: (Q, K) how often each code was used.
    """

    metrics: dict[str, Any]
    sequences: Sequence[dict[str, Any]]
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


class _Totals:
    """All that is counted of a model: sums and counts, whatever the number of sequences."""

    def __init__(self, model: PoseTokenizerModel, rate_distortion: bool) -> None:
        self.config = config = model.config
        self.levels = list(range(1, config.num_levels)) if rate_distortion else []  # the last level is the whole
        self.rate_distortion = rate_distortion
        self.errors = ReconstructionMetrics(config.layout, config)
        self.shape = self._shape()
        self.prefixes = [ReconstructionMetrics(config.layout, config) for _ in self.levels]

    def _shape(self) -> ShapeMetrics:
        config = self.config
        return ShapeMetrics(
            config.layout, config.keypoint_dim - 1, config.sampling_rate, float(config.confidence_threshold)
        )

    def reduce(self) -> None:
        """Takes in what the other processes counted."""
        self.errors, self.shape = self.errors.reduce(), self.shape.reduce()
        self.prefixes = [prefix.reduce() for prefix in self.prefixes]

    def add_batch(self, model: PoseTokenizerModel, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Counts a batch of the dataset; returns a row for each sequence."""
        values, mask = batch["input_values"], batch["padding_mask"]
        output = model(values.to(model.device), mask.to(model.device))
        self.errors.update_codes(output.pose_codes, model.get_pose_codes_mask(mask), output.quantization_error)
        for level, prefix in zip(self.levels, self.prefixes, strict=True):
            poses = model.decode(output.pose_codes, mask.to(model.device), num_quantizers=level).pose_values
            assert poses is not None
            prefix.update(poses, values, mask)
        rows = []
        for row, name in enumerate(batch["id"]):
            span = slice(row, row + 1)
            errors, shape = ReconstructionMetrics(self.config.layout, self.config), self._shape()
            errors.update(output.pose_values[span], values[span], mask[span], batch["scale"][span])
            shape.update(output.pose_values[span], values[span], mask[span])
            self.errors.merge(errors)
            self.shape.merge(shape)
            rows.append({"id": name, "frames": int(mask[row].sum()), **_describe_sequence(errors, shape)})
        return rows

    def compute(self) -> dict[str, Any]:
        """What metrics.json holds."""
        metrics, shape = self.errors.compute(), self.shape.compute()
        metrics["overall"] |= shape["overall"]
        for group, figures in shape["parts"].items():
            metrics["parts"][group] |= figures
        if self.rate_distortion:
            every = zip([*self.levels, self.config.num_levels], [*self.prefixes, self.errors], strict=True)
            metrics["rate_distortion"] = [_rate(errors, level) for level, errors in every]
        return metrics


@torch.inference_mode()
def _measure(
    model: PoseTokenizerModel, dataset: PoseDataset, batch_size: int, totals: _Totals, chunk: range, bar: tqdm
) -> list[dict[str, Any]]:
    """Counts a chunk of a dataset; returns a row for each of its sequences, in their order."""
    rows: list[dict[str, Any]] = [{} for _ in chunk]
    for places in micro_batches(dataset.lengths[chunk.start : chunk.stop].tolist(), batch_size):
        batch = collate([dataset[chunk[place]] for place in places])
        for place, row in zip(places, totals.add_batch(model, batch), strict=True):
            rows[place] = row
        bar.update(len(places))
    return rows


def _chunks(dataset: PoseDataset) -> list[range]:
    count = len(dataset)
    return [range(start, min(start + CHUNK_SEQUENCES, count)) for start in range(0, count, CHUNK_SEQUENCES)]


def evaluate_model(
    model: PoseTokenizerModel,
    dataset: PoseDataset,
    batch_size: int = 8,
    progress: bool = True,
    rate_distortion: bool = False,
) -> Evaluation:
    """Encodes and decodes every sequence of a dataset of whole sequences and measures what came back.

    Args:
        model: in eval mode, on any device.
        dataset: with `sequence_length=None`, normalised by the model's own feature extractor.
        batch_size: sequences of 64 frames per step; longer ones count for more.
        progress: show a progress bar on stderr.
        rate_distortion: measure what every prefix of levels keeps, too.
    """
    totals = _Totals(model, rate_distortion)
    with tqdm(total=len(dataset), desc="evaluate", unit="seq", disable=not progress) as bar:
        chunks = [_measure(model, dataset, batch_size, totals, chunk, bar) for chunk in _chunks(dataset)]
    rows = [row for chunk in chunks for row in chunk]
    return Evaluation(totals.compute(), rows, totals.errors.code_counts.numpy())


def _rate(metrics: ReconstructionMetrics, levels: int) -> dict[str, Any]:
    """Error and bits of the first levels."""
    config = metrics.config
    assert config is not None
    tokens = sum(level < levels for _, level in config.codebook_index)
    bits = tokens * math.log2(config.codebook_size) / config.hop_length
    overall = metrics.summary()["mpjpe"]
    return {"num_quantizers": levels, "bits_per_frame": bits, "overall": overall, "parts": _part_errors(metrics)}


def _part_errors(metrics: ReconstructionMetrics) -> dict[str, float | None]:
    groups = metrics.skeleton.group_keypoints
    return {group: metrics.summary(keypoints)["mpjpe"] for group, keypoints in groups.items()}


def _describe_sequence(errors: ReconstructionMetrics, shape: ShapeMetrics) -> dict[str, Any]:
    """A row of sequences.jsonl: what a person reads, and means with counts from which other means can be made."""
    figures: dict[str, dict[str, tuple[float | None, int]]] = shape.means()
    for name, keypoints in {OVERALL: None, **errors.skeleton.group_keypoints}.items():
        count = errors.count_points(keypoints)
        own = {"mpjpe": (errors.summary(keypoints)["mpjpe"], count)} if count else {}
        figures[name] = own | figures[name]
    return {
        "mpjpe": errors.summary()["mpjpe"],
        "hand_error": errors.hand_error(),
        "wrist_relative_error": figures[OVERALL].get("wrist_relative_error", (None, 0))[0],
        "parts": _part_errors(errors),
        "figures": figures,
    }


class _RowFile(Sequence[dict[str, Any]]):
    """The rows of a file of JSON lines, read when they are asked for; only their places are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.places = np.cumsum(np.fromiter((len(line) for line in file), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as file:
            file.seek(int(self.places[index - 1]) if index else 0)
            return json.loads(file.readline())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            yield from map(json.loads, file)


def representative_sequences(sequences: Iterable[Mapping[str, Any]], count: int = 5) -> dict[int, str]:
    """Indices and labels of the sequences to look at: best, quartiles, median and worst by hand error, and between
    them others at even distances.

    Where no hand is to be seen the error of the whole pose decides. Few sequences give fewer entries.

    Args:
        sequences: rows of sequences.jsonl, read once.
        count: how many, at least 1.
    """
    errors: list[tuple[float, float]] = []  # by hands, of the whole; NaN where there is none
    hands = False
    for row in sequences:
        errors.append(tuple(math.nan if row[key] is None else row[key] for key in ("hand_error", "mpjpe")))  # type: ignore[arg-type]
        hands = hands or any("hand" in part for part in row["parts"])
    table = np.array(errors, dtype=np.float64).reshape(-1, 2)
    by_hands = bool(np.isfinite(table[:, 0]).any())
    column = table[:, 0 if by_hands else 1]
    order = [int(index) for index in np.argsort(column, kind="stable") if np.isfinite(column[index])]
    last = len(order) - 1
    chosen: dict[int, str] = {}
    ranks: list[tuple[str | None, float]] = list(SHOWN_RANKS.items())
    ranks = ranks[:count] + [(None, place) for place in np.linspace(0, 1, count).tolist() if count > len(ranks)]
    for label, rank in ranks if order else ():
        place = round(rank * last)
        words = label or f"Rank {place + 1} of {last + 1}"
        if len(chosen) < count:
            chosen.setdefault(order[place], f"{words}, by hands" if by_hands and hands else words)
    return {index: chosen[index] for index in order if index in chosen}


@torch.inference_mode()
def reconstruct(model: PoseTokenizerModel, item: dict[str, Any]) -> tuple[np.ndarray, TokenStrip]:
    """The reconstruction (T, N, D) of one item of a dataset, in shoulder widths, and the tokens that it is made of."""
    batch = collate([item])
    output = model(batch["input_values"].to(model.device), batch["padding_mask"].to(model.device))
    config, codes = model.config, output.pose_codes[0].cpu().numpy()
    strip = TokenStrip(codes, config.codebook_index, config.codebook_size, config.hop_length)
    return output.pose_values[0].float().cpu().numpy(), strip


def write_evaluation_report(
    path: Path,
    model: PoseTokenizerModel,
    dataset: PoseDataset,
    evaluation: Evaluation,
    subtitle: str,
    y_up: bool = False,
    shown: int = 5,
) -> None:
    """Writes the HTML report with the representative sequences, which are reconstructed once more, and beside it the
    same as pictures, PNG and PDF."""
    layout, threshold, pairs = model.config.layout, model.config.confidence_threshold, []
    for index, label in representative_sequences(evaluation.sequences, shown).items():
        item, row = dataset[index], evaluation.sequences[index]
        poses, tokens = reconstruct(model, item)
        pair = PosePair(
            row["id"], item["input_values"], poses, model.config.sampling_rate, label, row["parts"], tokens, scale=1.0
        )
        pairs.append(pair.upside_down() if y_up else pair)
    counts = evaluation.code_counts
    write_report(
        path,
        pairs,
        layout,
        evaluation.metrics,
        counts,
        sequences=heapq.nlargest(REPORTED_ROWS, evaluation.sequences, key=_badness),
        subtitle=subtitle,
        confidence_threshold=threshold,
    )
    write_figures(path.parent / "figures", pairs, layout, evaluation.metrics, counts, threshold)


def _badness(row: Mapping[str, Any]) -> float:
    error = row["mpjpe"] if row["hand_error"] is None else row["hand_error"]
    return -math.inf if error is None else error


def evaluate_folder(
    model: str,
    data: str,
    output: str | os.PathLike[str],
    split: str = "test",
    batch_size: int = 8,
    visualize: bool = False,
    y_up: bool = False,
    device: str | None = None,
    sequences: int = 5,
    beam_size: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on a data folder and writes the results.

    The processes of `accelerate launch` share the sequences; what is written differs from what one process writes by
    the order of additions in float64 alone (1e-9 of a figure at most, 1e-6 of frechet_distance). Neither poses nor
    rows are kept in memory.

    Args:
        model: checkpoint folder or repository on the Hub.
        data: folder that holds a folder per split.
        output: folder for `metrics.json`, `sequences.jsonl` (the error of each sequence), `rejected.jsonl` if a file
            could not be used, and with `visualize` `report/index.html` and `report/figures/`. It is made after model
            and data are read.
        split: which split.
        batch_size: sequences of 64 frames per step.
        visualize: write the report.
        y_up: the data's y axis points up.
        device: where to run; default the GPU if there is one.
        sequences: how many the report shows.
        beam_size: of the search that encodes; default that of the model's configuration.

    Returns:
        What `metrics.json` holds.

    Raises:
        ModelFolderError, PoseDataError, OutputError: one sentence on the model, the data or the output.
    """
    codec, feature_extractor = load_pretrained(model)
    codec.config.beam_size = beam_size or codec.config.beam_size
    state = process_state()
    codec = codec.float().to(device or state.device)
    dataset = PoseDataset(data, split, feature_extractor=feature_extractor)
    folder = Path(output)
    _check_writable(folder)
    totals = _Totals(codec, rate_distortion=visualize)
    try:
        _write_sequences(folder, codec, dataset, batch_size, totals, state)
        totals.reduce()
        metrics = totals.compute()
        if state.is_main_process:
            if dataset.rejected:
                dataset.write_rejected(folder)
            if visualize:
                (folder / "report").mkdir(exist_ok=True)
                rows = _RowFile(folder / "sequences.jsonl")
                evaluation = Evaluation(metrics, rows, totals.errors.code_counts.numpy())
                subtitle = f"{model}, {data}, split {split}"
                page = folder / "report" / "index.html"
                write_evaluation_report(page, codec, dataset, evaluation, subtitle, y_up, sequences)
            with replacing(folder / "metrics.json") as partial:
                partial.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        state.wait_for_everyone()
    except OSError as error:
        raise OutputError(f"{folder}: the results cannot be written ({error.strerror or error}).") from error
    return metrics


def _write_sequences(
    folder: Path,
    model: PoseTokenizerModel,
    dataset: PoseDataset,
    batch_size: int,
    totals: _Totals,
    state: PartialState,
) -> None:
    """Measures this process's share and leaves a row for every sequence of all processes in sequences.jsonl."""
    chunks = _chunks(dataset)
    mine = range(state.process_index, len(chunks), state.num_processes)
    parts = folder / ".sequences"
    if state.is_main_process:
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
        parts.mkdir(parents=True)
    state.wait_for_everyone()
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    total = sum(len(chunks[number]) for number in mine)
    try:
        with tqdm(total=total, desc=f"evaluate{share}", unit="seq", disable=not state.is_main_process) as bar:
            for number in mine:
                rows = _measure(model, dataset, batch_size, totals, chunks[number], bar)
                lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
                (parts / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
        state.wait_for_everyone()
        if state.is_main_process:
            with replacing(folder / "sequences.jsonl") as partial, partial.open("wb") as file:
                for number in range(len(chunks)):
                    file.write((parts / f"{number}.jsonl").read_bytes())
    finally:
        if state.is_main_process:
            shutil.rmtree(parts, ignore_errors=True)


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
