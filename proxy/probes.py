"""Performs an app's own probes for the kubelet, so that no path of the app has to be opened to unmeshed callers.

The injector points each probe at the admin port and gives us the original (PILLION_PROBES). We dial the pod's own address, as the
kubelet would have, and answer only whether the probe succeeded. Nothing of the app's answer is passed on, and where we dial is never
taken from the caller. Called by proxy.app, which mounts `ProbeRunner.handle` under ``/pillion-probe/`` of the admin port.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import h11
import trio

from core.runtime import logs
from core.runtime.admin import Request, Response, text_response
from proxy.protocol.grpc_health import HealthCheck, NotHealthy

if TYPE_CHECKING:
    import ssl

_log = logs.logger("probes")

PREFIX = "/pillion-probe/"

FAILED = "failed: "
"""How the answer to a failed probe begins; local.probing reads it."""
_REDIRECTS_MAX = 10  # kubelet's
_HEAD_BYTES_MAX = 64 << 10
_TIMEOUT_S = (0.1, 300.0)
_AGAIN_S = (0.02, 0.1)  # the first pause, and the longest
_LAST_S = 0.01  # before the end of a probe's time an app is dialled for the last time
_TELL_S = 1.0  # between two lines about one probe: any pod may ask, as often as it likes


class InvalidProbe(ValueError):
    """A probe in PILLION_PROBES that cannot be performed; the text names it and what is wrong."""


class ProbeFailed(Exception):
    """The app did not pass; the text says why in a few words of ours."""


@dataclass(frozen=True)
class Probe:
    """An original probe. headers: of an httpGet, names as given. service: of a grpc probe. timeout_s: for the whole attempt.

    patient: an app that does not listen yet has until the timeout to do so. A kubelet would ask again after a whole period, so that a pod
    is Ready up to a period after its app. Not for liveness: what stopped listening must be noticed at once.
    """

    kind: Literal["httpGet", "tcpSocket", "grpc"]
    port: int
    timeout_s: float
    path: str = "/"
    scheme: Literal["HTTP", "HTTPS"] = "HTTP"
    host: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    service: str = ""
    patient: bool = False


def read_probes(declared: Mapping[str, Any]) -> dict[str, Probe]:
    """Check PILLION_PROBES: admin path -> probe. Raises InvalidProbe."""
    return {path: _read_probe(path, spec) for path, spec in declared.items()}


def _read_probe(path: str, spec: object) -> Probe:
    def wrong(what: str) -> InvalidProbe:
        return InvalidProbe(f"probe {path!r}: {what}")

    if not path.startswith(PREFIX) or not isinstance(spec, dict):
        raise wrong(f"expected an object under a path that begins with {PREFIX}")
    kinds = [kind for kind in ("httpGet", "tcpSocket", "grpc") if kind in spec]
    if len(kinds) != 1 or not isinstance(spec[kinds[0]], dict):
        raise wrong("expected exactly one of httpGet, tcpSocket and grpc")
    action = spec[kinds[0]]
    port, timeout_s = action.get("port"), spec.get("timeoutSeconds", 1)
    if type(port) is not int or not 0 < port < 65536:
        raise wrong("port: expected a number from 1 to 65535 (the injector resolves names)")
    if type(timeout_s) not in (int, float) or not _TIMEOUT_S[0] <= timeout_s <= _TIMEOUT_S[1]:
        raise wrong(f"timeoutSeconds: expected a number from {_TIMEOUT_S[0]} to {_TIMEOUT_S[1]:.0f}")
    patient = not path.endswith("/livenessProbe")
    if kinds[0] == "tcpSocket":
        return Probe("tcpSocket", port, timeout_s, patient=patient)
    if kinds[0] == "grpc":
        service = action.get("service") or ""
        if not isinstance(service, str):
            raise wrong("grpc.service: expected text")
        return Probe("grpc", port, timeout_s, service=service, patient=patient)
    scheme: Literal["HTTP", "HTTPS"] = action.get("scheme") or "HTTP"
    if scheme not in ("HTTP", "HTTPS"):
        raise wrong("httpGet.scheme: expected HTTP or HTTPS")
    target, host = action.get("path") or "/", action.get("host") or ""
    try:
        headers = tuple((field["name"], field["value"]) for field in action.get("httpHeaders") or ())
        target = target if target.startswith("/") else "/" + target
        probe = Probe("httpGet", port, timeout_s, target, scheme, host, headers, patient=patient)
        _request_bytes(probe, probe.path, "127.0.0.1")
    except (AttributeError, KeyError, TypeError, UnicodeError, h11.LocalProtocolError) as error:
        raise wrong(f"httpGet: not a request that can be sent ({error})") from None
    return probe


class _Attempt:
    """A probe that is being performed, for all who ask meanwhile. answer: None when whoever began it was cut."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.answer: Response | None = None


