"""Test 1: signs that were sent beside the gradient of the batch that their sender was given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan
from distro_optim.errors import ConfigurationError
from distro_optim.optim.reference import encode, to_tiles
from distro_optim.optim.rules import PUBLISHED
from distro_optim.verify.quiet import mean_of, quiet_gradients
from distro_optim.verify.recompute import Agreement, Evidence, coefficients_at, compare, group_of, signs_of

SHAPES = ((70, 44), (3, 8, 20), (33,), (), (64, 64))


def make_update(tiling: str, *, quantized: bool = True) -> tuple[CompressedUpdate, list[Tensor | None]]:
    """An update at any positions, and gradients."""
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    plan = make_plan([ParamSpec(s, torch.float32, cpu, 0, 32, 4) for s in SHAPES], tiling)  # type: ignore[arg-type]
    update = CompressedUpdate.empty(plan, quantized=quantized)
    for batch, index, value in zip(plan.batches, update.index, update.value, strict=True):
        index.copy_(torch.rand(batch.tiles, batch.tile_size, generator=generator).topk(batch.k).indices)
        value.copy_(torch.randn(value.shape, generator=generator) < 0 if quantized else torch.randn(value.shape))
    gradients: list[Tensor | None] = [torch.randn(s, generator=generator) for s in SHAPES]
    return CompressedUpdate(plan, update.index, update.value, (True,) * len(SHAPES)), gradients


@pytest.mark.parametrize("tiling", ["padded", "divisor"])
def test_coefficients_are_those_of_the_whole_transform(tiling: str) -> None:
    update, gradients = make_update(tiling)
    found = coefficients_at(update, [g if g is None or g.ndim < 2 else g.mT.contiguous().mT for g in gradients])
    for number, batch in enumerate(update.plan.batches):
        for tensor, (start, stop) in batch.ranges.items():
            gradient = gradients[tensor]
            assert gradient is not None
            whole = encode(to_tiles(gradient, 32, tiling)).flatten(1)  # type: ignore[arg-type]
            expected = whole.gather(1, update.index[number][start:stop].long())
            assert torch.allclose(found[number][start:stop], expected, atol=1e-5)


def test_signs_of_the_gradient_itself_agree_and_the_opposite_ones_do_not() -> None:
    update, gradients = make_update("padded")
    same = [value < 0 for value in coefficients_at(update, gradients)]
    honest = CompressedUpdate(update.plan, update.index, tuple(same), update.present)
    generator = torch.Generator().manual_seed(1)
    control = [torch.randn(shape, generator=generator) for shape in SHAPES]
    evidence = compare(honest, gradients, control, names=["a.0.w", "a.1.w", "b", "c", "d"])
    count = sum(index.numel() for index in update.index)
    assert (evidence.assigned.share, evidence.assigned.total, evidence.coverage) == (1, count, 1)
    assert evidence.assigned.error == 0.5 / math.sqrt(count)
    assert 0.3 < evidence.control.share < 0.7
    assert evidence.excess > 4 * evidence.excess_error
    assert evidence.by_group.keys() == {"a.*.w", "b", "c", "d"}
    assert sum((a for a, _ in evidence.by_group.values()), Agreement()) == evidence.assigned
    flipped = CompressedUpdate(update.plan, update.index, tuple(~value for value in same), update.present)
    assert compare(flipped, gradients, control).assigned.share == 0


def test_where_nothing_is_said_nothing_is_compared() -> None:
    update, gradients = make_update("padded", quantized=False)
    update.value[0][0, 0] = math.nan
    update.value[0][0, 1] = 0
    silent = CompressedUpdate(update.plan, update.index, update.value, (True, True, False, True, True))
    gradients[0] = None
    gradients[4] = torch.zeros(64, 64)
    evidence = compare(silent, gradients, gradients)
    k = update.plan.topk
    tiles = [grid.tiles for grid in update.plan.grids]
    assert evidence.assigned.total == tiles[1] * k[1] + k[3]
    assert evidence.expected == tiles[1] * k[1] + tiles[2] * k[2] + k[3]
    assert sum(int(known.sum()) for known in signs_of(silent).known) == evidence.sent
    nothing = Evidence()
    assert (nothing.assigned.share, nothing.excess, nothing.coverage) == (0.5, 0, 1)
    assert nothing.record()["excess_error"] is None


def test_evidence_of_several_rounds_adds_up() -> None:
    update, gradients = make_update("padded")
    half = (gradients, [None if g is None else -g for g in gradients])
    one = compare(update, gradients, gradients, halves=half, names=list("abcde"))
    both = one + one
    assert both.assigned == Agreement(2 * one.assigned.agree, 2 * one.assigned.total)
    assert both.imbalance == one.imbalance == pytest.approx(abs(2 * one.assigned.share - 1))
    assert both.by_group["a"][1] == one.by_group["a"][1] + one.by_group["a"][1]
    assert (one + Evidence()).imbalance is None


def test_gradients_of_another_model_are_refused() -> None:
    update, gradients = make_update("padded")
    with pytest.raises(ConfigurationError, match="one for each"):
        coefficients_at(update, gradients[1:])
    with pytest.raises(ConfigurationError, match="another order"):
        coefficients_at(update, gradients[::-1])


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.10.mlp.up_proj.weight", "model.layers.*.mlp.up_proj.weight"),
        ("0.weight", "*.weight"),
        ("fc1.bias", "fc1.bias"),
        ("blocks.3", "blocks.*"),
    ],
)
def test_layers_of_one_kind_are_a_group(name: str, group: str) -> None:
    assert group_of(name) == group


# -- a run in small ----------------------------------------------------------------------------------------------------


def make_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 32))


def samples(indices: Sequence[int]) -> Tensor:
    """``(samples, 48)``, each by its number."""
    return torch.stack([torch.randn(48, generator=torch.Generator().manual_seed(1000 + n)) for n in indices])


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    teacher = make_net(7)
    with torch.no_grad():
        wanted = teacher(batch) * 3
    return F.mse_loss(net(batch), wanted)


@pytest.mark.slow
def test_an_honest_peer_is_told_from_copies_other_data_and_idleness() -> None:
    """Four peers for a while: agreements add up over the rounds, and only the honest one keeps above its control."""
    nets = [make_net() for _ in range(4)]
    optimizers = [DisTrO(net.parameters(), lr=2e-3, compression_topk=8, **PUBLISHED) for net in nets]
    found = {"honest": Evidence(), "copy": Evidence(), "other data": Evidence(), "idle": Evidence()}
    on_its_way: list[CompressedUpdate] = []
    for step in range(12):
        batches = [samples(range(100 * step + 8 * peer, 100 * step + 8 * peer + 8)) for peer in range(5)]
        weights = {name: p.detach().clone() for name, p in nets[0].named_parameters()}
        sent = []
        for number, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            optimizer.lookahead(2e-3)
            optimizer.zero_grad()
            loss_of(net, batches[{2: 4}.get(number, number)]).backward()
            if number == 3 and step:
                for param in net.parameters():
                    param.grad = torch.zeros_like(param)
            sent.append(optimizer.generate(2e-3))
        for net in nets:
            for name, p in net.named_parameters():
                assert torch.equal(p, weights[name])  # all are where the run is
        parts = quiet_gradients(
            nets[0],
            dict(nets[0].named_parameters()),
            lambda b: loss_of(nets[0], b),
            [*batches[:4], samples(range(9, 17))],
        )
        control = parts.pop()
        for name, update, given in (
            ("honest", sent[0], parts[0]),
            ("copy", sent[0], parts[1]),
            ("other data", sent[2], parts[2]),
            ("idle", sent[3], parts[3]),
        ):
            if step:
                found[name] += compare(update, given, control)
        for optimizer in optimizers:
            optimizer.apply(on_its_way, 2e-3)
        on_its_way = sent
    assert found["honest"].excess > 6 * found["honest"].excess_error
    for name in ("copy", "other data", "idle"):
        assert found[name].excess < 3 * found[name].excess_error, name
        assert found["honest"].assigned.share > found[name].assigned.share + 0.1, name


def test_the_gradient_of_a_batch_is_the_mean_of_its_parts() -> None:
    net, batch = make_net(), samples(range(6))
    parameters = dict(net.named_parameters())
    parts = quiet_gradients(net, parameters, lambda b: loss_of(net, b), [batch[:4], batch[4:], batch])
    for mean, whole in zip(mean_of(parts[:2], [4, 2]), parts[2], strict=True):
        assert mean is not None
        assert whole is not None
        assert torch.allclose(mean, whole, atol=1e-6)
