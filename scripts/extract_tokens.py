#!/usr/bin/env python
"""Encodes a split of pose data to tokens: Parquet shards that `datasets` reads, with a manifest.

python scripts/extract_tokens.py --model runs/demo/model --data runs/demo/data --split train --output runs/demo/tokens
accelerate launch --multi_gpu --num_processes 8 scripts/extract_tokens.py ...
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 8 scripts/extract_tokens.py ...   # on 8 cores

Writes OUTPUT/SPLIT-00000-of-0000n.parquet (id, codes, num_frames, fps, center, scale, text), OUTPUT/manifest.json and
OUTPUT/rejected.jsonl, the same whatever the number of processes. They may run on several machines that share OUTPUT
and the cache. A run that was killed continues where it stopped when the same command is given again.
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse

from accelerate import PartialState

from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.extraction import CPU_BATCH, GPU_BATCH, SHARD_FRAMES, TokenFolderError, extract_tokens
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or repository on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--data", required=True, help="folder that holds a folder per split")
    parser.add_argument("--split", default="train", help="which split (default: train)")
    parser.add_argument("--output", required=True, help="folder for the tokens")
    parser.add_argument(
        "--shard-frames", type=int, default=SHARD_FRAMES, help="frames per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-frames", type=int, help=f"frames per micro-batch (default: {CPU_BATCH[0]}, on a GPU {GPU_BATCH[0]})"
    )
    parser.add_argument("--beam-size", type=int, help="of the search that encodes (default: the model's own)")
    parser.add_argument("--strict", action="store_true", help="stop at the first file that cannot be used")
    parser.add_argument(
        "--max-rejected", type=float, default=0.01, help="share of files left out at most (default: 0.01)"
    )
    parser.add_argument("--cache-dir", help="where normalised poses are kept (default: the cache of `datasets`)")
    parser.add_argument("--num-proc", type=int, help="processes that read files for this cache")
    args = parser.parse_args()
    if min(number for number in (args.shard_frames, args.batch_frames, args.beam_size) if number is not None) < 1:
        parser.error("--shard-frames, --batch-frames and --beam-size expect at least 1.")
    model, feature_extractor = load_pretrained(args.model, args.revision)
    model.config.beam_size = args.beam_size or model.config.beam_size
    dataset = PoseDataset(
        args.data,
        args.split,
        feature_extractor=feature_extractor,
        strict=args.strict,
        max_rejected=args.max_rejected,
        cache_dir=args.cache_dir,
        num_proc=args.num_proc,
    )
    manifest = extract_tokens(
        model, dataset, args.output, shard_frames=args.shard_frames, batch_frames=args.batch_frames
    )
    counts = manifest["splits"][args.split]
    PartialState().print(
        f"{counts['sequences']} sequences, {counts['frames']} frames -> {counts['tokens']} tokens"
        f" in {len(counts['shards'])} shards ({counts['rejected_files']} files rejected): {args.output}"
    )


if __name__ == "__main__":
    stopped = "the shards that are complete stay; the same command goes on from there."
    run_command(main, stopped, ModelFolderError, PoseDataError, TokenFolderError)
