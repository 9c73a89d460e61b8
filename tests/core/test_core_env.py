"""Settings: typed values, defaults, and every error at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import env
from core.addrs import Addr, ListenAddr
from core.env import HostPort, InvalidSettings, load, setting


@dataclass(frozen=True)
class Config:
    listen: ListenAddr = setting("PILLION_LISTEN", env.listen_addr, default="[::]:4143", reason="where peers connect")
    identity: HostPort = setting("PILLION_IDENTITY_ADDR", env.host_port, reason="who certifies us")
    ports: tuple[int, ...] = setting("PILLION_PORTS", env.comma_list(env.port), default="", reason="declared ports")
    silence_s: float = setting("PILLION_SILENCE_MS", env.milliseconds(1, 60_000), default="100", unit="ms", reason="silence before we dial")


def test_gives_typed_values_and_defaults() -> None:
    config = load(Config, {"PILLION_IDENTITY_ADDR": "pillion-identity.pillion:8080", "PILLION_PORTS": "80, 443,", "PILLION_LISTEN": ""})
    assert config.listen == Addr("::", 4143)
    assert config.identity == ("pillion-identity.pillion", 8080)
    assert config.ports == (80, 443)
    assert config.silence_s == pytest.approx(0.1)


def test_reports_every_error_at_once_naming_setting_value_and_expectation() -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(Config, {"PILLION_LISTEN": "4143", "PILLION_PORTS": "80,http", "PILLION_SILENCE_MS": "0"})
    listen, identity, ports, silence = caught.value.problems
    assert "PILLION_LISTEN='4143': expected IP:PORT" in listen
    assert identity == "PILLION_IDENTITY_ADDR is not set: who certifies us"
    assert ports == "PILLION_PORTS='80,http': expected a whole number from 1 to 65535"
    assert "from 1 to 60000" in silence
    assert str(caught.value).count("\n") == 3


def test_a_long_wrong_value_is_shown_in_part_only() -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(Config, {"PILLION_IDENTITY_ADDR": "x" * 10_000})
    assert len(str(caught.value)) < 200


def test_describes_name_default_unit_and_reason() -> None:
    shown = env.describe(Config)
    assert "PILLION_SILENCE_MS     '100'        ms  silence before we dial" in shown
    assert "(required)" in shown


@pytest.mark.parametrize("value", ["yes", "1", "", "truely"])
def test_a_boolean_is_true_or_false_and_nothing_else(value: str) -> None:
    with pytest.raises(ValueError, match="expected true or false"):
        env.boolean(value)
    assert env.boolean(" TRUE ") is True
    assert env.boolean("false") is False


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "11", "ten", ""])
def test_a_number_outside_its_bounds_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="from 0 to 10"):
        env.number(0, 10)(value)


@pytest.mark.parametrize("value", ["²", "٣", "1_0", "+1", "0x1", "9" * 5000])
def test_an_integer_is_ascii_digits(value: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        env.integer(0, 1 << 40)(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("10.0.0.1:1", ("10.0.0.1", 1)), ("[fd00::1]:8080", ("fd00::1", 8080)), ("a.b:65535", ("a.b", 65535))],
)
def test_reads_and_writes_an_address_to_dial(value: str, expected: tuple[str, int]) -> None:
    assert env.host_port(value) == expected
    assert str(env.host_port(value)) == value


@pytest.mark.parametrize("value", ["", ":80", "host", "host:", "host:0", "host:65536", "fd00::1:80", "[]:80", "a b:80", "http://a:80"])
def test_refuses_what_cannot_be_dialled(value: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        env.host_port(value)


@pytest.mark.parametrize("value", ["[]", "{", "null", "[" * 100_000])
def test_json_that_is_no_object_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="expected a JSON object"):
        env.json_object(value)
    assert env.json_object('{"a": [1]}') == {"a": [1]}


@given(st.dictionaries(st.sampled_from([s.name for s in env.settings_of(Config)]), st.text()))
def test_any_text_gives_settings_or_the_declared_error(values: dict[str, str]) -> None:
    try:
        assert isinstance(load(Config, values), Config)
    except InvalidSettings as error:
        assert all(problem.startswith("PILLION_") for problem in error.problems)
