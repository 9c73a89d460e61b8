"""Where a request to a Service with routes goes: the rule that matches it, one of the rule's backends by weight, the header changes.

Compiled from what the controller said about one destination; replaced whole when it says something new, with the loads of endpoints that
stay. Matching is policy.match, the same as for authorization; a target is read leniently, because nothing is guarded here. Pure.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from core.refs import Ref
from policy import wire
from policy.match import MixedKinds, RouteTable, host_untrusted, joined
from policy.paths import lenient_target_untrusted, query_values
from policy.patterns import InvalidPattern
from policy.wire import Action, Destination, FieldEdit, Retry, Route, Share, Timeouts
from proxy.balance import Balancer
from proxy.budget import RetryBudget
from proxy.protocol.requests import HeadEdit, RequestHead, ResponseRule
from proxy.rescue import Cause, Redirect

UNTOUCHED = HeadEdit()
_HOST = re.compile(r"[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\]")
_WELL_KNOWN = {"http": 80, "https": 443}
_REMEMBERED = 1024  # request shapes whose rule is remembered; then all are forgotten


class RuleLimits(NamedTuple):
    """How long a request of a rule may take, and how often it may be sent again; None: not at all. budget: of all its requests together."""

    timeouts: Timeouts
    retry: Retry | None
    budget: RetryBudget
    random: Callable[[], float]


class Way(NamedTuple):
    """Where a request goes, what is changed in its head, and what its rule says about time and retries; None: nothing."""

    balancer: Balancer
    edit: HeadEdit
    limits: RuleLimits | None = None


class _Rule:
    """A rule's ways with their cumulated weights, or where it sends the client instead."""

    __slots__ = ("redirect", "sums", "ways")

    def __init__(self, action: Action, backends: list[Balancer | None], budget: RetryBudget, random: Callable[[], float]) -> None:
        self.redirect = action.redirect
        self.ways: list[Way | None] = []
        limits = None
        if action.timeouts is not None or action.retry is not None:
            limits = RuleLimits(action.timeouts or Timeouts(), action.retry, budget, random)
        for share in action.shares:
            balancer = backends[share.backend]
            edit = _head_edit(action, share)
            self.ways.append(Way(balancer, edit, limits) if balancer is not None else None)
        self.sums = list(accumulate(share.weight for share in action.shares))


class Routing:
    """The routes of one destination.

    port: the dialled one. before: what this replaces. Endpoints that stay keep their latency averages and rules their retry budgets: a
    destination that changes often must not get a fresh budget each time.
    """

    def __init__(self, destination: Destination, port: int, before: Routing | None, random: Callable[[], float], now: float) -> None:
        self._port = port
        self._random = random
        self._memo: dict[tuple[object, ...], _Rule | None] = {}
        self._balancers: dict[tuple[Ref, int], Balancer] = {}
        self._budgets: dict[tuple[Ref, int], RetryBudget] = {}  # of rules, by their number
        backends: list[Balancer | None] = []
        for backend in destination.backends:
            if backend.problem:
                backends.append(None)
                continue
            key = backend.ref, sum(ref == backend.ref for ref, _ in self._balancers)  # two ports of one Service are two backends
            balancer = (before._balancers.get(key) if before else None) or Balancer(random)
            balancer.replace(backend.endpoints, now)
            self._balancers[key] = balancer
            backends.append(balancer)
        self._rules = [
            [_Rule(action, backends, self._budget((route.ref, number), before, now), random) for number, action in enumerate(route.actions)]
            for route in destination.routes
        ]
        self._table: RouteTable | None = None
        try:
            self._table = RouteTable([Route(route.ref, route.kind, route.hostnames, route.rules, ()) for route in destination.routes])
        except (InvalidPattern, MixedKinds):
            pass  # the controller admits no such thing; requests are refused rather than sent anywhere

    def _budget(self, rule: tuple[Ref, int], before: Routing | None, now: float) -> RetryBudget:
        budget = self._budgets[rule] = (before._budgets.get(rule) if before else None) or RetryBudget(now)
        return budget

    def choose(self, head: RequestHead) -> Way | Redirect | Cause:
        """Decide about one request: NO_ROUTE when no rule wants it, NO_BACKEND when its share leads nowhere."""
        table = self._table
        if table is None:
            return Cause.INTERNAL
        headers = head.values(table.header_names)
        key = head.method, head.target if table.reads_query else head.target.partition(b"?")[0], head.authority, headers
        try:
            rule = self._memo[key]
        except KeyError:
            rule = self._find(table, head, headers)
            if len(self._memo) >= _REMEMBERED:
                self._memo.clear()
            self._memo[key] = rule
        if rule is None:
            return Cause.NO_ROUTE
        if rule.redirect is not None:
            return location(rule.redirect, head, self._port)
        if not rule.sums:
            return Cause.NO_BACKEND
        at = bisect_right(rule.sums, self._random() * rule.sums[-1]) if len(rule.sums) > 1 else 0
        return rule.ways[min(at, len(rule.ways) - 1)] or Cause.NO_BACKEND

    def _find(self, table: RouteTable, head: RequestHead, headers: tuple[bytes | None, ...]) -> _Rule | None:
        path, query = lenient_target_untrusted(head.target)
        values = query_values(query, strict=False) if table.reads_query else {}
        fields = [None if value is None else joined(value) for value in headers]
        host = host_untrusted(head.authority) if table.reads_host else ""
        found = table.find(host, head.method.decode("latin-1"), path, values, fields)
        return self._rules[found.route_index][found.rule_index] if found else None


