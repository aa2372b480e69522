"""Receives Segment's webhooks, proves that they come from Segment, stores every event.

It goes down the page in the order in which an event passes through it:

1. Settings      flags, environment, credential files
2. Authenticity  is this body Segment's?
3. Events        bytes -> JSON -> documents ready for MongoDB
4. Storage       group commit into MongoDB, with a spool on disk behind it
5. HTTP          secret, length, signature, body, then 2, 3, 4 and one answer
6. Process       an embedded MongoDB, systemd, signals, main

In a hurry? ``Handler.do_POST`` in section 5, then what it calls (``authenticate``,
``parse_events``, ``Storage.store``, ``insert``) is the whole integration; the rest is
what makes it last. One thread, asyncio's, owns all state, so nothing is locked; what
blocks (pymongo, the disk, the log) has threads of its own.

Run ``python receiver.py`` and follow what it prints; README.md explains the rest.
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
import importlib.util
import ipaddress
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
import threading
import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote, unquote, unquote_to_bytes

import bson
import bson.json_util
import pymongo
from bson.codec_options import CodecOptions
from bson.errors import InvalidDocument
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo import ReadPreference
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)
from pymongo.write_concern import WriteConcern

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

log = logging.getLogger("receiver")
output = logging.getLogger("output")
T = TypeVar("T")

# --- 1. Settings ----------------------------------------------------------------------

LOCAL_MONGODB = "127.0.0.1:27017"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


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
    if not re.fullmatch(r'[^/\\. "$*<>:|?]{1,63}', text):
        raise ValueError(f"{text!r} cannot be a MongoDB database's name")
    return text


def collection_name(text: str) -> str:
    if not re.fullmatch(r"(?!system\.)(?!\.)(?!.*\.\.)[^$]{1,200}(?<!\.)", text):
        raise ValueError(f"{text!r} cannot be a MongoDB collection's name")
    return text


def setting(
    default: Any, environment: str, help: str, convert: Any = str, metavar: str = "NAME"
) -> Any:
    """Declares a field that a flag of the same name or the environment sets."""
    names = environment.split()
    metadata = {
        "help": help,
        "environment": names,
        "convert": convert,
        "metavar": metavar,
    }
    return dataclasses.field(default=default, metadata=metadata)


SECRETS_HELP = """\
Secrets come from the environment, or from a file in $CREDENTIALS_DIRECTORY (systemd),
never from the command line, which every user of the machine can read:
  SEGMENT_SHARED_SECRET, segment_shared_secret
      keys Segment's signature (without it: a demo with a secret that is made up)
  SEGMENT_PUBLIC_SECRET, segment_public_secret
      ?secret=... of the webhook's URL (without it the query is not checked)
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

    shared_secrets: tuple[bytes, ...] = ()
    public_secrets: tuple[bytes, ...] = ()
    events_secrets: tuple[bytes, ...] = ()  # for GET /events
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
        f"connection string; without it a MongoDB on {LOCAL_MONGODB}, else one that is "
        "started there",
        metavar="URI",
    )
    database: str = setting("segment", "MONGODB_DATABASE", "database", database_name)
    collection: str = setting(
        "events", "MONGODB_COLLECTION", "collection", collection_name
    )
    host: str = setting(
        "127.0.0.1", "RECEIVER_HOST", "address to listen on", metavar="ADDRESS"
    )
    port: int = setting(
        8080, "RECEIVER_PORT PORT", "port to listen on", number(0, 65535), "PORT"
    )
    data_dir: str = setting(
        "data", "RECEIVER_DATA_DIR", "holds spool/, rejected/, mongodb/", str, "FOLDER"
    )
    max_body_bytes: int = setting(
        16 * MIB, "RECEIVER_MAX_BODY_BYTES", "largest body", number(1, GIB), "BYTES"
    )
    max_connections: int = setting(
        512, "RECEIVER_MAX_CONNECTIONS", "most at once", number(1, 100_000), "COUNT"
    )
    max_spool_bytes: int = setting(
        GIB, "RECEIVER_MAX_SPOOL_BYTES", "largest spool/", number(0, GIB**2), "BYTES"
    )

    @classmethod
    def load(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
        """Reads flags, environment and credential files; a flag beats the environment.

        Raises SettingsError; exits for --help.
        """
        options = [field for field in dataclasses.fields(cls) if field.metadata]
        flags = parse_flags(options, arguments)
        if re.search("//[^/@]*:[^/@]*@", flags["mongodb_uri"] or ""):
            raise SettingsError(
                "--mongodb-uri: the process list would show its password: "
                "set MONGODB_URI instead"
            )
        values: dict[str, Any] = {"demo": flags["demo"], "check": flags["check"]}
        for option in options:
            names = option.metadata["environment"]
            sources = [(name, environment.get(name)) for name in names]
            flag = "--" + option.name.replace("_", "-")
            for source, text in ((flag, flags[option.name]), *sources):
                if text is not None:
                    try:
                        convert = option.metadata["convert"]
                        values[option.name] = convert(usable(source, text))
                    except ValueError as error:
                        raise SettingsError(f"{source}: {error}") from None
                    break
        if folders := environment.get("STATE_DIRECTORY"):  # of systemd
            values.setdefault("data_dir", folders.split(":")[0])
        if flags["mongodb_uri"] is None:
            values["mongodb_uri"] = secret("MONGODB_URI", environment)

        shared = secret("SEGMENT_SHARED_SECRET", environment)
        public = secret("SEGMENT_PUBLIC_SECRET", environment)
        values["demo"] |= not (shared or flags["check"])
        host = values.get("host", cls.host)
        if values["demo"] and not is_loopback(host):
            why = "--demo" if shared else "no SEGMENT_SHARED_SECRET is set"
            raise SettingsError(f"{why}: --host must be loopback, not {host!r}")
        values["shared_secrets"] = tuple(shared.encode().split())
        values["public_secrets"] = tuple(public.encode().split())
        values["events_secrets"] = values["public_secrets"]
        return cls(**values)


def parse_flags(
    options: Iterable[dataclasses.Field[Any]], arguments: Sequence[str]
) -> dict[str, Any]:
    """Returns the flags' values, None for those that are not given."""
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
    for option in options:
        where = ", else ".join(option.metadata["environment"])
        default = f"; default {option.default}" if option.default else ""
        is_switch = option.type == "bool"
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            nargs="?" if is_switch else None,
            const="yes" if is_switch else None,
            metavar="yes|no" if is_switch else option.metadata["metavar"],
            help=f"{option.metadata['help']} [{where}{default}]",
        )
    return vars(parser.parse_args(arguments))


def usable(source: str, text: str) -> str:
    """Returns a value as it is. Raises SettingsError where it was clearly garbled."""
    if not text.strip():
        raise SettingsError(f"{source} is empty: give it a value or take it away")
    if found := re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", text):
        what = "is not UTF-8" if found[0] >= "\ud800" else "has a control character"
        raise SettingsError(f"{source} {what}, at character {found.start() + 1}")
    return text


def secret(variable: str, environment: Mapping[str, str]) -> str:
    """Returns a secret from the environment or a systemd credential, else "".

    Raises SettingsError for one that is there and cannot be used.
    """
    source, text = variable, environment.get(variable)
    folder = environment.get("CREDENTIALS_DIRECTORY")
    if text is None and folder:
        source = f"credential {variable.lower()}"
        try:
            path = Path(folder, variable.lower())
            text = path.read_bytes().decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise SettingsError(f"{source}: {error.strerror}") from None
    if text is None:
        return ""
    # White space between secrets may be line ends.
    text = usable(source, " ".join(text.split()))
    if text[0] == text[-1] and text[0] in "\"'":
        raise SettingsError(
            f"{source} is in quotes, which docker's --env-file keeps: take them away"
        )
    return text


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


# --- 2. Authenticity ------------------------------------------------------------------


class Refused(Exception):
    """A request or an event that is not accepted: HTTP status, reason for the sender.

    A reason quotes nothing that came from outside, since it goes into the log.
    """

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}


def unauthorized(reason: str) -> Refused:
    return Refused(401, reason, WWW_Authenticate="Bearer")


def unavailable(reason: str) -> Refused:
    """503 asks Segment to try again, which it does for four hours."""
    return Refused(503, reason, Retry_After="5")


def sign(body: bytes, secret: bytes) -> str:
    """Returns Segment's ``X-Signature``: the hex HMAC-SHA1 of the body's exact bytes."""
    return hmac.digest(secret, body, "sha1").hex()


def verify(body: bytes, signature: str, keys: Iterable[bytes]) -> bool:
    """Tells whether one of the secrets signed these bytes, in constant time for each."""
    return any(hmac.compare_digest(sign(body, key), signature) for key in keys)


# A brace, or a JSON string, whole or cut off by the end, so that a search stays linear.
STRING_OR_BRACE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{}]', re.DOTALL)
MAX_FIRST_EVENT_BYTES = 64 * KIB  # Segment's own limit for an event is 32 KB


def first_event(batch: bytes, start: int) -> bytes:
    """Returns the bytes of the object that begins there, found without parsing it."""
    depth = 0
    for match in STRING_OR_BRACE.finditer(batch, start, start + MAX_FIRST_EVENT_BYTES):
        depth += {b"{": 1, b"}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == b"}":
            return batch[start : match.end()]
        if depth > MAX_DEPTH:
            break
    return b""


