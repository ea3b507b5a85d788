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
     3  Talking over a socket from one echo to a reader and a writer side by side
     4  Sessions              context made over HTTP and carried into a socket
     5  Settings              what can be changed without touching the code
     6  Storage               the only SQL: reading is a call, changing is one transaction
     7  Knowing a user        passwords, log-ins, tokens, and who is asking
     8  Roles                 what somebody may do, and how others are stopped
     9  Rooms                 a room is a log, a client is a set of cursors into logs
    10  The chat              its events, its socket and its HTTP routes
    11  Serving               what starts and what ends, and ``python app.py``
    12  The page              HTML, CSS and JavaScript in one constant

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
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
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
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.routing import Route
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
app.router.max_body_size = 1 * MIB  # FastAPI(max_body_size=...) is outside of our middleware
SANE_ID = re.compile(r"[\w.~+/=:-]{1,128}", re.ASCII)  # of a request, which its client may give


class Refused(Exception):
    """Why something is not done; ``retry_after``: in how many seconds it may be, if ever."""

    def __init__(self, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


def must(condition: Any, code: str, words: str, retry_after: float | None = None) -> None:
    if not condition:
        raise Refused(code, words, retry_after)


# What each code is as an HTTP status, and as the code that closes a socket: 1008 is final
# (RFC 6455, section 7.4.1), 1013 is "try again later" (IANA's registry of close codes).
REFUSALS = {
    "invalid": (422, 1008),
    "too_long": (422, 1008),
    "unauthorized": (401, 1008),
    "forbidden": (403, 1008),
    "unknown": (404, 1008),
    "unknown_room": (404, 1008),
    "conflict": (409, 1008),
    "rate_limited": (429, 1013),
    "unavailable": (503, 1013),
}


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
    status, code = REFUSALS[error.code]
    if isinstance(connection, WebSocket):
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


@app.exception_handler(405)
async def wrong_method(request: Request, error: HTTPException) -> JSONResponse:
    """Of several routes on a path, Starlette names one's methods; RFC 9110 (15.5.6) wants all."""
    routes = [r for r in app.routes if isinstance(r, Route) and r.matches(request.scope)[0].value]
    allowed = sorted({method for route in routes for method in route.methods or ()})
    return JSONResponse({"detail": error.detail}, 405, {"Allow": ", ".join(allowed)})


@app.exception_handler(413)
async def too_large(request: Request, error: HTTPException) -> JSONResponse:
    """FastAPI counts a body while it arrives, so a chunked one is cut off as well."""
    limit = request.scope.get("starlette.max_body_size", 1 * MIB)
    return JSONResponse({"detail": f"The body is larger than {limit:,} bytes"}, 413)


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
    origins = scope["app"].state.origins
    if scope["type"] == "websocket" and origin not in (None, *own, *origins):
        return f"A page of {origin!r} may not open sockets here; CHAT_ORIGINS may name it"
    at, name = scope.get("server") or ("", 0), ""
    with suppress(ValueError):  # for what is no host
        name = urlsplit(f"//{host}").hostname or ""
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
        # FastAPI answers a too large Content-Length in plain text; without it, it raises a 413.
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > 1 * MIB:
            scope["headers"] = [item for item in headers.raw if item[0] != b"content-length"]

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                took = f"{time.perf_counter() - started:.6f}".encode()
                own = [(b"x-custom-header", b"Custom Value"), (b"x-request-id", id.encode())]
                added = [*own, (b"x-process-time", took)]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        if reason := why_foreign(scope, headers):
            log.info("refused: %s", reason)
            if scope["type"] == "websocket":
                await send({"type": "websocket.close"})  # before it is accepted: that is a 403
            else:
                await JSONResponse({"detail": reason}, 403)(scope, receive, send_with_headers)
        else:
            await self.survive(scope, receive, send_with_headers)

    async def survive(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except (ClientDisconnect, ClientDisconnected, WebSocketDisconnect):
            pass  # they left, and nothing is left to do
        except Exception:
            log.exception("unexpected error in %s %r", scope["type"], scope["path"])
            with suppress(Exception):  # it may have been answered already
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1011})
                else:
                    answer = JSONResponse({"detail": "Internal Server Error"}, 500)
                    await answer(scope, receive, send)


app.add_middleware(RequestContextMiddleware)


# 2. Looking at a request ==============================================================
# A request's head is there at once; its body arrives later, in pieces, once, and from
# somebody who may not mean well. `Request` is the view of both. The first routes show one
# thing each, `/inspect` shows all of it, and `/body/...` the four ways to read a body, each
# with limits, and what happens when it is read twice.

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


class BodyMiddleware:
    """Ends bodies that come too slowly, or are too large together: FastAPI limits each alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time
        deadline: float | None = now() + BODY_SECONDS
        size = held = 0

        async def receive_in_time() -> Message:
            nonlocal deadline, size, held
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                close = {"Connection": "close"}
                raise HTTPException(408, "The body came too slowly", close) from None
            if deadline is None or not message.get("more_body"):
                deadline = None  # it is whole, and the next message is that the client has left
                return message
            size += len(message["body"])
            deadline = min(deadline + len(message["body"]) / BODY_RATE, now() + BODY_SECONDS)
            if scope["starlette.max_body_size"] <= MAX_IN_MEMORY:
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
    """The JSON body back. On GET it is legal, but many proxies drop it (RFC 9110, 9.3.1)."""
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
                    file = {"field": key, "filename": value.filename, "size": value.size}
                    file["content_type"] = value.content_type
                    file["sha256"] = hashlib.sha256(await value.read()).hexdigest()
                    files.append(file)
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


@app.post("/body/raw", max_body_size=MAX_IN_MEMORY, **reads("application/octet-stream"))
async def body_raw(request: Request) -> dict[str, Any]:
    """The body as bytes, all of them in memory."""
    body = await request.body()
    digest = await run_in_threadpool(hashlib.sha256, body)  # some milliseconds: not in the loop
    return {"size": len(body), "sha256": digest.hexdigest()}


@app.post("/body/stream", max_body_size=1 * GIB, **reads("application/octet-stream"))
async def body_stream(request: Request) -> dict[str, Any]:
    """The way to read what is too large for memory: chunk by chunk, as it arrives."""
    size, chunks, digest = 0, 0, hashlib.sha256()
    async for chunk in request.stream():
        if chunk:  # the last one is empty
            size, chunks = size + len(chunk), chunks + 1
            digest.update(chunk)
    return {"size": size, "sha256": digest.hexdigest(), "chunks": chunks}


@app.post("/body/twice", max_body_size=64 * KIB, **reads("application/json"))
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


async def side_by_side(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run these until one ends, end the others, and raise what was raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
    if errors:
        raise errors[0]


# 4. Sessions ==========================================================================
# A socket's handshake carries little, so context is often made over HTTP first and then
# named by an id. Whoever knows the id is in, hence it is unguessable. Each socket has a
# queue and a writer of its own: a sender fills queues and never waits for a slow reader,
# for whom a full queue is the end.

begin_chapter("4. Sessions")
SESSION_SECONDS = 3600  # after the last use
MAX_SESSIONS = 10_000  # the one that was unused for longest makes room for a new one
SESSION_QUEUE = 32  # frames, of at most 64 KiB, that may wait for one socket


@dataclass(slots=True, eq=False)
class Session:
    about: dict[str, Any]  # who asked for it, and when
    used_at: float  # on the monotonic clock
    queues: set[asyncio.Queue[str | None]] = field(default_factory=set)  # of sockets now in it

    def expires_in(self) -> int:
        idle = 0 if self.queues else time.monotonic() - self.used_at  # seconds
        return max(0, round(SESSION_SECONDS - idle))

    def send(self, text: str) -> None:
        """Queue a text for every socket. A queue that is full gets None instead: its end."""
        self.used_at = time.monotonic()
        for queue in list(self.queues):
            is_full = queue.qsize() >= SESSION_QUEUE
            queue.put_nowait(None if is_full else text)
            if is_full:
                self.queues.discard(queue)


sessions: dict[uuid.UUID, Session] = {}


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
    sessions[id] = Session(about, time.monotonic())
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
    queue: asyncio.Queue[str | None] = asyncio.Queue()

    async def read() -> None:
        while True:
            session.send(f"Session {session_id}: {await receive_text(websocket)}")

    async def write() -> None:
        while (text := await queue.get()) is not None:
            await websocket.send_text(text)
        raise Refused("unavailable", "Too slow")

    session.queues.add(queue)
    try:
        await websocket.accept()
        await side_by_side(read(), write())
    finally:
        session.queues.discard(queue)
        session.used_at = time.monotonic()


# 5. Settings ==========================================================================
# A program that reads the environment wherever it needs a value fails late and in odd
# places. One model reads it all at the start, and refuses what it cannot use in one line
# that names the variable.


class StartError(Exception):
    """Why Lobby cannot start, in one line that says what to change."""


def split_origins(value: str) -> frozenset[str]:
    return frozenset(part.strip().rstrip("/") for part in value.split(",") if part.strip())


class Settings(BaseModel):  # ``port`` is the environment's CHAT_PORT
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    db: Path = Path("chat.db")
    secret: bytes | None = Field(None, min_length=32)  # RFC 7518, section 3.2
    token_minutes: float = Field(60, gt=0, le=525_600)
    login_days: float = Field(30, gt=0, le=3_650)  # how long a log-in can be renewed
    register_: bool = True  # False: nobody but an admin makes new people
    origins: Annotated[frozenset[str], BeforeValidator(split_origins)] = frozenset()
    demo_users: bool = True
    rate: float = Field(10, ge=0, allow_inf_nan=False)  # messages a second; 0: no limit
    sockets_per_user: int = Field(20, ge=0)  # 0: no limit

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the ``CHAT_...`` variables. Raises StartError for an unusable one."""
        names = {f"CHAT_{field.upper().rstrip('_')}": field for field in cls.model_fields}
        given = {names[name]: os.environ[name] for name in names if name in os.environ}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = next(name for name, field in names.items() if field == first["loc"][0])
            shown = "" if name == "CHAT_SECRET" else f"={os.environ[name]!r}"
            raise StartError(f"{name}{shown}: {first['msg']}") from None


# 6. Storage ===========================================================================
# Reading is a function call: an index answers within microseconds, so `query` runs in the event
# loop, on a connection that only reads; and nothing comes between two readings without `await`.
#
# Changing waits for the disk (fsync), for milliseconds however many rows it writes. So one thread
# applies changes, many in a transaction, and refuses what may not be there, where nothing comes
# between the question and the change. A route says `await state.change({"type": ...})`, and is
# given what became of it, or raised Refused; how changes get here, chapter 9 shows.

