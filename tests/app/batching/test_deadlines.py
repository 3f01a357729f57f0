"""Many deadlines on one timer."""

from __future__ import annotations

import asyncio

from app.batching.deadlines import Deadlines


def test_each_expires_once_and_about_its_time() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        expired: list[tuple[int, float]] = []
        deadlines: Deadlines[int] = Deadlines(lambda key: expired.append((key, loop.time())))
        start = loop.time()
        delays = {0: 0.05, 1: 0.01, 2: 0.03, 3: 5.0, 4: 0.03}
        for key, delay in delays.items():
            deadlines.add(key, start + delay)
        deadlines.discard(4)
        deadlines.discard(99)
        await asyncio.sleep(0.2)
        assert [key for key, _ in expired] == [1, 2, 0]
        assert all(at - start >= delays[key] - 0.002 for key, at in expired)
        deadlines.close()

    asyncio.run(scenario())


def test_a_nearer_one_is_not_kept_waiting_by_a_farther_one() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        first: asyncio.Future[str] = loop.create_future()
        deadlines: Deadlines[str] = Deadlines(lambda key: first.done() or first.set_result(key))
        deadlines.add("far", loop.time() + 60)
        deadlines.add("near", loop.time() + 0.01)
        assert await asyncio.wait_for(first, 10) == "near"
        assert "1" in repr(deadlines)
        deadlines.close()

    asyncio.run(scenario())


def test_expiring_may_discard_others() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        expired: list[str] = []

        def expire(key: str) -> None:
            expired.append(key)
            deadlines.discard("later")

        deadlines: Deadlines[str] = Deadlines(expire)
        deadlines.add("soon", loop.time() + 0.01)
        deadlines.add("later", loop.time() + 0.05)
        await asyncio.sleep(0.1)
        assert expired == ["soon"]

    asyncio.run(scenario())
