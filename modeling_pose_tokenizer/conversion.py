"""Turns trees of pose files into a data folder: `train`, `val` and `test` of npz files or packed shards."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from .checking import check_from_json, check_to_json, end_with_parent
from .formats import (
    LIMITS,
    FilePath,
    Limits,
    PoseDataError,
    PoseFileError,
    PoseSequence,
    check_rejected,
    read_sequences,
    sample_frames,
    write_npz,
    write_rejected,
    write_shard,
)
from .layout_conversion import LayoutConversion, find_conversion
from .plausibility import PlausibilityCheck
from .sequences import MAX_FPS, MIN_FPS, replacing
from .skeleton_files import is_skeleton_file, load_skeleton
from .skeleton_pose_tokenizer import SKELETONS, Skeleton
from .sources import SPLITS, Source, SplitRule, find_input, find_sources

# Files that a process converts before it reports back; what it has reported is not done again after a kill.
_FILES_PER_TASK = 16
# Folder in the output for what is not complete yet.
_UNFINISHED = ".unfinished"
# Part of what tells one job from another: what an older program left there is not gone on with.
_VERSION = 3
# Bytes of a file's name, of the 255 that file systems take; a temporary name is longer.
_NAME_BYTES = 200
# How long to wait for it, in which the workers of a killed run notice that they are alone.
_LOCK_SECONDS = 2


@dataclass
class SplitSummary:
    """What a split holds.

    Attributes:
        sequences, frames: Counts.
        seconds: Duration of the sequences whose frame rate is known.
        rates: Sequences of each frame rate, None where it is unknown.
        layouts: Sequences of each layout, or number of keypoints where none is named.
        missing, keypoints: For each token group, keypoints of confidence 0 and all of them, over all frames.
    """

    sequences: int = 0
    frames: int = 0
    seconds: float = 0.0
    rates: Counter[float | None] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    keypoints: Counter[str] = field(default_factory=Counter)

    def add(self, other: "SplitSummary") -> None:
        """Adds what another summary has counted."""
        self.sequences += other.sequences
        self.frames += other.frames
        self.seconds += other.seconds
        self.rates.update(other.rates)
        self.layouts.update(other.layouts)
        self.missing.update(other.missing)
        self.keypoints.update(other.keypoints)

    def add_sequence(self, sequence: PoseSequence, layout: Skeleton | None) -> None:
        """Adds one sequence of a layout, or of keypoints without names."""
        num_keypoints = sequence.poses.shape[1]
        groups = layout.group_keypoints if layout else {"all": range(num_keypoints)}
        self.layouts[(layout and layout.name) or f"{num_keypoints} keypoints"] += 1
        self.sequences += 1
        self.frames += len(sequence.poses)
        self.seconds += len(sequence.poses) / sequence.fps if sequence.fps else 0.0
        self.rates[sequence.fps and round(sequence.fps, 2)] += 1
        missing = (sequence.poses[..., -1] <= 0).sum(0)  # (N,)
        for group, keypoints in groups.items():
            self.missing[group] += int(missing[list(keypoints)].sum())
            self.keypoints[group] += len(sequence.poses) * len(keypoints)

    def to_json(self) -> dict[str, Any]:
        """As what JSON can hold; `from_json` is the inverse."""
        return {key: list(value.items()) if isinstance(value, Counter) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SplitSummary":
        """The inverse of `to_json`."""
        summary = cls()
        for key, value in content.items():
            setattr(summary, key, Counter(dict(value)) if isinstance(value, list) else value)
        return summary


@dataclass
class PreparedData:
    """What `prepare_data` did.

    Attributes:
        splits: The summary of each split that it wrote.
        rejected: The files that it left out.
        check: What cannot be right about those that it read, before they were converted.
        notes: What is approximate about the conversion between layouts, a sentence each.
    """

    splits: dict[str, SplitSummary]
    rejected: list[dict[str, str]]
    check: PlausibilityCheck
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """The summary as text, a line for each split."""
        groups = list(next(iter(self.splits.values())).keypoints)
        rows = [["split", "sequences", "frames", "hours", "layout", "fps", *(f"{group} missing" for group in groups)]]
        for name, split in self.splits.items():
            rates = [f"{rate:g}" if rate else "unknown" for rate, _ in split.rates.most_common(4)]
            rates += ["..."] if len(split.rates) > 4 else []
            shares = [f"{split.missing[group] / split.keypoints[group]:.1%}" for group in groups]
            counts = [f"{split.sequences}", f"{split.frames}", f"{split.seconds / 3600:.2f}"]
            rows.append([name, *counts, ", ".join(split.layouts), ", ".join(rates), *shares])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---- conversion -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What every process must know."""

    folder: Path
    layout: Skeleton | None
    conversion: LayoutConversion | None
    keypoint_dim: int | None
    fps: float | None
    person: int | None
    limits: Limits
    rule: SplitRule
    strict: bool

    @property
    def target(self) -> Skeleton | None:
        """The layout that sequences come out in."""
        return SKELETONS[self.conversion.target] if self.conversion else self.layout

    def read(self, source: Source, check: PlausibilityCheck) -> list[PoseSequence]:
        """All sequences of a file, under their final names, in the layout and at the frame rate that are asked for."""
        sequences = read_sequences(
            source.path, layout=self.layout, keypoint_dim=self.keypoint_dim, person=self.person, limits=self.limits
        )
        return [self.convert(source, sequence, check) for sequence in sequences]

    def convert(self, source: Source, sequence: PoseSequence, check: PlausibilityCheck) -> PoseSequence:
        """One sequence of a file, looked at as it was."""
        check.add(source.path, sequence)
        if sequence.id.partition("/")[0] == source.path.stem:
            sequence.id = source.id + sequence.id.removeprefix(source.path.stem)
        if self.conversion:
            poses = self.conversion(sequence.poses)
            sequence = PoseSequence(sequence.id, poses, sequence.mask, sequence.fps)
        if self.fps and sequence.fps:
            frames = (len(sequence.poses) - 1) * self.fps / sequence.fps + 1
            size = frames * sequence.poses[0].nbytes
            what = f"{len(sequence.poses)} frames at {sequence.fps:g} fps are {frames:.0f} at {self.fps:g}, which"
            self.limits.check(source.path, what, size, sequence.poses.nbytes)
        return sequence if self.fps is None else resample(sequence, self.fps)