SHAPE = 4  # of the tables; a file of another shape is refused
TABLES = """
-- checked: how often somebody asked whether all is well.
CREATE TABLE epoch (name TEXT NOT NULL, checked INTEGER NOT NULL);
INSERT INTO epoch VALUES (lower(hex(randomblob(8))), 0);
-- folded: the name without regard to case. password: its salt and hash.
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
MAX_ID = 2**63 - 1  # the largest integer that SQLite holds
LAST = "\U0010ffff"  # comes after each character of a name
BUSY_SECONDS = 5  # how long a change waits for another program that writes
WINDOW = 1_000  # newest events that an open room keeps, and most messages that are resumed
SEARCHED = 100  # messages that a search reads between two turns of the loop

Event = dict[str, Any]  # and a change, which becomes one
Page = tuple[list[Event], bool]  # messages, and whether there are more
ASIDE = ("by", "old", "password")  # what a change needs, and its event does not tell


def size_of(event: Event) -> float:
    """How much of a window an event takes: 1, or for a long text its length in KiB."""
    return max(1.0, len(event.get("text", "")) / KIB)


class Repeated(Event):
    """The original of a message that was sent again: for its sender alone."""


class Storage:
    """People, log-ins and messages in one SQLite file, with two doors: ``query`` and ``apply``."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises StartError if it cannot be used or is in use."""
        path = Path(os.path.realpath(path))
        self.databases = ExitStack()
        self.close = self.databases.close
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self.searching = asyncio.Lock()
        self.is_failing = False
        try:
            # A second process would announce its messages to nobody here: it is kept out.
            self._connect(f"{path}.lock", timeout=0).execute("BEGIN EXCLUSIVE")
            path.touch(mode=0o600)  # password hashes are nobody else's business
            self.path, self.opened = path, path.stat()
            self.writer = self._connect(str(path), timeout=BUSY_SECONDS)
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

    def _connect(self, file: str, timeout: float) -> sqlite3.Connection:
        # isolation_level None: every statement is a transaction of its own
        more: Any = {"isolation_level": None, "check_same_thread": False}
        db = sqlite3.connect(file, timeout, uri=file.startswith("file:"), **more)
        self.databases.callback(db.close)
        db.row_factory = sqlite3.Row  # a tuple whose values have names
        return db  # type: ignore[no-any-return]

    def _prepare(self) -> None:
        shape = self._value("PRAGMA user_version")
        if shape != SHAPE and self._value("SELECT count(*) FROM sqlite_master"):
            raise sqlite3.DatabaseError("another version of Lobby made it, or another program")
        # FULL: a commit is on the disk when it returns. secure_delete: deleted text is overwritten.
        self.writer.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;"
        )
        if shape != SHAPE:
            self.writer.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {SHAPE}; COMMIT;")

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
        return Refused("unavailable", "The database failed, try again", retry_after=1)

    def find_person(self, folded: str, sid: str = "") -> Any:
        """The person whose name folds to this, or None; ``stays``: of this log-in, None if over."""
        stays = "(SELECT stays FROM logins WHERE sid = ? AND user = name) AS stays"
        rows = self.query(f"SELECT *, {stays} FROM people WHERE folded = ?", sid, folded)
        return rows[0] if rows else None

    def find_people(self, start: str, limit: int = 50) -> list[Any]:
        """People whose folded names begin so, by name."""
        sql = "SELECT name, role, banned FROM people WHERE folded BETWEEN ? AND ?"
        return self.query(f"{sql} ORDER BY folded LIMIT ?", start, f"{start}{LAST}", limit)

    def page(self, room: str, limit: int, before: int = MAX_ID, after: int | None = None) -> Page:
        """Messages next after ``after``, else before ``before``, oldest first; are there more?"""
        order = "DESC" if after is None else "ASC"
        sql = f"SELECT {COLUMNS} FROM messages WHERE room = ? AND id > ? AND id < ?"
        sql += f" AND deleted IS NULL ORDER BY id {order} LIMIT ?"
        rows = self.query(sql, room, after or 0, min(before, self.shown + 1), limit + 1)
        found = [{"type": "message", **row} for row in rows[:limit]]
        return found if order == "ASC" else found[::-1], len(rows) > limit

    async def search(self, q: str, room: str, limit: int, before: int, after: int | None) -> Page:
        """Like ``page``, of messages that have ``q``: in pieces, as an index would slow storing."""
        found: list[Event] = []
        more = True
        async with self.searching:
            while more and len(found) <= limit:
                await asyncio.sleep(0)
                piece, more = self.page(room, SEARCHED, before, after)
                hits = [event for event in piece if q.casefold() in event["text"].casefold()]
                if after is None:
                    found, before = hits + found, piece[0]["id"] if piece else 0
                elif piece:
                    found, after = found + hits, piece[-1]["id"]
        return found[-limit:] if after is None else found[:limit], len(found) > limit

    def missed(self, room: str, after: int) -> list[list[Event]] | None:
        """The messages after this id, and what was deleted since; None if not to be had."""
        messages, more = self.page(room, WINDOW, after=after)
        sql = "SELECT id FROM messages WHERE room = ? AND deleted >= ? AND id <= ? LIMIT ?"
        deleted = self.query(sql, room, after, after, WINDOW + 1)
        too_many = more or len(deleted) > WINDOW or sum(map(size_of, messages)) > WINDOW
        if too_many or after > self.shown:
            return None
        return [messages, [{"type": "deleted", "room": room, "id": id} for (id,) in deleted]]

    def rooms(self, person: str, limit: int, before: int = MAX_ID) -> list[Any]:
        """Names and newest ids of conversations or, for "", everybody's rooms, the newest first."""
        sql = "SELECT room, last_id FROM rooms WHERE person = ? AND last_id < ?"
        return self.query(f"{sql} ORDER BY last_id DESC LIMIT ?", person, before, limit)

    async def find_rooms(self, start: str, person: str, limit: int, before: int) -> list[Any]:
        """Like ``rooms``, of those whose names begin so: few by their names, many along the ids."""
        if not start:
            return self.rooms(person, limit, before)
        sql = "SELECT room, last_id FROM rooms WHERE person = ? AND room BETWEEN ? AND ? LIMIT 1001"
        found = self.query(sql, person, start, start + LAST)
        if len(found) <= 1_000:
            found = [row for row in found if row["last_id"] < before]
            return sorted(found, key=itemgetter("last_id"), reverse=True)[:limit]
        found = []
        async with self.searching:
            while before and len(found) < limit:
                await asyncio.sleep(0)
                piece = self.rooms(person, 1_000, before)
                found += [row for row in piece if row["room"].startswith(start)]
                before = piece[-1]["last_id"] if piece else 0
        return found[:limit]

    def is_written(self, room: str) -> bool:
        return bool(self.query("SELECT 1 FROM messages WHERE room = ? LIMIT 1", room))

    def apply(self, changes: Sequence[Event]) -> list[Event | Refused]:
        """Make changes, in order, in one durable transaction; answer what became of each.

        It runs in the database thread, and knows no clock, no chance and no settings: the same
        changes make the same database. If the transaction fails, what needs a row is refused.
        """
        only_messages = all(change["type"] == "message" for change in changes)
        outcomes: list[Event | Refused] = []
        try:
            with self.writer:  # commits, or rolls back
                if not only_messages:  # they are one statement, a transaction by itself
                    self.writer.execute("BEGIN")
                for kind, run in itertools.groupby(changes, itemgetter("type")):
                    make = self._store if kind == "message" else self._make_each
                    outcomes += make(list(run))
            self.is_failing = False
            return outcomes
        except Exception:
            refusal = self._failed("in changing")
            if len(changes) == 1:
                return [refusal]
            alone = [[c] if c["type"] == "kick" else [] for c in changes]  # it needs no row
            return [next(iter(self.apply(kick)), refusal) for kick in alone]

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

    def _make_each(self, changes: Sequence[Event]) -> list[Event | Refused]:
        """Make changes, and answer the events that they are now; what may not be is refused."""
        outcomes: list[Event | Refused] = []
        for change in changes:
            try:
                self._make(change)
                outcomes.append({key: change[key] for key in change if key not in ASIDE})
            except Refused as refusal:
                outcomes.append(refusal)
            except Exception:  # it is refused alone, unless the database has given up all of it
                if not self.writer.in_transaction:
                    raise
                outcomes.append(self._failed(f"in changing: {change['type']}"))
        return outcomes

    def _make(self, change: Event) -> None:
        """Make a change that is no message; its fields are the statements' parameters."""
        run = self.writer.execute
        sql = "SELECT role FROM people WHERE name = ? AND NOT banned"
        asking = self._value(sql, (change.get("by"),)) or "member"  # who is banned has no role left
        match change["type"]:
            case "register":
                change.setdefault("role", self._check_registering(change, asking))
                sql = "INSERT OR IGNORE INTO people (name, folded, password, role) VALUES"
                done = run(f"{sql} (:user, :folded, :password, :role)", change)
                must(done.rowcount, "conflict", "This username is taken")
            case "login":  # the password may have changed while it was checked
                run("DELETE FROM logins WHERE ends < :at", change)
                sql = "INSERT INTO logins SELECT :sid, name, :stays, :ends FROM people"
                done = run(f"{sql} WHERE name = :user AND password = :password", change)
                must(done.rowcount, "unauthorized", "Bad username or password")
            case "logout":
                run("DELETE FROM logins WHERE sid = :sid", change)
            case "password":
                if "old" in change:  # it may have changed while it was checked
                    sql = "SELECT 1 FROM people WHERE name = :user AND password = :old"
                    must(self._value(sql, change), "forbidden", "The old password is wrong")
                else:
                    self._check_role(change, asking, "admin")
                run("UPDATE people SET password = :password WHERE name = :user", change)
                run("DELETE FROM logins WHERE user = :user", change)
            case "health":  # and is the file still the one that has this name?
                run("UPDATE epoch SET checked = checked + 1")
                is_same = self.path.exists() and os.path.samestat(self.opened, self.path.stat())
                must(is_same, "unavailable", "The database's file was moved or deleted")
            case "deleted":
                self._check_author(change, asking)
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

    def _check_registering(self, change: Event, asking: str) -> str:
        """The role of a new person: somebody has to be the admin."""
        if self._value("SELECT 1 FROM people"):
            may = change["is_open"] or asking == "admin"
            must(may, "forbidden", "Registration is closed: only an admin may add people")
            return "member"
        must(change["is_local"], "forbidden", "The first person, the admin, comes over loopback")
        return "admin"

    def _check_author(self, change: Event, asking: str) -> None:
        sql = "SELECT user FROM messages WHERE id = :id AND room = :room AND deleted IS NULL"
        author = self._value(sql, change)
        must(author, "unknown", "There is no such message in this room")
        may = author == change["by"] or asking != "member"
        must(may, "forbidden", "Only its author or a moderator may delete a message")

    def _check_role(self, change: Event, asking: str, needed: str) -> None:
        """Moderators act on members, admins on everybody; and one admin always stays."""
        may = asking in (needed, "admin")
        must(may, "forbidden", f"Only a person with the role {needed!r} may do this")
        change["user"] = self._value("SELECT name FROM people WHERE folded = :folded", change)
        must(change["user"], "unknown", "There is nobody of this name")
        role = self._value("SELECT role FROM people WHERE name = :user", change)
        may = asking == "admin" or role == "member"
        must(may, "forbidden", f"Only an admin may do this to somebody who is {role}")
        others = "SELECT 1 FROM people WHERE role = 'admin' AND NOT banned AND name != :user"
        stays = change["type"] not in ("ban", "role") or change.get("role") == "admin"
        stays = stays or role != "admin" or self._value(others, change)
        must(stays, "conflict", "The last admin can be neither banned nor demoted")


# 7. Knowing a user ====================================================================
# A password is checked once, slowly on purpose, and makes a log-in, which is exchanged for a token:
# a signed note that says who its bearer is, by which log-in, and until when. That they are not
# banned and have not logged out is looked up each time; so is what they may do, which is never
# in the token: it would be true for too long.

# Letters that cannot be seen, by which one name could pass for another.
INVISIBLE = "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
MAX_NAME = 32  # characters
MAX_PASSWORD = 128  # characters
LONGEST_FORM = 4  # characters make one at most: what has more times its limit is too long anyway


def normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    """A text in its one spelling. Raises ValueError for none, or for over 30 marks on a letter:
    to put them in order takes the square of their number (UAX #15, section 13)."""
    if text.isascii():
        return text
    marks = "".join("m" if unicodedata.combining(character) else "-" for character in text)
    if "m" * 31 in marks or re.search("[\ud800-\udfff]", text):
        raise PydanticCustomError("invalid", "The text has what no script is written with")
    return unicodedata.normalize(form, text)


@functools.lru_cache(4096)
def clean_name(name: str) -> str:
    """A name in its one spelling (NFKC); of any script, many of which spell with marks."""
    if len(name) <= LONGEST_FORM * MAX_NAME:
        name = normalize("NFKC", name)
    start = name[: MAX_NAME + 1]  # enough to see that it is too long
    kinds = "".join("_" if c in "_-" else unicodedata.category(c)[0] for c in start)
    if not re.fullmatch(r"[LN_][LMN_]{0,31}", kinds) or re.search(INVISIBLE, name):
        raise PydanticCustomError("bad_name", "1 to 32 letters, digits, '_' or '-' are a name")
    if name.casefold() in ("error", "here"):
        raise PydanticCustomError("bad_name", "The plain text chat speaks in this name itself")
    return name


@functools.lru_cache(4096)
def fold(name: str) -> str:
    """A name without regard to case, to find a person by. Raises ValueError for a bad one."""
    return normalize("NFKC", clean_name(name).casefold())


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


def one_spelling(password: str) -> str:
    return normalize("NFKC", password[: LONGEST_FORM * MAX_PASSWORD])  # keyboards differ


def hash_password(password: str, salt: bytes = b"") -> str:
    """What is stored of it. OWASP (Password Storage Cheat Sheet): 16 MiB and 0.2 s a guess."""
    salt = salt or secrets.token_bytes(16)
    key = hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=5, maxmem=64 * MIB)
    return f"{salt.hex()}${key.hex()}"


def is_password(password: str, stored: str) -> bool:
    salt = bytes.fromhex(stored.partition("$")[0])
    return secrets.compare_digest(hash_password(password, salt), stored)


NO_PASSWORD = f"{'00' * 16}${'00' * 64}"  # what a name that nobody has is checked against
Change = Callable[[Event], Awaitable[Event]]  # posts a change; see chapter 6
MAX_HASHING = 20  # passwords that may wait for one of two threads: 2 s
MAX_HASHING_EACH = 4  # of one address, or one who guesses would keep everybody out


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
        self.hashing: Counter[str | None] = Counter()  # passwords that wait, of each address

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    async def register(self, name: str, password: str, is_local: bool, **more: Any) -> Event:
        """A new person; once that is closed, made ``by`` an admin."""
        stored = await self.in_thread(hash_password, password)
        person = {"user": name, "folded": fold(name), "password": stored}
        may = {"by": None, "is_local": is_local, "is_open": self.is_open}
        return await self.change({"type": "register", **person, **may, **more})

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
        login = {"user": name, "password": stored, "sid": sid, "stays": stay, "at": now}
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
    private = functools.partial(os.open, mode=0o600)
    try:
        with suppress(FileExistsError), open(path, "x", opener=private) as file:
            file.write(secrets.token_hex(32))
        secret = path.read_bytes()
    except OSError as error:
        raise StartError(f"CHAT_SECRET is not set, and {str(path)!r}: {error.strerror}") from None
    if len(secret) < 32:
        raise StartError(f"CHAT_SECRET is not set, and {str(path)!r} is shorter than 32 bytes")
    return secret


