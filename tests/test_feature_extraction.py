"""The feature extractor: normalise and postprocess are inverses; placement, missing points and padding are laws."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor

from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.feature_extraction_pose_tokenizer import PoseFeatureExtractor
from modeling_pose_tokenizer.normalization_pose_tokenizer import interpolate
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS

NUM_KEYPOINTS = 17
LEFT, RIGHT = SKELETONS["coco_17"].scale_pair


def make_extractor(keypoint_dim=3, **kwargs):
    return PoseFeatureExtractor("coco_17", keypoint_dim=keypoint_dim, **kwargs)


def make_poses(num_frames=12, keypoint_dim=3, seed=0, missing=0.2, pair=True):
    """Smooth random motion around a random pose with shoulders one unit apart; float64."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(-2, 2, (1, NUM_KEYPOINTS, keypoint_dim - 1))
    base[0, LEFT], base[0, RIGHT] = 0.5, -0.5
    motion = rng.normal(0, 0.05, (num_frames, NUM_KEYPOINTS, keypoint_dim - 1)).cumsum(0) / math.sqrt(num_frames)
    confidence = rng.uniform(0.3, 1.0, (num_frames, NUM_KEYPOINTS, 1))
    confidence[rng.random(confidence.shape) < missing] = 0.0
    if not pair:
        confidence[:, LEFT] = 0.0
    return np.concatenate([(base + motion), confidence], -1)


def place(poses, scale, offset):
    return np.concatenate([poses[..., :-1] * scale + offset, poses[..., -1:]], -1)


pose_arguments = st.fixed_dictionaries(
    {
        "num_frames": st.integers(1, 30),
        "keypoint_dim": st.sampled_from([3, 4]),
        "seed": st.integers(0, 10_000),
        "missing": st.sampled_from([0.0, 0.2, 0.7]),
        "pair": st.booleans(),
    }
)
scales = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
offsets = st.floats(-1e3, 1e3)


# ---- round trip -----------------------------------------------------------------------------------------------------


@given(pose_arguments, scales, offsets)
def test_postprocess_inverts_call(arguments, scale, offset):
    poses = place(make_poses(**arguments), scale, offset)
    extractor = make_extractor(arguments["keypoint_dim"])
    inputs = extractor(poses)
    (back,) = extractor.postprocess(inputs["input_values"], inputs)
    assert back.shape == poses.shape and back.dtype == np.float32
    seen = poses[..., -1] > 0
    np.testing.assert_allclose(back[seen], poses[seen], rtol=1e-4, atol=1e-4 * scale)
    assert not back[~seen].any()


@given(pose_arguments, scales, offsets)
def test_input_values_do_not_depend_on_placement(arguments, scale, offset):
    poses = make_poses(**arguments)
    extractor = make_extractor(arguments["keypoint_dim"])
    expected, moved = extractor(poses), extractor(place(poses, scale, offset))
    np.testing.assert_allclose(moved["input_values"], expected["input_values"], atol=1e-4)


@given(st.integers(1, 60), st.floats(1, 120), st.integers(0, 100))
def test_resampling_returns_the_exact_length(num_frames, fps, seed):
    extractor = make_extractor()
    inputs = extractor(make_poses(num_frames, seed=seed), fps=fps)
    length = inputs["input_values"].shape[1]
    assert abs((length - 1) / 25 - (num_frames - 1) / fps) <= 0.5 / 25 + 1e-9
    assert length == extractor.resampled_length(num_frames, fps)
    (back,) = extractor.postprocess(inputs["input_values"], inputs)
    assert len(back) == num_frames


@pytest.mark.parametrize("fps", [10.0, 24.0, 29.97, 30.0, 50.0])
def test_resampling_keeps_uniform_motion(fps):
    """A straight line at constant speed survives both ways, but for the held half frame at its end."""
    extractor = make_extractor()
    seconds = np.arange(40) / fps
    poses = np.repeat(make_poses(1, missing=0.0), 40, axis=0)
    poses[..., :2] += seconds[:, None, None]
    inputs = extractor(poses, fps=fps)
    velocity = np.diff(inputs["input_values"][0, :-1, :, :2], axis=0)
    np.testing.assert_allclose(velocity, 1 / 25 / inputs["scale"][0], rtol=1e-3)
    (back,) = extractor.postprocess(inputs["input_values"], inputs)
    last = math.floor((inputs["input_values"].shape[1] - 2) * fps / 25)
    np.testing.assert_allclose(back[: last + 1], poses[: last + 1], rtol=1e-4, atol=1e-4)
    assert np.abs(back - poses).max() <= 0.5 / 25 + 1e-4


