"""What has to hold before a session begins: of the model, the optimizer and the options, without any network."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigurationError
from ..optim.sharding import is_sharded
from ..optim.wrapped import is_wrapped
from ..optimizer import DisTrO
from .model.trainer import check_overlap
from .monitor.metrics import load_prometheus
from .options import SessionOptions, check_kinds, check_reach
from .ranks.local_ranks import LocalRanks
from .upload import read_upload

__all__ = ["check_session", "check_sharded", "is_in_shards", "ranks_of_mesh", "refuse_wrapper"]


def is_in_shards(optimizer: DisTrO) -> bool:
    """Whether a parameter of the optimizer is sharded (a DTensor)."""
    return any(is_sharded(param) for group in optimizer.param_groups for param in group["params"])


def check_sharded(options: SessionOptions) -> None:
    """Raises ConfigurationError for what cannot be with a sharded model."""
    if options["audit_loss"] is not None:
        raise ConfigurationError(
            "audit_loss with a sharded model (DTensor): an audit takes gradients of whole weights beside the training; "
            "leave it out, and this peer audits nobody",
            name="audit_loss",
        )


def ranks_of_mesh(optimizer: DisTrO) -> LocalRanks:
    """The processes that hold the optimizer's parameters together."""
    params: list[Any] = [param for group in optimizer.param_groups for param in group["params"]]
    members = {rank for param in params if is_sharded(param) for rank in param.device_mesh.mesh.flatten().tolist()}
    return LocalRanks(sorted(members))


def refuse_wrapper(model: object, optimizer: DisTrO) -> None:
    """Raises ConfigurationError if the parameters are wrapped, though the model that was given is not."""
    if is_wrapped([param for group in optimizer.param_groups for param in group["params"]]):
        raise _wrapped(model)


def _wrapped(model: object) -> ConfigurationError:
    return ConfigurationError(
        "the model is wrapped in DistributedDataParallel, which averages gradients of processes that are in different "
        "rounds, and sends all of them: pass the model in it, model.module, make no wrapper around it (of accelerate: "
        "do not prepare() it), and start one process for each peer; several devices as one peer are possible with "
        "PsycheStrategy, FabricPsycheStrategy and SwarmTrainer",
        name="model",
        value=model,
    )


def check_session(model: object, optimizer: object, options: SessionOptions) -> None:
    """Raises :class:`~distro_optim.errors.ConfigurationError` if something is wrong that needs no network to see."""
    if isinstance(model, DistributedDataParallel):
        raise _wrapped(model)
    if not isinstance(optimizer, DisTrO):
        raise ConfigurationError(
            f"a run needs the optimizer DisTrO, got {type(optimizer).__name__}: write "
            "optimizer = distro_optim.DisTrO(model.parameters(), lr=...)",
            name="optimizer",
            value=optimizer,
        )
    check_kinds(options)
    check_reach(options)
    if options["metrics_port"] is not None:
        load_prometheus()
    if options["web"] is not None:
        from .monitor.page import parse_place

        parse_place(options["web"])
    learning_rates, size = options["learning_rates"], options["dataset_size"]
    if learning_rates not in (None, "script", "run"):
        raise ConfigurationError(
            f'learning_rates={learning_rates!r}: give "script", "run" or None', name="learning_rates"
        )
    if size is not None and size < 1:
        raise ConfigurationError(f"dataset_size={size}: a run needs samples", name="dataset_size", value=size)
    if options["checkpoint_dir"] is None and (options["upload"] is not None or options["keep_every"] is not None):
        name = "upload" if options["upload"] is not None else "keep_every"
        raise ConfigurationError(f"{name} is about checkpoints, and none are saved: give checkpoint_dir", name=name)
    read_upload(options["upload"])
    if options["resume"] and options["checkpoint_dir"] is None:
        raise ConfigurationError("resume=True needs the folder to resume from: give checkpoint_dir", name="resume")
    check_overlap(optimizer)
    if not any(param.requires_grad for group in optimizer.param_groups for param in group["params"]):
        raise ConfigurationError(
            "no parameter of the optimizer has requires_grad, so there is nothing to train: unfreeze some, or give "
            "the optimizer those that are to be trained",
            name="optimizer",
        )
