"""What runs in the pods of `agent_lab`: a sidecar that relays, an app that tells who called, callers. Standard library only."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import threading

CALLER_LEVEL, CALLER_OPTION = 0x50, 1


def original_dst(sock):
    six = ":" in sock.getsockname()[0] and not sock.getsockname()[0].startswith("::ffff:")
    try:
        raw = sock.getsockopt(socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP, 80, 28 if six else 16)
    except OSError:
        ip, port = sock.getsockname()[:2]
        return ip.removeprefix("::ffff:"), port
    return socket.inet_ntop(socket.AF_INET6 if six else socket.AF_INET, raw[8:24] if six else raw[4:8]), struct.unpack("!H", raw[2:4])[0]


def listener(port):
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    sock.listen(256)
    return sock


def receive(sock):
    while True:
        try:
            return sock.recv(65536)
        except BlockingIOError:
            select.select([sock], [], [])  # a blocking recv() of an accelerated socket may say so after shutdown()


def pump(a, b):
    try:
        while data := receive(a):
            b.sendall(data)
        b.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def relay(client, target, caller):
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with client, socket.socket(family) as upstream:
        if caller:
            ip = caller[0].removeprefix("::ffff:")
            kind = socket.AF_INET6 if ":" in ip else socket.AF_INET
            value = struct.pack("=H", kind) + struct.pack("!H16s", caller[1], socket.inet_pton(kind, ip))
            try:
                upstream.setsockopt(CALLER_LEVEL, CALLER_OPTION, value)
            except OSError:
                pass
        upstream.connect(target)
        thread = threading.Thread(target=pump, args=(client, upstream))
        thread.start()
        pump(upstream, client)
        thread.join()


def accept(sock, inbound):
    while True:
        client, peer = sock.accept()
        try:
            target = original_dst(client)
            if target[1] in (4140, 4143) or target == (peer[0].removeprefix("::ffff:"), peer[1]):
                client.close()  # nobody was redirected, or conntrack took the answer for the question: the loop guards of the real sidecar
                print("refused", *target, flush=True)
                continue
        except OSError:
            client.close()
            continue
        threading.Thread(target=guarded, args=(client, target, peer if inbound else None), daemon=True).start()


def guarded(client, target, caller):
    try:
        relay(client, target, caller)
    except OSError:
        client.close()


def sidecar():
    for port, inbound in ((4140, False), (4143, True)):
        threading.Thread(target=accept, args=(listener(port), inbound), daemon=True).start()
    print("listening", flush=True)
    threading.Event().wait()


def serve(client, peer):
    file = client.makefile("rwb")
    while line := file.readline():
        said = {"accepted": peer[:2], "peername": client.getpeername()[:2], "said": line.decode().strip()}
        file.write(json.dumps(said).encode() + b"\n")
        file.flush()


def app(port):
    sock = listener(port)
    print("listening", flush=True)
    while True:
        client, peer = sock.accept()
        threading.Thread(target=serve, args=(client, peer), daemon=True).start()


def ask(sock, word):
    file = sock.makefile("rwb")
    file.write(word.encode() + b"\n")
    file.flush()
    return json.loads(file.readline())


def connect(ip, port, patience_s):
    return socket.create_connection((ip, port), timeout=patience_s)


def call(ip, port, count, patience_s=30):
    for number in range(count):
        found = {"peername": None, "error": ""}
        try:
            with connect(ip, port, patience_s) as sock:
                found |= {"peername": sock.getpeername()[:2], "own": sock.getsockname()[:2]}
                found |= ask(sock, f"word-{number}") | {"peername": found["peername"]}
        except (OSError, ValueError) as error:
            found["error"] = type(error).__name__
        print(json.dumps(found), flush=True)


def load(ip, port, patience_s=30):
    held = connect(ip, port, patience_s)
    ask(held, "begin")
    print("loading", flush=True)
    connections = failed = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        connections += 1
        try:
            with connect(ip, port, patience_s) as sock:
                ok = ask(sock, str(connections))["said"] == str(connections)
        except (OSError, ValueError):
            ok = False
        failed += not ok
    try:
        still = ask(held, "end")["said"] == "end"
    except (OSError, ValueError):
        still = False
    print(json.dumps({"connections": connections, "failed": failed, "held": still}), flush=True)


if __name__ == "__main__":
    role, *words = sys.argv[1:]
    if role == "sidecar":
        sidecar()
    elif role == "app":
        app(int(words[0]))
    elif role == "call":
        call(words[0], *map(int, words[1:3]), *map(float, words[3:]))
    else:
        load(words[0], int(words[1]), *map(float, words[2:]))
    os._exit(0)
