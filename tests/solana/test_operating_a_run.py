"""``distro-optim run create`` to ``close``: a run's whole life by the commands, each planned before it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from solders.pubkey import Pubkey

from client.processes import DISTRO, write_state
from distro_optim.coordinator.formats.account import ACCOUNT_SIZE, ClientsEpochRates
from distro_optim.coordinator.model import Gcs, GcsRepo, Hub, HubRepo
from distro_optim.coordinator.solana.operating import Operator
from distro_optim.coordinator.solana.programs import EVERYBODY
from distro_optim.coordinator.solana.rpc import RpcClient
from distro_optim.coordinator.solana.small_accounts import INSTANCE_BYTES, Authorization, read_small_account
from distro_optim.coordinator.types import RunState
from distro_optim.errors import ConfigurationError
from distro_optim.testing import Validator, dummy_run
from distro_optim.testing.coordinator import training
from distro_optim.testing.solana.ledger import rent
from solana.cluster import Cluster, Command
from solana.solana_arena import ANYBODY, OPERATOR, QUICK, SOL, SolanaArena, in_arena, wallet

pytestmark = pytest.mark.waiting


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    validator = Validator()
    for key in (OPERATOR, ANYBODY):
        validator.fund(key.pubkey(), SOL)
    with Cluster(validator) as made:
        yield made
    assert "cluster" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.slow
def test_the_life_of_a_run(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Command(cluster, tmp_path, capsys)
    validator = cluster.validator

    planned = run("create")
    assert "costs 0.00001 SOL, and 0.83233944 SOL stay in it" in planned
    assert "nothing was sent" in planned
    assert validator.balance(OPERATOR.pubkey()) == SOL
    assert "done, for 0.00001 SOL" in run("create", "--yes")
    assert "there is a run 'mine' already" in run("create", "--yes", status=2)

    toml = write_state(tmp_path / "state.toml", checkpoint='{ Hub = { repo_id = "a/b" } }', optimizer=DISTRO)
    lines = toml.read_text().split("\n[config]")
    toml.write_text("[config]" + lines[1])
    assert "the operator of the run 'mine' is" in run("configure", str(toml), "--yes", status=2, keys=ANYBODY)
    run("configure", str(toml), "--yes")
    run("rates", "1000", "--yes")
    assert "it is so already" in run("rates", "1000", "--slashing", "0", "--yes")
    said = run("rates", "1000", "--slashing", "10", "--yes")
    assert said.startswith("10 points against each client that is ejected: costs 0.000005 SOL")
    for given, name in ((("-1",), "points"), (("1", "--slashing", str(1 << 64)), "slashing")):
        assert f"{name} takes a number of 64 bits" in run("rates", *given, status=2)
    run("resume", "--yes")
    state = validator.run("mine").state
    assert state.coordinator.run_state is RunState.WAITING_FOR_MEMBERS
    assert state.coordinator.config.total_steps == 10
    assert state.clients_state.future_epoch_rates == ClientsEpochRates(1000, 10)

    run("authorize", "everybody", "--yes")
    assert "it is so already" in run("authorize", "everybody", "--yes")
    assert str(validator.programs.authorization(OPERATOR.pubkey(), EVERYBODY)) in validator.accounts
    assert "only" in run("authorize", "everybody", "--yes", status=2, keys=ANYBODY)
    assert "was never authorized" in run("authorize", str(ANYBODY.pubkey()), "--revoke", status=2)
    run("tick", "--yes", keys=ANYBODY)

    assert run("close", "--yes", status=1).count("\n") == 1  # it is not halted
    run("pause", "--yes")
    run("close", "--yes")
    with pytest.raises(KeyError):
        validator.run("mine")
    assert "there is no run 'mine'" in run("pause", status=1)


def test_what_must_stay_in_the_wallet_is_counted(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Command(cluster, tmp_path, capsys)
    validator, poor = cluster.validator, wallet(77)
    needed = rent(ACCOUNT_SIZE) + rent(INSTANCE_BYTES) + 10_000 + rent(0)
    validator.fund(poor.pubkey(), needed - 1)
    assert "must stay: 0.000000001 SOL are missing" in run("create", keys=poor)
    said = run("create", "--yes", keys=poor, status=2)
    assert "0.83324032 SOL are needed, with what must stay in it: put 0.000000001 SOL into it" in said
    assert validator.balance(poor.pubkey()) == needed - 1
    validator.fund(poor.pubkey(), 1)
    run("create", "--yes", keys=poor)
    assert validator.balance(poor.pubkey()) == rent(0)


def test_an_authorization_is_shared_with_many_wallets_and_removed(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Command(cluster, tmp_path, capsys)
    validator = cluster.validator
    run("create", "--yes")
    master = str(ANYBODY.pubkey())
    said = run("delegate", str(wallet(1).pubkey()), keys=ANYBODY, status=2)
    assert f"{master} has no authorization to share: have {OPERATOR.pubkey()} authorize it" in said
    run("authorize", master, "--yes")

    def delegates() -> list[bytes]:
        address = validator.programs.authorization(OPERATOR.pubkey(), ANYBODY.pubkey())
        return list(read_small_account(Authorization, validator.accounts[str(address)].data).delegates)

    nodes = [str(wallet(100 + number).pubkey()) for number in range(40)]
    before = validator.balance(ANYBODY.pubkey())
    assert "in all 0.0089188 SOL" in run("delegate", *nodes, nodes[0], keys=ANYBODY)
    run("delegate", *nodes, "--yes", keys=ANYBODY)
    assert [str(Pubkey.from_bytes(key)) for key in delegates()] == nodes
    assert before - validator.balance(ANYBODY.pubkey()) == 40 * 222_720 + 2 * 5000
    assert "it is so already" in run("delegate", nodes[3], "--yes", keys=ANYBODY)
    assert "name the wallets to let in, or --clear" in run("delegate", keys=ANYBODY, status=2)
    said = run("authorize", master, "--close", "--yes", status=1)
    assert "30 days after its grantor last changed it" in said

    run("delegate", nodes[1], "--clear", "--yes", keys=ANYBODY)
    assert [str(Pubkey.from_bytes(key)) for key in delegates()] == nodes[1:2]
    run("delegate", "--clear", "--yes", keys=ANYBODY)
    assert delegates() == []
    assert before - validator.balance(ANYBODY.pubkey()) == 4 * 5000  # the deposits came back
    assert (
        f"remove the authorization of {master} in all runs that {OPERATOR.pubkey()} lets wallets into; 0.00164256 SOL"
        in run("authorize", master, "--close", "--yes")
    )
    assert "was never authorized" in run("authorize", master, "--close", status=2)


def test_where_the_model_is_says_a_client_of_the_epoch() -> None:
    async def check(arena: SolanaArena) -> None:
        await training(arena)
        rpc = RpcClient([arena.server.url], retrying=QUICK)
        mine = Operator(rpc, arena.validator.programs, wallet(1), "dummy")
        (step,) = await mine.checkpoint(Hub(HubRepo("me/model", "main")))
        assert str(step).startswith("say that the model is in me/model at main: costs 0.000005 SOL")
        await mine.send([step])
        assert arena.state.model.checkpoint == Hub(HubRepo("me/model", "main"))
        assert await mine.checkpoint(Hub(HubRepo("me/model", "main"))) == []
        with pytest.raises(ConfigurationError, match="from the hub, where only another repository of the hub can foll"):
            await mine.checkpoint(Gcs(GcsRepo("bucket", "here")))
        stranger = Operator(rpc, arena.validator.programs, ANYBODY, "dummy")
        with pytest.raises(ConfigurationError, match="only a client of the present epoch says where the model is"):
            await stranger.checkpoint(Hub(HubRepo("me/model")))
        await rpc.close()

    run = dummy_run()
    in_arena(check, SolanaArena(replace(run, model=replace(run.model, checkpoint=Hub(HubRepo("a/b"))))))


def test_a_checkpoint_has_one_place(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Command(cluster, tmp_path, capsys)
    for given in ([], ["--repo", ""]):
        assert "name where the model is: --repo for the hub, or --bucket" in run("checkpoint", *given, status=2)
    assert "name --repo or --bucket, and not both" in run("checkpoint", "--repo", "a/b", "--bucket", "c", status=2)
    assert "a --repo has a --revision" in run("checkpoint", "--repo", "a/b", "--prefix", "c", status=2)
    assert "a --bucket has a --prefix" in run("checkpoint", "--bucket", "a", "--revision", "c", status=2)
    assert "there is no run 'mine'" in run("checkpoint", "--bucket", "c", status=1)
    assert "nothing was said that is to change" in run("configure", status=2)
