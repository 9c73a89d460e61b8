"""docs/routing.md is true: its manifest is understood as it says, and its tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import policy_lab as lab
import yaml
from policy_lab import indexed, parsed

from core.k8s.manifests import read_manifests
from policy import wire
from policy.gateway import InboundRoute, read_http_route
from policy.index import routing
from policy.status import CONTROLLER
from proxy.rescue import Cause, effect

PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_is_applied_whole() -> None:
    block, _ = BLOCKS
    services = [lab.service("cart"), lab.service("cart-v1", "10.96.0.2"), lab.service("cart-v2", "10.96.0.3")]
    (raw,) = read_manifests(block.encode(), is_json=False)
    route = parsed(dict(raw))
    assert isinstance(route, InboundRoute) and route.forwarding is not None and not route.forwarding.unsupported
    index = indexed(*services, dict(raw))
    assert all(routing.unresolved(index.store, one) == ("", "") for rule in route.forwarding.rules for one in rule.references)
    found = index.destination("10.96.0.1:80")
    assert [[share.weight for share in action.shares] for action in found.routes[0].actions] == [[1], [90, 10]]


def test_the_example_of_retries_is_applied_and_its_defaults_are_the_codes() -> None:
    (rule,) = yaml.safe_load(BLOCKS[1])["rules"]
    route = read_http_route(lab.route("web", parent={"group": "", "kind": "Service", "name": "cart"}, **rule))
    assert route.forwarding is not None and not route.forwarding.unsupported
    (read,) = route.forwarding.rules
    assert (read.retry, read.timeouts) == (wire.Retry((502, 503), 2, 0.1), wire.Timeouts(10.0, 2.0))
    default = wire.Retry()
    assert f"| times besides the first; {default.attempts} by default, 100 at most." in PAGE
    assert f"the shortest pause, {default.backoff_s * 1000:.0f} ms by default" in PAGE


def test_the_answers_are_the_sidecars() -> None:
    for status, word in re.findall(r"\| (\d{3}) `([a-z-]+)` \|", PAGE):
        assert effect(Cause(word)).status == int(status)
    assert CONTROLLER in PAGE
