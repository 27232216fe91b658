#!/usr/bin/env python
"""Error of each part of the body against bits per frame: this codec, learned peers, and codecs without gradients.

    python benchmarks/rate_distortion.py --data DIR                    # every row of the cpu budget, hours
    python benchmarks/rate_distortion.py --data DIR --rows ours klt_8  # some of them
    python benchmarks/rate_report.py                                   # table and figure of what is there

DIR holds webcam-signs133, fingerspelling-wholebody133 and fingerspelled-words133 with train/ and val/, and cmu-mocap38
for `--benchmark mocap`. Every row trains on the same augmented windows with the same loss (`protocol.py`). A network
tries three learning rates with seed 0 and repeats the best with the seeds that its row asks for.

Each run is one line of benchmarks/results/rate_distortion.jsonl, written when it is done. A command that was stopped
goes on with the runs that are missing; a line that is deleted is measured again.
"""

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cosine import CosineCoder, PairCoder
from linear import BlockVQ, PredictiveVQ, TransformCoder, training_windows
from peers import ConvRVQ, FrameTransformerFSQ, JointSTGCN, SeparateConvVQ
from protocol import Benchmark, PartErrors, batches, entropy_bits, load_benchmark
from torch import nn

from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerModel
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.loss_pose_tokenizer import LossInputs, PoseTokenizerLoss

RESULTS = Path(__file__).parent / "results" / "rate_distortion.jsonl"
BUDGETS = {"cpu": 2000, "gpu": 30000}  # steps of 32 windows of 32 frames
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
WARMUP, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM, WEIGHTS_EMA = 100, 0.01, (0.9, 0.99), 1.0, 0.99
INITIAL_BATCHES = 128  # for k-means and principal axes
CLIPS_AT_A_TIME = 16


class Codec(nn.Module, ABC):
    """What the runner needs of a network."""

    hop_length: int
    codebook_sizes: list[int]

    def __init__(self, benchmark: Benchmark, model: nn.Module, config: PoseTokenizerConfig):
        super().__init__()
        self.benchmark, self.model, self.config = benchmark, model, config

    @abstractmethod
    def initialize(self, first: Sequence[dict[str, torch.Tensor]]) -> None:
        """Whatever is fitted to the first batches before training."""

    @abstractmethod
    def train_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a training batch."""

    @abstractmethod
    def encode(self, batch: dict[str, torch.Tensor], levels: int | None) -> torch.Tensor:
        """Codes (B, Q, S) of a prefix of levels."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """Poses (B, T, N, D) of the codes of a prefix of levels."""

    @abstractmethod
    def num_codebooks(self, levels: int | None) -> int:
        """Codebooks of a prefix of levels."""

    @abstractmethod
    def without_quantizer(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Poses (B, T, N, D) when latents reach the decoder as they are."""


