"""The processes that are measured: mongod, the receiver and its peers, a delay proxy.

Each listens on a free port of loopback, and is stopped by its process id.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import pymongo
from environment import BENCH, GO_PEER, NODE_MODULES, ROOT

sys.path.insert(0, str(ROOT))
from receiver import find_mongod

PEERS = BENCH / "peers"
SHARED_SECRET = "benchmark-shared-secret"
PUBLIC_SECRET = "benchmark-public-secret"  # the receiver checks it, its peers need not
PATH = f"/webhook?secret={quote(PUBLIC_SECRET)}"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, seconds: float) -> Any:
    """Returns what the condition returns as soon as that is true.

    Raises TimeoutError after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.005)
    return result


class Process:
    """A process that is stopped on leaving its ``with``; its output goes to a log."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name.replace(' ', '-')}.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, command: Sequence[str], **environment: str) -> None:
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"], **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for the benchmark
            )

    def wait_ready(self, ready: Callable[[], Any]) -> None:
        """Raises RuntimeError, with the end of the log, if it ends instead."""

        def check() -> Any:
            if self.pid and self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended: {self.log_end()}")
            return ready()

        try:
            wait_until(check, f"{self.name} is ready", START_SECONDS)
        except TimeoutError as error:
            raise RuntimeError(f"{error}: {self.log_end()}") from None

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def family(pid: int) -> Iterator[int]:
    """Yields a process and its descendants: gunicorn has workers."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def cpu_seconds(pid: int) -> float:
    """Returns the processor time that a process and its descendants have used: proc(5)."""
    ticks = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{member}/stat").read_text()
            fields = stat.rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / CLOCK_TICKS


def machine_cpu_seconds() -> float:
    """Returns the time that all processors were busy, or taken by the hypervisor."""
    fields = Path("/proc/stat").read_text().split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS


def memory_bytes(pid: int, field: str) -> int:
    """Adds up VmRSS (now) or VmHWM (the most so far) of a process and its descendants."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/status").read_text().splitlines():
                if line.startswith(f"{field}:"):
                    total += int(line.split()[1]) * 1024
    return total


class Mongod(Process):
    """A single-node replica set: a majority insert waits for the journal on the disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__("mongod", folder)
        self.data = folder / "mongodb"
        self.data.mkdir()
        self.binary = find_mongod()
        if not self.binary:
            sys.exit("bench: no mongod: set MONGOD to its path")
        self.client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
            "127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=5000
        )
        self.start()
        member = {"_id": 0, "host": f"127.0.0.1:{self.port}"}
        configuration = {"_id": "bench", "members": [member]}
        self.client.admin.command("replSetInitiate", configuration)
        self.wait_primary()

    def start(self) -> None:
        self.spawn(
            [
                *(str(self.binary), "--dbpath", str(self.data), "--replSet", "bench"),
                *("--bind_ip", "127.0.0.1", "--port", str(self.port), "--nounixsocket"),
                *("--networkMessageCompressors", "disabled"),
                *("--wiredTigerCacheSizeGB", "1", "--quiet"),
            ]
        )
        self.wait_ready(self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(pymongo.errors.PyMongoError), pymongo.timeout(0.5):
            self.client.admin.command("ping")
            return True
        return False

    def wait_primary(self) -> None:
        admin = self.client.admin
        self.wait_ready(lambda: admin.command("hello").get("isWritablePrimary"))

    @property
    def uri(self) -> str:
        return self.uri_through(self.port)

    @staticmethod
    def uri_through(port: int) -> str:
        """Returns the URI that states the write concern, the same for receiver and peers.

        directConnection, as the replica set would name its own port, past a proxy.
        """
        return (
            f"mongodb://127.0.0.1:{port}/?directConnection=true&w=majority&journal=true"
        )

    def connect(self) -> pymongo.MongoClient[dict[str, Any]]:
        """Returns a client with the write concern that the servers have."""
        return pymongo.MongoClient(self.uri)

    def stop(self) -> None:
        """Its data folder is thrown away, so that nothing has to be flushed first."""
        self.client.close()
        self.kill()


@dataclass(frozen=True)
class Kind:
    """A server that can be started; ``{port}`` in the command is replaced."""

    name: str
    command: tuple[str, ...]


def receiver_kind(path: Path) -> Kind:
    return Kind(path.stem, (sys.executable, str(path)))


def peer_kinds() -> list[Kind]:
    plain = str(PEERS / "http_server.py")
    gunicorn = (sys.executable, "-m", "gunicorn", "--chdir", str(PEERS), "--workers=2")
    threads = ("--threads=8", "--keep-alive=60", "--bind=127.0.0.1:{port}")
    uvicorn = (sys.executable, "-m", "uvicorn", "--app-dir", str(PEERS))
    quiet = ("--no-access-log", "--log-level=warning", "--port={port}")
    return [
        Kind("http.server", (sys.executable, plain)),
        Kind("http.server-buffered", (sys.executable, plain, "buffered")),
        Kind("flask", (*gunicorn, *threads, "flask_app:app")),
        Kind("fastapi", (*uvicorn, *quiet, "fastapi_app:app")),
        Kind("fastify", ("node", str(PEERS / "fastify_app.js"))),
        Kind("go", (str(GO_PEER),)),
    ]


class Server(Process):
    """The receiver or a peer, with a database and a data folder of its own.

    ``start_seconds`` is the time from its start to its first answer.
    """

    def __init__(self, kind: Kind, folder: Path, mongodb_uri: str) -> None:
        super().__init__(kind.name, folder)
        self.kind = kind
        self.mongodb_uri = mongodb_uri
        self.database = "bench" + uuid.uuid4().hex
        self.data = folder / f"data-{self.database}"
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it refuses a request whose signature is wrong."""
        began = time.monotonic()
        self.spawn(
            [part.format(port=self.port) for part in self.kind.command],
            PORT=str(self.port),
            MONGODB_URI=self.mongodb_uri,
            MONGODB_DATABASE=self.database,
            SEGMENT_SHARED_SECRET=SHARED_SECRET,
            SEGMENT_PUBLIC_SECRET=PUBLIC_SECRET,
            RECEIVER_DATA_DIR=str(self.data),
            NODE_PATH=str(NODE_MODULES),
            NODE_ENV="production",
        )
        self.wait_ready(self.refuses)
        self.start_seconds = time.monotonic() - began

    def refuses(self) -> bool:
        headers = {"X-Signature": "0" * 40, "Content-Type": "application/json"}
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, payload = self.request("POST", PATH, b"{}", headers)
            if status != 401:
                raise RuntimeError(f"{self.name}: not 401 but {status} {payload!r}")
            return True
        return False

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[int, bytes]:
        """Sends a request on a connection of its own. Raises OSError, HTTPException."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read()

    def health(self) -> dict[str, Any]:
        """Returns the receiver's counters; no peer has any."""
        _, payload = self.request("GET", PATH.replace("/webhook", "/health"))
        return dict(json.loads(payload))


class DelayProxy(Process):
    """Passes bytes on to a port, each half a round trip later."""

    def __init__(self, folder: Path, target: int, round_trip: float) -> None:
        super().__init__("delay-proxy", folder)
        script = str(BENCH / "delay_proxy.py")
        arguments = (str(self.port), str(target), str(round_trip / 2))
        self.spawn([sys.executable, script, *arguments])
        self.wait_ready(self.listens)

    def listens(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False
