"""Kills a process that writes to a store on disk, again and again, and looks at what is left each time.

Run by ``test_a_killed_writer_loses_nothing.py`` in a process of its own, because it forks.

Prints one JSON object: rounds, killed_in_mid_write, acknowledged, lost, broken.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from distro_optim.comm.iroh.blobs.decoder import Decoder
from distro_optim.comm.iroh.blobs.disk import DiskStore
from distro_optim.comm.iroh.blobs.encoder import encode
from distro_optim.comm.iroh.blobs.getter import missing_ranges
from distro_optim.comm.iroh.blobs.outboard import build_outboard
from distro_optim.comm.iroh.blobs.store import Blob
from distro_optim.comm.iroh.blobs.tree import root_hash

SIZES = (0, 100, 20_000, 300_000, 1_500_000, 3_000_000)

MAX_ACKNOWLEDGED = 4
MAX_SECONDS = 0.03


@dataclass
class Prepared:
    """A blob and its response, hashed before the clock ticks, so that kills hit writing and not hashing."""

    data: bytes
    root: bytes
    outboard: bytes
    response: bytes

    @classmethod
    def of(cls, data: bytes) -> Prepared:
        root, outboard = build_outboard(data)
        return cls(data, root, bytes(outboard), b"".join(encode(Blob(data, outboard))))


def write_for_ever(path: Path, blobs: list[Prepared], seed: int, pipe: int) -> None:
    """Adds blobs, completes downloads, moves tags, collects garbage; acknowledges each tag with a line."""
    rng = random.Random(seed)
    store = DiskStore(path, durable=False)
    os.write(pipe, b"started\n")
    for serial in count():
        blob = rng.choice(blobs)
        tag = f"t{seed}_{serial % 4}"
        if len(blob.data) < 10**6:
            store.add(blob.data, tag=tag)
        elif blob.root in store:
            store.set_tag(tag, blob.root)
        else:
            partial = store.begin(blob.root)
            decoder = Decoder(
                blob.root,
                missing_ranges(partial.prefix),
                max_size=len(blob.data),
                prefix=partial.prefix,
                new_outboard=partial.new_outboard,
            )
            # One that was killed between the last byte and its name in the store has nothing to ask for.
            if partial.prefix is None or not partial.prefix.is_complete:
                # A response to a request for the rest is made as it would be for a peer.
                response = blob.response
                if partial.prefix is not None:
                    whole = Blob(blob.data, blob.outboard)
                    response = b"".join(encode(whole, missing_ranges(partial.prefix)))
                for verified in decoder.receive(response):
                    partial.append(verified.data)
                partial.prefix = decoder.prefix
            store.complete(partial, tag=tag)
            partial.close()
        os.write(pipe, f"{tag} {blob.root.hex()}\n".encode())
        if serial % 4 == 3:
            store.collect_garbage()


def main(path: Path, rounds: int) -> dict[str, int]:
    rng = random.Random(1)
    blobs = [Prepared.of(rng.randbytes(size + i)) for size in SIZES for i in range(4)]
    outboards = {blob.root: blob.outboard for blob in blobs}
    told = {"rounds": 0, "killed_in_mid_write": 0, "acknowledged": 0, "lost": 0, "broken": 0}
    for seed in range(rounds):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            try:
                write_for_ever(path, blobs, seed, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        with os.fdopen(read_end) as lines:
            assert lines.readline() == "started\n"
            # Counted in what it has done, not in time alone: on a busy machine it may not have come to write at all.
            acknowledged = [lines.readline().split() for _ in range(rng.randrange(MAX_ACKNOWLEDGED))]
            time.sleep(rng.uniform(0.0, MAX_SECONDS))
            os.kill(pid, signal.SIGKILL)
            acknowledged += [line.split() for line in lines if line.endswith("\n")]
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        told["rounds"] += 1
        told["acknowledged"] += len(acknowledged)
        left_over = [*(path / "tmp").iterdir(), *(path / "partial").iterdir()]
        told["killed_in_mid_write"] += bool(left_over)
        with DiskStore(path, keep_cut_seconds=0.0, durable=False) as store:
            for root in list(store._blobs):
                blob = store.get(root)
                if blob is None or root_hash(blob.data) != root or bytes(blob.outboard) != outboards[root]:
                    told["broken"] += 1
            # The last line of a tag counts; one more move of it may have happened without being acknowledged.
            tags = store.tags()
            for tag, root_hex in dict(acknowledged).items():
                if tags.get(tag) is None or (tags[tag].hex() == root_hex and bytes.fromhex(root_hex) not in store):
                    told["lost"] += 1
            told["broken"] += any((path / "tmp").iterdir())
            if seed % 5 == 4:
                store.delete_tags(lambda _: True)
                store.collect_garbage()
                told["broken"] += store.used_bytes != 0
    return told


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    try:
        print(json.dumps(main(directory, int(sys.argv[2]))))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
