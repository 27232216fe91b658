"""Token corpora: what the shards hold, restarts, refusals, and several processes. `test_decoding.py` goes back."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpora import (
    FRAME_RATES,
    LENGTHS,
    ROOT,
    SHARD_FRAMES,
    contents,
    extract,
    make_corpus,
    make_sequence,
    run_script,
)
from modeling_pose_tokenizer import extraction
from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.extraction import (
    TokenFolderError,
    extract_tokens,
    hash_weights,
    plan_batches,
    plan_shards,
    read_manifest,
)
from modeling_pose_tokenizer.formats import PoseDataError, write_npz
from modeling_pose_tokenizer.hub import load_pretrained, save_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("extraction"))


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
    (output / shards[1]).rename(output / f".{shards[1]}.0123456789abcdef.tmp")
    (output / ".manifest.json.tmp").write_bytes(b"what a killed run left")
    other = output / ".train-clean-00000-of-00001.parquet.0123456789abcdef.tmp"  # of a run that may be alive
    other.touch()
    extract(place, output)
    other.unlink()
    assert contents(output) == clean
    assert (output / shards[0]).stat().st_mtime == 1


def test_another_model_is_refused(place, tmp_path):
    extract(place, tmp_path / "tokens")
    clean = contents(tmp_path / "tokens")
    with pytest.raises(TokenFolderError, match=r"holds tokens made with another .*choose another output folder"):
        extract(place, tmp_path / "tokens", split="val", model="other_model")
    assert contents(tmp_path / "tokens") == clean


def test_a_search_gives_its_own_tokens(place, tmp_path, monkeypatch):
    options = {"model": place / "model", "data": place / "data", "output": tmp_path / "tokens"}
    run_script(monkeypatch, "extract_tokens.py", **options, cache_dir=place / "cache", beam_size=4)
    model, extractor = load_pretrained(place / "model")
    model.config.beam_size = 4
    dataset = PoseDataset(place / "data", "train", feature_extractor=extractor, cache_dir=place / "cache")
    table = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/tokens/train-*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    differing = 0
    for row, item in zip(table.sort("id"), sorted(dataset, key=lambda item: item["id"]), strict=True):
        codes = model.encode(torch.from_numpy(np.array(item["input_values"]))[None]).pose_codes[0].numpy()
        differing += (codes != np.array(row["codes"])).mean() / len(table)
    assert differing <= 1e-3
    with pytest.raises(TokenFolderError, match="made with another"):
        extract(place, tmp_path / "tokens", split="val")


def test_other_data_are_refused(place, tmp_path):
    extract(place, tmp_path / "tokens")
    (tmp_path / "data" / "train").mkdir(parents=True)
    write_npz(tmp_path / "data" / "train" / "z.npz", make_sequence("z", 9))
    with pytest.raises(TokenFolderError, match="shards of other data"):
        extract(place, tmp_path / "tokens", data=tmp_path / "data")


def test_the_same_names_with_other_poses_are_other_data(place, tmp_path):
    for seed in (0, 1):
        path = tmp_path / f"data{seed}" / "train" / "z.npz"
        path.parent.mkdir(parents=True)
        write_npz(path, make_sequence("z", 9, seed=seed))
    extract(place, tmp_path / "tokens", data=tmp_path / "data0")
    with pytest.raises(TokenFolderError, match="shards of other data"):
        extract(place, tmp_path / "tokens", data=tmp_path / "data1")


@pytest.mark.parametrize("change", [{"batch_frames": 64}, {"shard_frames": 2 * SHARD_FRAMES}])
def test_a_split_keeps_the_plan_that_it_began_with(place, tmp_path, change):
    extract(place, tmp_path / "tokens", batch_frames=128)
    clean = contents(tmp_path / "tokens")
    (key, value), *_ = change.items()
    found = {"batch_frames": 128, "shard_frames": SHARD_FRAMES}[key]
    with pytest.raises(TokenFolderError, match=f"train was begun with {key} {found}, now it is {value}; give {found}"):
        extract(place, tmp_path / "tokens", **{"batch_frames": 128} | change)
    assert contents(tmp_path / "tokens") == clean


def test_shards_without_their_manifest_are_not_taken_for_ours(place, tmp_path):
    extract(place, tmp_path / "tokens")
    (tmp_path / "tokens" / "manifest.json").unlink()
    with pytest.raises(TokenFolderError, match="is damaged or not from this model and data; remove it"):
        extract(place, tmp_path / "tokens", model="other_model")


def test_a_damaged_shard_is_not_taken_for_whole(place, tmp_path):
    shard = tmp_path / "tokens" / extract(place, tmp_path / "tokens")["splits"]["train"]["shards"][1]
    whole = shard.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1]):
        shard.write_bytes(damaged)
        with pytest.raises(TokenFolderError, match=f"{shard.name}: is damaged"):
            extract(place, tmp_path / "tokens")
    table = pq.read_table(list((tmp_path / "tokens").glob("train-00000*.parquet")))
    pq.write_table(table.slice(0, 0), shard)  # whole and of this model, but not as many rows
    with pytest.raises(TokenFolderError, match=f"{shard.name}: is damaged or not from this model and data"):
        extract(place, tmp_path / "tokens")


def test_another_split_may_be_extracted_meanwhile(place, tmp_path, monkeypatch):
    output, clean, encode = tmp_path / "tokens", tmp_path / "clean", extraction._encode_shard
    for split in ("train", "val"):
        extract(place, clean, split=split)

    def meanwhile(*args):
        monkeypatch.setattr(extraction, "_encode_shard", encode)
        extract(place, output, split="val")
        return encode(*args)

    monkeypatch.setattr(extraction, "_encode_shard", meanwhile)
    assert set(extract(place, output)["splits"]) == {"train", "val"}
    assert read_manifest(output) == read_manifest(clean)


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


def test_a_disk_that_refuses_is_one_sentence(place, tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("1-of-00004.parquet"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(TokenFolderError, match=r"tokens: cannot be written \(No space left on device\)\.$"):
        extract(place, tmp_path / "tokens")
    names = set(contents(tmp_path / "tokens"))
    assert names == {"train-00000-of-00004.parquet", "manifest.json"}
    with pytest.raises(TokenFolderError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)


# ---- plans ----------------------------------------------------------------------------------------------------------


lengths_strategy = st.lists(st.integers(1, 200), min_size=1, max_size=60).map(np.array)


@given(lengths_strategy, st.integers(1, 300))
def test_shards_keep_the_order_and_their_size(lengths, shard_frames):
    shards = plan_shards(lengths, shard_frames)
    assert np.concatenate(shards).tolist() == list(range(len(lengths)))
    assert all(len(shard) for shard in shards)
    for shard in shards:
        assert lengths[shard[:-1]].sum() < shard_frames  # over it by a part of the last sequence at most


@given(lengths_strategy, st.integers(1, 600), st.integers(1, 9))
def test_batches_hold_everything_once_within_their_size(lengths, batch_frames, batch_sequences):
    batches = list(plan_batches(lengths, batch_frames, batch_sequences))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= batch_frames
        assert len(batch) <= batch_sequences
        assert lengths[batch[0]] == lengths[batch].max()


@given(st.lists(st.integers()))
def test_reading_ahead_changes_nothing(numbers):
    assert list(extraction._ahead(lambda number: number + 1, numbers)) == [number + 1 for number in numbers]


def test_what_fails_in_reading_ahead_is_raised():
    results = extraction._ahead(lambda number: 1 // number, [1, 2, 0, 3])
    assert [next(results), next(results)] == [1, 0]
    with pytest.raises(ZeroDivisionError):
        next(results)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(place, tmp_path, monkeypatch, capsys):
    options = {"model": place / "model", "data": place / "data", "output": tmp_path / "tokens"}
    run_script(monkeypatch, "extract_tokens.py", **options, cache_dir=place / "cache")
    shown = capsys.readouterr()
    assert f"6 sequences, {sum(LENGTHS.values())} frames" in shown.out
    # The bar: frames, time left, frames per second, hours of motion done.
    assert re.search(r"encode train: 100%.*\[\d\d:\d\d<\d\d:\d\d, .* frames/s, 0\.00 h of motion\]", shown.err)


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


LAUNCHER = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")


def command(place, output, *launcher, data="data"):
    options = {"model": place / "model", "data": place / data, "output": output, "cache-dir": place / "cache"}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    script = ROOT / "scripts" / "extract_tokens.py"
    return [sys.executable, *launcher, str(script), *arguments, f"--shard-frames={SHARD_FRAMES}"]


def test_two_processes_write_what_one_writes(place, tmp_path):
    extract(place, tmp_path / "one")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        command(place, tmp_path / "two", *LAUNCHER), env=environment, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    frames = json.loads((tmp_path / "two" / "manifest.json").read_text())["splits"]["train"]["frames_encoded"]
    assert "0/" in result.stderr and f"/{frames} " not in result.stderr  # the bar of the first process: a share of all
    assert result.stdout.count("sequences") == 1


# ---- kills ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(place):
    """A folder like `place`, with data for some forty shards."""
    for number in range(60):
        path = place / "many" / "train" / f"{number:02d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, make_sequence("many", 1 + 17 * number % 59, seed=number))
    start = time.monotonic()
    extract(place, place / "clean", data="many")
    return place, contents(place / "clean"), time.monotonic() - start


def kill(process, output, delay):
    """Kills a command and what it started, so many seconds after it began to write; returns the shards so far."""
    while process.poll() is None and not (output / "manifest.json").exists():
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return len(list(output.glob("*.parquet")))


def start(place, output, *launcher):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(command(place, output, *launcher, data="many"), env=environment, **silent)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(many, tmp_path):
    place, clean, seconds = many
    output = tmp_path / "tokens"
    for _ in range(3):
        kill(start(place, output), output, random.uniform(0, seconds / 2))
    extract(place, output, data="many")
    assert contents(output) == clean


@pytest.mark.slow
def test_twenty_kills(many, tmp_path):
    place, clean, seconds = many
    shards = []
    for number in range(20):
        output, launcher = tmp_path / str(number), LAUNCHER if number % 4 == 0 else ()
        shards.append(kill(start(place, output, *launcher), output, random.uniform(0, seconds)))
        assert start(place, output, *launcher).wait() == 0
        assert contents(output) == clean, f"kill {number}, after {shards[-1]} shards"
    assert any(0 < count < len(clean) - 2 for count in shards), f"no kill met a run at work: {shards}"


def test_too_many_rejected_files_write_nothing(place, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "bad.npz").write_bytes(b"no npz")
    with pytest.raises(PoseDataError, match="1 of 1 files"):
        extract(place, tmp_path / "tokens", data=tmp_path / "data")
    assert not (tmp_path / "tokens").exists()


def test_the_benchmark_runs(tmp_path, monkeypatch):
    options = {"clips": 6, "shortest": 9, "longest": 70, "rounds": 1, "config": ROOT / "configuration" / "small.yaml"}
    run_script(monkeypatch, "../benchmarks/extraction.py", **options, output=tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 1 and result["extraction_to_encode"] > 0 and result["batch"] == [16384, 64]
