"""Motion capture: positions are those of a chain of rotations, written out joint by joint."""

from pathlib import Path

import numpy as np
import pytest

from modeling_pose_tokenizer.formats import PoseFileError, read_sequences
from modeling_pose_tokenizer.skeleton_pose_tokenizer import build_skeleton
from motions import ASF, write_amc, write_bvh


def turn(axis: str, degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return {
        "x": np.array([[1, 0, 0], [0, c, -s], [0, s, c]]),
        "y": np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]),
        "z": np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
    }[axis]


def test_bvh_gives_positions(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-90, 90, (3, 12)).round(4)
    write_bvh(tmp_path / "a.bvh", values)
    (sequence,) = read_sequences(tmp_path / "a.bvh")
    assert (
        sequence.poses.shape == (3, 4, 4) and sequence.fps == pytest.approx(25) and (sequence.poses[..., 3] == 1).all()
    )
    for frame, row in zip(sequence.poses, values, strict=True):
        hips = turn("z", row[3]) @ turn("y", row[4]) @ turn("x", row[5])
        arm = hips @ turn("y", row[6]) @ turn("x", row[7]) @ turn("z", row[8])
        hand = arm @ turn("z", row[9]) @ turn("y", row[10]) @ turn("x", row[11])
        points = [row[:3], row[:3] + hips @ [0, 2, 0]]
        points.append(points[1] + arm @ [1, 0, 0.5])
        points.append(points[2] + hand @ [0, 1, 0])
        np.testing.assert_allclose(frame[:, :3], points, rtol=1e-4, atol=1e-4)


def test_amc_gives_positions(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-90, 90, (4, 11)).round(4)
    (sequence,) = read_sequences(write_amc(tmp_path, values))
    assert sequence.poses.shape == (4, 4, 4) and sequence.fps is None
    axes = {
        "leg": turn("z", 30) @ turn("y", 20) @ turn("x", 10),
        "foot": turn("x", 60) @ turn("y", 5) @ turn("z", -40),
    }
    for frame, row in zip(sequence.poses, values, strict=True):
        root = turn("z", row[5]) @ turn("y", row[4]) @ turn("x", row[3])
        points = [row[:3], row[:3] + 2.5 * root @ [0.6, -0.8, 0]]
        leg = root @ axes["leg"] @ turn("z", row[8]) @ turn("y", row[7]) @ turn("x", row[6]) @ axes["leg"].T
        points.append(points[1] + 7 * leg @ [0, -1, 0])
        foot = leg @ axes["foot"] @ turn("z", row[10]) @ turn("x", row[9]) @ axes["foot"].T
        points.append(points[2] + 3 * foot @ [0, 0, 1])
        np.testing.assert_allclose(frame[:, :3], points, rtol=1e-4, atol=1e-3)


def test_joints_take_the_order_of_a_layout_that_names_them(tmp_path: Path) -> None:
    write_bvh(tmp_path / "a.bvh", np.arange(36.0).reshape(3, 12))
    (own,) = read_sequences(tmp_path / "a.bvh")
    names = ["hand_end", "hand", "arm", "hips"]
    (named,) = read_sequences(tmp_path / "a.bvh", layout=build_skeleton(names, []))
    np.testing.assert_array_equal(named.poses, own.poses[:, ::-1])
    (other,) = read_sequences(tmp_path / "a.bvh", layout=build_skeleton(["a", "b", "c", "d"], []))
    np.testing.assert_array_equal(other.poses, own.poses)
    with pytest.raises(PoseFileError, match="poses have 4 keypoints, expected 3"):
        read_sequences(tmp_path / "a.bvh", layout=build_skeleton(["a", "b", "c"], []))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("hip leg", "leg hip", "hangs hip on leg, expected each bone once, below another"),
        ("hip leg", "hip leg\n    foot hip", "hangs hip on foot, expected each bone once"),
        (":hierarchy", ":nothing", "has no section :hierarchy"),
        ("dof rx rz", "dof rx rq", "moves foot by rq, expected tx"),
        ("dof rx rz", "dof rx", "has other than 1 numbers for foot"),
        ("    dof rx ry rz\n", "", "moves leg in frame 1, which its skeleton does not"),
        ("axis 10 20 30 XYZ", "axis 10 20 XYZ", "is not an ASF file, or broken"),
        ("direction 0 -1 0", "direction up", "is not an ASF file, or broken"),
    ],
)
def test_a_skeleton_that_does_not_fit_is_refused(old: str, new: str, reason: str, tmp_path: Path) -> None:
    path = write_amc(tmp_path, np.ones((2, 11)))
    assert old in ASF
    (tmp_path / "01.asf").write_text(ASF.replace(old, new, 1))
    with pytest.raises(PoseFileError) as error:
        read_sequences(path)
    assert reason in error.value.reason and "\n" not in str(error.value)
