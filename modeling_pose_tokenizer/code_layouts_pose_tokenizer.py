"""The layouts of codes for language models: where each code stands, and how to find it again.

Letters: Q codebooks (or the first q of them, a prefix of the levels), S code steps, G token groups (parts), W tokens
of a step, n tokens.

A token is a place in the vocabulary: padding, begin, end, perhaps a mark for each part, then the codes of each
codebook. What may stand where is decided by its kind: the codebook of a code, a negative number for the others.
"""

from collections.abc import Sequence

import numpy as np

LAYOUTS = ("flat", "delayed", "parallel")
PAD, BEGIN, END, FIRST_MARK = range(4)  # places of the special tokens
FOREIGN = np.iinfo(np.int64).min  # the kind of what is no token of the vocabulary


class MisplacedToken(Exception):
    """What strict reading stops at: the token's index, column after column, and what was expected there."""

    def __init__(self, index: int, expected: str) -> None:
        super().__init__(index, expected)
        self.index = index
        self.expected = expected


class CodeLayout:
    """Lays codes (Q, S) out in streams of places, and reads them back.

    - `flat`: one stream (1, n): all codes of a step, then the next step. The codes of a step come level-major, as the
      rows of the codes, or with `part_marks` part by part: a part's mark, then its levels.
    - `parallel`: one stream per codebook (q, S): a column is a step.
    - `delayed`: one stream per codebook (q, S + q - 1), each a column later than the one before it (MusicGen, arXiv
      2306.05284), padding in the corners.

    Args:
        codebook_index: (group, level) of each of the Q codebooks, level-major.
        codebook_sizes: Codes of each of the Q codebooks.
        layout: One of `LAYOUTS`.
        part_marks: Write a mark before the codes of each part; `flat` only.

    Raises:
        ValueError: An unknown layout, or part marks in streams.
    """

    def __init__(
        self, codebook_index: Sequence[tuple[str, int]], codebook_sizes: Sequence[int], layout: str, part_marks: bool
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}.")
        if part_marks and layout != "flat":
            raise ValueError(f"part_marks is True with layout {layout!r}; expected layout 'flat'.")
        self.layout = layout
        self.part_marks = part_marks
        self.names = [f"{group} level {level}" for group, level in codebook_index]
        self.groups = list(dict.fromkeys(group for group, _ in codebook_index))
        self.part = np.array([self.groups.index(group) for group, _ in codebook_index])
        self.level = np.array([level for _, level in codebook_index])
        self.num_special = FIRST_MARK + len(self.groups) * part_marks
        # Place of code 0 of each codebook, and one more: the end.
        self.starts = self.num_special + np.concatenate([[0], np.cumsum(codebook_sizes)])
        # q for the first 1, 2, ... levels.
        self.prefixes = [int((self.level < level).sum()) for level in range(1, int(self.level.max()) + 2)]

    def count_codebooks(self, num_quantizers: int | None) -> int:
        """The codebooks of the first levels; of all levels when `None`.

        Raises:
            ValueError: A number of levels that there is not.
        """
        if num_quantizers is None:
            return self.prefixes[-1]
        if not 1 <= num_quantizers <= len(self.prefixes):
            raise ValueError(f"num_quantizers is {num_quantizers}; expected 1 to {len(self.prefixes)}.")
        return self.prefixes[num_quantizers - 1]

    # ---- writing and reading --------------------------------------------------------------------------------------

    def write(self, codes: np.ndarray, add_special_tokens: bool) -> np.ndarray:
        """(q, S) codes, known to be valid -> (1 or q, n) places; a column of begin and of end tokens on demand."""
        count, steps = codes.shape
        places = codes + self.starts[:count, None]
        if self.layout == "delayed":
            streams = np.full((count, steps + count - 1), PAD)
            streams[_delayed(count, steps)] = places
        elif self.layout == "parallel":
            streams = places
        else:
            slots = self._slots(count)[:, None]
            # A mark's negative kind picks any row here; `where` does not look at it.
            streams = np.where(slots >= 0, places[slots[:, 0]], slots + self.num_special).T.reshape(1, -1)
        if add_special_tokens:
            column = np.ones((len(streams), 1), dtype=np.int64)
            streams = np.hstack([BEGIN * column, streams, END * column])
        return streams

    def read(self, places: np.ndarray, num_streams: int | None, num_quantizers: int | None) -> np.ndarray:
        """The inverse of `write`.

        Args:
            places: (n,) the streams column after column; -1 where a token is foreign.
            num_streams: Rows that the streams had; None for text, which does not say.
            num_quantizers: Levels that they hold; None finds out.

        Returns:
            (q, S) codes.

        Raises:
            MisplacedToken: The first token that is not what should stand there.
        """
        kinds = self._kinds(places)
        if num_quantizers is not None:
            count = self.count_codebooks(num_quantizers)
        else:
            count = num_streams if num_streams and self.layout != "flat" else self._find_count(kinds)
        width = 1 if self.layout == "flat" else count  # tokens of a column
        first, last = self._trim(kinds, width)
        body = kinds[first:last]
        expected, steps, period = self._expect(body, count)
        wrong = np.flatnonzero(body != expected)
        if len(wrong):
            at = int(wrong[0])
            raise MisplacedToken(first + at, self._describe(expected[at], steps[at]))
        # A step that has begun is over when its last codebook has come, q columns later.
        cut = self.layout == "delayed" and len(body) < count * count and (body >= 0).any()
        if len(body) % period or cut:
            next_kind, next_step = (values[-1] for values in self._expect(np.append(body, FOREIGN), count)[:2])
            raise MisplacedToken(last, self._describe(next_kind, next_step))
        streams = places[first:last].reshape(-1, period).T  # (W, S), delayed (q, S + q - 1)
        if self.layout == "delayed":
            streams = streams[_delayed(count, max(streams.shape[1] - count + 1, 0))]
        else:
            slots = self._slots(count)
            streams = streams[np.argsort(slots)[len(slots) - count :]]  # marks have negative kinds
        return streams - self.starts[:count, None]

    def follow(self, index: int, num_quantizers: int | None) -> list[int]:
        """The places that may stand behind `index` tokens of a flat sequence that has begun."""
        slots = self._slots(self.count_codebooks(num_quantizers))
        turn = index % len(slots)
        kind = int(slots[turn])
        first, last = (self.starts[kind], self.starts[kind + 1]) if kind >= 0 else (kind + self.num_special,) * 2
        return [END] * (turn == 0) + list(range(int(first), int(last) + (kind < 0)))

    def _slots(self, count: int) -> np.ndarray:
        """(W,) kinds of the tokens of a step, of the first `count` codebooks."""
        rows = np.arange(count)
        if not self.part_marks:
            return rows
        parts = range(len(self.groups))
        return np.concatenate([[part - len(self.groups), *rows[self.part[:count] == part]] for part in parts])

    def _kinds(self, places: np.ndarray) -> np.ndarray:
        """(n,) places -> (n,) codebooks of codes; special tokens count up to -1."""
        rows = np.searchsorted(self.starts, places, side="right") - 1
        kinds = np.where(places < self.num_special, places - self.num_special, rows)
        return np.where(places < 0, FOREIGN, kinds)

    def _find_count(self, kinds: np.ndarray) -> int:
        """The codebooks that tokens (n,) of unknown levels hold."""
        if self.layout == "flat":
            # The first step ends where its first token comes again.
            first, last = self._trim(kinds, 1)
            step = kinds[first:last]
            again = np.flatnonzero(step[1:] == self._slots(self.prefixes[0])[0])
            length = int(again[0]) + 1 if len(again) else len(step)
            fitting = [count for count in self.prefixes if len(self._slots(count)) >= length > 0]
        else:
            rows = kinds[kinds >= 0]
            fitting = [count for count in self.prefixes if len(rows) and count > rows.max()]
        return fitting[0] if fitting else self.prefixes[-1]

    def _trim(self, kinds: np.ndarray, width: int) -> tuple[int, int]:
        """Where the codes begin and end: without columns of padding, then without one of begin and one of end.

        Raises:
            MisplacedToken: A column of begin or end that is not complete, or more than padding after the end.
        """
        pad, begin, end = np.array([PAD, BEGIN, END]) - self.num_special
        inside = np.flatnonzero(kinds != pad)
        if not len(inside):
            return 0, 0
        first = int(inside[0]) // width * width
        last = len(kinds) - (len(kinds) - 1 - int(inside[-1])) // width * width
        if kinds[first] == begin:
            first = self._pass_column(kinds, first, width, begin, "the begin of every stream")
        ends = np.flatnonzero(kinds == end)
        if len(ends):
            # In whole columns its first token may be another; in text with a token too few the columns are unknown.
            last = int(ends[0]) if len(kinds) % width else int(ends[0]) // width * width
            behind = inside[inside >= self._pass_column(kinds, last, width, end, "the end of every stream")]
            if len(behind):
                raise MisplacedToken(int(behind[0]), "nothing but padding after the end")
        return first, last

    def _pass_column(self, kinds: np.ndarray, index: int, width: int, kind: int, expected: str) -> int:
        """Returns where the column ends that begins at `index`, if all of it is of the kind."""
        column = kinds[index : index + width]
        unlike = np.flatnonzero(column != kind)
        if len(unlike) or len(column) < width:
            raise MisplacedToken(index + int(unlike[0] if len(unlike) else len(column)), expected)
        return index + width

    def _expect(self, body: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, int]:
        """What (n,) tokens should be: their kinds (n,), their code steps (n,), and how many make a column or step."""
        index = np.arange(len(body))
        if self.layout != "delayed":
            slots = self._slots(count)
            return slots[index % len(slots)], index // len(slots), len(slots)
        column, row = np.divmod(index, count)
        # Where any code is there must be a step, however few columns there are.
        num_steps = max(-(-len(body) // count) - count + 1, int((body >= 0).any()))
        steps = column - row
        inside = (steps >= 0) & (steps < num_steps)
        return np.where(inside, row, PAD - self.num_special), steps, count

    def _describe(self, kind: int, step: int) -> str:
        if kind >= 0:
            return f"a code of {self.names[kind]} (step {step})"
        place = kind + self.num_special
        if place == PAD:
            return "padding (a corner of the delay)"
        return f"the mark of {self.groups[place - FIRST_MARK]} (step {step})"

    # ---- repair ---------------------------------------------------------------------------------------------------

    def repair(self, places: np.ndarray, num_streams: int | None, num_quantizers: int | None) -> np.ndarray:
        """Reads what can be read, and never refuses; arguments as of `read`. See `PoseCodeFormatter`.

        Returns:
            (q, S) codes of as many levels as asked for, all by default; 0 where nothing valid was found.
        """
        count = self.count_codebooks(num_quantizers)
        kinds = self._kinds(places)
        codes = places - self.starts[np.clip(kinds, 0, None)]
        kinds[kinds >= count] = FOREIGN  # deeper levels than asked for
        if self.layout == "flat" or (self.layout == "parallel" and num_streams is None):
            return self._repair_steps(kinds[kinds >= 0], codes[kinds >= 0], count)
        if num_streams is None:
            return self._repair_streams(*self._find_streams(kinds, codes, count), count)
        shape = (-1, max(num_streams, 1))  # no streams: no tokens
        return self._repair_streams(kinds.reshape(shape).T, codes.reshape(shape).T, count)

    def _repair_steps(self, rows: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
        """(n,) codebooks and codes in the flat order -> (count, S) codes."""
        begun = np.flatnonzero(rows == 0)  # a step begins at its first codebook; nothing can be said before the first
        if not len(begun):
            return np.zeros((count, 0), dtype=np.int64)
        rows, codes, begun = rows[begun[0] :], codes[begun[0] :], begun - begun[0]
        before, after = rows[:-1], rows[1:]
        if self.part_marks:  # the next level of the part, or the first level of the next part
            deeper = (self.part[after] == self.part[before]) & (self.level[after] == self.level[before] + 1)
            in_order = deeper | ((self.part[after] == self.part[before] + 1) & (self.level[after] == 0))
        else:
            in_order = after == before + 1
        lengths = np.diff(begun, append=len(rows))
        faults = np.cumsum(np.concatenate([[True], in_order | (after == 0)]) == 0)
        valid = faults == np.repeat(faults[begun], lengths)
        # What would fill another step is one that lost its first codebook: the time that it takes is kept.
        width = next(prefix for prefix in self.prefixes if prefix > rows.max())
        num_steps = np.maximum((2 * lengths + width) // (2 * width), 1)
        steps = np.repeat(np.cumsum(num_steps) - num_steps, lengths)
        result = np.zeros((count, int(num_steps.sum())), dtype=np.int64)
        result[rows[valid], steps[valid]] = codes[valid]
        return result

    def _repair_streams(self, kinds: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
        """(rows, columns) kinds and codes -> (count, S) codes."""
        height, columns = min(len(kinds), count), kinds.shape[1]
        row = np.arange(height)[:, None]
        column = np.arange(columns) + row * (self.layout == "delayed")  # of each step's code
        there = column < columns
        column = np.minimum(column, columns - 1)
        own = there & (kinds[row, column] == row)
        if not own[:1].any():
            return np.zeros((count, 0), dtype=np.int64)
        # Time goes on between the first code of the first codebook and the last code of any.
        steps = slice(int(own[0].argmax()), int(np.flatnonzero(own.any(0))[-1]) + 1)
        valid = np.logical_and.accumulate(own, axis=0)
        found = np.where(valid, codes[row, column], 0)[:, steps]
        return np.pad(found, ((0, count - height), (0, 0)))

    def _find_streams(self, kinds: np.ndarray, codes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) kinds and codes of delayed text -> (count, columns): where its columns were.

        The codes of a column are neighbours, so that a new column begins after padding, or where the order falls back.
        """
        known = (kinds >= 0) | (kinds == PAD - self.num_special)
        index = np.flatnonzero(kinds[known] >= 0)
        rows, codes = kinds[known][index], codes[known][index]
        begins = (np.diff(rows) <= 0) | (np.diff(index) > 1)
        columns = np.concatenate([[0], np.cumsum(begins)])[: len(rows)]
        shape = (count, int(columns[-1]) + 1 if len(columns) else 0)
        found_kinds, found_codes = np.full(shape, FOREIGN), np.zeros(shape, dtype=np.int64)
        found_kinds[rows, columns], found_codes[rows, columns] = rows, codes
        return found_kinds, found_codes


def _delayed(count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each of (count, steps) codes in delayed streams."""
    row = np.arange(count)[:, None]
    return row, row + np.arange(steps)
