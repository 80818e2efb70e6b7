"""Coverage-guided fuzzing of everything that reads a stranger's bytes.

::

    $ make fuzz SECONDS=60                                every target, 60 seconds each
    $ python tests/fuzz/fuzz_decoders.py archive --seconds 600 --corpus out/fuzz

A target may raise ProtocolError and nothing else. With ``pip install atheris`` paths through the decoders are watched,
and an input that takes 5 seconds or a gigabyte is a finding as well; libFuzzer leaves it in a file and prints the name.
What it found of new paths is kept in the corpus. Without atheris valid inputs are changed at random.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a program

from fuzz.file_targets import FILE_INSTRUMENTED, FILE_TARGETS, file_seeds, refused_with

if TYPE_CHECKING:
    from distro_optim.compress import TilePlan

TIMEOUT_SECONDS: Final = 5
MEMORY_MB: Final = 1024
# Longer than any message, so that length fields can point anywhere.
MAX_INPUT: Final = 16384

# What the fuzzer watches the paths through.
INSTRUMENTED: Final = (
    "comm.announcements",
    "comm.carrying",
    "comm.changes",
    "comm.iroh.blobs.decoder",
    "comm.iroh.blobs.request",
    "comm.iroh.gossip.frames",
    "comm.iroh.gossip.messages",
    "comm.iroh.gossip.peer_data",
    "comm.iroh.local_discovery",
    "comm.iroh.meeting_place",
    "comm.iroh.sharing.messages",
    "comm.iroh.sharing.torchscript",
    "comm.iroh.whereabouts",
    "comm.postcard",
    "comm.question",
    "comm.tickets",
    "compress.wire",
    "compress.wire_bulk",
    "compress.wire_tensor",
    "coordinator.formats.borsh",
    "coordinator.formats.raw",
    "coordinator.ledger",
    "coordinator.messages",
    "coordinator.ticket",
    "protocol",
    "strategy.model.identity",
    "strategy.network.newest",
    "strategy.rounds.audits.momentum_messages",
    "strategy.rounds.audits.reports",
    "strategy.rounds.broadcasts",
    "strategy.rounds.results",
    "strategy.rounds.trust.succession_messages",
    "verify.calibrate",
    "verify.momentum",
    "verify.opening",
    *FILE_INSTRUMENTED,
)

Target = Callable[[bytes], object]


def gossip_message(data: bytes) -> None:
    from distro_optim.comm.iroh.gossip.messages import decode_message, encode_message

    message = decode_message(memoryview(data))
    assert decode_message(memoryview(encode_message(message))) == message


def gossip_frames(data: bytes) -> None:
    from distro_optim.comm.iroh.gossip.frames import FrameReader

    # The first byte says how the rest is cut into pieces.
    step = data[0] + 1 if data else 1
    pieces, whole = FrameReader(4096), FrameReader(4096)
    cut = [bytes(frame) for at in range(0, len(data), step) for frame in pieces.feed(data[at : at + step])]
    assert cut == [bytes(frame) for frame in whole.feed(data)]


def peer_data(data: bytes) -> None:
    from distro_optim.comm.iroh.gossip.peer_data import decode_peer_data

    decode_peer_data(bytes(32), data)


def local_file(data: bytes) -> None:
    from distro_optim.comm.iroh.local_discovery import decode_local_file, encode_local_file

    address = decode_local_file(bytes(32), data)
    assert decode_local_file(bytes(32), encode_local_file(address)) == address


def blob_request(data: bytes) -> None:
    from distro_optim.comm.iroh.blobs.request import pull_request

    pull_request(data)


def blob_response(data: bytes) -> None:
    from distro_optim.comm.iroh.blobs.decoder import Decoder
    from distro_optim.comm.iroh.blobs.ranges import ALL

    decoder = Decoder(data[:32].ljust(32, b"\0"), ALL, max_size=1 << 16)
    for _ in decoder.receive(data[32:]):
        pass
    for _ in decoder.finish():
        pass


def blob_ticket(data: bytes) -> None:
    from distro_optim.comm import postcard
    from distro_optim.comm.tickets import BlobTicket

    ticket = postcard.decode(BlobTicket, data)
    assert postcard.decode(BlobTicket, postcard.encode(ticket)) == ticket


def ticket_text(data: bytes) -> None:
    from distro_optim.comm.tickets import BlobTicket, EndpointTicket

    text = data.decode("latin-1")
    kind = EndpointTicket if text.startswith("endpoint") else BlobTicket
    ticket = kind.parse(text)
    assert kind.parse(str(ticket)) == ticket


def model_messages(data: bytes) -> None:
    from distro_optim.comm.iroh.sharing import messages as sharing_messages
    from distro_optim.comm.iroh.sharing.live import decode_live_request
    from distro_optim.errors import NotSharedError

    decoders: list[Target] = [
        sharing_messages.decode_request,
        sharing_messages.decode_answer,
        sharing_messages.decode_blob,
        decode_live_request,
    ]
    try:
        decoders[data[0] % len(decoders) if data else 0](data[1:])
    except NotSharedError:
        pass


def archive(data: bytes) -> None:
    from distro_optim.comm.iroh.sharing.torchscript import read_tensor

    assert read_tensor(data).untyped_storage().nbytes() <= len(data)


def tensor_program(data: bytes) -> None:
    from distro_optim.comm.iroh.sharing._tensor_pickle import read_tensor_record

    read_tensor_record(b"\x80\x02" + data, "0")


def announcement(data: bytes) -> None:
    from distro_optim.comm.announcements import AnnouncementInbox

    inbox = AnnouncementInbox(bytes(32), salt=b"")
    assert inbox.receive(data) is None
    assert inbox.counts.malformed + inbox.counts.refused == 1


@functools.cache
def results_plan() -> TilePlan:
    import torch

    from distro_optim.compress import ParamSpec, make_plan

    cpu = torch.device("cpu")
    return make_plan([ParamSpec(shape, torch.float32, cpu, 0, 8, 3) for shape in ((12, 9), (), (0, 2))], "padded")


def result(data: bytes) -> None:
    from distro_optim.compress.wire import decode_download
    from distro_optim.coordinator.types import BatchId
    from distro_optim.errors import ProtocolError
    from distro_optim.strategy.rounds import results
    from distro_optim.testing.updates import same_update

    plan = results_plan()
    # A liar knows what to announce.
    said = decode_download(data, max_results=len(plan))
    batch, data_hash = BatchId(*said.batch_id), results.commitment_hash(said)
    made = []
    for read in (results.read_result, results.read_any_result):
        try:
            made.append(read(data, step=said.step, batch=batch, data_hash=data_hash, plan=plan).update)
        except ProtocolError:
            pass
    assert len(made) != 1, "the shortcut and the general decoder disagree"
    assert not made or same_update(*made)
    for update in made:
        update.check()


def solana_instruction(data: bytes) -> None:
    from distro_optim.coordinator.solana import arguments

    tables = [
        arguments.COORDINATOR_INSTRUCTIONS,
        arguments.AUTHORIZER_INSTRUCTIONS,
        arguments.TREASURER_INSTRUCTIONS,
        arguments.coordinator_instructions(2),
        arguments.treasurer_instructions(2),
    ]
    for table in tables:
        # The first byte chooses the instruction; hardly any input would begin with one of their names.
        kind = list(table.values())[data[0] % len(table)] if data else None
        given = b"" if kind is None else arguments.discriminator_of(kind) + data[1:]
        found = arguments.decode_arguments(table, given)[1]
        if found is not None:
            again = arguments.encode_arguments(found)
            assert arguments.encode_arguments(arguments.decode_arguments(table, again)[1]) == again


def solana_account(data: bytes) -> None:
    from distro_optim.coordinator.solana import small_accounts

    kinds: list[type[Any]] = [
        small_accounts.CoordinatorInstance,
        small_accounts.Authorization,
        small_accounts.Treasury,
        small_accounts.Participant,
    ]
    kind = kinds[data[0] % len(kinds) if data else 0]
    value: Any = small_accounts.read_small_account(kind, small_accounts.discriminator_of(kind) + data[1:])
    written = small_accounts.write_small_account(value, 0)
    assert small_accounts.read_small_account(kind, written) == value


def client_message(data: bytes) -> None:
    from distro_optim.coordinator.messages import CLIENT_TO_SERVER

    message = CLIENT_TO_SERVER.decode(data)
    assert CLIENT_TO_SERVER.decode(CLIENT_TO_SERVER.encode(message)) == message


def meeting_question(data: bytes) -> None:
    """What a coordinator answers to a question, and what one who asks makes of any answer."""
    from distro_optim.comm.addresses import EndpointAddr
    from distro_optim.comm.iroh.meeting_place import MeetingPlace, TcpQuestion
    from distro_optim.comm.signing import SecretKey

    key, is_answer, data = SecretKey(bytes(32)), data[:1] == b"\1", data[1:]
    if is_answer:
        question = TcpQuestion(key, EndpointAddr(key.public))
        question.receive(bytes.fromhex("0000002100") + bytes(32))
        question.receive(data)
    else:
        MeetingPlace(lambda peer: True).answer(key.public, data)


def why_closed(data: bytes) -> None:
    from distro_optim.comm.question import Question
    from distro_optim.comm.signing import SecretKey
    from distro_optim.coordinator.why_closed import MAX_REASON_BYTES, WHY_CLOSED, WhyClosed

    question: Question[WhyClosed] = Question(SecretKey(bytes(32)), WHY_CLOSED, WhyClosed, 1024)
    question.receive(bytes.fromhex("0000002100") + bytes(32))
    question.receive(data)
    if question.answer is not None:
        assert len(question.answer.reason.encode()) <= MAX_REASON_BYTES


def who_watches(data: bytes) -> None:
    from distro_optim.comm.question import Question
    from distro_optim.comm.signing import SecretKey
    from distro_optim.coordinator.watchers import MAX_WATCHERS, WHO_WATCHES, Keys

    question: Question[list[bytes]] = Question(SecretKey(bytes(32)), WHO_WATCHES, Keys, 1024)
    question.receive(bytes.fromhex("0000002100") + bytes(32))
    question.receive(data)
    if question.answer is not None:
        assert len(question.answer) <= MAX_WATCHERS
        assert all(len(key) == 32 for key in question.answer)


def coordinator_state(data: bytes) -> None:
    from distro_optim.coordinator.messages import SERVER_TO_CLIENT

    SERVER_TO_CLIENT.decode(data)  # floats may be NaN, which equal nothing


def run_ticket(data: bytes) -> None:
    from distro_optim.coordinator.ticket import RunTicket

    ticket = RunTicket.parse(data.decode("latin-1"))
    assert RunTicket.parse(str(ticket)) == ticket


def broadcast(data: bytes) -> None:
    from distro_optim.comm import postcard
    from distro_optim.strategy.rounds.broadcasts import Broadcast, WeightsReport

    kind: type[Any] = (Broadcast, WeightsReport)[data[0] & 1 if data else 0]
    value = postcard.decode(kind, data[1:])
    assert postcard.decode(kind, postcard.encode(value)) == value


def newest_rounds(data: bytes) -> None:
    """What peers answer to a host that has started again: a state, or a claim that is signed as it has to be."""
    from distro_optim.comm import postcard
    from distro_optim.comm.signing import SecretKey, SignedMessage
    from distro_optim.strategy.network import newest

    if data[:1] == b"\0":
        answer = postcard.decode(newest.Newest, data[1:])
        assert postcard.decode(newest.Newest, postcard.encode(answer)) == answer
        newest.live_state(answer, "run")
    else:
        newest.read_claim(SignedMessage.seal(SecretKey(bytes(32)), data[1:]), "run", bytes(32))


def succession_letter(data: bytes) -> None:
    """What anybody says about who hosts, signed as it has to be; and what a peer makes of it."""
    from distro_optim.comm import postcard
    from distro_optim.comm.signing import SecretKey, SignedMessage
    from distro_optim.errors import ProtocolError
    from distro_optim.strategy.rounds.trust import succession_messages as messages
    from distro_optim.strategy.rounds.trust.succeeding import Succession

    host, me = SecretKey(bytes(32)), SecretKey(bytes(31) + b"\1")
    run = messages.run_mark("run")
    letters = [messages.MARK + data]
    letters.append(messages.MARK + SignedMessage.seal(host, messages.MARK + data))
    letters.append(messages.MARK + SignedMessage.seal(host, messages.MARK + run + b"\0" + data))
    peer = Succession(me, "run", number=bytes(8), host=host.public)
    failures = []
    for letter in letters:
        try:
            _, said = messages.open_letter(run, letter)
        except ProtocolError as error:
            failures.append(error)
            continue
        assert postcard.decode(messages.Letter, postcard.encode(messages.Letter(run, 0, said))).said == said
        try:
            peer.receive(letter, 0.0)
        except ProtocolError as error:
            failures.append(error)
        peer.tick(1.0)
    if len(failures) == len(letters):
        raise failures[-1]


def introduction(data: bytes) -> None:
    from distro_optim.protocol import OURS, Speaks, why_apart

    speaks = Speaks.decode(data)
    assert Speaks.decode(speaks.encode()) == speaks
    assert (why_apart(OURS, speaks, us="us", them="them") or "").isprintable()


def model_identity(data: bytes) -> None:
    from distro_optim.strategy.model.identity import ModelIdentity

    identity = ModelIdentity.decode(data.decode("utf-8", "replace"))
    if identity is not None:
        for sentence in [str(identity.first_difference(identity)), *identity.harmless_differences(identity)]:
            assert sentence.isprintable()


def audit_limits(data: bytes) -> None:
    from distro_optim.verify.calibrate import Limits

    limits = Limits.decode(data)
    assert Limits.decode(limits.encode()) == limits


def ledger_line(data: bytes) -> None:
    from distro_optim.coordinator.ledger import check_ledger

    assert check_ledger([data]).lines == 1


def audit_report(data: bytes) -> None:
    from distro_optim.strategy.rounds.audits.reports import MARK, decode_report, encode_report

    # Nothing that does not begin with the mark gets any further.
    report = decode_report(data if data.startswith(MARK) else MARK + data)
    assert decode_report(encode_report(report)) == report


def carried_blob(data: bytes) -> None:
    from distro_optim.comm.carrying import MARK, carries, pack, unpack

    whole = data if carries(data) else MARK + data
    assert pack(*unpack(whole)) == whole


def momentum_message(data: bytes) -> None:
    from distro_optim.strategy.rounds.audits.momentum_messages import decode_momentum_message, is_momentum_message

    # The first byte chooses a kind of message, where the mark is missing.
    marked = (
        data if is_momentum_message(data) else b"\xff\xff\xff\xff" + bytes([2 + data[0] % 3 if data else 2]) + data[1:]
    )
    message = decode_momentum_message(marked)
    assert decode_momentum_message(message.encode()) == message


def momentum_commitment(data: bytes) -> None:
    from distro_optim.verify.momentum import MomentumCommitment

    assert MomentumCommitment.decode(data).encode() == data


def momentum_opening(data: bytes) -> None:
    from distro_optim.verify.opening import decode_opening, encode_opening, max_opening_bytes

    plan = results_plan()
    opening = decode_opening(data, plan)
    again = decode_opening(encode_opening(opening, plan), plan)
    assert (again.step, again.leaves) == (opening.step, opening.leaves)
    assert all((one == other).all() for one, other in zip(again.signs, opening.signs, strict=True))
    assert len(data) <= max_opening_bytes(plan)


def data_answer(data: bytes) -> None:
    from distro_optim.coordinator.messages import DATA_SERVER_TO_CLIENT

    message = DATA_SERVER_TO_CLIENT.decode(data)
    assert DATA_SERVER_TO_CLIENT.decode(DATA_SERVER_TO_CLIENT.encode(message)) == message


def whereabouts(data: bytes) -> None:
    from distro_optim.comm import postcard
    from distro_optim.comm.iroh.whereabouts import read_whereabouts

    found = read_whereabouts(data)
    assert read_whereabouts(postcard.encode(found)) == found


def rendezvous_answer(data: bytes) -> None:
    from distro_optim.comm import postcard
    from distro_optim.comm.iroh import meeting_place

    members = postcard.decode(meeting_place.Members, data)
    assert len(members) <= meeting_place.MAX_MEMBERS


def served_link(data: bytes) -> None:
    from distro_optim.comm.serving.connection import Connection
    from distro_optim.comm.serving.limits import ServerLimits
    from distro_optim.coordinator.messages import CLIENT_TO_SERVER, SERVER_TO_CLIENT

    link = Connection(bytes(32), CLIENT_TO_SERVER, SERVER_TO_CLIENT, address="a:1", limits=ServerLimits(), now=0.0)
    assert link.receive(data, 0.0) == []  # nobody has proved a key
    assert not link.is_open


BEFORE: Final = b"\1" + bytes(range(251)) * 80
"""What a frame changes: more than one piece."""


def frame_change(data: bytes) -> None:
    from distro_optim.comm import changes

    assert len(changes.apply(BEFORE, b"\2" + data, limit=1 << 18)) <= 1 << 18


def state_file(data: bytes) -> None:
    from distro_optim.coordinator.formats.text import from_json, to_json
    from distro_optim.coordinator.types import Coordinator
    from distro_optim.errors import ConfigurationError

    with refused_with(ConfigurationError):
        state = from_json(Coordinator, data.decode("utf-8", "replace"))
        assert from_json(Coordinator, to_json(state)) == state


def bucket_listing(data: bytes) -> None:
    from distro_optim.data.web.files import read_listing
    from distro_optim.errors import ConfigurationError, InvalidDataError

    with refused_with(InvalidDataError, ConfigurationError):
        read_listing(data)


def mixture_file(data: bytes) -> None:
    from distro_optim.data.mixture_file import read_mixture
    from distro_optim.errors import InvalidDataError

    with refused_with(InvalidDataError):
        read_mixture(data)


def token_sidecar(data: bytes) -> None:
    from distro_optim.coordinator.formats.text import from_json
    from distro_optim.data.sidecar import Sidecar
    from distro_optim.errors import ConfigurationError

    with refused_with(ConfigurationError):
        from_json(Sidecar, data.decode("utf-8", "replace"))


TARGETS: Final[dict[str, Target]] = {
    "gossip-message": gossip_message,
    "gossip-frames": gossip_frames,
    "peer-data": peer_data,
    "local-file": local_file,
    "blob-request": blob_request,
    "blob-response": blob_response,
    "blob-ticket": blob_ticket,
    "ticket-text": ticket_text,
    "model-messages": model_messages,
    "archive": archive,
    "tensor-program": tensor_program,
    "announcement": announcement,
    "result": result,
    "solana-instruction": solana_instruction,
    "solana-account": solana_account,
    "client-message": client_message,
    "meeting-question": meeting_question,
    "why-closed": why_closed,
    "who-watches": who_watches,
    "coordinator-state": coordinator_state,
    "run-ticket": run_ticket,
    "broadcast": broadcast,
    "newest-rounds": newest_rounds,
    "succession-letter": succession_letter,
    "model-identity": model_identity,
    "audit-limits": audit_limits,
    "audit-report": audit_report,
    "carried-blob": carried_blob,
    "momentum-message": momentum_message,
    "ledger-line": ledger_line,
    "momentum-commitment": momentum_commitment,
    "momentum-opening": momentum_opening,
    "introduction": introduction,
    "data-answer": data_answer,
    "rendezvous-answer": rendezvous_answer,
    "whereabouts": whereabouts,
    "served-link": served_link,
    "frame-change": frame_change,
    "state-file": state_file,
    "bucket-listing": bucket_listing,
    "mixture-file": mixture_file,
    "token-sidecar": token_sidecar,
    **FILE_TARGETS,
}


def seeds() -> dict[str, list[bytes]]:
    """Inputs to begin with; at least one of each is valid."""
    import torch
    from blake3 import blake3

    from distro_optim.comm import carrying, postcard
    from distro_optim.comm.addresses import EndpointAddr, SocketAddr
    from distro_optim.comm.changes import change_of
    from distro_optim.comm.framing import Else
    from distro_optim.comm.framing import encode_frame as encode_tcp_frame
    from distro_optim.comm.iroh import meeting_place
    from distro_optim.comm.iroh.blobs.request import GetRequest, push_request
    from distro_optim.comm.iroh.gossip.frames import encode_frame, encode_header
    from distro_optim.comm.iroh.gossip.peer_data import encode_peer_data
    from distro_optim.comm.iroh.local_discovery import encode_local_file
    from distro_optim.comm.iroh.sharing import messages as sharing
    from distro_optim.comm.iroh.sharing._stored_zip import read_entries
    from distro_optim.comm.iroh.sharing.torchscript import write_tensor
    from distro_optim.comm.iroh.whereabouts import Whereabouts
    from distro_optim.comm.signing import SecretKey, SignedMessage
    from distro_optim.comm.tickets import BlobTicket, EndpointTicket
    from distro_optim.coordinator.formats.text import to_json
    from distro_optim.coordinator.ledger import Entry, write_line
    from distro_optim.coordinator.messages import (
        CLIENT_TO_SERVER,
        DATA_SERVER_TO_CLIENT,
        SERVER_TO_CLIENT,
        CoordinatorMessage,
        Join,
        RejectionReason,
        RequestRejected,
    )
    from distro_optim.coordinator.model import TokenSize
    from distro_optim.coordinator.rules.points import ClientAccount, EpochAccount
    from distro_optim.coordinator.solana import arguments, small_accounts
    from distro_optim.coordinator.ticket import RunTicket
    from distro_optim.coordinator.types import BatchId, NodeIdentity, Witness, WitnessProof
    from distro_optim.coordinator.watchers import encode_watchers
    from distro_optim.coordinator.why_closed import WhyClosed
    from distro_optim.data.sidecar import Sidecar
    from distro_optim.strategy.config import RunConfig
    from distro_optim.strategy.model.identity import ModelIdentity, TensorIdentity
    from distro_optim.strategy.network import newest
    from distro_optim.strategy.rounds.audits.momentum_messages import (
        Distances,
        MomentumReport,
        MomentumSaid,
        OpeningSaid,
        Outcome,
    )
    from distro_optim.strategy.rounds.audits.reports import AuditReport, Compared, encode_report
    from distro_optim.strategy.rounds.results import encode_result
    from distro_optim.strategy.rounds.trust import succession_messages
    from distro_optim.strategy.rounds.trust.estate import Estate
    from distro_optim.strategy.rounds.trust.saved_step import SavedStep
    from distro_optim.strategy.rounds.weights import weights_report
    from distro_optim.testing.updates import random_update
    from distro_optim.verify.calibrate import LOOSEST
    from distro_optim.verify.momentum import MomentumCommitment, Snapshot
    from distro_optim.verify.opening import encode_opening, make_opening

    momentum = Snapshot(results_plan(), [torch.arange(-5.0, 103).reshape(12, 9), torch.tensor(2.0), torch.zeros(0, 2)])
    state = RunConfig(total_steps=5, global_batch_size=4).coordinator_state("run")
    counts, far = Compared(700, 1000, 500, 990, 300, 100, 1000, 1000), Distances.of(0.1, 0.0, 0.2)
    weight = TensorIdentity("weight", "trained", "float32", (2, 3))
    identity = ModelIdentity(1, 2, bytes(32), (weight,), {"tiling": "padded"}, ({"lr": 0.1},), {"size": 5})
    places = (SocketAddr.parse("127.0.0.1:1234"), SocketAddr.parse("[2001:db8::1]:4433"))
    address = EndpointAddr(b"\xaa" * 32, ("https://r.example./",), places)
    ticket = BlobTicket.raw(address, b"\xbb" * 32)
    tensor = write_tensor(torch.arange(6.0).reshape(2, 3))
    key = b"\xaa" * 32
    name = SecretKey(bytes(32)).public + bytes(succession_messages.NUMBER_SIZE)
    signer, done = SecretKey(bytes(32)), EpochAccount(1, 1, 9, {key: ClientAccount(batches=3, healthy=True, equal=5)})
    claim = newest.claim_of(SavedStep("run", 1, 2, 3), signer, bytes(32))
    # The vectors of the protocol's description.
    gossip = [
        b"\0\0\0",
        b"\0\1" + key + b"\1\2\1\2\6",
        b"\0\2" + key + b"\1" + key + b"\0\6",
        b"\0\3\0",
        b"\0\4\1\1\0",
        b"\0\5\1\0",
        b"\1\0" + key + b"\2hi\0\0",
        b"\1\1",
        b"\1\2\1" + key + b"\0",
        b"\1\3\1" + key + b"\xac\2",
    ]
    return {
        "gossip-message": gossip,
        "gossip-frames": [encode_header(key) + b"".join(map(encode_frame, gossip))],
        "local-file": [encode_local_file(address)],
        "peer-data": [encode_peer_data(address), b"\0\0"],
        "blob-request": [push_request(GetRequest.blob(key)), b"\x09\1" + key + b"\2\0\1\0\1\0"],
        "blob-response": [
            blake3(b"hello").digest() + (5).to_bytes(8, "little") + b"hello",
            key + (40000).to_bytes(8, "little") + bytes(128),
        ],
        "blob-ticket": [postcard.encode(ticket)],
        "ticket-text": [str(ticket).encode(), str(EndpointTicket(address)).encode()],
        "model-messages": [
            b"\0" + sharing.encode_request(sharing.ParameterRequest("weight")),
            b"\1" + sharing.encode_answer(ticket),
            b"\1" + sharing.encode_answer(sharing.ParameterUnknown("weight")),
            b"\2" + sharing.encode_blob(sharing.ModelConfig("{}", "{}", ["weight"])),
            b"\2" + sharing.encode_blob(sharing.ModelParameter(b"weight", b"")),
        ],
        "archive": [tensor],
        "tensor-program": [bytes(read_entries(tensor)["archive/data.pkl"])[2:]],
        "solana-instruction": [
            b"\6" + arguments.encode_arguments(arguments.JoinRun(NodeIdentity(key, key)))[8:],
            b"\11" + arguments.encode_arguments(arguments.WarmupWitness.of(Witness(WitnessProof(1, 2, True))))[8:],
            b"\2" + arguments.encode_arguments(arguments.AuthorizationGranteeUpdate(True, (key,)))[8:],
            b"\1" + arguments.encode_arguments(arguments.RunUpdate(paused=True, client_version="v"))[8:],
        ],
        "solana-account": [
            b"\0"
            + small_accounts.write_small_account(small_accounts.CoordinatorInstance(1, key, key, key, "run"), 173)[8:],
            b"\1"
            + small_accounts.write_small_account(
                small_accounts.Authorization(1, key, key, b"scope", True, (key,), 5), 200
            )[8:],
        ],
        "client-message": [CLIENT_TO_SERVER.encode(Else(Join("run")))],
        "meeting-question": [
            b"\0" + postcard.encode(replace(address, id=SecretKey(bytes(32)).public)),
            b"\1" + encode_tcp_frame(b"\1" + postcard.encode(address)),
        ],
        "who-watches": [encode_tcp_frame(encode_watchers([key, bytes(32)]))],
        "why-closed": [encode_tcp_frame(WhyClosed("the operator banned it", False).encode())],
        "coordinator-state": [SERVER_TO_CLIENT.encode(Else(CoordinatorMessage(state)))],
        "run-ticket": [str(RunTicket("run", ("a.example:20000",), address)).encode(), b"a.example:20000/run"],
        "broadcast": [b"\1" + postcard.encode(weights_report(0, 1, [bytes(32)] * 3, 7))],
        "newest-rounds": [
            b"\0" + postcard.encode(newest.Newest(newest.state_bytes(state), claim=claim)),
            b"\1" + SignedMessage.open(claim).data,
        ],
        "succession-letter": [
            postcard.encode(said, succession_messages.Said)
            for said in (
                succession_messages.Here(name, (1, 2), False),
                succession_messages.Proposal(
                    name, 3, succession_messages.VoterList(3, 0, (name,), (0, 0)), None, (), 9, 1
                ),
                succession_messages.Pledge((3, 0), (3, 1), name),
                succession_messages.Stands(4, name, (3, 0), (1, 2)),
                succession_messages.Ballot(4, name, (3, 0), name, (1, 2)),
                succession_messages.Elected(4, name, (3, 0), replace(address, id=name[:32]), ()),
                succession_messages.EstatePart(name, 3, 1, 0, 1, Estate((key,), (key,)).parts()[0]),
            )
        ],
        "model-identity": [identity.encode().encode()],
        "audit-limits": [LOOSEST.encode()],
        "audit-report": [encode_report(AuditReport(0, 9, key, counts, own)) for own in (counts, None)],
        "carried-blob": [carrying.pack(b"said", b"blob"), b"\0\0", b"\0\1ab"],
        "momentum-message": [
            MomentumSaid(0, 9, bytes(64), 0, key, (0.9,)).encode(),
            OpeningSaid(0, 9, bytes(64), 0, BlobTicket.raw(EndpointAddr(key), key)).encode(),
            MomentumReport(0, 9, bytes(64), 0, key, Outcome.COMPARED, far, 9, far).encode(),
        ],
        "ledger-line": [write_line(Entry(0, "0" * 64, "run", signer.public, 5, done), signer)],
        "momentum-commitment": [MomentumCommitment(7, key, key).encode()],
        "momentum-opening": [
            encode_opening(make_opening(7, leaves, momentum, momentum), results_plan()) for leaves in ((0, 1), ())
        ],
        "introduction": [b'{"protocols": [1, 2], "version": "0.2.0", "more": []}'],
        "data-answer": [
            DATA_SERVER_TO_CLIENT.encode(Else(RequestRejected(BatchId(0, 3), RejectionReason.NOT_IN_THIS_ROUND)))
        ],
        "whereabouts": [postcard.encode(Whereabouts(3, address, (address,)))],
        "rendezvous-answer": [postcard.encode([address, address], meeting_place.Members)],
        "served-link": [CLIENT_TO_SERVER.encode(Else(Join("run"))), bytes(100)],
        "frame-change": [
            change_of(BEFORE, BEFORE[:900] + bytes(50) + BEFORE[900:])[1:],
            change_of(BEFORE, BEFORE[:17000])[1:],
        ],
        "state-file": [to_json(state).encode()],
        "bucket-listing": [
            b'{"items": [{"name": "a.bin", "size": "12", "mediaLink": "https://a.example/a.bin"}]}',
            b'{"nextPageToken": "x"}',
        ],
        "mixture-file": [
            b'{"shuffle": "DontShuffle", "providers": [{"location": {"NumberedFiles": {'
            b'"url_template": "http://a/{}.ds", '
            b'"start_index": 0, "n_left_pad_zeros": 3, "num_files": 2}}, "token_size_in_bytes": "TwoBytes", '
            b'"shuffle": "DontShuffle"}]}'
        ],
        "token-sidecar": [Sidecar(12, TokenSize.TWO_BYTES, 256, 1, "bytes", "aa", "bb").to_text().encode()],
        "announcement": [SignedMessage.seal(SecretKey(bytes(32)), b"hello")[:-1] + b"\0"],
        "result": [
            encode_result(
                random_update(results_plan(), quantized=quantized, present=present),
                step=7,
                trainer_nonce=2,
                batch=BatchId(16, 19),
            )[0]
            for quantized in (True, False)
            for present in (None, [False, True, True])
        ],
        **file_seeds(),
    }


def mutate(seed: bytes, draw: random.Random) -> bytes:
    """A valid input with some bytes changed, cut out, doubled or put in."""
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + 1] = bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))])
            case 2:
                del data[at : at + draw.choice((1, 2, 8, len(data)))]
            case 3:
                data[at:at] = draw.randbytes(draw.choice((1, 4, 32)))
            case _:
                data[at:at] = data[at : at + 16]
    return bytes(data[:MAX_INPUT])


def try_changed(name: str, seeds_: list[bytes], draw: random.Random, *, count: int | None, seconds: float = 0.0) -> int:
    """Gives a target seeds and changed seeds, ``count`` of them or for some seconds; returns how many it refused.

    Raises:
        AssertionError: something other than ProtocolError came out; names the input.
    """
    from distro_optim.errors import ProtocolError

    until, done, refused = time.monotonic() + seconds, 0, 0
    while (done < count) if count is not None else (time.monotonic() < until):
        data = seeds_[done] if done < len(seeds_) else mutate(draw.choice(seeds_), draw)
        done += 1
        try:
            TARGETS[name](data)
        except ProtocolError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name} of {data.hex()} raised {type(error).__name__}: {error}") from error
    return refused


def fuzz(name: str, arguments: list[str]) -> None:
    """Runs one target in this process until libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["distro_optim"]):
        for module in INSTRUMENTED:
            importlib.import_module(f"distro_optim.{module}")
    from distro_optim.errors import ProtocolError

    target = TARGETS[name]

    def one(data: bytes) -> None:
        try:
            target(data)
        except ProtocolError:
            pass

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the decoders; see the head of this file.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--seconds", type=int, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's mutations")
    parser.add_argument("--corpus", type=Path, help="folder in which inputs that take new paths are kept")
    options = parser.parse_args()
    unknown = set(options.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    corpus = seeds()
    failed = []
    is_watched = importlib.util.find_spec("atheris") is not None
    for name in options.targets or TARGETS:
        if not is_watched:
            kept = (
                [path.read_bytes() for path in sorted(Path(options.corpus, name).glob("*"))] if options.corpus else []
            )
            try:
                refused = try_changed(
                    name, corpus[name] + kept, random.Random(options.seed), count=None, seconds=options.seconds
                )
                print(f"{name:18} ok, {refused} refused", flush=True)
            except AssertionError as error:
                failed.append(name)
                print(f"{name:18} FAILED {error}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            for number, seed in enumerate(corpus[name]):
                Path(folder, str(number)).write_bytes(seed)
            limits = [
                f"-max_total_time={options.seconds}",
                f"-timeout={TIMEOUT_SECONDS}",
                f"-rss_limit_mb={MEMORY_MB}",
                f"-max_len={MAX_INPUT}",
                f"-seed={options.seed}",
            ]
            folders = [folder]
            if options.corpus is not None:
                # libFuzzer writes into the first folder that it is given.
                folders.insert(0, str(options.corpus / name))
                Path(folders[0]).mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--run", name, *limits, *folders]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
        last = [line for line in process.stderr.splitlines() if line.startswith(("Done", "#"))][-1:]
        print(f"{name:16} {'ok' if process.returncode == 0 else 'FAILED'} {''.join(last)}")
        if process.returncode:
            failed.append(name)
            print(process.stderr[-4000:])
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        # libFuzzer starts this file again with its own arguments.
        fuzz(sys.argv[2], sys.argv[3:])
    sys.exit(main())
