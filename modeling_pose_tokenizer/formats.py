"""Pose files of every kind: which reader reads which file, and how to add one.

Every file is checked before its data is loaded, since files come from anywhere; what is wrong with one is a
`PoseFileError`, one sentence with its path. `sequences.py` holds the checks, `npz_files.py`, `pose_files.py`,
`readers.py` and `motion_capture.py` the readers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .motion_capture import is_amc, is_bvh, read_amc, read_bvh
from .npz_files import check_npz, read_npy, read_npz, write_npz, write_shard
from .pose_files import is_pose_file, read_pose, read_pose_file, write_pose
from .readers import (
    is_mediapipe_json,
    is_mediapipe_table,
    is_mmpose,
    is_openpose,
    is_parquet,
    is_pickle,
    read_keypoint_pickle,
    read_mediapipe_json,
    read_mediapipe_table,
    read_mmpose,
    read_npz_file,
    read_openpose,
)
from .sequences import (
    LIMITS,
    FilePath,
    Limits,
    PoseDataError,
    PoseFileError,
    PoseSequence,
    ReadOptions,
    check_rejected,
    make_sequence,
    nearest_frames,
    one_sentence,
    sample_frames,
    walk_folders,
    write_rejected,
)
from .skeleton_pose_tokenizer import Skeleton

_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class PoseFormat:
    """A kind of pose file; see `register_format`."""

    name: str
    detect: Callable[[Path, bytes], bool]
    read: Callable[[Path, ReadOptions], list[PoseSequence]]
    suffixes: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    folder: bool = False


FORMATS: dict[str, PoseFormat] = {}


def register_format(
    name: str,
    detect: Callable[[Path, bytes], bool],
    read: Callable[[Path, ReadOptions], list[PoseSequence]],
    *,
    suffixes: tuple[str, ...] = (),
    companions: tuple[str, ...] = (),
    folder: bool = False,
) -> None:
    """Makes a kind of pose file known to `read_sequences` and `scripts/prepare_data.py`.

    ```python
    def read_lines(path, options):  # a line of 133 x 3 numbers for each frame
        poses = np.loadtxt(path, ndmin=2).reshape(-1, 133, 3)
        return [make_sequence(path, path.stem, poses, fps=25, keypoint_dim=options.keypoint_dim)]

    register_format("lines", lambda path, head: head.startswith(b"#poses"), read_lines, suffixes=(".lines",))
    ```

    Where processes are spawned rather than forked, register it in a module that they import too.

    Args:
        name: Its name, for people; a format of the same name is replaced.
        detect: Says, given the path and the first 64 KiB (nothing of a folder), whether it is one.
        read: Reads it: `make_sequence` checks what it found. What it raises is a `PoseFileError`.
        suffixes: Endings of names that are this kind's alone: what is named so and not recognised is a broken one.
        companions: Endings of files that go with it and are no sequences themselves.
        folder: It is a folder, which is one sequence.
    """
    FORMATS.pop(name, None)
    FORMATS[name] = PoseFormat(name, detect, read, suffixes, companions, folder)


def find_format(path: FilePath) -> PoseFormat | None:
    """The kind of a file or folder: by its content, then by its name; None where it is no known one.

    Formats are asked in turn, those that were registered last first.

    Raises:
        PoseFileError: It cannot be read.
    """
    path = Path(path)
    folder, head = path.is_dir(), b""
    if not folder:
        try:
            if not path.is_file() and path.exists():  # a pipe or a device would never end
                raise PoseFileError(path, "cannot be read (is no regular file)")
            with path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        except OSError as error:
            raise PoseFileError(path, f"cannot be read ({error.strerror})") from None
    known = [kind for kind in reversed(FORMATS.values()) if kind.folder == folder]
    try:
        by_content = next((kind for kind in known if kind.detect(path, head)), None)
    except OSError as error:
        raise PoseFileError(path, f"cannot be read ({error.strerror})") from None
    return by_content or next((kind for kind in known if path.suffix.lower() in kind.suffixes), None)


def read_sequences(
    path: FilePath,
    *,
    layout: Skeleton | None = None,
    keypoint_dim: int | None = None,
    person: int | None = None,
    limits: Limits = LIMITS,
) -> list[PoseSequence]:
    """Reads a pose file or folder of any known kind.

    Args:
        path: The file, or the folder of an OpenPose video.
        layout: Layout to bring it into, by the names of its keypoints; None leaves it as it is (MediaPipe Holistic
            becomes `coco_wholebody_133`).
        keypoint_dim: D; None means 3 for what is seen by a camera (x, y, confidence), and 4 for motion capture.
        person: The person to read where there are several, from 0 on; None means the one of whom most keypoints are
            seen over all frames.
        limits: How much the file may ask for.

    Returns:
        Its sequences; the id of a single one is the file's name.

    Raises:
        PoseFileError: It is of no known kind, broken, or does not come into the layout.
        ImportError: The library that reads this kind is not installed.
    """
    kind = find_format(path)
    if kind is None:
        raise PoseFileError(path, f"is of no known kind, expected {', '.join(FORMATS)}")
    # A reader says it better, where it foresees it. What is no finite number becomes missing, without a warning.
    with one_sentence(path, f"of the kind {kind.name}"), np.errstate(invalid="ignore", over="ignore"):
        return kind.read(Path(path), ReadOptions(layout, keypoint_dim, person, limits))


register_format("MediaPipe table", is_mediapipe_table, read_mediapipe_table)
register_format("MediaPipe parquet", is_parquet, read_mediapipe_table, suffixes=(".parquet",))
register_format("MMPose JSON", is_mmpose, read_mmpose)
register_format("MediaPipe JSON", is_mediapipe_json, read_mediapipe_json)
register_format("OpenPose JSON", is_openpose, read_openpose)
register_format("OpenPose folder", is_openpose, read_openpose, folder=True)
register_format("pickle of keypoints and scores", is_pickle, read_keypoint_pickle, suffixes=(".pkl", ".pickle"))
register_format("AMC", is_amc, read_amc, suffixes=(".amc",), companions=(".asf",))
register_format("BVH", is_bvh, read_bvh, suffixes=(".bvh",))
register_format(".pose", is_pose_file, read_pose_file, suffixes=(".pose",))
register_format("npy", lambda path, head: head.startswith(b"\x93NUMPY"), read_npy, suffixes=(".npy",))
register_format(
    "npz",
    lambda path, head: head.startswith(b"PK\x03\x04") and b".npy" in head[30:330],
    read_npz_file,
    suffixes=(".npz",),
)

__all__ = [
    "FORMATS",
    "LIMITS",
    "FilePath",
    "Limits",
    "PoseDataError",
    "PoseFileError",
    "PoseFormat",
    "PoseSequence",
    "ReadOptions",
    "check_npz",
    "check_rejected",
    "find_format",
    "make_sequence",
    "nearest_frames",
    "read_npy",
    "read_npz",
    "read_pose",
    "read_sequences",
    "register_format",
    "sample_frames",
    "write_npz",
    "write_pose",
    "walk_folders",
    "write_rejected",
    "write_shard",
]
