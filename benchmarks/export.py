#!/usr/bin/env python
"""How fast the exported ONNX encoder and decoder run beside the model in eager PyTorch, with the same threads.

OMP_NUM_THREADS=2 python benchmarks/export.py --model pretrained/small --threads 2

All kinds of work take turns in one run, so that a change of the machine's speed meets them alike; figures are medians,
the ratios medians of rounds. Poses are smooth random motion around the mean pose, with missing keypoints.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.export import export_model, sample_poses
from modeling_pose_tokenizer.hub import load_pretrained
from modeling_pose_tokenizer.runtime import PoseRuntime

SIZES = ((1, 64), (8, 64), (1, 1000))  # clips, frames of each


def make_work(
    model: PoseTokenizerModel, runtime: PoseRuntime, poses: torch.Tensor, mask: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Name -> one round of each kind of work."""
    codes = model.encode(poses, mask).pose_codes
    assert codes is not None
    values, real, said = poses.numpy(), mask.numpy(), codes.numpy()
    return {
        "encode_torch": torch.inference_mode()(lambda: model.encode(poses, mask)),
        "encode_onnx": lambda: runtime.encode(values, real),
        "decode_torch": torch.inference_mode()(lambda: model.decode(codes, mask)),
        "decode_onnx": lambda: runtime.decode(said, real),
    }


def measure(model_dir: str, folder: str, threads: int, rounds: int) -> dict[str, Any]:
    """Exports the model into the folder and measures it: "BxT" -> milliseconds and ratios."""
    torch.set_num_threads(threads)
    model, extractor = load_pretrained(model_dir)
    export_model(model, extractor, folder)
    runtime = PoseRuntime(folder, num_threads=threads)
    results: dict[str, Any] = {}
    for batch, frames in SIZES:
        work = make_work(model, runtime, *sample_poses(model, extractor.mean, [frames] * batch, seed=0))
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for number in range(rounds + 1):
            for name, run in work.items():
                start = time.perf_counter()
                run()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
        results[f"{batch}x{frames}"] = {
            "milliseconds": {name: round(1e3 * statistics.median(each), 2) for name, each in seconds.items()},
            "speedup": {
                way: round(
                    statistics.median(
                        torch_ / onnx
                        for torch_, onnx in zip(seconds[f"{way}_torch"], seconds[f"{way}_onnx"], strict=True)
                    ),
                    2,
                )
                for way in ("encode", "decode")
            },
        }
    return {"model": model_dir, "threads": threads, "rounds": rounds, **results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pretrained/small", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds, of which the median (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        print(json.dumps(measure(args.model, folder, args.threads, args.rounds), indent=1))


if __name__ == "__main__":
    main()
