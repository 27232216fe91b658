"""Ours and its learned peers side by side: rates, operations, memory, and how the cost grows.

Every section runs in a fresh process of its own allocator; within it the works take turns, so that a change of the
machine's speed meets all alike. Figures are medians. Poses are random: the time does not depend on them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peer_base import Peer
from peers import ConvRVQ, FrameTransformerFSQ, JointSTGCN, SeparateConvVQ
from speed_rvq import compare_rvq
from speed_tools import (
    allocators,
    best_size,
    gemm_rate,
    gemm_work,
    in_fresh_process,
    measure,
    peak_memory,
    try_sizes,
)
from torch.utils.flop_counter import FlopCounterMode

from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerModel
from modeling_pose_tokenizer.loss_pose_tokenizer import LossInputs, PoseTokenizerLoss
from modeling_pose_tokenizer.presets import load_run_config

# In the sizes of their authors' codes, at 20 bits per frame.
PEERS: dict[str, Callable[..., Peer]] = {
    "ConvRVQ-256": partial(ConvRVQ, width=256),
    "ConvRVQ-512": partial(ConvRVQ, width=512),
    "SeparateConvVQ": SeparateConvVQ,
    "FrameTransformerFSQ": FrameTransformerFSQ,
    "JointSTGCN": JointSTGCN,
}
SEARCHES = {"ours": 1, "ours-8-beams": 8}  # our names -> beams
MODELS = (*SEARCHES, *PEERS)
# Those whose cost is followed over T and N: the one model with many shapes in it and the plainest peer.
SCALED = ("ours", "ConvRVQ-256", "ConvRVQ-512")
KINDS = ("encode", "decode", "forward", "train")
FRAMES = 64  # of a clip, where nothing else is said
BATCHES = (1, 4, 16, 64)
MEMORY_BATCH = 8  # clips, where memory or the growth with N is measured
LENGTHS = (16, 64, 256, 1024, 4096)
FRAMES_PER_CALL = 4096  # of all clips together, while T grows
SKELETONS = (
    "coco_17",
    "phoenix_50",
    "unisign_69",
    "coco_wholebody_133",
    "mediapipe_holistic_178",
    "mediapipe_holistic_543",
)


@dataclass(frozen=True)
class Settings:
    """What is compared: the preset of our model, the names of the models, rounds of a median."""

    config: str
    models: tuple[str, ...] = MODELS
    rounds: int = 15


class Contestant:
    """A model, ours or a peer, that does its kinds of work on random poses."""

    def __init__(self, name: str, config: PoseTokenizerConfig):
        torch.manual_seed(0)
        self.config = config = copy.deepcopy(config)
        self.loss = PoseTokenizerLoss(config)
        self.model: Any
        if name in SEARCHES:
            self.model = PoseTokenizerModel(config)
            self.model.config.beam_size = SEARCHES[name]
            self.model.quantizer.initialized.fill_(True)
        else:
            self.model = PEERS[name](config.layout, config.keypoint_dim)
            for quantizer in self.model.quantizers:
                quantizer.fit(torch.randn(1, 2048, quantizer.dim))
        self.model.eval()
        # Full work, and the model stays itself.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def some_poses(self, batch: int, frames: int) -> torch.Tensor:
        poses = torch.randn(batch, frames, self.config.layout.num_keypoints, self.config.keypoint_dim)
        poses[..., -1] = 1.0
        return poses

    def encode(self, poses: torch.Tensor) -> torch.Tensor:
        found = self.model.encode(poses)
        return found if isinstance(self.model, Peer) else found.pose_codes

    def train_step(self, poses: torch.Tensor) -> None:
        """Forward in training mode, loss, gradients and optimizer: what a step costs without its data."""
        self.model.train()
        output = self.model(poses)
        loss = output.loss if isinstance(self.model, PoseTokenizerModel) else self.peer_loss(output, poses)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.eval()

    def peer_loss(self, output: Any, poses: torch.Tensor) -> torch.Tensor:
        """Our loss, for all alike."""
        everything = torch.ones(poses.shape[:3], dtype=torch.bool)
        inputs = LossInputs(output.pose_values, poses, everything, everything[..., 0], output.commitment_loss)
        return self.loss.total(self.loss(inputs))

    def work(self, kind: str, batch: int, frames: int = FRAMES) -> Callable[[], object]:
        """One round of a kind of work on `batch` clips of `frames` frames."""
        poses = self.some_poses(batch, frames)
        if kind == "train":
            return lambda: self.train_step(poses)
        if kind == "decode":
            with torch.inference_mode():
                codes = self.encode(poses)
            return torch.inference_mode()(lambda: self.model.decode(codes))
        run = self.encode if kind == "encode" else self.model
        return torch.inference_mode()(lambda: run(poses))

    def operations(self) -> dict[str, float]:
        """Millions of floating-point operations per frame; products and convolutions count, as two per pair."""
        poses = self.some_poses(1, FRAMES)
        codes = self.encode(poses)
        counted = {}
        # With gradients: the fused layers of inference are not counted.
        for kind, run, argument in (
            ("encode", self.encode, poses),
            ("decode", self.model.decode, codes),
            ("forward", self.model, poses),
        ):
            with FlopCounterMode(display=False) as counter:
                run(argument)
            counted[kind] = counter.get_total_flops() / FRAMES / 1e6
        counted["train"] = 3 * counted["forward"]  # the usual count: gradients cost two forwards
        return counted


def our_config(settings: Settings, *options: str) -> PoseTokenizerConfig:
    return load_run_config(["--config", settings.config, *options]).model_config()


def compare_rates(settings: Settings) -> dict[str, Any]:
    """Frames per second of every kind of work, each at its best micro-batch."""
    config = our_config(settings)
    contestants = {name: Contestant(name, config) for name in settings.models}
    tried = {
        (name, kind): try_sizes(partial(contestant.work, kind), BATCHES)
        for name, contestant in contestants.items()
        for kind in KINDS
    }
    best = {key: best_size(seconds) for key, seconds in tried.items()}
    works = {(name, kind): contestants[name].work(kind, batch) for (name, kind), batch in best.items()}
    seconds = measure({**works, ("gemm", ""): gemm_work()}, settings.rounds)
    gemm = gemm_rate(seconds.pop(("gemm", "")))
    models: dict[str, dict[str, Any]] = {}
    for name, contestant in contestants.items():
        rates = {kind: best[name, kind] * FRAMES / seconds[name, kind] for kind in KINDS}
        operations = contestant.operations()
        models[name] = {
            "parameters": sum(parameter.numel() for parameter in contestant.model.parameters()),
            "mflop_per_frame": {kind: round(value, 2) for kind, value in operations.items()},
            "frames_per_second": {kind: round(rate) for kind, rate in rates.items()},
            "micro_batch": {kind: best[name, kind] for kind in KINDS},
            "gemm_share": {kind: round(1e6 * operations[kind] * rates[kind] / gemm, 3) for kind in KINDS},
            "frames_per_second_by_batch": {
                kind: {batch: round(batch * FRAMES / value) for batch, value in tried[name, kind].items()}
                for kind in KINDS
            },
        }
    return {"gemm_gflops": round(gemm / 1e9, 1), "models": models}


def memory_of(settings: Settings, name: str, kind: str) -> float:
    """MiB by which one round, after the model is there, raises the peak of a fresh process."""
    contestant = Contestant(name, our_config(settings))
    return round(peak_memory(contestant.work(kind, MEMORY_BATCH)) / 2**20, 1)


def compare_lengths(settings: Settings) -> dict[str, dict[str, dict[int, float]]]:
    """Microseconds per frame of encode and decode over T, with the same number of frames in every call."""
    config = our_config(settings)
    contestants = {name: Contestant(name, config) for name in SCALED if name in settings.models}
    works = {
        (name, kind, frames): contestant.work(kind, FRAMES_PER_CALL // frames, frames)
        for name, contestant in contestants.items()
        for kind in ("encode", "decode")
        for frames in LENGTHS
    }
    return microseconds_per_frame(works, FRAMES_PER_CALL, settings.rounds)


def compare_skeletons(settings: Settings) -> dict[str, dict[str, dict[int, float]]]:
    """Microseconds per frame over N, for named layouts; four residual levels for each token group."""
    works = {}
    for skeleton in SKELETONS:
        config = our_config(settings, "--model.skeleton", skeleton, "--model.num_quantizers", "4")
        for name in SCALED:
            if name in settings.models:
                contestant = Contestant(name, config)
                for kind in ("encode", "decode"):
                    works[name, kind, config.layout.num_keypoints] = contestant.work(kind, MEMORY_BATCH)
    return microseconds_per_frame(works, MEMORY_BATCH * FRAMES, settings.rounds)


def microseconds_per_frame(
    works: dict[tuple[str, str, int], Callable[[], object]], frames: int, rounds: int
) -> dict[str, dict[str, dict[int, float]]]:
    """{model: {kind: {size: microseconds}}} of works on `frames` frames each."""
    result: dict[str, dict[str, dict[int, float]]] = {}
    for (name, kind, size), value in measure(works, rounds).items():
        result.setdefault(name, {}).setdefault(kind, {})[size] = round(1e6 * value / frames, 2)
    return result


def compare(settings: Settings) -> dict[str, Any]:
    """The whole comparison."""
    environments = allocators()
    result: dict[str, Any] = {
        "config": settings.config,
        "threads": torch.get_num_threads(),
        "rounds": settings.rounds,
        "frames_of_a_clip": FRAMES,
        "allocators": environments,
    }
    for section, function, argument in (
        ("rates", compare_rates, settings),
        ("rvq", compare_rvq, settings.rounds),
        ("lengths", compare_lengths, settings),
        ("skeletons", compare_skeletons, settings),
    ):
        result[section] = {
            name: in_fresh_process(environment, function, argument) for name, environment in environments.items()
        }
    result["peak_mib"] = {
        name: {kind: in_fresh_process({}, memory_of, settings, name, kind) for kind in ("encode", "train")}
        for name in settings.models
    }
    return result


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    cells = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def render(result: dict[str, Any]) -> str:
    """The tables of a comparison."""
    parts = []
    for allocator, rates in result["rates"].items():
        rows = []
        for name, model in rates["models"].items():
            speeds = [
                f"{model['frames_per_second'][kind]:,} ({model['micro_batch'][kind]}; {model['gemm_share'][kind]:.0%})"
                for kind in KINDS
            ]
            memory = [f"{result['peak_mib'][name][kind]:.0f}" for kind in ("encode", "train")]
            operations = [f"{model['mflop_per_frame'][kind]:.1f}" for kind in ("encode", "forward")]
            rows.append([name, f"{model['parameters'] / 1e6:.2f}", *operations, *speeds, *memory])
        header = [
            "model",
            "M parameters",
            "MFLOP/frame encode",
            "forward",
            *KINDS,
            "peak MiB encode",
            "peak MiB train",
        ]
        parts.append(
            f"{allocator.capitalize()} allocator, {result['threads']} threads, GEMM {rates['gemm_gflops']} GFLOP/s: "
            f"frames/s (clips of {FRAMES} frames in the micro-batch; share of the GEMM rate); memory at "
            f"{MEMORY_BATCH} clips, default allocator\n\n{table(header, rows)}"
        )
    parts += [render_rvq(result), *(render_growth(result, section) for section in ("lengths", "skeletons"))]
    return "\n\n".join(parts)


def render_rvq(result: dict[str, Any]) -> str:
    """Vectors per second of the quantizers alone."""
    rows = []
    for allocator, rvq in result["rvq"].items():
        for dim, figures in rvq["dimensions"].items():
            rates, shares = figures["vectors_per_second"], figures["gemm_share"]
            row: list[object] = [allocator, dim]
            for kind in ("eval", "training"):
                ours, library = rates[f"{kind} ours"], rates[f"{kind} library"]
                row += [f"{ours:,}", f"{library:,}", f"{ours / library:.2f}"]
            rows.append([*row, f"{shares['ours']:.2f}", f"{shares['product']:.2f}"])
    header = ["allocator", "d", "eval: ours", "library", "ratio", "training: ours", "library", "ratio"]
    header += ["eval, share of GEMM", "bare products"]
    rvq = next(iter(result["rvq"].values()))
    return f"RVQ alone, {rvq['levels']} x {rvq['codes']} codes, vectors/s\n\n{table(header, rows)}"


def render_growth(result: dict[str, Any], section: str) -> str:
    """Microseconds per frame over T or over N."""
    rows = []
    for allocator, models in result[section].items():
        for name, kinds in models.items():
            rows += [[allocator, name, kind, *costs.values()] for kind, costs in kinds.items()]
            sizes = next(iter(kinds.values()))
    if section == "lengths":
        letter, what = "T", f"{FRAMES_PER_CALL} frames a call"
    else:
        letter, what = "N", f"{MEMORY_BATCH} clips of {FRAMES} frames a call"
    header = ["allocator", "model", "work", *(f"{letter} = {size}" for size in sizes)]
    return f"Microseconds per frame, {what}\n\n{table(header, rows)}"
