"""Pose files: what is written is read back, what is broken is refused in one sentence, Holistic is taken apart."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pose_format import Pose
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

from modeling_pose_tokenizer.dataset import find_files
from modeling_pose_tokenizer.formats import (
    PoseDataError,
    PoseFileError,
    PoseSequence,
    check_npz,
    check_rejected,
    make_sequence,
    read_npz,
    read_pose,
    read_sequences,
    write_npz,
    write_rejected,
    write_shard,
)
from modeling_pose_tokenizer.pose_files import IBUG_MESH_POINTS
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, get_skeleton

N, D = 5, 3


def make_poses(num_frames: int, num_keypoints: int = N, keypoint_dim: int = D, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    poses = generator.normal(size=(num_frames, num_keypoints, keypoint_dim)).astype(np.float32)
    poses[..., -1] = generator.uniform(0.5, 1.0, poses.shape[:2])
    return poses


def make_random_sequence(id: str, num_frames: int, fps: float | None, seed: int = 0) -> PoseSequence:
    mask = np.random.default_rng(seed).random(num_frames) < 0.7
    mask[0] = True
    return PoseSequence(id, make_poses(num_frames, seed=seed), mask, fps)


def assert_same(found: PoseSequence, expected: PoseSequence) -> None:
    assert found.id == expected.id
    np.testing.assert_array_equal(found.poses, expected.poses)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.poses.dtype == np.float32 and found.mask.dtype == bool
    assert found.fps is None if expected.fps is None else found.fps == pytest.approx(expected.fps, rel=1e-6)


# ---- round trips ----------------------------------------------------------------------------------------------------

RATES = st.none() | st.floats(1, 240)


@given(num_frames=st.integers(1, 30), fps=RATES, seed=st.integers(0, 99))
def test_a_sequence_comes_back(num_frames: int, fps: float | None, seed: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("npz") / "clip.one.npz"
    sequence = make_random_sequence("clip.one", num_frames, fps, seed)
    write_npz(path, sequence)
    (found,) = read_npz(path, num_keypoints=N, keypoint_dim=D)
    assert_same(found, sequence)
    assert check_npz(path, num_keypoints=N, keypoint_dim=D) == ["clip.one"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), rates=st.lists(RATES, min_size=6, max_size=6))
def test_a_shard_comes_back(lengths: list[int], rates: list[float | None], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("npz") / "shard.npz"
    sequences = [
        make_random_sequence(f"früh/{index}", length, rates[index], index) for index, length in enumerate(lengths)
    ]
    write_shard(path, sequences)
    for found, expected in zip(read_npz(path, num_keypoints=N, keypoint_dim=D), sequences, strict=True):
        assert_same(found, expected)
    assert check_npz(path) == [sequence.id for sequence in sequences]


def test_mask_and_fps_may_be_left_out(tmp_path: Path) -> None:
    poses = make_poses(4)
    np.savez(tmp_path / "one.npz", poses=poses, wh=np.array([640, 480]), note="anything else")
    (found,) = read_npz(tmp_path / "one.npz")
    assert_same(found, PoseSequence("one", poses, np.ones(4, bool), None))
    np.savez(tmp_path / "many.npz", poses=poses, offsets=[0, 1, 4])
    first, second = read_npz(tmp_path / "many.npz")
    assert_same(first, PoseSequence("many_000000", poses[:1], np.ones(1, bool), None))
    assert_same(second, PoseSequence("many_000001", poses[1:], np.ones(3, bool), None))


@pytest.mark.parametrize("dtype", [">f4", "f8", "f2", "i4", "u1"])
def test_any_kind_of_number_becomes_float32(dtype: str, tmp_path: Path) -> None:
    poses = np.abs(make_poses(3) * 10).astype(dtype) + np.ones((), dtype)
    for order in "CF":
        np.savez_compressed(
            tmp_path / "a.npz", poses=np.asarray(poses, order=order), mask=[1.0, 0.0, np.nan], fps=[30]
        )
        (found,) = read_npz(tmp_path / "a.npz")
        assert_same(found, PoseSequence("a", poses.astype(np.float32), np.array([True, False, False]), 30.0))


@given(st.data())
def test_nan_and_infinite_keypoints_are_missing(data: st.DataObject) -> None:
    poses = make_poses(4).astype(np.float64)
    frames, keypoints = st.integers(1, 3), st.integers(0, N - 1)  # frame 0 stays whole
    holes = data.draw(st.lists(st.tuples(frames, keypoints, st.integers(0, D - 1)), max_size=8))
    for hole in holes:
        poses[hole] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e300]))
    found = make_sequence("a", "a", poses).poses
    for frame in range(4):
        for keypoint in range(N):
            broken = any(hole[:2] == (frame, keypoint) for hole in holes)
            expected = np.zeros(D) if broken else poses[frame, keypoint].astype(np.float32)
            np.testing.assert_array_equal(found[frame, keypoint], expected)


# ---- bad input ------------------------------------------------------------------------------------------------------


def save(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


def save_member(path: Path, header: str, data: bytes = b"", name: str = "poses.npy", version: int = 1) -> None:
    """An npz file whose member declares what `header` says and holds `data`."""
    text = header.encode().ljust(117) + b"\n"
    member = b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2, "little") + text + data
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, member)


def save_truncated(path: Path) -> None:
    save(path, poses=make_poses(50))
    path.write_bytes(path.read_bytes()[:2000])


def save_flipped(path: Path) -> None:
    save(path, poses=make_poses(50))
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(bytes(content))


def save_bomb(path: Path) -> None:
    """A few kilobytes of zip that declare, consistently, to hold four terabytes."""
    save_member(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (8000000000, 45, 3), }", b"\0" * 1000)
    content = path.read_bytes()
    true_size, claimed = (1128).to_bytes(4, "little"), (4_000_000_000).to_bytes(4, "little")
    assert content.count(true_size) == 4  # compressed and plain size, in the local header and in the directory
    path.write_bytes(content.replace(true_size, claimed))


def poses_of(shape: str, kind: str = "<f4") -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, "cannot be read"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "not an npz file"),
    "text": (lambda path: path.write_text("x,y\n1,2\n"), "not an npz file"),
    "npy": (lambda path: np.save(path.open("wb"), make_poses(2)), "not an npz file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"poses": 1})), "not an npz file"),
    "truncated": (save_truncated, "truncated"),
    "flipped": (save_flipped, "Bad CRC-32"),
    "no poses": (
        lambda path: save(path, keypoints=make_poses(2), fps=25),
        "no array named poses, only fps, keypoints",
    ),
    "no arrays": (lambda path: zipfile.ZipFile(path, "w").close(), "no array named poses, only nothing"),
    "objects": (lambda path: save(path, poses=np.array([{"a": 1}], dtype=object)), "dtype object"),
    "object mask": (lambda path: save(path, poses=make_poses(2), mask=np.array([1, None])), "mask has dtype object"),
    "strings": (lambda path: save(path, poses=np.full((2, N, D), "1.0")), "dtype <U3"),
    "bytes": (lambda path: save(path, poses=np.full((2, N, D), b"1.0")), "dtype |S3"),
    "complex": (lambda path: save(path, poses=make_poses(2) * 1j), "dtype complex64"),
    "booleans": (lambda path: save(path, poses=np.ones((2, N, D), bool)), "dtype bool"),
    "structured": (lambda path: save(path, poses=np.zeros((2, N, D), "f4,f4")), "dtype"),
    "two axes": (lambda path: save(path, poses=make_poses(2)[0]), "shape (5, 3), expected 3 axes"),
    "four axes": (lambda path: save(path, poses=make_poses(2)[None]), "expected 3 axes"),
    "scalar": (lambda path: save(path, poses=1.0), "expected 3 axes"),
    "another N": (lambda path: save(path, poses=make_poses(2, N + 1)), "6 keypoints, expected 5"),
    "another D": (lambda path: save(path, poses=make_poses(2, N, D + 1)), "4 values per keypoint, expected 3"),
    "no frames": (lambda path: save(path, poses=make_poses(0)), "0 frames"),
    "all masked": (lambda path: save(path, poses=make_poses(3), mask=np.zeros(3, bool)), "all 3 frames are masked"),
    "nothing seen": (lambda path: save(path, poses=np.full((3, N, D), np.nan)), "confidence above 0"),
    "only masked seen": (
        lambda path: save(path, poses=np.concatenate([make_poses(1), np.zeros((1, N, D))]), mask=[0, 1]),
        "confidence above 0",
    ),
    "mask too short": (lambda path: save(path, poses=make_poses(3), mask=np.ones(2, bool)), "mask has shape (2,)"),
    "mask too deep": (lambda path: save(path, poses=make_poses(3), mask=np.ones((3, 1))), "mask has shape (3, 1)"),
    "mask of text": (lambda path: save(path, poses=make_poses(2), mask=["a", "b"]), "mask has dtype <U1"),
    "fps of zero": (lambda path: save(path, poses=make_poses(2), fps=0), "fps is 0.0"),
    "fps below zero": (lambda path: save(path, poses=make_poses(2), fps=-25), "fps is -25.0"),
    "fps without end": (lambda path: save(path, poses=make_poses(2), fps=np.inf), "fps is inf"),
    "many fps": (lambda path: save(path, poses=make_poses(2), fps=[25, 25]), "fps has shape (2,)"),
    "fps of text": (lambda path: save(path, poses=make_poses(2), fps="25"), "fps has shape () and dtype <U2"),
    "declares too much": (lambda path: save_member(path, poses_of("(99, 5, 3)"), b"\0" * 600), "more than the file"),
    "declares terabytes": (lambda path: save_member(path, poses_of("(9000000000, 133, 3)"), b"\0" * 9), "more than"),
    "declares below zero": (lambda path: save_member(path, poses_of("(-1, 5, 3)")), "declares the shape (-1, 5, 3)"),
    "overflowing": (lambda path: save_member(path, poses_of(f"({2**62}, 4, 4)")), "more than the file holds"),
    "lying archive": (save_bomb, "more than the file holds"),
    "no header": (lambda path: save_member(path, "nonsense ((("), "is broken"),
    "no dtype": (lambda path: save_member(path, poses_of("(1, 5, 3)", "<zz")), "is broken"),
    "npy version": (lambda path: save_member(path, poses_of("(1, 5, 3)"), version=3), "npy version (3, 0)"),
    "offsets of floats": (lambda path: save(path, poses=make_poses(4), offsets=[0.0, 4.0]), "offsets have shape (2,)"),
    "offsets alone": (lambda path: save(path, poses=make_poses(4), offsets=[0]), "offsets have shape (1,)"),
    "offsets late": (lambda path: save(path, poses=make_poses(4), offsets=[1, 4]), "do not rise from 0 to 4"),
    "offsets short": (lambda path: save(path, poses=make_poses(4), offsets=[0, 3]), "do not rise from 0 to 4"),
    "offsets long": (lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 5]), "do not rise from 0 to 4"),
    "offsets falling": (lambda path: save(path, poses=make_poses(4), offsets=[0, 3, 2, 4]), "do not rise"),
    "offsets standing": (lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 2, 4]), "do not rise"),
    "few ids": (lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 4], ids=["a"]), "expected 2 texts"),
    "ids of numbers": (
        lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 4], ids=[1, 2]),
        "expected 2 texts",
    ),
    "ids alike": (lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 4], ids=["a", "a"]), "two sequences"),
    "shard mask": (lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 4], mask=np.ones(3)), "mask has shape"),
    "shard fps": (lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 4], fps=[1, 2, 3]), "fps has shape"),
    "shard masked": (
        lambda path: save(path, poses=make_poses(4), offsets=[0, 2, 4], mask=[1, 1, 0, 0]),
        "all 2 frames are masked",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.npz"
    make, reason = BAD_FILES[case]
    make(path)
    with pytest.raises(PoseFileError) as error:
        read_npz(path, num_keypoints=N, keypoint_dim=D)
    assert str(error.value) == f"{path}: {error.value.reason}"
    assert reason in error.value.reason
    assert "\n" not in str(error.value) and not error.value.reason.endswith(".")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # from a worker process


@pytest.mark.parametrize(
    "case", [name for name in BAD_FILES if "declares" in name or name in ("another N", "objects")]
)
def test_headers_alone_tell(case: str, tmp_path: Path) -> None:
    make, reason = BAD_FILES[case]
    make(tmp_path / "clip.npz")
    with pytest.raises(PoseFileError, match=reason.replace("(", r"\(").replace(")", r"\)")):
        check_npz(tmp_path / "clip.npz", num_keypoints=N, keypoint_dim=D)


@pytest.mark.parametrize("count", [133, 178, 543])
def test_another_layout_is_refused_with_the_likely_one(count: int, tmp_path: Path) -> None:
    """By whoever reads it: preparing, training, checking of headers."""
    path, likely = tmp_path / "a.npz", {skeleton.num_keypoints: name for name, skeleton in SKELETONS.items()}[count]
    save(path, poses=make_poses(2, count))
    says = rf"poses have {count} keypoints, expected 17 \({count} keypoints: this looks like {likely}\)$"
    for read in (read_npz, check_npz):
        with pytest.raises(PoseFileError, match=says):
            read(path, num_keypoints=17)
    with pytest.raises(PoseFileError, match=says):
        read_sequences(path, layout=SKELETONS["coco_17"])


def test_keypoints_need_a_confidence(tmp_path: Path) -> None:
    np.savez(tmp_path / "clip.npz", poses=np.ones((3, N, 2)))
    with pytest.raises(PoseFileError, match="x, y"):
        read_npz(tmp_path / "clip.npz")


def test_a_bomb_of_zeros_meets_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, poses=np.ones((40_000, N, D), np.float32))
    assert path.stat().st_size < 10_000
    assert len(read_npz(path)[0].poses) == 40_000
    with pytest.raises(PoseFileError, match="declares 2400000 bytes of data, more than the limit of 1000000"):
        read_npz(path, max_bytes=1_000_000)


@given(data=st.data())
def test_no_damage_escapes_as_another_error(data: st.DataObject, tmp_path_factory: Any) -> None:
    buffer = io.BytesIO()
    arrays = {"poses": make_poses(4), "offsets": np.array([0, 1, 4]), "ids": np.array(["a", "b"])}
    np.savez_compressed(buffer, **arrays) if data.draw(st.booleans()) else np.savez(buffer, **arrays)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    path = tmp_path_factory.mktemp("npz") / "clip.npz"
    path.write_bytes(bytes(content))
    try:
        sequences = read_npz(path, num_keypoints=N, keypoint_dim=D)
    except PoseFileError as error:
        assert str(path) in str(error)
    else:
        assert all(np.isfinite(sequence.poses).all() and sequence.mask.any() for sequence in sequences)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    write_npz(tmp_path / "clip.npz", make_random_sequence("clip", 4, 25.0))
    before = (tmp_path / "clip.npz").read_bytes()
    unwritable = PoseSequence("clip", make_poses(4), np.ones(4, bool), fps="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="could not convert"):
        write_npz(tmp_path / "clip.npz", unwritable)
    with pytest.raises(FileNotFoundError):
        write_npz(tmp_path / "nowhere" / "clip.npz", make_random_sequence("clip", 4, 25.0))
    assert [path.name for path in tmp_path.iterdir()] == ["clip.npz"]
    assert (tmp_path / "clip.npz").read_bytes() == before


def test_rejected_files_are_listed_and_limited(tmp_path: Path) -> None:
    rejected = [{"path": "a.npz", "reason": "poses have 0 frames"}, {"path": "ü.npz", "reason": "is broken"}]
    write_rejected(tmp_path, rejected)
    lines = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rejected
    check_rejected(tmp_path, rejected, 200, 0.01)
    check_rejected(tmp_path, [], 1, 0.0)
    with pytest.raises(PoseDataError, match=r"^2 of 199 files in .* more than 1%; the first is a.npz: poses have 0"):
        check_rejected(tmp_path, rejected, 199, 0.01)


# ---- .pose ----------------------------------------------------------------------------------------------------------

POSE_NAMES = """
NOSE LEFT_EYE_INNER LEFT_EYE LEFT_EYE_OUTER RIGHT_EYE_INNER RIGHT_EYE RIGHT_EYE_OUTER LEFT_EAR RIGHT_EAR MOUTH_LEFT
MOUTH_RIGHT LEFT_SHOULDER RIGHT_SHOULDER LEFT_ELBOW RIGHT_ELBOW LEFT_WRIST RIGHT_WRIST LEFT_PINKY RIGHT_PINKY
LEFT_INDEX RIGHT_INDEX LEFT_THUMB RIGHT_THUMB LEFT_HIP RIGHT_HIP LEFT_KNEE RIGHT_KNEE LEFT_ANKLE RIGHT_ANKLE
LEFT_HEEL RIGHT_HEEL LEFT_FOOT_INDEX RIGHT_FOOT_INDEX
"""
POSE_POINTS = POSE_NAMES.split()
HAND_POINTS = ["WRIST", *(f"THUMB_{joint}" for joint in ("CMC", "MCP", "IP", "TIP"))]
HAND_POINTS += [
    f"{finger}_{joint}"
    for finger in ("INDEX_FINGER", "MIDDLE_FINGER", "RING_FINGER", "PINKY")
    for joint in ("MCP", "PIP", "DIP", "TIP")
]
HOLISTIC = {
    "POSE_LANDMARKS": POSE_POINTS,
    "FACE_LANDMARKS": [str(point) for point in range(478)],
    "LEFT_HAND_LANDMARKS": HAND_POINTS,
    "RIGHT_HAND_LANDMARKS": HAND_POINTS,
    "POSE_WORLD_LANDMARKS": POSE_POINTS,
}


def write_holistic(
    path: Path, components: dict[str, list[str]], frames: int = 3, people: int = 1, missing: tuple[str, ...] = ()
) -> dict[tuple[str, str], np.ndarray]:
    """Writes a `.pose` file of random values and returns them: (component, point) -> (T, 4) x, y, z, confidence."""
    points = [(component, point) for component, names in components.items() for point in names]
    generator = np.random.default_rng(0)
    data = generator.normal(size=(frames, people, len(points), 3)).astype(np.float32)
    confidence = generator.uniform(0.1, 1, (frames, people, len(points))).astype(np.float32)
    confidence[:, :, [component in missing for component, _ in points]] = 0
    header = PoseHeader(
        0.2,
        PoseHeaderDimensions(500, 500, 0),
        [PoseHeaderComponent(name, names, [], [], "XYZC") for name, names in components.items()],
    )
    with path.open("wb") as file:
        Pose(header, NumPyPoseBody(30.0, data, confidence)).write(file)
    values = np.concatenate([data, confidence[..., None]], -1)[:, 0] if people else np.zeros((frames, len(points), 4))
    return {point: values[:, index] for index, point in enumerate(points)}


# MediaPipe's numbers for COCO's keypoints, and the vertices of its face mesh for some well-known points of iBUG-300W.
COCO_BODY = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
COCO_FEET = (31, None, 29, 32, None, 30)
IBUG_POINTS = {8: 152, 30: 4, 36: 33, 39: 133, 42: 362, 45: 263, 48: 61, 54: 291, 62: 13, 66: 14}


def test_holistic_becomes_coco_wholebody(tmp_path: Path) -> None:
    source = write_holistic(tmp_path / "clip.pose", HOLISTIC, missing=("RIGHT_HAND_LANDMARKS",))
    sequence = read_pose(tmp_path / "clip.pose")
    assert sequence.id == "clip" and sequence.fps == 30.0 and sequence.mask.all()
    assert sequence.poses.shape == (3, 133, 3) and sequence.poses.dtype == np.float32
    for keypoint, number in enumerate(COCO_BODY + COCO_FEET):
        if number is None:
            assert not sequence.poses[:, keypoint].any()
        else:
            expected = source["POSE_LANDMARKS", POSE_POINTS[number]][:, [0, 1, 3]]
            np.testing.assert_array_equal(sequence.poses[:, keypoint], expected)
    for point, vertex in IBUG_POINTS.items():
        expected = source["FACE_LANDMARKS", str(vertex)][:, [0, 1, 3]]
        np.testing.assert_array_equal(sequence.poses[:, 23 + point], expected)
    for joint, name in enumerate(HAND_POINTS):
        expected = source["LEFT_HAND_LANDMARKS", name][:, [0, 1, 3]]
        np.testing.assert_array_equal(sequence.poses[:, 91 + joint], expected)
    assert not sequence.poses[:, 112:].any()


def test_the_face_points_are_the_mirror_image_of_each_other() -> None:
    """Left and right vertices of the face mesh stand in pairs, as the layout's mirror pairs say."""
    coco, mesh = get_skeleton("coco_wholebody_133"), get_skeleton("mediapipe_holistic_543")
    assert len(set(IBUG_MESH_POINTS)) == 68
    mesh_face = mesh.keypoint_names.index("face_0")
    for point, vertex in enumerate(IBUG_MESH_POINTS):
        partner = IBUG_MESH_POINTS[coco.flip_permutation[23 + point] - 23]
        assert mesh.flip_permutation[mesh_face + vertex] - mesh_face == partner


