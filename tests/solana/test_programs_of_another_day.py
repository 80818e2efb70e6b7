"""A checkpoint is sent only to a program that was deployed since checkpoints have their present form."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from distro_optim.coordinator.messages import CheckpointMessage
from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.solana.decisions.checkpoint_format import (
    FORMAT_SINCE,
    Deployment,
    OldProgramError,
    check_checkpoint_format,
)
from distro_optim.coordinator.solana.finding import find_deployment
from distro_optim.coordinator.solana.operating import Operator
from distro_optim.coordinator.solana.rpc import RpcClient
from distro_optim.coordinator.solana_options import SolanaOptions
from distro_optim.errors import CoordinatorLinkError, ProtocolError
from distro_optim.operate.changing import ChangeOptions, change
from distro_optim.testing.coordinator import dummy_run, training, until_true
from distro_optim.testing.solana.ledger import Account
from solana.solana_arena import QUICK, SolanaArena, in_arena, wallet

pytestmark = pytest.mark.waiting

NOW = 1_796_000_000  # 2026-11-30
NOW_SLOT = 400_000_000
DAY = 86_400
UPLOADED = Hub(HubRepo("me/model", "main"))


def deployed(slot: int | None, unix_timestamp: int | None = None) -> Deployment:
    return Deployment(False, slot, unix_timestamp, NOW_SLOT, NOW)


def slot_of(unix_timestamp: int, slot_seconds: float = 0.4) -> int:
    return NOW_SLOT - int((NOW - unix_timestamp) / slot_seconds)


@pytest.mark.parametrize(
    "deployment",
    [
        Deployment(is_built_in=True),
        deployed(7, FORMAT_SINCE),
        deployed(slot_of(NOW - 90 * DAY)),
        deployed(NOW_SLOT + 5),  # of a node that is ahead of the clock that we read
    ],
)
def test_a_program_of_after_the_change_gets_the_present_form(deployment: Deployment) -> None:
    check_checkpoint_format("4SHu", deployment)


@pytest.mark.parametrize("slot_seconds", [0.36, 0.4, 0.7])
def test_whatever_slots_last_a_program_of_before_is_never_taken_for_a_new_one(slot_seconds: float) -> None:
    with pytest.raises(OldProgramError):
        check_checkpoint_format("4SHu", deployed(slot_of(FORMAT_SINCE - 1, slot_seconds)))


def test_the_refusal_says_what_is_known_and_what_to_do() -> None:
    with pytest.raises(OldProgramError) as caught:
        check_checkpoint_format("4SHu", deployed(77, FORMAT_SINCE - 1))
    assert str(caught.value) == (
        "the checkpoint was not sent: the program 4SHu was deployed before 2026-02-20, in slot 77, when checkpoints "
        "had another form, and would take this one for another repository without any error: deploy a newer build, or "
        "pause the run and set the model with configure"
    )
    for deployment, reason in [
        (deployed(slot_of(FORMAT_SINCE + DAY)), "was deployed around 2026-02-20, in slot"),
        (deployed(None), "does not tell when it was deployed"),
    ]:
        with pytest.raises(OldProgramError, match=f"{reason}.*send it with --unchecked-format"):
            check_checkpoint_format("4SHu", deployment)


class Days(SolanaArena):
    """Today, with a program that was deployed on a day of the test's choice."""

    def __init__(self) -> None:
        run = dummy_run()
        super().__init__(replace(run, model=replace(run.model, checkpoint=Hub(HubRepo("a/b")))))
        self.program = self.validator.programs.coordinator
        self.rpc = RpcClient(["http://unused"], retrying=QUICK)

    async def begin(self) -> None:
        await training(self)
        self.validator.advance(NOW - self.validator.clock.unix_timestamp)
        self.rpc = RpcClient([self.server.url], retrying=QUICK)

    def deploy(self, unix_timestamp: int) -> None:
        clock = self.validator.clock
        self.validator.deployed(self.program, clock.slot - int((clock.unix_timestamp - unix_timestamp) * 2.5))

    @property
    def operator(self) -> Operator:
        return Operator(self.rpc, self.validator.programs, wallet(1), "dummy")


