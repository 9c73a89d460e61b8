"""Durations as the Gateway API writes them (GEP-2257): ``500ms``, ``1h30m``; from untrusted text to seconds. Pure."""

from __future__ import annotations

import re

from core.k8s.fields import InvalidObject, shown

_DURATION = re.compile(r"([0-9]{1,5}(h|m|s|ms)){1,4}", re.ASCII)
_PART = re.compile(r"([0-9]+)(ms|h|m|s)", re.ASCII)
_MILLIS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


def seconds_untrusted(where: str, text: str) -> float:
    """Read a duration; raises InvalidObject. No fractions, no signs, at most four numbers of at most five digits."""
    if not _DURATION.fullmatch(text):
        raise InvalidObject(where, "a duration such as 500ms or 1h30m, of at most four whole numbers with a unit", shown(text))
    return sum(int(number) * _MILLIS[unit] for number, unit in _PART.findall(text)) / 1000
