"""The replacements in the iroh package's generated code: equal to the originals, guarded, and taken back."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import warm_python
from distro_optim.comm.iroh import ffi

pytestmark = pytest.mark.waiting


READY, MAYBE_READY = 0, 1


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    ffi.restore()
    yield
    ffi.restore()
    ffi.accelerate()


@pytest.fixture
def module() -> ModuleType:
    return importlib.import_module("iroh.iroh_ffi")


def lowered(module: Any, pieces: list[bytes], number: int) -> bytes:
    """What the generated builder makes of some byte strings and a number."""
    builder = module._UniffiRustBufferBuilder()
    try:
        for piece in pieces:
            builder.write_i32(len(piece))
            builder.write(piece)
        builder.write_u64(number)
        builder.write_double(number / 3)
        return bytes(builder.rbuf.data[: builder.rbuf.len])
    finally:
        builder.discard()


@pytest.mark.slow
@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(0, 2**64 - 1))
def test_the_fast_copy_writes_what_the_original_writes(pieces: list[bytes], number: int) -> None:
    module: Any = importlib.import_module("iroh.iroh_ffi")
    ffi.restore()
    original = lowered(module, pieces, number)
    assert ffi.accelerate().byte_copy
    assert lowered(module, pieces, number) == original


def test_every_kind_of_buffer_can_be_written(module: Any) -> None:
    ffi.accelerate()
    data = bytes(range(256)) * 300
    for value in (data, bytearray(data), memoryview(data), memoryview(bytearray(data * 2))[::2]):
        assert lowered(module, [value], 5)[4 : 4 + len(value)] == bytes(value)  # type: ignore[list-item]


def test_items_wider_than_a_byte_are_refused(module: Any) -> None:
    ffi.accelerate()
    builder = module._UniffiRustBufferBuilder()
    with pytest.raises(ValueError, match="larger than one byte"):
        builder.write(memoryview(bytes(8)).cast("I"))
    builder.discard()


def test_restoring_brings_the_originals_back(module: Any) -> None:
    def functions() -> tuple[object, ...]:
        builder, of_bytes = module._UniffiRustBufferBuilder, module._UniffiFfiConverterBytes
        of_counters = module._UniffiFfiConverterTypeConnectionStats
        calls = (module._uniffi_rust_call, module._uniffi_rust_call_with_error, module._uniffi_rust_call_async)
        return builder.write, builder._pack_into, *calls, of_bytes.lift, of_bytes.lower, of_counters.lift

    originals = functions()
    assert ffi.accelerate() == ffi.Acceleration(True, True, True, True, True)
    assert not set(originals) & set(functions())
    ffi.restore()
    assert functions() == originals


def test_the_variable_leaves_the_package_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._UniffiRustBufferBuilder.write
    monkeypatch.setenv(ffi.STOCK_VARIABLE, "1")
    state = ffi.accelerate()
    assert not state.byte_copy
    assert not state.ready_calls
    assert not state.light_calls
    assert not state.direct_values
    assert not state.signatures
    assert ffi.STOCK_VARIABLE in state.reason
    assert module._UniffiRustBufferBuilder.write is original


AN_ERROR = """
import iroh
from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.iroh.node import dialling
try:
    dialling._raw_addr(EndpointAddr(bytes(32), (), ()))
    iroh.RelayMode.custom_from_urls(["no URL"])
except iroh.IrohError as error:
    print("Stack backtrace" in error.debug_message())
