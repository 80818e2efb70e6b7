"""What a session, a connection and the strategies can be given is declared once, and shown where it is looked for."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from distro_optim.comm.signing import public_keys
from distro_optim.coordinator.solana_options import SolanaOptions
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.environment import BIND_ADDR, DISCOVERY, EXTERNAL_ADDR, RELAY
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.options import (
    CONNECTION_DEFAULTS,
    SESSION_DEFAULTS,
    STRATEGY_DEFAULTS,
    ConnectionOptions,
    SessionOptions,
    TrainingOptions,
)
from distro_optim.strategy.session import SwarmSession

from .scripts import new_model, new_optimizer

RUN = "example.org:20000/run"


@pytest.mark.parametrize(
    ("declared", "defaults", "function"),
    [
        (ConnectionOptions, CONNECTION_DEFAULTS, Runtime.connect),
        (SessionOptions, SESSION_DEFAULTS, SwarmSession),
    ],
)
def test_a_signature_shows_each_option_with_its_default(
    declared: type, defaults: dict[str, Any], function: Callable[..., Any]
) -> None:
    parameters = inspect.signature(function).parameters
    for name, default in defaults.items():
        assert parameters[name].default == default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert set(defaults) == set(declared.__annotations__) - {"patience"}  # the older name of another


@pytest.mark.parametrize(
    ("declared", "more_than"),
    [(ConnectionOptions, None), (TrainingOptions, ConnectionOptions), (SessionOptions, TrainingOptions)],
)
def test_each_option_is_explained_where_it_is_declared(declared: type, more_than: type | None) -> None:
    inherited = more_than.__annotations__.keys() if more_than is not None else set()
    for name in declared.__annotations__.keys() - inherited:
        assert f"        {name}: " in (declared.__doc__ or "")


def test_an_option_that_nobody_knows_is_refused_at_once() -> None:
    model = new_model()
    with pytest.raises(TypeError, match=r"SwarmSession\(\) got an unexpected keyword argument 'folder'"):
        SwarmSession(model, new_optimizer(model), folder="here")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Runtime.connect\(\) got an unexpected keyword argument 'config_file'"):
        Runtime.connect(RUN, config_file="here")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("config", {"total_steps": 5}, "give a RunConfig"),
        ("config", RunConfig, "give a RunConfig"),
        ("on_event", "print", "a function that takes a sentence"),
        ("data_seed", "7", "a whole number"),
        ("metrics_port", 99999, "a port such as 9090"),
        ("metrics_port", True, "a port such as 9090"),
        ("give_up_seconds", "10", "a number of seconds"),
        ("peers", "endpoint...", "a list of endpoint tickets"),
        ("allow", "ab" * 32, "a list of public keys"),
        ("solana", "devnet", "SolanaOptions"),
    ],
)
def test_a_value_of_another_kind_is_refused_at_once(option: str, value: Any, advice: str) -> None:
    from distro_optim.strategy.psyche import PsycheStrategy

    model = new_model()
    for make in (functools.partial(SwarmSession, model, new_optimizer(model)), PsycheStrategy):
        with pytest.raises(ConfigurationError, match=advice) as error:
            make(**{option: value})
        assert error.value.name == option


@pytest.mark.parametrize("run", [7, Path("ticket.txt")])
def test_a_run_that_is_no_text_is_refused_at_once(run: Any) -> None:
    from distro_optim.strategy.psyche import PsycheStrategy

    with pytest.raises(ConfigurationError, match="as text"):
        PsycheStrategy(run=run)


def test_keys_that_a_host_allows_may_be_digits_and_what_is_none_is_named() -> None:
    key = bytes(range(32))
    assert public_keys([key, key.hex(), "ff" * 32], name="allow") == {key, b"\xff" * 32}
    for wrong in ("friend", "ab", b"short", 7):
        with pytest.raises(ConfigurationError, match="which is no public key"):
            public_keys([key, wrong], name="allow")  # type: ignore[list-item]


def test_options_for_solana_have_no_use_where_a_run_is_hosted() -> None:
    with pytest.raises(ConfigurationError, match="name the one to join"):
        Runtime.connect(relay="none", solana=SolanaOptions())


def test_a_mistake_in_a_strategys_options_is_found_though_lightning_takes_any_name() -> None:
    from distro_optim.strategy.fabric import FabricPsycheStrategy
    from distro_optim.strategy.psyche import PsycheStrategy

    for strategy in (PsycheStrategy, FabricPsycheStrategy):
        with pytest.raises(ConfigurationError, match="no argument 'chekpoint_dir'; did you mean checkpoint_dir"):
            strategy(chekpoint_dir="here")  # type: ignore[call-arg]
        strategy(find_unused_parameters=True, bucket_cap_mb=10, timeout=None)


def test_settings_that_cannot_work_are_told_in_one_line_before_there_is_a_strategy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(ConfigurationError) as caught:
        RunConfig(total_steps="100")  # type: ignore[arg-type]
    sys.excepthook(caught.type, caught.value, None)
    assert capsys.readouterr().err.startswith("distro_optim: total_steps must be a whole number")


def test_the_older_name_of_an_option_still_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="patience is called give_up_seconds now") as warned:
        Runtime.connect(RUN, relay="none", patience=1.0).close()
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="patience"), pytest.raises(ConfigurationError) as error:
        Runtime.connect(RUN, relay="none", patience=0.0)
    assert error.value.name == "give_up_seconds"
    with pytest.raises(TypeError, match="both"):
        Runtime.connect(RUN, relay="none", patience=1.0, give_up_seconds=1.0)
    model = new_model()
    with pytest.warns(DeprecationWarning, match="patience") as warned:
        SwarmSession(model, new_optimizer(model), run=RUN, patience=1.0)
    assert warned[0].filename == __file__


def connection_of(session: SwarmSession, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the session asks the network for; nothing is opened."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(Runtime, "connect", lambda *_, **options: given.update(options))
    session.connect()
    return given


def test_the_environment_says_how_others_reach_us(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        RELAY: ("relay", "https://relay.example/"),
        DISCOVERY: ("discovery", "local"),
        EXTERNAL_ADDR: ("external_addr", "203.0.113.7:4433"),
        BIND_ADDR: ("bind_addr", "0.0.0.0:4433"),
    }
    for variable, (_, value) in said.items():
        monkeypatch.setenv(variable, value)
    model = new_model()
    given = connection_of(SwarmSession(model, new_optimizer(model), run=RUN), monkeypatch)
    assert {name: given[name] for name, _ in said.values()} == dict(said.values())


def test_what_the_script_says_of_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RELAY, "https://relay.example/")
    monkeypatch.setenv(EXTERNAL_ADDR, "203.0.113.7:4433")
    model = new_model()
    session = SwarmSession(model, new_optimizer(model), run=RUN, relay="http://here:3340", external_addr="192.0.2.1:5")
    given = connection_of(session, monkeypatch)
    assert (given["relay"], given["external_addr"]) == ("http://here:3340", "192.0.2.1:5")


@pytest.mark.parametrize("relay", ["https://relay.example", ["https://a.example/", "http://b:3340"], "psyche", "n0"])
def test_the_network_takes_relay_servers_as_scripts_write_them(relay: Any) -> None:
    Runtime.connect(RUN, relay=relay).close()


@pytest.mark.parametrize(
    ("option", "value"), [("relay", "nearest"), ("discovery", "mdns"), ("external_addr", "example.org:4433")]
)
def test_a_way_to_reach_us_that_cannot_be_is_refused_before_anything_is_opened(option: str, value: Any) -> None:
    from distro_optim.strategy.fabric import FabricPsycheStrategy
    from distro_optim.strategy.psyche import PsycheStrategy

    model = new_model()
    makers: list[Callable[..., object]] = [
        functools.partial(SwarmSession, model, new_optimizer(model), run=RUN),
        functools.partial(Runtime.connect, RUN),
        PsycheStrategy,
        FabricPsycheStrategy,
    ]
    for make in makers:
        with pytest.raises(ConfigurationError, match=f"^{option} must be") as error:
            make(**{option: value})
        assert error.value.name == option


def test_strategies_show_what_a_session_may_be_given() -> None:
    from distro_optim.strategy.fabric import FabricPsycheStrategy
    from distro_optim.strategy.psyche import PsycheStrategy

    for strategy in (FabricPsycheStrategy, PsycheStrategy):
        parameters = inspect.signature(strategy.__init__).parameters
        assert {"run", *STRATEGY_DEFAULTS} <= parameters.keys()
        assert parameters["tcp"].annotation == "str | None"


def test_what_reads_types_from_a_signature_gets_each_option_once_and_with_a_type() -> None:
    """As the command lines and YAML files of LightningCLI do: ``class_path: distro_optim.LightningPsycheStrategy``."""
    from distro_optim.strategy.fabric import FabricPsycheStrategy
    from distro_optim.strategy.psyche_lightning import LightningPsycheStrategy

    for function in (FabricPsycheStrategy.__init__, LightningPsycheStrategy.__init__, SwarmSession.__init__):
        types = get_type_hints(function)
        assert STRATEGY_DEFAULTS.keys() <= types.keys() <= {*inspect.signature(function).parameters, "return"}
        assert types["config"] == RunConfig | None
