"""A cluster in a thread of its own, whose time goes on, for clients in other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from distro_optim.comm.loop import LoopThread
from distro_optim.testing import Validator
from distro_optim.testing.solana.server import ValidatorServer

__all__ = ["Cluster"]

T = TypeVar("T")


class Cluster:
    """All that is done to the validator is done in its thread, by :meth:`do`."""

    def __init__(self, validator: Validator) -> None:
        self.validator = validator
        self.server = ValidatorServer(validator, real_time=True)
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
