#!/usr/bin/env python
"""Training steps beside others: ours and MoMask's form of width 512, and the residual quantizer beside the library's.

python benchmarks/speed_steps.py --rounds 10    # some minutes; needs the extra benchmark

Works take turns, figures are medians; on a busy machine only the ratios mean something. On one thread seconds are the
processor's, which other work disturbs least. The share of the processor's matrix rate counts the products and
convolutions that a step executes, forward and backward.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
from speed_full import FRAMES, MEMORY_BATCH, Contestant, Settings, our_config
from speed_rvq import training_works
from speed_tools import gemm_rate, gemm_work, measure
from torch.utils.flop_counter import FlopCounterMode

# Dimensions, levels, codes: those of the presets, and wider latents.
QUANTIZERS = ((32, 8, 1024), (32, 3, 1024), (48, 8, 256), (48, 3, 256), (128, 8, 1024), (512, 8, 1024))
SIZES = (256, 1024, 4096)


def clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def executed_operations(work: Callable[[], object]) -> float:
    """Floating-point operations of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    # torch 2.13 counts gradients of depthwise convolutions as if they were dense; each conv has two of its own size.
    return counter.get_total_flops() - counts[aten.convolution_backward] + 2 * counts[aten.convolution]


def compare_steps(preset: str, rounds: int) -> dict[str, object]:
    """A training step of a preset and of the peer."""
    config = our_config(Settings(preset))
    models = {name: Contestant(name, config) for name in ("ours", "ConvRVQ-512")}
    works = {name: model.work("train", MEMORY_BATCH) for name, model in models.items()}
    operations = executed_operations(works["ours"])
    seconds = measure({**works, "gemm": gemm_work()}, rounds, clock())
    gemm = gemm_rate(seconds["gemm"])
    return {
        "preset": preset,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "frames_per_second": {name: round(MEMORY_BATCH * FRAMES / seconds[name]) for name in works},
        "ratio": round(seconds["ConvRVQ-512"] / seconds["ours"], 2),
        "gemm_gflops": round(gemm / 1e9, 1),
        "mflop_per_frame": round(operations / MEMORY_BATCH / FRAMES / 1e6, 2),
        "gemm_share": round(operations / seconds["ours"] / gemm, 3),
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
        figures: dict[str, object] = {"dim": dim, "levels": levels, "codes": codes}
        for size in SIZES:
            times = measure(training_works(size, dim, levels, codes), args.rounds, clock())
            figures[f"{size} vectors"] = {name: round(times["library"] / times[name], 2) for name in ("ours", "plain")}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
