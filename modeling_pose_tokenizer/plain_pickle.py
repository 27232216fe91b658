"""Pickles of numpy arrays and plain containers, read without unpickling: nothing in them is ever imported or called.

`pickletools` takes the file apart into its instructions. Those that build numbers, text, lists, tuples and
dictionaries are carried out here, and the few calls that numpy arrays are pickled as are recognised by name and done
by hand. Every other instruction or name is refused, so a pickle with a payload is a file that cannot be read.

An `Unpickler` whose `find_class` admits numpy alone would be shorter, and is no answer: its memory is not bounded. It
takes 2 GiB for the 9 bytes that remember a None in place 2**27, and 4 GiB for 71 bytes that call numpy's own
`_reconstruct` with the shape (2**29,) (Python 3.11).
"""

import math
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

# Some microseconds each. Two numpy arrays for each of 10,000 frames take 480,000.
MAX_INSTRUCTIONS = 500_000

# Where the items of a container begin. One for all: a file of nothing else would otherwise make so many objects that
# Python collects its garbage again and again, which takes a second in a process with many libraries.
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
# Modules of these names moved within numpy.
_NUMPY_HOMES = (
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
    "numpy",
)
_KINDS = "biufSU"
# How protocols without an instruction for bytes write them: encode(text, "latin1"), and bytes() for none.
_BYTES = (("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes"))


class PlainPickleError(ValueError):
    """A pickle that holds something else than numbers, text, numpy arrays and plain containers."""


class _Name:
    """One of the names that numpy arrays are pickled by."""

    def __init__(self, module: str, name: str) -> None:
        allowed = module in _NUMPY_HOMES and name in ("_reconstruct", "scalar", "_frombuffer", "ndarray", "dtype")
        if not allowed and (module, name) not in _BYTES:
            raise PlainPickleError(f"it names {module}.{name}, expected numpy arrays and plain containers alone")
        self.name = name


class _Pending:
    """An array or dtype whose state comes with a later instruction."""

    def __init__(self, code: str = "") -> None:
        self.code = code
        self.place: int | None = None  # in the memory


class _Machine:
    """The stack and memory that the instructions work on."""

    def __init__(self, budget: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = budget  # bytes that calls may still copy

    def spend(self, size: int) -> None:
        """Counts what a call copied: each call has data of its own in the file, unless it is made to fill memory."""
        self.budget -= size
        if self.budget < 0:
            raise PlainPickleError("it copies the same data again and again")

    def items(self) -> list[Any]:
        """Takes what lies above the topmost mark."""
        items: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def memoize(self, place: int) -> None:
        """Remembers what lies on top."""
        self.memo[place] = self.stack[-1]
        if isinstance(self.stack[-1], _Pending):
            self.stack[-1].place = place

    def pop(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count :]
        if len(values) < count or any(value is _MARK for value in values):
            raise PlainPickleError("its instructions do not fit together")
        del self.stack[len(self.stack) - count :]
        return values

    def build(self) -> None:
        """Gives an array or dtype its state."""
        pending, state = self.pop(2)
        if not isinstance(pending, _Pending) or not isinstance(state, tuple):
            raise PlainPickleError("it sets the state of an object, expected numpy arrays and plain containers alone")
        if pending.code:
            order = state[1] if len(state) > 1 else None
            done: Any = _dtype(pending.code, order)
        else:
            _, shape, dtype, fortran, data = state
            done = _array(data, dtype, shape, "F" if fortran else "C")
        self.stack.append(done)
        if pending.place is not None:
            self.memo[pending.place] = done


def _dtype(code: str, order: Any = None) -> np.dtype:
    dtype = np.dtype(code)
    if order in ("<", ">"):
        dtype = dtype.newbyteorder(order)
    if dtype.hasobject or dtype.kind not in _KINDS or dtype.names:
        raise PlainPickleError(f"an array has dtype {dtype}, expected numbers or text")
    return dtype


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, np.dtype):
        raise PlainPickleError("an array holds objects, expected numbers")
    shape = tuple(int(length) for length in shape)
    if len(shape) > 8 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise PlainPickleError(f"an array of shape {shape} and dtype {dtype} holds {len(data)} bytes")
    if dtype.itemsize == 0:
        if math.prod(shape) > 1:  # nothing in the file bounds how many
            raise PlainPickleError(f"an array of shape {shape} holds empty text")
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _call(function: Any, arguments: Any) -> Any:
    """Does by hand what numpy arrays are pickled as."""
    name = function.name if isinstance(function, _Name) else ""
    if name == "_reconstruct":
        return _Pending()
    if name == "dtype":
        return _Pending(str(_dtype(arguments[0]).str))
    if name == "_frombuffer":
        data, dtype, shape, order = arguments
        return _array(data, dtype, shape, order)
    if name == "scalar":
        dtype, data = arguments
        return _array(data, dtype, (), "C")[()]
    if name == "encode" and len(arguments) == 2 and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    if name == "bytes" and not arguments:
        return b""
    raise PlainPickleError("it calls a function, expected numpy arrays and plain containers alone")


