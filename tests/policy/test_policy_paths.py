"""policy.paths: which request targets have one reading, and which one it is."""

from __future__ import annotations

import posixpath
from urllib.parse import parse_qsl, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from policy.paths import (
    ASTERISK,
    AmbiguousPath,
    NormalTarget,
    fold,
    lenient_target_untrusted,
    normal_path,
    normal_target_untrusted,
    query_values,
    readings,
)

# Pieces that matter to some server, so that random targets reach the interesting branches.
PIECES = [
    b"/",
    b"a",
    b".",
    b"..",
    b"%2e",
    b"%2E",
    b"%2f",
    b"%5c",
    b"\\",
    b";",
    b"%3b",
    b"%",
    b"%4",
    b"%41",
    b"%25",
    b"%40",
    b"@",
    b"?",
    b"#",
]
PIECES += [b"%00", b"\x00", b" ", b"\xc3\xa9", b"%c3%a9", b"\xff", b"%c0%ae", b"%ff", b"*", b"|", b"~", b"%7e", b"=", b"&", b"+", b"x=1"]
targets = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    st.lists(st.sampled_from(PIECES), max_size=12).map(lambda pieces: b"/" + b"".join(pieces)),
)


@pytest.mark.parametrize(
    ("raw", "path", "query"),
    [
        (b"/", "/", ""),
        (b"/a/b", "/a/b", ""),
        (b"/a/", "/a/", ""),  # a single trailing slash is no empty segment
        (b"/a?x=1", "/a", "x=1"),
        (b"/a?", "/a", ""),
        (b"/a?b?c", "/a", "b?c"),
        (b"/a?b/../c", "/a", "b/../c"),  # a query has no segments
        (b"/%41%7e%2d%5F", "/A~-_", ""),  # 6.2.2.2: unreserved characters are decoded
        (b"/%c3%a9", "/%C3%A9", ""),  # 6.2.2.1: other escapes in capitals
        (b"/\xc3\xa9", "/%C3%A9", ""),  # RFC 3987 3.1: the URI of that IRI
        (b"/%40%3a", "/%40%3A", ""),  # 2.2: an escaped reserved character is another one
        (b"/@:", "/@:", ""),
        (b"/a|b^c", "/a%7Cb%5Ec", ""),
        (b"/%25", "/%25", ""),
        (b"/%2541", "/%2541", ""),  # decoded once: a literal percent sign
        (b"/...", "/...", ""),
        (b"/.a/..b/c..", "/.a/..b/c..", ""),
        (b"/a;v=1/b", "/a;v=1/b", ""),
        (b"/A/a", "/A/a", ""),
        (b"/pkg.Service/Method", "/pkg.Service/Method", ""),
        (b"*", "*", ""),
    ],
)
def test_a_target_with_one_reading_is_normalised(raw: bytes, path: str, query: str) -> None:
    assert normal_target_untrusted(raw) == NormalTarget(path, query)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        *[(raw, "dot segment") for raw in (b"/.", b"/..", b"/a/..", b"/a/../b", b"/a/./b", b"/./a", b"/../", b"/a/.?x")],
        *[(raw, "dot segment") for raw in (b"/%2e", b"/%2E%2e/a", b"/.%2e/a", b"/%2e./a", b"/a/%2E")],
        *[(raw, "dot segment") for raw in (b"/..;/a", b"/..;x=1/a", b"/.;/a", b"/%2e%2e;/a", b"/..%3b/a", b"/%2e%2e%3Bx")],
        *[(raw, "escaped slash") for raw in (b"/a%2fb", b"/a%2Fb", b"/..%2f")],
        *[(raw, "backslash") for raw in (b"/a\\b", b"/a%5cb", b"/a%5Cb", b"/..\\a", b"/%5c..%5ca")],
        *[(raw, "empty segment") for raw in (b"//", b"//a", b"/a//b", b"/a//", b"/;/a", b"/a/;x", b"/%3b/a", b"//evil.example/a")],
        *[(raw, "control character") for raw in (b"/\x00", b"/%00", b"/a%0d%0ab", b"/%1f", b"/%7f", b"/\x7f", b"/\t", b"/%c2%80", b"/a b")],
        *[(raw, "broken percent-escape") for raw in (b"/%", b"/%4", b"/%zz", b"/a%2", b"/%%41", b"/%u002e")],
        *[(raw, "not UTF-8") for raw in (b"/\xff", b"/%ff", b"/%c0%ae%c0%ae/a", b"/%c0%af", b"/%e0%80%af", b"/%c3", b"/%ed%a0%80")],
        *[(raw, "fragment") for raw in (b"/a#b", b"/#", b"/a?b#c")],
        *[(raw, "control character") for raw in (b"/a?b c", b"/a?\x00")],
        *[(raw, "neither a path nor *") for raw in (b"", b"?a", b"a/b", b"host:443", b"**", b"*?", b"http://h/a", b"%2fa", b"\\a")],
    ],
)
def test_a_target_with_two_readings_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(AmbiguousPath) as refused:
        normal_target_untrusted(raw)
    assert reason in refused.value.reason


