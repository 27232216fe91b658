"""Reading imperfect tokens: what is there is kept, what follows keeps its time, and nothing is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formatters import OPTION_NAMES, OPTIONS, cases, damage, make_codes, make_formatter


def naive_kind(formatter, place):
    """(codebook, code) of a place; "pad"; None for what is neither."""
    if place == 0:
        return "pad"
    start = len(formatter.special_tokens)
    for row, size in enumerate(formatter.codebook_sizes):
        if start <= place < start + size:
            return row, place - start
        start += size
    return None


def naive_repair_steps(formatter, kinds, count):
    def follows(row, before):
        (part, level), (part_before, level_before) = (
            (formatter.group_names.index(group), level)
            for group, level in (formatter.codebook_index[row], formatter.codebook_index[before])
        )
        if not formatter.part_marks:
            return row == before + 1
        return (part, level) in ((part_before, level_before + 1), (part_before + 1, 0))

    steps = []  # the (codebook, code) of each
    for kind in kinds:
        if isinstance(kind, tuple) and kind[0] < count:
            if kind[0] == 0:
                steps.append([])
            if steps:
                steps[-1].append(kind)
    deepest = max((row for step in steps for row, _ in step), default=0)
    width = min(prefix for prefix in formatter._layout.prefixes if prefix > deepest)
    columns = []
    for step in steps:
        column = [0] * count
        for number, (row, code) in enumerate(step):
            if number and not follows(row, step[number - 1][0]):
                break
            column[row] = code
        columns.append(column)
        columns += [[0] * count] * (int(len(step) / width + 0.5) - 1)
    return np.array(columns, dtype=int).reshape(-1, count).T


def naive_repair_columns(formatter, columns, count, num_streams):
    """Columns of kinds -> codes."""
    delay = int(formatter.layout == "delayed")
    steps, owned = [], []
    for step in range(len(columns)):
        own = {}
        for row in range(min(num_streams, count)):
            kind = columns[step + delay * row][row] if step + delay * row < len(columns) else None
            if isinstance(kind, tuple) and kind[0] == row:
                own[row] = kind[1]
        prefix = [own[row] for row in range(count) if all(before in own for before in range(row + 1))]
        steps.append(prefix + [0] * (count - len(prefix)))
        owned.append(own)
    while owned and 0 not in owned[0]:
        steps.pop(0), owned.pop(0)
    while owned and not owned[-1]:
        steps.pop(), owned.pop()
    return np.array(steps, dtype=int).reshape(-1, count).T


def naive_repair_text(formatter, places, count):
    kinds = [naive_kind(formatter, place) for place in places]
    if formatter.layout != "delayed":
        return naive_repair_steps(formatter, kinds, count)
    columns, before = [], None
    for kind in kinds:
        if kind == "pad":
            before = None
        elif kind is not None and kind[0] < count:
            if before is None or kind[0] <= before:
                columns.append([None] * count)
            before = kind[0]
            columns[-1][before] = kind
    return naive_repair_columns(formatter, columns, count, count)


@settings(max_examples=200)
@given(cases(), st.booleans(), st.data())
def test_repaired_text_is_that_of_the_naive_loop(case, ends, data):
    formatter, codes = case
    tokens = formatter._pattern.findall(formatter.codes_to_text(codes, ends))
    tokens = damage(data.draw, tokens, ["hello", "<b0_1>", "<", *formatter.special_tokens, *formatter.vocabulary[-3:]])
    asked = data.draw(st.none() | st.integers(1, max(formatter.levels_per_group)))
    places = [formatter._places.get(token, -1) for token in tokens]
    expected = naive_repair_text(formatter, places, formatter._layout.count_codebooks(asked))
    np.testing.assert_array_equal(formatter.text_to_codes(" ".join(tokens), asked, errors="repair"), expected)


@settings(max_examples=200)
@given(cases(), st.booleans(), st.data())
def test_repaired_ids_are_those_of_the_naive_loop(case, ends, data):
    formatter, codes = case
    ids = formatter.codes_to_ids(codes, ends)
    last = formatter.base_offset + formatter.vocab_size
    foreign = [-1, formatter.base_offset - 1, last - 1, last, 2**62, formatter.pad_token_id, formatter.end_token_id]
    asked = data.draw(st.none() | st.integers(1, max(formatter.levels_per_group)))
    count = formatter._layout.count_codebooks(asked)
    columns = damage(
        data.draw, ids.T.tolist(), foreign if ids.ndim == 1 else [[place] * len(ids) for place in foreign]
    )
    if ids.ndim == 1:
        kinds = [naive_kind(formatter, place - formatter.base_offset) for place in columns]
        expected = naive_repair_steps(formatter, kinds, count)
    else:
        columns = [damage_cells(data.draw, column, foreign) for column in columns]
        kinds = [[naive_kind(formatter, place - formatter.base_offset) for place in column] for column in columns]
        expected = naive_repair_columns(formatter, kinds, count, len(ids))
        columns = np.array(columns, dtype=np.int64).reshape(-1, len(ids)).T
    np.testing.assert_array_equal(formatter.ids_to_codes(columns, asked, errors="repair"), expected)


def damage_cells(draw, column, foreign):
    at = draw(st.none() | st.integers(0, len(column) - 1))
    return [draw(st.sampled_from(foreign)) if row == at else place for row, place in enumerate(column)]


@settings(max_examples=200)
@given(cases(), st.data())
def test_any_text_is_repaired(case, data):
    formatter, _ = case
    pieces = st.text(st.characters()) | st.sampled_from(formatter.vocabulary)
    text = "".join(data.draw(st.lists(pieces, max_size=30)))
    asked = data.draw(st.none() | st.integers(1, max(formatter.levels_per_group)))
    codes = formatter.text_to_codes(text, asked, errors="repair")
    assert codes.shape[0] == formatter._layout.count_codebooks(asked) and codes.dtype == np.int64
    assert (codes >= 0).all() and (codes < np.array(formatter.codebook_sizes)[: len(codes), None]).all()


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_talk_between_tokens_changes_nothing(options):
    formatter = make_formatter(**options)
    codes = make_codes(formatter, steps=5)
    tokens = formatter._pattern.findall(formatter.codes_to_text(codes, add_special_tokens=True))
    text = "Sure! " + " and <b> <b0_9999> ".join(tokens) + " That was it."
    np.testing.assert_array_equal(formatter.text_to_codes(text, errors="repair"), codes)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("layout", ["flat", "parallel"])
def test_a_lost_token_harms_its_step_alone(layout, compact):
    formatter = make_formatter(layout=layout, compact=compact)
    codes = make_codes(formatter, steps=4)
    tokens = formatter._pattern.findall(formatter.codes_to_text(codes))
    for index in range(1, len(tokens)):
        step, row = divmod(index, len(codes))
        expected = codes.copy()
        expected[row:, step] = 0
        got = formatter.text_to_codes("".join(tokens[:index] + tokens[index + 1 :]), errors="repair")
        np.testing.assert_array_equal(got, expected)
        # Generation that stopped in the middle of a step.
        got = formatter.text_to_codes("".join(tokens[:index]), errors="repair")
        np.testing.assert_array_equal(got, expected[:, : step + (row > 0)])


def test_a_lost_id_of_a_stream_harms_its_step_alone():
    for layout in ("delayed", "parallel"):
        formatter = make_formatter(layout=layout)
        codes = make_codes(formatter, steps=4)
        for row in range(9):
            ids = formatter.codes_to_ids(codes)
            ids[row, 2 + row * (layout == "delayed")] = formatter.pad_token_id
            expected = codes.copy()
            expected[row:, 2] = 0
            np.testing.assert_array_equal(formatter.ids_to_codes(ids, errors="repair"), expected)
    ids = make_formatter(layout="delayed").codes_to_ids(codes)[:, :7]  # generation that stopped
    expected = np.where(np.arange(9)[:, None] + np.arange(4) < 7, codes, 0)
    np.testing.assert_array_equal(make_formatter(layout="delayed").ids_to_codes(ids, errors="repair"), expected)


def test_a_marked_part_may_end_early():
    formatter = make_formatter(part_marks=True)
    codes = make_codes(formatter, steps=2)
    text = formatter.codes_to_text(codes)
    expected = codes.copy()
    expected[4, 0] = 0  # body level 1
    got = formatter.text_to_codes(text.replace(f"<b1_{codes[4, 0]:04d}>", "", 1), errors="repair")
    np.testing.assert_array_equal(got, expected)
    for mark in formatter.special_tokens:
        np.testing.assert_array_equal(formatter.text_to_codes(text.replace(mark, ""), errors="repair"), codes)
