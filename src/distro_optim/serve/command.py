"""``distro-optim serve``: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..comm.iroh.reach_options import add_reach_options, reach_from
from ..console import narrated
from ..logs import add_log_options

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = "Hosts a run: a coordinator that our clients and Psyche's can join."
    parser.add_argument("--state", type=Path, required=True, metavar="FILE", help="the run, as in Psyche's state.toml")
    parser.add_argument("--data", type=Path, metavar="FILE", help="serve training data too, as in Psyche's data.toml")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=_port, default=20000, help="TCP port, 0 for any free one (%(default)s)")
    parser.add_argument("--save-dir", type=Path, metavar="DIR", help="keep the run here, saved after each epoch")
    parser.add_argument("--resume", action="store_true", help="go on from what is saved in --save-dir")
    parser.add_argument(
        "--upload",
        metavar="COMMAND|URL",
        help='copy each saved state elsewhere: "rclone copy {path} remote:x", s3://x/y',
    )
    parser.add_argument("--upload-timeout", type=float, metavar="S", help="for one attempt (3600)")
    parser.add_argument("--upload-wait", type=float, metavar="S", help="how long the end waits for it (600)")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY|FILE",
        help="let only these public keys join: a key in hexadecimal, or a file with one a line; may be repeated",
    )
    parser.add_argument(
        "--observer",
        action="append",
        default=[],
        metavar="KEY",
        help="let the owner of this public key look at a run of our own kind without being in it, by distro-optim "
        "verify TICKET; may be repeated, up to 8 times",
    )
    parser.add_argument("--iroh", action="store_true", help="be reached over iroh too, behind a NAT as well")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="secret key of the iroh endpoint")
    parser.add_argument(
        "--bind-p2p-port",
        type=_port,
        default=0,
        metavar="N",
        help="its UDP port (that of the last time, kept with the key, or any)",
    )
    add_reach_options(parser.add_argument)
    parser.add_argument("--max-connections", type=_count, default=1024, metavar="N", help="open at once (%(default)s)")
    parser.add_argument("--init-warmup-time", type=_count, metavar="SECONDS", help="length of the first warm-up")
    parser.add_argument(
        "--keep-disconnected",
        action="store_true",
        help="leave a client that disconnects in its epoch (else it is withdrawn at once)",
    )
    parser.add_argument("--web", metavar="[HOST:]PORT", help="show the run on a page, on this machine unless told")
    parser.add_argument("--metrics-local-port", type=_port, metavar="N", help="Prometheus metrics at 127.0.0.1:N")
    add_log_options(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a line")
    output.add_argument("--plain", action="store_true", help="print lines, also in a terminal")


def run(options: argparse.Namespace) -> int:
    """Serves; 0 when the run is finished, or the process was asked to stop.

    Raises:
        ConfigurationError: an option cannot work; nothing was started.
    """
    # Here, so that the other commands do without all this.
    with narrated("loading the server"):
        import asyncio

        from ..comm.serving.limits import ServerLimits
        from .console import reporter_for
        from .serving import ServeOptions, serve

    def found(name: str) -> tuple[str, Any]:
        return f"--{name.replace('_', '-')}", getattr(options, name)

    request = ServeOptions(
        state=options.state,
        data=options.data,
        host=options.host,
        port=options.port,
        save_dir=options.save_dir,
        resume=options.resume,
        upload=_upload(options),
        allow=options.allow,
        observers=options.observer,
        iroh=options.iroh,
        key_file=options.key_file,
        p2p_port=options.bind_p2p_port,
        **reach_from(found),
        init_warmup_time=options.init_warmup_time,
        withdraw_on_disconnect=not options.keep_disconnected,
        limits=ServerLimits(connections=options.max_connections),
        web=options.web,
        metrics_port=options.metrics_local_port,
    )
    asyncio.run(serve(request, reporter_for(as_json=options.json, plain=options.plain)))
    return 0


def _upload(options: argparse.Namespace) -> Any:
    from ..strategy.upload import Upload

    if options.upload is None:
        return None
    limits = {"timeout_seconds": options.upload_timeout, "wait_seconds": options.upload_wait}
    return Upload(options.upload, **{name: value for name, value in limits.items() if value is not None})


def _count(text: str) -> int:
    value = _number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _port(text: str) -> int:
    value = _number(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {value}")
    return value


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
