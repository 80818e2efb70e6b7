"""How a run is doing, for people and for machines to look at."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..coordinator.rules.points import ClientAccount, EpochAccount
from ..coordinator.rules.steps import counted_steps
from ..coordinator.server.host import EpochAbandoned, EpochEnded, Joined, Left, PhaseChanged, Refused
from ..coordinator.server.service import Connected, CoordinatorService, Disconnected, ServiceEvent, Woke
from ..coordinator.types import ClientState, NodeIdentity, RunState

__all__ = ["PHASE_NAMES", "ClientStatus", "RunStatus", "describe", "event_record", "status_of"]

PHASE_NAMES = {
    RunState.UNINITIALIZED: "Uninitialized",
    RunState.WAITING_FOR_MEMBERS: "Waiting for members",
    RunState.WARMUP: "Warmup",
    RunState.ROUND_TRAIN: "Training",
    RunState.ROUND_WITNESS: "Witness",
    RunState.COOLDOWN: "Cooldown",
    RunState.FINISHED: "Finished",
    RunState.PAUSED: "Paused",
}
"""As Psyche shows them."""


@dataclass(frozen=True)
class ClientStatus:
    """One client.

    Attributes:
        key: public key in hexadecimal.
        address: where it connects from; empty if it does not.
        state: in the epoch, such as "Healthy"; "Pending" if it waits for one, "Watching" if it has not joined.
        reported_step: of its last report; None before the first.
        loss: in its last report; None if it named none.
        tokens_per_second: of the run, as it measured.
        samples, equal, work: that a quorum saw, and points for them in both ways to count; None where the server keeps
            no ledger.
    """

    key: str
    address: str
    state: str
    reported_step: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    samples: int | None = None
    equal: int | None = None
    work: int | None = None


@dataclass(frozen=True)
class RunStatus:
    """The run.

    Attributes:
        phase_seconds: since the phase began.
        witnesses: reports on the current round.
        tokens_per_second: median of what the clients reported last; None before the first report.
        loss: likewise.
    """

    run_id: str
    phase: str
    phase_seconds: int
    epoch: int
    step: int
    total_steps: int
    round: int
    witnesses: int
    connected: int
    pending: int
    in_epoch: int
    tokens_per_second: float | None
    loss: float | None
    clients: tuple[ClientStatus, ...]


def status_of(service: CoordinatorService, now: float) -> RunStatus:
    """The present status.

    Args:
        service: the coordinator.
        now: monotonic seconds.
    """
    host, state = service.host, service.host.state
    members = {member.id: member.state for member in state.epoch_state.clients}
    step, total_steps = counted_steps(state)
    everybody = dict.fromkeys([*members, *service.clients, *host.pending])
    points = host.points
    clients = tuple(_client_status(service, client, members.get(client), points) for client in everybody)
    return RunStatus(
        run_id=state.run_id,
        phase=PHASE_NAMES[state.run_state],
        phase_seconds=max(0, service.unix_time(now) - state.run_state_start_unix_timestamp),
        epoch=state.progress.epoch,
        step=step,
        total_steps=total_steps,
        round=state.current_round.height,
        witnesses=len(state.current_round.witnesses),
        connected=len(service.clients),
        pending=len(host.pending),
        in_epoch=sum(1 for member in members.values() if member is ClientState.HEALTHY),
        tokens_per_second=_median([client.tokens_per_second for client in clients]),
        loss=_median([client.loss for client in clients]),
        clients=clients,
    )


def _client_status(
    service: CoordinatorService,
    client: NodeIdentity,
    member: ClientState | None,
    points: Mapping[bytes, ClientAccount] | None,
) -> ClientStatus:
    one = None if points is None else points.get(client.signer, ClientAccount())
    session = service.clients.get(client)
    report = service.host.reports.get(client)
    waiting = "Pending" if client in service.host.pending else "Watching"
    return ClientStatus(
        key=client.signer.hex(),
        address=session.address if session else "",
        state=member.value if member else waiting,
        reported_step=report.step if report else None,
        loss=_finite(report.loss) if report else None,
        tokens_per_second=(_finite(report.tokens_per_sec) or None) if report else None,  # 0: not measured yet
        samples=None if one is None else one.samples,
        equal=None if one is None else one.equal,
        work=None if one is None else one.work,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: list[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return statistics.median(given) if given else None


def event_record(event: ServiceEvent) -> dict[str, Any]:
    """An event as a JSON object: its name as ``event``, keys in hexadecimal, phases by their names in state files."""
    record: dict[str, Any] = {"event": re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if isinstance(value, NodeIdentity):
            value = value.signer.hex()
        elif isinstance(value, enum.Enum):
            value = value.value
        elif isinstance(value, EpochAccount):
            value = {key.hex(): dataclasses.asdict(one) for key, one in value.clients.items()}
        record[field.name] = value
    return record


def describe(event: ServiceEvent) -> str:
    """An event as a line for people."""
    match event:
        case Connected():
            return f"{event.client} connected from {event.address}"
        case Disconnected():
            return f"{event.client or 'someone'} at {event.address} is gone: {event.reason}"
        case Joined():
            return f"{event.client} joined"
        case Left():
            return f"{event.client} left"
        case Refused():
            return f"{event.client}: {event.reason}"
        case PhaseChanged():
            return f"{PHASE_NAMES[event.before]} -> {PHASE_NAMES[event.after]}"
        case Woke(seconds=seconds):
            return f"we have slept for {seconds:.0f} s; the run's clock stood still, and clients may come back"
        case EpochEnded(account=account):
            return "the epoch is complete" if account is None else f"the epoch is complete: {_points(account)}"
        case EpochAbandoned():
            return "the epoch is abandoned: too few clients are left"


_NAMED: Final = 8
"""Clients whose points are told at the end of an epoch."""


def _points(account: EpochAccount) -> str:
    """Who has done most, in words."""
    most = sorted(account.clients.items(), key=lambda item: -item[1].work)
    named = [f"{key.hex()[:8]} {one.samples} samples, {one.work} points" for key, one in most[:_NAMED]]
    more = [f"{len(most) - _NAMED} more"] if len(most) > _NAMED else []
    return "; ".join([*named, *more]) or "nobody was in it"