begin_chapter("7. Knowing a user", 401, 503)
oauth2 = OAuth2PasswordBearer(tokenUrl="token", auto_error=False)
Token = Annotated[str | None, Depends(oauth2)]


async def find_me(request: Request, token: Token) -> Any:
    return request.app.state.logins.find_bearer(token)


Me = Annotated[Bearer, Depends(find_me)]


async def token_of(websocket: WebSocket) -> str | None:
    """A socket's token. A browser's comes in the URL or, since URLs are logged, a subprotocol."""
    offers = [p for p in websocket.scope["subprotocols"] if p.startswith("bearer.")]
    offered = offers[0].removeprefix("bearer.") if offers else None
    return await oauth2(websocket) or websocket.query_params.get("token") or offered


class Connection:
    """An open socket of somebody known. It ends once; why, is raised wherever its handler waits."""

    def __init__(self, websocket: WebSocket, me: Bearer) -> None:
        self.websocket, self.me = websocket, me
        self.connections: set[Connection] = websocket.app.state.connections  # all that are open
        self.ended_by: tuple[str, str] | None = None  # code and reason
        self.deadline = asyncio.timeout(me.ends - time.time())

    def end(self, code: str, reason: str) -> None:
        if self.live_until(0):  # long ago: it cancels the handler, see __aexit__
            self.ended_by = code, reason

    def live_until(self, ends: float) -> bool:
        """Move the end to this time, in seconds since 1970, unless it has come already."""
        is_open = self in self.connections and not self.deadline.expired()
        if may := is_open and self.ended_by is None:
            self.deadline.reschedule(asyncio.get_running_loop().time() + ends - time.time())
        return may

    async def __aenter__(self) -> None:
        await self.deadline.__aenter__()
        self.connections.add(self)

    async def __aexit__(self, *error: Any) -> None:
        self.connections.discard(self)
        try:
            await self.deadline.__aexit__(*error)
        except TimeoutError:
            expired = "unauthorized", "Unauthorized: Token expired"
            raise Refused(*(self.ended_by or expired)) from None


async def take_turn(request: Request) -> AsyncIterator[None]:
    """A dependency of routes that hash a password: few at once, and few of each address."""
    hashing, host = request.app.state.logins.hashing, client_host(request)
    may = hashing.total() < MAX_HASHING and hashing[host] < MAX_HASHING_EACH
    must(may, "unavailable", "Too many log-ins at once, try again", retry_after=2)
    hashing[host] += 1
    try:
        yield
    finally:
        hashing[host] -= 1
        if not hashing[host]:
            del hashing[host]


HASHES: dict[str, Any] = {"dependencies": [Depends(take_turn)], "responses": OF_BODY}
InBody = Annotated[str, Body()]  # a field of the JSON body
Stay = Annotated[bool, Body()]
NewName = Annotated[str, Body(), AfterValidator(clean_name)]
OfLength = Field(min_length=8, max_length=MAX_PASSWORD)
NewPassword = Annotated[str, Body(embed=True), OfLength, AfterValidator(one_spelling)]


@app.post("/login", **HASHES)
async def login(request: Request, username: InBody, password: InBody, stay: Stay = False) -> Any:
    """Log in. A log-in that stays can be renewed by an expired token as well."""
    return await request.app.state.logins.log_in(username, password, stay)


