"""What went between Psyche's server and three clients, two of Psyche's and one of ours, is understood at both ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.comm.framing import CLIENT_FRAME_LIMIT, ChallengeResponse, Else, FrameDecoder, encode_frame
from distro_optim.comm.postcard import Codec
from distro_optim.comm.signing import SecretKey, SignedMessage
from distro_optim.comm.streams import MemoryListener
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.messages import (
    CLIENT_TO_SERVER,
    SERVER_TO_CLIENT,
    ClientToServerMessage,
    CoordinatorMessage,
    Join,
    WitnessMessage,
)
from distro_optim.coordinator.server.host import Refused, RunHost
from distro_optim.coordinator.server.service import CoordinatorService, Disconnected
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.types import Coordinator, NodeIdentity
from distro_optim.errors import CoordinatorLinkError

TCP = Path(__file__).parents[1] / "vectors" / "live" / "tcp"
CLIENTS = (1, 2, 3)
RUN = "llama"


def recorded(client: int, direction: str) -> bytes:
    return (TCP / f"{client}.{direction}.bin").read_bytes()


def payloads(data: bytes) -> list[bytes]:
    decoder = FrameDecoder(CLIENT_FRAME_LIMIT)
    found = list(decoder.feed(data))
    assert len(decoder) == 0, "the recording ends within a frame"
    return found


def states(client: int) -> list[Coordinator]:
    envelopes = [SERVER_TO_CLIENT.decode(p) for p in payloads(recorded(client, "server-to-client"))[1:]]
    assert all(isinstance(e, Else) and isinstance(e.message, CoordinatorMessage) for e in envelopes)
    return [e.message.state for e in envelopes]


def messages(client: int) -> Iterator[ClientToServerMessage]:
    for payload in payloads(recorded(client, "client-to-server"))[1:]:
        yield CLIENT_TO_SERVER.decode(payload).message


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("direction", "codec"), [("server-to-client", SERVER_TO_CLIENT), ("client-to-server", CLIENT_TO_SERVER)]
)
def test_every_frame_is_encoded_to_the_same_bytes(client: int, direction: str, codec: Codec) -> None:
    data = recorded(client, direction)
    again = [encode_frame(codec.encode(codec.decode(payload))) for payload in payloads(data)]
    assert len(again) > 10
    assert b"".join(again) == data


@pytest.mark.parametrize("client", CLIENTS)
def test_our_client_follows_psyches_server(client: int) -> None:
    async def follow() -> list[Coordinator]:
        listener = MemoryListener()
        key, soon = SecretKey(bytes(31) + b"\1"), BackoffPolicy(first=0.01)
        remote = RemoteCoordinator(listener.connect, key, RUN, give_up_after=0.01, backoff=soon)
        seen: list[Coordinator] = []

        async def serve() -> None:
            stream = await listener.accept()
            await stream.write(recorded(client, "server-to-client"))
            await stream.close()
            await listener.close()

        serving = asyncio.create_task(serve())
        seen.append(await remote.look())
        reading = remote.states()
        with suppress(CoordinatorLinkError):  # when the recording is over, and nobody answers any more
            async for state in reading:
                seen.append(state)
        await serving
        await remote.close()
        return seen

    seen = asyncio.run(follow())
    expected = states(client)
    assert seen[-1] == expected[-1]
    assert {state.progress.step for state in seen} <= {state.progress.step for state in expected}
    assert expected[-1].progress.step > 20


@pytest.mark.parametrize("client", CLIENTS)
def test_our_server_takes_what_clients_sent(client: int) -> None:
    challenge = SERVER_TO_CLIENT.decode(payloads(recorded(client, "server-to-client"))[0]).nonce
    host = RunHost(read_state_file(TCP / "state.toml"))
    service = CoordinatorService(host, draw=lambda size: challenge[:size], unix_offset=0.0, sends_changes=False)
    connection = service.connect("127.0.0.1:1", 0.0)
    now = 0.0
    for payload in payloads(recorded(client, "client-to-server")):
        now += 0.5
        service.receive(connection, encode_frame(payload), now)
        service.tick(now)
        assert not any(isinstance(event, Disconnected) for event in service.take_output().events)
    response = CLIENT_TO_SERVER.decode(payloads(recorded(client, "client-to-server"))[0])
    assert isinstance(response, ChallengeResponse)
    assert connection.peer == SignedMessage.open(response.sealed).sender


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_each_message_is_accepted_in_one_of_the_states_that_psyches_server_was_in(client: int) -> None:
    response = CLIENT_TO_SERVER.decode(payloads(recorded(client, "client-to-server"))[0])
    identity = NodeIdentity.from_single_key(SignedMessage.open(response.sealed).sender)
    host, joined, reports = RunHost(read_state_file(TCP / "state.toml")), 0, 0
    later = iter(states(client))
    for message in messages(client):
        while any(isinstance(e, Refused) for e in host.receive(identity, message, 0, 0)):
            # Its own report may stand in a state already, and no one reports twice: so the next one.
            host.state = next(later)
        joined += isinstance(message, Join)
        reports += isinstance(message, WitnessMessage)
    assert joined >= 1
    assert reports > 10
