"""What the engine reports as failed, as the exception that the caller of the request gets."""

from __future__ import annotations

import logging

from segue.engine.messages import Failed
from segue.errors import InternalError, OverloadedError, SegueError, StatusCode, error_class

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = 1.0


def error_of_failure(failed: Failed) -> SegueError:
    """The exception whose reason the engine named. What it did not foresee is logged and told as InternalError."""
    cls = error_class(failed.reason, StatusCode.INTERNAL)
    if cls is InternalError:
        _LOG.error("the engine failed a request: %s: %s", failed.reason, failed.message)
        return InternalError("internal error")
    if cls is OverloadedError:
        known = failed.retry_after_seconds
        return OverloadedError(failed.message, retry_after_seconds=_RETRY_AFTER_SECONDS if known is None else known)
    return cls(failed.message)
