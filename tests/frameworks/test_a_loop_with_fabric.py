"""A loop of one's own, with Fabric, goes through rounds instead of batches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from distro_optim import DisTrO
from distro_optim.errors import ConfigurationError, DistroError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.session import SwarmSession
from frameworks.lightning_runs import QUIET, Numbered, Runs, loader
from frameworks.quiet_run import QuietRun
from optimizer.models import all_same_bits, copies

pytestmark = [pytest.mark.waiting, *QUIET]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    from distro_optim.strategy.fabric import FabricPsycheStrategy


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def set_up(strategy: Any = None, lr: float = 0.01, **settings: Any) -> tuple[Any, Any, Any, Any]:
    strategy = strategy or FabricPsycheStrategy()
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=1, **settings)
    fabric.launch()
    net = make_net()
    model, optimizer = fabric.setup(net, DisTrO(net.parameters(), lr=lr), _reapply_compile=False)
    return strategy, fabric, model, optimizer


def loss_of(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[1]), batch[2])


@pytest.mark.slow
def test_it_trains_as_a_plain_loop_with_a_session_does(runs: Runs) -> None:
    strategy, fabric, model, optimizer = set_up()
    samples, losses = [], []
    for round_ in strategy.rounds(loader(), max_epochs=2):
        assert strategy.ticket == "psyche1quiet"
        for batch in round_:
            samples.append(batch[0].tolist())
            loss = loss_of(model, batch)
            losses.append(loss.item())
            fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert len(samples) == 16
    assert sorted(sum(samples[:8], [])) == list(range(64))  # noqa: RUF017
    assert list(runs.port.losses.values()) == pytest.approx(losses)
    assert runs.port.closed == 1
    assert strategy.session is None

    twin, data = make_net(), Numbered()
    port = QuietRun(runs.port.config)
    with SwarmSession(twin, DisTrO(twin.parameters(), lr=0.01), dataset_size=64, port=port) as session:
        for round_ in session.rounds():
            batch = torch.utils.data.default_collate([data[n] for n in round_.indices])
            loss_of(twin, batch).backward()
            round_.finish()
    assert all_same_bits(copies(model.parameters()), copies(twin.parameters()))


def test_a_round_of_several_batches_has_the_gradient_of_one(runs: Runs) -> None:
    gradients = []
    for batch_size in (16, 5):
        strategy, fabric, model, optimizer = set_up(FabricPsycheStrategy(config=RunConfig(global_batch_size=16)))
        for round_ in strategy.rounds(loader(batch_size=batch_size), max_steps=1):
            assert len(round_) == -(-16 // batch_size)
            assert len(round_.samples) == 16
            for number, batch in enumerate(round_, start=1):
                with fabric.no_backward_sync(model, enabled=number < len(round_)):
                    fabric.backward(loss_of(model, batch))
            gradients.append(copies(p.grad for p in model.parameters()))
            fabric.clip_gradients(model, optimizer, max_norm=1e3)
            optimizer.step()
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_schedulers_follow_the_run(runs: Runs) -> None:
    runs.settings = {"config": RunConfig(total_steps=11, global_batch_size=8), "first_step": 6, "skipped": {8, 9}}
    strategy, fabric, model, optimizer = set_up()
    scheduler = LambdaLR(optimizer.optimizer, lambda step: 0.5**step)
    rates = {}
    for round_ in strategy.rounds(loader(), max_steps=99, schedulers=[scheduler]):
        rates[round_.step] = optimizer.param_groups[0]["lr"]
        for batch in round_:
            fabric.backward(loss_of(model, batch))
        optimizer.step()
    assert rates == {step: pytest.approx(0.01 * 0.5 ** (step - 1)) for step in (6, 7, 10, 11)}


def test_an_overflow_of_half_precision_is_an_empty_contribution(runs: Runs) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    strategy, fabric, model, optimizer = set_up(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    for round_ in strategy.rounds(loader(), max_steps=4):
        for batch in round_:
            fabric.backward(loss_of(model, batch))
        if round_.step == 2:
            next(model.parameters()).grad.fill_(float("inf"))
        optimizer.step()
    said = {step: sum(t.index.numel() for t in update.tensors()) for step, update in runs.port.updates.items()}
    assert [step for step, count in said.items() if not count] == [2]


def test_training_stops_between_batches_when_the_round_is_over(runs: Runs) -> None:
    runs.settings = {"cancelled": {2}}
    strategy, fabric, model, optimizer = set_up(FabricPsycheStrategy(config=RunConfig(global_batch_size=16)))
    passes = dict.fromkeys((1, 2, 3), 0)
    for round_ in strategy.rounds(loader(batch_size=4), max_steps=3):
        for batch in round_:
            fabric.backward(loss_of(model, batch))
            passes[round_.step] += 1
        optimizer.step()
    assert passes == {1: 4, 2: 1, 3: 4}
    assert runs.port.stopped == [2]


def test_what_is_saved_has_the_weights_that_all_peers_have(runs: Runs, tmp_path: Path) -> None:
    strategy, fabric, model, optimizer = set_up()
    for round_ in strategy.rounds(loader(), max_steps=4):
        for batch in round_:
            fabric.backward(loss_of(model, batch))
        if round_.step == 4:
            ahead = copies(model.parameters())
            fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
        optimizer.step()
        if round_.step == 4:
            true = copies(model.parameters())
    saved = list(torch.load(tmp_path / "fabric.ckpt", weights_only=True)["model"].values())
    assert not all_same_bits(saved, ahead)
    assert all_same_bits(saved, true)


def test_leaving_early(runs: Runs) -> None:
    strategy, fabric, model, optimizer = set_up()
    with strategy.rounds(loader(), max_steps=9) as rounds:
        for round_ in rounds:
            if round_.step == 3:
                break
            for batch in round_:
                fabric.backward(loss_of(model, batch))
            optimizer.step()
    assert runs.port.closed == 1
    assert not runs.port.ended
    assert list(rounds) == []
    optimizer.step()  # of a run no more


def test_what_is_refused(runs: Runs) -> None:
    strategy = FabricPsycheStrategy()
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=1)
    fabric.launch()
    net = make_net()
    with pytest.raises(ConfigurationError, match="first `model, optimizer = "):
        strategy.rounds(loader())
    with pytest.raises(ConfigurationError, match="from distro_optim import DisTrO"):
        fabric.setup(net, torch.optim.AdamW(net.parameters()), _reapply_compile=False)
    with pytest.raises(ConfigurationError, match="a peer is one machine"):
        Fabric(strategy=FabricPsycheStrategy(), accelerator="cpu", devices=1, num_nodes=2)
    with pytest.raises(ConfigurationError, match="relay, which is an argument of the strategy"):
        FabricPsycheStrategy(session_arguments={"relay": "none"})
    strategy, _, _, optimizer = set_up()
    with pytest.raises(ConfigurationError, match="nobody has said when"):
        next(strategy.rounds(loader()))
    rounds = strategy.rounds(loader(), max_steps=3)
    next(rounds)
    optimizer.step()
    with pytest.raises(DistroError, match="outside of a round"):
        optimizer.step()
    rounds.close()


def test_a_registered_name() -> None:
    fabric = Fabric(strategy="psyche", accelerator="cpu", devices=1)
    assert type(fabric.strategy) is FabricPsycheStrategy
    assert (fabric.world_size, fabric.global_rank, fabric.strategy.num_peers) == (1, 0, 1)
    fabric.launch()
    assert fabric.all_reduce(torch.tensor(3.0)) == torch.tensor(3.0)
    assert fabric.broadcast("x") == "x"
    fabric.barrier()
