"""Receives Segment's webhooks, proves that they come from Segment, stores every event.

Each of the six sections builds on those above it. In a hurry? ``Handler.do_POST`` and
what it calls (``authenticate``, ``parse_events``, ``Storage.store``, ``insert``) is the
whole integration; the rest makes it last. What blocks (pymongo, the disk, the log) has
threads; asyncio's owns all state but the spool's, which is the disk's: so no locks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import hmac
import itertools
import json
import logging
import logging.handlers
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from asyncio import StreamReader, StreamWriter
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from configparser import RawConfigParser
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar
from urllib.parse import unquote, unquote_to_bytes

import bson.json_util
import pymongo
from bson import CodecOptions, ObjectId
from bson.codec_options import DatetimeConversion
from bson.raw_bson import RawBSONDocument
from pymongo import WriteConcern, errors

if sys.platform != "win32":
    import fcntl
    import resource

log = logging.getLogger("receiver")
T = TypeVar("T")

# --- 1. Settings ----------------------------------------------------------------------

LOCAL_MONGODB = "127.0.0.1:27017"
LOOPBACK = r"(?i:localhost|127(?:\.[0-9]+){3}|\[?::1\]?)"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FROM_0, FROM_1 = range(GIB**2), range(1, GIB**2)
ABOUT_SECRETS = """\
Secrets come from the environment, or systemd's credentials, files in small letters:
  SEGMENT_SHARED_SECRET  keys Segment's signature; without it this is a demo
  SEGMENT_PUBLIC_SECRET  ?secret=... of the webhook's URL; without it none is asked for
  MONGODB_URI            if it has a password, which --mongodb-uri would show to all
Segment's may be several, with white space between. MONGOD names the mongod to start."""


class SettingsError(Exception):
    """A setting that cannot be used; its text is the one line that the user sees."""


def setting(names: str, default: Any, about: str = "", values: range = FROM_1) -> Any:
    """Declares a field, the variables that set it and, if it has help, a flag."""
    metadata = {"names": names.split(), "about": about, "values": values}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, repr=False)  # it holds secrets
class Settings:
    """All that can be set. Sizes are in bytes."""

    shared_secrets: tuple[bytes, ...] = setting("SEGMENT_SHARED_SECRET", ())
    public_secrets: tuple[bytes, ...] = setting("SEGMENT_PUBLIC_SECRET", ())
    events_secrets: tuple[bytes, ...] = setting("", ())  # a demo's, for GET /events
    demo: bool = setting("", False, "serve the demo page; on without a shared secret")
    check: bool = setting("", False, "test settings, MongoDB and spool, then exit")
    trust_batches: bool = setting("SEGMENT_TRUST_BATCHES", False, "take them unproven")
    mongodb_uri: str | None = setting("MONGODB_URI", None, f"else {LOCAL_MONGODB}")
    database: str = setting("MONGODB_DATABASE", "segment", "MongoDB's database")
    collection: str = setting("MONGODB_COLLECTION", "events", "MongoDB's collection")
    host: str = setting("RECEIVER_HOST", "127.0.0.1", "address to listen on")
    port: int = setting("RECEIVER_PORT PORT", 8080, "port to listen on", range(65536))
    data_dir: str = setting("RECEIVER_DATA_DIR", "data", "for spool/ and the like")
    max_body_bytes: int = setting("RECEIVER_MAX_BODY_BYTES", 16 * MIB, "largest body")
    max_connections: int = setting("RECEIVER_MAX_CONNECTIONS", 512, "most at once")
    max_spool_bytes: int = setting("RECEIVER_MAX_SPOOL_BYTES", GIB, "of spool/", FROM_0)

    @classmethod
    def load(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
        """Reads flags, else environment, else credentials. Raises SettingsError."""
        values = parse_flags(arguments)
        given = from_systemd(environment) | dict(environment)
        for field in dataclasses.fields(cls):
            names = field.metadata["names"]
            sources = [*names, *(f"credential {name.lower()}" for name in names)]
            found = [convert(field, s, given[s]) for s in sources if s in given]
            if found:
                values.setdefault(field.name, found[0])
        if not values.keys() & {"shared_secrets", "check"}:
            values["demo"] = True
        settings = cls(**values)
        if settings.demo and not re.fullmatch(LOOPBACK, settings.host):
            why = "with --demo, or without SEGMENT_SHARED_SECRET"
            raise SettingsError(f"{why}, --host has to be loopback, as 127.0.0.1 is")
        return settings


def from_systemd(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what systemd hands over in folders. Raises SettingsError."""
    given = {}
    if folders := environment.get("STATE_DIRECTORY"):
        given["RECEIVER_DATA_DIR"] = folders.split(":")[0]
    if folder := environment.get("CREDENTIALS_DIRECTORY"):
        for name in ("segment_shared_secret", "segment_public_secret", "mongodb_uri"):
            source = f"credential {name}"
            try:
                given[source] = os.fsdecode(Path(folder, name).read_bytes()).strip()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise SettingsError(f"{source}: {error.strerror}") from None
    return given


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the fields that flags set. Raises SettingsError, which quotes none."""
    parser = argparse.ArgumentParser(
        description="Stores every event that Segment's webhooks bring in MongoDB.",
        epilog=ABOUT_SECRETS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for field in dataclasses.fields(Settings):
        flag, about = "--" + field.name.replace("_", "-"), field.metadata["about"]
        if names := ", else ".join(field.metadata["names"]):
            default = f"; default {field.default}" if field.default else ""
            about += f" [{names}{default}]"
        if field.type == "bool":  # a str, by the import from __future__
            parser.add_argument(flag, help=about, action="store_true")
        elif field.metadata["about"]:
            type_ = functools.partial(convert, field, flag)
            parser.add_argument(flag, help=about, type=type_)
    try:
        known, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise SettingsError(f"{error.argument_name} is misused: see --help") from None
    if unknown:
        flags = re.findall("^--[a-z-]+", unknown[0]) or ["an argument"]
        raise SettingsError(f"{flags[0]} is no setting: see --help")
    return vars(known)


def convert(field: dataclasses.Field[Any], source: str, text: str) -> Any:
    """Returns a value of the field's type. Raises SettingsError, which quotes none."""
    values, parts = field.metadata["values"], [text]
    if source.lower().endswith("secret"):
        parts = re.split("[ \t\r\n]+", text.strip(" \t\r\n"))
    if not text.strip():
        why = "is empty: give it a value or take it away"
    elif re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", "".join(parts)):
        why = "has a control character, or is not UTF-8"
    elif any(part[0] == part[-1] in "\"'" for part in parts):
        why = "is in quotes: take them away"
    elif source.startswith("--") and re.search("//[^/@]*:[^/@]*@|(?i:password=)", text):
        why = "shows everybody a password: set MONGODB_URI instead"
    elif field.type == "bool":
        if text.lower() in RawConfigParser.BOOLEAN_STATES:  # on, true, 1, ...
            return RawConfigParser.BOOLEAN_STATES[text.lower()]
        why = "is neither yes nor no"
    elif field.type == "int":
        if re.fullmatch("[0-9]{1,18}", text) and int(text) in values:
            return int(text)
        why = f"is not a whole number from {values[0]} to {values[-1]}"
    else:
        return tuple(map(str.encode, parts)) if "bytes" in field.type else text
    raise SettingsError(f"{source} {why}")


# --- 2. Authenticity ------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Refused(Exception):
    """A request or an event is not accepted: HTTP status, reason for sender and log.

    Segment gives up on 4xx at once, and tries 5xx again for four hours.
    """

    status: int
    reason: str


def sign(body: bytes, secret: bytes) -> str:
    """Returns Segment's ``X-Signature``: hex HMAC-SHA1 of the body's exact bytes."""
    # hmac.digest would wait for the interpreter's lock while a thread inserts: 5 %.
    return hmac.new(secret, body, "sha1").hexdigest()


def verify(body: bytes, signature: str, keys: Iterable[bytes]) -> bool:
    """Tells whether one of the secrets signed these bytes, each in constant time."""
    return any(hmac.compare_digest(sign(body, key), signature) for key in keys)


# A brace, or a JSON string, whole or cut off by the end, so that a search stays linear.
STRING_OR_BRACE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{}]', re.DOTALL)
MAX_FIRST_EVENT_BYTES = 64 * KIB  # Segment's own limit for an event is 32 KB
MAX_FIRST_EVENT_STEPS = 8192  # strings and braces
WRAPPER = b'{"json":'


def first_event(batch: bytes) -> bytes:
    """Returns the bytes of a batch's first object, found without parsing it."""
    level, found = 0, STRING_OR_BRACE.finditer(batch, 1, 1 + MAX_FIRST_EVENT_BYTES)
    for match in itertools.islice(found, MAX_FIRST_EVENT_STEPS):
        level += {b"{": 1, b"}": -1}.get(match[0], 0)
        if level == 0 and match[0] == b"}":
            return batch[1 : match.end()]
    return b""


def authenticate(body: bytes, signature: str, settings: Settings) -> bool:
    """Raises Refused (401) unless Segment signed the body; True: events are wrapped.

    Of a batch Segment signs only ``JSON.stringify(events[0])``, the bytes after ``[``:
    that proves a batch of one, and a longer one if the operator trusts its rest.
    *Extensible Webhook* signs the bare event in ``[{"json":event}, ...]``. Source:
    https://github.com/segmentio/action-destinations (webhook, webhook-extensible).
    """
    keys = settings.shared_secrets
    if verify(body, signature, keys):
        return False
    is_batch, trusted = body.startswith(b"["), settings.trust_batches
    only = body[1:-1] if is_batch else b""
    first = first_event(body) if is_batch and trusted else b""
    for event in filter(None, (only, first)):
        if verify(event, signature, keys):
            return False
        wrapped = event.startswith(WRAPPER)
        if wrapped and verify(event[len(WRAPPER) : -1], signature, keys):
            return True
    reason = "X-Signature does not match the body"
    if is_batch and not trusted:
        reason += "; turn batching off, or set SEGMENT_TRUST_BATCHES=1 (see README.md)"
    raise Refused(401, reason)


# --- 3. Events ------------------------------------------------------------------------

# https://www.mongodb.com/docs/manual/reference/limits/
MAX_DEPTH = 100
MAX_BSON_BYTES = 16 * MIB
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# In what json.dumps makes, an array or a key that begins with $: MongoDB takes neither.
UNFIT_ID = re.compile(r'^\[|[{,] ?"\$(?:[^"\\]|\\.)*+":')


def integer(digits: str) -> int | float:
    """BSON's integers have 64 bits; a larger one was a double in JavaScript."""
    if len(digits) < 21 and -(1 << 63) <= int(digits) < 1 << 63:
        return int(digits)
    return float(digits)


# json.loads would guess UTF-16 and take NaN; int() refuses more than 4300 digits.
DECODER = json.JSONDecoder(parse_int=integer, parse_constant=integer)


class Document(NamedTuple):
    id: Any
    bson: bytes


class Events(NamedTuple):
    """What a body held; ``faults`` say why events of a batch can be no documents."""

    is_batch: bool
    documents: list[Document]
    faults: list[str]


def parse_events(body: bytes, wrapped: bool) -> Events:
    """Turns an authentic body into documents. Raises Refused: 400 if it is no JSON
    object or array of objects, 422 if BSON can hold none of them."""
    try:
        value = DECODER.decode(str(body, "utf-8"))
    except RecursionError:
        raise Refused(422, TOO_DEEP) from None
    except ValueError:
        raise Refused(400, "not JSON in UTF-8") from None
    is_batch = isinstance(value, list)
    events = value if is_batch else [value]
    if wrapped and all(isinstance(e, dict) and [*e] == ["json"] for e in events):
        events = [each["json"] for each in events]
    if not all(isinstance(event, dict) for event in events):
        raise Refused(400, "neither a JSON object nor an array of objects")
    documents, faults = [], []
    for index, event in enumerate(events):
        try:
            documents.append(to_document(event))
        except (Refused, RecursionError) as fault:
            place = f" (event {index})" if is_batch else ""
            faults.append(getattr(fault, "reason", TOO_DEEP) + place)
    if faults and not documents:
        raise Refused(422, "\n".join(faults))
    return Events(is_batch, documents, faults)


def to_document(event: dict[str, Any]) -> Document:
    """Encodes an event; its ``messageId``, which Segment's retries and replays keep, is
    the ``_id``, so none is stored twice. Raises Refused (422) or RecursionError where
    BSON cannot hold it."""
    name = event.get("messageId")
    # Two names that differ only in a lone surrogate are two events.
    is_id = isinstance(name, str) and name and not LONE_SURROGATE.search(name)
    document = {"_id": name if is_id else ObjectId()} | event
    try:
        if "_id" in event and UNFIT_ID.search(json.dumps(event["_id"], default=str)):
            raise Refused(422, "_id is an array or has a $ key")
        encoded = bson.encode(document)
        # A quick look first: each level but the first has a byte of one of these types.
        levels = encoded.count(b"\x03") + encoded.count(b"\x04")
        if levels >= MAX_DEPTH and depth(event) > MAX_DEPTH:
            raise Refused(422, TOO_DEEP)
    except UnicodeEncodeError:  # a string that JavaScript cut in a surrogate pair
        return to_document({"_id": document["_id"]} | fitted(event))
    except bson.errors.InvalidDocument:
        raise Refused(422, "a key has a NUL") from None
    if len(encoded) > MAX_BSON_BYTES:
        raise Refused(422, f"more than {MAX_BSON_BYTES} bytes of BSON")
    return Document(document["_id"], encoded)


def depth(value: Any) -> int:
    """Returns how many levels an object or array has. Raises RecursionError."""
    if not isinstance(value, (dict, list)):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, items), default=0)


