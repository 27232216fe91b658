"""What cannot be right about pose data, with file and frame: exchanged axes and sides, mixed units, frozen and jumping
tracks, wrong frame rates. Each sequence is looked at once, and memory does not grow with their number.

Letters: T frames, N keypoints, D values per keypoint (confidence last). A unit is the length of the layout's scale
pair in the sequence, a shoulder width: about 0.4 m (biacromial breadth of ANSUR II: 0.41 m men, 0.37 m women).
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .plausibility_report import render_report
from .plausibility_tracks import MIN_FRAMES, REST_SPEED, Histogram, Landmarks, Track, lengths, median
from .sequences import FilePath, PoseFileError, PoseSequence, replacing
from .skeleton_pose_tokenizer import Skeleton, likely_layout

KINDS = {
    "swapped axes": "x and y are exchanged, or a video was turned: the body lies across the picture",
    "mixed units": "coordinates from 0 to 1 and in pixels stand in one set or one file",
    "left and right": "the sides are exchanged: of hands, of body against face, or of a file against the set",
    "frozen track": "a part does not move at all for a second",
    "frame rate": "frames repeat or were interpolated, or fps does not fit the motion",
    "teleporting hand": "a hand jumps further within a frame than an arm can move it",
}
# Share of the frames that must agree before a whole file is called exchanged: people turn and lean for a while.
MOST_FRAMES = 0.8
# Head over shoulders must be so much longer along x than along all other axes; upright people have it the other way.
AXIS_RATIO = 2.0
# 95 % of the numbers of a file under the first: normalised, or metres; over the second: pixels, or millimetres.
SMALL, LARGE = 10.0, 32.0
# Hands and wrists less than this apart (units) can be anyone's.
MIN_APART = 0.5
# A hand so near to an arm's wrist (units) is at it: 0.02 to 0.18 in the demo's recordings.
AT_WRIST = 0.25
# Shoulders and eyes, or shoulders and hips, point apart: the cosine between them. Necks turn by 80 degrees.
OPPOSED = -0.5
# A set in which so many of at least so many files look the same way has a convention; the others are mirrored.
SET_SHARE, SET_FILES = 0.9, 20
# Estimators jitter: so many seconds with the very same numbers are a held value.
FROZEN_SECONDS, FROZEN_FRAMES = 1.0, 10
# So many frames that repeat the one before: video that was written at more frames than were recorded.
REPEATED_SHARE = 0.15
# So many that lie half-way between their neighbours, to a thousandth: 7 % in real recordings at most.
BETWEEN_SHARE = 0.25
# What cameras and motion capture record.
MIN_FPS, MAX_FPS = 5.0, 250.0
# Motion so many times faster or slower than the set's median, and so many of the set's deviations away.
RATE_RATIO, RATE_DEVIATIONS = {"tempo": 3.0, "speed": 4.0}, 4.0
# Wrists reach 10 m/s in a throw, 3 in signing: 25 shoulder widths a second; under 1.5 of them it may be jitter.
HAND_SPEED, HAND_JUMP = 25.0, 1.5
# Problems of one kind that are kept; the rest is counted.
MAX_KEPT = 100


@dataclass(frozen=True)
class Problem:
    """Something that cannot be right; `str` is one sentence.

    Attributes:
        path: The file, and the sequence in it where it holds several.
        frame: The first frame concerned, or None for the whole sequence.
        kind: One of `KINDS`.
        sentence: What was found, and what was expected.
    """

    path: str
    frame: int | None
    kind: str
    sentence: str

    def __str__(self) -> str:
        place = self.path if self.frame is None else f"{self.path}, frame {self.frame}"
        return f"{place}: {self.kind}: {self.sentence}"


def _mostly(bad: np.ndarray, valid: np.ndarray) -> bool:
    """Whether most of the valid frames, and enough of them, are bad."""
    return bool(valid.sum() >= MIN_FRAMES and (bad & valid).sum() >= MOST_FRAMES * valid.sum())


def _runs(bad: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, length) of each run of True."""
    steps = np.flatnonzero(np.diff(np.concatenate([[0], bad.astype(np.int8), [0]])))
    yield from ((int(start), int(end - start)) for start, end in zip(steps[::2], steps[1::2], strict=True))


