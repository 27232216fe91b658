"""Token corpora: what the shards hold, restarts, refusals, several processes, and the way back to poses."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter
from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.extraction import (
    TokenFolderError,
    decode_tokens,
    extract_tokens,
    hash_weights,
    plan_batches,
    plan_shards,
)
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseDataError, PoseSequence, read_npz, write_npz, write_shard
from modeling_pose_tokenizer.hub import load_pretrained, save_checkpoint
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel

ROOT = Path(__file__).parents[1]
SHARD_FRAMES = 40  # so that a few sequences make several shards
LENGTHS = {"a": 1, "b": 33, "c": 7, "nested/d": 26, "e": 64, "f": 12}
FRAME_RATES = {"b": 30.0, "c": 12.5, "e": 24.0}


def make_sequence(name, num_frames, fps=None, seed=0):
    rng = np.random.default_rng((seed, num_frames))
    base = np.random.default_rng(1).uniform(-100, 100, (1, 17, 2)) + 300
    motion = rng.normal(0, 2, (num_frames, 17, 2)).cumsum(0)
    confidence = np.where(rng.random((num_frames, 17, 1)) < 0.1, 0.0, 0.9)
    poses = np.concatenate([base + motion, confidence], -1).astype(np.float32) * (confidence > 0)
    mask = np.ones(num_frames, dtype=bool)
    mask[num_frames // 2 + 1 :: 5] = False
    return PoseSequence(name, poses.astype(np.float32), mask, fps)


def make_model(folder, seed=0):
    torch.manual_seed(seed)
    config = PoseTokenizerConfig(
        skeleton="coco_17", hidden_size=16, joint_hidden_size=8, num_part_layers=1, codebook_size=16, codebook_dim=4
    )
    extractor = PoseFeatureExtractor.from_config(config)
    extractor.fit((s.poses, s.mask) for s in (make_sequence("x", 40, seed=n) for n in range(4)))
    model = PoseTokenizerModel(config).eval()
    inputs = extractor([make_sequence("x", 64, seed=n).poses for n in range(8)], return_tensors="pt")
    model.initialize_from_data([inputs])
    save_checkpoint(model, extractor, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models and data, shared by all tests, which write elsewhere."""
    folder = tmp_path_factory.mktemp("extraction")
    make_model(folder / "model")
    make_model(folder / "other_model", seed=1)
    for name, length in LENGTHS.items():
        path = folder / "data" / "train" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, make_sequence(name, length, FRAME_RATES.get(name)))
    (folder / "data" / "val").mkdir()
    write_shard(folder / "data" / "val" / "packed.npz", [make_sequence(f"s{n}", n, 25.0) for n in (5, 9, 30)])
    (folder / "data" / "empty").mkdir()
    return folder


def extract(place, output, split="train", model="model", data="data", **kwargs):
    model, extractor = load_pretrained(place / model)
    dataset = PoseDataset(
        place / data, split, feature_extractor=extractor, max_rejected=0.5, cache_dir=place / "cache"
    )
    return extract_tokens(model, dataset, output, shard_frames=SHARD_FRAMES, progress=False, **kwargs)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is written ------------------------------------------------------------------------------------------------


def test_codes_are_those_of_each_sequence_alone(place, tmp_path):
    manifest = extract(place, tmp_path / "tokens")
    table = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/tokens/train-*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    model, extractor = load_pretrained(place / "model")
    formatter = PoseCodeFormatter.from_config(model.config)
    assert sorted(table["id"]) == sorted(LENGTHS)
    differing = 0
    for row in table:
        sequence = make_sequence(row["id"], LENGTHS[row["id"]], FRAME_RATES.get(row["id"]))
        inputs = extractor(sequence.poses * sequence.mask[:, None, None], fps=sequence.fps, return_tensors="pt")
        codes = np.array(row["codes"])
        expected = model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes[0].numpy()
        assert codes.shape == expected.shape
        differing += (codes != expected).sum()
        np.testing.assert_array_equal(formatter.text_to_codes(row["text"]), codes)
        assert row["num_frames"] == LENGTHS[row["id"]] and row["fps"] == (sequence.fps or 25.0)
        np.testing.assert_allclose(row["center"], inputs["center"][0])
        np.testing.assert_allclose(row["scale"], inputs["scale"][0])
    entry = manifest["splits"]["train"]
    assert differing <= 1e-3 * entry["tokens"]
    assert entry["tokens"] == sum(np.size(row["codes"]) for row in table)
    assert entry["code_steps"] == entry["tokens"] // model.config.num_codebooks
    assert entry["frames"] == sum(LENGTHS.values()) and entry["sequences"] == len(LENGTHS)
    assert entry["complete"] and entry["rejected_files"] == 0 and len(entry["shards"]) > 2


