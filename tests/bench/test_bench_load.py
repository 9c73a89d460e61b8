"""The loads: requests that do not repeat and decode as meant, arrivals fixed beforehand, reports of other tools read right."""

from __future__ import annotations

from collections.abc import Callable

import hpack
import pytest

from bench.load import bulk, h2, h2load, openloop, wrk

WRK_OK = (
    '{"requests": 1000, "duration_us": 2000000, "connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0, '
    '"mean_us": 10.5, "p50_us": 9, "p99_us": 30}'
)
H2LOAD = """\
finished in 250.00ms, 40.00 req/s, 40.10MB/s
requests: 10 total, 10 started, 10 done, {ok} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: {ok} 2xx, 0 3xx, {failed} 4xx, 0 5xx
traffic: 10.00MB (10486060) total, 500B (500) headers (space savings 90.00%), 10.00MB (10485760) data
"""


@pytest.mark.parametrize("kind", ["http2", "grpc"])
@pytest.mark.parametrize("block", [h2.table_block, h2.plain_block])
def test_blocks_decode_to_a_valid_request_on_one_connection(kind: str, block: Callable[[str, int], bytes]) -> None:
    decoder = hpack.Decoder()
    for number in (0, 5, 4711, 5, 1):
        fields = {str(name): str(value) for name, value in decoder.decode(block(kind, number))}
        path, values = h2.varying(number, kind)
        assert fields[":path"] == path
        assert fields[":method"] == ("POST" if kind == "grpc" else "GET")
        assert fields[":scheme"] == "http"
        assert [fields[name] for name in h2.VARYING] == [value for _, value in values]
        assert all(fields[name] == value for name, value in h2.constants(kind))
        assert len(fields) == 3 + len(h2.constants(kind)) + 3


def test_plain_blocks_leave_the_dynamic_table_empty() -> None:
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    for number in range(3):
        decoder.decode(h2.plain_block("grpc", number))
    assert len(decoder.header_table.dynamic_entries) == 0


def test_no_two_requests_carry_the_same_three_values() -> None:
    seen = [h2.varying(number, "http2")[1] for number in range(2000)]
    for place in range(3):
        assert len({values[place] for values in seen}) == 2000
    assert len({h2.varying(number, "http2")[0].partition("?")[0] for number in range(2000)}) == 50


def test_a_request_names_its_stream_in_every_frame() -> None:
    data = h2.Requests("grpc", table=True).make(3, 7)
    frames = []
    while data:
        length = int.from_bytes(data[:3], "big")
        frames.append((data[3], data[4], int.from_bytes(data[5:9], "big")))
        data = data[9 + length :]
    assert frames == [(1, 4, 7), (0, 1, 7)]


def test_arrivals_are_the_same_for_every_contestant_and_of_the_right_rate() -> None:
    due = openloop.arrivals(500, 10)
    assert due == openloop.arrivals(500, 10)
    assert due == sorted(due)
    assert len(due) == pytest.approx(5000, rel=0.05)
    assert due[-1] < 10


def test_open_loop_requests_differ_in_three_headers() -> None:
    first, second = (openloop.request(number).decode().split("\r\n") for number in (0, 350))
    differing = [one.partition(":")[0] for one, other in zip(first, second, strict=True) if one != other]
    assert differing == ["X-Request-Id", "Traceparent", "X-Timestamp"]
    assert len(first) - 3 == 8


def test_a_good_wrk_run_is_read() -> None:
    outcome = wrk.parse(0, f"Running 2s test\n{WRK_OK}\n", "")
    assert (outcome.units, outcome.failed) == (1000, 0)
    assert outcome.metrics["throughput"] == 500.0


@pytest.mark.parametrize("kind", ["connect", "read", "write", "status", "timeout"])
def test_any_kind_of_wrk_error_fails_the_round(kind: str) -> None:
    outcome = wrk.parse(0, WRK_OK.replace(f'"{kind}": 0', f'"{kind}": 2'), "")
    assert outcome.failed == 2
    assert f"{kind} 2" in outcome.note


def test_a_wrk_that_did_not_run_fails_the_round_with_its_words() -> None:
    outcome = wrk.parse(1, "", "unable to connect")
    assert outcome.failed == 1
    assert "unable to connect" in outcome.note


def test_h2load_downloads_count_the_answers_and_uploads_the_requests() -> None:
    text = H2LOAD.format(ok=10, failed=0)
    assert h2load.parse(0, text, "", 0).metrics["bandwidth"] == pytest.approx(10485760 / 0.25 / 1e9)
    assert h2load.parse(0, text, "", 1 << 26).units == 10 * (1 << 26)


def test_a_failed_h2load_request_fails_the_round() -> None:
    assert h2load.parse(0, H2LOAD.format(ok=9, failed=1), "", 0).failed == 1


def test_a_h2load_report_without_figures_fails_the_round() -> None:
    assert h2load.parse(0, "finished in 1.00s", "", 0).failed == 1


def test_our_own_loads_report_percentiles_in_microseconds() -> None:
    said = h2.summary([number / 1e6 for number in range(1, 101)], ["reset"], 2.0)
    assert (said["requests"], said["failed"], said["why"]) == (100, 1, "reset")
    assert said["p50_us"] == pytest.approx(51)
    assert said["p99_us"] == pytest.approx(100)


def test_a_load_that_printed_nothing_fails_the_round() -> None:
    assert h2.parse(1, "", "Traceback: refused").failed == 1


def test_a_content_length_is_found_whatever_its_case() -> None:
    assert bulk.body_length(b"HTTP/1.1 200 OK\r\nContent-LENGTH: 42") == 42
    assert bulk.body_length(b"HTTP/1.1 200 OK") == 0
