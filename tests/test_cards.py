"""Cards say what was measured and what their owner wrote, and ask for the rest in one sentence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from corpora import ROOT, run_script
from described import DESCRIPTION, make_described_corpus, write_description
from modeling_pose_tokenizer import cards
from modeling_pose_tokenizer.cards import FILLED, CardError, is_filled, make_card, make_model_card
from modeling_pose_tokenizer.extraction import read_manifest

TEMPLATES = ROOT / "model_card.md", ROOT / "CITATION.cff"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, what its card is filled from, and tokens of two splits."""
    return make_described_corpus(tmp_path_factory.mktemp("cards"))


@pytest.fixture
def place(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the model and what its card is filled from, to be changed."""
    shutil.copytree(corpus / "model", tmp_path / "model")
    for name in ("metrics.json", "config.yaml", "data.yaml"):
        shutil.copy(corpus / name, tmp_path)
    return tmp_path


def fill(place: Path, **options: Any) -> str:
    return make_model_card(place / "model", "someone/codec", *TEMPLATES, **options)


def test_a_model_card_says_what_was_measured(place: Path) -> None:
    card, metrics = fill(place), json.loads((place / "metrics.json").read_text("utf-8"))
    data = ModelCard(card).data
    found = data.to_dict()
    assert (found["license"], found["library_name"]) == ("cc-by-4.0", "transformers") and data.model_name == "codec"
    found = {entry.metric_name: entry for entry in data.eval_results or []}
    assert {entry.dataset_name for entry in found.values()} == {"held out"}
    rows = {"all": metrics["overall"], **metrics["parts"]}
    assert len(found) == len(rows)
    for part, row in rows.items():
        value = 100 * row["mpjpe"]
        assert found[f"Mean distance, {part} (% of shoulder width)"].metric_value == pytest.approx(value, abs=0.005)
        assert f"| {part} | {value:.2f} % |" in card
    for words in ("home videos", "12,345", "not stated", "(https://example.org/others)", DESCRIPTION["limits"]):
        assert words in card
    for words in ("max_steps: 7", "25 per second", "4 bits per frame", "@software", FILLED):
        assert words in card
    # Neither what Jinja leaves of a name that it does not know, nor a path of the machine that trained.
    assert not re.search(r"\{\{ |\{%|\bNone\b|\bnan\b", card) and str(place) not in card and "num_epochs" not in card
    assert 'revision="v1", trust' in fill(place, revision="v1")


def test_several_evaluations_are_several_tables(place: Path) -> None:
    metrics = json.loads((place / "metrics.json").read_text("utf-8"))
    metrics["parts"]["body"] = dict.fromkeys(metrics["parts"]["body"])  # never seen there
    (place / "away").mkdir()
    (place / "away" / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    sets = [{"name": "at home"}, {"name": "on the road", "metrics": "away/metrics.json"}]
    card = fill(place, description=write_description(place, evaluation=sets))
    assert "### at home" in card and "### on the road" in card and "| body | not seen |" in card
    names = [(entry.dataset_name, entry.metric_name) for entry in ModelCard(card).data.eval_results or []]
    assert len(names) == len(set(names)) == 3


def change(key: str, value: Any, name: str = "metrics.json") -> Callable[[Path], object]:
    """Sets a key of a JSON file, or with `...` removes it."""

    def apply(place: Path) -> None:
        content = json.loads((place / name).read_text("utf-8"))
        *path, last = re.split(r"\.(?!\d)", key)
        inner = content
        for step in path:
            inner = inner[step]
        inner[last] = value
        if value is ...:
            del inner[last]
        (place / name).write_text(json.dumps(content), "utf-8")

    return apply


def say(**changes: Any) -> Callable[[Path], object]:
    return lambda place: write_description(place, **changes)


def remove(name: str) -> Callable[[Path], object]:
    return lambda place: (place / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("metrics.json"), r"metrics\.json: is missing; make it with scripts/evaluate\.py"),
        (remove("config.yaml"), r"config\.yaml: is missing; training/train\.py writes it"),
        (remove("data.yaml"), r"data\.yaml: is missing; write it, push_to_hub\.py --help shows one"),
        (write("metrics.json", "{"), r"metrics\.json: is damaged .* scripts/evaluate\.py"),
        (write("metrics.json", "[]"), r"metrics\.json: holds a list"),
        (write("data.yaml", "license: [mit"), r"data\.yaml: is damaged"),
        (write("config.yaml", "training: {speed: 1}"), r"unknown key training\.speed"),
        (write("config.yaml", "model: {skeleton: coco_17, num_quantizers: 3}"), "is of another model, whose "),
        *(
            (change(key, ...), f"has no {re.escape(key)}; make it with scripts/evaluate")
            for key in (
                "overall.mpjpe",
                "overall.pck@0.1",
                "parts.body.velocity_error",
                "parts.body",
                "tokens.bitrate",
                "tokens.compression_ratio",
                "data.sequences",
            )
        ),
        (change("overall.mpjpe", None), r"overall\.mpjpe is null, nothing was measured"),
        (change("tokens.bits_per_frame", 99), "of another model, of 99 bits per frame"),
        (change("tokens.beam_size", 8), "was measured with beam_size 8, the model has 1"),
        *(
            (say(**{key: None}), f"{key} is missing, and nobody but you knows")
            for key in (
                "license",
                "training_data",
                "evaluation",
                "limits",
            )
        ),
        (say(training_data=[{"name": "x", "license": "MIT"}]), r"training_data\[0\]\.description is missing"),
        (say(training_data=[{"name": "x", "description": "y"}]), r"training_data\[0\]\.license is missing"),
        (say(evaluation=[{"split": "val"}]), r"evaluation\[0\]\.name is missing"),
        (say(evaluation=[{"name": "x", "metrics": "no.json"}]), r"no\.json: is missing"),
        (say(evaluation="val"), "evaluation is 'val'; expected a list"),
        (say(licence="mit"), "unknown key licence"),
        (say(training="no.yaml"), r"no\.yaml: is missing"),
    ],
)
def test_nothing_is_invented(place: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(place)
    with pytest.raises(CardError, match=message) as error:
        fill(place)
    assert str(place) in str(error.value) and "\n" not in str(error.value)


def test_the_command_writes_the_card_or_says_what_is_missing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = {"model": place / "model", "repo_id": "someone/codec", "card": place / "card.md"}
    run_script(monkeypatch, "push_to_hub.py", **options)
    assert (place / "card.md").read_text("utf-8") == fill(place) and is_filled(place / "card.md")
    assert capsys.readouterr().out.strip() == str(place / "card.md")
    with pytest.raises(SystemExit, match=r"cannot be written \(No such file"):
        run_script(monkeypatch, "push_to_hub.py", **options | {"card": place / "absent" / "card.md"})
    (place / "data.yaml").rename(place / "elsewhere.yaml")
    with pytest.raises(SystemExit, match=r"data\.yaml: is missing"):
        run_script(monkeypatch, "push_to_hub.py", **options)
    run_script(monkeypatch, "push_to_hub.py", **options, data_card=place / "elsewhere.yaml")


def test_the_card_of_the_pretrained_model_is_filled_from_what_lies_beside_it() -> None:
    folder = ROOT / "pretrained" / "small"
    assert (folder / "README.md").read_text("utf-8") == make_model_card(folder, "pretrained/small", *TEMPLATES), (
        "fill it anew: the command is in pretrained/small/data.yaml"
    )


def test_a_card_says_what_the_manifest_says(corpus: Path) -> None:
    manifest = read_manifest(corpus / "tokens")
    manifest["splits"]["test-clean"] = manifest["splits"].pop("val")  # the Hub takes no such name for a split
    manifest |= {"model": "someone/codec", "model_revision": "abc123"}
    card = make_card(manifest, "someone/tokens", ROOT / "dataset_card.md")
    metadata = yaml.safe_load(card.split("---\n")[1])
    (config,) = metadata["configs"]
    assert [entry["split"] for entry in config["data_files"]] == ["train", "test_clean"]
    assert config["data_files"][0]["path"] == "train-?????-of-?????.parquet"
    assert "license" not in metadata and "stated no licence" in card
    assert metadata["size_categories"] == "n<1K"
    for words in (
        "[someone/codec]",
        'revision="abc123"',
        "bits per frame",
        "tokens per second",
        "| train | 6 | 143 |",
    ):
        assert words in card
    assert manifest["made_by"]["weights_sha256"][:16] in card and "{{" not in card and "None" not in card
    assert 'from_pretrained("USER/MODEL"' in make_card(manifest | {"model": None}, "a/b", ROOT / "dataset_card.md")
    counts = {999: "n<1K", 1000: "1K<n<10K", 123456: "100K<n<1M", 10**9: "1B<n<10B", 10**12: "n>1T"}
    assert {count: cards._size_category(count) for count in counts} == counts
