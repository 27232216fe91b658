#!/usr/bin/env python
"""Measures what a tokenizer keeps of the poses of a split, and shows it.

python scripts/evaluate.py --model runs/demo/model --data runs/demo/data --split test --output runs/demo --visualize
accelerate launch --multi_gpu --num_processes 8 scripts/evaluate.py ...
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 8 scripts/evaluate.py ...   # on 8 cores

Writes OUTPUT/metrics.json, OUTPUT/sequences.jsonl (the error of each sequence) and, with --visualize,
OUTPUT/report/index.html, a page that opens without a network, and pictures in OUTPUT/report/figures.

With several --model each has a folder OUTPUT/NAME, and OUTPUT/comparison.json compares the others with the first.
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse
from pathlib import Path

from accelerate import PartialState

from modeling_pose_tokenizer.comparison import ComparisonError, compare, format_comparison, name_paths
from modeling_pose_tokenizer.evaluation import OutputError, evaluate_folder, format_table
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.hub import ModelFolderError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="checkpoint folder, or repository on the Hub; give it again to compare",
    )
    parser.add_argument("--data", required=True, help="folder that holds a folder per split")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 64 frames per step (default: 8)")
    parser.add_argument("--visualize", action="store_true", help="write the report")
    parser.add_argument("--sequences", type=int, default=5, help="how many the report shows (default: 5)")
    parser.add_argument("--y-up", action="store_true", help="the data's y axis points up, as in motion capture")
    parser.add_argument("--device", help="where to run (default: the GPU if there is one)")
    parser.add_argument("--beam-size", type=int, help="of the search that encodes (default: the model's own)")
    args = parser.parse_args()
    if args.batch_size < 1 or args.sequences < 1 or (args.beam_size is not None and args.beam_size < 1):
        parser.error("--batch-size, --sequences and --beam-size expect at least 1.")
    options = vars(args)
    models, output = options.pop("model"), Path(options.pop("output"))
    folders = [output / name for name in name_paths(models)] if len(models) > 1 else [output]
    for model, folder in zip(models, folders, strict=True):
        evaluate(model, folder, options)
    if len(models) > 1 and PartialState().is_main_process:
        comparison = compare([folder / "metrics.json" for folder in folders])
        comparison.write(output / "comparison.json")
        print(f"{format_comparison(comparison)}\nfigures: {output / 'comparison.json'}")


def evaluate(model: str, folder: Path, options: dict) -> None:
    metrics = evaluate_folder(model, output=folder, **options)
    say = PartialState().print  # of several processes the first one
    say(format_table(metrics))
    say(f"figures: {folder / 'metrics.json'}")
    if options["visualize"]:
        say(f"report:  {folder / 'report' / 'index.html'}")


if __name__ == "__main__":
    stopped = "metrics.json is written last; the same command measures again."
    run_command(main, stopped, ModelFolderError, PoseDataError, OutputError, ComparisonError)
