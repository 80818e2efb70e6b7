"""The page of a run: what it may ask for, who may look and act, and what it is told."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.types import NodeIdentity
from distro_optim.errors import ConfigurationError, DistroError
from distro_optim.serve.status import status_of
from distro_optim.serve.watch import Watch
from distro_optim.strategy.monitor import page
from distro_optim.strategy.monitor.figures import Progress
from distro_optim.strategy.monitor.history import MAX_POINTS, History
from distro_optim.strategy.monitor.page import PageServer, parse_place
from distro_optim.strategy.monitor.picture import picture_of
from distro_optim.strategy.port import Contribution, LossReport, RunView
from distro_optim.testing.coordinator import dummy_run

pytestmark = pytest.mark.waiting

ME, OTHER = bytes([7]) * 32, bytes([9]) * 32
VIEW = RunView(
    run_id="<b>run</b>",
    run_state="ROUND_TRAIN",
    step=17,
    total_steps=100,
    num_peers=2,
    clients=(ME, OTHER),
    peer_index=0,
    connected=True,
    losses={OTHER: LossReport(step=16, loss=float("nan"))},
    contributions={OTHER: Contribution(rounds=3, samples=12, bytes=99, dropped=1)},
)
HTML = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")


def picture(step: int = 17) -> dict[str, Any]:
    figures = replace(Progress(ME).figures(replace(VIEW, step=step), None), loss=2.5)
    return picture_of(figures, ticket="psyche1x", is_host=True, how_to_join="RUN=psyche1x python me.py")


def ask(url: str, body: object = None, **headers: str) -> tuple[int, str, Any]:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    if body is not None:
        request.data = json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def first_events(url: str, *kinds: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with urllib.request.urlopen(url, timeout=10) as answer:
        while set(kinds) - set(found):
            kind = answer.readline().decode().removeprefix("event: ").strip()
            found[kind] = json.loads(answer.readline().decode().removeprefix("data: "))
            assert answer.readline() == b"\n"
    return found


def address(server: PageServer, path: str = "") -> str:
    return f"http://127.0.0.1:{server.port}/{path}"


def test_the_page_is_one_file_that_asks_nobody_else_for_anything() -> None:
    with PageServer(0, picture) as server:
        status, text, headers = ask(address(server))
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "connect-src 'self'" in policy
    nonce = re.search(r"'nonce-([\w-]+)'", policy)
    assert nonce is not None
    assert f'<script nonce="{nonce[1]}">' in text
    assert "unsafe" not in policy
    assert "{{nonce}}" not in text
    # Nothing is loaded from elsewhere, and what strangers say is never read as HTML.
    assert not re.search(r"""(?:src|href)\s*=\s*["']""", HTML)
    ours = HTML[HTML.rindex("<script") :]
    assert "innerHTML" not in ours
    assert "The MIT License (MIT)" in HTML


def test_whoever_looks_is_told_how_it_is_and_how_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LOOK_SECONDS", 0.02)
    steps = iter(range(17, 10_000))
    with PageServer(0, lambda: picture(next(steps))) as server:
        assert server.url == address(server), "who only looks, here, needs no key"
        told = first_events(address(server, "events"), "history", "now", "point")
    now = told["now"]
    assert now["run_id"] == "<b>run</b>"
    assert now["how_to_join"] == "RUN=psyche1x python me.py"
    assert now["acts"] == []
    me, other = now["peers"]
    assert (me["is_me"], me["loss"]) == (True, 2.5)
    assert (other["rounds"], other["samples"], other["bytes"], other["dropped"]) == (3, 12, 99, 1)
    assert other["loss"] is None, "JSON has no word for what is no number"
    assert told["point"]["losses"] == {"07070707": 2.5}


