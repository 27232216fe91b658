"""A checkpoint folder loads as it is, survives a killed writer, and a wrong one is refused in one sentence; models and
tokens go to a Hub and come back."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from corpora import ROOT, extract, make_corpus, run_script
from hub_server import TOKEN, HubServer, Repository
from transformers import AutoFeatureExtractor, AutoModel

from modeling_pose_tokenizer import publishing
from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.decoding import decode_tokens
from modeling_pose_tokenizer.extraction import read_manifest
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import read_npz
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained, save_checkpoint
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.publishing import make_card


@pytest.fixture
def model() -> PoseTokenizerModel:
    sizes = {"hidden_size": 8, "joint_hidden_size": 4, "codebook_size": 8, "codebook_dim": 4, "num_part_layers": 1}
    return PoseTokenizerModel(PoseTokenizerConfig(skeleton="coco_17", num_quantizers=2, **sizes)).eval()


@pytest.fixture
def folder(model: PoseTokenizerModel, tmp_path: Path) -> Path:
    save_checkpoint(model, PoseFeatureExtractor.from_config(model.config), tmp_path / "best")
    return tmp_path / "best"


def test_what_is_saved_loads_as_it_is(model: PoseTokenizerModel, folder: Path) -> None:
    poses = torch.randn(2, 9, 17, 3).abs()
    loaded, feature_extractor = load_pretrained(folder)
    assert not loaded.training
    assert torch.equal(loaded.encode(poses).pose_codes, model.encode(poses).pose_codes)
    assert feature_extractor.layout == model.config.layout
    assert isinstance(AutoModel.from_pretrained(folder), PoseTokenizerModel)
    assert isinstance(AutoFeatureExtractor.from_pretrained(folder), PoseFeatureExtractor)
    assert (folder / "modeling_pose_tokenizer.py").is_file()


def test_a_folder_is_replaced_whole(model: PoseTokenizerModel, folder: Path) -> None:
    # What a writer that was killed leaves behind is neither loaded nor in the way.
    for leftover in (".best.new", ".best.old"):
        (folder.parent / leftover).mkdir()
        (folder.parent / leftover / "config.json").write_text("half")
    (folder / "stale.txt").touch()
    with torch.no_grad():
        model.missing_pose.fill_(0.25)
    save_checkpoint(model, PoseFeatureExtractor.from_config(model.config), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    assert not (folder / "stale.txt").exists()
    assert load_pretrained(folder)[0].missing_pose.eq(0.25).all()


def change(name: str, **values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(content | values), "utf-8")

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "config.json missing"),
        (remove("preprocessor_config.json"), "preprocessor_config.json missing"),
        (remove("model.safetensors"), "model.safetensors missing"),
        (truncate("config.json", 5), "is not a JSON object"),
        (truncate("preprocessor_config.json", 5), "not a valid JSON file"),
        (truncate("model.safetensors", 0), "no pose tokenizer can be loaded"),
        (truncate("model.safetensors", 999), "no pose tokenizer can be loaded"),
        (change("config.json", model_type="bert"), "a model of type bert; expected pose_tokenizer"),
        (change("config.json", hidden_size=9), "the weights do not fit config.json"),
        (change("config.json", num_part_layers=2), "the weights do not fit config.json"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    with pytest.raises(ModelFolderError) as info:
        load_pretrained(folder)
    assert words in str(info.value) and str(folder) in str(info.value) and "\n" not in str(info.value)


def test_the_wrong_folder_is_refused_in_one_sentence(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such folder"):
        load_pretrained(folder / "nothing")
    with pytest.raises(ModelFolderError, match="no such folder"):
        load_pretrained("nothing")
    with pytest.raises(ModelFolderError, match="is a file"):
        load_pretrained(folder / "config.json")
    with pytest.raises(ModelFolderError, match=f"did you mean {folder}"):
        load_pretrained(folder.parent)
    with pytest.raises(ModelFolderError, match="nobody/nothing: no pose tokenizer can be loaded"):
        load_pretrained("nobody/nothing")


# ---- publishing -----------------------------------------------------------------------------------------------------

# Runs commands one after another in a process whose Hub is the test's; prints what each says: [exit code, text].
COMMANDS = """
import contextlib, io, json, os, runpy, sys

for token, script, *arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"], sys.argv, text = token, [script, *arguments], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
        result = [0, text.getvalue()]
    except SystemExit as error:
        result = [1, str(error.code)]
    print("RESULT " + json.dumps(result))
"""
PUSH = str(ROOT / "scripts" / "push_to_hub.py")


def publish(hub: HubServer, home: Path, *commands: list) -> list[list]:
    """What each of the commands of push_to_hub.py says, given as a token and arguments."""
    words = [[token, PUSH, *map(str, arguments)] for token, *arguments in commands]
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(words)],
        env=hub.environment(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    found = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(found) == len(commands), result.stdout + result.stderr
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and in `tokens` those of two splits, in `partly` an incomplete split."""
    place = make_corpus(tmp_path_factory.mktemp("publishing"))
    for split in ("train", "val"):
        extract(place, place / "tokens", split=split)
    extract(place, place / "partly")
    (place / "partly" / "train-00001-of-00004.parquet").unlink()
    return place