@app.post("/token", **HASHES)
async def token(request: Request, form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> Any:
    """The same as an OAuth2 password form, for the Authorize button of /docs."""
    return await request.app.state.logins.log_in(form.username, form.password)


@app.post("/renew")
async def renew(request: Request, token: Token) -> Any:
    """A new token for the same log-in; its sockets live on until that one ends."""
    return await request.app.state.logins.renew(token)


@app.post("/register", status_code=201, **HASHES | {"responses": OF_BODY | answers(409)})
async def register(
    request: Request, token: Token, username: NewName, password: NewPassword
) -> dict[str, Any]:
    """Become a person; the first one is the admin. An admin's token is needed once it is closed."""
    logins, host = request.app.state.logins, client_host(request) or ""
    by = logins.find_bearer(token).name if token and not logins.is_open else None
    is_local = is_loopback(host) or not re.search("[.:]", host)  # that is no address
    person = await logins.register(username, password, is_local, by=by)
    return {"username": person["user"], "role": person["role"]}


@app.put("/me/password", **HASHES)
async def change_password(request: Request, me: Me, old: InBody, new: NewPassword) -> Any:
    """Change the password, which ends all log-ins; answers the token of a new one."""
    logins = request.app.state.logins
    person = await logins.check(me.name, old)
    must(person, "forbidden", "The old password is wrong")
    change = {"type": "password", "user": me.name, "old": person["password"], "by": me.name}
    stored = await logins.in_thread(hash_password, new)
    await logins.change(change | {"password": stored})
    return await logins.start(me.name, stored, me.stays)


@app.get("/me")
async def read_me(me: Me) -> dict[str, Any]:
    """Whose token this is."""
    return {"username": me.name, "role": me.role}


@app.post("/logout", status_code=204)
async def logout(request: Request, me: Me) -> None:
    """Refuse the log-in from now on, and close the sockets that were opened with it."""
    await request.app.state.change({"type": "logout", "user": me.name, "sid": me.sid})


@app.websocket("/ws/protected")
async def protected(websocket: WebSocket) -> None:
    await websocket.accept()
    me = websocket.app.state.logins.find_bearer(await token_of(websocket))
    async with Connection(websocket, me):
        await websocket.send_text(f"Hello {me.name}, you are authenticated!")
        while True:
            await websocket.send_text(f"{me.name} says: {await receive_text(websocket)}")


# 8. Roles =============================================================================
# A token says who somebody is; what they may do is looked up by the same transaction that
# does it. So a demotion counts from the next change on, be it one in the same batch; a ban also
# ends the sockets. The rule stands in chapter 6 (`_check_role`); here it gets its routes.


def fold_start(start: str) -> str:
    """A name, or the beginning of one, as ``fold`` leaves it; of whom there may be nobody."""
    return normalize("NFKC", normalize("NFKC", start).casefold())


Username = Annotated[str, AfterValidator(fold_start)]
begin_chapter("8. Roles", 401, 404, 503)
NewRole = Annotated[Literal["member", "moderator", "admin"], Body(embed=True)]


async def act(request: Request, me: Bearer, kind: str, name: str, **more: Any) -> dict[str, Any]:
    """Post what somebody does to another; logged, since they may be asked why."""
    change = {"type": kind, "folded": name, "by": me.name, **more}
    event = await request.app.state.change(change)
    log.info("%r: %s of %r", me.name, event.get("role", kind), event["user"])
    told = {key: event[key] for key in ("role", "banned", "sockets") if key in event}
    return {"username": event["user"], **told}


@app.put("/users/{username}/role", responses=OF_BODY | answers(409))
async def set_role(request: Request, role: NewRole, username: Username, me: Me) -> dict[str, Any]:
    """Make somebody a member, moderator or admin; for admins."""
    return await act(request, me, "role", username, role=role)


@app.put("/users/{username}/password", status_code=204, **HASHES)
async def reset_password(request: Request, username: Username, new: NewPassword, me: Me) -> None:
    """Give somebody a new password, which ends all of their log-ins; for admins."""
    stored = await request.app.state.logins.in_thread(hash_password, new)
    await act(request, me, "password", username, password=stored)


@app.post("/users/{username}/kick")
async def kick(request: Request, username: Username, me: Me) -> dict[str, Any]:
    """Close somebody's sockets, who may come back; for moderators."""
    return await act(request, me, "kick", username)


@app.post("/users/{username}/ban", responses=answers(409))
async def ban(request: Request, username: Username, me: Me) -> dict[str, Any]:
    """Let somebody log in and send no more, and close their sockets; for moderators."""
    return await act(request, me, "ban", username, banned=True)


@app.post("/users/{username}/unban")
async def unban(request: Request, username: Username, me: Me) -> dict[str, Any]:
    """Lift a ban; for moderators."""
    return await act(request, me, "unban", username, banned=False)


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
RUSH = 20  # changes; after a batch of more, the next one waits for others
GATHER_SECONDS = 0.003  # how long it does
MAX_PENDING = 10_000  # changes that may wait for the disk before new messages are refused
MAX_FRAME = 256 * KIB  # bytes after which a frame takes no further batch; one answer may be more
MAX_OUTBOX = 8 * MIB  # bytes that may wait for one client alone; a resume's fit
MAX_ROOMS = 100  # rooms that one client may follow
NOTICES = ("joined", "left", "typing", "renewed", "stop")  # these need no database

# The changes that end sockets, of a person or, where they name a ``sid``, of a log-in.
ENDS_SOCKETS = {
    "kick": "Kicked",
    "ban": "Banned",
    "logout": "Unauthorized: Logged out",
    "password": "Unauthorized: Password changed",
}
TOO_SLOW = ("unavailable", "Too slow")

Encode = Callable[[Iterable[Event]], list[bytes]]  # events to lines
Done = Callable[[Event | Refused], object]  # told what became of a change


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
        self.ready = True  # for frames; when it is again, on_ready is called
        self.on_ready: Callable[[], object] = lambda: None

    def write(self, frames: Frames) -> None:
        self.ready, self.sending = False, asyncio.create_task(self._send(frames))

    async def _send(self, frames: Frames) -> None:
        with suppress(Exception):  # a closed one takes everything
            for payload in frames.payloads:
                await self.websocket.send_text(payload.decode())
        self.ready = True
        self.on_ready()


class Client(Connection):
    """One open chat socket: who holds it, and how far it has read each of its rooms."""

    def __init__(self, websocket: WebSocket, me: Bearer, encode: Encode) -> None:
        super().__init__(websocket, me)
        self.encode = encode
        self.cursors: dict[Room, int] = {}
        self.outbox: list[bytes] = []  # lines for this client alone, before what its rooms have
        self.written = asyncio.Event()  # nothing is left in the outbox
        self.outlet = websocket.scope.get("extensions", {}).get("lobby") or Outlet(websocket)
        self.outlet.on_ready = self.flush

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
        if self.cursors[room] == number and not self.outbox and self.outlet.ready:
            self.cursors[room] += 1
            self.outlet.write(batch[self.encode])
        elif self.cursors[room] < room.first:
            self.end(*TOO_SLOW)  # what it would read next is forgotten
        else:
            self.flush()

    def flush(self) -> None:
        while self.outlet.ready and not self.ended_by and (lines := self.take(MAX_FRAME)):
            self.outlet.write(Frames(lines, self.encode))
        if not self.outbox:
            self.written.set()

    def tell(self, *events: Event) -> None:
        """Say something to this client alone, after what it has not read: so ids only grow."""
        self.outbox = self.take() + self.encode(events)
        self.written.clear()
        self.flush()
        if sum(map(len, self.outbox)) > MAX_OUTBOX:
            self.end(*TOO_SLOW)


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

    def __init__(self, storage: Storage, connections: set[Connection]) -> None:
        self.storage = storage
        self.connections = connections
        self.rooms: dict[str, Room] = {}
        self.clients: dict[str, set[Client]] = {}  # of each person who is online
        self.roles: dict[str, str] = {}  # of the same
        self.pending: list[tuple[Event, Done | None]] = []  # in order of arrival
        self.posted = asyncio.Event()

    def connect(self, client: Client, limit: int) -> None:
        """Let a client in, and welcome it. Refused if its owner has ``limit`` sockets already."""
        me = client.me
        mine = self.clients.setdefault(me.name, set())
        must(not limit or len(mine) < limit, "unavailable", "Too many sockets")
        mine.add(client)
        self.roles[me.name] = me.role
        welcome: Event = {"type": "welcome", "user": me.name, "role": me.role}
        private = sorted(room for room, _ in self.storage.rooms(me.name, limit=1_000))
        more = {"epoch": self.storage.epoch, "expires_at": me.ends, "rooms": private}
        client.outbox = client.encode([welcome | more])  # it leaves with what comes next

    def disconnect(self, client: Client) -> None:
        for room in list(client.cursors):
            self.leave(client, room)
        client.outlet.on_ready = lambda: None  # nothing refers back, so nothing is left to collect
        self.clients[client.me.name].discard(client)
        if not self.clients[client.me.name]:
            del self.clients[client.me.name], self.roles[client.me.name]

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
        users = {name: self.roles[name] for name in sorted(room.people)}
        client.tell(*past, {"type": "presence", "room": name, "users": users})

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
        taken: Sequence[tuple[Event, Done | None]] = ()
        while True:
            await self.posted.wait()
            # Each batch costs a commit, and a write for each reader: in a rush they are gathered.
            await asyncio.sleep(GATHER_SECONDS if len(taken) > RUSH else 0)
            taken, self.pending = self.pending[:MAX_BATCH], self.pending[MAX_BATCH:]
            if not self.pending:
                self.posted.clear()
            try:
                await self.commit(taken)
            except Exception:
                log.exception("unexpected error in the committer")

    async def commit(self, taken: Sequence[tuple[Event, Done | None]]) -> None:
        changes = [change for change, _ in taken if change["type"] not in NOTICES]
        messages = [change for change in changes if change["type"] == "message"]
        for id, message in enumerate(messages, self.storage.shown + 1):
            message |= {"id": id, "at": round(time.time(), 3)}
        run = asyncio.get_running_loop().run_in_executor
        applied = await run(self.storage.thread, self.storage.apply, changes) if changes else []
        self.storage.shown += len(messages)
        rest = iter(applied)
        outcomes = [change if change["type"] in NOTICES else next(rest) for change, _ in taken]
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
            rooms = [room for room in self.rooms.values() if user in room.people]
            for client in self.clients[user].union(*(room.followers for room in rooms)):
                self.send_personal_message({"type": "role", "user": user, "role": role}, client)

    def sockets_of(self, event: Event) -> list[Connection]:
        """The open sockets of a person or, if the event names its ``sid``, of a log-in."""
        mine = [one for one in self.connections if one.me.name == event["user"]]
        return [one for one in mine if one.me.sid == event.get("sid", one.me.sid)]

    def broadcast(self, room: str, events: Sequence[Event]) -> None:
        """Append to a room's log, which writes to its followers. In a private conversation, tell
        the other sockets of the two as well, except who came and went."""
        if room in self.rooms:
            self.rooms[room].append(events)
        private = [event for event in events if event["type"] not in ("joined", "left")]
        for client in {client for name in members(room) for client in self.clients.get(name, ())}:
            if self.rooms.get(room) not in client.cursors:
                client.tell(*private)


# 10. The chat =========================================================================
# A client may send anything at any time. So what it may say is a closed set of types, with each
# field checked in one place; what is wrong is answered with an error that names it, and the socket
# stays open. What is right is said in the words of chapter 9.

app.description = """
The chat's socket is `/ws/chat?room=lobby`. Its token comes as `Authorization: Bearer`, as `token`
in the query or, from a browser, as a subprotocol: `["lobby.v1", "bearer." + token]`. With
`lobby.v1` each frame has one or more JSON objects, one a line; without it, lines of text (`/help`
lists what they can do). A close by 1008 is final; after anything else but 1000, come back with
the newest `id` as `after`, and the `epoch`.

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
    text = text.replace("\r\n", "\n").strip()
    if len(text) <= LONGEST_FORM * MAX_TEXT:
        text = normalize("NFC", text)
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


Text = Annotated[str, AfterValidator(clean_text)]
RoomName = Annotated[str, AfterValidator(clean_room)]
Mid = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
NewText = Annotated[Text, Body()]
NewMid = Annotated[Mid | None, Body()]
Id = Annotated[int, Field(ge=0, le=MAX_ID)]
Limit = Annotated[int, Field(ge=1, le=200)]
NameStart = Annotated[str, Query(max_length=80), AfterValidator(fold_start)]
SearchText = Annotated[str, Query(max_length=200), AfterValidator(lambda q: normalize("NFC", q))]


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
    """A message that is to be posted; the committer gives it ``id`` and ``at``."""
    event: Event = {"type": "message", "id": 0, "room": room, "user": me.name, "text": text}
    return event | {"at": 0.0, "mid": mid}


def history_event(room: str, messages: list[Event], more: bool, complete: bool = True) -> Event:
    event: Event = {"type": "history", "room": room, "messages": messages}
    return event | {"more": more, "complete": complete}


def may_see(room: str, me: Bearer) -> bool:
    return not members(room) or me.name in members(room)


def find_room(storage: Storage, name: str, me: Bearer) -> str:
    """The true name of a room. A conversation between others is refused like one that cannot be."""
    if not members(name):
        return name
    with suppress(ValueError, KeyError):  # not two, no name, or not mine
        one, other = map(fold, members(name))
        if person := storage.find_person({one: other, other: one}[fold(me.name)]):
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


async def chat(websocket: WebSocket) -> None:
    """The chat socket. Once it is accepted, nothing waits until the client is welcome."""
    encode = as_json if CHAT_PROTOCOL in websocket.scope["subprotocols"] else as_plain
    await websocket.accept(CHAT_PROTOCOL if encode is as_json else None)
    token, state = await token_of(websocket), websocket.app.state
    me = state.logins.find_bearer(token)
    client = ChatClient(websocket, me, encode)
    log.info("connected %r from %s", me.name, client_host(websocket))
    try:
        async with client:
            state.manager.connect(client, state.settings.sockets_per_user)
            await client.listen()
    finally:
        state.manager.disconnect(client)
        log.info("disconnected %r", me.name)


app.router.add_websocket_route("/ws/chat", chat)  # Starlette's: there is nothing to be injected


class ChatClient(Client):
    """A client that does what it is told."""

    def __init__(self, websocket: WebSocket, me: Bearer, encode: Encode) -> None:
        super().__init__(websocket, me, encode)
        state = websocket.app.state
        self.manager: ConnectionManager = state.manager
        self.storage: Storage = state.storage
        self.limit: RateLimit = state.limit

    async def listen(self) -> None:
        """Join what the URL asks for, then do what each frame asks for."""
        is_json = self.encode is as_json
        query = {"room": "lobby", **self.websocket.query_params, "type": "join"}
        query["room"] = query["room"].replace(" ", "+")  # what a "+" in a query means
        await self.attempt(self.obey_json, json.dumps(query))
        while True:
            frame = await receive_text(self.websocket)
            lines = frame.split("\n") if is_json else [frame]
            for line in lines:
                await self.written.wait()  # who reads no answers is not listened to
                await self.attempt(self.obey_json if is_json else self.obey_plain, line)
                if len(lines) > 1:  # there may be thousands: let others go between
                    await asyncio.sleep(0)

    async def attempt(self, obey: Callable[[str], Awaitable[None]], line: str) -> None:
        """Do what a line asks for, or tell why not."""
        try:
            await obey(line)
        except (ValidationError, Refused) as error:
            about = json_or_none(line)
            self.tell(error_event(error, about if isinstance(about, dict) else {}))

    async def obey_json(self, line: str) -> None:
        event = Incoming.model_validate_json(line)
        must(event.mid or event.type != "message", "invalid", "A message has a 'mid'")
        await self.do(event)

    async def obey_plain(self, line: str) -> None:
        """Plain text: a command, or a message to the one room that such a client is in."""
        room = next(iter(self.cursors), None)
        match line.split() if line.startswith("/") else None:
            case None:
                if not room:
                    raise Refused("unknown_room", "You are in no room")
                await self.do(Incoming(type="message", room=room.name, text=line))
            case ["/who"]:
                here = ", ".join(sorted(room.people)) if room else "nobody"
                self.tell({"type": "text", "text": f"Here: {here}"})
            case ["/msg", name, _, *_]:
                text = line.split(maxsplit=2)[2]
                await self.do(Incoming(type="message", to=name, text=text))
            case ["/msg", *_]:
                raise Refused("invalid", "whom, and what? /msg bob hi")
            case ["/help"]:
                self.tell({"type": "text", "text": HELP})
            case _:
                raise Refused("invalid", "unknown command; /help lists them")

    async def do(self, event: Incoming) -> None:
        if event.type == "message":
            is_whole = event.text and (event.room is None) != (event.to is None)
            must(is_whole, "invalid", "A message has a 'text', and a 'room' or a person ('to')")
        must(event.room or event.to is not None, "invalid", "Name the 'room'")
        named = event.room or f"@{self.me.name}+{event.to}"
        if event.type == "join":
            while wait := self.limit.retry_after(f"join {self.me.name}", self.limit.rate):
                self.flush()
                await asyncio.sleep(wait)  # everybody in the room hears of joins
        name = find_room(self.storage, named, self.me)
        room = self.manager.rooms.get(name)
        match event.type:
            case "message":
                self.send(name, event.text or "", event.mid)
            case "join":
                self.join(name, event.after, event.epoch)
            case "leave" if room in self.cursors:
                self.manager.leave(self, room)
            case "typing":
                may = room in self.cursors or members(name)
                must(may, "forbidden", "Join the room first")
                if not self.limit.retry_after(f"typing {self.me.name} {name}", TYPING_RATE):
                    self.manager.post({"type": "typing", "room": name, "user": self.me.name})
            case "history":
                page = self.storage.page(name, event.limit, event.before)
                self.tell(history_event(name, *page))

    def send(self, room: str, text: str, mid: str | None) -> None:
        """Post a message. What becomes of it comes back through the room, or to it alone."""
        self.limit.spend(self.me.name)

        def answer(outcome: Event | Refused) -> None:
            is_told = self.manager.rooms.get(room) in self.cursors or members(room)
            if isinstance(outcome, Refused):
                self.tell(error_event(outcome, message))
            elif isinstance(outcome, Repeated) or not is_told:
                self.tell(outcome)

        message = new_message(room, self.me, text, mid)
        self.manager.post(message, answer)

    def join(self, room: str, after: int | None, epoch: str | None) -> None:
        """Join, and read on after this id; or from the newest page, if that is not to be had."""
        past: list[Event] = []
        is_ours = epoch in (None, self.storage.epoch)
        missed = self.storage.missed(room, after) if is_ours and after is not None else None
        if missed:
            past = [history_event(room, missed[0], more=False), *missed[1]]
        elif self.encode is as_json or after is not None:
            page = self.storage.page(room, HISTORY)
            past = [history_event(room, *page, complete=after is None)]
        self.manager.join(self, room, past)


begin_chapter("10. The chat", 401, 503)


@app.get("/rooms")
async def list_rooms(
    request: Request, me: Me, limit: Limit = 100, before: Id = MAX_ID, q: NameStart = ""
) -> list[dict[str, Any]]:
    """The rooms that the caller may see, the most recently written first, then the unwritten;
    those before this ``last_id``, whose names begin with ``q``."""
    storage, opened = request.app.state.storage, request.app.state.manager.rooms
    find = functools.partial(storage.find_rooms, q)
    written = await find("", limit, before) + await find(me.name, limit, before)
    found = dict(sorted(written, key=itemgetter(1), reverse=True)[:limit])
    if len(found) < limit and before:
        named = sorted(room for room in {"lobby", *opened} if room.startswith(q))
        unwritten = (room for room in named if may_see(room, me) and not storage.is_written(room))
        found |= dict.fromkeys(itertools.islice(unwritten, limit - len(found)), 0)
    online = {room: len(opened[room].people) if room in opened else 0 for room in found}
    return [{"room": room, "online": online[room], "last_id": id} for room, id in found.items()]


@app.get("/rooms/{room}/messages", responses=answers(404))
async def read_messages(
    request: Request,
    me: Me,
    room: RoomName,
    before: Id = MAX_ID,
    after: Id | None = None,
    limit: Limit = HISTORY,
    q: SearchText = "",
) -> dict[str, Any]:
    """A page, oldest first: after ``after`` if that is given, else before ``before``; with ``q``,
    of messages that have this in their text, taken literally, whatever its case."""
    storage = request.app.state.storage
    where = (find_room(storage, room, me), limit, before, after)
    messages, more = await storage.search(q, *where) if q else storage.page(*where)
    return {"messages": messages, "more": more}


@app.post(
    "/rooms/{room}/messages",
    status_code=201,
    responses=OF_BODY | answers(404, 429) | {200: {"description": "The original"}},
)
async def post_message(
    request: Request, me: Me, room: RoomName, text: NewText, mid: NewMid = None
) -> Response:
    """Answers once it is stored: 201, or 200 with the original of a ``mid`` sent before."""
    state = request.app.state
    message = new_message(find_room(state.storage, room, me), me, text, mid)
    state.limit.spend(me.name)
    stored = await state.change(message)
    return JSONResponse(stored, 200 if isinstance(stored, Repeated) else 201)


@app.delete("/rooms/{room}/messages/{id}", status_code=204, responses=answers(404, 429))
async def delete_message(request: Request, me: Me, room: RoomName, id: Id) -> None:
    """Take a message out; for its author, and for moderators."""
    state = request.app.state
    change = {"type": "deleted", "room": find_room(state.storage, room, me), "id": id}
    state.limit.spend(me.name)
    await state.change(change | {"by": me.name})


@app.get("/users")
async def list_users(request: Request, me: Me, q: NameStart | None = None) -> list[dict[str, Any]]:
    """Who is online. With ``q``: whose names begin so, online or not, the first 50; to moderators,
    also whether they are banned."""
    manager, storage = request.app.state.manager, request.app.state.storage
    found = sorted(manager.roles.items()) if q is None else storage.find_people(q)
    users = []
    for name, role, *banned in found:
        clients = manager.clients.get(name, ())
        rooms = {room.name for client in clients for room in client.cursors}
        user = {"username": name, "role": role, "rooms": sorted(r for r in rooms if may_see(r, me))}
        users.append(user | ({"banned": bool(banned[0])} if banned and me.role != "member" else {}))
    return users


@app.get("/healthz")
async def healthz(request: Request) -> dict[str, Any]:
    """For whoever watches the server: people online and rooms open; 503 if it could not store."""
    state = request.app.state
    if state.checking is None or state.checking.done():  # one serves all who ask meanwhile
        state.checking = asyncio.create_task(state.change({"type": "health"}))
    await asyncio.shield(state.checking)
    rooms = [room for room in state.manager.rooms if not members(room)]
    return {"status": "ok", "online": len(state.manager.clients), "rooms": len(rooms)}


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
        raise StartError(
            f"CHAT_HOST={settings.host!r} can be reached from other machines, and the passwords of "
            f"{', '.join(known or DEMO_PEOPLE)} are public: change them, or for a new database set "
            "CHAT_DEMO_USERS to 0; or set it to 1 if you mean it"
        )


def hide_secrets(record: logging.LogRecord) -> bool:
    """URLs are logged, and a token may be in their query, or by mistake in their path."""
    if isinstance(record.args, tuple):  # uvicorn's formatter wants them whole
        hide = functools.partial(re.sub, r"(\?)[^\s\"']*|eyJ[\w.-]{20,}", r"\1...")
        record.args = tuple(hide(a) if isinstance(a, str) else a for a in record.args)
    return True


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    for name in ("lobby", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).addFilter(hide_secrets)
    settings, state = Settings.from_environment(), app.state
    with closing(Storage(settings.db)) as storage:
        check_demo_people(settings, storage)
        state.settings, state.storage, state.origins = settings, storage, settings.origins
        state.limit = RateLimit(settings.rate)
        state.connections, state.checking = set(), None
        state.manager = ConnectionManager(storage, state.connections)
        state.change = state.manager.change
        state.logins = Logins(settings, storage, state.change)
        committer = asyncio.create_task(state.manager.commit_forever())
        try:
            if settings.demo_users and not storage.find_people(""):
                for name, password in DEMO_PEOPLE.items():
                    role = "admin" if name == "admin" else "member"
                    await state.logins.register(name, password, True, role=role)
            yield
        finally:
            await state.change({"type": "stop"})  # changes nothing, but all before it is done
            committer.cancel()
            state.logins.threads.shutdown()


app.router.lifespan_context = lifespan
STALL_SECONDS = 20  # how long a peer may take no byte of what waits for it, or be silent
HEAD_SECONDS = 20  # how long a connection may go without a whole head of a request
PONG_SECONDS = 120.0  # a ping may stand behind megabytes for a slow line
SEND_BUFFER = 256 * KIB  # of the kernel, for each socket: it would hide megabytes
MAX_FRAGMENTS = 1_024  # frames that one message may come in
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
        super().on_headers_complete()

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

    on_ready: Callable[[], object] = staticmethod(lambda: None)

    @property
    def ready(self) -> bool:
        return self.writable.is_set()

    def write(self, frames: Frames) -> None:
        if not (self.close_sent or self.transport.is_closing()):  # else it takes everything
            self.transport.write(frames.wire)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_ready()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.on_ready()

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
            return
        super().data_received(data)
        if not self.handshake_initiated:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self.scope["extensions"].clear()  # which refer back
        if not self.disconnected:  # what waits to be sent may wait forever
            self.loop.call_later(self.close_timeout, self.transport.abort)

    def handle_ping(self) -> None:
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
        where = f"CHAT_HOST={settings.host!r}, CHAT_PORT={settings.port}"
        raise StartError(f"{where}: {error}") from None
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
        # What the lifespan would refuse at length is refused here, in one line.
        with closing(Storage(settings.db)) as storage:
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
        ws_ping_timeout=PONG_SECONDS,
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


# 12. The page =========================================================================
# One constant, sent as it is: nothing is put into it on the server, so nothing can be
# smuggled in. Its policy lets exactly this script and this style run, by their hashes.


@functools.cache  # at its first use, since the constant stands below
def page_headers() -> dict[str, str]:
    hashes = {
        tag: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for tag, content in re.findall(r"<(script|style)>(.*?)</\1>", PAGE, re.DOTALL)
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return headers | {"Content-Security-Policy": policy}


begin_chapter("12. The page")


@app.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page."""
    return HTMLResponse(PAGE, headers=page_headers())


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lobby</title>
<link id="icon" rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ink: light-dark(#1d2129, #e6e8ec); --dim: light-dark(#596273, #a0a8b6);
  --paper: light-dark(#fff, #16181d); --shade: light-dark(#f4f5f8, #1c1f26);
  --raised: light-dark(#e7eaf1, #2a2f3a); --line: light-dark(#d9dde6, #323844);
  --accent: light-dark(#2f5bd0, #8fb0ff); --on-accent: light-dark(#fff, #10131a);
  --wrong: light-dark(#b3261e, #ff9d94); --good: light-dark(#1c6b3c, #7fd6a0);
}
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.15rem; } h2 { font-size: 1rem; }
h3, #side h2 { font-size: .8rem; color: var(--dim); }
input, textarea, select, button { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .65rem; min-width: 0; }
button { cursor: pointer; background: var(--raised); border-color: transparent; }
button.main { background: var(--accent); color: var(--on-accent); }
button.plain { background: none; padding: .1rem .3rem; color: var(--accent); }
button:hover { filter: brightness(.95); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
::placeholder { color: var(--dim); opacity: 1; }
.problem { color: var(--wrong); overflow-wrap: anywhere; }
.problem:empty { display: none; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.row { display: flex; gap: .5rem; align-items: center; flex-wrap: wrap; }
.grow { flex: 1; }

#access { min-height: 100dvh; display: grid; place-content: center; padding: 1rem;
  grid-template-columns: min(22rem, 100%); gap: 1rem; background: var(--shade); }
#access form, #access details { display: grid; gap: .75rem; }
#access label { display: grid; gap: .2rem; font-weight: 600; }
#access details label { margin-block: .5rem; }

#app { height: 100dvh; display: flex; position: relative; overflow: hidden; }
#side { width: 15rem; flex: none; display: flex; flex-direction: column; gap: .4rem;
  padding: .75rem; background: var(--shade); border-inline-end: 1px solid var(--line);
  overflow-y: auto; }
#side h2 { margin-top: .75rem; }
#side ul { list-style: none; padding: 0; }
#side li button { display: flex; gap: .5rem; align-items: center; width: 100%; background: none;
  text-align: start; padding: .25rem .5rem; }
#side li button > :first-child, .name { overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
#side li button:hover, #side [aria-current] { background: var(--raised) !important; }
#rooms button::before { content: "#"; color: var(--dim); }
#side small { color: var(--dim); margin-inline-start: auto; }
#side .unread { background: var(--accent); color: var(--on-accent); border-radius: 1rem;
  padding: 0 .45rem; }
#me { margin-top: auto; padding-top: .75rem; }

#room { flex: 1; min-width: 0; display: flex; flex-direction: column; position: relative; }
#top { flex: none; height: 3.5rem; display: flex; gap: .5rem; align-items: center;
  padding: .5rem .9rem; border-bottom: 1px solid var(--line); }
#top button { flex: none; white-space: nowrap; }
#status { color: var(--dim); font-size: .85rem; }
#status::before { content: "●"; margin-inline-end: .35rem; color: var(--wrong); }
#status[data-state="connected"]::before { color: var(--good); }
#chatLog { flex: 1; min-height: 0; overflow-y: auto; overflow-anchor: none; padding: .5rem 0; }
.message { display: grid; grid-template-columns: 2.5rem 1fr auto; column-gap: .7rem;
  padding: .45rem .9rem 0; align-items: start; }
.message.grouped { padding-top: .05rem; }
.message:hover { background: var(--shade); }
.avatar { grid-row: span 2; width: 2.25rem; height: 2.25rem; border-radius: .7rem; display: grid;
  place-content: center; color: #fff; font-weight: 600; background: oklch(.5 .11 var(--hue)); }
.mine .avatar { border-radius: 50%; }
.who { grid-column: 2; display: flex; gap: .5rem; align-items: baseline; min-width: 0; }
.who button { font-weight: 600; padding: 0; color: var(--ink); }
.mine .who button { color: var(--accent); }
.text { grid-column: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
.text a { color: var(--accent); }
time, .state, .notice, #typing { color: var(--dim); font-size: .8rem; }
time { flex: none; white-space: nowrap; }
.tools { grid-column: 3; grid-row: 1; opacity: 0; font-size: .8rem; }
.message:hover .tools, .tools:focus-within { opacity: 1; }
.notice { padding: .2rem .9rem .2rem 4.1rem; overflow-wrap: anywhere; white-space: pre-wrap; }
#messages:empty + :empty::after { content: "Nothing has been written here yet."; display: block;
  padding: 2rem; text-align: center; color: var(--dim); }
.day { display: flex; align-items: center; gap: .75rem; margin: .75rem .9rem .25rem;
  font-size: .8rem; color: var(--dim); }
.day::before, .day::after { content: ""; flex: 1; border-top: 1px solid var(--line); }
.state { grid-column: 2; } .failed .state { color: var(--wrong); }
#messages .state { display: none; } #messages > :last-child .state { display: block; }
#newest { position: absolute; bottom: 5.5rem; left: 50%; translate: -50%; white-space: nowrap;
  border-radius: 2rem; box-shadow: 0 2px 12px #0004; z-index: 1; }
#typing { flex: none; padding: 0 .9rem; height: 1.4rem; }
#composer { display: flex; gap: .5rem; align-items: end; padding: 0 .9rem .9rem; }
#messageText { flex: 1; resize: none; field-sizing: content; min-height: 2.4rem;
  max-height: 30dvh; }

#wire { width: min(32rem, 44vw); flex: none; min-height: 0; display: flex; flex-direction: column;
  background: var(--shade); border-inline-start: 1px solid var(--line); }
