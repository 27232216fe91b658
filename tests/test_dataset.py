"""Pose datasets: every window is a cut of a normalised file, whoever reads it, and bad files are left out by rule."""

import json
import multiprocessing
import os
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_pose_tokenizer.augmentation import PoseAugmentation
from modeling_pose_tokenizer.dataset import PoseDataset, collate, find_files, normalise, spread_starts
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseDataError, PoseFileError, PoseSequence, write_npz, write_shard
from modeling_pose_tokenizer.preparation import make_loader
from modeling_pose_tokenizer.presets import RunConfig

N, D, L = 17, 3, 8


def make_sequence(id: str, num_frames: int, fps: float | None = 25.0, masked: tuple[int, ...] = ()) -> PoseSequence:
    generator = np.random.default_rng(sum(id.encode()))
    poses = (generator.normal(size=(num_frames, N, D)) * 50 + 300).astype(np.float32)
    poses[..., -1] = generator.uniform(0.5, 1.0, (num_frames, N))
    mask = np.ones(num_frames, dtype=bool)
    mask[list(masked)] = False
    return PoseSequence(id, poses, mask, fps)


SEQUENCES = [
    make_sequence("a", 3),
    make_sequence("b", 20, masked=(4, 5)),
    make_sequence("c", 33, fps=None),
    make_sequence("d", 41, fps=50.0, masked=(10, 11, 12, 13, 40)),
    make_sequence("e", 16, fps=24.0),
    make_sequence("f", 8),
]


