"""The API between the policy controller and a sidecar: one JSON object per line over mutual TLS, in both directions.

The sidecar says which of its own ports and which dialled addresses it is interested in; the controller answers with full state for each
and again with full state for whatever changes. There are no deltas: a message replaces what was known of its subject, so that a
reconnect needs no reconciliation (the sidecar repeats its interests; what it knew keeps serving until then).

Only values live here. Evaluation is policy.match and policy.authorize; production is policy.index.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from core.refs import Ref

Protocol = Literal["detect", "http1", "http2", "grpc", "opaque", "tls"]
"""What a port speaks. ``detect``: look at the first bytes. ``tls``: the app's own TLS, passed through untouched."""


class Network(msgspec.Struct, frozen=True):
    """Addresses inside ``cidr`` that are in none of ``excluded`` (NetworkAuthentication.spec.networks[])."""

    cidr: str
    excluded: tuple[str, ...] = ()


class Anyone(msgspec.Struct, frozen=True, tag="anyone"):
    """No identity is needed."""


class Meshed(msgspec.Struct, frozen=True, tag="meshed"):
    """A verified workload identity is needed.

    identities: SPIFFE URIs; ``*`` alone means every identity of the trust domain, and a pattern that ends in ``/*`` every identity
    that starts with what stands before the star. Empty matches nobody.
    """

    identities: tuple[str, ...]


class Authorization(msgspec.Struct, frozen=True):
    """One way to be let in: from one of the networks *and* authenticated so. Lists of these are OR-ed.

    ref: the AuthorizationPolicy (or ``default_ref(name)``) that grants. audit: lets in, but logs and counts as ``audit``.
    """

    ref: Ref
    networks: tuple[Network, ...]
    authentication: Anyone | Meshed
    audit: bool = False


class PathMatch(msgspec.Struct, frozen=True):
    """HTTPRouteMatch.path; ``value`` of an Exact or PathPrefix match is already in the RFC 3986 normal form."""

    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: str


class ValueMatch(msgspec.Struct, frozen=True):
    """A header (name in lower case) or query parameter (name as given) and the value it must have."""

    type: Literal["Exact", "RegularExpression"]
    name: str
    value: str


class HttpMatch(msgspec.Struct, frozen=True, tag_field="kind", tag="http"):
    """HTTPRouteMatch: every part must hold; ``method`` None matches all."""

    path: PathMatch = PathMatch("PathPrefix", "/")
    headers: tuple[ValueMatch, ...] = ()
    query: tuple[ValueMatch, ...] = ()
    method: str | None = None


class GrpcMatch(msgspec.Struct, frozen=True, tag_field="kind", tag="grpc"):
    """GRPCRouteMatch: ``service`` and ``method`` None match all; regular expressions cover the whole name."""

    type: Literal["Exact", "RegularExpression"] = "Exact"
    service: str | None = None
    method: str | None = None
    headers: tuple[ValueMatch, ...] = ()


class Rule(msgspec.Struct, frozen=True):
    """One rule of a route: any of ``matches`` (an empty tuple matches everything)."""

    matches: tuple[HttpMatch | GrpcMatch, ...] = ()
    name: str | None = None


class Route(msgspec.Struct, frozen=True):
    """An accepted HTTPRoute or GRPCRoute of a Server.

    hostnames: lower case, ``*.suffix`` allowed, empty = all. authorizations: everything that may let a request of this route in,
    with `AuthorizationPolicy.spec.inherit` already applied by the controller, so evaluation is a plain OR.
    """

    ref: Ref
    kind: Literal["http", "grpc"]
    hostnames: tuple[str, ...]
    rules: tuple[Rule, ...]
    authorizations: tuple[Authorization, ...]


class InboundPolicy(msgspec.Struct, frozen=True):
    """Everything a sidecar needs to know to accept on one port.

    server: the Server that took over the port, or ``default_ref(<default policy>)``.
    routes: oldest first, then by namespace/name: the order that breaks ties. Empty = no routes: ``authorizations`` decide alone.
    check_paths: refuse request targets with two readings (400); off only by the port's own opt-out.
    """

    server: Ref
    protocol: Protocol
    authorizations: tuple[Authorization, ...]
    routes: tuple[Route, ...] = ()
    check_paths: bool = True


class Endpoint(msgspec.Struct, frozen=True):
    """A ready address behind a destination. identity: the SPIFFE URI to demand, None when the pod is not meshed (plaintext)."""

    addr: str
    identity: str | None = None
    pod: Ref | None = None


class FieldEdit(msgspec.Struct, frozen=True):
    """Gateway API RequestHeaderModifier or ResponseHeaderModifier: ``remove`` (lower case, those that are set included), then ``add``
    appended, name and value."""

    remove: tuple[str, ...] = ()
    add: tuple[tuple[str, str], ...] = ()


class Rewrite(msgspec.Struct, frozen=True):
    """Gateway API URLRewrite. hostname: "" leaves the Host as it is. path: None leaves it; prefix: what of it ``path`` replaces, None =
    all of it."""

    hostname: str = ""
    path: str | None = None
    prefix: str | None = None


class Share(msgspec.Struct, frozen=True):
    """One backendRef of a rule. backend: position in `Destination.backends`. weight: 0 takes nothing. edit, response, rewrite: as in
    `Action`, for this backend."""

    backend: int
    weight: int = 1
    edit: FieldEdit | None = None
    response: FieldEdit | None = None
    rewrite: Rewrite | None = None


