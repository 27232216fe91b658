"""The page to look at a tokenizer with: one HTML file that opens from disk and asks no network for anything.

`write_report` fills report_template.html; the script in it draws what this module packs. Numbers of the page are those
of metrics.json: each <data> element carries the full value beside the rounded text. Letters: T frames, N keypoints,
Q codebooks, K codebook size, S code steps.
"""

from __future__ import annotations

import base64
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import PCK_THRESHOLDS
from .pose_pairs import (
    CONFIDENCE_THRESHOLD,
    PosePair,
    TokenStrip,
    frame_errors,
    skeleton_lines,
    typical_poses,
    views_of,
    visible,
)
from .sequences import replacing
from .skeleton_pose_tokenizer import Skeleton

__all__ = ["PosePair", "TokenStrip", "render_player", "write_report"]

# Coordinates are stored as int16: half a view is this many steps, and what lies ten views away is clipped.
STEPS = 2000
LIMIT = 32000
# Confidence is stored as 0 (absent) or 1 to so many, from the threshold to 1.
CONFIDENCES = 15
MAX_ROWS = 10  # of a list of the worst

# key -> name, plain definition, unit. A figure that is not here is shown by its key.
DEFINITIONS: dict[str, tuple[str, str, str]] = {
    "mpjpe": (
        "Mean error",
        "Average distance between a keypoint and its reconstruction (MPJPE). One percent of a shoulder width is about "
        "4 mm on an adult.",
        "percent",
    ),
    "rmse": (
        "Root mean square",
        "Square root of the mean squared error of a coordinate; large misses weigh more.",
        "percent",
    ),
    "mse": ("Mean square", "Mean squared error of a coordinate, in shoulder widths squared.", "number"),
    "mae": ("Mean absolute", "Mean absolute error of a coordinate.", "percent"),
    **{
        f"pck@{share}": (
            f"Within {100 * share:g} %",
            f"Share of keypoints that land no further than {100 * share:g} % of a shoulder width from where they "
            "belong (PCK).",
            "percent",
        )
        for share in PCK_THRESHOLDS
    },
    "velocity_error": (
        "Velocity error",
        "How far the change from one frame to the next differs from the original’s: smearing shows here.",
        "percent",
    ),
    "acceleration_error": (
        "Acceleration error",
        "The same of the change of that change: trembling shows here.",
        "percent",
    ),
    "pa_mpjpe": (
        "Error of shape",
        "Mean error after each part is moved, turned and scaled onto the original (PA-MPJPE): what remains is shape.",
        "percent",
    ),
    "wrist_relative_error": (
        "Error about the wrist",
        "Mean error of a hand’s keypoints, both hands laid wrist on wrist: the handshape without its place.",
        "percent",
    ),
    "hand_angle_error": (
        "Error of finger angles",
        "Mean difference of the angles between one finger bone and the next, in degrees.",
        "degrees",
    ),
    "bone_length_error": (
        "Error of bone lengths",
        "Mean difference of the length of a bone from the original’s.",
        "percent",
    ),
    "dtw_mje": (
        "Error after time warping",
        "Mean error along the best alignment in time (DTW-MJE), as sign language production reports it.",
        "percent",
    ),
    "frechet_distance": (
        "Fréchet distance",
        "How far the reconstructions as a whole differ from the originals as a whole, in a space of positions and "
        "velocities; 0 where both are spread alike.",
        "number",
    ),
    "jitter": (
        "Jitter",
        "Mean size of the third derivative of the reconstruction, in shoulder widths per second cubed.",
        "number",
    ),
    "reference_jitter": ("Jitter of the original", "The same of the original.", "number"),
    "jitter_ratio": (
        "Ratio of jitter",
        "Jitter of the reconstruction over the original’s: above 1 it trembles more, below 1 it is smoother.",
        "number",
    ),
}
# Viridis at ten even places: told apart by colour-blind readers, and in grey.
SCALE = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725")


