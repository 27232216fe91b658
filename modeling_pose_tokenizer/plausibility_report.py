"""The data report: what a plausibility check found and how the data is distributed, as one page without scripts."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .plausibility import PlausibilityCheck
    from .plausibility_tracks import Histogram

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2433; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }
td { border-top: 1px solid #dde1ea; overflow-wrap: anywhere } figure { display: inline-block; margin: 0 1.5rem 1rem 0 }
figcaption { font-size: .85rem; color: #555f75; max-width: 420px }
rect { fill: #3b6fb5 } text { font-size: 10px; fill: #555f75 }
.plots { display: flex; flex-wrap: wrap }
"""
_TITLES = {
    "frames": "length in frames",
    "seconds": "length in seconds",
    "scale": "shoulder width in the files' own units",
    "speed": "speed in shoulder widths per second (9 of 10 keypoints are slower)",
    "tempo": "how quickly motion turns: acceleration by speed, 1/s",
    "confidence": "confidence of the keypoints that were found",
}
_WIDTH, _HEIGHT, _MARGIN = 420, 150, 18
_RATES = 12  # frame rates that are shown


def render_report(check: "PlausibilityCheck") -> str:
    """The page as text. Everything that comes from the data is escaped."""
    problems = check.problems
    layout = (check.layout.name or "a layout of its own") if check.layout else "no layout"
    found = _table(["file", "frame", "kind", "what"], ([p.path, p.frame, p.kind, p.sentence] for p in problems))
    total = sum(check.counts.values())
    kept = sum(map(len, check._kept.values()))
    left_out = f"<p>{total - kept} more are of the same kinds.</p>" if total > kept else ""
    shares = {part: 1 - check.found[part] / max(every, 1) for part, every in check.possible.items()}
    texts = [f"{share:.1%}" for share in shares.values()]
    plots = [
        _bars(list(shares), list(shares.values()), "share of keypoints that are missing", texts),
        _rates(check),
        *(_histogram(title, check.histograms[name]) for name, title in _TITLES.items()),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Pose data</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>Pose data</h1>'
        f"<p>{check.sequences} sequences, {check.frames} frames, {escape(layout)}.</p>"
        f"<h2>Problems</h2>{found if problems else '<p>Nothing implausible was found.</p>'}{left_out}"
        f'<h2>Distributions</h2><div class="plots">{"".join(plots)}</div></body></html>\n'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = ("".join(f"<td>{'' if cell is None else escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _rates(check: "PlausibilityCheck") -> str:
    """Sequences of each frame rate, the most frequent ones."""
    rates = check.fps.most_common(_RATES)
    counts = [float(count) for _, count in rates]
    return _bars([rate for rate, _ in rates], counts, "frames per second", [str(count) for _, count in rates])


def _bars(labels: Sequence[str], values: Sequence[float], title: str, texts: Sequence[str]) -> str:
    """A horizontal bar for each label."""
    most = max([*values, 1e-12])
    height = 18 * max(len(values), 1)
    rows = [
        f'<text x="95" y="{18 * row + 12}" text-anchor="end">{escape(label[:18])}</text>'
        f'<rect x="100" y="{18 * row + 3}" width="{240 * value / most:.1f}" height="12"/>'
        f'<text x="{105 + 240 * value / most:.1f}" y="{18 * row + 12}">{escape(text)}</text>'
        for row, (label, value, text) in enumerate(zip(labels, values, texts, strict=True))
    ]
    return _figure(title, height, rows)


def _histogram(title: str, histogram: "Histogram") -> str:
    """A histogram over the range that holds something, with its median."""
    filled = np.flatnonzero(histogram.counts)
    if not len(filled):
        return _figure(f"{title}: nothing is known", 20, [])
    first, last = int(filled[0]), int(filled[-1]) + 1
    counts, edges = histogram.counts[first:last], histogram.edges
    width = _WIDTH / len(counts)
    rows = [
        f'<rect x="{width * place:.1f}" y="{_HEIGHT - bar:.1f}" width="{max(width - 1, 0.5):.1f}" height="{bar:.1f}"/>'
        for place, bar in enumerate(_HEIGHT * counts / counts.max())
        if bar
    ]
    ends = ((0, "start", edges[first]), (_WIDTH, "end", edges[last]))
    rows += [f'<text x="{x}" y="{_HEIGHT + 12}" text-anchor="{side}">{value:.3g}</text>' for x, side, value in ends]
    scale = ", log scale" if histogram.log else ""
    return _figure(f"{title}: median {histogram.quantile(0.5):.3g}{scale}", _HEIGHT + _MARGIN, rows)


def _figure(title: str, height: int, rows: Sequence[str]) -> str:
    box = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img"'
    return f"<figure><svg {box}>{''.join(rows)}</svg><figcaption>{escape(title)}</figcaption></figure>"
