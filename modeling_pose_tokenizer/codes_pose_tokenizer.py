"""Codes <-> token ids <-> text: how a language model reads and writes poses.

Letters: Q codebooks (or the first q of them, a prefix of the levels), S code steps, K codes of a codebook, G token
groups (parts), d dimensions of a code, n tokens.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from transformers import AddedToken

from .code_embeddings_pose_tokenizer import Codebooks, check_codebooks, grow_embeddings
from .code_layouts_pose_tokenizer import BEGIN, END, PAD, CodeLayout, MisplacedToken

ABBREVIATIONS = {"body": "b", "face": "f", "left_hand": "lh", "right_hand": "rh", "whole": "w"}
# Unicode's private use areas, first and last character: they belong to no script.
PRIVATE_USE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))

Codes = np.ndarray | torch.Tensor


class PoseCodeFormatter:
    """Writes codes (Q, S) as ids or as text for a language model, and reads them back without loss.

    The first rows of the codes alone, a prefix of the levels, are written and read in the same way: the codebook of a
    token is known from the token itself.

    The layout says where a code stands:

    - `"flat"`, for a model that writes token after token: ids (Q * S,), all codebooks of a step, level-major as the
      rows of the codes, then the next step. With `part_marks` a step is written part by part: a part's mark, then its
      levels; ids ((Q + G) * S,).
    - `"parallel"`, for a model with a head per codebook: ids (Q, S), one stream per codebook.
    - `"delayed"`, the same with each stream a step later than the one before it (MusicGen, arXiv 2306.05284), so that
      the codes of a step are not drawn independently: ids (Q, S + Q - 1), padding in the corners.

    A token's id is `base_offset` plus its place in `vocabulary`, which starts with the special tokens and goes on with
    every code of every codebook: codebooks share no id in any layout. A code's text names its part, its level (from 0)
    and its number: `<lh1_0417>`. The text of streams has a line for each column, so that time runs down the page;
    white space means nothing in reading. With `compact` each token is a single private-use character instead.

    Generated tokens are imperfect. `errors="strict"` refuses what is missing, foreign or out of order, with its
    position and what was expected there. `errors="repair"` reads what it can and never refuses:

    - Foreign and special tokens are dropped, and so are levels beyond `num_quantizers`. The result has the rows of all
      levels asked for; where nothing was found it has code 0, "the prediction stands".
    - Each step keeps its longest valid prefix. A step begins at a code of the first codebook; what stands before the
      first such code is dropped. With part marks (which may be missing) a part may end before its last level, but none
      may be left out.
    - A step with nothing valid is code 0 throughout, so that what follows keeps its time: in streams every column
      between the first and the last code, in a flat sequence tokens out of order that would fill half a step or more.

    Args:
        group_names (`Sequence[str]`): The G token groups.
        levels_per_group (`Sequence[int]`): Residual levels of each group.
        codebook_size (`int` or `Sequence[int]`): Codes per codebook K, one for all or one for each of the Q.
        base_offset (`int`, *optional*, defaults to 0): Id of the first token of the vocabulary.
        layout (`str`, *optional*, defaults to `"flat"`): `"flat"`, `"delayed"` or `"parallel"`.
        part_marks (`bool`, *optional*, defaults to `False`): Write a mark, `<pose_lh>`, before each part's codes.
        compact (`bool`, *optional*, defaults to `False`): One private-use character for each token.

    Raises:
        ValueError: Groups, levels and sizes that do not fit each other, an unknown layout, part marks in streams, or a
            compact vocabulary larger than the private use areas.

    Example:

    ```python
    >>> formatter = PoseCodeFormatter(["body", "face"], [2, 1], codebook_size=1024)
    >>> formatter.codes_to_text([[5], [17], [1023]])
    '<b0_0005><f0_0017><b1_1023>'
    >>> formatter = PoseCodeFormatter(["body", "face"], [1, 1], codebook_size=1024, layout="delayed")
    >>> formatter.codes_to_ids([[5, 6], [7, 8]])
    array([[   8,    9,    0],
           [   0, 1034, 1035]])
    ```
    """

    def __init__(
        self,
        group_names: Sequence[str],
        levels_per_group: Sequence[int],
        codebook_size: int | Sequence[int],
        base_offset: int = 0,
        layout: str = "flat",
        part_marks: bool = False,
        compact: bool = False,
    ) -> None:
        self.group_names = tuple(group_names)
        self.levels_per_group = tuple(levels_per_group)
        self.base_offset = base_offset
        self.layout = layout
        self.part_marks = part_marks
        self.compact = compact
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
        self._layout = CodeLayout(self.codebook_index, sizes, layout, part_marks)
        room = sum(last - first + 1 for first, last in PRIVATE_USE)
        if compact and self.vocab_size > room:
            raise ValueError(
                f"compact is True with a vocabulary of {self.vocab_size} tokens; expected at most {room}, the"
                " characters of Unicode's private use areas."
            )

    @classmethod
    def from_config(
        cls,
        config: Any,
        base_offset: int = 0,
        layout: str = "flat",
        part_marks: bool = False,
        compact: bool = False,
    ) -> "PoseCodeFormatter":
        """Returns the formatter for the codes of a `PoseTokenizerConfig`."""
        sizes = config.codebook_size
        return cls(config.group_names, config.levels_per_group, sizes, base_offset, layout, part_marks, compact)

    # ---- vocabulary ---------------------------------------------------------------------------------------------

    @property
    def num_codebooks(self) -> int:
        """Q, the codes of one code step."""
        return len(self.codebook_index)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Padding, begin and end of a pose sequence; then the mark of each part, where there are part marks."""
        return self.vocabulary[: self._layout.num_special]

    @property
    def pad_token(self) -> str:
        return self.vocabulary[PAD]

    @property
    def begin_token(self) -> str:
        return self.vocabulary[BEGIN]

    @property
    def end_token(self) -> str:
        return self.vocabulary[END]

    @property
    def pad_token_id(self) -> int:
        return self.base_offset + PAD

    @property
    def begin_token_id(self) -> int:
        return self.base_offset + BEGIN

    @property
    def end_token_id(self) -> int:
        return self.base_offset + END

    @property
    def vocab_size(self) -> int:
        """Number of tokens: special tokens and codes."""
        return int(self._layout.starts[-1])

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token's text in the order of ids: special tokens, then the codes of each codebook."""
        if not self.compact:
            return self._names
        characters = (chr(code) for first, last in PRIVATE_USE for code in range(first, last + 1))
        return tuple(islice(characters, self.vocab_size))

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Every token's readable text."""
        short = _abbreviate(self.group_names)
        digits = max(4, len(str(max(self.codebook_sizes) - 1)))
        marks = [f"<pose_{short[group]}>" for group in self.group_names] if self.part_marks else []
        codes = (
            f"<{short[group]}{level}_{code:0{digits}d}>"
            for (group, level), size in zip(self.codebook_index, self.codebook_sizes, strict=True)
            for code in range(size)
        )
        return ("<pose_pad>", "<pose>", "</pose>", *marks, *codes)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {token: place for place, token in enumerate(self.vocabulary)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Finds what is one token, or one word that is none."""
        return re.compile(r"\S" if self.compact else r"<[^<>\s]*>|\S[^<\s]*")

    # ---- codes <-> ids --------------------------------------------------------------------------------------------

    def codes_to_ids(self, codes: Codes | Sequence[Sequence[int]], add_special_tokens: bool = False) -> Codes:
        """Writes codes as ids.

        Args:
            codes: (Q, S) integers, or the first rows of them: a prefix of the levels.
            add_special_tokens: Put the begin token in front and the end token behind; of streams, a column of each.

        Returns:
            int64 ids in the shape of the layout (see the class); a tensor on the same device if `codes` is one.

        Raises:
            ValueError: A shape, dtype or code that the codebooks do not have; the message names the place.
        """
        streams = self._codes_to_streams(codes, add_special_tokens)
        return _like((streams[0] if self.layout == "flat" else streams) + self.base_offset, codes)

    def ids_to_codes(
        self, ids: Codes | Sequence[Any], num_quantizers: int | None = None, errors: str = "strict"
    ) -> Codes:
        """Reads ids back; inverse of `codes_to_ids`.

        Args:
            ids: Integers in the shape of the layout, with or without begin and end, padding at either side.
            num_quantizers: Levels that the ids hold; None finds out.
            errors: `"strict"` or `"repair"` (see the class).

        Returns:
            (Q, S) int64 codes, or as many rows as the ids have levels; a tensor on the same device if `ids` is one.

        Raises:
            ValueError: An id that is missing, foreign or out of order; the message names its position and what was
                expected. Under `"repair"` only for a wrong number of dimensions.
        """
        array = _as_numpy(ids, "ids")
        flat = self.layout == "flat"
        if array.ndim != (1 if flat else 2):
            wanted = "one dimension" if flat else "(Q, n), a stream for each codebook"
            raise ValueError(f"ids have shape {array.shape}; expected {wanted}.")
        num_streams = 1 if flat else len(array)
        asked = self._layout.count_codebooks(num_quantizers)
        counts = self._layout.prefixes if num_quantizers is None else [asked]
        if errors == "strict" and not flat and num_streams not in counts:
            raise ValueError(f"ids have shape {array.shape}; expected (Q, n) with Q = {_either(counts)}.")
        places = array.T.reshape(-1) - self.base_offset
        places[(places < 0) | (places >= self.vocab_size)] = -1

        def where(index: int) -> str:
            column, row = divmod(index, num_streams)
            return f"position {index}" if flat else f"row {row}, position {column}"

        def foreign(index: int) -> str:
            last = self.base_offset + self.vocab_size - 1
            return f"id {array.T.flat[index]}, which is no pose token (ids {self.base_offset} to {last})"

        return _like(self._read(places, num_streams, num_quantizers, errors, where, foreign), ids)

    def next_ids(self, ids: Codes | Sequence[int], num_quantizers: int | None = None) -> list[int]:
        """What may follow in a sequence that a language model is writing, layout `flat`.

        `model.generate(..., prefix_allowed_tokens_fn=lambda _, ids: formatter.next_ids(ids))` then writes nothing that
        would have to be repaired.

        Args:
            ids: (n,) prompt and what was written so far; what follows the last begin token counts, and is taken to be
                in order.
            num_quantizers: Levels to write; all by default.

        Returns:
            The ids of the codebook or the part mark whose turn it is, and the end where a step is complete; padding
            behind the end.

        Raises:
            ValueError: Another layout, ids without a begin token, or a number of levels that there is not.
        """
        if self.layout != "flat":
            raise ValueError(f"layout is {self.layout!r}; expected 'flat', whose tokens follow each other.")
        array = _as_numpy(ids, "ids") - self.base_offset
        begun = np.flatnonzero(array == BEGIN)
        if not len(begun):
            raise ValueError(f"ids hold no begin token ({self.begin_token}); expected a prompt that ends with it.")
        said = array[begun[-1] + 1 :]
        if (said == END).any():
            return [self.pad_token_id]
        return [self.base_offset + place for place in self._layout.follow(len(said), num_quantizers)]

    # ---- codes <-> text -------------------------------------------------------------------------------------------

    def codes_to_text(self, codes: Codes | Sequence[Sequence[int]], add_special_tokens: bool = False) -> str:
        """Writes codes as text, one token per code; arguments as in `codes_to_ids`."""
        streams = self._codes_to_streams(codes, add_special_tokens)
        lines = streams if self.layout == "flat" else streams.T
        return "\n".join("".join(map(self.vocabulary.__getitem__, line)) for line in lines.tolist())

    def text_to_codes(self, text: str, num_quantizers: int | None = None, errors: str = "strict") -> np.ndarray:
        """Reads text back; inverse of `codes_to_text`. White space between tokens means nothing.

        Args:
            text: Tokens, with or without begin and end, padding at either side.
            num_quantizers: Levels that the text holds; None finds out.
            errors: `"strict"` or `"repair"` (see the class).

        Returns:
            (Q, S) int64 codes, or as many rows as the text has levels.

        Raises:
            ValueError: A token that is missing, foreign or out of order; the message names its position, its character
                and what was expected. Under `"repair"` never for a text.
        """
        tokens = self._pattern.findall(text)
        places = np.fromiter(map(self._places.get, tokens, repeat(-1)), np.int64, len(tokens))

        def where(index: int) -> str:
            match = next(islice(self._pattern.finditer(text), index, None), None)
            return f"position {index} (character {match.start() if match else len(text)})"

        def foreign(index: int) -> str:
            token = tokens[index] if len(tokens[index]) <= 40 else tokens[index][:40] + "..."
            return f"{token!r}, which is no pose token such as {self.vocabulary[-1]!r}"

        return self._read(places, None, num_quantizers, errors, where, foreign)

    # ---- what both share ------------------------------------------------------------------------------------------

    def _codes_to_streams(self, codes: Codes | Sequence[Sequence[int]], add_special_tokens: bool) -> np.ndarray:
        """(Q, S) codes -> (streams, n) places in the vocabulary."""
        array, counts = _as_numpy(codes, "codes"), self._layout.prefixes
        if array.ndim != 2 or len(array) not in counts:
            *shorter, full = counts
            hint = f", or {', '.join(map(str, shorter))} for the first levels" if shorter else ""
            raise ValueError(f"codes have shape {array.shape}; expected (Q, S) with Q = {full}{hint}.")
        sizes = np.array(self.codebook_sizes)[: len(array), None]
        wrong = np.argwhere((array < 0) | (array >= sizes))
        if len(wrong):
            row, step = wrong[0]
            raise ValueError(
                f"codes[{row}, {step}] is {array[row, step]}; expected 0 to {sizes[row, 0] - 1}"
                f" ({self._layout.names[row]}, step {step})."
            )
        return self._layout.write(array, add_special_tokens)

    def _read(
        self,
        places: np.ndarray,
        num_streams: int | None,
        num_quantizers: int | None,
        errors: str,
        where: Callable[[int], str],
        foreign: Callable[[int], str],
    ) -> np.ndarray:
        """(n,) places, column after column, -1 for foreign ones -> (Q, S) codes; the others say what an index is."""
        if errors not in ("strict", "repair"):
            raise ValueError(f"errors is {errors!r}; expected 'strict' or 'repair'.")
        if errors == "repair":
            return self._layout.repair(places, num_streams, num_quantizers)
        try:
            return self._layout.read(places, num_streams, num_quantizers)
        except MisplacedToken as error:
            index, expected = error.index, error.expected
        if index == len(places):
            found = "the tokens end"
        elif places[index] < 0:
            found = f"found {foreign(index)}"
        else:
            found = f"found {self._names[places[index]]}"
        raise ValueError(f"{where(index)}: {found}; expected {expected}.")

    # ---- language models ------------------------------------------------------------------------------------------

    def add_to(self, tokenizer: Any, model: Any = None, codebooks: Codebooks | None = None) -> "PoseCodeFormatter":
        """Adds the vocabulary to a `transformers` tokenizer, and rows for it to a model's embeddings.

        With codebooks, codes that mean alike begin alike: the rows of codes are a fixed random projection of their
        vectors, with the mean and standard deviation of the rows that the model has; see `project_codebooks`. Special
        tokens begin as that mean. Decode with `skip_special_tokens=False` where padding (`"delayed"`) or part marks
        are to be read back.

        Args:
            tokenizer: Any tokenizer of `transformers`. A vocabulary that it has already stays as it is.
            model: A `transformers` model whose embeddings grow with the tokenizer (they never shrink).
            codebooks: (Q, K, d), or Q times (K, d): `pose_model.quantizer.codebook`, or for FSQ what `quantizer.read`
                makes of every code.

        Returns:
            The formatter whose ids are the tokenizer's, with the options of this one.

        Raises:
            ValueError: The tokenizer holds a part of the vocabulary already, codebooks do not fit, or the model has
                rows that they would undo; nothing has been changed.
        """
        if codebooks is not None:
            check_codebooks(codebooks, self.codebook_sizes)
            if model is None:
                raise ValueError("codebooks are given without a model; expected the model whose rows begin from them.")
        known = tokenizer.get_vocab()
        present = [token for token in self.vocabulary if token in known]
        if not present:
            # normalized=False: a tokenizer that lower-cases its text must still find the tokens in it.
            codes = self.vocabulary[self._layout.num_special :]
            tokenizer.add_tokens(list(self.special_tokens), special_tokens=True)
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in codes])
            known = tokenizer.get_vocab()
        base_offset = known.get(self.vocabulary[0], 0)
        if any(known.get(token) != base_offset + place for place, token in enumerate(self.vocabulary)):
            raise ValueError(
                f"the tokenizer holds pose tokens of another configuration, such as {present[-1]};"
                " expected none, or all of this configuration in order."
            )
        if model is not None:
            num_tokens = max(len(tokenizer), base_offset + self.vocab_size)
            num_special = self._layout.num_special
            grow_embeddings(model, num_tokens, base_offset, num_special, codebooks, new=not present)
        options = (self.layout, self.part_marks, self.compact)
        return PoseCodeFormatter(self.group_names, self.levels_per_group, self.codebook_sizes, base_offset, *options)


def _abbreviate(group_names: Sequence[str]) -> dict[str, str]:
    """A short name for each group, of letters only: digits behind it are the level."""
    short: dict[str, str] = {}
    taken = {"pad"}  # <pose_pad> is no part's mark
    for group in group_names:
        words = re.findall(r"[a-z]+", group.lower())
        letters = "".join(words)
        initials = ABBREVIATIONS.get(group, "".join(word[0] for word in words))
        for candidate in (initials, letters):
            if candidate and candidate not in taken:
                break
        else:  # "arm1" and "arm2": the digits as letters, and more letters until it is unique
            candidate = letters + "".join("abcdefghij"[int(digit)] for digit in re.findall(r"[0-9]", group))
            while not candidate or candidate in taken:
                candidate += "x"
        short[group] = candidate
        taken.add(candidate)
    return short


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


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
