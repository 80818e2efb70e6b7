"""``distro-optim serve`` and ``distro-optim join``: whole runs in which nobody writes a line of Python."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from client.processes import DISTRO, TINY_LLAMA, Client, Process, Server, write_state
from distro_optim.models.causal_lm import CausalLM

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def started() -> Iterator[ExitStack]:
    """Whatever is entered here has ended when the test has."""
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, process: Process) -> None:
    stack.callback(process.end)


def test_four_clients_train_a_llama_while_one_is_killed_and_one_comes_late(tmp_path: Path, started: ExitStack) -> None:
    CausalLM(TINY_LLAMA, "HfLlama").save_pretrained(tmp_path / "tiny-llama")
    (tmp_path / "data").mkdir()
    tokens = np.random.default_rng(1).zipf(1.3, 40_000).clip(max=TINY_LLAMA["vocab_size"] - 1)
    tokens.astype("<u2").tofile(tmp_path / "data" / "text.bin")
    (tmp_path / "data.toml").write_text(
        f'dir = "data"\nseq_len = 32\ntoken_size = "TwoBytes"\nshuffle_seed = [{", ".join(["7"] * 32)}]\n'
    )
    state = write_state(
        tmp_path / "state.toml",
        total_steps=22,
        init_min_clients=3,
        checkpoint='{ Hub = { repo_id = "somebody/tiny-llama" } }',
        data_location=f"{{ Local = '{tmp_path / 'data.toml'}' }}",
        optimizer=DISTRO,
    )
    server = Server(tmp_path, state)
    start(started, server)

    def client(name: str) -> Client:
        folders = ("--model", str(tmp_path / "tiny-llama"), "--checkpoint-dir", str(tmp_path / f"{name}-checkpoints"))
        made = Client(tmp_path, name, server.ticket, *folders)
        start(started, made)
        return made

    clients = [client(name) for name in ("one", "two", "three")]
    server.until(lambda: (server.latest("step") or 0) >= 4, "step 4")
    victim = clients.pop()
    victim.send(signal.SIGKILL)
    clients.append(client("late"))
    for each in clients:
        assert each.wait(200) == 0, each.log.read_text()[-3000:]
    assert server.wait(60) == 0

    assert max(record.get("epoch", 0) for record in clients[0].records()) >= 2  # counted from 0
    trained = [each.latest("rounds_trained") for each in clients]
    assert all(trained), trained
    assert clients[-1].latest("loss") < 9.5  # it begins at 11: the late one learns as well
    at_step = [{r["weights_step"]: r["weights"] for r in each.records() if r.get("weights")} for each in clients]
    shared = set(at_step[0]) & set(at_step[1])
    assert shared
    assert all(at_step[0][step] == at_step[1][step] for step in shared)
    assert not any(each.latest("fault") for each in clients)

    saved = [sorted(each.checkpoints.glob("step-*"))[-1] for each in clients]
    assert len({folder.name for folder in saved}) == 1
    weights = [load_file(folder / "model.safetensors") for folder in saved]
    for name, tensor in weights[0].items():
        assert all(tensor.equal(other[name]) for other in weights[1:]), name
    again = CausalLM.from_folder(saved[0], "HfLlama")
    assert again.config.vocab_size == TINY_LLAMA["vocab_size"]


def test_a_run_without_tensors_goes_to_its_end(tmp_path: Path, started: ExitStack) -> None:
    server = Server(tmp_path, write_state(tmp_path / "state.toml"))
    start(started, server)
    clients = [Client(tmp_path, name, server.ticket) for name in ("one", "two")]
    for each in clients:
        start(started, each)
    for each in clients:
        assert each.wait() == 0, each.log.read_text()[-3000:]
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
