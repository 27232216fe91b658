"""Turns trees of pose files into a data folder: `train`, `val` and `test` of npz files or packed shards."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .formats import (
    FilePath,
    PoseDataError,
    PoseFileError,
    PoseSequence,
    check_rejected,
    read_npz,
    read_pose,
    sample_frames,
    write_npz,
    write_rejected,
    write_shard,
)
from .skeleton_pose_tokenizer import get_skeleton

SPLITS = ("train", "val", "test")
# Names that folders of splits go by.
_SPLIT_FOLDERS = {**{name: name for name in SPLITS}, "training": "train", "dev": "val", "validation": "val"}
_SUFFIXES = (".npz", ".pose")
# Files that a process converts before it reports back.
_FILES_PER_TASK = 16


@dataclass
class SplitSummary:
    """What a split holds.

    Attributes:
        sequences, frames: Counts.
        seconds: Duration of the sequences whose frame rate is known.
        rates: Sequences of each frame rate, None where it is unknown.
        missing, keypoints: For each token group, keypoints of confidence 0 and all of them, over all frames.
    """

    sequences: int = 0
    frames: int = 0
    seconds: float = 0.0
    rates: Counter[float | None] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    keypoints: Counter[str] = field(default_factory=Counter)

    def add(self, other: "SplitSummary") -> None:
        """Adds what another summary has counted."""
        self.sequences += other.sequences
        self.frames += other.frames
        self.seconds += other.seconds
        self.rates.update(other.rates)
        self.missing.update(other.missing)
        self.keypoints.update(other.keypoints)

    def add_sequence(self, sequence: PoseSequence, groups: Mapping[str, Sequence[int]]) -> None:
        """Adds one sequence."""
        self.sequences += 1
        self.frames += len(sequence.poses)
        self.seconds += len(sequence.poses) / sequence.fps if sequence.fps else 0.0
        self.rates[sequence.fps and round(sequence.fps, 2)] += 1
        for group, keypoints in groups.items():
            confidence = sequence.poses[:, list(keypoints), -1]
            self.missing[group] += int((confidence <= 0).sum())
            self.keypoints[group] += confidence.size


@dataclass
class PreparedData:
    """What `prepare_data` did: the summary of each split that it wrote, and the files that it left out."""

    splits: dict[str, SplitSummary]
    rejected: list[dict[str, str]]

    def table(self) -> str:
        """The summary as text, a line for each split."""
        groups = list(next(iter(self.splits.values())).keypoints)
        rows = [["split", "sequences", "frames", "hours", "fps", *(f"{group} missing" for group in groups)]]
        for name, split in self.splits.items():
            rates = [f"{rate:g}" if rate else "unknown" for rate, _ in split.rates.most_common(4)]
            rates += ["..."] if len(split.rates) > 4 else []
            shares = [f"{split.missing[group] / split.keypoints[group]:.1%}" for group in groups]
            counts = [f"{split.sequences}", f"{split.frames}", f"{split.seconds / 3600:.2f}"]
            rows.append([name, *counts, ", ".join(rates), *shares])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# ---- which file goes where ------------------------------------------------------------------------------------------


class SplitRule:
    """Gives each sequence its split.

    Args:
        by: `folder`: the folder named train, val or test that the file is in. `prefix`: what the sequence's id begins
            with. `hash`: a share, by the hash of the id, so that a sequence stays where it is when others are added.
            Or the path of a JSON file, a mapping from splits to lists of ids.
        splits: For `prefix`, split -> prefixes, joined by commas; for `hash`, split -> share. The rest is `train`.

    Raises:
        PoseDataError: The rule makes no sense.
    """

    def __init__(self, by: str, splits: Mapping[str, str]) -> None:
        self.by = by
        self.shares: dict[str, float] = {}
        self.names: dict[str, str] = {}  # id or prefix -> split
        if splits and by not in ("prefix", "hash"):
            raise PoseDataError(f"split.{next(iter(splits))} goes with a split by prefix or hash, but it is by {by}.")
        if by == "prefix":
            self.names = {prefix: split for split, text in splits.items() for prefix in text.split(",") if prefix}
        elif by == "hash":
            self.shares = _read_shares(splits)
        elif by != "folder":
            self.names = _read_split_file(by)

    def __call__(self, id: str, folder: str | None) -> str:
        """The split of a sequence, given its id and the split whose folder its file is in.

        Raises:
            PoseDataError: The rule gives it none.
        """
        if self.by == "folder":
            if folder is None:
                raise PoseDataError(
                    f"{id} is in no folder named {', '.join(SPLITS)}: split by prefix, hash or a file."
                )
            return folder
        if self.by == "hash":
            place = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") / 2**64
            for split, share in self.shares.items():
                if place < share:
                    return split
                place -= share
        if self.by == "prefix":
            return next((split for prefix, split in self.names.items() if id.startswith(prefix)), "train")
        return self.names.get(id, "train")

    def unused(self, ids: Iterable[str]) -> list[str]:
        """Prefixes or ids of the rule that fit no sequence: most likely misspelt, and test data gone to training."""
        left = set(self.names)
        for id in ids:
            left -= {prefix for prefix in left if id.startswith(prefix)} if self.by == "prefix" else {id}
        return sorted(left)


def _read_shares(splits: Mapping[str, str]) -> dict[str, float]:
    try:
        shares = {split: float(text) for split, text in splits.items()}
    except ValueError:
        raise PoseDataError(f"A split by hash takes shares such as 0.1, not {', '.join(splits.values())}.") from None
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) > 1:
        raise PoseDataError(f"A split by hash takes shares above 0 that sum to 1 at most, not {shares}.")
    return shares


def _read_split_file(path: str) -> dict[str, str]:
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(id): split for split in SPLITS for id in table.get(split, ())}
    except OSError as error:
        raise PoseDataError(
            f"{path} is not folder, prefix, hash or a JSON file to split by ({error.strerror})."
        ) from None
    except (ValueError, AttributeError, TypeError):
        raise PoseDataError(f"{path} is not a JSON file that maps {', '.join(SPLITS)} to lists of ids.") from None


@dataclass(frozen=True)
class _Source:
    """A file, the id of its sequence, and the split whose folder it is in."""

    path: Path
    id: str
    split: str | None


def find_input(text: str) -> Path:
    """A file or folder, given as a path or, inside an installed Python package, as `package:path`.

    Raises:
        PoseDataError: There is none.
    """
    if Path(text).exists():
        return Path(text)
    package, colon, inner = text.partition(":")
    if not colon or not package.isidentifier():
        raise PoseDataError(f"There is no file or folder {text}.")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PoseDataError(f"The Python package {package} of the input {text} is not installed.")
    path = Path(next(iter(spec.submodule_search_locations)), inner)
    if not path.exists():
        raise PoseDataError(f"The Python package {package} has no file or folder {inner}.")
    return path


def _find_sources(text: str, by_folder: bool) -> Iterator[_Source]:
    """The pose files of an input, sorted. The id is the path below the input, or below the folder of the split."""
    top = find_input(text).absolute()
    files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
    files = [path for path in files if path.suffix in _SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise PoseDataError(f"There are no {' or '.join(_SUFFIXES)} files in {text}.")
    above = top.parent if top.is_dir() else top.parent.parent
    for path in files:
        first, *names = path.relative_to(above).with_suffix("").parts
        split = None
        if by_folder:
            folders = [first, *names[:-1]]
            at = max((index for index, folder in enumerate(folders) if folder in _SPLIT_FOLDERS), default=0)
            split = _SPLIT_FOLDERS.get(folders[at])
            names = names[at:]
        yield _Source(path, "_".join(names), split)


# ---- conversion -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What every process must know."""

    folder: Path
    layout: str | None
    keypoint_dim: int | None
    fps: float | None
    rule: SplitRule
    strict: bool

    def read(self, source: _Source) -> list[PoseSequence]:
        """All sequences of a file, under their final names, at the frame rate that is asked for."""
        if source.path.suffix == ".pose":
            sequences = [read_pose(source.path, self.layout or "coco_wholebody_133", self.keypoint_dim or 3)]
        else:
            num_keypoints = get_skeleton(self.layout).num_keypoints if self.layout else None
            sequences = read_npz(source.path, num_keypoints=num_keypoints, keypoint_dim=self.keypoint_dim)
        if len(sequences) == 1 and sequences[0].id == source.path.stem:
            sequences[0].id = source.id
        return sequences if self.fps is None else [resample(sequence, self.fps) for sequence in sequences]

    def groups(self, sequence: PoseSequence) -> Mapping[str, Sequence[int]]:
        """The token groups that missing keypoints are counted for."""
        return get_skeleton(self.layout).group_keypoints if self.layout else {"all": range(sequence.poses.shape[1])}


