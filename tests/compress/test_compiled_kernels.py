"""The kernels of ``distro-optim[fast]``: the same weights as by torch, and the same momentum but for rounding."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import warm_python
from compress.fast_step import SHAPES, digest, plan_of, updates_of, weights_after
from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate, TilePlan, make_plan
from distro_optim.compress.engine import BlockEngine, blocks
from distro_optim.compress.engine.long_blocks import long_blocks
from distro_optim.compress.engine.looking import finite_in_parts
from distro_optim.compress.exact import oracle
from distro_optim.compress.exact.definition import integer_basis
from distro_optim.compress.fast import engine, loading
from distro_optim.compress.profile import CPU
from distro_optim.optim import planned
from distro_optim.optim.reference import dct_matrix, to_tiles
from distro_optim.optim.rules import PUBLISHED

pytest.importorskip("numba")

FAST, TORCH = "1", "0"
HERE = Path(__file__)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(loading.SETTING, FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def by_torch(monkeypatch: pytest.MonkeyPatch, plan: TilePlan, updates: list[CompressedUpdate]) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setenv(loading.SETTING, TORCH)
        return weights_after(plan, updates)


def kinds_of_merges(optimizer: DisTrO) -> set[str]:
    optimizer.generate()
    engine = optimizer._run.engine
    assert isinstance(engine, BlockEngine)
    return {type(merge).__name__ for merge in engine._merges}


# -- coefficients to weights -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["signs", "values", "extreme"])
@pytest.mark.parametrize(("k", "peers"), [(8, 1), (8, 16), (32, 4), (100, 3)])
@pytest.mark.parametrize("crowded", [False, True])
def test_weights_get_the_bits_of_the_torch_engine(
    monkeypatch: pytest.MonkeyPatch, kind: str, k: int, peers: int, crowded: bool
) -> None:
    for tiling in ("padded", "divisor"):
        plan = plan_of(SHAPES, k, tiling=tiling)
        updates = updates_of(plan, peers, kind, crowded=crowded)
        for ours, theirs in zip(weights_after(plan, updates), by_torch(monkeypatch, plan, updates), strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("kind", ["signs", "extreme"])
def test_so_with_256_contributors_and_small_tiles(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    plan = plan_of(((32, 48), (16, 17)), 64, chunk=16)
    for crowded in (False, True):
        updates = updates_of(plan, 256, kind, crowded=crowded)
        for ours, theirs in zip(weights_after(plan, updates), by_torch(monkeypatch, plan, updates), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["signs", "values"])
def test_weights_move_as_the_oracle_says(kind: str) -> None:
    plan = plan_of(((64, 64),), 8)
    updates = updates_of(plan, 5, kind, absent=False)
    said = []
    for update in updates:
        positions, values = update.index[0][0].tolist(), update.value[0][0]
        numbers = [1 - 2 * int(v) for v in values] if kind == "signs" else values.view(torch.int32).tolist()
        said.append(list(zip(positions, [n & 0xFFFFFFFF if kind == "values" else n for n in numbers], strict=True)))
    means = (oracle.coefficients_of_signs if kind == "signs" else oracle.coefficients_of_values)(said)
    basis = integer_basis(64).astype(object)
    tile = sum(q * np.outer(basis[:, at // 64], basis[:, at % 64]) for at, q in means.items())
    [after] = weights_after(plan, updates)
    [before] = weights_after(plan, [CompressedUpdate.empty(plan, quantized=True)])
    wanted = before - torch.tensor(np.sign(tile).astype(np.float32)) * torch.tensor(1e-3, dtype=torch.float32)
    assert torch.equal(after, wanted)


def exact_tile(positions: Sequence[int], values: Sequence[float], h: int, w: int) -> Any:
    """``(h, w)`` of Python's integers."""
    down, along = integer_basis(h).astype(object), integer_basis(w).astype(object)
    terms = zip(positions, values, strict=True)
    return sum(int(q) * np.outer(down[:, at // w], along[:, at % w]) for at, q in terms)


def doubtful_tiles(h: int, w: int) -> Iterator[tuple[str, list[int], list[float]]]:
    """Coefficients by name, of which single precision alone would not tell all signs."""
    r = np.random.default_rng(3)
    many = r.permutation(h * w)[:300].tolist()
    yield "random", many, r.integers(-4096, 4097, 300).tolist()
    low = min(h, w) // 2
    pairs = [(a, b) for a in range(low) for b in range(a + 1, low)][:60]
    # Opposite at mirrored frequencies: where rows are columns, and where they are not, all of a diagonal is 0.
    yield "a diagonal of zeros", [at for a, b in pairs for at in (a * w + b, b * w + a)], [2520, -2520] * len(pairs)
    # Sums of frequencies that cancel out for every row or column that one of them mirrors.
    evens = [a * w for a in range(0, h, 2)] + [a * w + 1 for a in range(0, h, 2)]
    yield "small beside large", evens, [4096.0 if n % 2 else -1.0 for n in range(len(evens))]
    yield "next to nothing", many, [1.0, -1.0] * 150
    yield "nothing", many, [0.0] * 300


@pytest.mark.parametrize(("h", "w"), [(64, 64), (43, 64), (64, 43), (48, 48)])
@pytest.mark.parametrize("left", [0, 10**6], ids=["all of a tile again", "one by one"])
def test_signs_that_single_precision_does_not_prove_are_summed_in_integers(
    monkeypatch: pytest.MonkeyPatch, h: int, w: int, left: int
) -> None:
    from distro_optim.compress.fast import filtering
    from distro_optim.compress.fast.decoding import FILLED, PITCH, decode
    from distro_optim.compress.fast.vectors import LANES

    # As Python: what is compiled takes constants as they were.
    again = 0

    def counted(*args: Any) -> None:
        nonlocal again
        again += args[5].dtype == np.float64
        decode(*args)

    monkeypatch.setattr(filtering, "decode", counted)
    monkeypatch.setattr(filtering, "_doubtful", doubtful)
    monkeypatch.setattr(filtering, "lowest", lambda mask: (mask & -mask).bit_length() - 1)
    monkeypatch.setattr(filtering, "poke", lambda at, offset, x: floats_at(at).__setitem__(offset, x))
    monkeypatch.setattr(filtering, "_FEWEST", left)
    monkeypatch.setattr(filtering, "_TERMS", 0)
    bases = [engine._exact_basis(n) for n in (h, w)]
    fast_bases = [basis.astype(np.float32) for basis in bases]
    out, rows = np.full(64 * 64, np.nan, np.float32), np.empty(64 * PITCH)
    frequency, filled, least = np.empty(64, np.int64), np.empty(FILLED, np.int64), np.empty(LANES, np.float32)
    summed = {}
    for name, positions, values in doubtful_tiles(h, w):
        at, q = np.array(positions, np.int32), np.array(values, np.float64)
        again, args = 0, (at, q, len(at), h, w, *bases, *fast_bases)
        address = out.ctypes.data
        found = filtering.decode_signs.py_func(*args, rows.ctypes.data, frequency, filled, address, address, least)
        assert found is (name != "nothing")
        if found:
            wanted = np.sign(exact_tile(positions, values, h, w)).astype(np.float32)
            assert np.array_equal(np.sign(out.reshape(64, 64)[:h, :w]), wanted), name
        summed[name] = again
    assert any(summed.values()) is (left == 0)


def floats_at(address: int) -> Any:
    """A tile's memory, as an array."""
    return np.ctypeslib.as_array((ctypes.c_float * (64 * 64)).from_address(address))


def doubtful(tile: int, offset: int, bound: float) -> int:
    """``filtering._doubtful`` in Python."""
    from distro_optim.compress.fast.vectors import LANES

    numbers = floats_at(tile)[offset : offset + LANES]
    return sum(1 << lane for lane, x in enumerate(numbers) if not abs(x) > bound)


def test_compiled_and_interpreted_filters_agree_which_elements_are_doubtful() -> None:
    from numba import njit

    from distro_optim.compress.fast import filtering
    from distro_optim.compress.fast.vectors import LANES

    compiled = njit(lambda tile, offset, bound: filtering._doubtful(tile, offset, bound))
    tile = np.random.default_rng(1).standard_normal(64 * 64).astype(np.float32)
    tile[:4] = [0.5, -0.5, 0.0, -0.0]
    for offset in range(0, 64 * 64, LANES):
        bound = np.float32(0.5)
        assert compiled(tile.ctypes.data, offset, bound) == doubtful(tile.ctypes.data, offset, 0.5)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_long_blocks_hold_the_same_tiles(workers: int) -> None:
    for count in (1, 7, 16, 24, 100):
        batch = plan_of(((64 * count, 64),)).batches[0]
        [block] = batch.blocks
        long = long_blocks([replace(block, start=start, stop=start + 1) for start in range(count)], workers)
        assert [tile for own in long for tile in range(own.start, own.stop)] == list(range(count))
        assert sum(len(own.pieces) for own in long) == count
        assert all(own.tiles <= 2 for own in long)
        # Enough of them for all, the last of them short.
        assert len(long) >= min(count, 4 * workers)
        assert all(own.tiles == 1 for own in long[-(count // 4) :])
        if count >= 16 * workers:
            assert len(long) < 0.7 * count


@pytest.mark.parametrize("settings", [{}, {"overlap": False}, {"overlap": False, "quantize_1bit": False}], ids=str)
def test_a_step_in_long_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    taken: list[int] = []

    def trained(block_elements: int) -> list[Tensor]:
        profile = replace(CPU, block_elements=block_elements)
        monkeypatch.setattr(planned, "make_plan", partial(make_plan, profile=lambda device: profile))
        r = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=r)) for shape in ((1024, 192), (640, 130), (9, 64))]
        optimizer = DisTrO(params, lr=1e-2, **settings, **PUBLISHED)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=r)
            optimizer.step()
        return [param.detach().clone() for param in params]

    def seen(blocks: Any, workers: int) -> Any:
        long = long_blocks(blocks, workers)
        taken.append(len(blocks) - len(long))
        return long

    wanted = trained(CPU.block_elements)
    monkeypatch.setattr(blocks, "long_blocks", seen)
    for mine, theirs in zip(trained(64 * 64), wanted, strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
    assert max(taken) > 0


def test_signs_of_some_and_values_of_others_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(SHAPES)
    updates = [*updates_of(plan, 2, "signs"), *updates_of(plan, 3, "values")]
    for ours, theirs in zip(weights_after(plan, updates), by_torch(monkeypatch, plan, updates), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_weights_that_changed_are_not_differentiated_through() -> None:
    weight = torch.nn.Parameter(torch.ones(128, 128))
    optimizer = DisTrO([weight], overlap=False, quantize_1bit=True, **PUBLISHED)
    loss = (weight**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- gradients to coefficients -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 8, 12, 13, 32, 128])
@pytest.mark.parametrize("shape", [(128, 192), (100, 43), (86, 86)])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_largest_coefficients_of_a_float64_transform_are_sent(
    k: int, shape: tuple[int, int], overlap: bool
) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(k))
    optimizer = DisTrO([weight], lr=0.5, compression_topk=k, overlap=overlap, quantize_1bit=False, **PUBLISHED)
    [sent] = optimizer.generate().tensors()
    tiles = to_tiles(weight.grad.double() * 0.5, 64, "padded")
    down, along = (dct_matrix(side, tiles) for side in tiles.shape[1:])
    coefficients = torch.einsum("nij,ia,jb->nab", tiles, down, along).flatten(1)
    index, value = sent.index.view(len(tiles), k).long(), sent.value.view(len(tiles), k).double()
    assert all(len(set(row)) == k for row in index.tolist())
    assert torch.allclose(coefficients.gather(1, index), value, rtol=0, atol=1e-5)
    smallest = coefficients.abs().topk(k, dim=1).values[:, -1:]
    assert bool((value.abs() >= smallest - 1e-5).all())


def test_equals_zeros_and_negative_zeros_are_chosen_once_each() -> None:
    weight = torch.nn.Parameter(torch.zeros(128, 107))
    optimizer = DisTrO([weight], overlap=False, quantize_1bit=False, compression_topk=32, **PUBLISHED)
    for grad in (torch.zeros(128, 107), torch.full((128, 107), -0.0), torch.eye(128, 107)):
        weight.grad = grad
        [sent] = optimizer.generate().tensors()
        for row in sent.index.view(-1, 32).tolist():
            assert len(set(row)) == 32
            assert min(row) >= 0
            assert max(row) < sent.totalk


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap": False, "quantize_1bit": False},
        {"overlap": False, "quantize_1bit": True, "compression_topk": 32},
        {"overlap": True, "quantize_1bit": True},
        {"overlap": True, "quantize_1bit": False, "tiling": "divisor", "compression_topk": 32},
    ],
)
def test_peers_with_and_without_kernels_keep_equal_weights(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """With lookahead, gradients that are missing or not finite at times, and steps that are not sent."""
    r = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=r) for shape in SHAPES]
    models = [[torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2)]
    peers = [DisTrO(model, lr=1e-2, weight_decay=0.1, **settings, **PUBLISHED) for model in models]
    for step in range(5):
        grads = [torch.randn(shape, generator=r) for shape in SHAPES]
        sent = []
        for peer, model, setting in zip(peers, models, (FAST, TORCH), strict=True):
            monkeypatch.setenv(loading.SETTING, setting)
            if settings["overlap"]:
                peer.lookahead()
            for number, (param, grad) in enumerate(zip(model, grads, strict=True)):
                param.grad = None if number == step % 3 else grad.clone()
            if step == 3 and model[1].grad is not None:
                model[1].grad[0, 0] = torch.inf
            sent.append(peer.generate())
        for peer, setting in zip(peers, (FAST, TORCH), strict=True):
            monkeypatch.setenv(loading.SETTING, setting)
            peer.apply(sent)
            if step == 2:
                peer.keep_own()
            elif step == 4:
                peer.remove_own()
        for ours, theirs in zip(*models, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(*models, strict=True):
            assert torch.allclose(peers[0].delta(ours), peers[1].delta(theirs), rtol=0, atol=1e-6)
    assert "FastMerge" in kinds_of_merges(peers[0])


def test_a_training_alone_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    r = torch.Generator().manual_seed(0)
    start, grads = torch.randn(128, 107, generator=r), [torch.randn(128, 107, generator=r) for _ in range(3)]
    ends = []
    for setting in (FAST, TORCH):
        monkeypatch.setenv(loading.SETTING, setting)
        weight = torch.nn.Parameter(start.clone())
        optimizer = DisTrO([weight], overlap=False, quantize_1bit=False, **PUBLISHED)
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        ends.append(weight)
    assert int((ends[0] != ends[1]).sum()) <= 2  # where rounding of the values decides
    assert not torch.equal(ends[0], start)


@pytest.mark.parametrize("overlap", [False, True])
def test_tensors_that_moved_between_two_steps_are_found_where_they_are(
    monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Addresses are read once a step, and not kept for the next one."""

    def trained(said: str) -> list[Tensor]:
        monkeypatch.setenv(loading.SETTING, said)
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((128, 192), (64, 64))]
        optimizer = DisTrO(weights, lr=0.1, overlap=overlap, compression_topk=3)
        for seed in range(4):
            optimizer.eval()
            for weight in weights:
                weight.data = weight.data.clone()
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
                for key, value in optimizer.state[weight].items():
                    if isinstance(value, Tensor):
                        optimizer.state[weight][key] = value.clone()
            optimizer.train()
            optimizer.step()
        optimizer.eval()
        return [weight.detach() for weight in weights]

    for one, other in zip(trained(FAST), trained(TORCH), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (1 << 19,), ((1 << 19) + 9,), (33, 65)])
def test_the_lookahead_shifts_by_the_same_bits(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    r = torch.Generator().manual_seed(0)
    start, grad = torch.randn(shape, generator=r), torch.randn(shape, generator=r)
    grad.view(-1)[::3] = 0
    start.view(-1)[::4] = -0.0
    ends = []
    for setting in (FAST, TORCH):
        monkeypatch.setenv(loading.SETTING, setting)
        weight = torch.nn.Parameter(start.clone())
        optimizer = DisTrO([weight], transform="identity", **PUBLISHED)
        weight.grad = grad
        optimizer.generate()
        version = weight._version
        optimizer.lookahead(1e-2)
        assert weight._version > version
        ends.append(weight.detach().clone())
        optimizer.undo_lookahead()
        assert torch.equal(weight.view(torch.int32), start.view(torch.int32))
    assert torch.equal(ends[0].view(torch.int32), ends[1].view(torch.int32))
    assert shape == (1,) or not torch.equal(ends[0], start)


AHEAD_SHAPES = ((128, 192), (100, 43), (64, 64), (7,), (8, 128))
"""Whole tiles, tiles that reach beyond their tensor, and tensors that no kernel is for."""


@pytest.mark.parametrize("quantize", [False, True], ids=["values", "signs"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["", "with weight decay"])
def test_new_weights_and_the_next_lookahead_take_one_pass(
    monkeypatch: pytest.MonkeyPatch, quantize: bool, weight_decay: float
) -> None:
    """Beside passes of their own, with a frozen tensor, gradients that are missing or not finite, and an evaluation."""
    merge_ahead, passes = BlockEngine.merge_ahead, 0

    def counted(*args: Any, **kwargs: Any) -> bool:
        nonlocal passes
        done = merge_ahead(*args, **kwargs)
        passes += done
        return done

    def trained() -> list[Tensor]:
        r = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=r)) for shape in AHEAD_SHAPES]
        params[0].data[::3] = -0.0
        optimizer = DisTrO(params, lr=1e-2, weight_decay=weight_decay, quantize_1bit=quantize, **PUBLISHED)
        seen = []
        for step in range(7):
            params[2].requires_grad_(step < 4)
            for number, param in enumerate(params):
                param.grad = None if number == step else torch.randn(param.shape, generator=r)
            if step == 3:
                params[0].grad[5, 5] = torch.nan  # type: ignore[index]
            before = [param._version for param in params]
            optimizer.step()
            assert all(after > version for after, version in zip([p._version for p in params], before, strict=True))
            if step == 5:
                optimizer.eval()
                optimizer.train()
            seen += [param.detach().clone() for param in params]
            seen += [optimizer.state[param]["weight"].clone() for param in params]
        assert optimizer.quarantined == 1
        return seen

    monkeypatch.setattr(BlockEngine, "merge_ahead", counted)
    ours = trained()
    assert passes == 5  # not in the first step, nor where what is frozen changes
    monkeypatch.setattr(BlockEngine, "merges_ahead", False)
    for mine, wanted in zip(ours, trained(), strict=True):
        assert torch.equal(mine.view(torch.int32), wanted.view(torch.int32))
    assert passes == 5


def one_by_one(work: Callable[[Any, int], None], parts: Sequence[Any]) -> None:
    for part in parts:
        work(part, 0)


@pytest.mark.parametrize("size", [4096, 4223, 1 << 20, (1 << 20) + 131])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e19, None], ids=str)
def test_gradients_that_are_not_finite_are_found_wherever_they_are(size: int, bad: float | None) -> None:
    """Nor are those whose squares are not, as for torch's norm."""
    generator = torch.Generator().manual_seed(size)
    for place in {0, size // 2, size - 1}:
        grad = torch.randn(size, generator=generator)
        if bad is not None:
            grad[place] = bad
        grads = [None, torch.zeros(0, 3), grad, torch.ones(3), torch.tensor([1.0, torch.nan])]
        found = finite_in_parts(grads, one_by_one)
        assert found is not None
        assert found[1:].tolist() == [1, bad is None, 1, 0]


def test_other_gradients_are_left_to_torch() -> None:
    def share(work: Any, parts: Any) -> None:
        raise AssertionError("these are none for the kernel")

    half, single = torch.ones(200, 200, dtype=torch.bfloat16), torch.ones(200, 200)
    for grads in ([None], [torch.ones(9)], [half], [half, single], [torch.ones(200), half.bfloat16()]):
        assert finite_in_parts(grads, share) is None


# -- where they are used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settings", "merge"),
    [
        ((128, 128), {}, "FastMerge"),
        ((128, 128), {"arithmetic": "float"}, "FloatMerge"),
        ((128, 128), {"compression_chunk": 128}, "ExactMerge"),
        ((128, 128), {"compression_topk": 129}, "ExactMerge"),
        ((128, 128), {"transform": "identity"}, "ExactMerge"),
        ((8, 128), {}, "ExactMerge"),
        ((128,), {}, "ExactMerge"),
    ],
)
def test_other_tiles_and_definitions_are_left_to_torch(
    shape: tuple[int, ...], settings: dict[str, Any], merge: str
) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.ones(shape)
    assert kinds_of_merges(DisTrO([weight], **settings, **PUBLISHED)) == {merge}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.zeros(128, 128, dtype=dtype))
    weight.grad = torch.ones(128, 128, dtype=dtype)
    assert kinds_of_merges(DisTrO([weight], **PUBLISHED)) == {"ExactMerge"}


def test_the_environment_turns_them_off_and_small_models_do_not_load_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(128, 128))
    weight.grad = torch.ones(128, 128)
    for setting in (TORCH, ""):
        monkeypatch.setenv(loading.SETTING, setting)
        assert kinds_of_merges(DisTrO([weight], **PUBLISHED)) == {"ExactMerge"}
    monkeypatch.setattr(engine, "_FEWEST_TILES", 4)
    assert kinds_of_merges(DisTrO([weight], **PUBLISHED)) == {"FastMerge"}


