"""How fast Lobby is, beside a textbook manager and Bun's publish: same machine, same load.

    .venv/bin/python .ci/bench.py            a table in Markdown, in under three minutes
    .venv/bin/python .ci/bench.py --quick    a small room and short runs: only whether it works

    hot       216 members, of whom 16 send as fast as they are answered
    crowd     the same with 1,004 members, of whom 16 send
    quiet     1,004 members, 20 messages a second in all
    stalled   30 members, 500 long messages a second, and one more who reads nothing
    connect   what a member costs: the server's CPU to let one in, and its memory

The textbook is what FastAPI's documentation shows: a list of sockets, awaited one after the other.
Bun's publish, measured where `bun` is found, is native code, the fastest that we know. Both only
pass on what they get; Lobby also knows who speaks, and has each message on disk before it is seen.
The server has one core and the load another, where the system has two and lets us choose.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    from uvloop import new_event_loop
except ImportError:  # on Windows
    from asyncio import new_event_loop  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
TEXTBOOK = """
import sys, uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
app, active_connections = FastAPI(), []

async def broadcast(message):
    for connection in active_connections:
        await connection.send_text(message)

@app.websocket("/ws")
async def endpoint(websocket: WebSocket):
    await websocket.accept()
    active_connections.append(websocket)
    try:
        while True:
            await broadcast(f"Client says: {await websocket.receive_text()}")
    except WebSocketDisconnect:
        active_connections.remove(websocket)

uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""
PUBLISH = """
const server = Bun.serve({
  hostname: "127.0.0.1", port: Number(process.argv[2]),
  fetch: (request, server) => server.upgrade(request) ? undefined : new Response("a socket only"),
  websocket: {
    open: (socket) => socket.subscribe("room"),
    message: (_, text) => server.publish("room", `Client says: ${text}`),
  },
});
"""
MARK = b"@@@@@@@@"  # once in each text; the sender's number, and the time in ns, follow
STAMP = re.compile(MARK + rb"\d{3}(\d{19})")
WINDOW = 8  # messages that each sender has on their way, at full speed


class Member(asyncio.Protocol):
    """A socket in the room. It understands no more than it must, to be able to read millions."""

    def __init__(self, room: Room, number: int, is_timed: bool) -> None:
        self.room, self.number, self.mine = room, number, MARK + b"%03d" % number
        self.entered: asyncio.Future[None] = room.loop.create_future()
        self.head = self.tail = b""  # the tail may be the beginning of a mark or a stamp
        self.received, self.is_sender, self.is_timed = 0, False, is_timed

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.room.handshake)

    def data_received(self, data: bytes) -> None:
        if not self.entered.done():
            self.head, end, data = (self.head + data).partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in self.head[:20]:
                raise SystemExit(self.head.decode("latin-1"))
            self.entered.set_result(None)
        self.received += data.count(MARK) + (self.tail[-7:] + data[:7]).count(MARK)
        if self.is_timed:
            data, now = self.tail + data, time.time_ns()
            stamps = list(STAMP.finditer(data))
            self.room.waits += [now - int(stamp[1]) for stamp in stamps]
            self.tail = data[stamps[-1].end() if stamps else 0 :][-29:]
        elif self.is_sender:
            data = self.tail + data
            self.tail = data[-10:]
            self.send(data.count(self.mine))
        else:
            self.tail = (self.tail + data[-7:])[-7:]

    def send(self, count: int = 1) -> None:
        count = 0 if self.room.is_over else count
        self.transport.write(b"".join(self.room.next_frame(self.number) for _ in range(count)))


