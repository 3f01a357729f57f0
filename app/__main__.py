"""python -m app: the service's command line."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer
import uvicorn
from pydantic import ValidationError

from app.api.connections import HttpConnection, Server
from app.inference.loaded_model import select_devices
from app.main import create_app
from app.observability.logs import configure_logging
from app.settings import Settings
from app.supervisor import Supervisor, listen, member_from_environment

_EXIT_UNWELL = 70
"""Exit code of a process that cannot serve any more: EX_SOFTWARE of sysexits.h."""

cli = typer.Typer(
    name="python -m app",
    help="Serves trained autoencoders over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@cli.callback()
def main() -> None:
    """Serves trained autoencoders over HTTP."""


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
    given = {"host": host, "port": port, "workers": workers}
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        log_config = configure_logging(settings.log_format)
        member = member_from_environment()
        if member is None and settings.workers > 1:
            select_devices(settings.device)  # a device that is not there is told once, here
            supervisor = Supervisor(settings.host, settings.port, settings.workers)
            _announce(settings, supervisor.port)
            raise typer.Exit(supervisor.run())
        app = create_app(settings, member, end=lambda: os._exit(_EXIT_UNWELL))
        sock = listen(settings.host, settings.port, shared=member is not None)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            typer.echo(f"HOURGLASS_{name}: {problem['msg']}, found {problem['input']!r}", err=True)
        raise typer.Exit(2) from error
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
            app,
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


def _announce(settings: Settings, port: int) -> None:
    logging.getLogger("app").info(
        "Hourglass on http://%s:%d, models from %s", settings.host, port, settings.models_store
    )


if __name__ == "__main__":
    cli()
