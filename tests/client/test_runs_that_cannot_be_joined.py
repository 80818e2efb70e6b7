"""What stands in the way of training is told in one sentence, as the command's answer, before training starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.fake_coordinator import FakeCoordinator, coordinator_of, state_payload
from client.processes import DISTRO, TINY_LLAMA, write_state
from distro_optim.cli import main
from distro_optim.client.joining import join
from distro_optim.client.options import JoinOptions
from distro_optim.coordinator.model import (
    P2P,
    AdamW,
    DummyCheckpoint,
    DummyData,
    DummyOptimizer,
    Ephemeral,
    Gcs,
    GcsRepo,
    Hub,
    HubRepo,
    LLMArchitecture,
    LocalData,
    PreprocessedData,
    ServerData,
    WeightedHttpData,
)
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.types import Coordinator
from distro_optim.errors import ConfigurationError
from distro_optim.models import memory
from distro_optim.models.causal_lm import CausalLM

pytestmark = [pytest.mark.waiting]

VOCABULARY = 64
SEQ_LEN = 32
CONFIG = {**TINY_LLAMA, "vocab_size": VOCABULARY, "num_hidden_layers": 1}


@pytest.fixture
def entered() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def state(tmp_path: Path) -> Coordinator:
    return read_state_file(
        write_state(
            tmp_path / "state.toml",
            checkpoint='{ Hub = { repo_id = "no-such/model-anywhere" } }',
            data_location='{ Local = "anywhere" }',
            optimizer=DISTRO,
        )
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    CausalLM(CONFIG, "HfLlama").save_pretrained(folder)
    return folder


def answer(capsys: pytest.CaptureFixture[str], address: str, *arguments: str, status: int) -> str:
    """What the command says."""
    capsys.readouterr()
    options = ("--iroh-relay", "none", "--bind-p2p-interface", "127.0.0.1", "--device", "cpu", "--logs", "none")
    keeping = () if "--checkpoint-dir" in arguments else ("--no-checkpoints",)
    assert main(["join", address, "proof", *options, *keeping, *arguments]) == status
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("distro-optim: ")
    return line


def never_joined(fake: FakeCoordinator) -> bool:
    """Whether nobody asked to be in the run, now that the client has gone."""
    assert fake.lost.wait(10)
    return fake.said == []


def with_model(state: Coordinator, **changes: Any) -> Coordinator:
    return replace(state, model=replace(state.model, **changes))


ADAMW = AdamW(betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8, clip_grad_norm=1.0)
REPO = HubRepo("no-such/model-anywhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"optimizer": ADAMW}, 2, "the run's optimizer is AdamW"),
        ({"architecture": LLMArchitecture.TORCHTITAN, "data_location": DummyData()}, 2, "Torchtitan"),
        ({}, 2, "name yours with --data"),
        ({"data_location": DummyData()}, 1, "'hf download no-such/model-anywhere'"),
        ({"data_location": DummyData(), "checkpoint": Ephemeral()}, 1, "its weights are with nobody"),
        ({"data_location": DummyData(), "checkpoint": DummyCheckpoint(REPO)}, 1, "name a folder with a model by"),
        ({"data_location": DummyData(), "checkpoint": Gcs(GcsRepo("bucket"))}, 1, "gs://bucket/"),
        ({"data_location": ServerData("127.0.0.1:1")}, 1, "127.0.0.1:1"),
        ({"data_location": WeightedHttpData("http://127.0.0.1:1/mixture.json")}, 1, "127.0.0.1:1"),
        ({"data_location": WeightedHttpData("file:///etc/passwd")}, 2, "file:"),
    ],
)
def test_a_run_of_a_kind_that_is_not_supported_is_told(
    state: Coordinator,
    model: Path,
    changes: dict[str, Any],
    status: int,
    words: str,
    entered: ExitStack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = entered.enter_context(coordinator_of(with_model(state, **changes)))
    needs_model = "data_location" in changes and not isinstance(changes["data_location"], DummyData)
    titan = "architecture" in changes
    assert words in answer(
        capsys, fake.address, *(["--model", str(model)] if needs_model or titan else []), status=status
    )
    assert never_joined(fake)


@pytest.mark.slow
def test_a_folder_that_only_the_run_names_is_not_shared_with_it(
    state: Coordinator, model: Path, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = with_model(state, data_location=DummyData(), checkpoint=Hub(HubRepo("/etc")))
    fake = entered.enter_context(coordinator_of(theirs))
    assert "name the folder yourself (--model)" in answer(capsys, fake.address, status=1)
    theirs = with_model(state, data_location=PreprocessedData("/etc"))
    fake = entered.enter_context(coordinator_of(theirs))
    assert "name the folder yourself with --data" in answer(capsys, fake.address, "--model", str(model), status=2)


def cut(tokens: Path) -> None:
    with open(tokens, "r+b") as file:
        file.truncate(1000)


def foreign(tokens: Path) -> None:
    np.full(tokens.stat().st_size // 2, 60_000, "<u2").tofile(tokens)
    sidecar = tokens.with_name(tokens.name + ".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "vocab_size": 65_536}))


def half_a_token(tokens: Path) -> None:
    tokens.with_name(tokens.name + ".json").unlink()
    tokens.write_bytes(bytes(4097))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "status", "words"),
    [
        (cut, 1, "cut"),
        (foreign, 1, "beyond the vocabulary of 64"),
        (half_a_token, 2, "how wide the tokens"),
        (lambda tokens: tokens.write_bytes(b""), 1, ""),
        (Path.unlink, 2, ""),
    ],
)
def test_data_that_cannot_be_trained_on_are_told(
    state: Coordinator,
    model: Path,
    tokens: Path,
    harm: Callable[[Path], None],
    status: int,
    words: str,
    entered: ExitStack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(tokens)
    fake = entered.enter_context(coordinator_of(state))
    options = ("--model", str(model), "--data", str(tokens.parent))
    said = answer(capsys, fake.address, *options, status=status)
    assert words in said
    assert never_joined(fake)


def test_data_are_not_named_twice(
    state: Coordinator, tokens: Path, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = entered.enter_context(coordinator_of(with_model(state, data_location=DummyData())))
    assert "leave it out" in answer(capsys, fake.address, "--data", str(tokens), status=2)


def test_a_model_that_does_not_fit_in_memory_is_told_with_both_sizes(
    state: Coordinator,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    entered: ExitStack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "_free_of_machine", lambda: 1 << 16)
    fake = entered.enter_context(coordinator_of(with_model(state, data_location=DummyData())))
    said = answer(capsys, fake.address, "--model", str(model), status=1)
    assert "the model does not fit" in said
    assert "GiB left" in said
    assert never_joined(fake)


def test_a_folder_without_a_model_is_told(
    state: Coordinator, tmp_path: Path, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = entered.enter_context(coordinator_of(with_model(state, data_location=DummyData())))
    assert str(tmp_path / "nothing") in answer(capsys, fake.address, "--model", str(tmp_path / "nothing"), status=2)


def newer_variant(payload: bytes) -> bytes:
    """The phase, behind the run's name, is one that is not known here."""
    at = payload.index(b"proof") + len(b"proof")
    return payload[:at] + b"\x1f" + payload[at + 1 :]


