"""Mutual TLS connections to an inbound proxy, made by the load itself.

`python -m bench.load.mtls new HOST PORT FOLDER SNI ALPN THREADS SECONDS`: connections one after the other, one request each; prints JSON.
`python -m bench.load.mtls idle HOST PORT FOLDER SNI ALPN COUNT SECONDS MARKS`: opens COUNT connections, one request each, keeps them all;
writes MARKS/held when they are there, times requests on one more for SECONDS, writes MARKS/active.json, and closes when MARKS/release is.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

from bench.load.bulk import body_length, read_head
from bench.load.h2 import PATIENCE_S, summary
from bench.load.openloop import request


def context(folder: Path, alpn: str) -> ssl.SSLContext:
    """TLS 1.3 with the client's certificate; the server's chain is verified, its name is not in the way of measuring."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.check_hostname = False
    tls.load_verify_locations(folder / "ca.pem")
    tls.load_cert_chain(folder / "client.pem", folder / "client.key")
    tls.set_alpn_protocols([alpn])
    return tls


def connect(dial: tuple[str, int], tls: ssl.SSLContext, sni: str) -> ssl.SSLSocket:
    """One connection with its handshake done."""
    raw = socket.create_connection(dial, timeout=PATIENCE_S)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return tls.wrap_socket(raw, server_hostname=sni)


def ask(link: ssl.SSLSocket, number: int) -> str:
    """One request; empty when it was answered with 200."""
    link.sendall(request(number))
    head, early = read_head(link)
    if not head.startswith(b"HTTP/1.1 200"):
        return f"answer {head[:30]!r}"
    left = body_length(head) - early
    while left > 0:
        data = link.recv(left)
        if not data:
            return "closed by peer within a body"
        left -= len(data)
    return ""


def new(dial: tuple[str, int], tls: ssl.SSLContext, sni: str, threads: int, seconds: float) -> dict[str, object]:
    """Connect, ask, close, again."""
    latencies: list[float] = []
    failed: list[str] = []
    start = time.perf_counter()

    def loop() -> None:
        number = 0
        while number == 0 or time.perf_counter() < start + seconds:
            began = time.perf_counter()
            number += 1
            try:
                with connect(dial, tls, sni) as link:
                    problem = ask(link, number)
            except OSError as error:
                problem = str(error)
            if problem:
                failed.append(problem)
                if len(failed) > 100:
                    return
            else:
                latencies.append(time.perf_counter() - began)

    workers = [threading.Thread(target=loop) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return summary(sorted(latencies), failed, time.perf_counter() - start)


def idle(dial: tuple[str, int], tls: ssl.SSLContext, sni: str, count: int, seconds: float, marks: Path) -> None:
    """Hold ``count`` connections that have each carried one request."""
    failed: list[str] = []
    links = []
    for number in range(count):
        try:
            link = connect(dial, tls, sni)
            if problem := ask(link, number):
                failed.append(problem)
            links.append(link)
        except OSError as error:
            failed.append(str(error))
            if len(failed) > 100:
                break
    (marks / "held").write_text(str(len(links)))
    latencies: list[float] = []
    stop = time.perf_counter() + seconds
    try:
        with connect(dial, tls, sni) as link:
            while (began := time.perf_counter()) < stop:
                if problem := ask(link, len(latencies)):
                    failed.append(problem)
                    break
                latencies.append(time.perf_counter() - began)
    except OSError as error:
        failed.append(str(error))
    (marks / "active.part").write_text(json.dumps(summary(sorted(latencies), failed, seconds)))
    (marks / "active.part").rename(marks / "active.json")
    while not (marks / "release").exists():
        time.sleep(0.05)
    for link in links:
        link.close()
    (marks / "closed").touch()


if __name__ == "__main__":
    mode, host, port, folder, sni, alpn, count, seconds, *rest = sys.argv[1:]
    dial, tls = (host, int(port)), context(Path(folder), alpn)
    if mode == "new":
        print(json.dumps(new(dial, tls, sni, int(count), float(seconds))))
    else:
        idle(dial, tls, sni, int(count), float(seconds), Path(rest[0]))
