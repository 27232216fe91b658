#!/usr/bin/env python
"""Decodes tokens to pose files: one per sequence, npz or .pose.

python scripts/decode_tokens.py --model runs/demo/model --tokens runs/demo/tokens --output runs/demo/decoded
python scripts/decode_tokens.py --model runs/demo/model --tokens generated.txt --repair --output generated \\
    --format pose --canvas 1280 720 --fps 30

Rows of Parquet shards come back in the coordinates and at the frame rate of their input unless --canvas or --fps say
otherwise. A text file has the tokens of a sequence in each line; they come as FILE-000001, FILE-000002, ... by the
line, on a canvas of 512 x 512 pixels. On a canvas the shoulders are a fifth of the shorter side apart, their midpoint
half-way across and two fifths down: arms fit outstretched or raised, and the body down to the knees.
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse

from accelerate import PartialState

from modeling_pose_tokenizer.decoding import FORMATS, Canvas, decode_tokens
from modeling_pose_tokenizer.extraction import CPU_BATCH, GPU_BATCH
from modeling_pose_tokenizer.hub import load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or repository on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--tokens", required=True, help="a Parquet shard, a folder of them, or a text file")
    parser.add_argument("--split", help="of a folder, only the shards of this split")
    parser.add_argument("--repair", action="store_true", help="make the best of lines that are not well formed")
    parser.add_argument("--output", required=True, help="folder for the pose files")
    parser.add_argument("--format", choices=FORMATS, default="npz", help="of the pose files (default: npz)")
    parser.add_argument("--canvas", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="put everybody there")
    parser.add_argument("--shoulder-width", type=float, metavar="PIXELS", help="on the canvas (default: see above)")
    parser.add_argument(
        "--center", type=float, nargs=2, metavar=("X", "Y"), help="of the shoulders on the canvas (default: see above)"
    )
    parser.add_argument("--fps", type=float, help="frame rate of the pose files")
    parser.add_argument(
        "--batch-frames", type=int, help=f"frames per micro-batch (default: {CPU_BATCH[0]}, on a GPU {GPU_BATCH[0]})"
    )
    args = parser.parse_args()
    if args.batch_frames is not None and args.batch_frames < 1:
        parser.error("--batch-frames expects at least 1.")
    if args.canvas is None and (args.shoulder_width is not None or args.center is not None):
        parser.error("--shoulder-width and --center go with --canvas.")
    options = {key: getattr(args, key) for key in ("split", "format", "fps", "repair", "batch_frames")}
    if args.canvas is not None:
        width, height = args.canvas
        options["canvas"] = Canvas(width, height, args.shoulder_width, args.center)
    model, feature_extractor = load_pretrained(args.model, args.revision)
    count = decode_tokens(model, feature_extractor, args.tokens, args.output, **options)
    PartialState().print(f"{count} sequences: {args.output}")


if __name__ == "__main__":
    stopped = "the files that are there are whole; the same command decodes all again."
    run_command(main, stopped, ValueError, ImportError)  # each says in a sentence what is wrong