def test_the_day_is_read_from_the_cluster_and_estimated_where_no_node_remembers_it() -> None:
    async def check(arena: Days) -> None:
        await arena.begin()
        assert (await find_deployment(arena.rpc, arena.program)).is_built_in
        arena.deploy(FORMAT_SINCE + 10)
        known = await find_deployment(arena.rpc, arena.program)
        assert known.unix_timestamp == pytest.approx(FORMAT_SINCE + 10, abs=1)
        arena.server.methods.forgets_blocks = True
        estimated = await find_deployment(arena.rpc, arena.program)
        assert estimated.unix_timestamp is None
        bounds = estimated.bounds()
        assert bounds is not None
        assert bounds[0] < FORMAT_SINCE + 10 < bounds[1]
        assert await find_deployment(arena.rpc, arena.validator.programs.treasurer) == Deployment(is_built_in=True)
        # Of a loader whose programs never change, and with accounts that hold something else.
        accounts, key = arena.validator.accounts, str(arena.program)
        with pytest.raises(CoordinatorLinkError, match="there is no program"):
            await find_deployment(arena.rpc, wallet(4711).pubkey())
        before = accounts[key]
        accounts[key] = replace(before, data=b"")
        with pytest.raises(ProtocolError, match="no program that can be deployed again"):
            await find_deployment(arena.rpc, arena.program)
        accounts[key] = Account(1, b"", "BPFLoader2111111111111111111111111111111111", True)
        assert await find_deployment(arena.rpc, arena.program) == Deployment()
        await arena.rpc.close()

    arena = Days()
    in_arena(lambda _: check(arena), arena)


def test_an_operator_is_told_before_anything_is_paid_and_may_insist(tmp_path: Path) -> None:
    async def check(arena: Days) -> None:
        await arena.begin()
        arena.deploy(FORMAT_SINCE - DAY)
        with pytest.raises(OldProgramError, match="was deployed before 2026-02-20"):
            await arena.operator.checkpoint(UPLOADED)
        key = tmp_path / "wallet.json"
        key.write_text(str(list(bytes(wallet(1)))))
        key.chmod(0o600)
        asked = ChangeOptions(
            action="checkpoint",
            run_id="dummy",
            options=SolanaOptions(wallet=key, rpc=[arena.server.url]),
            repo="me/model",
            send=True,
            unchecked_format=True,
        )
        assert "say that the model is in me/model" in (await change(asked))[0]
        assert arena.state.model.checkpoint == Hub(HubRepo("me/model"))
        arena.deploy(FORMAT_SINCE + DAY)
        (step,) = await arena.operator.checkpoint(UPLOADED)
        await arena.operator.send([step])
        assert arena.state.model.checkpoint == UPLOADED
        await arena.rpc.close()

    arena = Days()
    in_arena(lambda _: check(arena), arena)


def test_a_client_keeps_a_checkpoint_to_itself_until_the_program_is_newer(caplog: pytest.LogCaptureFixture) -> None:
    async def check(arena: Days) -> None:
        await arena.begin()
        arena.deploy(FORMAT_SINCE - DAY)
        client, sent = arena.clients[0], arena.server.requests.get("sendTransaction", 0)
        with caplog.at_level(logging.WARNING):
            await client.send(CheckpointMessage(UPLOADED))
            await until_true(lambda: "the checkpoint was not sent" in caplog.text)
        assert arena.server.requests.get("sendTransaction", 0) == sent
        assert arena.state.model.checkpoint == Hub(HubRepo("a/b"))
        arena.deploy(FORMAT_SINCE + DAY)
        await client.send(CheckpointMessage(UPLOADED))
        await until_true(lambda: arena.state.model.checkpoint == UPLOADED)
        await arena.rpc.close()

    arena = Days()
    in_arena(lambda _: check(arena), arena)
