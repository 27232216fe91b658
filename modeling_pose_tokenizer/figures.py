"""The report's facts as figures for papers and cards, in PNG and vector PDF: one function each, in one style.

Colours are the layout's (`Skeleton.colors`), which colour-blind readers tell apart, and every curve has a mark of its
own, so that the figures survive a grey printer. Each function returns a figure that no global state keeps alive;
`visualization.figure_to_array` turns one into pixels for trackers. Letters: Q codebooks, K codebook size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .pose_pairs import CONFIDENCE_THRESHOLD, PosePair, frame_errors, skeleton_lines, typical_poses
from .report import speed_curves
from .skeleton_pose_tokenizer import Skeleton
from .visualization import reconstruction_figure, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "body_map_figure",
    "codebook_figure",
    "error_figure",
    "rate_figure",
    "speed_figure",
    "write_figures",
]

MARKS = "os^Dv<>P"
INK, SOFT, LINE = "#222222", "#555555", "#d8d5cf"
PERCENT = "mean error, % of shoulder width"
DPI = 200
# Fonts go into a PDF as text, so that it can be searched and edited.
SETTINGS = {"pdf.fonttype": 42, "savefig.dpi": DPI}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots()


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=SOFT)
    axes.set_ylabel(y, fontsize=9, color=SOFT)
    axes.tick_params(labelsize=8, color=LINE, labelcolor=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)


def _percent(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else 100 * value for value in values]


def _curves(axes: Axes, x: Sequence[float], curves: Mapping[str, Sequence[float | None]], skeleton: Skeleton) -> None:
    parts = [name for name in curves if name != "overall"]
    for name, values in curves.items():
        mark = MARKS[parts.index(name) % len(MARKS) if name in parts else -1]
        color = skeleton.colors.get(name, INK)
        style: dict[str, Any] = {"color": color, "marker": mark, "linewidth": 1.4, "markersize": 4}
        axes.plot(x, _percent(values), label=_words(name), **style)
    axes.set_ylim(0, None)
    if curves:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def error_figure(pair: PosePair, skeleton: Skeleton, confidence_threshold: float = CONFIDENCE_THRESHOLD) -> Figure:
    """The error of each part over the time of a sequence; a gap where the original does not show the part."""
    figure, axes = _figure(6.4, 2.6)
    seconds = np.arange(len(pair.reference)) / pair.fps
    for index, (part, values) in enumerate(frame_errors(pair, skeleton, confidence_threshold).items()):
        marks: dict[str, Any] = {
            "marker": MARKS[index % len(MARKS)],
            "markevery": max(len(seconds) // 12, 1),
            "markersize": 3.5,
        }
        axes.plot(seconds, 100 * values, color=skeleton.colors[part], linewidth=1.2, label=_words(part), **marks)
    _dress(axes, "seconds", PERCENT)
    axes.set_ylim(0, None)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, ncols=2, labelcolor=INK)
    axes.set_title(pair.id, fontsize=9, color=INK, loc="left")
    return figure


def body_map_figure(
    pairs: Sequence[PosePair],
    skeleton: Skeleton,
    metrics: Mapping[str, Any],
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
) -> Figure:
    """Typical poses of the pairs, every keypoint coloured by its error over the whole evaluation.

    Args:
        pairs: sequences to take the poses from.
        skeleton: their layout.
        metrics: what `ReconstructionMetrics.compute` returned.
        confidence_threshold: least confidence of a keypoint that is drawn.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    errors = np.array(_percent([metrics["per_keypoint"][name]["mpjpe"] for name in skeleton.keypoint_names]))
    known = errors[np.isfinite(errors)]
    top = max(float(np.percentile(known, 95)), 1e-6) if known.size else 1.0
    panels = list(typical_poses(pairs, skeleton, confidence_threshold))
    figure = Figure(figsize=(2.4 * max(len(panels), 1) + 0.8, 2.9), layout="constrained", facecolor="white")
    grid = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, keypoints, points) in zip(grid, panels, strict=False):
        places = dict(zip(keypoints, points, strict=True))
        lines = [
            (places[start], (places[end] + places[other]) / 2)
            for start, end, other, _ in skeleton_lines(skeleton)
            if {start, end, other} <= places.keys()
        ]
        axes.add_collection(LineCollection(lines, colors="#b9c4cc", linewidths=0.8, zorder=1))
        marks = {"s": 9 if name == "whole" else 26, "edgecolors": "white", "linewidths": 0.3, "zorder": 2}
        dots = axes.scatter(
            *points.T, c=errors[keypoints], cmap="viridis", vmin=0, vmax=top, plotnonfinite=True, **marks
        )
        axes.set(aspect="equal", anchor="N")
        axes.invert_yaxis()
        axes.set_title(_words(name), fontsize=9, color=SOFT)
    if panels and known.size:
        bar = figure.colorbar(dots, ax=grid, extend="max", shrink=0.8, aspect=28)
        bar.set_label(PERCENT, fontsize=8, color=SOFT)
        bar.ax.tick_params(labelsize=8, labelcolor=SOFT)
        bar.outline.set_visible(False)
    return figure