@dataclass
class _Result:
    """What came of some files: (split, id) of their sequences, a summary of each split, the files left out."""

    files: int = 0
    ids: list[tuple[str, str]] = field(default_factory=list)
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)


def resample(sequence: PoseSequence, fps: float) -> PoseSequence:
    """The sequence at another frame rate, by linear interpolation; one of unknown rate is taken to have it already."""
    if sequence.fps is None or abs(sequence.fps - fps) <= 1e-6 * fps:
        return PoseSequence(sequence.id, sequence.poses, sequence.mask, fps)
    times = np.arange(round((len(sequence.poses) - 1) * fps / sequence.fps) + 1) * (sequence.fps / fps)
    poses, mask = sample_frames(sequence.poses, sequence.mask, times)
    return PoseSequence(sequence.id, poses, mask, fps)


def _convert(job: _Job, shard_name: str, sources: Sequence[_Source]) -> _Result:
    """Converts files: to one shard of this name in each split, or without a name to one file for each sequence."""
    result = _Result(files=len(sources))
    packed: dict[str, list[PoseSequence]] = {}
    for source in sources:
        try:
            sequences = job.read(source)
        except PoseFileError as error:
            if job.strict:
                raise PoseDataError(f"{error}.") from None
            result.rejected.append({"path": error.path, "reason": error.reason})
            continue
        for sequence in sequences:
            split = job.rule(sequence.id, source.split)
            result.ids.append((split, sequence.id))
            result.splits.setdefault(split, SplitSummary()).add_sequence(sequence, job.groups(sequence))
            if shard_name:
                packed.setdefault(split, []).append(sequence)
            else:
                write_npz(job.folder / split / f"{_file_name(sequence.id)}.npz", sequence)
    for split, sequences in packed.items():
        write_shard(job.folder / split / f"{shard_name}.npz", sequences)
    return result


