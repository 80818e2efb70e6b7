"""Runs a script as several peers of one run on this machine, and disturbs them as planned."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..callbacks import SafeCallback
from ..comm.iroh.reach import Discovery
from ..console import Display, narrated
from ..errors import ConfigurationError
from ..logs import LogOptions
from ..strategy.environment import RunEnvironment, read_ticket
from ..strategy.run_report import EVENT, JOINED, ReportReader
from .display import Situation
from .faults import Fault, FaultPlan, Join, Kill, KillHost, Restart, RestartHost
from .processes import PeerProcess, end_all, tail
from .watching import PeerState, PeerWatch, SwarmWatch

__all__ = ["LocalNetwork", "NetworkOptions", "Outcome", "parse_setting"]

POLL_SECONDS: Final = 0.1
"""Between two looks at the processes and their reports."""

END_SECONDS: Final = 30.0
"""After the host has ended, the others learn of it and have this long to save what they have."""

THREADS: Final = "OMP_NUM_THREADS"
"""Variable that shares the cores out among the peers, unless it is set already."""

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What to run.

    Attributes:
        script: a Python file.
        arguments: passed to it.
        peers: processes at the start; number 0 hosts the run.
        faults: what goes wrong, and when.
        out: folder for logs, reports and the plot.
        settings: of the run, by the names of ``RunConfig``; they go before the defaults, not before the script.
        relay: iroh relay servers for all peers.
        discovery: where all peers find each other by their keys; None suits the relay servers.
        timeout: seconds after which everything is ended; None for never.
        stall_timeout: seconds without any news of any peer after which everything is ended.
        target: the loss must be below it at the end; None demands nothing.
        log: where this process logs; each peer does beside it, as ``run-peer-0.log``.

    Raises:
        ConfigurationError: an option cannot work.
    """

    script: Path
    arguments: tuple[str, ...] = ()
    peers: int = 3
    faults: tuple[Fault, ...] = ()
    out: Path = Path("out/testnet")
    settings: Mapping[str, Any] = field(default_factory=dict)
    relay: str = "none"
    discovery: Discovery | None = None
    timeout: float | None = None
    stall_timeout: float = 180.0
    target: float | None = None
    log: LogOptions | None = None

    def __post_init__(self) -> None:
        if not self.script.is_file():
            raise ConfigurationError(
                f"there is no script {self.script}; options of testnet stand before it, its own after it",
                name="script",
                value=self.script,
            )
        if self.peers < 1:
            raise ConfigurationError(f"a network has at least one peer, got {self.peers}", name="peers")
        FaultPlan(self.faults, peers=self.peers)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it ended.

    Attributes:
        watch: all that the peers told.
        seconds: it took.
        faults: what was done to the peers.
        problems: why it is not a success, each in a sentence; empty if it is one.
        target: of the loss.
    """

    watch: SwarmWatch
    seconds: float
    faults: tuple[Fault, ...]
    problems: tuple[str, ...]
    target: float | None

    @property
    def succeeded(self) -> bool:
        """Whether there was no problem."""
        return not self.problems


class LocalNetwork:
    """The processes of a run, and what is known of them.

    Args:
        options: what to run.
        display: where the news goes; whatever fails there, the network goes on.
        meanwhile: called several times a second, with what is known.
    """

    def __init__(
        self,
        options: NetworkOptions,
        display: Display[Situation],
        *,
        meanwhile: Callable[[SwarmWatch], None] | None = None,
    ) -> None:
        self.watch = SwarmWatch()
        self._options = options
        self._meanwhile = meanwhile
        self._show = SafeCallback(display.update, "the display")
        self._show_news = SafeCallback(display.tell, "the display")
        self._plan = FaultPlan(options.faults, peers=options.peers)
        self._fewest_peers = self._plan.fewest_peers
        self._done: list[Fault] = []
        self._processes: dict[int, PeerProcess] = {}
        self._readers: dict[int, ReportReader] = {}
        self._ticket: str | None = None
        self._problems: list[str] = []
        self._started = self._news = time.monotonic()
        self._host_ended: float | None = None
        self._killed_hosts: list[int] = []
        self._threads = os.environ.get(THREADS) or str(max(1, (os.cpu_count() or 1) // options.peers))

    def run(self) -> Outcome:
        """Runs to the end; all processes are gone afterwards, also after an exception or Ctrl-C.

        Raises:
            ConfigurationError: the folder cannot be used.
            KeyboardInterrupt: the user ended it.
        """
        self._prepare_folder()
        try:
            self._start()
            while not self._is_over():
                time.sleep(POLL_SECONDS)
                self._look()
        finally:
            for peer in self.watch.peers:
                if peer.number in self._processes and self._processes[peer.number].poll() is None:
                    peer.state = PeerState.STOPPED
            with narrated("ending the peers", lambda text: self._tell(text, kind="note")):
                end_all(self._processes.values())
            self._look()
        return Outcome(
            watch=self.watch,
            seconds=time.monotonic() - self._started,
            faults=tuple(self._done),
            problems=(*self._problems, *self._judge()),
            target=self._options.target,
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        out = self._options.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            for pattern in ("peer-*.log", "peer-*.jsonl"):
                for path in out.glob(pattern):
                    path.unlink()
            self._ticket_file.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot use the folder {out}: {error.strerror or error}; name another with --out", name="out"
            ) from None

    def _start(self) -> None:
        for _ in range(self._options.peers):
            peer = self.watch.add_peer()
            if peer.number == 0:
                self._launch(peer)

    @property
    def _ticket_file(self) -> Path:
        return self._options.out.absolute() / "ticket"

    def _log(self, peer: PeerWatch) -> Path:
        return self._options.out / f"peer-{peer.number}.log"

    def _launch(self, peer: PeerWatch) -> None:
        report = self._options.out.absolute() / f"peer-{peer.number}.jsonl"
        hosts = self._ticket is None
        environment = RunEnvironment(
            run=None if hosts else self._ticket,
            ticket_file=self._ticket_file,
            relay=self._options.relay,
            discovery=self._options.discovery,
            report=report,
            peer_name=peer.name,
            config=self._settings() if hosts else {},
            log=self._options.log.beside(f"peer-{peer.number}") if self._options.log is not None else None,
        ).variables()
        command = [sys.executable, "-u", str(self._options.script), *self._options.arguments]
        self._processes[peer.number] = PeerProcess(command, {**environment, THREADS: self._threads}, self._log(peer))
        self._readers.setdefault(peer.number, ReportReader(report))
        self._news = time.monotonic()

    def _settings(self) -> dict[str, Any]:
        """Training begins with everybody, and goes on with as many as the faults leave."""
        return {"peers_to_start": self._options.peers, "min_peers": self._fewest_peers, **self._options.settings}

    def _look(self) -> None:
        for peer in self.watch.peers:
            if peer.number in self._readers:
                self._read(peer)
        self._follow_ticket()
        self._inflict()
        for peer in self.watch.peers:
            self._follow_process(peer)
        if self._meanwhile is not None:
            self._meanwhile(self.watch)
        self._show(Situation(self.watch, time.monotonic() - self._started))

    def _read(self, peer: PeerWatch) -> None:
        for line in self._readers[peer.number].read():
            self._news = time.monotonic()
            self.watch.take(peer, line)
            if line.text:
                text = f"joined the run {line.text!r}" if line.kind == JOINED else line.text
                self._tell(f"{peer.name}: {text}", kind="peer" if line.kind == EVENT else line.kind)

    def _follow_ticket(self) -> None:
        if self._ticket is not None or self._host_ended is not None:
            return
        self._ticket = read_ticket(self._ticket_file)
        if self._ticket is not None:
            self._tell("peer 0 hosts the run", kind="ticket", ticket=self._ticket)
            for peer in self.watch.peers[1:]:
                self._launch(peer)

    def _inflict(self) -> None:
        if self._ticket is None:
            return
        for fault in self._plan.due(self.watch.step):
            match fault:
                case Kill(peer=number):
                    peer = self.watch.peers[number]
                    if self._processes[number].poll() is not None:
                        self._problems.append(f"{fault}, but it had ended before")
                        continue
                    self._processes[number].kill()
                    self._read(peer)
                    peer.state = PeerState.KILLED
                    self._tell(f"{peer.name} is killed with -9 at step {self.watch.step}", kind="killed")
                case Restart(peer=number):
                    peer = self.watch.peers[number]
                    peer.restarted()
                    self._launch(peer)
                    self._tell(f"{peer.name} is started again at step {self.watch.step}", kind="restarted")
                case KillHost():
                    number = self.watch.host
                    self._processes[number].kill()
                    self._killed_hosts.append(number)
                    self._read(self.watch.peers[number])
                    self.watch.peers[number].state = PeerState.KILLED
                    self._tell(f"peer {number}, the host, is killed with -9 at step {self.watch.step}", kind="killed")
                case RestartHost():
                    peer = self.watch.peers[self._killed_hosts.pop(0)]
                    peer.restarted()
                    self._ticket = read_ticket(self._ticket_file) or self._ticket
                    self._launch(peer)
                    self._tell(f"{peer.name} is started again at step {self.watch.step}", kind="restarted")
                case Join():
                    peer = self.watch.add_peer()
                    self._launch(peer)
                    self._tell(f"{peer.name} is started at step {self.watch.step}", kind="started")
            self._done.append(fault)

    def _follow_process(self, peer: PeerWatch) -> None:
        process = self._processes.get(peer.number)
        if process is None or peer.exit_code is not None or (code := process.poll()) is None:
            return
        self._read(peer)  # what it wrote last
        peer.exit_code = code
        if peer.state not in (PeerState.KILLED, PeerState.STOPPED):
            peer.state = PeerState.ENDED if code == 0 else PeerState.FAILED
            self._tell(f"{peer.name} has ended" + (f" with status {code}" if code else ""), kind="ended")
        if peer.number == 0 and peer.state is not PeerState.KILLED and self._host_ended is None:
            self._host_ended = time.monotonic()

    def _is_over(self) -> bool:
        now = time.monotonic()
        if all(process.poll() is not None for process in self._processes.values()) and self._ticket is not None:
            return True
        if self._host_ended is not None:
            if self._ticket is None:
                self._problems.append("the host ended before it had a ticket to give")
                return True
            if now - self._host_ended > END_SECONDS:
                late = ", ".join(p.name for p in self.watch.peers if p.exit_code is None)
                self._problems.append(f"{late} did not end within {END_SECONDS:.0f} s of the host")
                return True
        if self._waits_in_vain:
            return True  # what went wrong with whom is said at the end
        if self._options.timeout is not None and now - self._started > self._options.timeout:
            self._problems.append(f"it was not over after {self._options.timeout:.0f} s")
            return True
        if now - self._news > self._options.stall_timeout:
            self._problems.append(f"for {self._options.stall_timeout:.0f} s nothing was heard of any peer")
            return True
        return False

    @property
    def _waits_in_vain(self) -> bool:
        """Whether a peer has failed without whom the others never train."""
        failed = any(peer.state is PeerState.FAILED for peer in self.watch.peers)
        running = sum(process.poll() is None for process in self._processes.values())
        needed = self._settings()["min_peers" if self.watch.step else "peers_to_start"]
        return failed and isinstance(needed, int) and running < needed

    def _judge(self) -> list[str]:
        problems = []
        for peer in self.watch.survivors:
            if peer.state is PeerState.FAILED:
                last = tail(self._log(peer))
                problems.append(
                    f"{peer.name} ended with status {peer.exit_code}; the end of {self._log(peer)}:\n{last}"
                )
        problems += [f"it did not come to this: {fault}" for fault in self._plan.pending]
        if problems or self._problems:
            return problems  # the rest would only repeat them
        if not self.watch.equal_at_the_end:
            ends = ", ".join(f"{peer.name} {peer.final_hash[:8] or 'none'}" for peer in self.watch.survivors)
            problems.append(f"the peers do not end with the same weights: {ends}")
        loss, target = self.watch.final_loss, self._options.target
        if target is not None and not (loss is not None and loss < target):
            problems.append(
                f"the loss at the end is {'unknown' if loss is None else f'{loss:.3f}'}, not below {target}"
            )
        return problems

    def _tell(self, text: str, *, kind: str, **facts: str) -> None:
        self.watch.events.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._show_news(text, facts, kind=kind)
        _log.info("%s", text)


def parse_setting(text: str) -> tuple[str, Any]:
    """Reads ``NAME=VALUE``; the value is JSON, or else a word.

    Raises:
        ConfigurationError: there is no name, or no value.
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier() and value):
        raise ConfigurationError(
            f"{text!r} is not of the form NAME=VALUE, such as total_steps=200", name="set", value=text
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