@pytest.fixture
def extractor() -> PoseFeatureExtractor:
    return PoseFeatureExtractor("coco_17")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Single files, one of them in a folder, and a packed shard."""
    root = tmp_path / "data"
    (root / "train" / "deep").mkdir(parents=True)
    write_npz(root / "train" / "a.npz", SEQUENCES[0])
    write_npz(root / "train" / "deep" / "b.npz", SEQUENCES[1])
    write_shard(root / "train" / "shard.npz", SEQUENCES[2:])
    return root


@pytest.fixture
def make(root: Path, tmp_path: Path, extractor: PoseFeatureExtractor) -> Any:
    def make(kind: type[PoseDataset] = PoseDataset, **options: Any) -> PoseDataset:
        return kind(root, **{"feature_extractor": extractor, "cache_dir": tmp_path / "cache"} | options)

    return make


def assert_same_items(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_whole_sequences_are_the_normalised_files(make: Any, extractor: PoseFeatureExtractor) -> None:
    dataset = make()
    assert dataset.ids == ["a", "deep/b", "c", "d", "e", "f"] and len(dataset) == 6
    assert dataset.num_frames.tolist() == [len(sequence.poses) for sequence in SEQUENCES]
    assert dataset.fps.tolist() == [25.0, 25.0, 25.0, 50.0, 24.0, 25.0]
    assert dataset.rejected == []
    for item, length, sequence in zip(dataset, dataset.lengths, SEQUENCES, strict=True):
        poses = sequence.poses.copy()
        poses[~sequence.mask] = 0
        expected = extractor(poses, fps=sequence.fps)
        assert item["input_values"].shape == (length, N, D) and item["input_values"].dtype == np.float32
        np.testing.assert_array_equal(item["input_values"], expected["input_values"][0])
        for key in ("center", "scale", "fps", "num_frames"):
            np.testing.assert_array_equal(item[key], expected[key][0])
        if sequence.fps in (25.0, None):
            np.testing.assert_array_equal(item["padding_mask"], sequence.mask)
        assert not item["input_values"][item["padding_mask"] == 0].any()


@given(num_frames=st.integers(1, 30), fps=st.floats(5, 120), seed=st.integers(0, 99))
def test_after_resampling_a_frame_is_as_valid_as_the_nearest(num_frames: int, fps: float, seed: int) -> None:
    sequence = make_sequence("a", num_frames, fps)
    sequence.mask = np.random.default_rng(seed).random(num_frames) < 0.5
    features = normalise(PoseFeatureExtractor("coco_17"), sequence)
    for frame, valid in enumerate(features["padding_mask"]):
        time = frame * np.float32(fps) / 25.0
        if abs(time % 1 - 0.5) > 1e-3:  # else two frames are equally near
            assert valid == sequence.mask[min(round(float(time)), num_frames - 1)]
        if not valid and time <= num_frames - 1 and abs(time % 1 - 0.5) > 1e-3:
            assert not features["input_values"][frame].any()


def test_postprocess_brings_items_back(make: Any, extractor: PoseFeatureExtractor) -> None:
    dataset = make()
    batch = collate([dataset[index] for index in range(len(dataset))])
    for poses, sequence in zip(extractor.postprocess(batch["input_values"], batch), SEQUENCES, strict=True):
        assert poses.shape == sequence.poses.shape
        if sequence.fps in (25.0, None):
            np.testing.assert_allclose(poses[sequence.mask], sequence.poses[sequence.mask], atol=1e-2)


# ---- windows --------------------------------------------------------------------------------------------------------


def find_window(whole: np.ndarray, window: np.ndarray) -> list[int]:
    """First frames at which a window stands in a sequence; nothing else may be in it than padding."""
    frames = min(len(whole), len(window))
    return [
        start
        for start in range(len(whole) - frames + 1)
        if np.array_equal(whole[start : start + frames], window[:frames]) and not window[frames:].any()
    ]


def test_fixed_windows_give_each_frame_once(make: Any) -> None:
    whole, dataset = make(), make(sequence_length=L, random_windows=False)
    for id, sequence in zip(whole.ids, whole, strict=True):
        windows = [item for item in dataset if item["id"] == id]
        assert len(windows) == -(-len(sequence["input_values"]) // L)
        for key in ("input_values", "padding_mask"):
            assert all(len(window[key]) == L for window in windows)
            joined = np.concatenate([window[key] for window in windows])
            np.testing.assert_array_equal(joined[: len(sequence[key])], sequence[key])
            assert not joined[len(sequence[key]) :].any()


@pytest.mark.parametrize("epoch", [0, 7])
def test_random_windows_are_cuts_of_their_sequence(make: Any, epoch: int) -> None:
    whole, dataset = make(), make(sequence_length=L, seed=3)
    dataset.set_epoch(epoch)
    assert len(dataset) == sum(-(-length // L) for length in dataset.lengths)
    for item in dataset:
        sequence = whole[whole.ids.index(item["id"])]
        (start,) = find_window(sequence["input_values"], item["input_values"])
        mask = sequence["padding_mask"][start : start + L]
        np.testing.assert_array_equal(item["padding_mask"], np.pad(mask, (0, L - len(mask))))


def test_random_windows_depend_on_seed_epoch_and_index_alone(make: Any) -> None:
    def read(epoch: int, order: list[int], **options: Any) -> list[dict[str, Any]]:
        dataset = make(sequence_length=L, **options)
        dataset.set_epoch(epoch)
        items = {index: dataset[index] for index in order}
        return [items[index] for index in range(len(dataset))]

    count = len(make(sequence_length=L))
    base = read(1, list(range(count)))
    for one, other in zip(base, read(1, list(reversed(range(count)))), strict=True):
        assert_same_items(one, other)
    for changed in (read(2, list(range(count))), read(1, list(range(count)), seed=1)):
        same = [
            np.array_equal(one["input_values"], other["input_values"])
            for one, other in zip(base, changed, strict=True)
        ]
        assert not all(same)


@given(length=st.integers(1, 300), span=st.integers(1, 80), draws=st.lists(st.floats(0, 1, exclude_max=True)))
def test_windows_spread_over_a_sequence(length: int, span: int, draws: list[float]) -> None:
    parts = -(-length // span)
    draws = [*draws, 0.0, 0.999999999999] * parts
    starts = spread_starts(length, span, np.arange(parts), parts, np.array(draws[:parts]))
    assert (np.diff(starts) >= 0).all()
    for part, start in enumerate(starts):
        places = max(length - span, 0) + 1
        assert part * places / parts - 1 < start <= (part + 1) * places / parts and 0 <= start < places


def test_every_place_of_a_window_is_drawn(make: Any) -> None:
    dataset = make(sequence_length=L)
    whole = make()
    indices = [index for index in range(len(dataset)) if dataset[index]["id"] == "c"]
    starts = set()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        for index in indices:
            starts.update(find_window(whole[2]["input_values"], dataset[index]["input_values"]))
    assert starts == set(range(33 - L + 1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_the_same(make: Any, extractor: PoseFeatureExtractor, workers: int) -> None:
    dataset = make(sequence_length=L, augmentation=PoseAugmentation(extractor.layout))
    loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 5):  # the workers outlive the first epoch
        dataset.set_epoch(epoch)
        items = [dataset[index] for index in range(len(dataset))]
        expected = [collate(items[start : start + 4]) for start in range(0, len(items), 4)]
        for batch, other in zip(loader, expected, strict=True):
            assert batch.pop("id") == other.pop("id")
            for key, value in batch.items():
                assert torch.equal(value, other[key])


@pytest.mark.parametrize("options", [{"sequence_length": L}, {"sequence_length": L, "random_windows": False}, {}])
@pytest.mark.parametrize("augmented", [False, True])
def test_a_batch_has_the_items(
    make: Any, extractor: PoseFeatureExtractor, options: dict[str, Any], augmented: bool
) -> None:
    dataset = make(augmentation=PoseAugmentation(extractor.layout) if augmented else None, **options)
    dataset.set_epoch(3)
    indices = [5, 0, -1, 2, 2]
    items, joined = [dataset[index] for index in indices], dataset.__getitems__(indices)
    assert len(joined) == len(items)
    for one, other in zip(joined, items, strict=True):
        assert_same_items(one, other)
    one, other = collate(joined), collate(items)
    assert one.keys() == other.keys() and one["id"] == other["id"]
    for key in one.keys() - {"id"}:
        assert torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype
    one["input_values"][:] = 7  # a copy: what is read again is as before
    assert_same_items(dataset[5], items[0])
    with pytest.raises(IndexError, match=f"index is {len(dataset)}"):
        dataset.__getitems__([0, len(dataset)])


@pytest.mark.parametrize("length", [L, None])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_change_nothing_of_those_that_follow(
    make: Any, extractor: PoseFeatureExtractor, workers: int, length: int | None
) -> None:
    """What resuming in the middle of an epoch rests on, by the loaders of a training run."""

    def loader() -> Any:
        run = RunConfig()
        run.data.sequence_length, run.data.num_workers, run.training.batch_size = length, workers, 2
        dataset = make(sequence_length=length, augmentation=PoseAugmentation(extractor.layout))
        dataset.set_epoch(2)
        prepared = prepare_data_loader(
            make_loader(run, dataset, 1), put_on_device=False, use_seedable_sampler=True, data_seed=0
        )
        prepared.set_epoch(2)
        return prepared

    torch.manual_seed(0)
    whole = list(loader())
    assert len(whole) > 3
    torch.manual_seed(1)  # of the process that goes on
    rest = list(skip_first_batches(loader(), 2))
    assert [batch["id"] for batch in rest] == [batch["id"] for batch in whole[2:]]
    for batch, expected in zip(rest, whole[2:], strict=True):
        assert torch.equal(batch["input_values"], expected["input_values"])


def test_augmented_windows_keep_their_length(make: Any, extractor: PoseFeatureExtractor) -> None:
    dataset = make(sequence_length=L, augmentation=PoseAugmentation(extractor.layout, speed=0.5))
    for epoch in range(5):
        dataset.set_epoch(epoch)
        for item in dataset:
            assert item["input_values"].shape == (L, N, D) and item["padding_mask"].shape == (L,)
            if item["id"] == "c":  # long and without masked frames: the window is full at any speed
                assert item["padding_mask"].all()
    assert make(augmentation=PoseAugmentation(extractor.layout))[0]["input_values"].shape[1:] == (N, D)


def test_items_are_writable_and_do_not_share_memory(make: Any) -> None:
    for dataset in (make(), make(sequence_length=L)):
        before = dataset[1]["input_values"].copy()
        dataset[1]["input_values"][:] = 7
        np.testing.assert_array_equal(dataset[1]["input_values"], before)


def test_indices_end_where_the_data_end(make: Any) -> None:
    dataset = make()
    assert_same_items(dataset[-1], dataset[5])
    assert_same_items(dataset[np.int64(2)], dataset[2])
    for index in (6, -7):
        with pytest.raises(IndexError, match="6 items"):
            dataset[index]


def test_collate_pads_to_the_longest(make: Any) -> None:
    dataset = make()
    items = [dataset[0], dataset[1]]
    batch = collate(items)
    assert batch["id"] == ["a", "deep/b"]
    assert batch["input_values"].shape == (2, 20, N, D) and batch["padding_mask"].dtype == torch.int64
    for row, item in enumerate(items):
        length = len(item["input_values"])
        np.testing.assert_array_equal(batch["input_values"][row, :length], item["input_values"])
        assert not batch["input_values"][row, length:].any() and not batch["padding_mask"][row, length:].any()
    assert batch["num_frames"].tolist() == [3, 20] and batch["center"].shape == (2, D - 1)


# ---- the cache ------------------------------------------------------------------------------------------------------


class CountingDataset(PoseDataset):
    """Counts the files it reads."""

    reads: list[str] = []

    def load_sample(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        self.reads.append(path.name)
        return super().load_sample(path)


@pytest.fixture
def singles(root: Path) -> Path:
    (root / "train" / "shard.npz").unlink()
    CountingDataset.reads = []
    return root


def test_the_cache_is_used_until_something_changes(
    make: Any, singles: Path, monkeypatch: pytest.MonkeyPatch, extractor: PoseFeatureExtractor
) -> None:
    def reads(**options: Any) -> int:
        CountingDataset.reads.clear()
        make(CountingDataset, **options)
        return len(CountingDataset.reads)

    assert reads() == 2
    assert reads() == 0
    assert reads(sequence_length=4, seed=3, max_rejected=0.5, random_windows=False) == 0
    os.utime(singles / "train" / "a.npz", ns=(1, 1))
    assert reads() == 2 and reads() == 0
    write_npz(singles / "train" / "new.npz", make_sequence("new", 5))
    assert reads() == 3 and reads() == 0
    assert reads(feature_extractor=PoseFeatureExtractor("coco_17", sampling_rate=30.0)) == 3
    assert reads(feature_extractor=PoseFeatureExtractor("coco_17", confidence_threshold=0.6)) == 3
    monkeypatch.setattr(CountingDataset, "version", "2")
    assert reads() == 3 and reads() == 0


def test_a_saved_feature_extractor_finds_the_cache_of_the_training_run(
    make: Any, extractor: PoseFeatureExtractor, tmp_path: Path
) -> None:
    key = make(feature_extractor=extractor, fit=True)._cache_key()
    extractor.save_pretrained(tmp_path / "saved")  # which writes where its code is found
    saved = PoseFeatureExtractor.from_pretrained(tmp_path / "saved")
    assert make(feature_extractor=saved)._cache_key() == key


def test_another_load_sample_has_another_cache(make: Any, singles: Path) -> None:
    class Doubled(PoseDataset):
        def load_sample(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
            poses, mask = super().load_sample(path)
            return np.concatenate([poses, poses]), np.concatenate([mask, mask])

    assert make().lengths.tolist() == [3, 20]
    assert make(Doubled).lengths.tolist() == [6, 40]


def test_a_class_without_source_has_a_cache_of_its_own(make: Any, singles: Path) -> None:
    """As one typed into an interpreter, and then typed again with a change."""
    program = """