def fitted(event: dict[str, Any]) -> Any:
    """Returns a copy with U+FFFD for lone surrogates. Raises Refused if two keys
    become one, RecursionError."""

    def unite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise Refused(422, "keys differ only in a lone surrogate")
        return dict(pairs)

    text = LONE_SURROGATE.sub("\ufffd", json.dumps(event, ensure_ascii=False))
    return json.loads(text, object_pairs_hook=unite)


# --- 4. Storage -----------------------------------------------------------------------

INSERT_SECONDS = 1.8  # twice fits into an answer's time: an event's, and the one before
RETRY_SECONDS = 1.0  # between two rounds of the spool
REFUSED_SECONDS = 30.0  # a file of refused documents rests so long after its last try
WEDGED_SECONDS = 20.0  # a batch that takes longer makes systemd restart the receiver
PIECE_BYTES = MIB  # of the spool, for one insert
PIECE_SECONDS, PIECE_BYTES_PER_SECOND = 5.0, 60_000  # the time that it may take
GATHER_SECONDS = 0.003  # so long a batch waits for who was just answered
BATCH_SECONDS = 0.005  # so long after the last batch one goes beside it
MAX_IN_FLIGHT = 4  # MongoDB 20 ms away: 1.6 round trips an event; 2.5 with 1 in flight
MAX_BATCH_EVENTS = 1000
MAX_BATCH_BYTES = 4 * MIB  # pymongo makes copies
MAX_WAITING_EVENTS = 20_000
DUPLICATE_KEY = 11000  # MongoDB's error code
REFUSED = ".refused.bson"  # how the names of files end that rest
# Nothing is converted, nor a date past the year 9999 an error.
AS_STORED = CodecOptions(
    RawBSONDocument, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
Sent = tuple[list[bytes], asyncio.Future[list[str]]]  # documents, their results
Outcome = tuple[list[str], dict[int, str]]  # results, MongoDB's words by their code


def open_collection(settings: Settings) -> Any:
    """Returns the collection. Raises SettingsError for what pymongo refuses or only
    warns of, without a piece of the connection string, which may hold a password."""
    uri = settings.mongodb_uri or f"mongodb://{LOCAL_MONGODB}"
    source = "MONGODB_URI"
    # How soon a host is asked again that swallows packets, or a primary that was lost.
    options: dict[str, Any] = {"connectTimeoutMS": 2000, "heartbeatFrequencyMS": 1000}
    # The spool tries again. pymongo's own retry, which Atlas's strings ask for, repeats
    # the error of a failed connection at a standalone until time is out (seen in 4.20).
    options["retryWrites"] = False
    options = {n: v for n, v in options.items() if n.lower() not in uri.lower()}
    options |= {"connect": False, "appname": "segment-receiver"}
    try:
        if uri.count("@") > 1:
            raise ValueError("an @ in the user's name or password is written %40")
        with warnings.catch_warnings(action="error", category=UserWarning):
            client: Any = pymongo.MongoClient(uri, **options)
        concern = {"w": "majority", "j": True} | client.write_concern.document
        if concern["w"] == 0:
            raise ValueError("with w=0 MongoDB never says that it stored an event")
        write_concern = WriteConcern(**concern)
        source = "MONGODB_DATABASE, MONGODB_COLLECTION"
        if not re.fullmatch(r'[^/\\. "$*<>:|?]{1,63}', settings.database):
            raise ValueError("the database cannot have that name")
        database = client.get_database(settings.database, write_concern=write_concern)
        return database[settings.collection]
    except (errors.PyMongoError, ValueError, OSError, UserWarning) as error:
        reason, rest = str(error), uri.partition("://")[2]
        values = re.sub(r"[?&]\w*=", ",", rest)  # options may be named
        for piece in re.findall("[^/:@?&=,]{3,}", f"{values},{unquote(values)}"):
            reason = reason.replace(piece, "...")
        raise SettingsError(f"{source}: {reason[:300]}") from None


def words(text: str) -> str:
    """Returns a message's beginning, up to where it may quote an event."""
    return re.split("[:{\"'\n]|, full error", text)[0].strip()[:200]


def describe(error: BaseException) -> str:
    """Returns what an error of pymongo's or the disk's may say in the log."""
    name = type(error).__name__
    if isinstance(error, errors.OperationFailure):
        return f"{name}, code {error.code}, {words(str(error))}"
    return getattr(error, "strerror", None) or name


def is_repeat(collection: Any, data: bytes, fault: Mapping[str, Any]) -> bool:
    """Tells whether a duplicate key means that MongoDB holds this very event.

    It does where the key is a ``messageId``, Segment's own word for it. Otherwise (an
    ``_id`` of the event's own, a collation, a service that names no key) a look at what
    stands under the ``_id`` decides. Raises PyMongoError.
    """
    event = RawBSONDocument(data, AS_STORED)
    name = event.get("messageId")
    is_named = isinstance(name, str) and name != ""
    by_message_id = is_named and event["_id"] == name
    key = [] if "collation" in fault else [*fault.get("keyPattern", ())]
    if (key == ["_id"] and by_message_id) or (key == ["messageId"] and is_named):
        return True
    primary = collection.with_options(AS_STORED, pymongo.ReadPreference.PRIMARY)
    try:
        found = primary.find_one({"_id": {"$eq": event["_id"]}})
        if by_message_id or not found:
            return bool(found and found["_id"] == name)
        # As BSON, since to Python 1, 1.0 and True are one; MongoDB puts _id first.
        first = {"_id": None}
        return bson.encode(first | dict(found)) == bson.encode(first | dict(event))
    except (errors.OperationFailure, bson.errors.BSONError) as error:
        if getattr(error, "timeout", False):
            raise
        return False  # its user may not look, or Python not read what stands there


def insert(collection: Any, documents: list[bytes], seconds: float) -> Outcome:
    """Returns "stored", "duplicate" or, where it was refused, "spooled" for each.

    Raises what pymongo raises where nothing is known of any of them.
    """
    results = ["stored"] * len(documents)
    complaints: dict[int, str] = {}
    with pymongo.timeout(seconds):
        try:
            collection.insert_many(map(RawBSONDocument, documents), ordered=False)
        except errors.BulkWriteError as error:
            for fault in error.details["writeConcernErrors"]:
                raise errors.WriteConcernError(words(fault["errmsg"]), fault["code"])
            for fault in error.details["writeErrors"]:
                data, code = documents[fault["index"]], fault["code"]
                repeat = code == DUPLICATE_KEY and is_repeat(collection, data, fault)
                results[fault["index"]] = "duplicate" if repeat else "spooled"
                if not repeat:
                    complaints[code] = words(fault["errmsg"])
    return results, complaints


@dataclasses.dataclass
class Progress:
    """How far a file of the spool is delivered, and how its next piece is tried."""

    identity: tuple[int, int] = (0, 0)
    offset: int = 0
    most: int = PIECE_BYTES
    failures: int = 0  # in a row


class Disk:
    """``spool/`` and ``rejected/``: files that survive a power cut.

    Its methods run in one thread and raise OSError; making one makes, locks and tries
    the folders, or raises SettingsError.
    """

    def __init__(self, settings: Settings) -> None:
        self.data = Path(settings.data_dir)
        self.spool, self.rejected = self.data / "spool", self.data / "rejected"
        self.max_bytes = settings.max_spool_bytes
        self.files = self.bytes = 0  # in the spool, as far as is known
        for folder in (self.data, self.spool, self.rejected):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if folder == self.data and sys.platform != "win32":
                    lock = os.open(folder, os.O_RDONLY)  # until the process ends
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.write(folder / ".tmp-probe", b"")
                for unfinished in folder.glob(".tmp-*"):  # so never promised
                    unfinished.unlink()
                self.sync(folder.parent)
            except OSError as error:
                is_locked = isinstance(error, BlockingIOError)
                why = "another receiver uses it" if is_locked else error.strerror
                raise SettingsError(f"RECEIVER_DATA_DIR: {folder}: {why}") from None

    def make(self, folder: Path) -> None:
        """Makes a folder again, which may be deleted at any time."""
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            self.sync(folder.parent)

    def write(self, path: Path, data: bytes, most: int = sys.maxsize) -> None:
        """Writes a file whole and durably, or not at all; ``most`` bounds the spool."""
        if self.bytes + len(data) > most:
            self.scan()  # somebody may have made room
        if self.bytes + len(data) > most:
            raise OSError(errno.EDQUOT, f"limit of {most} bytes reached")
        self.make(path.parent)
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self.sync(path.parent)

    def sync(self, folder: Path) -> None:
        """Makes a rename durable; Windows does so by itself."""
        if sys.platform == "win32":
            return
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EACCES):
                raise
            log.warning("%s cannot be synced: a power cut may undo a rename", folder)

    def put(self, documents: list[bytes], suffix: str, most: int = sys.maxsize) -> None:
        """Writes documents to a new file of the spool: a dump, for mongorestore."""
        data = b"".join(documents)
        # After a crash, or with a wrong clock, a time alone could be there already.
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}{suffix}"
        self.write(self.spool / name, data, most)
        self.files += 1
        self.bytes += len(data)

    def probe(self, size: int) -> None:
        """Finds out whether an event of that many bytes could be written."""
        self.write(self.spool / ".tmp-probe", bytes(size), self.max_bytes)
        os.unlink(self.spool / ".tmp-probe")

    def scan(self) -> dict[str, float]:
        """Returns the spool's files, with the seconds since their last change."""
        self.make(self.spool)
        with os.scandir(self.spool) as entries:
            files = (each for each in entries if each.is_file(follow_symlinks=False))
            found = {each.name: each.stat() for each in files if each.name[0] != "."}
        self.files = len(found)
        self.bytes = sum(status.st_size for status in found.values())
        return {name: time.time() - found[name].st_mtime for name in found}

    def read(self, name: str, progress: Progress) -> tuple[list[bytes], int, bool]:
        """Returns the next documents, where they end, and whether they are all.

        They have ``progress.most`` bytes together, or it is one. A file without more is
        removed; a torn or foreign one is set aside, and so is a document without
        ``_id``, which a second try would store again.
        """
        documents: list[bytes] = []
        path = self.spool / name
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            identity = status.st_ino, status.st_mtime_ns  # inodes are soon used again
            if progress.identity != identity:  # somebody may have laid another there
                progress.identity, progress.offset = identity, 0
            length, end = status.st_size, file.seek(progress.offset)
            while end < length or not length:  # an empty one is torn
                head = file.read(4)
                size = int.from_bytes(head, "little")
                if documents and end + size - progress.offset > progress.most:
                    break
                # MongoDB's own documents may be 16 KiB larger than those of its users.
                is_size = 5 <= size <= MAX_BSON_BYTES + 16 * KIB
                document = head + file.read(size - 4 if is_size else 0)
                try:
                    has_id = "_id" in RawBSONDocument(document, AS_STORED)
                except bson.errors.InvalidBSON:
                    if not documents:
                        self.keep(path, f"spool/{name} is no BSON at byte {end}")
                    return documents, end, False
                if has_id:
                    documents.append(document)
                else:
                    self.keep(document, f"spool/{name} has no _id at byte {end}")
                end += size
        if not documents:
            os.unlink(path)
            self.files -= 1
            self.bytes -= length
        return documents, end, progress.offset == 0 and end == length

    def keep(self, what: bytes | Path, reason: str, suffix: str = ".bson") -> None:
        """Keeps in ``rejected/`` bytes or a file that can be no document, and why."""
        data = os.urandom(16) if isinstance(what, Path) else what
        name = hashlib.sha256(data).hexdigest()[:32]  # again the same, the same file
        kept = self.rejected / f"{name}{suffix}"
        why = f"{reason}\n".encode(errors="backslashreplace")
        self.write(kept.with_suffix(".reason.txt"), why)
        if isinstance(what, Path):
            os.replace(what, kept)
            self.sync(self.rejected)
        else:
            self.write(kept, what)
        log.warning("kept in %s: %s", self.rejected, words(reason))


