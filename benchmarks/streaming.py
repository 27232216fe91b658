#!/usr/bin/env python
"""What a streamed code step costs, beside encoding the last 64 frames anew, and how many live streams a core carries.

python benchmarks/streaming.py

The configuration is made causal; weights are random: the time does not depend on them. All kinds of work take turns in
one run on one thread; figures are medians.
"""

import argparse
import json
from collections.abc import Callable

import torch
from speed_tools import measure

from modeling_pose_tokenizer import PoseTokenizerModel, PoseTokenizerStream
from modeling_pose_tokenizer.presets import load_run_config

WINDOW = 64  # frames that would be encoded anew
FRAME_RATE = 30.0


def make_work(model: PoseTokenizerModel, streams: int) -> dict[str, Callable[[], object]]:
    """Name -> one round: a step of one stream, of `streams` in one batch, and a whole window without a stream."""
    config = model.config

    def poses(batch: int, frames: int) -> torch.Tensor:
        values = torch.randn(batch, frames, config.layout.num_keypoints, config.keypoint_dim)
        values[..., -1] = 1.0
        return values

    def step(batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
        stream, frames = PoseTokenizerStream(model), poses(batch, config.hop_length)
        codes = stream.push(frames)
        assert codes is not None
        return lambda: stream.push(frames), lambda: stream.decode(codes)

    window = poses(1, WINDOW)
    encode_one, decode_one = step(1)
    encode_many, decode_many = step(streams)
    return {
        "encode_step": encode_one,
        "decode_step": decode_one,
        "encode_window": torch.inference_mode()(lambda: model.encode(window)),
        "encode_streams": encode_many,
        "decode_streams": decode_many,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configuration/small.yaml", help="preset (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=512, help="streams of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="rounds, of which the median (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_run_config(["--config", args.config, "--model.use_causal_conv", "true"]).model_config()
    model = PoseTokenizerModel(config).eval()
    seconds = measure(make_work(model, args.streams), args.rounds)
    live = args.streams * config.hop_length / FRAME_RATE  # seconds of motion in a step of all streams
    result = {
        "config": args.config,
        "latency_frames": PoseTokenizerStream(model).latency,
        "milliseconds": {name: round(1e3 * value, 2) for name, value in seconds.items()},
        "step_of_window": round(seconds["encode_step"] / seconds["encode_window"], 3),
        "streams_per_core": {
            "encode": round(live / seconds["encode_streams"]),
            "decode": round(live / seconds["decode_streams"]),
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
