"""Makes a token file and kills its own process after some batches: FOLDER OUT BATCHES."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from distro_optim.data.making import corpus, tokenizing
from distro_optim.data.making.token_writer import Progress
from distro_optim.data.making.vocabulary import ByteTokenizer

SMALL = 2000


def main(folder: str, out: str, batches: int) -> None:
    # Small pieces, so that a small folder has many of them; module constants are read when they are used.
    corpus.PIECE_BYTES = SMALL // 2  # type: ignore[misc]
    tokenizing.BATCH_BYTES = SMALL  # type: ignore[misc]
    left = batches

    def count(done: Progress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    tokenizing.tokenize(corpus.Corpus(folder), ByteTokenizer(), Path(out), kept_every=3 * SMALL, on_progress=count)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
