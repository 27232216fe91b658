"""A saved checkpoint is complete: a process that never saw the package loads it and gives exactly the same codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerModel

PACKAGE = Path(__file__).parents[1] / "modeling_pose_tokenizer"

# Loads, uses, saves again and loads that: what a user does who has transformers and the checkpoint, nothing else.
STRANGER = """
import sys
import numpy as np
import torch


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_pose_tokenizer":
            raise ModuleNotFoundError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocker())
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

checkpoint, again, poses_file, output = sys.argv[1:]
results = {}
for name, folder in (("first", checkpoint), ("again", again)):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    feature_extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    inputs = feature_extractor(np.load(poses_file), fps=30.0, return_tensors="pt")
    with torch.no_grad():
        codes = model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes
        values = model.decode(codes, inputs["padding_mask"]).pose_values
    formatter = get_class_from_dynamic_module("codes_pose_tokenizer.PoseCodeFormatter", folder)
    results[f"{name}_codes"] = codes.numpy()
    results[f"{name}_poses"] = feature_extractor.postprocess(values, inputs)[0]
    assert type(model).__module__.startswith("transformers_modules.")
    assert config.num_codebooks == codes.shape[1] and formatter.__name__ == "PoseCodeFormatter"
    if name == "first":
        model.save_pretrained(again)
        feature_extractor.save_pretrained(again)
np.savez(output, **results)
"""


@pytest.fixture(scope="module")
def poses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    poses = generator.normal(300, 80, (37, 17, 3)).astype(np.float32)
    poses[..., 2] = generator.uniform(0, 1, poses.shape[:2])
    path = tmp_path_factory.mktemp("poses") / "poses.npy"
    np.save(path, poses)
    return path


def test_the_checkpoint_holds_code_and_safe_weights_only(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in PACKAGE.glob("*_pose_tokenizer.py")} <= names
    assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= names
    assert {Path(name).suffix for name in names} <= {".py", ".json", ".safetensors", ".md"}
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    extractor = json.loads((checkpoint / "preprocessor_config.json").read_text("utf-8"))
    assert config["auto_map"] == {
        "AutoConfig": "configuration_pose_tokenizer.PoseTokenizerConfig",
        "AutoModel": "modeling_pose_tokenizer.PoseTokenizerModel",
    }
    assert extractor["auto_map"] == {"AutoFeatureExtractor": "feature_extraction_pose_tokenizer.PoseFeatureExtractor"}


def test_a_stranger_gets_the_same_codes(checkpoint: Path, poses: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.npz"
    command = [sys.executable, "-c", STRANGER, checkpoint, tmp_path / "again", poses, output]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    result = subprocess.run(
        [str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    model = PoseTokenizerModel.from_pretrained(checkpoint).eval()
    feature_extractor = PoseFeatureExtractor.from_pretrained(checkpoint)
    inputs = feature_extractor(np.load(poses), fps=30.0, return_tensors="pt")
    with torch.no_grad():
        codes = model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes
        values = model.decode(codes, inputs["padding_mask"]).pose_values
    restored = feature_extractor.postprocess(values, inputs)[0]
    assert codes.unique().numel() > 1, "a model that always says the same proves nothing"
    with np.load(output) as results:
        for name in ("first", "again"):
            np.testing.assert_array_equal(results[f"{name}_codes"], codes.numpy())
            np.testing.assert_allclose(results[f"{name}_poses"], restored, rtol=1e-5)
    assert {path.name for path in checkpoint.glob("*.py")} == {path.name for path in (tmp_path / "again").glob("*.py")}
