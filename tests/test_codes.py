"""The code formatter: codes, ids and text are the same thing, for every configuration and every prefix of levels."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formatters import (
    OPTION_NAMES,
    OPTIONS,
    PARTS,
    cases,
    configurations,
    damage,
    levels_of,
    make_codes,
    make_formatter,
)
from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter, _abbreviate
from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig

# ---- round trips ----------------------------------------------------------------------------------------------------


def naive_streams(formatter, codes):
    """Places of codes, token by token: a list for each stream."""
    num_special = len(formatter.special_tokens)
    places = [
        [num_special + sum(formatter.codebook_sizes[:row]) + int(code) for code in codes[row]]
        for row in range(len(codes))
    ]
    if formatter.layout == "parallel":
        return places
    if formatter.layout == "delayed":
        return [[0] * row + own + [0] * (len(codes) - 1 - row) for row, own in enumerate(places)]
    stream, index = [], formatter.codebook_index[: len(codes)]
    for step in range(codes.shape[1]):
        if not formatter.part_marks:
            stream += [own[step] for own in places]
            continue
        for number, group in enumerate(formatter.group_names):
            stream.append(3 + number)
            stream += [own[step] for own, (name, _) in zip(places, index, strict=True) if name == group]
    return [stream]


def check_round_trip(formatter, codes, ends, say_levels):
    levels = levels_of(formatter, codes) if say_levels else None
    expected = [[1] * ends + stream + [2] * ends for stream in naive_streams(formatter, codes)]
    ids = formatter.codes_to_ids(codes, add_special_tokens=ends)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.atleast_2d(ids) - formatter.base_offset, expected)
    columns = ["".join(formatter.vocabulary[place] for place in column) for column in zip(*expected, strict=True)]
    text = formatter.codes_to_text(codes, add_special_tokens=ends)
    assert text == ("" if formatter.layout == "flat" else "\n").join(columns)
    for errors in ("strict", "repair"):
        for got in (formatter.ids_to_codes(ids, levels, errors), formatter.text_to_codes(text, levels, errors)):
            assert got.dtype == np.int64
            np.testing.assert_array_equal(got[: len(codes)], codes)
            full = formatter.num_codebooks if levels is None and errors == "repair" else len(codes)
            assert len(got) == full and not got[len(codes) :].any()


@settings(max_examples=300)
@given(cases(), st.booleans(), st.booleans())
def test_ids_and_text_round_trip(case, ends, say_levels):
    check_round_trip(*case, ends, say_levels)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(configurations(), st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000), st.booleans(), st.booleans())
def test_ten_thousand_round_trips(configuration, num_quantizers, steps, seed, ends, say_levels):
    for options in OPTIONS:
        formatter = PoseCodeFormatter(*configuration, **options)
        codes = make_codes(formatter, min(num_quantizers, max(formatter.levels_per_group)), steps, seed)
        check_round_trip(formatter, codes, ends, say_levels)


flat_cases = st.booleans().flatmap(lambda marks: cases({"part_marks": marks}))


@given(flat_cases)
def test_what_may_follow_is_what_is_written(case):
    formatter, codes = case
    levels = levels_of(formatter, codes)
    written = formatter.codes_to_ids(codes, add_special_tokens=True).tolist()
    prompt = [formatter.base_offset + formatter.vocab_size + 5]  # a word
    for index in range(1, len(written)):
        assert written[index] in formatter.next_ids(prompt + written[:index], levels)
    assert formatter.next_ids(written, levels) == [formatter.pad_token_id]


@given(flat_cases, st.integers(0, 40), st.integers(0, 1000))
def test_what_is_chosen_from_what_may_follow_needs_no_repair(case, length, seed):
    formatter, codes = case
    levels, generator = levels_of(formatter, codes), random.Random(seed)
    ids, complete = [formatter.begin_token_id], 0
    for _ in range(length):
        allowed = formatter.next_ids(torch.tensor(ids), levels)
        assert len(set(allowed)) == len(allowed)
        if formatter.end_token_id in allowed:
            complete = len(ids)
        ids.append(generator.choice(allowed))
    if formatter.end_token_id not in ids and formatter.end_token_id not in formatter.next_ids(ids, levels):
        ids = ids[:complete]  # a step that is not complete
    steps = formatter.ids_to_codes(ids, levels)
    assert len(steps) == len(codes)


def test_what_may_follow_needs_one_stream_that_has_begun():
    with pytest.raises(ValueError, match="no begin token"):
        make_formatter().next_ids([0, 5, 6])
    with pytest.raises(ValueError, match="expected 'flat'"):
        make_formatter(layout="delayed").next_ids([1])


@given(cases(), st.booleans(), st.sampled_from([" ", "\n", " \t\r\n\u3000"]))
def test_white_space_means_nothing(case, ends, space):
    formatter, codes = case
    tokens = formatter._pattern.findall(formatter.codes_to_text(codes, add_special_tokens=ends))
    for text in ("".join(tokens), space + space.join(tokens) + space):
        for errors in ("strict", "repair"):
            np.testing.assert_array_equal(formatter.text_to_codes(text, levels_of(formatter, codes), errors), codes)


@given(cases(), st.booleans(), st.integers(0, 3), st.integers(0, 3))
def test_padding_at_either_side_is_dropped(case, ends, left, right):
    formatter, codes = case
    ids = formatter.codes_to_ids(codes, add_special_tokens=ends)
    padding = [(0, 0)] * (ids.ndim - 1) + [(left, right)]
    padded = np.pad(ids, padding, constant_values=formatter.pad_token_id)
    column = formatter.pad_token * (1 if ids.ndim == 1 else len(ids))
    text = column * left + formatter.codes_to_text(codes, add_special_tokens=ends) + column * right
    for errors in ("strict", "repair"):
        levels = levels_of(formatter, codes)
        np.testing.assert_array_equal(formatter.ids_to_codes(padded, levels, errors), codes)
        np.testing.assert_array_equal(formatter.text_to_codes(text, levels, errors), codes)


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_tensors_and_lists(options):
    formatter = make_formatter(base_offset=7, **options)
    codes = make_codes(formatter)
    ids = formatter.codes_to_ids(codes)
    tensor = formatter.codes_to_ids(torch.from_numpy(codes).int())
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64
    assert tensor.tolist() == ids.tolist() == formatter.codes_to_ids(codes.tolist()).tolist()
    for errors in ("strict", "repair"):
        got = formatter.ids_to_codes(tensor, errors=errors)
        assert isinstance(got, torch.Tensor) and got.tolist() == codes.tolist()
        np.testing.assert_array_equal(formatter.ids_to_codes(ids.tolist(), errors=errors), codes)


@pytest.mark.parametrize("errors", ["strict", "repair"])
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_nothing_is_nothing(options, errors):
    formatter = make_formatter(**options)
    for rows, levels in ((9, None), (9, 3), (4, 1)):
        empty = np.zeros((rows, 0), dtype=np.int64)
        for ends in (False, True):
            ids, text = (write(empty, ends) for write in (formatter.codes_to_ids, formatter.codes_to_text))
            assert formatter.ids_to_codes(ids, levels, errors).shape == (rows, 0)
            assert formatter.text_to_codes(text, levels, errors).shape == (rows, 0)
    assert formatter.text_to_codes("", errors=errors).shape == (9, 0)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_names_are_readable():
    codes = np.array([[1], [22], [333], [1023], [417], [0]])
    formatter = PoseCodeFormatter(PARTS, (1, 1, 2, 2), 1024)
    assert formatter.codes_to_text(codes) == "<b0_0001><f0_0022><lh0_0333><rh0_1023><lh1_0417><rh1_0000>"
    formatter = PoseCodeFormatter(PARTS, (1, 1, 2, 2), 1024, part_marks=True)
    text = "<b0_0001><pose_f><f0_0022><pose_lh><lh0_0333><lh1_0417><pose_rh><rh0_1023><rh1_0000>"
    assert formatter.codes_to_text(codes, add_special_tokens=True) == f"<pose><pose_b>{text}</pose>"
    assert PoseCodeFormatter(["whole"], [1], 65536).codes_to_text([[7]]) == "<w0_00007>"


def test_streams_are_staggered():
    formatter = PoseCodeFormatter(["body", "face"], [2, 1], 10, base_offset=100, layout="delayed")
    codes = [[1, 2], [3, 4], [5, 6]]
    assert formatter.codes_to_ids(codes, add_special_tokens=True).tolist() == [
        [101, 104, 105, 100, 100, 102],
        [101, 100, 116, 117, 100, 102],
        [101, 100, 100, 128, 129, 102],
    ]
    assert formatter.codes_to_text(codes).splitlines() == [
        "<b0_0001><pose_pad><pose_pad>",
        "<b0_0002><f0_0003><pose_pad>",
        "<pose_pad><f0_0004><b1_0005>",
        "<pose_pad><pose_pad><b1_0006>",
    ]


def test_compact_text_is_a_character_for_each_token():
    formatter = PoseCodeFormatter(["whole"], [2], 65_536, compact=True)
    text = formatter.codes_to_text([[0, 6396, 6397], [0, 1, 65_535]])
    assert text == "󾜃󾜄󰀀􎜄"
    assert {len(token) for token in formatter.vocabulary} == {1}
    full = PoseCodeFormatter(["whole"], [1], 137_468 - 3, compact=True)
    assert full.vocabulary[-1] == "\U0010fffd"
    with pytest.raises(ValueError, match="vocabulary of 137469 tokens; expected at most 137468"):
        PoseCodeFormatter(["whole"], [1], 137_468 - 2, compact=True)


@given(cases())
def test_tokens_are_unique(case):
    formatter, _ = case
    assert len(set(formatter.vocabulary)) == len(formatter.vocabulary) == formatter.vocab_size
    assert formatter.vocabulary[: len(formatter.special_tokens)] == formatter.special_tokens
    assert len(formatter.special_tokens) == 3 + formatter.part_marks * len(formatter.group_names)
    named = {formatter.pad_token: formatter.pad_token_id, formatter.end_token: formatter.end_token_id}
    for token, index in (named | {formatter.begin_token: formatter.begin_token_id}).items():
        assert formatter.vocabulary.index(token) == index - formatter.base_offset


def test_abbreviations_are_unique_and_of_letters():
    groups = ("tail", "torso", "tip", "arm1", "arm2", "arm-2", "42", "upper_body", "body", "palm", "pad")
    short = _abbreviate(groups)
    assert short["tail"] == "t" and short["torso"] == "torso" and short["upper_body"] == "ub" and short["body"] == "b"
    assert len(set(short.values())) == len(groups) and all(name.isalpha() for name in short.values())
    assert "pad" not in short.values(), "its mark would be the padding token"


@pytest.mark.parametrize("token_groups", ["parts", "whole"])
def test_from_config(token_groups):
    config = PoseTokenizerConfig(token_groups=token_groups, num_quantizers=3, codebook_size=64)
    formatter = PoseCodeFormatter.from_config(config, base_offset=7)
    assert formatter.codebook_index == config.codebook_index
    assert formatter.num_codebooks == config.num_codebooks
    assert formatter.vocab_size == 3 + 64 * config.num_codebooks and formatter.base_offset == 7
    formatter = PoseCodeFormatter.from_config(config, layout="flat", part_marks=True, compact=True)
    assert formatter.vocab_size == 3 + len(config.group_names) + 64 * config.num_codebooks
    assert formatter.compact and formatter.part_marks
    assert PoseCodeFormatter.from_config(config, layout="delayed").layout == "delayed"


def test_from_config_with_unequal_levels():
    config = PoseTokenizerConfig(num_quantizers=[3, 1, 2, 2])
    assert PoseCodeFormatter.from_config(config).codebook_index == config.codebook_index


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((5, 2), dtype=int), r"shape \(5, 2\); expected \(Q, S\) with Q = 9, or 4, 7 for the first levels"),
        (np.zeros(9, dtype=int), r"shape \(9,\)"),
        (np.zeros((9, 2)), "dtype float64; expected integers"),
        (np.array([[0, 0], [0, 0], [0, 0], [0, 20]]), r"codes\[3, 1\] is 20; expected 0 to 19 \(right_hand level 0"),
        (np.array([[-1], [0], [0], [0]]), r"codes\[0, 0\] is -1"),
    ],
)
def test_bad_codes_are_refused(codes, message):
    for options in OPTIONS:
        for write in (make_formatter(**options).codes_to_ids, make_formatter(**options).codes_to_text):
            with pytest.raises(ValueError, match=message):
                write(codes)


def refusal(read, *arguments):
    with pytest.raises(ValueError) as error:
        read(*arguments)
    return str(error.value)


def test_bad_ids_are_refused():
    formatter = make_formatter(base_offset=100)
    ids = formatter.codes_to_ids(np.zeros((4, 3), dtype=int))
    cases = {
        "position 2: found id 99, which is no pose token (ids 100 to 282); expected a code of left_hand level 0"
        " (step 0).": np.insert(ids, 2, 99),
        "position 5: found <lh0_0000>; expected a code of face level 0 (step 1).": np.delete(ids, 5),
        "position 1: found <pose>; expected a code of face level 0 (step 0).": np.insert(ids, 1, 101),
        "position 11: the tokens end; expected a code of right_hand level 0 (step 2).": ids[:-1],
        "position 0: found <f0_0000>; expected a code of body level 0 (step 0).": ids[1:],
        "position 13: found id 7, which is no pose token (ids 100 to 282); expected nothing but padding after the"
        " end.": [*ids, 102, 7],
        "ids have shape (1, 12); expected one dimension.": ids[None],
    }
    for message, wrong in cases.items():
        assert refusal(formatter.ids_to_codes, wrong) == message
    message = "position 4: found <b0_0000>; expected a code of body level 1 (step 0)."
    assert refusal(formatter.ids_to_codes, ids, 2) == message
    for errors in ("strict", "repair"):
        assert refusal(formatter.ids_to_codes, ids, 4, errors) == "num_quantizers is 4; expected 1 to 3."
    assert refusal(formatter.ids_to_codes, ids, 1, "ignore") == "errors is 'ignore'; expected 'strict' or 'repair'."


def test_bad_streams_are_refused():
    formatter = make_formatter(layout="delayed")
    ids = formatter.codes_to_ids(np.zeros((4, 3), dtype=int), add_special_tokens=True)  # (4, 8)

    def changed(row, position, place):
        wrong = ids.copy()
        wrong[row, position] = place
        return wrong

    begun = np.full((4, 1), formatter.begin_token_id)
    one = formatter.codes_to_ids(np.zeros((4, 1), dtype=int))  # (4, 4)
    cases = {
        "row 2, position 1: found <lh0_0000>; expected padding (a corner of the delay).": changed(2, 1, 43),
        "row 0, position 4: found <b0_0000>; expected padding (a corner of the delay).": changed(0, 4, 3),
        "row 1, position 3: found <rh0_0000>; expected a code of face level 0 (step 1).": changed(1, 3, 63),
        "row 3, position 4: found <pose_pad>; expected a code of right_hand level 0 (step 0).": changed(3, 4, 0),
        "row 1, position 0: found </pose>; expected the begin of every stream.": changed(1, 0, 2),
        "row 2, position 7: found <pose_pad>; expected the end of every stream.": changed(2, 7, 0),
        "row 0, position 1: found <pose>; expected a code of body level 0 (step 0).": np.hstack([begun, ids]),
        "row 0, position 8: found <pose>; expected nothing but padding after the end.": np.hstack([ids, begun]),
        "row 0, position 2: found <b0_0000>; expected padding (a corner of the delay).": ids[:, :5],
        "row 0, position 2: the tokens end; expected padding (a corner of the delay).": one[:, :2],
        "row 0, position 3: the tokens end; expected padding (a corner of the delay).": one[:, :3],
        "ids have shape (5, 8); expected (Q, n) with Q = 4 or 7 or 9.": np.vstack([ids, ids[:1]]),
        "ids have shape (8,); expected (Q, n), a stream for each codebook.": ids[0],
    }
    for message, wrong in cases.items():
        assert refusal(formatter.ids_to_codes, wrong) == message
    assert refusal(formatter.ids_to_codes, ids, 2) == "ids have shape (4, 8); expected (Q, n) with Q = 7."


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (
            {},
            "<b0_0001>, <f0_0001>",
            "position 1 (character 9): found ',', which is no pose token such as '<rh2_0019>'; expected a code of face"
            " level 0 (step 0).",
        ),
        (
            {},
            "<b0_0001><f0_0020>" + "x" * 50,
            "position 1 (character 9): found '<f0_0020>', which is no pose token such as '<rh2_0019>'; expected a code"
            " of face level 0 (step 0).",
        ),
        (
            {},
            "<b0_0001> <f0_0001> <rh0_0001>",
            "position 2 (character 20): found <rh0_0001>; expected a code of left_hand level 0 (step 0).",
        ),
        ({}, "<b0_0001>", "position 1 (character 9): the tokens end; expected a code of face level 0 (step 0)."),
        (
            {},
            "y" * 50,
            f"position 0 (character 0): found '{'y' * 40}...', which is no pose token such as '<rh2_0019>'; expected a"
            " code of body level 0 (step 0).",
        ),
        (
            {"part_marks": True},
            "<pose_b><b0_0001><f0_0001><pose_lh><lh0_0001><pose_rh><rh0_0001>",
            "position 2 (character 17): found <f0_0001>; expected the mark of face (step 0).",
        ),
        (
            {"layout": "parallel"},
            "<b0_0001><f0_0001><lh0_0001><rh0_0001>\n<b0_0001><f0_0001><rh0_0001>",
            "position 6 (character 57): found <rh0_0001>; expected a code of left_hand level 0 (step 1).",
        ),
        (
            {"compact": True},
            "\ue003\ue02b \ue02c",
            "position 1 (character 1): found <lh0_0000>; expected a code of face level 0 (step 0).",
        ),
        (
            {"compact": True},
            "\ue003<f0_0001>",
            "position 1 (character 1): found '<', which is no pose token such as '\\ue0b6'; expected a code of face"
            " level 0 (step 0).",
        ),
    ],
)
def test_bad_text_is_refused(options, text, message):
    assert refusal(make_formatter(**options).text_to_codes, text) == message


@settings(max_examples=300)
@given(cases(), st.booleans(), st.data())
def test_whatever_is_read_strictly_is_written_so(case, ends, data):
    """Text with missing, foreign or shuffled tokens is refused, unless it is the text of other codes."""
    formatter, codes = case
    tokens = formatter._pattern.findall(formatter.codes_to_text(codes, ends))
    damaged = damage(data.draw, tokens, ["hello", *formatter.special_tokens, *formatter.vocabulary[-3:]])
    try:
        got = formatter.text_to_codes("".join(damaged))
    except ValueError as error:
        assert "position" in str(error) and "expected" in str(error)
        return
    kept = [token for token in damaged if token not in formatter.special_tokens]
    written = formatter._pattern.findall(formatter.codes_to_text(got))
    assert kept == [token for token in written if token not in formatter.special_tokens]
    np.testing.assert_array_equal(got, formatter.text_to_codes("".join(damaged), levels_of(formatter, got), "repair"))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], [], 8), {}, "group_names"),
        ((["a", "a"], [1, 1], 8), {}, "each once"),
        ((["a"], [1, 2], 8), {}, "levels_per_group"),
        ((["a"], [0], 8), {}, "levels_per_group"),
        ((["a"], [2], [8]), {}, "expected one or 2 sizes"),
        ((["a"], [1], 0), {}, "codebook_size is 0"),
        ((["a"], [1], 8), {"layout": "woven"}, "layout is 'woven'; expected one of flat, delayed, parallel."),
        ((["a"], [1], 8), {"layout": "delayed", "part_marks": True}, "part_marks is True with layout 'delayed'"),
    ],
)
def test_bad_fields_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        PoseCodeFormatter(*arguments, **options)
