"""Pose files looked at and not converted, and the state of a plausibility check as JSON."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from .formats import LIMITS, Limits, PoseFileError, read_sequences
from .plausibility import PlausibilityCheck, Problem
from .skeleton_pose_tokenizer import Skeleton
from .sources import Source, find_sources

_COUNTERS = ("counts", "fps", "found", "possible")
_CLASSES = ("_units", "_facing")


def check_to_json(check: PlausibilityCheck) -> dict[str, Any]:
    """What a check has seen, as what JSON can hold; `check_from_json` is the inverse."""
    return {
        "sequences": check.sequences,
        "frames": check.frames,
        "counters": {name: dict(getattr(check, name)) for name in _COUNTERS},
        "histograms": {name: histogram.counts.tolist() for name, histogram in check.histograms.items()},
        "kept": [astuple(problem) for kept in check._kept.values() for problem in kept],
        "classes": {name: {key: vars(own) for key, own in getattr(check, name).items()} for name in _CLASSES},
        "extremes": check._extremes,
    }


def check_from_json(content: Mapping[str, Any], layout: Skeleton | None) -> PlausibilityCheck:
    """The inverse of `check_to_json`, for a check of this layout."""
    check = PlausibilityCheck(layout)
    check.sequences, check.frames = content["sequences"], content["frames"]
    for name, counts in content["counters"].items():
        setattr(check, name, Counter(counts))
    for name, counts in content["histograms"].items():
        check.histograms[name].counts = np.array(counts, np.int64)
    for values in content["kept"]:
        problem = Problem(*values)
        check._kept[problem.kind].append(problem)
    for name, classes in content["classes"].items():
        for key, own in classes.items():
            vars(getattr(check, name)[key]).update(own)
    for name, rows in content["extremes"].items():
        check._extremes[name] = [(value, speed, path) for value, speed, path in rows]
    return check


def end_with_parent() -> None:
    """Ends this worker when its parent is killed: it would wait for work forever, and hold the parent's locks.

    Ctrl-C is the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_data(
    inputs: Sequence[str],
    *,
    layout: Skeleton | None = None,
    keypoint_dim: int | None = None,
    person: int | None = None,
    num_proc: int | None = None,
    limits: Limits = LIMITS,
) -> tuple[PlausibilityCheck, list[dict[str, str]], list[dict[str, str]]]:
    """Reads pose files, writes nothing, and tells what cannot be right about them.

    Args:
        inputs: Files and folders, as `prepare_data` takes them.
        layout: The layout that files are brought into; None leaves them as they are, and checks less.
        keypoint_dim, person, limits: See `read_sequences`.
        num_proc: Processes that read; None means one for each CPU.

    Returns:
        The check, the pose files that cannot be used, and the files of no known kind: path and reason of each.

    Raises:
        PoseDataError: An input is missing or holds no pose file.
    """
    found = [find_sources(text, by_folder=False) for text in inputs]
    sources = [source for known, _ in found for source in known]
    total, rejected = PlausibilityCheck(layout), []
    look = partial(_look, layout=layout, keypoint_dim=keypoint_dim, person=person, limits=limits)
    with multiprocessing.Pool(num_proc, initializer=end_with_parent) as pool:
        for check, row in tqdm(pool.imap(look, sources, chunksize=8), total=len(sources), unit="file"):
            total.merge(check)
            rejected += [row] if row else []
    return total, rejected, [row for _, unknown in found for row in unknown]


def _look(source: Source, layout: Skeleton | None, **options: Any) -> tuple[PlausibilityCheck, dict[str, str] | None]:
    """What a file is like, and why it cannot be used."""
    check = PlausibilityCheck(layout)
    try:
        for sequence in read_sequences(source.path, layout=layout, **options):
            check.add(source.path, sequence)
    except PoseFileError as error:
        return check, {"path": error.path, "reason": error.reason}
    return check, None
