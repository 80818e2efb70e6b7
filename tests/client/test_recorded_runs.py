"""A whole run that one client records is repeated from the recording."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client.processes import DISTRO, TINY_LLAMA, Server, write_state, write_tokens
from distro_optim.client.joining import join
from distro_optim.client.options import JoinOptions
from distro_optim.client.replay import Recording, replay
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.rounds.rounds import Rounds
from distro_optim.verify.recompute import Evidence

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


def test_a_recorded_run_is_repeated_to_the_weights_that_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited, audits = Rounds.audited, []

    def listen(rounds: Rounds, step: int, trainer: bytes, found: Evidence, *rest: Any) -> Any:
        audits.append((step, found))
        return audited(rounds, step, trainer, found, *rest)

    monkeypatch.setattr(Rounds, "audited", listen)
    data, vocab_size = write_tokens(tmp_path, seq_len=32)
    CausalLM({**TINY_LLAMA, "vocab_size": vocab_size}, "HfLlama").save_pretrained(tmp_path / "tiny-llama")
    state = write_state(
        tmp_path / "state.toml",
        total_steps=6,
        epoch_time=60,
        init_min_clients=2,
        checkpoint='{ Hub = { repo_id = "somebody/tiny-llama" } }',
        data_location='{ Local = "wherever" }',
        optimizer=DISTRO,
    )
    folder = tmp_path / "recording"
    with ExitStack() as stack:
        server = Server(tmp_path, state)
        stack.callback(server.end)
        plain = JoinOptions(
            run=server.ticket,
            relay="none",
            bind_addr="127.0.0.1:0",
            device="cpu",
            data=data,
            model=tmp_path / "tiny-llama",
            logs="none",
            no_checkpoints=True,
        )
        records = replace(
            plain, write_gradients_dir=folder, checkpoint_dir=tmp_path / "checkpoints", no_checkpoints=False
        )
        # In this process, since programs take their time to start.
        with ThreadPoolExecutor(2) as pool:
            for client in [pool.submit(join, options) for options in (records, replace(plain, audit=1.0))]:
                client.result()
    # On a machine that is busy rounds are over before they are audited, or a part of a result is all that there is.
    found = sorted(found.excess for _, found in audits)
    assert not found or found[len(found) // 2] > 0, f"it was trained on its batch: {audits}"
    recording = Recording.open(folder)
    assert recording.as_psyche
    assert all(len(batches) == 2 for batches in recording.results.values()), "both clients' results"
    [saved] = [load_file(path) for path in (tmp_path / "checkpoints").glob("*/model.safetensors")]
    first = load_file(folder / "initial.safetensors")
    equal = [
        replayed.step
        for replayed in replay(recording)
        if all(torch.equal(replayed.weights[name], tensor) for name, tensor in saved.items())
    ]
    # A run that ends at its last step never applies the results of the last two.
    assert equal == [max(recording.results)]
    assert not torch.equal(first["lm_head.weight"], saved["lm_head.weight"])