@given(targets)
@example(b"/%2e%2e%2fa")
def test_any_bytes_are_a_normal_target_or_ambiguous(raw: bytes) -> None:
    try:
        path, query = normal_target_untrusted(raw)
    except AmbiguousPath as refused:
        assert refused.reason and len(refused.reason) < 100
        return
    assert path == "*" or path.startswith("/")
    assert (path + query).isascii() and "?" not in path and "#" not in path + query
    again = path + ("?" + query if query else "")
    assert normal_target_untrusted(again.encode()) == (path, query)  # a normal form is its own normal form


@given(targets)
def test_an_accepted_path_is_what_a_decoding_and_collapsing_server_reads_too(raw: bytes) -> None:
    try:
        path = normal_target_untrusted(raw).path
    except AmbiguousPath:
        return
    if path == "*":
        return
    decoded = unquote(path)
    assert posixpath.normpath(decoded) == (decoded.rstrip("/") or "/")
    assert decoded.count("/") == path.count("/")
    for reading in readings(path):
        assert posixpath.normpath(unquote(reading)) == (unquote(reading).rstrip("/") or "/")


@given(targets)
def test_the_lenient_reading_never_fails_and_is_the_normal_form_where_there_is_one(raw: bytes) -> None:
    path, query = lenient_target_untrusted(raw)
    assert path == "*" or path.startswith("/")
    assert (path + query).isascii() and not {".", ".."} & set(path.split("/"))
    assert lenient_target_untrusted((path + "?" + query).encode()) == (path, query)
    try:
        normal = normal_target_untrusted(raw)
    except AmbiguousPath:
        return
    assert (path, query) == normal


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/a/../b", "/b"),
        (b"/a/%2e%2E/b", "/b"),
        (b"/../../a", "/a"),
        (b"/a/..", "/"),
        (b"/a/.", "/a/"),
        (b"/a/b/..", "/a/"),
        (b"/a//b", "/a//b"),
        (b"/a%2fb", "/a%2Fb"),
        (b"/a\\..\\b", "/a%5C..%5Cb"),
        (b"/..;/a", "/..;/a"),
        (b"/%zz%", "/%25zz%25"),
        (b"/\xff\x00", "/%FF%00"),
        (b"/a#/../b", "/a"),
        (b"host:443", "*"),
        (b"", "*"),
    ],
)
def test_the_lenient_reading_is_rfc_3986_to_the_letter(raw: bytes, path: str) -> None:
    assert lenient_target_untrusted(raw).path == path


def test_asterisk_form_names_no_path() -> None:
    assert normal_target_untrusted(b"*") is ASTERISK


def test_values_of_routes_are_held_to_the_same_rules() -> None:
    assert normal_path("/caf\N{LATIN SMALL LETTER E WITH ACUTE}/%7euser/") == "/caf%C3%A9/~user/"
    for value in ("/a/../b", "/a//b", "a", "", "*", "/a?b", "/%2f", "/\ud800"):
        with pytest.raises(AmbiguousPath):
            normal_path(value)