@given(st.integers(1, 12), st.integers(1, 20), st.floats(0.2, 3), st.integers(0, 100))
def test_interpolation_equals_its_naive_form(num_frames, num_times, step, seed):
    rng = np.random.default_rng(seed)
    points, confidence = rng.normal(size=(num_frames, 3, 2)), rng.random((num_frames, 3))
    observed = rng.random((num_frames, 3)) < 0.6
    times = np.arange(num_times) * step
    got = interpolate(points, confidence, observed, times)
    for row, time in enumerate(times):
        time = min(time, num_frames - 1)
        low = math.floor(time)
        high = min(low + 1, num_frames - 1)
        nearest = low if time - low < 0.5 else high
        for k in range(3):
            both_alike = observed[low, k] == observed[high, k]
            weight = time - low if both_alike else float(nearest == high)
            np.testing.assert_allclose(got[0][row, k], points[low, k] * (1 - weight) + points[high, k] * weight)
            np.testing.assert_allclose(
                got[1][row, k], confidence[low, k] * (1 - weight) + confidence[high, k] * weight
            )
            assert got[2][row, k] == observed[nearest, k]


def test_equal_frame_rates_do_not_resample():
    extractor = make_extractor(sampling_rate=29.97)
    poses = make_poses(9)
    expected = extractor(poses)["input_values"]
    np.testing.assert_array_equal(extractor(poses, fps=np.float32(29.97))["input_values"], expected)
    assert extractor(poses, fps=30.0)["input_values"].shape == (1, 9, NUM_KEYPOINTS, 3)


# ---- missing keypoints and wreckage ---------------------------------------------------------------------------------


@given(pose_arguments, st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 1e300]), st.floats(0, 0.3))
def test_wreckage_counts_as_missing(arguments, value, share):
    poses = make_poses(**arguments | {"missing": 0.0})
    rng = np.random.default_rng(arguments["seed"])
    hit = rng.random(poses.shape[:2]) < share
    wrecked, absent = poses.copy(), poses.copy()
    axis = rng.integers(0, poses.shape[-1] - 1)
    wrecked[..., axis][hit] = value
    absent[hit] = 0.0
    extractor = make_extractor(arguments["keypoint_dim"])
    inputs = extractor(wrecked)
    assert np.isfinite(inputs["input_values"]).all()
    assert not inputs["input_values"][0][hit].any()
    np.testing.assert_array_equal(inputs["input_values"], extractor(absent)["input_values"])


@pytest.mark.parametrize("confidence", [np.nan, np.inf, -np.inf, -1.0, 0.0, 0.29])
def test_confidence_decides_what_is_missing(confidence):
    poses = make_poses(missing=0.0)
    poses[3, 9, -1] = confidence
    values = make_extractor()(poses)["input_values"]
    assert not values[0, 3, 9].any()
    assert (values[0].any(-1).sum()) == poses.shape[0] * NUM_KEYPOINTS - 1


def test_confidence_is_clipped_to_one():
    poses = make_poses(missing=0.0)
    poses[..., -1] = 1.06  # what SimCC scores look like
    assert make_extractor()(poses)["input_values"][..., -1].max() == 1.0


def test_a_point_beyond_the_bound_is_missing():
    poses = make_poses(missing=0.0)
    poses[2, 9, 0] = 150.0
    extractor = make_extractor()
    assert not extractor(poses)["input_values"][0, 2, 9].any()
    assert make_extractor(coordinate_bound=1000.0)(poses)["input_values"][0, 2, 9].any()


