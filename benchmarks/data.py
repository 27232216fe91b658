#!/usr/bin/env python
"""How fast training windows come from the warm cache, beside reading compressed npz files.

python benchmarks/data.py

Random clips of a layout are written twice, as packed shards and as one compressed npz file each, and cached. All kinds
of work take turns in one run on one thread: batches that are read and collated; the same through `DataLoader` without
and with two workers; the same with the preset's augmentation; items that are read one by one; and batches of windows
cut from the compressed files, one file for each window, as a dataset without a cache reads them. Figures are frames
per second of the wall clock, and per second that this process had a core, which others on the machine disturb less:
medians over rounds. The cache is in memory as far as the system keeps it there.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from modeling_pose_tokenizer.augmentation import PoseAugmentation
from modeling_pose_tokenizer.dataset import PoseDataset, collate
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseSequence, write_shard

SHARD_CLIPS = 64
WORKERS = 2


def write_clips(folder: Path, extractor: PoseFeatureExtractor, clips: int, frames: int) -> list[Path]:
    """Clips of smooth random motion in shards below `folder`; returns compressed files of the same clips."""
    generator = np.random.default_rng(0)
    shape = (extractor.num_keypoints, extractor.keypoint_dim - 1)
    (folder / "data" / "train").mkdir(parents=True)
    (folder / "npz").mkdir()
    files = []
    for first in range(0, clips, SHARD_CLIPS):
        sequences = []
        for number in range(first, min(clips, first + SHARD_CLIPS)):
            points = generator.normal(300, 60, (1, *shape)) + generator.normal(0, 2, (frames, *shape)).cumsum(0)
            poses = np.concatenate([points, np.full((frames, shape[0], 1), 0.9)], -1).astype(np.float32)
            mask = np.ones(frames, bool)
            sequences.append(PoseSequence(f"{number:06d}", poses, mask, float(extractor.sampling_rate)))
            files.append(folder / "npz" / f"{number:06d}.npz")
            np.savez_compressed(files[-1], poses=poses, mask=mask)
        write_shard(folder / "data" / "train" / f"{first:06d}.npz", sequences)
    return files


def endless(loader: DataLoader) -> Iterator[Any]:
    return chain.from_iterable(repeat(loader))


def make_work(
    files: list[Path], plain: PoseDataset, augmented: PoseDataset, batch_size: int, batches: int
) -> dict[str, Callable[[], object]]:
    """Name -> one round of so many batches, in an order that is drawn anew."""
    generator = np.random.default_rng(1)
    frames = plain.sequence_length or 1

    def drawn(count: int) -> Iterator[list[int]]:
        for _ in range(batches):
            yield generator.integers(0, count, batch_size).tolist()

    def read(dataset: PoseDataset) -> None:
        for indices in drawn(len(dataset)):
            collate(dataset.__getitems__(indices))

    def load(dataset: PoseDataset, workers: int) -> Callable[[], object]:
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, collate_fn=collate, **options)
        stream = endless(loader)  # workers go on between rounds, with what they may fetch ahead
        return lambda: [len(batch["id"]) for batch in islice(stream, batches)]

    def read_items() -> None:
        for indices in drawn(len(plain)):
            collate([plain[index] for index in indices])

    def read_npz() -> None:
        for indices in islice(drawn(len(files)), max(1, batches // 16)):  # so that no round takes far longer
            items = []
            for index in indices:
                with np.load(files[index]) as arrays:
                    poses, mask = arrays["poses"], arrays["mask"]
                start = int(generator.integers(0, len(poses) - frames + 1))
                window = slice(start, start + frames)
                items.append({"input_values": poses[window], "padding_mask": mask[window].astype(np.int64)})
            collate(items)

    return {
        "batches": lambda: read(plain),
        "items": read_items,
        "loader": load(plain, 0),
        f"loader_{WORKERS}_workers": load(plain, WORKERS),
        "augmented": lambda: read(augmented),
        f"augmented_loader_{WORKERS}_workers": load(augmented, WORKERS),
        "compressed_npz": read_npz,
    }


def measure(work: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each kind of work, of the wall clock and of a core, taken in turn after a round that does not
    count."""
    passed: dict[str, list[tuple[float, float]]] = {kind: [] for kind in work}
    for number in range(rounds + 1):
        for kind, run in work.items():
            wall, core = time.perf_counter(), time.process_time()
            run()
            if number:
                passed[kind].append((time.perf_counter() - wall, time.process_time() - core))
    walls, cores = (
        {kind: statistics.median(both[clock] for both in values) for kind, values in passed.items()}
        for clock in range(2)
    )
    return walls, cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skeleton", default="coco_wholebody_133", help="layout (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=512, help="clips of the data (default: %(default)s)")
    parser.add_argument("--clip-frames", type=int, default=200, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=64, help="frames of a window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=16, help="batches of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, of which the median (default: %(default)s)")
    args = parser.parse_args()
    if min(args.clips, args.frames, args.batch_size, args.batches, args.rounds) < 1 or args.clip_frames < args.frames:
        parser.error("expected at least one clip, frame, batch and round, and clips as long as a window.")
    if args.clips * (args.clip_frames // args.frames) < args.batch_size:
        parser.error("expected at least one batch of windows.")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    extractor = PoseFeatureExtractor(args.skeleton)
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        folder = Path(name)
        files = write_clips(folder, extractor, args.clips, args.clip_frames)
        options: dict[str, Any] = {
            "feature_extractor": extractor,
            "sequence_length": args.frames,
            "cache_dir": folder / "cache",
        }
        plain = PoseDataset(folder / "data", **options)
        augmented = PoseDataset(folder / "data", augmentation=PoseAugmentation(extractor.layout), **options)
        work = make_work(files, plain, augmented, args.batch_size, args.batches)
        walls, cores = measure(work, args.rounds)
        del work  # its workers read files of the folder
    batches = dict.fromkeys(walls, args.batches) | {"compressed_npz": max(1, args.batches // 16)}
    frames = {kind: number * args.batch_size * args.frames for kind, number in batches.items()}
    rates = {kind: round(frames[kind] / seconds) for kind, seconds in walls.items()}
    bytes_per_frame = extractor.num_keypoints * extractor.keypoint_dim * 4
    result = {
        "skeleton": args.skeleton,
        "window": f"{args.batch_size} x {args.frames} x {extractor.num_keypoints} x {extractor.keypoint_dim}",
        "cache_mebibytes": round(int(plain.lengths.sum()) * bytes_per_frame / 2**20),
        "load": round(os.getloadavg()[0], 1),
        "frames_per_second": rates,
        "frames_per_core_second": {
            kind: round(frames[kind] / seconds) for kind, seconds in cores.items() if "workers" not in kind
        },
        "batches_to_compressed_npz": round(rates["batches"] / rates["compressed_npz"], 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
