"""The page in a real browser, where there is one: it draws, keeps to its policy, and its buttons act."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.strategy.monitor import page
from distro_optim.strategy.monitor.page import PageServer
from monitor.browser import BROWSER, Tab, browse
from monitor.test_the_page import OTHER, picture

pytestmark = [
    pytest.mark.waiting,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here"),
]


def test_it_draws_what_it_is_told_fits_a_phone_and_kicks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LOOK_SECONDS", 0.05)
    steps = iter(range(17, 10_000))
    kicked: list[str] = []

    def kick(peer: str) -> str:
        kicked.append(peer)
        return "turned away"

    async def look(tab: Tab) -> None:
        await tab.until("points.length > 3 && document.querySelectorAll('canvas').length >= 2")
        assert await tab.value("document.getElementById('name').textContent") == "<b>run</b>"
        assert await tab.value("document.querySelectorAll('h1 b').length") == 0
        assert "RUN=psyche1x python me.py" in await tab.value("document.getElementById('line').textContent")
        for width in (1200, 390):
            await tab.size(width, 900)
            await tab.until(f"innerWidth === {width}")
            assert await tab.value("document.documentElement.scrollWidth <= innerWidth"), width
        # Elsewhere nothing may be asked for.
        reached = "fetch('http://127.0.0.1:1/').then(() => 'yes', () => 'no').then(said => { window.said = said })"
        await tab.value(reached)
        assert await tab.until("window.said") == "no"
        refused = [text for text in tab.complaints if "Content Security Policy" in text]
        assert len(refused) == len(tab.complaints) > 0, "the page itself keeps to its policy"
        assert await tab.value("[...document.querySelectorAll('.peers button')].map(b => b.textContent)") == [
            "kick",
            "ban",
        ]
        await tab.value("window.confirm = () => true; document.querySelector('.peers button').click()")
        await tab.until("document.getElementById('state').textContent !== ''")

    with PageServer(0, lambda: picture(next(steps)), {"kick": kick, "ban": lambda peer: "banned"}) as server:
        browse(tmp_path, server.url, look)
    assert kicked == [OTHER.hex()]
