"""Puts off loading the libraries that trio imports and a sidecar never uses, which saves it 1.6 MB.

trio loads `ssl` for TLS streams and `idna` for names that are not ASCII. With `ssl` and `hashlib` comes a whole OpenSSL, the system's,
beside the one that `cryptography` brings and that all TLS of ours runs on.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

_LATER = ("ssl", "idna")
_BUILT_IN_HASHES = ("_sha2", "_sha256")  # Python 3.12 and later, earlier


class _Later(types.ModuleType):
    """Stands in for a module where it was imported, and loads it for the first of its names that is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what Python itself asks of any module
        return getattr(importlib.import_module(self.__name__), name)


def import_trio() -> None:
    """Load trio without them; whoever imports one of them afterwards gets the real one. Does nothing where trio is loaded already."""
    if "trio" in sys.modules:
        return
    _import_hashes()
    absent = [name for name in _LATER if name not in sys.modules]
    for name in absent:
        sys.modules[name] = _Later(name)
    try:
        importlib.import_module("trio")
    finally:
        for name in absent:
            del sys.modules[name]


def _import_hashes() -> None:
    """Load `hashlib` and `hmac` with Python's own hashes, where it has them: we hash a few names, and no data."""
    if "_hashlib" in sys.modules or not any(map(_loads, _BUILT_IN_HASHES)):
        return
    sys.modules["_hashlib"] = None  # type: ignore[assignment]  # to Python: there is no such module
    try:
        importlib.import_module("hmac")
    finally:
        del sys.modules["_hashlib"]


def _loads(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
