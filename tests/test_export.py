"""Every format holds the same encoder and decoder as the model, and nothing else is kept."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from corpora import run_script
from exports import export_model_of, fitted_model
from modeling_pose_tokenizer import export
from modeling_pose_tokenizer.export import Difference, ExportError, export_model, sample_poses
from modeling_pose_tokenizer.hub import save_checkpoint
from modeling_pose_tokenizer.presets import load_run_config

ROOT = Path(__file__).parents[1]
# ONNX of a causal model is exported in test_runtime.py, which runs it.
CASES = [(variant, "torchscript") for variant in ("parts", "whole", "fsq", "causal")]
SLOW_CASES = [(variant, "onnx") for variant in ("parts", "whole", "fsq")]
SLOW_CASES += [(variant, "torch_export") for variant in ("parts", "whole", "fsq", "causal")]


def check_case(variant: str, format: str, folder: Path) -> None:
    model, extractor = export_model_of(variant)
    difference = export_model(model, extractor, folder, format)["whole"]
    suffix = export.SUFFIXES[format]
    assert {path.name for path in folder.iterdir()} == {f"encoder{suffix}", f"decoder{suffix}"}
    assert difference.codes > 100
    # Lengths and a seed that the export's own check does not know.
    poses, mask = sample_poses(model, extractor.mean, [5, 30, 2, 17], seed=11)
    with torch.inference_mode():
        codes = model.encode(poses, mask).pose_codes
        values = model.decode(codes, mask).pose_values
        encode, decode = (export.RUNNERS[format](folder / f"{name}{suffix}") for name in ("encoder", "decoder"))
        assert codes.unique().numel() > 5
        assert (encode(poses, mask)[0] != codes).float().mean() <= 1e-3
        torch.testing.assert_close(decode(codes, mask)[0], values, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("variant", "format"), CASES)
def test_every_format_is_the_model(variant: str, format: str, tmp_path: Path) -> None:
    check_case(variant, format, tmp_path)


def test_torch_export_sets_no_limits(tmp_path: Path) -> None:
    """What tracing takes from its example for conditions is gone: one row, one frame, whole steps."""
    model, extractor = export_model_of("whole")
    poses, _ = sample_poses(model, extractor.mean, [14, 14], seed=2)
    encoder = export.make_parts(model, poses, 2, streaming=False)[0]
    with torch.no_grad():
        export.write_torch_export(encoder, tmp_path / "encoder.pt2", {})
        encode = export.run_torch_export(tmp_path / "encoder.pt2")
        for lengths in ([1], [3, 2], [96, 30, 1]):
            poses, mask = sample_poses(model, extractor.mean, lengths, seed=4)
            assert torch.equal(encode(poses, mask)[0], model.encode(poses, mask).pose_codes)
    with pytest.raises(AssertionError, match="Guard failed"):
        encode(poses, mask[:, 1:])


def test_what_torch_cannot_export_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(part: export.Part, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("no such\noperator")

    monkeypatch.setitem(export.WRITERS, "torchscript", write)
    with pytest.raises(ExportError, match=r"cannot write encoder of this model as torchscript \(no such operator\)"):
        export_model(*export_model_of("parts"), tmp_path, "torchscript")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "format"), SLOW_CASES)
def test_every_format_is_the_model_of_every_kind(variant: str, format: str, tmp_path: Path) -> None:
    check_case(variant, format, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", export.SUFFIXES)
@pytest.mark.parametrize("preset", ["default", "small", "large", "streaming"])
def test_presets_export(preset: str, format: str, tmp_path: Path) -> None:
    config = load_run_config(["--config", str(ROOT / "configuration" / f"{preset}.yaml")]).model_config()
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(config.layout.num_keypoints, config.keypoint_dim - 1, generator=generator).tolist()
    extractor = export.PoseFeatureExtractor.from_config(config, mean=mean)
    streaming = config.use_causal_conv and format == "onnx"
    export_model(fitted_model(config, mean), extractor, tmp_path, format, streaming=streaming)


def test_what_is_no_export_of_the_model_is_found() -> None:
    model, extractor = export_model_of("parts")
    poses, mask = sample_poses(model, extractor.mean, [12], seed=0)
    with torch.inference_mode():
        codes = model.encode(poses, mask).pose_codes
        values = model.decode(codes, mask).pose_values
    for codes_wrong, values_wrong in ((0, 2e-4), (1, 0.0), (0, float("nan"))):
        difference = Difference()
        difference.add_codes(codes, codes)
        difference.add_values(values, values)
        difference.check("the same")
        others, moved = codes.clone(), values.clone()
        others[0, 0, :codes_wrong] += 1
        moved[0, -1, -1, -1] += values_wrong
        difference.add_codes(others, codes)
        difference.add_values(moved, values)
        with pytest.raises(ExportError, match="differs from the model"):
            difference.check("another")
    difference = Difference()
    difference.add_values(values[:, 1:], values)
    assert difference.values == float("inf")


def test_a_failing_export_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, extractor = export_model_of("parts")
    export_model(model, extractor, tmp_path, "torchscript")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write(part: export.Part, path: Path, metadata: dict[str, str]) -> None:
        with torch.no_grad():  # a model that is written otherwise than it is
            weight = model.decoder.head.bias
            weight.add_(1e-3)
            export.write_torchscript(part, path, metadata)
            weight.sub_(1e-3)

    monkeypatch.setitem(export.WRITERS, "torchscript", write)
    with pytest.raises(ExportError, match="not kept"):
        export_model(model, extractor, tmp_path, "torchscript")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ExportError):
        export_model(model, extractor, tmp_path / "new", "torchscript")
    assert not list((tmp_path / "new").iterdir())


def test_fewer_levels_are_the_prefix_of_all(tmp_path: Path) -> None:
    model, extractor = export_model_of("parts")
    export_model(model, extractor, tmp_path, "torchscript", num_quantizers=1)
    poses, mask = sample_poses(model, extractor.mean, [21, 9], seed=3)
    files = {export.METADATA: ""}
    encode = torch.jit.load(tmp_path / "encoder.pt", _extra_files=files)
    decode = export.run_torchscript(tmp_path / "decoder.pt")
    with torch.inference_mode():
        codes = model.encode(poses, mask).pose_codes[:, : model.quantizer.count_codebooks(1)]
        assert torch.equal(encode(poses, mask), codes)
        torch.testing.assert_close(decode(codes, mask)[0], model.decode(codes, mask).pose_values)
    metadata = json.loads(files[export.METADATA])
    assert json.loads(metadata["num_quantizers"]) == 1
    assert json.loads(metadata["codebooks"]) == [list(book) for book in model.config.codebook_index[: codes.shape[1]]]
    assert json.loads(metadata["layout"])["keypoint_names"] == list(model.config.layout.keypoint_names)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "coreml"}, "expected one of onnx"),
        ({"num_quantizers": 9}, "1 to 2 levels"),
        ({"streaming": True}, "causal model"),
        ({"streaming": True, "format": "torchscript"}, "needs --format onnx"),
    ],
)
def test_what_cannot_be_is_said_before_work_begins(changes: dict, sentence: str, tmp_path: Path) -> None:
    model, extractor = export_model_of("parts")
    with pytest.raises(ExportError, match=sentence):
        export_model(model, extractor, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_search_is_not_exported(tmp_path: Path) -> None:
    model, extractor = export_model_of("parts")
    model = copy.deepcopy(model)
    model.config.beam_size = 4
    with pytest.raises(ExportError, match=r"beam_size is 4, .* set beam_size to 1"):
        export_model(model, extractor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, extractor = export_model_of("parts")
    save_checkpoint(model, extractor, tmp_path / "model")
    options = {"output": tmp_path / "out", "format": "torchscript"}
    run_script(monkeypatch, "export.py", model=tmp_path / "model", **options)
    assert "0 of 420 codes differ" in capsys.readouterr().out
    assert (tmp_path / "out" / "encoder.pt").is_file()
    for changes, sentence in (
        ({"model": tmp_path / "nothing"}, "no such folder"),
        ({"num_quantizers": 0}, "1 to 2 levels"),
        ({"output": tmp_path / "out" / "encoder.pt"}, "cannot be written"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            run_script(monkeypatch, "export.py", **{"model": tmp_path / "model", **options, **changes})


def test_metadata_say_what_a_stranger_needs() -> None:
    model, extractor = export_model_of("parts")
    described = export.describe(model, extractor, 2)
    assert described["export_id"] != export.describe(model, extractor, 2)["export_id"]
    features = json.loads(described["feature_extractor"])
    assert np.allclose(features["mean"], extractor.mean) and features["scale_pair"] == extractor.scale_pair
    assert json.loads(described["config"])["hidden_size"] == model.config.hidden_size
    assert json.loads(described["frame_rate"]) == model.config.frame_rate