@dataclass
class _Result:
    """What came of some files: (split, id) of their sequences, a summary of each split, the files left out.

    `shapes` are (N, D), the first file of each.
    """

    check: PlausibilityCheck
    files: int = 0
    ids: list[tuple[str, str]] = field(default_factory=list)
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)
    shapes: dict[tuple[int, int], str] = field(default_factory=dict)

    def add(self, other: "_Result") -> None:
        """Adds what came of other files."""
        self.files += other.files
        self.ids += other.ids
        self.rejected += other.rejected
        self.shapes = other.shapes | self.shapes
        self.check.merge(other.check)
        for split, summary in other.splits.items():
            self.splits.setdefault(split, SplitSummary()).add(summary)

    def save(self, path: Path) -> None:
        """Writes it; `load` is the inverse."""
        splits = {split: summary.to_json() for split, summary in self.splits.items()}
        content = vars(self) | {"splits": splits, "shapes": list(self.shapes.items())}
        content["check"] = check_to_json(self.check)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, layout: Skeleton | None) -> "_Result":
        """The inverse of `save`."""
        content = json.loads(path.read_text(encoding="utf-8"))
        content["check"] = check_from_json(content["check"], layout)
        content["ids"] = [(split, id) for split, id in content["ids"]]
        content["splits"] = {split: SplitSummary.from_json(own) for split, own in content["splits"].items()}
        content["shapes"] = {(shape[0], shape[1]): file for shape, file in content["shapes"]}
        return cls(**content)


