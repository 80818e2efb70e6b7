"""Reads the one pickle program that describes a tensor, and no other. No I/O, nothing imported, nothing called.

A pickle is a program for a stack machine. ``pickletools.genops`` takes it apart, which runs none of it, and takes no
argument that is longer than the bytes that are there. The machine here knows the instructions that TorchScript's
writer uses (pytorch ``torch/csrc/jit/serialization/pickler.h``), keeps every name as inert text, and lets exactly two
calls pass: ``collections.OrderedDict()``, which stands for "no hooks", and ``torch._utils._rebuild_tensor_v2(...)``,
which becomes a :class:`TensorRecord`. Anything else is a :class:`~distro_optim.errors.ProtocolError`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ....errors import LimitExceededError, ProtocolError

__all__ = ["Global", "StorageRef", "TensorRecord", "read_tensor_record"]

# The program of a tensor has some 40 steps and memorises 10 values; chosen with room for a few more attributes.
_MAX_STEPS: Final = 2048
_MAX_STACK: Final = 256
_MAX_MEMO: Final = 256
_MAX_TEXT: Final = 256
_MAX_INTEGER_BITS: Final = 64
_PROTOCOL: Final = 2


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


def _instructions(program: bytes) -> Iterator[tuple[str, Any, int]]:
    """Name, argument and place of each instruction, up to the one that ends the program.

    Raises:
        ProtocolError: the program is cut off, or an argument is malformed.
    """
    try:
        for opcode, argument, at in pickletools.genops(program):
            yield opcode.name, argument, at or 0
    except (ValueError, Warning) as error:  # a warning about an odd escape, where warnings are errors
        raise ProtocolError(f"not a pickle: {' '.join(str(error).split())[:100]}") from error


class _Machine:
    def __init__(self, program: bytes) -> None:
        self._program = program
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        instructions = _instructions(self._program)
        if next(instructions, None) != ("PROTO", _PROTOCOL, 0):
            raise ProtocolError(f"not a pickle of protocol {_PROTOCOL}")
        for count, (name, argument, at) in enumerate(instructions):
            if count >= _MAX_STEPS:
                raise LimitExceededError(f"the program has more than {_MAX_STEPS} steps")
            self._at = at
            if name == "STOP":
                break
            step = _STEPS.get(name)
            if step is None:
                raise ProtocolError(f"instruction {name} is not one a tensor needs", offset=at)
            step(self, argument)
            if len(self._stack) > _MAX_STACK:
                raise LimitExceededError(f"the stack grows beyond {_MAX_STACK} values", offset=at)
        result = self._pop()
        if self._stack or self._at + 1 != len(self._program):
            raise ProtocolError("the program ends with more than one value, or before its last byte")
        return result

    # -- the stack -----------------------------------------------------------------------------------------------------

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ProtocolError("a value is missing on the stack", offset=self._at)
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                items.reverse()
                return items
            items.append(value)
        raise ProtocolError("a mark is missing on the stack", offset=self._at)

    def _remember(self, place: int) -> None:
        if place >= _MAX_MEMO:
            raise LimitExceededError(f"at most {_MAX_MEMO} values are memorised", offset=self._at)
        value = self._pop()
        self._stack.append(value)
        self._memo[place] = value

    def _recall(self, place: int) -> None:
        if place not in self._memo:
            raise ProtocolError("a value is recalled that was not memorised", offset=self._at)
        self._stack.append(self._memo[place])

    # -- instructions that push a value --------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self._push(Global(self._text(module), self._text(name)))

    def _unicode(self, text: str) -> None:
        self._push(self._text(text))

    def _text(self, text: str) -> str:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:  # halves of surrogate pairs
            raise ProtocolError("a string is not UTF-8", offset=self._at) from None
        if size > _MAX_TEXT:
            raise LimitExceededError(f"a name or a string is longer than {_MAX_TEXT} bytes", offset=self._at)
        return text

    def _long(self, value: int) -> None:
        # One bit is the sign.
        if value.bit_length() >= _MAX_INTEGER_BITS:
            raise LimitExceededError(f"an integer has more than {_MAX_INTEGER_BITS} bits", offset=self._at)
        self._push(value)

    # -- instructions that combine values ------------------------------------------------------------------------------

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _new_object(self) -> None:
        arguments, cls = self._pop(), self._pop()
        if arguments != () or not isinstance(cls, Global):
            raise ProtocolError("an object is made of something other than a name", offset=self._at)
        self._stack.append(_Object())

    def _set_items(self, items: list[Any]) -> None:
        target = self._pop()
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise ProtocolError("attributes are a dictionary with strings for keys", offset=self._at)
        target.update(zip(items[::2], items[1::2], strict=True))
        self._stack.append(target)

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        if not isinstance(state, dict) or not isinstance(target, _Object):
            raise ProtocolError("only an object can be given attributes", offset=self._at)
        target.state = state
        self._stack.append(target)

    def _persistent(self) -> None:
        value = self._pop()
        if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
            raise ProtocolError("a reference to something other than elements", offset=self._at)
        _, kind, key, _, count = value
        if not isinstance(kind, Global) or not isinstance(key, str) or not _is_count(count):
            raise ProtocolError("a malformed reference to elements", offset=self._at)
        self._stack.append(StorageRef(kind, key, count))

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if function == _ORDERED_DICT and arguments == ():
            self._stack.append(_Hooks())
        elif function == _REBUILD and isinstance(arguments, tuple):
            self._stack.append(self._record(arguments))
        else:
            raise ProtocolError("the program calls a function", offset=self._at)

    def _record(self, arguments: tuple[Any, ...]) -> TensorRecord:
        if len(arguments) != 6:
            raise ProtocolError("a tensor is rebuilt from six values", offset=self._at)
        storage, offset, sizes, strides, requires_grad, hooks = arguments
        if (
            not isinstance(storage, StorageRef)
            or not _is_count(offset)
            or not _are_counts(sizes)
            or not _are_counts(strides)
            or not isinstance(requires_grad, bool)
            or not isinstance(hooks, _Hooks)
        ):
            raise ProtocolError("a malformed tensor", offset=self._at)
        return TensorRecord(storage, offset, sizes, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


_STEPS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "GLOBAL": _Machine._global,
    "BINUNICODE": _Machine._unicode,
    "BININT1": _Machine._push,
    "BININT2": _Machine._push,
    "BININT": _Machine._push,
    "LONG1": _Machine._long,
    "NEWTRUE": lambda m, _: m._push(True),
    "NEWFALSE": lambda m, _: m._push(False),
    "NONE": lambda m, _: m._push(None),
    "EMPTY_DICT": lambda m, _: m._push({}),
    "MARK": lambda m, _: m._push(_MARK),
    "EMPTY_TUPLE": lambda m, _: m._push(()),
    "TUPLE": lambda m, _: m._push(tuple(m._pop_to_mark())),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "BINPUT": _Machine._remember,
    "LONG_BINPUT": _Machine._remember,
    "BINGET": _Machine._recall,
    "LONG_BINGET": _Machine._recall,
    "NEWOBJ": lambda m, _: m._new_object(),
    "SETITEM": lambda m, _: m._set_items(list(reversed([m._pop(), m._pop()]))),
    "SETITEMS": lambda m, _: m._set_items(m._pop_to_mark()),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._persistent(),
    "REDUCE": lambda m, _: m._call(),
}
