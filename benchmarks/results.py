"""What was measured, and what the project promised about it: figures per round, ratios within a round, verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.load import Load

PEERS = ("mosec", "LitServe", "BentoML")  # all of them gather batches
SLOWER_PEERS = ("LitServe", "BentoML", "naive def", "naive async")
HEAVY_CONNECTIONS = 16


@dataclass(frozen=True)
class Cell:
    """A server under one closed-loop load in one round. `batch` is rows per batch, where the server tells."""

    load: Load
    cpu_s: float
    batch: float | None = None

    @property
    def cpu_us_per_request(self) -> float:
        """Processor time of the server's processes per answered request, in µs."""
        return self.cpu_s / self.load.ok * 1e6 if self.load.ok else math.nan


@dataclass(frozen=True)
class OpenCell:
    """The service under Poisson arrivals at `share` of its measured capacity."""

    share: float
    offered_per_s: float
    load: Load


@dataclass
class Results:
    """Everything that was measured, by round."""

    cells: dict[tuple[str, str, int], dict[int, Cell]] = field(default_factory=dict)
    """By server, job and connections."""
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    """Single figures by name."""
    open_cells: dict[str, dict[float, list[OpenCell]]] = field(default_factory=dict)
    """By job and share of capacity."""
    memory_mib: dict[str, list[float]] = field(default_factory=dict)
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    """Single tries by what was tried."""
    failures: dict[str, str] = field(default_factory=dict)
    """Servers that did not start or answered wrongly, and why."""
    other_load: list[float] = field(default_factory=list)
    """In each closed-loop cell, the share of the machine that was taken by neither server nor load generator."""
    notes: list[str] = field(default_factory=list)

    def add_scalar(self, name: str, round_number: int, value: float) -> None:
        """Keeps a round's figure."""
        self.scalars.setdefault(name, {})[round_number] = value

    def rounds_of(
        self, contender: str, job: str, connections: int, figure: Callable[[Cell], float]
    ) -> dict[int, float]:
        """A figure of a cell by round."""
        cells = self.cells.get((contender, job, connections), {})
        return {number: figure(cell) for number, cell in cells.items()}


@dataclass(frozen=True)
class Bound:
    """A promise about a figure."""

    limit: float
    at_most: bool = False
    strict: bool = False

    def __str__(self) -> str:
        sign = "≥" if not self.at_most else "<" if self.strict else "≤"
        return f"{sign} {self.limit:g}"

    def holds(self, value: float) -> bool:
        """Whether the figure keeps it."""
        if not self.at_most:
            return value >= self.limit
        return value < self.limit if self.strict else value <= self.limit


@dataclass(frozen=True)
class Line:
    """One promise: its measuring group, its figure by round, and the bounds on the figure's median."""

    group: str
    text: str
    unit: str
    values: Callable[[Results], Sequence[float]]
    must: Bound | None
    goal: Bound | None


def per_s(cell: Cell) -> float:
    """Requests per second."""
    return cell.load.per_s


def p50_ms(cell: Cell) -> float:
    """Median latency."""
    return cell.load.p50_s * 1e3


def p99_ms(cell: Cell) -> float:
    """99th percentile of the latency."""
    return cell.load.p99_s * 1e3


def divided(upper: dict[int, float], lower: dict[int, float]) -> list[float]:
    """The ratio of two figures in each round that has both."""
    return [upper[number] / lower[number] for number in sorted(upper) if lower.get(number)]


def against(
    job: str, connections: int, others: Sequence[str], figure: Callable[[Cell], float] = per_s, best: bool = True
) -> Callable[[Results], list[float]]:
    """The service's figure over the highest (`best`) or the lowest of the others', round by round."""

    def values(results: Results) -> list[float]:
        theirs: dict[int, list[float]] = {}
        for other in others:
            for number, value in results.rounds_of(other, job, connections, figure).items():
                theirs.setdefault(number, []).append(value)
        strongest = {number: (max if best else min)(found) for number, found in theirs.items()}
        return divided(results.rounds_of("hourglass", job, connections, figure), strongest)

    return values


def scalar(name: str) -> Callable[[Results], list[float]]:
    """A single figure, round by round."""
    return lambda results: list(results.scalars.get(name, {}).values())


def overhead_ms(contender: str, results: Results) -> dict[int, float]:
    """Median time of a request on an idle server above the bare forward, by round."""
    forward = results.scalars.get("bare forward ms", {})
    return {
        number: median - forward[number]
        for number, median in results.rounds_of(contender, "score", 1, p50_ms).items()
        if number in forward
    }


def hourglass_overhead_ms(results: Results) -> list[float]:
    """`overhead_ms` of the service."""
    return list(overhead_ms("hourglass", results).values())


def overhead_ratio(results: Results) -> list[float]:
    """`overhead_ms` of the service over the bare app's."""
    return divided(overhead_ms("hourglass", results), overhead_ms("bare app", results))


def share_of_bare_loop(results: Results) -> list[float]:
    """Pictures a second through the service over those of the bare loop."""
    served = results.rounds_of("hourglass", "conv", HEAVY_CONNECTIONS, per_s)
    return divided(served, results.scalars.get("bare loop per s", {}))


