"""Synchronous and asynchronous calls, over one description of what is sent and what comes back."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Item: TypeAlias = "Image.Image | NDArray[Any] | Sequence[Any] | os.PathLike[str] | bytes"
"""A picture, an array in the model's shape (uint8: 0 to 255, else in its range), nested numbers, or a picture file."""

_RETRIED = (429, 503)


class HourglassError(Exception):
    """An answer that is no success: its status, its code and what the service says went wrong."""

    def __init__(self, status: int, code: str, message: str, request_id: str = "") -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.request_id = request_id


@dataclass(frozen=True)
class _Call:
    path: str
    parameters: dict[str, str]
    body: bytes


def _instance(item: Item) -> Any:
    if isinstance(item, os.PathLike):
        with open(item, "rb") as file:
            item = file.read()
    elif isinstance(item, Image.Image):
        stream = io.BytesIO()
        item.save(stream, "PNG")
        item = stream.getvalue()
    if isinstance(item, bytes):
        return {"b64": base64.b64encode(item).decode()}
    if isinstance(item, np.ndarray):
        values = item.astype(np.float32) / np.float32(255) if item.dtype == np.uint8 else item
        return values.tolist()
    return item


def _call(route: str, model: str | None, body: dict[str, Any], **parameters: object) -> _Call:
    given = {"model": model, **parameters}
    texts = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value is not None
    }
    return _Call(route, texts, json.dumps(body).encode())


def _items(route: str, items: Iterable[Item], model: str | None, **parameters: object) -> _Call:
    return _call(route, model, {"instances": [_instance(item) for item in items]}, **parameters)


def _inpaint(items: Iterable[Item], masks: Iterable[NDArray[Any]], model: str | None) -> _Call:
    body = {
        "instances": [_instance(item) for item in items],
        "masks": [np.asarray(mask, dtype=int).tolist() for mask in masks],
    }
    return _call("/inpaint", model, body)


def _line(number: int, item: Item) -> bytes:
    return json.dumps({"id": number, "instance": _instance(item)}).encode() + b"\n"


def _results(response: httpx.Response) -> list[dict[str, Any]]:
    if response.is_error:
        raise _error(response)
    found: list[dict[str, Any]] = response.json()["results"]
    return found


def _verdicts(response: httpx.Response) -> list[dict[str, Any]]:
    found = _results(response)
    for verdict in found:
        if isinstance(verdict.get("heatmap"), str):
            verdict["heatmap"] = Image.open(io.BytesIO(base64.b64decode(verdict["heatmap"])))
        elif verdict.get("heatmap") is not None:
            verdict["heatmap"] = np.asarray(verdict["heatmap"], dtype=np.float32)
    return found


def _column(response: httpx.Response, name: str) -> NDArray[np.float32]:
    return np.asarray([result[name] for result in _results(response)], dtype=np.float32)


def _pictures(response: httpx.Response) -> list[Image.Image]:
    names = ("reconstruction", "denoised", "inpainted", "sample")
    files = [next(result[name] for name in names if name in result) for result in _results(response)]
    return [Image.open(io.BytesIO(base64.b64decode(file))) for file in files]


def _error(response: httpx.Response) -> HourglassError:
    try:
        body = response.json()
        return HourglassError(response.status_code, body["code"], body["error"], body.get("request_id", ""))
    except (ValueError, KeyError, TypeError):
        return HourglassError(response.status_code, "unknown", response.text[:500])


def _bulk_line(line: str) -> dict[str, Any] | None:
    """One answer of a stream; None for its summary."""
    found: dict[str, Any] = json.loads(line)
    return None if "summary" in found else found


class _Retries:
    """How often a call is repeated, and how long to wait before: what `Retry-After` says, else twice as long each."""

    def __init__(self, retries: int, max_wait_s: float) -> None:
        self._left = retries
        self._max_wait_s = max_wait_s
        self._wait_s = 0.1

    def pause_s(self, response: httpx.Response | None) -> float | None:
        """Seconds to wait before the next attempt; None if there shall be none."""
        if self._left == 0 or (response is not None and response.status_code not in _RETRIED):
            return None
        self._left -= 1
        said = response.headers.get("retry-after", "") if response is not None else ""
        pause_s, self._wait_s = (float(said) if said.isdigit() else self._wait_s), 2 * self._wait_s
        return pause_s if pause_s <= self._max_wait_s else None