def test_the_manifest_says_who_made_what(place, tmp_path):
    manifest = extract(place, tmp_path / "tokens")
    assert json.loads((tmp_path / "tokens" / "manifest.json").read_text()) == manifest
    model, _ = load_pretrained(place / "model")
    assert manifest["made_by"]["weights_sha256"] == hash_weights(model)
    assert manifest["made_by"]["dtype"] == "float32" and manifest["made_by"]["device"] == "cpu"
    assert manifest["codes"]["codebooks"] == [list(entry) for entry in model.config.codebook_index]
    assert manifest["versions"]["torch"] == torch.__version__
    assert str(place) not in json.dumps(manifest)
    assert set(contents(tmp_path / "tokens")) == {
        *manifest["splits"]["train"]["shards"],
        "manifest.json",
        "rejected.jsonl",
    }
    metadata = pq.read_schema(tmp_path / "tokens" / manifest["splits"]["train"]["shards"][0]).metadata
    description = json.loads(metadata[b"pose_tokenizer"])
    assert description == {"made_by": manifest["made_by"], "codes": manifest["codes"]}


def test_a_copied_model_is_the_same_model(place, tmp_path):
    model, extractor = load_pretrained(place / "model")
    save_checkpoint(model, extractor, tmp_path / "copy")
    assert extract(place, tmp_path / "one") == extract(place, tmp_path / "two", model=tmp_path / "copy")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_several_splits_share_a_folder(place, tmp_path):
    extract(place, tmp_path / "tokens")
    manifest = extract(place, tmp_path / "tokens", split="val")
    assert set(manifest["splits"]) == {"train", "val"}
    table = pq.read_table(list((tmp_path / "tokens").glob("val-*.parquet")))
    assert sorted(table["id"].to_pylist()) == ["s30", "s5", "s9"]


