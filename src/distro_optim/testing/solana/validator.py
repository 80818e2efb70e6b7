"""A cluster without a network: accounts, a clock, fees, blockhashes, and transactions one after the other. No I/O.

::

    validator = Validator()
    wallet = Keypair()
    validator.fund(wallet.pubkey(), 5_000_000_000)
    outcome = validator.process(transaction)
    outcome.error  # None, or such as "InstructionError(0, Custom(6015))"
    validator.accounts[str(key)].data

What it takes is told in :mod:`.transactions`. Time stands still unless :meth:`Validator.advance` moves it. A recording
of real transactions is replayed line by line::

    for line in map(json.loads, lines):
        assert validator.process(line).error == line["error"]
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from solders.hash import Hash
from solders.instruction import AccountMeta
from solders.pubkey import Pubkey
from solders.signature import Signature

from ...coordinator.formats.account import CoordinatorAccount, fresh_account
from ...coordinator.solana.programs import (
    ASSOCIATED_TOKEN_PROGRAM,
    CLOCK_SYSVAR,
    EVERYBODY,
    JOIN_SCOPE,
    NATIVE_LOADER,
    SYSTEM_PROGRAM,
    TOKEN_PROGRAM,
    UPGRADEABLE_LOADER,
    Programs,
    associated_token_account,
    default_treasurer_index,
)
from ...coordinator.solana.small_accounts import (
    INSTANCE_BYTES,
    MINT_BYTES,
    TOKEN_ACCOUNT_BYTES,
    TREASURY_BYTES,
    Authorization,
    CoordinatorInstance,
    Treasury,
    authorization_bytes,
    read_small_account,
    write_small_account,
)
from ...coordinator.types import Coordinator
from .authorizer_calls import authorizer_program
from .coordinator_calls import coordinator_program
from .coordinator_twin import Clock
from .ledger import Account, Call, Failure, Layer, Program, decoded, encoded, rent, run
from .native_programs import (
    COMPUTE_BUDGET,
    associated_token_program,
    compute_budget_program,
    mint_data,
    priority_fee,
    system_program,
    token_account_data,
    token_program,
    with_supply,
    with_tokens,
)
from .transactions import MAX_TRANSACTION_BYTES, Outcome, Transaction, TransactionError, transaction_of
from .treasurer_calls import treasurer_program

__all__ = ["Account", "Validator"]

FEE_PER_SIGNATURE: Final = 5000
"""Lamports."""

BLOCKHASHES: Final = 150
"""Blocks for which a transaction may name a blockhash."""

MAX_REMEMBERED: Final = 100_000
"""Signatures whose outcome is remembered; chosen arbitrarily."""

GENESIS_LAMPORTS: Final = 1_000_000 * 1_000_000_000
"""What the payer of a recording starts with, as in solana-program-test."""

SLOTS_PER_SECOND: Final = 2.5

_BPF_LOADER: Final = "BPFLoader2111111111111111111111111111111111"
_SYSVAR_OWNER: Final = "Sysvar1111111111111111111111111111111111111"
_RENT_SYSVAR: Final = "SysvarRent111111111111111111111111111111111"
_RENT_DATA: Final = bytes.fromhex("980d000000000000000000000000004032")


class Validator:
    """A cluster with Psyche's programs.

    Args:
        programs: their ids, and the version of the accounts of their runs.
        unix_timestamp: what the clock shows at first, in seconds.
        slot: the first slot.
    """

    def __init__(self, programs: Programs | None = None, *, unix_timestamp: int = 1_700_000_000, slot: int = 1) -> None:
        self.programs = programs or Programs()
        self.accounts: dict[str, Account] = {}
        """Every account that holds lamports, by its address in base58."""
        self.clock = Clock(slot, unix_timestamp)
        self.outcomes: OrderedDict[Signature, Outcome] = OrderedDict()
        """What became of signed transactions, the newest last."""
        self.listeners: list[Callable[[frozenset[str]], None]] = []
        """Called with the addresses that a transaction has changed."""
        self._blockhashes: OrderedDict[Hash, int] = OrderedDict()
        self._blocks = 0
        self._block_used = False
        self._table: dict[str, Program] = {
            str(SYSTEM_PROGRAM): system_program,
            str(TOKEN_PROGRAM): token_program,
            str(ASSOCIATED_TOKEN_PROGRAM): associated_token_program,
            COMPUTE_BUDGET: compute_budget_program,
            str(self.programs.coordinator): coordinator_program,
            str(self.programs.authorizer): authorizer_program,
            str(self.programs.treasurer): treasurer_program,
        }
        for program in (SYSTEM_PROGRAM, self.programs.coordinator, self.programs.authorizer, self.programs.treasurer):
            self.accounts[str(program)] = Account(1, b"", str(NATIVE_LOADER), True)
        # What solana-program-test has for them; nothing depends on the numbers.
        self.accounts[str(TOKEN_PROGRAM)] = Account(929_020_800, b"", _BPF_LOADER, True)
        self.accounts[str(ASSOCIATED_TOKEN_PROGRAM)] = Account(731_913_600, b"", _BPF_LOADER, True)
        self.accounts[_RENT_SYSVAR] = Account(rent(len(_RENT_DATA)), _RENT_DATA, _SYSVAR_OWNER)
        self._set_clock(self.clock)

    # -- time ----------------------------------------------------------------------------------------------------------

    @property
    def blockhash(self) -> Hash:
        """The newest. Each transaction is in a block of its own before anybody asks again."""
        if self._block_used:
            self._new_block()
        return next(reversed(self._blockhashes))

    @property
    def block_height(self) -> int:
        """Blocks so far."""
        return self._blocks

    def last_valid_block_height(self, blockhash: Hash) -> int | None:
        """Until which block a transaction may name this blockhash; None if it is over, or unknown."""
        made = self._blockhashes.get(blockhash)
        return None if made is None else made + BLOCKHASHES

    def advance(self, seconds: int) -> None:
        """Moves the clock on, and with it the slot."""
        slots = int(seconds * SLOTS_PER_SECOND)
        self._set_clock(Clock(self.clock.slot + slots, self.clock.unix_timestamp + seconds))

    def advance_blocks(self, count: int) -> None:
        """Makes empty blocks, so that blockhashes grow old; the time stays."""
        for _ in range(min(count, BLOCKHASHES)):
            self._new_block()

    def _set_clock(self, clock: Clock) -> None:
        self.clock = clock
        data = clock.slot.to_bytes(8, "little") + bytes(24) + clock.unix_timestamp.to_bytes(8, "little", signed=True)
        self.accounts[str(CLOCK_SYSVAR)] = Account(rent(len(data)), data, _SYSVAR_OWNER)
        self._new_block()

    def _new_block(self) -> None:
        self._blocks += 1
        self._block_used = False
        self._blockhashes[Hash.from_bytes(hashlib.sha256(f"block {self._blocks}".encode()).digest())] = self._blocks
        while len(self._blockhashes) > BLOCKHASHES:
            self._blockhashes.popitem(last=False)

    def deployed(self, program: Pubkey, slot: int) -> None:
        """Has a program look as if its code was last deployed in this slot, and not as a part of the node.

        What it does stays the same.
        """
        code, _ = Pubkey.find_program_address([bytes(program)], UPGRADEABLE_LOADER)
        head = (3).to_bytes(4, "little") + slot.to_bytes(8, "little") + bytes(33)
        data = (2).to_bytes(4, "little") + bytes(code)
        self.accounts[str(program)] = Account(rent(len(data)), data, str(UPGRADEABLE_LOADER), True)
        self.accounts[str(code)] = Account(rent(len(head)), head, str(UPGRADEABLE_LOADER))

    # -- lamports ------------------------------------------------------------------------------------------------------

    def fund(self, key: Pubkey, lamports: int) -> None:
        """Gives an account lamports out of nothing."""
        account = self.accounts.get(str(key), Account(0))
        self.accounts[str(key)] = replace(account, lamports=account.lamports + lamports)

    def balance(self, key: Pubkey) -> int:
        """Lamports of an account."""
        account = self.accounts.get(str(key))
        return account.lamports if account else 0

    # -- transactions --------------------------------------------------------------------------------------------------

    def process(self, transaction: Any, *, preflight: bool = True) -> Outcome:
        """Carries out a transaction.

        Args:
            transaction: any of the forms that :mod:`.transactions` tells of.
            preflight: try it first, so that one that fails changes nothing and costs nothing. Without, a failure costs
                the fee, as on a cluster.

        Raises:
            ValueError: it is no transaction.
        """
        parsed = transaction_of(transaction)
        if isinstance(transaction, Mapping) and str(parsed.payer) not in self.accounts:
            self.fund(parsed.payer, GENESIS_LAMPORTS)
        if parsed.slot is not None or parsed.unix_timestamp is not None:
            slot = self.clock.slot if parsed.slot is None else parsed.slot
            now = self.clock.unix_timestamp if parsed.unix_timestamp is None else parsed.unix_timestamp
            self._set_clock(Clock(slot, now))
        outcome, changed = self._try(parsed)
        if outcome.error is not None and (preflight or not outcome.fee):
            return replace(outcome, fee=0)
        self._put(changed)
        self._block_used = True
        if outcome.signature is not None:
            self.outcomes[outcome.signature] = outcome
            while len(self.outcomes) > MAX_REMEMBERED:
                self.outcomes.popitem(last=False)
        return outcome

    def _put(self, changed: Mapping[str, Account | None]) -> None:
        for key, account in changed.items():
            if account is None:
                self.accounts.pop(key, None)
            else:
                self.accounts[key] = account
        for listener in self.listeners:
            listener(frozenset(changed))

    def give_tokens(self, mint: Pubkey, owner: Pubkey, units: int, *, decimals: int = 6) -> None:
        """Gives a wallet tokens out of nothing.

        Args:
            mint: their kind, which is made if there is none yet.
            owner: whose associated account gets them.
            units: base units.
            decimals: digits after the point of a new kind.
        """
        key = associated_token_account(owner, mint)
        kind, holder = self.accounts.get(str(mint)), self.accounts.get(str(key))
        made = kind.data if kind is not None else mint_data(decimals)
        held = holder.data if holder is not None else token_account_data(mint, owner)
        self._put(
            {
                str(mint): Account(rent(MINT_BYTES), with_supply(made, units), str(TOKEN_PROGRAM)),
                str(key): Account(rent(TOKEN_ACCOUNT_BYTES), with_tokens(held, units), str(TOKEN_PROGRAM)),
            }
        )

    def host(
        self,
        run: Coordinator,
        account: Pubkey,
        *,
        main_authority: Pubkey,
        join_authority: Pubkey,
        mint: Pubkey | None = None,
    ) -> None:
        """Puts a run on the cluster as it is, whatever its phase and its model, and lets everybody in.

        A run that is made by transactions starts halted, and must have a model that strangers can train.

        Args:
            run: its state.
            account: where its big account is to be.
            main_authority: key of its operator.
            join_authority: key that lets wallets in.
            mint: the tokens that pay for points, which the run's treasury has none of yet; None makes no treasury.
        """
        operator = (
            main_authority
            if mint is None
            else self._host_treasury(run.run_id, account, mint, main_authority, join_authority)
        )
        instance, bump = self.programs.instance_and_bump(run.run_id)
        zero = fresh_account(self.programs.account_version)
        clients = replace(zero.state.clients_state, next_active=1)
        state = replace(zero.state, coordinator=run, clients_state=clients, client_version="test")
        small = CoordinatorInstance(bump, bytes(operator), bytes(join_authority), bytes(account), run.run_id)
        seeds = [b"Authorization", bytes(join_authority), bytes(EVERYBODY), JOIN_SCOPE]
        address, authorization_bump = Pubkey.find_program_address(seeds, self.programs.authorizer)
        everybody = Authorization(
            authorization_bump, bytes(join_authority), bytes(EVERYBODY), JOIN_SCOPE, True, (), self.clock.unix_timestamp
        )
        big = encoded(replace(zero, version=self.programs.account_version, state=state, nonce=1))
        size = authorization_bytes(len(JOIN_SCOPE), 0)
        coordinator, authorizer = str(self.programs.coordinator), str(self.programs.authorizer)
        self._put(
            {
                str(account): Account(rent(len(big)), big, coordinator),
                str(instance): Account(rent(INSTANCE_BYTES), write_small_account(small, INSTANCE_BYTES), coordinator),
                str(address): Account(rent(size), write_small_account(everybody, size), authorizer),
            }
        )

    def _host_treasury(
        self, run_id: str, account: Pubkey, mint: Pubkey, main_authority: Pubkey, join_authority: Pubkey
    ) -> Pubkey:
        """Makes the treasury of a run; returns its address."""
        index = default_treasurer_index(run_id)
        address, bump = Pubkey.find_program_address([b"Run", index.to_bytes(8, "little")], self.programs.treasurer)
        instance = self.programs.instance(run_id)
        treasury = Treasury(
            bump,
            index,
            bytes(main_authority),
            bytes(join_authority),
            bytes(account),
            bytes(instance),
            bytes(mint),
            0,
            0,
        )
        data = write_small_account(treasury, TREASURY_BYTES)
        self._put({str(address): Account(rent(TREASURY_BYTES), data, str(self.programs.treasurer))})
        self.give_tokens(mint, address, 0)
        return address

    def run(self, run_id: str) -> CoordinatorAccount:
        """The big account of a run, read.

        Raises:
            KeyError: there is no such run.
        """
        data = self.accounts[str(self.programs.instance(run_id))].data
        instance = read_small_account(CoordinatorInstance, data)
        return decoded(self.accounts[str(Pubkey.from_bytes(instance.coordinator_account))].data)

    def snapshot(self) -> dict[str, Account]:
        """The accounts as they are, for :meth:`restore`."""
        return dict(self.accounts)

    def restore(self, snapshot: Mapping[str, Account]) -> None:
        """Takes everything back that happened since, as a cluster does when it leaves a fork."""
        changed: dict[str, Account | None] = dict.fromkeys(self.accounts)
        self._put({**changed, **snapshot})

    def simulate(self, transaction: Any) -> Outcome:
        """What would become of a transaction; nothing changes.

        Raises:
            ValueError: it is no transaction.
        """
        return self._try(transaction_of(transaction))[0]

    def _try(self, transaction: Transaction) -> tuple[Outcome, dict[str, Account | None]]:
        signature = transaction.signed.signatures[0] if transaction.signed is not None else None
        fee = FEE_PER_SIGNATURE * len(transaction.signers) + priority_fee(transaction.instructions)
        layer = Layer(self.accounts, self.programs, self.clock)

        def outcome(error: TransactionError | None, paid: int) -> Outcome:
            text = None if error is None else str(error)
            return Outcome(text, error, tuple(layer.logs), paid, signature, self.clock.slot)

        error = self._problem(transaction) or self._charge(layer, transaction.payer, fee)
        if error is not None:
            return outcome(error, 0), {}
        charged, rights = dict(layer.changed), _rights(transaction)
        for index, instruction in enumerate(transaction.instructions):
            metas = [rights[meta.pubkey] for meta in instruction.accounts]
            try:
                run(Call(layer, instruction.program_id, instruction.data, metas, self._table))
            except Failure as failure:
                return outcome(TransactionError("InstructionError", index, failure.detail), fee), charged
        error = self._rent_problem(layer)
        if error is not None:
            return outcome(error, fee), charged
        return outcome(None, fee), layer.changed

    def _problem(self, transaction: Transaction) -> TransactionError | None:
        """What is wrong with a signed transaction itself."""
        signed = transaction.signed
        if signed is None:
            return None
        if transaction.size > MAX_TRANSACTION_BYTES:
            return TransactionError("SanitizeFailure")
        if not all(signed.verify_with_results()):
            return TransactionError("SignatureFailure")
        if signed.signatures[0] in self.outcomes:
            return TransactionError("AlreadyProcessed")
        if transaction.blockhash not in self._blockhashes:
            return TransactionError("BlockhashNotFound")
        return None

    def _charge(self, layer: Layer, payer: Pubkey, fee: int) -> TransactionError | None:
        account = layer.get(payer)
        if account is None:
            return TransactionError("AccountNotFound")
        if account.owner != str(SYSTEM_PROGRAM) or account.data:
            return TransactionError("InvalidAccountForFee")
        if account.lamports < fee:
            return TransactionError("InsufficientFundsForFee")
        left = account.lamports - fee
        if 0 < left < rent(0):
            return TransactionError("InsufficientFundsForRent", detail=0)
        layer.put(payer, replace(account, lamports=left))
        return None

    def _rent_problem(self, layer: Layer) -> TransactionError | None:
        for index, (key, account) in enumerate(layer.changed.items()):
            if account is not None and account.lamports < rent(len(account.data)):
                before = self.accounts.get(key)
                if before is None or before.lamports >= rent(len(before.data)):
                    return TransactionError("InsufficientFundsForRent", detail=index)
        return None


def _rights(transaction: Transaction) -> Mapping[Pubkey, AccountMeta]:
    """Each account's rights. Those of one account in several places add up, as in a message; the payer has all."""
    rights = {transaction.payer: AccountMeta(transaction.payer, is_signer=True, is_writable=True)}
    for instruction in transaction.instructions:
        for meta in instruction.accounts:
            known = rights.get(meta.pubkey, meta)
            signs, writes = known.is_signer or meta.is_signer, known.is_writable or meta.is_writable
            rights[meta.pubkey] = AccountMeta(meta.pubkey, signs, writes)
    return rights
