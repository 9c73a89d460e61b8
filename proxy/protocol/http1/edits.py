"""What rules change in heads of HTTP/1.1 messages: fields cut out and put in, another target, another host; the rest stays as it came.

An edit is constant for a connection or a rule, so each is made into a function once. Pure; called by client.py and connection.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from core.spelling import any_spelling
from proxy.protocol.http1.heads import FIELD, RequestHead, without
from proxy.protocol.requests import HeadEdit, ResponseRule

_is_field = re.compile(FIELD).fullmatch
_cut_host = re.compile(rb"\n(?i:host):[^\r]*\r").sub


@lru_cache(maxsize=256)
def editor(edit: HeadEdit) -> Callable[[RequestHead], bytes]:
    """The function that applies ``edit`` to a head and returns the bytes to send.

    A name to strip is stripped in every spelling (core.spelling).
    Raises ValueError when a field to add is not one line.
    """
    lines = [name + b": " + value + b"\r\n" for name, value in edit.add]
    for line in lines:
        if not _is_field(line):
            raise ValueError(f"not a header field: {line!r}")
    end = b"".join([*lines, b"\r\n"])
    names = b"|".join(map(any_spelling, edit.strip))
    rewrite = rewriter(edit.host, edit.retarget) if edit.host or edit.retarget is not None else None
    if not names and rewrite is None:
        return (lambda head: head.wire[:-2] + end) if lines else (lambda head: head.wire)
    ours = all(name.startswith(b"pillion-") for name in edit.strip)  # then a head that is `ordinary` has none of them
    present = re.compile(rb"\n(?:" + names + rb"):").search
    cut = re.compile(rb"\n(?i:" + names + rb"):[^\r]*\r").sub

    def apply(head: RequestHead) -> bytes:
        wire = head.wire
        if names and not (ours and head.ordinary) and present(head.lower):
            wire = cut(b"", wire)
        if rewrite is not None and not head.connects:
            wire = rewrite(head, wire)
        return wire[:-2] + end if lines else wire

    return apply


def rewriter(host: bytes, retarget: Callable[[bytes], bytes] | None) -> Callable[[RequestHead, bytes], bytes]:
    """The function that puts another target and host into the wire form of a head. The target becomes an origin-form: an absolute one
    names a host, which would contradict the new one."""

    def rewrite(head: RequestHead, wire: bytes) -> bytes:
        end = wire.index(b"\r\n")
        target = retarget(head.target) if retarget is not None and head.target != b"*" else head.target
        line = head.method + b" " + target + wire[end - 9 : end]  # " HTTP/1.1"
        rest = wire[end:]
        return line + b"\r\nhost: " + host + _cut_host(b"", rest) if host else line + rest

    return rewrite


def final(wire: bytes) -> bytes:
    """The bytes of a request head, saying that no other request follows on its connection."""
    return without(wire, (b"connection",))[:-2] + b"connection: close\r\n\r\n"


@lru_cache(maxsize=256)
def response_editor(edit: ResponseRule) -> Callable[[bytes], bytes]:
    """The function that applies ``edit`` to the bytes of a response head."""
    block = b"".join([name + b": " + value + b"\r\n" for name, value in edit.add])
    if not edit.strip:
        return lambda wire: wire[:-2] + block + b"\r\n"
    cut = re.compile(rb"\n(?i:" + b"|".join(map(re.escape, edit.strip)) + rb"):[^\r]*\r").sub
    return lambda wire: cut(b"", wire)[:-2] + block + b"\r\n"