class Storage:
    """Stores documents in MongoDB, or on disk while MongoDB does not take them.

    Group commit: what waits goes out as one insert, and one journal flush serves it.
    What MongoDB does not take, whatever it says, is tried again until it does: error
    codes differ too much to judge an event by.
    """

    def __init__(self, collection: Any, disk: Disk) -> None:
        self.collection, self.disk = collection, disk
        self.up = True  # whether fresh events are worth a try
        self.failing = 0  # bytes that lately could be kept nowhere
        names = "stored", "duplicates", "rejected", "spooled", "refused"
        self.counters = Counter(dict.fromkeys(names, 0))
        self._loop = asyncio.get_running_loop()
        run, threads = self._loop.run_in_executor, MAX_IN_FLIGHT + 2  # spool and demo
        self.on_mongodb = functools.partial(run, ThreadPoolExecutor(threads))
        self.on_disk = functools.partial(run, ThreadPoolExecutor(1))
        self._queue: deque[Sent] = deque()
        self._waiting = 0  # events in the queue or in flight
        self._in_flight: dict[asyncio.Task[None], float] = {}  # since when
        self._due = 0.0  # when the next batch goes, or once so many events wait:
        self._expected = 0
        self._sending: asyncio.Handle | None = None
        self._outage_said = False

    async def close(self, seconds: float) -> None:
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=seconds)

    async def store(self, documents: list[bytes]) -> list[str]:
        """Returns "stored", "duplicate" or "spooled" for each.

        Raises Refused (503) if one could be kept nowhere, or too much is in flight.
        """
        if not documents:
            return []
        if self._waiting and self._waiting + len(documents) > MAX_WAITING_EVENTS:
            raise Refused(503, "too many events in flight")
        future = self._loop.create_future()
        self._queue.append((documents, future))
        self._waiting += len(documents)
        if not self._sending or self._waiting >= self._expected:
            # After all that came in this turn of the loop.
            self._sending = self._loop.call_soon(self._send)
        results: list[str] = await future
        if "lost" in results:
            raise Refused(503, "neither MongoDB nor disk takes it")
        return results

    async def keep(self, body: bytes, reason: str, events: int = 1) -> None:
        """Keeps a body that can be no document. Raises Refused (503) if it cannot."""
        try:
            await self.on_disk(self.disk.keep, body, reason, ".json")
        except OSError as error:
            raise Refused(503, f"it cannot be kept, {describe(error)}") from None
        self.counters["rejected"] += events

    @property
    def reachable(self) -> bool:
        """Whether MongoDB takes events, as far as is known without asking."""
        topology = self.collection.database.client.topology_description
        return self.up and topology.has_writable_server()

    @property
    def wedged(self) -> bool:
        now = self._loop.time()
        return now - min(self._in_flight.values(), default=now) > WEDGED_SECONDS

    def _send(self) -> None:
        """Sends what waits: at once, or in a moment if others are about to come."""
        if self._sending:
            self._sending.cancel()
        self._sending = None
        most = MAX_IN_FLIGHT if self.up else 1  # the disk has one thread
        while self._queue and len(self._in_flight) < most:
            now = self._loop.time()
            if now < self._due and self._waiting < self._expected:
                self._sending = self._loop.call_at(self._due, self._send)
                return
            self._due, self._expected = now + BATCH_SECONDS, MAX_WAITING_EVENTS
            batch: list[Sent] = []
            events = size = 0
            while self._queue and events < MAX_BATCH_EVENTS and size < MAX_BATCH_BYTES:
                batch.append(self._queue.popleft())
                events += len(batch[-1][0])
                size += sum(map(len, batch[-1][0]))
            self._in_flight[self._loop.create_task(self._commit(batch))] = now

    async def _commit(self, batch: list[Sent]) -> None:
        """Stores what MongoDB takes of a batch, and spools what it does not."""
        documents = [document for sent, _ in batch for document in sent]
        results, suffix = ["spooled"] * len(documents), ".bson"
        if self.up:
            try:
                results = await self._insert(documents, INSERT_SECONDS)
                suffix = REFUSED
            except Exception as error:  # noqa: BLE001, whatever it is, the events wait
                self.up = False
                if not self._outage_said:
                    log.error("events wait in spool/ for MongoDB: %s", describe(error))
                self._outage_said = True
        left = [d for d, was in zip(documents, results) if was == "spooled"]
        try:
            if left:
                await self.on_disk(self.disk.put, left, suffix, self.disk.max_bytes)
                self.counters["spooled"] += len(left)
                self.counters["refused"] += len(left) if suffix == REFUSED else 0
            self.failing = 0
        except Exception as error:  # noqa: BLE001, whatever it is, their senders know
            log.warning("events are answered 503: spool/: %s", describe(error))
            results = ["lost" if was == "spooled" else was for was in results]
            self.failing = sum(map(len, left))
        self._in_flight.pop(asyncio.current_task())  # type: ignore[arg-type]
        if not self._in_flight:
            # Who is answered now may send again at once: 4 to 8 senders, 1.3 x events.
            self._due = self._loop.time() + GATHER_SECONDS
            self._expected = min(self._waiting, MAX_BATCH_EVENTS)
        self._waiting -= len(documents)
        self._send()
        became = iter(results)
        for sent, future in batch:
            part = [next(became) for _ in sent]
            if not future.done():  # else its sender did not wait
                future.set_result(part)

    async def _insert(self, documents: list[bytes], seconds: float) -> list[str]:
        began = self._loop.time()
        answer = self.on_mongodb(insert, self.collection, documents, seconds)
        results, complaints = await answer
        if self._loop.time() - began < INSERT_SECONDS:  # as a fresh event needs it
            self.up = True
            if self._outage_said:
                log.info("MongoDB takes events again")
            self._outage_said = False
        self.counters["stored"] += results.count("stored")
        self.counters["duplicates"] += results.count("duplicate")
        for code, said in complaints.items():
            log.warning("MongoDB refuses events, they wait: code %d, %s", code, said)
        return results

    async def drain(self) -> None:
        """Delivers what is in the spool, for ever; a crash anywhere costs nothing.

        A round tries all due files, refused ones last, until an insert fails whole; the
        next begins behind that file, so that none holds up others.
        """
        after, progress = (False, ""), dict[str, Progress]()
        while True:
            found: dict[str, float] = {}
            with contextlib.suppress(Exception):  # of a folder that cannot be read
                found = await self.on_disk(self.disk.scan)
                if self.failing:
                    await self.on_disk(self.disk.probe, self.failing)
                    self.failing = 0
            progress = {n: p for n, p in progress.items() if n in found}
            order = sorted((name.endswith(REFUSED), name) for name in found)
            for is_refused, name in sorted(order, key=lambda each: each <= after):
                # A time in the future counts as past.
                if is_refused and 0 <= found[name] < REFUSED_SECONDS:
                    continue
                try:
                    with contextlib.suppress(FileNotFoundError):  # it was taken away
                        await self._deliver(name, progress.setdefault(name, Progress()))
                    del progress[name]
                except OSError as error:
                    log.warning("spool/%s waits: %s", name, describe(error))
                except Exception as error:  # noqa: BLE001, it is tried again
                    log.warning("spool/ waits for MongoDB: %s", describe(error))
                    after = is_refused, name
                    break
            else:
                after = False, ""
                self.up = True  # so that the next fresh event tries MongoDB
                if self.reachable:
                    self.failing = 0
                if found and not self.disk.files:
                    log.info("spool/ is empty again")
                    PatientLog.logged.clear()  # what is refused from now on is news
            await asyncio.sleep(RETRY_SECONDS)

    async def _deliver(self, name: str, progress: Progress) -> None:
        """Delivers a file piece by piece. Raises OSError, or what an insert raised.

        What is refused is in a file of its own before this one goes. After a failure
        the next piece is half as large, and has twice the time unless no server was
        reached, for a slow link or cluster. A document that alone fails twice, and not
        for lack of time, is refused like others.
        """
        again = name.endswith(REFUSED)
        while True:
            piece, end, is_all = await self.on_disk(self.disk.read, name, progress)
            if not piece:
                return
            size, began = sum(map(len, piece)), self._loop.time()
            seconds = PIECE_SECONDS + size / PIECE_BYTES_PER_SECOND
            seconds *= 2 ** min(progress.failures, 6)
            try:
                results = await self._insert(piece, seconds)
                progress.most = min(progress.most * 2, PIECE_BYTES)
            except Exception as error:
                progress.most = max(size // 2, 1)
                no_server = isinstance(error, errors.ConnectionFailure)
                if no_server and not isinstance(error, errors.NetworkTimeout):
                    raise
                progress.failures += 1
                is_late = getattr(error, "timeout", False)
                if len(piece) > 1 or is_late or progress.failures < 2:
                    raise
                results = ["spooled"]
            progress.failures = 0
            left = [data for data, was in zip(piece, results) if was == "spooled"]
            if again and is_all and left == piece:
                return await self.on_disk(os.utime, self.disk.spool / name)  # rest anew
            if left:
                await self.on_disk(self.disk.put, left, REFUSED)
                self.counters["refused"] += 0 if again else len(left)
            progress.offset = end
            if self._in_flight or self._queue:  # fresh events go first
                await asyncio.sleep(self._loop.time() - began)


# --- 5. HTTP --------------------------------------------------------------------------

# RFC 9110 section 5.6.2, RFC 9112 sections 3 and 5, without obs-fold, bare CR and LF:
# what two parsers could read in two ways is refused. Text is Latin-1: a byte each.
TCHAR = "[!#$%&'*+.^_`|~0-9A-Za-z-]"
TOKEN = f"{TCHAR}+"
AUTHORITY = r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]+"
REQUEST_LINE = re.compile(
    rf"({TOKEN}) ((?:(?i:https?)://({AUTHORITY}))?(/[!->@-~]*)(?:\?([!-~]*))?)"
    r" (HTTP/1\.[01])"
)
FIELD_LINES = re.compile(rf"(?:{TOKEN}:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
FIELD = re.compile("([^:]+):(.*)\r\n")
HOST = re.compile(f"(?:{AUTHORITY})?")
CONTENT_LENGTH = re.compile("[0-9]{1,19}")
METHOD_START = re.compile(TCHAR.encode())
HEAD_END = re.compile(rb"\n\r?\n")  # who sends bare LF is refused at once, too
SIGNATURE = re.compile("[0-9a-f]{40}")
MAX_TARGET_BYTES = 8 * KIB
MAX_HEAD_BYTES = 32 * KIB + len("\r\n\r\n")
MAX_FIELDS = 100
MAX_ID_BYTES = KIB  # in an answer: Segment's client hangs on one of more than 16 KB
ENCODER = json.JSONEncoder(allow_nan=False, default=str)  # an ObjectId's digits

IDLE_SECONDS = 180.0  # longer than proxies: who closes first loses a request on its way
HEAD_SECONDS = BODY_SECONDS = SEND_SECONDS = LINGER_SECONDS = 10.0
BODY_BYTES_PER_SECOND = 100_000
ANSWER_SECONDS = 4.0  # Segment waits five; two looks and the way there take the rest
LOOK_SECONDS = 0.25
GRACE_SECONDS = 1.0 + LOOK_SECONDS  # so long its next request may be on its way
READ_BYTES = 64 * KIB
MAX_BODIES_BYTES = 32 * MIB  # of all bodies that have come in part
SPARE_FILES = 64  # descriptors for MongoDB, the disk, the log, those who find no room

# What is answered to who is ended: see Handler.late.
INCOMPLETE = 408, "the request was not complete in time"
UNANSWERED = 503, "not stored in time"
NO_ROOM = 503, "too many connections"
NO_MEMORY = 503, "too many large bodies in flight"


def members(value: str) -> list[str]:
    """Returns a list's first hundred: 32,000 commas are costly."""
    return [member.strip(" \t") for member in value.lower().split(",", 100)]


class Handler(BaseHTTPRequestHandler):
    """A connection is a coroutine, which writes answers by http.server's methods.

    ``command``, ``path`` (without the query), ``query``, ``headers`` are those of the
    request in hand, ``unread`` its body's bytes, -1 if that may be without end. After
    ``deadline``, by the server's clock, the task is cancelled and answers ``late``:
    INCOMPLETE while a request comes, then UNANSWERED; None closes without a word.
    """

    protocol_version = request_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]
    headers: dict[str, str]  # type: ignore[assignment]
    wfile: BytesIO
    task: asyncio.Task[None]
    methods: ClassVar = {"/webhook": "PATCH, POST, PUT", "/health": "GET, HEAD"}

    def __init__(self, server: Server, reader: StreamReader, writer: StreamWriter):
        # Not http.server's __init__, which would handle the connection at once.
        self.server, self.reader, self.writer = server, reader, writer
        self.settings, self.storage = server.settings, server.storage
        self.buffer = bytearray()  # what has come and was not read
        self.evicted = self.close_connection = False
        self.enter(IDLE_SECONDS, None)

    def enter(self, seconds: float, late: tuple[int, str] | None) -> None:
        self.deadline = self.server.clock + seconds
        self.late = late

    def end(self, late: tuple[int, str] | None) -> None:
        self.late = late
        self.task.cancel()

    async def handle(self) -> None:  # type: ignore[override]
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                while not self.close_connection:
                    await self.handle_one_request()
                    if self.buffer:  # a pipelined request: first it is the others' turn
                        await asyncio.sleep(0)
                await self.linger()
        finally:
            del self.server.handlers[self]
            self.writer.transport.abort()

    async def handle_one_request(self) -> None:  # type: ignore[override]
        """Reads a request and answers it. Raises OSError when the client has gone."""
        self.wfile = BytesIO()
        self.command, self.path, self.headers, self.unread = "", "", {}, -1
        try:
            if self.evicted:  # before it began
                raise Refused(*NO_ROOM)
            await self.read_head()
            self.path = "/webhook" if self.path == "/webhook/" else self.path
            if self.path not in self.methods:
                raise Refused(404, "not found")
            if self.command not in self.methods[self.path].split(", "):
                raise Refused(405, "method not allowed")
            method = "GET" if self.command == "HEAD" else self.command
            await getattr(self, f"do_{method}")()
        except Refused as refused:
            self.refuse(refused.status, refused.reason)
        except asyncio.CancelledError:
            if self.late is None:
                raise
            self.refuse(*self.late)
        except OSError:
            raise
        except Exception:
            log.exception("internal error")
            self.refuse(503, "internal error")
        finally:
            self.server.bodies.pop(self, None)
        self.enter(SEND_SECONDS, UNANSWERED)
        self.writer.write(self.wfile.getvalue())
        await self.writer.drain()
        self.server.handlers[self] = self.server.clock
        self.server.handlers.move_to_end(self)

    async def receive(self) -> None:
        """Adds what comes to the buffer. Raises Refused, between requests OSError."""
        data = await self.reader.read(READ_BYTES)
        if not data:
            raise Refused(400, "it ends too early") if self.late else ConnectionError()
        self.buffer += data

    async def read_head(self) -> None:
        self.enter(IDLE_SECONDS, None)
        while b"\r\n".startswith(self.buffer):
            await self.receive()
        self.buffer = self.buffer.removeprefix(b"\r\n")  # RFC 9112 section 2.2
        self.enter(HEAD_SECONDS, INCOMPLETE)
        searched = 0  # a head that comes byte by byte must not cost its length squared
        while not (end := HEAD_END.search(self.buffer, searched)):
            if len(self.buffer) > MAX_HEAD_BYTES or not METHOD_START.match(self.buffer):
                break  # parse_head refuses it now: a TLS client, say, would wait
            searched = max(len(self.buffer) - 2, 0)
            await self.receive()
        self.enter(ANSWER_SECONDS, UNANSWERED)
        head = self.buffer[: end and end.end()].decode("latin-1")
        del self.buffer[: len(head)]
        self.parse_head(head)

    def parse_head(self, head: str) -> None:
        """Parses a head with its empty line. Raises Refused: 400, 414 or 431."""
        line, _, lines = head.partition("\r\n")
        match = REQUEST_LINE.fullmatch(line)
        if len(match[2] if match else line) > MAX_TARGET_BYTES:
            raise Refused(414, "request target too long")
        if not match:
            raise Refused(400, "malformed request line")
        self.command, _, host, self.path, self.query, version = match.groups("")
        self.request_version = version
        if len(head) > MAX_HEAD_BYTES or lines.count("\n") > MAX_FIELDS + 1:
            raise Refused(431, "request head too large")
        if not FIELD_LINES.fullmatch(lines):
            raise Refused(400, "malformed header field")
        for name, value in FIELD.findall(lines):
            name, value = name.lower(), value.strip(" \t")
            if name in self.headers:  # a list, which no Host or Content-Length can be
                value = f"{self.headers[name]}, {value}"
            self.headers[name] = value
        for name, grammar in (("host", HOST), ("content-length", CONTENT_LENGTH)):
            if not grammar.fullmatch(self.headers.get(name, "0")):
                raise Refused(400, f"malformed {name}")
        if "host" not in self.headers and version == "HTTP/1.1":
            raise Refused(400, "Host is missing")
        if host:  # RFC 9112 section 3.2.2
            self.headers["host"] = host
        options = members(self.headers.get("connection", ""))
        wanted = version == "HTTP/1.1" or "keep-alive" in options
        self.close_connection = "close" in options or not wanted
        if "transfer-encoding" not in self.headers:
            default = 0 if self.command in ("GET", "HEAD") else -1
            self.unread = int(self.headers.get("content-length", default))

    async def read_body(self) -> bytes:
        length = self.unread
        if len(self.buffer) < length:
            is_new = self.request_version == "HTTP/1.1"  # RFC 9110 section 10.1.1
            if is_new and "100-continue" in members(self.headers.get("expect", "")):
                self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.enter(BODY_SECONDS + length / BODY_BYTES_PER_SECOND, INCOMPLETE)
            while len(self.buffer) < length:
                await self.receive()
                self.server.hold(self)
            self.enter(ANSWER_SECONDS, UNANSWERED)
        body = bytes(memoryview(self.buffer)[:length])
        del self.buffer[:length]
        self.unread = 0
        return body

    def answer(self, status: int, value: Any, **headers: str) -> None:
        """Prepares an answer: bytes as they are, anything else as JSON."""
        if not isinstance(value, bytes):
            value = ENCODER.encode(value).encode() + b"\n"
        self.close_connection |= self.unread != 0 or not self.server.inner.is_serving()
        self.send_response_only(status)
        self.send_header("Date", self.server.date)
        self.send_header("Content-Length", str(len(value)))
        for name, text in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, text)
        if self.close_connection:
            self.buffer.clear()  # of which no more is read, and which may be large
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(value)

    def refuse(self, status: int, reason: str) -> None:
        self.storage.counters["unauthorized"] += status == 401
        lost = status == 413 and self.settings.public_secrets  # of which he knows one
        report = log.error if lost else log.warning
        report("refused: %d %s", status, reason if lost else words(reason))
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}
        headers[405] = {"Allow": self.methods.get(self.path, "")}
        self.answer(status, {"error": reason[:1000]}, **headers.get(status, {}))

    async def linger(self) -> None:
        """Lets the client read the answer: unread bytes turn a close into a reset."""
        self.enter(LINGER_SECONDS, None)
        self.writer.write_eof()
        # Its place is another's already, and of descriptors there are few.
        if self.evicted and sum(each.evicted for each in self.server.handlers) < 10:
            await asyncio.sleep(0.02)
        while not self.evicted and await self.reader.read(READ_BYTES):
            pass

    async def do_POST(self) -> None:
        """Takes events. Cheapest checks first, most before the body is read."""
        self.require_secret(self.settings.public_secrets)
        self.require_length()
        most = self.settings.max_body_bytes
        if self.unread > most:
            raise Refused(413, f"RECEIVER_MAX_BODY_BYTES={most}: {self.unread} bytes")
        signature = self.headers.get("x-signature", "").lower()
        if not SIGNATURE.fullmatch(signature):
            raise Refused(401, "X-Signature is missing or not 40 hexadecimal digits")
        body = await self.read_body()
        wrapped = await self.work(authenticate, body, signature, self.settings)
        try:
            events = await self.work(parse_events, body, wrapped)
        except Refused as refused:
            await self.storage.keep(body, refused.reason)
            raise
        if events.faults:
            await self.storage.keep(body, "\n".join(events.faults), len(events.faults))
        del body  # it may be large
        results = await self.storage.store([each.bson for each in events.documents])
        self.server.show(results, events.documents)
        self.answer_results(results, events)

    do_PUT = do_PATCH = do_POST

    def answer_results(self, results: list[str], events: Events) -> None:
        spooled, duplicates = results.count("spooled"), results.count("duplicate")
        stored, rejected = results.count("stored"), len(events.faults)
        value = {"inserted": stored, "duplicates": duplicates, "rejected": rejected}
        if spooled:
            value = {"spooled": spooled} | {n: v for n, v in value.items() if v}
        elif not events.is_batch:
            value = {"duplicate": True} if duplicates else {}
            with contextlib.suppress(ValueError):  # JSON has no Infinity
                if len(ENCODER.encode(events.documents[0].id)) <= MAX_ID_BYTES:
                    value = {"insertedId": events.documents[0].id} | value
        self.answer(202 if spooled else 200, value)

    async def do_GET(self) -> None:
        """Says whether events can be kept; with the public secret, counters, too."""
        self.require_length()
        storage = self.storage
        value: dict[str, Any] = {"status": "failing" if storage.failing else "ok"}
        value["mongodb"] = "up" if storage.reachable else "down"
        with contextlib.suppress(Refused):
            self.require_secret(self.settings.public_secrets)
            value |= {**storage.counters, "spool_files": storage.disk.files}
        self.answer(503 if storage.failing else 200, value)

    def parameters(self, name: str) -> list[bytes]:
        """Returns the query's values of that name; "+" is a plus, not a space."""
        found = re.findall(rf"(?:\A|&){name}(?:=([^&]*))?(?=&|\Z)", self.query)
        return [unquote_to_bytes(value) for value in found]

    def require_secret(self, accepted: tuple[bytes, ...]) -> None:
        """Raises Refused (401) unless query or header has a secret, or none is set."""
        given = self.parameters("secret")
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        if not given and scheme.lower() == "bearer":
            given = [token.strip(" ").encode("latin-1")]
        same = [hmac.compare_digest(one, key) for one in given[:1] for key in accepted]
        if accepted and not (len(given) == 1 and any(same)):
            raise Refused(401, "public secret missing, wrong, or given twice")

    def require_length(self) -> None:
        if self.unread < 0:
            raise Refused(411, "send Content-Length, not Transfer-Encoding")

    async def work(self, task: Callable[..., T], body: bytes, *more: Any) -> T:
        """Works on a body; on a large one, or a batch, in a thread, one by one."""
        if len(body) <= READ_BYTES and not body.startswith(b"["):
            return task(body, *more)
        return await self.server.in_thread(task, body, *more)