#wire > * { padding: .5rem .75rem; }
#wire > details { border-bottom: 1px solid var(--line); max-height: 60dvh; overflow-y: auto;
  flex: none; }
#wire form { display: grid; gap: .4rem; padding-top: .5rem; }
#wire textarea, pre, #frames { font: 12px/1.5 ui-monospace, monospace; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow: auto;
  background: var(--paper); padding: .5rem; border-radius: .4rem; }
#frames { list-style: none; flex: 1; overflow-y: auto; min-height: 6rem; }
#frames summary { display: flex; gap: .5rem; cursor: pointer; padding: .1rem 0; }
#frames b { color: var(--accent); } #frames .in b { color: var(--good); }
dialog { color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: .8rem; padding: 1.25rem; margin: auto; width: min(24rem, calc(100% - 2rem)); }
dialog form { display: grid; gap: .9rem; } dialog h2 { overflow-wrap: anywhere; }
dialog::backdrop { background: #0006; }
#menu { display: none; }
@media (max-width: 1100px) {
  #wire { position: absolute; inset: 0 0 0 auto; width: min(30rem, 100%); z-index: 3;
    box-shadow: 0 0 30px #0005; }
}
@media (max-width: 700px) {
  #menu { display: block; }
  #status { flex: none; max-width: 10rem; }
  #side { position: absolute; inset: 3.5rem auto 0 0; width: min(17rem, 85%); z-index: 2;
    box-shadow: 0 0 30px #0005; }
  #side:not(.open) { display: none; }
}
@media (prefers-reduced-motion: no-preference) { button, .tools { transition: .15s; } }
</style>
</head>
<body>
<main id="access">
  <h1>Lobby</h1>
  <form id="credentials" novalidate>
    <label>Name <input id="username" name="username" autocomplete="username" autocapitalize="none"
      aria-describedby="usernameProblem"></label>
    <p id="usernameProblem" class="problem" role="alert"></p>
    <label>Password <input id="password" name="password" type="password"
      autocomplete="current-password" aria-describedby="passwordProblem"></label>
    <p id="passwordProblem" class="problem" role="alert"></p>
    <p class="row"><button class="main grow" value="login">Log in</button>
      <button class="grow" value="register">Register</button></p>
  </form>
  <details><summary>Use a token</summary>
    <form id="pasted"><label>Token <input id="token" name="token" autocomplete="off"
      spellcheck="false"></label><button>Connect with the token</button></form>
  </details>
  <p id="problem" class="problem" role="alert"></p>
</main>

<div id="app" hidden>
  <nav id="side" aria-label="Rooms and people">
    <h1>Lobby</h1>
    <h2>Rooms</h2><ul id="rooms"></ul>
    <form id="joinRoom" class="row">
      <input id="roomToJoin" class="grow" aria-label="Room to join" list="known"
        placeholder="Join a room" maxlength="32" size="1">
      <datalist id="known"></datalist><button>Join</button></form>
    <h2>Private</h2><ul id="private"></ul>
    <h2>People online</h2><ul id="people"></ul>
    <p id="me" class="row"><strong class="name grow" id="myName"></strong>
      <button id="logOut" type="button">Log out</button></p>
  </nav>

  <main id="room">
    <div id="top">
      <button id="menu" type="button" aria-controls="side" aria-expanded="false">Rooms</button>
      <h2 id="roomName" class="name"></h2>
      <button id="leave" class="plain" type="button">Leave</button>
      <span class="grow"></span>
      <span id="status" class="name" role="status"><span id="state"></span><span id="more"
        aria-hidden="true"></span></span>
      <button id="wireButton" type="button" aria-controls="wire"
        aria-expanded="false">The wire</button>
    </div>
    <div id="chatLog" role="log" aria-label="Messages" tabindex="0">
      <div id="messages"></div><div id="pending"></div>
    </div>
    <button id="newest" class="main" type="button" hidden></button>
    <p id="typing" class="name"></p>
    <form id="composer">
      <label class="unseen" for="messageText">Message</label>
      <textarea id="messageText" rows="1" maxlength="4000" dir="auto"
        placeholder="Message, or /help"></textarea>
      <button class="main">Send</button>
    </form>
  </main>

  <aside id="wire" aria-label="The wire" hidden>
    <div class="row"><h2>The wire</h2>
      <input id="filter" class="grow" placeholder="Filter" aria-label="Filter" size="1">
      <button id="pause" type="button" aria-pressed="false">Pause</button>
      <button id="clear" type="button">Clear</button>
      <button id="closeWire" type="button">Close</button></div>
    <details><summary>Send a request to /inspect</summary>
      <form id="request">
        <div class="row">
          <select name="method" aria-label="Method"><option>GET<option>POST<option>PUT
            <option>PATCH<option>DELETE<option>OPTIONS</select>
          /inspect/<input name="path" class="grow" aria-label="Path" size="1">
          ?<input name="query" class="grow" aria-label="Query" value="a=1&amp;a=2" size="1"></div>
        <textarea name="headers" rows="1"
          aria-label="Headers, one a line">X-Example: hello</textarea>
        <div class="row">
          <select name="kind" aria-label="Body"><option>no body<option>JSON<option>form
            <option>file</select>
          <input name="file" type="file" class="grow" aria-label="File" hidden></div>
        <textarea name="body" rows="3" aria-label="Body's content" hidden></textarea>
        <button class="main">Send</button>
        <div class="pair" hidden><div><h3>What was sent</h3><pre id="sent" tabindex="0"></pre></div>
          <div><h3>What the server saw</h3><pre id="seen" tabindex="0"></pre></div></div>
      </form></details>
    <details><summary>Talk to a socket</summary>
      <form id="socketForm">
        <div class="row">
          <select name="path" class="grow" aria-label="Socket"><option>/ws<option>/ws/json
            <option>/ws/inspect</select>
          <button id="openSocket" type="button">Open</button></div>
        <div class="row">
          <input name="text" class="grow" aria-label="Text to send" value='{"a": 1}' size="1">
          <button>Send</button></div>
        <pre id="answer" tabindex="0" aria-label="The last frame">not open</pre>
      </form></details>
    <ol id="frames" tabindex="0" aria-label="Requests and frames, the newest first"></ol>
  </aside>
</div>

<dialog id="person" aria-labelledby="personName"><form method="dialog">
  <h2 id="personName"></h2><p id="personRole"></p>
  <p class="row"><button class="main" value="message">Message</button>
    <span id="moderation" class="row"><button value="kick">Kick</button>
      <button value="ban">Ban</button><button value="unban">Unban</button></span></p>
  <p id="roleRow" class="row"><label for="newRole">Role</label><select id="newRole">
    <option>member<option>moderator<option>admin</select><button value="role">Set role</button></p>
  <button value="">Close</button>
</form></dialog>

<script>
"use strict";
const $ = (id) => document.getElementById(id);

// A new element. Text goes in as text nodes, never as HTML: whatever others write stays text.
const make = (tag, properties = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};

// -- The wire: all that this tab sends and receives ------------------------------------------

const WIRE = 300;  // entries that are kept
let entries = [];
let paused = false;

const hideSecrets = (text) => text
  .replace(/eyJ[\w-]{7}[\w-]*\.[\w-]+\.[\w-]+/g, (token) => `${token.slice(0, 10)}...`)
  .replace(/(\\?"password\\?"\s*:\s*)\\?"(?:[^"\\]|\\.)*?\\?"/g, '$1"..."');

