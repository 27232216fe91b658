"""The report: it holds what it is given, its numbers are those of the metrics, and it works in a browser."""

import re
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser import open_browser, open_page
from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig
from modeling_pose_tokenizer.metrics import ReconstructionMetrics
from modeling_pose_tokenizer.pose_pairs import PosePair, TokenStrip, frame_errors
from modeling_pose_tokenizer.report import CONFIDENCES, render_player, usage_curve, write_report
from modeling_pose_tokenizer.skeleton_pose_tokenizer import SKELETONS, build_skeleton, get_skeleton
from pages import WHOLEBODY, page_data, random_poses, unpack_poses

CONFIG = PoseTokenizerConfig(num_quantizers=[3, 1, 2, 2], codebook_size=16)
HOSTILE = "</script><script>alert(1)</script>"


def make_pair(name, frames, seed=0, label=""):
    """A sequence that sways, its reconstruction and its tokens."""
    reference = random_poses(frames, seed=seed)
    reconstruction = reference + np.float32(0.03) * np.sin(np.arange(frames, dtype=np.float32))[:, None, None]
    reconstruction[..., -1] = reference[..., -1]
    steps = -(-frames // CONFIG.hop_length)
    codes = np.random.default_rng(seed).integers(0, 16, (CONFIG.num_codebooks, steps))
    strip = TokenStrip(codes, CONFIG.codebook_index, 16, CONFIG.hop_length)
    return PosePair(name, reference, reconstruction, 25.0, label, {"body": 0.0123, "left_hand": None}, strip)


def evaluate(pairs, missing_part=None):
    """Metrics of the pairs with every section of the page, code counts, and the rows of sequences.jsonl."""
    metrics, rows = ReconstructionMetrics(WHOLEBODY, CONFIG), []
    for pair in pairs:
        reference = pair.reference.copy()
        if missing_part:
            reference[:, list(WHOLEBODY.group_keypoints[missing_part])] = 0.0
        one = ReconstructionMetrics(WHOLEBODY, CONFIG)
        one.update(pair.reconstruction[None], reference[None], None, [100.0])
        metrics.merge(one)
        metrics.update_codes(pair.tokens.codes[None], None, 0.0123)
        rows.append(
            {"id": pair.id, "frames": len(reference), "mpjpe": one.summary()["mpjpe"], "hand_error": one.hand_error()}
        )
    result = metrics.compute()
    parts = list(result["parts"])
    ends = [0.0, 0.5, 2.0, None]
    result["by_speed"] = {
        part: [
            {"from": low, "to": high, "mpjpe": None if low == 0.5 else 0.01 * (place + 1) + low / 1000, "count": 5}
            for low, high in pairwise(ends)
        ]
        for place, part in enumerate(parts)
    }
    result["rate_distortion"] = [
        {
            "num_quantizers": level,
            "bits_per_frame": 4.0 * level,
            "overall": 0.1 / level,
            "parts": {part: 0.2 / level / (place + 1) for place, part in enumerate(parts)},
        }
        for level in (1, 2, 3)
    ]
    return result, metrics.code_counts.numpy(), rows


# ---- what it holds --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(1e-3, 1e3), st.sampled_from([3, 4]))
def test_the_page_holds_the_poses_and_nothing_where_they_are_missing(tmp_path_factory, seed, frames, scale, dims):
    reference, reconstruction = (random_poses(frames, dims=dims, seed=seed + i) for i in range(2))
    for poses in (reference, reconstruction):
        poses[..., :-1] *= scale
    path = tmp_path_factory.mktemp("report") / "page.html"
    write_report(path, [PosePair("clip", reference, reconstruction)], WHOLEBODY)
    (player,) = page_data(path.read_text("utf-8"), "sequences")
    seen = [(poses[..., -1] >= 0.3) & np.isfinite(poses[..., :2]).all(-1) for poses in (reference, reconstruction)]
    packed = [unpack_poses(player[name], frames) for name in ("reference", "reconstruction")]
    for there, poses, (_, confidence) in zip(seen, (reference, reconstruction), packed, strict=True):
        assert np.array_equal(there, confidence > 0)
        share = (poses[..., -1][there] - 0.3) / 0.7
        assert np.abs((confidence[there] - 1) / (CONFIDENCES - 1) - share).max(initial=0.0) < 0.6 / (CONFIDENCES - 1)
    # one similarity brings both back: to half a step, where half a view is 2000 steps
    if seen[0].sum() < 2:
        return
    points, steps = reference[seen[0]][:, :2].astype(np.float64), packed[0][0][seen[0]].astype(np.float64)
    low, high = points.argmin(0)[0], points.argmax(0)[0]
    unit = (points[high, 0] - points[low, 0]) / (steps[high, 0] - steps[low, 0])
    origin = points[low] - unit * steps[low]
    for poses, there, (values, _) in zip((reference, reconstruction), seen, packed, strict=True):
        error = np.abs(values[there] * unit + origin - poses[there][:, :2])
        assert error.max(initial=0.0) < 4 * unit


def shown_numbers(page):
    """(full value, text) of every number of the page."""
    return [(float(value), text) for value, text in re.findall(r'<data value="([^"]+)">([^<]+)</data>', page)]


def numbers_of(tree):
    if isinstance(tree, dict):
        return {number for value in tree.values() for number in numbers_of(value)}
    if isinstance(tree, list | tuple):
        return {number for value in tree for number in numbers_of(value)}
    return {float(tree)} if isinstance(tree, int | float) else set()


def test_the_page_stands_alone_and_its_numbers_are_those_of_the_metrics(tmp_path):
    pairs = [make_pair(HOSTILE, 12, 0, "Best"), make_pair("other", 9, 1)]
    metrics, counts, rows = evaluate(pairs, missing_part="left_hand")
    metrics["overall"]["a_new_figure"] = 0.777
    path = tmp_path / "index.html"
    path.write_text("an older report")
    options = {"sequences": rows, "title": "A & B", "subtitle": HOSTILE}
    write_report(path, pairs, WHOLEBODY, metrics, counts, **options)
    page = path.read_text("utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.html"]
    assert "://" not in page and not re.search(r"<link|@import|\bsrc=|\bhref=|\burl\(", page)
    assert "default-src 'none'" in page
    assert HOSTILE not in page and page.count("<script>") == 1 and "A &amp; B" in page

    shown = shown_numbers(page)
    for key in ("overall", "parts", "by_speed", "rate_distortion"):
        found = metrics[key]
        if key == "by_speed":
            found = [cell["mpjpe"] for cells in found.values() for cell in cells]
        if key == "rate_distortion":
            found = [[row["bits_per_frame"], row["overall"], row["parts"]] for row in found]
        assert numbers_of(found) <= {value for value, _ in shown}, key
    assert numbers_of([metrics["data"], metrics["tokens"]]) <= {value for value, _ in shown}
    steps, sizes = counts.sum(1).max(), {16.0, *(counts == 0).sum(1).tolist()}
    known = numbers_of([metrics, rows]) | sizes | {float(steps)}
    assert {value for value, _ in shown} <= known, "a number that is in no file"
    for value, text in shown:
        plain = text.replace("\u202f", "").replace("&nbsp;%", "").replace(",", "")
        digits = len(plain.partition(".")[2])
        scaled = 100 * value if "%" in text else value
        assert float(plain) == pytest.approx(scaled, rel=5.1e-3) or abs(float(plain) - scaled) <= 0.51 * 10**-digits
    errors = {float(value) for value in re.findall(r'data-error="([^"]+)"', page)}
    assert errors and errors <= {block["mpjpe"] for block in metrics["per_keypoint"].values()}
    assert not re.search(r"\bnan\b|\bNone\b|undefined<", re.sub(r'"[A-Za-z0-9+/=]{20,}"', "", page)), "base64 aside"
    for player, pair in zip(page_data(page, "sequences"), pairs, strict=True):
        assert player["means"] == {"body": 0.0123}
        for curve in player["errors"]:
            expected = frame_errors(pair, WHOLEBODY, 0.3)[curve["part"]]
            np.testing.assert_allclose(np.array(curve["values"], dtype=float), expected, atol=5.1e-5)


def test_sections_without_data_are_absent(tmp_path):
    pairs = [make_pair("clip", 6)]
    metrics, counts, rows = evaluate(pairs)
    headings = {"by_speed": "Error against speed", "rate_distortion": "Error against rate"}
    write_report(tmp_path / "full.html", pairs, WHOLEBODY, metrics, counts, sequences=rows)
    lacking = {key: value for key, value in metrics.items() if key not in headings}
    write_report(tmp_path / "less.html", pairs, WHOLEBODY, lacking)
    full, less = ((tmp_path / name).read_text("utf-8") for name in ("full.html", "less.html"))
    for heading in (*headings.values(), "Worst sequences"):
        assert f"<h2>{heading}</h2>" in full and f"<h2>{heading}</h2>" not in less


def test_the_usage_curve_falls_from_the_top_to_where_codes_are_dead():
    curve = usage_curve(np.array([0, 9, 3, 0]))
    heights = [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)", curve)]
    assert heights[0] == 0.0 and heights[:4] == sorted(heights[:4]) and heights[2:4] == [100.0, 100.0]


@pytest.mark.parametrize("name", sorted(SKELETONS))
def test_every_layout_can_be_shown(tmp_path, name):
    skeleton = get_skeleton(name)
    poses = random_poses(5, skeleton, dims=4)
    write_report(tmp_path / "page.html", [PosePair("clip", poses, poses)], skeleton)
    lines = page_data((tmp_path / "page.html").read_text("utf-8"), "skeleton")["lines"]
    assert len(lines) >= len(skeleton.edges) - 1


CASES = ["one frame", "nothing seen", "not a number", "original alone", "no sequence", "far away", "own layout"]


def odd_report(path, case):
    """A report of odd input, with metrics as an evaluation of it gives them."""
    skeleton = build_skeleton(["hip", "neck", "hand"], [(0, 1), (1, 2)]) if case == "own layout" else WHOLEBODY
    reference = random_poses(1 if case == "one frame" else 4, skeleton)
    reconstruction = reference + np.float32(0.01)
    if case == "nothing seen":
        reference[..., -1] = 0.0
    if case == "not a number":
        reconstruction[:] = np.nan
    if case == "far away":
        reconstruction[0, 5, :2] = 1e30
    pair = PosePair("clip", reference, None if case == "original alone" else reconstruction)
    metrics = ReconstructionMetrics(skeleton)
    if case != "no sequence":
        metrics.update(reconstruction[None], reference[None])
    rows = [{"id": "clip", "frames": 4, "mpjpe": metrics.summary()["mpjpe"], "hand_error": metrics.hand_error()}]
    pairs = [] if case == "no sequence" else [pair]
    write_report(path, pairs, skeleton, metrics.compute(), sequences=rows[: len(pairs)])


def test_poses_of_another_layout_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"clip holds poses of the shape \(4, 133, 3\); expected \(4, 17, D\)"):
        write_report(tmp_path / "page.html", [PosePair("clip", random_poses(4))], get_skeleton("coco_17"))
    with pytest.raises(ValueError, match="clip has no frames"):
        render_player(PosePair("clip", random_poses(4)[:0]), WHOLEBODY)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_report_of_a_hundred_sequences_is_quick_and_small(tmp_path):
    pairs = [make_pair(f"clip {seed}", 100, seed) for seed in range(100)]
    metrics, counts, rows = evaluate(pairs)
    start = time.perf_counter()
    write_report(tmp_path / "page.html", pairs, WHOLEBODY, metrics, counts, sequences=rows)
    assert time.perf_counter() - start < 60
    assert (tmp_path / "page.html").stat().st_size < 15e6


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The address of a report with ten sequences, the first of them long."""
    pairs = [
        make_pair(f"clip {seed}", 500 if seed == 0 else 12 + seed, seed, "" if seed else "Best") for seed in range(10)
    ]
    metrics, counts, rows = evaluate(pairs)
    path = tmp_path_factory.mktemp("report") / "index.html"
    write_report(path, pairs, WHOLEBODY, metrics, counts, sequences=rows)
    return path.as_uri()


def visit(page, address):
    page.goto(address)
    page.evaluate("players[0]?.ready")


def pixels(page, selector=".panel canvas"):
    return page.locator(selector).evaluate_all("(all) => all.map((canvas) => canvas.toDataURL())")


def frame(page):
    return int(page.locator(".controls output").inner_text().split("/")[0])


def test_a_long_sequence_plays_and_everything_moves_with_it(browser, report):
    with open_page(browser) as (page, events):
        visit(page, report)
        page.keyboard.press("Tab")
        player = page.locator(".player")
        player.focus()
        page.keyboard.press("Home")
        stills, tracks = pixels(page), pixels(page, ".track canvas")
        assert frame(page) == 1 and len(stills) == 3 and len(set(stills)) == 3 and len(tracks) == 2
        page.locator(".play").click()
        page.wait_for_timeout(1000)
        page.locator(".play").click()
        reached = frame(page)
        assert 13 <= reached <= 60, "a second is 25 frames, give or take a busy machine"
        moved = pixels(page) + pixels(page, ".track canvas")
        assert all(now != still for now, still in zip(moved, stills + tracks, strict=True))
        page.wait_for_timeout(150)
        assert frame(page) == reached, "it stands still"
        assert not events.errors and not events.foreign


def test_keys_scrubber_tracks_and_zoom(browser, report):
    with open_page(browser) as (page, events):
        visit(page, report)
        page.locator(".player").focus()
        for key, expected in [("Home", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 500)]:
            page.keyboard.press(key)
            assert frame(page) == expected
        page.keyboard.press("ArrowRight")
        assert frame(page) == 1, "it goes round"
        page.keyboard.press("Space")
        assert page.locator(".play").get_attribute("aria-label") == "Pause"
        page.keyboard.press("Space")
        page.locator(".controls input").fill("249")
        assert frame(page) == 250
        values = page_data(page.content(), "sequences")[0]["errors"][0]["values"]
        shown = page.locator(".now b").first.inner_text().replace("\u00a0%", "")
        assert float(shown) == pytest.approx(100 * values[249], abs=0.051), "the legend says what the cursor is on"
        for track in (".timeline canvas", ".strip canvas"):
            box = page.locator(track).bounding_box()
            page.mouse.click(box["x"] + box["width"] - 1, box["y"] + 10)
            assert frame(page) >= 498
            page.keyboard.press("Home")
            page.mouse.click(box["x"] + 120 + (box["width"] - 120) / 2, box["y"] + 10)
            assert 200 < frame(page) < 320
        whole = pixels(page)
        names = page.locator(".view option").all_inner_texts()
        assert names == ["whole", "face", "left hand", "right hand"]
        seen = {tuple(whole)}
        for name in names[1:]:
            page.locator(".view").select_option(label=name)
            seen.add(tuple(pixels(page)))
        assert len(seen) == 4
        page.locator(".player").focus()
        page.keyboard.press("z")
        assert pixels(page) == whole
        assert not events.errors and not events.foreign


def test_another_sequence_is_found_and_opened(browser, report):
    with open_page(browser) as (page, events):
        visit(page, report)
        assert page.locator(".picker [aria-pressed=true]").inner_text() == "Best clip 0"
        page.get_by_label("Find a sequence").fill("CLIP 7")
        assert page.locator(".picker button:visible").all_inner_texts() == ["clip 7"]
        before = pixels(page)
        page.locator(".picker button:visible").click()
        page.evaluate("players[0].ready")
        assert page.locator(".controls output").inner_text().endswith("/ 19") and pixels(page) != before
        assert page.locator(".picker [aria-pressed=true]").inner_text() == "clip 7"
        page.locator("td button, tbody th button").first.click()
        page.evaluate("players[0].ready")
        assert page.locator(".chart svg circle").count() == 4 * 2 + 5 * 3, "a mark for every figure that is known"
        assert not events.errors and not events.foreign


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1440, False)])
def test_it_fits_the_window_and_follows_the_theme(browser, report, width, dark):
    with open_page(browser, width, 800, dark) as (page, events):
        visit(page, report)
        assert page.locator("html").get_attribute("data-theme") == ("dark" if dark else "light")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        before = pixels(page)
        page.locator("#theme").click()
        assert page.locator("html").get_attribute("data-theme") == ("light" if dark else "dark")
        assert pixels(page) != before
        unnamed = page.locator("button, input, select, canvas, svg[role=img]").evaluate_all(
            "(all) => all.filter((node) => !(node.ariaLabel || node.textContent.trim())).map((node) => node.outerHTML)"
        )
        assert not unnamed, "everything to use or to see has a name"
        assert not events.errors and not events.foreign


def test_odd_input_gives_a_page_that_works(browser, tmp_path):
    with open_page(browser) as (page, events):
        for case in CASES:
            path = tmp_path / f"{case}.html"
            odd_report(path, case)
            visit(page, path.as_uri())
            if case == "no sequence":
                assert page.get_by_text("There is no sequence to show.").is_visible()
                continue
            page.locator(".play").click()
            page.wait_for_timeout(60)
            page.locator(".play").click()
            assert page.locator(".panel canvas:visible").count() == (1 if case == "original alone" else 3)
            empty = page.locator(".panel canvas").first.evaluate(
                "(it) => !it.getContext('2d').getImageData(0, 0, it.width, it.height).data.some(Boolean)"
            )
            assert empty == (case == "nothing seen"), "a missing keypoint is absent, the others are there"
        assert not events.errors and not events.foreign
