"""What the application's parts are to its endpoints; `app.state` is one of these."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp

from app.api.drain import Drain
from app.api.in_flight import InFlight
from app.batching.deadlines import Deadlines
from app.catalog import Catalog
from app.codecs.items import Limits
from app.control import ModelControl
from app.fleet import Fleet
from app.health import Health
from app.observability.metrics import Metrics
from app.settings import Settings


@dataclass(eq=False)
class Services:
    """The parts of the application. Loop, catalog, fleet, health and control exist while its lifespan lasts."""

    settings: Settings
    metrics: Metrics
    drain: Drain
    deadlines: Deadlines[InFlight] = field(default_factory=lambda: Deadlines(InFlight.expire))
    limits: Limits = field(init=False)
    loop: asyncio.AbstractEventLoop = field(init=False)
    catalog: Catalog = field(init=False)
    fleet: Fleet = field(init=False)
    health: Health = field(init=False)
    control: ModelControl = field(init=False)
    served: ASGIApp = field(init=False)
    """The application from its outermost layer on."""

    def __post_init__(self) -> None:
        self.limits = Limits(max_rows=self.settings.max_queue_rows, max_image_pixels=self.settings.max_image_pixels)


def services_of(request: Request) -> Services:
    """The parts of the application that the request came to."""
    services: Services = request.scope["app"].state
    return services
