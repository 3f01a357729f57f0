"""Every environment variable that the service reads, typed, units in the names. Only `main` and the command line do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Read from the environment with the prefix `HOURGLASS_`."""

    model_config = SettingsConfigDict(env_prefix="HOURGLASS_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    models_store: Path = Field(Path("models_store"), description="Folder of artifacts, <name>/<version>/ each.")
    default_model: str | None = Field(None, description="Model for requests that name none, where it can do the work.")
    required_models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Comma-separated names without which the service is not ready."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (CUDA where there is one), cpu, cuda or cuda:N.",
    )
    workers: int = Field(1, ge=1, le=256, description="Processes, each with its own copy of the models.")
    torch_threads: int | None = Field(
        None, ge=1, description="Threads of one forward pass on a CPU; unset: the cores divided by the workers."
    )
    max_batch_size: int | None = Field(
        None, ge=1, description="Most rows in one forward pass; unset: what each manifest says."
    )
    max_queue_rows: int = Field(
        4096, ge=1, description="Most rows that may wait in each worker; beyond it requests get a 429."
    )
    max_queue_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1,
        description="Most bytes of input that may wait in each worker; beyond it requests get a 429.",
    )
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1, description="Largest request body, in bytes, decompressed.")
    max_spool_bytes: int = Field(
        1024 * 1024 * 1024,
        ge=1,
        description="Most disk that one bulk request may take: unread answers, or the zip that it sends.",
    )
    max_image_pixels: int = Field(40_000_000, ge=1, description="Largest uploaded picture, in pixels.")
    request_timeout_ms: int = Field(
        30_000, ge=1, le=600_000, description="A request's time, queue included, unless it sets X-Request-Timeout-Ms."
    )
    pinned_models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Comma-separated names that stay in memory, as the default and the required models do."
    )
    model_memory_bytes: int | None = Field(
        None, ge=1, description="Most parameters and buffers in memory; what is left out is loaded at its first use."
    )
    keep_versions: int = Field(2, ge=1, description="How many sound versions of a model are kept, the highest ones.")
    store_poll_seconds: float = Field(
        1, ge=0, le=3600, description="How often the store is looked at for changes; 0: only at the start."
    )
    load_seconds: float = Field(600, gt=0, description="How long loading one artifact may take before it is refused.")
    ready_within_seconds: float = Field(
        10, gt=0, description="A model that is needed has run within this time, or the service is not ready."
    )
    stall_seconds: float = Field(
        30, gt=0, description="A forward pass that takes longer ends the process, so that it is started anew."
    )
    drain_seconds: float = Field(
        10, ge=0, le=3600, description="How long requests are still answered after SIGTERM, not being ready any more."
    )
    api_keys_file: Path | None = Field(
        None, description="File of keys, `name scopes sha256:<hex>` a line; unset: all may infer, none administer."
    )
    log_format: Literal["console", "json"] = Field(
        default_factory=lambda: "console" if sys.stderr.isatty() else "json",
        description="Log lines for people or for machines; unset: console on a terminal, else json.",
    )

    @field_validator("required_models", "pinned_models", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value
