"""Identities are given, kept in a file that only the owner reads, or made afresh."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from distro_optim.comm.iroh.keys import generate_secret_key, load_secret_key
from distro_optim.errors import ConfigurationError

pytestmark = pytest.mark.waiting


posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes are a matter of POSIX")


def test_the_iroh_package_derives_the_same_id() -> None:
    import iroh

    secret = generate_secret_key()
    assert iroh.SecretKey.from_bytes(secret.to_bytes()).public().to_bytes() == secret.public


def test_a_missing_file_is_made_with_a_key_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "key"
    secret = load_secret_key(path)
    assert path.read_bytes() == secret.to_bytes() == load_secret_key(str(path)).to_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["key"]


@posix_only
def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        load_secret_key(tmp_path / "key")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@posix_only
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_key_that_others_can_touch_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    load_secret_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        load_secret_key(path)


def test_hexadecimal_digits_are_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o600)
    assert load_secret_key(path).to_bytes() == b"\xab" * 32


@pytest.mark.parametrize(
    "content", [b"", b"x" * 31, b"x" * 33, b"g" * 64, b"a" * 64 + b"bb", b"\xff" * 64, bytes(1000)]
)
def test_what_is_no_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="not a secret key"):
        load_secret_key(path)
    assert path.read_bytes() == content


def test_many_who_start_at_once_get_the_same_key(tmp_path: Path) -> None:
    keys: list[bytes] = []
    barrier = threading.Barrier(8)

    def load() -> None:
        barrier.wait()
        keys.append(load_secret_key(tmp_path / "key").to_bytes())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("as exFAT does")

    monkeypatch.setattr(os, "link", refuse)
    secret = load_secret_key(tmp_path / "key")
    assert load_secret_key(tmp_path / "key").to_bytes() == secret.to_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["key"]
