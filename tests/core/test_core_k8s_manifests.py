from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.k8s.manifests import MAX_FILE_BYTES, InvalidManifest, read_manifests


def _yaml(text: str) -> list[dict[str, object]]:
    return read_manifests(text.encode(), is_json=False)


def test_documents_and_lists_are_opened_up_in_order() -> None:
    text = "---\n---\nkind: A\n---\nkind: List\nitems: [{kind: B}, {kind: PodList, items: [{kind: C}]}]\n---\nkind: D\n"
    assert [found["kind"] for found in _yaml(text)] == ["A", "B", "C", "D"]


def test_timestamps_stay_text_as_in_the_apis_json() -> None:
    assert _yaml("at: 2026-01-01T00:00:00Z\nday: 2026-01-01") == [{"at": "2026-01-01T00:00:00Z", "day": "2026-01-01"}]


def test_json_is_json() -> None:
    assert read_manifests(b'{"kind": "A"}', is_json=True) == [{"kind": "A"}]
    with pytest.raises(InvalidManifest):
        read_manifests(b"kind: A", is_json=True)
    with pytest.raises(InvalidManifest, match="the key 'kind' twice"):
        read_manifests(b'{"kind": "A", "kind": "B"}', is_json=True)


def test_numbers_to_the_base_60_are_text_as_kubectl_reads_them() -> None:
    assert _yaml("port: 22:22\nat: 1:30.5\nmode: 0x1F\nshare: 2.5\nlow: -7") == [
        {"port": "22:22", "at": "1:30.5", "mode": 31, "share": 2.5, "low": -7}
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "the key 'a' twice"),
        ("1: x", "a key that is not a string"),
        ("<<: {1: x}", "a key that is not a string"),
        ("- a", "document 1: expected an object, found list"),
        ("a: [", "at line 1, column 5"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: .inf", "the API's JSON can carry"),
        ("a: !!binary YQ==", "the API's JSON can carry"),
        ("a: 18446744073709551616", "the API's JSON can carry"),
        ('a: "\\ud800"', "the API's JSON can carry"),
        ('"\\ud800": a', "the API's JSON can carry"),
        ("a: !!int 1" + ":1" * 100, "a number of more than 64 characters"),
        ("a: &x [*x]", "an alias inside the value it stands for|recursive|200 levels"),
    ],
)
def test_what_is_no_sequence_of_objects_is_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidManifest, match=words):
        _yaml(text)


def test_aliases_cannot_make_a_small_file_large() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(InvalidManifest, match="after aliases are expanded"):
        _yaml("\n".join(levels))
    assert _yaml("a: &l {x: y}\nb: *l\nc: {<<: *l, z: w}") == [{"a": {"x": "y"}, "b": {"x": "y"}, "c": {"x": "y", "z": "w"}}]


def test_merges_cannot_make_a_small_file_large() -> None:
    levels = ["a0: &a0 {k: v}"]
    levels += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: v}}" for n in range(1, 40)]
    for text in ("\n".join(levels), "\n".join(reversed(levels)), "a: &a {<<: *a}"):
        with pytest.raises(InvalidManifest):
            _yaml(text)
    with pytest.raises(InvalidManifest, match="merged values"):
        _yaml("\n".join(levels))


def test_a_file_is_bounded() -> None:
    with pytest.raises(InvalidManifest, match="at most"):
        read_manifests(b" " * (MAX_FILE_BYTES + 1), is_json=False)


@given(st.binary(max_size=60) | st.text(alphabet="a:- {}[]&*!#\n\t'\"|>1?", max_size=40).map(str.encode), st.booleans())
def test_any_text_is_objects_or_refused(text: bytes, is_json: bool) -> None:
    try:
        assert all(isinstance(found, dict) for found in read_manifests(text, is_json=is_json))
    except InvalidManifest:
        pass