class DemoHandler(Handler):
    """The demo's routes, for pages of this machine and nobody else."""

    pages = dict.fromkeys(["/", "/demo.html", "/events"], "GET, HEAD")
    methods: ClassVar = Handler.methods | pages
    methods["/webhook"] = "OPTIONS, PATCH, POST, PUT"

    async def do_GET(self) -> None:
        if self.path == "/health":
            return await super().do_GET()
        self.require_length()
        self.require_loopback()
        if self.path == "/events":
            return self.answer(200, await self.find())
        try:
            page = Path(__file__).with_name("demo.html").read_bytes()
        except OSError:
            raise Refused(404, "demo.html is not beside receiver.py") from None
        headers = {"Content-Type": "text/html; charset=utf-8"}
        headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        self.answer(200, page, **headers)

    async def find(self) -> bytes:
        """Returns the newest documents, or one, as Extended JSON. Raises Refused."""
        self.require_secret(self.settings.events_secrets)
        limit, *_ = self.parameters("limit") or [b"20"]
        if not re.fullmatch(rb"[1-9][0-9]?|100", limit):
            raise Refused(400, "limit is a number from 1 to 100")
        names = [name.decode("utf-8", "replace") for name in self.parameters("id")]
        ids: list[Any] = [*names, *map(ObjectId, filter(ObjectId.is_valid, names))]
        for name in self.parameters("id"):  # of an event's own: 0, true, {"b":1}
            with contextlib.suppress(Refused):
                ids.append(parse_events(b'{"_id":%s}' % name, False).documents[0].id)
        query: dict[str, Any] = {"limit": int(limit), "sort": [("$natural", -1)]}
        if ids:
            query = {"filter": {"_id": {"$in": ids}}, "limit": 1}

        def find() -> str:
            with pymongo.timeout(INSERT_SECONDS):
                events = self.storage.collection.with_options(AS_STORED)
                return bson.json_util.dumps(events.find(**query))

        try:
            return (await self.storage.on_mongodb(find)).encode()
        except errors.PyMongoError as error:
            log.warning("the demo cannot read MongoDB: %s", describe(error))
            raise Refused(503, "MongoDB cannot be read now") from None

    async def do_OPTIONS(self) -> None:
        self.require_loopback()
        headers = {
            "Access-Control-Allow-Methods": "POST, PUT, PATCH",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Signature",
            "Access-Control-Allow-Private-Network": "true",
        }
        self.answer(200, {}, **headers)

    def end_headers(self) -> None:
        """Lets demo.html read answers, opened as a file or from another port here."""
        origin = self.headers.get("origin", "")
        if re.fullmatch(f"null|https?://{LOOPBACK}(:[0-9]+)?", origin):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
        super().end_headers()

    def require_loopback(self) -> None:
        """Raises Refused (403) for another Host: DNS rebinding lets a site read."""
        proxied = {"forwarded", "x-forwarded-for", "via"} & self.headers.keys()
        host = self.headers.get("host", "")
        if proxied or not re.fullmatch(f"{LOOPBACK}(:[0-9]*)?", host):
            raise Refused(403, "the demo is served to this machine only")


