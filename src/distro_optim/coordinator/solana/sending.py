"""Transactions on their way: signed, tried, sent, confirmed, sent again as long as they can arrive.

A transaction's signature is known before it is sent. So a lost answer does no harm: the signature is asked for until it
is confirmed, or until the blockhash is too old for the transaction to arrive any more. The same bytes can be sent as
often as one likes; the cluster takes them once.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.transaction import Transaction

from ...errors import CoordinatorLinkError, ProtocolError
from .fees import COMPUTE_UNITS, FeeMeter
from .rpc import NodesBehindError, RpcClient, RpcRefusedError, TransactionFailedError, failure_of

__all__ = ["Sender", "TransactionExpiredError"]

_log = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5
"""Between two questions for a signature, as Psyche's client."""

BLOCKHASH_SECONDS: Final = 20.0
"""How long a blockhash is used for new transactions. It is valid for about a minute."""

RESEND_POLLS: Final = 4
"""After so many questions without an answer, the same bytes are sent again."""

MAX_TRANSACTION_BYTES: Final = 1232


class TransactionExpiredError(CoordinatorLinkError):
    """A transaction was not taken while its blockhash was valid, and never will be."""


class Sender:
    """Sends transactions that one wallet signs and pays.

    Args:
        rpc: the cluster.
        wallet: pays and signs.
        fees: counts, and says whether a price is offered.
        poll_seconds: between two questions for a signature.
        clock: seconds that only grow, such as a loop's time.
    """

    def __init__(
        self,
        rpc: RpcClient,
        wallet: Keypair,
        fees: FeeMeter,
        *,
        poll_seconds: float = POLL_SECONDS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.rpc = rpc
        self.wallet = wallet
        self.fees = fees
        self._poll_seconds = poll_seconds
        self._clock = clock or asyncio.get_running_loop().time
        self._blockhash: tuple[Hash, float] | None = None
        self._newest: Hash | None = None
        self._slot = 0
        """Of the newest blockhash; a node that is behind it knows nothing of our transactions."""
        self._sent: set[str] = set()
        """Signatures under the newest blockhash."""

    async def send(self, instructions: Sequence[Instruction], signers: Sequence[Keypair] = ()) -> str:
        """Sends a transaction and waits until the cluster has confirmed it; returns its signature.

        Args:
            instructions: in it.
            signers: who signs besides the wallet.

        Raises:
            TransactionFailedError: it cannot be carried out.
            TransactionExpiredError: it was not taken in time.
            CoordinatorLinkError: no node answers, or the fees are beyond their limit.
        """
        fee = self.fees.fee_of(1 + len(signers))
        self.fees.check(fee)
        price = self.fees.price
        offer = [set_compute_unit_limit(COMPUTE_UNITS), set_compute_unit_price(price)] if price else []
        blockhash, data, signature = await self._signed([*offer, *instructions], signers)
        if len(data) > MAX_TRANSACTION_BYTES:
            raise CoordinatorLinkError(
                f"a transaction of {len(data)} bytes does not fit in the {MAX_TRANSACTION_BYTES} of a packet"
            )
        # Counted before it leaves: whoever is cut short from here on may have to pay for it all the same.
        self.fees.paid(fee)
        try:
            await self._submit(data)
        except (TransactionFailedError, RpcRefusedError):
            self.fees.returned(fee)
            raise
        try:
            await self._confirm(data, signature, blockhash)
        except TransactionExpiredError:
            self.fees.returned(fee)
            raise
        return signature

    async def _signed(self, instructions: list[Instruction], signers: Sequence[Keypair]) -> tuple[Hash, bytes, str]:
        """A transaction that was not sent before: blockhash, bytes, signature.

        The same instructions under the same blockhash, such as a second tick, would be the same transaction, which the
        cluster has already processed.
        """
        while True:
            blockhash = await self._recent_blockhash()
            message = Message.new_with_blockhash(instructions, self.wallet.pubkey(), blockhash)
            transaction = Transaction([self.wallet, *signers], message, blockhash)
            signature = str(transaction.signatures[0])
            if signature not in self._sent:
                self._sent.add(signature)
                return blockhash, bytes(transaction), signature
            self._blockhash = None
            if await self._recent_blockhash() == blockhash:
                self._blockhash = None
                await asyncio.sleep(self._poll_seconds)

    async def _recent_blockhash(self) -> Hash:
        now = self._clock()
        if self._blockhash is not None and now < self._blockhash[1] + BLOCKHASH_SECONDS:
            return self._blockhash[0]
        result = await self.rpc.call("getLatestBlockhash", [{"commitment": "confirmed"}])
        try:
            blockhash = Hash.from_string(result["value"]["blockhash"])
            self._slot = max(self._slot, int(result["context"]["slot"]))
        except (LookupError, TypeError, ValueError):
            raise ProtocolError(f"{self.rpc.name} answers with something that is no blockhash") from None
        if blockhash != self._newest:
            self._newest = blockhash
            self._sent.clear()
        self._blockhash = blockhash, now
        return blockhash

    async def _submit(self, data: bytes) -> None:
        """Gives the bytes to a node. One that knows them already has taken them.

        If no node answers, the transaction may have been taken all the same.
        """
        options = {
            "encoding": "base64",
            "preflightCommitment": "confirmed",
            "skipPreflight": False,
            "minContextSlot": self._slot,
        }
        try:
            await self.rpc.call("sendTransaction", [base64.b64encode(data).decode(), options])
        except TransactionFailedError as error:
            if error.name != "AlreadyProcessed":
                raise
        except RpcRefusedError:
            raise
        except CoordinatorLinkError as error:
            _log.info("%s", error)

    async def _confirm(self, data: bytes, signature: str, blockhash: Hash) -> None:
        polls = 0
        while True:
            valid = await self._is_valid(blockhash)  # asked first: what is unknown after it was too old never comes
            status = await self._status(signature, polls)
            if status is None and not valid:
                # A node that is behind may not have seen it: each of them is asked.
                others = [await self._status(signature, polls + number) for number in range(1, len(self.rpc.urls))]
                status = next((found for found in others if found is not None), None)
            if status is not None and (status.get("err") is not None or _is_confirmed(status)):
                if status.get("err") is not None:
                    raise failure_of(status["err"])
                return
            if status is None and not valid:  # else it is in a block, which the cluster may confirm yet
                self._blockhash = None
                raise TransactionExpiredError("a transaction was not taken within the minute in which it was valid")
            polls += 1
            if valid and polls % RESEND_POLLS == 0:
                await self._submit(data)
            await asyncio.sleep(self._poll_seconds)

    async def _is_valid(self, blockhash: Hash) -> bool:
        options = {"commitment": "processed", "minContextSlot": self._slot}
        try:
            result = await self.rpc.call("isBlockhashValid", [str(blockhash), options])
        except NodesBehindError:
            return True  # for all that they know
        return bool(isinstance(result, dict) and result.get("value"))

    async def _status(self, signature: str, first: int) -> dict[str, Any] | None:
        """What became of a transaction, if a block has it; the node of this number is asked first."""
        result = await self.rpc.call("getSignatureStatuses", [[signature]], first=first)
        values = result.get("value") if isinstance(result, dict) else None
        status = values[0] if isinstance(values, list) and values else None
        return status if isinstance(status, dict) else None


def _is_confirmed(status: dict[str, Any]) -> bool:
    return status.get("confirmationStatus") in ("confirmed", "finalized")
