"""A checkpoint folder loads as it is, survives a killed writer, and a wrong one is refused in one sentence; models and
tokens go to a Hub and come back."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from corpora import ROOT, extract, make_model, run_script
from described import make_described_corpus
from hub_server import TOKEN, HubServer, Repository
from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.decoding import decode_tokens
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import read_npz
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained, save_checkpoint
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.preparation import make_accelerator
from modeling_pose_tokenizer.presets import RunConfigError, load_run_config


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
# The client tries again and again where a connection is cut; here it does not wait in between.
COMMANDS = """
import contextlib, io, json, os, runpy, sys
import huggingface_hub.utils._http as http

http.time = type("Time", (), {"sleep": lambda seconds: None, "time": http.time.time})
for token, script, *arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"], sys.argv, text = token, [script, *arguments], io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
        result = [0, text.getvalue()]
    except SystemExit as error:
        result = [int(bool(error.code)), text.getvalue() if isinstance(error.code, int) else str(error.code)]
    print("RESULT " + json.dumps(result))
"""
SECRETS = {"WANDB_API_KEY": "wandb_secret", "AWS_SECRET_ACCESS_KEY": "aws_secret"}
PUSH = str(ROOT / "scripts" / "push_to_hub.py")


def run_commands(hub: HubServer, home: Path, *commands: list, said: list[str] | None = None) -> list[list]:
    """What each of the commands says, given as a token, a script and arguments; [exit code, text].

    All that the process printed is added to `said`.
    """
    result = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([[str(word) for word in words] for words in commands])],
        env=hub.environment(home) | SECRETS,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if said is not None:
        said += [result.stdout, result.stderr]
    found = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(found) == len(commands), result.stdout + result.stderr
    return found


def publish(hub: HubServer, home: Path, *commands: list) -> list[list]:
    """What each of the commands of push_to_hub.py says, given as a token and arguments."""
    return run_commands(hub, home, *([token, PUSH, *arguments] for token, *arguments in commands))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and in `tokens` those of two splits, in `partly` an incomplete split."""
    place = make_described_corpus(tmp_path_factory.mktemp("publishing"))
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
        assert "someone/tokens: exists and is public" in texts[3]
        assert "no name: nothing was published, expected USER/NAME" in texts[4]
        assert "someone/other: nothing was published, the token was refused" in texts[5] and "401" in texts[5]
        assert ("datasets", "someone/other") not in hub.repositories
        codec = hub.repositories["models", "someone/codec"].branches["main"]
        assert set(codec) == {path.name for path in model.iterdir()} - {".secret"} | {"README.md"}
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


# What a user does who has transformers alone: the card's own code, at the revision that is asked for.
STRANGER = """
import json, sys
import numpy as np
sys.modules["modeling_pose_tokenizer"] = None
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor

poses, fps = np.load(sys.argv[1]), 30.0
results = {}
for number, revision in enumerate(sys.argv[2:]):
    text = ModelCard.load("someone/codec").text if revision == "main" else ""
    options = {"revision": revision, "trust_remote_code": True}
    config = AutoConfig.from_pretrained("someone/codec", **options)
    model = AutoModel.from_pretrained("someone/codec", **options)
    processor = AutoProcessor.from_pretrained("someone/codec", **options)
    feature_extractor = AutoFeatureExtractor.from_pretrained("someone/codec", **options)
    assert type(processor) is type(feature_extractor) and processor.to_dict() == feature_extractor.to_dict()
    assert processor.mean is not None, "the statistics did not come along"
    inputs = processor(poses, fps=fps, return_tensors="pt")
    codes = model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes
    if "```python" in text:
        exec(text.split("```python")[1].split("```")[0])
        results["reconstruction"] = reconstruction
    results[f"codes_{number}"] = codes.numpy()
np.savez("stranger.npz", **results)
"""
# `model.push_to_hub`, of a model that was loaded, of one with its feature extractor, and while saving.
METHOD = """
import sys
from modeling_pose_tokenizer.hub import load_pretrained

model, feature_extractor = load_pretrained(sys.argv[1])
model.push_to_hub("someone/first")
print(model.push_to_hub("someone/second", feature_extractor=feature_extractor, revision="v1", tags=["mine"]).oid)
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="someone/third", private=True)
"""


