"""The page to try the tokenizer in: what it shows is what the model says, and no file or visitor disturbs another."""

import argparse
import base64
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects

from browser import open_browser, open_page
from modeling_pose_tokenizer.formats import PoseFileError, PoseSequence, read_npz, write_npz, write_pose, write_shard
from modeling_pose_tokenizer.hub import load_pretrained
from modeling_pose_tokenizer.metrics import ReconstructionMetrics
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton

gradio = pytest.importorskip("gradio", reason="gradio is not installed")

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "space"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def codec(app):
    return app.Codec(app.default_model())


def make_sequence(name, frames, fps, seed=0):
    """A body with shoulders that sways, some of it missing, one frame in seven masked."""
    rng = np.random.default_rng(seed)
    home = rng.normal(size=(1, 133, 2))
    home[0, 5], home[0, 6] = (0.5, 0.0), (-0.5, 0.0)
    points = 300 + 100 * (home + 0.2 * np.sin(np.arange(frames) / 3)[:, None, None] * rng.normal(size=(1, 133, 2)))
    confidence = rng.choice([0.0, 0.9], p=[0.1, 0.9], size=(frames, 133))
    confidence[:, 5:7] = 0.9
    poses = np.concatenate([points, confidence[..., None]], -1).astype(np.float32)
    poses[confidence == 0] = 0
    return PoseSequence(name, poses, np.arange(frames) % 7 != 3, fps)


@pytest.fixture
def clip_file(tmp_path):
    write_npz(tmp_path / "clip.npz", make_sequence("clip", 50, 30.0))
    return tmp_path / "clip.npz"


def numbers(figures):
    """What the figures say: name -> full value."""
    return {name: float(value) for name, value in re.findall(r'<dt>([^<]+)</dt><dd><data value="([^"]+)">', figures)}


# ---- what it shows --------------------------------------------------------------------------------------------------


def test_every_position_of_the_slider_shows_what_the_model_does_at_that_rate(codec, clip_file):
    sequence = make_sequence("clip", 50, 30.0)
    clip = codec.open(str(clip_file))
    clip_file.unlink()  # the slider must not need the file again
    model, config, extractor = codec.model, codec.config, codec.feature_extractor
    shown = np.where(sequence.mask[:, None, None], sequence.poses, 0)
    inputs = extractor(shown, fps=30.0, return_tensors="pt")
    rates = []
    for levels in range(1, config.num_levels + 1):
        view = codec.view(clip, levels)
        with torch.inference_mode():
            output = model(inputs["input_values"], inputs["padding_mask"], num_quantizers=levels)
        text = Path(view.tokens).read_text("utf-8").strip()
        assert (codec.formatter.text_to_codes(text) == output.pose_codes[0].numpy()).all()
        (again,) = read_npz(view.reconstruction, num_keypoints=133, keypoint_dim=3)
        assert again.poses.shape == sequence.poses.shape and again.fps == 30.0
        assert (again.mask == sequence.mask).all()
        np.testing.assert_allclose(again.poses, extractor.postprocess(output.pose_values, inputs)[0], atol=1e-2)
        metrics = ReconstructionMetrics(config.layout, config)
        metrics.update(output.pose_values, inputs["input_values"], inputs["padding_mask"])
        found, expected = numbers(view.figures), metrics.compute()
        assert found["Error"] == pytest.approx(expected["overall"]["mpjpe"], rel=1e-4)
        for part, block in expected["parts"].items():
            name = f"{part.replace('_', ' ').capitalize()} error"
            assert found[name] == pytest.approx(block["mpjpe"], rel=1e-4)
        rates.append(found["Bits per second"])
        assert found["Tokens per second"] == pytest.approx(len(output.pose_codes[0]) * config.frame_rate)
    assert rates == sorted(set(rates)), "more levels, more bits"
    assert found["Bits per second"] == pytest.approx(config.bitrate)
    assert found["Smaller than float32"] == pytest.approx(expected["tokens"]["compression_ratio"])