def resample(sequence: PoseSequence, fps: float) -> PoseSequence:
    """The sequence at another frame rate, by linear interpolation; one of unknown rate is taken to have it already."""
    if sequence.fps is None or abs(sequence.fps - fps) <= 1e-6 * fps:
        return PoseSequence(sequence.id, sequence.poses, sequence.mask, fps)
    times = np.arange(round((len(sequence.poses) - 1) * fps / sequence.fps) + 1) * (sequence.fps / fps)
    poses, mask = sample_frames(sequence.poses, sequence.mask, times)
    return PoseSequence(sequence.id, poses, mask, fps)


def _convert(job: _Job, name: str, shard: bool, sources: Sequence[Source]) -> _Result:
    """Converts files to one shard in each split, or to one file for each sequence, and records that it did."""
    result = _Result(PlausibilityCheck(job.layout), files=len(sources))
    packed: dict[str, list[PoseSequence]] = {}
    for source in sources:
        try:
            sequences = job.read(source, result.check)
        except PoseFileError as error:
            if job.strict:
                raise PoseDataError(f"{error}.") from None
            result.rejected.append({"path": error.path, "reason": error.reason})
            continue
        for sequence in sequences:
            split = job.rule(sequence.id, source.split)
            num_keypoints, keypoint_dim = sequence.poses.shape[1:]
            result.ids.append((split, sequence.id))
            result.splits.setdefault(split, SplitSummary()).add_sequence(sequence, job.target)
            result.shapes.setdefault((num_keypoints, keypoint_dim), os.fspath(source.path))
            if shard:
                packed.setdefault(split, []).append(sequence)
            else:
                write_npz(job.folder / split / f"{_file_name(sequence.id)}.npz", sequence)
    if len(result.shapes) == 1:  # others cannot be packed, and are refused when all is known
        for split, sequences in packed.items():
            write_shard(job.folder / split / f"{name}.npz", sequences)
    result.save(job.folder / "done" / f"{name}.json")
    return result


def _file_name(id: str) -> str:
    """The id as a file name: it comes from a file, and must not lead out of the folder, nor be too long for one."""
    name = re.sub(r"[^\w.+=@-]+", "_", id).lstrip(".") or "_"
    if len(name.encode()) > _NAME_BYTES:
        digest = hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name.encode()[: _NAME_BYTES - 17].decode(errors='ignore')}-{digest}"
    return name


def _convert_all(job: _Job, sources: Sequence[Source], shards: int | None, num_proc: int) -> _Result:
    """Deals the files out to processes and adds up what came of them, without those that are done already."""
    if shards:
        count = min(shards, len(sources))
        tasks = {f"shard-{index:05d}-of-{count:05d}": sources[index::count] for index in range(count)}
    else:
        starts = range(0, len(sources), _FILES_PER_TASK)
        tasks = {f"{start:09d}": sources[start : start + _FILES_PER_TASK] for start in starts}
    total = _Result(PlausibilityCheck(job.layout))
    results: dict[str, _Result] = {}
    for name in tasks:
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is done again
            results[name] = _Result.load(job.folder / "done" / f"{name}.json", job.layout)
    left = {name: own for name, own in tasks.items() if name not in results}
    done = sum(result.files for result in results.values())
    convert = partial(_convert, job)
    with ProcessPoolExecutor(max(min(num_proc, len(left)), 1), initializer=end_with_parent) as pool:
        running = pool.map(convert, left, [bool(shards)] * len(left), left.values())
        with tqdm(total=len(sources), initial=done, unit="file") as bar:
            for name, result in zip(left, running, strict=True):
                results[name] = result
                bar.update(result.files)
    for name in tasks:  # in their order, so that a resumed run gives the same as one that was not stopped
        total.add(results[name])
    return total


