"""The laws of the house: which file may import what, what is shipped, and how large anything may grow."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_pose_tokenizer"
WORKSHOP = ("training", "scripts", "benchmarks", "metrics", "space", "tests")  # never imported
TRAVELLING = sorted(PACKAGE.glob("*_pose_tokenizer.py"))
SHIPPED = sorted(PACKAGE.rglob("*.py"))
WORKS = sorted(path for top in ("scripts", "training", "benchmarks", "space") for path in (ROOT / top).rglob("*.py"))
COMMANDS = [path for path in WORKS if path.parent.name == "scripts" or '"__main__"' in path.read_text("utf-8")]
PYTHON = SHIPPED + sorted(path for folder in WORKSHOP for path in (ROOT / folder).rglob("*.py"))
TEXT = [*PYTHON, *(path for path in ROOT.iterdir() if path.is_file()), *(ROOT / "configuration").rglob("*.yaml")]
TEXT += [*(ROOT / "training").rglob("*.yaml"), *(ROOT / ".ci").iterdir()]
TRAVEL_IMPORTS = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub", "numpy"}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60  # one screen, docstring not counted
# Put together here, so that this file does not match itself.
MACHINE_PATH = re.compile("|".join(rf"(?<![\w.~]){'/'}{name}/" for name in ("home", "root", "work", "tmp", "Users")))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """All imports of a file, in functions too: (number of leading dots, module)."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """All functions of a file: (name, lines without the docstring)."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = first.end_lineno - first.lineno + 1 if documented and first.end_lineno else 0
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


def test_the_house_stands() -> None:
    names = {path.name for path in TRAVELLING}
    for part in ("configuration", "skeleton", "quantization", "modeling", "feature_extraction", "codes", "loss"):
        assert f"{part}_pose_tokenizer.py" in names
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("path", TRAVELLING, ids=name_of)
def test_what_travels_imports_only_what_every_user_has(path: Path) -> None:
    siblings = {sibling.stem for sibling in TRAVELLING}
    for level, module in imports_of(path):
        if level:
            assert level == 1 and module in siblings, f"{path.name} imports {'.' * level}{module}, which stays at home"
        else:
            assert module.split(".")[0] in TRAVEL_IMPORTS, f"{path.name} imports {module}; a user may not have it"
    # transformers finds relative imports by a regular expression, which also reads docstrings.
    assert set(get_relative_imports(path)) <= siblings


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_imports_the_workshop(path: Path) -> None:
    tops = {module.split(".")[0] for level, module in imports_of(path) if not level}
    assert not tops & set(WORKSHOP)
    if path in SHIPPED:
        assert not any(level > 1 for level, _ in imports_of(path))


@pytest.mark.parametrize("path", SHIPPED + WORKS, ids=name_of)
def test_matplotlib_has_its_place(path: Path) -> None:
    uses = any(module.split(".")[0] == "matplotlib" for _, module in imports_of(path))
    assert not uses or path.name in ("visualization.py", "figures.py")


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    file_lines = path.read_text("utf-8").count("\n")
    assert file_lines <= MAX_FILE_LINES
    long = [f"{name}: {lines} lines" for name, lines in functions_of(path) if lines > MAX_FUNCTION_LINES]
    assert not long


@pytest.mark.parametrize("path", SHIPPED + WORKS, ids=name_of)
def test_nothing_unpickles(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & {module.split(".")[0] for _, module in imports_of(path)}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            safe = node.arg == "weights_only"
            assert isinstance(node.value, ast.Constant) and node.value.value is safe, f"line {node.value.lineno}"


@pytest.mark.parametrize("path", TEXT, ids=name_of)
def test_no_path_of_one_machine(path: Path) -> None:
    found = MACHINE_PATH.search(path.read_text("utf-8"))
    assert found is None, f"{found.group()} in {path.name}"


def leaves(tree: dict, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def test_presets_are_yaml_and_differences() -> None:
    presets = {path.name: path for path in (ROOT / "configuration").iterdir() if path.name != "skeletons"}
    assert {"default.yaml", "small.yaml", "large.yaml"} <= set(presets)
    assert all(name.endswith(".yaml") for name in presets)
    default = dict(leaves(yaml.safe_load(presets.pop("default.yaml").read_text("utf-8"))))
    for name, path in presets.items():
        copies = [key for key, value in leaves(yaml.safe_load(path.read_text("utf-8"))) if default.get(key) == value]
        assert not copies, f"{name} repeats {copies} of default.yaml"


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_every_command_has_help(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.syspath_prepend(path.parent)  # as python does
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(path), run_name="__main__")
    assert not exit_info.value.code
    assert "usage" in capsys.readouterr().out.lower()
    assert not list(tmp_path.iterdir())


def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    heavy = ("runs", "data", "wandb")
    shutil.copytree(ROOT, source, ignore=lambda _, names: {n for n in names if n.startswith(".") or n in heavy})
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {PACKAGE.name}
    assert set(names) == {name_of(path) for path in PACKAGE.iterdir() if path.is_file()}


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert project["version"] == citation["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
