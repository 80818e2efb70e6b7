"""What an operator does with a run: each action as transactions, with what they cost, to be shown before they are sent.

Runs whose points are paid by a treasury are refused: there the treasury is the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from typing_extensions import override

from ...errors import ConfigurationError, CoordinatorLinkError, ProtocolError
from ..formats.account import ACCOUNT_SIZE
from ..formats.text import from_toml
from ..model import Model
from ..types import CoordinatorConfig
from .fees import FEE_PER_SIGNATURE, FeeMeter, shown_sol
from .finding import FoundRun, find_run
from .instructions import AuthorizerInstructions, RunInstructions, create_run_account
from .programs import JOIN_SCOPE, Programs
from .rpc import RpcClient
from .sending import Sender
from .small_accounts import INSTANCE_BYTES, Authorization, authorization_bytes, read_small_account

__all__ = ["Operator", "RunFile", "Step", "read_run_file"]


@dataclass(frozen=True)
class RunFile:
    """What a run's TOML says, as Psyche's operators write it: ``[config]`` and ``[model.LLM]``."""

    config: CoordinatorConfig
    model: Model


def read_run_file(text: str) -> RunFile:
    """Reads such a file.

    Raises:
        ConfigurationError: it does not describe a run; says which field is wrong.
    """
    try:
        return from_toml(RunFile, text)
    except ProtocolError as error:
        raise ConfigurationError(f"the file does not describe a run: {error}", name="file") from None


@dataclass(frozen=True)
class Step:
    """One transaction.

    Attributes:
        what: it does, in words.
        instructions: in it.
        signers: who signs besides the wallet.
        deposit: lamports that stay in accounts it makes; they come back when those are closed.
    """

    what: str
    instructions: Sequence[Instruction]
    signers: Sequence[Keypair] = ()
    deposit: int = 0

    @property
    def fee(self) -> int:
        """Lamports that are gone."""
        return FEE_PER_SIGNATURE * (1 + len(self.signers))

    @override
    def __str__(self) -> str:
        deposit = f", and {shown_sol(self.deposit)} stay in it until it is closed" if self.deposit else ""
        return f"{self.what}: costs {shown_sol(self.fee)}{deposit}"


class Operator:
    """Plans actions, and sends them.

    Args:
        rpc: the cluster.
        programs: the deployment.
        wallet: the operator's, and the run's join authority.
        run_id: the run.

    Raises:
        ConfigurationError: no run can have this name.
    """

    def __init__(self, rpc: RpcClient, programs: Programs, wallet: Keypair, run_id: str) -> None:
        self._rpc = rpc
        self._programs = programs
        self._wallet = wallet
        self._run_id = run_id
        self._me = wallet.pubkey()
        programs.instance(run_id)

    async def create(self, client_version: str, *, join_authority: Pubkey | None = None) -> list[Step]:
        """Makes a run, which is halted and has neither model nor settings yet."""
        read = await self._rpc.account(self._programs.instance(self._run_id))
        if read.data is not None:
            raise ConfigurationError(f"there is a run {self._run_id!r} already: choose another name", name="run_id")
        account = Keypair()
        rent = await self._rent(ACCOUNT_SIZE)
        run = RunInstructions(self._programs, self._run_id, account.pubkey())
        instructions = [
            create_run_account(self._programs, self._me, account.pubkey(), rent),
            run.init(self._me, self._me, join_authority or self._me, client_version),
        ]
        deposit = rent + await self._rent(INSTANCE_BYTES)
        return [Step(f"make the run {self._run_id!r}", instructions, [account], deposit)]

    async def configure(self, given: RunFile) -> list[Step]:
        """Gives a halted run its settings and its model."""
        run = await self._mine()
        return [Step("set config and model", [run.update(self._me, None, given.config, given.model)])]

    async def pause(self, paused: bool) -> list[Step]:
        """Stops the run after its epoch, or lets it go on."""
        run = await self._mine()
        return [Step("pause the run" if paused else "resume the run", [run.set_paused(self._me, paused)])]

    async def rates(self, earning: int) -> list[Step]:
        """Sets the points that the clients of an epoch share, from the next one on."""
        run = await self._mine()
        return [Step(f"{earning} points an epoch", [run.set_future_epoch_rates(self._me, earning, None)])]

    async def tick(self) -> list[Step]:
        """Tells the chain that time has passed; anybody may."""
        found = await find_run(self._rpc, self._programs, self._run_id)
        run = RunInstructions(self._programs, self._run_id, found.account)
        return [Step("tick", [run.tick(self._me)])]

    async def close(self) -> list[Step]:
        """Removes a halted run for good; what lies in its accounts comes back."""
        found = await find_run(self._rpc, self._programs, self._run_id)
        if await self._is_treasury(found):
            raise ConfigurationError(
                f"the run {self._run_id!r} has a treasury, {found.main_authority}, and no program of Psyche's closes "
                "such a run: pause it in place of that",
                name="run_id",
            )
        run = await self._mine()
        return [Step(f"close the run {self._run_id!r} for good", [run.free(self._me, self._me)])]

    async def authorize(self, grantee: Pubkey, allowed: bool) -> list[Step]:
        """Lets a wallet in, or no longer; ``EVERYBODY`` stands for any wallet."""
        found = await find_run(self._rpc, self._programs, self._run_id)
        if found.join_authority != self._me:
            raise ConfigurationError(
                f"only {found.join_authority} lets wallets into the run {self._run_id!r}, and this wallet is "
                f"{self._me}",
                name="wallet",
            )
        authorizer = AuthorizerInstructions(self._programs, self._me, grantee)
        read = await self._rpc.account(authorizer.authorization)
        if read.data is None and not allowed:
            raise ConfigurationError(f"{grantee} was never authorized", name="key")
        if read.data is not None and read_small_account(Authorization, read.data).active == allowed:
            return []
        make = [authorizer.create(self._me)] if read.data is None else []
        deposit = await self._rent(authorization_bytes(len(JOIN_SCOPE), 0)) if make else 0
        word = "let in" if allowed else "no longer let in"
        return [Step(f"{word} {grantee}", [*make, authorizer.set_active(allowed)], (), deposit)]

    async def send(self, steps: Sequence[Step]) -> FeeMeter:
        """Carries out what was planned, one after the other; returns what it has cost.

        Raises:
            ConfigurationError: the wallet does not pay for all of it; nothing was sent.
            CoordinatorLinkError: a transaction was refused or got lost; those before it are done.
        """
        needed = sum(step.fee + step.deposit for step in steps)
        balance = await self._rpc.balance(self._me)
        if balance < needed:
            raise ConfigurationError(
                f"the wallet {self._me} holds {shown_sol(balance)}, and {shown_sol(needed)} are needed", name="wallet"
            )
        fees = FeeMeter()
        sender = Sender(self._rpc, self._wallet, fees)
        for step in steps:
            await sender.send(step.instructions, step.signers)
        return fees

    async def _mine(self) -> RunInstructions:
        """Instructions about the run, if it is ours."""
        found: FoundRun = await find_run(self._rpc, self._programs, self._run_id)
        if found.main_authority != self._me:
            raise ConfigurationError(
                f"the operator of the run {self._run_id!r} is {found.main_authority}, and this wallet is {self._me}",
                name="wallet",
            )
        return RunInstructions(self._programs, self._run_id, found.account)

    async def _is_treasury(self, run: FoundRun) -> bool:
        """Whether the run's operator is an account of the treasurer, for which nobody can sign."""
        return (await self._rpc.account(run.main_authority)).owner == self._programs.treasurer

    async def _rent(self, size: int) -> int:
        answer = await self._rpc.call("getMinimumBalanceForRentExemption", [size])
        if not isinstance(answer, int) or answer < 0:
            raise CoordinatorLinkError(f"{self._rpc.name} does not tell what an account of {size} bytes costs")
        return answer
