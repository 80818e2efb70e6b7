"""Vector code for numba: LLVM's vector types, written out from Python.

A *routine* is a function in LLVM's language that works on whole vectors. LLVM lowers the same text to AVX-512, AVX2,
SSE2 or NEON, and nothing depends on what its loop vectoriser happens to see. Pointers come as arrays or as addresses
(an int64); strides and offsets are in elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import llvmlite.binding
import numba
import numba.extending
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import templates
from numba.np import arrayobj

__all__ = [
    "DOUBLE",
    "FLOAT",
    "INT32",
    "INT64",
    "LANES",
    "LINE",
    "Lanes",
    "constant",
    "for_each",
    "intrinsic",
    "make_array",
    "routine",
    "signature",
]

Builder = Any
"""An ``ir.IRBuilder``; llvmlite has no types."""
Value = Any

signature: Final[Any] = templates.signature
_declared: Final[Any] = cgutils.get_or_insert_function
make_array: Final[Any] = arrayobj.make_array

FLOAT: Final = ir.FloatType()
DOUBLE: Final = ir.DoubleType()
INT32: Final = ir.IntType(32)
INT64: Final = ir.IntType(64)

_KINDS: Final = {
    "f": (types.float32, FLOAT),
    "d": (types.float64, DOUBLE),
    "i": (types.int64, INT64),
}
"""Letters for the arguments of a routine that are numbers."""

_POINTERS: Final = {"F": FLOAT, "D": DOUBLE, "I": INT32, "L": INT64}
"""Letters for those that are pointers: an array, or an address."""


def _lanes_of_the_target() -> int:
    """Float32 numbers in a register of the CPU that numba compiles for."""
    config: Any = numba.config
    if config.CPU_NAME and config.CPU_NAME != "host":
        features = str(config.CPU_FEATURES or "")
        return 16 if "+avx512f" in features else 8
    return 16 if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else 8


LANES: Final = _lanes_of_the_target()
"""Of a vector of float32: 16 where the machine has AVX-512, else 8. LLVM splits it where registers are shorter."""


LINE: Final = 16
"""Float32 numbers in a line of a cache."""


def intrinsic(make: Callable[..., Any]) -> Any:
    """numba's decorator, without its types: a definition has an argument more than its calls."""
    return numba.extending.intrinsic(make)


def constant(value: int) -> Value:
    """An int64."""
    return ir.Constant(INT64, value)


