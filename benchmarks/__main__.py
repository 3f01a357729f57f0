"""python -m benchmarks: measures this service against its peers and says which promises held."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report, wrk
from benchmarks.measure import GROUPS, Plan, Run
from benchmarks.results import verdicts

QUICK_ROUNDS, QUICK_SECONDS, QUICK_TRIES = 1, 1, 20


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUP", help=f"Measure this group alone; repeatable: {', '.join(GROUPS)}."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A smoke run of some two minutes: one round of one second. No figures to quote."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every server is started anew in each.")] = 3,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds of each measurement.")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of every server that has workers [the number of cores].")
    ] = None,
    tries: Annotated[int, typer.Option(min=1, help="Tries of deadlines and of disconnections.")] = 120,
    every_server: Annotated[
        bool, typer.Option("--every-server", help="Compare every server in every job, also where no promise needs it.")
    ] = False,
    own_load: Annotated[
        bool,
        typer.Option("--own-load", help="Closed loop by the benchmark's own generator even where wrk is installed."),
    ] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Put the report into this Markdown document, between its marks.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where artifacts, the peers' environments and logs are kept between runs.")
    ] = Path(".bench"),
    max_minutes: Annotated[
        float, typer.Option(help="Nothing new is begun after this long; what was measured is reported.")
    ] = 28,
) -> None:
    """Measure this service against its peers, the naive app and the bare app, all in one run on this machine.

    Every server is started here on a free loopback port, checked against the model itself, loaded and stopped again;
    round by round they take turns. Close what else is running: it would be measured too.

    Examples:
      python -m benchmarks --quick

      python -m benchmarks --only score --only conv --rounds 5

      python -m benchmarks --write docs/performance.md
    """
    if unknown := set(only or ()) - set(GROUPS):
        raise typer.BadParameter(f"expected one of {', '.join(GROUPS)}; found {', '.join(sorted(unknown))}")
    # A run that is told to end must still end its servers.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    started = time.monotonic()
    run = Run(
        Plan(
            groups=[group for group in GROUPS if not only or group in only],
            rounds=QUICK_ROUNDS if quick else rounds,
            seconds=QUICK_SECONDS if quick else seconds,
            workers=workers or os.cpu_count() or 1,
            folder=folder,
            use_wrk=wrk.available() and not own_load,
            every_server=every_server,
            idle_s=3.0 if quick else 10.0,
            tries=QUICK_TRIES if quick else tries,
            limit_s=max_minutes * 60,
            is_quick=quick,
        ),
        say=lambda text: typer.echo(f"{time.monotonic() - started:6.0f} s  {text}", err=True),
    )
    stopped = False
    try:
        run.carry_out()
    except KeyboardInterrupt:
        stopped = True
        typer.echo("stopped; what was measured until here:", err=True)
    typer.echo("")
    typer.echo(report.promises(verdicts(run.results, run.plan.groups)))
    typer.echo(report.quiet(run.results))
    for name, reason in run.results.failures.items():
        typer.echo(f"{name} was not measured: {reason}")
    if stopped:
        raise typer.Exit(130)
    if write is not None:
        report.write(write, report.markdown(run))
        typer.echo(f"the whole report is in {write}")


if __name__ == "__main__":
    typer.run(bench)
