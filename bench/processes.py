"""The processes that are measured: mongod, the receiver and its peers.

Each listens on a free port of loopback, and is stopped by its process id.
"""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pymongo
from environment import OUT, PEERS, VENV

SHARED_SECRET = "benchmark-shared-secret"
PUBLIC_SECRET = "benchmark-public-secret"  # the receiver checks it, its peers need not
PATH = f"/webhook?secret={PUBLIC_SECRET}"

GUNICORN = (sys.executable, "-m", "gunicorn", "--workers=2", "--threads=8")
UVICORN = (sys.executable, "-m", "uvicorn", "--no-access-log", "--log-level=warning")
COMMANDS: dict[str, tuple[object, ...]] = {
    "http.server": (sys.executable, "http_server.py"),
    "flask": (*GUNICORN, "--keep-alive=60", "--bind=127.0.0.1:$PORT", "flask_app:app"),
    "fastapi": (*UVICORN, "--port=$PORT", "fastapi_app:app"),
    "fastify": ("node", "fastify_app.js"),
    "go": (OUT / "go_server",),
    "go-group-commit": (OUT / "go_server", "group-commit"),
}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    """Raises TimeoutError unless the condition is true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.005)


class Process:
    """A process that is ended on leaving its ``with``; its output is in bench/out."""

    def __init__(self, name: str) -> None:
        self.log = OUT / f"{name.replace('/', '-')}.log"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])

    def start(self, *command: object, **environment: str) -> None:
        """Returns when it is ready. Raises RuntimeError if it ends instead."""
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(part).replace("$PORT", str(self.port)) for part in command],
                env={"PATH": os.environ["PATH"], "PORT": str(self.port), **environment},
                cwd=PEERS,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for the benchmark
            )
        try:
            ended = self.process.poll
            wait_until(lambda: ended() is not None or self.ready(), f"see {self.log}")
            if ended() is not None:
                raise RuntimeError(f"it ended: see {self.log}")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.kill()

    def family(self, file: str) -> Iterator[str]:
        """Yields proc(5)'s file of it and its descendants: gunicorn has workers."""
        pids = [self.process.pid]
        for pid in pids:
            for children in Path("/proc").glob(f"{pid}/task/*/children"):
                with suppress(OSError):  # a thread may have ended
                    pids += map(int, children.read_text().split())
            yield Path(f"/proc/{pid}/{file}").read_text()

    def cpu_seconds(self) -> float:
        """Returns the processor time that it has used."""
        each = [text.rpartition(")")[2].split() for text in self.family("stat")]
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in each)
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self, field: str) -> float:
        """Returns VmRSS, its memory now, or VmHWM, the most so far, in MB."""
        lines = "".join(self.family("status")).splitlines()
        sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
        return sum(map(int, sizes)) * 1024 / 1e6


class Mongod(Process):
    """A single-node replica set: a majority insert waits for the journal on the disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__("mongod")
        # Of the package in requirements.txt, where there is no other.
        packaged = next(VENV.glob("lib/*/site-packages/fiftyone/db/bin/mongod"), None)
        binary = os.environ.get("MONGOD") or shutil.which("mongod") or packaged
        data = folder / "mongodb"
        data.mkdir()
        self.command = (
            *(binary, "--replSet", "bench", "--dbpath", data, "--quiet"),
            *("--bind_ip", "127.0.0.1", "--port", "$PORT", "--nounixsocket"),
        )
        options = "directConnection=true&w=majority&journal=true"
        self.uri = f"mongodb://127.0.0.1:{self.port}/?{options}"
        self.client = pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=1000)
        self.start(*self.command)

    def ready(self) -> bool:
        with suppress(pymongo.errors.PyMongoError):
            hello = self.client.admin.command("hello")
            if "setName" not in hello:
                members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
                configuration = {"_id": "bench", "members": members}
                self.client.admin.command("replSetInitiate", configuration)
            return bool(hello["isWritablePrimary"])
        return False


class Server(Process):
    """The receiver or a peer, with a database and a data folder of its own."""

    def __init__(self, name: str, folder: Path, mongod: Mongod) -> None:
        super().__init__(name)
        self.database = mongod.client["bench" + uuid.uuid4().hex]
        self.start(
            *COMMANDS[name],
            MONGODB_URI=mongod.uri,
            MONGODB_DATABASE=self.database.name,
            SEGMENT_SHARED_SECRET=SHARED_SECRET,
            SEGMENT_PUBLIC_SECRET=PUBLIC_SECRET,
            RECEIVER_DATA_DIR=str(folder / self.database.name),
            NODE_PATH=str(OUT / "node_modules"),
            NODE_ENV="production",
        )

    def ready(self) -> bool:
        """It is once it refuses a signature that is wrong."""
        return self.post(b"{}", "0" * 40) == 401

    def post(self, body: bytes, signature: str) -> int:
        """Returns the answer's status, or 0 if none came."""
        headers = {"Content-Type": "application/json", "X-Signature": signature}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with suppress(OSError, http.client.HTTPException), closing(connection):
            connection.request("POST", PATH, body, headers)
            return connection.getresponse().status
        return 0

    def check(self, acknowledged: int, in_flight: int) -> None:
        """Raises RuntimeError if acknowledged events are missing from MongoDB.

        Half a minute is for those that are spooled. What was in flight when wrk's time
        was over, and so has no answer, may be stored as well.
        """
        count = self.database["events"].count_documents
        with suppress(TimeoutError):
            wait_until(lambda: count({}) >= acknowledged, "all are there")
        before = -1
        while before != (before := count({})):
            time.sleep(0.25)
        self.database.client.drop_database(self.database.name)
        if not acknowledged <= before <= acknowledged + in_flight:
            raise RuntimeError(f"{acknowledged} acknowledged, but {before} documents")
