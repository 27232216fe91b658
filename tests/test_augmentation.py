"""Augmentation: every change has its inverse or a naive loop beside it, and what is missing stays missing."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer.augmentation import PoseAugmentation, add_noise, change_speed, drop, mirror, transform
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, build_skeleton, get_skeleton

SKELETON = get_skeleton("coco_wholebody_133")
N = SKELETON.num_keypoints
OFF = dict.fromkeys(("flip", "rotation", "scale", "translation", "noise", "missing", "speed"), 0.0)

seeds = st.integers(0, 999)
lengths = st.integers(1, 12)
dims = st.sampled_from([3, 4])


def make_poses(num_frames: int, keypoint_dim: int = 3, seed: int = 0, num_keypoints: int = N) -> np.ndarray:
    """Poses of which a third of the keypoints is missing."""
    generator = np.random.default_rng(seed)
    poses = generator.normal(size=(num_frames, num_keypoints, keypoint_dim)).astype(np.float32)
    poses[..., -1] = generator.uniform(0.3, 1.0, poses.shape[:2])
    poses[generator.random(poses.shape[:2]) < 0.3] = 0
    return poses


@given(lengths, dims, seeds, st.sampled_from(sorted(SKELETONS)))
def test_the_mirror_image_of_the_mirror_image_is_the_pose(length: int, dim: int, seed: int, layout: str) -> None:
    skeleton = get_skeleton(layout)
    poses = make_poses(length, dim, seed, skeleton.num_keypoints)
    mirrored = mirror(poses, skeleton.flip_permutation)
    np.testing.assert_array_equal(mirror(mirrored, skeleton.flip_permutation), poses)
    partner = {keypoint: keypoint for keypoint in range(skeleton.num_keypoints)}
    for left, right in skeleton.flip_pairs:
        partner |= {left: right, right: left}
    for frame in range(length):
        for keypoint in range(skeleton.num_keypoints):
            x, *others = poses[frame, partner[keypoint]]
            np.testing.assert_array_equal(mirrored[frame, keypoint], [-x, *others])


@given(lengths, dims, seeds, st.floats(-180, 180), st.floats(0.5, 2), st.floats(-1, 1), st.floats(-1, 1))
def test_transform_is_a_similarity(
    length: int, dim: int, seed: int, degrees: float, scale: float, x_shift: float, y_shift: float
) -> None:
    poses = make_poses(length, dim, seed)
    moved = transform(poses, degrees, scale, (x_shift, y_shift))
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for frame in range(length):
        for keypoint in range(0, N, 7):
            x, y, *depth, confidence = poses[frame, keypoint]
            expected = [scale * (cosine * x - sine * y) + x_shift, scale * (sine * x + cosine * y) + y_shift]
            expected += [scale * z for z in depth]
            expected = [*expected, confidence] if confidence > 0 else [0.0] * dim
            np.testing.assert_allclose(moved[frame, keypoint], expected, atol=1e-5)
    back = transform(transform(moved, 0, 1, (-x_shift, -y_shift)), -degrees, 1 / scale, (0, 0))
    np.testing.assert_allclose(back, poses, atol=1e-5)


@given(lengths, seeds, st.integers(0, 12), st.integers(0, 12), st.sets(st.integers(0, N - 1)))
def test_drop_touches_nothing_else(length: int, seed: int, start: int, stop: int, keypoints: set[int]) -> None:
    poses = make_poses(length, 3, seed)
    dropped = drop(poses, sorted(keypoints), start, stop)
    for frame in range(length):
        for keypoint in range(N):
            gone = start <= frame < stop and keypoint in keypoints
            np.testing.assert_array_equal(dropped[frame, keypoint], [0, 0, 0] if gone else poses[frame, keypoint])


@given(lengths, dims, seeds, st.floats(0.4, 2.5))
def test_change_of_speed_interpolates_what_is_seen(length: int, dim: int, seed: int, speed: float) -> None:
    poses = make_poses(length, dim, seed)
    mask = np.random.default_rng(seed).random(length) < 0.7
    changed, changed_mask = change_speed(poses, mask, speed)
    assert len(changed) == len(changed_mask) == math.floor((length - 1) / speed) + 1
    for frame in range(len(changed)):
        time = frame * speed
        low = min(math.floor(time), length - 1)
        high, fraction = min(low + 1, length - 1), time - low
        if abs(fraction - 0.5) < 1e-6:  # two frames are equally near
            continue
        near = low if fraction < 0.5 else high
        assert changed_mask[frame] == mask[near]
        for keypoint in range(0, N, 7):
            one, other = poses[low, keypoint].astype(float), poses[high, keypoint].astype(float)
            both = one[-1] > 0 and other[-1] > 0
            expected = one * (1 - fraction) + other * fraction if both else poses[near, keypoint]
            np.testing.assert_allclose(changed[frame, keypoint], expected, atol=1e-5)


def test_the_same_speed_changes_nothing() -> None:
    poses, mask = make_poses(9), np.arange(9) % 3 > 0
    changed, changed_mask = change_speed(poses, mask, 1.0)
    np.testing.assert_array_equal(changed, poses)
    np.testing.assert_array_equal(changed_mask, mask)


def test_slow_and_fast_again_is_the_motion() -> None:
    poses, mask = make_poses(9), np.ones(9, dtype=bool)
    poses[..., -1] = 1
    slow, slow_mask = change_speed(poses, mask, 0.5)
    assert len(slow) == 17
    np.testing.assert_allclose(change_speed(slow, slow_mask, 2.0)[0], poses, atol=1e-6)


def test_noise_has_its_deviation() -> None:
    poses = make_poses(200)
    noise = (add_noise(poses, 0.02, np.random.default_rng(0)) - poses)[..., :-1]
    seen = poses[..., -1] > 0
    assert not noise[~seen].any()
    assert np.std(noise[seen]) == pytest.approx(0.02, rel=0.02) and abs(noise[seen].mean()) < 1e-3


# ---- drawing --------------------------------------------------------------------------------------------------------


@given(lengths, dims, seeds)
def test_what_is_missing_stays_missing(length: int, dim: int, seed: int) -> None:
    augment = PoseAugmentation(SKELETON, 0.0, 10.0, 0.2, 0.1, 0.05, missing=0.0, speed=0.0)
    poses, mask = make_poses(length, dim, seed), np.ones(length, dtype=bool)
    changed, changed_mask = augment(poses, mask, np.random.default_rng(seed))
    assert changed.dtype == np.float32 and changed_mask is mask
    np.testing.assert_array_equal(changed[..., -1], poses[..., -1])
    assert not changed[poses[..., -1] == 0].any()


@given(lengths, seeds)
def test_the_input_is_left_alone_and_the_seed_decides(length: int, seed: int) -> None:
    augment = PoseAugmentation(SKELETON, 0.5, 10.0, 0.2, 0.1, 0.05, 0.5, 0.5)
    poses, mask = make_poses(length, 3, seed), np.ones(length, dtype=bool)
    poses.setflags(write=False)  # as poses from a memory-mapped cache are
    one, other = (augment(poses, mask, np.random.default_rng(seed))[0] for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert not np.shares_memory(one, poses)
    shortest, longest = (math.floor((length - 1) / speed) + 1 for speed in (1.5, 1 / 1.5))
    assert shortest <= len(one) <= longest + 1


def test_everything_off_changes_nothing() -> None:
    poses, mask = make_poses(6), np.ones(6, dtype=bool)
    augment = PoseAugmentation(SKELETON, **OFF)
    for seed in range(5):
        changed, changed_mask = augment(poses, mask, np.random.default_rng(seed))
        np.testing.assert_array_equal(changed, poses)
        np.testing.assert_array_equal(changed_mask, mask)


def measure(name: str, value: float, statistic: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    augment = PoseAugmentation(SKELETON, **OFF | {name: value})
    poses, mask = np.ones((21, N, 3), np.float32), np.ones(21, dtype=bool)
    poses[..., 1] = 0  # every keypoint at (1, 0)
    return np.array([statistic(augment(poses, mask, np.random.default_rng(seed))[0], poses) for seed in range(400)])


def test_amounts_stay_in_their_range_and_use_it() -> None:
    angles = measure("rotation", 10.0, lambda new, _: math.degrees(math.atan2(new[0, 0, 1], new[0, 0, 0])))
    sizes = measure("scale", 0.25, lambda new, _: float(new[0, 0, 0]))
    shifts = measure("translation", 0.2, lambda new, _: float(new[0, 0, 1]))
    frames = measure("speed", 0.25, lambda new, _: float(len(new)))
    for values, least, most in (
        (angles, -10, 10),
        (sizes, 1 / 1.25, 1.25),
        (shifts, -0.2, 0.2),
        (frames, 17, 25),
    ):
        margin = 0.05 * (most - least)
        assert least - 1e-4 <= values.min() < least + margin and most - margin < values.max() <= most + 1e-4
    assert np.median(sizes) == pytest.approx(1.0, abs=0.03)  # as often smaller as larger
    assert measure("flip", 0.3, lambda new, _: float(new[0, 0, 0] < 0)).mean() == pytest.approx(0.3, abs=0.07)


def test_a_hand_goes_missing_for_a_while() -> None:
    augment = PoseAugmentation(SKELETON, **OFF | {"missing": 0.5})
    left, right = (list(SKELETON.group_keypoints[group]) for group in ("left_hand", "right_hand"))
    others = sorted(set(range(N)) - {*left, *right})
    gone: dict[bool, int] = {False: 0, True: 0}
    for seed in range(200):
        poses, _ = augment(np.ones((20, N, 3), np.float32), np.ones(20, bool), np.random.default_rng(seed))
        assert poses[:, others].all()
        for hand in (left, right):
            missing = ~poses[:, hand].any((1, 2))
            assert np.array_equal(missing, ~poses[:, hand].all((1, 2)))  # whole, or not at all
            assert missing.sum() <= 10 and np.abs(np.diff(missing.astype(int))).sum() <= 2  # one span
            gone[bool(missing.any())] += 1
    assert gone[True] == pytest.approx(200, abs=40)


def test_a_layout_without_hands_loses_parts() -> None:
    skeleton = build_skeleton([f"joint_{index}" for index in range(6)], [(index, index + 1) for index in range(5)])
    poses, _ = PoseAugmentation(skeleton, **OFF | {"missing": 1.0})(
        np.ones((4, 6, 3), np.float32), np.ones(4, bool), np.random.default_rng(0)
    )
    assert (poses[..., -1] == 0).any(0).all()
    single, _ = PoseAugmentation(skeleton, missing=1.0)(
        np.ones((1, 6, 3), np.float32), np.ones(1, bool), np.random.default_rng(0)
    )
    assert single.shape == (1, 6, 3)


@pytest.mark.parametrize("name", OFF)
def test_values_out_of_range_are_refused(name: str) -> None:
    for value in (-0.1, math.nan, *([1.1] if name in ("flip", "missing") else [])):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected 0 to"):
            PoseAugmentation(SKELETON, **{name: value})