class Redirect(msgspec.Struct, frozen=True):
    """Gateway API RequestRedirect. Empty and None: as in the request. path: None = the request's; prefix: what of it ``path`` replaces,
    None = all of it."""

    status: int = 302
    scheme: str = ""
    hostname: str = ""
    port: int | None = None
    path: str | None = None
    prefix: str | None = None


class Timeouts(msgspec.Struct, frozen=True):
    """Gateway API timeouts of a rule, 0 = none. request_s: the whole exchange. attempt_s: each time it is sent to a backend."""

    request_s: float = 0.0
    attempt_s: float = 0.0


class Retry(msgspec.Struct, frozen=True):
    """Gateway API retry of a rule. codes: statuses after which a request is sent again; one without any answer always is. attempts: retries
    at most, the first attempt not counted. backoff_s: the shortest pause before a retry."""

    codes: tuple[int, ...] = ()
    attempts: int = 1
    backoff_s: float = 0.025


class Action(msgspec.Struct, frozen=True):
    """What becomes of the requests of a rule: a redirect, or a share each for its backends. A rule with neither answers 500.

    edit: of request heads, before that of the share. response: of heads of answers, after that of the share. rewrite: where the share
    has none of its own.
    """

    shares: tuple[Share, ...] = ()
    edit: FieldEdit | None = None
    redirect: Redirect | None = None
    timeouts: Timeouts | None = None
    retry: Retry | None = None
    response: FieldEdit | None = None
    rewrite: Rewrite | None = None


class ServiceRoute(msgspec.Struct, frozen=True):
    """An accepted HTTPRoute or GRPCRoute of a Service. actions: one for each of ``rules``. hostnames as in `Route`."""

    ref: Ref
    kind: Literal["http", "grpc"]
    hostnames: tuple[str, ...]
    rules: tuple[Rule, ...]
    actions: tuple[Action, ...]


class Backend(msgspec.Struct, frozen=True):
    """A Service that rules send requests to. problem: why it cannot be used, so that its share is answered with 500; "" when it can."""

    ref: Ref
    endpoints: tuple[Endpoint, ...] = ()
    problem: str = ""


class Destination(msgspec.Struct, frozen=True):
    """What stands behind a dialled address.

    routes: when there are any, they alone decide where HTTP requests go (``backends``), and what none of them wants gets 404;
    ``endpoints`` are then only for opaque connections. Oldest first, as in `InboundPolicy`; all of one kind.

    kind ``service``: ``endpoints`` are its ready ones; empty means there is none now (503, UNAVAILABLE).
    kind ``pod``: exactly one endpoint, the dialled address itself. kind ``external``: unknown to the mesh, forwarded as dialled.
    kind ``refused``: a Service address whose port is not defined.
    """

    kind: Literal["service", "pod", "external", "refused"]
    ref: Ref | None
    protocol: Protocol
    endpoints: tuple[Endpoint, ...] = ()
    routes: tuple[ServiceRoute, ...] = ()
    backends: tuple[Backend, ...] = ()


# --- sidecar -> controller -------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message: which pod speaks. The controller refuses unless the peer's verified identity is that pod's own."""

    namespace: str
    pod: str
    version: str


class WatchPort(msgspec.Struct, frozen=True, tag="watch-port"):
    """From now on keep me informed of the policy of this port of mine."""

    port: int


class ForgetPort(msgspec.Struct, frozen=True, tag="forget-port"):
    """No connection uses this port of mine any more."""

    port: int


class WatchDestination(msgspec.Struct, frozen=True, tag="watch-destination"):
    """From now on keep me informed of what stands behind this ``ip:port``."""

    addr: str


class ForgetDestination(msgspec.Struct, frozen=True, tag="forget-destination"):
    """Nobody here uses this address any more."""

    addr: str


ToController = Hello | WatchPort | ForgetPort | WatchDestination | ForgetDestination

# --- controller -> sidecar -------------------------------------------------------------------------------------------


class PortPolicy(msgspec.Struct, frozen=True, tag="port-policy"):
    """The policy of a watched port, whole."""

    port: int
    policy: InboundPolicy


class AddressDestination(msgspec.Struct, frozen=True, tag="destination"):
    """What stands behind a watched address, whole."""

    addr: str
    destination: Destination


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The sidecar is refused and the connection will be closed; ``reason`` is a sentence for the sidecar's log."""

    reason: str


ToSidecar = PortPolicy | AddressDestination | Refused

MAX_LINE_BYTES = 4 << 20  # a destination with some 10,000 endpoints is about 1.5 MiB

_encoder = msgspec.json.Encoder()
_to_controller: msgspec.json.Decoder[ToController] = msgspec.json.Decoder(ToController)
_to_sidecar: msgspec.json.Decoder[ToSidecar] = msgspec.json.Decoder(ToSidecar)


class WireError(ValueError):
    """A line that is not a message of this API; the text says what was wrong with it."""


def encode(message: ToController | ToSidecar) -> bytes:
    """One line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_to_controller_untrusted(line: bytes) -> ToController:
    """Read one line from a sidecar; raises WireError only."""
    try:
        return _to_controller.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(str(error)) from None


def decode_to_sidecar_untrusted(line: bytes) -> ToSidecar:
    """Read one line from the controller; raises WireError only."""
    try:
        return _to_sidecar.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(str(error)) from None
