"""Figures over rounds: medians, ratios within a round, a Markdown table, a picture."""

from __future__ import annotations

import functools
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PROCESSES = ("mongod", "server", "wrk", "other")


@dataclass
class Run:
    """One server under one load in one round; a ``fault`` says why it is no figure."""

    name: str
    connections: int
    round: int
    per_second: float = 0.0
    median: float | None = None  # seconds
    p99: float | None = None
    mongod_cpu_per_event: float = 0.0  # seconds
    mongod_cpu: float = 0.0  # processors' worth, as those that follow
    server_cpu: float | None = None
    wrk_cpu: float | None = None
    other_cpu: float | None = None  # of anything else on this machine
    memory: int | None = None  # bytes, the most
    acknowledged: int = 0
    documents: int = 0
    fault: str = ""


@dataclass
class Ratio:
    """A ratio for each round, and what it has to reach."""

    name: str
    rounds: list[float]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    fault: str = ""
    median: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.rounds and not self.fault:
            self.median = statistics.median(self.rounds)

    def __str__(self) -> str:
        if self.median is None:
            return f"{self.name}: no figure ({self.fault or 'nothing measured'})"
        text = f"{self.name}: {short(self.median)}{self.unit}"
        if len(self.rounds) > 1:
            text += f" ({short(min(self.rounds))} to {short(max(self.rounds))})"
        for word, limit, reached in (
            ("at least", self.at_least, self.median >= (self.at_least or 0)),
            ("at most", self.at_most, self.median <= (self.at_most or 0)),
        ):
            if limit is not None:
                text += f"; {word} {limit:g}: {'reached' if reached else 'MISSED'}"
        return text


