"""The evaluation of a model on a folder: its figures, its files, and one clear sentence for whatever is wrong."""

import copy
import gc
import json
import os
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_pose_tokenizer import evaluation
from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.evaluation import (
    FRAMES_PER_SEQUENCE,
    evaluate_model,
    format_table,
    micro_batches,
    representative_sequences,
)
from modeling_pose_tokenizer.extraction import process_state
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.hub import load_pretrained, save_checkpoint
from modeling_pose_tokenizer.metrics import DISTANCE_KEYS, ReconstructionMetrics
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.shape_metrics import SHAPE_KEYS, ShapeMetrics

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"
GROUPS = ("body", "face", "left_hand", "right_hand")
RECONSTRUCTION = {*DISTANCE_KEYS, "pck@0.05", "pck@0.1", "pck@0.2"}


def random_sequence(seed, frames):
    """Keypoints that drift in pixels around a body with shoulders, some missing, one hand often away."""
    rng = np.random.default_rng(seed)
    home = np.random.default_rng(0).normal(size=(1, 133, 2))
    home[0, 5], home[0, 6] = (0.5, 0.0), (-0.5, 0.0)
    points = 300 + 100 * (home + 0.05 * rng.normal(size=(frames, 133, 2)).cumsum(0))
    confidence = rng.choice([0.0, 0.9], p=[0.1, 0.9], size=(frames, 133))
    if seed % 2:
        confidence[:, 91:112] = 0.0
    return np.concatenate([points, confidence[..., None]], -1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was fitted to its data, and the data: seven sequences of different lengths, one with a hole."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "data" / "test").mkdir(parents=True)
    (root / "data" / "empty").mkdir()
    for seed, frames in enumerate([1, 5, 9, 30, 64, 70, 130]):
        mask = np.arange(frames) != 3
        np.savez(root / "data" / "test" / f"clip{seed}.npz", poses=random_sequence(seed, frames), mask=mask, fps=25.0)
    torch.manual_seed(0)
    config = PoseTokenizerConfig(hidden_size=16, num_part_layers=1, num_quantizers=[2, 1, 2, 2], codebook_size=16)
    feature_extractor = PoseFeatureExtractor.from_config(config)
    dataset = PoseDataset(
        root / "data", "test", feature_extractor=feature_extractor, fit=True, cache_dir=root / "cache"
    )
    model = PoseTokenizerModel(config)
    model.initialize_from_data(
        [
            {key: torch.from_numpy(np.array(item[key]))[None] for key in ("input_values", "padding_mask")}
            for item in dataset
        ]
    )
    # Fitted to so few steps it repeats them, and a search finds nothing better than the nearest codes.
    with torch.no_grad():
        model.quantizer.codebook[:, 1:] += 0.1 * torch.randn_like(model.quantizer.codebook[:, 1:])
    save_checkpoint(model, feature_extractor, root / "model")
    return root


@pytest.fixture(scope="module")
def loaded(folder):
    model, feature_extractor = load_pretrained(folder / "model")
    dataset = PoseDataset(folder / "data", "test", feature_extractor=feature_extractor, cache_dir=folder / "cache")
    return model, dataset


def run(monkeypatch, **arguments):
    """The command as it is, in this process."""
    words = [word for key, value in arguments.items() for word in (f"--{key}", *([str(value)] if value else []))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def flatten(tree, prefix=""):
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in pairs for k, v in flatten(value, f"{prefix}/{key}").items()}
    return {prefix: tree}


def assert_same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = found[key] == (value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-4))
        assert same, f"{key}: {found[key]} is not {value}"


@torch.inference_mode()
def one_by_one(model, dataset):
    """What the figures are by definition: every sequence alone, through the public calls."""
    metrics = ReconstructionMetrics(model.config.layout, model.config)
    shape = ShapeMetrics(model.config.layout, 2, 25.0)
    for item in dataset:
        values, mask = (torch.from_numpy(np.array(item[key]))[None] for key in ("input_values", "padding_mask"))
        codes = model.encode(values, mask).pose_codes
        poses = model.decode(codes, mask).pose_values
        metrics.update(poses, values, mask, item["scale"][None])
        shape.update(poses, values, mask)
        metrics.update_codes(codes, model.get_pose_codes_mask(mask), model(values, mask).quantization_error)
    return metrics, shape


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_figures_do_not_depend_on_the_batches(loaded, batch_size):
    model, dataset = loaded
    evaluation = evaluate_model(model, dataset, batch_size, progress=False)
    expected, shape = one_by_one(model, dataset)
    figures, others = expected.compute(), shape.compute()
    figures["overall"] |= others["overall"]
    for group, own in others["parts"].items():
        figures["parts"][group] |= own
    assert_same(evaluation.metrics, figures)
    assert np.array_equal(evaluation.code_counts, expected.code_counts.numpy())
    assert [row["id"] for row in evaluation.sequences] == dataset.ids
    assert [row["frames"] for row in evaluation.sequences] == [1, 4, 8, 29, 63, 69, 129]


