"""Training runs of the smallest codec on data that the tests make themselves."""

import json
import runpy
from collections.abc import Collection
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "training" / "train.py"
N = 17
# The smallest codec there is, on one thread: sums of floats must not depend on how the machine is shared.
TINY = {
    "model.skeleton": "coco_17",
    "model.num_quantizers": 2,
    "model.hidden_size": 8,
    "model.joint_hidden_size": 4,
    "model.num_part_layers": 1,
    "model.codebook_size": 8,
    "model.codebook_dim": 4,
    "data.sequence_length": 8,
    "data.num_workers": 0,
    "training.use_amp": False,
    "training.num_threads": 1,
    "training.max_steps": 12,
    "training.batch_size": 3,
    "training.init_batches": 2,
    "training.log_every": 1,
    "training.eval_every": 4,
    "training.save_every": 3,
    "tracking.pictures": 0,
}


def write_sequences(folder: Path, count: int, seed: int, num_keypoints: int = N) -> None:
    """Points that swing about fixed places, in pixels; some are missing, the shoulders never."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    places = np.random.default_rng(0).uniform(-1, 1, (num_keypoints, 2))
    for number in range(count):
        frames = np.arange(generator.integers(6, 30))[:, None, None]
        speed, phase = generator.uniform(0.1, 0.5, (num_keypoints, 1)), generator.uniform(0, 6, (num_keypoints, 2))
        points = places + 0.3 * np.sin(frames * speed + phase)  # (T, N, 2)
        confidence = (generator.random((*points.shape[:2], 1)) > 0.05).astype(float)
        points[:, 5:7], confidence[:, 5:7] = [[-0.5, 0], [0.5, 0]], 1
        poses = np.concatenate([100 * points + 300, confidence], -1).astype(np.float32)
        np.savez(folder / f"{number:03}.npz", poses=poses, fps=25.0)


def arguments(data: Path, output: Path, **changes: object) -> list[str]:
    """Command line of a tiny run; `training__max_steps=3` changes a key."""
    values = TINY | {"data.path": data, "training.output_dir": output, "data.max_rejected": 0.1}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [
        f"--{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in values.items()
    ]


def run_script(args: list[str]) -> int:
    """`main` of the script, in this process, which keeps no accelerator of it."""
    try:
        return runpy.run_path(str(TRAIN))["main"](args)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# What depends on the machine and its other work.
MEASURED = {"train/frames_per_second", "train/data_wait", "train/memory_gib"}


def read_log(output: Path, without: Collection[str] = MEASURED) -> list[dict[str, float]]:
    lines = (output / "log.jsonl").read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in lines]


def has_reached(output: Path, step: int) -> bool:
    log = output / "log.jsonl"
    return log.exists() and f'"step": {step},' in log.read_text("utf-8")