class Ours(Codec):
    """This project's codec.

    Args:
        benchmark: The data.
        levels: Of body, face, left hand, right hand. A skeleton that is one group has the sum of them, and its
            prefixes have as many codebooks.
        **changes: Keys of the configuration.
    """

    model: PoseTokenizerModel

    def __init__(self, benchmark: Benchmark, levels: Sequence[int], **changes: Any):
        num_quantizers = list(levels) if len(benchmark.layout.groups) == len(levels) else sum(levels)
        config = PoseTokenizerConfig(**benchmark.skeleton_fields, num_quantizers=num_quantizers, **changes)
        super().__init__(benchmark, PoseTokenizerModel(config), config)
        self.levels = levels
        self.hop_length, self.codebook_sizes = config.hop_length, [config.codebook_size] * config.num_codebooks

    def initialize(self, first: Sequence[dict[str, torch.Tensor]]) -> None:
        self.model.initialize_from_data(first)

    def train_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).loss

    def encode(self, batch: dict[str, torch.Tensor], levels: int | None) -> torch.Tensor:
        one_group = len(self.config.group_names) == 1
        num_quantizers = self.num_codebooks(levels) if one_group else levels
        codes = self.model.encode(batch["input_values"], batch["padding_mask"], num_quantizers).pose_codes
        assert codes is not None
        return codes

    def decode(self, codes: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        values = self.model.decode(codes, padding_mask).pose_values
        assert values is not None
        return values

    def num_codebooks(self, levels: int | None) -> int:
        return sum(min(own, levels or own) for own in self.levels)

    def without_quantizer(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model.reconstruct_without_quantizer(**batch)


class Peer(Codec):
    """A network of `peers.py`, trained with this project's loss."""

    def __init__(self, benchmark: Benchmark, kind: type, **options: Any):
        config = PoseTokenizerConfig(**benchmark.skeleton_fields)
        model = kind(benchmark.layout, config.keypoint_dim, **options)
        super().__init__(benchmark, model, config)
        self.hop_length, self.codebook_sizes = model.hop_length, model.codebook_sizes
        self.loss = PoseTokenizerLoss(config)

    def initialize(self, first: Sequence[dict[str, torch.Tensor]]) -> None:
        self.model.fit_statistics(self.benchmark.train)
        self.model.initialize(first)

    def train_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output, values, frames = self.model(**batch), batch["input_values"], batch["padding_mask"].bool()
        valid = (values[..., -1] >= self.config.confidence_threshold) & frames[..., None]
        losses = self.loss(LossInputs(output.pose_values, values, valid, frames, output.commitment_loss))
        return self.loss.total(losses)

    def encode(self, batch: dict[str, torch.Tensor], levels: int | None) -> torch.Tensor:
        return self.model.encode(**batch)[:, : self.num_codebooks(levels)]

    def decode(self, codes: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        return self.model.decode(codes)[:, : padding_mask.shape[1]]

    def num_codebooks(self, levels: int | None) -> int:
        return len(self.codebook_sizes) if levels is None else levels * len(self.codebook_sizes) // self.model.levels

    def without_quantizer(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model.reconstruct_without_quantizer(**batch)


def padded(clips: Sequence[np.ndarray]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Clips of like length together: their numbers, and a batch of them."""
    order = sorted(range(len(clips)), key=lambda number: len(clips[number]))
    for start in range(0, len(order), CLIPS_AT_A_TIME):
        numbers = order[start : start + CLIPS_AT_A_TIME]
        longest = max(len(clips[number]) for number in numbers)
        values = torch.zeros(len(numbers), longest, *clips[0].shape[1:])
        mask = torch.zeros(len(numbers), longest, dtype=torch.long)
        for row, number in enumerate(numbers):
            values[row, : len(clips[number])] = torch.from_numpy(clips[number])
            mask[row, : len(clips[number])] = 1
        yield numbers, {"input_values": values, "padding_mask": mask}


@torch.inference_mode()
def score(codec: Codec, prefixes: Sequence[int | None]) -> list[dict[str, Any]]:
    """Errors and bits of each val set at prefixes of the levels."""
    codec.eval()
    points = []
    for levels in prefixes:
        sizes = codec.codebook_sizes[: codec.num_codebooks(levels)]
        known = list(clip_codes(codec, codec.benchmark.train, levels))
        point: dict[str, Any] = {"levels": levels, "bits_fixed": float(sum(np.log2(sizes))) / codec.hop_length}
        point["utilization"] = [
            len(np.unique(book)) / size for book, size in zip(np.concatenate(known, 1), sizes, strict=True)
        ]
        point["val"] = {
            name: score_set(codec, clips, levels, known, sizes) for name, clips in codec.benchmark.val.items()
        }
        points.append(point)
    return points


def score_set(
    codec: Codec, clips: Sequence[np.ndarray], levels: int | None, known: Sequence[np.ndarray], sizes: Sequence[int]
) -> dict[str, float]:
    """Errors and entropy-coded bits of a val set, at a prefix of the levels."""
    errors, codes = PartErrors(codec.benchmark.layout), []
    for numbers, batch in padded(clips):
        found = codec.encode(batch, levels)
        values = codec.decode(found, batch["padding_mask"])
        for row, number in enumerate(numbers):
            errors.update(values[row, : len(clips[number])], clips[number])
            codes.append(found[row, :, : -(-len(clips[number]) // codec.hop_length)].numpy())
    return errors.compute() | {"bits_entropy": entropy_bits(known, codes, sizes, codec.hop_length)}


def clip_codes(codec: Codec, clips: Sequence[np.ndarray], levels: int | None) -> Iterator[np.ndarray]:
    """Codes (Q, S) of each clip at a prefix of the levels."""
    for numbers, batch in padded(clips):
        for number, codes in zip(numbers, codec.encode(batch, levels), strict=True):
            yield codes[:, : -(-len(clips[number]) // codec.hop_length)].numpy()


@torch.inference_mode()
def score_without_quantizer(codec: Codec) -> dict[str, Any]:
    """Errors of each val set when latents reach the decoder as they are."""
    codec.eval()
    result = {}
    for name, clips in codec.benchmark.val.items():
        errors = PartErrors(codec.benchmark.layout)
        for numbers, batch in padded(clips):
            values = codec.without_quantizer(batch)
            for row, number in enumerate(numbers):
                errors.update(values[row, : len(clips[number])], clips[number])
        result[name] = errors.compute()
    return result


def train(codec: Codec, steps: int, learning_rate: float, seed: int) -> None:
    """The recipe of every network: AdamW, warm-up and cosine, averaged weights."""
    codec.initialize(list(islice(batches(codec.benchmark, steps, seed), INITIAL_BATCHES)))
    codec.train()
    optimizer = torch.optim.AdamW(codec.parameters(), learning_rate, BETAS, weight_decay=WEIGHT_DECAY)
    rate = lambda step: min(1.0, (step + 1) / WARMUP) * (0.01 + 0.495 * (1 + np.cos(np.pi * step / steps)))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average = [parameter.detach().clone() for parameter in codec.parameters()]
    for step, batch in enumerate(batches(codec.benchmark, steps, seed)):
        loss = codec.train_loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        torch._foreach_lerp_(average, list(codec.parameters()), 1 - WEIGHTS_EMA)
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    with torch.no_grad():
        for parameter, mean in zip(codec.parameters(), average, strict=True):
            parameter.copy_(mean)


@dataclass
class Row:
    """A network of the comparison.

    Attributes:
        codec: What builds it, with the benchmark and `options`.
        options: Its keyword arguments.
        prefixes: Levels at which it is scored; `None` is all of them.
        seeds: Of the runs at the best learning rate.
    """

    codec: Callable[..., Codec]
    options: dict[str, Any]
    prefixes: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)


BEAM_SIZE = 8  # of the search that encodes what our models are scored with besides
# Ours: steps of 4 frames and codebooks of 256. body, face, left hand, right hand.
OURS = {"hidden_size": 96, "num_part_layers": 2, "codebook_size": 256, "codebook_dim": 48}
# The models of about 40 bits are scored at prefixes of about 10 and 20 too.
ROWS: dict[str, Row] = {
    "ours": Row(Ours, {**OURS, "levels": (6, 1, 6, 6)}, (1, 2, 3, 6), (0, 1, 2)),
    "ours_20": Row(Ours, {**OURS, "levels": (3, 1, 3, 3), "quantizer_dropout": 0.0}),
    "ours_5": Row(Ours, {**OURS, "levels": (1, 1, 1, 1), "codebook_size": 32, "quantizer_dropout": 0.0}),
    "momask_256": Row(Peer, {"kind": ConvRVQ, "width": 256, "levels": 16, "dropout": 0.0}, (2, 4, 8, 16)),
    "momask_512": Row(Peer, {"kind": ConvRVQ, "width": 512, "levels": 16, "dropout": 0.0}, (2, 4, 8, 16)),
    "soke": Row(Peer, {"kind": SeparateConvVQ, "width": 256}, seeds=(0, 1, 2)),  # the strongest of them
    "sign_vq": Row(Peer, {"kind": FrameTransformerFSQ, "width": 128, "heads": 4, "layers": 3}),
    "st_gcn": Row(Peer, {"kind": JointSTGCN, "width": 24, "blocks": 3}),
}


def run_network(benchmark: Benchmark, name: str, learning_rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Trains and scores one network."""
    row = ROWS[name]
    torch.manual_seed(seed)
    codec = row.codec(benchmark, **row.options)
    start = time.perf_counter()
    train(codec, steps, learning_rate, seed)
    result = {
        "parameters": sum(parameter.numel() for parameter in codec.parameters()),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "points": score(codec, row.prefixes),
        "without_quantizer": score_without_quantizer(codec),
    }
    if isinstance(codec, Ours):
        codec.config.beam_size = BEAM_SIZE
        result["points_beams"] = score(codec, row.prefixes)
    return result


# Codecs without gradients, each with the hands' squared error weighted as in the networks' loss, or not.
KLT_STEPS = np.geomspace(0.12, 2.5, 10)  # in shoulder widths
TRANSFORMS: dict[str, Callable[..., Any]] = {"klt": TransformCoder, "cosine": CosineCoder, "pairs": PairCoder}
BLOCK_LEVELS = (2, 4, 8, 16)
LINEAR_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    f"klt_{block}{name}": ("klt", {"block": block, "hand_weight": weight})
    for block in (4, 8, 16)
    for name, weight in (("", 1.0), ("_hands", 5.0))
}
LINEAR_ROWS |= {
    f"{kind}_{block}{name}": (kind, {"block": block, "hand_weight": weight})
    for kind, block in (("cosine", 8), ("cosine", 16), ("pairs", 16))
    for name, weight in (("", 1.0), ("_hands", 5.0))
}
LINEAR_ROWS |= {
    "block_vq": ("block_vq", {"hand_weight": 1.0}),
    "block_vq_hands": ("block_vq", {"hand_weight": 5.0}),
    "predictive_vq": ("predictive_vq", {}),
}
LINEAR_BATCHES = 400  # of augmented windows


def linear_points(benchmark: Benchmark, kind: str, **options: Any) -> Iterator[tuple[Any, float | None]]:
    """Fitted codecs of a row, one for each of its rates, with their bits per frame at a fixed rate."""
    windows = training_windows(benchmark, LINEAR_BATCHES)
    torch.manual_seed(0)
    if kind in TRANSFORMS:
        transform = TRANSFORMS[kind](benchmark.layout, **options)
        transform.fit(windows)
        for step in KLT_STEPS * options["hand_weight"] ** 0.25 * (options["block"] / 8) ** 0.25:
            transform.set_rate(float(step))
            yield transform, None
    elif kind == "block_vq":
        blocks = BlockVQ(benchmark.layout, max(BLOCK_LEVELS), **options)
        blocks.fit(windows)
        for blocks.levels in BLOCK_LEVELS:
            yield blocks, float(np.log2(blocks.codebook_sizes).sum()) / blocks.hop_length
    else:
        # At 10 bits the codebooks of 20 on blocks twice as long err less than smaller codebooks.
        for bits, block in ((5, 4), (20, 8), (20, 4), (22.5, 4), (40, 4)):
            loop = PredictiveVQ(benchmark.layout, bits, block)
            loop.fit(windows)
            yield loop, float(np.log2(loop.codebook_sizes).sum()) / loop.hop_length


def run_linear(benchmark: Benchmark, name: str) -> dict[str, Any]:
    """Fits and scores one codec without gradients at all its rates."""
    kind, options = LINEAR_ROWS[name]
    points, start = [], time.perf_counter()
    for codec, bits_fixed in linear_points(benchmark, kind, **options):
        known = [] if bits_fixed is None else [codec.encode_decode(clip)[1] for clip in benchmark.train]
        point: dict[str, Any] = {"levels": None, "bits_fixed": bits_fixed, "val": {}}
        for val_set, clips in benchmark.val.items():
            errors, codes = PartErrors(benchmark.layout), []
            for clip in clips:
                reconstruction, found = codec.encode_decode(clip)
                errors.update(reconstruction, clip)
                codes.append(found)
            if bits_fixed is None:
                bits = codec.bits_per_frame(codes)
            else:
                bits = entropy_bits(known, codes, codec.codebook_sizes, codec.hop_length)
            point["val"][val_set] = errors.compute() | {"bits_entropy": bits}
            if isinstance(codec, PairCoder):
                point["val"][val_set]["bits_tokens"] = codec.token_bits_per_frame(codes)
                point["bits_fixed"] = point["bits_fixed"] or point["val"][val_set]["bits_tokens"]  # the first set's
        points.append(point)
    minutes = round((time.perf_counter() - start) / 60, 1)
    return {"parameters": codec.num_parameters, "minutes": minutes, "points": points}


def missing_runs(
    names: Sequence[str], done: Sequence[dict[str, Any]], **same: Any
) -> Iterator[tuple[str, float, int]]:
    """What is left to run, learning rates before seeds. Read it again after each run: the best rate may be known."""
    for name in names:
        runs = [run for run in done if run["row"] == name and all(run[key] == value for key, value in same.items())]
        if name in LINEAR_ROWS:
            yield from [(name, 0.0, 0)] * (not runs)
            continue
        left = [rate for rate in LEARNING_RATES if not any(run["learning_rate"] == rate for run in runs)]
        yield from ((name, rate, 0) for rate in left)
        if not left:
            best = best_rate(runs)
            known = {run["seed"] for run in runs if run["learning_rate"] == best}
            yield from ((name, best, seed) for seed in ROWS[name].seeds if seed not in known)


def best_rate(runs: Sequence[dict[str, Any]]) -> float:
    """The learning rate with the lowest mean error of all keypoints over val sets, rates and seeds, of those that have
    most seeds: where several have, a lucky one does not choose."""
    errors: dict[float, list[float]] = {}
    for run in runs:
        mean = np.mean([val["all"] for point in run["points"] for val in point["val"].values()])
        errors.setdefault(run["learning_rate"], []).append(float(mean))
    most = max(map(len, errors.values()))
    return min((rate for rate in errors if len(errors[rate]) == most), key=lambda rate: np.mean(errors[rate]))


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--benchmark", default="signing", choices=("signing", "mocap"), help="(default: %(default)s)")
    parser.add_argument(
        "--budget", default="cpu", choices=BUDGETS, help="steps of the networks (default: %(default)s)"
    )
    every = [*ROWS, *LINEAR_ROWS]
    parser.add_argument("--rows", nargs="+", default=every, choices=every, help="rows to run (default: all)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where runs are kept (default: beside this file)"
    )
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data is missing; expected the folder that holds webcam-signs133 and the other data sets.")
    try:
        benchmark = load_benchmark(args.data, args.benchmark)
    except PoseDataError as error:
        print(error, file=sys.stderr)
        return 1
    args.results.parent.mkdir(parents=True, exist_ok=True)
    same = {"benchmark": args.benchmark, "budget": args.budget}
    while run := next(missing_runs(args.rows, read_results(args.results), **same), None):
        name, learning_rate, seed = run
        print(f"{name}, learning rate {learning_rate}, seed {seed}", file=sys.stderr, flush=True)
        if name in LINEAR_ROWS:
            steps, result = 0, run_linear(benchmark, name)
        else:
            steps = BUDGETS[args.budget]
            result = run_network(benchmark, name, learning_rate, seed, steps)
        settings = {"row": name, "learning_rate": learning_rate, "seed": seed, "steps": steps}
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(same | settings | result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
