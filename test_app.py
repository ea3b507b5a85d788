"""Tests of app.py, in the order of its chapters.

Most drive the application with ``TestClient``. What only a real server shows (close codes on
the wire, readers that stall, signals, ``kill -9``) starts ``python app.py`` on a free port.
The page is tested in headless Chromium where Playwright and Chromium are installed.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import hashlib
import http.client
import itertools
import json
import logging
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import app as lobby
from app import Settings, StartError, Storage, app

HERE = Path(__file__).parent
ROLES = ("member", "moderator", "admin")
PASSWORDS = {"user1": "password1", "user2": "password2", "admin": "adminpassword"}


# -- Fixtures ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test has a database of its own, no limit on sending, and the default settings."""
    for name in [name for name in os.environ if name.startswith("CHAT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHAT_RATE", "0")
    monkeypatch.setenv("CHAT_DB", str(tmp_path / "chat.db"))


@pytest.fixture(scope="session")
def demo_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new database with the demo people: copied, it saves each test their slow hashing."""
    path = tmp_path_factory.mktemp("demo") / "chat.db"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CHAT_DB", str(path))
        with Entered(app):
            pass
    return path


@pytest.fixture
def database(tmp_path: Path, demo_database: Path) -> Path:
    return Path(shutil.copy(demo_database, tmp_path / "chat.db"))


class Entered(TestClient):
    """The test client; the one that was entered last is the one that tokens are for."""

    last: TestClient

    def __enter__(self) -> TestClient:
        Entered.last = super().__enter__()
        return self


@pytest.fixture
def client(database: Path) -> Iterator[TestClient]:
    """The application, started, over a database with the demo people."""
    with Entered(app) as client:
        yield client


def token(user: str = "user1", stay: bool = False) -> str:
    """A token as a log-in gives it, without the slow password."""
    person = app.state.storage.find_person(user.casefold())
    start = app.state.logins.start
    answer = Entered.last.portal.call(start, person["name"], person["password"], stay)
    return str(answer["access_token"])


def new_person(name: str, **more: Any) -> dict[str, Any]:
    """The fields of a change that registers somebody, without the slow hashing."""
    person = {"user": name, "folded": name, "password": lobby.NO_PASSWORD, "by": None}
    return person | {"is_local": True, "is_open": True} | more


def joined(user: str, room: str = "lobby", role: str = "member") -> dict[str, Any]:
    return {"type": "joined", "room": room, "user": user, "role": role}


def bearer_of(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def bearer(user: str = "user1") -> dict[str, str]:
    return bearer_of(token(user))


def at_address(client: TestClient, host: str) -> TestClient:
    """The same application, asked from another address."""
    other = TestClient(client.app, client=(host, 50_000))
    other.portal = client.portal
    return other


class Chat:
    """A socket of either test client that speaks ``lobby.v1``: one event at a time."""

    def __init__(self, receive: Callable[[], str], send: Callable[[str], None]) -> None:
        self.receive, self.send_text = receive, send
        self.events: list[dict[str, Any]] = []

    def send(self, type: str, **event: Any) -> None:
        self.send_text(json.dumps({"type": type, **event}))

    def say(self, text: str, mid: str, room: str = "lobby") -> None:
        self.send("message", room=room, text=text, mid=mid)

    def next(self, *types: str) -> dict[str, Any]:
        """The next event, of one of these types if any are given."""
        while True:
            if not self.events:
                self.events = [json.loads(line) for line in self.receive().split("\n")]
            event = self.events.pop(0)
            if not types or event["type"] in types:
                return event

    def nothing_came(self) -> None:
        """Assert that nothing is on its way: what answers a wrong frame is the next event."""
        self.send("nonsense")
        assert self.next()["code"] == "invalid"


@contextmanager
def chat(
    client: TestClient, user: str = "user1", query: str = "", quiet: bool = True, secret: str = ""
) -> Iterator[Chat]:
    """An open chat socket; ``quiet``: what comes on joining has been read.

    ``secret``: a token from before, for while the database's thread is held up.
    """
    first = user not in app.state.manager.clients
    protocols = ["lobby.v1", f"bearer.{secret or token(user)}"]
    with client.websocket_connect(f"/ws/chat?{query}", subprotocols=protocols) as websocket:
        conversation = Chat(websocket.receive_text, websocket.send_text)
        if quiet:
            conversation.next("joined" if first else "presence")
        yield conversation


@contextmanager
def held_up() -> Iterator[None]:
    """For as long as this lasts the database's thread is busy, and no change is applied."""
    held = threading.Event()
    app.state.storage.thread.submit(held.wait)
    try:
        yield
    finally:
        held.set()


@contextmanager
def traced(db: sqlite3.Connection) -> Iterator[list[str]]:
    """The statements that a connection runs meanwhile."""
    statements: list[str] = []
    db.set_trace_callback(statements.append)
    try:
        yield statements
    finally:
        db.set_trace_callback(None)


def full_disk(db: sqlite3.Connection) -> None:
    """Let the database grow no more."""
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")


class Server:
    """A server in a process of its own: ``python app.py``, or what ``command`` starts.

    ``program``: Python to be run before ``app.main()``.
    """

    def __init__(
        self, folder: Path, program: str = "", command: Sequence[str] = ("app.py",), **settings: str
    ) -> None:
        self.log = folder / "server.log"
        environment = os.environ | {"CHAT_PORT": "0", "CHAT_DB": str(folder / "chat.db")}
        environment |= {f"CHAT_{name.upper()}": value for name, value in settings.items()}
        if program:
            command = ["-c", f"import app; {program}; app.main()"]
        command = [sys.executable, *command]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=HERE, env=environment, stderr=log)
        self.port = int(self.wait_for_log(r"running on http://[\d.]+:(\d+)"))
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for_log(self, pattern: str) -> str:
        """The first group of the pattern, once a line of the log has it."""
        for _ in range(600):
            if found := re.search(pattern, self.log.read_text()):
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in {self.log.read_text()}")

    def request(self, path: str, body: Any = None, **headers: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def token(self, user: str = "user1") -> str:
        body = {"username": user, "password": PASSWORDS[user]}
        return str(self.request("/login", body)["access_token"])

    def connect(self, path: str, **options: Any) -> ClientConnection:
        options = {"compression": None, "open_timeout": 20, "legacy": True} | options
        return connect(f"ws://127.0.0.1:{self.port}{path}", **options)

    def chat(self, token: str, query: str = "") -> Chat:
        websocket = self.connect(f"/ws/chat?{query}", subprotocols=["lobby.v1", f"bearer.{token}"])
        conversation = Chat(lambda: str(websocket.recv(timeout=20)), websocket.send)
        conversation.next("presence")
        return conversation

    def raw_socket(self, path: str, *headers: str, receive_buffer: int = 0) -> socket.socket:
        """A socket after its handshake, in the hands of somebody who ignores all rules."""
        raw = socket.socket()
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.connect(("127.0.0.1", self.port))
        key = base64.b64encode(bytes(16)).decode()
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"]
        raw.sendall("\r\n".join([*lines, *headers, "", ""]).encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += raw.recv(1)
        assert b" 101 " in answer, answer
        return raw

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout=20)


@pytest.fixture
def serve(database: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers over the test's database; ends them with the test."""
    with ExitStack() as stack:

        def start(**settings: str) -> Server:
            server = Server(database.parent, **settings)
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            return server

        yield start


def frame(opcode: int, payload: bytes = b"", final: bool = True) -> bytes:
    """A client's frame (RFC 6455, section 5.2) of less than 126 bytes, masked with zeros."""
    return bytes([final << 7 | opcode, 0x80 | len(payload)]) + bytes(4) + payload


def refused(client: TestClient, path: str, **options: Any) -> tuple[int, str]:
    """Code and reason of a socket that is accepted and then closed."""
    with client.websocket_connect(path, **options) as websocket:
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_text()
    return closed.value.code, closed.value.reason


def closed(websocket: Any) -> tuple[int, str]:
    """How a socket of the test client was closed, after all that came before."""
    with pytest.raises(WebSocketDisconnect) as error:
        while True:
            websocket.receive_text()
    return error.value.code, error.value.reason


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run_app(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "app.py")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


def post(client: TestClient, text: str, user: str = "user1", room: str = "lobby") -> int:
    """Send a message over HTTP, and answer its id."""
    answer = client.post(f"/rooms/{room}/messages", json={"text": text}, headers=bearer(user))
    assert answer.status_code == 201
    return int(answer.json()["id"])


def texts_of(client: TestClient, room: str = "lobby", user: str = "user1", **query: Any) -> Any:
    """The texts of a page, or the status if there is none."""
    answer = client.get(f"/rooms/{room}/messages", params=query, headers=bearer(user))
    if answer.status_code != 200:
        return answer.status_code
    return [message["text"] for message in answer.json()["messages"]]


# -- 1. The application --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/items/5", "/items/no", "/nowhere", "/", "/healthz"])
def test_every_response_carries_the_headers(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["X-Custom-Header"] == "Custom Value"
    assert re.fullmatch(r"[0-9a-f]{16}", headers["X-Request-ID"])
    assert 0 <= float(headers["X-Process-Time"]) < 60


def test_a_sane_request_id_is_taken_over_and_another_replaced(client: TestClient) -> None:
    answer = client.get("/inspect", headers={"X-Request-ID": "abc-123"})
    assert answer.headers["X-Request-ID"] == "abc-123"
    assert answer.json()["state"] == {"request_id": "abc-123"}
    for insane in ("", "a b", "x" * 129, "é".encode()):
        answer = client.get("/inspect", headers={"X-Request-ID": insane})
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["X-Request-ID"])


def test_a_bug_is_logged_and_answered_and_harms_nobody_else(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/ws/{new_session(client)}"
    monkeypatch.setattr(lobby, "sessions", None)
    with chat(client) as conversation:
        answer = client.post("/create-session")
        assert (answer.status_code, answer.json()) == (500, {"detail": "Internal Server Error"})
        assert answer.headers["X-Custom-Header"] == "Custom Value"
        with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect(path):
            pass
        assert closed.value.code == 1011
        conversation.nothing_came()
    assert "TypeError" in caplog.text


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/submit", "/http-endpoint", "/body/form", "/login", "/inspect"])
def test_a_body_over_one_mebibyte_is_refused(client: TestClient, path: str, chunked: bool) -> None:
    body = b'"' + b"x" * 2**21 + b'"'
    kind = "multipart/form-data; boundary=b" if path == "/body/form" else "application/json"
    content = iter([body]) if chunked else body
    answer = client.post(path, content=content, headers={"Content-Type": kind})
    assert answer.status_code == 413
    assert "1,048,576" in answer.json()["detail"]


def test_two_mebibytes_in_chunks_are_refused_by_the_server(serve: Callable[..., Server]) -> None:
    server = serve()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/http-endpoint", (b"x" * 2**16 for _ in range(32)))
    assert connection.getresponse().status == 413
    assert server.request("/healthz")["status"] == "ok"


@pytest.mark.parametrize(
    "path",
    ["/ws-endpoint", "/ws", "/ws/json", "/ws/inspect", "/ws/protected", "/ws/chat", "/ws/{id}"],
)
def test_a_page_of_another_site_may_not_open_a_socket(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    url = f"{path.replace('{id}', new_session(client))}?token={token()}"
    for origin in ("https://evil.example", "null", "http://testserver.evil.example", ""):
        with pytest.raises(WebSocketDisconnect) as closed:
            with client.websocket_connect(url, headers={"Origin": origin}):
                pass
        assert closed.value.code == 1000  # before it is accepted: a server answers that by a 403
    assert not app.state.connections
    monkeypatch.setattr(app.state, "origins", frozenset({"https://ok.example"}))
    for good in ("http://testserver", "https://ok.example"):
        with client.websocket_connect(url, headers={"Origin": good}):
            pass


def test_further_origins_come_from_the_settings(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_ORIGINS", "https://ok.example/")
    with Entered(app) as client:
        with client.websocket_connect("/ws", headers={"Origin": "https://ok.example"}) as websocket:
            websocket.send_text("hi")
            assert websocket.receive_text() == "Message text was: hi"


def statuses_for(server: Server, host: str) -> list[int]:
    """Of a request and of a handshake with this ``Host``."""
    handshake = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    handshake["Sec-WebSocket-Key"] = base64.b64encode(bytes(16)).decode()
    statuses = []
    for path, headers in (("/items/5", {}), ("/ws", handshake)):
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as sent:
            sent.request("GET", path, headers={**headers, "Host": host})
            answer = sent.getresponse()
            statuses.append(answer.status)
            if (answer.status, path) == (403, "/items/5"):
                assert "CHAT_ORIGINS" in json.load(answer)["detail"]
    return statuses


def test_another_sites_name_may_not_mean_this_machine(serve: Callable[..., Server]) -> None:
    server = serve(origins="https://ok.example, http://ok.example:8080")
    for name in ("localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "[::1]", "ok.example"):
        for port in ("", ":8000", f":{server.port}"):
            assert statuses_for(server, name + port) == [200, 101], name
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.0.2.1"):
        for port in ("", f":{server.port}"):
            assert statuses_for(server, name + port) == [403, 403], name
    for name in ("not.ok.example", "[2001:db8::1]", "0.0.0.0", "[::]"):
        assert statuses_for(server, name) == [403, 403], name
    assert "The host 'evil.example' is not known here" in server.log.read_text()


@pytest.mark.parametrize("host", ["", "[", "[::1", "[evil]", ":80", "é", "a b", "\x7f", "//", "@"])
def test_a_malformed_host_is_refused(client: TestClient, host: str) -> None:
    """As on loopback, where it counts."""
    at_loopback = TestClient(app, base_url="http://127.0.0.1")
    at_loopback.portal = client.portal
    assert at_loopback.get("/items/5").status_code == 200
    headers = {"Host": host.encode()}
    assert at_loopback.get("/items/5", headers=headers).status_code == 403
    with pytest.raises(WebSocketDisconnect) as closed:
        with at_loopback.websocket_connect("ws://127.0.0.1/ws", headers=headers):
            pass
    assert closed.value.code == 1000  # before it is accepted


def test_malformed_hosts_are_no_error_of_the_server(serve: Callable[..., Server]) -> None:
    server = serve()
    for host in ("", "[", "[::1", "[evil]", ":80", "\xe9", "a b", "localhost:x", "//", "@", "%"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            head = f"GET /inspect HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            raw.sendall(head.encode("latin-1"))
            answer = raw.makefile("rb").read()
        assert re.match(rb"HTTP/1.1 [24]", answer), (host, answer)
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("code", "status", "close"),
    [
        ("invalid", 422, 1008),
        ("too_long", 422, 1008),
        ("unauthorized", 401, 1008),
        ("forbidden", 403, 1008),
        ("unknown", 404, 1008),
        ("unknown_room", 404, 1008),
        ("conflict", 409, 1008),
        ("rate_limited", 429, 1013),
        ("unavailable", 503, 1013),
    ],
)
def test_a_refusal_is_a_status_over_http_and_a_close_code_on_a_socket(
    code: str, status: int, close: int
) -> None:
    """In an application of its own, which has nothing but the handler."""
    small = FastAPI(exception_handlers={lobby.Refused: lobby.refused})

    @small.get("/")
    @small.websocket("/ws")
    async def refuse() -> None:
        raise lobby.Refused(code, "because", retry_after=1.2)

    client = TestClient(small)
    answer = client.get("/")
    assert (answer.status_code, answer.json()) == (status, {"detail": "because"})
    assert answer.headers["Retry-After"] == "2"
    assert ("WWW-Authenticate" in answer.headers) == (code == "unauthorized")
    assert refused(client, "/ws") == (close, "because")


# -- 2. Looking at a request ---------------------------------------------------------------


def test_items(client: TestClient) -> None:
    assert client.get("/items/5").json() == {"item_id": 5, "client_host": "testclient"}
    assert client.get("/items/five").status_code == 422
    assert client.get("/items/").json() == {"client_host": "testclient", "q": None}
    assert client.get("/items/?q=tea").json() == {"client_host": "testclient", "q": "tea"}


def test_user_agent(client: TestClient) -> None:
    answer = client.get("/user-agent", headers={"User-Agent": "teapot/1"})
    assert answer.json() == {"user_agent": "teapot/1"}


def test_submit_shows_the_request(client: TestClient) -> None:
    answer = client.post(
        "/submit?a=1&b=2&b=3",
        json={"x": [1]},
        headers={"User-Agent": "teapot/1", "Cookie": "flavour=plain"},
    )
    assert answer.json() == {
        "method": "POST",
        "url": "http://testserver/submit?a=1&b=2&b=3",
        "user_agent": "teapot/1",
        "query_params": {"a": "1", "b": ["2", "3"]},
        "cookies": {"flavour": "plain"},
        "data": {"x": [1]},
    }
    assert client.post("/submit", content="no JSON").json()["data"] is None


# What json.loads lets through, or fails on in its own ways; none of it can be answered as JSON.
HOSTILE_JSON = [
    b"",
    b"{",
    b"NaN",
    b"1e999",
    b"[Infinity]",
    b'"\\ud800"',
    b"\xff",
    b"9" * 5000,
    b"[" * 100_000 + b"]" * 100_000,
]


@pytest.mark.parametrize("body", HOSTILE_JSON)
def test_what_is_no_json_is_refused_and_breaks_nothing(client: TestClient, body: bytes) -> None:
    for path in ("/http-endpoint", "/body/json"):
        answer = client.post(path, content=body)
        assert answer.status_code == 400
        assert "no JSON" in answer.json()["detail"]
    assert client.post("/submit", content=body).json()["data"] is None
    assert client.post("/inspect", content=body).json()["json"] is None
    assert client.post("/body/twice", content=body).status_code in (200, 413)
    headers = {"Content-Type": "application/json"}
    assert client.post("/login", content=body, headers=headers).status_code in (400, 422)
    with client.websocket_connect("/ws/json") as websocket:
        websocket.send_text(body.decode("latin-1"))
        assert "error" in websocket.receive_json()
        websocket.send_text("1")
        assert websocket.receive_json() == {"received": 1}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_http_endpoint_answers_any_json(client: TestClient, method: str) -> None:
    for value in ({"a": 1}, [1, 2], "text", None, 10**30):
        answer = client.request(method, "/http-endpoint", content=json.dumps(value))
        assert answer.json() == {"received_data": value}
    for wrong in (b"", b"NaN"):
        answer = client.request(method, "/http-endpoint", content=wrong)
        assert answer.status_code == 400
        assert "no JSON" in answer.json()["detail"]
    assert client.request(method, "/http-endpoint", content=b"1" * 2**21).status_code == 413


def test_inspect_loses_nothing(client: TestClient) -> None:
    request = client.build_request(
        "PURGE", "http://testserver:81/inspect/a/b?x=1&x=2", content="tea"
    )
    request.headers = type(request.headers)(
        [("Host", "testserver:81"), ("X-Twice", "1"), ("Cookie", "a=b"), ("X-Twice", "2")]
        + [("Content-Length", "3")]
    )
    seen = client.send(request).json()
    assert seen["method"] == "PURGE"
    assert seen["url"] == {
        "full": "http://testserver:81/inspect/a/b?x=1&x=2",
        "scheme": "http",
        "host": "testserver",
        "port": 81,
        "path": "/inspect/a/b",
        "query": "x=1&x=2",
    }
    assert seen["base_url"] == "http://testserver:81/"
    assert seen["http_version"] == "1.1"
    assert seen["client"] == {"host": "testclient", "port": 50000}
    assert seen["path_params"] == {"path": "a/b"}
    assert seen["query_params"] == {"x": ["1", "2"]}
    names = ["host", "x-twice", "cookie", "x-twice", "content-length"]
    assert [name for name, _ in seen["headers"]] == names
    assert seen["cookies"] == {"a": "b"}
    assert seen["body"] == {"size": 3, "sha256": hashlib.sha256(b"tea").hexdigest(), "text": "tea"}
    assert (seen["json"], seen["form"], seen["files"]) == (None, {}, [])


def test_inspect_shows_bytes_that_are_no_text(client: TestClient) -> None:
    body = client.post("/inspect", content=b"\xff\x00").json()["body"]
    assert base64.b64decode(body["base64"]) == b"\xff\x00"
    assert "text" not in body


FILE = {"f": ("tea.txt", b"green", "text/plain")}


FILE_SEEN = {
    "field": "f",
    "filename": "tea.txt",
    "content_type": "text/plain",
    "size": 5,
    "sha256": hashlib.sha256(b"green").hexdigest(),
}


def test_forms_are_read_with_repeated_fields_and_files(client: TestClient) -> None:
    fields = {"a": ["1", "2"], "b": ["3"]}
    assert client.post("/body/form", data=fields).json() == {"fields": fields, "files": []}
    expected = {"fields": fields, "files": [FILE_SEEN]}
    assert client.post("/body/form", data=fields, files=FILE).json() == expected
    seen = client.post("/inspect", data=fields, files=FILE).json()
    assert (seen["form"], seen["files"]) == (fields, [FILE_SEEN])


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"no boundary", 400),
        ("multipart/form-data; boundary=b", b"no such boundary", 400),
        ("application/x-www-form-urlencoded", b"&".join([b"a=1"] * 2000), 400),
    ],
)
def test_what_is_no_form_is_refused(
    client: TestClient, content_type: str, body: bytes, status: int
) -> None:
    answer = client.post("/body/form", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == status
    assert answer.json()["detail"]


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "punycode", "undefined"])
def test_a_form_in_a_charset_that_fails_is_refused(client: TestClient, charset: str) -> None:
    text = rb"\ud800" if charset == "unicode_escape" else b"+2AA-"
    body = b'--b\r\nContent-Disposition: form-data; name="username"\r\n\r\n%s\r\n' % text
    body += b'--b\r\nContent-Disposition: form-data; name="password"\r\n\r\n%s\r\n--b--\r\n' % text
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    for path in ("/inspect", "/body/form"):
        answer = client.post(path, content=body, headers=headers)
        if charset == "punycode":  # which may decode it
            assert answer.status_code in (200, 400)
        else:
            assert answer.status_code == 400
            assert "UTF-8" in answer.json()["detail"]
    assert client.post("/token", content=body, headers=headers).status_code in (400, 401, 422)


def test_a_raw_body_may_have_16_mebibytes(client: TestClient) -> None:
    body = b"x" * 2**21
    answer = client.post("/body/raw", content=body).json()
    assert answer == {"size": 2**21, "sha256": hashlib.sha256(body).hexdigest()}
    assert client.post("/body/raw", content=b"x" * (2**24 + 1)).status_code == 413
    answer = client.post("/body/twice", content=b"x" * (2**16 + 1))
    assert (answer.status_code, answer.json()) == (
        413,
        {"detail": "The body is larger than 65,536 bytes"},
    )


def test_a_streamed_body_is_read_in_chunks(serve: Callable[..., Server]) -> None:
    server = serve()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/body/stream", (b"x" * 2**20 for _ in range(20)))
    answer = json.load(connection.getresponse())
    assert answer["size"] == 20 * 2**20
    assert answer["sha256"] == hashlib.sha256(b"x" * 20 * 2**20).hexdigest()
    assert answer["chunks"] >= 20


def test_a_body_read_twice(client: TestClient) -> None:
    reads = client.post("/body/twice", data={"a": "1"}).json()["reads"]
    works = {(read["first"], read["second"]): read["works"] for read in reads}
    assert works["body", "body"] and works["body", "form"] and works["body", "stream"]
    assert works["form", "form"]
    for pair in (("stream", "stream"), ("stream", "body"), ("form", "body")):
        assert not works[pair]
    error = next(read["error"] for read in reads if read["first"] == "stream")
    assert error == "RuntimeError: Stream consumed"


def send_head(server: Server, path: str, length: int, *headers: str) -> socket.socket:
    """A connection that has sent the head of a request whose body has this length; 0: unknown."""
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    kind = f"Content-Length: {length}" if length else "Transfer-Encoding: chunked"
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", kind, *headers]
    raw.sendall("\r\n".join([*lines, "", ""]).encode())
    return raw


def answer_on(raw: socket.socket) -> tuple[int, bytes]:
    """The status of what comes until the connection ends, and all of it."""
    with raw, raw.makefile("rb") as file:
        answer = file.read()
    return int(answer.split(b" ", 2)[1]), answer


def drip(raw: socket.socket, piece: bytes, times: int = 50) -> bool:
    """Send a piece every 0.1 s; True as soon as there is an answer, or the end."""
    raw.settimeout(0.1)
    is_answered = False
    while times and not is_answered:
        times -= 1
        try:
            raw.sendall(piece)
            raw.recv(1, socket.MSG_PEEK)
            is_answered = True
        except TimeoutError:
            pass
        except ConnectionError:  # a piece met the closed connection: its answer is lost
            is_answered = True
    raw.settimeout(20)
    return is_answered


def test_a_body_that_does_not_come_ends_with_the_connection(
    serve: Callable[..., Server],
) -> None:
    server = serve(program="app.BODY_SECONDS = 1")
    form = "Content-Type: application/x-www-form-urlencoded"
    silent = [send_head(server, path, 1000, form) for path in ("/body/form", "/token")]
    for path in ("/submit", "/inspect", "/body/raw", "/body/stream", "/body/json", "/login"):
        silent.append(send_head(server, path, 1000, "Content-Type: application/json"))
    for raw in silent:
        raw.sendall(b"a")
    for path in ("/submit", "/body/stream"):
        silent.append(send_head(server, path, 0))
        silent[-1].sendall(b"5\r\nhello\r\n")
    for raw in silent:
        status, answer = answer_on(raw)
        assert status == 408
        assert b"The body came too slowly" in answer
        assert b"\r\nconnection: close\r\n" in answer.lower()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("before", [0, 500_000])
def test_a_body_that_drips_is_ended_whatever_came_before(
    serve: Callable[..., Server], before: int
) -> None:
    server = serve(program="app.BODY_SECONDS = 1")
    with send_head(server, "/body/raw", 10**6) as raw:
        raw.sendall(b"x" * before)
        assert drip(raw, b"x")
        with suppress(ConnectionError):
            assert answer_on(raw)[0] == 408


def test_a_slow_body_that_keeps_coming_is_taken(serve: Callable[..., Server]) -> None:
    """For longer than one piece may be waited for."""
    server = serve(program="app.BODY_SECONDS, app.BODY_RATE = 1, 2000")
    with send_head(server, "/body/raw", 15_000, "Connection: close") as raw:
        drip(raw, b"x" * 1000, times=15)
        status, answer = answer_on(raw)
    assert status == 200
    assert b'"size":15000' in answer


def test_large_bodies_have_one_room_together_which_small_ones_do_not_need(
    serve: Callable[..., Server],
) -> None:
    server = serve(program="app.MAX_BODIES = 900_000")
    with httpx2.Client(base_url=server.url, timeout=20) as http, ExitStack() as held:
        large = b"x" * 900_000
        assert http.post("/body/raw", content=large).status_code == 200
        answer = None
        while not answer or answer.status_code == 200:  # it was faster than what is to be held
            held.enter_context(send_head(server, "/body/raw", 2**20)).sendall(large)
            answer = http.post("/body/raw", content=large)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "20"
        assert "large bodies" in answer.json()["detail"]
        with send_head(server, "/body/raw", 60_000, "Connection: close") as raw:
            assert not drip(raw, b"x" * 10_000, times=3)  # not even while it comes
            raw.sendall(b"x" * 30_000)
            assert answer_on(raw)[0] == 200
        assert http.post("/body/stream", content=large * 3).json()["size"] == 2_700_000
        held.close()
        while http.post("/body/raw", content=large).status_code == 503:
            pass  # that it has left is still on its way
        assert http.post("/body/raw", content=large).status_code == 200


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux tells a process's memory")
def test_silent_bodies_leave_the_memory_bounded(serve: Callable[..., Server]) -> None:
    """Thirty, of which each has sent 15 of 16 MiB."""
    server = serve()
    piece = bytes(2**20)
    with ExitStack() as stack:
        for _ in range(30):
            raw = stack.enter_context(send_head(server, "/body/raw", 2**24))
            for _ in range(15):
                if not select.select([raw], [], [], 0)[0]:
                    with suppress(ConnectionError):  # it has been answered already
                        raw.sendall(piece)
        assert server.request("/healthz")["status"] == "ok"
        assert memory(server.process.pid) < 150 * 2**20


# -- 3. Talking over a socket --------------------------------------------------------------


def test_ws_endpoint_answers_once(client: TestClient) -> None:
    with client.websocket_connect("/ws-endpoint") as websocket:
        websocket.send_text("hi")
        assert websocket.receive_text() == "Message text was: hi"
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_text()
        assert closed.value.code == 1000


def test_ws_echoes_texts_and_bytes(client: TestClient) -> None:
    with client.websocket_connect("/ws") as websocket:
        for text in ("hi", "", "你好"):
            websocket.send_text(text)
            assert websocket.receive_text() == f"Message text was: {text}"
        websocket.send_bytes(b"\x00\xff")
        assert websocket.receive_bytes() == b"\x00\xff"


def test_ws_inspect_shows_the_handshake_and_each_frame(client: TestClient) -> None:
    with client.websocket_connect("/ws/inspect?a=1&a=2", subprotocols=["x", "y"]) as websocket:
        handshake = websocket.receive_json()
        assert handshake["url"]["scheme"] == "ws"
        assert handshake["query_params"] == {"a": ["1", "2"]}
        assert handshake["subprotocols"] == ["x", "y"]
        websocket.send_text("é")
        shown = websocket.receive_json()
        assert (shown["kind"], shown["size"], shown["text"]) == ("text", 2, "é")
        websocket.send_bytes(b"\xff")
        shown = websocket.receive_json()
        assert (shown["kind"], shown["size"], shown["base64"]) == ("bytes", 1, "/w==")


@pytest.mark.parametrize("path", ["/ws-endpoint", "/ws/json", "/ws/protected", "/ws/chat"])
def test_a_binary_frame_on_a_text_socket_closes_it(client: TestClient, path: str) -> None:
    with client.websocket_connect(f"{path}?token={token()}") as websocket:
        websocket.send_bytes(b"x")
        with pytest.raises(WebSocketDisconnect) as closed:
            while True:
                websocket.receive_text()
        assert closed.value.code == 1003


# -- 4. Sessions ---------------------------------------------------------------------------


def new_session(client: TestClient) -> str:
    return str(client.post("/create-session", headers={"User-Agent": "a"}).json()["session_id"])


def test_a_session_remembers_who_asked_and_counts_its_sockets(client: TestClient) -> None:
    id = new_session(client)
    with client.websocket_connect(f"/ws/{id}"):
        shown = client.get(f"/session/{id}").json()
    assert shown.pop("created_at") == pytest.approx(time.time(), abs=60)
    assert shown == {
        "session_id": id,
        "client_host": "testclient",
        "user_agent": "a",
        "expires_in": 3600,
        "sockets": 1,
    }


def test_a_text_reaches_every_socket_of_its_session_only(client: TestClient) -> None:
    id, other = new_session(client), new_session(client)
    with (
        client.websocket_connect(f"/ws/{id}") as one,
        client.websocket_connect(f"/ws/{id}") as two,
        client.websocket_connect(f"/ws/{other}") as stranger,
    ):
        one.send_text("hi")
        assert one.receive_text() == two.receive_text() == f"Session {id}: hi"
        stranger.send_text("alone")
        assert stranger.receive_text() == f"Session {other}: alone"


def test_an_unknown_or_expired_session_is_refused(client: TestClient) -> None:
    expired, deleted = new_session(client), str(uuid.uuid4())
    lobby.sessions[uuid.UUID(expired)].used_at -= 3601
    for id in (expired, deleted):
        assert refused(client, f"/ws/{id}") == (1008, "Unknown session")
        answer = client.get(f"/session/{id}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Unknown session"})
    assert uuid.UUID(expired) not in lobby.sessions


@pytest.mark.parametrize("id", ["nope", "0", "chatter", f"{uuid.UUID(int=0)}0"])
def test_what_is_no_session_id_is_no_route(client: TestClient, id: str) -> None:
    answer = client.get(f"/session/{id}")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect(f"/ws/{id}"):
        pass
    assert closed.value.code == 1000  # before it is accepted: a server answers that by a 403


def test_an_open_socket_keeps_its_session(client: TestClient) -> None:
    id = new_session(client)
    with client.websocket_connect(f"/ws/{id}"):
        lobby.sessions[uuid.UUID(id)].used_at -= 3601
        assert client.get(f"/session/{id}").json()["expires_in"] == 3600
    assert client.get(f"/session/{id}").status_code == 200


def test_the_number_of_sessions_is_bounded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "MAX_SESSIONS", 2)
    lobby.sessions.clear()
    used, unused = new_session(client), new_session(client)
    with client.websocket_connect(f"/ws/{used}"):
        newest = new_session(client)
        assert client.get(f"/session/{unused}").status_code == 404
        assert client.get(f"/session/{used}").status_code == 200
        with client.websocket_connect(f"/ws/{newest}"):
            answer = client.post("/create-session")
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "60")


