"""Receives Segment's webhooks, proves that they come from Segment, stores every event.

Read it from top to bottom: it goes down the page as an event passes through it.

1. Settings      flags, environment, credential files
2. Authenticity  is this body Segment's?
3. Events        bytes -> JSON -> documents ready for MongoDB
4. Storage       group commit into MongoDB, with a spool on disk behind it
5. HTTP          route, secret, length, signature, body, then 2, 3, 4 and one answer
6. Process       an embedded MongoDB, systemd, signals, main

Run ``python receiver.py`` and follow what it prints; README.md explains the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import gc
import hashlib
import hmac
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote, unquote_to_bytes

import bson
import bson.json_util
import pymongo
from bson.errors import InvalidDocument
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo.errors import BulkWriteError, InvalidName, OperationFailure, PyMongoError
from pymongo.write_concern import WriteConcern

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("receiver")

# --- 1. Settings ----------------------------------------------------------------------

LOCAL_MONGODB = "127.0.0.1:27017"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# CPython's select() takes 512 sockets on Windows, two of which are the server's own.
MOST_CONNECTIONS = 500 if sys.platform == "win32" else 100_000


class SettingsError(Exception):
    """A setting that cannot be used; its text is the one line that the user sees."""


def number(least: int, most: int) -> Callable[[str], int]:
    """Returns a converter that raises ValueError for all but a number in that range."""

    def convert(text: str) -> int:
        if not (re.fullmatch("[0-9]{1,18}", text) and least <= int(text) <= most):
            raise ValueError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return convert


def yes_or_no(text: str) -> bool:
    if text.lower() not in {"1", "true", "yes", "on", "0", "false", "no", "off"}:
        raise ValueError(f"{text!r} is neither yes nor no")
    return text.lower() in {"1", "true", "yes", "on"}


def database_name(text: str) -> str:
    if not re.fullmatch(r'[^/\\. "$*<>:|?\0]{1,63}', text):
        raise ValueError(f"{text!r} cannot be a MongoDB database's name")
    return text


def setting(default: Any, environment: str, help: str, convert: Any = str) -> Any:
    """Declares a field that a flag of the same name or the environment sets."""
    names = environment.split()
    metadata = {"help": help, "environment": names, "convert": convert}
    return dataclasses.field(default=default, metadata=metadata)


SECRETS_HELP = """\
Secrets come from the environment, or from a file in $CREDENTIALS_DIRECTORY (systemd),
never from the command line, which every user of the machine can read:
  SEGMENT_SHARED_SECRET, segment_shared_secret
      keys Segment's signature (default: none, made up for a demo)
  SEGMENT_PUBLIC_SECRET, segment_public_secret
      ?secret=... of the webhook's URL (default: none, the query is not checked)
  MONGODB_URI, mongodb_uri
      as --mongodb-uri, which takes no password
Several Segment secrets, separated by white space, are all accepted, for rotation.
MONGOD names the mongod to start; else PATH and requirements.txt's packages have one."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


