#!/usr/bin/env python
"""How fast a configuration encodes, decodes and trains, beside the processor's own matrix product.

python benchmarks/speed.py --config configuration/small.yaml
python benchmarks/speed.py --config configuration/small.yaml --full --output speed.json   # beside the learned peers

All kinds of work take turns in one run, so that a change of the machine's speed meets them alike; figures are medians.
Weights are random: the time does not depend on them. The full comparison tries several micro-batches for each kind of
work and runs under the default and a tuned allocator; it takes some tens of minutes on two cores.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_tools import gemm_rate, gemm_work, measure

from modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.presets import load_run_config


def make_work(model: PoseTokenizerModel, batch: int, frames: int) -> dict[str, Callable[[], object]]:
    """Name -> one round of each kind of work, on `batch` clips of `frames` frames."""
    config = model.config
    poses = torch.randn(batch, frames, config.layout.num_keypoints, config.keypoint_dim)
    poses[..., -1] = 1.0
    steps = model.get_encoded_length(frames)
    latents = torch.randn(batch, steps, len(config.group_names), config.codebook_dim)
    valid = torch.ones(batch, steps, dtype=torch.bool)
    with torch.inference_mode():
        codes = model.eval().encode(poses).pose_codes

    def train() -> None:
        model.train()(poses).loss.backward()
        model.eval().zero_grad()

    return {
        "encode": torch.inference_mode()(lambda: model.encode(poses)),
        "decode": torch.inference_mode()(lambda: model.decode(codes)),
        "forward": torch.inference_mode()(lambda: model(poses)),
        "quantizer": torch.inference_mode()(lambda: model.quantizer.encode(latents, valid)),
        "train": train,
        "gemm": gemm_work(),
    }


def measure_ours(config: str, batch: int, frames: int, rounds: int) -> dict[str, Any]:
    """Rates of the configuration alone, at one micro-batch."""
    model = PoseTokenizerModel(load_run_config(["--config", config]).model_config())
    model.quantizer.initialized.fill_(True)
    seconds = measure(make_work(model, batch, frames), rounds)
    gemm = seconds.pop("gemm")
    return {
        "config": config,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "micro_batch": [batch, frames],
        "gemm_gflops": round(gemm_rate(gemm) / 1e9, 1),
        "frames_per_second": {name: round(batch * frames / value) for name, value in seconds.items()},
        "milliseconds": {name: round(1e3 * value, 2) for name, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configuration/small.yaml", help="preset (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="clips of a micro-batch (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=64, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds, of which the median (default: %(default)s)")
    parser.add_argument(
        "--full", action="store_true", help="compare with the learned peers; needs the extra benchmark"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="with --full: only these (ours, ConvRVQ-256, ...)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    if args.full:
        from speed_full import MODELS, Settings, compare, render

        unknown = set(args.models or ()).difference(MODELS)
        if unknown:
            parser.error(f"unknown model {', '.join(sorted(unknown))}; expected some of {', '.join(MODELS)}")
        result = compare(Settings(args.config, tuple(args.models or MODELS), args.rounds))
        print(render(result))
    else:
        result = measure_ours(args.config, args.batch, args.frames, args.rounds)
        print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
