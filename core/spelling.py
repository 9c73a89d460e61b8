"""Spellings of a header field's name: to programs that turn names into variables, ``x-user``, ``x_user`` and ``x.user`` are the same.

CGI and WSGI replace every ``-`` by ``_``, PHP and older servers other separators too. So all characters of a name that are neither letters
nor digits (RFC 9110 section 5.6.2 lists them) count as the same one here. Pure.
"""

from __future__ import annotations

import re
from typing import Final

_SEPARATORS: Final = b"!#$%&'*+.^_`|~-"
_ALIKE: Final = bytes.maketrans(_SEPARATORS, b"-" * len(_SEPARATORS))
_ANY_SEPARATOR: Final = b"[" + re.escape(_SEPARATORS) + b"]"


def canonical(name: bytes) -> bytes:
    """The form that all spellings of a lower-case name share. May be given a whole head: colons and line ends do not change."""
    return name.translate(_ALIKE)


def any_spelling(name: bytes) -> bytes:
    """A regular expression for all spellings of a lower-case name."""
    return _ANY_SEPARATOR.join(map(re.escape, canonical(name).split(b"-")))


class Spellings:
    """Some lower-case names, and their other spellings.

    search_head: finds a field whose name is another spelling, in an HTTP/1.1 head in lower case; it looks once at each line.
    """

    def __init__(self, names: tuple[bytes, ...]) -> None:
        self.names = names
        self._canonical = frozenset(map(canonical, names))
        several = [name for name in names if b"-" in canonical(name)]
        these, all_of_them = b"|".join(map(re.escape, several)), b"|".join(map(any_spelling, several))
        self.search_head = re.compile(rb"\n(?!(?:" + these + rb"):)(?:" + all_of_them + rb"):").search

    def other(self, name: bytes) -> bool:
        """Whether a lower-case name is not one of these, but another spelling of one."""
        return canonical(name) in self._canonical and name not in self.names
