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

The file is meant to be read from top to bottom; each chapter has one idea.

     1  Settings              what can be changed without touching the code
     2  Storage               the only SQL: one thread owns the database
     3  The application       what starts, what ends, what wraps every request
     4  Looking at a request  everything ``Request`` can tell, and four ways to read a body
     5  Talking over a socket from one echo to a reader and a writer side by side
     6  Sessions              context made over HTTP and carried into a socket
     7  Knowing a user        passwords, tokens, and who is asking
     8  Roles                 what somebody may do, and how others are stopped
     9  Rooms                 a room is a log, a client is a set of cursors into logs
    10  The chat              its events, its socket and its HTTP routes
    11  The page              HTML, CSS and JavaScript in one constant
    12  Serving               ``python app.py``

The words used throughout:

    person   somebody with a name, a password and a role; may have many sockets open at once
    room     a named conversation; its past is in the database, its newest part in memory;
             @alice+bob is the private one of these two
    event    a JSON object with a "type": what sockets send and receive
    message  an event that is stored, and so has an id; ids grow in the order of storing
    notice   an event that is only announced: somebody joined, left, or is typing
    mid      the sender's own id for a message, by which a repeated sending is recognised
    batch    events that entered a room's log together
    client   one open chat socket: who holds it, and how far it has read each of its rooms
    cursor   that position: the number of the next batch to read
    tether   by which an open socket is ended from elsewhere
    epoch    the name of one database's history, so that ids of another are not mistaken for ours
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import hmac
import itertools
import json
import logging
import math
import os
import re
import secrets
import socket
import sqlite3
import time
import unicodedata
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar, get_args

import jwt
import uvicorn
from fastapi import (
    Depends,
    FastAPI,
    HTTPException,
    Query,
    Request,
    Response,
    WebSocket,
    WebSocketDisconnect,
    WebSocketException,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.datastructures import UploadFile as UploadedFile
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketState
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

log = logging.getLogger("lobby")

KIB, MIB, GIB = 2**10, 2**20, 2**30  # bytes
MAX_ID = 2**63 - 1  # the largest integer that SQLite holds

# ======================================================================================
# 1. Settings
#
# A program that reads the environment wherever it needs a value fails late and in odd
# places. One model reads it all at the start, and refuses what it cannot use in one line
# that names the variable.
# ======================================================================================


class StartError(Exception):
    """Why Lobby cannot start, in one line that says what to change."""


def split_origins(value: str | frozenset[str]) -> frozenset[str]:
    """Comma separated origins, with or without a slash at the end."""
    parts = value.split(",") if isinstance(value, str) else value
    return frozenset(part.strip().rstrip("/") for part in parts if part.strip())


class Settings(BaseModel):
    """All settings; the field ``port`` is the environment's ``CHAT_PORT``."""

    model_config = ConfigDict(
        alias_generator=lambda name: f"CHAT_{name.upper()}", validate_by_name=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    db: Path = Path("chat.db")
    secret: bytes | None = Field(None, min_length=32)  # RFC 7518, section 3.2
    token_minutes: float = Field(60, gt=0, le=525_600)
    origins: Annotated[frozenset[str], BeforeValidator(split_origins)] = frozenset()
    demo_users: bool = True
    rate: float = Field(10, ge=0, allow_inf_nan=False)  # messages a second; 0: no limit
    sockets_per_user: int = Field(20, ge=0)  # 0: no limit

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the ``CHAT_...`` variables. Raises StartError for an unusable one."""
        try:
            settings = cls.model_validate(dict(os.environ))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            given = "" if name == "CHAT_SECRET" else f"={first['input']!r}"
            raise StartError(f"{name}{given}: {first['msg']}") from None
        loopback = settings.host in ("127.0.0.1", "::1", "localhost")
        if settings.demo_users and "demo_users" not in settings.model_fields_set and not loopback:
            raise StartError(
                f"CHAT_HOST={settings.host!r} can be reached from other machines, and the demo "
                "people's passwords are public: set CHAT_DEMO_USERS to 0, or to 1 if you mean it"
            )
        return settings


# ======================================================================================
# 2. Storage
#
# SQLite calls block, and a blocked event loop freezes everybody. So one thread owns the
# database, and every method here is awaited from the loop. A commit to disk (fsync) takes
# milliseconds however many rows it has, so messages are stored many at a time: whoever
# waits for the disk pays for one fsync, shared with all the others that wait.
# ======================================================================================

Event = dict[str, Any]

# Each script brings a database from one version to the next; a new one is given all of them.
MIGRATIONS = (
    """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS people (
    name     TEXT NOT NULL,
    folded   TEXT PRIMARY KEY,  -- the name without regard to case: unique
    password TEXT NOT NULL,
    role     TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS messages (
    id   INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, even after a deletion
    room TEXT NOT NULL,
    user TEXT NOT NULL,
    text TEXT NOT NULL,
    at   INTEGER NOT NULL,  -- milliseconds since 1970, UTC
    mid  TEXT,
    UNIQUE (user, mid)
);
CREATE INDEX IF NOT EXISTS messages_of_room ON messages (room, id);
CREATE TABLE IF NOT EXISTS revoked (jti TEXT PRIMARY KEY, exp REAL NOT NULL);
""",
    """
ALTER TABLE people ADD COLUMN banned INTEGER NOT NULL DEFAULT 0;
-- A deleted message keeps its row, without the text, or a resend would bring it back.
ALTER TABLE messages ADD COLUMN deleted INTEGER;  -- the newest id at that time
CREATE INDEX deleted_of_room ON messages (room, deleted) WHERE deleted IS NOT NULL;
CREATE TABLE conversations (person TEXT, room TEXT, PRIMARY KEY (person, room)) WITHOUT ROWID;
CREATE TRIGGER start_conversation AFTER INSERT ON messages WHEN new.room LIKE '@%' BEGIN
    INSERT OR IGNORE INTO conversations VALUES
        (substr(new.room, 2, instr(new.room, '+') - 2), new.room),
        (substr(new.room, instr(new.room, '+') + 1), new.room);
END;
""",
)

# One statement stores a whole batch. Python gives up its interpreter lock around each
# SQLite call and, while the event loop is busy, waits up to 5 ms to get it back: a
# hundred INSERTs would spend their time waiting, not writing.
INSERT_MESSAGES = """
INSERT INTO messages (id, room, user, text, at, mid)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
       json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]')
FROM json_each(?) WHERE true ON CONFLICT (user, mid) DO NOTHING
"""

# Jumps from one room's name to the next in the index; SELECT DISTINCT would read it all.
SELECT_ROOMS = """
WITH RECURSIVE names (room) AS (
    SELECT min(room) FROM messages
    UNION ALL
    SELECT (SELECT min(room) FROM messages WHERE room > names.room)
    FROM names WHERE room IS NOT NULL
)
SELECT room FROM names WHERE room NOT LIKE '@%'
UNION SELECT room FROM conversations WHERE person = ?
"""

# Whoever is no admin, or not the only one who may log in.
NOT_THE_LAST_ADMIN = """
(role != 'admin' OR EXISTS (
    SELECT 1 FROM people AS other
    WHERE other.role = 'admin' AND NOT other.banned AND other.folded != people.folded))
"""

P = ParamSpec("P")
T = TypeVar("T")


class Refused(Exception):
    """Why something was not done: a code of the chat's error event, and words for people."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.event: Event = {"type": "error", "code": code, "message": message, **more}


def in_database_thread(
    method: Callable[Concatenate[Storage, P], T],
) -> Callable[Concatenate[Storage, P], Coroutine[Any, Any, T]]:
    """Make a method of Storage awaitable: it runs in the one thread that owns the database."""

    async def call(self: Storage, /, *args: P.args, **kwargs: P.kwargs) -> T:
        work = functools.partial(method, self, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        except Exception:
            log.exception("the database failed in %s", method.__name__)
            message = "The database failed, try again"
            raise Refused("unavailable", message, retry_after=1) from None

    return call


@dataclass(slots=True)
class Draft:
    """A message that waits to be stored; ``done(event, is_new)`` is called with its outcome.

    The event is the message, or the error why there is none; ``is_new`` is False for an error
    and for a repeated ``mid``.
    """

    room: str
    user: str
    text: str
    mid: str | None
    done: Callable[[Event, bool], None]


class Person(NamedTuple):
    """A row of ``people``; ``folded`` is the name without regard to case."""

    name: str
    folded: str
    password: str
    role: str
    banned: bool


def message_event(id: int, room: str, user: str, text: str, at: int, mid: str | None) -> Event:
    """A row of ``messages`` as the event that sockets and HTTP clients get."""
    event: Event = {"type": "message", "id": id, "room": room, "user": user, "text": text}
    return event | {"at": at / 1000, "mid": mid}


def size_of(event: Event) -> int:
    """About how much memory an event takes, in characters of its text."""
    return len(event.get("text", ""))


BUSY_SECONDS = 5  # how long a transaction waits for another program that writes


class Storage:
    """Messages, people and revoked tokens, in one SQLite file.

    All that another database would have to offer is here. When the database fails, every
    async method raises Refused with the code ``unavailable``, and nothing has been stored.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises StartError if it cannot be used or is in use."""
        path = Path(os.path.realpath(path))
        self.resources = ExitStack()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="database")

        def connect(file: str, timeout: float) -> sqlite3.Connection:
            # isolation_level None: every statement is a transaction of its own
            db = sqlite3.connect(
                file, timeout=timeout, isolation_level=None, check_same_thread=False
            )
            return self.resources.enter_context(closing(db))

        try:
            # Rooms live in one process. A second one would announce its messages to
            # nobody here, so it is kept out by a lock that ends with its holder.
            connect(f"{path}.lock", 0).execute("BEGIN EXCLUSIVE")
            path.touch(mode=0o600)  # password hashes are nobody else's business
            self.db = connect(str(path), BUSY_SECONDS)
            # FULL: a commit has reached the disk when it returns, power cut or not.
            # secure_delete: what is deleted is overwritten, not only given free.
            self.db.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;"
            )
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise sqlite3.DatabaseError("a newer Lobby has made it")
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                self.db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
            self.db.execute(
                "INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),)
            )
            (self.epoch,) = self.db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
            (self.last_id,) = self.db.execute(
                "SELECT coalesce(max(seq), 0) FROM sqlite_sequence"
            ).fetchone()
            self.wiped = True  # the journal holds nothing that was deleted
        except (sqlite3.Error, OSError) as error:
            self.close()
            in_use = "database is locked" in str(error)
            problem = "another process is using it" if in_use else error
            raise StartError(f"CHAT_DB={str(path)!r}: {problem}") from None

    def close(self) -> None:
        """Finish what is under way and let go of the file."""
        self.thread.shutdown()
        self.resources.close()

    @in_database_thread
    def append(self, drafts: Sequence[Draft]) -> list[tuple[Event, bool]]:
        """Store all drafts, or none, in one durable transaction.

        Answers each with its message and whether it is new: a (user, mid) that is stored
        already is answered with the original message, or that it was deleted, and False.
        """
        at = time.time_ns() // 1_000_000
        rows = [
            (id, draft.room, draft.user, draft.text, at, draft.mid)
            for id, draft in enumerate(drafts, self.last_id + 1)
        ]
        stored = self.db.execute(INSERT_MESSAGES, (json.dumps(rows),)).rowcount
        self.last_id += len(rows)
        if not self.wiped:
            self._wipe()
        if stored == len(rows):
            return [(message_event(*row), True) for row in rows]
        return [self._stored(*row) for row in rows]

    def _stored(self, *row: Any) -> tuple[Event, bool]:
        """What became of a row: itself, or the older message with the same user and mid."""
        id, _, user, _, _, mid = row
        *found, deleted = self.db.execute(
            "SELECT id, room, user, text, at, mid, deleted FROM messages"
            " WHERE id = ? OR (user = ? AND mid = ?)",
            (id, user, mid),
        ).fetchone()
        if deleted is not None:
            return Refused("forbidden", "This message was deleted").event, False
        return message_event(*found), found[0] == id

    def _page(
        self, room: str, limit: int, before: int = MAX_ID, after: int | None = None
    ) -> tuple[list[Event], bool]:
        order = "DESC" if after is None else "ASC"
        rows = self.db.execute(
            "SELECT id, room, user, text, at, mid FROM messages"
            " WHERE room = ? AND id > ? AND id < ? AND deleted IS NULL"
            f" ORDER BY id {order} LIMIT ?",
            (room, after or 0, before, limit + 1),
        ).fetchall()
        page = [message_event(*row) for row in rows[:limit]]
        return page if order == "ASC" else page[::-1], len(rows) > limit

    @in_database_thread
    def page(
        self, room: str, limit: int, before: int = MAX_ID, after: int | None = None
    ) -> tuple[list[Event], bool]:
        """Messages with ``after`` < id < ``before``, oldest first, and whether there are more.

        At most ``limit``: the ones next to ``after`` if it is given, else next to ``before``.
        """
        return self._page(room, limit, before, after)

    @in_database_thread
    def since(self, room: str, after: int, limit: int, size: int) -> list[list[Event]] | None:
        """The messages after this id, and what was deleted since then.

        None if there are more than ``limit`` of either, or more characters than ``size``.
        """
        messages, more = self._page(room, limit, after=after)
        deleted = self.db.execute(
            "SELECT id FROM messages WHERE room = ? AND deleted >= ? AND id <= ? LIMIT ?",
            (room, after, after, limit + 1),
        ).fetchall()
        if more or len(deleted) > limit or sum(map(size_of, messages)) > size:
            return None
        return [messages, [{"type": "deleted", "room": room, "id": id} for (id,) in deleted]]

    @in_database_thread
    def find_author(self, room: str, id: int) -> str | None:
        """Who wrote this message, if there is one."""
        query = "SELECT user FROM messages WHERE room = ? AND id = ? AND deleted IS NULL"
        row = self.db.execute(query, (room, id)).fetchone()
        return row and str(row[0])

    @in_database_thread
    def delete(self, id: int) -> bool:
        """Wipe a message's text out of the file and of its journal; False if there is none."""
        done = self.db.execute(
            "UPDATE messages SET text = '', deleted = ? WHERE id = ? AND deleted IS NULL",
            (self.last_id, id),
        )
        self._wipe()
        return done.rowcount > 0

    def _wipe(self) -> None:
        """Empty the journal; while another program reads the database, that is put off."""
        self.db.execute("PRAGMA busy_timeout = 0")
        (in_use, *_) = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self.db.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        self.wiped = not in_use

    @in_database_thread
    def rooms(self, person: str) -> list[str]:
        """The names of the rooms that have messages, private conversations of others excepted."""
        return [room for (room,) in self.db.execute(SELECT_ROOMS, (person,))]

    @in_database_thread
    def conversations(self, person: str) -> list[str]:
        """The names of somebody's private conversations."""
        query = "SELECT room FROM conversations WHERE person = ? ORDER BY room"
        return [room for (room,) in self.db.execute(query, (person,))]

    @in_database_thread
    def find_person(self, folded: str) -> Person | None:
        """The person whose name folds to this, if any."""
        query = "SELECT name, folded, password, role, banned FROM people WHERE folded = ?"
        row = self.db.execute(query, (folded,)).fetchone()
        return row and Person(*row)

    @in_database_thread
    def roles(self, folded: Sequence[str]) -> dict[str, str]:
        """The roles of these people by their names."""
        query = "SELECT name, role FROM people WHERE folded IN (SELECT value FROM json_each(?))"
        return dict(self.db.execute(query, (json.dumps(folded),)).fetchall())

    @in_database_thread
    def set_role(self, folded: str, role: str) -> bool:
        """Give somebody a role; False, and nothing is changed, for the last admin."""
        allowed = "true" if role == "admin" else NOT_THE_LAST_ADMIN
        query = f"UPDATE people SET role = ? WHERE folded = ? AND {allowed}"
        return self.db.execute(query, (role, folded)).rowcount > 0

    @in_database_thread
    def set_banned(self, folded: str, banned: bool) -> bool:
        """Ban somebody or let them in again; False, and nothing is changed, for the last admin."""
        allowed = NOT_THE_LAST_ADMIN if banned else "true"
        query = f"UPDATE people SET banned = ? WHERE folded = ? AND {allowed}"
        return self.db.execute(query, (banned, folded)).rowcount > 0

    @in_database_thread
    def add_person(self, folded: str, name: str, password: str, role: str | None = None) -> str:
        """Store a new person and answer their role; "" and nothing stored if the name is taken.

        Without a role, the first person becomes the admin, since somebody has to be.
        """
        if role is None:
            role = "member" if self.db.execute("SELECT 1 FROM people").fetchone() else "admin"
        query = "INSERT INTO people (folded, name, password, role) VALUES (?, ?, ?, ?)"
        try:
            self.db.execute(query, (folded, name, password, role))
        except sqlite3.IntegrityError:
            return ""
        return role

    @in_database_thread
    def count_people(self) -> int:
        """How many people there are."""
        return int(self.db.execute("SELECT count(*) FROM people").fetchone()[0])

    @in_database_thread
    def revoke(self, jti: str, exp: float) -> None:
        """Remember until ``exp`` (seconds since 1970) that this token is refused."""
        self.db.execute("DELETE FROM revoked WHERE exp < ?", (time.time(),))
        self.db.execute("INSERT OR IGNORE INTO revoked VALUES (?, ?)", (jti, exp))

    @in_database_thread
    def is_revoked(self, jti: str) -> bool:
        """Whether this token was logged out."""
        query = "SELECT 1 FROM revoked WHERE jti = ?"
        return self.db.execute(query, (jti,)).fetchone() is not None


# ======================================================================================
# 3. The application
#
# Importing this file opens nothing: files and tasks start in the lifespan, and end there
# too. What is shared hangs on `app.state`, and routes ask for it by a dependency, so that
# each test, and each start, gets its own. (What it opens, the chapters below explain.)
#
# One middleware wraps everything. Where every route may fail, the answer to failures
# belongs there too: a route that raises Refused, or has a bug, is answered in one place.
# ======================================================================================


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open what the chapters below need, serve, and close it in the reverse order."""
    settings = Settings.from_environment()
    storage = Storage(settings.db)
    try:
        app.state.settings = settings
        app.state.storage = storage
        app.state.sessions = Sessions()
        app.state.tokens = Tokens(settings)
        app.state.tethers = set()
        app.state.manager = ConnectionManager(storage, settings)
        if settings.demo_users and not await storage.count_people():
            await add_demo_people(storage)
        committer = asyncio.create_task(app.state.manager.commit_forever())
        try:
            yield
        finally:
            app.state.manager.stop()
            await committer
    finally:
        storage.close()


class RequestContextMiddleware:
    """Wraps every request and every socket: ids and times them, and survives their bugs.

    A pure ASGI middleware sees sockets too, and costs next to nothing; BaseHTTPMiddleware
    passes sockets by, and more than halves the requests a second.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        given = Headers(scope=scope)
        request_id = given.get("x-request-id", "")
        if not re.fullmatch(r"[\w.~+/=:-]{1,128}", request_id, re.ASCII):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        # FastAPI answers a Content-Length over the limit in plain text. Without that header
        # it counts the bytes as they come, and raises what `too_large` below answers.
        length = given.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > 1 * MIB:
            scope["headers"] = [item for item in given.raw if item[0] != b"content-length"]

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                headers["X-Custom-Header"] = "Custom Value"
                headers["X-Request-ID"] = request_id
                headers["X-Process-Time"] = f"{time.perf_counter() - started:.6f}"
                message["headers"] = headers.raw
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except (ClientDisconnect, ClientDisconnected, WebSocketDisconnect):
            pass  # they left, and nothing is left to do
        except Exception:
            log.exception("unexpected error in %s %r", scope["type"], scope["path"])
            with suppress(Exception):  # it may have been answered or closed already
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1011})
                else:
                    answer = JSONResponse({"detail": "Internal Server Error"}, 500)
                    await answer(scope, receive, send_with_headers)


