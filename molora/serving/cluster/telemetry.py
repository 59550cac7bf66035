"""How a process of the cluster logs, and what makes its spans, as the configuration says."""

from __future__ import annotations

import logging
from logging.config import dictConfig

from molora.serving.config import ServeConfig
from molora.serving.logs import JsonFormatter, json_logging
from molora.serving.tracing import Tracer

RAY_SERVE = "ray.serve"  # logs to standard error, and to a file that stays as it is


def start_telemetry(config: ServeConfig, **process: str) -> Tracer | None:
    """
    Args:
        process: what this one is and its name, which each line of its log then says.

    Raises:
        ValueError: OpenTelemetry is asked for and not installed.
    """
    if config.log_format == "json":
        dictConfig(json_logging(process))
        for handler in logging.getLogger(RAY_SERVE).handlers:
            if type(handler) is logging.StreamHandler:
                handler.setFormatter(JsonFormatter(process))
    return None if config.otlp_endpoint is None else Tracer.to_endpoint(config.otlp_endpoint)