@dataclasses.dataclass(frozen=True, repr=False)  # it holds secrets
class Settings:
    """All that can be set. Sizes are in bytes."""

    shared_secrets: tuple[bytes, ...]
    public_secrets: tuple[bytes, ...]
    events_secrets: tuple[bytes, ...]  # for GET /events
    made_up: bool = False  # the shared secret: this is somebody's first run
    demo: bool = False
    check: bool = False
    trust_batches: bool = setting(
        False,
        "SEGMENT_TRUST_BATCHES",
        "accept a batch of which Segment signed only the first event",
        yes_or_no,
    )
    mongodb_uri: str = setting(
        "",
        "MONGODB_URI",
        f"connection string; empty: a MongoDB on {LOCAL_MONGODB}, else one started there",
    )
    database: str = setting("segment", "MONGODB_DATABASE", "database", database_name)
    collection: str = setting("events", "MONGODB_COLLECTION", "collection")
    host: str = setting("127.0.0.1", "RECEIVER_HOST", "address to listen on")
    port: int = setting(8080, "RECEIVER_PORT PORT", "port", number(0, 65535))
    data_dir: str = setting(
        "data", "RECEIVER_DATA_DIR STATE_DIRECTORY", "holds spool/, rejected/, mongodb/"
    )
    max_body_bytes: int = setting(
        4 * MIB, "RECEIVER_MAX_BODY_BYTES", "largest body", number(1, GIB)
    )
    max_connections: int = setting(
        min(512, MOST_CONNECTIONS),
        "RECEIVER_MAX_CONNECTIONS",
        "most connections at once",
        number(1, MOST_CONNECTIONS),
    )
    max_spool_bytes: int = setting(
        GIB, "RECEIVER_MAX_SPOOL_BYTES", "largest spool/, rejected/", number(0, GIB**2)
    )

    @classmethod
    def load(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
        """Reads flags, environment and credential files; a flag beats the environment.

        Raises SettingsError; exits for --help.
        """
        parser = OneLineParser(
            prog="receiver.py",
            description="Stores every event that Segment's webhooks bring in MongoDB.",
            epilog=SECRETS_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for name, about in (
            ("--demo", "serve the demo page; on by itself without a shared secret"),
            ("--check", "test the settings, MongoDB and the spool, then exit"),
        ):
            parser.add_argument(name, action="store_true", help=about)
        options = {
            "--" + option.name.replace("_", "-"): option
            for option in dataclasses.fields(cls)
            if option.metadata
        }
        for flag, option in options.items():
            where = ", else ".join(option.metadata["environment"])
            parser.add_argument(
                flag,
                dest=flag,
                nargs="?" if option.type == "bool" else None,
                const="yes" if option.type == "bool" else None,
                help=f"{option.metadata['help']} [{where}; default {option.default or 'none'}]",
            )
        flags = vars(parser.parse_args(arguments))
        if re.search("//[^/@]*:[^/@]*@", flags["--mongodb-uri"] or ""):
            raise SettingsError(
                "--mongodb-uri: the process list would show its password: "
                "set MONGODB_URI instead"
            )

        values: dict[str, Any] = {"demo": flags["demo"], "check": flags["check"]}
        given = {**environment, **flags}
        for flag, option in options.items():
            for source in (flag, *option.metadata["environment"]):
                if given.get(source) and option.name not in values:
                    try:
                        values[option.name] = option.metadata["convert"](given[source])
                    except ValueError as error:
                        raise SettingsError(f"{source}: {error}") from None
        values.setdefault("mongodb_uri", secret("MONGODB_URI", environment))

        shared = secret("SEGMENT_SHARED_SECRET", environment).split()
        public = secret("SEGMENT_PUBLIC_SECRET", environment).split()
        values["made_up"] = not (shared or flags["check"])
        values["demo"] |= values["made_up"]
        host = values.get("host", cls.host)
        if values["demo"] and not is_loopback(host):
            why = "--demo" if shared else "no SEGMENT_SHARED_SECRET is set"
            raise SettingsError(f"{why}: --host must be loopback, not {host!r}")
        made_up = [secrets.token_urlsafe(24)]
        if values["made_up"]:
            shared = [secrets.token_urlsafe(24)]
            public = public or made_up
        values["shared_secrets"] = tuple(map(os.fsencode, shared))
        values["public_secrets"] = tuple(map(os.fsencode, public))
        values["events_secrets"] = tuple(map(os.fsencode, public or made_up))
        return cls(**values)


def secret(variable: str, environment: Mapping[str, str]) -> str:
    """Returns a secret from the environment or a systemd credential, else "".

    Raises SettingsError for a credential that is there and cannot be read.
    """
    folder = environment.get("CREDENTIALS_DIRECTORY")
    if environment.get(variable) or not folder:
        return environment.get(variable, "").strip()
    name = variable.lower()
    try:
        return os.fsdecode(Path(folder, name).read_bytes()).strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SettingsError(f"credential {name}: {error.strerror}") from None


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


# --- 2. Authenticity ------------------------------------------------------------------


class Refused(Exception):
    """A request or an event that is not accepted: HTTP status, reason for the sender."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}


def unavailable(reason: str) -> Refused:
    """503 asks Segment to try again, which it does for four hours."""
    return Refused(503, reason, Retry_After="5")


def sign(body: bytes, secret: bytes) -> bytes:
    """Returns Segment's ``X-Signature``: the hex HMAC-SHA1 of the body's exact bytes."""
    return hmac.digest(secret, body, "sha1").hex().encode()


def verify(body: bytes, signature: bytes, keys: Iterable[bytes]) -> bool:
    """Tells whether one of the secrets signed these bytes, in constant time for each."""
    return any(hmac.compare_digest(sign(body, key), signature) for key in keys)


# A brace, or a JSON string, whole or cut off by the end, so that a search stays linear.
STRING_OR_BRACE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{}]', re.DOTALL)
MAX_FIRST_EVENT_BYTES = 64 * KIB  # Segment's own limit for an event is 32 KB


def first_event(batch: bytes) -> bytes:
    """Returns the bytes of a JSON array's first object, found without parsing it."""
    depth = 0
    for match in STRING_OR_BRACE.finditer(batch, 1, MAX_FIRST_EVENT_BYTES):
        depth += {b"{": 1, b"}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == b"}":
            return batch[1 : match.end()]
        if depth > MAX_DEPTH:
            break
    return b""


def authenticate(body: bytes, signature: bytes, settings: Settings) -> None:
    """Raises Refused (401) unless Segment signed the body.

    Of a batch Segment signs ``JSON.stringify(events[0])`` only, whose bytes follow the
    ``[``: that proves a batch of one, and a longer one if the operator trusts its rest.
    """
    keys = settings.shared_secrets
    if verify(body, signature, keys):
        return
    is_batch = body[:1] == b"["
    if is_batch and body[-1:] == b"]" and verify(body[1:-1], signature, keys):
        return
    reason = "X-Signature does not match the body"
    first = first_event(body) if is_batch else b""
    if first and verify(first, signature, keys):
        if settings.trust_batches:
            return
        reason = "Segment signs only the first event of a batch, the rest is unproven: "
        reason += "turn batching off, or set SEGMENT_TRUST_BATCHES=1"
    raise Refused(401, reason)


# --- 3. Events ------------------------------------------------------------------------

# https://www.mongodb.com/docs/manual/reference/limits/
MAX_DEPTH = 100
MAX_BSON_BYTES = 16 * MIB
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def integer(digits: str) -> int | float:
    """BSON's integers have 64 bits; a larger one was a double in Segment's JavaScript."""
    if len(digits) < 19 or (len(digits) < 21 and -(1 << 63) <= int(digits) < 1 << 63):
        return int(digits)
    return float(digits)


def not_json(constant: str) -> NoReturn:
    raise Refused(400, f"not JSON: {constant} is not JSON")


# json.loads would guess UTF-16 and take NaN; int() refuses more than 4300 digits.
DECODER = json.JSONDecoder(parse_int=integer, parse_constant=not_json)


class Document(NamedTuple):
    """An event ready for MongoDB."""

    id: Any
    bson: bytes


class Events(NamedTuple):
    """What a body held; ``faults`` are the reasons why events of a batch cannot be stored."""

    is_batch: bool
    documents: list[Document]
    faults: list[str]


def parse_events(body: bytes) -> Events:
    """Turns an authentic body into documents.

    Raises Refused: 400 unless it is a JSON object or an array of objects in UTF-8, 422
    for one object that MongoDB cannot hold.
    """
    try:
        value = DECODER.decode(str(body, "utf-8"))
    except RecursionError:
        raise Refused(422, TOO_DEEP) from None
    except UnicodeDecodeError as error:
        raise Refused(400, f"not UTF-8: at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Refused(400, f"not JSON: at character {error.pos}") from None
    is_batch = isinstance(value, list)
    parsed = Events(is_batch, [], [])
    events = value if is_batch else [value]
    if not all(isinstance(event, dict) for event in events):
        raise Refused(400, "neither a JSON object nor an array of objects")
    for index, event in enumerate(events):
        try:
            parsed.documents.append(to_document(event))
        except Refused as refused:
            if not is_batch:
                raise
            parsed.faults.append(f"event {index}: {refused.reason}")
    return parsed


def depth(value: Any) -> int:
    """Returns how many objects and arrays are nested in one another."""
    levels, level = 0, [value]
    while level:
        levels += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
    return levels


def to_document(event: dict[str, Any]) -> Document:
    """Encodes an event. Raises Refused (422) for what BSON cannot hold.

    ``messageId`` is unique and stays the same over Segment's retries and replays: as
    ``_id`` it makes storing an event a second time impossible.
    """
    if "_id" not in event:
        name = event.get("messageId")
        event["_id"] = name if name and isinstance(name, str) else ObjectId()
    try:
        try:
            encoded = bson.encode(event)
        except UnicodeEncodeError:  # a string that JavaScript cut in a surrogate pair
            event = without_lone_surrogates(event)
            encoded = bson.encode(event)
    except InvalidDocument as error:
        raise Refused(422, str(error)) from None
    except RecursionError:
        raise Refused(422, TOO_DEEP) from None
    # Nesting that deep takes more bytes of these types than most events have.
    levels = encoded.count(b"\x03") + encoded.count(b"\x04")
    if levels > MAX_DEPTH and depth(event) > MAX_DEPTH:
        raise Refused(422, TOO_DEEP)
    if (size := len(encoded)) > MAX_BSON_BYTES:
        raise Refused(422, f"BSON of {size} bytes, MongoDB takes {MAX_BSON_BYTES}")
    return Document(event["_id"], encoded)


def without_lone_surrogates(value: Any) -> Any:
    """Returns a copy with U+FFFD for each. Raises Refused if two keys become one by it."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [without_lone_surrogates(item) for item in value]
    if not isinstance(value, dict):
        return value
    clean = without_lone_surrogates
    copy = {clean(name): clean(item) for name, item in value.items()}
    if len(copy) != len(value):
        raise Refused(422, "two keys differ only in a lone surrogate")
    return copy


# --- 4. Storage -----------------------------------------------------------------------

Client = pymongo.MongoClient[dict[str, Any]]

ANSWER_SECONDS = 4.25  # Segment waits five; it is checked every CHECK_SECONDS
INSERT_SECONDS = 1.8  # an event waits for the insert before its own, and for its own
DRAIN_SECONDS = 15.0
PROBE_SECONDS = 0.5  # while MongoDB is down
WATCH_SECONDS = 2.0  # while it is up
WEDGED_SECONDS = 20.0
# A batch goes at once if none is in flight, else this long after the last one. To a near
# MongoDB it is one at a time: 16 events of 32 connections, and an added one each 0.5 ms
# took a seventh of the throughput. With 256 connections and MongoDB 20 ms away the median
# answer takes 2.5 round trips with one in flight, 1.6 with four, 1.5 with eight
# (bench/run.py --latency 20).
BATCH_SECONDS = 0.005
COMMITTERS = 4  # the most batches in flight
MAX_BATCH_EVENTS = 1000
MAX_BATCH_BYTES = 16 * MIB
MAX_WAITING_EVENTS = 20_000

# https://github.com/mongodb/mongo/blob/master/src/mongo/base/error_codes.yml
DUPLICATE_KEY = 11000
# A failed command is an outage, unless its code says that a document is at fault ...
DOCUMENT_FAULTS = {
    2, 9, 15, 22, 51, 52, 53, 54, 55, 56, 57, 121, 10334, 17280, 17419, 17420,
}  # fmt: skip
# ... and a write error is its document's fault, unless its code is about the server.
OUTAGE_CODES = {
    6, 7, 11, 13, 18, 24, 43, 46, 50, 63, 64, 89, 91, 100, 112, 117, 133, 134, 150, 166,
    189, 202, 216, 225, 239, 250, 251, 262, 290, 314, 317, 334, 358, 371, 384, 391,
    402, 8000, 9001, 10003, 10058, 10107, 11600, 11601, 11602, 12501, 13388, 13435,
    13436, 14031,
}  # fmt: skip
# Authorised, sent to the primary, committed, and refused for its _id: nothing is stored.
PROBE = bson.encode({"_id": []})

# What became of a document: "stored", "duplicate", "spooled", or refused.
Result = str | Refused


class Outage(Exception):
    """MongoDB cannot take a batch now, through no fault of a document."""


def brief(error: BaseException) -> str:
    """Returns an error's kind and first words: pymongo appends its view of the cluster."""
    words = re.split(", (?:Timeout|full error):", str(error))[0]
    return f"{type(error).__name__}: {words[:200]}"


class Folder:
    """Files that survive a power cut, limited in their total size (``bytes``)."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Makes the folder if need be, locks it and looks into it. Raises OSError."""
        self.path = path
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._reserved = 0  # bytes that are being written
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(path.parent)
        lock_folder(path)
        # Cut off as they were written, so never promised; under the lock nobody's else.
        for unfinished in path.glob(".tmp-*"):
            with contextlib.suppress(OSError):
                unfinished.unlink()
        self._scan()

    def _scan(self) -> None:
        with os.scandir(self.path) as entries:
            self._sizes = {
                entry.name: entry.stat().st_size
                for entry in entries
                if entry.is_file(follow_symlinks=False) and entry.name[0] != "."
            }
        self.bytes = sum(self._sizes.values())
        self._next_scan = time.monotonic() + 1

    def __len__(self) -> int:
        return len(self._sizes)

    def names(self) -> list[str]:
        """Returns the files' names, sorted: oldest first where they begin with a time."""
        with self._lock:
            return sorted(self._sizes)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file whole and durably, or not at all. Raises OSError."""
        with self._lock:
            room = self.max_bytes - self._reserved - len(data)
            if self.bytes > room and time.monotonic() > self._next_scan:
                self._scan()  # an operator may have made room
            if self.bytes > room:
                raise OSError(errno.EDQUOT, f"limit of {self.max_bytes} bytes reached")
            self._reserved += len(data)
        temporary = self.path / f".tmp-{threading.get_ident()}-{name}"
        try:
            # For its owner only: events hold personal data.
            with open(temporary, "xb", opener=partial(os.open, mode=0o600)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
            sync_folder(self.path)
            with self._lock:
                self.bytes += len(data) - self._sizes.get(name, 0)
                self._sizes[name] = len(data)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            with self._lock:
                self._reserved -= len(data)

    def remove(self, name: str) -> None:
        """Removes a file. Raises OSError."""
        (self.path / name).unlink(missing_ok=True)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Leaves a file to the operator, until the next start or scan."""
        with self._lock:
            self.bytes -= self._sizes.pop(name, 0)

    def probe(self) -> None:
        """Finds out whether an ordinary event could be written. Raises OSError."""
        self.write(".tmp-probe", bytes(4096))
        self.remove(".tmp-probe")


def sync_folder(path: Path) -> None:
    """Makes a rename durable; Windows cannot open a folder, and does so by itself."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock_folder(path: Path) -> None:
    """Locks a folder until the process ends, however it ends. Raises OSError if taken."""
    if sys.platform == "win32":
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError from None
    else:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def split_bson(data: bytes) -> tuple[list[bytes], bool]:
    """Splits concatenated BSON documents; tells whether they are all there is."""
    documents, position = [], 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "little")
        document = data[position : position + size]
        if size < 5 or len(document) < size or document[-1] != 0:
            break
        documents.append(document)
        position += size
    return documents, 0 < position == len(data)


@dataclasses.dataclass(slots=True)
class Submission:
    """One request's documents on their way; ``done`` is called when it has ``results``."""

    documents: list[bytes]
    done: Callable[[], None]
    results: Sequence[Result] = ()


class Storage:
    """Stores documents in MongoDB, or on disk while MongoDB cannot take them.

    A committer takes all that was submitted and inserts it at once: one journal flush
    serves every event that came during the last one. While ``up`` is false, batches go to
    the spool; the tender (a thread in ``_tend``) delivers it when MongoDB is back.
    ``counters`` are events since the start; ``wake`` is called after each batch.
    """

    def __init__(self, client: Client, settings: Settings) -> None:
        """Locks and reads the data folder. Raises SettingsError."""
        self.collection = open_collection(client, settings)
        data, most = Path(settings.data_dir), settings.max_spool_bytes
        try:
            self.spool = Folder(data / "spool", most)
            self.rejected = Folder(data / "rejected", most)
        except BlockingIOError:
            raise SettingsError(f"{data}: another receiver uses it") from None
        except OSError as error:
            raise SettingsError(f"{data}: {error.strerror}") from None
        self.up = True
        self.counters = Counter(stored=0, duplicates=0, rejected=0, spooled=0)
        self.wake: Callable[[], None] = lambda: None
        self._client = client
        self._disk_ok = True
        self._lock = threading.Lock()  # guards up and counters
        self._turn = threading.Condition()  # of a committer; guards the next five
        self._queue: deque[Submission] = deque()
        self._waiting = 0  # events in the queue or with a committer
        self._in_flight: dict[int, float] = {}  # committer's id: when it took its batch
        self._next_batch = 0.0  # when another may be sent beside them
        self._timing = False  # whether a committer waits for that time
        self._spool_numbers = itertools.count()
        self._stopping = threading.Event()
        self._alarm = threading.Event()  # set while MongoDB is down, and to stop
        self._committers = [
            threading.Thread(target=self._commit_forever, daemon=True)
            for _ in range(COMMITTERS)
        ]
        self._tender = threading.Thread(target=self._tend, daemon=True)

    def start(self) -> None:
        """Asks MongoDB once, so that ``up`` is true to fact, and starts the threads."""
        try:
            self.probe()
        except (Outage, PyMongoError) as error:
            self._went_down(error)
        for thread in (*self._committers, self._tender):
            thread.start()

    def close(self) -> None:
        """Stores or spools what waits, then stops."""
        self._stopping.set()
        self._alarm.set()
        with self._turn:
            self._turn.notify_all()
        for thread in self._committers:
            thread.join(ANSWER_SECONDS)
        self._tender.join(0.5)  # what it has under way is still in the spool
        with pymongo.timeout(0.5):  # it takes leave of a MongoDB that may be gone
            self._client.close()

    def submit(self, documents: list[bytes], done: Callable[[], None]) -> Submission:
        """Returns what will have the results of ``commit``, in the documents' order.

        ``done`` is called then, in another thread. Raises Refused (503) when too much is
        in flight.
        """
        submission = Submission(documents, done)
        with self._turn:
            if self._waiting and self._waiting + len(documents) > MAX_WAITING_EVENTS:
                raise unavailable("too many events in flight")
            self._waiting += len(documents)
            self._queue.append(submission)
        return submission

    def commit(self) -> None:
        """Sends a committer on its way with all that was submitted."""
        if self._queue:
            with self._turn:
                # One that waits for the time of the next batch takes it anyway.
                if not (self._in_flight and self._timing):
                    self._turn.notify()

    def reject(self, data: bytes, reason: str, suffix: str, events: int = 1) -> None:
        """Keeps what can never be stored, and why. Raises Refused (503) if it cannot."""
        folder = self.rejected
        name = hashlib.sha256(data).hexdigest()[:32]  # again the same, the same file
        try:
            folder.write(f"{name}.reason.txt", f"{reason}\n".encode("utf-8", "replace"))
            folder.write(name + suffix, data)
        except OSError as error:
            log.error("cannot write to %s: %s", folder.path, error.strerror)
            raise unavailable("it cannot be stored, and not be kept either") from None
        self._count("rejected", events)
        log.warning("kept as %s: %s", folder.path / (name + suffix), reason[:300])

    def newest(self, limit: int) -> str:
        """Returns the last documents as relaxed Extended JSON. Raises Refused (503)."""
        relaxed = bson.json_util.RELAXED_JSON_OPTIONS
        try:
            with pymongo.timeout(INSERT_SECONDS):
                found = self.collection.find().sort("$natural", -1).limit(limit)
                return bson.json_util.dumps(found, json_options=relaxed)
        except PyMongoError as error:
            log.warning("the demo cannot read MongoDB: %s", brief(error))
            raise unavailable("MongoDB cannot be read now") from None

    @property
    def failing(self) -> bool:
        """Whether an event that came now could not be kept."""
        return not self.up and not self._disk_ok

    def alive(self) -> bool:
        """Whether all threads run, and no committer has been at one batch for too long."""
        with self._turn:
            oldest = min(self._in_flight.values(), default=math.inf)
        wedged = time.monotonic() - oldest > WEDGED_SECONDS
        threads = (*self._committers, self._tender)
        return not wedged and all(thread.is_alive() for thread in threads)

    def probe(self) -> None:
        """Asks MongoDB to insert what it must refuse. Raises Outage or PyMongoError.

        A ping would be answered while a full cluster or a revoked role takes no insert.
        """
        self._insert([PROBE], INSERT_SECONDS)

    # Group commit

    def _commit_forever(self) -> None:
        while batch := self._take():
            self._commit_batch(batch)
            del batch  # it may be large, and the next one far

    def _commit_batch(self, batch: list[Submission]) -> None:
        documents = [d for submission in batch for d in submission.documents]
        try:
            results = self._commit(documents)
        except Exception:
            log.exception("a batch could not be stored")
            results = [unavailable("internal error")] * len(documents)
        with self._turn:
            self._waiting -= len(documents)
            del self._in_flight[threading.get_ident()]
        remaining = iter(results)
        for submission in batch:
            submission.results = [next(remaining) for _ in submission.documents]
            submission.done()
        self.wake()

    def _take(self) -> list[Submission]:
        """Waits for its turn and returns all that waits by then; nothing at the end."""
        with self._turn:
            while True:
                now = time.monotonic()
                if self._queue and (not self._in_flight or now >= self._next_batch):
                    break
                if self._queue:
                    self._timing = True
                    self._turn.wait(self._next_batch - now)
                    self._timing = False
                elif self._stopping.is_set():
                    return []
                else:
                    self._turn.wait()
            batch: list[Submission] = []
            events = size = 0
            while self._queue and events < MAX_BATCH_EVENTS and size < MAX_BATCH_BYTES:
                submission = self._queue.popleft()
                batch.append(submission)
                events += len(submission.documents)
                size += sum(map(len, submission.documents))
            self._in_flight[threading.get_ident()] = now
            self._next_batch = now + BATCH_SECONDS
            if self._queue:
                self._turn.notify()
            return batch

    def _commit(self, documents: list[bytes]) -> list[Result]:
        """Stores a batch in MongoDB if it is up, else on disk."""
        if self.up:
            try:
                return self._insert(documents, INSERT_SECONDS)
            except (Outage, PyMongoError) as error:
                self._went_down(error)
        number = next(self._spool_numbers)
        name = f"{time.time_ns():020d}-{number:06d}-{len(documents)}.bson"
        try:
            self.spool.write(name, b"".join(documents))
        except OSError as error:
            if self._disk_ok:
                log.error("events are answered 503: %s: %s", self.spool.path, error)
            self._disk_ok = False
            refused = unavailable("neither MongoDB nor the disk can take it")
            return [refused] * len(documents)
        self._disk_ok = True
        self._count("spooled", len(documents))
        return ["spooled"] * len(documents)

    def _insert(self, documents: Sequence[bytes], seconds: float) -> list[Result]:
        """Inserts documents, returns what became of each. Raises Outage, PyMongoError."""
        results: list[Result] = ["stored"] * len(documents)
        try:
            raw = map(RawBSONDocument, documents)
            with pymongo.timeout(seconds):
                self.collection.insert_many(raw, ordered=False)
        except BulkWriteError as error:
            for fault in error.details["writeConcernErrors"]:
                raise Outage(fault["errmsg"]) from None
            for fault in error.details["writeErrors"]:
                if fault["code"] in OUTAGE_CODES:
                    raise Outage(fault["errmsg"]) from None
                stored = fault["code"] == DUPLICATE_KEY
                if stored and fault.get("keyPattern") == {"_id": 1}:
                    results[fault["index"]] = "duplicate"
                else:
                    reason = f"MongoDB: {fault['errmsg']}"
                    results[fault["index"]] = Refused(422, reason)
        except (OperationFailure, InvalidDocument) as error:
            known = isinstance(error, InvalidDocument) or error.code in DOCUMENT_FAULTS
            if not known:
                raise
            # For one document's sake the server refused the command, and stored nothing.
            if documents[0] is PROBE:  # so it takes no document at all
                raise Outage(brief(error)) from None
            if len(documents) == 1:
                self.probe()
                return [Refused(422, f"MongoDB: {str(error)[:200]}")]
            middle = len(documents) // 2
            first = self._insert(documents[:middle], seconds)
            return first + self._insert(documents[middle:], seconds)
        self._count("stored", results.count("stored"))
        self._count("duplicates", results.count("duplicate"))
        return results

    def _count(self, counter: str, events: int) -> None:
        with self._lock:
            self.counters[counter] += events

    # Outages

    def _went_down(self, error: Exception) -> None:
        with self._lock:
            was_up, self.up = self.up, False
            self._alarm.set()
        if was_up:
            message = "MongoDB cannot take events, they go to %s until it can: %s"
            log.warning(message, self.spool.path, brief(error))

    def _came_up(self) -> None:
        with self._lock:
            was_up, self.up = self.up, True
            self._alarm.clear()
        if not was_up:
            log.info("MongoDB takes events again")

    def _tend(self) -> None:
        """Delivers the spool, and finds out when MongoDB goes and comes back."""
        last_trouble = ""
        pause = 0.0
        while not self._stopping.wait(pause):
            trouble = ""
            try:
                self.probe()
                self._drain()
                self._came_up()
            except (Outage, PyMongoError) as error:
                self._went_down(error)
            except OSError as error:  # of the disk: MongoDB took the probe
                self._came_up()
                trouble = f"{self.spool.path} cannot be delivered: {error}"
            except Exception:
                log.exception("%s cannot be delivered", self.spool.path)
            if self.failing:
                with contextlib.suppress(OSError):
                    self.spool.probe()
                    self._disk_ok = True
            if trouble and trouble != last_trouble:
                log.error("%s", trouble)
            last_trouble = trouble
            self._alarm.wait(WATCH_SECONDS)
            pause = PROBE_SECONDS

    def _drain(self) -> None:
        """Delivers every file, oldest first. Raises what ``_insert`` raises, OSError."""
        started = reported = time.monotonic()
        delivered = 0
        while (names := self.spool.names()) and not self._stopping.is_set():
            began = time.monotonic()
            if not delivered or began - reported > 10:
                speed = delivered / (began - started + 1)
                message = "spool: %d files with %d events left, %.0f events/s"
                log.info(message, len(names), count_events(names), speed)
                reported = began
            delivered += self._deliver(names)
            self._came_up()
            # New events have MongoDB to themselves for two thirds of the time.
            self._stopping.wait(2 * (time.monotonic() - began))
        if delivered:
            seconds = time.monotonic() - started
            log.info("spool: %d events delivered in %.1f s", delivered, seconds)

    def _deliver(self, names: Iterable[str]) -> int:
        """Inserts the first files as one batch, removes them, and returns their events.

        Every document has its ``_id``, so insertion is idempotent: a crash before the
        removal costs nothing.
        """
        taken: list[tuple[str, bytes, int]] = []  # name, data if it is torn, events
        documents: list[bytes] = []
        for name in names:
            try:
                data = (self.spool.path / name).read_bytes()
            except OSError as error:
                log.error("spool/%s is left out: %s", name, error.strerror)
                self.spool.forget(name)
                continue
            found, whole = split_bson(data)
            taken.append((name, b"" if whole else data, len(found)))
            documents += found
            size = sum(map(len, documents))
            if len(documents) >= MAX_BATCH_EVENTS or size >= MAX_BATCH_BYTES:
                break
        results = self._insert(documents, DRAIN_SECONDS) if documents else []
        settle = self.spool.remove
        try:
            for name, data, events in taken:
                if data or not events:
                    fault = f"torn, empty or foreign after {events} events"
                    self.reject(data, f"spool/{name} is {fault}", ".bson", events=0)
            for document, result in zip(documents, results):
                if isinstance(result, Refused):
                    self.reject(document, result.reason, ".bson")
        except Refused:  # they stay where they are
            settle = self.spool.forget
        for name, _, _ in taken:
            settle(name)
        return len(documents)


def count_events(names: Iterable[str]) -> int:
    """Adds up what the spool's file names say of their contents."""
    found = (re.search(r"-(\d+)\.bson$", name) for name in names)
    return sum(int(match[1]) for match in found if match)


def open_collection(client: Client, settings: Settings) -> Any:
    """Returns the collection; its write concern is majority and journaled by default.

    Raises SettingsError for a name or a write concern that cannot be used.
    """
    given = client.write_concern.document
    if given.get("w") == 0:
        raise SettingsError("MONGODB_URI: with w=0 MongoDB never says that it stored")
    concern = WriteConcern(**{"w": "majority", "j": True, **given})
    try:
        database = client[settings.database]
        return database.get_collection(settings.collection, write_concern=concern)
    except InvalidName as error:
        raise SettingsError(f"database or collection: {error}") from None


# --- 5. HTTP --------------------------------------------------------------------------

# RFC 9110 section 5.6.2, RFC 9112 sections 3 and 5, and stricter: no obs-fold, no bare CR
# or LF, origin-form only. What two parsers could read in two ways is refused.
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(%s) (/[\x21-\x7e]*) HTTP/1\.([01])" % TOKEN)
FIELD_LINE = re.compile(rb"(%s):([\t\x20-\x7e\x80-\xff]*)" % TOKEN)
HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
CONTENT_LENGTH = re.compile(rb" ?[0-9]{1,19}")
NOT_IN_REQUEST_LINE = re.compile(rb"[^\x20-\x7e\r]")
BARE_CR_OR_LF = re.compile(rb"\r(?!\n|\Z)|(?<!\r)\n")
SIGNATURE = re.compile(rb"[0-9a-f]{40}")
MAX_TARGET_BYTES = 8 * KIB
MAX_HEAD_BYTES = 32 * KIB
MAX_FIELDS = 100

HEAD_SECONDS = 10.0
BODY_SECONDS = 10.0
BODY_BYTES_PER_SECOND = 100_000
IDLE_SECONDS = 60.0
SEND_SECONDS = 10.0
LINGER_SECONDS = 10.0
STOP_IDLE_SECONDS = 0.5
CHECK_SECONDS = 0.25
MAX_ACCEPTS = 64
GRACE_SECONDS = 0.1
COUNT_SECONDS = 60.0
SMALL_BODY_BYTES = 64 * KIB  # max_connections bounds how many of these are held
MAX_LARGE_BODY_BYTES = 64 * MIB  # for all larger ones together

# What a connection is doing. Only a BUSY one may have an event on its way to MongoDB.
IDLE, HEAD, WAIT, BODY, BUSY, SEND, LINGER = range(7)

# What it waits for.
RESULT, READ, WRITE = 0, selectors.EVENT_READ, selectors.EVENT_WRITE
T = TypeVar("T")
Conversation = Generator[int, None, T]
Work = Callable[..., T]


class Head(NamedTuple):
    """A request's head; field names in lower case, repeated fields joined by ", "."""

    method: bytes = b""
    path: bytes = b""
    query: bytes = b""
    minor_version: bytes = b"1"
    fields: Mapping[bytes, bytes] = {}

    def field(self, name: bytes) -> bytes:
        return self.fields.get(name, b"").strip(b" \t")


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    payload: bytes
    headers: Mapping[str, str] = {}
    media_type: str = "application/json"


def as_json(status: int, value: Any, headers: Mapping[str, str] = {}) -> Answer:
    return Answer(status, json.dumps(value).encode() + b"\n", headers)


def refusal(refused: Refused) -> Answer:
    return as_json(refused.status, {"error": refused.reason}, refused.headers)


def parse_request_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Returns method, target and minor version. Raises Refused: 400 or 414."""
    match = REQUEST_LINE.fullmatch(line)
    if len(match[2] if match else line) > MAX_TARGET_BYTES:
        raise Refused(414, "request target too long")
    if not match:
        raise Refused(400, "malformed HTTP: request line")
    return match[1], match[2], match[3]


def check_incomplete_head(data: bytes, checked: int) -> None:
    """Raises Refused as soon as a head's beginning shows that all of it will be.

    ``checked`` bytes were seen before: a head that comes byte by byte must not cost the
    square of its length.
    """
    if BARE_CR_OR_LF.search(data, max(checked - 1, 0)):
        raise Refused(400, "malformed HTTP: bare CR or LF")
    end = data.find(b"\r\n", 0, MAX_TARGET_BYTES + 64)
    if end < 0:
        # A TLS client, for one, waits for an answer to bytes that have no line end.
        if NOT_IN_REQUEST_LINE.search(data, checked):
            raise Refused(400, "malformed HTTP: request line")
        if len(data) > MAX_TARGET_BYTES + 64:
            raise Refused(414, "request target too long")
    elif end + 2 > checked:
        parse_request_line(data[:end])
    if len(data) > MAX_HEAD_BYTES + 3:  # its end may have come in part
        raise Refused(431, "request head too large")


def parse_head(data: bytes) -> Head:
    """Parses a head without its empty line. Raises Refused: 400, 414 or 431."""
    line, *field_lines = data.split(b"\r\n")
    method, target, minor_version = parse_request_line(line)
    if len(data) > MAX_HEAD_BYTES or len(field_lines) > MAX_FIELDS:
        raise Refused(431, "request head too large")
    fields: dict[bytes, bytes] = {}
    for line in field_lines:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise Refused(400, "malformed HTTP: header field")
        name, value = match[1].lower(), match[2]
        if name in fields and name in (b"host", b"content-length"):
            raise Refused(400, "malformed HTTP: repeated Host or Content-Length")
        fields[name] = fields[name] + b", " + value if name in fields else value
    path, _, query = target.partition(b"?")
    head = Head(method, path, query, minor_version, fields)
    if not HOST.fullmatch(head.field(b"host")):
        raise Refused(400, "malformed HTTP: Host")
    if b"host" not in fields and minor_version == b"1":
        raise Refused(400, "malformed HTTP: Host is missing")
    if not CONTENT_LENGTH.fullmatch(fields.get(b"content-length", b"0")):
        raise Refused(400, "malformed HTTP: Content-Length")
    return head


def parse_query(query: bytes) -> dict[bytes, bytes]:
    """Returns a query's values, the last of each name; "+" is a plus, not a space."""
    pairs = (pair.partition(b"=") for pair in query.split(b"&"))
    return {unquote_to_bytes(name): unquote_to_bytes(value) for name, _, value in pairs}


class Handler(BaseHTTPRequestHandler):
    """One connection: a conversation, which stops at each ``yield`` for what it names.

    READ and WRITE wait for the socket, RESULT for a turn that the server's ``post`` or
    ``wake`` gives: a thread has done its work, or a large body has made room. Thus one
    thread serves all connections, none of which may keep it. ``phase`` says what it is
    doing, ``since`` when it last completed a request. When ``deadline`` has passed the
    server raises an exception at the ``yield``, so that no trickle of bytes extends it.
    Both are monotonic seconds.
    """

    server: Server

    def setup(self) -> None:
        self.connection: socket.socket = self.request
        self.connection.setblocking(False)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.settings = self.server.settings
        self.storage = self.server.storage
        self.buffer = b""
        self.evicted = False  # to make room
        self.patience = ANSWER_SECONDS  # from the end of the body to the answer
        self.since = time.monotonic()
        self.enter(IDLE, HEAD_SECONDS)
        self.conversation = self.converse()
        self.waits_for = self.watched = RESULT

    def handle(self) -> None:
        self.server.register(self)

    def finish(self) -> None:
        """The conversation has only begun."""

    def enter(self, phase: int, seconds: float) -> None:
        self.phase = phase
        self.deadline = time.monotonic() + seconds

    def converse(self) -> Conversation[None]:
        """Reads requests and answers them, until the connection is to be closed."""
        yield from self.exchange()
        while not self.close_connection:
            if self.buffer:  # a pipelined request: first it is the others' turn
                self.server.wake(self)
                yield RESULT
            yield from self.exchange()
        if self.phase == LINGER:
            # Unread bytes turn a close into a reset, and the answer could not be read.
            self.buffer = b""
            self.connection.shutdown(socket.SHUT_WR)
            while (yield from self.read()):
                pass

    def exchange(self) -> Conversation[None]:
        """Reads a request and answers it. Raises OSError when the client has gone."""
        self.close_connection = True
        self.head = Head()
        self.unread = 0  # bytes of the body that are still to come
        try:
            if not (yield from self.read_head()):
                return
            answer = yield from self.respond()
        except Refused as refused:
            self.server.count_refusal(refused)
            answer = refusal(refused)
        except OSError:
            raise
        except Exception:
            log.exception("internal error")
            answer = refusal(unavailable("internal error"))
        yield from self.send(answer)
        self.since = time.monotonic()

    # Waiting

    def read(self) -> Conversation[bytes]:
        """Waits for bytes and returns them, none at their end."""
        while True:
            yield READ
            try:
                return self.connection.recv(64 * KIB)
            except BlockingIOError:
                pass

    def write(self, data: bytes) -> Conversation[None]:
        left = memoryview(data)
        while left:
            try:
                left = left[self.connection.send(left) :]
            except BlockingIOError:
                yield WRITE

    def in_thread(self, pool: Executor, work: Work[T], *args: Any) -> Conversation[T]:
        """Has a thread do what would keep the other connections waiting."""
        future = pool.submit(work, *args)
        future.add_done_callback(lambda _: self.server.wake(self))
        try:
            while not future.done():
                yield RESULT
        finally:
            future.cancel()
        return future.result()

    def in_turn(self, large: bool, work: Work[T], *args: Any) -> Conversation[T]:
        """Does it, if it is much then in a thread, one such work after the other."""
        if not large:
            return work(*args)
        return (yield from self.in_thread(self.server.parser, work, *args))

    # Reading

    def wait_for_room(self, size: int) -> Conversation[None]:
        """Leaves a large body where it is while others hold too much memory."""
        began = time.monotonic()
        while not self.server.take_room(self, size):
            if self.phase != WAIT:
                self.enter(WAIT, ANSWER_SECONDS / 2)
            yield RESULT
        self.patience = ANSWER_SECONDS - (time.monotonic() - began)

    def receive(self) -> Conversation[bytes]:
        """Returns what comes next of a request. Raises Refused if nothing does."""
        data = yield from self.read()
        if not data:
            raise Refused(400, "malformed HTTP: it ends too early")
        return data

    def read_head(self) -> Conversation[bool]:
        """Reads and parses a head; returns False if no request comes."""
        while self.buffer in (b"", b"\r", b"\r\n"):
            data = yield from self.read()
            if not data:
                return False
            self.buffer += data
        self.buffer = self.buffer.removeprefix(b"\r\n")  # RFC 9112 section 2.2
        checked = 0
        while (end := self.buffer.find(b"\r\n\r\n", max(checked - 3, 0))) < 0:
            if self.phase != HEAD:
                self.enter(HEAD, HEAD_SECONDS)
            check_incomplete_head(self.buffer, checked)
            checked = len(self.buffer)
            self.buffer += yield from self.receive()
        self.enter(BUSY, ANSWER_SECONDS)
        self.head = head = parse_head(self.buffer[:end])
        self.buffer = self.buffer[end + 4 :]
        self.unread = int(head.field(b"content-length") or b"0")
        options = head.field(b"connection").lower().replace(b" ", b"").split(b",")
        wanted = head.minor_version == b"1" or b"keep-alive" in options
        # Where a body could stand whose end is unknown, no other request can follow.
        framed = b"content-length" in head.fields or head.method in (b"GET", b"HEAD")
        framed = framed and b"transfer-encoding" not in head.fields
        self.close_connection = b"close" in options or not wanted or not framed
        return True

    def read_body(self) -> Conversation[bytes]:
        """Reads the whole body. Raises Refused."""
        length = self.unread
        if len(self.buffer) < length:
            expects = self.head.field(b"expect").lower() == b"100-continue"
            if expects and self.head.minor_version == b"1":  # RFC 9110 section 10.1.1
                self.enter(SEND, SEND_SECONDS)
                yield from self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.enter(BODY, BODY_SECONDS + length / BODY_BYTES_PER_SECOND)
            data = bytearray(self.buffer)
            while len(data) < length:
                data += yield from self.receive()
            self.buffer = bytes(data)
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        self.unread = 0
        self.enter(BUSY, self.patience)
        return body

    # Answering

    def respond(self) -> Conversation[Answer]:
        """Finds the route and returns its answer. Raises Refused."""
        methods = self.server.routes.get(self.head.path)
        if methods is None:
            raise Refused(404, "not found")
        route = methods.get(self.head.method)
        if route is None:
            allowed = b", ".join(sorted(methods)).decode()
            raise Refused(405, "method not allowed", Allow=allowed)
        answer = route(self)
        return answer if isinstance(answer, Answer) else (yield from answer)

    def send(self, answer: Answer) -> Conversation[None]:
        """Sends an answer in one write, and decides whether the connection stays open."""
        self.close_connection |= self.unread > 0 or self.evicted or self.server.stopping
        lines = [
            f"HTTP/1.1 {answer.status} {self.responses[answer.status][0]}",
            f"Date: {self.server.date}",
            f"Content-Type: {answer.media_type}",
            f"Content-Length: {len(answer.payload)}",
        ]
        lines += [f"{name}: {text}" for name, text in answer.headers.items()]
        if self.settings.demo:
            lines += self.cors()
        if self.close_connection:
            lines.append("Connection: close")
        elif self.head.minor_version == b"0":
            lines.append("Connection: keep-alive")
        payload = b"" if self.head.method == b"HEAD" else answer.payload
        self.enter(SEND, SEND_SECONDS)
        yield from self.write("\r\n".join((*lines, "", "")).encode() + payload)
        if self.close_connection:
            self.enter(LINGER, LINGER_SECONDS)
        else:
            self.enter(IDLE, IDLE_SECONDS)

    # Routes

    def webhook(self) -> Conversation[Answer]:
        """Takes events. Checks run cheapest first, before a byte of the body is read."""
        self.require_secret(self.settings.public_secrets)
        self.refuse_transfer_encoding()
        if b"content-length" not in self.head.fields:
            raise Refused(411, "Content-Length is required")
        if self.unread > self.settings.max_body_bytes:
            raise Refused(413, f"the limit is {self.settings.max_body_bytes} bytes")
        signature = self.head.field(b"x-signature").lower()
        if not SIGNATURE.fullmatch(signature):
            raise Refused(401, "X-Signature is missing or not 40 hexadecimal digits")
        size = self.unread
        yield from self.wait_for_room(size)
        try:
            body = yield from self.read_body()
            # Anybody may have a batch's first event looked for.
            large = size > SMALL_BODY_BYTES or body.startswith(b"[")
            yield from self.in_turn(large, authenticate, body, signature, self.settings)
            return (yield from self.store(body))
        finally:
            self.server.give_room(size)

    def store(self, body: bytes) -> Conversation[Answer]:
        """Stores an authentic body's events; what cannot be is kept before the answer."""
        try:
            large = len(body) > SMALL_BODY_BYTES
            events = yield from self.in_turn(large, parse_events, body)
        except Refused as refused:
            if refused.status != 503:  # which says that it took too long
                yield from self.reject(body, refused.reason)
            raise
        is_batch, documents, faults = events
        results: Sequence[Result] = ()
        if documents:
            encoded = [document.bson for document in documents]
            submission = self.storage.submit(encoded, partial(self.server.post, self))
            while not submission.results:
                yield RESULT
            results = submission.results
        ids = []
        for document, result in zip(documents, results):
            if not isinstance(result, Refused):
                ids.append(str(document.id))
                self.server.show(result, document)
            elif result.status == 503:
                raise result
            else:
                faults.append(f"{document.id}: {result.reason}")
        if faults:
            yield from self.reject(body, "\n".join(faults), len(faults))
            if not is_batch:
                raise Refused(422, faults[0])
        if spooled := results.count("spooled"):
            rejected = {"rejected": len(faults)} if faults else {}
            return as_json(202, {"spooled": spooled} | rejected)
        duplicates = results.count("duplicate")
        if not is_batch:
            duplicate = {"duplicate": True} if duplicates else {}
            return as_json(200, {"insertedId": ids[0]} | duplicate)
        counts = {"duplicates": duplicates, "rejected": len(faults)}
        return as_json(200, {"insertedIds": ids} | counts)

    def reject(self, body: bytes, reason: str, events: int = 1) -> Conversation[None]:
        """Keeps a body that cannot be stored. Raises Refused (503) if it cannot."""
        workers, work = self.server.workers, self.storage.reject
        yield from self.in_thread(workers, work, body, reason, ".json", events)

    def health(self) -> Answer:
        """Says whether events can be kept; counters only to whoever knows the secret."""
        self.refuse_transfer_encoding()
        storage = self.storage
        failing = storage.failing
        value: dict[str, Any] = {
            "status": "failing" if failing else "ok",
            "mongodb": "up" if storage.up else "down",
        }
        with contextlib.suppress(Refused):
            self.require_secret(self.settings.public_secrets)
            value |= {**storage.counters, "spool_files": len(storage.spool)}
        return as_json(503 if failing else 200, value)

    def demo_page(self) -> Answer:
        self.require_loopback()
        try:
            page = Path(__file__).with_name("demo.html").read_bytes()
        except OSError:
            raise Refused(404, "demo.html is not beside receiver.py") from None
        return Answer(200, page, media_type="text/html; charset=utf-8")

    def events(self) -> Conversation[Answer]:
        """Returns the newest documents, for the demo page."""
        self.require_loopback()
        self.require_secret(self.settings.events_secrets)
        limit = parse_query(self.head.query).get(b"limit", b"20")
        if not re.fullmatch(rb"[1-9][0-9]?|100", limit):
            raise Refused(400, "limit is a number from 1 to 100")
        workers = self.server.workers
        newest = yield from self.in_thread(workers, self.storage.newest, int(limit))
        return Answer(200, newest.encode())

    def preflight(self) -> Answer:
        self.require_loopback()
        allowed = {
            "Access-Control-Allow-Methods": "POST, PUT, PATCH",
            "Access-Control-Allow-Headers": "Content-Type, X-Signature",
            "Access-Control-Max-Age": "600",
            "Access-Control-Allow-Private-Network": "true",
        }
        return as_json(200, {}, allowed)

    # Checks

    def require_secret(self, accepted: tuple[bytes, ...]) -> None:
        """Raises Refused (401) unless the query has one of the secrets, or none is set."""
        given = parse_query(self.head.query).get(b"secret", b"")
        if accepted and not any(hmac.compare_digest(given, key) for key in accepted):
            raise Refused(401, "the secret in the query is missing or wrong")

    def refuse_transfer_encoding(self) -> None:
        if b"transfer-encoding" in self.head.fields:
            reason = "Transfer-Encoding is not supported, send Content-Length"
            raise Refused(411, reason)

    def require_loopback(self) -> None:
        """Raises Refused (403) for another Host: DNS rebinding would let a site read."""
        self.refuse_transfer_encoding()
        host = re.sub(r":[0-9]*\Z", "", self.head.field(b"host").decode())
        if not is_loopback(host.strip("[]")):
            raise Refused(403, "the demo is served to a loopback Host only")

    def cors(self) -> list[str]:
        """Lets demo.html read answers, opened as a file or from another port here."""
        origin = self.head.field(b"origin").decode("latin-1")
        host = re.fullmatch(r"https?://\[?([\w.:-]+?)\]?(:[0-9]+)?", origin, re.ASCII)
        if origin == "null" or (host and is_loopback(host[1])):
            return [f"Access-Control-Allow-Origin: {origin}", "Vary: Origin"]
        return []


Route = Callable[[Handler], "Answer | Conversation[Answer]"]


class Server(HTTPServer):
    """Accepts connections, lets each go on in its turn, limits them and their time.

    An event loop: one thread, in ``serve_forever``, does all of it. With a thread for each
    connection, most of the time went into waking threads and waiting for the
    interpreter's lock: 32 connections stored 4,500 events/s instead of 9,600, and with
    128 the slowest hundredth took 20 times the median instead of 3 (bench/run.py).
    ``stopping`` tells handlers to close their connection, ``date`` is for their answers,
    ``routes`` maps path and method to the handler's method, ``parser`` and ``workers``
    are threads for what takes long.
    """

    request_queue_size = 1024

    def __init__(
        self, settings: Settings, storage: Storage, listener: socket.socket | None
    ) -> None:
        """Binds the host and port, or takes a socket that is listening already.

        Raises SettingsError if it cannot. Call ``server_activate`` to listen.
        """
        self.settings = settings
        self.storage = storage
        self.stopping = False
        self.date = formatdate(usegmt=True)
        self.routes: dict[bytes, dict[bytes, Route]] = {
            b"/webhook": dict.fromkeys((b"POST", b"PUT", b"PATCH"), Handler.webhook),
            b"/health": {b"GET": Handler.health},
        }
        if settings.demo:
            self.routes[b"/webhook"][b"OPTIONS"] = Handler.preflight
            self.routes[b"/"] = self.routes[b"/demo.html"] = {b"GET": Handler.demo_page}
            self.routes[b"/events"] = {b"GET": Handler.events}
        self._shows_events = settings.demo or sys.stderr.isatty()
        self.parser = ThreadPoolExecutor(1)  # the interpreter has no use for a second
        self.workers = ThreadPoolExecutor(3)
        self._connections: set[Handler] = set()
        self._large_bytes = 0
        self._waiting_for_room: list[Handler] = []
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Handler] = deque()
        self._woken = False
        self._waker, wakened = socket.socketpair()
        for end in (self._waker, wakened):
            end.setblocking(False)
        self._selector.register(wakened, READ, partial(self._collect, wakened))
        storage.wake = self.wake
        self._listening = False
        self._stop_at = math.inf
        self._stopped = threading.Event()
        self._refusals: Counter[str] = Counter()
        self._next_check = self._next_count = 0.0
        address = settings.host, settings.port
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, Handler, bind_and_activate=False)
            if not listener:
                self.server_bind()
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            raise SettingsError(f"cannot listen on {where}: {error.strerror}") from None
        if listener:
            self.socket.close()
            self.socket = listener
            self.server_address = listener.getsockname()
            if settings.demo and not is_loopback(str(self.server_address[0])):
                raise SettingsError("the demo takes only a loopback socket of systemd")

    def server_bind(self) -> None:
        """Binds without HTTPServer's look-up of the host's name, which can hang."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    @property
    def url(self) -> str:
        host, port = map(str, self.server_address[:2])
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve_forever(self, poll_interval: float = 0.25) -> None:
        """Serves until ``stop``; what is due is done at least once in that time (seconds)."""
        self.socket.setblocking(False)  # who shares it may be the first to accept
        self._listen(True)
        while not self._finished():
            timeout = 0.02 if self.stopping else poll_interval
            ready = [key.data for key, _ in self._selector.select(timeout)]
            for act in (*ready, self.storage.commit, self.service_actions):
                try:
                    act()
                except Exception:
                    log.exception("internal error")
        self._stopped.set()

    def stop(self, seconds: float) -> None:
        """Stops accepting, finishes the requests in hand, ends all other connections."""
        self._stop_at = time.monotonic() + seconds
        self.stopping = True
        self.wake()
        self._stopped.wait(seconds + 1)
        for executor in (self.parser, self.workers):
            executor.shutdown(wait=False, cancel_futures=True)

    def _finished(self) -> bool:
        """Does what is left to do when it stops, and tells whether that was all.

        A connection that is new or was answered just now may have a request on its way.
        """
        if not self.stopping:
            return False
        self._listen(False)
        self.server_close()
        now = time.monotonic()
        for handler in list(self._connections):
            idle = handler.phase == IDLE and now - handler.since > STOP_IDLE_SECONDS
            if idle or handler.phase == LINGER:
                self._resume(handler, ConnectionAbortedError())
        return not self._connections or now > self._stop_at

    # Turns

    def register(self, handler: Handler) -> None:
        self._connections.add(handler)
        self._resume(handler)

    def post(self, handler: Handler) -> None:
        """Lets a conversation look for its result, after ``wake``; for any thread."""
        self._posted.append(handler)

    def wake(self, *handlers: Handler) -> None:
        """Ends the loop's wait, lets these look for their result; for any thread."""
        self._posted += handlers
        if not self._woken:
            self._woken = True
            self._waker.send(b"\0")

    def _collect(self, wakened: socket.socket) -> None:
        """Lets go on what was posted; what is posted meanwhile has its turn after it."""
        wakened.recv(4096)
        self._woken = False
        for _ in range(len(self._posted)):
            handler = self._posted.popleft()
            if handler.waits_for == RESULT:
                self._resume(handler)

    def _ready(self, handler: Handler) -> None:
        """Lets a conversation go on whose socket is ready."""
        if handler.waits_for == RESULT:
            self._watch(handler, RESULT)  # its next request, or it has gone: not now
        else:
            self._resume(handler)

    def _resume(self, handler: Handler, error: Exception | None = None) -> None:
        """Lets a conversation go on, or end by an error, until it waits again."""
        try:
            if error:
                handler.waits_for = handler.conversation.throw(error)
            else:
                handler.waits_for = next(handler.conversation)
            if handler.waits_for:
                self._watch(handler, handler.waits_for)
        except (StopIteration, OSError):  # it has ended, or the client has gone
            self._close(handler)
        except Exception:
            log.exception("connection failed")
            self._close(handler)

    def _watch(self, handler: Handler, events: int) -> None:
        """Has the loop look for these events of a connection's socket, or for none."""
        if events == handler.watched:
            return
        ready = partial(self._ready, handler)
        if not handler.watched:
            self._selector.register(handler.connection, events, ready)
        elif events:
            self._selector.modify(handler.connection, events, ready)
        else:
            self._selector.unregister(handler.connection)
        handler.watched = events

    def _close(self, handler: Handler) -> None:
        if handler in self._connections:
            self._connections.remove(handler)
            self._watch(handler, RESULT)
            self.shutdown_request(handler.connection)
            self._listen(True)

    # Limits

    def _listen(self, on: bool) -> None:
        """Begins or stops to look for new connections."""
        if on == self._listening or (on and self.stopping):
            return
        if on:
            self._selector.register(self, READ, self._accept)
        else:
            self._selector.unregister(self)
        self._listening = on

    def _accept(self) -> None:
        """Takes new connections; at the limit it ends the longest waiting one for each."""
        for accepted in range(MAX_ACCEPTS):
            if len(self._connections) >= self.settings.max_connections:
                if accepted:  # it is not known whether there is another
                    return
                if not self._evict():
                    self._listen(False)  # until one has ended
                    return
            try:
                self.finish_request(*self.get_request())
            except OSError as error:
                no_descriptor = error.errno in (errno.EMFILE, errno.ENFILE)
                if no_descriptor and not self._evict():
                    self._listen(False)
                return

    def _evict(self) -> bool:
        """Ends the connection that waits longest; returns False if none does for long."""
        recently = time.monotonic() - GRACE_SECONDS  # its request may be on its way
        for handler in sorted(self._connections, key=lambda handler: handler.since):
            if handler.since > recently:
                break
            if handler.phase == IDLE and handler.waits_for == READ:
                since = handler.since
                self._resume(handler)  # its request may have come
                if handler not in self._connections:
                    return True
                if handler.since > since:
                    continue
            pipelined = handler.phase == IDLE and handler.waits_for == RESULT
            if handler.phase == BUSY or pipelined:
                continue
            handler.evicted = True
            if handler.phase in (HEAD, WAIT, BODY):
                # Not the client's fault: 408 would be the end of an authentic event.
                self._resume(handler, unavailable("too many connections"))
                with contextlib.suppress(OSError):
                    for _ in range(MAX_ACCEPTS):
                        handler.connection.recv(64 * KIB)
            self._resume(handler, ConnectionAbortedError())
            return True
        return False

    def _expire(self, handler: Handler) -> None:
        """Ends a wait that took too long."""
        incomplete = Refused(408, "the request was not complete in time")
        no_room = unavailable("too many large bodies in flight")
        late = unavailable("not stored in time")
        errors = {HEAD: incomplete, WAIT: no_room, BODY: incomplete, BUSY: late}
        self._resume(handler, errors.get(handler.phase, ConnectionAbortedError()))

    def take_room(self, handler: Handler, size: int) -> bool:
        """Bounds what large bodies hold together; posts the handler when to try again."""
        if size > SMALL_BODY_BYTES:
            if self._large_bytes and self._large_bytes + size > MAX_LARGE_BODY_BYTES:
                self._waiting_for_room.append(handler)
                return False
            self._large_bytes += size
        return True

    def give_room(self, size: int) -> None:
        if size > SMALL_BODY_BYTES:
            self._large_bytes -= size
            self.wake(*self._waiting_for_room)
            self._waiting_for_room.clear()

    def service_actions(self) -> None:
        """Does what is due, every CHECK_SECONDS."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_SECONDS
        self.date = formatdate(usegmt=True)
        self._listen(True)
        for handler in [c for c in self._connections if c.deadline < now]:
            self._expire(handler)
        if now > self._next_count:
            self._next_count = now + COUNT_SECONDS
            self._log_refusals()
        if self.storage.alive():
            up = "up" if self.storage.up else "down"
            counts = self.storage.counters
            status = f"{counts['stored']} stored, {counts['spooled']} spooled"
            notify(f"WATCHDOG=1\nSTATUS={status}, MongoDB {up}")

    # Logs

    def count_refusal(self, refused: Refused) -> None:
        """Logs the first refusal of a kind; the others are counted, as a flood may come."""
        kind = f"{refused.status} {refused.reason.partition(':')[0]}"
        self._refusals[kind] += 1
        if self._refusals[kind] == 1:
            log.warning("refused: %s", kind)

    def _log_refusals(self) -> None:
        counts, self._refusals = self._refusals, Counter()
        repeated = [f"{n} x {kind}" for kind, n in counts.most_common() if n > 1]
        if repeated:
            log.warning("refused within a minute: %s", ", ".join(repeated))

    def show(self, result: str, document: Document) -> None:
        """Lets somebody who watches a terminal see each event land."""
        if self._shows_events:
            event = bson.decode(document.bson)
            words = (event.get("type"), event.get("event", event.get("name")))
            label = " ".join(word[:100] for word in words if isinstance(word, str))
            log.info("%s: %s", result, f"{label} {document.id}".lstrip())


# --- 6. Process -----------------------------------------------------------------------

PRIORITIES = {logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class LogFormatter(logging.Formatter):
    """A line for each record, its level as journald wants it: sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode()
            for char in super().format(record)
        )
        if under_journald():
            return f"<{PRIORITIES.get(record.levelno, 3)}>{text}"
        return f"{time.strftime('%H:%M:%S')} {record.levelname:7} {text}"


