"""The page in a real browser, where there is one: it draws, keeps to its policy, and its buttons act."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from distro_optim.strategy.monitor import page
from distro_optim.strategy.monitor.page import PageServer
from monitor.test_the_page import OTHER, picture

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60.0

pytestmark = [
    pytest.mark.waiting,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here"),
]


class Tab:
    """One tab of a browser, over its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self._count:
                result: dict[str, Any] = message["result"]
                return result

    async def value(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        while not (value := await self.value(expression)):
            await asyncio.sleep(0.05)
        return value

    async def size(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    async def photograph(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(shot["data"]))


def browse(folder: Path, url: str, look: Callable[[Tab], Coroutine[Any, Any, None]]) -> None:
    """Opens a page, and has it looked at."""
    assert BROWSER is not None
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    command = [BROWSER, *arguments, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def go() -> None:
        port_file = folder / "DevToolsActivePort"
        while not port_file.exists() or "\n" not in port_file.read_text():
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            pages: list[Any] = []
            while not pages:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    pages = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=url)
                await look(tab)

    try:
        asyncio.run(asyncio.wait_for(go(), SECONDS))
    finally:
        process.kill()
        process.wait()


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
        await tab.value("window.confirm = () => true; document.querySelector('.peers button').click()")
        await tab.until("document.getElementById('state').textContent !== ''")
        if "DISTRO_OPTIM_SCREENSHOT" in os.environ:
            await tab.photograph(Path(os.environ["DISTRO_OPTIM_SCREENSHOT"]))

    with PageServer(0, lambda: picture(next(steps)), {"kick": kick}) as server:
        browse(tmp_path, server.url, look)
    assert kicked == [OTHER.hex()]
