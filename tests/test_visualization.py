"""Figures, films and the report: they show what they are given, missing points are absent, no input breaks them."""

import base64
import json
import re

import matplotlib.pyplot
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.formats import PoseSequence, write_npz, write_shard
from modeling_pose_tokenizer.hub import save_checkpoint
from modeling_pose_tokenizer.metrics import ReconstructionMetrics
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, get_skeleton
from modeling_pose_tokenizer.visualization import (
    MISSING,
    PosePair,
    animate,
    animate_file,
    figure_to_array,
    reconstruction_figure,
    write_report,
)

WHOLEBODY = get_skeleton("coco_wholebody_133")


def random_poses(frames, skeleton=WHOLEBODY, dims=3, seed=0):
    """Poses (T, N, D) that wander, a tenth of the keypoints missing and some of those not even numbers."""
    rng = np.random.default_rng(seed)
    poses = rng.normal(size=(1, skeleton.num_keypoints, dims)) + 0.05 * rng.normal(size=(frames, 1, dims)).cumsum(0)
    poses[..., -1] = rng.choice([0.0, 0.8, 1.0], p=[0.1, 0.4, 0.5], size=poses.shape[:-1])
    poses[(poses[..., -1] == 0) & (rng.random(poses.shape[:-1]) < 0.5), :-1] = np.nan
    return poses.astype(np.float32)


def page_data(page, name):
    """What the page's script holds under a name; the values stand on one line, `a = {...}, b = {...}, c = [...];`."""
    (line,) = re.findall(r"^const skeleton = .*;$", page, re.MULTILINE)
    text = line[line.index(f"{name} = ") + len(name) + 3 :]
    return json.JSONDecoder().raw_decode(text)[0]


def unpack(text, *shape):
    return np.frombuffer(base64.b64decode(text), "<i2").reshape(*shape, 2)


# ---- the report --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(1e-3, 1e3), st.sampled_from([3, 4]))
def test_the_page_holds_the_poses_and_nothing_where_they_are_missing(tmp_path_factory, seed, frames, scale, dims):
    reference, reconstruction = (random_poses(frames, dims=dims, seed=seed + i) for i in range(2))
    for poses in (reference, reconstruction):
        poses[..., :-1] *= scale
    path = tmp_path_factory.mktemp("report") / "page.html"
    write_report(path, [PosePair("clip", reference, reconstruction)], WHOLEBODY)
    (player,) = page_data(path.read_text("utf-8"), "sequences")
    seen = [(poses[..., -1] >= 0.3) & np.isfinite(poses).all(-1) for poses in (reference, reconstruction)]
    packed = [unpack(player[name], frames, 133) for name in ("reference", "reconstruction")]
    for there, values in zip(seen, packed, strict=True):
        assert np.array_equal(there, values[..., 0] != MISSING)
    # one similarity brings both back: to half a step, where half a view is 3000 steps
    if seen[0].sum() < 2:
        return
    points, steps = reference[seen[0]][:, :2].astype(np.float64), packed[0][seen[0]].astype(np.float64)
    low, high = points.argmin(0)[0], points.argmax(0)[0]
    unit = (points[high, 0] - points[low, 0]) / (steps[high, 0] - steps[low, 0])
    origin = points[low] - unit * steps[low]
    for poses, there, values in zip((reference, reconstruction), seen, packed, strict=True):
        error = np.abs(values[there] * unit + origin - poses[there][:, :2])
        assert error.max(initial=0.0) < 4 * unit


def filled_metrics(skeleton=WHOLEBODY, missing_part=None):
    config = PoseTokenizerConfig(num_quantizers=[3, 1, 2, 2], codebook_size=16)
    metrics = ReconstructionMetrics(skeleton, config)
    poses = random_poses(9)
    if missing_part:
        poses[:, list(skeleton.group_keypoints[missing_part])] = 0.0
    metrics.update((poses + 0.03)[None], poses[None], None, [100.0])
    metrics.update_codes(np.random.default_rng(0).integers(0, 16, (1, 8, 3)), None, 0.0123)
    return metrics


