"""Peers as processes of their own (``one_process.py``), which a test kills, stops and starts again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import warm_python

SCRIPT = Path(__file__).with_name("one_process.py")
PATIENCE_SECONDS = 180.0
NUMBERS = (1, 2, 3)


class Processes:
    """Peer 1 hosts at first. Each has a folder, with what it prints in ``out.txt``."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def of(self, number: int) -> Path:
        return self.folder / str(number)

    def start(self, number: int, *ticket: str) -> None:
        self.of(number).mkdir(exist_ok=True)
        with (self.of(number) / "out.txt").open("ab") as out:
            command = [sys.executable, str(SCRIPT), str(self.of(number)), str(self.steps), *ticket]
            self.running[number] = warm_python.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def kill(self, *numbers: int) -> None:
        for number in numbers:
            self.running[number].kill()
        for number in numbers:
            self.running.pop(number).wait()

    def stop(self, number: int) -> None:
        """As the lid of a laptop does."""
        self.running[number].send_signal(signal.SIGSTOP)

    def wake(self, number: int) -> None:
        self.running[number].send_signal(signal.SIGCONT)

    def start_all(self) -> str:
        """Starts all, and returns the ticket."""
        self.start(1)
        self.until(lambda: "ticket: " in self.said(1), "the host does not start")
        ticket = self.said(1).partition("ticket: ")[2].split()[0]
        for number in NUMBERS[1:]:
            self.start(number, ticket)
        return ticket

    def said(self, number: int) -> str:
        path = self.of(number) / "out.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def trained(self, number: int) -> list[tuple[str, str]]:
        path = self.of(number) / "trained.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(step, root) for step, _, root in (line.partition(" ") for line in lines)]

    def last_step(self, number: int) -> int:
        return max((int(step) for step, _ in self.trained(number) if step != "end"), default=0)

    def until(self, what: Callable[[], object], why: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not what():
            output = "\n".join(f"{number}:\n{self.said(number)}" for number in NUMBERS)
            assert time.monotonic() < deadline, f"{why}\n{output}"
            time.sleep(0.05)
