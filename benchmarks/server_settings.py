"""python -m benchmarks.server_settings: which event loop and which HTTP parser the service is best run on.

Prints, for JSON → score and one process each, the choices in turns: requests a second at 64 connections, and latencies
where requests arrive by themselves at three quarters of what the first choice then reached.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import orjson
import typer

from benchmarks import load, wrk
from benchmarks.forms import numbers, start
from benchmarks.results import spread

CHOICES = (("uvloop", "own"), ("uvloop", "httptools"), ("uvloop", "h11"), ("asyncio", "own"))
CONNECTIONS = 64
OPEN_SHARE = 0.75


def bench(
    rounds: Annotated[int, typer.Option(help="Rounds in which the choices take turns.")] = 3,
    seconds: Annotated[int, typer.Option(help="Seconds of each measurement.")] = 3,
) -> None:
    """Measure the service on each event loop and behind each parser."""
    closed_loop = wrk.or_own_closed_loop()
    body = orjson.dumps({"instances": [numbers(1)]})
    request = load.http_request("/anomaly-score?model=mnist-basic", body, "application/json")
    per_s: dict[tuple[str, str], list[float]] = {choice: [] for choice in CHOICES}
    arriving: dict[tuple[str, str], list[load.Load]] = {choice: [] for choice in CHOICES}
    with tempfile.TemporaryDirectory(prefix="bench-settings-") as folder:
        for number in range(rounds):
            for loop, http in CHOICES:
                with start(Path(folder), "-m", "benchmarks.servers.variant", loop, http, "PORT") as server:
                    closed_loop(server.port, [request], CONNECTIONS, 1)
                    found = closed_loop(server.port, [request], CONNECTIONS, seconds)
                    assert not found.failed, (loop, http)
                    per_s[loop, http].append(found.per_s)
                    rate_per_s = OPEN_SHARE * per_s[CHOICES[0]][-1]
                    arriving[loop, http].append(
                        load.open_loop(server.port, request, rate_per_s, seconds, seed=number, settle_s=0.5)
                    )
    print(f"JSON of 784 numbers → score, mnist-basic, {CONNECTIONS} connections, one process; medians [lowest–highest]")
    served = per_s[CHOICES[0]]
    for loop, http in CHOICES:
        rates = per_s[loop, http]
        ratios = [rate / own for rate, own in zip(rates, served, strict=True)]
        p50_ms, p99_ms = ([getattr(found, name) * 1e3 for found in arriving[loop, http]] for name in ("p50_s", "p99_s"))
        print(
            f"  {loop:8} {http:10} {statistics.median(rates):6.0f} requests/s, "
            f"{spread(ratios, '{:.2f}')} of the service's own choice; "
            f"arriving: p50 {spread(p50_ms, '{:.1f}')} ms, p99 {spread(p99_ms, '{:.1f}')} ms"
        )


if __name__ == "__main__":
    typer.run(bench)
