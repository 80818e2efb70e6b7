"""One name for the strategy under both names of Lightning, found by its registered name, copied and pickled."""

from __future__ import annotations

import copy
import pickle
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import warm_python
from distro_optim import SecretKey
from distro_optim.errors import DistroError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.psyche import PsycheStrategy
from frameworks.lightning_runs import NAMESPACES, QUIET, Runs, load, loader, make_module, make_trainer

pytestmark = [pytest.mark.waiting, *QUIET]


@pytest.mark.slow
@pytest.mark.parametrize(("namespace", "first"), [(NAMESPACES[0], "lightning"), (NAMESPACES[1], "distro_optim")])
def test_the_name_means_the_class_that_the_script_needs(namespace: str, first: str) -> None:
    imports = [f"import {namespace} as pl", "from distro_optim.strategy.psyche import PsycheStrategy"]
    script = f"""
        import warnings
        warnings.simplefilter("ignore")
        {"; ".join(imports if first == "lightning" else imports[::-1])}
        strategy = PsycheStrategy(relay="none")
        assert isinstance(strategy, PsycheStrategy)
        assert pl.Trainer(strategy=strategy, accelerator="cpu", logger=False).strategy is strategy
        trainer = pl.Trainer(strategy="psyche", accelerator="cpu", logger=False)
        assert type(trainer.strategy) is type(strategy)
    """
    started = [sys.executable, "-c", textwrap.dedent(script)]
    warm_python.run(started, check=True, timeout=200, without_this_package=True)


@pytest.mark.slow
def test_importing_the_package_imports_no_lightning() -> None:
    script = "import sys, distro_optim, distro_optim.strategy.psyche as p; p.PsycheStrategy; "
    script += "assert not {'lightning', 'pytorch_lightning', 'lightning.pytorch'} & set(sys.modules)"
    warm_python.run([sys.executable, "-c", script], check=True, timeout=200, without_this_package=True)


def test_a_trainer_of_the_other_name_says_which_class_it_takes(strategy: Any, tmp_path: Path) -> None:
    ours, other = (load(name) for name in NAMESPACES)
    with pytest.raises(ValueError, match=r"of lightning\.pytorch takes distro_optim\.LightningPsycheStrategy"):
        make_trainer(ours, tmp_path, strategy(other))
    with pytest.raises(ValueError, match=r"pytorch_lightning takes distro_optim\.PytorchLightningPsycheStrategy"):
        make_trainer(other, tmp_path, strategy(ours))


def test_with_both_names_imported_it_is_the_new_one(strategy: Any) -> None:
    for name in NAMESPACES:
        load(name)
    assert type(PsycheStrategy()) is type(strategy(load("lightning.pytorch")))


def test_a_registered_name(both: ModuleType, strategy: Any, tmp_path: Path) -> None:
    for name in ("psyche", "PSYCHE", "psyche_spawn"):
        trainer = make_trainer(both, tmp_path, name)
        assert type(trainer.strategy) is type(strategy(both))


def test_a_new_strategy_holds_nothing_that_cannot_be_pickled(both: ModuleType, strategy: Any) -> None:
    made = strategy(both, run="127.0.0.1:20000/x", secret_key=SecretKey(bytes(32)), relay="none", start_method="spawn")
    for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):  # noqa: S301
        assert type(copied) is type(made)
        assert copied.run == made.run
    pickle.dumps(strategy(both, config=RunConfig(total_steps=5)))


def test_a_strategy_that_trains_is_not_copied(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        with pytest.raises(DistroError, match="cannot be pickled or copied while it trains") as caught:
            copy.deepcopy(self.trainer.strategy)
        errors.append(caught.value)

    module = make_module(pl, on_train_batch_start=on_train_batch_start)
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_steps=1, max_epochs=-1)
    trainer.fit(module, loader())
    assert len(errors) == 1
    assert copy.deepcopy(trainer.strategy.config) is None


def test_ranks_are_about_this_machine_and_peers_about_the_run(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []
    runs.settings = {"share_of": 3}

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        ours = self.trainer.strategy
        seen.append((self.trainer.world_size, self.global_rank, ours.is_global_zero, ours.num_peers, ours.peer_index))

    made = strategy(both)
    assert (made.num_peers, made.peer_index, made.ticket, made.view()) == (1, None, None, None)
    module = make_module(both, on_train_batch_start=on_train_batch_start)
    make_trainer(both, tmp_path, made, max_epochs=1).fit(module, loader())
    assert set(seen) == {(1, 0, True, 3, 0)}
    assert made.num_peers == 1


def test_the_ticket_is_printed_once_with_the_line_that_others_write(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(both, tmp_path, strategy(both), max_epochs=1).fit(make_module(both), loader())
    assert capsys.readouterr().out.count("Trainer(strategy=PsycheStrategy(run='psyche1quiet'))") == 1