class ProbeRunner:
    """Performs the declared probes against one address of the pod. ip: the pod's own, which apps listen on; never loopback.

    The admin port answers every pod: whoever asks while a probe is performed gets its result, so that strangers cost the app no more than
    the kubelet alone, and do not stand in a queue before it. Of a failure the kubelet tells its status alone, so the log says why.
    """

    def __init__(self, probes: Mapping[str, Probe], ip: str) -> None:
        self._probes = dict(probes)
        self._ip = ip
        self._attempts: dict[str, _Attempt] = {}
        self._told: dict[str, tuple[str, float]] = {}

    async def handle(self, request: Request) -> Response:
        """200 ``ok``, or 503 with the reason; 404 for a path that no probe was declared for."""
        probe = self._probes.get(request.path)
        if probe is None:
            return text_response("no such probe", 404)
        while (other := self._attempts.get(request.path)) is not None:
            await other.over.wait()
            if other.answer is not None:
                return other.answer
        attempt = self._attempts[request.path] = _Attempt()
        try:
            attempt.answer = await self._asked(request.path, probe)
            return attempt.answer
        finally:
            del self._attempts[request.path]
            attempt.over.set()

    async def _asked(self, path: str, probe: Probe) -> Response:
        try:
            await perform(probe, self._ip)
        except ProbeFailed as failure:
            self._tell(path, str(failure))
            return text_response(f"{FAILED}{failure}", 503)
        self._tell(path, "")
        return text_response("ok")

    def _tell(self, path: str, why: str) -> None:
        """Log a probe that begins to fail, fails for another reason, or passes again."""
        before, when = self._told.get(path, ("", float("-inf")))
        now = trio.current_time()
        if why == before or now - when < _TELL_S:
            return
        self._told[path] = why, now
        name = path.removeprefix(PREFIX)
        if why:
            _log.info("probe failed", probe=name, reason=why)
        else:
            _log.info("probe passed", probe=name)


async def perform(probe: Probe, ip: str) -> None:
    """Run one probe; raises ProbeFailed. Takes at most ``probe.timeout_s``."""
    try:
        with trio.fail_after(probe.timeout_s):
            if probe.kind == "grpc":
                await _grpc(probe, ip)
            elif probe.kind == "httpGet":
                await _http(probe, ip)
            else:
                await trio.aclose_forcefully(await _dial(probe, ip))
    except trio.TooSlowError:
        raise ProbeFailed(f"no result within {probe.timeout_s:g} s") from None
    except NotHealthy as error:
        raise ProbeFailed(str(error)) from None
    except (h11.ProtocolError, UnicodeError):  # ours, too: a redirect to something that is no request target
        raise ProbeFailed("the answer is not HTTP/1.1") from None
    except trio.BrokenResourceError:
        raise ProbeFailed("the connection broke") from None
    except OSError:
        raise ProbeFailed(f"port {probe.port} cannot be connected to") from None


async def _dial(probe: Probe, ip: str) -> trio.SocketStream:
    pause_s, longest_s = _AGAIN_S
    while True:
        try:
            return await trio.open_tcp_stream(ip, probe.port)
        except OSError:
            left_s = trio.current_effective_deadline() - trio.current_time()
            if not probe.patient or left_s < 2 * _LAST_S:
                raise  # just before the time is over, which would not say that nobody listens
            await trio.sleep(min(pause_s, left_s - _LAST_S))
            pause_s = min(2 * pause_s, longest_s)


async def _http(probe: Probe, ip: str) -> None:
    """GET, following redirects to the same place as the kubelet does; success is 200 to 399, a redirect elsewhere included."""
    path = probe.path
    for _ in range(_REDIRECTS_MAX + 1):
        response = await _get(probe, path, ip)
        location = next((value.decode("latin-1") for name, value in response.headers if name == b"location"), "")
        if not 200 <= response.status_code < 400:
            raise ProbeFailed(f"status {response.status_code}")
        target = urllib.parse.urlsplit(urllib.parse.urljoin(path, location)) if location else None
        elsewhere = target is None or target.netloc not in ("", _authority(probe, ip))
        if response.status_code not in (301, 302, 303, 307, 308) or target is None or elsewhere:
            return
        path = urllib.parse.urlunsplit(("", "", target.path or "/", target.query, ""))
    raise ProbeFailed(f"more than {_REDIRECTS_MAX} redirects")


async def _get(probe: Probe, path: str, ip: str) -> h11.Response:
    connection, request = _request_bytes(probe, path, ip)
    stream: trio.abc.Stream = await _dial(probe, ip)
    if probe.scheme == "HTTPS":
        stream = trio.SSLStream(stream, _unverified(), server_hostname=probe.host or None, https_compatible=True)
    try:
        await stream.send_all(request)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                return event
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(16384)))
            elif not isinstance(event, h11.InformationalResponse):
                raise ProbeFailed("the app closed the connection without an answer")
    finally:
        await trio.aclose_forcefully(stream)


def _request_bytes(probe: Probe, path: str, ip: str) -> tuple[h11.Connection, bytes]:
    given = {name.lower(): value for name, value in probe.headers}
    headers = [("host", given.pop("host", "") or _authority(probe, ip))]
    headers += [("user-agent", given.pop("user-agent", "kube-probe")), ("accept", given.pop("accept", "*/*")), ("connection", "close")]
    headers += [(name, value) for name, value in probe.headers if name.lower() in given]
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)
    request = h11.Request(method="GET", target=path, headers=headers)
    return connection, (connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b"")


def _authority(probe: Probe, ip: str) -> str:
    return f"{probe.host or (f'[{ip}]' if ':' in ip else ip)}:{probe.port}"


def _unverified() -> ssl.SSLContext:
    """As the kubelet does: a probe's certificate is not checked, because it is addressed by IP and proves nothing but liveness."""
    import ssl  # the system's OpenSSL, which nothing else of a sidecar needs (core.runtime.lean)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _grpc(probe: Probe, ip: str) -> None:
    check = HealthCheck(_authority(probe, ip), probe.service)
    stream = await _dial(probe, ip)
    try:
        await stream.send_all(check.request)
        while not check.done:
            data = await stream.receive_some(16384)
            if not data:
                check.ended()
            if answer := check.received_untrusted(bytes(data)):
                await stream.send_all(answer)
    finally:
        await trio.aclose_forcefully(stream)
