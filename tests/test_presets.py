"""Run configurations: layers, other names of keys, and one sentence for every mistake."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from modeling_pose_tokenizer.presets import (
    ALIASES,
    DEFAULT_PRESET,
    SECTIONS,
    RunConfig,
    RunConfigError,
    known_keys,
    load_run_config,
    resolve_key,
)

PRESETS = sorted(DEFAULT_PRESET.parent.glob("*.yaml"))
# The keys that the original project documents, with a value each that is not the default.
ORIGINAL = {
    "num_keypoints": 133,
    "keypoint_dim": 4,
    "sequence_length": 48,
    "hidden_dim": 96,
    "num_quantizers": 3,
    "codebook_size": 512,
    "batch_size": 7,
    "num_epochs": 9,
    "learning_rate": "1e-4",
    "optimizer_type": "adam",
    "scheduler_type": "linear",
    "reconstruction_weight": 2.0,
    "quantization_weight": 0.5,
    "perceptual_weight": 0.1,
    "temporal_weight": 0.2,
    "use_amp": False,
    "num_workers": 3,
    "pin_memory": False,
}


def load(tmp_path: Path, content: object, *args: str) -> RunConfig:
    path = tmp_path / "preset.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), "utf-8")
    return load_run_config(["--config", str(path), *args])


def value_of(run: RunConfig, key: str) -> object:
    section, name = key.split(".")
    return run.model.get(name) if section == "model" else getattr(getattr(run, section), name)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_a_run(path: Path) -> None:
    run = load_run_config(["--config", str(path)])
    assert run.model_config().bits_per_frame <= 20
    for section, content in yaml.safe_load(path.read_text("utf-8")).items():
        for name, value in content.items():
            assert value_of(run, f"{section}.{name}") == value


def test_layers_win_in_order(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text("training:\n  batch_size: 3\n  seed: 5\n", "utf-8")
    default = load_run_config([])
    run = load(tmp_path, {"training": {"batch_size": 4}}, "--training.max_steps", "10", "--hidden_dim=24")
    both = load_run_config(["--config", str(first), "--config", str(tmp_path / "preset.yaml")])
    assert (both.training.batch_size, both.training.seed) == (4, 5)
    assert (run.training.batch_size, run.training.max_steps, run.model["hidden_size"]) == (4, 10, 24)
    assert run.training.learning_rate == default.training.learning_rate
    assert run.model["num_quantizers"] == default.model["num_quantizers"]
    # The command line wins wherever it stands.
    assert load_run_config(["--training.seed", "6", "--config", str(first)]).training.seed == 6


def test_a_run_repeats_itself(tmp_path: Path) -> None:
    run = load(tmp_path, ORIGINAL, "--model.parts", '{"body": [0, 1]}', "--training.scheduler_options", '{"power": 2}')
    assert load(tmp_path, run.to_yaml()) == run


@pytest.mark.parametrize("section", ["", "model", "data", "training"])
def test_the_original_keys_keep_working(tmp_path: Path, section: str) -> None:
    assert set(ORIGINAL) <= set(ALIASES)
    files = load(tmp_path, {section: ORIGINAL} if section else ORIGINAL)
    prefix = f"--{section}." if section else "--"
    options = load_run_config([f"{prefix}{key}={yaml.safe_dump(value).split()[0]}" for key, value in ORIGINAL.items()])
    for key, value in ORIGINAL.items():
        assert value_of(files, ALIASES[key]) == value_of(options, ALIASES[key]) == (1e-4 if value == "1e-4" else value)


def test_every_key_has_help_and_a_default_of_its_type() -> None:
    for section in SECTIONS.values():
        assert section.__doc__
        assert all(entry.metadata["help"] for entry in dataclasses.fields(section))
    assert load_run_config([]).model_config()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"batchsize": 3}, "unknown key batchsize; the nearest valid one is training.batch_size"),
        (
            {"training": {"batchsize": 3}},
            "unknown key training.batchsize; the nearest valid one is training.batch_size",
        ),
        ({"model": {"hiden_size": 3}}, "unknown key model.hiden_size; the nearest valid one is model.hidden_size"),
        ({"trainng": {"seed": 3}}, "unknown key trainng"),
        ({"zzz": 3}, "unknown key zzz; --help lists all"),
        ({"training": {"batch_size": "many"}}, "training.batch_size is many; expected int"),
        ({"training": {"batch_size": 2.5}}, "training.batch_size is 2.5; expected int"),
        ({"batch_size": 0}, "training.batch_size is 0; expected at least 1"),
        ({"training": {"learning_rate": "nan"}}, "training.learning_rate is nan; expected float"),
        ({"data": {"max_rejected": 2}}, "data.max_rejected is 2.0; expected 0 to 1"),
        ({"training": {"optimizer_type": "adamm"}}, "optimizer_type is adamm; expected one of adamw, adam, sgd"),
        ({"model": {"num_quantizers": "three"}}, "model.num_quantizers is three; expected int | list[int]"),
        ({"training": 3}, "section training is 3; expected keys under it"),
        ({"hidden_dim": 3, "model": {"hidden_size": 4}}, "model.hidden_size is given twice"),
        ("seed: 1\nseed: 2", "the key seed stands twice"),
        ("training:\n  seed: 1\n  seed: 2", "the key seed stands twice"),
        ("- 3", "holds a list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_mistakes_in_a_file_are_refused_in_one_sentence(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(RunConfigError) as info:
        load(tmp_path, content)
    assert words in str(info.value) and "\n" not in str(info.value)
    assert str(info.value).startswith(str(tmp_path / "preset.yaml"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.hiden_size", "3"], "command line: unknown key model.hiden_size; the nearest valid one"),
        (["--model.hidden", "3"], "unknown key model.hidden; "),  # no guessing from a prefix
        (["--model.hidden_size", "x"], "command line: model.hidden_size is x; expected int"),
        (["--training.max_steps=-1"], "command line: training.max_steps is -1; expected at least 1"),
        (["--model.hidden_size"], "expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_on_the_command_line_are_refused_in_one_sentence(args: list[str], words: str) -> None:
    with pytest.raises(RunConfigError) as info:
        load_run_config(args)
    assert words in str(info.value) and "\n" not in str(info.value)


def test_an_impossible_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunConfigError, match="model: num_keypoints is 3, but the skeleton coco_wholebody_133 has 133"):
        load(tmp_path, {"num_keypoints": 3}).model_config()


@given(st.sampled_from([*known_keys(), *ALIASES]), st.data())
def test_a_slip_of_the_finger_finds_its_key(key: str, data: st.DataObject) -> None:
    section, _, leaf = key.rpartition(".")
    position = data.draw(st.integers(0, len(leaf) - 1))
    slip = ".".join(filter(None, (section, leaf[:position] + "q" + leaf[position + 1 :])))
    assume(slip != key)
    with pytest.raises(RunConfigError) as info:
        resolve_key(slip)
    assert len(leaf) < 5 or f"nearest valid one is {ALIASES.get(leaf, key)}." in str(info.value)