def authenticate(body: bytes, signature: str, settings: Settings) -> bool:
    """Raises Refused (401) unless Segment signed the body; tells how to read it.

    Of a batch Segment signs ``JSON.stringify(events[0])`` only, whose bytes follow the
    ``[``: that proves a batch of one, and a longer one if the operator trusts its rest.
    *Extensible Webhook* sends ``[{"json":event}, ...]`` and signs the bare event: then
    the result is True, and every element is to be unwrapped. Seen in Segment's code:
    https://github.com/segmentio/action-destinations (webhook, webhook-extensible).
    """
    keys = settings.shared_secrets
    if verify(body, signature, keys):
        return False
    if not body.startswith(b"["):
        raise unauthorized("X-Signature does not match the body")
    for before, after in ((b"[", b"]"), (b'[{"json":', b"}]")):
        if body.startswith(before):
            start = len(before)
            only = body[start : -len(after)] if body.endswith(after) else b""
            first = first_event(body, start) if settings.trust_batches else b""
            if any(event and verify(event, signature, keys) for event in (only, first)):
                return start > 1
    if settings.trust_batches:
        raise unauthorized("X-Signature matches neither the body nor its first event")
    raise unauthorized(
        "X-Signature does not match the body: if this is a batch of Segment's, which "
        "signs the first event only, turn batching off or set SEGMENT_TRUST_BATCHES=1"
    )


# --- 3. Events ------------------------------------------------------------------------

# https://www.mongodb.com/docs/manual/reference/limits/
MAX_DEPTH = 100
MAX_BSON_BYTES = 16 * MIB
TOO_DEEP = f"BSON cannot hold it: nested more than {MAX_DEPTH} levels deep"


def integer(digits: str) -> int | float:
    """BSON's integers have 64 bits; a larger one was a double in Segment's JavaScript."""
    if len(digits) < 19 or (len(digits) < 21 and -(1 << 63) <= int(digits) < 1 << 63):
        return int(digits)
    return float(digits)


def not_json(constant: str) -> NoReturn:
    raise Refused(400, f"not JSON: {constant} is not JSON")


# json.loads would guess UTF-16 and take NaN; int() refuses more than 4300 digits.
DECODER = json.JSONDecoder(parse_int=integer, parse_constant=not_json)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """An event ready for MongoDB."""

    id: Any
    bson: bytes


class Events(NamedTuple):
    """What a body held; ``faults`` are the reasons why events of a batch cannot be stored."""

    is_batch: bool
    documents: list[Document]
    faults: list[str]


def parse_events(body: bytes, wrapped: bool) -> Events:
    """Turns an authentic body into documents; ``wrapped`` is ``authenticate``'s result.

    Raises Refused: 400 unless it is a JSON object or an array of objects in UTF-8, 422
    if BSON can hold none of them.
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
    events = value if is_batch else [value]
    if wrapped:
        events = [
            event["json"] if isinstance(event, dict) and [*event] == ["json"] else None
            for event in events
        ]
    if not all(isinstance(event, dict) for event in events):
        raise Refused(400, "neither a JSON object nor an array of objects")
    parsed = Events(is_batch, [], [])
    for index, event in enumerate(events):
        try:
            parsed.documents.append(to_document(event))
        except Refused as refused:
            if not is_batch:
                raise
            parsed.faults.append(f"event {index}: {refused.reason}")
    if parsed.faults and not parsed.documents:
        raise Refused(422, parsed.faults[0])
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


def has_operator(value: Any) -> bool:
    """Tells whether an object has a key that begins with ``$``, at any depth."""
    if isinstance(value, dict):
        named = any(name.startswith("$") for name in value)
        return named or any(map(has_operator, value.values()))
    return isinstance(value, list) and any(map(has_operator, value))


def to_document(event: dict[str, Any]) -> Document:
    """Encodes an event. Raises Refused (422) for what BSON cannot hold.

    ``messageId`` is unique and stays the same over Segment's retries and replays: as
    ``_id`` it makes storing an event a second time impossible.
    """
    own = "_id" in event
    try:
        if own and (isinstance(event["_id"], list) or has_operator(event["_id"])):
            raise Refused(422, "BSON cannot hold it: _id is an array or has a $ key")
        if not own:
            name = event.get("messageId")
            event["_id"] = name if name and isinstance(name, str) else ObjectId()
        try:
            encoded = bson.encode(event)
        except UnicodeEncodeError:  # a string that JavaScript cut in a surrogate pair
            if not own and LONE_SURROGATE.search(str(event["_id"])):
                event["_id"] = ObjectId()  # two that differ only there are two events
            event = without_lone_surrogates(event)
            encoded = bson.encode(event)
    except InvalidDocument:
        raise Refused(422, "BSON cannot hold it: a NUL in a key") from None
    except RecursionError:
        raise Refused(422, TOO_DEEP) from None
    # Nesting that deep takes more bytes of these types than most events have.
    levels = encoded.count(b"\x03") + encoded.count(b"\x04")
    if levels > MAX_DEPTH and depth(event) > MAX_DEPTH:
        raise Refused(422, TOO_DEEP)
    if (size := len(encoded)) > MAX_BSON_BYTES:
        reason = f"{size} bytes, at most {MAX_BSON_BYTES}"
        raise Refused(422, f"BSON cannot hold it: {reason}")
    return Document(event["_id"], encoded)


def without_lone_surrogates(value: Any) -> Any:
    """Returns a copy with U+FFFD for each. Raises Refused if two keys become one by it."""
    if isinstance(value, str):
        return LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_lone_surrogates(item) for item in value]
    if not isinstance(value, dict):
        return value
    clean = without_lone_surrogates
    copy = {clean(name): clean(item) for name, item in value.items()}
    if len(copy) != len(value):
        raise Refused(422, "BSON cannot hold it: keys differ only in a lone surrogate")
    return copy


# --- 4. Storage -----------------------------------------------------------------------

Client = pymongo.MongoClient[dict[str, Any]]

INSERT_SECONDS = 1.8  # an event waits for the insert before its own, and for its own
RETRY_SECONDS = 1.0  # between two rounds of the spool
REFUSED_SECONDS = 30.0  # a file of refused documents rests so long after its last try
WEDGED_SECONDS = 20.0  # a batch that takes longer stops the watchdog's feed
QUIET_SECONDS = 60.0  # an outage that comes back within this time is not said again
# What a piece of the spool may take, seconds: so much, and so much for its bytes.
PIECE_SECONDS = 5.0
PIECE_BYTES_PER_SECOND = 60_000
PIECE_BYTES = MIB
# A batch goes at once if none is in flight, else this long after the last one. To a near
# MongoDB it is one at a time; with MongoDB 20 ms away the median answer takes 2.5 round
# trips with one in flight, 1.6 with four, 1.5 with eight (256 connections).
BATCH_SECONDS = 0.005
MAX_IN_FLIGHT = 4
MAX_BATCH_EVENTS = 1000
MAX_BATCH_BYTES = 16 * MIB
MAX_WAITING_EVENTS = 20_000
# https://github.com/mongodb/mongo/blob/master/src/mongo/base/error_codes.yml
DUPLICATE_KEY = 11000
REFUSED = ".refused.bson"
WAITING = {"refused", "spooled"}  # results of what goes to the spool


def open_collection(settings: Settings) -> Any:
    """Returns the collection; its write concern is majority and journaled by default.

    It connects when it is used. Raises SettingsError for a connection string that pymongo
    refuses or warns of, without a piece of the string, which may hold a password.
    """
    uri = settings.mongodb_uri or f"mongodb://{LOCAL_MONGODB}"
    options: dict[str, Any] = {"connect": False, "appname": "segment-receiver"}
    # How soon a host is asked again that swallows packets, or a primary that was lost.
    for name, value in (("connectTimeoutMS", 2000), ("heartbeatFrequencyMS", 1000)):
        if name.lower() not in uri.lower():
            options[name] = value
    try:
        if uri.count("@") > 1:
            raise ValueError("an @ in the user's name or password is written %40")
        with warnings.catch_warnings(action="error", category=UserWarning):
            client: Client = pymongo.MongoClient(uri, **options)
        given = client.write_concern.document
        if given.get("w") == 0:
            raise ValueError("with w=0 MongoDB never says that it stored an event")
        concern = WriteConcern(**{"w": "majority", "j": True, **given})
        database = client[settings.database]
        return database.get_collection(settings.collection, write_concern=concern)
    except (PyMongoError, ValueError, TypeError, OSError, UserWarning) as error:
        reason = re.sub(r"^\[Errno \d+\] ", "", str(error))
        for piece in re.split("[/:@?&=,;]+", unquote(uri) + "/" + uri):
            if len(piece) > 2 and piece.lower() not in reason.lower().split("'")[0]:
                reason = reason.replace(piece, "...")
        raise SettingsError(f"MONGODB_URI: {reason[:300]}") from None


def words(text: str) -> str:
    """Returns a message's beginning, up to where it may quote an event."""
    return re.split(r"[:{\"']", text)[0].strip()[:200]


def describe(error: BaseException) -> str:
    """Returns what an error of pymongo's may say in the log, and no more."""
    name = type(error).__name__
    if isinstance(error, OperationFailure):
        return f"{name}: code {error.code}, {words(str(error))}"
    return name


