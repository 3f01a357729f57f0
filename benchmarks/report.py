"""The run as text: the promises and what became of them, every cell, the machine, the settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import QUEUE_S, Run
from benchmarks.results import HEAVY_CONNECTIONS, Cell, Results, Verdict, p50_ms, p99_ms, per_s, spread, verdicts

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
"""What stands between these lines of a document is replaced by the next run; the rest of it stays."""


NOISY = 0.05
"""Share of the machine that other programs may take."""


def markdown(run: Run) -> str:
    """The whole report."""
    results = run.results
    parts = [
        "\n".join(_circumstances(run)),
        "## Promises\n\n" + promises(verdicts(results, run.plan.groups)),
        "## Closed loop\n\n" + _cells(results),
    ]
    if results.memory_mib:
        parts.append("## Memory of the whole process tree, serving the score job\n\n" + _memory(results))
    if results.open_cells:
        parts.append("## Open loop: this service under Poisson arrivals\n\n" + _open_cells(results))
    if results.samples_ms:
        parts.append("## Deadlines and disconnections\n\n" + _tries(results))
    failed = [f"- {name} was not measured: {reason}" for name, reason in results.failures.items()]
    if remarks := failed + [f"- {note}" for note in results.notes]:
        parts.append("## Remarks\n\n" + "\n".join(remarks))
    return "\n\n".join(parts) + "\n"


def write(path: Path, text: str) -> None:
    """Puts the report into a document, between its marks, or makes the document."""
    marked = f"{BEGIN}\n\n{text}\n{END}\n"
    before, after = "# Performance\n\n", ""
    if path.exists():
        old = path.read_text()
        if BEGIN in old and END in old:
            before, after = old.split(BEGIN, 1)[0], old.split(END, 1)[1].removeprefix("\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + marked + after)


def promises(found: Sequence[Verdict]) -> str:
    """One row per promise."""
    rows = []
    for verdict in found:
        unit = "" if verdict.line.unit == "×" else f" {verdict.line.unit}"
        measured = "–"
        if verdict.values:
            measured = f"{verdict.median:.3g}{unit}"
            if len(verdict.values) > 1:
                measured += f" [{min(verdict.values):.3g}–{max(verdict.values):.3g}]"
        bounds = [f"{bound}{unit}" if bound else "" for bound in (verdict.line.must, verdict.line.goal)]
        rows.append([verdict.line.text, measured, *bounds, verdict.word])
    return table(["what", "measured", "must", "goal", ""], rows)


def quiet(results: Results) -> str:
    """How much of the machine other programs took, which decides what the figures are worth."""
    if not results.other_load:
        return "Other programs: not measured."
    median, most = statistics.median(results.other_load), max(results.other_load)
    verdict = "" if median < NOISY else " **Too much for figures to be quoted.**"
    return f"Other programs took {median:.0%} of the machine, at most {most:.0%} in one cell.{verdict}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _circumstances(run: Run) -> list[str]:
    plan = run.plan
    packages = ("torch", "numpy", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "orjson", "pydantic")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    peers = [f"{name} {version}" for name, version in sorted(run.versions.items())]
    generator = "wrk" if plan.use_wrk else "the benchmark's own"
    return [
        f"Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}. How it measures: `benchmarks/README.md`. The load "
        "comes from the same machine, which is noisy: ratios within this run count, the figures themselves do not.",
        "",
        f"- Machine: {_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB; {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}.",
        f"- Versions: {', '.join(versions + peers)}.",
        f"- Settings: {plan.rounds} rounds of {plan.seconds} s a cell, {plan.workers} workers for every server that "
        f"has workers, one torch thread in each of the others; closed loop by {generator}, open loop by the "
        f"benchmark's own; overload with a queue of {QUEUE_S * 1e3:.0f} ms of work in each worker, at "
        f"least {HEAVY_CONNECTIONS} rows.",
        f"- {quiet(run.results)}",
        "- Medians over the rounds, [lowest–highest]; a ratio is taken within each round first.",
    ]


def _cells(results: Results) -> str:
    rows = []
    for (contender, job, connections), by_round in sorted(
        results.cells.items(), key=lambda entry: (entry[0][1], entry[0][2], -_median(entry[1].values(), per_s))
    ):
        cells = list(by_round.values())
        batches = [cell.batch for cell in cells if cell.batch is not None]
        rows.append(
            [
                job,
                str(connections),
                contender,
                spread([per_s(cell) for cell in cells], "{:.0f}"),
                f"{_median(cells, p50_ms):.2f}",
                spread([p99_ms(cell) for cell in cells], "{:.1f}"),
                f"{statistics.median(batches):.1f}" if batches else "",
                f"{_median(cells, lambda cell: cell.cpu_us_per_request):.0f}",
                str(sum(cell.load.failed for cell in cells) or ""),
            ]
        )
    head = ["job", "connections", "server", "requests/s", "p50 ms", "p99 ms", "rows a batch", "CPU µs a request"]
    text = table([*head, "failed"], rows)
    forward = list(results.scalars.get("bare forward ms", {}).values())
    loop = list(results.scalars.get("bare loop per s", {}).values())
    if forward:
        text += f"\n\nThe bare forward of one item: {spread([ms * 1e3 for ms in forward], '{:.0f}')} µs."
    if loop:
        text += (
            f"\n\nThe bare loop of decoding and forward, no HTTP, on all cores: {spread(loop, '{:.0f}')} pictures/s."
        )
    return text


def _memory(results: Results) -> str:
    return table(
        ["server", "PSS MiB"], [[name, spread(found, "{:.0f}")] for name, found in sorted(results.memory_mib.items())]
    )


def _open_cells(results: Results) -> str:
    rows = []
    for job, by_share in results.open_cells.items():
        for share, cells in sorted(by_share.items()):
            loads = [cell.load for cell in cells]
            rows.append(
                [
                    job,
                    f"{share:.0%}",
                    spread([cell.offered_per_s for cell in cells], "{:.0f}"),
                    spread([load.per_s for load in loads], "{:.0f}"),
                    f"{statistics.median(load.shed for load in loads):.0f}",
                    f"{sum(load.failed for load in loads)}",
                    spread([load.p50_s * 1e3 for load in loads], "{:.1f}"),
                    spread([load.p99_s * 1e3 for load in loads], "{:.1f}"),
                    f"{statistics.median(load.late_s for load in loads) * 1e3:.1f}",
                ]
            )
    head = ["job", "load", "offered/s", "answered/s", "429", "failed", "p50 ms", "p99 ms", "generator late, p99 ms"]
    return table(head, rows)


def _tries(results: Results) -> str:
    rows = []
    for name, tries in results.samples_ms.items():
        ordered = sorted(tries)
        if ordered:
            figures = [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.9, 0.99, 1)]
            rows.append([name, str(len(ordered)), *(f"{figure:.1f}" for figure in figures)])
    return table(["ms", "tries", "p50", "p90", "p99", "most"], rows)


def _median(cells: Iterable[Cell], figure: Callable[[Cell], float]) -> float:
    return statistics.median(figure(cell) for cell in cells)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
