"""A client sees to everything that can be seen to before it asks to be in a run: others' epochs do not suffer from it.

The server of these tests closes the connection at any ``Join``, so that whatever is told before it was found without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from client.fake_coordinator import FakeCoordinator, coordinator_of, state_payload
from client.processes import DISTRO, TINY_LLAMA, write_state
from distro_optim import DisTrO
from distro_optim.client.joining import join
from distro_optim.client.options import JoinOptions
from distro_optim.client.tokenizers import tokens_of
from distro_optim.console import NO_FACTS, Display, Facts
from distro_optim.coordinator.model import P2P, AdamW, DummyData, HubRepo, LocalData, ServerData
from distro_optim.coordinator.rules.outlook import check_newcomer, first_data_index, waits_for
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.types import Client, Coordinator, CoordinatorProgress, NodeIdentity, RunState
from distro_optim.errors import (
    ConfigurationError,
    DataUnavailableError,
    InvalidDataError,
    JoinRefusedError,
    OutOfDataError,
)
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.fabric import FabricPsycheStrategy
from distro_optim.strategy.frameworks.first_sample import look_at_first_sample
from distro_optim.strategy.frameworks.samples import samples_of
from distro_optim.strategy.monitor.figures import Figures
from distro_optim.strategy.psyche import PsycheStrategy
from distro_optim.strategy.session import SwarmSession

pytestmark = [pytest.mark.waiting]

VOCABULARY = 64
CONFIG = {**TINY_LLAMA, "vocab_size": VOCABULARY, "num_hidden_layers": 1}
ME = NodeIdentity.from_single_key(bytes(32))
OTHERS = tuple(Client(NodeIdentity.from_single_key(bytes([n]) * 32)) for n in (1, 2))


class Told(Display[Figures]):
    """Keeps what is told, and what is shown last."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.shown: Figures | None = None

    @override
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        self.texts.append(text)

    @override
    def update(self, figures: Figures) -> bool:
        self.shown = figures
        return True


@pytest.fixture
def entered() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def state(tmp_path: Path) -> Coordinator:
    return read_state_file(
        write_state(tmp_path / "state.toml", checkpoint='{ Hub = { repo_id = "no-such/model" } }', optimizer=DISTRO)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    CausalLM(CONFIG, "HfLlama").save_pretrained(folder)
    vocabulary = {"type": "BPE", "vocab": {chr(65 + n): n for n in range(40)}}
    added = [{"id": VOCABULARY + 1, "content": "<pad>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": added}))
    return folder


def with_model(state: Coordinator, **changes: Any) -> Coordinator:
    return replace(state, model=replace(state.model, **changes))


def under_way(state: Coordinator) -> Coordinator:
    """Others train already."""
    epoch = replace(state.epoch_state, clients=OTHERS)
    return replace(with_model(state, checkpoint=P2P(HubRepo("a/b"))), run_state=RunState.ROUND_TRAIN, epoch_state=epoch)


def refusing(entered: ExitStack, state: Coordinator) -> FakeCoordinator:
    return entered.enter_context(FakeCoordinator(state_payload(state), refuse=True))


def attempt(fake: FakeCoordinator, expected: type[Exception], **options: Any) -> tuple[str, Told]:
    """The error of joining, and what was told before it."""
    told = Told()
    settings: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0", "device": "cpu"}
    settings |= {"no_checkpoints": "checkpoint_dir" not in options, **options}
    with pytest.raises(expected) as caught:
        join(JoinOptions(run=f"{fake.address}/proof", **settings), told)
    assert fake.lost.wait(10)
    return str(caught.value), told


JOINED = [("Else", ("Join", "proof"))]


def test_model_and_data_are_ready_before_the_run_hears_of_us(
    state: Coordinator, model: Path, tokens: Path, entered: ExitStack
) -> None:
    fake = refusing(entered, with_model(state, data_location=LocalData("anywhere")))
    error, told = attempt(fake, JoinRefusedError, model=model, data=tokens.parent)
    assert "when we asked to join" in error
    assert fake.said == JOINED
    assert f"the model comes from {model}" in told.texts
    assert any(text.startswith("the model has") for text in told.texts)
    assert any("knows 66 tokens, the model 64" in text for text in told.texts)


def test_data_are_read_before_joining_even_if_the_model_comes_from_peers(
    state: Coordinator, tokens: Path, entered: ExitStack
) -> None:
    theirs = under_way(with_model(state, data_location=LocalData("anywhere")))
    fake = refusing(entered, theirs)
    attempt(fake, JoinRefusedError, data=tokens.parent)
    assert fake.said == JOINED
    with open(tokens, "r+b") as file:
        file.truncate(1000)
    fake = refusing(entered, theirs)
    attempt(fake, InvalidDataError, data=tokens.parent)
    assert fake.said == []


def test_the_sequence_that_comes_next_must_be_there(
    state: Coordinator, model: Path, tokens: Path, entered: ExitStack
) -> None:
    far = replace(state, progress=CoordinatorProgress(3, 40, epoch_start_data_index=10**6))
    fake = refusing(entered, with_model(far, data_location=LocalData("anywhere")))
    error, _ = attempt(fake, OutOfDataError, model=model, data=tokens.parent)
    assert "beyond the training data" in error
    assert fake.said == []


