"""Tokens back to pose files: Parquet shards of `extraction.py`, or lines of text such as a language model writes.

Letters: B batch, T frames, N keypoints, D values per keypoint, Q codebooks, S code steps.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .codes_pose_tokenizer import PoseCodeFormatter
from .extraction import (
    METADATA_KEY,
    SHARD_NAME,
    TokenFolderError,
    batch_limits,
    hash_weights,
    plan_batches,
    process_state,
    refusing,
    run_exactly,
)
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import LIMITS, FilePath, PoseFileError, PoseSequence, write_npz, write_pose
from .modeling_pose_tokenizer import PoseTokenizerModel
from .parquet_pages import unpacked_bytes
from .sequences import MAX_FPS, MIN_FPS, first_line, one_line

FORMATS = ("npz", "pose")
_COLUMNS = ("id", "codes", "num_frames", "fps", "center", "scale")
_ROWS_IN_MEMORY = 1024  # sequences that are read at a time


@dataclass(frozen=True)
class Canvas:
    """A picture that a person is put into, y pointing down.

    By default the shoulders are a fifth of the shorter side apart and their midpoint lies in the middle, two fifths
    from the top: a person of usual proportions, whose arms span about five shoulder widths, then fits with
    arms outstretched or raised, down to the knees.

    Args:
        width, height: In pixels.
        shoulder_width: Distance of the shoulders, in pixels.
        center: Where their midpoint lies, x and y in pixels.

    Raises:
        ValueError: A size that is not above 0.
    """

    width: int
    height: int
    shoulder_width: float | None = None
    center: Sequence[float] | None = None

    def __post_init__(self) -> None:
        sizes = (self.width, self.height, 1 if self.shoulder_width is None else self.shoulder_width)
        if not all(0 < size < math.inf for size in sizes):
            raise ValueError(f"{self} has a size that is not above 0; expected numbers of pixels.")

    def place(self, num_axes: int) -> tuple[np.ndarray, float]:
        """Center (num_axes,) and scale that bring normalised poses to the canvas; a third axis starts at 0."""
        center = np.zeros(num_axes, np.float32)
        center[:2] = (0.5 * self.width, 0.4 * self.height) if self.center is None else self.center
        return center, self.shoulder_width or min(self.width, self.height) / 5


# Where text is put that brings no place of its own.
TEXT_CANVAS = Canvas(512, 512)


@dataclass(frozen=True)
class TokenRow:
    """A sequence to decode.

    Attributes:
        id: Its name.
        codes: (Q, S), of all levels or of the first.
        length: T, its frames at the model's frame rate.
        num_frames: Frames of the decoded sequence.
        fps: Frame rate of the decoded sequence.
        center: (D - 1,) where its origin lies.
        scale: Its unit of length.
    """

    id: str
    codes: np.ndarray
    length: int
    num_frames: int
    fps: float
    center: np.ndarray
    scale: float


def decode_tokens(
    model: PoseTokenizerModel,
    feature_extractor: PoseFeatureExtractor,
    tokens: FilePath,
    output_dir: FilePath,
    *,
    split: str | None = None,
    format: str = "npz",
    canvas: Canvas | None = None,
    fps: float | None = None,
    repair: bool = False,
    batch_frames: int | None = None,
    progress: bool = True,
) -> int:
    """Decodes tokens to one `{id}.npz` or `{id}.pose` per sequence.

    Rows of shards come back in the coordinates, frame rate and length of their input. Lines of text have none of
    these: they come as `{file}-{line number}` at the model's frame rate, on a canvas of 512 x 512. The shards, or
    lines, are dealt out to the processes of `accelerate launch`.

    Args:
        model: The tokenizer that made the tokens.
        feature_extractor: Its feature extractor.
        tokens: A shard `.parquet`, a folder of shards, or a text file with the tokens of a sequence in each line, as
            `PoseCodeFormatter` writes them.
        output_dir: Where the files go.
        split: Of a folder, only the shards of this split.
        format: `npz` or `pose`, see `write_pose`.
        canvas: Put everybody there instead.
        fps: Frame rate of the files instead.
        repair: Make the best of a line that is not well formed, as `PoseCodeFormatter` does; lines without a single
            code step are left out with a warning.
        batch_frames: Most frames of a micro-batch; None chooses by device.
        progress: Show a progress bar.

    Returns:
        Number of sequences, of all processes.

    Raises:
        ValueError: Another format, or a frame rate that is not above 0.
        TokenFolderError: There are no tokens, they are damaged or of another model, or `output_dir` cannot be written.
        ImportError: `format` is `pose` and pose-format is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected {' or '.join(FORMATS)}.")
    if fps is not None and not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps is {fps:g}; expected a number from {MIN_FPS:g} to {MAX_FPS:g}.")
    state, output, path = process_state(), Path(output_dir), Path(tokens)
    model = model.float().eval().to(state.device)
    if not path.exists():
        raise TokenFolderError(f"{path}: no such file or folder; expected what extract_tokens.py writes, or text.")
    source: _Shards | _Lines
    if path.is_dir() or path.suffix == ".parquet":
        source = _Shards(path, model, feature_extractor, split)
    else:
        source = _Lines(path, model, repair)
        canvas = canvas or TEXT_CANVAS
    with refusing(output):
        output.mkdir(parents=True, exist_ok=True)
    done, show = 0, progress and state.is_main_process
    with tqdm(total=source.count, unit=" sequences", desc="decode", disable=not show) as bar:
        for rows in source.chunks(state.process_index, state.num_processes):
            rows = [_change_place(row, feature_extractor, canvas, fps) for row in rows]
            for batch in _plan_rows(rows, batch_limits(state, batch_frames)):
                for row, poses in zip(batch, _decode_batch(model, feature_extractor, batch), strict=True):
                    sequence = PoseSequence(row.id, poses, np.ones(len(poses), dtype=bool), row.fps)
                    _write(output, sequence, format, model, canvas)
                bar.update(len(batch) * state.num_processes)
            done += len(rows)
    return sum(gather_object([done]))


