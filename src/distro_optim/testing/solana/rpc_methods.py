"""What a node of the cluster answers to JSON-RPC requests. No I/O.

https://solana.com/docs/rpc: the methods that a client of a run needs, with the forms of their answers.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from solders.hash import Hash
from solders.pubkey import Pubkey
from solders.signature import Signature

from ...coordinator.solana.program_errors import error_name
from .ledger import Account, rent
from .transactions import Outcome
from .validator import SLOTS_PER_SECOND, Validator

__all__ = ["RpcMethods", "account_json"]

PREFLIGHT_FAILED: Final = -32002
INVALID_PARAMS: Final = -32602
METHOD_NOT_FOUND: Final = -32601
BEHIND: Final = -32016
NO_BLOCK: Final = -32009

MAX_AIRDROP: Final = 1_000 * 1_000_000_000
"""Lamports of one request; chosen arbitrarily."""

_RENT_EPOCH: Final = (1 << 64) - 1
_MAX_BLOCK: Final = 128 * 1024
_ZSTD_MAGIC: Final = bytes.fromhex("28b52ffd")


class RpcFailure(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


def stored(data: bytes) -> bytes:
    """A frame of Zstandard that holds ``data`` as it is (RFC 8878: raw blocks), since Python cannot compress so."""
    blocks = [data[at : at + _MAX_BLOCK] for at in range(0, len(data), _MAX_BLOCK)] or [b""]
    frame = _ZSTD_MAGIC + b"\xa0" + len(data).to_bytes(4, "little")
    for index, block in enumerate(blocks):
        is_last = index == len(blocks) - 1
        frame += (len(block) << 3 | is_last).to_bytes(3, "little") + block
    return frame


def account_json(account: Account | None, encoding: str) -> Any:
    """An account as it is answered."""
    if account is None:
        return None
    packed = stored(account.data) if encoding == "base64+zstd" else account.data
    return {
        "lamports": account.lamports,
        "owner": account.owner,
        "executable": account.executable,
        "rentEpoch": _RENT_EPOCH,
        "space": len(account.data),
        "data": [base64.b64encode(packed).decode(), "base64+zstd" if encoding == "base64+zstd" else "base64"],
    }


class RpcMethods:
    """The methods, by their names in the protocol.

    Args:
        validator: the cluster.
    """

    def __init__(self, validator: Validator) -> None:
        self.validator = validator
        self.accounts: Mapping[str, Account] | None = None
        """What is answered to reads in place of the present accounts, with :attr:`slot`: a node that lags behind."""
        self.slot = 0
        self.unconfirmed_polls = 0
        """How often a transaction is still unknown when it is asked for."""
        self.forgets_blocks = False
        """The node keeps no old blocks, as most do not."""
        self._asked: dict[Signature, int] = {}
        self._unconfirmed: set[Signature] | None = None
        """Transactions since :meth:`confirm`; None confirms each at once."""
        self._methods: dict[str, Callable[[Sequence[Any]], Any]] = {
            "getAccountInfo": self._account_info,
            "getBalance": self._balance,
            "getBlockHeight": lambda params: self.validator.block_height,
            "getBlockTime": self._block_time,
            "getGenesisHash": lambda params: str(Hash.default()),
            "getHealth": lambda params: "ok",
            "getLatestBlockhash": self._latest_blockhash,
            "getMinimumBalanceForRentExemption": lambda params: rent(_integer(params, 0)),
            "getProgramAccounts": self._program_accounts,
            "getSignatureStatuses": self._signature_statuses,
            "getSlot": lambda params: self._slot,
            "getTransaction": self._transaction,
            "isBlockhashValid": self._is_blockhash_valid,
            "requestAirdrop": self._airdrop,
            "sendTransaction": self._send,
        }

    def confirm(self) -> None:
        """Everything until now is confirmed; what comes after is not, until this is called again."""
        self.accounts, self.slot = self.validator.snapshot(), self.validator.clock.slot
        self._unconfirmed = set()

    def answer(self, request: Any) -> dict[str, Any]:
        """The answer to one request."""
        identifier = request.get("id") if isinstance(request, dict) else None
        try:
            if not isinstance(request, dict) or not isinstance(request.get("method"), str):
                raise RpcFailure(-32600, "Invalid request")
            method = self._methods.get(request["method"])
            if method is None:
                raise RpcFailure(METHOD_NOT_FOUND, "Method not found")
            params = request.get("params") or []
            try:
                return {"jsonrpc": "2.0", "id": identifier, "result": method(params)}
            except (ValueError, LookupError, TypeError) as error:
                raise RpcFailure(INVALID_PARAMS, f"Invalid params: {error}") from None
        except RpcFailure as failure:
            said: dict[str, Any] = {"code": failure.code, "message": failure.message}
            if failure.data is not None:
                said["data"] = failure.data
            return {"jsonrpc": "2.0", "id": identifier, "error": said}

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def _slot(self) -> int:
        return self.validator.clock.slot if self.accounts is None else self.slot

    @property
    def _accounts(self) -> Mapping[str, Account]:
        return self.validator.accounts if self.accounts is None else self.accounts

    def _with_context(self, value: Any) -> dict[str, Any]:
        return {"context": {"slot": self._slot, "apiVersion": "2.1.4"}, "value": value}

    def _account_info(self, params: Sequence[Any]) -> Any:
        key, options = str(Pubkey.from_string(params[0])), _options(params, 1)
        self._check_slot(options)
        account, part = self._accounts.get(key), options.get("dataSlice")
        if account is not None and part is not None:
            account = replace(account, data=account.data[part["offset"] :][: part["length"]])
        return self._with_context(account_json(account, options.get("encoding", "base64")))

    def _check_slot(self, options: Mapping[str, Any]) -> None:
        """Refuses what a node that is behind cannot answer."""
        if self._slot < options.get("minContextSlot", 0):
            raise RpcFailure(BEHIND, "Minimum context slot has not been reached", {"contextSlot": self._slot})

    def _balance(self, params: Sequence[Any]) -> Any:
        account = self._accounts.get(str(Pubkey.from_string(params[0])))
        return self._with_context(account.lamports if account else 0)

    def _program_accounts(self, params: Sequence[Any]) -> Any:
        owner, options = str(Pubkey.from_string(params[0])), _options(params, 1)
        encoding = options.get("encoding", "base64")
        return [
            {"pubkey": key, "account": account_json(account, encoding)}
            for key, account in self._accounts.items()
            if account.owner == owner and all(_fits(account.data, rule) for rule in options.get("filters", []))
        ]

    def _block_time(self, params: Sequence[Any]) -> int:
        """As if all slots had been equally long."""
        slot, clock = _integer(params, 0), self.validator.clock
        if self.forgets_blocks:
            raise RpcFailure(NO_BLOCK, f"Slot {slot} was skipped, or missing in long-term storage")
        return clock.unix_timestamp - int((clock.slot - slot) / SLOTS_PER_SECOND)

    def _latest_blockhash(self, params: Sequence[Any]) -> Any:
        blockhash = self.validator.blockhash
        until = self.validator.last_valid_block_height(blockhash)
        return self._with_context({"blockhash": str(blockhash), "lastValidBlockHeight": until})

    def _is_blockhash_valid(self, params: Sequence[Any]) -> Any:
        blockhash = Hash.from_string(params[0])
        self._check_slot(_options(params, 1))
        return self._with_context(self.validator.last_valid_block_height(blockhash) is not None)

    # -- transactions --------------------------------------------------------------------------------------------------

    def _send(self, params: Sequence[Any]) -> Any:
        options = _options(params, 1)
        data = base64.b64decode(params[0], validate=True)
        self._check_slot(options)
        outcome = self.validator.process(data, preflight=not options.get("skipPreflight", False))
        if outcome.error is not None and not outcome.fee:
            raise RpcFailure(
                PREFLIGHT_FAILED,
                f"Transaction simulation failed: {_explained(outcome)}",
                {"err": outcome.reason.json if outcome.reason else None, "logs": list(outcome.logs)},
            )
        if self._unconfirmed is not None and outcome.signature is not None:
            self._unconfirmed.add(outcome.signature)
        return str(outcome.signature)

    def _signature_statuses(self, params: Sequence[Any]) -> Any:
        return self._with_context([self._status(Signature.from_string(text)) for text in params[0]])

    def _status(self, signature: Signature) -> Any:
        outcome = self.validator.outcomes.get(signature)
        if outcome is None:
            return None
        asked = self._asked[signature] = self._asked.get(signature, 0) + 1
        if asked <= self.unconfirmed_polls:
            return None
        error = outcome.reason.json if outcome.reason else None
        return {
            "slot": outcome.slot,
            "confirmations": None,
            "err": error,
            "status": {"Ok": None} if error is None else {"Err": error},
            "confirmationStatus": "processed" if signature in (self._unconfirmed or ()) else "confirmed",
        }

    def _transaction(self, params: Sequence[Any]) -> Any:
        outcome = self.validator.outcomes.get(Signature.from_string(params[0]))
        if outcome is None:
            return None
        error = outcome.reason.json if outcome.reason else None
        return {
            "slot": outcome.slot,
            "blockTime": self.validator.clock.unix_timestamp,
            "meta": {"err": error, "fee": outcome.fee, "logMessages": list(outcome.logs)},
        }

    def _airdrop(self, params: Sequence[Any]) -> Any:
        lamports = _integer(params, 1)
        if not 0 < lamports <= MAX_AIRDROP:
            raise ValueError(f"at most {MAX_AIRDROP} lamports at once")
        self.validator.fund(Pubkey.from_string(params[0]), lamports)
        return str(Signature.default())


def _options(params: Sequence[Any], index: int) -> dict[str, Any]:
    options = params[index] if len(params) > index else None
    return options if isinstance(options, dict) else {}


def _integer(params: Sequence[Any], index: int) -> int:
    value = params[index]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"parameter {index} is no whole number")
    return value


def _fits(data: bytes, rule: Mapping[str, Any]) -> bool:
    if "dataSize" in rule:
        return bool(len(data) == rule["dataSize"])
    compared = rule["memcmp"]
    wanted = compared["bytes"]
    decoded = base64.b64decode(wanted) if compared.get("encoding") == "base64" else _base58(wanted)
    return data[compared["offset"] :][: len(decoded)] == decoded


_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def _base58(text: str) -> bytes:
    number = 0
    for character in text:
        number = number * 58 + _ALPHABET.index(character)
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def _explained(outcome: Outcome) -> str:
    reason = outcome.reason
    if reason is None:
        return "unknown"
    if reason.kind == "BlockhashNotFound":
        return "Blockhash not found"
    if reason.kind == "AlreadyProcessed":
        return "This transaction has already been processed"
    if reason.kind == "AccountNotFound":
        return "Attempt to debit an account but found no record of a prior credit."
    if reason.kind != "InstructionError":
        return reason.kind
    if isinstance(reason.detail, int):
        name = error_name(reason.detail) or "unknown"
        return f"Error processing Instruction {reason.index}: custom program error: {hex(reason.detail)} ({name})"
    return f"Error processing Instruction {reason.index}: {reason.detail}"
