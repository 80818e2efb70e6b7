"""One peer of a run pushes to the hub: true weights, and a card that says how the model was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

import huggingface_hub
from huggingface_hub import hf_api
from safetensors.torch import load
from transformers import Trainer, TrainerCallback
from typing_extensions import override

from distro_optim import RunConfig
from distro_optim._version import __version__
from distro_optim.errors import ConfigurationError
from distro_optim.integrations.huggingface.hub import TrainedInRun, with_section
from distro_optim.strategy.environment import RUN
from frameworks.lightning_runs import Runs, quiet_runs
from integrations.fake_hub import FakeHub, fake_hub
from integrations.small_trainer import Noting, new_trainer, same, weights

pytestmark = pytest.mark.waiting

JOINS = "localhost:20000/quiet"
REPO = "somebody/tiny"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return quiet_runs(monkeypatch)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.delenv(RUN, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # whose methods are functions of the package
        try:
            from transformers.utils import hub as of_transformers

            monkeypatch.setattr(of_transformers, "_hf_api", None)  # a shared one, since transformers 5
        except (ImportError, AttributeError):
            pass
        yield hub


def pushed(hub: FakeHub) -> dict[str, Any]:
    return load(hub.repos[REPO]["model.safetensors"])


@pytest.mark.slow
def test_a_host_pushes_true_weights_and_says_how_they_were_trained(runs: Runs, hub: FakeHub, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "tiny", hub_model_id=REPO, hub_token="hf_secret")
    assert trainer.pushes
    trainer.train()
    trainer.push_to_hub()
    assert same(pushed(hub), weights(trainer.model))
    card = hub.repos[REPO]["README.md"].decode()
    assert "in the run `quiet`: " in card
    assert f"[distro_optim](https://github.com/distro-optim/distro_optim) {__version__}" in card
    assert ": 6 steps of 8 samples" in card
    assert hub.tokens == {"Bearer hf_secret"}
    trainer.push_to_hub()
    assert hub.repos[REPO]["README.md"].decode().count("## How this model was trained") == 1


@pytest.mark.slow
def test_what_is_pushed_in_the_middle_of_a_round_does_not_look_ahead(runs: Runs, hub: FakeHub, tmp_path: Path) -> None:
    true_weights: list[Any] = []

    class Push(TrainerCallback):
        @override
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 3:
                ahead = weights(trainer.model)
                trainer.push_to_hub()
                true_weights.append(weights(trainer.model))
                assert not same(ahead, true_weights[0]), "the weights were ahead before"

    trainer = new_trainer(tmp_path / "tiny", hub_model_id=REPO, hub_token="t", callbacks=[Push()])
    trainer.train()
    assert same(pushed(hub), true_weights[0])
    assert ": 3 steps of 6 of 8 samples" in hub.repos[REPO]["README.md"].decode()


@pytest.mark.slow
def test_a_joiner_creates_no_repository_and_pushes_nothing(
    runs: Runs, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.settings.update(config=RunConfig(total_steps=4, global_batch_size=8))
    settings: dict[str, Any] = {"push_to_hub": True, "hub_model_id": REPO, "save_strategy": "steps", "save_steps": 2}
    trainer = new_trainer(tmp_path / "tiny", run=JOINS, **settings)
    trainer.train()
    with pytest.warns(UserWarning, match="nothing is pushed from here"):
        assert trainer.push_to_hub() is None
    with pytest.warns(UserWarning, match="nothing is pushed from here"):
        trainer.save_model()  # which pushes, too, if the arguments say so
    assert hub.requests == []
    monkeypatch.setenv(RUN, JOINS)
    assert not new_trainer(tmp_path / "other", **settings).pushes
    assert hub.requests == []


@pytest.mark.slow
def test_a_joiner_that_is_asked_to_pushes_as_it_trains(runs: Runs, hub: FakeHub, tmp_path: Path) -> None:
    runs.settings.update(config=RunConfig(total_steps=4, global_batch_size=8))

    class FromHere(Noting):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, push_from="here", **kwargs)

    settings: dict[str, Any] = {
        "push_to_hub": True,
        "hub_model_id": REPO,
        "hub_token": "t",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = new_trainer(tmp_path / "tiny", kind=FromHere, run=JOINS, **settings)
    assert hub.requests == ["POST /api/repos/create"]
    trainer.train()
    assert same(pushed(hub), weights(trainer.model)), "the last checkpoint"
    assert len([asked for asked in hub.requests if asked.endswith("/commit/main")]) >= 1


def test_a_push_from_nowhere_is_a_mistake(tmp_path: Path) -> None:
    class FromNowhere(Noting):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, push_from="nowhere", **kwargs)

    with pytest.raises(ConfigurationError, match='give "host"'):
        new_trainer(tmp_path, kind=FromNowhere)


def test_a_name_of_a_stranger_stays_a_name_on_the_card() -> None:
    evil = "x`](http://evil.example)\n# Trained by me <script>alert(1)</script>"
    trained = TrainedInRun(run_id=evil, step=3, total_steps=9, batch_size=8, peers=2, weights="ab" * 32)
    section = trained.section()
    assert "<" not in section
    assert section.count("`") == 4
    assert "\n# " not in section
    assert "By 2 peers" in section
    assert "3 steps of 9 of 8 samples" in section
    card = with_section("---\ntags: []\n---\n# tiny\n", section)
    assert with_section(card, "again").count("<!-- distro_optim") == 1
    assert with_section(card, "again").startswith("---\ntags: []\n---\n# tiny\n")


def test_the_trainers_own_names_are_those_that_are_overridden() -> None:
    assert all(hasattr(Trainer, name) for name in ("init_hf_repo", "push_to_hub", "_push_from_checkpoint"))