"""


@pytest.mark.parametrize(
    ("more", "has_one"), [({}, False), ({ffi.BACKTRACE_VARIABLE: "1"}, True), ({ffi.STOCK_VARIABLE: "1"}, True)]
)
def test_an_error_has_a_backtrace_only_if_those_of_libraries_are_asked_for(more: dict[str, str], has_one: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != ffi.BACKTRACE_VARIABLE}
    environment |= {"RUST_BACKTRACE": "1", **more}
    command = [sys.executable, "-c", AN_ERROR]
    done = warm_python.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{has_one}\n", done.stderr


def test_an_unknown_buffer_layout_is_left_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("bytes", ctypes.c_void_p)]

    original = module._UniffiRustBufferBuilder.write
    monkeypatch.setattr(module, "_UniffiRustBuffer", Other)
    state = ffi.accelerate()
    assert not state.byte_copy
    assert state.ready_calls
    assert "unknown buffer layout" in state.reason
    assert module._UniffiRustBufferBuilder.write is original


def test_a_copy_that_would_write_other_bytes_is_not_used(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_and_more(self: Any, value: bytes) -> None:
        ffi._write(self, bytes(reversed(value)))

    monkeypatch.setattr(module._UniffiRustBufferBuilder, "write", write_and_more)
    state = ffi.accelerate()
    assert not state.byte_copy
    assert "does not write what" in state.reason
    assert module._UniffiRustBufferBuilder.write is write_and_more


def test_missing_names_are_no_error(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "_UniffiRustBufferBuilder")
    monkeypatch.delattr(module, "_UNIFFI_RUST_FUTURE_POLL_READY")
    state = ffi.accelerate()
    assert (state.byte_copy, state.ready_calls) == (False, False)
    monkeypatch.undo()


@pytest.mark.slow
@given(
    st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=6, max_size=6)
)
def test_values_cross_as_with_the_originals(pieces: list[bytes], counters: tuple[int, ...]) -> None:
    module: Any = importlib.import_module("iroh.iroh_ffi")
    of_bytes, of_counters = module._UniffiFfiConverterBytes, module._UniffiFfiConverterTypeConnectionStats

    def crossing() -> list[object]:
        seen: list[object] = []
        for piece in pieces:
            for value in (piece, bytearray(piece), memoryview(piece)[::2]):
                rbuf = of_bytes.lower(value)
                seen += [rbuf.data[: rbuf.len], of_bytes.lift(rbuf)]
        builder = module._UniffiRustBufferBuilder()
        for counter in counters:
            builder.write_i64(counter)
        return [*seen, of_counters.lift(builder.finalize())]

    ffi.restore()
    original = crossing()
    assert ffi.accelerate().direct_values
    assert crossing() == original


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x00", b"\x00\x00\x00\x09short", b"\xff\xff\xff\xff", bytes(5)])
def test_bytes_that_are_not_as_long_as_they_say_are_refused(module: Any, content: bytes) -> None:
    ffi.accelerate()
    builder = module._UniffiRustBufferBuilder()
    builder.write(content)
    with pytest.raises(ValueError, match="does not hold what it says"):
        module._UniffiFfiConverterBytes.lift(builder.finalize())


def test_wide_items_are_refused_as_a_value_too(module: Any) -> None:
    ffi.accelerate()
    with pytest.raises(ValueError, match="larger than one byte"):
        module._UniffiFfiConverterBytes.lower(memoryview(bytes(8)).cast("I"))


def test_an_error_and_a_panic_of_a_call_come_through(module: Any) -> None:
    ffi.accelerate()

    def fails_with(code: int, text: bytes = b"") -> Callable[..., int]:
        def call(number: int, status: Any) -> int:
            status._obj.code = code
            builder = module._UniffiRustBufferBuilder()
            builder.write(text)
            status._obj.error_buf = builder.finalize()
            return number

        return call

    class Converter:
        @staticmethod
        def lift(rbuf: Any) -> Exception:
            text = rbuf.data[: rbuf.len]
            rbuf.free()
            return OSError(text)

    assert (
        module._uniffi_rust_call(fails_with(0), 7) == module._uniffi_rust_call_with_error(None, fails_with(0), 7) == 7
    )
    with pytest.raises(OSError, match="no way"):
        module._uniffi_rust_call_with_error(Converter, fails_with(1, b"no way"), 7)
    for call in (module._uniffi_rust_call, lambda *given: module._uniffi_rust_call_with_error(Converter, *given)):
        with pytest.raises(module.InternalError, match="panicked"):
            call(fails_with(2, b"panicked"), 7)
    with pytest.raises(module.InternalError, match="CALL_ERROR"):
        module._uniffi_rust_call(fails_with(1), 7)


def test_another_status_of_calls_is_left_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.Structure):
        _fields_ = [("error_buf", ctypes.c_void_p), ("code", ctypes.c_int8)]

    original = module._uniffi_rust_call
    monkeypatch.setattr(module, "_UniffiRustCallStatus", Other)
    state = ffi.accelerate()
    assert not state.light_calls
    assert not state.direct_values
    assert "unknown status" in state.reason
    assert module._uniffi_rust_call is original


def test_counters_that_are_other_ones_are_read_by_the_original(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module._UniffiFfiConverterTypeConnectionStats.lift
    monkeypatch.setattr(module.ConnectionStats, "__eq__", lambda self, other: False)
    monkeypatch.setattr(module.ConnectionStats, "__ne__", lambda self, other: True)
    state = ffi.accelerate()
    assert state.light_calls
    assert not state.direct_values
    assert "counters" in state.reason
    assert module._UniffiFfiConverterTypeConnectionStats.lift == original


def test_another_calling_convention_is_left_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def other(future: object, poll: object) -> None: ...

    monkeypatch.setattr(module, "_uniffi_rust_call_async", other)
    state = ffi.accelerate()
    assert state.byte_copy
    assert not state.ready_calls
    assert module._uniffi_rust_call_async is other


def test_another_contract_number_is_left_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._UniffiLib, "ffi_iroh_ffi_uniffi_contract_version", lambda: 31)
    assert "contract 31" in ffi.accelerate().reason


# --- the awaited call, against futures that behave in every way a Rust future can ---

Callback = Callable[[int, int], None]


class FakeFuture:
    """A Rust future seen from Python: polled with a callback, completed once ready, freed exactly once."""

    def __init__(self, *polls: Callable[[Callback, int], None], result: object = "result") -> None:
        self.polls = list(polls)
        self.result = result
        self.freed = 0

    def poll(self, callback: Callback, handle: int) -> None:
        self.polls.pop(0)(callback, handle)


async def replaced_call(future: FakeFuture) -> object:
    original: Any = importlib.import_module("iroh.iroh_ffi")._uniffi_rust_call_async

    async def same_signature(
        rust_future: Any, ffi_poll: Any, ffi_complete: Any, ffi_free: Any, lift_func: Any, error_ffi_converter: Any
    ) -> None: ...

    assert original is not same_signature
    fake: Any = SimpleNamespace(
        _UniffiLib=SimpleNamespace(ffi_iroh_ffi_uniffi_contract_version=lambda: 30),
        _uniffi_rust_call_async=same_signature,
        _UNIFFI_RUST_FUTURE_POLL_READY=READY,
        _uniffi_rust_call_with_error=lambda converter, complete, future: complete(future),
        _UNIFFI_RUST_FUTURE_CONTINUATION_CALLBACK=lambda function: function,
    )

    def free(future: FakeFuture) -> None:
        future.freed += 1

    call = ffi._ready_calls(fake)
    return await call(future, FakeFuture.poll, lambda f: f.result, free, lambda value: value, None)


def at_once(code: int) -> Callable[[Callback, int], None]:
    return lambda callback, handle: callback(handle, code)


def from_a_thread(code: int, *, wait: bool) -> Callable[[Callback, int], None]:
    """Answers from another thread, during the poll (``wait``) or at any time."""

    def poll(callback: Callback, handle: int) -> None:
        thread = threading.Thread(target=callback, args=(handle, code))
        thread.start()
        if wait:
            thread.join()

    return poll


def later(code: int) -> Callable[[Callback, int], None]:
    """Answers on the loop's thread, but after the poll has returned."""

    def poll(callback: Callback, handle: int) -> None:
        asyncio.get_running_loop().call_soon(callback, handle, code)

    return poll


