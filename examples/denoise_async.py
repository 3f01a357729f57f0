"""Denoises a picture by asyncio: python examples/denoise_async.py, with the service on 127.0.0.1:8000."""

import asyncio
from pathlib import Path

from PIL import Image

from hourglass_client import AsyncClient


async def main() -> None:
    """Writes clean.png beside where it was started."""
    async with AsyncClient() as client:
        (clean,) = await client.denoise([Path(__file__).parent / "digit-noisy.png"])
    Image.fromarray((clean[0] * 255).round().clip(0, 255).astype("uint8")).save("clean.png")


asyncio.run(main())
