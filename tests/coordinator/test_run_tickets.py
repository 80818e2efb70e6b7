"""One string for a run: what it says survives, and what was damaged is noticed."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comm.stream_contract import run
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.postcard import decode, encode
from distro_optim.comm.streams import TcpListener, split_address
from distro_optim.coordinator import ticket as ways
from distro_optim.coordinator.ticket import RunTicket, connector
from distro_optim.coordinator.ticket_text import check_text, decode_text, encode_text, is_ticket
from distro_optim.errors import ConfigurationError, ProtocolError

ENDPOINT = EndpointAddr(bytes(range(32)), ("https://relay.example.org/",), (SocketAddr(ip_address("192.0.2.1"), 4433),))
PLAIN = EndpointAddr(bytes(32), ("http://192.0.2.9:3340/", "https://relay.example/"))
"""Known by relay servers only, of which one is without TLS."""
FULL = RunTicket("my run/läuft", ("example.org:20000", "[2001:db8::1]:20000"), ENDPOINT)


def test_what_a_ticket_says_survives_its_text() -> None:
    for ticket in (FULL, RunTicket("a", ("h:1",)), RunTicket("a", (), ENDPOINT), RunTicket("a", ("h:1",), PLAIN)):
        text = str(ticket)
        assert text.startswith("psyche1")
        assert text.isalnum()
        assert text == text.lower()
        assert RunTicket.parse(f"  {text}\n") == ticket


def test_a_ticket_may_name_peers_and_without_any_it_is_as_it_was() -> None:
    plain = str(RunTicket("a", (), ENDPOINT))
    assert decode(tuple[str, list[str], EndpointAddr | None], decode_text(plain)) == ("a", [], ENDPOINT)
    named = RunTicket("a", ("h:1",), ENDPOINT, (PLAIN, ENDPOINT))
    assert RunTicket.parse(str(named)) == named
    with pytest.raises(ProtocolError):
        RunTicket.parse(encode_text(encode(named) + b"\0"))
    with pytest.raises(ConfigurationError):
        str(RunTicket("a", (), ENDPOINT, (PLAIN,) * 5))


def copied(text: str) -> list[str]:
    third = len(text) // 3
    lines = [text[:third], text[third : 2 * third], text[2 * third :]]
    return [
        text.upper(),
        text.capitalize(),
        f'"{text}"',
        f"'{text}',",
        f"\u201c{text}\u201d",
        f"\u00ab{text}\u00bb.",
        f"`{text}`",
        f"<{text}>",
        f"({text}).",
        f"{text},",
        f"{text};\n",
        f"\u200b{text}\ufeff",
        "\n".join(lines),
        "\r\n    ".join(lines),
        f"DISTRO_OPTIM_RUN={text}",
        f"DISTRO_OPTIM_RUN='{text}'",
        f"run={text!r},",
        f"  {text[:50].upper()} {text[50:]} ",
    ]


def test_a_ticket_is_understood_however_it_was_copied() -> None:
    for text in copied(str(FULL)):
        assert RunTicket.parse(text) == FULL, text
        assert is_ticket(text)
        check_text(text)


def test_the_typed_form_is_understood_in_quotes() -> None:
    expected = RunTicket("My-Run", ("example.org:20000",))
    for text in ("example.org:20000/My-Run", '"example.org:20000/My-Run"', "'example.org:20000/My-Run',"):
        assert RunTicket.parse(text) == expected
    # What stands at the end without quotes may belong to the name.
    assert RunTicket.parse("h:1/a,").run_id == "a,"
    assert RunTicket.parse('h:1/say "a"').run_id == 'say "a"'
    assert RunTicket.parse("psyche1.example.org:1/a") == RunTicket("a", ("psyche1.example.org:1",))
    assert not is_ticket("psyche1.example.org:1/a")


def test_a_damaged_ticket_is_noticed_without_reading_what_it_says() -> None:
    for text in (str(FULL)[:-1], str(FULL)[:30], f"'{str(FULL)[:39]}'", "psyche1", "nonsense", "", "x" * 5000):
        with pytest.raises(ProtocolError):
            check_text(text)
    check_text("host:1/run")


def test_the_form_of_psyche_can_be_typed() -> None:
    assert RunTicket.parse("example.org:20000/my-run") == RunTicket("my-run", ("example.org:20000",))
    assert RunTicket.parse("[::1]:5/a/b") == RunTicket("a/b", ("[::1]:5",))


@pytest.mark.slow
@given(st.data())
def test_a_changed_character_is_noticed(data: st.DataObject) -> None:
    text = str(FULL)
    at = data.draw(st.integers(7, len(text) - 1))
    other = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda char: char != text[at]))
    with pytest.raises(ProtocolError):
        RunTicket.parse(text[:at] + other + text[at + 1 :])
    with pytest.raises(ProtocolError):
        RunTicket.parse(text[:at])


@given(st.text(max_size=60), st.booleans())
def test_arbitrary_text_raises_only_protocol_errors(text: str, with_prefix: bool) -> None:
    try:
        RunTicket.parse("psyche1" + text if with_prefix else text)
    except ProtocolError:
        return
    assert "/" in text


@pytest.mark.parametrize(
    "text",
    ["", "psyche1", "psyche1!", "endpointabc", "host/run", "host:0/run", "host:70000/run", ":1/run", "host:1/",
     "::1:5/run", "host:1/" + "x" * 33, "x" * 5000],
)  # fmt: skip
def test_text_that_names_no_run_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        RunTicket.parse(text)


def test_a_ticket_without_a_way_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one way"):
        RunTicket("run")
    with pytest.raises(ConfigurationError, match="run_id is empty"):
        RunTicket("", ("h:1",))
    with pytest.raises(ConfigurationError, match="a node is needed"):
        connector(RunTicket("run", (), ENDPOINT))


def test_addresses_are_taken_apart() -> None:
    assert split_address("example.org:20000") == ("example.org", 20000)
    assert split_address("[::1]:5") == ("::1", 5)
    assert split_address("0.0.0.0:0", any_port=True) == ("0.0.0.0", 0)
    for address in ("0.0.0.0:0", "::1:5", "nowhere", ":5", "host:99999"):
        with pytest.raises(ConfigurationError, match="must be host:port"):
            split_address(address)


def test_a_listener_on_every_interface_has_no_address_for_a_ticket() -> None:
    async def work() -> None:
        for host, reachable in (("0.0.0.0", False), ("::", False), ("127.0.0.1", True)):
            listener = await TcpListener.bind(host, 0)
            assert listener.reachable_address == (listener.address if reachable else None)
            await listener.close()

    run(work)


def test_an_address_that_swallows_everything_does_not_keep_a_connector_from_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ways, "TCP_SECONDS", 0.01)
    really = asyncio.open_connection

    async def swallowed(host: str, port: int) -> object:
        if host == "192.0.2.1":
            await asyncio.Event().wait()
        return await really(host, port)

    monkeypatch.setattr(asyncio, "open_connection", swallowed)

    async def work() -> None:
        listener = await TcpListener.bind("127.0.0.1", 0)
        stream = await connector(RunTicket("run", ("192.0.2.1:1", listener.address)))()
        assert stream.peer == listener.address
        await stream.close()
        await (await listener.accept()).close()
        await listener.close()

    run(work)


def test_a_connector_tries_each_way_in_turn() -> None:
    async def work() -> None:
        gone = await TcpListener.bind("127.0.0.1", 0)
        await gone.close()
        listener = await TcpListener.bind("127.0.0.1", 0)
        stream = await connector(RunTicket("run", (gone.address, listener.address)))()
        assert stream.peer == listener.address
        await stream.close()
        await (await listener.accept()).close()
        await listener.close()
        with pytest.raises(ConnectionError, match=gone.address):
            await connector(RunTicket("run", (gone.address,)))()

    run(work)