# ---- one sequence: (frame, kind, sentence) -----------------------------------------------------------------------


def _check_axes(track: Track, marks: Landmarks) -> Iterator[tuple[int | None, str, str]]:
    """The head is beside the shoulders, and in pictures the shoulders are above each other."""
    if not marks.shoulders:
        return
    middle = track.mean(marks.shoulders)
    up = track.mean(marks.head) - middle if marks.head else middle - track.mean([k for p in marks.hips for k in p])
    up, across = np.abs(up), np.abs(np.diff(track.points[:, list(marks.shoulders)], axis=1)[:, 0])  # (T, D-1)
    valid = np.isfinite(up).all(-1) & np.isfinite(across).all(-1) & (lengths(up) > 0)
    with np.errstate(invalid="ignore"):
        lying = up[:, 0] > AXIS_RATIO * lengths(up[:, 1:])
        if up.shape[1] == 2:
            lying &= across[:, 1] > AXIS_RATIO * across[:, 0]
    if _mostly(lying, valid):
        share = (lying & valid).sum() / valid.sum()
        yield (
            None,
            "swapped axes",
            f"the head is beside the shoulders in {share:.0%} of frames: x and y look exchanged, or the video turned",
        )


def _check_units(track: Track) -> Iterator[tuple[int | None, str, str]]:
    """Some frames are in another unit than most."""
    odd = np.flatnonzero(track.odd)
    if len(odd):
        size, usual = track.sizes[odd[0]], median(track.sizes)
        frames = "1 frame is so" if len(odd) == 1 else f"{len(odd)} frames are so"
        yield int(odd[0]), "mixed units", f"the keypoints span {size:.4g} here, {usual:.4g} in most frames ({frames})"


def _check_sides(track: Track, marks: Landmarks) -> Iterator[tuple[int | None, str, str]]:
    """Hands at the other's wrist; shoulders that point against the face or the hips."""
    if marks.wrists and track.unit > 0:
        left, right, own_left, own_right = (track.points[:, keypoint] for keypoint in marks.wrists)
        for hand, twin, own, other, name in (
            (left, right, own_left, own_right, "left"),
            (right, left, own_right, own_left, "right"),
        ):
            here, there, taken = (
                np.nan_to_num(lengths(one - wrist) / track.unit, nan=np.inf)
                for one, wrist in ((hand, own), (hand, other), (twin, other))
            )
            with np.errstate(invalid="ignore"):
                near = lengths(own - other) < MIN_APART * track.unit  # anyone's
            valid = (np.minimum(here, there) < AT_WRIST) & ~near
            swapped = (there < here) & (taken > there)
            if _mostly(swapped, valid):
                share = (swapped & valid).sum() / valid.sum()
                first = int(np.flatnonzero(swapped & valid)[0])
                sentence = f"the {name} hand is at the other arm's wrist in {share:.0%} of frames"
                yield first, "left and right", sentence
    for name, pairs in (("face", marks.eyes), ("hips", marks.hips)):
        if not pairs or not marks.shoulders:
            continue
        shoulders = track.points[:, marks.shoulders[0]] - track.points[:, marks.shoulders[1]]
        others = track.mean([pair[0] for pair in pairs]) - track.mean([pair[1] for pair in pairs])
        norms = lengths(shoulders) * lengths(others)
        valid = np.isfinite(norms) & (norms > 1e-3 * track.unit**2)
        with np.errstate(invalid="ignore", divide="ignore"):
            opposed = (shoulders * others).sum(-1) / norms < OPPOSED
        if _mostly(opposed, valid):
            share = (opposed & valid).sum() / valid.sum()
            yield None, "left and right", f"shoulders and {name} point to opposite sides in {share:.0%} of frames"


