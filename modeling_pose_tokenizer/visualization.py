"""Pictures of reconstructions: figures for trackers and papers, animations, and the report that opens in a browser.

Only this module imports matplotlib, and only where a figure is drawn. Everywhere the original is blue and the
reconstruction orange (a pair that colour-blind readers tell apart), the y axis points down as in images, and a missing
keypoint is absent. Letters: T frames, N keypoints, D values per keypoint (x, y[, z], confidence last; z is not drawn).
"""

from __future__ import annotations

import base64
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .formats import PoseFileError, read_npz
from .hub import load_pretrained
from .metrics import PCK_THRESHOLDS
from .skeleton_pose_tokenizer import SKELETONS, Skeleton, get_skeleton

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PosePair",
    "TokenStrip",
    "animate",
    "animate_file",
    "figure_to_array",
    "reconstruction_figure",
    "render_player",
    "write_report",
]

ORIGINAL, RECONSTRUCTION = "#1f6fb2", "#d9541e"
CONFIDENCE_THRESHOLD = 0.3
# The report stores coordinates as int16: half a view is this many steps, and what lies ten views away is clipped.
STEPS = 3000
MISSING = -32768


@dataclass(frozen=True)
class TokenStrip:
    """The tokens of a sequence, to show under it.

    Attributes:
        codes: (Q, S) integers in [0, K).
        codebooks: (group, level) of each of the Q codebooks, as `PoseTokenizerConfig.codebook_index` has them.
        codebook_size: K.
        frames_per_step: frames of the sequence, at its own frame rate, for each of the S code steps.
    """

    codes: np.ndarray
    codebooks: Sequence[tuple[str, int]]
    codebook_size: int
    frames_per_step: float


@dataclass(frozen=True)
class PosePair:
    """A sequence to look at.

    Attributes:
        id: its name.
        reference: (T, N, D) the original, in any units.
        reconstruction: (T, N, D) in the same units, or None where only the original is shown.
        fps: frames per second.
        label: why it is shown, in a word or two.
        errors: part -> mean keypoint error in shoulder widths.
        tokens: what lies between the two, for players to show.
    """

    id: str
    reference: np.ndarray
    reconstruction: np.ndarray | None = None
    fps: float = 25.0
    label: str = ""
    errors: Mapping[str, float | None] = field(default_factory=dict)
    tokens: TokenStrip | None = None

    def upside_down(self) -> PosePair:
        """The same with y mirrored, for data whose y axis points up."""
        sign = np.ones(self.reference.shape[-1], dtype=np.float32)
        sign[1] = -1.0
        reconstruction = None if self.reconstruction is None else self.reconstruction * sign
        return replace(self, reference=self.reference * sign, reconstruction=reconstruction)


