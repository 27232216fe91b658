"""The benchmark's protocol and its codecs without gradients: naive loops beside every count, codes that suffice."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerConfig
from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as python does for a script there

from cosine import LARGEST, CosineCoder, PairCoder, cosine_bands
from linear import BlockVQ, PredictiveVQ, TransformCoder, fill_missing, split_clip, training_windows
from protocol import Benchmark, PartErrors, batches, entropy_bits, load_benchmark

SIDES = ("left", "right")
BODY = ["nose", *(f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist") for side in SIDES)]
HANDS = {f"{side}_hand": [f"{side}_hand_{joint}" for joint in ("wrist", "thumb", "index")] for side in SIDES}
NAMES = [*BODY, "face_0", "face_1", *HANDS["left_hand"], *HANDS["right_hand"]]
SKELETON = {
    "skeleton": None,
    "keypoint_names": NAMES,
    "edges": [[0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 6], [0, 7], [7, 8], [5, 9], [6, 12]],
    "parts": {"body": list(range(7)), "face": [7, 8], "left_hand": [9, 10, 11], "right_hand": [12, 13, 14]},
    "flip_pairs": [[1, 2], [3, 4], [5, 6], [9, 12], [10, 13], [11, 14]],
    "scale_pair": [1, 2],
    "keypoint_dim": 3,
}
EXTRACTOR = PoseFeatureExtractor(**SKELETON)
LAYOUT = EXTRACTOR.layout
seeds = st.integers(0, 999)


def make_clip(frames: int, seed: int, missing: float = 0.1) -> np.ndarray:
    """A smooth random clip (T, N, 3) with missing keypoints."""
    generator = np.random.default_rng(seed)
    poses = np.ones((frames, len(NAMES), 3), np.float32)
    poses[..., :2] = 0.1 * generator.standard_normal((frames, len(NAMES), 2)).cumsum(0)
    poses[..., :2] += np.random.default_rng(0).standard_normal((len(NAMES), 2))
    poses[generator.random(poses.shape[:2]) < missing] = 0
    return poses


def make_benchmark() -> Benchmark:
    train = [make_clip(frames, seed) for seed, frames in enumerate((5, 30, 32, 33, 70, 100, 7, 64) * 3)]
    return Benchmark("test", LAYOUT, SKELETON, EXTRACTOR, train, {"val": [make_clip(50, 99), make_clip(11, 98)]})


@pytest.fixture(scope="module")
def benchmark_data() -> Benchmark:
    return make_benchmark()


# ---- data ---------------------------------------------------------------------------------------------------------


def write_clip(path: Path, keypoints: int, dim: int) -> None:
    """A clip of 9 frames in pixels; the last one is masked, and the first keypoint has too little confidence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    poses = 100 + 50 * np.random.default_rng(0).random((9, keypoints, dim)).astype(np.float32)
    poses[..., -1] = 1
    poses[:, 0, -1] = 0.2
    np.savez(path, poses=poses, mask=np.arange(9) < 8, fps=np.float32(15))


def test_signing_is_read_at_its_own_frame_rate(tmp_path: Path) -> None:
    for folder in ("webcam-signs133", "fingerspelling-wholebody133", "fingerspelled-words133"):
        for place in ("train/one", "val/isl_a_two", "val/asl_d_three"):
            write_clip(tmp_path / folder / f"{place}.npz", 133, 3)
    data = load_benchmark(tmp_path)
    assert data.layout == get_skeleton("coco_wholebody_133")
    assert list(data.val) == ["fingerspelling", "webcam_same", "webcam_new", "words"]
    assert [len(clips) for clips in data.val.values()] == [2, 1, 1, 2] and len(data.train) == 3
    clip = data.train[0]
    assert clip.shape == (9, 133, 3) and clip.dtype == np.float32
    assert not clip[8].any() and not clip[:, 0].any()
    left, right = data.layout.scale_pair
    widths = np.linalg.norm(clip[:8, left, :2] - clip[:8, right, :2], axis=-1)
    assert np.median(widths) == pytest.approx(1, abs=1e-5)
    PoseTokenizerConfig(**data.skeleton_fields)


