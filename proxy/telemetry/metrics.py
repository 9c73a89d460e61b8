"""The metrics of the sidecar: which families there are, which labels they carry, and bound series for the data path.

Names and labels follow Linkerd's proxy with a ``pillion_`` prefix (``process_*`` stays as everybody has it), so that dashboards carry
over. Whoever serves a connection asks for a series once (`Metrics.http`, `Metrics.tcp`, ...) and keeps it; counting is then an attribute
increment. Label values come from policy and certificates, never from request bytes: a peer cannot invent series. Pure: the clock is
passed in, and only drives the dropping of idle series.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Literal

from core.refs import Ref
from proxy.telemetry.counters import Counter, Family, Gauge, Histogram, Labels
from proxy.telemetry.prometheus import AnyFamily, Sample, exposition

Direction = Literal["inbound", "outbound"]
Tls = Literal["true", "no_identity", "opaque", "disabled"]
"""``true``: mutual TLS, both ends known. ``no_identity``: TLS or plaintext that proved nothing. ``opaque``: the app's own TLS passed
through. ``disabled``: plaintext on purpose (unmeshed peer, loopback)."""

LATENCY_MS = tuple(float(digit * scale) for scale in (1, 10, 100, 1_000, 10_000) for digit in range(1, 6))
"""Bounds of ``response_latency_ms``, Linkerd's: 1 to 5, 10 to 50, 100 to 500, 1000 to 5000, 10000 to 50000 milliseconds."""

IDLE_S = 600.0  # Linkerd drops series after ten minutes
MOST_SERIES = 2000  # for each family: some 2 MB at worst
_GRPC_FAILURES = frozenset({2, 4, 7, 13, 14, 15})  # UNKNOWN DEADLINE_EXCEEDED PERMISSION_DENIED INTERNAL UNAVAILABLE DATA_LOSS


def inbound_labels(
    tls: Tls, client_id: str = "", server: Ref | None = None, route: Ref | None = None, authorization: Ref | None = None, port: int = 0
) -> Labels:
    """Labels of traffic to the app. client_id: the verified SPIFFE URI. port: the app's, 0 when it does not matter."""
    labels = [("direction", "inbound"), ("tls", tls), ("client_id", client_id), *_ref("srv", server)]
    if port:
        labels.append(("srv_port", str(port)))
    return (*labels, *_ref("route", route), *_ref("authz", authorization))


def outbound_labels(tls: Tls, server_id: str = "", destination: Ref | None = None, port: int = 0) -> Labels:
    """Labels of traffic from the app. server_id: the identity that was demanded. destination: the Service or Pod that was dialled."""
    labels = [("direction", "outbound"), ("tls", tls), ("server_id", server_id), *_ref("dst", destination)]
    return (*labels, ("dst_port", str(port))) if port else tuple(labels)


def _ref(prefix: str, ref: Ref | None) -> Labels:
    if ref is None:
        return ()
    where: Labels = ((f"{prefix}_namespace", ref.namespace),) if ref.namespace else ()
    return ((f"{prefix}_group", ref.group), (f"{prefix}_kind", ref.kind.lower()), *where, (f"{prefix}_name", ref.name))


def classify(status: int, grpc_status: int = -1, *, cut: bool = False) -> Literal["success", "failure"]:
    """Linkerd's rule: HTTP below 500 is a success; with a gRPC status, that one decides. Status 0 (no answer) is a failure, and so is an
    answer that was cut short on the way to us. grpc_status: -1 when there is none."""
    failed = grpc_status in _GRPC_FAILURES if grpc_status >= 0 else status >= 500 or status == 0
    return "failure" if failed or cut else "success"


class HttpSeries:
    """The HTTP metrics of one label set, bound. `record.Outcome` adds to them. by_response: counters, see `response`."""

    __slots__ = ("__weakref__", "_labels", "_responses", "by_response", "latency_ms", "requests")

    def __init__(self, labels: Labels, requests: Counter, responses: Family[Counter], latency_ms: Histogram) -> None:
        self.requests = requests
        self.latency_ms = latency_ms
        self._labels = labels
        self._responses = responses
        self.by_response: dict[int, Counter] = {}

    def response(self, key: int, status: int, grpc_status: int, cut: bool) -> Counter:
        """The counter of such responses; from now on in `by_response` under ``key``, unless there are too many."""
        # a server may send any status: outside of what is defined they share one series
        shown = str(status) if 100 <= status <= 599 else "" if status == 0 else "other"
        labels: Labels = (*self._labels, ("status_code", shown), ("classification", classify(status, grpc_status, cut=cut)))
        if grpc_status >= 0:
            labels = (*labels, ("grpc_status", str(grpc_status) if 0 <= grpc_status <= 16 else "other"))
        counter = self._responses.series(labels)
        if len(self.by_response) < 64:
            self.by_response[key] = counter
        return counter