class Server:
    """Accepts connections, and limits them, their time and what their bodies hold."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self.settings, self.storage = settings, storage
        self.clock = 0.0  # seconds, without pauses: see watch
        self.date = formatdate(usegmt=True)
        storage.counters["unauthorized"] = 0
        run = asyncio.get_running_loop().run_in_executor
        self.in_thread = functools.partial(run, ThreadPoolExecutor(1))
        # When, by the clock, each came or last completed a request, in this order.
        self.handlers: OrderedDict[Handler, float] = OrderedDict()
        self.bodies: dict[Handler, int] = {}  # bytes of those that come in parts
        self._most = settings.max_connections
        self._shows_events = settings.demo or (sys.stderr and sys.stderr.isatty())

    async def start(self, listener: socket.socket) -> None:
        if sys.platform != "win32":
            files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if files < self._most + SPARE_FILES:
                self._most = max(files - SPARE_FILES, files // 4)
                log.warning("%d connections at most: ulimit -n %d", self._most, files)
        # asyncio's backlog is also how many it accepts at once.
        self.inner = await asyncio.start_server(self._connect, sock=listener, backlog=4)
        listener.listen(1024)

    async def stop(self, seconds: float) -> None:
        """Stops accepting, finishes the requests in hand, ends other connections."""
        end = time.monotonic() + seconds
        if sys.platform != "win32":
            # close() drops those that asyncio has accepted and not yet handed over.
            asyncio.get_running_loop().remove_reader(self.inner.sockets[0])
            await asyncio.sleep(0.02)
        self.inner.close()
        while self.handlers:
            over, recently = time.monotonic() > end, self.clock - GRACE_SECONDS
            for handler, since in self.handlers.items():
                if over or (handler.late is None and since < recently):
                    handler.end(None)
            await asyncio.sleep(0.02)

    def _connect(self, reader: StreamReader, writer: StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # drain() is to wait for all
        handler = (DemoHandler if self.settings.demo else Handler)(self, reader, writer)
        if sum(not each.evicted for each in self.handlers) >= self._most:
            self._make_room(handler)
        self.handlers[handler] = self.clock
        handler.task = asyncio.create_task(handler.handle())

    def _make_room(self, newest: Handler) -> None:
        """Ends the connection that waits longest, or the newest if no other may go."""
        recently = self.clock - GRACE_SECONDS
        for handler, since in self.handlers.items():
            if not (handler.late is UNANSWERED or handler.evicted or since > recently):
                handler.evicted = True
                # Not the client's fault: 408 would be the end of an authentic event.
                return handler.end(handler.late and NO_ROOM)
        newest.evicted = True

    def hold(self, handler: Handler) -> None:
        """Counts what has come of a body; too much ends the one that began first.

        Raises Refused (503) where that is the handler itself.
        """
        self.bodies[handler] = len(handler.buffer)
        most = max(MAX_BODIES_BYTES, self.settings.max_body_bytes)
        while sum(self.bodies.values()) > most:
            first = next(each for each in self.bodies if each.late is not UNANSWERED)
            del self.bodies[first]
            if first is handler:  # a cancellation waits while there is more to read
                raise Refused(*NO_MEMORY)
            first.end(NO_MEMORY)

    async def watch(self, mongod: EmbeddedMongoDB) -> None:
        """Looks a few times a second who is late, and does what else is due."""
        suspects: set[Handler] = set()
        looked = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            # A pause of the process counts for little: what came has to be read first.
            now = time.monotonic()
            self.clock += min(now - looked, 0.5)
            looked = now
            overdue = {each for each in self.handlers if each.deadline < self.clock}
            for handler in overdue & suspects:
                handler.end(handler.late)
            suspects = overdue
            self.date = formatdate(usegmt=True)
            mongod.report_end()
            if not self.storage.wedged:
                counts, up = self.storage.counters, self.storage.reachable
                status = f"{counts['stored']} stored, {counts['spooled']} spooled"
                notify(f"WATCHDOG=1\nSTATUS={status}, MongoDB {'up' if up else 'down'}")

    def show(self, results: Sequence[str], documents: Sequence[Document]) -> None:
        """Shows each event to somebody who watches a terminal."""
        for result, document in zip(results, documents) if self._shows_events else ():
            event = RawBSONDocument(document.bson)
            said = event.get("type"), event.get("event", event.get("name")), document.id
            plain = [str(one)[:100] for one in said if isinstance(one, (str, ObjectId))]
            log.info("%s: %s", result, " ".join(plain))


# --- 6. Process -----------------------------------------------------------------------

MAX_LOG_RECORDS = 1000
QUIET_SECONDS = 600.0  # so long the log does not repeat a warning
NO_MONGODB = "no MongoDB, events go to the spool: %s"
MOMENTS = "timestamp", "originalTimestamp", "sentAt", "receivedAt"
SAMPLE = {  # a track call as Segment sends it, for --check
    "type": "track", "event": "Checked", "properties": {"itemName": "Roses"},
    "userId": None, "anonymousId": "check", "integrations": {},
    "context": {"library": {"name": "analytics.js", "version": "2.0.0"}},
} | dict.fromkeys(MOMENTS, "2026-01-31T12:00:00.000Z")  # fmt: skip


class PatientLog(logging.handlers.QueueHandler):
    """Hands lines to a thread, so that a log nobody reads stops nothing."""

    dropped = 0  # lines that did not fit
    logged: ClassVar[dict[str, float]] = {}  # warnings, and until when not again

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING:
            text, now = record.getMessage(), time.monotonic()
            if self.logged.get(text, 0) > now:
                return False
            if len(self.logged) > MAX_LOG_RECORDS:
                self.logged.clear()
            self.logged[text] = now + QUIET_SECONDS
        return True

    def format(self, record: logging.LogRecord) -> str:
        """Returns a line, with its level as journald wants it: sd-daemon(3)."""
        plain = super().format(record)
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)
        status = os.fstat(2)  # is it the journal? systemd.exec(5)
        if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
            priority = {logging.INFO: 6, logging.WARNING: 4}.get(record.levelno, 3)
            return f"<{priority}>{text}"
        return f"{time.strftime('%H:%M:%S')} {record.levelname:7} {text}"

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.dropped:
            record.msg += f" ({self.dropped} lines before it were dropped)"
        try:
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


def notify(state: str, seconds: float = 0) -> None:
    """Tells systemd, if it is there and listens in that time: sd_notify(3)."""
    with contextlib.suppress(KeyError, OSError):  # also where no descriptor is left
        address = re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"])
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(seconds)
            sender.sendto(state.encode(), address)


def open_listener(settings: Settings) -> tuple[socket.socket, str]:
    """Returns systemd's socket, or one of ours, and its URL. Raises SettingsError."""
    host, where = settings.host, f"{settings.host}:{settings.port}"
    try:
        if os.environ.get("LISTEN_PID") == str(os.getpid()):  # sd_listen_fds(3)
            where = "systemd's socket"
            if os.environ.get("LISTEN_FDS") != "1":
                raise SettingsError("systemd has to hand over one socket, not several")
            listener = socket.socket(fileno=3)
        else:
            listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
            listener.bind((host, settings.port))
        listener.listen()
    except (OSError, TypeError) as error:  # é..x is no host name
        raise SettingsError(f"cannot listen on {where}: {describe(error)}") from None
    address = listener.getsockname()
    if settings.demo and not re.fullmatch(LOOPBACK, str(address[0])):
        raise SettingsError("systemd's socket is not loopback's, as a demo's must be")
    if not isinstance(address, tuple):
        return listener, f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return listener, f"http://{host}:{address[1]}"


