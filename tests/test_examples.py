"""The examples run from beginning to end, by the commands of their README, on small recordings made here."""

import csv
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerConfig, PoseTokenizerModel
from modeling_pose_tokenizer.formats import PoseSequence, read_npz, write_npz
from modeling_pose_tokenizer.hub import save_checkpoint
from models import random_poses

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "sign_language_model"
README = FOLDER / "README.md"
BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
# What makes a documented command small; and what stands where it says DIR or FILE.
SHORT = {
    "train_language_model.py": "--model model --index index.csv --held-out 2 --views 2 --hidden-size 32 --layers 1",
    "recognise_signs.py": "--model model --steps 2 --seeds 2",
    "animate.py": "--model model",
}
PLACEHOLDERS = {"DIR": "data", "FILE.npz": "data/fingerspelling-wholebody133/val/gaa_000000000000.npz"}
LETTERS = ("a", "b", "ß")
SIGNS = {
    "train": {"isl_a": ("hello", "you", "i2"), "asl_b": ("hello", "thanks"), "asl_c": ("hello", "thank-you", "no")},
    "val": {"isl_a": ("hello", "you"), "asl_d": ("house", "no", "yes")},
}


def write_clip(path: Path, seed: int, frames: int) -> None:
    config = PoseTokenizerConfig(skeleton="unisign_69")
    poses = random_poses(config, 1, frames, seed)[0].numpy() * [100, 100, 1] + [300, 300, 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_npz(path, PoseSequence(path.stem, poses.astype(np.float32), np.ones(frames, bool), 25.0))


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = PoseTokenizerConfig(
        skeleton="unisign_69", hidden_size=16, joint_hidden_size=8, codebook_size=8, num_quantizers=[2, 1, 2, 2]
    )
    model = PoseTokenizerModel(config).eval()
    poses = random_poses(config, 8, 32, seed=1)
    model.initialize_from_data([{"input_values": poses, "padding_mask": torch.ones(8, 32, dtype=torch.long)}])
    save_checkpoint(model, PoseFeatureExtractor.from_config(config), folder)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a tiny model, both data sets and the index of letters."""
    house = tmp_path_factory.mktemp("house")
    for name in ("examples", "scripts"):
        (house / name).symlink_to(ROOT / name)
    write_model(house / "model")
    spelled, signed = house / "data" / "fingerspelling-wholebody133", house / "data" / "webcam-signs133"
    rows = []
    for split, languages in {"train": "abcdef", "val": "g"}.items():
        for number, (language, letter) in enumerate((f"{x}aa", y) for x in languages for y in LETTERS):
            recording = f"{number:012x}"
            write_clip(spelled / split / f"{language}_{recording}.npz", number, 9 + number % 5)
            rows.append({"path": f"{language}/fs-sts{recording}0123.pose", "words": letter.upper()})
    write_clip(spelled / "train" / "aaa_ffffffffffff.npz", 0, 9)  # of no letter: left out
    with open(house / "index.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["path", "words"])
        writer.writeheader()
        writer.writerows(rows)
    for split, signers in SIGNS.items():
        names = [f"{signer}_{sign}" for signer, signs in signers.items() for sign in signs]
        for number, name in enumerate(f"{name}_{take}" for name in names for take in ("00", "15")):
            write_clip(signed / split / f"{name}.npz", number, 8)
    (house / "runs" / "demo").mkdir(parents=True)
    (house / "runs" / "demo" / "data").symlink_to(spelled)
    return house


def commands() -> list[str]:
    blocks = [match[2] for match in BLOCK.finditer(README.read_text("utf-8")) if match[1] == "bash"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def ran(house: Path) -> list[str]:
    """The commands of the README, after they have run in the checkout."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands():
        program, script, *rest = (PLACEHOLDERS.get(word, word) for word in shlex.split(command))
        assert program == "python" and Path(script).name in SHORT, f"no rule for {command}"
        words = [program, script, *rest, *shlex.split(SHORT[Path(script).name])]
        result = subprocess.run(
            words, cwd=house, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return commands()


def test_the_readme_names_both_examples(ran: list[str]) -> None:
    text = " ".join(ran)
    assert "train_language_model.py" in text and "recognise_signs.py" in text
    for target in LINK.findall(README.read_text("utf-8")):
        assert (FOLDER / target).exists(), f"README.md links to {target}"


def test_the_language_model_is_measured_and_moves(house: Path, ran: list[str]) -> None:
    output = house / "runs" / "language_model"
    metrics = json.loads((output / "metrics.json").read_text("utf-8"))
    bits = metrics["bits_per_frame"]
    assert metrics["train"]["clips"] == 16 and [test["clips"] for test in bits.values()] == [2, 3]
    for test in bits.values():
        assert test["fixed"] == 7 * 3 / 4
        assert test["frames"] % 4 == 0 and all(math.isfinite(value) for value in test.values())
        assert 0 < test["model"] < test["model_any_token"] and test["static"] > 0
    assert metrics["generated"]["clips"] == 2
    generated = sorted((output / "generated").glob("*.npz"))
    assert len(generated) == 2
    poses = read_npz(generated[0])[0].poses
    assert poses.shape[1:] == (69, 3) and len(poses) % 4 == 0 and np.isfinite(poses).all()
    assert (output / "generated.png").stat().st_size and (output / "generated.html").stat().st_size
    assert (output / "language_model" / "model.safetensors").is_file()


def test_signs_are_recognised_from_every_input(house: Path, ran: list[str]) -> None:
    metrics = json.loads((house / "runs" / "recognition" / "metrics.json").read_text("utf-8"))
    questions = list(metrics["questions"].values())
    assert [question["signs"] for question in questions] == [
        ["hello", "you"],
        ["hello", "thank-you"],
        ["hello", "no", "thank-you"],
        ["house", "no", "yes"],
    ]
    assert [(question["clips_learnt"], question["clips_asked"]) for question in questions] == [
        (4, 4),
        (4, 4),
        (10, 2),
        (3, 3),
    ]
    for question in questions:
        assert set(question["accuracy"]) == {"codebooks", "latents", "reconstruction", "keypoints"}
        assert all(
            len(values) == 2 and 0 <= min(values) <= max(values) <= 1 for values in question["accuracy"].values()
        )


@pytest.mark.parametrize("script", ["train_language_model.py", "recognise_signs.py"])
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("--data data --output out --colour red", 2, "unrecognized arguments: --colour red"),
        ("--data nowhere --output out --model model --index index.csv", 1, "nowhere"),
        ("--data data --output out --model nowhere", 1, "nowhere"),
        ("--data data --output index.csv/out --model model --index index.csv", 1, "index.csv"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    house: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    script: str,
    arguments: str,
    code: int,
    sentence: str,
) -> None:
    words = shlex.split(arguments)
    if script == "recognise_signs.py" and "--index" in words:
        at = words.index("--index")
        del words[at : at + 2]
    monkeypatch.chdir(house)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    said = capsys.readouterr().err if code == 2 else str(exit_info.value.code)
    assert exit_info.value.code == 2 if code == 2 else isinstance(exit_info.value.code, str)
    assert sentence in said and "Traceback" not in said


def test_bits_are_those_of_a_loop(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    example = runpy.run_path(str(FOLDER / "train_language_model.py"))
    codec = PoseTokenizerModel(PoseTokenizerConfig(skeleton="coco_17", codebook_size=4, num_quantizers=2))
    formatter = example["PoseCodeFormatter"].from_config(codec.config)
    rng = np.random.default_rng(0)
    rows = []
    for number, steps in enumerate((3, 1, 2)):
        codes = rng.integers(0, 4, (formatter.num_codebooks, steps))
        row = {"id": str(number), "language": "aaa", "letter": "k", "codes": codes.tolist()}
        rows.append(row | {"text": formatter.codes_to_text(codes)})
    tokenizer = example["make_tokenizer"](rows)
    torch.manual_seed(0)
    model = example["make_language_model"](len(tokenizer), 32, 1)
    formatter = formatter.add_to(tokenizer, model)
    scribe = example["Scribe"](tokenizer, formatter)
    lines = [scribe.line(row) for row in rows]
    found = example["count_bits"](model, scribe, lines, "test")
    for line, row, (in_turn, free, end) in zip(lines, rows, found, strict=True):
        ids = line["input_ids"]
        assert len(ids) == 3 + np.size(row["codes"]) + 1
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double()
        expected = np.zeros(3)
        for place in range(3, len(ids)):
            share = scores[place - 1].softmax(0)
            cost = -math.log2(share[ids[place]])
            if place == len(ids) - 1:
                expected[2] += cost
                continue
            book = (place - 3) % formatter.num_codebooks
            first = formatter.base_offset + len(formatter.special_tokens) + 4 * book
            expected[:2] += cost + math.log2(share[first : first + 4].sum()), cost
        np.testing.assert_allclose([in_turn, free, end], expected, rtol=1e-4)


def test_static_bits_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    count = runpy.run_path(str(FOLDER / "train_language_model.py"))["count_static_bits"]
    train, test = [{"codes": [[0, 0, 1], [2, 2, 2]]}], [{"codes": [[0, 1], [2, 0]]}]
    first, second = [2.5 / 5, 1.5 / 5], [3.5 / 4.5, 0.5 / 4.5]  # of codes 0 and 1 among 4, of codes 2 and 0 among 3
    assert count(train, test, (4, 3)) == pytest.approx(-sum(map(math.log2, first + second)))


def test_a_recording_has_the_same_name_everywhere(monkeypatch: pytest.MonkeyPatch, house: Path) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    example = runpy.run_path(str(FOLDER / "fingerspelling.py"))
    names = ("asq_03c0d56a4400", "asq_fs-sts03c0d56a4400b9c1d2")
    assert {example["recording_of"](name) for name in names} == {("asq", "03c0d56a4400")}
    letters = example["read_letters"](house / "index.csv")
    assert letters["aaa", f"{0:012x}"] == "a" and set(letters.values()) == {"a", "b", "ss"}
