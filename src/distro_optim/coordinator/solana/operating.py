"""What an operator does with a run, and a wallet with its points: each action as transactions, with what they cost, to
be shown before they are sent.

A run is changed by the wallet that made it; if its points are paid, through its treasury.
"""

from __future__ import annotations

from collections.abc import Sequence

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from ...errors import ConfigurationError
from ..model import Checkpoint, Gcs, GcsRepo, Hub, HubRepo
from ..rules import machine
from .arguments import RunUpdate
from .decisions.checkpoint_format import check_checkpoint_format
from .fees import FeeMeter, shown_sol
from .finding import FoundRun, find_deployment, find_run
from .instructions import AuthorizerInstructions, RunInstructions, TreasurerInstructions, create_run_account
from .programs import EVERYBODY, JOIN_SCOPE, Programs, default_treasurer_index
from .rpc import RpcClient
from .sending import MAX_TRANSACTION_BYTES, Sender
from .settings import Settings, changes_of, check_version, repository_of, words_for
from .small_accounts import (
    INSTANCE_BYTES,
    TOKEN_ACCOUNT_BYTES,
    TREASURY_BYTES,
    Authorization,
    authorization_bytes,
    read_small_account,
)
from .steps import Step, in_parts, needed_for, transaction_bytes
from .treasury import FoundTreasury, RunAuthority, decimals_of, find_treasury, plan_claim, plan_gift
from .viewing import see_run

__all__ = ["Operator"]


