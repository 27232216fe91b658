#!/usr/bin/env python
"""Converts trees of pose files to a data folder with train, val and test, or says what is wrong with them.

Reads npz, npy, .pose, OpenPose folders, MediaPipe Holistic (JSON, CSV, parquet), MMPose and rtmlib JSON, pickles of
Uni-Sign, BVH and AMC. A run that was killed goes on where it stopped when the same command is given again.

python scripts/prepare_data.py --input recordings --output data --split-by hash --split.val 0.05 --split.test 0.05
python scripts/prepare_data.py --input spoken_to_signed:assets/fingerspelling_lexicon --output data \\
    --split-by prefix --split.val csq,swl --split.test ase,psr,ssp,tsm
python scripts/prepare_data.py --input recordings --check --data-report report.html

What cannot be right about the data (exchanged axes or sides, mixed units, frozen or jumping tracks, wrong frame rates)
is said on standard error, with file and frame. --check writes no data, and its exit code is 1 where it found
something; a conversion warns and goes on.
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse
import sys
from pathlib import Path
from typing import Any

from modeling_pose_tokenizer.checking import check_data
from modeling_pose_tokenizer.conversion import prepare_data
from modeling_pose_tokenizer.formats import LIMITS, Limits
from modeling_pose_tokenizer.plausibility import PlausibilityCheck
from modeling_pose_tokenizer.skeleton_files import load_skeleton
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS

# Warnings that a conversion prints; --check prints all that are kept, and the report has them too.
MOST_WARNINGS = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, PACKAGE:PATH in a Python package")
    add("--output", metavar="DIR", help="the data folder; gets DIR/train, DIR/val, DIR/test")
    add("--check", action="store_true", help="read only, and exit with 1 where something cannot be right")
    add("--data-report", metavar="FILE", help="write what was found and the distributions of the data to an HTML page")
    layouts = f"{', '.join(SKELETONS)}; a YAML file with a skeleton; any: what the files have"
    add("--layout", default="coco_wholebody_133", metavar="NAME", help=f"keypoints (default: %(default)s): {layouts}")
    add("--to-layout", metavar="NAME", help="named layout to convert to from --layout, where that is faithful")
    add("--keypoint-dim", type=int, metavar="D", help="values per keypoint that files must have, with the confidence")
    add("--fps", type=float, help="frame rate to bring sequences to (default: keep their own)")
    add("--person", type=int, metavar="NUMBER", help="of several people the one to read, from 0 (default: most seen)")
    rules = "folder (default): the train, val or test that a file is in; prefix: what its path below the input begins"
    rules += " with; hash: a share of all; or a JSON file, a mapping from splits to lists of ids"
    add("--split-by", default="folder", metavar="RULE", help=rules)
    for split in ("val", "test"):
        add(f"--split.{split}", metavar="WHAT", help="prefixes joined by commas, or a share such as 0.05")
    add("--shards", type=int, metavar="COUNT", help="pack each split into so many shards, not a file per sequence")
    add("--strict", action="store_true", help="stop at the first file that cannot be used")
    add("--max-rejected", type=float, default=0.01, metavar="SHARE", help="fail beyond it (default: %(default)s)")
    add("--max-array-bytes", type=int, default=LIMITS.array_bytes, metavar="BYTES", help="(default: %(default)s)")
    add("--max-text-bytes", type=int, default=LIMITS.text_bytes, metavar="BYTES", help="(default: %(default)s)")
    ratio = "bytes of data for each byte of a file; more is a bomb (default: %(default)g)"
    add("--max-ratio", type=float, default=LIMITS.ratio, metavar="BYTES", help=ratio)
    add("--num-proc", type=int, metavar="COUNT", help="processes (default: one for each CPU)")
    add("--overwrite", action="store_true", help="replace the splits that the output already has")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = vars(parser.parse_args())
    report, only_check = options.pop("data_report"), options.pop("check")
    if not only_check and options["output"] is None:
        parser.error("expected --output DIR, or --check")
    options["limits"] = Limits(*(options.pop(f"max_{name}") for name in ("array_bytes", "text_bytes", "ratio")))
    options["layout"] = None if options["layout"] == "any" else options["layout"]
    if only_check:
        return check(options, report)
    splits = {split: what for split in ("val", "test") if (what := options.pop(f"split.{split}"))}
    data = prepare_data(options.pop("input"), options.pop("output"), splits=splits, **options)
    write_report(data.check, report)
    print(data.table())
    for note in data.notes:
        print(note)
    if data.rejected:
        print(f"{len(data.rejected)} files were left out: see rejected.jsonl.")
    warn(data.check, MOST_WARNINGS)
    return 0


def check(options: dict[str, Any], report: str | None) -> int:
    """Reads, says what it found, and returns the exit code."""
    layout = load_skeleton(options["layout"]) if options["layout"] else None
    names = ("keypoint_dim", "person", "num_proc", "limits")
    found, rejected, unknown = check_data(options["input"], layout=layout, **{name: options[name] for name in names})
    write_report(found, report)
    for row in rejected + unknown:
        print("{path}: {reason}".format(**row), file=sys.stderr)
    warn(found, None)
    print(found.table())
    counts = f"{len(rejected)} files cannot be used, {len(unknown)} are of no known kind"
    print(f"{found.sequences} sequences, {found.frames} frames; {counts}.")
    return 1 if rejected or found.problems else 0


def write_report(check: PlausibilityCheck, path: str | None) -> None:
    """Writes the HTML page, if one was asked for."""
    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        check.write_report(path)
    except OSError as error:
        raise ValueError(f"{path}: the report cannot be written ({error.strerror}).") from None


def warn(check: PlausibilityCheck, most: int | None) -> None:
    """Says what cannot be right, a line each."""
    problems = check.problems
    for problem in problems[:most]:
        print(f"warning: {problem}", file=sys.stderr)
    if most is not None and len(problems) > most:
        print(f"{len(problems) - most} more warnings: --data-report or --check shows them.", file=sys.stderr)


if __name__ == "__main__":
    stopped = "what is converted is kept, and the same command goes on from here."
    run_command(main, stopped, ValueError, ImportError)  # each says in a sentence what is wrong
