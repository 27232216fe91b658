"""Broken and malicious files and folders, and what is said of each: see test_hostile.py.

Every maker writes below the folder that it is given, which stands for what a user was sent.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pose_format import Pose
from pose_format.numpy import NumPyPoseBody
from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

from motions import ASF, BVH, write_amc

N = 17
MARK = "PAYLOAD_RAN"  # what a payload leaves behind, in the folder of the input


def poses(frames: int = 4, keypoints: int = N, values: int = 3) -> np.ndarray:
    made = np.random.default_rng(0).uniform(1, 100, (frames, keypoints, values)).astype(np.float32)
    made[..., -1] = 1
    return made


def npz_bytes(compressed: bool = False, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def npy_bytes(shape: tuple[int, ...], kind: str = "<f4", data: bytes = b"", version: int = 1) -> bytes:
    """An npy file whose header says what it likes."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + data


def zip_bytes(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def own_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


def pose_bytes(frames: int = 3, fps: float = 25.0) -> bytes:
    names = ["NOSE", "LEFT_SHOULDER", "RIGHT_SHOULDER"]
    component = PoseHeaderComponent("POSE_LANDMARKS", names, [], [], "XYC")
    body = NumPyPoseBody(fps, np.ones((frames, 1, 3, 2), np.float32), np.ones((frames, 1, 3), np.float32))
    buffer = io.BytesIO()
    Pose(PoseHeader(0.2, PoseHeaderDimensions(9, 9, 0), [component]), body).write(buffer)
    return buffer.getvalue()


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pyarrow.parquet.write_table(pa.table(columns), path, **options)


def zigzag(value: int) -> bytes:
    """A whole number as thrift's compact protocol has it."""
    value, made = 2 * value, b""
    while value > 127:
        value, made = value >> 7, made + bytes([value & 127 | 128])
    return made + bytes([value])


def lying_page(path: Path, real: int, says: int | None = None) -> None:
    """A table whose one page unpacks to `real` bytes and whose footer knows of 32; the page may say another number."""
    buffer = io.BytesIO()
    table = pa.table({"x_pose_0": [1.0, 2.0, 3.0, 4.0]})
    pyarrow.parquet.write_table(table, buffer, compression="zstd", use_dictionary=False, write_statistics=False)
    column = pyarrow.parquet.ParquetFile(buffer).metadata.row_group(0).column(0)
    whole, packed = buffer.getvalue(), column.total_compressed_size
    chunk, footer = whole[4 : 4 + packed], whole[4 + packed : -8]
    page = pa.compress(bytes(real), "zstd", asbytes=True)
    assert chunk.startswith(b"\x15\x00\x15")  # the header: kind of the page, its size, its packed size
    after = next(k for k in range(3, 9) if chunk[k] == 0x15 and chunk[k - 1] < 128)
    rest = next(k for k in range(after + 1, after + 7) if chunk[k] < 128) + 1
    header_end = chunk.index(b"\x28\xb5\x2f\xfd")  # zstd
    sizes = b"\x15" + zigzag(real if says is None else says) + b"\x15" + zigzag(len(page))
    made = chunk[:2] + sizes + chunk[rest:header_end] + page
    old, new = (b"\x16" + zigzag(size) + b"\x26\x08" for size in (packed, len(made)))
    assert footer.count(old) == 1
    footer = footer.replace(old, new)
    path.write_bytes(b"PAR1" + made + footer + struct.pack("<I", len(footer)) + b"PAR1")


def repeated_text(path: Path, name: str, length: int, rows: int) -> None:
    """A column of one long text, which the file holds once."""
    texts = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["a" * length])
    numbers = {key: np.zeros(rows) for key in ("frame", "landmark_index", "x", "y")}
    table = {"type": ["pose"] * rows, **numbers, name: texts}
    parquet(path, table, store_schema=False, compression="none")


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payload(path: Path) -> bytes:
    return pickle.dumps(Payload(exec, f"open({str(path.parent / MARK)!r}, 'w').close()"))