def find_mongod() -> str | None:
    """Returns a mongod's path: from MONGOD, PATH, or what requirements.txt installs."""
    folders = [os.path.join(folder, "fiftyone", "db", "bin") for folder in sys.path]
    installed = shutil.which("mongod", path=os.pathsep.join(folders))
    return os.environ.get("MONGOD") or shutil.which("mongod") or installed


class EmbeddedMongoDB:
    """A mongod of the receiver's own, started where others look for one."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.folder, self.log = folder, folder / "mongod.log"
        self._client = storage.collection.database.client
        self._on_mongodb = storage.on_mongodb
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Uses the MongoDB that answers there, else starts one; logs what it did."""
        host, port = LOCAL_MONGODB.split(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), 0.5).close()
            if await self.ping(10):  # what has the port may only be slow
                left = await self._on_mongodb(self._is_left_behind)
                whose = "of a receiver that was killed" if left else "which was there"
                return log.info("uses the MongoDB on %s, %s", LOCAL_MONGODB, whose)
        self._spawn("--bind_ip", host, "--port", port)
        while self._process and not await self.ping():
            self.report_end()
        if self._process:
            log.info("started a MongoDB, its data is in %s", self.folder)

    async def ping(self, seconds: float = 0.5) -> bool:
        return bool(await self._on_mongodb(self._ask, "ping", seconds))

    def _ask(self, command: str, seconds: float = 0.5) -> dict[str, Any]:
        """Returns MongoDB's answer, nothing if none comes in that time; blocks."""
        with contextlib.suppress(errors.PyMongoError), pymongo.timeout(seconds):
            return dict(self._client.admin.command(command))
        return {}

    def _is_left_behind(self) -> bool:
        """Tells whether the MongoDB that answers has this folder, which names it."""
        with contextlib.suppress(OSError):
            named = (self.folder / "mongod.lock").read_text().strip()
            return named == str(self._ask("serverStatus").get("pid"))
        return False

    def _spawn(self, *where: str) -> None:
        self.binary = find_mongod() or "mongod"
        argv = [self.binary, *where, "--networkMessageCompressors", "disabled"]
        argv += ["--quiet", "--dbpath", str(self.folder), "--logpath", str(self.log)]
        if sys.platform != "win32":  # where a stranger's file in /tmp would stop it
            argv.append("--nounixsocket")
        null = subprocess.DEVNULL
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._said = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            # In a session of its own Ctrl-C does not end it before the last insert.
            self._process = subprocess.Popen(
                argv, stdin=null, stdout=null, stderr=self._said, start_new_session=True
            )
        except OSError as error:
            how = "set MONGODB_URI, or pip install -r requirements.txt"
            log.warning(NO_MONGODB, f"{self.binary}: {error.strerror}; {how}")

    def report_end(self) -> None:
        """Logs, once, why it ended although nobody stopped it."""
        if not self._process or (status := self._process.poll()) is None:
            return
        self._process = None
        self._said.seek(0)
        said = self._said.read(500).decode(errors="replace").strip()
        why = {
            48: f"{LOCAL_MONGODB} is taken",
            62: f"{self.folder} was written by another version of MongoDB",
            100: f"{self.folder} is in use or cannot be written",
            -signal.SIGILL: "MongoDB 5 and newer need a processor with AVX",
        }.get(status, said or (f"see {self.log}" if self.log.exists() else "no reason"))
        ended = f"{self.binary} ended with status {status}: {why}"
        log.error(NO_MONGODB, f"{ended} (restart the receiver to start it again)")

    def stop(self) -> None:
        """Stops it, or after three seconds kills it, which its journal makes safe."""
        process, self._process = self._process, None
        if process:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            process.kill()
        elif self._is_left_behind():
            self._ask("shutdown")


