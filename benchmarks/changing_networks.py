"""Three peers train, and the network of one of them changes: how long does who wait, and what does it cost the run?

    python benchmarks/changing_networks.py                      # every case, with the watch and without: 12 minutes
    python benchmarks/changing_networks.py --case new-address   # one
    python benchmarks/changing_networks.py --case dropped --json

Each peer is a process in a network namespace of its own, and this process is the router between them. There is a relay
server in one case only. It needs ``unshare`` and ``ip``, and no rights (Linux, user namespaces allowed). The cases:

    new-address     the peer gets another address in the same network
    new-network     its cable is pulled, and a second later it is in another network
    to-ipv6         it has IPv4 alone, and then IPv6 alone
    flow-dropped    the router drops what goes between the peer's port and those of the others from now on, both ways,
                    as one does that has forgotten its connections; what comes from or goes to another port passes
    dropped         the router drops everything from and to the peer for 20 seconds
    host-moves      the host gets another address in the same network
    host-flow       as flow-dropped, for the host
    relay-left      the router drops all UDP between the peer and the others from now on; a relay server is left, which
                    all of them know, and which nobody needed before

``without`` is the same with the watch on silent connections turned off, which is iroh's own way of going on.
The columns: the longest time in which the peer heard nobody's announcements, and nothing of the coordinator; the
longest round of the others; rounds that the peer did not train in; epochs that began after the change.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

CLONE_NEWNET: Final = 0x40000000
IPV4: Final = "10.0.{}.{}"
IPV6: Final = "2001:db8:{}::{}"
"""Networks of the machines; the router is number 1 in each."""

RELAY_PLACE: Final = ("10.9.9.9", 3340)
ROUTERS_RELAY: Final = "http://{}:{}/".format(*RELAY_PLACE)
"""The router's own relay server, and where it is for all machines."""

NAMES: Final = ("host", "mover", "other")
ROUND_SECONDS: Final = 10  # max_round_train_time
STEP_SECONDS: Final = 0.25  # that a training takes
CALM_SECONDS: Final = 6.0  # of rounds before the change
AFTER_SECONDS: Final = 45.0  # watched after it
START_SECONDS: Final = 90.0
DROP_SECONDS: Final = 20.0


# -- the world ---------------------------------------------------------------------------------------------------------


def do(command: str) -> None:
    subprocess.run(command.split(), check=True)


