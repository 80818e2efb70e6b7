"""``distro-optim run create`` to ``close``: a run's whole life by the commands, each planned before it is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.processes import DISTRO, write_state
from distro_optim.cli import main
from distro_optim.coordinator.solana.programs import EVERYBODY
from distro_optim.coordinator.solana.small_accounts import TREASURY_BYTES
from distro_optim.coordinator.types import RunState
from distro_optim.testing import Validator, dummy_run
from distro_optim.testing.solana.ledger import Account, rent
from solana.cluster import Cluster
from solana.solana_arena import ANYBODY, OPERATOR, RUN, SOL

pytestmark = pytest.mark.waiting


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    validator = Validator()
    for key in (OPERATOR, ANYBODY):
        validator.fund(key.pubkey(), SOL)
    with Cluster(validator) as made:
        yield made
    assert "cluster" not in [thread.name for thread in threading.enumerate()]


class Command:
    def __init__(self, cluster: Cluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.cluster, self.folder, self._capsys = cluster, folder, capsys

    def __call__(self, action: str, *arguments: str, status: int = 0, keys: object = OPERATOR) -> str:
        wallet = self.folder / "wallet.json"
        wallet.write_text(json.dumps(list(bytes(keys))))  # type: ignore[call-overload]
        wallet.chmod(0o600)
        cluster = ("--rpc", self.cluster.server.url, "--wallet", str(wallet))
        assert main(["run", action, "mine", *arguments, *cluster]) == status
        said = self._capsys.readouterr()
        return said.out if status == 0 else said.err


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
    run("resume", "--yes")
    state = validator.run("mine").state
    assert state.coordinator.run_state is RunState.WAITING_FOR_MEMBERS
    assert state.coordinator.config.total_steps == 10
    assert state.clients_state.future_epoch_rates.earning_rate_total_shared == 1000

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


def test_a_run_with_a_treasury_is_closed_by_nobody(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validator = cluster.validator
    treasury = validator.programs.treasury(5)
    validator.accounts[str(treasury)] = Account(rent(TREASURY_BYTES), b"", str(validator.programs.treasurer))
    key = OPERATOR.pubkey()
    validator.host(dummy_run("mine"), RUN.pubkey(), main_authority=treasury, join_authority=key)
    said = Command(cluster, tmp_path, capsys)("close", "--yes", status=2)
    assert f"the run 'mine' has a treasury, {treasury}, and no program of Psyche's closes such a run" in said
