"""The way back: shards and lines of text become the poses they stand for, where and as fast as they are wanted."""

import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import FRAME_RATES, LENGTHS, extract, make_corpus, make_sequence, run_script
from modeling_pose_tokenizer import decoding
from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter
from modeling_pose_tokenizer.decoding import Canvas, TokenRow, decode_tokens
from modeling_pose_tokenizer.extraction import METADATA_KEY, TokenFolderError, _make_table
from modeling_pose_tokenizer.formats import PoseSequence, read_npz, read_pose, write_pose
from modeling_pose_tokenizer.hub import load_pretrained
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus with the tokens of its train and val split, in folders of their own."""
    place = make_corpus(tmp_path_factory.mktemp("decoding"))
    for split in ("train", "val"):
        extract(place, place / split, split=split)
    return place


@pytest.fixture(scope="module")
def pretrained(place):
    return load_pretrained(place / "model")


def decode(pretrained, tokens, output, **options):
    count = decode_tokens(*pretrained, tokens, output, progress=False, **options)
    suffix = f".{options.get('format', 'npz')}"
    names = sorted(path.relative_to(output).with_suffix("").as_posix() for path in output.rglob(f"*{suffix}"))
    assert len(names) == count
    return names


def read(folder, name):
    (sequence,) = read_npz(folder / f"{name}.npz")
    return sequence


def rows_of(folder):
    return {row["id"]: row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()}


def write_lines(path, folder, names):
    """The text column of some rows as a file."""
    rows = rows_of(folder)
    path.write_text("".join(rows[name]["text"] + "\n" for name in names))
    return path


# ---- shards ---------------------------------------------------------------------------------------------------------


def test_decoding_returns_to_the_input(place, pretrained, tmp_path):
    model, extractor = pretrained
    assert decode(pretrained, place / "train", tmp_path) == sorted(LENGTHS)
    rows = rows_of(place / "train")
    for name, length in LENGTHS.items():
        decoded = read(tmp_path, name)
        assert decoded.poses.shape == (length, 17, 3) and decoded.fps == FRAME_RATES.get(name, 25.0)
        inputs = extractor(make_sequence(name, length).poses, fps=decoded.fps)
        mask = torch.ones(1, inputs["input_values"].shape[1])
        values = model.decode(torch.tensor([rows[name]["codes"]]), mask).pose_values.detach()
        places = {key: np.array([rows[name][key]]) for key in ("center", "scale", "fps", "num_frames")}
        np.testing.assert_allclose(decoded.poses, extractor.postprocess(values, places)[0], atol=1e-2)
        original = make_sequence(name, length).poses
        assert np.abs(decoded.poses - original)[original[..., 2] > 0][:, :2].mean() < 60  # canvas of about 200


@st.composite
def token_rows(draw, model):
    """What an extraction collects: codes of as many steps as the frames need, anywhere and at any rate."""
    rows = []
    for number in range(draw(st.integers(1, 8))):
        frames = draw(st.integers(1, 40))
        shape = (model.config.num_codebooks, model.get_encoded_length(frames))
        codes = np.random.default_rng(draw(st.integers(0, 99))).integers(0, model.config.codebook_size, shape)
        numbers = st.floats(-1e6, 1e6, width=32)
        rows.append(
            {
                "id": f"{draw(st.text('aé-/ ', max_size=5))}{number}",
                "codes": codes.astype(np.int32),
                "num_frames": np.int64(frames),
                "fps": np.float32(25.0),
                "center": np.array([draw(numbers), draw(numbers)], np.float32),
                "scale": np.float32(draw(numbers)),
            }
        )
    return rows


@given(st.data())
def test_codes_in_are_codes_out(pretrained, data):
    check_shard(*pretrained, data.draw(token_rows(pretrained[0])))


@pytest.mark.slow
@settings(max_examples=10_000)
@given(st.data())
def test_ten_thousand_shards(pretrained, data):
    check_shard(*pretrained, data.draw(token_rows(pretrained[0])))


def check_shard(model, extractor, rows):
    formatter = PoseCodeFormatter.from_config(model.config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train-00000-of-00001.parquet")
        pq.write_table(_make_table(rows, formatter, {METADATA_KEY: "{}"}), path, compression="zstd")
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata(None), path)
        try:
            found = [row for chunk in decoding._Shards(path, model, extractor, None).chunks(0, 1) for row in chunk]
        except TokenFolderError as error:  # "/1" is no name of a file below the output
            assert "leads out of" in str(error) and any(row["id"].startswith("/") for row in rows)
            found = []
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    for row, line, text in zip(rows, table["codes"].to_pylist(), table["text"].to_pylist(), strict=True):
        np.testing.assert_array_equal(line, row["codes"])
        np.testing.assert_array_equal(formatter.text_to_codes(text), row["codes"])
    for row, back in zip(rows, found, strict=False):
        np.testing.assert_array_equal(back.codes, row["codes"])
        np.testing.assert_array_equal(back.center, row["center"])
        assert (back.num_frames, back.fps, back.scale) == (row["num_frames"], row["fps"], row["scale"])


def test_tokens_rewritten_by_others_decode(place, pretrained, tmp_path):
    table = pq.read_table(list((place / "val").glob("*.parquet")))
    datasets.Dataset(table.replace_schema_metadata(None)).to_parquet(tmp_path / "all.parquet")
    assert decode(pretrained, tmp_path / "all.parquet", tmp_path / "poses") == ["s30", "s5", "s9"]


def test_the_first_levels_decode_alone(place, pretrained, tmp_path):
    model, extractor = pretrained
    width = len(model.config.group_names)  # the codebooks of the first level
    table = pq.read_table(list((place / "val").glob("*.parquet")))
    codes = [codes[:width] for codes in table["codes"].to_pylist()]
    first = table.set_column(1, "codes", pa.array(codes, pa.list_(pa.list_(pa.int32()))))
    pq.write_table(first, tmp_path / "first.parquet")
    assert decode(pretrained, tmp_path / "first.parquet", tmp_path / "poses") == ["s30", "s5", "s9"]
    row = next(row for row in first.to_pylist() if row["id"] == "s9")
    values = model.decode(torch.tensor([row["codes"]]), torch.ones(1, 9)).pose_values.detach()
    places = {key: np.array([row[key]]) for key in ("center", "scale", "fps", "num_frames")}
    np.testing.assert_allclose(
        read(tmp_path / "poses", "s9").poses, extractor.postprocess(values, places)[0], atol=1e-2
    )


def test_splits_with_the_same_names_decode_one_at_a_time(place, pretrained, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "train-clean"):
        (data / split).mkdir(parents=True)
        source = make_sequence("same", 9)
        np.savez(data / split / "same.npz", poses=source.poses)
        extract(place, tmp_path / "tokens", split=split, data=data)
    with pytest.raises(TokenFolderError, match="tokens: has two rows named same; decode one split at a time"):
        decode(pretrained, tmp_path / "tokens", tmp_path / "poses")
    for split in ("train", "train-clean"):
        assert decode(pretrained, tmp_path / "tokens", tmp_path / split, split=split) == ["same"]
    with pytest.raises(TokenFolderError, match=r"holds no \.parquet file of the split test"):
        decode(pretrained, tmp_path / "tokens", tmp_path / "poses", split="test")


def change_column(name, value):
    def change(table):
        place = table.column_names.index(name)
        return table.set_column(place, table.schema.field(place).with_type(value.type), value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["codes"]), "has no column codes"),
        (change_column("num_frames", pa.array([99], pa.int64())), "expected 4 rows of 25, for 99 frames at 25 fps"),
        (change_column("num_frames", pa.array([None], pa.int64())), "the row .* is damaged"),
        (change_column("num_frames", pa.array([2**62], pa.int64())), "expected 4 rows of"),
        (change_column("fps", pa.array([0.0], pa.float32())), "the row .* is damaged"),
        (change_column("fps", pa.array([1e-30], pa.float64())), "expected 4 rows of|the row .* is damaged"),
        (change_column("center", pa.array([[1.0]], pa.list_(pa.float32()))), "the row .* is damaged"),
        (change_column("scale", pa.array([None], pa.float32())), "the row .* is damaged"),
        (change_column("id", pa.array(["../escape"])), "leads out of the output folder"),
        (change_column("id", pa.array(["/escape"])), "leads out of the output folder"),
        (change_column("codes", pa.array([[[0, 1]] * 5])), r"has 5 rows of \[2\] codes"),
        (change_column("codes", pa.array([None], pa.list_(pa.list_(pa.int32())))), "the row .* is damaged"),
        (change_column("codes", pa.array([[[99, 0]] * 4])), "has other codes than 0 to 15"),
        (change_column("codes", pa.array([[[-1, 0]] * 4])), "has other codes than 0 to 15"),
        (lambda table: pa.concat_tables([table, table]), "has two rows named"),
        (lambda table: table.replace_schema_metadata({METADATA_KEY: "{"}), "was made by another model"),
    ],
)
def test_a_bad_row_is_refused_in_one_sentence(place, pretrained, tmp_path, change, message):
    table = next(
        row for path in (place / "val").glob("*.parquet") if (row := pq.read_table(path))["id"][0].as_py() == "s5"
    )
    pq.write_table(change(table.slice(0, 1)), tmp_path / "bad.parquet")
    with pytest.raises(TokenFolderError, match=message) as error:
        decode(pretrained, tmp_path / "bad.parquet", tmp_path / "poses")
    assert "bad.parquet" in str(error.value) or "two rows" in message
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("poses/*")) and not (tmp_path / "escape.npz").exists()


def test_bad_folders_are_refused_in_one_sentence(place, pretrained, tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "nothing").mkdir()
    messages = {
        "text.parquet": "is not a Parquet file",
        "nothing": r"holds no \.parquet file",
        "absent": "no such file or folder",
    }
    for name, message in messages.items():
        with pytest.raises(TokenFolderError, match=message) as error:
            decode(pretrained, tmp_path / name, tmp_path / "poses")
        assert "\n" not in str(error.value)
    with pytest.raises(TokenFolderError, match="was made by another model"):
        decode(load_pretrained(place / "other_model"), place / "val", tmp_path / "poses")
    assert not list(tmp_path.glob("poses/*"))


# ---- where and how fast ---------------------------------------------------------------------------------------------


def test_a_canvas_holds_everybody_alike(place, pretrained, tmp_path):
    decode(pretrained, place / "train", tmp_path / "own")
    decode(pretrained, place / "train", tmp_path / "canvas", canvas=Canvas(1280, 720))
    for name, row in rows_of(place / "train").items():
        own, other = read(tmp_path / "own", name), read(tmp_path / "canvas", name)
        normalised = (own.poses[..., :2] - np.array(row["center"])) / row["scale"]
        expected = normalised * (720 / 5) + np.array([640, 0.4 * 720])
        np.testing.assert_allclose(other.poses[..., :2], expected, atol=0.05)
        np.testing.assert_array_equal(other.poses[..., 2], own.poses[..., 2])
        assert other.fps == own.fps


def test_a_canvas_fits_usual_proportions():
    center, scale = Canvas(400, 400).place(3)
    np.testing.assert_allclose(center, [200, 160, 0])
    # In shoulder widths: fingertips of outstretched arms, a raised hand, the knees.
    for reach in ((-2.5, 0), (2.5, 0), (0, -2), (0, 2.8)):
        assert all(0 <= place <= 400 for place in center[:2] + scale * np.array(reach))
    center, scale = Canvas(400, 300, shoulder_width=50, center=(10, 20)).place(2)
    assert scale == 50 and center.tolist() == [10, 20]
    for wrong in ((0, 10), (10, -1), (10, 10, 0.0)):
        with pytest.raises(ValueError, match="not above 0"):
            Canvas(*wrong)


@given(st.integers(1, 300), st.floats(0.1, 240), st.sampled_from([5.0, 12.5, 23.976, 25.0, 30.0, 59.94]))
def test_another_frame_rate_keeps_the_duration(pretrained, length, fps, sampling_rate):
    extractor = type(pretrained[1]).from_dict({**pretrained[1].to_dict(), "sampling_rate": sampling_rate})
    row = TokenRow("a", np.zeros((4, 1)), length, length, sampling_rate, np.zeros(2), 1.0)
    changed = decoding._change_place(row, extractor, None, fps)
    # All frames begin before the last one that is decoded ends, and not one more would.
    assert extractor.resampled_length(changed.num_frames, changed.fps) <= length
    last = (length - 1) / sampling_rate
    assert (changed.num_frames - 1) / fps <= last + 1e-3 / fps and changed.num_frames / fps > last - 1e-3 / fps
    values = np.zeros((1, length, 17, 3), np.float32)
    places = {key: np.array([getattr(changed, key)]) for key in ("center", "scale", "fps", "num_frames")}
    assert len(extractor.postprocess(values, places)[0]) == changed.num_frames


def test_another_frame_rate_is_the_same_motion(place, pretrained, tmp_path):
    decode(pretrained, place / "train", tmp_path / "own")
    decode(pretrained, place / "train", tmp_path / "twice", fps=50)
    own, twice = read(tmp_path / "own", "nested/d"), read(tmp_path / "twice", "nested/d")
    assert twice.fps == 50 and len(twice.poses) == 2 * 26 - 1
    np.testing.assert_allclose(twice.poses[::2, :, :2], own.poses[..., :2], atol=0.05)
    for options, message in (({"fps": 0}, "fps is 0"), ({"fps": np.inf}, "fps is inf"), ({"format": "mp4"}, "'mp4'")):
        with pytest.raises(ValueError, match=message):
            decode(pretrained, place / "train", tmp_path / "none", **options)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_lines_of_text_decode_as_their_rows_do(place, pretrained, tmp_path):
    names = ["e", "nested/d", "b", "a"]
    lines = write_lines(tmp_path / "lm.txt", place / "train", names)
    lines.write_text(lines.read_text() + "\n \n")  # blank lines at the end are no sequences
    assert decode(pretrained, lines, tmp_path / "text", canvas=Canvas(300, 400)) == [
        f"lm-{n:06d}" for n in (1, 2, 3, 4)
    ]
    decode(pretrained, place / "train", tmp_path / "rows", canvas=Canvas(300, 400), fps=25)
    for number, name in enumerate(names, 1):
        line, row = read(tmp_path / "text", f"lm-{number:06d}"), read(tmp_path / "rows", name)
        assert line.fps == 25 and len(row.poses) <= len(line.poses) < len(row.poses) + 4  # all steps are whole
        # The last frames of the row know of the end of the sequence.
        np.testing.assert_allclose(line.poses[: len(row.poses)], row.poses, atol=0.05)
    default, scale = decoding.TEXT_CANVAS.place(2)
    decode(pretrained, lines, tmp_path / "default")
    line, other = read(tmp_path / "default", "lm-000001"), read(tmp_path / "text", "lm-000001")
    np.testing.assert_allclose(
        (line.poses[..., :2] - default) / scale, (other.poses[..., :2] - (150, 160)) / 60, atol=1e-3
    )


def test_lines_may_hold_fewer_levels(place, pretrained, tmp_path):
    formatter = PoseCodeFormatter.from_config(pretrained[0].config)
    codes = np.array(rows_of(place / "train")["b"]["codes"])
    first = formatter.codes_to_text(codes[: len(formatter.group_names)], add_special_tokens=True)
    (tmp_path / "mixed.txt").write_text(
        f"{formatter.codes_to_text(codes)}\n{first}\n{formatter.codes_to_text(codes)}\n"
    )
    assert len(decode(pretrained, tmp_path / "mixed.txt", tmp_path / "poses")) == 3
    one, two, three = (read(tmp_path / "poses", f"mixed-{number:06d}").poses for number in (1, 2, 3))
    np.testing.assert_array_equal(one, three)
    assert one.shape == two.shape and not np.allclose(one, two)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{good}\n{good}<what>\n", r"lm\.txt, line 2: .*<what>"),
        ("{good}\n\n{good}\n", r"lm\.txt, line 2: has no tokens"),
        ("{good}\n{short}\n", r"lm\.txt, line 2: "),
        ("", r"lm\.txt: is empty"),
        ("\n\n", r"lm\.txt: is empty"),
        (b"\xff\xfe\x00", r"lm\.txt: is not text"),
    ],
)
def test_a_bad_line_is_refused_in_one_sentence(place, pretrained, tmp_path, content, message):
    good = rows_of(place / "train")["f"]["text"]
    short = good[: good.rindex("<")]
    content = content if isinstance(content, bytes) else content.format(good=good, short=short).encode()
    (tmp_path / "lm.txt").write_bytes(content)
    with pytest.raises(TokenFolderError, match=message) as error:
        decode(pretrained, tmp_path / "lm.txt", tmp_path / "poses")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("poses/*"))


def test_repair_makes_the_best_of_lines(place, pretrained, tmp_path):
    good = rows_of(place / "train")["f"]["text"]
    damaged = good[: good.rindex("<")] + "and then"
    (tmp_path / "lm.txt").write_text(f"{good}\nnothing at all\n{damaged}\n")
    with pytest.warns(UserWarning, match=r"lm\.txt: 1 lines without a code step were left out, the first is line 2"):
        assert decode(pretrained, tmp_path / "lm.txt", tmp_path / "poses", repair=True) == ["lm-000001", "lm-000003"]
    assert read(tmp_path / "poses", "lm-000003").poses.shape[1:] == (17, 3)


# ---- .pose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["coco_wholebody_133", "mediapipe_holistic_543", "mediapipe_holistic_178"])
@pytest.mark.parametrize("keypoint_dim", [3, 4])
def test_what_holistic_knows_comes_back_from_a_pose_file(layout, keypoint_dim, tmp_path):
    skeleton, generator = get_skeleton(layout), np.random.default_rng(0)
    poses = generator.uniform(1, 99, (5, skeleton.num_keypoints, keypoint_dim)).astype(np.float32)
    poses[..., -1] = generator.uniform(0.1, 1, poses.shape[:2])
    poses[generator.random(poses.shape[:2]) < 0.3] = 0
    mask = np.array([True, True, False, True, True])
    write_pose(tmp_path / "clip.pose", PoseSequence("clip", poses, mask, 12.5), skeleton)
    back = read_pose(tmp_path / "clip.pose", layout, keypoint_dim)
    np.testing.assert_array_equal(back.poses, poses * mask[:, None, None])
    np.testing.assert_array_equal(back.mask, mask)
    assert back.fps == 12.5
    assert [path.name for path in tmp_path.iterdir()] == ["clip.pose"]
    with pytest.raises(ValueError, match=r"clip has no frame rate, which \.pose files need"):
        write_pose(tmp_path / "other.pose", PoseSequence("clip", poses, mask), skeleton)


def test_tokens_become_pose_files(place, pretrained, tmp_path):
    from pose_format import Pose

    options = {"canvas": Canvas(640, 480), "fps": 50.0}
    decode(pretrained, place / "train", tmp_path / "npz", **options)
    assert decode(pretrained, place / "train", tmp_path / "pose", format="pose", **options) == sorted(LENGTHS)
    layout = get_skeleton("coco_17")
    for name in LENGTHS:
        sequence = read(tmp_path / "npz", name)
        pose = Pose.read((tmp_path / "pose" / f"{name}.pose").read_bytes())
        assert (pose.header.dimensions.width, pose.header.dimensions.height) == (640, 480)
        assert pose.body.fps == sequence.fps == 50.0
        points = [point for component in pose.header.components for point in component.points]
        order = [layout.keypoint_names.index(point) for point in points]
        np.testing.assert_array_equal(pose.body.data.data[:, 0], sequence.poses[:, order, :2])
        np.testing.assert_array_equal(pose.body.confidence[:, 0], sequence.poses[:, order, 2])
        limbs = [
            tuple(component.points[end] for end in limb)
            for component in pose.header.components
            for limb in component.limbs
        ]
        edges = {tuple(layout.keypoint_names[end] for end in edge) for edge in layout.edges}
        assert limbs and set(limbs) <= edges
    # Without a canvas the picture is as large as the coordinates need.
    decode(pretrained, place / "train", tmp_path / "own", format="pose")
    pose = Pose.read((tmp_path / "own" / "b.pose").read_bytes())
    assert pose.header.dimensions.width == np.ceil(pose.body.data[..., 0].max())


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_goes_back(place, tmp_path, monkeypatch, capsys):
    common = {"model": place / "model"}
    run_script(monkeypatch, "decode_tokens.py", **common, tokens=place / "train", output=tmp_path / "poses")
    assert "6 sequences" in capsys.readouterr().out
    assert len(list((tmp_path / "poses").rglob("*.npz"))) == 6
    lines = write_lines(tmp_path / "lm.txt", place / "train", ["b", "f"])
    monkeypatch.chdir(tmp_path)
    options = {"tokens": lines, "output": tmp_path / "clips", "format": "pose", "fps": 30, "canvas": ("640", "480")}
    run_script(
        monkeypatch, "decode_tokens.py", **common, **options, shoulder_width=90, center=("320", "200"), repair=()
    )
    assert "2 sequences" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["lm-000001.pose", "lm-000002.pose"]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "absent"},
        {"tokens": "absent"},
        {"output": "model/config.json"},
        {"canvas": ("0", "480")},
        {"fps": "-1"},
        {"split": "absent"},
    ],
)
def test_bad_decoding_ends_in_one_sentence(place, tmp_path, monkeypatch, change):
    options = {"model": "model", "tokens": "val", "output": tmp_path / "poses"} | change
    options |= {key: place / options[key] for key in ("model", "tokens", "output")}
    with pytest.raises(SystemExit) as error:
        run_script(monkeypatch, "decode_tokens.py", **options)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    assert not list(tmp_path.glob("poses/*"))


@pytest.mark.parametrize("options", [{"shoulder_width": 9}, {"batch_frames": 0}, {"format": "mp4"}, {"unknown": 1}])
def test_bad_options_are_refused(place, tmp_path, monkeypatch, capsys, options):
    with pytest.raises(SystemExit) as error:
        run_script(monkeypatch, "decode_tokens.py", model=place / "model", tokens="x", output=tmp_path, **options)
    assert error.value.code == 2 and "usage" in capsys.readouterr().err