def test_a_burst_in_a_session_reaches_whoever_reads(serve: Callable[..., Server]) -> None:
    """Many frames come at once; none is dropped between the writers' turns."""
    server = serve()
    id = server.request("/create-session", {})["session_id"]
    with server.connect(f"/ws/{id}") as other, server.raw_socket(f"/ws/{id}") as raw:
        raw.sendall(b"".join(frame(1, b"%d" % n) for n in range(1000)))
        for n in range(1000):
            assert other.recv(timeout=20) == f"Session {id}: {n}"


def test_a_reader_that_stalls_in_a_session_delays_nobody(serve: Callable[..., Server]) -> None:
    server = serve()
    id = server.request("/create-session", {})["session_id"]
    stalled = server.connect(f"/ws/{id}", max_queue=1)
    with server.connect(f"/ws/{id}") as one:
        for n in range(300):
            one.send(f"{n} " + "x" * 60_000)
            assert str(one.recv(timeout=20)).startswith(f"Session {id}: {n} ")
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            stalled.recv(timeout=20)
    assert closed.value.rcvd and closed.value.rcvd.code == 1013


# -- 5. Settings ---------------------------------------------------------------------------


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_PORT", "8123")
    monkeypatch.setenv("CHAT_TOKEN_MINUTES", "0.5")
    monkeypatch.setenv("CHAT_ORIGINS", "https://a.example, https://b.example/")
    settings = Settings.from_environment()
    assert (settings.port, settings.token_minutes) == (8123, 0.5)
    assert settings.origins == {"https://a.example", "https://b.example"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHAT_PORT", "http"),
        ("CHAT_PORT", "65536"),
        ("CHAT_TOKEN_MINUTES", "0"),
        ("CHAT_TOKEN_MINUTES", "nan"),
        ("CHAT_RATE", "-1"),
        ("CHAT_RATE", "inf"),
        ("CHAT_SECRET", "short"),
        ("CHAT_DEMO_USERS", "perhaps"),
        ("CHAT_SOCKETS_PER_USER", "many"),
    ],
)
def test_an_unusable_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=f"^{name}") as error:
        Settings.from_environment()
    assert "\n" not in str(error.value)
    assert name != "CHAT_SECRET" or value not in str(error.value)


def test_public_passwords_stay_on_this_machine_unless_wanted(
    database: Path, tmp_path: Path
) -> None:
    """Whether they are in the database, tried out at home, or would be made in a new one."""
    new = str(tmp_path / "new.db")
    for host, db, demo_users, names in [
        ("0.0.0.0", str(database), "0", "user1, user2, admin"),
        ("::", str(database), None, "user1, user2, admin"),
        ("192.0.2.1", new, None, "user1, user2, admin"),
        ("chat.example", new, None, "user1, user2, admin"),
    ]:
        more = {"CHAT_DEMO_USERS": demo_users} if demo_users else {}
        ended = run_app(CHAT_HOST=host, CHAT_DB=db, CHAT_PORT="0", **more)
        assert ended.returncode == 1
        assert re.fullmatch(rf"Lobby cannot start: CHAT_HOST=.*{names}.*\n", ended.stderr)


def test_passwords_that_were_changed_are_not_public(
    database: Path, serve: Callable[..., Server]
) -> None:
    with Entered(app) as client:
        for name in ("user1", "user2", "admin"):
            body = {"new": "a password of our own"}
            url = f"/users/{name}/password"
            assert client.put(url, json=body, headers=bearer("admin")).status_code == 204
    assert serve(host="0.0.0.0").request("/healthz")["status"] == "ok"


def test_public_passwords_may_be_meant(serve: Callable[..., Server]) -> None:
    server = serve(host="0.0.0.0", demo_users="1")
    assert server.request("/healthz")["status"] == "ok"


def test_the_start_is_refused_in_one_line(tmp_path: Path) -> None:
    not_a_database = tmp_path / "notes.txt"
    not_a_database.write_text("This is no database. " * 100)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in [
            ("CHAT_PORT", "http"),
            ("CHAT_PORT", str(taken.getsockname()[1])),
            ("CHAT_HOST", "127.0.0.999"),
            ("CHAT_DB", str(not_a_database)),
        ]:
            ended = run_app(**{"CHAT_DEMO_USERS": "0", name: value})
            assert ended.returncode == 1
            assert re.fullmatch(rf"Lobby cannot start: .*{name}=.*\n", ended.stderr)


# -- 6. Storage ----------------------------------------------------------------------------


def test_commits_reach_the_disk(client: TestClient, database: Path) -> None:
    db = app.state.storage.writer
    assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_a_message_is_stored_before_anyone_sees_it(client: TestClient) -> None:
    """With the database's thread held up nothing appears; the loop serves on meanwhile."""
    headers = bearer()
    with chat(client) as conversation:
        conversation.nothing_came()
        with held_up():
            conversation.say("hello", "m1")
            conversation.nothing_came()
            assert client.get("/items/5").status_code == 200
            page = client.get("/rooms/lobby/messages", headers=headers).json()
            assert page == {"messages": [], "more": False}
        assert conversation.next()["text"] == "hello"


def test_what_is_stored_but_not_shown_yet_is_read_once(client: TestClient, database: Path) -> None:
    """It is no part of what is read meanwhile, and comes by the room's log."""
    stored, read = threading.Event(), threading.Event()

    def hold(statement: str) -> None:
        if statement.startswith("SELECT"):  # for the repeated mid, after the others' commit
            stored.set()
            read.wait(20)

    secret, headers = token("user2"), bearer()
    with chat(client) as writer:
        writer.say("first", "m1")
        first = writer.next("message")["id"]
        with held_up():
            writer.say("second", "m2")  # is being stored, so the others wait together
            writer.say("third", "m3")
            writer.say("first", "m1")
            writer.nothing_came()
            app.state.storage.writer.set_trace_callback(hold)
        assert writer.next("message")["text"] == "second"
        assert stored.wait(20)
        with closing(sqlite3.connect(database)) as db:
            assert db.execute("SELECT text FROM messages WHERE mid = 'm3'").fetchone() == ("third",)
        page = client.get("/rooms/lobby/messages", headers=headers).json()
        assert [event["text"] for event in page["messages"]] == ["first", "second"]
        query = f"after={first}"
        with chat(client, "user2", query, quiet=False, secret=secret) as reader:
            history = reader.next("history")
            assert [event["text"] for event in history["messages"]] == ["second"]
            assert reader.next()["type"] == "presence"
            read.set()
            assert reader.next()["text"] == writer.next()["text"] == "third"
            assert reader.next()["type"] == "joined"
            reader.nothing_came()
    app.state.storage.writer.set_trace_callback(None)


def test_a_message_survives_kill_9(serve: Callable[..., Server], database: Path) -> None:
    server = serve()
    conversation = server.chat(server.token())
    conversation.say("remember me", "m1")
    message = conversation.next("message")
    server.stop(signal.SIGKILL)
    with closing(sqlite3.connect(database)) as db:
        row = db.execute("SELECT id, user, text, mid FROM messages").fetchone()
    assert row == (message["id"], "user1", "remember me", "m1")


def test_messages_that_wait_together_are_stored_by_one_statement(client: TestClient) -> None:
    with chat(client) as conversation, traced(app.state.storage.writer) as statements:
        conversation.nothing_came()
        with held_up():
            conversation.say("the first goes alone", "m0")
            for n in range(1, 20):
                conversation.say("these wait", f"m{n}")
            conversation.nothing_came()
        for _ in range(20):
            conversation.next("message")
    inserts = {one for one in statements if one.lstrip().startswith("INSERT INTO messages")}
    assert 1 <= len(inserts) <= 2


def test_a_database_that_fails_loses_nothing_silently(client: TestClient) -> None:
    """A full disk: the sender is told which message, nobody sees it, and later it works."""
    storage, headers = app.state.storage, bearer()
    with chat(client) as conversation:
        conversation.nothing_came()
        full_disk(storage.writer)
        filler = "x" * 4000
        for n in range(10):
            conversation.say(filler, f"m{n}")
        events = [conversation.next() for _ in range(10)]
        refused = [event for event in events if event["type"] == "error"]
        assert refused
        assert {event["code"] for event in refused} == {"unavailable"}
        body = {"text": filler}
        answer = client.post("/rooms/lobby/messages", json=body, headers=headers)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        storage.writer.execute("PRAGMA max_page_count = 1000000")
        conversation.say(filler, refused[0]["mid"])
        assert conversation.next()["mid"] == refused[0]["mid"]
    page = client.get("/rooms/lobby/messages", headers=bearer()).json()
    assert len(page["messages"]) == 10 - len(refused) + 1


@pytest.mark.parametrize("messages", [0, 2])
def test_a_full_disk_keeps_nobody_from_being_kicked_or_from_leaving(
    client: TestClient, messages: int
) -> None:
    """The kick in a transaction of its own, or in one that fails with what others wrote."""
    message = lobby.new_message("lobby", lobby.Bearer("admin", "", "", 0), "x" * 4000, None)
    kick = {"type": "kick", "folded": "user1", "by": "admin"}
    mine, theirs = token(), token("user2")
    full_disk(app.state.storage.writer)
    with pytest.raises(lobby.Refused, match="database failed"):
        while True:
            client.portal.call(app.state.change, dict(message))
    with (
        chat(client, "user2", secret=theirs) as watcher,
        client.websocket_connect("/ws/chat", headers=bearer_of(mine)) as kicked,
    ):
        assert watcher.next() == joined("user1")
        changes = [*(dict(message) for _ in range(messages)), kick]
        with held_up():
            *written, done = [
                client.portal.start_task_soon(app.state.change, change) for change in changes
            ]
            watcher.nothing_came()
        assert done.result(20)["sockets"] == 1
        assert closed(kicked) == (1008, "Kicked")
        assert all(isinstance(one.exception(20), lobby.Refused) for one in written)
        assert watcher.next() == {"type": "left", "room": "lobby", "user": "user1"}