@pytest.mark.parametrize("layout", ["mediapipe_holistic_543", "mediapipe_holistic_178"])
def test_holistic_stays_holistic(layout: str, tmp_path: Path) -> None:
    source = write_holistic(tmp_path / "clip.pose", HOLISTIC)
    poses = read_pose(tmp_path / "clip.pose", layout, keypoint_dim=4).poses
    names = get_skeleton(layout).keypoint_names
    assert poses.shape == (3, len(names), 4)
    body = [name.lower() for name in POSE_POINTS]
    for keypoint, name in enumerate(names):
        if name in body:
            expected = source["POSE_LANDMARKS", name.upper()]
        elif name.startswith("face_"):
            expected = source["FACE_LANDMARKS", name[5:]]
        else:
            side = "LEFT" if name.startswith("left") else "RIGHT"
            first = names.index(f"{side.lower()}_hand_wrist")
            expected = source[f"{side}_HAND_LANDMARKS", HAND_POINTS[keypoint - first]]
        np.testing.assert_array_equal(poses[:, keypoint], expected)
    assert (poses[..., -1] > 0).all()


def test_what_was_cut_from_the_file_is_missing(tmp_path: Path) -> None:
    write_holistic(tmp_path / "clip.pose", {**HOLISTIC, "FACE_LANDMARKS": ["4"], "POSE_LANDMARKS": ["NOSE"]}, people=2)
    poses = read_pose(tmp_path / "clip.pose").poses
    seen = np.flatnonzero((poses[..., -1] > 0).all(0))
    assert seen.tolist() == [0, 23 + 30, *range(91, 133)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b""), "not a .pose file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 40), "not a .pose file"),
        (lambda path: path.write_bytes(np.random.default_rng(0).bytes(2000)), "not a .pose file"),
        (
            lambda path: write_holistic(path, {"BODY_25B": ["Nose"]}),
            "1 keypoints, but lacks 133 of the 133",
        ),
        (lambda path: write_holistic(path, HOLISTIC, frames=0), "0 frames"),
        (lambda path: write_holistic(path, HOLISTIC, people=0), "holds no person"),
        (lambda path: write_holistic(path, HOLISTIC, missing=tuple(HOLISTIC)), "all 3 frames are masked"),
    ],
)
def test_a_bad_pose_file_is_refused_in_one_sentence(make: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.pose"
    make(path)
    with pytest.raises(PoseFileError) as error:
        read_pose(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_pose_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    write_holistic(tmp_path / "whole.pose", HOLISTIC)
    content = (tmp_path / "whole.pose").read_bytes()
    for size in np.linspace(0, len(content) - 1, 40).astype(int):
        (tmp_path / "cut.pose").write_bytes(content[:size])
        with pytest.raises(PoseFileError):
            read_pose(tmp_path / "cut.pose")


def test_holistic_does_not_become_any_layout(tmp_path: Path) -> None:
    write_holistic(tmp_path / "clip.pose", HOLISTIC)
    with pytest.raises(PoseFileError, match=r"Holistic, which converts to .* but not to phoenix_50"):
        read_pose(tmp_path / "clip.pose", "phoenix_50")
    with pytest.raises(PoseFileError, match="3 coordinates per point, expected 4"):
        read_pose(tmp_path / "clip.pose", keypoint_dim=5)


def test_a_link_that_leads_back_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "train" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "deep" / "back").symlink_to(tmp_path / "train", target_is_directory=True)
    (tmp_path / "train" / "deep" / "clip.npz").touch()
    assert find_files(tmp_path, "train") == [tmp_path / "train" / "deep" / "clip.npz"]
