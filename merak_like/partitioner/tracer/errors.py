"""What tracing says when it cannot promise that the recorded graph equals the model."""

from __future__ import annotations


class TraceError(ValueError):
    """The model does something the trace cannot record faithfully; the message says what, where and what to do."""
