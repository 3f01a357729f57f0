"""How schemathesis writes bodies of media types that it does not know."""

from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson", "application/zip", "application/x-npy", "image/*")
def as_it_is(_context: Any, value: Any) -> bytes:
    """Generated text or bytes, sent as they are."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
