"""Readers: every form that a recording is saved in gives the same poses, and nothing in a file is ever carried out."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pose_format import Pose
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions
from pose_format.utils.openpose import OpenPose_Components, load_openpose_directory

from modeling_pose_tokenizer.formats import (
    FORMATS,
    Limits,
    PoseFileError,
    PoseSequence,
    find_format,
    make_sequence,
    read_npz,
    read_sequences,
    register_format,
    write_pose,
)
from modeling_pose_tokenizer.parquet_pages import unpacked_bytes
from modeling_pose_tokenizer.plain_pickle import read_plain_pickle
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton
from motions import BVH, write_amc, write_bvh

HOLISTIC = get_skeleton("mediapipe_holistic_543")
T = 5


def read(path: Path, layout: str | None = None, **options: Any) -> PoseSequence:
    (sequence,) = read_sequences(path, layout=get_skeleton(layout) if layout else None, **options)
    return sequence


def random_people(people: int, num_keypoints: int, seed: int = 0) -> np.ndarray:
    """(people, T, N, 3), each person a step to the right of the one before; some keypoints are missing."""
    generator = np.random.default_rng(seed)
    poses = generator.uniform(0, 100, (people, T, num_keypoints, 3)).astype(np.float32)
    poses[..., 0] += 1000 * np.arange(people)[:, None, None]
    poses[..., 2] = generator.uniform(0.5, 1, poses.shape[:3])
    poses[generator.random(poses.shape[:3]) < 0.1] = 0
    return poses


# ---- OpenPose -------------------------------------------------------------------------------------------------------

PARTS = {"pose": 25, "face": 70, "hand_left": 21, "hand_right": 21}


def write_openpose(folder: Path, people: np.ndarray, name: str = "video") -> None:
    """A JSON file for each frame; the people of a frame are in another order each time."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.cumsum([0, *PARTS.values()])
    for frame in range(people.shape[1]):
        content = []
        for person in np.roll(people[:, frame], frame, 0):
            parts = zip(PARTS, starts[:-1], starts[1:], strict=True)
            values = {f"{part}_keypoints_2d": person[a:b].ravel().tolist() for part, a, b in parts}
            content.append({"person_id": [-1], **values, "pose_keypoints_3d": []})
        (folder / f"{name}_{frame:012d}_keypoints.json").write_text(json.dumps({"version": 1.3, "people": content}))


