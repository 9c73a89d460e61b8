"""Which rule of which route a request belongs to, by the precedence of the Gateway API.

Theory of operation. All rules of all routes of a port are compiled into one `RouteTable`; a request never walks over routes. A level is
what shares a hostname: one per exact hostname, one per wildcard, one for routes without hostnames. Inside a level, exact paths are one
dict, prefixes another one that is asked for every element-wise prefix of the path, longest first. What is found there is a bucket:
the candidates that differ only in method, headers and query parameters, indexed by those in turn. So a lookup costs the depth of the
path and the number of *different sets of names* that rules look at, whatever the number of routes. Only regular expressions are
tried one after the other.

Precedence (HTTPRouteSpec.hostnames and HTTPRouteRule.matches; every match ranks alone), best first:
  1. hostname: exact, then the longest wildcard, then routes without hostnames
  2. path: Exact, then RegularExpression, then the longest PathPrefix (the Gateway API leaves the place of regular expressions to the
     implementation; behind prefixes a catch-all ``/``, which is also what a match without a path means, would shadow all of them, and
     a rule that narrows who may use what its expression covers would silently be none)
  3. method present  4. more headers  5. more query parameters  6. order of routes (oldest first), of rules, of matches
A candidate of a better rank whose other conditions do not hold is skipped. It hides no candidate of a lower rank, nor a worse hostname's.

GRPCRoute (GRPCRouteRule.matches): hostname, characters of the matching service, of the matching method, number of headers, order. All
matching services of a request have equally many characters, so "more characters" means "looks at it at all"; there, Exact ranks
before RegularExpression. gRPC requests are POST to ``/service/method``; everything else matches no GRPCRoute.

Called by policy.authorize. Must not decide who may do what, nor whether a path can be trusted (policy.paths).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, TypeVar

from policy.paths import fold
from policy.patterns import InvalidPattern, Pattern, compile_pattern
from policy.wire import GrpcMatch, HttpMatch, Route, Rule, ValueMatch

T = TypeVar("T")
K = TypeVar("K")
Headers = Sequence[bytes | None]
Query = Mapping[str, str]

_MAX_HOST_CHARS = 253  # longer ones are no DNS names and match no hostname
# Of one port or Service: the sidecar of whoever calls a Service pays for what that Service's owner wrote.
PATTERNS_MAX: Final = 1000  # different regular expressions: up to 1 ms and 60 KiB each, once
HEADER_NAMES_MAX: Final = 100  # different ones: their values are looked for in each request
NAME_SETS_MAX: Final = 1000  # different sets of header and parameter names: 1 us each, for each request

_compiled = lru_cache(maxsize=PATTERNS_MAX)(compile_pattern)  # a Service's endpoints change more often than its routes


class MixedKinds(ValueError):
    """HTTP and gRPC matches in one table: the controller lets one kind win a parent (GRPCRoute over HTTPRoute)."""


class Found(NamedTuple):
    """route_index, rule_index: positions in the routes given to `RouteTable` and in ``route.rules``."""

    route: Route
    route_index: int
    rule_index: int


class _Candidate:
    """One match of one rule. Names are positions in `RouteTable.header_names`; Exact conditions are looked up, patterns tried."""

    __slots__ = ("exact_headers", "exact_query", "found", "method", "order", "path", "pattern_headers", "pattern_query", "size")

    def __init__(self, found: Found, order: int, match: HttpMatch | GrpcMatch, names: dict[bytes, int], fold_paths: bool) -> None:
        headers: Sequence[ValueMatch] = match.headers
        query: Sequence[ValueMatch] = match.query if isinstance(match, HttpMatch) else ()
        self.found = found
        self.order = order
        self.method = match.method if isinstance(match, HttpMatch) else None
        self.path = "" if isinstance(match, GrpcMatch) else fold(match.path.value) if fold_paths else match.path.value
        self.size = (0, 0)
        self.exact_headers: tuple[tuple[int, bytes], ...] = ()
        self.pattern_headers: tuple[tuple[int, Pattern], ...] = ()
        self.exact_query: tuple[tuple[str, str], ...] = ()
        self.pattern_query: tuple[tuple[str, Pattern], ...] = ()
        if not headers and not query:
            return  # most matches have a path and a method only, and large policies are compiled while requests wait
        headers, query = _first_of_each(headers), _first_of_each(query)
        self.size = (-len(headers), -len(query))
        named = [(names.setdefault(one.name.encode(), len(names)), one) for one in headers]
        self.exact_headers = tuple(sorted((at, one.value.encode()) for at, one in named if one.type == "Exact"))
        self.pattern_headers = tuple((at, _compiled(one.value)) for at, one in named if one.type != "Exact")
        self.exact_query = tuple(sorted((one.name, one.value) for one in query if one.type == "Exact"))
        self.pattern_query = tuple((one.name, _compiled(one.value)) for one in query if one.type != "Exact")

    def patterns_hold(self, headers: Headers, query: Query) -> bool:
        for at, pattern in self.pattern_headers:
            value = headers[at]
            if value is None or not pattern(value):
                return False
        for name, pattern in self.pattern_query:
            text = query.get(name)
            if text is None or not pattern(text.encode()):
                return False
        return True

    def holds(self, headers: Headers, query: Query) -> bool:
        return (
            all(headers[at] == value for at, value in self.exact_headers)
            and all(query.get(name) == value for name, value in self.exact_query)
            and self.patterns_hold(headers, query)
        )


class _Group(NamedTuple):
    """Candidates that look at the same names: one lookup by the request's values of those finds the few to try, oldest first."""

    headers: tuple[int, ...]
    query: tuple[str, ...]
    by_values: dict[tuple[object, ...], list[_Candidate]]


