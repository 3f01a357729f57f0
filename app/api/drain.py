"""How a service leaves: not ready at once, answering for a while yet, then no more. Knows no signals and no sockets."""

from __future__ import annotations

import time


class Drain:
    """Where the service stands on its way out.

    From `begin` on it is not ready, and every answer ends its connection; from `close` on requests are refused. Both
    may be called from a signal handler, and more than once.

    Args:
        pause_s: how long requests are still answered after `begin`, for balancers to notice.
    """

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.has_begun = False
        self.is_closed = False
        self._closes_at_s = 0.0

    def __repr__(self) -> str:
        return f"<Drain {'closed' if self.is_closed else 'begun' if self.has_begun else 'not begun'}>"

    def begin(self) -> None:
        """Not ready from now on; whatever comes is still answered."""
        if not self.has_begun:
            self._closes_at_s = time.monotonic() + self.pause_s
            self.has_begun = True

    @property
    def is_over(self) -> bool:
        """Whether the pause has passed."""
        return self.has_begun and time.monotonic() >= self._closes_at_s

    def close(self) -> None:
        """Refuses what comes from now on; what is being answered is not touched."""
        self.begin()
        self.is_closed = True