def test_models_and_tokens_go_to_the_hub_and_come_back(corpus: Path, tmp_path: Path) -> None:
    model, tokens, copy = corpus / "model", corpus / "tokens", tmp_path / "copy"
    (model / ".secret").write_text("nobody else's business")
    shutil.copytree(tokens, copy)
    (copy / "README.md").write_text("---\nlicense: mit\n---\nA card of my own.\n")
    card = ["--license", "cc-by-4.0", "--made-by", "someone/codec"]
    with HubServer() as hub:
        # Of an earlier upload: shards that are no more, and what is none of ours.
        earlier = {"train-00000-of-00009.parquet": b"old", "notes.txt": b"mine"}
        hub.repositories["datasets", "someone/tokens"] = Repository(branches={"main": earlier})
        results = publish(
            hub,
            tmp_path / "home",
            [TOKEN, "--model", model, "--repo-id", "someone/codec"],
            [TOKEN, "--tokens", tokens, "--repo-id", "someone/tokens", *card],
            [TOKEN, "--tokens", copy, "--repo-id", "someone/copy", "--private", "--revision", "v1"],
            [TOKEN, "--tokens", tokens, "--repo-id", "someone/tokens", "--private"],
            [TOKEN, "--tokens", tokens, "--repo-id", "no name"],
            ["hf_wrong", "--tokens", tokens, "--repo-id", "someone/other"],
        )
        assert [code for code, _ in results] == [0, 0, 0, 1, 1, 1], results
        texts = [text.strip() for _, text in results]
        assert not any("\n" in text for text in texts)
        assert "someone/tokens: exists and is public" in texts[3] and "no name: cannot be published" in texts[4]
        assert "someone/other: cannot be published (" in texts[5] and "401" in texts[5]
        assert ("datasets", "someone/other") not in hub.repositories
        codec = hub.repositories["models", "someone/codec"].branches["main"]
        assert set(codec) == {path.name for path in model.iterdir()} - {".secret"}
        files = hub.repositories["datasets", "someone/tokens"].branches["main"]
        shards = {path.name for path in tokens.glob("*.parquet")}
        assert set(files) == {*shards, "manifest.json", "README.md", "notes.txt"}
        assert all(files[name] == (tokens / name).read_bytes() for name in shards)
        mine = hub.repositories["datasets", "someone/copy"]
        assert mine.private and mine.branches["main"] == {}
        assert mine.branches["v1"]["README.md"].decode() == (copy / "README.md").read_text()
        check_what_strangers_get(hub, files["README.md"].decode(), corpus, tmp_path)


def check_what_strangers_get(hub: HubServer, card: str, corpus: Path, home: Path) -> None:
    """The code of the card runs where the package is not installed, and gives what decoding at home gives."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL))
    code += "np.savez('result.npz', poses=poses, name=row['id'])\n"
    code += "print({split: data.num_rows for split, data in load_dataset('someone/tokens').items()})\n"
    block = "import sys\nsys.modules['modeling_pose_tokenizer'] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", block + code],
        env=hub.environment(home / "stranger", token=None) | {"PYTHONPATH": ""},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "{'train': 6, 'val': 3}" in result.stdout
    decode_tokens(*load_pretrained(corpus / "model"), corpus / "tokens", home / "poses", progress=False)
    with np.load(home / "result.npz") as found:
        (expected,) = read_npz(home / "poses" / f"{found['name']}.npz")
        np.testing.assert_allclose(found["poses"], expected.poses, atol=1e-2)


def test_nothing_incomplete_is_published(corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of it before anything is sent: there is no Hub here."""
    (tmp_path / "empty").mkdir()
    foreign = tmp_path / "foreign"
    shutil.copytree(corpus / "tokens", foreign)
    shard = min(foreign.glob("val-*.parquet"))
    table = pq.read_table(shard)
    pq.write_table(table.replace_schema_metadata(None), shard)
    fewer = tmp_path / "fewer"
    shutil.copytree(corpus / "tokens", fewer)
    pq.write_table(table.slice(0, 0), fewer / shard.name)
    for options, message in [
        ({"tokens": corpus / "partly"}, r"train is not complete \(1 of 4 shards missing\)"),
        ({"tokens": tmp_path / "empty"}, r"has no manifest\.json"),
        ({"tokens": foreign}, "is damaged, or not of the model that manifest.json names"),
        ({"tokens": fewer}, r"the split val has \d rows; expected 3"),
        ({"tokens": tmp_path / "absent"}, r"has no manifest\.json"),
        ({"model": corpus / "data"}, r"config\.json"),
        ({"model": "someone/codec"}, "no such folder"),
    ]:
        with pytest.raises(SystemExit, match=message) as error:
            run_script(monkeypatch, "push_to_hub.py", **options, repo_id="someone/name")
        assert isinstance(error.value.code, str) and "\n" not in error.value.code


@pytest.mark.parametrize(
    "options",
    [{}, {"model": "a", "tokens": "b"}, {"model": "a", "license": "mit"}, {"model": "a", "token": "hf_secret"}],
)
def test_bad_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: dict[str, str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run_script(monkeypatch, "push_to_hub.py", **options, repo_id="someone/name")
    assert error.value.code == 2 and "usage" in capsys.readouterr().err


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
    assert {count: publishing._size_category(count) for count in counts} == counts
