"""Logs: one line an event, a level that changes at run time, nothing secret or unprintable, and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from core.runtime import logs


@pytest.fixture
def lines() -> Iterator[list[str]]:
    written: list[str] = []
    logs.configure("info", "json", written.append)
    yield written
    structlog.reset_defaults()
    logs.set_level("info")


def test_an_event_is_one_line_of_json_with_time_level_and_fields(lines: list[str]) -> None:
    logs.logger("inbound").warning("denied", client="10.0.0.1", port=80)
    event = json.loads(lines[0])
    assert lines[0].endswith("\n") and lines[0].count("\n") == 1
    assert list(event)[:3] == ["timestamp", "level", "event"]
    assert event["timestamp"].endswith("Z")
    assert {k: event[k] for k in ("level", "event", "component", "client", "port")} == {
        "level": "warning", "event": "denied", "component": "inbound", "client": "10.0.0.1", "port": 80,
    }  # fmt: skip


def test_the_level_changes_for_loggers_that_exist_already(lines: list[str]) -> None:
    log = logs.logger("inbound").bind(port=80)
    log.debug("quiet")
    logs.set_level("debug")
    log.debug("loud")
    logs.set_level("error")
    log.warning("quiet again")
    assert [json.loads(line)["event"] for line in lines] == ["loud"]
    assert logs.level() == "error"


def test_an_unknown_level_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'loud': expected debug, info, warning, error"):
        logs.set_level("loud")


@pytest.mark.parametrize("style", ["json", "console"])
def test_what_a_peer_sends_cannot_reach_the_terminal_or_fill_the_disk(lines: list[str], style: str) -> None:
    logs.configure("info", style, lines.append)
    logs.logger("inbound").info("refused", target="\x1b[2J\r\n\x9b", name=b"\xff\x00", long="a" * 1_000_000)
    (line,) = lines
    assert len(line) < 4000
    assert line.rstrip("\n").isprintable()


def test_the_policy_that_let_a_request_in_is_no_secret_of_the_access_log(lines: list[str]) -> None:
    logs.logger("access").info("access", authorization="authorizationpolicy shop/web", token="t")
    logs.logger("proxy").info("request", authorization="Bearer t")
    access, other = map(json.loads, lines)
    assert (access["authorization"], access["token"]) == ("authorizationpolicy shop/web", "(not logged)")
    assert other["authorization"] == "(not logged)"


def test_fields_named_like_secrets_are_blanked(lines: list[str]) -> None:
    logs.logger("identity").info("certified", token="eyJ...", key_pem=b"-----BEGIN")
    assert "eyJ" not in lines[0] and "BEGIN" not in lines[0]


def test_an_exception_stays_on_its_line_with_its_traceback(lines: list[str]) -> None:
    try:
        raise KeyError("shop")
    except KeyError as error:
        logs.logger("policy").error("index failed", exc_info=error)
    assert "KeyError: 'shop'" in json.loads(lines[0])["exception"]
    assert lines[0].count("\n") == 1


def test_values_json_does_not_know_become_text(lines: list[str]) -> None:
    logs.logger("policy").info("x", value=ValueError("why"), bad="\ud800")
    assert json.loads(lines[0])["value"] == "why"


def test_logging_loads_neither_asyncio_nor_rich() -> None:
    code = "import sys; import core.runtime.logs as l; l.configure(); print([m for m in ('asyncio', 'rich') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_the_real_asyncio_can_be_imported_afterwards() -> None:
    code = "import core.runtime.logs, asyncio; asyncio.run(asyncio.sleep(0)); print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ok\n"
