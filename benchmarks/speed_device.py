#!/usr/bin/env python
"""Training and encoding on a device: presets, eager and compiled, fp32 and bf16, and what limits them.

python benchmarks/speed_device.py --device cuda --output speed_cuda.json
python benchmarks/speed_device.py --device cpu --presets small --modes eager --batch 8 --rounds 5

The share of arithmetic is that of a large matrix product in the same precision, of bandwidth that of a large copy,
both measured here. Bytes are what eager operators read and write; a compiled model moves fewer, so its share is an
upper bound. Where neither reaches a half, launching many small operators is what limits.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.presets import load_run_config

FRAMES = 64  # of a clip
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITED = 0.5  # share from which a limit counts as what limits


class ByteCounter(TorchDispatchMode):
    """Sums what operators read and write; views move nothing."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [each for each in tree_leaves((args, kwargs, result)) if torch.is_tensor(each)]
            self.moved += sum(each.numel() * each.element_size() for each in tensors)
        return result


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a run after two that do not count, waiting for the device each time."""
    wait = getattr(torch, device.type).synchronize if device.type != "cpu" else lambda: None
    seconds = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def limits_of(device: torch.device, rounds: int) -> dict[str, float]:
    """Operations per second of each precision, bytes per second of a copy."""
    size = 8192 if device.type != "cpu" else 1024
    limits = {}
    for name, dtype in PRECISIONS.items():
        square = torch.randn(size, size, device=device, dtype=dtype)
        limits[name] = 2 * size**3 / seconds_of(partial(torch.mm, square, square), device, rounds)
    block = torch.empty(size, size, 4 if device.type == "cpu" else 16, device=device)
    target = torch.empty_like(block)
    limits["bytes"] = 2 * block.numel() * 4 / seconds_of(lambda: target.copy_(block), device, rounds)
    return limits


def make_works(
    model: PoseTokenizerModel, compiled: bool, precision: str, poses: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """Kind -> one round: forward, loss, gradients and optimizer; or encoding."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # full work, and the model stays itself
    works: list[Callable[..., Any]] = [model.forward, model.encode]
    forward, encode = (torch.compile(each) if compiled else each for each in works)

    def cast() -> torch.autocast:
        return torch.autocast(poses.device.type, PRECISIONS[precision], enabled=precision != "fp32")

    def train() -> None:
        model.train()
        with cast():
            loss = forward(poses).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def tokens() -> None:
        model.eval()
        with torch.no_grad(), cast():
            encode(poses)

    return {"train": train, "encode": tokens}


def measure_device(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of the table."""
    device = torch.device(args.device)
    limits = limits_of(device, args.rounds)
    rows = []
    for preset in args.presets:
        config = load_run_config(["--config", f"configuration/{preset}.yaml"]).model_config()
        poses = torch.randn(args.batch, FRAMES, config.layout.num_keypoints, config.keypoint_dim, device=device)
        poses[..., -1] = 1.0
        for mode in args.modes:
            for precision in PRECISIONS:
                torch.compiler.reset()
                model = PoseTokenizerModel(config).to(device)
                model.quantizer.initialized.fill_(True)
                eager = make_works(model, False, precision, poses)
                for kind, run in make_works(model, mode == "compiled", precision, poses).items():
                    with FlopCounterMode(display=False) as flops:
                        eager[kind]()
                    with ByteCounter() as data:
                        eager[kind]()
                    seconds = seconds_of(run, device, args.rounds)
                    shares = {
                        "arithmetic": flops.get_total_flops() / seconds / limits[precision],
                        "bandwidth": data.moved / seconds / limits["bytes"],
                    }
                    most = max(shares, key=lambda name: shares[name])
                    rows.append({
                        "preset": preset, "mode": mode, "precision": precision, "kind": kind,
                        "frames_per_second": round(args.batch * FRAMES / seconds),
                        **{name: round(share, 3) for name, share in shares.items()},
                        "limit": most if shares[most] >= LIMITED else "launches",
                    })  # fmt: skip
                    print(" | ".join(map(str, rows[-1].values())), flush=True)
    return {"device": args.device, "batch": args.batch, "frames": FRAMES, "limits": limits, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--presets", nargs="+", default=["small", "default", "large"], metavar="NAME")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--batch", type=int, default=512, help="clips of 64 frames (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, of which the median (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    result = measure_device(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
