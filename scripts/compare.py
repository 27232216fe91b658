#!/usr/bin/env python
"""Compares evaluations of the same sequences, by part and metric, with confidence intervals of the differences.

python scripts/compare.py runs/a/metrics.json runs/b/metrics.json --output runs/comparison.json

Reads sequences.jsonl beside each metrics.json (evaluate.py writes both). The first is what the others are compared
with. `evaluate.py --model A --model B` does both steps.
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse
import sys

from modeling_pose_tokenizer.comparison import CONFIDENCE, RESAMPLES, ComparisonError, compare, format_comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="+", help="metrics.json of an evaluation, or its folder")
    parser.add_argument("--output", default="comparison.json", help="file for the figures (default: %(default)s)")
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help="draws for the intervals (default: %(default)s)"
    )
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="of the intervals (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    args = parser.parse_args()
    if args.resamples < 1 or not 0 < args.confidence < 1 or args.seed < 0:
        parser.error("--resamples expects at least 1, --confidence a number between 0 and 1, --seed at least 0.")
    comparison = compare(args.metrics, args.resamples, args.seed, args.confidence)
    try:
        comparison.write(args.output)
    except OSError as error:
        sys.exit(f"{args.output}: cannot be written ({error.strerror or error}); give a file you may write.")
    print(format_comparison(comparison))
    print(f"figures: {args.output}")


if __name__ == "__main__":
    run_command(main, "nothing was written; the same command compares again.", ComparisonError)