def test_openpose_is_read_as_pose_format_does(tmp_path: Path) -> None:
    people = random_people(1, 137)
    write_openpose(tmp_path / "video", people)
    sequence = read(tmp_path / "video", "openpose_137")
    oracle = load_openpose_directory(str(tmp_path / "video"))
    assert sequence.id == "video" and sequence.fps is None
    np.testing.assert_allclose(sequence.poses[..., :2], oracle.body.data.filled(0)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(sequence.poses[..., 2], oracle.body.confidence[:, 0], rtol=1e-6)
    single = tmp_path / "video" / "video_000000000002_keypoints.json"
    np.testing.assert_array_equal(read(single).poses, sequence.poses[2:3])


def test_openpose_headers_of_pose_files_go_by_name(tmp_path: Path) -> None:
    people = random_people(1, 137)
    write_openpose(tmp_path / "video", people)
    with (tmp_path / "video.pose").open("wb") as file:
        load_openpose_directory(str(tmp_path / "video")).write(file)
    for layout in ("openpose_137", "coco_wholebody_133", "coco_17"):
        expected = read(tmp_path / "video", layout).poses
        np.testing.assert_allclose(read(tmp_path / "video.pose", layout).poses, expected, rtol=1e-6)
    assert sum(len(component.points) for component in OpenPose_Components) == 137


def test_people_are_followed_whatever_their_order(tmp_path: Path) -> None:
    people = random_people(3, 137)
    people[:2, 2:] = 0  # the third person is seen most
    write_openpose(tmp_path / "video", people)
    np.testing.assert_array_equal(read(tmp_path / "video").poses, people[2])
    for person in range(3):
        np.testing.assert_array_equal(read(tmp_path / "video", person=person).poses[:2], people[person, :2])
    with pytest.raises(PoseFileError, match="holds 3 people, expected one numbered 3"):
        read(tmp_path / "video", person=3)


def test_several_videos_in_a_folder_are_several_sequences(tmp_path: Path) -> None:
    people = random_people(2, 137)
    write_openpose(tmp_path / "both", people[:1], "a")
    write_openpose(tmp_path / "both", people[1:], "b")
    first, second = read_sequences(tmp_path / "both")
    assert (first.id, second.id) == ("both/a", "both/b")
    np.testing.assert_array_equal([first.poses, second.poses], people)


# ---- MediaPipe Holistic ---------------------------------------------------------------------------------------------

GROUPS = {"pose": slice(0, 33), "face": slice(33, 501), "left_hand": slice(501, 522), "right_hand": slice(522, 543)}


def random_holistic() -> np.ndarray:
    """(T, 543, 4) with confidence 1, a hand missing in a frame and the face in another."""
    values = np.random.default_rng(1).uniform(0, 1, (T, 543, 4)).astype(np.float32)
    values[..., 3] = 1
    values[1, GROUPS["left_hand"]] = 0
    values[3, GROUPS["face"]] = 0
    return values


def json_frames(values: np.ndarray, key: Callable[[str], str], wrap: Callable[[list], Any]) -> list[dict]:
    frames = []
    for frame in values:
        found = {}
        for name, part in GROUPS.items():
            points = frame[part]
            found[key(name)] = wrap(points.astype(float).tolist()) if points[:, 3].any() else None
        frames.append(found)
    return frames


def as_objects(points: list) -> list:
    return [dict(zip(("x", "y", "z", "visibility"), point, strict=True)) for point in points]


def camel(name: str) -> str:
    return re.sub("_(.)", lambda found: found[1].upper(), name) + "Landmarks"


def long_table(values: np.ndarray) -> pa.Table:
    rows: dict[str, list] = {name: [] for name in ("frame", "row_id", "type", "landmark_index", "x", "y", "z")}
    for number, frame in enumerate(values):
        for name, part in GROUPS.items():
            for index, (x, y, z, seen) in enumerate(frame[part].astype(float).tolist()):
                row = (20 + number, f"{number}-{name}-{index}", name, index, *((x, y, z) if seen else (None,) * 3))
                for column, value in zip(rows.values(), row, strict=True):
                    column.append(value)
    return pa.table(rows)


def wide_table(values: np.ndarray) -> pa.Table:
    columns: dict[str, Any] = {"frame": np.arange(len(values), dtype=np.int16)}
    for axis, letter in enumerate("xyz"):
        for name, part in GROUPS.items():
            seen = values[:, part, 3] > 0
            own = np.where(seen, values[:, part, axis], np.nan)
            columns |= {f"{letter}_{name}_{index}": own[:, index] for index in range(own.shape[1])}
    return pa.table(columns)


def dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


MEDIAPIPE: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "objects.json": lambda path, v: dump(path, json_frames(v, "{}_landmarks".format, as_objects)),
    "camel.json": lambda path, v: dump(path, {"fps": 30, "frames": json_frames(v, camel, as_objects)}),
    "lists.json": lambda path, v: dump(path, json_frames(v, str, lambda points: [p[:3] for p in points])),
    "messages.json": lambda path, v: dump(
        path, json_frames(v, "{}_landmarks".format, lambda points: {"landmark": as_objects(points)})
    ),
    "tasks.json": lambda path, v: dump(
        path, json_frames(v, "{}_landmarks".format, lambda points: [as_objects(points)])
    ),
    "long.parquet": lambda path, v: pyarrow.parquet.write_table(long_table(v), path),
    "wide.parquet": lambda path, v: pyarrow.parquet.write_table(wide_table(v), path),
    "long.csv": lambda path, v: pyarrow.csv.write_csv(long_table(v), path),
    "wide.csv": lambda path, v: pyarrow.csv.write_csv(wide_table(v), path),
}


@pytest.mark.parametrize("name", MEDIAPIPE)
def test_all_forms_of_holistic_give_what_a_pose_file_gives(name: str, tmp_path: Path) -> None:
    values = random_holistic()
    write_pose(tmp_path / "clip.pose", PoseSequence("clip", values, np.ones(T, bool), 30.0), HOLISTIC)
    MEDIAPIPE[name](tmp_path / name, values)
    for layout in (None, "coco_wholebody_133", "mediapipe_holistic_178", "mediapipe_holistic_543", "unisign_69"):
        expected, found = read(tmp_path / "clip.pose", layout), read(tmp_path / name, layout)
        np.testing.assert_allclose(found.poses, expected.poses, rtol=1e-6)
    assert (found.id, found.fps) == (Path(name).stem, 30.0 if name == "camel.json" else None)
    with_depth = read(tmp_path / name, "mediapipe_holistic_543", keypoint_dim=4)
    np.testing.assert_allclose(with_depth.poses, values, rtol=1e-6)


