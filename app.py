# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "fastapi>=0.165",
#     "uvicorn[standard]>=0.52.1",
#     "pyjwt>=2.13",
#     "python-multipart>=0.0.27",
# ]
# ///
"""Lobby: FastAPI's ``Request`` and ``WebSocket``, taught and put to work in one file.

    python app.py            then open http://127.0.0.1:8000 and log in as user1 / password1
    pytest test_app.py

It is meant to be read from top to bottom: the easy comes first, and each chapter has one
idea. Chapters 1 to 4, copied out with the imports above them, are a program that runs.

     1  The application       what wraps every request, and how every error becomes an answer
     2  Looking at a request  everything ``Request`` can tell, and four ways to read a body
     3  Talking over a socket from one answer to a conversation
     4  Sessions              context made over HTTP; a reader and a writer side by side
     5  Settings              what can be changed without touching the code
     6  Storage               the only SQL: reading is a call, changing is one transaction
     7  Knowing a user        passwords, log-ins, tokens, and who is asking
     8  Roles                 what somebody may do, and how others are stopped
     9  Rooms                 a room is a log, a client is a set of cursors into logs
    10  The chat              its events, its socket and its HTTP routes
    11  Serving               what starts and what ends, and ``python app.py``
    12  Several processes     one feed for all of them; with one process nobody needs it
    13  The page              HTML, CSS and JavaScript in one constant

The words used throughout:

    person   somebody with a name, a password and a role; ``me`` is the one who asks
    log-in   a row that says that a password was right; each token names one by its ``sid``
    room     a named conversation; @alice+bob is the private one of these two
    change   what somebody wants done: to send, to delete, to log in, to ban; it is *posted*
    event    what it becomes: a JSON object with a "type", as sockets receive it
    message  an event that is stored, and so has an id; ids grow in the order of storing
    mid      the sender's own id for a message, by which a repeated sending is recognised
    client   one open chat socket; a cursor says how far it has read a room's log
    epoch    the name of one database's history, so that ids of another are not mistaken for ours
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gc
import hashlib
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import socket
import sqlite3
import sys
import time
import unicodedata
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import jwt
import uvicorn
from fastapi import Body, Depends, FastAPI, HTTPException, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError, WebSocketException
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError, ValidationError, from_json, to_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect, WebSocketState
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode

log = logging.getLogger("lobby")
KIB, MIB, GIB = 2**10, 2**20, 2**30  # bytes


# 1. The application ===================================================================
# Whatever is refused, by whichever chapter, is raised as one exception, and one table says
# what that means for a request and for a socket. One middleware wraps everything: it gives
# each request an id, times it, and survives its bugs. So no route has to answer for failures.

app = FastAPI(title="Lobby")
app.state.origins = frozenset()  # further ones whose pages are welcome, by chapter 11
SANE_ID = re.compile(r"[\w.~+/=:-]{1,128}", re.ASCII)  # of a request, which its client may give
MAX_BACKSLASHES = 100  # of cookies: to unquote them takes Python the square (CVE-2024-7592)
# Why something is refused, as an HTTP status. A socket closes with 1008, which is final (RFC 6455,
# section 7.4.1), or where it may be tried again later, with 1013 (IANA's registry of close codes).
REFUSALS = {"invalid": 422, "too_long": 422, "unauthorized": 401, "forbidden": 403, "unknown": 404}
REFUSALS |= {"unknown_room": 404, "conflict": 409, "rate_limited": 429, "unavailable": 503}
REFUSALS["restart"] = 503  # with 1012: other processes may be able to


class Refused(Exception):
    """Why something is not done; ``retry_after``: in how many seconds it may be, if ever."""

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


def must(condition: Any, code: str, words: str, retry_after: float | None = None) -> None:
    if not condition:
        raise Refused(code, words, retry_after)


class Problem(BaseModel):
    """What is answered instead: what to change, or for each thing that is wrong where and why."""

    detail: str | list[dict[str, Any]]


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For /docs: a route may be refused with these."""
    return {status: {"model": Problem} for status in statuses}


def begin_chapter(tag: str, *statuses: int) -> None:
    """For /docs: the routes from here on have this tag, and may be refused with these."""
    app.router.tags, app.router.responses = [tag], answers(403, *statuses)


@app.exception_handler(Refused)
async def refused(connection: Request | WebSocket, error: Refused) -> Response | None:
    status = REFUSALS[error.code]
    if isinstance(connection, WebSocket):
        code = 1012 if error.code == "restart" else 1013 if status in (429, 503) else 1008
        await close_socket(connection, WebSocketException(code, str(error)))
        return None
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}  # RFC 6750, section 3
    if error.retry_after:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    return JSONResponse({"detail": str(error)}, status, headers)


@app.exception_handler(RequestValidationError)
async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong where, without sending the input, a password perhaps, back."""
    wrong = [{key: one[key] for key in ("type", "loc", "msg")} for one in error.errors()]
    return JSONResponse({"detail": wrong}, 422)


@app.exception_handler(WebSocketException)
async def close_socket(websocket: WebSocket, error: WebSocketException) -> None:
    """Close a socket so that its client sees why: one that is not accepted is a bare 1006."""
    log.info("closed %r: %d %s", websocket.url.path, error.code, error.reason)
    if websocket.application_state is WebSocketState.CONNECTING:
        await websocket.accept()
    if websocket.application_state is WebSocketState.CONNECTED:
        with suppress(TimeoutError):  # it may not read
            await asyncio.wait_for(websocket.close(error.code, error.reason), timeout=1)


@functools.lru_cache(1_024)
def is_loopback(host: str) -> bool:
    """Whether this name or address can only mean this machine."""
    with suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def why_foreign(scope: Scope, headers: Headers) -> str | None:
    """Why another site may be behind this request. Any page may open sockets here: browsers only
    say whose it is. And a site's name may be made to mean this machine (DNS rebinding)."""
    host, origin = headers.get("host", "localhost"), headers.get("origin")
    own = (f"{scheme}://{host}" for scheme in ("http", "https"))
    origins = app.state.origins
    if scope["type"] == "websocket" and origin not in (None, *own, *origins):
        return f"A page of {str(origin)[:255]!r} may not open sockets; CHAT_ORIGINS may name it"
    at, name = scope.get("server") or ("", 0), ""
    with suppress(ValueError):  # for what is no host
        name = (urlsplit(f"//{host}").hostname or "")[:255]  # no name is longer (RFC 1035)
    known = (urlsplit(one).hostname for one in origins)
    if is_loopback(at[0]) and not is_loopback(name) and name not in known:
        return f"The host {name!r} is not known here; CHAT_ORIGINS may name its origin"
    return None


class RequestContextMiddleware:
    """Pure ASGI: BaseHTTPMiddleware passes sockets by, and halves the requests a second."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        started, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if SANE_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = id

        own = [(b"x-custom-header", b"Custom Value"), (b"x-request-id", id.encode())]

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                took = (b"x-process-time", b"%.6f" % (time.perf_counter() - started))
                message["headers"] = [*message.get("headers", ()), *own, took]
            await send(message)

        async def refuse(status: int, why: str) -> None:
            if scope["type"] == "websocket":  # before it is accepted, this is a 403
                await send({"type": "websocket.close", "code": 1011 if status == 500 else 1000})
            else:
                await JSONResponse({"detail": why}, status)(scope, receive, send_with_headers)

        try:
            if reason := why_foreign(scope, headers):
                log.info("refused: %s", reason)
                await refuse(403, reason)
            elif headers.get("cookie", "").count("\\") > MAX_BACKSLASHES:
                await refuse(400, "The cookies have too many backslashes")
            else:
                await self.app(scope, receive, send_with_headers)
        except (ClientDisconnect, ClientDisconnected, WebSocketDisconnect):
            pass  # they left, and nothing is left to do
        except Exception:
            log.exception("unexpected error in %s %r", scope["type"], scope["path"])
            with suppress(Exception):  # it may have been answered already
                await refuse(500, "Internal Server Error")


app.add_middleware(RequestContextMiddleware)


# 2. Looking at a request ==============================================================
# A request's head is there at once; its body arrives later, in pieces, once, and from somebody who
# may not mean well. `Request` is the view of both. The first routes show one thing each, `/inspect`
# all of it, `/body/...` the four ways to read a body, each with limits, and reading it twice.

begin_chapter("2. Looking at a request")


@app.get("/items/")
async def read_items(request: Request, q: str | None = None) -> dict[str, Any]:
    """What the query says, and who asks."""
    return {"client_host": client_host(request), "q": q}


@app.get("/items/{item_id}")
async def read_item(item_id: int, request: Request) -> dict[str, Any]:
    """A part of the path as an integer; anything else is a 422."""
    return {"item_id": item_id, "client_host": client_host(request)}


def client_host(connection: HTTPConnection) -> str | None:
    return connection.client.host if connection.client else None  # some servers know none


async def user_agent(request: Request) -> str | None:  # a dependency may take the Request too
    return request.headers.get("user-agent")


@app.get("/user-agent")
async def read_user_agent(agent: Annotated[str | None, Depends(user_agent)]) -> dict[str, Any]:
    """A header, read in a dependency."""
    return {"user_agent": agent}


BODY_SECONDS = 20  # how long the next piece is waited for, and
BODY_RATE = 16 * KIB  # bytes a second that come at least, as by Apache's mod_reqtimeout
FREE_BODY = 64 * KIB  # bytes of a body that are always taken; so small ones always fit
MAX_BODIES = 48 * MIB  # bytes, beyond these, of all bodies on their way into memory
MAX_IN_MEMORY = 16 * MIB  # of one body; a route that takes more must read it chunk by chunk
MAX_BODY = 1 * MIB  # of one body, but for these routes:
MAX_BODY_OF = {"/body/raw": MAX_IN_MEMORY, "/body/stream": 1 * GIB, "/body/twice": 64 * KIB}


class BodyMiddleware:
    """Ends bodies that come too slowly or are too large, as they come, alone or together."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time
        deadline: float | None = now() + BODY_SECONDS
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        limit = MAX_BODY_OF.get(path, MAX_BODY)
        size = held = 0

        async def receive_in_time() -> Message:
            nonlocal deadline, size, held
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                close = {"Connection": "close"}
                raise HTTPException(408, "The body came too slowly", close) from None
            body = message.get("body", b"")
            size += len(body)
            if size > limit:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes")
            if deadline is None or not message.get("more_body"):
                deadline = None  # it is whole, and the next message is that the client has left
                return message
            deadline = min(deadline + len(body) / BODY_RATE, now() + BODY_SECONDS)
            if limit <= MAX_IN_MEMORY:
                more = max(0, size - FREE_BODY) - held
                may = not more or self.held + more <= MAX_BODIES
                must(may, "unavailable", "Too many large bodies at once", BODY_SECONDS)
                held, self.held = held + more, self.held + more
            return message

        try:
            await self.app(scope, receive_in_time if scope["type"] == "http" else receive, send)
        finally:
            self.held -= held


app.add_middleware(BodyMiddleware)
OF_BODY = answers(400, 408, 413, 503)
FILE = {"type": "string", "format": "binary"}
BODIES: dict[str, Any] = {
    "application/json": {},
    "multipart/form-data": {"type": "object", "properties": {"text": {}, "file": FILE}},
    "application/octet-stream": FILE,
}


def reads(*kinds: str, **more: Any) -> dict[str, Any]:
    """For /docs: a route that reads the ``Request`` itself takes these bodies, to try it with."""
    body = {"content": {kind: {"schema": BODIES[kind]} for kind in kinds}, "required": True}
    return {"openapi_extra": {"requestBody": body}, "responses": OF_BODY, **more}


def parse_json(data: str | bytes) -> Any:
    """Parse JSON that can be sent back as JSON. Raises ValueError for anything else."""
    value = from_json(data)  # json.loads takes half of a surrogate pair, and too deep a nesting
    json.dumps(value, allow_nan=False)
    return value


async def read_json(request: Request) -> Any:
    """A dependency: the JSON body, whatever its Content-Type says. Raises 400 for no JSON."""
    try:
        return parse_json(await request.body())
    except ValueError as error:
        raise HTTPException(400, f"The body is no JSON: {error}") from None


def json_or_none(data: str | bytes) -> Any:
    with suppress(ValueError):
        return parse_json(data)
    return None


@app.post("/submit", **reads("application/json"))
async def submit(request: Request) -> dict[str, Any]:
    """The parts of a request that one needs most often."""
    query = request.query_params  # as a dict, it would keep only the last of two equal keys
    values = {key: query.getlist(key) for key in query}
    return {
        "method": request.method,
        "url": str(request.url),
        "user_agent": request.headers.get("user-agent"),
        "query_params": {key: v[0] if len(v) == 1 else v for key, v in values.items()},
        "cookies": request.cookies,
        "data": json_or_none(await request.body()),
    }


@app.get("/http-endpoint", responses=OF_BODY)
@app.post("/http-endpoint", **reads("application/json"))
async def http_endpoint(data: Annotated[Any, Depends(read_json)]) -> JSONResponse:
    """The JSON body back. On GET it is legal, but browsers send none (RFC 9110, 9.3.1)."""
    return JSONResponse({"received_data": data})  # a dict would be walked through once more


def inspect_connection(connection: HTTPConnection) -> dict[str, Any]:
    """What a request and a socket's handshake have in common, without loss."""
    url, client, query = connection.url, connection.client, connection.query_params
    return {
        "url": {"full": str(url), "host": url.hostname}
        | {part: getattr(url, part) for part in ("scheme", "port", "path", "query")},
        "base_url": str(connection.base_url),
        "http_version": connection.scope.get("http_version"),
        "client": {"host": client.host, "port": client.port} if client else None,
        "path_params": connection.path_params,
        "query_params": {key: query.getlist(key) for key in query},
        "headers": [[n.decode("latin-1"), v.decode("latin-1")] for n, v in connection.headers.raw],
        "cookies": connection.cookies,
        "state": connection.scope.get("state", {}),
    }


def inspect_bytes(data: bytes) -> dict[str, Any]:
    """Size, hash, and the content as ``text`` or, where it is not UTF-8, ``base64``."""
    about = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        return about | {"text": data.decode()}
    except UnicodeDecodeError:
        return about | {"base64": base64.b64encode(data).decode()}


async def read_form(request: Request) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    fields: dict[str, list[str]] = {}
    files = []
    try:
        async with request.form() as form:
            for key, value in form.multi_items():
                if isinstance(value, str):
                    fields.setdefault(key, []).append(value)
                else:
                    digest = hashlib.sha256(await value.read()).hexdigest()
                    about = {"filename": value.filename, "content_type": value.content_type}
                    files.append({"field": key, **about, "size": value.size, "sha256": digest})
        json.dumps([fields, files], ensure_ascii=False).encode()
    except (UnicodeError, IndexError):  # charsets fail in their own ways, or to half a character
        raise HTTPException(400, "The form cannot be decoded: send UTF-8") from None
    return fields, files


@app.post("/inspect", **reads(*BODIES))  # for /docs; and here for any method, even unheard of:
@app.api_route("/inspect", methods=[], include_in_schema=False, operation_id="inspect")
@app.api_route("/inspect/{path:path}", methods=[], include_in_schema=False, operation_id="inspect_")
async def inspect(request: Request) -> dict[str, Any]:
    """All that ``Request`` can tell, without loss; by any method, and with any path behind."""
    body = await request.body()  # kept by the request, so the form can be read from it
    fields, files = await read_form(request)
    return {
        "method": request.method,
        **inspect_connection(request),
        "body": inspect_bytes(body),
        "json": json_or_none(body),
        "form": fields,
        "files": files,
    }


@app.post("/body/json", **reads("application/json"))
async def body_json(data: Annotated[Any, Depends(read_json)]) -> JSONResponse:
    """The body as JSON, whatever it says it is."""
    return JSONResponse(data)


@app.post("/body/form", **reads("multipart/form-data", responses=OF_BODY | answers(415)))
async def body_form(request: Request) -> dict[str, Any]:
    """The body as a form, of either kind: its fields and its files."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/x-www-form-urlencoded", "multipart/form-data"):
        raise HTTPException(415, "Send application/x-www-form-urlencoded or multipart/form-data")
    fields, files = await read_form(request)
    return {"fields": fields, "files": files}


@app.post("/body/raw", **reads("application/octet-stream"))
async def body_raw(request: Request) -> dict[str, Any]:
    """The body as bytes, all of them in memory."""
    body = await request.body()
    digest = await asyncio.to_thread(hashlib.sha256, body)  # some milliseconds: not in the loop
    return {"size": len(body), "sha256": digest.hexdigest()}


@app.post("/body/stream", **reads("application/octet-stream"))
async def body_stream(request: Request) -> dict[str, Any]:
    """The way to read what is too large for memory: chunk by chunk, as it arrives."""
    size, chunks, digest = 0, 0, hashlib.sha256()
    async for chunk in request.stream():
        if chunk:  # the last one is empty
            size, chunks = size + len(chunk), chunks + 1
            digest.update(chunk)
    return {"size": size, "sha256": digest.hexdigest(), "chunks": chunks}


@app.post("/body/twice", **reads("application/json"))
async def body_twice(request: Request) -> dict[str, Any]:
    """``body()`` keeps what it read; ``stream()`` keeps nothing, and forms are read by it."""
    body = await request.body()  # it is parsed a dozen times: hence the low limit

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    reads = []
    for first, second in itertools.product(("body", "json", "form", "stream"), repeat=2):
        fresh, error = Request(request.scope, replay), None
        try:
            for way in (first, second):
                if way == "stream":
                    _ = [chunk async for chunk in fresh.stream()]
                else:
                    await getattr(fresh, way)()
        except Exception as problem:  # any: which one it is, is the answer
            error = f"{type(problem).__name__}: {getattr(problem, 'detail', problem)}"
        await fresh.close()
        reads.append({"first": first, "second": second, "works": not error, "error": error})
    return {"reads": reads}


# 3. Talking over a socket =============================================================
# A WebSocket begins as an HTTP request, and after `accept()` both sides may speak at any
# time, in frames of text or bytes. A handler is a conversation: it ends when the function
# returns, or when a receive raises WebSocketDisconnect because the client has left.


async def receive(websocket: WebSocket) -> str | bytes:
    """The next frame: str for text, bytes for binary. Raises WebSocketDisconnect at the end."""
    await asyncio.sleep(0)  # thousands of frames may have come at once: let others go between
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code") or 1005, message.get("reason"))
    text: str | None = message.get("text")
    return message["bytes"] if text is None else text


async def receive_text(websocket: WebSocket) -> str:
    """The next text frame; at a binary one, ``websocket.receive_text()`` raises KeyError."""
    frame = await receive(websocket)
    if isinstance(frame, bytes):
        raise WebSocketException(1003, "Text frames only")  # RFC 6455, section 7.4.1
    return frame


@app.websocket("/ws-endpoint")
async def answer_once(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(f"Message text was: {await receive_text(websocket)}")
    await websocket.close(1000)


@app.websocket("/ws")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        frame = await receive(websocket)
        if isinstance(frame, str):
            await websocket.send_text(f"Message text was: {frame}")
        else:
            await websocket.send_bytes(frame)


@app.websocket("/ws/json")
async def echo_json(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        try:
            await websocket.send_json({"received": parse_json(await receive_text(websocket))})
        except ValueError as error:
            await websocket.send_json({"error": f"The frame is no JSON: {error}"})


@app.websocket("/ws/inspect")
async def inspect_socket(websocket: WebSocket) -> None:
    await websocket.accept()
    handshake = inspect_connection(websocket)
    await websocket.send_json(handshake | {"subprotocols": websocket.scope["subprotocols"]})
    while True:
        frame = await receive(websocket)
        kind, data = ("text", frame.encode()) if isinstance(frame, str) else ("bytes", frame)
        await websocket.send_json({"kind": kind, **inspect_bytes(data)})


# 4. Sessions ==========================================================================
# A socket's handshake carries little, so context is often made over HTTP first and then
# named by an id. Whoever knows it is in, hence it is unguessable. Each socket has a queue and a
# writer of its own: who sends fills queues and never waits for a slow reader, whom a full one ends.

begin_chapter("4. Sessions")
SESSION_SECONDS = 3600  # after the last use
MAX_SESSIONS = 10_000  # the one that was unused for longest makes room for a new one
SESSION_QUEUE = 32  # frames, of at most 64 KiB, that may wait for one socket
sessions: dict[uuid.UUID, Session] = {}


class Session:
    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about  # who asked for it, and when
        self.used_at = time.monotonic()
        self.queues: set[asyncio.Queue[str]] = set()  # of the sockets now in it

    def expires_in(self) -> int:
        idle = 0 if self.queues else time.monotonic() - self.used_at  # seconds
        return max(0, round(SESSION_SECONDS - idle))

    def send(self, text: str) -> None:
        """Queue a text for every socket. One whose queue is full is in the session no more."""
        self.used_at = time.monotonic()
        self.queues = {queue for queue in self.queues if not queue.full()}
        for queue in self.queues:
            queue.put_nowait(text)


@app.post("/create-session", responses=answers(503))
async def create_session(request: Request) -> dict[str, Any]:
    """Remember who asks, for the socket that will name this session."""
    if len(sessions) >= MAX_SESSIONS:
        idle = [id for id in sessions if not sessions[id].queues]
        must(idle, "unavailable", "Too many sessions are in use", retry_after=60)
        del sessions[min(idle, key=lambda id: sessions[id].used_at)]
    about = {"client_host": client_host(request), "created_at": time.time()}
    about["user_agent"] = request.headers.get("user-agent", "")[:512] or None
    id = uuid.uuid4()
    sessions[id] = Session(about)
    return {"session_id": str(id), "expires_in": sessions[id].expires_in()}


def find_session(id: uuid.UUID) -> Session:
    if id in sessions and not sessions[id].expires_in():
        del sessions[id]
    must(id in sessions, "unknown", "Unknown session")
    return sessions[id]


@app.get("/session/{session_id:uuid}", responses=answers(404))
async def show_session(session_id: uuid.UUID) -> dict[str, Any]:
    """Who made a session, and how many sockets are in it."""
    session = find_session(session_id)
    shown = {"expires_in": session.expires_in(), "sockets": len(session.queues)}
    return {"session_id": str(session_id), **session.about, **shown}


@app.websocket("/ws/{session_id:uuid}")
async def session_socket(websocket: WebSocket, session_id: uuid.UUID) -> None:
    session = find_session(session_id)
    queue: asyncio.Queue[str] = asyncio.Queue(SESSION_QUEUE)

    async def write() -> None:
        while queue in session.queues:
            await websocket.send_text(await queue.get())
        raise Refused("unavailable", "Too slow")

    session.queues.add(queue)
    try:
        await websocket.accept()
        async with asyncio.TaskGroup() as group:  # when one fails, the other is cancelled
            group.create_task(write())
            while True:
                session.send(f"Session {session_id}: {await receive_text(websocket)}")
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        session.queues.discard(queue)
        session.used_at = time.monotonic()


# 5. Settings ==========================================================================
# A program that reads the environment wherever it needs a value fails late and in odd places. One
# model reads it all at the start, and refuses what it cannot use in a line that names the variable.


class StartError(Exception):
    """Why Lobby cannot start, in one line that says what to change."""


FEED = r"^postgres(ql)?://([\w.~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@?[\w.:,/?=&%+-]*$"
Origins = Annotated[frozenset[str], BeforeValidator(lambda s: re.findall(r"[^\s,]*[^\s,/]", s))]


class Settings(BaseModel, alias_generator=lambda f: f"CHAT_{f.upper()}", populate_by_name=True):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    db: Path = Path("chat.db")
    secret: bytes | None = Field(None, min_length=32)  # RFC 7518, section 3.2
    token_minutes: float = Field(60, gt=0, le=525_600)
    login_days: float = Field(30, gt=0, le=3_650)  # how long a log-in can be renewed
    register_: bool = Field(True, alias="CHAT_REGISTER")  # False: only an admin makes new people
    origins: Origins = frozenset()  # separated by commas
    demo_users: bool = True
    rate: float = Field(10, ge=0, allow_inf_nan=False)  # messages a second; 0: no limit
    sockets_per_user: int = Field(20, ge=0)  # 0: no limit
    feed: str | None = Field(None, pattern=FEED)  # see 12; strict, or errors would tell a password

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the ``CHAT_...`` variables. Raises StartError for an unusable one."""
        given = {name: os.environ[name] for name in os.environ if name.startswith("CHAT_")}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            shown = "" if name in ("CHAT_SECRET", "CHAT_FEED") else f"={given[name]!r}"
            raise StartError(f"{name}{shown}: {first['msg']}") from None


# 6. Storage ===========================================================================
# Reading is a function call: an index answers within microseconds, so `query` runs in the event
# loop, on a connection that only reads; and nothing comes between two readings without `await`.
# Changing waits for the disk (fsync), for milliseconds however many rows it writes. So one thread
# applies changes, many in a transaction, and refuses what may not be there, where nothing comes
# between the question and the change. A route says `await app.state.change({"type": ...})`, and is
# given what became of it, or raised Refused; how changes get here, chapter 9 shows.

