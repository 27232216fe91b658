#!/usr/bin/env python
"""Do tokens keep what a sign means? One small classifier reads isolated signs from tokens, reconstructions, keypoints.

python examples/sign_language_model/recognise_signs.py --data DIR --output runs/recognition

DIR holds a folder `webcam-signs133` with train/ and val/, whose files are named LANGUAGE_SIGNER_SIGN_TAKE.npz. The
classifier sees one vector for each code step, whatever it reads, so that only the contents differ.

Writes OUTPUT/metrics.json and prints a table. Letters: B clips, S code steps, F values per step, Q codebooks, T frames
N keypoints, D values per keypoint, C signs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerConfig, PoseTokenizerModel
from modeling_pose_tokenizer.dataset import PoseDataset, collate
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained

BATCH_SIZE = 32
INPUTS = {
    "codebooks": "tokens, their codebook vectors",
    "latents": "tokens, as the decoder reads them",
    "reconstruction": "poses decoded from tokens",
    "keypoints": "recorded poses",
}


@dataclass
class Clip:
    """A recorded sign.

    Attributes:
        language, signer, sign, take: From the file's name, which is LANGUAGE_SIGNER_SIGN_TAKE.
        split: The folder that it lies in.
        views: Name of an input -> (S, F) float32, a vector per code step.
    """

    language: str
    signer: str
    sign: str
    take: int
    split: str
    views: dict[str, torch.Tensor]


@dataclass
class Question:
    """What is asked: which clips to learn from, and which to recognise.

    Attributes:
        name: What the table says.
        learn, ask: Whether a clip belongs to it.
    """

    name: str
    learn: Callable[[Clip], bool]
    ask: Callable[[Clip], bool]


SAME = {"thanks": "thank-you"}  # of two projects, by the names that they gave
QUESTIONS = (
    Question(
        "Indian signs, known signer, later takes",
        lambda clip: clip.language == "isl" and clip.split == "train" and clip.sign != "i2",  # a variant of "i"
        lambda clip: clip.language == "isl" and clip.split == "val",
    ),
    Question(
        "American hello or thank-you, learnt from signer b, asked of c",
        lambda clip: clip.signer == "b" and clip.sign in ("hello", "thank-you"),
        lambda clip: clip.signer == "c" and clip.sign in ("hello", "thank-you"),
    ),
    Question(
        "American no of the new signer d, learnt from b and c",
        lambda clip: clip.signer in ("b", "c"),
        lambda clip: clip.signer == "d" and clip.sign == "no",
    ),
    Question(
        "American house, no or yes of the new signer d, learnt from the first half of the takes",
        lambda clip: clip.signer == "d" and clip.take < 15,
        lambda clip: clip.signer == "d" and clip.take >= 15,
    ),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for metrics.json")
    parser.add_argument("--model", default="pretrained/small", help="pose tokenizer (default: %(default)s)")
    parser.add_argument("--set", default="webcam-signs133", help="data set (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of training a classifier (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="classifiers per row (default: %(default)s)")
    return parser.parse_args()


# ---- what the classifier sees ---------------------------------------------------------------------------------------


@torch.inference_mode()
def see(codec: PoseTokenizerModel, poses: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same clips in four ways, (B, S, F) each.

    Args:
        codec: The pose tokenizer.
        poses: (B, T, N, D) normalised keypoints.
        mask: (B, T), 1 for real frames.
    """
    codes = codec.encode(poses, mask).pose_codes  # (B, Q, S)
    books, (batch, _, steps) = slice(0, codes.shape[1]), codes.shape
    vectors = codec.quantizer.read(codes.transpose(0, 1).flatten(1), books)  # (Q, B S, d)
    decoded = codec.decode(codes, mask).pose_values  # (B, T, N, D)
    return {
        "codebooks": vectors.unflatten(1, (batch, steps)).permute(1, 2, 0, 3).flatten(2),
        "latents": codec.quantizer.decode(codes).flatten(2),
        "reconstruction": to_steps(decoded, codec.config, steps),
        "keypoints": to_steps(poses, codec.config, steps),
    }


def to_steps(poses: torch.Tensor, config: PoseTokenizerConfig, steps: int) -> torch.Tensor:
    """Keypoints (B, T, N, D) at the rate of the tokens, (B, S, hop * N * D); the coordinates of missing ones are 0."""
    poses = torch.where(poses[..., -1:] >= config.confidence_threshold, poses, 0.0)
    poses = F.pad(poses, (0, 0, 0, 0, 0, steps * config.hop_length - poses.shape[1]))
    return poses.unflatten(1, (steps, -1)).flatten(2)


