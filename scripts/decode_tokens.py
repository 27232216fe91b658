#!/usr/bin/env python
"""Decodes tokens to pose files: one npz per sequence, in the coordinates and at the frame rate of its input.

python scripts/decode_tokens.py --model runs/demo/model --tokens runs/demo/tokens --output runs/demo/decoded
"""

import argparse
import sys

from accelerate import PartialState

from modeling_pose_tokenizer.extraction import TokenFolderError, decode_tokens
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or repository on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--tokens", required=True, help="a Parquet shard, or a folder of them")
    parser.add_argument("--output", required=True, help="folder for the npz files")
    parser.add_argument("--batch-frames", type=int, help="frames of a micro-batch (default: 512, on a GPU 32768)")
    args = parser.parse_args()
    if args.batch_frames is not None and args.batch_frames < 1:
        parser.error("--batch-frames expects at least 1.")
    try:
        model, feature_extractor = load_pretrained(args.model, args.revision)
        count = decode_tokens(model, feature_extractor, args.tokens, args.output, batch_frames=args.batch_frames)
    except (ModelFolderError, TokenFolderError) as error:
        sys.exit(str(error))
    PartialState().print(f"{count} sequences: {args.output}")


if __name__ == "__main__":
    main()
