"""How every process writes its log: to standard output, one JSON object per line, or lines for people on a terminal."""

import json
import logging
import sys
from typing import Any, Final, Literal

import structlog
from structlog.types import Processor

LogFormat = Literal["auto", "json", "text"]
_CHATTY: Final = ("uvicorn",)  # servers that tell of start and stop; libraries are heard from warnings on


_encode: Final = json.JSONEncoder(default=repr).encode


def _as_json(line: Any, **_: Any) -> str:
    """`json.dumps` would make an encoder for every line."""
    return _encode(line)


def configure_log(form: LogFormat = "auto") -> None:
    """`auto`: text where standard output is a terminal, else JSON. The standard library's loggers write the same way.

    Tracebacks are plain ones: structlog's own would show local variables, prompts among them.
    """
    as_text = form == "text" or (form == "auto" and sys.stdout.isatty())
    facts: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if as_text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_as_json)]
    )
    structlog.configure(
        processors=[*facts, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
            foreign_pre_chain=facts,
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.INFO)