def test_shoulders_are_the_unit():
    poses = place(make_poses(missing=0.0, seed=3), 210.0, 300.0)
    inputs = make_extractor()(poses)
    pair = inputs["input_values"][0][:, [LEFT, RIGHT], :2]
    np.testing.assert_allclose(np.median(pair.mean(1), axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.median(np.linalg.norm(pair[:, 0] - pair[:, 1], axis=-1)), 1.0, rtol=1e-5)


def test_one_bad_frame_does_not_move_the_unit():
    poses = make_poses(21, missing=0.0)
    expected = make_extractor()(poses)
    poses[4, LEFT, :2] += 30.0
    inputs = make_extractor()(poses)
    np.testing.assert_allclose(inputs["scale"], expected["scale"], rtol=0.05)


@given(st.integers(0, 1000), scales, offsets, st.sampled_from([3, 4]))
def test_without_shoulders_the_mean_pose_places(seed, scale, offset, keypoint_dim):
    training = [(make_poses(30, keypoint_dim, seed=seed, missing=0.1), None)]
    extractor = make_extractor(keypoint_dim).fit(training)
    mean = np.array(extractor.mean)
    poses = np.concatenate([mean, np.ones((NUM_KEYPOINTS, 1))], -1)[None].repeat(5, 0)
    poses[:, [LEFT, RIGHT]] = 0.0
    inputs = extractor(place(poses, scale, offset))
    hidden = np.isin(np.arange(NUM_KEYPOINTS), [LEFT, RIGHT])
    np.testing.assert_allclose(inputs["input_values"][0, 0, ~hidden, :-1], mean[~hidden], atol=1e-4)
    np.testing.assert_allclose(inputs["scale"][0], scale, rtol=1e-4)


def test_without_shoulders_and_mean_the_extent_is_the_unit():
    poses = make_poses(missing=0.0, pair=False)
    values = make_extractor()(place(poses, 77.0, -5.0))["input_values"][0]
    seen = values[values[..., -1] > 0][:, :2]
    np.testing.assert_allclose(seen.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.sqrt((seen**2).sum(-1).mean()), 1.0, rtol=1e-5)


def test_coinciding_shoulders_are_no_unit():
    poses = make_poses(missing=0.0)
    poses[:, LEFT] = poses[:, RIGHT]
    inputs = make_extractor()(poses)
    assert 0.1 < inputs["scale"][0] < 10 and np.abs(inputs["input_values"]).max() < 10


@pytest.mark.parametrize("case", ["nothing", "one_point", "one_place"])
def test_degenerate_sequences_pass(case):
    poses = np.zeros((4, NUM_KEYPOINTS, 3))
    if case == "one_point":
        poses[:, 5] = (310.0, 20.0, 1.0)
    if case == "one_place":
        poses[:] = (310.0, 20.0, 1.0)
    extractor = make_extractor()
    inputs = extractor(poses)
    assert np.isfinite(inputs["input_values"]).all() and inputs["scale"][0] > 0
    np.testing.assert_allclose(extractor.postprocess(inputs["input_values"], inputs)[0], poses)


# ---- forms of input and output --------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 100), st.sampled_from([None, 25.0, 31.0]))
def test_padded_together_equals_each_alone(lengths, seed, fps):
    extractor = make_extractor()
    sequences = [make_poses(length, seed=seed + index) for index, length in enumerate(lengths)]
    batch = extractor(sequences, fps=fps)
    assert batch["input_values"].dtype == np.float32 and batch["padding_mask"].dtype == np.int64
    results = extractor.postprocess(batch["input_values"], batch)
    for index, sequence in enumerate(sequences):
        alone = extractor(sequence, fps=fps)
        length = alone["input_values"].shape[1]
        np.testing.assert_array_equal(batch["input_values"][index, :length], alone["input_values"][0])
        assert not batch["input_values"][index, length:].any()
        assert batch["padding_mask"][index].tolist() == [1] * length + [0] * (batch["padding_mask"].shape[1] - length)
        for key in ("center", "scale", "fps", "num_frames"):
            np.testing.assert_array_equal(batch[key][index], alone[key][0])
        np.testing.assert_array_equal(results[index], extractor.postprocess(alone["input_values"], alone)[0])


def test_numpy_and_torch_agree():
    extractor = make_extractor()
    poses = make_poses().astype(np.float32)
    expected = extractor(poses)
    for form in (torch.from_numpy(poses), [torch.from_numpy(poses)], poses[None], torch.from_numpy(poses)[None]):
        inputs = extractor(form, return_tensors="pt")
        assert all(isinstance(value, torch.Tensor) for value in inputs.values())
        torch.testing.assert_close(inputs["input_values"], torch.from_numpy(expected["input_values"]))
        (back,) = extractor.postprocess(inputs["input_values"].to(torch.bfloat16), inputs)
        assert back.dtype == np.float32
    assert extractor(poses.astype(np.float16))["input_values"].dtype == np.float32
    assert extractor((poses * 100).astype(np.int32))["input_values"].dtype == np.float32


def test_without_padding_lists_come_back():
    extractor = make_extractor()
    inputs = extractor([make_poses(3), make_poses(5)], padding=False)
    assert [len(values) for values in inputs["input_values"]] == [3, 5]
    assert [len(back) for back in extractor.postprocess(inputs["input_values"], inputs)] == [3, 5]
    with pytest.raises(ValueError, match="3 to 5 frames; expected padding=True"):
        extractor([make_poses(3), make_poses(5)], padding=False, return_tensors="pt")


def test_one_frame_rate_each():
    extractor = make_extractor()
    inputs = extractor([make_poses(10)] * 3, fps=[50, None, np.float32(12.5)])
    assert inputs["padding_mask"].sum(1).tolist() == [5, 10, 19]
    assert inputs["num_frames"].tolist() == [10, 10, 10]
    assert inputs["fps"].tolist() == [50.0, 25.0, 12.5]


def test_longer_model_output_is_cut():
    extractor = make_extractor()
    inputs = extractor(make_poses(10))
    longer = np.pad(inputs["input_values"], ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=7.0)
    np.testing.assert_array_equal(
        extractor.postprocess(longer, inputs)[0], extractor.postprocess(inputs["input_values"], inputs)[0]
    )


def test_low_confidence_output_keeps_its_place():
    """The decoder fills in what was missing; only a confidence of exactly 0 means that there is nothing."""
    extractor = make_extractor()
    inputs = extractor(place(make_poses(4, missing=0.0), 100.0, 500.0))
    values = inputs["input_values"].copy()
    values[0, 1, 2, -1], values[0, 1, 3, -1] = 0.1, 0.0
    (back,) = extractor.postprocess(values, inputs)
    assert back[1, 2, :2].all() and back[1, 2, 2] == np.float32(0.1)
    assert not back[1, 3].any()


# ---- statistics and files -------------------------------------------------------------------------------------------


def test_fit_equals_its_naive_form():
    extractor = make_extractor()
    samples = [(make_poses(8, seed=seed), np.arange(8) < 6) for seed in range(3)]
    samples.append((make_poses(8, seed=9, pair=False), None))  # no unit of its own: not counted
    samples.append((make_poses(8, seed=10), None))
    seen = [[] for _ in range(NUM_KEYPOINTS)]
    for poses, mask in samples:
        poses = poses.copy()
        poses[~mask if mask is not None else slice(0), :, -1] = 0.0
        if not poses[:, LEFT, -1].any():
            continue
        for frame in extractor(poses)["input_values"][0]:
            for k in range(NUM_KEYPOINTS):
                if frame[k, -1] > 0:
                    seen[k].append(frame[k, :-1])
    extractor.fit(samples)
    np.testing.assert_allclose(extractor.mean, [np.mean(s, 0) for s in seen], atol=1e-5)
    np.testing.assert_allclose(extractor.std, [np.std(s, 0) for s in seen], atol=1e-5)


def test_fit_needs_the_reference_pair():
    with pytest.raises(ValueError, match="no sequence shows the layout's reference pair"):
        make_extractor().fit([(make_poses(pair=False), None)])


def test_save_and_load(tmp_path):
    samples = [(make_poses(missing=0.1), None)]
    samples[0][0][:, 11, -1] = 0.0  # a keypoint that never appears
    extractor = make_extractor(sampling_rate=30.0, confidence_threshold=0.4, coordinate_bound=50.0).fit(samples)
    assert extractor.mean[11] == [None, None]
    extractor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(), parse_constant=pytest.fail)
    assert saved["mean"] == extractor.mean and saved["auto_map"]["AutoFeatureExtractor"].endswith(
        "PoseFeatureExtractor"
    )
    loaded = PoseFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    poses = make_poses(pair=False)
    np.testing.assert_array_equal(loaded(poses)["input_values"], extractor(poses)["input_values"])
    assert PoseFeatureExtractor.from_pretrained(tmp_path, sampling_rate=12.5).sampling_rate == 12.5


