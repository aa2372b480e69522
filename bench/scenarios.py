"""What is measured, and how. Each method of Bench measures one server once.

Every acknowledged event has to be a document afterwards, else there is no figure.
"""

import json
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from load import Requests, make_bodies, sign
from processes import Mongod, Server, wait_until

BATCH = 1000  # events
BATCHES = 10
LARGE = 4_000_000  # bytes
LARGE_AT_ONCE = 128


@dataclass
class Bench:
    """Every server has a database of its own, so no run stores an event twice."""

    folder: Path
    mongod: Mongod
    requests: Requests
    seconds: int

    def throughput(self, name: str, connections: int) -> dict[str, float]:
        """One server under one load, warmed up for a second. Times are in seconds."""
        with Server(name, self.folder, self.mongod) as server:
            send = partial(self.requests.send, server.port, connections)
            warm = send(0, 1)
            before = server.cpu_seconds(), self.mongod.cpu_seconds()
            load = send(1, self.seconds)
            after = server.cpu_seconds(), self.mongod.cpu_seconds()
            peak = server.memory("VmHWM")
            events = load["acknowledged"]
            server.check(warm["acknowledged"] + events, 2 * connections)
        cpu, mongod = ((end - start) / events for start, end in zip(before, after))
        return load | {"cpu": cpu, "mongod": mongod, "peak": peak}

    def batch(self, name: str) -> dict[str, float]:
        """Batches of 1000, in turn with insert_many of the same documents.

        The first batch opens connections and makes the collection: it is not counted.
        """
        bodies = list(make_bodies(BATCH * BATCHES))
        documents = [json.loads(body) for body in bodies]
        for document in documents:
            document["_id"] = document["messageId"]
        database = self.mongod.client["bench" + uuid.uuid4().hex]
        events, posted, inserted = database["events"], [], []
        with Server(name, self.folder, self.mongod) as server:
            for start in range(0, len(bodies), BATCH):
                part = slice(start, start + BATCH)
                body = b"[" + b",".join(bodies[part]) + b"]"
                posted.append(timed(require, 200, server, body, sign(body)))
                insert = partial(events.insert_many, ordered=False)
                inserted.append(timed(insert, documents[part]))
            server.check(len(bodies), 0)
        events.drop()
        single = [timed(events.insert_one, document) for document in documents[:500]]
        self.mongod.client.drop_database(database)
        receiver, driver = (BATCH / median(times[1:]) for times in (posted, inserted))
        return {
            "batches of 1000 in one request, events/s": receiver,
            "the same by insert_many, events/s": driver,
            "the first by the second": receiver / driver,
            "a lone insert_one, ms": median(single) * 1e3,
        }

    def spool(self, name: str) -> dict[str, float]:
        """MongoDB is killed, events are spooled; it is started, they are delivered."""
        with Server(name, self.folder, self.mongod) as server:
            self.mongod.kill()
            try:
                [body] = make_bodies(1)  # the server learns by it that MongoDB is away
                require(202, server, body, sign(body))
                load = self.requests.send(server.port, 32, 1, self.seconds, status=202)
            finally:
                self.mongod.start(*self.mongod.command)
            count = server.database["events"].estimated_document_count
            wait_until(count, "the drain begins")
            events, first = load["acknowledged"], count()
            drained = partial(wait_until, lambda: count() > events)
            drain = (events - first) / timed(drained, "the drain ends", 120)
            server.check(1 + events, 32)
        return {
            "spooled from 32 connections while MongoDB is down, events/s": (
                load["per_second"]
            ),
            "then drained, events/s": drain,
        }

    def memory(self, name: str) -> dict[str, float]:
        """Memory after the start, and with large bodies that come all at once."""
        [event] = make_bodies(1)
        event = event.replace(b"messageId", b"noId")  # so that the same can be stored
        body = event.replace(b"Roses", b"x" * LARGE)
        with Server(name, self.folder, self.mongod) as server:
            start = server.memory("VmRSS")
            with ThreadPoolExecutor(LARGE_AT_ONCE) as pool:
                post = partial(server.post, body)
                statuses = list(pool.map(post, [sign(body)] * LARGE_AT_ONCE))
            taken = statuses.count(200) + statuses.count(202)
            peak = server.memory("VmHWM")
            server.check(taken, LARGE_AT_ONCE)
        return {
            "memory after the start, MB": start,
            "peak with 128 bodies of 4 MB at once, MB": peak,
            "so many of them were answered 2xx": taken,
        }


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def require(status: int, server: Server, body: bytes, signature: str) -> None:
    if (other := server.post(body, signature)) != status:
        raise RuntimeError(f"it answers {other}, not {status}")