class Report:
    """All that was measured; says each ratio as soon as it is known."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.ratios: list[Ratio] = []
        self.notes: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Adds a line to what the report says at its end and keeps."""
        self.notes.append(text)
        self.say(text)

    def ratio(
        self,
        name: str,
        above: Sequence[float | None],
        below: Sequence[float | None],
        **goal: Any,
    ) -> None:
        """Divides round by round; a round that has no figure makes the ratio none."""
        pairs = list(zip(above, below))
        if all(a is not None and b for a, b in pairs):
            self.add(Ratio(name, [a / b for a, b in pairs], **goal))
        else:
            self.add(Ratio(name, [], fault="a round without a figure", **goal))

    def add(self, ratio: Ratio) -> None:
        self.ratios.append(ratio)
        self.say(str(ratio))

    def of(self, name: str, connections: int) -> list[Run]:
        """Returns a server's runs with so many connections, by round."""
        found = (
            run
            for run in self.runs
            if run.name == name and run.connections == connections
        )
        return sorted(found, key=lambda run: run.round)

    def fault(self, name: str, connections: int) -> str:
        """Says why a server has no figure here: one bad round is enough."""
        faults = (" ".join(run.fault.split()) for run in self.of(name, connections))
        return "; ".join(dict.fromkeys(filter(None, faults)))

    def values(self, name: str, connections: int, what: str) -> list[float | None]:
        runs = self.of(name, connections)
        return [None if run.fault else getattr(run, what) for run in runs]

    def compare(
        self, what: str, label: str, over: str, name: str, connections: int, **goal: Any
    ) -> None:
        """Adds the ratio of a value to a peer's in the same round."""
        mine = self.values(name, connections, what)
        if theirs := self.values(over, connections, what):
            title = f"{of(connections)}, {label}, {name} / {over}"
            self.ratio(title, mine, theirs, **goal)

    def typical(self, name: str, connections: int, what: str) -> float:
        """Returns the median over the rounds."""
        return middle(self.values(name, connections, what))

    def names(self) -> list[str]:
        return list(dict.fromkeys(run.name for run in self.runs))

    def connections(self) -> list[int]:
        return sorted({run.connections for run in self.runs if run.connections})

    def table(self, base: str) -> str:
        """Returns Markdown: medians over the rounds, and throughput over ``base``'s."""
        sections = [self._section(base, number) for number in self.connections()]
        limits = [run for run in self.runs if not run.connections]
        if limits:
            lines = ["| by hand, without HTTP | events/s | mongod CPU per event |"]
            lines += ["| --- | --- | --- |"]
            for name in dict.fromkeys(run.name for run in limits):
                if fault := self.fault(name, 0):
                    lines.append(f"| {name} | no figure: {fault} | |")
                    continue
                speed = self.typical(name, 0, "per_second")
                cpu = self.typical(name, 0, "mongod_cpu_per_event")
                lines.append(f"| {name} | {speed:,.0f} | {microseconds(cpu)} |")
            sections.append("\n".join(lines))
        return "\n\n".join(sections)

    def summary(self) -> str:
        """Returns the table of README.md: medians over the rounds, a row a server."""
        numbers = self.connections()
        columns = [(number, "per_second", 1, "{:,.0f}") for number in numbers]
        columns += [(number, "p99", 1e3, "{:.0f} ms") for number in numbers]
        heads = [f"events/s, {of(numbers[0])}", *map(str, numbers[1:])]
        heads += [f"p99, {of(numbers[0])}", *map(str, numbers[1:])]
        if 32 in numbers:
            columns += [(32, "mongod_cpu_per_event", 1e6, "{:.0f} µs")]
            heads += ["MongoDB's CPU per event, 32"]
        lines = [f"| | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
        for name in self.names():
            if not self.of(name, 0):
                cells = [
                    "no figure"
                    if self.fault(name, number) or not self.of(name, number)
                    else form.format(self.typical(name, number, what) * scale)
                    for number, what, scale, form in columns
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _section(self, base: str, connections: int) -> str:
        heads = [of(connections), "events/s", f"× {base}", "median", "p99"]
        heads += ["mongod CPU per event", "RSS"]
        heads += [f"{who} CPU" for who in PROCESSES]
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        base_speeds = self.values(base, connections, "per_second")
        for name in self.names():
            if not self.of(name, connections):
                continue
            if fault := self.fault(name, connections):
                lines.append(f"| {name} | no figure: {fault} |" + " |" * 9)
                continue
            value = functools.partial(self.typical, name, connections)
            speeds = self.values(name, connections, "per_second")
            pairs = [(a, b) for a, b in zip(speeds, base_speeds) if a and b]
            times = statistics.median(a / b for a, b in pairs) if pairs else None
            cells = [
                name,
                f"{value('per_second'):,.0f}",
                f"{times:.2f}" if times else "",
                f"{value('median') * 1e3:.1f} ms",
                f"{value('p99') * 1e3:.1f} ms",
                microseconds(value("mongod_cpu_per_event")),
                f"{value('memory') / 1e6:.0f} MB",
                *(f"{value(f'{who}_cpu'):.0%}" for who in PROCESSES),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def picture(self, path: Path, title: str) -> None:
        """Draws throughput and p99 over connections."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        kinds = (("per_second", 1, "events/s"), ("p99", 1e3, "p99, ms"))
        for axes, (what, scale, label) in zip(panels, kinds):
            for name in self.names():
                points = [
                    (number, middle(values) * scale)
                    for number in self.connections()
                    if (values := self.values(name, number, what)) and all(values)
                ]
                if points:
                    style = {"linewidth": 2.5} if name == "receiver" else {}
                    axes.plot(*zip(*points), marker="o", label=name, **style)
            axes.set_xscale("log", base=2)
            axes.set_xticks(self.connections(), map(str, self.connections()))
            axes.set_xlabel("connections")
            axes.set_title(label)
            axes.grid(alpha=0.3)
        panels[0].set_ylim(bottom=0)
        panels[1].set_yscale("log")
        if panels[0].lines:
            panels[0].legend()
        figure.suptitle(textwrap.fill(title, 120), fontsize=9)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def as_dict(self) -> dict[str, Any]:
        return {
            "notes": self.notes,
            "runs": [asdict(run) for run in self.runs],
            "ratios": [asdict(ratio) for ratio in self.ratios],
        }


def of(connections: int) -> str:
    return f"{connections} connection{'s' if connections > 1 else ''}"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def middle(values: Iterable[float | None]) -> float:
    return statistics.median(value for value in values if value is not None)


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"