@dataclass(frozen=True)
class _View:
    """A window on the poses: its centre in every frame (T, 2) and half of its width and height (2,)."""

    name: str
    center: np.ndarray
    half: np.ndarray


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write to that takes the place of `path` when all went well: readers see the whole file or the old one.

    The name keeps its ending, by which writers choose a format.
    """
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _visible(poses: np.ndarray, threshold: float) -> np.ndarray:
    """(T, N) bool: keypoints to draw."""
    return (poses[..., -1] >= threshold) & np.isfinite(poses[..., :2]).all(-1)


def _whole_view(reference: np.ndarray, visible: np.ndarray) -> _View:
    """A fixed window on everything visible but a stray half percent."""
    low, high = np.array([[-1.0, -1.0], [1.0, 1.0]])
    if visible.any():
        low, high = np.percentile(reference[visible][:, :2].astype(np.float64), [0.5, 99.5], axis=0)
    half = np.maximum((high - low) / 2, max(np.max(high - low) * 0.3, 1e-6)) * 1.15
    return _View("whole", np.tile((low + high) / 2, (len(reference), 1)), half)


def _group_view(
    reference: np.ndarray, visible: np.ndarray, skeleton: Skeleton, group: str, gliding: bool
) -> _View | None:
    """A window that follows a group of keypoints; None where it is seen in fewer than a tenth of the frames."""
    keypoints = list(skeleton.group_keypoints[group])
    seen = visible[:, keypoints]
    frames = np.flatnonzero(seen.sum(1) >= max(2, len(keypoints) // 3))
    if not len(frames) or len(frames) < 0.1 * len(reference):
        return None
    boxes = [reference[t, keypoints][seen[t], :2].astype(np.float64) for t in frames]
    centers = np.array([(box.min(0) + box.max(0)) / 2 for box in boxes])
    half = np.percentile([np.ptp(box, axis=0).max() / 2 for box in boxes], 95) * 1.5
    every = np.arange(len(reference))
    track = np.stack([np.interp(every, frames, centers[:, axis]) for axis in range(2)], -1)
    # Gliding, it shows the motion of the hand instead of hiding it.
    width = min(9, len(track)) if gliding else 1
    padded = np.pad(track, ((width // 2, width - 1 - width // 2), (0, 0)), mode="edge")
    track = np.stack([np.convolve(padded[:, axis], np.full(width, 1 / width), "valid") for axis in range(2)], -1)
    return _View(group, track, np.full(2, max(half, 1e-6)))


def _views(reference: np.ndarray, skeleton: Skeleton, threshold: float, gliding: bool = True) -> list[_View]:
    visible = _visible(reference, threshold)
    zooms = [group for group in skeleton.groups if "hand" in group or group == "face"]
    views = [_group_view(reference, visible, skeleton, group, gliding) for group in zooms]
    return [_whole_view(reference, visible), *(view for view in views if view is not None)]


def _lines(skeleton: Skeleton) -> list[tuple[int, int, int, bool]]:
    """The lines to draw: from one keypoint to the middle of two (mostly the same one twice), and whether it is fine.

    Lines within a hand or the face are fine. Where a keypoint is the parent of both shoulders, which makes a tree of
    bones but no shoulders, the lines are drawn that people expect: between the shoulders, and from there to the head.
    """
    fine = {k for g, keypoints in skeleton.group_keypoints.items() if "hand" in g or g == "face" for k in keypoints}
    edges = [(parent, child, child) for parent, child in skeleton.edges]
    if skeleton.scale_pair is not None:
        left, right = skeleton.scale_pair
        above = {parent for parent, child in skeleton.edges if child == left}
        above &= {parent for parent, child in skeleton.edges if child == right}
        edges = [edge for edge in edges if not (edge[0] in above and edge[1] in (left, right))]
        edges += [(left, right, right), *((parent, left, right) for parent in sorted(above))]
    return [(*edge, fine.issuperset(edge)) for edge in edges]


# ---- figures -----------------------------------------------------------------------------------------------------


def _draw(
    axes: Axes, pose: np.ndarray, skeleton: Skeleton, color: str, threshold: float, width: float, *, under: bool
) -> None:
    """One pose (N, D) as lines and dots; paler where another lies on top of it."""
    from matplotlib.collections import LineCollection

    seen = _visible(pose[None], threshold)[0]
    points = pose[:, :2]
    lines = [line for line in _lines(skeleton) if seen[list(line[:3])].all()]
    axes.add_collection(
        LineCollection(
            [(points[start], points[[end, other]].mean(0)) for start, end, other, _ in lines],
            linewidths=[width * (0.5 if fine else 1.0) for *_, fine in lines],
            colors=color,
            alpha=0.55 if under else 0.9,
            capstyle="round",
        )
    )
    x, y = points[seen].T
    axes.scatter(x, y, s=width * 1.2, color=color, linewidths=0, alpha=0.55 if under else 0.9, zorder=3)


def _frame_axes(axes: Axes, view: _View, frame: int) -> None:
    (x, y), (half_x, half_y) = view.center[frame], view.half
    axes.set(xlim=(x - half_x, x + half_x), ylim=(y + half_y, y - half_y), xticks=[], yticks=[], aspect="equal")
    axes.set_anchor("C")
    for spine in axes.spines.values():
        spine.set(color="#d8d5cf", linewidth=0.8)


def _legend(figure: Figure, title: str | None, compared: bool) -> None:
    from matplotlib.lines import Line2D

    figure.suptitle(title or "", x=0.01, ha="left", fontsize=11, color="#222222")
    if compared:
        handles = [Line2D([], [], color=ORIGINAL, lw=2), Line2D([], [], color=RECONSTRUCTION, lw=2)]
        figure.legend(handles, ["original", "reconstruction"], loc="upper right", ncols=2, frameon=False, fontsize=9)


def reconstruction_figure(
    reference: np.ndarray,
    reconstruction: np.ndarray,
    skeleton: Skeleton,
    title: str | None = None,
    num_frames: int = 4,
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
) -> Figure:
    """Original and reconstruction on top of each other in a few frames, with the hands enlarged below.

    Args:
        reference: (T, N, D) original poses.
        reconstruction: (T, N, D) reconstructed poses in the same units.
        skeleton: the layout.
        title: a line above the picture.
        num_frames: columns, spread evenly over the frames that show most of the hands.
        confidence_threshold: least confidence of a keypoint that is drawn.

    Returns:
        A figure of its own, which no global state keeps alive; `figure_to_array` turns it into pixels.
    """
    from matplotlib.figure import Figure

    reference, reconstruction = np.asarray(reference), np.asarray(reconstruction)
    views = [v for v in _views(reference, skeleton, confidence_threshold, gliding=False) if v.name != "face"]
    hands = [k for view in views[1:] for k in skeleton.group_keypoints[view.name]]
    shown = _visible(reference, confidence_threshold)[:, hands or slice(None)].sum(1)  # (T,)
    frames = np.flatnonzero(shown >= np.median(shown))
    frames = frames[np.unique(np.linspace(0, len(frames) - 1, num_frames + 2).round().astype(int)[1:-1])]

    ratio = [view.half[1] / view.half[0] for view in views]
    column = 2.3
    size = (column * len(frames) + 0.3, column * sum(ratio) + 0.7)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    grid = figure.subplots(len(views), len(frames), squeeze=False, height_ratios=ratio)
    for row, view in zip(grid, views, strict=True):
        row[0].set_ylabel(view.name.replace("_", " "), fontsize=9, color="#555555")
        for axes, frame in zip(row, frames, strict=True):
            width = 1.8 if view.name == "whole" else 2.6
            _draw(axes, reference[frame], skeleton, ORIGINAL, confidence_threshold, width, under=True)
            _draw(
                axes, reconstruction[frame], skeleton, RECONSTRUCTION, confidence_threshold, width * 0.7, under=False
            )
            _frame_axes(axes, view, frame)
    for axes, frame in zip(grid[0], frames, strict=True):
        axes.set_title(f"frame {frame}", fontsize=9, color="#555555")
    _legend(figure, title, compared=True)
    return figure


def figure_to_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The figure's pixels as (height, width, 3) uint8, as trackers take them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Figure:
    """Named curves of (x, y) points over a logarithmic x axis.

    Raises:
        ValueError: no curve.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    if not curves:
        raise ValueError("There is no curve to draw.")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    # Okabe and Ito's colours, which colour-blind readers tell apart.
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for (name, points), colour, marker in zip(curves.items(), colours, "os^Dv<", strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=name)
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label, ylim=(0, None))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks([2, 5, 10, 20, 40])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def animate(
    pair: PosePair,
    skeleton: Skeleton,
    path: str | os.PathLike[str],
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
) -> None:
    """Writes original, reconstruction and overlay side by side as a moving picture.

    Args:
        pair: the sequence; without a reconstruction the original alone is shown.
        skeleton: the layout.
        path: `.gif`, `.mp4` (needs the program ffmpeg) or `.html` (a player that needs nothing but a browser).
        confidence_threshold: least confidence of a keypoint that is drawn.

    Raises:
        ValueError: another file ending.
        FileNotFoundError: the folder of `path` is missing.
        RuntimeError: `.mp4` without ffmpeg.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}.")
    if suffix == ".html":
        return write_report(path, [pair], skeleton, title=pair.id, confidence_threshold=confidence_threshold)
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path} ends in {path.suffix!r}; a moving picture is written as .gif, .mp4 or .html.")
    if suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise RuntimeError(
            f"{path} needs the program ffmpeg, which is not installed; install it or write .gif or .html."
        )
    from matplotlib.animation import FFMpegWriter, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = _views(pair.reference, skeleton, confidence_threshold)[0]
    layers = [("original", [(pair.reference, ORIGINAL)])]
    if pair.reconstruction is not None:
        layers.append(("reconstruction", [(pair.reconstruction, RECONSTRUCTION)]))
        layers.append(("overlay", [(pair.reference, ORIGINAL), (pair.reconstruction, RECONSTRUCTION)]))
    # Whole pixels in both directions and even ones: video codecs ask for them.
    height = 2 * round(160 * float(np.clip(view.half[1] / view.half[0], 0.6, 1.6)))
    figure = Figure(figsize=(3.2 * len(layers), height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(layers), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.92, wspace=0.03)
    # The annotation says int, but 29.97 frames a second are as good.
    writer = (PillowWriter if suffix == ".gif" else FFMpegWriter)(fps=pair.fps)  # type: ignore[arg-type]
    with replacing(path) as partial, writer.saving(figure, partial, 100):
        for frame in tqdm(range(len(pair.reference)), desc="animate", unit="frame", delay=2):
            for axes, (name, poses) in zip(grid, layers, strict=True):
                axes.clear()
                axes.set_title(name, fontsize=9, color="#555555", pad=4)
                for layer, (pose, color) in enumerate(poses):
                    under = layer < len(poses) - 1
                    _draw(axes, pose[frame], skeleton, color, confidence_threshold, 1.8, under=under)
                _frame_axes(axes, view, frame)
            writer.grab_frame()


def animate_file(
    source: str,
    output: str,
    model: str | None = None,
    sequence_id: str | None = None,
    layout: str | None = None,
    y_up: bool = False,
) -> None:
    """Animates a sequence of an npz file, beside its reconstruction where a model is given.

    Args:
        source: file with one sequence or many.
        output: `.gif`, `.mp4` or `.html`.
        model: checkpoint folder or repository on the Hub.
        sequence_id: which sequence; default the first.
        layout: name of the layout; default the model's, or the named one with as many keypoints.
        y_up: the file's y axis points up.

    Raises:
        ValueError, RuntimeError, OSError: one sentence on the file, the model or the output.
    """
    sequences = {sequence.id: sequence for sequence in read_npz(source)}
    sequence = sequences.get(next(iter(sequences)) if sequence_id is None else sequence_id)
    if sequence is None:
        raise PoseFileError(
            source, f"holds no sequence {sequence_id!r}; the first of {len(sequences)} is {next(iter(sequences))!r}"
        )
    poses = np.where(sequence.mask[:, None, None], sequence.poses, np.float32(0))  # a masked frame shows nothing
    reconstruction, threshold = None, CONFIDENCE_THRESHOLD
    if model is not None:
        codec, feature_extractor = load_pretrained(model)
        inputs = feature_extractor(poses, fps=sequence.fps, return_tensors="pt")
        with torch.inference_mode():
            decoded = codec.float()(inputs["input_values"], inputs["padding_mask"]).pose_values
        reconstruction = feature_extractor.postprocess(decoded, inputs)[0]
        skeleton, threshold = codec.config.layout, codec.config.confidence_threshold
    else:
        name = layout or next(
            (name for name, known in SKELETONS.items() if known.num_keypoints == poses.shape[1]), None
        )
        if name is None:
            raise PoseFileError(source, f"has {poses.shape[1]} keypoints, as no named layout has; give a model")
        skeleton = get_skeleton(name)
        if skeleton.num_keypoints != poses.shape[1]:
            raise PoseFileError(source, f"has {poses.shape[1]} keypoints, but {name} has {skeleton.num_keypoints}")
    pair = PosePair(sequence.id, poses, reconstruction, sequence.fps or 25.0)
    animate(pair.upside_down() if y_up else pair, skeleton, output, threshold)


# ---- the report --------------------------------------------------------------------------------------------------


def _pack(points: np.ndarray, missing: np.ndarray | None = None) -> str:
    """(..., 2) multiples of a step as base64 of little-endian int16; missing points carry a value of their own."""
    values = np.clip(np.nan_to_num(points).round(), -32000, 32000).astype("<i2")
    if missing is not None:
        values[missing] = MISSING
    return base64.b64encode(values.tobytes()).decode("ascii")


def _player_data(pair: PosePair, skeleton: Skeleton, threshold: float) -> dict[str, Any]:
    """What the page's script draws: coordinates in steps around the centre of the whole view."""
    views = _views(pair.reference, skeleton, threshold)
    origin = views[0].center[0]
    step = views[0].half.max() / STEPS

    def pack_poses(poses: np.ndarray) -> str:
        with np.errstate(invalid="ignore", over="ignore"):  # missing points may hold anything
            steps = (poses[..., :2].astype(np.float64) - origin) / step
        return _pack(steps, ~_visible(poses, threshold))

    return {
        "fps": float(pair.fps),
        "frames": len(pair.reference),
        "reference": pack_poses(pair.reference),
        "reconstruction": None if pair.reconstruction is None else pack_poses(pair.reconstruction),
        "views": [
            {"half": (view.half / step).round().tolist(), "center": _pack((view.center - origin) / step)}
            for view in views
        ],
        "names": [view.name.replace("_", " ") for view in views],
        "tokens": None if pair.tokens is None else _strip_data(pair.tokens),
    }