def test_the_page_stands_alone_and_its_numbers_are_those_of_the_metrics(tmp_path):
    metrics = filled_metrics(missing_part="left_hand")
    result = metrics.compute()
    poses = random_poses(6)
    hostile = "</script><script>alert(1)</script>"
    pairs = [PosePair(hostile, poses, poses + 0.01, 25.0, "Best", {"body": 0.0123, "left_hand": None})]
    path = tmp_path / "index.html"
    path.write_text("an older report")
    write_report(path, pairs, WHOLEBODY, result, metrics.code_counts.numpy(), title="A & B", subtitle=hostile)
    page = path.read_text("utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.html"]
    assert "://" not in page and not re.search(r"<link|@import|\bsrc=|\bhref=|\burl\(", page)
    assert "default-src 'none'" in page
    assert hostile not in page and page.count("<script>") == 1 and "A &amp; B" in page
    shown = {float(value) for value in re.findall(r'<data value="([^"]+)">', page)}
    expected = {0.0123, *result["data"].values()}
    for block in (result["overall"], *result["parts"].values()):
        expected |= {value for key, value in block.items() if key not in ("mse", "mae")}
    for value in result["tokens"].values():
        expected |= set(value) if isinstance(value, list) else {value}
    expected -= {None, *result["tokens"]["codebooks"]}
    assert expected <= shown
    assert shown <= expected | {16.0, 3.0}, "a number that is not in the metrics (but the sizes of the codebooks)"
    assert not re.search(r"\bnan\b", re.sub(r'"[A-Za-z0-9+/=]{20,}"', "", page).lower()), "base64 aside"


@pytest.mark.parametrize("name", sorted(SKELETONS))
def test_every_layout_can_be_drawn(tmp_path, name):
    skeleton = get_skeleton(name)
    poses = random_poses(5, skeleton, dims=4)
    write_report(tmp_path / "page.html", [PosePair("clip", poses, poses)], skeleton)
    lines = page_data((tmp_path / "page.html").read_text("utf-8"), "skeleton")["lines"]
    assert len(lines) >= len(skeleton.edges) - 1
    assert reconstruction_figure(poses, poses, skeleton).axes


@pytest.mark.parametrize(
    "case", ["one frame", "nothing seen", "not a number", "original alone", "no sequence", "far away"]
)
def test_no_input_breaks_the_pictures(tmp_path, case):
    reference = random_poses(1 if case == "one frame" else 4)
    reconstruction = reference + 0.01
    if case == "nothing seen":
        reference[..., -1] = 0.0
    if case == "not a number":
        reconstruction[:] = np.nan
    if case == "far away":
        reconstruction[0, 5, :2] = 1e30
    pair = PosePair("clip", reference, None if case == "original alone" else reconstruction)
    write_report(
        tmp_path / "page.html", [] if case == "no sequence" else [pair], WHOLEBODY, filled_metrics().compute()
    )
    empty = ReconstructionMetrics(WHOLEBODY).compute()
    write_report(tmp_path / "empty.html", [], WHOLEBODY, empty)
    assert figure_to_array(reconstruction_figure(reference, reconstruction, WHOLEBODY)).shape[-1] == 3
    animate(pair, WHOLEBODY, tmp_path / "clip.gif")


# ---- figures and films -------------------------------------------------------------------------------------------


def count_hue(pixels, color):
    """Pixels that are clearly blue or clearly orange."""
    red, blue = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    return int(((blue - red > 60) if color == "blue" else (red - blue > 60)).sum())


def test_a_figure_overlays_both_and_zooms_on_the_hands_that_are_seen():
    reference = random_poses(12)
    reference[:, list(WHOLEBODY.group_keypoints["left_hand"]), -1] = 0.0
    figure = reconstruction_figure(reference, reference + 0.2, WHOLEBODY, title="clip", num_frames=3)
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["whole", "right hand"]
    assert all(axes.get_ylim()[0] > axes.get_ylim()[1] for axes in figure.axes), "y points down"
    pixels = figure_to_array(figure)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    assert count_hue(pixels, "blue") > 100 and count_hue(pixels, "orange") > 100
    nothing = reconstruction_figure(reference, reference * 0, WHOLEBODY)
    orange_of_the_legend = count_hue(figure_to_array(nothing), "orange")
    assert orange_of_the_legend < count_hue(pixels, "orange") / 10, "a keypoint without confidence is not drawn"
    assert matplotlib.pyplot.get_fignums() == [], "no global state keeps figures alive"