class _Conditions:
    """Candidates that differ only in headers and query parameters, in ranks of equally many of both."""

    __slots__ = ("_only", "_ranks")

    def __init__(self, candidates: Sequence[_Candidate]) -> None:
        self._only = candidates[0] if len(candidates) == 1 else None  # nearly every path of a large policy
        if self._only is not None:
            return
        ranks: dict[tuple[int, int], dict[tuple[tuple[int, ...], tuple[str, ...]], _Group]] = {}
        for one in sorted(candidates, key=lambda one: (one.size, one.order)):
            names = tuple(at for at, _ in one.exact_headers), tuple(name for name, _ in one.exact_query)
            group = ranks.setdefault(one.size, {}).setdefault(names, _Group(*names, {}))
            values = tuple(value for _, value in one.exact_headers) + tuple(value for _, value in one.exact_query)
            same = group.by_values.setdefault(values, [])
            # What comes after an unconditional one of the same values is never reached; dropping it keeps the list short.
            if not same or same[-1].pattern_headers or same[-1].pattern_query:
                same.append(one)
        self._ranks = tuple(tuple(groups.values()) for groups in ranks.values())

    def find(self, headers: Headers, query: Query) -> _Candidate | None:
        if self._only is not None:
            return self._only if self._only.holds(headers, query) else None
        for groups in self._ranks:
            best: _Candidate | None = None
            for group in groups:
                values: tuple[object, ...] = tuple([headers[at] for at in group.headers] + [query.get(name) for name in group.query])
                for one in group.by_values.get(values, ()):
                    if best is not None and best.order < one.order:
                        break
                    if one.patterns_hold(headers, query):
                        best = one
                        break
            if best is not None:
                return best
        return None


class _ByMethod:
    """Candidates of one path: those that name the request's method rank before those that name none."""

    __slots__ = ("_conditions",)

    def __init__(self, candidates: Iterable[_Candidate]) -> None:
        self._conditions = {method: _Conditions(some) for method, some in _grouped(candidates, lambda one: one.method).items()}

    def find(self, method: str, headers: Headers, query: Query) -> _Candidate | None:
        for key in (method, None):
            conditions = self._conditions.get(key)
            found = conditions.find(headers, query) if conditions else None
            if found:
                return found
        return None


class _HttpLevel:
    """The HTTPRoute matches that share a hostname."""

    def __init__(self, candidates: list[tuple[_Candidate, HttpMatch]]) -> None:
        exact = [one for one, match in candidates if match.path.type == "Exact"]
        prefix = [one for one, match in candidates if match.path.type == "PathPrefix"]
        regex = [(one, match) for one, match in candidates if match.path.type == "RegularExpression"]
        regex.sort(key=lambda pair: (pair[0].method is None, pair[0].size, pair[0].order))
        self._exact = {path: _ByMethod(some) for path, some in _grouped(exact, lambda one: one.path).items()}
        self._prefix = {path: _ByMethod(some) for path, some in _grouped(prefix, lambda one: one.path.rstrip("/")).items()}
        self._regex = [(_compiled(match.path.value), one) for one, match in regex]
        self._longest = max(map(len, self._prefix), default=0)

    def find(self, method: str, path: str, headers: Headers, query: Query) -> _Candidate | None:
        exact = self._exact.get(path)
        found = exact.find(method, headers, query) if exact else None
        return found or self._find_regex(method, path, headers, query) or self._find_prefix(method, path, headers, query)

    def _find_regex(self, method: str, path: str, headers: Headers, query: Query) -> _Candidate | None:
        if not self._regex:
            return None
        raw = path.encode("ascii", "replace")
        for pattern, one in self._regex:
            if (one.method is None or one.method == method) and pattern(raw) and one.holds(headers, query):
                return one
        return None

    def _find_prefix(self, method: str, path: str, headers: Headers, query: Query) -> _Candidate | None:
        # Start at the longest prefix that any rule has: the walk is as long as the policy is deep, not as the client likes.
        prefix = path if len(path) <= self._longest else path[: max(path.rfind("/", 0, self._longest + 1), 0)]
        while True:
            bucket = self._prefix.get(prefix)
            found = bucket.find(method, headers, query) if bucket else None
            if found or not prefix:
                return found
            prefix = prefix[: max(prefix.rfind("/"), 0)]


