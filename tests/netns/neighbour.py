"""A machine on the same network segment as a pod, with its own idea of TCP: it writes any destination into packets it hands to the pod.

Bridge CNIs put all pods of a node on one segment; there a pod with CAP_NET_RAW can do this to every other one.
"""

from __future__ import annotations

import fcntl
import itertools
import socket
import struct
import subprocess
import time

from arena import Arena

_SIOCGIFHWADDR = 0x8927
SYN, RST, PUSH_ACK, SYN_ACK = 0x02, 0x04, 0x18, 0x12


class Neighbour:
    """At the node's end of a pod's link."""

    _first_ports = itertools.count(40000, 100)  # what an earlier neighbour left open is answered again and again
    IP = "10.142.0.250"  # of no pod: what is sent to it passes this end of the link

    def __init__(self, arena: Arena, workload: str) -> None:
        pod = arena.pid(workload)
        self._pod_mac = arena.inside(pod, lambda: _mac("eth0"))
        self._sock = arena.inside(arena.runner_pid(), lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)))
        self._sock.bind((_link_to(arena, arena.ip(workload)), 0x0800))
        self._sock.settimeout(0.2)
        self._own_mac = self._sock.getsockname()[4]
        self._port = next(Neighbour._first_ports)
        self._node = ["nsenter", "-t", str(arena.runner_pid()), "-n", "ip", "route"]
        # or the node would tell the pod by ICMP that nobody has this address, which ends a connection that begins
        subprocess.run([*self._node, "replace", "blackhole", self.IP], check=True)

    def close(self) -> None:
        """Gone from the segment."""
        self._sock.close()
        subprocess.run([*self._node, "del", "blackhole", self.IP], check=True)

    def ask(self, dst: str, port: int, data: bytes, wait_s: float = 1.0) -> bytes:
        """What an established connection to ``dst`` answers, handed to the pod whatever ``dst`` is."""
        self._port += 1
        self._sock.send(self._frame(dst, port, 1000, 0, SYN))
        answer, deadline = b"", time.monotonic() + wait_s
        while time.monotonic() < deadline:
            try:
                frame = self._sock.recv(1 << 16)
            except TimeoutError:
                continue
            if frame[23] != 6 or frame[30:34] != socket.inet_aton(self.IP):
                continue
            length = struct.unpack("!H", frame[16:18])[0]
            segment = frame[34 : 14 + length]
            _, to, seq, _, offset, flags = struct.unpack("!HHIIBB", segment[:14])
            if to != self._port:
                continue
            if flags & SYN_ACK == SYN_ACK:
                self._sock.send(self._frame(dst, port, 1001, seq + 1, PUSH_ACK, data))
            answer += segment[(offset >> 4) * 4 :]
            if answer or flags & RST:
                break
        return answer

    def _frame(self, dst: str, port: int, seq: int, ack: int, flags: int, data: bytes = b"") -> bytes:
        ends = socket.inet_aton(self.IP) + socket.inet_aton(dst)
        tcp = struct.pack("!HHIIBBHHH", self._port, port, seq, ack, 5 << 4, flags, 65535, 0, 0)
        check = _checksum(ends + struct.pack("!BBH", 0, 6, len(tcp) + len(data)) + tcp + data)
        tcp = tcp[:16] + struct.pack("!H", check) + tcp[18:] + data
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + ends
        ip = ip[:10] + struct.pack("!H", _checksum(ip)) + ip[12:]
        return bytes(self._pod_mac) + bytes(self._own_mac) + b"\x08\x00" + ip + tcp


def _link_to(arena: Arena, ip: str) -> str:
    words = ["nsenter", "-t", str(arena.runner_pid()), "-n", "ip", "-o", "route", "get", ip]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split(" dev ")[1].split()[0]


def _mac(link: str) -> bytes:
    with socket.socket() as sock:
        return fcntl.ioctl(sock, _SIOCGIFHWADDR, struct.pack("256s", link.encode()))[18:24]


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
