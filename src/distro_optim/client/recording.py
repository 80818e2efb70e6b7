"""Keeps what a run is repeated from: everybody's results, and the weights and the state with which it began.

The folder is that of Psyche's ``--write-gradients-dir`` (PsycheFoundation/psyche ``shared/client/src/state/train.rs``):
``result-ID-stepS-batchB[A, B].vec-postcard`` with the first 4 bytes of the sender's key as ID. Psyche's clients write
their own results only; here each one that came is written. :mod:`.replay` reads the folder.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..buffer import Writer
from ..comm.signing import SecretKey
from ..compress.wire import decode_download, encode_distro_result
from ..coordinator.formats.text import to_toml
from ..coordinator.types import Coordinator
from ..errors import ConfigurationError, ProtocolError
from ..models.config import CONFIG_FILE, one_line
from ..optim.rules import PUBLISHED
from ..optim.state import WEIGHT
from ..optimizer import DisTrO
from .replay import INITIAL_FILE, STATE_FILE

__all__ = ["Recorder"]

MAX_WAITING: Final = 64
"""Results that wait for the disk; what comes while it is so far behind is not written. Chosen arbitrarily."""

MIN_FREE_BYTES: Final = 1 << 30
"""What a recording leaves of the disk to others, checkpoints above all. Chosen arbitrarily."""

_TAG: Final = re.compile(r"(?:downloaded-)?distro-result(?:-(?P<sender>[0-9a-f]{8}))?_(?P<step>\d{1,10})")
_FILE: Final = re.compile(r"result-[0-9a-f]{8}-step(\d{1,10})-batchB.*\.vec-postcard")

_log = logging.getLogger(__name__)


class Recorder:
    """Writes results in a thread of its own. What goes wrong with the disk is told once, and ends nothing.

    Where the disk has less than :data:`MIN_FREE_BYTES` left, results are not written.

    Args:
        folder: is made if it is not there.
        key: ours; our results have its name.
        keep: so many of the latest steps stay; None keeps all.
        tell: told the news; from any thread.

    Raises:
        ConfigurationError: the folder cannot be used.
    """

    def __init__(self, folder: Path, key: SecretKey, *, keep: int | None, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._me = key.public.hex()[:8]
        self._keep = keep
        self._tell = tell
        self._waiting: queue.Queue[tuple[str, bytes] | None] = queue.Queue(MAX_WAITING)
        self._began = self._failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise ConfigurationError(
                f"--write-gradients-dir {folder}: {error.strerror or error}", name="write_gradients_dir", value=folder
            ) from None
        self._thread = threading.Thread(target=self._keep_writing, name="distro-optim-recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Writes what is waiting."""
        self._waiting.put(None)
        self._thread.join()

    def see(self, tag: str, data: bytes) -> None:
        """A result, ours or another's. Returns at once; for any thread.

        Args:
            tag: under which it is offered, which names sender and step.
            data: the blob.
        """
        try:
            self._waiting.put_nowait((tag, data))
        except queue.Full:
            self._fail("the disk is too slow for the results that come")

    def begin(
        self, state: Coordinator, config: str, parameters: Mapping[str, Tensor], optimizer: DisTrO, step: int
    ) -> None:
        """Writes with what the recording begins, the first time it is called.

        Args:
            state: of the run.
            config: text of the model's ``config.json``.
            parameters: of the model by name, in the order of results.
            optimizer: of them.
            step: which begins: everything before it is in the weights.
        """
        if self._began:
            return
        self._began = True
        metadata = {
            "tiling": optimizer.tiling,
            "arithmetic": optimizer.arithmetic,
            "order": json.dumps(list(parameters)),
            "step": str(step),
        }
        group = optimizer.param_groups[0]
        metadata |= {name: str(group[name]) for name in ("update", "gain") if group[name] != PUBLISHED[name]}
        ahead = optimizer.param_groups[0]["looks_ahead"]
        weights = {
            name: (optimizer.state[p][WEIGHT] if ahead else p.detach()).to("cpu", copy=True).contiguous()
            for name, p in parameters.items()
        }
        try:
            (self._folder / STATE_FILE).write_text(to_toml(state), "utf-8")
            (self._folder / CONFIG_FILE).write_text(config, "utf-8")
            save_file(weights, self._folder / INITIAL_FILE, metadata=metadata)
        except (OSError, SafetensorError) as error:
            self._fail(one_line(error))

    def _keep_writing(self) -> None:
        while (item := self._waiting.get()) is not None:
            tag, data = item
            try:
                if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES:
                    self._fail("the disk is almost full; --gradients N keeps the latest steps only")
                    continue
                self._write(tag, data)
            except ProtocolError as error:
                _log.info("a result was not recorded: %s", error)
            except OSError as error:
                self._fail(f"{error.strerror or error}")

    def _write(self, tag: str, data: bytes) -> None:
        match = _TAG.fullmatch(tag)
        result = decode_download(data)
        if match is None or result.step != int(match["step"]):
            raise ProtocolError(f"the result is of step {result.step}, and was offered as {tag}")
        writer = Writer()
        for entry in result.distro_results:
            encode_distro_result(writer, entry)
        start, end = result.batch_id
        batch = f"B{start}" if start == end else f"B[{start}, {end}]"
        path = self._folder / f"result-{match['sender'] or self._me}-step{result.step}-batch{batch}.vec-postcard"
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.write_bytes(writer.finish())
        os.replace(unfinished, path)
        if self._keep is not None:
            self._forget(result.step - self._keep)

    def _forget(self, step: int) -> None:
        """Removes results of this step and before it."""
        for path in self._folder.iterdir():
            if (match := _FILE.fullmatch(path.name)) and int(match[1]) <= step:
                path.unlink(missing_ok=True)

    def _fail(self, reason: str) -> None:
        _log.warning("results cannot be written to %s: %s", self._folder, reason)
        if not self._failed:
            self._failed = True
            self._tell(f"results cannot be written to {self._folder}: {reason}")
