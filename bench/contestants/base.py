"""What every contestant is asked to do, in terms that all of them understand.

`Setup` says what the pair carries; a contestant turns it into its own configuration. Called by `bench.scenarios`; knows no load tool.
"""

from __future__ import annotations

import http.client
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from bench.certs import Certificates
from bench.peers import Peers
from bench.stage import Pinning, Proc, Stage, wait_until

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

AppProtocol = Literal["http1", "http2", "opaque"]


@dataclass(frozen=True)
class Rule:
    """One allowed combination: requests of ``method`` whose path starts with ``prefix``, from the client's identity only."""

    method: str
    prefix: str


API_RULES = (
    Rule("GET", "/api/users/"),
    Rule("GET", "/api/orders/"),
    Rule("GET", "/api/carts/"),
    Rule("GET", "/api/items/"),
    Rule("GET", "/api/search/"),
    Rule("POST", "/api/events/"),
)
GRPC_RULES = (
    Rule("POST", "/shop.Catalog/"),
    Rule("POST", "/shop.Cart/"),
    Rule("POST", "/shop.Orders/"),
    Rule("GET", "/api/users/"),
    Rule("GET", "/api/orders/"),
    Rule("GET", "/api/items/"),
)
BULK_RULES = (
    Rule("GET", "/blob/"),
    Rule("PUT", "/blob/"),
    Rule("POST", "/blob/"),
    Rule("GET", "/api/users/"),
    Rule("GET", "/api/orders/"),
    Rule("GET", "/api/items/"),
)


def grown_rules(count: int) -> tuple[Rule, ...]:
    """``count`` rules for P12. One rule covers all of the work; from 10 on the six real ones stand spread among never-matching ones."""
    if count < len(API_RULES):
        return (Rule("GET", "/api/"),)
    every = count // len(API_RULES)
    rules: list[Rule] = []
    real = iter(API_RULES)
    for index in range(count):
        here = next(real, None) if index % every == every - 1 else None
        rules.append(here or Rule("GET", f"/svc{index:04}/things/"))
    return tuple(rules)


@dataclass(frozen=True)
class Setup:
    """What the pair carries.

    app: what client and server speak. rules: what the inbound proxy allows, by identity, method and path prefix (opaque: by identity
    alone). endpoints: addresses behind the service. inbound_only: no outbound proxy, the load itself speaks mutual TLS.
    """

    app: AppProtocol = "http1"
    rules: tuple[Rule, ...] = API_RULES
    endpoints: int = 1
    inbound_only: bool = False


@dataclass
class Running:
    """A started pair.

    dial: where the load goes. proxies: whose CPU and memory count, by role. ready_s: seconds from exec to ready, by role.
    alpn: what a client that speaks mutual TLS to the inbound proxy offers for HTTP/1.1. warm: whether it has carried load.
    redirected: where an agent leads the pair, how many messages of each pod went past TCP.
    """

    dial: tuple[str, int]
    proxies: dict[str, Proc]
    ready_s: dict[str, float]
    alpn: str = "http/1.1"
    warm: bool = False
    redirected: Callable[[], dict[str, int]] | None = None


@dataclass(frozen=True)
class Context:
    """What a contestant may use."""

    peers: Peers
    certs: Certificates
    workdir: Path
    pinning: Pinning


class Contestant(Protocol):
    """One column of the result table."""

    name: str

    def missing(self, setup: Setup) -> str | None:
        """Why this contestant cannot take part in such a round (a sentence), or None when it can."""

    def start(self, context: Context, stage: Stage, setup: Setup) -> Running:
        """Start both proxies and return once they are ready; raises StageError. The caller closes the stage, which ends them."""


def render(template: str, **values: object) -> str:
    """Fill a template of bench/configs; raises KeyError for a placeholder without value."""
    return string.Template((CONFIGS / template).read_text()).substitute({name: str(value) for name, value in values.items()})


def http_ok(host: str, port: int, path: str, timeout_s: float = 0.5) -> bool:
    """Whether a GET answers 200; the caller is already in the right namespace."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_ready(stage: Stage, proc: Proc, role: str, path: str, port: int, timeout_s: float = 20) -> float:
    """Wait for a proxy's readiness answer; returns seconds since this call."""
    pod = stage.client if role == "outbound" else stage.server
    with pod.inside():
        return wait_until(lambda: http_ok("127.0.0.1", port, path), f"{proc.name} ready", timeout_s, [proc])
