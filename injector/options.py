"""The ``config.pillion.dev/*`` annotations as typed options; a wrong one is refused with its name, its value and what was expected. Pure.

Called by injector.decide. Precedence: the pod's annotation, then its namespace's, then the default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

PREFIX = "config.pillion.dev/"
INBOUND_POLICIES = (
    "all-unauthenticated",
    "all-authenticated",
    "cluster-unauthenticated",
    "cluster-authenticated",
    "deny",
    "audit",
)
Range = tuple[int, int]

_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?:[a-z0-9-]{0,13}[a-z0-9])?")  # IANA_SVC_NAME, as Kubernetes checks port names
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}")
_SHOWN_CHARS = 80


class InvalidOption(ValueError):
    """An annotation with a value that means nothing. The text names annotation, value, where it is and what was expected."""

    def __init__(self, name: str, value: str, where: str, expected: str) -> None:
        shown = value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "..."
        super().__init__(f"annotation {PREFIX}{name} of the {where} is {shown!r}: expected {expected}")
        self.name, self.value, self.expected = name, value, expected


@dataclass(frozen=True)
class Options:
    """What the annotations ask for. Port lists are inclusive ranges with names resolved to the numbers the containers declare.

    default_inbound_policy, opaque_ports, unchecked_path_ports: only checked here; the policy controller reads them from the objects
    itself, live. accelerate: a node's eBPF agent obeys it.
    """

    default_inbound_policy: str | None = None
    opaque_ports: tuple[Range, ...] = ()
    skip_inbound_ports: tuple[Range, ...] = ()
    skip_outbound_ports: tuple[Range, ...] = ()
    unchecked_path_ports: tuple[Range, ...] = ()
    log_level: str = "info"
    access_log: str = "off"
    keep_probes: bool = False
    shutdown_grace_s: int = 30
    accelerate: bool = True
    image: str = ""
    inherited: Mapping[str, str] = field(default_factory=dict)


def read_options(pod: Mapping[str, str], namespace: Mapping[str, str], ports: Mapping[str, int]) -> Options:
    """Options from the annotations of a pod and its namespace; raises InvalidOption for the first wrong one.

    ports: names of the pod's declared container ports. inherited: the namespace's lists of skipped ports, which become the pod's own,
    because capture follows them only at start and whoever asks later must be told what capture does.
    """
    for where, found in (("pod", pod), ("namespace", namespace)):
        for key in sorted(found):
            if key.startswith(PREFIX) and key.removeprefix(PREFIX) not in _NAMES:
                name = key.removeprefix(PREFIX)
                raise InvalidOption(name, found[key], where, f"one of the options {', '.join(_NAMES)}")

    def get(name: str, read: Callable[[str], T], default: T, expected: str) -> T:
        for where, found in (("pod", pod), ("namespace", namespace)):
            if (value := found.get(PREFIX + name)) is not None:
                try:
                    return read(value.strip())
                except ValueError as error:
                    raise InvalidOption(name, value, where, str(error) or expected) from None
        return default

    none: tuple[Range, ...] = ()
    lists = {name: get(name, lambda value: _port_list(value, ports), none, "") for name in _PORT_LISTS}
    return Options(
        default_inbound_policy=get("default-inbound-policy", _one_of(*INBOUND_POLICIES), None, ""),
        opaque_ports=lists["opaque-ports"],
        skip_inbound_ports=lists["skip-inbound-ports"],
        skip_outbound_ports=lists["skip-outbound-ports"],
        unchecked_path_ports=lists["unchecked-path-ports"],
        log_level=get("log-level", _one_of("debug", "info", "warning", "error"), "info", ""),
        access_log=get("access-log", _one_of("off", "errors", "all"), "off", ""),
        keep_probes=get("keep-probes", _boolean, False, ""),
        shutdown_grace_s=get("shutdown-grace", _seconds, 30, ""),
        accelerate=get("accelerate", _boolean, True, ""),
        image=get("image", _image, "", ""),
        inherited={
            PREFIX + name: namespace[PREFIX + name]
            for name in ("skip-inbound-ports", "skip-outbound-ports")
            if PREFIX + name in namespace and PREFIX + name not in pod
        },
    )


_PORT_LISTS = ("opaque-ports", "skip-inbound-ports", "skip-outbound-ports", "unchecked-path-ports")
_NAMES = ("default-inbound-policy", *_PORT_LISTS, "log-level", "access-log", "keep-probes", "shutdown-grace", "accelerate", "image")


def _port_list(text: str, declared: Mapping[str, int]) -> tuple[Range, ...]:
    """``25,8000-8010,postgres``: numbers, ranges and port names of the pod; a name that the pod does not declare means no port of it."""
    ranges: list[Range] = []
    for entry in (part.strip() for part in text.split(",")):
        first, dash, last = entry.partition("-")
        if _is_port(first) and (not dash or (_is_port(last) and int(first) <= int(last))):
            ranges.append((int(first), int(last or first)))
        elif entry in declared:
            ranges.append((declared[entry], declared[entry]))
        elif entry and not _PORT_NAME.fullmatch(entry):
            raise ValueError("ports (1 to 65535), ranges such as 8000-8010 and port names, separated by commas")
    return tuple(ranges)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535


def _one_of(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return text

    return read


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _seconds(text: str) -> int:
    number = text.removesuffix("s")
    if not (number.isascii() and number.isdigit() and len(number) <= 4 and int(number) <= 3600):
        raise ValueError("seconds from 0 to 3600, such as 30 or 30s")
    return int(number)


def _image(text: str) -> str:
    if not _IMAGE.fullmatch(text):
        raise ValueError("the name of a container image")
    return text