SHAPE = 5  # of the tables; a file of another shape is refused
TABLES = """
-- cursor: how much of a feed is in this file, see chapter 12.
CREATE TABLE epoch (name TEXT NOT NULL, cursor INTEGER NOT NULL);
INSERT INTO epoch VALUES (lower(hex(randomblob(8))), 0);
-- folded: the name without regard to case. password: its salt, by which it is told, and hash.
CREATE TABLE people (name TEXT PRIMARY KEY, folded TEXT NOT NULL UNIQUE, password TEXT NOT NULL,
    role TEXT NOT NULL, banned INTEGER NOT NULL DEFAULT 0);
-- stays: by an expired token it can be renewed as well, until it ends.
CREATE TABLE logins (sid TEXT PRIMARY KEY, user TEXT NOT NULL, stays INTEGER NOT NULL,
    ends REAL NOT NULL);
-- at, ends: seconds since 1970, UTC. deleted: NULL or, once its text is wiped, the newest id of
-- that moment; the row stays, so that a resend finds it.
CREATE TABLE messages (id INTEGER PRIMARY KEY, room TEXT NOT NULL, user TEXT NOT NULL,
    text TEXT NOT NULL, at REAL NOT NULL, mid TEXT, deleted INTEGER, UNIQUE (user, mid));
CREATE INDEX messages_of_room ON messages (room, id);
CREATE INDEX deleted_of_room ON messages (room, deleted) WHERE deleted IS NOT NULL;
-- Who may list a room: '' is everybody; @alice+bob has a row for each of the two.
CREATE TABLE rooms (person TEXT, room TEXT, last_id INTEGER,
    PRIMARY KEY (person, room)) WITHOUT ROWID;
CREATE INDEX newest_rooms ON rooms (person, last_id, room);
CREATE TRIGGER list_room AFTER INSERT ON messages WHEN new.room NOT LIKE '@%' BEGIN
    INSERT INTO rooms VALUES ('', new.room, new.id) ON CONFLICT DO UPDATE SET last_id = new.id;
END;
CREATE TRIGGER list_conversation AFTER INSERT ON messages WHEN new.room LIKE '@%' BEGIN
    INSERT INTO rooms VALUES (substr(new.room, 2, instr(new.room, '+') - 2), new.room, new.id),
        (substr(new.room, instr(new.room, '+') + 1), new.room, new.id)
    ON CONFLICT DO UPDATE SET last_id = new.id;
END;
"""
COLUMNS = "id, room, user, text, at, mid"  # of a message, as its event has them
MAX_ID = 2**53 - 1  # the largest integer that JavaScript, and so /docs, can tell from the next
LAST = "\U0010ffff"  # comes after each character of a name
BUSY_SECONDS = 5  # how long a change waits for another program that writes
WINDOW = 1_000  # newest events that an open room keeps, and most messages that are resumed
SEARCHED = 100  # messages that a search reads between two turns of the loop

Event = dict[str, Any]  # and a change, which becomes one
Change = Callable[[Event], Awaitable[Event]]  # posts a change, see chapter 9
ASIDE = ("by", "old", "password")  # what a change needs, and its event does not tell
NEED_NO_ROW = ("kick", "joined", "left", "here", "typing", "renewed", "turn")  # full disk or not


def size_of(event: Event) -> float:
    """How much of a window an event takes: 1, or for a long text its length in KiB."""
    return max(1.0, len(event.get("text", "")) / KIB)


class Repeated(Event):
    """The original of a message that was sent again: for its sender alone."""


class Storage:
    """People, log-ins and messages in one SQLite file, with two doors: ``query`` and ``apply``."""

    def __init__(self, path: Path, is_replica: bool = False) -> None:
        """Open or make the file. Raises StartError if it cannot be used or is in use."""
        path = Path(os.path.realpath(path))
        self.databases = ExitStack()
        self.close = self.databases.close
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self.searching = asyncio.Lock()
        self.searchers: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.is_failing = False
        self.is_replica = is_replica  # of a feed (12): what cannot be stored now must be later
        try:
            # A second process would announce its messages to nobody here: it is kept out.
            self._connect(f"{path.as_uri()}.lock", timeout=0).execute("BEGIN EXCLUSIVE")
            path.touch(mode=0o600)  # password hashes are nobody else's business
            self.path, self.opened = path, path.stat()
            self.writer = self._connect(path.as_uri(), timeout=BUSY_SECONDS)
            self._prepare()
            # The loop must not wait, not even for another program's lock.
            self.reader = self._connect(f"{path.as_uri()}?mode=ro", timeout=0)
            self.databases.callback(self.thread.shutdown)  # closing begins with the last
            ((self.epoch,),) = self.query("SELECT name FROM epoch")
            # The newest id that was shown: readings stop there, as what is newer comes by the log.
            ((self.shown,),) = self.query("SELECT coalesce(max(id), 0) FROM messages")
        except (sqlite3.Error, OSError, Refused) as error:
            self.close()
            problem = "another process is using it" if "is locked" in str(error) else error
            raise StartError(f"CHAT_DB={str(path)!r}: {problem}") from None

    def _connect(self, uri: str, timeout: float) -> sqlite3.Connection:
        # isolation_level None: every statement is a transaction of its own
        db = sqlite3.connect(uri, timeout, isolation_level=None, check_same_thread=False, uri=True)
        self.databases.callback(db.close)
        db.row_factory = sqlite3.Row  # a tuple whose values have names
        return db

    def _prepare(self) -> None:
        shape = self._value("PRAGMA user_version")
        if shape != SHAPE and self._value("SELECT count(*) FROM sqlite_master"):
            raise sqlite3.DatabaseError("another version of Lobby made it, or another program")
        # FULL: a commit is on the disk when it returns. secure_delete: deleted text is overwritten.
        run = self.writer.executescript
        run("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;")
        run("PRAGMA fullfsync = ON;")  # what FULL takes on macOS
        if shape != SHAPE:
            run(f"BEGIN; {TABLES} PRAGMA user_version = {SHAPE}; COMMIT;")
        if not self.is_replica:  # any more: what happens from now on is in no feed
            run("UPDATE epoch SET name = hex(randomblob(8)), cursor = 0 WHERE cursor > 0")

    def query(self, sql: str, *values: Any) -> list[Any]:
        """All rows, of which there must be few. Raises Refused if the database fails."""
        try:
            return self.reader.execute(sql, values).fetchall()
        except sqlite3.Error:
            raise self._failed("in reading") from None

    def _failed(self, where: str) -> Refused:
        """Log an error of the database: once until a change succeeds, since all will meet it."""
        if not self.is_failing:
            log.exception("the database failed %s", where)
        self.is_failing = True
        refusal = Refused("unavailable", "The database failed, try again", retry_after=1)
        lasting = (sqlite3.OperationalError, sqlite3.DatabaseError, Refused)  # no change's fault
        if self.is_replica and type(sys.exception()) in lasting:
            raise refusal
        return refusal

    def find_person(self, folded: str, sid: str = "") -> Any:
        """The person whose name folds to this, or None; ``stays``: of this log-in, None if over."""
        stays = "(SELECT stays FROM logins WHERE sid = ? AND user = name) AS stays"
        rows = self.query(f"SELECT *, {stays} FROM people WHERE folded = ?", sid, folded)
        return rows[0] if rows else None

    def find_people(self, start: str, limit: int = 50) -> list[Any]:
        """People whose folded names begin so, by name."""
        sql = "SELECT name, role, banned FROM people WHERE folded BETWEEN ? AND ?"
        return self.query(f"{sql} ORDER BY folded LIMIT ?", start, f"{start}{LAST}", limit)

    def page(self, room: str, limit: int, before: int = MAX_ID, after: int | None = None) -> Event:
        """The messages next after ``after``, else before ``before``, oldest first, as an event."""
        order = "DESC" if after is None else "ASC"
        sql = f"SELECT {COLUMNS} FROM messages WHERE room = ? AND id > ? AND id < ?"
        sql += f" AND deleted IS NULL ORDER BY id {order} LIMIT ?"
        rows = self.query(sql, room, after or 0, min(before, self.shown + 1), limit + 1)
        found = [{"type": "message", **row} for row in rows[:limit]]
        messages = found if order == "ASC" else found[::-1]
        page: Event = {"type": "history", "room": room, "messages": messages}
        return page | {"more": len(rows) > limit, "complete": True}

    async def find(self, me: str, q: str, room: str, limit: int, before: int, after: Any) -> Event:
        """Like ``page``, of messages that have ``q``: in pieces, as an index would slow storing."""
        found: list[Event] = []
        more = True
        async with self.searchers[me], self.searching:  # who has many waits for themselves
            while more and len(found) <= limit:
                await asyncio.sleep(0)
                page = self.page(room, SEARCHED, before, after)
                piece, more = page["messages"], page["more"]
                hits = [event for event in piece if q.casefold() in event["text"].casefold()]
                if after is None:
                    found, before = hits + found, piece[0]["id"] if piece else 0
                elif piece:
                    found, after = found + hits, piece[-1]["id"]
        nearest = found[-limit:] if after is None else found[:limit]
        return {"messages": nearest, "more": len(found) > limit}

    def missed(self, room: str, after: int) -> list[Event] | None:
        """The messages after this id, and what was deleted since; None if not to be had."""
        page = self.page(room, WINDOW, after=after)
        sql = "SELECT id FROM messages WHERE room = ? AND deleted >= ? AND id <= ? LIMIT ?"
        deleted = self.query(sql, room, after, after, WINDOW + 1)
        too_many = page["more"] or max(len(deleted), sum(map(size_of, page["messages"]))) > WINDOW
        if too_many or after > self.shown:
            return None
        return [page, *({"type": "deleted", "room": room, "id": id} for (id,) in deleted)]

    def rooms(self, person: str, limit: int, before: int = MAX_ID, start: str = "") -> list[Any]:
        """Names and newest ids, the newest first; person "": the rooms that are everybody's."""
        sql = "SELECT room, last_id FROM rooms WHERE person = ? AND room BETWEEN ? AND ?"
        named = (person, start, f"{start}{LAST}")
        found = self.query(f"{sql} LIMIT 1001", *named)
        if len(found) > 1_000:  # so many that the newest are met soon along the ids
            sql += " AND last_id < ? ORDER BY last_id DESC LIMIT ?"
            return self.query(sql, *named, before, limit)
        found = [row for row in found if row["last_id"] < before]
        return sorted(found, key=itemgetter("last_id"), reverse=True)[:limit]

    def is_written(self, room: str) -> bool:
        return bool(self.query("SELECT 1 FROM messages WHERE room = ? LIMIT 1", room))

    def apply(self, changes: Sequence[Event]) -> list[Event | Refused]:
        """Make changes in one durable transaction, and answer what became of each. With no clock,
        chance or settings in here, the same changes always make the same database."""
        only_messages = all(change["type"] == "message" for change in changes)
        outcomes: list[Event | Refused] = []
        try:
            with self.writer:  # commits, or rolls back
                if not only_messages:  # they are one statement, a transaction by itself
                    self.writer.execute("BEGIN")
                for kind, same in itertools.groupby(changes, itemgetter("type")):
                    run = list(same)
                    outcomes += self._store(run) if kind == "message" else map(self._try, run)
            self.is_failing &= all(change["type"] in NEED_NO_ROW for change in changes)
            return outcomes
        except Exception:
            refusal = self._failed("in changing")
            if len(changes) == 1:
                return [refusal]
            return [self.apply([c])[0] if c["type"] in NEED_NO_ROW else refusal for c in changes]

    def _store(self, messages: Sequence[Event]) -> list[Event | Refused]:
        """Store messages by one statement, since each gives up Python's interpreter lock."""
        values = itemgetter(*COLUMNS.split(", "))
        rows = ", ".join(["(?, ?, ?, ?, ?, ?)"] * len(messages))
        sql = f"INSERT INTO messages ({COLUMNS}) VALUES {rows} ON CONFLICT (user, mid) DO NOTHING"
        done = self.writer.execute(sql, [value for one in messages for value in values(one)])
        all_are_new = done.rowcount == len(messages)
        return list(messages) if all_are_new else list(map(self._stored, messages))

    def _stored(self, message: Event) -> Event | Refused:
        sql = f"SELECT {COLUMNS} FROM messages WHERE deleted IS NULL"
        sql += " AND (id = :id OR (user = :user AND mid = :mid))"
        row = self.writer.execute(sql, message).fetchone()
        if not row:
            return Refused("forbidden", "This message was deleted")
        return message if row["id"] == message["id"] else Repeated(type="message", **row)

    def _try(self, change: Event) -> Event | Refused:
        """Make a change, and answer the event that it is now; what may not be is refused."""
        try:
            self._make(change)
            return {key: change[key] for key in change if key not in ASIDE}
        except Refused as refusal:
            return refusal
        except Exception:  # it is refused alone, unless the database has given up all of it
            if not self.writer.in_transaction:
                raise
            return self._failed(f"in changing: {change['type']}")

    def _make(self, change: Event) -> None:
        """Make a change that is no message, if it needs a row; its fields are the parameters."""
        run = self.writer.execute
        sql = "SELECT role FROM people WHERE name = ? AND NOT banned"  # or they have no role left
        asking = ("by" in change and self._value(sql, (change["by"],))) or "member"
        match change["type"]:
            case "register":
                is_first = not self._value("SELECT 1 FROM people")  # somebody has to be the admin
                may = is_first or change["is_open"] or asking == "admin"
                must(may, "forbidden", "Registration is closed: only an admin may add people")
                may = change["is_local"] or not is_first
                must(may, "forbidden", "The first person, the admin, comes over loopback")
                change.setdefault("role", "admin" if is_first else "member")
                sql = "INSERT OR IGNORE INTO people (name, folded, password, role) VALUES"
                done = run(f"{sql} (:user, :folded, :password, :role)", change)
                must(done.rowcount, "conflict", "This username is taken")
            case "login":  # what was checked may have changed meanwhile
                run("DELETE FROM logins WHERE ends < :at", change)
                sql = "INSERT INTO logins SELECT :sid, name, :stays, :ends FROM people"
                sql += " WHERE name = :user AND instr(password, :password) = 1 AND NOT banned"
                done = run(sql, change)
                must(done.rowcount, "unauthorized", "Bad username or password")
            case "logout":
                run("DELETE FROM logins WHERE sid = :sid", change)
            case "password":
                if "old" in change:  # it may have changed while it was checked
                    sql = "SELECT 1 FROM people WHERE name = :user AND instr(password, :old) = 1"
                    must(self._value(sql, change), "forbidden", "The old password is wrong")
                else:
                    self._check_role(change, asking, "admin")
                run("UPDATE people SET password = :password WHERE name = :user", change)
                run("DELETE FROM logins WHERE user = :user", change)
            case "health":  # and is the file still the one that has this name?
                run(f"PRAGMA user_version = {SHAPE}")  # it writes, and changes nothing
                is_same = self.path.exists() and os.path.samestat(self.opened, self.path.stat())
                must(is_same, "unavailable", "The database's file was moved or deleted")
            case "cursor":
                run("UPDATE epoch SET cursor = :id", change)
            case "deleted":
                sql = "SELECT user FROM messages WHERE id = :id AND room = :room"
                author = self._value(f"{sql} AND deleted IS NULL", change)
                must(author, "unknown", "There is no such message in this room")
                may = author == change["by"] or asking != "member"
                must(may, "forbidden", "Only its author or a moderator may delete a message")
                newest = "(SELECT max(id) FROM messages)"
                run(f"UPDATE messages SET text = '', deleted = {newest} WHERE id = :id", change)
            case "role" | "kick" | "ban" | "unban" as kind:
                self._check_role(change, asking, "admin" if kind == "role" else "moderator")
                if kind == "role":
                    run("UPDATE people SET role = :role WHERE name = :user", change)
                elif kind != "kick":
                    run("UPDATE people SET banned = (:type = 'ban') WHERE name = :user", change)

    def _value(self, sql: str, fields: Any = ()) -> Any:
        row = self.writer.execute(sql, fields).fetchone()
        return row and row[0]

    def _check_role(self, change: Event, asking: str, needed: str) -> None:
        """Moderators act on members, admins on everybody; and one admin always stays."""
        may = asking in (needed, "admin")
        must(may, "forbidden", f"Only a person with the role {needed!r} may do this")
        change["user"] = self._value("SELECT name FROM people WHERE folded = :folded", change)
        must(change["user"], "unknown", "There is nobody of this name")
        role = self._value("SELECT role FROM people WHERE name = :user", change)
        may = asking == "admin" or role == "member"
        must(may, "forbidden", f"Only an admin may do this to somebody who is {role}")
        if role == "admin" and (change["type"] == "ban" or change.get("role", role) != role):
            others = "SELECT 1 FROM people WHERE role = 'admin' AND NOT banned AND name != :user"
            last = "The last admin can be neither banned nor demoted"
            must(self._value(others, change), "conflict", last)


# 7. Knowing a user ====================================================================
# A password is checked once, slowly on purpose, and makes a log-in, which is exchanged for a token:
# a signed note of who its bearer is, by which log-in, until when. Whether they are banned or logged
# out is looked up each time; so is what they may do, which in a token would be true for too long.

begin_chapter("7. Knowing a user", 401, 503)
oauth2 = OAuth2PasswordBearer(tokenUrl="token", auto_error=False)
Token = Annotated[str | None, Depends(oauth2)]
# Letters that cannot be seen, by which one name could pass for another.
INVISIBLE = "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
MAX_NAME = 32  # characters
MAX_PASSWORD = 128  # characters
LONGEST_FORM = 4  # characters make one at most: what has more times its limit is too long anyway
NO_PASSWORD = f"{'00' * 16}${'00' * 64}"  # what a name that nobody has is checked against
MAX_HASHING = 20  # passwords that may wait for one of two threads: 2 s
MAX_HASHING_EACH = 4  # of one address, or one who guesses would keep everybody out


def normalize(form: Literal["NFC", "NFKC"], text: str, limit: int = MAX_NAME) -> str:
    """A text in its one spelling. Raises ValueError for none, or for over 30 marks on a letter:
    to put them in order takes the square of their number (UAX #15, section 13)."""
    if text.isascii() or len(text) > LONGEST_FORM * limit:
        return text
    marks = "".join("m" if unicodedata.combining(character) else "-" for character in text)
    if "m" * 31 in marks or re.search("[\ud800-\udfff]", text):
        raise PydanticCustomError("invalid", "The text has what no script is written with")
    return unicodedata.normalize(form, text)


@functools.lru_cache(4096)
def clean_name(name: str) -> str:
    """A name in its one spelling (NFKC); of any script, many of which spell with marks."""
    name = normalize("NFKC", name)
    start = name[: MAX_NAME + 1]  # enough to see that it is too long
    kinds = "".join("_" if c in "_-" else unicodedata.category(c)[0] for c in start)
    is_name = re.fullmatch(r"[LN_][LMN_]{0,31}", kinds) and not re.search(INVISIBLE, name)
    if not is_name or name.casefold() in ("error", "here"):  # as whom the plain text chat speaks
        words = "1 to 32 letters, digits, '_' or '-' are a name; 'error' and 'here' are taken"
        raise PydanticCustomError("bad_name", words)
    return name


@functools.lru_cache(4096)
def fold(name: str) -> str:
    """A name without regard to case, to find a person by. Raises ValueError for a bad one."""
    return normalize("NFKC", clean_name(name).casefold())


def fold_start(start: str) -> str:
    """A name, or the beginning of one, as ``fold`` leaves it; of whom there may be nobody."""
    return normalize("NFKC", normalize("NFKC", start).casefold())


class Bearer(NamedTuple):  # who is asking, by which log-in; times in seconds since 1970
    name: str
    role: str
    sid: str
    ends: float
    auth_time: float = 0
    stays: bool = False


class Claims(BaseModel):  # of a token, all required (RFC 7519; sid, auth_time: OpenID Connect)
    sub: str  # whose it is
    sid: str  # by which log-in
    auth_time: float  # when its password was given
    iat: float
    exp: float = Field(lt=10**11)


def one_spelling(password: str) -> str:  # keyboards differ
    return normalize("NFKC", password[: LONGEST_FORM * MAX_PASSWORD], MAX_PASSWORD)


def hash_password(password: str, salt: bytes = b"") -> str:
    """What is stored of it. OWASP (Password Storage Cheat Sheet): 16 MiB and 0.2 s a guess."""
    salt = salt or secrets.token_bytes(16)
    key = hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=5, maxmem=64 * MIB)
    return f"{salt.hex()}${key.hex()}"


def is_password(password: str, stored: str) -> bool:
    salt = bytes.fromhex(stored.partition("$")[0])
    return secrets.compare_digest(hash_password(password, salt), stored)


class Logins:
    """Checks passwords, and makes and reads tokens: JSON Web Tokens (RFC 7519), by HMAC-SHA256."""

    def __init__(self, settings: Settings, storage: Storage, change: Change) -> None:
        self.secret = settings.secret or load_or_create_secret(settings.db)
        self.token_seconds = settings.token_minutes * 60
        self.login_seconds = settings.login_days * 86_400
        self.is_open = settings.register_  # to new people
        self.storage = storage
        self.change = change
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="password")
        self.hashing: list[str | None] = []  # the addresses whose passwords wait

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    async def register(self, name: str, password: str, is_local: bool, by: str | None) -> Event:
        """A new person; once that is closed, made ``by`` an admin."""
        stored = await self.in_thread(hash_password, password)
        change = {"type": "register", "user": name, "folded": fold(name), "password": stored}
        return await self.change(change | {"by": by, "is_local": is_local, "is_open": self.is_open})

    async def check(self, username: str, password: str) -> Any:
        """The person whose password this is, or None. An unknown name takes as long as a known."""
        try:
            name, password = fold(username), one_spelling(password)
        except ValueError:  # nobody's
            name = password = ""
        person = self.storage.find_person(name)
        stored = person["password"] if person else NO_PASSWORD
        return person if await self.in_thread(is_password, password, stored) else None

    async def log_in(self, username: str, password: str, stay: bool = False) -> dict[str, Any]:
        """A token for the right password."""
        person = await self.check(username, password)
        if not person:
            log.info("refused log-in as %r", username[:32])
            raise Refused("unauthorized", "Bad username or password")
        must(not person["banned"], "forbidden", "Banned")
        return await self.start(person["name"], person["password"], stay)

    async def start(self, name: str, stored: str, stay: bool) -> dict[str, Any]:
        """A new log-in, if this is still what is stored of the password; answers its token."""
        sid, now = secrets.token_urlsafe(16), time.time()
        login = {"user": name, "password": stored[:32], "sid": sid, "stays": stay, "at": now}
        await self.change({"type": "login", **login, "ends": now + self.login_seconds})
        return self.make_token(name, sid, now)[0]

    def make_token(self, name: str, sid: str, auth_time: float) -> tuple[dict[str, Any], int]:
        """A token, shaped as OAuth2 wants it (RFC 6749, section 5.1), and its end."""
        now = time.time()
        seconds = min(self.token_seconds, auth_time + self.login_seconds - now)
        times = {"auth_time": int(auth_time), "iat": int(now), "exp": math.ceil(now + seconds)}
        token = jwt.encode({"sub": name, "sid": sid, **times}, self.secret, algorithm="HS256")
        answer = {"access_token": token, "token_type": "bearer", "expires_in": round(seconds)}
        return answer, times["exp"]

    async def renew(self, token: str | None) -> dict[str, Any]:
        """A new token of the same log-in, whose sockets live on until it ends."""
        me = self.find_bearer(token, renewing=True)
        renewed, ends = self.make_token(me.name, me.sid, me.auth_time)
        await self.change({"type": "renewed", "user": me.name, "sid": me.sid, "ends": ends})
        return renewed

    def find_bearer(self, token: str | None, renewing: bool = False) -> Bearer:
        """Who is asking, by what is stored about them now: the one way in, also for sockets."""
        must(token, "unauthorized", "Unauthorized: No token provided")
        # When it ends is looked at below; and a clock that was set back refuses nobody (iat).
        unchecked: Any = {"verify_exp": False, "verify_iat": False}
        claims = person = None
        with suppress(jwt.PyJWTError, ValueError):
            given = jwt.decode(token or "", self.secret, algorithms=["HS256"], options=unchecked)
            claims = Claims.model_validate(given)
            person = self.storage.find_person(fold(claims.sub), claims.sid)
        if not claims or not person:
            raise Refused("unauthorized", "Unauthorized: Invalid token")
        login_is_over = claims.auth_time + self.login_seconds <= time.time()
        must(not (renewing and login_is_over), "unauthorized", "Unauthorized: Log in again")
        is_good = time.time() < claims.exp or (renewing and person["stays"])
        must(is_good, "unauthorized", "Unauthorized: Token expired")
        must(not person["banned"], "forbidden", "Banned")
        must(person["stays"] is not None, "unauthorized", "Unauthorized: Logged out")
        times = (claims.exp, claims.auth_time)
        return Bearer(person["name"], person["role"], claims.sid, *times, bool(person["stays"]))


def load_or_create_secret(db: Path) -> bytes:
    """The key beside the database, made at the first start, readable by its owner only."""
    path = db.with_name(f"{db.name}.secret")
    try:
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        secret = path.read_bytes()
    except OSError as error:
        raise StartError(f"CHAT_SECRET is not set, and {str(path)!r}: {error.strerror}") from None
    if len(secret) < 32:
        raise StartError(f"CHAT_SECRET is not set, and {str(path)!r} is shorter than 32 bytes")
    return secret


