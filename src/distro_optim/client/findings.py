"""What ``distro-optim doctor`` makes of what it has found: a line for each thing, and what to do. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ..comm.addresses import SocketAddr
from .round_cost import Line, RoundFacts, result_bytes, round_seconds

__all__ = [
    "Facts",
    "Finding",
    "HostFacts",
    "PeerFacts",
    "examine",
]

Verdict = Literal["good", "note", "bad"]
"""``note``: it works, or it is not known whether; there is something to know about it."""

CLOCK_SECONDS: Final = 5.0
"""A clock that is wrong by less changes nothing. By more, times in logs mislead; by hours, relay servers and downloads
are refused, since certificates seem to be over. Chosen arbitrarily."""

SLOW_ROUND_SECONDS: Final = 60.0
"""As long as a round lasts at most in a run with the defaults."""

USUAL_RATE: Final = 1_250_000.0
"""Bytes a second to reckon with where the line was not measured: 10 Mbit/s, which most lines at home can send."""

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PeerFacts:
    """Another client of the run.

    Attributes:
        key: its public key.
        rtt: seconds there and back; None if it was not reached.
        path: ``"direct"`` or ``"relayed"``.
        error: why it was not reached; None if it was.
    """

    key: bytes
    rtt: float | None = None
    path: str = ""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """The coordinator of a run.

    Attributes:
        name: what we call it.
        error: why it was not reached; None if it was.
        run_id: the run.
        phase: of the run, such as ``"ROUND_TRAIN"``.
        num_clients: in its epoch.
        clock_ahead: seconds by which its clock is ahead of ours for sure.
        path, rtt: of the line, as far as known.
        line: None if it could not be measured.
        line_error: why it was not.
        peers: those that we tried to reach.
    """

    name: str
    error: str | None = None
    run_id: str = ""
    phase: str = ""
    num_clients: int = 0
    clock_ahead: float = 0.0
    path: str = ""
    rtt: float | None = None
    line: Line | None = None
    line_error: str = ""
    peers: tuple[PeerFacts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found. Whatever could not be found is None.

    Attributes:
        bind_error: why no UDP port could be opened; None if one was.
        port: the UDP port that was opened for IPv4.
        own: addresses of this machine's interfaces, without ports.
        seen: where our endpoint is reached, as iroh knows.
        relay: the relay server that answered.
        relays_wanted: whether there should be one.
        clock_offset: seconds by which our clock is ahead of that of a time server.
        arithmetic: hash of the self-test.
        arithmetic_expected: what it is on every machine.
        disk_free: bytes, in ``disk_path``.
        device: on which a model would be.
        memory_free: bytes there.
        memory_needed: bytes that training the model takes without activations.
        host: of the run that was asked about.
        round: the model that was asked about.
    """

    bind_error: str | None = None
    port: int = 0
    own: frozenset[str] = frozenset()
    seen: tuple[SocketAddr, ...] = ()
    relay: str | None = None
    relays_wanted: bool = True
    clock_offset: float | None = None
    arithmetic: str = ""
    arithmetic_expected: str = ""
    disk_path: str = "."
    disk_free: int | None = None
    device: str = "cpu"
    memory_free: int | None = None
    memory_needed: int | None = None
    host: HostFacts | None = None
    round: RoundFacts | None = None


@dataclass(frozen=True)
class Finding:
    """A line of the answer.

    Attributes:
        about: what it is about, in a word or two.
        verdict: how it is.
        found: what was found.
        to_do: what to do about it, or with it.
    """

    about: str
    verdict: Verdict
    found: str
    to_do: str


def examine(facts: Facts) -> list[Finding]:
    """All there is to say, in the order in which it is to be read."""
    found = [*_network(facts), _clock(facts), _arithmetic(facts), *_room(facts)]
    if facts.host is not None:
        found += _run(facts.host)
    if facts.round is not None:
        found.append(_round(facts.round, facts.host))
    return found


# -- the network -------------------------------------------------------------------------------------------------------


def _network(facts: Facts) -> Iterator[Finding]:
    if facts.bind_error is not None:
        yield Finding(
            "UDP", "bad", f"no UDP port can be opened: {facts.bind_error}", "allow it in the firewall of this machine"
        )
        return
    outside = [address for address in facts.seen if address.ip.is_global]
    yield _udp(facts, outside)
    yield _addresses(facts, outside)
    if facts.relays_wanted:
        yield _relay(facts)
    yield _nat(facts, [address for address in outside if address.ip.version == 4])


