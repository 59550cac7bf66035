"""The server's log as lines of JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from molora.serving.request_log import served


class JsonFormatter(logging.Formatter):
    """`time`, `level`, `logger`, `message`; `request_id` where one is answered, and `exception` if there is one."""

    def __init__(self, process: Mapping[str, str] | None = None) -> None:
        """
        Args:
            process: fields of every line, which say what process it is from.
        """
        super().__init__()
        self._process = dict(process or {})

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
        }
        if (request := served.get()) is not None:
            line["request_id"] = request.id
        line |= getattr(record, "request", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def json_logging(process: Mapping[str, str] | None = None) -> dict[str, Any]:
    """For `logging.config.dictConfig`: to standard error, warnings of all, and of ours also a line for each request.

    Args:
        process: as of `JsonFormatter`.
    """
    to_stderr = {"handlers": ["stderr"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter, "process": process}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "loggers": {"molora": to_stderr | {"level": "INFO"}, "uvicorn": to_stderr | {"level": "WARNING"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
    }