class _Options:
    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 3,
        max_wait_s: float = 30.0,
    ) -> None:
        headers = {"content-type": "application/json"}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        self._http_options: dict[str, Any] = {"base_url": base_url, "headers": headers, "timeout": timeout_s}
        self._retries = retries
        self._max_wait_s = max_wait_s


class Client(_Options):
    """Calls that wait for their answers. Open and close it with `with`.

    Args:
        base_url: where the service is.
        api_key: sent as a bearer token.
        timeout_s: of one attempt.
        retries: how often a call is repeated that met 429, 503 or a broken connection.
        max_wait_s: longest `Retry-After` that is waited for.
    """

    def __enter__(self) -> Self:
        self._http = httpx.Client(**self._http_options)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._http.close()

    def encode(self, items: Iterable[Item], *, model: str | None = None) -> NDArray[np.float32]:
        """Latent vectors, (n, latent_dim)."""
        return _column(self._post(_items("/encode", items, model)), "latent")

    def decode(self, latents: NDArray[Any], *, model: str | None = None) -> NDArray[np.float32]:
        """Items for latent vectors, (n, *shape)."""
        return _column(self._post(_call("/decode", model, {"latents": np.asarray(latents).tolist()})), "reconstruction")

    def reconstruct(self, items: Iterable[Item], *, model: str | None = None) -> NDArray[np.float32]:
        """Reconstructions, (n, *shape)."""
        return _column(self._post(_items("/reconstruct", items, model)), "reconstruction")

    def denoise(self, items: Iterable[Item], *, model: str | None = None) -> NDArray[np.float32]:
        """Items without noise, (n, *shape)."""
        return _column(self._post(_items("/denoise", items, model)), "denoised")

    def inpaint(
        self, items: Iterable[Item], masks: Iterable[NDArray[Any]], *, model: str | None = None
    ) -> NDArray[np.float32]:
        """Items without holes, (n, *shape); masks are (height, width), 1 where something is missing."""
        return _column(self._post(_inpaint(items, masks, model)), "inpainted")

    def anomaly_score(
        self,
        items: Iterable[Item],
        *,
        model: str | None = None,
        target_fpr: float | None = None,
        fdr: float | None = None,
        heatmap: Literal["array", "png"] | None = None,
        boxes: bool | None = None,
    ) -> list[dict[str, Any]]:
        """A verdict per item: `score`, `p_value`, `is_anomaly`, `threshold` and more.

        Decided at a false-positive rate, or with `fdr` at a rate of false discoveries among these items. `heatmap` adds
        where a picture is unusual, as an array (height, width) or, `png`, a picture; `boxes` the places above 1 in it.
        """
        asked = {"target_fpr": target_fpr, "fdr": fdr, "heatmap": heatmap, "boxes": boxes}
        return _verdicts(self._post(_items("/anomaly-score", items, model, **asked)))

    def sample(self, count: int = 1, *, seed: int | None = None, model: str | None = None) -> NDArray[np.float32]:
        """New items, (count, *shape)."""
        body = {"count": count} if seed is None else {"count": count, "seed": seed}
        return _column(self._post(_call("/sample", model, body)), "sample")

    def pictures(
        self, route: str, items: Iterable[Item], *, model: str | None = None, **parameters: object
    ) -> list[Image.Image]:
        """What `reconstruct`, `denoise` or `interpolate` answers, as pictures of 8 bits a channel."""
        return _pictures(self._post(_items(f"/{route}", items, model, images="png", **parameters)))

    def bulk(
        self, route: str, items: Iterable[Item], *, model: str | None = None, **parameters: object
    ) -> Iterator[dict[str, Any]]:
        """Each item's answer in order, as it is ready, however many there are; `error` and `code` where one failed.

        Raises HourglassError where the stream was refused or cut.
        """
        call = _call(f"/bulk/{route}", model, {}, **parameters)
        lines = (_line(number, item) for number, item in enumerate(items))
        headers = {"content-type": "application/x-ndjson"}
        with self._http.stream("POST", call.path, params=call.parameters, content=lines, headers=headers) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            for line in response.iter_lines():
                found = _bulk_line(line)
                if found is None:
                    return
                yield found
        raise HourglassError(response.status_code, "cut", "the stream ended before its summary")

    def _post(self, call: _Call) -> httpx.Response:
        retries = _Retries(self._retries, self._max_wait_s)
        while True:
            response: httpx.Response | None = None
            try:
                response = self._http.post(call.path, params=call.parameters, content=call.body)
                pause_s = retries.pause_s(response)
                if pause_s is None:
                    return response
            except httpx.ConnectError:
                pause_s = retries.pause_s(None)
                if pause_s is None:
                    raise
            time.sleep(pause_s)