const pretty = (text) => text.split("\n").map((line) => {
  try { return JSON.stringify(JSON.parse(line), null, 2); } catch { return line; }
}).join("\n");

const record = (way, title, text = "") => {
  const shown = hideSecrets(text);
  entries.push({way, title: hideSecrets(title), text: shown, at: new Date(),
    size: new TextEncoder().encode(text).length});
  entries = entries.slice(-WIRE);
  if (!paused && !$("wire").hidden) showEntry(entries.at(-1));
};

const showEntry = (entry) => {
  const wanted = $("filter").value.toLowerCase();
  if (!`${entry.title} ${entry.text}`.toLowerCase().includes(wanted)) return;
  const details = make("details", {}, make("summary", {},
    make("time", {}, entry.at.toTimeString().slice(0, 8)),
    make("b", {}, entry.way === "out" ? "→ out" : "← in"),
    make("span", {className: "name grow"}, entry.title), make("span", {}, `${entry.size} B`)));
  details.addEventListener("toggle",
    () => details.append(make("pre", {tabIndex: 0}, pretty(entry.text))), {once: true});
  $("frames").prepend(make("li", {className: entry.way}, details));
  while ($("frames").children.length > WIRE) $("frames").lastChild.remove();
};

const showWire = () => {
  $("frames").replaceChildren();
  entries.forEach(showEntry);
};

