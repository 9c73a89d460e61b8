"""The ``config.pillion.dev/*`` annotations as typed options; a wrong one is refused with its name, its value and what was expected. Pure.

Called by injector.decide. Precedence: the pod's annotation, then its namespace's, then the mesh settings', then the default.
docs/injection.md has the list for people; a test compares the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

PREFIX = "config.pillion.dev/"
_OTHER_PREFIX = "pillion.dev/"  # of what is no option: whoever mistakes one for the other must not believe that a port is protected
INBOUND_POLICIES = (
    "all-unauthenticated",
    "all-authenticated",
    "cluster-unauthenticated",
    "cluster-authenticated",
    "deny",
    "audit",
)
Range = tuple[int, int]
Reader = Callable[[str, Mapping[str, int]], Any]
"""From the text and the pod's named ports to the value; raises ValueError that says what was expected."""

_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?:[a-z0-9-]{0,13}[a-z0-9])?")  # IANA_SVC_NAME, as Kubernetes checks port names
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}")
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(m|k|[KMGT]i|[MGT])?")  # apimachinery resource.Quantity without its rarer spellings
_SCALE = {None: 0, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}
_DURATION = re.compile(r"([0-9]{1,6})(ms|s)?")
_ENV_NAME = re.compile(r"PILLION_[A-Z0-9_]{1,60}")
_SHOWN_CHARS = 80
_LIST_MAX = 100
_ENV_MAX = 50


class InvalidOption(ValueError):
    """An annotation with a value that means nothing. The text names annotation, value, where it is and what was expected."""

    def __init__(self, name: str, value: str, where: str, expected: str, prefix: str = PREFIX) -> None:
        shown = value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "..."
        super().__init__(f"annotation {prefix}{name} of the {where} is {shown!r}: expected {expected}")
        self.name, self.value, self.expected = name, value, expected


@dataclass(frozen=True)
class Options:
    """What the annotations ask for. Port lists are inclusive ranges with names resolved to the numbers the containers declare.

    default_inbound_policy, opaque_ports, require_identity_ports, unchecked_path_ports: only checked here; the policy controller reads them
    from the objects itself, live. accelerate, unaccelerated_ports, real_caller: a node's agent obeys them. native_sidecar, capture: None
    and "" leave them to the mesh settings. connect_timeout_ms, detect_timeout_s, wait_before_exit_s: None leaves them to the sidecar, or to
    its kind. resources: as in Container.resources. env: further variables of the sidecar. settled: what capture follows though the pod does
    not say it itself, annotation -> value.
    """

    default_inbound_policy: str | None = None
    opaque_ports: tuple[Range, ...] = ()
    require_identity_ports: tuple[Range, ...] = ()
    unchecked_path_ports: tuple[Range, ...] = ()
    skip_inbound_ports: tuple[Range, ...] = ()
    skip_outbound_ports: tuple[Range, ...] = ()
    log_level: str = "info"
    log_format: str = "json"
    access_log: str = "off"
    forwarded: str = "off"
    keep_probes: bool = False
    shutdown_grace_s: int = 30
    wait_before_exit_s: int | None = None
    shutdown_endpoint: bool = True
    await_ready: bool = True
    native_sidecar: bool | None = None
    capture: str = ""
    connect_timeout_ms: int | None = None
    detect_timeout_s: float | None = None
    accelerate: bool = True
    unaccelerated_ports: tuple[Range, ...] = ()
    real_caller: bool = True
    image: str = ""
    image_pull_policy: str = ""
    resources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    settled: Mapping[str, str] = field(default_factory=dict)


