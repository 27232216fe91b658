#!/usr/bin/env python
"""Converts trees of pose files to a data folder with train, val and test.

Reads npz, npy, .pose, OpenPose folders, MediaPipe Holistic (JSON, CSV, parquet), MMPose and rtmlib JSON, pickles of
Uni-Sign, BVH and AMC. A run that was killed goes on where it stopped when the same command is given again.

python scripts/prepare_data.py --input recordings --output data --split-by hash --split.val 0.05 --split.test 0.05
python scripts/prepare_data.py --input spoken_to_signed:assets/fingerspelling_lexicon --output data \\
    --split-by prefix --split.val csq,swl --split.test ase,psr,ssp,tsm
"""

import argparse
import sys

from modeling_pose_tokenizer.conversion import prepare_data
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, PACKAGE:PATH in a Python package")
    add("--output", required=True, metavar="DIR", help="the data folder; gets DIR/train, DIR/val, DIR/test")
    layouts = f"{', '.join(SKELETONS)}; any: what the files have"
    add("--layout", default="coco_wholebody_133", metavar="NAME", help=f"keypoints (default: %(default)s): {layouts}")
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
    add("--num-proc", type=int, metavar="COUNT", help="processes (default: one for each CPU)")
    add("--overwrite", action="store_true", help="replace the splits that the output already has")
    options = vars(parser.parse_args())
    splits = {split: what for split in ("val", "test") if (what := options.pop(f"split.{split}"))}
    if options["layout"] == "any":
        options["layout"] = None
    try:
        data = prepare_data(options.pop("input"), options.pop("output"), splits=splits, **options)
    except (ValueError, ImportError) as error:  # each says in a sentence what is wrong
        sys.exit(str(error))
    print(data.table())
    if data.rejected:
        print(f"{len(data.rejected)} files were left out: see rejected.jsonl.")


if __name__ == "__main__":
    main()
