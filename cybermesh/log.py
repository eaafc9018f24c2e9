"""Structured logs: constant event names with fields, on stderr; a terminal reads text, a machine JSON lines.

Secrets never get here: keys are redacted by name as the last line of defence, and no caller passes one.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

_SECRET_WORDS = ("password", "secret", "token", "private", "seed", "signing_key")


def _redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for name in event:
        if any(word in name.lower() for word in _SECRET_WORDS):
            event[name] = "***"
    return event


def configure(*, level: str = "info", json: bool = False, stream: TextIO | None = None) -> None:
    """Set up logging for the process; the last call holds."""
    out = stream if stream is not None else sys.stderr
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=out.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # The stream of the moment when a logger is made: stderr may be another one by then, and this one closed.
        logger_factory=lambda *_names: structlog.PrintLogger(stream if stream is not None else sys.stderr),
        cache_logger_on_first_use=False,
    )


def logger(**fields: object) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose every line carries ``fields`` (role, node)."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger().bind(**fields)
    return bound