def is_repeat(collection: Any, data: bytes, fault: Mapping[str, Any]) -> bool:
    """Tells whether a duplicate key means that MongoDB holds this very event.

    So it is where the key is a ``messageId``, Segment's own word for a repeat. In every
    other case (an ``_id`` of the event's own, a collation, a service that does not name
    the key) a look at what stands under the ``_id`` decides. Raises PyMongoError.
    """
    document = RawBSONDocument(data)
    message_id = document.get("messageId")
    named = isinstance(message_id, str) and message_id != ""
    by_message_id = named and document["_id"] == message_id
    if "collation" not in fault:
        key = list(fault.get("keyPattern", ()))
        if (key == ["_id"] and by_message_id) or (key == ["messageId"] and named):
            return True
    primary = collection.with_options(
        CodecOptions(document_class=RawBSONDocument),
        read_preference=ReadPreference.PRIMARY,
    )
    try:
        found = primary.find_one({"_id": {"$eq": document["_id"]}})
    except OperationFailure as error:
        if error.timeout:
            raise
        return False  # its user may not look
    if found is None or bson.encode({"_id": found["_id"]}) != bson.encode(
        {"_id": document["_id"]}
    ):
        return False
    # MongoDB has moved _id to the front.
    same = bson.encode({"_id": 0, **found}) == bson.encode({"_id": 0, **document})
    return by_message_id or same


def insert(
    collection: Any, documents: Sequence[bytes], seconds: float
) -> tuple[list[str], dict[int, str]]:
    """Inserts documents; returns what became of each, and what MongoDB said to refusals.

    A result is "stored", "duplicate" or "refused"; the words stand under their code.
    Raises what pymongo raises where nothing is known of any of them.
    """
    results = ["stored"] * len(documents)
    complaints: dict[int, str] = {}
    with pymongo.timeout(seconds):
        try:
            collection.insert_many(map(RawBSONDocument, documents), ordered=False)
        except BulkWriteError as error:
            for fault in error.details["writeConcernErrors"]:
                raise WriteConcernError(fault["errmsg"], fault["code"]) from None
            for fault in error.details["writeErrors"]:
                index, code = fault["index"], fault["code"]
                results[index] = "refused"
                if code == DUPLICATE_KEY and is_repeat(
                    collection, documents[index], fault
                ):
                    results[index] = "duplicate"
                else:
                    complaints[code] = words(fault["errmsg"])
    return results, complaints


class Piece(NamedTuple):
    """Some documents of a file in the spool, and where they end in it."""

    documents: list[bytes]
    end: int
    is_last: bool