def read_options(
    pod: Mapping[str, str], namespace: Mapping[str, str], ports: Mapping[str, int], mesh: Mapping[str, str] | None = None
) -> Options:
    """Options from the annotations of a pod and its namespace; raises InvalidOption for the first wrong one.

    ports: names of the pod's declared container ports. mesh: the defaults of this installation, option name -> text, checked by
    `check_defaults` when they were read. What capture follows and the pod does not say itself goes into ``settled``: capture follows it
    only at start, and whoever asks later must be told what capture does.
    """
    places = (("pod", pod), ("namespace", namespace), ("mesh settings", {PREFIX + name: text for name, text in (mesh or {}).items()}))
    for where, found in places:
        for key in sorted(found):
            if key.startswith(PREFIX) and key.removeprefix(PREFIX) not in _READERS:
                name = key.removeprefix(PREFIX)
                raise InvalidOption(name, found[key], where, f"one of the options {', '.join(_READERS)}")
            if key.startswith(_OTHER_PREFIX) and (name := key.removeprefix(_OTHER_PREFIX)) in _READERS:
                raise InvalidOption(name, found[key], where, f"it to be written {PREFIX}{name}", _OTHER_PREFIX)
    values: dict[str, Any] = {}
    settled: dict[str, str] = {}
    for name, (_, read) in _READERS.items():
        where, text = next(((where, found[PREFIX + name]) for where, found in places if PREFIX + name in found), ("", None))
        if text is None:
            continue
        try:
            values[name] = read(text.strip(), ports)
        except ValueError as error:
            raise InvalidOption(name, text, where, str(error)) from None
        if name in CAPTURE_OPTIONS and where != "pod":
            settled[PREFIX + name] = text
    resources = _resources(values)
    fields = {attribute: values[name] for name, (attribute, _) in _READERS.items() if attribute and name in values}
    return Options(**fields, resources=resources, settled=settled)


def check_defaults(defaults: Mapping[str, str]) -> None:
    """Raises InvalidOption for defaults of an installation that would spoil every pod, or that only the policy controller knows."""
    for name in POLICY_OPTIONS:
        if name in defaults:
            expected = "nothing: the policy controller has its own default, and reads annotations of namespaces and pods"
            raise InvalidOption(name, defaults[name], "mesh settings", expected)
    read_options({}, {}, {}, defaults)


