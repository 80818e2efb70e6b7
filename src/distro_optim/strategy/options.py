"""The keyword arguments that a session, a connection and the strategies share, each with its type and meaning once.

Functions take them as ``**options: Unpack[SessionOptions]`` or the like. :func:`shows` lists them one by one in the
signature that ``help()`` prints, and :func:`complete` fills in the defaults.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Final, Literal, TypedDict, TypeVar, cast, get_type_hints

from torch import Tensor

from ..comm.iroh.reach import parse_discovery, parse_external_addrs, parse_relays
from ..comm.signing import SecretKey
from ..coordinator.solana_options import SolanaOptions
from ..errors import ConfigurationError
from .config import RunConfig
from .port import RunAccess
from .upload import Upload

__all__ = [
    "CONNECTION_DEFAULTS",
    "SESSION_DEFAULTS",
    "STRATEGY_DEFAULTS",
    "ConnectionOptions",
    "LearningRates",
    "SessionOptions",
    "StrategyOptions",
    "TrainingOptions",
    "check_kinds",
    "check_reach",
    "complete",
    "fill_in",
    "shows",
]

LearningRates = Literal["script", "run"]
"""Whose learning rates count."""

GIVE_UP_SECONDS: Final = 900.0
"""A machine that is switched off and on again, or a friend who comes back from lunch, is back within this time; a
rented GPU that waits costs something. Chosen arbitrarily."""

_OLD_NAMES: Final = {"patience": "give_up_seconds"}
"""Options that were renamed: old name to new one."""

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=Mapping[str, Any])


class ConnectionOptions(TypedDict, total=False):
    """How a peer reaches a run.

    Keys:
        secret_key: who we are: a key, its 32 bytes, or the path of a key file, which is made if there is none. None,
            the default, is a new identity each time; for the host of a run with a ``checkpoint_dir`` (or a ``save_dir``
            in its ``config``), the one that is kept there in ``host.key``, so that its ticket outlives its process.
        relay: ``"default"`` for iroh's public relay servers, ``"psyche"`` for Psyche's, ``"none"``, or the URL of a
            relay server, or several.
        discovery: where peers find each other by their keys: ``"n0"``, iroh's public DNS; ``"local"``, files on this
            machine, as Psyche's clients have them; ``"none"``. None, the default, is the first with public relays.
        external_addr: where else others reach our endpoint, such as ``"203.0.113.7:4433"``, for a forwarded port or a
            one-to-one NAT; one address or several. None, the default, leaves it to iroh to find out.
        bind_addr: where our endpoint listens, ``"0.0.0.0:0"`` by default.
        tcp: where a host listens for TCP beside iroh, such as ``"0.0.0.0:20000"``; None, the default, does not.
        peers: endpoint tickets of peers that nothing else leads to; none by default.
        allow: public keys that a host lets in, 32 bytes or 64 hexadecimal digits each; None, the default, lets
            everybody in.
        solana: of a run on Solana, ``run="solana:RUN-ID"``: cluster, wallet, limits. None, the default, takes
            :class:`~distro_optim.coordinator.solana_options.SolanaOptions` as it is: devnet, and the wallet of
            ``solana-keygen``. There, the default of ``secret_key`` is the key that follows from wallet and run.
        give_up_seconds: seconds without a link to the coordinator after which the run counts as lost; 900 by default,
            since a host that has a ``checkpoint_dir`` comes back under the same ticket. Meanwhile it is said that we
            wait, and Ctrl-C leaves with what was trained.
        patience: the older name of ``give_up_seconds``.
    """

    secret_key: SecretKey | bytes | str | PathLike[str] | None
    relay: str | Sequence[str]
    discovery: Literal["n0", "local", "none"] | bool | None
    external_addr: str | Sequence[str] | None
    bind_addr: str
    tcp: str | None
    peers: Sequence[str]
    allow: Sequence[bytes | str] | None
    solana: SolanaOptions | None
    give_up_seconds: float
    patience: float


class TrainingOptions(ConnectionOptions, total=False):
    """How a peer takes part in a run; besides, how it reaches the run: see :class:`ConnectionOptions`.

    Keys:
        config: of a run that is hosted. By default, and where it leaves something open, the script's optimizer decides,
            and in a framework the trainer.
        data_seed: of the order of samples; None, the default, makes one from the run's name.
        checkpoint_dir: folder for checkpoints, one at the end of each epoch and one at the end. None, the default,
            saves nothing. A host keeps its key and its UDP ports there, too: publish the folders of steps, not all of
            it.
        keep_checkpoints: how many stay; 3 by default.
        keep_every: besides, of each so many steps the first checkpoint stays for good. None, the default, keeps no more
            than ``keep_checkpoints``.
        upload: where each checkpoint is copied to: a command with ``{path}`` in it, such as
            ``"rclone copy {path} remote:bucket/{name}"``, a URL that fsspec knows, such as ``"s3://bucket/run"``, or an
            :class:`~.upload.Upload` with limits of your own. Training never waits for it. None, the default, copies
            nothing.
        resume: go on from the newest checkpoint there, if there is one; False by default. A peer that joins takes the
            run's weights if those differ, and says so. Where no peer has weights to share, a peer with a checkpoint of
            the run's step supplies them.
        learning_rates: ``"script"``: those of the parameter groups, which must be the same on all peers; ``"run"``: the
            coordinator's. None, the default, takes the script's unless it is a run of Psyche's.
        on_event: called with news in words, one sentence each; they are logged besides. While the thread that trains
            is busy for long with the run's own work, another thread calls it. None by default.
        web: a port, 0 for any free one, or ``"host:port"``: a page that shows the run live. Without a host it can be
            opened on this machine alone; a host that others reach wants the key that is part of the page's address.
            None, the default, has none.
        metrics_port: a port of this machine, 0 for any free one, that Prometheus reads at ``/metrics``; None, the
            default, has none.
    """

    config: RunConfig | None
    data_seed: int | None
    checkpoint_dir: str | PathLike[str] | None
    keep_checkpoints: int
    keep_every: int | None
    upload: str | Sequence[str] | Upload | None
    resume: bool
    learning_rates: LearningRates | None
    on_event: Callable[[str], None] | None
    web: int | str | None
    metrics_port: int | None


class SessionOptions(TrainingOptions, total=False):
    """What a session may be given: all of :class:`TrainingOptions` and :class:`ConnectionOptions`, and what follows.

    Keys:
        dataset_size: samples in the dataset; the same on all peers. None, the default, will do if only
            :attr:`.Round.batch` is used.
        port: an access to the run, in place of the connection that the other options describe. None by default.
        audit_loss: in a run with :attr:`.RunConfig.audit_fraction`, what others' results are audited with: given
            indices of samples, as :attr:`.Round.indices` has them, it returns their mean loss by the model that trains,
            as a scalar tensor. It must not change anything but the model, which is as it was afterwards. Without it,
            the default, this peer audits nobody.
    """

    dataset_size: int | None
    port: RunAccess | None
    audit_loss: Callable[[list[int]], Tensor] | None


class StrategyOptions(TrainingOptions, total=False):
    """What a strategy may be given: all of :class:`TrainingOptions` and :class:`ConnectionOptions`, and what follows.

    Keys:
        session_arguments: more options, as a dict; the older way to give those that are not for every script.

    The others go to Lightning's or Fabric's ``DDPStrategy`` and matter with several devices.
    """

    session_arguments: Mapping[str, Any] | None
    accelerator: Any
    parallel_devices: Any
    cluster_environment: Any
    checkpoint_io: Any
    precision: Any
    precision_plugin: Any
    ddp_comm_state: Any
    ddp_comm_hook: Any
    ddp_comm_wrapper: Any
    model_averaging_period: Any
    process_group_backend: Any
    timeout: Any
    start_method: Any
    find_unused_parameters: Any
    gradient_as_bucket_view: Any
    static_graph: Any
    broadcast_buffers: Any
    bucket_cap_mb: Any


CONNECTION_DEFAULTS: Final[ConnectionOptions] = {
    "secret_key": None,
    "relay": "default",
    "discovery": None,
    "external_addr": None,
    "bind_addr": "0.0.0.0:0",
    "tcp": None,
    "peers": (),
    "allow": None,
    "solana": None,
    "give_up_seconds": GIVE_UP_SECONDS,
}
"""Of :class:`ConnectionOptions`."""

STRATEGY_DEFAULTS: Final[TrainingOptions] = {
    "config": None,
    "data_seed": None,
    "checkpoint_dir": None,
    "keep_checkpoints": 3,
    "keep_every": None,
    "upload": None,
    "resume": False,
    "learning_rates": None,
    "on_event": None,
    "web": None,
    "metrics_port": None,
    **CONNECTION_DEFAULTS,
}
"""Of :class:`TrainingOptions`."""

SESSION_DEFAULTS: Final[SessionOptions] = {
    "dataset_size": None,
    "port": None,
    "audit_loss": None,
    **STRATEGY_DEFAULTS,
}
"""Of :class:`SessionOptions`."""


def complete(options: T, defaults: T, *, of: str) -> T:
    """``options`` with what they lack taken from ``defaults``, and under their present names.

    Args:
        options: as they were given.
        defaults: has all that may be given.
        of: name of the function, for messages.

    Raises:
        TypeError: something else was given.
    """
    given = with_present_names(options, of=of)
    if unknown := given.keys() - defaults.keys():
        raise TypeError(f"{of}() got an unexpected keyword argument {min(unknown)!r}")
    return cast(T, {**defaults, **given})


def fill_in(options: SessionOptions, said: Mapping[str, object]) -> SessionOptions:
    """``options`` with what is ``said`` elsewhere in place of those that were left at their defaults."""
    given: Mapping[str, object] = options
    defaults: Mapping[str, object] = SESSION_DEFAULTS
    untouched = {name: value for name, value in said.items() if given[name] == defaults[name]}
    return cast(SessionOptions, {**options, **untouched})


def check_reach(options: Mapping[str, Any]) -> None:
    """Looks at what says how others reach us, without any network.

    Raises:
        ConfigurationError: it cannot be; the message names the option.
    """
    relays = parse_relays(options.get("relay", "default"))
    parse_discovery(options.get("discovery"), relays)
    parse_external_addrs(options.get("external_addr"))


def check_kinds(options: Mapping[str, Any]) -> None:
    """Looks at options of which a wrong kind would be found late, deep inside, or never.

    Raises:
        ConfigurationError: one is something else than it must be; names it, and says what to give.
    """

    def check(name: str, fits: Callable[[Any], bool], wanted: str) -> None:
        value = options.get(name)
        if value is not None and not fits(value):
            raise ConfigurationError(f"{name}={value!r}: give {wanted}", name=name, value=value)

    check("config", lambda v: isinstance(v, RunConfig), "a RunConfig, such as RunConfig(total_steps=1000)")
    check("on_event", callable, "a function that takes a sentence, such as print")
    check("data_seed", _is_whole, "a whole number, the same on all peers")
    check("metrics_port", lambda v: _is_whole(v) and 0 <= v < 1 << 16, "a port such as 9090, or 0 for any free one")
    check("give_up_seconds", lambda v: isinstance(v, int | float) and not isinstance(v, bool), "a number of seconds")
    check("peers", lambda v: not isinstance(v, str), "a list of endpoint tickets")
    check("allow", lambda v: not isinstance(v, str | bytes), "a list of public keys")
    check("solana", lambda v: isinstance(v, SolanaOptions), "SolanaOptions(...)")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def with_present_names(options: Mapping[str, Any], *, of: str) -> dict[str, Any]:
    """``options``, with a warning for each that has an older name.

    Raises:
        TypeError: one is given under both names.
    """
    given = dict(options)
    for old, new in _OLD_NAMES.items():
        if old in given:
            if new in given:
                raise TypeError(f"{of}() got both {new!r} and its older name {old!r}")
            # The caller of the function with these options; for what a framework calls later, that is close enough.
            warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=4)
            given[new] = given.pop(old)
    return given


def shows(declared: type, defaults: Mapping[str, Any], *, and_more: bool = False) -> Callable[[F], F]:
    """Decorates a function with ``**options``: its signature, as ``help()`` prints it, has them one by one.

    Its annotations do so, too, with types that can be evaluated: command lines and YAML files are read by both.

    Args:
        declared: the TypedDict that declares them.
        defaults: those to be shown.
        and_more: there are others, which stay ``**options``.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        rest = parameters.pop()
        for name, default in defaults.items():
            annotation = declared.__annotations__[name]
            annotation = getattr(annotation, "__forward_arg__", annotation)
            parameters.append(inspect.Parameter(name, rest.KEYWORD_ONLY, default=default, annotation=annotation))
        if and_more:
            parameters.append(rest.replace(annotation=inspect.Parameter.empty))
        setattr(function, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - unknown to mypy
        types = get_type_hints(declared)
        function.__annotations__.pop(rest.name, None)
        function.__annotations__.update({name: types[name] for name in defaults})
        return function

    return decorate
