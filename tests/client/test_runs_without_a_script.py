"""``distro-optim serve`` and ``distro-optim join``: whole runs in which nobody writes a line of Python."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

import pytest
from safetensors.torch import load_file

from client.processes import DISTRO, TINY_LLAMA, Client, Process, Server, wait_for_all, write_state, write_tokens
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.model.checkpoint import CheckpointStore

pytestmark = [pytest.mark.waiting, pytest.mark.slow(15)]


@pytest.fixture
def started() -> Iterator[ExitStack]:
    """Whatever is entered here has ended when the test has."""
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, process: Process) -> None:
    stack.callback(process.end)


def test_four_clients_train_a_llama_while_one_is_killed_and_one_comes_late(tmp_path: Path, started: ExitStack) -> None:
    data, vocab_size = write_tokens(tmp_path, seq_len=32)
    CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama").save_pretrained(tmp_path / "tiny-llama")
    state = write_state(
        tmp_path / "state.toml",
        total_steps=24,
        epoch_time=8,
        warmup_time=7,
        max_round_train_time=7,
        init_min_clients=3,
        checkpoint='{ Hub = { repo_id = "somebody/tiny-llama" } }',
        data_location='{ Local = "wherever" }',
        optimizer=DISTRO,
    )
    server = Server(tmp_path, state)
    start(started, server)

    def client(name: str, *model: str) -> Client:
        own = ("--data", str(data), "--checkpoint-dir", str(tmp_path / f"{name}-checkpoints"))
        made = Client(tmp_path, name, server.ticket, *own, *model)
        start(started, made)
        return made

    clients = [client(name, "--model", str(tmp_path / "tiny-llama")) for name in ("one", "two", "three")]
    server.until(lambda: (server.latest("step") or 0) >= 2, "step 2")
    late = client("late")  # gets the model from the others
    server.until(lambda: (server.latest("step") or 0) >= 4, "step 4")
    victim = clients.pop()
    victim.send(signal.SIGKILL)
    clients.append(late)
    wait_for_all(clients)
    assert server.wait(60) == 0

    assert max(record.get("epoch", 0) for record in clients[0].records()) >= 2  # counted from 0
    trained = [each.latest("rounds_trained") for each in clients]
    assert all(trained), trained
    losses = [[r["loss"] for r in each.records() if r.get("loss")] for each in clients]
    at_first = mean(losses[0][:2] + losses[1][:2])
    assert all(mean(each[-4:]) < at_first - 0.3 for each in losses), losses
    assert any("comes from peers" in record.get("text", "") for record in late.records())
    at_step = [{r["weights_step"]: r["weights"] for r in each.records() if r.get("weights")} for each in clients]
    shared = set.intersection(*map(set, at_step))
    assert shared
    assert min(at_step[-1]) > 1, "the late one began with what others had learned"
    assert all(len({weights[step] for weights in at_step}) == 1 for step in shared)
    assert not any(each.latest("fault") for each in clients)

    saved = [CheckpointStore(each.checkpoints).saved()[-1] for each in clients]
    assert all(path.name.startswith("proof-step") for path in saved)
    assert len({folder.name for folder in saved}) == 1
    weights = [load_file(folder / "model.safetensors") for folder in saved]
    for name, tensor in weights[0].items():
        assert all(tensor.equal(other[name]) for other in weights[1:]), name
    again = CausalLM.from_folder(saved[0], "HfLlama")
    assert again.config.vocab_size == vocab_size


def test_a_run_without_tensors_goes_to_its_end(tmp_path: Path, started: ExitStack) -> None:
    server = Server(tmp_path, write_state(tmp_path / "state.toml"))
    start(started, server)
    clients = [Client(tmp_path, name, server.ticket) for name in ("one", "two")]
    for each in clients:
        start(started, each)
    wait_for_all(clients)
    for each in clients:
        assert each.latest("rounds_trained") >= 5
        assert each.latest("loss") == 1.0
    assert server.wait(60) == 0


def test_ctrl_c_leaves_the_run_within_seconds(tmp_path: Path, started: ExitStack) -> None:
    state = write_state(tmp_path / "state.toml", total_steps=10_000, init_min_clients=1, min_clients=1)
    server = Server(tmp_path, state)
    start(started, server)
    client = Client(tmp_path, "one", server.ticket)
    start(started, client)
    server.until(lambda: (server.latest("step") or 0) >= 2, "step 2")
    began = time.monotonic()
    client.send(signal.SIGINT)
    assert client.wait(30) == 130
    assert time.monotonic() - began < 30  # far from a hang; how fast it is, a benchmark says
    server.until(lambda: any(r.get("event") == "left" for r in server.records()), "departure")
    assert "Traceback" not in client.log.read_text()
