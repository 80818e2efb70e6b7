"""Openings as bytes: what was opened is read again, sizes follow from the plan, and lies about them are refused."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distro_optim.compress import ParamSpec, TilePlan, make_plan
from distro_optim.errors import ConfigurationError, ProtocolError
from distro_optim.verify.momentum import Snapshot, leaf_digest, leaves_of, root_from
from distro_optim.verify.opening import (
    MAX_LEAVES,
    Opening,
    decode_opening,
    encode_opening,
    make_opening,
    max_opening_bytes,
)

SHAPES = ((70, 44), (33,), (), (0, 3), (64, 64))
GPT2 = [(50304, 768), (1024, 768), (768,), (768,)] + 12 * [
    *((768,), (768,), (2304, 768), (2304,), (768, 768), (768,)),
    *((768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)),
]


def plan_of(shapes: list[tuple[int, ...]], chunk: int) -> TilePlan:
    cpu = torch.device("cpu")
    return make_plan([ParamSpec(shape, torch.float32, cpu, 0, chunk, 3) for shape in shapes], "padded")


PLAN = plan_of(list(SHAPES), 16)


def momenta(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    values[0][5:] = 0
    values[4][0, 0] = -0.0
    return values


def opened(leaves: tuple[int, ...] = (0, 3, 7)) -> Opening:
    return make_opening(4, leaves, Snapshot(PLAN, momenta(1)), Snapshot(PLAN, momenta(2)))


def test_an_opening_is_read_as_it_was_written() -> None:
    opening = opened()
    again = decode_opening(encode_opening(opening, PLAN), PLAN)
    assert (again.step, again.leaves) == (opening.step, opening.leaves)
    for read, momentum in zip(again.signs, momenta(1), strict=True):
        assert read.shape == momentum.shape
        assert torch.equal(read, momentum.sign().to(torch.int8))


def test_every_leaf_leads_to_the_root_and_none_in_anothers_place() -> None:
    snapshot, table = Snapshot(PLAN, momenta(1)), leaves_of(PLAN)
    assert len(table) == sum(-(-batch.tiles // 4) for batch in PLAN.batches)
    for number in range(len(table)):
        assert len(snapshot.leaf(number)) == table.size(number)
        assert len(snapshot.path(number)) == table.depth
        digest = leaf_digest(number, snapshot.leaf(number))
        assert root_from(digest, number, snapshot.path(number)) == snapshot.root
        assert root_from(leaf_digest(number + 1, snapshot.leaf(number)), number, snapshot.path(number)) != snapshot.root
    assert {table.holding(e) for e in range(table.elements_before[-1])} == set(range(len(table)))


def test_one_bit_of_the_momentum_changes_the_root() -> None:
    values = momenta(1)
    before = Snapshot(PLAN, values).root
    values[1][-1] = torch.nextafter(values[1][-1], torch.tensor(9.0))
    assert Snapshot(PLAN, values).root != before


def test_a_snapshot_stays_when_the_momentum_goes_on() -> None:
    values = momenta(1)
    snapshot = Snapshot(PLAN, values)
    leaf = bytes(snapshot.leaf(0))
    for value in values:
        value.fill_(7)
    assert snapshot.leaf(0) == leaf
    assert torch.equal(snapshot.signs()[4], momenta(1)[4].sign().to(torch.int8))


def test_a_snapshot_in_place_of_an_older_one_is_as_good_as_a_new_one() -> None:
    old = Snapshot(PLAN, [torch.full_like(value, 5.0) for value in momenta(1)])
    tiles = old.tiles
    new = Snapshot(PLAN, momenta(2), in_place_of=old)
    assert new.tiles is tiles
    assert new.root == Snapshot(PLAN, momenta(2)).root


def test_momenta_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="shapes of the plan"):
        Snapshot(PLAN, momenta(1)[1:])


def test_a_large_model_opens_sixteen_leaves_in_twenty_megabytes() -> None:
    plan = plan_of(GPT2, 64)
    assert sum(torch.Size(shape).numel() for shape in GPT2) > 124_000_000
    assert max_opening_bytes(plan, leaves=16) < 20_000_000


def test_zeros_without_any_order_do_not_fit() -> None:
    plan = plan_of([(512, 1024)], 64)
    noise = torch.randint(0, 2, (512, 1024), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    with pytest.raises(ConfigurationError, match="has room for"):
        encode_opening(Opening(1, (), (noise,)), plan)


def lies() -> Iterator[tuple[str, bytes]]:
    opening = opened()
    good = encode_opening(opening, PLAN)
    first, second, third = opening.leaves
    yield "nothing", b""
    yield "cut", good[:-1]
    yield "longer", good + b"\0"
    yield "another version", b"\2" + good[1:]
    yield "a leaf twice", encode_opening(Opening(4, (first, first), opening.signs), PLAN)
    yield "another order", encode_opening(Opening(4, (second, first, third), opening.signs), PLAN)
    yield "no such leaf", encode_opening(Opening(4, (replace(first, number=99),), opening.signs), PLAN)
    yield "a short leaf", encode_opening(Opening(4, (replace(first, before=first.before[4:]),), opening.signs), PLAN)
    yield "a count without end", good[:5] + b"\xff\xff\xff\xff\x0f" + good[6:]
    size = sum(-(-torch.Size(shape).numel() // 8) for shape in SHAPES)
    for name, packed in (
        ("a bomb", zlib.compress(bytes(1 << 20), 9)),
        ("too few zeros", zlib.compress(bytes(size - 1), 1)),
        ("zeros that go on", zlib.compress(bytes(size), 1)[:-1]),
        ("no zlib", b"\x01\x02\x03"),
    ):
        body = encode_opening(Opening(4, (), opening.signs), PLAN)
        start = 6 + size
        yield name, body[:start] + bytes([len(packed) & 0x7F | 0x80, len(packed) >> 7]) + packed
    yield "larger than any", good + bytes(max_opening_bytes(PLAN, MAX_LEAVES))


def test_lies_about_sizes_are_refused() -> None:
    told = 0
    for name, data in lies():
        with pytest.raises(ProtocolError):
            raise AssertionError(f"{name} was read as {decode_opening(data, PLAN)}")
        told += 1
    assert told == 14


@given(st.binary(max_size=400))
def test_any_bytes_are_an_opening_or_refused(data: bytes) -> None:
    try:
        decode_opening(data, PLAN)
    except ProtocolError:
        pass
