"""The exception whose message is sent to the client."""

from __future__ import annotations

__all__ = ["RequestError"]


class RequestError(Exception):
    """Raised for a request that cannot be answered.

    Args:
        status: the HTTP status, such as 404.
        message: what is wrong and what to do, for the client. It never contains a path of the server.
        retry_after: the number of seconds after which the client may try again (only with status 503).
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(status, message, retry_after)
        self.status, self.message, self.retry_after = status, message, retry_after