def make_demo(settings: Settings, disk: Disk, url: str) -> tuple[Settings, str]:
    """Makes up the secrets that are not set; returns them with a text that shows no
    others. Raises SettingsError."""
    path = disk.data / "demo-secrets"
    try:
        if not path.exists():  # a restart leaves them as they are
            line = f"{secrets.token_urlsafe(24)} {secrets.token_urlsafe(24)}\n"
            disk.write(path, line.encode())
        shared, public = path.read_text("ascii").split()
    except (OSError, ValueError):
        raise SettingsError(f"{path} cannot be read: delete it") from None
    known = settings.public_secrets or (public.encode(),)
    changes: dict[str, Any] = {"events_secrets": known}
    fragment = f"public={public}"
    if settings.public_secrets:
        public, fragment = "SEGMENT_PUBLIC_SECRET", ""
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    welcome = f"""
No SEGMENT_SHARED_SECRET is set, so this is a demo with secrets that are made up.

  webhook URL    {url}/webhook?secret={public}
  shared secret  {shared}
  demo page      {url}/#shared={shared}&{fragment}
  the events     in MongoDB, collection {settings.database}.{settings.collection}

Send a signed event from another terminal:

body='{{"type":"track","event":"Favorited","properties":{{"itemName":"Roses"}},"timestamp":"{now}"}}'
signature=$(printf %s "$body" | openssl dgst -sha1 -hmac '{shared}' | sed 's/.* //')
curl -X POST '{url}/webhook?secret={public}' \\
  -H 'Content-Type: application/json' -H "X-Signature: $signature" -d "$body"

README.md goes on from here to Segment itself. Ctrl-C stops.
"""
    if settings.shared_secrets:
        welcome = f"demo page: {url}/#{fragment}\n"
    else:
        changes |= {"shared_secrets": (shared.encode(),), "public_secrets": known}
    return dataclasses.replace(settings, **changes), welcome


