"""Small data and models for the tests of extraction, decoding and publishing."""

import runpy
import sys
from pathlib import Path

import numpy as np
import torch

from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.extraction import extract_tokens
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseSequence, write_npz, write_shard
from modeling_pose_tokenizer.hub import load_pretrained, save_checkpoint
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel

ROOT = Path(__file__).parents[1]
SHARD_FRAMES = 40  # so that a few sequences make several shards
LENGTHS = {"a": 1, "b": 33, "c": 7, "nested/d": 26, "e": 64, "f": 12}
FRAME_RATES = {"b": 30.0, "c": 12.5, "e": 24.0}


def make_sequence(name, num_frames, fps=None, seed=0):
    rng = np.random.default_rng((seed, num_frames))
    base = np.random.default_rng(1).uniform(-100, 100, (1, 17, 2)) + 300
    motion = rng.normal(0, 2, (num_frames, 17, 2)).cumsum(0)
    confidence = np.where(rng.random((num_frames, 17, 1)) < 0.1, 0.0, 0.9)
    poses = np.concatenate([base + motion, confidence], -1).astype(np.float32) * (confidence > 0)
    mask = np.ones(num_frames, dtype=bool)
    mask[num_frames // 2 + 1 :: 5] = False
    return PoseSequence(name, poses.astype(np.float32), mask, fps)


def make_model(folder, seed=0):
    torch.manual_seed(seed)
    config = PoseTokenizerConfig(
        skeleton="coco_17", hidden_size=16, joint_hidden_size=8, num_part_layers=1, codebook_size=16, codebook_dim=4
    )
    extractor = PoseFeatureExtractor.from_config(config)
    extractor.fit((s.poses, s.mask) for s in (make_sequence("x", 40, seed=n) for n in range(4)))
    model = PoseTokenizerModel(config).eval()
    inputs = extractor([make_sequence("x", 64, seed=n).poses for n in range(8)], return_tensors="pt")
    model.initialize_from_data([inputs])
    save_checkpoint(model, extractor, folder)


def make_corpus(folder):
    """A folder with two models and data, shared by the tests of a file, which write elsewhere."""
    make_model(folder / "model")
    make_model(folder / "other_model", seed=1)
    for name, length in LENGTHS.items():
        path = folder / "data" / "train" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, make_sequence(name, length, FRAME_RATES.get(name)))
    (folder / "data" / "val").mkdir()
    write_shard(folder / "data" / "val" / "packed.npz", [make_sequence(f"s{n}", n, 25.0) for n in (5, 9, 30)])
    (folder / "data" / "empty").mkdir()
    return folder


def extract(place, output, split="train", model="model", data="data", shard_frames=SHARD_FRAMES, **kwargs):
    model, extractor = load_pretrained(place / model)
    dataset = PoseDataset(
        place / data, split, feature_extractor=extractor, max_rejected=0.5, cache_dir=place / "cache"
    )
    return extract_tokens(model, dataset, output, shard_frames=shard_frames, progress=False, **kwargs)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_script(monkeypatch, name, **options):
    """Runs a command; an option's value may be a tuple of several words, or of none."""
    arguments = [name]
    for key, value in options.items():
        words = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{key.replace('_', '-')}", *map(str, words)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
