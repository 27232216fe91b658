"""The ONNX runtime says what feature extractor and model say, without torch, whole and in a stream."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import modeling_pose_tokenizer
from exports import export_model_of
from modeling_pose_tokenizer.export import export_model, sample_poses
from modeling_pose_tokenizer.runtime import PoseRuntime, RuntimeFolderError

ROOT = Path(__file__).parents[1]

# What a user does who has numpy and onnxruntime, and neither torch nor transformers.
STRANGER = """
import sys
import numpy as np


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "huggingface_hub"):
            raise ModuleNotFoundError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocker())
from modeling_pose_tokenizer.runtime import PoseRuntime

runtime = PoseRuntime(sys.argv[1], num_threads=1)
poses = list(np.load(sys.argv[2]).values())
inputs = runtime(poses, fps=[30.0, 12.0])
codes = runtime.encode(inputs["input_values"], inputs["padding_mask"])
values = runtime.decode(codes, inputs["padding_mask"])
restored = runtime.postprocess(values, inputs)
np.savez(sys.argv[3], codes=codes, first=restored[0], second=restored[1], **inputs)
assert not {"torch", "transformers"} & {name.split(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model's whole sequences and steps."""
    folder = tmp_path_factory.mktemp("onnx")
    differences = export_model(*export_model_of("causal"), folder, streaming=True)
    assert set(differences) == {"whole", "steps"}
    return folder


@pytest.fixture(scope="module")
def runtime(folder: Path) -> PoseRuntime:
    return PoseRuntime(folder, num_threads=1)


def raw_poses(lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Pixels, some of them missing or absurd."""
    generator = np.random.default_rng(0)
    sequences = []
    for length in lengths:
        poses = 300 + 80 * generator.normal(size=(1, 9, 4)) + generator.normal(size=(length, 9, 4)).cumsum(0)
        poses[..., -1] = generator.uniform(0, 1, poses.shape[:2])
        poses[generator.random(poses.shape[:2]) < 0.05] = np.nan
        sequences.append(poses)
    return sequences


def test_without_torch_everything_is_the_same(folder: Path, tmp_path: Path) -> None:
    model, extractor = export_model_of("causal")
    poses = raw_poses((40, 11))
    np.savez(tmp_path / "poses.npz", *poses)
    command = [sys.executable, "-c", STRANGER, folder, tmp_path / "poses.npz", tmp_path / "results.npz"]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inputs = extractor(poses, fps=[30.0, 12.0], return_tensors="pt")
    with torch.inference_mode():
        codes = model.encode(inputs["input_values"], inputs["padding_mask"]).pose_codes
        values = model.decode(codes, inputs["padding_mask"]).pose_values
    restored = extractor.postprocess(values, inputs)
    with np.load(tmp_path / "results.npz") as results:
        for name, tensor in inputs.items():
            np.testing.assert_array_equal(results[name], tensor.numpy())
        assert (results["codes"] != codes.numpy()).mean() <= 1e-3
        scale = inputs["scale"].numpy()
        for name, expected, unit in zip(("first", "second"), restored, scale, strict=True):
            np.testing.assert_allclose(results[name], expected, atol=1e-4 * unit, rtol=0)


def test_the_package_is_lazy_and_registers() -> None:
    """No torch before a name is asked for; whichever name comes first, the Auto classes know the model."""
    program = (
        "import sys, modeling_pose_tokenizer as package\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert set(package.__all__) <= set(dir(package))\n"
        "from modeling_pose_tokenizer import PoseFeatureExtractor\n"
        "from transformers import AutoConfig, AutoFeatureExtractor, AutoModel\n"
        "model = AutoModel.from_config(AutoConfig.for_model('pose_tokenizer', skeleton='coco_17', hidden_size=8))\n"
        "assert type(model) is package.PoseTokenizerModel\n"
        "assert AutoFeatureExtractor.from_pretrained(sys.argv[1]).__class__ is PoseFeatureExtractor\n"
    )
    command = [sys.executable, "-c", program, str(ROOT / "pretrained" / "small")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(getattr(modeling_pose_tokenizer, name) is not None for name in modeling_pose_tokenizer.__all__)


@pytest.mark.parametrize("pieces", [[1] * 23, [2] * 11 + [1], [23], [5, 1, 9, 8], [22]])
def test_streams_are_the_whole(runtime: PoseRuntime, pieces: list[int]) -> None:
    model, extractor = export_model_of("causal")
    poses, _ = sample_poses(model, extractor.mean, [sum(pieces)] * 2, seed=5)
    with torch.inference_mode():
        codes = model.encode(poses).pose_codes
        values = model.decode(codes).pose_values.numpy()
    stream = runtime.stream()
    for _ in range(2):  # a second stream in the same object knows nothing of the first
        found = [stream.push(frames) for frames in np.split(poses.numpy(), np.cumsum(pieces)[:-1], 1)]
        found.append(stream.flush())
        streamed = np.concatenate([each for each in found if each is not None], 2)
        assert (streamed != codes.numpy()).mean() <= 1e-3
        assert stream.flush() is None
        cuts = np.cumsum(pieces)[:-1] // model.config.hop_length
        parts = [stream.decode(part) for part in np.split(codes.numpy(), cuts, 2) if part.shape[2]]
        np.testing.assert_allclose(np.concatenate(parts, 1), values, atol=1e-4, rtol=0)
        stream.reset()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda r: r.encode(np.zeros((1, 5, 8, 4))), "expected .batch, frames, 9, 4"),
        (lambda r: r.encode(np.zeros((1, 0, 9, 4))), "at least one frame"),
        (lambda r: r.encode(np.zeros((1, 5, 9, 4)), np.ones((1, 4))), "padding_mask has shape"),
        (lambda r: r.decode(np.zeros((1, 2, 3), int)), "3, steps"),
        (lambda r: r.decode(np.full((1, 3, 3), 64)), "codes from 64 to 64; expected 0 to 63"),
        (lambda r: r.decode(np.zeros((1, 3, 3), int), np.ones((1, 3))), "3 code steps of 2"),
        (lambda r: r(np.zeros((4, 8, 4))), "poses have 8 keypoints"),
    ],
)
def test_what_does_not_fit_is_said(runtime: PoseRuntime, call: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(runtime)


def test_files_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match=r"encoder\.onnx is missing"):
        PoseRuntime(tmp_path)
    shutil.copy(folder / "encoder.onnx", tmp_path)
    runtime = PoseRuntime(tmp_path, num_threads=1)
    with pytest.raises(RuntimeFolderError, match="--streaming"):
        runtime.stream()
    shutil.copy(folder / "encoder.onnx", tmp_path / "decoder.onnx")
    codes = np.zeros((1, runtime.num_codebooks, 1), int)
    with pytest.raises(RuntimeFolderError, match="holds encoder"):
        runtime.decode(codes)
    other = onnx.load(folder / "decoder.onnx")
    next(each for each in other.metadata_props if each.key == "export_id").value = "another"
    onnx.save(other, tmp_path / "decoder.onnx")
    with pytest.raises(RuntimeFolderError, match="another export"):
        runtime.decode(codes)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "encoder.onnx")
    with pytest.raises(RuntimeFolderError, match="of another origin"):
        PoseRuntime(tmp_path)
    (tmp_path / "encoder.onnx").write_bytes(b"nothing")
    with pytest.raises(RuntimeFolderError, match="cannot load"):
        PoseRuntime(tmp_path)


def test_the_files_hold_for_any_batch_and_length(folder: Path) -> None:
    for name, axes in (("encoder", (0, 1)), ("decoder", (0, 2)), ("step_encoder", (0,)), ("step_decoder", (0,))):
        model = onnx.load(folder / f"{name}.onnx")
        onnx.checker.check_model(model)
        first = model.graph.input[0].type.tensor_type.shape.dim
        assert [bool(size.dim_param) for size in first] == [axis in axes for axis in range(len(first))]
        metadata = {each.key: each.value for each in model.metadata_props}
        assert json.loads(metadata["hop_length"]) == 2
