"""How far the peers of a run are, for a host that starts again: asked of each of them, and who is believed.

A host whose process died would go on from its own checkpoint, and throw away what the others have since. So it asks:

- peers that are still in the run, and wait for it, for the coordinator's state as they saw it last. The host goes on
  from there, in mid-epoch, and is itself a newcomer to the next epoch;
- peers that were started again, too, as they join, for the step of their checkpoint. Of these the newest counts: the
  run begins there, with that peer as the first of its list, whose weights the others take.

Believed are those that had standing when the host saved its own checkpoint: clients of that epoch that were not on
probation. A peer that was started again has another key, so it keeps the one that it had in ``peer.key`` beside its
checkpoints, and signs with it::

    question    the run's name
    answer      Newest
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from ...comm import postcard
from ...comm.addresses import EndpointAddr
from ...comm.framing import Else
from ...comm.iroh.connection import Connection
from ...comm.iroh.endpoint import Node
from ...comm.postcard import U16, U32, U64, Bytes32, Limit
from ...comm.signing import SECRET_KEY_SIZE, SecretKey, SignedMessage
from ...coordinator.messages import SERVER_TO_CLIENT, CoordinatorMessage
from ...coordinator.ticket import RunTicket
from ...coordinator.types import Coordinator, NodeIdentity, RunState
from ...errors import DistroError, ProtocolError
from ..rounds.trust.saved_step import SavedStep
from ..rounds.trust.succeeding import position_in

__all__ = [
    "Newest",
    "NewestDesk",
    "NewestSearch",
    "ask_all_newest",
    "ask_newest",
    "claim_of",
    "keep_key",
    "kept_key",
    "newest_live",
    "read_claim",
    "state_bytes",
]

NEWEST_ALPN: Final = b"distro-optim/newest/0"

KEY_NAME: Final = "peer.key"

SECONDS: Final = 5.0
"""For a question with its answer. Chosen arbitrarily."""

MAX_QUESTION: Final = 32
MAX_STATE: Final = 1 << 20
"""Bytes of a coordinator's state; one with 256 clients has some 60,000."""
MAX_ANSWER: Final = MAX_STATE + 4096

_MARK: Final = b"distro-optim saved step 0\0"
"""Begins what is signed."""


@dataclass(frozen=True)
class _Claim:
    """What is signed with the key of before: "I, who am ``now`` today, have this step"."""

    run_id: Annotated[str, Limit(MAX_QUESTION)]
    now: Bytes32
    epoch: U16
    step: U32
    data_index: U64


@dataclass(frozen=True)
class Newest:
    """An answer.

    Attributes:
        state: the coordinator's, as its messages have it; empty if the peer was in no round since it was started.
        has_left: the peer has voted against the host of that state.
        claim: the step of its checkpoint, signed with the key that it had then; empty if it has none.
    """

    state: Annotated[bytes, Limit(MAX_STATE)] = b""
    has_left: bool = False
    claim: Annotated[bytes, Limit(1024)] = b""


def state_bytes(state: Coordinator) -> bytes:
    """A state as an answer has it."""
    return SERVER_TO_CLIENT.encode(Else(CoordinatorMessage(state)))


def live_state(answer: Newest, run_id: str) -> Coordinator | None:
    """The state in an answer; None if there is none of this run.

    Raises:
        ProtocolError: it is malformed.
    """
    if not answer.state:
        return None
    envelope = SERVER_TO_CLIENT.decode(answer.state)
    message = envelope.message if isinstance(envelope, Else) else None
    return message.state if isinstance(message, CoordinatorMessage) and message.state.run_id == run_id else None


# -- the peer that answers ---------------------------------------------------------------------------------------------


def kept_key(folder: Path | None) -> SecretKey | None:
    """The key that this peer had when it was in the run last; None if it kept none."""
    if folder is None:
        return None
    with suppress(OSError, DistroError):
        data = (folder / KEY_NAME).read_bytes()
        return SecretKey(data) if len(data) == SECRET_KEY_SIZE else None
    return None


def keep_key(folder: Path, key: SecretKey) -> None:
    """Keeps ours for the next start. A disk that is full is no reason not to train."""
    partial = folder / f"{KEY_NAME}.tmp"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.to_bytes())
        os.replace(partial, folder / KEY_NAME)


def claim_of(saved: SavedStep, before: SecretKey, now: bytes) -> bytes:
    """Says, signed with the key of before, that the peer with key ``now`` has a checkpoint."""
    claim = _Claim(saved.run_id, now, saved.epoch, saved.step, saved.data_index)
    return SignedMessage.seal(before, _MARK + postcard.encode(claim))


def read_claim(data: bytes, run_id: str, now: bytes) -> tuple[bytes, SavedStep]:
    """The key of before, and what its owner has.

    Raises:
        ProtocolError: it is malformed, badly signed, or of another run or peer.
    """
    message = SignedMessage.open(data)
    if not message.data.startswith(_MARK):
        raise ProtocolError("something else was signed")
    claim: _Claim = postcard.decode(_Claim, message.data[len(_MARK) :])
    if claim.run_id != run_id or claim.now != now:
        raise ProtocolError("it is about another run, or another peer says it")
    return message.sender, SavedStep(run_id, claim.epoch, claim.step, claim.data_index)


