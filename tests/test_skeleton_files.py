"""A user's own skeleton from a YAML file: names become indices, mistakes are refused by name, models use it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.presets import RunConfigError, load_run_config
from modeling_pose_tokenizer.skeleton_files import load_skeleton, read_skeleton
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, build_skeleton, likely_layout, suggest_layout

EXAMPLE = Path(__file__).parents[1] / "configuration" / "skeletons" / "cmu_mocap_31.yaml"
TINY = """
keypoint_names: hips chest head left_hand right_hand
edges: [hips chest head, chest left_hand, [1, 4]]
parts: {body: [hips, chest, 2], left_hand: left_hand, right_hand: {palm: right_hand}}
flip_pairs: [left_hand right_hand]
scale_pair: hips chest
"""
RUN = ["--data.path", "data", "--training.output_dir", "out"]


def write(folder: Path, text: str) -> str:
    path = folder / "body.yaml"
    path.write_text(text, "utf-8")
    return str(path)


def test_names_and_indices_mean_the_same(tmp_path: Path) -> None:
    assert load_skeleton(write(tmp_path, TINY)) == build_skeleton(
        ["hips", "chest", "head", "left_hand", "right_hand"],
        [(0, 1), (1, 2), (1, 3), (1, 4)],
        {"body": [0, 1, 2], "left_hand": [3], "right_hand": {"palm": [4]}},
        [(3, 4)],
        (0, 1),
    )
    assert load_skeleton("coco_17") is SKELETONS["coco_17"]
    with pytest.raises(ValueError, match="Did you mean 'coco_17'"):
        load_skeleton("coco17")


def test_what_was_read_can_be_written_and_read_again(tmp_path: Path) -> None:
    fields = read_skeleton(EXAMPLE)
    assert read_skeleton(write(tmp_path, yaml.safe_dump(fields))) == fields


def test_the_example_mirrors_left_to_right() -> None:
    skeleton = load_skeleton(str(EXAMPLE))
    flip = skeleton.flip_permutation
    assert [flip[other] for other in flip] == list(range(31))
    for number, name in enumerate(skeleton.keypoint_names):
        sided = name[0] in "lr" and name not in ("root", "lowerback", "lowerneck")
        assert skeleton.keypoint_names[flip[number]] == ({"l": "r", "r": "l"}[name[0]] + name[1:] if sided else name)
    assert {(flip[parent], flip[child]) for parent, child in skeleton.edges} == set(skeleton.edges)
    assert skeleton.flip_part_groups == {"body": "body", "left_hand": "right_hand", "right_hand": "left_hand"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds None; expected the keys keypoint_names, edges"),
        ("[1, 2]", r"holds \[1, 2\]; expected the keys"),
        ("keypoint_names: a b\nedge: [a b]", "unknown key 'edge'; the nearest valid one is edges"),
        ("keypoint_names: a b\nedges: [a b]\nedges: [b a]", "the key edges stands twice"),
        ("keypoint_names: a b", "lacks edges"),
        ("keypoint_names: [a, [b]]\nedges: []", "keypoint_names is .* expected keypoints"),
        ("keypoint_names: a b a\nedges: [a b]", "keypoint_names holds 'a' more than once"),
        ("keypoint_names: wrist hand\nedges: [wrist hnd]", "edges holds 'hnd'.*the nearest .* is 'hand'"),
        ("keypoint_names: a b\nedges: a b", "edges is 'a b', expected a list"),
        ("keypoint_names: a b\nedges: [[0, 7]]", "edges holds 7, expected a keypoint index from 0 to 1"),
        ("keypoint_names: a b\nedges: [a b]\nparts: {x: a}", "parts leaves out 1 of 2 keypoints"),
        ("keypoint_names: a b\nedges: [a b]\nparts: {x: {y: a b, z: b}}", r"parts\['x'\]\['z'\] holds keypoint 1"),
        ("keypoint_names: a b\nedges: [a b]\nparts: [a]", "parts is .* expected a mapping"),
        ("keypoint_names: a b\nedges: [a b]\nscale_pair: a", "scale_pair holds .* expected two"),
        ("keypoint_names: !!python/object/apply:os.getcwd []\nedges: []", "is not valid YAML: could not determine"),
        ("[" * 5000, "is not valid YAML"),
        ("a: &a [x, x, x, x]\n" + "".join(f"k{n}: &k{n} [*a, *a]\n" for n in range(9)), "unknown key 'a'"),
        ("#" * (2**20 + 1), "expected a file of at most"),
        ("\0", "is not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=rf"^{re.escape(path)}: .*{message}") as caught:
        load_skeleton(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(path)
    with pytest.raises(RunConfigError, match=message):
        load_run_config([*RUN, "--model.skeleton", path])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read \(No such file"):
        load_skeleton(str(tmp_path / "none.yaml"))


def test_a_run_on_a_skeleton_file_records_the_skeleton_itself(tmp_path: Path) -> None:
    options = [*RUN, "--model.keypoint_dim", "4", "--model.num_quantizers", "2"]
    run = load_run_config([*options, "--model.skeleton", write(tmp_path, TINY)])
    record = tmp_path / "run.yaml"
    record.write_text(run.to_yaml(), "utf-8")
    again = load_run_config(["--config", str(record)])
    assert again.to_dict() == run.to_dict() and again.model["skeleton"] is None
    assert again.model_config().layout == load_skeleton(str(tmp_path / "body.yaml"))
    with pytest.raises(RunConfigError, match=r"model\.skeleton is .* and model\.edges is given too"):
        load_run_config([*options, "--model.skeleton", str(tmp_path / "body.yaml"), "--model.edges", "[[0, 1]]"])


def test_a_model_of_a_skeleton_file_survives_its_checkpoint(tmp_path: Path) -> None:
    fields = read_skeleton(write(tmp_path, TINY))
    config = PoseTokenizerConfig(skeleton=None, **fields, keypoint_dim=4, hidden_size=8, codebook_size=8)
    model, extractor = PoseTokenizerModel(config).eval(), PoseFeatureExtractor.from_config(config)
    model.save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    poses = np.random.default_rng(0).uniform(0.1, 1, (9, 5, 4)).astype(np.float32)
    inputs = extractor(poses, return_tensors="pt")
    again = PoseTokenizerModel.from_pretrained(tmp_path / "model").eval()
    assert again.config.layout == load_skeleton(str(tmp_path / "body.yaml"))
    assert (again.encode(inputs["input_values"]).pose_codes == model.encode(inputs["input_values"]).pose_codes).all()
    (back,) = extractor.postprocess(again(inputs["input_values"], inputs["padding_mask"]).pose_values.detach(), inputs)
    assert back.shape == poses.shape


# --- the likely layout


@pytest.mark.parametrize("name", SKELETONS)
def test_a_count_of_keypoints_tells_the_layout(name: str) -> None:
    count = SKELETONS[name].num_keypoints
    assert suggest_layout(count) == name
    assert likely_layout(count) == f" ({count} keypoints: this looks like {name})"


def test_whoever_refuses_a_count_names_the_likely_layout() -> None:
    assert suggest_layout(5) is None and likely_layout(5) == ""
    sentence = r"543.*133.*543 keypoints: this looks like mediapipe_holistic_543"
    config = PoseTokenizerConfig(hidden_size=8, codebook_size=8)
    with pytest.raises(ValueError, match=sentence):
        PoseFeatureExtractor.from_config(config)(np.ones((2, 543, 3)))
    with pytest.raises(Exception, match=sentence):  # `@strict` wraps the ValueError
        PoseTokenizerConfig(num_keypoints=543)
    with pytest.raises(ValueError, match=sentence):
        PoseTokenizerModel(config)(torch.ones(1, 2, 543, 3))