def under_journald() -> bool:
    """Tells whether standard error is the journal: systemd.exec(5), $JOURNAL_STREAM."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def notify(state: str, seconds: float = 0) -> None:
    """Tells systemd, if it is there and listens in that time: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address and sys.platform != "win32":
        address = re.sub("^@", "\0", address)  # an abstract socket
        with (
            contextlib.suppress(OSError),  # no descriptor is left, systemd is slow
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
        ):
            sender.settimeout(seconds)
            sender.sendto(state.encode(), address)


def inherited_listener() -> socket.socket | None:
    """Returns the listening socket that systemd hands over, if any: sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise SettingsError("systemd has to hand over one socket, not several")
    os.set_inheritable(3, False)
    return socket.socket(fileno=3)


def find_mongod() -> str | None:
    """Returns a mongod's path: MONGOD, PATH, or the one that requirements.txt installs."""
    if path := os.environ.get("MONGOD") or shutil.which("mongod"):
        return path
    package = importlib.util.find_spec("fiftyone")
    folders = (package and package.submodule_search_locations) or ()
    found = (shutil.which(Path(folder, "db", "bin", "mongod")) for folder in folders)
    return next((str(path) for path in found if path), None)


class EmbeddedMongoDB:
    """A mongod of the receiver's own, started where others look for one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, client: Client, stop: threading.Event) -> str:
        """Starts it and waits for its answer; returns why it cannot be had, else ""."""
        binary = find_mongod()
        if not binary:
            return "set MONGODB_URI, or pip install -r requirements.txt"
        host, port = LOCAL_MONGODB.split(":")
        words = tempfile.TemporaryFile()  # noqa: SIM115, mongod keeps it open
        arguments = [
            *(binary, "--dbpath", str(self.folder), "--bind_ip", host, "--port", port),
            *("--networkMessageCompressors", "disabled", "--quiet"),
            *("--logpath", str(self.folder / "mongod.log")),
        ]
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            socket.create_server((host, int(port))).close()  # the port is free
            # A session of its own: Ctrl-C is the receiver's, whose last insert needs it.
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot start {binary} on {LOCAL_MONGODB}: {error.strerror}"
        while self._process.poll() is None:
            if stop.is_set():
                return ""
            if version := ask_version(client, 0.5):
                what = f"MongoDB {version} on {LOCAL_MONGODB}"
                log.info("started %s, its data is in %s", what, self.folder)
                return ""
        words.seek(0)
        said = words.read().decode(errors="replace").strip()
        status = self._process.returncode
        in_use = f"{self.folder} is in use or unusable"
        known = {48: f"{LOCAL_MONGODB} is taken", 100: in_use}
        self._process = None
        why = known.get(status) or said or f"see {self.folder / 'mongod.log'}"
        return f"mongod ended with status {status}: {why}"

    def report_end(self) -> None:
        """Logs, once, if it ended although nobody stopped it."""
        if self._process and self._process.poll() is not None:
            status = self._process.returncode
            log.error("mongod ended with status %d: restart the receiver", status)
            self._process = None

    def stop(self, seconds: float) -> None:
        """Stops it, or after that time kills it, which its journal makes safe."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def connect(uri: str) -> Client:
    """Returns a client that connects when used. Raises SettingsError for a bad URI."""
    options: dict[str, Any] = {"connect": False, "appname": "segment-receiver"}
    # How soon a host is asked again that swallows packets, or a primary that was lost.
    for name, value in (("connectTimeoutMS", 2000), ("heartbeatFrequencyMS", 1000)):
        if name.lower() not in uri.lower():
            options[name] = value
    try:
        return pymongo.MongoClient(uri or f"mongodb://{LOCAL_MONGODB}", **options)
    except (PyMongoError, ValueError):  # whose text may hold a piece of the password
        raise SettingsError(
            "MONGODB_URI is not a connection string, mongodb+srv://user:password@host/ "
            "with user and password percent-encoded"
        ) from None


