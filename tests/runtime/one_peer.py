"""One peer in a process of its own: ``python one_peer.py TICKET STEP_SECONDS``; says what it does, and how it ended."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distro_optim.strategy.network.runtime import Runtime
from runtime.live import LOOPBACK
from runtime.training import TrainingThread


def until_more(peer: TrainingThread, count: int) -> None:
    peer.until(lambda p: len(p.log) > count)


def main(ticket: str, step_seconds: float) -> None:
    peer = TrainingThread(Runtime.connect(ticket, **LOOPBACK), step_seconds=step_seconds)
    peer.start()
    print("joined", flush=True)
    try:
        while not peer.is_done:
            until_more(peer, len(peer.log))
            print(type(peer.log[-1]).__name__, flush=True)
    finally:
        peer.close()
    print("over", peer.error or "", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
