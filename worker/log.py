"""The log of a worker and its supervisor."""

import sys

import structlog


def configure_log() -> None:
    """Lines for people, with plain tracebacks: structlog's own would show local variables, prompts among them."""
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], renderer])
