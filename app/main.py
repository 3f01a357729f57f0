"""create_app: wires the rooms of the service; its lifespan opens and closes them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from app import __version__
from app.api import health, models
from app.api.drain import Drain
from app.api.envelope import Envelope
from app.api.errors import problem_response
from app.api.in_flight import ON_CONNECTION
from app.api.security import Keys
from app.api.services import Services
from app.capabilities import ROUTERS
from app.catalog import Catalog
from app.control import ModelControl
from app.errors import ServiceError
from app.fleet import Fleet, Member, PValues, Snapshot, VersionState
from app.health import Health
from app.inference.loaded_model import select_devices
from app.observability.metrics import Metrics
from app.protocols import (
    bulk,
    open_inference,
    open_inference_models,
    open_inference_repository,
    open_inference_statistics,
)
from app.settings import Settings


def create_app(settings: Settings, member: Member | None = None, end: Callable[[], None] = lambda: None) -> FastAPI:
    """The service as an ASGI application.

    Loading starts with the application's lifespan, in the background: probes answer from the first moment on.

    Args:
        settings: every setting.
        member: the process's place among several workers; None if it is alone.
        end: ends the process at once, called where nothing else helps: a lost device, a forward that never returns.

    Raises ValueError if the machine lacks the device that the settings ask for, or the keys file is none.
    """
    devices = select_devices(settings.device)
    keys, drain = Keys(settings.api_keys_file), Drain(settings.drain_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        catalog = Catalog(
            settings.models_store,
            devices,
            max_queue_rows=settings.max_queue_rows,
            max_queue_bytes=settings.max_queue_bytes,
            torch_threads=settings.torch_threads or max(1, len(os.sched_getaffinity(0)) // settings.workers),
            max_batch_size=settings.max_batch_size,
            default_model=settings.default_model,
            required_models=settings.required_models,
            pinned_models=settings.pinned_models,
            memory_bytes=settings.model_memory_bytes,
            keep_versions=settings.keep_versions,
            poll_s=settings.store_poll_seconds,
            load_s=settings.load_seconds,
            observe=lambda *batch: metrics.observe_batch(*batch),  # noqa: PLW0108  metrics exist only below
            observe_change=lambda *change: metrics.observe_change(*change),  # noqa: PLW0108  likewise
            on_lost=lambda error: app.state.health.lose(str(error)),
        )
        # Health outlasts the catalog, whose end may hang where a device does.
        async with (
            Health(
                catalog,
                within_s=settings.ready_within_seconds,
                stall_s=settings.stall_seconds,
                end=end,
            ) as health,
            ModelControl(catalog, member) as control,
        ):
            app.state.loop = asyncio.get_running_loop()
            app.state.health, app.state.control, app.state.catalog = health, control, catalog
            async with (
                catalog,
                Fleet(lambda: _snapshot(catalog, health, drain), member) as fleet,
            ):
                app.state.fleet = fleet
                yield {ON_CONNECTION: catalog.batcher.stay_awake}

    app = FastAPIOffline(  # the documentation's scripts come from this machine, not from somebody else's
        title="Hourglass",
        version=__version__,
        description="Autoencoders as a service: latents, reconstructions, denoising, calibrated verdicts, samples.",
        lifespan=lifespan,
        redoc_url=None,
    )

    metrics = Metrics(lambda: app.state.fleet)
    app.state = Services(settings, metrics, drain)  # type: ignore[assignment]  # typed, where Starlette's is open
    protocols = (
        open_inference.router,
        open_inference_statistics.router,  # before the models, whose {name} would match /v2/models/stats
        open_inference_models.router,
        open_inference_repository.router,
        bulk.router,
    )
    for router in (*ROUTERS, models.router, health.router, *protocols):
        app.include_router(router)
    app.add_exception_handler(ServiceError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    hot = {path: handler for router in ROUTERS for path, handler in router.hot.items()} | bulk.HOT

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    app.state.served = Envelope(app, hot, (open_inference.HOT_PATTERN,), metrics, keys, drain)
    return app


def _snapshot(catalog: Catalog, health: Health, drain: Drain) -> Snapshot:
    leaving = ["draining"] if drain.has_begun else []
    return Snapshot(
        reasons_not_ready=(*leaving, *catalog.reasons_not_ready(), *health.reasons_not_ready()),
        is_draining=drain.has_begun,
        model_bytes=catalog.memory_bytes,
        is_loaded=catalog.is_loaded,
        versions=tuple(
            VersionState(name=v.ref.name, version=v.ref.version, state=v.state, reason=v.reason)
            for versions in catalog.models.values()
            for v in versions
        ),
        waiting_rows=catalog.batcher.waiting_rows,
        p_values=tuple(
            PValues(name=v.ref.name, version=v.ref.version, counts=counts, calibrated=len(v.served.calibration.scores))
            for versions in catalog.models.values()
            for v in versions
            if v.served is not None and v.served.calibration is not None and any(counts := v.served.p_values.counts)
        ),
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    return problem_response(request, error)
