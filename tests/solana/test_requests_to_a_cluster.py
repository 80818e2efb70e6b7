"""JSON-RPC: what is tried again, where, and what an error says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from solders.keypair import Keypair

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.coordinator.solana import feed as feed_module
from distro_optim.coordinator.solana import rpc as rpc_module
from distro_optim.coordinator.solana.finding import cluster_time
from distro_optim.coordinator.solana.rpc import (
    RpcClient,
    RpcRefusedError,
    TransactionFailedError,
    failure_of,
    shown_url,
)
from distro_optim.errors import ConfigurationError, CoordinatorLinkError
from distro_optim.testing import Validator
from distro_optim.testing.solana.server import ValidatorServer

pytestmark = pytest.mark.waiting

QUICK = BackoffPolicy(first=0.001, jitter=0.0)
KEY = Keypair.from_seed(bytes(32)).pubkey()


def with_server(check: Callable[[ValidatorServer, RpcClient], Awaitable[None]]) -> ValidatorServer:
    """Runs a check against a cluster; returns the server for what it has counted."""

    async def run() -> ValidatorServer:
        validator = Validator(unix_timestamp=1234)
        validator.fund(KEY, 77)
        async with ValidatorServer(validator) as server:
            client = RpcClient([server.url], retrying=QUICK)
            try:
                await check(server, client)
            finally:
                await client.close()
            return server

    return asyncio.run(run())


def test_accounts_balances_and_the_clock_are_read() -> None:
    async def check(server: ValidatorServer, client: RpcClient) -> None:
        assert await client.balance(KEY) == 77
        assert await cluster_time(client) == 1234
        absent = await client.account(Keypair().pubkey())
        assert (absent.data, absent.owner) == (None, None)

    with_server(check)


@pytest.mark.parametrize("fault", ["too_many_requests", "server_errors", "lost_answers"])
def test_what_may_pass_is_tried_again(fault: str) -> None:
    async def check(server: ValidatorServer, client: RpcClient) -> None:
        setattr(server.faults, fault, 3)
        assert await client.balance(KEY) == 77

    assert len(with_server(check).faults.happened) == 3


def test_the_next_node_has_its_turn_when_one_does_not_answer() -> None:
    async def check(server: ValidatorServer, client: RpcClient) -> None:
        other = RpcClient(["http://127.0.0.1:9", server.url], retrying=QUICK)
        assert await other.balance(KEY) == 77
        await other.close()

    with_server(check)


def test_an_unreachable_cluster_is_named_by_its_host_alone() -> None:
    async def run() -> None:
        client = RpcClient(["http://user:secret@127.0.0.1:9/v2/secret?key=secret"], retrying=QUICK)
        with pytest.raises(CoordinatorLinkError, match="no node of the cluster answers to getBalance") as caught:
            await client.balance(KEY)
        await client.close()
        assert "secret" not in str(caught.value)
        assert "127.0.0.1:9" in str(caught.value)

    asyncio.run(run())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"jsonrpc": "2.0", "method": "slotNotification"}',
        '{"jsonrpc": "2.0", "method": "accountNotification", "params": {"subscription": 1, "result": 5}}',
    ],
)
def test_news_that_make_no_sense_are_passed_over(text: str) -> None:
    assert list(feed_module._parsed(text)) == []


def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(server: ValidatorServer, client: RpcClient) -> None:
        monkeypatch.setattr(rpc_module, "MAX_ANSWER_BYTES", 50)
        with pytest.raises(CoordinatorLinkError, match="an answer of more than 50 bytes"):
            await client.account(KEY)

    with_server(check)


def test_an_unknown_method_is_not_tried_again() -> None:
    async def check(server: ValidatorServer, client: RpcClient) -> None:
        with pytest.raises(RpcRefusedError, match="Method not found"):
            await client.call("getNonsense")
        with pytest.raises(RpcRefusedError, match="Invalid params"):
            await client.call("getBalance", ["no key"])

    assert with_server(check).requests == {"getNonsense": 1, "getBalance": 1}


def test_addresses_are_shown_without_their_keys() -> None:
    assert shown_url("https://u:p@rpc.example.org:8899/v2/KEY?x=KEY") == "https://rpc.example.org:8899"
    assert shown_url("wss://example.org/KEY") == "wss://example.org"


@pytest.mark.parametrize("urls", [[], ["example.org"], ["ws://example.org"]])
def test_an_address_of_another_kind_is_refused(urls: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        RpcClient(urls)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "name", "words"),
    [
        ({"InstructionError": [0, {"Custom": 6015}]}, "CoordinatorErrorHalted", "paused or finished"),
        ({"InstructionError": [0, {"Custom": 3012}]}, "AccountNotInitialized", "authorize this wallet"),
        ({"InstructionError": [0, {"Custom": 9}]}, "Custom(9)", "Custom"),
        ({"InstructionError": [0, "ProgramFailedToComplete"]}, "ProgramFailedToComplete", "ProgramFailed"),
        ({"InsufficientFundsForRent": {"account_index": 0}}, "InsufficientFundsForRent", "SOL"),
        ("InsufficientFundsForFee", "InsufficientFundsForFee", "SOL"),
        ({}, "{}", "{}"),
        (5, "5", "5"),
    ],
)
def test_the_error_of_a_transaction_is_told_in_words(error: Any, name: str, words: str) -> None:
    found = failure_of(error)
    assert found.name == name
    assert words in str(found)


def test_a_name_in_the_logs_counts_more_than_a_number() -> None:
    """An older program has other numbers."""
    logs = ["Program log: AnchorError occurred. Error Code: ClientsFull. Error Number: 6004. Error Message: x."]
    assert failure_of({"InstructionError": [0, {"Custom": 6004}]}, logs).name == "ClientsFull"


def answer(**parts: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": 1, **parts})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", rpc_module._AgainError),
        ("[" * 100_000, rpc_module._AgainError),
        ("[]", rpc_module._AgainError),
        (json.dumps({"id": 2, "result": 1}), rpc_module._AgainError),
        (answer(), rpc_module._AgainError),
        (answer(error=5), rpc_module._AgainError),
        (answer(error={"code": -32005, "message": "behind"}), rpc_module._AgainError),
        (answer(error={"code": -32002, "data": {"err": "BlockhashNotFound"}}), rpc_module._AgainError),
        (
            answer(error={"code": -32002, "data": {"err": {"InstructionError": [0, {"Custom": 1}]}}}),
            TransactionFailedError,
        ),
        (answer(error={"code": -32002, "data": {"err": {}}}), TransactionFailedError),
        (answer(error={"code": -32002, "message": "this has already been processed"}), TransactionFailedError),
        (answer(error={"code": 1, "message": "found no record of a prior credit"}), TransactionFailedError),
        (answer(error={"code": -32602}), RpcRefusedError),
    ],
)
def test_answers_are_sorted(text: str, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        rpc_module._checked(text, 1)