def object_npz(path: Path, name: str = "poses") -> None:
    """An npz file whose array is a pickle that runs a program where numpy may unpickle it."""
    data = npy_bytes((1,), "|O", payload(path))
    path.write_bytes(
        zip_bytes([(f"{name}.npy", data), ("poses.npy", own_npy(poses()))][: 1 if name == "poses" else 2])
    )


def copying_pickle() -> bytes:
    """A megabyte of text, and the instruction to encode it, ten thousand times."""
    call = b"h\x00h\x01R0"  # the memory's function and arguments, called, dropped
    keep = b"h\x00h\x01R"
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
    start = b"\x80\x02c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x01"
    return start + call + keep * 10_000 + b"."


def deep(path: Path, opening: bytes, count: int = 100_000) -> None:
    path.write_bytes(b'{"keypoints": ' + opening * count)


def long_folder(path: Path) -> None:
    """A path of 300 characters, in folders that are allowed."""
    folder = path / ("ü" * 60) / ("x" * 120) / ("y" * 120)
    folder.mkdir(parents=True)
    (folder / "a.npz").write_bytes(npz_bytes(poses=poses()))


def looped(path: Path) -> None:
    path.mkdir()
    (path / "a.npz").write_bytes(npz_bytes(poses=poses()))
    (path / "again").symlink_to(path, target_is_directory=True)
    (path / "up").symlink_to(path.parent, target_is_directory=True)


def many(path: Path, **files: bytes) -> None:
    path.mkdir()
    for name, content in files.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


@dataclass(frozen=True)
class Hostile:
    """What is written, under which name, and a part of the sentence that is said; None: it is read like any other."""

    name: str
    make: Callable[[Path], Any]
    says: str | None


