"""Pose tokens in language models: any tokenizer reads them, and their embeddings begin from the codebooks."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from formatters import OPTION_NAMES, OPTIONS, PARTS, make_codes, make_formatter
from modeling_pose_tokenizer.code_embeddings_pose_tokenizer import project_codebooks
from modeling_pose_tokenizer.codes_pose_tokenizer import PoseCodeFormatter
from models import trained_model

# ---- tokenizers -----------------------------------------------------------------------------------------------------


def word_tokenizer():
    words = {word: index for index, word in enumerate(["[UNK]", "hello", "world", "sign"])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def cleaning_tokenizer():
    """One that drops private-use characters and decomposes others, as BERT's does."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, lowercase=True)
    return tokenizer


def byte_tokenizer():
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["hello world, this is <b> a sign </b> of life"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = [word_tokenizer, cleaning_tokenizer, byte_tokenizer, ByT5Tokenizer]  # the last one in Python alone


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
@pytest.mark.parametrize("make_tokenizer", TOKENIZERS)
def test_text_passes_through_a_tokenizer(make_tokenizer, options):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    formatter = make_formatter(**options).add_to(tokenizer)
    assert formatter.base_offset == size and len(tokenizer) == size + formatter.vocab_size
    assert (formatter.layout, formatter.part_marks, formatter.compact) == tuple(
        {"layout": "flat", "part_marks": False, **options}[key] for key in ("layout", "part_marks", "compact")
    )
    for levels in (1, 3):
        codes = make_codes(formatter, levels)
        text = formatter.codes_to_text(codes, add_special_tokens=True)
        ids = tokenizer("hello world" + text, add_special_tokens=False)["input_ids"]
        poses = [index for index in ids if index >= size]
        assert poses == formatter.codes_to_ids(codes, add_special_tokens=True).T.reshape(-1).tolist()
        np.testing.assert_array_equal(formatter.text_to_codes(tokenizer.decode(poses)), codes)
        np.testing.assert_array_equal(formatter.text_to_codes(tokenizer.decode(ids), levels, "repair"), codes)
        bare = tokenizer.decode(ids, skip_special_tokens=True)
        np.testing.assert_array_equal(formatter.text_to_codes(bare, levels, "repair"), codes)


def test_a_vocabulary_is_added_once(tmp_path):
    tokenizer, formatter = word_tokenizer(), make_formatter(base_offset=77)
    assert formatter.add_to(tokenizer).base_offset == formatter.add_to(tokenizer).base_offset == 4
    assert len(tokenizer) == 4 + formatter.vocab_size
    tokenizer.save_pretrained(tmp_path)
    assert formatter.add_to(AutoTokenizer.from_pretrained(tmp_path)).base_offset == 4
    assert make_formatter(compact=True).add_to(tokenizer).base_offset == 4 + formatter.vocab_size


@pytest.mark.parametrize("other", [{"sizes": 19}, {"sizes": 21}, {"part_marks": True}])
def test_two_vocabularies_do_not_mix(other):
    tokenizer = word_tokenizer()
    make_formatter(20).add_to(tokenizer)
    size = len(tokenizer)
    with pytest.raises(ValueError, match="holds pose tokens of another configuration, such as <rh2_00"):
        make_formatter(**other).add_to(tokenizer)
    assert len(tokenizer) == size


# ---- embeddings -----------------------------------------------------------------------------------------------------


def gpt2(rows=4, **options):
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=32, n_layer=1, n_head=2, n_positions=64, **options))


def llama(rows=4, **options):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes, **options))


def biased_llama(**options):
    model = llama(**options)
    model.lm_head = torch.nn.Linear(32, 4)
    return model


MODELS = {
    "gpt2": gpt2,
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama": llama,
    "llama with a bias": biased_llama,
    "llama in bfloat16": lambda: llama().bfloat16(),
    "llama with rows to spare": lambda: llama(rows=1000),
}


def make_codebooks(size=20, dim=6):
    codebooks = torch.randn(9, size, dim, generator=torch.Generator().manual_seed(1)) * 0.1 + 3
    codebooks[:, 0] = 0.0
    return codebooks


