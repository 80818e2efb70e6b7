"""Two terminals exchange a file, every byte verified, through routers and without an account anywhere.

::

    $ python examples/p2p_blob.py share picture.png
    blobaaaa...                                        one line, for the other terminal
    $ python examples/p2p_blob.py get blobaaaa... picture.png

A transfer that was cut goes on where it stopped: run the same ``get`` again. With ``--local`` neither terminal uses
anything but the loopback interface.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from distro_optim.comm.iroh.blobs.disk import DiskStore
from distro_optim.comm.iroh.blobs.net import BlobService
from distro_optim.comm.iroh.blobs.store import MemoryStore
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.tickets import BlobTicket
from distro_optim.errors import DistroError

# What a shell reports for a program that Ctrl-C ended.
INTERRUPTED: Final = 130
# Until the relay is known; without one, only peers of the same network can use the ticket.
ONLINE_SECONDS: Final = 10.0
TAG: Final = "file"

console = Console(stderr=True, highlight=False)


def make_node(local: bool) -> Node:
    return Node(bind_addr="127.0.0.1:0", relay="none") if local else Node()


def share(path: Path, *, local: bool) -> None:
    """Offers ``path`` until Ctrl-C."""
    data = path.read_bytes()
    with make_node(local) as node:
        store = MemoryStore()
        BlobService(node, store)
        root = store.add(data, tag=TAG)
        if not local:
            try:
                node.submit(node.online()).result(ONLINE_SECONDS)
            except TimeoutError:
                console.print("No relay answers; the ticket works within this network only.", style="yellow")
        console.print(f"Sharing {path.name}, {decimal(len(data))}. The ticket, for the other terminal:")
        print(BlobTicket.raw(node.addr(), root), flush=True)
        console.print("Ctrl-C ends it.")
        node.submit(asyncio.Event().wait()).result()


def get(ticket: BlobTicket, path: Path, *, local: bool, max_size: int) -> None:
    """Fetches what ``ticket`` names into ``path``."""
    partial = path.with_name(path.name + ".partial")
    progress = Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with make_node(local) as node, DiskStore(partial) as store:
        service = BlobService(node, store)
        node.addresses.add(ticket.addr)
        with progress:
            task = progress.add_task(path.name, total=None)
            blob = node.submit(
                service.fetch(
                    ticket.hash,
                    [ticket.addr.id],
                    max_size=max_size,
                    tag=TAG,
                    progress=lambda done, size: progress.update(task, completed=done, total=size),
                )
            ).result()
        with partial.joinpath("whole").open("wb") as file:
            file.write(blob.data)
            os.fsync(file.fileno())
        del blob
        os.replace(partial / "whole", path)
    shutil.rmtree(partial)
    console.print(f"{path} is here, {decimal(path.stat().st_size)}, and what its ticket promised.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Exchange a file between two terminals.")
    # For both commands, before or after them.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--local", action="store_true", help="loopback only: both terminals on this machine")
    commands = parser.add_subparsers(required=True, dest="command")
    sharing = commands.add_parser("share", parents=[common], help="offer a file and print its ticket")
    sharing.add_argument("file", type=Path)
    getting = commands.add_parser("get", parents=[common], help="fetch the file of a ticket")
    getting.add_argument("ticket")
    getting.add_argument("file", type=Path, help="where to put it")
    getting.add_argument("--force", action="store_true", help="replace the file if it is there")
    getting.add_argument("--max-size", type=int, default=64 << 30, metavar="BYTES", help="refuse more than this")
    options = parser.parse_args(argv)
    try:
        if options.command == "share":
            share(options.file, local=options.local)
        else:
            if options.file.exists() and not options.force:
                console.print(f"{options.file} is there already; --force replaces it.", style="red")
                return 1
            get(BlobTicket.parse(options.ticket), options.file, local=options.local, max_size=options.max_size)
    except KeyboardInterrupt:
        # The same call goes on where this one stopped.
        console.print("Stopped. What arrived is kept." if options.command == "get" else "No longer shared.")
        return INTERRUPTED
    except (DistroError, OSError) as error:
        console.print(f"{error}", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
