"""Token files behind web servers that are slow, cut connections, contradict themselves or lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from distro_optim.coordinator.model import NumberedFiles, Seeded, SingleUrl, TokenSize
from distro_optim.coordinator.types import BatchId
from distro_optim.data.web.client import WebClient, WebTimeouts
from distro_optim.data.web.tokens import HttpTokens
from distro_optim.errors import ConfigurationError, DataUnavailableError, InvalidDataError
from token_data import web_server
from token_data.web_server import Handler, Trick, WebServer

pytestmark = [pytest.mark.waiting]

SEQ_LEN = 4
TOKENS = np.arange(5000, 5000 + 10 * SEQ_LEN + 2, dtype="<u2")
FILE = TOKENS.tobytes()
PATH = "/tokens.bin"
ATTEMPTS = 3
IMPATIENT = WebTimeouts(attempts=ATTEMPTS, seconds=0.25, slowest=1e9)
PATIENT = WebTimeouts(attempts=ATTEMPTS, seconds=20)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer({PATH: FILE}) as running:
        yield running


def opened(server: WebServer, patience: WebTimeouts = PATIENT, path: str = PATH, **settings: object) -> HttpTokens:
    client = WebClient(patience, draw=lambda: 0.0, wait=lambda seconds: None)
    return HttpTokens.open(
        SingleUrl(server.url + path),
        TokenSize.TWO_BYTES,
        SEQ_LEN,
        client=client,
        **settings,  # type: ignore[arg-type]
    )


def sequence(index: int) -> list[int]:
    tokens: list[int] = TOKENS[index * SEQ_LEN : (index + 1) * SEQ_LEN].tolist()
    return tokens


def read(tokens: HttpTokens, start: int, end: int) -> list[list[int]]:
    return [sample.input_ids.tolist() for sample in tokens.get_samples(BatchId(start, end))]


# -- what passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trick",
    [
        web_server.vanish,
        web_server.cut(0),
        web_server.cut(7),
        web_server.garbage,
        web_server.endless_headers,
        *(web_server.status(code) for code in (408, 429, 500, 502, 503, 504)),
    ],
)
def test_a_failure_that_passes_is_tried_again(server: WebServer, trick: Trick) -> None:
    with opened(server) as tokens:
        server.tricks["GET"] = [trick, trick]
        assert read(tokens, 2, 4) == [sequence(2), sequence(3), sequence(4)]
        assert server.asked("GET") == ["bytes=16-39"] * ATTEMPTS


@pytest.mark.parametrize("trick", [web_server.silent, web_server.drip, web_server.drip_body])
def test_a_server_that_is_too_slow_is_asked_again(server: WebServer, trick: Trick) -> None:
    with opened(server) as tokens:
        pass
    with opened(server, IMPATIENT) as tokens:
        server.tricks["GET"] = [trick]
        assert read(tokens, 0, 9) == [sequence(index) for index in range(10)]


@pytest.mark.slow
@pytest.mark.parametrize("trick", [web_server.silent, web_server.drip, web_server.drip_body, web_server.cut(3)])
def test_a_server_that_stays_so_is_given_up(server: WebServer, trick: Trick) -> None:
    with opened(server, IMPATIENT) as tokens:
        server.always["GET"] = trick
        with pytest.raises(
            DataUnavailableError, match=rf"tokens.bin did not give what was asked in {ATTEMPTS} attempts"
        ):
            tokens.get_samples(BatchId(0, 9))
        assert len(server.asked("GET")) == ATTEMPTS


def test_the_waits_between_attempts_grow(server: WebServer) -> None:
    waits: list[float] = []
    client = WebClient(PATIENT, draw=lambda: 0.0, wait=waits.append)
    server.always["HEAD"] = web_server.status(503)
    with pytest.raises(DataUnavailableError, match="503"):
        client.size(server.url + PATH)
    client.close()
    assert waits == [0.5, 1.0]


def test_nobody_there_is_said_after_all_attempts(server: WebServer) -> None:
    url = server.url + PATH
    with WebServer({}) as gone:
        url = gone.url + PATH
    client = WebClient(PATIENT, wait=lambda seconds: None)
    with pytest.raises(DataUnavailableError, match="refused"):
        client.size(url)
    client.close()


def test_an_idle_connection_that_the_server_closed_is_no_failure(server: WebServer) -> None:
    with opened(server, WebTimeouts(attempts=1, seconds=20)) as tokens:
        assert read(tokens, 0, 0) == [sequence(0)]

        def answer_and_go(handler: Handler) -> None:
            handler.serve()
            handler.wfile.flush()
            handler.hang_up()  # without having said so

        server.tricks["GET"] = [answer_and_go]
        assert read(tokens, 1, 1) == [sequence(1)]
        assert read(tokens, 2, 2) == [sequence(2)]


# -- what does not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418])
def test_a_refusal_is_final(server: WebServer, code: int) -> None:
    with opened(server) as tokens:
        server.always["GET"] = web_server.status(code)
        with pytest.raises(DataUnavailableError, match=rf"cannot be fetched: the server answers {code}"):
            tokens.get_samples(BatchId(0, 0))
        assert len(server.asked("GET")) == 1


LIES: dict[str, tuple[Trick, str]] = {
    "another range": (
        web_server.says(206, bytes(8), {"Content-Range": f"bytes 8-15/{len(FILE)}"}),
        "was asked for bytes 0 to 7 and answers with 8 to 15",
    ),
    "a shorter range": (
        web_server.says(206, bytes(4), {"Content-Range": f"bytes 0-3/{len(FILE)}"}),
        "was asked for bytes 0 to 7 and answers with 0 to 3",
    ),
    "another size than before": (
        web_server.says(206, bytes(8), {"Content-Range": "bytes 0-7/1000000"}),
        f"had {len(FILE)} bytes when the run began and has 1000000 now",
    ),
    "less than announced": (
        web_server.says(206, bytes(6), {"Content-Range": f"bytes 0-7/{len(FILE)}"}),
        "answers with 6 bytes where 8 were asked for",
    ),
    "more than asked for": (
        web_server.says(206, bytes(100), {"Content-Range": f"bytes 0-7/{len(FILE)}"}),
        "answers with 100 bytes where 8 were asked for",
    ),
    "no range": (web_server.says(206, bytes(8), {}), "is not a range of bytes"),
    "a range that is none": (
        web_server.says(206, bytes(8), {"Content-Range": "bytes -1-7/9"}),
        "is not a range of bytes",
    ),
    "the whole file": (web_server.says(200, FILE, {}), "cannot be read in parts"),
    "compressed": (
        web_server.says(206, bytes(8), {"Content-Range": f"bytes 0-7/{len(FILE)}", "Content-Encoding": "gzip"}),
        "comes encoded as 'gzip'",
    ),
    "nothing there any more": (web_server.status(416), "ends before byte 0"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_contradicts_itself_is_not_believed(server: WebServer, lie: str) -> None:
    trick, message = LIES[lie]
    with opened(server) as tokens:
        server.always["GET"] = trick
        with pytest.raises(InvalidDataError, match=message):
            tokens.get_samples(BatchId(0, 0))
        assert len(server.asked("GET")) == 1


def test_an_endless_answer_is_read_no_further_than_needed(server: WebServer) -> None:
    sent = 0

    def flood(handler: Handler) -> None:
        nonlocal sent
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-7/{len(FILE)}")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            while not handler.server.web.ended.is_set():
                handler.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
        except OSError:
            pass
        handler.close_connection = True

    with opened(server) as tokens:
        server.always["GET"] = flood
        with pytest.raises(InvalidDataError, match="more than the 8 bytes"):
            tokens.get_samples(BatchId(0, 0))
    assert sent < 64 * 1024 * 1024  # what the system's buffers hold


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Length": str(2**50 + 2)}, "which no file has"),
        ({"Content-Length": "many"}, "does not say how large it is"),
        ({"Content-Length": "-6"}, "does not say how large it is"),
        ({"Content-Length": "41"}, "is cut, or its tokens are not of 2 bytes: its 41 bytes"),
        ({"Content-Length": "8"}, "has a sequence of 4 tokens and one to spare"),
        ({"Content-Length": "0"}, "has a sequence of 4 tokens and one to spare"),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(server: WebServer, headers: dict[str, str], message: str) -> None:
    server.always["HEAD"] = web_server.says(200, b"", headers)
    with pytest.raises((InvalidDataError, ConfigurationError), match=message):
        opened(server)


def test_a_size_that_is_too_large_is_found_out_without_memory(server: WebServer) -> None:
    server.always["HEAD"] = web_server.says(200, b"", {"Content-Length": str(2**49)})
    with opened(server) as tokens:
        assert tokens.num_sequences > 2**45
        with pytest.raises(InvalidDataError, match="bytes when the run began"):
            tokens.probe()
    with pytest.raises(ConfigurationError, match="too many to shuffle"):
        opened(server, shuffle=Seeded(bytes(32)))


def test_a_server_that_knows_no_head_tells_the_size_beside_a_byte(server: WebServer) -> None:
    for code in (403, 405, 501):
        server.always["HEAD"] = web_server.status(code)
        with opened(server) as tokens:
            assert read(tokens, 0, 9) == [sequence(index) for index in range(10)]


def test_a_file_that_is_not_there_is_named(server: WebServer) -> None:
    with pytest.raises(DataUnavailableError, match=r"/002\.bin cannot be fetched: the server answers 404"):
        HttpTokens.open(
            NumberedFiles(server.url + "/{}.bin", start_index=2, n_left_pad_zeros=3, num_files=2),
            TokenSize.TWO_BYTES,
            SEQ_LEN,
        )


# -- redirects -----------------------------------------------------------------------------------------------------


def redirect(to: str, code: int = 302) -> Trick:
    return web_server.status(code, {"Location": to})


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: WebServer, code: int) -> None:
    with WebServer({"/elsewhere": FILE}) as other:
        for method in ("HEAD", "GET"):
            server.always[method] = redirect(other.url + "/elsewhere", code)
        with opened(server) as tokens:
            assert read(tokens, 3, 4) == [sequence(3), sequence(4)]
        assert other.asked("GET") == ["bytes=24-39"]


def test_redirects_in_a_circle_come_to_an_end(server: WebServer) -> None:
    server.always["HEAD"] = redirect(PATH)
    with pytest.raises(DataUnavailableError, match="more than 5 redirects"):
        opened(server)
    assert len(server.asked("HEAD")) == 6


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://a/b", "http://a b/", "javascript:1"])
def test_redirects_lead_to_web_servers_only(server: WebServer, target: str) -> None:
    server.always["HEAD"] = redirect(target)
    with pytest.raises(InvalidDataError, match="where nothing can be fetched"):
        opened(server)


# -- manners -------------------------------------------------------------------------------------------------------


def test_sequences_that_follow_each_other_are_fetched_in_one_range(server: WebServer) -> None:
    with opened(server) as tokens:
        read(tokens, 0, 9)
        assert server.asked("GET") == [f"bytes=0-{10 * SEQ_LEN * 2 - 1}"]


def test_the_spare_token_is_never_fetched(server: WebServer) -> None:
    server.files[PATH] = FILE[:-2]
    with opened(server) as tokens:
        assert tokens.num_sequences == 9
        read(tokens, 0, 8)


def test_connections_are_used_again(server: WebServer) -> None:
    ports = set()

    def note(handler: Handler) -> None:
        ports.add(handler.client_address[1])
        handler.serve()

    server.always["GET"] = server.always["HEAD"] = note
    with opened(server) as tokens:
        for index in range(10):
            read(tokens, index, index)
    assert len(ports) == 1


def test_passwords_and_signatures_stay_out_of_messages(server: WebServer) -> None:
    url = server.url.replace("http://", "http://user:secret@") + "/none.bin?signature=hidden"
    client = WebClient(PATIENT)
    with pytest.raises(DataUnavailableError, match=r"none\.bin\?\.\.\. cannot") as caught:
        client.size(url)
    client.close()
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_closing_ends_a_request_that_is_under_way(server: WebServer) -> None:
    tokens = opened(server, WebTimeouts(attempts=ATTEMPTS, seconds=3600))
    asked = threading.Event()

    def wait_for_ever(handler: Handler) -> None:
        asked.set()
        web_server.silent(handler)

    server.always["GET"] = wait_for_ever
    errors: list[Exception] = []

    def work() -> None:
        try:
            tokens.get_samples(BatchId(0, 0))
        except DataUnavailableError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert asked.wait(20)
    tokens.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "closed" in str(errors[0])


def test_a_proxy_of_the_environment_is_asked(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    server.files["http://data.example/tokens.bin"] = FILE  # a proxy is asked for whole URLs
    location = SingleUrl("http://data.example/tokens.bin")
    with HttpTokens.open(location, TokenSize.TWO_BYTES, SEQ_LEN) as tokens:
        assert read(tokens, 0, 0) == [sequence(0)]
