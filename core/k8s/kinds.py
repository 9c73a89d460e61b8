"""Kinds as people write them on a command line: ``deploy``, ``deployments`` and ``Deployment`` are one. Pure."""

from __future__ import annotations

_SHORT = {"deploy": "deployment", "sts": "statefulset", "ds": "daemonset", "rs": "replicaset", "po": "pod"}  # as kubectl abbreviates


def kind_meant(word: str) -> str:
    """The kind in lower case and singular, whether or not there is one of that name; "" for ""."""
    lower = word.lower()
    return _SHORT.get(lower) or lower.removesuffix("s")