def test_an_error_of_the_database_is_logged_once_until_a_change_succeeds(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    headers, writer = bearer(), app.state.storage.writer

    def statuses(count: int) -> list[int]:
        answers = [
            client.post("/rooms/lobby/messages", json={"text": "hi"}, headers=headers)
            for _ in range(count)
        ]
        return [answer.status_code for answer in answers]

    for times in (1, 2):
        writer.execute("PRAGMA query_only = ON")
        assert statuses(5) == [503] * 5
        errors = [record for record in caplog.records if "database failed" in record.message]
        assert len(errors) == times
        assert errors[-1].exc_info
        writer.execute("PRAGMA query_only = OFF")
        assert statuses(1) == [201]


def test_a_change_that_fails_alone_harms_no_other(client: TestClient) -> None:
    with chat(client) as conversation:
        conversation.nothing_came()
        with held_up():
            conversation.say("is being stored", "m0")  # so all that follows is one batch
            conversation.say("before", "m1")
            conversation.nothing_came()
            broken = client.portal.start_task_soon(app.state.change, {"type": "register"})
            conversation.say("after", "m2")
            conversation.nothing_came()
            assert [change["type"] for change, _ in app.state.manager.pending] == [
                "message",
                "register",
                "message",
            ]
        with pytest.raises(lobby.Refused) as refusal:
            broken.result(20)
        assert refusal.value.code == "unavailable"
        texts = [conversation.next()["text"] for _ in range(3)]
        assert texts == ["is being stored", "before", "after"] == texts_of(client)


def test_what_the_database_gives_up_is_refused_whole(client: TestClient) -> None:
    """A full disk may end a transaction from within: what was done before in it is undone."""
    headers = bearer()
    person = new_person("new", password="x" * 100_000)
    with chat(client) as conversation:
        conversation.nothing_came()
        full_disk(app.state.storage.writer)
        with held_up():
            conversation.say("is being stored", "m0")  # so all that follows is one batch
            conversation.nothing_came()
            conversation.say("before", "m1")
            conversation.nothing_came()
            register = {"type": "register", **person}
            registered = client.portal.start_task_soon(app.state.change, register)
            conversation.nothing_came()
            assert len(app.state.manager.pending) == 2
        assert isinstance(registered.exception(20), lobby.Refused)
        assert conversation.next()["text"] == "is being stored"
        error = conversation.next()
        assert (error["code"], error["mid"]) == ("unavailable", "m1")
    page = client.get("/rooms/lobby/messages", headers=headers).json()
    assert [event["text"] for event in page["messages"]] == ["is being stored"]


def random_changes(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Changes of every kind, of few people in few rooms, so that many concern each other."""
    names, messages, changes = ["a", "b", "c"], 0, []
    for at in range(count):
        user, by, sid = rng.choice(names), rng.choice(names), str(rng.randrange(9))
        person = new_person(user, password=rng.choice("xy"), by=by)
        person |= {"is_open": rng.random() < 0.5, "is_local": rng.random() < 0.9}
        room = rng.choice(["lobby", "tea", "@a+b"])
        kinds: list[dict[str, Any]] = [
            {"type": "register", **person},
            {"type": "login", **person, "sid": f"{sid}.{at}", "stays": 0, "at": at, "ends": at + 9},
            {"type": "password", **person, "old": rng.choice("xy")},
            {"type": "password", "folded": user, "by": by, "password": rng.choice("xy")},
            {"type": "health"},
            {"type": "logout", "user": user, "sid": f"{sid}.{rng.randrange(count)}"},
            {"type": "role", "folded": user, "by": by, "role": rng.choice(ROLES)},
            *({"type": kind, "folded": user, "by": by} for kind in ("kick", "ban", "unban")),
            {"type": "deleted", "room": room, "id": rng.randint(0, messages + 1), "by": by},
        ]
        if rng.random() < 0.5:
            messages += 1
            mid = rng.choice([None, str(rng.randrange(99))])
            more = {"id": messages, "room": room, "text": f"{at}", "at": at / 8, "mid": mid}
            kinds = [{"type": "message", "user": user, **more}]
        changes.append(rng.choice(kinds))
    return changes


def test_the_same_changes_make_the_same_database(tmp_path: Path) -> None:
    """And have the same outcomes, however they are divided into transactions."""
    changes = random_changes(random.Random(5), 1500)
    seen = []
    for size in (1, 7, 250, len(changes)):
        with closing(Storage(tmp_path / f"{size}.db")) as storage:
            storage.writer.execute("PRAGMA synchronous = OFF")
            outcomes: list[Any] = []
            for first in range(0, len(changes), size):
                batch = [dict(change) for change in changes[first : first + size]]
                outcomes += storage.thread.submit(storage.apply, batch).result()
            dump = [line for line in storage.writer.iterdump() if '"epoch" VALUES' not in line]
        told = [(o.code, str(o)) if isinstance(o, lobby.Refused) else o for o in outcomes]
        seen.append((told, dump))
    assert all(one == seen[0] for one in seen)
    told, dump = seen[0]
    assert len(dump) > 500
    refused = {one[0] for one in told if isinstance(one, tuple)}
    assert refused == {"unknown", "forbidden", "conflict", "unauthorized"}
    made = {one["type"] for one in told if isinstance(one, dict)}
    assert made == {change["type"] for change in changes}


def test_a_second_process_on_the_same_database_is_refused(serve: Callable[..., Server]) -> None:
    server = serve()
    ended = run_app(CHAT_PORT="0")
    assert ended.returncode == 1
    assert re.fullmatch(r"Lobby cannot start: CHAT_DB=.*: another process.*\n", ended.stderr)
    assert server.request("/healthz")["status"] == "ok"


@pytest.fixture
def many_rooms(database: Path) -> None:
    """20,000 rooms, r1 the oldest, and as many messages in the lobby, and two conversations."""
    insert = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000)"
    insert += " INSERT INTO messages (id, room, user, text, at, deleted)"
    with closing(sqlite3.connect(database)) as db, db:
        deleted = "CASE i % 100 WHEN 0 THEN 19990 END"
        db.execute(f"{insert} SELECT i, 'lobby', 'user1', 'x', 0, {deleted} FROM n")
        db.execute(f"{insert} SELECT i + 20000, 'r' || i, 'user1', 'x', 0, NULL FROM n")
        for id, room in ((40_001, "@user1+user2"), (40_002, "@admin+user2")):
            values = (id, room, "user2", "x", 0, None)
            db.execute(f"{insert} VALUES (?, ?, ?, ?, ?, ?)", values)


@pytest.mark.usefixtures("many_rooms")
def test_however_much_there_is_it_is_read_from_an_index(client: TestClient) -> None:
    """What is read costs the rows shown: nothing is scanned, and nothing is sorted."""
    headers = bearer()
    with chat(client, quiet=False) as conversation:
        conversation.next("joined")
        with traced(app.state.storage.reader) as statements:
            for path in (
                "/rooms",
                "/rooms?limit=200&before=30000",
                "/rooms?limit=200&before=1",
                "/rooms/lobby/messages",
                "/rooms/lobby/messages?before=9&after=5",
                "/rooms/lobby/messages?q=x",
                "/rooms/@user1+user2/messages",
                "/users",
            ):
                assert client.get(path, headers=headers).status_code == 200
            conversation.send("history", room="lobby", before=5000)
            conversation.send("join", room="lobby", after=19900)
            assert [conversation.next()["type"] for _ in range(2)] == ["history", "history"]
            conversation.next("presence")
    kinds = {re.sub(r"'[^']*'|\d+", "?", statement) for statement in statements}
    tables = ("FROM rooms", "FROM messages", "FROM people", "deleted >=")
    assert all(any(table in kind for kind in kinds) for table in tables)
    for statement in statements:
        rows = app.state.storage.reader.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
        plan = str([row["detail"] for row in rows])
        assert "SEARCH" in plan, statement
        assert not re.search(r"SCAN (?!CONSTANT)|TEMP B-TREE", plan), (statement, plan)
        rows = app.state.storage.reader.execute(statement).fetchall()
        assert len(rows) <= lobby.WINDOW + 1, statement


@pytest.mark.parametrize("shape", [0, 2, 99])
def test_a_database_of_another_shape_is_refused_in_one_line(tmp_path: Path, shape: int) -> None:
    path = tmp_path / "chat.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE messages (id INTEGER PRIMARY KEY, text TEXT)")
        db.execute("INSERT INTO messages VALUES (7, 'from long ago')")
        db.execute(f"PRAGMA user_version = {shape}")
        db.commit()
        before = list(db.iterdump())
    ended = run_app(CHAT_PORT="0")
    assert ended.returncode == 1
    line = r"Lobby cannot start: CHAT_DB=.*chat\.db': another version of Lobby made it.*\n"
    assert re.fullmatch(line, ended.stderr)
    with closing(sqlite3.connect(path)) as db:
        assert list(db.iterdump()) == before
        assert db.execute("PRAGMA user_version").fetchone() == (shape,)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_database_and_secret_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "new.db")
    storage.close()
    lobby.load_or_create_secret(tmp_path / "new.db")
    for name in ("new.db", "new.db.secret"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


# -- 7. Knowing a user ---------------------------------------------------------------------


def test_the_demo_people_can_log_in(client: TestClient) -> None:
    for name, password in PASSWORDS.items():
        answer = client.post("/login", json={"username": name, "password": password})
        assert answer.json().keys() == {"access_token", "token_type", "expires_in"}
        assert (answer.json()["token_type"], answer.json()["expires_in"]) == ("bearer", 3600)
        me = client.get(
            "/me", headers={"Authorization": f"Bearer {answer.json()['access_token']}"}
        ).json()
        assert me == {"username": name, "role": "admin" if name == "admin" else "member"}


def test_a_log_in_by_form_gives_a_token_too(client: TestClient) -> None:
    answer = client.post("/token", data={"username": "USER1", "password": "password1"})
    claims = jwt.decode(answer.json()["access_token"], options={"verify_signature": False})
    assert claims.keys() == {"sub", "sid", "iat", "auth_time", "exp"}  # nothing of a role
    assert claims["sub"] == "user1"
    assert claims["iat"] == claims["auth_time"] == pytest.approx(time.time(), abs=60)
    assert 3600 <= claims["exp"] - claims["iat"] <= 3601


@pytest.mark.parametrize("name", ["user1", "nobody", "", "user1 ", "x" * 10_000, "\ud800"])
@pytest.mark.parametrize("password", ["wrong", "", "x" * 10_000, "\ud800", "a" + "\u0301" * 99])
def test_a_wrong_password_is_refused_whoever_is_named(
    client: TestClient, name: str, password: str
) -> None:
    content = json.dumps({"username": name, "password": password})
    answer = client.post("/login", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (401, {"detail": "Bad username or password"})


def test_hashing_runs_in_its_own_few_threads(client: TestClient) -> None:
    held = threading.Event()
    for _ in range(2):
        app.state.logins.threads.submit(held.wait)
    answers = []
    body = {"username": "user1", "password": "password1"}
    waiting = threading.Thread(target=lambda: answers.append(client.post("/login", json=body)))
    waiting.start()
    assert client.get("/items/5").status_code == 200  # the loop is free
    assert not answers
    held.set()
    waiting.join()
    assert answers[0].status_code == 200


def test_the_loop_computes_no_hash(client: TestClient) -> None:
    """With the threads for it held up a log-in waits, and whatever comes after it is served."""
    held, logins = threading.Event(), app.state.logins
    for _ in range(2):
        logins.threads.submit(held.wait)
    log_in = client.portal.start_task_soon(logins.log_in, "user1", "password1")
    assert client.get("/items/5").status_code == 200
    assert not log_in.done()
    held.set()
    assert log_in.result(20)["token_type"] == "bearer"


def test_one_address_that_tries_passwords_keeps_out_no_other(client: TestClient) -> None:
    held, logins = threading.Event(), app.state.logins
    for _ in range(2):
        logins.threads.submit(held.wait)
    body = {"username": "user1", "password": "password1"}
    with ThreadPoolExecutor() as threads:

        def wait_for_a_turn(host: str, times: int) -> list[Any]:
            log_in = at_address(client, host).post
            answers = [threads.submit(log_in, "/login", json=body) for _ in range(times)]
            while logins.hashing.count(host) < times:
                assert client.get("/items/5").status_code == 200
                assert not any(answer.done() for answer in answers)
            return answers

        guesses = wait_for_a_turn("203.0.113.9", lobby.MAX_HASHING_EACH)
        answer = at_address(client, "203.0.113.9").post("/login", json=body)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
        guesses += wait_for_a_turn("203.0.113.10", 1)
        held.set()
        assert {guess.result(20).status_code for guess in guesses} == {200}
    assert at_address(client, "203.0.113.9").post("/login", json=body).status_code == 200
    assert not logins.hashing  # nothing is kept of an address


def test_when_too_many_passwords_wait_a_log_in_is_put_off(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "MAX_HASHING", 0)
    answer = client.post("/login", json={"username": "user1", "password": "password1"})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"


def test_whoever_registers_can_log_in(client: TestClient) -> None:
    body = {"username": "Zoë", "password": "correct horse"}
    answer = client.post("/register", json=body)
    assert (answer.status_code, answer.json()) == (201, {"username": "Zoë", "role": "member"})
    assert client.post("/login", json=body).status_code == 200
    for same in ("zoë", "ZOË", "Zoe\u0308"):
        assert client.post("/register", json=body | {"username": same}).status_code == 409
    with closing(sqlite3.connect(os.environ["CHAT_DB"])) as db:
        assert "correct horse" not in "\n".join(db.iterdump())


def test_demo_people_are_made_though_registration_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHAT_REGISTER", "0")
    with Entered(app) as client:
        for name in PASSWORDS:
            me = {"username": name, "role": "admin" if name == "admin" else "member"}
            assert client.get("/me", headers=bearer(name)).json() == me
        person = {"username": "user3", "password": "password3"}
        assert client.post("/register", json=person).status_code == 403
        answer = client.post("/register", json=person, headers=bearer("admin"))
        assert (answer.status_code, answer.json()) == (201, {"username": "user3", "role": "member"})


def test_without_demo_people_the_first_to_register_is_the_admin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHAT_DEMO_USERS", "0")
    with Entered(app) as client:
        roles = [
            client.post("/register", json={"username": name, "password": "longenough"}).json()
            for name in ("first", "second")
        ]
    assert [person["role"] for person in roles] == ["admin", "member"]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "203.0.113.9"},
        {"Host": "chat.example"},
    ],
)
def test_who_comes_through_a_proxy_is_not_the_first_person(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    """A proxy on this machine connects over loopback, whoever is behind it."""
    monkeypatch.setenv("CHAT_DEMO_USERS", "0")
    monkeypatch.setenv("CHAT_ORIGINS", "https://chat.example")
    body = {"username": "first", "password": "longenough"}
    with Entered(app) as client:
        near = at_address(client, "127.0.0.1")
        assert near.post("/register", json=body, headers=headers).status_code == 403
        assert near.post("/register", json=body).json()["role"] == "admin"


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 201), ("::1", 201), ("203.0.113.9", 403), ("2001:db8::9", 403)],
)
def test_the_first_person_comes_from_this_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, status: int, is_open: bool
) -> None:
    monkeypatch.setenv("CHAT_DEMO_USERS", "0")
    monkeypatch.setenv("CHAT_REGISTER", str(int(is_open)))
    with Entered(app) as client:
        body = {"username": "first", "password": "longenough"}
        answer = at_address(client, host).post("/register", json=body)
        assert answer.status_code == status
        if status == 201:
            assert answer.json() == {"username": "first", "role": "admin"}
        else:
            assert "over loopback" in answer.json()["detail"]
            assert not app.state.storage.find_people("")


def test_with_people_there_another_address_may_register(client: TestClient) -> None:
    body = {"username": "new", "password": "longenough"}
    answer = at_address(client, "203.0.113.9").post("/register", json=body)
    assert (answer.status_code, answer.json()) == (201, {"username": "new", "role": "member"})


def test_once_registration_is_closed_only_an_admin_makes_people(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_REGISTER", "0")
    with Entered(app) as client:
        act(client, "admin", "user2", role="moderator")
        body = {"username": "new", "password": "longenough"}
        for headers in ({}, bearer("user1"), bearer("user2")):
            answer = client.post("/register", json=body, headers=headers)
            assert answer.status_code == 403
            assert "only an admin" in answer.json()["detail"]
        answer = client.post("/register", json=body, headers=bearer("admin"))
        assert (answer.status_code, answer.json()) == (201, {"username": "new", "role": "member"})
        assert can_log_in(client, "longenough", "new")


@pytest.mark.parametrize("name", ["a", "x" * 32, "你好", "नमस्ते", "Łódź-1_2", "ﬁnn"])
def test_names_of_any_script_are_good(name: str) -> None:
    assert lobby.clean_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "x" * 33, "x" * 1000, "Error", "here", "a b", "a.b", "@a", "a+b", "a\n", "<b>", "😀"]
    + ["\u0301a", "a\u200b", "a\ufe0f", "a\u202eb"],  # what is seen as another name, or not at all
)
def test_other_names_are_refused(client: TestClient, name: str) -> None:
    answer = client.post("/register", json={"username": name, "password": "longenough"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "username"]


@pytest.mark.parametrize("password", ["1234567", "x" * 129, 12345678, None, "\ud800" * 8])
def test_a_bad_password_is_refused_and_not_repeated(client: TestClient, password: Any) -> None:
    content = json.dumps({"username": "new", "password": password})
    headers = {"Content-Type": "application/json"}
    answer = client.post("/register", content=content, headers=headers)
    assert answer.status_code == 422
    assert "input" not in answer.text


def claims_of(token: str) -> dict[str, Any]:
    return dict(jwt.decode(token, options={"verify_signature": False}))


def forge(secret: str = "", **changes: Any) -> str:
    """A token like this one, or of a new log-in, but for these claims (None: left out)."""
    claims = claims_of(secret or token()) | changes
    good = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(good, app.state.logins.secret, algorithm="HS256")


BAD_TOKENS: list[tuple[Callable[[], str], str]] = [
    (lambda: "", "No token provided"),
    (lambda: "nonsense", "Invalid token"),
    (lambda: "é", "Invalid token"),
    (lambda: token()[:-4], "Invalid token"),
    (lambda: jwt.encode(claims_of(token()), "x" * 32), "Invalid token"),
    (lambda: jwt.encode(claims_of(token()), None, "none"), "Invalid token"),
    (lambda: jwt.encode(claims_of(token()), app.state.logins.secret, "HS512"), "Invalid token"),
    (lambda: forge(sub=None), "Invalid token"),
    (lambda: forge(sid=None), "Invalid token"),
    (lambda: forge(iat=None), "Invalid token"),
    (lambda: forge(auth_time=None), "Invalid token"),
    (lambda: forge(exp=None), "Invalid token"),
    (lambda: forge(sub=1), "Invalid token"),
    (lambda: forge(sub="nobody"), "Invalid token"),
    (lambda: forge(sub="\ud800"), "Invalid token"),
    (lambda: forge(sub="@"), "Invalid token"),
    (lambda: forge(sid="\ud800"), "Invalid token"),
    (lambda: forge(sid="unknown"), "Logged out"),
    (lambda: forge(sub="user2"), "Logged out"),  # it was not their log-in
    (lambda: forge(exp=time.time() - 1), "Token expired"),
    (lambda: forge(exp=1e12), "Invalid token"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), BAD_TOKENS)
def test_a_bad_token_is_refused_with_its_reason(
    client: TestClient, make: Callable[[], str], reason: str
) -> None:
    bad = make()
    for method, path in (("GET", "/me"), ("POST", "/renew")):
        headers = {"Authorization": f"Bearer {bad}".encode()}
        answer = client.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"detail": f"Unauthorized: {reason}"})
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/ws/protected", "/ws/chat"):
        assert refused(client, f"{path}?token={bad}") == (1008, f"Unauthorized: {reason}")


def test_a_long_name_or_password_costs_no_time(client: TestClient) -> None:
    """Normalising a mebibyte of these marks would take minutes, with the loop held up."""
    marks = "a" + "\u0301\u0316" * 100_000
    for body in ({"username": marks, "password": "x"}, {"username": "user1", "password": marks}):
        assert client.post("/login", json=body).status_code == 401
        assert client.post("/register", json=body).status_code == 422
    url, headers = "/rooms/lobby/messages", bearer()
    for text, status in ((marks, 422), ("a" + "\u0301" * 31, 422), ("a" + "\u0301" * 30, 201)):
        assert client.post(url, json={"text": text}, headers=headers).status_code == status


def renew(client: TestClient, secret: str) -> Any:
    return client.post("/renew", headers=bearer_of(secret))


def test_a_renewal_gives_a_token_of_the_same_log_in(client: TestClient) -> None:
    now = int(time.time())
    old = forge(auth_time=now - 600, iat=now - 600, exp=now + 60)
    answer = renew(client, old).json()
    assert answer.keys() == {"access_token", "token_type", "expires_in"}
    assert answer["expires_in"] == 3600
    before, after = claims_of(old), claims_of(answer["access_token"])
    assert [after[name] for name in ("sub", "sid", "auth_time")] == [
        before[name] for name in ("sub", "sid", "auth_time")
    ]
    assert after["iat"] >= now
    assert 3600 <= after["exp"] - after["iat"] <= 3601
    for good in (old, answer["access_token"]):
        assert client.get("/me", headers=bearer_of(good)).status_code == 200


def test_the_sockets_of_a_renewed_log_in_live_on_until_the_new_tokens_end(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_TOKEN_MINUTES", "0.02")
    expired = 1008, "Unauthorized: Token expired"
    with Entered(app) as client:
        now = time.time()
        renewed, other = forge(exp=now + 0.5), forge(exp=now + 0.7)
        with (
            client.websocket_connect("/ws/protected", headers=bearer_of(renewed)) as lives,
            client.websocket_connect("/ws/protected", headers=bearer_of(other)) as ends,
        ):
            assert lives.receive_text() == ends.receive_text()
            assert renew(client, renewed).status_code == 200
            assert closed(ends) == expired
            lives.send_text("still here")
            assert lives.receive_text() == "user1 says: still here"
            assert closed(lives) == expired


@pytest.mark.parametrize(("stay", "status"), [(True, 200), (False, 401)])
def test_by_an_expired_token_only_a_log_in_that_stays_is_renewed(
    client: TestClient, stay: bool, status: int
) -> None:
    body = {"username": "user1", "password": "password1", "stay": stay}
    secret = client.post("/login", json=body).json()["access_token"]
    answer = renew(client, forge(secret, exp=time.time() - 1))
    assert answer.status_code == status
    if stay:
        renewed = answer.json()["access_token"]
        assert client.get("/me", headers=bearer_of(renewed)).status_code == 200
    else:
        assert answer.json() == {"detail": "Unauthorized: Token expired"}


def test_an_expired_token_is_good_for_nothing_but_a_renewal(client: TestClient) -> None:
    expired = forge(token(stay=True), exp=time.time() - 1)
    for method, path in (("GET", "/me"), ("GET", "/rooms"), ("POST", "/logout")):
        answer = client.request(method, path, headers=bearer_of(expired))
        assert answer.status_code == 401
        assert answer.json() == {"detail": "Unauthorized: Token expired"}
    for path in ("/ws/protected", "/ws/chat"):
        reason = "Unauthorized: Token expired"
        assert refused(client, path, headers=bearer_of(expired)) == (1008, reason)
    assert renew(client, expired).status_code == 200


@pytest.mark.parametrize("stay", [False, True])
def test_an_old_log_in_is_not_renewed(client: TestClient, stay: bool) -> None:
    day = 86_400
    secret = token(stay=stay)
    young = forge(secret, auth_time=time.time() - 30 * day + 60)
    assert renew(client, young).status_code == 200
    answer = renew(client, forge(secret, auth_time=time.time() - 30 * day))
    assert answer.status_code == 401
    assert answer.json() == {"detail": "Unauthorized: Log in again"}


def test_a_token_ends_at_the_latest_with_its_log_in(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_LOGIN_DAYS", "0.01")  # 864 s
    with Entered(app) as client:
        secret = token()
        claims = claims_of(secret)
        assert 864 <= claims["exp"] - claims["auth_time"] <= 866
        renewed = renew(client, forge(secret, auth_time=claims["auth_time"] - 800)).json()
        assert 0 < renewed["expires_in"] <= 64
        claims = claims_of(renewed["access_token"])
        assert claims["exp"] - claims["auth_time"] <= 865


@pytest.mark.parametrize("stay", [False, True])
def test_a_logout_ends_the_renewed_tokens_too(client: TestClient, stay: bool) -> None:
    first = token(stay=stay)
    second = renew(client, first).json()["access_token"]
    third = renew(client, second).json()["access_token"]
    assert client.post("/logout", headers=bearer_of(second)).status_code == 204
    for secret in (first, second, third):
        for answer in (client.get("/me", headers=bearer_of(secret)), renew(client, secret)):
            assert answer.status_code == 401
            assert answer.json() == {"detail": "Unauthorized: Logged out"}
    assert renew(client, forge(third, exp=time.time() - 1)).status_code == 401


def test_a_renewal_does_not_revive_a_socket_that_was_ended(client: TestClient) -> None:
    """By a kick in the same batch; the log-in goes on, so its person may come back."""
    mine = token()
    with (
        chat(client, "user2") as conversation,
        client.websocket_connect("/ws/protected", headers=bearer_of(mine)) as websocket,
    ):
        websocket.receive_text()
        with held_up():
            conversation.say("is being stored", "m1")  # so both that follow are one batch
            conversation.nothing_came()
            change = {"type": "kick", "folded": "user1", "by": "admin"}
            kick = client.portal.start_task_soon(app.state.change, change)
            renewal = client.portal.start_task_soon(app.state.logins.renew, mine)
            conversation.nothing_came()
            assert len(app.state.manager.pending) == 2
        assert kick.result(20)["sockets"] == 1
        renewed = renewal.result(20)["access_token"]
        websocket.send_text("still here?")
        with pytest.raises(WebSocketDisconnect) as error:
            websocket.receive_text()
        assert (error.value.code, error.value.reason) == (1008, "Kicked")
    assert client.get("/me", headers=bearer_of(renewed)).status_code == 200


def test_who_is_banned_cannot_renew(client: TestClient) -> None:
    secret = token(stay=True)
    act(client, "admin", "user1/ban")
    for one in (secret, forge(secret, exp=time.time() - 1)):
        answer = renew(client, one)
        assert (answer.status_code, answer.json()) == (403, {"detail": "Banned"})
    act(client, "admin", "user1/unban")
    assert renew(client, secret).status_code == 200


def test_a_renewal_needs_no_disk(client: TestClient) -> None:
    """Not even in a batch with what does, and fails; the sockets live on all the same."""
    with chat(client, "user2") as conversation:
        short = forge(exp=time.time() + 60)
        with client.websocket_connect("/ws/protected", headers=bearer_of(short)) as websocket:
            websocket.receive_text()
            (connection,) = [one for one in app.state.connections if one.me.name == "user1"]
            before = connection.deadline.when()
            with held_up():
                app.state.storage.writer.execute("PRAGMA query_only = ON")
                conversation.say("is being stored", "m1")  # so both that follow are one batch
                conversation.nothing_came()
                conversation.say("cannot be stored", "m2")
                renewal = client.portal.start_task_soon(app.state.logins.renew, short)
                conversation.nothing_came()
                assert len(app.state.manager.pending) == 2
            assert [conversation.next()["code"] for _ in range(2)] == ["unavailable"] * 2
            assert renewal.result(20)["expires_in"] == 3600
            assert connection.deadline.when() > before + 3000
        assert renew(client, short).status_code == 200


def test_a_clock_that_was_set_back_refuses_nobody(client: TestClient) -> None:
    """So that tokens were made, and passwords given, in what is the future now."""
    later = time.time() + 300
    secret = forge(iat=later, auth_time=later, exp=later + 3600)
    assert client.get("/me", headers=bearer_of(secret)).status_code == 200
    assert renew(client, secret).json()["expires_in"] == 3600
    with client.websocket_connect("/ws/protected", headers=bearer_of(secret)) as websocket:
        assert websocket.receive_text().startswith("Hello")


def test_after_logout_the_token_is_refused_and_its_sockets_close(client: TestClient) -> None:
    mine, other = token(), token()
    headers = {"Authorization": f"Bearer {mine}"}
    with client.websocket_connect(f"/ws/chat?token={mine}") as websocket:
        assert websocket.receive_text() == "user1 joined the chat!"
        with client.websocket_connect(f"/ws/chat?token={other}") as stays:
            assert client.post("/logout", headers=headers).status_code == 204
            with pytest.raises(WebSocketDisconnect) as closed:
                websocket.receive_text()
            assert (closed.value.code, closed.value.reason) == (1008, "Unauthorized: Logged out")
            stays.send_text("still here")
            assert stays.receive_text() == "user1: still here"
    with client.websocket_connect("/ws/protected", headers=bearer()) as websocket:
        websocket.receive_text()
        key = dict(websocket.scope["headers"])[b"authorization"].decode()
        client.post("/logout", headers={"Authorization": key})
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_text()
        assert closed.value.reason == "Unauthorized: Logged out"
    refusal = {"detail": "Unauthorized: Logged out"}
    assert client.get("/me", headers=headers).json() == refusal


def test_a_logout_outlasts_a_restart(database: Path) -> None:
    with Entered(app) as client:
        headers, stays = bearer(), bearer()
        assert client.post("/logout", headers=headers).status_code == 204
    with Entered(app) as client:
        assert client.get("/me", headers=headers).status_code == 401
        assert client.get("/me", headers=stays).status_code == 200


def test_a_log_in_is_a_row_until_it_ends(client: TestClient, database: Path) -> None:
    start = {"type": "login", "user": "user1", "stays": False}
    start |= {"at": time.time() - 9, "ends": time.time() - 1}
    start["password"] = app.state.storage.find_person("user1")["password"]
    client.portal.call(app.state.change, start | {"sid": "over"})
    first, second = claims_of(token())["sid"], token("user2")
    with closing(sqlite3.connect(database)) as db:
        rows = "SELECT sid, user FROM logins ORDER BY user"
        assert db.execute(rows).fetchall() == [
            (first, "user1"),
            (claims_of(second)["sid"], "user2"),
        ]
        client.post("/logout", headers=bearer_of(second))
        assert db.execute(rows).fetchall() == [(first, "user1")]


def can_log_in(client: TestClient, password: str, user: str = "user1") -> bool:
    body = {"username": user, "password": password}
    return bool(client.post("/login", json=body).status_code == 200)


def test_a_changed_password_ends_every_other_log_in(client: TestClient) -> None:
    mine, other = token(), token()
    with (
        client.websocket_connect("/ws/chat", headers=bearer_of(mine)) as tab,
        client.websocket_connect("/ws/protected", headers=bearer_of(other)) as other_tab,
        client.websocket_connect("/ws/protected", headers=bearer("user2")) as bystander,
    ):
        body = {"old": "password1", "new": "another password"}
        answer = client.put("/me/password", json=body, headers=bearer_of(mine))
        assert answer.status_code == 200
        assert answer.json().keys() == {"access_token", "token_type", "expires_in"}
        reason = 1008, "Unauthorized: Password changed"
        assert [closed(one) for one in (tab, other_tab)] == [reason] * 2
        bystander.receive_text()
        bystander.send_text("still here")
        assert bystander.receive_text() == "user2 says: still here"
    for secret in (mine, other):
        ended = client.get("/me", headers=bearer_of(secret))
        assert (ended.status_code, ended.json()) == (401, {"detail": "Unauthorized: Logged out"})
        assert renew(client, secret).status_code == 401
    new = answer.json()["access_token"]
    assert client.get("/me", headers=bearer_of(new)).json()["username"] == "user1"
    assert can_log_in(client, "another password") and not can_log_in(client, "password1")


@pytest.mark.parametrize("stay", [True, False])
def test_a_log_in_that_stays_does_so_after_a_change_of_password(
    client: TestClient, stay: bool
) -> None:
    body = {"old": "password1", "new": "another password"}
    answer = client.put("/me/password", json=body, headers=bearer_of(token(stay=stay)))
    expired = forge(answer.json()["access_token"], exp=time.time() - 1)
    assert renew(client, expired).status_code == (200 if stay else 401)


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        ("wrong", "another password", 403),
        ("", "another password", 403),
        ("\ud800", "another password", 403),
        ("password1", "1234567", 422),
        ("password1", "x" * 129, 422),
    ],
)
def test_a_change_of_password_that_is_refused_changes_nothing(
    client: TestClient, old: str, new: str, status: int
) -> None:
    mine = bearer()
    with client.websocket_connect("/ws/protected", headers=mine) as websocket:
        content = json.dumps({"old": old, "new": new})
        headers = mine | {"Content-Type": "application/json"}
        answer = client.put("/me/password", content=content, headers=headers)
        assert answer.status_code == status
        assert status != 403 or answer.json() == {"detail": "The old password is wrong"}
        assert "input" not in answer.text
        websocket.receive_text()
        websocket.send_text("still here")
        assert websocket.receive_text() == "user1 says: still here"
    assert client.get("/me", headers=mine).status_code == 200
    assert can_log_in(client, "password1")


def test_of_two_changes_from_the_same_old_password_one_wins(client: TestClient) -> None:
    """Both have looked at it before either changes it."""
    held, logins, mine = threading.Event(), app.state.logins, bearer()
    for _ in range(2):
        logins.threads.submit(held.wait)

    def change(new: str) -> int:
        body = {"old": "password1", "new": new}
        return int(client.put("/me/password", json=body, headers=mine).status_code)

    passwords = ["one password", "other password"]
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(change, new) for new in passwords]
        while len(logins.hashing) < 2:
            assert client.get("/items/5").status_code == 200
        held.set()
        statuses = [answer.result(20) for answer in answers]
    assert sorted(statuses) == [200, 403]
    assert [can_log_in(client, new) for new in passwords] == [one == 200 for one in statuses]


def test_what_becomes_of_a_change_tells_no_hash(client: TestClient) -> None:
    stored = app.state.storage.find_person("user1")["password"]
    login = {"type": "login", "user": "user1", "password": stored, "sid": "s", "stays": False}
    more = {"user": "user1", "by": "user1", "old": stored, "password": lobby.NO_PASSWORD}
    for change in (
        {"type": "register", **new_person("new")},
        login | {"at": time.time(), "ends": time.time() + 60},
        {"type": "password", **more},
        {"type": "password", "folded": "user1", "by": "admin", "password": stored},
    ):
        event = client.portal.call(app.state.change, change)
        assert event["user"] in ("user1", "new")
        assert not {stored, lobby.NO_PASSWORD} & set(map(str, event.values()))


def test_who_changes_the_password_meanwhile_is_not_logged_in_by_the_old_one(
    client: TestClient,
) -> None:
    with pytest.raises(lobby.Refused) as refusal:
        client.portal.call(app.state.logins.start, "user1", "before", False)
    assert (refusal.value.code, str(refusal.value)) == ("unauthorized", "Bad username or password")


def test_a_socket_closes_when_its_token_expires(client: TestClient) -> None:
    short = forge(exp=int(time.time()) + 2)
    with client.websocket_connect(f"/ws/chat?token={short}") as websocket:
        assert websocket.receive_text() == "user1 joined the chat!"
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_text()
    assert (closed.value.code, closed.value.reason) == (1008, "Unauthorized: Token expired")


def test_the_protected_socket_greets_and_echoes(client: TestClient) -> None:
    with client.websocket_connect("/ws/protected", headers=bearer("user2")) as websocket:
        assert websocket.receive_text() == "Hello user2, you are authenticated!"
        websocket.send_text("hi")
        assert websocket.receive_text() == "user2 says: hi"


def test_refusals_are_seen_on_the_wire(serve: Callable[..., Server]) -> None:
    server = serve()
    for protocols in (None, ["lobby.v1"]):
        with server.connect("/ws/chat", subprotocols=protocols) as websocket:
            with pytest.raises(ConnectionClosed) as closed:
                websocket.recv(timeout=20)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert closed.value.rcvd.reason == "Unauthorized: No token provided"
    with pytest.raises(InvalidStatus) as denied:
        server.connect("/ws/chat", origin="https://evil.example")
    assert denied.value.response.status_code == 403


def test_the_secret_is_kept_and_a_set_one_is_used(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Entered(app):
        old = bearer()
    with Entered(app) as client:
        assert client.get("/me", headers=old).status_code == 200
    monkeypatch.setenv("CHAT_SECRET", "s" * 32)
    with Entered(app) as client:
        assert client.get("/me", headers=old).status_code == 401


def test_a_short_secret_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.db.secret").write_text("short")
    with pytest.raises(StartError, match="CHAT_SECRET"):
        lobby.load_or_create_secret(tmp_path / "chat.db")


# -- 8. Roles ------------------------------------------------------------------------------


def act(client: TestClient, who: str, path: str, role: str = "") -> int:
    """The status that somebody gets for ``kick``, ``ban``, ``unban`` or a new role."""
    if role:
        answer = client.put(f"/users/{path}/role", json={"role": role}, headers=bearer(who))
    else:
        answer = client.post(f"/users/{path}", headers=bearer(who))
    return answer.status_code


@pytest.fixture
def people(client: TestClient) -> None:
    """Two of each role: member1, member2, moderator1, ... beside the demo people."""
    for role in ROLES:
        for name in (f"{role}1", f"{role}2"):
            person = new_person(name, role=role)
            client.portal.call(app.state.change, {"type": "register", **person})


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize("action", ["kick", "ban", "unban", "role"])
def test_everybody_may_act_on_those_below_them_and_admins_on_each_other(
    client: TestClient, action: str
) -> None:
    for who in ROLES:
        for whom in ROLES:
            if action == "role":
                status = act(client, f"{who}1", f"{whom}2", role=whom)
            else:
                status = act(client, f"{who}1", f"{whom}2/{action}")
            moderates = who == "moderator" and whom == "member" and action != "role"
            assert status == (200 if who == "admin" or moderates else 403), (who, whom)
    assert client.post(f"/users/member2/{action}").status_code in (401, 405)
    assert act(client, "admin1", "nobody/kick") == act(client, "admin1", "a b/kick") == 404
    assert act(client, "member1", "nobody/kick") == 403  # who may not act learns nothing
    assert act(client, "admin1", "member2", role="king") == 422


def test_a_new_role_counts_from_the_next_action_on(client: TestClient) -> None:
    """With the same token and while the socket stays open."""
    mine = bearer()
    with chat(client) as conversation:
        assert client.post("/users/user2/kick", headers=mine).status_code == 403
        assert act(client, "admin", "USER1", role="moderator") == 200  # names have no case
        assert client.post("/users/user2/kick", headers=mine).status_code == 200
        online = client.get("/users", headers=mine).json()
        assert online == [{"username": "user1", "role": "moderator", "rooms": ["lobby"]}]
        assert client.get("/me", headers=mine).json() == {"username": "user1", "role": "moderator"}
        assert act(client, "admin", "user1", role="member") == 200
        assert client.post("/users/user2/kick", headers=mine).status_code == 403
        for role in ("moderator", "member"):
            assert conversation.next() == {"type": "role", "user": "user1", "role": role}
        conversation.nothing_came()


def test_the_last_admin_stays_one(client: TestClient) -> None:
    assert act(client, "admin", "admin", role="moderator") == 409
    assert act(client, "admin", "admin/ban") == 409
    act(client, "admin", "user1", role="admin")
    act(client, "admin", "user1/ban")  # a banned admin is no admin who could help
    assert act(client, "admin", "admin", role="member") == 409
    act(client, "admin", "user1/unban")
    assert act(client, "admin", "admin", role="member") == 200
    assert act(client, "user1", "user1/ban") == 409


def test_of_admins_who_demote_each_other_at_once_one_stays(client: TestClient) -> None:
    """Both were admins when they asked; by the second demotion, in the same batch, one is not."""
    act(client, "admin", "user1", role="admin")
    pairs = [("admin", "user1"), ("user1", "admin")]
    with chat(client, "user2") as conversation, held_up():
        conversation.say("is being stored", "m1")
        conversation.nothing_came()
        demotions = [
            client.portal.start_task_soon(
                app.state.change, {"type": "role", "folded": whom, "role": "member", "by": who}
            )
            for who, whom in pairs
        ]
        conversation.nothing_came()
        assert len(app.state.manager.pending) == 2
    assert demotions[0].result(20)["role"] == "member"
    with pytest.raises(lobby.Refused) as refusal:
        demotions[1].result(20)
    assert lobby.REFUSALS[refusal.value.code] == 403
    roles = [client.get("/me", headers=bearer(user)).json()["role"] for user in ("admin", "user1")]
    assert roles == ["admin", "member"]


def test_what_a_ban_overtakes_in_its_batch_is_refused(client: TestClient) -> None:
    act(client, "admin", "user1", role="moderator")
    with chat(client, "user2") as conversation, held_up():
        conversation.say("is being stored", "m1")
        conversation.nothing_came()
        ban, kick = (
            client.portal.start_task_soon(app.state.change, change)
            for change in (
                {"type": "ban", "folded": "user1", "by": "admin"},
                {"type": "kick", "folded": "user2", "by": "user1"},
            )
        )
        conversation.nothing_came()
    assert ban.result(20)["sockets"] == 0
    with pytest.raises(lobby.Refused) as refusal:
        kick.result(20)
    assert refusal.value.code == "forbidden"


def test_a_kick_closes_all_sockets_of_one_person(client: TestClient) -> None:
    with (
        client.websocket_connect("/ws/chat", headers=bearer()) as tab,
        client.websocket_connect("/ws/chat", headers=bearer()) as other_tab,
        client.websocket_connect("/ws/protected", headers=bearer()) as protected,
        client.websocket_connect("/ws/protected", headers=bearer("user2")) as bystander,
    ):
        assert protected.receive_text().startswith("Hello")
        answer = client.post("/users/user1/kick", headers=bearer("admin"))
        assert answer.json() == {"username": "user1", "sockets": 3}
        assert [closed(one) for one in (tab, other_tab, protected)] == [(1008, "Kicked")] * 3
        bystander.receive_text()
        bystander.send_text("still here")
        assert bystander.receive_text() == "user2 says: still here"
    with chat(client) as conversation:  # a kick is no ban
        conversation.nothing_came()


def test_of_two_ends_at_once_the_first_is_told(client: TestClient) -> None:
    mine = bearer()
    with (
        chat(client, "user2") as conversation,
        client.websocket_connect("/ws/protected", headers=mine) as websocket,
    ):
        websocket.receive_text()
        with held_up():
            conversation.say("is being stored", "m1")  # so both that follow are one batch
            conversation.nothing_came()
            kick, ban = (
                client.portal.start_task_soon(
                    app.state.change, {"type": kind, "folded": "user1", "by": "admin"}
                )
                for kind in ("kick", "ban")
            )
            conversation.nothing_came()
            assert len(app.state.manager.pending) == 2
        assert [kick.result(20)["sockets"], ban.result(20)["sockets"]] == [1, 1]
        assert closed(websocket) == (1008, "Kicked")


def test_an_end_that_comes_too_late_is_no_error(client: TestClient) -> None:
    """After the token has expired but before the handler knows, and after the socket is closed."""

    async def end_expired(connection: lobby.Connection) -> None:
        connection.deadline.reschedule(0)
        await asyncio.sleep(0)
        assert connection.deadline.expired()
        connection.end("forbidden", "Kicked")

    with client.websocket_connect("/ws/protected", headers=bearer()) as websocket:
        websocket.receive_text()
        (connection,) = app.state.connections
        client.portal.call(end_expired, connection)
        assert closed(websocket) == (1008, "Unauthorized: Token expired")
    with client.websocket_connect("/ws/protected", headers=bearer()) as websocket:
        websocket.receive_text()
        (connection,) = app.state.connections
    assert not app.state.connections
    client.portal.call(connection.end, "forbidden", "Kicked")


def test_who_is_banned_is_out_until_unbanned(client: TestClient) -> None:
    mine, credentials = bearer(), {"username": "user1", "password": "password1"}
    with client.websocket_connect("/ws/chat", headers=mine) as tab:
        assert act(client, "admin", "user1/ban") == 200
        assert closed(tab) == (1008, "Banned")
    for path in ("/ws/chat", "/ws/protected"):
        with client.websocket_connect(path, headers=mine) as refused_tab:
            assert closed(refused_tab) == (1008, "Banned")
    for answer in (
        client.post("/rooms/lobby/messages", json={"text": "let me in"}, headers=mine),
        client.get("/me", headers=mine),
        client.post("/login", json=credentials),
    ):
        assert (answer.status_code, answer.json()) == (403, {"detail": "Banned"})
    wrong = client.post("/login", json=credentials | {"password": "wrong"})
    assert wrong.status_code == 401  # only who knows the password learns of the ban
    assert act(client, "admin", "user1/unban") == 200
    assert client.post("/login", json=credentials).status_code == 200
    assert client.get("/me", headers=mine).status_code == 200


def test_kicks_and_bans_are_seen_on_the_wire(serve: Callable[..., Server]) -> None:
    server = serve()
    mine, admins = server.token(), server.token("admin")
    for action, reason in [("kick", "Kicked"), ("ban", "Banned")]:
        websocket = server.connect(f"/ws/protected?token={mine}")
        websocket.recv(timeout=20)
        server.request(f"/users/user1/{action}", {}, Authorization=f"Bearer {admins}")
        with pytest.raises(ConnectionClosed) as error:
            websocket.recv(timeout=20)
        assert error.value.rcvd and (error.value.rcvd.code, error.value.rcvd.reason) == (
            1008,
            reason,
        )


@pytest.mark.usefixtures("people")
def test_an_admin_gives_somebody_a_new_password(client: TestClient) -> None:
    mine, url, body = token(), "/users/USER1/password", {"new": "another password"}
    with client.websocket_connect("/ws/protected", headers=bearer_of(mine)) as websocket:
        for who in ("member1", "moderator1", "user1"):
            assert client.put(url, json=body, headers=bearer(who)).status_code == 403
        admin = bearer("admin1")
        for name, new, status in (
            ("nobody", "another password", 404),
            ("a b", "another password", 404),
            ("user1", "1234567", 422),
            ("user1", "x" * 129, 422),
        ):
            answer = client.put(f"/users/{name}/password", json={"new": new}, headers=admin)
            assert answer.status_code == status
        assert client.get("/me", headers=bearer_of(mine)).status_code == 200
        answer = client.put(url, json=body, headers=admin)
        assert (answer.status_code, answer.content) == (204, b"")
        assert websocket.receive_text() == "Hello user1, you are authenticated!"
        assert closed(websocket) == (1008, "Unauthorized: Password changed")
    assert client.get("/me", headers=bearer_of(mine)).status_code == 401
    assert can_log_in(client, "another password") and not can_log_in(client, "password1")


# -- 9. Rooms ------------------------------------------------------------------------------


def message(id: int, text: str = "hi") -> dict[str, Any]:
    return {"type": "message", "id": id, "room": "lobby", "user": "a", "text": text}


def test_a_batch_is_encoded_once_for_all_its_readers() -> None:
    encodings: list[int] = []

    def encode(events: Any) -> list[bytes]:
        encodings.append(len(events))
        return [b"one", b"two"]

    room = lobby.Room("lobby")
    room.append([message(1), message(2)])
    wires = set()
    for _ in range(100):
        (batch,) = room.batches
        assert batch[encode].payloads == [b"one", b"two"]
        wires.add(id(batch[encode].wire))
    assert encodings == [2]
    assert len(wires) == 1


def test_a_message_is_encoded_once_however_many_hear_it(client: TestClient) -> None:
    encoded: list[str] = []

    def encode(events: Any) -> list[bytes]:
        events = list(events)
        encoded.extend(event["type"] for event in events)
        return lobby.as_json(events)

    with chat(client) as one, chat(client, "user2") as two, chat(client, "admin") as three:
        for connection in app.state.connections:
            connection.encode = encode
        one.say("hello", "m1")
        assert one.next("message") == two.next("message") == three.next("message")
    assert encoded.count("message") == 1


@pytest.mark.parametrize(
    ("encode", "count", "frames"),
    [
        (lobby.as_json, 2, 1),
        (lobby.as_plain, 2, 2),
        (lobby.as_plain, 50, 50),
        (lobby.as_plain, 0, 0),
        (lobby.as_json, 0, 0),
    ],
)
def test_lines_become_frames(encode: lobby.Encode, count: int, frames: int) -> None:
    batch = lobby.Batch([message(id, "x" * 70_000) for id in range(count)])
    seen = batch[encode]
    assert len(seen.payloads) == frames
    assert b"\n".join(seen.payloads) == b"\n".join(encode(batch.events))
    # RFC 6455, section 5.2: final text frames, their length in 64 bits, no mask.
    heads = [b"\x81\x7f" + len(payload).to_bytes(8, "big") for payload in seen.payloads]
    assert seen.wire == b"".join(h + p for h, p in zip(heads, seen.payloads, strict=True))


def test_a_late_client_gets_all_it_missed_as_one_frame(client: TestClient) -> None:
    with chat(client) as conversation, chat(client, "user2") as late:
        late.nothing_came()
        with held_up():
            for n in range(50):
                conversation.say(f"{n}", f"m{n}")
            conversation.send("nonsense")
            assert conversation.next("error")
        assert late.next("message")["text"] == "0"  # it was on its way before the others came
        assert not late.events
        assert late.next("message")["text"] == "1"
        assert [event["text"] for event in late.events] == [str(n) for n in range(2, 50)]


def test_a_log_keeps_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby, "WINDOW", 10)
    room = lobby.Room("lobby")
    for id in range(1, 26):
        room.append([message(id)])
    assert (len(room.batches), room.first) == (10, 15)
    assert [batch.events[0]["id"] for batch in room.batches] == list(range(16, 26))
    room.append([message(26), message(27)])  # as much as two of the others
    assert (len(room.batches), room.first) == (9, 17)


def test_long_texts_make_the_window_shorter() -> None:
    room = lobby.Room("lobby")
    for _ in range(100):
        room.append([{"type": "message", "text": "x" * 40_000}])
    assert 25 <= len(room.batches) <= 27  # a mebibyte
    room.append([{"type": "message", "text": "x" * 2_000_000}])
    assert len(room.batches) == 1  # whatever its size, the newest is there to be read


def test_who_joins_is_shown_with_the_role_of_that_moment(client: TestClient) -> None:
    """It may have changed since they came."""
    secret = token()
    with chat(client, "user2") as watcher:
        with chat(client, secret=secret):
            assert watcher.next() == joined("user1")
        watcher.next("left")
        with ExitStack() as stack:
            with held_up():
                watcher.say("is being stored", "m1")  # so both that follow are one batch
                watcher.nothing_came()
                change = {"type": "role", "folded": "user1", "role": "moderator", "by": "admin"}
                promotion = client.portal.start_task_soon(app.state.change, change)
                conversation = stack.enter_context(chat(client, quiet=False, secret=secret))
                assert conversation.next("presence")["users"]["user1"] == "member"
                watcher.nothing_came()
                assert len(app.state.manager.pending) == 2
            assert promotion.result(20)["role"] == "moderator"
            assert watcher.next("joined") == joined("user1", role="moderator")


def test_a_new_role_is_told_once_to_each_who_is_in_a_room_with_them(client: TestClient) -> None:
    """And to all of their own sockets, in a room or not; to nobody else."""
    register = {"type": "register", **new_person("stranger")}
    client.portal.call(app.state.change, register)
    event = {"type": "role", "user": "user1", "role": "moderator"}
    with (
        chat(client) as mine,
        chat(client, quiet=False) as my_other_tab,
        chat(client, "user2") as beside,
        chat(client, "stranger", "room=tea") as stranger,
    ):
        my_other_tab.send("leave", room="lobby")
        my_other_tab.send("nonsense")
        my_other_tab.next("error")
        for conversation in (mine, beside):  # they share two rooms
            conversation.send("join", room="cake")
            conversation.next("presence")
        mine.say("all of this was shown", "m1", room="cake")
        for conversation in (mine, beside):
            assert conversation.next("message")["mid"] == "m1"
        my_other_tab.nothing_came()
        assert act(client, "admin", "user1", role="moderator") == 200
        for conversation in (mine, beside, my_other_tab):
            assert conversation.next() == event
            conversation.nothing_came()
        stranger.nothing_came()
        beside.send("join", room="lobby")
        users = {"user1": "moderator", "user2": "member"}
        assert beside.next("presence")["users"] == users


def test_a_new_role_is_told_to_somebody_in_no_room(client: TestClient) -> None:
    with chat(client) as conversation:
        conversation.send("leave", room="lobby")
        conversation.nothing_came()
        assert act(client, "admin", "user1", role="admin") == 200
        assert conversation.next() == {"type": "role", "user": "user1", "role": "admin"}
        conversation.nothing_came()


def test_a_person_joins_and_leaves_once_however_many_sockets(client: TestClient) -> None:
    with chat(client, "user2") as watcher:
        with chat(client) as first:
            assert watcher.next()["type"] == "joined"
            with chat(client) as second:
                second.say("two tabs", "m1")
                assert watcher.next()["text"] == "two tabs"
            first.say("one tab", "m2")
            assert watcher.next()["text"] == "one tab"
        assert watcher.next() == {"type": "left", "room": "lobby", "user": "user1"}


def test_presence_agrees_with_a_model_however_tabs_come_and_go(client: TestClient) -> None:
    rng = random.Random(11)
    tabs: dict[str, list[Any]] = {"user1": [], "user2": []}
    expected: list[tuple[str, str]] = []
    with chat(client, "admin") as watcher, ExitStack() as all_tabs:
        for _ in range(1000):
            user = rng.choice(list(tabs))
            if tabs[user] and rng.random() < len(tabs[user]) / 6:
                tab = tabs[user].pop(rng.randrange(len(tabs[user])))
                tab.close()
                expected += [] if tabs[user] else [("left", user)]
            else:
                expected += [] if tabs[user] else [("joined", user)]
                tab = ExitStack()
                tab.enter_context(chat(client, user))
                all_tabs.push(tab)
                tabs[user].append(tab)
        events = [watcher.next() for _ in expected]
        assert [(event["type"], event["user"]) for event in events] == expected
        watcher.nothing_came()
        here = {user: "member" for user, open_tabs in tabs.items() if open_tabs}
        here["admin"] = "admin"
        watcher.send("join", room="lobby")
        assert watcher.next("presence")["users"] == here


def test_a_leaver_is_said_to_leave_after_their_last_message(client: TestClient) -> None:
    mine = token()
    with chat(client, "user2") as watcher:
        with ExitStack() as leaving:
            conversation = leaving.enter_context(chat(client, secret=mine))
            assert watcher.next()["type"] == "joined"
            with held_up():
                conversation.say("last words", "m1")
                conversation.nothing_came()
                leaving.close()
                watcher.nothing_came()
        assert [watcher.next()["type"] for _ in range(2)] == ["message", "left"]


def test_a_room_is_freed_when_its_last_follower_leaves(client: TestClient) -> None:
    with chat(client, query="room=tea") as conversation:
        assert set(app.state.manager.rooms) == {"tea"}
        conversation.send("leave", room="tea")
        conversation.nothing_came()
        assert not app.state.manager.rooms
    assert client.get("/healthz").json() == {"status": "ok", "online": 0, "rooms": 0}


def test_all_followers_see_one_order(client: TestClient) -> None:
    with chat(client) as one, chat(client, "user2") as two:
        for n in range(50):
            one.say(f"one {n}", f"a{n}")
            two.say(f"two {n}", f"b{n}")
        seen_by_one = [one.next("message")["id"] for _ in range(100)]
        seen_by_two = [two.next("message")["id"] for _ in range(100)]
    assert seen_by_one == seen_by_two == sorted(seen_by_one)


def test_the_sockets_of_one_person_are_limited(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_SOCKETS_PER_USER", "1")
    with Entered(app) as client, chat(client), chat(client, "user2"):
        assert refused(client, f"/ws/chat?token={token()}") == (1013, "Too many sockets")


def test_one_who_reads_no_answers_is_not_listened_to(serve: Callable[..., Server]) -> None:
    """Requests for 800 MB of answers that are not read: what they cost is bounded."""
    server = serve()
    writer = server.chat(server.token())
    for n in range(200):
        writer.say("x" * 4000, f"m{n}")
    secret = server.token("user2")
    raw = server.raw_socket(
        "/ws/chat", "Sec-WebSocket-Protocol: lobby.v1", f"Authorization: Bearer {secret}"
    )
    raw.settimeout(2)
    request = frame(1, b'{"type":"history","room":"lobby","limit":200}')
    before = memory(server.process.pid)
    with pytest.raises(TimeoutError):  # the server has stopped to read
        for _ in range(100_000):
            raw.sendall(request * 20)
    assert memory(server.process.pid) - before < 50 * 2**20
    raw.close()


def test_one_who_reads_late_gets_every_answer(serve: Callable[..., Server]) -> None:
    """Of 24 megabytes of answers, no more is made than its line takes; so it is not too slow."""
    server = serve()
    writer = server.chat(server.token())
    for n in range(200):
        writer.say("x" * 4000, f"m{n}")
    while writer.next("message")["mid"] != "m199":
        pass
    protocols = ["lobby.v1", f"bearer.{server.token('user2')}"]
    with server.connect("/ws/chat", subprotocols=protocols, max_queue=1) as websocket:
        late = Chat(lambda: str(websocket.recv(timeout=20)), websocket.send)
        for _ in range(30):
            late.send("history", room="lobby", limit=200)
        writer.next("joined")
        for n in range(60):  # with each turn of this, one more request could be obeyed
            writer.say("meanwhile", f"n{n}")
            assert writer.next("message")["mid"] == f"n{n}"
        late.next("presence")
        for _ in range(30):
            assert len(late.next("history")["messages"]) == 200


def test_one_who_reads_late_gets_all_that_was_written(serve: Callable[..., Server]) -> None:
    """More than buffers hold, less than the window; and nobody writes any more."""
    server = serve()
    writer, secret = server.chat(server.token()), server.token("user2")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    protocols, mids = ["lobby.v1", f"bearer.{secret}"], [f"m{n}" for n in range(100)]
    with server.connect("/ws/chat", subprotocols=protocols, sock=raw, max_queue=1) as websocket:
        late = Chat(lambda: str(websocket.recv(timeout=20)), websocket.send)
        writer.next("joined")
        for mid in mids:
            writer.say("😀" * 4000, mid)  # 1.6 megabytes in all
            assert writer.next("message")["mid"] == mid
        assert [late.next("message")["mid"] for _ in mids] == mids


def test_one_who_reads_nothing_is_cut_off_by_private_messages_too(
    serve: Callable[..., Server],
) -> None:
    """They are no part of the log of a room that it follows, so they wait for it alone."""
    server = serve()
    writer, secret = server.chat(server.token()), server.token("user2")
    stalled = server.raw_socket("/ws/chat", f"Authorization: Bearer {secret}", receive_buffer=4096)
    flood(writer, room="@user1+user2")
    server.wait_for_log(r"(disconnected 'user2')")
    assert "closed '/ws/chat': 1013 Too slow" in server.log.read_text()
    stalled.close()


def test_a_bug_in_writing_to_one_client_stops_nobody_else(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither those who follow the same room, nor who waits for what becomes of a change."""

    def fail(events: Any) -> list[bytes]:
        raise ZeroDivisionError

    told: list[Any] = []
    message = lobby.new_message("lobby", lobby.Bearer("user1", "", "", 0), "hello", None)
    with chat(client) as one, chat(client, "user2"), chat(client, "admin") as other:
        (unlucky,) = app.state.manager.clients["user2"]
        unlucky.encode = fail
        client.portal.call(app.state.manager.post, message, told.append)
        assert act(client, "admin", "nobody/kick") == 404  # is applied after it
        unlucky.encode = lobby.as_json
        assert [outcome["text"] for outcome in told] == ["hello"]
        assert one.next("message") == other.next("message") == told[0]
    assert "ZeroDivisionError" in caplog.text


def test_a_bug_in_an_answer_does_not_stop_the_committer(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(outcome: Any) -> None:
        raise ZeroDivisionError

    message = lobby.new_message("lobby", lobby.Bearer("user1", "", "", 0), "hello", None)
    with chat(client) as conversation:
        client.portal.call(app.state.manager.post, message, fail)
        assert conversation.next()["text"] == "hello"
        conversation.say("and on", "m1")
        assert conversation.next()["text"] == "and on"
    assert "ZeroDivisionError" in caplog.text


def test_who_is_ended_is_told_nothing_more(client: TestClient) -> None:
    """It would come after a gap, if the end is for being too slow."""

    def end_and_tell(connection: lobby.Client) -> None:
        connection.end("unavailable", "Too slow")
        connection.tell({"type": "text", "text": "too late"})

    with chat(client) as conversation:
        (connection,) = app.state.connections
        client.portal.call(end_and_tell, connection)
        with pytest.raises(WebSocketDisconnect) as error:
            conversation.next()
    assert (error.value.code, error.value.reason) == (1013, "Too slow")


def memory(pid: int) -> int:
    """Bytes in memory of a process, as Linux tells; 0 elsewhere."""
    status = Path(f"/proc/{pid}/status")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) * 2**10 if status.exists() else 0


# -- 10. The chat --------------------------------------------------------------------------


def test_welcome_history_presence_and_joined_come_first(client: TestClient) -> None:
    client.post("/rooms/lobby/messages", json={"text": "before"}, headers=bearer("user2"))
    with chat(client, quiet=False) as conversation:
        welcome, history, presence, came = (conversation.next() for _ in range(4))
    assert welcome.pop("expires_at") == pytest.approx(time.time() + 3600, abs=60)
    assert welcome == {
        "type": "welcome",
        "user": "user1",
        "role": "member",
        "epoch": app.state.storage.epoch,
        "rooms": [],
    }
    assert [event["text"] for event in history.pop("messages")] == ["before"]
    assert history == {"type": "history", "room": "lobby", "more": False, "complete": True}
    assert presence == {"type": "presence", "room": "lobby", "users": {"user1": "member"}}
    assert came == joined("user1")


def test_a_message_reaches_everybody_in_the_room(client: TestClient) -> None:
    with chat(client) as one, chat(client, "user2") as two:
        one.say(" Cafe\u0301\r\n你好 😀 ", "m1")
        mine, theirs = one.next("message"), two.next("message")
        assert mine == theirs
        assert mine.pop("at") == pytest.approx(time.time(), abs=60)
        assert mine == {
            "type": "message",
            "id": mine["id"],
            "room": "lobby",
            "user": "user1",
            "text": "Café\n你好 😀",
            "mid": "m1",
        }


def test_the_longest_text_loses_nothing_in_its_longest_form(client: TestClient) -> None:
    """This letter is three characters when taken apart, and one when put together."""
    letter = "e\u0302\u0301"
    with chat(client) as conversation:
        conversation.say(letter * 4000, "m1")
        assert conversation.next()["text"] == "\u1ebf" * 4000
        conversation.say(letter * 4001, "m2")
        assert conversation.next()["code"] == "too_long"
    assert lobby.clean_name(letter * 32) == "\u1ebf" * 32
    with pytest.raises(ValueError, match="1 to 32"):
        lobby.clean_name(letter * 33)


def test_a_socket_is_told_to_come_back_when_the_database_fails(client: TestClient) -> None:
    headers = bearer()
    app.state.storage.writer.execute("ALTER TABLE people RENAME TO lost")
    assert client.get("/me", headers=headers).status_code == 503
    code, _ = refused(client, "/ws/chat", headers=headers)
    assert code == 1013


def test_one_socket_follows_many_rooms(client: TestClient) -> None:
    with chat(client) as conversation:
        conversation.send("join", room="tea")
        assert [conversation.next()["type"] for _ in range(3)] == ["history", "presence", "joined"]
        conversation.say("in tea", "m1", room="tea")
        assert conversation.next()["room"] == "tea"
        conversation.say("in lobby", "m2")
        assert conversation.next()["room"] == "lobby"
        conversation.send("leave", room="tea")
        conversation.say("seen though I left", "m3", room="tea")
        assert conversation.next()["mid"] == "m3"
        with chat(client, "user2", "room=tea") as other:
            other.say("not followed", "m1", room="tea")
            other.next("message")
            conversation.nothing_came()


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("nonsense", "invalid"),
        ("[]", "invalid"),
        ("{}", "invalid"),
        ('{"type":"dance"}', "invalid"),
        ('{"type":"message","room":"lobby","text":"no mid"}', "invalid"),
        ('{"type":"message","room":"lobby","text":7,"mid":"m"}', "invalid"),
        ('{"type":"message","room":"lobby","text":"x","mid":""}', "invalid"),
        ('{"type":"message","room":"lobby","text":"x","mid":"%s"}' % ("m" * 65), "invalid"),
        ('{"type":"message","room":"lobby","text":" \\n ","mid":"m"}', "invalid"),
        ('{"type":"message","room":"lobby","text":"a\\u0000b","mid":"m"}', "invalid"),
        ('{"type":"message","room":"lobby","text":"a\\rb","mid":"m"}', "invalid"),
        ('{"type":"message","room":"lobby","text":"a\\u202eb","mid":"m"}', "invalid"),
        ('{"type":"message","room":"lobby","text":"a\\ud800b","mid":"m"}', "invalid"),
        ('{"type":"message","room":"lobby","text":"%s","mid":"m"}' % ("x" * 4001), "too_long"),
        ('{"type":"message","room":"no such room","text":"x","mid":"m"}', "unknown_room"),
        ('{"type":"join","room":"@a+b"}', "unknown_room"),
        ('{"type":"join","room":"tea","after":-1}', "invalid"),
        ('{"type":"join","room":"tea","after":99999999999999999999}', "invalid"),
        ('{"type":"history","room":"lobby","limit":201}', "invalid"),
        ("[" * 60_000, "invalid"),
    ],
)
def test_bad_input_is_answered_and_nobody_else_notices(
    client: TestClient, frame: str, code: str
) -> None:
    with chat(client) as conversation, chat(client, "user2") as other:
        conversation.next("joined")
        conversation.send_text(frame)
        error = conversation.next()
        assert (error["type"], error["code"]) == ("error", code)
        if '"mid":"m"' in frame and "ud800" not in frame:
            assert error["mid"] == "m"
        conversation.say("x" * 4000, "good")
        assert other.next()["mid"] == "good"


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"type": "typing", "room": "tea"}, "forbidden"),
        ({"type": "join", "room": "no such room"}, "unknown_room"),
        ({"type": "join", "room": "tea", "after": -1}, "invalid"),
        ({"type": "history", "room": "tea", "limit": 0}, "invalid"),
        ({"type": "message", "room": "Tea", "text": "", "mid": "m"}, "invalid"),
        ({"type": "message", "room": "tea", "text": "x" * 4001, "mid": "m"}, "too_long"),
        ({"type": "message", "room": "tea", "text": "it was deleted", "mid": "m1"}, "forbidden"),
    ],
)
def test_an_error_names_the_room_that_it_is_about(
    client: TestClient, event: dict[str, Any], code: str
) -> None:
    body = {"text": "it was deleted", "mid": "m1"}
    id = client.post("/rooms/tea/messages", json=body, headers=bearer()).json()["id"]
    assert client.delete(f"/rooms/tea/messages/{id}", headers=bearer()).status_code == 204
    with chat(client) as conversation:
        conversation.send(**event)
        error = conversation.next()
        assert (error["type"], error["code"], error["room"]) == ("error", code, event["room"])
        assert error.get("mid") == event.get("mid")