def test_a_gif_has_a_picture_for_every_frame(tmp_path):
    reference = random_poses(7)
    animate(PosePair("clip", reference, reference + 0.1, fps=20.0), WHOLEBODY, tmp_path / "clip.gif")
    animate(PosePair("clip", reference, fps=20.0), WHOLEBODY, tmp_path / "alone.gif")
    with Image.open(tmp_path / "clip.gif") as both, Image.open(tmp_path / "alone.gif") as alone:
        assert both.n_frames == alone.n_frames == 7 and both.info["duration"] == 50
        assert both.width == 3 * alone.width
        assert both.width % 2 == 0 and both.height % 2 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.gif", "clip.gif"]


def test_what_cannot_be_written_is_said_in_a_sentence(tmp_path, monkeypatch):
    pair = PosePair("clip", random_poses(3))
    with pytest.raises(ValueError, match=r"clip\.avi ends in '\.avi'.*\.gif, \.mp4 or \.html"):
        animate(pair, WHOLEBODY, tmp_path / "clip.avi")
    with pytest.raises(FileNotFoundError, match=r"clip\.gif cannot be written: there is no folder .*nowhere"):
        animate(pair, WHOLEBODY, tmp_path / "nowhere" / "clip.gif")
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without ffmpeg
    with pytest.raises(RuntimeError, match="needs the program ffmpeg"):
        animate(pair, WHOLEBODY, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_upside_down_turns_y_alone():
    reference = random_poses(3, dims=4)
    turned = PosePair("clip", reference, reference).upside_down()
    assert np.array_equal(turned.reference, reference * np.float32([1, -1, 1, 1]), equal_nan=True)
    assert np.array_equal(turned.upside_down().reconstruction, reference, equal_nan=True)


# ---- films of files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A packed file, a plain file and a model."""
    folder = tmp_path_factory.mktemp("clips")
    sequences = [
        PoseSequence(name, np.nan_to_num(random_poses(6, seed=seed)) * 100, np.arange(6) != 2, 30.0)
        for seed, name in enumerate(["first", "second"])
    ]
    write_shard(folder / "packed.npz", sequences)
    write_npz(folder / "plain.npz", sequences[0])
    config = PoseTokenizerConfig(hidden_size=16, num_part_layers=1, num_quantizers=1, codebook_size=16)
    save_checkpoint(PoseTokenizerModel(config), PoseFeatureExtractor.from_config(config), folder / "model")
    return folder


def test_a_file_is_animated_in_its_own_coordinates_and_rate(clips, tmp_path):
    animate_file(str(clips / "packed.npz"), str(tmp_path / "clip.html"), str(clips / "model"), "second")
    page = (tmp_path / "clip.html").read_text("utf-8")
    (player,) = page_data(page, "sequences")
    assert "<title>second</title>" in page and player["frames"] == 6 and player["fps"] == 30.0
    assert player["reconstruction"] is not None
    assert (unpack(player["reference"], 6, 133)[2] == MISSING).all(), "a masked frame shows nothing"
    animate_file(str(clips / "packed.npz"), str(tmp_path / "alone.html"))  # the first, in the layout of 133 keypoints
    page = (tmp_path / "alone.html").read_text("utf-8")
    assert "<title>first</title>" in page and page_data(page, "sequences")[0]["reconstruction"] is None


def test_files_that_cannot_be_animated_are_named(clips, tmp_path):
    output = str(tmp_path / "clip.html")
    with pytest.raises(ValueError, match=r"packed\.npz: holds no sequence 'third'; the first of 2 is 'first'"):
        animate_file(str(clips / "packed.npz"), output, sequence_id="third")
    with pytest.raises(ValueError, match=r"plain\.npz: has 133 keypoints, but coco_17 has 17"):
        animate_file(str(clips / "plain.npz"), output, layout="coco_17")
    odd = tmp_path / "odd.npz"
    np.savez(odd, poses=np.ones((2, 7, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"odd\.npz: has 7 keypoints, as no named layout has"):
        animate_file(str(odd), output)
    with pytest.raises(ValueError, match="133"):
        animate_file(str(odd), output, str(clips / "model"))
    with pytest.raises(ValueError, match=r"absent\.npz"):
        animate_file(str(tmp_path / "absent.npz"), output)
