"""Layouts become each other by the names of their keypoints, and say what is approximate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer.formats import PoseDataError
from modeling_pose_tokenizer.layout_conversion import find_conversion, is_convertible
from modeling_pose_tokenizer.pose_files import IBUG_MESH_POINTS
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, get_skeleton

PAIRS = [(a, b) for a in SKELETONS for b in SKELETONS if a != b and is_convertible(a, b)]


def test_what_converts_to_what() -> None:
    assert {("mediapipe_holistic_543", name) for name in ("coco_wholebody_133", "unisign_69")} <= set(PAIRS)
    assert {("mediapipe_holistic_178", name) for name in ("coco_wholebody_133", "unisign_69")} <= set(PAIRS)
    with pytest.raises(PoseDataError, match=r"^coco_17 does not convert to unisign_69: only 0 of 18 keypoints"):
        find_conversion("coco_17", "unisign_69")
    with pytest.raises(PoseDataError, match="it converts to: openpose_137, phoenix_50, coco_17, unisign_69"):
        find_conversion("coco_wholebody_133", "mediapipe_holistic_543")
    assert all(not is_convertible(source, "mediapipe_holistic_543") for source in SKELETONS if "543" not in source)


@given(st.sampled_from(PAIRS), st.integers(1, 4), st.integers(3, 4), st.integers(0, 2**16))
def test_keypoints_of_the_same_name_stay_where_they_are(pair: tuple[str, str], T: int, D: int, seed: int) -> None:
    source, target = map(get_skeleton, pair)
    generator = np.random.default_rng(seed)
    poses = generator.uniform(0.1, 1, (T, source.num_keypoints, D)).astype(np.float32)
    poses[generator.random(poses.shape[:2]) < 0.2] = 0
    conversion = find_conversion(*pair)
    converted = conversion(poses)
    assert converted.shape == (T, target.num_keypoints, D) and converted.dtype == np.float32
    place = {name: number for number, name in enumerate(source.keypoint_names)}
    approximate = " ".join(conversion.notes)
    mesh = [name.startswith("mediapipe") for name in pair]
    for number, name in enumerate(target.keypoint_names):
        if name.startswith("face_") and mesh[0] and not mesh[1] and int(name[5:]) < 68:
            expected = place.get(f"face_{IBUG_MESH_POINTS[int(name[5:])]}")
        elif name.startswith("face_") and mesh[0] != mesh[1]:
            expected = None
        else:
            expected = place.get(name)
        if expected is not None:
            np.testing.assert_array_equal(converted[:, number], poses[:, expected])
        else:
            assert name in approximate  # it says so
            for t in range(T):  # the naive mean
                rows = [poses[t, one] for one in conversion.points[number]]
                if not rows or any(row[-1] == 0 for row in rows):
                    assert not converted[t, number].any()
                else:
                    np.testing.assert_allclose(converted[t, number, :-1], np.mean(rows, 0)[:-1], rtol=1e-6)
                    assert converted[t, number, -1] == min(row[-1] for row in rows)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_mirrored_pose_converts_to_the_mirrored_conversion(pair: tuple[str, str]) -> None:
    """The table mixes no sides up: swapping left and right commutes with it."""
    source, target = map(get_skeleton, pair)
    poses = np.random.default_rng(0).uniform(0.1, 1, (1, source.num_keypoints, 3))
    conversion = find_conversion(*pair)
    mirrored = conversion(poses[:, list(source.flip_permutation)])
    wrong = np.flatnonzero(np.abs(mirrored - conversion(poses)[:, list(target.flip_permutation)]).max((0, 2)) > 1e-9)
    # The mesh vertices nearest to the points of jaw, nose and lips are no mirror images of each other.
    assert all(target.keypoint_names[number].startswith("face_") for number in wrong)


def test_another_number_of_keypoints_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(T, 543, D\) of mediapipe_holistic_543"):
        find_conversion("mediapipe_holistic_543", "coco_wholebody_133")(np.ones((2, 133, 3)))
