"""What is measured, and how: the comparison with the peers, and the small scenarios."""

from __future__ import annotations

import http.client
import itertools
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import bson
import pymongo
from load import (
    Load,
    Requests,
    make_events,
    run_wrk,
    signed_headers,
    to_documents,
    to_json,
)
from processes import (
    PATH,
    DelayProxy,
    Kind,
    Mongod,
    Server,
    cpu_seconds,
    machine_cpu_seconds,
    memory_bytes,
    wait_until,
)
from report import Ratio, Report, Run, of

BATCH_EVENTS = 1000
BATCHES = 10
LIMITS = (32, 500)
BUSY_CONNECTIONS = 512
LATENCY_CONNECTIONS = 256
SPOOL_CONNECTIONS = 32
SPOOL_FILE_EVENTS = 32
DRAIN_EVENTS_PER_SECOND = 30_000  # more than can be drained, so that some are left
QUIET_SECONDS = 0.25

# What a server can do to a measurement: end, refuse, hang. Then there is no figure.
FAILURES = (RuntimeError, TimeoutError, subprocess.TimeoutExpired)


class Bench:
    """Holds what the scenarios share: mongod, the file of requests, the report.

    A part of the file is for warming up; every run has a database of its own, so the
    rest of the file serves each run anew, and no run stores an event twice.
    """

    def __init__(
        self,
        folder: Path,
        mongod: Mongod,
        requests: Requests,
        report: Report,
        rounds: int,
        seconds: int,
        warm_up: int,
    ) -> None:
        self.folder = folder
        self.mongod = mongod
        self.requests = requests
        self.report = report
        self.rounds = rounds
        self.seconds = seconds
        self.warm_up = warm_up
        self.warm_part = warm_up / (warm_up + seconds)

    # One run

    def server(self, kind: Kind, uri: str = "") -> Server:
        return Server(kind, self.folder, uri or self.mongod.uri)

    def warm(self, server: Server, connections: int) -> Load | None:
        if not self.warm_up:
            return None
        part = (0, self.warm_part)
        load = run_wrk(self.requests, server.port, connections, self.warm_up, part=part)
        self.settle(server.database)
        return load

    def load(self, server: Server, connections: int, status: int = 200) -> Load:
        part = (self.warm_part, 1)
        return run_wrk(
            self.requests,
            *(server.port, connections, self.seconds),
            part=part,
            status=status,
        )

    def settle(self, database: str) -> int:
        """Waits until no more arrives, and returns the documents in the database."""
        events = self.mongod.client[database]["events"]
        before = -1
        for _ in range(40):
            count = events.estimated_document_count()
            if count == before:
                break
            before = count
            time.sleep(QUIET_SECONDS)
        return events.count_documents({})

    def counted(self, database: str, *loads: Load | None, other: int = 0) -> str:
        """Says what is wrong with these loads, else "".

        Every acknowledged event has to be a document. When wrk's time is over it drops
        what is in flight: one request a connection, which may be stored as well.
        """
        sent = [load for load in loads if load]
        if fault := "; ".join(load.fault for load in sent if load.fault):
            return fault
        acknowledged = sum(load.acknowledged for load in sent) + other
        in_flight = sum(load.connections for load in sent)
        documents = self.settle(database)
        if documents < acknowledged:
            missing = acknowledged - documents
            return f"{missing} of {acknowledged} acknowledged events are missing"
        if documents > acknowledged + in_flight:
            return f"{documents} documents, but {acknowledged} acknowledged events"
        return ""

    def drop(self, database: str) -> None:
        self.mongod.client.drop_database(database)

    def measure(self, kind: Kind, connections: int, number: int) -> Run:
        """Runs one server under one load, from its start to the count of documents."""
        run = Run(kind.name, connections, number)
        with self.server(kind) as server:
            warm = self.warm(server, connections)
            before = self.cpu_times(server)
            load = self.load(server, connections)
            after = self.cpu_times(server)
            run.memory = memory_bytes(server.pid, "VmHWM")
            run.fault = self.counted(server.database, warm, load)
        run.documents = self.settle(server.database)
        self.drop(server.database)
        run.acknowledged = load.acknowledged + (warm.acknowledged if warm else 0)
        run.per_second, run.wrk_cpu = load.per_second, load.wrk_cpu
        run.median, run.p99 = load.median, load.p99
        used = [end - start for start, end in zip(before, after)]
        run.mongod_cpu, run.server_cpu, busy = (time / load.seconds for time in used)
        run.mongod_cpu_per_event = used[0] / max(load.acknowledged, 1)
        known = run.mongod_cpu + run.server_cpu + run.wrk_cpu
        run.other_cpu = max(busy - known, 0)
        return run

    def cpu_times(self, server: Server) -> tuple[float, float, float]:
        """Returns the processor time of mongod, the server, and the whole machine."""
        own = (cpu_seconds(process.pid) for process in (self.mongod, server))
        return (*own, machine_cpu_seconds())

    def limit(self, size: int, number: int) -> Run:
        """Inserts by hand, so many documents at a time, one batch after the other.

        Only insert_many is timed, not how the documents are made between.
        """
        run = Run(f"insert_many, {size} at a time", 0, number)
        database = "bench" + uuid.uuid4().hex
        seconds = used = 0.0
        with closing(self.mongod.connect()) as client:
            events = client[database]["events"]
            events.insert_one({})  # opens the connection, makes the collection
            for seed in itertools.count():
                documents = to_documents(list(make_events(size, seed)))
                before = cpu_seconds(self.mongod.pid)
                began = time.perf_counter()
                events.insert_many(documents, ordered=False)
                seconds += time.perf_counter() - began
                used += cpu_seconds(self.mongod.pid) - before
                run.acknowledged += size
                if seconds > self.seconds:
                    break
        run.per_second = run.acknowledged / seconds
        run.mongod_cpu = used / seconds
        run.mongod_cpu_per_event = used / run.acknowledged
        run.documents = self.settle(database)
        if run.documents != run.acknowledged + 1:
            run.fault = f"{run.documents - 1} documents, {run.acknowledged} inserted"
        self.drop(database)
        return run

    # The comparison

    def compare(
        self, kinds: list[Kind], connections: list[int], limits: bool, base: str
    ) -> None:
        """Runs all servers in turn, for each number of connections, round by round.

        Every other round goes backwards, so that none always comes after the same one.
        """
        for number in range(self.rounds):
            turn = kinds if number % 2 == 0 else kinds[::-1]
            for count in connections:
                for kind in turn:
                    try:
                        run = self.measure(kind, count, number)
                    except FAILURES as error:
                        run = Run(kind.name, count, number, fault=str(error))
                    self.say_run(run)
            for size in LIMITS if limits else ():
                self.say_run(self.limit(size, number))
        self.report.say(f"\n{self.report.table(base)}\n\n{self.report.summary()}\n")

    def say_run(self, run: Run) -> None:
        self.report.runs.append(run)
        what = f"round {run.round + 1}, {run.name}"
        if run.connections:
            what += f", {of(run.connections)}"
        figure = run.fault and f"no figure: {' '.join(run.fault.split())}"
        if not figure:
            figure = f"{run.per_second:,.0f} events/s, {run.documents} documents"
        self.report.say(f"{what}: {figure}")

    def compare_ratios(
        self, name: str, connections: list[int], peers: list[str]
    ) -> None:
        """Adds a receiver's ratios to the peers in the same round, and to itself."""
        report = self.report
        at_32 = {"http.server": 6.0, "fastify": 3.5, "go": 2.5}
        for count in connections:
            for peer in peers:
                goal = {"at_least": at_32.get(peer)} if count == 32 else {}
                label = "throughput"
                report.compare("per_second", label, peer, name, count, **goal)
                goal = {"at_most": 0.5} if (peer, count) == ("fastify", 32) else {}
                report.compare("p99", "p99", peer, name, count, **goal)
        plain = {"at_most": 0.2}
        label = "mongod CPU per event"
        one_by_one = "http.server-buffered"
        report.compare("mongod_cpu_per_event", label, one_by_one, name, 32, **plain)
        for count in connections:
            report.ratio(
                f"{of(count)}, p99 / median, {name}",
                report.values(name, count, "p99"),
                report.values(name, count, "median"),
                at_most=4.0 if count == 128 else None,
            )
        if {32, 128} <= set(connections):
            report.ratio(
                f"throughput with 128 connections / with 32, {name}",
                report.values(name, 128, "per_second"),
                report.values(name, 32, "per_second"),
                at_least=1.0,
            )

    # The small scenarios: each is about one receiver

    def rounds_of(self, scenario: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """Runs a scenario in each round and returns its figures as lists, by name."""
        figures = [scenario() for _ in range(self.rounds)]
        return {name: [round[name] for round in figures] for name in figures[0]}

    def single(self, kind: Kind) -> None:
        """One connection, against a lone insert_one with the same write concern."""

        def one_round() -> dict[str, float]:
            with self.server(kind) as server:
                warm = self.warm(server, 1)
                load = self.load(server, 1)
                require(self.counted(server.database, warm, load))
            self.drop(server.database)
            return {"receiver": load.median, "insert_one": self.insert_one_median()}

        medians = self.rounds_of(one_round)
        for name, values in medians.items():
            median = statistics.median(values) * 1e3
            self.report.note(f"1 connection, median of {name}: {median:.2f} ms")
        self.report.ratio(
            f"1 connection, median, {kind.name} / insert_one",
            *(medians["receiver"], medians["insert_one"]),
            at_most=1.3,
        )

    def insert_one_median(self) -> float:
        documents = iter(to_documents(list(make_events(3_000 * self.seconds))))
        database = "bench" + uuid.uuid4().hex
        times = []
        with closing(self.mongod.connect()) as client:
            events = client[database]["events"]
            events.insert_one(next(documents))
            deadline = time.perf_counter() + self.seconds
            for document in documents:
                began = time.perf_counter()
                events.insert_one(document)
                ended = time.perf_counter()
                times.append(ended - began)
                if ended > deadline:
                    break
        self.drop(database)
        return statistics.median(times)

    def batch(self, kind: Kind) -> None:
        """Signed batches of 1000 events, in turn with insert_many of the same documents."""

        def one_round() -> dict[str, float]:
            events = list(make_events(BATCH_EVENTS * (BATCHES + 1)))
            batches = [
                events[i : i + BATCH_EVENTS]
                for i in range(0, len(events), BATCH_EVENTS)
            ]
            posted, inserted = [], []
            database = "bench" + uuid.uuid4().hex
            client = self.mongod.connect()
            with closing(client), self.server(kind) as server:
                http_client = http.client.HTTPConnection("127.0.0.1", server.port)
                with closing(http_client):
                    for batch in batches:
                        posted.append(post_batch(http_client, batch))
                        documents = to_documents(batch)
                        began = time.perf_counter()
                        client[database]["events"].insert_many(documents, ordered=False)
                        inserted.append(time.perf_counter() - began)
                stored = self.settle(server.database)
                require(stored != len(events) and f"{stored} of {len(events)} stored")
            self.drop(server.database)
            self.drop(database)
            # The first batch opens connections and makes the collection.
            return {
                "receiver": BATCH_EVENTS / statistics.median(posted[1:]),
                "insert_many": BATCH_EVENTS / statistics.median(inserted[1:]),
            }

        speeds = self.rounds_of(one_round)
        for name, values in speeds.items():
            speed = statistics.median(values)
            self.report.note(
                f"batches of {BATCH_EVENTS}, {name}: {speed:,.0f} events/s"
            )
        self.report.ratio(
            f"batches of {BATCH_EVENTS}, speed, {kind.name} / insert_many",
            *(speeds["receiver"], speeds["insert_many"]),
            at_least=0.5,
        )

    def latency(self, kind: Kind, round_trip: float) -> None:
        """A proxy between the receiver and MongoDB delays every byte."""

        def one_round() -> dict[str, float]:
            with DelayProxy(self.folder, self.mongod.port, round_trip) as proxy:
                uri = self.mongod.uri_through(proxy.port)
                with closing(pymongo.MongoClient(uri)) as client:
                    ping = median_seconds(lambda: client.admin.command("ping"), 20)
                with self.server(kind, uri) as server:
                    warm = self.warm(server, LATENCY_CONNECTIONS)
                    load = self.load(server, LATENCY_CONNECTIONS)
                    require(self.counted(server.database, warm, load))
            self.drop(server.database)
            return {"median": load.median, "ping": ping, "speed": load.per_second}

        figures = self.rounds_of(one_round)
        ping, speed = (statistics.median(figures[name]) for name in ("ping", "speed"))
        milliseconds = round_trip * 1e3
        title = f"{LATENCY_CONNECTIONS} connections, {milliseconds:g} ms to MongoDB"
        self.report.note(f"{title}: ping {ping * 1e3:.1f} ms, {speed:,.0f} events/s")
        self.report.ratio(
            f"{title}, median in round trips, {kind.name}",
            *(figures["median"], [round_trip] * self.rounds),
            at_most=2.2,
        )

    def memory(self, kind: Kind) -> None:
        """Memory and time of a start, and memory with many busy connections."""

        def one_round() -> dict[str, float]:
            with self.server(kind) as server:
                time.sleep(0.5)
                after_start = memory_bytes(server.pid, "VmRSS")
                load = self.load(server, BUSY_CONNECTIONS)
                busy = memory_bytes(server.pid, "VmHWM")
                require(self.counted(server.database, load))
            self.drop(server.database)
            return {
                "after start": after_start / 1e6,
                f"at most with {BUSY_CONNECTIONS} busy connections": busy / 1e6,
                "start": server.start_seconds,
            }

        figures = self.rounds_of(one_round)
        for (name, values), most in zip(figures.items(), (60, 120, 0.5)):
            unit = " s" if name == "start" else " MB"
            name = "from start to first answer" if name == "start" else f"RSS {name}"
            ratio = Ratio(f"{name}, {kind.name}", values, at_most=most, unit=unit)
            self.report.add(ratio)

    # The spool

    def spool(self, kind: Kind) -> None:
        """MongoDB up, killed, back; then new events beside a drain."""

        def one_round() -> dict[str, float]:
            with self.server(kind) as server:
                figures = self.up_down_drain(server)
            self.drop(server.database)
            with self.server(kind) as server:
                figures["p99 beside"] = self.beside_drain(server)
            self.drop(server.database)
            return figures

        figures = self.rounds_of(one_round)
        for name, values in figures.items():
            value = statistics.median(values)
            unit = (
                f"{value * 1e3:.1f} ms" if "p99" in name else f"{value:,.0f} events/s"
            )
            self.report.note(f"spool, {name}: {unit}")
        title = f"{SPOOL_CONNECTIONS} connections"
        self.report.ratio(
            f"{title}, spooling with MongoDB down / storing with it up, {kind.name}",
            *(figures["down"], figures["up"]),
            at_least=1.0,
        )
        drain = Ratio(
            f"drain, {kind.name}", figures["drain"], at_least=5000, unit=" events/s"
        )
        self.report.add(drain)
        self.report.ratio(
            f"{title}, new events' p99 beside a drain / without, {kind.name}",
            *(figures["p99 beside"], figures["p99"]),
            at_most=2.0,
        )

    def up_down_drain(self, server: Server) -> dict[str, float]:
        warm = self.warm(server, SPOOL_CONNECTIONS)
        up = self.load(server, SPOOL_CONNECTIONS)
        require(self.counted(server.database, warm, up))
        self.drop(server.database)  # so that the events of the file are new again

        self.mongod.kill()
        wait_until(lambda: server.health()["mongodb"] == "down", "it notices", 30)
        down = self.load(server, SPOOL_CONNECTIONS, status=202)
        require(down.fault)
        spooled = wait_until_still(lambda: server.health()["spooled"])
        if spooled < down.acknowledged:
            raise RuntimeError(f"{down.acknowledged} answers 202, {spooled} spooled")
        self.mongod.start()
        drain = self.drain_speed(server, spooled)
        require(self.counted(server.database, down))
        return {
            "up": up.per_second,
            "down": down.per_second,
            "drain": drain,
            "p99": up.p99,
            "p99 of spooling": down.p99,
        }

    def drain_speed(self, server: Server, spooled: int) -> float:
        """Returns events a second from the first one delivered to the last."""
        self.mongod.wait_primary()
        events = self.mongod.client[server.database]["events"]
        count = events.estimated_document_count
        first = wait_until(count, "the drain begins", 30)
        began = time.perf_counter()
        wait_until(lambda: count() >= spooled, "the spool is drained", 120)
        return (spooled - first) / (time.perf_counter() - began)

    def beside_drain(self, server: Server) -> float:
        """Puts files into the spool of a stopped receiver, starts it, sends new events."""
        warm = self.warm(server, SPOOL_CONNECTIONS)
        server.stop()
        total = DRAIN_EVENTS_PER_SECOND * (self.seconds + 1)
        self.fill_spool(server.data / "spool", total)
        server.start()
        load = self.load(server, SPOOL_CONNECTIONS)
        left = server.health()["spool_files"]
        wait_until(lambda: server.health()["spool_files"] == 0, "it is drained", 120)
        require(self.counted(server.database, warm, load, other=total))
        require(left == 0 and "the drain was over before the new events were")
        return load.p99

    def fill_spool(self, folder: Path, total: int) -> None:
        """Writes files as the receiver does, with events that wrk does not send."""
        encoded = [
            bson.encode(d) for d in to_documents(list(make_events(total, seed=1)))
        ]
        for start in range(0, total, SPOOL_FILE_EVENTS):
            part = encoded[start : start + SPOOL_FILE_EVENTS]
            name = f"{time.time_ns():020d}-{start:06d}-{len(part)}.bson"
            (folder / name).write_bytes(b"".join(part))


def require(fault: str | bool) -> None:
    """Raises RuntimeError where a fault makes the figure none."""
    if fault:
        raise RuntimeError(f"no figure: {fault}")


def post_batch(connection: http.client.HTTPConnection, events: list[Any]) -> float:
    """Returns the seconds from the request to the answer, which has to name them all."""
    body = to_json(events)
    headers = signed_headers(body)
    began = time.perf_counter()
    connection.request("POST", PATH, body, headers)
    answer = connection.getresponse()
    payload = answer.read()
    seconds = time.perf_counter() - began
    names = b"".join(
        event["messageId"].encode() in payload and b"x" for event in events
    )
    if answer.status != 200 or len(names) != len(events):
        raise RuntimeError(f"batch: {answer.status} {payload[:200]!r}")
    return seconds


def median_seconds(call: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def wait_until_still(value: Callable[[], int]) -> int:
    """Returns a count as soon as it no longer grows."""
    before = -1
    while (now := value()) != before:
        before = now
        time.sleep(QUIET_SECONDS)
    return now
