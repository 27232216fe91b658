#!/usr/bin/env python
"""The table and the figure of the rate-distortion runs.

python benchmarks/rate_report.py --figure docs/rate_distortion.png

Reads what `rate_distortion.py` has written so far and prints a table in Markdown: for each row and rate the fixed and
the entropy-coded bits per frame, and for each val set the error of hands, hands about their wrists, body and face, in
percent of the shoulder width. A network stands with its best learning rate, as the mean over its seeds; ours a second
time as a beam search encodes it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rate_distortion import BEAM_SIZE, LINEAR_ROWS, RESULTS, ROWS, best_rate, read_results

from modeling_pose_tokenizer.visualization import draw_curves

PARTS = ("hands", "hands_relative", "body", "face")
RATES = (5, 10, 20, 40)
WITH_BEAMS = f", {BEAM_SIZE} beams"
FIGURE_ROWS = {
    "ours": "this codec",
    f"ours{WITH_BEAMS}": f"this codec{WITH_BEAMS}",
    "momask_256": "MoMask-style RVQ-VAE",
    "soke": "SOKE-style VQ-VAEs",
    "predictive_vq": "closed-loop linear VQ",
    "klt_16": "KLT, 16 frames",
    "cosine_16": "cosines, 16 frames",
    "pairs_16": "cosines, 16 frames, as tokens",
}


def mean_points(runs: Sequence[dict[str, Any]], key: str = "points") -> list[dict[str, Any]]:
    """Points of a row: of the best learning rate, the mean over seeds; none where that was not scored."""
    best = best_rate(runs)
    seeds = [run[key] for run in runs if run["learning_rate"] == best and key in run]
    points = []
    for same in zip(*seeds, strict=True):
        val = {
            name: {key: float(np.mean([point["val"][name][key] for point in same])) for key in errors}
            for name, errors in same[0]["val"].items()
        }
        points.append({"bits_fixed": same[0]["bits_fixed"], "val": val, "seeds": len(same), "learning_rate": best})
    return points


def collect(runs: Sequence[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Row -> one of its runs, and its points, in the order of the rows."""
    found = {}
    for name in (*ROWS, *LINEAR_ROWS):
        of_row = [run for run in runs if run["row"] == name]
        for label, key in ((name, "points"), (name + WITH_BEAMS, "points_beams")):
            if of_row and (points := mean_points(of_row, key)):
                found[label] = (of_row[0], points)
    return found


def near_rates(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points nearest to 5, 10, 20 and 40 bits per frame, fixed or, where there is no fixed rate, coded."""
    bits = np.array([point["bits_fixed"] or next(iter(point["val"].values()))["bits_entropy"] for point in points])
    nearest = {int(np.abs(np.log(bits / rate)).argmin()) for rate in RATES}
    return [points[index] for index in sorted(nearest, key=lambda index: bits[index])]


def table(rows: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    """Markdown: a line per row and rate, a column per val set with hands / about the wrist / body / face."""
    sets = list(next(iter(rows.values()))[1][0]["val"])
    lines = [
        f"| row | parameters | learning rate, seeds | bits fixed | bits coded | {' | '.join(sets)} |",
        f"|{' --- |' * (5 + len(sets))}",
    ]
    for name, (run, points) in rows.items():
        for point in near_rates(points):
            errors = [
                " / ".join(f"{values[part]:.2f}" if part in values else "-" for part in PARTS)
                for values in point["val"].values()
            ]
            fixed = "" if point["bits_fixed"] is None else f"{point['bits_fixed']:.1f}"
            coded = f"{next(iter(point['val'].values()))['bits_entropy']:.1f}"
            recipe = f"{point['learning_rate']:g}, {point['seeds']}" if name.removesuffix(WITH_BEAMS) in ROWS else ""
            cells = [name, f"{run['parameters']:,}", recipe, fixed, coded, *errors]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(
    rows: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], val: str, part: str, coded: bool
) -> dict[str, list[tuple[float, float]]]:
    """Label -> (bits, error of a part) of a val set's rates, for the rows whose bits can be counted so."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, label in FIGURE_ROWS.items():
        for point in rows[name][1] if name in rows else ():
            values = point["val"][val]
            bits = values["bits_entropy"] if coded else values.get("bits_tokens", point["bits_fixed"])
            # Tokens with an entropy coder are the transform code again.
            if bits is not None and not (coded and "bits_tokens" in values):
                found.setdefault(label, []).append((bits, values[part]))
    return {label: sorted(points) for label, points in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="runs (default: beside this file)")
    parser.add_argument("--benchmark", default="signing", help="(default: %(default)s)")
    parser.add_argument("--budget", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--val", default="fingerspelling", help="val set of the figure (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="picture to write")
    parser.add_argument("--json", type=Path, help="the table's numbers to write")
    args = parser.parse_args()
    runs = read_results(args.results)
    runs = [run for run in runs if run["benchmark"] == args.benchmark and run["budget"] == args.budget]
    if not runs:
        raise SystemExit(f"There is no run of {args.benchmark}, budget {args.budget}, in {args.results}.")
    rows = collect(runs)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({name: points for name, (_, points) in rows.items()}, indent=1), "utf-8")
    if args.figure:
        part = "hands" if "hands" in next(iter(rows.values()))[1][0]["val"][args.val] else "all"
        subject = "hands" if part == "hands" else "all keypoints"
        panels = {
            "bits per frame, every code for log2 K": curves(rows, args.val, part, coded=False),
            "bits per frame, entropy-coded": curves(rows, args.val, part, coded=True),
        }
        draw_curves(panels, f"error of {subject}, % of shoulder width").savefig(args.figure, dpi=140)


if __name__ == "__main__":
    main()
