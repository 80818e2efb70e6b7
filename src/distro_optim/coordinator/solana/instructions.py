"""One builder for each instruction that a client or an operator sends. No I/O.

A builder derives the addresses that follow from its arguments, so that an instruction is right by construction; which
accounts an instruction takes, in which order, stands in PsycheFoundation/psyche, ``architectures/decentralized``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, create_account

from ...errors import ConfigurationError
from ..formats.account import RunMetadata
from ..model import Checkpoint, Model
from ..types import (
    CommitteeProof,
    CoordinatorConfig,
    CoordinatorProgress,
    NodeIdentity,
    Witness,
    WitnessMetadata,
)
from . import arguments as args
from .programs import (
    ASSOCIATED_TOKEN_PROGRAM,
    FIRST_WITH_CLAIMERS,
    JOIN_SCOPE,
    SYSTEM_PROGRAM,
    TOKEN_PROGRAM,
    Programs,
    associated_token_account,
)

__all__ = [
    "AuthorizerInstructions",
    "RunInstructions",
    "TreasurerInstructions",
    "check_claimer",
    "create_run_account",
    "create_token_account",
    "transfer_tokens",
]

_CREATE_IF_MISSING: Final = b"\1"
"""Of the associated token program: the account may be there already."""

_TRANSFER: Final = b"\3"
"""Of the token program."""


def _signs(key: Pubkey, *, writable: bool = False) -> AccountMeta:
    return AccountMeta(key, is_signer=True, is_writable=writable)


def _reads(key: Pubkey) -> AccountMeta:
    return AccountMeta(key, is_signer=False, is_writable=False)


def _writes(key: Pubkey) -> AccountMeta:
    return AccountMeta(key, is_signer=False, is_writable=True)


def check_claimer(programs: Programs, claimer: Pubkey | None) -> None:
    """Raises ConfigurationError if another wallet is to be paid where only the one that trains can be."""
    if claimer is not None and not programs.has_claimers:
        raise ConfigurationError(
            f"points are paid to another wallet only in runs whose account has version {FIRST_WITH_CLAIMERS}, and "
            f"version {programs.account_version} is selected: leave the claimer out, or select the other version",
            name="claimer",
            value=str(claimer),
        )


_SYSTEM: Final = _reads(SYSTEM_PROGRAM)
_TOKEN: Final = _reads(TOKEN_PROGRAM)


def create_run_account(programs: Programs, payer: Pubkey, account: Pubkey, rent: int) -> Instruction:
    """Makes the big account of a run; ``payer`` and ``account`` sign, ``rent`` lamports stay in it.

    A program may create at most 10 KiB by itself, so this comes before :meth:`RunInstructions.init`.
    """
    return create_account(
        CreateAccountParams(
            from_pubkey=payer, to_pubkey=account, lamports=rent, space=programs.account_size, owner=programs.coordinator
        )
    )


def create_token_account(payer: Pubkey, owner: Pubkey, mint: Pubkey) -> Instruction:
    """Makes the account in which ``owner`` keeps its tokens of one kind, if it is not there yet."""
    metas = [
        _signs(payer, writable=True),
        _writes(associated_token_account(owner, mint)),
        _reads(owner),
        _reads(mint),
        _SYSTEM,
        _TOKEN,
    ]
    return Instruction(ASSOCIATED_TOKEN_PROGRAM, _CREATE_IF_MISSING, metas)


def transfer_tokens(owner: Pubkey, target: Pubkey, mint: Pubkey, units: int) -> Instruction:
    """Moves tokens from one's own account to another; both are associated ones.

    Args:
        owner: who gives, and signs.
        target: the owner of the other account.
        mint: the kind of the tokens.
        units: base units.
    """
    source, there = (associated_token_account(key, mint) for key in (owner, target))
    return Instruction(
        TOKEN_PROGRAM, _TRANSFER + units.to_bytes(8, "little"), [_writes(source), _writes(there), _signs(owner)]
    )


class RunInstructions:
    """Instructions of the coordinator about one run.

    Args:
        programs: the deployment.
        run_id: name of the run.
        account: its big account, as the run's instance names it.

    Raises:
        ConfigurationError: no run can have this name.
    """

    def __init__(self, programs: Programs, run_id: str, account: Pubkey) -> None:
        self.programs = programs
        self.run_id = run_id
        self.account = account
        self.instance = programs.instance(run_id)

    def _make(self, arguments: args.Arguments, metas: Sequence[AccountMeta]) -> Instruction:
        return Instruction(self.programs.coordinator, args.encode_arguments(arguments), list(metas))

    def _by_user(self, arguments: args.Arguments, user: Pubkey) -> Instruction:
        return self._make(arguments, [_signs(user), _reads(self.instance), _writes(self.account)])

    # -- a client's ----------------------------------------------------------------------------------------------------

    def join(
        self,
        client: NodeIdentity,
        authorization: Pubkey,
        *,
        user: Pubkey | None = None,
        claimer: Pubkey | None = None,
    ) -> Instruction:
        """Wants to be in the next epoch.

        Args:
            client: the wallet's key and the peer's.
            authorization: lets the wallet in.
            user: who signs; the program takes it from nobody but the client's own wallet.
            claimer: which wallet is paid for the points, in accounts of version 2; by default the client's own.

        Raises:
            ConfigurationError: a claimer, for an account of version 1.
        """
        check_claimer(self.programs, claimer)
        metas = [
            _signs(user or Pubkey.from_bytes(client.signer)),
            _reads(authorization),
            _reads(self.instance),
            _writes(self.account),
        ]
        paid = client.signer if claimer is None else bytes(claimer)
        return self._make(args.JoinRunV2(client, paid) if self.programs.has_claimers else args.JoinRun(client), metas)

    def tick(self, user: Pubkey) -> Instruction:
        """Time has passed; anybody may say so."""
        return self._by_user(args.Tick(), user)

    def witness(self, user: Pubkey, report: Witness, metadata: WitnessMetadata) -> Instruction:
        """The report on a round.

        Raises:
            ConfigurationError: a number in the metadata is NaN.
        """
        return self._by_user(args.WitnessRound.of(report, metadata), user)

    def warmup_witness(self, user: Pubkey, report: Witness) -> Instruction:
        """The sender is ready."""
        return self._by_user(args.WarmupWitness.of(report), user)

    def health_check(self, user: Pubkey, client: NodeIdentity, proof: CommitteeProof) -> Instruction:
        """One client did no work. There is one check in an instruction."""
        return self._by_user(args.HealthCheck(client, proof.committee, proof.position, proof.index), user)

    def checkpoint(self, user: Pubkey, uploaded: Checkpoint) -> Instruction:
        """The sender has uploaded the model."""
        return self._by_user(args.CheckpointUploaded(uploaded), user)

    # -- an operator's -------------------------------------------------------------------------------------------------

    def init(self, payer: Pubkey, main_authority: Pubkey, join_authority: Pubkey, client_version: str) -> Instruction:
        """Makes the run; its big account must be there and hold zeros."""
        arguments = args.InitCoordinator(bytes(main_authority), bytes(join_authority), self.run_id, client_version)
        metas = [_signs(payer, writable=True), _writes(self.instance), _writes(self.account), _SYSTEM]
        return self._make(arguments, metas)

    def update(
        self,
        authority: Pubkey,
        metadata: RunMetadata | None = None,
        config: CoordinatorConfig | None = None,
        model: Model | None = None,
        progress: CoordinatorProgress | None = None,
    ) -> Instruction:
        """Changes what is given. Everything at its largest fits in one transaction."""
        return self._by_user(args.Update(metadata, config, model, progress), authority)

    def update_client_version(self, authority: Pubkey, version: str) -> Instruction:
        """Says which client the run is for."""
        return self._by_user(args.UpdateClientVersion(version), authority)

    def set_future_epoch_rates(self, authority: Pubkey, earning: int | None, slashing: int | None) -> Instruction:
        """Points from the next epoch on: shared by all who finish it, and taken from each who is ejected."""
        return self._by_user(args.SetFutureEpochRates(earning, slashing), authority)

    def set_paused(self, authority: Pubkey, paused: bool) -> Instruction:
        """Stops the run, or lets it go on."""
        return self._by_user(args.SetPaused(paused), authority)

    def free(self, authority: Pubkey, spill: Pubkey) -> Instruction:
        """Closes a halted run; ``spill`` gets its lamports."""
        metas = [_signs(authority), _writes(spill), _writes(self.instance), _writes(self.account)]
        return self._make(args.FreeCoordinator(), metas)


class AuthorizerInstructions:
    """Instructions about one authorization.

    Args:
        programs: the deployment.
        grantor: who allows; for joining a run its join authority.
        grantee: who is allowed; :data:`~.programs.EVERYBODY` for any wallet.
        scope: what.
    """

    def __init__(self, programs: Programs, grantor: Pubkey, grantee: Pubkey, scope: bytes = JOIN_SCOPE) -> None:
        self.programs = programs
        self.grantor = grantor
        self.grantee = grantee
        self.scope = scope
        self.authorization = programs.authorization(grantor, grantee, scope)

    def _make(self, arguments: args.Arguments, metas: Sequence[AccountMeta]) -> Instruction:
        return Instruction(self.programs.authorizer, args.encode_arguments(arguments), list(metas))

    def create(self, payer: Pubkey) -> Instruction:
        """Makes it; it is not active yet."""
        metas = [_signs(payer, writable=True), _signs(self.grantor), _writes(self.authorization), _SYSTEM]
        return self._make(args.AuthorizationCreate(bytes(self.grantee), self.scope), metas)

    def set_active(self, active: bool) -> Instruction:
        """Turns it on or off."""
        return self._make(args.AuthorizationGrantorUpdate(active), [_signs(self.grantor), _writes(self.authorization)])

    def delegate(self, payer: Pubkey, added: Sequence[Pubkey], *, clear: bool = False) -> Instruction:
        """Lets these keys in, too; ``clear`` first forgets those that were."""
        metas = [_signs(payer, writable=True), _signs(self.grantee), _writes(self.authorization), _SYSTEM]
        return self._make(args.AuthorizationGranteeUpdate(clear, tuple(bytes(key) for key in added)), metas)

    def close(self, spill: Pubkey) -> Instruction:
        """Removes it; ``spill`` gets its lamports."""
        metas = [_signs(self.grantor), _writes(spill), _writes(self.authorization), _SYSTEM]
        return self._make(args.AuthorizationClose(), metas)


class TreasurerInstructions:
    """Instructions about a run whose points are paid.

    Args:
        programs: the deployment.
        index: number of the treasury; see :func:`~.programs.default_treasurer_index`.
        mint: the tokens that it pays with.
        run_id: name of the run.
        account: the run's big account.
    """

    def __init__(self, programs: Programs, index: int, mint: Pubkey, run_id: str, account: Pubkey) -> None:
        self.programs = programs
        self.index = index
        self.mint = mint
        self.run_id = run_id
        self.account = account
        self.instance = programs.instance(run_id)
        self.treasury = programs.treasury(index)
        self.collateral = associated_token_account(self.treasury, mint)

    def _make(self, arguments: args.Arguments, metas: Sequence[AccountMeta]) -> Instruction:
        return Instruction(self.programs.treasurer, args.encode_arguments(arguments), list(metas))

    def create(self, payer: Pubkey, main_authority: Pubkey, join_authority: Pubkey, client_version: str) -> Instruction:
        """Makes the run and its treasury; the big account must be there and hold zeros."""
        arguments = args.RunCreate(
            self.index, self.run_id, client_version, bytes(main_authority), bytes(join_authority)
        )
        metas = [
            _signs(payer, writable=True),
            _writes(self.treasury),
            _writes(self.collateral),
            _reads(self.mint),
            _writes(self.instance),
            _writes(self.account),
            _reads(self.programs.coordinator),
            _reads(ASSOCIATED_TOKEN_PROGRAM),
            _TOKEN,
            _SYSTEM,
        ]
        return self._make(arguments, metas)

    def update(self, authority: Pubkey, changes: args.RunUpdate) -> Instruction:
        """Changes what is given; the largest model with everything else does not fit in one transaction."""
        metas = [
            _signs(authority),
            _reads(self.treasury),
            _reads(self.instance),
            _writes(self.account),
            _reads(self.programs.coordinator),
        ]
        return self._make(changes, metas)

    def create_participant(self, payer: Pubkey, user: Pubkey) -> Instruction:
        """Makes the account that remembers what ``user`` has been paid; it signs where accounts have version 1."""
        has_claimers = self.programs.has_claimers
        metas = [
            _signs(payer, writable=True),
            *([] if has_claimers else [_signs(user)]),
            _reads(self.treasury),
            _writes(self.programs.participant(self.treasury, user)),
            _SYSTEM,
        ]
        return self._make(args.ParticipantCreateV2(bytes(user)) if has_claimers else args.ParticipantCreate(), metas)

    def claim(
        self, user: Pubkey, points: int, *, user_collateral: Pubkey | None = None, claimer: Pubkey | None = None
    ) -> Instruction:
        """Turns points into tokens, one base unit for each.

        Args:
            user: the wallet that has earned them.
            points: not more than it has earned and not claimed yet.
            user_collateral: where the tokens go; by default the associated account of who signs.
            claimer: who signs and is paid, in accounts of version 2, as named by the wallet; by default itself.

        Raises:
            ConfigurationError: a claimer, for an account of version 1.
        """
        check_claimer(self.programs, claimer)
        signer = user if claimer is None else claimer
        metas = [
            _signs(signer),
            _writes(user_collateral or associated_token_account(signer, self.mint)),
            _writes(self.treasury),
            _writes(self.collateral),
            _reads(self.account),
            _writes(self.programs.participant(self.treasury, user)),
            _TOKEN,
        ]
        if self.programs.has_claimers:
            return self._make(args.ParticipantClaimV2(bytes(user), points), metas)
        return self._make(args.ParticipantClaim(points), metas)