@pytest.mark.parametrize(
    "polls",
    [
        [at_once(READY)],
        [at_once(MAYBE_READY), at_once(READY)],
        [from_a_thread(READY, wait=True)],
        [from_a_thread(MAYBE_READY, wait=False), from_a_thread(READY, wait=False)],
        [later(READY)],
        [later(MAYBE_READY), at_once(MAYBE_READY), from_a_thread(READY, wait=True)],
        [at_once(MAYBE_READY)] * 200 + [at_once(READY)],
    ],
    ids=["at once", "polled twice", "thread in poll", "thread later", "own thread later", "mixed", "long"],
)
def test_an_answer_is_found_whenever_and_wherever_it_comes(polls: list[Callable[[Callback, int], None]]) -> None:
    future = FakeFuture(*polls)
    assert asyncio.run(asyncio.wait_for(replaced_call(future), 10)) == "result"
    assert future.freed == 1
    assert not future.polls


def test_a_future_woken_by_the_poll_of_another_is_not_forgotten() -> None:
    woken: list[tuple[Callback, int]] = []

    async def scenario() -> None:
        sleeper = FakeFuture(lambda callback, handle: woken.append((callback, handle)), at_once(READY))
        sleeping = asyncio.ensure_future(replaced_call(sleeper))
        await asyncio.sleep(0)

        def wakes_the_sleeper(callback: Callback, handle: int) -> None:
            woken[0][0](woken[0][1], MAYBE_READY)
            callback(handle, READY)

        assert await replaced_call(FakeFuture(wakes_the_sleeper)) == "result"
        assert await asyncio.wait_for(sleeping, 10) == "result"

    asyncio.run(scenario())


def test_answers_that_are_always_there_do_not_starve_other_tasks() -> None:
    async def scenario() -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        await replaced_call(FakeFuture(*[at_once(MAYBE_READY)] * 320, at_once(READY)))
        task.cancel()
        assert turns >= 9

    asyncio.run(scenario())


def test_a_cancelled_call_frees_its_future_and_a_late_answer_is_ignored() -> None:
    pending: list[tuple[Callback, int]] = []

    async def scenario() -> None:
        future = FakeFuture(lambda callback, handle: pending.append((callback, handle)))
        task = asyncio.ensure_future(replaced_call(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert future.freed == 1
        pending[0][0](pending[0][1], READY)
        pending[0][0](pending[0][1], READY)
        await asyncio.sleep(0)

    asyncio.run(scenario())


def test_an_answer_after_the_loop_has_closed_is_ignored() -> None:
    pending: list[tuple[Callback, int]] = []

    async def scenario() -> None:
        future = FakeFuture(lambda callback, handle: pending.append((callback, handle)))
        task = asyncio.ensure_future(replaced_call(future))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(scenario())
    thread = threading.Thread(target=pending[0][0], args=(pending[0][1], READY))
    thread.start()
    thread.join()
