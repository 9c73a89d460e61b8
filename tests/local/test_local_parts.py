"""The small parts of the runner that decide something: probes, closed folders, subordinate ids, names, messages."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
import trio
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from local import client, protocol, volumes
from local.check import check as check_machine
from local.commands import local
from local.exposure import closed_folders
from local.probing import Tally, check
from local.search import search_path
from local.state import BadName, own_folder, state_folder
from local.userns import subordinate_start


async def no_exec(command: list[str], timeout_s: float) -> str | None:
    return None if command == ["true"] else "the command exited with 1"


def test_a_probe_fails_only_after_its_threshold_in_a_row() -> None:
    tally = Tally(failure_threshold=2, healthy=True)
    assert (tally.record(False), tally.healthy) == (False, True)
    assert (tally.record(True), tally.healthy) == (True, True)
    tally.record(False)
    assert (tally.record(False), tally.healthy) == (True, False)


async def answer(response: bytes, stream: trio.SocketStream) -> None:
    await stream.receive_some(4096)
    try:
        for byte in response:
            await stream.send_all(bytes([byte]))
    except trio.BrokenResourceError:
        pass  # a probe hangs up as soon as it knows


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", None),
        (b"HTTP/1.0 302 Found\r\n\r\n", None),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "HTTP status 503"),
        (b"220 smtp\r\n", "the answer is not HTTP"),
        (b"", "the answer is not HTTP"),
    ],
)
async def test_an_http_probe_reads_the_status(nursery: trio.Nursery, response: bytes, expected: str | None) -> None:
    listeners = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), partial(answer, response), 0)
    port = listeners[0].socket.getsockname()[1]
    assert await check({"httpGet": {"port": "web", "path": "/"}, "timeoutSeconds": 5}, "127.0.0.1", {"web": port}, no_exec) == expected
    assert await check({"tcpSocket": {"port": port}}, "127.0.0.1", {}, no_exec) is None
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("failed: port 8081 cannot be connected to\n", "port 8081 cannot be connected to"),
        ("failed: \x1b[31m", "HTTP status 503"),
        ("something else listens there", "HTTP status 503"),
    ],
)
async def test_what_a_sidecar_says_of_a_probe_is_the_reason(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, body: str, expected: str
) -> None:
    whole = f"HTTP/1.1 503 Service Unavailable\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
    listeners = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), partial(answer, whole), 0)
    port = listeners[0].socket.getsockname()[1]
    monkeypatch.setattr("local.probing.ADMIN_PORT", port)
    assert await check({"httpGet": {"port": port, "path": "/"}, "timeoutSeconds": 5}, "127.0.0.1", {}, no_exec) == expected
    nursery.cancel_scope.cancel()


async def test_a_probe_says_why_it_failed() -> None:
    assert await check({"exec": {"command": ["true"]}}, "127.0.0.1", {}, no_exec) is None
    assert await check({"exec": {"command": ["false"]}}, "127.0.0.1", {}, no_exec) == "the command exited with 1"
    assert await check({"httpGet": {"port": "nope"}}, "127.0.0.1", {}, no_exec) == "the container has no port named nope"
    assert await check({}, "127.0.0.1", {}, no_exec) == "the probe names no action"


async def test_a_silent_app_fails_its_probe_in_time(nursery: trio.Nursery, autojump_clock: object) -> None:
    async def silent(command: list[str], timeout_s: float) -> str | None:
        await trio.sleep_forever()
        raise AssertionError

    assert await check({"exec": {"command": ["x"]}, "timeoutSeconds": 7}, "127.0.0.1", {}, silent) == "no answer within 7 s"


@pytest.mark.parametrize(("status", "expected"), [(1, None), (2, "the service is not serving"), (None, "the call failed")])
async def test_a_grpc_probe_asks_a_real_server(nursery: trio.Nursery, status: int | None, expected: str | None) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        server.initiate_connection()
        asked: list[h2.events.RequestReceived] = []
        while not asked:
            asked = [one for one in server.receive_data(await stream.receive_some()) if isinstance(one, h2.events.RequestReceived)]
        assert dict(asked[0].headers)[":path"] == "/grpc.health.v1.Health/Check"
        server.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")], end_stream=status is None)
        if status is not None:
            message = bytes([8, status])
            server.send_data(1, b"\x00" + len(message).to_bytes(4, "big") + message)
            server.send_headers(1, [("grpc-status", "0")], end_stream=True)
        for byte in server.data_to_send():
            try:
                await stream.send_all(bytes([byte]))
            except trio.BrokenResourceError:
                return  # it had its answer

    listeners: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, serve, 0)
    port = listeners[0].socket.getsockname()[1]
    assert await check({"grpc": {"port": port, "service": "cart"}, "timeoutSeconds": 5}, "127.0.0.1", {}, no_exec) == expected
    nursery.cancel_scope.cancel()


def test_only_closed_folders_are_replaced() -> None:
    closed = {"/root": 0o700, "/home/me": 0o750}

    def mode_of(path: str) -> int:
        return stat.S_IFDIR | closed.get(path, 0o755)

    found = closed_folders(["/root/src/pillion", "/root/src/pillion/.venv", "/root/.pyenv/x", "/usr/bin", "/home/me/a"], mode_of)
    assert found == {"/root": ["/root/.pyenv/x", "/root/src/pillion"], "/home/me": ["/home/me/a"]}


@pytest.mark.parametrize(
    ("lines", "start"),
    [
        (["me:100000:65536"], 100000),
        (["you:1:65536", "1000:200000:65536"], 200000),
        (["me:100000:1000"], None),
        (["# comment", "", "me"], None),
    ],
)
def test_a_subordinate_range_is_found_by_name_or_uid(lines: list[str], start: int | None) -> None:
    assert subordinate_start(lines, ["me", "1000"]) == start


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "x" * 32, "-a"])
def test_a_mesh_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(BadName):
        state_folder(name)


def test_a_folder_that_others_could_have_made_is_used_only_while_it_is_ours_alone(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert own_folder(str(ours)) == own_folder(str(ours)) == str(ours)
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "open").mkdir(0o700)
    (tmp_path / "open").chmod(0o770)
    (tmp_path / "file").touch(0o600)
    for name in ("link", "open", "file"):
        with pytest.raises(BadName, match="only you can write"):
            own_folder(str(tmp_path / name))


def test_messages_survive_the_wire() -> None:
    message = protocol.Exec("shop", "web", None, ("sh", "-c", "ü"), {"A": "1"})
    assert protocol.decode_request(protocol.encode(message)) == message


@given(st.binary(max_size=300))
def test_a_foreign_message_is_a_bad_message(line: bytes) -> None:
    try:
        protocol.decode_request(line)
    except protocol.BadMessage:
        pass


@pytest.mark.parametrize("command", [["status"], ["down"], ["logs", "web"], ["exec", "web", "--", "true"]])
def test_commands_without_a_mesh_say_what_to_do(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "running", list)
    result = CliRunner().invoke(local, [command[0], "--name", "no-such-mesh", *command[1:]])
    assert result.exit_code == 1
    assert result.output == (
        "error: no mesh named 'no-such-mesh' is running here\n  try: pillion local up -f DIR --name no-such-mesh --detach\n"
    )


def test_status_cuts_no_name_however_narrow_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-workload-with-a-long-name-kq624c2x6g-0"
    pod = protocol.PodStatus("hello", name, "Deployment/x", "Running", True, True, "", "", ("10.142.0.12", "fd42:142::c"), ())
    service = protocol.ServiceStatus("hello", "web", (), (80, 443), ("10.142.0.12",))
    found = protocol.MeshStatus("default", True, True, (), (), (pod,), (service,), {}, 1, "/run")
    monkeypatch.setattr(client, "ask", lambda *_: found)
    monkeypatch.setenv("COLUMNS", "40")
    pods, services = CliRunner().invoke(local, ["status"]).stdout.rstrip("\n").split("\n\n")
    assert pods.splitlines()[1].split() == ["hello", name, "0/0", "Running", "yes", "0", "10.142.0.12,", "fd42:142::c"]
    assert [line.split() for line in services.splitlines()] == [
        ["NAMESPACE", "SERVICE", "ADDRESS", "PORTS", "READY", "ENDPOINTS"],
        ["hello", "web", "headless", "80,", "443", "10.142.0.12"],
    ]


def test_files_that_are_no_manifest_are_refused_before_a_mesh_is_asked(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"kind: \xff\n")
    for file, said, reason in (
        (str(tmp_path / "latin.yaml"), b"", "expected UTF-8, found something else at byte 6"),
        ("-", "kind: Pod".encode("utf-16"), "expected UTF-8, found something else at byte 0"),
        ("/dev/zero", b"", "expected less than 8388608 bytes"),
    ):
        result = CliRunner().invoke(local, ["apply", "--name", "no-such-mesh", "-f", file], input=said)
        assert (result.exit_code, result.output) == (1, f"error: {file}: {reason}\n")


def test_a_mesh_is_started_by_one_command_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_CLAIM_TIMEOUT_S", 0.0)
    name, state = f"claimed-{os.getpid()}", tmp_path / "mesh"
    held = client.claim(name, state)
    with pytest.raises(client.CannotStart, match="being started or ended"):
        client.claim(name, state)
    state.rmdir()  # as a runner that ends does: its lock lies on a folder that is no longer this mesh's
    again = client.claim(name, state)
    os.close(held)
    with pytest.raises(client.CannotStart, match="being started or ended"):
        client.claim(name, state)
    os.close(again)
    os.close(client.claim(name, state))


def test_capture_by_ebpf_without_root_is_refused_in_words(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    result = CliRunner().invoke(local, ["up", "-f", str(tmp_path), "--capture", "ebpf"])
    assert result.exit_code == 1 and "--capture nft" in result.output


def test_programs_that_only_root_has_in_its_path_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert search_path() == "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
    monkeypatch.delenv("PATH")
    assert search_path().endswith(":/usr/sbin:/sbin")


def test_a_state_folder_too_long_for_sockets_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(client.CannotStart, match="shorter --name"):
        client.prepare_state(tmp_path / ("x" * 100))
    client.prepare_state(tmp_path / "short")


def test_a_strict_umask_does_not_close_the_state_folder_to_the_users_of_the_mesh(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        client.prepare_state(tmp_path / "pillion" / "shop")
        assert os.umask(0o077) == 0o077  # as before for whatever the command does next
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "pillion", tmp_path / "pillion" / "shop")] == [0o755, 0o711]


def test_code_that_sidecars_cannot_read_is_named_with_a_command_that_can_be_pasted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = tmp_path / "my checkout"
    closed.mkdir(0o700)
    monkeypatch.setattr("local.exposure.own_paths", lambda: (str(closed), str(tmp_path)))
    tmp_path.chmod(0o755)
    missing = {finding.name: finding.missing for finding in check_machine()}["code readable by other users"]
    assert missing.endswith(f": chmod -R o+rX '{closed}'")


def test_a_file_written_for_another_user_never_goes_where_his_links_lead(tmp_path: Path) -> None:
    (tmp_path / "ours").write_text("kept")
    for name in (".ca.crt.new", "ca.crt"):
        (tmp_path / name).symlink_to("ours")
    assert volumes.write_atomically(tmp_path / "ca.crt", b"fresh", 0o644)
    assert not (tmp_path / "ca.crt").is_symlink() and (tmp_path / "ca.crt").read_text() == "fresh"
    assert (tmp_path / "ours").read_text() == "kept"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["ca.crt", "ours"]