class AsyncClient(_Options):
    """The same calls for asyncio. Open and close it with `async with`; arguments as those of `Client`."""

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(**self._http_options)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def encode(self, items: Iterable[Item], *, model: str | None = None) -> NDArray[np.float32]:
        """Latent vectors, (n, latent_dim)."""
        return _column(await self._post(_items("/encode", items, model)), "latent")

    async def decode(self, latents: NDArray[Any], *, model: str | None = None) -> NDArray[np.float32]:
        """Items for latent vectors, (n, *shape)."""
        call = _call("/decode", model, {"latents": np.asarray(latents).tolist()})
        return _column(await self._post(call), "reconstruction")

    async def reconstruct(self, items: Iterable[Item], *, model: str | None = None) -> NDArray[np.float32]:
        """Reconstructions, (n, *shape)."""
        return _column(await self._post(_items("/reconstruct", items, model)), "reconstruction")

    async def denoise(self, items: Iterable[Item], *, model: str | None = None) -> NDArray[np.float32]:
        """Items without noise, (n, *shape)."""
        return _column(await self._post(_items("/denoise", items, model)), "denoised")

    async def inpaint(
        self, items: Iterable[Item], masks: Iterable[NDArray[Any]], *, model: str | None = None
    ) -> NDArray[np.float32]:
        """Items without holes, (n, *shape); masks are (height, width), 1 where something is missing."""
        return _column(await self._post(_inpaint(items, masks, model)), "inpainted")

    async def anomaly_score(
        self,
        items: Iterable[Item],
        *,
        model: str | None = None,
        target_fpr: float | None = None,
        fdr: float | None = None,
        heatmap: Literal["array", "png"] | None = None,
        boxes: bool | None = None,
    ) -> list[dict[str, Any]]:
        """A verdict per item: `score`, `p_value`, `is_anomaly`, `threshold` and more."""
        asked = {"target_fpr": target_fpr, "fdr": fdr, "heatmap": heatmap, "boxes": boxes}
        return _verdicts(await self._post(_items("/anomaly-score", items, model, **asked)))

    async def sample(self, count: int = 1, *, seed: int | None = None, model: str | None = None) -> NDArray[np.float32]:
        """New items, (count, *shape)."""
        body = {"count": count} if seed is None else {"count": count, "seed": seed}
        return _column(await self._post(_call("/sample", model, body)), "sample")

    async def pictures(
        self, route: str, items: Iterable[Item], *, model: str | None = None, **parameters: object
    ) -> list[Image.Image]:
        """Answers as pictures, as `Client.pictures`."""
        return _pictures(await self._post(_items(f"/{route}", items, model, images="png", **parameters)))

    async def bulk(
        self, route: str, items: Iterable[Item], *, model: str | None = None, **parameters: object
    ) -> AsyncIterator[dict[str, Any]]:
        """Each item's answer in order, as `Client.bulk`."""
        call = _call(f"/bulk/{route}", model, {}, **parameters)

        async def lines() -> AsyncIterator[bytes]:
            for number, item in enumerate(items):
                yield _line(number, item)

        headers = {"content-type": "application/x-ndjson"}
        sending = self._http.stream("POST", call.path, params=call.parameters, content=lines(), headers=headers)
        async with sending as response:
            if response.is_error:
                await response.aread()
                raise _error(response)
            async for line in response.aiter_lines():
                found = _bulk_line(line)
                if found is None:
                    return
                yield found
        raise HourglassError(response.status_code, "cut", "the stream ended before its summary")

    async def _post(self, call: _Call) -> httpx.Response:
        retries = _Retries(self._retries, self._max_wait_s)
        while True:
            response: httpx.Response | None = None
            try:
                response = await self._http.post(call.path, params=call.parameters, content=call.body)
                pause_s = retries.pause_s(response)
                if pause_s is None:
                    return response
            except httpx.ConnectError:
                pause_s = retries.pause_s(None)
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)