def test_a_table_of_many_sequences(tmp_path: Path) -> None:
    """As Kaggle's fingerspelling: `sequence_id` tells them apart."""
    values = random_holistic()
    table = wide_table(np.concatenate([values, values[::-1]]))
    table = table.set_column(0, "frame", pa.array([*range(T), *range(T)]))
    table = table.append_column("sequence_id", pa.array([7] * T + [3] * T))
    pyarrow.parquet.write_table(table, tmp_path / "many.parquet")
    first, second = read_sequences(tmp_path / "many.parquet", layout=HOLISTIC, keypoint_dim=4)
    assert (first.id, second.id) == ("many/7", "many/3")
    np.testing.assert_allclose([first.poses, second.poses], [values, values[::-1]], rtol=1e-6)


# ---- MMPose, rtmlib, Uni-Sign ---------------------------------------------------------------------------------------


def instances(frame: np.ndarray) -> list[dict]:
    """People (people, N, 3) of a frame as MMPose's `split_instances` has them."""
    return [
        {"keypoints": person[:, :2].tolist(), "keypoint_scores": person[:, 2].tolist(), "bbox": [[0, 0, 1, 1]]}
        for person in frame.astype(float)
    ]


def listed(people: np.ndarray) -> list[dict]:
    return [{"frame_id": t, "instances": instances(people[:, t])} for t in range(people.shape[1])]


def arrays(people: np.ndarray) -> dict[str, np.ndarray]:
    frames = people.swapaxes(0, 1)
    return {"keypoints": frames[..., :2], "scores": frames[..., 2]}


def rtmlib(people: np.ndarray) -> list[dict]:
    """What a loop around rtmlib's `keypoints, scores = wholebody(image)` dumps."""
    return [{"keypoints": f[..., :2].tolist(), "scores": f[..., 2].tolist()} for f in people.swapaxes(0, 1)]


def unisign(people: np.ndarray, protocol: int) -> bytes:
    own = arrays(people)
    content = {name: list(values) for name, values in own.items()} | {"w_h": (512, 512), "start": 0, "end": None}
    return pickle.dumps(content, protocol)


KEYPOINTS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "demo.json": lambda path, p: dump(path, {"meta_info": {"dataset_name": "x"}, "instance_info": listed(p)}),
    "inferencer.json": lambda path, p: dump(path, listed(p)),
    "api.json": lambda path, p: dump(path, {"predictions": [instances(p[:, t]) for t in range(T)]}),
    "rtmlib.json": lambda path, p: dump(path, rtmlib(p)),
    "video.json": lambda path, p: dump(path, {name: v.tolist() for name, v in arrays(p).items()}),
    "unisign.npz": lambda path, p: np.savez(path, **arrays(p)),
    "unisign.pkl": lambda path, p: path.write_bytes(unisign(p, 4)),
    "old.pickle": lambda path, p: path.write_bytes(unisign(p, 0)),
}


@pytest.mark.parametrize("name", KEYPOINTS)
@pytest.mark.parametrize(("layout", "count"), [("coco_wholebody_133", 133), ("coco_17", 17)])
def test_all_forms_of_keypoints_and_scores_are_alike(name: str, layout: str, count: int, tmp_path: Path) -> None:
    people = random_people(2, count)
    people[0, :, 3:] = 0
    KEYPOINTS[name](tmp_path / name, people)
    np.testing.assert_array_equal(read(tmp_path / name, layout).poses, people[1])
    np.testing.assert_array_equal(read(tmp_path / name, layout, person=0).poses, people[0])
    if count == 133:
        unisign_69 = get_skeleton("unisign_69").keypoint_names
        own = [get_skeleton(layout).keypoint_names.index(keypoint) for keypoint in unisign_69]
        np.testing.assert_array_equal(read(tmp_path / name, "unisign_69").poses, people[1][:, own])
    with pytest.raises(PoseFileError, match=rf"{name}: has {count} keypoints, but lacks .* of the 50 of phoenix_50"):
        read(tmp_path / name, "phoenix_50")


def test_track_numbers_are_kept(tmp_path: Path) -> None:
    people = random_people(2, 17)
    frames = listed(people)
    for frame in frames:
        for number, person in enumerate(frame["instances"]):
            person["track_id"] = 9 - number
            person["keypoints"] = (np.array(person["keypoints"]) * 0 + 1).tolist()  # all in one place
    dump(tmp_path / "a.json", frames)
    np.testing.assert_array_equal(read(tmp_path / "a.json", person=1).poses[..., 2], people[1, ..., 2])