async def find_me(token: Token) -> Any:
    try:
        return app.state.logins.find_bearer(token)
    except Refused as error:
        if str(error) not in ("Unauthorized: Logged out", "Banned"):
            raise
    await app.state.manager.keep_up()  # a log-in of just now may have to come from elsewhere
    return app.state.logins.find_bearer(token)


async def token_of(websocket: WebSocket) -> str | None:
    """A socket's token. A browser's comes in the URL or, since URLs are logged, a subprotocol."""
    offers = [p for p in websocket.scope["subprotocols"] if p.startswith("bearer.")]
    offered = offers[0].removeprefix("bearer.") if offers else None
    return await oauth2(websocket) or websocket.query_params.get("token") or offered


class Connection:
    """An open socket of somebody known. It ends once; why, is raised wherever its handler waits."""

    def __init__(self, websocket: WebSocket, me: Bearer) -> None:
        self.websocket, self.me = websocket, me
        self.ended_by: tuple[str, str] | None = None  # code and reason
        self.deadline = asyncio.timeout(me.ends - time.time())

    def end(self, code: str, reason: str) -> None:
        if self.live_until(0):  # long ago: it cancels the handler, see __aexit__
            self.ended_by = code, reason

    def live_until(self, ends: float) -> bool:
        """Move the end to this time, in seconds since 1970, unless it has come already."""
        is_open = self in app.state.connections and not self.deadline.expired()
        if may := is_open and self.ended_by is None:
            self.deadline.reschedule(asyncio.get_running_loop().time() + ends - time.time())
        return may

    async def __aenter__(self) -> None:
        await self.deadline.__aenter__()
        app.state.connections.add(self)  # to all that are open

    async def __aexit__(self, *error: Any) -> None:
        app.state.connections.discard(self)
        try:
            await self.deadline.__aexit__(*error)
        except TimeoutError:
            expired = "unauthorized", "Unauthorized: Token expired"
            raise Refused(*(self.ended_by or expired)) from None


async def take_turn(request: Request) -> AsyncIterator[None]:
    """A dependency of routes that hash a password: few at once, and few of each address."""
    await app.state.manager.keep_up()  # their password may have changed just now
    hashing, host = app.state.logins.hashing, client_host(request)
    may = len(hashing) < MAX_HASHING and hashing.count(host) < MAX_HASHING_EACH
    must(may, "unavailable", "Too many log-ins at once, try again", retry_after=2)
    hashing.append(host)
    try:
        yield
    finally:
        hashing.remove(host)


HASHES: dict[str, Any] = {"dependencies": [Depends(take_turn)], "responses": OF_BODY}
Me = Annotated[Bearer, Depends(find_me)]
Name = Annotated[str, Body(examples=["user1"])]  # a field of the JSON body
Password = Annotated[str, Body(examples=["password1"])]
NewName = Annotated[str, Body(), AfterValidator(clean_name)]
OfLength = Field(min_length=8, max_length=MAX_PASSWORD)
NewPassword = Annotated[str, Body(embed=True), OfLength, AfterValidator(one_spelling)]


@app.post("/login", **HASHES)
async def login(username: Name, password: Password, stay: Annotated[bool, Body()] = False) -> Any:
    """Log in. A log-in that stays can be renewed by an expired token as well."""
    return await app.state.logins.log_in(username, password, stay)


@app.post("/token", **HASHES)
async def token(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> Any:
    """The same as an OAuth2 password form, for /docs: Authorize as `user1` with `password1`."""
    return await app.state.logins.log_in(form.username, form.password)


@app.post("/renew")
async def renew(token: Token) -> Any:
    """A new token for the same log-in; its sockets live on until that one ends."""
    return await app.state.logins.renew(token)


@app.post("/register", status_code=201, **HASHES | {"responses": OF_BODY | answers(409)})
async def register(request: Request, token: Token, username: NewName, password: NewPassword) -> Any:
    """Become a person; the first one is the admin. An admin's token is needed once it is closed."""
    logins, host = app.state.logins, client_host(request) or ""
    by = logins.find_bearer(token).name if token and not logins.is_open else None
    # A proxy on this machine connects over loopback as well; where there is no address, no network.
    forwarded = {"forwarded", "x-forwarded-for", "x-real-ip"} & {*request.headers}
    public = [o for o in app.state.origins if o.endswith(f"//{request.headers.get('host')}")]
    is_local = not (forwarded or public) and (is_loopback(host) or not re.search("[.:]", host))
    person = await logins.register(username, password, is_local, by)
    return {"username": person["user"], "role": person["role"]}


@app.put("/me/password", **HASHES)
async def change_password(me: Me, old: Password, new: NewPassword) -> Any:
    """Change the password, which ends all log-ins; answers a new token, to authorize with."""
    logins = app.state.logins
    person = await logins.check(me.name, old)
    must(person, "forbidden", "The old password is wrong")
    change = {"type": "password", "user": me.name, "old": person["password"][:32], "by": me.name}
    stored = await logins.in_thread(hash_password, new)
    await logins.change(change | {"password": stored})
    return await logins.start(me.name, stored, me.stays)


@app.get("/me")
async def read_me(me: Me) -> dict[str, Any]:
    """Whose token this is."""
    return {"username": me.name, "role": me.role}


@app.post("/logout", status_code=204)
async def logout(me: Me) -> None:
    """Refuse the log-in from now on, and close the sockets that were opened with it."""
    await app.state.change({"type": "logout", "user": me.name, "sid": me.sid})


@app.websocket("/ws/protected")
async def protected(websocket: WebSocket) -> None:
    await websocket.accept()
    me = await find_me(await token_of(websocket))
    async with Connection(websocket, me):
        await websocket.send_text(f"Hello {me.name}, you are authenticated!")
        while True:
            await websocket.send_text(f"{me.name} says: {await receive_text(websocket)}")


# 8. Roles =============================================================================
# A token says who somebody is; what they may do is looked up by the same transaction that
# does it. So a demotion counts from the next change on, be it one in the same batch; a ban also
# ends the sockets. The rule stands in chapter 6 (`_check_role`); here it gets its routes.

begin_chapter("8. Roles", 401, 404, 503)
Username = Annotated[str, AfterValidator(fold_start)]
NewRole = Annotated[Literal["member", "moderator", "admin"], Body(embed=True)]


async def act(me: Bearer, kind: str, name: str, **more: Any) -> dict[str, Any]:
    """Post what somebody does to another; logged, since they may be asked why."""
    event = await app.state.change({"type": kind, "folded": name, "by": me.name, **more})
    log.info("%r: %s of %r", me.name, event.get("role", kind), event["user"])
    told = {key: event[key] for key in ("role", "banned", "sockets") if key in event}
    return {"username": event["user"], **told}


@app.put("/users/{username}/role", responses=OF_BODY | answers(409))
async def set_role(role: NewRole, username: Username, me: Me) -> dict[str, Any]:
    """Make somebody a member, moderator or admin; for admins."""
    return await act(me, "role", username, role=role)


@app.put("/users/{username}/password", status_code=204, **HASHES)
async def reset_password(username: Username, new: NewPassword, me: Me) -> None:
    """Give somebody a new password, which ends all of their log-ins; for admins."""
    stored = await app.state.logins.in_thread(hash_password, new)
    await act(me, "password", username, password=stored)


def moderation(kind: str, words: str, **more: Any) -> None:
    """Make the route by which a moderator does this to somebody."""

    @app.post(f"/users/{{username}}/{kind}", name=kind, description=words, responses=answers(409))
    async def route(username: Username, me: Me) -> dict[str, Any]:
        return await act(me, kind, username, **more)


moderation("kick", "Close somebody's sockets, who may come back; for moderators.")
moderation("ban", "Keep somebody out, and close their sockets; for moderators.", banned=True)
moderation("unban", "Lift a ban; for moderators.", banned=False)


# 9. Rooms =============================================================================
# The textbook keeps a list of sockets and awaits each in turn: one reader that stalls
# stops everybody. Here a room is a log, and a client a set of cursors into logs. Whatever
# changes is posted; one committer applies all that waits in one transaction, and shows it:
#
#   whoever wants something      committer (one)                     room
#   changed: post(change) -----> take all that is pending --show--> append to the log, and
#      ^                         apply it in one transaction         write it at once to each
#      +------ its outcome ----- in the database thread              follower that is up to date
# The bytes are made once for all. A follower whose line takes no more reads on from its cursors
# when it can: all that it missed as one frame. So nobody waits for anybody, and the busier a
# room, the less each message costs. All of it runs in the event loop, hence no locks; what
# must not be interrupted is a plain function without `await`.

MAX_BATCH = 250  # changes in one transaction; well below WINDOW, or batches outrun readers
GATHER_SECONDS = 0.003  # after over 20 changes the next are gathered: each batch costs a commit
MAX_PENDING = 10_000  # changes that may wait for the disk before new messages are refused
MAX_FRAME = 256 * KIB  # bytes after which a frame takes no further batch; one answer may be more
MAX_OUTBOX = 8 * MIB  # bytes that may wait for one client alone; a resume's fit
MAX_ROOMS = 100  # rooms that one client may follow

# The changes that end sockets, of a person or, where they name a ``sid``, of a log-in.
ENDS_SOCKETS = {"kick": "Kicked", "ban": "Banned", "logout": "Unauthorized: Logged out"}
ENDS_SOCKETS |= {"password": "Unauthorized: Password changed"}

Encode = Callable[[Iterable[Event]], list[bytes]]  # events to lines
Done = Callable[[Event | Refused], object]  # told what became of a change
Posted = tuple[Event, Done | None]


def as_json(events: Iterable[Event]) -> list[bytes]:
    return [to_json(event) for event in events]


def as_plain(events: Iterable[Event]) -> list[bytes]:
    """Plain text: a line for each event that has a form for people to read."""
    lines: list[bytes] = []
    for event in events:
        match event:
            case {"type": "message", "room": room, "user": user}:
                # Indented, a further line cannot pass for another person's message.
                text = "\n    ".join(event["text"].splitlines())
                lines.append(f"{'[private] ' if members(room) else ''}{user}: {text}".encode())
            case {"type": "joined" | "left" as happened, "user": user}:
                lines.append(f"{user} {happened} the chat!".encode())
            case {"type": "history", "messages": messages, "complete": complete}:
                lines += [] if complete else [b"Error: older messages are missing here"]
                lines += as_plain(messages)
            case {"type": "error", "message": message}:
                lines.append(f"Error: {message}".encode())
            case {"type": "text", "text": text}:
                lines.append(text.encode())
    return lines


def members(room: str) -> list[str]:
    """The two people of a private conversation; nobody for a room that is everybody's."""
    return room[1:].split("+") if room.startswith("@") else []


class Frames:  # lines as text frames, and their bytes on the wire
    def __init__(self, lines: list[bytes], encode: Encode) -> None:
        self.payloads = [b"\n".join(lines)] if lines and encode is as_json else lines
        frames = (Frame(Opcode.TEXT, payload) for payload in self.payloads)
        self.wire = b"".join(frame.serialize(mask=False) for frame in frames)


class Batch(dict[Encode, Frames]):
    """Events that entered a room's log together, and their frames, made once for all readers."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.size = sum(map(size_of, events))

    def __missing__(self, encode: Encode) -> Frames:
        self[encode] = Frames(encode(self.events), encode)
        return self[encode]


class Outlet:
    """By which frames leave: here, in a task that awaits ``send_text``; ChatProtocol is another."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.writable = asyncio.Event()  # set while it takes frames
        self.writable.set()

    def write(self, frames: Frames) -> None:
        self.writable.clear()
        self.sending = asyncio.create_task(self._send(frames))

    async def _send(self, frames: Frames) -> None:
        with suppress(Exception):  # a closed one takes everything
            for payload in frames.payloads:
                await self.websocket.send_text(payload.decode())
        self.writable.set()


class Client(Connection):
    """One open chat socket: who holds it, and how far it has read each of its rooms."""

    def __init__(self, websocket: WebSocket, me: Bearer, encode: Encode) -> None:
        super().__init__(websocket, me)
        self.encode = encode
        self.cursors: dict[Room, int] = {}
        self.outbox: list[bytes] = []  # lines for this client alone, before what its rooms have
        self.outlet = websocket.scope.get("extensions", {}).get("lobby") or Outlet(websocket)
        self.waiting: asyncio.Task[None] | None = None  # until the outlet takes frames again

    def take(self, most: float = math.inf) -> list[bytes]:
        """What is new for this client, as lines, until it is ``most`` bytes; moves its cursors."""
        lines, self.outbox = self.outbox, []
        size = sum(map(len, lines))
        for room in self.cursors:
            for batch in room.batches[self.cursors[room] - room.first :]:  # at least 0, see hear
                if size > most:
                    break
                lines += batch[self.encode].payloads
                size += sum(map(len, batch[self.encode].payloads))
                self.cursors[room] += 1
        return lines

    def hear(self, room: Room, batch: Batch, number: int) -> None:
        """Write a new batch at once, if all before it was read, and the outlet is ready."""
        if self.cursors[room] == number and not self.outbox and self.outlet.writable.is_set():
            self.cursors[room] += 1
            self.outlet.write(batch[self.encode])
        elif self.cursors[room] < room.first:
            self.end("unavailable", "Too slow")  # what it would read next is forgotten
        else:
            self.flush()

    def flush(self) -> None:
        """Write what is new while the outlet takes it, and the rest when it does again."""
        is_writable = self.outlet.writable.is_set
        while is_writable() and not self.ended_by and (lines := self.take(MAX_FRAME)):
            self.outlet.write(Frames(lines, self.encode))
        if not is_writable() and not self.waiting:
            self.waiting = asyncio.create_task(self.flush_later())

    async def flush_later(self) -> None:
        await self.outlet.writable.wait()
        self.waiting = None
        self.flush()

    def tell(self, *events: Event) -> None:
        """Say something to this client alone, after what it has not read: so ids only grow."""
        self.outbox = self.take() + self.encode(events)
        self.flush()
        if sum(map(len, self.outbox)) > MAX_OUTBOX:
            self.end("unavailable", "Too slow")


class Room:
    """An open room: its followers, and the newest part of its log, notices included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.followers: set[Client] = set()
        self.people: Counter[str] = Counter()  # who is here, with how many sockets
        self.batches: list[Batch] = []
        self.first = 0  # the number of batches[0]
        self.size = 0.0  # of all batches

    def append(self, events: Sequence[Event]) -> None:
        """Add a batch, forget what the window no longer holds, and write to the followers."""
        batch, newest = Batch(events), self.first + len(self.batches)
        self.batches.append(batch)
        self.size += batch.size
        while self.size > WINDOW and len(self.batches) > 1:
            self.size -= self.batches.pop(0).size
            self.first += 1
        for client in self.followers:
            try:
                client.hear(self, batch, newest)
            except Exception:  # it must not stop the others
                log.exception("unexpected error in writing to %r", client.me.name)


class ConnectionManager:
    """Owns the rooms and the clients, and the one way by which anything changes."""

    def __init__(self, settings: Settings, storage: Storage, connections: set[Connection]) -> None:
        self.storage = storage
        self.connections = connections
        self.rooms: dict[str, Room] = {}
        self.clients: dict[str, set[Client]] = {}  # of each person who is online
        self.roles: dict[str, str] = {}  # of each who was
        self.present: set[tuple[str, str]] = set()  # rooms and people, of other processes too (12)
        self.pending: list[Posted] = []  # in order of arrival
        self.posted = asyncio.Event()

    def connect(self, client: Client, limit: int) -> None:
        """Let a client in, and welcome it. Refused if its owner has ``limit`` sockets already."""
        me = client.me
        mine = self.clients.setdefault(me.name, set())
        must(not limit or len(mine) < limit, "unavailable", "Too many sockets")
        mine.add(client)
        self.roles[me.name] = me.role
        private = sorted(room for room, _ in self.storage.rooms(me.name, limit=1_000))
        about = {"epoch": self.storage.epoch, "expires_at": me.ends, "rooms": private}
        welcome = {"type": "welcome", "user": me.name, "role": me.role, **about}
        client.outbox = client.encode([welcome])  # it leaves with what comes next

    def disconnect(self, client: Client) -> None:
        for room in list(client.cursors):
            self.leave(client, room)
        self.clients[client.me.name].discard(client)
        if not self.clients[client.me.name]:
            del self.clients[client.me.name]

    def send_personal_message(self, event: Event, client: Client) -> None:
        """Say something to one client. One that lets too much pile up is closed with 1013."""
        client.tell(event)

    def join(self, client: Client, name: str, past: Sequence[Event]) -> None:
        """Show a room's past and who is here, and follow it from now on. No message is missed or
        doubled: the past ends with the newest that was shown, and the log goes on from there."""
        room, user = self.rooms.get(name) or Room(name), client.me.name
        if room not in client.cursors:
            may = len(client.cursors) < MAX_ROOMS
            must(may, "forbidden", f"One socket follows at most {MAX_ROOMS} rooms")
            self.rooms[name] = room
            client.cursors[room] = room.first + len(room.batches)
            room.followers.add(client)
            room.people[user] += 1
            if room.people[user] == 1:
                self.post({"type": "joined", "room": name, "user": user, "role": client.me.role})
        users = {name: self.roles[name] for name in sorted(self.people_in(name))}
        client.tell(*past, {"type": "presence", "room": name, "users": users})

    def people_in(self, room: str) -> set[str]:
        here = set(self.rooms[room].people) if room in self.rooms else set()
        return here.union(user for name, user in self.present if name == room)

    async def keep_up(self) -> None:
        """Wait for what has happened so far at other processes: there are none, before 12."""

    def leave(self, client: Client, room: Room) -> None:
        """Stop following a room, once what was already said in it is on its way."""
        client.tell()
        del client.cursors[room]
        room.followers.discard(client)
        room.people[client.me.name] -= 1
        if not room.people[client.me.name]:
            del room.people[client.me.name]
            self.post({"type": "left", "room": room.name, "user": client.me.name})
        if not room.followers:
            del self.rooms[room.name]

    def post(self, change: Event, done: Done | None = None) -> None:
        """Queue a change or a notice. Refuses messages if too much waits already."""
        may = len(self.pending) < MAX_PENDING or change["type"] not in ("message", "typing")
        must(may, "unavailable", "Too much waits to be stored, try again", retry_after=1)
        self.pending.append((change, done))
        self.posted.set()

    async def change(self, change: Event) -> Event:
        """Post a change, and wait for the event that it becomes. Raises Refused."""
        future: asyncio.Future[Event | Refused] = asyncio.get_running_loop().create_future()
        self.post(change, lambda outcome: None if future.done() else future.set_result(outcome))
        outcome = await future  # as a result: a refusal that nobody waits for is no error
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    async def commit_forever(self) -> None:
        """The committer: apply what is pending, then show it."""
        taken: Sequence[Posted] = ()
        while True:
            await self.posted.wait()
            await asyncio.sleep(GATHER_SECONDS if len(taken) > 20 else 0)
            taken, self.pending = self.pending[:MAX_BATCH], self.pending[MAX_BATCH:]
            if not self.pending:
                self.posted.clear()
            try:
                await self.commit(taken)
            except Exception:
                log.exception("unexpected error in the committer")

    async def commit(self, taken: Sequence[Posted]) -> None:
        messages = [change for change, _ in taken if change["type"] == "message"]
        for id, message in enumerate(messages, self.storage.shown + 1):
            message["id"] = id
        run = asyncio.get_running_loop().run_in_executor
        outcomes = await run(self.storage.thread, self.storage.apply, [one for one, _ in taken])
        self.storage.shown += len(messages)
        self.happen(taken, outcomes)

    def happen(self, taken: Sequence[Posted], outcomes: Sequence[Event | Refused]) -> None:
        """Show what was applied, and tell those who posted it."""
        with ExitStack() as answers:  # all of them are given, whatever fails
            for (_, done), outcome in reversed(list(zip(taken, outcomes, strict=True))):
                if done:
                    answers.callback(done, outcome)
            self.show(event for event in outcomes if not isinstance(event, Refused | Repeated))

    def show(self, events: Iterable[Event]) -> None:
        news: dict[str, list[Event]] = {}
        for event in events:
            if event["type"] == "joined":  # their role may have changed since it was posted
                event["role"] = self.roles.get(event["user"], event["role"])
            if "room" in event:
                news.setdefault(event["room"], []).append(event)
            elif event["type"] == "role":
                self.show_role(event["user"], event["role"])
            elif event["type"] == "renewed":
                for connection in self.sockets_of(event):
                    connection.live_until(event["ends"])
            elif event["type"] in ENDS_SOCKETS:
                ended = self.sockets_of(event)
                event["sockets"] = len(ended)
                for connection in ended:
                    connection.end("forbidden", ENDS_SOCKETS[event["type"]])
        for room, of_room in news.items():
            self.broadcast(room, of_room)

    def show_role(self, user: str, role: str) -> None:
        """Tell a new role to the person, and to all who are in a room with them."""
        if user in self.roles:
            self.roles[user] = role
            rooms = [room for name, room in self.rooms.items() if user in self.people_in(name)]
            for client in self.clients.get(user, set()).union(*(room.followers for room in rooms)):
                self.send_personal_message({"type": "role", "user": user, "role": role}, client)

    def sockets_of(self, event: Event) -> list[Connection]:
        """The open sockets of a person or, if the event names its ``sid``, of a log-in."""
        mine = [one for one in self.connections if one.me.name == event["user"]]
        return [one for one in mine if one.me.sid == event.get("sid", one.me.sid)]

    def broadcast(self, room: str, events: Sequence[Event]) -> None:
        """Append to a room's log, and tell the two of a private one on their other sockets too."""
        if room in self.rooms:
            self.rooms[room].append(events)
        told = [event for event in events if event["type"] not in ("joined", "left")]
        for client in {client for name in members(room) for client in self.clients.get(name, ())}:
            if self.rooms.get(room) not in client.cursors:
                client.tell(*told)


# 10. The chat =========================================================================
# A client may send anything at any time. So what it may say is a closed set of types, with each
# field checked in one place; what is wrong is answered with an error that names it, and the socket
# stays open. What is right is said in the words of chapter 9.

app.description = """
The chat's socket is `/ws/chat?room=lobby`. Its token comes as `Authorization: Bearer`, as `token`
in the query or, from a browser, as a subprotocol: `["lobby.v1", "bearer." + token]`. With it each
frame has one or more JSON objects, one a line; without it, lines of text. After a close by anything
but 1000 and 1008, come back with the newest `id` as `after`, and the `epoch`.

| you send | |
|---|---|
| `{"type": "message", "room", "text", "mid"}` | `mid`: your own id; or `to` a person |
| `{"type": "join", "room", "after"?, "epoch"?}` | follow a room, from all since this id on |
| `{"type": "leave", "room"}`, `{"type": "typing", "room"}` | |
| `{"type": "history", "room", "before"?, "limit"?}` | an older page |

| you receive | |
|---|---|
| `{"type": "welcome", "user", "role", "epoch", "expires_at", "rooms"}` | first |
| `{"type": "history", "room", "messages", "more", "complete"}` | not `complete`: some are missing |
| `{"type": "presence", "room", "users"}` | name and role of who is here, after you joined |
| `{"type": "message", "id", "room", "user", "text", "at", "mid"}` | it is on the disk |
| `{"type": "joined", "room", "user", "role"}`, `left`, `typing`, `role` | of somebody else |
| `{"type": "deleted", "room", "id"}` | |
| `{"type": "error", "code", "message", "room"?, "mid"?, "retry_after"?}` | it stays open |
"""

CHAT_PROTOCOL = "lobby.v1"
HELP = "/msg bob hi  says hi to bob alone\n/who         who is here\n/help        this text"
HISTORY = 50  # messages shown on joining
TYPING_RATE = 1  # notices a second of one person in one room; they take room in its window
MAX_TEXT = 4_000  # characters
# No control characters but tab and line feed, nothing that reverses the text after it.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff]")


def clean_text(text: str) -> str:
    """A message's text in its one spelling (NFC), trimmed. Raises ValueError for a bad one."""
    text = normalize("NFC", text.replace("\r\n", "\n").strip(), MAX_TEXT)
    if len(text) > MAX_TEXT:
        raise PydanticCustomError("too_long", "The text is longer than 4,000 characters")
    if not text or FORBIDDEN.search(text):
        raise PydanticCustomError("invalid", "The text is empty, or has what may not be sent")
    return text


def clean_room(name: str) -> str:
    """A room's name in its one spelling, in lower case; of ``@alice+bob``, see find_room."""
    try:
        return name if members(name) else clean_name(fold(name))
    except PydanticCustomError as error:
        raise PydanticCustomError("unknown_room", f"No such room: {error}") from None


Text = Annotated[str, AfterValidator(clean_text), Field(examples=["hello"])]
RoomName = Annotated[str, AfterValidator(clean_room)]
Mid = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$", examples=["m1"])]
NewText = Annotated[Text, Body()]
NewMid = Annotated[Mid | None, Body()]
Id = Annotated[int, Field(ge=0, le=2**63 - 1)]  # the largest integer that SQLite holds
Limit = Annotated[int, Field(ge=1, le=200)]
NameStart = Annotated[str, Query(max_length=80), AfterValidator(fold_start)]
Search = Annotated[str, Query(max_length=200), AfterValidator(lambda q: normalize("NFC", q, 200))]


class Incoming(BaseModel):  # what a lobby.v1 client sends
    type: Literal["message", "join", "leave", "typing", "history"]
    room: RoomName | None = None
    to: str | None = None  # of a message: a person instead of a room
    text: Text | None = None  # of a message, like ``mid``
    mid: Mid | None = None
    after: Id | None = None  # of a join, like ``epoch``
    epoch: str | None = None
    before: Id = MAX_ID  # of a history, like ``limit``
    limit: Limit = HISTORY


class RateLimit:
    """So many a second of each key, in bursts of three times that (generic cell rate algorithm)."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free_at: dict[str, float] = {}  # when nothing will be used up

    def retry_after(self, key: str, rate: float) -> float:
        """0 if it may be now, which counts; else the seconds until it may. Rate 0: no limit."""
        now, step = time.monotonic(), 1 / (rate or math.inf)
        free_at = max(now, self.free_at.get(key, now)) + step
        wait = free_at - now - max(3, step)
        if wait > 0:
            return max(0.001, round(wait, 3))
        self.free_at[key] = free_at
        if len(self.free_at) > 10_000:
            self.free_at = {key: at for key, at in self.free_at.items() if at > now}
        return 0

    def spend(self, name: str) -> None:
        wait = self.retry_after(name, self.rate)
        must(not wait, "rate_limited", "You are sending too fast", retry_after=wait)


def new_message(room: str, me: Bearer, text: str, mid: str | None) -> Event:
    """A message that is to be posted; the committer gives it ``id``."""
    event: Event = {"type": "message", "id": 0, "room": room, "user": me.name, "text": text}
    return event | {"at": round(time.time(), 3), "mid": mid}


def may_see(room: str, me: Bearer) -> bool:
    return not members(room) or me.name in members(room)


def find_room(name: str, me: Bearer) -> str:
    """The true name of a room. A conversation between others is refused like one that cannot be."""
    if not members(name):
        return name
    with suppress(ValueError, KeyError):  # not two, no name, or not mine
        one, other = map(fold, members(name))
        if person := app.state.storage.find_person({one: other, other: one}[fold(me.name)]):
            return "@" + "+".join(sorted((me.name, person["name"])))
    raise Refused("unknown_room", "No such room or person")


def error_event(error: Refused | ValidationError, about: Event) -> Event:
    """Why something was not done; by its ``room`` and ``mid``, its sender can tell what."""
    if isinstance(error, ValidationError):  # the first thing that is wrong
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        code = first["type"] if first["type"] in REFUSALS else "invalid"
        error = Refused(code, where + first["msg"])
    event: Event = {"type": "error", "code": error.code, "message": str(error)}
    for key in ("room", "mid"):
        if isinstance(value := about.get(key), str) and len(value) <= 128:
            event[key] = value
    return event | ({"retry_after": error.retry_after} if error.retry_after else {})


class ChatClient(Client):
    """A client that does what it is told."""

    async def listen(self) -> None:
        """Join what the URL asks for, then do what each frame asks for."""
        is_json = self.encode is as_json
        query = {"room": "lobby", **self.websocket.query_params, "type": "join"}
        query["room"] = query["room"].replace(" ", "+")  # what a "+" in a query means
        await self.obey(json.dumps(query), is_json=True)
        while True:
            frame = await receive_text(self.websocket)
            lines = frame.split("\n") if is_json else [frame]
            for line in lines:
                while self.outbox and self.waiting:  # who reads no answers is not listened to
                    await self.waiting
                await self.obey(line, is_json)
                if len(lines) > 1:  # there may be thousands: let others go between
                    await asyncio.sleep(0)

    async def obey(self, line: str, is_json: bool) -> None:
        """Do what a line asks for, or tell why not."""
        try:
            if is_json:
                event = Incoming.model_validate_json(line)
                must(event.mid or event.type != "message", "invalid", "A message has a 'mid'")
                await self.do(event)
            else:
                await self.obey_plain(line)
        except (ValidationError, Refused) as error:
            if getattr(error, "code", "") == "restart":  # another process may know more
                raise
            about = json_or_none(line)
            self.tell(error_event(error, about if isinstance(about, dict) else {}))

    async def obey_plain(self, line: str) -> None:
        """A command, or a message to the one room that such a client is in."""
        room = next(iter(self.cursors), None)
        match line.split() if line.startswith("/") else None:
            case None:
                if not room:
                    raise Refused("unknown_room", "You are in no room")
                await self.do(Incoming(type="message", room=room.name, text=line))
            case ["/who"]:
                people = app.state.manager.people_in(room.name) if room else {"nobody"}
                self.tell({"type": "text", "text": f"Here: {', '.join(sorted(people))}"})
            case ["/msg", name, _, *_]:
                text = line.split(maxsplit=2)[2]
                await self.do(Incoming(type="message", to=name, text=text))
            case ["/help"]:
                self.tell({"type": "text", "text": HELP})
            case _:
                raise Refused("invalid", "unknown command; /help lists them")

    async def do(self, event: Incoming) -> None:
        if event.type == "message":
            is_whole = event.text and (event.room is None) != (event.to is None)
            must(is_whole, "invalid", "A message has a 'text', and a 'room' or a person ('to')")
        must(event.room or event.to is not None, "invalid", "Name the 'room'")
        name = find_room(event.room or f"@{self.me.name}+{event.to}", self.me)
        room = app.state.manager.rooms.get(name)
        match event.type:
            case "message":
                self.send(name, event.text or "", event.mid)
            case "join":
                limit = app.state.limit
                while wait := limit.retry_after(f"join {self.me.name}", limit.rate):
                    self.flush()
                    await asyncio.sleep(wait)  # everybody in the room hears of joins
                if (event.after or 0) > app.state.storage.shown:
                    await app.state.manager.keep_up()  # it was read at another process
                self.join(name, event.after, event.epoch)
            case "leave" if room in self.cursors:
                app.state.manager.leave(self, room)
            case "typing":
                may = room in self.cursors or members(name)
                must(may, "forbidden", "Join the room first")
                if not app.state.limit.retry_after(f"typing {self.me.name} {name}", TYPING_RATE):
                    app.state.manager.post({"type": "typing", "room": name, "user": self.me.name})
            case "history":
                self.tell(app.state.storage.page(name, event.limit, event.before))

    def send(self, room: str, text: str, mid: str | None) -> None:
        """Post a message. What becomes of it comes back through the room, or to it alone."""
        app.state.limit.spend(self.me.name)

        def answer(outcome: Event | Refused) -> None:
            is_told = app.state.manager.rooms.get(room) in self.cursors or members(room)
            if isinstance(outcome, Refused):
                self.tell(error_event(outcome, message))
            elif isinstance(outcome, Repeated) or not is_told:
                self.tell(outcome)

        message = new_message(room, self.me, text, mid)
        app.state.manager.post(message, answer)

    def join(self, room: str, after: int | None, epoch: str | None) -> None:
        """Join, and read on after this id; or from the newest page, if that is not to be had."""
        storage, past = app.state.storage, None
        if after is not None and epoch in (None, storage.epoch):
            past = storage.missed(room, after)
        if not past and (self.encode is as_json or after is not None):
            past = [storage.page(room, HISTORY) | {"complete": after is None}]
        app.state.manager.join(self, room, past or [])


async def chat(websocket: WebSocket) -> None:
    """The chat socket. Once it is accepted, nothing waits until the client is welcome."""
    encode = as_json if CHAT_PROTOCOL in websocket.scope["subprotocols"] else as_plain
    await websocket.accept(CHAT_PROTOCOL if encode is as_json else None)
    me = await find_me(await token_of(websocket))
    client = ChatClient(websocket, me, encode)
    log.info("connected %r from %s", me.name, client_host(websocket))
    try:
        async with client:
            app.state.manager.connect(client, app.state.settings.sockets_per_user)
            await client.listen()
    finally:
        app.state.manager.disconnect(client)
        log.info("disconnected %r", me.name)


app.router.add_websocket_route("/ws/chat", chat)  # Starlette's: there is nothing to be injected
begin_chapter("10. The chat", 401, 503)
STORED = OF_BODY | answers(404, 429) | {200: {"description": "The original of a repeated one"}}


@app.get("/rooms")
async def list_rooms(me: Me, limit: Limit = 100, before: Id = MAX_ID, q: NameStart = "") -> Any:
    """Rooms that the caller may see: before this ``last_id``, newest first, then the unwritten."""
    storage, manager = app.state.storage, app.state.manager
    written = [row for person in ("", me.name) for row in storage.rooms(person, limit, before, q)]
    found = dict(sorted(written, key=itemgetter(1), reverse=True)[:limit])
    if len(found) < limit and before:
        named = sorted(room for room in {"lobby", *manager.rooms} if room.startswith(q))
        unwritten = (room for room in named if may_see(room, me) and not storage.is_written(room))
        found |= dict.fromkeys(itertools.islice(unwritten, limit - len(found)), 0)
    online = {room: len(manager.people_in(room)) for room in found}
    return [{"room": room, "online": online[room], "last_id": id} for room, id in found.items()]


@app.get("/rooms/{room}/messages", responses=answers(404))
async def read_messages(
    me: Me,
    room: RoomName,
    before: Id = MAX_ID,
    after: Id | None = None,
    limit: Limit = HISTORY,
    q: Search = "",
) -> dict[str, Any]:
    """A page, oldest first: after ``after`` if that is given, else before ``before``; with ``q``,
    of messages that have this in their text, taken literally, whatever its case."""
    storage = app.state.storage
    where = (find_room(room, me), limit, before, after)
    page = await storage.find(me.name, q, *where) if q else storage.page(*where)
    return {"messages": page["messages"], "more": page["more"]}


@app.post("/rooms/{room}/messages", status_code=201, responses=STORED)
async def post_message(me: Me, room: RoomName, text: NewText, mid: NewMid = None) -> Response:
    """Answers once it is stored: 201, or 200 with the original of a ``mid`` sent before."""
    message = new_message(find_room(room, me), me, text, mid)
    app.state.limit.spend(me.name)
    stored = await app.state.change(message)
    return JSONResponse(stored, 200 if isinstance(stored, Repeated) else 201)


@app.delete("/rooms/{room}/messages/{id}", status_code=204, responses=answers(404, 429))
async def delete_message(me: Me, room: RoomName, id: Id) -> None:
    """Take a message out; for its author, and for moderators."""
    change = {"type": "deleted", "room": find_room(room, me), "id": id, "by": me.name}
    app.state.limit.spend(me.name)
    await app.state.change(change)


@app.get("/users")
async def list_users(me: Me, q: NameStart | None = None) -> list[dict[str, Any]]:
    """Who is online. With ``q``: the first 50 whose names begin so; to moderators, the banned."""
    manager = app.state.manager
    pairs = {(room.name, name) for room in manager.rooms.values() for name in room.people}
    online: dict[str, set[str]] = {name: set() for name in manager.clients}
    for room, name in pairs | manager.present:
        online.setdefault(name, set()).add(room)
    here = [(name, manager.roles[name]) for name in sorted(online)]
    users = []
    for name, role, *banned in here if q is None else app.state.storage.find_people(q):
        rooms = online.get(name, ())
        user = {"username": name, "role": role, "rooms": sorted(r for r in rooms if may_see(r, me))}
        users.append(user | ({"banned": bool(banned[0])} if banned and me.role != "member" else {}))
    return users


@app.get("/healthz")
async def healthz() -> dict[str, Any]:
    """For whoever watches the server: people online and rooms open; 503 if it could not store."""
    await app.state.change({"type": "health"})  # one commit serves all who ask meanwhile
    rooms = [room for room in app.state.manager.rooms if not members(room)]
    return {"status": "ok", "online": len(app.state.manager.clients), "rooms": len(rooms)}


# 11. Serving ==========================================================================
# Importing this file opens nothing. What is opened, in the lifespan, hangs on `app.state`, so that
# each start has its own. `python app.py` also sets limits to what a connection may cost.

DEMO_PEOPLE = {"user1": "password1", "user2": "password2", "admin": "adminpassword"}


def check_demo_people(settings: Settings, storage: Storage) -> None:
    """Raises StartError if other machines could log in by passwords that stand in this file."""
    is_meant = settings.demo_users and "demo_users" in settings.model_fields_set
    if is_loopback(settings.host) or is_meant:
        return
    people = {name: storage.find_person(name) for name in DEMO_PEOPLE}
    known = [n for n, p in people.items() if p and is_password(DEMO_PEOPLE[n], p["password"])]
    if known or (settings.demo_users and not storage.find_people("")):
        why = f"others reach it, and the passwords of {', '.join(known or DEMO_PEOPLE)} are public"
        cure = "change them, or in a new database set CHAT_DEMO_USERS to 0; or to 1 if it is meant"
        raise StartError(f"CHAT_HOST={settings.host!r}: {why}: {cure}")


def hide_secrets(record: logging.LogRecord) -> bool:
    """URLs are logged, and a token may be in their query, or by mistake in their path."""
    if record.msg.startswith("Invalid UTF-8"):  # a client's doing, and a traceback each
        return False
    if isinstance(record.args, tuple):  # uvicorn's formatter wants them whole
        hide = functools.partial(re.sub, r"(\?)[^\s\"']*|eyJ[\w.-]{20,}", r"\1...")
        record.args = tuple(hide(a) if isinstance(a, str) else a for a in record.args)
    return True


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    for name in ("lobby", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).addFilter(hide_secrets)
    settings, state = Settings.from_environment(), app.state
    with closing(Storage(settings.db, bool(settings.feed))) as storage:
        state.settings, state.storage, state.origins = settings, storage, settings.origins
        state.limit, state.connections = RateLimit(settings.rate), set()
        kind = FeedManager if settings.feed else ConnectionManager
        state.manager = kind(settings, storage, state.connections)
        check_demo_people(settings, storage)
        state.change = state.manager.change
        state.logins = Logins(settings, storage, state.change)
        committer = asyncio.create_task(state.manager.commit_forever())
        try:
            if settings.demo_users and not storage.find_people(""):
                for name in ("admin", "user1", "user2"):  # the first is the admin, who adds others
                    with suppress(Refused):  # another process was first
                        await state.logins.register(name, DEMO_PEOPLE[name], True, by="admin")
            yield
        finally:
            with suppress(Refused):
                await state.change({"type": "turn"})  # changes nothing, but all before it is done
            committer.cancel()
            state.logins.threads.shutdown()


app.router.lifespan_context = lifespan
STALL_SECONDS = 20  # how long a peer may take no byte of what waits for it, or be silent
HEAD_SECONDS = 20  # how long a connection may go without a whole head of a request
SEND_BUFFER = 256 * KIB  # of the kernel, for each socket: it would hide megabytes
MAX_FRAGMENTS = 1_024  # frames that one message may come in
MAX_AHEAD = 16  # requests that are sent before the first is answered
MAX_PINGS = 50  # pings and pongs in one read: each costs the loop as much as a message
MAX_HEAD = 64 * KIB  # bytes of a request before its body


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's fast HTTP protocol, which would wait for headers, and gather them, without end."""

    head = 0  # bytes that have come of it

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        expire = self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, expire)

    def _unset_keepalive_if_required(self) -> None:
        pass  # uvicorn does not wait any longer once a head has begun; here, once it is whole

    def on_headers_complete(self) -> None:
        super()._unset_keepalive_if_required()
        if len(self.pipeline) < MAX_AHEAD:
            super().on_headers_complete()
        else:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_in_head = self.scope is not None and "method" not in self.scope
        self.head = self.head + len(data) if is_in_head else 0
        if self not in self.connections:  # but a WebSocket now: leave no cycle behind
            self.parser = None  # type: ignore[assignment]
        if self.head > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("The headers are too long")


class ChatProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, as an outlet, and with what it lacks; by no public API."""

    def write(self, frames: Frames) -> None:
        if not (self.close_sent or self.transport.is_closing()):  # else it takes everything
            self.transport.write(frames.wire)

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if not self.close_sent:  # it is a handshake
            self.scope["extensions"]["lobby"] = self  # type: ignore[assignment]

    async def send(self, message: Any) -> None:
        """Send, unless the client has left, at which uvicorn fails in several ways."""
        if self.transport.is_closing():
            raise ClientDisconnected
        if message["type"] == "websocket.close":
            self.writable.set()  # it waits for nobody, behind all that waits already
        await super().send(message)

    def data_received(self, data: bytes) -> None:
        """Take bytes; refuse a handshake that is none, on which uvicorn would wait for more."""
        if self.handshake_initiated and not self.handshake_complete:
            self.transport.abort()  # a client waits for the answer (RFC 6455, section 4.1)
        self.pings = 0
        for start in range(0, len(data), 4 * KIB):  # a read may have thousands of frames
            if not self.transport.is_closing():
                super().data_received(data[start : start + 4 * KIB])
        if not self.handshake_initiated:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self.scope["extensions"].clear()  # which refer back
        if not self.disconnected:  # what waits to be sent may wait forever
            self.loop.call_later(self.close_timeout, self.transport.abort)

    def count_ping(self) -> None:
        self.pings += 1
        if self.pings > MAX_PINGS:
            self.transport.abort()

    def handle_pong(self, event: Any) -> None:
        self.count_ping()
        super().handle_pong(event)

    def handle_ping(self) -> None:
        self.count_ping()
        if self.writable.is_set():
            super().handle_ping()
        else:  # its sender does not read: the answers would pile up
            self.conn.data_to_send()  # made already; thrown away

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment; empty ones cost memory without counting for ``ws_max_size``."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self.conn.fail(1009, "Too many fragments")
            self.handle_parser_exception()
        else:
            super().handle_cont(event)


def open_listener(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        at = f"CHAT_HOST={settings.host!r}, CHAT_PORT={settings.port}"
        raise StartError(f"{at}: {error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if sys.platform == "linux":  # who takes nothing, or has vanished, is gone; over HTTP too
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, STALL_SECONDS // 2)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, STALL_SECONDS // 4)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_SECONDS * 1000)
    return listener


def main() -> None:
    try:
        settings = Settings.from_environment()
        with closing(Storage(settings.db, bool(settings.feed))) as storage:
            if settings.feed:  # what is wrong with it ends here in one line, as with all else
                FeedManager(settings, storage, set())
            check_demo_people(settings, storage)
            settings.secret or load_or_create_secret(settings.db)
        listener = open_listener(settings)
    except StartError as error:
        raise SystemExit(f"Lobby cannot start: {error}") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = uvicorn.Config(
        app,
        log_config=None,
        http=BoundedHttpProtocol,
        ws=ChatProtocol,
        ws_max_size=64 * KIB,
        ws_ping_timeout=120.0,  # a ping may stand behind megabytes for a slow line
        timeout_keep_alive=HEAD_SECONDS,
        ws_per_message_deflate=False,  # it would compress the same text once for each reader
        timeout_graceful_shutdown=5,
    )
    host, port, *_ = listener.getsockname()
    log.info("running on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it logs each socket once more
    gc.freeze()  # a full collection takes 0.2 s with 1,000 sockets, and finds nothing
    gc.set_threshold(50_000, 50, 1_000)
    uvicorn.Server(config).run(sockets=[listener])


# 12. Several processes ================================================================
# A process is a cursor too. With CHAT_FEED, what the committer would apply it appends to a feed: a
# table in PostgreSQL, numbered in the order of its commits. Each process reads that from where it
# is, as a client reads a room, and applies and shows what comes, its own included, by chapters 6
# and 9. So reading stays a local call, all files become equal, and a message's id is its number.
# Whatever is in doubt, a process starts over: its sockets end with 1012, what waits is refused, and
# it reads on from the cursor in its file. Clients send again what they have not seen come back.

BEAT_SECONDS = 3  # between two notices of who is here
MAX_MISSED = 3  # beats; a process that was not heard for more is gone
RETRY_SECONDS = 1  # between two attempts to start over
FEED_TABLES = """
SELECT pg_advisory_xact_lock(1);  -- others may be starting
-- One row, by which appending takes turns. The feed has all that came after the number `first`.
CREATE TABLE IF NOT EXISTS lobby (one boolean PRIMARY KEY, epoch text, first bigint, newest bigint);
CREATE TABLE IF NOT EXISTS feed (id bigint PRIMARY KEY, process text, type text, event json,
    fades timestamptz);  -- when it is deleted, as it changed nothing
CREATE INDEX IF NOT EXISTS hashes ON feed (id) WHERE type IN ('register', 'password');
CREATE INDEX IF NOT EXISTS fading ON feed (fades) WHERE fades IS NOT NULL;
SET jit = off; SET enable_seqscan = off;  -- a plan made for a small table is kept for a large one
SET lock_timeout = '5s'; LISTEN lobby;
"""
NEW_FEED = "INSERT INTO lobby VALUES (true, %s, %s, %s) ON CONFLICT DO NOTHING"
# One statement: a process that stops in the middle of several would hold up all others.
APPEND = f"""
WITH turn AS (UPDATE lobby SET newest = newest + %(count)s RETURNING newest),
gone AS (DELETE FROM feed USING turn WHERE fades < now() OR id = ANY(%(vain)s::bigint[])),
added AS (INSERT INTO feed SELECT newest - %(count)s + number, %(process)s, type, event,
    CASE WHEN type IN {(*NEED_NO_ROW, "health")} THEN now() + interval '1 minute' END FROM turn,
    unnest(%(types)s::text[], %(events)s::json[]) WITH ORDINALITY e (type, event, number))
