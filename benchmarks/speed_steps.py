#!/usr/bin/env python
"""Training steps beside others: ours and MoMask's form of width 512, and the residual quantizer beside the library's.

python benchmarks/speed_steps.py --rounds 10    # a minute or two; needs the extra benchmark

Works take turns, figures are medians; on a busy machine only the ratios mean something.
"""

import argparse
import json
import os

import torch
from speed_full import FRAMES, MEMORY_BATCH, Contestant, Settings, our_config
from speed_rvq import training_works
from speed_tools import gemm_rate, gemm_work, measure

DIMENSIONS, SIZES = (32, 128, 512), (256, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configuration/small.yaml", help="preset (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds, of which the median (default: %(default)s)")
    args = parser.parse_args()
    config = our_config(Settings(args.config))
    models = {name: Contestant(name, config) for name in ("ours", "ConvRVQ-512")}
    works = {name: model.work("train", MEMORY_BATCH) for name, model in models.items()}
    seconds = measure({**works, "gemm": gemm_work()}, args.rounds)
    rates = {name: MEMORY_BATCH * FRAMES / seconds[name] for name in works}
    operations = 1e6 * models["ours"].operations()["train"]
    step = {
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "frames_per_second": {name: round(rate) for name, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["ConvRVQ-512"], 2),
        "gemm_share": round(operations * rates["ours"] / gemm_rate(seconds["gemm"]), 3),
    }
    print(json.dumps(step), flush=True)
    for dim in DIMENSIONS:
        for size in SIZES:
            times = measure(training_works(size, dim), max(args.rounds // 2, 1))
            ratio = round(times["library"] / times["ours"], 2)
            print(json.dumps({"dim": dim, "vectors": size, "quantizer_ratio": ratio}), flush=True)


if __name__ == "__main__":
    main()