def _strip_data(tokens: TokenStrip) -> dict[str, Any]:
    """What the page's script draws of tokens: the codes, and for each row its name and the number of its group."""
    groups = list(dict.fromkeys(group for group, _ in tokens.codebooks))
    return {
        "codes": base64.b64encode(np.asarray(tokens.codes).astype("<u2").tobytes()).decode("ascii"),
        "rows": [f"{group.replace('_', ' ')} {level + 1}" for group, level in tokens.codebooks],
        "groups": [groups.index(group) for group, _ in tokens.codebooks],
        "size": tokens.codebook_size,
        "framesPerStep": tokens.frames_per_step,
    }


def _usage_curve(counts: np.ndarray, points: int = 48) -> str:
    """SVG path of a codebook's sorted use, most frequent code first, in a box of 100 by 100 (y down)."""
    ordered = np.sort(counts)[::-1].astype(np.float64)
    ordered = ordered[np.linspace(0, len(ordered) - 1, min(points, len(ordered))).round().astype(int)]
    top = max(math.log1p(ordered[0]), 1e-9)
    xs = np.linspace(0, 100, len(ordered))
    line = " ".join(
        f"L{x:.1f} {100 - 100 * math.log1p(value) / top:.1f}" for x, value in zip(xs, ordered, strict=True)
    )
    return f"M0 100 {line} L100 100 Z"


