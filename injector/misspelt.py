"""Annotations that are meant for us and that nobody reads: ``pillion.dev/injct`` leaves a namespace out of the mesh without a word.

Pure. They are reported, not refused: an older injector must start pods that have an annotation which only a newer one knows. Called by
local.hints and cli.check.workloads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from injector.fixed import BEFORE, INJECT, STATUS
from injector.options import NAMES, PREFIX

_READ = (INJECT, STATUS, BEFORE, *(PREFIX + name for name in NAMES))
_DOMAINS = tuple(dict.fromkeys(key.partition("/")[0] for key in _READ))
_BY_NAME = {key.partition("/")[2]: key for key in _READ}
_LINKERD = {"linkerd.io": INJECT.partition("/")[0] + "/", "config.linkerd.io": PREFIX}
_ALIKE = 0.9  # of domains: pilion.dev is told (0.95); config.linkerd.io (0.63) is somebody else's


def misspelt(annotations: Iterable[str]) -> Iterator[str]:
    """A sentence for each key in our domains, or nearly so, that is none of our annotations, with the one of the nearest name."""
    for key in sorted(set(annotations).difference(_READ)):
        domain, _, name = key.partition("/")
        near = get_close_matches(name, _BY_NAME, 1)
        if domain in _DOMAINS or (near and get_close_matches(domain, _DOMAINS, 1, _ALIKE)):
            yield f"annotation {key} is read by nobody" + (f"; there is {_BY_NAME[near[0]]}" if near else "")


def misplaced(annotations: Iterable[str]) -> Iterator[str]:
    """A sentence for each of our annotations among those of a workload's own metadata: its pods do not have them."""
    for key in sorted(set(annotations).intersection(_READ)):
        yield f"annotation {key} is read by nobody here; it belongs on the pod template (spec.template.metadata) or the namespace"


def of_linkerd(annotations: Iterable[str]) -> Iterator[str]:
    """A sentence for each annotation of Linkerd's with the one that means the same here. For places where Linkerd cannot be."""
    for key in sorted(set(annotations)):
        domain, _, name = key.partition("/")
        if domain in _LINKERD:
            meant = _LINKERD[domain] + name
            yield f"annotation {key} is Linkerd's and read by nobody here" + (f"; there is {meant}" if meant in _READ else "")
