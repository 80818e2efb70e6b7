"""A run on the cluster: its accounts, whether this wallet may join, and what speaks against it.

Everything here only reads, so that whatever is wrong is said before anything is paid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from solders.pubkey import Pubkey

from ...errors import CoordinatorLinkError, JoinRefusedError, PaymentError, ProtocolError
from ..formats.account import CoordinatorAccount, version_of
from ..types import MAX_NUM_CLIENTS, RunState
from .decisions.checkpoint_format import Deployment
from .fees import FeeMeter, shown_sol
from .programs import CLOCK_SYSVAR, EVERYBODY, JOIN_SCOPE, NATIVE_LOADER, UPGRADEABLE_LOADER, Programs
from .rpc import RpcClient
from .small_accounts import (
    PROGRAM_DATA_HEAD,
    Authorization,
    CoordinatorInstance,
    deployment_slot,
    program_data_of,
    read_clock,
    read_small_account,
)

__all__ = [
    "FoundRun",
    "check_balance",
    "check_bytes",
    "check_room",
    "check_version",
    "cluster_time",
    "find_authorization",
    "find_deployment",
    "find_run",
]


@dataclass(frozen=True)
class FoundRun:
    """The small account of a run.

    Attributes:
        run_id: name of the run.
        account: address of the big account.
        main_authority: key of the operator, or a treasury.
        join_authority: key that lets wallets in.
    """

    run_id: str
    account: Pubkey
    main_authority: Pubkey
    join_authority: Pubkey


async def find_run(
    rpc: RpcClient,
    programs: Programs,
    run_id: str,
    *,
    join_authority: Pubkey | None = None,
    main_authority: Pubkey | None = None,
) -> FoundRun:
    """Reads the small account of a run.

    Args:
        rpc: the cluster.
        programs: the deployment.
        run_id: name of the run.
        join_authority: the key that must let wallets in; anybody can take any free name for a run.
        main_authority: the key that must operate the run, or its treasury.

    Raises:
        JoinRefusedError: there is no such run, or it belongs to somebody else.
        CoordinatorLinkError, ProtocolError: see :class:`~.rpc.RpcClient`.
    """
    address = programs.instance(run_id)
    read = await rpc.account(address)
    if read.data is None or read.owner != programs.coordinator:
        raise JoinRefusedError(
            f"there is no run {run_id!r} at {rpc.name} under the program {programs.coordinator}: is the name right, "
            "and is this the cluster and the program of the run?",
            wanted=run_id,
        )
    try:
        instance = read_small_account(CoordinatorInstance, read.data)
    except ProtocolError as error:
        raise ProtocolError(f"the account of the run {run_id!r} cannot be read ({error})") from error
    found = FoundRun(
        run_id,
        Pubkey.from_bytes(instance.coordinator_account),
        Pubkey.from_bytes(instance.main_authority),
        Pubkey.from_bytes(instance.join_authority),
    )
    for what, is_key, must_be in (
        ("join", found.join_authority, join_authority),
        ("main", found.main_authority, main_authority),
    ):
        if must_be is not None and is_key != must_be:
            raise JoinRefusedError(
                f"the run {run_id!r} belongs to somebody else: its {what} authority is {is_key}, not {must_be}",
                wanted=run_id,
            )
    return found


async def find_authorization(
    rpc: RpcClient, programs: Programs, run: FoundRun, wallet: Pubkey, authorizer: Pubkey | None = None
) -> Pubkey:
    """The authorization that lets ``wallet`` in: everybody's, its own, or one whose grantee delegates to it.

    Args:
        rpc: the cluster.
        programs: the deployment.
        run: the run.
        wallet: who wants in.
        authorizer: the grantee of an authorization that may name the wallet as a delegate.

    Raises:
        JoinRefusedError: none does.
    """
    grantees = [EVERYBODY, wallet] if authorizer is None else [authorizer, EVERYBODY, wallet]
    inactive = False
    for grantee in grantees:
        address = programs.authorization(run.join_authority, grantee)
        read = await rpc.account(address)
        if read.data is None or read.owner != programs.authorizer:
            continue
        value = read_small_account(Authorization, read.data)
        if value.is_valid_for(bytes(run.join_authority), bytes(wallet), JOIN_SCOPE):
            return address
        # Everybody's, where nobody may come in just so, is no authorization of this wallet.
        is_ours = grantee != EVERYBODY and replace(value, active=True).is_valid_for(
            bytes(run.join_authority), bytes(wallet), JOIN_SCOPE
        )
        inactive = inactive or is_ours
    reason = "its authorization is not active" if inactive else "there is no authorization for it"
    raise JoinRefusedError(
        f"the wallet {wallet} may not join the run {run.run_id!r}: {reason}; give its address to the run's operator, "
        "or name the key that has authorized it",
        wanted=run.run_id,
    )


def check_bytes(data: bytes, selected: int | None) -> None:
    """Raises ProtocolError unless the bytes are an account of a run, of the version that was selected."""
    try:
        version = version_of(data)
    except ProtocolError as error:
        raise ProtocolError(
            f"{error}: it is of another version of Psyche's program; look for a newer distro_optim"
        ) from None
    _check_selected(version, selected)


def check_version(account: CoordinatorAccount, selected: int) -> None:
    """The same of an account that was read."""
    _check_selected(account.version, selected)


def _check_selected(version: int, selected: int | None) -> None:
    if selected is not None and version != selected:
        raise ProtocolError(
            f"the account of the run has version {version}, and version {selected} is selected: give "
            f"--account-version {version}, or account_version={version}"
        )


def check_room(account: CoordinatorAccount, run_id: str, wallet: bytes) -> None:
    """Raises JoinRefusedError if the run is over, or full for this wallet."""
    state, clients = account.state.coordinator, account.state.clients_state.clients
    if state.run_state is RunState.FINISHED:
        raise JoinRefusedError(f"the run {run_id!r} is finished", wanted=run_id)
    if any(client.id.signer == wallet for client in clients):
        return
    if len(clients) >= MAX_NUM_CLIENTS:
        raise JoinRefusedError(
            f"the run {run_id!r} is full for good: {MAX_NUM_CLIENTS} wallets have joined it, and only those can join "
            "again",
            wanted=run_id,
        )
    if state.run_state is not RunState.UNINITIALIZED and len(clients) == state.config.global_batch_size_end:
        raise JoinRefusedError(
            f"the run {run_id!r} is full: as many wallets have joined it as a batch has sequences, {len(clients)}; its "
            "operator can make the batches larger",
            wanted=run_id,
        )


async def check_balance(rpc: RpcClient, wallet: Pubkey, fees: FeeMeter) -> int:
    """The wallet's lamports.

    Raises:
        PaymentError: they do not pay for the first transactions, besides what must stay in a wallet.
    """
    balance = await rpc.balance(wallet)
    needed = fees.needed_to_begin
    if balance < needed:
        raise PaymentError(
            f"the wallet {wallet} holds {shown_sol(balance)} at {rpc.name}, and taking part begins with "
            f"{shown_sol(needed)}: put at least {shown_sol(needed - balance)} into it"
        )
    return balance


async def cluster_time(rpc: RpcClient) -> int:
    """The cluster's Unix time in seconds."""
    return (await _clock(rpc))[1]


