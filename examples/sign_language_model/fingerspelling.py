"""Clips of fingerspelled letters as tokens, with their labels.

Letters: Q codebooks, S code steps.
"""

import csv
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerModel
from modeling_pose_tokenizer.augmentation import PoseAugmentation
from modeling_pose_tokenizer.dataset import PoseDataset
from modeling_pose_tokenizer.extraction import extract_tokens
from modeling_pose_tokenizer.formats import PoseDataError

SHARED = 5  # a letter is held out in a language only if more than so many languages show it

# A clip: a row of a token table (id, codes (Q, S) as lists, text, center, scale ...), and its language and letter.
Row = dict[str, Any]


def recording_of(name: str) -> tuple[str, str]:
    """Language and recording: `asq_fs-sts03c0d56a4400b9c1` and `asq_03c0d56a4400` -> ("asq", "03c0d56a4400")."""
    language, _, recording = name.partition("_")
    return language, recording.removeprefix("fs-sts")[:12]


def read_letters(index: Path) -> dict[tuple[str, str], str]:
    """Recording -> letter. Languages write a letter in different cases and encodings; here it is one."""
    with open(index, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"path", "words"} <= rows[0].keys():
        raise PoseDataError(f"{index} has no columns path and words; expected the index of the recordings.")
    names = (row["path"].removesuffix(".pose").replace("/", "_") for row in rows)
    letters = (unicodedata.normalize("NFC", row["words"].lower()) for row in rows)
    return dict(zip(map(recording_of, names), letters, strict=True))


def read_tokens(
    codec: PoseTokenizerModel,
    feature_extractor: PoseFeatureExtractor,
    split: Path,
    output: Path,
    letters: dict[tuple[str, str], str],
    view: int = 0,
) -> list[Row]:
    """Encodes a split, or reads what an earlier run has encoded, and labels it; clips without a label are left out.

    A few hundred clips are little. From view 1 on they are turned, scaled and shifted a little, as by another camera.
    """
    augmentation = PoseAugmentation(codec.config.layout, flip=0, missing=0, speed=0) if view else None
    dataset = PoseDataset(
        split.parent, split.name, feature_extractor=feature_extractor, augmentation=augmentation, seed=view
    )
    folder = output / "tokens" / f"view-{view:03d}"
    manifest = extract_tokens(codec, dataset, folder, progress=False)
    rows = []
    for shard in manifest["splits"][split.name]["shards"]:
        for row in pq.read_table(folder / shard).to_pylist():
            language, recording = recording_of(row["id"])
            if (language, recording) in letters:
                rows.append(row | {"language": language, "letter": letters[language, recording]})
    if not rows:
        raise PoseDataError(f"{split} has no recording of --index; expected names such as asq_03c0d56a4400.npz.")
    return rows


def shared_letters(rows: Iterable[Row]) -> list[str]:
    """Letters that more than SHARED languages show."""
    languages = Counter(letter for _, letter in {(row["language"], row["letter"]) for row in rows})
    return sorted(letter for letter, count in languages.items() if count > SHARED)


def choose_held_out(rows: Sequence[Row], count: int) -> list[str]:
    """Ids of clips to test on, of letters that other languages show too. They do not depend on the seed."""
    shared = shared_letters(rows)
    candidates = sorted(row["id"] for row in rows if row["letter"] in shared)
    if not 0 < count <= len(candidates):
        raise PoseDataError(
            f"--held-out is {count}; expected 1 to {len(candidates)}, clips of letters of many languages."
        )
    return random.Random(0).sample(candidates, count)