def _resources(values: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    resources: dict[str, dict[str, str]] = {}
    for name in ("cpu", "memory", "ephemeral-storage"):
        request, limit = values.get(f"{name}-request"), values.get(f"{name}-limit")
        if request is not None and limit is not None and quantity(request) > quantity(limit):
            raise InvalidOption(f"{name}-request", request, "pod", f"at most {name}-limit, which is {limit}")
        for kind, value in (("requests", request), ("limits", limit)):
            if value is not None:
                resources.setdefault(kind, {})[name] = value
    return resources


# --- readers -------------------------------------------------------------------------------------------------------------------------


def quantity(text: str) -> Decimal:
    """``100m``, ``0.5``, ``64Mi`` as a number; raises ValueError."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError("a quantity such as 100m, 0.5 or 64Mi")
    number, suffix = Decimal(match[1]), match[2]
    return number * 2 ** _BINARY[suffix] if suffix in _BINARY else number.scaleb(_SCALE[suffix])


def _quantity(text: str, _: Mapping[str, int]) -> str:
    quantity(text)
    return text


def _port_list(text: str, declared: Mapping[str, int]) -> tuple[Range, ...]:
    """``25,8000-8010,postgres``: numbers, ranges and port names of the pod; a name that the pod does not declare means no port of it."""
    ranges: list[Range] = []
    entries = [part.strip() for part in text.split(",", _LIST_MAX)]
    if len(entries) > _LIST_MAX:
        raise ValueError(f"at most {_LIST_MAX} ports and ranges")
    for entry in entries:
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


def _one_of(*values: str) -> Reader:
    def read(text: str, _: Mapping[str, int]) -> str:
        if text not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return text

    return read


def _boolean(text: str, _: Mapping[str, int]) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _seconds(text: str, _: Mapping[str, int]) -> int:
    number = text.removesuffix("s")
    if not (number.isascii() and number.isdigit() and len(number) <= 4 and int(number) <= 3600):
        raise ValueError("seconds from 0 to 3600, such as 30 or 30s")
    return int(number)


def _duration(least_ms: int, most_ms: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        match = _DURATION.fullmatch(text)
        found = int(match[1]) * (1 if match[2] == "ms" else 1000) if match else -1
        if not least_ms <= found <= most_ms:
            raise ValueError(f"a duration from {least_ms} ms to {most_ms // 1000} s, such as 1500ms or 2s")
        return found

    return read


def _connect_timeout(text: str, _: Mapping[str, int]) -> int:
    return _duration(10, 60_000)(text)


def _detect_timeout(text: str, _: Mapping[str, int]) -> float:
    return _duration(100, 600_000)(text) / 1000


def _image(text: str, _: Mapping[str, int]) -> str:
    if not _IMAGE.fullmatch(text):
        raise ValueError("the name of a container image")
    return text


def _env(text: str, _: Mapping[str, int]) -> dict[str, str]:
    expected = "a JSON object of variables of the sidecar, such as {"
    expected += '"PILLION_MAX_CONNECTIONS": "1000"}'
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(expected) from None
    if not isinstance(found, dict) or len(found) > _ENV_MAX:
        raise ValueError(expected)
    for name, value in found.items():
        if not _ENV_NAME.fullmatch(name) or not isinstance(value, str) or len(value) > 1024 or "\0" in value:
            raise ValueError(expected)
        if name in FIXED_ENV:
            raise ValueError(f"no {name}, which the injector itself sets")
    return {str(name): str(value) for name, value in found.items()}


FIXED_ENV = frozenset(
    f"PILLION_{name}"
    for name in (
        *("POD_NAMESPACE", "POD_NAME", "POD_UID", "POD_IPS", "SERVICE_ACCOUNT", "TRUST_DOMAIN", "CONTROL_NAMESPACE", "IDENTITY_ADDR"),
        *("IDENTITY_TOKEN_FILE", "TRUST_ANCHORS_FILE", "POLICY_ADDR", "INBOUND_LISTEN", "OUTBOUND_LISTEN", "ADMIN_LISTEN"),
        *("INBOUND_PORTS", "PROBES", "PROVE_CAPTURE"),
    )
)
"""Variables that say who the pod is and whom it trusts: no annotation may change them."""

_READERS: Mapping[str, tuple[str, Reader]] = {
    "default-inbound-policy": ("default_inbound_policy", _one_of(*INBOUND_POLICIES)),
    "opaque-ports": ("opaque_ports", _port_list),
    "require-identity-ports": ("require_identity_ports", _port_list),
    "unchecked-path-ports": ("unchecked_path_ports", _port_list),
    "skip-inbound-ports": ("skip_inbound_ports", _port_list),
    "skip-outbound-ports": ("skip_outbound_ports", _port_list),
    "log-level": ("log_level", _one_of("debug", "info", "warning", "error")),
    "log-format": ("log_format", _one_of("json", "console")),
    "forwarded": ("forwarded", _one_of("off", "forwarded", "x-forwarded-for")),
    "access-log": ("access_log", _one_of("off", "errors", "all")),
    "keep-probes": ("keep_probes", _boolean),
    "shutdown-grace": ("shutdown_grace_s", _seconds),
    "wait-before-exit": ("wait_before_exit_s", _seconds),
    "shutdown-endpoint": ("shutdown_endpoint", _boolean),
    "await": ("await_ready", _boolean),
    "native-sidecar": ("native_sidecar", _boolean),
    "capture": ("capture", _one_of("agent", "init")),
    "connect-timeout": ("connect_timeout_ms", _connect_timeout),
    "detect-timeout": ("detect_timeout_s", _detect_timeout),
    "accelerate": ("accelerate", _boolean),
    "unaccelerated-ports": ("unaccelerated_ports", _port_list),
    "real-caller": ("real_caller", _boolean),
    "image": ("image", _image),
    "image-pull-policy": ("image_pull_policy", _one_of("Always", "IfNotPresent", "Never")),
    "cpu-request": ("", _quantity),
    "cpu-limit": ("", _quantity),
    "memory-request": ("", _quantity),
    "memory-limit": ("", _quantity),
    "ephemeral-storage-request": ("", _quantity),
    "ephemeral-storage-limit": ("", _quantity),
    "env": ("env", _env),
}
"""Option -> the field of `Options` that it becomes ("" for resources), and how it is read."""

NAMES = tuple(_READERS)
POLICY_OPTIONS = ("default-inbound-policy", "opaque-ports", "require-identity-ports", "unchecked-path-ports")
CAPTURE_OPTIONS = ("skip-inbound-ports", "skip-outbound-ports", "accelerate", "unaccelerated-ports", "real-caller")
