"""What the demo counts as failed, and how it reads in a log and on a narrow terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from cli.demo.calls import Call, Decision, Outcome, of_request, told
from cli.demo.show import Show

ALLOWED = Call("web", "cart", "GET", ("http",), "200", "authorizationpolicy shop/web")
DENIED = Call("web", "cart", "GET", ("http",), "403", why="admits cashier")
LET_IN = Decision("authorizationpolicy shop/web", "on httproute shop/basket", "spiffe://cluster.local/ns/shop/sa/web")
KEPT_OUT = Decision("", "no policy admits web: cashiers admits cashier only", "")


def show(width: int) -> tuple[Show, io.StringIO]:
    out = io.StringIO()
    return Show(Console(file=out, width=width)), out


@pytest.mark.parametrize(
    ("call", "outcome", "why"),
    [
        (ALLOWED, Outcome("200", "with note", LET_IN), ""),
        (ALLOWED, Outcome("403", "", LET_IN), "the caller saw 403"),
        (ALLOWED, Outcome("200", "empty", LET_IN), "does not hold what was sent"),
        (ALLOWED, Outcome("200", "with note", None), "say nothing about it"),
        (ALLOWED, Outcome("200", "with note", KEPT_OUT), "let in by nobody"),
        (DENIED, Outcome("403", "", KEPT_OUT), ""),
        (DENIED, Outcome("403", "", LET_IN), "let in by authorizationpolicy shop/web, not by nobody"),
        (DENIED, Outcome("403", "", Decision("", "other", "")), "does not say 'admits cashier'"),
    ],
)
def test_a_call_is_as_it_should_be_only_with_its_answer_and_its_reason(call: Call, outcome: Outcome, why: str) -> None:
    found = outcome.wrong(call, "note")
    assert (why in found) if why else not found


def test_the_reason_of_a_request_is_the_access_log_of_the_called_sidecar() -> None:
    lines = [
        {"event": "access", "direction": "outbound", "trace_id": "t"},
        {"event": "access", "direction": "inbound", "trace_id": "other", "authorization": "x"},
        {"event": "access", "direction": "inbound", "trace_id": "t", "authorization": "default d", "route": "httproute a/b"},
    ]
    found = of_request(lines, "t")
    assert found == Decision("default d", "on httproute a/b", "")
    assert told(found) == "allowed by default d on httproute a/b to a client without identity"
    assert told(Decision("", "because", "")) == "denied: because"


@pytest.mark.parametrize("width", [160, 80])
def test_every_line_that_can_fail_is_counted(width: int) -> None:
    shown, out = show(width)
    shown.check(True, "good")
    shown.check(False, "bad", "broken [red]")
    shown.table(("A", "WHY"), [(True, ("first", "fine"), ""), (False, ("second", "so"), "not so")])
    assert shown.checks == 4
    assert shown.failures == ["bad: broken [red]", "second: not so"]
    text = out.getvalue()
    assert (len(re.findall(r"\bok\b", text)), text.count("FAIL")) == (2, 2)
    assert "broken [red]" in text and "NOT AS IT SHOULD BE: not so" in text
    assert "\x1b" not in text