@given(data=st.data())
def test_plain_pickles_come_back(data: st.DataObject) -> None:
    dtypes = st.sampled_from(["f4", "<f8", ">f4", "i2", "u1", "?", "U3"])
    arrays = st.builds(
        lambda dtype, shape, fortran: np.asarray(np.ones(shape).astype(dtype), order="F" if fortran else "C"),
        dtypes,
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.booleans(),
    )
    plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
    leaves = plain | arrays | st.binary() | st.builds(np.float32, st.floats(width=32, allow_nan=False))
    keys = st.text() | st.integers()
    values = st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner)
    )
    content = data.draw(values)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found = read_plain_pickle(pickle.dumps(content, protocol))
        np.testing.assert_equal(found, pickle.loads(pickle.dumps(content, protocol)))


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path) -> list[Any]:
    touch = f"open({str(mark)!r}, 'w').close()"
    return [
        Payload(os.system, f"touch {mark}"),
        Payload(exec, touch),
        Payload(eval, touch),
        {"keypoints": Payload(exec, touch), "scores": np.ones((3, 1, 17))},
        Payload(np.load, str(mark)),
        Payload(io.FileIO, str(mark), "w"),
        np.array([Payload(exec, touch)], dtype=object),
        {"keypoints": {1, 2}},
        PoseSequence("a", np.ones(1), np.ones(1)),
    ]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_payload_runs(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for number, content in enumerate(payloads(mark)):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(PoseFileError, match=r"\.pkl: is not a pickle of numpy arrays, or broken \(") as error:
            read(path)
        assert "\n" not in str(error.value)
    assert not mark.exists()
    pickle.loads((tmp_path / "1.pkl").read_bytes())
    assert mark.exists()  # it is a payload


def test_pickles_that_repeat_an_array_are_refused(tmp_path: Path) -> None:
    frame = np.ones((1, 17, 2), np.float32)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"keypoints": [frame] * 10_000, "scores": [frame] * 10_000}))
    laughs: Any = [0.0] * 10
    for _ in range(12):
        laughs = [laughs] * 10
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"keypoints": laughs, "scores": laughs}))
    for name in ("a.pkl", "b.pkl"):
        with pytest.raises(PoseFileError, match="repeats itself"):
            read(tmp_path / name)


# ---- the registry ---------------------------------------------------------------------------------------------------


def test_a_format_of_ones_own(tmp_path: Path) -> None:
    def read_lines(path: Path, options: Any) -> list[PoseSequence]:
        poses = np.loadtxt(path, ndmin=2).reshape(-1, 2, 3)
        return [make_sequence(path, path.stem, poses, fps=25, keypoint_dim=options.keypoint_dim)]

    register_format("lines", lambda path, head: head.startswith(b"#poses"), read_lines, suffixes=(".lines",))
    try:
        (tmp_path / "a.txt").write_text("#poses\n0 1 1 2 3 1\n")
        (tmp_path / "b.lines").write_text("0 1 1 2 3 1\n")
        for name in ("a.txt", "b.lines"):
            assert read(tmp_path / name).poses.tolist() == [[[0, 1, 1], [2, 3, 1]]]
    finally:
        del FORMATS["lines"]
    with pytest.raises(PoseFileError, match=r"a\.txt: is of no known kind, expected .*npz"):
        read(tmp_path / "a.txt")


def test_of_several_people_in_a_pose_file_the_most_complete_is_read(tmp_path: Path) -> None:
    people = random_people(2, 17)
    people[0, :, 2:] = 0
    names = [name.upper() for name in get_skeleton("mediapipe_holistic_543").keypoint_names[:17]]
    component = PoseHeaderComponent("POSE_LANDMARKS", names, [], [], "XYC")
    body = NumPyPoseBody(25, people[..., :2].swapaxes(0, 1), people[..., 2].swapaxes(0, 1))
    with (tmp_path / "a.pose").open("wb") as file:
        Pose(PoseHeader(0.2, PoseHeaderDimensions(9, 9, 0), [component]), body).write(file)
    nose, first = (read(tmp_path / "a.pose", person=person).poses[:, 0] for person in (None, 0))
    np.testing.assert_allclose(nose, people[1][:, 0], rtol=1e-6)
    np.testing.assert_allclose(first, people[0][:, 0], rtol=1e-6)


