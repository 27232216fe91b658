"""How much memory the pages of a parquet file ask for, told from their own headers before any is read.

The footer sums sizes up, and may lie: what a reader unpacks is what each page's header says, up to 2 GiB. pyarrow ends
the process where it is asked for the metadata of damaged columns (pyarrow 26), so headers are read here, in thrift's
compact protocol. What is ambiguous is refused: another reader could understand it otherwise.
"""

import struct
from collections.abc import Callable, Iterator
from typing import IO, Any

# A microsecond or two each. A footer has 44 for each column of each row group: seven groups of 1,630 columns.
MAX_VALUES = 500_000
MAX_PAGES = 50_000
_MAX_HEADER_BYTES = 2**14
_MAX_DEPTH = 16
# Kinds of values.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

Field = tuple[int, Any]  # kind, value


class _Thrift:
    """Bytes in thrift's compact protocol, from a place on. Text is left as bytes, maps are passed over.

    Raises:
        ValueError, IndexError: They are something else.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.place, self.left = data, 0, MAX_VALUES

    def varint(self) -> int:
        value = self.byte()
        if value < 128:
            return value
        value, shift = value & 127, 7
        while (byte := self.byte()) > 127:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number has no end")
        return value | byte << shift

    def number(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, Field]:
        """Field number -> kind and value."""
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        fields: dict[int, Field] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.number()
            if number in fields:
                raise ValueError("a field stands twice")
            fields[number] = head & 15, self.value(head & 15, depth)
        return fields

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def value(self, kind: int, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_VALUES} values: write larger row groups")
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_I16, _I32, _I64):
            return self.number()
        if kind == _BINARY:
            length = self.varint()
            self.place += length
            if self.place > len(self.data):
                raise ValueError("a text has no end")
            return self.data[self.place - length : self.place]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            head = self.byte()
            length, kind = head >> 4 if head >> 4 < 15 else self.varint(), head & 15
            if length > len(self.data) - self.place:
                raise ValueError("a list has no end")
            return [self.byte() if kind in (_TRUE, _FALSE) else self.value(kind, depth) for _ in range(length)]
        if kind in (_BYTE, _DOUBLE):
            self.place += 1 if kind == _BYTE else 8
            return None
        raise ValueError(f"a value is of kind {kind}")


def _get(fields: dict[int, Field], number: int, kind: int) -> Any:
    found = fields.get(number)
    if found is None or found[0] != kind:
        raise ValueError("a field is missing or of another kind")
    return found[1]


def unpacked_bytes(stream: IO[bytes], size: int, matters: Callable[[str], bool]) -> int:
    """Bytes that the pages of the columns that matter ask for: unpacked, and as numbers of 8 bytes.

    Args:
        stream: The file.
        size: Its size in bytes.
        matters: Whether a column is read, given its name.

    Raises:
        ValueError, IndexError, struct.error: It is no parquet file, or a damaged one.
    """
    stream.seek(max(size - 8, 0))
    length, magic = struct.unpack("<I4s", stream.read(8))
    if magic != b"PAR1" or length > size - 12:
        raise ValueError("it has no footer")
    stream.seek(size - 8 - length)
    footer = _Thrift(stream.read(length)).struct()
    total, pages = 0, 0
    for group in _get(footer, 4, _LIST):
        for column in _get(group, 1, _LIST):
            meta = _get(column, 3, _STRUCT)
            if not matters(_get(meta, 3, _LIST)[0].decode()):
                continue
            start, packed = _get(meta, 9, _I64), _get(meta, 7, _I64)
            if 11 in meta and 0 < _get(meta, 11, _I64) < start:  # the dictionary comes first
                start = _get(meta, 11, _I64)
            if not 4 <= start <= start + packed <= size:
                raise ValueError("a column lies outside of the file")
            for unpacked in _page_sizes(stream, start, start + packed):
                total, pages = total + unpacked, pages + 1
                if pages > MAX_PAGES:
                    raise ValueError(f"it has more than {MAX_PAGES} pages")
    return total


def _page_sizes(stream: IO[bytes], place: int, end: int) -> Iterator[int]:
    """Bytes that each page of a column asks for: a few of them may say the same number a million times."""
    while place < end:
        stream.seek(place)
        header = _Thrift(stream.read(min(_MAX_HEADER_BYTES, end - place)))
        fields = header.struct()
        unpacked, packed = _get(fields, 2, _I32), _get(fields, 3, _I32)
        data = 5 if 5 in fields else 8  # of the first or second version; a dictionary has neither
        values = _get(_get(fields, data, _STRUCT), 1, _I32) if data in fields else 0
        if min(unpacked, packed, values) < 0:
            raise ValueError("a page has less than no bytes")
        place += header.place + packed
        yield max(unpacked, packed, 8 * values)