class Disk:
    """``spool/`` and ``rejected/``: files that survive a power cut.

    All methods but ``open`` run in one thread, one after the other. ``files`` and
    ``bytes`` are what the spool holds, as known from the last look and since. Everything
    raises OSError.
    """

    def __init__(self, settings: Settings) -> None:
        self.data = Path(settings.data_dir)
        self.spool, self.rejected = self.data / "spool", self.data / "rejected"
        self.max_bytes = settings.max_spool_bytes
        self.files = self.bytes = 0

    def open(self) -> None:
        """Makes the folders, locks them for this process, and tries to write to each.

        Raises SettingsError with the folder's name if that cannot be done.
        """
        for folder in (self.data, self.spool, self.rejected):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if folder == self.data:
                    lock_folder(folder)
                # Cut off as they were written, so never promised.
                for unfinished in folder.glob(".tmp-*"):
                    unfinished.unlink()
                self.write(folder / ".tmp-probe", b"")
                (folder / ".tmp-probe").unlink()
                sync_folder(folder.parent)
            except BlockingIOError:
                raise SettingsError(f"{folder}: another receiver uses it") from None
            except OSError as error:
                reason = f"cannot write to it: {error.strerror}"
                raise SettingsError(f"data folder {folder}: {reason}") from None

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file whole and durably, or not at all."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            # For its owner only: events hold personal data.
            with open(temporary, "xb", opener=partial(os.open, mode=0o600)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)

    def require_room(self, size: int) -> None:
        if self.bytes + size > self.max_bytes:
            self.scan()  # somebody may have made room
        if self.bytes + size > self.max_bytes:
            raise OSError(errno.EDQUOT, f"limit of {self.max_bytes} bytes reached")

    def put(
        self, documents: Iterable[bytes], suffix: str, is_fresh: bool = False
    ) -> None:
        """Writes documents to a new file of the spool: a dump, as mongorestore reads."""
        data = b"".join(documents)
        if is_fresh:
            self.require_room(len(data))
        # After a crash, or with a wrong clock, a time alone could be there already.
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}{suffix}"
        self.write(self.spool / name, data)
        self.files += 1
        self.bytes += len(data)

    def scan(self) -> dict[str, float]:
        """Returns the spool's files with the time of their last change, oldest first."""
        self.spool.mkdir(mode=0o700, exist_ok=True)
        found, size = {}, 0
        with os.scandir(self.spool) as entries:
            for entry in entries:
                if entry.name[0] != "." and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found[entry.name] = status.st_mtime
                    size += status.st_size
        self.files, self.bytes = len(found), size
        return dict(sorted(found.items()))

    def read(self, name: str, offset: int, most: int) -> Piece:
        """Reads documents from there on, of ``most`` bytes together, but at least one.

        One without ``_id`` is set aside, since a repeated try would store it again.
        Raises ValueError where what comes next is no document.
        """
        documents: list[bytes] = []
        end = offset
        with open(self.spool / name, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(offset)
            while end < length or not length:
                head = file.read(4)
                size = int.from_bytes(head, "little")
                if documents and end + size - offset > most:
                    break
                # MongoDB's own documents may be 16 KiB larger than those of its users.
                whole = 5 <= size <= MAX_BSON_BYTES + 16 * KIB
                document = head + (file.read(size - 4) if whole else b"")
                if not whole or len(document) < size or document[-1] != 0:
                    if documents:
                        break
                    raise ValueError(f"torn, empty or foreign at byte {end}")
                try:
                    has_id = "_id" in RawBSONDocument(document)
                except bson.errors.InvalidBSON:
                    raise ValueError(f"no BSON at byte {end}") from None
                if has_id:
                    documents.append(document)
                else:
                    self.keep(
                        document, f"spool/{name}: a document without _id", ".bson"
                    )
                end += size
        return Piece(documents, end, end >= length)

    def touch(self, name: str) -> None:
        os.utime(self.spool / name)

    def remove(self, name: str) -> None:
        path = self.spool / name
        size = path.stat().st_size
        os.unlink(path)
        self.files -= 1
        self.bytes -= size

    def keep(self, data: bytes, reason: str, suffix: str) -> None:
        """Keeps in ``rejected/`` what can be no document, and why."""
        name = hashlib.sha256(data).hexdigest()[:32]  # again the same, the same file
        self.write(self.rejected / f"{name}.reason.txt", f"{reason}\n".encode())
        self.write(self.rejected / f"{name}{suffix}", data)
        log.warning("kept as %s: %s", self.rejected / f"{name}{suffix}", words(reason))

    def set_aside(self, name: str, reason: str) -> None:
        """Moves a file that is no spool to ``rejected/``."""
        kept = self.rejected / f"{secrets.token_hex(4)}-{name}"
        self.write(kept.with_name(f"{kept.name}.reason.txt"), f"{reason}\n".encode())
        os.replace(self.spool / name, kept)
        sync_folder(self.rejected)
        log.error("spool/%s is set aside as %s: %s", name, kept, reason)

    def probe(self, size: int) -> None:
        """Finds out whether an event of that many bytes could be written."""
        self.require_room(size)
        self.write(self.spool / ".tmp-probe", bytes(size))
        os.unlink(self.spool / ".tmp-probe")


def sync_folder(path: Path) -> None:
    """Makes a rename durable; Windows cannot open a folder, and does so by itself."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            warn_of_sync(path)
        finally:
            os.close(descriptor)


@functools.cache
def warn_of_sync(path: Path) -> None:
    log.warning(
        "%s: its file system cannot make renames durable: a power cut may", path
    )


def lock_folder(path: Path) -> None:
    """Locks a folder until the process ends, however it ends. Raises BlockingIOError."""
    if sys.platform == "win32":
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError from None
    else:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclasses.dataclass
class Progress:
    """How far a file of the spool has been delivered, and how the next piece is tried."""

    offset: int = 0
    most: int = PIECE_BYTES
    failures: int = 0  # in a row
    refusals: int = 0  # in a row, of a piece that is one document


class Storage:
    """Stores documents in MongoDB, or on disk while MongoDB does not take them.

    Group commit: all that waits goes out as one insert, and one journal flush serves
    every event that came during the last one. What MongoDB does not take, whatever it
    says, is in the spool, and is tried again until it does: nobody judges an event by an
    error code. ``up`` tells whether fresh events are worth a try; while it is false they
    go to the spool. ``counters`` are events since the start.
    """

    def __init__(self, collection: Any, disk: Disk) -> None:
        self.collection = collection
        self.disk = disk
        self.up = True
        self.counters = Counter(
            stored=0, duplicates=0, rejected=0, spooled=0, refused=0
        )
        self._loop = asyncio.get_running_loop()
        self._mongodb = ThreadPoolExecutor(MAX_IN_FLIGHT + 2)  # and spool, demo
        self._disk = ThreadPoolExecutor(1)
        self._queue: deque[tuple[list[bytes], asyncio.Future[list[str]]]] = deque()
        self._waiting = 0  # events in the queue or in flight
        self._in_flight: dict[asyncio.Task[None], float] = {}  # since when
        self._next_batch = 0.0  # when another may be sent beside them
        self._sending: asyncio.Handle | None = None
        self._unkept = 0  # bytes that lately could be kept nowhere
        self._progress: dict[str, Progress] = {}
        self._delivered = 0  # events since the spool last had something to send
        self._after = ""  # the file at which the last round ended
        self._said: set[str] = set()
        self._outage_said = False
        self._quiet_until = 0.0
        self._drainer: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._drainer = self._loop.create_task(self._drain())

    async def close(self, seconds: float) -> None:
        """Stores or spools what waits, at most for so long."""
        if self._drainer:
            self._drainer.cancel()  # what it has under way is still in the spool
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=seconds)

    async def store(self, documents: list[bytes]) -> list[str]:
        """Returns "stored", "duplicate" or "spooled" for each.

        Raises Refused (503) if neither MongoDB nor the disk took one of them, or too
        much is in flight.
        """
        if self._waiting and self._waiting + len(documents) > MAX_WAITING_EVENTS:
            raise unavailable("too many events in flight")
        future: asyncio.Future[list[str]] = self._loop.create_future()
        self._waiting += len(documents)
        self._queue.append((documents, future))
        if not self._sending:  # after all that came in this turn of the loop
            self._sending = self._loop.call_soon(self._send)
        return await future

    async def keep(self, body: bytes, reason: str, events: int = 1) -> None:
        """Keeps a body that can be no document. Raises Refused (503) if it cannot."""
        try:
            await self.on_disk(self.disk.keep, body, reason, ".json")
        except OSError as error:
            self._say(
                "keep", "cannot write to %s: %s", self.disk.rejected, error.strerror
            )
            raise unavailable("it cannot be stored, and not be kept either") from None
        self.counters["rejected"] += events

    async def on_disk(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._disk, work, *arguments)

    async def on_mongodb(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._mongodb, work, *arguments)

    async def ask(self, command: str, seconds: float) -> dict[str, Any]:
        """Returns MongoDB's answer to a command, nothing if none comes in that time."""

        def ask() -> dict[str, Any]:
            with contextlib.suppress(PyMongoError), pymongo.timeout(seconds):
                return dict(self.collection.database.client.admin.command(command))
            return {}

        return await self.on_mongodb(ask)

    def find(self, ids: list[str], limit: int) -> bytes:
        """Returns the newest documents, or those with the ids, as relaxed Extended JSON.

        They are read as raw BSON: else ``{"$ref": ...}`` would become something else.
        Blocks; raises Refused (503).
        """
        wanted: list[Any] = []
        for name in ids:
            wanted.append(name)
            if ObjectId.is_valid(name):
                wanted.append(ObjectId(name))
            with contextlib.suppress(ValueError, RecursionError):
                wanted.append(json.loads(name))
        raw = self.collection.with_options(CodecOptions(document_class=RawBSONDocument))
        query = {"_id": {"$in": wanted}} if ids else {}
        relaxed = bson.json_util.RELAXED_JSON_OPTIONS
        try:
            with pymongo.timeout(INSERT_SECONDS):
                found = raw.find(query).sort("$natural", -1).limit(1 if ids else limit)
                return bson.json_util.dumps(found, json_options=relaxed).encode()
        except PyMongoError as error:
            log.warning("the demo cannot read MongoDB: %s", describe(error))
            raise unavailable("MongoDB cannot be read now") from None

    def feed_watchdog(self) -> None:
        """Tells systemd that all is well, unless a batch has been in flight for long."""
        oldest = min(self._in_flight.values(), default=self._loop.time())
        if self._loop.time() - oldest < WEDGED_SECONDS:
            counts = self.counters
            status = f"{counts['stored']} stored, {counts['spooled']} spooled"
            up = "up" if self.up else "down"
            notify(f"WATCHDOG=1\nSTATUS={status}, MongoDB {up}")

    @property
    def reachable(self) -> bool:
        """Whether MongoDB takes events, as far as is known without asking."""
        topology = self.collection.database.client.topology_description
        return self.up and topology.has_writable_server()

    @property
    def failing(self) -> bool:
        """Whether an event lately could not be kept."""
        return self._unkept > 0

    # Group commit

    def _send(self) -> None:
        """Sends what waits: at once if nothing is in flight, else a moment after it."""
        self._sending = None
        while self._queue and len(self._in_flight) < MAX_IN_FLIGHT:
            now = self._loop.time()
            if self._in_flight and now < self._next_batch:
                self._sending = self._loop.call_at(self._next_batch, self._send)
                return
            self._next_batch = now + BATCH_SECONDS
            self._in_flight[self._loop.create_task(self._commit(self._take()))] = now

    def _take(self) -> list[tuple[list[bytes], asyncio.Future[list[str]]]]:
        batch = []
        events = size = 0
        while self._queue and events < MAX_BATCH_EVENTS and size < MAX_BATCH_BYTES:
            batch.append(self._queue.popleft())
            events += len(batch[-1][0])
            size += sum(map(len, batch[-1][0]))
        return batch

    async def _commit(
        self, batch: list[tuple[list[bytes], asyncio.Future[list[str]]]]
    ) -> None:
        """Stores a batch, or spools it, and gives each of its senders the results."""
        documents = [document for submitted, _ in batch for document in submitted]
        try:
            results = await self._keep(documents)
        except Exception:
            log.exception("internal error")
            results = ["lost"] * len(documents)
        self._waiting -= len(documents)
        start = 0
        for submitted, future in batch:
            part = results[start : start + len(submitted)]
            start += len(submitted)
            if future.done():  # its sender did not wait
                continue
            if "lost" in part:
                reason = "neither MongoDB nor the disk can take it"
                future.set_exception(unavailable(reason))
            else:
                future.set_result(part)
        task = asyncio.current_task()
        assert task
        del self._in_flight[task]
        if self._sending:
            self._sending.cancel()
        self._send()

    async def _keep(self, documents: list[bytes]) -> list[str]:
        """Returns "stored", "duplicate", "spooled" or "lost" for each."""
        results = ["spooled"] * len(documents)
        suffix = ".bson"
        if self.up:
            try:
                results = await self._insert(documents, INSERT_SECONDS)
                suffix = REFUSED
            except Exception as error:  # noqa: BLE001, any: the event waits
                self._went_down(error)
        left = [d for d, result in zip(documents, results) if result in WAITING]
        if not left:
            self._unkept = 0
            return results
        size = sum(map(len, left))
        result = "spooled"
        try:
            await self.on_disk(self.disk.put, left, suffix, True)
            self._unkept = 0
            self.counters["spooled"] += len(left)
            self.counters["refused"] += len(left) if suffix == REFUSED else 0
        except OSError as error:
            if not self._unkept:
                log.error(
                    "events are answered 503: %s: %s", self.disk.spool, error.strerror
                )
            self._unkept = size
            result = "lost"
        return [result if each in WAITING else each for each in results]

    async def _insert(self, documents: Sequence[bytes], seconds: float) -> list[str]:
        """Calls ``insert``, counts, and logs the first refusal for each reason."""
        work = (insert, self.collection, documents, seconds)
        results, complaints = await self.on_mongodb(*work)
        self.counters["stored"] += results.count("stored")
        self.counters["duplicates"] += results.count("duplicate")
        for code, said in complaints.items():
            message = "MongoDB refuses events, they wait in %s: code %d, %s"
            self._say(f"refused {code}", message, self.disk.spool, code, said)
        return results

    # Outages

    def _say(self, kind: str, message: str, *values: Any) -> None:
        """Logs the first warning of a kind until the spool was empty."""
        if kind not in self._said:
            self._said.add(kind)
            log.warning(message, *values)

    def _went_down(self, error: Exception) -> None:
        was_up, self.up = self.up, False
        if was_up and self._loop.time() > self._quiet_until:
            self._outage_said = True
            message = "MongoDB cannot take events, they go to %s until it can: %s"
            log.warning(message, self.disk.spool, describe(error))

    def _came_up(self) -> None:
        self.up = True
        if self._outage_said:
            self._outage_said = False
            self._quiet_until = self._loop.time() + QUIET_SECONDS
            log.info("MongoDB takes events again")

    # The spool

    async def _drain(self) -> None:
        """Delivers the spool for ever. MongoDB is asked by nothing but its next piece."""
        while True:
            try:
                await self._round()
            except Exception:
                log.exception("%s cannot be delivered", self.disk.spool)
            await asyncio.sleep(RETRY_SECONDS)

    async def _round(self) -> None:
        """Tries every file that is due, until an insert fails as a whole.

        Fresh files first, then those of refused documents, each oldest first; the next
        round begins behind the file at which this one ended, so that none holds up others.
        """
        try:
            found = await self.on_disk(self.disk.scan)
            if self._unkept:
                await self.on_disk(self.disk.probe, self._unkept)
                self._unkept = 0
        except OSError as error:
            self._say("scan", "%s cannot be used: %s", self.disk.spool, error.strerror)
            return
        if not found:
            self._said.clear()
        self._progress = {n: p for n, p in self._progress.items() if n in found}
        now = time.time()
        due = [
            name
            for name, tried in found.items()
            if not (name.endswith(REFUSED) and 0 <= now - tried < REFUSED_SECONDS)
        ]
        after = self._after
        due.sort(key=lambda name: (name.endswith(REFUSED), name <= after, name))
        for name in due:
            if not await self._deliver(name):
                self._after = name
                return
        self._came_up()
        if self._delivered:
            log.info("spool: %d events delivered", self._delivered)
            self._delivered = 0

    async def _deliver(self, name: str) -> bool:
        """Delivers a file piece by piece; returns False if an insert failed as a whole.

        Every document has its ``_id``, so an insert can be repeated: a crash at any point
        costs nothing. What is refused is in a file of its own before this one goes.
        """
        progress = self._progress.setdefault(name, Progress())
        is_last = False
        try:
            while not is_last:
                work = (self.disk.read, name, progress.offset, progress.most)
                documents, end, is_last = await self.on_disk(*work)
                results = await self._deliver_piece(documents, progress)
                if results is None:
                    return False
                refused = [d for d, r in zip(documents, results) if r == "refused"]
                if refused and name.endswith(REFUSED):
                    if is_last and not progress.offset and refused == documents:
                        await self.on_disk(self.disk.touch, name)
                        return True
                elif refused:
                    self.counters["refused"] += len(refused)
                if refused:
                    await self.on_disk(self.disk.put, refused, REFUSED)
                progress.offset = end
            await self.on_disk(self.disk.remove, name)
        except FileNotFoundError:
            pass  # somebody took it away
        except ValueError as error:
            await self._set_aside(name, str(error))
        except OSError as error:
            self._say(name, "spool/%s waits: %s", name, error.strerror)
        return True

    async def _deliver_piece(
        self, documents: list[bytes], progress: Progress
    ) -> list[str] | None:
        """Returns what became of a piece's documents; None if that is not known.

        After each failure, but one to reach a server, the next piece is half as large and
        has twice the time: so a slow link, a slow cluster and a document for whose sake
        MongoDB refuses the whole command each get what they need. Such a document alone,
        refused twice, is refused like others.
        """
        if not documents:
            return []
        size = sum(map(len, documents))
        seconds = PIECE_SECONDS + size / PIECE_BYTES_PER_SECOND
        began = self._loop.time()
        try:
            results = await self._insert(
                documents, seconds * 2 ** min(progress.failures, 6)
            )
        except Exception as error:  # noqa: BLE001, any: the event waits
            message = "the spool waits for MongoDB: %s"
            self._say(f"failed {describe(error)}", message, describe(error))
            if isinstance(error, ConnectionFailure) and not isinstance(
                error, NetworkTimeout
            ):
                return None
            progress.failures += 1
            progress.most = max(size // 2, 1)
            if getattr(error, "timeout", False) or len(documents) > 1:
                return None
            progress.refusals += 1
            if progress.refusals < 2:
                return None
            results = ["refused"]
        else:
            took = self._loop.time() - began
            if took < INSERT_SECONDS:
                self._came_up()
            self._delivered += len(results) - results.count("refused")
            progress.most = min(progress.most * 2, PIECE_BYTES)
            if self._in_flight or self._queue:
                await asyncio.sleep(took)  # fresh events go first
        progress.failures = progress.refusals = 0
        return results

    async def _set_aside(self, name: str, reason: str) -> None:
        try:
            await self.on_disk(self.disk.set_aside, name, reason)
        except OSError as error:
            self._say(name, "spool/%s waits: %s", name, error.strerror)


# --- 5. HTTP --------------------------------------------------------------------------

# RFC 9110 section 5.6.2, RFC 9112 sections 3 and 5, and stricter: no obs-fold, no bare CR
# or LF. What two parsers could read in two ways is refused. Text is Latin-1: a byte each.
TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
AUTHORITY = r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*"
REQUEST_LINE = re.compile(
    rf"({TOKEN}) ((?:https?://({AUTHORITY}))?(/[\x21-\x7e]*)) HTTP/1\.([01])"
)
FIELD_LINES = re.compile(rf"(?:{TOKEN}:[\t\x20-\x7e\x80-\xff]*(?:\r\n|\Z))*")
FIELD = re.compile(r"([^:\r]+):([^\r]*)(?:\r\n|\Z)")
HOST = re.compile(AUTHORITY)
CONTENT_LENGTH = re.compile("[0-9]{1,19}")
METHOD_START = re.compile(TOKEN.encode())
NOT_IN_REQUEST_LINE = re.compile(rb"[^\x20-\x7e\r]")
BARE_CR_OR_LF = re.compile(rb"\r(?!\n|\Z)|(?<!\r)\n")
SIGNATURE = re.compile("[0-9a-f]{40}")
MAX_TARGET_BYTES = 8 * KIB
MAX_HEAD_BYTES = 32 * KIB
MAX_FIELDS = 100
MAX_ANSWER_ID_BYTES = KIB  # Segment's client hangs on answers of more than some 16 KB

IDLE_SECONDS = (
    180.0  # longer than the proxies in front: who closes first loses a request
)
HEAD_SECONDS = 10.0
BODY_SECONDS = 10.0
BODY_BYTES_PER_SECOND = 100_000
ANSWER_SECONDS = 4.0  # Segment waits five; two looks and the way there take the rest
SEND_SECONDS = 10.0
LINGER_SECONDS = 10.0
LOOK_SECONDS = 0.25
GRACE_SECONDS = 1.0  # so long after it came or was answered a connection makes no room
READ_BYTES = 256 * KIB
SMALL_BODY_BYTES = 64 * KIB  # a larger one is worked on in a thread
MAX_BODIES_BYTES = 64 * MIB  # of all bodies that have come in part
SPARE_FILES = 30  # descriptors for MongoDB, the disk, the log

INCOMPLETE = Refused(408, "the request was not complete in time")
LATE = unavailable("not stored in time")
NO_ROOM = unavailable("too many connections")
NO_MEMORY = unavailable("too many large bodies in flight")


def parse_request_line(line: str) -> tuple[str, str | None, str, str]:
    """Returns method, host if it names one, path with query, and minor version.

    Raises Refused: 400 or 414.
    """
    match = REQUEST_LINE.fullmatch(line)
    if len(match[2] if match else line) > MAX_TARGET_BYTES:
        raise Refused(414, "request target too long")
    if not match:
        raise Refused(400, "malformed HTTP: request line")
    return match[1], match[3], match[4], match[5]


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
        if not METHOD_START.match(data) or NOT_IN_REQUEST_LINE.search(data, checked):
            raise Refused(400, "malformed HTTP: request line")
        if len(data) > MAX_TARGET_BYTES + 64:
            raise Refused(414, "request target too long")
    elif end + 2 > checked:
        parse_request_line(data[:end].decode("latin-1"))
    if len(data) > MAX_HEAD_BYTES + 3:  # its end may have come in part
        raise Refused(431, "request head too large")


def parse_fields(lines: str) -> dict[str, str]:
    """Returns the header's fields, names in lower case, repeated ones joined by ", ".

    Raises Refused: 400 or 431.
    """
    if lines.count("\r\n") >= MAX_FIELDS:
        raise Refused(431, "request head too large")
    if not FIELD_LINES.fullmatch(lines):
        raise Refused(400, "malformed HTTP: header field")
    fields: dict[str, str] = {}
    for name, value in FIELD.findall(lines):
        name, value = name.lower(), value.strip(" \t")
        if name in fields:
            if name in ("host", "content-length"):
                raise Refused(400, "malformed HTTP: repeated Host or Content-Length")
            value = f"{fields[name]}, {value}"
        fields[name] = value
    if not CONTENT_LENGTH.fullmatch(fields.get("content-length", "0")):
        raise Refused(400, "malformed HTTP: Content-Length")
    return fields


def members(value: str) -> list[str]:
    """Returns the members of a field that is a list, in lower case."""
    return [member.strip(" \t") for member in value.lower().split(",")]


class Handler(BaseHTTPRequestHandler):
    """One connection, a coroutine: http.server's handler, where what waits is async.

    ``command``, ``path`` (without the query), ``query`` and ``headers`` are those of the
    request in hand, ``unread`` the bytes of its body that have not come. When
    ``deadline`` has passed on the server's clock the task is cancelled, and ``late`` is
    what it answers then, None to close without a word. Only a connection that is
    ``answering`` may have an event on its way to MongoDB.
    """

    protocol_version = "HTTP/1.1"
    server: Server  # type: ignore[assignment]
    headers: dict[str, str]  # type: ignore[assignment]
    wfile: BytesIO
    methods: ClassVar = {
        "/webhook": "PATCH, POST, PUT",
        "/webhook/": "PATCH, POST, PUT",
        "/health": "GET, HEAD",
    }

    def __init__(
        self,
        server: Server,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        # Not http.server's __init__, which would handle the connection at once.
        self.server = server
        self.settings = server.settings
        self.storage = server.storage
        self.reader = reader
        self.writer = writer
        self.wfile = BytesIO()
        self.buffer = b""
        self.since = time.monotonic()  # when it came or last completed a request
        self.began = 0.0  # when its body did
        self.held = 0  # bytes of a body that has come in part
        self.evicted = False
        self.task: asyncio.Task[None]
        self.enter(IDLE_SECONDS, None)

    def enter(
        self, seconds: float, late: Refused | None, answering: bool = False
    ) -> None:
        self.deadline = self.server.clock + seconds
        self.late = late
        self.answering = answering

    def end(self, late: Refused | None) -> None:
        """Ends what it waits for."""
        self.late = late
        self.task.cancel()

    async def handle(self) -> None:  # type: ignore[override]
        """Reads requests and answers them, until the connection is to be closed."""
        self.close_connection = False
        try:
            while not self.close_connection:
                await self.handle_one_request()
                if self.buffer:  # a pipelined request: first it is the others' turn
                    await asyncio.sleep(0)
            await self.linger()
        except (OSError, asyncio.CancelledError):
            pass  # the client has gone, or has to go
        finally:
            self.server.forget(self)
            self.writer.transport.abort()

    async def handle_one_request(self) -> None:  # type: ignore[override]
        """Reads a request and answers it. Raises OSError when the client has gone."""
        self.close_connection = True
        self.command, self.request_version, self.unread = "", "HTTP/1.1", 0
        try:
            if not await self.read_head():
                return
            methods = self.methods.get(self.path)
            if methods is None:
                raise Refused(404, "not found")
            if self.command not in methods.split(", "):
                raise Refused(405, "method not allowed", Allow=methods)
            await getattr(self, f"do_{self.command}")()
        except Refused as refused:
            self.refuse(refused)
        except asyncio.CancelledError:
            if self.late is None:
                raise
            self.refuse(self.late)
        except OSError:
            raise
        except Exception:
            log.exception("internal error")
            self.refuse(unavailable("internal error"))
        finally:
            self.server.release(self)
        await self.send()

    # Reading

    async def receive(self) -> bytes:
        """Returns what comes next of a request. Raises Refused if nothing does."""
        data = await self.reader.read(READ_BYTES)
        if not data:
            raise Refused(400, "malformed HTTP: it ends too early")
        return data

    async def read_head(self) -> bool:
        """Reads and parses a head; returns False if no request comes."""
        self.enter(IDLE_SECONDS, None)
        while self.buffer in (b"", b"\r", b"\r\n"):
            data = await self.reader.read(READ_BYTES)
            if not data:
                return False
            self.buffer += data
        self.buffer = self.buffer.removeprefix(b"\r\n")  # RFC 9112 section 2.2
        checked = 0
        while (end := self.buffer.find(b"\r\n\r\n", max(checked - 3, 0))) < 0:
            if not checked:
                self.enter(HEAD_SECONDS, INCOMPLETE)
            check_incomplete_head(self.buffer, checked)
            checked = len(self.buffer)
            self.buffer += await self.receive()
        self.enter(ANSWER_SECONDS, LATE, answering=True)
        self.parse_head(self.buffer[:end].decode("latin-1"))
        self.buffer = self.buffer[end + 4 :]
        return True

    def parse_head(self, head: str) -> None:
        """Parses a head without its empty line. Raises Refused: 400, 414 or 431."""
        line, _, lines = head.partition("\r\n")
        self.command, host, target, minor_version = parse_request_line(line)
        self.request_version = f"HTTP/1.{minor_version}"
        if len(head) > MAX_HEAD_BYTES:
            raise Refused(431, "request head too large")
        self.headers = headers = parse_fields(lines)
        if "host" not in headers and minor_version == "1":
            raise Refused(400, "malformed HTTP: Host is missing")
        if host is not None:  # RFC 9112 section 3.2.2
            headers["host"] = host
        if not HOST.fullmatch(headers.get("host", "")):
            raise Refused(400, "malformed HTTP: Host")
        self.path, _, self.query = target.partition("?")
        self.unread = int(headers.get("content-length", "0"))
        options = members(headers.get("connection", ""))
        wanted = minor_version == "1" or "keep-alive" in options
        # Where a body could stand whose end is unknown, no other request can follow.
        framed = "content-length" in headers or self.command in ("GET", "HEAD")
        framed = framed and "transfer-encoding" not in headers
        self.close_connection = "close" in options or not wanted or not framed

    async def read_body(self) -> bytes:
        """Reads the whole body. Raises Refused."""
        length = self.unread
        if len(self.buffer) < length:
            expects = "100-continue" in members(self.headers.get("expect", ""))
            if (
                expects and self.request_version == "HTTP/1.1"
            ):  # RFC 9110 section 10.1.1
                self.enter(SEND_SECONDS, None, answering=True)
                self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await self.writer.drain()
            self.began = self.server.clock
            self.enter(BODY_SECONDS + length / BODY_BYTES_PER_SECOND, INCOMPLETE)
            data = bytearray(self.buffer)
            while len(data) < length:
                data += await self.receive()
                self.server.hold(self, len(data))
            self.buffer = bytes(data)
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        self.unread = 0
        self.enter(ANSWER_SECONDS, LATE, answering=True)
        return body

    # Answering

    def answer(
        self,
        status: int,
        value: Any,
        headers: Mapping[str, str] = {},
        media_type: str = "application/json",
    ) -> None:
        """Prepares an answer: bytes as they are, anything else as JSON."""
        payload = (
            value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"
        )
        self.close_connection |= self.unread > 0 or self.server.stopping or self.evicted
        self.send_response_only(status)
        self.send_header("Date", self.server.date)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(payload)))
        for name, text in headers.items():
            self.send_header(name, text)
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def refuse(self, refused: Refused) -> None:
        self.server.count_refusal(refused)
        self.answer(refused.status, {"error": refused.reason}, refused.headers)

    async def send(self) -> None:
        """Sends the answer in one write, and waits until the client has taken it."""
        self.enter(SEND_SECONDS, None, answering=not self.evicted)
        self.writer.write(self.wfile.getvalue())
        self.wfile = BytesIO()
        await self.writer.drain()
        self.server.completed(self)

    async def linger(self) -> None:
        """Lets the client read the answer: unread bytes turn a close into a reset."""
        self.enter(LINGER_SECONDS, None)
        self.buffer = b""
        self.writer.write_eof()
        if self.evicted:  # its place is another's already
            await asyncio.sleep(0.02)
            return
        while await self.reader.read(READ_BYTES):
            pass

    async def turn_away(self) -> None:
        """Answers that there is no room, in place of ``handle``."""
        self.command, self.request_version, self.unread = "", "HTTP/1.1", 0
        self.evicted = True
        with contextlib.suppress(OSError, asyncio.CancelledError):
            self.refuse(NO_ROOM)
            self.writer.write(self.wfile.getvalue())
            await self.linger()
        self.server.forget(self)
        self.writer.transport.abort()

    # Routes

    async def do_POST(self) -> None:
        """Takes events. Checks run cheapest first, before a byte of the body is read."""
        self.require_secret(self.settings.public_secrets)
        self.require_length()
        signature = self.headers.get("x-signature", "").lower()
        if not SIGNATURE.fullmatch(signature):
            raise unauthorized("X-Signature is missing or not 40 hexadecimal digits")
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
        self.answer_results(Counter(results), events)

    do_PUT = do_PATCH = do_POST

    def answer_results(self, counts: Counter[str], events: Events) -> None:
        """Says what became of the events."""
        if events.is_batch:
            value: dict[str, Any] = {
                "inserted": counts["stored"],
                "duplicates": counts["duplicate"],
                "rejected": len(events.faults),
            }
        elif counts["spooled"]:
            value = {}
        else:
            [(name, _)] = events.documents
            name = str(name) if isinstance(name, ObjectId) else name
            short = len(json.dumps(name)) <= MAX_ANSWER_ID_BYTES
            value = {"insertedId": name} if short else {}
            value |= {"duplicate": True} if counts["duplicate"] else {}
        if spooled := counts["spooled"]:
            more = {name: count for name, count in value.items() if count}
            self.answer(202, {"spooled": spooled} | more)
        else:
            self.answer(200, value)

    async def do_GET(self) -> None:
        """Says whether events can be kept; counters only to whoever knows the secret."""
        self.refuse_transfer_encoding()
        storage = self.storage
        value: dict[str, Any] = {
            "status": "failing" if storage.failing else "ok",
            "mongodb": "up" if storage.reachable else "down",
        }
        with contextlib.suppress(Refused):
            self.require_secret(self.settings.public_secrets)
            value |= storage.counters
            value |= {"unauthorized": self.server.unauthorized}
            value |= {"spool_files": storage.disk.files}
        self.answer(503 if storage.failing else 200, value)

    do_HEAD = do_GET

    # Checks

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
        right = len(given) == 1 and [
            hmac.compare_digest(given[0], key) for key in accepted
        ]
        if accepted and not (right and any(right)):
            raise unauthorized("public secret: missing, wrong, or given twice")

    def refuse_transfer_encoding(self) -> None:
        if "transfer-encoding" in self.headers:
            reason = "Transfer-Encoding is not supported, send Content-Length"
            raise Refused(411, reason)

    def require_length(self) -> None:
        """Raises Refused: 411 for a body of unknown length, 413 for a large one."""
        self.refuse_transfer_encoding()
        if "content-length" not in self.headers:
            raise Refused(411, "Content-Length is required")
        most = self.settings.max_body_bytes
        if self.unread > most:
            # Segment will not send it again.
            message = "lost: a body of %d bytes, RECEIVER_MAX_BODY_BYTES is %d"
            self.server.log_some("413", logging.ERROR, message, self.unread, most)
            raise Refused(413, f"the limit is {most} bytes")

    async def work(self, task: Callable[..., T], body: bytes, *more: Any) -> T:
        """Does it, with a large body in a thread, one such work after the other."""
        if len(body) <= SMALL_BODY_BYTES:
            return task(body, *more)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.server.worker, task, body, *more)