def ask_version(client: Client, seconds: float) -> str:
    """Returns the version of the MongoDB that answers in time, else ""."""
    with contextlib.suppress(PyMongoError), pymongo.timeout(seconds):
        return str(client.server_info()["version"])
    return ""


def welcome(settings: Settings, url: str) -> str:
    """Returns what somebody who starts the receiver for the first time wants to know."""
    shared = settings.shared_secrets[0].decode()
    public = quote(settings.public_secrets[0], safe="")
    return f"""
No SEGMENT_SHARED_SECRET is set, so this run has made up its secrets.

  webhook URL    {url}/webhook?secret={public}
  shared secret  {shared}
  demo page      {url}/#shared={shared}&public={public}
  the events     in MongoDB, collection {settings.database}.{settings.collection}

Send a signed event from another terminal:

body='{{"type":"track","event":"Favorited","properties":{{"itemName":"Roses"}}}}'
signature=$(printf %s "$body" | openssl dgst -sha1 -hmac '{shared}' | sed 's/.* //')
curl -X POST '{url}/webhook?secret={public}' \\
  -H 'Content-Type: application/json' -H "X-Signature: $signature" -d "$body"

README.md goes on from here to Segment itself. Ctrl-C stops.
"""


def check(settings: Settings) -> int:
    """Prints what would keep events from being stored, and what to do; 1 if anything."""
    faults = []
    if not settings.shared_secrets:
        faults.append("SEGMENT_SHARED_SECRET is not set: no event could be verified")
    storage = Storage(connect(settings.mongodb_uri), settings)
    try:
        storage.spool.probe()
    except OSError as error:
        why = f"{error.strerror}: no event could wait there"
        faults.append(f"{storage.spool.path}: {why}")
    try:
        storage.probe()
    except (Outage, PyMongoError) as error:
        advice = {
            13: "grant its user a role that may insert into the collection",
            18: "correct user and password",
            8000: "correct user and password, or make room in the cluster",
        }.get(getattr(error, "code", 0) or 0, "check address, network access, primary")
        faults.append(f"MongoDB: {advice}: {brief(error)}")
    for fault in faults:
        log.error("%s", fault)
    if not faults:
        log.info("settings, secrets, spool and inserting into MongoDB are in order")
    return 1 if faults else 0