def write_report(
    path: str | os.PathLike[str],
    pairs: Sequence[PosePair],
    skeleton: Skeleton,
    metrics: Mapping[str, Any] | None = None,
    code_counts: np.ndarray | None = None,
    *,
    sequences: Sequence[Mapping[str, Any]] = (),
    title: str = "Reconstruction report",
    subtitle: str = "",
    confidence_threshold: float = CONFIDENCE_THRESHOLD,
) -> None:
    """Writes one HTML file that opens from disk and asks no network for anything.

    Args:
        path: the file; its folder must exist. It is replaced as a whole.
        pairs: the sequences to play; the page opens with the first.
        skeleton: their layout.
        metrics: what `ReconstructionMetrics.compute` returned; without it the page holds the players alone.
        code_counts: (Q, K) how often each code was seen, for the curves of codebook use.
        sequences: rows of sequences.jsonl, for the list of the worst.
        title: heading of the page.
        subtitle: a line below it, such as the model and the data.
        confidence_threshold: least confidence of a keypoint that is drawn.

    Raises:
        ValueError: poses of another layout.
    """
    about: dict[str, Any] = {}
    if metrics:
        about = {
            "metrics": metrics,
            "table": _metric_rows(metrics),
            "codebooks": _codebooks(metrics, code_counts),
            "code_steps": None if code_counts is None else int(np.asarray(code_counts).sum(1).max(initial=0)),
            "body": _body_map(pairs, skeleton, metrics["per_keypoint"], confidence_threshold),
            "worst_keypoints": _worst(metrics["per_keypoint"]),
            "charts": _charts(metrics),
        }
    page = _render(
        pairs,
        skeleton,
        confidence_threshold,
        title=title,
        subtitle=subtitle,
        worst_sequences=_worst_sequences(sequences),
        **about,
    )
    with replacing(Path(path)) as partial:
        partial.write_text(page, encoding="utf-8")


def render_player(pair: PosePair, skeleton: Skeleton, confidence_threshold: float = CONFIDENCE_THRESHOLD) -> str:
    """The player of one sequence as an HTML page without heading and margins, for a frame in another page.

    Args:
        pair: the sequence to play.
        skeleton: its layout.
        confidence_threshold: least confidence of a keypoint that is drawn.

    Raises:
        ValueError: poses of another layout.
    """
    return _render([pair], skeleton, confidence_threshold, embedded=True)


# ---- what the script draws -----------------------------------------------------------------------------------------


def pack_poses(poses: np.ndarray, origin: np.ndarray, step: float, threshold: float) -> str:
    """Poses (T, N, D) as the page's script unpacks them, in base64.

    Below zlib lie three planes: the low and the high bytes of (N, 2, T) int16 differences from frame to frame, in
    steps around `origin`, and (N, T) confidences. A missing keypoint has confidence 0 and stays where it was.
    """
    seen = visible(poses, threshold)
    with np.errstate(invalid="ignore", over="ignore"):  # missing points may hold anything
        steps = (poses[..., :2].astype(np.float64) - origin) / step
    steps = np.clip(np.where(seen[..., None], steps, 0.0).round(), -LIMIT, LIMIT).astype(np.int16)
    last = np.maximum.accumulate(np.where(seen, np.arange(len(poses))[:, None], 0), axis=0)  # (T, N)
    held = np.take_along_axis(steps, last[..., None], axis=0).transpose(1, 2, 0)  # (N, 2, T)
    differences = np.ascontiguousarray(np.diff(held, axis=-1, prepend=np.int16(0)), dtype="<i2").view(np.uint8)
    share = (np.nan_to_num(poses[..., -1]).clip(threshold, 1) - threshold) / max(1 - threshold, 1e-6)
    confidence = np.where(seen, 1 + np.round((CONFIDENCES - 1) * share), 0).astype(np.uint8).T
    planes = differences[..., 0::2].tobytes(), differences[..., 1::2].tobytes(), confidence.tobytes()
    return base64.b64encode(zlib.compress(b"".join(planes), 9)).decode("ascii")


