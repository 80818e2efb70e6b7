"""Results of a known layout take a shortcut through the codec: what comes out is what the general codec makes."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from distro_optim.compress.distinct import has_repeats
from distro_optim.compress.wire import ENTRY_OVERHEAD, EXPANSION, decode_download
from distro_optim.compress.wire_bulk import decode_bulk_download, encode_bulk_download
from distro_optim.compress.wire_layout import MAX_INCOMPLETE, KnownLayouts
from distro_optim.coordinator.types import BatchId
from distro_optim.errors import ConfigurationError, InvalidResultError, ProtocolError, TruncatedError
from distro_optim.strategy.rounds.results import (
    ReceivedResult,
    commitment_hash,
    encode_any_result,
    encode_own_result,
    encode_result,
    read_any_result,
    read_result,
)
from distro_optim.testing.updates import random_update

CPU = torch.device("cpu")
STEP, NONCE, BATCH = 7, 2, BatchId(16, 19)
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (17,),
    (130,),
    (64, 48),
    (200, 130),
    (13, 7),
    (5, 3, 3, 3),
    (0, 4),
    (2, 3, 8, 6),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Longest side of a tile, and coefficients kept: indices of 1, 2 and 4 bytes, signs that fill their last byte and not.
SETTINGS = [(4, 3), (16, 8), (64, 8), (64, 33), (300, 5)]


@st.composite
def plans(draw: st.DrawFn) -> TilePlan:
    groups = draw(st.lists(st.sampled_from(SETTINGS), min_size=1, max_size=2))
    chosen = draw(
        st.lists(
            st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.integers(0, len(groups) - 1)), max_size=6
        )
    )
    specs = [ParamSpec(shape, dtype, CPU, group, *groups[group]) for shape, dtype, group in chosen]
    return make_plan(specs, draw(st.sampled_from(["divisor", "padded"])))


@st.composite
def updates(draw: st.DrawFn) -> CompressedUpdate:
    """Some have no word about a tensor, some have values of another type than the tensor."""
    plan = draw(plans())
    present = [True] * len(plan)
    if draw(st.booleans()):
        present = draw(st.lists(st.booleans(), min_size=len(plan), max_size=len(plan)))
    update = random_update(plan, quantized=draw(st.booleans()), present=present, seed=draw(st.integers(0, 99)))
    if not update.quantized:
        for value in update.value:
            value.view(-1)[0] = draw(st.sampled_from([0.0, -0.0, 1e-45, -6e-8, 1.5]))
        if draw(st.integers(0, 4)) == 0:
            wide = draw(st.sampled_from(DTYPES))
            return replace(update, value=tuple(value.to(wide) for value in update.value))
    return update


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def outcome(read: Callable[[], ReceivedResult]) -> tuple[Any, ...]:
    """All that can be seen of a result, or of why there is none."""
    try:
        result = read()
    except ProtocolError as error:
        return type(error), str(error)
    update = result.update
    return result.trainer_nonce, update.present, list(map(bits, update.index)), list(map(bits, update.value))


def both(data: bytes, plan: TilePlan, data_hash: bytes) -> tuple[Any, ...]:
    """What both ways of reading make of ``data``; they agree."""
    quick, plain = (
        outcome(partial(read, data, step=STEP, batch=BATCH, data_hash=data_hash, plan=plan))
        for read in (read_result, read_any_result)
    )
    assert quick == plain
    return quick


def hash_of(data: bytes, plan: TilePlan) -> bytes:
    """What a liar would announce to get ``data`` past the commitment, wherever it can be."""
    try:
        return commitment_hash(decode_download(data, max_results=max(1, len(plan))))
    except ProtocolError:
        return bytes(32)


def encoded(update: CompressedUpdate) -> tuple[bytes, bytes]:
    return encode_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH)


def has_layout(update: CompressedUpdate) -> bool:
    """Whether its values are signs or of their tensors' types."""
    return update.quantized or all(
        value.dtype == batch.value_dtype for batch, value in zip(update.plan.batches, update.value, strict=True)
    )


# -- the same bytes, the same meaning -------------------------------------------------------------------------------


@pytest.mark.slow
@given(update=updates())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_both_codecs_write_the_same_bytes_and_read_the_same_update(update: CompressedUpdate) -> None:
    blob, data_hash = encoded(update)
    assert (blob, data_hash) == encode_any_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH)
    assert both(blob, update.plan, data_hash)[0] == NONCE
    # Both a peer that has sent such a result itself, and one that has not.
    assert (decode_bulk_download(blob, update.plan) is not None) == has_layout(update)
    stranger = replace(update.plan)
    assert stranger.derived(KnownLayouts) is not update.plan.derived(KnownLayouts)
    assert both(blob, stranger, data_hash) == both(blob, update.plan, data_hash)


