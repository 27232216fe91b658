"""What is loaded runs nothing: a file with a program in it is refused, and no name leads out of its folder."""

import hashlib
import json
import pickle
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModel

from corpora import ROOT, extract, make_corpus, run_script
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.extraction import TokenFolderError, read_manifest
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained
from modeling_pose_tokenizer.preparation import make_accelerator
from modeling_pose_tokenizer.presets import RunConfigError, load_run_config

RUN = {
    "model.skeleton": "coco_17",
    "model.num_quantizers": 2,
    "model.hidden_size": 8,
    "model.joint_hidden_size": 4,
    "model.num_part_layers": 1,
    "model.codebook_size": 8,
    "model.codebook_dim": 4,
    "data.sequence_length": 8,
    "data.num_workers": 0,
    "training.use_amp": "false",
    "training.num_threads": 1,
    "training.batch_size": 3,
    "training.init_batches": 2,
    "tracking.pictures": 0,
}


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that a payload touches; shown to do so, so that its absence says something."""
    path = tmp_path / "the-payload-ran"
    pickle.loads(pickle.dumps(Payload(path)))
    path.unlink()
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_corpus(tmp_path_factory.mktemp("safety"))
    extract(place, place / "tokens", split="val")
    return place


def save_payload(path: Path, marker: Path) -> None:
    torch.save({"payload": Payload(marker)}, path.with_name("payload"))  # which refuses hidden names
    path.with_name("payload").rename(path)


def pickle_payload(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(marker), protocol=2))  # that of torch


WRITERS = (save_payload, pickle_payload)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_never_run(
    corpus: Path, tmp_path: Path, marker: Path, name: str, write: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(corpus / "model", folder)
    (folder / "model.safetensors").unlink()
    write(folder / name, marker)
    with pytest.raises(ModelFolderError):
        load_pretrained(folder)
    with pytest.raises(Exception, match=r".") as error:  # transformers' own, whichever it is
        AutoModel.from_pretrained(folder)
    assert not isinstance(error.value, AssertionError) and not marker.exists()


# ---- checkpoints of a training run ----------------------------------------------------------------------------------


def run_training(corpus: Path, output: Path, steps: int) -> int:
    options = RUN | {"data.path": corpus / "data", "training.output_dir": output, "training.max_steps": steps}
    try:
        script = runpy.run_path(str(ROOT / "training" / "train.py"))
        return script["main"]([f"--{key}={value}" for key, value in options.items()])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "stopped"
    assert run_training(corpus, output, 2) == 0
    return output


def replace_in_checkpoint(folder: Path, change: Callable[[Path], None]) -> None:
    """Changes a checkpoint, and its manifest with it, as whoever means harm would."""
    change(folder)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "average.bin",
        "progress.bin",
        "pytorch_model.bin",
        "custom_checkpoint_0.pkl",
        "pytorch_model_fsdp_0/.metadata",
    ],
)
def test_a_checkpoint_never_runs(
    corpus: Path,
    stopped: Path,
    tmp_path: Path,
    marker: Path,
    capfd: pytest.CaptureFixture,
    name: str,
    write: Callable[[Path, Path], None],
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, marker)
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()

    replace_in_checkpoint(output / "checkpoints" / "step-00000002", change)
    assert run_training(corpus, output, 3) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert name in lines[-1] and "remove the folder to go on from an earlier one" in lines[-1]
    assert not marker.exists() and not any("Traceback" in line for line in lines)


def test_the_same_checkpoint_unchanged_goes_on(corpus: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    replace_in_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002", lambda folder: None)
    assert run_training(corpus, tmp_path / "run", 3) == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-00000003").iterdir()}
    # Of these, none but the safetensors is read in any other way than with weights_only.
    assert names == {
        *("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
        *("average.bin", "progress.bin", "manifest.json"),
    }


def test_sharded_states_which_only_unpickling_reads_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(RunConfigError, match="fsdp_state_dict_type is SHARDED_STATE_DICT"):
        make_accelerator(load_run_config([]), tmp_path)


# ---- data -----------------------------------------------------------------------------------------------------------


def dataset(corpus: Path, folder: Path, **options: object) -> PoseDataset:
    extractor = PoseFeatureExtractor.from_pretrained(corpus / "model")
    return PoseDataset(folder, "train", feature_extractor=extractor, cache_dir=folder / "cache", **options)


@pytest.mark.parametrize("key", ["poses", "mask", "fps", "more"])
def test_pose_files_never_run(corpus: Path, tmp_path: Path, marker: Path, key: str) -> None:
    folder = tmp_path / "data" / "train"
    shutil.copytree(corpus / "data" / "train", folder)
    with np.load(folder / "b.npz") as file:
        content = dict(file)
    content[key] = np.array([Payload(marker)], dtype=object)
    np.savez(folder / "b.npz", **content)
    pickle_payload(folder / "pickled.npz", marker)
    found = dataset(corpus, tmp_path / "data", max_rejected=1.0)
    rejected = {Path(row["path"]).name for row in found.rejected}
    assert "pickled.npz" in rejected and (key == "more" or "b.npz" in rejected) and not marker.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_a_cache_never_runs(corpus: Path, tmp_path: Path, marker: Path, write: Callable[[Path, Path], None]) -> None:
    shutil.copytree(corpus / "data" / "train", tmp_path / "data" / "train")
    dataset(corpus, tmp_path / "data")
    caches = list((tmp_path / "data" / "cache").rglob("*.arrow"))
    assert caches
    for path in caches:
        path.unlink()
        write(path, marker)
    with pytest.warns(UserWarning, match="is damaged .* it is built again"):
        again = dataset(corpus, tmp_path / "data")
    assert len(again) and not marker.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_token_folders_never_run(
    corpus: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Path], None]
) -> None:
    tokens = tmp_path / "tokens"
    shutil.copytree(corpus / "tokens", tokens)
    write(tokens / "manifest.json", marker)
    with pytest.raises(TokenFolderError):
        read_manifest(tokens)
    write(min(tokens.glob("*.parquet")), marker)
    with pytest.raises(SystemExit, match="is not a Parquet file"):
        run_script(monkeypatch, "decode_tokens.py", model=corpus / "model", tokens=tokens, output=tmp_path / "out")
    assert not marker.exists()


def test_a_shard_of_endless_codes_is_no_bomb(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that stand for the same code twenty million times."""
    shard = min((corpus / "tokens").glob("*.parquet"))
    table, count = pq.read_table(shard).slice(0, 1), 20_000_000
    codes = pa.ListArray.from_arrays([0, 1], pa.ListArray.from_arrays([0, count], pa.array(np.zeros(count, np.int16))))
    (tmp_path / "tokens").mkdir()
    bomb = tmp_path / "tokens" / shard.name
    pq.write_table(table.set_column(table.schema.get_field_index("codes"), "codes", codes), bomb, compression="zstd")
    assert bomb.stat().st_size < 200_000
    with pytest.raises(SystemExit, match=rf"{shard.name}: the shard declares 16\d+ bytes .* than the limit of 200"):
        run_script(monkeypatch, "decode_tokens.py", model=corpus / "model", tokens=bomb, output=tmp_path / "out")


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "{absolute}/escaped", "a\0b"])
def test_no_name_of_a_sequence_leads_out(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokens, output = tmp_path / "tokens", tmp_path / "deep" / "out"
    shutil.copytree(corpus / "tokens", tokens)
    shard = min(tokens.glob("*.parquet"))
    table = pq.read_table(shard)
    ids = [name.format(absolute=tmp_path), *table["id"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.schema.get_field_index("id"), "id", [ids]), shard)
    before = {path for path in tmp_path.rglob("*") if output not in path.parents}
    with pytest.raises(SystemExit, match="leads out of the output folder"):
        run_script(monkeypatch, "decode_tokens.py", model=corpus / "model", tokens=tokens, output=output)
    after = {path for path in tmp_path.rglob("*") if output not in path.parents}
    assert after - before <= {output, output.parent}


@pytest.mark.parametrize("name", ["../name", "a/b/c", "a/..", "../../name", "a/b ", "a/-b", "/a/b", "~/b", "a/b.git"])
def test_no_name_of_a_repository_leads_out(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFolderError):
        load_pretrained(name)
    with pytest.raises(SystemExit, match="nothing was published, expected USER/NAME"):
        run_script(monkeypatch, "push_to_hub.py", model=corpus / "model", repo_id=name, plain_card=())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../data/train", "..", ".", "", "nested/../train", "train/nested", "{absolute}"])
def test_no_name_of_a_split_leads_out(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    name = name.format(absolute=corpus / "data" / "train")
    options = {"model": corpus / "model", "data": corpus / "data", "split": name, "output": tmp_path / "tokens"}
    with pytest.raises(SystemExit, match="expected the name of a folder in"):
        run_script(monkeypatch, "extract_tokens.py", **options)
    assert not list(tmp_path.iterdir())
