#!/usr/bin/env python
"""How much of the model's own encode throughput an extraction reaches, from cached data.

OMP_NUM_THREADS=2 python benchmarks/extraction.py
ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes 2 benchmarks/extraction.py

Random clips are packed, normalised and cached; the model is a preset, fitted to some of them but not trained. Rounds
of three kinds take turns, so that a change of the machine's speed meets them alike: the whole extraction (reading the
cache, encoding, text, Parquet, manifest) of one shard per process, `encode` of the same micro-batches from memory, and
`encode` of micro-batches of clips of 64 frames, which need no padding: the model at its best. Every process does its
share and waits for the others. The ratios are medians over rounds.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerModel
from modeling_pose_tokenizer.dataset import PoseDataset, collate
from modeling_pose_tokenizer.extraction import (
    batch_limits,
    extract_tokens,
    plan_batches,
    plan_shards,
    process_state,
    run_exactly,
)
from modeling_pose_tokenizer.formats import PoseSequence, write_shard
from modeling_pose_tokenizer.presets import load_run_config

CLIP_FRAMES = 64


def write_clips(folder: Path, extractor: PoseFeatureExtractor, lengths: np.ndarray) -> None:
    """Packed clips of smooth random motion."""
    generator = np.random.default_rng(0)
    shape = (extractor.num_keypoints, extractor.keypoint_dim - 1)
    person = generator.normal(300, 60, (1, *shape))
    clips = []
    for number, length in enumerate(lengths):
        points = person + generator.normal(0, 2, (length, *shape)).cumsum(0)
        poses = np.concatenate([points, np.full((length, shape[0], 1), 0.9)], -1).astype(np.float32)
        clips.append(PoseSequence(f"clip{number:06d}", poses, np.ones(length, bool), float(extractor.sampling_rate)))
    folder.mkdir(parents=True)
    write_shard(folder / "clips.npz", clips)


def pad(items: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Poses (B, T, N, D) and padding mask (B, T) of sequences, the longest first."""
    values = np.zeros((len(items), *items[0].shape), np.float32)
    mask = np.zeros(values.shape[:2], np.int64)
    for number, item in enumerate(items):
        values[number, : len(item)] = item
        mask[number, : len(item)] = 1
    return values, mask


def make_work(
    model: PoseTokenizerModel, dataset: PoseDataset, folder: Path
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> frames of all processes, and one round of this process's share."""
    state = process_state()
    limits = batch_limits(state, None)
    shard_frames = -(-int(dataset.lengths.sum()) // state.num_processes)
    own = plan_shards(dataset.lengths, shard_frames)[state.process_index :: state.num_processes]
    batches = [
        pad([dataset[int(index)]["input_values"] for index in shard[batch]])
        for shard in own
        for batch in plan_batches(dataset.lengths[shard], *limits)
    ]
    frames = int(dataset.lengths.sum())
    clips = np.concatenate([values[mask > 0] for values, mask in batches])
    clips = clips[: len(clips) // CLIP_FRAMES * CLIP_FRAMES].reshape(-1, CLIP_FRAMES, *clips.shape[1:])
    whole = [
        (piece, np.ones(piece.shape[:2], np.int64)) for piece in np.array_split(clips, -(-len(clips) // limits[1]))
    ]

    def extract() -> None:
        extract_tokens(model, dataset, folder / "tokens", shard_frames=shard_frames, progress=False)

    def encode(pieces: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for values, mask in pieces:
            run_exactly(model.encode, values, mask)
        state.wait_for_everyone()

    return {
        "extraction": (frames, extract),
        "encode_same_batches": (frames, lambda: encode(batches)),
        "encode": (clips.shape[0] * CLIP_FRAMES * state.num_processes, lambda: encode(whole)),
    }


def measure(config: str, num_clips: int, shortest: int, longest: int, rounds: int) -> dict[str, Any]:
    """Frames per second of each kind of work, and medians of the ratios of rounds."""
    datasets.disable_progress_bars()
    state = process_state()
    model_config = load_run_config(["--config", config]).model_config()
    extractor = PoseFeatureExtractor.from_config(model_config)
    (root,) = broadcast_object_list([tempfile.mkdtemp(prefix="extraction-") if state.is_main_process else None])
    folder = Path(root)
    try:
        if state.is_main_process:
            lengths = np.random.default_rng(1).integers(shortest, longest + 1, num_clips)
            write_clips(folder / "data" / "train", extractor, lengths)
        state.wait_for_everyone()
        dataset = PoseDataset(folder / "data", feature_extractor=extractor, cache_dir=folder / "cache")
        torch.manual_seed(0)
        model = PoseTokenizerModel(model_config).eval()
        model.initialize_from_data([collate([dataset[index] for index in range(min(64, len(dataset)))])])
        work = make_work(model, dataset, folder)
        rates: dict[str, list[float]] = {name: [] for name in work}
        for number in range(rounds + 1):
            for name, (frames, run) in work.items():
                if state.is_main_process:
                    shutil.rmtree(folder / "tokens", ignore_errors=True)
                state.wait_for_everyone()
                start = time.perf_counter()
                run()
                if number:  # the first round warms up
                    rates[name].append(frames / (time.perf_counter() - start))
    finally:
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(folder)

    def ratio(name: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates["extraction"], rates[name], strict=True)), 3)

    return {
        "config": config,
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
        "device": state.device.type,
        "batch": batch_limits(state, None),
        "clips": num_clips,
        "frames": int(dataset.lengths.sum()),
        "frames_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "extraction_to_encode": ratio("encode"),
        "extraction_to_encode_same_batches": ratio("encode_same_batches"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configuration/small.yaml", help="preset (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=2048, help="clips of the data (default: %(default)s)")
    parser.add_argument("--shortest", type=int, default=40, help="frames of the shortest clip (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=160, help="frames of the longest clip (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    if min(args.clips, args.rounds, args.shortest) < 1 or args.longest < max(args.shortest, CLIP_FRAMES):
        parser.error(f"expected at least one clip and round, and clips of up to {CLIP_FRAMES} frames or more.")
    result = measure(args.config, args.clips, args.shortest, args.longest, args.rounds)
    if process_state().is_main_process:
        print(json.dumps(result, indent=1))
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
