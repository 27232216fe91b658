"""Every metric against a loop that follows its definition word by word, and the ways in which partial sums add up."""

import itertools
import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.metrics import (
    DISTANCE_KEYS,
    PCK_THRESHOLDS,
    SPEED_EDGES,
    ReconstructionMetrics,
    reference_scale,
)
from modeling_pose_tokenizer.skeleton_pose_tokenizer import build_skeleton, get_skeleton

NAMES = ("left_shoulder", "right_shoulder", "left_wrist", "right_wrist", "nose")
PARTS = {"body": [0, 1, 4], "left_hand": [2], "right_hand": [3]}
SKELETON = build_skeleton(NAMES, [(0, 1), (0, 2), (1, 3), (0, 4)], PARTS, [(0, 1), (2, 3)], (0, 1))
CONFIG = PoseTokenizerConfig(
    skeleton=None, keypoint_names=NAMES, edges=[(0, 1), (0, 2), (1, 3), (0, 4)], parts=PARTS, scale_pair=(0, 1),
    num_quantizers=[2, 1, 3], codebook_size=8, hidden_size=8,
)  # fmt: skip
METRIC_PATH = str(Path(__file__).parents[1] / "metrics" / "pose_reconstruction")


def close(value, expected):
    """Equal as JSON would tell them apart: `None` where nothing was counted."""
    return value is None if expected is None else value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def random_batch(seed, batch=3, frames=9, dims=3):
    """References with missing points and holes in the mask, junk under both, and predictions near them."""
    rng = np.random.default_rng(seed)
    references = rng.normal(size=(batch, frames, len(NAMES), dims)).astype(np.float32)
    references[..., -1] = rng.choice([0.0, 0.29, 0.3, 0.9, 1.0], size=references.shape[:-1])
    predictions = references + 0.1 * rng.normal(size=references.shape).astype(np.float32)
    mask = rng.random((batch, frames)) < 0.8
    references[rng.random(references.shape[:-1]) < 0.05] = np.nan
    references[~mask] = rng.choice([0.0, 1e3, np.nan])
    return predictions, references, mask, rng.uniform(1, 300, size=batch)


def mean(values):
    return sum(values) / len(values) if values else None