def _udp(facts: Facts, outside: Sequence[SocketAddr]) -> Finding:
    if outside or facts.clock_offset is not None:
        return Finding("UDP", "good", "goes out and is answered", "nothing")
    if facts.relay is not None:
        return Finding(
            "UDP",
            "bad",
            "a relay server answers over HTTPS, but nothing over UDP",
            "let UDP out in the router or firewall; until then everything goes through the relay, slowly",
        )
    return Finding(
        "UDP",
        "note",
        f"port {facts.port} can be opened; nothing outside of this network answered",
        "peers in the same network can be reached: give --relay none to all; for others look at the line to the "
        "internet",
    )


def _addresses(facts: Facts, outside: Sequence[SocketAddr]) -> Finding:
    six = [address for address in outside if address.ip.version == 6]
    own = ", ".join(sorted(facts.own)) or "none"
    if six:
        return Finding("addresses", "good", f"IPv4 and IPv6 ({own})", "nothing")
    return Finding(
        "addresses",
        "note",
        f"{own}; no IPv6 address that the internet reaches",
        "nothing, or switch IPv6 on in the router: with it most NATs are out of the way",
    )


def _relay(facts: Facts) -> Finding:
    if facts.relay is not None:
        return Finding("relay", "good", facts.relay, "nothing: peers that cannot reach us directly come through it")
    return Finding(
        "relay",
        "bad",
        "no relay server answered",
        "let HTTPS out, or name one of your own with --relay URL; among machines of one network give --relay none",
    )


def _nat(facts: Facts, outside: Sequence[SocketAddr]) -> Finding:
    if not outside:
        return Finding(
            "NAT",
            "note",
            "how others see us is not known",
            "if a port is forwarded to this machine, say so: --bind-p2p-port N --external-addr IP:N; else peers need a "
            "relay, or to be in this network",
        )
    address = outside[0]
    if str(address.ip) in facts.own:
        return Finding("NAT", "good", f"none: {address} is this machine's own", "let UDP in at the firewall")
    if address.port == facts.port:
        return Finding(
            "NAT", "good", f"we are seen at {address}, with the port that we have", "nothing: direct paths will do"
        )
    return Finding(
        "NAT",
        "note",
        f"we are seen at {address}, and our port is {facts.port}",
        "nothing, if direct paths come about (a ticket shows that: doctor TICKET); else forward a port, or use IPv6",
    )


# -- this machine ------------------------------------------------------------------------------------------------------


def _clock(facts: Facts) -> Finding:
    offset = facts.clock_offset
    if offset is None:
        return Finding("clock", "note", "no time server answered", "look whether the time of this machine is right")
    if abs(offset) <= CLOCK_SECONDS:
        return Finding("clock", "good", f"right within {abs(offset):.1f} s", "nothing")
    way = "ahead" if offset > 0 else "behind"
    return Finding(
        "clock", "bad", f"{abs(offset):.0f} s {way}", "set it: timedatectl set-ntp true, or the system's settings"
    )


def _arithmetic(facts: Facts) -> Finding:
    if facts.arithmetic == facts.arithmetic_expected:
        return Finding("arithmetic", "good", "the self-test gives what it gives everywhere", "nothing")
    return Finding(
        "arithmetic",
        "bad",
        f"the self-test gives {facts.arithmetic[:16]}, and {facts.arithmetic_expected[:16]} everywhere else",
        "test the memory of this machine, and try another version of PyTorch: weights would come to differ here",
    )


