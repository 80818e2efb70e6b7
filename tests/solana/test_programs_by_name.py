"""Which programs coordinate a run: by the name of a preset, or by a TOML file of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.cli import _parser, main
from distro_optim.client.command import options_from
from distro_optim.coordinator.solana.participation import programs_of
from distro_optim.coordinator.solana.programs import Programs
from distro_optim.coordinator.solana_deployments import DEPLOYMENTS, MAX_FILE_BYTES, deployment_of
from distro_optim.coordinator.solana_options import SolanaOptions
from distro_optim.errors import ConfigurationError
from solana.solana_arena import wallet

OURS = str(wallet(5).pubkey())


def test_what_is_meant_without_a_name_is_psyches_newest_source() -> None:
    assert programs_of(SolanaOptions()) == Programs()
    assert programs_of(SolanaOptions(programs="psyche-claimers")) == Programs(account_version=2)


def test_every_preset_has_ids_that_are_keys() -> None:
    for name, preset in DEPLOYMENTS.items():
        programs = programs_of(SolanaOptions(programs=name))
        assert (str(programs.coordinator), programs.account_version) == (preset.coordinator, preset.account_version)


def test_a_file_says_what_is_different(tmp_path: Path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text(f'coordinator = "{OURS}"\naccount_version = 2\n')
    programs = programs_of(SolanaOptions(programs=file))
    assert (str(programs.coordinator), programs.account_version) == (OURS, 2)
    assert programs.treasurer == Programs().treasurer
    # What is said besides counts more.
    said = programs_of(SolanaOptions(programs=str(file), treasurer_program=OURS, account_version=1))
    assert (str(said.treasurer), said.account_version, str(said.coordinator)) == (OURS, 1, OURS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("coordinator =", "names no programs: Invalid value"),
        ('program = "x"', "there is no 'program', only coordinator, authorizer, treasurer, account_version"),
        ("treasurer = 5", "treasurer takes a key in base58, in quotation marks"),
        ('account_version = "2"', "account_version takes a number"),
        ("account_version = true", "account_version takes a number"),
        ("#" * (MAX_FILE_BYTES + 1), "too large to name programs"),
        ("\udcff", "names no programs"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match=words) as caught:
        deployment_of(file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_that_nothing_has_and_ids_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "list", "--programs", "moon"]) == 2
    assert capsys.readouterr().err == (
        "distro-optim: there are no programs 'moon', only psyche, psyche-claimers, psyche-2025, and those that a TOML "
        "file names\n"
    )
    assert main(["run", "show", "x", "--programs", str(tmp_path / "missing.toml")]) == 2
    assert "missing.toml names no programs: [Errno 2]" in capsys.readouterr().err
    file = tmp_path / "short.toml"
    file.write_text('authorizer = "short"')
    with pytest.raises(ConfigurationError, match="authorizer_program is 'short', which is no public key"):
        programs_of(SolanaOptions(programs=file))
    with pytest.raises(ConfigurationError, match="of version 9 are not known"):
        programs_of(SolanaOptions(account_version=9))


def test_the_command_takes_them_as_options_and_from_the_environment() -> None:
    def solana(*arguments: str, **environment: str) -> SolanaOptions | None:
        options = options_from(_parser().parse_args(["join", "solana:my-run", *arguments]), environment)
        assert options.solana is None or isinstance(options.solana, SolanaOptions)
        return options.solana

    wanted = SolanaOptions(programs="ours.toml", account_version=2, claimer=OURS)
    assert solana("--programs", "ours.toml", "--account-version", "2", "--claimer", OURS) == wanted
    assert solana(PROGRAMS="ours.toml", ACCOUNT_VERSION="2", CLAIMER=OURS) == wanted
    with pytest.raises(ConfigurationError, match="--account-version 'two': give a whole number"):
        solana("--account-version", "two")