def test_a_motion_capture_skeleton_is_read_from_its_file(tmp_path: Path) -> None:
    names = ["Hips", "LeftArm", "RightArm", "LThumb", "RThumb", "LowerBack"]
    joints = {"names": names, "edges": [[0, 5], [5, 1], [5, 2], [1, 3], [2, 4]], "dims": ["x", "y", "z", "confidence"]}
    for split in ("train", "val"):
        write_clip(tmp_path / "cmu-mocap38" / split / "a.npz", len(names), 4)
    (tmp_path / "cmu-mocap38" / "joints.json").write_text(json.dumps(joints), "utf-8")
    data = load_benchmark(tmp_path, "mocap")
    assert data.layout.flip_pairs == ((1, 2), (3, 4)) and data.layout.scale_pair == (1, 2)
    assert data.val["mocap"][0].shape == (9, 6, 4)
    assert PoseTokenizerConfig(**data.skeleton_fields).layout == data.layout


@pytest.mark.parametrize("name", ["signing", "mocap"])
def test_a_missing_folder_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(PoseDataError, match=r"There is no .* expected"):
        load_benchmark(tmp_path, name)


def test_batches_depend_on_the_seed_alone(benchmark_data: Benchmark) -> None:
    first, again, other = (list(batches(benchmark_data, 4, seed, batch_size=16)) for seed in (1, 1, 2))
    longer = list(batches(benchmark_data, 6, 1, batch_size=16))
    assert len(longer) == 6
    for one, two, three, four in zip(first, again, other, longer[:4], strict=True):
        for key in ("input_values", "padding_mask"):
            assert torch.equal(one[key], two[key]) and torch.equal(one[key], four[key])
        assert not torch.equal(one["input_values"], three["input_values"])
    assert not torch.equal(first[0]["input_values"], first[1]["input_values"])


def test_windows_shorter_than_a_batch_are_masked(benchmark_data: Benchmark) -> None:
    lengths: set[int] = set()
    for batch in batches(benchmark_data, 8, 0, batch_size=16):
        values, mask = batch["input_values"], batch["padding_mask"]
        assert values.shape == (16, 32, len(NAMES), 3) and values.dtype == torch.float32 and mask.dtype == torch.int64
        assert torch.equal(mask, mask.sort(1, descending=True)[0])  # padded on the right
        assert not values[mask == 0].any()
        assert values[mask == 1].abs().sum((-1, -2)).all()
        lengths |= set(mask.sum(1).tolist())
    assert min(lengths) < 8 and max(lengths) == 32
    windows = training_windows(benchmark_data, 8)
    assert len(windows) == 8 * 32 and {len(window) for window in windows} >= {5, 32}


def test_every_window_is_as_likely(benchmark_data: Benchmark) -> None:
    still = [np.full((frames, len(NAMES), 3), 1, np.float32) for frames in (32, 320)]
    for value, clip in enumerate(still):
        clip[..., :2] = value
    data = Benchmark("test", LAYOUT, SKELETON, EXTRACTOR, still, {})
    values = torch.cat([batch["input_values"][:, 0, 0, 0] for batch in batches(data, 40, 0)])
    assert (values.abs() > 0.5).float().mean().item() == pytest.approx(10 / 11, abs=0.03)


# ---- errors and bits ------------------------------------------------------------------------------------------------


