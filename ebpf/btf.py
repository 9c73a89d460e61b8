"""Where the kernel keeps the fields that the order-and-memory check reads, from the kernel's own type information (BTF).

Through libbpf, which comes with Debian's python3-bpfcc. Called by the loader's child only; a kernel without BTF raises NoTypes, and
acceleration is off there.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")
_SOCK = "inet_conn.icsk_inet.sk."
_FIELDS = {
    "OFFSET_WRITE_SEQ": ("tcp_sock", "write_seq"),
    "OFFSET_COPIED_SEQ": ("tcp_sock", "copied_seq"),
    "OFFSET_RMEM_ALLOC": ("tcp_sock", _SOCK + "sk_backlog.rmem_alloc.counter"),
    "OFFSET_OWNED": ("tcp_sock", _SOCK + "sk_lock.owned"),
    "OFFSET_WAITERS": ("tcp_sock", _SOCK + "sk_wq"),
    "OFFSET_WAITERS_HEAD": ("socket_wq", "wait.head.next"),
    "OFFSET_WAITER_FUNC": ("wait_queue_entry", "func"),
    "OFFSET_WAITER_ENTRY": ("wait_queue_entry", "entry.next"),
}
_STRUCT = 4
_QUALIFIERS = (8, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag


class NoTypes(LookupError):
    """The kernel does not say where its fields are; the text says which, and what follows from it."""


def offsets(path: Path = VMLINUX) -> dict[str, int]:
    """Byte offsets of the fields that the programs read, by the name of the macro that they expect."""
    if not path.exists():
        raise NoTypes(f"{path} is missing: the kernel was built without CONFIG_DEBUG_INFO_BTF, so its fields cannot be found")
    types = _Types(path)
    return {macro: types.offset(struct.encode(), field) for macro, (struct, field) in _FIELDS.items()}


def blocked_reader(symbols: Path = Path("/proc/kallsyms")) -> int:
    """Address of the function that wakes who blocks in recv(2), 0 when the kernel does not say: then every waiter counts as such."""
    with symbols.open(encoding="ascii") as lines:
        return next((int(line.split()[0], 16) for line in lines if line.rstrip().endswith(" woken_wake_function")), 0)


class _Types:
    def __init__(self, path: Path) -> None:
        try:
            lib = ctypes.CDLL("libbpf.so.1")
        except OSError as error:
            raise NoTypes(f"libbpf.so.1 cannot be loaded ({error}); install the Debian package libbpf1") from None
        lib.btf__parse.restype = ctypes.c_void_p
        lib.btf__parse.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        lib.btf__find_by_name_kind.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint]
        lib.btf__type_by_id.restype = ctypes.c_void_p
        lib.btf__type_by_id.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        lib.btf__name_by_offset.restype = ctypes.c_char_p
        lib.btf__name_by_offset.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        self._lib = lib
        self._btf = lib.btf__parse(str(path).encode(), None)
        if not self._btf:
            raise NoTypes(f"{path} cannot be read as BTF")

    def offset(self, struct: bytes, field: str) -> int:
        """Follow a dotted path of members, through anonymous structs and typedefs."""
        ident = self._lib.btf__find_by_name_kind(self._btf, struct, _STRUCT)
        if ident < 0:
            raise NoTypes(f"the kernel's BTF has no struct {struct.decode()}")
        bits = 0
        for name in field.split("."):
            found = self._member(self._bare(ident), name.encode())
            if found is None:
                raise NoTypes(f"the kernel's struct {struct.decode()} has no field {field}")
            bits, ident = bits + found[0], found[1]
        return bits // 8

    def _header(self, ident: int) -> tuple[int, int]:
        """info and size-or-type of struct btf_type."""
        where = self._lib.btf__type_by_id(self._btf, ident)
        return ctypes.c_uint.from_address(where + 4).value, ctypes.c_uint.from_address(where + 8).value

    def _bare(self, ident: int) -> int:
        info, refers = self._header(ident)
        return self._bare(refers) if (info >> 24) & 31 in _QUALIFIERS else ident

    def _member(self, ident: int, name: bytes) -> tuple[int, int] | None:
        """(offset in bits, type) of a member."""
        info, _ = self._header(ident)
        where = self._lib.btf__type_by_id(self._btf, ident) + 12
        for number in range(info & 0xFFFF):
            name_at, kind, place = (ctypes.c_uint * 3).from_address(where + 12 * number)
            bits = place & 0xFFFFFF if info >> 31 else place
            label = self._lib.btf__name_by_offset(self._btf, name_at)
            if label == name:
                return bits, kind
            if label == b"":
                inner = self._member(self._bare(kind), name)
                if inner:
                    return bits + inner[0], inner[1]
        return None