def speed_figure(by_speed: Mapping[str, Sequence[Mapping[str, Any]]], skeleton: Skeleton) -> Figure:
    """Error against how fast a keypoint moves in the original; `by_speed` is that of metrics.json."""
    figure, axes = _figure(5.2, 3.2)
    names, curves, _ = speed_curves(by_speed)
    _curves(axes, range(len(names)), curves, skeleton)
    axes.set_xticks(range(len(names)), names)
    _dress(axes, "speed in the original, shoulder widths per second", PERCENT)
    return figure


def rate_figure(rate_distortion: Sequence[Mapping[str, Any]], skeleton: Skeleton) -> Figure:
    """Error against bits per frame for each prefix of the levels; `rate_distortion` is that of metrics.json."""
    figure, axes = _figure(5.2, 3.2)
    parts = rate_distortion[0]["parts"] if rate_distortion else ()
    curves = {"overall": [row["overall"] for row in rate_distortion]}
    curves |= {part: [row["parts"][part] for row in rate_distortion] for part in parts}
    rates = [row["bits_per_frame"] for row in rate_distortion]
    _curves(axes, rates, curves, skeleton)
    axes.set(xlim=(0, None), xticks=rates)
    _dress(axes, "bits per frame", PERCENT)
    return figure


def codebook_figure(code_counts: np.ndarray, codebooks: Sequence[str] | Sequence[tuple[str, int]]) -> Figure:
    """How often each code is used, most frequent first, a panel for each token group and a curve for each level.

    Args:
        code_counts: (Q, K) how often each code was seen.
        codebooks: the Q codebooks as `group/level`, as metrics.json names them, or as (group, level), as
            `PoseTokenizerConfig.codebook_index` does.

    Raises:
        ValueError: counts and names do not agree.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(code_counts, dtype=np.float64)
    names = [tuple(name.rsplit("/", 1)) if isinstance(name, str) else (name[0], str(name[1])) for name in codebooks]
    if counts.ndim != 2 or len(counts) != len(names):
        raise ValueError(f"code_counts has the shape {counts.shape}; expected ({len(names)}, K), a row per codebook.")
    groups = list(dict.fromkeys(group for group, _ in names))
    figure = Figure(figsize=(2.4 * max(len(groups), 1) + 0.6, 2.6), layout="constrained", facecolor="white")
    grid = figure.subplots(1, max(len(groups), 1), squeeze=False, sharey=True)[0]
    for axes, group in zip(grid, groups, strict=False):
        own = [(int(level), row) for (name, level), row in zip(names, counts, strict=True) if name == group]
        for level, row in own:
            shade = 0.25 + 0.65 * level / max(len(own) - 1, 1)
            share = row / max(row.sum(), 1.0)
            perplexity = np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1.0)))) if row.sum() else 0.0
            used = np.sort(row[row > 0])[::-1]
            label = f"level {level + 1}: {len(row) - len(used)} dead, perplexity {perplexity:.0f}"
            axes.plot(np.arange(1, len(used) + 1), used, color=str(0.75 * (1 - shade)), linewidth=1.3, label=label)
            axes.plot(len(used) or np.nan, used[-1] if len(used) else np.nan, marker=MARKS[level % 8], color=INK, ms=3)
        axes.set(xlim=(0, counts.shape[1]), yscale="log" if counts.any() else "linear")
        axes.set_title(_words(group), fontsize=9, color=INK, loc="left")
        _dress(axes, "code, most frequent first", "times used" if axes is grid[0] else "")
        if len(own) <= 4:
            axes.legend(frameon=False, fontsize=6.5, labelcolor=INK)
    return figure


def write_figures(
    folder: str | os.PathLike[str],
    pairs: Sequence[PosePair],
    skeleton: Skeleton,
    metrics: Mapping[str, Any],
    code_counts: np.ndarray | None = None,
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
) -> list[Path]:
    """Writes every figure that there is data for, as PNG and as PDF.

    Args:
        folder: made where it is missing; figures of the same name are replaced.
        pairs: the sequences; the first with a reconstruction is drawn.
        skeleton: their layout.
        metrics: what metrics.json holds.
        code_counts: (Q, K) how often each code was seen.
        confidence_threshold: least confidence of a keypoint that is drawn.

    Returns:
        The files.
    """
    import matplotlib

    figures: dict[str, Figure] = {"body_map": body_map_figure(pairs, skeleton, metrics, confidence_threshold)}
    for pair in pairs:
        if pair.reconstruction is not None:
            poses = pair.reference, pair.reconstruction
            figures["reconstruction"] = reconstruction_figure(
                *poses, skeleton, pair.id, confidence_threshold=confidence_threshold
            )
            figures["error_over_time"] = error_figure(pair, skeleton, confidence_threshold)
            break
    if metrics.get("by_speed"):
        figures["error_by_speed"] = speed_figure(metrics["by_speed"], skeleton)
    if metrics.get("rate_distortion"):
        figures["rate_distortion"] = rate_figure(metrics["rate_distortion"], skeleton)
    if code_counts is not None:
        figures["codebook_use"] = codebook_figure(code_counts, metrics["tokens"]["codebooks"])
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(SETTINGS):
        for name, figure in figures.items():
            for suffix in (".png", ".pdf"):
                with replacing(target / f"{name}{suffix}") as partial:
                    figure.savefig(partial)
                written.append(target / f"{name}{suffix}")
    return written
