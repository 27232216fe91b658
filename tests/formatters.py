"""Formatters and codes for the tests: any configuration, any prefix of its levels, and damage to what was written."""

import numpy as np
from hypothesis import strategies as st

from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter

PARTS = ("body", "face", "left_hand", "right_hand")
ARRANGEMENTS = {
    "flat": {},
    "marked": {"part_marks": True},
    "delayed": {"layout": "delayed"},
    "parallel": {"layout": "parallel"},
}
OPTIONS = [{**arrangement, "compact": compact} for arrangement in ARRANGEMENTS.values() for compact in (False, True)]
OPTION_NAMES = [f"{name}{' compact' * compact}" for name in ARRANGEMENTS for compact in (False, True)]


def make_formatter(sizes=20, base_offset=0, **options):
    return PoseCodeFormatter(PARTS, (2, 1, 3, 3), sizes, base_offset, **options)


def make_codes(formatter, num_quantizers=None, steps=3, seed=0):
    """Random codes of the first levels; no code is 0, so that a repaired one is told apart."""
    rng = np.random.default_rng(seed)
    rows = formatter._layout.count_codebooks(num_quantizers)
    return np.stack([rng.integers(min(1, size - 1), size, steps) for size in formatter.codebook_sizes[:rows]])


@st.composite
def configurations(draw):
    """The arguments of any formatter, but for its options."""
    groups = draw(st.sampled_from([PARTS, ("whole",), ("body", "pad"), ("tail", "torso", "arm1", "arm2")]))
    levels = draw(st.lists(st.integers(1, 4), min_size=len(groups), max_size=len(groups)))
    unlike = st.lists(st.integers(1, 70), min_size=sum(levels), max_size=sum(levels))
    return groups, levels, draw(st.integers(1, 70) | unlike), draw(st.integers(0, 100_000))


@st.composite
def cases(draw, options=None):
    """Any formatter, and codes of any prefix of its levels."""
    options = draw(st.sampled_from(OPTIONS)) if options is None else options
    formatter = PoseCodeFormatter(*draw(configurations()), **options)
    num_quantizers = draw(st.integers(1, max(formatter.levels_per_group)))
    return formatter, make_codes(formatter, num_quantizers, draw(st.integers(1, 9)), draw(st.integers(0, 1000)))


def levels_of(formatter, codes):
    return max(level for _, level in formatter.codebook_index[: len(codes)]) + 1


DAMAGES = ["drop", "double", "swap", "move", "replace", "insert", "cut", "behead"]


def damage(draw, items, foreign):
    """A few items dropped, doubled, swapped, replaced, put in or cut off."""
    items = list(items)
    for kind in draw(st.lists(st.sampled_from(DAMAGES), max_size=5)):
        at, other = (draw(st.integers(0, max(len(items) - 1, 0))) for _ in range(2))
        if kind == "insert" or not items:
            items.insert(at, draw(st.sampled_from(foreign)))
        elif kind == "drop":
            items.pop(at)
        elif kind == "double":
            items.insert(at, items[at])
        elif kind == "swap":
            items[at], items[other] = items[other], items[at]
        elif kind == "move":
            items.insert(other, items.pop(at))
        elif kind == "replace":
            items[at] = draw(st.sampled_from(foreign))
        elif kind == "cut":
            items = items[:at]
        else:
            items = items[at:]
    return items
