"""python -m benchmarks.servers.variant LOOP HTTP PORT: this service on another event loop, or behind another parser.

One process. LOOP is uvloop or asyncio; HTTP is own, or one of uvicorn's: httptools or h11.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

from app.__main__ import cli


class VariedConfig(uvicorn.Config):
    """The service's configuration of uvicorn with the chosen loop and, unless it is to keep its own, protocol."""

    def __init__(self, app: Any, **options: Any) -> None:
        options["loop"] = sys.argv[1]
        if sys.argv[2] != "own":
            options["http"] = sys.argv[2]
        super().__init__(app, **options)


if __name__ == "__main__":
    uvicorn.Config = VariedConfig  # type: ignore[assignment,misc]  # the service makes one of these
    cli(["serve", "--port", sys.argv[3], "--workers", "1"])
