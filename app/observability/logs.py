"""Log lines: for people on a terminal, as JSON for machines."""

from __future__ import annotations

import logging.config
from typing import Any, Literal


def configure_logging(log_format: Literal["console", "json"]) -> dict[str, Any]:
    """Sends every log line to standard error in that format; returns the configuration, for uvicorn to keep."""
    config: dict[str, Any] = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "console": {"format": "%(asctime)s %(levelname)-7s %(message)s", "datefmt": "%H:%M:%S"},
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "format": "%(asctime)s %(levelname)s %(name)s %(message)s",
                "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
                "datefmt": "%Y-%m-%dT%H:%M:%S%z",
            },
        },
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": log_format}
        },
        "root": {"handlers": ["stderr"], "level": "INFO"},
        "loggers": {"uvicorn.error": {"level": "WARNING"}, "httpx": {"level": "WARNING"}},
    }
    logging.config.dictConfig(config)
    return config
