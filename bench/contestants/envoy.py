"""Envoy as the sidecar pair, one worker each: bench/configs/envoy-*.yaml filled in.

Written out in full here are only the parts whose number varies: endpoints and RBAC policies.
"""

from __future__ import annotations

import json

from bench.certs import dns_name, spiffe
from bench.contestants.base import Context, Rule, Running, Setup, render, wait_ready
from bench.stage import APP_PORT, INBOUND_PORT, OUTBOUND_PORT, PROXY_UID, SERVICE_IP, SERVICE_PORT, Proc, Stage

ADMIN_PORT = 19_000
_HTTP1 = "{ http_protocol_options: {} }"
_HTTP2 = "{ http2_protocol_options: { max_concurrent_streams: 1000 } }"


def endpoints_json(ips: tuple[str, ...]) -> str:
    """``lb_endpoints`` as JSON, which is YAML too."""
    return json.dumps([{"endpoint": {"address": {"socket_address": {"address": ip, "port_value": APP_PORT}}}} for ip in ips])


def policies_json(rules: tuple[Rule, ...], identity: str | None) -> str:
    """One RBAC policy for each rule: method and path prefix, from one authenticated identity (None: from anyone)."""
    principal = {"any": True} if identity is None else {"authenticated": {"principal_name": {"exact": identity}}}
    return json.dumps(
        {
            f"rule-{index:04}": {
                "permissions": [
                    {
                        "and_rules": {
                            "rules": [
                                {"header": {"name": ":method", "string_match": {"exact": rule.method}}},
                                {"url_path": {"path": {"prefix": rule.prefix}}},
                            ]
                        }
                    }
                ],
                "principals": [principal],
            }
            for index, rule in enumerate(rules)
        }
    )


class Envoy:
    """``between`` is what the two proxies speak with each other when the app speaks HTTP/1.1."""

    def __init__(self, name: str = "envoy", between: str = "http1") -> None:
        self.name = name
        self.between = between

    def missing(self, setup: Setup) -> str | None:
        """The HTTP/2-between variant exists for HTTP/1.1 apps through the pair only."""
        if self.between == "http2" and (setup.app != "http1" or setup.inbound_only):
            return "differs from envoy only for HTTP/1.1 apps through the pair"
        return None

    def configs(self, context: Context, stage: Stage, setup: Setup) -> dict[str, str]:
        """Configuration text by role."""
        peer_h2 = setup.app == "http2" or self.between == "http2"
        suffix = "-tcp" if setup.app == "opaque" else ""
        shared = {"admin_port": ADMIN_PORT, "ca": context.certs.ca}
        outbound = render(
            f"envoy-outbound{suffix}.yaml",
            **shared,
            listen_port=OUTBOUND_PORT,
            endpoints=endpoints_json(stage.endpoints),
            sni=dns_name("server"),
            peer_identity=spiffe("server"),
            cert=context.certs.chain("client"),
            key=context.certs.key("client"),
            alpn="h2" if peer_h2 else "http/1.1",
            upstream_protocol=_HTTP2 if peer_h2 else _HTTP1,
        )
        inbound = render(
            f"envoy-inbound{suffix}.yaml",
            **shared,
            listen_port=INBOUND_PORT,
            cert=context.certs.chain("server"),
            key=context.certs.key("server"),
            policies=policies_json(setup.rules, spiffe("client")),
            client_identity=spiffe("client"),
            app_ip=stage.endpoints[0],
            app_port=APP_PORT,
            upstream_protocol=_HTTP2 if setup.app == "http2" else _HTTP1,
        )
        return {"inbound": inbound} if setup.inbound_only else {"outbound": outbound, "inbound": inbound}

    def start(self, context: Context, stage: Stage, setup: Setup) -> Running:
        """Redirect as in the mesh, start both, wait for their readiness."""
        binary = context.peers.envoy
        assert binary is not None
        stage.redirect(outbound=not setup.inbound_only)
        proxies: dict[str, Proc] = {}
        ready: dict[str, float] = {}
        for role, text in self.configs(context, stage, setup).items():
            path = stage.workdir / f"envoy-{role}.yaml"
            path.write_text(text)
            pod = stage.client if role == "outbound" else stage.server
            command = [str(binary), "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
            proc = pod.spawn(f"envoy-{role}", command, uid=PROXY_UID, cores=context.pinning.proxy(role), cwd=stage.workdir)
            ready[role] = wait_ready(stage, proc, role, "/ready", ADMIN_PORT)
            proxies[role] = proc
        dial = (stage.endpoints[0], APP_PORT) if setup.inbound_only else (SERVICE_IP, SERVICE_PORT)
        return Running(dial, proxies, ready)