def test_npy_and_npz_hold_the_same(tmp_path: Path) -> None:
    poses = random_people(1, 17)[0]
    np.save(tmp_path / "a.npy", poses)
    np.savez(tmp_path / "a.npz", poses=poses)
    np.testing.assert_array_equal(read(tmp_path / "a.npy").poses, read_npz(tmp_path / "a.npz")[0].poses)


# ---- hostile input --------------------------------------------------------------------------------------------------


GOOD: dict[str, Callable[[Path], Any]] = {
    "a.npy": lambda path: np.save(path, random_people(1, 17)[0]),
    "a.bvh": lambda path: write_bvh(path, np.ones((3, 12))),
    "01_02.amc": lambda path: write_amc(path.parent, np.ones((4, 11))),
    "000_keypoints.json": lambda path: write_openpose(path.parent, random_people(1, 137), "0"),
    "a.pose": lambda path: write_pose(
        path, PoseSequence("a", random_holistic(), np.ones(T, bool), 30.0), HOLISTIC, (9, 9)
    ),
    **{name: lambda path, make=make: make(path, random_holistic()) for name, make in MEDIAPIPE.items()},
    **{name: lambda path, make=make: make(path, random_people(1, 17)) for name, make in KEYPOINTS.items()},
}
HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999, 133, 3)}\n"
NPY = b"\x93NUMPY\x01\x00" + len(HEADER).to_bytes(2, "little") + HEADER
PEOPLE = '[{"keypoints": [[1, 2]], "scores": [1]}, {"keypoints": [[1, 2], [3, 4]], "scores": [1, 1]}]'
BODY_3 = '{"version": 1.1, "people": [{"pose_keypoints_2d": [1, 2, 1]}]}'
BAD: dict[str, tuple[str | bytes, str]] = {
    "cut.json": ('[{"pose_landmarks": [', "is not a JSON file, or broken"),
    "deep.json": ('{"keypoints": ' + "[" * 100_000, "is not a JSON file, or broken"),
    "text.json": ('[{"keypoints": [["1", "2"]], "scores": ["1"]}]', "expected numbers"),
    "ragged.json": ('{"keypoints": [[[1, 2], [3]]], "scores": [[1, 1]]}', "is not a file of keypoints and scores"),
    "uneven.json": (PEOPLE, "(1, 3) and (2, 3)"),
    "short.json": ('{"keypoints": [[[1, 2]]], "scores": []}', "has 1 frames of keypoints, but 0 frames of scores"),
    "empty.json": ('[{"pose_landmarks": null}]', "has no keypoint in any of 1 frames"),
    "none.json": ('{"frames": [], "pose_landmarks": 1}', "0 frames"),
    "few.json": ('[{"pose_landmarks": [[1, 2, 3]]}]', "pose of frame 0 has shape (1, 3), expected (33, 3)"),
    "words.json": ('[{"left_hand_landmarks": "none"}]', "is not a file of MediaPipe Holistic"),
    "coco_keypoints.json": (BODY_3, "has 3 numbers, expected 75"),
    "nobody_keypoints.json": ('{"version": 1.3, "people": []}', "holds no person"),
    "rates.json": ('{"fps": -3, "frames": [{"keypoints": [[1, 2]], "scores": [1]}]}', "fps is -3.0"),
    "far.csv": ("frame,type,landmark_index,x,y,z\n0,face,9999,1,1,1\n", "landmark_index is out of range"),
    "part.csv": ("frame,type,landmark_index,x,y,z\n0,tail,0,1,1,1\n", "type is tail, expected pose"),
    "words.csv": ("frame,x_pose_0,y_pose_0\n0,left,right\n", "expected numbers"),
    "cut.parquet": (b"PAR1" + b"\0" * 50, "is not a parquet file, or broken"),
    "cut.pkl": (pickle.dumps({"keypoints": np.ones(9)})[:-20], "is not a pickle of numpy arrays, or broken"),
    "list.pkl": (pickle.dumps([1, 2]), "holds no dictionary with keypoints and scores"),
    "marks.pkl": (b"\x80\x04" + b"(" * 100_000 + b".", "is not a pickle of numpy arrays, or broken"),
    "lying.pkl": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little"), "is not a pickle of numpy arrays, or broken"),
    "many.pkl": (b"\x80\x04" + b"N0" * 2_000_000 + b"N.", "more than 500000 instructions"),
    "lying.npy": (NPY, "more than the file holds"),
    "cut.bvh": (BVH[:300], "is not a BVH file, or broken"),
    "few.bvh": (BVH + "0 0 0\n" * 3, "is not a BVH file, or broken"),
    "alone.amc": (":FULLY-SPECIFIED\n:DEGREES\n1\nroot 0 0 0 0 0 0\n", "has no skeleton: expected alone.asf"),
    "empty.pose": (b"", "is not a .pose file, or broken"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_sentence_and_fast(name: str, tmp_path: Path) -> None:
    content, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    started = time.process_time()
    with pytest.raises(PoseFileError) as error:
        read(path)
    assert reason in error.value.reason
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("name", GOOD)
def test_limits_hold_for_every_kind(name: str, tmp_path: Path) -> None:
    GOOD[name](tmp_path / name)
    path = tmp_path / "0_000000000000_keypoints.json" if "_keypoints" in name else tmp_path / name
    read(path)
    with pytest.raises(PoseFileError, match="more than the limit"):
        read(path, limits=Limits(array_bytes=100, text_bytes=100))


def test_a_parquet_bomb_meets_the_ratio(tmp_path: Path) -> None:
    table = pa.table({"frame": np.zeros(10**6, np.int64), "x_pose_0": np.ones(10**6), "y_pose_0": np.ones(10**6)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(
        PoseFileError, match=r"declares 24000\d\d\d bytes of data in .*, more than the limit of 200 for each"
    ):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"use_dictionary": False}, {"version": "1.0"}])
@pytest.mark.parametrize("pages", ["1.0", "2.0"])
def test_the_pages_of_parquet_have_the_sizes_that_pyarrow_says(options: dict[str, Any], pages: str) -> None:
    buffer, texts = io.BytesIO(), [f"text {number % 7}" for number in range(5000)]
    table = pa.table({"x": np.arange(5000) % 99, "y": np.random.default_rng(0).normal(size=5000), "type": texts})
    pyarrow.parquet.write_table(
        table, buffer, row_group_size=1200, data_page_size=1000, data_page_version=pages, **options
    )
    metadata = pyarrow.parquet.ParquetFile(buffer).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for place, name in enumerate(table.column_names):
        wanted = sum(group.column(place).total_uncompressed_size for group in groups)  # with the headers
        found = unpacked_bytes(buffer, len(buffer.getvalue()), name.__eq__)
        assert 0.5 * wanted < found < wanted + 8 * 5000


@settings(max_examples=300)
@given(data=st.binary(max_size=60) | st.lists(st.sampled_from(b"\x00\x15\x19\x1c\x29\xfc\x80\x7f")).map(bytes))
def test_any_bytes_for_a_footer_are_an_error_in_no_time(data: bytes) -> None:
    whole = b"PAR1" + data + struct.pack("<I", len(data)) + b"PAR1"
    with suppress(ValueError, IndexError, AttributeError, TypeError):
        unpacked_bytes(io.BytesIO(whole), len(whole), lambda name: True)


def test_damaged_parquet_does_not_end_the_process(tmp_path: Path) -> None:
    """Statistics that contradict the schema: pyarrow aborts where it is asked for a column's metadata."""
    columns = {"frame": [0, 1], "type": ["face", "pose"], "landmark_index": [1, 2], "x": [1.0, 2.0], "y": [0.5, 1.0]}
    schema = pa.schema([pa.field(name, pa.array(values).type) for name, values in columns.items()])
    pyarrow.parquet.write_table(pa.table(columns, schema), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    place = content.rindex(b"landmark_index", 0, content.index(b"ARROW:schema"))
    optional = content.rindex(b"\x25\x02", 0, place)  # of the field's definition: may be missing
    (tmp_path / "a.parquet").write_bytes(content[:optional] + b"\x25\x00" + content[optional + 2 :])
    program = "import sys; from modeling_pose_tokenizer.formats import *; read_sequences(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.parquet"], capture_output=True, check=False)
    assert done.returncode == 1 and b"a.parquet: " in done.stderr and b"PoseFileError" in done.stderr


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_damage_escapes_as_another_error(name: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    path = folder / ("0_000000000000_keypoints.json" if "_keypoints" in name else name)
    if not folder.exists():
        folder.mkdir()
        GOOD[name](folder / name)
        path.with_suffix(".good").write_bytes(path.read_bytes())
    content = bytearray(path.with_suffix(".good").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    path.write_bytes(bytes(content))
    try:
        sequences = read_sequences(path)
    except PoseFileError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert find_format(path) is not None
        assert all(np.isfinite(sequence.poses).all() and sequence.mask.any() for sequence in sequences)