def _append(machine: _Machine, items: list[Any]) -> None:
    machine.stack[-1].extend(items)


def _set(machine: _Machine, items: list[Any]) -> None:
    if not isinstance(machine.stack[-1], dict):
        raise PlainPickleError("its instructions do not fit together")
    machine.stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _reduce(machine: _Machine) -> None:
    function, arguments = machine.pop(2)
    result = _call(function, arguments)
    machine.spend(len(result) if isinstance(result, bytes) else result.nbytes if isinstance(result, np.generic) else 0)
    machine.stack.append(result)


def _stack_global(machine: _Machine) -> None:
    module, name = machine.pop(2)
    machine.stack.append(_Name(module, name))


_ACTIONS: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": lambda machine: None,
    "FRAME": lambda machine: None,
    "MARK": lambda machine: machine.stack.append(_MARK),
    "POP": lambda machine: machine.pop(1),
    "POP_MARK": _Machine.items,
    "EMPTY_LIST": lambda machine: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine: machine.stack.append(()),
    "EMPTY_DICT": lambda machine: machine.stack.append({}),
    "LIST": lambda machine: machine.stack.append(machine.items()),
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.items())),
    "TUPLE1": lambda machine: machine.stack.append(tuple(machine.pop(1))),
    "TUPLE2": lambda machine: machine.stack.append(tuple(machine.pop(2))),
    "TUPLE3": lambda machine: machine.stack.append(tuple(machine.pop(3))),
    "APPEND": lambda machine: _append(machine, machine.pop(1)),
    "APPENDS": lambda machine: _append(machine, machine.items()),
    "SETITEM": lambda machine: _set(machine, machine.pop(2)),
    "SETITEMS": lambda machine: _set(machine, machine.items()),
    "MEMOIZE": lambda machine: machine.memoize(len(machine.memo)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _Machine.build,
}


def _dict(machine: _Machine) -> None:
    items = machine.items()
    machine.stack.append({})
    _set(machine, items)


_ACTIONS["DICT"] = _dict


def read_plain_pickle(data: bytes) -> Any:
    """What a pickle holds, as long as that is numbers, text, numpy arrays, lists, tuples and dictionaries.

    Raises:
        PlainPickleError: It holds, or would do, anything else; or has more than `MAX_INSTRUCTIONS`.
        Exception: It is broken; broken bytes surface as many types.
    """
    machine = _Machine(len(data))
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count >= MAX_INSTRUCTIONS:
            raise PlainPickleError(f"it has more than {MAX_INSTRUCTIONS} instructions: write numpy arrays, not lists")
        if name in _LITERALS:
            machine.stack.append(argument)
        elif name in _CONSTANTS:
            machine.stack.append(_CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            machine.memoize(int(argument))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            machine.stack.append(machine.memo[int(argument)])
        elif name == "GLOBAL":
            machine.stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STOP":
            (value,) = machine.stack
            return value
        elif name in _ACTIONS:
            _ACTIONS[name](machine)
        else:
            raise PlainPickleError(f"it has the instruction {name}, expected numpy arrays and plain containers alone")
    raise PlainPickleError("it has no end")
