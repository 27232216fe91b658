"""What every row of the benchmark shares: data, batches, errors and the count of bits.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last), Q codebooks, S code steps.

Poses are in shoulder widths and at the frame rate of their files. Errors are mean distances in percent of the shoulder
width, over keypoints whose confidence exceeds 0.3, micro-averaged. Bits per frame are per frame that the code steps
cover, S x hop: a last step that is filled up counts as a whole one in every row.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerModel
from modeling_pose_tokenizer.augmentation import PoseAugmentation
from modeling_pose_tokenizer.formats import PoseDataError, read_npz
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained
from modeling_pose_tokenizer.skeleton_pose_tokenizer import Skeleton

CONFIDENCE_THRESHOLD = 0.3
FLIP = 0.3  # most recordings show a right hand alone: fewer mirror images than originals
# Folders whose train/ is trained on, and val set -> (folder, pattern of its files in val/).
TRAIN_FOLDERS = {
    "signing": ("webcam-signs133", "fingerspelling-wholebody133", "fingerspelled-words133"),
    "mocap": ("cmu-mocap38",),
}
VAL_SETS = {
    "signing": {
        "fingerspelling": ("fingerspelling-wholebody133", "*.npz"),
        "webcam_same": ("webcam-signs133", "isl_*.npz"),
        "webcam_new": ("webcam-signs133", "asl_*.npz"),
        "words": ("fingerspelled-words133", "*.npz"),
    },
    "mocap": {"mocap": ("cmu-mocap38", "*.npz")},
}


@dataclass
class Benchmark:
    """Data of one comparison.

    Attributes:
        name: "signing" or "mocap".
        layout: The skeleton of the poses.
        skeleton_fields: What `PoseTokenizerConfig` and `PoseFeatureExtractor` need to know of it.
        feature_extractor: What normalised the poses.
        train: Clips (T, N, D) float32, normalised; a missing keypoint is all zeros.
        val: Name of a val set -> clips.
    """

    name: str
    layout: Skeleton
    skeleton_fields: dict[str, Any]
    feature_extractor: PoseFeatureExtractor
    train: list[np.ndarray]
    val: dict[str, list[np.ndarray]]


def load_benchmark(data: Path, name: str = "signing") -> Benchmark:
    """Reads the data of a comparison from the folders below `data`.

    Raises:
        PoseDataError: A folder is missing or holds nothing that was expected there.
    """
    if name not in TRAIN_FOLDERS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(TRAIN_FOLDERS)}.")
    fields: dict[str, Any] = {"skeleton": "coco_wholebody_133", "keypoint_dim": 3}
    if name == "mocap":
        fields = _read_skeleton(data / TRAIN_FOLDERS[name][0] / "joints.json")
    extractor = PoseFeatureExtractor(**fields)
    train: list[np.ndarray] = []
    for folder in TRAIN_FOLDERS[name]:
        train += _read_clips(data / folder / "train", "*.npz", extractor)
    val = {}
    for val_set, (folder, pattern) in VAL_SETS[name].items():
        val[val_set] = _read_clips(data / folder / "val", pattern, extractor)
    return Benchmark(name, extractor.layout, fields, extractor, train, val)


def open_model(description: str | None) -> tuple[PoseTokenizerModel, Benchmark, Path | None]:
    """What a command that measures one model was given: the model in eval mode, the data, a JSON file for the result.

    Ends the program with one sentence where the model or the data cannot be read.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", default="pretrained/small", help="model (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    try:
        return load_pretrained(args.model)[0].eval(), load_benchmark(args.data), args.output
    except (PoseDataError, ModelFolderError) as error:
        sys.exit(str(error))


def _read_skeleton(path: Path) -> dict[str, Any]:
    """The custom skeleton of a motion capture set; its unit of length is the distance of the upper arms' roots."""
    if not path.is_file():
        raise PoseDataError(f"There is no file {path}: expected the names and edges of the motion capture skeleton.")
    joints = json.loads(path.read_text("utf-8"))
    names = joints["names"]
    sides = (("Left", "Right"), ("L", "R"))
    partners = [(name, right + name[len(left) :]) for name in names for left, right in sides if name.startswith(left)]
    return {
        "skeleton": None,
        "keypoint_names": names,
        "edges": joints["edges"],
        "flip_pairs": [[names.index(left), names.index(right)] for left, right in partners if right in names],
        "scale_pair": [names.index("LeftArm"), names.index("RightArm")],
        "keypoint_dim": len(joints["dims"]),
    }


def _read_clips(folder: Path, pattern: str, feature_extractor: PoseFeatureExtractor) -> list[np.ndarray]:
    """Normalised clips (T, N, D) of a folder, in the order of the files' names."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise PoseDataError(f"There is no {folder} with files {pattern}: expected pose sequences of this benchmark.")
    clips = []
    for sequence in (sequence for file in files for sequence in read_npz(file)):
        poses = np.where(sequence.mask[:, None, None], sequence.poses, np.float32(0))
        clips.append(feature_extractor(poses)["input_values"][0])  # without fps there is no resampling
    return clips


def batches(
    benchmark: Benchmark, steps: int, seed: int, batch_size: int = 32, frames: int = 32
) -> Iterator[dict[str, torch.Tensor]]:
    """Augmented training windows, the same for every row with the same seed.

    A clip has ceil(T / frames) windows and each window of the train set is as likely; its place in the clip is drawn.
    Step k depends on the seed and k alone.

    Yields:
        `input_values` (B, frames, N, D) float32 and `padding_mask` (B, frames) int64, 0 where a window is shorter.
    """
    augmentation = PoseAugmentation(benchmark.layout, flip=FLIP)
    span = int(np.ceil(frames * augmentation.max_speed))  # a window that is made faster needs more frames
    owners = np.repeat(np.arange(len(benchmark.train)), [-(-len(clip) // frames) for clip in benchmark.train])
    for step in range(steps):
        generator = np.random.default_rng((seed, step))
        values = np.zeros((batch_size, frames, *benchmark.train[0].shape[1:]), np.float32)
        mask = np.zeros((batch_size, frames), np.int64)
        for row, owner in enumerate(generator.choice(owners, batch_size)):
            clip = benchmark.train[owner]
            start = int(generator.integers(0, max(len(clip) - span, 0), endpoint=True))
            window = clip[start : start + span]
            window, _ = augmentation(window, np.ones(len(window), dtype=bool), generator)
            length = min(len(window), frames)
            values[row, :length], mask[row, :length] = window[:length], 1
        yield {"input_values": torch.from_numpy(values), "padding_mask": torch.from_numpy(mask)}


class PartErrors:
    """Mean distance from the target per token group, and of hands after both wrists are laid upon each other.

    Args:
        layout: The skeleton; a group named `*_hand` is a hand, and its first keypoint the hand's root.
    """

    def __init__(self, layout: Skeleton) -> None:
        self.parts = {group: list(keypoints) for group, keypoints in layout.group_keypoints.items()}
        self.parts["all"] = list(range(layout.num_keypoints))
        self.hands = [group for group in layout.groups if group.endswith("_hand")]
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def update(self, prediction: Any, target: Any, mask: Any = None) -> None:
        """Counts predictions, arrays or tensors.

        Args:
            prediction: (..., T, N, D - 1) coordinates; a confidence after them is not read.
            target: (..., T, N, D).
            mask: (..., T) of real frames; None means all.
        """
        target = torch.as_tensor(target).detach()
        points, confidence = target[..., :-1].double(), target[..., -1]
        error = torch.as_tensor(prediction).detach()[..., : points.shape[-1]].to(points) - points
        seen = confidence > CONFIDENCE_THRESHOLD
        if mask is not None:
            seen = seen & torch.as_tensor(mask, device=seen.device).bool()[..., None]
        for part, keypoints in self.parts.items():
            self._count(part, error[..., keypoints, :], seen[..., keypoints])
        for hand in self.hands:
            root, *others = self.parts[hand]  # the root itself has no error of shape
            relative = error[..., others, :] - error[..., [root], :]
            self._count(f"{hand}_relative", relative, seen[..., others] & seen[..., [root]])

    def _count(self, key: str, error: torch.Tensor, seen: torch.Tensor) -> None:
        self.sums[key] += 100.0 * float(error.norm(dim=-1)[seen].sum())
        self.counts[key] += int(seen.sum())

    def compute(self) -> dict[str, float]:
        """Errors in percent of the shoulder width: each group, `*_hand_relative`, `all`, and the plain means of the
        hands, `hands` and `hands_relative`. What was never seen has no key."""
        result = {key: self.sums[key] / count for key, count in self.counts.items() if count}
        for name, suffix in (("hands", ""), ("hands_relative", "_relative")):
            values = [result[hand + suffix] for hand in self.hands if hand + suffix in result]
            if values and len(values) == len(self.hands):
                result[name] = sum(values) / len(values)
        return result


def entropy_bits(
    train_codes: Sequence[np.ndarray], val_codes: Sequence[np.ndarray], codebook_sizes: Sequence[int], hop: int
) -> float:
    """Bits per frame of an ideal entropy coder with one static model per codebook: training counts plus 1/2.

    Args:
        train_codes: (Q, S) of each training clip.
        val_codes: (Q, S) of each clip that is coded.
        codebook_sizes: K of each of the Q codebooks.
        hop: Frames per code step.
    """
    seen, coded = np.concatenate(train_codes, axis=1), np.concatenate(val_codes, axis=1)
    bits = 0.0
    for size, known, codes in zip(codebook_sizes, seen, coded, strict=True):
        counts = np.bincount(known, minlength=size) + 0.5
        bits -= float(np.log2(counts / counts.sum())[codes].mean())
    return bits / hop
