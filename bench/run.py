"""Measures the receiver beside what people build with a framework, on this machine.

    python bench/run.py                    all figures of README.md, about 12 minutes
    python bench/run.py --against HEAD~1   this receiver.py beside that revision's
    python bench/run.py --only compare --peers go go-group-commit

It needs wrk (apt install wrk), and for all peers npm, and go with
golang-mongodb-mongo-driver-dev. What it makes for itself is in bench/out/.

Every server writes to the same mongod, a replica set of one with its data on this disk,
and answers only when a majority has journaled the insert. Every round starts each server
anew, warms it up for a second, and lets wrk send distinct signed events over kept-alive
connections. Every answer's status is checked, and at the end the documents are counted:
where one that was acknowledged is missing, there is no figure. A figure is the median
over the rounds; a ratio is formed within each round first.
"""

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment

SCENARIOS = ("batch", "spool", "memory")  # methods of Bench
FIGURES: dict[Any, list[dict[str, float]]] = defaultdict(list)  # of a key in each round


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="[default 3]")
    add("--seconds", type=int, default=4, help="of each measurement [default 4]")
    add("--connections", type=int, nargs="+", default=[1, 32, 128], metavar="NUMBER")
    add("--peers", nargs="*", metavar="PEER", help="[default all; none with --against]")
    add("--against", metavar="REVISION_OR_PATH", help="another receiver.py")
    everything = ("compare", *SCENARIOS)
    add("--only", nargs="+", choices=everything, default=everything)
    return parser.parse_args()


def other_receiver(against: str, folder: Path) -> Path:
    """Returns that file, or that git revision's receiver.py as a file."""
    path = Path(against).resolve()
    if not path.is_file():
        path = folder / "against.py"
        show = ("git", "-C", environment.ROOT, "show", f"{against}:receiver.py")
        path.write_bytes(subprocess.check_output(show))
    return path


def add(key: Any, measure: Callable[..., dict[str, float]], *of: Any) -> None:
    """Measures once. A server may end, refuse or hang: then there are no figures."""
    try:
        figures = measure(*of)
    except Exception as error:  # noqa: BLE001
        figures = {}
        print(f"{key}: no figure: {error!r}", file=sys.stderr)
    FIGURES[key].append(figures)
    print(
        key, {what: f"{value:.4g}" for what, value in figures.items()}, file=sys.stderr
    )


def middle(key: Any, what: str, scale: float = 1) -> str:
    if not all(FIGURES[key]):
        return "–"
    value = statistics.median(figures[what] for figures in FIGURES[key]) * scale
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def ratio(above: Any, below: Any) -> str:
    """Returns the median ratio of events/s within a round, and its range."""
    pairs = list(zip(FIGURES[above], FIGURES[below]))
    if above == below or not all(a and b for a, b in pairs):
        return ""
    each = [a["per_second"] / b["per_second"] for a, b in pairs]
    return f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})"


def comparison(names: list[str], connections: list[int]) -> str:
    """Returns the Markdown table of events/s and processor time, a row a server."""
    last = connections[-1]
    heads = [f"events/s (p50 / p99, ms), {count}" for count in connections]
    heads += [f"receiver ÷ it, {count}" for count in connections]
    heads += [f"CPU, µs/event, {last}", f"MongoDB's, {last}", f"peak MB, {last}"]
    rows = []
    for name in names:
        row = [name]
        for key in ((name, count) for count in connections):
            latencies = middle(key, "p50", 1e3), middle(key, "p99", 1e3)
            row.append(f"{middle(key, 'per_second')} ({' / '.join(latencies)})")
        row += [ratio((names[0], count), (name, count)) for count in connections]
        for what, scale in (("cpu", 1e6), ("mongod", 1e6), ("peak", 1)):
            row.append(middle((name, last), what, scale))
        rows.append(row)
    return table(["connections:", *heads], rows)


def others(names: list[str], scenarios: list[str]) -> str:
    """Returns the Markdown table of the other figures, a column a receiver."""
    rows = []
    for scenario in scenarios:
        keys = [(name, scenario) for name in names]
        for what in max((one for key in keys for one in FIGURES[key]), key=len):
            rows.append([what, *(middle(key, what) for key in keys)])
    return table(["", *names], rows)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measure(options: argparse.Namespace, folder: Path) -> None:
    # These need the packages of the virtual environment.
    from load import Requests
    from processes import COMMANDS, Mongod
    from scenarios import Bench

    peers = [] if options.against else [*COMMANDS]
    peers = peers if options.peers is None else options.peers
    own = {"receiver": environment.ROOT / "receiver.py"}
    if options.against:
        own[f"receiver of {options.against}"] = other_receiver(options.against, folder)
    COMMANDS.update({name: (sys.executable, own[name]) for name in own})
    connections = options.connections if "compare" in options.only else []
    scenarios = [name for name in SCENARIOS if name in options.only]
    requests = Requests(folder / "requests", options.seconds + 1)
    with Mongod(folder) as mongod:
        bench = Bench(folder, mongod, requests, options.seconds)
        for number in range(options.rounds):
            # There and back, so that none always comes after the same one.
            names = [*own, *peers][:: 1 if number % 2 == 0 else -1]
            for count in connections:
                for name in names:
                    add((name, count), bench.throughput, name, count)
            for scenario in scenarios:
                for name in own:
                    add((name, scenario), getattr(bench, scenario), name)
        version = mongod.client.server_info()["version"]
    print(f"\n{environment.describe()}, MongoDB {version};", end=" ")
    print(f"{options.rounds} rounds of {options.seconds} s:")
    print(f"`python bench/run.py {shlex.join(sys.argv[1:])}`\n")
    print(comparison([*own, *peers], connections) if connections else "")
    print(others([*own], scenarios) if scenarios else "")


def main() -> None:
    options = parse_arguments()
    if Path(sys.prefix) != environment.VENV:
        environment.prepare()
        os.execv(environment.PYTHON, [str(environment.PYTHON), *sys.argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops what it started
    with tempfile.TemporaryDirectory(prefix="work-", dir=environment.OUT) as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