class Room:
    """All members, what they send, and what came of it."""

    def __init__(self, server: Server, text_size: int) -> None:
        self.server, self.text_size, self.handshake = server, text_size, server.handshake()
        self.loop = asyncio.get_running_loop()
        self.members: list[Member] = []
        self.waits: list[int] = []  # ns from sending to receiving, as some members saw it
        self.sent, self.is_over = 0, False

    async def enter(self, count: int) -> None:
        async def enter_one(number: int) -> None:
            member = Member(self, number, is_timed=number >= count - 5)
            self.members.append(member)
            await self.loop.create_connection(lambda: member, "127.0.0.1", self.server.port)
            await asyncio.wait_for(member.entered, 20)

        for first in range(0, count, 50):
            await asyncio.gather(*map(enter_one, range(first, min(count, first + 50))))

    def next_frame(self, number: int) -> bytes:
        """A message in a client's frame (RFC 6455, section 5.2), masked with zeros: legal, free."""
        self.sent += 1
        text = f"{MARK.decode()}{number:03}{time.time_ns()}".ljust(self.text_size, "x")
        if self.server.is_lobby:
            event = {"type": "message", "room": "lobby", "text": text, "mid": f"{self.sent}"}
            text = json.dumps(event)
        return struct.pack("!BBH4x", 0x81, 0x80 | 126, len(text)) + text.encode()

    def received(self) -> int:
        return sum(member.received for member in self.members)

    async def at_full_speed(self, seconds: float) -> dict[str, float]:
        for member in self.members[:16]:
            member.is_sender = True
            member.send(WINDOW)
        await asyncio.sleep(seconds / 5)
        return await self.measure(seconds)

    async def measure(self, seconds: float, rate: float = 0) -> dict[str, float]:
        """What happens within this time, in which so many further messages a second are sent."""
        self.waits.clear()
        received, (cpu, _), start = self.received(), self.server.usage(), time.perf_counter()
        for number in range(int(rate * seconds)):
            self.members[number % 4].send()
            await asyncio.sleep(start + (number + 1) / rate - time.perf_counter())
        await asyncio.sleep(start + seconds - time.perf_counter())
        took = time.perf_counter() - start
        received, cpu = self.received() - received, self.server.usage()[0] - cpu
        waits: list[float] = [*sorted(self.waits)] or [math.nan]
        p50, p99 = waits[len(waits) // 2] / 1e6, waits[len(waits) * 99 // 100] / 1e6
        found = {
            "per_second": received / took,
            "cpu": cpu / took,
            "cpu_us": cpu / max(received, 1) * 1e6,
        }
        return found | {"p50": p50, "p99": p99}

    async def delivered(self) -> float:
        """Which part of all deliveries came, once no more come."""
        self.is_over = True
        before = -1
        while before != (before := self.received()) < self.sent * len(self.members):
            await asyncio.sleep(2)
        return before / (self.sent * len(self.members))


class Server:
    """A server in a process of its own."""

    def __init__(self, name: str, folder: str) -> None:
        self.is_lobby = name == "Lobby"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        program = ROOT / "app.py" if self.is_lobby else Path(folder, "program.js")
        if not self.is_lobby:
            program.write_text(PUBLISH if name == "Bun" else TEXTBOOK)
        interpreter = shutil.which("bun") if name == "Bun" else sys.executable
        settings = {"CHAT_PORT": f"{self.port}", "CHAT_DB": f"{folder}/chat.db"}
        settings |= {"CHAT_RATE": "0", "CHAT_SOCKETS_PER_USER": "0", "CHAT_HOST": "127.0.0.1"}
        use_core(0)
        with open(f"{folder}/log", "wb") as log:
            more: Any = {"stdout": log, "stderr": log, "env": os.environ | settings}
            command = [str(interpreter), str(program), f"{self.port}"]
            self.process = subprocess.Popen(command, **more)  # noqa: S603
        use_core(1)
        for _ in range(200):  # until it serves
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.1)
        raise SystemExit(f"{name} does not serve:\n{Path(folder, 'log').read_text()}")

    def handshake(self) -> bytes:
        lines = [f"GET {'/ws/chat' if self.is_lobby else '/ws'} HTTP/1.1", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", f"Host: 127.0.0.1:{self.port}"]
        lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {'A' * 22}=="]
        if self.is_lobby:
            body = json.dumps({"username": "user1", "password": "password1"}).encode()
            url, kind = f"http://127.0.0.1:{self.port}/login", {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(url, body, kind)) as answer:
                token = json.load(answer)["access_token"]
            lines += [f"Sec-WebSocket-Protocol: lobby.v1, bearer.{token}"]
        return "\r\n".join([*lines, "", ""]).encode()

    def usage(self) -> tuple[float, float]:
        """The process's CPU so far in seconds, and its memory in KB; NaN where nobody tells."""
        with suppress(OSError):  # Linux
            proc = Path("/proc", f"{self.process.pid}")
            times = (proc / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
            (kb,) = re.findall(r"VmRSS:\s+(\d+)", (proc / "status").read_text())
            return sum(map(int, times)) / os.sysconf("SC_CLK_TCK"), int(kb)
        with suppress(OSError, ValueError):  # macOS
            command = ["ps", "-o", "time=,rss=", "-p", f"{self.process.pid}"]
            clock, kb = subprocess.check_output(command, text=True).split()  # noqa: S603
            minutes, seconds = clock.rsplit(":", 1)
            return float(minutes) * 60 + float(seconds), int(kb)
        return math.nan, math.nan


def use_core(index: int) -> None:
    """From now on run, and start others, on one core of several, where the system lets us."""
    if len(CORES) > 1:
        os.sched_setaffinity(0, {CORES[index]})


async def talk(server: Server, size: int, seconds: float) -> dict[str, float]:
    """Many enter, are quiet for a while, and then speak as fast as they can."""
    room = Room(server, text_size=100)
    cpu, memory = server.usage()
    await room.enter(size)
    await asyncio.sleep(1)  # until all were told of all
    after = server.usage()
    found = {"connect": (after[0] - cpu) / size * 1e6, "kb": (after[1] - memory) / size}
    quiet = await room.measure(seconds, rate=20)
    found |= {f"quiet_{name}": value for name, value in quiet.items()}
    return found | await room.at_full_speed(seconds)


async def stalled(server: Server, size: int, seconds: float) -> dict[str, float]:
    room = Room(server, text_size=3_500)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(room.handshake)
        reader.recv(64)  # and nothing more
        await room.enter(size)
        found = await room.measure(seconds, rate=500)
        found["delivered"] = await room.delivered()
        return found if found["delivered"] > 0.99 else found | {"p99": math.inf}


CASES = {  # the case, how many members it has, and for how many seconds they speak
    "hot": (talk, 216, 5),
    "crowd": (talk, 1_004, 6),
    "stalled": (stalled, 30, 8),
}
ROWS = [  # case, what was found, in words, and how it is written
    ("hot", "per_second", "hot: deliveries a second", ",.0f"),
    ("hot", "p50", "hot: a message's way, median, ms", ",.1f"),
    ("crowd", "per_second", "crowd: deliveries a second", ",.0f"),
    ("crowd", "p50", "crowd: a message's way, median, ms", ",.1f"),
    ("crowd", "quiet_cpu_us", "quiet: CPU for a delivery, µs", ",.1f"),
    ("crowd", "quiet_p50", "quiet: a message's way, median, ms", ",.1f"),
    ("crowd", "quiet_p99", "quiet: the slowest hundredth, ms", ",.1f"),
    ("stalled", "delivered", "stalled: of it all, what arrived", ".0%"),
    ("stalled", "p99", "stalled: the slowest hundredth, ms", ",.1f"),
    ("crowd", "connect", "connect: CPU for a member, µs", ",.0f"),
    ("crowd", "kb", "memory for a member, KB", ",.0f"),
]


def measure(case: str, name: str, quick: bool) -> dict[str, float]:
    print(f"{case}, {name} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = Server(name, folder)
        load, size, seconds = CASES[case]
        with server.process, asyncio.Runner(loop_factory=new_event_loop) as runner:
            try:
                return runner.run(load(server, *((40, 0.5) if quick else (size, seconds))))
            finally:
                server.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast is Lobby? See this file's first lines.")
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    quick = parser.parse_args().quick
    gc.disable()  # it would stop the load now and then
    with suppress(ImportError):  # Windows has no such limit
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        most = 4_096 if hard == resource.RLIM_INFINITY else min(4_096, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    names = ["textbook", "Lobby", *(["Bun"] if shutil.which("bun") else [])]
    found = {(case, name): measure(case, name, quick) for case in CASES for name in names}
    others = [name for name in names if name != "Lobby"]
    print(f"| | {' | '.join(names)} | {' | '.join(f'Lobby / {name}' for name in others)} |")
    print("|---|" + "---:|" * (len(names) + len(others)))
    for case, what, words, form in ROWS:
        values = {name: found[case, name][what] for name in names}
        cells = [format(value, form).replace("inf", "never") for value in values.values()]
        cells += [f"{values['Lobby'] / (values[name] or math.nan):.2f}" for name in others]
        print(f"| {words} | {' | '.join(cells)} |")
    print(f"\n{platform.system()} {platform.machine()}, {os.cpu_count()} cores", end=", ")
    print(f"Python {platform.python_version()}")
    idle = [" of ".join(key) for key in found if key[0] != "stalled" and found[key]["cpu"] < 0.9]
    if idle:
        print(
            f"The load, or another program, and not the server was the limit in {', '.join(idle)}"
        )


if __name__ == "__main__":
    main()