def cut_short(payload: bytes) -> bytes:
    return payload[:-9]


@pytest.mark.parametrize("newer", [newer_variant, cut_short])
def test_a_state_of_a_newer_version_is_told(
    state: Coordinator,
    newer: Callable[[bytes], bytes],
    entered: ExitStack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = entered.enter_context(FakeCoordinator(newer(state_payload(state))))
    assert "newer version" in answer(capsys, fake.address, status=1)


def test_a_server_that_does_not_want_us_is_told_with_our_key(
    state: Coordinator, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = with_model(state, optimizer=DummyOptimizer(), data_location=DummyData())
    fake = entered.enter_context(FakeCoordinator(state_payload(theirs), refuse=True))
    said = answer(capsys, fake.address, status=1)
    assert "is full, or the key" in said
    assert "is not on its list" in said
    assert fake.said == [("Else", ("Join", "proof"))]


def test_another_run_at_the_address_is_named(
    state: Coordinator, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = entered.enter_context(coordinator_of(replace(state, run_id="other")))
    assert "hosts the run 'other'" in answer(capsys, fake.address, status=1)
    assert never_joined(fake)


def test_nobody_at_the_address_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be reached" in answer(capsys, "127.0.0.1:1", status=1)


@pytest.mark.parametrize(
    "option", ["--device", "--identity-secret-key-path", "--write-log", "--metrics-local-port", "--peer"]
)
def test_options_that_cannot_work_are_told_before_anything_is_opened(
    option: str, tmp_path: Path, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = entered.enter_context(FakeCoordinator(mute=True))
    values = {"--device": "cuda:99", "--metrics-local-port": taken.address.partition(":")[2], "--peer": "nobody"}
    (tmp_path / "file").write_text("")
    value = values.get(option, str(tmp_path / "file" / "inside"))
    assert value in answer(capsys, taken.address, option, value, status=2)
    assert not taken.connected.is_set()


def test_a_command_for_uploads_that_is_not_here_is_told_before_anything_is_opened(entered: ExitStack) -> None:
    taken = entered.enter_context(FakeCoordinator(mute=True))
    with pytest.raises(ConfigurationError, match="no command 'no-such-program'"):
        join(JoinOptions(run=f"{taken.address}/run", upload="no-such-program {path}"))
    assert not taken.connected.is_set()


def test_a_checkpoint_folder_that_cannot_be_written_is_told_before_training(
    state: Coordinator, model: Path, tmp_path: Path, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    fake = entered.enter_context(coordinator_of(with_model(state, data_location=DummyData())))
    options = ("--model", str(model), "--checkpoint-dir", str(tmp_path / "file" / "checkpoints"))
    assert str(tmp_path / "file") in answer(capsys, fake.address, *options, status=2)
    assert never_joined(fake)


@pytest.mark.slow
def test_nothing_of_what_a_run_says_reaches_the_terminal_as_control_codes(
    state: Coordinator, entered: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = with_model(state, data_location=DummyData(), checkpoint=P2P(HubRepo("x\x1b[2J\ny")), optimizer=ADAMW)
    fake = entered.enter_context(coordinator_of(evil))
    said = answer(capsys, fake.address, status=2)
    assert "\x1b" not in said
    evil = with_model(state, data_location=LocalData("a\x1b[2J\nb"))
    fake = entered.enter_context(coordinator_of(evil))
    assert "\x1b" not in answer(capsys, fake.address, status=2)