def test_acting_needs_the_key_and_says_what_came_of_it() -> None:
    done: list[str] = []

    def kick(peer: str) -> str:
        if peer == "gone":
            raise DistroError("it is not here")
        done.append(peer)
        return "turned away"

    with PageServer(0, picture, {"kick": kick}) as server:
        act = address(server, "act")
        assert server.url == address(server, f"#{server.key}")
        assert ask(act, {"act": "kick", "peer": "ab"})[0] == 403
        assert ask(act, {"act": "kick", "peer": "ab"}, X_Key="wrong")[0] == 403
        assert done == []
        assert ask(act, {"act": "kick", "peer": "ab"}, X_Key=server.key)[:2] == (200, "turned away")
        assert done == ["ab"]
        assert ask(act, {"act": "kick", "peer": "gone"}, X_Key=server.key)[:2] == (409, "it is not here")
        nonsense: list[object] = [{"act": "format"}, {}, [], {"act": []}, {"act": "kick", "peer": 3}]
        for wrong in nonsense:
            assert ask(act, wrong, X_Key=server.key)[0] == 400, wrong
        assert ask(act, {"act": "kick", "peer": "x" * 5000}, X_Key=server.key)[0] == 413
        assert ask(address(server, "act"))[0] == 405


def test_another_site_in_the_browser_cannot_look() -> None:
    with PageServer(0, picture) as server:
        for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example"):
            for path in ("", "events"):
                assert ask(address(server, path), Host=host)[0] == 403, host
        assert ask(address(server), Host="localhost")[0] == 200


def test_from_elsewhere_one_needs_the_key_to_look() -> None:
    with PageServer("0.0.0.0:0", picture) as server:
        assert server.url.endswith(f"#{server.key}")
        assert ask(address(server))[0] == 200, "the page itself tells nothing"
        assert ask(address(server, "events"))[0] == 403
        assert "now" in first_events(address(server, f"events?key={server.key}"), "history", "now")


def test_no_more_look_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_WATCHERS", 1)
    with PageServer(0, picture) as server, urllib.request.urlopen(address(server, "events"), timeout=10) as first:
        first.readline()
        assert ask(address(server, "events"))[0] == 503


def test_places_are_read_and_a_taken_one_is_refused() -> None:
    assert parse_place(8080) == parse_place("8080") == ("127.0.0.1", 8080)
    assert parse_place("0.0.0.0:80") == ("0.0.0.0", 80)
    assert parse_place("[::1]:80") == ("::1", 80)
    for wrong in ("", "here", "here:", "1:99999", -1, True):
        with pytest.raises(ConfigurationError, match="give a port such as 8080"):
            parse_place(wrong)
    with PageServer(0, picture) as server, pytest.raises(ConfigurationError, match="give another port"):
        PageServer(server.port, picture)


def test_a_long_run_is_thinned_out_and_rounds_have_their_times() -> None:
    history = History()
    for step in range(1, 2 * MAX_POINTS):
        history.add(step, {"a": 1.0}, sent=step, ddp=10 * step, seconds=(2.0 * step, 0.5 * step))
        assert history.add(step, {}) is None, "a step is one point"
    assert len(history.points) <= MAX_POINTS
    assert history.thinned >= 1
    assert history.points[0].step == 1
    assert (history.points[-1].training, history.points[-1].waiting) == pytest.approx((2.0, 0.5))


@pytest.fixture
def make_service() -> Callable[[], CoordinatorService]:
    return lambda: CoordinatorService(RunHost(dummy_run()), draw=lambda size: bytes(size), unix_offset=0.0)


def test_a_server_draws_the_same_picture(make_service: Callable[[], CoordinatorService]) -> None:
    service = make_service()
    watch = Watch(service)
    with pytest.raises(DistroError):
        watch.picture(None)
    watch.see(status_of(service, 0.0))
    drawn = watch.picture("host:1/run")
    assert drawn.keys() == picture().keys()
    assert drawn["how_to_join"] == "distro-optim join host:1/run"


def test_who_was_turned_away_does_not_come_back(make_service: Callable[[], CoordinatorService]) -> None:
    service = make_service()
    client = NodeIdentity.from_single_key(OTHER)
    assert service.host.is_allowed(OTHER)
    service.ban(client.signer, 0.0)
    assert not service.host.is_allowed(OTHER)
    assert service.host.is_allowed(ME)