def location(redirect: wire.Redirect, head: RequestHead, port: int) -> Redirect | Cause:
    """Where a redirect sends a request that came to ``port`` (HTTPRequestRedirectFilter); BAD_REQUEST for a host of nonsense."""
    host = redirect.hostname or host_untrusted(head.authority)
    if not _HOST.fullmatch(host):
        return Cause.BAD_REQUEST
    scheme = redirect.scheme or "http"
    given = redirect.port or (_WELL_KNOWN[scheme] if redirect.scheme else port)
    authority = host if given == _WELL_KNOWN[scheme] else f"{host}:{given}"
    target = head.target if redirect.path is None else retargeted(redirect.path, redirect.prefix, head.target)
    return Redirect(redirect.status, f"{scheme}://{authority}/".encode("latin-1") + target.removeprefix(b"/"))


def retargeted(path: str, prefix: str | None, target: bytes) -> bytes:
    """``target`` with ``path`` in the place of its path, or of that prefix of it (HTTPPathModifier); the query stays.

    The prefix is counted in segments, not in bytes, because escapes can make the received one longer.
    """
    _, mark, query = target.partition(b"?")
    rest = ""
    if prefix is not None:
        segments = lenient_target_untrusted(target).path.split("/")[1:]
        rest = "".join(f"/{segment}" for segment in segments[len(prefix.rstrip("/").split("/")) - 1 :])
    made = path.rstrip("/") + rest if rest else path
    return b"/" + made.removeprefix("/").encode("latin-1") + mark + query


def _head_edit(action: Action, share: Share) -> HeadEdit:
    """The rule's changes, and the backend's applied to their result; in the response the other way round."""
    strip, add = _fields(action.edit, share.edit)
    retry_on = frozenset(action.retry.codes) if action.retry is not None else None
    response = ResponseRule(*_fields(share.response, action.response), retry_on)
    host, retarget = b"", None
    for rewrite in (action.rewrite, share.rewrite):
        if rewrite is not None:
            host = rewrite.hostname.encode() or host
            retarget = retarget if rewrite.path is None else partial(retargeted, rewrite.path, rewrite.prefix)
    edit = HeadEdit(strip, add, host, retarget, response if response != ResponseRule() else None)
    return edit if edit != UNTOUCHED else UNTOUCHED


def _fields(first: FieldEdit | None, second: FieldEdit | None) -> tuple[tuple[bytes, ...], tuple[tuple[bytes, bytes], ...]]:
    """Which fields to remove and which to add, for one edit after another."""
    strip: dict[bytes, None] = {}
    add: list[tuple[bytes, bytes]] = []
    for edit in (first, second):
        if edit is not None:
            removed = {name.encode() for name in edit.remove}
            strip |= dict.fromkeys(sorted(removed))
            add = [(name, value) for name, value in add if name not in removed]
            add += [(name.encode(), value.encode()) for name, value in edit.add]
    return tuple(strip), tuple(add)