def test_the_player_holds_the_tokens_and_stands_alone(codec, tmp_path):
    write_shard(tmp_path / "many.npz", [make_sequence(HOSTILE, 50, 30.0), make_sequence("other", 20, None)])
    clip = codec.open(str(tmp_path / "many.npz"))
    view = codec.view(clip, 1)
    assert HOSTILE not in view.page and "://" not in view.page
    (line,) = re.findall(r"^const skeleton = .*;$", view.page, re.MULTILINE)
    start = line.index("sequences = ") + len("sequences = ")
    (player,) = json.JSONDecoder().raw_decode(line[start:])[0]
    strip, groups = player["tokens"], [group for group, _ in codec.config.codebook_index]
    codes = np.frombuffer(base64.b64decode(strip["codes"]), "<u2").reshape(len(strip["rows"]), -1)
    assert (codes == clip.codes[0, : len(codes)].numpy()).all()
    assert len(set(strip["groups"])) == len(set(groups[: len(codes)]))
    # the strip is as long as the clip, up to one step
    assert 0 <= codes.shape[1] * strip["framesPerStep"] - player["frames"] < 2 * strip["framesPerStep"]
    assert "holds 2 sequences" in view.figures
    assert Path(view.tokens).name.startswith("many")


def test_what_is_never_seen_has_no_error(codec, tmp_path):
    sequence = make_sequence("clip", 20, None)
    sequence.poses[:, 91:] = 0
    write_npz(tmp_path / "clip.npz", sequence)
    figures = codec.view(codec.open(str(tmp_path / "clip.npz")), 1).figures
    assert "Left hand error" not in numbers(figures) and "<dt>Left hand error</dt><dd>–</dd>" in figures
    assert "nan" not in figures.lower()


# ---- what it refuses ------------------------------------------------------------------------------------------------


def bad_files(folder):
    """File -> words of the refusal."""
    frames = 3601
    np.savez(folder / "layout.npz", poses=np.ones((9, 178, 3), np.float32))
    np.savez(folder / "none.npz", poses=np.ones((0, 133, 3), np.float32))
    np.savez(folder / "long.npz", poses=np.ones((frames, 133, 3), np.float32))
    np.savez(folder / "slow.npz", poses=np.ones((99, 133, 3), np.float32), fps=0.1)
    np.savez(folder / "slower.npz", poses=np.ones((36, 133, 3), np.float32), fps=0.1)
    np.savez(folder / "hostile.npz", **{HOSTILE: np.zeros(3)})
    np.savez_compressed(folder / "bomb.npz", poses=np.zeros((50_000, 133, 3), np.float32))
    (folder / "broken.npz").write_bytes(b"PK\3\4 and no more")
    (folder / "broken.pose").write_bytes(bytes(100))
    (folder / "empty.npz").touch()
    (folder / "empty.pose").touch()
    with open(folder / "large.npz", "wb") as file:
        file.truncate(65 * 2**20)
    return {
        "layout.npz": "178 keypoints, expected 133",
        "none.npz": "0 frames",
        "long.npz": f"{frames} frames, expected at most {frames - 1}",
        "slow.npz": "99 frames at 0.1 fps would become 24500 at 25; expected 19800 at most",
        "slower.npz": "has 36 frames, which are 8751 at the model's frame rate, expected at most 3600",
        "hostile.npz": "no array named poses",
        "bomb.npz": "more than the limit",
        "broken.npz": "is not an npz file",
        "broken.pose": "is not a .pose file",
        "empty.npz": "is empty",
        "empty.pose": "is empty",
        "large.npz": "65 MB, expected at most 64 MB",
    }


