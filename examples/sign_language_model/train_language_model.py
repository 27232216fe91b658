#!/usr/bin/env python
"""A language model that moves: trains a small causal transformer on fingerspelled letters and lets it sign.

python examples/sign_language_model/train_language_model.py --data DIR --output runs/language_model

DIR holds a folder `fingerspelling-wholebody133` with train/ and val/. Every clip becomes a line of text, language and
letter as the prompt and then the tokens of the motion: `bzs: k <pose><b0_0017><f0_0203>...</pose>`. The model starts
from nothing and is tested on letters that it has not seen in that language, and on languages that it has not seen.

Writes OUTPUT/metrics.json, generated.png and generated.html (recorded and generated motion), generated/*.npz, the
language model and the tokens. Letters: Q codebooks, S code steps, T frames, N keypoints, D values per keypoint, M
clips, n tokens, V tokens of the vocabulary.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fingerspelling import Row, choose_held_out, read_letters, read_tokens, shared_letters
from pictures import save_generated
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_pose_tokenizer import PoseCodeFormatter
from modeling_pose_tokenizer.conversion import find_input
from modeling_pose_tokenizer.extraction import TokenFolderError
from modeling_pose_tokenizer.formats import PoseDataError, PoseFileError
from modeling_pose_tokenizer.hub import ModelFolderError, load_pretrained

INDEX = "spoken_to_signed:assets/fingerspelling_lexicon/index.csv"  # of the package that the recordings come from
UNKNOWN = "<unk>"
FORGET = 0.1  # share of language names and of letters that training hides: the model learns to do without
MAX_STEPS = 40  # code steps of a generated clip at most: 6.4 seconds

LINES = {  # of the printed table -> key of the metrics
    "fixed rate": "fixed",
    "static code, one table per codebook": "static",
    "language model": "model",
    "language model, prompt hidden": "model_prompt_hidden",
    "language model, any token may follow": "model_any_token",
    "and the end of the clip": "end_of_clip",
}

Line = dict[str, list[int]]  # a clip as the language model sees it: input_ids, and labels (-100: not to be said)


@dataclass
class Generated:
    """What the language model said.

    Attributes:
        codes: (Q, S).
        ended: Whether the model ended the clip by itself.
    """

    codes: np.ndarray
    ended: bool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--model", default="pretrained/small", help="pose tokenizer (default: %(default)s)")
    parser.add_argument("--set", default="fingerspelling-wholebody133", help="data set (default: %(default)s)")
    parser.add_argument("--index", default=INDEX, help="which clip shows which letter (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=40, help="train clips to test on (default: %(default)s)")
    parser.add_argument("--views", type=int, default=40, help="times every clip is encoded (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over all views (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=192, help="of the transformer (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the transformer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling (default: %(default)s)")
    return parser.parse_args()


# ---- the language model ---------------------------------------------------------------------------------------------


def make_tokenizer(rows: Iterable[Row]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of the prompts. A pretrained language model brings its own instead."""
    words = sorted({f"{row['language']}:" for row in rows} | {row["letter"] for row in rows})
    tokenizer = Tokenizer(WordLevel({word: id for id, word in enumerate([UNKNOWN, *words])}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)


def make_language_model(num_words: int, hidden_size: int, layers: int) -> GPT2LMHeadModel:
    """A causal transformer that knows nothing yet."""
    sizes = {"n_embd": hidden_size, "n_layer": layers, "n_head": max(1, hidden_size // 32)}
    return GPT2LMHeadModel(GPT2Config(vocab_size=num_words, bos_token_id=None, eos_token_id=None, **sizes))


class Scribe:
    """Writes clips as lines of ids: the prompt, then what the model has to say.

    Args:
        tokenizer: Of the language model, with the pose tokens in it.
        formatter: What `PoseCodeFormatter.add_to` returned for this tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, formatter: PoseCodeFormatter) -> None:
        self.tokenizer, self.formatter = tokenizer, formatter
        tokenizer.pad_token, tokenizer.eos_token = formatter.pad_token, formatter.end_token
        self.collate = DataCollatorForSeq2Seq(tokenizer)  # pads on the right; labels of padding are -100

    def prompt(self, row: Row) -> list[int]:
        return self.tokenizer(f"{row['language']}: {row['letter']} {self.formatter.begin_token}")["input_ids"]

    def line(self, row: Row) -> Line:
        given = self.prompt(row)
        said = self.tokenizer(row["text"] + self.formatter.end_token)["input_ids"]
        return {"input_ids": given + said, "labels": [-100] * len(given) + said}

    def codebooks(self, vocab_size: int) -> torch.Tensor:
        """(V,) the codebook of each token, -1 for words and special tokens."""
        books = torch.full((vocab_size,), -1)
        codes = torch.arange(len(self.formatter.codebook_sizes)).repeat_interleave(
            torch.tensor(self.formatter.codebook_sizes)
        )
        first = self.formatter.base_offset + len(self.formatter.special_tokens)
        books[first : first + len(codes)] = codes
        return books


def hide(row: Row, generator: random.Random) -> Row:
    """The clip with words of its prompt hidden now and then."""
    return row | {key: UNKNOWN for key in ("language", "letter") if generator.random() < FORGET}


def train_language_model(model: GPT2LMHeadModel, scribe: Scribe, lines: list[Line], args: argparse.Namespace) -> None:
    """Trains the model and saves it with its tokenizer."""
    arguments = TrainingArguments(
        output_dir=str(args.output / "language_model"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        adam_beta2=0.98,
        train_sampling_strategy="group_by_length",  # padding would cost as much as tokens do
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=lines, data_collator=scribe.collate)
    trainer.train()
    trainer.save_model()
    scribe.tokenizer.save_pretrained(arguments.output_dir)


# ---- how many bits a frame costs ------------------------------------------------------------------------------------


@torch.inference_mode()
def count_bits(model: GPT2LMHeadModel, scribe: Scribe, lines: Sequence[Line], name: str) -> np.ndarray:
    """What clips cost: minus log2 of the probability that the model gave to what was said.

    Returns:
        (M, 3) bits of each clip: of its codes, where only codes of the codebook whose turn it is count (the fixed rate
        takes the order for granted too); of its codes, where any token may follow; of the token that ends it.
    """
    model.eval()
    codebooks = scribe.codebooks(model.config.vocab_size).to(model.device)  # (V,)
    bits = []
    for start in tqdm(range(0, len(lines), 16), desc=f"bits, {name}"):
        batch = scribe.collate(list(lines[start : start + 16])).to(model.device)
        labels = batch.pop("labels")[:, 1:]  # (b, n)
        logits = model(**batch).logits[:, :-1].float().transpose(1, 2)  # (b, V, n)
        said, token = labels != -100, labels.clamp(min=0)
        codebook = codebooks[token]  # (b, n)
        in_turn = logits.masked_fill(codebooks[:, None] != codebook[:, None], -torch.inf)
        cost = [F.cross_entropy(scores, token, reduction="none") / math.log(2) for scores in (in_turn, logits)]
        code, end = said & (codebook >= 0), said & (codebook < 0)
        bits.append(torch.stack([(cost[0] * code).sum(1), (cost[1] * code).sum(1), (cost[1] * end).sum(1)], 1))
    return torch.cat(bits).double().cpu().numpy()


def count_static_bits(train: Iterable[Row], test: Iterable[Row], sizes: Sequence[int]) -> float:
    """Bits of the test clips' codes by how often each code of each codebook came in training, plus 1/2."""
    counts = [np.full(size, 0.5) for size in sizes]  # Q times (K,)
    for row in train:
        for count, codes in zip(counts, row["codes"], strict=True):
            np.add.at(count, codes, 1)
    cost = [-np.log2(count / count.sum()) for count in counts]
    return float(sum(bits[codes].sum() for row in test for bits, codes in zip(cost, row["codes"], strict=True)))


def measure_bits(
    model: GPT2LMHeadModel, scribe: Scribe, train: Sequence[Row], test: Sequence[Row], hop: int, name: str
) -> dict[str, float]:
    """Bits per frame of the test clips; frames are those that the code steps cover, S x hop."""
    frames = hop * sum(len(row["codes"][0]) for row in test)
    sizes = scribe.formatter.codebook_sizes
    in_turn, free, end = count_bits(model, scribe, [scribe.line(row) for row in test], name).sum(0)
    blind = [scribe.line(row | {"language": UNKNOWN, "letter": UNKNOWN}) for row in test]
    hidden = count_bits(model, scribe, blind, f"{name}, prompt hidden").sum(0)[0]
    return {
        "clips": len(test),
        "frames": frames,
        "fixed": sum(map(math.log2, sizes)) / hop,
        "static": count_static_bits(train, test, sizes) / frames,
        "model": in_turn / frames,
        "model_prompt_hidden": hidden / frames,
        "model_any_token": free / frames,
        "end_of_clip": end / frames,
    }


def recognise(
    model: GPT2LMHeadModel, scribe: Scribe, letters: Sequence[str], test: Sequence[Row], name: str
) -> dict[str, float]:
    """Which letter's prompt makes a clip cheapest? The language model as a reader of letters."""
    asked = [row for row in test if row["letter"] in letters]
    if not asked:
        return {"clips": 0, "letters": len(letters)}
    lines = [scribe.line(row | {"letter": letter}) for row in asked for letter in letters]
    bits = count_bits(model, scribe, lines, f"{name}, every letter")[:, 0].reshape(len(asked), len(letters))
    right = np.array([letters.index(row["letter"]) for row in asked], dtype=int)
    places = (bits < bits[np.arange(len(asked)), right][:, None]).sum(1)  # letters that are cheaper than the right one
    return {
        "clips": len(asked),
        "letters": len(letters),
        "right": float((places == 0).mean()),
        "among_first_five": float((places < 5).mean()),
    }


# ---- generation -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model: GPT2LMHeadModel, scribe: Scribe, rows: Sequence[Row], temperature: float) -> list[Generated]:
    """Samples a clip for each prompt; of the tokens, those may follow whose turn it is."""
    formatter = scribe.formatter
    prompts = torch.tensor([scribe.prompt(row) for row in rows], device=model.device)  # (M, 3): no padding
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=MAX_STEPS * formatter.num_codebooks + 1,
        prefix_allowed_tokens_fn=lambda _, said: formatter.next_ids(said),
        eos_token_id=scribe.tokenizer.eos_token_id,
        pad_token_id=scribe.tokenizer.pad_token_id,
    )
    generated = []
    for said in ids[:, prompts.shape[1] :].cpu().numpy():
        ended = bool((said == scribe.tokenizer.eos_token_id).any())
        # Who does not end is cut after a whole step.
        codes = formatter.ids_to_codes(said if ended else said[:-1], max(formatter.levels_per_group))
        generated.append(Generated(codes, ended))
    return generated


# ---- all of it ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens, training, bits, generation; returns the metrics."""
    start = time.perf_counter()
    codec, feature_extractor = load_pretrained(args.model)
    letters, folder = read_letters(find_input(args.index)), args.data / args.set
    read = partial(read_tokens, codec, feature_extractor, letters=letters, output=args.output)
    views = [read(folder / "train", view=view) for view in tqdm(range(args.views), desc="encode")]
    held_out = choose_held_out(views[0], args.held_out)
    train = [row for view in views for row in view if row["id"] not in held_out]
    tests = {
        "new letter of a known language": [row for id in held_out for row in views[0] if row["id"] == id],
        "new language": read(folder / "val"),
    }

    set_seed(args.seed)
    tokenizer = make_tokenizer(train)
    model = make_language_model(len(tokenizer), args.hidden_size, args.layers)
    # The line that a language model of yours needs: new tokens, new rows, and codes that mean alike begin alike.
    formatter = PoseCodeFormatter.from_config(codec.config).add_to(tokenizer, model, codec.quantizer.codebook.cpu())
    scribe, generator = Scribe(tokenizer, formatter), random.Random(args.seed)
    training_start = time.perf_counter()
    train_language_model(model, scribe, [scribe.line(hide(row, generator)) for row in train], args)
    training_seconds = time.perf_counter() - training_start

    bits, reading = {}, {}
    for name, rows in tests.items():
        bits[name] = measure_bits(model, scribe, train, rows, codec.config.hop_length, name)
        reading[name] = recognise(model, scribe, shared_letters(train), rows, name)
    prompts = next(iter(tests.values()))
    generated = generate(model, scribe, prompts, args.temperature)
    codes = [clip.codes for clip in generated]
    save_generated(codec, feature_extractor, prompts, codes, folder / "train", args.output)
    return {
        "bits_per_frame": bits,
        "reading": reading,
        "generated": {
            "clips": len(generated),
            "not_ended": sum(not clip.ended for clip in generated),
            "median_steps": float(np.median([clip.codes.shape[1] for clip in generated])),
            "median_steps_recorded": float(np.median([len(row["codes"][0]) for row in prompts])),
        },
        "train": {"clips": len(views[0]) - len(held_out), "views": args.views, "parameters": model.num_parameters()},
        "seconds": {"training": training_seconds, "all": time.perf_counter() - start},
    }


def print_metrics(metrics: dict[str, Any]) -> None:
    for name, bits in metrics["bits_per_frame"].items():
        print(f"\n{name}: {bits['clips']} clips, {bits['frames']} frames; bits per frame")
        for label, key in LINES.items():
            print(f"  {label:52s} {bits[key]:6.2f}")
        reading = metrics["reading"][name]
        if not reading["clips"]:
            continue  # letters of few languages only
        print(
            f"  its prompt is the likeliest of {reading['letters']} letters for {reading['right']:.0%}"
            f" of {reading['clips']} clips, among the first five for {reading['among_first_five']:.0%}"
        )
    print("\n{clips} clips generated: {not_ended} not ended".format(**metrics["generated"]))


def main() -> None:
    args = parse_arguments()
    try:
        metrics = run(args)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        (args.output / "metrics.json").write_text(
            json.dumps(metrics | {"settings": settings}, indent=2) + "\n", "utf-8"
        )
    except (ModelFolderError, PoseDataError, TokenFolderError, PoseFileError, OSError) as error:
        sys.exit(str(error))
    print_metrics(metrics)


if __name__ == "__main__":
    main()
