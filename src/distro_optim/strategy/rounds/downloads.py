"""Fetches the results that peers announce, and looks at what arrives. No I/O.

What is known of a download stands in its :class:`~.round_state.Claim`; a failed one is tried again for as long as its
round is of interest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ...comm.addresses import EndpointAddr
from ...compress import TilePlan
from ...errors import InvalidResultError, ProtocolError
from .actions import DropReason, FetchBlob, Outbox
from .admission import Peers
from .reading import Reader
from .results import max_result_size
from .round_state import Claim, ClaimState, RoundState

__all__ = ["Downloads"]

RETRY_SECONDS: Final = 2.0
"""Before a failed download is tried again (``shared/network/src/download/scheduler.rs``); doubles each time ..."""

MAX_RETRY_SECONDS: Final = 8.0
"""... up to this. Results are wanted for two rounds, so nobody gives up earlier. Chosen arbitrarily."""

_MAX_DOUBLINGS: Final = 8
"""Far more than it takes to reach :data:`MAX_RETRY_SECONDS`; keeps the power small."""


class Downloads:
    """Downloads of results for one model.

    Args:
        plan: how the model's tensors are tiled; decides which results fit.
        peers: may all have what one of them announced.
        reader: of what arrives.
        outbox: where requests, and complaints about what arrived, go.
        finite: whether results with values that are no numbers, or infinite, are refused.
    """

    def __init__(self, plan: TilePlan, peers: Peers, reader: Reader, outbox: Outbox, *, finite: bool = True) -> None:
        self._plan = plan
        self._peers = peers
        self._reader = reader
        self._outbox = outbox
        self._finite = finite
        self._failed: dict[int, tuple[RoundState, Claim]] = {}  # by the claim's identity, some of them settled since
        # Who may have the results of a round, while the peers are these.
        self._providers_of: tuple[RoundState, tuple[bytes, ...], tuple[bytes, ...]] | None = None

    def begin(self, round_: RoundState, claim: Claim) -> None:
        """Asks for the data of ``claim``, for the first time or again."""
        claim.retry_at = None
        ticket, owner = claim.ticket, claim.sender.p2p_identity
        if ticket.addr.id != owner:
            # Honest peers offer what they make themselves. Another peer's address would replace what we know of that
            # peer, or make us call a stranger.
            ticket = replace(ticket, addr=EndpointAddr(owner))
        self._outbox.put(
            FetchBlob(
                ticket=ticket,
                providers=self._providers(round_),
                max_size=max_result_size(self._plan),
                tag=f"downloaded-distro-result-{claim.sender}_{round_.step}",
            )
        )

    def _providers(self, round_: RoundState) -> tuple[bytes, ...]:
        """Who else may have a result: nobody on probation, who may never have fetched anything or be there at all."""
        known, keys = self._providers_of, self._peers.keys
        if known is not None and known[0] is round_ and known[1] is keys:
            return known[2]
        newcomers = {client.p2p_identity for client in set(round_.clients) - round_.regular}
        providers = tuple(key for key in keys if key not in newcomers)
        self._providers_of = (round_, keys, providers)
        return providers

    def arrived(self, rounds: Sequence[RoundState], blob: bytes, data: bytes) -> None:
        """The download of ``blob`` is here, for whichever of ``rounds`` waits for it."""
        for round_, claim in _fetching(rounds, blob):
            self._read(round_, claim, data)

    def failed(self, rounds: Sequence[RoundState], blob: bytes, now: float, *, is_slow: bool) -> None:
        """The download of ``blob`` failed; one that was only slow does not count as a failure."""
        for round_, claim in _fetching(rounds, blob):
            self._failed[id(claim)] = (round_, claim)
            doublings = min(claim.failures, _MAX_DOUBLINGS)
            claim.retry_at = now + min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2**doublings)
            claim.failures += not is_slow

    def retry(self, rounds: Sequence[RoundState], now: float) -> None:
        """Asks again for what is due."""
        for round_, claim in self._to_retry(rounds):
            if claim.retry_at is not None and claim.retry_at <= now:
                self.begin(round_, claim)

    @property
    def has_failed(self) -> bool:
        """Whether any may have to be tried again."""
        return bool(self._failed)

    def next_retry(self, rounds: Sequence[RoundState]) -> float | None:
        """When :meth:`retry` has something to do, in monotonic seconds; None if never."""
        times = [claim.retry_at for _, claim in self._to_retry(rounds) if claim.retry_at is not None]
        return min(times, default=None)

    def _to_retry(self, rounds: Sequence[RoundState]) -> list[tuple[RoundState, Claim]]:
        """Claims of ``rounds`` whose downloads have failed; all others are forgotten."""
        if self._failed:
            self._failed = {
                key: (round_, claim)
                for key, (round_, claim) in self._failed.items()
                if claim.retry_at is not None and any(round_ is alive for alive in rounds)
            }
        return list(self._failed.values())

    def _read(self, round_: RoundState, claim: Claim, data: bytes) -> None:
        try:
            result = self._reader.result(
                data,
                step=round_.step,
                batch=claim.batch,
                data_hash=claim.commitment.data_hash,
                plan=self._plan,
                finite=self._finite,
            )
            round_.settle(claim, ClaimState.VALID, result)
        except InvalidResultError as error:
            round_.settle(claim, ClaimState.INVALID)
            self._outbox.drop(claim.sender.p2p_identity, DropReason.INVALID_RESULT, str(error))
        except ProtocolError as error:
            round_.settle(claim, ClaimState.BROKEN)
            self._outbox.drop(claim.sender.p2p_identity, DropReason.WRONG_HASH, str(error))


def _fetching(rounds: Sequence[RoundState], blob: bytes) -> list[tuple[RoundState, Claim]]:
    """Claims that wait for ``blob``."""
    return [
        (round_, claim)
        for round_ in rounds
        for claim in round_.claims_of_blob(blob)
        if claim.state is ClaimState.FETCHING
    ]