def test_files_that_cannot_be_used_are_refused_with_the_reason(codec, tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(PoseFileError, match=re.escape(words)):
            codec.open(str(tmp_path / name))


def test_as_many_frames_as_the_page_says(app, codec, tmp_path):
    np.savez(tmp_path / "long.npz", poses=np.ones((app.MAX_FRAMES, 133, 3), np.float32))
    assert len(codec.read(str(tmp_path / "long.npz"))[0].poses) == app.MAX_FRAMES
    assert str(app.MAX_FRAMES) in codec.accepts


def test_pose_files_are_converted_where_the_layout_can_be(app, codec, checkpoint, tmp_path):
    write_pose(tmp_path / "clip.pose", make_sequence("clip", 20, 25.0), get_skeleton("coco_wholebody_133"))
    assert codec.read(str(tmp_path / "clip.pose"))[0].poses.shape == (20, 133, 3)
    other = app.Codec(str(checkpoint))
    assert other.read(str(tmp_path / "clip.pose"))[0].poses.shape == (20, 17, 3)
    write_pose(tmp_path / "other.pose", make_sequence("clip", 20, 25.0, 50), get_skeleton("phoenix_50"))
    with pytest.raises(PoseFileError, match="coco_17"):
        other.open(str(tmp_path / "other.pose"))


def test_a_model_that_is_not_there_is_one_sentence(app, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "./no-such-model"])
    with pytest.raises(SystemExit, match=r"^\./no-such-model: no such folder"):
        app.main()
    monkeypatch.setenv("POSE_TOKENIZER_MODEL", "somebody/something")
    assert app.default_model() == "somebody/something"


# ---- as a Space -----------------------------------------------------------------------------------------------------


def upload(arguments, target):
    """What `hf upload` would put into a repository, by the Hub client's own rule of which files."""
    parser = argparse.ArgumentParser()
    for name in ("repo_id", "local_path", "path_in_repo"):
        parser.add_argument(name)
    parser.add_argument("--type", required=True, choices=["space"])
    parser.add_argument("--include", action="append")
    parser.add_argument("--exclude", action="append")
    args = parser.parse_args(arguments)
    source = ROOT / args.local_path
    tops = [path for path in source.iterdir() if not path.name.startswith(".") and path.name != "runs"]
    files = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top]) if path.is_file()]
    names = [path.relative_to(source).as_posix() for path in files]
    kept = filter_repo_objects(names, allow_patterns=args.include, ignore_patterns=args.exclude)
    for name in kept:
        (target / args.path_in_repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / args.path_in_repo / name)


def test_the_three_commands_make_a_space_that_needs_no_checkout(tmp_path):
    text = (SPACE / "README.md").read_text("utf-8")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("hf ")]
    assert [command[1] for command in commands] == ["repos", "upload", "upload"]
    for command in commands[1:]:
        upload(command[2:], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("app.py", "requirements.txt", "README.md"),
        *("modeling_pose_tokenizer", "pretrained"),
    }
    metadata = yaml.safe_load((tmp_path / "README.md").read_text("utf-8").split("---")[1])
    assert (tmp_path / metadata["app_file"]).is_file() and metadata["sdk"] == "gradio"
    check = "import app; print(app.render_player.__code__.co_filename); print(app.default_model())"
    result = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=True)
    package, model = map(Path, result.stdout.splitlines())
    assert package.is_relative_to(tmp_path.resolve()) and model == tmp_path.resolve() / "pretrained" / "small"
    load_pretrained(model)


