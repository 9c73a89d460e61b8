"""The node's agent on a real kernel: it may die, restart, be replaced and be removed under load, and capture has no gap."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_lab import AGENT_CAPABILITIES, APP_PORT, APP_UID, RELAY, Lab, Load, port_is_free, wait_for

from ebpf import bpfsys
from ebpf.plan import CONNECT, NFT, NFT_SOCKMAP, REFUSED
from ebpf.wire import Register, Remove, Status, Unregister
from tests.traces import pinned

pytestmark = [pytest.mark.netns, pytest.mark.kernel]

FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
_numbers = itertools.count()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    found = Lab(tmp_path, f"pa{os.getpid() % 100000}{next(_numbers)}")
    try:
        yield found
    finally:
        found.close()


def only(*names: str) -> list[str]:
    """Run as root with these capabilities and no other."""
    wanted = ",".join(f"+{name}" for name in names)
    return ["setpriv", f"--bounding-set=-all,{wanted}", f"--inh-caps=-all,{wanted}", "--"]


# --- what it does when everything works ---------------------------------------------------------------------------------------------


@FAMILIES
def test_the_app_sees_the_real_caller_and_the_caller_sees_what_it_dialled(lab: Lab, family: int) -> None:
    assert lab.start()["level"] == CONNECT
    one, two = lab.meshed()
    (seen,) = one.call(two.ips[family])
    assert seen["error"] == "" and seen["said"] == "word-0"
    mapped = "::ffff:" if family == 0 else ""
    assert seen["peername"] == [two.ips[family], APP_PORT], "getpeername() of who called"
    assert seen["accepted"][0] == mapped + one.ips[family], "accept() of the app: the calling pod, not the sidecar"
    counted = two.status()["counters"]
    assert counted["callers"] == 1 and counted["steered"] == 1
    assert one.status()["counters"]["captured"] == 1 and one.status()["counters"]["bytes"] > 0


def test_the_real_caller_can_be_switched_off_for_a_pod(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    assert two.register(real_caller=False)["ok"]
    (seen,) = one.call(two.ips[0])
    assert seen["accepted"][0] == f"::ffff:{two.ips[0]}", "the sidecar's own connection"
    assert two.status()["counters"]["refused_callers"] == 1


def test_acceleration_can_be_switched_off_for_a_pod_and_for_a_port(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    assert one.register(accelerate=False)["pod"]["accelerated"] is False
    assert two.register(unaccelerated=((APP_PORT, APP_PORT),))["pod"]["accelerated"] is True
    assert [seen["error"] for seen in one.call(two.ips[0], count=3)] == [""] * 3
    assert one.status()["counters"]["captured"] == 3
    assert [pod.status()["counters"]["messages"] for pod in (one, two)] == [0, 0]


def test_skipped_ports_go_around_the_sidecar(lab: Lab) -> None:
    lab.start()
    one, two = lab.pods
    assert one.register(skip_outbound=((APP_PORT, APP_PORT),))["ok"]
    two.app()
    assert one.call(two.ips[0])[0]["accepted"][0] == f"::ffff:{one.ips[0]}", "no sidecar anywhere: a direct connection"
    assert one.call(two.ips[0], 9999)[0]["error"] == "ConnectionRefusedError"
    assert one.status()["counters"]["captured"] == 1, "the other port is captured"


def test_changed_options_count_at_once_where_nftables_captures_too(lab: Lab) -> None:
    assert lab.start("--capture", "nft")["level"] in (NFT_SOCKMAP, NFT)
    one, _ = lab.pods
    assert one.register(skip_inbound=((8080, 8080),), skip_outbound=((25, 25),))["ok"]
    assert "tcp dport 25 return" in one.rules() and "8080" in one.rules()
    assert one.register()["ok"]
    assert "tcp dport 25 return" not in one.rules() and "8080" not in one.rules()
    assert "redirect to" in one.rules()


@FAMILIES
def test_capture_without_a_sidecar_refuses_both_ways(lab: Lab, family: int) -> None:
    lab.start()
    one, two = lab.pods
    two.app()
    assert one.call(two.ips[family])[0]["error"] == "", "before: nothing is in the way"
    assert two.register()["ok"]
    assert one.call(two.ips[family])[0]["error"] == "ConnectionRefusedError", "inbound: nobody takes it"
    assert one.register()["ok"]
    assert one.call("192.0.2.1", 80)[0]["error"] == "ConnectionRefusedError", "outbound: never around"
    assert two.status()["counters"]["refused_inbound"] >= 1


def test_a_sidecar_that_starts_again_is_found_by_itself(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    sidecar = two.processes[0]
    sidecar.kill()
    sidecar.wait()
    assert one.call(two.ips[0])[0]["error"]
    two.relay()
    wait_for(lambda: one.call(two.ips[0])[0]["error"] == "", "the new listener is steered to")


def test_a_pod_whose_app_listens_on_the_sidecars_port_is_not_steered_to_the_app(lab: Lab) -> None:
    lab.start()
    one, two = lab.pods
    for pod in lab.pods:
        assert pod.register()["ok"]
    impostor = two.spawn(APP_UID, sys.executable, str(RELAY), "sidecar")
    assert impostor.stdout is not None and impostor.stdout.readline() == "listening\n"
    one.relay()
    two.app()
    assert one.call(two.ips[0])[0]["error"]
    assert two.status()["listens"] is False


def test_the_agent_is_small(lab: Lab) -> None:
    assert lab.start()["resident_bytes"] < 20_000_000
    lab.meshed()
    assert lab.ask(Status())["node"]["resident_bytes"] < 20_000_000


def test_only_root_may_talk_to_the_agent(lab: Lab) -> None:
    lab.start()
    assert os.stat(lab.socket).st_mode & 0o777 == 0o600
    os.chmod(lab.socket, 0o666)
    for folder in [lab.folder, *lab.folder.parents][:4]:
        os.chmod(folder, os.stat(folder).st_mode | 0o011)
    script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\nprint(s.recv(99))"
    words = ["setpriv", "--reuid=65534", "--clear-groups", "--", sys.executable, "-c", script, str(lab.socket)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "only root may talk to the agent" in done.stdout, done.stderr


def test_the_nodes_own_namespace_is_never_captured(lab: Lab) -> None:
    lab.start()
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    answer = lab.ask(Register(lab.pods[0].facts()), (netns,))
    os.close(netns)
    assert not answer["ok"] and "node's own network namespace" in answer["error"]
    assert "one file descriptor" in lab.ask(Register(lab.pods[0].facts()))["error"]


def test_metrics_and_health_are_on_the_admin_port(lab: Lab) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    port = next(port for port in range(19991, 20100) if port_is_free(port))
    lab.start("--admin", f"127.0.0.1:{port}")
    one, two = lab.meshed()
    one.call(two.ips[0], count=3)

    def get(path: str, method: str = "GET") -> tuple[bytes, bytes]:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            answer = b""
            while data := sock.recv(65536):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        return head.split(b"\r\n")[0], body

    assert get("/ready") == (b"HTTP/1.1 200 OK", b"ready\n") and get("/nowhere")[0] == b"HTTP/1.1 404 Not Found"
    assert get("/metrics", "POST")[0] == b"HTTP/1.1 405 Method Not Allowed"
    families = {family.name: family for family in parser.text_string_to_metric_families(get("/metrics")[1].decode())}
    captured = {sample.labels["pod"]: sample.value for sample in families["pillion_agent_connections_captured"].samples}
    assert captured == {"pod-1": 3, "pod-2": 0}
    assert {sample.labels["level"]: sample.value for sample in families["pillion_agent_pods"].samples}["1"] == 2
    assert sum(sample.value for sample in families["pillion_agent_redirected_bytes"].samples) > 0
    assert {sample.labels["cause"] for sample in families["pillion_agent_fallbacks"].samples} == {"order", "memory", "unpaired", "full"}


# --- dying, restarting, being replaced ------------------------------------------------------------------------------------------------


def test_a_killed_agent_leaves_capture_as_it_is_and_a_new_one_takes_over_without_loading_anything(lab: Lab) -> None:
    ability = lab.start()["ability"]
    one, two = lab.meshed()
    load = Load(one, two.ips[0])
    before = objects(lab)
    lab.kill(signal.SIGKILL)
    assert one.call(two.ips[0], count=20)[-1]["error"] == "", "new connections while there is no agent"
    node = lab.start()
    assert node["level"] == CONNECT and node["ability"] == ability and objects(lab) == before
    assert one.status()["level"] == two.status()["level"] == CONNECT and two.status()["listens"]
    assert [pod.status()["accelerated_to_app"] for pod in lab.pods] == [not ability["to_app"]] * 2
    connections, failed, held = load.stop()
    assert connections > 20 and not failed and held
    assert one.status()["counters"]["captured"] > connections, "the counters went on"


def test_an_agent_with_other_programs_replaces_them_under_load(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    load = Load(one, two.ips[1])
    links = pinned(lab.pins)["link"]
    lab.kill(signal.SIGTERM)
    state = json.loads((lab.folder / "agent.json").read_text())
    (lab.folder / "agent.json").write_text(json.dumps(state | {"fingerprint": "of other programs"}))
    programs = bpfsys.ids("prog")
    assert lab.start()["level"] == CONNECT
    assert len(bpfsys.ids("prog") - programs) >= 9, "new programs were loaded"
    assert links and pinned(lab.pins)["link"] == links, "into the same links"
    connections, failed, held = load.stop()
    assert connections > 20 and not failed and held
    assert one.call(two.ips[1])[0]["error"] == ""


def test_pods_of_an_agent_before_are_accelerated_as_the_new_one_finds_right(lab: Lab) -> None:
    found = lab.start()["ability"]["to_app"]
    one, two = lab.meshed()
    assert [pod.status()["accelerated_to_app"] for pod in lab.pods] == [not found] * 2
    lab.kill(signal.SIGTERM)
    state = json.loads((lab.folder / "agent.json").read_text())
    (lab.folder / "agent.json").write_text(json.dumps(state | {"to_app": "" if found else "FIONREAD tells of 0 bytes"}))
    node = lab.start()
    assert [pod.status()["accelerated_to_app"] for pod in lab.pods] == [bool(found)] * 2
    assert one.status()["level_name"] == node["level_name"]
    assert node["level_name"].endswith("sockmap" if found else "sockmap, from the app")
    assert one.call(two.ips[0])[0]["error"] == ""
    assert one.status()["counters"]["bytes"] > 0


def test_a_sidecar_that_started_while_there_was_no_agent_is_found_by_the_next_one(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    lab.kill()
    two.processes[0].kill()
    two.processes[0].wait()
    two.relay()
    lab.start()
    wait_for(lambda: one.call(two.ips[0])[0]["error"] == "", "the new agent finds the new sidecar")


def test_an_unreadable_state_file_costs_no_capture(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    lab.kill()
    (lab.folder / "agent.json").write_text("{")
    lab.start()
    assert one.call(two.ips[0])[0]["error"] == ""
    assert two.register()["pod"]["level"] == CONNECT, "whoever started the pod tells the new agent"
    assert one.call(two.ips[0])[0]["error"] == ""


def test_two_agents_do_not_share_their_pins(lab: Lab) -> None:
    lab.start()
    second = subprocess.run(lab.words(), capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2])
    assert second.returncode == 1 and "another agent holds" in second.stderr


def test_a_pod_that_ends_in_the_middle_of_a_transfer_is_forgotten(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    load = Load(one, two.ips[0], patience_s=3)
    cookie = two.status()["cookie"]
    two.end()
    wait_for(lambda: len(lab.ask(Status())["pods"]) == 1, "the pod is forgotten")
    assert not (lab.pins / "1" / "pods" / str(cookie)).exists()
    assert one.call(two.ips[0], patience_s=3)[0]["error"], "nobody there any more"
    assert load.stop()[2] is False
    assert one.status()["level"] == CONNECT


def test_an_unregistered_pod_is_left_alone(lab: Lab) -> None:
    lab.start()
    one, two = lab.meshed()
    assert lab.ask(Unregister(one.id)) == {"ok": True} and lab.ask(Unregister(one.id)) == {"ok": False}
    assert one.call(two.ips[0])[0]["error"] == "", "it calls like any pod without a mesh"
    assert one.validate(0.1)[0] == 1


# --- removal --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False], ids=["agent running", "agent gone"])
def test_removal_brings_pods_to_nftables_without_a_gap_and_leaves_nothing(lab: Lab, running: bool) -> None:
    lab.start()
    ours = objects(lab)
    assert len(ours["prog"]) >= 9 and len(ours["map"]) >= 8
    one, two = lab.meshed()
    load = Load(one, two.ips[0])
    if not running:
        lab.kill()
    removed = lab.remove()
    assert removed.returncode == 0, removed.stderr
    assert one.call(two.ips[0], count=5)[-1]["error"] == "", "captured by nftables now"
    assert "redirect to :4140" in one.rules() and "redirect to :4143" in two.rules()
    connections, failed, held = load.stop()
    assert connections > 5 and not failed and held
    for pod in lab.pods:
        pod.end()
    assert not lab.socket.exists() and not (lab.folder / "agent.json").exists() and not lab.pins.exists()
    if lab.agent is not None:
        lab.agent.wait(30)
    for kind, ids in ours.items():
        wait_for(lambda kind=kind, ids=ids: not bpfsys.ids(kind) & ids, f"no {kind} of ours is left")


def test_a_sidecar_that_asks_for_the_target_after_removal_learns_none_and_refuses(lab: Lab) -> None:
    """What conntrack answers then is the sidecar's own address, or, when it met the connection in its middle, the caller's."""
    lab.start()
    for pod in lab.pods:
        assert pod.register()["ok"]
    one, two = lab.pods
    sidecar = one.relay()
    two.relay()
    two.app()
    paired = one.status()["counters"]["paired"]
    os.kill(sidecar.pid, signal.SIGSTOP)
    caller = one.spawn(APP_UID, sys.executable, str(RELAY), "call", two.ips[0], str(APP_PORT), "1")
    wait_for(lambda: one.status()["counters"]["paired"] > paired, "the connection waits for the sidecar to accept it")
    removed = lab.remove()
    os.kill(sidecar.pid, signal.SIGCONT)
    assert removed.returncode == 0, removed.stderr
    assert sidecar.stdout is not None and sidecar.stdout.readline().startswith("refused ")
    out, errors = caller.communicate(timeout=60)
    assert json.loads(out)["error"], errors
    assert one.call(two.ips[0])[0]["error"] == "", "captured by nftables now"


def objects(lab: Lab) -> dict[str, set[int]]:
    """The programs and maps that a lab has pinned, by their ids in the kernel; other tests have their own at the same time."""
    found: dict[str, set[int]] = {"prog": set(), "map": set()}
    for kind, folder in (("prog", "programs"), ("map", "maps")):
        for path in (lab.pins / "1" / folder).iterdir():
            fd = bpfsys.pinned(path)
            try:
                info = Path(f"/proc/self/fdinfo/{fd}").read_text()
            finally:
                os.close(fd)
            found[kind] |= {int(line.split()[1]) for line in info.splitlines() if line.startswith(f"{kind}_id:")}
    return found


def test_a_pod_that_nftables_cannot_take_stops_the_removal(lab: Lab) -> None:
    lab.start(before=["env", "PATH=/nowhere"])
    one, _ = lab.pods
    assert one.register()["pod"]["level"] == CONNECT
    one.relay()
    removed = lab.ask(Remove())
    assert not removed["ok"] and "lab/pod-1" in removed["error"] and "nft is not installed" in removed["error"]
    assert one.status()["level"] == REFUSED, "it keeps what it has"
    assert one.call("192.0.2.1", 80)[0]["error"], "still captured"


# --- the ladder -----------------------------------------------------------------------------------------------------------------------


def test_the_capabilities_that_are_documented_are_enough(lab: Lab) -> None:
    assert lab.start(before=only(*AGENT_CAPABILITIES))["level"] == CONNECT
    one, two = lab.meshed()
    assert one.call(two.ips[0])[0]["error"] == ""
    assert [pod.status()["level"] for pod in lab.pods] == [CONNECT, CONNECT], "nothing was found missing on the way"


@pytest.mark.parametrize("missing", AGENT_CAPABILITIES)
def test_each_of_the_documented_capabilities_is_needed_and_a_restart_with_it_climbs(lab: Lab, missing: str) -> None:
    lab.start(before=only(*(set(AGENT_CAPABILITIES) - {missing})))
    if missing != "sys_admin":  # without it nothing can enter a pod
        assert lab.pods[0].register()["pod"]["level"] != CONNECT
    lab.kill()
    assert lab.start(before=only(*AGENT_CAPABILITIES))["level"] == CONNECT
    assert lab.pods[0].register()["pod"]["level"] == CONNECT
    assert "redirect" not in lab.pods[0].rules()


def test_without_ptrace_nftables_captures_and_the_hop_is_still_shortened(lab: Lab) -> None:
    node = lab.start(before=only(*(set(AGENT_CAPABILITIES) - {"sys_ptrace"})))
    assert node["level"] == NFT_SOCKMAP and "CAP_SYS_PTRACE" in node["ability"]["steer"]
    one, two = lab.meshed()
    assert one.status()["level_name"] == "nftables + sockmap"
    seen = one.call(two.ips[0], count=5)
    assert [each["error"] for each in seen] == [""] * 5
    assert seen[0]["accepted"][0] == f"::ffff:{one.ips[0]}", "the real caller works behind nftables too"
    assert one.status()["counters"]["messages"] > 0 and two.status()["counters"]["messages"] > 0
    assert one.processes and one.status()["counters"]["captured"] == 0


def hidden(path: str) -> list[str]:
    """Run without what is below a path, in a mount namespace of its own."""
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {path} && exec "$0" "$@"']


@pytest.mark.parametrize(
    ("before", "part", "words"),
    [
        (hidden("/sys/kernel/btf"), "sockmap", "/sys/kernel/btf/vmlinux is missing"),
        (hidden("/usr/lib/python3/dist-packages"), "connect", "install the Debian package python3-bpfcc"),
        (only(*(set(AGENT_CAPABILITIES) - {"syslog"})), "sockmap", "bpf_probe_read"),
    ],
    ids=["no BTF", "no bcc", "no CAP_SYSLOG"],
)  # fmt: skip
def test_without_what_the_programs_need_nftables_captures(lab: Lab, before: list[str], part: str, words: str) -> None:
    (lab.folder / "bpf").mkdir()
    bpfsys.mount_bpffs(lab.folder / "bpf")
    node = lab.start(before=before)
    assert node["level"] == NFT and words in node["ability"][part], node
    one, two = lab.meshed()
    assert one.status()["level_name"] == "nftables" and words in one.status()["message"]
    assert one.validate()[0] == 1, "the sidecar's port is taken: this runs before it"
    assert one.call(two.ips[0])[0]["error"] == "" and "redirect to :4143" in two.rules()


def test_without_a_bpf_file_system_nftables_captures(lab: Lab) -> None:
    node = lab.start("--pins", "/proc/pillion-nowhere/pillion")
    assert (
        node["level"] == NFT
        and "there is no bpf file system at /proc/pillion-nowhere, and it cannot be mounted" in node["ability"]["connect"]
    )
    assert lab.pods[0].register()["pod"]["level"] == NFT and lab.pods[0].validate()[0] == 0


def test_without_any_privilege_pods_are_refused_in_words(lab: Lab) -> None:
    for folder in [lab.folder, *lab.folder.parents][:4]:
        os.chmod(folder, os.stat(folder).st_mode | 0o077)
    node = lab.start(before=["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--"])
    assert node["level"] == REFUSED
    assert "cannot be mounted: Operation not permitted" in node["ability"]["connect"]
    assert "Operation not permitted" in node["ability"]["nft"]
    answer = lab.pods[0].register()
    assert not answer["ok"] and "Operation not permitted" in answer["error"]


def test_the_owner_may_insist_on_ebpf_or_forbid_it(lab: Lab) -> None:
    assert lab.start("--capture", "nft")["level"] == NFT_SOCKMAP
    lab.kill()
    lab.start("--capture", "ebpf", before=hidden("/sys/kernel/btf"))
    (lab.folder / "agent.json").unlink()
    lab.kill()
    node = lab.start("--capture", "ebpf", before=hidden("/sys/kernel/btf"))
    assert node["level"] == REFUSED
    answer = lab.pods[0].register()
    assert not answer["ok"] and "must not start" in answer["error"] and "capture by nftables is switched off" in answer["error"]
