"""An ordinary Lightning script with ``PsycheStrategy(run="solana:...")`` trains in a run on a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from solders.pubkey import Pubkey

from distro_optim import PsycheStrategy, SolanaOptions
from distro_optim.coordinator.solana.instructions import RunInstructions
from distro_optim.coordinator.solana.programs import EVERYBODY
from distro_optim.coordinator.types import NodeIdentity, RunState
from distro_optim.testing import DUMMY_CONFIG, Validator, dummy_run
from distro_optim.testing.solana.transactions import Transaction
from frameworks.lightning_runs import QUIET, load, loader, make_module, make_trainer
from optimizer.models import all_same_bits, copies
from solana.cluster import Cluster
from solana.solana_arena import OPERATOR, RUN, SOL, wallet

pytestmark = [pytest.mark.waiting, *QUIET]

STEPS = 2
ALONE = replace(
    DUMMY_CONFIG,
    init_min_clients=3,
    min_clients=1,
    total_steps=STEPS + 1,
    warmup_time=6,
    max_round_train_time=6,  # the strangers report nothing
    round_witness_time=1,
    cooldown_time=1,
    waiting_for_members_extra_time=1,
)


@pytest.fixture
def pl() -> ModuleType:
    return load("lightning.pytorch")


def strangers(validator: Validator, run: RunInstructions) -> list[NodeIdentity]:
    """Two wallets that have joined under a peer key that is none, and never do anything."""
    no_key = next(key for number in range(256) if not Pubkey.from_bytes(key := bytes([number] * 32)).is_on_curve())
    found = [NodeIdentity(bytes(wallet(number).pubkey()), no_key) for number in (71, 72)]
    authorization = validator.programs.authorization(OPERATOR.pubkey(), EVERYBODY)
    for stranger in found:
        signer = Pubkey.from_bytes(stranger.signer)
        validator.fund(signer, SOL)
        outcome = validator.process(Transaction(signer, [run.join(stranger, authorization)]))
        assert outcome.error is None
    return found


def test_a_script_trains_to_the_end_beside_clients_that_nobody_can_reach(pl: ModuleType, tmp_path: Path) -> None:
    validator = Validator()
    key, mine = OPERATOR.pubkey(), wallet(70)
    validator.host(dummy_run("script", ALONE), RUN.pubkey(), main_authority=key, join_authority=key)
    others = strangers(validator, RunInstructions(validator.programs, "script", RUN.pubkey()))
    validator.fund(mine.pubkey(), SOL)
    file = tmp_path / "wallet.json"
    file.write_text(json.dumps(list(bytes(mine))))
    file.chmod(0o600)
    module = make_module(pl)
    before = copies(module.parameters())
    with Cluster(validator) as cluster:
        options = SolanaOptions(wallet=file, rpc=[cluster.server.url])
        strategy = PsycheStrategy(run="solana:script", solana=options, relay="none", bind_addr="127.0.0.1:0")
        trainer = make_trainer(pl, tmp_path, strategy, max_epochs=-1)
        trainer.fit(module, loader())
        state = cluster.do(lambda: validator.run("script").state)
    assert state.coordinator.run_state is RunState.FINISHED
    members = [client.id.signer for client in state.clients_state.clients]
    assert members == [*(other.signer for other in others), bytes(mine.pubkey())]
    assert trainer.global_step == STEPS
    assert not all_same_bits(before, copies(module.parameters()))
    paid = SOL - validator.balance(mine.pubkey())
    assert paid >= (1 + 1 + STEPS) * 5000  # a join, the report of the warm-up, those of the rounds