def test_requirements_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    known = {
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    }
    lines = (SPACE / "requirements.txt").read_text("utf-8").split()
    assert set(project["dependencies"]) <= set(lines) <= known


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(app, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    page = app.serve(app.default_model(), prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()
    patch.undo()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


def visit(page, address, path=None):
    page.goto(address)
    page.get_by_text("Drop File Here").wait_for()
    if path is not None:
        drop(page, path)


def drop(page, path):
    page.locator("#file input[type=file]").set_input_files(str(path))


def player(page):
    """The player, once it shows; a new one replaces the old one when it is drawn."""
    page.wait_for_function("document.querySelectorAll('iframe[title=Player]').length === 1")
    frame = page.frame_locator("iframe[title=Player]")
    frame.locator(".strip canvas").wait_for()
    return frame


def move(page, levels):
    before = page.locator("#figures data").first.inner_text()
    page.locator("#quality input[type=number]").fill(str(levels))
    page.locator("#quality input[type=number]").press("Enter")
    page.wait_for_function(
        "(before) => document.querySelector('#figures data').innerText !== before", arg=before, timeout=10_000
    )


def download(page, button, folder):
    with page.expect_download() as waiting:
        page.locator(button).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def pixels(frame, index):
    return frame.locator("canvas").nth(index).evaluate("(canvas) => canvas.toDataURL()")


def test_a_visit(codec, address, browser, clip_file, tmp_path):
    levels = codec.config.num_levels
    with open_page(browser) as (page, events):
        visit(page, address, clip_file)
        frame = player(page)
        assert page.locator("#results").is_visible() and not page.locator("#refusal").is_visible()

        stills = [pixels(frame, index) for index in range(4)]
        frame.locator(".play").click()
        page.wait_for_timeout(300)
        assert all(pixels(frame, index) != still for index, still in enumerate(stills)), "three pictures and the strip"

        full = page.locator("#figures").inner_html()
        move(page, 1)
        low = numbers(page.locator("#figures").inner_html())
        assert low["Bits per second"] < numbers(full)["Bits per second"]
        assert low["Error"] > numbers(full)["Error"]
        frame = player(page)
        assert frame.locator(".play").get_attribute("aria-label") == "Pause", "it goes on playing"

        tokens = download(page, "#tokens", tmp_path).read_text("utf-8").strip()
        rows = codec.model.quantizer.count_codebooks(1)
        assert (codec.formatter.text_to_codes(tokens) == codec.open(str(clip_file)).codes[0, :rows].numpy()).all()
        (again,) = read_npz(download(page, "#reconstruction", tmp_path), num_keypoints=133)
        assert again.poses.shape == (50, 133, 3) and again.fps == 30.0
        move(page, levels)
        assert numbers(page.locator("#figures").inner_html())["Error"] == numbers(full)["Error"]
        assert not events.errors and not events.foreign


def test_bad_files_in_the_page(address, browser, clip_file, tmp_path):
    bad = bad_files(tmp_path)
    with open_page(browser) as (page, events):
        visit(page, address, clip_file)
        player(page)
        for name in ("layout.npz", "hostile.npz", "empty.pose", "long.npz"):
            page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
            page.get_by_text("Drop File Here").wait_for()
            drop(page, tmp_path / name)
            page.get_by_role("alert").filter(has_text=f"{name}: ").wait_for()
            message = page.get_by_role("alert").inner_text()
            assert bad[name] in message and "Expected: .npz with poses" in message
            assert "Traceback" not in message and str(tmp_path) not in message and "/" not in message
            assert not page.locator("#results").is_visible(), "what was shown before is not this file's"
            assert not page.locator("#refusal img").count()
        page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
        page.get_by_text("Drop File Here").wait_for()
        drop(page, tmp_path / "large.npz")
        page.get_by_text("exceed the maximum allowed size").wait_for()
        drop(page, clip_file)
        player(page)
        assert page.locator("#results").is_visible() and not page.locator("#refusal").is_visible()
        assert not events.errors and not events.foreign


def test_visitors_do_not_mix(codec, address, browser, clip_file, tmp_path):
    write_npz(tmp_path / "other.npz", make_sequence("other", 33, None, seed=1))
    with open_page(browser) as (first, _), open_page(browser) as (second, _):
        visit(first, address, clip_file)
        visit(second, address, tmp_path / "other.npz")
        player(first), player(second)
        theirs = second.locator("#figures").inner_html()
        move(first, 1)
        assert second.locator("#figures").inner_html() == theirs
        move(second, 1)
        assert len(read_npz(download(first, "#reconstruction", tmp_path))[0].poses) == 50
        assert len(read_npz(download(second, "#reconstruction", tmp_path))[0].poses) == 33


def test_an_example_on_a_phone_in_the_dark(app, address, browser):
    pytest.importorskip("spoken_to_signed", reason="the examples are not installed")
    with open_page(browser, 390, 844, dark=True) as (page, events):
        visit(page, address)
        page.get_by_text(next(iter(app.EXAMPLES))).click()
        frame = player(page)
        assert frame.locator("html").get_attribute("data-theme") == "dark"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert frame.locator("html").evaluate("(root) => root.scrollWidth <= root.clientWidth")
        frame_height = page.locator("iframe").evaluate("(frame) => frame.clientHeight")
        assert frame.locator("html").evaluate("(root) => root.scrollHeight") <= frame_height
        assert not events.errors and not events.foreign