def _codebooks(metrics: Mapping[str, Any], code_counts: np.ndarray | None) -> list[dict[str, Any]]:
    """One row per token group, one cell per level, in the order of the codes."""
    tokens = metrics["tokens"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for index, name in enumerate(tokens["codebooks"]):
        group = name.rsplit("/", 1)[0]
        cell = {"utilization": tokens["codebook_utilization"][index], "perplexity": tokens["perplexity"][index]}
        cell["curve"] = None if code_counts is None else _usage_curve(np.asarray(code_counts[index]))
        cell["size"] = None if code_counts is None else len(code_counts[index])
        rows.setdefault(group, []).append(cell)
    return [{"group": group, "levels": levels} for group, levels in rows.items()]


def write_report(
    path: str | os.PathLike[str],
    pairs: Sequence[PosePair],
    skeleton: Skeleton,
    metrics: Mapping[str, Any] | None = None,
    code_counts: np.ndarray | None = None,
    title: str = "Reconstruction report",
    subtitle: str = "",
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
) -> None:
    """Writes one HTML file that opens from disk and asks no network for anything.

    Args:
        path: the file; its folder must exist. It is replaced as a whole.
        pairs: the sequences to play.
        skeleton: their layout.
        metrics: what `ReconstructionMetrics.compute` returned; without it the page holds the players alone.
        code_counts: (Q, K) how often each code was seen, for the curves of codebook use.
        title: heading of the page.
        subtitle: a line below it, such as the model and the data.
        confidence_threshold: least confidence of a keypoint that is drawn.
    """
    page = _render(
        pairs,
        skeleton,
        confidence_threshold,
        title=title,
        subtitle=subtitle,
        metrics=metrics,
        codebooks=_codebooks(metrics, code_counts) if metrics else [],
        code_steps=None if code_counts is None else int(np.asarray(code_counts).sum(1).max(initial=0)),
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def render_player(pair: PosePair, skeleton: Skeleton, confidence_threshold: float = CONFIDENCE_THRESHOLD) -> str:
    """The player of one sequence as an HTML page without heading and margins, for a frame in another page.

    Args:
        pair: the sequence to play.
        skeleton: its layout.
        confidence_threshold: least confidence of a keypoint that is drawn.
    """
    return _render([pair], skeleton, confidence_threshold, embedded=True)


def _render(
    pairs: Sequence[PosePair],
    skeleton: Skeleton,
    threshold: float,
    *,
    title: str = "",
    subtitle: str = "",
    metrics: Mapping[str, Any] | None = None,
    codebooks: Sequence[Mapping[str, Any]] = (),
    code_steps: int | None = None,
    embedded: bool = False,
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of files and layouts are anybody's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report_template.html").render(
        title=title,
        subtitle=subtitle,
        pairs=pairs,
        metrics=metrics,
        pck_thresholds=PCK_THRESHOLDS,
        codebooks=codebooks,
        code_steps=code_steps,
        embedded=embedded,
        players=[_player_data(pair, skeleton, threshold) for pair in pairs],
        skeleton={"lines": _lines(skeleton), "keypoints": len(skeleton.keypoint_names)},
        constants={"steps": STEPS, "missing": MISSING},
    )
