"""Comparisons: what the intervals are, which evaluations are refused, and the two commands."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import make_corpus, run_script
from modeling_pose_tokenizer.comparison import ComparisonError, compare, format_comparison, name_paths


def write_evaluation(folder, errors, counts=None, **changes):
    """What evaluate.py leaves, of sequences with these errors of the hand."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("{}")
    counts = [10] * len(errors) if counts is None else counts
    rows = []
    for number, (error, count) in enumerate(zip(errors, counts, strict=True)):
        cell = {"mpjpe": [error, count]} if count else {}
        figures = {"overall": {"mpjpe": [0.5, 20], "hand_angle_error": [12.0, 4]}, "left_hand": cell}
        rows.append({"id": f"s{number}", "frames": 7, "figures": figures} | changes)
    (folder / "sequences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "metrics.json"


def figure(comparison, part, metric):
    (found,) = [f for f in comparison.figures if (f.part, f.metric) == (part, metric)]
    return found


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 12))
def test_the_interval_is_that_of_resampled_sequences(seed, size, tmp_path_factory):
    rng = np.random.default_rng(seed)
    folder, first, second = tmp_path_factory.mktemp("pair"), rng.random(size), rng.random(size)
    counts = rng.integers(1, 9, size)
    paths = [
        write_evaluation(folder / name, errors.tolist(), counts.tolist())
        for name, errors in (("a", first), ("b", second))
    ]
    comparison = compare(paths, resamples=300, seed=3)
    found = figure(comparison, "left_hand", "mpjpe")
    weights = np.random.default_rng(3).multinomial(size, np.full(size, 1 / size), 300)
    gaps = []
    for draw in weights:  # each sequence as often as it was drawn
        again = [number for number, times in enumerate(draw) for _ in range(times)]
        total = sum(int(counts[number]) for number in again)
        means = [sum(errors[number] * counts[number] for number in again) / total for errors in (first, second)]
        gaps.append(means[1] - means[0])
    expected = [(errors * counts).sum() / counts.sum() for errors in (first, second)]
    assert found.values == pytest.approx(expected)
    (gap,) = found.differences
    assert gap.difference == pytest.approx(expected[1] - expected[0])
    assert [gap.low, gap.high] == pytest.approx(np.quantile(gaps, [0.025, 0.975]).tolist())
    assert compare(paths, resamples=300, seed=3) == comparison


def test_an_interval_covers_the_truth_as_often_as_it_says(tmp_path):
    rng, covered, decided = np.random.default_rng(0), 0, 0
    for number in range(60):
        hard = rng.gamma(4.0, 0.1, 50)  # sequences differ much more than models: pairing matters
        pair = hard, hard + 0.02 + rng.normal(0, 0.03, 50)
        paths = [write_evaluation(tmp_path / f"{number}{i}", errors.tolist()) for i, errors in enumerate(pair)]
        (gap,) = figure(compare(paths, resamples=200), "left_hand", "mpjpe").differences
        covered += gap.low <= 0.02 <= gap.high
        decided += gap.decided
    assert 50 <= covered <= 60 and decided > 50


def test_a_model_is_not_different_from_itself_and_a_large_gap_is_decided(tmp_path):
    errors = [0.1 * number for number in range(9)]
    paths = [write_evaluation(tmp_path / name, errors) for name in "ab"]
    paths.append(write_evaluation(tmp_path / "c", [error - 1 for error in errors]))
    comparison = compare(paths)
    same, better = figure(comparison, "left_hand", "mpjpe").differences
    assert (same.difference, same.low, same.high, same.decided) == (0.0, 0.0, 0.0, False)
    assert better.decided and better.difference == pytest.approx(-1.0)
    table = format_comparison(comparison)
    assert "left_hand  mpjpe" in table and "-100.00 [-100.00, -100.00]*" in table and "9 sequences" in table
    assert comparison.names == ["a", "b", "c"]