class DemoHandler(Handler):
    """The demo's routes, for pages of this machine and nobody else."""

    methods = Handler.methods | {
        "/webhook": "OPTIONS, PATCH, POST, PUT",
        "/webhook/": "OPTIONS, PATCH, POST, PUT",
        "/": "GET, HEAD",
        "/demo.html": "GET, HEAD",
        "/events": "GET, HEAD",
    }

    async def do_GET(self) -> None:
        if self.path == "/health":
            return await super().do_GET()
        self.refuse_transfer_encoding()
        self.require_loopback()
        if self.path == "/events":
            return await self.events()
        try:
            page = Path(__file__).with_name("demo.html").read_bytes()
        except OSError:
            raise Refused(404, "demo.html is not beside receiver.py") from None
        policy = {"Content-Security-Policy": "frame-ancestors 'none'"}
        self.answer(200, page, policy, "text/html; charset=utf-8")

    do_HEAD = do_GET

    async def events(self) -> None:
        """Returns the newest documents, or the one with an ``_id``, as they are stored."""
        self.require_secret(self.settings.events_secrets)
        limit, *_ = self.parameters("limit") or [b"20"]
        if not re.fullmatch(rb"[1-9][0-9]?|100", limit):
            raise Refused(400, "limit is a number from 1 to 100")
        ids = [name.decode("utf-8", "replace") for name in self.parameters("id")]
        storage = self.storage
        self.answer(200, await storage.on_mongodb(storage.find, ids, int(limit)))

    async def do_OPTIONS(self) -> None:
        self.require_loopback()
        allowed = {
            "Access-Control-Allow-Methods": "POST, PUT, PATCH",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Signature",
            "Access-Control-Max-Age": "600",
            "Access-Control-Allow-Private-Network": "true",
        }
        self.answer(200, {}, allowed)

    def end_headers(self) -> None:
        """Lets demo.html read answers, opened as a file or from another port here."""
        origin = self.headers.get("origin", "")
        host = re.fullmatch(r"https?://\[?([\w.:-]+?)\]?(:[0-9]+)?", origin, re.ASCII)
        if origin == "null" or (host and is_loopback(host[1])):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
        super().end_headers()

    def require_loopback(self) -> None:
        """Raises Refused (403) for another Host: DNS rebinding would let a site read."""
        host = re.sub(r":[0-9]*\Z", "", self.headers.get("host", ""))
        proxied = {"forwarded", "x-forwarded-for", "via"} & self.headers.keys()
        if proxied or not is_loopback(host.strip("[]")):
            raise Refused(403, "the demo is served to this machine only")


