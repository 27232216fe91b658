#!/usr/bin/env python
"""How fast a configuration encodes, decodes and trains, beside the processor's own matrix product.

python benchmarks/speed.py --config configuration/small.yaml

All kinds of work take turns in one run, so that a change of the machine's speed meets them alike; figures are medians.
Weights are random: the time does not depend on them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.presets import load_run_config

GEMM_SIZE = 1024


def make_work(model: PoseTokenizerModel, batch: int, frames: int) -> dict[str, Callable[[], object]]:
    """Name -> one round of each kind of work, on `batch` clips of `frames` frames."""
    config = model.config
    poses = torch.randn(batch, frames, config.layout.num_keypoints, config.keypoint_dim)
    poses[..., -1] = 1.0
    steps = model.get_encoded_length(frames)
    latents = torch.randn(batch, steps, len(config.group_names), config.codebook_dim)
    valid = torch.ones(batch, steps, dtype=torch.bool)
    square = torch.randn(GEMM_SIZE, GEMM_SIZE)
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
        "gemm": lambda: square @ square,
    }


def measure(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each kind of work, taken in turn after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configuration/small.yaml", help="preset (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="clips of a micro-batch (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=64, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds, of which the median (default: %(default)s)")
    args = parser.parse_args()
    model = PoseTokenizerModel(load_run_config(["--config", args.config]).model_config())
    model.quantizer.initialized.fill_(True)
    seconds = measure(make_work(model, args.batch, args.frames), args.rounds)
    gemm = seconds.pop("gemm")
    frames = args.batch * args.frames
    result = {
        "config": args.config,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "micro_batch": [args.batch, args.frames],
        "gemm_gflops": round(2e-9 * GEMM_SIZE**3 / gemm, 1),
        "frames_per_second": {name: round(frames / value) for name, value in seconds.items()},
        "milliseconds": {name: round(1e3 * value, 2) for name, value in seconds.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
