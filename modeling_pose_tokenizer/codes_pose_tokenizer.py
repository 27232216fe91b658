"""Codes <-> token ids <-> text: how a language model reads and writes poses.

Letters: Q codebooks, S code steps, K codes of a codebook, G token groups.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AddedToken

ABBREVIATIONS = {"body": "b", "face": "f", "left_hand": "lh", "right_hand": "rh", "whole": "w"}

Codes = np.ndarray | torch.Tensor


class PoseCodeFormatter:
    """Writes codes (Q, S) as a flat sequence of ids or as text, and reads them back without loss.

    The order is flat: all codebooks of a step (level-major, as the rows of the codes), then the next step. The first
    rows alone, a prefix of the levels, are written and read in the same way: the codebook of a token is known from
    the token itself.

    A token's id is `base_offset` plus its place in `vocabulary`, which starts with the special tokens and goes on with
    every code of every codebook. A code's text names its group, its level (from 0) and its number: `<lh1_0417>`.

    Args:
        group_names (`Sequence[str]`): The G token groups.
        levels_per_group (`Sequence[int]`): Residual levels of each group.
        codebook_size (`int` or `Sequence[int]`): Codes per codebook K, one for all or one for each of the Q.
        base_offset (`int`, *optional*, defaults to 0): Id of the first token of the vocabulary.

    Example:

    ```python
    >>> formatter = PoseCodeFormatter(["body", "face"], [2, 1], codebook_size=1024)
    >>> formatter.codes_to_text([[5], [17], [1023]])
    '<b0_0005><f0_0017><b1_1023>'
    ```
    """

    pad_token, begin_token, end_token = "<pose_pad>", "<pose>", "</pose>"

    def __init__(
        self,
        group_names: Sequence[str],
        levels_per_group: Sequence[int],
        codebook_size: int | Sequence[int],
        base_offset: int = 0,
    ) -> None:
        self.group_names = tuple(group_names)
        self.levels_per_group = tuple(levels_per_group)
        self.base_offset = base_offset
        if not self.group_names or len(set(self.group_names)) < len(self.group_names):
            raise ValueError(f"group_names is {list(group_names)}; expected at least one name, each once.")
        if len(self.levels_per_group) != len(self.group_names) or min(self.levels_per_group) < 1:
            raise ValueError(
                f"levels_per_group is {list(levels_per_group)}; expected a level or more for each of"
                f" {len(self.group_names)} groups."
            )
        # Level-major, as PoseTokenizerConfig.codebook_index: the first rows are a prefix of the levels.
        self.codebook_index = tuple(
            (group, level)
            for level in range(max(self.levels_per_group))
            for group, levels in zip(self.group_names, self.levels_per_group, strict=True)
            if level < levels
        )
        num_codebooks = len(self.codebook_index)
        sizes = (
            [codebook_size] * num_codebooks if isinstance(codebook_size, (int, np.integer)) else list(codebook_size)
        )
        if len(sizes) != num_codebooks or min(sizes) < 1:
            raise ValueError(f"codebook_size is {codebook_size}; expected one or {num_codebooks} sizes of at least 1.")
        self.codebook_sizes = tuple(sizes)
        # Place in the vocabulary of code 0 of each codebook, and one more: the end.
        self._starts = len(self.special_tokens) + np.concatenate([[0], np.cumsum(sizes)])

    @classmethod
    def from_config(cls, config: Any, base_offset: int = 0) -> "PoseCodeFormatter":
        """Returns the formatter for the codes of a `PoseTokenizerConfig`."""
        return cls(config.group_names, config.levels_per_group, config.codebook_size, base_offset)

    # ---- vocabulary ---------------------------------------------------------------------------------------------

    @property
    def num_codebooks(self) -> int:
        """Q, the tokens of one code step."""
        return len(self.codebook_index)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Padding, begin and end of a pose sequence."""
        return (self.pad_token, self.begin_token, self.end_token)

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token's text in the order of ids: special tokens, then the codes of each codebook."""
        short = _abbreviate(self.group_names)
        digits = max(4, len(str(max(self.codebook_sizes) - 1)))
        codes = (
            f"<{short[group]}{level}_{code:0{digits}d}>"
            for (group, level), size in zip(self.codebook_index, self.codebook_sizes, strict=True)
            for code in range(size)
        )
        return (*self.special_tokens, *codes)

    @property
    def vocab_size(self) -> int:
        """Number of tokens: special tokens and codes."""
        return int(self._starts[-1])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {token: place for place, token in enumerate(self.vocabulary)}

    # ---- codes <-> ids --------------------------------------------------------------------------------------------

    def codes_to_ids(self, codes: Codes | Sequence[Sequence[int]], add_special_tokens: bool = False) -> Codes:
        """Writes codes as ids.

        Args:
            codes: (Q, S) integers, or the first rows of them: a prefix of the levels.
            add_special_tokens: Put the begin token in front and the end token behind.

        Returns:
            (Q * S,) int64 ids, two more with special tokens; a tensor on the same device if `codes` is one.

        Raises:
            ValueError: A shape, dtype or code that the codebooks do not have; the message names the place.
        """
        places = self._codes_to_places(_as_numpy(codes, "codes"))
        if add_special_tokens:
            ends = (self.special_tokens.index(token) for token in (self.begin_token, self.end_token))
            places = np.insert(places, [0, len(places)], list(ends))
        return _like(places + self.base_offset, codes)

    def ids_to_codes(self, ids: Codes | Sequence[int], num_quantizers: int | None = None) -> Codes:
        """Reads ids back; inverse of `codes_to_ids`.

        Args:
            ids: (n,) integers, with or without begin and end token, padding at either side.
            num_quantizers: Levels that the ids hold; None finds out.

        Returns:
            (Q, S) int64 codes, or as many rows as the ids have levels; a tensor on the same device if `ids` is one.

        Raises:
            ValueError: An id that is foreign or out of order; the message names its position and what was expected.
        """
        array = _as_numpy(ids, "ids")
        if array.ndim != 1:
            raise ValueError(f"ids have shape {array.shape}; expected one dimension.")
        places = array - self.base_offset
        foreign = np.flatnonzero((places < 0) | (places >= self.vocab_size))
        if len(foreign):
            raise ValueError(
                f"position {foreign[0]}: id {array[foreign[0]]} is no pose token; expected ids from"
                f" {self.base_offset} to {self.base_offset + self.vocab_size - 1}."
            )
        return _like(self._places_to_codes(places, num_quantizers), ids)

    # ---- codes <-> text -------------------------------------------------------------------------------------------

    def codes_to_text(self, codes: Codes | Sequence[Sequence[int]], add_special_tokens: bool = False) -> str:
        """Writes codes as text, one readable token per code; arguments as in `codes_to_ids`."""
        ids = _as_numpy(self.codes_to_ids(codes, add_special_tokens), "ids")
        return "".join(self.vocabulary[place] for place in ids - self.base_offset)

    def text_to_codes(self, text: str, num_quantizers: int | None = None) -> np.ndarray:
        """Reads text back; inverse of `codes_to_text`. White space between tokens is fine.

        Args:
            text: Tokens, with or without begin and end token.
            num_quantizers: Levels that the text holds; None finds out.

        Returns:
            (Q, S) int64 codes, or as many rows as the text has levels.

        Raises:
            ValueError: Text that is no token (its character is named) or a token out of order (its position is).
        """
        places: list[int] = []
        for match in re.finditer(r"<[^<>\s]*>|\S[^<\s]*", text):
            place = self._places.get(match[0])
            if place is None:
                raise ValueError(
                    f"position {len(places)} (character {match.start()}): {match[0]!r} is no pose token;"
                    f" expected one like {self.vocabulary[-1]!r}."
                )
            places.append(place)
        return self._places_to_codes(np.array(places, dtype=np.int64), num_quantizers)

    # ---- the flat order -------------------------------------------------------------------------------------------

    def _codes_to_places(self, codes: np.ndarray) -> np.ndarray:
        """(Q, S) codes -> (Q * S,) places in the vocabulary."""
        prefixes = self._prefixes()
        if codes.ndim != 2 or len(codes) not in prefixes:
            *shorter, full = prefixes
            hint = f", or {', '.join(map(str, shorter))} for the first levels" if shorter else ""
            raise ValueError(f"codes have shape {codes.shape}; expected (Q, S) with Q = {full}{hint}.")
        sizes = np.array(self.codebook_sizes)[: len(codes), None]
        wrong = np.argwhere((codes < 0) | (codes >= sizes))
        if len(wrong):
            row, step = wrong[0]
            raise ValueError(
                f"codes[{row}, {step}] is {codes[row, step]}; expected 0 to {sizes[row, 0] - 1}"
                f" ({self._name(row)}, step {step})."
            )
        return (codes + self._starts[: len(codes), None]).T.reshape(-1)

    def _places_to_codes(self, places: np.ndarray, num_quantizers: int | None) -> np.ndarray:
        """(n,) places in the vocabulary -> (Q, S) codes; the ends may hold special tokens."""
        first, last = self._strip(places)
        body = places[first:last]
        rows = np.searchsorted(self._starts, body, side="right") - 1  # codebook of each token, -1: special
        prefixes = self._prefixes()
        if num_quantizers is None:
            # The first step ends where its first codebook comes again.
            again = np.flatnonzero(rows[1:] == 0)
            width = int(again[0]) + 1 if len(again) else len(rows) or self.num_codebooks
            width = min((p for p in prefixes if p >= width), default=self.num_codebooks)
        elif 1 <= num_quantizers <= len(prefixes):
            width = prefixes[num_quantizers - 1]
        else:
            raise ValueError(f"num_quantizers is {num_quantizers}; expected 1 to {len(prefixes)}.")
        expected = np.arange(len(body)) % width
        wrong = np.flatnonzero(rows != expected)
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"position {first + at}: found {self.vocabulary[body[at]]}; expected a code of"
                f" {self._name(expected[at])} (step {at // width})."
            )
        if len(body) % width:
            raise ValueError(
                f"position {last}: the tokens end within step {len(body) // width}; expected a code of"
                f" {self._name(len(body) % width)}."
            )
        return (body - self._starts[expected]).reshape(-1, width).T.copy()

    def _strip(self, places: np.ndarray) -> tuple[int, int]:
        """Where the codes begin and end: without padding, then without one begin and one end token."""
        pad, begin, end = range(len(self.special_tokens))
        inside = np.flatnonzero(places != pad)
        if not len(inside):
            return 0, 0
        first, last = int(inside[0]), int(inside[-1]) + 1
        first += int(places[first] == begin)
        last -= int(last > first and places[last - 1] == end)
        return first, last

    def _prefixes(self) -> list[int]:
        """Codebooks of the first 1, 2, ... levels."""
        levels = range(1, max(self.levels_per_group) + 1)
        return [sum(min(level, own) for own in self.levels_per_group) for level in levels]

    def _name(self, row: int) -> str:
        group, level = self.codebook_index[row]
        return f"{group} level {level}"

    # ---- language models ------------------------------------------------------------------------------------------

    def add_to(self, tokenizer: Any, model: Any = None) -> "PoseCodeFormatter":
        """Adds the vocabulary to a `transformers` tokenizer, and rows for it to a model's embeddings.

        Args:
            tokenizer: Any tokenizer of `transformers`. A vocabulary that it has already stays as it is.
            model: A `transformers` model whose embeddings grow with the tokenizer (they never shrink).

        Returns:
            The formatter whose ids are the tokenizer's.

        Raises:
            ValueError: The tokenizer holds a part of the vocabulary already; nothing has been changed.
        """
        known = tokenizer.get_vocab()
        present = [token for token in self.vocabulary if token in known]
        if not present:
            # normalized=False: a tokenizer that lower-cases its text must still find the tokens in it.
            codes = self.vocabulary[len(self.special_tokens) :]
            tokenizer.add_tokens(list(self.special_tokens), special_tokens=True)
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in codes])
            known = tokenizer.get_vocab()
        base_offset = known.get(self.vocabulary[0], 0)
        if any(known.get(token) != base_offset + place for place, token in enumerate(self.vocabulary)):
            raise ValueError(
                f"the tokenizer holds pose tokens of another configuration, such as {present[-1]};"
                " expected none, or all of this configuration in order."
            )
        if model is not None and model.get_input_embeddings().num_embeddings < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer))
        return PoseCodeFormatter(self.group_names, self.levels_per_group, self.codebook_sizes, base_offset)


def _abbreviate(group_names: Sequence[str]) -> dict[str, str]:
    """A short name for each group, of letters only: digits behind it are the level."""
    short: dict[str, str] = {}
    for group in group_names:
        words = re.findall(r"[a-z]+", group.lower())
        letters = "".join(words)
        initials = ABBREVIATIONS.get(group, "".join(word[0] for word in words))
        for candidate in (initials, letters):
            if candidate and candidate not in short.values():
                break
        else:  # "arm1" and "arm2": the digits as letters, and more letters until it is unique
            candidate = letters + "".join("abcdefghij"[int(digit)] for digit in re.findall(r"[0-9]", group))
            while not candidate or candidate in short.values():
                candidate += "x"
        short[group] = candidate
    return short


def _as_numpy(values: Any, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)  # an empty list has no dtype of its own
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} have dtype {array.dtype}; expected integers.")
    return array.astype(np.int64)


def _like(values: np.ndarray, reference: Any) -> Codes:
    return torch.from_numpy(values).to(reference.device) if isinstance(reference, torch.Tensor) else values


__all__ = ["PoseCodeFormatter"]
