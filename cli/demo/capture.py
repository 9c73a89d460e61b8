"""A child process that writes down every packet on the pods' links: ``python -m cli.demo.capture PID FILE``.

PID is the local runner: its network namespace is the node, where all links end. Says ``capturing`` once it does; ends when its standard
input does, with one JSON line: packets seen, packets the kernel had to drop. Started by cli.demo.evidence. Needs no tcpdump.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time

from cli.demo.wire import PCAP_PACKET, PCAP_RAW_HEADER
from local import namespaces

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_RCVBUFFORCE = 33
_PACKET_BYTES_MAX = 1 << 17  # a veth link carries segments that were never cut to size
_BUFFER_BYTES = 64 << 20
_LINKS = "pod"  # how local.network names the node's ends


def main() -> None:
    """Enter, capture, tell."""
    pid, path = int(sys.argv[1]), sys.argv[2]
    _enter(pid)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL)) as packets, open(path, "wb") as file:
        for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
            try:
                packets.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
                break
            except PermissionError:
                continue  # not the machine's root: as much as the system allows everybody
        packets.setblocking(False)
        file.write(PCAP_RAW_HEADER)
        print("capturing", flush=True)
        count = 0
        while True:
            ready, _, _ = select.select([packets, sys.stdin], [], [])
            count += _drain(packets, file.write)
            if sys.stdin in ready:
                break
        statistics = packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        print(json.dumps({"packets": count, "dropped": struct.unpack("II", statistics)[1]}))


def _enter(pid: int) -> None:
    """The runner's user namespace when it has its own (rootless), then its network namespace."""
    names = ["net"] if os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user") else ["user", "net"]
    with namespaces.namespace_fds(pid, names) as fds:
        for fd in fds:
            namespaces.setns(fd)


def _drain(packets: socket.socket, write: object) -> int:
    count = 0
    while True:
        try:
            data, address = packets.recvfrom(_PACKET_BYTES_MAX)
        except BlockingIOError:
            return count
        if str(address[0]).startswith(_LINKS):
            now = time.time()
            head = PCAP_PACKET.pack(int(now), int(now % 1 * 1e6), len(data), len(data))
            write(head + data)  # type: ignore[operator]
            count += 1


if __name__ == "__main__":
    main()
