"""CSV and parquet files as columns of numbers and short texts, read by pyarrow once their size has been checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .parquet_pages import unpacked_bytes
from .sequences import Limits, check_size, one_sentence

# Characters of a text, which names a part or a sequence: a file holds a long one once, and may repeat it in every row.
MAX_TEXT = 1000


def read_table(path: Path, limits: Limits, matters: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The columns that matter of a table: numbers, or texts as objects.

    Args:
        path: A CSV file, or parquet where it begins as parquet does.
        limits: How much it may ask for.
        matters: Whether a column is read, given its name.

    Raises:
        PoseFileError: It is broken, or asks for more than the limits.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow.csv
    except ImportError:
        raise ImportError("CSV and parquet files need pyarrow: pip install 'pose-tokenizer[train]'") from None

    size = check_size(path, limits.array_bytes)
    with one_sentence(path, "a table"), path.open("rb") as stream:
        parquet = stream.read(4) == b"PAR1"
    if parquet:
        table = _read_parquet(path, size, limits, matters)
    else:
        check_size(path, limits.text_bytes)
        with one_sentence(path, "a CSV file"):
            table = pyarrow.csv.read_csv(path)
            table = table.select([name for name in table.column_names if matters(name)])
    with one_sentence(path, "a table of MediaPipe Holistic"):
        return {name: _to_numpy(name, table[name]) for name in table.column_names}


def _read_parquet(path: Path, size: int, limits: Limits, matters: Callable[[str], bool]) -> Any:
    """The columns that matter, texts as the file has them: each once."""
    import pyarrow.parquet

    with one_sentence(path, "a parquet file"):
        with path.open("rb") as stream:
            unpacked = unpacked_bytes(stream, size, matters)
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata, fields = file.metadata, [field for field in file.schema_arrow if matters(field.name)]
        for field in fields:
            kind = field.type.value_type if pyarrow.types.is_dictionary(field.type) else field.type
            if not (pyarrow.types.is_primitive(kind) or pyarrow.types.is_null(kind) or _is_text(kind)):
                raise ValueError(f"{field.name} holds {field.type}, expected numbers or text")
        limits.check(path, "the table", max(metadata.num_rows * len(fields) * 8, unpacked), size)
        texts = [field.name for field in fields if _is_text(field.type)]
        with pyarrow.parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts) as file:
            return file.read(columns=[field.name for field in fields])


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _to_numpy(name: str, column: Any) -> np.ndarray:
    """A column as an array; rows of the same text share it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_text(column.type):
        column = column.dictionary_encode()
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy()
    for chunk in column.chunks:
        longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() if _is_text(chunk.dictionary.type) else 0
        if (longest or 0) > MAX_TEXT:
            raise ValueError(f"{name} holds a text of {longest} characters, expected {MAX_TEXT} at most")
    parts = [
        np.array([*chunk.dictionary.to_pylist(), None], object)[chunk.indices.fill_null(-1).to_numpy()]
        for chunk in column.chunks
    ]
    return np.concatenate([np.zeros(0, object), *parts])