app = FastAPI(title="Lobby", lifespan=lifespan)
app.router.max_body_size = 1 * MIB  # as FastAPI's argument it would lie outside the middleware
app.add_middleware(RequestContextMiddleware)


@app.exception_handler(RequestValidationError)
async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong where, without sending the input, a password perhaps, back."""
    wrong = [{key: one[key] for key in ("type", "loc", "msg")} for one in error.errors()]
    return JSONResponse({"detail": wrong}, 422)


@app.exception_handler(413)
async def too_large(request: Request, error: HTTPException) -> JSONResponse:
    """FastAPI counts a body while it arrives, so a chunked one is cut off as well."""
    limit = request.scope.get("starlette.max_body_size", 1 * MIB)
    return JSONResponse({"detail": f"The body is larger than {limit:,} bytes"}, 413)


STATUS = {"rate_limited": 429, "forbidden": 403, "unknown_room": 404, "unavailable": 503}


@app.exception_handler(Refused)
async def refused(connection: Request | WebSocket, error: Refused) -> Response | None:
    """Over HTTP a refusal is a status and its words; a socket is closed.

    1008 is final (RFC 6455, section 7.4.1), 1013 is "try again later" (IANA's registry).
    """
    if isinstance(connection, WebSocket):
        code = 1008 if error.event["code"] == "forbidden" else 1013
        await close_socket(connection, WebSocketException(code, str(error)))
        return None
    retry = error.event.get("retry_after")
    headers = {"Retry-After": str(math.ceil(retry))} if retry else None
    status = STATUS.get(error.event["code"], 422)
    return JSONResponse({"detail": error.event["message"]}, status, headers)


def from_state(name: str) -> Any:
    """A dependency that gives ``app.state.<name>``, over HTTP and over sockets alike."""

    async def get(connection: HTTPConnection) -> Any:
        return getattr(connection.app.state, name)

    return Depends(get)


# ======================================================================================
# 4. Looking at a request
#
# A request's head is there at once; its body arrives later, in pieces, once, and from
# somebody who may not mean well. `Request` is the view of both. The first routes show one
# thing each, `/inspect` shows all of it, and `/body/...` the four ways to read a body, each
# with a limit, and what happens when it is read twice.
# ======================================================================================


@app.get("/items/")
async def read_items(request: Request, q: str | None = None) -> dict[str, Any]:
    return {"client_host": client_host(request), "q": q}


@app.get("/items/{item_id}")
async def read_item(item_id: int, request: Request) -> dict[str, Any]:
    return {"item_id": item_id, "client_host": client_host(request)}


def client_host(connection: HTTPConnection) -> str | None:
    """The client's address; some servers and tests know none."""
    return connection.client.host if connection.client else None


async def user_agent(request: Request) -> str | None:
    """A dependency may take the Request itself."""
    return request.headers.get("user-agent")


@app.get("/user-agent")
async def read_user_agent(agent: Annotated[str | None, Depends(user_agent)]) -> dict[str, Any]:
    return {"user_agent": agent}


def parse_json(data: str | bytes) -> Any:
    """Parse JSON that can be sent back as JSON. Raises ValueError for anything else.

    ``json.loads`` takes what breaks later: NaN, half of a surrogate pair, and a nesting so
    deep that it raises RecursionError.
    """
    value = from_json(data)
    json.dumps(value, allow_nan=False)
    return value


async def read_json(request: Request) -> Any:
    """The JSON body, whatever its Content-Type says. Raises 400 for no JSON."""
    try:
        return parse_json(await request.body())
    except ValueError as error:
        raise HTTPException(400, f"The body is no JSON: {error}") from None


def json_or_none(data: str | bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError:
        return None


def group_by_key(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Gather pairs by key without losing a repeated one: {key: [values]}."""
    gathered: dict[str, list[T]] = {}
    for key, value in pairs:
        gathered.setdefault(key, []).append(value)
    return gathered


@app.post("/submit")
async def submit(request: Request) -> dict[str, Any]:
    query = group_by_key(request.query_params.multi_items())
    return {
        "method": request.method,
        "url": str(request.url),
        "user_agent": request.headers.get("user-agent"),
        "query_params": {key: v[0] if len(v) == 1 else v for key, v in query.items()},
        "cookies": request.cookies,
        "data": json_or_none(await request.body()),
    }


@app.post("/http-endpoint")
async def http_endpoint(data: Annotated[Any, Depends(read_json)]) -> JSONResponse:
    return JSONResponse({"received_data": data})  # a dict would be walked through once more


def inspect_connection(connection: HTTPConnection) -> dict[str, Any]:
    """What a request and a socket's handshake have in common, without loss."""
    url, client = connection.url, connection.client
    return {
        "url": {"full": str(url), "host": url.hostname}
        | {part: getattr(url, part) for part in ("scheme", "port", "path", "query")},
        "base_url": str(connection.base_url),
        "http_version": connection.scope.get("http_version"),
        "client": {"host": client.host, "port": client.port} if client else None,
        "path_params": connection.path_params,
        "query_params": group_by_key(connection.query_params.multi_items()),
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
    """The fields of a form, every value a list, and what its files are."""
    try:
        await request.form()
    except (UnicodeError, IndexError):  # some charsets fail in their own ways
        raise HTTPException(400, "The form cannot be decoded: send UTF-8") from None
    async with request.form() as form:
        items = form.multi_items()
        fields = group_by_key((key, value) for key, value in items if isinstance(value, str))
        files = [
            {
                "field": key,
                "filename": value.filename,
                "content_type": value.content_type,
                "size": value.size,
                "sha256": hashlib.sha256(await value.read()).hexdigest(),
            }
            for key, value in items
            if isinstance(value, UploadedFile)
        ]
    try:
        json.dumps([fields, files], ensure_ascii=False).encode()
    except UnicodeEncodeError:  # some charsets decode to half of a surrogate pair
        raise HTTPException(400, "The form has text that is no Unicode: send UTF-8") from None
    return fields, files


# No methods: any method, the ones that nobody has thought of yet too.
@app.api_route("/inspect", methods=[], include_in_schema=False, operation_id="inspect")
@app.api_route("/inspect/{path:path}", methods=[], include_in_schema=False, operation_id="inspect_")
async def inspect(request: Request) -> dict[str, Any]:
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


@app.post("/body/json")
async def body_json(data: Annotated[Any, Depends(read_json)]) -> JSONResponse:
    return JSONResponse(data)


FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")


@app.post("/body/form")
async def body_form(request: Request) -> dict[str, Any]:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in FORM_TYPES:
        raise HTTPException(415, f"Send a form: {' or '.join(FORM_TYPES)}")
    fields, files = await read_form(request)
    return {"fields": fields, "files": files}


@app.post("/body/raw", max_body_size=16 * MIB)
async def body_raw(request: Request) -> dict[str, Any]:
    body = await request.body()
    digest = await run_in_threadpool(hashlib.sha256, body)  # some milliseconds: not in the loop
    return {"size": len(body), "sha256": digest.hexdigest()}


@app.post("/body/stream", max_body_size=1 * GIB)
async def body_stream(request: Request) -> dict[str, Any]:
    """The way to read what is too large for memory: chunk by chunk, as it arrives."""
    size, chunks, digest = 0, 0, hashlib.sha256()
    async for chunk in request.stream():
        if chunk:  # the last one is empty
            size, chunks = size + len(chunk), chunks + 1
            digest.update(chunk)
    return {"size": size, "sha256": digest.hexdigest(), "chunks": chunks}


async def drain(request: Request) -> None:
    async for _ in request.stream():
        pass


READS: dict[str, Callable[[Request], Awaitable[Any]]] = {
    "body": lambda request: request.body(),
    "json": lambda request: request.json(),
    "form": lambda request: request.form(),
    "stream": drain,
}


@app.post("/body/twice", max_body_size=64 * KIB)  # it is parsed a dozen times
async def body_twice(request: Request) -> dict[str, Any]:
    """Read the same body twice, in every order of two ways, each time from a fresh Request.

    ``body()`` keeps what it read, so anything may follow it. ``stream()`` keeps nothing,
    and a form is read by streaming.
    """
    body = await request.body()

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    reads = []
    for first, second in itertools.product(READS, repeat=2):
        fresh, error = Request(request.scope, replay), None
        try:
            await READS[first](fresh)
            await READS[second](fresh)
        except Exception as problem:  # any: which one it is, is the answer
            error = f"{type(problem).__name__}: {getattr(problem, 'detail', problem)}"
        await fresh.close()
        reads.append({"first": first, "second": second, "works": not error, "error": error})
    return {"reads": reads}


# ======================================================================================
# 5. Talking over a socket
#
# A WebSocket begins as an HTTP request, and after `accept()` both sides may speak at any
# time, in frames of text or bytes. A handler is a conversation: it ends when the function
# returns, or when a receive raises WebSocketDisconnect because the client has left.
# ======================================================================================


async def receive(websocket: WebSocket) -> str | bytes:
    """The next frame: str for text, bytes for binary. Raises WebSocketDisconnect at the end."""
    await asyncio.sleep(0)  # thousands of frames may have come at once: let others go between
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code") or 1005, message.get("reason"))
    text: str | None = message.get("text")
    return message["bytes"] if text is None else text


async def receive_text(websocket: WebSocket) -> str:
    """The next text frame; a binary one closes the socket with 1003 (RFC 6455, section 7.4.1).

    ``websocket.receive_text()`` would raise ``KeyError('text')`` instead.
    """
    frame = await receive(websocket)
    if isinstance(frame, bytes):
        raise WebSocketException(1003, "Text frames only")
    return frame


@app.exception_handler(WebSocketDisconnect)
async def client_left(websocket: WebSocket, error: WebSocketDisconnect) -> None:
    """The client has closed its side: so ends every handler below, and nothing is wrong."""


@app.exception_handler(WebSocketException)
async def close_socket(websocket: WebSocket, error: WebSocketException) -> None:
    """Close a socket with a code and a reason that its client can see.

    A socket that is closed before it is accepted reaches a browser as a bare 1006, whatever
    was said; so it is accepted first. The time limit is for a client that does not read.
    """
    log.info("closed %r: %d %s", websocket.url.path, error.code, error.reason)
    if websocket.application_state is WebSocketState.CONNECTING:
        await websocket.accept(choose_subprotocol(websocket))
    if websocket.application_state is WebSocketState.CONNECTED:
        with suppress(TimeoutError):
            await asyncio.wait_for(websocket.close(error.code, error.reason), timeout=1)


CHAT_PROTOCOL = "lobby.v1"  # the one subprotocol there is, of the chat in chapter 10


def choose_subprotocol(websocket: WebSocket) -> str | None:
    """A browser that offers subprotocols drops a connection that picks none of them."""
    return CHAT_PROTOCOL if CHAT_PROTOCOL in websocket.scope["subprotocols"] else None


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


# The loops above answer and wait in turns. A chat must do both at once: one task reads
# what the client sends, one writes what others have said, and when either fails, because
# the client has left or for any other reason, so does the other.


async def side_by_side(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run these until one of them raises, cancel the others, and raise what it raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    errors = [error for task in ended if (error := task.exception())]
    raise errors[0]


# ======================================================================================
# 6. Sessions
#
# A socket's handshake carries little, so context is often made over HTTP first and then
# named by an id. Whoever knows the id is in, hence it is unguessable. Each socket has a
# queue and a writer of its own: a sender fills queues and never waits for a slow reader,
# who is closed when its queue is full.
# ======================================================================================

SESSION_SECONDS = 3600  # after the last use
MAX_SESSIONS = 10_000  # the one that was unused for longest makes room for a new one
SESSION_QUEUE = 32  # frames, of at most 64 KiB, that may wait for one socket


@dataclass(slots=True, eq=False)
class Session:
    """Who asked for it and when, and the queues of the sockets now in it."""

    id: str
    client_host: str | None
    user_agent: str | None
    created_at: float  # seconds since 1970, UTC
    used_at: float  # on the monotonic clock
    queues: set[asyncio.Queue[str | None]] = field(default_factory=set)

    def expires_in(self) -> int:
        """Seconds until it ends; an open socket keeps it alive."""
        idle = 0 if self.queues else time.monotonic() - self.used_at
        return max(0, round(SESSION_SECONDS - idle))

    def send(self, text: str) -> None:
        """Queue a text for every socket; in a full queue, the end of it instead: None."""
        self.used_at = time.monotonic()
        for queue in list(self.queues):
            queue.put_nowait(text if queue.qsize() < SESSION_QUEUE else None)
            if queue.qsize() > SESSION_QUEUE:
                self.queues.discard(queue)


class Sessions(dict[str, Session]):
    """All sessions, by id."""

    def create(self, connection: HTTPConnection) -> Session:
        """A new session. Answers 503 if there are too many, all with sockets in them."""
        if len(self) >= MAX_SESSIONS:
            idle = [session for session in self.values() if not session.queues]
            if not idle:
                raise HTTPException(503, "Too many sessions are in use, try again later")
            del self[min(idle, key=lambda session: session.used_at).id]
        agent = connection.headers.get("user-agent", "")[:512] or None
        id = secrets.token_urlsafe(16)
        self[id] = Session(id, client_host(connection), agent, time.time(), time.monotonic())
        return self[id]

    def find(self, id: str) -> Session | None:
        """The session with this id, unless it has expired."""
        if id in self and not self[id].expires_in():
            del self[id]
        return self.get(id)


AllSessions = Annotated[Sessions, from_state("sessions")]


@app.post("/create-session")
async def create_session(request: Request, sessions: AllSessions) -> dict[str, Any]:
    session = sessions.create(request)
    return {"session_id": session.id, "expires_in": session.expires_in()}


@app.get("/session/{session_id}")
async def show_session(session_id: str, sessions: AllSessions) -> dict[str, Any]:
    session = sessions.find(session_id)
    if session is None:
        raise HTTPException(404, "Unknown session: it was never made, or it has expired")
    shown = {name: getattr(session, name) for name in ("client_host", "user_agent", "created_at")}
    times = {"expires_in": session.expires_in(), "sockets": len(session.queues)}
    return {"session_id": session.id} | shown | times


# Its route, /ws/{session_id}, is added after the last of the others: routes are tried in
# the order of their adding, and this one would take /ws/chat for the session "chat".
async def session_socket(websocket: WebSocket, session_id: str, sessions: AllSessions) -> None:
    session = sessions.find(session_id)
    if session is None:
        raise WebSocketException(1008, "Unknown session")
    await websocket.accept()
    queue: asyncio.Queue[str | None] = asyncio.Queue()

    async def read() -> None:
        while True:
            session.send(f"Session {session.id}: {await receive_text(websocket)}")

    async def write() -> None:
        while (text := await queue.get()) is not None:
            await websocket.send_text(text)
        raise WebSocketException(1013, "Too slow")

    session.queues.add(queue)
    try:
        await side_by_side(read(), write())
    finally:
        session.queues.discard(queue)
        session.used_at = time.monotonic()


# ======================================================================================
# 7. Knowing a user
#
# A password is checked once, slowly on purpose, and exchanged for a token: a signed note
# that says who its bearer is and until when. The signature proves that the note is ours;
# that its bearer still exists and has not logged out is looked up each time. What a person
# may do is never in the token: it would be true for too long.
# ======================================================================================

# Letters that cannot be seen, by which one name could pass for another.
INVISIBLE = "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
MAX_NAME = 32  # characters
LONGEST_FORM = 4  # into how many characters one can be taken apart: the most that is normalised


def normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    """A text in its one spelling. Raises ValueError for what is no text, or takes too long.

    Marks are put in order, and that takes time that grows with the square of their number:
    more than 30 on one letter are refused (UAX #15, section 13).
    """
    marks = 0
    for character in text if not text.isascii() else ():
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > 30 or "\ud800" <= character <= "\udfff":
            raise PydanticCustomError("invalid", "The text has what no script is written with")
    return unicodedata.normalize(form, text)


def clean_name(name: str) -> str:
    """A person's or room's name in its one spelling (NFKC). Raises ValueError for a bad one.

    Letters, digits, ``_`` and ``-`` of any script; marks too, which many scripts spell with.
    """
    if len(name) <= LONGEST_FORM * MAX_NAME:
        name = normalize("NFKC", name)
    start = name[: MAX_NAME + 1]  # enough to see that it is too long
    kinds = "".join("_" if c in "_-" else unicodedata.category(c)[0] for c in start)
    if not re.fullmatch(r"[LN_][LMN_]{0,31}", kinds) or re.search(INVISIBLE, name):
        raise PydanticCustomError("bad_name", "1 to 32 letters, digits, '_' or '-' are a name")
    return name


def clean_username(name: str) -> str:
    """A person's name; the plain text chat speaks in these names itself."""
    if folded(name) in ("error", "here"):
        raise PydanticCustomError("bad_name", "This name is reserved")
    return clean_name(name)


def folded(name: str) -> str:
    """A name without regard to case, to find a person by. Raises ValueError for a bad one."""
    return normalize("NFKC", clean_name(name).casefold())


def clean_password(password: str) -> str:
    """A password in its one spelling: keyboards differ (NIST SP 800-63B, section 5.1.1.2)."""
    return normalize("NFKC", password)


MAX_PASSWORD = 128  # characters
NO_PASSWORD = f"{'00' * 16}${'00' * 64}"  # what a name that nobody has is checked against
MAX_HASHING = 20  # passwords that may wait for one of two threads: 2 s
password_threads = ThreadPoolExecutor(2, thread_name_prefix="password")
hashing: set[asyncio.Future[bytes]] = set()


async def scrypt(password: str, salt: bytes) -> bytes:
    """Hash as OWASP's Password Storage Cheat Sheet says: 16 MiB and 0.2 s for each guess.

    Never in the loop, and in two threads at most. Raises Refused if too many wait for them.
    """
    if len(hashing) >= MAX_HASHING:
        raise Refused("unavailable", "Too many log-ins at once, try again", retry_after=2)
    work = functools.partial(hashlib.scrypt, salt=salt, n=2**14, r=8, p=5, maxmem=64 * MIB)
    future = asyncio.get_running_loop().run_in_executor(password_threads, work, password.encode())
    hashing.add(future)
    future.add_done_callback(hashing.discard)
    return await future


async def hash_password(password: str) -> str:
    salt = secrets.token_bytes(16)
    return f"{salt.hex()}${(await scrypt(password, salt)).hex()}"


async def verify_password(password: str, stored: str) -> bool:
    salt, expected = map(bytes.fromhex, stored.split("$"))
    return hmac.compare_digest(await scrypt(password, salt), expected)


class Identity(NamedTuple):
    """Who somebody is, by which token (``jti``), and until when (``exp``, seconds since 1970)."""

    user: str
    role: str
    jti: str
    exp: float


class Unauthorized(Exception):
    """Why a token is refused; the text goes to its bearer."""

    def __str__(self) -> str:
        return f"Unauthorized: {self.args[0]}"


class Tokens:
    """Makes and reads JSON Web Tokens, signed with HMAC-SHA256 (RFC 7519, RFC 7518)."""

    def __init__(self, settings: Settings) -> None:
        self.secret = settings.secret or load_or_create_secret(settings.db)
        self.seconds = settings.token_minutes * 60

    def issue(self, user: str) -> dict[str, Any]:
        """The answer to a log-in, shaped as OAuth2 wants it (RFC 6749, section 5.1)."""
        now = time.time()
        claims = {
            "sub": user,
            "iat": int(now),
            "exp": math.ceil(now + self.seconds),  # whole seconds: PyJWT cuts off the rest
            "jti": secrets.token_urlsafe(16),
        }
        token = jwt.encode(claims, self.secret, algorithm="HS256")
        return {"access_token": token, "token_type": "bearer", "expires_in": round(self.seconds)}

    def verify(self, token: str | None) -> dict[str, Any]:
        """The claims of a good token. Raises Unauthorized for any other."""
        if not token:
            raise Unauthorized("No token provided")
        try:
            # Without `require`, a token without `exp` would be good forever; without
            # `algorithms`, a token could choose how it is checked.
            claims: dict[str, Any] = jwt.decode(
                token,
                self.secret,
                algorithms=["HS256"],
                options={"require": ["sub", "iat", "exp", "jti"]},
            )
            clean_name(claims["sub"])
        except jwt.ExpiredSignatureError:
            raise Unauthorized("Token expired") from None
        except (jwt.PyJWTError, ValueError):
            raise Unauthorized("Invalid token") from None
        return claims


def load_or_create_secret(db: Path) -> bytes:
    """The key beside the database, made at the first start, readable by its owner only."""
    path = db.with_name(f"{db.name}.secret")
    try:
        if not path.exists():
            new = path.with_name(f"{path.name}.new")  # a crash while writing leaves no half key
            new.unlink(missing_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            new.replace(path)
        secret = path.read_bytes()
    except OSError as error:
        raise StartError(f"CHAT_SECRET is not set, and {str(path)!r}: {error.strerror}") from None
    if len(secret) < 32:
        raise StartError(f"CHAT_SECRET is not set, and {str(path)!r} is shorter than 32 bytes")
    return secret


AllTokens = Annotated[Tokens, from_state("tokens")]
Database = Annotated[Storage, from_state("storage")]
oauth2 = OAuth2PasswordBearer(tokenUrl="token", auto_error=False)


async def read_claims(
    connection: HTTPConnection, tokens: AllTokens, token: Annotated[str | None, Depends(oauth2)]
) -> dict[str, Any]:
    """A dependency of routes and sockets: what the token says. Raises Unauthorized.

    The token comes as ``Authorization: Bearer`` (RFC 6750). A socket may also bring it in its
    query, or as a second subprotocol, because a browser's sockets cannot send that header
    and a secret should not be in a URL.
    """
    if isinstance(connection, WebSocket):
        offers = [p for p in connection.scope["subprotocols"] if p.startswith("bearer.")]
        offered = offers[0].removeprefix("bearer.") if offers else None
        token = token or connection.query_params.get("token") or offered
    return tokens.verify(token)


Claims = Annotated[dict[str, Any], Depends(read_claims)]


async def identify(claims: Claims, storage: Database) -> Identity:
    """A dependency: who is there, by what is stored about them now. Raises Unauthorized."""
    person, logged_out = await asyncio.gather(
        storage.find_person(folded(claims["sub"])), storage.is_revoked(claims["jti"])
    )
    if person is None:
        raise Unauthorized("Invalid token")
    if logged_out:
        raise Unauthorized("Logged out")
    if person.banned:
        raise Refused("forbidden", "Banned")
    return Identity(person.name, person.role, claims["jti"], claims["exp"])


Me = Annotated[Identity, Depends(identify)]


@app.exception_handler(Unauthorized)
async def unauthorized(connection: Request | WebSocket, error: Unauthorized) -> Response | None:
    """Over HTTP it is a 401 (RFC 6750, section 3); a socket is closed with 1008."""
    if isinstance(connection, WebSocket):
        await close_socket(connection, WebSocketException(1008, str(error)))
        return None
    return JSONResponse({"detail": str(error)}, 401, {"WWW-Authenticate": "Bearer"})


async def check_origin(websocket: WebSocket) -> None:
    """A dependency: answers 403 to a socket that another site's page opens.

    A browser lets any page open a socket to any host, but says truly whose page it is. A
    client that is no browser sends no Origin, and needs none.
    """
    origin = websocket.headers.get("origin")
    settings: Settings = websocket.app.state.settings
    if origin is None or origin in settings.origins:
        return
    if origin.partition("://")[2] != websocket.headers.get("host"):
        await websocket.close()  # before it is accepted: that is a 403
        raise WebSocketException(1008, f"{origin!r} is not in CHAT_ORIGINS")  # for the log


class Tether:
    """By which an open socket is ended from elsewhere: its token or its bearer is refused now."""

    def __init__(self, folded: str, jti: str) -> None:
        self.folded = folded  # the bearer's name
        self.jti = jti
        self.cut: asyncio.Future[WebSocketException] = asyncio.get_running_loop().create_future()

    def end(self, code: int, reason: str) -> None:
        """Make the socket's handler close it; the first code and reason count."""
        if not self.cut.done():
            self.cut.set_result(WebSocketException(code, reason))

    async def hold(self) -> None:
        """Wait for ``end``, and raise its code and reason."""
        raise await self.cut


Tethers = Annotated[set[Tether], from_state("tethers")]


async def tethered(claims: Claims, tethers: Tethers) -> AsyncIterator[Tether]:
    """A dependency of sockets, solved before ``Me``: between the two no log-out can be missed."""
    tether = Tether(folded(claims["sub"]), claims["jti"])
    tethers.add(tether)
    expiry = asyncio.get_running_loop().call_later(
        claims["exp"] - time.time(), tether.end, 1008, "Unauthorized: Token expired"
    )
    try:
        yield tether
    finally:
        expiry.cancel()
        tethers.discard(tether)


MyTether = Annotated[Tether, Depends(tethered)]


class Credentials(BaseModel):
    """A log-in. Too short or too long a password is a wrong one like any other."""

    username: str
    password: str


class Registration(BaseModel):
    """A new person."""

    username: Annotated[str, AfterValidator(clean_username)]
    password: Annotated[str, AfterValidator(clean_password)] = Field(
        min_length=8, max_length=MAX_PASSWORD
    )


async def log_in(storage: Storage, tokens: Tokens, username: str, password: str) -> dict[str, Any]:
    """A token for the right password, else 401. An unknown name takes as long as a known one."""
    try:
        key, password = folded(username), clean_password(password[: LONGEST_FORM * MAX_PASSWORD])
    except ValueError:  # nobody's
        key = password = ""
    person = await storage.find_person(key)
    right = await verify_password(password, person.password if person else NO_PASSWORD)
    if not person or not right:
        log.info("refused log-in as %r", username[:32])
        raise HTTPException(401, "Bad username or password", {"WWW-Authenticate": "Bearer"})
    if person.banned:
        raise Refused("forbidden", "Banned")
    return tokens.issue(person.name)


@app.post("/login")
async def login(user: Credentials, storage: Database, tokens: AllTokens) -> dict[str, Any]:
    return await log_in(storage, tokens, user.username, user.password)


@app.post("/token")
async def token(
    form: Annotated[OAuth2PasswordRequestForm, Depends()], storage: Database, tokens: AllTokens
) -> dict[str, Any]:
    """The same as an OAuth2 password form, for the Authorize button of /docs."""
    return await log_in(storage, tokens, form.username, form.password)


@app.post("/register", status_code=201)
async def register(new: Registration, storage: Database) -> dict[str, Any]:
    password = await hash_password(new.password)
    role = await storage.add_person(folded(new.username), new.username, password)
    if not role:
        raise HTTPException(409, "This username is taken")
    return {"username": new.username, "role": role}


@app.get("/me")
async def me(me: Me) -> dict[str, Any]:
    return {"username": me.user, "role": me.role}


@app.post("/logout", status_code=204)
async def logout(me: Me, storage: Database, tethers: Tethers) -> None:
    """Refuse this token from now on, and close the sockets that were opened with it."""
    await storage.revoke(me.jti, me.exp)
    for tether in tethers:
        if tether.jti == me.jti:
            tether.end(1008, "Unauthorized: Logged out")


@app.websocket("/ws/protected", dependencies=[Depends(check_origin)])
async def protected(websocket: WebSocket, tether: MyTether, me: Me) -> None:
    await websocket.accept()
    await websocket.send_text(f"Hello {me.user}, you are authenticated!")

    async def answer() -> None:
        while True:
            await websocket.send_text(f"{me.user} says: {await receive_text(websocket)}")

    await side_by_side(answer(), tether.hold())


async def add_demo_people(storage: Storage) -> None:
    """The people that the README logs in as."""
    for name, password, role in (
        ("user1", "password1", "member"),
        ("user2", "password2", "member"),
        ("admin", "adminpassword", "admin"),
    ):
        await storage.add_person(name, name, await hash_password(password), role)


# ======================================================================================
# 8. Roles
#
# A token says who somebody is; what they may do is looked up each time they do something.
# So a demotion or a ban counts from the next action on, and sockets that are open already
# are ended from here.
# ======================================================================================

Role = Literal["member", "moderator", "admin"]  # each may do what the ones before it may
ROLES = get_args(Role)


def has_role(who: Identity | Person, role: Role) -> bool:
    """Whether somebody has this role, or one that may do more."""
    return ROLES.index(who.role) >= ROLES.index(role)


def require(role: Role) -> Any:
    """A dependency: who is asking, if they have this role now; 403 if not."""

    async def check(me: Me) -> Identity:
        if not has_role(me, role):
            raise Refused("forbidden", f"Only a person with the role {role!r} may do this")
        return me

    return Depends(check)


Moderator = Annotated[Identity, require("moderator")]
Admin = Annotated[Identity, require("admin")]


async def find_target(username: str, me: Moderator, storage: Database) -> Person:
    """A dependency: the person in the path; 404 for nobody, 403 for one's equals and betters.

    Admins have no betters, and may act on each other.
    """
    try:
        person = await storage.find_person(folded(username))
    except ValueError:
        person = None
    if person is None:
        raise HTTPException(404, "There is nobody of this name")
    if me.role != "admin" and has_role(person, "moderator"):
        raise Refused("forbidden", f"Only an admin may do this to somebody who is {person.role}")
    return person


Target = Annotated[Person, Depends(find_target)]


def end_sockets(tethers: Iterable[Tether], person: Person, reason: str) -> int:
    """End all of somebody's sockets, and count them."""
    mine = [tether for tether in tethers if tether.folded == person.folded]
    for tether in mine:
        tether.end(1008, reason)
    log.info("%r: %s, %d sockets", person.name, reason.lower(), len(mine))
    return len(mine)


class NewRole(BaseModel):
    """What somebody becomes."""

    role: Role


@app.put("/users/{username}/role")
async def set_role(new: NewRole, me: Admin, person: Target, storage: Database) -> dict[str, Any]:
    if not await storage.set_role(person.folded, new.role):
        raise HTTPException(409, "The last admin cannot be demoted")
    log.info("%r: %s, by %r", person.name, new.role, me.user)
    return {"username": person.name, "role": new.role}


@app.post("/users/{username}/kick")
async def kick(person: Target, tethers: Tethers) -> dict[str, Any]:
    """Close somebody's sockets. They may come back."""
    return {"username": person.name, "sockets": end_sockets(tethers, person, "Kicked")}


@app.post("/users/{username}/ban")
async def ban(person: Target, storage: Database, tethers: Tethers) -> dict[str, Any]:
    """Let somebody log in and send no more, and close their sockets."""
    if not await storage.set_banned(person.folded, True):
        raise HTTPException(409, "The last admin cannot be banned")
    sockets = end_sockets(tethers, person, "Banned")
    return {"username": person.name, "banned": True, "sockets": sockets}


@app.post("/users/{username}/unban")
async def unban(person: Target, storage: Database) -> dict[str, Any]:
    await storage.set_banned(person.folded, False)
    return {"username": person.name, "banned": False}


# ======================================================================================
# 9. Rooms
#
# The textbook keeps a list of sockets and awaits each in turn: one reader that stalls
# stops everybody. Here a room is a log, and a client a set of cursors into logs. Sending
# appends to a log and wakes its followers; each reads on from its own cursor, at its own
# pace, and nobody waits for anybody. One that wakes late reads all it missed as one frame,
# so the busier a room, the less each message costs.
#
#   reader (one a socket)       committer (one)                  writer (one a socket)
#   check, post() --pending-->  take all that is pending --log-> read my rooms from my
#                               one transaction, then append     cursors, send one frame
#
# A private conversation is a room with two members, and is named after them: @alice+bob.
#
# Everything below runs in the event loop and belongs to it, hence no locks; what must not
# be interrupted is a plain function without `await`.
# ======================================================================================

WINDOW = 1_000  # newest events that an open room keeps, and most messages that are resumed
WINDOW_SIZE = 1 * MIB  # characters in these events, in both cases
HISTORY = 50  # messages shown on joining
MAX_BATCH = 250  # messages in one transaction; well below WINDOW, or batches outrun readers
MAX_PENDING = 10_000  # messages that may wait for the disk before new ones are refused
MAX_FRAME = 256 * KIB  # characters after which a frame takes no further batch
MAX_FRAMES = 32  # of plain text that are sent one by one; more go out as lines of one frame
MAX_OUTBOX = 2 * WINDOW + 100  # personal events that may wait for one client: a resume's too
MAX_ROOMS = 100  # rooms that one client may follow
SEARCHED = 500  # messages that a search reads at a time
TYPING_RATE = 1  # notices a second of one person in one room; they take room in its window


def private_room(one: str, other: str) -> str:
    """The name of the private conversation of these two."""
    return "@" + "+".join(sorted((one, other)))


def members(room: str) -> list[str]:
    """The two people of a private conversation; nobody for a room that is everybody's."""
    return room[1:].split("+") if room.startswith("@") else []


Encode = Callable[[Sequence[Event]], list[str]]  # events to frames


def as_json(events: Sequence[Event]) -> list[str]:
    """``lobby.v1``: one frame, one JSON object a line."""
    dumps = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    return ["\n".join(map(dumps, events))]


def as_plain(events: Sequence[Event]) -> list[str]:
    """Plain text: a frame for each event that has a form for people to read."""
    frames: list[str] = []
    for event in events:
        match event:
            case {"type": "message"}:
                # Indented, a further line cannot pass for another person's message.
                text = "\n    ".join(event["text"].splitlines())
                private = "[private] " if members(event["room"]) else ""
                frames.append(f"{private}{event['user']}: {text}")
            case {"type": "joined" | "left"}:
                frames.append(f"{event['user']} {event['type']} the chat!")
            case {"type": "history"}:
                if not event["complete"]:
                    frames.append("Error: older messages are missing here")
                frames += as_plain(event["messages"])
            case {"type": "error"}:
                frames.append(f"Error: {event['message']}")
            case {"type": "text"}:
                frames.append(event["text"])
    return frames


class Batch:
    """Events that entered a room's log together, and their frames, made once for all readers."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.encoded: dict[Encode, list[str]] = {}

    def frames(self, encode: Encode) -> list[str]:
        if encode not in self.encoded:
            self.encoded[encode] = encode(self.events)
        return self.encoded[encode]


class Room:
    """An open room: its followers, and the newest part of its log, notices included."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.followers: set[Client] = set()
        self.batches: list[Batch] = []
        self.first = 0  # the number of batches[0]
        self.events = 0  # in all batches
        self.size = 0  # characters in all batches

    @property
    def end(self) -> int:
        """The cursor of a client that has read everything."""
        return self.first + len(self.batches)

    @property
    def people(self) -> set[str]:
        """Who is here, with however many sockets."""
        return {client.owner.user for client in self.followers}

    def append(self, events: Sequence[Event]) -> None:
        """Add a batch, forget what the window no longer holds, and wake the followers."""
        self.batches.append(Batch(events))
        self.events += len(events)
        self.size += sum(map(size_of, events))
        while (self.events > WINDOW or self.size > WINDOW_SIZE) and len(self.batches) > 1:
            forgotten = self.batches.pop(0).events
            self.events -= len(forgotten)
            self.size -= sum(map(size_of, forgotten))
            self.first += 1
        for client in self.followers:
            client.wake.set()

    def since(self, cursor: int) -> list[Batch]:
        """The batches from this cursor on. Raises LookupError if the first is forgotten."""
        if cursor < self.first:
            raise LookupError(cursor)
        return self.batches[cursor - self.first :]


class Client:
    """One open chat socket: who holds it, and how far it has read each of its rooms.

    Only ``write`` sends on the socket, only its handler receives. Whoever wants to say
    something to it alone puts that into ``outbox`` and wakes it.
    """

    def __init__(
        self, websocket: WebSocket, owner: Identity, tether: Tether, encode: Encode
    ) -> None:
        self.websocket = websocket
        self.owner = owner
        self.tether = tether
        self.encode = encode
        self.cursors: dict[Room, int] = {}
        self.outbox: list[Event] = []
        self.held: list[Event] | None = []  # private messages that come during a join
        self.wake = asyncio.Event()  # there is something new to send
        self.taken = asyncio.Event()  # nothing is left in the outbox

    def take(self) -> list[str]:
        """The frames of all that is new for this client, or of much of it; moves its cursors."""
        frames = self.encode(self.outbox) if self.outbox else []
        self.outbox = []
        self.taken.set()
        size = sum(map(len, frames))
        for room in self.cursors:
            for batch in room.since(self.cursors[room]):
                if size > MAX_FRAME:
                    self.wake.set()  # to come back for the rest
                    break
                new = batch.frames(self.encode)
                frames += new
                size += sum(map(len, new))
                self.cursors[room] += 1
        as_one = self.encode is as_json or len(frames) > MAX_FRAMES
        return ["\n".join(frames)] if frames and as_one else frames

    async def write(self) -> None:
        """Send whatever is new, whenever something is. Raises WebSocketException when too slow."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            try:
                frames = self.take()
            except LookupError:
                raise WebSocketException(1013, "Too slow") from None
            for frame in frames:
                await self.websocket.send_text(frame)


class RateLimit:
    """So many messages a second for each person, and bursts of three times that.

    The generic cell rate algorithm: of each person only the time is kept at which they
    will have used up nothing, and each message moves it on by 1/rate.
    """

    def __init__(self, rate: float) -> None:
        self.step = 1 / rate if rate else 0.0  # seconds
        self.burst = max(0.0, 3 - self.step)  # seconds that somebody may be ahead
        self.free_at: dict[str, float] = {}

    def retry_after(self, user: str) -> float:
        """0 if they may send now, which counts; else the seconds until they may."""
        now = time.monotonic()
        free_at = max(now, self.free_at.get(user, now))
        if free_at - now > self.burst:
            return round(free_at - now - self.burst, 3)
        self.free_at[user] = free_at + self.step
        if len(self.free_at) > 10_000:
            self.free_at = {name: at for name, at in self.free_at.items() if at > now}
        return 0


def history_event(room: str, messages: list[Event], more: bool, complete: bool = True) -> Event:
    event: Event = {"type": "history", "room": room, "messages": messages}
    return event | {"more": more, "complete": complete}


class ConnectionManager:
    """Owns the rooms and the clients, and the one way by which events enter rooms.

    Notices take that way too: were they announced at once, somebody would be said to have
    left before their last message.
    """

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self.storage = storage
        self.limit = RateLimit(settings.rate)
        self.join_limit = RateLimit(settings.rate)
        self.typing_limit = RateLimit(TYPING_RATE)
        self.sockets_per_user = settings.sockets_per_user
        self.rooms: dict[str, Room] = {}
        self.clients: dict[str, set[Client]] = {}  # of each person who is online
        self.searching: set[str] = set()  # who waits for a search
        self.pending: list[Draft | Event] = []  # in order of arrival
        self.posted = asyncio.Event()
        self.stopping = False

    # -- Clients ----------------------------------------------------------------------

    async def connect(self, client: Client) -> None:
        """Let a client in. Closes it with 1013 when its owner has too many sockets open.

        The welcome comes first, even if somebody writes to its owner while it is made.
        """
        me = client.owner
        mine = self.clients.setdefault(me.user, set())
        if self.sockets_per_user and len(mine) >= self.sockets_per_user:
            raise WebSocketException(1013, "Too many sockets")
        mine.add(client)
        private = await self.storage.conversations(me.user)
        welcome: Event = {"type": "welcome", "user": me.user, "role": me.role}
        welcome |= {"epoch": self.storage.epoch, "expires_at": me.exp, "rooms": private}
        client.outbox.insert(0, welcome)
        client.wake.set()

    def disconnect(self, client: Client) -> None:
        """Forget a client, wherever it is."""
        for room in list(client.cursors):
            self.leave(client, room)
        mine = self.clients[client.owner.user]
        mine.discard(client)
        if not mine:
            del self.clients[client.owner.user]

    def send_personal_message(self, event: Event, client: Client) -> None:
        """Say something to one client. One that lets too much pile up is closed with 1013."""
        client.outbox.append(event)
        client.taken.clear()
        client.wake.set()
        if len(client.outbox) > MAX_OUTBOX:
            client.tether.end(1013, "Too slow")

    # -- Rooms ------------------------------------------------------------------------

    async def find_room(self, name: str, user: str) -> str:
        """The true name of a room, if this person may see it. Whoever names a room comes here.

        Raises Refused otherwise, and says the same of a conversation between others as of
        one that cannot be.
        """
        if not members(name):
            return name
        try:
            one, other = members(name)
            names = [folded(one), folded(other)]
            names.remove(folded(user))
            person = await self.storage.find_person(names[0])
        except ValueError:  # not two, no name, or not mine
            person = None
        if person is None:
            raise Refused("unknown_room", "No such room or person")
        return private_room(user, person.name)

    async def history(self, room: str, after: int | None, epoch: str | None) -> list[Event]:
        """All that has happened since ``after``; the newest page if that is not to be had.

        It is not if there is no ``after``, if more has come since than a room's window holds,
        or if it is the id of another database's message.
        """
        storage = self.storage
        if after is not None and epoch in (None, storage.epoch) and after <= storage.last_id:
            missed = await storage.since(room, after, WINDOW, WINDOW_SIZE)
            if missed:
                messages, deleted = missed
                return [history_event(room, messages, more=False), *deleted]
        messages, more = await storage.page(room, HISTORY)
        return [history_event(room, messages, more, complete=after is None)]

    async def join(
        self, client: Client, name: str, after: int | None = None, epoch: str | None = None
    ) -> None:
        """Show a room's past and who is here, and follow it from now on.

        No message falls between the past and now, or into both: one thread stores and reads,
        and its answers come back in the order they were asked for. So when the history is
        here, the log has had exactly the messages before it. Joining again shows it again.
        """
        while wait := self.join_limit.retry_after(client.owner.user):
            await asyncio.sleep(wait)  # everybody in the room hears of joins
        past: list[Event] = []
        if client.encode is as_json or after is not None:
            past = await self.history(name, after, epoch)
        room = self.rooms.setdefault(name, Room(name))
        people, user = room.people, client.owner.user
        if room in client.cursors:
            self.catch_up(client, room)
        for event in past:
            self.send_personal_message(event, client)
        presence = {"type": "presence", "room": name, "users": sorted(people | {user})}
        self.send_personal_message(presence, client)
        room.followers.add(client)
        client.cursors[room] = room.end
        if user not in people:
            self.announce({"type": "joined", "room": name, "user": user})

    def leave(self, client: Client, room: Room) -> None:
        """Stop following a room, once what was already said in it is on its way."""
        self.catch_up(client, room)
        del client.cursors[room]
        room.followers.discard(client)
        if client.owner.user not in room.people:
            self.announce({"type": "left", "room": room.name, "user": client.owner.user})
        if not room.followers:
            del self.rooms[room.name]

    def catch_up(self, client: Client, room: Room) -> None:
        """Put what a client has not read of a room before what it is told next."""
        try:
            for batch in room.since(client.cursors[room]):
                client.outbox += batch.events
        except LookupError:
            client.tether.end(1013, "Too slow")
        client.cursors[room] = room.end

    async def search(
        self, user: str, room: str, limit: int, before: int, after: int | None, q: str
    ) -> tuple[list[Event], bool]:
        """Like Storage.page, but only messages with ``q`` in their text, whatever the case.

        It reads page after page, so that others get in between. An index of all parts of all
        texts would be quicker, but storing would take three times as long, and deleted texts
        would have to be wiped out of it too. Raises Refused if the last one still runs.
        """
        if user in self.searching:
            raise Refused("rate_limited", "Your last search still runs", retry_after=1)
        self.searching.add(user)
        found: list[Event] = []
        more = True
        try:
            while more and len(found) <= limit:
                page, more = await self.storage.page(room, SEARCHED, before, after)
                hits = [event for event in page if q.casefold() in event["text"].casefold()]
                if after is None:
                    found = hits + found
                    before = page[0]["id"] if page else before
                else:
                    found += hits
                    after = page[-1]["id"] if page else after
        finally:
            self.searching.discard(user)
        return found[-limit:] if after is None else found[:limit], len(found) > limit

    # -- Messages ---------------------------------------------------------------------

    def spend(self, user: str) -> None:
        """Count something that others notice. Raises Refused if it is too much."""
        if wait := self.limit.retry_after(user):
            raise Refused("rate_limited", "You are sending too fast", retry_after=wait)

    def post(self, draft: Draft) -> None:
        """Queue a message for storing. Raises Refused, and keeps nothing, when it may not be."""
        self.spend(draft.user)
        if len(self.pending) >= MAX_PENDING:
            raise Refused("unavailable", "Too much waits to be stored, try again", retry_after=1)
        self.pending.append(draft)
        self.posted.set()

    def announce(self, notice: Event) -> None:
        """Queue a notice behind the messages that came before it; it is not stored."""
        self.pending.append(notice)
        self.posted.set()

    def typing(self, client: Client, room: str) -> None:
        """Announce in a room where somebody is that they write; too often is not said again."""
        user = client.owner.user
        if self.rooms.get(room) not in client.cursors and not members(room):
            raise Refused("forbidden", "Join the room first")
        if len(self.pending) < MAX_PENDING and not self.typing_limit.retry_after(f"{user} {room}"):
            self.announce({"type": "typing", "room": room, "user": user})

    async def delete(self, room: str, id: int) -> bool:
        """Delete a message and say so; False if there is none.

        Said at once, it still comes after the message and before whatever is stored later,
        for the same reason as in ``join``.
        """
        deleted = await self.storage.delete(id)
        if deleted:
            self.broadcast(room, [{"type": "deleted", "room": room, "id": id}])
        return deleted

    async def commit_forever(self) -> None:
        """The committer: store what is pending, then show it. Runs until ``stop``."""
        while not self.stopping or self.pending:
            await self.posted.wait()
            self.posted.clear()
            while self.pending:
                # People who were shown the last batch together answer together: as long as
                # more comes at every turn of the loop, it goes into the same transaction.
                before = -1
                while before < len(self.pending) < MAX_BATCH:
                    before = len(self.pending)
                    await asyncio.sleep(0)
                batch, self.pending = self.pending[:MAX_BATCH], self.pending[MAX_BATCH:]
                try:
                    await self._commit(batch)
                except Exception:
                    log.exception("unexpected error in the committer")

    async def _commit(self, batch: Sequence[Draft | Event]) -> None:
        drafts = [item for item in batch if isinstance(item, Draft)]
        try:
            stored = await self.storage.append(drafts) if drafts else []
        except Refused as error:  # each sender is told below
            stored = [(error.event, False)] * len(drafts)
        outcomes = iter(stored)
        shown = [next(outcomes) if isinstance(item, Draft) else (item, True) for item in batch]
        by_room = group_by_key((event["room"], event) for event, is_new in shown if is_new)
        for room, events in by_room.items():
            self.broadcast(room, events)
        for draft, (event, is_new) in zip(drafts, stored, strict=True):
            draft.done(event, is_new)

    def broadcast(self, room: str, events: Sequence[Event]) -> None:
        """Append to a room's log, and wake whoever follows it. Waits for nobody.

        Those whose private conversation it is are told of it on every socket that they have;
        who came and left there, only where it is followed.
        """
        if room in self.rooms:
            self.rooms[room].append(events)
        for client in {client for user in members(room) for client in self.clients.get(user, ())}:
            if self.rooms.get(room) not in client.cursors:
                for event in events:
                    if event["type"] not in ("joined", "left"):
                        self.tell_privately(event, client)

    def tell_privately(self, event: Event, client: Client) -> None:
        """Tell a client of a private conversation that it does not follow.

        While it joins a room, this is put off: it may be this one, and then its history, or
        its log, will have the event in its place.
        """
        if client.held is None:
            self.send_personal_message(event, client)
        elif len(client.held) < MAX_OUTBOX:
            client.held.append(event)
        else:
            client.tether.end(1013, "Too slow")

    def release(self, client: Client) -> None:
        """Tell what was put off, unless the client follows that conversation now."""
        held, client.held = client.held or [], None
        for event in held:
            if self.rooms.get(event["room"]) not in client.cursors:
                self.send_personal_message(event, client)

    def stop(self) -> None:
        """Let the committer end when all that is pending is stored."""
        self.stopping = True
        self.posted.set()


# ======================================================================================
# 10. The chat
#
# A client may send anything at any time. So what it may say is a closed set of types, each
# checked in one place; what is wrong is answered with an error event that names it, and
# the socket stays open. Whatever is right is then a line or two in the words of chapter 9.
# ======================================================================================

MAX_TEXT = 4_000  # characters
# No control characters but tab and line feed, nothing that reverses the text after it.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff]")


def clean_text(text: str) -> str:
    """A message's text in its one spelling (NFC), trimmed. Raises ValueError for a bad one."""
    text = text.replace("\r\n", "\n").strip()
    if len(text) <= LONGEST_FORM * MAX_TEXT:
        text = normalize("NFC", text)
    if not text:
        raise PydanticCustomError("invalid", "The text is empty")
    if len(text) > MAX_TEXT:
        raise PydanticCustomError("too_long", "The text is longer than 4,000 characters")
    if FORBIDDEN.search(text):
        raise PydanticCustomError("invalid", "The text has a character that may not be sent")
    return text


def clean_room(name: str) -> str:
    """A room's name in its one spelling; the two names in ``@alice+bob``, find_room checks."""
    try:
        return name if members(name) else clean_name(name)
    except PydanticCustomError as error:
        raise PydanticCustomError("unknown_room", "No such room: {0}", {"0": str(error)}) from None


Text = Annotated[str, AfterValidator(clean_text)]
RoomName = Annotated[str, AfterValidator(clean_room)]
Mid = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
Id = Annotated[int, Field(ge=0, le=MAX_ID)]
Limit = Annotated[int, Field(ge=1, le=200)]


class Incoming(BaseModel):
    """What a ``lobby.v1`` client sends; errors never repeat the input, they may be logged."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)


class SendMessage(Incoming):
    type: Literal["message"]
    room: RoomName | None = None
    to: str | None = None  # a person instead of a room
    text: Text
    mid: Mid

    @model_validator(mode="after")
    def has_one_target(self) -> SendMessage:
        if (self.room is None) == (self.to is None):
            raise PydanticCustomError("invalid", "A message goes to a 'room' or 'to' a person")
        return self


class JoinRoom(Incoming):
    type: Literal["join"]
    room: RoomName
    after: Id | None = None
    epoch: str | None = None


class LeaveRoom(Incoming):
    type: Literal["leave"]
    room: RoomName


class Typing(Incoming):
    type: Literal["typing"]
    room: RoomName


class GetHistory(Incoming):
    type: Literal["history"]
    room: RoomName
    before: Id = MAX_ID
    limit: Limit = HISTORY


AnyIncoming = SendMessage | JoinRoom | LeaveRoom | Typing | GetHistory
incoming: TypeAdapter[AnyIncoming] = TypeAdapter(
    Annotated[AnyIncoming, Field(discriminator="type")]
)
text_only: TypeAdapter[str] = TypeAdapter(Text)


def invalid(error: ValidationError) -> Refused:
    """The first thing that is wrong, as an error event says it."""
    first = error.errors(include_url=False, include_input=False)[0]
    code = first["type"] if first["type"] in ("too_long", "unknown_room") else "invalid"
    where = ".".join(map(str, first["loc"][1:]))  # without the event's type
    return Refused(code, f"{where}: {first['msg']}" if where else first["msg"])


def mid_of(line: str) -> str | None:
    """The ``mid`` of a message that is wrong otherwise, so that its sender can tell which."""
    event = json_or_none(line)
    mid = event.get("mid") if isinstance(event, dict) else None
    return mid if isinstance(mid, str) and len(mid) <= 64 else None


HELP = """\
/msg bob hi  says hi to bob alone
/who         who is here
/help        this text"""


class ChatHandler:
    """What one client says, understood and done."""

    def __init__(self, client: Client, manager: ConnectionManager) -> None:
        self.client = client
        self.manager = manager
        self.user = client.owner.user

    def tell(self, event: Event) -> None:
        self.manager.send_personal_message(event, self.client)

    def tell_error(self, error: Refused, mid: str | None) -> None:
        self.tell(error.event | ({"mid": mid} if mid else {}))

    async def read(self, query: dict[str, str]) -> None:
        """The reader: join what the URL asks for, then do what each frame asks for.

        Who does not read its answers is not listened to.
        """
        await self.attempt(self.enter(query))
        self.manager.release(self.client)
        while True:
            frame = await receive_text(self.client.websocket)
            if self.client.encode is as_json:
                for number, line in enumerate(frame.split("\n")):
                    if number:  # there may be thousands: let others go between, as in `receive`
                        await asyncio.sleep(0)
                    await self.client.taken.wait()
                    await self.attempt(self.handle_json(line), line)
            else:
                await self.client.taken.wait()
                await self.attempt(self.handle_plain(frame), frame)

    async def attempt(self, step: Awaitable[None], frame: str = "") -> None:
        """Do what a frame asks for, or tell why not."""
        try:
            await step
        except ValidationError as error:
            self.tell_error(invalid(error), mid_of(frame))
        except Refused as error:
            self.tell_error(error, mid_of(frame))

    async def enter(self, query: dict[str, str]) -> None:
        """Join the room that the socket's URL names, from where it says."""
        request = {"room": "lobby"} | query | {"type": "join"}
        request["room"] = request["room"].replace(" ", "+")  # what a "+" in a query means
        await self.do(incoming.validate_strings(request, strict=False))

    async def handle_json(self, line: str) -> None:
        await self.do(incoming.validate_json(line))

    async def handle_plain(self, frame: str) -> None:
        match frame.split() if frame.startswith("/") else None:
            case None:
                text = text_only.validate_python(frame)
                if not self.client.cursors:
                    raise Refused("unknown_room", "You are in no room")
                for room in self.client.cursors:
                    self.post(room.name, text, None)
            case ["/who"]:
                for room in self.client.cursors:
                    self.tell({"type": "text", "text": f"Here: {', '.join(sorted(room.people))}"})
            case ["/msg", name, _, *_]:
                text = text_only.validate_python(frame.split(maxsplit=2)[2])
                self.post(await self.find_room(f"@{self.user}+{name}"), text, None)
            case ["/msg", *_]:
                raise Refused("invalid", "whom, and what? /msg bob hi")
            case ["/help"]:
                self.tell({"type": "text", "text": HELP})
            case _:
                raise Refused("invalid", "unknown command; /help lists them")

    async def find_room(self, name: str) -> str:
        return await self.manager.find_room(name, self.user)

    async def join(self, event: JoinRoom) -> None:
        """Join a room, while private messages are held back: see ``tell_privately``."""
        self.client.held = self.client.held or []
        if self.client.encode is as_plain and event.after is None:
            self.manager.release(self.client)  # there will be no history to have them
        try:
            room = await self.find_room(event.room)
            others = {one.name for one in self.client.cursors} - {room}
            if len(others) >= MAX_ROOMS:
                raise Refused("forbidden", f"One socket follows at most {MAX_ROOMS} rooms")
            await self.manager.join(self.client, room, event.after, event.epoch)
        finally:
            self.manager.release(self.client)

    async def do(self, event: AnyIncoming) -> None:
        if isinstance(event, JoinRoom):
            await self.join(event)
            return
        named = event.room if event.room is not None else f"@{self.user}+{event.to}"
        room = await self.find_room(named)
        match event:
            case SendMessage():
                self.post(room, event.text, event.mid)
            case LeaveRoom():
                for followed in [one for one in self.client.cursors if one.name == room]:
                    self.manager.leave(self.client, followed)
            case Typing():
                self.manager.typing(self.client, room)
            case GetHistory():
                page = await self.manager.storage.page(room, event.limit, event.before)
                self.tell(history_event(room, *page))

    def post(self, room: str, text: str, mid: str | None) -> None:
        """Send a message. What becomes of it comes back through the room, or to it alone."""

        def done(event: Event, is_new: bool) -> None:
            followed = self.manager.rooms.get(room)
            if event["type"] == "error":
                self.tell(event | ({"mid": mid} if mid else {}))
            elif not is_new:
                if followed and followed in self.client.cursors:
                    self.manager.catch_up(self.client, followed)  # or it would overtake the others
                self.tell(event)
            elif followed not in self.client.cursors and not members(room):
                self.tell(event)

        self.manager.post(Draft(room, self.user, text, mid, done))


Manager = Annotated[ConnectionManager, from_state("manager")]


@app.websocket("/ws/chat", dependencies=[Depends(check_origin)])
async def chat(websocket: WebSocket, tether: MyTether, me: Me, manager: Manager) -> None:
    """The chat socket: a reader, a writer, and what may end it from elsewhere, side by side."""
    subprotocol = choose_subprotocol(websocket)
    await websocket.accept(subprotocol)
    client = Client(websocket, me, tether, as_json if subprotocol else as_plain)
    handler = ChatHandler(client, manager)
    log.info("connected %r from %s", me.user, client_host(websocket))
    try:
        await manager.connect(client)
        query = dict(websocket.query_params)
        await side_by_side(handler.read(query), client.write(), tether.hold())
    except (WebSocketDisconnect, WebSocketException) as end:
        log.info("disconnected %r: %d %s", me.user, end.code, end.reason)
        raise
    finally:
        manager.disconnect(client)


def visible(rooms: Iterable[str], me: Identity) -> list[str]:
    """Those of the rooms that are no private conversations of others."""
    return [room for room in rooms if not members(room) or me.user in members(room)]


@app.get("/rooms")
async def list_rooms(me: Me, storage: Database, manager: Manager) -> list[dict[str, Any]]:
    """The rooms that the caller may see, and how many people are in each."""
    online = {name: len(room.people) for name, room in manager.rooms.items()}
    names = {"lobby", *visible(manager.rooms, me), *await storage.rooms(me.user)}
    return [{"room": name, "online": online.get(name, 0)} for name in sorted(names)]


async def find_room(room: RoomName, me: Me, manager: Manager) -> str:
    """A dependency: the room in the path, if the caller may see it; 404 if not."""
    return await manager.find_room(room, me.user)


VisibleRoom = Annotated[str, Depends(find_room)]


@app.get("/rooms/{room}/messages")
async def read_messages(
    room: VisibleRoom,
    me: Me,
    manager: Manager,
    before: Annotated[Id, Query()] = MAX_ID,
    after: Annotated[Id | None, Query()] = None,
    limit: Annotated[Limit, Query()] = HISTORY,
    q: Annotated[
        str, Query(max_length=200), AfterValidator(functools.partial(normalize, "NFC"))
    ] = "",
) -> dict[str, Any]:
    """A page, oldest first: next to ``after`` if that is given, else next to ``before``.

    With ``q``, only messages with this in their text, taken literally, whatever its case.
    """
    if q:
        messages, more = await manager.search(me.user, room, limit, before, after, q)
    else:
        messages, more = await manager.storage.page(room, limit, before, after)
    return {"messages": messages, "more": more}


class NewMessage(BaseModel):
    """A message by HTTP; with a ``mid``, sending it again is safe."""

    text: Text
    mid: Mid | None = None


@app.post("/rooms/{room}/messages", status_code=201)
async def post_message(
    room: VisibleRoom, new: NewMessage, me: Me, manager: Manager, response: Response
) -> Event:
    """Answers once the message is stored: 201, or 200 with the original for a repeated ``mid``."""
    outcome: asyncio.Future[tuple[Event, bool]] = asyncio.get_running_loop().create_future()

    def done(event: Event, is_new: bool) -> None:
        if not outcome.done():  # the client may have gone
            outcome.set_result((event, is_new))

    manager.post(Draft(room, me.user, new.text, new.mid, done))
    event, is_new = await outcome
    if event["type"] == "error":
        raise Refused(**{key: value for key, value in event.items() if key != "type"})
    if not is_new:
        response.status_code = 200
    return event


@app.delete("/rooms/{room}/messages/{id}", status_code=204)
async def delete_message(room: VisibleRoom, id: Id, me: Me, manager: Manager) -> None:
    """Delete a message: for its author and for moderators."""
    author = await manager.storage.find_author(room, id)
    if author and author != me.user and not has_role(me, "moderator"):
        raise Refused("forbidden", "Only its author or a moderator may delete a message")
    manager.spend(me.user)
    if not author or not await manager.delete(room, id):
        raise HTTPException(404, "There is no such message in this room")


@app.get("/users")
async def list_users(me: Me, manager: Manager) -> list[dict[str, Any]]:
    """Who is online, and in which of the rooms that the caller may see."""
    rooms = {
        name: {room.name for client in clients for room in client.cursors}
        for name, clients in manager.clients.items()
    }
    roles = await manager.storage.roles([folded(name) for name in rooms])
    return [
        {"username": name, "role": roles[name], "rooms": sorted(visible(rooms[name], me))}
        for name in sorted(rooms)
    ]


@app.get("/healthz")
async def healthz(storage: Database, manager: Manager) -> dict[str, Any]:
    """For whoever watches the server: people online and rooms open; 503 if the database fails."""
    await storage.count_people()
    rooms = [room for room in manager.rooms if not members(room)]
    return {"status": "ok", "online": len(manager.clients), "rooms": len(rooms)}


app.add_api_websocket_route("/ws/{session_id}", session_socket)  # the last one: see chapter 6


# ======================================================================================
# 11. The page
#
# One constant, sent as it is: nothing is put into it on the server, so nothing can be
# smuggled in. Its policy lets exactly this script and this style run, by their hashes.
# ======================================================================================

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
button:hover { filter: brightness(.95); } button:disabled { opacity: .6; cursor: default; }
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
  if (!name.startsWith("@")) return normal;
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

const openRoom = (name) => {
  const isNew = !rooms.has(keyOf(name));
  current = roomOf(name);
  if (isNew) join(current);
  $("messageText").value = kept(localStorage, `draft.${me}.${current.key}`, "");
  openMenu(false);
  const others = kept(localStorage, `rooms.${me}`, []).filter((one) => keyOf(one) !== current.key);
  keep(localStorage, `rooms.${me}`, [...others, current.name]);
  showRoom();
};

const leaveRoom = () => {
  const left = current;
  transmit({type: "leave", room: left.name});
  rooms.delete(left.key);
  const others = kept(localStorage, `rooms.${me}`, []).filter((one) => keyOf(one) !== left.key);
  keep(localStorage, `rooms.${me}`, others);
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
  markRead();
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
  sending = null;
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
    $("messages").replaceChildren(...(room === current ? [] : $("messages").childNodes));
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
    case "presence": room.here = new Set(event.users); lookAround(); break;
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

const welcome = async (event) => {
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

const connect = () => {
  clearTimeout(retryTimer);
  const url = socketUrl("ws/chat");
  const room = current ?? {name: "lobby"};
  room.loading = false;
  asked = keyOf(room.name);
  url.search = new URLSearchParams({room: room.name, ...(room.last && {after: room.last, epoch})});
  status("connecting");
  const old = socket;
  socket = null;
  old?.close();
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

const disconnected = (reason = "") => {
  const old = socket;
  socket = null;
  old?.close();
  clearTimeout(answerTimer);
  sending = null;
  let seconds = Math.ceil(Math.min(30, 2 ** retries++) * (0.5 + Math.random()));
  const tick = () => {
    if (seconds <= 0) return connect();
    status("reconnecting", ` in ${seconds} s${reason ? ` (${reason})` : ""}`);
    seconds -= 1;
    retryTimer = setTimeout(tick, 1000);
  };
  clearTimeout(retryTimer);
  tick();
};

// Back to the log-in. Nothing of this person stays for the next one to see.
const refuse = (reason) => {
  const old = socket;
  socket = null;
  old?.close();
  clearTimeout(answerTimer);
  clearTimeout(retryTimer);
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
document.addEventListener("visibilitychange", () => { markRead(); showSide(); });

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


def content_security_policy(page: str) -> str:
    """A policy (CSP level 3) that allows the page's own script and style, and nothing else."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for tag, content in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


PAGE_HEADERS = {
    "Content-Security-Policy": content_security_policy(PAGE),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@app.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE, headers=PAGE_HEADERS)


# ======================================================================================
# 12. Serving
#
# uvicorn waits for what it has to send to be taken, be it forever: right for a request
# that ends, wrong for sockets that stay open for days, some of them held by nobody or by
# somebody hostile. Here a connection that takes nothing for a while is aborted.
# ======================================================================================

STALL_SECONDS = 30.0  # how long a client may take no byte of what waits for it
PONG_SECONDS = 120.0  # a ping may stand behind megabytes for a slow line
SEND_BUFFER = 256 * KIB  # of the kernel, for each socket
MAX_FRAGMENTS = 1_024  # frames that one message may come in


class PatientProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, which would wait forever for a client that does not read.

    A closed connection stays, with all that waits to be sent, until the peer has taken it;
    only ``transport.abort()`` frees both. The methods overridden here are no public API of
    uvicorn's, so the tests exercise each.
    """

    watch: asyncio.TimerHandle | None = None  # while there is more to send than is taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Bound what the kernel takes: left alone, it would hide megabytes that nobody reads."""
        super().connection_made(transport)
        kernel = transport.get_extra_info("socket")
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    async def send(self, message: Any) -> None:
        """Send, unless the client has left during the handshake, which uvicorn overlooks."""
        if not self.handshake_complete and self.transport.is_closing():
            raise ClientDisconnected
        await super().send(message)

    def data_received(self, data: bytes) -> None:
        """Take bytes; refuse a handshake that is none, on which uvicorn would wait for more."""
        super().data_received(data)
        if not self.handshake_initiated:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_for_stalling(MAX_ID)

    def watch_for_stalling(self, waiting: int) -> None:
        """Abort unless less waits to be taken (bytes) than the last time; then look again."""
        left = self.transport.get_write_buffer_size()
        if left >= waiting:
            self.transport.abort()
        else:
            self.watch = self.loop.call_later(STALL_SECONDS, self.watch_for_stalling, left)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.watch:
            self.watch.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.watch:
            self.watch.cancel()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        if not self.disconnected:
            self.loop.call_later(self.close_timeout, self.transport.abort)

    def handle_ping(self) -> None:
        """Answer a ping, unless its sender does not read: then the answers would pile up."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # made already; thrown away

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment; empty ones cost memory without counting for ``ws_max_size``."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self.conn.fail(1009, "Too many fragments")
            self.handle_parser_exception()
        else:
            super().handle_cont(event)


QUERY = re.compile(r"\?[^\s\"']*")


def hide_queries(record: logging.LogRecord) -> bool:
    """uvicorn logs every URL, and a token may be in it. (Its formatter wants the args whole.)"""
    if isinstance(record.args, tuple):
        args = record.args
        record.args = tuple(QUERY.sub("?...", a) if isinstance(a, str) else a for a in args)
    return True


for name in ("uvicorn.error", "uvicorn.access"):
    logging.getLogger(name).addFilter(hide_queries)


def main() -> None:
    """Serve, by the settings in the environment, until a signal comes."""
    try:
        settings = Settings.from_environment()
        Storage(settings.db).close()  # what the lifespan would refuse at length, in one line
        Tokens(settings)
        address, family = (settings.host, settings.port), socket.AF_INET
        if ":" in settings.host:
            family = socket.AF_INET6
        socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:
        where = f"CHAT_HOST={settings.host!r}, CHAT_PORT={settings.port}"
        raise SystemExit(f"Lobby cannot start: {where}: {error}") from None
    except StartError as error:
        raise SystemExit(f"Lobby cannot start: {error}") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        http="h11",  # unlike httptools, it takes no more than 64 KiB of headers
        ws=PatientProtocol,
        ws_max_size=64 * KIB,
        ws_ping_timeout=PONG_SECONDS,
        ws_per_message_deflate=False,  # it would compress the same text once for each reader
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