class Lanes:
    """Operations on vectors of ``count`` numbers of the type ``scalar``."""

    def __init__(self, builder: Builder, scalar: Any, count: int) -> None:
        self.b = builder
        self.scalar = scalar
        self.count = count
        self.type = ir.VectorType(scalar, count)
        self._align = {FLOAT: 4, INT32: 4, DOUBLE: 8, INT64: 8}[scalar]

    def all(self, value: float | int) -> Value:
        """The same constant in all lanes."""
        if self.scalar == FLOAT:
            value = float(np.float32(value))
        return ir.Constant(self.type, [ir.Constant(self.scalar, value)] * self.count)

    def splat(self, scalar: Value) -> Value:
        """One number in all lanes."""
        undefined = ir.Constant(self.type, ir.Undefined)
        one = self.b.insert_element(undefined, scalar, ir.Constant(INT32, 0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(INT32, self.count), [0] * self.count))

    def load(self, base: Value, offset: Value) -> Value:
        """The numbers from ``base[offset]`` on."""
        vector = self.b.load(self._at(base, offset))
        vector.align = self._align
        return vector

    def load_some(self, base: Value, offset: Value, where: Value) -> Value:
        """As :meth:`load` of the lanes that ``where`` says; 0 in the others, whose memory is left alone."""
        at = self._at(base, offset)
        kind = ir.FunctionType(self.type, [at.type, INT32, where.type, self.type])
        name = f"v{self.count}{'f' if self.scalar in (FLOAT, DOUBLE) else 'i'}{8 * self._align}"
        function = _declared(self.b.module, kind, f"llvm.masked.load.{name}.p0{name}")
        return self.b.call(function, [at, ir.Constant(INT32, self._align), where, self.all(0)])

    def store(self, vector: Value, base: Value, offset: Value) -> None:
        """Writes them to ``base[offset]`` and on."""
        store = self.b.store(vector, self._at(base, offset))
        store.align = self._align

    def stream(self, vector: Value, base: Value, offset: Value) -> None:
        """Writes whole lines past the caches: what they hold stays, and the lines are not read first.

        The address must be that of a line. Other threads see it after :func:`~.passes.fence`.
        """
        store = self.b.store(vector, self._at(base, offset))
        store.align = 4 * self.count
        store.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(INT32, 1)]))

    def prefetch(self, base: Value, offset: Value) -> None:
        """Asks for the line of the cache that ``base[offset]`` lies in, and does not wait."""
        at = self.b.bitcast(self.b.gep(base, [offset]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [at.type, INT32, INT32, INT32])
        function = _declared(self.b.module, kind, "llvm.prefetch.p0i8")
        self.b.call(function, [at, ir.Constant(INT32, 0), ir.Constant(INT32, 2), ir.Constant(INT32, 1)])

    def settle(self, base: Value) -> None:
        """What was stored at ``base`` is in memory from here on, and what is loaded there comes from memory."""
        kind = ir.FunctionType(ir.VoidType(), [base.type])
        self.b.asm(kind, "", "r,~{memory}", [base], True)

    def _at(self, base: Value, offset: Value) -> Value:
        return self.b.bitcast(self.b.gep(base, [offset]), self.type.as_pointer())

    # "contract" allows a product and a sum in one rounding, nothing else.

    def add(self, x: Value, y: Value) -> Value:
        """``x + y``."""
        return self.b.fadd(x, y, flags=("contract",))

    def sub(self, x: Value, y: Value) -> Value:
        """``x - y``."""
        return self.b.fsub(x, y, flags=("contract",))

    def mul(self, x: Value, y: Value) -> Value:
        """``x * y``."""
        return self.b.fmul(x, y, flags=("contract",))

    def signed(self, x: Value, size: Value) -> Value:
        """``size * sign(x)``: of float32, 0 where ``x`` is 0 or no number."""
        zero = self.all(0.0)
        below = self.b.select(self.b.fcmp_ordered("<", x, zero), self.splat(self.b.fneg(size)), zero)
        return self.b.select(self.b.fcmp_ordered(">", x, zero), self.splat(size), below)

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """A square of ``count`` vectors, its diagonal swapped: rounds of shuffles of two vectors each."""
        n = self.count
        current: list[Any] = list(rows)
        step = n // 2
        while step:
            low = [i if not i & step else n + (i ^ step) for i in range(n)]
            high = [i | step if not i & step else n + i for i in range(n)]
            masks = [ir.Constant(ir.VectorType(INT32, n), m) for m in (low, high)]
            swapped: list[Any] = [None] * n
            for i in range(n):
                if not i & step:
                    swapped[i] = self.b.shuffle_vector(current[i], current[i | step], masks[0])
                    swapped[i | step] = self.b.shuffle_vector(current[i], current[i | step], masks[1])
            current = swapped
            step //= 2
        return current

    def magnitude(self, x: Value) -> Value:
        """Of float32: without the sign."""
        return self.b.bitcast(self.magnitude_bits(x), self.type)

    def smaller(self, x: Value, y: Value) -> Value:
        """The smaller of two numbers in each lane."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def below(self, count: Value) -> Value:
        """Which lanes have a number below ``count``, an int64."""
        numbers = ir.Constant(ir.VectorType(INT32, self.count), list(range(self.count)))
        ints = Lanes(self.b, INT32, self.count)
        return self.b.icmp_signed("<", numbers, ints.splat(self.b.trunc(count, INT32)))

    def magnitude_bits(self, x: Value) -> Value:
        """Of float32: the bits without the sign, as int32. They are ordered as magnitudes are, NaN above all."""
        ints = Lanes(self.b, INT32, self.count)
        return self.b.and_(self.b.bitcast(x, ints.type), ints.all(0x7FFFFFFF))

    def larger(self, x: Value, y: Value) -> Value:
        """The larger of two integers in each lane."""
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)


def for_each(builder: Builder, count: int | Value, body: Callable[[Value], None], step: int = 1) -> None:
    """Emits ``for i in range(0, count, step): body(i)``; ``count`` and ``i`` are int64."""
    function = builder.function
    known = isinstance(count, int)
    stop = constant(count) if known else count
    before, loop, end = builder.block, function.append_basic_block("loop"), function.append_basic_block("end")
    if known:
        builder.branch(loop)
    else:
        builder.cbranch(builder.icmp_signed("<", constant(0), stop), loop, end)
    builder.position_at_end(loop)
    i = builder.phi(INT64)
    i.add_incoming(constant(0), before)
    body(i)
    following = builder.add(i, constant(step))
    i.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, end)
    builder.position_at_end(end)


def routine(name: str, kinds: str, build: Callable[..., None], given: Sequence[Any]) -> tuple[Any, Any]:
    """What an ``@intrinsic`` returns that calls a routine.

    Args:
        name: unique in the module.
        kinds: one letter for each argument: ``f d i`` numbers, ``F D I L`` pointers to float32, float64, int32, int64.
            No two pointers may reach the same memory.
        build: ``build(builder, *arguments)`` writes the routine, which returns nothing.
        given: numba's types of the arguments, of the call.
    """
    wanted = [
        _KINDS[k][0] if k in _KINDS else (t if isinstance(t, types.Array) else types.int64)
        for k, t in zip(kinds, given, strict=True)
    ]

    def generate(context: Any, builder: Builder, sig: Any, arguments: Sequence[Value]) -> Value:
        function = _function(builder.module, name, kinds, build)
        values = []
        for kind, kind_type, value in zip(kinds, sig.args, arguments, strict=True):
            if kind in _POINTERS:
                pointer = _POINTERS[kind].as_pointer()
                if isinstance(kind_type, types.Array):
                    value = builder.bitcast(make_array(kind_type)(context, builder, value).data, pointer)
                else:
                    value = builder.inttoptr(value, pointer)
            values.append(value)
        builder.call(function, values)
        return context.get_dummy_value()

    return signature(types.void, *wanted), generate


def _function(module: Any, name: str, kinds: str, build: Callable[..., None]) -> Any:
    known = module.globals.get(name)
    if known is not None:
        return known
    arguments = [_KINDS[k][1] if k in _KINDS else _POINTERS[k].as_pointer() for k in kinds]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "internal"
    # Inlined into numba's loops they would take minutes to compile.
    function.attributes.add("noinline")
    for argument in function.args:
        if isinstance(argument.type, ir.PointerType):
            argument.add_attribute("noalias")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    build(builder, *function.args)
    builder.ret_void()
    return function