// Sends a request and shows both directions on the wire.
const request = async (method, path, headers = {}, body = undefined) => {
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\n`).join("");
  const sent = typeof body === "string" ? body : body ? `(${body.constructor.name})` : "";
  record("out", `${method} ${path}`, `${lines}\n${sent}`);
  const response = await fetch(path, {method, headers, body});
  const text = await response.text();
  const heads = [...response.headers].map(([name, value]) => `${name}: ${value}\n`).join("");
  record("in", `${response.status} ${method} ${path}`, `${heads}\n${text}`);
  return {response, text, sent: hideSecrets(`${method} ${path}\n${lines}\n${pretty(sent)}`)};
};

// A request of the chat's own: JSON in and out. Throws an Error with the server's words.
const api = async (method, path, json = undefined) => {
  const headers = token ? {Authorization: `Bearer ${token}`} : {};
  if (json) headers["Content-Type"] = "application/json";
  const {response, text} = await request(method, path, headers, json && JSON.stringify(json));
  const answer = text ? JSON.parse(text) : null;
  if (response.ok) return answer;
  const wrong = Array.isArray(answer.detail) ? answer.detail[0] : {msg: answer.detail, loc: []};
  throw Object.assign(new Error(wrong.msg), {field: wrong.loc.at(-1), status: response.status});
};

const typesIn = (text) =>
  [...new Set(text.match(/^{"type":"\w+/gm))].map((found) => ` ${found.slice(9)}`).join();

// A WebSocket whose frames are shown on the wire.
const openSocket = (url, protocols = []) => {
  const opened = new WebSocket(url, protocols);
  const title = `WS ${url.pathname}`;
  record("out", `${title} open`, `${url.search}\n${protocols.join("\n")}`);
  opened.addEventListener("message", ({data}) => record("in", title + typesIn(data), data));
  opened.addEventListener("close",
    ({code, reason}) => record("in", `${title} close`, `${code} ${reason}`));
  return opened;
};

const sendFrame = (to, text) => {
  record("out", `WS ${new URL(to.url).pathname}${typesIn(text)}`, text);
  to.send(text);
};

const socketUrl = (path) => new URL(path, location.href.replace(/^http/, "ws").replace(/#.*/, ""));

// -- What is kept in the browser -------------------------------------------------------------

const kept = (storage, name, fallback = null) => {
  try {
    return JSON.parse(storage.getItem(`lobby.${name}`)) ?? fallback;
  } catch { return fallback; }
};

let storable = true;
const keep = (storage, name, value) => {
  try {
    if (value === null) storage.removeItem(`lobby.${name}`);
    else storage.setItem(`lobby.${name}`, JSON.stringify(value));
  } catch {
    if (storable) note("This browser keeps nothing: what is not sent is lost with the tab.");
    storable = false;
  }
};

let token = kept(sessionStorage, "token", "");
let me = "";
let roles = new Map();  // of the people online
const may = (...wanted) => wanted.includes(roles.get(me));

// -- Rooms -----------------------------------------------------------------------------------

const rooms = new Map();
let current = null;  // the room that is shown

// Two names of one private conversation, in another order or case, are one key.
const keyOf = (name) => {
  const normal = name.normalize("NFKC");
  if (!name.startsWith("@")) return normal.toLowerCase();
  return `@${normal.slice(1).toUpperCase().toLowerCase().split("+").sort().join("+")}`;
};

const roomOf = (name) => {
  const key = keyOf(name);
  if (!rooms.has(key)) {
    const read = kept(localStorage, `read.${me}.${epoch}.${key}`, 0);  // the last id that was seen
    rooms.set(key, {key, name, items: [], ids: new Set(), last: null, more: false,
      loading: false, read, unread: 0, here: new Set(), typing: new Map()});
  }
  return rooms.get(key);
};

const privateWith = (user) => `@${[me, user].sort().join("+")}`;
const otherOf = (room) => {
  const both = room.name.slice(1).split("+");
  return both.find((name) => name.toLowerCase() !== me.toLowerCase()) ?? me;
};
const titleOf = (room) => room.name.startsWith("@") ? otherOf(room) : room.name;

const markRead = () => {
  if (!current || document.hidden) return;
  current.unread = 0;
  if (current.last > current.read) {
    current.read = current.last;
    keep(localStorage, `read.${me}.${epoch}.${current.key}`, current.read);
  }
};

const otherRooms = (room) =>
  kept(localStorage, `rooms.${me}`, []).filter((name) => keyOf(name) !== room.key);

const openRoom = (name) => {
  const isNew = !rooms.has(keyOf(name));
  current = roomOf(name);
  if (isNew) join(current);
  $("messageText").value = kept(localStorage, `draft.${me}.${current.key}`, "");
  openMenu(false);
  keep(localStorage, `rooms.${me}`, [...otherRooms(current), current.name]);
  showRoom();
};

const leaveRoom = () => {
  transmit({type: "leave", room: current.name});
  rooms.delete(current.key);
  keep(localStorage, `rooms.${me}`, otherRooms(current));
  openRoom("lobby");
  $("messageText").focus();
};

// -- Showing ---------------------------------------------------------------------------------

let stick = true;  // the newest message stays in view, unless the reader has scrolled up
const clock = new Intl.DateTimeFormat([], {timeStyle: "short"});
const calendar = new Intl.DateTimeFormat([], {dateStyle: "full"});
const LINK = /(https?:\/\/[^\s<>"]*[^\s<>".,:;!?'()[\]{}])/i;

const linked = (text) => text.split(LINK).map((part, index) => index % 2
  ? make("a", {href: part, target: "_blank", rel: "noopener noreferrer"}, part) : part);

const avatar = (user) => {
  const initial = [...user][0].toUpperCase();
  const element = make("span", {className: "avatar", ariaHidden: "true"}, initial);
  const sum = [...user].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 9973, 7);
  element.style.setProperty("--hue", sum * 137 % 360);
  return element;
};

const timeOf = (at) =>
  make("time", {dateTime: new Date(at * 1000).toISOString()}, clock.format(at * 1000));

const author = (user) => {
  const button = make("button", {type: "button", className: "plain name", dir: "auto"}, user);
  button.addEventListener("click", () => showPerson(user));
  return button;
};

// The elements of a message or a notice, with the day before it if that is a new one.
const elementsOf = (item, index, items) => {
  if (item.notice) return [make("p", {className: "notice"}, item.notice)];
  let before = index - 1;
  while (items[before]?.notice) before -= 1;
  const previous = items[before];
  const day = calendar.format(item.at * 1000);
  const sameDay = previous && calendar.format(previous.at * 1000) === day;
  const grouped = sameDay && before === index - 1 && previous.user === item.user
    && item.at - previous.at < 300;
  const message = make("article", {className: "message"});
  message.dataset.id = item.id;
  message.classList.toggle("mine", item.user === me);
  message.classList.toggle("grouped", Boolean(grouped));
  const who = make("div", {className: "who"}, author(item.user), timeOf(item.at));
  message.append(...(grouped ? [make("span")] : [avatar(item.user), who]));
  message.append(make("p", {className: "text", dir: "auto"}, ...linked(item.text)));
  if (item.user === me || may("moderator", "admin")) message.append(deleteButton(item));
  if (item.user === me) message.append(make("span", {className: "state"}, "sent"));
  return sameDay ? [message] : [make("p", {className: "day"}, day), message];
};

const deleteButton = (item) => {
  const label = `Delete "${item.text.slice(0, 40)}"`;
  const button = make("button", {type: "button", className: "plain", ariaLabel: label}, "Delete");
  button.addEventListener("click", () => {
    if (button.dataset.asked) {
      act("DELETE", `rooms/${encodeURIComponent(item.room)}/messages/${item.id}`);
    }
    button.dataset.asked = "yes";
    button.textContent = button.ariaLabel = "Really delete?";
  });
  button.addEventListener("blur", () => {
    delete button.dataset.asked;
    button.textContent = "Delete";
    button.ariaLabel = label;
  });
  return make("div", {className: "tools"}, button);
};

let lastTop = 0;  // where the log was scrolled to
const toNewest = () => {
  $("chatLog").scrollTop = $("chatLog").scrollHeight;
  lastTop = $("chatLog").scrollTop;
  $("newest").hidden = true;
};

// Does something a little later, and once, however often it was asked for until then.
const soon = (milliseconds, action) => {
  let timer = 0;
  return () => {
    timer ||= setTimeout(() => { timer = 0; action(); }, milliseconds);
  };
};

const follow = soon(16, () => {  // not for each event: to measure the log takes time
  if (stick) toNewest();
  loadOlder();
});

// Shows the whole room again; what was in view stays there. A screen reader hears only news.
const showMessages = () => {
  const log = $("chatLog");
  const items = current.items;
  const inView = [...$("messages").children].find((one) =>
    one.dataset.id && one.getBoundingClientRect().bottom > log.getBoundingClientRect().top);
  const bottom = inView?.getBoundingClientRect().bottom;
  const focused = $("messages").contains(document.activeElement);
  log.ariaLive = "off";
  $("messages").replaceChildren(...items.flatMap(elementsOf));
  if (focused) log.focus();
  const again = inView && $("messages").querySelector(`[data-id="${inView.dataset.id}"]`);
  if (stick) toNewest();
  else if (again) log.scrollTop += again.getBoundingClientRect().bottom - bottom;
  setTimeout(() => { log.ariaLive = "polite"; });
  loadOlder();
};

const showItem = (room, item) => {
  room.items.push(item);
  if (room.items.length > 1000 && (stick || room !== current)) {
    room.items.splice(0, 200).forEach(({id}) => room.ids.delete(id));
    room.more = true;
    if (room === current) return showMessages();
  }
  if (room !== current) return;
  $("messages").append(...elementsOf(item, room.items.length - 1, room.items));
  follow();
  if (!stick && !item.notice) {
    $("newest").hidden = false;
    $("newest").textContent = "New messages below";
  }
};

const note = (notice, room = current) => {
  if (room) showItem(room, {notice, at: Date.now() / 1000});
};

const showTyping = () => {
  const names = [...current.typing.keys()];
  $("typing").textContent = names.length ? `Typing: ${names.join(", ")}` : "";
};

const showRoom = () => {
  stick = true;
  const isPrivate = current.name.startsWith("@");
  $("roomName").textContent = isPrivate ? `Private: ${titleOf(current)}` : current.name;
  $("leave").hidden = current.key === "lobby";
  showMessages();
  showPending();
  showTyping();
  showSide();
};

// Shows items, {key, text, extra, unread, isCurrent, action}, in a list. Elements are used again:
// a new one would take the focus, or half a click, from whoever is on it.
const fill = (list, items) => {
  const old = new Map([...list.children].map((one) => [one.dataset.key, one]));
  const wanted = items.map((item) => {
    const {key, text, extra = "", unread = 0, isCurrent = false, action} = item;
    const one = old.get(key) ?? make("li", {}, make("button", {type: "button"},
      make("span", {dir: "auto"}), make("small")));
    const [button] = one.children;
    const [name, small] = button.children;
    one.dataset.key = key;
    button.onclick = action;
    button.ariaCurrent = isCurrent ? "true" : null;
    button.title = name.textContent = text;
    small.textContent = unread || extra;
    small.className = unread ? "unread" : "";
    small.ariaLabel = unread ? `${unread} unread` : null;
    return one;
  });
  const same = wanted.length === list.children.length
    && wanted.every((one, index) => one === list.children[index]);
  if (same) return;
  const focused = document.activeElement;
  list.replaceChildren(...wanted);
  if (list.contains(focused)) focused.focus();
};

const roomItem = (room) => {
  const failed = [...outbox.values()].some((one) => one.problem && keyOf(one.room) === room.key);
  return {key: room.key, text: titleOf(room), extra: failed ? "not sent" : room.here.size || "",
    unread: room.unread, isCurrent: room === current, action: () => openRoom(room.name)};
};

const icon = (fill) => `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' `
  + `viewBox='0 0 16 16'><circle cx='8' cy='8' r='7' fill='${fill}'/></svg>`;

const showSide = soon(30, () => {
  markRead();
  const byName = [...rooms.values()].sort((a, b) => titleOf(a).localeCompare(titleOf(b)));
  fill($("rooms"), byName.filter((room) => !room.name.startsWith("@")).map(roomItem));
  fill($("private"), byName.filter((room) => room.name.startsWith("@")).map(roomItem));
  fill($("people"), [...roles].map(([user, role]) => ({key: user, text: user,
    extra: role === "member" ? "" : role, action: () => showPerson(user)})));
  const unread = byName.reduce((sum, room) => sum + room.unread, 0);
  document.title = unread ? `(${unread}) Lobby` : "Lobby";
  $("icon").href = icon(unread ? "crimson" : "royalblue");
});

// -- The outbox: what is typed is kept until the server has it -------------------------------

let outbox = new Map();  // mid -> {mid, room, text, at, problem}
let sending = null;      // the mid that waits for its answer; one after the other keeps their order
let answerTimer = 0;

const loadOutbox = () => {
  const prefix = `lobby.outbox.${me}.`;
  const names = Object.keys(localStorage).filter((name) => name.startsWith(prefix));
  const found = names.map((name) => kept(localStorage, name.slice("lobby.".length)));
  for (const item of [...outbox.values(), ...found]) if (item) outbox.set(item.mid, item);
  for (const item of outbox.values()) roomOf(item.room);  // to be seen somewhere
  outbox = new Map([...outbox].sort(([, a], [, b]) => a.at - b.at));
};

const post = (room, text) => {
  const random = crypto.getRandomValues(new Uint32Array(4));
  const mid = Array.from(random, (number) => number.toString(36)).join("-");
  const item = {mid, room: room.name, text, at: Date.now() / 1000};
  outbox.set(mid, item);
  keep(localStorage, `outbox.${me}.${mid}`, item);
  stick = true;
  showPending();
  sendNext();
};

const sendNext = () => {
  if (sending || socket?.readyState !== WebSocket.OPEN) return;
  const next = [...outbox.values()].find((item) => !item.problem);
  if (!next) return;
  sending = next.mid;
  transmit({type: "message", room: next.room, text: next.text, mid: next.mid});
  answerTimer = setTimeout(() => disconnected("no answer"), 20_000);
};

const settle = (mid, problem = null) => {
  const item = outbox.get(mid);
  if (!item) return;
  if (problem) item.problem = problem; else outbox.delete(mid);
  keep(localStorage, `outbox.${me}.${mid}`, problem ? item : null);
  if (sending === mid) {
    sending = null;
    clearTimeout(answerTimer);
  }
  showPending();
  sendNext();
};

const showPending = () => {
  const mine = [...outbox.values()].filter((item) => keyOf(item.room) === current.key);
  $("pending").replaceChildren(...mine.map((item) => {
    const words = item.problem ? `failed: ${item.problem} ` : "sending";
    const state = make("p", {className: "state"}, words);
    if (item.problem) {
      const again = make("button", {type: "button", className: "plain"}, "try again");
      again.addEventListener("click", () => {
        delete item.problem;
        keep(localStorage, `outbox.${me}.${item.mid}`, item);
        showPending();
        sendNext();
      });
      const drop = make("button", {type: "button", className: "plain"}, "discard");
      drop.addEventListener("click", () => settle(item.mid));
      state.append(again, drop);
    }
    return make("article", {className: `message mine ${item.problem ? "failed" : ""}`}, avatar(me),
      make("p", {className: "text", dir: "auto"}, item.text), state);
  }));
  if (stick) toNewest();
};

// Another tab has sent it, or has failed to.
addEventListener("storage", ({key, newValue}) => {
  const mid = key?.startsWith(`lobby.outbox.${me}.`) && key.split(".").at(-1);
  if (mid && !newValue && outbox.has(mid)) settle(mid);
});

// -- Events ----------------------------------------------------------------------------------

const hearMessage = (room, event) => {
  if (event.user === me) settle(event.mid);
  if (room.ids.has(event.id)) return;
  room.ids.add(event.id);
  room.last = Math.max(room.last, event.id);
  stopTyping(room, event.user);
  if (event.user !== me && event.id > room.read) room.unread++;
  showItem(room, event);
};

const hearHistory = (room, event) => {
  const oldest = room.items.find((item) => item.id)?.id;
  if (room.loading && event.messages.every(({id}) => id < oldest)) {  // an older page
    room.loading = false;
    room.more = event.more;
    event.messages.forEach(({id}) => room.ids.add(id));
    room.items.unshift(...event.messages);
    if (room === current) showMessages();
    return;
  }
  if (!event.complete) {
    Object.assign(room, {items: [], ids: new Set(), last: null});
    if (room === current) $("messages").replaceChildren();
    if (event.more) note("More was written than is shown here: scroll up for it.", room);
  }
  // A private message may have come before the history that it belongs to.
  const late = event.messages.some(({id}) => id < room.last && !room.ids.has(id));
  if (room.last === null || late) room.more = event.more;
  for (const message of event.messages) hearMessage(room, message);
  if (!late) return;
  room.items.sort((a, b) => a.at - b.at || a.id - b.id);
  if (room === current) showMessages();
};

const hear = (event) => {
  const isOpen = !event.room || event.room.startsWith("@") || rooms.has(event.room);
  if (!isOpen) {  // it was left meanwhile
    if (event.type === "message" && event.user === me) settle(event.mid);
    return;
  }
  const room = event.room ? roomOf(event.room) : current;
  if (event.room && room.name !== event.room) {  // as the server spells it
    room.name = event.room;
    if (room === current) showRoom();
  }
  switch (event.type) {
    case "welcome": return welcome(event);
    case "history": hearHistory(room, event); break;
    case "presence": room.here = new Set(Object.keys(event.users)); lookAround(); break;
    case "role": lookAround(); break;
    case "joined": case "left": hearPerson(room, event); break;
    case "message": hearMessage(room, event); break;
    case "deleted": hearDeleted(room, event.id); break;
    case "typing": hearTyping(room, event.user); break;
    case "error": hearError(event); break;
  }
  showSide();
};

const hearDeleted = (room, id) => {
  if (room.unread && id > room.read) room.unread -= 1;
  room.items = room.items.filter((item) => item.id !== id);
  if (room === current) showMessages();
};

const hearTyping = (room, user) => {
  stopTyping(room, user);
  if (user !== me) room.typing.set(user, setTimeout(() => stopTyping(room, user), 5000));
  if (room === current) showTyping();
};

const stopTyping = (room, user) => {
  clearTimeout(room.typing.get(user));
  if (room.typing.delete(user) && room === current) showTyping();
};

// Somebody has come or gone. In a private conversation that is no news: the list shows it.
const hearPerson = (room, {type, user}) => {
  if (type === "joined") room.here.add(user); else room.here.delete(user);
  if (type === "left") stopTyping(room, user);
  if (user !== me && !room.name.startsWith("@")) note(`${user} ${type} the chat!`, room);
  lookAround();
};

const hearError = (event) => {
  if (!outbox.has(event.mid)) return note(`Error: ${event.message}`);
  if (!event.retry_after) return settle(event.mid, event.message);
  clearTimeout(answerTimer);
  setTimeout(() => { sending = null; sendNext(); }, event.retry_after * 1000);
};

const welcome = (event) => {
  me = event.user;
  roles.set(me, event.role);
  $("myName").textContent = me;
  if (epoch !== event.epoch) rooms.clear();  // another database: its ids mean nothing here
  epoch = event.epoch;
  current = roomOf(current?.name ?? "lobby");
  loadOutbox();
  const names = ["lobby", ...kept(localStorage, `rooms.${me}`, []), ...event.rooms];
  for (const room of new Set([...names.map(roomOf), ...rooms.values()])) {
    if (room.key !== asked) join(room);
  }
  if ($("app").hidden) {
    show("app");
    openRoom(current.name);
    $("messageText").focus();
  } else {  // connected again: what the reader looks at and writes stays as it is
    showMessages();
    showPending();
    showSide();
  }
  sendNext();
};

// Who is online, and what they may do; asked for once after many have come or gone.
const lookAround = soon(300, async () => {
  if (!token) return;
  try {
    const before = roles.get(me);
    roles = new Map((await api("GET", "users")).map(({username, role}) => [username, role]));
    if (roles.get(me) !== before) showMessages();
    const known = (await api("GET", "rooms")).filter(({room}) => !room.startsWith("@"));
    $("known").replaceChildren(...known.map(({room}) => make("option", {value: room})));
    showSide();
  } catch { /* the next time, then */ }
});

// -- The connection --------------------------------------------------------------------------

let socket = null;
let epoch = null;
let retries = 0;     // failed connections in a row
let retryTimer = 0;
let asked = "";      // the key of the room that the socket's URL names

const transmit = (event) => {
  if (socket?.readyState === WebSocket.OPEN) sendFrame(socket, JSON.stringify(event));
};

const join = (room) => {
  room.loading = false;
  transmit({type: "join", room: room.name, ...(room.last && {after: room.last, epoch})});
};

const status = (state, more = "") => {
  $("status").dataset.state = state;
  if ($("state").textContent !== state) $("state").textContent = state;  // is read aloud
  $("more").textContent = more;  // is not, since it changes every second
  // This is seen while the chat is not.
  $("problem").textContent = state === "connected" ? "" : state + more;
};

// Lets go of the socket: what it still says is not heard.
const hangUp = () => {
  clearTimeout(retryTimer);
  clearTimeout(answerTimer);
  const old = socket;
  socket = sending = null;
  old?.close();
};

const connect = () => {
  hangUp();
  const url = socketUrl("ws/chat");
  const room = current ?? {name: "lobby"};
  room.loading = false;
  asked = keyOf(room.name);
  url.search = new URLSearchParams({room: room.name, ...(room.last && {after: room.last, epoch})});
  status("connecting");
  try {
    socket = openSocket(url, ["lobby.v1", `bearer.${token}`]);
  } catch {
    return refuse("This is no token.");
  }
  const opened = socket;
  socket.onopen = () => status("connected");
  socket.onmessage = ({data}) => {
    if (socket !== opened) return;
    retries = 0;
    for (const line of data.split("\n")) hear(JSON.parse(line));
  };
  socket.onclose = ({code, reason}) => {
    if (socket !== opened) return;
    if (code === 1000 || code === 1008) refuse(reason); else disconnected(reason);
  };
};

const disconnected = (reason) => {
  hangUp();
  let seconds = Math.ceil(Math.min(30, 2 ** retries++) * (0.5 + Math.random()));
  const tick = () => {
    if (seconds <= 0) return connect();
    status("reconnecting", ` in ${seconds} s${reason ? ` (${reason})` : ""}`);
    seconds -= 1;
    retryTimer = setTimeout(tick, 1000);
  };
  tick();
};

// Back to the log-in. Nothing of this person stays for the next one to see.
const refuse = (reason) => {
  hangUp();
  entries = [];
  $("messageText").value = "";
  for (const id of ["messages", "pending", "frames"]) $(id).replaceChildren();
  $("person").close("");
  token = "";
  keep(sessionStorage, "token", null);
  $("problem").textContent = reason;
  for (const kind of [rooms, roles, outbox]) kind.clear();
  current = epoch = null;
  me = "";
  document.title = "Lobby";
  show("access");
  $("username").focus();
};

const show = (view) => {
  $("access").hidden = view !== "access";
  $("app").hidden = view !== "app";
};

addEventListener("online", () => { if (token && !socket) connect(); });
addEventListener("offline", () => { if (socket) disconnected("offline"); });

// -- What people do --------------------------------------------------------------------------

const enter = (given) => {
  token = given;
  keep(sessionStorage, "token", token);
  $("problem").textContent = $("password").value = "";
  connect();
};

let entering = false;  // one log-in at a time, however often the button is pressed
$("credentials").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (entering) return;
  entering = true;
  const credentials = {username: $("username").value, password: $("password").value};
  for (const field of ["username", "password"]) {
    $(`${field}Problem`).textContent = "";
    $(field).ariaInvalid = "false";
  }
  try {
    if (event.submitter?.value === "register") await api("POST", "register", credentials);
    enter((await api("POST", "login", credentials)).access_token);
  } catch (error) {
    const field = error.field ?? {401: "password", 409: "username"}[error.status];
    $(field ? `${field}Problem` : "problem").textContent = error.message;
    if (field) { $(field).ariaInvalid = "true"; $(field).focus(); }
  }
  entering = false;
});

