"""Figures and films: they show what they are given, missing points are absent, no input breaks them."""

import math
import sys
from itertools import pairwise

import matplotlib.pyplot
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.figures import codebook_figure, error_figure, write_figures
from modeling_pose_tokenizer.formats import PoseSequence, write_npz, write_shard
from modeling_pose_tokenizer.hub import save_checkpoint
from modeling_pose_tokenizer.metrics import ReconstructionMetrics
from modeling_pose_tokenizer.modeling_pose_tokenizer import PoseTokenizerModel
from modeling_pose_tokenizer.pose_pairs import frame_errors
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, get_skeleton
from modeling_pose_tokenizer.visualization import (
    PosePair,
    animate,
    animate_file,
    figure_to_array,
    reconstruction_figure,
)
from pages import WHOLEBODY, page_data, random_poses, unpack_poses


def filled_metrics():
    """Figures of a made-up evaluation with every section, and its code counts."""
    config = PoseTokenizerConfig(num_quantizers=[3, 1, 2, 2], codebook_size=16)
    metrics = ReconstructionMetrics(WHOLEBODY, config)
    poses = random_poses(9)
    metrics.update((poses + 0.03)[None], poses[None], None, [100.0])
    metrics.update_codes(np.random.default_rng(0).integers(0, 16, (1, 8, 3)), None, 0.0123)
    result = metrics.compute()
    parts = {part: block["mpjpe"] for part, block in result["parts"].items()}
    ends = [0.0, 1.0, None]
    result["by_speed"] = {
        part: [{"from": low, "to": high, "mpjpe": error, "count": 7} for low, high in pairwise(ends)]
        for part, error in parts.items()
    }
    result["rate_distortion"] = [
        {"num_quantizers": level, "bits_per_frame": 4.0 * level, "overall": 0.1 / level, "parts": parts}
        for level in (1, 2, 3)
    ]
    return result, metrics.code_counts.numpy()


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


@pytest.mark.parametrize("name", sorted(SKELETONS))
def test_every_layout_can_be_drawn(name):
    skeleton = get_skeleton(name)
    poses = random_poses(5, skeleton, dims=4)
    assert reconstruction_figure(poses, poses, skeleton).axes
    assert error_figure(PosePair("clip", poses, poses), skeleton).axes


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.floats(1e-2, 1e2), st.sampled_from([3, 4]))
def test_errors_over_time_are_the_errors_of_the_metrics(seed, frames, scale, dims):
    reference, change = random_poses(frames, dims=dims, seed=seed), random_poses(frames, dims=dims, seed=seed + 1)
    reconstruction = reference + np.float32(0.1) * np.nan_to_num(change)
    pair = PosePair("clip", reference, reconstruction, scale=scale)
    errors = frame_errors(pair, WHOLEBODY, 0.3)
    for part, own in WHOLEBODY.group_keypoints.items():
        for t in range(frames):
            seen = [k for k in own if reference[t, k, -1] >= 0.3 and np.isfinite(reference[t, k]).all()]
            distances = [
                math.dist(*(poses[t, k, :-1].tolist() for poses in (reference, reconstruction))) for k in seen
            ]
            expected = sum(distances) / len(seen) / scale if seen else math.nan
            assert errors[part][t] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_every_fact_has_a_figure_in_pixels_and_in_vectors(tmp_path):
    metrics, counts = filled_metrics()
    poses = random_poses(9)
    pairs = [PosePair("alone", poses), PosePair("clip", poses, poses + np.float32(0.1))]
    files = write_figures(tmp_path / "new" / "figures", pairs, WHOLEBODY, metrics, counts)
    names = ("body_map", "reconstruction", "error_over_time", "error_by_speed", "rate_distortion", "codebook_use")
    assert {path.name for path in files} == {f"{name}{end}" for name in names for end in (".png", ".pdf")}
    assert sorted(files) == sorted((tmp_path / "new" / "figures").iterdir())
    for path in files:
        assert path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
    assert matplotlib.pyplot.get_fignums() == [], "no global state keeps figures alive"


