"""Which of several models keeps more: the same sequences side by side, and how sure their difference is.

The difference of two figures comes with a confidence interval by the paired bootstrap (Efron 1979; Koehn 2004): the
sequences, which both models were given, are drawn again with replacement, the figures of both models are made anew
from each draw, and the interval holds the middle share of the differences. Keypoints of a sequence stand and fall
together, so sequences are drawn, not keypoints. An interval without 0 decides for a model as far as these sequences
can; it does not know of other signers, nor that many figures are compared at a time.

Letters: M models, S sequences, R resamples, C figures (metric of a part).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .sequences import replacing

__all__ = ["Comparison", "ComparisonError", "Difference", "Figure", "compare", "format_comparison", "name_paths"]

CONFIDENCE = 0.95
RESAMPLES = 2000
# Weights of so many sequences are drawn at a time.
WEIGHTS = 2**22
METRICS = {
    "mpjpe": "percent",
    "pa_mpjpe": "percent",
    "wrist_relative_error": "percent",
    "hand_angle_error": "degrees",
    "bone_length_error": "percent",
    "dtw_mje": "percent",
    "jitter": "number",
}


class ComparisonError(ValueError):
    """Evaluations that cannot be compared; `str` is one sentence with the path."""


@dataclass(frozen=True)
class Difference:
    """How much more a figure of a model is than that of the first model; `None` where it is not known.

    Attributes:
        difference: over all sequences.
        low: start of the confidence interval.
        high: end of the confidence interval.
    """

    difference: float | None
    low: float | None
    high: float | None

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Figure:
    """A metric of a part, of every model.

    Attributes:
        part: `overall` or a token group.
        metric: a key of metrics.json.
        values: of the M models; `None` where nothing was counted or a reconstruction was not finite.
        differences: of the M - 1 models after the first.
        sequences: how many have the figure.
    """

    part: str
    metric: str
    values: list[float | None]
    differences: list[Difference]
    sequences: int


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        names: of the M models; the others are compared with the first.
        paths: of their metrics.json.
        sequences: S.
        confidence: share of the differences that an interval holds.
        resamples: R.
        seed: of the draws.
        figures: part by part.
    """

    names: list[str]
    paths: list[str]
    sequences: int
    confidence: float
    resamples: int
    seed: int
    figures: list[Figure]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it as JSON."""
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def compare(
    paths: Sequence[str | os.PathLike[str]],
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Compares evaluations of the same sequences.

    Args:
        paths: of metrics.json, or of its folder; sequences.jsonl lies beside each. The first is what the others are
            compared with.
        resamples: R.
        seed: of the draws; the same seed gives the same intervals.
        confidence: share of the differences that an interval holds.

    Raises:
        ComparisonError: fewer than two evaluations, a file that is missing or damaged, or other sequences.
    """
    if len(paths) < 2:
        raise ComparisonError(f"a comparison needs at least two metrics.json, found {len(paths)}.")
    files = [Path(path) / "metrics.json" if Path(path).is_dir() else Path(path) for path in paths]
    tables = [_read_rows(path) for path in files]
    for path, table in zip(files[1:], tables[1:], strict=True):
        _check_same_sequences(files[0], tables[0], path, table)
    ids = list(tables[0])
    groups = list(tables[0][ids[0]]["figures"])
    wanted = [(part, metric) for part in groups for metric in METRICS]
    # (M, S, C) sums and counts
    sums, counts = (np.array(array) for array in zip(*(_collect(table, ids, wanted) for table in tables), strict=True))
    whole = _quotient(sums.sum(1), counts.sum(1))  # (M, C)
    gaps = _resample(sums, counts, resamples, np.random.default_rng(seed))  # (R, M - 1, C)
    figures = []
    for column, (part, metric) in enumerate(wanted):
        seen = int((counts[:, :, column] > 0).all(0).sum())
        if not seen:
            continue
        differences = [
            _difference(whole[model, column] - whole[0, column], gaps[:, model - 1, column], seen, confidence)
            for model in range(1, len(files))
        ]
        figures.append(Figure(part, metric, [_number(v) for v in whole[:, column]], differences, seen))
    names = name_paths([os.path.abspath(path.parent) for path in files])
    return Comparison(names, [str(path) for path in files], len(ids), confidence, resamples, seed, figures)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _quotient(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _difference(value: float, gaps: np.ndarray, sequences: int, confidence: float) -> Difference:
    known = gaps[np.isfinite(gaps)]
    if not math.isfinite(value) or sequences < 2 or not len(known):
        return Difference(_number(value), None, None)
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Difference(float(value), low, high)


def _resample(sums: np.ndarray, counts: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Differences from the first model in each draw of sequences, (R, M - 1, C); NaN where it holds no such figure."""
    models, sequences, columns = sums.shape
    flat = [array.transpose(1, 0, 2).reshape(sequences, -1) for array in (sums, counts)]  # (S, M * C)
    size, found = max(1, WEIGHTS // sequences), []
    for start in range(0, resamples, size):
        draws = min(size, resamples - start)
        weights = generator.multinomial(sequences, np.full(sequences, 1 / sequences), draws).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means = _quotient(*(weights @ array for array in flat)).reshape(draws, models, columns)
        found.append(means[:, 1:] - means[:, :1])
    return np.concatenate(found)


def _collect(
    table: dict[str, dict[str, Any]], ids: Sequence[str], wanted: Sequence[tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """(S, C) sums and counts of the figures; a mean that is not finite makes the sum NaN."""
    cells = np.zeros((2, len(ids), len(wanted)))
    for row, name in enumerate(ids):
        figures = table[name]["figures"]
        for column, (part, metric) in enumerate(wanted):
            mean, count = figures.get(part, {}).get(metric, (0.0, 0))
            cells[:, row, column] = (math.nan if mean is None else mean) * count, count
    return cells[0], cells[1]


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of the sequences.jsonl beside a metrics.json, by the sequences' names."""
    beside = path.with_name("sequences.jsonl")
    for file in (path, beside):
        if not file.is_file():
            raise ComparisonError(f"{file}: is missing; expected what evaluate.py writes.")
    table: dict[str, dict[str, Any]] = {}
    number = 0
    try:
        with beside.open(encoding="utf-8") as lines:
            for line in lines:
                number += 1  # the error names it
                row = json.loads(line)
                table[row["id"]] = {"frames": row["frames"], "figures": dict(row["figures"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ComparisonError(
            f"{beside}: line {number} is not a row with id, frames and figures ({reason}); run evaluate.py again."
        ) from None
    if not table:
        raise ComparisonError(f"{beside}: holds no sequences; expected at least one.")
    return table


def _check_same_sequences(
    first: Path, expected: dict[str, dict[str, Any]], second: Path, found: dict[str, dict[str, Any]]
) -> None:
    """Refuses evaluations of other sequences, or of the same ones read otherwise."""
    common = expected.keys() & found.keys()
    for path, here, there, other in ((first, expected, found, second), (second, found, expected, first)):
        alone = [name for name in here if name not in there]
        if alone:
            raise ComparisonError(
                f"{path}: has {len(alone)} sequences that {other} has not, the first is {alone[0]!r}"
                f" ({len(common)} in common); evaluate both models on the same split."
            )
    for name, row in expected.items():
        counts = []
        for one in (row, found[name]):
            points = {part: figures.get("mpjpe", (None, 0))[1] for part, figures in one["figures"].items()}
            counts.append((one["frames"], points))
        if counts[0] != counts[1]:
            raise ComparisonError(
                f"{second}: sequence {name!r} has other frames or scored keypoints than in {first} ({counts[1]}, there"
                f" {counts[0]}); models of one layout, frame rate and confidence threshold can be compared."
            )


def name_paths(paths: Sequence[str]) -> list[str]:
    """A short name for each path: its last part, or as many of the last parts as tell all of them apart.

    >>> name_paths(["runs/a/best", "runs/b/best"])
    ['a-best', 'b-best']
    """
    parts = [[part for part in Path(path).parts if part not in ("/", ".", "..")] or ["model"] for path in paths]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names, 1)]


def format_comparison(comparison: Comparison) -> str:
    """A table for the terminal: a row per figure, `*` where the interval of the difference leaves 0 out."""
    rows = [["part", "figure", *_header(comparison.names)], *_table(comparison)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    foot = (
        f"{comparison.sequences} sequences; in brackets the {100 * comparison.confidence:g} % interval of the"
        f" difference from {comparison.names[0]} ({comparison.resamples} resamples of sequences); * leaves 0 out"
    )
    return os.linesep.join([*lines, foot])


def _header(names: Sequence[str]) -> Iterator[str]:
    yield names[0]
    for name in names[1:]:
        yield name
        yield "difference"


def _table(comparison: Comparison) -> Iterator[list[str]]:
    for figure in comparison.figures:
        unit = METRICS[figure.metric]
        scale, sign = {"percent": (100, " %"), "degrees": (1, "°"), "number": (1, "")}[unit]

        def show(value: float | None, style: str, scale: float = scale) -> str:
            return "-" if value is None else format(scale * value, style)

        cells = [show(figure.values[0], ".2f") + sign]
        for value, gap in zip(figure.values[1:], figure.differences, strict=True):
            interval = f" [{show(gap.low, '+.2f')}, {show(gap.high, '+.2f')}]{'*' if gap.decided else ' '}"
            cells += [show(value, ".2f") + sign, show(gap.difference, "+.2f") + interval]
        yield [figure.part, figure.metric, *cells]