def bound_the_heap() -> None:
    """Makes glibc give large blocks back to the system as soon as they are freed.

    Left alone it raises its threshold, mallopt(3), to the largest block freed so far: 256
    bodies of 4 MiB at once then took 360 MiB and left 340, instead of 210 and 80. Batches
    of a common size, and room to parse them in, stay with the process.
    """
    if sys.platform == "linux":
        # musl has no mallopt, an old libffi no ctypes under MemoryDenyWriteExecute.
        with contextlib.suppress(AttributeError, ImportError, MemoryError, OSError):
            import ctypes

            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 2 * MIB)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 8 * MIB)  # M_TRIM_THRESHOLD


def run(settings: Settings) -> int:
    """Starts everything in order, waits for a signal, and stops it in reverse order."""
    stop = threading.Event()
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, nohup ignores it
        nohup = name == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        if number and not nohup:
            signal.signal(number, lambda *_: stop.set())
    bound_the_heap()
    gc.freeze()  # less to look through, and less often: 5 % more events (bench/run.py)
    gc.set_threshold(10_000)
    # A thread that parses a large body lets the event loop go on sooner than after 5 ms.
    sys.setswitchinterval(0.001)
    client = connect(settings.mongodb_uri)
    storage = Storage(client, settings)
    server = Server(settings, storage, inherited_listener())
    mongod = EmbeddedMongoDB(Path(settings.data_dir, "mongodb"))
    try:
        alone = not settings.mongodb_uri and not ask_version(client, 0.5)
        if alone and (why := mongod.start(client, stop)):
            log.warning("no MongoDB, events go to the spool: %s", why)
        storage.start()
        server.server_activate()
        loop = threading.Thread(target=server.serve_forever, args=(CHECK_SECONDS,))
        loop.daemon = True
        loop.start()
        where = f"{settings.database}.{settings.collection}"
        log.info("listening on %s, events go to %s", server.url, where)
        if settings.made_up:
            print(welcome(settings, server.url), flush=True)
        elif settings.demo:
            # A secret of the user's own is not printed; one made up for /events has to be.
            made_up = quote(settings.events_secrets[0], safe="")
            fragment = "" if settings.public_secrets else f"#public={made_up}"
            print(f"demo page: {server.url}/{fragment}", flush=True)
        notify("READY=1", 5)
        # stop.wait() would go on if another thread got the signal, as the kernel pleases.
        while not stop.is_set() and loop.is_alive():
            time.sleep(0.1)
            mongod.report_end()
        notify("STOPPING=1", 0.1)
        log.info("stopping")
        if loop.is_alive():
            server.stop(5.0)
        storage.close()
    finally:
        mongod.stop(3.0)
    log.info("stopped")
    return 0 if stop.is_set() else 1


def main() -> int:
    """Runs the receiver until SIGTERM, SIGINT or SIGHUP; returns the exit status."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("pymongo").setLevel(logging.CRITICAL)
    try:
        settings = Settings.load(sys.argv[1:], os.environ)
        return check(settings) if settings.check else run(settings)
    except SettingsError as error:
        print(f"receiver.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
