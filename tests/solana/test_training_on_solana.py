"""``distro-optim join solana:...``: a Llama trained in a run on a cluster, with all that happens to a run."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from client.processes import DISTRO, TINY_LLAMA, Process, write_state, write_tokens
from distro_optim.cli import main
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.solana.arguments import RunUpdate
from distro_optim.coordinator.solana.instructions import (
    AuthorizerInstructions,
    RunInstructions,
    TreasurerInstructions,
)
from distro_optim.coordinator.solana.programs import EVERYBODY, associated_token_account, default_treasurer_index
from distro_optim.coordinator.solana.small_accounts import TokenAccount
from distro_optim.coordinator.solana.treasury import RunAuthority
from distro_optim.coordinator.types import ClientState, Coordinator, RunState
from distro_optim.models.causal_lm import CausalLM
from distro_optim.testing import Validator
from distro_optim.testing.solana.ledger import Account, rent
from distro_optim.testing.solana.transactions import Transaction
from solana.cluster import Cluster
from solana.solana_arena import OPERATOR, RUN, SOL, wallet

pytestmark = [pytest.mark.waiting, pytest.mark.slow(90)]

POINTS = 1001
TOKENS = 10 * POINTS
MINT = wallet(3999).pubkey()
FEW_TRANSACTIONS = 2


class TheRun:
    """A run on chain, its operator, and what happened in it."""

    def __init__(self, folder: Path) -> None:
        data, vocab_size = write_tokens(folder, seq_len=32)
        CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama").save_pretrained(folder / "tiny-llama")
        toml = write_state(
            folder / "state.toml",
            total_steps=12,
            epoch_time=8,
            warmup_time=7,
            max_round_train_time=7,
            init_min_clients=3,
            checkpoint='{ Hub = { repo_id = "somebody/tiny-llama" } }',
            data_location='{ Local = "wherever" }',
            optimizer=DISTRO,
        )
        state = read_state_file(toml)
        # More wallets than that can never join.
        config = replace(
            state.config,
            global_batch_size_start=8,
            global_batch_size_end=8,
            waiting_for_members_extra_time=3,  # on a busy machine the fourth asks seconds after the third
        )
        self.folder, self.data = folder, data
        self.validator = Validator()
        self.validator.host(
            replace(state, run_state=RunState.PAUSED, config=config),
            RUN.pubkey(),
            main_authority=OPERATOR.pubkey(),
            join_authority=OPERATOR.pubkey(),
            mint=MINT,
        )
        self.validator.fund(OPERATOR.pubkey(), SOL)
        self.validator.give_tokens(MINT, self.validator.programs.treasury_of(state.run_id), TOKENS)
        programs, index = self.validator.programs, default_treasurer_index(state.run_id)
        run = RunInstructions(programs, state.run_id, RUN.pubkey())
        treasury = TreasurerInstructions(programs, index, MINT, state.run_id, RUN.pubkey())
        self.operator = RunAuthority(OPERATOR.pubkey(), run, treasury)
        everybody = AuthorizerInstructions(self.validator.programs, OPERATOR.pubkey(), EVERYBODY)
        self.process(everybody.set_active(False))
        self.process(*self.operator.change(RunUpdate(epoch_earning_rate_total_shared=POINTS)))
        self.points: Counter[bytes] = Counter()
        """By hand, from the states before and after each epoch's end."""
        self.ends: list[tuple[RunState, RunState]] = []
        self.poor: Pubkey | None = None
        """Whose wallet pays for few more transactions as soon as it has earned something."""
        self._before = self.state
        self.validator.listeners.append(self._happened)
        self.cluster = Cluster(self.validator)
        self.clients: dict[str, Process] = {}

    @property
    def state(self) -> Coordinator:
        return self.validator.run("proof").state.coordinator

    def process(self, *instructions: object) -> None:
        outcome = self.validator.process(Transaction(OPERATOR.pubkey(), instructions))  # type: ignore[arg-type]
        assert outcome.error is None, outcome.logs

    def authorize(self, key: Pubkey) -> None:
        mine = AuthorizerInstructions(self.validator.programs, OPERATOR.pubkey(), key)
        self.process(mine.create(OPERATOR.pubkey()), mine.set_active(True))

    def pause(self, paused: bool) -> None:
        self.cluster.do(lambda: self.process(*self.operator.change(RunUpdate(paused=paused))))

    def claim(self, name: str) -> int:
        """The status of the command with which this wallet claims its points."""
        wallet_file = str(self.folder / f"{name}.json")
        asked = ["run", "claim", "proof", "--rpc", self.cluster.server.url, "--wallet", wallet_file, "--yes"]
        return main(asked)

    def tokens(self, key: Pubkey) -> int:
        account = self.validator.accounts.get(str(associated_token_account(key, MINT)))
        return 0 if account is None else TokenAccount.read(account.data).amount

    def _happened(self, changed: frozenset[str]) -> None:
        if str(RUN.pubkey()) not in changed:
            return
        before, after = self._before, self.state
        self._before = after
        waiting = (RunState.WAITING_FOR_MEMBERS, RunState.FINISHED, RunState.PAUSED)
        if before.run_state in waiting or after.run_state not in waiting:
            return
        self.ends.append((before.run_state, after.run_state))
        if after.run_state is RunState.PAUSED:
            return
        for client in before.epoch_state.clients:
            if client.state is ClientState.HEALTHY:
                self.points[client.id.signer] += POINTS // len(before.epoch_state.clients)
        if self.poor is not None and self.points[bytes(self.poor)]:
            self.validator.accounts[str(self.poor)] = Account(rent(0) + FEW_TRANSACTIONS * 5000)
            self.poor = None

    def wallet_file(self, name: str, keys: Keypair) -> Path:
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(list(bytes(keys))))
        file.chmod(0o600)
        return file

    def client(self, stack: ExitStack, name: str, keys: Keypair, *arguments: str) -> Process:
        file = self.wallet_file(name, keys)
        made = self.clients[name] = Process(
            self.folder / f"{name}.log",
            *("join", "solana:proof", "--rpc", self.cluster.server.url, "--wallet", str(file)),
            *("--iroh-relay", "none", "--iroh-discovery", "local", "--logs", "json", "--device", "cpu"),
            *("--data", str(self.data), "--no-checkpoints", *arguments),
        )
        stack.callback(made.end)
        return made

    def until(self, done: Callable[[Coordinator], bool], what: str) -> None:
        next(iter(self.clients.values())).until(lambda: self.cluster.do(lambda: done(self.state)), what, 240)


