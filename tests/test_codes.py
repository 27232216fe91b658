"""The code formatter: codes, ids and text are the same thing, for every configuration and every prefix of levels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter, _abbreviate
from modeling_pose_tokenizer.configuration_pose_tokenizer import PoseTokenizerConfig

PARTS = ("body", "face", "left_hand", "right_hand")


def make_formatter(sizes=20, base_offset=0):
    return PoseCodeFormatter(PARTS, (2, 1, 3, 3), sizes, base_offset)


@st.composite
def formatters_and_codes(draw):
    """Any configuration, and codes of any prefix of its levels."""
    groups = draw(st.sampled_from([PARTS, ("whole",), ("tail", "torso", "arm1", "arm2")]))
    levels = draw(st.lists(st.integers(1, 4), min_size=len(groups), max_size=len(groups)))
    sizes = draw(
        st.one_of(st.integers(1, 70), st.lists(st.integers(1, 70), min_size=sum(levels), max_size=sum(levels)))
    )
    formatter = PoseCodeFormatter(groups, levels, sizes, draw(st.integers(0, 100_000)))
    num_quantizers = draw(st.integers(1, max(levels)))
    rows = sum(level < num_quantizers for _, level in formatter.codebook_index)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    steps = draw(st.integers(1, 9))
    codes = np.stack([rng.integers(0, size, steps) for size in formatter.codebook_sizes[:rows]])
    return formatter, codes, num_quantizers


@given(formatters_and_codes(), st.booleans(), st.booleans())
def test_ids_round_trip(case, add_special_tokens, say_levels):
    formatter, codes, num_quantizers = case
    levels = num_quantizers if say_levels else None
    ids = formatter.codes_to_ids(codes, add_special_tokens)
    assert ids.dtype == np.int64 and ids.shape == (codes.size + 2 * add_special_tokens,)
    assert formatter.base_offset <= ids.min() and ids.max() < formatter.base_offset + formatter.vocab_size
    np.testing.assert_array_equal(formatter.ids_to_codes(ids, levels), codes)
    tensor = formatter.codes_to_ids(torch.from_numpy(codes), add_special_tokens)
    assert isinstance(tensor, torch.Tensor) and tensor.tolist() == ids.tolist()
    np.testing.assert_array_equal(formatter.ids_to_codes(tensor, levels).numpy(), codes)
    np.testing.assert_array_equal(formatter.ids_to_codes(ids.tolist(), levels), codes)


@given(formatters_and_codes(), st.booleans(), st.booleans())
def test_text_round_trip(case, add_special_tokens, say_levels):
    formatter, codes, num_quantizers = case
    text = formatter.codes_to_text(codes, add_special_tokens)
    levels = num_quantizers if say_levels else None
    np.testing.assert_array_equal(formatter.text_to_codes(text, levels), codes)
    np.testing.assert_array_equal(formatter.text_to_codes(" \n" + text.replace("><", "> <"), levels), codes)


@given(formatters_and_codes())
def test_the_order_is_that_of_the_naive_loop(case):
    formatter, codes, _ = case
    ids, texts = [], []
    for step in range(codes.shape[1]):
        for row in range(len(codes)):
            before = sum(formatter.codebook_sizes[:row])
            place = len(formatter.special_tokens) + before + int(codes[row, step])
            ids.append(formatter.base_offset + place)
            texts.append(formatter.vocabulary[place])
    assert formatter.codes_to_ids(codes).tolist() == ids
    assert formatter.codes_to_text(codes) == "".join(texts)


@given(formatters_and_codes())
def test_tokens_are_unique(case):
    formatter = case[0]
    assert len(set(formatter.vocabulary)) == len(formatter.vocabulary) == formatter.vocab_size
    assert formatter.vocabulary[: len(formatter.special_tokens)] == formatter.special_tokens


def test_padding_at_either_side_is_dropped():
    formatter = make_formatter()
    codes = np.arange(18).reshape(9, 2)
    ids = formatter.codes_to_ids(codes, add_special_tokens=True)
    pad = formatter.special_tokens.index(formatter.pad_token)
    np.testing.assert_array_equal(formatter.ids_to_codes(np.pad(ids, (2, 3), constant_values=pad)), codes)


def test_nothing_is_nothing():
    formatter = make_formatter()
    empty = np.zeros((9, 0), dtype=np.int64)
    assert formatter.codes_to_ids(empty).shape == (0,) and formatter.codes_to_text(empty) == ""
    for got in (formatter.ids_to_codes([]), formatter.text_to_codes(""), formatter.text_to_codes("<pose></pose>")):
        assert got.shape == (9, 0)
    assert formatter.ids_to_codes([], num_quantizers=1).shape == (4, 0)


def test_names_are_readable():
    formatter = PoseCodeFormatter(PARTS, (1, 1, 2, 2), 1024)
    codes = np.array([[1], [22], [333], [1023], [417], [0]])
    assert formatter.codes_to_text(codes) == "<b0_0001><f0_0022><lh0_0333><rh0_1023><lh1_0417><rh1_0000>"
    assert PoseCodeFormatter(["whole"], [1], 65536).codes_to_text([[7]]) == "<w0_00007>"


def test_abbreviations_are_unique_and_of_letters():
    groups = ("tail", "torso", "tip", "arm1", "arm2", "arm-2", "42", "upper_body", "body")
    short = _abbreviate(groups)
    assert short["tail"] == "t" and short["torso"] == "torso" and short["upper_body"] == "ub" and short["body"] == "b"
    assert len(set(short.values())) == len(groups) and all(name.isalpha() for name in short.values())


@pytest.mark.parametrize("token_groups", ["parts", "whole"])
def test_from_config(token_groups):
    config = PoseTokenizerConfig(token_groups=token_groups, num_quantizers=3, codebook_size=64)
    formatter = PoseCodeFormatter.from_config(config, base_offset=7)
    assert formatter.codebook_index == config.codebook_index
    assert formatter.num_codebooks == config.num_codebooks
    assert formatter.vocab_size == 3 + 64 * config.num_codebooks and formatter.base_offset == 7


def test_from_config_with_unequal_levels():
    config = PoseTokenizerConfig(num_quantizers=[3, 1, 2, 2])
    assert PoseCodeFormatter.from_config(config).codebook_index == config.codebook_index


# ---- language models ------------------------------------------------------------------------------------------------


def make_tokenizer():
    words = {word: index for index, word in enumerate(["[UNK]", "hello", "world", "sign"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_add_to_a_tokenizer_and_a_model(tmp_path):
    tokenizer = make_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    before = model.get_input_embeddings().weight.detach().clone()
    formatter = make_formatter().add_to(tokenizer, model)
    assert formatter.base_offset == 4 and len(tokenizer) == 4 + formatter.vocab_size
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == model.config.vocab_size
    torch.testing.assert_close(model.get_input_embeddings().weight[:4], before)

    codes = np.arange(18).reshape(9, 2)
    prompt = "hello world " + formatter.codes_to_text(codes, add_special_tokens=True)
    ids = tokenizer(prompt)["input_ids"]
    assert ids == [1, 2, *formatter.codes_to_ids(codes, add_special_tokens=True).tolist()]
    np.testing.assert_array_equal(formatter.text_to_codes(tokenizer.decode(ids[2:])), codes)
    np.testing.assert_array_equal(formatter.text_to_codes(tokenizer.decode(ids[2:], skip_special_tokens=True)), codes)
    assert torch.isfinite(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)

    again = formatter.add_to(tokenizer, model)  # the same vocabulary is there already
    assert again.base_offset == 4 and len(tokenizer) == 4 + formatter.vocab_size
    tokenizer.save_pretrained(tmp_path)
    assert make_formatter().add_to(AutoTokenizer.from_pretrained(tmp_path)).base_offset == 4


def test_embeddings_never_shrink():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    make_formatter().add_to(make_tokenizer(), model)
    assert model.get_input_embeddings().num_embeddings == 1000


@pytest.mark.parametrize("other", [19, 21])
def test_two_vocabularies_do_not_mix(other):
    tokenizer = make_tokenizer()
    make_formatter(20).add_to(tokenizer)
    size = len(tokenizer)
    with pytest.raises(ValueError, match="holds pose tokens of another configuration, such as <rh2_00"):
        make_formatter(other).add_to(tokenizer)
    assert len(tokenizer) == size


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
    for write in (make_formatter().codes_to_ids, make_formatter().codes_to_text):
        with pytest.raises(ValueError, match=message):
            write(codes)


def test_bad_ids_are_refused():
    formatter = make_formatter(base_offset=100)
    ids = formatter.codes_to_ids(np.zeros((4, 3), dtype=int))
    cases = {
        "position 2: id 99 is no pose token; expected ids from 100 to 282": np.insert(ids, 2, 99),
        "position 5: found <lh0_0000>; expected a code of face level 0 .step 1": np.delete(ids, 5),
        "position 1: found <pose>; expected a code of face level 0": np.insert(ids, 1, 101),
        "position 11: the tokens end within step 2; expected a code of right_hand level 0": ids[:-1],
        "position 0: found <f0_0000>; expected a code of body level 0": ids[1:],
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            formatter.ids_to_codes(wrong)
    with pytest.raises(ValueError, match="position 4: found <b0_0000>; expected a code of body level 1"):
        formatter.ids_to_codes(ids, num_quantizers=2)
    with pytest.raises(ValueError, match="num_quantizers is 4; expected 1 to 3"):
        formatter.ids_to_codes(ids, num_quantizers=4)
    with pytest.raises(ValueError, match="one dimension"):
        formatter.ids_to_codes(ids[None])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<b0_0001>, <f0_0001>", r"position 1 \(character 9\): ',' is no pose token; expected one like '<rh2_0019>'"),
        ("<b0_0001><f0_0020>", r"position 1 \(character 9\): '<f0_0020>' is no pose token"),
        ("<b0_0001><f0_0001><rh0_0001>", "position 2: found <rh0_0001>; expected a code of left_hand level 0"),
        ("<b0_0001", r"position 0 \(character 0\): '<b0_0001' is no pose token"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        make_formatter().text_to_codes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 8), "group_names"),
        ((["a", "a"], [1, 1], 8), "each once"),
        ((["a"], [1, 2], 8), "levels_per_group"),
        ((["a"], [0], 8), "levels_per_group"),
        ((["a"], [2], [8]), "expected one or 2 sizes"),
        ((["a"], [1], 0), "codebook_size is 0"),
    ],
)
def test_bad_fields_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoseCodeFormatter(*arguments)
