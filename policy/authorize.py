"""May this client do this? The policy of one port, compiled, and its decisions, remembered.

Theory of operation. A policy is a pure allow-list: a client is let in iff one authorization names its network *and* its authentication
(Linkerd: no deny rules, no priorities). Which authorizations name a client is known when it connects and never changes, so it is computed
once, as a set of bits: `PortAuthorizer.for_client`. What is left per request is which route it belongs to (policy.match) and whether that
route's authorizations and the client's bits have one in common. That answer is remembered under the parts of the request that rules look
at, in a memo shared by all clients with the same bits. The memo lives as long as its PortAuthorizer, and a changed policy is a new
PortAuthorizer: no decision outlives the policy it came from.

Without routes the authorizations of the server decide, and the answer is one constant per client. With routes, a request that matches none
is NoRoute, and the authorizations of the matched route decide, which the controller made a union or not (``inherit``).
``localhost`` is always authorized, on the server and on every route, as in Linkerd: whoever calls from loopback is in the pod.

Everything fails closed: what cannot be understood (a pattern, a network, an address) lets nobody in.
Called by proxy.inbound and `pillion authz`. Must not wait, read a clock, or know a socket.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from core.refs import Ref, default_ref
from core.spelling import Spellings
from policy.match import SEVERAL, Found, MixedKinds, RouteTable, host_untrusted, joined
from policy.networks import Networks
from policy.paths import AmbiguousPath, lenient_target_untrusted, normal_target_untrusted, query_values, readings
from policy.patterns import InvalidPattern
from policy.wire import Anyone, Authorization, InboundPolicy, Meshed, Network

K = TypeVar("K")
V = TypeVar("V")

_MEMO_ENTRIES = 4096
_MEMO_BYTES = 1 << 20  # of keys, for one set of bits: bounds what a client that never repeats a path makes us hold
_KEY_MAX_BYTES = 2048  # decisions about longer keys are not remembered
_CLIENTS_MAX = 1024  # distinct clients, and distinct sets of bits, remembered by a port
_REASON_MAX_CHARS = 500
_LISTED = 3  # policies in a reason, and values of each
_QUESTION_MARK: Final = 0x3F  # a number, because `b"?" in target` raises and drops an exception first, and `find` takes ten times as long

_LOCALHOST = Authorization(default_ref("localhost"), (Network("127.0.0.0/8"), Network("::1/128")), Anyone())


@dataclass(frozen=True)
class Client:
    """Who is connected. ip: canonical text (core.addrs). identity: the verified SPIFFE URI, or None with the reason there is none
    (``plaintext``, ``no-client-certificate``, ...)."""

    ip: str
    identity: str | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _Decision:
    """server: the Server, or default policy, of the port. route: the matched route. authorization: what let the client in.
    audit: let in only to be counted and logged as ``audit``. reason: a sentence, at most 500 characters."""

    server: Ref
    route: Ref | None = None
    authorization: Ref | None = None
    audit: bool = False
    reason: str = ""


class Permit(_Decision):
    """Let it pass. The only value that forwarding accepts."""


class Denied(_Decision):
    """403 / PERMISSION_DENIED, or the connection is closed."""


class NoRoute(_Decision):
    """404 / UNIMPLEMENTED: the port has routes and none wants this request."""


class BadTarget(_Decision):
    """400: the request has two readings, its target or a field that is there twice, and rules look at what differs."""


Decision = Permit | Denied | NoRoute | BadTarget


class _Grant:
    """One authorization, compiled."""

    def __init__(self, authorization: Authorization, networks: Networks, trust_domain: str) -> None:
        self.authorization = authorization
        self.networks = networks
        self._anyone = isinstance(authorization.authentication, Anyone)
        patterns = authorization.authentication.identities if isinstance(authorization.authentication, Meshed) else ()
        self._identities = frozenset(pattern for pattern in patterns if not pattern.endswith("*"))
        self._prefixes = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("/*"))
        if "*" in patterns:
            self._prefixes += (f"spiffe://{trust_domain}/",)

    def authenticates(self, identity: str | None) -> bool:
        if self._anyone:
            return True
        return identity is not None and (identity in self._identities or identity.startswith(self._prefixes))


class _Decisions:
    """Those about clients with the same bits: the memo, and one decision object for each route."""

    __slots__ = ("bits", "by_route", "memo", "memo_bytes")

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.by_route: dict[int, Permit | Denied] = {}
        self.memo: dict[tuple[object, ...], Decision] = {}
        self.memo_bytes = 0

    def remember(self, key: tuple[object, ...], size: int, decision: Decision) -> None:
        if size > _KEY_MAX_BYTES:
            return
        if len(self.memo) >= _MEMO_ENTRIES or self.memo_bytes + size > _MEMO_BYTES:
            self.memo.clear()
            self.memo_bytes = 0
        self.memo[key] = decision
        self.memo_bytes += size


class PortAuthorizer:
    """The policy of one port, compiled; make a new one for every new policy. Never raises on what the controller sent.

    header_names: lower-case names that rules look at, whose values `ClientAuthorizer.request` wants in this order. spellings: other
    spellings of them, which nobody may send: such a request is answered `respelled`. None where any may be sent.
    """

    def __init__(self, policy: InboundPolicy, trust_domain: str) -> None:
        self.policy = policy
        self.broken = ""  # why the routes cannot be evaluated; nobody is let in then
        try:
            self._table = RouteTable(policy.routes)
            # A rule on an escaped "@" and a request with a plain one meet only where both are decoded.
            self._folded = RouteTable(policy.routes, fold_paths=True) if self._table.escapes_matter else self._table
        except (InvalidPattern, MixedKinds) as error:
            self._table = self._folded = RouteTable(())
            self.broken = str(error)[: _REASON_MAX_CHARS // 2]
        self._methods = frozenset(method.encode() for method in self._table.methods)
        self.header_names = self._table.header_names
        self.spellings = Spellings(self.header_names) if self.header_names and policy.check_paths else None
        self.respelled = BadTarget(policy.server, reason="a header field that rules look at is there with other separators in its name")
        self._grants: list[_Grant] = []
        self._positions: dict[Authorization, int] = {}
        self._networks: dict[tuple[Network, ...], Networks] = {}
        self._trust_domain = trust_domain
        self.of_server = self._compiled(policy.authorizations)
        self.of_routes = [self._compiled(route.authorizations) for route in policy.routes]
        self._decisions: dict[int, _Decisions] = {}
        self._clients: dict[Client, ClientAuthorizer] = {}
        self._authorizers: dict[tuple[int, str | None, str], ClientAuthorizer] = {}

    def for_client(self, client: Client) -> ClientAuthorizer:
        """The decisions for this client. Clients with the same identity whom the same authorizations name share one object."""
        known = self._clients.get(client)
        if known is None:
            bits = self._bits(client)
            known = self._authorizers.get((bits, client.identity, client.reason))
            if known is None:
                decisions = _bounded(self._decisions).setdefault(bits, _Decisions(bits))
                known = ClientAuthorizer(self, decisions, client.identity, client.reason)
                _bounded(self._authorizers)[bits, client.identity, client.reason] = known
            _bounded(self._clients)[client] = known
        return known

    def _compiled(self, authorizations: Sequence[Authorization]) -> tuple[int, ...]:
        """Positions of the grants. Those that only audit come last, so that a client whom another one lets in is not audited."""
        positions = []
        for one in (*sorted(authorizations, key=lambda one: one.audit), _LOCALHOST):
            if one not in self._positions:
                if one.networks not in self._networks:
                    self._networks[one.networks] = Networks(one.networks)
                self._positions[one] = len(self._grants)
                self._grants.append(_Grant(one, self._networks[one.networks], self._trust_domain))
            positions.append(self._positions[one])
        return tuple(positions)

    def names_network_of(self, ip: str) -> bool:
        """Whether some authorization of the port is for clients at this address, whatever they would have to prove."""
        near = self._near(ip)
        return any(grant.networks in near for grant in self._grants)

    def _near(self, ip: str) -> set[Networks]:
        try:
            address = ipaddress.ip_address(ip)
        except ValueError:
            return set()
        mapped = getattr(address, "ipv4_mapped", None)
        version, number = (4, int(mapped)) if mapped else (address.version, int(address))
        return {networks for networks in self._networks.values() if networks.holds(version, number)}

    def _bits(self, client: Client) -> int:
        near = self._near(client.ip)
        return sum(1 << at for at, one in enumerate(self._grants) if one.networks in near and one.authenticates(client.identity))

    def shape(self) -> tuple[bool, bool, bool]:
        """Whether rules look at the method, the query, the host: what they do not look at is no part of a memo's key."""
        return self._table.reads_method, self._table.reads_query, self._table.reads_host

    def decide(self, decisions: _Decisions, method: bytes, target: bytes, authority: bytes, headers: Sequence[bytes | None]) -> Decision:
        """Decide about a request on a port with routes, without a memo."""
        if self.policy.check_paths:
            if any(value is not None and SEVERAL in value for value in headers):
                # Of several fields some servers take the first, some the last, some all: a rule could hold for one and not for another.
                return BadTarget(self.policy.server, reason="a header field that rules look at is there more than once")
            if method not in self._methods and method.upper() in self._methods:
                # Methods are case-sensitive (RFC 9110 section 9.1), but frameworks write them in capitals before they look.
                return BadTarget(self.policy.server, reason="a method that rules look at is not written in capitals")
        try:
            found = self._find(method, target, authority, headers)
        except AmbiguousPath as error:
            return BadTarget(self.policy.server, reason=f"the request target has two readings: {error.reason}")
        if found is None:
            return NoRoute(self.policy.server, reason=f"no rule of the routes of {_name(self.policy.server)} matches the request")
        known = decisions.by_route.get(found.route_index)
        if known is None:
            known = self.admit(decisions.bits, self.of_routes[found.route_index], found.route.ref)
            decisions.by_route[found.route_index] = known
        return known

    def _find(self, method: bytes, target: bytes, authority: bytes, headers: Sequence[bytes | None]) -> Found | None:
        strict = self.policy.check_paths
        path, query = normal_target_untrusted(target) if strict else lenient_target_untrusted(target)
        host = host_untrusted(authority) if self._table.reads_host else ""
        watched = self._table.query_names
        values = query_values(query, strict=strict, watched=watched) if watched else {}
        fields = [None if value is None else joined(value) for value in headers]
        name = method.decode("latin-1")
        found = self._table.find(host, name, path, values, fields)
        if strict and (self._folded is not self._table or "%" in path or ";" in path):
            for reading in readings(path):
                other = self._folded.find(host, name, reading, values, fields)
                if (found and found.route_index) != (other and other.route_index):
                    raise AmbiguousPath("an escaped reserved character or a path parameter, without which another route matches")
        return found

    def admit(self, bits: int, grants: Iterable[int], route: Ref | None) -> Permit | Denied:
        """A permit by the first grant among the bits; or a denial without a reason, shared by all clients with these bits (`explain`)."""
        server = self.policy.server
        for at in grants:
            if bits >> at & 1:
                one = self._grants[at].authorization
                what = f"{_name(route)} on {_name(server)}" if route else _name(server)
                return Permit(server, route, one.ref, one.audit, f"{_name(one.ref)} admits the client to {what}"[:_REASON_MAX_CHARS])
        return Denied(server, route)

    def explain(self, denied: Denied, identity: str | None, absence: str) -> Denied:
        """The denial with its sentence: who asked, and what each policy would have needed."""
        what = f"{_name(denied.route)} on {_name(denied.server)}" if denied.route else _name(denied.server)
        grants = self.of_server
        if denied.route:
            refs = [route.ref for route in self.policy.routes]
            grants = self.of_routes[refs.index(denied.route)]
        wants = [_wanted(self._grants[at], identity) for at in grants if self._grants[at].authorization is not _LOCALHOST]
        more = [f"{len(wants) - _LISTED} more"] if len(wants) > _LISTED else []
        needed = "; ".join(wants[:_LISTED] + more) or "there is none but for loopback"
        who = identity[:200] if identity else f"a client without identity ({absence or 'no reason known'})"
        return replace(denied, reason=_cut(f"no policy of {what} admits {who}: {needed}"))