def test_the_command_searches_when_asked(folder, loaded, tmp_path, monkeypatch):
    run(monkeypatch, model=folder / "model", data=folder / "data", output=tmp_path / "out", **{"beam-size": 4})
    model, dataset = loaded
    model = copy.deepcopy(model)
    model.config.beam_size = 4
    expected = evaluate_model(model, dataset, progress=False).metrics["overall"]["mpjpe"]
    model.config.beam_size = 1
    greedy = evaluate_model(model, dataset, progress=False).metrics["overall"]["mpjpe"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tokens"]["beam_size"] == 4
    found = metrics["overall"]["mpjpe"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(greedy, rel=1e-4)


def test_the_command_writes_figures_sequences_and_report(folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, model=folder / "model", data=folder / "data", output=tmp_path / "out", visualize=None)
    printed = capsys.readouterr().out
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    figures = {name for name in files if name.startswith("report/figures/")}
    assert files - figures == {"metrics.json", "sequences.jsonl", "report/index.html"}
    assert {"report/figures/rate_distortion.pdf", "report/figures/error_by_speed.png"} <= figures
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics) == {
        "overall", "parts", "per_keypoint", "input_units", "by_speed", "rate_distortion", "tokens", "data"
    }  # fmt: skip
    for tables, keys, shape in (
        (metrics, RECONSTRUCTION, set(SHAPE_KEYS)),
        (metrics["input_units"], set(DISTANCE_KEYS), set()),
    ):
        assert set(tables["overall"]) == keys | shape
        assert tuple(tables["parts"]) == GROUPS and len(tables["per_keypoint"]) == 133
        assert all(set(block) == keys | shape for block in tables["parts"].values())
        assert all(set(block) == keys for block in tables["per_keypoint"].values())
    assert metrics["rate_distortion"][-1]["overall"] == metrics["overall"]["mpjpe"]
    assert [row["num_quantizers"] for row in metrics["rate_distortion"]] == [1, 2]
    # every body is 100 pixels wide at the shoulders, but for its drift
    ratio = metrics["input_units"]["overall"]["mpjpe"] / metrics["overall"]["mpjpe"]
    assert 50 < ratio < 200
    assert set(metrics["tokens"]) >= {
        "bits_per_frame", "bitrate", "token_rate", "codebook_utilization", "perplexity", "quantization_error",
        "compression_ratio",
    }  # fmt: skip
    assert len(metrics["tokens"]["perplexity"]) == len(metrics["tokens"]["codebook_utilization"]) == 7
    assert metrics["data"]["sequences"] == 7 and metrics["data"]["frames"] == 303
    rates = metrics["rate_distortion"]
    assert [rate["num_quantizers"] for rate in rates] == [*range(1, len(rates) + 1)] and len(rates) > 1
    assert rates[-1]["overall"] == metrics["overall"]["mpjpe"] < rates[0]["overall"]
    assert rates[-1]["bits_per_frame"] == metrics["tokens"]["bits_per_frame"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "sequences.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"clip{seed}" for seed in range(7)]
    assert rows[1]["parts"]["left_hand"] is None
    assert rows[1]["hand_error"] == pytest.approx(rows[1]["parts"]["right_hand"])
    for part, key in (("overall", "mpjpe"), ("left_hand", "mpjpe"), ("overall", "pa_mpjpe"), ("body", "dtw_mje")):
        cells = [row["figures"][part][key] for row in rows if key in row["figures"][part]]
        mean = sum(mean * count for mean, count in cells) / sum(count for _, count in cells)
        table = metrics["overall"] if part == "overall" else metrics["parts"][part]
        assert mean == pytest.approx(table[key], rel=1e-9), "the rows make up the whole"
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    for part in GROUPS:
        assert f'<data value="{metrics["parts"][part]["mpjpe"]}">' in page
        assert f"{part:<12}{100 * metrics['parts'][part]['mpjpe']:>11.2f} %" in printed
    assert page.count("<li><button") == 5
    assert str(tmp_path / "out" / "metrics.json") in printed and "report" in printed


def test_a_second_run_replaces_the_first(folder, tmp_path, monkeypatch):
    arguments = {"model": folder / "model", "data": folder / "data", "output": tmp_path}
    run(monkeypatch, **arguments)
    first = (tmp_path / "metrics.json").read_text()
    (tmp_path / "metrics.json").write_text("{")
    run(monkeypatch, **arguments)
    assert (tmp_path / "metrics.json").read_text() == first
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "sequences.jsonl"}


def test_files_that_cannot_be_used_are_listed(folder, tmp_path, monkeypatch):
    (tmp_path / "data" / "test").mkdir(parents=True)
    for index in range(120):
        np.savez(tmp_path / "data" / "test" / f"{index}.npz", poses=random_sequence(index, 2))
    (tmp_path / "data" / "test" / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    run(monkeypatch, model=folder / "model", data=tmp_path / "data", output=tmp_path / "out")
    (rejected,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert "broken.npz" in json.loads(rejected)["path"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]["sequences"] == 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere/at/all"}, "nowhere"),
        ({"model": "{folder}/data"}, "data"),
        ({"data": "{folder}/nothing"}, "nothing"),
        ({"split": "val"}, "val"),
        ({"split": "empty"}, "empty"),
        ({"output": "{folder}/model/config.json"}, "config.json: cannot be written"),
        ({"output": "{folder}/model/config.json/deep/er"}, "config.json/deep/er: cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(folder, tmp_path, monkeypatch, change, message):
    before = sorted(folder.rglob("*"))
    arguments = {"model": "{folder}/model", "data": "{folder}/data", "output": str(tmp_path / "out")} | change
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, **{key: value.format(folder=folder) for key, value in arguments.items()})
    assert message in stop.value.code and "\n" not in stop.value.code.strip()
    assert not (tmp_path / "out").exists() and sorted(folder.rglob("*")) == before


def test_bad_input_ends_with_exit_code_1_and_no_traceback(folder, tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--model",
        folder / "data",
        "--data",
        folder / "data",
        "--output",
        tmp_path / "o",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 1 and "Traceback" not in done.stderr and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


@given(st.lists(st.integers(1, 2000), max_size=40), st.integers(1, 16))
def test_micro_batches_hold_every_sequence_once_and_stay_small(lengths, batch_size):
    batches = micro_batches(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or padded <= batch_size * FRAMES_PER_SEQUENCE
        assert len(batch) <= batch_size


@given(st.lists(st.none() | st.floats(0, 1), max_size=30))
def test_the_report_shows_the_best_the_median_and_the_worst(errors):
    rows = [{"hand_error": error, "mpjpe": 0.1, "parts": {"left_hand": error}} for error in errors]
    chosen = representative_sequences(rows)
    known = sorted(error for error in errors if error is not None)
    if not known:
        assert len(chosen) <= 5 and not any("hands" in label for label in chosen.values())
        return
    shown = [errors[index] for index in chosen]
    assert shown == sorted(shown) and len(chosen) == min(len(known), 5)
    of = {label: errors[index] for index, label in chosen.items()}
    assert of["Best, by hands"] == known[0]
    if len(known) > 1:
        assert of["Worst, by hands"] == known[-1]
    if len(known) > 2:
        assert of["Median, by hands"] == known[round((len(known) - 1) / 2)]


def test_the_table_tells_what_was_not_measured():
    config = PoseTokenizerConfig()
    table = format_table(ReconstructionMetrics(config.layout, config).compute())
    assert "left_hand               -" in table and "0 sequences" in table


LAUNCHER = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")


def test_two_processes_write_what_one_writes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK_SEQUENCES", 2)
    arguments = {"model": folder / "model", "data": folder / "data"}
    run(monkeypatch, **arguments, output=tmp_path / "one")
    script = tmp_path / "evaluate.py"  # in chunks as small, since the data is
    script.write_text(
        "import runpy\nfrom modeling_pose_tokenizer import evaluation\nevaluation.CHUNK_SEQUENCES = 2\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    words = [f"--{key}={value}" for key, value in arguments.items()]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, *LAUNCHER, script, *words, f"--output={tmp_path / 'two'}"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("figures:") == 1 and "process 1 of 2" in done.stderr
    one, two = (tmp_path / name for name in ("one", "two"))
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert (two / "sequences.jsonl").read_bytes() == (one / "sequences.jsonl").read_bytes()
    found, expected = (flatten(json.loads((place / "metrics.json").read_text())) for place in (two, one))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        rel = 1e-6 if "frechet" in key else 1e-9
        assert found[key] == (value if value is None or isinstance(value, str) else pytest.approx(value, rel=rel)), key


def test_memory_does_not_grow_with_the_corpus(loaded, monkeypatch, tmp_path):
    """Nothing as large as a pose is held once it is measured, and of rows only their places."""
    model, dataset = loaded
    monkeypatch.setattr(evaluation, "CHUNK_SEQUENCES", 2)
    held = []
    measure = evaluation._Totals.add_batch

    def add_batch(totals, model, batch):
        held.append(weakref.ref(batch["input_values"]))
        return measure(totals, model, batch)

    monkeypatch.setattr(evaluation._Totals, "add_batch", add_batch)
    totals = evaluation._Totals(model, rate_distortion=True)
    evaluation._write_sequences(tmp_path, model, dataset, 8, totals, process_state())
    gc.collect()
    assert len(held) >= 4 and not any(reference() is not None for reference in held)
    rows = evaluation._RowFile(tmp_path / "sequences.jsonl")
    assert [rows[index] for index in range(7)] == list(rows) and len(rows) == 7
    assert [row["id"] for row in rows] == dataset.ids


@pytest.mark.parametrize("count", [1, 3, 5, 12, 40])
def test_the_report_shows_as_many_sequences_as_asked_for(count):
    rows = [{"hand_error": None, "mpjpe": error, "parts": {"body": error}} for error in range(30)]
    chosen = representative_sequences(rows, count)
    assert len(chosen) == min(count, 30) and list(chosen) == sorted(chosen)
    assert 0 in chosen and (count == 1 or 29 in chosen)