@pytest.mark.slow
@given(update=updates())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_we_apply_of_our_own_is_bit_for_bit_what_peers_read(update: CompressedUpdate) -> None:
    own = encode_own_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH, plan=update.plan)
    assert (own.blob, own.data_hash) == encode_any_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH)
    assert outcome(lambda: own.result) == both(own.blob, update.plan, own.data_hash)


@pytest.mark.slow
@given(
    update=updates(),
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 1 << 20)),
    tail=st.binary(max_size=3),
    honest_hash=st.booleans(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_bytes_come_to_the_same_result_or_the_same_error(
    update: CompressedUpdate, flips: list[tuple[int, int]], cut: int | None, tail: bytes, honest_hash: bool
) -> None:
    blob, data_hash = encoded(update)
    data = bytearray(blob)
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    data = data[: None if cut is None else cut % len(data)] + tail
    both(bytes(data), update.plan, data_hash if honest_hash else hash_of(bytes(data), update.plan))


@pytest.mark.slow
@given(update=updates(), plan=plans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_result_of_another_model_comes_to_the_same_error(update: CompressedUpdate, plan: TilePlan) -> None:
    blob, data_hash = encoded(update)
    both(blob, plan, data_hash)


@given(data=st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_come_to_the_same_error(data: bytes) -> None:
    plan = make_plan([ParamSpec((8,), torch.float32, CPU, 0, 8, 2)], "divisor")
    for start in (b"", bytes.fromhex("0007021013"), bytes.fromhex("000702101301")):
        both(start + data, plan, hash_of(start + data, plan))


# -- every single byte ----------------------------------------------------------------------------------------------

SMALL = make_plan(
    [
        ParamSpec((16, 24), torch.float32, CPU, 0, 8, 4),
        ParamSpec((), torch.float32, CPU, 0, 8, 4),
        ParamSpec((20,), torch.float32, CPU, 0, 8, 3),
        ParamSpec((0, 3), torch.float32, CPU, 0, 8, 4),
    ],
    "padded",
)
COMPLETE = (True, True, True, False)  # the last one has no elements
MASKS = [None, [True, False, True, True], [False, True, False, True], [False] * 4]


@pytest.mark.parametrize("present", MASKS)
@pytest.mark.parametrize("quantized", [True, False])
def test_every_byte_of_a_result_means_the_same_to_both(quantized: bool, present: list[bool] | None) -> None:
    blob, data_hash = encoded(random_update(SMALL, quantized=quantized, present=present, seed=1))
    kept = 0
    for position in range(len(blob)):
        data = bytearray(blob)
        data[position] ^= 1 << position % 8
        kept += both(bytes(data), SMALL, hash_of(bytes(data), SMALL))[0] == NONCE
        both(bytes(data), SMALL, data_hash)
    assert kept > 0  # values and indices that are as good as others


@pytest.mark.parametrize("quantized", [True, False])
def test_every_truncation_is_noticed(quantized: bool) -> None:
    blob, data_hash = encoded(random_update(SMALL, quantized=quantized, seed=1))
    for length in range(len(blob)):
        assert both(blob[:length], SMALL, data_hash)[0] is TruncatedError


def test_a_result_that_announces_fewer_tensors_than_it_holds_is_refused() -> None:
    blob, data_hash = encoded(random_update(SMALL, quantized=True, seed=1))
    start = bytes.fromhex("0007021013")
    assert blob.startswith(start + bytes([len(SMALL)]))
    for count in range(len(SMALL)):
        data = start + bytes([count]) + blob[len(start) + 1 :]
        assert both(data, SMALL, hash_of(data, SMALL))[0] is InvalidResultError
        both(data, SMALL, data_hash)


def test_bytes_after_the_end_are_passed_over_as_psyche_does() -> None:
    blob, data_hash = encoded(random_update(SMALL, quantized=True, seed=1))
    assert both(blob + b"more", SMALL, data_hash) == both(blob, SMALL, data_hash)
    assert both(blob, SMALL, data_hash)[0] == NONCE


def test_set_bits_in_the_padding_of_signs_are_another_spelling_of_the_same() -> None:
    plan = make_plan([ParamSpec((), torch.float32, CPU, 0, 8, 4), ParamSpec((), torch.float32, CPU, 0, 8, 4)], "padded")
    blob, data_hash = encoded(random_update(plan, quantized=True, seed=1))
    layout = plan.derived(KnownLayouts).of((True, True), quantized=True)
    assert layout is not None
    (batch,) = layout.batches
    results = memoryview(spelled := bytearray(blob))[len(blob) - layout.size :]
    for signs in batch.from_value(results):
        signs[0] |= 0xFE
    download = decode_bulk_download(bytes(spelled), plan)
    assert download is not None
    assert commitment_hash(download) != data_hash
    assert both(bytes(spelled), plan, commitment_hash(download)) == both(blob, plan, data_hash)


# -- attacks on the data, under a hash that fits ---------------------------------------------------------------------


def beyond_its_tile(update: CompressedUpdate) -> None:
    update.index[0][5, 1] = update.plan.batches[0].tile_size


def largest_that_travels(update: CompressedUpdate) -> None:
    update.index[0][5, 1] = -1


def named_twice(update: CompressedUpdate) -> None:
    update.index[0][5, 1] = update.index[0][5, 3]


def named_twice_in_the_last_tile(update: CompressedUpdate) -> None:
    update.index[-1][-1, 0] = update.index[-1][-1, -1]


def not_a_number(update: CompressedUpdate) -> None:
    update.value[0][5, 1] = torch.nan


def negative_not_a_number(update: CompressedUpdate) -> None:
    update.value[-1][-1, -1] = -torch.tensor(torch.nan)


def infinite(update: CompressedUpdate) -> None:
    update.value[0][5, 1] = -torch.inf


ATTACKED = make_plan(
    [ParamSpec((48, 40), torch.float32, CPU, 0, 20, 18), ParamSpec((37,), torch.bfloat16, CPU, 0, 10, 4)], "padded"
)
ON_INDICES = [beyond_its_tile, largest_that_travels, named_twice, named_twice_in_the_last_tile]
ON_VALUES = [not_a_number, negative_not_a_number, infinite]


@pytest.mark.parametrize(
    ("attack", "quantized"), [(a, q) for a in ON_INDICES for q in (True, False)] + [(a, False) for a in ON_VALUES]
)
def test_no_update_is_made_of_data_with_something(attack: Callable[[CompressedUpdate], None], quantized: bool) -> None:
    update = random_update(ATTACKED, quantized=quantized, seed=1)
    attack(update)
    blob, data_hash = encoded(update)
    download = decode_bulk_download(blob, ATTACKED)
    assert download is not None
    assert download.to_update() is None
    assert both(blob, ATTACKED, data_hash)[0] is InvalidResultError
    with pytest.raises(InvalidResultError):
        encode_own_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH, plan=ATTACKED)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_result_of_another_step_batch_or_hash_is_refused(quantized: bool) -> None:
    blob, data_hash = encoded(random_update(SMALL, quantized=quantized, seed=1))
    for step, batch, announced, message in (
        (8, BATCH, data_hash, "announced for 8"),
        (STEP, BatchId(16, 20), data_hash, "announced for 7"),
        (STEP, BATCH, bytes(32), "hash"),
    ):
        with pytest.raises(ProtocolError, match=message):
            read_result(blob, step=step, batch=batch, data_hash=announced, plan=SMALL)


@pytest.mark.parametrize(
    "fields",
    [{"step": 1 << 32}, {"step": -1}, {"trainer_nonce": 1 << 32}, {"batch_id": (0, 1 << 64)}, {"batch_id": (2, 1)}],
)
def test_a_number_that_does_not_fit_its_field_is_refused(fields: dict[str, Any]) -> None:
    update = random_update(SMALL, quantized=True)
    with pytest.raises(ConfigurationError):
        encode_bulk_download(update, **dict[str, Any](step=0, trainer_nonce=0, batch_id=(0, 0)) | fields)


def test_a_plan_that_does_not_fit_the_wire_has_no_layouts() -> None:
    too_many = make_plan([ParamSpec((65536,), torch.float32, CPU, 0, 1, 1)], "padded")
    assert too_many.derived(KnownLayouts).of((True,), quantized=True) is None
    with pytest.raises(ConfigurationError, match="65535 tiles"):
        encoded(random_update(too_many, quantized=True))
    no_number = make_plan([ParamSpec((8,), torch.complex64, CPU, 0, 8, 2)], "padded")
    assert no_number.derived(KnownLayouts).of((True,), quantized=False) is None
    assert no_number.derived(KnownLayouts).of((True,), quantized=True) is not None


# -- manners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [True, False])
def test_an_own_result_shares_no_memory_with_the_update(quantized: bool) -> None:
    update = random_update(SMALL, quantized=quantized, seed=1)
    own = encode_own_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH, plan=SMALL)
    before = outcome(lambda: own.result)
    for tensor in (*update.index, *update.value):
        tensor.zero_()
    assert outcome(lambda: own.result) == before
    for tensor in (*own.result.update.index, *own.result.update.value):
        tensor.zero_()  # may be written to, as that of any update
    assert both(own.blob, SMALL, own.data_hash) == before


def test_an_own_result_is_read_on_the_plan_that_is_asked_for() -> None:
    update = random_update(SMALL, quantized=True, seed=1)
    same = make_plan(SMALL.specs, "padded")
    own = encode_own_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH, plan=same)
    assert own.result.update.plan is same
    other = make_plan(SMALL.specs[:1], "padded")
    with pytest.raises(ProtocolError):
        encode_own_result(update, step=STEP, trainer_nonce=NONCE, batch=BATCH, plan=other)


