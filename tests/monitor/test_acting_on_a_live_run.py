"""What the page of a run does to it: pause, resume, kick, sent over HTTP to whoever hosts it."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.utils.data import default_collate
from typing_extensions import override

from coordinator.coordinator_swarm import key
from coordinator.test_serve_command import participant, served, state_file
from distro_optim import DisTrO
from distro_optim.errors import DistroError, JoinRefusedError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.environment import WEB
from distro_optim.strategy.monitor import page
from distro_optim.strategy.session import SwarmSession
from frameworks.lightning_runs import QUIET, load, loader, make_module, make_trainer
from monitor.test_the_page import ask

pytestmark = [pytest.mark.waiting, pytest.mark.slow, *QUIET]

SECONDS = 60.0
LOOPBACK: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0"}
CONFIG = RunConfig(total_steps=10**6, warmup_time=30, max_round_train_time=20, joiner_wait_time=1)


def act(url: str, what: str, peer: str = "", **headers: str) -> tuple[int, str]:
    """What the page's button does, if nothing else is said with the key that is in the page's address."""
    place, _, its_key = url.partition("#")
    return ask(f"{place}act", {"act": what, "peer": peer}, **{"X_Key": its_key, **headers})[:2]


@contextmanager
def pictures(url: str) -> Iterator[Callable[[Callable[[Any], bool]], Any]]:
    """Gives a function that returns the next picture of which something is true."""
    with urllib.request.urlopen(f"{url.partition('#')[0]}events", timeout=SECONDS) as answer:

        def until(is_so: Callable[[Any], bool]) -> Any:
            kind = b""
            for line in answer:
                if line.startswith(b"data: ") and b"now" in kind and is_so(found := json.loads(line[6:])):
                    return found
                kind = line
            raise AssertionError("the page has closed")

        yield until


class Friend(threading.Thread):
    """The same training in a plain loop, in a thread."""

    def __init__(self, pl: ModuleType, ticket: str) -> None:
        super().__init__(daemon=True)
        self.news: list[str] = []
        self.error: BaseException | None = None
        self.model = make_module(pl)
        optimizer = DisTrO(self.model.parameters(), lr=0.01)
        settings = {**LOOPBACK, "run": ticket, "dataset_size": 64, "give_up_seconds": 1.0}
        self.session = SwarmSession(self.model, optimizer, on_event=self.news.append, **settings)
        self.start()

    @override
    def run(self) -> None:
        data = loader().dataset
        try:
            with self.session as session:
                for round_ in session.rounds():
                    loss = self.model.loss(default_collate([data[n] for n in round_.indices]))
                    loss.backward()
                    round_.finish(loss=loss.detach())
        except DistroError as error:
            self.error = error

    @property
    def url(self) -> str:
        return next(text.rpartition(" ")[2] for text in self.news if text.startswith("the run is shown at"))


def test_the_page_of_a_script_that_hosts_pauses_resumes_and_kicks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv(WEB, "0")  # for the friend; the host has its option
    pl, strategies = load("lightning.pytorch"), load("distro_optim.strategy.psyche_lightning")
    news: list[str] = []
    strategy = strategies.LightningPsycheStrategy(web=0, config=CONFIG, on_event=news.append, **LOOPBACK)
    trainer = make_trainer(pl, tmp_path, strategy, max_epochs=-1, max_steps=10**6)
    failures: list[BaseException] = []

    def operate() -> None:
        url = next(text.rpartition(" ")[2] for text in news if text.startswith("the run is shown at"))
        with pictures(url) as until:
            friend = Friend(pl, until(lambda now: now["step"] > 2)["ticket"])
            now = until(lambda now: sum(peer["in_epoch"] for peer in now["peers"]) == 2)
            me, other = sorted(now["peers"], key=lambda peer: not peer["is_me"])
            assert now["acts"] == ["ban", "kick", "pause", "resume"]

            # Whoever does not have the key changes nothing, nor does a peer's own page: the run is not hosted there.
            assert act(url, "pause", X_Key="wrong")[0] == act(url, "kick", other["key"], X_Key="")[0] == 403
            with pictures(friend.url) as friends:
                assert friends(lambda now: now["step"] > 2)["acts"] == []
            assert act(f"{friend.url}#anything", "pause")[0] == 403
            before = until(lambda now: True)["step"]
            after = until(lambda now: now["step"] > before)
            assert sum(peer["in_epoch"] for peer in after["peers"]) == 2

            assert act(url, "resume") == (409, act(url, "resume")[1]), "it is not paused"
            assert act(url, "pause")[0] == 200
            paused = until(lambda now: now["phase"] == "PAUSED")["step"]
            assert until(lambda now: True)["step"] == until(lambda now: True)["step"] == paused
            assert act(url, "resume") == (200, "going on")
            until(lambda now: now["step"] > paused + 2 and sum(peer["in_epoch"] for peer in now["peers"]) == 2)

            assert act(url, "kick", me["key"])[0] == 409
            assert act(url, "kick", other["key"]) == (200, f"{other['id']} was taken out, and may come again")
            until(lambda now: sum(peer["in_epoch"] for peer in now["peers"]) == 1)
            until(lambda now: sum(peer["in_epoch"] for peer in now["peers"]) == 2)
            status, said = act(url, "ban", other["key"])
            assert (status, said.partition(",")[0]) == (200, f"{other['id']} was taken out for good")
            gone = until(lambda now: [peer["is_me"] for peer in now["peers"] if peer["in_epoch"]] == [True])
            friend.join()
            assert isinstance(friend.error, JoinRefusedError)
            assert until(lambda now: now["step"] > gone["step"] + 2)["phase"].startswith("ROUND")
            status, said = act(url, "kick", other["key"])
            assert status == 409
            assert "not the key of a peer that is here" in said

    def operator() -> None:
        try:
            operate()
        except BaseException as error:
            failures.append(error)
        trainer.should_stop = True

    def on_train_batch_start(module: Any, *_: Any) -> None:
        if not operating.is_alive() and not operating.ident:
            operating.start()

    operating = threading.Thread(target=operator, daemon=True)
    trainer.fit(make_module(pl, on_train_batch_start=on_train_batch_start), loader())
    operating.join()
    if failures:
        raise failures[0]
    assert [text for text in news if " left: 1 peer now" in text]


def test_the_page_of_a_server_pauses_resumes_and_kicks(tmp_path: Path) -> None:
    with served(state_file(tmp_path), "--web", "0", "--metrics-local-port", "0") as server:
        port, url = server.port(), ""
        while not (url := server.line(event="server").get("web", url)):
            pass
        assert "#" in url
        assert act(url, "pause", X_Key="wrong")[0] == 403
        with participant(port):
            server.line(event="phase_changed", after="RoundTrain")
            assert act(url, "pause") == (200, "pausing after this round")
            server.line(event="phase_changed", after="Paused")
            assert act(url, "resume") == (200, "going on")
            server.line(event="phase_changed", before="Paused", after="WaitingForMembers")
            client = key(1).public.hex()
            assert act(url, "kick", client, X_Key="wrong")[0] == 403
            assert act(url, "kick", client) == (200, f"{client[:8]} was taken out, and may come again")
            server.line(event="disconnected")
        with participant(port):
            server.line(event="joined")
            assert act(url, "ban", client)[1].startswith(f"{client[:8]} was taken out for good")
            assert server.line(event="disconnected")["reason"] == "the operator banned it"
        with participant(port):  # and it does not come in again
            assert "not on the list" in server.line(event="disconnected")["reason"]
