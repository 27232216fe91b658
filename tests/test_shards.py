"""Streams of shards, from a folder or the Hub: the items of the dataset, shared by ranks and workers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hub_server import HubServer, Repository
from modeling_pose_tokenizer.dataset import PoseDataset, collate
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseDataError, write_shard
from modeling_pose_tokenizer.shards import PoseStream
from test_dataset import D, L, N, assert_same_items, make_sequence

ROOT = Path(__file__).parents[1]


@pytest.fixture
def extractor() -> PoseFeatureExtractor:
    return PoseFeatureExtractor("coco_17")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of three sequences."""
    (tmp_path / "shards" / "train").mkdir(parents=True)
    for shard in range(4):
        sequences = [make_sequence(f"{shard}.{number}", 5 + 3 * shard + number, 30.0) for number in range(3)]
        write_shard(tmp_path / "shards" / "train" / f"{shard}.npz", sequences)
    return tmp_path / "shards"


def by_id(items: Any) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        found.setdefault(item["id"], []).append(item)
    return found


@pytest.mark.parametrize("length", [None, L])
def test_a_stream_has_the_items_of_the_dataset(
    shards: Path, tmp_path: Path, extractor: PoseFeatureExtractor, length: int | None
) -> None:
    options = {"feature_extractor": extractor, "sequence_length": length, "random_windows": False}
    dataset = PoseDataset(shards, cache_dir=tmp_path / "cache", **options)
    for found, expected in zip(PoseStream(shards, **options), dataset, strict=True):
        assert_same_items({key: found[key] for key in expected}, expected)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0)])
def test_ranks_and_workers_share_a_stream(
    shards: Path, extractor: PoseFeatureExtractor, world_size: int, workers: int
) -> None:
    options = {"feature_extractor": extractor, "sequence_length": L, "seed": 1}
    expected = by_id(PoseStream(shards, **options))
    found: dict[str, list[dict[str, Any]]] = {}
    windows = 0
    for rank in range(world_size):
        stream = PoseStream(shards, rank=rank, world_size=world_size, **options)
        for batch in DataLoader(stream, 2, collate_fn=collate, num_workers=workers):
            windows += len(batch["id"])
            for row, id in enumerate(batch["id"]):
                found.setdefault(id, []).append(batch["input_values"][row].numpy())
    assert windows == sum(map(len, expected.values())) and found.keys() == expected.keys()
    for id, items in expected.items():  # the very same windows, however many processes read them
        ours, theirs = ({window.tobytes() for window in found[id]}, {item["input_values"].tobytes() for item in items})
        assert ours == theirs


def test_a_stream_is_shuffled_by_seed_and_epoch(shards: Path, extractor: PoseFeatureExtractor) -> None:
    def read(epoch: int, **options: Any) -> list[dict[str, Any]]:
        stream = PoseStream(shards, feature_extractor=extractor, **options)
        stream.set_epoch(epoch)
        return list(stream)

    def ids(epoch: int = 0, **options: Any) -> list[str]:
        return [item["id"] for item in read(epoch, **options)]

    plain = ids()
    shuffled = ids(shuffle_buffer=4)
    assert plain == sorted(plain) != shuffled and sorted(shuffled) == plain
    assert shuffled == ids(shuffle_buffer=4)
    assert shuffled != ids(shuffle_buffer=4, epoch=1) and shuffled != ids(shuffle_buffer=4, seed=1)
    windows = [
        b"".join(item["input_values"].tobytes() for item in read(epoch, sequence_length=4)) for epoch in (0, 0, 1)
    ]
    assert windows[0] == windows[1] != windows[2]


def test_a_stream_comes_from_the_hub(shards: Path, tmp_path: Path, extractor: PoseFeatureExtractor) -> None:
    program = """
import sys
from torch.utils.data import DataLoader
from modeling_pose_tokenizer.dataset import collate
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.shards import PoseStream
options = {"feature_extractor": PoseFeatureExtractor("coco_17"), "sequence_length": 8, "random_windows": False}
stream = PoseStream("hf://datasets/someone/signs", **options)
for batch in DataLoader(stream, 3, collate_fn=collate, num_workers=int(sys.argv[1])):
    for id, values in zip(batch["id"], batch["input_values"]):
        print(id, values.double().sum().item())
for root, split in (("hf://datasets/someone/nothing", "train"), ("hf://datasets/someone/signs", "val")):
    try:
        PoseStream(root, split, **options)
    except PoseDataError as error:
        print(error)
"""
    with HubServer() as hub:
        files = {f"train/{path.name}": path.read_bytes() for path in (shards / "train").iterdir()}
        hub.repositories["datasets", "someone/signs"] = Repository(branches={"main": files})
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", program, "2"]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr
    *items, nothing, val = done.stdout.splitlines()
    options = {"feature_extractor": extractor, "sequence_length": L, "random_windows": False}
    expected = [
        f"{item['id']} {item['input_values'].astype(np.float64).sum().item()}"
        for item in PoseStream(shards, **options)
    ]
    assert sorted(line.split()[0] for line in items) == sorted(line.split()[0] for line in expected)
    np.testing.assert_allclose(
        sorted(float(line.split()[1]) for line in items),
        sorted(float(line.split()[1]) for line in expected),
        atol=1e-4,
    )
    assert nothing.startswith("hf://datasets/someone/nothing/train cannot be read (") and "\n" not in nothing
    assert val.startswith("hf://datasets/someone/signs/val ")


def test_a_stream_leaves_bad_files_out_by_the_same_rule(shards: Path, extractor: PoseFeatureExtractor) -> None:
    np.savez(shards / "train" / "large.npz", poses=np.ones((4, N + 1, D)))
    with pytest.raises(PoseDataError, match=r"1 of 5 files .* more than 1%"):
        PoseStream(shards, feature_extractor=extractor)
    with pytest.raises(PoseDataError, match=r"large.npz: poses have 18 keypoints, expected 17\."):
        PoseStream(shards, feature_extractor=extractor, strict=True)
    assert len(list(PoseStream(shards, feature_extractor=extractor, max_rejected=0.2))) == 12
    with pytest.raises(PoseDataError, match="no folder for the split val"):
        PoseStream(shards, "val", feature_extractor=extractor)
