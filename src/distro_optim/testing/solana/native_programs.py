"""The programs of the cluster itself that Psyche's stand on: accounts, lamports and tokens.

Only the instructions that a run needs: of the system program ``CreateAccount`` and ``Transfer``; of the token program
``InitializeMint``, ``MintTo`` and both transfers; of the associated token program both ways to create an account; of
the compute budget a limit and a price.
https://docs.rs/solana-system-interface, https://docs.rs/spl-token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, create_account

from ...coordinator.solana.programs import SYSTEM_PROGRAM, TOKEN_PROGRAM, associated_token_account
from ...coordinator.solana.small_accounts import MINT_BYTES, TOKEN_ACCOUNT_BYTES
from .ledger import MAX_ACCOUNT_BYTES, Account, Call, Failure, rent

__all__ = [
    "COMPUTE_BUDGET",
    "MINT_BYTES",
    "TOKEN_ACCOUNT_BYTES",
    "associated_token_program",
    "compute_budget_program",
    "create_associated",
    "mint_data",
    "priority_fee",
    "system_program",
    "token_account_data",
    "token_mint",
    "token_owner",
    "token_program",
    "transfer_tokens",
    "with_supply",
    "with_tokens",
]

# Errors of the system program
_ACCOUNT_IN_USE: Final = 0
_NOT_ENOUGH_LAMPORTS: Final = 1
_TOO_LONG: Final = 3

# Errors of the token program
_NOT_RENT_EXEMPT: Final = 0
_NOT_ENOUGH_TOKENS: Final = 1
_MINT_MISMATCH: Final = 3
_OWNER_MISMATCH: Final = 4
_FIXED_SUPPLY: Final = 5
_ALREADY_IN_USE: Final = 6
_OVERFLOW: Final = 14
_DECIMALS_MISMATCH: Final = 18

# Where things are in a token account and in a mint
_AMOUNT: Final = slice(64, 72)
_STATE_AT: Final = 108
_SUPPLY: Final = slice(36, 44)
_INITIALIZED_AT: Final = 45

_U64: Final = 1 << 64


def _keys(call: Call, count: int) -> list[Pubkey]:
    if len(call.metas) < count:
        raise Failure("NotEnoughAccountKeys")
    return [meta.pubkey for meta in call.metas[:count]]


# -- what a transaction offers for its computing -----------------------------------------------------------------------

COMPUTE_BUDGET: Final = "ComputeBudget111111111111111111111111111111"

_SET_LIMIT: Final = 2
_SET_PRICE: Final = 3
_SIZES: Final = {_SET_LIMIT: 5, _SET_PRICE: 9}
_UNITS_OF_A_CALL: Final = 200_000
_MAX_UNITS: Final = 1_400_000
_MICRO: Final = 1_000_000


def compute_budget_program(call: Call) -> None:
    """Takes a limit (u32) or a price (u64); what they cost is :func:`priority_fee`."""
    if not call.data or _SIZES.get(call.data[0]) != len(call.data):
        raise Failure("InvalidInstructionData")


def priority_fee(instructions: Sequence[Instruction]) -> int:
    """Lamports that a transaction pays beside its signatures: price times units, in millionths, rounded up."""
    price, units, calls = 0, None, 0
    for instruction in instructions:
        data = bytes(instruction.data)
        if str(instruction.program_id) != COMPUTE_BUDGET:
            calls += 1
        elif data and _SIZES.get(data[0]) == len(data):
            value = int.from_bytes(data[1:], "little")
            price, units = (value, units) if data[0] == _SET_PRICE else (price, value)
    return -(-price * min(_MAX_UNITS, _UNITS_OF_A_CALL * calls if units is None else units) // _MICRO)


# -- the system --------------------------------------------------------------------------------------------------------


def system_program(call: Call) -> None:
    """Creates accounts and moves lamports."""
    kind = int.from_bytes(call.data[:4], "little")
    if kind == 0 and len(call.data) >= 52:
        _create_account(call)
    elif kind == 2 and len(call.data) >= 12:
        source, target = _keys(call, 2)
        _transfer(call, source, target, int.from_bytes(call.data[4:12], "little"))
    else:
        raise Failure("InvalidInstructionData")


def _create_account(call: Call) -> None:
    source, target = _keys(call, 2)
    lamports, space = (int.from_bytes(call.data[at : at + 8], "little") for at in (4, 12))
    owner = Pubkey.from_bytes(call.data[20:52])
    old = call.account(target)
    if old.lamports:
        raise Failure(_ACCOUNT_IN_USE)
    if not call.is_signer(target):
        raise Failure("MissingRequiredSignature")
    if space > MAX_ACCOUNT_BYTES:
        raise Failure(_TOO_LONG)
    _transfer(call, source, target, lamports)
    call.layer.put(target, Account(lamports, bytes(space), str(owner)))


def _transfer(call: Call, source: Pubkey, target: Pubkey, lamports: int) -> None:
    if not call.is_signer(source):
        raise Failure("MissingRequiredSignature")
    giver = call.account(source)
    if giver.data:
        raise Failure("InvalidArgument")
    if giver.lamports < lamports:
        raise Failure(_NOT_ENOUGH_LAMPORTS)
    call.move(source, target, lamports)


# -- tokens ------------------------------------------------------------------------------------------------------------


def token_mint(data: bytes) -> bytes:
    """Which kind of tokens an account holds."""
    return data[:32]


def token_owner(data: bytes) -> bytes:
    """Whose tokens an account holds."""
    return data[32:64]


def mint_data(decimals: int, authority: bytes = bytes(36), freezer: bytes = b"") -> bytes:
    """A kind of tokens of which there are none; who may make some, and stop them, are options of 36 bytes."""
    return authority + bytes(8) + bytes([decimals, 1]) + freezer.ljust(36, b"\0")


def token_account_data(mint: Pubkey, owner: Pubkey) -> bytes:
    """An account without tokens."""
    data = bytearray(bytes(mint) + bytes(owner) + bytes(TOKEN_ACCOUNT_BYTES - 64))
    data[_STATE_AT] = 1
    return bytes(data)


def with_supply(mint: bytes, units: int) -> bytes:
    """A kind of tokens of which there are so many more."""
    return _added(mint, _SUPPLY, units)


def with_tokens(account: bytes, units: int) -> bytes:
    """An account that holds so many more."""
    return _added(account, _AMOUNT, units)


def token_program(call: Call) -> None:
    """Makes tokens and moves them."""
    actions: dict[int, Callable[[Call], None]] = {
        0: _initialize_mint,
        3: _transfer_tokens,
        7: _mint_to,
        12: _transfer_checked,
        20: _initialize_mint,
    }
    action = actions.get(call.data[0]) if call.data else None
    if action is None:
        raise Failure("InvalidInstructionData")
    action(call)


def _initialize_mint(call: Call) -> None:
    (mint,) = _keys(call, 1)
    account = _of_token_program(call, mint, MINT_BYTES)
    if account.data[_INITIALIZED_AT]:
        raise Failure(_ALREADY_IN_USE)
    if account.lamports < rent(MINT_BYTES):
        raise Failure(_NOT_RENT_EXEMPT)
    if len(call.data) < 35:
        raise Failure("InvalidInstructionData")
    decimals, authority, freezer = call.data[1], call.data[2:34], call.data[35:67] if call.data[34] else b""
    freeze = (b"\1\0\0\0" + freezer) if freezer else bytes(36)
    call.write(mint, mint_data(decimals, b"\1\0\0\0" + authority, freeze))


def _mint_to(call: Call) -> None:
    mint, target, authority = _keys(call, 3)
    made, holder = _of_token_program(call, mint, MINT_BYTES), _of_token_program(call, target, TOKEN_ACCOUNT_BYTES)
    amount = _amount(call)
    if token_mint(holder.data) != bytes(mint):
        raise Failure(_MINT_MISMATCH)
    if made.data[:4] != b"\1\0\0\0":
        raise Failure(_FIXED_SUPPLY)
    _check_authority(call, authority, made.data[4:36])
    call.write(mint, _added(made.data, _SUPPLY, amount))
    call.write(target, _added(holder.data, _AMOUNT, amount))


def _transfer_tokens(call: Call) -> None:
    source, target, authority = _keys(call, 3)
    giver, taker = (_of_token_program(call, key, TOKEN_ACCOUNT_BYTES) for key in (source, target))
    amount = _amount(call)
    if int.from_bytes(giver.data[_AMOUNT], "little") < amount:
        raise Failure(_NOT_ENOUGH_TOKENS)
    if token_mint(giver.data) != token_mint(taker.data):
        raise Failure(_MINT_MISMATCH)
    _check_authority(call, authority, token_owner(giver.data))
    if source != target:
        call.write(source, _added(giver.data, _AMOUNT, -amount))
        call.write(target, _added(taker.data, _AMOUNT, amount))


def _transfer_checked(call: Call) -> None:
    """A transfer that names the mint and its decimals."""
    source, mint, _, _ = _keys(call, 4)
    made = _of_token_program(call, mint, MINT_BYTES)
    if len(call.data) < 10:
        raise Failure("InvalidInstructionData")
    if token_mint(_of_token_program(call, source, TOKEN_ACCOUNT_BYTES).data) != bytes(mint):
        raise Failure(_MINT_MISMATCH)
    if made.data[44] != call.data[9]:
        raise Failure(_DECIMALS_MISMATCH)
    metas = [meta for meta in call.metas if meta.pubkey != mint]
    _transfer_tokens(replace(call, data=b"\3" + call.data[1:9], metas=metas))


def transfer_tokens(call: Call, source: Pubkey, target: Pubkey, authority: Pubkey, amount: int) -> None:
    """Moves tokens for an address that the calling program signs for."""
    metas = [
        AccountMeta(source, is_signer=False, is_writable=True),
        AccountMeta(target, is_signer=False, is_writable=True),
        AccountMeta(authority, is_signer=True, is_writable=False),
    ]
    data = b"\3" + amount.to_bytes(8, "little")
    call.invoke(Instruction(TOKEN_PROGRAM, data, metas), [authority])


def _of_token_program(call: Call, key: Pubkey, size: int) -> Account:
    account = call.account(key)
    if account.owner != str(TOKEN_PROGRAM):
        raise Failure("IncorrectProgramId")
    if len(account.data) != size:
        raise Failure("InvalidAccountData")
    return account


def _amount(call: Call) -> int:
    if len(call.data) < 9:
        raise Failure("InvalidInstructionData")
    return int.from_bytes(call.data[1:9], "little")


def _check_authority(call: Call, authority: Pubkey, expected: bytes) -> None:
    if bytes(authority) != expected:
        raise Failure(_OWNER_MISMATCH)
    if not call.is_signer(authority):
        raise Failure("MissingRequiredSignature")


def _added(data: bytes, where: slice, amount: int) -> bytes:
    total = int.from_bytes(data[where], "little") + amount
    if total >= _U64:
        raise Failure(_OVERFLOW)
    return data[: where.start] + total.to_bytes(8, "little") + data[where.stop :]


def associated_token_program(call: Call) -> None:
    """Creates the account in which a wallet keeps its tokens of one kind."""
    payer, account, owner, mint = _keys(call, 4)
    if call.data not in (b"", b"\0", b"\1"):
        raise Failure("InvalidInstructionData")
    if account != associated_token_account(owner, mint):
        raise Failure("InvalidSeeds")
    existing = call.account(account)
    if call.data == b"\1" and existing.owner == str(TOKEN_PROGRAM):
        if token_owner(existing.data) != bytes(owner):
            raise Failure(0)
        return
    create_associated(call, payer, account, owner, mint)


def create_associated(call: Call, payer: Pubkey, account: Pubkey, owner: Pubkey, mint: Pubkey) -> None:
    """The same, called from another program."""
    if call.account(account).owner != str(SYSTEM_PROGRAM):
        raise Failure("IllegalOwner")
    _of_token_program(call, mint, MINT_BYTES)
    size = TOKEN_ACCOUNT_BYTES
    made = create_account(
        CreateAccountParams(from_pubkey=payer, to_pubkey=account, lamports=rent(size), space=size, owner=TOKEN_PROGRAM)
    )
    call.invoke(made, [account])
    call.layer.put(account, replace(call.account(account), data=token_account_data(mint, owner)))
