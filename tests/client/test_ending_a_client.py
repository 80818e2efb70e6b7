"""Ctrl-C and SIGTERM end a client soon, whatever it is doing, and leave no process behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from client.fake_coordinator import FakeCoordinator, state_payload
from client.processes import DISTRO, TINY_LLAMA, Client, Server, write_state
from distro_optim.coordinator.model import P2P, HubRepo
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.models.causal_lm import CausalLM

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

INTERRUPTED = 130
PATIENCE = 30.0
"""Far from a hang; on a quiet machine it is within five."""


@pytest.fixture
def started() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def is_gone(client: Client) -> bool:
    """Nothing is left of the process and what it may have started: it is the leader of a group."""
    try:
        os.killpg(client.process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def says(client: Client, text: str) -> bool:
    return any(text in str(record.get("text")) for record in client.records())


def test_a_client_ends_while_it_connects_waits_for_a_model_or_for_others(tmp_path: Path, started: ExitStack) -> None:
    state = read_state_file(
        write_state(
            tmp_path / "state.toml",
            checkpoint='{ Hub = { repo_id = "no-such/model-anywhere" } }',
            optimizer=DISTRO,
        )
    )
    CausalLM({**TINY_LLAMA, "vocab_size": 256}, "HfLlama").save_pretrained(tmp_path / "llama")
    at_peers = replace(state, model=replace(state.model, checkpoint=P2P(HubRepo("no-such/model-anywhere"))))
    silent = started.enter_context(FakeCoordinator(mute=True))
    loading = started.enter_context(FakeCoordinator(state_payload(at_peers)))
    waiting = started.enter_context(FakeCoordinator(state_payload(state)))

    def client(name: str, fake: FakeCoordinator, *more: str) -> Client:
        made = Client(tmp_path, name, f"{fake.address}/proof", *more)
        started.callback(made.end)
        return made

    connecting = client("connecting", silent)
    connecting.until(silent.connected.is_set, "connection")
    connecting.send(signal.SIGTERM)
    in_warmup = client("waiting", waiting, "--model", str(tmp_path / "llama"))
    without_model = client("loading", loading)
    in_warmup.until(lambda: says(in_warmup, "the model has"), "model")
    in_warmup.send(signal.SIGINT)
    without_model.until(lambda: says(without_model, "the model comes from peers"), "wish for a model")
    without_model.send(signal.SIGTERM)
    for each in (connecting, in_warmup, without_model):
        assert each.wait(PATIENCE) == INTERRUPTED
        assert is_gone(each)
        assert "Traceback" not in each.log.read_text()


def test_a_client_ends_in_the_midst_of_a_batch_and_saves_what_it_has(tmp_path: Path, started: ExitStack) -> None:
    CausalLM({**TINY_LLAMA, "vocab_size": 256}, "HfLlama").save_pretrained(tmp_path / "llama")
    state = write_state(
        tmp_path / "state.toml",
        total_steps=10_000,
        init_min_clients=1,
        min_clients=1,
        epoch_time=600,
        optimizer=DISTRO,
        checkpoint='{ Hub = { repo_id = "no-such/model-anywhere" } }',
    )
    server = Server(tmp_path, state)
    started.callback(server.end)
    checkpoints = tmp_path / "checkpoints"
    options = ("--model", str(tmp_path / "llama"), "--checkpoint-dir", str(checkpoints))
    client = Client(tmp_path, "one", server.ticket, *options)
    started.callback(client.end)
    client.until(lambda: (client.latest("rounds_trained") or 0) >= 2, "two rounds")
    client.send(signal.SIGTERM)
    assert client.wait(PATIENCE) == INTERRUPTED
    assert is_gone(client)
    assert "Traceback" not in client.log.read_text()
    server.until(lambda: any(r.get("event") == "left" for r in server.records()), "departure")
    assert list(checkpoints.glob("proof-step*/model.safetensors"))
