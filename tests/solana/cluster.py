"""A cluster in a thread of its own, whose time goes on, for clients in other processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from solders.keypair import Keypair

from distro_optim.cli import main
from distro_optim.comm.loop import LoopThread
from distro_optim.testing import Validator
from distro_optim.testing.solana.server import ValidatorServer
from solana.solana_arena import OPERATOR

__all__ = ["Cluster", "Command"]

T = TypeVar("T")


class Cluster:
    """All that is done to the validator is done in its thread, by :meth:`do`."""

    def __init__(self, validator: Validator, *, slot_seconds: float | None = None) -> None:
        self.validator = validator
        self.server = ValidatorServer(validator, real_time=True, slot_seconds=slot_seconds)
        self._loop = LoopThread("cluster")

    def __enter__(self) -> Cluster:
        self._loop.start()
        self._loop.run(self.server.__aenter__(), 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self.server.__aexit__(), 30)
        self._loop.stop(5)

    def do(self, what: Callable[[], T]) -> T:
        """The value of ``what``, called in the cluster's thread."""

        async def call() -> T:
            await asyncio.sleep(0)
            return what()

        return self._loop.run(call(), 30)


class Command:
    """``distro-optim run`` about a run; returns what it prints."""

    def __init__(self, cluster: Cluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.cluster, self.folder, self._capsys = cluster, folder, capsys

    def __call__(
        self,
        action: str,
        *arguments: str,
        status: int = 0,
        keys: Keypair = OPERATOR,
        name: str = "mine",
        wallet: bool = True,
    ) -> str:
        file = self.folder / "wallet.json"
        file.write_text(json.dumps(list(bytes(keys))))
        file.chmod(0o600)
        cluster = ["--rpc", self.cluster.server.url, *(["--wallet", str(file)] if wallet else [])]
        assert main(["run", action, name, *arguments, *cluster]) == status
        said = self._capsys.readouterr()
        return said.out if status == 0 else said.err