def test_text_of_the_greatest_length_fits_a_frame(serve: Callable[..., Server]) -> None:
    server = serve()
    conversation = server.chat(server.token())
    conversation.say("😀" * 4000, "m1")  # as JSON escapes: 48,000 bytes
    assert conversation.next("message")["text"] == "😀" * 4000


def test_a_resend_is_answered_to_its_sender_only_with_the_original(client: TestClient) -> None:
    with chat(client) as one, chat(client, "user2") as two:
        one.next("joined")
        one.say("hello", "m1")
        original = one.next()
        assert two.next() == original
        one.say("hello again", "m1")
        assert one.next() == original
        two.nothing_came()
        two.say("the same mid, another person", "m1")
        assert two.next()["id"] == one.next()["id"] > original["id"]


def test_the_answer_to_a_resend_does_not_overtake_the_room(client: TestClient) -> None:
    """What comes after an id has a greater one; or resuming after it would leave a gap."""
    with chat(client) as one, chat(client, "user2") as two:
        one.next("joined")
        one.say("original", "m1")
        original = one.next()["id"]
        two.next("message")
        with held_up():
            for n in range(5):
                two.say(f"{n}", f"m{n}")
            two.nothing_came()
            one.say("last", "m2")
            one.say("last", "m2")
            one.nothing_came()
        ids = [one.next("message")["id"] for _ in range(7)]
    assert ids == sorted(ids)
    assert ids[0] > original


def test_the_answer_to_a_resend_does_not_overtake_what_another_room_has(client: TestClient) -> None:
    """Its line was given what came in the first room, and takes no more for the moment."""
    with chat(client) as conversation:
        conversation.send("join", room="tea")
        conversation.next("joined")
        with held_up():
            conversation.say("is being stored", "m0")  # so all that follows is one batch
            conversation.nothing_came()
            conversation.say("in the lobby", "m1")
            for text, mid in (("first", "m2"), ("last", "m3"), ("last", "m3")):
                conversation.say(text, mid, room="tea")
            conversation.nothing_came()
        texts = [conversation.next()["text"] for _ in range(5)]
    assert texts == ["is being stored", "in the lobby", "first", "last", "last"]


def test_resending_everything_stores_nothing_twice(database: Path) -> None:
    """Twice in one batch, again later, and again after a restart."""
    for _ in range(2):
        with Entered(app) as client, chat(client) as conversation:
            for _ in range(2):
                for n in range(20):
                    conversation.say(f"text {n}", f"m{n}")
                    conversation.say(f"text {n}", f"m{n}")
            for _ in range(80):
                conversation.next("message")
    with closing(sqlite3.connect(database)) as db:
        texts = [text for (text,) in db.execute("SELECT text FROM messages ORDER BY id")]
    assert texts == [f"text {n}" for n in range(20)]


def test_http_sends_and_reads_messages(client: TestClient) -> None:
    url = "/rooms/lobby/messages"
    with chat(client, "user2") as watcher:
        answer = client.post(url, json={"text": "by HTTP", "mid": "m1"}, headers=bearer())
        assert answer.status_code == 201
        assert watcher.next() == answer.json()
        again = client.post(url, json={"text": "by HTTP", "mid": "m1"}, headers=bearer())
        assert (again.status_code, again.json()) == (200, answer.json())
        watcher.nothing_came()
    for n in range(5):
        client.post(url, json={"text": f"{n}"}, headers=bearer())

    def texts(query: str) -> tuple[list[str], bool]:
        page = client.get(f"{url}?{query}", headers=bearer()).json()
        return [message["text"] for message in page["messages"]], page["more"]

    ids = [message["id"] for message in client.get(url, headers=bearer()).json()["messages"]]
    assert texts("") == (["by HTTP", "0", "1", "2", "3", "4"], False)
    assert texts("limit=2") == (["3", "4"], True)
    assert texts(f"limit=2&before={ids[3]}") == (["0", "1"], True)
    assert texts(f"limit=2&after={ids[0]}") == (["0", "1"], True)
    assert texts(f"after={ids[3]}") == (["3", "4"], False)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=x", "before=-1", f"after={2**63}", "before=1e3"]
)
def test_a_wrong_page_is_refused(client: TestClient, query: str) -> None:
    answer = client.get(f"/rooms/lobby/messages?{query}", headers=bearer())
    assert answer.status_code == 422


def test_the_chat_over_http_wants_a_token(client: TestClient) -> None:
    for method, path in [
        ("GET", "/me"),
        ("GET", "/rooms"),
        ("GET", "/rooms/lobby/messages"),
        ("POST", "/rooms/lobby/messages"),
        ("GET", "/users"),
        ("POST", "/logout"),
    ]:
        answer = client.request(method, path, json={"text": "x"} if method == "POST" else None)
        assert answer.status_code == 401, path


