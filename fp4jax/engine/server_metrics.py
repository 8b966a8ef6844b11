"""What the HTTP server tells Prometheus."""

from collections.abc import Callable, Iterator
from typing import Any

from fp4jax.engine.engine import EngineReport
from fp4jax.engine.serve_extra import serve_extra

with serve_extra():
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
OUTCOMES = ("stop", "length", "cancelled", "refused", "queue_full", "failed")
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ServerMetrics:
    """The metrics of one server. Numbers of the engine are read when somebody asks for them.

    Args:
      report: gives what the engine has done.

    Attributes:
      requests: counts requests by `outcome`, one of `OUTCOMES`: why the answer ended ("cancelled": the client went
        away), or why there was none.
      first_token: seconds from a request to its first token.
      per_token: seconds per token behind the first one, once for every answer.
    """

    def __init__(self, report: Callable[[], EngineReport]):
        self._report = report
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "fp4jax_requests", "Requests for text, by how they ended.", ["outcome"], registry=self.registry
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome)  # so that those that never happened are 0
        self.first_token = prometheus_client.Histogram(
            "fp4jax_time_to_first_token_seconds", "Time from a request to its first token.", buckets=_FIRST_TOKEN,
            registry=self.registry,
        )  # fmt: skip
        self.per_token = prometheus_client.Histogram(
            "fp4jax_time_per_output_token_seconds", "Mean time per token behind the first, of an answer.",
            buckets=_PER_TOKEN, registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)  # pyrefly: ignore[bad-argument-type]

    def as_text(self) -> bytes:
        """Everything in the text format of Prometheus."""
        return prometheus_client.generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """The numbers of the engine; prometheus_client calls this."""
        report = self._report()
        yield CounterMetricFamily("fp4jax_prompt_tokens", "Tokens of prompts.", report.prompt_tokens)
        yield CounterMetricFamily(
            "fp4jax_shared_prompt_tokens", "Tokens of prompts that were found in pages.", report.shared_tokens
        )
        yield CounterMetricFamily("fp4jax_generated_tokens", "Tokens that were generated.", report.generated_tokens)
        yield CounterMetricFamily("fp4jax_preemptions", "Requests that had to wait again.", report.preemptions)
        yield GaugeMetricFamily("fp4jax_requests_waiting", "Requests that wait for a place.", report.waiting)
        yield GaugeMetricFamily("fp4jax_requests_running", "Requests that run.", report.running)
        yield GaugeMetricFamily("fp4jax_pages_in_use", "Pages of requests that run.", report.pages_in_use)
        yield GaugeMetricFamily("fp4jax_pages", "All pages.", report.pages)
        rate = report.shared_tokens / report.prompt_tokens if report.prompt_tokens else 0.0
        yield GaugeMetricFamily("fp4jax_prefix_hit_rate", "Share of prompt tokens that were found in pages.", rate)
