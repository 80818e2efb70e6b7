"""A joiner gets the model from peers, whatever some of them do."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.iroh.blobs.store import MAX_TAG_LEN
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.sharing import messages as messages
from distro_optim.comm.iroh.sharing.messages import ConfigRequest, ModelConfig, ModelParameter, ParameterRequest
from distro_optim.comm.iroh.sharing.peers import SharingPeers
from distro_optim.comm.iroh.sharing.torchscript import write_tensor
from distro_optim.comm.iroh.sharing.transfer import ModelSharing, download_model
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.comm.tickets import BlobTicket
from distro_optim.errors import (
    ExchangeError,
    LimitExceededError,
    NotSharedError,
    PeerUnreachableError,
    ProtocolError,
)

pytestmark = pytest.mark.waiting


SECONDS = 20.0
MakeNode = Callable[..., Node]

MODEL = SharedModel(
    config='{"architecture": "tiny"}',
    tokenizer='{"model": "bytes"}',
    parameters={
        f"layers.{number}.weight": torch.arange(number, number + 12.0).reshape(3, 4).to(torch.bfloat16)
        for number in range(10)
    },
)


class Blobs:
    """A blob store that all peers of a test share; hashes are not what matters here."""

    def __init__(self) -> None:
        self.content: dict[bytes, bytes] = {}
        self.tags: dict[str, bytes] = {}
        self.fetched: list[bytes] = []
        self.limits: dict[bytes, int] = {}

    def publisher(self, node: Node) -> Callable[[bytes, str], Any]:
        async def publish(data: bytes, tag: str) -> BlobTicket:
            digest = hashlib.sha256(data).digest()
            self.content[digest] = data
            self.tags[tag] = digest
            return BlobTicket.raw(EndpointAddr(node.endpoint_id), digest)

        return publish

    async def fetch(self, ticket: BlobTicket, limit: int) -> bytes:
        self.fetched.append(ticket.addr.id)
        self.limits[ticket.hash] = limit
        data = self.content.get(ticket.hash)
        if data is None:
            raise ExchangeError("nobody has it")
        if len(data) > limit:
            raise LimitExceededError("too large")
        return data


def same(ours: SharedModel, theirs: SharedModel) -> bool:
    return (
        ours.config == theirs.config
        and ours.tokenizer == theirs.tokenizer
        and list(ours.parameters) == list(theirs.parameters)
        and all(torch.equal(tensor, theirs.parameters[name]) for name, tensor in ours.parameters.items())
    )


def test_a_model_comes_from_several_peers_as_it_was(make_node: MakeNode) -> None:
    blobs = Blobs()
    joiner, *givers = [make_node() for _ in range(4)]
    for giver in givers:
        ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)
    done: list[tuple[int, int]] = []

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        model = await download_model(
            sharing,
            [giver.endpoint_id for giver in givers],
            blobs.fetch,
            max_parameter_bytes=1 << 20,
            progress=lambda count, total: done.append((count, total)),
        )
        assert same(model, MODEL)
        assert done == [(count, 10) for count in range(1, 11)]

    joiner.submit(scenario()).result(SECONDS)
    assert set(blobs.tags) == {"model-config", *(f"model-{name}" for name in MODEL.parameters)}


def test_a_peer_without_a_model_says_so_in_the_words_of_psyche(make_node: MakeNode) -> None:
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    offered = ModelSharing(giver, blobs.publisher(giver))

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))

        async def refused(question: Any) -> str:
            with pytest.raises(NotSharedError) as error:
                await question
            return error.value.reason

        peer = giver.endpoint_id
        assert await refused(sharing.request_config(peer)) == "ModelConfigNotInitialized"
        assert await refused(sharing.request_parameter(peer, "x")) == "ParametersNotInitialized"
        offered.offer(MODEL)
        assert await refused(sharing.request_parameter(peer, "x")) == "ParameterUnknown"
        assert (await sharing.request_config(peer)).addr.id == peer
        offered.withdraw()
        assert await refused(sharing.request_config(peer)) == "ModelConfigNotInitialized"

    joiner.submit(scenario()).result(SECONDS)


def test_what_cannot_be_published_is_an_error_and_tried_again(make_node: MakeNode, caplog: object) -> None:
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    attempts = []
    publish = blobs.publisher(giver)

    async def full_at_first(data: bytes, tag: str) -> BlobTicket:
        attempts.append(tag)
        if len(attempts) == 1:
            raise ExchangeError("the store is full")
        ticket: BlobTicket = await publish(data, tag)
        return ticket

    async def scenario() -> None:
        ModelSharing(giver, full_at_first).offer(MODEL)
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        with pytest.raises(NotSharedError) as error:
            await sharing.request_config(giver.endpoint_id)
        assert error.value.reason == "SerializationError"
        # Many who ask at once cause one archive.
        tickets = await asyncio.gather(*(sharing.request_config(giver.endpoint_id) for _ in range(3)))
        assert len(set(tickets)) == 1
        assert len(attempts) == 2

    joiner.submit(scenario()).result(SECONDS)


def test_the_tag_of_a_parameter_with_a_long_name_fits_every_store(make_node: MakeNode) -> None:
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    names = ["model." + letter * 500 for letter in "ab"]
    ModelSharing(giver, blobs.publisher(giver)).offer(SharedModel("", "", {name: torch.zeros(1) for name in names}))

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        for name in names:
            await sharing.request_parameter(giver.endpoint_id, name)

    joiner.submit(scenario()).result(SECONDS)
    assert len(blobs.tags) == 2
    assert all(len(tag.encode()) <= MAX_TAG_LEN for tag in blobs.tags)


async def garbage(connection: Connection) -> None:
    send, _ = await connection.accept_bi()
    await send.write(b"\xff" * 20_000)
    await send.finish()
    await connection.closed()


async def wrong_parameter(connection: Connection, blobs: Blobs, node: Node) -> None:
    """Answers every request with a blob that is a parameter of another name."""
    send, _ = await connection.accept_bi()
    blob = messages.encode_blob(ModelParameter(b"another", write_tensor(torch.zeros(1))))
    await send.write(messages.encode_answer(await blobs.publisher(node)(blob, "model-evil")))
    await send.finish()
    await connection.closed()


async def vanished_blob(connection: Connection, node: Node) -> None:
    send, _ = await connection.accept_bi()
    await send.write(messages.encode_answer(BlobTicket.raw(EndpointAddr(node.endpoint_id), b"\7" * 32)))
    await send.finish()
    await connection.closed()


def test_peers_that_fail_in_every_way_do_not_keep_the_model_from_the_joiner(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distro_optim.comm.iroh.sharing.transfer._ERROR_SECONDS", 0.001)
    blobs = Blobs()
    joiner, giver, babbler, liar, forgetful = [make_node() for _ in range(5)]
    babbler.accept(messages.ALPN, garbage)
    liar.accept(messages.ALPN, lambda connection: wrong_parameter(connection, blobs, liar))
    forgetful.accept(messages.ALPN, lambda connection: vanished_blob(connection, forgetful))
    silent = b"\5" * 32  # nobody knows where it is
    ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        order = [silent, babbler.endpoint_id, liar.endpoint_id, forgetful.endpoint_id, giver.endpoint_id]
        model = await download_model(sharing, order, blobs.fetch, max_parameter_bytes=1 << 20)
        assert same(model, MODEL)
        assert {liar.endpoint_id, forgetful.endpoint_id, giver.endpoint_id} <= set(blobs.fetched)

    joiner.submit(scenario()).result(SECONDS)


@pytest.mark.parametrize("how_many", [1, 4])
def test_liars_that_describe_the_model_and_give_other_parts_are_passed_over(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, how_many: int
) -> None:
    monkeypatch.setattr("distro_optim.comm.iroh.sharing.transfer._ERROR_SECONDS", 0.001)
    blobs = Blobs()
    joiner, giver, *liars = [make_node() for _ in range(2 + how_many)]
    ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)

    async def half_true(connection: Connection, node: Node) -> None:
        send, recv = await connection.accept_bi()
        request = messages.decode_request(await recv.read_to_end(messages.MAX_REQUEST))
        said: Any = ModelConfig(MODEL.config, MODEL.tokenizer, list(MODEL.parameters))
        if isinstance(request, ParameterRequest):
            said = ModelParameter(b"another", write_tensor(torch.zeros(1)))
        ticket = await blobs.publisher(node)(messages.encode_blob(said), f"model-{node.endpoint_id.hex()[:8]}")
        await send.write(messages.encode_answer(ticket))
        await send.finish()
        await connection.closed()

    for liar in liars:
        liar.accept(messages.ALPN, functools.partial(half_true, node=liar))

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        order = [*(liar.endpoint_id for liar in liars), giver.endpoint_id]
        assert same(await download_model(sharing, order, blobs.fetch, max_parameter_bytes=1 << 20), MODEL)
        assert {liar.endpoint_id for liar in liars} <= set(blobs.fetched)

    joiner.submit(scenario()).result(SECONDS)


def test_when_all_peers_fail_the_last_reason_is_told(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distro_optim.comm.iroh.sharing.transfer._ERROR_SECONDS", 0.001)
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    ModelSharing(giver, blobs.publisher(giver))

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        with pytest.raises(ExchangeError, match="ModelConfigNotInitialized"):
            await download_model(sharing, [giver.endpoint_id], blobs.fetch, max_parameter_bytes=1 << 20)

    joiner.submit(scenario()).result(SECONDS)


def test_a_parameter_beyond_the_bound_is_not_fetched(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distro_optim.comm.iroh.sharing.transfer._ERROR_SECONDS", 0.001)
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        with pytest.raises(ExchangeError, match="too large"):
            await download_model(sharing, [giver.endpoint_id], blobs.fetch, max_parameter_bytes=100)

    joiner.submit(scenario()).result(SECONDS)


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_parts_that_fail_at_the_same_time_are_one_error(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("distro_optim.comm.iroh.sharing.transfer._ERROR_SECONDS", 0.001)
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        everybody = asyncio.Barrier(at_once)

        async def fetch(ticket: BlobTicket, limit: int) -> bytes:
            data = await blobs.fetch(ticket, limit)
            if data == blobs.content[blobs.tags["model-config"]]:
                return data
            await everybody.wait()
            raise ExchangeError("the line was cut")

        with pytest.raises(ExchangeError, match="the line was cut"):
            await download_model(sharing, [giver.endpoint_id], fetch, max_parameter_bytes=1 << 20, concurrent=at_once)

    joiner.submit(scenario()).result(SECONDS)


def test_each_parameter_has_its_own_bound_where_sizes_are_known(make_node: MakeNode) -> None:
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)
    bounds = {name: 10_000 + number for number, name in enumerate(MODEL.parameters)}
    last = max(bounds)
    bounds[last] = 1 << 30

    async def scenario() -> None:
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        model = await download_model(
            sharing,
            [giver.endpoint_id],
            blobs.fetch,
            max_parameter_bytes=1 << 20,
            check=lambda peer, config, names: bounds,
        )
        assert same(model, MODEL)

    joiner.submit(scenario()).result(SECONDS)
    limits = {name: blobs.limits[blobs.tags[f"model-{name}"]] for name in MODEL.parameters}
    assert limits == {**bounds, last: 1 << 20}


@pytest.mark.parametrize(
    "words", [b"", b"\2", b"\1\xff\xff\xff\xff\x0f", bytes(2000)], ids=["empty", "?", "cut", "long"]
)
def test_a_malformed_request_costs_its_sender_the_connection(make_node: MakeNode, words: bytes) -> None:
    blobs = Blobs()
    joiner, giver = make_node(), make_node()
    ModelSharing(giver, blobs.publisher(giver)).offer(MODEL)

    async def scenario() -> None:
        connection = await joiner.connect(giver.endpoint_id, messages.ALPN)
        send, _ = await connection.open_bi()
        await send.write(words)
        await send.finish()
        await asyncio.wait_for(connection.closed(), SECONDS)
        assert connection.close_code == 2
        sharing = ModelSharing(joiner, blobs.publisher(joiner))
        await sharing.request_config(giver.endpoint_id)

    joiner.submit(scenario()).result(SECONDS)


# --- bytes ---


def test_requests_and_errors_have_the_numbers_of_psyche() -> None:
    assert messages.encode_request(ConfigRequest()) == b"\0"
    assert messages.encode_request(ParameterRequest("w")) == b"\1\1w"
    for number, (error, text) in enumerate(
        [
            (messages.TchSerializeError, True),
            (messages.InvalidUpdate, False),
            (messages.ParameterUnknown, True),
            (messages.ParameterAlreadyAdded, False),
            (messages.SerializationError, True),
            (messages.ParametersNotInitialized, False),
            (messages.ParameterNotInitialized, True),
            (messages.ResponseChannelNotInitialized, False),
            (messages.ConnectionIOError, True),
            (messages.DecodeParameterNameError, True),
            (messages.ModelConfigNotInitialized, False),
            (messages.TokenizerConfigNotInitialized, False),
            (messages.ParseConfig, True),
            (messages.SendConfig, False),
            (messages.LoadThreadCrashed, False),
            (messages.P2PAddDownloadError, True),
        ]
    ):
        answer = messages.encode_answer(error("no") if text else error())
        assert answer == bytes([1, number]) + (b"\2no" if text else b"")
        with pytest.raises(NotSharedError) as refusal:
            messages.decode_answer(answer)
        assert refusal.value.reason == error.__name__


def test_blobs_have_the_numbers_of_psyche() -> None:
    assert messages.encode_blob(ModelParameter(b"w", b"abc")) == b"\1\1w\3abc"
    assert messages.encode_blob(ModelConfig("c", "t", ["a", "b"])) == b"\2\1c\1t\2\1a\1b"
    with pytest.raises(ProtocolError):
        messages.decode_blob(b"\0")
    with pytest.raises(ProtocolError):
        messages.decode_blob(b"\0\7\2\x10\x13\0")


@given(st.binary(max_size=200))
def test_any_bytes_raise_only_protocol_errors(data: bytes) -> None:
    for decode in (messages.decode_request, messages.decode_answer, messages.decode_blob):
        try:
            decode(data)
        except (ProtocolError, NotSharedError):
            pass


# --- whom to ask ---


def test_fast_peers_are_asked_first_then_unknown_then_those_that_delivered_nothing() -> None:
    fast, slow, near, far, failing = (bytes([number]) * 32 for number in range(5))
    peers = SharingPeers([failing, far, slow, near, fast], latencies={near: 0.01, far: 0.2})
    peers.measured(fast, 100.0)
    peers.measured(slow, 10.0)
    peers.failed(failing)
    assert [peers.take() for _ in range(6)] == [fast, slow, near, far, failing, None]
    peers.give_back(near)
    assert peers.take() == near


def test_five_errors_exclude_a_peer() -> None:
    peer = b"\1" * 32
    peers = SharingPeers([peer, peer])
    for _ in range(4):
        assert peers.take() == peer
        peers.failed(peer)
        peers.give_back(peer)
    assert not peers.exhausted
    peers.failed(peer)
    assert peers.exhausted
    assert peers.take() is None
    peers.give_back(peer)
    peers.measured(peer, 1.0)


def test_an_unreachable_peer_is_told_as_such(make_node: MakeNode) -> None:
    node = make_node()
    sharing = ModelSharing(node, Blobs().publisher(node))
    with pytest.raises(PeerUnreachableError):
        node.submit(sharing.request_config(b"\5" * 32)).result(SECONDS)
