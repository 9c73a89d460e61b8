"""core.spelling: which names of header fields are taken for one another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.spelling import Spellings, canonical

SEPARATORS = "!#$%&'*+-.^_`|~"
words = st.lists(st.text("ab1", max_size=2), min_size=1, max_size=9)
names = st.text("ab1" + SEPARATORS, min_size=1, max_size=12).map(str.encode)


@st.composite
def spelled_twice(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """The same words with other separators between them."""
    some = draw(words.filter(any))
    between = st.lists(st.sampled_from(SEPARATORS), min_size=len(some), max_size=len(some))
    one, other = ("".join(word + sign for word, sign in zip(some, draw(between), strict=True))[:-1] for _ in range(2))
    return (one or "-").encode(), (other or "-").encode()


@given(spelled_twice())
def test_a_name_with_other_separators_is_another_spelling_however_many_there_are(pair: tuple[bytes, bytes]) -> None:
    one, other = pair
    assert canonical(one) == canonical(other)
    assert Spellings((one,)).other(other) == (one != other)


@given(st.lists(names, min_size=1, max_size=3), st.lists(names, max_size=4))
def test_a_search_through_a_head_finds_what_a_look_at_each_name_finds(watched: list[bytes], sent: list[bytes]) -> None:
    spellings = Spellings(tuple(watched))
    head = b"get / http/1.1\r\n" + b"".join(name + b": x-a: x_a\r\n" for name in sent) + b"\r\n"
    assert (spellings.search_head(head) is not None) == any(map(spellings.other, sent))


def test_letters_and_digits_make_another_name() -> None:
    spellings = Spellings((b"x-user", b"plain"))
    assert [name for name in (b"xuser", b"x-users", b"my-x-user", b"x--user", b"x-user", b"plain") if spellings.other(name)] == []
    assert spellings.search_head(b"get / http/1.1\r\nx-user: x_user\r\nplain: 1\r\n\r\n") is None


def test_of_two_watched_names_neither_is_the_other_spelling_of_the_other() -> None:
    spellings = Spellings((b"x-user", b"x_user"))
    assert not spellings.other(b"x-user") and not spellings.other(b"x_user") and spellings.other(b"x.user")
