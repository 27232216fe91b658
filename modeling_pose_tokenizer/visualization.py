"""Pictures of reconstructions: original and reconstruction in a figure, for trackers, and as a moving picture.

Only this module and figures.py import matplotlib, and only where a figure is drawn. Everywhere the original is blue
and the reconstruction orange (a pair that colour-blind readers tell apart), the y axis points down as in images, and a
missing keypoint is absent. Letters: T frames, N keypoints, D values per keypoint (x, y[, z], confidence last; z is not
drawn).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from .formats import PoseFileError, read_npz
from .hub import load_pretrained
from .pose_pairs import CONFIDENCE_THRESHOLD, PosePair, TokenStrip, View, skeleton_lines, views_of, visible
from .report import render_player, write_report
from .skeleton_files import load_skeleton
from .skeleton_pose_tokenizer import Skeleton, likely_layout, suggest_layout

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


# ---- figures -----------------------------------------------------------------------------------------------------


def _draw(
    axes: Axes, pose: np.ndarray, skeleton: Skeleton, color: str, threshold: float, width: float, *, under: bool
) -> None:
    """One pose (N, D) as lines and dots; paler where another lies on top of it."""
    from matplotlib.collections import LineCollection

    seen = visible(pose[None], threshold)[0]
    points = pose[:, :2]
    lines = [line for line in skeleton_lines(skeleton) if seen[list(line[:3])].all()]
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


def _frame_axes(axes: Axes, view: View, frame: int) -> None:
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
    views = [v for v in views_of(reference, skeleton, confidence_threshold, gliding=False) if v.name != "face"]
    hands = [k for view in views[1:] for k in skeleton.group_keypoints[view.name]]
    shown = visible(reference, confidence_threshold)[:, hands or slice(None)].sum(1)  # (T,)
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


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], y_label: str) -> Figure:
    """Named curves of (x, y) points over logarithmic x axes, side by side: x label -> name -> points.

    A name, one of eight at most, has one colour in all panels, and one line in the legend.

    Raises:
        ValueError: no curve.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    if not names:
        raise ValueError("There is no curve to draw.")
    figure = Figure(figsize=(4.6 * len(panels), 4.8), layout="constrained")
    # Okabe and Ito's colours, which colour-blind readers tell apart.
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
    styles = dict(zip(names, zip(colours, "os^Dv<*P", strict=True), strict=False))
    lines = {}
    for axes, (x_label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in curves.items():
            colour, marker = styles[name]
            lines[name] = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4)[0]
        axes.set(xscale="log", xlabel=x_label, ylim=(0, None))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xticks([2, 5, 10, 20, 40])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(y_label)
    figure.legend(lines.values(), lines, frameon=False, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _find_ffmpeg() -> str | None:
    """The program that writes videos: the machine's own, else the one in the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


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
    encoder = _find_ffmpeg() if suffix == ".mp4" else None
    if suffix == ".mp4" and encoder is None:
        raise RuntimeError(
            f"{path} needs the program ffmpeg, which is not installed; install it (pip install imageio-ffmpeg brings "
            "one) or write .gif or .html."
        )
    from matplotlib import rc_context
    from matplotlib.animation import FFMpegWriter, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    view = views_of(pair.reference, skeleton, confidence_threshold)[0]
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
    settings = {} if encoder is None else {"animation.ffmpeg_path": encoder}
    with rc_context(settings), replacing(path) as partial, writer.saving(figure, partial, 100):
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
    turn: float = 0.0,
) -> None:
    """Animates a sequence of an npz file, beside its reconstruction where a model is given.

    Args:
        source: file with one sequence or many.
        output: `.gif`, `.mp4` or `.html`.
        model: checkpoint folder or repository on the Hub.
        sequence_id: which sequence; default the first.
        layout: name of the layout, or a YAML file of one; default the model's, or the named one with as many
            keypoints.
        y_up: the file's y axis points up.
        turn: degrees to turn poses in 3D about the vertical.

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
        name = layout or suggest_layout(poses.shape[1])
        if name is None:
            raise PoseFileError(source, f"has {poses.shape[1]} keypoints, as no named layout has; give a model")
        skeleton = load_skeleton(name)
        if skeleton.num_keypoints != poses.shape[1]:
            hint = likely_layout(poses.shape[1])
            raise PoseFileError(
                source, f"has {poses.shape[1]} keypoints, but {name} has {skeleton.num_keypoints}{hint}"
            )
    pair = PosePair(sequence.id, poses, reconstruction, sequence.fps or 25.0)
    if turn:
        pair = pair.turned(turn)
    animate(pair.upside_down() if y_up else pair, skeleton, output, threshold)
