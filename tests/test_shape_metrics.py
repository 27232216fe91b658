"""The figures of hands and motion against loops that follow their definitions, and what holds for all data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_pose_tokenizer import shape_metrics
from modeling_pose_tokenizer.metrics import ReconstructionMetrics
from modeling_pose_tokenizer.shape_metrics import MEANS, SHAPE_KEYS, ShapeMetrics, frechet_distance, hand_root
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, build_skeleton

# a body of two, a hand of a wrist with two fingers of two joints, a hand of one keypoint
NAMES = ("left_shoulder", "right_shoulder", "wrist", "a1", "a2", "b1", "b2", "stump")
EDGES = [(0, 1), (0, 2), (2, 3), (3, 4), (2, 5), (5, 6), (1, 7)]
PARTS = {"body": [0, 1], "left_hand": [2, 3, 4, 5, 6], "right_hand": [7]}
SKELETON = build_skeleton(NAMES, EDGES, PARTS, [], (0, 1))
FPS, BAND = 20.0, 3
BLOCKS = {"overall": list(range(8)), **{group: list(k) for group, k in SKELETON.group_keypoints.items()}}


def random_batch(seed, batch=2, frames=7, dims=3, names=NAMES):
    """References with missing points and holes in the mask, junk under both, and predictions near them."""
    rng = np.random.default_rng(seed)
    references = rng.normal(size=(batch, frames, len(names), dims)).astype(np.float32)
    references[..., -1] = rng.choice([0.0, 0.29, 0.3, 1.0], size=references.shape[:-1], p=[0.05, 0.05, 0.3, 0.6])
    predictions = references + 0.2 * rng.normal(size=references.shape).astype(np.float32)
    if seed % 4 == 0:
        predictions[:] = predictions[:, :, :1]  # all keypoints in one place
    mask = rng.random((batch, frames)) < 0.9
    references[rng.random(references.shape[:-1]) < 0.03] = np.nan
    references[~mask] = rng.choice([0.0, 1e3, np.nan])
    return predictions, references, mask


def measure(*arrays, skeleton=SKELETON, dims=3):
    metrics = ShapeMetrics(skeleton, dims - 1, FPS)
    metrics.update(*arrays)
    return metrics


def is_seen(pose, real):
    return real and all(math.isfinite(v) for v in pose) and pose[-1] >= np.float32(0.3)


def fit_error(p, r):
    """Distances after the best similarity: in the plane by complex numbers, in space by many tries of the rotation."""
    p0, r0 = (np.array(x) - np.mean(x, axis=0) for x in (p, r))
    spread = (p0**2).sum()
    if not spread:
        return [math.hypot(*point) for point in r0]
    if p0.shape[1] == 2:
        a, b = (x[:, 0] + 1j * x[:, 1] for x in (p0, r0))
        return np.abs((np.conj(a) * b).sum() / (np.abs(a) ** 2).sum() * a - b).tolist()
    # Horn 1987: the rotation is the eigenvector of a matrix of quaternions
    m = p0.T @ r0
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = m
    k = [
        [xx + yy + zz, yz - zy, zx - xz, xy - yx],
        [yz - zy, xx - yy - zz, xy + yx, zx + xz],
        [zx - xz, xy + yx, yy - xx - zz, yz + zy],
        [xy - yx, zx + xz, yz + zy, zz - xx - yy],
    ]
    values, vectors = np.linalg.eigh(k)
    w, x, y, z = vectors[:, -1]
    turn = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    return [math.dist(values[-1] / spread * turn @ a, b) for a, b in zip(p0, r0, strict=True)]


def warp_error(p, r, seen):
    """The cost of the best path, by trying the three ways to every pair in turn."""
    frames = [t for t in range(len(seen)) if any(seen[t])]
    best = {}
    for i, here in enumerate(frames):
        for j, there in enumerate(frames):
            if abs(i - j) > BAND:
                continue
            shared = [k for k in range(len(seen[0])) if seen[here][k] and seen[there][k]]
            cost = sum(math.dist(p[there][k], r[here][k]) for k in shared) / len(shared) if shared else math.inf
            ways = [best.get(pair, math.inf) for pair in ((i - 1, j), (i, j - 1), (i - 1, j - 1))]
            best[i, j] = cost + (0.0 if i == j == 0 else min(ways))
    count = len(frames)
    return (best[count - 1, count - 1], count) if count else (0.0, 0)


def angle(points, a, b, c):
    u, v = (np.subtract(points[y], points[x]) for x, y in ((a, b), (b, c)))
    if not u.any() or not v.any():
        return None
    return math.degrees(math.acos(max(-1.0, min(1.0, u @ v / math.sqrt((u @ u) * (v @ v))))))


def oracle(predictions, references, mask, keypoints):
    """key -> values whose mean it is, one keypoint of one frame at a time."""
    found = {key: [] for key in MEANS}
    inside = [edge for edge in EDGES if set(edge) <= set(keypoints)]
    hand = PARTS["left_hand"] if set(PARTS["left_hand"]) <= set(keypoints) else []
    total, count = 0.0, 0
    for prediction, reference, real in zip(predictions, references, mask, strict=True):
        p, r = prediction[..., :-1].astype(float), reference[..., :-1].astype(float)
        seen = [[is_seen(pose, m) for pose in frame] for frame, m in zip(reference, real, strict=True)]
        for t in range(len(r)):
            here = [k for k in keypoints if seen[t][k]]
            if len(here) > r.shape[-1]:
                found["pa_mpjpe"] += fit_error(p[t][here], r[t][here])
            if hand and seen[t][2]:
                others = [k for k in hand[1:] if seen[t][k]]
                found["wrist_relative_error"] += [math.dist(p[t][k] - p[t][2], r[t][k] - r[t][2]) for k in others]
            for a, b, c in [(2, 3, 4), (2, 5, 6)] if hand else []:
                if seen[t][a] and seen[t][b] and seen[t][c]:
                    before, after = (angle(points[t], a, b, c) for points in (r, p))
                    found["hand_angle_error"].append(abs((90.0 if after is None else after) - before))
            for a, b in inside:
                if seen[t][a] and seen[t][b]:
                    lengths = [math.dist(points[t][a], points[t][b]) for points in (p, r)]
                    found["bone_length_error"].append(abs(lengths[0] - lengths[1]))
            for k in keypoints:
                if t >= 3 and all(seen[t - back][k] for back in range(4)):
                    for key, x in (("jitter", p), ("reference_jitter", r)):
                        third = x[t][k] - 3 * x[t - 1][k] + 3 * x[t - 2][k] - x[t - 3][k]
                        found[key].append(FPS**3 * math.hypot(*third))
        cost, frames = warp_error(p[:, keypoints], r[:, keypoints], [[row[k] for k in keypoints] for row in seen])
        total, count = total + cost, count + frames
    means = {key: (sum(values) / len(values), len(values)) for key, values in found.items() if values}
    return means | ({"dtw_mje": (total / count, count)} if count else {})


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 8), st.sampled_from([3, 4]))
def test_every_figure_equals_its_definition(seed, batch, frames, dims):
    arrays = random_batch(seed, batch, frames, dims)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape_metrics, "DTW_BAND", BAND)
        metrics = measure(*arrays, dims=dims)
    means, figures = metrics.means(), metrics.compute()
    for name, keypoints in BLOCKS.items():
        expected = oracle(*arrays, keypoints)
        assert means[name].keys() == expected.keys()
        table = figures["overall"] if name == "overall" else figures["parts"][name]
        assert set(table) == set(SHAPE_KEYS)
        for key in MEANS:
            value, count = expected.get(key, (None, 0))
            assert means[name].get(key, (None, 0))[1] == count, (name, key)
            # an arc cosine, of the definition, is good to 1e-6 degrees near 0 and 180
            assert table[key] == (None if value is None else pytest.approx(value, rel=1e-6, abs=3e-6)), (name, key)
        if table["reference_jitter"]:
            assert table["jitter_ratio"] == pytest.approx(table["jitter"] / table["reference_jitter"])


def naive_frechet(first, second):
    """By the square root of the product itself, of which only the eigenvalues are needed."""
    means = [np.mean(x, axis=0) for x in (first, second)]
    spreads = [(x - m).T @ (x - m) / len(x) for x, m in zip((first, second), means, strict=True)]
    roots = np.sqrt(np.linalg.eigvals(spreads[0] @ spreads[1]).astype(complex)).real.sum()
    return ((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0]) + np.trace(spreads[1]) - 2 * roots


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 4]))
def test_the_frechet_distance_is_that_of_the_documented_features(seed, dims):
    predictions, references, mask = random_batch(seed, 2, 30, dims)
    figures = measure(predictions, references, mask, dims=dims).compute()
    for name, keypoints in BLOCKS.items():
        rows = [[], []]
        for b, t in np.ndindex(*mask.shape):
            both = [t > 0 and all(is_seen(references[b, u, k], mask[b, u]) for u in (t - 1, t)) for k in keypoints]
            if any(both):
                for row, poses in zip(rows, (references, predictions), strict=True):
                    x = poses[b, :, keypoints, :-1].astype(float)
                    cells = [[x[i, t], (x[i, t] - x[i, t - 1]) * FPS] for i in range(len(keypoints))]
                    row.append(
                        np.ravel([c if seen else np.zeros_like(c) for c, seen in zip(cells, both, strict=True)])
                    )
        table = figures["overall"] if name == "overall" else figures["parts"][name]
        assert table["frechet_distance"] == pytest.approx(naive_frechet(*map(np.array, rows)), rel=1e-3, abs=1e-3)


def test_the_frechet_distance_of_two_normal_distributions_is_known():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True)).T)  # mean 0, covariance 1
    y = 2 * x + [3.0, 0.0, 4.0]
    sums = np.stack([x.sum(0), y.sum(0)])
    products = np.stack([x.T @ x, y.T @ y])
    assert frechet_distance(1000, sums, products) == pytest.approx(25 + 3 * (2 - 1) ** 2)
    assert frechet_distance(0, 0 * sums, 0 * products) is None


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_what_each_figure_does_not_see(seed):
    rng = np.random.default_rng(seed)
    _, references, mask = random_batch(seed, 1, 9)
    references, mask = np.nan_to_num(references), np.ones_like(mask)  # all of it is seen
    references[..., -1] = 1.0
    turn = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    moved = references.copy()
    moved[..., :2] = 2.5 * references[..., :2] @ rotation + 3
    assert measure(moved, references, mask).compute()["overall"]["pa_mpjpe"] == pytest.approx(0, abs=1e-4)
    mirrored = references * np.array([-1, 1, 1], np.float32)
    assert measure(mirrored, references, mask).compute()["overall"]["pa_mpjpe"] > 0.05
    shifted = references.copy()
    shifted[..., :2] += rng.normal(size=(1, 9, 1, 2))  # another shift in every frame
    figures = measure(shifted, references, mask).compute()["overall"]
    for key in ("wrist_relative_error", "hand_angle_error", "bone_length_error"):
        assert figures[key] == pytest.approx(0, abs=0.05 if "angle" in key else 1e-5), key
    same = measure(references, references, mask).compute()["overall"]
    assert same["dtw_mje"] == 0 and same["jitter_ratio"] == 1.0
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-3)


def test_time_warping_forgives_a_delay_and_never_adds():
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(1, 44, 8, 3)), 1).astype(np.float32)
    path[..., -1] = 1.0
    reference, late = path[:, 4:], path[:, :-4].copy()
    late[:, -1], late[:, 0] = reference[:, -1], reference[:, 0]
    plain = ReconstructionMetrics(SKELETON)
    plain.update(late, reference)
    warped = measure(late, reference).compute()["overall"]["dtw_mje"]
    assert 0 < warped < 0.5 * plain.compute()["overall"]["mpjpe"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_partial_sums_merge_to_the_whole(seed, cut):
    predictions, references, mask = random_batch(seed, batch=5)
    whole = measure(predictions, references, mask).compute()
    first, second = (measure(predictions[r], references[r], mask[r]) for r in (slice(cut), slice(cut, None)))
    first.merge(second)
    assert_equal(first.reduce().compute(), whole)
    padded = [np.pad(a, [(0, 1), (0, 3), (0, 0), (0, 0)], constant_values=9.0) for a in (predictions, references)]
    assert_equal(measure(*padded, np.pad(mask, [(0, 1), (0, 3)])).compute(), whole)


def assert_equal(found, expected):
    for own, table in zip(*([x["overall"], *x["parts"].values()] for x in (found, expected)), strict=True):
        for key, value in table.items():
            tolerance = 1e-5 if key == "frechet_distance" else 1e-9
            assert own[key] == (None if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)), key


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    arrays = random_batch(5, batch=5)
    total = measure(*(array[:2] if rank == 0 else array[2:] for array in arrays)).reduce()
    Path(folder, f"{rank}.json").write_text(json.dumps(total.compute(), allow_nan=False))
    dist.destroy_process_group()


def test_ranks_reduce_to_the_whole(tmp_path):
    torch.multiprocessing.start_processes(rank_main, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert_equal(first, measure(*random_batch(5, batch=5)).compute())


def test_nothing_counted_is_none_and_a_broken_reconstruction_too():
    empty = np.zeros((2, 5, 8, 3), np.float32)  # confidence 0: all missing
    for arrays in ((), (empty, empty), (empty[:, :1], empty[:, :1])):
        metrics = ShapeMetrics(SKELETON, 2, FPS)
        if arrays:
            metrics.update(*arrays)
        figures = json.loads(json.dumps(metrics.compute(), allow_nan=False))
        assert {value for table in figures["parts"].values() for value in table.values()} == {None}
        assert set(figures["overall"].values()) == {None}
    rng = np.random.default_rng(0)
    references = rng.normal(size=(1, 9, 8, 3)).astype(np.float32)
    references[..., -1] = 1.0
    for broken in (np.nan, np.inf):
        predictions = references.copy()
        predictions[0, 4, 3, 0] = broken
        figures = json.loads(json.dumps(measure(predictions, references).compute(), allow_nan=False))
        for key in set(SHAPE_KEYS) - {"reference_jitter"}:
            assert figures["parts"]["left_hand"][key] is None and figures["overall"][key] is None, key
        assert figures["parts"]["body"]["dtw_mje"] == 0.0


def test_wrists_are_found_by_the_edges():
    for skeleton in SKELETONS.values():
        for group in skeleton.groups:
            if "hand" in group:
                assert skeleton.keypoint_names[hand_root(skeleton, group)] == f"{group}_wrist"
    assert hand_root(SKELETON, "left_hand") == 2 and hand_root(SKELETON, "right_hand") == 7
    loose = build_skeleton(NAMES, [(0, 1), (2, 3)], PARTS)
    assert hand_root(loose, "left_hand") is None
    figures = measure(*random_batch(1), skeleton=loose).compute()
    assert figures["parts"]["left_hand"]["wrist_relative_error"] is None
    no_parts = measure(*random_batch(1), skeleton=build_skeleton(NAMES, EDGES)).compute()
    assert no_parts["overall"]["hand_angle_error"] is None and no_parts["overall"]["pa_mpjpe"] > 0
