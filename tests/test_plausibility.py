"""What cannot be right is found, with file, frame and kind; what can be right is left alone."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modeling_pose_tokenizer import plausibility_tracks
from modeling_pose_tokenizer.plausibility import KINDS, MAX_KEPT, PlausibilityCheck
from modeling_pose_tokenizer.plausibility_tracks import Histogram
from modeling_pose_tokenizer.sequences import PoseFileError, PoseSequence
from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton

LAYOUT = get_skeleton("coco_wholebody_133")
INDEX = {name: number for number, name in enumerate(LAYOUT.keypoint_names)}
LEFT_HAND, RIGHT_HAND = (list(LAYOUT.group_keypoints[f"{side}_hand"]) for side in ("left", "right"))
T = 60
# Left half of a person in pixels, in the middle of the picture, y down; the right half is its mirror image.
BODY = {
    "nose": (0, -150), "left_eye": (25, -170), "left_ear": (55, -160), "left_shoulder": (120, 0),
    "left_hip": (80, 300), "left_elbow": (170, 150), "left_wrist": (150, 280),
    "left_knee": (80, 480), "left_ankle": (80, 660), "left_big_toe": (90, 690),
    "left_small_toe": (110, 690), "left_heel": (80, 670),
}  # fmt: skip


def person(seed: int = 0, id: str = "clip") -> PoseSequence:
    """A signer before a camera, 60 frames at 25 fps: arms and hands wave, everything trembles a little."""
    generator = np.random.default_rng(seed)
    rest = np.zeros((133, 2))
    for name, place in BODY.items():
        rest[INDEX[name]] = place
    for hand in (LEFT_HAND,):
        rest[hand] = np.add(BODY["left_wrist"], [[3 * k, 2 + 4 * k] for k in range(21)])
    for keypoint in LAYOUT.group_keypoints["face"]:
        rest[keypoint] = (0, -140)
    for left, right in LAYOUT.flip_pairs:
        if LAYOUT.keypoint_names[left].startswith("face_"):
            rest[left] = (10 + left % 30, -140)
        rest[right] = rest[left] * [-1, 1]
    wave = np.sin(np.arange(T) * generator.uniform(0.2, 0.4))[:, None, None] * generator.uniform(20, 40, 2)
    moving = np.isin(np.arange(133), [INDEX["left_wrist"], INDEX["right_wrist"], *LEFT_HAND, *RIGHT_HAND])
    points = rest + [500, 300] + wave * moving[:, None] + generator.normal(0, 0.5, (T, 133, 2))
    poses = np.concatenate([points, generator.uniform(0.6, 1, (T, 133, 1))], -1).astype(np.float32)
    return PoseSequence(id, poses, np.ones(T, bool), 25.0)


def changed(change: Callable[[np.ndarray], object], seed: int = 0, fps: float | None = 25.0) -> PoseSequence:
    sequence = person(seed)
    result = change(sequence.poses)
    poses = result if isinstance(result, np.ndarray) else sequence.poses
    return PoseSequence(sequence.id, poses, sequence.mask, fps)


def move_hand(poses: np.ndarray) -> None:
    poses[23, RIGHT_HAND, 0] += 600


def freeze(poses: np.ndarray) -> None:
    poses[11:50, LEFT_HAND] = poses[10, LEFT_HAND]


def shrink(poses: np.ndarray) -> None:
    poses[17, :, :2] /= 1000


def turn_body(poses: np.ndarray) -> np.ndarray:
    flip = [LAYOUT.flip_permutation[k] if 5 <= k < 17 else k for k in range(133)]
    return poses[:, flip]


def times(x: float, y: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda poses: np.multiply(poses, [x, y, 1], dtype=np.float32)


def exchange_sides(poses: np.ndarray) -> np.ndarray:
    return poses[:, list(LAYOUT.flip_permutation)]


def swap_hands(poses: np.ndarray) -> None:
    poses[:, LEFT_HAND + RIGHT_HAND] = poses[:, RIGHT_HAND + LEFT_HAND]


WRONG = {
    "swapped axes": (lambda poses: poses[..., [1, 0, 2]], None, "the head is beside the shoulders in 100% of frames"),
    "mixed units": (shrink, 17, r"the keypoints span 0\.\d+ here, [\d.]+ in most frames \(1 frame is so\)"),
    "left and right": (swap_hands, 0, "the left hand is at the other arm's wrist in 100% of frames"),
    "left and right of the body": (turn_body, None, "shoulders and face point to opposite sides in 100% of frames"),
    "frozen track": (freeze, 11, "left_hand does not move at all for 39 frames"),
    "frame rate": (
        lambda poses: poses[np.arange(T) // 2 * 2],
        1,
        r"51% of the frames repeat .* 12\.3 fps were recorded",
    ),
    "frame rate by interpolation": (
        lambda poses: (poses[np.arange(T) // 2] + poses[(np.arange(T) + 1) // 2]) / 2,
        1,
        r"5\d% of the frames lie just half-way .* interpolated, not recorded",
    ),
    "teleporting hand": (move_hand, 23, r"the right hand jumps 2\.\d shoulder widths .* \(2 such jumps\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_sequence_is_told_with_its_frame(name: str) -> None:
    change, frame, sentence = WRONG[name]
    check = PlausibilityCheck(LAYOUT)
    problems = check.add("set/clip.npz", changed(change))
    kind = name.removesuffix(" of the body").removesuffix(" by interpolation")
    assert {problem.kind for problem in problems} == {kind}  # and nothing else is
    (problem,) = (own for own in problems if re.search(sentence, own.sentence))
    assert problem.frame == frame
    place = "set/clip.npz" if frame is None else f"set/clip.npz, frame {frame}"
    assert str(problem) == f"{place}: {kind}: {problem.sentence}" and "\n" not in str(problem)
    assert check.problems == problems and check.counts == {kind: len(problems)}


def test_a_hand_at_the_other_wrist_is_told_where_its_own_was_not_seen() -> None:
    sequence = changed(swap_hands)
    sequence.poses[:, [INDEX["right_wrist"], *LEFT_HAND]] = 0  # one hand alone, as in fingerspelling
    check = PlausibilityCheck(LAYOUT)
    assert [own.sentence for own in check.add("clip.npz", sequence)] == [
        "the right hand is at the other arm's wrist in 100% of frames"
    ]


@pytest.mark.parametrize("turn", [0, 1], ids=["upright", "mirrored"])
@pytest.mark.parametrize("scale", [0.001, 1, 20])
def test_a_plausible_set_is_left_alone_in_any_unit(turn: int, scale: float) -> None:
    check = PlausibilityCheck(LAYOUT)
    for seed in range(25):
        sequence = person(seed)
        sequence.poses[..., :2] *= scale
        if turn:
            sequence.poses[..., 0] *= -1
        assert check.add("clip.npz", sequence) == []
    assert check.problems == []


@pytest.mark.parametrize("missing", ["all hands", "half of everything", "all but one frame", "masked"])
def test_what_is_missing_is_no_problem(missing: str) -> None:
    sequence = person()
    if missing == "all hands":
        sequence.poses[:, LEFT_HAND + RIGHT_HAND] = 0
    elif missing == "half of everything":
        sequence.poses[np.random.default_rng(1).random((T, 133)) < 0.5] = 0
    elif missing == "all but one frame":
        sequence.poses[1:] = 0
    else:
        sequence.poses[10:, :, :2] = 1e6
        sequence.mask[10:] = False
    assert PlausibilityCheck(LAYOUT).add("clip.npz", sequence) == []


@pytest.mark.parametrize(
    ("odd", "kind", "sentence"),
    [
        (changed(times(0.001, 0.001)), "mixed units", "its coordinates are under 10, those of 24"),
        (changed(times(-1, 1)), "left and right", "mirrored against 24 files"),
        (changed(exchange_sides), "left and right", "mirrored against 24 files"),
        (changed(lambda poses: None, fps=240.0), "frame rate", r"turns \d+\.\d times faster than half of the 25"),
        (changed(lambda poses: None, fps=100.0), "frame rate", r"turns [34]\.\d times faster than half of the 25"),
        (changed(lambda poses: None, fps=6.25), "frame rate", r"turns [34]\.\d times slower than half of the 25"),
        (changed(lambda poses: None, fps=1000.0), "frame rate", "fps is 1000, expected 5 to 250"),
    ],
    ids=["normalised", "mirror image", "all sides", "ten times too fast", "four times", "a quarter", "no such rate"],
)  # fmt: skip
def test_what_is_wrong_with_a_file_of_a_set(odd: PoseSequence, kind: str, sentence: str) -> None:
    check = PlausibilityCheck(LAYOUT)
    for seed in range(24):
        check.add(f"good_{seed}/clip.npz", person(seed))
    check.add("odd/clip.npz", odd)
    assert {(problem.path, problem.kind) for problem in check.problems} == {("odd/clip.npz", kind)}
    assert re.search(sentence, check.problems[0].sentence)


def test_a_hand_that_waves_goodbye_is_no_wrong_rate() -> None:
    """It turns quickly, and everything else is still."""
    waving = person()
    waving.poses[..., :2] = waving.poses[0, :, :2] + np.random.default_rng(0).normal(0, 0.05, (T, 133, 2))
    waving.poses[:, LEFT_HAND[0], 0] += 40 * np.sin(np.arange(T) * 1.5)
    check = PlausibilityCheck(LAYOUT)
    for seed in range(24):
        check.add("good.npz", person(seed))
    check.add("waving.npz", waving)
    assert check.problems == []


def test_a_very_long_sequence_is_looked_at_in_excerpts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the frames' own numbers; that an excerpt ends is no jump."""
    monkeypatch.setattr(plausibility_tracks, "MAX_KEYPOINTS", 133 * 32 * 30)
    poses = np.concatenate([person(seed).poses for seed in range(40)])  # 2400 frames, of which 960 are looked at
    long = PoseSequence("clip", poses, np.ones(len(poses), bool), 25.0)
    check = PlausibilityCheck(LAYOUT)
    assert check.add("clip.npz", long) == []
    poses[-20, RIGHT_HAND, 0] += 600
    (problem,) = check.add("clip.npz", long)
    assert problem.frame == len(poses) - 20 and problem.kind == "teleporting hand"
    assert check.frames == 2 * 2400 and check.possible["body"] == 2 * 32 * 29 * 23


