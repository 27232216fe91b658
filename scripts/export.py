#!/usr/bin/env python
"""Writes a model's encoder and decoder for other runtimes, each checked against the model before it is kept.

python scripts/export.py --model runs/demo/model --format onnx --output runs/demo/onnx

Writes OUTPUT/encoder and OUTPUT/decoder as .onnx, .pt (torchscript) or .pt2 (torch_export), for any batch and length;
with --streaming also step_encoder.onnx and step_decoder.onnx, of one code step and the state between steps. All carry
layout, normalisation and rates as metadata. `modeling_pose_tokenizer.runtime` runs the ONNX files without torch.
"""

from modeling_pose_tokenizer.commands import run_command  # before all else: it answers Ctrl-C

# isort: split
import argparse

from modeling_pose_tokenizer.export import SUFFIXES, ExportError, export_model
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, or repository on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--format", choices=SUFFIXES, default="onnx", help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("--num-quantizers", type=int, metavar="L", help="residual levels (default: all of them)")
    parser.add_argument("--streaming", action="store_true", help="also single steps; ONNX of a causal model")
    args = parser.parse_args()
    model, feature_extractor = load_pretrained(args.model, args.revision)
    differences = export_model(
        model,
        feature_extractor,
        args.output,
        format=args.format,
        num_quantizers=args.num_quantizers,
        streaming=args.streaming,
    )
    for name, difference in differences.items():
        print(
            f"{name}: {difference.flipped} of {difference.codes} codes differ, values by up to {difference.values:.1e}"
        )
    print(f"{args.format}: {args.output}")


if __name__ == "__main__":
    stopped = "only files that passed their check are kept; the same command exports again."
    run_command(main, stopped, ModelFolderError, ExportError)