def naive_errors(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for index in np.ndindex(*mask.shape):
        if not mask[index]:
            continue
        pose, guess = target[index], prediction[index]
        for group, keypoints in LAYOUT.group_keypoints.items():
            for keypoint in keypoints:
                if pose[keypoint, 2] > 0.3:
                    error = 100 * math.dist(guess[keypoint], pose[keypoint, :2])
                    values.setdefault(group, []).append(error)
                    values.setdefault("all", []).append(error)
                    root = keypoints[0]
                    if group.endswith("_hand") and keypoint != root and pose[root, 2] > 0.3:
                        moved = guess[keypoint] - guess[root] + pose[root, :2]
                        relative = 100 * math.dist(moved, pose[keypoint, :2])
                        values.setdefault(f"{group}_relative", []).append(relative)
    result = {key: float(np.mean(errors)) for key, errors in values.items()}
    for key, suffix in (("hands", ""), ("hands_relative", "_relative")):
        both = [f"{hand}{suffix}" for hand in HANDS]
        if all(hand in result for hand in both):
            result[key] = (result[both[0]] + result[both[1]]) / 2
    return result


@given(seeds, st.floats(0, 1), st.booleans())
def test_errors_are_those_of_a_loop(seed: int, missing: float, as_tensors: bool) -> None:
    generator = np.random.default_rng(seed)
    target = np.stack([make_clip(6, seed + row, missing) for row in range(3)])
    target[..., 2] *= generator.random(target.shape[:3]) < 0.8
    prediction = generator.standard_normal((*target.shape[:3], 2)).astype(np.float32)
    mask = generator.random(target.shape[:2]) < 0.7
    errors = PartErrors(LAYOUT)
    for row in range(3):  # in pieces, with and without a batch, with and without a confidence that is not read
        pieces = (prediction[row], target[row], mask[row])
        if row == 1:
            pieces = (np.concatenate([prediction[1:2], target[1:2, ..., 2:]], -1), target[1:2], mask[1:2])
        errors.update(*(torch.from_numpy(piece) for piece in pieces) if as_tensors else pieces)
    expected = naive_errors(prediction, target, mask)
    assert errors.compute() == pytest.approx(expected, rel=1e-5)


def test_a_hand_that_is_shifted_keeps_its_shape() -> None:
    target = make_clip(10, 0, missing=0)
    prediction = target[..., :2].copy()
    prediction[:, list(LAYOUT.group_keypoints["left_hand"])] += np.float32([0.03, 0.04])
    errors = PartErrors(LAYOUT)
    errors.update(prediction, target)
    result = errors.compute()
    assert result["left_hand"] == pytest.approx(5, abs=1e-4) and result["hands"] == pytest.approx(2.5, abs=1e-4)
    assert result["left_hand_relative"] == pytest.approx(0, abs=1e-4) and result["right_hand"] == 0


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 8))
def test_bits_are_those_of_a_loop(seed: int, sizes: list[int], hop: int) -> None:
    generator = np.random.default_rng(seed)
    train, val = (
        [np.stack([generator.integers(0, size, steps) for size in sizes]) for steps in generator.integers(1, 9, 3)]
        for _ in range(2)
    )
    bits, steps = 0.0, 0
    for clip in val:
        for step in range(clip.shape[1]):
            steps += 1
            for book, size in enumerate(sizes):
                seen = [code for other in train for code in other[book]]
                bits -= math.log2((seen.count(clip[book, step]) + 0.5) / (len(seen) + 0.5 * size))
    assert entropy_bits(train, val, sizes, hop) == pytest.approx(bits / steps / hop)


@given(st.lists(st.sampled_from([1, 2, 8, 64, 1024]), min_size=1, max_size=4), seeds)
def test_uniform_codes_cost_the_fixed_rate(sizes: list[int], seed: int) -> None:
    train = [np.stack([np.arange(1024) % size for size in sizes])]
    val = [np.stack([np.random.default_rng(seed).integers(0, size, 20) for size in sizes])]
    assert entropy_bits(train, val, sizes, 4) == pytest.approx(sum(map(math.log2, sizes)) / 4)


# ---- codecs ---------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 12), st.floats(0, 1))
def test_missing_keypoints_are_interpolated(seed: int, frames: int, missing: float) -> None:
    points, seen = split_clip(make_clip(frames, seed, missing))
    default = np.full((len(NAMES), 2), 7, np.float32)
    filled = fill_missing(points, seen, default)
    for keypoint in range(len(NAMES)):
        times = np.flatnonzero(seen[:, keypoint])
        for axis in range(2):
            known = points[times, keypoint, axis]
            expected = np.interp(np.arange(frames), times, known) if len(times) else np.full(frames, 7)
            np.testing.assert_allclose(filled[:, keypoint, axis], expected, atol=1e-5)


def error_of(points: np.ndarray, clip: np.ndarray) -> float:
    errors = PartErrors(LAYOUT)
    errors.update(points, clip)
    return errors.compute()["all"]