class _GrpcLevel:
    """The GRPCRoute matches that share a hostname: by which of service and method they look at, then exact before patterns."""

    def __init__(self, candidates: list[tuple[_Candidate, GrpcMatch]]) -> None:
        by_parts = _grouped(candidates, lambda pair: (pair[1].service is not None, pair[1].method is not None))
        self._parts = []
        for parts in ((True, True), (True, False), (False, True), (False, False)):
            some = by_parts.get(parts, [])
            by_names = _grouped((pair for pair in some if pair[1].type == "Exact"), lambda pair: (pair[1].service, pair[1].method))
            exact = {names: _Conditions([one for one, _ in few]) for names, few in by_names.items()}
            regex = sorted((pair for pair in some if pair[1].type != "Exact"), key=lambda pair: (pair[0].size, pair[0].order))
            self._parts.append((parts, exact, [_grpc_patterns(*pair) for pair in regex]))

    def find(self, method: str, path: str, headers: Headers, query: Query) -> _Candidate | None:
        if method != "POST":
            return None
        _, slash, call = path.partition("/")
        service, slash, name = call.partition("/")
        complete = bool(slash and service and name) and "/" not in name
        for (by_service, by_name), exact, regex in self._parts:
            if (by_service or by_name) and not complete:
                continue  # no call of a method: only what looks at neither takes it
            conditions = exact.get((service if by_service else None, name if by_name else None))
            found = conditions.find(headers, query) if conditions else None
            if found:
                return found
            for service_pattern, name_pattern, one in regex:
                if service_pattern(service.encode()) and name_pattern(name.encode()) and one.holds(headers, query):
                    return one
        return None


def excess(rules: Iterable[Rule]) -> str:
    """What these rules have too much of for the sidecars that would have to look at it with each request; "" when they are fine."""
    patterns: set[str] = set()
    names: set[str] = set()
    sets: set[tuple[frozenset[str], frozenset[str]]] = set()
    for rule in rules:
        for match in rule.matches:
            patterns.update(_patterns_of(match))
            query = match.query if isinstance(match, HttpMatch) else ()
            if match.headers or query:
                looked_at = frozenset([one.name for one in match.headers])
                names |= looked_at
                sets.add((looked_at, frozenset([one.name for one in query])))
        if len(patterns) > PATTERNS_MAX:
            return f"more than {PATTERNS_MAX} regular expressions"
        if len(names) > HEADER_NAMES_MAX:
            return f"conditions on more than {HEADER_NAMES_MAX} header names"
        if len(sets) > NAME_SETS_MAX:
            return f"conditions on more than {NAME_SETS_MAX} sets of names"
    return ""


def _patterns_of(match: HttpMatch | GrpcMatch) -> Iterator[str]:
    values: tuple[ValueMatch, ...] = match.headers
    if isinstance(match, HttpMatch):
        values += match.query
        if match.path.type == "RegularExpression":
            yield match.path.value
    elif match.type == "RegularExpression":
        yield from (name for name in (match.service, match.method) if name is not None)
    for one in values:
        if one.type == "RegularExpression":
            yield one.value


