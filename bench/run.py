"""Measures the receiver beside what people build with a framework.

    python bench/run.py                    the comparison, about 10 minutes
    python bench/run.py --all              and all small scenarios
    python bench/run.py --quick            everything briefly, as a test of itself
    python bench/run.py --single --latency 20 --receiver /tmp/another_receiver.py

It needs wrk (apt install wrk), and for all peers node with npm, and go with
golang-mongodb-mongo-driver-dev. The first run makes a virtual environment and more under
bench/out/; results.json and throughput.png go there too.

Every server writes to the same mongod, a single-node replica set with its data on this
disk, and answers only when a majority has journaled the insert. Every round starts each
server anew, warms it up, and lets wrk send distinct signed events over kept-alive
connections. Every answer's status is checked, and at the end the documents are counted:
where one that was acknowledged is missing, there is no figure. A figure is the median over
the rounds; a ratio is formed within each round first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environment

MOST_EVENTS_PER_SECOND = 25_000
PEERS = ("http.server", "http.server-buffered", "flask", "fastapi", "fastify", "go")
SCENARIOS = ("single", "batch", "latency", "spool", "memory")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="rounds [default 3]")
    add("--seconds", type=int, default=5, help="seconds a measurement [default 5]")
    add("--warm-up", type=int, default=1, help="seconds before each [default 1]")
    add("--connections", type=numbers, help="[default 1,32,128]")
    add("--peers", default=",".join((*PEERS, "limit")), help="[default %(default)s]")
    add("--over", default="", help="the table's ratios are to this one [fastify]")
    add(
        "--receiver",
        *("-r",),
        action="append",
        type=Path,
        help="measure this one, several in turn [default receiver.py]",
    )
    add("--compare", action="store_true", help="the comparison [default, if alone]")
    add("--single", action="store_true", help="one connection against insert_one")
    add("--batch", action="store_true", help="signed batches against insert_many")
    add("--latency", type=float, metavar="MS", help="round trip to MongoDB, 20 say")
    add("--spool", action="store_true", help="spooling and draining")
    add("--memory", action="store_true", help="memory, and time to start")
    add("--all", action="store_true", help="the comparison and all of these")
    add(
        "--quick",
        action="store_true",
        help="--all, a second each, 1 and 32 connections",
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.warm_up = 1, 1, 1
    options.all |= options.quick
    options.connections = options.connections or (
        [1, 32] if options.quick else [1, 32, 128]
    )
    if options.all:
        options.compare = options.single = options.batch = True
        options.spool = options.memory = True
        options.latency = options.latency or 20.0
    if not any(getattr(options, name) for name in SCENARIOS):
        options.compare = True
    if min(options.rounds, options.seconds, *options.connections) < 1:
        parser.error("rounds, seconds and connections are at least 1")
    unknown = set(options.peers.split(",")) - {*PEERS, "limit", ""}
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    return options


def measure(options: argparse.Namespace) -> None:
    # These need the packages of the virtual environment.
    from load import Requests
    from processes import Mongod, peer_kinds, receiver_kind
    from report import Report
    from scenarios import FAILURES, Bench

    report = Report()
    machine: dict[str, Any] = environment.machine()
    receivers = [
        receiver_kind(path.resolve())
        for path in options.receiver or [environment.ROOT / "receiver.py"]
    ]
    missing = environment.missing_peers()
    wanted = options.peers.split(",")
    peers = [k for k in peer_kinds() if k.name in wanted and k.name not in missing]
    for name, why in missing.items():
        if options.compare and name in wanted:
            report.note(f"peer {name} is left out: {why}")
    names = [peer.name for peer in peers]
    base = options.over or ("fastify" if "fastify" in names else receivers[0].name)

    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="work-", dir=environment.OUT)
            )
        )
        mongod = stack.enter_context(Mongod(folder))
        count = MOST_EVENTS_PER_SECOND * (options.seconds + options.warm_up)
        requests = Requests(folder / "requests", count)
        machine["mongod"] = mongod.client.server_info()["version"]
        machine["load"] = f"{os.getloadavg()[0]:.1f} before the first round"
        about = ", ".join(f"{name} {text}" for name, text in machine.items())
        report.note(about)
        report.note(
            f"{requests.body_size} B events, {options.rounds} rounds of "
            f"{options.seconds} s after {options.warm_up} s"
        )
        bench = Bench(
            *(folder, mongod, requests, report),
            *(options.rounds, options.seconds, options.warm_up),
        )
        if options.compare:
            kinds = [*receivers, *peers]
            bench.compare(kinds, options.connections, "limit" in wanted, base)
            for kind in receivers:
                bench.compare_ratios(kind.name, options.connections, names)
        for kind in receivers:
            for scenario in SCENARIOS:
                if value := getattr(options, scenario):
                    report.say("")
                    extra = (value / 1e3,) if scenario == "latency" else ()
                    try:
                        getattr(bench, scenario)(kind, *extra)
                    except FAILURES as error:
                        report.note(f"--{scenario}, {kind.name}: {error}")
        save(report, machine, options, about)


def save(
    report: Any, machine: dict[str, Any], options: argparse.Namespace, about: str
) -> None:
    results = environment.OUT / "results.json"
    value = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine,
        "options": {name: str(value) for name, value in vars(options).items()},
        **report.as_dict(),
    }
    results.write_text(json.dumps(value, indent=1) + "\n")
    report.say(f"\n{results}")
    if report.connections():
        picture = environment.OUT / "throughput.png"
        report.picture(picture, about)
        report.say(str(picture))


def leave(number: int, _frame: object) -> None:
    """Ends the benchmark once; a second signal must not interrupt how it stops others."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    if Path(sys.prefix) != environment.VENV:
        environment.prepare()
        python = str(environment.PYTHON)
        os.execv(python, [python, str(environment.BENCH / "run.py"), *sys.argv[1:]])
    measure(options)


if __name__ == "__main__":
    main()