def oracle(predictions, references, mask, keypoints, unit):
    """The metrics of the module's table, one keypoint of one frame at a time, in Python numbers."""
    distances, squares, absolutes, velocities, accelerations = [], [], [], [], []
    for b in range(len(references)):
        length = unit[b]

        def seen(t, k, b=b):
            pose = references[b, t, k]
            return mask[b, t] and all(math.isfinite(v) for v in pose) and pose[-1] >= np.float32(0.3)

        def error(t, k, b=b):
            pair = zip(predictions[b, t, k, :-1].tolist(), references[b, t, k, :-1].tolist(), strict=True)
            return [p - r for p, r in pair]

        for k in keypoints:
            for t in range(references.shape[1]):
                if not seen(t, k):
                    continue
                now = error(t, k)
                distances.append(length * math.sqrt(sum(e * e for e in now)))
                squares += [(length * e) ** 2 for e in now]
                absolutes += [length * abs(e) for e in now]
                if t >= 1 and seen(t - 1, k):
                    before = error(t - 1, k)
                    velocities.append(length * math.dist(now, before))
                    if t >= 2 and seen(t - 2, k):
                        first = error(t - 2, k)
                        bend = [a - 2 * b + c for a, b, c in zip(now, before, first, strict=True)]
                        accelerations.append(length * math.sqrt(sum(e * e for e in bend)))
    result = {"mpjpe": mean(distances), "mse": mean(squares), "mae": mean(absolutes)}
    result["rmse"] = None if not squares else math.sqrt(mean(squares))
    result |= {f"pck@{a}": mean([d <= a for d in distances]) for a in PCK_THRESHOLDS}
    return result | {"velocity_error": mean(velocities), "acceleration_error": mean(accelerations)}


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.sampled_from([3, 4]))
def test_every_reconstruction_metric_equals_its_definition(seed, batch, frames, dims):
    predictions, references, mask, scale = random_batch(seed, batch, frames, dims)
    metrics = ReconstructionMetrics(SKELETON)
    metrics.update(predictions, references, mask, scale)
    result = metrics.compute()
    blocks = [("overall", None, range(len(NAMES)))]
    blocks += [("parts", group, keypoints) for group, keypoints in SKELETON.group_keypoints.items()]
    blocks += [("per_keypoint", name, [index]) for index, name in enumerate(NAMES)]
    for block, key, keypoints in blocks:
        found = result[block] if key is None else result[block][key]
        expected = oracle(predictions, references, mask, keypoints, np.ones(batch))
        assert found.keys() == expected.keys()
        assert all(close(found[name], expected[name]) for name in expected), (block, key)
        found = result["input_units"][block] if key is None else result["input_units"][block][key]
        expected = oracle(predictions, references, mask, keypoints, scale)
        assert set(found) == set(DISTANCE_KEYS)
        assert all(close(found[name], expected[name]) for name in DISTANCE_KEYS), (block, key)
    scored = (references[..., -1] >= np.float32(0.3)) & np.isfinite(references).all(-1) & mask[..., None]
    assert result["data"] == {
        "sequences": int(mask.any(1).sum()),
        "frames": int(mask.sum()),
        "keypoints_scored": int(scored.sum()),
    }


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 12))
def test_every_token_metric_equals_its_definition(seed, batch, steps):
    rng = np.random.default_rng(seed)
    size, codebooks = CONFIG.codebook_size, CONFIG.num_codebooks
    metrics = ReconstructionMetrics(SKELETON, CONFIG)
    seen, errors = [[] for _ in range(codebooks)], []
    for _ in range(3):
        codes = rng.integers(0, size, (batch, codebooks, steps))
        mask = rng.random((batch, steps)) < 0.7
        error = float(rng.random())
        metrics.update_codes(np.where(mask[:, None], codes, -1), mask, error)
        for b, q, s in np.ndindex(codes.shape):
            if mask[b, s]:
                seen[q].append(int(codes[b, q, s]))
        errors += [error] * int(mask.sum())
    tokens = metrics.compute()["tokens"]
    for q, codes in enumerate(seen):
        shares = [codes.count(code) / len(codes) for code in set(codes)]
        assert close(tokens["codebook_utilization"][q], len(set(codes)) / size if codes else None)
        assert close(tokens["perplexity"][q], math.exp(-sum(p * math.log(p) for p in shares)) if codes else None)
        assert metrics.code_counts[q].tolist() == [codes.count(code) for code in range(size)]
    assert close(tokens["quantization_error"], mean(errors))
    assert tokens["codebooks"] == ["body/0", "left_hand/0", "right_hand/0", "body/1", "right_hand/1", "right_hand/2"]
    # 6 codebooks of 3 bits every 4 frames, 25 frames a second, from 5 keypoints of 2 coordinates of 32 bits
    assert tokens["bits_per_frame"] == 6 * 3 / 4
    assert tokens["token_rate"] == 6 * 25 / 4
    assert tokens["bitrate"] == 6 * 3 * 25 / 4
    assert tokens["compression_ratio"] == pytest.approx(5 * 2 * 32 / 4.5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_partial_sums_merge_to_the_whole(seed, cut):
    predictions, references, mask, scale = random_batch(seed, batch=9)
    codes = np.random.default_rng(seed).integers(0, 8, (9, CONFIG.num_codebooks, 3))
    whole = ReconstructionMetrics(SKELETON, CONFIG)
    whole.update(predictions, references, mask, scale)
    whole.update_codes(codes)
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        part = ReconstructionMetrics(SKELETON, CONFIG)
        # extra padding and filler rows change nothing
        pad = [(0, 1), (0, 2)]
        padded = [
            np.pad(array[rows], [*pad, (0, 0), (0, 0)], constant_values=7.0) for array in (predictions, references)
        ]
        part.update(*padded, np.pad(mask[rows], pad), np.pad(scale[rows], (0, 1), constant_values=1.0))
        part.update_codes(codes[rows])
        parts.append(part)
    parts[0].merge(parts[1])
    merged, expected = dict(flatten("", parts[0].compute())), dict(flatten("", whole.compute()))
    assert merged.keys() == expected.keys()
    assert all(merged[k] == expected[k] or close(merged[k], expected[k]) for k in expected)


def flatten(key, value):
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in flatten(f"{key}/{k}", v)]
    if isinstance(value, list):
        return [pair for i, v in enumerate(value) for pair in flatten(f"{key}/{i}", v)]
    return [(key, value)]


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    predictions, references, mask, scale = random_batch(5, batch=5)
    rows = slice(0, 2) if rank == 0 else slice(2, None)  # uneven on purpose
    metrics = ReconstructionMetrics(SKELETON, CONFIG)
    metrics.update(predictions[rows], references[rows], mask[rows], scale[rows])
    metrics.update_codes(np.full((1, CONFIG.num_codebooks, 2), rank), quantization_error=float(rank))
    total = metrics.reduce()
    assert metrics.reduce().compute() == total.compute(), "reducing twice counts nothing twice"
    Path(folder, f"{rank}.json").write_text(json.dumps(total.compute(), allow_nan=False))
    dist.destroy_process_group()