@pytest.mark.parametrize("at_a_time", [1, 3, 500])
def test_search_takes_its_text_literally(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(lobby, "SEARCHED", at_a_time)
    texts = [
        "50% off",
        "500 off",
        "snake_case",
        "snakeXcase",
        r"back\slash",
        "Tea? TEA!",
        "茶水",
        "Äpfel und Straße",
        "it's",
    ]
    for text in texts:
        post(client, text)
    for q, found in [
        ("50%", ["50% off"]),
        ("%", ["50% off"]),
        ("_", ["snake_case"]),
        ("\\", [r"back\slash"]),
        ("tea", ["Tea? TEA!"]),
        ("茶", ["茶水"]),
        ("ÄPFEL", ["Äpfel und Straße"]),
        ("'", ["it's"]),
        ("off", ["50% off", "500 off"]),
        ("", texts),
        ("no such text", []),
    ]:
        assert texts_of(client, q=q) == found
    assert texts_of(client, q="off", limit=1) == ["500 off"]
    assert texts_of(client, q="off", before=2) == ["50% off"]
    assert texts_of(client, q="off", after=0, limit=1) == ["50% off"]
    assert texts_of(client, q="off", after=1) == ["500 off"]
    assert texts_of(client, room="tea", q="off") == []
    assert texts_of(client, q="x" * 201) == 422


def test_a_message_is_stored_and_shown_in_the_midst_of_a_search(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "SEARCHED", 1)
    for n in range(60):
        post(client, f"{n}")
    storage, manager = app.state.storage, app.state.manager
    message = lobby.new_message("lobby", lobby.Bearer("user2", "", "", 0), "meanwhile", "m1")
    shown: list[int] = []

    def trace(statement: str) -> None:
        """Runs in the loop, before each page of the search."""
        if "FROM messages" in statement:
            shown.append(storage.shown)
            if len(shown) == 3:
                manager.post(message)
            elif len(shown) == 30:
                storage.thread.submit(int).result(20)  # stored, after some turns of the loop

    headers = bearer()
    with chat(client, "user2") as conversation:
        storage.reader.set_trace_callback(trace)
        page = client.get("/rooms/lobby/messages?q=x", headers=headers)
        storage.reader.set_trace_callback(None)
        assert page.json() == {"messages": [], "more": False}
        assert conversation.next()["text"] == "meanwhile"
    assert len(shown) == 60
    assert (shown[0], shown[-1]) == (60, 61)


def test_one_searches_at_a_time_and_others_wait(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "SEARCHED", 1)
    ids = {room: [post(client, f"tea {n}", room=room) for n in range(9)] for room in ("a", "b")}
    find = app.state.storage.find

    async def search_both() -> list[Any]:
        return await asyncio.gather(*(find(f"of {r}", "tea", r, 9, 999, None) for r in ids))

    with traced(app.state.storage.reader) as statements:
        pages = client.portal.call(search_both)
    assert [[event["id"] for event in page["messages"]] for page in pages] == [*ids.values()]
    rooms = [found[1] for one in statements if (found := re.search(r"room = '(\w)'", one))]
    assert [room for room, _ in itertools.groupby(rooms)] == ["a", "b"]


# Private conversations.


def test_a_private_message_reaches_all_sockets_of_both_and_nobody_else(client: TestClient) -> None:
    with (
        chat(client) as mine,
        chat(client, query="room=tea") as my_other,
        chat(client, "user2") as theirs,
        chat(client, "admin") as admin,
    ):
        for conversation in (mine, theirs):
            conversation.send("leave", room="lobby")
        mine.send("message", to="USER2", text="hi", mid="m1")
        expected = {"room": "@user1+user2", "user": "user1", "text": "hi", "mid": "m1"}
        for conversation in (mine, my_other, theirs):
            event = conversation.next("message")
            assert {key: event[key] for key in expected} == expected
        theirs.send("message", room="@user2+user1", text="hello", mid="m2")  # either order
        assert mine.next("message") == my_other.next("message") == theirs.next("message")
        admin.next("left"), admin.next("left")
        for conversation in (mine, my_other, theirs, admin):
            conversation.nothing_came()
        mine.send("message", to="user2", text="hi", mid="m1")
        assert mine.next() == event  # a resend: to its sender alone
        for conversation in (my_other, theirs):
            conversation.nothing_came()


def test_who_follows_a_private_conversation_hears_everything_once(client: TestClient) -> None:
    with chat(client) as mine, chat(client, "user2") as theirs:
        mine.next("joined")
        mine.send("join", room="@user1+user2")
        assert [mine.next()["type"] for _ in range(3)] == ["history", "presence", "joined"]
        for sender in (mine, theirs):
            sender.send("message", room="@user1+user2", text="hi", mid="m1")
            assert mine.next() == theirs.next()
        theirs.send("typing", room="@user1+user2")
        assert mine.next() == theirs.next()
        for conversation in (mine, theirs):
            conversation.nothing_came()


def test_a_private_conversation_is_stored_listed_and_resumed(client: TestClient) -> None:
    with chat(client) as mine:
        for n in range(3):
            mine.send("message", to="user2", text=f"for later {n}", mid=f"m{n}")
        first, *_ = [mine.next("message")["id"] for _ in range(3)]
    with chat(client, "user2", quiet=False) as theirs:
        assert theirs.next("welcome")["rooms"] == ["@user1+user2"]
        theirs.send("join", room="@user1+user2", after=first)
        theirs.next("history")  # the lobby's
        missed = theirs.next("history")
        assert [event["text"] for event in missed["messages"]] == ["for later 1", "for later 2"]
        theirs.send("history", room="@user1+user2", limit=1)
        assert theirs.next("history")["messages"] == missed["messages"][-1:]
    rooms = client.get("/rooms", headers=bearer("user2")).json()
    assert rooms == [
        {"room": "@user1+user2", "online": 0, "last_id": first + 2},
        {"room": "lobby", "online": 0, "last_id": 0},
    ]
    everything = [f"for later {n}" for n in range(3)]
    assert texts_of(client, "@user1+user2") == texts_of(client, "@USER2+user1") == everything
    assert texts_of(client, "@user1+user2", q="later 1") == ["for later 1"]
    assert ids_after(client, first, room="@user1+user2")[0] == [first + 1, first + 2]


@pytest.mark.parametrize("to", ["nobody", "b@d name", "", "user2+admin", "@user2", "\u0000"])
def test_to_somebody_who_does_not_exist_is_an_error(client: TestClient, to: str) -> None:
    with chat(client) as conversation:
        conversation.send("message", to=to, text="hi", mid="m1")
        error = conversation.next()
        assert (error["code"], error["mid"]) == ("unknown_room", "m1")
        conversation.send("message", to="user2", room="lobby", text="hi", mid="m2")
        assert conversation.next()["code"] == "invalid"


PRIVATE = ["@user1+user2", "@user2+user1", "@USER1+user2", "@user1+nobody", "@user1+user2+admin"]


@pytest.mark.parametrize("room", PRIVATE)
def test_nobody_else_can_read_join_list_or_find_a_private_conversation(
    client: TestClient, room: str
) -> None:
    """Not an admin either; and what others have is answered like what nobody has."""
    secret = post(client, "secret", room="@user1+user2")
    unknown = {"type": "error", "code": "unknown_room", "message": "No such room or person"}
    unknown["room"] = room
    with (
        chat(client, query="room=@user1%2Buser2") as mine,
        chat(client, "user2") as theirs,
        chat(client, "admin", quiet=False) as admin,
    ):
        assert admin.next("welcome")["rooms"] == []
        admin.next("joined")
        for event in (
            {"type": "join", "room": room},
            {"type": "join", "room": room, "after": 0},
            {"type": "leave", "room": room},
            {"type": "typing", "room": room},
            {"type": "history", "room": room},
        ):
            admin.send(**event)
            assert admin.next() == unknown
        admin.say("let me in", "m1", room=room)
        assert admin.next() == unknown | {"mid": "m1"}
        mine.say("between us", "m2", room="@user1+user2")
        assert theirs.next("message") == mine.next("message")
        admin.nothing_came()
        mine.nothing_came()
        headers = bearer("admin")
        url = f"/rooms/{room}/messages"
        for answer in (
            client.get(url, headers=headers),
            client.get(url, params={"q": "secret"}, headers=headers),
            client.post(url, json={"text": "hi"}, headers=headers),
            client.delete(f"{url}/{secret}", headers=headers),
        ):
            assert (answer.status_code, answer.json()["detail"]) == (404, unknown["message"])
        assert client.delete(f"/rooms/lobby/messages/{secret}", headers=headers).status_code == 404
        assert texts_of(client, "lobby", user="admin") == []
        for path in ("/rooms", "/users"):
            assert "user1+user2" not in client.get(path, headers=headers).text
            assert "@user1+user2" in client.get(path, headers=bearer("user2")).text
    with client.websocket_connect(
        f"/ws/chat?after=0&room={room.replace('+', '%2B')}", headers=headers
    ) as plain:
        assert plain.receive_text() == f"Error: {unknown['message']}"


def test_in_a_url_the_plus_of_a_conversation_may_stand_as_it_is(client: TestClient) -> None:
    with chat(client, query="room=@user1+user2", quiet=False) as conversation:
        assert conversation.next("history")["room"] == "@user1+user2"


def test_private_messages_in_plain_text(client: TestClient) -> None:
    with (
        client.websocket_connect("/ws/chat", headers=bearer()) as one,
        client.websocket_connect("/ws/chat", headers=bearer("user2")) as two,
        chat(client, "admin") as admin,
    ):
        assert one.receive_text() == "user1 joined the chat!"
        one.send_text("/msg USER2  hi,\nyou two")
        while (line := two.receive_text()).endswith("joined the chat!"):
            pass
        assert line == "[private] user1: hi,\n    you two"
        for wrong in ("/msg", "/msg user2", "/msg nobody hi", "/msg user2 \x00"):
            two.send_text(wrong)
            assert two.receive_text().startswith("Error: ")
        two.send_text("not private")
        assert two.receive_text() == "user2: not private"
        assert admin.next("message")["text"] == "not private"
        while (line := one.receive_text()).endswith("joined the chat!"):
            pass
        assert line == "[private] user1: hi,\n    you two"


# Typing, and deletion.


def test_typing_is_announced_but_not_stored(client: TestClient) -> None:
    with chat(client) as one, chat(client, "user2") as two:
        for _ in range(50):  # more than anybody can use
            one.send("typing", room="lobby")
        one.say("done", "m1")
        events = []
        while not events or events[-1]["type"] != "message":
            events.append(two.next())
        assert events[0] == {"type": "typing", "room": "lobby", "user": "user1"}
        assert 1 < len(events) < 10
        one.send("typing", room="tea")  # where they are not
        assert one.next("error")["code"] == "forbidden"
    assert texts_of(client) == ["done"]


def delete(client: TestClient, id: int, user: str = "user1", room: str = "lobby") -> int:
    url = f"/rooms/{room}/messages/{id}"
    return int(client.delete(url, headers=bearer(user)).status_code)


def test_a_message_is_deleted_by_its_author_or_a_moderator(client: TestClient) -> None:
    with chat(client, "user2") as watcher:
        ids = [post(client, f"{n}") for n in range(3)]
        for id in ids:
            assert watcher.next()["id"] == id
        assert delete(client, ids[0], "user2") == 403
        assert delete(client, ids[0], room="tea") == 404
        watcher.nothing_came()
        assert delete(client, ids[0]) == 204
        assert watcher.next() == {"type": "deleted", "room": "lobby", "id": ids[0]}
        act(client, "admin", "user2", role="moderator")
        assert watcher.next() == {"type": "role", "user": "user2", "role": "moderator"}
        assert delete(client, ids[1], "user2") == 204
        assert watcher.next() == {"type": "deleted", "room": "lobby", "id": ids[1]}
        assert delete(client, ids[1]) == delete(client, 99) == 404
        watcher.nothing_came()
        watcher.send("history", room="lobby")
        assert [event["text"] for event in watcher.next()["messages"]] == ["2"]
    assert texts_of(client) == ["2"]


@pytest.mark.parametrize("length", [50, 4000])
def test_a_deleted_text_is_gone_from_the_disk(
    client: TestClient, database: Path, length: int
) -> None:
    """From the table at once; from the files, unused pages too, once the journal is read in."""
    secret = secrets.token_urlsafe(length)[:length]
    storage = app.state.storage

    def found() -> bool:
        """After a checkpoint: in any of the files."""
        checkpoint = storage.thread.submit(
            lambda: storage.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        )
        assert checkpoint.result(20)[0] == 0  # nobody was in its way
        files = [database.with_name(f"chat.db{end}") for end in ("", "-wal", "-shm")]
        return any(secret[-40:].encode() in file.read_bytes() for file in files if file.exists())

    id = post(client, secret)
    assert found()
    assert delete(client, id) == 204
    assert [tuple(row) for row in storage.query("SELECT text FROM messages")] == [("",)]
    assert not found()


def test_a_deleted_message_does_not_come_back_by_a_resend(client: TestClient) -> None:
    url, message = "/rooms/lobby/messages", {"text": "regret", "mid": "m1"}
    first = client.post(url, json=message, headers=bearer()).json()
    assert delete(client, first["id"]) == 204
    assert client.post(url, json=message, headers=bearer()).status_code == 403
    with chat(client) as conversation:
        conversation.say("regret", "m1")
        error = conversation.next()
        assert (error["code"], error["mid"]) == ("forbidden", "m1")
    assert texts_of(client) == []


def test_a_deletion_is_heard_of_by_who_was_away(client: TestClient) -> None:
    ids = [post(client, f"{n}") for n in range(4)]
    delete(client, ids[0])
    last = post(client, "4")
    with chat(client, "user2", f"after={ids[2]}", quiet=False) as conversation:
        conversation.next("history")
        assert conversation.next() == {"type": "deleted", "room": "lobby", "id": ids[0]}
        assert conversation.next()["type"] == "presence"
    with chat(client, "user2", f"after={last}", quiet=False) as conversation:
        conversation.next("history")
        assert conversation.next()["type"] == "presence"  # who has read on has heard of it


def test_deleting_is_limited_like_sending(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is anything to be deleted or not."""
    monkeypatch.setenv("CHAT_RATE", "1")
    with Entered(app) as client:
        id = post(client, "regret")
        assert [delete(client, one) for one in (id, id, id, 99)] == [204, 404, 429, 429]


def test_rooms_and_people_are_listed(client: TestClient) -> None:
    client.post("/rooms/tea/messages", json={"text": "hi"}, headers=bearer())
    with chat(client), chat(client, "admin", "room=cake"), chat(client, "admin"):
        assert client.get("/rooms", headers=bearer()).json() == [
            {"room": "tea", "online": 0, "last_id": 1},
            {"room": "cake", "online": 1, "last_id": 0},
            {"room": "lobby", "online": 2, "last_id": 0},
        ]
        assert client.get("/users", headers=bearer()).json() == [
            {"username": "admin", "role": "admin", "rooms": ["cake", "lobby"]},
            {"username": "user1", "role": "member", "rooms": ["lobby"]},
        ]
        assert client.get("/healthz").json() == {"status": "ok", "online": 2, "rooms": 2}


def test_rooms_are_listed_in_pages_by_when_they_were_written(client: TestClient) -> None:
    for room in ("a", "b", "@user1+user2", "c", "a"):
        post(client, "hi", room=room)

    def listed(query: str, user: str = "user1") -> list[tuple[str, int]]:
        rooms = client.get(f"/rooms?{query}", headers=bearer(user)).json()
        return [(room["room"], room["last_id"]) for room in rooms]

    with chat(client, "admin", "room=zoo"):
        unwritten = [("lobby", 0), ("zoo", 0)]
        newest, older = [("a", 5), ("c", 4)], [("@user1+user2", 3), ("b", 2)]
        assert listed("") == newest + older + unwritten
        assert listed("", "admin") == [*newest, ("b", 2), *unwritten]
        assert listed("limit=2") == newest
        assert listed("limit=2&before=4") == older
        assert listed("limit=3&before=4") == older + unwritten[:1]
        assert listed("limit=2&before=2") == unwritten
        assert listed("before=0") == []
        post(client, "hi")
        assert listed("limit=1") == [("lobby", 6)]
    for wrong in ("limit=0", "limit=201", "before=-1", f"before={2**63}"):
        assert client.get(f"/rooms?{wrong}", headers=bearer()).status_code == 422


@pytest.mark.usefixtures("many_rooms")
def test_any_number_of_rooms_is_listed_whole_and_once(client: TestClient) -> None:
    headers, before, pages = bearer(), 2**63 - 1, []
    while page := client.get(f"/rooms?limit=200&before={before}", headers=headers).json():
        pages.append(page)
        before = page[-1]["last_id"]
    assert len(pages) == 101
    expected = ["@user1+user2", *(f"r{n}" for n in range(20_000, 0, -1)), "lobby"]
    assert [room["room"] for page in pages for room in page] == expected


@pytest.mark.usefixtures("many_rooms")
@pytest.mark.parametrize("start", ["r1", "R19", "r199", "r1999", "@"])
def test_rooms_are_found_whole_and_once_by_how_they_begin(client: TestClient, start: str) -> None:
    headers, before, found = bearer(), 2**63 - 1, []
    params: dict[str, Any] = {"q": start, "limit": 200}
    while page := client.get("/rooms", params=params | {"before": before}, headers=headers).json():
        assert len(page) <= 200
        found += [room["room"] for room in page]
        before = page[-1]["last_id"]
    all_of_mine = ["@user1+user2", *(f"r{n}" for n in range(20_000, 0, -1))]
    assert found == [room for room in all_of_mine if room.startswith(start.lower())]


def test_rooms_are_found_whatever_the_case_and_unwritten_too(client: TestClient) -> None:
    for room in ("@user1+user2", "team", "tee", "coffee"):
        post(client, "hi", room=room)

    def found(q: str, user: str = "user1") -> list[str]:
        answer = client.get("/rooms", params={"q": q}, headers=bearer(user))
        return [room["room"] for room in answer.json()]

    with chat(client, "admin", "room=tea"), chat(client, "user2", "room=@admin%2Buser2"):
        assert found("te") == found("TE") == found("\uff34\uff25") == ["tee", "team", "tea"]
        assert found("tea") == ["team", "tea"]
        assert found("lobb") == ["lobby"]
        assert found("@") == ["@user1+user2"]
        assert found("@", "admin") == ["@admin+user2"]
        assert found("@", "user2") == ["@user1+user2", "@admin+user2"]
        assert found("t%") == found("t_") == found("x") == []


def test_rooms_that_nobody_wrote_in_for_long_are_found(client: TestClient, database: Path) -> None:
    insert = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000)"
    name = "CASE WHEN i <= 1500 THEN 'a' ELSE 'r' END || i"
    with closing(sqlite3.connect(database)) as db, db:
        db.execute(f"{insert} INSERT INTO rooms SELECT '', {name}, i FROM n")
    reader, headers = app.state.storage.reader, bearer()
    with traced(reader) as statements:
        found = client.get("/rooms?limit=200&q=a", headers=headers).json()
    assert [room["last_id"] for room in found] == list(range(1500, 1300, -1))
    assert all(len(reader.execute(one).fetchall()) <= 1001 for one in statements)


def test_of_100_000_rooms_few_are_looked_at(client: TestClient, database: Path) -> None:
    """Counted in steps of SQLite's machine, some five for a row; of others' conversations none."""
    insert = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000)"
    with closing(sqlite3.connect(database)) as db, db:
        db.execute(f"{insert} INSERT INTO rooms SELECT '', 'r' || i, i FROM n")
        others = "'@p' || i || '+user2', 100000 + i"
        db.execute(f"{insert} INSERT INTO rooms SELECT 'user2', {others} FROM n")
    steps, reader, headers = itertools.count(), app.state.storage.reader, bearer()
    reader.set_progress_handler(lambda: next(steps) and None, 100)
    last = 0
    for query in ("", "before=99", "q=r", "q=r9", "q=r99", "q=r999", "q=r9&before=200", "q=x"):
        assert client.get(f"/rooms?limit=200&{query}", headers=headers).status_code == 200
        first, last = last, next(steps)
        assert last - first < 400, query
    reader.set_progress_handler(None, 0)


def test_tea_is_one_room_however_it_is_written(client: TestClient) -> None:
    with (
        chat(client, query="room=TEA") as conversation,
        client.websocket_connect("/ws/chat?room=Tea", headers=bearer("user2")) as plain,
    ):
        assert plain.receive_text() == "user2 joined the chat!"
        assert conversation.next("joined")["room"] == "tea"
        conversation.say("by JSON", "m1", room="\uff34ea")  # a wide T
        assert conversation.next()["room"] == "tea"
        assert plain.receive_text() == "user1: by JSON"
        plain.send_text("by plain text")
        assert conversation.next()["room"] == "tea"
        id = post(client, "over HTTP", room="tEa")
        assert conversation.next()["room"] == "tea"
        assert texts_of(client, "teA") == ["by JSON", "by plain text", "over HTTP"]
        assert delete(client, id, room="TEa") == 204
        assert conversation.next() == {"type": "deleted", "room": "tea", "id": id}
        conversation.send("history", room="TeA")
        assert conversation.next()["room"] == "tea"
        conversation.send("leave", room="TeA")
        conversation.send("join", room="teA")
        assert conversation.next()["room"] == "tea"
    rooms = client.get("/rooms", headers=bearer()).json()
    assert [room["room"] for room in rooms] == ["tea", "lobby"]


def test_the_length_of_a_rooms_name_is_that_in_lower_case(client: TestClient) -> None:
    """Where this letter becomes two."""
    assert post(client, "hi", room="ß" * 16) == 1
    assert client.get("/rooms", headers=bearer()).json()[0]["room"] == "s" * 32
    too_long = "ß" * 17
    body = {"text": "hi"}
    answer = client.post(f"/rooms/{too_long}/messages", json=body, headers=bearer())
    assert answer.status_code == 422
    assert texts_of(client, too_long) == 422
    with chat(client) as conversation:
        conversation.say("hi", "m1", room=too_long)
        assert conversation.next()["code"] == "unknown_room"
        conversation.send("join", room=too_long)
        assert conversation.next()["code"] == "unknown_room"
    with client.websocket_connect(f"/ws/chat?room={too_long}", headers=bearer()) as plain:
        assert plain.receive_text().startswith("Error: room: No such room")


def test_people_are_found_by_how_their_names_begin(client: TestClient) -> None:
    for name in ("Zoë", "zoey", "ZOE-2", "finn"):
        register = {"type": "register", **new_person(name, folded=lobby.fold(name))}
        client.portal.call(app.state.change, register)

    def found(q: str) -> list[str]:
        answer = client.get("/users", params={"q": q}, headers=bearer())
        return [user["username"] for user in answer.json()]

    assert found("ZO") == found("zo") == ["ZOE-2", "zoey", "Zoë"]
    assert found("zoe\u0308") == found("ZOË") == ["Zoë"]
    assert found("ﬁn") == found("FI") == ["finn"]
    assert found("nobody") == found("%") == found("_") == found("inn") == []
    assert len(found("")) == 7
    with chat(client, query="room=tea"):
        answer = client.get("/users?q=user", headers=bearer()).json()
    assert answer == [
        {"username": "user1", "role": "member", "rooms": ["tea"]},
        {"username": "user2", "role": "member", "rooms": []},
    ]


def test_of_people_who_are_looked_for_the_first_50_are_shown(client: TestClient) -> None:
    for n in range(60):
        register = {"type": "register", **new_person(f"p{n:02}")}
        client.portal.call(app.state.change, register)
    users = client.get("/users?q=p", headers=bearer()).json()
    assert [user["username"] for user in users] == [f"p{n:02}" for n in range(50)]


def test_who_is_banned_is_shown_to_moderators_alone(client: TestClient) -> None:
    act(client, "admin", "user2", role="moderator")
    act(client, "admin", "user1/ban")
    person = {"username": "user1", "role": "member", "rooms": []}
    for who in ("user2", "admin"):
        users = client.get("/users?q=user", headers=bearer(who)).json()
        assert users[0] == person | {"banned": True}
        assert users[1]["banned"] is False
    act(client, "admin", "user1/unban")
    assert client.get("/users?q=user1", headers=bearer()).json() == [person]


def health_of(client: TestClient) -> int:
    return int(client.get("/healthz").status_code)


def test_who_watches_is_told_that_another_program_holds_the_lock(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "BUSY_SECONDS", 0.05)
    with Entered(app) as client, closing(sqlite3.connect(database, isolation_level=None)) as db:
        assert health_of(client) == 200
        db.execute("BEGIN IMMEDIATE")
        assert health_of(client) == 503
        db.execute("ROLLBACK")
        assert health_of(client) == 200


@pytest.mark.parametrize("by_another", [False, True])
def test_who_watches_is_told_that_the_file_is_gone(
    client: TestClient, database: Path, by_another: bool
) -> None:
    """Deleted, or replaced by another one; what is stored now would be lost."""
    aside = database.with_name("aside.db")
    assert health_of(client) == 200
    database.rename(aside)
    if by_another:
        shutil.copy(aside, database)
    answer = client.get("/healthz")
    assert answer.status_code == 503
    assert answer.json() == {"detail": "The database's file was moved or deleted"}
    aside.replace(database)
    assert health_of(client) == 200


@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits another process's files")
def test_who_watches_is_told_that_the_disk_is_full(
    serve: Callable[..., Server], database: Path
) -> None:
    """Files of the server may grow no more."""
    resource = pytest.importorskip("resource")
    server = serve()
    writer = server.chat(server.token())
    for n in range(20):  # the journal grows beyond what will be allowed
        writer.say("x" * 4000, f"m{n}")
        writer.next("message")
    assert database.with_name("chat.db-wal").stat().st_size > 2**16 > server.log.stat().st_size
    with httpx2.Client(base_url=server.url, timeout=20) as http:
        assert http.get("/healthz").status_code == 200
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (2**16, limits[1]))
        answer = http.get("/healthz")
        assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "1")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        assert http.get("/healthz").status_code == 200


def test_many_who_watch_at_once_cost_a_commit_or_two(client: TestClient) -> None:
    with traced(app.state.storage.writer) as statements:
        with held_up():
            asked = [client.portal.start_task_soon(lobby.healthz) for _ in range(20)]
            assert client.get("/items/5").status_code == 200
            assert not any(one.done() for one in asked)
        assert [one.result(20)["status"] for one in asked] == ["ok"] * 20
        assert sum(one == "COMMIT" for one in statements) in (1, 2)
        assert sum(one.startswith("PRAGMA user_version") for one in statements) == 20


def test_older_pages_come_over_the_socket(client: TestClient) -> None:
    for n in range(60):
        client.post("/rooms/lobby/messages", json={"text": f"{n}"}, headers=bearer())
    with chat(client, quiet=False) as conversation:
        newest = conversation.next("history")
        assert [event["text"] for event in newest["messages"]] == [str(n) for n in range(10, 60)]
        assert newest["more"]
        before = newest["messages"][0]["id"]
        conversation.send("history", room="lobby", before=before, limit=4)
        older = conversation.next("history")
    assert [event["text"] for event in older["messages"]] == ["6", "7", "8", "9"]
    assert older["more"]


def ids_after(client: TestClient, after: int, **query: Any) -> tuple[list[int], bool]:
    """What a socket is sent on joining with ``after``, and whether that is complete."""
    extra = "".join(f"&{name}={value}" for name, value in query.items())
    with chat(client, query=f"after={after}{extra}", quiet=False) as conversation:
        history = conversation.next("history")
    return [event["id"] for event in history["messages"]], history["complete"]


def test_what_cannot_be_resumed_is_said_to_be_incomplete(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "WINDOW", 10)
    headers = bearer()
    url = "/rooms/lobby/messages"
    ids = [client.post(url, json={"text": "x"}, headers=headers).json()["id"] for _ in range(15)]
    epoch = app.state.storage.epoch
    assert ids_after(client, ids[9], epoch=epoch) == (ids[10:], True)
    assert ids_after(client, ids[9]) == (ids[10:], True)
    assert ids_after(client, ids[-1]) == ([], True)
    assert ids_after(client, ids[3]) == (ids, False)  # too many have come since
    assert ids_after(client, ids[9], epoch="other") == (ids, False)  # of another database
    assert ids_after(client, ids[-1] + 1) == (ids, False)  # from the future


def test_after_too_many_deletions_nothing_is_resumed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "WINDOW", 10)
    ids = [post(client, f"{n}") for n in range(15)]
    assert {delete(client, id) for id in ids[:10]} == {204}
    assert ids_after(client, ids[-1]) == ([], True)
    assert delete(client, ids[10]) == 204
    assert ids_after(client, ids[-1]) == (ids[11:], False)


def test_of_long_texts_fewer_are_resumed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 4,000 characters takes as much of the window as four short ones."""
    monkeypatch.setattr(lobby, "WINDOW", 10)
    ids = [post(client, "x" * 4000) for _ in range(5)]
    assert ids_after(client, ids[2]) == (ids[3:], True)
    assert ids_after(client, ids[1]) == (ids, False)


@pytest.mark.parametrize("room", ["lobby", "@user1+user2"])
def test_reconnecting_at_any_moment_loses_and_repeats_nothing(
    client: TestClient, room: str
) -> None:
    """One writes without a pause; the other comes and goes, and reads on from the last id."""
    total, seen, rng = 600, [0], random.Random(7)

    def write() -> None:
        with chat(client) as writer:
            for n in range(total):
                writer.say(f"{n}", f"m{n}", room=room)
                while n % 10 == 9 and writer.next("message")["mid"] != f"m{n}":
                    pass

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    texts = []
    while len(texts) < total:
        query = f"room={room}&after={seen[-1]}"
        with chat(client, "user2", query, quiet=False) as reader:
            for _ in range(rng.randrange(1, 5)):
                if len(texts) == total:
                    break
                event = reader.next("message", "history")
                if event["type"] == "history":
                    assert event["complete"]
                for new in event.get("messages", [event]):
                    assert new["id"] > seen[-1]
                    seen.append(new["id"])
                    texts.append(new["text"])
    writer.join()
    assert texts == [str(n) for n in range(total)]


@pytest.mark.parametrize("query", ["", "after=0"])
def test_joining_while_the_room_is_written_to_misses_nothing(
    client: TestClient, query: str
) -> None:
    """What waits to be stored meanwhile comes once, by the room's log, before who has joined."""
    post(client, "stored before")
    secret = token("user2")
    with chat(client) as writer:
        with held_up():
            for n in range(3):
                writer.say(f"{n}", f"m{n}")
            writer.nothing_came()
            with chat(client, "user2", query, quiet=False, secret=secret) as early:
                history = early.next("history")
                assert [event["text"] for event in history["messages"]] == ["stored before"]
                assert early.next()["users"] == {"user1": "member", "user2": "member"}
                early.nothing_came()
        with chat(client, "admin", query, quiet=False) as late:
            history = late.next("history")
    everything = ["stored before", "0", "1", "2"]
    assert [event["text"] for event in history["messages"]] == everything


def test_plain_text_is_the_chat_of_the_walk_through(client: TestClient) -> None:
    with client.websocket_connect(f"/ws/chat?token={token('user2')}") as two:
        assert two.receive_text() == "user2 joined the chat!"
        with client.websocket_connect(f"/ws/chat?token={token()}") as one:
            assert one.receive_text() == two.receive_text() == "user1 joined the chat!"
            one.send_text("hello")
            assert one.receive_text() == two.receive_text() == "user1: hello"
        assert two.receive_text() == "user1 left the chat!"


def test_in_plain_text_no_message_can_pass_for_another_persons(client: TestClient) -> None:
    with client.websocket_connect("/ws/chat", headers=bearer()) as websocket:
        websocket.receive_text()
        for line_break in ("\n", "\r\n", "\u2028"):
            websocket.send_text(f"hi{line_break}user2: I quit")
            assert websocket.receive_text() == "user1: hi\n    user2: I quit"


def test_plain_text_has_commands_and_tells_errors(client: TestClient) -> None:
    with client.websocket_connect("/ws/chat", headers=bearer()) as websocket:
        websocket.receive_text()
        websocket.send_text("/who")
        assert websocket.receive_text() == "Here: user1"
        websocket.send_text("/help")
        assert "/who" in websocket.receive_text()
        for wrong in ("/dance", "   ", "x" * 4001, "a\u202eb"):
            websocket.send_text(wrong)
            assert websocket.receive_text().startswith("Error: ")


def test_what_is_typed_in_no_room_is_not_lost_silently(client: TestClient) -> None:
    with client.websocket_connect("/ws/chat?room=@", headers=bearer()) as websocket:
        assert websocket.receive_text().startswith("Error: No such room")
        websocket.send_text("hello?")
        assert websocket.receive_text() == "Error: You are in no room"


def test_plain_text_shows_history_only_when_asked(client: TestClient) -> None:
    for text in ("one", "two"):
        client.post("/rooms/lobby/messages", json={"text": text}, headers=bearer("user2"))
    with client.websocket_connect("/ws/chat", headers=bearer()) as websocket:
        assert websocket.receive_text() == "user1 joined the chat!"
    with client.websocket_connect("/ws/chat?after=0", headers=bearer()) as websocket:
        texts = [websocket.receive_text() for _ in range(3)]
    assert texts == ["user2: one", "user2: two", "user1 joined the chat!"]


@pytest.mark.parametrize("query", ["room=@a", "room=", "after=x", "after=-1", f"after={2**64}"])
def test_what_is_wrong_in_the_sockets_url_is_told(client: TestClient, query: str) -> None:
    with chat(client, query=query, quiet=False) as conversation:
        assert conversation.next()["type"] == "welcome"
        assert conversation.next()["type"] == "error"
        conversation.send("join", room="lobby")
        assert conversation.next()["type"] == "history"


def test_a_sender_is_limited_and_told_when_to_go_on(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_RATE", "0.1")
    with Entered(app) as client, chat(client) as conversation:
        conversation.say("one", "m1")
        assert conversation.next()["type"] == "message"
        conversation.say("two", "m2")
        error = conversation.next()
        assert (error["code"], error["mid"]) == ("rate_limited", "m2")
        assert 9 < error["retry_after"] <= 10
        answer = client.post("/rooms/lobby/messages", json={"text": "x"}, headers=bearer())
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "10"
        with chat(client, "user2") as other:
            other.say("not me", "m1")
            assert other.next("message")["text"] == "not me"


def test_a_burst_of_three_seconds_worth_is_let_through() -> None:
    limit = lobby.RateLimit(Settings().rate)
    assert [bool(limit.retry_after("a", 10)) for _ in range(31)] == [False] * 30 + [True]
    assert not any(limit.retry_after("b", 0) for _ in range(1000))


def test_who_comes_and_goes_all_the_time_is_slowed_down(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each join is heard by all; here the burst is three, and the fourth waits for a second."""
    monkeypatch.setenv("CHAT_RATE", "1")
    with Entered(app) as client, chat(client, "user2") as watcher, chat(client) as restless:
        watcher.next("joined")
        started = time.monotonic()
        for _ in range(3):
            restless.send("leave", room="lobby")
            restless.send("join", room="lobby")
        for _ in range(3):
            assert [watcher.next()["type"] for _ in range(2)] == ["left", "joined"]
        assert time.monotonic() - started > 0.9


# -- 11. Serving ---------------------------------------------------------------------------


def test_importing_the_file_opens_nothing(tmp_path: Path) -> None:
    program = "import os, threading, app; print(os.listdir(), threading.active_count())"
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    del environment["CHAT_DB"]
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True
    )
    assert ended.stdout.strip() == b"[] 1"


def flood(writer: Chat, *readers: Chat, room: str = "lobby") -> None:
    """Write thirteen megabytes, more than any buffer on the way to a stalled reader holds."""
    for first in range(0, 3300, 10):
        mids = [f"m{n}" for n in range(first, first + 10)]
        for mid in mids:
            writer.say("x" * 4000, mid, room)
        for chat in (writer, *readers):
            assert [chat.next("message")["mid"] for _ in mids] == mids


def test_a_reader_that_stalls_delays_nobody_and_is_cut_off(serve: Callable[..., Server]) -> None:
    """The others read on while it does not; in the end it is out, and its connection is freed."""
    soon = "app.ChatProtocol.close_timeout = property(lambda self: 1.0, lambda self, value: None)"
    trace = "app.logging.WARNING = 5"  # so that uvicorn tells of each connection
    server = serve(program=f"{soon}; {trace}")
    one, two = server.chat(server.token()), server.chat(server.token("user2"))
    secret = server.token("admin")
    stalled = server.raw_socket("/ws/chat", f"Authorization: Bearer {secret}", receive_buffer=4096)
    flood(one, two)
    server.wait_for_log(r"(closed '/ws/chat': 1013 Too slow)")
    server.wait_for_log(r"(disconnected 'admin')")
    assert server.request("/healthz")["online"] == 2
    server.wait_for_log(r"(WebSocket connection lost)")
    stalled.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has this option")
def test_whoever_is_accepted_has_the_listening_sockets_limits() -> None:
    with lobby.open_listener(Settings(port=0)) as listener:
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                timeout = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert timeout == 20_000
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                buffer = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                assert buffer <= 2 * lobby.SEND_BUFFER  # Linux doubles it


def test_a_client_that_fell_out_of_the_window_is_told_to_come_back(
    serve: Callable[..., Server],
) -> None:
    server = serve(program="app.WINDOW = 20")
    one, secret = server.chat(server.token()), server.token("user2")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    slow = server.connect(f"/ws/chat?token={secret}", sock=raw, max_queue=1)
    for n in itertools.count():  # more than any buffer on the way holds
        one.say("x" * 4000, f"m{n}")
        one.next("message")
        if "1013 Too slow" in server.log.read_text():
            break
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            slow.recv(timeout=20)
    assert closed.value.rcvd and closed.value.rcvd.code == 1013


def test_a_signal_ends_the_server_soon_and_cleanly(serve: Callable[..., Server]) -> None:
    """Even with somebody who does not read; readers see 1012 and come back later."""
    server = serve()
    secret = server.token("admin")
    stalled = server.raw_socket("/ws/chat", f"Authorization: Bearer {secret}", receive_buffer=4096)
    reader = server.chat(server.token())
    flood(reader)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            reader.next()
    assert closed.value.rcvd and closed.value.rcvd.code == 1012
    server.process.wait(timeout=20)
    assert time.monotonic() - started < 15
    assert "Traceback" not in server.log.read_text()
    stalled.close()


def test_what_still_waits_at_the_end_is_stored(database: Path) -> None:
    """Many batches of it."""
    me = lobby.Bearer("user1", "", "", 0)
    with Entered(app) as client, held_up():
        for n in range(1000):
            message = lobby.new_message("lobby", me, f"{n}", None)
            client.portal.call(app.state.manager.post, message)
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT count(*) FROM messages").fetchone() == (1000,)


def test_a_handshake_that_is_none_is_refused_and_hinders_no_shutdown(
    serve: Callable[..., Server],
) -> None:
    server = serve()
    reader = server.chat(server.token())
    for path, header in (("/ws?" + "a" * 9000, ""), ("/ws", "Content-Length: 3\r\n")):
        raw = socket.create_connection(("127.0.0.1", server.port))
        raw.settimeout(20)
        raw.sendall(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n{header}\r\n".encode()
        )
        assert raw.recv(12) == b"HTTP/1.1 400"
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(ConnectionClosed) as closed:
        reader.next("none such")
    assert closed.value.rcvd and closed.value.rcvd.code == 1012
    server.process.wait(timeout=20)
    assert "Traceback" not in server.log.read_text()


def test_who_leaves_during_the_handshake_is_no_error(serve: Callable[..., Server]) -> None:
    server = serve()
    secret = server.token()
    for path in ("/ws/chat", "/ws/protected") * 10:
        raw = socket.create_connection(("127.0.0.1", server.port))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
        raw.sendall(
            f"GET {path}?token={secret} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode()
        )
        raw.close()
    with server.connect(f"/ws/chat?token={secret}", max_queue=None) as websocket:
        websocket.send("hello")
        while (line := websocket.recv(timeout=20)) != "user1: hello":
            assert line in ("user1 joined the chat!", "user1 left the chat!")
    server.stop()
    assert "Traceback" not in server.log.read_text()


SLOW_HANDSHAKE = """pass
async def slow(websocket):
    await app.asyncio.sleep(0.2)
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.receive_text()
app.app.router.add_websocket_route("/slow", slow)"""


def test_what_comes_before_the_answer_to_a_handshake_ends_it_without_an_error(
    serve: Callable[..., Server],
) -> None:
    """A client waits for it (RFC 6455, section 4.1)."""
    server = serve(program=SLOW_HANDSHAKE)
    secret, raws = server.token(), []
    for path in ("/slow", "/ws/chat", "/ws/protected", "/ws"):
        for early in (frame(1, b"early"), frame(8), b"\xff" * 99, b"GET / HTTP/1.1\r\n\r\n") * 5:
            head = (
                f"GET {path}?token={secret} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                f"Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n"
            )
            raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.sendall(head.encode())
            if path == "/slow":  # or both would come as one
                assert server.request("/healthz")["status"] == "ok"
            with suppress(ConnectionError):
                raw.sendall(early)
            raws.append((path, raw))
    for path, raw in raws:
        with raw, suppress(ConnectionError):
            answer = raw.recv(2**16)
            assert path != "/slow" or not answer
    with server.connect("/slow") as websocket:
        assert websocket.recv(timeout=20) == "hello"
    server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("path", ["/ws", "/ws/json", "/ws/chat"])
def test_nonsense_behind_a_frame_is_no_error(serve: Callable[..., Server], path: str) -> None:
    """It ends the connection, perhaps while the frame is being answered."""
    server = serve()
    secret = server.token()
    for _ in range(30):
        with server.raw_socket(f"{path}?token={secret}") as raw:
            raw.settimeout(20)
            with suppress(ConnectionError):
                raw.sendall(frame(1, b"[1]") + b"\xff" * 99)
                while raw.recv(2**16):
                    pass
    with server.connect("/ws") as websocket:
        websocket.send("still here")
        assert websocket.recv(timeout=20) == "Message text was: still here"
    server.stop()
    assert "Traceback" not in server.log.read_text()


def test_endless_headers_are_refused(serve: Callable[..., Server]) -> None:
    server = serve()
    for head in (b"X-A: b\r\n" * 1000, b"x" * 10_000):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ")
            with pytest.raises((ConnectionResetError, BrokenPipeError)):  # the server has closed
                for _ in range(10_000):
                    raw.sendall(head)


def test_a_connection_without_a_whole_head_is_ended(serve: Callable[..., Server]) -> None:
    """Whatever came before on it; and so is one that is idle."""
    server = serve(program="app.HEAD_SECONDS = 1")
    whole = b"GET /items/5 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    early = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\nunread"
    half = b"GET /items/5 HTTP/1.1\r\nX-A: "
    sent = [b"", half, whole, whole + half, whole + whole + half, early]
    raws = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in sent]
    for raw, data in zip(raws, sent, strict=True):
        raw.sendall(data)
    for raw in raws[2:]:  # what follows comes after the answer, when an idle one is waited for
        raw.recv(1, socket.MSG_PEEK)
        raw.sendall(b"G")
    assert drip(raws[1], b"x")
    answers = []
    for raw in raws:
        with raw, raw.makefile("rb") as file, suppress(ConnectionResetError):
            answers.append(file.read().count(b"HTTP/1.1 "))
    assert answers == [0, 0, 1, 1, 2, 1]
    assert server.request("/healthz")["status"] == "ok"


def test_neither_a_socket_nor_a_slow_answer_is_ended_like_a_half_head(
    serve: Callable[..., Server],
) -> None:
    slow = "app.app.add_api_route('/slow', lambda: app.time.sleep(1.5))"
    server = serve(program=f"app.HEAD_SECONDS = 1; {slow}")
    head = "GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: {}\r\n\r\n"
    ahead = head.format("/items/5", "keep-alive") + head.format("/slow", "close")
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    with raw, server.connect("/ws") as websocket:
        raw.sendall(ahead.encode())  # the slow one is whole before the other one is answered
        assert server.request("/slow") is None
        assert raw.makefile("rb").read().count(b"HTTP/1.1 200") == 2
        websocket.send("still here")
        assert websocket.recv(timeout=20) == "Message text was: still here"


def vanish(raw: socket.socket) -> None:
    """Let the kernel drop whatever comes for a socket, by a filter (BPF) that lets 0 bytes pass."""
    attach_filter, return_0 = 26, ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(return_0))
    raw.setsockopt(socket.SOL_SOCKET, attach_filter, program)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has these filters and limits")
def test_a_peer_that_vanishes_is_gone(serve: Callable[..., Server]) -> None:
    server = serve(program="app.STALL_SECONDS = 4")
    watcher, secret = server.chat(server.token("user2")), server.token()
    with server.raw_socket("/ws/chat", f"Authorization: Bearer {secret}") as raw:
        assert raw.recv(100).endswith(b"user1 joined the chat!")  # nothing is on its way any more
        vanish(raw)
        assert watcher.next("left") == {"type": "left", "room": "lobby", "user": "user1"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has this limit")
def test_a_client_that_reads_no_answer_is_gone(serve: Callable[..., Server]) -> None:
    trace = "app.logging.WARNING = 5"  # so that uvicorn tells of each connection
    server = serve(program=f"app.STALL_SECONDS = 4; {trace}")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", server.port))
        body = b'"' + b"x" * 900_000 + b'"'
        head = f"POST /http-endpoint HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        raw.sendall(f"{head}\r\n\r\n".encode() + body)
        server.wait_for_log(r"(HTTP connection lost)")


def test_a_message_of_endless_fragments_is_cut_off(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.raw_socket("/ws") as raw:
        raw.sendall(frame(1, final=False) + frame(0, final=False) * 2000)
        raw.settimeout(20)
        answer = raw.recv(4, socket.MSG_WAITALL)
        assert answer[:1] == b"\x88"  # a close frame
        assert int.from_bytes(answer[2:], "big") == 1009


@pytest.mark.parametrize(("opcode", "data"), [(9, b"x" * 125), (9, b""), (10, b"")])
def test_a_ping_is_answered_but_a_flood_ends_its_sender(
    serve: Callable[..., Server], opcode: int, data: bytes
) -> None:
    """Pings that nobody needs cost the loop as much as messages, and never pause the reading."""
    server = serve()
    with server.raw_socket("/ws", receive_buffer=4096) as raw:
        raw.sendall(frame(9, b"ping"))
        assert raw.recv(6) == b"\x8a\x04ping"
        flood = frame(opcode, data) * 10_000
        raw.settimeout(20)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            while True:
                raw.sendall(flood)
    assert server.request("/healthz")["status"] == "ok"


def test_who_sends_many_requests_ahead_is_cut_off(serve: Callable[..., Server]) -> None:
    server = serve()
    one = b"GET /items/5 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 20) as raw:
        raw.sendall(one * lobby.MAX_AHEAD)
        answered = b""
        while answered.count(b"HTTP/1.1 200") < lobby.MAX_AHEAD:
            answered += raw.recv(2**16)
    with socket.create_connection(("127.0.0.1", server.port), 20) as raw:
        raw.sendall(one * 5000)
        with suppress(ConnectionResetError):
            while raw.recv(2**16):
                pass
    assert server.request("/items/5")["item_id"] == 5


@pytest.mark.parametrize("path", ["/items/5", "/inspect", "/healthz", "/ws"])
def test_cookies_that_take_long_to_unquote_are_refused(client: TestClient, path: str) -> None:
    """A few are no matter: of 60,000 it took Python before 3.13 some twenty seconds."""
    hostile = {"Cookie": 'a="' + "\\" * 60_000 + '"'}
    if path == "/ws":
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(path, headers=hostile):
            pass
    else:
        answer = client.get(path, headers=hostile)
        assert answer.status_code == 400
        assert "backslashes" in answer.json()["detail"]
    seen = client.get("/inspect", headers={"Cookie": 'a="b\\"c"'}).json()
    assert seen["cookies"] == {"a": 'b"c'}


def test_text_that_is_no_utf_8_closes_its_socket_without_a_traceback(
    serve: Callable[..., Server],
) -> None:
    server = serve()
    with server.raw_socket("/ws", receive_buffer=4096) as raw:
        raw.settimeout(20)
        raw.sendall(frame(1, b"\xff"))
        assert raw.recv(4) == b"\x88\x02" + (1007).to_bytes(2, "big")
    assert server.request("/healthz")["status"] == "ok"
    assert "Traceback" not in server.log.read_text()


def test_a_frame_over_64_kib_closes_the_socket(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.connect("/ws") as websocket:
        websocket.send("x" * 2**16)
        assert len(websocket.recv(timeout=20)) > 2**16
        with pytest.raises(ConnectionClosed) as closed:
            websocket.send("x" * (2**16 + 1))
            websocket.recv(timeout=20)
        assert closed.value.rcvd and closed.value.rcvd.code == 1009


def test_no_secret_and_no_text_is_logged(serve: Callable[..., Server]) -> None:
    server = serve()
    secret = server.token()
    with server.connect(f"/ws/chat?token={secret}") as websocket:
        websocket.send("a private matter")
        while "private" not in str(websocket.recv(timeout=20)):
            pass
    with server.connect("/ws/protected?a=1&token=nonsense"):
        pass
    server.wait_for_log(r"(disconnected 'user1')")
    server.wait_for_log(r"(1008 Unauthorized: Invalid token)")
    log = server.log.read_text()
    assert "connected 'user1' from 127.0.0.1" in log
    for hidden in (secret, secret[-20:], "nonsense", "password1", "private"):
        assert hidden not in log
    assert "Traceback" not in log


def test_a_token_in_a_path_is_not_logged(serve: Callable[..., Server]) -> None:
    server = serve()
    secret = server.token()
    paths = [f"/{secret}", f"/inspect/a{secret}", f"/rooms/{secret}/messages", f"/items/{secret}"]
    with httpx2.Client(base_url=server.url, timeout=20) as http:
        statuses = [http.get(path).status_code for path in paths]
        assert statuses == [404, 200, 401, 422]
    for path in (f"/ws/{secret}", f"/{secret}"):
        with pytest.raises(InvalidStatus):
            server.connect(path)
    server.stop()
    log = server.log.read_text()
    assert '"GET /... HTTP/1.1" 404' in log
    assert '"GET /inspect/a... HTTP/1.1" 200' in log
    assert not [part for part in secret.split(".") if part in log]


def test_uvicorn_alone_serves_the_chat_and_logs_no_secret(serve: Callable[..., Server]) -> None:
    """With its own protocol, rooms write by tasks; one who does not read hinders nobody."""
    server = serve(command=["-m", "uvicorn", "app:app", "--port", "0"])
    secret, admins = server.token(), server.token("admin")
    one, plain = server.chat(secret), server.connect(f"/ws/chat?token={server.token('user2')}")
    assert plain.recv(timeout=20) == "user2 joined the chat!"
    stalled = server.raw_socket(f"/ws/chat?token={admins}", receive_buffer=4096)
    assert plain.recv(timeout=20) == "admin joined the chat!"
    read: list[str] = []
    for first in range(0, 3000, 20):  # twelve megabytes
        for n in range(first, first + 20):
            one.say(f"{n} " + "x" * 3990, f"m{n}")
        while (event := one.next("message"))["mid"] != f"m{first + 19}":
            pass
        while len(read) < first + 20:
            lines = str(plain.recv(timeout=20)).splitlines()
            read += [line.split()[1] for line in lines if line.startswith("user1: ")]
    assert read == [str(n) for n in range(3000)]
    one.send("join", room="lobby")  # admin fell out of the window, and so out of the room
    assert one.next("presence")["users"] == {"user1": "member", "user2": "member"}
    second_tab = server.chat(secret)  # nobody has joined: nothing but its outlet wakes it
    plain.send("/msg user1 hello")
    assert one.next("message") == second_tab.next("message")
    one.send("history", room="lobby", before=event["id"], limit=2)
    assert [past["id"] for past in one.next("history")["messages"]] == [2998, 2999]
    server.request("/users/user2/kick", {}, Authorization=f"Bearer {admins}")
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            plain.recv(timeout=20)
    assert closed.value.rcvd and (closed.value.rcvd.code, closed.value.rcvd.reason) == (
        1008,
        "Kicked",
    )
    assert one.next("left")["user"] == "user2"
    stalled.close()
    server.request("/items/5?token=hidden")
    log = server.log.read_text()  # uvicorn's formatter unpacks what the filter has passed on
    assert "/ws/chat?..." in log
    assert "hidden" not in log and secret not in log
    assert "Logging error" not in log and "Traceback" not in log


def test_user_made_text_cannot_forge_a_log_line(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client.post("/login", json={"username": "a\nINFO all is well", "password": "wrong"})
    (record,) = [record for record in caplog.records if "log-in" in record.getMessage()]
    assert "\n" not in record.getMessage()


# -- 12. Several processes -----------------------------------------------------------------


class Postgres:
    """A PostgreSQL of its own, in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        found = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.get_exec_path())]
        self.programs = next((one for one in found if (one / "initdb").exists()), None)
        self.user = {"user": "postgres"} if os.getuid() == 0 else {}  # it will not run as root
        self.count = 0

    def run(self, program: str, *arguments: str) -> None:
        assert self.programs
        subprocess.run(
            [self.programs / program, *arguments],
            check=True,
            timeout=60,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self.user,  # type: ignore[call-overload]
        )

    def control(self, *arguments: str) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -k {self.folder}"
        log = str(self.folder / "log")
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-l", log, "-o", options, *arguments)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def execute(self, sql: str, database: str = "postgres") -> list[Any]:
        psycopg = pytest.importorskip("psycopg")
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            done = connection.execute(sql)
            return list(done.fetchall()) if done.description else []

    def new_database(self) -> str:
        self.count += 1
        self.execute(f"CREATE DATABASE feed{self.count}")
        return f"feed{self.count}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="feed", dir="/tmp") as name:
        cluster = Postgres(Path(name))
        if not cluster.programs:
            pytest.skip("PostgreSQL is not installed")
        if os.getuid() == 0:
            shutil.chown(name, "postgres")
        data = f"{cluster.folder}/data"
        cluster.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N")
        cluster.control("start")
        yield cluster
        cluster.control("-m", "immediate", "stop")


class Feed:
    """Processes on one feed: each has a folder of its own, with a copy of the same file."""

    def __init__(self, postgres: Postgres, stack: ExitStack, file: Path, folder: Path) -> None:
        self.postgres, self.stack, self.file, self.folder = postgres, stack, file, folder
        self.database = postgres.new_database()
        self.url = postgres.url(self.database)

    def start(self, name: str, file: Path | None = None, **settings: str) -> Server:
        """A process; ``file``: what it starts from, if it has none yet."""
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            shutil.copy(file or self.file, folder / "chat.db")
        server = Server(folder, **{"feed": self.url, "secret": "s" * 32, **settings})
        self.stack.callback(server.process.wait)
        self.stack.callback(server.process.kill)
        return server

    def execute(self, sql: str) -> list[Any]:
        return self.postgres.execute(sql, self.database)

    def tables(self, *names: str) -> list[str]:
        """All that the files of these processes have, once they have ended."""
        found = []
        for name in names:
            with closing(sqlite3.connect(self.folder / name / "chat.db")) as db:
                found.append("\n".join(db.iterdump()))
        return found


@pytest.fixture
def feed(postgres: Postgres, demo_database: Path, tmp_path: Path) -> Iterator[Feed]:
    with ExitStack() as stack:
        yield Feed(postgres, stack, demo_database, tmp_path)


def health(server: Server) -> int:
    try:
        return 200 if server.request("/healthz") else 0
    except urllib.error.HTTPError as error:
        return error.code


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what has no event to wait for: another process's state."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_processes_on_a_feed_have_one_order_and_equal_files(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    secret = one.token()
    chats = [one.chat(secret), two.chat(secret)]
    for n in range(50):
        for side, conversation in enumerate(chats):
            conversation.say(f"{n} of {side}", f"{side}-{n}")
    heard = [[c.next("message") for _ in range(100)] for c in chats]
    assert heard[0] == heard[1]
    ids = [message["id"] for message in heard[0]]
    assert ids == sorted(set(ids))
    assert {message["mid"] for message in heard[0]} == {
        f"{s}-{n}" for s in (0, 1) for n in range(50)
    }
    one.stop()
    two.stop()
    feed.start("one").stop()  # reads what came after it had ended
    feed.start("two").stop()
    feed.start("one").stop()
    first, second = feed.tables("one", "two")
    assert re.sub('INSERT INTO "epoch".*', "", first) == re.sub('INSERT INTO "epoch".*', "", second)


def test_a_client_resumes_at_another_process_without_gap_or_repeat(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    secret, writer, seen = one.token(), one.chat(one.token("user2")), list[int]()
    for n in range(20):
        place = (one, two)[n % 2]
        query = f"after={seen[-1]}" if seen else ""
        websocket = place.connect(
            f"/ws/chat?{query}", subprotocols=["lobby.v1", f"bearer.{secret}"]
        )
        reader = Chat(lambda websocket=websocket: str(websocket.recv(timeout=20)), websocket.send)
        history = reader.next("history")
        assert history["complete"]
        seen += [message["id"] for message in history["messages"]]
        writer.say(f"{n}", f"m{n}")
        while (message := reader.next("message"))["text"] != f"{n}":
            seen.append(message["id"])  # it had not come to this process yet
        seen.append(message["id"])
        writer.say(f"{n} while away", f"n{n}")
        websocket.close()
    while writer.next("message")["text"] != "19 while away":
        pass
    stored = one.request("/rooms/lobby/messages?limit=200", Authorization=f"Bearer {secret}")
    assert seen == [message["id"] for message in stored["messages"]][: len(seen)]
    assert len(seen) == 39


def test_a_message_sent_again_at_another_process_is_stored_once(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    secret = one.token()
    first, second = one.chat(secret), two.chat(secret)
    first.say("once", "m1")
    original = first.next("message")
    assert second.next("message") == original
    second.say("once", "m1")
    assert second.next("message") == original
    first.nothing_came()


def test_what_ends_sockets_ends_them_at_every_process(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    admin = bearer_of(one.token("admin"))
    for path, reason in (("kick", "Kicked"), ("ban", "Banned"), ("unban", "")):
        if reason:
            websocket = two.connect(f"/ws/protected?token={two.token('user1')}")
            websocket.recv(timeout=20)
        one.request(f"/users/user1/{path}", {}, **admin)
        if reason:
            with pytest.raises(ConnectionClosed) as ended:
                websocket.recv(timeout=20)
            assert ended.value.rcvd and ended.value.rcvd.reason == reason
    secret = two.token("user1")
    websocket = two.connect(f"/ws/protected?token={secret}")
    websocket.recv(timeout=20)
    request = urllib.request.Request(one.url + "/logout", b"", bearer_of(secret))
    urllib.request.urlopen(request, timeout=20).close()
    with pytest.raises(ConnectionClosed) as ended:
        websocket.recv(timeout=20)
    assert ended.value.rcvd and ended.value.rcvd.reason == "Unauthorized: Logged out"


def test_joined_and_left_are_said_once_for_a_person_over_all_processes(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    watcher = one.chat(one.token("admin"))
    watcher.next("joined")
    secret = two.token()
    here, there = one.connect("/ws/chat", subprotocols=["lobby.v1", f"bearer.{secret}"]), None
    assert watcher.next() == joined("user1")
    there = two.chat(secret)
    there.say("both are here", "m1")
    assert watcher.next()["mid"] == "m1"
    here.close()
    there.say("one is here", "m2")
    assert watcher.next()["mid"] == "m2"
    users = two.request("/users", **bearer_of(secret))
    assert [(user["username"], user["rooms"]) for user in users] == [
        ("admin", ["lobby"]),
        ("user1", ["lobby"]),
    ]
    two.stop()
    assert watcher.next() == {"type": "left", "room": "lobby", "user": "user1"}


def test_the_people_of_a_process_that_dies_leave_within_15_seconds(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    watcher = one.chat(one.token("admin"))
    watcher.next("joined")
    two.chat(two.token())
    assert watcher.next() == joined("user1")
    two.stop(signal.SIGKILL)
    started = time.monotonic()
    assert watcher.next() == {"type": "left", "room": "lobby", "user": "user1"}
    assert time.monotonic() - started < 15


def test_a_log_in_a_password_and_an_id_of_another_process_count_at_once(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    for n in range(5):
        name = {"username": f"new{n}", "password": "a password"}
        one.request("/register", name)
        two.request("/login", name)
        secret = one.request("/login", name)["access_token"]
        assert two.request("/me", **bearer_of(secret))["username"] == f"new{n}"


def test_two_admins_who_demote_each_other_at_two_processes_leave_one(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    admin = one.token("admin")
    request = urllib.request.Request(
        one.url + "/users/user1/role",
        b'{"role": "admin"}',
        bearer_of(admin) | {"Content-Type": "application/json"},
        method="PUT",
    )
    urllib.request.urlopen(request, timeout=20).close()
    tries = [(one, admin, "user1"), (two, two.token(), "admin")]

    def demote(server: Server, secret: str, whom: str) -> int:
        return httpx2.put(
            f"{server.url}/users/{whom}/role", json={"role": "member"}, headers=bearer_of(secret)
        ).status_code

    with ThreadPoolExecutor(2) as threads:
        statuses = sorted(threads.map(lambda one: demote(*one), tries))
    assert statuses == [200, 403]


def test_without_postgres_reading_works_and_all_comes_back_after(
    feed: Feed, postgres: Postgres
) -> None:
    server = feed.start("one")
    secret = server.token()
    conversation = server.chat(secret)
    conversation.say("before", "m1")
    last = conversation.next("message")["id"]
    postgres.control("-m", "immediate", "stop")
    try:
        with pytest.raises(ConnectionClosed) as ended:
            conversation.next("never")
        assert ended.value.rcvd and ended.value.rcvd.code == 1012
        assert health(server) == 503
        page = server.request("/rooms/lobby/messages", **bearer_of(secret))
        assert [message["id"] for message in page["messages"]] == [last]
        waiting = server.chat(secret, f"after={last}")
        waiting.say("too early", "m2")
        assert waiting.next("error")["code"] == "unavailable"
    finally:
        postgres.control("start")
    until(lambda: health(server) == 200)
    waiting.say("after", "m2")
    assert waiting.next("message")["text"] == "after"


def test_a_connection_that_is_cut_ends_the_sockets_and_loses_nothing(feed: Feed) -> None:
    server = feed.start("one")
    secret = server.token()
    conversation = server.chat(secret)
    conversation.say("before", "m1")
    last = conversation.next("message")["id"]
    feed.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid != pg_backend_pid()"
    )
    with pytest.raises(ConnectionClosed) as ended:
        conversation.next("never")
    assert ended.value.rcvd and ended.value.rcvd.code == 1012
    until(lambda: health(server) == 200)
    again = server.chat(secret, f"after={last}")
    again.say("before", "m1")
    assert again.next("message")["id"] == last


def test_a_postgres_that_does_not_answer_is_given_up_and_taken_up_again(
    feed: Feed, postgres: Postgres
) -> None:
    server = feed.start("one")
    websocket = server.connect(f"/ws/protected?token={server.token()}")
    websocket.recv(timeout=20)
    first = int((postgres.folder / "data/postmaster.pid").read_text().split()[0])
    children = subprocess.check_output(["pgrep", "-P", str(first)], text=True).split()
    stopped = [first, *map(int, children)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ConnectionClosed) as ended:
            websocket.recv(timeout=20)
        assert ended.value.rcvd and ended.value.rcvd.code == 1012
        assert health(server) == 503
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    until(lambda: health(server) == 200, seconds=15)


def test_what_is_deleted_and_passwords_that_changed_leave_the_feed(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    one.request("/register", {"username": "ann", "password": "the first"})
    secret = one.request("/login", {"username": "ann", "password": "the first"})["access_token"]
    (stored,) = feed.execute("SELECT event->>'password' FROM feed WHERE type = 'register'")
    assert len(stored[0]) == 32 + 1 + 128
    said = one.request(
        "/rooms/lobby/messages", {"text": "a secret", "mid": "m1"}, **bearer_of(secret)
    )
    feed.execute("UPDATE lobby SET newest = newest + 5000")  # much has happened since
    path = f"{two.url}/rooms/lobby/messages"
    headers = bearer_of(secret)
    assert httpx2.delete(f"{path}/{said['id']}", headers=headers).status_code == 204
    again = httpx2.post(path, json={"text": "a secret", "mid": "m1"}, headers=headers)
    assert again.status_code == 403
    change = {"old": "the first", "new": "the second"}
    assert httpx2.put(f"{two.url}/me/password", json=change, headers=headers).status_code == 200

    def left() -> str:
        return str(feed.execute("SELECT event::text FROM feed"))

    until(lambda: "a secret" not in left() and stored[0][33:] not in left())
    assert stored[0][:32] in left()  # by which the log-ins before are compared
    fresh = feed.start("fresh")
    fresh.request("/login", {"username": "ann", "password": "the second"})


def test_what_cannot_be_applied_stops_nobody(feed: Feed) -> None:
    one, two = feed.start("one"), feed.start("two")
    conversation = two.chat(one.token())
    for type, event in (("message", {"type": "message"}), ("role", {"type": "role", "by": 7})):
        sql = "WITH turn AS (UPDATE lobby SET newest = newest + 1 RETURNING newest) "
        sql += f"INSERT INTO feed SELECT newest, 'x', '{type}', '{json.dumps(event)}' FROM turn"
        feed.execute(sql)
    for n in range(3):
        conversation.say("all goes on", f"m{n}")
        assert conversation.next("message")["mid"] == f"m{n}"
    assert health(one) == health(two) == 200
    assert "Traceback" in two.log.read_text()


def test_what_a_full_disk_keeps_out_of_a_replica_comes_when_it_can(
    feed: Feed, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_FEED", feed.url)
    monkeypatch.setenv("CHAT_SECRET", "s" * 32)
    with Entered(app) as client:
        headers = bearer()
        full_disk(app.state.storage.writer)
        sent = []
        status = 201
        while status == 201:
            sent.append(secrets.token_urlsafe(2000))
            body = {"text": sent[-1]}
            status = client.post("/rooms/lobby/messages", json=body, headers=headers).status_code
        assert status == 503
        app.state.storage.thread.submit(
            app.state.storage.writer.execute, "PRAGMA max_page_count = 100000"
        ).result()
        until(lambda: client.get("/healthz").status_code == 200)
        assert [
            message["text"]
            for message in client.get("/rooms/lobby/messages", headers=headers).json()["messages"]
        ] == sent


def test_a_machine_starts_from_nothing_or_from_a_copy(feed: Feed, tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    empty.touch()
    one = feed.start("one", empty)
    secret = one.token()
    conversation = one.chat(secret)
    conversation.say("first", "m1")
    message = conversation.next("message")
    with (
        closing(sqlite3.connect(tmp_path / "one/chat.db")) as db,
        closing(sqlite3.connect(tmp_path / "copy.db")) as copy,
    ):
        db.backup(copy)
    conversation.say("second", "m2")
    conversation.next("message")
    for name, file in (("new", empty), ("copied", tmp_path / "copy.db")):
        server = feed.start(name, file)
        found = server.request("/rooms/lobby/messages", **bearer_of(secret))["messages"]
        assert [one["text"] for one in found] == ["first", "second"]
        assert found[0] == message


def test_a_feed_that_cannot_be_used_ends_the_start_in_one_line(feed: Feed, tmp_path: Path) -> None:
    server = feed.start("one")
    conversation = server.chat(server.token())
    conversation.say("hello", "m1")
    conversation.next("message")
    server.stop()
    file, secret = str(tmp_path / "one/chat.db"), "s" * 32
    settings = {"CHAT_PORT": "0", "CHAT_SECRET": secret, "CHAT_DB": file, "CHAT_FEED": feed.url}

    def ends_with(line: str, **changed: str) -> None:
        ended = run_app(**{name: value for name, value in (settings | changed).items() if value})
        assert ended.returncode == 1
        assert re.fullmatch(f"Lobby cannot start: {line}\n", ended.stderr), ended.stderr

    ends_with("CHAT_FEED: .*connection.*", CHAT_FEED=f"postgresql://127.0.0.1:{free_port()}/x")
    ends_with("CHAT_FEED: .*", CHAT_FEED="mysql://127.0.0.1/x")
    history = "CHAT_FEED has another history than CHAT_DB: .*"
    feed.execute("UPDATE lobby SET newest = 1")  # restored from a backup
    ends_with(history)
    feed.execute("UPDATE lobby SET newest = 100, epoch = 'another'")
    ends_with(history)
    ends_with("CHAT_FEED needs a CHAT_SECRET.*", CHAT_SECRET="")
    for url in ("lobby:hunter%zz2@h/x", "lobby:hun@hunter2@h/x", "u:hunter2@[h/x"):
        ends_with("CHAT_FEED: (?!.*hunter).*", CHAT_FEED=f"postgresql://{url}")


def test_a_file_with_people_keeps_new_files_out(feed: Feed, tmp_path: Path) -> None:
    """Who has them, though no message yet, has a past that is not in the feed."""
    feed.start("one").stop()
    settings = {"CHAT_PORT": "0", "CHAT_SECRET": "s" * 32, "CHAT_FEED": feed.url}
    ended = run_app(CHAT_DB=str(tmp_path / "new.db"), **settings)
    assert "CHAT_FEED has another history than CHAT_DB" in ended.stderr


def test_a_file_that_was_used_alone_is_of_the_feed_no_more(feed: Feed, tmp_path: Path) -> None:
    server = feed.start("one")
    conversation = server.chat(server.token())
    conversation.say("hello", "m1")
    conversation.next("message")
    server.stop()
    Server(tmp_path / "one").stop()
    settings = {"CHAT_PORT": "0", "CHAT_SECRET": "s" * 32, "CHAT_FEED": feed.url}
    ended = run_app(CHAT_DB=str(tmp_path / "one/chat.db"), **settings)
    assert "CHAT_FEED has another history than CHAT_DB" in ended.stderr


def test_who_is_nobody_costs_the_feed_nothing(feed: Feed) -> None:
    server = feed.start("one")
    for headers in ({}, bearer_of("garbage")):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.request("/me", **headers)
    assert feed.execute("SELECT count(*) FROM feed WHERE type = 'turn'") == [(0,)]


def test_without_its_package_the_feed_says_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['psycopg'] = None; import app; app.main()"
    settings = {"CHAT_FEED": "postgresql://127.0.0.1/x", "CHAT_SECRET": "s" * 32}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HERE,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=30,
    )
    line = "Lobby cannot start: CHAT_FEED needs a package: pip install 'psycopg[binary]'\n"
    assert ended.stderr == line


# -- 13. The page --------------------------------------------------------------------------


def test_the_page_may_run_its_own_script_and_style_only(client: TestClient) -> None:
    answer = client.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "'unsafe-inline'" not in policy
    for tag in ("script", "style"):
        content = answer.text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    page = answer.text.replace("http://www.w3.org/2000/svg", "")  # a name, not a place
    assert not re.search(r"innerHTML|https?://|\son\w+=|style=", page)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; without Playwright or Chromium, its tests are skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page as somebody logged in; at the end there was no error in any console."""
    errors: list[str] = []
    contexts = []

    def open_as(
        server: Server, user: str, beside: Any = None, log_in: bool = True, **device: Any
    ) -> Any:
        """``beside``: a page in whose browser this one is another tab."""
        if not beside:
            contexts.append(browser.new_context(viewport={"width": 1200, "height": 700}, **device))
        page = (beside.context if beside else contexts[-1]).new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and errors.append(line.text))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.goto(server.url)
        if log_in:
            page.fill("[name=username]", user)
            page.fill("[name=password]", PASSWORDS[user])
            page.click("text=Log in")
            page.get_by_text("connected", exact=True).wait_for()
        return page

    yield open_as
    for context in contexts:
        context.close()
    expected = ("ERR_CONNECTION_REFUSED", "Failed to load resource")  # no server, or a 4xx
    assert [error for error in errors if not any(one in error for one in expected)] == []


def write(page: Any, text: str) -> None:
    page.fill("#messageText", text)
    page.press("#messageText", "Enter")


def shown(page: Any, text: str) -> Any:
    """A message in the log, as the server has confirmed it."""
    return page.locator(".message:not(.waiting, .failed)", has_text=text)


def side(page: Any, name: str) -> Any:
    """A room or a person in the side bar."""
    return page.get_by_role("navigation").get_by_role("button", name=re.compile(f"^{name}"))


def entry(page: Any, text: str) -> Any:
    """The newest entry of the wire that has this in its line or its sentence."""
    return page.locator("#wire summary", has_text=text).last


def log_out(page: Any) -> None:
    page.get_by_role("button", name="Your menu").click()
    page.get_by_role("button", name="Log out", exact=True).click()
    page.locator("#problem", has_text="Logged out").wait_for()


def write_texts(server: Server, count: int) -> Chat:
    """user2, who has written ``text 0.``, ``text 1.``, ... into the lobby."""
    author = server.chat(server.token("user2"))
    for n in range(count):
        author.say(f"text {n}.", f"m{n}")
        author.next("message")
    return author


def wait_for_title(page: Any, title: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect(page).to_have_title(title)


def stored_texts(server: Server) -> list[str]:
    page = server.request("/rooms/lobby/messages", Authorization=f"Bearer {server.token()}")
    return [message["text"] for message in page["messages"]]


def test_two_people_chat_in_their_browsers(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    one, two = open_page(server, "user1"), open_page(server, "user2")
    one.get_by_role("log").get_by_text("user2 joined").wait_for()
    write(one, "see https://example.org/a?b=c. `code` @user2")
    link = shown(two, "see").locator("a")
    assert link.get_attribute("href") == "https://example.org/a?b=c"
    assert "noopener" in link.get_attribute("rel")
    assert shown(two, "see").locator("code").inner_text() == "code"
    two.locator(".mention", has_text="@user2").wait_for()
    two.press("#messageText", "h")
    one.get_by_text("user2 is typing").wait_for()
    write(two, "hello")
    shown(one, "hello").wait_for()
    one.get_by_text("user2 is typing").wait_for(state="detached")
    write(two, "//slash")
    shown(one, "/slash").wait_for()
    side(one, "user2").wait_for()
    two.close()
    side(one, "user2").wait_for(state="detached")
    assert one.get_by_role("log").get_by_text("user2 left").count() == 1


def test_reloads_are_no_news(serve: Callable[..., Server], open_page: Callable[..., Any]) -> None:
    server = serve()
    one, two = open_page(server, "user1"), open_page(server, "user2")
    one.get_by_text("user2 joined").wait_for()
    for _ in range(3):
        two.reload()
        two.get_by_text("connected", exact=True).wait_for()
    side(one, "user2").wait_for()
    assert one.locator(".notice").all_inner_texts() == ["user2 joined"]


def test_hostile_text_stays_text_everywhere(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    server = serve()
    one, two = open_page(server, "user1"), open_page(server, "user2")
    two.get_by_role("button", name="Wire").click()
    write(one, hostile)
    shown(two, hostile).wait_for()
    entry(two, "user1 wrote").click()
    two.locator("#wire pre", has_text="<img").wait_for()
    write(two, f"/join {hostile}")
    two.get_by_text("cannot be opened").wait_for()
    write(two, f"/msg {hostile}")
    two.locator(".failed", has_text="No such room or person").wait_for()
    assert one.locator("img").count() == two.locator("img").count() == 0


def test_a_room_that_is_refused_does_not_stay(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "/join two words")
    page.get_by_text("#two words cannot be opened").wait_for()
    write(page, "/join tea")
    page.get_by_role("heading", name="# tea").wait_for()
    side(page, "two words").wait_for(state="detached")
    assert page.url.endswith("#tea")
    page.reload()
    page.get_by_role("heading", name="# tea").wait_for()
    page.get_by_role("button", name="Leave").click()
    side(page, "tea").wait_for(state="detached")


def test_what_is_wrong_with_a_log_in_is_said_beside_the_field(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "", log_in=False)
    for name, password, field, words in [
        ("a b", "long enough", "username", "are a name"),
        ("user1", "long enough", "username", "taken"),
        ("Zoë", "short", "password", "8 characters"),
    ]:
        page.fill("#username", name)
        page.fill("#password", password)
        page.get_by_role("button", name="Register").click()
        page.locator(f"#{field}Problem", has_text=words).wait_for()
        assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
    page.fill("#password", "long enough")
    page.get_by_role("button", name="Register").click()
    page.get_by_text("connected", exact=True).wait_for()
    assert page.inner_text("#myName") == "Zoë"
    page.reload()  # a tab stays logged in until it closes
    page.get_by_text("connected", exact=True).wait_for()
    log_out(page)
    page.click("text=Use a token")
    page.fill("#token", server.token("admin"))
    page.click("text=Connect with the token")
    page.locator("#myName", has_text="admin").wait_for()


def test_whoever_may_not_log_in_is_told_why(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    headers = {"Authorization": f"Bearer {server.token('admin')}"}
    server.request("/users/user2/ban", {}, **headers)
    page = open_page(server, "", log_in=False)
    page.fill("#username", "user2")
    page.fill("#password", "password2")
    with page.expect_response("**/login"):
        page.get_by_role("button", name="Log in").click()
    page.locator("#problem", has_text="Banned").wait_for()
    page.evaluate("() => draw()")
    assert page.inner_text("#problem") == "Banned"  # drawing the page anew leaves it there


def test_a_log_in_is_renewed_and_kept_for_whoever_wants_that(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve(token_minutes="0.05")
    page = open_page(server, "", log_in=False)
    page.fill("#username", "user1")
    page.fill("#password", "password1")
    page.get_by_label("Stay logged in").check()
    page.get_by_role("button", name="Log in").click()
    page.get_by_text("connected", exact=True).wait_for()
    page.get_by_role("button", name="Wire").click()
    entry(page, "POST /renew").wait_for()
    again = page.context.new_page()
    page.close()
    again.goto(server.url)
    again.get_by_text("connected", exact=True).wait_for()


def test_a_log_in_that_ends_asks_for_the_password_and_nothing_is_lost(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve(token_minutes="0.05")
    page = open_page(server, "user1")
    write(page, "/join tea")
    page.get_by_role("heading", name="# tea").wait_for()
    page.fill("#messageText", "half a sentence")
    page.route("**/renew", lambda route: route.abort())
    dialog = page.get_by_role("dialog", name="Your log-in has ended, user1")
    dialog.get_by_label("Password").fill("wrong")
    dialog.get_by_role("button", name="Log in again").click()
    dialog.get_by_role("alert").get_by_text("Bad username or password").wait_for()
    dialog.get_by_label("Password").fill("password1")
    dialog.get_by_role("button", name="Log in again").click()
    page.get_by_text("connected", exact=True).wait_for()
    page.get_by_role("heading", name="# tea").wait_for()
    assert page.input_value("#messageText") == "half a sentence"


def test_a_password_is_changed_for_all_tabs_of_the_browser(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    one = open_page(server, "user1")
    two = open_page(server, "user1", beside=one)
    one.get_by_role("button", name="Your menu").click()
    one.get_by_role("button", name="Change password").click()
    dialog = one.get_by_role("dialog", name="Change password")
    for old in ("wrong password", "password1"):
        dialog.get_by_label("Password now").fill(old)
        dialog.get_by_label("New password").fill("another one")
        dialog.get_by_role("button", name="Change").click()
        if old != "password1":
            dialog.get_by_role("alert").filter(has_text=re.compile(".")).wait_for()
    one.get_by_text("The password is changed.").wait_for()
    write(one, "from one")
    shown(two, "from one").wait_for()
    write(two, "from two")
    shown(one, "from two").wait_for()


def test_private_conversations_in_the_browser(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    one, two = open_page(server, "user1"), open_page(server, "user2")
    write(one, "/msg USER2 just us")
    one.get_by_role("heading", name="user2").wait_for()
    unread = two.get_by_role("button", name="user1 1 unread")
    wait_for_title(two, "(1) Lobby")
    one.press("#messageText", "x")  # typing alone begins no conversation
    server.chat(server.token("admin")).send("typing", room="@admin+user2")
    assert shown(two, "just us").count() == 0
    unread.click()
    shown(two, "just us").wait_for()
    wait_for_title(two, "Lobby")
    write(two, "and nobody else")
    shown(one, "and nobody else").wait_for()
    one.reload()
    shown(one, "and nobody else").wait_for()  # the address names the room
    assert one.locator("#private button").count() == 1
    one.get_by_role("button", name="Leave").click()
    one.locator("#private button").wait_for(state="detached")
    one.reload()
    one.get_by_text("connected", exact=True).wait_for()
    assert one.locator("#private button").count() == 0
    write(two, "come back")
    one.get_by_role("button", name="user2 1 unread").wait_for()


def test_a_line_shows_where_the_new_ones_begin(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve(rate="0")
    author = write_texts(server, 40)
    page = open_page(server, "user1")
    shown(page, "text 39.").wait_for()
    write(page, "/join tea")
    page.get_by_text("#tea is new").wait_for()
    for n in range(2):
        author.say(f"later {n}.", f"l{n}")
    page.get_by_role("button", name="lobby 2 unread").click()
    page.get_by_text("2 new", exact=True).wait_for()
    follows = page.locator(".new + .message")
    assert "later 0." in follows.inner_text()
    write(page, "/join tea")
    page.get_by_text("#tea is new").wait_for()
    for n in range(120):
        author.say(f"away {n}.", f"a{n}")
    page.get_by_role("button", name="lobby 120 unread").wait_for()
    page.reload()
    page.get_by_role("button", name="lobby 50+ unread").click()
    page.get_by_text(re.compile(r"^(50|100)\+ new$")).wait_for()
    for count in (150, 170):  # older pages, on scrolling up
        page.locator("#chatLog").evaluate("log => { log.scrollTop = -log.scrollHeight; }")
        page.locator(".message").nth(count - 31).wait_for()
    page.get_by_text("120 new", exact=True).wait_for()
    assert "away 0." in page.locator(".new + .message").inner_text()


def test_moderation_in_the_browser(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    admin, member = open_page(server, "admin"), open_page(server, "user1")
    write(member, "mine")
    write(admin, "not yours")
    shown(member, "not yours").hover()
    assert shown(member, "not yours").get_by_role("button", name="Delete").count() == 0
    shown(admin, "mine").hover()
    shown(admin, "mine").get_by_role("button", name="Delete").click()
    shown(admin, "Delete").get_by_role("button", name="Really delete?").click()
    member.get_by_text("Message deleted").wait_for()
    shown(admin, "Message deleted").hover()
    assert admin.get_by_role("button", name="Copy").count() == 0  # nothing is to be done with it
    side(member, "admin").click()
    member.get_by_role("button", name="Message", exact=True).wait_for()
    assert member.get_by_role("button", name="Ban").count() == 0
    member.keyboard.press("Escape")
    side(admin, "user1").click()
    admin.get_by_role("button", name="Make moderator").click()
    admin.get_by_role("button", name="No", exact=True).click()
    admin.get_by_role("button", name="Make moderator").click()
    admin.get_by_role("button", name="Make user1 a moderator").click()
    side(admin, "user1 moderator").wait_for()
    member.locator("#myRole", has_text="moderator").wait_for()  # without a reload
    side(admin, "user1").click()
    admin.get_by_role("button", name="Kick", exact=True).click()
    admin.get_by_role("button", name="Kick user1").click()
    member.locator("#problem", has_text="Kicked").wait_for()
    assert member.is_visible("#username") and not member.is_visible("#messageText")


def test_on_touch_the_first_tap_shows_the_tools_and_presses_none(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    page = open_page(serve(), "user1", has_touch=True, is_mobile=True)
    write(page, "mine")
    delete = shown(page, "mine").get_by_role("button", name="Delete", exact=True)
    shown(page, "mine").tap()
    box = delete.bounding_box()
    page.locator("#messageText").tap()
    delete.wait_for(state="hidden")
    page.touchscreen.tap(box["x"] + 9, box["y"] + 9)
    delete.wait_for()
    page.touchscreen.tap(box["x"] + 9, box["y"] + 9)
    question = page.get_by_role("button", name="Really delete?")
    question.wait_for()
    page.locator("#messageText").tap()  # whoever turns away is asked anew
    shown(page, "mine").tap()
    delete.tap()
    question.tap()
    page.get_by_text("Message deleted").wait_for()


def test_a_message_is_deleted_by_keyboard_alone(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "mine")
    shown(page, "mine").wait_for()
    server.chat(server.token("user2"))
    page.get_by_text("user2 joined").wait_for()
    write(page, "last")
    shown(page, "last").wait_for()
    page.locator("#chatLog").focus()
    for key in ("ArrowUp", "ArrowUp", "Tab", "Tab", "Tab", "Enter", "Enter"):
        page.keyboard.press(key)  # past the line between them
    page.get_by_text("Message deleted").wait_for()
    assert shown(page, "last").count() == 1


def test_whoever_has_logged_in_can_type(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    page = open_page(serve(), "user1")
    page.keyboard.type("hello\n")
    shown(page, "hello").wait_for()


def test_whoever_asks_is_notified_of_mentions(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")

    def toggle(name: str) -> None:
        page.get_by_role("button", name="Your menu").click()
        page.get_by_role("button", name=name).click()

    toggle("Notify me of mentions")
    page.get_by_text("This browser was told to allow no notifications.").wait_for()
    page.context.grant_permissions(["notifications"])
    toggle("Notify me of mentions")
    page.evaluate("""() => {
        window.called = [];
        window.Notification = class extends Notification {
            constructor(title, options) { super(title, options); called.push(options.body); }
        };
        Object.defineProperty(document, "hidden", {get: () => true});
    }""")
    author = server.chat(server.token("user2"))
    author.say("to nobody", "m1")
    author.say("to @user10", "m2")
    author.say("to @user1", "m3")
    shown(page, "to @user1").last.wait_for()
    author.send("message", to="user1", text="to user1 alone", mid="m4")
    page.get_by_role("button", name="user2 1 unread").wait_for()
    assert page.evaluate("() => called") == ["to @user1", "to user1 alone"]
    toggle("Notify me no more")
    author.say("again, @user1", "m5")
    shown(page, "again").wait_for()
    assert page.evaluate("() => called.length") == 2


def test_an_address_that_names_no_room_locks_nobody_out(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    page = open_page(serve(), "user1")
    write(page, "/join 100%")
    page.get_by_text("#100% cannot be opened").wait_for()
    page.evaluate("() => { location.hash = '#100%'; }")
    page.reload()
    page.get_by_role("heading", name="# lobby").wait_for()


def test_whoever_is_away_can_be_found_banned_and_unbanned(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "admin")
    for action in ("Ban", "Unban"):
        page.get_by_role("button", name="More people").click()
        page.get_by_label("Find a person").fill("user2")
        page.locator(".found").get_by_role("button", name="user2").click()
        page.get_by_role("button", name=action, exact=True).click()
        page.get_by_role("button", name=f"{action} user2").click()
        page.get_by_text(f"{action} user2: done.").wait_for()


def test_rooms_can_be_found_without_knowing_their_names(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    one, two = open_page(server, "user1"), open_page(server, "user2")
    write(one, "/join imports")
    one.get_by_text("#imports is new").wait_for()
    write(one, "first")
    two.get_by_role("button", name="More rooms").click()
    two.get_by_label("Find or make a room").fill("imp")
    two.get_by_role("button", name="Make # imp").wait_for()
    two.get_by_role("button", name="# imports").click()
    shown(two, "first").wait_for()


def test_a_card_tells_the_role_of_whoever_is_away_and_the_tab_key_leads_into_it(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    page.get_by_role("button", name="More people").press("Enter")
    page.get_by_label("Find a person").fill("admin")
    page.locator(".found").get_by_role("button", name="admin").press("Enter")
    page.get_by_role("dialog", name="admin").get_by_text("admin, away").wait_for()
    page.keyboard.press("Tab")
    assert page.locator("button:focus").inner_text() == "Message"


def test_enter_in_the_finder_opens_a_room_and_writes_nothing_into_it(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    page.get_by_role("button", name="More rooms").click()
    page.get_by_label("Find or make a room").fill("tea")
    page.get_by_role("button", name="Make # tea").wait_for()
    page.get_by_label("Find or make a room").press("Enter")
    page.get_by_text("#tea is new").wait_for()
    assert page.input_value("#messageText") == ""


def test_typing_in_a_room_that_is_refused_is_no_error(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "/join two words")
    page.get_by_text("#two words cannot be opened").wait_for()
    page.press("#messageText", "x")
    server.chat(server.token("user2")).say("after it", "m1")
    page.get_by_role("button", name="lobby 1 unread").wait_for()
    assert page.locator(".notice.wrong").count() == 0


def test_a_search_ends_with_its_room(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "/search words")
    page.get_by_text("0 messages with").wait_for()
    assert page.input_value("#query") == "words"
    write(page, "/join tea")
    page.get_by_text("#tea is new").wait_for()
    assert page.is_hidden("#query")
    page.get_by_role("button", name="Search").click()
    assert page.input_value("#query") == ""
    write(page, "/search words")
    page.get_by_text("0 messages with").wait_for()
    write(page, "seen at once")
    shown(page, "seen at once").wait_for()


def test_long_names_stay_inside(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    name = "A" * 32
    account = {"username": name, "password": "long enough"}
    server.request("/register", account)
    author = server.chat(server.request("/login", account)["access_token"])
    page = open_page(server, "admin")
    page.set_viewport_size({"width": 390, "height": 844})
    author.say("hello", "m1")
    message = shown(page, "hello")
    message.wait_for()

    def assert_inside(element: Any, box: dict[str, float]) -> None:
        inner = element.bounding_box()
        assert box["x"] <= inner["x"]
        assert inner["x"] + inner["width"] <= box["x"] + box["width"]

    assert_inside(message.locator("time"), message.bounding_box())
    message.get_by_role("button", name=name).click(position={"x": 9, "y": 9})
    card = page.get_by_role("dialog", name=name)
    card.get_by_role("button", name="Make admin").click()
    for element in card.locator("b, button").all():
        assert_inside(element, card.bounding_box())
    card.get_by_role("button", name="New password").click()
    dialog = page.get_by_role("dialog", name=f"Set {name}'s password")
    for element in dialog.locator("h2, input, button").all():
        assert_inside(element, dialog.bounding_box())


def test_a_long_room_name_leaves_room_for_the_buttons(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    page = open_page(serve(), "user1")
    write(page, f"/join {'W' * 32}")
    page.get_by_text("is new").wait_for()
    for width in (1200, 800, 390):
        page.set_viewport_size({"width": width, "height": 700})
        for _ in ("with the search's field", "without it"):
            page.get_by_role("button", name="Search").click()
            box = page.locator("#wireButton").bounding_box()
            assert box["x"] + box["width"] <= width


def test_whoever_leaves_is_gone_at_once_though_the_server_is_frozen(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    page.evaluate("""() => new MutationObserver(() => console.log(document.body.hidden))
        .observe(document.body, {attributes: true})""")
    server.process.send_signal(signal.SIGSTOP)
    page.get_by_role("button", name="Your menu").click()
    with page.expect_console_message(lambda line: line.text == "true"):
        page.get_by_role("button", name="Log out", exact=True).click()
    server.process.send_signal(signal.SIGCONT)
    page.locator("#problem", has_text="Logged out").wait_for()


def test_whoever_leaves_does_not_come_into_the_log_in_of_another(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    one = open_page(server, "", log_in=False)
    two = open_page(server, "", log_in=False, beside=one)
    for page, name in ((one, "user1"), (two, "user2")):
        page.get_by_label("Stay logged in").check()
        page.get_by_role("button", name=name).click()
        page.get_by_text("connected", exact=True).wait_for()
    log_out(one)
    two.reload()
    two.get_by_text("connected", exact=True).wait_for()
    assert two.inner_text("#myName") == "user2"


def test_links_keep_their_parentheses(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "see https://a.org/b_(c) and (https://a.org/d), (https://a.org/e_(f)).")
    links = shown(page, "see").locator("a")
    links.nth(2).wait_for()
    assert links.all_inner_texts() == [
        "https://a.org/b_(c)",
        "https://a.org/d",
        "https://a.org/e_(f)",
    ]


def test_what_is_searched_for_can_be_jumped_to(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve(rate="0")
    write_texts(server, 160)
    page = open_page(server, "user1")
    write(page, "/search text 3.")
    page.get_by_text("1 message with").wait_for()
    assert page.locator("mark").inner_text() == "text 3."
    page.get_by_role("button", name="Go there").click()
    for n in (2, 4, 20):  # what was written before and after it
        shown(page, f"text {n}.").first.wait_for()
    assert page.locator(".message:focus").inner_text().endswith("text 3.")
    assert shown(page, "text 159.").count() == 0
    page.get_by_role("button", name="Back to lobby").click()
    shown(page, "text 159.").wait_for()


def test_a_paste_that_is_too_long_is_refused_whole(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "x" * 4_123)
    page.get_by_text("123 characters too many").wait_for()
    assert len(page.input_value("#messageText")) == 4_123 and stored_texts(server) == []


def test_nothing_is_lost_or_doubled_when_the_server_is_killed(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "before")
    shown(page, "before").wait_for()
    server.stop(signal.SIGKILL)
    page.get_by_text("No connection").wait_for()
    page.get_by_text(re.compile(r"Trying again in \d+ s")).wait_for()
    for n in range(3):
        write(page, f"while it was gone {n}")
    page.locator(".waiting", has_text="Waiting for the connection").nth(2).wait_for()
    page.fill("#messageText", "not yet sent")
    restarted = serve(port=str(server.port))
    page.get_by_text("connected", exact=True).wait_for()
    shown(page, "while it was gone 2").wait_for()
    assert page.locator(".waiting").count() == 0
    assert page.input_value("#messageText") == "not yet sent"
    expected = ["before", *(f"while it was gone {n}" for n in range(3))]
    assert page.locator(".text").all_inner_texts() == stored_texts(restarted) == expected
    page.reload()
    shown(page, "while it was gone 2").wait_for()
    assert page.locator(".text").all_inner_texts() == expected
    assert page.input_value("#messageText") == "not yet sent"


def test_the_outbox_outlives_its_tab(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "before")
    shown(page, "before").wait_for()
    server.stop(signal.SIGKILL)
    page.get_by_text("No connection").wait_for()
    write(page, "the tab closes")
    page.locator(".waiting", has_text="the tab closes").wait_for()
    page.close()
    restarted = serve(port=str(server.port))
    again = open_page(restarted, "user1", beside=page)
    shown(again, "the tab closes").wait_for()
    assert stored_texts(restarted) == ["before", "the tab closes"]


def test_two_tabs_of_one_person_work_side_by_side(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    one = open_page(server, "user1")
    two = open_page(server, "user1", beside=one)
    for n in range(5):
        write(one, f"one {n}")
        write(two, f"two {n}")
    for page in (one, two):
        for n in range(5):
            shown(page, f"one {n}").wait_for()
            shown(page, f"two {n}").wait_for()
    assert one.locator(".waiting").count() == two.locator(".waiting").count() == 0
    assert len(stored_texts(server)) == 10


def test_a_reconnect_leaves_the_reader_where_they_are(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve(rate="0")
    write_texts(server, 60)
    page = open_page(server, "user1")
    shown(page, "text 59.").wait_for()
    page.locator("#chatLog").hover()
    page.mouse.wheel(0, -600)
    scrolled = "() => document.getElementById('chatLog').scrollTop"
    page.get_by_role("button", name="Jump to the newest").wait_for()
    before = page.evaluate(scrolled)
    page.fill("#messageText", "half a sentence")
    server.stop(signal.SIGKILL)
    page.get_by_text("No connection").wait_for()
    serve(port=str(server.port))
    page.get_by_text("connected", exact=True).wait_for()
    page.get_by_text("No connection").wait_for(state="hidden")
    assert abs(page.evaluate(scrolled) - before) < 3
    assert page.input_value("#messageText") == "half a sentence"


def test_nothing_of_one_person_is_left_for_the_next(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "", log_in=False)
    page.fill("#username", "user1")
    page.fill("#password", "password1")
    page.get_by_role("button", name="Log in").dblclick()
    write(page, "/msg user1 a note to myself")
    shown(page, "a note to myself").wait_for()
    page.fill("#messageText", "unsent")
    log_out(page)
    online = server.request("/users", Authorization=f"Bearer {server.token('admin')}")
    assert online == []  # two clicks on "Log in" have not left a second socket behind
    page.fill("#username", "user2")
    page.fill("#password", "password2")
    page.get_by_role("button", name="Log in").click()
    page.get_by_text("connected", exact=True).wait_for()
    page.get_by_role("button", name="Wire").click()
    entry(page, "welcome").wait_for()
    assert "user1" not in page.locator("#frames").inner_text()
    assert "note" not in page.inner_text("#app")
    assert page.input_value("#messageText") == ""
    assert page.locator("#private button").count() == 0


def test_a_busy_room_is_shown_whole_and_once(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve(rate="0")
    page = open_page(server, "user1")
    author = server.chat(server.token("user2"))
    for first in range(0, 1050, 50):
        for n in range(first, first + 50):
            author.say(f"text {n}.", f"m{n}")
        while author.next("message")["mid"] != f"m{first + 49}":
            pass
    shown(page, "text 1049.").wait_for()
    texts = page.locator(".text").all_inner_texts()
    assert texts == [f"text {n}." for n in range(1050 - len(texts), 1050)]
    assert 800 <= len(texts) <= 1000  # older ones come back on scrolling up
    assert page.is_hidden("#newest")


def test_what_is_refused_can_be_discarded_or_tried_again(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    write(page, "/msg nobody hi")
    failed = page.locator(".failed", has_text="Not sent: No such room or person")
    failed.get_by_role("button", name="Try again").click()
    failed.get_by_role("button", name="Discard").click()
    failed.wait_for(state="detached")
    side(page, "lobby").click()
    write(page, "/help")
    page.locator(".notice", has_text="/msg bob hi").wait_for()
    write(page, "/dance")
    page.locator(".notice", has_text="unknown command").wait_for()


def test_older_pages_load_without_a_jump(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve(rate="0")
    author = write_texts(server, 160)
    page = open_page(server, "user1")
    shown(page, "text 159.").wait_for()
    assert page.locator(".message").count() == 50
    top = """() => [...document.querySelectorAll(".text")].map((one) =>
        [one.textContent, Math.round(one.getBoundingClientRect().top)]).find(([, y]) => y > 60)"""
    for count in (100, 150, 160):
        page.evaluate("""() => { const log = document.getElementById("chatLog");
            log.scrollTop = log.clientHeight - log.scrollHeight; }""")
        text, before = page.evaluate(top)
        page.locator(".message").nth(count - 1).wait_for()
        texts = page.locator(".text").all_inner_texts()
        after = page.locator(".text").nth(texts.index(text)).bounding_box()
        assert abs(after["y"] - before) < 3
    assert texts == [f"text {n}." for n in range(160)]
    author.say("the newest", "m")
    page.get_by_role("button", name="1 new below").click()
    page.locator("#newest").wait_for(state="hidden")
    assert page.evaluate("() => document.getElementById('chatLog').scrollTop") == 0


def test_the_wire_shows_requests_and_frames_but_no_secret(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    page.get_by_role("button", name="Wire").click()
    write(page, "look at this")
    shown(page, "look at this").wait_for()
    for wanted in (
        "POST /login 200",
        "101: the connection stops being HTTP here. Subprotocol lobby.v1 was picked.",
        "to everybody in lobby.",
        "it is on disk. This is the receipt.",
        "user1 came into lobby.",
    ):
        entry(page, wanted.replace("/login 200", "/login")).wait_for()
    for summary in page.locator("#list summary").all():
        summary.click()
    page.locator("#list pre", has_text='"text": "look at this"').first.wait_for()
    texts = "".join(page.locator("#list").all_inner_texts())
    secret = page.evaluate("() => JSON.parse(sessionStorage.getItem('lobby.login')).token")
    assert secret.count(".") == 2
    assert secret[:10] + "…" in texts and secret[20:40] not in texts
    assert PASSWORDS["user1"] not in texts
    assert "hidden from scripts" in texts
    page.get_by_text("Headers and body").click()
    page.get_by_label("Method").select_option("POST")
    page.get_by_label("Body").fill(r'{"old": "hunter2", "password": "a\"b-tail\\", "x": 1}')
    page.locator("#go").click()
    page.get_by_text("as the server saw them").wait_for()  # what is hidden leaves it JSON
    texts = page.locator("#list details[open]").last.inner_text()
    assert '"x"' in texts
    assert "hunter2" not in texts
    assert "tail" not in texts
    page.get_by_label("Filter").fill("this is the receipt")
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(page.locator("#list li")).to_have_count(1)
    page.get_by_label("Filter").fill("")
    page.get_by_role("button", name="Pause").click()
    count = page.locator("#list li").count()
    write(page, "unseen")
    shown(page, "unseen").wait_for()
    assert page.locator("#list li").count() == count
    page.get_by_role("button", name=re.compile("Paused, [1-9]")).click()
    entry(page, "unseen").wait_for()
    assert page.locator("#list details[open]").count() == count  # they stay open
    page.get_by_role("button", name="Explain").click()
    entry(page, "unseen").locator(".sentence").wait_for(state="hidden")
    shown(page, "unseen").hover()
    page.get_by_role("button", name="On the wire").click()
    page.locator("#list details[open] pre", has_text='"text": "unseen"').wait_for()


def test_the_wires_form_talks_to_the_server(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    page.get_by_role("button", name="Wire").click()
    page.get_by_text("Answered by chapter 2, Looking at a request").wait_for()
    page.get_by_text("Headers and body").click()
    wire = page.get_by_role("complementary", name="The wire")

    def seen(kind: str, method: str = "POST", body: str = "") -> Any:
        path = f"/inspect/{kind}"
        wire.get_by_label("Method").select_option(method)
        wire.get_by_label("Body", exact=True).fill(body)
        wire.get_by_label("Path").fill(f"{path}?a=1&a=2")
        wire.get_by_role("button", name="Send", exact=True).click()
        answer = page.locator("#list li", has_text=path).locator(".card pre").last
        answer.wait_for()
        return json.loads(answer.inner_text())

    answer = seen("query", "GET", "a browser sends no body with GET")
    assert (answer["method"], answer["query_params"]) == ("GET", {"a": ["1", "2"]})
    assert ["x-example", "hello"] in answer["headers"]
    page.get_by_text("as the server saw them").wait_for()
    assert seen("JSON", body='{"hello": "world"}')["json"] == {"hello": "world"}
    assert seen("form", body="name=Ann\nname=Bob")["form"] == {"name": ["Ann", "Bob"]}
    assert seen("text", body="plain words")["body"]["text"] == "plain words"
    wire.get_by_label("Headers").fill("content-type: text/csv")
    answer = seen("csv", body='{"a": 1}')
    assert [value for name, value in answer["headers"] if name == "content-type"] == ["text/csv"]
    wire.get_by_label("Headers").fill("")
    content = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"hello"}
    wire.get_by_label("File").set_input_files([content])
    answer = seen("file", body="name=Ann")
    assert (answer["files"][0]["filename"], answer["form"]) == ("a.txt", {"name": ["Ann"]})
    wire.get_by_label("Method").select_option("WS")
    wire.get_by_label("Path").fill("//example.org/ws")
    wire.get_by_role("button", name="Open").click()
    wire.get_by_text("Only paths of this server.").wait_for()
    for path, answered, chapter in [
        ("/ws", 'Message text was: {"a": 1}', 3),
        ("/ws/json", '{"received":{"a":1}}', 3),
        ("/ws/inspect", '"kind":"text"', 3),
        ("/ws/protected", "user1 says:", 7),
        ("/ws/{session_id}", ': {"a": 1}', 4),
    ]:
        wire.get_by_label("Path").fill(path)
        wire.get_by_text(f"Answered by chapter {chapter}").wait_for()
        wire.get_by_role("button", name="Open").click()
        wire.get_by_role("button", name="Send text").click()
        entry(page, answered).wait_for()
        wire.get_by_role("button", name="Close", exact=True).click()
        wire.get_by_role("button", name="Open").wait_for()


def test_enter_in_the_wires_text_sends_it(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    page.get_by_role("button", name="Wire").click()
    page.get_by_label("Method").select_option("WS")
    page.get_by_role("button", name="Open").click()
    page.locator("#sendFrame:enabled").wait_for()
    page.get_by_label("Text to send").fill('{"type":"x","text":5}')  # no event of ours
    page.get_by_label("Text to send").press("Enter")
    entry(page, '{"received":{"type":"x","text":5}}').wait_for()


def test_the_newest_entry_of_the_wire_opens_in_sight(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    write_texts(server, 20)
    page = open_page(server, "user1")
    page.get_by_role("button", name="Wire").click()
    for n in range(8):
        write(page, f"mine {n}")
        shown(page, f"mine {n}").wait_for()
    entry(page, "mine 7").click()
    card = page.locator("#list .card")
    card.wait_for()
    frames, box = page.locator("#frames").bounding_box(), card.bounding_box()
    assert box["y"] + box["height"] <= frames["y"] + frames["height"] + 1


def test_somebody_who_comes_costs_the_server_no_request(
    serve: Callable[..., Server], open_page: Callable[..., Any]
) -> None:
    server = serve()
    page = open_page(server, "user1")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    server.chat(server.token("user2"))
    side(page, "user2").wait_for()
    assert asked == []


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, from its npm package; without it, its test is skipped."""
    folder = os.environ.get("NODE_MODULES", HERE / "node_modules")
    path = Path(folder, "axe-core", "axe.min.js")
    if not path.exists():
        pytest.skip("no axe-core: npm install axe-core, and set NODE_MODULES to where it is")
    return path.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_inaccessible(
    serve: Callable[..., Server], open_page: Callable[..., Any], axe: str, scheme: str
) -> None:
    def check(page: Any) -> None:
        page.evaluate(axe)
        found = page.evaluate("() => axe.run()")["violations"]
        assert [(one["id"], one["nodes"][0]["failureSummary"]) for one in found] == []

    server = serve()
    page = open_page(server, "", log_in=False)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    check(page)
    page.fill("#username", "a b")
    page.get_by_role("button", name="Register").click()
    page.locator("#usernameProblem:not(:empty)").wait_for()
    check(page)
    other, page = page, open_page(server, "admin", beside=page)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    write(page, "see https://example.org and `code` @admin")
    author = server.chat(server.token("user2"))
    author.send("message", to="admin", text="hello", mid="m1")
    page.get_by_role("button", name="user2 1 unread").wait_for()
    write(page, "/msg nobody hi")
    page.locator(".failed").wait_for()
    check(page)
    side(page, "lobby").click()
    write(page, "/search see")
    page.get_by_role("button", name="Go there").wait_for()
    check(page)
    page.get_by_role("button", name="Back to lobby").click()
    page.get_by_role("button", name="Wire").click()
    page.get_by_text("Headers and body").click()
    page.locator("#go").click()
    page.locator("#list details[open]").wait_for()
    check(page)
    page.get_by_role("button", name="Close the wire").click()
    page.get_by_role("button", name="More people").click()
    page.get_by_label("Find a person").fill("user1")
    page.locator(".found").get_by_role("button", name="user1").wait_for()
    check(page)
    page.locator(".found").get_by_role("button", name="user1").click()
    page.get_by_role("button", name="Ban", exact=True).click()
    check(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Your menu").click()
    check(page)
    page.get_by_role("button", name="Change password").click()
    check(page)
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="Rooms and people").click()
    check(page)
    assert other.is_visible("#username")


# -- README --------------------------------------------------------------------------------


def readme(language: str = "", containing: str = "") -> str:
    """Its text or, with a language, the first block of it that contains this."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not language:
        return text
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(next(block for block in blocks if containing in block))


def table(heading: str) -> list[list[str]]:
    """The cells of the README's table under this heading, without their backquotes."""
    section = readme().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().replace("`", "") for cell in row.split("|")[1:-1]] for row in rows]


def test_the_readme_lists_every_route() -> None:
    routes = [route for row in table("Routes") for route in row[0].split(", ")]
    documented = {tuple(route.split(" ", 1)) for route in routes}
    assert len(documented) == len(routes)
    real = set()
    for route in app.routes:
        if route.name in ("openapi", "swagger_ui_html", "swagger_ui_redirect", "redoc_html"):
            continue
        methods = getattr(route, "methods", {"WS"}) or {"ANY"}
        real |= {(method, route.path) for method in methods}
    assert documented == real


def test_the_readme_lists_every_setting_with_its_default() -> None:
    documented = {row[0]: row[1] for row in table("Settings")}
    real = {}
    for name, setting in Settings.model_fields.items():
        default = setting.default
        shown = str(int(default)) if isinstance(default, bool) else str(default)
        real[f"CHAT_{name.upper().rstrip('_')}"] = "" if default in (None, frozenset()) else shown
    assert documented == real


def part(answer: Any, expected: Any) -> Any:
    """What of an answer stands in ``expected``, too."""
    return {key: answer[key] for key in expected} if isinstance(expected, dict) else answer


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# For each route of chapters 2 and 4, as it is decorated: a request, and a part of its answer.
COPIED_ROUTES: dict[tuple[str, str], tuple[tuple[str, str, dict[str, Any]], Any]] = {
    ("get", "/items/"): (
        ("GET", "/items/?q=tea", {}),
        {"client_host": "127.0.0.1", "q": "tea"},
    ),
    ("get", "/items/{item_id}"): (
        ("GET", "/items/5", {}),
        {"item_id": 5, "client_host": "127.0.0.1"},
    ),
    ("get", "/user-agent"): (
        ("GET", "/user-agent", {"headers": {"User-Agent": "teapot/1"}}),
        {"user_agent": "teapot/1"},
    ),
    ("post", "/submit"): (
        ("POST", "/submit?a=1", {"json": [1]}),
        {"method": "POST", "query_params": {"a": "1"}, "data": [1]},
    ),
    ("get", "/http-endpoint"): (("GET", "/http-endpoint", {"json": 1}), {"received_data": 1}),
    ("post", "/http-endpoint"): (("POST", "/http-endpoint", {"json": 1}), {"received_data": 1}),
    ("post", "/inspect"): (
        ("POST", "/inspect", {"content": b"tea"}),
        {"method": "POST", "body": {"size": 3, "sha256": sha256(b"tea"), "text": "tea"}},
    ),
    ("api_route", "/inspect"): (
        ("PURGE", "/inspect?x=1", {"content": b"tea"}),
        {"method": "PURGE", "body": {"size": 3, "sha256": sha256(b"tea"), "text": "tea"}},
    ),
    ("api_route", "/inspect/{path:path}"): (
        ("PUT", "/inspect/a/b", {"data": {"a": "1"}}),
        {"method": "PUT", "path_params": {"path": "a/b"}, "form": {"a": ["1"]}},
    ),
    ("post", "/body/json"): (("POST", "/body/json", {"json": [1]}), [1]),
    ("post", "/body/form"): (
        ("POST", "/body/form", {"data": {"a": "1"}, "files": FILE}),
        {"fields": {"a": ["1"]}, "files": [FILE_SEEN]},
    ),
    ("post", "/body/raw"): (
        ("POST", "/body/raw", {"content": b"x" * 2**21}),
        {"size": 2**21, "sha256": sha256(b"x" * 2**21)},
    ),
    ("post", "/body/stream"): (
        ("POST", "/body/stream", {"content": b"x" * 2**22}),
        {"size": 2**22, "sha256": sha256(b"x" * 2**22)},
    ),
    ("post", "/body/twice"): (("POST", "/body/twice", {"content": b"{}"}), {}),
    ("post", "/create-session"): (("POST", "/create-session", {}), {"expires_in": 3600}),
    ("get", "/session/{session_id:uuid}"): (
        ("GET", "/session/{id}", {}),
        {"session_id": "{id}", "client_host": "127.0.0.1", "sockets": 0},
    ),
}
# For each socket of chapters 3 and 4: how often it speaks first, and what answers "1".
COPIED_SOCKETS = {
    "/ws-endpoint": (0, "Message text was: 1"),
    "/ws": (0, "Message text was: 1"),
    "/ws/json": (0, '{"received":1}'),
    "/ws/inspect": (
        1,
        json.dumps({"kind": "text", "size": 1, "sha256": sha256(b"1"), "text": "1"}),
    ),
    "/ws/{session_id:uuid}": (0, "Session {id}: 1"),
}


def test_chapters_1_to_4_copied_out_are_a_program(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    source = (HERE / "app.py").read_text()
    banner = re.search(r"^(# =+\n)?# 5\. ", source, re.MULTILINE)
    assert banner
    copied = source[: banner.start()]
    decorated = re.findall(r"^@app\.(\w+)\(\"([^\"]+)\"", copied, re.MULTILINE)
    sockets = {("websocket", path) for path in COPIED_SOCKETS}
    assert set(decorated) == COPIED_ROUTES.keys() | sockets
    program = tmp_path / "copied.py"
    program.write_text(f"{copied}\nimport uvicorn; uvicorn.run(app, port=0)\n")
    server = serve(command=[str(program)])
    with httpx2.Client(base_url=server.url, timeout=20) as http:
        id = http.post("/create-session").json()["session_id"]
        for (method, path, options), expected in COPIED_ROUTES.values():
            answer = http.request(method, path.replace("{id}", id), **options)
            assert answer.status_code == 200, path
            assert answer.headers["X-Custom-Header"] == "Custom Value"
            wanted = json.loads(json.dumps(expected).replace("{id}", id))
            assert part(answer.json(), expected) == wanted, path
        assert len(http.post("/body/twice", content=b"{}").json()["reads"]) == 16
        body = b"x" * 2**21
        for content in (body, iter([body])):  # as it is, and chunked
            answer = http.post("/http-endpoint", content=content)
            assert answer.status_code == 413
            assert answer.json() == {"detail": "The body is larger than 1,048,576 bytes"}
        assert http.get("/items/no").json().keys() == {"detail"}
        unknown = http.get(f"/session/{uuid.uuid4()}")
        assert (unknown.status_code, unknown.json()) == (404, {"detail": "Unknown session"})
    for path, (greetings, expected) in COPIED_SOCKETS.items():
        url = path.replace("{session_id:uuid}", id)
        with server.connect(url) as websocket:
            for _ in range(greetings):
                websocket.recv(timeout=20)
            websocket.send("1")
            answered = str(websocket.recv(timeout=20)).replace(": ", ":").replace(", ", ",")
            wanted = expected.replace("{id}", id).replace(": ", ":").replace(", ", ",")
            assert answered == wanted
            if path == "/ws-endpoint":
                with pytest.raises(ConnectionClosed) as closed:
                    websocket.recv(timeout=20)
                assert closed.value.rcvd and closed.value.rcvd.code == 1000
        for refused_url, origin in ((url, "https://evil.example"), ("/ws/nope", None)):
            with pytest.raises(InvalidStatus) as denied:
                server.connect(refused_url, origin=origin)
            assert denied.value.response.status_code == 403
        with server.connect(url, origin=server.url):
            pass
    with server.connect(f"/ws/{uuid.uuid4()}") as websocket:
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=20)
        assert closed.value.rcvd and closed.value.rcvd.code == 1008
        assert closed.value.rcvd.reason == "Unknown session"
    assert "Traceback" not in server.log.read_text()


def test_the_readmes_walk_through_gives_the_printed_answers(serve: Callable[..., Server]) -> None:
    """Its curl commands and its socket session, run as they stand but for port and token."""
    text = readme()
    server = serve()
    command, answer = re.search(r"\$ (curl [^$]*?)\n(\{.*\})", text).groups()  # type: ignore[union-attr]
    assert shutil.which("curl"), "curl is not installed"
    command = command.replace("http://localhost:8000", server.url).replace("\\\n", "")
    printed = json.loads(subprocess.check_output(command, shell=True, timeout=20))
    assert printed.keys() == json.loads(answer.replace("eyJhbGciOi...", "eyJhbGciOi")).keys()
    assert printed["expires_in"] == json.loads(answer)["expires_in"]
    session = re.search(r"\$ [^\n]* -m websockets [^\n]*\n(.*?)```", text, re.DOTALL)
    assert session
    with server.connect(f"/ws/chat?token={printed['access_token']}") as websocket:
        for line in session[1].strip().splitlines():
            if line.startswith("> "):
                websocket.send(line[2:])
            elif line.startswith("< "):
                assert websocket.recv(timeout=20) == line[2:]


def test_the_readmes_first_registration_makes_the_admin(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    command, answer = re.search(r"\$ (curl [^$]*/register[^$]*?)\n(\{.*\})", readme()).groups()  # type: ignore[union-attr]
    server = serve(db=str(tmp_path / "team.db"), demo_users="0")
    command = command.replace("http://localhost:8000", server.url)
    assert subprocess.check_output(command, shell=True, timeout=20, text=True) == answer


def test_the_session_socket_alone_is_a_program(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """Of what README says is to be copied for it."""
    source = (HERE / "app.py").read_text(encoding="utf-8")

    def cut(start: str, end: str) -> str:
        found = re.search(rf"^{start}.*?(?={end})", source, re.DOTALL | re.MULTILINE)
        assert found, start
        return f"{found[0]}\n\n\n"

    row = re.findall(r"^\| the session socket alone \|(.*?)\|", readme(), re.MULTILINE)[0]
    names = re.findall(r"`(\w+)`", row)
    helpers = [cut(rf"(?:async )?def {name}\(", r"\n\n\n") for name in names]
    chapters = cut("from __future__", "^# 2[.] "), cut("# 4[.] ", "^# 5[.] ")
    program = tmp_path / "copied.py"
    run = "import uvicorn; uvicorn.run(app, port=0)\n"
    program.write_text(chapters[0] + "".join(helpers) + chapters[1] + run, encoding="utf-8")
    server = serve(command=[str(program)])
    path = f"/ws/{server.request('/create-session', {})['session_id']}"
    with server.connect(path) as one, server.connect(path) as two:
        one.send("hello")
        assert one.recv(timeout=20) == two.recv(timeout=20) == f"Session {path[4:]}: hello"
    assert "Traceback" not in server.log.read_text()


def test_the_readme_lists_what_a_client_may_send() -> None:
    section = readme().split("| you send |")[1].split("| you receive |")[0]
    words = set(re.findall(r'"(\w+)"', section))
    model = lobby.Incoming.model_fields
    assert words == {*model["type"].annotation.__args__, *model}


@pytest.mark.parametrize("rate", ["0", "10"])
def test_the_readmes_client_loses_and_repeats_nothing(
    serve: Callable[..., Server], tmp_path: Path, rate: str
) -> None:
    """As printed: it starts while there is no server. The first one is killed when it has stored
    some of the messages and told nobody, then more is said than a history shows, and the next one
    takes all that is sent again, or refuses what is sent too fast."""
    program, seen = tmp_path / "client.py", tmp_path / "seen.txt"
    program.write_text(readme("python", "unsent"))
    server = serve()
    port, secret, other = server.port, server.token(), bearer_of(server.token("user2"))
    sent, missed = [f"{n}" for n in range(40)], [f"{n}" for n in range(60)]
    command = [sys.executable, program, f"ws://127.0.0.1:{port}/ws/chat", secret, *sent]
    said = sorted([f"user1: {text}" for text in sent] + [f"user2: {text}" for text in missed])
    is_told = 'any("mid" in event for event in events)'
    die = f"{is_told} and app.os.kill(app.os.getpid(), 9)"
    server.stop()
    with seen.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as client:
        try:
            change = f"app.ConnectionManager.broadcast = lambda self, room, events: {die}"
            serve(port=f"{port}", program=change).process.wait(20)
            elsewhere = serve()
            for text in missed:
                elsewhere.request("/rooms/lobby/messages", {"text": text}, **other)
            elsewhere.stop()
            server = serve(port=f"{port}", rate=rate)
            for _ in range(400):
                if len(seen.read_text().splitlines()) >= len(said):
                    break
                time.sleep(0.05)
            request = urllib.request.Request(f"{server.url}/logout", b"", bearer_of(secret))
            urllib.request.urlopen(request, timeout=20).close()
            assert client.wait(timeout=20) == 1
        finally:
            client.kill()
    *lines, reason = seen.read_text().splitlines()
    assert reason == "Unauthorized: Logged out"
    assert sorted(lines) == said
    with closing(sqlite3.connect(tmp_path / "chat.db")) as db:
        stored = db.execute("SELECT user, text FROM messages").fetchall()
    assert sorted(f"{user}: {text}" for user, text in stored) == said


ELSEWHERE = ("127.0.0.2", 0)  # an address that is not the proxy's, on Linux


@pytest.fixture(params=["caddy", "nginx"])
def proxied(
    request: pytest.FixtureRequest, serve: Callable[..., Server], tmp_path: Path
) -> Iterator[tuple[Server, int]]:
    """A server behind a proxy as README sets it up, and the proxy's port; without TLS."""
    if sys.platform != "linux" or not shutil.which(request.param):
        pytest.skip(f"no {request.param}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = serve(origins=f"http://chat.example.org:{port}")
    if request.param == "caddy":
        text = "{\nadmin off\n}\nhttp://" + readme("caddyfile")
        text = text.replace("chat.example.org", f"chat.example.org:{port}")
        command = ["caddy", "run", "--adapter", "caddyfile", "--config"]
    else:
        text = re.sub(r"^ *ssl_.*\n", "", readme("nginx"), flags=re.MULTILINE)
        text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
        text = f"events {{}}\nhttp {{ access_log off;\n{paths}{text}}}"
        text = f"daemon off; user root; pid {tmp_path}/pid;\n{text}"
        command = ["nginx", "-e", "stderr", "-c"]
    config = tmp_path / "proxy.conf"
    config.write_text(text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"))
    home = os.environ | {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    with subprocess.Popen([*command, str(config)], env=home) as proxy:
        try:
            for _ in range(200):
                with (
                    suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), 20, ELSEWHERE),
                ):
                    break
                time.sleep(0.05)
            yield server, port
        finally:
            proxy.terminate()


def test_behind_a_proxy_everything_works_as_the_readme_sets_it_up(
    proxied: tuple[Server, int],
) -> None:
    server, port = proxied
    host, secret = f"chat.example.org:{port}", server.token()

    def request(method: str, path: str, body: bytes = b"", **headers: str) -> Any:
        client = http.client.HTTPConnection("127.0.0.1", port, 20, ELSEWHERE)
        with closing(client):
            client.request(method, path, body, {"Host": host, **headers})
            answer = client.getresponse()
            return answer.status, answer.read()

    assert request("GET", "/")[0] == 200
    forged = {"X-Forwarded-For": "203.0.113.9"}
    status, body = request("GET", "/items/5", **forged)
    assert (status, json.loads(body)["client_host"]) == (200, "127.0.0.2")
    assert json.loads(request("GET", "/inspect")[1])["url"]["host"] == "chat.example.org"
    assert request("POST", "/body/raw", b"x" * 2**21)[0] == 200
    url, offers = f"ws://{host}/ws/chat", ["lobby.v1", f"bearer.{secret}"]

    def open_socket(origin: str) -> ClientConnection:
        line = socket.create_connection(("127.0.0.1", port), 20, ELSEWHERE)
        return connect(url, sock=line, origin=origin, subprotocols=offers, compression=None)

    with open_socket(f"http://{host}") as websocket:
        conversation = Chat(lambda: str(websocket.recv(timeout=20)), websocket.send)
        conversation.say("x" * 4_000, "m1")
        assert conversation.next("message")["mid"] == "m1"
    with pytest.raises(InvalidStatus) as denied:
        open_socket("https://evil.example")
    assert denied.value.response.status_code == 403
    assert "connected 'user1' from 127.0.0.2" in server.log.read_text()


def test_the_readmes_backup_is_a_database(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Made while the server runs; a client that knows newer messages is told that they are gone."""
    server = serve()
    secret = server.token()
    conversation = server.chat(secret)
    conversation.say("kept", "m1")
    with closing(sqlite3.connect(tmp_path / "chat.db")) as db:
        (epoch,) = db.execute("SELECT name FROM epoch").fetchone()
    assert conversation.next("message")["text"] == "kept"
    commands = readme("sh", ".backup").splitlines()
    assert len(commands) == 3
    assert shutil.which("sqlite3"), "sqlite3 is not installed"
    for command in commands:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=20)
    conversation.say("lost", "m2")
    lost = conversation.next("message")
    server.stop()
    copy = serve(db=str(tmp_path / "copy.db"))
    path, offers = f"/ws/chat?after={lost['id']}&epoch={epoch}", ["lobby.v1", f"bearer.{secret}"]
    with copy.connect(path, subprotocols=offers) as websocket:
        history = Chat(lambda: str(websocket.recv(timeout=20)), websocket.send).next("history")
    assert [message["text"] for message in history["messages"]] == ["kept"]
    assert not history["complete"]


def test_every_test_that_the_readme_names_exists() -> None:
    named = re.findall(r"`(\w+)` \|$", readme().split("## What it withstands")[1], re.MULTILINE)
    tests = (HERE / "test_app.py").read_text(encoding="utf-8")
    assert len(named) > 20
    assert [name for name in named if f"\ndef test_{name}(" not in tests] == []


def test_the_inline_metadata_names_the_same_packages_as_requirements() -> None:
    source = (HERE / "app.py").read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", source, re.DOTALL | re.MULTILINE)
    assert block
    metadata = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    lines = (HERE / "requirements.txt").read_text().split("# for the tests")[0].split()
    assert metadata["dependencies"] == lines
    assert metadata["requires-python"] == ">=3.11"