def _check_frozen(track: Track, groups: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int | None, str, str]]:
    """A part that has the very same numbers for a second."""
    least = max(FROZEN_FRAMES, round(FROZEN_SECONDS * (track.fps or 25.0)))
    for name, keypoints in groups.items():
        seen, same = track.seen[:, list(keypoints)], track.same[:, list(keypoints)]
        still = (same | ~seen).all(-1) & (seen.sum(-1) >= min(3, len(keypoints)))
        runs = [run for run in _runs(still) if run[1] >= least]
        if runs:
            start, length = max(runs, key=lambda run: run[1])
            yield start, "frozen track", f"{name} does not move at all for {length} frames"


def _check_rate(track: Track) -> Iterator[tuple[int | None, str, str]]:
    """Frames that repeat the one before or were interpolated, and rates that nothing records."""
    if track.fps is not None and not MIN_FPS <= track.fps <= MAX_FPS:
        yield None, "frame rate", f"fps is {track.fps:g}, expected {MIN_FPS:g} to {MAX_FPS:g}"
    short = track.repeated.copy()
    for start, length in _runs(track.repeated):
        if length >= FROZEN_FRAMES:  # a track that is held, not a rate
            short[start : start + length] = False
    steps = len(short) - 1
    if short.sum() >= MIN_FRAMES and short.sum() >= REPEATED_SHARE * steps:
        share = short.sum() / steps
        real = f"; {track.fps * (1 - share):.3g} fps were recorded, not {track.fps:g}" if track.fps else ""
        yield int(np.argmax(short)), "frame rate", f"{share:.0%} of the frames repeat the one before{real}"
    if len(track.points) > MIN_FRAMES:
        between, moving = track.between
        if between.sum() >= MIN_FRAMES and between.sum() >= BETWEEN_SHARE * moving.sum():
            share = between.sum() / moving.sum()
            sentence = f"{share:.0%} of the frames lie just half-way between the others: interpolated, not recorded"
            yield int(np.argmax(between)), "frame rate", sentence


def _check_hands(track: Track, marks: Landmarks) -> Iterator[tuple[int | None, str, str]]:
    """A hand jumps, against the shoulders and the other keypoints."""
    if not marks.shoulders or not track.unit > 0:
        return
    origin = track.mean(marks.shoulders)
    limit = max(HAND_JUMP, HAND_SPEED / (track.fps or 25.0))
    for side, keypoints in marks.hands.items():
        if not keypoints:
            continue
        enough = track.seen[:, list(keypoints)].sum(-1) >= (len(keypoints) + 1) // 2
        place = np.where((enough & ~track.odd)[:, None], track.mean(keypoints) - origin, np.nan) / track.unit
        jumps = lengths(np.diff(place, axis=0))  # (T-1,)
        far = np.flatnonzero(jumps > limit)
        if len(far):
            sentence = f"the {side} hand jumps {jumps[far[0]]:.1f} shoulder widths from the frame before"
            more = f" ({len(far)} such jumps)" if len(far) > 1 else ""
            yield int(far[0]) + 1, "teleporting hand", sentence + more


# ---- the set ------------------------------------------------------------------------------------------------------