class TcpSeries:
    """The transport metrics of one label set, bound."""

    __slots__ = ("__weakref__", "closes", "open", "opens", "read_bytes", "written_bytes")

    def __init__(self, opens: Counter, now_open: Gauge, closes: Counter, read: Counter, written: Counter) -> None:
        self.opens = opens
        self.open = now_open
        self.closes = closes
        self.read_bytes = read
        self.written_bytes = written

    def opened(self) -> None:
        """A connection was accepted or established."""
        self.opens.value += 1
        self.open.value += 1

    def closed(self, read_bytes: int, written_bytes: int) -> None:
        """It ended, in whatever way. read_bytes, written_bytes: from and to the peer, without TLS."""
        self.open.value -= 1
        self.closes.value += 1
        self.read_bytes.value += read_bytes
        self.written_bytes.value += written_bytes


class Metrics:
    """All metrics of a sidecar. now: seconds, from any origin that does not go back."""

    def __init__(self, now: Callable[[], float], *, idle_s: float = IDLE_S, most_series: int = MOST_SERIES) -> None:
        self._now = now
        self._idle_s = idle_s
        self._most = most_series
        self._families: list[AnyFamily] = []
        self._sources: list[Callable[[], Iterable[Sample]]] = []
        self._http: weakref.WeakValueDictionary[Labels, HttpSeries] = weakref.WeakValueDictionary()
        self._tcp: weakref.WeakValueDictionary[Labels, TcpSeries] = weakref.WeakValueDictionary()
        self._requests = self._counters("request_total", "Requests received, by who asked and what decided.")
        self._responses = self._counters("response_total", "Exchanges ended, by what the client saw.")
        histograms = max(1, most_series // 4)  # one takes 27 lines
        self._latency: Family[Histogram] = Family(
            "pillion_response_latency_ms", "From request to end of response.", lambda: Histogram(LATENCY_MS), now, histograms, idle_s
        )
        self._families.append(self._latency)
        self._http_authz = {
            "allow": self._counters("inbound_http_authz_allow_total", "Requests that a policy let in."),
            "deny": self._counters("inbound_http_authz_deny_total", "Requests that no policy let in."),
            "terminate": self._counters("inbound_http_authz_terminate_total", "Tunnels cut because they lost their permit."),
        }
        self._tcp_authz = {
            "allow": self._counters("inbound_tcp_authz_allow_total", "Connections that a policy let in."),
            "deny": self._counters("inbound_tcp_authz_deny_total", "Connections that no policy let in."),
            "terminate": self._counters("inbound_tcp_authz_terminate_total", "Connections cut because they lost their permit."),
        }
        self._no_route = self._counters("inbound_http_route_not_found_total", "Requests that matched no route of their Server.")
        self._errors = self._counters("errors_total", "What the proxy refused or failed, by cause.")
        self._retries = self._counters("retries_total", "Requests sent again: nobody had acted on them, or a route says so.")
        self._opens = self._counters("tcp_open_total", "Connections opened.")
        self._open = self._gauges("tcp_open_connections", "Connections open now.")
        self._closes = self._counters("tcp_close_total", "Connections closed.")
        self._read = self._counters("tcp_read_bytes_total", "Bytes read from peers.")
        self._written = self._counters("tcp_write_bytes_total", "Bytes written to peers.")
        forever = math.inf  # renewals are hours apart: these few series must not start again at 0
        self._expiry = self._gauges("identity_cert_expiration_timestamp_seconds", "When our certificate expires.")
        self._refreshed_at = self._gauges("identity_cert_refresh_timestamp_seconds", "When our certificate was renewed last.")
        self._refreshes = self._counters("identity_cert_refreshes_total", "Certificates received.", forever)
        self._refresh_failures = self._counters(
            "identity_cert_refresh_failures_total", "Attempts to be certified that failed, by reason.", forever
        )
        self._error_counters: dict[tuple[str, str], Counter] = {}

    # --- bound series ------------------------------------------------------------------------------------------------------------

    def http(self, labels: Labels) -> HttpSeries:
        """The HTTP series of these labels; the same object while somebody holds it."""
        series = self._http.get(labels)
        if series is None:
            series = HttpSeries(labels, self._requests.series(labels), self._responses, self._latency.series(labels))
            self._http[labels] = series
        return series

    def tcp(self, labels: Labels) -> TcpSeries:
        """The transport series of these labels; the same object while somebody holds it."""
        series = self._tcp.get(labels)
        if series is None:
            read, written = self._read.series(labels), self._written.series(labels)
            series = TcpSeries(self._opens.series(labels), self._open.series(labels), self._closes.series(labels), read, written)
            self._tcp[labels] = series
        return series

    def http_authz(self, verdict: Literal["allow", "deny", "terminate"], labels: Labels) -> Counter:
        """Counts decisions about requests; add 1 to its ``value``."""
        return self._http_authz[verdict].series(labels)

    def tcp_authz(self, verdict: Literal["allow", "deny", "terminate"], labels: Labels) -> Counter:
        """Counts decisions about connections; add 1 to its ``value``."""
        return self._tcp_authz[verdict].series(labels)

    def route_not_found(self, labels: Labels) -> Counter:
        """Counts requests without a route; add 1 to its ``value``."""
        return self._no_route.series(labels)

    # --- single events -----------------------------------------------------------------------------------------------------------

    def error(self, direction: Direction, cause: str) -> None:
        """Something was refused or failed. cause: ``Cause.value`` of proxy.rescue."""
        counter = self._error_counters.get((direction, cause))
        if counter is None:
            counter = self._errors.series((("direction", direction), ("error", cause)))
            self._error_counters[direction, cause] = counter
        counter.value += 1

    def retry(self, direction: Direction, cause: str) -> None:
        """A request is sent again. cause: ``Cause.value`` of what kept it from being answered."""
        self._retries.series((("direction", direction), ("error", cause))).value += 1

    def certified(self, expires_at: float, refreshed_at: float) -> None:
        """A certificate arrived; both times in seconds since the epoch."""
        self._expiry.series(()).value = expires_at
        self._refreshed_at.series(()).value = refreshed_at
        self._refreshes.series(()).value += 1

    def certification_failed(self, reason: str) -> None:
        """An attempt failed. reason: a stable word."""
        self._refresh_failures.series((("reason", reason),)).value += 1

    # --- export ------------------------------------------------------------------------------------------------------------------

    def add_source(self, source: Callable[[], Iterable[Sample]]) -> None:
        """Ask ``source`` for samples at every `render`: process figures, build information, sizes of pools."""
        self._sources.append(source)

    def render(self) -> bytes:
        """The text exposition; also drops idle series."""
        for family in self._families:
            family.sweep()
        return exposition(self._families, (sample for source in self._sources for sample in source()))

    def _counters(self, name: str, about: str, idle_s: float | None = None) -> Family[Counter]:
        family = Family(f"pillion_{name}", about, Counter, self._now, self._most, self._idle_s if idle_s is None else idle_s)
        self._families.append(family)
        return family

    def _gauges(self, name: str, about: str) -> Family[Gauge]:
        family = Family(f"pillion_{name}", about, Gauge, self._now, self._most, self._idle_s)
        self._families.append(family)
        return family


def build_info(version: str, python: str) -> Sample:
    """``pillion_proxy_build_info``: always 1; what runs is in the labels."""
    return Sample("pillion_proxy_build_info", "gauge", "What runs here.", 1, (("version", version), ("python", python)))


def process_samples(
    cpu_s: float, resident_bytes: int, virtual_bytes: int, open_fds: int, max_fds: int, threads: int, start_time_s: float
) -> list[Sample]:
    """``process_*`` from the fields of core.runtime.process.ProcessFigures, in their order."""
    return [
        Sample("process_cpu_seconds_total", "counter", "User and system CPU time.", cpu_s),
        Sample("process_resident_memory_bytes", "gauge", "Resident memory.", resident_bytes),
        Sample("process_virtual_memory_bytes", "gauge", "Virtual memory.", virtual_bytes),
        Sample("process_open_fds", "gauge", "Open file descriptors.", open_fds),
        Sample("process_max_fds", "gauge", "Most file descriptors that may be open.", max_fds),
        Sample("process_threads", "gauge", "Threads.", threads),
        Sample("process_start_time_seconds", "gauge", "When the process started, since the epoch.", start_time_s),
    ]
