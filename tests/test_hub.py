"""A checkpoint folder loads as it is, survives a killed writer, and a wrong one is refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained, save_checkpoint
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel


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