def test_two_checks_merge_to_the_one_that_saw_everything() -> None:
    sequences = [person(seed) for seed in range(25)] + [changed(move_hand, 3), changed(freeze, 4)]
    whole, first, second = (PlausibilityCheck(LAYOUT) for _ in range(3))
    for number, sequence in enumerate(sequences):
        whole.add(f"{number}/clip.npz", sequence)
        (first if number < 9 else second).add(f"{number}/clip.npz", sequence)
    first.merge(pickle.loads(pickle.dumps(second)))  # as from another process
    assert first.problems == whole.problems and first.table() == whole.table() and len(whole.problems) == 2
    for name, histogram in whole.histograms.items():
        np.testing.assert_array_equal(first.histograms[name].counts, histogram.counts)
    assert (first.found, first.possible, first.fps) == (whole.found, whole.possible, whole.fps)


def test_memory_does_not_grow_with_the_data() -> None:
    check, bad = PlausibilityCheck(LAYOUT), changed(move_hand)
    sizes = []
    for number in range(3 * MAX_KEPT):
        check.add(f"{number:06d}/clip.npz", bad)
        sizes.append(len(pickle.dumps(check)))
    assert sizes[-1] < 1.01 * sizes[2 * MAX_KEPT]
    assert check.counts["teleporting hand"] == 3 * MAX_KEPT and len(check.problems) == MAX_KEPT


