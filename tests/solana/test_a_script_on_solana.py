"""An ordinary Lightning script with ``PsycheStrategy(run="solana:...")`` trains in a run on a cluster."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from solders.pubkey import Pubkey

import warm_python
from client.processes import DISTRO, TINY_LLAMA, write_state, write_tokens
from distro_optim import PsycheStrategy, SolanaOptions
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.solana.instructions import RunInstructions
from distro_optim.coordinator.solana.programs import EVERYBODY
from distro_optim.coordinator.types import NodeIdentity, RunState
from distro_optim.models.causal_lm import CausalLM
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


@pytest.mark.slow(15)
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


SCRIPT = """
import sys
from lightning.pytorch import Trainer
from distro_optim import PsycheCausalLM, PsycheStrategy, SolanaOptions, TokenDataModule, open_token_data
from distro_optim.coordinator.model import LocalData
from distro_optim.coordinator.server.store import read_state_file

state, model, data, wallet, rpc, out = sys.argv[1:]
run = read_state_file(state)
solana = SolanaOptions(wallet=wallet, rpc=[rpc], max_fees=1_000_000)
strategy = PsycheStrategy(run=f"solana:{run.run_id}", solana=solana, relay="none", discovery="local")
trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=-1, logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
module = PsycheCausalLM.from_run(run.model, model)
trainer.fit(module, TokenDataModule(lambda: open_token_data(LocalData(data), run.model.max_seq_len)))
module.save_pretrained(out)
"""


@pytest.mark.slow(15)
def test_two_scripts_train_a_llama_and_have_equal_weights(tmp_path: Path) -> None:
    data, vocab_size = write_tokens(tmp_path, seq_len=32)
    model = CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama")
    model.save_pretrained(tmp_path / "tiny-llama")
    place = '{ Hub = { repo_id = "somebody/tiny-llama" } }'
    toml = write_state(
        tmp_path / "state.toml",
        total_steps=6,
        warmup_time=30,
        max_round_train_time=30,
        checkpoint=place,
        optimizer=DISTRO,
    )
    validator, key = Validator(), OPERATOR.pubkey()
    validator.host(read_state_file(toml), RUN.pubkey(), main_authority=key, join_authority=key)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with Cluster(validator) as cluster, ExitStack() as stack:
        started = []
        for name, keys in (("one", wallet(81)), ("two", wallet(82))):
            cluster.do(functools.partial(validator.fund, keys.pubkey(), SOL))
            file = tmp_path / f"{name}.json"
            file.write_text(json.dumps(list(bytes(keys))))
            file.chmod(0o600)
            given = (toml, tmp_path / "tiny-llama", data, file, cluster.server.url, tmp_path / name)
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            command = [sys.executable, "-c", SCRIPT, *map(str, given)]
            process = warm_python.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        for name, process in zip(("one", "two"), started, strict=True):
            assert process.wait(240) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
        assert cluster.do(lambda: validator.run("proof").state.coordinator.run_state) is RunState.FINISHED
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    before = dict(model.named_parameters())
    assert any(not tensor.equal(before[name]) for name, tensor in weights[0].items())
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