def _file_name(id: str) -> str:
    """The id as a file name: it comes from a file, and must not lead out of the folder."""
    return re.sub(r"[^\w.+=@-]+", "_", id).lstrip(".") or "_"


def _convert_all(job: _Job, sources: Sequence[_Source], shards: int | None, num_proc: int) -> _Result:
    """Deals the files out to processes and adds up what came of them."""
    if shards:
        count = min(shards, len(sources))
        tasks = [(f"shard-{index:05d}-of-{count:05d}", sources[index::count]) for index in range(count)]
    else:
        tasks = [("", sources[at : at + _FILES_PER_TASK]) for at in range(0, len(sources), _FILES_PER_TASK)]
    total = _Result()
    with ProcessPoolExecutor(min(num_proc, len(tasks))) as pool, tqdm(total=len(sources), unit="file") as bar:
        for result in pool.map(partial(_convert, job), *zip(*tasks, strict=True)):
            total.ids += result.ids
            total.rejected += result.rejected
            for split, summary in result.splits.items():
                total.splits.setdefault(split, SplitSummary()).add(summary)
            bar.update(result.files)
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


def prepare_data(
    inputs: Sequence[str],
    output: FilePath,
    *,
    layout: str | None = "coco_wholebody_133",
    keypoint_dim: int | None = None,
    fps: float | None = None,
    split_by: str = "folder",
    splits: Mapping[str, str] | None = None,
    shards: int | None = None,
    strict: bool = False,
    max_rejected: float = 0.01,
    num_proc: int | None = None,
    overwrite: bool = False,
) -> PreparedData:
    """Converts pose files to a data folder. A split is complete or not there: what fails leaves none behind.

    Args:
        inputs: Files and folders of `.npz` and `.pose` files, or `package:path` inside an installed Python package.
        output: The data folder; gets a folder for each split and `rejected.jsonl`.
        layout: Layout that `.pose` files are brought into and npz files must have; None lets npz files have any.
        keypoint_dim: D that files must have; None means 3 for `.pose` files and any for npz files.
        fps: Frame rate to bring sequences to; one that states none is taken to have it. None keeps their own.
        split_by: `folder`, `prefix`, `hash` or a JSON file, see `SplitRule`.
        splits: Prefixes or shares of `val` and `test`, see `SplitRule`.
        shards: Pack each split into at most so many shards; None writes one file for each sequence.
        strict: Stop at the first file that cannot be used.
        max_rejected: Share of files that may be left out.
        num_proc: Processes that convert; None means one for each CPU.
        overwrite: Replace the splits that are in the output already.

    Raises:
        PoseDataError: An input is missing, too many files cannot be used, a split stays empty, or the output cannot
            be written.
    """
    for name, value in (("fps", fps), ("shards", shards), ("num_proc", num_proc)):
        if value is not None and not value > 0:
            raise PoseDataError(f"{name} is {value}, expected a number above 0.")
    if layout is not None:
        get_skeleton(layout)  # an unknown name is refused before anything else happens
    rule = SplitRule(split_by, splits or {})
    sources = [source for text in inputs for source in _find_sources(text, by_folder=split_by == "folder")]
    output = Path(output)
    present = [split for split in SPLITS if (output / split).exists()]
    if present and not overwrite:
        raise PoseDataError(f"{output} holds {', '.join(present)} already: give another output, or --overwrite.")
    work = output / f".{os.getpid()}.tmp"
    try:
        for split in SPLITS:
            (work / split).mkdir(parents=True)
        job = _Job(work, layout, keypoint_dim, fps, rule, strict)
        result = _convert_all(job, sources, shards, num_proc or os.cpu_count() or 1)
        if result.rejected:
            write_rejected(output, result.rejected)  # it stays even where they are too many
        check_rejected(" ".join(inputs), result.rejected, len(sources), max_rejected)
        _check_ids(result.ids, rule, splits or ())
        for split in present:
            shutil.rmtree(output / split)
        for split in result.splits:
            os.replace(work / split, output / split)
        write_rejected(output, result.rejected)
    except OSError as error:
        raise PoseDataError(f"{output} cannot be written ({error.strerror or error}).") from None
    except BrokenProcessPool:
        raise PoseDataError("A process was killed, most likely for lack of memory: lower num_proc.") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            output.rmdir()  # where nothing was written to it
    return PreparedData({split: result.splits[split] for split in SPLITS if split in result.splits}, result.rejected)
