#!/usr/bin/env python
"""Makes a moving picture of a pose file: the original, and with a model its reconstruction beside it and on top of it.

python scripts/animate.py --input data/test/clip.npz --model runs/demo/model --output clip.gif
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse

from modeling_pose_tokenizer.visualization import animate_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="npz file")
    parser.add_argument("--output", required=True, help=".gif, .mp4 (needs ffmpeg) or .html")
    parser.add_argument("--model", help="checkpoint folder, or repository on the Hub (default: the original alone)")
    parser.add_argument("--id", help="which sequence of a packed file (default: the first)")
    parser.add_argument("--layout", help="layout: a name or a YAML file (default: the model's, or by the keypoints)")
    parser.add_argument("--y-up", action="store_true", help="the file's y axis points up, as in motion capture")
    parser.add_argument("--turn", type=float, default=0.0, help="degrees to turn poses in 3D about the vertical")
    args = parser.parse_args()
    animate_file(args.input, args.output, args.model, args.id, args.layout, args.y_up, args.turn)
    print(args.output)


if __name__ == "__main__":
    # Each of the errors says in a sentence what is wrong with which file.
    run_command(main, "nothing was written; the same command begins again.", ValueError, RuntimeError, OSError)