@given(st.text(max_size=20).map(lambda text: "/" + text))
def test_a_value_that_is_accepted_matches_the_request_that_spells_it(value: str) -> None:
    try:
        normal = normal_path(value)
    except AmbiguousPath:
        return
    assert normal_target_untrusted(value.encode()).path == normal == normal_path(normal)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a", ("/a",)),
        ("/a%25b%C3%A9", ("/a%25b%C3%A9",)),  # decoded or not, these can stand for nothing else
        ("/me%40home", ("/me@home",)),
        ("/x%3Arun", ("/x:run",)),
        ("/a;v=1/b", ("/a;v=1/b", "/a/b")),
        ("/a%3Bv", ("/a;v", "/a")),
        ("/a;v%3Bw", ("/a;v;w", "/a")),
    ],
)
def test_what_servers_are_known_to_read_differently_is_listed(path: str, expected: tuple[str, ...]) -> None:
    assert readings(path) == expected


def test_folding_decodes_exactly_the_reserved_characters_of_a_segment() -> None:
    folded = {chr(octet) for octet in range(256) if fold(f"/%{octet:02X}") != f"/%{octet:02X}"}
    assert folded == set("!$&'()*+,;=:@")


def test_the_first_value_of_a_repeated_query_parameter_counts() -> None:
    assert query_values("a=1&a=2&b&=x&c=d=e&&%61=3&f+g=h+i%2Bj", strict=True) == {"a": "1", "b": "", "": "x", "c": "d=e", "f g": "h i+j"}


@pytest.mark.parametrize(
    "query", ["role=user&role=admin", "role=user&%72ole=admin", "x=1;role=admin", "role=admin;x=1", "role&role=1", "x;role"]
)
def test_a_watched_parameter_with_two_readings_is_refused_where_it_is_strict(query: str) -> None:
    watched = frozenset(("role",))
    with pytest.raises(AmbiguousPath):
        query_values(query, strict=True, watched=watched)
    assert query_values(query, strict=False, watched=watched) == query_values(query, strict=False)
    assert query_values(query, strict=True) == query_values(query, strict=False)


@pytest.mark.parametrize("name", ["+role", "%20role", "role[]", "role%5b0%5d", "role%00x", "ROLE", "Role[]"])
def test_a_parameter_that_servers_file_under_a_watched_name_is_refused_where_it_is_strict(name: str) -> None:
    with pytest.raises(AmbiguousPath):
        query_values(f"role=user&{name}=admin", strict=True, watched=frozenset(("role",)))
    assert query_values(f"{name}=admin", strict=True, watched=frozenset(("ro", "roles"))) == query_values(f"{name}=admin", strict=False)


def test_separators_of_a_watched_parameter_are_those_of_php() -> None:
    for name in ("my.role", "my+role", "my_role[]"):
        with pytest.raises(AmbiguousPath):
            query_values(f"{name}=admin", strict=True, watched=frozenset(("my_role",)))
    assert query_values("my-role=1&my_role=2", strict=True, watched=frozenset(("my_role",))) == {"my-role": "1", "my_role": "2"}


def test_a_rule_about_one_member_of_a_list_leaves_the_others_alone() -> None:
    watched = frozenset(("filter[role]",))
    assert query_values("filter[role]=a&filter[x]=b", strict=True, watched=watched) == {"filter[role]": "a", "filter[x]": "b"}


@pytest.mark.parametrize("query", ["", "role=user", "role=user&role=user", "role=user&x=1&x=2", "role=user&x=1;y=2", "role=a%3Bb", "x=1;y"])
def test_a_watched_parameter_with_one_reading_is_not_refused(query: str) -> None:
    assert query_values(query, strict=True, watched=frozenset(("role",))) == query_values(query, strict=False)


@pytest.mark.parametrize("query", ["a=%", "%zz", "a=%ff", "%c0%ae=1"])
def test_a_query_with_two_readings_is_refused_only_where_it_is_strict(query: str) -> None:
    with pytest.raises(AmbiguousPath):
        query_values(query, strict=True)
    assert len(query_values(query, strict=False)) == 1


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30))
def test_queries_are_read_as_the_standard_library_reads_forms(query: str) -> None:
    lenient = query_values(query, strict=False)
    first: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        first.setdefault(name, value)
    assert lenient == first
