"""Traces: each span is a line on the console, unless the process has a provider that sends it elsewhere."""

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

SHOWN = ("db.namespace", "fastapi_async_sqlalchemy.outcome", "error.type")
"""Attributes of a span that its line has."""


def print_spans() -> None:
    """Print the spans of this process, unless opentelemetry-instrument has set a provider."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=line)))
        trace.set_tracer_provider(provider)


def line(span: ReadableSpan) -> str:
    """Return the beginning of the trace's id, the span's duration, its name and some attributes."""
    context, attributes = span.get_span_context(), span.attributes or {}
    identity = trace.format_trace_id(context.trace_id)[:6] if context else ""
    milliseconds = ((span.end_time or 0) - (span.start_time or 0)) / 1e6
    words = [span.name, *(str(attributes[name]) for name in SHOWN if name in attributes)]
    return f"{identity} {milliseconds:8.1f} ms  {'  '.join(words)}\n"
