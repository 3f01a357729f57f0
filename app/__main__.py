"""python -m app: the service's command line."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pydantic import ValidationError
from rich.console import Console

from app.api.connections import HttpConnection, Server
from app.errors import ServiceError
from app.inference.loaded_model import select_devices
from app.main import create_app
from app.observability.logs import configure_logging
from app.scoring.errors import ScoringError
from app.scoring.progress import Bar, summary_of
from app.scoring.run import Wanted
from app.scoring.run import score as run_score
from app.scoring.tables import check_out, table_for
from app.settings import Settings
from app.supervisor import Supervisor, listen, member_from_environment

_EXIT_UNWELL = 70
"""Exit code of a process that cannot serve any more: EX_SOFTWARE of sysexits.h."""

cli = typer.Typer(
    name="python -m app",
    help="Serves trained autoencoders over HTTP, and scores files with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@cli.callback()
def main() -> None:
    """Serves trained autoencoders over HTTP, and scores files with them."""


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [HOURGLASS_HOST, 127.0.0.1].")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one [HOURGLASS_PORT, 8000].")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes, each with its own copy of the models [HOURGLASS_WORKERS, 1].")
    ] = None,
) -> None:
    """Serve the models of the store.

    Everything else is set by environment variables with the prefix HOURGLASS_; the README lists them.

    Example:  HOURGLASS_MODELS_STORE=models_store python -m app serve --port 8000
    """
    settings = _settings(host=host, port=port, workers=workers)
    try:
        log_config = configure_logging(settings.log_format)
        member = member_from_environment()
        if member is None and settings.workers > 1:
            select_devices(settings.device)  # a device that is not there is told once, here
            supervisor = Supervisor(settings.host, settings.port, settings.workers)
            _announce(settings, supervisor.port)
            raise typer.Exit(supervisor.run())
        app = create_app(settings, member, end=lambda: os._exit(_EXIT_UNWELL))
        sock = listen(settings.host, settings.port, shared=member is not None)
    except ValueError as error:
        name, _, message = str(error).partition(":")
        typer.echo(f"HOURGLASS_{name.upper()}:{message}", err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    if member is None:
        _announce(settings, sock.getsockname()[1])
    server = Server(
        uvicorn.Config(
            app.state.served,  # FastAPI's own entrance, around it, has nothing to do here
            http=HttpConnection,
            ws="none",
            log_config=log_config,
            access_log=False,  # the metrics count requests; a line for each would cost more than the work
            server_header=False,
            lifespan="on",
        ),
        app.state.drain,
    )
    server.run(sockets=[sock])


@cli.command()
def score(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Pictures, folders, globs, .npy, .csv or .parquet files.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rows here: .parquet, .csv or .jsonl, by the name's ending."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:VERSION]", help="Who scores; unset: whom the service would ask [HOURGLASS_DEFAULT_MODEL]."
        ),
    ] = None,
    target_fpr: Annotated[
        float | None,
        typer.Option(help="Share of normal items that may be flagged, 0 to 1; unset: the artifact's, usually 0.01."),
    ] = None,
    invert: Annotated[
        bool | None, typer.Option("--invert/--no-invert", help="Dark on light; unset: the model's polarity rule.")
    ] = None,
) -> None:
    """Score files in bulk, without a server: how unusual each item is, and whether it is an anomaly.

    The verdicts are those that the service gives, by the same models, settings and limits (HOURGLASS_MODELS_STORE,
    HOURGLASS_DEVICE, HOURGLASS_MAX_IMAGE_PIXELS, …). Files of any size and number take bounded memory.

    **What may be scored:** pictures (PNG, JPEG, WebP, BMP, TIFF, GIF) of any size; .npy of one item or many;
    .zip of pictures; .jsonl as /bulk takes it; for models of records .csv with a line of feature names; .parquet with a
    column each feature, or a column of picture files. A column id comes back. A folder stands for the pictures in it,
    at any depth, or, where the model takes records, for its tables. Quote a glob to have ** understood.

    **What comes out:** a row an item, in order: path, row (in a file of many), id, score, p_value, is_anomaly,
    threshold, target_fpr and more; in place of a verdict that could not be, error and code. Without --out they are
    lines to read on a terminal, else JSON lines.

    **Exit code:** 0 every item was scored; 1 some could not be, the others were; 2 nothing was done.

    Examples:
      python -m app score photos/ --out verdicts.parquet

      python -m app score 'photos/**/*.png' --model mnist-conv --target-fpr 0.005

      python -m app score digits.npy | jq -c 'select(.is_anomaly)'
    """
    settings = _settings()
    terminal = Console() if sys.stdout.isatty() else None
    on_screen = terminal if terminal is not None and out is None else Console(stderr=True)
    wanted = Wanted(tuple(paths), model, target_fpr, invert)
    try:
        check_out(out)
        with Bar(on_screen) as bar:
            scored = asyncio.run(
                run_score(wanted, settings, lambda served: table_for(out, served.manifest, terminal), bar.show)
            )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        option = str(problem["loc"][0]).replace("_", "-")
        typer.echo(f"score: --{option}: {problem['msg']}, found {problem['input']!r}", err=True)
        raise typer.Exit(2) from error
    except (ScoringError, ServiceError, ValueError) as error:
        typer.echo(f"score: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo("score: interrupted; nothing was written", err=True)
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        raise typer.Exit(141) from error
    typer.echo(summary_of(scored, out), err=True)
    raise typer.Exit(1 if scored.summary.failed else 0)


def _settings(**given: str | int | None) -> Settings:
    """The environment's settings and those that are given; ends the program, naming what is wrong with them."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # of each its own
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            typer.echo(f"HOURGLASS_{name}: {problem['msg']}, found {problem['input']!r}", err=True)
        raise typer.Exit(2) from error


def _announce(settings: Settings, port: int) -> None:
    logging.getLogger("app").info(
        "Hourglass on http://%s:%d, models from %s", settings.host, port, settings.models_store
    )


if __name__ == "__main__":
    cli()