def try_mongodb(collection: Any) -> str:
    """Inserts and leaves nothing; returns what that proves. Raises PyMongoError."""
    with pymongo.timeout(5), collection.database.client as client:
        # Refused for its _id, but needs the right to insert and the write concern.
        insert(collection, [bson.encode({"_id": []})], 5)
        hello = client.admin.command("hello")
        if not {"setName", "msg"} & hello.keys():  # of a replica set, of mongos
            return "MongoDB, no replica set, shows only that this user may insert"
        event = SAMPLE | dict.fromkeys(("_id", "messageId"), f"check-{ObjectId()}")
        with client.start_session() as session, session.start_transaction():
            collection.insert_one(event, session=session)
            session.abort_transaction()
    return "MongoDB took an event in a transaction, which was aborted"


def check(settings: Settings) -> int:
    """Logs what would keep events from being stored; returns 1 if anything."""
    collection, disk, faults = open_collection(settings), Disk(settings), []
    if not settings.shared_secrets:
        faults.append("SEGMENT_SHARED_SECRET is not set: no event could be verified")
    try:
        disk.probe(4096)
    except OSError as error:
        faults.append(f"{disk.spool}: no event could wait there: {error.strerror}")
    try:
        proof = try_mongodb(collection)
    except errors.PyMongoError as error:
        faults.append(f"MongoDB does not take an event: {describe(error)}")
    for fault in faults:
        log.error("%s", fault)
    if not faults:
        log.info("settings, secrets and spool are in order; %s", proof)
    return 1 if faults else 0


async def serve(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, it: log.warning("asyncio: %s", it["message"]))
    stop = loop.create_future()  # which a signal cancels
    signals = [signal.SIGTERM, signal.SIGINT]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)  # which nohup ignores
    for number in signals:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.cancel))
    disk, collection = Disk(settings), open_collection(settings)
    listener, url = open_listener(settings)
    welcome = ""
    if settings.demo:
        settings, welcome = make_demo(settings, disk, url)
    storage = Storage(collection, disk)
    server = Server(settings, storage)
    mongod = EmbeddedMongoDB(storage, disk.data / "mongodb")
    # Asked early, pymongo knows MongoDB by the first event; nobody waits long for it.
    first = mongod.ping() if settings.mongodb_uri else mongod.start()
    starting, some = loop.create_task(first), asyncio.FIRST_COMPLETED
    try:
        await asyncio.wait({starting, stop}, timeout=2.0, return_when=some)
        await server.start(listener)
        working = asyncio.gather(storage.drain(), server.watch(mongod))
        log.info("listening on %s, events go to %s", url, collection.full_name)
        if settings.trust_batches:
            log.warning("batches are trusted: Segment signs only a batch's first event")
        # In a thread: standard output may be full, or gone.
        ThreadPoolExecutor(1).submit(print, welcome, end="", flush=True)
        notify("READY=1", 1)
        await asyncio.wait({stop, working}, return_when=some)
        if not stop.done():
            log.error("internal error", exc_info=working.exception())
        notify("STOPPING=1", 0.1)
        log.info("stopping")
        await server.stop(5.0)
        await storage.close(ANSWER_SECONDS)
    finally:
        starting.cancel()
        if not settings.mongodb_uri:
            mongod.stop()
    log.info("stopped")
    return 0 if stop.done() else 1


def main() -> NoReturn:
    """Runs the receiver until SIGTERM, SIGINT or SIGHUP, and ends the process."""
    logging.raiseExceptions = False  # a log that cannot be written changes nothing
    logging.lastResort = None  # pymongo's and asyncio's own words are for nobody
    waiting: queue.Queue[Any] = queue.Queue(MAX_LOG_RECORDS)
    logging.handlers.QueueListener(waiting, logging.StreamHandler()).start()
    log.addHandler(PatientLog(waiting))
    log.setLevel(logging.INFO)
    gc.freeze()  # less to look through, and less often: 5 % more events (bench/run.py)
    gc.set_threshold(10_000)
    try:
        settings = Settings.load(sys.argv[1:], os.environ)
        # Never closed: a signal may come until the end.
        run = asyncio.new_event_loop().run_until_complete
        status = check(settings) if settings.check else run(serve(settings))
    except SettingsError as error:
        print(f"receiver.py: {error}", file=sys.stderr)
        status = 2
    end = time.monotonic() + 1
    while waiting.unfinished_tasks and time.monotonic() < end:  # the log's last lines
        time.sleep(0.01)
    os._exit(status)  # waits for no thread: one of pymongo's may take long


if __name__ == "__main__":
    main()