def _player_data(pair: PosePair, skeleton: Skeleton, threshold: float) -> dict[str, Any]:
    """What the page's script draws: coordinates in steps around the centre of the whole view."""
    if not len(pair.reference):
        raise ValueError(f"{pair.id} has no frames; expected at least one.")
    for poses in (pair.reference, pair.reconstruction):
        if poses is not None and (poses.ndim != 3 or poses.shape[:2] != (len(pair.reference), skeleton.num_keypoints)):
            raise ValueError(
                f"{pair.id} holds poses of the shape {poses.shape}; expected ({len(pair.reference)}, "
                f"{skeleton.num_keypoints}, D), as the layout {skeleton.name or 'of the model'} has."
            )
    views = views_of(pair.reference, skeleton, threshold)
    origin = views[0].center[0]
    step = views[0].half.max() / STEPS
    errors = frame_errors(pair, skeleton, threshold)
    return {
        "id": pair.id,
        "label": pair.label,
        "fps": float(pair.fps),
        "frames": len(pair.reference),
        "reference": pack_poses(pair.reference, origin, step, threshold),
        "reconstruction": (
            None if pair.reconstruction is None else pack_poses(pair.reconstruction, origin, step, threshold)
        ),
        "views": [
            {
                "name": view.name.replace("_", " "),
                "half": (view.half / step).round().tolist(),
                "center": _pack_track((view.center - origin) / step),
            }
            for view in views
        ],
        "errors": [{"part": part, "values": _rounded(values)} for part, values in errors.items()],
        "means": {part: value for part, value in pair.errors.items() if value is not None},
        "tokens": None if pair.tokens is None else _strip_data(pair.tokens),
    }


def _pack_track(points: np.ndarray) -> str:
    values = np.clip(np.nan_to_num(points).round(), -LIMIT, LIMIT).astype("<i2")
    return base64.b64encode(values.tobytes()).decode("ascii")


def _rounded(values: np.ndarray) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


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


def _charts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Curves of error against speed and against rate; a chart without data is absent."""
    charts: dict[str, Any] = {}
    names, curves, counts = speed_curves(metrics.get("by_speed") or {})
    series = [
        {
            "name": part,
            "points": [
                {"x": place, "y": value, "note": f"{names[place]} shoulder widths per second, {count:.0f} keypoints"}
                for place, (value, count) in enumerate(zip(values, counts[part], strict=True))
            ],
        }
        for part, values in curves.items()
        if any(value is not None for value in values)
    ]
    if series:
        charts["speed"] = {"series": series, "ticks": names, "x": "speed of a keypoint, shoulder widths per second"}
    rates = metrics.get("rate_distortion") or []
    series = []
    for name in ["overall", *(rates[0]["parts"] if rates else ())]:
        values = [row["overall"] if name == "overall" else row["parts"][name] for row in rates]
        points = [
            {"x": row["bits_per_frame"], "y": value, "note": f"{row['num_quantizers']} levels"}
            for row, value in zip(rates, values, strict=True)
        ]
        if any(value is not None for value in values):
            series.append({"name": name, "points": points})
    if rates and series:
        charts["rate"] = {"series": series, "ticks": None, "x": "bits per frame"}
    return charts


def speed_curves(
    by_speed: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[list[str], dict[str, list[float | None]], dict[str, list[float]]]:
    """The bins of speed of metrics.json: their names, and for each part the errors and the keypoints in them."""
    bins: Sequence[Mapping[str, Any]] = next(iter(by_speed.values()), ())
    names = [
        f"over {cell['from']:g}" if cell["to"] is None else f"{cell['from']:g} to {cell['to']:g}" for cell in bins
    ]
    errors = {part: [cell["mpjpe"] for cell in cells] for part, cells in by_speed.items()}
    return names, errors, {part: [cell["count"] for cell in cells] for part, cells in by_speed.items()}


# ---- what stands in the page ---------------------------------------------------------------------------------------


def _metric_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per figure of the blocks `overall` and `parts`: name, definition, unit, and the value of each block."""
    blocks = [metrics["overall"], *metrics["parts"].values()]
    present = dict.fromkeys(key for block in blocks for key, value in block.items() if not isinstance(value, dict))
    order = [key for key in DEFINITIONS if key in present] + [key for key in present if key not in DEFINITIONS]
    rows = []
    for key in order:
        name, words, unit = DEFINITIONS.get(key, (key.replace("_", " ").capitalize(), "", "number"))
        rows.append({"name": name, "words": words, "unit": unit, "values": [block.get(key) for block in blocks]})
    return rows


