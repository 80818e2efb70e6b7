"""What anybody can see of the runs on a cluster. Reads only, needs no wallet."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Final

from solders.pubkey import Pubkey

from ...errors import CoordinatorLinkError, JoinRefusedError, ProtocolError
from ..formats.account import CoordinatorAccount, read_account
from ..formats.text import to_json
from ..types import ClientState, Coordinator, RunState
from .finding import FoundRun, find_run
from .programs import Programs, account_discriminator
from .rpc import RpcClient, RpcRefusedError
from .small_accounts import INSTANCE_BYTES, CoordinatorInstance, read_small_account
from .treasury import FoundTreasury, find_treasury

__all__ = ["SeenRun", "as_json", "as_plain", "as_text", "in_a_line", "list_runs", "printable", "rows_of", "see_run"]

SHOWN_KEY: Final = 8
"""Characters of a key in a table."""


@dataclass(frozen=True)
class SeenRun:
    """A run as the cluster has it.

    Attributes:
        found: its addresses and authorities.
        account: its state.
        treasury: that pays for points, if there is one.
    """

    found: FoundRun
    account: CoordinatorAccount
    treasury: FoundTreasury | None = None


async def see_run(rpc: RpcClient, programs: Programs, run_id: str) -> SeenRun:
    """Reads a run.

    Raises:
        JoinRefusedError: there is no such run.
        CoordinatorLinkError, ProtocolError: it cannot be read.
    """
    found = await find_run(rpc, programs, run_id)
    read = await rpc.account(found.account)
    if read.data is None:
        raise JoinRefusedError(f"the account {found.account} of the run {run_id!r} was closed", wanted=run_id)
    return SeenRun(found, read_account(read.data), await find_treasury(rpc, programs, found))


async def list_runs(rpc: RpcClient, programs: Programs) -> list[FoundRun]:
    """All runs of a program, by name.

    Raises:
        CoordinatorLinkError: the node does not tell.
    """
    discriminator = base64.b64encode(account_discriminator("CoordinatorInstance")).decode()
    options = {
        "encoding": "base64",
        "commitment": "confirmed",
        "filters": [
            {"dataSize": INSTANCE_BYTES},
            {"memcmp": {"offset": 0, "bytes": discriminator, "encoding": "base64"}},
        ],
    }
    try:
        answer = await rpc.call("getProgramAccounts", [str(programs.coordinator), options])
    except RpcRefusedError as error:
        raise CoordinatorLinkError(
            f"{rpc.name} does not list the runs of a program ({error}): name the run, or ask another node"
        ) from error
    runs = [found for entry in answer if (found := _listed(entry)) is not None] if isinstance(answer, list) else []
    return sorted(runs, key=lambda run: run.run_id)


def _listed(entry: Any) -> FoundRun | None:
    """One entry of the answer; None if it is none, which is the node's fault."""
    try:
        data = base64.b64decode(entry["account"]["data"][0], validate=True)
        instance = read_small_account(CoordinatorInstance, data)
    except (LookupError, TypeError, ValueError, ProtocolError):
        return None
    return FoundRun(
        instance.run_id,
        Pubkey.from_bytes(instance.coordinator_account),
        Pubkey.from_bytes(instance.main_authority),
        Pubkey.from_bytes(instance.join_authority),
    )


# -- showing -----------------------------------------------------------------------------------------------------------


def as_json(run: SeenRun) -> str:
    """Everything, on one line."""
    return json.dumps(as_plain(run))


