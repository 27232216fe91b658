"""The README tells the truth: `make demo` and every code block run, in order, in a checkout with tiny recordings."""

import functools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from modeling_pose_tokenizer.presets import load_run_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
PLACEHOLDER = re.compile(r"[A-Z]{2,}[A-Z_/]*(\.[a-z0-9|.]+)?")
SHOWN = {"", "text", "bibtex"}  # blocks that show and do not run: output, a tree of files, a citation
# A training run of two steps: appended to every documented training command.
SHORT = "--training.max_steps 2 --training.eval_every 2 --training.save_every 2 --training.batch_size 4"
SHORT += " --training.init_batches 2 --model.hidden_size 16 --model.codebook_size 16 --data.num_workers 0"
# What stands where the README writes DIR, FILE.npz or USER/NAME after an option.
EXAMPLES = {"--model": "runs/demo/model", "--data": "runs/demo/data", "--data.path": "runs/demo/data"}
EXAMPLES |= {"--tokens": "runs/demo/tokens", "--input": "recordings"}
PREPARES = ("git", "cd", "source", "pip", "python -m venv", "python -m pip")  # before there is a checkout or .venv
# Run elsewhere, against a Hub in test_hub.py and in a browser in test_space.py; here the options are compared.
ONLINE = ("scripts/push_to_hub.py", "hf", "space/app.py")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a user has it, with a few small recordings and what `make demo` makes of them."""
    house = tmp_path_factory.mktemp("house")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "data", "tests"):
            (house / path.name).symlink_to(path)
    generator = np.random.default_rng(0)
    for language in ("ase", "psr", "ssp", "tsm", "csq", "swl", "bzs", "gsg", "eso"):
        (house / "recordings" / language).mkdir(parents=True)
        for index in range(5):
            poses = generator.normal(250, 60, (1, 133, 3)) + generator.normal(0, 2, (40, 133, 3)).cumsum(0)
            poses[..., 2] = 0.9
            poses[..., 5:7, :2] = [[300, 200], [200, 200]]  # shoulders
            target = house / "recordings" / language / f"{index}.npz"
            np.savez(target, poses=poses.astype(np.float32), mask=np.ones(40, bool), fps=25.0)
    result = run(house, "make demo")
    assert result.returncode == 0, result.stdout + result.stderr
    return house


def run(house: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a documented command in the checkout, shortened."""
    if command == "make demo":
        command = f"make --old-file .venv/.installed-demo demo DEMO_INPUT=recordings DEMO_OPTIONS='{SHORT}'"
    elif "training/train.py" in command and "--help" not in command:
        command += f" {SHORT}"
    elif "benchmarks/speed.py" in command:
        command += " --rounds 1"
    if re.match("python (scripts|benchmarks|space)/", command):
        return run_script(house, command)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MAKEFLAGS": "", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        command, cwd=house, shell=True, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def run_script(house: Path, command: str) -> subprocess.CompletedProcess[str]:
    """The same in a fork of a Python that has the libraries imported, which takes each script seconds; those of
    `make demo` start as a user's do."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        ["gradio", "modeling_pose_tokenizer.evaluation", "modeling_pose_tokenizer.extraction"]
    )
    output = house / "output.txt"
    process = forks.Process(target=in_fork, args=(house, shlex.split(command)[1:], output))
    process.start()
    process.join(300)
    process.kill()  # nothing, if it has ended
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode, output.read_text("utf-8"), "")


def in_fork(house: Path, words: list[str], output: Path) -> None:
    os.chdir(house)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv, sys.path[0] = words, str(house / Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


run_once = functools.cache(run)


def blocks() -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of every fenced block."""
    text = README.read_text("utf-8")
    for match in BLOCK.finditer(text):
        yield text[: match.start()].count("\n") + 2, match[1], match[2]


def commands(block: str) -> Iterator[str]:
    """The commands of a shell block, continued lines joined, comments and prompts dropped."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield shlex.join(words)


def fill(command: str, number: int) -> str:
    """Put something real where a command has a placeholder."""
    words, option = [], ""
    for word in shlex.split(command):
        option = word if word.startswith("--") else option
        if PLACEHOLDER.fullmatch(word):
            suffix = Path(word.split("|")[0]).suffix
            if option == "--input" and suffix:
                word = "recordings/ase/0.npz"
            elif option in EXAMPLES:
                word = EXAMPLES[option]
            elif word != "USER/NAME":
                word = f"out/{number}{suffix}"
        words.append(word)
    return shlex.join(words)


def check_command(house: Path, command: str, number: int) -> None:
    first, *rest = shlex.split(command)
    if first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets)
        assert rest != ["demo"] or (house / "runs/demo/report/index.html").is_file()
    elif command.startswith(ONLINE) or any(word in ONLINE for word in rest):
        shown = run_once(house, shlex.join([first, *rest[:1], "--help"]))
        assert shown.returncode == 0, shown.stderr
        assert all(word in shown.stdout for word in rest if word.startswith("--"))
    elif not command.startswith(PREPARES):
        result = run(house, fill(command, number))
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_every_block_runs(house: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    monkeypatch.chdir(house)
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, language, text in blocks():
        with subtests.test(f"README.md line {line}"):
            if language == "bash":
                for number, command in enumerate(commands(text)):
                    check_command(house, command, 1000 * line + number)
            elif language == "python":
                text = text.replace("USER/NAME", EXAMPLES["--model"])
                exec(compile("\n" * (line - 1) + text, str(README), "exec"), namespace)
            elif language == "yaml":
                preset = house / "preset.yaml"
                preset.write_text(yaml.safe_dump(yaml.safe_load(text)), "utf-8")
                load_run_config(["--config", str(preset)])
            elif language == "json":
                json.loads(text)
            else:
                assert language in SHOWN, f"no rule for a block of {language}"


def test_the_demo_leaves_what_it_says(house: Path) -> None:
    demo = house / "runs" / "demo"
    assert {"train", "val", "test"} <= {path.name for path in (demo / "data").iterdir()}
    assert (demo / "model" / "model.safetensors").is_file() and (demo / "model" / "preprocessor_config.json").is_file()
    assert list((demo / "tokens").rglob("*.parquet"))
    assert (demo / "report" / "index.html").is_file()
    metrics = json.loads((demo / "metrics.json").read_text("utf-8"))
    assert set(metrics["parts"]) == {"body", "face", "left_hand", "right_hand"}
    assert metrics["data"]["sequences"] == 20  # of the four test languages


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target in LINK.findall((ROOT / name).read_text("utf-8")):
        assert (ROOT / target).exists(), f"{name} links to {target}"
