"""A Rust endpoint of the version Psyche pins (iroh 0.97) dials us, is dialled by us, and gets the model from us."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.blobs.net import BlobService
from distro_optim.comm.iroh.blobs.store import MemoryStore
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.sharing.messages import (
    ALPN,
    ConfigRequest,
    ModelConfig,
    ModelParameter,
    ParameterRequest,
    decode_answer,
    decode_blob,
    encode_request,
)
from distro_optim.comm.iroh.sharing.torchscript import read_tensor
from distro_optim.comm.iroh.sharing.transfer import ModelSharing
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.comm.tickets import BlobTicket
from distro_optim.errors import NotSharedError

rust = pytest.importorskip("aster._aster", reason="the Rust peer: pip install aster-rpc==0.1.2")

pytestmark = [pytest.mark.waiting]

ECHO = b"distro-optim/test/0"
SECONDS = 30.0
MakeNode = Callable[..., Node]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def rust_endpoint() -> Any:
    config = rust.EndpointConfig(alpns=[ECHO], relay_mode="disabled", bind_addr="127.0.0.1:0")
    return await rust.create_endpoint_with_config(config)


def address_of(endpoint: Any) -> EndpointAddr:
    info = endpoint.endpoint_addr_info()
    return EndpointAddr(
        bytes.fromhex(info.endpoint_id), (), tuple(SocketAddr.parse(text) for text in info.direct_addresses)
    )


def rust_address(node: Node) -> Any:
    addr = node.addr()
    return rust.NodeAddr(addr.id.hex(), None, [str(direct) for direct in addr.direct])


async def ask(endpoint: Any, node: Node, alpn: bytes, words: bytes) -> bytes:
    """What ``node`` answers to a Rust peer that writes ``words`` and ends its side."""
    connection = await endpoint.connect_node_addr(rust_address(node), alpn)
    send, recv = await connection.open_bi()
    await send.write_all(words)
    await send.finish()
    answer = bytes(await recv.read_to_end(1 << 20))
    connection.close(0, b"")
    return answer


def test_rust_dials_us_and_hears_its_own_words(make_node: MakeNode, runner: asyncio.Runner) -> None:
    node = make_node()

    async def echo(connection: Connection) -> None:
        send, recv = await connection.accept_bi()
        await send.write(await recv.read_to_end(1 << 20))
        await send.finish()
        await connection.closed()

    node.accept(ECHO, echo)

    async def scenario() -> None:
        endpoint = await rust_endpoint()
        assert await ask(endpoint, node, ECHO, b"from rust" * 10_000) == b"from rust" * 10_000
        await endpoint.close()

    runner.run(asyncio.wait_for(scenario(), SECONDS))


def test_we_dial_rust_and_hear_our_own_words(make_node: MakeNode, runner: asyncio.Runner) -> None:
    node = make_node()

    async def speak(address: EndpointAddr) -> bytes:
        connection = await node.connect(address, ECHO)
        send, recv = await connection.open_bi()
        await send.write(b"from python" * 10_000)
        await send.finish()
        answer = await recv.read_to_end(1 << 20, timeout=SECONDS)
        connection.close(3, b"enough")
        return answer

    async def scenario() -> None:
        endpoint = await rust_endpoint()
        speaking = asyncio.wrap_future(node.submit(speak(address_of(endpoint))))
        connection = await endpoint.accept()
        assert connection.remote_id() == node.endpoint_id.hex()
        send, recv = await connection.accept_bi()
        await send.write_all(await recv.read_to_end(1 << 20))
        await send.finish()
        assert await speaking == b"from python" * 10_000
        await connection.closed()
        await endpoint.close()

    runner.run(asyncio.wait_for(scenario(), SECONDS))


@pytest.mark.slow
def test_rust_is_turned_away_if_it_is_not_on_the_list(make_node: MakeNode, runner: asyncio.Runner) -> None:
    node = make_node(allowed=[])

    async def never(connection: Connection) -> None:
        pytest.fail("a stranger was served")

    node.accept(ECHO, never)

    async def scenario() -> None:
        endpoint = await rust_endpoint()
        connection = await endpoint.connect_node_addr(rust_address(node), ECHO)
        reason = await connection.closed()
        assert "not in allowlist" in str(reason)
        await endpoint.close()

    runner.run(asyncio.wait_for(scenario(), SECONDS))


def test_a_rust_joiner_gets_config_and_parameters(make_node: MakeNode, runner: asyncio.Runner) -> None:
    node, store = make_node(), MemoryStore()
    BlobService(node, store)

    async def publish(data: bytes, tag: str) -> BlobTicket:
        return BlobTicket.raw(node.addr(), store.add(data, tag=tag))

    weight = torch.arange(12.0).reshape(3, 4).to(torch.bfloat16)
    sharing = ModelSharing(node, publish)

    async def scenario() -> None:
        joiner = await rust.IrohNode.memory_with_alpns(
            [], rust.EndpointConfig(alpns=[], relay_mode="disabled", bind_addr="127.0.0.1:0")
        )
        endpoint, blobs = rust.net_client(joiner), rust.blobs_client(joiner)

        async def part(request: ConfigRequest | ParameterRequest) -> ModelConfig | ModelParameter:
            ticket = decode_answer(await ask(endpoint, node, ALPN, encode_request(request)))
            return decode_blob(bytes(await blobs.download_blob(str(ticket))))

        with pytest.raises(NotSharedError, match="ModelConfigNotInitialized"):
            await part(ConfigRequest())
        sharing.offer(SharedModel('{"a": 1}', "{}", {"weight": weight}))
        assert await part(ConfigRequest()) == ModelConfig('{"a": 1}', "{}", ["weight"])
        parameter = await part(ParameterRequest("weight"))
        assert isinstance(parameter, ModelParameter)
        assert parameter.name == b"weight"
        assert torch.equal(read_tensor(parameter.value), weight)
        await joiner.close()

    runner.run(asyncio.wait_for(scenario(), SECONDS))