def own_network() -> None:
    """Moves this process into a fresh network namespace."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "a network namespace")


class Machine:
    """A process with a network of its own, and a cable to the router.

    Args:
        command: of the process.
        network: a number; the machine's addresses end in 2.
        ipv4, ipv6: what it has of both.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], log: Path, network: int, *, ipv6: bool = True
    ) -> None:
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file, preexec_fn=own_network
            )
        self.inside("ip link set lo up")
        self.plug(network, ipv6=ipv6)

    def inside(self, command: str) -> None:
        do(f"nsenter -t {self.process.pid} -n {command}")

    def plug(self, network: int, *, ipv4: bool = True, ipv6: bool = True) -> None:
        """A cable to another network."""
        self.network = network
        do(f"ip link add r{network} type veth peer name m{network}")
        do(f"ip link set m{network} netns {self.process.pid}")
        do(f"ip addr add {IPV4.format(network, 1)}/24 dev r{network}")
        do(f"ip addr add {IPV6.format(network, 1)}/64 dev r{network} nodad")
        do(f"ip link set r{network} up")
        self.inside(f"ip link set m{network} up")
        if ipv4:
            self.take(IPV4.format(network, 2))
        if ipv6:
            self.take(IPV6.format(network, 2))

    def take(self, address: str) -> None:
        """One more address, in the network that the machine is in."""
        six = ":" in address
        router = (IPV6 if six else IPV4).format(self.network, 1)
        self.inside(f"ip addr add {address}/{'64' if six else '24'} dev m{self.network}{' nodad' if six else ''}")
        self.inside(f"ip {'-6 ' if six else ''}route replace default via {router}")

    def leave(self, address: str) -> None:
        """One address less."""
        self.inside(f"ip addr del {address}/{'64' if ':' in address else '24'} dev m{self.network}")

    def unplug(self) -> None:
        """Pulls the cable."""
        do(f"ip link del r{self.network}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def route_between_them() -> None:
    """Makes this process's namespace a router."""
    do("ip link set lo up")
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", name).write_text("1")


def serve_relay() -> None:
    """The router is a relay server as well, as long as this process lives."""
    from distro_optim.testing.relay import RelayServer

    do(f"ip addr add {RELAY_PLACE[0]}/32 dev lo")
    ready = threading.Event()

    async def serve() -> None:
        async with RelayServer(*RELAY_PLACE):
            ready.set()
            await asyncio.Event().wait()

    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    if not ready.wait(START_SECONDS):
        raise RuntimeError("the relay server does not start")


def drop(rule: str, on: bool) -> None:
    """The router drops what a rule names, without a word, or does so no more."""
    for version in ("-4", "-6"):
        do(f"ip {version} rule {'add' if on else 'del'} {rule} blackhole")


def udp_ports(pid: int) -> list[int]:
    """Where a process listens."""
    ports = set()
    for table in ("udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            ports.add(int(line.split()[1].rpartition(":")[2], 16))
    return sorted(ports)


# -- what changes ------------------------------------------------------------------------------------------------------


def new_address(machine: Machine, _: Sequence[Machine]) -> None:
    machine.leave(IPV4.format(machine.network, 2))
    machine.leave(IPV6.format(machine.network, 2))
    machine.take(IPV4.format(machine.network, 3))
    machine.take(IPV6.format(machine.network, 3))


def new_network(machine: Machine, _: Sequence[Machine]) -> None:
    machine.unplug()
    time.sleep(1.0)
    machine.plug(machine.network + 10)


def to_ipv6(machine: Machine, _: Sequence[Machine]) -> None:
    machine.leave(IPV4.format(machine.network, 2))
    machine.take(IPV6.format(machine.network, 2))


def flow_dropped(machine: Machine, others: Sequence[Machine]) -> None:
    for port in udp_ports(machine.process.pid):
        for other in others:
            for other_port in udp_ports(other.process.pid):
                drop(f"iif r{machine.network} ipproto udp sport {port} dport {other_port}", True)
                drop(f"iif r{other.network} ipproto udp sport {other_port} dport {port}", True)


def dropped(machine: Machine, _: Sequence[Machine]) -> None:
    rules = [f"iif r{machine.network}"]
    to = (f"to {IPV4.format(machine.network, 0)}/24", f"to {IPV6.format(machine.network, '')}/64")
    drop(rules[0], True)
    do(f"ip -4 rule add {to[0]} blackhole")
    do(f"ip -6 rule add {to[1]} blackhole")
    time.sleep(DROP_SECONDS)
    drop(rules[0], False)
    do(f"ip -4 rule del {to[0]} blackhole")
    do(f"ip -6 rule del {to[1]} blackhole")


def no_direct_way(machine: Machine, others: Sequence[Machine]) -> None:
    for a, b in [(machine, other) for other in others] + [(other, machine) for other in others]:
        for version, place in (("-4", f"{IPV4.format(b.network, 0)}/24"), ("-6", f"{IPV6.format(b.network, '')}/64")):
            do(f"ip {version} rule add iif r{a.network} to {place} ipproto udp blackhole")


@dataclass(frozen=True)
class Case:
    """What changes, for whom, whether that machine has IPv6 before, and whether there is a relay server."""

    change: Callable[[Machine, Sequence[Machine]], None]
    who: int = 1
    ipv6: bool = True
    relay: bool = False


CASES: Final = {
    "new-address": Case(new_address),
    "new-network": Case(new_network),
    "to-ipv6": Case(to_ipv6, ipv6=False),
    "flow-dropped": Case(flow_dropped),
    "dropped": Case(dropped),
    "host-moves": Case(new_address, who=0),
    "host-flow": Case(flow_dropped, who=0),
    "relay-left": Case(no_direct_way, relay=True),
}


@dataclass
class Found:
    """What one case cost.

    Attributes:
        silence: seconds, by what was not heard: "peers", "coordinator".
        longest_round: seconds between two rounds of those whose network did not change.
        missed: rounds since the change in which the one whose network changed did not train.
        rounds: of those whose network did not change, since the change.
        epochs: that began since the change.
    """

    case: str
    watch: bool
    silence: dict[str, float] = field(default_factory=dict)
    longest_round: float = 0.0
    missed: int = 0
    rounds: int = 0
    epochs: int = 0


def run_case(name: str, *, watch: bool, keep: Path | None = None) -> Found:
    """One run with one change. Raises RuntimeError if the run does not begin."""
    case = CASES[name]
    folder = keep if keep is not None else Path(tempfile.mkdtemp(prefix="changing-networks-"))
    folder.mkdir(parents=True, exist_ok=True)
    machines: list[Machine] = []
    ticket = folder / "ticket"
    relay = ROUTERS_RELAY if case.relay else "none"
    try:
        for index, machine_name in enumerate(NAMES):
            environment = os.environ | {
                "DISTRO_OPTIM_REPORT": str(folder / f"{machine_name}.jsonl"),
                "DISTRO_OPTIM_PEER_NAME": machine_name,
                "DISTRO_OPTIM_RELAY": relay,
                "DISTRO_OPTIM_TICKET_FILE": str(ticket) if index == 0 else "",
                "DISTRO_OPTIM_RUN": ticket.read_text().strip() if index else "",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, __file__, "peer", str(folder / f"{machine_name}.heard"), str(int(watch))]
            ipv6 = case.ipv6 or index != case.who
            machines.append(Machine(command, environment, folder / f"{machine_name}.log", index + 1, ipv6=ipv6))
            process = machines[-1].process
            assert process.stdin is not None
            process.stdin.write(b"go\n")  # the network is there
            process.stdin.flush()
            if index == 0:
                until(ticket.exists, f"no ticket; see {folder}")
        until(lambda: trained(folder, NAMES[1]) > 0, f"the run does not begin; see {folder}")
        time.sleep(CALM_SECONDS)
        changed_at = time.time()
        mover = machines[case.who]
        case.change(mover, [machine for machine in machines if machine is not mover])
        time.sleep(max(0.0, changed_at + AFTER_SECONDS - time.time()))
        ended_at = time.time()
    finally:
        for machine in machines:
            machine.end()
        for machine in machines:
            subprocess.run(["ip", "link", "del", f"r{machine.network}"], check=False, capture_output=True)
        for version in ("-4", "-6"):
            while subprocess.run(["ip", version, "rule", "del", "blackhole"], capture_output=True).returncode == 0:
                pass
    return read_off(name, folder, watch=watch, who=NAMES[case.who], changed_at=changed_at, ended_at=ended_at)


def until(true: Callable[[], object], otherwise: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(otherwise)
        time.sleep(0.1)


def rounds_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line
        if record["kind"] == "round":
            found.append(record)
    return found


def trained(folder: Path, name: str) -> int:
    return sum(record.get("loss") is not None for record in rounds_of(folder, name))


def read_off(name: str, folder: Path, *, watch: bool, who: str, changed_at: float, ended_at: float) -> Found:
    found = Found(name, watch)
    steps: set[int] = set()
    for other in NAMES:
        if other == who:
            continue
        rounds = [record for record in rounds_of(folder, other) if record["time"] >= changed_at - CALM_SECONDS]
        ends = [record["time"] for record in rounds] + [ended_at]
        found.longest_round = max([found.longest_round, *(b - a for a, b in pairwise(ends))])
        steps |= {record["step"] for record in rounds if record["time"] >= changed_at}
        before = max((r["epoch"] for r in rounds if r["time"] < changed_at), default=0)
        after = max((r["epoch"] for r in rounds), default=before)
        found.epochs = max(found.epochs, after - before)
    found.rounds = len(steps)
    own = {record["step"] for record in rounds_of(folder, who) if record.get("loss") is not None}
    found.missed = len({step for step in steps if step < max(steps, default=0) - 1} - own)
    heard: dict[str, list[float]] = {}
    for line in (folder / f"{who}.heard").read_text().splitlines():
        what, _, at = line.partition(" ")
        heard.setdefault(what, []).append(float(at))
    for what, times in heard.items():
        times = [at for at in times if at >= changed_at - 2.0] + [ended_at]
        found.silence[what] = max((b - a for a, b in pairwise(times)), default=0.0)
    return found


# -- a peer ------------------------------------------------------------------------------------------------------------


def peer(heard: Path, watch: bool) -> None:
    """Trains for ever; writes down when it heard whom."""
    import torch

    from distro_optim import DisTrO
    from distro_optim.comm.announcements import Announcement
    from distro_optim.comm.iroh.connection import Connection
    from distro_optim.comm.iroh.swarm import IrohSwarm
    from distro_optim.comm.swarm import Channel
    from distro_optim.coordinator.client.remote import RemoteCoordinator
    from distro_optim.optim.rules import PUBLISHED
    from distro_optim.strategy.config import RunConfig
    from distro_optim.strategy.session import SwarmSession

    sys.stdin.readline()
    file = heard.open("w", buffering=1)
    announcements, read = IrohSwarm.announcements, RemoteCoordinator._read

    def note(what: str) -> None:
        file.write(f"{what} {time.time():.3f}\n")

    async def noted(self: IrohSwarm, channel: Channel = Channel.RUN) -> AsyncIterator[Announcement]:
        async for announcement in announcements(self, channel):
            note("peers")
            yield announcement

    async def noting(self: RemoteCoordinator, connection: Any) -> None:
        receive = connection.receive

        async def received() -> Any:
            states = await receive()
            note("coordinator")
            return states

        connection.receive = received
        await read(self, connection)

    IrohSwarm.announcements = noted  # type: ignore[method-assign]
    RemoteCoordinator._read = noting  # type: ignore[method-assign]
    if not watch:
        Connection.look = lambda self, now, *, at_ways=True: False  # type: ignore[method-assign]
        RemoteCoordinator.beside = property(lambda self: None, lambda self, value: None)  # type: ignore[assignment]
        from distro_optim.comm.iroh.node import dialling

        dialling.BESIDE_SECONDS = 1e9  # type: ignore[misc]

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Linear(32, 32)
    config = RunConfig(
        run_id="networks",
        total_steps=100_000,
        global_batch_size=24,
        min_peers=3,
        keep_peers=2,
        max_round_train_time=ROUND_SECONDS,
        epoch_time=3600,
        warmup_time=30,
    )
    optimizer = DisTrO(model.parameters(), lr=1e-3, **PUBLISHED)
    with SwarmSession(model, optimizer, config=config, dataset_size=10_000) as session:
        for round_ in session.rounds():
            inputs = torch.tensor([[float(index % 97)] * 32 for index in round_.indices])
            loss = (model(inputs) ** 2).mean()
            loss.backward()
            time.sleep(STEP_SECONDS)
            round_.finish(loss.item())
            optimizer.zero_grad()


# -- the command -------------------------------------------------------------------------------------------------------


def show(found: Found) -> str:
    silence = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in sorted(found.silence.items()))
    return (
        f"{found.case:13} {'watch' if found.watch else 'without':8} heard nothing of: {silence or '-'}; "
        f"longest round of the others {found.longest_round:.1f} s; {found.missed} of {found.rounds} rounds missed; "
        f"{found.epochs} new epochs"
    )


def main() -> int:
    if sys.argv[1:2] == ["peer"]:
        threading.excepthook = lambda args: os._exit(1)
        peer(Path(sys.argv[2]), sys.argv[3] == "1")
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="may be repeated; all if left out")
    parser.add_argument("--without", action="store_true", help="only with the watch turned off")
    parser.add_argument("--with", dest="only_with", action="store_true", help="only with the watch")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--keep", type=Path, help="folder for reports and logs")
    parser.add_argument("--after", type=float, default=AFTER_SECONDS, help="seconds watched after the change")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        command = ["unshare", "-Urn", sys.executable, __file__, "--inside", *sys.argv[1:]]
        return subprocess.run(command).returncode
    globals()["AFTER_SECONDS"] = args.after
    route_between_them()
    if any(CASES[name].relay for name in args.case or CASES):
        serve_relay()
    watches = [True] if args.only_with else [False] if args.without else [False, True]
    for name in args.case or CASES:
        for watch in watches:
            keep = None if args.keep is None else args.keep / f"{name}-{'watch' if watch else 'without'}"
            found = run_case(name, watch=watch, keep=keep)
            print(json.dumps(vars(found)) if args.json else show(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
