"""What a peer says of a model is compared with our own model, entry by entry, before anything is applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from distro_optim.compress import CompressedTensor, CompressedUpdate, ParamSpec, make_plan
from distro_optim.errors import ProtocolError
from distro_optim.testing.updates import random_update, same_update

CPU = torch.device("cpu")
PLAN = make_plan(
    [ParamSpec((16, 24), torch.float32, CPU, 0, 8, 4), ParamSpec((20,), torch.float32, CPU, 0, 8, 4)], "padded"
)


def honest(*, quantized: bool = False) -> list[CompressedTensor]:
    return random_update(PLAN, quantized=quantized, seed=1).tensors()


def with_index(position: int, value: int) -> Callable[[CompressedTensor], CompressedTensor]:
    def change(entry: CompressedTensor) -> CompressedTensor:
        index = entry.index.long().clone()
        index.view(-1)[position] = value
        return replace(entry, index=index)

    return change


def with_value(value: float) -> Callable[[CompressedTensor], CompressedTensor]:
    def change(entry: CompressedTensor) -> CompressedTensor:
        values = entry.value.clone()
        values.view(-1)[3] = value
        return replace(entry, value=values)

    return change


def twice(entry: CompressedTensor) -> CompressedTensor:
    index = entry.index.clone()
    index[..., 1] = index[..., 0]
    return replace(entry, index=index)


# Each is one attack on the first entry.
ATTACKS: dict[str, tuple[Callable[[CompressedTensor], CompressedTensor], str]] = {
    "an index beyond its tile": (with_index(5, 64), "64"),
    "a negative index": (with_index(5, -1), "-1"),
    "an index that is legal modulo 2^32": (with_index(5, (1 << 32) + 3), "4294967299"),
    "an index that is legal modulo 2^32, negative": (with_index(5, 3 - (1 << 32)), "-4294967293"),
    "a position named twice in a tile": (twice, "twice"),
    "a value that is not a number": (with_value(torch.nan), "finite"),
    "an infinite value": (with_value(-torch.inf), "finite"),
    "another encoded shape of the same size": (lambda e: replace(e, shape=(3, 2, 8, 8)), "shape"),
    "an encoded shape without a tile's dimensions": (lambda e: replace(e, shape=(6, 64)), "shape"),
    "another totalk": (lambda e: replace(e, totalk=65), "65"),
    "fewer coefficients than agreed": (
        lambda e: replace(e, index=e.index[..., :3], value=e.value[..., :3]),
        "tiles of 4",
    ),
    "more coefficients than agreed": (
        lambda e: replace(e, index=torch.cat([e.index] * 2, -1), value=torch.cat([e.value] * 2, -1)),
        "tiles of 4",
    ),
    "the coefficients of fewer tiles": (lambda e: replace(e, index=e.index[:1], value=e.value[:1]), "tiles of 4"),
    "fewer values than indices": (lambda e: replace(e, value=e.value[..., :3]), "indices"),
    "no dimensions": (
        lambda e: replace(e, index=torch.zeros((), dtype=torch.int32), value=torch.zeros(())),
        "tiles of 4",
    ),
    "floats for indices": (lambda e: replace(e, index=e.index.float()), "float32"),
    "bools for indices": (lambda e: replace(e, index=e.index > 3), "bool"),
    "complex numbers for indices": (lambda e: replace(e, index=e.index.to(torch.complex64)), "complex64"),
    "a value beyond the tensor's type": (
        lambda e: replace(e, value=torch.full_like(e.value.double(), 1e300)),
        "finite",
    ),
    "whole numbers for values": (lambda e: replace(e, value=e.value.to(torch.int32)), "int32"),
    "signs among values": (lambda e: replace(e, value=e.value < 0), "mixes"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_update_is_made_of(attack: str) -> None:
    change, message = ATTACKS[attack]
    first, *rest = honest()
    with pytest.raises(ProtocolError, match=message):
        CompressedUpdate.from_tensors(PLAN, [change(first), *rest])


@pytest.mark.parametrize("quantized", [True, False])
def test_an_honest_update_passes(quantized: bool) -> None:
    update = random_update(PLAN, quantized=quantized, seed=1)
    assert same_update(CompressedUpdate.from_tensors(PLAN, update.tensors()), update)


def test_another_number_of_tensors_is_refused() -> None:
    for entries in (honest()[:1], honest() * 2, []):
        with pytest.raises(ProtocolError, match="the model has 2"):
            CompressedUpdate.from_tensors(PLAN, entries)


def test_tensors_in_another_order_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"tensors\[0\]"):
        CompressedUpdate.from_tensors(PLAN, honest()[::-1])


def test_indices_of_every_integer_type_are_understood() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        entries = [replace(e, index=e.index.to(dtype)) for e in honest()]
        assert same_update(CompressedUpdate.from_tensors(PLAN, entries), random_update(PLAN, quantized=False, seed=1))


def test_a_tensor_left_out_needs_no_particular_type_of_value() -> None:
    empty = CompressedUpdate.empty(PLAN, quantized=False).tensors()
    update = CompressedUpdate.from_tensors(PLAN, [honest(quantized=True)[0], empty[1]])
    assert update.present == (True, False)
    assert update.quantized


@pytest.mark.parametrize("quantized", [True, False])
def test_an_update_in_which_nobody_speaks_stays_what_it_was(quantized: bool) -> None:
    empty = CompressedUpdate.empty(PLAN, quantized=quantized)
    assert same_update(CompressedUpdate.from_tensors(PLAN, empty.tensors()), empty)


def test_what_an_absent_tensor_holds_is_not_looked_at() -> None:
    update = random_update(PLAN, quantized=False, present=[False, True])
    home = PLAN.home[0]
    assert home is not None
    start, stop = PLAN.batches[home].ranges[0]
    update.index[home][start:stop] = -7
    update.value[home][start:stop] = torch.nan
    update.check()


def test_the_caller_keeps_what_it_gave() -> None:
    entries = honest()
    before = [e.value.clone() for e in entries]
    update = CompressedUpdate.from_tensors(PLAN, entries)
    for value in update.value:
        value.zero_()
    assert all(torch.equal(e.value, b) for e, b in zip(entries, before, strict=True))


def test_values_of_another_float_type_are_cast() -> None:
    entries = honest()
    wider = [replace(e, value=e.value.double()) for e in entries]
    update = CompressedUpdate.from_tensors(PLAN, wider)
    for ours, theirs in zip(update.tensors(), entries, strict=True):
        assert ours.value.dtype == theirs.value.dtype
        assert torch.equal(ours.value, theirs.value)
