"""create_app: wires the rooms of the service; its lifespan opens and closes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from app import __version__
from app.api import health, models
from app.api.envelope import Envelope
from app.api.errors import problem_response
from app.capabilities import ROUTERS
from app.catalog import Catalog
from app.errors import ServiceError
from app.inference.loaded_model import select_device
from app.observability.metrics import Metrics
from app.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application.

    Loading starts with the application's lifespan, in the background: probes answer from the first moment on.
    Raises ValueError if the machine lacks the device that the settings ask for.
    """
    device = select_device(settings.device)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Catalog(
            settings.models_store,
            device,
            max_queue_rows=settings.max_queue_rows,
            max_batch_size=settings.max_batch_size,
            default_model=settings.default_model,
            required_models=settings.required_models,
            observe=lambda *batch: metrics.observe_batch(*batch),  # noqa: PLW0108  metrics exist only below
        ) as catalog:
            app.state.catalog = catalog
            yield

    app = FastAPIOffline(  # the documentation's scripts come from this machine, not from somebody else's
        title="Hourglass",
        version=__version__,
        description="Autoencoders as a service: latents, reconstructions, denoising, calibrated verdicts, samples.",
        lifespan=lifespan,
        redoc_url=None,
    )

    def model_states() -> Iterator[tuple[str, int, str]]:
        for name, versions in app.state.catalog.models.items():
            for version in versions:
                yield name, version.ref.version, version.state

    metrics = Metrics(
        waiting_rows=lambda: app.state.catalog.batcher.waiting_rows,
        model_states=model_states,
        is_ready=lambda: not app.state.catalog.reasons_not_ready(),
    )
    app.state.settings = settings
    app.state.metrics = metrics
    for router in (*ROUTERS, models.router, health.router):
        app.include_router(router)
    app.add_exception_handler(ServiceError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_middleware(Envelope, metrics=metrics)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return problem_response(request, error)
