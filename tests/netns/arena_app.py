"""The app behind the attacked sidecar: believes everything, remembers everything. Run in a pod, as ``python arena_app.py``.

8080 and 8083 speak HTTP/1.1, upgrades to ``echo`` included, and remember the head of every request they see; 8081 echoes bytes and
remembers them; 8082 speaks HTTP/2 (prior knowledge); 127.0.0.1:9999 is what nobody outside the pod may reach. ``GET /seen`` over loopback
tells what 8080 saw.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
import time

import h2.config
import h2.connection
import h2.events

SEEN: list[str] = []


def answer(status: str, body: bytes, *, close: bool = False) -> bytes:
    ending = "connection: close\r\n" if close else ""
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n{ending}\r\n".encode() + body


class Recorder(socketserver.StreamRequestHandler):
    """HTTP/1.1 with the least of checks: what a sidecar lets through, this app acts on."""

    def handle(self) -> None:
        while True:
            head = self._head()
            if not head:
                return
            lines = head.decode("latin-1").split("\r\n")
            method, target = [*lines[0].split(" "), "", ""][:2]
            if target == "/seen":
                self.wfile.write(answer("200 OK", json.dumps(SEEN).encode()))
                continue
            SEEN.append(head.decode("latin-1"))
            fields = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
            if dict(fields).get("upgrade") == "echo":
                self._echo()
                return
            self._body(dict(fields))
            self._say(target, fields, method)

    def _echo(self) -> None:
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        while data := self.rfile.read1(1 << 16):
            self.wfile.write(data)

    def _head(self) -> bytes:
        head = b""
        while line := self.rfile.readline(1 << 16):
            if line == b"\r\n":
                return head.removesuffix(b"\r\n") or self._head()
            head += line
        return b""

    def _body(self, fields: dict[str, str]) -> None:
        if "chunked" in fields.get("transfer-encoding", "").lower():
            while (size := int(self.rfile.readline().split(b";")[0], 16)) > 0:
                self.rfile.read(size + 2)
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
        elif fields.get("content-length", "").isdigit():
            self.rfile.read(int(fields["content-length"]))

    def _say(self, target: str, fields: list[tuple[str, str]], method: str) -> None:
        if "/big" in target:
            size = int(target.rpartition("=")[2])
            self.wfile.write(f"HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n".encode())
            while size > 0:
                size -= self.request.send(b"b" * min(size, 1 << 16))
            return
        if "/slow" in target:
            time.sleep(0.3)
        told = {"pod": os.environ["HOSTNAME"], "peer": self.client_address[0], "target": target, "fields": fields}
        self.wfile.write(answer("200 OK", b"" if method == "HEAD" else json.dumps(told).encode()))


class Echo(socketserver.BaseRequestHandler):
    """Opaque bytes."""

    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            SEEN.append("opaque " + data.decode("latin-1"))
            self.request.sendall(data)


class Http2(socketserver.BaseRequestHandler):
    """Answers each stream with the fields it got."""

    def handle(self) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        self.request.sendall(connection.data_to_send())
        while data := self.request.recv(1 << 16):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    SEEN.append("h2 " + json.dumps(event.headers))
                    connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/json")])
                    connection.send_data(event.stream_id, json.dumps({"fields": event.headers}).encode(), end_stream=True)
            self.request.sendall(connection.data_to_send())


class Private(socketserver.BaseRequestHandler):
    """Bound to loopback: a debugger, a metrics port, a database of the pod's own."""

    def handle(self) -> None:
        self.request.sendall(b"PRIVATE\r\n")


class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128


class LoopbackServer(Server):
    address_family = socket.AF_INET


if __name__ == "__main__":
    servers: list[socketserver.TCPServer] = [
        Server(("::", 8080), Recorder),
        Server(("::", 8081), Echo),
        Server(("::", 8082), Http2),
        Server(("::", 8083), Recorder),
        LoopbackServer(("127.0.0.1", 9999), Private),
    ]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Event().wait()