def read_clips(
    codec: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor, folder: Path, split: str
) -> list[Clip]:
    """All clips of a split, encoded, with the labels that their names hold."""
    dataset = PoseDataset(folder, split, feature_extractor=feature_extractor)
    clips = []
    for start in tqdm(range(0, len(dataset), 8), desc=f"encode {split}"):
        batch = collate([dataset[index] for index in range(start, min(start + 8, len(dataset)))])
        views = see(codec, batch["input_values"], batch["padding_mask"])
        steps = codec.get_pose_codes_mask(batch["padding_mask"]).sum(1)
        for row, name in enumerate(batch["id"]):
            parts = name.split("_")
            if len(parts) != 4 or not parts[3].isdecimal():
                raise PoseDataError(f"{folder / split / name}.npz: expected a name LANGUAGE_SIGNER_SIGN_TAKE.npz.")
            own = {key: view[row, : steps[row]].clone() for key, view in views.items()}
            clips.append(Clip(parts[0], parts[1], SAME.get(parts[2], parts[2]), int(parts[3]), split, own))
    return clips


# ---- the classifier -------------------------------------------------------------------------------------------------


class SignClassifier(nn.Module):
    """Two convolutions over code steps and a mean. All but the first layer is the same for every input.

    Args:
        examples: (m, F) steps of the training clips. Their mean and overall deviation become zero and unit:
            values that hardly move, such as those of the face, stay small.
        num_signs: C.
        hidden_size: Of the network.
    """

    def __init__(self, examples: torch.Tensor, num_signs: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", examples.mean(0))
        self.register_buffer("deviation", (examples - self.mean).square().mean().sqrt())
        self.reduce = nn.Linear(examples.shape[1], hidden_size)
        self.motion = nn.ModuleList(nn.Conv1d(hidden_size, hidden_size, 5, padding=2) for _ in range(2))
        self.name = nn.Linear(hidden_size, num_signs)
        self.dropout = nn.Dropout(0.3)

    def forward(self, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Steps (B, S, F) and which are real (B, S) -> scores (B, C)."""
        values = F.relu(self.reduce((steps - self.mean) / self.deviation)).transpose(1, 2)  # (B, h, S)
        for convolution in self.motion:
            values = F.relu(convolution(self.dropout(values) * mask[:, None]))
        pooled = (values * mask[:, None]).sum(2) / mask.sum(1, keepdim=True)
        return self.name(self.dropout(pooled))


def pad(clips: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips (S, F) of any lengths -> (B, S, F) and which steps are real (B, S)."""
    lengths = torch.tensor([len(clip) for clip in clips])
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def train_classifier(
    clips: Sequence[torch.Tensor], targets: torch.Tensor, num_signs: int, steps: int, seed: int
) -> SignClassifier:
    """Learns clips (S, F) with their signs (B,)."""
    torch.manual_seed(seed)
    classifier = SignClassifier(torch.cat(list(clips)), num_signs)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randperm(len(clips))[:BATCH_SIZE]
        loss = F.cross_entropy(classifier(*pad([clips[index] for index in batch])), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def answer(question: Question, clips: Sequence[Clip], steps: int, seeds: int, bar: tqdm) -> dict[str, Any]:
    """Accuracy of each input, once for each seed."""
    learnt = [clip for clip in clips if question.learn(clip)]
    asked = [clip for clip in clips if question.ask(clip)]
    signs = sorted({clip.sign for clip in learnt})
    if not asked or not {clip.sign for clip in asked} <= set(signs):
        raise PoseDataError(f"{question.name}: the data set has no such clips, or signs to ask that are not learnt.")
    targets, expected = (torch.tensor([signs.index(clip.sign) for clip in part]) for part in (learnt, asked))
    accuracy: dict[str, list[float]] = {}
    for name in INPUTS:
        for seed in range(seeds):
            classifier = train_classifier([clip.views[name] for clip in learnt], targets, len(signs), steps, seed)
            with torch.inference_mode():
                said = classifier(*pad([clip.views[name] for clip in asked])).argmax(1)
            accuracy.setdefault(name, []).append((said == expected).float().mean().item())
            bar.update()
    return {"signs": signs, "clips_learnt": len(learnt), "clips_asked": len(asked), "accuracy": accuracy}


def print_table(results: dict[str, dict[str, Any]]) -> None:
    for name, result in results.items():
        counts = f"{result['clips_learnt']} clips learnt, {result['clips_asked']} asked"
        print(f"\n{name} ({counts}, one of {len(result['signs'])} signs)")
        for key, values in result["accuracy"].items():
            percent = 100 * np.array(values)
            print(f"  {INPUTS[key]:34s} {percent.mean():5.1f} % right ({percent.min():.1f} to {percent.max():.1f})")


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        codec, feature_extractor = load_pretrained(args.model)
        clips = [
            clip
            for split in ("train", "val")
            for clip in read_clips(codec, feature_extractor, args.data / args.set, split)
        ]
        with tqdm(total=len(QUESTIONS) * len(INPUTS) * args.seeds, desc="classifiers") as bar:
            results = {question.name: answer(question, clips, args.steps, args.seeds, bar) for question in QUESTIONS}
    except (ModelFolderError, PoseDataError, OSError) as error:
        sys.exit(str(error))
    metrics = {"model": str(args.model), "bits_per_frame": codec.config.bits_per_frame, "questions": results}
    metrics |= {"steps": args.steps, "seeds": args.seeds, "seconds": time.perf_counter() - start}
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