def test_layouts_are_made_once_per_plan() -> None:
    plan = make_plan(SMALL.specs, "padded")
    layouts = plan.derived(KnownLayouts)
    assert plan.derived(KnownLayouts) is layouts
    for present in (COMPLETE, (True, False, True, False)):
        assert layouts.of(present, quantized=True) is layouts.of(present, quantized=True)
        assert layouts.of(present, quantized=True) is not layouts.of(present, quantized=False)
    assert plan == make_plan(SMALL.specs, "padded")


def test_strangers_have_no_say_in_which_layouts_are_known() -> None:
    plan = make_plan(SMALL.specs, "padded")
    silent = random_update(SMALL, quantized=True, present=[True, False, True, False])
    blob, data_hash = encoded(silent)
    for _ in range(2):
        assert both(blob, plan, data_hash)[:2] == (NONCE, silent.present)
        assert decode_bulk_download(blob, plan) is None
    encoded(replace(silent, plan=plan))
    assert decode_bulk_download(blob, plan) is not None
    assert both(blob, plan, data_hash)[:2] == (NONCE, silent.present)


def test_no_more_than_so_many_incomplete_layouts_are_kept() -> None:
    plan = make_plan([ParamSpec((8,), torch.float32, CPU, 0, 8, 2)] * 6, "padded")
    layouts = plan.derived(KnownLayouts)
    masks = [tuple(n == silent for n in range(6)) for silent in range(6)]
    made = [layouts.of(mask, quantized=True) for mask in masks]
    for mask, layout in list(zip(masks, made, strict=True))[-MAX_INCOMPLETE:]:
        assert layouts.of(mask, quantized=True) is layout
    assert layouts.of(masks[0], quantized=True) is not made[0]
    complete = layouts.of((True,) * 6, quantized=True)
    assert layouts.of((True,) * 6, quantized=True) is complete


