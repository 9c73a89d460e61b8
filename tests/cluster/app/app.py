"""The app of the cluster tests, in the image localhost/pillion-app: a server that says what it sees, a caller, and a load.

app.py serve [--http PORT[,PORT]] [--tcp PORT] [--drain SECONDS]      HTTP/1.1 that answers JSON; TCP that greets, then echoes
app.py call URL [--method M] [--header 'A: b'] [--timeout S]          one request; its outcome as one line of JSON, exit code 0
app.py tcp HOST PORT [--say TEXT]                                     one TCP connection: its own address, and the greeting
app.py load URL [--seconds S] [--workers N] [--fresh]                 requests until the end; totals as one line of JSON
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENDING = threading.Event()


class Answers(BaseHTTPRequestHandler):
    """Every path answers what the server saw; /status/503 answers 503, /delay/250 after 250 ms, /ready 503 once the pod is ending."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        parts = self.path.strip("/").split("/")
        status = 200
        if parts[0] == "status":
            status = int(parts[1])
        elif parts[0] == "delay":
            time.sleep(int(parts[1]) / 1000)
        elif parts[0] == "ready" and ENDING.is_set():
            status = 503
        seen = {
            "pod": os.environ.get("HOSTNAME", ""),
            "peer": self.client_address[0],
            "local": list(self.connection.getsockname()[:2]),
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.decode("latin-1"),
        }
        answer = json.dumps(seen).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the names that http.server looks for

    def log_message(self, *_: Any) -> None:
        pass


class Web(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Greets(socketserver.StreamRequestHandler):
    """Speaks first, as databases and mail servers do."""

    def handle(self) -> None:
        self.wfile.write(f"220 {os.environ.get('HOSTNAME', '')} {self.client_address[0]}\n".encode())
        for line in self.rfile:
            self.wfile.write(line)


class Tcp(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class Healthy(socketserver.BaseRequestHandler):
    """gRPC by hand: every call is answered as grpc.health.v1.Health/Check answers SERVING."""

    def handle(self) -> None:
        from h2.config import H2Configuration
        from h2.connection import H2Connection
        from h2.events import StreamEnded

        connection = H2Connection(H2Configuration(client_side=False))
        connection.initiate_connection()
        self.request.sendall(connection.data_to_send())
        while received := self.request.recv(65536):
            for event in connection.receive_data(received):
                if isinstance(event, StreamEnded):
                    connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                    connection.send_data(event.stream_id, b"\0\0\0\0\2\x08\1")
                    connection.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
            self.request.sendall(connection.data_to_send())


def serve(options: argparse.Namespace) -> int:
    """Until SIGTERM; then still ``drain`` seconds, not ready, as an app does that lets its callers go elsewhere."""
    signal.signal(signal.SIGTERM, lambda *_: ENDING.set())
    servers: list[socketserver.BaseServer] = [Web(("", int(port)), Answers) for port in options.http.split(",") if port]
    if options.tcp:
        servers.append(Tcp(("", options.tcp), Greets))
    if options.grpc:
        servers.append(type("Grpc", (Tcp,), {})(("", options.grpc), Healthy))
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    print("serving", flush=True)
    ENDING.wait()
    time.sleep(options.drain)
    return 0


def request(url: str, method: str = "GET", headers: dict[str, str] | None = None, timeout: float = 5, kept: Any = None) -> dict[str, Any]:
    """One exchange; never raises: the outcome says ``status`` and ``body``, or ``error``."""
    parts = urllib.parse.urlsplit(url)
    connection = kept or http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request(method, target, headers=headers or {})
        response = connection.getresponse()
        text = response.read().decode("utf-8", "replace")
        outcome: dict[str, Any] = {
            "status": response.status,
            "headers": {name.lower(): value for name, value in response.getheaders()},
            "text": text,
        }
        if response.headers.get_content_type() == "application/json":
            outcome["body"] = json.loads(text)
        return outcome
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if kept is None:
            connection.close()


def call(options: argparse.Namespace) -> int:
    headers = dict(line.split(": ", 1) for line in options.header)
    outcome = request(options.url, options.method, headers, options.timeout)
    print(json.dumps(outcome))
    return 0 if options.expect in (0, outcome.get("status")) else 1


def grpc(options: argparse.Namespace) -> int:
    from h2.connection import H2Connection
    from h2.events import ResponseReceived, StreamEnded, StreamReset, TrailersReceived

    outcome: dict[str, Any] = {}
    try:
        with socket.create_connection((options.host, options.port), timeout=5) as peer:
            connection = H2Connection()
            connection.initiate_connection()
            pseudo = [(":method", "POST"), (":scheme", "http"), (":authority", options.host), (":path", options.path)]
            connection.send_headers(1, [*pseudo, ("content-type", "application/grpc"), ("te", "trailers")])
            connection.send_data(1, b"\0\0\0\0\0", end_stream=True)
            while "ended" not in outcome:
                peer.sendall(connection.data_to_send())
                received = peer.recv(65536)
                if not received:
                    raise OSError("the connection ended")
                for event in connection.receive_data(received):
                    if isinstance(event, ResponseReceived | TrailersReceived):
                        outcome.update({name.decode(): value.decode() for name, value in event.headers})
                    elif isinstance(event, StreamEnded | StreamReset):
                        outcome["ended"] = type(event).__name__
    except OSError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(outcome))
    return 0


def tcp(options: argparse.Namespace) -> int:
    outcome: dict[str, Any] = {}
    try:
        with socket.create_connection((options.host, options.port), timeout=options.timeout) as connection:
            reader = connection.makefile("rwb")
            outcome["own"] = connection.getsockname()[0]
            outcome["greeting"] = reader.readline().decode()
            if options.say:
                reader.write(options.say.encode() + b"\n")
                reader.flush()
                outcome["echo"] = reader.readline().decode().rstrip("\n")
    except OSError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(outcome))
    return 0


