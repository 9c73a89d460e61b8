"""HAProxy as the sidecar pair, one thread each: bench/configs/haproxy-*.cfg filled in.

HAProxy 2.6 reads no URI SAN, so the server is verified by its DNS SAN and the client by its common name.
"""

from __future__ import annotations

from bench.certs import dns_name
from bench.contestants.base import Context, Rule, Running, Setup, render, wait_ready
from bench.stage import APP_PORT, INBOUND_PORT, OUTBOUND_PORT, PROXY_UID, SERVICE_IP, SERVICE_PORT, Proc, Stage

ADMIN_PORT = 19_000
_HTTP_DEFAULTS = "  option http-keep-alive\n  http-reuse always\n"


def acl_lines(rules: tuple[Rule, ...], account: str) -> str:
    """Deny who is not the client, allow what a rule names, deny the rest."""
    lines = [f"  http-request deny deny_status 403 unless {{ ssl_c_s_dn(cn) -m str {account} }}"]
    lines += [f"  http-request allow if {{ method {rule.method} }} {{ path_beg {rule.prefix} }}" for rule in rules]
    return "\n".join([*lines, "  http-request deny deny_status 403"])


class Haproxy:
    """HTTP/1.1, HTTP/2 or TCP, the same on all three legs."""

    name = "haproxy"

    def missing(self, setup: Setup) -> str | None:
        """Takes part in everything."""
        return None

    def configs(self, context: Context, stage: Stage, setup: Setup) -> dict[str, str]:
        """Configuration text by role."""
        opaque, http2 = setup.app == "opaque", setup.app == "http2"
        shared: dict[str, object] = {
            "workdir": stage.workdir,
            "mode": "tcp" if opaque else "http",
            "admin_port": ADMIN_PORT,
            "http_defaults": "" if opaque else _HTTP_DEFAULTS,
            "ca": context.certs.ca,
        }
        pool = "" if opaque else " pool-max-conn -1 max-reuse -1"
        alpn = "" if opaque else " alpn h2 proto h2" if http2 else " alpn http/1.1"
        servers = "\n".join(
            f"  server peer{index} {ip}:{APP_PORT} ssl crt {context.certs.both('client')} ca-file {context.certs.ca} verify required"
            f" verifyhost {dns_name('server')} sni str({dns_name('server')}) no-ssl-reuse{alpn}{pool}"
            for index, ip in enumerate(stage.endpoints)
        )
        outbound = render(
            "haproxy-outbound.cfg", **shared, listen_port=OUTBOUND_PORT, bind_options="proto h2" if http2 else "", servers=servers
        )
        inbound = render(
            "haproxy-inbound.cfg",
            **shared,
            listen_port=INBOUND_PORT,
            cert=context.certs.both("server"),
            bind_options="" if opaque else "alpn h2" if http2 else "alpn http/1.1",
            rules="  tcp-request content reject unless { ssl_c_s_dn(cn) -m str client }" if opaque else acl_lines(setup.rules, "client"),
            app_ip=stage.endpoints[0],
            app_port=APP_PORT,
            server_options=("proto h2" if http2 else "") + pool,
        )
        return {"inbound": inbound} if setup.inbound_only else {"outbound": outbound, "inbound": inbound}

    def start(self, context: Context, stage: Stage, setup: Setup) -> Running:
        """Redirect as in the mesh, start both, wait for their readiness."""
        stage.redirect(outbound=not setup.inbound_only)
        proxies: dict[str, Proc] = {}
        ready: dict[str, float] = {}
        for role, text in self.configs(context, stage, setup).items():
            path = stage.workdir / f"haproxy-{role}.cfg"
            path.write_text(text)
            pod = stage.client if role == "outbound" else stage.server
            command = [str(context.peers.haproxy), "-db", "-f", str(path)]
            proc = pod.spawn(f"haproxy-{role}", command, uid=PROXY_UID, cores=context.pinning.proxy(role), cwd=stage.workdir)
            ready[role] = wait_ready(stage, proc, role, "/ready", ADMIN_PORT)
            proxies[role] = proc
        dial = (stage.endpoints[0], APP_PORT) if setup.inbound_only else (SERVICE_IP, SERVICE_PORT)
        return Running(dial, proxies, ready)