def test_without_numba_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_known", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert loading.kernel("merge") is None


def test_kernels_that_cannot_be_compiled_are_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(SHAPES)
    updates = updates_of(plan, 2, "signs")
    wanted = weights_after(plan, updates)

    def broken(*_: object) -> None:
        raise MemoryError("no room for code")

    monkeypatch.setattr(loading, "_known", {})
    monkeypatch.setattr(loading, "_tried", broken)
    with pytest.warns(UserWarning, match="torch does their work, more slowly: MemoryError: no room for code") as told:
        engine = BlockEngine(plan, "dct")
    BlockEngine(plan, "dct")
    assert len(told) == 1
    assert {type(merge).__name__ for merge in engine._merges} == {"ExactMerge"}
    for ours, theirs in zip(weights_after(plan, updates), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_position_outside_of_its_tile_stays_in_it() -> None:
    """Updates are checked when they arrive; a kernel does not write elsewhere for one that was not."""
    plan = plan_of(((128, 128),))
    [update] = updates_of(plan, 1, "signs", absent=False)
    update.index[0].fill_(-(1 << 30))
    weights_after(plan, [update, update])


# -- processes ---------------------------------------------------------------------------------------------------------


def in_a_child(*arguments: str, **environment: str) -> list[str]:
    """What another Python prints, line by line."""
    done = warm_python.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=280,
        its_children_too=True,
        without_this_package=True,
    )
    assert done.returncode == 0, done.stderr
    return list(map(str, done.stdout.split()))


