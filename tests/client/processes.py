"""A server and clients as a user starts them: in processes of their own, by the command ``distro-optim``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import warm_python
from distro_optim.cli import main

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

STATE = """
run_id = "{run_id}"
run_state = "WaitingForMembers"

[config]
warmup_time = {warmup_time}
cooldown_time = 1
max_round_train_time = {max_round_train_time}
round_witness_time = 1
epoch_time = {epoch_time}
waiting_for_members_extra_time = 1
init_min_clients = {init_min_clients}
min_clients = {min_clients}
witness_nodes = 0
verification_percent = 0
global_batch_size_start = 4
global_batch_size_end = 4
global_batch_size_warmup_tokens = 0
total_steps = {total_steps}

[model.LLM]
architecture = "HfLlama"
data_type = "Pretraining"
max_seq_len = 32
cold_start_warmup_steps = 0
checkpoint = {checkpoint}
data_location = {data_location}
{optimizer}
[model.LLM.lr_schedule.Constant]
base_lr = 1e-2
warmup_init_lr = 0.0
warmup_steps = 0
"""

DISTRO = """
[model.LLM.optimizer.Distro]
clip_grad_norm = 1.0
compression_decay = 0.99
compression_topk = 8
compression_chunk = 64
quantize_1bit = true
"""

DUMMY = 'optimizer = "Dummy"\n'


# Psyche's data fixtures carry licences of their own and are not part of this project.
FIXTURES = Path(os.environ.get("DISTRO_OPTIM_VECTORS", Path(__file__).parents[3] / "shared" / "vectors")) / "data"


def write_tokens(folder: Path, seq_len: int) -> tuple[Path, int]:
    """Tokens to train on, as a ``data.toml`` and the size of their vocabulary: FineWeb, or Python's own sources."""
    tokens, vocab_size = FIXTURES / "fineweb" / "data", 32000
    if not tokens.is_dir():
        tokens, vocab_size = folder / "tokens", 256
        tokens.mkdir()
        texts = Path(json.__file__).parent
        assert main(["tokenize", str(texts), "--tokenizer", "bytes", "--out", str(tokens / "json.bin")]) == 0
    path = folder / "data.toml"
    path.write_text(
        f'dir = "{tokens}"\nseq_len = {seq_len}\ntoken_size = "TwoBytes"\nshuffle_seed = [{", ".join(["7"] * 32)}]\n'
    )
    return path, vocab_size


def write_state(path: Path, **settings: object) -> Path:
    """A ``state.toml``; what is left out is a short run without tensors."""
    values: dict[str, object] = {
        "run_id": "proof",
        "warmup_time": 8,
        "max_round_train_time": 8,
        "epoch_time": 9,
        "init_min_clients": 2,
        "min_clients": 2,
        "total_steps": 10,
        "checkpoint": '{ Dummy = { repo_id = "none" } }',
        "data_location": '"Dummy"',
        "optimizer": DUMMY,
    }
    path.write_text(STATE.format(**{**values, **settings}))
    return path


class Process:
    """``distro-optim`` with JSON output in a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            self.process = warm_python.Popen(
                [sys.executable, "-m", "distro_optim", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                its_children_too="--data-parallelism" in arguments,
            )

    def records(self) -> Iterator[dict[str, Any]]:
        """What it has said so far."""
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # half a line, or a traceback

    def latest(self, name: str) -> Any:
        """The newest value of a figure."""
        found = None
        for record in self.records():
            found = record.get(name, found)
        return found

    def until(self, done: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        """Looks again and again until ``done``; fails if the process ends before."""
        end = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None or done(), f"it ended before {what}:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"no {what} within {seconds} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def wait(self, seconds: float = 120.0) -> int:
        """Its status, when it is done."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it is not over after {seconds} s:\n{self.log.read_text()[-3000:]}") from None

    def latest_of(self, event: str, name: str) -> Any:
        """The newest value of a field among the records of an event."""
        return next((r[name] for r in reversed(list(self.records())) if r.get("event") == event and name in r), None)

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self.process.send_signal(number)

    def end(self) -> None:
        """However it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_for_all(processes: Sequence[Process], seconds: float = 200.0) -> None:
    """Until all have ended well; fails as soon as one has not."""
    end = time.monotonic() + seconds
    while any(each.process.poll() is None for each in processes):
        broken = [each for each in processes if each.process.poll() not in (None, 0)]
        assert not broken, broken[0].log.read_text()[-3000:]
        assert time.monotonic() < end, "\n".join(each.log.read_text()[-1000:] for each in processes)
        time.sleep(0.1)
    assert [each.process.returncode for each in processes] == [0] * len(processes)


class Server(Process):
    """``distro-optim serve``, reachable on this machine only."""

    def __init__(self, folder: Path, state: Path, *arguments: str) -> None:
        super().__init__(
            folder / "serve.log",
            *("serve", "--state", str(state), "--host", "127.0.0.1", "--port", "0", "--iroh", "--relay", "none"),
            *("--json", "--init-warmup-time", "60"),
            *arguments,
        )
        self.until(lambda: self.latest("ticket") is not None, "ticket")
        self.ticket: str = self.latest("ticket")


class Client(Process):
    """``distro-optim join``."""

    def __init__(self, folder: Path, name: str, ticket: str, *arguments: str) -> None:
        self.checkpoints = folder / f"{name}-checkpoints"
        super().__init__(
            folder / f"{name}.log",
            "join",
            ticket,
            "--iroh-relay",
            "none",
            "--logs",
            "json",
            "--device",
            "cpu",
            *(() if "--checkpoint-dir" in arguments else ("--no-checkpoints",)),
            *arguments,
        )
