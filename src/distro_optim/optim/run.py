"""What an optimizer holds beside its state: where the run stands, and what is on its way.

An update's way through :class:`Run`: ``begin_step`` publishes it (``published``), the exchange carries it, and
:meth:`Run.collect` brings back those of all peers, which are ``arrived`` until they are applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from ..comm.exchange import Exchange, LocalExchange
from ..comm.process_group import ProcessGroupExchange, ambient_process_group
from ..compress import CompressedUpdate, TilePlan
from ..compress.engine import Engine
from ..errors import ConfigurationError, DistroError
from .lookahead import Lookahead
from .quarantine import Quarantine
from .sharding import Sharding
from .wrapped import warn_of_wrapper

__all__ = ["ARITHMETIC", "PROGRESS", "Run", "Seen"]

PROGRESS: Final = {
    "training": True,
    "looks_ahead": False,
    "resumes_ahead": False,
    "lookahead_lr": 0.0,
    "in_flight": False,
}
"""Where the run stands: saved in the parameter groups with the hyper-parameters, equal in all of them."""


ARITHMETIC: Final = "arithmetic"
"""Key in the parameter groups: a saved state says by which definition its weights were made."""


class Seen:
    """Parameter groups that somebody has looked through, so that nobody has to for as long as they are these.

    Args:
        groups: of an optimizer; none by default.
    """

    def __init__(self, groups: Sequence[dict[str, Any]] = ()) -> None:
        self._lists = [group["params"] for group in groups]
        self._ends = [(len(params), *params[:1], *params[-1:]) for params in self._lists]

    def is_of(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether ``groups`` are these, with as many parameters, of which the first and the last are the same."""
        if len(groups) != len(self._lists):
            return False
        for group, params, (count, *ends) in zip(groups, self._lists, self._ends, strict=True):
            if group["params"] is not params or len(params) != count:
                return False
            if count and not (params[0] is ends[0] and params[-1] is ends[1]):
                return False
        return True