def as_plain(run: SeenRun) -> dict[str, Any]:
    """Everything, in dicts, lists, strings and numbers."""
    state, treasury = run.account.state, run.treasury
    return {
        "run_id": run.found.run_id,
        "account": str(run.found.account),
        "main_authority": str(run.found.main_authority),
        "join_authority": str(run.found.join_authority),
        "nonce": run.account.nonce,
        "client_version": state.client_version,
        "account_version": run.account.version,
        "metadata": json.loads(to_json(state.metadata)),
        "earning_rate_total_shared": {
            "current": state.clients_state.current_epoch_rates.earning_rate_total_shared,
            "future": state.clients_state.future_epoch_rates.earning_rate_total_shared,
        },
        "slashing_rate_per_client": {
            "current": state.clients_state.current_epoch_rates.slashing_rate_per_client,
            "future": state.clients_state.future_epoch_rates.slashing_rate_per_client,
        },
        "wallets": [
            {
                "wallet": str(Pubkey.from_bytes(client.id.signer)),
                "peer": client.id.p2p_identity.hex(),
                "earned": client.earned,
                "slashed": client.slashed,
                "pending": client.active == state.clients_state.next_active,
            }
            for client in state.clients_state.clients
        ],
        "treasury": None
        if treasury is None
        else {
            "address": str(treasury.instructions.treasury),
            "operator": str(treasury.operator),
            "mint": str(treasury.instructions.mint),
            "tokens": treasury.tokens,
        },
        "coordinator": json.loads(to_json(state.coordinator)),
    }


def rows_of(run: SeenRun) -> list[tuple[str, str]]:
    """What people want to know: names and values."""
    state, found, treasury = run.account.state, run.found, run.treasury
    coordinator, clients = state.coordinator, state.clients_state
    rows = [
        ("run", found.run_id),
        ("account", str(found.account)),
        ("operator", str(found.main_authority if treasury is None else treasury.operator)),
        ("lets in", str(found.join_authority)),
        ("for client", printable(state.client_version)),
        ("account version", str(run.account.version)),
        ("phase", _phase(coordinator)),
        ("step", f"{coordinator.progress.step} of {coordinator.config.total_steps}"),
        ("epoch", str(coordinator.progress.epoch)),
        ("in the epoch", _counted(coordinator)),
        ("waiting to be in it", str(len(clients.pending()))),
        ("ever joined", f"{len(clients.clients)} of at most {coordinator.config.global_batch_size_end}"),
        ("points an epoch", str(clients.current_epoch_rates.earning_rate_total_shared)),
        ("from the next on", str(clients.future_epoch_rates.earning_rate_total_shared)),
    ]
    if treasury is not None:
        rows.append(("treasury", f"{treasury.instructions.treasury}, with tokens for {treasury.tokens} points"))
        rows.append(("its tokens", str(treasury.instructions.mint)))
    slashing = {rates.slashing_rate_per_client for rates in (clients.current_epoch_rates, clients.future_epoch_rates)}
    if slashing != {0}:
        rows.append(
            ("against the ejected", f"{clients.future_epoch_rates.slashing_rate_per_client} points, from the next on")
        )
    if state.metadata.name or state.metadata.description:
        rows.insert(1, ("is about", printable(f"{state.metadata.name}: {state.metadata.description}")))
    return rows


def in_a_line(run: SeenRun) -> str:
    """How it goes."""
    coordinator, clients = run.account.state.coordinator, run.account.state.clients_state
    parts = [
        _phase(coordinator),
        f"epoch {coordinator.progress.epoch}, step {coordinator.progress.step} of {coordinator.config.total_steps}",
        f"{_counted(coordinator)} in the epoch",
        f"{len(clients.pending())} waiting to be in it",
        f"{sum(client.earned for client in clients.clients)} points so far",
    ]
    return "; ".join(parts)


def as_text(run: SeenRun) -> str:
    """What people want to know, some lines."""
    clients, rows = run.account.state.clients_state, rows_of(run)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    earners = [client for client in clients.clients if client.earned]
    if earners:
        lines += ["", "wallet    points"]
        lines += [
            f"{str(Pubkey.from_bytes(client.id.signer))[:SHOWN_KEY]}  {client.earned}"
            for client in sorted(earners, key=lambda client: -client.earned)
        ]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text of strangers without what could steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _phase(coordinator: Coordinator) -> str:
    name = coordinator.run_state.value
    return (
        f"{name}, to be paused" if coordinator.pending_pause and coordinator.run_state is not RunState.PAUSED else name
    )


def _counted(coordinator: Coordinator) -> str:
    clients = coordinator.epoch_state.clients
    healthy = sum(client.state is ClientState.HEALTHY for client in clients)
    return (
        f"{len(clients)}" if healthy == len(clients) else f"{len(clients)}, of whom {len(clients) - healthy} have left"
    )