def test_a_data_server_that_is_gone_does_not_keep_us_out_if_its_data_are_on_our_disk(
    state: Coordinator, model: Path, tokens: Path, entered: ExitStack
) -> None:
    file = tokens.parent / "data.toml"
    file.write_text(
        f'dir = "."\ntoken_size = "TwoBytes"\nseq_len = {state.model.max_seq_len}\nshuffle_seed = {[7] * 32}\n'
    )
    fake = refusing(entered, with_model(state, data_location=ServerData("127.0.0.1:1")))
    _, told = attempt(fake, JoinRefusedError, model=model, data_mirrors=[str(file)])
    assert fake.said == JOINED
    (news,) = [text for text in told.texts if text.startswith("training data: ")]
    assert "the data server 127.0.0.1:1 gives nothing: " in news
    fake = refusing(entered, with_model(state, data_location=ServerData("127.0.0.1:1")))
    error, _ = attempt(fake, ConfigurationError, model=model, data_mirrors=["nowhere.bin"])
    assert "must be host:port" in error
    assert fake.said == []


def test_a_data_server_must_answer_before_joining(state: Coordinator, model: Path, entered: ExitStack) -> None:
    fake = refusing(entered, with_model(state, data_location=ServerData("127.0.0.1:1")))
    _, told = attempt(fake, DataUnavailableError, model=model)
    assert any("name it with --data-mirror" in text for text in told.texts)
    assert fake.said == []


def test_a_run_that_nobody_can_train_is_left_alone(state: Coordinator, model: Path, entered: ExitStack) -> None:
    verified = replace(state, config=replace(state.config, verification_percent=10))
    fake = refusing(entered, verified)
    error, _ = attempt(fake, ConfigurationError, model=model)
    assert "10 % of its clients verify" in error
    assert fake.said == []
    with pytest.raises(ConfigurationError, match="AdamW"):
        check_newcomer(with_model(state, optimizer=AdamW((0.9, 0.95), 0.1, 1e-8, 1.0)))
    check_newcomer(state)


def test_a_finished_run_is_told_and_not_joined(state: Coordinator, entered: ExitStack) -> None:
    fake = refusing(entered, replace(state, run_state=RunState.FINISHED))
    told = Told()
    join(JoinOptions(run=f"{fake.address}/proof", relay="none", bind_addr="127.0.0.1:0", device="cpu"), told)
    assert told.texts[-1] == "the run is finished already"
    assert fake.lost.wait(10)
    assert fake.said == []


@pytest.mark.slow
def test_an_epoch_that_came_to_nothing_is_left_before_the_next_begins(state: Coordinator, entered: ExitStack) -> None:
    """Peers had the model, and are gone: the next epoch begins with a checkpoint that we do not have."""
    epoch = replace(state.epoch_state, clients=OTHERS)
    theirs = with_model(state, data_location=DummyData())
    fake = entered.enter_context(
        coordinator_of(replace(theirs, run_state=RunState.ROUND_TRAIN, epoch_state=epoch), then=theirs)
    )
    error, told = attempt(fake, Exception)
    assert "came to nothing: name the folder that has it with --model" in error
    assert any("waiting for the next epoch: 2 clients are in epoch 0" in text for text in told.texts)
    assert fake.said[:1] == JOINED


# -- what is waited for ------------------------------------------------------------------------------------------------


def test_what_a_newcomer_waits_for_is_told_in_words(state: Coordinator) -> None:
    theirs = under_way(state)
    begun = replace(theirs, epoch_state=replace(theirs.epoch_state, start_timestamp=100))
    full = replace(theirs, epoch_state=replace(theirs.epoch_state, clients=OTHERS * 128))
    mine = replace(theirs, epoch_state=replace(theirs.epoch_state, clients=(*OTHERS, Client(ME))))
    assert waits_for(state, ME, 0) == "members: an epoch begins with at least 2 clients"
    assert waits_for(begun, ME, 104) == "the next epoch: 2 clients are in epoch 0, for up to 5 s more"
    assert waits_for(begun, ME, 1000) == "the next epoch: 2 clients are in epoch 0, which is about to end"
    assert waits_for(full, ME, 0) == "a free place: an epoch has 256 clients at most"
    assert waits_for(replace(state, run_state=RunState.PAUSED), ME, 0) == "the coordinator: the run is paused"
    assert waits_for(mine, ME, 0) is None
    assert waits_for(replace(state, run_state=RunState.FINISHED), ME, 0) is None


def test_the_first_sample_is_of_the_round_under_way_or_of_the_next(state: Coordinator) -> None:
    progress = CoordinatorProgress(2, 9, epoch_start_data_index=77)
    waiting = replace(state, progress=progress)
    round_ = replace(state.current_round, data_index=80)
    rounds = (round_, *state.epoch_state.rounds[1:])
    training = replace(waiting, run_state=RunState.ROUND_TRAIN, epoch_state=replace(waiting.epoch_state, rounds=rounds))
    assert [first_data_index(waiting), first_data_index(training)] == [77, 80]