def _change_place(
    row: TokenRow, feature_extractor: PoseFeatureExtractor, canvas: Canvas | None, fps: float | None
) -> TokenRow:
    """The row on another canvas and at another frame rate, where they are given."""
    if canvas is not None:
        center, scale = canvas.place(feature_extractor.keypoint_dim - 1)
        row = replace(row, center=center, scale=scale)
    if fps is not None and not math.isclose(fps, row.fps, rel_tol=1e-6):
        # As many as begin before the last frame that is decoded ends.
        last = (row.length - 1) * fps / float(feature_extractor.sampling_rate)
        row = replace(row, num_frames=math.floor(last + 1e-4) + 1, fps=fps)
        try:
            feature_extractor.check_frames(row.num_frames, row.length)
        except ValueError as error:
            raise ValueError(f"{row.id}: {error}") from None
    return row


def _plan_rows(rows: list[TokenRow], limits: tuple[int, int]) -> Iterator[list[TokenRow]]:
    """Puts rows of similar length and as many codebooks together, the longest first."""

    def num_codebooks(row: TokenRow) -> int:
        return len(row.codes)

    for _, alike in groupby(sorted(rows, key=num_codebooks), num_codebooks):
        group = list(alike)
        for batch in plan_batches(np.array([row.length for row in group]), *limits):
            yield [group[place] for place in batch]


def _decode_batch(
    model: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor, rows: list[TokenRow]
) -> list[np.ndarray]:
    """Poses (num_frames, N, D) of rows, the longest first."""
    codes = np.zeros((len(rows), *rows[0].codes.shape), dtype=np.int64)  # (B, Q, S)
    mask = np.zeros((len(rows), rows[0].length), dtype=np.int64)  # (B, T)
    for number, row in enumerate(rows):
        codes[number, :, : row.codes.shape[1]] = row.codes
        mask[number, : row.length] = 1
    values = run_exactly(model.decode, codes, mask)  # (B, T, N, D)
    places = {key: np.array([getattr(row, key) for row in rows]) for key in ("center", "scale", "fps", "num_frames")}
    return feature_extractor.postprocess(values, places)