def test_what_is_missing_or_not_finite_is_none(tmp_path):
    paths = [write_evaluation(tmp_path / name, [0.1, 0.2, 0.0], [4, 3, 0]) for name in "ab"]
    assert figure(compare(paths), "left_hand", "mpjpe").sequences == 2
    broken = write_evaluation(tmp_path / "broken", [None, 0.2, 0.0], [4, 3, 0])
    comparison = compare([paths[0], broken])
    found = figure(comparison, "left_hand", "mpjpe")
    assert found.values[1] is None and found.differences[0].difference is None and found.differences[0].low is None
    comparison.write(tmp_path / "comparison.json")
    assert "NaN" not in (tmp_path / "comparison.json").read_text() and "-" in format_comparison(comparison)
    alone = [write_evaluation(tmp_path / f"alone-{name}", [0.3]) for name in "ab"]
    assert figure(compare(alone), "left_hand", "mpjpe").differences[0].low is None  # one sequence has no spread
    unseen = [write_evaluation(tmp_path / f"unseen-{name}", [0.3], [0]) for name in "ab"]
    assert not [f for f in compare(unseen).figures if f.part == "left_hand"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda b: write_evaluation(b, [0.1, 0.2]), r"a/metrics.json: has 1 sequences .* 's2' \(2 in common\)"),
        (lambda b: write_evaluation(b, [0.1] * 4), r"b/metrics.json: has 1 sequences .* 's3' \(3 in common\)"),
        (lambda b: write_evaluation(b, [0.1] * 3, [10, 9, 10]), "'s1' has other frames or scored keypoints"),
        (lambda b: write_evaluation(b, [0.1] * 3, frames=8), "'s0' has other frames or scored keypoints"),
        (lambda b: (write_evaluation(b, [0.1]).parent / "sequences.jsonl").unlink(), "sequences.jsonl: is missing"),
        (lambda b: b.mkdir(), "b/metrics.json: is missing"),
        (lambda b: (write_evaluation(b, [0.1]).parent / "sequences.jsonl").write_text("{\n"), "line 1 is not a row"),
        (lambda b: (write_evaluation(b, [0.1]).parent / "sequences.jsonl").write_text('{"id": "s0", "frames": 7}\n'),
         "line 1 is not a row with id, frames and figures"),
        (lambda b: write_evaluation(b, []), "holds no sequences"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_sentence(tmp_path, monkeypatch, prepare, message):
    write_evaluation(tmp_path / "a", [0.1, 0.2, 0.3])
    prepare(tmp_path / "b")
    paths = [tmp_path / "a" / "metrics.json", tmp_path / "b" / "metrics.json"]
    with pytest.raises(ComparisonError, match=message):
        compare(paths)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, paths)])
    with pytest.raises(SystemExit) as stop:
        run_script_words("compare.py")
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert not (tmp_path / "comparison.json").exists()
    with pytest.raises(ComparisonError, match=r"at least two metrics\.json, found 1"):
        compare(paths[:1])


def run_script_words(name):
    import runpy

    from corpora import ROOT

    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


@given(st.lists(st.sampled_from(["a/best", "b/best", "x/a/best", "best", "/best", "user/model"]), min_size=1))
def test_names_of_models_are_short_and_differ(paths):
    names = name_paths(paths)
    assert len(set(names)) == len(names) == len(paths)
    assert all(name and "/" not in name for name in names)
    assert len(paths) > 1 or names == [paths[0].rsplit("/", 1)[-1]]


def test_evaluate_compares_models_and_compare_finds_the_same(tmp_path, monkeypatch, capsys):
    place = make_corpus(tmp_path / "corpus")
    models = place / "model", "--model", place / "other_model"
    run_script(monkeypatch, "evaluate.py", model=models, data=place / "data", split="val", output=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "model" in printed and "other_model" in printed and "3 sequences" in printed
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["names"] == ["model", "other_model"] and found["sequences"] == 3
    for name, column in (("model", 0), ("other_model", 1)):
        metrics = json.loads((tmp_path / "out" / name / "metrics.json").read_text())
        for row in found["figures"]:
            table = metrics["overall"] if row["part"] == "overall" else metrics["parts"][row["part"]]
            assert math.isclose(row["values"][column], table[row["metric"]], rel_tol=1e-9)
    monkeypatch.chdir(tmp_path)
    words = [str(tmp_path / "out" / name) for name in ("model", "other_model")]
    monkeypatch.setattr("sys.argv", ["compare.py", *words, "--output", "again.json"])
    run_script_words("compare.py")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == found