class Operator:
    """Plans actions, and sends them.

    Args:
        rpc: the cluster.
        programs: the deployment.
        wallet: signs and pays: the operator's, or whose the action is.
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

    # -- a run ---------------------------------------------------------------------------------------------------------

    async def create(
        self,
        client_version: str,
        *,
        join_authority: Pubkey | None = None,
        mint: Pubkey | None = None,
        treasurer_index: int | None = None,
    ) -> list[Step]:
        """Makes a run, which is halted and has neither model nor settings yet.

        Args:
            client_version: which client it is for.
            join_authority: lets wallets in; by default this wallet.
            mint: the tokens that pay for points; None makes a run without a treasury.
            treasurer_index: number of the treasury; by default it follows from the name of the run.
        """
        check_version(client_version)
        read = await self._rpc.account(self._programs.instance(self._run_id))
        if read.data is not None:
            raise ConfigurationError(f"there is a run {self._run_id!r} already: choose another name", name="run_id")
        account = Keypair()
        rent = await self._rpc.rent(self._programs.account_size)
        make = create_run_account(self._programs, self._me, account.pubkey(), rent)
        deposit = rent + await self._rpc.rent(INSTANCE_BYTES)
        joins = join_authority or self._me
        if mint is None:
            if treasurer_index is not None:
                raise ConfigurationError(
                    "a treasury has a number only if there is one: name the tokens that it pays with", name="mint"
                )
            run = RunInstructions(self._programs, self._run_id, account.pubkey())
            init = run.init(self._me, self._me, joins, client_version)
            return [Step(f"make the run {self._run_id!r}", [make, init], [account], deposit)]
        index = default_treasurer_index(self._run_id) if treasurer_index is None else treasurer_index
        if not 0 <= index < 1 << 64:
            raise ConfigurationError("the number of a treasury has 64 bits", name="treasurer_index", value=index)
        await decimals_of(self._rpc, mint)  # says if there are no such tokens
        treasury = TreasurerInstructions(self._programs, index, mint, self._run_id, account.pubkey())
        for key in (treasury.treasury, treasury.collateral):
            if (await self._rpc.account(key)).lamports:
                raise ConfigurationError(
                    f"there is a treasury with the number {index} already: give this one another",
                    name="treasurer_index",
                    value=index,
                )
        deposit += await self._rpc.rent(TREASURY_BYTES) + await self._rpc.rent(TOKEN_ACCOUNT_BYTES)
        init = treasury.create(self._me, self._me, joins, client_version)
        what = f"make the run {self._run_id!r} with the treasury {treasury.treasury}"
        return [Step(what, [make, init], [account], deposit, forever=True)]

    async def configure(self, given: Settings) -> list[Step]:
        """Changes a halted run; in several transactions where one would be too long."""
        seen = await see_run(self._rpc, self._programs, self._run_id)
        authority = self._authority_of(seen.found, seen.treasury)
        parts = in_parts(self._me, changes_of(seen.account, given), authority.change)
        return [Step(words_for(part), authority.change(part)) for part in parts]

    async def pause(self, paused: bool) -> list[Step]:
        """Stops the run after its epoch, or lets it go on."""
        authority = await self._authority()
        return [Step("pause the run" if paused else "resume the run", authority.change(RunUpdate(paused=paused)))]

    async def rates(self, earning: int | None, slashing: int | None = None) -> list[Step]:
        """Sets points from the next epoch on.

        Args:
            earning: that the clients of an epoch share.
            slashing: noted against each client that is ejected, beside what it has earned. Psyche's program has that
                number and ejects nobody.

        Raises:
            ConfigurationError: this wallet is not the operator's, or the account has no place for so many.
        """
        for name, points in (("points", earning), ("slashing", slashing)):
            if points is not None and not 0 <= points < 1 << 64:
                raise ConfigurationError(f"{name} takes a number of 64 bits, 0 or more", name=name, value=points)
        seen = await see_run(self._rpc, self._programs, self._run_id)
        authority = self._authority_of(seen.found, seen.treasury)
        now = seen.account.state.clients_state.future_epoch_rates
        if earning == now.earning_rate_total_shared:
            earning = None
        if slashing == now.slashing_rate_per_client:
            slashing = None
        change = RunUpdate(epoch_earning_rate_total_shared=earning, epoch_slashing_rate_per_client=slashing)
        words = {"points an epoch": earning, "points against each client that is ejected": slashing}
        what = " and ".join(f"{points} {word}" for word, points in words.items() if points is not None)
        return [Step(what, authority.change(change))] if what else []

    async def tick(self) -> list[Step]:
        """Tells the chain that time has passed; anybody may."""
        found = await find_run(self._rpc, self._programs, self._run_id)
        run = RunInstructions(self._programs, self._run_id, found.account)
        return [Step("tick", [run.tick(self._me)])]

    async def checkpoint(self, uploaded: Checkpoint, *, check_format: bool = True) -> list[Step]:
        """Says where the model was uploaded to; the run's clients of the present epoch may.

        Args:
            uploaded: where it is.
            check_format: look first whether the program knows this form of a checkpoint.

        Raises:
            ConfigurationError: this wallet is no client of the epoch, or the run's model is of another kind.
            OldProgramError: the program may take it for something else.
        """
        seen = await see_run(self._rpc, self._programs, self._run_id)
        state = seen.account.state.coordinator
        clients = [client.id for client in state.epoch_state.clients]
        index = next((at for at, client in enumerate(clients) if client.signer == bytes(self._me)), None)
        if index is None:
            raise ConfigurationError(
                f"only a client of the present epoch says where the model is, and {self._me} is none: use the wallet "
                "with which you train, or pause the run and use configure",
                name="wallet",
            )
        after = machine.checkpoint(state, clients[index], index, uploaded).model.checkpoint
        if after == state.model.checkpoint:
            if repository_of(after) == repository_of(uploaded):
                return []
            raise ConfigurationError(_why_not(after), name="checkpoint")
        if check_format:
            program = self._programs.coordinator
            check_checkpoint_format(program, await find_deployment(self._rpc, program))
        run = RunInstructions(self._programs, self._run_id, seen.found.account)
        return [Step(f"say that the model is in {_place(uploaded)}", [run.checkpoint(self._me, uploaded)])]

    async def close(self) -> list[Step]:
        """Removes a halted run for good; what lies in its accounts comes back."""
        authority = await self._authority()
        if authority.treasury is not None:
            raise ConfigurationError(
                f"the run {self._run_id!r} has a treasury, {authority.treasury.treasury}, and no program of Psyche's "
                "closes such a run: pause it in place of that",
                name="run_id",
            )
        return [Step(f"close the run {self._run_id!r} for good", [authority.run.free(self._me, self._me)])]

    # -- who may join --------------------------------------------------------------------------------------------------

    async def authorize(self, grantee: Pubkey, allowed: bool) -> list[Step]:
        """Lets a wallet in, or no longer; ``EVERYBODY`` stands for any wallet."""
        authorizer = await self._authorizer(grantee)
        read = await self._rpc.account(authorizer.authorization)
        if read.data is None and not allowed:
            raise ConfigurationError(f"{grantee} was never authorized", name="key")
        if read.data is not None and read_small_account(Authorization, read.data).active == allowed:
            return []
        make = [authorizer.create(self._me)] if read.data is None else []
        deposit = await self._rpc.rent(authorization_bytes(len(JOIN_SCOPE), 0)) if make else 0
        word = "let in" if allowed else "no longer let in"
        return [
            Step(f"{word} {_whom(grantee)} {self._everywhere}", [*make, authorizer.set_active(allowed)], (), deposit)
        ]

    async def unauthorize(self, grantee: Pubkey) -> list[Step]:
        """Removes an authorization; what lies in its account comes back."""
        authorizer = await self._authorizer(grantee)
        read = await self._rpc.account(authorizer.authorization)
        if read.data is None:
            raise ConfigurationError(f"{grantee} was never authorized", name="key")
        stop = [authorizer.set_active(False)] if read_small_account(Authorization, read.data).active else []
        what = f"remove the authorization of {_whom(grantee)} {self._everywhere}; {shown_sol(read.lamports)} come back"
        return [Step(what, [*stop, authorizer.close(self._me)])]

    async def delegate(self, wallets: Sequence[Pubkey], *, clear: bool = False) -> list[Step]:
        """Lets further wallets in by this wallet's own authorization.

        Args:
            wallets: that may join from now on.
            clear: forget those that could until now.
        """
        found = await find_run(self._rpc, self._programs, self._run_id)
        authorizer = AuthorizerInstructions(self._programs, found.join_authority, self._me)
        read = await self._rpc.account(authorizer.authorization)
        if read.data is None:
            raise ConfigurationError(
                f"{self._me} has no authorization to share: have {found.join_authority} authorize it for the run "
                f"{self._run_id!r} first",
                name="wallet",
            )
        known = () if clear else read_small_account(Authorization, read.data).delegates
        added = [key for key in dict.fromkeys(wallets) if bytes(key) not in known]
        groups = self._groups(authorizer, added)
        if not groups and clear:
            groups = [[]]
        steps = []
        size, deposited = len(known), read.lamports
        for number, group in enumerate(groups):
            clears = clear and number == 0
            size += len(group)
            needed = await self._rpc.rent(authorization_bytes(len(JOIN_SCOPE), size))
            words = (["forget the delegates until now"] if clears else []) + [f"let in {key}" for key in group]
            instruction = authorizer.delegate(self._me, group, clear=clears)
            steps.append(Step(", ".join(words), [instruction], (), max(0, needed - deposited)))
            deposited = max(needed, deposited) if not clears else needed
        return steps

    def _groups(self, authorizer: AuthorizerInstructions, added: Sequence[Pubkey]) -> list[list[Pubkey]]:
        """As many keys at a time as fit in a transaction."""
        groups: list[list[Pubkey]] = []
        for key in added:
            both = [*groups[-1], key] if groups else [key]
            fits = transaction_bytes(self._me, [authorizer.delegate(self._me, both)]) <= MAX_TRANSACTION_BYTES
            if groups and fits:
                groups[-1] = both
            else:
                groups.append([key])
        return groups

    # -- points --------------------------------------------------------------------------------------------------------

    async def claim(self, points: int | None = None, user: Pubkey | None = None) -> list[Step]:
        """Turns points into tokens of this wallet.

        Args:
            points: so many; None takes all that the treasury can pay.
            user: whose points, if this wallet was named to be paid for them; by default its own.

        Raises:
            ConfigurationError: nobody pays for the run's points, or not for so many, or not to this wallet.
            ProtocolError: the run's account is of another version than the one that is selected.
        """
        seen = await see_run(self._rpc, self._programs, self._run_id)
        return await plan_claim(self._rpc, self._paid_by(seen.treasury), seen.account, self._me, points, user)

    async def fund(self, units: int) -> list[Step]:
        """Gives the run's treasury tokens of this wallet, in base units: one pays for a point."""
        found = await find_run(self._rpc, self._programs, self._run_id)
        treasury = self._paid_by(await find_treasury(self._rpc, self._programs, found))
        return await plan_gift(self._rpc, treasury, self._me, units)

    # -- sending -------------------------------------------------------------------------------------------------------

    async def balance(self) -> int:
        """Lamports of the wallet."""
        return await self._rpc.balance(self._me)

    async def send(self, steps: Sequence[Step]) -> FeeMeter:
        """Carries out what was planned, one after the other; returns what it has cost.

        Raises:
            ConfigurationError: the wallet does not pay for all of it; nothing was sent.
            CoordinatorLinkError: a transaction was refused or got lost; those before it are done.
        """
        needed = needed_for(steps)
        balance = await self.balance()
        if balance < needed:
            raise ConfigurationError(
                f"the wallet {self._me} holds {shown_sol(balance)}, and {shown_sol(needed)} are needed, with what must "
                f"stay in it: put {shown_sol(needed - balance)} into it",
                name="wallet",
            )
        fees = FeeMeter()
        sender = Sender(self._rpc, self._wallet, fees)
        for step in steps:
            await sender.send(step.instructions, step.signers)
        return fees

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _authority(self) -> RunAuthority:
        """Who changes the run, if that is this wallet."""
        found = await find_run(self._rpc, self._programs, self._run_id)
        return self._authority_of(found, await find_treasury(self._rpc, self._programs, found))

    def _authority_of(self, found: FoundRun, treasury: FoundTreasury | None) -> RunAuthority:
        operator = found.main_authority if treasury is None else treasury.operator
        if operator != self._me:
            raise ConfigurationError(
                f"the operator of the run {self._run_id!r} is {operator}, and this wallet is {self._me}",
                name="wallet",
            )
        run = RunInstructions(self._programs, self._run_id, found.account)
        return RunAuthority(self._me, run, None if treasury is None else treasury.instructions)

    async def _authorizer(self, grantee: Pubkey) -> AuthorizerInstructions:
        """Instructions about an authorization of the run, if this wallet grants it."""
        found = await find_run(self._rpc, self._programs, self._run_id)
        if found.join_authority != self._me:
            raise ConfigurationError(
                f"only {found.join_authority} lets wallets into the run {self._run_id!r}, and this wallet is "
                f"{self._me}",
                name="wallet",
            )
        return AuthorizerInstructions(self._programs, self._me, grantee)

    @property
    def _everywhere(self) -> str:
        """An authorization names no run."""
        return f"in all runs that {self._me} lets wallets into"

    def _paid_by(self, treasury: FoundTreasury | None) -> FoundTreasury:
        if treasury is None:
            raise ConfigurationError(
                f"the run {self._run_id!r} has no treasury: its points are counted, and nobody pays for them",
                name="run_id",
            )
        return treasury


def _whom(grantee: Pubkey) -> str:
    return "everybody" if grantee == EVERYBODY else str(grantee)


def _why_not(present: Checkpoint) -> str:
    """Why a run with this model keeps it when a client says that it is in a place of another kind."""
    match present:
        case Hub():
            reason = "loads its model from the hub, where only another repository of the hub can follow"
        case Gcs():
            reason = "loads its model from a bucket, where only another bucket can follow"
        case _:
            reason = "has no model that anybody could upload"
    return f"the run {reason}: pause it, and set the model with configure"


def _place(checkpoint: Checkpoint) -> str:
    """Where a checkpoint is, in words."""
    match repository_of(checkpoint):
        case HubRepo(name, revision):
            return name if revision is None else f"{name} at {revision}"
        case GcsRepo(bucket, prefix):
            return f"gs://{bucket}/{prefix or ''}"
    return "no repository"
