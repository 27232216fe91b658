"""The runner of the rate-distortion benchmark: every row is scored at every rate, and a cut run goes on."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as python does for a script there

import rate_distortion
import rate_report
from peers import ConvRVQ
from protocol import load_benchmark

TINY = {"hidden_size": 8, "num_part_layers": 1, "codebook_size": 4, "codebook_dim": 4}
NAMES = ["Hips", "LeftArm", "RightArm", "LThumb", "RThumb", "LowerBack"]
JOINTS = {"names": NAMES, "edges": [[0, 5], [5, 1], [5, 2], [1, 3], [2, 4]], "dims": ["x", "y", "z", "confidence"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Smooth motion of six joints, which are one group."""
    for number, split in enumerate(("train", "train", "val")):
        poses = np.ones((64, len(NAMES), 4), np.float32)
        generator = np.random.default_rng(number)
        poses[..., :3] = generator.standard_normal((len(NAMES), 3)) + generator.normal(0, 0.1, (64, 1, 3)).cumsum(0)
        (tmp_path / "cmu-mocap38" / split).mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / "cmu-mocap38" / split / f"{number}.npz", poses=poses, fps=np.float32(30))
    (tmp_path / "cmu-mocap38" / "joints.json").write_text(json.dumps(JOINTS), "utf-8")
    return tmp_path


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two small networks and a transform coder, in two steps at two learning rates."""
    networks = {
        "ours": rate_distortion.Row(rate_distortion.Ours, {**TINY, "levels": (2, 1, 2, 2)}, (1, 2), (0, 1)),
        "momask_256": rate_distortion.Row(
            rate_distortion.Peer,
            {"kind": ConvRVQ, "width": 8, "levels": 2, "dropout": 0.0, "codebook_size": 4},
            (1, 2),
        ),
    }
    for module in (rate_distortion, rate_report):
        monkeypatch.setattr(module, "ROWS", networks)
    monkeypatch.setattr(rate_distortion, "BUDGETS", {"cpu": 2})
    monkeypatch.setattr(rate_distortion, "LEARNING_RATES", (1e-3, 2e-3))
    monkeypatch.setattr(rate_distortion, "INITIAL_BATCHES", 2)
    monkeypatch.setattr(rate_distortion, "LINEAR_BATCHES", 2)
    return [*networks, "klt_4"]


def run(monkeypatch: pytest.MonkeyPatch, data: Path, results: Path, rows: list[str]) -> list[dict[str, Any]]:
    options = ["--data", str(data), "--benchmark", "mocap", "--results", str(results), "--rows", *rows]
    monkeypatch.setattr(sys, "argv", ["rate_distortion.py", *options])
    assert rate_distortion.main() == 0
    return [{key: run[key] for key in run if key != "minutes"} for run in rate_distortion.read_results(results)]


def test_a_cut_command_goes_on_to_the_same_table(
    data: Path, rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = run(monkeypatch, data, tmp_path / "whole.jsonl", rows)
    plan = [(entry["row"], entry["seed"]) for entry in whole]
    assert plan == [("ours", 0), ("ours", 0), ("ours", 1), ("momask_256", 0), ("momask_256", 0), ("klt_4", 0)]
    assert {entry["learning_rate"] for entry in whole[:2]} == {1e-3, 2e-3}
    best = rate_distortion.best_rate(whole[:2])
    assert whole[2]["learning_rate"] == best

    lines = (tmp_path / "whole.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:1] + lines[3:4]), "utf-8")
    resumed = run(monkeypatch, data, tmp_path / "cut.jsonl", rows)
    in_order = [(entry["row"], entry["learning_rate"], entry["seed"]) for entry in whole]
    assert sorted(resumed, key=lambda e: in_order.index((e["row"], e["learning_rate"], e["seed"]))) == whole
    assert run(monkeypatch, data, tmp_path / "cut.jsonl", rows) == resumed  # nothing is left to do

    capsys.readouterr()
    options = ["--results", str(tmp_path / "cut.jsonl"), "--benchmark", "mocap", "--val", "mocap"]
    monkeypatch.setattr(sys, "argv", ["rate_report.py", *options, "--figure", str(tmp_path / "figure.png")])
    rate_report.main()
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in (*rows, "ours, 8 beams")) and table.count(f"{best:g}, 2") == 2
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_one_lucky_seed_does_not_choose_the_learning_rate() -> None:
    def entry(rate: float, error: float) -> dict[str, Any]:
        return {"learning_rate": rate, "points": [{"val": {"one": {"all": error}, "two": {"all": error}}}]}

    runs = [entry(1e-3, 3.1), entry(2e-3, 3.0), entry(5e-4, 3.2)]
    assert rate_distortion.best_rate(runs) == 2e-3
    runs += [entry(2e-3, 3.4), entry(1e-3, 3.1)]
    assert rate_distortion.best_rate(runs) == 1e-3
    assert rate_distortion.best_rate([*runs, entry(5e-4, 3.2)]) == 1e-3
    assert rate_distortion.best_rate([entry(1e-4, 2.0), *runs]) == 1e-3  # one seed is no match for two


def test_a_skeleton_of_one_group_spends_the_same_bits(data: Path) -> None:
    codec = rate_distortion.Ours(load_benchmark(data, "mocap"), levels=(6, 1, 6, 6), **TINY)
    assert len(codec.codebook_sizes) == 19
    assert [codec.num_codebooks(levels) for levels in (1, 2, 3, 6, None)] == [4, 7, 10, 19, 19]


def test_no_data_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["rate_distortion.py", "--data", str(tmp_path), "--rows", "klt_4"])
    assert rate_distortion.main() == 1
    assert "expected" in capsys.readouterr().err
