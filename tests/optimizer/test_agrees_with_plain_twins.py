"""The optimizer does what its plain twin, ``distro_optim.optim.reference``, does, step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distro_optim import DisTrO
from distro_optim.comm.memory import MemoryExchange
from distro_optim.compress import CompressedUpdate
from distro_optim.optim.reference import ReferenceDisTrO, ReferenceTensor, Sent, Tiling

pytestmark = pytest.mark.slow

# Below this part of the largest coefficient a decoded update is a rounding error, whose sign means nothing.
NOISE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-4}
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of one operation on a weight


@dataclass
class Case:
    """Tensors in parameter groups, and the peers that train them."""

    groups: list[dict[str, Any]]  # "shapes", and the settings of the group
    peers: int
    tiling: Tiling
    quantize: bool
    overlap: bool
    dtype: torch.dtype
    seed: int
    absent: float = 0.0  # probability that a gradient is missing

    def optimizer(self) -> DisTrO:
        generator = torch.Generator().manual_seed(self.seed)
        groups = [
            {
                **{key: value for key, value in group.items() if key != "shapes"},
                "params": [
                    torch.randn(s, generator=generator, dtype=torch.float64).to(self.dtype) for s in group["shapes"]
                ],
            }
            for group in self.groups
        ]
        return DisTrO(groups, tiling=self.tiling, quantize_1bit=self.quantize, overlap=self.overlap, arithmetic="float")

    def twins(self, optimizer: DisTrO, dtype: torch.dtype) -> list[ReferenceTensor]:
        return [
            ReferenceTensor(
                param.detach().clone(),
                torch.zeros(param.shape, dtype=dtype),
                group["compression_decay"],
                group["compression_topk"],
                group["compression_chunk"],
                self.tiling,
                self.quantize,
                self.overlap,
                group["weight_decay"],
            )
            for group in optimizer.param_groups
            for param in group["params"]
        ]


def params_of(optimizer: DisTrO) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def pairs(optimizer: DisTrO, plain: Sequence[ReferenceTensor]) -> Iterator[tuple[int, Tensor, ReferenceTensor, float]]:
    """Number, tensor, twin and learning rate of every tensor that has elements."""
    rates = [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
    for number, entry in enumerate(zip(params_of(optimizer), plain, rates, strict=True)):
        if entry[0].numel():
            yield number, *entry


def magnitude(x: Tensor) -> float:
    return float(x.double().abs().max())


def assert_near(ours: Tensor, expected: Tensor, what: str, relative: float, *, scale: float = 0.0) -> None:
    """Equal within ``relative`` of the largest expected magnitude, or of ``scale``."""
    worst = magnitude(ours.double() - expected.double())
    assert worst <= relative * max(scale, magnitude(expected)), f"{what}: off by {worst:.2e}"


def sent_by(updates: Sequence[CompressedUpdate], number: int) -> list[Sent]:
    """What the updates say about one tensor, as the twins write it."""
    sent = []
    for update in updates:
        entry = update.tensors()[number]
        if update.present[number]:
            k = entry.index.shape[-1]
            sent.append((entry.index.reshape(-1, k).long(), entry.value.reshape(-1, k)))
    return sent


def settle_ties(update: CompressedUpdate, number: int, twin: ReferenceTensor, tolerance: float) -> None:
    """Makes the twin pick as the update does, after checking that these are the largest coefficients.

    Ties are common: a padded tile of one element has equal coefficients.
    """

    def select(coefficients: Tensor, k: int) -> Sent:
        ((index, _),) = sent_by([update], number)
        flat = coefficients.flatten(1)
        assert index.shape == (len(flat), min(k, flat.shape[1]))
        assert all(len(set(row)) == len(row) for row in index.tolist())
        value = flat.gather(1, index)
        best = flat.abs().topk(index.shape[1]).values
        assert_near(value.abs().sort(1, descending=True).values, best, "picks", tolerance, scale=magnitude(flat))
        return index, value

    twin.select = select


def assert_same_values(update: CompressedUpdate, number: int, expected: Sent | None, tolerance: float) -> None:
    assert update.present[number] == (expected is not None)
    if expected is not None:
        ((_, value),) = sent_by([update], number)
        assert value.dtype == expected[1].dtype or value.dtype != torch.bool
        assert_near(value, expected[1], "values", tolerance)


def compare(case: Case, steps: int) -> None:
    """Runs all peers and their twins, and compares picks, momenta, decoded updates and weights after every step."""
    relative = 1e-10 if case.dtype == torch.float64 else 1e-5
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    # A value on the edge between two numbers of a short type may be sent as either, and what is sent leaves delta.
    left = relative if case.quantize or exact == case.dtype else ROUNDING[case.dtype]
    optimizers = [case.optimizer() for _ in range(case.peers)]
    twins = [case.twins(optimizer, exact) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(case.seed + 1)
    for _ in range(steps):
        updates = []
        for optimizer, plain in zip(optimizers, twins, strict=True):
            if case.overlap:
                optimizer.lookahead()
                for _, param, twin, lr in pairs(optimizer, plain):
                    assert_near(param, twin.looking_ahead(lr), "lookahead", ROUNDING[case.dtype])
            for param in params_of(optimizer):
                gone = float(torch.rand((), generator=generator)) < case.absent
                grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.grad = None if gone else grad.to(case.dtype)
            updates.append(optimizer.generate())
            for number, param, twin, lr in pairs(optimizer, plain):
                entered = magnitude(twin.delta) + (0.0 if param.grad is None else lr * magnitude(param.grad))
                settle_ties(updates[-1], number, twin, relative)
                assert_same_values(updates[-1], number, twin.generate(param.grad, lr), ROUNDING[case.dtype])
                delta = optimizer.delta(param)
                assert_near(delta, twin.delta, "delta", left, scale=entered)
                twin.delta = delta.clone()
        for optimizer, plain in zip(optimizers, twins, strict=True):
            decoded = optimizer.decode(updates)
            optimizer.apply(updates)
            for number, param, twin, lr in pairs(optimizer, plain):
                sent = sent_by(updates, number)
                expected = twin.decoded(sent)
                scale = max((1.0 if value.dtype == torch.bool else magnitude(value) for _, value in sent), default=0.0)
                assert_near(decoded[number], expected, "decoded", relative, scale=scale)
                twin.apply(sent, lr)
                certain = expected.abs() >= NOISE[case.dtype] * scale
                torch.testing.assert_close(param[certain], twin.param[certain], rtol=ROUNDING[case.dtype], atol=1e-12)
                twin.param.copy_(param)  # a sign of noise is not defined: go on from the same weights
    first = params_of(optimizers[0])
    for optimizer in optimizers[1:]:
        if not case.absent and not any(g["weight_decay"] for g in optimizer.param_groups):
            assert all(torch.equal(a, b) for a, b in zip(first, params_of(optimizer), strict=True))


@st.composite
def cases(draw: st.DrawFn, *, overlap: bool) -> Case:
    side = st.integers(1, 13)
    shape = st.one_of(
        st.just(()),
        st.tuples(st.integers(0, 40)),
        st.tuples(st.integers(1, 30), st.integers(0, 30)),
        st.lists(side.filter(lambda n: n < 6), min_size=3, max_size=4).map(tuple),
    )
    groups = [
        {
            "shapes": draw(st.lists(shape, min_size=1, max_size=3)),
            "lr": draw(st.sampled_from([1e-3, 0.1])),
            "compression_decay": draw(st.sampled_from([1.0, 0.999, 0.5])),
            "compression_topk": draw(st.integers(1, 9)),
            "compression_chunk": draw(st.sampled_from([1, 2, 5, 8, 16])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        }
        for _ in range(draw(st.integers(1, 2)))
    ]
    return Case(
        groups,
        peers=draw(st.sampled_from([1, 2, 3, 7, 16])),
        tiling=draw(st.sampled_from(["divisor", "padded"])),
        quantize=draw(st.booleans()),
        overlap=overlap,
        dtype=torch.float64,
        seed=draw(st.integers(0, 1 << 32)),
        absent=draw(st.sampled_from([0.0, 0.0, 0.4, 1.0])),
    )


@given(case=cases(overlap=False))
@settings(max_examples=25, deadline=None)
def test_demo_agrees_on_any_shapes_groups_and_peers(case: Case) -> None:
    compare(case, steps=3)


@given(case=cases(overlap=True))
@settings(max_examples=25, deadline=None)
def test_psyche_agrees_on_any_shapes_groups_and_peers(case: Case) -> None:
    compare(case, steps=3)


MODEL = {"shapes": [(130, 96), (20, 8, 3, 3), (7, 7), (200,), ()], "lr": 0.01}


@pytest.mark.parametrize("overlap", [False, True], ids=["demo", "psyche"])
@pytest.mark.parametrize("quantize", [False, True], ids=["values", "signs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tiling", ["divisor", "padded"])
def test_the_types_of_real_models_agree(tiling: Tiling, dtype: torch.dtype, quantize: bool, overlap: bool) -> None:
    compare(Case([{**MODEL, "compression_topk": 4}], 3, tiling, quantize, overlap, dtype, 5), steps=6)


@pytest.mark.parametrize("peers", [1, 2, 6, 7, 16])
@pytest.mark.parametrize("absent", [0.0, 0.5])
def test_few_and_many_contributors_agree_whichever_way_they_are_decoded(peers: int, absent: float) -> None:
    # 8 coefficients each: up to 6 peers are summed one by one, more by a dense inverse transform.
    compare(Case([{**MODEL, "compression_topk": 8}], peers, "padded", True, False, torch.float64, 3, absent), steps=2)


@pytest.mark.parametrize("overlap", [False, True], ids=["demo values", "psyche signs"])
def test_the_signs_of_100_steps_are_those_of_double_precision(overlap: bool) -> None:
    case = Case(
        [{"shapes": [(192, 160), (24, 16, 3, 3), (300,)], "lr": 1e-3}], 2, "padded", overlap, overlap, torch.float32, 11
    )
    optimizers = [case.optimizer() for _ in range(case.peers)]
    twins = [case.twins(optimizer, torch.float64) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(12)
    steady = [torch.randn(p.shape, generator=generator) for p in params_of(optimizers[0])]
    equal = total = 0
    for _ in range(100):
        updates = []
        sent: list[list[Sent]] = [[] for _ in steady]
        for optimizer, plain in zip(optimizers, twins, strict=True):
            for number, (param, twin) in enumerate(zip(params_of(optimizer), plain, strict=True)):
                # The twin starts every step from the state of the fast one.
                state = optimizer.state[param]
                twin.delta = optimizer.delta(param).double()
                if twin.overlap:
                    twin.own = (state["own_index"].long(), state["own_value"].double())
                param.grad = 0.3 * steady[number] + torch.randn(param.shape, generator=generator)
                entry = twin.generate(param.grad.double(), 1e-3)
                assert entry is not None
                sent[number].append(entry)
            updates.append(optimizer.generate())
        for number, fast in enumerate(optimizers[0].decode(updates)):
            expected = twins[0][number].decoded(sent[number])
            equal += int((fast.sign() == expected.sign()).sum())
            total += fast.numel()
        for optimizer in optimizers:
            optimizer.apply(updates)
    assert equal / total >= 0.9998, f"{1 - equal / total:.2e} of the signs differ"


class Meeting:
    """Carries what plain optimizers send, between threads that take their steps together."""

    def __init__(self, peers: int) -> None:
        self._barrier = threading.Barrier(peers, timeout=60)
        self._said: list[list[Sent | None]] = [[] for _ in range(peers)]

    def exchange(self, peer: int) -> Callable[[list[Sent | None]], list[list[Sent | None]]]:
        def meet(sent: list[Sent | None]) -> list[list[Sent | None]]:
            self._said[peer] = sent
            self._barrier.wait()
            everybody = list(self._said)
            self._barrier.wait()
            return everybody

        return meet


def trained(make: Callable[[list[torch.nn.Parameter]], DisTrO | ReferenceDisTrO], peer: int, closure: bool) -> Tensor:
    """The weights after some steps, in which the learning rate falls and gradients depend on the weights."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(24, 20), (16, 8, 2), (8,), (0, 3)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    optimizer = make(params)
    generator = torch.Generator().manual_seed(100 + peer)

    def loss() -> float:
        optimizer.zero_grad()
        noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        total = torch.stack([(0.5 * p * p + n * p).sum() for p, n in zip(params, noise, strict=True)]).sum()
        torch.autograd.backward(total)
        return total.item()

    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        if closure:
            optimizer.step(loss)
        else:
            loss()
            params[2].grad = None if step % 5 == 3 else params[2].grad
            optimizer.step()
    optimizer.flush()
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("closure", [False, True], ids=["plain steps", "closures"])
@pytest.mark.parametrize("overlap", [False, True], ids=["demo", "psyche"])
@pytest.mark.parametrize(("peers", "quantize", "topk"), [(1, False, 8), (1, True, 1), (3, False, 8)])
def test_a_script_gets_the_same_weights_from_the_plain_optimizer(
    peers: int, quantize: bool, topk: int, overlap: bool, closure: bool
) -> None:
    # Tiles of 8, and of signs a single coefficient: no decoded element is 0 but for rounding, so all signs are certain.
    settings: dict[str, Any] = {
        "compression_chunk": 8,
        "compression_topk": topk,
        "weight_decay": 0.1,
        "quantize_1bit": quantize,
        "overlap": overlap,
    }
    exchanges, meeting = MemoryExchange.group(peers), Meeting(peers)

    def fast(peer: int) -> Tensor:
        exchange = exchanges[peer] if peers > 1 else None
        return trained(lambda params: DisTrO(params, exchange=exchange, arithmetic="float", **settings), peer, closure)

    def plain(peer: int) -> Tensor:
        exchange = meeting.exchange(peer) if peers > 1 else None
        return trained(lambda params: ReferenceDisTrO(params, exchange=exchange, **settings), peer, closure)

    with ThreadPoolExecutor(peers) as pool:
        ours = list(pool.map(fast, range(peers)))
        expected = list(pool.map(plain, range(peers)))
    assert all(torch.equal(weights, expected[0]) for weights in expected)
    for weights in ours:
        torch.testing.assert_close(weights, expected[0], rtol=0, atol=1e-12)
