"""Does a run of one host train to the same loss if three liars join it? As a new user would host it, over loopback.

    python benchmarks/three_liars.py                # 150 rounds
    python benchmarks/three_liars.py --rounds 300

The host's script is that of the guides: a model, a loss, a session. It runs alone, and then again with three sessions
that join by its ticket. These lie about everything that they say: they all report the same false hashes of their
weights, offer the same false weights, and send results that point outside of the model. They come before the first
round and stay.

Ends with status 1 if the host's loss is more than 5 % worse than alone, if it gave its weights up, or if it could not
train on.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.errors import DistroError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.port import RunAccess
from distro_optim.strategy.session import SwarmSession

LIARS = 3
SAMPLES, BATCH = 512, 32
TOLERANCE = 1.05
OUT_OF_RANGE = 4095
WAIT_SECONDS = 300.0
LOOPBACK: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0"}


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 16, generator=generator)
    return inputs, torch.sin(inputs @ torch.randn(16, 4, generator=generator))


def loss_of(model: nn.Module, indices: Sequence[int] | slice = slice(None)) -> Tensor:
    inputs, targets = data()
    return nn.functional.mse_loss(model(inputs[indices]), targets[indices])


def train(session: SwarmSession, model: nn.Module) -> None:
    for round_ in session.rounds():
        if round_.indices:
            loss_of(model, round_.indices).backward()
        round_.finish()


class Liar(SwarmSession):
    """Takes part, and says nothing that is true."""

    @override
    def connect(self) -> RunAccess:
        access: Any = super().connect()
        trained, hashed, offer = access.trained, access.weights_hashed, access.offer_model

        def lie_about_training(step: int, update: Any, own: Any, **loss: Any) -> None:
            nowhere = tuple(torch.full_like(index, OUT_OF_RANGE) for index in update.index)
            trained(step, replace(update, index=nowhere), own, **loss)

        def lie_about_weights(step: int, digests: Sequence[bytes]) -> None:
            hashed(step, [b"\x66" * 32 for _ in digests])

        def offer_what_is_false(model: SharedModel) -> None:
            false = {name: torch.full_like(tensor, 9.0) for name, tensor in model.parameters.items()}
            offer(replace(model, parameters=false))

        access.trained, access.weights_hashed = lie_about_training, lie_about_weights
        access.offer_model = offer_what_is_false
        lying: RunAccess = access
        return lying


def lie(ticket: str, seed: int) -> None:
    model = model_of(seed)
    session = Liar(
        model, DisTrO(model.parameters(), lr=3e-3, **PUBLISHED), run=ticket, dataset_size=SAMPLES, **LOOPBACK
    )
    try:
        with session:
            train(session, model)
    except DistroError:
        pass  # whatever becomes of a liar


def host(rounds: int, liars: int) -> tuple[float, float, int]:
    """The loss at the end, the largest weight, and how many clients were seen in an epoch at most."""
    model = model_of(0)
    optimizer = DisTrO(model.parameters(), lr=3e-3, **PUBLISHED)
    config = RunConfig(
        total_steps=rounds,
        global_batch_size=BATCH,
        peers_to_start=1 + liars,
        warmup_time=20,
        epoch_time=3600,
        max_round_train_time=10,
    )
    most = 0
    with SwarmSession(model, optimizer, config=config, dataset_size=SAMPLES, **LOOPBACK) as session:
        assert session.ticket is not None
        threads = [threading.Thread(target=lie, args=(session.ticket, 1 + n), daemon=True) for n in range(liars)]
        for thread in threads:
            thread.start()
        for round_ in session.rounds():
            most = max(most, session.num_peers)
            if round_.indices:
                loss_of(model, round_.indices).backward()
            round_.finish()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    with torch.no_grad():
        return loss_of(model).item(), max(p.abs().max().item() for p in model.parameters()), most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with torch.no_grad():
        print(f"loss before: {loss_of(model_of(0)).item():.4f}")
    outcomes = []
    for liars in (0, LIARS):
        began = time.monotonic()
        loss, largest, most = host(rounds, liars)
        outcomes.append(loss)
        print(
            f"{liars} liars: loss {loss:.4f} after {rounds} rounds, largest weight {largest:.2f}, "
            f"{most} clients at most, {time.monotonic() - began:.0f} s"
        )
        if most < 1 + liars:
            print("the liars never got in")
            return 1
    alone, beside = outcomes
    ok = beside <= TOLERANCE * alone
    print(f"{beside / alone:.3f} times the loss of the host alone: {'as without them' if ok else 'MISSED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
