#!/usr/bin/env python
"""What `encode(..., target_bits_per_frame=...)` gains over the same number of levels in every step.

    python benchmarks/rate_on_demand.py --data DIR                  # of pretrained/small
    python benchmarks/rate_on_demand.py --data DIR --model MODEL

DIR is that of `rate_distortion.py`. Each prefix of the levels is scored at its fixed rate, and the whole model at
target rates. Bits are those of `get_spent_bits` (how many levels follow, and these) for both kinds; errors are mean
distances in percent of the shoulder width, and `weighted` is the mean over all keypoints as the loss weights them.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from protocol import PartErrors, open_model
from rate_distortion import padded

from modeling_pose_tokenizer import PoseTokenizerModel

TARGETS = (6.0, 8.0, 10.0, 12.0, 14.0, 16.0)


@torch.inference_mode()
def score(model: PoseTokenizerModel, clips: Sequence[np.ndarray], **options: Any) -> dict[str, float]:
    """Errors and spent bits of some clips, encoded with `options`."""
    errors, bits, frames = PartErrors(model.config.layout), 0.0, 0
    for numbers, batch in padded(clips):
        codes = model.encode(**batch, **options).pose_codes
        assert codes is not None
        values = model.decode(codes, batch["padding_mask"]).pose_values
        assert values is not None
        spent = model.get_spent_bits(codes, batch["padding_mask"])
        for row, number in enumerate(numbers):
            errors.update(values[row, : len(clips[number])], clips[number])
            bits += float(spent[row]) * len(clips[number])
            frames += len(clips[number])
    found = errors.compute()
    weights = {
        group: float(model.config.keypoint_weights[list(keypoints)].sum()) * errors.counts[group] / len(keypoints)
        for group, keypoints in model.config.layout.group_keypoints.items()
    }
    weighted = sum(weight * found[group] for group, weight in weights.items()) / sum(weights.values())
    return {"bits": bits / frames, "weighted": weighted} | {key: found[key] for key in ("hands", "body", "face")}


def main() -> None:
    model, benchmark, output = open_model(__doc__)
    settings: list[dict[str, float]] = [{"num_quantizers": level} for level in range(1, model.config.num_levels + 1)]
    settings += [{"target_bits_per_frame": target} for target in TARGETS]
    result = {}
    print("| val set | rate | bits | weighted | hands | body | face |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name, clips in benchmark.val.items():
        rows = result[name] = [options | score(model, clips, **options) for options in settings]
        for options, row in zip(settings, rows, strict=True):
            rate = " ".join(f"{key} {value:g}" for key, value in options.items())
            figures = " | ".join(f"{row[key]:.2f}" for key in ("bits", "weighted", "hands", "body", "face"))
            print(f"| {name} | {rate} | {figures} |", flush=True)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