def test_ranks_reduce_to_the_whole(tmp_path):
    # forked, since two fresh processes would import torch for longer than the rest of this file takes
    torch.multiprocessing.start_processes(rank_main, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    whole = ReconstructionMetrics(SKELETON, CONFIG)
    whole.update(*random_batch(5, batch=5))
    for rank in range(2):
        whole.update_codes(np.full((1, CONFIG.num_codebooks, 2), rank), quantization_error=float(rank))
    expected = whole.reduce().compute()  # outside of a job: the object's own figures
    assert first == second
    assert first["tokens"] == expected["tokens"] and first["data"] == expected["data"]
    assert first["overall"] == pytest.approx(expected["overall"])
    assert first["input_units"]["parts"]["left_hand"] == pytest.approx(expected["input_units"]["parts"]["left_hand"])


def test_nothing_counted_is_none_and_never_nan():
    metrics = ReconstructionMetrics(SKELETON, CONFIG)
    for _ in range(2):
        result = json.loads(json.dumps(metrics.compute(), allow_nan=False))
        assert set(result["overall"].values()) == {None}
        assert set(result["tokens"]["perplexity"]) == {None} and result["tokens"]["quantization_error"] is None
        assert result["data"]["keypoints_scored"] == 0
        poses = np.zeros((2, 4, 5, 3), dtype=np.float32)  # confidence 0: all missing
        metrics.update(poses, poses, np.ones((2, 4)), [1.0, 1.0])
    assert result["data"] == {"sequences": 2, "frames": 8, "keypoints_scored": 0}


def test_a_reconstruction_that_is_not_a_number_is_never_left_out():
    predictions, references, mask, scale = random_batch(1)
    references[..., -1], mask[:] = 1.0, True
    references = np.nan_to_num(references)
    predictions = references.copy()
    predictions[1, 4, 2, 0] = np.nan
    metrics = ReconstructionMetrics(SKELETON)
    metrics.update(predictions, references, mask, scale)
    result = json.loads(json.dumps(metrics.compute(), allow_nan=False))
    assert result["overall"]["mpjpe"] is None and result["parts"]["left_hand"]["velocity_error"] is None
    assert result["parts"]["right_hand"]["mpjpe"] == 0.0
    assert result["parts"]["left_hand"]["pck@0.2"] == pytest.approx(26 / 27)


def test_without_a_scale_only_the_figures_in_input_units_are_missing():
    predictions, references, mask, _ = random_batch(2)
    metrics = ReconstructionMetrics(SKELETON)
    metrics.update(torch.tensor(predictions), torch.tensor(references), torch.tensor(mask))
    result = metrics.compute()
    assert result["overall"]["mpjpe"] > 0
    assert set(result["input_units"]["overall"].values()) == {None}
    assert result["tokens"]["bits_per_frame"] is None and result["tokens"]["codebooks"] == []


def test_the_threshold_is_the_configurations_and_inclusive():
    poses = np.zeros((1, 1, 5, 3), dtype=np.float32)
    poses[..., -1] = 0.7  # as float32 a little less than 0.7
    metrics = ReconstructionMetrics(
        SKELETON, PoseTokenizerConfig(**(CONFIG.to_diff_dict() | {"confidence_threshold": 0.7}))
    )
    metrics.update(poses, poses)
    assert metrics.compute()["data"]["keypoints_scored"] == 5


def test_hand_error_is_over_the_keypoints_of_both_hands():
    predictions, references, mask, _ = random_batch(3)
    metrics = ReconstructionMetrics(SKELETON)
    metrics.update(predictions, references, mask)
    assert close(metrics.hand_error(), oracle(predictions, references, mask, [2, 3], np.ones(3))["mpjpe"])
    no_hands = ReconstructionMetrics(build_skeleton(NAMES, SKELETON.edges))
    no_hands.update(predictions, references, mask)
    assert close(no_hands.hand_error(), no_hands.compute()["overall"]["mpjpe"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.update(np.zeros((1, 2, 5, 3)), np.zeros((1, 2, 4, 3))), r"\(1, 2, 5, 3\).*\(1, 2, 4, 3\)"),
        (lambda m: m.update(np.zeros((1, 2, 4, 3)), np.zeros((1, 2, 4, 3))), r"expected|\(B, T, 5, D\)"),
        (lambda m: m.update(*[np.zeros((1, 2, 5, 3))] * 2, np.ones((1, 3))), r"padding_mask has the shape \(1, 3\)"),
        (lambda m: m.update(*[np.zeros((1, 2, 5, 3))] * 2, None, [1.0, 2.0]), r"scale has the shape \(2,\)"),
        (lambda m: m.update_codes(np.zeros((1, 5, 2))), r"expected \(B, 6, S\)"),
        (lambda m: m.update_codes(np.full((1, 6, 2), 8)), r"expected \[0, 8\)"),
        (lambda m: ReconstructionMetrics(SKELETON).update_codes(np.zeros((1, 6, 2))), "configuration"),
    ],
)
def test_arrays_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(ReconstructionMetrics(SKELETON, CONFIG))


