"""OpenTelemetry traces: a span for each request, and in it one for each answer's wait, its prompt and its tokens.

All but the first are made when a request has ended, from what is known of it then. Nothing of what it said is in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import molora
from molora.serving.request_log import Served

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVER_ERROR = 500
EXPORT_S = 5.0  # that a collector may take, which the server's end waits for


class Tracer:
    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("molora", molora.__version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_endpoint(cls, url: str) -> Tracer:
        """Sends spans, in batches, by OTLP over HTTP.

        Args:
            url: of the collector, such as http://localhost:4318/v1/traces.

        Raises:
            ValueError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(f"otlp_endpoint needs OpenTelemetry ({error}): pip install 'molora[otel]'.") from None
        provider = TracerProvider(resource=Resource.create({"service.name": "molora"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_S)))
        return cls(provider)

    def begin(self, request: Served, headers: Iterable[tuple[bytes, bytes]]) -> Span:
        """
        Args:
            headers: whose `traceparent`, if there is one, the span belongs to.
        """
        from opentelemetry.trace import SpanKind

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name in _TRACE_HEADERS}
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(
            request.method, context=context, kind=SpanKind.SERVER, start_time=request.begun_ns
        )

    def headers(self, span: Span) -> dict[bytes, bytes]:
        """By which the spans of another process belong to this one."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return {name.encode(): value.encode("latin-1") for name, value in carrier.items()}

    def end(self, request: Served) -> None:
        """Of the span that began with the request."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        span = request.span
        assert span is not None
        span.update_name(f"{request.method} {request.path}")
        span.set_attributes(attributes(request))
        if request.status is not None and request.status >= SERVER_ERROR:
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for end_ns, queue_s, first_token_s, total_s in request.times:
            times_ns = [end_ns - int(1e9 * (total_s - seconds)) for seconds in (0.0, queue_s, first_token_s, total_s)]
            for index, name in enumerate(("queued", "prefill", "decode")):
                part = self._tracer.start_span(name, context=inside, start_time=times_ns[index])
                part.end(times_ns[index + 1])
        span.end(request.begun_ns + int(1e6 * request.duration_ms))

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


_TRACE_HEADERS = (b"traceparent", b"tracestate")


def attributes(request: Served) -> dict[str, Any]:
    """Under OpenTelemetry's names, where it has some."""
    found: dict[str, Any] = {
        "http.request.method": request.method,
        "http.route": request.path,
        "molora.request_id": request.id,
    }
    if request.status is not None:
        found["http.response.status_code"] = request.status
    if request.usage is not None:
        found |= {
            "gen_ai.usage.input_tokens": request.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": request.usage.completion_tokens,
            "molora.cached_tokens": request.usage.prompt_tokens_details.cached_tokens,
        }
    if request.ends:
        found["gen_ai.response.finish_reasons"] = request.ends
    return found