@pytest.mark.parametrize(
    ("content", "known"),
    [
        ({"model": {"vocab": {"a": 0, "b": 7}}}, 8),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9}, {"id": "x"}, 3]}, 10),
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, 2),
        ({"model": {"vocab": {"a": True, "b": -5, "c": 1.5}}}, None),
        ({"model": []}, None),
        ([], None),
    ],
)
def test_tokens_of_a_tokenizer(content: Any, known: int | None) -> None:
    assert tokens_of(json.dumps(content).encode()) == known


@pytest.mark.parametrize("text", [b"", b"\xff", b"{", b"[" * 100_000])
def test_what_is_no_tokenizer_says_nothing(text: bytes) -> None:
    assert tokens_of(text) is None


# -- scripts -----------------------------------------------------------------------------------------------------------


class Sentences(Dataset[Any]):
    def __init__(self, token: int = 1, error: Exception | None = None) -> None:
        self.token, self.error = token, error
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 16

    @override
    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.asked.append(index)
        if self.error is not None:
            raise self.error
        return {"input_ids": [self.token] * 4}


def script_of(fake: FakeCoordinator, dataset: Dataset[Any], **settings: Any) -> SwarmSession:
    model = nn.Linear(4, 4)
    model.config = type("Config", (), {"vocab_size": VOCABULARY})()
    session = SwarmSession(
        model,
        DisTrO(model.parameters(), lr=1e-3),
        run=f"{fake.address}/proof",
        relay="none",
        bind_addr="127.0.0.1:0",
        dataset_size=16,
        **settings,
    )
    session.look_over = look_at_first_sample(session, samples_of(DataLoader(dataset, batch_size=2)), model)
    return session


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Sentences(error=OSError("the disk is gone")), "cannot be read: OSError: the disk is gone"),
        (Sentences(token=VOCABULARY), "the model's vocabulary has 64"),
        (Sentences(token=-1), "tokens from -1"),
    ],
)
def test_a_script_reads_its_first_sample_before_joining(
    state: Coordinator, dataset: Sentences, words: str, entered: ExitStack
) -> None:
    fake = refusing(entered, state)
    session = script_of(fake, dataset)
    with pytest.raises(ConfigurationError, match=words):
        session.start()
    assert fake.lost.wait(10)
    assert fake.said == []
    assert dataset.asked == [session.sample_of(0)]


def test_a_script_that_could_train_joins_then_and_not_before(state: Coordinator, entered: ExitStack) -> None:
    fake = refusing(entered, state)
    dataset = Sentences()
    session = script_of(fake, dataset)
    before = torch.get_rng_state()
    with pytest.raises(JoinRefusedError, match="when we asked to join"):
        session.start()
    assert fake.lost.wait(10)
    assert fake.said == JOINED
    assert len(dataset.asked) == 1
    assert torch.get_rng_state().equal(before)


def test_a_dataset_that_is_too_small_or_a_run_that_cannot_be_trained_is_found_before_joining(
    state: Coordinator, entered: ExitStack
) -> None:
    large = replace(state.config, global_batch_size_start=32, global_batch_size_end=32)
    for theirs, words in (
        (replace(state, config=large), "has only 16 samples"),
        (with_model(state, optimizer=AdamW((0.9, 0.95), 0.1, 1e-8, 1.0)), "the run's optimizer is AdamW"),
    ):
        fake = refusing(entered, theirs)
        with pytest.raises(ConfigurationError, match=words):
            script_of(fake, Sentences()).start()
        assert fake.lost.wait(10)
        assert fake.said == []


@pytest.mark.filterwarnings("ignore")
def test_a_script_with_lightning_looks_first_as_well(state: Coordinator, tmp_path: Path, entered: ExitStack) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Script(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("nothing is trained")

        def configure_optimizers(self) -> DisTrO:
            return DisTrO(self.parameters(), lr=1e-3)

    fake = refusing(entered, state)
    strategy = PsycheStrategy(run=f"{fake.address}/proof", relay="none", bind_addr="127.0.0.1:0")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=4, default_root_dir=tmp_path, **quiet
    )
    with pytest.raises(ConfigurationError, match="the disk is gone"):
        trainer.fit(Script(), DataLoader(Sentences(error=OSError("the disk is gone")), batch_size=2))
    assert fake.lost.wait(10)
    assert fake.said == []


def test_a_loop_with_fabric_looks_first_as_well(state: Coordinator, entered: ExitStack) -> None:
    from lightning.fabric import Fabric

    fake = refusing(entered, state)
    strategy = FabricPsycheStrategy(run=f"{fake.address}/proof", relay="none", bind_addr="127.0.0.1:0")
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    model = nn.Linear(4, 4)
    fabric.setup(model, DisTrO(model.parameters(), lr=1e-3))
    loader = DataLoader(Sentences(error=OSError("the disk is gone")), batch_size=2)
    with pytest.raises(ConfigurationError, match="the disk is gone"):
        next(iter(strategy.rounds(loader, max_steps=1)))
    assert fake.lost.wait(10)
    assert fake.said == []
