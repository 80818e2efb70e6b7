"""What ``distro-optim join`` was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Final

from ..comm.iroh.reach import Discovery
from ..console import Mode
from ..coordinator.solana_options import SolanaOptions
from ..errors import ConfigurationError
from ..strategy.upload import TRY_SECONDS, WAIT_SECONDS, Upload

__all__ = ["JoinOptions"]

GIVE_UP_SECONDS: Final = 900.0
"""As for a script: see :mod:`distro_optim.strategy.options`."""


USUAL_AUDITS: Final = 0.02
"""What ``--audit`` means without a number. Each audit costs a gradient or two of a batch."""


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Names are those of Psyche's client where they mean the same (``shared/client/src/cli.rs``).

    Attributes:
        run: a ticket, ``host:port/run-id`` or ``solana:run-id``.
        solana: cluster, wallet and limits of a run on Solana; None for any other.
        identity_secret_key_path: file with our secret key, made if there is none; None makes a new one each time,
            or on Solana takes the one that follows from wallet and run.
        relay: ``"default"``, ``"psyche"``, ``"none"`` or URLs of relay servers.
        discovery: ``"n0"``, ``"local"`` or ``"none"``; None is ``"n0"`` with public relay servers.
        external_addr: where else others reach our endpoint; None leaves it to iroh to find out.
        bind_addr: where our endpoint listens.
        peers: endpoint tickets of peers that nothing else leads to.
        device: ``auto``, ``cpu``, ``mps``, ``cuda``, ``cuda:N`` or ``cuda:X,Y,Z``.
        data_parallelism: how many devices share our batch; each has the whole model, unless ``in_shards``.
        tensor_parallelism: how many compute each sample together, with a part of each matrix.
        shard: devices that share our batch hold the model together, in shards (FSDP2).
        micro_batch_size: sequences in a forward pass.
        grad_accum_in_fp32: accepted for Psyche's sake; several micro-batches are always added up in float32.
        model: folder with the model, in place of the run's own name for it, which is looked up among the hub's
            downloads only.
        data: file, folder or ``data.toml`` with the training data, where the run has them on the disk of each client.
        data_mirrors: where else the run's data are: URLs, ``host:port``, or files and folders of this machine.
        checkpoint_dir: where the model is saved at the end of each epoch; None is a folder of the run's name in
            ``out/join`` (:mod:`.keeping`).
        no_checkpoints: saves nothing.
        keep_steps: how many of them stay.
        keep_every: besides, of each so many steps the first checkpoint stays for good; None keeps no more.
        upload: where each is copied to, a command with ``{path}`` in it or a URL; None copies nothing.
        upload_timeout: seconds for one attempt.
        upload_wait: seconds that the end waits for what has not arrived.
        write_gradients_dir: folder for every result of the run, and for what :mod:`.replay` needs beside them; None
            has none.
        gradients: so many of the latest steps stay there; None keeps all.
        logs: what is shown.
        write_log: file to which log lines are added, at level info; it begins anew when it is full (:mod:`..logs`).
        metrics_port: port on this machine for Prometheus; None has none.
        web: where the run is shown on a page: a port, or ``host:port``; None shows it nowhere.
        dummy_training_delay_secs: how long the training of a run without a model takes.
        audit: share of others' results that are audited, 0 to 1; in a run that has audits of its own, anything above 0
            takes part in those.
        give_up_seconds: without a link to the coordinator, after which the run counts as lost.
        patience: the former name of ``give_up_seconds``.

    Raises:
        ConfigurationError: a count is below 1, a time is not above 0, nothing can be uploaded in this way, or
            checkpoints are wanted and not wanted.
    """

    run: str
    solana: SolanaOptions | None = None
    identity_secret_key_path: Path | None = None
    relay: str | Sequence[str] = "default"
    discovery: Discovery | None = None
    external_addr: str | Sequence[str] | None = None
    bind_addr: str = "0.0.0.0:0"
    peers: Sequence[str] = ()
    device: str = "auto"
    data_parallelism: int = 1
    tensor_parallelism: int = 1
    shard: bool = False
    micro_batch_size: int = 1
    grad_accum_in_fp32: bool = False
    model: Path | None = None
    data: Path | None = None
    data_mirrors: Sequence[str] = ()
    checkpoint_dir: Path | None = None
    no_checkpoints: bool = False
    keep_steps: int = 3
    keep_every: int | None = None
    upload: str | None = None
    upload_timeout: float = TRY_SECONDS
    upload_wait: float = WAIT_SECONDS
    write_gradients_dir: Path | None = None
    gradients: int | None = None
    logs: Mode = "tui"
    write_log: Path | None = None
    metrics_port: int | None = None
    web: str | None = None
    dummy_training_delay_secs: float = 0.0
    audit: float = 0.0
    give_up_seconds: float = GIVE_UP_SECONDS
    patience: InitVar[float | None] = None

    def __post_init__(self, patience: float | None) -> None:
        if patience is not None:
            warnings.warn("patience is now called give_up_seconds", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "give_up_seconds", patience)
        if not self.give_up_seconds > 0:
            raise ConfigurationError(
                f"give_up_seconds must be above 0, got {self.give_up_seconds}",
                name="give_up_seconds",
                value=self.give_up_seconds,
            )
        if not 0 <= self.audit <= 1:
            raise ConfigurationError(
                f"--audit is a share of the results, from 0 to 1, such as {USUAL_AUDITS}: got {self.audit}",
                name="audit",
                value=self.audit,
            )
        if self.no_checkpoints and self.checkpoint_dir is not None:
            raise ConfigurationError(
                f"--no-checkpoints keeps nothing, and --checkpoint-dir {self.checkpoint_dir} would: leave out one",
                name="no_checkpoints",
                value=True,
            )
        if self.no_checkpoints and self.upload is not None:
            raise ConfigurationError(
                "--no-checkpoints keeps nothing that --upload could copy: leave out one",
                name="upload",
                value=self.upload,
            )
        self.upload_to  # noqa: B018 - whether it can be
        for name in (
            "data_parallelism",
            "tensor_parallelism",
            "micro_batch_size",
            "keep_steps",
            "keep_every",
            "gradients",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} must be at least 1, got {value}", name=name, value=value
                )

        self._check_shards()

    @property
    def in_shards(self) -> bool:
        """Whether several processes hold the model together."""
        return self.shard or self.tensor_parallelism > 1

    def _check_shards(self) -> None:
        if not self.in_shards:
            return
        if self.data_parallelism * self.tensor_parallelism == 1:
            raise ConfigurationError(
                "--shard cuts the model for several devices: say how many, with --data-parallelism N", name="shard"
            )
        unable = {"--audit": self.audit > 0, "--write-gradients-dir": self.write_gradients_dir is not None}
        for option, given in unable.items():
            if given:
                raise ConfigurationError(
                    f"{option} needs whole weights, and with --shard or --tensor-parallelism no device has them: leave "
                    "it out",
                    name=option[2:].replace("-", "_"),
                )

    @property
    def upload_to(self) -> Upload | None:
        """Where checkpoints are copied to, with its limits.

        Raises:
            ConfigurationError: it cannot be.
        """
        if self.upload is None:
            return None
        return Upload(self.upload, timeout_seconds=self.upload_timeout, wait_seconds=self.upload_wait)
