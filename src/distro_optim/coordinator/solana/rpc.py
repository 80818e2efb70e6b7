"""JSON-RPC to nodes of a cluster: several addresses, repetition, and what each error means.

An RPC address often holds a key in its path or its query, so that messages name only its host.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from solders.pubkey import Pubkey
from solders.rpc.responses import GetAccountInfoResp

from ...comm.backoff import BackoffPolicy
from ...errors import ConfigurationError, CoordinatorLinkError, ProtocolError
from .program_errors import COORDINATOR_ERRORS, advice, error_name, name_in_logs

__all__ = [
    "AccountRead",
    "NodesBehindError",
    "RpcClient",
    "RpcRefusedError",
    "TransactionFailedError",
    "shown_url",
]

_log = logging.getLogger(__name__)

TRIES: Final = 4
"""Of one request at one node, before the next node has its turn; as Psyche's client."""

RETRYING: Final = BackoffPolicy(first=0.5, factor=1.5, longest=10.0, jitter=0.0)
"""As Psyche's client (``solana-common/src/retry.rs``)."""

REQUEST_SECONDS: Final = 30.0

LONGEST_RETRY_AFTER: Final = 120.0
"""Seconds. A node that asks for more is left alone for that long, as by Solana's own client."""

BEHIND: Final = -32016
"""The code of a node that has not reached the slot that it is asked for (``minContextSlot``)."""

MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""A list of a program's accounts can be long; one account in base64 has 160 kB."""

_FINAL_CODES: Final = range(-32602, -32599)
"""Invalid params, unknown method, invalid request: the same request will never do."""

_TRANSIENT: Final = frozenset(
    {
        "BlockhashNotFound",
        "ClusterMaintenance",
        "WouldExceedMaxBlockCostLimit",
        "WouldExceedMaxAccountCostLimit",
        "WouldExceedMaxVoteCostLimit",
        "WouldExceedAccountDataBlockLimit",
        "WouldExceedAccountDataTotalLimit",
        "TooManyAccountLocks",
        "AddressLookupTableNotFound",
        "ProgramCacheHitMaxLimit",
        "AccountInUse",
    }
)
"""Errors of a transaction that may be gone a moment later."""


class RpcRefusedError(CoordinatorLinkError):
    """A node refuses a request for good.

    Attributes:
        code: of JSON-RPC.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class TransactionFailedError(CoordinatorLinkError):
    """A transaction cannot be carried out; where the preflight found it, nothing was paid.

    Attributes:
        name: of the program's error, or the cluster's.
        number: of the program's error, if it is one.
        logs: what the programs wrote.
    """

    def __init__(self, message: str, *, name: str, number: int | None = None, logs: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.number = number
        self.logs = tuple(logs)


class NodesBehindError(CoordinatorLinkError):
    """Every node that answers is behind the slot that it is asked for."""


@dataclass(frozen=True)
class AccountRead:
    """An account at a time.

    Attributes:
        slot: of the node, when it looked.
        data: the bytes; None if there is no such account.
        owner: the program that it belongs to.
        lamports: what it holds.
    """

    slot: int
    data: bytes | None
    owner: Pubkey | None = None
    lamports: int = 0


class _AgainError(Exception):
    """Try again; perhaps not before so many seconds.

    Attributes:
        seconds: that the node asks for; None for no such wish.
    """

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class _BehindError(_AgainError):
    """The node has not seen yet what it is asked for."""


def shown_url(url: str) -> str:
    """What may be shown of an address: neither path nor query, nor a password."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or '?'}{port}"


def failure_of(error: Any, logs: Sequence[str] = ()) -> TransactionFailedError:
    """What the error of a transaction means, given in the form of JSON-RPC, such as
    ``{"InstructionError": [0, {"Custom": 6015}]}``."""
    name, number = str(error), None
    if isinstance(error, dict) and error:
        kind, detail = next(iter(error.items()))
        name = str(kind)
        if kind == "InstructionError" and isinstance(detail, list) and len(detail) == 2:
            detail = detail[1]
            if isinstance(detail, dict) and isinstance(detail.get("Custom"), int):
                number = detail["Custom"]
                name = name_in_logs(logs) or error_name(number, COORDINATOR_ERRORS) or f"Custom({number})"
            else:
                name = str(detail)
    if name in ("AccountNotFound", "InsufficientFundsForFee", "InsufficientFundsForRent"):
        message = "the wallet has not the money for the fee: send it some SOL"
    else:
        message = advice(name)
    return TransactionFailedError(f"{message} ({name})", name=name, number=number, logs=logs)