def test_rejected_files_are_listed(place, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
        write_npz(data / split / "good.npz", make_sequence("good", 9))
        (data / split / "bad.npz").write_bytes(b"no npz")
        manifest = extract(place, tmp_path / "tokens", split=split, data=data)
        assert manifest["splits"][split]["rejected_files"] == 1 and manifest["splits"][split]["sequences"] == 1
    for _ in range(2):  # the same split again changes nothing
        rejected = [json.loads(line) for line in (tmp_path / "tokens" / "rejected.jsonl").read_text().splitlines()]
        assert [Path(row["path"]).parent.name for row in rejected] == ["train", "val"]
        assert all("not an npz" in row["reason"] for row in rejected)
        extract(place, tmp_path / "tokens", split="val", data=data)


# ---- restarts and refusals ------------------------------------------------------------------------------------------


def test_a_restart_writes_only_what_is_missing(place, tmp_path):
    output = tmp_path / "tokens"
    shards = extract(place, output)["splits"]["train"]["shards"]
    clean = contents(output)
    os.utime(output / shards[0], (1, 1))
    (output / shards[1]).rename(output / f".{shards[1]}.tmp")
    (output / f".{shards[1]}.tmp").write_bytes(b"what a killed run left")
    extract(place, output)
    assert contents(output) == clean
    assert (output / shards[0]).stat().st_mtime == 1


def test_another_model_is_refused(place, tmp_path):
    extract(place, tmp_path / "tokens")
    clean = contents(tmp_path / "tokens")
    with pytest.raises(TokenFolderError, match=r"holds tokens made with another .*choose another output folder"):
        extract(place, tmp_path / "tokens", split="val", model="other_model")
    assert contents(tmp_path / "tokens") == clean


def test_other_data_are_refused(place, tmp_path):
    extract(place, tmp_path / "tokens")
    (tmp_path / "data" / "train").mkdir(parents=True)
    write_npz(tmp_path / "data" / "train" / "z.npz", make_sequence("z", 9))
    with pytest.raises(TokenFolderError, match="shards of other data"):
        extract(place, tmp_path / "tokens", data=tmp_path / "data")


def test_a_broken_manifest_is_refused(place, tmp_path):
    for text in ("{", "[]", '{"made_by": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(TokenFolderError, match="is not a manifest of tokens"):
            extract(place, tmp_path)


def test_windows_are_refused(place, tmp_path):
    model, extractor = load_pretrained(place / "model")
    options = {"feature_extractor": extractor, "sequence_length": 8, "cache_dir": place / "cache"}
    with pytest.raises(ValueError, match="windows of 8 frames; expected whole sequences"):
        extract_tokens(model, PoseDataset(place / "data", **options), tmp_path / "tokens")


def test_a_disk_that_refuses_is_one_sentence(place, tmp_path):
    (tmp_path / "tokens" / ".train-00000-of-00004.parquet.tmp").mkdir(parents=True)
    with pytest.raises(TokenFolderError, match=r"tokens: cannot be written \(Is a directory\)\.$"):
        extract(place, tmp_path / "tokens")


# ---- plans ----------------------------------------------------------------------------------------------------------


lengths_strategy = st.lists(st.integers(1, 200), min_size=1, max_size=60).map(np.array)


@given(lengths_strategy, st.integers(1, 300))
def test_shards_keep_the_order_and_their_size(lengths, shard_frames):
    shards = plan_shards(lengths, shard_frames)
    assert np.concatenate(shards).tolist() == list(range(len(lengths)))
    assert all(len(shard) for shard in shards)
    for shard in shards:
        assert lengths[shard[:-1]].sum() < shard_frames  # over it by a part of the last sequence at most


@given(lengths_strategy, st.integers(1, 600))
def test_batches_hold_everything_once_within_their_size(lengths, batch_frames):
    batches = list(plan_batches(lengths, batch_frames))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= batch_frames
        assert lengths[batch[0]] == lengths[batch].max()


# ---- back to poses --------------------------------------------------------------------------------------------------


def test_decoding_returns_to_the_input(place, tmp_path):
    extract(place, tmp_path / "tokens")
    model, extractor = load_pretrained(place / "model")
    assert decode_tokens(model, extractor, tmp_path / "tokens", tmp_path / "poses", progress=False) == len(LENGTHS)
    rows = {
        row["id"]: row for path in (tmp_path / "tokens").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    }
    for name, length in LENGTHS.items():
        (decoded,) = read_npz(tmp_path / "poses" / f"{name}.npz")
        assert decoded.poses.shape == (length, 17, 3) and decoded.fps == FRAME_RATES.get(name, 25.0)
        inputs = extractor(make_sequence(name, length).poses, fps=decoded.fps)
        mask = torch.ones(1, inputs["input_values"].shape[1])
        values = model.decode(torch.tensor([rows[name]["codes"]]), mask).pose_values.detach()
        placement = {key: np.array([rows[name][key]]) for key in ("center", "scale", "fps", "num_frames")}
        np.testing.assert_allclose(decoded.poses, extractor.postprocess(values, placement)[0], atol=1e-2)
        original = make_sequence(name, length).poses
        assert np.abs(decoded.poses - original)[original[..., 2] > 0][:, :2].mean() < 60  # canvas of about 200


def test_tokens_rewritten_by_others_decode(place, tmp_path):
    extract(place, tmp_path / "tokens", split="val")
    table = pq.read_table(list((tmp_path / "tokens").glob("*.parquet")))
    datasets.Dataset(table.replace_schema_metadata(None)).to_parquet(tmp_path / "all.parquet")
    model, extractor = load_pretrained(place / "model")
    assert decode_tokens(model, extractor, tmp_path / "all.parquet", tmp_path / "poses", progress=False) == 3


def test_bad_tokens_are_refused(place, tmp_path):
    extract(place, tmp_path / "tokens", split="val")
    shard = min((tmp_path / "tokens").glob("*.parquet"))
    table = pq.read_table(shard).slice(0, 1)
    cases = {"foreign.parquet": table.drop_columns(["codes"]), "short.parquet": None, "escape.parquet": None}
    cases["short.parquet"] = table.set_column(2, "num_frames", pa.array([99], pa.int64()))
    cases["escape.parquet"] = table.set_column(0, "id", pa.array(["../escape"]))
    for name, broken in cases.items():
        pq.write_table(broken, tmp_path / name)
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "nothing").mkdir()
    messages = {
        "foreign.parquet": "has no column codes",
        "short.parquet": "expected 4 rows of 25, for 99 frames at 25 fps",
        "escape.parquet": "leads out of the output folder",
        "text.parquet": "is not a Parquet file",
        "nothing": "holds no .parquet file",
        "absent": "no such file or folder",
    }
    model, extractor = load_pretrained(place / "model")
    for name, message in messages.items():
        with pytest.raises(TokenFolderError, match=message) as error:
            decode_tokens(model, extractor, tmp_path / name, tmp_path / "poses", progress=False)
        assert "\n" not in str(error.value)
    other, extractor = load_pretrained(place / "other_model")
    with pytest.raises(TokenFolderError, match="was made by another model"):
        decode_tokens(other, extractor, tmp_path / "tokens", tmp_path / "poses", progress=False)
    assert not list(tmp_path.glob("poses/*")) and not (tmp_path / "escape.npz").exists()


# ---- commands -------------------------------------------------------------------------------------------------------


def run_script(monkeypatch, name, **options):
    arguments = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


def test_the_commands_go_there_and_back(place, tmp_path, monkeypatch, capsys):
    tokens, poses = tmp_path / "tokens", tmp_path / "poses"
    common = {"model": place / "model"}
    run_script(
        monkeypatch, "extract_tokens.py", **common, data=place / "data", output=tokens, cache_dir=place / "cache"
    )
    assert f"6 sequences, {sum(LENGTHS.values())} frames" in capsys.readouterr().out
    run_script(monkeypatch, "decode_tokens.py", **common, tokens=tokens, output=poses)
    assert "6 sequences" in capsys.readouterr().out
    assert sorted(path.relative_to(poses).with_suffix("").as_posix() for path in poses.rglob("*.npz")) == sorted(
        LENGTHS
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "absent/model"}, "absent/model"),
        ({"model": "data"}, "config.json"),
        ({"data": "absent"}, "no data folder"),
        ({"split": "absent"}, "no folder for the split absent"),
        ({"split": "empty"}, "is empty"),
        ({"output": "model/config.json"}, "cannot be written"),
        ({"output": "model/config.json/below"}, "cannot be written"),
    ],
)
def test_bad_input_ends_in_one_sentence(place, tmp_path, monkeypatch, change, message):
    options = {"model": "model", "data": "data", "output": tmp_path / "tokens"} | change
    options |= {key: place / options[key] for key in ("model", "data", "output")}
    before = sorted(path for path in place.rglob("*") if "cache" not in path.parts)
    with pytest.raises(SystemExit, match=message) as error:
        run_script(monkeypatch, "extract_tokens.py", **options, cache_dir=tmp_path / "cache")
    assert isinstance(error.value.code, str) and "\n" not in error.value.code  # printed, and the exit code is 1
    assert not (tmp_path / "tokens").exists()
    assert sorted(path for path in place.rglob("*") if "cache" not in path.parts) == before