def step_in_a_child(*arguments: str, **environment: str) -> list[str]:
    return in_a_child(str(HERE.with_name("fast_step.py")), *arguments, **{loading.SETTING: FAST, **environment})


@pytest.mark.slow
def test_a_fork_goes_on_after_its_parent_has_used_them() -> None:
    assert step_in_a_child("--fork", PYTHONWARNINGS="ignore") == [digest()] * 2


@pytest.mark.slow
def test_a_new_process_loads_them_from_the_cache() -> None:
    assert step_in_a_child("--spawn") == [digest()]


@pytest.mark.slow
def test_another_cpu_and_no_cache_give_the_same_weights() -> None:
    """Without AVX-512, and nowhere to write: they are compiled for this process alone."""
    assert step_in_a_child(NUMBA_CPU_NAME="haswell", NUMBA_CACHE_DIR="/dev/null/nowhere") == [digest()]


@pytest.mark.slow
def test_numba_is_loaded_with_the_first_step_that_needs_it() -> None:
    program = """
import sys, torch, distro_optim
from distro_optim import DisTrO
loaded = []
for side in (64, 640):
    weight = torch.nn.Parameter(torch.zeros(side, side))
    weight.grad = torch.ones(side, side)
    optimizer = DisTrO([weight])
    loaded.append("numba" in sys.modules)
    optimizer.step()
    loaded.append("numba" in sys.modules)
print(loaded)
"""
    assert in_a_child("-c", program, **{loading.SETTING: ""}) == ["[False,", "False,", "False,", "True]"]