class RpcClient:
    """Requests to one or more nodes of a cluster.

    Args:
        urls: http or https, in the order in which they are tried.
        retrying: pauses between tries.
        timeout: seconds for one request.
        clock: seconds that only grow; by default the loop's time.
        sleep: waits for so many seconds.

    Raises:
        ConfigurationError: no address, or one of another kind.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        retrying: BackoffPolicy = RETRYING,
        timeout: float = REQUEST_SECONDS,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        if not urls:
            raise ConfigurationError("at least one RPC address is needed", name="rpc")
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https"):
                raise ConfigurationError(
                    f"an RPC address begins with https:// or http://, not {shown_url(url)}", name="rpc"
                )
        self.urls = tuple(urls)
        self._retrying = retrying
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None
        self._number = 0
        self._clock = clock
        self._sleep = sleep
        self._left_alone: dict[str, float] = {}
        """Until when, for nodes that have asked for a pause."""

    @property
    def name(self) -> str:
        """What messages call the cluster."""
        return shown_url(self.urls[0])

    async def session(self) -> aiohttp.ClientSession:
        """The connections, opened when first needed."""
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    async def close(self) -> None:
        """Closes the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def call(self, method: str, params: Sequence[Any] = (), *, first: int = 0) -> Any:
        """The result of a request.

        Args:
            method: its name.
            params: its parameters.
            first: the number of the node that is asked first, counted round.

        Raises:
            RpcRefusedError: it is refused for good.
            TransactionFailedError: a transaction would fail.
            CoordinatorLinkError: no node answered.
        """
        return json.loads(await self.call_text(method, params, first=first))["result"]

    async def call_text(self, method: str, params: Sequence[Any] = (), *, first: int = 0) -> str:
        """The whole answer, which is known to hold a result."""
        problems: list[str] = []
        is_behind = True
        at = first % len(self.urls)
        # Who has asked for a pause comes after those that have not, the shortest pause first.
        for url in sorted((*self.urls[at:], *self.urls[:at]), key=self._pause):
            for failures in range(1, TRIES + 1):
                pause = self._pause(url)
                if pause >= LONGEST_RETRY_AFTER:
                    problems.append(f"{shown_url(url)}: it asks to be left alone for {pause:.0f} s")
                    is_behind = False
                    break
                if pause:
                    await self._wait(pause)
                try:
                    return await self._ask(url, method, params)
                except _AgainError as error:
                    problems.append(f"{shown_url(url)}: {error}")
                    _log.info("%s at %s: %s", method, shown_url(url), error)
                    is_behind = is_behind and isinstance(error, _BehindError)
                    if error.seconds is not None:
                        self._left_alone[url] = self._now() + error.seconds
                    if len(self.urls) > 1 and (error.seconds is not None or isinstance(error, _BehindError)):
                        break  # another node may know, or be less busy
                    if error.seconds is None and failures < TRIES:
                        await self._wait(self._retrying.delay(failures, 0.0))
        kind = NodesBehindError if is_behind else CoordinatorLinkError
        raise kind(f"no node of the cluster answers to {method}: {'; '.join(dict.fromkeys(problems))}")

    def _now(self) -> float:
        return (self._clock or asyncio.get_running_loop().time)()

    async def _wait(self, seconds: float) -> None:
        await (self._sleep or asyncio.sleep)(seconds)

    def _pause(self, url: str) -> float:
        """Seconds for which a node is to be left alone yet."""
        until = self._left_alone.get(url)
        return 0.0 if until is None else max(0.0, until - self._now())

    async def _ask(self, url: str, method: str, params: Sequence[Any]) -> str:
        self._number += 1
        number = self._number
        body = {"jsonrpc": "2.0", "id": number, "method": method, "params": list(params)}
        session = await self.session()
        try:
            async with session.post(url, json=body, timeout=self._timeout) as response:
                if response.status == 429:
                    raise _AgainError("it is asked too often (HTTP 429)", _retry_after(response))
                if response.status != 200:
                    raise _AgainError(f"HTTP {response.status}")
                text = await _bounded_text(response)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            # The text of these errors can hold the whole address.
            raise _AgainError(f"no answer ({type(error).__name__})") from None
        return _checked(text, number)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def account(
        self, key: Pubkey, *, min_slot: int = 0, first: int = 0, length: int | None = None
    ) -> AccountRead:
        """An account as the cluster has confirmed it.

        Args:
            key: its address.
            min_slot: a node that is behind this slot is passed over, if another is not.
            first: the number of the node that is asked first, counted round.
            length: so many bytes from its beginning are enough; None asks for all.

        Raises:
            CoordinatorLinkError: no node answered.
            ProtocolError: the answer makes no sense.
        """
        options: dict[str, Any] = {"encoding": "base64+zstd", "commitment": "confirmed"}
        if length is not None:
            options["dataSlice"] = {"offset": 0, "length": length}
        try:
            asked = {**options, "minContextSlot": min_slot} if min_slot and len(self.urls) > 1 else options
            text = await self.call_text("getAccountInfo", [str(key), asked], first=first)
        except NodesBehindError:
            text = await self.call_text("getAccountInfo", [str(key), options], first=first)
        try:
            answer = GetAccountInfoResp.from_json(text)
        except Exception as error:
            raise ProtocolError(f"{self.name} answers with something that is no account: {error}") from None
        if not isinstance(answer, GetAccountInfoResp):
            raise ProtocolError(f"{self.name} answers with something that is no account")
        slot, value = answer.context.slot, answer.value
        return AccountRead(slot, None) if value is None else AccountRead(slot, value.data, value.owner, value.lamports)

    async def balance(self, key: Pubkey) -> int:
        """Lamports of an account."""
        result = await self.call("getBalance", [str(key), {"commitment": "confirmed"}])
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, int):
            raise ProtocolError(f"{self.name} answers with something that is no balance")
        return value

    async def rent(self, size: int) -> int:
        """Lamports that must lie in an account of ``size`` bytes."""
        answer = await self.call("getMinimumBalanceForRentExemption", [size])
        if not isinstance(answer, int) or answer < 0:
            raise ProtocolError(f"{self.name} does not tell what an account of {size} bytes costs")
        return answer


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


