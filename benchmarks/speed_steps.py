#!/usr/bin/env python
"""Training steps beside others: ours and MoMask's form of width 512, and the residual quantizer beside the library's.

python benchmarks/speed_steps.py --rounds 10    # some minutes; needs the extra benchmark

Works take turns, figures are medians; on a busy machine only the ratios mean something. The share of the processor's
matrix rate counts the products and convolutions that a step executes, forward and backward.
"""

import argparse
import json
import os

import torch
from speed_full import FRAMES, MEMORY_BATCH, Contestant, Settings, our_config
from speed_rvq import training_works
from speed_tools import gemm_rate, gemm_work, measure
from torch.utils.flop_counter import FlopCounterMode

# Dimensions, levels, codes: those of the presets, and wider latents.
QUANTIZERS = ((32, 8, 1024), (32, 3, 1024), (48, 8, 256), (48, 3, 256), (128, 8, 1024), (512, 8, 1024))
SIZES = (256, 1024, 4096)


def compare_steps(preset: str, rounds: int) -> dict[str, object]:
    """A training step of a preset and of the peer."""
    config = our_config(Settings(preset))
    models = {name: Contestant(name, config) for name in ("ours", "ConvRVQ-512")}
    works = {name: model.work("train", MEMORY_BATCH) for name, model in models.items()}
    with FlopCounterMode(display=False) as counter:
        works["ours"]()
    seconds = measure({**works, "gemm": gemm_work()}, rounds)
    gemm = gemm_rate(seconds["gemm"])
    return {
        "preset": preset,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "frames_per_second": {name: round(MEMORY_BATCH * FRAMES / seconds[name]) for name in works},
        "ratio": round(seconds["ConvRVQ-512"] / seconds["ours"], 2),
        "gemm_gflops": round(gemm / 1e9, 1),
        "mflop_per_frame": round(counter.get_total_flops() / MEMORY_BATCH / FRAMES / 1e6, 2),
        "gemm_share": round(counter.get_total_flops() / seconds["ours"] / gemm, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [f"configuration/{name}.yaml" for name in ("small", "default", "large")]
    parser.add_argument("--config", nargs="+", default=presets, help="presets (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds, of which the median (default: %(default)s)")
    args = parser.parse_args()
    for preset in args.config:
        print(json.dumps(compare_steps(preset, args.rounds)), flush=True)
    for dim, levels, codes in QUANTIZERS:
        ratios = {}
        for size in SIZES:
            times = measure(training_works(size, dim, levels, codes), max(args.rounds // 2, 1))
            ratios[size] = round(times["library"] / times["ours"], 2)
        print(json.dumps({"dim": dim, "levels": levels, "codes": codes, "ratio_by_vectors": ratios}), flush=True)


if __name__ == "__main__":
    main()
