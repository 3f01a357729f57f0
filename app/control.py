"""Model control over all workers: an order is done in each of them before it is answered. Knows no HTTP."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from pydantic import TypeAdapter

from app.catalog import Catalog, Wish
from app.errors import ModelNotFound, ModelUnavailable, NotReady, ServiceError
from app.fleet import Member

logger = logging.getLogger(__name__)

Wishes = dict[str, Wish]
_WISHES = TypeAdapter(Wishes)
_ANSWER_WITHIN_S = 600.0
_KINDS: dict[str, type[ServiceError]] = {kind.__name__: kind for kind in (ModelNotFound, ModelUnavailable, NotReady)}


class ModelControl:
    """Loads, unloads and rolls back models by name. Open and close it with `async with`.

    What operators want is kept for the life of the service, in the folder that its workers share: a worker that is
    replaced starts with it. Each worker takes orders on a Unix socket there.

    Args:
        catalog: this worker's.
        member: its place among the others; None if it is the only one.
    """

    def __init__(self, catalog: Catalog, member: Member | None = None) -> None:
        self._catalog = catalog
        self._member = member
        self._wishes: Wishes = {}
        self._one_order = asyncio.Lock()
        self._server: asyncio.Server | None = None

    def __repr__(self) -> str:
        return f"<ModelControl of {self._member or 'one'}>"

    async def __aenter__(self) -> Self:
        if self._member is not None:
            with _short_path(self._member, self._member.index) as path:
                _remove(path)
                self._server = await asyncio.start_unix_server(self._obey, path)
            self._catalog.start_with(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None and self._member is not None:
            self._server.close()
            with _short_path(self._member, self._member.index) as path:
                _remove(path)

    async def load(self, name: str, version: int | None = None) -> None:
        """Looks at the model's folder now and serves what is there; a refused version is tried again.

        Without a version it also ends an `unload` and a `rollback`; with one, that version is kept in memory whatever
        else there is. Raises ModelNotFound, or ModelUnavailable with the reason.
        """

        def change(wish: Wish) -> Wish:
            if version is None:
                return Wish(kept_versions=wish.kept_versions)
            kept, unloaded = wish.kept_versions | {version}, wish.unloaded_versions - {version}
            return wish.model_copy(update={"kept_versions": kept, "unloaded_versions": unloaded, "is_unloaded": False})

        await self._order(name, change)

    async def unload(self, name: str, version: int | None = None) -> None:
        """Gives the memory of a model, or of one version, back; requests in flight finish. Holds until the next `load`.

        Raises ModelNotFound.
        """
        known = {found.ref.version for found in self._catalog.models.get(name, ())}
        if version is not None and known and version not in known:
            raise ModelNotFound(f"model: {name} has the versions {', '.join(map(str, sorted(known)))}; found {version}")

        def change(wish: Wish) -> Wish:
            if version is None:
                return Wish(is_unloaded=True)
            default = None if wish.default_version == version else wish.default_version
            unloaded, kept = wish.unloaded_versions | {version}, wish.kept_versions - {version}
            update = {"unloaded_versions": unloaded, "kept_versions": kept, "default_version": default}
            return wish.model_copy(update=update)

        await self._order(name, change)

    async def rollback(self, name: str, version: int | None = None) -> int:
        """Lets an earlier version answer to the model's bare name: that one, or the highest sound one before the
        present. Holds until the next `load`. Returns the version.

        The present one answers until the other is loaded in every worker. Raises ModelNotFound or ModelUnavailable.
        """
        target = self._catalog.version_before(name) if version is None else version
        await self.load(name, target)
        await self._order(name, lambda wish: wish.model_copy(update={"default_version": target}))
        return target

    async def _order(self, name: str, change: Callable[[Wish], Wish]) -> None:
        """Changes what is wanted of a model and sees it done by every worker; taken back where one cannot."""
        if name not in self._catalog.models:
            await self._catalog.follow(self._read(), name)  # it may have come since the last look, or is none
        async with self._one_order:
            before = await asyncio.to_thread(self._change, name, change)
            try:
                await self._ask_all(name)
            except ServiceError:
                await asyncio.to_thread(self._change, name, lambda _: before)
                await asyncio.gather(self._ask_all(name), return_exceptions=True)
                raise

    async def _ask_all(self, name: str) -> None:
        own = self._catalog.follow(self._read(), name)
        if self._member is None:
            await own
            return
        others = [index for index in range(self._member.count) if index != self._member.index]
        asked = await asyncio.gather(own, *(self._ask(index, name) for index in others), return_exceptions=True)
        for answer in asked:
            if isinstance(answer, BaseException):
                raise answer

    async def _ask(self, index: int, name: str) -> None:
        """One order to one other worker. One that is not there starts with what is wanted, so it need not be told."""
        if self._member is None:
            return
        try:
            with _short_path(self._member, index) as path:
                reader, writer = await asyncio.open_unix_connection(path)
        except OSError:
            return
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                writer.write(json.dumps({"model": name}).encode() + b"\n")
                line = await reader.readline()
        except (OSError, TimeoutError) as error:
            raise NotReady(f"worker {index}: did not answer: {type(error).__name__}") from error
        finally:
            writer.close()
        if not line:
            return  # it ended meanwhile; its successor starts with what is wanted
        answer = json.loads(line)
        if answer["error"] is not None:
            raise _KINDS.get(answer["kind"], ModelUnavailable)(f"worker {index}: {answer['error']}")

    async def _obey(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one order of another worker."""
        answer: dict[str, str | None] = {"error": None}
        try:
            order = json.loads(await reader.readline())
            await self._catalog.follow(self._read(), order["model"])
        except ServiceError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except Exception as error:  # the worker that asked is told, and so is the log
            logger.exception("an order failed")
            answer = {"error": f"{type(error).__name__}: {error}", "kind": ""}
        try:
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except OSError:
            pass  # who asked is gone
        finally:
            writer.close()

    def _change(self, name: str, change: Callable[[Wish], Wish]) -> Wish:
        """Replaces what is wanted of a model, one worker at a time; returns what was."""
        if self._member is None:
            before = self._wishes.get(name, Wish())
            self._wishes = {**self._wishes, name: change(before)}
            return before
        with (self._member.folder / "wishes.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wishes = self._read()
            before = wishes.get(name, Wish())
            path = self._member.folder / "wishes.json"
            temporary = path.with_suffix(".writing")
            temporary.write_bytes(_WISHES.dump_json({**wishes, name: change(before)}))
            temporary.rename(path)
            return before

    def _read(self) -> Wishes:
        if self._member is None:
            return self._wishes
        try:
            return _WISHES.validate_json((self._member.folder / "wishes.json").read_bytes())
        except FileNotFoundError:
            return {}


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def _short_path(member: Member, index: int) -> Iterator[str]:
    """A worker's socket by a path that is short enough for one, however long the folder's is."""
    folder = os.open(member.folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{member.socket_name(index)}"
    finally:
        os.close(folder)
