#!/usr/bin/env python
"""What prediction from the step before costs: how far a wrong code spreads, and what key steps cost against it.

    python benchmarks/wrong_codes.py --data DIR                  # of pretrained/small
    python benchmarks/wrong_codes.py --data DIR --model MODEL

DIR is that of `rate_distortion.py`; its fingerspelled words are scored, the val set with the longest clips. First, one
code of a clip is replaced by one drawn at random, and the change of the poses is followed over the steps after it, in
percent of what it is in its own step. Then the same weights code with key steps more and less often, and a share of
all codes is replaced: mean distances in percent of the shoulder width.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from protocol import PartErrors, open_model
from rate_distortion import padded

from modeling_pose_tokenizer import PoseTokenizerModel

INTERVALS = (1, 4, 8, 16, 32)
SHARES = (0.0, 0.01, 0.05)
STEPS_AFTER = (1, 2, 4, 8, 16)
ROUNDS = 3  # wrong codes that each codebook of a clip is given


def draw_wrong(codes: torch.Tensor, share: float, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """Codes `(B, Q, S)`, a share of them replaced by others."""
    shift = torch.randint(1, num_codes, codes.shape, generator=generator)
    wrong = torch.rand(codes.shape, generator=generator) < share
    return torch.where(wrong, (codes + shift) % num_codes, codes)


@torch.inference_mode()
def spread(model: PoseTokenizerModel, clips: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean distance that one wrong code moves a token group's keypoints by, over the steps after it, for each level.

    The code changes one step behind a key step, so that no other follows for a while; of clips that last so long.
    """
    hop, frames = model.config.hop_length, model.config.hop_length * (2 + STEPS_AFTER[-1])
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _, batch in padded([clip[:frames] for clip in clips if len(clip) >= frames]):
        codes = model.encode(**batch).pose_codes
        assert codes is not None
        right_poses = model.decode(codes, batch["padding_mask"]).pose_values
        for book, (group, level) in enumerate(model.config.codebook_index):
            keypoints = list(model.config.layout.group_keypoints[group])
            for _ in range(ROUNDS):
                wrong = codes.clone()
                wrong[:, book, 1:2] = draw_wrong(codes[:, book, 1:2], 1.0, model.config.codebook_size, generator)
                wrong_poses = model.decode(wrong, batch["padding_mask"]).pose_values
                assert right_poses is not None and wrong_poses is not None
                moved = (wrong_poses - right_poses)[:, :, keypoints, :-1].norm(dim=-1).mean((0, 2))
                for step in (0, *STEPS_AFTER):
                    sums[f"{group}, level {level + 1}"][step].append(float(moved[(1 + step) * hop :][:hop].mean()))
    return {
        name: {"moved": 100 * float(np.mean(row[0]))}
        | {str(step): 100 * float(np.mean(row[step]) / np.mean(row[0])) for step in STEPS_AFTER}
        for name, row in sums.items()
    }


@torch.inference_mode()
def score(model: PoseTokenizerModel, clips: Sequence[np.ndarray], share: float) -> dict[str, float]:
    """Errors of some clips when a share of their codes is wrong."""
    errors, generator = PartErrors(model.config.layout), torch.Generator().manual_seed(0)
    for numbers, batch in padded(clips):
        codes = model.encode(**batch).pose_codes
        assert codes is not None
        codes = draw_wrong(codes, share, model.config.codebook_size, generator)
        values = model.decode(codes, batch["padding_mask"]).pose_values
        assert values is not None
        for row, number in enumerate(numbers):
            errors.update(values[row, : len(clips[number])], clips[number])
    return errors.compute()


def main() -> None:
    model, benchmark, output = open_model(__doc__)
    clips = benchmark.val["words"]
    result: dict[str, Any] = {"spread": spread(model, clips), "key_interval": []}
    print("| wrong code of | moves | " + " | ".join(f"after {step}" for step in STEPS_AFTER) + " |")
    print("| --- " * (len(STEPS_AFTER) + 2) + "|")
    for name, row in result["spread"].items():
        shares = " | ".join(f"{row[str(step)]:.0f}" for step in STEPS_AFTER)
        print(f"| {name} | {row['moved']:.1f} | {shares} |", flush=True)
    print("\n| key step every | wrong codes | hands | body | face |\n| --- | --- | --- | --- | --- |")
    for interval in INTERVALS:
        model.quantizer.key_interval = interval
        for share in SHARES:
            row = score(model, clips, share)
            result["key_interval"].append({"key_interval": interval, "share": share} | row)
            figures = " | ".join(f"{row[key]:.2f}" for key in ("hands", "body", "face"))
            print(f"| {interval} | {share:.0%} | {figures} |", flush=True)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