def tables_of(model):
    output = model.get_output_embeddings()
    tied = output.weight is model.get_input_embeddings().weight
    return [model.get_input_embeddings().weight] + [output.weight] * (not tied)


@pytest.mark.parametrize("with_codebooks", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_grows_with_its_tokenizer(name, with_codebooks):
    torch.manual_seed(0)
    tokenizer, model = word_tokenizer(), MODELS[name]()
    before = [table.detach().clone() for table in tables_of(model)]
    codebooks = make_codebooks() if with_codebooks else None
    formatter = make_formatter().add_to(tokenizer, model, codebooks)
    rows = max(len(tokenizer), len(before[0]))
    assert model.config.vocab_size == rows and [len(table) for table in tables_of(model)] == [rows] * len(before)
    for table, old in zip(tables_of(model), before, strict=True):
        torch.testing.assert_close(table[:4], old[:4], rtol=0, atol=0)

    prompt = "hello world " + formatter.codes_to_text(make_codes(formatter), add_special_tokens=True)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(table).all() and table.grad.isfinite().all() for table in tables_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_rows_begin_from_the_codebooks(name):
    torch.manual_seed(0)
    tokenizer, model = word_tokenizer(), MODELS[name]()
    formatter = make_formatter().add_to(tokenizer, model, make_codebooks())
    tolerance = 0.02 if "bfloat16" in name else 1e-5
    projected = project_codebooks(make_codebooks(), 32)
    for table in tables_of(model):
        table = table.detach().float()
        old, special, codes = table[:4], table[4:7], table[7 : len(tokenizer)]
        assert len(codes) == 9 * 20
        mean, deviation = old.mean(0), old.std(0, correction=0)
        torch.testing.assert_close(special, mean.expand(3, -1), rtol=tolerance, atol=tolerance * 0.1)
        for column in range(32):  # the same projection, in the place and of the spread of the old rows
            values = [float(row[column]) for row in projected]
            center = sum(values) / len(values)
            spread = (sum((value - center) ** 2 for value in values) / len(values)) ** 0.5
            expected = torch.tensor([(value - center) / spread for value in values])
            expected = expected * deviation[column] + mean[column]
            torch.testing.assert_close(codes[:, column], expected, rtol=tolerance, atol=tolerance * 0.1)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.testing.assert_close(bias[4:], bias[:4].mean().expand(formatter.vocab_size))


def test_the_projection_is_that_of_the_naive_loop():
    codebooks = [make_codebooks()[0], make_codebooks()[1, :5, :3]]  # unlike sizes
    generator = torch.Generator().manual_seed(0)
    expected = []
    for book in codebooks:
        matrix = torch.randn(book.shape[1], 16, generator=generator)
        centers = [sum(float(vector[i]) for vector in book) / len(book) for i in range(book.shape[1])]
        centred = [[float(vector[i]) - centers[i] for i in range(book.shape[1])] for vector in book]
        squares = [value**2 for vector in centred for value in vector]
        deviation = (sum(squares) / len(squares)) ** 0.5
        for vector in centred:
            row = [
                sum(value / deviation * float(matrix[i, j]) for i, value in enumerate(vector)) / len(vector) ** 0.5
                for j in range(16)
            ]
            expected.append(row)
    torch.testing.assert_close(project_codebooks(codebooks, 16), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert project_codebooks(codebooks, 16).equal(project_codebooks(codebooks, 16))


def test_the_projection_keeps_distances_and_tells_codebooks_apart():
    codebooks = trained_model("parts").quantizer.codebook  # (8, 64, 8)
    size = 512
    rows = project_codebooks(codebooks, size).unflatten(0, codebooks.shape[:2])
    for book, projected in zip(codebooks, rows, strict=True):
        before, after = torch.pdist(book), torch.pdist(projected)
        scale = (book - book.mean(0)).square().mean().sqrt() * (book.shape[1] / size) ** 0.5
        ratio = (after * scale / before)[before > 0]
        assert len(ratio) > 1000 and (ratio - 1).abs().max() < 0.25
        assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.97
    assert 0.9 < rows.std() < 1.1
    # The directions of two codebooks are nearly at right angles.
    cosines = torch.nn.functional.cosine_similarity(rows[0, 1:, None], rows[1, None, 1:], dim=-1)
    assert cosines.abs().mean() < 0.1


def test_codebooks_of_a_model_fit_its_formatter():
    model = trained_model("parts")
    formatter = PoseCodeFormatter.from_config(model.config, part_marks=True)
    language_model = llama()
    formatter = formatter.add_to(word_tokenizer(), language_model, codebooks=model.quantizer.codebook)
    assert language_model.get_input_embeddings().num_embeddings == 4 + formatter.vocab_size
    # A fixed seed begins in the same place.
    again = llama()
    with torch.no_grad():
        for table, old in zip(tables_of(again), tables_of(language_model), strict=True):
            table.copy_(old[:4])
    formatter.add_to(word_tokenizer(), again, codebooks=model.quantizer.codebook)
    for table, old in zip(tables_of(again), tables_of(language_model), strict=True):
        torch.testing.assert_close(table, old, rtol=0, atol=0)


def test_codebooks_of_a_grid_are_what_it_reads():
    model = trained_model("fsq")
    formatter = PoseCodeFormatter.from_config(model.config)
    codes = torch.arange(model.config.codebook_size).expand(formatter.num_codebooks, -1)
    codebooks = model.quantizer.read(codes, slice(0, formatter.num_codebooks))
    formatter.add_to(word_tokenizer(), language_model := llama(), codebooks)
    assert language_model.get_input_embeddings().weight[7:].std() > 0


def test_embeddings_never_shrink():
    model = gpt2(rows=1000)
    make_formatter().add_to(word_tokenizer(), model)
    assert model.get_input_embeddings().num_embeddings == 1000


def test_what_is_learned_is_not_undone():
    tokenizer, model = word_tokenizer(), llama()
    formatter = make_formatter().add_to(tokenizer, model)
    before = [table.detach().clone() for table in tables_of(model)]
    assert formatter.add_to(tokenizer, model).base_offset == 4
    with pytest.raises(ValueError, match=r"have the pose tokens already.* call add_to without codebooks"):
        formatter.add_to(tokenizer, model, make_codebooks())
    for table, old in zip(tables_of(model), before, strict=True):
        assert table.equal(old)
    # Another model, which has no rows for the tokenizer's pose tokens yet.
    formatter.add_to(tokenizer, fresh := llama(), make_codebooks())
    torch.testing.assert_close(fresh.get_input_embeddings().weight[4], fresh.get_input_embeddings().weight[:4].mean(0))


@pytest.mark.parametrize(
    ("codebooks", "message"),
    [
        (torch.zeros(8, 20, 6), r"shape \(8, 20, 6\); expected 9 of \(K, d\)"),
        (torch.zeros(9, 21, 6), r"shape \(9, 21, 6\)"),
        (torch.zeros(9, 20), r"shape \(9, 20\)"),
        ([torch.zeros(20, 6)] * 8, "expected 9"),
        (torch.full((9, 20, 6), torch.nan), "not finite"),
    ],
)
def test_codebooks_that_do_not_fit_are_refused(codebooks, message):
    tokenizer, model = word_tokenizer(), llama()
    with pytest.raises(ValueError, match=message):
        make_formatter().add_to(tokenizer, model, codebooks)
    with pytest.raises(ValueError, match="without a model"):
        make_formatter().add_to(tokenizer, codebooks=make_codebooks())
    assert len(tokenizer) == 4 == len(tables_of(model)[0])


def test_unlike_codebooks_begin_too():
    formatter = PoseCodeFormatter(PARTS, (1, 1, 1, 1), (5, 6, 7, 8))
    model = llama()
    formatter.add_to(word_tokenizer(), model, [torch.randn(size, 3) for size in (5, 6, 7, 8)])
    assert model.get_input_embeddings().num_embeddings == 4 + 3 + 26