$("pasted").addEventListener("submit", (event) => {
  event.preventDefault();
  enter($("token").value.trim());
});
$("logOut").addEventListener("click", async () => {
  await act("POST", "logout");
  if (token) refuse("Logged out");  // also when the server cannot be asked
});

// Does something over HTTP, and says in the room what came of it.
const act = async (method, path, json = undefined, done = "") => {
  try {
    await api(method, path, json);
    if (done) note(done);
  } catch (error) { note(`Error: ${error.message}`); }
  lookAround();
};

const HELP = `/msg bob hi  says hi to bob alone
/join tea    opens a room
/who         who is here`;

// Does what a line says that begins with "/". False: it is not understood.
const command = (text) => {
  const [, name, rest] = text.match(/^(\S+)\s*([^]*)$/);
  const [, user, words] = rest.match(/^(\S*)\s*([^]*)$/);
  if (name === "/msg" && words) { openRoom(privateWith(user)); post(current, words); }
  else if (name === "/join" && user) openRoom(user);
  else if (name === "/who") note(`Here: ${[...current.here].sort().join(", ")}`);
  else if (name === "/help") note(HELP);
  else return false;
  return true;
};

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("messageText").value.trim();
  if (!text || !current) return;
  const room = current;
  if (!text.startsWith("/")) post(current, text);
  else if (!command(text)) return note("Error: unknown command; /help lists them");
  if (current === room) $("messageText").value = "";
  keep(localStorage, `draft.${me}.${room.key}`, null);
});

$("messageText").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

let typedAt = 0;
$("messageText").addEventListener("input", ({target}) => {
  keep(localStorage, `draft.${me}.${current.key}`, target.value || null);
  if (target.value && !target.value.startsWith("/") && Date.now() - typedAt > 3000) {
    typedAt = Date.now();
    transmit({type: "typing", room: current.name});
  }
});

$("chatLog").addEventListener("scroll", ({target}) => {
  const below = target.scrollHeight - target.scrollTop - target.clientHeight;
  if (below < 40) stick = true;
  else if (target.scrollTop < lastTop) stick = false;  // what comes below is no scrolling up
  lastTop = target.scrollTop;
  if (stick) $("newest").hidden = true;
  else if ($("newest").hidden) {
    $("newest").textContent = "Jump to the newest";
    $("newest").hidden = below < 400;
  }
  loadOlder();
});

const loadOlder = () => {
  const oldest = current?.items.find((item) => item.id);
  if ($("chatLog").scrollTop < 200 && current?.more && !current.loading && oldest) {
    current.loading = true;
    transmit({type: "history", room: current.name, before: oldest.id});
  }
};

new ResizeObserver(follow).observe($("chatLog"));
$("newest").addEventListener("click", () => {
  stick = true;
  toNewest();
  $("messageText").focus();
});
$("leave").addEventListener("click", leaveRoom);
$("joinRoom").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("roomToJoin").value.trim();
  $("roomToJoin").value = "";
  if (name) openRoom(name);
});
const openMenu = (open) => {
  const hadFocus = $("side").contains(document.activeElement);
  $("side").classList.toggle("open", open);
  $("menu").ariaExpanded = String(open);
  if (open) $("side").querySelector("button").focus();
  else if (hadFocus && $("menu").offsetParent) $("menu").focus();
};
$("menu").addEventListener("click", () => openMenu(!$("side").classList.contains("open")));
$("chatLog").addEventListener("click", () => openMenu(false));
document.addEventListener("keydown", ({key}) => {
  if (key !== "Escape") return;
  openMenu(false);
  if ($("wire").contains(document.activeElement)) closeWire();
});
addEventListener("focus", lookAround);  // a role may have changed meanwhile
document.addEventListener("visibilitychange", showSide);

const showPerson = (user) => {
  const role = roles.get(user);
  $("personName").textContent = user;
  $("personRole").textContent = role ? `${role}, online` : "not online";
  $("newRole").value = role ?? "member";
  $("moderation").hidden = user === me || !may("moderator", "admin");
  $("roleRow").hidden = !may("admin");
  $("person").returnValue = "";
  $("person").showModal();
};

$("person").addEventListener("close", () => {
  const user = $("personName").textContent;
  const path = `users/${encodeURIComponent(user)}`;
  const action = $("person").returnValue;
  const role = $("newRole").value;
  if (!current) return;
  if (action === "message") openRoom(privateWith(user));
  else if (action === "role") act("PUT", `${path}/role`, {role}, `${user}: ${role}`);
  else if (action) act("POST", `${path}/${action}`, undefined, `${user}: ${action}`);
});

// -- The wire's forms ------------------------------------------------------------------------

const toggleWire = () => {
  $("wire").hidden = !$("wire").hidden;
  $("wireButton").ariaExpanded = String(!$("wire").hidden);
  if (!$("wire").hidden) showWire();
};
$("wireButton").addEventListener("click", toggleWire);
const closeWire = () => { toggleWire(); $("wireButton").focus(); };
$("closeWire").addEventListener("click", closeWire);
$("filter").addEventListener("input", showWire);
$("clear").addEventListener("click", () => { entries = []; showWire(); });
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").ariaPressed = String(paused);
  if (!paused) showWire();
});

$("request").kind.addEventListener("change", ({target}) => {
  const form = $("request");
  form.file.hidden = target.value !== "file";
  form.body.hidden = !["JSON", "form"].includes(target.value);
  form.body.value = target.value === "JSON" ? '{"hello": "world"}' : "name=Ann\nname=Bob";
  if (target.value !== "no body" && form.method.value === "GET") form.method.value = "POST";
});

// Lines like "name: value" or "name=value", as pairs.
const pairs = (lines, separator) => lines.split("\n").filter((line) => line.includes(separator))
  .map((line) => [line.slice(0, line.indexOf(separator)).trim(),
    line.slice(line.indexOf(separator) + 1).trim()]);

const headersAndBody = (form) => {
  const text = form.body.value;
  switch (form.kind.value) {
    case "JSON": return [{"Content-Type": "application/json"}, text];
    case "form": return [{"Content-Type": "application/x-www-form-urlencoded"},
      new URLSearchParams(pairs(text, "=")).toString()];
    case "file": {
      const data = new FormData();
      data.append("file", form.file.files[0] ?? "");
      return [{}, data];
    }
    default: return [{}, undefined];
  }
};

$("request").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  form.querySelector(".pair").hidden = false;
  try {
    const [headers, body] = headersAndBody(form);
    Object.assign(headers, Object.fromEntries(pairs(form.headers.value, ":")));
    const path = `inspect/${form.path.value}${form.query.value && `?${form.query.value}`}`;
    const answer = await request(form.method.value, path, headers, body);
    $("sent").textContent = answer.sent;
    $("seen").textContent = hideSecrets(pretty(answer.text));
  } catch (error) {
    $("sent").textContent = "nothing";
    $("seen").textContent = error.message;
  }
});

let tried = null;  // the socket that the form talks to
$("openSocket").addEventListener("click", () => {
  if (tried) return tried.close();
  tried = openSocket(socketUrl($("socketForm").path.value.slice(1)));
  tried.addEventListener("open", () => {
    $("openSocket").textContent = "Close";
    $("answer").textContent = "open";
  });
  tried.addEventListener("message", ({data}) => { $("answer").textContent = pretty(data); });
  tried.addEventListener("close", ({code}) => {
    tried = null;
    $("openSocket").textContent = "Open";
    $("answer").textContent = `closed: ${code}`;
  });
});
$("socketForm").addEventListener("submit", (event) => {
  event.preventDefault();
  if (tried?.readyState === WebSocket.OPEN) sendFrame(tried, event.target.text.value);
  else $("answer").textContent = "Open the socket first";
});

if (token) connect();
</script>
</body>
</html>
"""


if __name__ == "__main__":
    main()