def _room(facts: Facts) -> Iterator[Finding]:
    model = facts.round
    saved = None if model is None else model.parameters * (model.element_bytes + 4)
    if facts.disk_free is not None:
        free = f"{_size(facts.disk_free)} free in {facts.disk_path}"
        if saved is None:
            yield Finding("disk", "good", free, "nothing; name a model (--parameters N) to see what it takes")
        elif 4 * saved <= facts.disk_free:
            yield Finding("disk", "good", f"{free}; a checkpoint takes {_size(saved)}", "nothing")
        else:
            yield Finding(
                "disk",
                "bad",
                f"{free}; a checkpoint takes {_size(saved)}, and three are kept while a fourth is written",
                "make room, name another folder with --checkpoint-dir, or keep fewer (--keep-steps 1)",
            )
    if facts.memory_free is not None:
        free = f"{_size(facts.memory_free)} free on {facts.device}"
        if facts.memory_needed is None:
            yield Finding("memory", "good", free, "nothing; name a model (--parameters N) to see what it takes")
        elif facts.memory_needed <= facts.memory_free:
            yield Finding(
                "memory",
                "good",
                f"{free}; the model takes {_size(facts.memory_needed)}, activations on top",
                "nothing; if the activations are too much, give a smaller --micro-batch-size",
            )
        else:
            yield Finding(
                "memory",
                "bad",
                f"{free}; the model takes {_size(facts.memory_needed)}, activations on top",
                "use a device with more memory, end what else runs on it, or train a smaller model",
            )


# -- a run -------------------------------------------------------------------------------------------------------------


def _run(host: HostFacts) -> Iterator[Finding]:
    if host.error is not None:
        yield Finding(
            "host",
            "bad",
            host.error,
            "ask its operator whether it runs, and for its latest ticket; if it is in another network, both sides need "
            "a relay, or the host a forwarded port",
        )
        return
    phase = host.phase.lower().replace("_", " ")
    yield Finding(
        "host",
        "good",
        f"run {host.run_id!r} answers: {phase}, {host.num_clients} in its epoch",
        "join with this ticket",
    )
    if host.clock_ahead > CLOCK_SECONDS:
        yield Finding(
            "clock of the host",
            "note",
            f"at least {host.clock_ahead:.0f} s ahead of ours",
            "set the one that is wrong; the run goes on regardless, but seconds that are told will be wrong",
        )
    yield _line(host)
    for peer in host.peers:
        name = f"peer {peer.key.hex()[:8]}"
        if peer.error is None:
            trip = "" if peer.rtt is None else f", {peer.rtt * 1000:.0f} ms there and back"
            yield Finding(name, "good", f"reached {peer.path}{trip}", "nothing")
        else:
            yield Finding(
                name,
                "note",
                peer.error,
                "nothing yet: the host tells peers where the others are once you have joined",
            )


def _line(host: HostFacts) -> Finding:
    trip = "" if host.rtt is None else f", {host.rtt * 1000:.0f} ms there and back"
    if host.line is None:
        return Finding(
            "line to the host",
            "note",
            f"not measured{trip}: {host.line_error}",
            "nothing, or ask for a ticket (psyche1...) of a host that is reached over iroh",
        )
    speed = f"{host.path}{trip}, {_rate(host.line.up)} up, {_rate(host.line.down)} down"
    if host.path == "relayed":
        return Finding(
            "line to the host",
            "note",
            speed,
            "the relay carries it: forward a UDP port on one of the two sides, or use IPv6, for a direct path",
        )
    return Finding("line to the host", "good", speed, "nothing")


# -- a round -----------------------------------------------------------------------------------------------------------


def _round(model: RoundFacts, host: HostFacts | None) -> Finding:
    measured = host.line if host is not None else None
    line = measured if measured is not None else Line(USUAL_RATE, USUAL_RATE)
    size = result_bytes(model)
    up, down = round_seconds(model, line, (host.rtt or 0.0) if host is not None else 0.0)
    seconds, limit = max((up, "what we can send"), (down, "what we can receive"))
    basis = "on the measured line" if measured is not None else "at 10 Mbit/s (not measured: give a ticket)"
    found = (
        f"{model.parameters:,} parameters, {model.peers} peers: a result has {_size(size)}; a round sends and receives "
        f"{_size(size * (model.peers - 1))} in at least {seconds:.1f} s {basis}, besides the training; {limit} is the "
        "limit"
    )
    if seconds > SLOW_ROUND_SECONDS:
        return Finding(
            "a round",
            "bad",
            found,
            "a round lasts 60 s at most by default: raise max_round_train_time, train longer in a round (a larger "
            "global_batch_size), or give a smaller compression_topk",
        )
    if seconds > 1.0:
        return Finding(
            "a round",
            "note",
            found,
            f"choose a global_batch_size with which a step takes more than {seconds:.0f} s: sending goes on beside it",
        )
    return Finding("a round", "good", found, "nothing: it goes on beside the training")


def _size(count: float) -> str:
    for unit, size in (("GiB", _GIB), ("MiB", _MIB), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e6:.3g} Mbit/s"
