"""``distro-optim verify TICKET`` watches a run of language models: what it prints, and when it ends."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from client.processes import DISTRO, TINY_LLAMA, Server, write_state, write_tokens
from distro_optim.cli import main
from distro_optim.client.joining import join
from distro_optim.client.options import JoinOptions
from distro_optim.client.verifying import Enough, Watcher
from distro_optim.comm.iroh.keys import load_secret_key
from distro_optim.models.causal_lm import CausalLM
from distro_optim.verify.recompute import Agreement, Evidence

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

OURS = '{ Hub = { repo_id = "distro_optim/shared-by-peers" } }'
HONEST = Evidence(assigned=Agreement(900, 1000), control=Agreement(600, 1000), only_assigned=350, only_control=50)


def test_it_watches_as_many_rounds_as_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, vocab_size = write_tokens(tmp_path, seq_len=32)
    model = tmp_path / "tiny-llama"
    CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama").save_pretrained(model)
    state = write_state(
        tmp_path / "state.toml",
        total_steps=30,
        epoch_time=60,
        init_min_clients=2,
        checkpoint=OURS,
        data_location='{ Local = "wherever" }',
        optimizer=DISTRO,
    )
    key = load_secret_key(tmp_path / "observer.key").public.hex()
    with ExitStack() as stack:
        server = Server(tmp_path, state, "--observer", key)
        stack.callback(server.end)
        options = JoinOptions(
            run=server.ticket,
            relay="none",
            bind_addr="127.0.0.1:0",
            device="cpu",
            data=data,
            model=model,
            logs="none",
            no_checkpoints=True,
        )
        watches = ["--data", str(data), "--model", str(model), "--rounds", "4", "--device", "cpu", "--json"]
        reach = ["--identity", str(tmp_path / "observer.key"), "--relay", "none", "--bind-addr", "127.0.0.1:0"]
        with ThreadPoolExecutor(2) as pool:
            clients = [pool.submit(join, options) for _ in range(2)]
            status = main(["verify", server.ticket, *watches, *reach])
            for client in clients:
                client.result()
    assert status in (0, 1)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    audits = [record["audit"] for record in records if "audit" in record]
    assert len({audit["step"] for audit in audits}) == 4
    assert len({audit["peer"] for audit in audits}) == 2
    assert "4 rounds were audited" in records[-1]["summary"]
    assert server.latest("step") is not None


def test_a_key_that_is_not_permitted_is_shown_with_what_the_host_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = write_state(tmp_path / "state.toml", checkpoint=OURS, data_location='{ Local = "x" }', optimizer=DISTRO)
    with ExitStack() as stack:
        server = Server(tmp_path, state)
        stack.callback(server.end)
        identity = tmp_path / "observer.key"
        reach = ["--identity", str(identity), "--relay", "none", "--bind-addr", "127.0.0.1:0"]
        assert main(["verify", server.ticket, *reach]) == 1
    key = load_secret_key(identity).public.hex()
    said = capsys.readouterr().err
    assert f"distro-optim serve --observer {key}" in said
    assert f'RunConfig(observers=["{key}"])' in said
    assert "distro-optim join --audit 1" in said


def test_a_run_of_psyche_is_watched_by_its_members_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = write_state(tmp_path / "state.toml")
    with ExitStack() as stack:
        server = Server(tmp_path, state)
        stack.callback(server.end)
        reach = ["--identity", str(tmp_path / "observer.key"), "--relay", "none", "--bind-addr", "127.0.0.1:0"]
        assert main(["verify", server.ticket, *reach]) == 2
    assert "audit as a member, by distro-optim join --audit 1" in capsys.readouterr().err


def test_what_was_found_is_told_and_added_up() -> None:
    told: list[str] = []
    watcher = Watcher(rounds=2)
    watcher.tell = lambda text, **facts: told.append(text)
    assert watcher.summary() == (False, ["no result was audited"])
    for step in (1, 2):
        for peer in (b"a" * 32, b"b" * 32):
            watcher.audited(step, peer, HONEST)
    with pytest.raises(Enough):
        watcher.audited(3, b"a" * 32, HONEST)
    assert told[0] == "step 1: peer 61616161: 1000 signs, 0.900 agree with its batch, 0.600 with another (+- 0.016)"
    fails, lines = watcher.summary()
    assert not fails
    assert lines[0] == "2 rounds were audited"
    assert lines[1].startswith("peer 61616161: 2000 signs, 0.900 agree")
    assert lines[1].endswith("nothing speaks against it")


def test_one_that_does_not_train_fails_in_the_summary() -> None:
    watcher = Watcher()
    watcher.tell = lambda text, **facts: None
    idle = Evidence(assigned=Agreement(500, 1000), control=Agreement(500, 1000), only_assigned=200, only_control=200)
    for step in range(20):
        for peer, found in ((b"a", HONEST), (b"b", HONEST), (b"c", idle)):
            watcher.audited(step, peer * 32, found)
    fails, lines = watcher.summary()
    assert fails
    assert [line.split(":")[0] for line in lines if "FAILS" in line] == ["peer 63636363"]
