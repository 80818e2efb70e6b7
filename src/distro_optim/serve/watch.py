"""What a server's page and Prometheus see of its run. Filled by the server's loop, read from other threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from ..coordinator.rules.outlook import first_data_index
from ..coordinator.server.service import CoordinatorService
from ..coordinator.types import NodeIdentity
from ..errors import DistroError
from ..strategy.monitor.metrics import Metric, contribution_metrics
from ..strategy.monitor.picture import MAX_EVENTS, MAX_PEERS, unit
from ..strategy.port import Contribution
from .status import RunStatus

__all__ = ["Watch"]

MAX_IDENTITIES = 1024
"""Whose reports are counted; of more, those that reported least are forgotten."""


class Watch:
    """Looks at a server.

    Args:
        service: the coordinator.
    """

    def __init__(self, service: CoordinatorService) -> None:
        self._service = service
        self._status: RunStatus | None = None
        self._tokens = 0
        self._reported: dict[str, int] = {}  # the last step of each key
        self._rounds: dict[str, int] = {}
        self.events: deque[str] = deque(maxlen=MAX_EVENTS)
        """The latest news, in words."""

    def see(self, status: RunStatus) -> None:
        """The run is like this now; called about twice a second."""
        state = self._service.host.state
        self._tokens = max(self._tokens, first_data_index(state) * state.model.max_seq_len)
        for client, report in list(self._service.host.reports.items()):
            self._count(client, report.step)
        self._status = status

    def _count(self, client: NodeIdentity, step: int) -> None:
        key = client.signer.hex()
        if self._reported.get(key) == step:
            return
        self._reported[key] = step
        self._rounds[key] = self._rounds.get(key, 0) + 1
        if len(self._rounds) > MAX_IDENTITIES:
            least = min(self._rounds, key=self._rounds.__getitem__)
            del self._rounds[least], self._reported[least]

    @property
    def status(self) -> RunStatus | None:
        """The last one seen."""
        return self._status

    @property
    def contributions(self) -> dict[bytes, Contribution]:
        """Rounds on which each client has reported, as far as they were seen; a server sees no results."""
        return {bytes.fromhex(key): Contribution(rounds=rounds) for key, rounds in list(self._rounds.items())}

    def picture(self, ticket: str | None) -> dict[str, Any]:
        """What the page shows; see :mod:`~distro_optim.strategy.monitor.picture`.

        Args:
            ticket: what clients join with.

        Raises:
            DistroError: nothing was seen yet.
        """
        status = self._status
        if status is None:
            raise DistroError("the server has not begun")
        given = self.contributions
        peers = [
            {
                "id": client.key[:8],
                "key": client.key,
                "is_me": False,
                "in_epoch": client.state not in ("Pending", "Watching"),
                "path": client.state,
                "rtt": None,
                "loss": client.loss,
                "rounds": given[bytes.fromhex(client.key)].rounds if bytes.fromhex(client.key) in given else None,
                "samples": client.samples,
                "bytes": None,
                "dropped": None,
                "points": client.work,
                "audits": None,
            }
            for client in status.clients[:MAX_PEERS]
        ]
        return {
            "run_id": status.run_id,
            "phase": status.phase,
            "epoch": status.epoch,
            "step": status.step,
            "total_steps": status.total_steps,
            "is_host": True,
            "connected": True,
            "fault": None,
            "waits_for": None,
            "waiting_peers": max(0, status.pending - status.in_epoch),
            "ticket": ticket,
            "how_to_join": None if ticket is None else f"distro-optim join {ticket}",
            "unit": unit(self._service.host.state.model.max_seq_len),
            "tokens": self._tokens,
            "tokens_per_second": status.tokens_per_second,
            "lr": None,
            "bytes": None,
            "seconds": None,
            "rounds": None,
            "weights": None,
            "peers": peers,
            "events": list(self.events),
        }

    def metrics(self) -> list[Metric]:
        """All numbers of the run, under the names that clients have for them; none before the first status."""
        status = self._status
        if status is None:
            return []
        metrics = [Metric(name, meaning, "gauge", {"": value}) for name, meaning, value in self._gauges(status)]
        return metrics + [
            metric for metric in contribution_metrics(self.contributions) if metric.name.endswith("rounds")
        ]

    def _gauges(self, status: RunStatus) -> Iterator[tuple[str, str, float]]:
        yield "psyche_round_step", "Step of the run", status.step
        yield "psyche_total_tokens", "Tokens that the run has trained", self._tokens
        yield "psyche_peer_connections", "Peers connected", status.connected
        if status.tokens_per_second is not None:
            yield "psyche_tokens_per_second", "Speed of the whole run", status.tokens_per_second
        if status.loss is not None:
            yield "psyche_training_loss", "Median of the losses that clients reported last", status.loss
        yield "distro_optim_total_steps", "Steps of the whole run", status.total_steps
        yield "distro_optim_epoch", "Epoch of the run", status.epoch
        yield "distro_optim_clients", "Clients of the epoch", status.in_epoch
        yield (
            "distro_optim_waiting_clients",
            "Clients that want to be in an epoch and are not in this one",
            max(0, status.pending - status.in_epoch),
        )