class RouteTable:
    """The routes of a port, compiled. Immutable. Raises InvalidPattern (also by `excess`) or MixedKinds: do not let anything pass.

    header_names: what `find` wants the values of, lower case. query_names: the parameters that some rule looks at. methods: those that
    some rule names. reads_host, reads_method, reads_query: whether some rule looks at those; what is not looked at may be passed empty.
    escapes_matter: some path value holds an escape that `policy.paths.fold` decodes.
    """

    def __init__(self, routes: Sequence[Route], *, fold_paths: bool = False) -> None:
        matches = [match for route in routes for rule in route.rules for match in rule.matches]
        kinds = {route.kind for route in routes} | {"grpc" if isinstance(match, GrpcMatch) else "http" for match in matches}
        if len(kinds) > 1:
            raise MixedKinds("HTTP and gRPC routes on one port")
        if much := excess(rule for route in routes for rule in route.rules):
            raise InvalidPattern(much)
        names: dict[bytes, int] = {}
        levels: dict[str, list[tuple[_Candidate, HttpMatch | GrpcMatch]]] = {}
        order = 0
        for route_index, route in enumerate(routes):
            hosts = [levels.setdefault(hostname, []) for hostname in {name.lower() for name in route.hostnames} or {""}]
            for rule_index, rule in enumerate(route.rules):
                found = Found(route, route_index, rule_index)
                for match in rule.matches or (GrpcMatch() if route.kind == "grpc" else HttpMatch(),):
                    candidate = _Candidate(found, order, match, names, fold_paths)
                    order += 1
                    for level in hosts:
                        level.append((candidate, match))
        compiled = {hostname: _level(candidates) for hostname, candidates in levels.items()}
        self._any = compiled.pop("", None)
        self._wildcards = {hostname[1:]: level for hostname, level in compiled.items() if hostname.startswith("*.")}
        self._exact = {hostname: level for hostname, level in compiled.items() if not hostname.startswith("*.")}
        http = [match for match in matches if isinstance(match, HttpMatch)]
        self.header_names = tuple(names)
        self.reads_host = bool(compiled)
        self.methods = frozenset(match.method for match in http if match.method is not None)
        self.reads_method = "grpc" in kinds or bool(self.methods)
        self.query_names = frozenset(one.name for match in http for one in match.query)
        self.reads_query = bool(self.query_names)
        self.escapes_matter = any(match.path.type != "RegularExpression" and fold(match.path.value) != match.path.value for match in http)

    def find(self, host: str, method: str, path: str, query: Query, headers: Headers) -> Found | None:
        """The rule a request belongs to, None when no route wants it.

        host: lower case, without port (`host_untrusted`). path: normal form or ``*``, which PathPrefix ``/`` takes and every regular
        expression that covers it. query: first values. headers: the value of each of `header_names`, None where there is none.
        """
        for level in self._levels(host):
            candidate = level.find(method, path, headers, query)
            if candidate:
                return candidate.found
        return None

    def _levels(self, host: str) -> Iterable[_HttpLevel | _GrpcLevel]:
        if self.reads_host and host and len(host) <= _MAX_HOST_CHARS:
            exact = self._exact.get(host)
            if exact:
                yield exact
            dot = host.find(".", 1) if self._wildcards else -1
            while dot >= 0:
                wildcard = self._wildcards.get(host[dot:])
                if wildcard:
                    yield wildcard
                dot = host.find(".", dot + 1)
        if self._any:
            yield self._any


SEVERAL = b"\n"
"""Between the values of several fields of one name, as engines hand them over: no value holds it."""


def joined(value: bytes) -> bytes:
    """One value of several fields (RFC 9110 section 5.3), without padding."""
    return value.strip(b" \t") if SEVERAL not in value else b", ".join(one.strip(b" \t") for one in value.split(SEVERAL))


def host_untrusted(authority: bytes) -> str:
    """The host of a Host header or ``:authority``: lower case, without port and final dot. Never raises: nonsense matches no hostname."""
    text = authority.decode("latin-1").lower()
    host = text[: text.find("]") + 1] if text.startswith("[") else text.partition(":")[0]
    return host.removesuffix(".")


def _level(candidates: list[tuple[_Candidate, HttpMatch | GrpcMatch]]) -> _HttpLevel | _GrpcLevel:
    grpc = [(one, match) for one, match in candidates if isinstance(match, GrpcMatch)]
    return _GrpcLevel(grpc) if grpc else _HttpLevel([(one, match) for one, match in candidates if isinstance(match, HttpMatch)])


def _grpc_patterns(candidate: _Candidate, match: GrpcMatch) -> tuple[Pattern, Pattern, _Candidate]:
    service, method = (_compiled(text) if text is not None else _anything for text in (match.service, match.method))
    return service, method, candidate


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _anything(value: bytes) -> bool:
    return True


def _first_of_each(matches: Sequence[ValueMatch]) -> list[ValueMatch]:
    """HTTPHeaderMatch.name: of entries with an equivalent name only the first counts."""
    return list({match.name: match for match in reversed(matches)}.values())