def _check_ids(ids: Sequence[tuple[str, str]], rule: SplitRule, wanted: Iterable[str]) -> None:
    """Every id names one sequence, the rule fits the data, and no split that was asked for is empty."""
    if not ids:
        raise PoseDataError("None of the input files can be used.")
    (split, name), count = Counter((split, _file_name(id)) for split, id in ids).most_common(1)[0]
    if count > 1:
        raise PoseDataError(f"{count} sequences of the input would be named {name} in {split}: rename their files.")
    unused = rule.unused(id for _, id in ids)
    if unused:
        raise PoseDataError(f"The split by {rule.by} expects {unused[0]}, but no sequence of the input goes by it.")
    empty = set(wanted) - {split for split, _ in ids}
    if empty:
        raise PoseDataError(f"The split {min(empty)} is empty: none of {len(ids)} sequences fell into it.")


def _check_shapes(shapes: Mapping[tuple[int, int], str]) -> None:
    """All sequences have as many keypoints and values."""
    if len(shapes) > 1:
        (first, file), (second, other) = list(shapes.items())[:2]
        raise PoseDataError(
            f"The input mixes {first[0]} keypoints of {first[1]} values ({file}) with {second[0]} of {second[1]} "
            f"({other}): prepare them apart, or name the layout."
        )


@contextmanager
def _unfinished(output: Path, key: str) -> Iterator[Path]:
    """The folder for what is not complete yet, empty or as the same job left it.

    It stays for the next run when this one is killed, and goes when this one ends or finds that the data will not do.

    Raises:
        PoseDataError: Another process works in it.
    """
    work = output / _UNFINISHED
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=_LOCK_SECONDS):
            if not (work / "key").exists() or (work / "key").read_text() != key:
                for path in work.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != "lock":
                        path.unlink()
                for name in (*SPLITS, "done"):
                    (work / name).mkdir()
                with replacing(work / "key") as temporary:
                    temporary.write_text(key)
            for path in work.glob("*/.*.tmp"):  # half a file
                path.unlink()
            try:
                yield work
            except PoseDataError:
                shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work)
    except Timeout:
        raise PoseDataError(f"{output} is being written by another process.") from None


def _key_of(sources: Sequence[Source], *settings: Any) -> str:
    """What tells one job from another: what it reads, as it stands on the disk, and how."""
    files = []
    for source in sources:
        name: tuple[Any, ...] = (os.fspath(source.path), source.id, source.split)
        with suppress(OSError):  # a link that leads nowhere is refused when it is read
            status = source.path.stat()
            name += (status.st_size, status.st_mtime_ns)
        files.append(name)
    return hashlib.sha256(json.dumps([_VERSION, files, settings], default=vars).encode()).hexdigest()


def _move(work: Path, output: Path, result: _Result) -> None:
    """Puts the splits into their place. A run that is killed here goes on here."""
    (work / "moving").touch()
    for split in SPLITS:
        if split not in result.splits:
            shutil.rmtree(output / split, ignore_errors=True)
        elif (work / split).exists():
            shutil.rmtree(output / split, ignore_errors=True)
            os.replace(work / split, output / split)


