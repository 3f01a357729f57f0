"""What can go wrong, in the project's words. Knows no status codes: those stand in `app/api/errors.py`."""

from __future__ import annotations


class ServiceError(Exception):
    """Anything that a caller is told about. The message names the thing, the found and the expected."""


class InvalidInput(ServiceError):
    """The request was read, but an item in it is not acceptable."""


class ShapeMismatch(InvalidInput):
    """An item has another shape than the model's input."""


class InvalidParameter(ServiceError):
    """A query parameter, a header or a field beside the items is unknown or out of range."""


class NotFound(ServiceError):
    """There is nothing at this address."""


class MethodNotAllowed(ServiceError):
    """The address exists, but does not take this HTTP method."""


class Unauthorized(ServiceError):
    """The request needs a key and has none, or one that nobody knows."""


class Forbidden(ServiceError):
    """The key is known but not for this."""


class AdminDisabled(ServiceError):
    """There are no keys, so nobody may administer."""


class ModelNotFound(ServiceError):
    """No artifact of this name, or no such version of it."""


class CapabilityNotSupported(ServiceError):
    """The model exists but cannot do what was asked."""


class NotAcceptable(ServiceError):
    """The answer cannot be given in any media type that the caller accepts."""


class PayloadTooLarge(ServiceError):
    """The body, a picture in it or its number of items exceeds a limit."""


class UnsupportedMediaType(ServiceError):
    """The body's media type or encoding is none that the route reads."""


class MalformedPayload(ServiceError):
    """The bytes are not what they claim to be."""


class ImageNotDecodable(MalformedPayload):
    """The bytes are no picture of a format that the service reads, or a damaged one."""


class InferenceFailed(ServiceError):
    """The model raised, or gave a number that is not finite, for one item of the request."""


class Unavailable(ServiceError):
    """The service cannot answer now and may later.

    Args:
        retry_after_s: when a new attempt is worth it, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Unavailable):
    """As many rows wait as may."""


class NotReady(Unavailable):
    """The model is still being loaded."""


class ModelUnavailable(Unavailable):
    """The artifact exists but was refused; the message says why."""


class NoModels(Unavailable):
    """The store holds no artifact that could be served."""


class Draining(Unavailable):
    """The service is shutting down."""


class DeviceLost(Unavailable):
    """The device can run nothing any more, in this process; another one may."""


class DeadlineExceeded(ServiceError):
    """The request's time ran out before its answer was there."""


class ArtifactRefused(Exception):
    """An artifact is not what its manifest says, or its manifest is none. The message names file and field."""


class OutOfMemory(Exception):
    """The device has no room for a batch; a smaller one may fit."""
