"""A whole run of three clients, each message of which is read by a decoder that shares nothing with ours."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typing_extensions import override

from client.processes import DISTRO, TINY_LLAMA, Server, write_state, write_tokens
from distro_optim.client.devices import LocalTrainers
from distro_optim.client.joining import join
from distro_optim.client.options import JoinOptions
from distro_optim.comm import changes
from distro_optim.comm.iroh.sharing import live, messages, requests, transfer
from distro_optim.comm.iroh.swarm import IrohSwarm
from distro_optim.comm.streams import split_address
from distro_optim.comm.swarm import Channel
from distro_optim.console import NO_FACTS, Display, Facts
from distro_optim.coordinator.ticket import RunTicket
from distro_optim.models import building
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.monitor.figures import Figures
from reference import wire_messages as wire

pytestmark = [pytest.mark.waiting, pytest.mark.slow(4)]

SECONDS = 120.0
RUN_STEPS = 18


class TcpTap:
    """Passes a server's TCP links on and keeps what goes either way."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._to = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.to_server: list[bytearray] = []
        self.to_client: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._to)
            self._sockets += [near, far]
            for kept, source, target in ((self.to_server, near, far), (self.to_client, far, near)):
                kept.append(bytearray())
                threading.Thread(target=self._pump, args=(source, target, kept[-1]), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                kept += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


class PeerTap:
    """What peers tell each other, as it came from or goes to the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gossip: dict[Channel, list[bytes]] = {channel: [] for channel in Channel}
        self.blobs: dict[bytes, bytes] = {}
        self.requests: list[bytes] = []
        self.answers: list[bytes] = []
        deliver, publish, fetch = IrohSwarm._deliver, IrohSwarm.publish, IrohSwarm.fetch
        for_request, for_answer = messages.decode_request, messages.decode_answer

        def delivered(swarm: IrohSwarm, channel: Channel, sealed: bytes, via: bytes | None = None) -> bool:
            self.gossip[channel].append(bytes(sealed))
            return deliver(swarm, channel, sealed, via)

        # Tensors that one of our own kind fetches in mid-epoch, when a result came too late, say: nothing of Psyche's.
        tensors: set[bytes] = set()

        async def published(swarm: IrohSwarm, data: bytes, tag: str) -> Any:
            if tag.startswith(live._TAG_PREFIX):
                tensors.add(blake3(data).digest())
            else:
                self.blobs[blake3(data).digest()] = bytes(data)
            return await publish(swarm, data, tag)

        async def fetched(swarm: IrohSwarm, ticket: Any, *arguments: Any, **settings: Any) -> bytes:
            data = await fetch(swarm, ticket, *arguments, **settings)
            if blake3(data).digest() not in tensors:
                self.blobs[blake3(data).digest()] = data
            return data

        monkeypatch.setattr(IrohSwarm, "_deliver", delivered)
        monkeypatch.setattr(IrohSwarm, "publish", published)
        monkeypatch.setattr(IrohSwarm, "fetch", fetched)
        monkeypatch.setattr(transfer, "decode_request", self._keeping(self.requests, for_request))
        monkeypatch.setattr(requests, "decode_answer", self._keeping(self.answers, for_answer))

    @staticmethod
    def _keeping(kept: list[bytes], read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def keep(data: bytes) -> Any:
            kept.append(bytes(data))
            return read(data)

        return keep


class Watcher(Display[Figures]):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.weights: dict[int, bytes] = {}
        self.news: list[str] = []

    @override
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        self.news.append(text)

    @override
    def update(self, figures: Figures) -> bool:
        view = figures.view
        self.fault = view.fault or self.fault
        if view.weights_step is not None and view.weights_root is not None:
            self.weights[view.weights_step] = view.weights_root
        return True


class ClientThread:
    """``distro-optim join`` in this process."""

    def __init__(self, options: JoinOptions) -> None:
        self.seen = Watcher()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, args=(options,), daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), self.seen.news
        assert self.error is None, (self.error, self.seen.news)

    def _main(self, options: JoinOptions) -> None:
        try:
            join(options, self.seen)
        except BaseException as error:
            self.error = error


def build_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody trains while a model is made: torch's default dtype, which is set then, is that of all threads."""
    lock = threading.RLock()

    def locked(work: Callable[..., Any]) -> Callable[..., Any]:
        def alone(*arguments: Any, **settings: Any) -> Any:
            with lock:
                return work(*arguments, **settings)

        return alone

    monkeypatch.setattr(building, "_construct", locked(building._construct))
    monkeypatch.setattr(LocalTrainers, "train", locked(LocalTrainers.train))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


class Recording:
    """All that was said."""

    def __init__(self, tcp: TcpTap, peers: PeerTap, clients: list[ClientThread]) -> None:
        self.to_server = [frame for stream in tcp.to_server for frame in wire.frames(bytes(stream))]
        self.to_client = [frame for stream in tcp.to_client for frame in wire.frames(bytes(stream))]
        self.peers = peers
        self.clients = clients


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    folder = tmp_path_factory.mktemp("run")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as monkeypatch:
        peers = PeerTap(monkeypatch)
        # As beside a server of Psyche's: it announces no changes, and gets no answer that asks for them.
        monkeypatch.setattr(changes, "announces", lambda challenge: False)
        build_models_alone(monkeypatch)
        data, vocab_size = write_tokens(folder, seq_len=32)
        model = folder / "tiny-llama"
        CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama").save_pretrained(model)
        (model / "tokenizer.json").write_text('{"version": "1.0"}')
        state = write_state(
            folder / "state.toml",
            total_steps=RUN_STEPS,
            epoch_time=6,
            warmup_time=5,
            max_round_train_time=5,
            checkpoint='{ Hub = { repo_id = "somebody/tiny-llama", revision = "main" } }',
            data_location=f'{{ Server = "127.0.0.1:{free_port()}" }}',
            optimizer=DISTRO,
        )
        server = Server(folder, state, "--data", str(data))
        stack.callback(server.end)
        ticket = RunTicket.parse(server.ticket)
        listening = next(r["address"] for r in server.records() if r["text"].startswith("listening on"))
        tap = TcpTap(split_address(listening))
        stack.callback(tap.close)
        through_tap = str(RunTicket(ticket.run_id, (tap.address,), ticket.endpoint))

        def client(own_model: Path | None) -> ClientThread:
            options = JoinOptions(
                run=through_tap, relay="none", device="cpu", logs="none", model=own_model, no_checkpoints=True
            )
            return ClientThread(options)

        clients = [client(model), client(model)]
        server.until(lambda: (server.latest("step") or 0) >= 2 or any(each.error for each in clients), "step 2")
        assert not any(each.error for each in clients), [each.error for each in clients]
        clients.append(client(None))  # gets the model from the others
        for each in clients:
            each.join()
        assert server.wait(60) == 0
        yield Recording(tap, peers, clients)


def read(shape: wire.Shape, messages: list[bytes]) -> list[Any]:
    """All of them, each of which must be written as it was."""
    assert messages
    values = [shape.decode(message) for message in messages]
    assert [shape.encode(value) for value in values] == messages
    return values


def kinds(values: list[Any]) -> Counter[str]:
    """Names of the innermost enum of each."""
    found: Counter[str] = Counter()
    for value in values:
        while isinstance(value, tuple) and isinstance(value[1], tuple):
            value = value[1]
        found[value[0]] += 1
    return found


def opened(sealed: bytes) -> tuple[bytes, bytes]:
    """Sender and content of a signed message, its signature verified."""
    (message,) = read(wire.SIGNED, [sealed])
    Ed25519PublicKey.from_public_bytes(message["sender"]).verify(message["signature"], message["data"])
    return message["sender"], message["data"]


def test_three_clients_trained_to_the_end_with_equal_weights(recording: Recording) -> None:
    assert not any(each.seen.fault for each in recording.clients)
    steps = set.intersection(*(set(each.seen.weights) for each in recording.clients))
    assert max(steps) > RUN_STEPS // 2
    for step in steps:
        assert len({each.seen.weights[step] for each in recording.clients}) == 1


def test_what_clients_send_to_the_coordinator_is_as_psyche_has_it(recording: Recording) -> None:
    values = read(wire.TO_SERVER, recording.to_server)
    said = kinds(values)
    assert said["ChallengeResponse"] == 3
    assert said["Join"] >= 3
    assert said["WitnessStep"] >= RUN_STEPS
    assert said["WarmupStep"] >= 5  # two clients in the first epoch, three in the second
    for name, content in values:
        if name == "ChallengeResponse":
            sender, challenge = opened(content)
            assert len(sender) == len(challenge) == 32


def test_what_the_coordinator_sends_is_as_psyche_has_it(recording: Recording) -> None:
    values = read(wire.TO_CLIENT, recording.to_client)
    assert kinds(values)["Challenge"] == 3
    states = [content[1] for name, content in values if name == "Else"]
    phases = {state["run_state"][0] for state in states}
    assert {"Warmup", "RoundTrain", "RoundWitness", "Cooldown", "Finished"} <= phases
    checkpoints = {state["model"][1]["checkpoint"][0] for state in states}
    assert checkpoints == {"Hub", "P2P"}
    assert max(len(state["epoch_state"]["clients"]) for state in states) == 3


def test_what_is_announced_is_as_psyche_has_it_and_says_the_truth(recording: Recording) -> None:
    messages = [opened(sealed) for sealed in recording.peers.gossip[Channel.RUN]]
    values = read(wire.BROADCAST, [data for _, data in messages])
    assert {value["data"][0] for value in values} == {"TrainingResult", "Finished"}
    checked = 0
    for (sender, _), value in zip(messages, values, strict=True):
        commitment = value["commitment"]
        Ed25519PublicKey.from_public_bytes(sender).verify(commitment["signature"], commitment["data_hash"])
        kind, content = value["data"]
        if kind == "Finished":
            assert commitment["data_hash"] == hashlib.sha256(content["broadcast_merkle"]).digest()
            continue
        assert content["ticket"]["id"] == sender
        assert content["ticket"]["format"][0] == "Raw"
        name, result = wire.BLOB.decode(recording.peers.blobs[content["ticket"]["hash"]])
        assert (name, result["step"], result["batch_id"]) == ("DistroResult", value["step"], content["batch_id"])
        digest = hashlib.sha256(
            value["step"].to_bytes(4, "big")
            + content["batch_id"]["start"].to_bytes(8, "big")
            + content["batch_id"]["end"].to_bytes(8, "big")
        )
        for entry in result["distro_results"]:
            digest.update(entry["sparse_idx"]["data"][1])
            digest.update(entry["sparse_val"]["data"][1])
        assert commitment["data_hash"] == digest.digest()
        checked += 1
    assert checked >= RUN_STEPS


def test_what_peers_of_our_kind_tell_each_other_has_the_documented_layout(recording: Recording) -> None:
    reports = read(wire.WEIGHTS_REPORT, [opened(sealed)[1] for sealed in recording.peers.gossip[Channel.OWN_KIND]])
    roots = [(report["step"], report["root"]) for report in reports]
    assert len(set(roots)) == len({step for step, _ in roots}) > RUN_STEPS // 2


def test_blobs_are_as_psyche_has_them(recording: Recording) -> None:
    values = read(wire.BLOB, list(recording.peers.blobs.values()))
    assert set(kinds(values)) == {"DistroResult", "ModelParameter", "ModelConfig"}
    (names,) = {tuple(content["names"]) for name, content in values if name == "ModelConfig"}
    assert list(names) == sorted(names, key=str.encode)
    assert {content["name"].decode() for name, content in values if name == "ModelParameter"} == set(names)
    assert {content["tokenizer"] for name, content in values if name == "ModelConfig"} == {'{"version": "1.0"}'}
    for name, content in values:
        if name == "DistroResult":
            assert len(content["distro_results"]) == len(names)
            for entry in content["distro_results"]:
                assert entry["sparse_idx"]["kind"] == b"\x00"  # uint8
                assert (entry["sparse_val"]["kind"], entry["sparse_val"]["data"][0]) == (b"\x0b", "OneBit")


def test_model_sharing_is_as_psyche_has_it(recording: Recording) -> None:
    assert any("the model comes from peers" in line for line in recording.clients[-1].seen.news)
    requests = read(wire.SHARING_REQUEST, recording.peers.requests)
    assert {name for name, _ in requests} == {"Config", "Parameter"}
    answers = read(wire.SHARING_ANSWER, recording.peers.answers)
    tickets = [content for name, content in answers if name == "Ok"]
    assert len({ticket["hash"] for ticket in tickets}) == len({content for _, content in requests})
    assert all(ticket["hash"] in recording.peers.blobs for ticket in tickets)