def load(options: argparse.Namespace) -> int:
    """``workers`` callers, each one request after the other, connections kept unless ``fresh``; a failure is no answer, or not a 200."""
    totals: Counter[str] = Counter()
    pods: Counter[str] = Counter()
    failures: list[str] = []
    end = time.monotonic() + options.seconds
    signal.signal(signal.SIGTERM, lambda *_: ENDING.set())

    def work() -> None:
        parts = urllib.parse.urlsplit(options.url)
        patience = 30  # a machine that stalls for seconds fails no request
        kept = None if options.fresh else http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=patience)
        while time.monotonic() < end and not ENDING.is_set():
            began = time.time()
            outcome = request(options.url, timeout=patience, kept=kept)
            totals["calls"] += 1
            if outcome.get("status") == 200:
                pods[(outcome.get("body") or {}).get("pod", "")] += 1
            else:
                totals["failed"] += 1
                why = (outcome.get("headers") or {}).get("pillion-proxy-error", "")
                what = outcome.get("error") or f"{outcome.get('status')} {why} {outcome.get('text', '')[:200]}"
                failures.append(f"{time.time():.3f} after {time.time() - began:.3f} s: {what}")
            time.sleep(options.pause / 1000)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(json.dumps({"calls": totals["calls"], "failed": totals["failed"], "pods": pods, "failures": failures[:20]}), flush=True)
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    ways = parser.add_subparsers(required=True)
    way = ways.add_parser("serve")
    way.set_defaults(act=serve)
    way.add_argument("--http", default="8080")
    way.add_argument("--tcp", type=int, default=0)
    way.add_argument("--grpc", type=int, default=0)
    way.add_argument("--drain", type=float, default=0)
    way = ways.add_parser("call")
    way.set_defaults(act=call)
    way.add_argument("url")
    way.add_argument("--method", default="GET")
    way.add_argument("--header", action="append", default=[])
    way.add_argument("--timeout", type=float, default=5)
    way.add_argument("--expect", type=int, default=0)
    way = ways.add_parser("grpc")
    way.set_defaults(act=grpc)
    way.add_argument("host")
    way.add_argument("port", type=int)
    way.add_argument("path")
    way = ways.add_parser("tcp")
    way.set_defaults(act=tcp)
    way.add_argument("host")
    way.add_argument("port", type=int)
    way.add_argument("--say", default="")
    way.add_argument("--timeout", type=float, default=5)
    way = ways.add_parser("load")
    way.set_defaults(act=load)
    way.add_argument("url")
    way.add_argument("--seconds", type=float, default=10)
    way.add_argument("--workers", type=int, default=2)
    way.add_argument("--fresh", action="store_true")
    way.add_argument("--pause", type=float, default=10, help="milliseconds between two requests of a worker")
    options = parser.parse_args(arguments)
    act: Any = options.act
    return int(act(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
