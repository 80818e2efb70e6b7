"""A node that is started again in the same place has the same key and the same ports, if nobody has taken them."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.home import NodeHome
from distro_optim.comm.iroh.node import opening
from distro_optim.errors import ConfigurationError

pytestmark = pytest.mark.waiting


def node_at(home: NodeHome) -> Node:
    node = Node(secret_key=home.key(), relay="none", bind_addr="127.0.0.1:0", usual_ports=home.ports()).start()
    home.keep_ports(node.sockets())
    return node


def test_key_and_ports_are_those_of_the_last_time(tmp_path: Path) -> None:
    with node_at(NodeHome(tmp_path)) as node:
        before = node.addr()
    with node_at(NodeHome(tmp_path)) as node:
        assert node.addr() == before


def test_the_key_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    NodeHome(tmp_path / "new").key()
    mode = os.stat(tmp_path / "new" / "host.key").st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_where_the_port_is_taken_another_one_is_used_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "USUAL_PORT_SECONDS", 0.0)
    with node_at(NodeHome(tmp_path)) as node:
        port = node.sockets()[0].port
        with caplog.at_level(logging.WARNING), node_at(NodeHome(tmp_path)) as other:
            assert other.sockets()[0].port not in (0, port)
    assert f"UDP port {port}, where this endpoint listened before, is taken" in caplog.text
    assert "fresh ticket" in caplog.text


def test_an_address_that_was_asked_for_comes_before_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / "host.ports").write_text("1\n1\n")
    with Node(relay="none", bind_addr="127.0.0.1:0") as free:
        port = free.sockets()[0].port
    home = NodeHome(tmp_path)
    with Node(relay="none", bind_addr=f"127.0.0.1:{port}", usual_ports=home.ports()) as node:
        assert node.sockets()[0].port == port


def test_two_cannot_live_in_one_place_at_a_time(tmp_path: Path) -> None:
    with NodeHome(tmp_path):
        with pytest.raises(ConfigurationError, match="another process hosts with the key in"):
            NodeHome(tmp_path).enter()
        with NodeHome(tmp_path, "coordinator"):  # another key
            pass
    with NodeHome(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "4433", "4433\nx\n", "70000\n1\n", "0\n5\n", "1\n2\n3\n", "9" * 5000])
def test_ports_that_make_no_sense_are_any_ports(tmp_path: Path, text: str) -> None:
    (tmp_path / "host.ports").write_text(text)
    assert NodeHome(tmp_path).ports() is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="name a folder that can be written"):
        NodeHome(tmp_path / "file").enter()
    with pytest.raises(ConfigurationError, match="name a folder that can be written"):
        NodeHome(tmp_path / "file").key()


def test_who_is_banned_is_read_back_and_a_line_that_is_no_key_is_named(tmp_path: Path) -> None:
    home, keys = NodeHome(tmp_path), [bytes([number]) * 32 for number in (1, 2)]
    assert home.banned() == frozenset()
    assert home.keep_banned(keys)
    assert home.banned() == frozenset(keys)
    (tmp_path / "host.banned").write_text(f"# a friend of mine\n\n{keys[0].hex()}  # no friend\n")
    assert home.banned() == {keys[0]}
    (tmp_path / "host.banned").write_text(f"{keys[0].hex()}\nsomebody\n")
    with pytest.raises(ConfigurationError, match="line 2: 'somebody' is not a key"):
        home.banned()
    assert not NodeHome(tmp_path / "nowhere").keep_banned(keys)
