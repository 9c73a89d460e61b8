"""Names of header fields as programs read them that turn names into variables: ``x-user``, ``x_user`` and ``x.user`` are one there.

CGI and WSGI write every ``-`` as ``_``, PHP and older servers other separators too. So every character of a name that is no letter and no
digit is taken for the same one (RFC 9110 section 5.6.2 lists them). Pure.
"""

from __future__ import annotations

import re
from typing import Final

_SEPARATORS: Final = b"!#$%&'*+.^_`|~-"
_ALIKE: Final = bytes.maketrans(_SEPARATORS, b"-" * len(_SEPARATORS))
_ANY_SEPARATOR: Final = b"[" + re.escape(_SEPARATORS) + b"]"


def canonical(name: bytes) -> bytes:
    """What all spellings of a lower-case name have in common. A whole head may be given too: where its lines end does not change."""
    return name.translate(_ALIKE)


def any_spelling(name: bytes) -> bytes:
    """A regular expression for all spellings of a lower-case name."""
    return _ANY_SEPARATOR.join(map(re.escape, canonical(name).split(b"-")))


class Spellings:
    """Some lower-case names, and what else programs take for one of them.

    search_head: finds another spelling as the name of a field of an HTTP/1.1 head in lower case; the cost is a look at each line.
    """

    def __init__(self, names: tuple[bytes, ...]) -> None:
        self.names = names
        self._canonical = frozenset(map(canonical, names))
        several = [name for name in names if b"-" in canonical(name)]
        these, all_of_them = b"|".join(map(re.escape, several)), b"|".join(map(any_spelling, several))
        self.search_head = re.compile(rb"\n(?!(?:" + these + rb"):)(?:" + all_of_them + rb"):").search

    def other(self, name: bytes) -> bool:
        """Whether a lower-case name is none of these, and taken for one of them."""
        return canonical(name) in self._canonical and name not in self.names