SELECT newest, pg_notify('lobby', '') FROM turn
"""
READ = "SELECT id, process, event FROM feed WHERE id > %s ORDER BY id LIMIT %s"
WIPE_TEXTS = r"""UPDATE feed SET event =
    regexp_replace(event::text, '"text": "([^"\\]|\\.)*"', '"text": ""')::json
    WHERE id = ANY(%s) AND event->>'text' <> ''"""
WIPE_HASHES = r"""UPDATE feed SET event =
    regexp_replace(event::text, '("password": "\w+\$)\w+', '\1')::json  -- the salt is compared
    WHERE type IN ('register', 'password') AND id <= %s
    AND substring(event::text from '"password": "(\w+)\$\w') <> ALL(%s)"""


class FeedManager(ConnectionManager):
    """A manager whose changes go by way of the feed, to all processes."""

    def __init__(self, settings: Settings, storage: Storage, connections: set[Connection]) -> None:
        """Read all of the feed. Raises StartError."""
        super().__init__(settings, storage, connections)
        self.url = settings.feed
        self.under_way: dict[int, Posted] = {}  # by their numbers
        self.vain: list[int] = []  # the numbers of those that changed nothing
        self.here: dict[str, set[tuple[str, str]]] = {}  # of each process, see ``present``
        self.missed: Counter[str] = Counter()  # beats of each process
        self.is_away = False
        if not settings.secret:
            raise StartError("CHAT_FEED needs a CHAT_SECRET, the same for all processes")
        try:
            self.psycopg: Any = __import__("psycopg")
        except ImportError:
            raise StartError("CHAT_FEED needs a package: pip install 'psycopg[binary]'") from None
        self.open()
        storage.databases.callback(lambda: self.feed.close())
        while self.take_in(*self.exchange([])[1:]):
            pass

    def open(self) -> None:
        """Connect, under a new name; see that feed and file belong together. Raises StartError."""
        self.name, run = secrets.token_hex(8), self.storage.writer.execute
        sql = "SELECT max(coalesce(max(id), 0), EXISTS (SELECT 1 FROM people)) FROM messages"
        last = run(sql).fetchone()[0]  # 0: a new file
        self.cursor: int = run("SELECT cursor FROM epoch").fetchone()[0] or last
        try:
            self.feed: Any = self.psycopg.connect(self.url, autocommit=True, connect_timeout=5)
            self.feed.pgconn.notify_handler = lambda _: self.posted.set()
            self.feed.execute(FEED_TABLES)
            self.feed.execute(NEW_FEED, (self.storage.epoch, last, last))
            sql = "SELECT epoch, first, newest FROM lobby"
            ((epoch, first, newest),) = self.feed.execute(sql).fetchall()
        except self.psycopg.Error as error:
            raise StartError(f"CHAT_FEED: {' '.join(str(error).split())}") from None
        if not self.cursor:
            run("UPDATE epoch SET name = ?", (epoch,))
            self.storage.epoch = epoch
        if epoch != self.storage.epoch or not max(first, last) <= self.cursor <= newest:
            raise StartError("CHAT_FEED has another history than CHAT_DB: copy one in use with it")
        run("PRAGMA synchronous = NORMAL")  # what is lost, the feed still has
        deleted = run("SELECT 'deleted' AS type, id FROM messages WHERE deleted IS NOT NULL")
        self.wipe([*deleted.fetchall(), {"type": "password"}])

    def exchange(self, changes: Sequence[Event]) -> tuple[int, Any, Sequence[Any]]:
        """Append changes, apply what comes next; answers the last one's number, and what came."""
        number = 0
        if changes:
            fields: Event = {"count": len(changes), "process": self.name, "vain": self.vain}
            fields |= {"types": [c["type"] for c in changes], "events": [*map(json.dumps, changes)]}
            ((number, _),) = self.feed.execute(APPEND, fields).fetchall()
            self.vain = []
        came = self.feed.execute(READ, (self.cursor, MAX_BATCH + 1)).fetchall()
        for self.cursor, _, event in came:
            if event["type"] == "message":
                event["id"] = self.cursor
        events = [event for _, _, event in came]
        moved: Event = {"type": "cursor", "id": self.cursor}
        outcomes = self.storage.apply([*events, moved]) if came else [moved]
        if isinstance(outcomes.pop(), Refused):  # one is at fault: it is refused alone
            outcomes = [self.storage.apply([event])[0] for event in events]
            self.storage.apply([moved])
        self.wipe([one for one in outcomes if isinstance(one, dict)])
        return number, came, outcomes

    def wipe(self, events: Sequence[Any]) -> None:
        """Take what these deleted, and the passwords that they changed, out of the feed as well."""
        if deleted := [event["id"] for event in events if event["type"] == "deleted"]:
            self.feed.execute(WIPE_TEXTS, (deleted,))
        if any(event["type"] == "password" for event in events):
            salts = self.storage.writer.execute("SELECT substr(password, 1, 32) FROM people")
            self.feed.execute(WIPE_HASHES, (self.cursor, [salt for (salt,) in salts.fetchall()]))

    def take_in(self, came: Sequence[Any], outcomes: Sequence[Event | Refused]) -> bool:
        """Show what came, and tell who posted it what became of it. True if there is more."""
        taken, happened = list[Posted](), list[Event | Refused]()
        for (id, process, event), outcome in zip(came, outcomes, strict=True):
            change, done = self.under_way.pop(id, (event, None))
            code = "repeated" if isinstance(outcome, Repeated) else getattr(outcome, "code", None)
            if done and code not in (None, "unavailable"):
                self.vain.append(id)
            if event["type"] == "message":
                self.storage.shown = id
            is_of_people = event["type"] in ("joined", "left", "here")
            news = self.hear(process, event) if is_of_people else [outcome]
            taken += [(change, done)] * len(news)
            happened += news
        self.happen(taken, happened)
        return len(came) > MAX_BATCH

    async def commit_forever(self) -> None:
        self.beat()
        await super().commit_forever()

    async def commit(self, taken: Sequence[Posted]) -> None:
        loop, is_behind = asyncio.get_running_loop(), True
        loop.remove_reader(self.feed.fileno())
        try:
            while is_behind:
                thread, changes = self.storage.thread, [change for change, _ in taken]
                number, came, outcomes = await loop.run_in_executor(thread, self.exchange, changes)
                self.under_way |= zip(itertools.count(number - len(taken) + 1), taken, strict=False)
                taken = ()
                is_behind = self.take_in(came, outcomes)
            while self.feed.pgconn.notifies():  # they came with an answer
                self.posted.set()
        except Exception as error:
            await self.start_over(error, taken)
        loop.add_reader(self.feed.fileno(), self.posted.set)  # when others have appended

    async def start_over(self, error: Exception, taken: Sequence[Posted]) -> None:
        self.is_away, loop = True, asyncio.get_running_loop()
        for connection in list(self.connections):
            connection.end("restart", "Starting over")
        waiting = [*self.under_way.values(), *taken, *self.pending]
        self.under_way, self.pending, self.here, self.present = {}, [], {}, set()
        for change, done in waiting:
            with suppress(Exception):
                self.post(change, done)
        while self.is_away:
            log.warning("starting over: %s", error)
            self.feed.close()
            await asyncio.sleep(RETRY_SECONDS)
            try:
                await loop.run_in_executor(self.storage.thread, self.open)
                self.is_away = False
            except Exception as another:
                error = another
        self.tell()

    def post(self, change: Event, done: Done | None = None) -> None:
        if not self.is_away:
            super().post(change, done)
        elif done:
            done(Refused("unavailable", "The feed is away, try again", RETRY_SECONDS))

    async def keep_up(self) -> None:  # when an event of our own comes, all before it has come
        must(not self.is_away, "restart", "Starting over")
        await self.change({"type": "turn"})

    def beat(self) -> None:
        """Tell who is here, and see who has told nothing for too long."""
        asyncio.get_running_loop().call_later(BEAT_SECONDS, self.beat)
        self.tell()
        for process in {self.name, *self.here}:
            self.missed[process] += 1
            if self.missed[process] > MAX_MISSED and process == self.name:  # PostgreSQL is gone
                with suppress(Exception), socket.socket(fileno=os.dup(self.feed.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)  # so what waits for it fails
            elif self.missed[process] > MAX_MISSED:
                self.show(self.hear(process, {"type": "here", "rooms": {}}))
                del self.here[process]

    def tell(self) -> None:  # who is here, at this process
        here = {name: list(room.people) for name, room in self.rooms.items()}
        self.post({"type": "here", "rooms": here})

    def hear(self, process: str, notice: Event) -> list[Event]:
        """What is news in a notice of who is where: a person may be in a room at several."""
        if process not in self.here and process != self.name:
            self.tell()  # it has just begun
        known = self.here.setdefault(process, set())
        if notice["type"] == "here":
            self.missed[process] = 0
            known = {(room, user) for room, users in notice["rooms"].items() for user in users}
            self.here[process] = known
        else:
            change = known.add if notice["type"] == "joined" else known.discard
            change((notice["room"], notice["user"]))
        before, self.present = self.present, set().union(*self.here.values())
        left, entered = before - self.present, self.present - before
        news = [{"type": "left", "room": room, "user": user} for room, user in left]
        for room, user in entered:
            role = self.roles.setdefault(user, self.storage.find_person(fold(user))["role"])
            news.append({"type": "joined", "room": room, "user": user, "role": role})
        return news


# 13. The page =========================================================================
# One constant, sent as it is: nothing is put into it on the server, so nothing can be
# smuggled in. Its policy lets exactly this script and this style run, by their hashes.

begin_chapter("13. The page")


@functools.cache  # at its first use, since the constant stands below
def page_headers() -> dict[str, str]:
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    for tag, content in re.findall(r"<(script|style)>(.*?)</\1>", PAGE, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest())
        policy += f"; {tag}-src 'sha256-{digest.decode()}'"
    headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return headers | {"Content-Security-Policy": policy}


@app.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page."""
    return HTMLResponse(PAGE, headers=page_headers())


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lobby</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'
  viewBox='0 0 16 16'><circle cx='8' cy='8' r='7' fill='royalblue'/></svg>">
<style>
/* One idea: the thread. A request is an open ring; where 101 answers it, a curve leaves the ring
   and becomes a line, on which every frame of that socket sits; a square ends it. */
:root { color-scheme: light dark; --ink: light-dark(#201e1b, #ebe8e2);
  --dim: light-dark(#5f5b53, #aaa69d); --paper: light-dark(#fff, #1b1b1d);
  --shade: light-dark(#f7f5f1, #141416); --raised: light-dark(#ebe8e1, #2c2c30);
  --line: light-dark(#e3dfd7, #323236); --edge: light-dark(#8d887d, #78746c);
  --accent: light-dark(#4150c4, #a9b4ff); --on-accent: light-dark(#fff, #15183b);
  --in: light-dark(#0a6353, #74d2bb); --warn: light-dark(#7d4e00, #e6b768);
  --wrong: light-dark(#a8231c, #ffa198); --mono: ui-monospace, "Noto Sans Mono", Menlo, monospace;
  --sans: system-ui, "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
  --float: 0 1px 2px light-dark(#0000000f, #0006), 0 8px 28px light-dark(#0000001f, #0009);
  --column: max(20px, (100% - 46rem) / 2);  /* what is beside the messages, on each side */ }
* { box-sizing: border-box; margin: 0; } [hidden] { display: none !important; }
body { font: 15px/1.5 var(--sans); color: var(--ink); background: var(--paper);
  overflow-wrap: break-word; }
h1, h2, h3, b, .main, .wrong, .who .cut, .link, .avatar, .chip, .count, .new { font-weight: 600; }
h2 { font-size: 16px; line-height: 1.4; } ul, ol { list-style: none; padding: 0; }
.small, .problem, .link, time, .day, .new, .notice, .state, #strip, .sentence { font-size: 13px;
  line-height: 1.4; }
.dim, time, .day, .notice, .state, .preview, .number, .sentence, #foot { color: var(--dim); }
.problem, .delete, .failed .state, .notice.wrong { color: var(--wrong); font-weight: 400; }
.row, .day, .new, .who, .head, #side li button { display: flex; gap: 8px; align-items: center; }
.grow { flex: 1; min-width: 0; } .problem:empty { display: none; }
.cut { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: match-parent; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
svg { width: 16px; fill: none; stroke: currentColor; stroke-width: 1.75;
  stroke-linecap: round; stroke-linejoin: round; }
.mark { width: 32px; background: var(--accent); stroke: var(--on-accent); border-radius: 23%; }
button, input, textarea, select { font: inherit; color: inherit; min-width: 0; height: 34px;
  border: 1px solid transparent; border-radius: 8px; }
input, textarea, select { background: var(--paper); border-color: var(--line);
  border-bottom-color: var(--edge); padding: 0 10px; font-weight: 400 !important; }
textarea, [type=file] { padding-block: 6px; height: auto; }
[type=checkbox] { accent-color: var(--accent); width: 14px; height: 14px !important; }
button { padding: 0 12px; background: none; cursor: pointer; white-space: nowrap; flex: none;
  &:is(:hover, [aria-pressed=true], [aria-expanded=true], [aria-current]) {
    background: var(--raised); }
  &.main { background: var(--accent); color: var(--on-accent); }
  &.main:disabled { background: var(--raised); color: var(--dim); cursor: default; }
  &.quiet { border-color: var(--line); } &.wrong { background: var(--wrong); color: var(--paper); }
  &.link { height: auto; padding: 0 2px; border: 0; background: none; } }
.link, .text :is(a, b) { color: var(--accent); }
:is(.link, .who button):hover, summary:hover b { text-decoration: underline; }
.icon, .avatar, .frame { display: grid; place-content: center; } .icon { width: 34px; padding: 0; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
::placeholder { color: var(--dim); opacity: 1; } summary { cursor: pointer; width: fit-content; }
.chip, mark, .avatar.own, .message.mention, .ask, #strip { --tint: var(--dim);
  background: color-mix(in srgb, var(--tint) var(--share, 10%), transparent); }
mark { --share: 26%; color: inherit; } mark, #strip { --tint: var(--warn); }
.avatar { width: 32px; height: 32px; border-radius: 9px; font-size: 13px; user-select: none;
  background: light-dark(oklch(.92 .045 var(--hue)), oklch(.36 .06 var(--hue)));
  color: light-dark(oklch(.42 .11 var(--hue)), oklch(.9 .06 var(--hue)));
  &.own { --tint: var(--accent); color: var(--accent); } }
.badge, .chip, .count, #foot { font-size: 12px; border-radius: 5px; padding: 0 6px; }
.badge { background: var(--raised); color: var(--dim); }
.count { background: var(--accent); color: var(--on-accent); border-radius: 9px; }

/* The log-in, and what floats: menus and dialogs */
dialog, .menu { color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 12px; padding: 20px; box-shadow: var(--float); overflow-wrap: anywhere; }
dialog { width: min(368px, 100% - 32px); margin: auto; }
:is(dialog, #side)::backdrop { background: #15120c66; }
:is(.menu, dialog) button { height: auto; min-height: 34px; max-width: 100%; white-space: normal; }
.menu { width: 272px; padding: 6px; inset: auto; margin: 4px; max-height: calc(100dvh - 8px);
  overflow-y: auto; position-area: bottom span-right;
  position-try: flip-block, flip-inline, flip-block flip-inline, right span-all;
  > button { display: block; width: 100%; text-align: start; }
  > div { padding: 6px 12px; } }
.ask { --tint: var(--wrong); border-radius: 8px; .row { flex-wrap: wrap; } }
:is(dialog, #access) form { display: grid; gap: 16px;
  label:not(.row) { display: grid; gap: 6px; font: 600 13px/1.4 var(--sans); } }
#access { min-height: 100dvh; display: grid; padding: 24px; background: var(--shade); }
#panel { display: grid; grid: auto / 384fr 495fr; gap: 1px; width: min(880px, 100%); margin: auto;
  border-radius: 16px; overflow: hidden; background: var(--line); box-shadow: var(--float);
  @media (max-width: 960px) { width: min(496px, 100%); grid-template-columns: minmax(0, 1fr); }
  > :first-child { padding: 40px; background: var(--paper); }
  h1 { font-size: 36px; line-height: 1.2; gap: 14px; } .mark { width: 48px; }
  form button { flex: 1; } input { height: 38px; font-size: 16px; } }
.lead { font-size: 17px; margin-block: 20px 24px; } :is(#problem, #pasted) { margin-top: 12px; }
#demo { h2 { margin: 24px 0 8px; } button { border-radius: 17px; } } #byToken { margin-top: 20px; }
#preview { background: var(--shade); display: grid; align-content: center; gap: 2px; min-width: 0;
  padding: 32px 24px 32px 18px;
  > :not(ol) { padding-inline-start: 14px; } > ol { margin-top: 24px; } }

/* The chat: side bar, header, messages, composer */
#app { height: 100dvh; display: flex; overflow: hidden; }
#side, #room, #wire { display: flex; flex-direction: column; min-width: 0; }
#side, #wire { color: inherit; background: var(--shade); border: 0 solid var(--line); }
#side { position: static; width: 248px; height: auto; padding: 0 8px 8px;
  border-inline-end-width: 1px; &:popover-open { position: fixed; width: min(304px, 84%); }
  h1 { font-size: 17px; padding: 0 8px; } .mark { width: 22px; }
  h2 { padding: 8px 8px 4px; } section + section { margin-top: 12px; }
  section:has(ul:empty):not(:has(.more)) { display: none; }
  :is(li button, .more) { width: 100%; height: 30px; padding: 0 8px; border: 0;
    color: var(--dim); text-align: start; }
  li :is(.unread, [aria-current]) { color: var(--ink); font-weight: 600; } }
#side h1, #top, #wire > header { height: 52px; flex: none; }
#lists { flex: 1; overflow-y: auto; }
.sign { width: 16px; text-align: center; &.on { color: var(--in); } }
#me { border-top: 1px solid var(--line); padding-top: 8px; line-height: 1.3; }
#room { flex: 1; position: relative; container-type: inline-size; }
#top { padding-inline: var(--column); border-bottom: 1px solid var(--line); }
#status { flex: none; } #roomName { flex: 0 100 auto; } #who { flex: 0 10000 auto; }
#searching { flex: 0 1 220px; display: grid; }
#menu { display: none; position: relative; .count { position: absolute; top: -2px; left: 16px; } }
#chatLog, #frames { flex: 1; overflow: hidden auto; display: flex; flex-direction: column-reverse; }
#messages { padding: 20px var(--column) 16px; &:has(.empty) { margin-block: auto; }
  &:has(.results) { margin-bottom: auto; } }
.day, .new, .notice, .empty { overflow-anchor: none; } .found { margin-inline-start: 32px; }
.day, .new { gap: 12px; margin: 16px 0 6px; }
.day::before, .day::after, .new::before { content: ""; flex: 1; border-top: 1px solid var(--line); }
.new { color: var(--accent); scroll-margin-top: 60px; &::before { border-color: currentColor; } }
.notice { padding: 4px 0 4px 44px; white-space: pre-wrap; }
.message { position: relative; margin: 8px -20px 0; padding: 3px 20px 4px 64px; border-radius: 8px;
  outline-offset: -2px; > .avatar { position: absolute; inset: 6px auto auto 20px; }
  &.grouped { margin-top: 0; padding-top: 1px; > :is(.avatar, .who) { display: none; } }
  &:where(:hover, :focus-within) { background: color-mix(in srgb, var(--ink) 4%, transparent); }
  &.mention { --tint: var(--accent); --share: 7%; box-shadow: inset 2px 0 var(--accent); } }
.who { align-items: baseline; white-space: nowrap;
  .cut { flex: initial; height: auto; padding: 0; border: 0; background: none; } }
.text { white-space: pre-wrap; width: fit-content; max-width: 100%;
  code, pre { font: 13px/1.5 var(--mono); background: var(--shade); padding: 1px 4px;
    border: 1px solid var(--line); border-radius: 5px; }
  pre { padding: 8px 12px; margin-block: 4px; overflow-x: auto; }
  :is(.gone, .waiting) > & { color: var(--dim); } .gone > & { font-style: italic; } }
.state { display: flex; gap: 8px; flex-wrap: wrap; user-select: none; }
.tools { position: absolute; inset-inline-end: 20px; top: 2px; display: flex; z-index: 1;
  background: var(--paper); border: 1px solid var(--line); border-radius: 8px; user-select: none;
  .message:not(:hover, :focus-within) & { display: none; }
  > * { height: 28px; font-size: 13px; padding: 0 10px; line-height: 28px; border: 0; } }
.empty { display: grid; justify-items: center; gap: 10px; padding: 24px 4px; text-align: center; }
#newest { z-index: 1; align-self: center; margin-block: -42px 8px; border-radius: 17px; }
#strip { margin: 4px var(--column); padding: 6px 12px; border-radius: 8px; color: var(--warn); }
#composer { margin-inline: var(--column); padding: 4px; display: flex; align-items: end;
  border: 1px solid var(--edge); border-radius: 12px;
  &:focus-within { outline: 2px solid var(--accent); outline-offset: -1px; } }
#messageText { border: 0; resize: none; field-sizing: content; outline: 0; max-height: 30dvh; }
#foot { display: flex; gap: 12px; margin: 4px var(--column) 6px; padding: 0 8px; min-height: 18px; }

/* The wire */
#wire { flex: 0 0 clamp(352px, 34%, 480px); border-inline-start-width: 1px;
  > header { padding: 0 8px 0 16px; button { margin-left: auto; } } }
#try { padding: 0 16px 10px; flex: none; max-height: 50%; overflow-y: auto;
  &[open] > summary { display: none; } }
:is(#try, #more)[open]::details-content { display: grid; grid: auto / minmax(0, 1fr); gap: 8px; }
#try :is(input, select, textarea), .card, .entry { font: 12px/1.5 var(--mono); }
#wireTools { gap: 4px; padding: 6px 16px; border-block: 1px solid var(--line);
  > * { height: 28px; font-size: 13px; padding-inline: 8px; } }
#list { margin-bottom: auto; padding-block: 8px; } .sentence { font-family: var(--sans); }
.entry { position: relative; padding-inline: 46px 12px;
  #list:has(.second) > & { padding-inline-start: 60px; }
  summary { display: block; width: auto; padding-block: 4px; } }
.entry, .pass:where(:not(.own)) { --lane: 29px; } .second { --lane: 45px; } .last { height: 14px; }
#wire:has(#explain[aria-pressed=false]) .sentence { display: none; }
.head { gap: 6px; height: 20px; > :not(b, .preview) { flex: none; }
  > .preview { flex-shrink: 1000; } }
.number { min-width: 52px; text-align: end; &.ms { margin-inline-start: auto; } }
.turn { display: none; &::before { content: "›"; } [open] > summary & { rotate: 90deg; } }
.chip { color: var(--tint);
  &.good { --tint: var(--in); } &.warn { --tint: var(--warn); } &.bad { --tint: var(--wrong); }
  &.switch { background: var(--ink); color: var(--paper); } }
.node, .pass, .entry::before { position: absolute; } .node { border-radius: 50%; }
.pass { width: 2px; background: var(--edge); inset-block: 0; left: calc(var(--lane) - 1px); }
.entry:has(.switch)::before { content: ""; inset: 13px auto 0 19px; width: calc(var(--lane) - 20px);
  border: solid var(--edge); border-width: 2px 2px 0 0; border-start-end-radius: 8px; }
.ring { left: 9px; top: 9px; padding: 3px; border: 2px solid var(--edge); }
.frame { left: calc(var(--lane) - 8px); top: 6px; padding: 2px; background: var(--accent);
  color: var(--shade); &.square { border-radius: 3px; } svg { width: 12px; stroke-width: 2.5; }
  .in & { background: var(--in); } .in &.bad { background: var(--wrong); } }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  margin-block: 4px 8px; overflow-wrap: anywhere;
  > * { padding: 8px 12px; } > * + * { border-top: 1px solid var(--line); }
  :is(i, em) { color: var(--in); font-style: normal; } em { color: var(--accent); }
  h3 { font: 600 13px/1.4 var(--sans); display: flex; justify-content: space-between; gap: 12px; }
  :is(h3 span, dt) { font-weight: 400; color: var(--dim); } time { margin-inline-start: auto; }
  dl { display: grid; grid: auto / minmax(90px, max-content) 1fr; column-gap: 12px; }
  pre { font: inherit; white-space: pre-wrap; max-height: 340px; overflow-y: auto; } }

/* Small windows, touch, motion */
@media (max-width: 1100px) {
  #wire { flex-basis: 50%; } #app:has(#wire:not([hidden])) { #menu { display: grid; }
    #side:not(:popover-open) { display: none; } }
}
@container (max-width: 639px) {
  #top:has(#searching:not([hidden])) :is(h2, #status, #leave) { display: none; }
}
@container (max-width: 479px) {
  #who { display: none; }
  #state, #wireButton span { position: absolute; clip-path: inset(50%); }
}
@media (max-width: 700px) {
  #access { padding: 0; } #menu { display: grid; }
  #panel { width: auto; margin: 0 0 auto; border-radius: 0; box-shadow: none;
    > :first-child { padding: 32px 20px; } }
  #side:not(:popover-open), #hint:not(.problem), #wire > header p { display: none; }
  #wire { position: fixed; inset: 0; z-index: 2; border: 0; }
  #try[open] > summary { display: block; }
  #app:has(#wire:not([hidden])) #room { visibility: hidden; }
}
@media (max-width: 700px), (pointer: coarse) {
  button:not(.link, .who *), select, input, summary.link { min-height: 40px !important; }
  input, textarea, select { font-size: 16px !important; } .icon { min-width: 40px; }
  .entry summary { min-height: 46px; } .turn { display: block; }
  .tools { inset-block: auto 0; align-items: center; }
  button.link, summary.link { padding-block: 10px; } [type=checkbox] { min-height: 0 !important; }
}
@media (hover: none) { .message:not(:focus-within) .tools { display: none; } }
@media (prefers-reduced-motion: no-preference) {
  button { transition: background .12s; } .fresh { animation: rise .35s backwards; }
  @keyframes rise { from { translate: 0 6px; opacity: 0; } }
}
</style>
</head>
<body>
<template id="icons">
  <svg class="i-mark mark" viewBox="0 0 24 24"><circle cx="7.3" cy="7.3" r="2.2"/>
    <path d="M9.5 7.3h3.7a2.5 2.5 0 0 1 2.5 2.5v7.7"/>
    <path d="M15.7 12.2h0M15.7 17.5h0" stroke-width="4.4"/></svg>
  <svg class="i-search" viewBox="0 0 16 16"><path d="M11.2 7a4.2 4.2 0 1 1-.1-.7m-1 4 4 4"/></svg>
  <svg class="i-wire" viewBox="0 0 16 16"><path d="M2 5h12l-3-3M14 11H2l3 3"/></svg>
  <svg class="i-menu" viewBox="0 0 16 16"><path d="M2 4h12M2 8h12M2 12h12"/></svg>
  <svg class="i-close" viewBox="0 0 16 16"><path d="m3 3 10 10M13 3 3 13"/></svg>
  <svg class="i-more" viewBox="0 0 16 16"><path d="M3 8h0M8 8h0M13 8h0"/></svg>
  <svg class="i-plus" viewBox="0 0 16 16"><path d="M8 2v12M2 8h12"/></svg>
  <svg class="i-out" viewBox="0 0 16 16"><path d="M3 8h10M9 4l4 4-4 4"/></svg>
  <svg class="i-in" viewBox="0 0 16 16"><path d="M13 8H3M7 4 3 8l4 4"/></svg>
</template>
<div id="access" role="main" spellcheck="false"><div id="panel"><div>
  <h1 class="row" data-icon="mark">Lobby</h1>
  <p class="lead">A team chat that loses nothing, and shows every request and frame it is made
    of.</p>
  <form id="credentials">
    <label>Name <input id="username" name="username" autocomplete="username" autocapitalize="none"
      aria-describedby="usernameProblem">
      <span id="usernameProblem" class="problem" role="alert"></span></label>
    <label>Password <input id="password" name="password" type="password"
      autocomplete="current-password" aria-describedby="passwordProblem">
      <span id="passwordProblem" class="problem" role="alert"></span></label>
    <label class="row small"><input id="stay" type="checkbox"> Stay logged in</label>
    <p class="row"><button class="main" value="login">Log in</button>
      <button class="quiet" value="register">Register</button></p></form>
  <p id="problem" class="problem" role="alert"></p>
  <div id="demo"><h2 class="small dim">Try it as</h2><p class="row"></p></div>
  <details id="byToken" class="small"><summary class="dim">Use a token</summary>
    <form id="pasted"><label>Token <input id="token" autocomplete="off"></label>
      <button class="quiet">Connect with the token</button></form></details>
</div><section id="preview" aria-label="What goes over the wire">
  <h2>Log in, and this goes over the wire</h2>
  <p class="small dim">Each line can be opened: headers, bytes, JSON.</p>
  <ol id="sample"></ol></section></div></div>

<div id="app" hidden>
  <nav id="side" popover aria-label="Rooms and people">
    <h1 class="row" data-icon="mark">Lobby</h1>
    <div id="lists">
      <section><h2 class="small dim">Rooms</h2><ul id="rooms"></ul>
        <button id="moreRooms" class="more row" data-icon="plus">More rooms</button></section>
      <section><h2 class="small dim">Private</h2><ul id="private"></ul></section>
      <section><h2 class="small dim">Also online</h2><ul id="people"></ul>
        <button id="morePeople" class="more row" data-icon="plus">More people</button></section>
    </div><div id="me" class="row"><span id="myAvatar"></span>
      <p class="grow"><b id="myName"></b><br><span id="myRole" class="small dim"></span></p>
      <button class="icon" data-icon="more" aria-label="Your menu" popovertarget="myMenu"></button>
    </div></nav>
  <main id="room">
    <header id="top" class="row">
      <button id="menu" class="icon" data-icon="menu" popovertarget="side"><span id="menuCount"
        class="count"></span></button><h2 id="roomName" class="cut"></h2>
      <p id="who" class="small dim cut"></p><button id="leave" class="link">Leave</button>
      <span class="grow"></span><p id="status" class="row small dim"><span id="dot" class="sign on"
        aria-hidden="true"></span><span id="state" role="status"></span></p>
      <form id="searching" role="search" spellcheck="false"><input id="query"></form>
      <button id="search" class="icon" data-icon="search" aria-label="Search"></button>
      <button id="wireButton" class="quiet row" data-icon="wire" aria-label="Wire"
        aria-expanded="false" aria-controls="wire"><span>Wire</span></button></header>
    <div id="chatLog" role="log" aria-label="Messages" tabindex="0"><div id="messages"></div></div>
    <button id="newest" class="main"></button>
    <p id="strip" class="row"><span class="grow"><span id="stripText" role="status"></span> <span
      id="seconds" aria-hidden="true"></span></span><button id="now" class="link"></button></p>
    <form id="composer"><textarea id="messageText" class="grow" rows="1" aria-label="Message"
      aria-describedby="hint"></textarea><button id="send" class="main">Send</button></form>
    <div id="foot"><p id="typing" class="cut grow"></p><p id="hint" role="status"></p></div>
  </main>
  <aside id="wire" aria-label="The wire" spellcheck="false" hidden>
    <header class="row"><h2>The wire</h2>
      <p class="small dim cut">all that this tab sends and hears</p>
      <button id="closeWire" class="icon" data-icon="close" aria-label="Close the wire"></button>
    </header>
    <details id="try" open><summary class="link">Send a request, or open a socket</summary>
      <form id="form" class="row"><select id="method" aria-label="Method"><option>GET<option>POST
          <option>PUT<option>PATCH<option>DELETE<option>OPTIONS<option>HEAD<option>WS</select>
        <input id="path" class="grow" aria-label="Path" list="paths"
          value="/inspect/hello?a=1&amp;a=2"><datalist id="paths"></datalist>
        <button id="go" class="main">Send</button></form>
      <form id="socketForm" class="row"><input id="frameText" class="grow" value='{"a": 1}'
        aria-label="Text to send"><button id="sendFrame" class="main">Send text</button></form>
      <p id="chapter" class="small dim cut"></p>
      <details id="more"><summary class="link">Headers and body</summary>
        <label class="row small"><input id="withToken" type="checkbox"> With my token</label>
        <textarea id="headers" rows="1" aria-label="Headers, one a line">X-Example: hello</textarea>
        <textarea id="body" rows="3" aria-label="Body"
          placeholder='{"as": "JSON"}, or lines of a form: name=Ann'></textarea>
        <input id="file" type="file" aria-label="File"></details>
      <p id="formProblem" class="problem" role="alert"></p></details>
    <div id="wireTools" class="row"><input id="filter" class="grow" aria-label="Filter"
      placeholder="Filter: 401, typing, /rooms"><button id="explain" aria-pressed="true"
      >Explain</button><button id="pause">Pause</button><button id="clear">Clear</button></div>
    <section id="frames" tabindex="0" aria-label="Requests and frames"><ol id="list"></ol></section>
  </aside></div>
<div id="myMenu" class="menu" popover role="dialog" aria-label="You">
  <button id="changePassword">Change password</button><button id="notify"></button>
  <button id="logOut">Log out</button></div>
<div id="person" class="menu" popover role="dialog"></div>
<dialog id="dialog" aria-labelledby="dialogTitle"></dialog>
<script>
"use strict";
// All that is shown is a function of what is known: handlers change `state` and call render(), and
// draw() shows it; they touch the page only for focus, scrolling, fields, and what floats. The
// server is asked for nothing that an event has told.
const state = {
  login: null,                      // {token, stay, renewAt}: whether it is kept, and a time in ms
  me: "", epoch: null,              // as the welcome said: who this is, and which database
  connection: "",                   // "connecting", "connected", "reconnecting", "logged out"
  retryAt: Infinity, why: "",       // in ms; what is wrong
  rooms: new Map(), current: null,  // key -> room; the one that is shown
  roles: new Map(),                 // name -> role, of all that events have named
  outbox: new Map(),                // mid -> message that the server has not acknowledged
  search: null,                     // {kind, q, found, more}; what is found stands for the room
  entries: [], pausedAt: null,      // of the wire, oldest first
  operations: [], tried: null,      // of /openapi.json; the socket that the wire's form opened
};

// -- Elements: text goes in as text nodes, never as HTML, so whatever others write stays text ----
const $ = (id) => document.getElementById(id);
const on = (id, type, action) => $(id).addEventListener(type, action);
const put = (id, properties) => {  // only what differs: else it would be read aloud again
  for (const [name, value] of Object.entries(properties)) {
    if ($(id)[name] !== value) $(id)[name] = value;
  }
};
const say = (id, textContent) => put(id, {textContent});
// make("p.small", {title: "..."}, "text", child): properties may be left out, and so are children
// that are false, null, 0 or "".
const make = (selector, ...children) => {
  const [tag, ...names] = selector.split("."), element = document.createElement(tag);
  const properties = children[0]?.constructor === Object ? children.shift() : {};
  element.append(...children.flat().filter(Boolean));
  return Object.assign(element, {className: names.filter(Boolean).join(" ")}, properties);
};
const button = (text, onclick, classes = "") =>
  make(`button${classes}`, {type: "button", onclick}, text);
const icon = (name) => $("icons").content.querySelector(`.i-${name}`).cloneNode(true);
for (const one of document.querySelectorAll("[data-icon]")) one.prepend(icon(one.dataset.icon));
// Makes a function from things to their elements. One is built anew only if what is `shown` of the
// thing differs, so that selections and what is unfolded stay.
const cached = (build, elements = new WeakMap()) => (thing, ...shown) => {
  const before = elements.get(thing), version = JSON.stringify(shown);
  if (before?.version === version) return before;
  const element = Object.assign(build(thing, ...shown), {version});
  const hadFocus = before?.contains(document.activeElement);
  elements.set(thing, element); before?.replaceWith(element);
  const focused = element.querySelector("summary, li > button") ?? element;
  if (hadFocus) focused.focus({preventScroll: true});
  return element;
};
// Makes these elements the children of a parent; what is in its place already is not touched.
const arrange = (parent, wanted) => {
  const keep = new Set(wanted);
  for (const child of [...parent.children]) if (!keep.has(child)) child.remove();
  let next = parent.firstElementChild;
  for (const element of wanted) {
    if (element === next) next = next.nextElementSibling; else parent.insertBefore(element, next);
  }
};
// However much has changed, the page is drawn once for it; by a timer, since a hidden tab has no
// animation frames, and its title counts what is unread.
let drawTimer = 0;
const render = () => { drawTimer ||= setTimeout(draw, 16); };

// -- What is kept in the browser ---------------------------------------------------------------
const parsed = (text) => { try { return JSON.parse(text); } catch { return undefined; } };
const storageOf = (name) => {  // a browser may keep nothing; without setItem, keep() says so
  try { return window[name]; } catch { return {getItem: () => null, removeItem() {}}; }
};
const local = storageOf("localStorage"), session = storageOf("sessionStorage");
const kept = (name, fallback = null, storage = local) =>
  parsed(storage.getItem(`lobby.${name}`)) ?? fallback;
const keep = (name, value, storage = local) => {
  try {
    if (value === null) storage.removeItem(`lobby.${name}`);
    else storage.setItem(`lobby.${name}`, JSON.stringify(value));
  } catch { state.why = "this browser keeps nothing, so what is not sent goes with the tab"; }
};
// What another tab of this browser has sent, read, or learnt about the log-in.
addEventListener("storage", ({key, newValue}) => {
  const [, kind, user, ...rest] = key?.split(".") ?? [], value = parsed(newValue);
  if (kind === "login" && value && state.login?.stay
    && claimsOf(value).sub !== claimsOf(state.login).sub) {
    state.login.stay = false; keepLogIn(state.login);  // that place is theirs now
  }
  if (user !== state.me) return;
  if (kind === "news" && value) { takeLogIn(value, state.login.stay); connect(); }
  const room = kind === "read" && state.rooms.get(rest.slice(1).join("."));
  if (room) markRead(room, value);
  if (kind === "outbox" && !value) settle(rest[0]);
  render();
});

// -- Requests and sockets, as the wire records them --------------------------------------------
const lanes = [null, null];  // the sockets that are open, by their lane of the thread
const bytesOf = (text) => new TextEncoder().encode(text).length;
// Of a token its beginning stays; of a password nothing, in JSON, JSON in a JSON text, or a form.
const hideSecrets = (text) => text
  .replace(/(eyJ[\w-]{7})[\w-]*\.[\w-]+\.[\w-]+/g, "$1…")
  .replace(/("(?:old|new|password)"\s*:\s*")(?:[^"\\]|\\.)*/g, "$1…")
  .replace(/(\\"(?:old|new|password)\\"\s*:\s*\\")(?:[^"\\]|\\\\(?:\\.|[^\\]))*/g, "$1…")
  .replace(/(password=)[^&\s"]+/g, "$1…");
const record = (entry) => {
  const last = state.entries.at(-1), {socket, title, way, texts} = entry;
  render();
  if (entry.merges && last?.title === title && last.socket === socket && last.way === way) {
    last.texts.push(...texts); return last;
  }
  const through = [0, 1].filter((lane) => lanes[lane] && lane !== entry.lane);
  state.entries.push(Object.assign(entry, {at: new Date(), through}));
  state.entries.splice(0, state.entries.length - (state.pausedAt ? 3_000 : 300));
  return entry;
};
const WITH_FILE = "(a form with a file)";
// Sends a request; it and its answer are one entry.
const request = async (method, path, headers, body) => {
  const asked = new Request(path, {method, headers, body}), start = performance.now();
  const line = hideSecrets(asked.url.slice(location.origin.length));
  const entry = record({kind: "http", method, path: line, title: `${method} ${line}`, status: 0,
    headers: [...asked.headers].map(([name, value]) => [name, hideSecrets(value)]),
    body: body instanceof FormData ? WITH_FILE : hideSecrets(body ?? ""),
    resend: () => request(method, path, headers, body)});
  try {
    const response = await fetch(asked), answer = await response.text();
    Object.assign(entry, {status: response.status, reason: response.statusText,
      text: hideSecrets(answer), bytes: bytesOf(answer), answered: [...response.headers]});
    return {response, answer, entry};
  } catch {
    entry.status = -1;
    throw new Error("No answer. Is the server running, and is there a network?");
  } finally { entry.ms = performance.now() - start; render(); }
};
// A request of the page's own: JSON in and out. Throws an Error with the server's words.
const api = async (method, path, json) => {
  const headers = state.login ? [["Authorization", `Bearer ${state.login.token}`]] : [];
  if (json) headers.push(["Content-Type", "application/json"]);
  const {response: {ok, status}, answer} = await request(method, path, headers,
    json && JSON.stringify(json));
  const value = parsed(answer);  // a proxy may answer no JSON
  if (ok) return value;
  const detail = value?.detail ?? `The server answered ${status}. Try again later.`;
  const {msg, loc} = Array.isArray(detail) ? detail[0] : {msg: detail, loc: []};
  throw Object.assign(new Error(msg.replace(/^String/, "It")), {field: loc.at(-1), status});
};
const complain = ({message}) => note(`Error: ${message}`, true);  // in the room
const attempt = (...call) => api(...call).catch(complain);
const copy = (text) => navigator.clipboard?.writeText(text).catch(complain)
  ?? note("Without https the browser lets no page copy.", true);
// A WebSocket whose handshake, frames and end are entries on its lane of the thread.
const openSocket = (url, protocols = []) => {
  const socket = new WebSocket(url, protocols), lane = lanes[0] ? 1 : 0, start = performance.now();
  const path = hideSecrets(url.pathname + url.search), list = hideSecrets(protocols.join(", "));
  const entry = record({kind: "open", method: "GET", path, title: `GET ${path}`, socket, lane,
    status: 0, headers: list ? [["sec-websocket-protocol", list]] : []});
  lanes[lane] = Object.assign(socket, {binaryType: "arraybuffer", lane, entry, asked: new Map()});
  socket.addEventListener("open", () => {
    Object.assign(entry, {status: 101, reason: "Switching Protocols", picked: socket.protocol,
      ms: performance.now() - start, answered: [["sec-websocket-accept", "hidden from scripts"],
        ["sec-websocket-protocol", socket.protocol || "none"],
        ["ping, pong", "a browser answers them itself, and tells no page"]]});
    socket.asked.set("", performance.now()); render();
  });
  socket.addEventListener("message", ({data}) => recordFrame(socket, "in", data));
  socket.addEventListener("close", ({code, reason}) => {
    if (lanes[lane] === socket) lanes[lane] = null;
    entry.status ||= -1;  // the door was shut before 101
    record({kind: "close", way: "in", title: "close", socket, lane, code, reason,
      texts: [`${code} ${reason}`], bytes: [1005, 1006].includes(code) ? 0 : 2 + bytesOf(reason)});
  });
  return socket;
};
const frameOf = (way, data, ms) => {
  const isText = typeof data === "string";
  const text = isText ? hideSecrets(data) : `(${data.byteLength} bytes)`;
  const types = [...text.matchAll(/^{"type":"(\w+)/gm)].map((found) => found[1]);
  return {kind: "frame", way, types, texts: [text], ms,
    event: parsed(text.split("\n", 1)[0]), bytes: data.byteLength ?? bytesOf(data),
    title: [...new Set(types)].join(", ") || (isText ? "text" : "bytes"),
    merges: types.length === 1 && /typing|joined|left/.test(types[0])};  // neighbours: one entry
};
const recordFrame = (socket, way, data) => {
  const frame = frameOf(way, data), {event, types} = frame, now = performance.now();
  // A receipt has its message's mid, a history answers a join; all else is taken as the answer.
  const question = event?.mid ?? (/^(join|history)$/.test(types[0]) ? "history" : "");
  if (way === "out") socket.asked.set(question, now);
  else {
    if (event?.http_version) socket.entry.seen = event;  // it echoes the handshake
    frame.ms = now - socket.asked.get(question) || undefined;  // NaN: nobody had asked
    socket.asked.delete(question);
  }
  record(Object.assign(frame, {socket, lane: socket.lane}));
};
const sendFrame = (socket, text) => { recordFrame(socket, "out", text); socket.send(text); };
const socketUrl = (path) => new URL(path, location.href.replace(/^http/, "ws").replace(/#.*/, ""));

// -- The log-in: kept, renewed before its end, asked for again where it ends all the same --------
const claimsOf = ({token}) => {  // what a token says of itself; only the server knows if it is true
  try { return parsed(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"))) ?? {}; }
  catch { return {}; }
};
const lifeOf = (login) => (claimsOf(login).exp - claimsOf(login).iat) * 1_000 || 3_600_000;
const keepLogIn = (value) => keep("login", value, state.login.stay ? local : session);
const takeLogIn = (token, stay) => {
  if (stay) keep("login", null, session);
  state.login = {token, stay, renewAt: Date.now() + 0.8 * lifeOf({token})};
  keepLogIn(state.login);
};
// The clock is looked at, since a timer would stop while the computer sleeps.
setInterval(() => {
  if (Date.now() > state.login?.renewAt) renew();
  if (Date.now() > state.retryAt) connect();
  if (Date.now() > sending?.until) disconnected("no answer came");
  if (state.connection === "reconnecting") render();  // it shows the seconds
}, 500);
// A new token for the same log-in. True: it came; false: it will not; null: nobody can tell yet.
const renew = async () => {
  const {login} = state;
  login.renewAt = Date.now() + Math.min(30_000, lifeOf(login) / 20);  // should this one fail
  try {
    const {access_token: token} = await api("POST", "renew");
    if (login === state.login) takeLogIn(token, login.stay);
  } catch ({status}) {
    if (login === state.login && status !== 401) return null;
    login.renewAt = Infinity; return login !== state.login;
  }
  return true;
};
const enter = (token, stay) => {
  takeLogIn(token, stay); $("password").value = "";
  if (state.me) for (const news of [token, null]) keep(`news.${state.me}`, news);  // to other tabs
  connect();
};
const logIn = async (username, password, stay) =>
  enter((await api("POST", "login", {username, password, stay})).access_token, stay);
// The log-in has ended: renew it if it stays, else ask for the password over the page as it is.
const logInEnded = async (reason) => {
  const {login} = state, isOld = /expired/.test(reason);
  hangUp(); state.connection = "connecting";
  const renewed = isOld && login.stay && await renew();
  if (renewed) return connect();
  if (renewed === null) return disconnected("");
  if (!state.me) return refuse("Your log-in has ended.");
  login.renewAt = Infinity; state.connection = "logged out";
  state.why = isOld ? `After ${Math.round(lifeOf(login) / 60_000)} minutes`
    : reason.replace("Unauthorized: ", "");
  askAgain(); render();
};

// -- Rooms -------------------------------------------------------------------------------------
const MAX_FOLLOWED = 48;    // rooms of last time, and private ones; one socket may follow 100
const MAX_TEXT = 4_000;     // characters of a message
const MAX_MESSAGES = 1_000; // of a room that are kept here; older ones come back on scrolling up
// A room's name in any spelling is one key, and so are the two names of a private conversation.
const keyOf = (name) => {
  const folded = name.normalize("NFKC").toUpperCase().toLowerCase();
  return folded.startsWith("@") ? `@${folded.slice(1).split("+").sort().join("+")}` : folded;
};
const keptAs = (what, key) => `${what}.${state.me}.${state.epoch}.${key}`;
const roomOf = (name) => {
  const key = keyOf(name), {rooms} = state;
  if (!rooms.has(key)) rooms.set(key, {key, name, items: new Map(), last: null, more: false,
    joined: "no",  // then "asked", then "yes": only when its history is here, all else of it counts
    read: kept(keptAs("read", key)), unread: new Set(), newAfter: null,
    newCount: 0, here: new Set(), typing: new Map(), loading: false, refused: "", place: 0,
    left: kept(keptAs("left", key), -1)});  // the last id when it was closed
  return rooms.get(key);
};
const isPrivate = (room) => room.key.startsWith("@");
const privateWith = (user) => `@${[state.me, user].sort().join("+")}`;
const titleOf = ({name}) => !name.startsWith("@") ? name
  : name.slice(1).split("+").find((one) => keyOf(one) !== keyOf(state.me)) ?? state.me;
const pathOf = (name) => `rooms/${encodeURIComponent(name)}/messages`;
const pendingIn = ({key}) => [...state.outbox.values()].filter(({room}) => keyOf(room) === key);
const isListed = (room) => room === state.current || pendingIn(room).length
  || (!room.refused && (room.last ?? 0) > room.left);
const oldestOf = (room) => [...room.items.values()].find(({id}) => id)?.id;
const roleOf = (user) => state.roles.get(user) ?? "member";
const may = (...roles) => roles.includes(roleOf(state.me));
const readTo = (room, id) => keep(keptAs("read", room.key), room.read = id);
const markRead = (room, id = room.last) => {
  if (id > room.read) readTo(room, id);
  for (const one of room.unread) if (one <= room.read) room.unread.delete(one);
};
const atNewest = () => $("chatLog").scrollTop > -40;  // it counts down from 0, the newest
const isLooking = (room) =>
  room === state.current && !document.hidden && atNewest() && !state.search?.found;
const keepRooms = () => keep(`rooms.${state.me}`, [...state.rooms.values()]
  .filter((room) => !isPrivate(room) && room.joined !== "no")
  .map(({name}) => name).slice(-MAX_FOLLOWED));
const openRoom = (name) => {
  const old = state.current, room = roomOf(name);
  if (old && old !== room && !old.unread.size) old.newAfter = null;
  if (old !== room) $("messageText").value = kept(keptAs("draft", room.key), "");
  Object.assign(room, {left: -1, refused: ""});
  Object.assign(state, {current: room, search: null}); join(room);
  if (addressed() !== room.name) location.hash = encodeURI(room.name);
  $("side").hidePopover(); draw();
  if (!matchMedia("(pointer: coarse)").matches) $("messageText").focus();
  return room;
};
const leaveRoom = (room) => {  // a private one is followed on, and comes back with a new message
  if (isPrivate(room)) keep(keptAs("left", room.key), room.left = room.last ?? 0);
  else { transmit({type: "leave", room: room.name}); state.rooms.delete(room.key); keepRooms(); }
  openRoom("lobby");
};
const addressed = () => {
  try { return decodeURIComponent(location.hash.slice(1)) || "lobby"; } catch { return "lobby"; }
};
addEventListener("hashchange", () => {
  if (state.me && keyOf(addressed()) !== state.current.key) openRoom(addressed());
});

// -- The outbox: what is typed is kept until the server has it ---------------------------------
let sending = null;  // {mid, until}: what waits for its receipt; one by one keeps their order
const keepItem = (item, value = item) => keep(`outbox.${state.me}.${item.mid}`, value);
const loadOutbox = () => {
  const mine = Object.keys(local).filter((name) => name.startsWith(`lobby.outbox.${state.me}.`));
  const items = mine.map((name) => parsed(local.getItem(name))).filter(Boolean);
  for (const item of items.sort((one, other) => one.at - other.at)) {
    if (!state.outbox.has(item.mid)) state.outbox.set(item.mid, item);
    join(roomOf(item.room));  // to be seen somewhere
  }
};
const post = (room, text) => {
  const mid = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const item = {mid, room: room.name, user: state.me, text, at: Date.now() / 1_000};
  state.outbox.set(mid, item); keepItem(item);
  Object.assign(room, {newAfter: null, place: 0}); $("chatLog").scrollTop = 0;
  if (state.search) endSearch();
  sendNext();
};
const sendNext = () => {
  const next = [...state.outbox.values()].find((item) => !item.problem);
  render();
  if (sending || !next || state.connection !== "connected") return;
  sending = {mid: next.mid, until: Date.now() + 20_000};
  transmit({type: "message", room: next.room, text: next.text, mid: next.mid});
};
// The server has it, or has refused it. Returns the message, whose element is used on.
const settle = (mid, problem = null) => {
  const item = state.outbox.get(mid);
  if (!item) return null;
  if (problem) item.problem = problem; else state.outbox.delete(mid);
  keepItem(item, problem && item);
  if (sending?.mid === mid) sending = null;
  sendNext(); return item;
};
const tryAgain = (item) => { delete item.problem; keepItem(item); sendNext(); };

// -- Events ------------------------------------------------------------------------------------
const hear = (event) => {
  const {type, user, id} = event;
  render();
  if (type === "welcome") return welcome(event);
  if (type === "error") return hearError(event);
  if (type === "role") {
    if (user === state.me) quietly();  // every message is drawn anew, with other tools
    return state.roles.set(user, event.role);
  }
  const isKnown = state.rooms.has(keyOf(event.room));
  const isNew = type === "message" && event.room.startsWith("@");  // somebody begins to talk
  if (!isKnown && !isNew) return settle(event.mid);  // it was left meanwhile
  const room = roomOf(event.room);
  if (type === "history") return hearHistory(room, event);
  if (room.joined !== "yes") {  // its history will have it
    if (type !== "message" || room.joined === "asked") return;
    if (room.read === null) readTo(room, id - 1);
    return join(room);
  }
  switch (type) {
    case "presence": room.here = new Set(Object.keys(event.users));
      for (const one of room.here) state.roles.set(one, event.users[one]);
      break;
    case "joined": state.roles.set(user, event.role);  // and then as for "left"
    case "left": hearPerson(room, event); break;
    case "message": addMessage(room, event, isLooking(room)); break;
    case "deleted": room.unread.delete(id);
      for (const one of [room.items.get(id), ...state.search?.found ?? []])
        if (one?.id === id) Object.assign(one, {gone: true, text: ""});
      break;
    case "typing":
      if (user !== state.me) room.typing.set(user, Date.now() + 5_000);
      setTimeout(render, 5_000);  // to take it out
  }
};
const hearHistory = (room, {room: name, messages, more, complete}) => {
  if (room.joined === "yes" && room.loading) {  // an older page
    const oldest = oldestOf(room), older = messages.filter(({id}) => id < oldest);
    const items = new Map([...older.map((one) => [one.id, one]), ...room.items]);
    room.newCount += older.filter((one) => one.id > (room.newAfter ?? Infinity)).length;
    quietly(); return Object.assign(room, {loading: false, more, items});
  }
  Object.assign(room, {name, joined: "yes", refused: ""});  // named as the server spells it
  if (!room.last || !complete) {
    Object.assign(room, {items: complete ? room.items : new Map(), more, last: 0});
    if (room.read === null) readTo(room, messages.at(-1)?.id ?? 0);
  }
  for (const message of messages) addMessage(room, message, false);
  keepRooms();
};
const addMessage = (room, event, isSeen) => {
  const message = Object.assign(settle(event.mid) ?? {}, event);
  if (message.id <= room.last) return;
  room.last = message.id; room.typing.delete(message.user);
  if (isSeen) markRead(room);
  else if (message.user !== state.me && message.id > room.read) {
    if (!room.unread.size) room.newAfter = room.read;
    room.newCount = room.unread.add(message.id).size;
    if (document.hidden) announce(room, message);
  }
  room.items.set(message.id, message);
  // Whoever reads further up keeps all; else a fifth goes at once, not one with each message.
  const isReading = room.loading || (room === state.current && !atNewest());
  if (room.items.size <= MAX_MESSAGES || isReading) return;
  for (const key of [...room.items.keys()].slice(0, MAX_MESSAGES / 5)) room.items.delete(key);
  room.more = true;
};
// Comings and goings are one line as long as nothing else is said; who leaves and comes back at
// once has done neither. In a private conversation they are no news: the list shows them.
const hearPerson = (room, {type, user}) => {
  if (type === "joined") room.here.add(user); else room.here.delete(user);
  room.typing.delete(user);
  if (user === state.me || isPrivate(room)) return;
  let last = [...room.items.values()].at(-1);
  if (!last?.joined) {
    last = {joined: new Set(), left: new Set()};
    room.items.set(last, last);
  }
  const undone = type === "joined" ? last.left : last.joined;
  if (!undone.delete(user)) last[type].add(user);
};
const hearError = ({mid, message, room: name, retry_after: wait}) => {
  const room = name && state.rooms.get(keyOf(name));
  const later = (action) => setTimeout(action, wait * 1_000);
  if (state.outbox.has(mid)) {
    if (!wait) return settle(mid, message);
    sending = {mid, until: Infinity}; later(() => { sending = null; sendNext(); });
  } else if (room?.joined === "asked") {
    room.joined = "no";
    if (wait) later(() => join(room)); else room.refused = message;
  } else {
    if (room?.loading) later(() => { room.loading = false; render(); });
    complain({message});
  }
};
// A line for the reader alone, in the room: what was found does not stay before it.
const note = (notice, isWrong = false) => {
  const item = {notice, isWrong};
  state.current?.items.set(item, item); render();
  if (state.search?.found) state.search = null;
};
const welcome = ({user, role, epoch, rooms: talks}) => {
  if (state.me && state.epoch !== epoch) return location.reload();  // another database
  Object.assign(state, {me: user, epoch, connection: "connected", why: ""});
  state.roles.set(user, role);
  for (const room of state.rooms.values()) Object.assign(room, {joined: "no", loading: false});
  roomOf("lobby").joined = "asked";  // by the socket's URL
  loadOutbox();
  if (state.current) join(state.current); else openRoom(addressed());
  const known = kept(`rooms.${user}`, []).map(roomOf), followed = talks.map(roomOf);
  for (const room of [...known, ...followed.slice(0, MAX_FOLLOWED)]) join(room);
  sendNext();
};

// -- Notifications: of private messages and mentions, for whoever has asked ---------------------
const isNotified = () =>
  window.Notification?.permission === "granted" && kept(`notify.${state.me}`);
const isMention = (text) => {  // between Chinese words there is no space that could end a name
  const end = /\p{sc=Han}$/u.test(state.me) ? "" : "(?![\\p{L}\\p{M}\\p{N}_-])";
  return new RegExp(`(?<![\\p{L}\\p{N}])@${state.me}${end}`, "iu").test(text);
};
const announce = (room, {user, text, id}) => {
  if (!isNotified() || !(isPrivate(room) || isMention(text))) return;
  try {
    const shown = new Notification(user, {body: text.slice(0, 200), tag: `lobby ${id}`});
    shown.onclick = () => { window.focus(); openRoom(room.name); };
  } catch { /* some phones have them for service workers only */ }
};

// -- The connection ----------------------------------------------------------------------------
let socket = null, retries = 0;  // failed connections in a row
const transmit = (event) => {
  if (socket?.readyState === WebSocket.OPEN) sendFrame(socket, JSON.stringify(event));
};
const cursorOf = ({last}) =>  // after the last message that is here, or the newest page
  last ? {after: last, epoch: state.epoch} : {};
const join = (room) => {
  if (room.joined !== "no" || state.connection !== "connected") return;
  room.joined = "asked"; transmit({type: "join", room: room.name, ...cursorOf(room)});
};
// Lets go of the socket: what it still says is not heard.
const hangUp = () => {
  if (socket) Object.assign(socket, {onmessage: null, onclose: null}).close();
  socket = sending = null; state.retryAt = Infinity;
};
const connect = () => {
  hangUp();
  if (state.connection === "logged out") $("dialog").close();
  const url = socketUrl("ws/chat");
  url.search = new URLSearchParams({room: "lobby", ...cursorOf(state.rooms.get("lobby") ?? {})});
  state.connection = "connecting"; render();
  try { socket = openSocket(url, ["lobby.v1", `bearer.${state.login.token}`]); }
  catch { return refuse("This is no token."); }
  socket.onmessage = ({data}) => {
    retries = 0;
    for (const line of data.split("\n")) hear(JSON.parse(line));
  };
  socket.onclose = ({code, reason}) => {
    if (code !== 1000 && code !== 1008) disconnected(reason);
    else if (/expired|Password|again/.test(reason)) logInEnded(reason);
    else refuse(reason.replace("Unauthorized: ", ""));
  };
};
const disconnected = (why) => {
  hangUp();
  const wait = Math.min(30_000, 1_000 * 2 ** retries++) * (0.5 + Math.random());
  Object.assign(state, {connection: "reconnecting", retryAt: Date.now() + wait, why}); render();
  if (retries === 4) api("GET", "healthz").then(() => {  // so HTTP gets through
    state.why = "the server opens no socket; does a proxy drop Upgrade or Host?";
  }, () => {});
};
// Back to the log-in page, loaded anew: nothing of this person stays for the next one to see.
const refuse = (reason) => {
  hangUp(); keepLogIn(null); document.body.hidden = true;  // at once, however long that takes
  keep("problem", reason, session); location.replace(location.pathname);
};
addEventListener("online", () => { if (state.connection === "reconnecting") connect(); });
addEventListener("offline", () => { if (socket) disconnected("offline"); });
document.addEventListener("visibilitychange", render);

// -- Drawing the chat --------------------------------------------------------------------------
const clock = new Intl.DateTimeFormat([], {timeStyle: "short"});
const moment = new Intl.DateTimeFormat([], {dateStyle: "full", timeStyle: "medium"});
const digits = new Intl.NumberFormat();
const plural = (count, word) => `${digits.format(count)} ${word}${count === 1 ? "" : "s"}`;
const dayOf = ({at}) => new Date(at * 1_000).toDateString();
const dayName = (day) => {
  const ago = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(day)) / 86_400_000);
  return ["Today", "Yesterday"][ago] ?? new Date(day).toLocaleDateString([], {dateStyle: "full"});
};
const timeOf = (at, day = "") => make("time", {dateTime: new Date(at * 1_000).toISOString(),
  title: moment.format(at * 1_000)}, day, clock.format(at * 1_000));
// Code in backticks, @names and links; a link ends where a sentence could, in Chinese too.
const INLINE = new RegExp("(`[^`\\n]+`|(?<![\\p{L}\\p{N}])@[\\p{L}\\p{M}\\p{N}_-]+"
  + "|https?:\\/\\/(?:\\([^\\s()]*\\)|[^\\s<>\"()（），。；：！？、「」『』《》【】])*"
  + "(?:\\([^\\s()]*\\)|[^\\s<>\"（），。；：！？、「」『』《》【】.,:;!?'()[\\]{}]))", "iu");
const marked = (text, q) => {  // what was searched for stands out
  const at = q ? text.toLowerCase().indexOf(q.toLowerCase()) : -1, end = at + q.length;
  return at < 0 ? [text]
    : [text.slice(0, at), make("mark", text.slice(at, end)), ...marked(text.slice(end), q)];
};
const inline = (text, q) => text.split(INLINE).flatMap((part, index) => {
  if (index % 2 === 0) return marked(part, q);
  if (part[0] === "`") return make("code", marked(part.slice(1, -1), q));
  if (part[0] === "@") return make("b", part);
  return make("a", {href: part, target: "_blank", rel: "noopener noreferrer"}, part);
});
const textOf = (text, q = "") => {
  const count = (letters) => text.match(letters)?.length ?? 0;
  const leftward = count(/[\p{sc=Arab}\p{sc=Hebr}\p{sc=Syrc}\p{sc=Thaa}]/gu);
  const dir = leftward * 2 > count(/\p{L}/gu) ? "rtl" : "ltr";  // of most letters, not the first
  return make("div.text", {dir}, text.split(/\n?```(?:\w*\n)?([^]+?)\n?```\n?/).flatMap(
    (part, index) => index % 2 ? make("pre", {tabIndex: 0}, marked(part, q)) : inline(part, q)));
};
const avatar = (user) => {
  const sum = [...user].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 9973, 7);
  const element = make(`span.avatar.${user === state.me ? "own" : ""}`, {ariaHidden: "true"},
    [...user][0].toUpperCase());
  element.style.setProperty("--hue", sum * 137 % 360); return element;
};
const toolsOf = ({id, user, room, text, mid, at, grouped}) => {
  const ask = ({target}) => Object.assign(target, {textContent: "Really delete?",
    onclick: () => attempt("DELETE", `${pathOf(room)}/${id}`),
    onblur: () => Object.assign(target, {textContent: "Delete", onclick: ask})});
  return make("div.tools", grouped && timeOf(at), button("Copy", () => copy(text)),
    button("On the wire", () => showOnWire(id, mid)),
    (user === state.me || may("moderator", "admin")) && button("Delete", ask, ".delete"));
};
// `waits`: why it is not sent yet; `q`: what was searched for, if this is a hit.
const messageRow = cached((item, classes, waits = "", q = "") => {
  const {user, at, mid, problem, text} = item;
  return make(`article.message.${classes}`, {item, tabIndex: -1,
    ariaLabel: `${user}, ${moment.format(at * 1_000)}`}, avatar(user),
  make("div.who", make("button.cut", {tabIndex: -1, dir: "auto",
    onclick: ({target}) => showPerson(user, target)}, user),
  timeOf(at, q && `${dayName(dayOf(item))} `),
  classes === "hit" && button("Go there", () => jump(item), ".link")),
  textOf(item.gone ? "Message deleted" : text, q), waits && make("p.state", waits,
    problem && button("Try again", () => tryAgain(item), ".link"),
    problem && button("Discard", () => settle(mid), ".link")),
  classes.includes("done") && toolsOf(item));
});
const lineRow = cached((thing, selector, text) => make(selector, text));
const listed = (people, word) => {
  const names = [...people].slice(0, 5), rest = people.size - names.length;
  if (rest > 0) names.push(`${rest} more`);
  return names.length ? [`${new Intl.ListFormat("en-GB").format(names)} ${word}`] : [];
};
const rowsOf = (room) => {
  const rows = [];
  let head = null, day = "", isMarked = room.newAfter === null;
  for (const item of [...room.items.values(), ...pendingIn(room)]) {
    const {user, at, id, joined, left, gone, problem} = item;
    const notice = joined ? [...listed(joined, "joined"), ...listed(left, "left")].join(", ")
      : item.notice;
    if (notice) rows.push(lineRow(item, item.isWrong ? "p.notice.wrong" : "p.notice", notice));
    if (!user) continue;
    const isNextDay = dayOf(item) !== day, isOwn = user === state.me;
    const isFirstNew = !isMarked && id > room.newAfter && !isOwn;
    if (isNextDay) rows.push(lineRow(item, "p.day", dayName(day = dayOf(item))));
    const count = `${room.newCount}${!head && room.more ? "+" : ""}`;  // more of them, or older
    if (isFirstNew) rows.push(lineRow(room, "p.new", `${count} new`));
    isMarked ||= isFirstNew;
    // What was shown with its head keeps it, or the log would jump.
    item.grouped = item.grouped !== false && !isNextDay && !isFirstNew && head?.user === user
      && at - head.at < 300;
    if (!item.grouped) head = item;
    const waits = id ? "" : problem ? `Not sent: ${problem}`
      : state.connection === "connected" ? "Sending" : "Waiting for the connection";
    item.isMention ??= !isOwn && isMention(item.text);
    // Not all of them have a style: done and mayDelete are there for the tools.
    const kinds = {grouped: item.grouped, gone, failed: problem, waiting: waits && !problem,
      done: id && !gone, mention: !gone && item.isMention, mayDelete: may("moderator", "admin")};
    const classes = Object.keys(kinds).filter((one) => kinds[one]).join(".");
    rows.push(messageRow(item, classes, waits));
  }
  return rows;
};
// A search opens at its top; a room at its first new message, or where it was left.
const arrive = (view) => {
  const log = $("chatLog"), line = view.unread?.size && $("messages").querySelector(".new");
  log.scrollTop = view.found ? -log.scrollHeight : line ? 0 : view.place;
  if (line) line.scrollIntoView({block: "nearest"});
};
let quietTimer = 0;
const quietly = () => {  // a screen reader hears only news
  clearTimeout(quietTimer); $("chatLog").ariaLive = "off";
  quietTimer = setTimeout(() => { $("chatLog").ariaLive = "polite"; }, 500);
};
const emptyRow = cached((room, name, refused) => make("div.empty", icon("mark"),
  make("h2", name, refused ? " cannot be opened" : isPrivate(room) ? " and you" : " is new"),
  make("p.dim", refused || (isPrivate(room) ? "Nobody else sees what you write here."
    : "Write the first line. All who join later will find it here."))));
const sideRow = (sign, name, unread, badge, isCurrent, onclick) => make("li",
  make(`button.${unread ? "unread" : ""}`, {onclick, ariaCurrent: isCurrent ? "true" : null},
    make(`span.sign.${sign === "●" ? "on" : ""}`, {ariaHidden: "true"}, sign),
    make("span.cut.grow", {dir: "auto"}, name),
    unread && [make("span.count", unread), make("span.unseen", "unread")],
    !unread && badge && make("span.badge", badge)));
const roomRow = cached((room, ...shown) => sideRow(...shown, () => openRoom(room.name)));
const personRow = cached((user, role) => sideRow("●", user, 0, role.replace("member", ""), false,
  ({currentTarget}) => showPerson(user, currentTarget)), new Map());
const unreadIn = ({unread, more, read, items}) =>  // there may be more on older pages
  unread.size && `${unread.size}${more && oldestOf({items}) > read ? "+" : ""}`;
const isOnline = (user) => [...state.rooms.values()].some((room) => room.here.has(user));
const drawSide = () => {
  const rooms = [...state.rooms.values()].filter(isListed)
    .sort((one, other) => titleOf(one).localeCompare(titleOf(other)));
  const row = (room) => roomRow(room,
    !isPrivate(room) ? "#" : isOnline(titleOf(room)) ? "●" : "○", titleOf(room), unreadIn(room),
    pendingIn(room).some((item) => item.problem) ? "not sent" : "", room === state.current);
  arrange($("rooms"), rooms.filter((room) => !isPrivate(room)).map(row));
  arrange($("private"), rooms.filter(isPrivate).map(row));
  const online = new Set([...state.rooms.values()].flatMap((room) => [...room.here]));
  for (const user of [state.me, ...rooms.filter(isPrivate).map(titleOf)]) online.delete(user);
  arrange($("people"), [...online].sort().map((user) => personRow(user, roleOf(user))));
  if ($("myName").textContent !== state.me) $("myAvatar").replaceChildren(avatar(state.me));
  say("myName", state.me); say("myRole", roleOf(state.me));
  const unread = rooms.reduce((sum, room) => sum + room.unread.size, 0);
  document.title = unread ? `(${unread}) Lobby` : "Lobby";
  put("menu", {ariaLabel: `Rooms and people${unread ? `, ${unread} unread` : ""}`});
  put("menuCount", {textContent: String(unread), hidden: !unread});
  say("notify", isNotified() ? "Notify me no more" : "Notify me of mentions");
};
const drawRoom = (room) => {
  const {connection, retryAt, why, search} = state, title = titleOf(room), isTalk = isPrivate(room);
  const others = [...room.here].filter((user) => user !== state.me).sort();
  say("roomName", isTalk ? title : `# ${title}`);
  say("who", isTalk ? isOnline(title) ? "online" : "away"
    : others[0] ? ["you", ...others].join(", ") : "only you");
  put("leave", {hidden: room.key === "lobby" || pendingIn(room).length > 0});
  put("searching", {hidden: !search}); put("search", {ariaExpanded: String(Boolean(search))});
  say("state", connection);
  say("dot", connection === "connected" ? "●" : "○");
  const isOut = connection === "logged out", isAway = connection === "reconnecting";
  put("strip", {hidden: !isOut && !isAway});
  say("stripText", isOut ? "Your log-in has ended. What you write is kept." : isAway
    ? `No connection${why && `: ${why}`}. What you write is kept and goes out then.` : "");
  say("seconds", isAway ? `Trying again in ${Math.ceil((retryAt - Date.now()) / 1_000)} s.` : "");
  say("now", isOut ? "Log in" : "Now");
  const typing = [...room.typing].filter(([, until]) => Date.now() < until).map(([user]) => user);
  say("typing", typing.length ? `${typing.join(", ")} ${typing[1] ? "are" : "is"} typing` : "");
  const text = $("messageText").value.trim(), over = [...text].length - MAX_TEXT;
  put("hint", {className: over > 0 ? "problem" : "", textContent: over > 0
    ? `${plural(over, "character")} too many`
    : "Enter sends, Shift + Enter breaks the line, /help"});
  put("send", {disabled: !text || over > 0});
  put("messageText", {placeholder: `Message ${isTalk ? "" : "#"}${title}`});
  const below = atNewest() ? 0 : room.unread.size;
  put("newest", {hidden: Boolean(search) || !(below || $("chatLog").scrollTop < -400),
    textContent: below ? `${below} new below` : "Jump to the newest"});
};
let drawn = null;  // the room, or what was found, that is shown; null until its history is here
const draw = () => {
  drawTimer = 0;
  const {me, current: room, search} = state;
  put("access", {hidden: Boolean(me)}); put("app", {hidden: !me});
  if (state.connection) say("problem", me ? "" : state.connection);
  if (!me) return document.title = "Lobby";
  const view = search?.found ? search : room, isNew = view !== drawn;
  const name = isPrivate(room) ? titleOf(room) : `#${room.name}`;
  const isHere = view === search || room.last !== null || room.refused;
  const rows = view === search ? searchRows(search) : rowsOf(room);
  const isEmpty = view === room && isHere && !rows.some((row) => row.item);
  if (isNew) quietly();
  arrange($("messages"), isEmpty ? [emptyRow(room, name, room.refused), ...rows] : rows);
  if (isNew && isHere) arrive(view);
  if (isLooking(room) && isHere) markRead(room);
  drawn = isHere ? view : null;
  if (drawn === room) room.place = $("chatLog").scrollTop;
  drawSide(); drawRoom(room); loadOlder();
  if (!$("wire").hidden) drawWire();
};

// -- Searching: messages of the room, rooms, and people who may be away, in place of the log -----
const LOOKS = {messages: "Search in this room", rooms: "Find or make a room",
  users: "Find a person"};
const openSearch = (kind, q = "") => {
  state.search = {kind};
  put("query", {value: q, placeholder: LOOKS[kind], ariaLabel: LOOKS[kind]});
  $("side").hidePopover(); drawRoom(state.current); $("query").focus();
  if (q || kind !== "messages") find();
};
const endSearch = () => openRoom(state.current.name);
// Messages come by pages; `sofar`: what was found. Of names, the first fifty are enough.
const find = async (sofar = []) => {
  const {kind} = state.search, q = $("query").value.trim(), query = new URLSearchParams();
  if (kind === "messages" && !q) return;
  if (q) query.set("q", q);
  if (kind !== "users") query.set("limit", 50);
  if (sofar.length) query.set("before", sofar.at(-1).id);
  const search = state.search = {...state.search};  // an answer to an earlier one comes too late
  const path = kind === "messages" ? pathOf(state.current.name) : kind;
  const answer = await attempt("GET", `${path}?${query}`);
  if (!answer || state.search !== search) return;
  const found = kind === "messages" ? [...sofar, ...answer.messages.reverse()]
    : answer.filter(({room: name = ""}) => !name.startsWith("@"));
  const isThere = found.some(({room: name = ""}) => keyOf(name) === keyOf(q));
  const isName = /^[\p{L}\p{M}\p{N}_-]{1,32}$/u.test(q);
  if (kind === "rooms" && isName && !isThere) found.push({isNew: q});
  state.search = {kind, q, found, more: answer.more}; draw();
  if (sofar[0]) [...$("messages").querySelectorAll(".message")][sofar.length]?.focus();
};
// Shows a message in its place, or if that is long ago, among those that were written around it.
const jump = async ({id}) => {
  const {current: room, search} = state, path = pathOf(room.name);
  if (room.items.has(id)) endSearch(); else {
    const pages = await Promise.all([`before=${id}`, `after=${id - 1}`].map((where) =>
      attempt("GET", `${path}?limit=50&${where}`)));
    if (state.search !== search || !pages.every(Boolean)) return;
    const found = pages.flatMap(({messages}) => messages);
    state.search = {...search, found, more: false, isAround: true};
  }
  draw();
  const row = [...$("messages").children].find(({item}) => item?.id === id);
  row?.scrollIntoView({block: "center"}); row?.focus();
};
const nameRow = cached(({room, isNew, online, username, role, banned}) => make("p.found.row",
  username ? button(username, ({target}) => showPerson(username, target))
    : button(isNew ? `Make # ${isNew}` : `# ${room}`, () => openRoom(isNew ?? room)),
  make("span.small.dim", username ? (banned ? "banned" : role) : online > 0 && `${online} here`)));
const resultRow = cached(({found, more}, words) => make("p.notice.results.row",
  make("span.grow", {role: "status"}, words),
  more && button("More", () => find(found), ".link"),
  button(`Back to ${titleOf(state.current)}`, endSearch, ".link")));
const searchRows = (search) => {
  const {kind, q, found, isAround} = search, isNames = kind !== "messages";
  const words = isNames ? (found.length ? LOOKS[kind] : "No name begins so.")
    : isAround ? `“${q}”, and what was said around it`
      : `${plural(found.length, "message")} with “${q}”, newest first`;
  return [resultRow(search, words),
    ...found.map((one) => isNames ? nameRow(one)
      : messageRow(one, one.gone ? "gone" : isAround ? "" : "hit", "", q))];
};

// -- What floats: a person's card, and a dialog that asks for passwords --------------------------
const withArticle = (role) => `${role === "admin" ? "an" : "a"} ${role}`;
const RIGHTS = {member: "May write, and delete what is their own.",
  moderator: "May delete messages, kick and ban.", admin: "May do everything, this too."};
// What the reader may do with somebody: button, question, what it means, and the request for it.
const actionsOn = (user, role, banned) => [
  ["Kick", `Kick ${user}`, "Ends all open sockets; may come back.", "POST", "kick"],
  banned ? ["Unban", `Unban ${user}`, "May log in again.", "POST", "unban"]
    : ["Ban", `Ban ${user}`, "Out until somebody lifts the ban.", "POST", "ban"],
  ...Object.keys(RIGHTS).filter((one) => may("admin") && one !== role).map((one) =>
    [`Make ${one}`, `Make ${user} ${withArticle(one)}`, RIGHTS[one], "PUT", "role", {role: one}])];
const act = async (user, title, method, what, json) => {
  $("person").hidePopover();
  await api(method, `users/${encodeURIComponent(user)}/${what}`, json); note(`${title}: done.`);
};
// A button that turns into the question whether to do it.
const askingButton = (user, [label, title, consequence, ...how]) => {
  const no = button("No", () => question.replaceWith(row), ".quiet");
  const yes = button(title, () => act(user, title, ...how).catch(complain),
    /^(Make|Unban)/.test(label) ? ".main" : ".wrong");
  const question = make("div.ask", make("b", `${title}?`), make("p.small.dim", consequence),
    make("p.row", yes, no));
  const row = button(label, () => { row.replaceWith(question); no.focus(); });
  return row;
};
const showPerson = async (user, anchor) => {
  const title = `Set ${user}'s password`, setPassword = () => {
    $("person").hidePopover();
    askPasswords(title, "All log-ins of theirs end.", {"New password": "new-password"}, title,
      (fresh) => act(user, title, "PUT", "password", {new: fresh}));
  };
  const show = (role, banned) => {
    const where = banned ? "banned" : isOnline(user) ? "online" : "away";
    const mayAct = user !== state.me && may("moderator", "admin");
    $("person").replaceChildren(make("div.row", avatar(user), make("p.grow", make("b", user),
      make("br"), make("span.small.dim", `${role}, ${where}`))),
    button("Message", () => { $("person").hidePopover(); openRoom(privateWith(user)); }),
    ...(mayAct ? actionsOn(user, role, banned).map((one) => askingButton(user, one)) : []),
    mayAct && may("admin") ? button("New password", setPassword) : "");
    put("person", {ariaLabel: user}); $("person").togglePopover({force: true, source: anchor});
  };
  show(roleOf(user), false);
  const found = await attempt("GET", `users?q=${encodeURIComponent(user)}`) ?? [];
  const one = found.find(({username}) => username === user);
  if (!one || $("person").ariaLabel !== user || !$("person").matches(":popover-open")) return;
  const isKnown = one.role === roleOf(user) && !one.banned;  // the card says so already
  state.roles.set(user, one.role);
  if (!isKnown) show(one.role, one.banned);
};
// A dialog with one field for each of `labels`, by what a browser may fill in.
const askPasswords = (title, why, labels, yes, action, no = "Cancel", onNo = () => {}) => {
  const problem = make("p.problem", {role: "alert"}), close = () => $("dialog").close();
  const fields = Object.entries(labels).map(([label, autocomplete]) =>
    make("label", label, make("input", {type: "password", autocomplete})));
  const form = make("form", make("div", make("h2", {id: "dialogTitle"}, title),
    make("p.small.dim", why)), fields, problem, make("p.row", make("button.main.grow", yes),
    button(no, () => { close(); onNo(); }, ".quiet")));
  onSubmit(form, problem, async () => {
    await action(...fields.map(({lastChild}) => lastChild.value)); close();
  });
  $("dialog").replaceChildren(form);
  if (!$("dialog").open) $("dialog").showModal();
};
const askAgain = () => askPasswords(`Your log-in has ended, ${state.me}`,
  `${state.why}. What you typed is kept.`, {Password: "current-password"}, "Log in again",
  (password) => logIn(state.me, password, state.login.stay), "Log out", logOut);
const changePassword = () => askPasswords("Change password",
  "Every other log-in of yours ends. The tabs of this browser go on.",
  {"Password now": "current-password", "New password": "new-password"}, "Change",
  async (old, fresh) => {
    enter((await api("PUT", "me/password", {old, new: fresh})).access_token, state.login.stay);
    note("The password is changed.");
  });

// -- What people do ----------------------------------------------------------------------------
const HELP = `/msg bob hi     says hi to bob alone
/join tea       opens a room
/who            who is here
/search words   finds messages in this room
//word          says "/word"`;
// What a form does: one thing at a time; what goes wrong is told in `problem`.
const onSubmit = (form, problem, action) => form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (form.ariaBusy) return;
  form.ariaBusy = "true"; problem.textContent = "";
  try { await action(event); } catch (error) { problem.textContent = error.message; }
  form.ariaBusy = null;
});
onSubmit($("credentials"), $("problem"), async ({submitter}) => {
  const stay = $("stay").checked, fields = [$("username"), $("password")];
  const [username, password] = fields.map(({value}) => value);
  const tell = (field, words) => {
    say(`${field.id}Problem`, words); field.ariaInvalid = String(words !== "");
  };
  for (const field of fields) tell(field, "");
  try {
    if (submitter?.value === "register") await api("POST", "register", {username, password});
    await logIn(username, password, stay);
  } catch (error) {
    const wrong = $(error.field ?? {401: "password", 409: "username"}[error.status]);
    if (!fields.includes(wrong)) throw error;
    tell(wrong, error.message); wrong.focus();
  }
});
onSubmit($("pasted"), $("problem"), () => enter($("token").value.trim(), false));
const logOut = async () => {
  const answer = attempt("POST", "logout"), late = new Promise((done) => setTimeout(done, 3_000));
  await Promise.race([answer, late]); refuse("Logged out");  // also if the server does not answer
};
on("logOut", "click", logOut);
on("changePassword", "click", () => { $("myMenu").hidePopover(); changePassword(); });
on("notify", "click", async () => {
  const wish = !isNotified(), answer = wish && await window.Notification?.requestPermission();
  keep(`notify.${state.me}`, answer === "granted" || null); $("myMenu").hidePopover(); render();
  if (wish && answer !== "granted") note(isSecureContext
    ? "This browser was told to allow no notifications."
    : "For notifications the browser wants https.", true);
});
const COMMANDS = [  // what a line may look like, and what it does
  [/^\/msg\s+(\S+)\s+([^]+)/, (user, words) => post(openRoom(privateWith(user)), words)],
  [/^\/join\s+#?([^]+)/, openRoom],
  [/^\/who$/, () => note(`Here: ${[...state.current.here].sort().join(", ")}`)],
  [/^\/search\s+([^]+)/, (q) => openSearch("messages", q)],
  [/^\/help$/, () => note(HELP)],
  [/^\/(\/[^]*)|^([^/][^]*)/, (slashed, text) => post(state.current, slashed ?? text)],
];
on("composer", "submit", (event) => {
  const text = $("messageText").value.trim(), room = state.current;
  event.preventDefault();
  if (!text || [...text].length > MAX_TEXT) return;
  const [pattern, run] = COMMANDS.find(([pattern]) => pattern.test(text)) ?? [];
  if (!run) return complain({message: "unknown command; /help lists them"});
  $("messageText").focus();  // Send is disabled now; a command may take the focus elsewhere
  run(...text.match(pattern).slice(1));
  if (state.current === room) $("messageText").value = "";
  keep(keptAs("draft", room.key), null); render();
});
on("messageText", "keydown", (event) => {  // 229: Safari's Enter that accepts a candidate
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault(); $("composer").requestSubmit();
});
let typedAt = 0;
on("messageText", "input", ({target: {value}}) => {
  const room = state.current;
  keep(keptAs("draft", room.key), value || null);
  render();
  if (!value || value[0] === "/" || room.joined !== "yes" || Date.now() - typedAt < 3_000) return;
  typedAt = Date.now(); transmit({type: "typing", room: room.name});
});
const loadOlder = () => {
  const room = state.current, log = $("chatLog"), before = oldestOf(room);
  const above = log.scrollHeight - log.clientHeight + log.scrollTop;
  if (above > 200 || !room.more || room.loading || room.joined !== "yes" || state.search) return;
  room.loading = true; transmit({type: "history", room: room.name, before});
};
on("chatLog", "keydown", ({key, target}) => {  // arrows go from message to message
  const rows = [...$("messages").querySelectorAll(".message")];
  const at = rows.indexOf(target.closest(".message")), step = {ArrowUp: -1, ArrowDown: 1}[key];
  if (step) (at < 0 ? rows.at(-1) : rows[at + step])?.focus();
});
on("chatLog", "scroll", render);
on("newest", "click", () => { $("chatLog").scrollTop = 0; $("messageText").focus(); });
on("leave", "click", () => leaveRoom(state.current));
on("now", "click", () => state.connection === "logged out" ? askAgain() : connect());
on("search", "click", () => state.search ? endSearch() : openSearch("messages"));
on("moreRooms", "click", () => openSearch("rooms"));
on("morePeople", "click", () => openSearch("users"));
on("query", "input", () => { if (state.search.kind !== "messages") find(); });
on("searching", "submit", async (event) => {
  event.preventDefault(); await find();
  const first = $("messages").querySelector(".found button");
  first?.focus(); first?.click();  // a name's card, or a room
});
on("wire", "keydown", ({key}) => { if (key === "Escape") $("closeWire").click(); });
on("room", "keydown", ({key}) => { if (key === "Escape" && state.search) endSearch(); });

// -- The wire explains: what each entry is ------------------------------------------------------
const REQUESTS = [  // by first line and status, the first that fits
  [/^POST \/login 200/, "The password goes up as JSON, a signed token comes back."],
  [/^GET \/ws.* 0$/, "A GET that asks to become a socket: Upgrade, a key, perhaps subprotocols."],
  [/ 101$/, "101: the connection stops being HTTP here. Subprotocol {picked} was picked."],
  [/ 401$/, "{detail}. It wants a valid token."],
  [/ 422$/, "Well formed, not valid. The answer names the field."],
  [/ 4\d\d$/, "Refused: {detail}."],
  [/ 5\d\d$/, "The server's fault: try again."],
  [/ -1$/, "No answer came: no server, or no network."],
  [/ 0$/, "Waiting for the answer."],
  [/ 204$/, "Done. 204 has no body; the others hear of it by an event."],
  [/./, "{chapter} answers{about}."],
];
const FRAMES = {  // by direction and type of a frame's last event
  "in welcome": "The server speaks first: you are {user}, {role}.",
  "in history": "The last {messages}, in one frame.",
  "in presence": "Who is here: {people}.",
  "in joined": "{user} came into {room}. A notice: told, not stored.",
  "in left": "{user} has left {room}: no socket is open there any more.",
  "in message": "{user} wrote. Everybody in {room} gets this very frame.",
  "in own": "The same with id {id}: it is on disk. This is the receipt.",
  "in typing": "{user} is typing: announced to the room, never stored.",
  "in deleted": "Message {id} is gone. Every open page takes it out.",
  "in role": "{user} is {role} from now on. Only an admin may do this.",
  "in error": "Refused: {message}. {then}",
  "out message": "A text frame: no headers, {bytes} B, to everybody in {room}.",
  "out typing": "You are typing: told at most every 3 s, never stored.",
  "out join": "One more room on this socket: {room}, after id {after}.",
  "out leave": "No more of {room} on this socket, please.",
  "out history": "Scrolling up: please the messages before id {before}.",
  "in other": "A text frame: what the route of this socket answers.",
  "out other": "A text frame of {bytes} B. It has no headers: the handshake had them.",
};
const CLOSES = {1000: "closed on purpose. Both sides agree, nothing is lost.",
  1001: "the server goes away. It is tried again.", 1003: "binary, where only text is taken.",
  1005: "closed without a code. Both sides agree, nothing is lost.",
  1006: "no closing frame; the line broke, or the door was shut before 101.",
  1008: "not allowed any more. The reason given: {reason}.",
  1009: "your frame was larger than the server takes.",
  1012: "the server restarts. It is tried again.",
  1013: "you read too slowly, or it is busy. It is tried again."};
const SOCKETS = {"/ws": 3, "/ws-endpoint": 3, "/ws/json": 3, "/ws/inspect": 3, "/ws/protected": 7,
  "/ws/chat": 10, "/ws/{session_id}": 4};  // their chapters, as /openapi.json tells of no sockets
// /openapi.json tells which chapter answers, by its tags, and what a route does.
const learnOperations = async () => {
  const {paths} = await api("GET", "openapi.json").catch(() => ({}));
  if (!paths) return;
  const routes = Object.entries(paths).flatMap(([path, methods]) => Object.entries(methods)
    .map(([method, {tags, description}]) => ({method: method.toUpperCase(), path, tag: tags?.[0],
      about: description?.split(/[.;](\s|$)/)[0].replaceAll("`", "")})));
  const sockets = Object.entries(SOCKETS).map(([path, chapter]) => ({method: "WS", path,
    tag: routes.find(({tag}) => tag?.startsWith(`${chapter}.`))?.tag ?? String(chapter)}));
  state.operations = [...routes, ...sockets].filter(({tag}) => tag).map((one) => ({...one,
    pattern: new RegExp(`^${one.path.replace(/\{[^}]+\}/g, "[^/]+")}${
      one.path === "/inspect" ? "(/.*)?" : ""}$`)}));
  const names = Object.keys({...paths, ...SOCKETS});
  $("paths").replaceChildren(...names.map((value) => make("option", {value})));
  render();
};
const operationOf = (method, path) => state.operations.find((one) =>
  one.pattern.test(path.split("?")[0]) && (one.method === method || one.path === "/inspect"));
const chapterOf = (one) => one ? `chapter ${one.tag.replace(". ", ", ")}` : "the server";
const fill = (words, values) => words.replace(/{(\w+)}/g, (_, name) => values[name] ?? "…");
const sentenceOf = (entry) => {
  const {kind, method, path, title, status, code, text, bytes = 0, way, types, texts} = entry;
  if (kind === "close") return `${code}: ${fill(CLOSES[code] ?? "closed.", entry)}`;
  if (kind !== "frame") {
    const operation = operationOf(method, path), about = operation?.about;
    const [, words] = REQUESTS.find(([is]) => is.test(`${title} ${status}`));
    return fill(words, {picked: entry.picked || "none",
      detail: parsed(text)?.detail ?? entry.reason,
      chapter: chapterOf(operation).split(",")[0].replace(/^./, (one) => one.toUpperCase()),
      about: about ? `: ${about}` : ` with ${plural(bytes, "byte")}`});
  }
  const said = parsed(texts.at(-1).split("\n").at(-1)) ?? {}, wait = said.retry_after;
  const isReceipt = said.type === "message" && said.user === state.me;
  const words = FRAMES[`${way} ${isReceipt ? "own" : said.type}`] ?? FRAMES[`${way} other`];
  return (types.length > 1 ? `${types.length} events, one frame. ` : "") + fill(words, {...said,
    bytes, after: said.after ?? "any", role: withArticle(said.role),
    messages: plural(said.messages?.length ?? 0, "message"),
    people: plural(Object.keys(said.users ?? {}).length, "person").replace("persons", "people"),
    then: wait ? `It is sent again in ${wait} s.` : "The socket stays open."});
};

// -- Drawing the wire --------------------------------------------------------------------------
// Lines as JSON, in which short lists are on a line; keys, strings and numbers stand out.
const pretty = (value) => JSON.stringify(value, null, 2).replace(/[[{][^[\]{}]{0,70}[\]}]/g,
  (list) => list.replace(/\n\s*/g, " "));
const coloured = (line) => {
  const value = parsed(line), parts = value === undefined ? [line] : pretty(value).slice(0, 20_000)
    .split(/("(?:[^"\\]|\\.)*"(?:: )?|\b\d[\d.eE+-]*\b)/);
  return [...parts.map((part, index) => index % 2 === 0 ? part
    : make(part.endsWith('": ') ? "b" : part[0] === '"' ? "i" : "em", part)), "\n"];
};
const section = (title, aside, headers = [], text = "") => make("section",
  make("h3", title, make("span", aside)), make("dl", headers.flatMap(([name, value]) =>
    [make("dt", name), make("dd", value)])),
  text && make("pre", {tabIndex: 0}, text.split("\n").flatMap(coloured)));
// A page can read neither what a browser adds nor a 101's headers: only if the server tells it.
const addedTo = ({kind, seen, text, headers}) => {
  const echo = seen ?? parsed(text), own = new Set(headers.map((pair) => pair.join(": ")));
  if (!echo?.http_version) return section("Added by the browser", "hidden from scripts",
    (kind === "open" ? ["host", "origin", "connection", "upgrade", "sec-websocket-key"]
      : ["host", "user-agent", "accept"]).map((name) => [name, "…"]));
  const added = echo.headers.filter((pair) => !own.has(pair.join(": ")));
  return section("Added by the browser",
    `${plural(added.length, "header")}, as the server saw them`, added);
};
const curlOf = ({kind, method, path, headers, body}) => {
  const quote = (text) => `'${text.replace(/eyJ\S*…/g, "TOKEN").replaceAll("'", "'\\''")}'`;
  const upgrade = kind === "http" ? [] : [["connection", "Upgrade"], ["upgrade", "websocket"],
    ["sec-websocket-version", "13"], ["sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="]];
  const how = method === "HEAD" ? "--head" : `-i -X ${method}`;
  return [`curl ${how} ${quote(location.origin + path)}`,
    ...[...headers, ...upgrade].map((pair) => `-H ${quote(pair.join(": "))}`),
    ...(body ? [`--data-raw ${quote(body)}`] : [])].join(" \\\n  ");
};
const frameSection = ({code, way, bytes, texts}) => {
  const head = (bytes < 126 ? 2 : bytes < 65_536 ? 4 : 10) + (way === "out" ? 4 : 0);
  const size = `${bytes} B, and a head of ${head}${way === "out" ? ", 4 of it the mask" : ""}`;
  return section(code ? "Close frame" : "Payload", size, [], texts.join("\n"));
};
const cardOf = (entry) => {
  const {kind, way, title, headers, body, status, reason, answered, text, at, resend} = entry;
  const exact = `${at.toTimeString().slice(0, 8)}.${String(at.getMilliseconds()).padStart(3, "0")}`;
  return make("div.card", make("div.row.small",
    headers && body !== WITH_FILE && button("Copy as curl", () => copy(curlOf(entry)), ".link"),
    resend && button("Send again", () => resend().catch(() => {}), ".link"), make("time", exact)),
  way ? frameSection(entry) : [section("Request", title, headers, body), addedTo(entry),
    section("Answer", status > 0 ? `${status} ${reason}` : "none", answered, text)]);
};
const chipOf = ({kind, status, code, texts, event}) => {
  if (kind === "frame") return event?.type === "error" ? [event.code, "warn"]
    : [texts.length > 1 ? `× ${texts.length}` : "", ""];
  if (kind === "close")
    return [code, [1006, 1008, 1009].includes(code) ? "bad" : code === 1013 ? "warn" : ""];
  if (status < 1) return status ? ["failed", "bad"] : ["…", ""];
  const colours = {1: "switch", 2: "good", 5: "bad"};
  return [status, colours[String(status)[0]] ?? "warn"];
};
const previewOf = ({kind, event, types, texts}) => {
  if (kind !== "frame") return "";
  return String(types.length ? event?.text ?? event?.user ?? "" : texts.at(-1)).slice(0, 80);
};
const entryRow = cached((entry, chip, colour, ms, bytes, sentence, opened = false) => {
  const {kind, title, way = "", lane, through = [], socket} = entry, isClose = kind === "close";
  const preview = previewOf(entry);
  const number = (value, unit, kind = "") => make(`span.number${kind}`,
    value === undefined ? "" : `${digits.format(Math.round(value))} ${unit}`);
  const details = make("details", {open: opened}, make("summary", make("span.head",
    make("span.unseen", {in: "received: ", out: "sent: "}[way]), make("b.cut", title),
    chip && make(`span.chip.${colour}`, chip), preview && make("span.preview.cut", preview),
    number(ms, "ms", ".ms"), number(bytes, "B"), make("span.turn")),
  make("span.sentence", sentence)), opened && cardOf(entry));
  const isOpened = way && (socket?.entry.status ?? 101) === 101;
  details.ontoggle = () => {
    if (details.open !== opened) showEntry(entry, "nearest", details.open);
  };
  const isFresh = !entry.isDrawn;
  entry.isDrawn = true;
  return make(`li.entry.${way}.${lane === 1 ? "second" : ""}.${isFresh ? "fresh" : ""}`,
    through.map((one) => make(one ? "span.pass.second" : "span.pass")),
    isOpened && make(`span.pass.own.${isClose ? "last" : ""}`),
    way ? make(`span.node.frame.${isClose ? "square" : ""}.${colour}`, icon(way))
      : make("span.node.ring"), details);
});
const rowOf = (entry) =>
  entryRow(entry, ...chipOf(entry), entry.ms, entry.bytes, sentenceOf(entry), entry.opened);
const drawWire = () => {
  const {entries, pausedAt, tried} = state, method = $("method").value;
  const wanted = $("filter").value.toLowerCase(), isSocket = method === "WS";
  const until = entries.filter(({at}) => !pausedAt || at <= pausedAt);
  const found = until.filter((entry) => !wanted || [entry.title, entry.status, entry.text,
    entry.body, sentenceOf(entry), ...entry.texts ?? []].join(" ").toLowerCase().includes(wanted));
  arrange($("list"), found.map(rowOf));
  put("pause", {ariaPressed: String(pausedAt !== null),
    textContent: pausedAt ? `Paused, ${entries.length - until.length}` : "Pause"});
  say("chapter", `Answered by ${chapterOf(operationOf(method, $("path").value))}`);
  say("go", !isSocket ? "Send" : tried ? "Close" : "Open");
  put("socketForm", {hidden: !isSocket});
  put("sendFrame", {disabled: tried?.readyState !== WebSocket.OPEN});
};

// -- The wire's form ---------------------------------------------------------------------------
const showWire = (open) => {
  $("wire").hidden = !open; $("wireButton").ariaExpanded = String(open);
  $("try").open = !matchMedia("(max-width: 700px)").matches;
  if (!$("try").open) $("closeWire").focus();  // it covers the screen
  if (open && !state.operations.length) learnOperations();
  render();
};
on("wireButton", "click", () => showWire($("wire").hidden));
on("closeWire", "click", () => { showWire(false); $("wireButton").focus(); });
on("clear", "click", () => { state.entries = []; render(); });
on("explain", "click", ({target}) => { target.ariaPressed = target.ariaPressed !== "true"; });
on("pause", "click", () => { state.pausedAt = state.pausedAt ? null : new Date(); render(); });
const showEntry = (entry, block, opened = true) => {  // what is open stays in sight
  entry.opened = opened; drawWire();
  if (opened && $("frames").scrollTop > -1) $("frames").scrollTop = -1;
  rowOf(entry).scrollIntoView({block});
};
const showAll = () => {
  state.pausedAt = null; $("filter").value = ""; $("frames").scrollTop = 0;
};
const showOnWire = (id, mid) => {
  const entry = state.entries.findLast(({texts = []}) => texts.some((text) =>
    text.includes(`"id":${id},`) || (mid && text.includes(`"mid":"${mid}"`))));
  showWire(true); showAll();
  if (entry) showEntry(entry, "center"); else note("It is not among what the wire still shows.");
};
on("wire", "input", render);
on("method", "change", ({target: {value}}) => {
  const isSocket = value === "WS", path = $("path");
  if (isSocket !== path.value.startsWith("/ws"))
    path.value = isSocket ? "/ws/json" : path.defaultValue;
});
const pairs = (lines, sign) => lines.split("\n").filter((line) => line.includes(sign)).map((line) =>
  [line.slice(0, line.indexOf(sign)).trim(), line.slice(line.indexOf(sign) + 1).trim()]);
// The body of the form and its type: a file and fields, JSON, fields, or text as it stands.
const bodyOf = (method) => {
  const text = $("body").value.trim(), [file] = $("file").files, fields = pairs(text, "=");
  if (/GET|HEAD/.test(method) || !(text || file)) return [];  // browsers send none with these
  if (file) {
    const data = new FormData();
    for (const [name, value] of [...fields, ["file", file]]) data.append(name, value);
    return [data];  // the browser adds the type and the boundary
  }
  if (parsed(text) !== undefined) return [text, "application/json"];
  return !fields.length ? [text, "text/plain"]
    : [String(new URLSearchParams(fields)), "application/x-www-form-urlencoded"];
};
const trySocket = async () => {
  if ($("path").value === "/ws/{session_id}") {
    $("path").value = `/ws/${(await api("POST", "create-session")).session_id}`;
  }
  const url = socketUrl($("path").value), {token} = state.login;
  if ($("withToken").checked || url.pathname === "/ws/protected")
    url.searchParams.set("token", token);
  state.tried = openSocket(url);  // which draws the page as it opens and closes
  state.tried.onclose = () => { state.tried = null; };
};
onSubmit($("form"), $("formProblem"), async () => {
  const method = $("method").value, [body, type] = bodyOf(method);
  if (new URL($("path").value, location).origin !== location.origin)
    throw new Error("Only paths of this server.");
  showAll();
  if (method === "WS") return state.tried ? state.tried.close() : trySocket();
  const headers = pairs($("headers").value, ":");
  const hasType = headers.some(([name]) => name.toLowerCase() === "content-type");
  if (type && !hasType) headers.unshift(["Content-Type", type]);
  if ($("withToken").checked) headers.push(["Authorization", `Bearer ${state.login.token}`]);
  const {entry} = await request(method, $("path").value, headers, body);
  showEntry(entry, "start");
});
onSubmit($("socketForm"), $("formProblem"), () => {
  showAll(); sendFrame(state.tried, $("frameText").value);
});

// -- The start: the log-in page shows what a log-in is going to put on the wire ------------------
const JSON_TYPE = [["content-type", "application/json"]];
const sample = [{kind: "http", method: "POST", path: "/login", title: "POST /login", status: 200,
  reason: "OK", ms: 212, bytes: 437, headers: JSON_TYPE, answered: JSON_TYPE,
  body: '{"username":"mira","password":"…"}',
  text: '{"access_token":"eyJhbGciOi…","token_type":"bearer","expires_in":3600}'},
{kind: "open", method: "GET", path: "/ws/chat", title: "GET /ws/chat", status: 101, ms: 4,
  reason: "Switching Protocols", picked: "lobby.v1",
  headers: [["sec-websocket-protocol", "lobby.v1, bearer.eyJhbGciOi…"]]},
frameOf("in", '{"type":"welcome","user":"mira","role":"member"}', 2),
frameOf("in", '{"type":"history","room":"lobby","messages":[{"id":1040},{"id":1041}]}', 5),
frameOf("out", '{"type":"message","room":"lobby","text":"大家好","mid":"k3-9f"}'),
frameOf("in", '{"type":"message","id":1042,"room":"lobby","user":"sara","text":"大家好"}', 9),
frameOf("in", '{"type":"typing","room":"lobby","user":"jonas"}'),
{kind: "close", way: "in", title: "close", code: 1000, bytes: 2, texts: ["1000"]}];
$("sample").append(...sample.map((entry) => rowOf(Object.assign(entry, {at: new Date()}))));
const DEMO = {user1: "password1", user2: "password2", admin: "adminpassword"};
$("demo").hidden = !["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
$("demo").lastElementChild.append(...Object.keys(DEMO).map((name) => button(name, () => {
  $("username").value = name; $("password").value = DEMO[name];
  $("credentials").requestSubmit();
}, ".quiet")));
const problem = kept("problem", "", session);  // this tab has just left: not into another's log-in
say("problem", problem); keep("problem", null, session);
state.login = kept("login", null, session) ?? (problem ? null : kept("login"));
if (state.login) connect(); else render();
</script>
</body>
</html>
"""


if __name__ == "__main__":
    main()