class Server:
    """Accepts connections, and limits them, their time and what their bodies hold.

    ``clock`` counts seconds for deadlines, ``date`` is for answers, ``stopping`` tells
    handlers to close their connection, ``worker`` is the thread for large bodies.
    """

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self.settings = settings
        self.storage = storage
        self.clock = 0.0
        self.date = formatdate(usegmt=True)
        self.stopping = False
        self.unauthorized = 0
        self.worker = ThreadPoolExecutor(1)  # the interpreter has no use for a second
        self._handlers: set[Handler] = set()  # all
        # Those that count, in the order in which they last completed a request.
        self._connections: OrderedDict[Handler, None] = OrderedDict()
        self._most = settings.max_connections
        self._held = 0
        self._kinds: Counter[str] = Counter()
        self._shows_events = settings.demo or sys.stderr and sys.stderr.isatty()

    async def start(self, listener: socket.socket) -> None:
        """Begins to accept from a bound socket."""
        if sys.platform != "win32":
            files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if files < self._most + SPARE_FILES:
                self._most = max(files - SPARE_FILES, 1)
                log.warning(
                    "at most %d connections: ulimit -n is %d", self._most, files
                )
        # asyncio's backlog is also how many it accepts at once.
        self._server = await asyncio.start_server(
            self._connect, sock=listener, backlog=16
        )
        listener.listen(1024)

    async def stop(self, seconds: float) -> None:
        """Stops accepting, finishes the requests in hand, ends all other connections."""
        self.stopping = True
        self._server.close()
        end = time.monotonic() + seconds
        while self._handlers and (now := time.monotonic()) < end:
            # One that is new or was answered just now may have a request on its way.
            for handler in list(self._handlers):
                waits = handler.late is None and not handler.answering
                if waits and now - handler.since > 0.5:
                    handler.end(None)
            await asyncio.sleep(0.02)
        for handler in self._handlers:
            handler.end(None)

    # Connections

    def _connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Gives a new connection its handler; at the limit another has to make room."""
        # Else drain() returns with 64 KB unsent, which no deadline would end.
        writer.transport.set_write_buffer_limits(0)
        handler = (DemoHandler if self.settings.demo else Handler)(self, reader, writer)
        self._handlers.add(handler)
        if len(self._connections) < self._most or self._make_room():
            self._connections[handler] = None
            work = handler.handle()
        else:
            work = handler.turn_away()
        handler.task = asyncio.get_running_loop().create_task(work)

    def _make_room(self) -> bool:
        """Ends the connection that waits longest; returns False if none does for long."""
        recently = time.monotonic() - GRACE_SECONDS  # its request may be on its way
        for handler in self._connections:
            if handler.since > recently:
                break
            if not handler.answering:
                del self._connections[handler]
                handler.evicted = True
                # Not the client's fault: 408 would be the end of an authentic event.
                handler.end(handler.late and NO_ROOM)
                return True
        return False

    def completed(self, handler: Handler) -> None:
        handler.since = time.monotonic()
        if handler in self._connections:
            self._connections.move_to_end(handler)

    def forget(self, handler: Handler) -> None:
        self._handlers.discard(handler)
        self._connections.pop(handler, None)

    def hold(self, handler: Handler, size: int) -> None:
        """Counts what has come of a body; too much at once ends the one that began first.

        Raises Refused (503) if that is this one.
        """
        self._held += size - handler.held
        handler.held = size
        while self._held > MAX_BODIES_BYTES:
            reading = [each for each in self._handlers if each.late is INCOMPLETE]
            first = min(reading, key=lambda each: (not each.held, each.began))
            self.release(first)
            if first is handler:
                raise NO_MEMORY
            first.end(NO_MEMORY)

    def release(self, handler: Handler) -> None:
        self._held -= handler.held
        handler.held = 0

    async def watch(self, *others: Callable[[], None]) -> None:
        """Looks a few times a second who is late, and does what else is due."""
        suspects: set[Handler] = set()
        looked = counted = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            # The process may have been paused: what came meanwhile has to be read before
            # anybody is late, so a pause counts for little, and one look is not enough.
            now = time.monotonic()
            self.clock += min(now - looked, 0.5)
            looked = now
            late = {each for each in self._handlers if each.deadline < self.clock}
            for handler in late & suspects:
                handler.end(handler.late)
            suspects = late
            self.date = formatdate(usegmt=True)
            if now - counted > 60:
                counted = now
                self._log_kinds()
            for other in others:
                other()

    # Logs

    def count_refusal(self, refused: Refused) -> None:
        self.unauthorized += refused.status == 401
        kind = f"{refused.status} {refused.reason.partition(':')[0]}"
        self.log_some(kind, logging.WARNING, "refused: %s", kind)

    def log_some(self, kind: str, level: int, message: str, *values: Any) -> None:
        """Logs the first of a kind; the others are counted, as a flood may come."""
        self._kinds[kind] += 1
        if self._kinds[kind] == 1:
            log.log(level, message, *values)

    def _log_kinds(self) -> None:
        counts, self._kinds = self._kinds, Counter()
        repeated = [f"{n} x {kind}" for kind, n in counts.most_common() if n > 1]
        if repeated:
            log.warning("refused within a minute: %s", ", ".join(repeated))

    def show(self, results: Sequence[str], documents: Sequence[Document]) -> None:
        """Lets somebody who watches a terminal see each event land."""
        if self._shows_events:
            for result, (name, encoded) in zip(results, documents):
                event = RawBSONDocument(encoded)
                said = (event.get("type"), event.get("event", event.get("name")))
                label = " ".join(word[:100] for word in said if isinstance(word, str))
                log.info("%s: %s %s", result, label, str(name)[:100])


# --- 6. Process -----------------------------------------------------------------------

PRIORITIES = {logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
MAX_LOG_RECORDS = 1000


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


class PatientLog(logging.handlers.QueueHandler):
    """Hands records to a thread of its own, so that a log nobody reads stops nothing.

    What does not fit into the queue is dropped and counted.
    """

    queue: queue.Queue[logging.LogRecord]

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__(queue.Queue(MAX_LOG_RECORDS))
        self.dropped = 0
        self.target = handler
        threading.Thread(target=self._write, daemon=True).start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        while True:
            record = self.queue.get()
            self.target.handle(record)
            if self.dropped and self.queue.empty():
                dropped, self.dropped = self.dropped, 0
                log.warning("the log was not read: %d lines dropped", dropped)
            self.queue.task_done()

    def wait(self, seconds: float) -> None:
        """Waits until all is written, at most so long."""
        end = time.monotonic() + seconds
        while self.queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)


def start_logs() -> list[PatientLog]:
    """Logs to standard error; what is said to the user goes to standard output."""
    logging.raiseExceptions = False  # a log that cannot be written changes nothing
    for name in ("pymongo", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    output.propagate = False
    logs = []
    for logger, stream, formatter in (
        (logging.getLogger(), sys.stderr, LogFormatter()),
        (output, sys.stdout, logging.Formatter()),
    ):
        writer = logging.StreamHandler(stream) if stream else logging.NullHandler()
        writer.setFormatter(formatter)
        logs.append(PatientLog(writer))
        logger.addHandler(logs[-1])
        logger.setLevel(logging.INFO)
    return logs


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


def open_listener(settings: Settings) -> socket.socket:
    """Returns systemd's listening socket, sd_listen_fds(3), or binds one of its own.

    Raises SettingsError if neither can be had.
    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        if os.environ.get("LISTEN_FDS") != "1":
            raise SettingsError("systemd has to hand over one socket, not several")
        os.set_inheritable(3, False)
        listener = socket.socket(fileno=3)
        if settings.demo and not is_loopback(str(listener.getsockname()[0])):
            raise SettingsError("the demo takes only a loopback socket of systemd")
        return listener
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(f"cannot listen on {where}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    address = listener.getsockname()
    if not isinstance(address, tuple):
        return f"unix:{address}"
    host, port = map(str, address[:2])
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage = storage
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._left_behind = 0  # the process id of one that a killed receiver started

    async def start(self) -> None:
        """Uses the MongoDB that answers there, else starts one; logs what it did."""
        if version := await self.version():
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.folder / "mongod.lock").read_text())
                status = await self.storage.ask("serverStatus", 1.0)
                self._left_behind = pid if status.get("pid") == pid else 0
            whose = "left behind by a receiver" if self._left_behind else "found"
            log.info("MongoDB %s on %s, %s, is used", version, LOCAL_MONGODB, whose)
        elif why := await self._start():
            log.warning("no MongoDB, events go to the spool: %s", why)

    async def version(self) -> str:
        return str((await self.storage.ask("buildInfo", 0.5)).get("version", ""))

    async def _start(self) -> str:
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
        if sys.platform != "win32":
            arguments.append(
                "--nounixsocket"
            )  # a stranger's file in /tmp would stop it
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            socket.create_server((host, int(port))).close()  # the port is free
            # A session of its own: Ctrl-C is the receiver's, whose last insert needs it.
            self._process = subprocess.Popen(  # noqa: ASYNC220, it takes a moment
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot start {binary} on {LOCAL_MONGODB}: {error.strerror}"
        while self._process.poll() is None:
            if version := await self.version():
                what = f"MongoDB {version} on {LOCAL_MONGODB}"
                log.info("started %s, its data is in %s", what, self.folder)
                return ""
        status = self._process.returncode
        self._process = None
        words.seek(0)
        said = words.read().decode(errors="replace").strip()[:500]
        record = self.folder / "mongod.log"
        known = {
            48: f"{LOCAL_MONGODB} is taken",
            62: f"{self.folder} was written by another version of MongoDB",
            100: f"{self.folder} is in use or cannot be written",
            -4: "illegal instruction: MongoDB 5 and newer need a processor with AVX",
        }
        why = known.get(status) or said or (f"see {record}" if record.exists() else "")
        return f"{binary} ended with status {status}{why and ': ' + why}"

    def report_end(self) -> None:
        """Logs, once, if it ended although nobody stopped it."""
        if self._process and self._process.poll() is not None:
            status = self._process.returncode
            log.error("mongod ended with status %d: restart the receiver", status)
            self._process = None

    async def stop(self, seconds: float) -> None:
        """Stops it, or after that time kills it, which its journal makes safe."""
        pid = self._process.pid if self._process else self._left_behind
        tries = int(seconds / 0.05)
        with contextlib.suppress(OSError):  # it has ended
            for attempt in range(tries if pid else 0):
                if attempt == 0:
                    os.kill(pid, signal.SIGTERM)
                await asyncio.sleep(0.05)
                if self._process and self._process.poll() is not None:
                    return
                os.kill(pid, 0)
            if pid:
                os.kill(pid, signal.SIGKILL)


def with_demo_secrets(settings: Settings, disk: Disk) -> Settings:
    """Returns the settings of a demo, with secrets in the place of those not given.

    They are made up once and kept in the data folder, so that a restart leaves the open
    demo page and a pasted command working. Raises SettingsError.
    """
    path = disk.data / "demo-secrets"
    names = "SEGMENT_SHARED_SECRET", "SEGMENT_PUBLIC_SECRET"
    try:
        if not path.exists():
            lines = [f"{name}={secrets.token_urlsafe(24)}\n" for name in names]
            disk.write(path, "".join(lines).encode())
        pairs = (line.partition("=") for line in path.read_text().splitlines())
        kept = {name: value for name, _, value in pairs}
        shared, public = (kept[name].encode() for name in names)
    except (OSError, ValueError, KeyError):
        raise SettingsError(f"{path} cannot be read: delete it") from None
    if settings.shared_secrets:
        events = settings.public_secrets or (public,)
        return dataclasses.replace(settings, events_secrets=events)
    accepted = settings.public_secrets or (public,)
    return dataclasses.replace(
        settings,
        shared_secrets=(shared,),
        public_secrets=accepted,
        events_secrets=accepted,
    )


def welcome(settings: Settings, url: str, made_up: bool) -> str:
    """Returns what somebody who starts the receiver for the first time wants to know."""
    public = quote(settings.events_secrets[0], safe="")
    if not made_up:
        # A secret of the user's own is not printed; one made up for /events has to be.
        fragment = "" if settings.public_secrets else f"#public={public}"
        return f"demo page: {url}/{fragment}"
    shared = settings.shared_secrets[0].decode()
    return f"""
No SEGMENT_SHARED_SECRET is set, so this is a demo with secrets that are made up.

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


# A track call as Segment sends it, for --check.
SAMPLE = {
    "anonymousId": "check",
    "context": {"library": {"name": "analytics.js", "version": "2.0.0"}},
    "event": "Checked",
    "integrations": {},
    "messageId": "check",
    "originalTimestamp": "2026-01-31T12:00:00.000Z",
    "properties": {"itemName": "Roses"},
    "receivedAt": "2026-01-31T12:00:00.000Z",
    "sentAt": "2026-01-31T12:00:00.000Z",
    "timestamp": "2026-01-31T12:00:00.000Z",
    "type": "track",
    "userId": None,
}


def try_mongodb(collection: Any) -> str:
    """Tries what storing an event takes, and stores nothing; returns how much that proves.

    Raises what stands in the way. An insert in a transaction that is aborted finds
    blocked writes, a view, a validator and a missing right. A standalone MongoDB has no
    transactions: there it is an insert that must fail for its ``_id``, which some servers
    refuse before they look at anything else.
    """
    client = collection.database.client
    with pymongo.timeout(5):
        hello = client.admin.command("hello")
        if "setName" in hello or hello.get("msg") == "isdbgrid":
            event = SAMPLE | {"messageId": f"check-{ObjectId()}"}
            encoded = RawBSONDocument(to_document(event).bson)
            with client.start_session() as session, session.start_transaction():
                # The transaction has a write concern of its own.
                inside = collection.with_options(write_concern=WriteConcern())
                inside.insert_one(encoded, session=session)
                session.abort_transaction()
            return "MongoDB took an event in a transaction, which was aborted"
        try:
            collection.insert_many([RawBSONDocument(bson.encode({"_id": []}))])
        except BulkWriteError:
            pass
    return (
        "MongoDB answers, and this user may insert; as it is no replica set, whether a "
        "validator or a view stands in the way shows only the first event"
    )


def check(settings: Settings) -> int:
    """Logs what would keep events from being stored, and what to do; 1 if anything."""
    faults = []
    if not settings.shared_secrets:
        faults.append("SEGMENT_SHARED_SECRET is not set: no event could be verified")
    collection = open_collection(settings)
    disk = Disk(settings)
    disk.open()
    try:
        disk.probe(4096)
    except OSError as error:
        faults.append(f"{disk.spool}: {error.strerror}: no event could wait there")
    proof = ""
    try:
        proof = try_mongodb(collection)
    except PyMongoError as error:
        advice = {
            13: "grant its user a role that may insert into the collection",
            18: "correct user and password",
            121: "correct the collection's validator, which refuses a plain event",
            166: "name a collection that is no view",
            8000: "correct user and password, or make room in the cluster",
        }.get(getattr(error, "code", 0) or 0, "check address, network access, primary")
        faults.append(f"MongoDB: {advice}: {describe(error)}")
    for fault in faults:
        log.error("%s", fault)
    if not faults:
        log.info("settings, secrets and spool are in order; %s", proof)
    return 1 if faults else 0


async def serve(settings: Settings) -> int:
    """Starts everything in order, waits for a signal, and stops it in reverse order."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: log.error("asyncio: %s", context["message"])
    )
    stop = asyncio.Event()
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP, nohup ignores it
        nohup = name == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        if number and not nohup:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    disk = Disk(settings)
    disk.open()
    made_up = not settings.shared_secrets
    if settings.demo:
        settings = with_demo_secrets(settings, disk)
    storage = Storage(open_collection(settings), disk)
    server = Server(settings, storage)
    listener = open_listener(settings)
    mongod = EmbeddedMongoDB(storage, disk.data / "mongodb")
    first = mongod.start() if not settings.mongodb_uri else storage.ask("ping", 5.0)
    try:
        # Asked early, pymongo knows MongoDB by the first event; but nobody waits for it.
        starting = loop.create_task(first)
        stopped = loop.create_task(stop.wait())
        some = asyncio.FIRST_COMPLETED
        await asyncio.wait({starting, stopped}, timeout=2.0, return_when=some)
        await server.start(listener)
        storage.start()
        url = url_of(listener)
        where = f"{settings.database}.{settings.collection}"
        log.info("listening on %s, events go to %s", url, where)
        if settings.trust_batches:
            log.warning("batches are trusted: Segment signs only a batch's first event")
        if settings.demo:
            output.info("%s", welcome(settings, url, made_up))
        notify("READY=1", 1)
        watch = loop.create_task(server.watch(mongod.report_end, storage.feed_watchdog))
        await asyncio.wait({stopped, watch}, return_when=some)
        notify("STOPPING=1", 0.1)
        log.info("stopping")
        starting.cancel()
        await server.stop(5.0)
        await storage.close(ANSWER_SECONDS)
    finally:
        await mongod.stop(3.0)
    log.info("stopped")
    return 0 if stop.is_set() else 1


def main() -> NoReturn:
    """Runs the receiver until SIGTERM, SIGINT or SIGHUP, and ends the process."""
    # A descriptor below 3 that is closed would be the next socket's or file's.
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass
    logs = start_logs()
    gc.freeze()  # less to look through, and less often: 5 % more events (bench/run.py)
    gc.set_threshold(10_000)
    try:
        settings = Settings.load(sys.argv[1:], os.environ)
        status = check(settings) if settings.check else asyncio.run(serve(settings))
    except SettingsError as error:
        print(f"receiver.py: {error}", file=sys.stderr)
        status = 2
    for each in logs:
        each.wait(1.0)
    os._exit(status)  # waits for no thread: one of pymongo's may be long


if __name__ == "__main__":
    main()
