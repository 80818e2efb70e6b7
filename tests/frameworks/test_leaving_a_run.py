"""However a script ends, it leaves the run, and its process ends soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import warm_python
from frameworks.lightning_runs import QUIET, Runs, loader, make_module, make_trainer

pytestmark = [pytest.mark.waiting, pytest.mark.slow, *QUIET]

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import lightning.pytorch as pl
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.psyche import PsycheStrategy
from frameworks.lightning_runs import loader, make_module, make_trainer

def on_train_batch_end(self, *_):
    print("a round is done", flush=True)

module = make_module(pl, on_train_batch_end=on_train_batch_end)
strategy = PsycheStrategy(relay="none", config=RunConfig(min_peers=int(sys.argv[1]), total_steps=10**6))
make_trainer(pl, sys.argv[2], strategy).fit(module, loader())
"""


@pytest.mark.parametrize(
    ("number", "peers", "sign"),
    [
        pytest.param(signal.SIGINT, 2, "Hosting the run", id="SIGINT while waiting for peers"),
        pytest.param(signal.SIGTERM, 2, "Hosting the run", id="SIGTERM while waiting for peers"),
        pytest.param(signal.SIGINT, 1, "a round is done", id="SIGINT while training"),
        pytest.param(signal.SIGTERM, 1, "a round is done", id="SIGTERM while training"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_ends_it_within_seconds(number: signal.Signals, peers: int, sign: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = warm_python.Popen(
        [sys.executable, "-c", SCRIPT, str(peers), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if sign in line:
                break
        process.send_signal(number)
        rest, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in rest, "".join(output) + rest
    assert process.returncode in (0, 1)


def test_a_termination_while_nothing_comes_from_the_network(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    exceptions = __import__(f"{pl.__name__}.utilities.exceptions", fromlist=["SIGTERMException"])
    trainer = make_trainer(pl, tmp_path, strategy(pl))

    def terminate(step: int) -> None:
        if step == 3:
            trainer._signal_connector.received_sigterm = True
            runs.port._actions.clear()

    runs.settings = {"before_round": terminate}
    module = make_module(pl)
    with pytest.raises(exceptions.SIGTERMException):
        trainer.fit(module, loader())
    assert runs.port.closed == 1


def test_a_termination_is_heeded_between_the_batches_of_a_round(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    exceptions = __import__(f"{both.__name__}.utilities.exceptions", fromlist=["SIGTERMException"])
    batches: list[int] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        batches.append(batch_idx)
        self.trainer._signal_connector.received_sigterm = True
        return self.loss(batch)

    trainer = make_trainer(both, tmp_path, strategy(both), accumulate_grad_batches=4)
    with pytest.raises(exceptions.SIGTERMException):
        trainer.fit(make_module(both, training_step=training_step), loader())
    assert batches == [0]
    assert runs.port.closed == 1


def own_threads() -> list[str]:
    """Threads of a run. Other libraries' come and go as they like, and those that compute a step are the process's."""
    names = [thread.name for thread in threading.enumerate()]
    return sorted(name for name in names if name.startswith("distro-optim") and "optim-step" not in name)


def test_an_exception_of_the_script_leaves_the_run(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise RuntimeError("of the script")
        return self.loss(batch)

    trainer = make_trainer(both, tmp_path, strategy(both), accumulate_grad_batches=2)
    module = make_module(both, training_step=training_step)
    threads = own_threads()
    for number in (1, 2):  # the second time all begins anew
        with pytest.raises(RuntimeError, match="of the script"):
            trainer.fit(module, loader())
        assert [port.closed for port in runs.ports] == [1] * number
        assert trainer.accumulate_grad_batches == 2
        assert trainer.strategy.session is None
        assert "_on_before_batch_transfer" not in vars(module)
    assert own_threads() == threads
    trainer.strategy.teardown()


def test_a_failure_to_join_releases_everything(both: ModuleType, strategy: Any, tmp_path: Path) -> None:
    from distro_optim.errors import CoordinatorLinkError

    threads = own_threads()
    trainer = make_trainer(both, tmp_path, strategy(both, run="127.0.0.1:9/nobody", relay="none"))
    with pytest.raises(CoordinatorLinkError):
        trainer.fit(make_module(both), loader())
    assert own_threads() == threads