def test_remote_code_loads_without_the_package(tmp_path):
    extractor = make_extractor().fit([(make_poses(), None)])
    extractor.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "poses.npy", make_poses())
    np.save(tmp_path / "expected.npy", extractor(make_poses())["input_values"])
    program = (
        "import numpy, sys; from transformers import AutoFeatureExtractor;"
        "f = AutoFeatureExtractor.from_pretrained('model', trust_remote_code=True);"
        "assert 'modeling_pose_tokenizer' not in sys.modules;"
        "assert (f(numpy.load('poses.npy'))['input_values'] == numpy.load('expected.npy')).all()"
    )
    subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, check=True)


def test_auto_class_knows_the_local_class(tmp_path):
    make_extractor().save_pretrained(tmp_path)
    AutoFeatureExtractor.register(PoseTokenizerConfig, PoseFeatureExtractor, exist_ok=True)
    PoseTokenizerConfig(skeleton="coco_17").save_pretrained(tmp_path)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is PoseFeatureExtractor


def test_custom_layouts(tmp_path):
    names, edges = ["hip", "left", "right", "head"], [[0, 1], [0, 2], [0, 3]]
    extractor = PoseFeatureExtractor(None, names, edges, flip_pairs=[[1, 2]], scale_pair=[1, 2], keypoint_dim=4)
    extractor.save_pretrained(tmp_path)
    loaded = PoseFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.layout == extractor.layout and loaded.layout.scale_pair == (1, 2)
    assert loaded(np.ones((2, 4, 4)))["input_values"].shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"skeleton": "phoenix_50", "keypoint_dim": 4, "sampling_rate": 30, "confidence_threshold": 0.1},
        {"skeleton": None, "keypoint_names": ["a", "b"], "edges": [[0, 1]], "scale_pair": [0, 1]},
        {"skeleton": None, "num_keypoints": 3, "edges": [[0, 1], [1, 2]]},
    ],
)
def test_from_config(fields):
    config = PoseTokenizerConfig(**fields)
    extractor = PoseFeatureExtractor.from_config(config)
    assert extractor.layout == config.layout
    for key in ("keypoint_dim", "sampling_rate", "confidence_threshold", "num_keypoints"):
        assert getattr(extractor, key) == getattr(config, key)
    assert PoseFeatureExtractor.from_config(config, sampling_rate=7.0).sampling_rate == 7.0


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poses", "fps", "message"),
    [
        (np.zeros((3, 133, 3)), None, "133 keypoints; the layout coco_17 has 17 .*this looks like coco_wholebody_133"),
        (np.zeros((3, 16, 3)), None, r"16 keypoints; the layout coco_17 has 17\.$"),
        (np.zeros((3, 17, 2)), None, r"2 values per keypoint; expected 3 \(x, y, confidence\)"),
        (np.zeros((0, 17, 3)), None, "no frames"),
        (np.zeros((17, 3)), None, r"shape \(17, 3\); expected \(frames, keypoints, values\)"),
        (np.full((3, 17, 3), "a"), None, "dtype <U1; expected numbers"),
        ([], None, "empty list"),
        (np.zeros((3, 17, 3)), 0, "fps is 0.0; expected a positive"),
        (np.zeros((3, 17, 3)), -25.0, "fps is -25.0"),
        (np.zeros((3, 17, 3)), float("nan"), "fps is nan"),
        (np.zeros((90, 17, 3)), 1e-9, r"90 frames at 1e-09 fps would become 2\d{12} at 25; expected 18000 at most"),
        (np.zeros((60_000, 17, 3)), 0.2, "60000 frames would become 7499876 at another frame rate; expected 5263440"),
        ([np.zeros((3, 17, 3))] * 2, [25.0], "fps has 1 values; expected one, or 2"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(poses, fps, message):
    with pytest.raises(ValueError, match=message) as error:
        make_extractor()(poses, fps=fps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skeleton": "coco_18"}, "coco_17"),
        ({"skeleton": None}, "keypoint_names is not given"),
        ({"scale_pair": [0, 1]}, r"scale_pair is \(0, 1\), but the layout coco_wholebody_133 has \(5, 6\)"),
        ({"keypoint_dim": 2}, "keypoint_dim is 2"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"mean": [[0.0, 0.0]]}, r"mean has shape \(1, 2\); expected \(133, 2\)"),
    ],
)
def test_bad_fields_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoseFeatureExtractor(**arguments)


def test_bad_calls_are_refused():
    extractor = make_extractor()
    inputs = extractor(make_poses(10))
    with pytest.raises(ValueError, match="padding is 'max'"):
        extractor(make_poses(), padding="max")
    with pytest.raises(ValueError, match="return_tensors is 'tf'"):
        extractor(make_poses(), return_tensors="tf")
    with pytest.raises(ValueError, match=r"pose_values\[0\] has 9 frames; expected at least 10"):
        extractor.postprocess(inputs["input_values"][:, :9], inputs)
    with pytest.raises(ValueError, match="holds 2 sequences; expected 1"):
        extractor.postprocess([inputs["input_values"][0]] * 2, inputs)
    with pytest.raises(ValueError, match="mask has 3 frames; expected 10"):
        extractor.fit([(make_poses(10), np.ones(3, dtype=bool))])
