"""``distro-optim join --shard``: processes that hold the model together are one client, beside one that is whole."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.fsdp
from safetensors.torch import load_file

from client import shard_ranks
from client.processes import DISTRO, TINY_LLAMA, Client, Server, write_state
from distro_optim.client.options import JoinOptions
from distro_optim.client.several.processes import started
from distro_optim.errors import ConfigurationError
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import read_config
from distro_optim.models.sharding import check_sharding
from optimizer.process_group_ranks import RankPool

with_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 comes with PyTorch 2.6 and later"
)


def test_what_cannot_be_in_shards_is_said() -> None:
    with pytest.raises(ConfigurationError, match="say how many, with --data-parallelism"):
        JoinOptions(run="psyche1x", shard=True)
    with pytest.raises(ConfigurationError, match="--audit needs whole weights"):
        JoinOptions(run="psyche1x", tensor_parallelism=2, audit=0.1)
    with pytest.raises(ConfigurationError, match="--write-gradients-dir needs whole weights"):
        JoinOptions(run="psyche1x", data_parallelism=2, shard=True, write_gradients_dir=Path("x"))
    assert not JoinOptions(run="psyche1x", data_parallelism=2).in_shards


@with_fsdp2
def test_heads_that_cannot_be_dealt_out_are_said() -> None:
    config = read_config(TINY_LLAMA, "HfLlama")
    with pytest.raises(ConfigurationError, match="does not divide the num_attention_heads of the model, 2"):
        check_sharding(tensor=3, config=config)


def test_where_one_process_cannot_be_started_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    class Process:
        def __init__(self, *, args: tuple[object, int, str], **settings: object) -> None:
            self.number = args[1]

        def start(self) -> None:
            if self.number == 2:
                raise OSError("no more processes")

        def join(self, timeout: float | None = None) -> None:
            did.append(f"join {self.number}")

        def is_alive(self) -> bool:
            return did[-1] != "terminate 1"

        def terminate(self) -> None:
            did.append(f"terminate {self.number}")

    monkeypatch.setattr("torch.multiprocessing.get_context", lambda kind: SimpleNamespace(Process=Process))
    with pytest.raises(OSError, match="no more processes"), started(3, lambda number, meeting: None):
        pass
    assert did == ["join 1", "terminate 1", "join 1"]


@pytest.mark.waiting
@pytest.mark.slow
@with_fsdp2
def test_gradients_of_four_processes_are_those_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pool = RankPool(4, tmp_path)
    try:
        pool.run(shard_ranks.gradients_are_those_of_the_whole_model)
    finally:
        pool.close()


@pytest.mark.waiting
@pytest.mark.slow
@with_fsdp2
def test_two_processes_train_a_model_together_as_one_client(tmp_path: Path) -> None:
    CausalLM({**TINY_LLAMA, "vocab_size": 256}, "HfLlama").save_pretrained(tmp_path / "llama")
    state = write_state(
        tmp_path / "state.toml",
        total_steps=10_000,
        epoch_time=600,
        max_round_train_time=30,
        warmup_time=60,
        optimizer=DISTRO,
        checkpoint='{ Hub = { repo_id = "no-such/model-anywhere" } }',
    )
    with ExitStack() as started:
        server = Server(tmp_path, state)
        started.callback(server.end)
        clients = []
        for name, more in (("shards", ("--shard", "--data-parallelism", "2")), ("whole", ())):
            folder = tmp_path / f"{name}-checkpoints"
            own = ("--model", str(tmp_path / "llama"), "--checkpoint-dir", str(folder))
            client = Client(tmp_path, name, server.ticket, *own, *more)
            started.callback(client.end)
            clients.append(client)
        shards, whole = clients
        for client in clients:
            client.until(lambda each=client: (each.latest("rounds_trained") or 0) >= 3, "three rounds")  # type: ignore[misc]

        def hashes() -> list[dict[int, str]]:
            return [{r["weights_step"]: r["weights"] for r in each.records() if r.get("weights")} for each in clients]

        # Each shows what it has twice a second or less, and rounds may be shorter.
        whole.until(lambda: bool(hashes()[0].keys() & hashes()[1].keys()), "a step of which both show the weights")
        of_shards, of_whole = hashes()
        assert all(of_shards[step] == of_whole[step] for step in of_shards.keys() & of_whole.keys())
        assert not [client.latest("fault") for client in clients if client.latest("fault")]
        # All processes of the client end together, and what they have is saved.
        shards.send(signal.SIGTERM)
        assert shards.wait(60) == 130, shards.log.read_text()[-2000:]
        assert "Traceback" not in shards.log.read_text()
        [saved] = (tmp_path / "shards-checkpoints").glob("proof-step*")
        names = load_file(tmp_path / "llama" / "model.safetensors")
        weights = load_file(saved / "model.safetensors")
        assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in names.items()}
        assert not torch.equal(weights["lm_head.weight"], names["lm_head.weight"])
        whole.send(signal.SIGTERM)
        assert whole.wait(60) == 130