def content(data: bytes | Callable[[], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data() if callable(data) else data)


def arrays(**values: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(npz_bytes(**values))


def text(value: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def far(value: float) -> np.ndarray:
    made = poses().astype(np.float64)
    made[2, 5, 0] = value
    return made


GOOD = npz_bytes(poses=poses())
SHARD = {"poses": poses(), "offsets": [0, 2, 4]}
ZEROS = np.zeros((1, N, 3), np.float32)
BVH_FRAME = " ".join(["0"] * 12) + "\n"
OPENPOSE = {"version": 1.3, "people": [{"pose_keypoints_2d": [1.0] * 75}]}
FILES: dict[str, Hostile] = {
    # archives
    "empty file": Hostile("a.npz", content(b""), "is not an npz file"),
    "truncated archive": Hostile("a.npz", content(GOOD[:-200]), "is not an npz file, or a truncated one"),
    "beginning cut off": Hostile("a.npz", content(GOOD[60:]), "is not an npz file, or a truncated one"),
    "bit flipped in data": Hostile("a.npz", content(flipped(GOOD, 400)), "Bad CRC-32"),
    "bit flipped in deflate": Hostile(
        "a.npz", content(lambda: flipped(npz_bytes(True, poses=poses(50)), 900)), "is broken"
    ),
    "bit flipped in directory": Hostile("a.npz", content(flipped(GOOD, len(GOOD) - 22)), "is not an npz file"),
    "another archive": Hostile("a.npz", content(zip_bytes([("poses.txt", b"1 2 3")])), "holds no array named poses"),
    "two arrays of one name": Hostile(
        "a.npz",
        content(lambda: zip_bytes([("poses.npy", own_npy(poses())), ("poses", own_npy(ZEROS))])),
        "holds two arrays of one name",
    ),
    "member leads out": Hostile(
        "a.npz", content(zip_bytes([("../../evil.npy", own_npy(poses()))])), "holds no array named poses, only ../../"
    ),
    "member leads out beside poses": Hostile(
        "a.npz", content(zip_bytes([("../evil.npy", b"x"), ("poses.npy", own_npy(poses()))])), None
    ),
    "names of lines": Hostile(
        "a.npz", content(zip_bytes([("a\n\x1b[31m" + "b" * 900, b"x")])), "holds no array named poses, only a\\n\\x1b"
    ),
    # headers
    "declares terabytes": Hostile(
        "a.npz", content(zip_bytes([("poses.npy", npy_bytes((10**10, 133, 3)))])), "more than the file holds"
    ),
    "declares terabytes in npy": Hostile("a.npy", content(npy_bytes((10**10, 133, 3))), "more than the file holds"),
    "declares more than an integer": Hostile("a.npy", content(npy_bytes((2**62, 2**62, 3))), "more than the file"),
    "declares below zero": Hostile("a.npy", content(npy_bytes((-4, N, 3))), "expected no negative length"),
    "endless header": Hostile(
        "a.npy", content(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"), "declares a header of 4294967295 bytes"
    ),
    "program for a header": Hostile(
        "a.npy",
        content(b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('touch PAYLOAD_RAN')\n".ljust(64)),
        "is",
    ),
    "version to come": Hostile("a.npy", content(npy_bytes((1, N, 3), version=9)), "npy"),
    # bombs
    "bomb of zeros": Hostile(
        "a.npz",
        content(lambda: zip_bytes([("poses.npy", npy_bytes((10**5, N, 3), data=bytes(20_400_000)))], 8)),
        "more than the limit of 200 for each",
    ),
    "bomb of a mask": Hostile(
        "a.npz",
        content(lambda: npz_bytes(True, poses=poses(), mask=np.ones(18_000_000, bool))),
        "mask declares 18000000 bytes",
    ),
    "bomb of parquet": Hostile(
        "a.parquet",
        lambda path: parquet(path, {"frame": np.zeros(10**6), "x_pose_0": np.ones(10**6), "y_pose_0": np.ones(10**6)}),
        "more than the limit of 200 for each",
    ),
    "bomb of text in parquet": Hostile(
        "a.parquet",
        lambda path: parquet(path, {"x_pose_0": [1.0], "type": ["a" * 30_000_000]}, compression="zstd"),
        "more than the limit of 200 for each",
    ),
    "page of parquet that is a bomb": Hostile(
        "a.parquet", lambda path: lying_page(path, 2**28), "more than the limit"
    ),
    "page of parquet that says 2 GiB": Hostile(
        "a.parquet", lambda path: lying_page(path, 99, 2**31 - 1), "more than the limit of 200 for each"
    ),
    "text of parquet again and again": Hostile(
        "a.parquet", lambda path: repeated_text(path, "type", 10**6, 20_000), "a text of 1000000 characters"
    ),
    "ids of parquet again and again": Hostile(
        "a.parquet", lambda path: repeated_text(path, "sequence_id", 10**6, 20_000), "a text of 1000000 characters"
    ),
    "lists in parquet": Hostile(
        "a.parquet",
        lambda path: parquet(path, {"x_pose_0": pa.ListArray.from_arrays([0, 2 * 10**7], np.zeros(2 * 10**7))}),
        "x_pose_0 holds list<element: double>, expected numbers",
    ),
    "long text in CSV": Hostile(
        "a.csv",
        text("frame,type,landmark_index,x,y\n0," + "a" * 100_000 + ",0,1,1\n" + "0,pose,0,1,1\n" * 30_000),
        "a text of 100000 characters",
    ),
    "bomb of frames": Hostile(
        "a.json", text('[{"pose_landmarks": null}' + ", {}" * 50_000 + "]"), "50001 frames declares"
    ),
    "bomb of rows": Hostile(
        "a.csv",
        text("frame,type,landmark_index,x,y\n" + "".join(f"{n},face,0,1,1\n" for n in range(30_000))),
        "30000 frames declares",
    ),
    "bomb of people": Hostile(
        "a.json",
        text(
            [
                {"instances": [{"keypoints": [[1, 2]] * N, "keypoint_scores": [1] * N, "track_id": n}]}
                for n in range(700)
            ]
        ),
        "700 people in 700 frames",
    ),
    # what runs
    "object array": Hostile("a.npz", object_npz, "poses has dtype object"),
    "object mask": Hostile("a.npz", lambda path: object_npz(path, "mask"), "mask has dtype object"),
    "object array in npy": Hostile(
        "a.npy", lambda path: path.write_bytes(npy_bytes((1,), "|O", payload(path))), "has dtype object"
    ),
    "strings": Hostile("a.npz", arrays(poses=poses().astype(str)), "expected numbers"),
    "records": Hostile("a.npz", arrays(poses=np.zeros((2, N, 3), "f4,O")), "expected numbers"),
    "pickle with a payload": Hostile("a.pkl", lambda path: path.write_bytes(payload(path)), "expected numpy arrays"),
    "payload in a pickle of keypoints": Hostile(
        "a.pkl",
        lambda path: path.write_bytes(
            pickle.dumps({"keypoints": poses(), "scores": Payload(os.system, f"touch {path.parent / MARK}")})
        ),
        "expected numpy arrays",
    ),
    "payload by another name": Hostile("a.npz", lambda path: path.write_bytes(payload(path)), "is not a pickle"),
    "persistent id": Hostile("a.pkl", content(b"\x80\x02X\x01\x00\x00\x00aQ."), "BINPERSID"),
    "extension registry": Hostile("a.pkl", content(b"\x80\x02\x82\x01."), "EXT1"),
    "pickle of memory": Hostile("a.pkl", content(b"\x80\x02Nr\xff\xff\xff\x7f."), "holds no dictionary"),
    "pickle of an endless array": Hostile(
        "a.pkl",
        content(
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\xff\xff\xff\x7ftX\x01\x00\x00\x00btR."
        ),
        "holds no dictionary",
    ),
    "pickle that copies": Hostile("a.pkl", content(copying_pickle), "copies the same data again and again"),
    "pickle of laughs": Hostile(
        "a.pkl", content(b"\x80\x02]q\x00" + b"(" + b"h\x00" * 9 + b"e" + b"."), "holds no dictionary"
    ),
    "pickle cut off": Hostile("a.pkl", content(pickle.dumps({"keypoints": poses()})[:-9]), "is not a pickle"),
    # frames, numbers
    "no frames": Hostile("a.npz", arrays(poses=np.zeros((0, N, 3))), "0 frames, expected at least 1"),
    "one frame": Hostile("a.npz", arrays(poses=poses(1)), None),
    "a million frames": Hostile(
        "a.npz", lambda path: path.write_bytes(npz_bytes(poses=np.ones((10**6, N, 3), np.uint8))), None
    ),
    "coordinates of 1e30": Hostile("a.npz", arrays(poses=far(1e30)), "frame 2 has the coordinate 1e+30"),
    "coordinates of -1e10": Hostile("a.npz", arrays(poses=far(-1e10)), "frame 2 has the coordinate 1e+10"),
    "one infinite coordinate": Hostile("a.npz", arrays(poses=far(np.inf)), None),
    "all NaN": Hostile("a.npz", arrays(poses=np.full((4, N, 3), np.nan)), "no keypoint has a confidence above 0"),
    "no confidence": Hostile("a.npz", arrays(poses=poses()[..., :2]), "expected keypoints of x, y[, z], confidence"),
    "no keypoints": Hostile("a.npz", arrays(poses=np.zeros((4, 0, 3))), "poses have 0 keypoints, expected 17"),
    "another N": Hostile("a.npz", arrays(poses=poses(4, 133)), "poses have 133 keypoints, expected 17"),
    "negative fps": Hostile("a.npz", arrays(poses=poses(), fps=-25.0), "fps is -25.0"),
    "fps next to nothing": Hostile("a.npz", arrays(poses=poses(), fps=1e-30), "fps is"),
    "fps of text": Hostile("a.npz", arrays(poses=poses(), fps="25"), "expected one number"),
    "fps in a .pose file": Hostile("a.pose", content(pose_bytes(fps=-1.0)), "fps is -1.0"),
    "mask of another length": Hostile("a.npz", arrays(poses=poses(), mask=np.ones(9)), "mask has shape (9,)"),
    "duplicate ids in a shard": Hostile("a.npz", arrays(**SHARD, ids=["x", "x"]), "ids name two sequences alike"),
    "ids that lead out": Hostile("a.npz", arrays(**SHARD, ids=["../../x", "/etc/y"]), None),
    "ids of ten thousand letters": Hostile("a.npz", arrays(**SHARD, ids=["x" * 10_000, "ü" * 10_000]), None),
    "offsets out of range": Hostile("a.npz", arrays(poses=poses(), offsets=[0, 2**62, 4]), "offsets do not rise"),
    # other kinds
    ".pose cut off": Hostile("a.pose", content(pose_bytes()[:-7]), "is not a .pose file, or broken"),
    ".pose of noise": Hostile("a.pose", content(pose_bytes()[:8] + bytes(range(256)) * 9), "is not a .pose file"),
    ".pose of endless components": Hostile(
        "a.pose", content(pose_bytes()[:10] + b"\xff" * 40), "is not a .pose file, or broken"
    ),
    "JSON cut off": Hostile("a.json", text('{"people": [{"pose_keypoints_2d": [1,'), "is not a JSON file, or broken"),
    "JSON nested deeply": Hostile("a.json", lambda path: deep(path, b"["), "is not a JSON file, or broken"),
    "JSON of objects nested deeply": Hostile("a.json", lambda path: deep(path, b'{"a":'), "is not a JSON file"),
    "JSON of endless digits": Hostile("a.json", text('{"keypoints": ' + "9" * 9999 + "}"), "is not a JSON file"),
    "JSON with text for numbers": Hostile(
        "a.json", text([{"keypoints": [["1", "2"]] * N, "scores": ["1"] * N}]), "expected numbers"
    ),
    "JSON with NaN alone": Hostile(
        "a.json", text('[{"keypoints": [[NaN, 1]], "scores": [1]}]'), "has no keypoint in any of 1 frames"
    ),
    "JSON of 1e999": Hostile("a.json", text('[{"keypoints": [[1e999, 1]], "scores": [1]}]'), "has no keypoint in any"),
    "JSON of 1e30": Hostile("a.json", text([{"keypoints": [[1e30, 1]] * N, "scores": [1] * N}]), "coordinate 1e+30"),
    "OpenPose without people": Hostile("a_0_keypoints.json", text({"version": 1.3, "people": 7}), "no list of people"),
    "OpenPose of another body": Hostile(
        "a_0_keypoints.json", text({"version": 1.3, "people": [{"pose_keypoints_2d": [1] * 54}]}), "54 numbers"
    ),
    "JSON no UTF-8": Hostile(
        "a.json", content(b'{"version": 1, "people": "\xff\xfe\xfa"}'), "is not a JSON file, or broken"
    ),
    "CSV with a part unknown": Hostile(
        "a.csv", text("frame,type,landmark_index,x,y\n0,tail,0,1,1\n"), "type is tail, expected pose"
    ),
    "CSV out of range": Hostile("a.csv", text("frame,type,landmark_index,x,y\n0,face,-1,1,1\n"), "out of range"),
    "parquet cut off": Hostile("a.parquet", content(b"PAR1" + b"\0" * 40), "is not a parquet file, or broken"),
    "BVH of endless frames": Hostile(
        "a.bvh", text(BVH.replace("Frames: 3", "Frames: 999999999999") + BVH_FRAME), "is not a BVH file, or broken"
    ),
    "BVH nested deeply": Hostile(
        "a.bvh", text("HIERARCHY\nROOT a\n{\n" + "JOINT a\n{\n OFFSET 0 0 0\n" * 20_000), "is not a BVH file"
    ),
    "AMC without a skeleton": Hostile("a.amc", text(":FULLY-SPECIFIED\n:DEGREES\n1\n"), "has no skeleton"),
    "ASF in a circle": Hostile(
        "01_02.amc",
        lambda path: (
            write_amc(path.parent, np.ones((2, 11))),
            (path.parent / "01.asf").write_text(ASF.replace("hip leg", "hip leg\n    foot hip")),
        ),
        "expected each bone once",
    ),
    # the file system
    "link that leads nowhere": Hostile("a.npz", lambda path: path.symlink_to(path.parent / "b"), "cannot be read"),
    "link to itself": Hostile("a.npz", lambda path: path.symlink_to(path), "cannot be read"),
    "pipe": Hostile("a.npz", os.mkfifo, "cannot be read (is no regular file)"),
    "device": Hostile("a.npz", lambda path: path.symlink_to("/dev/zero"), "cannot be read (is no regular file)"),
    "name of 250 letters": Hostile("x" * 246 + ".npz", content(GOOD), None),
    "name in many scripts": Hostile("手話 été 🤟 " + "話" * 60 + ".npz", content(GOOD), None),
    "name with a line break": Hostile("a\nb\x1b[31m.npz", content(b"PK\x03\x04"), "is not an npz file"),
    "name that is no UTF-8": Hostile(os.fsdecode(b"a\xff\xfe.npz"), content(b"PK"), "is not an npz file"),
    "good name that is no UTF-8": Hostile(os.fsdecode(b"a\xff.npz"), content(GOOD), None),
}
FOLDERS: dict[str, Hostile] = {
    "loop of links": Hostile("data", looped, None),
    "path of 300 letters": Hostile("data", long_folder, None),
    "two files of one name": Hostile(
        "data", lambda path: many(path, **{"a__b.npz": GOOD, "a_b.npz": GOOD}), "would be named a_b in train"
    ),
    "mixed keypoints": Hostile(
        "data",
        lambda path: many(path, **{"a.npz": GOOD, "b.npz": npz_bytes(poses=poses(4, 18))}),
        "mixes 17 keypoints of 3 values",
    ),
    "mixed values": Hostile(
        "data",
        lambda path: many(path, **{"a.npz": GOOD, "b.npz": npz_bytes(poses=poses(4, N, 4))}),
        "with 17 of 4",
    ),
    "nothing": Hostile("data", lambda path: path.mkdir(), "There are no pose files in"),
    "nothing but others": Hostile(
        "data", lambda path: many(path, **{"README.md": b"#"}), "There are no pose files in"
    ),
    "OpenPose folder with a broken frame": Hostile(
        "data",
        lambda path: many(path, **{"a_0_keypoints.json": json.dumps(OPENPOSE).encode(), "a_1_keypoints.json": b"{"}),
        "a_1_keypoints.json: is not a JSON file",
    ),
    "endless name": Hostile("x" * 300, lambda path: None, "There is no file or folder"),
}
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 99))
YAML: dict[str, tuple[str, str]] = {
    "python tag": ("model: !!python/object/apply:os.system ['touch PAYLOAD_RAN']\n", "is not valid YAML"),
    "python name": ("model: {hidden_size: !!python/name:os.system }\n", "is not valid YAML"),
    "own tag": ("model: {hidden_size: !big 3}\n", "is not valid YAML"),
    "unknown key": ("model: {hiden_size: 64}\n", "unknown key model.hiden_size; the nearest valid one is"),
    "unknown section": ("modle: {hidden_size: 64}\n", "unknown key modle"),
    "duplicate key": ("model: {hidden_size: 64, hidden_size: 32}\n", "stands twice"),
    "number as text": ("model: {hidden_size: '64 channels'}\n", "model.hidden_size is 64 channels; expected int"),
    "list for a number": ("training: {batch_size: [1, 2]}\n", "training.batch_size is"),
    "NaN for a rate": ("training: {learning_rate: .nan}\n", "training.learning_rate is"),
    "below zero": ("training: {batch_size: -1}\n", "training.batch_size is -1; expected at least 1"),
    "laughs": (
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 99)),
        "unknown key a0",
    ),
    "nested deeply": ("[" * 30_000, "nested too deeply"),
    "nested just as deeply": ("- " * 16_000, "nested too deeply"),
    "many keys": ("".join(f"k{number}: 1\n" for number in range(3500)), "unknown key k0"),
    "many numbers": (f"model: {{hidden_size: [{'1, ' * 10_000}]}}\n", "model.hidden_size is"),
    "a megabyte": ("#" * 2**20, "has 1048576 bytes; expected a file of at most 32768"),
    "a billion channels": (
        "model: {hidden_size: 1000000000}\n",
        "model: hidden_size is 1000000000; expected",
    ),
    "a list for a key": ("model: {[1, 2]: 3}\n", "is not valid YAML"),
    "not text": ("\x00\x01", "is not valid YAML"),
    "list": ("- a\n- b\n", "holds a list; expected sections"),
    "two documents": ("model: {}\n---\nmodel: {}\n", "is not valid YAML"),
    "unknown skeleton": ("model: {skeleton: coco_71}\n", "model: skeleton is 'coco_71', expected one of"),
}


# ---- seeds of the fuzzing ------------------------------------------------------------------------------------------

LANDMARKS = [[0.25, 0.5, 0.125]] * 21
SEEDS: dict[str, Callable[[], bytes]] = {
    "a.npz": lambda: npz_bytes(poses=poses(), mask=np.ones(4, bool), fps=25.0),
    "packed.npz": lambda: npz_bytes(True, poses=poses(), offsets=[0, 1, 4], ids=["a", "b"], fps=[25.0, 30.0]),
    "video.npz": lambda: npz_bytes(keypoints=poses()[:, None, :, :2], scores=poses()[:, None, :, 2]),
    "a.npy": lambda: own_npy(poses()),
    "a.pose": pose_bytes,
    "a_0_keypoints.json": lambda: json.dumps(OPENPOSE).encode(),
    "holistic.json": lambda: json.dumps({"fps": 30, "frames": [{"left_hand_landmarks": LANDMARKS}] * 2}).encode(),
    "mmpose.json": lambda: json.dumps([{"keypoints": [[1, 2]] * N, "scores": [0.5] * N}] * 3).encode(),
    "long.csv": lambda: b"frame,type,landmark_index,x,y,z\n0,face,0,1,1,1\n1,pose,3,0.5,,2\n",
    "wide.csv": lambda: b"frame,x_pose_0,y_pose_0,x_face_7,y_face_7\n0,1,2,3,4\n1,5,6,7,8\n",
    "wide.parquet": lambda: table_bytes({"frame": [0, 1], "x_pose_0": [1.0, 2.0], "y_pose_0": [3.0, None]}),
    "long.parquet": lambda: table_bytes(
        {"frame": [0, 1], "type": ["face", "pose"], "landmark_index": [1, 2], "x": [1.0, 2.0], "y": [0.5, 1.0]}
    ),
    "video.pkl": lambda: pickle.dumps({"keypoints": list(poses()[..., :2]), "scores": list(poses()[..., 2])}, 4),
    "old.pkl": lambda: pickle.dumps({"keypoints": poses()[..., :2], "scores": poses()[..., 2]}, 0),
    "a.bvh": (BVH + BVH_FRAME * 3).encode,
    "01_02.amc": lambda: b":FULLY-SPECIFIED\n:DEGREES\n1\nroot 1 2 3 4 5 6\nleg 1 2 3\nfoot 1 2\n",
}


def table_bytes(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()