class Scaled(PoseDataset):
    def load_sample(self, path):
        poses, mask = super(Scaled, self).load_sample(path)
        return poses[:FRAMES], mask[:FRAMES]
"""
    for frames in (2, 3, 2):
        namespace: dict[str, Any] = {"PoseDataset": PoseDataset, "__name__": "__main__"}
        exec(program.replace("FRAMES", str(frames)), namespace)
        assert make(namespace["Scaled"]).lengths.tolist() == [frames, frames]


def test_files_that_are_read_in_parallel_come_in_order(make: Any) -> None:
    expected = make()
    found = make(num_proc=2, cache_dir=None)
    assert found.ids == expected.ids
    for one, other in zip(found, expected, strict=True):
        assert_same_items(one, other)


def open_dataset(root: Path, cache: Path, outcome: Any) -> None:
    dataset = PoseDataset(root, feature_extractor=PoseFeatureExtractor("coco_17"), cache_dir=cache, fit=True)
    outcome.put((os.getpid(), dataset.ids, float(sum(item["input_values"].sum() for item in dataset))))


def test_many_processes_may_start_at_once(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    ranks = [context.Process(target=open_dataset, args=(root, tmp_path / "cache", outcome)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [outcome.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    assert len({pid for pid, _, _ in found}) == 4
    assert all(result[1:] == found[0][1:] for result in found)
    (cache,) = (tmp_path / "cache" / "generator").glob("*/*/dataset_info.json")  # one, and nothing half-made beside it
    assert [path.name for path in cache.parent.parent.iterdir() if path.is_dir()] == [cache.parent.name]


def test_a_dataset_reaches_fresh_workers(make: Any) -> None:
    """As `DataLoader` sends it to spawned processes: the cache is opened there, the epoch is shared."""
    dataset = make(sequence_length=L)
    sent = bytes(ForkingPickler.dumps(dataset))
    assert len(sent) < 20_000 < sum(item["input_values"].nbytes for item in dataset)
    copy = pickle.loads(sent)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        for one, other in zip(copy, dataset, strict=True):
            assert_same_items(one, other)


def test_fit_measures_the_split(make: Any, extractor: PoseFeatureExtractor) -> None:
    make(fit=True)
    expected = PoseFeatureExtractor("coco_17").fit((sequence.poses, sequence.mask) for sequence in SEQUENCES)
    np.testing.assert_allclose(np.array(extractor.mean), np.array(expected.mean), atol=1e-6)
    np.testing.assert_allclose(np.array(extractor.std), np.array(expected.std), atol=1e-6)


# ---- a damaged cache ------------------------------------------------------------------------------------------------


def cut(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def zero_offsets(path: Path, content: bytes) -> None:
    path.write_bytes(content[:2000] + bytes(2000) + content[4000:])


def zero_poses(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2] + bytes(2000) + content[len(content) // 2 + 2000 :])


def delete(path: Path, content: bytes) -> None:
    path.unlink()


ARROW, INFO = "generator-train.arrow", "dataset_info.json"


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((ARROW, damage) for damage in (cut, zero_offsets, zero_poses, delete)), (INFO, cut)],
)
def test_a_damaged_cache_is_named_and_built_again(make: Any, name: str, damage: Any, tmp_path: Path) -> None:
    expected = [dict(item) for item in make()]
    (path,) = (tmp_path / "cache").rglob(name)
    damage(path, path.read_bytes())
    with pytest.warns(UserWarning, match=rf"The cache {path.parent} is damaged \(.*\); it is built again\."):
        dataset = make()
    for one, other in zip(dataset, expected, strict=True):
        assert_same_items(one, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
    assert [other.name for other in path.parent.parent.iterdir() if other.is_dir()] == [path.parent.name]


def test_building_the_cache_shows_progress(make: Any, capfd: pytest.CaptureFixture) -> None:
    make(num_proc=2)
    assert "Generating train split" in capfd.readouterr().err
    make(num_proc=2)
    assert "Generating" not in capfd.readouterr().err


# ---- other formats --------------------------------------------------------------------------------------------------


class CsvDataset(PoseDataset):
    """A line per frame, as in the documentation."""

    extensions = (".csv",)

    def load_sample(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        values = np.loadtxt(path, delimiter=",", ndmin=2)
        return values.reshape(len(values), N, D), np.ones(len(values), dtype=bool)


def test_load_sample_reads_another_format(make: Any, root: Path) -> None:
    for sequence in SEQUENCES[:3]:
        np.savetxt(
            root / "train" / f"{sequence.id}.csv", sequence.poses.reshape(len(sequence.poses), -1), delimiter=","
        )
    dataset, expected = make(CsvDataset), make()
    assert dataset.ids == ["a", "b", "c"]
    np.testing.assert_allclose(dataset[2]["input_values"], expected[2]["input_values"], atol=1e-6)
    (root / "train" / "d.csv").write_text("1,2,3\n")
    (root / "train" / "e.csv").write_text("one,two\n")
    dataset = make(CsvDataset, max_rejected=0.5)
    assert dataset.ids == ["a", "b", "c"]
    assert [Path(row["path"]).name for row in dataset.rejected] == ["d.csv", "e.csv"]
    assert all("load_sample failed (ValueError: " in row["reason"] for row in dataset.rejected)


def test_what_load_sample_returns_is_checked(make: Any, singles: Path) -> None:
    class Wrong(PoseDataset):
        def load_sample(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
            return np.ones((3, N + 1, D)), np.ones(3)

    with pytest.raises(PoseDataError, match=r"a.npz: poses have 18 keypoints, expected 17"):
        make(Wrong)


def test_load_sample_refuses_a_shard(make: Any, root: Path) -> None:
    with pytest.raises(PoseFileError, match="holds 4 sequences, expected 1"):
        make().load_sample(root / "train" / "shard.npz")


# ---- bad data -------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(root: Path) -> Path:
    """Two files of five cannot be used."""
    (root / "train" / "broken.npz").write_bytes(b"PK")
    np.savez(root / "train" / "large.npz", poses=np.ones((4, N + 1, D)))
    return root


def test_bad_files_are_left_out_and_listed(make: Any, spoilt: Path, tmp_path: Path) -> None:
    for _ in range(2):  # built, then found
        dataset = make(max_rejected=0.4)
        assert dataset.ids == ["a", "deep/b", "c", "d", "e", "f"]
        assert [Path(row["path"]).name for row in dataset.rejected] == ["broken.npz", "large.npz"]
        assert dataset.rejected[1]["reason"] == "poses have 18 keypoints, expected 17"
    dataset.write_rejected(tmp_path)
    lines = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == dataset.rejected


def test_too_many_bad_files_are_an_error(make: Any, spoilt: Path) -> None:
    for _ in range(2):
        with pytest.raises(
            PoseDataError, match=r"^2 of 5 files in .*train cannot be used, more than 1%; the first is"
        ):
            make()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_strict_stops_at_the_first(make: Any, spoilt: Path, cached: bool, num_proc: int | None) -> None:
    if cached:
        make(max_rejected=1.0)
    with pytest.raises(PoseDataError) as error:
        make(strict=True, max_rejected=1.0, num_proc=num_proc)
    assert str(error.value).startswith(f"{spoilt / 'train' / 'broken.npz'}: is not an npz file")
    assert error.value.__cause__ is None and "\n" not in str(error.value)


def test_nothing_usable_is_an_error(make: Any, spoilt: Path) -> None:
    for name in ("a.npz", "deep/b.npz", "shard.npz"):
        (spoilt / "train" / name).unlink()
    with pytest.raises(PoseDataError, match="2 of 2 files"):
        make()
    with pytest.raises(PoseDataError, match="none of the 2 files can be used"):
        make(max_rejected=1.0)


def test_missing_data_are_an_error_of_one_sentence(make: Any, root: Path, tmp_path: Path) -> None:
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("nothing here")
    (root / "empty" / ".hidden.npz").write_text("nothing here")
    cases = {
        (tmp_path / "nowhere", "train"): f"There is no data folder {tmp_path / 'nowhere'}.",
        (root, "test"): f"{root} has no folder for the split test; its folders: empty, train.",
        (root, "empty"): f"{root / 'empty'} is empty: there are no .npz files in it.",
    }
    for (folder, split), message in cases.items():
        with pytest.raises(PoseDataError) as error:
            find_files(folder, split)
        assert str(error.value) == message
    with pytest.raises(PoseDataError, match="no folder for the split val"):
        make(split="val")


def test_two_sequences_of_one_name_are_an_error(make: Any, root: Path) -> None:
    write_shard(root / "train" / "other.npz", [SEQUENCES[2]])
    with pytest.raises(PoseDataError, match="two sequences named c"):
        make()


def test_a_cache_that_cannot_be_written_is_an_error(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PoseDataError, match=f"The cache in {tmp_path / 'file' / 'cache'} cannot be written"):
        make(cache_dir=tmp_path / "file" / "cache")


def test_a_window_has_a_frame(make: Any) -> None:
    with pytest.raises(ValueError, match="sequence_length is 0"):
        make(sequence_length=0)
