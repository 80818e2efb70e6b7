"""Reads the one pickle program that describes a tensor, and no other. No I/O, nothing imported, nothing called.

A pickle is a program for a stack machine. The interpreter here knows the instructions that TorchScript's writer uses
(pytorch ``torch/csrc/jit/serialization/pickler.h``), keeps every name as inert text, and lets exactly two calls
pass: ``collections.OrderedDict()``, which stands for "no hooks", and ``torch._utils._rebuild_tensor_v2(...)``, which
becomes a :class:`TensorRecord`. Anything else is a :class:`~distro_optim.errors.ProtocolError`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from ....buffer import Reader
from ....errors import LimitExceededError, ProtocolError

__all__ = ["Global", "StorageRef", "TensorRecord", "read_tensor_record"]

# The program of a tensor has some 40 steps and memorises 10 values; chosen with room for a few more attributes.
_MAX_STEPS: Final = 2048
_MAX_STACK: Final = 256
_MAX_MEMO: Final = 256
_MAX_TEXT: Final = 256
_MAX_INTEGER_BYTES: Final = 8
_PROTOCOL: Final = 2

_I32: Final = struct.Struct("<i")


@dataclass(frozen=True)
class Global:
    """A name, not what it names."""

    module: str
    name: str


@dataclass(frozen=True)
class StorageRef:
    """Where the elements are: type, entry in the archive, how many."""

    kind: Global
    key: str
    count: int


@dataclass(frozen=True)
class TensorRecord:
    """What ``_rebuild_tensor_v2`` is told; sizes, strides and offset count elements and are not negative."""

    storage: StorageRef
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where the items of a tuple begin on the stack."""