def test_a_plan_with_layouts_can_be_copied_and_pickled() -> None:
    update = random_update(SMALL, quantized=True, seed=1)
    blob, data_hash = encoded(update)
    for plan in (copy.deepcopy(SMALL), pickle.loads(pickle.dumps(SMALL))):  # noqa: S301
        assert plan == SMALL
        assert both(blob, plan, data_hash) == both(blob, SMALL, data_hash)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("chunk", "topk"), [(16, 64), (64, 8), (64, 64), (300, 64)])
def test_reading_allocates_no_more_than_the_general_decoder_may(chunk: int, topk: int, quantized: bool) -> None:
    plan = make_plan([ParamSpec((1200, 1200), torch.float32, CPU, 0, chunk, topk)], "padded")
    blob, data_hash = encoded(random_update(plan, quantized=quantized))
    both(blob, plan, data_hash)  # the layout is there
    tracemalloc.start()
    result = read_result(blob, step=STEP, batch=BATCH, data_hash=data_hash, plan=plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(blob) < peak <= EXPANSION * len(blob) + ENTRY_OVERHEAD
    assert result.update.present == (True,)


@pytest.mark.slow
@given(
    rows=st_numpy.arrays(
        st.sampled_from([np.uint8, np.uint16, np.uint32, np.int32]),
        st.tuples(st.integers(0, 5), st.integers(1, 40)),
        elements=st.integers(0, 127),
    )
)
def test_repeats_are_found_exactly_where_they_are(rows: np.ndarray[Any, Any]) -> None:
    assert has_repeats(rows) == any(len(set(row)) < len(row) for row in rows.tolist())


@pytest.mark.parametrize("k", [2, 16, 17, 64])
@pytest.mark.parametrize("row", [0, 70_000, 140_001])
def test_one_repeat_among_many_tiles_is_found(k: int, row: int) -> None:
    rows = np.tile(np.arange(k, dtype=np.uint16), (140_002, 1))
    assert not has_repeats(rows)
    rows[row, 0] = k - 1
    assert has_repeats(rows)