def prepare_data(
    inputs: Sequence[str],
    output: FilePath,
    *,
    layout: str | None = "coco_wholebody_133",
    to_layout: str | None = None,
    keypoint_dim: int | None = None,
    fps: float | None = None,
    person: int | None = None,
    split_by: str = "folder",
    splits: Mapping[str, str] | None = None,
    shards: int | None = None,
    strict: bool = False,
    max_rejected: float = 0.01,
    num_proc: int | None = None,
    overwrite: bool = False,
    limits: Limits = LIMITS,
) -> PreparedData:
    """Converts pose files to a data folder. A split is complete or not there: what fails leaves none behind.

    A run that was killed goes on where it stopped when the same is asked for again: what is done waits in
    `.unfinished`, and a split appears when all are complete.

    Args:
        inputs: Files and folders of pose files of any kind that `formats.find_format` knows, or `package:path` inside
            an installed Python package. What is of no known kind is listed with the files left out.
        output: The data folder; gets a folder for each split and `rejected.jsonl`.
        layout: Layout that files are brought into by the names of their keypoints, and that those without names (npz,
            npy) must have: a name or a YAML file (see `skeleton_files`); None leaves them as they are.
        to_layout: Name of the layout that sequences are then converted to (see `layout_conversion`); None keeps it.
        keypoint_dim: D that files must have; None means 3, 4 for motion capture, and any for npz and npy files.
        fps: Frame rate to bring sequences to; one that states none is taken to have it. None keeps their own.
        person: The person to read of files with several, from 0 on; None means the one of whom most is seen.
        split_by: `folder`, `prefix`, `hash` or a JSON file, see `SplitRule`.
        splits: Prefixes or shares of `val` and `test`, see `SplitRule`.
        shards: Pack each split into at most so many shards; None writes one file for each sequence.
        strict: Stop at the first file that cannot be used.
        max_rejected: Share of files that may be left out.
        num_proc: Processes that convert; None means one for each CPU.
        overwrite: Replace the splits that are in the output already.
        limits: How much one file may ask for.

    Raises:
        PoseDataError: An input is missing, too many files cannot be used, a split stays empty, or the output cannot
            be written.
    """
    for name, value in (("shards", shards), ("num_proc", num_proc)):
        if value is not None and value < 1:
            raise PoseDataError(f"{name} is {value}, expected a number above 0.")
    if fps is not None and not MIN_FPS <= fps <= MAX_FPS:
        raise PoseDataError(f"fps is {fps:g}, expected a number from {MIN_FPS:g} to {MAX_FPS:g}.")
    if not 0 <= max_rejected <= 1:
        raise PoseDataError(f"max_rejected is {max_rejected}, expected a share from 0 to 1.")
    skeleton, conversion = _layouts(layout, to_layout)  # an unknown name is refused before anything else happens
    rule = SplitRule(split_by, splits or {})
    found = [find_sources(text, by_folder=split_by == "folder") for text in inputs]
    sources = [source for known, _ in found for source in known]
    output = Path(output)
    settings = (repr(skeleton), to_layout, keypoint_dim, fps, person, rule, shards, limits)
    try:
        key = _key_of(sources, *settings)
        moving = (output / _UNFINISHED / "moving").exists() and (output / _UNFINISHED / "key").read_text() == key
        present = [split for split in SPLITS if (output / split).exists()]
        if present and not overwrite and not moving:
            raise PoseDataError(f"{output} holds {', '.join(present)} already: give another output, or --overwrite.")
        with _unfinished(output, key) as work:
            job = _Job(work, skeleton, conversion, keypoint_dim, fps, person, limits, rule, strict)
            result = _convert_all(job, sources, shards, num_proc or os.cpu_count() or 1)
            rejected = result.rejected + [row for _, unknown in found for row in unknown]
            if rejected:
                write_rejected(output, rejected)  # it stays even where they are too many
            check_rejected(" ".join(inputs), result.rejected, len(sources), max_rejected)
            _check_ids(result.ids, rule, splits or ())
            _check_shapes(result.shapes)
            _move(work, output, result)
            write_rejected(output, rejected)
    except OSError as error:
        raise PoseDataError(f"{output} cannot be written ({error.strerror or error}).") from None
    except BrokenProcessPool:
        raise PoseDataError(
            "A process was killed, most likely for lack of memory: lower num_proc, or find the file with --check."
        ) from None
    finally:
        with suppress(OSError):
            output.rmdir()  # where nothing was written to it
    summaries = {split: result.splits[split] for split in SPLITS if split in result.splits}
    return PreparedData(summaries, rejected, result.check, conversion.notes if conversion else ())


def _layouts(layout: str | None, to_layout: str | None) -> tuple[Skeleton | None, LayoutConversion | None]:
    """The layout that files come into, and what becomes of it then."""
    skeleton = None if layout is None else load_skeleton(layout)
    if to_layout is None:
        return skeleton, None
    if layout is None or is_skeleton_file(layout):
        raise PoseDataError(f"to_layout is {to_layout}, but layout is {layout}, expected the name of one.")
    return skeleton, find_conversion(layout, to_layout)


__all__ = ["PreparedData", "SplitRule", "SplitSummary", "find_input", "prepare_data", "resample"]
