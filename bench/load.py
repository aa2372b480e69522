"""The load: distinct signed events, and wrk, which sends each once over kept-alive
connections and checks every answer."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import BENCH, ROOT
from processes import PATH, SHARED_SECRET

sys.path.insert(0, str(ROOT))
from receiver import sign

WRK_THREADS = 2


def make_events(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Makes distinct ``track`` events, each 1.1 KB as JSON and all of one length.

    The messageId is analytics.js's: a time, then a UUID, so that ids grow in MongoDB's
    index as they do in life.
    """
    numbers = random.Random(seed)
    for index in range(count):
        user = uuid.UUID(int=numbers.getrandbits(128))
        milliseconds = 1_700_000_000_000 + index
        stamp = (
            f"2023-11-14T{index // 3600 % 24:02}:{index // 60 % 60:02}:{index % 60:02}"
        )
        stamp += f".{index % 1000:03}Z"
        yield {
            "anonymousId": str(user),
            "channel": "client",
            "context": {
                "ip": "203.0.113.25",
                "library": {"name": "analytics.js", "version": "next-1.64.0"},
                "locale": "en-GB",
                "page": {
                    "path": "/shop/flowers",
                    "referrer": "https://www.example.com/",
                    "search": "?utm_source=newsletter&utm_campaign=spring",
                    "title": "Flowers for every day, delivered to your door",
                    "url": "https://www.example.com/shop/flowers",
                },
                "timezone": "Europe/London",
                "userAgent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 "
                "(KHTML, like Gecko) Chrome/119.0.0.0 Safari/537.36",
            },
            "event": "Favorited",
            "integrations": {"All": True, "Amplitude": {"session_id": milliseconds}},
            "messageId": f"ajs-next-{milliseconds}-{uuid.UUID(int=user.int ^ index)}",
            "originalTimestamp": stamp,
            "properties": {
                "itemName": "Roses",
                "price": 12.5,
                "quantity": 1 + index % 9,
                "tags": ["red", "seasonal", "gift"],
            },
            "receivedAt": stamp,
            "sentAt": stamp,
            "timestamp": stamp,
            "type": "track",
            "userId": f"user-{numbers.randrange(10**6):06}",
            "version": 2,
            "writeKey": "bench0123456789abcdefghijklmnopq",
        }


def to_json(value: Any) -> bytes:
    """Encodes as ``JSON.stringify`` does."""
    return json.dumps(value, separators=(",", ":")).encode()


def to_documents(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the documents that the receiver would store."""
    return [event | {"_id": event["messageId"]} for event in events]


def signed_headers(body: bytes) -> dict[str, str]:
    return {
        "Content-Type": "application/json",
        "X-Signature": sign(body, SHARED_SECRET.encode()).decode(),
    }


def to_request(body: bytes) -> bytes:
    """Returns the bytes of a whole HTTP request."""
    fields = {"Host": "localhost", "User-Agent": "Segment.io/1.0"}
    fields |= signed_headers(body) | {"Content-Length": str(len(body))}
    lines = [f"POST {PATH} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
    return "\r\n".join((*lines, "", "")).encode() + body


class Requests:
    """A file of distinct signed requests, all of one length: ``size``, in bytes."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self.size = 0
        self.body_size = 0
        with open(path, "wb") as file:
            for event in make_events(count):
                body = to_json(event)
                request = to_request(body)
                if self.size not in (0, len(request)):
                    raise AssertionError("requests differ in length")
                self.size, self.body_size = len(request), len(body)
                file.write(request)


@dataclass
class Load:
    """What wrk saw. Times are in seconds."""

    acknowledged: int
    refused: int  # answers with another status than the one that acknowledges
    exhausted: int  # threads that ran out of events
    socket_errors: int
    seconds: float
    median: float
    p99: float
    max: float
    connections: int
    wrk_cpu: float = 0.0  # processors' worth

    @property
    def per_second(self) -> float:
        return self.acknowledged / self.seconds

    @property
    def fault(self) -> str:
        """Says why this is no figure, else ""."""
        faults = {
            "answers with a wrong status": self.refused,
            "socket errors": self.socket_errors,
            "threads ran out of events": self.exhausted,
        }
        if not self.acknowledged:
            return "no answer"
        return ", ".join(f"{count} {what}" for what, count in faults.items() if count)


def run_wrk(
    requests: Requests,
    port: int,
    connections: int,
    seconds: int,
    *,
    part: tuple[float, float] = (0, 1),
    status: int = 200,
) -> Load:
    """Sends requests from that part of the file for some seconds.

    Latencies are wrk's: from the write of a request to the end of its answer, with wrk's
    correction for what a closed loop does not send while it waits for a slow answer.
    """
    threads = min(WRK_THREADS, connections)
    first, last = (int(requests.count * end) for end in part)
    arguments = (requests.path, requests.size, first, last, status, threads)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            *("wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s"),
            *("--timeout", "20s", "--script", str(BENCH / "requests.lua")),
            *(f"http://127.0.0.1:{port}/webhook", "--", *map(str, arguments)),
        ],
        check=False,  # what it printed says more than its exit status
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, found, result = done.stdout.partition("RESULT ")
    if not found:
        raise RuntimeError(f"wrk failed: {done.stdout}{done.stderr}")
    load = Load(**json.loads(result), connections=connections)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    load.wrk_cpu = used / load.seconds
    return load