@dataclass(slots=True)
class Run:
    """What is not part of the optimizer's state: caches, scratch memory, the network, what is on its way.

    One object, never an attribute of the optimizer itself: the wrappers of Lightning and Fabric hand on reads of
    attributes but keep writes, so that ``wrapper.flush()`` would leave the optimizer behind.

    Attributes:
        exchange: None until the first step decides.
        explicit_exchange: it was given by the user, or was in the optimizer that this one is a copy of.
        process_group: given by the user; None for the default one.
        plan, engine: None until needed, and again after :meth:`forget_plan`.
        sharding: as ``plan``; None also where parameters are whole.
        seen_whole: the parameters that were found to be no DTensors.
        sharded: they are DTensors, so that the ranks of their mesh are one peer.
        started_with: the plan on which the exchange was started.
        begun: a step is between its two halves.
        published: the exchange that has our update and from which none were collected since; None while nothing is out.
        arrived: all peers' updates, collected and not yet applied.
        asked_to_train: ``train()`` was called since the last step.
        asked_again: so it was, and not to end an evaluation.
        trains_on_request: ``train()`` was called before every step of this run; None as long as that says nothing.
        looked_for_wrapper: whether the parameters are in a DistributedDataParallel was asked.
        takes_step: what ``step()`` calls instead of stepping itself.
        renews: the step that is taken ends with weights that look ahead.
        quarantine: gradients that were left out and are not counted in the state yet.
    """

    exchange: Exchange | None = None
    explicit_exchange: bool = False
    process_group: torch.distributed.ProcessGroup | None = None
    plan: TilePlan | None = None
    engine: Engine | None = None
    lookahead: Lookahead = field(default_factory=Lookahead)
    sharding: Sharding | None = None
    seen_whole: Seen = field(default_factory=Seen)
    sharded: bool = False
    started_with: TilePlan | None = None
    begun: bool = False
    published: Exchange | None = None
    arrived: list[CompressedUpdate] | None = None
    asked_to_train: bool = False
    asked_again: bool = False
    trains_on_request: bool | None = None
    looked_for_wrapper: bool = False
    takes_step: Callable[[Callable[[], float] | None], float | None] | None = None
    renews: bool = False
    quarantine: Quarantine = field(default_factory=Quarantine)

    def requested(self) -> bool | None:
        """Whether all steps without a closure until now, and this one, came after a call of ``train()``.

        A call that ends an evaluation says nothing of what the loop does without one: None as long as nothing is said.
        """
        if self.trains_on_request is None:
            return True if self.asked_again else None if self.asked_to_train else False
        return self.trains_on_request and self.asked_to_train

    def count_request(self) -> bool:
        """A step without a closure ends. Whether it was :meth:`requested`."""
        self.trains_on_request = self.requested()
        self.asked_to_train = self.asked_again = False
        return self.trains_on_request is True

    def forget_plan(self) -> None:
        """After a change of the parameters: plan and engine are made again when they are needed."""
        self.plan = self.engine = self.sharding = None
        self.seen_whole = Seen()

    @property
    def num_peers(self) -> int:
        """Peers of the exchange, or of the one that the first step will choose."""
        if self.exchange is not None:
            return self.exchange.num_peers
        if self.explicit_exchange or (self.sharded and self.process_group is None):
            return 1
        return ambient_process_group(self.process_group, initialize=False)[1]

    def open(self, params: Sequence[Tensor]) -> Exchange:
        """The exchange that was given, or one over the process group, or one for a peer that is alone.

        Args:
            params: of the optimizer, of any shapes; their device decides on the backend of a new process group.

        Raises:
            DistroError: this is the run of a copied optimizer, which has not been given an exchange of its own.
        """
        peers = 1
        if self.exchange is None:
            if self.explicit_exchange:
                raise DistroError(
                    "this is a copy of an optimizer that has an exchange, which a copy does not inherit: set "
                    "optimizer.exchange"
                )
            if self.sharding is not None:
                self._check_ranks(self.sharding)
            if self.sharded and self.process_group is None:
                self.exchange = LocalExchange()
                return self.exchange
            group, peers = ambient_process_group(self.process_group, initialize=True, params=params)
            self.exchange = ProcessGroupExchange(group) if peers > 1 else LocalExchange()
        if not self.looked_for_wrapper:
            self.looked_for_wrapper = True
            if self.exchange.num_peers > 1 or peers > 1:
                warn_of_wrapper(params)
        return self.exchange

    def _check_ranks(self, sharding: Sharding) -> None:
        """The ranks of a mesh are one peer, and those of the process group are peers."""
        mesh = set(sharding.mesh.mesh.flatten().tolist())
        if self.process_group is None:
            world = torch.distributed.get_world_size()
            if len(mesh) < world:
                raise ConfigurationError(
                    f"the model is sharded over {len(mesh)} of {world} ranks, and it is not said what the others are: "
                    "give process_group=, of the ranks that hold the same shards of other copies of the model, or "
                    "exchange=LocalExchange() to train alone",
                    name="process_group",
                )
            return
        both = mesh & set(torch.distributed.get_process_group_ranks(self.process_group))
        if len(both) > 1:
            raise ConfigurationError(
                f"process_group has ranks {sorted(both)}, which hold one model together: give a group of the ranks "
                "that hold the same shards, one of each copy of the model",
                name="process_group",
            )

    def collect(self) -> None:
        """Waits for all peers' updates of the step that was published, if one was: they are ``arrived`` then.

        Raises:
            ExchangeError: they did not come in time. The optimizer can still be saved.
        """
        if self.published is not None:
            exchange, self.published = self.published, None
            self.arrived = exchange.collect()

    def settle(self) -> None:
        """Waits for what is on its way, so that nothing but ``arrived`` has to be remembered.

        Raises:
            DistroError: a step has begun and is not finished.
            ExchangeError: the updates did not come in time.
        """
        self.require_between_steps("this")
        self.collect()

    def require_between_steps(self, what: str) -> None:
        """Raises DistroError while a step has begun and is not finished; ``what`` is the call that has to wait."""
        if self.begun:
            raise DistroError(f"{what} is not possible between begin_step() and finish_step(): finish the step first")