class _Object:
    """An instance of a class we do not know; only its attributes are kept."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}


class _Hooks:
    """An empty OrderedDict."""


_MARK: Final = _Mark()
_REBUILD: Final = Global("torch._utils", "_rebuild_tensor_v2")
_ORDERED_DICT: Final = Global("collections", "OrderedDict")


def read_tensor_record(program: bytes, attribute: str) -> TensorRecord:
    """The tensor that ``program`` stores in ``attribute`` of an object.

    Raises:
        ProtocolError: the program does anything else.
    """
    result = _Machine(program).run()
    record = result.state.get(attribute) if isinstance(result, _Object) else None
    if not isinstance(record, TensorRecord):
        raise ProtocolError(f"the archive holds no module with a tensor named {attribute!r}")
    return record


class _Machine:
    def __init__(self, program: bytes) -> None:
        self._reader = Reader(program)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        reader = self._reader
        if bytes(reader.pull_bytes(2)) != bytes([0x80, _PROTOCOL]):
            raise ProtocolError(f"not a pickle of protocol {_PROTOCOL}")
        for _ in range(_MAX_STEPS):
            at = reader.pos
            code = reader.pull_u8()
            if code == ord("."):
                result = self._pop()
                if self._stack or reader.remaining:
                    raise ProtocolError("the program ends with more than one value, or before its last byte")
                return result
            step = _STEPS.get(code)
            if step is None:
                raise ProtocolError(f"instruction 0x{code:02x} is not one a tensor needs", offset=at)
            step(self)
            if len(self._stack) > _MAX_STACK:
                raise LimitExceededError(f"the stack grows beyond {_MAX_STACK} values", offset=at)
        raise LimitExceededError(f"the program has more than {_MAX_STEPS} steps")

    # -- the stack -----------------------------------------------------------------------------------------------------

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ProtocolError("a value is missing on the stack", offset=self._reader.pos)
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                items.reverse()
                return items
            items.append(value)
        raise ProtocolError("a mark is missing on the stack", offset=self._reader.pos)

    def _remember(self, place: int) -> None:
        if place >= _MAX_MEMO:
            raise LimitExceededError(f"at most {_MAX_MEMO} values are memorised", offset=self._reader.pos)
        value = self._pop()
        self._stack.append(value)
        self._memo[place] = value

    def _recall(self, place: int) -> None:
        if place not in self._memo:
            raise ProtocolError("a value is recalled that was not memorised", offset=self._reader.pos)
        self._stack.append(self._memo[place])

    # -- instructions that push a value --------------------------------------------------------------------------------

    def _global(self) -> None:
        self._stack.append(Global(self._line(), self._line()))

    def _line(self) -> str:
        characters = bytearray()
        while (byte := self._reader.pull_u8()) != ord("\n"):
            characters.append(byte)
            if len(characters) > _MAX_TEXT:
                raise LimitExceededError(f"a name is longer than {_MAX_TEXT} bytes", offset=self._reader.pos)
        return self._decoded(bytes(characters))

    def _unicode(self) -> None:
        size = self._reader.pull_u32()
        if size > _MAX_TEXT:
            raise LimitExceededError(f"a string is longer than {_MAX_TEXT} bytes", offset=self._reader.pos)
        self._stack.append(self._decoded(bytes(self._reader.pull_bytes(size))))

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ProtocolError("a string is not UTF-8", offset=self._reader.pos) from None

    def _i32(self) -> None:
        self._stack.append(_I32.unpack(self._reader.pull_bytes(4))[0])

    def _long(self) -> None:
        size = self._reader.pull_u8()
        if size > _MAX_INTEGER_BYTES:
            raise LimitExceededError("an integer has more than 64 bits", offset=self._reader.pos)
        self._stack.append(int.from_bytes(self._reader.pull_bytes(size), "little", signed=True))

    # -- instructions that combine values ------------------------------------------------------------------------------

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _new_object(self) -> None:
        arguments, cls = self._pop(), self._pop()
        if arguments != () or not isinstance(cls, Global):
            raise ProtocolError("an object is made of something other than a name", offset=self._reader.pos)
        self._stack.append(_Object())

    def _set_items(self, items: list[Any]) -> None:
        target = self._pop()
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise ProtocolError("attributes are a dictionary with strings for keys", offset=self._reader.pos)
        target.update(zip(items[::2], items[1::2], strict=True))
        self._stack.append(target)

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        if not isinstance(state, dict) or not isinstance(target, _Object):
            raise ProtocolError("only an object can be given attributes", offset=self._reader.pos)
        target.state = state
        self._stack.append(target)

    def _persistent(self) -> None:
        value = self._pop()
        if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
            raise ProtocolError("a reference to something other than elements", offset=self._reader.pos)
        _, kind, key, _, count = value
        if not isinstance(kind, Global) or not isinstance(key, str) or not _is_count(count):
            raise ProtocolError("a malformed reference to elements", offset=self._reader.pos)
        self._stack.append(StorageRef(kind, key, count))

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if function == _ORDERED_DICT and arguments == ():
            self._stack.append(_Hooks())
        elif function == _REBUILD and isinstance(arguments, tuple):
            self._stack.append(self._record(arguments))
        else:
            raise ProtocolError("the program calls a function", offset=self._reader.pos)

    def _record(self, arguments: tuple[Any, ...]) -> TensorRecord:
        if len(arguments) != 6:
            raise ProtocolError("a tensor is rebuilt from six values", offset=self._reader.pos)
        storage, offset, sizes, strides, requires_grad, hooks = arguments
        if (
            not isinstance(storage, StorageRef)
            or not _is_count(offset)
            or not _are_counts(sizes)
            or not _are_counts(strides)
            or not isinstance(requires_grad, bool)
            or not isinstance(hooks, _Hooks)
        ):
            raise ProtocolError("a malformed tensor", offset=self._reader.pos)
        return TensorRecord(storage, offset, sizes, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


_STEPS: Final = {
    ord("c"): _Machine._global,
    ord("X"): _Machine._unicode,
    ord("K"): lambda m: m._stack.append(m._reader.pull_u8()),
    ord("M"): lambda m: m._stack.append(m._reader.pull_u16()),
    ord("J"): _Machine._i32,
    0x8A: _Machine._long,
    0x88: lambda m: m._stack.append(True),
    0x89: lambda m: m._stack.append(False),
    ord("N"): lambda m: m._stack.append(None),
    ord("}"): lambda m: m._stack.append({}),
    ord("("): lambda m: m._stack.append(_MARK),
    ord(")"): lambda m: m._stack.append(()),
    ord("t"): lambda m: m._stack.append(tuple(m._pop_to_mark())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("q"): lambda m: m._remember(m._reader.pull_u8()),
    ord("r"): lambda m: m._remember(m._reader.pull_u32()),
    ord("h"): lambda m: m._recall(m._reader.pull_u8()),
    ord("j"): lambda m: m._recall(m._reader.pull_u32()),
    0x81: _Machine._new_object,
    ord("s"): lambda m: m._set_items(list(reversed([m._pop(), m._pop()]))),
    ord("u"): lambda m: m._set_items(m._pop_to_mark()),
    ord("b"): _Machine._build,
    ord("Q"): _Machine._persistent,
    ord("R"): _Machine._call,
}