def check_that_bits_buy_error(coder: TransformCoder | CosineCoder, data: Benchmark) -> None:
    """The smaller the step, the more bits and the less error, down to none."""
    clip, block = data.val["val"][0], coder.hop_length
    errors, bits = [], []
    for step in (1e-4, 0.1, 0.3, 1.0, 3.0):
        coder.set_rate(step)
        points, codes = coder.encode_decode(clip)
        assert points.shape == (50, len(NAMES), 2) and codes.shape == (block * len(NAMES) * 2, -(-50 // block))
        errors.append(error_of(points, clip))
        bits.append(coder.bits_per_frame([codes]))
    assert errors[0] < 0.05
    assert errors == sorted(errors) and bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("hand_weight", [1.0, 5.0])
@pytest.mark.parametrize("block", [4, 8])
def test_transform_coding_trades_bits_for_error(benchmark_data: Benchmark, block: int, hand_weight: float) -> None:
    coder = TransformCoder(LAYOUT, block, hand_weight=hand_weight)
    coder.fit(benchmark_data.train)
    check_that_bits_buy_error(coder, benchmark_data)


@pytest.mark.parametrize("block", [3, 16])
def test_cosine_coding_trades_bits_for_error(benchmark_data: Benchmark, block: int) -> None:
    coder = CosineCoder(LAYOUT, block, hand_weight=5.0)
    coder.fit(benchmark_data.train)
    check_that_bits_buy_error(coder, benchmark_data)


@given(length=st.integers(1, 40))
def test_the_cosine_transform_is_that_of_a_loop_and_its_bands_hold_every_frequency_once(length: int) -> None:
    waves, bands = cosine_bands(length)
    for frequency in range(length):
        size = np.sqrt((1 if frequency == 0 else 2) / length)
        expected = [size * np.cos(np.pi * (frame + 0.5) * frequency / length) for frame in range(length)]
        np.testing.assert_allclose(waves[frequency], expected, atol=1e-5)
    torch.testing.assert_close(waves @ waves.T, torch.eye(length), atol=1e-5, rtol=0)
    assert [frequency for band in bands for frequency in band] == list(range(length))


def test_a_group_that_is_not_shown_costs_nothing_and_follows_the_body(benchmark_data: Benchmark) -> None:
    coder = CosineCoder(LAYOUT, 8)
    coder.fit(benchmark_data.train)
    coder.set_rate(0.05)
    clip = benchmark_data.val["val"][0].copy()
    hand = list(LAYOUT.group_keypoints["left_hand"])
    clip[:, hand, -1] = 0.0
    points, codes = coder.encode_decode(clip)
    first = 8 * 2 * hand[0]  # the groups lie one after the other
    assert not codes[first : first + 8 * 2 * len(hand)].any()
    moved = clip.copy()
    moved[..., :2] += np.linspace(0, 1, len(clip), dtype=np.float32)[:, None, None]
    shift = coder.encode_decode(moved)[0][:, hand] - points[:, hand]
    assert abs(shift[-1].mean() - shift[0].mean()) > 0.1


def test_pairs_are_the_same_integers_as_a_text(benchmark_data: Benchmark) -> None:
    coders = CosineCoder(LAYOUT, 8), PairCoder(LAYOUT, 8)
    for coder in coders:
        coder.fit(benchmark_data.train)
        coder.set_rate(0.1)
    clip = benchmark_data.val["val"][0]
    codes, same = (coder.encode_decode(clip)[1] for coder in coders)
    np.testing.assert_array_equal(same, codes)
    pairs = coders[1]
    words = pairs._words(codes)
    assert len(words) == len(LAYOUT.group_keypoints) * codes.shape[1]
    read, first = np.zeros_like(codes), np.cumsum([0, *pairs.sizes])
    tokens = 0
    for number, word in enumerate(words):
        text = pairs.pairs.encode(word).tokens
        assert "".join(text) == word
        tokens += len(text) + word.count(pairs._letter(LARGEST + 1))
        group, block = divmod(number, codes.shape[1])
        assert word[-1] == pairs._end(group)
        for place, letter in enumerate(word[:-1]):
            read[first[group] + pairs.order[group][place], block] = ord(letter) - 0x8000
    assert (abs(codes) > LARGEST).any()
    np.testing.assert_array_equal(read, np.where(abs(codes) > LARGEST, -LARGEST - 1, codes))
    assert pairs.token_bits_per_frame([codes]) == pytest.approx(tokens * 11 / (8 * codes.shape[1]))


def test_the_entropy_coder_expects_what_a_laplace_source_gives(benchmark_data: Benchmark) -> None:
    coder = TransformCoder(LAYOUT, 4, step=0.3)
    coder.fit(benchmark_data.train)
    every = torch.arange(-5000, 5001).expand(len(coder.laplace), -1)
    np.testing.assert_allclose(coder.probability(every).sum(1), 1, atol=1e-5)
    generator = np.random.default_rng(0)
    for row in (0, 10):
        source = generator.laplace(0, float(coder.laplace[row]), 100_000)
        steps = np.sign(source) * np.floor(np.abs(source) / coder.step + coder.rounding)
        for code in (-1, 0, 1, 2):
            expected = coder.probability(torch.full((len(coder.laplace), 1), code))[row, 0]
            assert (steps == code).mean() == pytest.approx(float(expected), abs=0.006)


def test_a_prefix_of_block_codes_is_a_coarser_codec(benchmark_data: Benchmark) -> None:
    torch.manual_seed(0)
    codec = BlockVQ(LAYOUT, levels=3, components=16)
    codec.fit(benchmark_data.train)
    clip = benchmark_data.train[5]
    errors, all_codes = [], codec.encode_decode(clip)[1]
    assert all_codes.shape == (3, 25)
    for codec.levels in (1, 2, 3):
        points, codes = codec.encode_decode(clip)
        np.testing.assert_array_equal(codes, all_codes[: codec.levels])
        assert len(codec.codebook_sizes) == codec.levels and points.shape == (100, len(NAMES), 2)
        errors.append(error_of(points, clip))
    assert errors == sorted(errors, reverse=True)


def test_closed_loop_codes_say_everything(benchmark_data: Benchmark) -> None:
    torch.manual_seed(0)
    codec = PredictiveVQ(LAYOUT, 5)
    codec.fit(benchmark_data.train)
    mean = np.mean([error_of(np.zeros_like(clip[..., :2]) + codec.default, clip) for clip in benchmark_data.train])
    errors = []
    for clip in [*benchmark_data.train[:6], *benchmark_data.val["val"]]:
        points, codes = codec.encode_decode(clip)
        assert codes.shape == (len(codec.codebook_sizes), -(-len(clip) // codec.hop_length))
        assert (codes.max(1) < codec.codebook_sizes).all()
        np.testing.assert_allclose(codec.decode(codes, len(clip)), points, atol=1e-5)
        errors.append(error_of(points, clip))
    assert sum(map(math.log2, codec.codebook_sizes)) / codec.hop_length == 5
    assert np.mean(errors[:6]) < 0.7 * mean


def test_mirrored_hands_have_the_same_codes(benchmark_data: Benchmark) -> None:
    torch.manual_seed(0)
    codec = PredictiveVQ(LAYOUT, 5)
    codec.fit(benchmark_data.train)
    clip = make_clip(24, 7, missing=0)
    clip[..., :2] -= clip[:, :1, :2]
    left, right = (list(LAYOUT.group_keypoints[hand]) for hand in HANDS)
    clip[:, 5, :2], clip[:, 6, :2] = 0, 0  # where a wrist lies is no matter of the hand
    clip[:, left] = clip[:, right] * np.float32([-1, 1, 1])
    hands = [stream for stream in codec.streams if stream.model == "hand"]
    none = np.zeros((24, len(NAMES), 2), np.float32)
    codes = [codec.loops["hand"].encode(codec._target(hand, clip, none)[None], torch.tensor([6]))[1] for hand in hands]
    assert torch.equal(*codes)


def test_a_layout_without_hands_is_one_loop() -> None:
    layout = get_skeleton("coco_17")
    codec = PredictiveVQ(layout, 20)
    assert [stream.model for stream in codec.streams] == ["whole"]
    assert sum(map(math.log2, codec.codebook_sizes)) / codec.hop_length == 20