def test_a_llama_is_trained_by_clients_that_come_go_and_cannot_pay(tmp_path: Path) -> None:
    names = ("one", "two", "victim", "poor", "late", "stranger")
    wallets = {name: wallet(3000 + number) for number, name in enumerate(names)}
    run = TheRun(tmp_path)
    for name, keys in wallets.items():
        run.validator.fund(keys.pubkey(), SOL)
        if name != "stranger":
            run.authorize(keys.pubkey())
    run.poor = wallets["poor"].pubkey()
    model = ("--model", str(tmp_path / "tiny-llama"))
    with ExitStack() as stack:
        stack.enter_context(run.cluster)
        stranger = run.client(stack, "stranger", wallets["stranger"], *model)
        for name in names[:4]:
            run.client(stack, name, wallets[name], *model)
        assert stranger.wait() == 1
        run.clients.pop("stranger")
        assert "may not join the run 'proof': there is no authorization for it" in stranger.log.read_text()
        assert run.validator.balance(wallets["stranger"].pubkey()) == SOL

        first = [client.log for client in run.clients.values()]
        run.until(
            lambda _: all("we join it as soon as" in log.read_text() for log in first), "the four of the first epoch"
        )
        run.pause(False)
        run.until(lambda state: state.progress.step >= 2, "step 2")
        run.client(stack, "late", wallets["late"])
        late = bytes(wallets["late"].pubkey())
        run.until(lambda state: late in [c.id.signer for c in state.epoch_state.clients], "an epoch with the late one")
        run.clients.pop("victim").send(signal.SIGKILL)
        run.pause(True)
        run.until(lambda state: state.run_state is RunState.PAUSED, "the pause")
        run.pause(False)
        poor = run.clients.pop("poor")
        assert poor.wait() == 1
        assert "money has run out: the wallet" in poor.log.read_text()
        assert run.validator.balance(wallets["poor"].pubkey()) == rent(0)
        trained = [run.clients[name] for name in ("one", "two", "late")]
        assert [client.wait(240) for client in trained] == [0, 0, 0]

        account = run.cluster.do(lambda: run.validator.run("proof"))
        assert account.state.coordinator.run_state is RunState.FINISHED
        assert len(run.ends) >= 3
        assert any(after is RunState.PAUSED for _, after in run.ends)
        earned = {client.id.signer: client.earned for client in account.state.clients_state.clients}
        assert earned == {signer: run.points[signer] for signer in earned}
        assert earned[late] > 0

        claimed = {name: wallets[name].pubkey() for name in ("one", "two", "victim", "late")}
        assert [run.claim(name) for name in claimed] == [0, 0, 0, 0]
        assert run.points[bytes(wallets["poor"].pubkey())] > 0
        assert run.claim("poor") == 2  # they stay, until somebody pays the fee
        assert {name: run.tokens(key) for name, key in claimed.items()} == {
            name: run.points[bytes(key)] for name, key in claimed.items()
        }
        left = TOKENS - sum(run.points[bytes(key)] for key in claimed.values())
        assert run.tokens(run.validator.programs.treasury_of("proof")) == left
        assert run.claim("one") == 0  # nothing is left
        assert run.tokens(claimed["one"]) == run.points[bytes(claimed["one"])]

    by_step = [{r["weights_step"]: r["weights"] for r in c.records() if r.get("weights")} for c in trained]
    shared = set.intersection(*map(set, by_step))
    assert shared
    assert all(len({weights[step] for weights in by_step}) == 1 for step in shared)
    last = max(by_step[0])
    assert all(max(weights) == last for weights in by_step)
