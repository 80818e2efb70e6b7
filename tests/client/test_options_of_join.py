"""What ``distro-optim join`` takes from the command line, from the environment, and refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distro_optim.cli import _parser, main
from distro_optim.client.command import options_from
from distro_optim.client.options import USUAL_AUDITS, JoinOptions
from distro_optim.comm.iroh.reach import PSYCHE_RELAYS, parse_relays
from distro_optim.errors import ConfigurationError

pytestmark = pytest.mark.waiting


def asked(*arguments: str, **environment: str) -> JoinOptions:
    options: JoinOptions = options_from(_parser().parse_args(["join", *arguments]), environment)
    return options


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["example.org:20000/my-run"], {}),
        (["example.org:20000", "my-run"], {}),
        (["--server-addr", "example.org:20000", "--run-id", "'my-run'"], {}),
        ([], {"SERVER_ADDR": "example.org:20000", "RUN_ID": '"my-run"'}),
        (["example.org:20000"], {"RUN_ID": "my-run"}),
    ],
)
def test_a_run_can_be_named_as_psyches_client_names_it(arguments: list[str], environment: dict[str, str]) -> None:
    assert asked(*arguments, **environment).run == "example.org:20000/my-run"


def test_who_audits_says_how_much() -> None:
    assert asked("psyche1abc").audit == 0.0
    assert asked("psyche1abc", "--audit").audit == USUAL_AUDITS
    assert asked("psyche1abc", "--audit", "0.5").audit == 0.5
    assert asked("psyche1abc", AUDIT="0.25").audit == 0.25
    with pytest.raises(ConfigurationError, match="--audit is a share"):
        asked("psyche1abc", "--audit", "2")


def test_a_ticket_names_a_run() -> None:
    assert asked("psyche1abc").run == "psyche1abc"


def test_options_go_before_the_environment() -> None:
    options = asked("psyche1abc", "--micro-batch-size", "4", MICRO_BATCH_SIZE="2", KEEP_STEPS="7", DEVICE="cpu")
    assert (options.micro_batch_size, options.keep_steps, options.device) == (4, 7, "cpu")


def test_how_long_to_wait_for_a_coordinator_that_is_gone_can_be_said() -> None:
    assert asked("psyche1abc", "--give-up-seconds", "3600").give_up_seconds == 3600.0
    assert asked("psyche1abc", GIVE_UP_SECONDS="5").give_up_seconds == 5.0


def test_what_is_left_out_has_the_defaults() -> None:
    assert asked("psyche1abc") == JoinOptions(run="psyche1abc")


def test_names_that_psyche_has_for_relays_are_understood() -> None:
    assert parse_relays(asked("psyche1abc", "--iroh-relay", "disabled").relay) == "none"
    assert parse_relays(asked("psyche1abc", "--iroh-relay", "n0").relay) == "default"
    assert parse_relays(asked("psyche1abc", "--iroh-relay", "psyche").relay) == PSYCHE_RELAYS


@pytest.mark.parametrize("option", ["--iroh-relay", "--relay"])
def test_relay_servers_are_psyches_or_ones_own_or_several(option: str) -> None:
    assert asked("psyche1abc", option, "psyche").relay == "psyche"
    assert asked("psyche1abc", option, "http://localhost:3340").relay == "http://localhost:3340"
    several = "https://a.example/,https://b.example/"
    assert asked("psyche1abc", IROH_RELAY=several).relay == several


def test_discovery_and_external_addresses_are_options_and_variables() -> None:
    options = asked("psyche1abc", "--iroh-discovery", "local", "--external-addr", "203.0.113.7:4433")
    assert (options.discovery, options.external_addr) == ("local", "203.0.113.7:4433")
    assert asked("psyche1abc", IROH_DISCOVERY="N0", EXTERNAL_ADDR="[2001:db8::7]:5") == JoinOptions(
        run="psyche1abc", discovery="n0", external_addr="[2001:db8::7]:5"
    )


def test_the_endpoint_listens_where_it_is_told() -> None:
    options = asked("psyche1abc", "--bind-p2p-port", "4433", "--bind-p2p-interface", "127.0.0.1")
    assert options.bind_addr == "127.0.0.1:4433"


def test_the_model_is_kept_unless_told() -> None:
    assert not asked("psyche1abc").no_checkpoints
    assert asked("psyche1abc", "--no-checkpoints").no_checkpoints
    assert asked("psyche1abc", NO_CHECKPOINTS="true").no_checkpoints


def test_copies_go_where_they_are_told() -> None:
    assert asked("psyche1abc").upload_to is None
    upload = asked("psyche1abc", "--upload", "s3://bucket/run", "--upload-wait", "5").upload_to
    assert upload is not None
    assert (upload.url, upload.wait_seconds) == ("s3://bucket/run", 5.0)


def test_data_may_have_several_mirrors() -> None:
    assert asked("psyche1abc").data_mirrors == ()
    options = asked("psyche1abc", "--data-mirror", "b.example:7", "--data-mirror", "data.toml")
    assert options.data_mirrors == ("b.example:7", "data.toml")


def test_files_are_paths() -> None:
    options = asked("psyche1abc", "-i", "me.key", "--checkpoint-dir", "out")
    assert (options.identity_secret_key_path, options.checkpoint_dir) == (Path("me.key"), Path("out"))


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {}, "which run"),
        (["example.org:20000"], {}, "RUN-ID"),
        (["psyche1abc", "my-run"], {}, "names a run already"),
        (["a:1/b", "my-run"], {}, "names a run already"),
        (["psyche1abc", "--micro-batch-size", "two"], {}, "--micro-batch-size 'two'"),
        (["psyche1abc"], {"MICRO_BATCH_SIZE": "two"}, "MICRO_BATCH_SIZE 'two'"),
        (["psyche1abc", "--micro-batch-size", "0"], {}, "at least 1"),
        (["psyche1abc", "--no-checkpoints", "--checkpoint-dir", "out"], {}, "leave out one"),
        (["psyche1abc", "--upload", "cp {path} x", "--no-checkpoints"], {}, "leave out one"),
        (["psyche1abc", "--upload", "cp x y"], {}, "write {path}"),
        (["psyche1abc", "--upload", "cp {path} x", "--upload-timeout", "0"], {}, "above 0"),
        (["psyche1abc", "--keep-every", "0"], {}, "--keep-every must be at least 1"),
        (["psyche1abc", "--metrics-local-port", "70000"], {}, "0 to 65535"),
        (["psyche1abc", "--iroh-relay", "near"], {}, "^--iroh-relay must be default, psyche, none or a URL"),
        (["psyche1abc"], {"IROH_RELAY": "near"}, "^IROH_RELAY must be"),
        (["psyche1abc", "--iroh-discovery", "near"], {}, "^--iroh-discovery must be n0"),
        (["psyche1abc", "--external-addr", "203.0.113.7"], {}, "^--external-addr must be the IP address and port"),
        (["psyche1abc"], {"EXTERNAL_ADDR": "example.org:1"}, "^EXTERNAL_ADDR must be"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(arguments: list[str], environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        asked(*arguments, **environment)


@pytest.mark.parametrize("run", ["psyche1abc", "'PSYCHE1ABC',"])
def test_a_damaged_ticket_is_told_before_anything_is_imported(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distro_optim.client.joining", None)  # importing it fails
    assert main(["join", run]) == 2
    assert "the ticket is damaged" in capsys.readouterr().err


def test_the_help_says_that_evaluation_is_out_of_scope(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["join", "--help"])
    assert "Evaluation tasks" in capsys.readouterr().out


def test_peers_may_be_named_more_than_once() -> None:
    assert asked("psyche1abc", "--peer", "a", "--peer", "b").peers == ("a", "b")
    assert asked("psyche1abc").peers == ()


def test_the_former_name_of_give_up_seconds_is_taken_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="give_up_seconds"):
        options = JoinOptions(run="psyche1abc", patience=7.0)
    assert options.give_up_seconds == 7.0
    assert options == JoinOptions(run="psyche1abc", give_up_seconds=7.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_time_after_which_a_run_counts_as_lost_is_above_0(seconds: float) -> None:
    with pytest.raises(ConfigurationError, match="give_up_seconds"):
        JoinOptions(run="psyche1abc", give_up_seconds=seconds)