async def _clock(rpc: RpcClient) -> tuple[int, int]:
    """The cluster's slot, and its Unix time in seconds."""
    read = await rpc.account(CLOCK_SYSVAR)
    if read.data is None:
        raise ProtocolError(f"{rpc.name} has no clock")
    return read_clock(read.data)


async def find_deployment(rpc: RpcClient, program: Pubkey) -> Deployment:
    """When a program was last deployed, as far as the cluster tells. Reads only its first bytes.

    Raises:
        CoordinatorLinkError: no node answers, or there is no such program.
        ProtocolError: the answer makes no sense.
    """
    read = await rpc.account(program)
    if read.data is None:
        raise CoordinatorLinkError(f"there is no program {program} at {rpc.name}: is this the cluster of the run?")
    if read.owner == NATIVE_LOADER:
        return Deployment(is_built_in=True)
    if read.owner != UPGRADEABLE_LOADER:
        return Deployment()
    code = await rpc.account(Pubkey.from_bytes(program_data_of(read.data)), length=PROGRAM_DATA_HEAD)
    if code.data is None:
        raise CoordinatorLinkError(f"the program {program} at {rpc.name} was closed")
    slot = deployment_slot(code.data)
    slot_now, now = await _clock(rpc)
    try:
        made = await rpc.call("getBlockTime", [slot])
    except CoordinatorLinkError:
        made = None  # nodes forget old blocks
    return Deployment(False, slot, made if isinstance(made, int) else None, slot_now, now)