async def _bounded_text(response: aiohttp.ClientResponse) -> str:
    parts, size = [], 0
    async for part in response.content.iter_chunked(64 * 1024):
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise _AgainError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        parts.append(part)
    return b"".join(parts).decode(errors="replace")


def _checked(text: str, number: int) -> str:
    """The text of an answer that holds a result; anything else is sorted into what may be tried again and what not."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        raise _AgainError("the answer is not JSON") from None
    if not isinstance(answer, dict) or answer.get("id") != number:
        raise _AgainError("the answer is not to this request")
    if "result" in answer:
        return text
    error = answer.get("error")
    if not isinstance(error, dict):
        raise _AgainError("the answer has neither a result nor an error")
    code, message, data = error.get("code"), str(error.get("message", ""))[:500], error.get("data")
    if isinstance(data, dict) and data.get("err") is not None:
        reason = data["err"]
        if (reason if isinstance(reason, str) else next(iter(reason), "")) in _TRANSIENT:
            raise _AgainError(f"{reason}")
        raise failure_of(reason, [str(line) for line in data.get("logs") or ()])
    if "already been processed" in message:
        raise failure_of("AlreadyProcessed")
    if "found no record of a prior credit" in message:
        raise failure_of("AccountNotFound")
    if code == BEHIND:
        raise _BehindError("it is behind the others")
    if isinstance(code, int) and code in _FINAL_CODES:
        raise RpcRefusedError(f"the node refuses the request: {message}", code=code)
    raise _AgainError(message or f"error {code}")
