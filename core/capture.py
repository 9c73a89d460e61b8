"""What sidecar and capture agree on: how the sidecar names the real caller, asks how much its app has not read, and proves capture. Pure.

Caller: the sidecar sets a private socket option before it dials the app. Where the node's eBPF programs serve the pod they take it (from
the sidecar's uid only), and the app's ``accept()`` and ``getpeername()`` answer with that address. Everywhere else no kernel knows such an
option, and says so. Read by ebpf.layout and proxy.transport.caller.

Unread: the same programs tell the sidecar how much of what it sent past TCP the app has not read. Read by proxy.transport.pace.

Proof: the sidecar's own connections pass capture, but for those to `NOBODY` at the port where it takes what the app calls. Read by
ebpf.redirect and proxy.capture_proof; ebpf/bpf/connect.bpf.c and ebpf.validator, which may import nothing, repeat the addresses.
"""

from __future__ import annotations

import ipaddress
import struct

from core.addrs import Addr

CALLER_LEVEL = 0x50  # no protocol of the kernel has this level: without our program every kernel refuses it (ENOPROTOOPT)
CALLER_OPTION = 1
UNREAD_OPTION = 2  # read only: an int, in bytes
NOBODY = ("192.0.2.1", "100::1")
"""TEST-NET-1 (RFC 5737) and the discard prefix (RFC 6666): nobody is there."""
_FAMILY = {4: 2, 6: 10}  # AF_INET, AF_INET6


def caller_option(caller: Addr) -> bytes:
    """The option's value, 20 bytes: family (u16, host order), port (network order), address (16 bytes; IPv4 in the first four)."""
    ip = ipaddress.ip_address(caller.ip)
    return struct.pack("=H", _FAMILY[ip.version]) + struct.pack("!H16s", caller.port, ip.packed)