def test_a_shoulder_width_is_the_median_over_frames_that_show_both_shoulders():
    poses = np.zeros((1, 4, 5, 3), dtype=np.float32)
    poses[..., -1] = 1.0
    poses[0, :, 1, 0] = [100.0, 110.0, 500.0, 120.0]
    poses[0, 2, 1, -1] = 0.1  # hidden
    assert reference_scale(poses, SKELETON).tolist() == [110.0]
    assert reference_scale(poses, SKELETON, np.array([[0, 1, 1, 1]])).tolist() == [115.0]
    with pytest.raises(ValueError, match="Sequence 0 never shows left_shoulder and right_shoulder apart"):
        reference_scale(poses * 0, SKELETON)
    with pytest.raises(ValueError, match="no scale_pair"):
        reference_scale(poses, build_skeleton(NAMES, SKELETON.edges))


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """`evaluate` copies a metric's script to its cache before importing it."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return str(tmp_path / "cache")


def test_the_evaluate_metric_loads_offline_and_measures_in_shoulder_widths(modules_cache):
    metric = evaluate.load(METRIC_PATH, cache_dir=modules_cache)
    layout = get_skeleton("coco_wholebody_133")
    rng = np.random.default_rng(0)
    references = [rng.normal(size=(frames, 133, 3)).astype(np.float32) for frames in (3, 5)]
    left, right = layout.scale_pair
    for width, poses in zip((50.0, 200.0), references, strict=True):
        poses[..., -1] = 1.0
        poses[:, left, :2], poses[:, right, :2] = 0.0, (width, 0.0)
    predictions = [poses + np.float32([3.0, 4.0, 0.0]) for poses in references]  # 5 units away
    result = metric.compute(predictions=predictions, references=references)
    assert result["input_units"]["overall"]["mpjpe"] == pytest.approx(5.0, rel=1e-5)
    assert result["overall"]["mpjpe"] == pytest.approx((3 * 5 / 50 + 5 * 5 / 200) / 8, rel=1e-5)
    assert result["data"] == {"sequences": 2, "frames": 8, "keypoints_scored": 8 * 133}
    metric.add_batch(predictions=predictions, references=references)
    given = metric.compute(scale=[1.0, 1.0])
    assert given["overall"]["mpjpe"] == pytest.approx(5.0, rel=1e-5) and "tokens" not in given


def test_errors_by_speed_are_those_of_a_plain_loop():
    config = PoseTokenizerConfig(skeleton="coco_17", sampling_rate=20.0)
    generator = np.random.default_rng(0)
    references = np.cumsum(generator.normal(0, 0.1, (3, 9, 17, 3)), 1)
    references[..., 2] = generator.random((3, 9, 17)) > 0.2
    predictions, mask = references + generator.normal(0, 0.1, references.shape), np.ones((3, 9))
    mask[1, 6:] = 0
    found = ReconstructionMetrics(config.layout, config)
    for row in range(3):
        found.update(predictions[row : row + 1], references[row : row + 1], mask[row : row + 1])
    edges = [0.0, *SPEED_EDGES, math.inf]
    for group, keypoints in config.layout.group_keypoints.items():
        cells = found.compute()["by_speed"][group]
        assert [cell["to"] for cell in cells] == [*SPEED_EDGES, None]
        for cell, start, stop in zip(cells, edges, edges[1:], strict=False):
            errors = []
            for row, frame, point in itertools.product(range(3), range(1, 9), keypoints):
                now, before = references[row, frame, point], references[row, frame - 1, point]
                speed = 20.0 * math.dist(now[:2], before[:2])
                if mask[row, frame] and now[2] and before[2] and start < speed <= stop:
                    errors.append(math.dist(now[:2], predictions[row, frame, point, :2]))
            assert cell["from"] == start and cell["count"] == len(errors)
            assert cell["mpjpe"] == (pytest.approx(np.mean(errors)) if errors else None)