@pytest.mark.parametrize("change", [{"model": "absent"}, {"tokens": "absent"}, {"output": "model/config.json"}])
def test_bad_decoding_ends_in_one_sentence(place, tmp_path, monkeypatch, change):
    extract(place, tmp_path / "tokens", split="val")
    options = {"model": "model", "tokens": tmp_path / "tokens", "output": tmp_path / "poses"} | change
    with pytest.raises(SystemExit) as error:
        run_script(monkeypatch, "decode_tokens.py", **{key: place / value for key, value in options.items()})
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    assert not (tmp_path / "poses").exists()


def command(place, output, *launcher):
    options = {"model": place / "model", "data": place / "data", "output": output, "cache-dir": place / "cache"}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    script = ROOT / "scripts" / "extract_tokens.py"
    return [sys.executable, *launcher, str(script), *arguments, f"--shard-frames={SHARD_FRAMES}"]


def test_two_processes_write_what_one_writes(place, tmp_path):
    extract(place, tmp_path / "one")
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        command(place, tmp_path / "two", *launcher), env=environment, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    frames = json.loads((tmp_path / "two" / "manifest.json").read_text())["splits"]["train"]["frames_encoded"]
    assert "0/" in result.stderr and f"/{frames} " not in result.stderr  # the bar of the first process: a share of all
    assert result.stdout.count("sequences") == 1


def test_a_killed_run_ends_with_the_same_bytes(place, tmp_path):
    extract(place, tmp_path / "clean")
    output = tmp_path / "tokens"
    process = subprocess.Popen(command(place, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob("train-*.parquet")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    extract(place, output)
    assert contents(output) == contents(tmp_path / "clean")


def test_too_many_rejected_files_write_nothing(place, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "bad.npz").write_bytes(b"no npz")
    with pytest.raises(PoseDataError, match="1 of 1 files"):
        extract(place, tmp_path / "tokens", data=tmp_path / "data")
    assert not (tmp_path / "tokens").exists()
