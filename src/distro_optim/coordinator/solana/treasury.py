"""Runs whose points are paid: the treasury that stands for a run's operator, and what a wallet can claim of it.

A treasury is an account of the treasurer program. It is the ``main_authority`` of its run, so that its own operator
changes the run through it, and it owns the tokens that pay for points, one base unit of them for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from solders.instruction import Instruction
from solders.pubkey import Pubkey

from ...errors import ConfigurationError, ProtocolError
from ..formats.account import CoordinatorAccount
from . import arguments as args
from .finding import FoundRun, check_version
from .instructions import (
    RunInstructions,
    TreasurerInstructions,
    check_claimer,
    create_token_account,
    transfer_tokens,
)
from .programs import TOKEN_PROGRAM, Programs, associated_token_account
from .rpc import RpcClient
from .small_accounts import (
    MINT_BYTES,
    PARTICIPANT_BYTES,
    TOKEN_ACCOUNT_BYTES,
    Participant,
    TokenAccount,
    Treasury,
    has_delegate,
    mint_decimals,
    read_small_account,
)
from .steps import Step

__all__ = [
    "Claimable",
    "FoundTreasury",
    "RunAuthority",
    "claimable",
    "decimals_of",
    "find_treasury",
    "plan_claim",
    "plan_gift",
    "shown_tokens",
]


@dataclass(frozen=True)
class FoundTreasury:
    """A run's treasury.

    Attributes:
        operator: the key that changes the run through it.
        instructions: about it.
        tokens: base units that it holds.
    """

    operator: Pubkey
    instructions: TreasurerInstructions
    tokens: int


async def find_treasury(rpc: RpcClient, programs: Programs, run: FoundRun) -> FoundTreasury | None:
    """The treasury of a run; None if its points are paid by nobody.

    Raises:
        CoordinatorLinkError: no node answers.
        ProtocolError: it cannot be read, or is that of another run.
    """
    read = await rpc.account(run.main_authority)
    if read.data is None or read.owner != programs.treasurer:
        return None
    value = read_small_account(Treasury, read.data)
    # Anybody can name any treasury as the operator of a run.
    if value.coordinator_account != bytes(run.account):
        raise ProtocolError(f"the treasury {run.main_authority} that the run {run.run_id!r} names is that of another")
    mint = Pubkey.from_bytes(value.collateral_mint)
    instructions = TreasurerInstructions(programs, value.index, mint, run.run_id, run.account)
    held = await rpc.account(instructions.collateral)
    tokens = 0 if held.data is None else TokenAccount.read(held.data).amount
    return FoundTreasury(Pubkey.from_bytes(value.main_authority), instructions, tokens)


@dataclass(frozen=True)
class RunAuthority:
    """Whoever changes a run: its operator's wallet, through the treasury where there is one.

    Attributes:
        key: of the wallet.
        run: the run.
        treasury: None for a run without.
    """

    key: Pubkey
    run: RunInstructions
    treasury: TreasurerInstructions | None = None

    def change(self, changes: args.RunUpdate) -> list[Instruction]:
        """The instructions that change what is given: all of it, or nothing."""
        if self.treasury is not None:
            return [self.treasury.update(self.key, changes)]
        run, key = self.run, self.key
        state = (changes.metadata, changes.config, changes.model, changes.progress)
        rates = (changes.epoch_earning_rate_total_shared, changes.epoch_slashing_rate_per_client)
        made = [run.update(key, *state)] if any(part is not None for part in state) else []
        if any(rate is not None for rate in rates):
            made.append(run.set_future_epoch_rates(key, *rates))
        if changes.paused is not None:
            made.append(run.set_paused(key, changes.paused))
        if changes.client_version is not None:
            made.append(run.update_client_version(key, changes.client_version))
        return made


# -- claims ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claimable:
    """What a wallet has earned in a run, and what of it can be had.

    Attributes:
        earned: points, ever.
        claimed: of them, those that were turned into tokens.
        tokens: base units that the treasury holds.
        has_participant: whether the account is there that remembers the claims.
        has_tokens: whether the wallet has an account for such tokens.
    """

    earned: int
    claimed: int
    tokens: int
    has_participant: bool
    has_tokens: bool

    @property
    def points(self) -> int:
        """That can be claimed now."""
        return max(0, min(self.earned - self.claimed, self.tokens))


async def claimable(
    rpc: RpcClient, treasury: FoundTreasury, account: CoordinatorAccount, wallet: Pubkey, user: Pubkey | None = None
) -> Claimable:
    """What ``wallet`` can claim of the points of ``user``, by default its own.

    Raises:
        ConfigurationError: that one never joined the run, named another wallet for its points, or the account for the
            tokens is not the wallet's alone.
        CoordinatorLinkError: no node answers.
        ProtocolError: an account cannot be read, or is of another version than the one that is selected.
    """
    given = treasury.instructions
    check_version(account, given.programs.account_version)
    user = wallet if user is None else user
    earned = _earned_for(given, account, wallet, user)
    participant = await rpc.account(given.programs.participant(given.treasury, user))
    claimed = 0
    if participant.data is not None:
        claimed = read_small_account(Participant, participant.data).claimed_earned_points
    target = associated_token_account(wallet, given.mint)
    held = await rpc.account(target)
    if held.data is not None and (TokenAccount.read(held.data).owner != bytes(wallet) or has_delegate(held.data)):
        raise ConfigurationError(
            f"the treasury pays to nobody who shares an account, and {target} has another owner or a delegate: "
            "revoke that first",
            name="wallet",
        )
    return Claimable(earned, claimed, treasury.tokens, participant.data is not None, held.data is not None)


def _earned_for(given: TreasurerInstructions, account: CoordinatorAccount, wallet: Pubkey, user: Pubkey) -> int:
    """Points of ``user``, if they are paid to ``wallet``."""
    check_claimer(given.programs, None if user == wallet else wallet)
    clients = account.state.clients_state.clients
    entry = next((client for client in clients if client.id.signer == bytes(user)), None)
    if entry is None:
        others = [str(Pubkey.from_bytes(client.id.signer)) for client in clients if client.claimer == bytes(wallet)]
        hint = f"; it is paid for the points of {', '.join(others)}: name one with --user" if others else ""
        raise ConfigurationError(f"the wallet {user} has never joined the run {given.run_id!r}{hint}", name="wallet")
    if given.programs.has_claimers and entry.claimer != bytes(wallet):
        raise ConfigurationError(
            f"the points of {user} are paid to {Pubkey.from_bytes(entry.claimer)}, and this wallet is {wallet}",
            name="wallet",
        )
    return entry.earned


async def plan_claim(
    rpc: RpcClient,
    treasury: FoundTreasury,
    account: CoordinatorAccount,
    wallet: Pubkey,
    points: int | None = None,
    user: Pubkey | None = None,
) -> list[Step]:
    """Turns points into tokens of ``wallet``; the accounts that this takes are made if they are missing.

    Args:
        rpc: the cluster.
        treasury: that pays.
        account: the run.
        wallet: gets the tokens and pays for the transaction.
        points: so many; None takes all that the treasury can pay.
        user: whose points; by default those of ``wallet``. Another must have named it, in accounts of version 2.

    Raises:
        ConfigurationError: it has no such points, or the treasury not the tokens.
        CoordinatorLinkError, ProtocolError: see :func:`claimable`.
    """
    user = wallet if user is None else user
    mine = await claimable(rpc, treasury, account, wallet, user)
    left = mine.earned - mine.claimed
    if points is None and not left:
        return []
    wanted = mine.points if points is None else points
    if not 0 < wanted <= mine.points:
        raise ConfigurationError(
            f"{user} has earned {mine.earned} points and claimed {mine.claimed} of them, and the treasury has tokens "
            f"for {mine.tokens}: {mine.points} can be claimed now",
            name="points",
            value=wanted,
        )
    given = treasury.instructions
    make = [] if mine.has_tokens else [create_token_account(wallet, wallet, given.mint)]
    deposit = 0 if mine.has_tokens else await rpc.rent(TOKEN_ACCOUNT_BYTES)
    if not mine.has_participant:
        make.append(given.create_participant(wallet, user))
        deposit += await rpc.rent(PARTICIPANT_BYTES)
    amount = shown_tokens(wanted, await decimals_of(rpc, given.mint))
    what = f"claim {wanted} of {left} points, for {amount} tokens of {given.mint}"
    claim = given.claim(user, wanted, claimer=None if user == wallet else wallet)
    return [Step(what, [*make, claim], (), deposit, forever=True)]


async def plan_gift(rpc: RpcClient, treasury: FoundTreasury, wallet: Pubkey, units: int) -> list[Step]:
    """Gives a treasury tokens of ``wallet``.

    Args:
        rpc: the cluster.
        treasury: that gets them.
        wallet: gives.
        units: base units; each pays for a point.

    Raises:
        ConfigurationError: it has not so many.
        CoordinatorLinkError, ProtocolError: an account cannot be read.
    """
    given = treasury.instructions
    held = await rpc.account(associated_token_account(wallet, given.mint))
    tokens = 0 if held.data is None else TokenAccount.read(held.data).amount
    if not 0 < units <= tokens:
        raise ConfigurationError(
            f"the wallet {wallet} holds {tokens} base units of the tokens {given.mint}, and cannot give {units}",
            name="tokens",
            value=units,
        )
    amount = shown_tokens(units, await decimals_of(rpc, given.mint))
    what = f"give {amount} tokens of {given.mint} to the treasury, for {units} points"
    return [Step(what, [transfer_tokens(wallet, given.treasury, given.mint, units)])]


async def decimals_of(rpc: RpcClient, mint: Pubkey) -> int:
    """How many digits after the point people write of these tokens.

    Raises:
        ConfigurationError: there are no such tokens.
    """
    read = await rpc.account(mint)
    if read.data is None or read.owner != TOKEN_PROGRAM or len(read.data) != MINT_BYTES:
        raise ConfigurationError(f"{mint} is no mint of tokens at {rpc.name}", name="mint", value=str(mint))
    return mint_decimals(read.data)


def shown_tokens(units: int, decimals: int) -> str:
    """An amount of tokens as people read it."""
    whole, rest = divmod(units, 10**decimals)
    digits = f"{rest:0{decimals}d}".rstrip("0") if decimals else ""
    return f"{whole}.{digits}" if digits else str(whole)