class NewestDesk:
    """Answers on a node.

    Args:
        node: whose connections are used.
        run_id: the run about which it answers.
        known: what there is to answer.
    """

    def __init__(self, node: Node, run_id: str, known: Callable[[], Newest]) -> None:
        self._node = node
        self._run_id = run_id.encode()
        self._known = known
        node.exempt(NEWEST_ALPN)  # a host that was started again is in no epoch
        node.accept(NEWEST_ALPN, self._serve)

    def close(self) -> None:
        """Answers no more."""
        self._node.refuse(NEWEST_ALPN)

    async def _serve(self, connection: Connection) -> None:
        send, recv = await connection.accept_bi(timeout=SECONDS)
        asked = await recv.read_to_end(MAX_QUESTION, timeout=SECONDS)
        answer = self._known() if asked == self._run_id else Newest()
        await send.write(postcard.encode(answer), timeout=SECONDS)
        await send.finish()
        with suppress(TimeoutError):
            await asyncio.wait_for(connection.closed(), SECONDS)


# -- the host that asks ------------------------------------------------------------------------------------------------


async def ask_newest(node: Node, peer: EndpointAddr, run_id: str) -> Newest | None:
    """Asks ``peer``; None if it does not answer in five seconds, or with something else."""
    node.exempt(NEWEST_ALPN)
    try:
        async with asyncio.timeout(SECONDS):
            connection = await node.connect(peer, NEWEST_ALPN)
            try:
                send, recv = await connection.open_bi()
                await send.write(run_id.encode())
                await send.finish()
                answer: Newest = postcard.decode(Newest, await recv.read_to_end(MAX_ANSWER))
                return answer
            finally:
                connection.close()
    except (DistroError, OSError, TimeoutError):
        return None


async def ask_all_newest(node: Node, ticket: RunTicket) -> list[tuple[bytes, Newest]]:
    """The answers of the peers that a ticket names, each with the key of its peer."""
    peers = [peer for peer in ticket.peers if peer.id != node.endpoint_id]
    answers = await asyncio.gather(*(ask_newest(node, peer, ticket.run_id) for peer in peers))
    return [(peer.id, answer) for peer, answer in zip(peers, answers, strict=True) if answer is not None]


def newest_live(
    answers: Collection[tuple[bytes, Newest]], run_id: str, standing: Collection[bytes], step: int
) -> Coordinator | None:
    """The state with which a host that starts again goes on, of those that peers with standing have; None if all are
    of earlier steps than the ``step`` it has itself."""
    found = []
    for peer, answer in answers:
        if peer not in standing:
            continue
        with suppress(ProtocolError):
            state = live_state(answer, run_id)
            if state is not None and state.progress.step >= step and state.run_state is not RunState.FINISHED:
                found.append(state)
    return max(found, key=position_in, default=None)


class NewestSearch:
    """Asks the clients that join, before the first epoch of a run that goes on from a checkpoint.

    Args:
        ours: what our own checkpoint says.
        ask: asks a client; None if it does not answer.
        adopt: the run goes on from there, with that client first; False if it cannot.
        on_note: told what people should know.
    """

    def __init__(
        self,
        ours: SavedStep,
        *,
        ask: Callable[[bytes], Awaitable[Newest | None]],
        adopt: Callable[[SavedStep, NodeIdentity], bool],
        on_note: Callable[[str], None],
    ) -> None:
        self._best = ours
        self._standing = ours.standing
        self._run_id = ours.run_id
        self._ask = ask
        self._adopt = adopt
        self._on_note = on_note
        self._asked: dict[NodeIdentity, asyncio.Task[None]] = {}

    def may_begin(self, pending: Collection[NodeIdentity]) -> bool:
        """Whether all of these have answered, or cannot; asks those that were not asked yet."""
        for client in pending:
            if client not in self._asked:
                self._asked[client] = asyncio.get_running_loop().create_task(self._hear(client))
        return all(self._asked[client].done() for client in pending)

    def close(self) -> None:
        """Asks nobody any more."""
        for task in self._asked.values():
            task.cancel()

    async def _hear(self, client: NodeIdentity) -> None:
        key = client.p2p_identity
        answer = await self._ask(key)
        if answer is None or not answer.claim:
            return
        try:
            before, saved = read_claim(answer.claim, self._run_id, key)
        except ProtocolError:
            return
        if saved.step <= self._best.step:
            return
        if before not in self._standing:
            self._on_note(
                f"peer {key.hex()[:8]} says that it has step {saved.step} of the run, and this host is at step "
                f"{self._best.step}; but it does not know that peer from then, so its own checkpoint counts. To go on "
                "from that one, host the run there (resume=True)"
            )
            return
        if self._adopt(saved, client):
            self._on_note(
                f"peer {key.hex()[:8]} has a checkpoint of step {saved.step}, later than step {self._best.step} here: "
                "the run goes on from that one"
            )
            self._best = saved