def percentile(name: str, share: float) -> Callable[[Results], list[float]]:
    """A percentile of the tries under that name, as the one value."""

    def values(results: Results) -> list[float]:
        tries = sorted(results.samples_ms.get(name, []))
        return [tries[min(len(tries) - 1, math.ceil(share * len(tries)) - 1)]] if tries else []

    return values


def spread(values: Sequence[float], form: str) -> str:
    """Median and, of several, lowest and highest, each as `form` has it."""
    text = form.format(statistics.median(values))
    return text if len(values) < 2 else f"{text} [{form.format(min(values))}–{form.format(max(values))}]"


def at_least(limit: float) -> Bound:
    """A figure that should be high."""
    return Bound(limit)


def at_most(limit: float) -> Bound:
    """A figure that should be low."""
    return Bound(limit, at_most=True)


def below(limit: float) -> Bound:
    """A figure that should be lower than that."""
    return Bound(limit, at_most=True, strict=True)


LINES = (
    Line(
        "score",
        "JSON 784 → score, 64 connections, against mosec",
        "×",
        against("score", 64, ["mosec"]),
        at_least(0.8),
        at_least(1.4),
    ),
    Line("score", "… its p99 against mosec's", "×", against("score", 64, ["mosec"], p99_ms), None, at_most(1)),
    Line(
        "score",
        "… against the best of LitServe, BentoML, naive def and async",
        "×",
        against("score", 64, SLOWER_PEERS),
        at_least(2.5),
        at_least(5),
    ),
    Line("score", "… against the bare app", "×", against("score", 64, ["bare app"]), at_least(0.65), at_least(0.95)),
    Line("score", "… against the naive `def` app", "×", against("score", 64, ["naive def"]), at_least(5), at_least(15)),
    Line(
        "reconstruct",
        "784 in, 784 out, 64 connections, against mosec",
        "×",
        against("reconstruct", 64, ["mosec"]),
        at_least(0.8),
        at_least(1.25),
    ),
    Line(
        "latent",
        "PNG upload → 32 latents, 64 connections, against mosec fed the raw PNG",
        "×",
        against("latent", 64, ["mosec"]),
        at_least(0.5),
        at_least(1),
    ),
    Line("score", "one connection: median above the bare forward", "ms", hourglass_overhead_ms, at_most(1.0), None),
    Line(
        "score",
        "… median against the fastest batching peer's",
        "×",
        against("score", 1, PEERS, p50_ms, best=False),
        below(1),
        None,
    ),
    Line("score", "… above the bare forward, against the bare app's", "×", overhead_ratio, None, at_most(1.15)),
    Line(
        "score",
        "256 connections: p99 against mosec's",
        "×",
        against("score", 256, ["mosec"], p99_ms),
        at_most(2),
        at_most(1),
    ),
    Line(
        "conv",
        "3 × 224 × 224 JPEG upload → score: share of the bare loop",
        "×",
        share_of_bare_loop,
        at_least(0.8),
        at_least(0.92),
    ),
    Line(
        "conv",
        "… against the naive `def` app",
        "×",
        against("conv", HEAVY_CONNECTIONS, ["naive def"]),
        at_least(1.2),
        at_least(1.5),
    ),
    Line("conv", "… against mosec", "×", against("conv", HEAVY_CONNECTIONS, ["mosec"]), at_least(1.2), at_least(1.5)),
    Line(
        "interleaved",
        "three models, methods and shapes interleaved, against each alone",
        "×",
        scalar("interleaved share"),
        at_least(0.8),
        at_least(0.95),
    ),
    Line(
        "overload",
        "open loop at 5 × capacity: goodput of peak",
        "×",
        scalar("overload goodput share"),
        at_least(0.9),
        at_least(0.97),
    ),
    Line(
        "overload",
        "… p99 of the accepted against half load's",
        "×",
        scalar("overload p99 ratio"),
        at_most(10),
        at_most(4),
    ),
    Line("idle", "idle: share of a core", "%", scalar("idle cpu %"), below(1), below(0.3)),
    Line(
        "promptness",
        "50 ms deadlines on a busy executor: p99 of how late they expire",
        "ms",
        percentile("deadline lateness", 0.99),
        at_most(10),
        None,
    ),
    Line(
        "promptness",
        "a disconnected caller's rows: p99 until they have left the queue",
        "ms",
        percentile("disconnect", 0.99),
        at_most(50),
        None,
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A line's median and spread, and what became of its promises; no values: not measured."""

    line: Line
    values: Sequence[float]

    @property
    def median(self) -> float:
        """The middle value; NaN without any."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def word(self) -> str:
        """In a word, whether the promises are kept."""
        if not self.values:
            return "not measured"
        if self.line.must is not None and not self.line.must.holds(self.median):
            return "**missed**"
        if self.line.goal is None:
            return "held"
        if self.line.goal.holds(self.median):
            return "goal reached"
        return "held" if self.line.must is not None else "goal not reached"


def verdicts(results: Results, groups: Sequence[str]) -> list[Verdict]:
    """Every line of these groups."""
    return [
        Verdict(line, [value for value in line.values(results) if not math.isnan(value)])
        for line in LINES
        if line.group in groups
    ]
