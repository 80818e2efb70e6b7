"""What the processes of a client do that have no network: as the first one says."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from ...errors import DistroError, ModelWeightsError
from ...models.causal_lm import CausalLM
from ...strategy.monitor.figures import Progress
from ...strategy.session import SwarmSession
from ..training import train_language_model
from .processes import in_group
from .team import MakeModel, Member, ShardTrainers, Train

__all__ = ["follow"]


def follow(number: int, meeting: str, *, shape: tuple[int, int], devices: Sequence[torch.device]) -> None:
    """One of the other processes, from its start to its end.

    Args:
        number: of it; that of its device, too.
        meeting: address at which they meet.
        shape: of the mesh.
        devices: of all processes.
    """
    try:
        with in_group(number, len(devices), meeting):
            _follow(Member(number, shape, devices[number]))
    except (DistroError, KeyboardInterrupt):
        pass  # the first one has the same, and says so


def _follow(member: Member) -> None:
    model: CausalLM | None = None
    while True:
        orders: MakeModel | Train = member.ranks.share(None)
        if isinstance(orders, MakeModel):
            model = member.empty_model(orders.config)
            with suppress(ModelWeightsError):  # the first one may make the model of something else then
                member.fill(model, None)
            continue
        if model is None:
            raise DistroError("there is no model to train")
        _train(member, model, orders)
        return


def _train(member: Member, model: CausalLM, orders: Train) -> None:
    trainers = ShardTrainers(model, member, micro_batch_size=orders.micro_batch_size)
    optimizer = model.make_optimizer(orders.lr, orders.optimizer)
    session = SwarmSession(model, optimizer, **orders.session)
    session.resumes_at_its_step = True  # as the first one's: they look for the checkpoint together
    with session:
        train_language_model(
            session, trainers, lambda _: trainers.read(None), Progress(bytes(32)), tell=lambda text: None
        )