def test_the_codebook_figure_shows_used_and_dead_codes():
    counts = np.array([[5, 0, 3, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    by_name, by_pair = ["body/0", "body/1", "face/0"], [("body", 0), ("body", 1), ("face", 0)]
    for codebooks in (by_name, by_pair):
        figure = codebook_figure(counts, codebooks)
        body, face = figure.axes
        assert [line.get_ydata().tolist() for line in body.lines[::2]] == [[5, 3], [1, 1, 1, 1]]
        labels = [line.get_label() for line in (*body.lines[::2], face.lines[0])]
        assert [label.split(": ")[1].split(" dead")[0] for label in labels] == ["2", "0", "4"]
        assert labels[1].endswith("perplexity 4") and labels[2].endswith("perplexity 0")
        assert figure_to_array(figure).ndim == 3
    with pytest.raises(ValueError, match=r"code_counts has the shape \(3, 4\); expected \(2, K\)"):
        codebook_figure(counts, by_name[:2])


@pytest.mark.parametrize("case", ["one frame", "nothing seen", "not a number", "original alone", "far away"])
def test_no_input_breaks_the_pictures(tmp_path, case):
    reference = random_poses(1 if case == "one frame" else 4)
    reconstruction = reference + np.float32(0.01)
    if case == "nothing seen":
        reference[..., -1] = 0.0
    if case == "not a number":
        reconstruction[:] = np.nan
    if case == "far away":
        reconstruction[0, 5, :2] = 1e30
    pair = PosePair("clip", reference, None if case == "original alone" else reconstruction)
    assert figure_to_array(reconstruction_figure(reference, reconstruction, WHOLEBODY)).shape[-1] == 3
    animate(pair, WHOLEBODY, tmp_path / "clip.gif")
    empty = ReconstructionMetrics(WHOLEBODY).compute()
    assert write_figures(tmp_path / "figures", [pair], WHOLEBODY, empty)


def test_a_gif_has_a_picture_for_every_frame(tmp_path):
    reference = random_poses(7)
    animate(PosePair("clip", reference, reference + 0.1, fps=20.0), WHOLEBODY, tmp_path / "clip.gif")
    animate(PosePair("clip", reference, fps=20.0), WHOLEBODY, tmp_path / "alone.gif")
    with Image.open(tmp_path / "clip.gif") as both, Image.open(tmp_path / "alone.gif") as alone:
        assert both.n_frames == alone.n_frames == 7 and both.info["duration"] == 50
        assert both.width == 3 * alone.width
        assert both.width % 2 == 0 and both.height % 2 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.gif", "clip.gif"]


def test_a_video_is_written_and_read_again(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed")
    reference = random_poses(7)
    animate(PosePair("clip", reference, reference, fps=20.0), WHOLEBODY, tmp_path / "clip.mp4")
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "clip.mp4"))
    assert count == 7 and seconds == pytest.approx(7 / 20, abs=0.02)


def test_what_cannot_be_written_is_said_in_a_sentence(tmp_path, monkeypatch):
    pair = PosePair("clip", random_poses(3))
    with pytest.raises(ValueError, match=r"clip\.avi ends in '\.avi'.*\.gif, \.mp4 or \.html"):
        animate(pair, WHOLEBODY, tmp_path / "clip.avi")
    with pytest.raises(FileNotFoundError, match=r"clip\.gif cannot be written: there is no folder .*nowhere"):
        animate(pair, WHOLEBODY, tmp_path / "nowhere" / "clip.gif")
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without ffmpeg
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(RuntimeError, match="needs the program ffmpeg"):
        animate(pair, WHOLEBODY, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_upside_down_turns_y_alone():
    reference = random_poses(3, dims=4)
    turned = PosePair("clip", reference, reference).upside_down()
    assert np.array_equal(turned.reference, reference * np.float32([1, -1, 1, 1]), equal_nan=True)
    assert np.array_equal(turned.upside_down().reconstruction, reference, equal_nan=True)


def test_a_turn_goes_round_and_needs_depth():
    reference = np.nan_to_num(random_poses(3, dims=4))
    pair = PosePair("clip", reference, reference)
    quarter = pair.turned(90).reference
    np.testing.assert_allclose(quarter[..., 0], reference[..., 2], atol=1e-6)
    np.testing.assert_allclose(quarter[..., [1, 3]], reference[..., [1, 3]], atol=0)
    np.testing.assert_allclose(pair.turned(90).turned(-90).reconstruction, reference, atol=1e-6)
    with pytest.raises(ValueError, match="clip has no z"):
        PosePair("clip", reference[..., :3]).turned(30)


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
    assert not unpack_poses(player["reference"], 6)[1][2].any(), "a masked frame shows nothing"
    animate_file(str(clips / "packed.npz"), str(tmp_path / "alone.html"))  # the first, in the layout of 133 keypoints
    page = (tmp_path / "alone.html").read_text("utf-8")
    assert "<title>first</title>" in page and page_data(page, "sequences")[0]["reconstruction"] is None


def test_a_layout_of_ones_own_is_animated(tmp_path):
    (tmp_path / "arm.yaml").write_text("keypoint_names: hip neck hand\nedges: [hip neck hand]\n")
    np.savez(tmp_path / "arm.npz", poses=random_poses(5, dims=4)[:, :3])
    animate_file(str(tmp_path / "arm.npz"), str(tmp_path / "arm.html"), layout=str(tmp_path / "arm.yaml"), turn=30.0)
    page = (tmp_path / "arm.html").read_text("utf-8")
    assert page_data(page, "skeleton") == {"keypoints": 3, "lines": [[0, 1, 1, False], [1, 2, 2, False]]}
    with pytest.raises(ValueError, match=r"expected one of .*Did you mean 'coco_17'"):
        animate_file(str(tmp_path / "arm.npz"), str(tmp_path / "arm.html"), layout="coco_71")


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