def usage_curve(counts: np.ndarray, points: int = 48) -> str:
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
        cell = {"utilization": tokens["codebook_utilization"][index], "perplexity": tokens["perplexity"][index]}
        cell |= {"curve": None, "size": None, "dead": None}
        if code_counts is not None:
            counts = np.asarray(code_counts[index])
            cell |= {"curve": usage_curve(counts), "size": len(counts), "dead": int((counts == 0).sum())}
        rows.setdefault(name.rsplit("/", 1)[0], []).append(cell)
    return [{"group": group, "levels": levels} for group, levels in rows.items()]


def _body_map(
    pairs: Sequence[PosePair], skeleton: Skeleton, per_keypoint: Mapping[str, Any], threshold: float
) -> dict[str, Any] | None:
    """Typical poses in boxes of 100 by at most 100, every keypoint with its error and colour."""
    errors = [per_keypoint[name]["mpjpe"] for name in skeleton.keypoint_names]
    known = sorted(error for error in errors if error is not None)
    if not known:
        return None
    top = max(known[math.ceil(0.95 * (len(known) - 1))], 1e-12)  # one stray keypoint would take all the colours
    panels = []
    for name, keypoints, points in typical_poses(pairs, skeleton, threshold):
        low, span = points.min(0), np.ptp(points, axis=0)
        places = dict(zip(keypoints, (4 + 92 * (points - low) / max(span.max(), 1e-9)).tolist(), strict=True))
        dots = [
            {
                "x": places[k][0],
                "y": places[k][1],
                "name": skeleton.keypoint_names[k],
                "error": errors[k],
                "color": None if errors[k] is None else SCALE[min(int(errors[k] / top * len(SCALE)), len(SCALE) - 1)],
            }
            for k in sorted(keypoints, key=lambda k: errors[k] or 0.0)  # the worst on top
        ]
        lines = [
            (places[start], [(places[end][axis] + places[other][axis]) / 2 for axis in range(2)])
            for start, end, other, _ in skeleton_lines(skeleton)
            if {start, end, other} <= places.keys()
        ]
        size = (8 + 92 * span / max(span.max(), 1e-9)).tolist()
        panels.append({"name": name, "size": size, "dots": dots, "lines": lines})
    return {"panels": panels, "top": top, "scale": SCALE} if panels else None


def _worst(per_keypoint: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The keypoints that come back worst: name and error."""
    errors = [(name, block["mpjpe"]) for name, block in per_keypoint.items() if block["mpjpe"] is not None]
    return sorted(errors, key=lambda entry: -entry[1])[:MAX_ROWS]


def _worst_sequences(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of sequences.jsonl with the largest error of the hands, or where there are none of the whole pose."""
    known = [row for row in rows if row["hand_error"] is not None or row["mpjpe"] is not None]

    def error(row: Mapping[str, Any]) -> float:
        return float(row["mpjpe"] if row["hand_error"] is None else row["hand_error"])

    return sorted(known, key=error, reverse=True)[:MAX_ROWS]


def _render(
    pairs: Sequence[PosePair],
    skeleton: Skeleton,
    threshold: float,
    *,
    title: str = "",
    subtitle: str = "",
    embedded: bool = False,
    charts: Mapping[str, Any] | None = None,
    **content: Any,
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of files and layouts are anybody's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    defaults: dict[str, Any] = dict.fromkeys(("metrics", "code_steps", "body"))
    defaults |= dict.fromkeys(("table", "codebooks", "worst_keypoints", "worst_sequences"), ())
    return environment.get_template("report_template.html").render(
        **(defaults | content),
        title=title,
        subtitle=subtitle,
        pairs=pairs,
        places={pair.id: index for index, pair in enumerate(pairs)},
        charts=charts or {},
        pck_thresholds=PCK_THRESHOLDS,
        embedded=embedded,
        players=[_player_data(pair, skeleton, threshold) for pair in pairs],
        skeleton={"lines": skeleton_lines(skeleton), "keypoints": skeleton.num_keypoints},
        constants={"steps": STEPS, "confidences": CONFIDENCES},
    )
