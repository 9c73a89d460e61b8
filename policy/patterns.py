"""Regular expressions of routes, matched in time linear in what a client sends.

Paths and header values are chosen by attackers, and Python's ``re`` backtracks: ``(a+)+`` against forty letters takes minutes, on a loop
that serves every connection of the pod. RE2 builds an automaton instead and has no such input; its syntax (no back-references, no
look-around) is also what Envoy and Go implementations of the Gateway API accept, and close to Linkerd's. The library is imported at
the first pattern only: it costs 2.9 MiB resident, which a sidecar whose policy has none does not pay.

Called by policy.match, and by admission, so that what was admitted compiles in every sidecar. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_PATTERN_CHARS = 4096  # HTTPHeaderMatch.value, the longest of the Gateway API's pattern fields
_MAX_AUTOMATON_BYTES = 256 << 10  # RE2's own bound on program and cached states of one pattern; its default of 8 MiB is a sidecar's worth

Pattern = Callable[[bytes], bool]
"""Does the pattern cover this whole value, UTF-8? A value that is not UTF-8 is covered by no pattern that has to look at the bad octets."""


class InvalidPattern(ValueError):
    """A regular expression that is not used; the text repeats it (shortened) and says why."""


def compile_pattern(text: str) -> Pattern:
    """Compile RE2 syntax; ``.`` includes newlines. Raises InvalidPattern: bad syntax, over 4096 characters, too large an automaton."""
    if len(text) > MAX_PATTERN_CHARS:
        raise InvalidPattern(f"regular expression {text[:40]!r}...: longer than {MAX_PATTERN_CHARS} characters")
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidPattern(f"regular expression {text[:40]!r}: not Unicode text") from None
    try:
        re2 = _re2()
        options = re2.Options()
        options.max_mem = _MAX_AUTOMATON_BYTES
        options.log_errors = False
        options.dot_nl = True
        options.never_capture = True
        fullmatch = re2.compile(raw, options).fullmatch
    except ImportError:
        raise InvalidPattern(f"regular expression {text[:40]!r}: the package google-re2 is not installed") from None
    except Exception as error:  # re2.error, which cannot be named before the import
        raise InvalidPattern(f"regular expression {text[:40]!r}: {_message(error)}") from None
    return lambda value: fullmatch(value) is not None


def _message(error: Exception) -> str:
    first = error.args[0] if error.args else error
    return (first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first))[:200]


def _re2() -> Any:
    import re2

    return re2