class ClientAuthorizer:
    """The decisions of one port about one client. Cheap to keep; shared by connections.

    respelled: the decision about any request with another spelling of a name (`PortAuthorizer.spellings`).
    """

    __slots__ = (
        "_absence", "_decisions", "_explained", "_identity", "_memo", "_of_all_requests", "_of_connection", "_port", "_reads_host",
        "_reads_method", "_reads_query", "respelled",
    )  # fmt: skip

    def __init__(self, port: PortAuthorizer, decisions: _Decisions, identity: str | None, absence: str) -> None:
        self._port = port
        self.respelled = port.respelled
        self._decisions = decisions
        self._memo = decisions.memo
        self._identity = identity
        self._absence = absence
        self._explained: dict[Denied, Denied] = {}
        self._reads_method, self._reads_query, self._reads_host = port.shape()
        server = port.policy.server
        routes = bool(port.policy.routes)
        self._of_all_requests: Permit | Denied | None = None  # None: each is decided on by the routes
        if port.broken:
            self._of_all_requests = Denied(server, reason=_cut(f"the routes of {_name(server)} cannot be evaluated: {port.broken}"))
        elif not routes:
            self._of_all_requests = self._with_reason(port.admit(decisions.bits, port.of_server, None))
        self._of_connection = self._of_all_requests or Denied(
            server, reason=f"{_name(server)} has routes, which a connection that is not read as HTTP would bypass"
        )

    def connection(self) -> Permit | Denied:
        """May the connection be used as opaque bytes? Never on a port with routes: what is in the bytes could be what routes deny."""
        return self._of_connection

    def some_request(self) -> bool:
        """May there be a request that passes?"""
        if self._of_all_requests is not None:
            return isinstance(self._of_all_requests, Permit)
        bits = self._decisions.bits
        return any(bits >> at & 1 for grants in self._port.of_routes for at in grants)

    def request(self, method: bytes, target: bytes, authority: bytes, headers: tuple[bytes | None, ...]) -> Decision:
        """May this request pass? target: origin-form as received. headers: of `PortAuthorizer.header_names`, see `joined`."""
        if self._of_all_requests is not None:
            return self._of_all_requests
        if not self._reads_query and _QUESTION_MARK in target:
            target = target[: target.index(b"?")]
        key = (method if self._reads_method else b"", target, authority if self._reads_host else b"", headers)
        known = self._memo.get(key)
        if known is None:
            known = self._port.decide(self._decisions, method, target, authority, headers)
            size = len(key[0]) + len(target) + len(key[2]) + sum(len(value) for value in headers if value)
            self._decisions.remember(key, size, known)
        return self._with_reason(known) if known.__class__ is Denied else known

    def _with_reason(self, shared: Permit | Denied) -> Permit | Denied:
        """The decision with its reason. Denials are shared by clients without one, because the reason names the client."""
        if not isinstance(shared, Denied):
            return shared
        mine = self._explained.get(shared)
        if mine is None:
            mine = self._explained[shared] = self._port.explain(shared, self._identity, self._absence)
        return mine


def _bounded(remembered: dict[K, V]) -> dict[K, V]:
    """Forget all rather than grow: what is forgotten is computed again, connections keep what they hold."""
    if len(remembered) >= _CLIENTS_MAX:
        remembered.clear()
    return remembered


def _name(ref: Ref) -> str:
    return f"default policy {ref.name}" if ref.kind == "default" else str(ref)


def _wanted(grant: _Grant, identity: str | None) -> str:
    """What this authorization would have needed, as one clause."""
    one = grant.authorization
    if isinstance(one.authentication, Meshed) and not grant.authenticates(identity):
        patterns = one.authentication.identities
        return f"{_name(one.ref)} admits {'any mesh identity' if '*' in patterns else _listed(patterns)} only"
    return f"{_name(one.ref)} admits it from {_listed([network.cidr for network in one.networks], 'no network')} only"


def _listed(values: Sequence[str], none: str = "nobody") -> str:
    more = f" and {len(values) - _LISTED} more" if len(values) > _LISTED else ""
    return (", ".join(values[:_LISTED]) or none) + more


def _cut(text: str) -> str:
    return text if len(text) <= _REASON_MAX_CHARS else text[: _REASON_MAX_CHARS - 3] + "..."
