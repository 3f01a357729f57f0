"""python -m benchmarks.owners: a replica of the model in every HTTP process against one owner of the device.

Both ways in the bare app, so that nothing else differs; they take turns.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import wrk
from benchmarks.artifact import payload, stores_in
from benchmarks.load import http_request
from benchmarks.processes import free_port, running
from benchmarks.results import spread
from benchmarks.servers import BARE, OWNER, Launch

JOBS_COMPARED = {"score": 64, "reconstruct": 64, "conv": 16}
"""Jobs, and their connections."""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the two ways take turns.")] = 3,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds of each measurement.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where artifacts and logs are kept between runs.")] = Path(".bench"),
) -> None:
    """Measure both ways of sharing a device among HTTP processes, on as many as there are cores."""
    stores = stores_in(folder / "store")
    workers = os.cpu_count() or 1
    closed_loop = wrk.or_own_closed_loop()
    for job, connections in JOBS_COMPARED.items():
        rates: dict[str, list[float]] = {BARE.name: [], OWNER.name: []}
        memory: dict[str, list[float]] = {BARE.name: [], OWNER.name: []}
        for _ in range(rounds):
            for contender in (BARE, OWNER):
                launch = Launch(Path(sys.executable), free_port(), stores.of(job).resolve(), job, workers)
                body, content_type = contender.body(job, payload(job))
                request = http_request(contender.path(job), body, content_type)
                with running(
                    contender.command(launch),
                    contender.environment(launch),
                    port=launch.port,
                    ready_path=contender.ready_path,
                    log=folder / "logs" / f"{contender.name.replace(' ', '-')}.log",
                ) as server:
                    closed_loop(server.port, [request], connections, 1)
                    answered = closed_loop(server.port, [request], connections, seconds)
                    if answered.failed:
                        raise typer.Exit(1)
                    rates[contender.name].append(answered.per_s)
                    memory[contender.name].append(server.memory_bytes() / 2**20)
        typer.echo(f"{job}, {connections} connections, {workers} HTTP processes")
        for name, found in rates.items():
            used = statistics.median(memory[name])
            typer.echo(f"  {name:13} {spread(found, '{:.0f}')} requests/s, {used:.0f} MiB")
        ratio = statistics.median(rates[BARE.name]) / statistics.median(rates[OWNER.name])
        typer.echo(f"  a replica for each is {ratio:.2f} × one owner")


if __name__ == "__main__":
    typer.run(main)