def run_python(hub: HubServer, home: Path, code: str, *arguments: object) -> str:
    """What a program prints in a process whose Hub is the test's, in the folder `home`."""
    home.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=hub.environment(home / "cache"),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_model_goes_in_one_commit_and_comes_back_by_revision(corpus: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    shutil.copytree(corpus, later, ignore=shutil.ignore_patterns("tokens", "partly", "data", "cache"))
    make_model(later / "model", seed=5)
    (later / "model" / "pytorch_model.bin").write_bytes(b"a pickle")
    poses = np.random.default_rng(0).normal(300, 80, (37, 17, 3)).astype(np.float32)
    poses[..., 2] = 0.9
    np.save(tmp_path / "poses.npy", poses)
    with HubServer() as hub:
        arguments = ["--repo-id", "someone/codec", "--model"]
        commands = [[TOKEN, PUSH, *arguments, folder / "model"] for folder in (corpus, later)]
        (tmp_path / "method.py").write_text(METHOD, "utf-8")
        hub.repositories["models", "someone/first"] = Repository(branches={"main": {"README.md": b"mine"}})
        method = [TOKEN, tmp_path / "method.py", corpus / "model", tmp_path / "saved"]
        results = run_commands(hub, tmp_path / "home", *commands, method)
        assert [code for code, _ in results] == [0, 0, 0], results
        check_method(hub, corpus / "model", tmp_path / "saved")
        first, second, _ = (text.strip().rpartition("/")[2] for _, text in results)
        repository = hub.repositories["models", "someone/codec"]
        assert list(repository.commits) == [first, second] and first != second
        assert sum("codec/commit/" in request for request in hub.requests) == 2
        for commit in repository.commits.values():
            assert {Path(name).suffix for name in commit} == {".py", ".json", ".safetensors", ".md"}
            assert {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"} <= set(commit)
        run_python(hub, tmp_path / "stranger", STRANGER, tmp_path / "poses.npy", first, second, "main")
    with np.load(tmp_path / "stranger" / "stranger.npz") as found:
        for number, folder in enumerate((corpus, later, later)):
            model, feature_extractor = load_pretrained(folder / "model")
            inputs = feature_extractor(poses, fps=30.0, return_tensors="pt")
            codes = model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes
            np.testing.assert_array_equal(found[f"codes_{number}"], codes.numpy())
        assert (found["codes_0"] != found["codes_1"]).any() and found["reconstruction"].shape == poses.shape


def check_method(hub: HubServer, model: Path, saved: Path) -> None:
    """What `model.push_to_hub` and `save_pretrained(push_to_hub=True)` published is whole too."""
    expected = {path.name for path in model.iterdir()} - {".secret"} | {"README.md"}
    extractor = json.loads((model / "preprocessor_config.json").read_text("utf-8"))
    first, second, third = (hub.repositories["models", f"someone/{name}"] for name in ("first", "second", "third"))
    for repository, branch in ((first, "main"), (second, "v1"), (third, "main")):
        files = repository.branches[branch]
        assert set(files) == expected and len(repository.commits) == 1
        assert json.loads(files["preprocessor_config.json"]) == extractor
    assert first.branches["main"]["README.md"] == b"mine"
    card = second.branches["v1"]["README.md"].decode()
    assert second.branches["main"] == {} and third.private and "- mine" in card
    assert "4 bits per frame" in card and "has stated no evaluation" in card
    assert {path.name for path in saved.iterdir()} == expected - {"README.md"}


# A connection that is cut, a token without rights: which requests, and what is said.
FAULTS = {
    "files": ("PUT /lfs/.*", "drop", "the connection failed; run the same command again ("),
    "commit": ("POST .*/commit/.*", "drop", "the connection failed; run the same command again ("),
    "making": ("POST /api/repos/create", "forbid", "the token may not write there; check"),
    "writing": ("POST .*/commit/.*", "forbid", "the token may not write there; check"),
}


def test_what_fails_is_said_in_one_sentence_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    earlier = {"README.md": b"of an earlier upload"}
    pull = [TOKEN, ROOT / "scripts" / "extract_tokens.py", "--data", corpus / "data", "--output", tmp_path / "tokens"]
    with HubServer() as hub:
        for name, (pattern, kind, _) in FAULTS.items():
            hub.faults[f"someone/{name}-new"] = (pattern, kind)
            if name != "making":
                hub.faults[f"someone/{name}-known"] = (pattern, kind)
            hub.repositories["models", f"someone/{name}-known"] = Repository(branches={"main": dict(earlier)})
        whole = {path.name: path.read_bytes() for path in (corpus / "model").iterdir()}
        hub.repositories["models", "someone/codec"] = Repository(branches={"main": whole})
        hub.faults["someone/codec"] = (".* /someone/codec/resolve/.*safetensors", "drop")
        pushes = [[TOKEN, PUSH, "--model", corpus / "model", "--repo-id", name] for name in hub.faults][:-1]
        results = run_commands(
            hub,
            tmp_path / "home",
            *pushes,
            [*pull, "--model", "someone/missing"],
            [*pull, "--model", "someone/codec", "--revision", "v9"],
            [*pull, "--model", "someone/codec"],
        )
        for (code, text), name in zip(results, hub.faults, strict=False):
            assert code == 1 and "\n" not in text and TOKEN not in text
            if name == "someone/codec":
                break
            _, _, message = FAULTS[name.removeprefix("someone/").split("-")[0]]
            assert text.startswith(f"{name}: nothing was published, {message}")
            found = hub.repositories.get(("models", name))
            assert found is None or found.branches == {"main": earlier if name.endswith("known") else {}}
    for (code, text), name in zip(results[len(pushes) :], ("missing", "codec", "codec"), strict=True):
        assert code == 1 and "\n" not in text
        assert text.startswith(f"someone/{name}: no pose tokenizer can be loaded from it (")
    assert "v9" in results[-2][1] and not (tmp_path / "tokens").exists()


# The smallest run that has three best models to publish.
RUN = [
    *("--model.skeleton=coco_17", "--model.num_quantizers=2", "--model.hidden_size=8", "--model.joint_hidden_size=4"),
    *("--model.num_part_layers=1", "--model.codebook_size=8", "--model.codebook_dim=4", "--data.sequence_length=8"),
    *("--data.num_workers=0", "--training.num_threads=1", "--training.max_steps=6", "--training.batch_size=3"),
    *("--training.init_batches=2", "--training.eval_every=2", "--training.save_every=6", "--training.use_amp=false"),
    *("--tracking.pictures=1", "--hub.push=true"),
]


def test_a_run_publishes_its_best_model_and_no_secret(corpus: Path, tmp_path: Path) -> None:
    train = [TOKEN, ROOT / "training" / "train.py", "--data.path", corpus / "data", *RUN]
    output, refused = tmp_path / "run", tmp_path / "refused"
    command = ["--model", refused / "best", "--repo-id", "someone/later", "--plain-card", "--private"]
    extraction = ["--data", corpus / "data", "--split", "val", "--output", tmp_path / "tokens"]
    said: list[str] = []
    with HubServer() as hub:
        hub.faults["someone/refused"] = ("POST .*/commit/.*", "drop")
        results = run_commands(
            hub,
            tmp_path / "home",
            [*train, "--training.output_dir", output, "--hub.repo_id", "someone/run", "--hub.every", "2"],
            [*train, "--training.output_dir", refused, "--hub.repo_id", "someone/refused", "--hub.private", "true"],
            [TOKEN, PUSH, *command],
            [TOKEN, ROOT / "scripts" / "extract_tokens.py", "--model", output / "best", *extraction],
            [TOKEN, PUSH, "--tokens", tmp_path / "tokens", "--repo-id", "someone/tokens"],
            said=said,
        )
        assert [code for code, _ in results] == [0, 1, 0, 0, 0], results
        run = hub.repositories["models", "someone/run"]
        assert 1 <= len(run.commits) == results[0][1].count("published: ") <= 3
        for path in (output / "best").iterdir():
            assert run.branches["main"][path.name] == path.read_bytes()
        assert b"has stated no evaluation" in run.branches["main"]["README.md"]
        # The run is whole all the same, and says how to publish it.
        assert (refused / "checkpoints" / "step-00000006").is_dir() and load_pretrained(refused / "best")
        words = shlex.join(map(str, command)).replace("someone/later", "someone/refused")
        assert f"repeat that with: python scripts/push_to_hub.py {words}" in results[1][1]
        assert hub.repositories["models", "someone/refused"].branches == {"main": {}}
        assert hub.repositories["models", "someone/later"].private
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        sent = [
            content
            for place in hub.repositories.values()
            for files in place.branches.values()
            for content in files.values()
        ]
    assert len(written) > 50 and len(sent) > 30
    for secret in (TOKEN, *SECRETS.values()):
        assert not any(secret in text for text in said)
        assert not any(secret.encode() in path.read_bytes() for path in written)
        assert not any(secret.encode() in content for content in sent)


def test_a_run_that_could_not_publish_does_not_start(corpus: Path, tmp_path: Path) -> None:
    for words, message in [
        ([], "hub.repo_id is None; expected USER/NAME"),
        (["--hub.repo_id", "a/b/c"], "hub.repo_id is a/b/c; expected USER/NAME"),
        (["--hub.repo_id", "../secret"], r"hub.repo_id is ../secret; expected USER/NAME"),
        (["--hub.repo_id", "someone/name"], "there is no token; set HF_TOKEN"),
    ]:
        run = load_run_config(["--data.path", str(corpus / "data"), *RUN, *words])
        with pytest.raises(RunConfigError, match=re.escape(message)):
            make_accelerator(run, tmp_path / "run")
    with pytest.raises(RunConfigError, match=r"unknown key hub\.repository; the nearest valid one is hub\.repo_id"):
        load_run_config(["--hub.repository", "someone/name"])
    with pytest.raises(RunConfigError, match=r"hub\.every is 0; expected at least 1"):
        load_run_config(["--hub.every", "0"])
    assert not list(tmp_path.iterdir())


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
    escaping = tmp_path / "escaping"
    shutil.copytree(corpus / "tokens", escaping)
    manifest = json.loads((escaping / "manifest.json").read_text("utf-8"))
    shutil.copy(escaping / manifest["splits"]["train"]["shards"][0], tmp_path / "secret.parquet")
    manifest["splits"]["train"]["shards"][0] = "../secret.parquet"
    (escaping / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    codeless = tmp_path / "codeless"
    shutil.copytree(corpus / "model", codeless)
    (codeless / "modeling_pose_tokenizer.py").unlink()
    (codeless / "README.md").write_text("mine", "utf-8")
    for options, message in [
        ({"tokens": corpus / "partly"}, r"train is not complete \(1 of 4 shards missing\)"),
        ({"tokens": tmp_path / "empty"}, r"has no manifest\.json"),
        ({"tokens": foreign}, "is damaged, or not of the model that manifest.json names"),
        ({"tokens": fewer}, r"the split val has \d rows; expected 3"),
        ({"tokens": tmp_path / "absent"}, r"has no manifest\.json"),
        ({"model": corpus / "data"}, r"config\.json"),
        ({"model": "someone/codec"}, "no such folder"),
        ({"model": codeless}, r"config\.json has no modeling_pose_tokenizer\.py beside it"),
        ({"tokens": escaping}, r"manifest\.json names '\.\./secret\.parquet' as a shard of train"),
    ]:
        with pytest.raises(SystemExit, match=message) as error:
            run_script(monkeypatch, "push_to_hub.py", **options, repo_id="someone/name")
        assert isinstance(error.value.code, str) and "\n" not in error.value.code


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "a", "tokens": "b"},
        {"model": "a", "license": "mit"},
        {"tokens": "a", "card": "b"},
        {"tokens": "a", "plain_card": ()},
        {"model": "a", "token": "hf_secret"},
    ],
)
def test_bad_options_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: dict[str, str]
) -> None:
    with pytest.raises(SystemExit) as error:
        run_script(monkeypatch, "push_to_hub.py", **options, repo_id="someone/name")
    assert error.value.code == 2 and "usage" in capsys.readouterr().err