def test_without_a_layout_only_what_needs_no_names_is_told() -> None:
    check = PlausibilityCheck(None)
    assert check.add("clip.npz", changed(swap_hands)) == []
    assert [problem.kind for problem in check.add("clip.npz", changed(shrink))] == ["mixed units"]


def test_a_sequence_of_another_layout_is_refused() -> None:
    sequence = PoseSequence("a", np.ones((3, 17, 3), np.float32), np.ones(3, bool))
    with pytest.raises(
        PoseFileError, match=r"^a\.npz: poses have 17 keypoints, expected 133 of coco_wholebody_133 \(17 "
    ):
        PlausibilityCheck(LAYOUT).add("a.npz", sequence)


def test_the_report_is_one_page_in_which_no_name_is_code(tmp_path: Path) -> None:
    check = PlausibilityCheck(LAYOUT)
    check.add("<script>alert(1)</script>.npz", changed(move_hand))
    check.add("packed.npz", person(id="second"))
    assert check.problems[0].path == "<script>alert(1)</script>.npz (clip)"
    check.write_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert not re.search(r"https?:|src=|url\(|nan", page)
    assert page.count("<svg") == page.count("</svg>") == 8
    assert "teleporting hand" in page and "2 sequences, 120 frames, coco_wholebody_133" in page
    assert all(kind in check.table() for kind in KINDS)
    PlausibilityCheck().write_report(tmp_path / "empty.html")  # of no data at all
    assert "Nothing implausible was found" in (tmp_path / "empty.html").read_text("utf-8")


@pytest.mark.parametrize("log", [False, True])
def test_quantiles_of_a_histogram_are_right_to_a_bin(log: bool) -> None:
    values = np.random.default_rng(0).uniform(1, 9, 5000)
    histogram = Histogram(0.5, 10, log, 200)
    histogram.add(values)
    histogram.add(np.array([np.nan, np.inf]))
    assert histogram.total == 5000
    for share in (0.01, 0.5, 0.99):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.15)