def _write(
    output: Path, sequence: PoseSequence, format: str, model: PoseTokenizerModel, canvas: Canvas | None
) -> None:
    path = output / f"{sequence.id}.{format}"
    with refusing(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "npz":
            write_npz(path, sequence)
        else:
            write_pose(path, sequence, model.config.layout, None if canvas is None else (canvas.width, canvas.height))


# ---- where rows come from -------------------------------------------------------------------------------------------


class _Shards:
    """Rows of Parquet files."""

    def __init__(
        self, path: Path, model: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor, split: str | None
    ) -> None:
        self.model, self.feature_extractor = model, feature_extractor
        pattern = re.compile(".*" if split is None else re.escape(split) + SHARD_NAME)
        paths = sorted(shard for shard in path.glob("*.parquet") if pattern.fullmatch(shard.name))
        paths = paths if path.is_dir() else [path]
        if not paths:
            which = "" if split is None else f" of the split {split}"
            raise TokenFolderError(f"{path}: holds no .parquet file{which}; expected what extract_tokens.py writes.")
        self.footers = {shard: _read_footer(shard) for shard in paths}
        self.count = sum(footer.num_rows for footer in self.footers.values())
        self._check_made_by()
        self._check_ids()

    def chunks(self, process: int, num_processes: int) -> Iterator[list[TokenRow]]:
        """The rows of this process, so many at a time as fit into memory."""
        for path in list(self.footers)[process::num_processes]:
            with _broken(path):
                for piece in pq.ParquetFile(path).iter_batches(_ROWS_IN_MEMORY, columns=list(_COLUMNS)):
                    yield [self._check_row(path, row) for row in piece.to_pylist()]

    def _check_made_by(self) -> None:
        weights = hash_weights(self.model)
        for path, footer in self.footers.items():
            # Other programs may have written the rows anew and dropped this; then the codes' shape is all there is.
            if METADATA_KEY in (footer.metadata or {}):
                try:
                    other = json.loads(footer.metadata[METADATA_KEY])["made_by"]["weights_sha256"]
                except (ValueError, LookupError, TypeError):
                    other = "unknown"
                if other != weights:
                    raise TokenFolderError(
                        f"{path}: was made by another model (weights {other:.12}, given {weights:.12});"
                        " decode with the model that made the tokens."
                    )

    def _check_ids(self) -> None:
        """Refuses two rows of one name, whose files would replace each other."""
        seen: set[str] = set()
        for path in self.footers:
            with _broken(path):
                column = pq.read_table(path, columns=["id"], read_dictionary=["id"])["id"]
                if not pa.types.is_dictionary(column.type):
                    column = column.cast(pa.string()).dictionary_encode()
            for chunk in column.chunks:
                names = [*map(str, chunk.dictionary.to_pylist()), "None"]
                for place in chunk.indices.fill_null(-1).to_pylist():
                    if names[place] in seen:
                        name = one_line(names[place])
                        raise TokenFolderError(
                            f"{path.parent}: has two rows named {name}; decode one split at a time."
                        )
                    seen.add(names[place])

    def _check_row(self, path: Path, row: dict[str, Any]) -> TokenRow:
        name, config = Path(str(row["id"])), self.model.config
        if name.is_absolute() or ".." in name.parts or "\0" in str(name):
            raise TokenFolderError(f"{path}: id {row['id']!r} leads out of the output folder; expected a plain name.")
        try:
            center = np.array(row["center"], np.float32)
            num_frames, fps, scale = int(row["num_frames"]), float(row["fps"]), float(row["scale"])
            if not (num_frames >= 1 and 0 < fps < math.inf and center.shape == (config.keypoint_dim - 1,)):
                raise ValueError
            length = self.feature_extractor.resampled_length(num_frames, fps)
            self.feature_extractor.check_frames(num_frames, length)
            lengths = {len(codes) for codes in row["codes"]}
        except (TypeError, ValueError):
            raise TokenFolderError(
                f"{path}: the row {row['id']} is damaged; expected what extract_tokens.py writes."
            ) from None
        steps, prefixes = self.model.get_encoded_length(length), _prefixes(self.model)
        if lengths != {steps} or len(row["codes"]) not in prefixes:
            raise TokenFolderError(
                f"{path}: {row['id']} has {len(row['codes'])} rows of {sorted(lengths)} codes;"
                f" expected {prefixes[-1]} rows of {steps}, for {num_frames} frames at {fps:g} fps."
            )
        codes = np.array(row["codes"])
        if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= config.codebook_size:
            raise TokenFolderError(f"{path}: {row['id']} has other codes than 0 to {config.codebook_size - 1}.")
        return TokenRow(str(name), codes, length, num_frames, fps, center, scale)


@contextmanager
def _broken(path: Path) -> Iterator[None]:
    """Says it in a sentence where a shard cannot be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise TokenFolderError(f"{path}: is not a Parquet file, or broken ({first_line(error)}).") from None


def _read_footer(path: Path) -> pq.FileMetaData:
    """What a shard says of itself, once its pages have proved that they do not fill the memory."""
    with _broken(path):
        footer, size = pq.read_metadata(path), path.stat().st_size
    try:
        with path.open("rb") as stream:
            unpacked = unpacked_bytes(stream, size, _COLUMNS.__contains__)
        LIMITS.check(path, "the shard", unpacked, size)
    except PoseFileError as error:
        raise TokenFolderError(f"{error}.") from None
    except Exception as error:  # broken bytes surface as many types
        raise TokenFolderError(f"{path}: is not a Parquet file, or broken ({first_line(error)}).") from None
    missing = set(_COLUMNS) - set(footer.schema.to_arrow_schema().names)
    if missing:
        raise TokenFolderError(f"{path}: has no column {', '.join(sorted(missing))}; expected tokens.")
    return footer


def _prefixes(model: PoseTokenizerModel) -> list[int]:
    """Codebooks of the first 1, 2, ... levels."""
    own = model.config.levels_per_group
    return [sum(min(level, levels) for levels in own) for level in range(1, max(own) + 1)]


class _Lines:
    """Rows of a text file."""

    def __init__(self, path: Path, model: PoseTokenizerModel, repair: bool) -> None:
        self.path, self.model, self.repair = path, model, repair
        self.formatter = PoseCodeFormatter.from_config(model.config)
        # Blank lines at the end of a file are no sequences.
        self.count = max((number for number, line in self._read() if line), default=0)
        if not self.count:
            raise TokenFolderError(f"{path}: is empty; expected the tokens of a sequence in each line.")

    def _read(self) -> Iterator[tuple[int, str]]:
        try:
            with open(self.path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    yield number, line.strip()
        except UnicodeDecodeError:
            raise TokenFolderError(f"{self.path}: is not text; expected lines of tokens or a .parquet file.") from None
        except OSError as error:
            raise TokenFolderError(f"{self.path}: cannot be read ({error.strerror or error}).") from None

    def chunks(self, process: int, num_processes: int) -> Iterator[list[TokenRow]]:
        """The rows of this process, so many at a time as fit into memory."""
        empty = []
        lines = islice(self._read(), process, self.count, num_processes)
        while chunk := list(islice(lines, _ROWS_IN_MEMORY)):
            rows = [self._parse(number, line) for number, line in chunk]
            empty += [number for (number, _), row in zip(chunk, rows, strict=True) if row is None]
            yield [row for row in rows if row is not None]
        if empty:
            warnings.warn(
                f"{self.path}: {len(empty)} lines without a code step were left out, the first is line {empty[0]}.",
                stacklevel=2,
            )

    def _parse(self, number: int, line: str) -> TokenRow | None:
        try:
            read = self.formatter.text_to_codes
            codes = read(line, errors="repair") if self.repair else read(line)
        except ValueError as error:
            raise TokenFolderError(f"{self.path}, line {number}: {error}") from None
        if not codes.shape[1]:
            if self.repair:
                return None
            raise TokenFolderError(f"{self.path}, line {number}: has no tokens; expected those of a sequence.")
        length = codes.shape[1] * self.model.config.hop_length
        rate, axes = float(self.model.config.sampling_rate), self.model.config.keypoint_dim - 1
        return TokenRow(f"{self.path.stem}-{number:06d}", codes, length, length, rate, np.zeros(axes, np.float32), 1.0)


__all__ = ["Canvas", "decode_tokens"]
