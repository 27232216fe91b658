#!/usr/bin/env python
"""Measures what a tokenizer keeps of the poses of a split, and shows it.

python scripts/evaluate.py --model runs/demo/model --data runs/demo/data --split test --output runs/demo --visualize

Writes OUTPUT/metrics.json, OUTPUT/sequences.jsonl (the error of each sequence) and, with --visualize,
OUTPUT/report/index.html, a page that opens without a network.
"""

import argparse
import sys
from pathlib import Path

from modeling_pose_tokenizer.evaluation import OutputError, evaluate_folder, format_table
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.hub import ModelFolderError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or repository on the Hub")
    parser.add_argument("--data", required=True, help="folder that holds a folder per split")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 64 frames per step (default: 8)")
    parser.add_argument("--visualize", action="store_true", help="write the report")
    parser.add_argument("--y-up", action="store_true", help="the data's y axis points up, as in motion capture")
    parser.add_argument("--device", help="where to run (default: the GPU if there is one)")
    args = parser.parse_args()
    try:
        metrics = evaluate_folder(**vars(args))
    except (ModelFolderError, PoseDataError, OutputError) as error:
        sys.exit(str(error))
    print(format_table(metrics))
    print(f"figures: {Path(args.output, 'metrics.json')}")
    if args.visualize:
        print(f"report:  {Path(args.output, 'report', 'index.html')}")


if __name__ == "__main__":
    main()
