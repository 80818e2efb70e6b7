"""A Lightning script and ``distro-optim join`` train a language model in one run on a cluster, see all of it or not."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from solders.keypair import Keypair
from typing_extensions import override

from client.processes import DISTRO, TINY_LLAMA, write_state, write_tokens
from distro_optim import PsycheStrategy, SolanaOptions
from distro_optim.client.joining import join
from distro_optim.client.options import JoinOptions
from distro_optim.coordinator.model import LLM, LocalData
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.solana.instructions import RunInstructions
from distro_optim.coordinator.types import BatchId, RunState
from distro_optim.data.opening import open_token_data
from distro_optim.data.provider import TokenProvider, TokenSequence
from distro_optim.models.causal_lm import CausalLM
from distro_optim.testing import Validator
from distro_optim.testing.solana.transactions import Transaction
from frameworks.lightning_runs import QUIET, load
from solana.cluster import Cluster
from solana.solana_arena import ANYBODY, OPERATOR, RUN, SOL, wallet

pytestmark = [
    pytest.mark.waiting,
    pytest.mark.slow,
    *QUIET,
    pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`"),
]

BATCH = 4


@pytest.fixture
def pl() -> ModuleType:
    return load("lightning.pytorch")


class Watched(TokenProvider):
    """Remembers what it is asked for."""

    def __init__(self, inner: TokenProvider) -> None:
        super().__init__(inner.seq_len)
        self.inner = inner
        self.asked: list[int] = []

    @property
    @override
    def num_sequences(self) -> int | None:
        return self.inner.num_sequences

    @override
    def _read(self, batch: BatchId) -> list[TokenSequence]:
        self.asked += range(batch.start, batch.end + 1)
        return self.inner.get_samples(batch)


class HastyChain:
    """Whoever ticks is faster than the nodes tell: some phases are over before any client sees them."""

    def __init__(self, cluster: Cluster, unseen: Collection[RunState]) -> None:
        self._cluster, self._unseen = cluster, unseen
        self._tick = RunInstructions(cluster.validator.programs, "proof", RUN.pubkey()).tick(ANYBODY.pubkey())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hurry, name="hasty chain")
        self.happened: set[RunState] = set()
        self.told: set[RunState] = set()

    def __enter__(self) -> HastyChain:
        self._cluster.validator.fund(ANYBODY.pubkey(), SOL)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _hurry(self) -> None:
        while not self._stop.wait(0.1):
            self._cluster.do(self._go_on)

    def _go_on(self) -> None:
        validator = self._cluster.validator
        validator.process(Transaction(ANYBODY.pubkey(), [self._tick]))
        state = validator.run("proof").state.coordinator
        self.happened.add(state.run_state)
        # The model is loaded in the first warm-up.
        if state.run_state not in self._unseen or (state.run_state is RunState.WARMUP and not state.progress.epoch):
            self.told.add(state.run_state)
            self._cluster.server.end_slot()


S = RunState


@pytest.mark.parametrize(
    "unseen", [set(), {S.ROUND_WITNESS, S.COOLDOWN, S.WARMUP}], ids=["all-phases-seen", "some-phases-unseen"]
)
def test_both_train_the_samples_that_the_run_assigns_and_have_equal_weights(
    pl: ModuleType, tmp_path: Path, unseen: set[RunState]
) -> None:
    from distro_optim import PsycheCausalLM, TokenDataModule

    data, vocab_size = write_tokens(tmp_path, seq_len=32)
    CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama").save_pretrained(tmp_path / "llama")
    state = read_state_file(
        write_state(
            tmp_path / "state.toml",
            total_steps=6,
            epoch_time=12 if unseen else 600,
            warmup_time=60,
            max_round_train_time=60,
            checkpoint='{ Hub = { repo_id = "somebody/tiny-llama" } }',
            data_location='{ Local = "wherever" }',
            optimizer=DISTRO,
        )
    )
    assert isinstance(state.model, LLM)
    validator, key = Validator(), OPERATOR.pubkey()
    validator.host(state, RUN.pubkey(), main_authority=key, join_authority=key)
    for keys in (wallet(91), wallet(92)):
        validator.fund(keys.pubkey(), SOL)  # before the cluster's first slot: later it is unseen until a slot ends

    def options(name: str, keys: Keypair) -> SolanaOptions:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(list(bytes(keys))))
        file.chmod(0o600)
        return SolanaOptions(wallet=file, rpc=[cluster.server.url])

    failures: list[BaseException] = []

    def join_beside(asked: JoinOptions) -> None:
        try:
            join(asked)
        except BaseException as error:
            failures.append(error)
            finished = replace(state, run_state=RunState.FINISHED)  # the script would wait for a second client for ever
            cluster.do(lambda: validator.host(finished, RUN.pubkey(), main_authority=key, join_authority=key))

    with Cluster(validator, slot_seconds=3600 if unseen else None) as cluster, ExitStack() as stack:
        chain = stack.enter_context(HastyChain(cluster, unseen)) if unseen else None
        asked = JoinOptions(
            run="solana:proof",
            solana=options("join", wallet(91)),
            relay="none",
            discovery="local",
            device="cpu",
            model=tmp_path / "llama",
            data=data,
            checkpoint_dir=tmp_path / "joined",
            logs="none",
        )
        beside = threading.Thread(target=join_beside, args=(asked,), name="distro-optim join", daemon=True)
        beside.start()
        strategy = PsycheStrategy(
            run="solana:proof", solana=options("script", wallet(92)), relay="none", discovery="local"
        )
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = PsycheCausalLM.from_run(state.model, tmp_path / "llama")
        tokens = Watched(open_token_data(LocalData(str(data)), state.model.max_seq_len))
        try:
            trainer.fit(module, TokenDataModule(lambda: tokens))
            beside.join(120)
        finally:
            assert not failures  # why the script cannot go on, if it cannot
        assert not beside.is_alive()
        end = cluster.do(lambda: validator.run("proof").state.coordinator)
        assert end.run_state is RunState.FINISHED

    view = strategy.view()
    assert view is not None
    assert view.fees is not None
    assert view.fees >= SOL - validator.balance(wallet(92).pubkey()) >= 5000 * state.config.total_steps / 2
    if chain is not None:
        assert unseen <= chain.happened
        assert end.progress.epoch >= 1
        assert chain.told.isdisjoint(unseen - {S.WARMUP})
    theirs = load_file(max(tmp_path.glob("joined/*/model.safetensors")))
    before = load_file(tmp_path / "llama" / "model.safetensors")
    ours = module.state_dict()
    assert any(not value.equal(before[name]) for name, value in theirs.items())
    assert all(value.equal(ours[name]) for name, value in theirs.items())
    assert not set(tokens.asked) - {0, (tokens.num_sequences or 1) - 1} - set(range(BATCH * state.config.total_steps))
    assert len(set(tokens.asked)) > BATCH / 2
