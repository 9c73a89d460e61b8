"""Annotations that nobody reads are told with the one that is meant; everybody else's are no matter."""

from __future__ import annotations

import pytest

from injector.misspelt import misspelt
from injector.options import NAMES, PREFIX


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("pillion.dev/injct", "pillion.dev/inject"),
        ("pillion.dev/injected", "pillion.dev/inject"),
        ("pilion.dev/inject", "pillion.dev/inject"),
        ("confg.pillion.dev/log-levle", "config.pillion.dev/log-level"),
        ("config.pillion.dev/opaque-port", "config.pillion.dev/opaque-ports"),
        ("pillion.dev/opaque-ports", "config.pillion.dev/opaque-ports"),
    ],
)
def test_what_is_meant_is_named(key: str, meant: str) -> None:
    assert list(misspelt({key: "enabled"})) == [f"annotation {key} is read by nobody; there is {meant}"]


def test_a_name_of_ours_that_is_like_no_other_is_told_all_the_same() -> None:
    assert list(misspelt({"pillion.dev/x": ""})) == ["annotation pillion.dev/x is read by nobody"]


def test_our_own_annotations_and_those_of_others_are_no_matter() -> None:
    ours = ["pillion.dev/inject", "pillion.dev/status", "pillion.dev/before", *(PREFIX + name for name in NAMES)]
    others = ["linkerd.io/inject", "sidecar.istio.io/inject", "kubectl.kubernetes.io/default-container", "checksum/config", ""]
    linkerd = [f"config.linkerd.io/{name}" for name in NAMES]
    assert list(misspelt([*ours, *others, *linkerd])) == []