@dataclass
class _Class:
    """How many files look one way, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        self.count += 1
        if len(self.first) < MAX_KEPT:
            self.first.append(path)

    def merge(self, other: "_Class") -> None:
        self.count += other.count
        self.first = (self.first + other.first)[:MAX_KEPT]


class PlausibilityCheck:
    """Looks at sequences one by one, then at the set that they make.

    Args:
        layout: The layout that all of them have; None where none is known: sides, axes and hands are not checked then.

    Attributes:
        counts: Problems of each kind in single sequences, also of those that are not kept.
    """

    def __init__(self, layout: Skeleton | None = None) -> None:
        self.layout = layout
        self._marks = None if layout is None else Landmarks(layout)
        self.counts: Counter[str] = Counter()
        self.sequences = self.frames = 0
        self.fps: Counter[str] = Counter()
        self.found: Counter[str] = Counter()  # keypoints of each part that were found, and all
        self.possible: Counter[str] = Counter()
        self.histograms = {
            "frames": Histogram(1, 1e6, log=True),
            "seconds": Histogram(0.01, 1e5, log=True),
            "scale": Histogram(1e-4, 1e5, log=True),
            "speed": Histogram(1e-3, 1e4, log=True, bins=280),
            "tempo": Histogram(1e-2, 1e4, log=True, bins=280),
            "confidence": Histogram(0, 1, bins=40),
        }
        self._kept: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
        self._units = {"small": _Class(), "large": _Class()}
        self._facing = {"left": _Class(), "right": _Class()}
        # The files at both ends of these distributions: the value, the speed, the file.
        self._extremes: dict[str, list[tuple[float, float, str]]] = {"speed": [], "tempo": []}

    def add(self, path: FilePath, sequence: PoseSequence) -> list[Problem]:
        """Looks at one sequence.

        Args:
            path: The file that it is from, for the sentences.
            sequence: Poses (T, N, D) with the layout's N.

        Returns:
            What is wrong with it by itself; `problems` has what is wrong with the set, too.

        Raises:
            PoseFileError: It has another number of keypoints than the layout.
        """
        text, count = os.fspath(path), sequence.poses.shape[1]
        if self.layout is not None and count != self.layout.num_keypoints:
            wanted = f"{self.layout.num_keypoints} of {self.layout.name or 'the layout'}"
            raise PoseFileError(path, f"poses have {count} keypoints, expected {wanted}{likely_layout(count)}")
        if sequence.id != os.path.splitext(os.path.basename(text))[0]:
            text = f"{text} ({sequence.id})"
        groups = self.layout.group_keypoints if self.layout else {"all": tuple(range(count))}
        track = Track(sequence, self.layout)
        found = [*_check_units(track), *_check_frozen(track, groups), *_check_rate(track)]
        if (marks := self._marks) is not None:
            found += [*_check_axes(track, marks), *_check_sides(track, marks), *_check_hands(track, marks)]
        problems = [
            Problem(text, None if frame is None else int(track.frames[frame]), *what) for frame, *what in found
        ]
        for problem in problems:
            self._keep(problem)
        self._count(text, sequence, track, groups)
        return problems

    def _keep(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        if len(self._kept[problem.kind]) < MAX_KEPT:
            self._kept[problem.kind].append(problem)

    def _count(self, path: str, sequence: PoseSequence, track: Track, groups: Mapping[str, tuple[int, ...]]) -> None:
        """Adds a sequence to the distributions and to what tells the set's conventions."""
        length, looked_at = int(sequence.mask.sum()), int(track.mask.sum())
        self.sequences += 1
        self.frames += length
        self.fps["unknown" if sequence.fps is None or len(self.fps) > 1000 else f"{sequence.fps:.4g}"] += 1
        for group, keypoints in groups.items():
            self.found[group] += int(track.found[:, list(keypoints)].sum())
            self.possible[group] += looked_at * len(keypoints)
        values: dict[str, np.ndarray | float] = {"frames": length, "scale": track.unit, "speed": track.speed}
        values |= {"confidence": track.confidence[track.found], "tempo": track.tempo}
        values |= {} if sequence.fps is None else {"seconds": length / sequence.fps}
        for name, value in values.items():
            self.histograms[name].add(value)
        size = np.abs(track.points[track.seen])
        if len(size):
            typical = float(np.quantile(size, 0.95))
            if not SMALL < typical < LARGE:
                self._units["small" if typical <= SMALL else "large"].add(path)
        if self.layout is not None and self.layout.scale_pair and sequence.poses.shape[-1] == 3:
            left, right = (track.points[:, keypoint, 0] for keypoint in self.layout.scale_pair)
            valid, sign = np.isfinite(left - right), left > right
            for name, faces in (("left", sign), ("right", ~sign)):
                if _mostly(faces, valid):
                    self._facing[name].add(path)
        if track.speed > 0:
            for name, rows in self._extremes.items():
                if (value := getattr(track, name)) > 0:
                    self._extremes[name] = self._ends([*rows, (value, track.speed, path)])

    @staticmethod
    def _ends(rows: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
        """The first and the last of the rows in order."""
        rows = sorted(rows)
        return rows if len(rows) <= 2 * MAX_KEPT else rows[:MAX_KEPT] + rows[-MAX_KEPT:]

    def merge(self, other: "PlausibilityCheck") -> None:
        """Adds what another check of the same layout has seen, e.g. in another process."""
        self.sequences += other.sequences
        self.frames += other.frames
        for own, more in (
            (self.fps, other.fps),
            (self.found, other.found),
            (self.possible, other.possible),
            (self.counts, other.counts),
        ):
            own.update(more)
        for name, histogram in self.histograms.items():
            histogram.counts = histogram.counts + other.histograms[name].counts
        for kind, kept in self._kept.items():
            self._kept[kind] = (kept + other._kept[kind])[:MAX_KEPT]
        for classes, others in ((self._units, other._units), (self._facing, other._facing)):
            for name, own_class in classes.items():
                own_class.merge(others[name])
        for name, rows in other._extremes.items():
            self._extremes[name] = self._ends(self._extremes[name] + rows)

    @property
    def problems(self) -> list[Problem]:
        """What is wrong, kind by kind: in single sequences, at most `MAX_KEPT` of each, then with the set."""
        return [problem for kind in KINDS for problem in (*self._kept[kind], *self._of_set(kind))]

    def table(self) -> str:
        """The kinds as text: how many problems of each there are, and the first. Problems of the set count as kept."""
        rows = [["kind", "found", "the first"]]
        for kind in KINDS:
            of_set = list(self._of_set(kind))
            first = next(iter((*self._kept[kind], *of_set)), None)
            rows.append([kind, str(self.counts[kind] + len(of_set)), "" if first is None else str(first)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def write_report(self, path: FilePath) -> None:
        """Writes one HTML page that needs no other file: the problems, and the distributions of the data.

        Raises:
            OSError: It cannot be written.
        """
        with replacing(Path(path)) as temporary:
            temporary.write_text(render_report(self), encoding="utf-8")

    def _of_set(self, kind: str) -> Iterator[Problem]:
        if kind == "mixed units":
            few, most = sorted(self._units.values(), key=lambda own: own.count)
            words = {id(self._units["small"]): f"under {SMALL:g}", id(self._units["large"]): f"over {LARGE:g}"}
            for path in few.first if most.count else ():
                sentence = f"its coordinates are {words[id(few)]}, those of {most.count} files {words[id(most)]}"
                yield Problem(path, None, kind, f"{sentence}, such as {most.first[0]}")
        elif kind == "left and right":
            few, most = sorted(self._facing.values(), key=lambda own: own.count)
            if most.count >= SET_FILES and most.count >= SET_SHARE * (most.count + few.count):
                for path in few.first:
                    yield Problem(
                        path, None, kind, f"it is mirrored against {most.count} files, as {most.first[0]} is not"
                    )
        elif kind == "frame rate":
            yield from self._of_rate()

    def _of_rate(self) -> Iterator[Problem]:
        """Files that move much faster or slower than the set: further, or in quicker turns.

        A wrong fps makes both larger or both smaller; a hand that waves goodbye turns quickly, and goes no further.
        """
        usual, told = {name: self.histograms[name].quantile(0.5) for name in self._extremes}, set()
        for name, what in (("tempo", "its motion turns"), ("speed", "it moves")):
            values = self.histograms[name]
            if values.total < SET_FILES:
                continue
            spread = np.log(values.quantile(0.84) / values.quantile(0.16)) / 2
            limit = max(np.log(RATE_RATIO[name]), RATE_DEVIATIONS * spread)
            for value, speed, path in self._extremes[name]:
                faster = value > usual[name]
                agree = (speed > usual["speed"]) == faster and (speed > REST_SPEED or (name == "tempo" and not faster))
                if path in told or not agree or abs(np.log(value / usual[name])) <= limit:
                    continue
                told.add(path)
                ratio = max(value / usual[name], usual[name] / value)
                how = f"{ratio:.1f} times {'faster' if faster else 'slower'}"
                sentence = f"{what} {how} than half of the {values.total} files; is its fps right?"
                yield Problem(path, None, "frame rate", sentence)
