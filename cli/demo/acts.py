"""The demo's acts in order, each a function that prints lines that can fail. Called by cli.demo.command.

What must come out is written here and in examples/shop; what does come out is asked of the pods, the sidecars and the wire.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from cli.demo.calls import Call, LogEnd, Outcome, Shop, told
from cli.demo.evidence import Capture, Hops, Journey, capture_level, hops, read_paths
from cli.demo.load import Background, Load, Result
from cli.demo.show import Show
from identity.admin_client import AdminRefused, IdentityAdmin
from identity.admin_wire import Status
from local import protocol

MESHED = ("web", "cart", "stock")
_LIVE_WITHIN_S = 5.0
_STEP_WITHIN_S = 30.0
_LOAD_AROUND_S = 1.0
_LOAD_CALLS_MIN = 10  # of each kind: fewer would prove nothing
_MEMORY_MAX_BYTES = 64 << 20  # of a sidecar after the load; idle ones have about 45

_QUOTE = ("grpc", "stock:50051", "/shop.Stock/Quote", "tea")
_CONSOLE = ("tcp", "stock:6400", "tea")

CALLS = (
    Call("stranger", "web", "web GET /  (HTTP/1.1)", ("http", "GET", "http://web/"), "200", "default all-unauthenticated"),
    Call(
        "web",
        "cart",
        "cart GET /basket  (HTTP/1.1)",
        ("http", "GET", "http://cart/basket"),
        "200",
        "authorizationpolicy shop/web-sees-baskets",
    ),
    Call(
        "web", "cart", "cart POST /refunds  (HTTP/1.1)", ("http", "POST", "http://cart/refunds"), "403", why="shop/cashier-refunds admits"
    ),
    Call(
        "web",
        "cart",
        "cart GET /basket/..%2frefunds  (HTTP/1.1)",
        ("http", "GET", "http://cart/basket/..%2frefunds"),
        "400",
        why="has two readings",
    ),
    Call("stranger", "cart", "cart GET /basket  (HTTP/1.1)", ("http", "GET", "http://cart/basket"), "403", why="a client without identity"),
    Call("cart", "stock", "stock Quote  (gRPC)", _QUOTE, "OK", "authorizationpolicy shop/cart-asks-prices"),
    Call(
        "cart",
        "stock",
        "stock Restock  (gRPC)",
        ("grpc", "stock:50051", "/shop.Stock/Restock", "tea"),
        "UNIMPLEMENTED",
        why="no rule of the routes",
    ),
    Call("web", "stock", "stock Quote  (gRPC)", _QUOTE, "PERMISSION_DENIED", why="shop/cart-asks-prices admits"),
    Call("stranger", "stock", "stock Quote  (gRPC)", _QUOTE, "PERMISSION_DENIED", why="a client without identity"),
    Call("cart", "stock", "stock's console  (TCP, server speaks first)", _CONSOLE, "220", "authorizationpolicy shop/cart-uses-console"),
    Call("web", "stock", "stock's console  (TCP, server speaks first)", _CONSOLE, "nothing", why="shop/cart-uses-console admits"),
    Call("stranger", "stock", "stock's console  (TCP, server speaks first)", _CONSOLE, "nothing", why="a client without identity"),
)


def until(condition: Callable[[], object], within_s: float) -> float | None:
    """Ask again until it is true: seconds it took, None when it did not become true in time."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > within_s:
            return None
        time.sleep(0.02)
    return time.monotonic() - started


def ready(show: Show, shop: Shop, status: protocol.MeshStatus, runner: int, note: str) -> None:
    """Everything runs, in and out of the mesh as annotated, and the shop answers through all its hops."""
    show.chapter("The shop: stranger -> web -> cart -> stock")
    show.check(status.ready, f"{len(status.pods)} pods and the control plane ready after {show.elapsed_s:.1f} s", "; ".join(status.reasons))
    for app in MESHED:
        level = capture_level(runner, shop.pods[app])
        show.check(
            shop.pods[app].meshed and level, f"{app}: meshed, its TCP is led to the sidecar by {level}", "nothing captures in the pod"
        )
    stranger = shop.pods["stranger"]
    show.check(not stranger.meshed and not capture_level(runner, stranger), "stranger: not meshed, not captured", "it is captured")
    last: list[Outcome] = []

    def answers() -> bool:
        last.append(shop.call(CALLS[0], note, f"ready-{len(last)}"))
        return last[-1].answer == "200"

    took = until(answers, _LIVE_WITHIN_S)
    show.check(took is not None, "the shop answers, through web, cart and stock", last[-1].body)


def who_may(show: Show, shop: Shop, note: str) -> None:
    """The table: every call, what the caller saw, and what the sidecar of the called one says decided."""
    show.chapter("Who may call whom: policy.yaml against what happens; reasons are the sidecars' own")
    rows = []
    for number, call in enumerate(CALLS):
        outcome = shop.call(call, note, f"demo-{number}-{secrets.token_hex(4)}")
        wrong = outcome.wrong(call, note)
        rows.append((not wrong, (call.caller, call.shown, outcome.answer, told(outcome.decision)), wrong))
    show.table(("CALLER", "TARGET", "ANSWER", "REASON"), rows)


def on_the_wire(show: Show, shop: Shop, capture: Capture, note: str) -> None:
    """Every connection between two pods since the start, from captured packets."""
    show.chapter(f"On the wire: all packets between pods since the start; {note!r} was sent along with every call")
    packets, dropped = capture.stop()
    show.check(packets and not dropped, f"{packets} packets captured, none lost", f"{dropped} lost")
    names = {ip: app for app, pod in shop.pods.items() for ip in pod.addresses}
    found = {(one.client, one.server, one.port): one for one in read_paths(capture.path.read_bytes(), names, note.encode())}
    expected = [("web", "cart", 8080), ("cart", "stock", 50051), ("cart", "stock", 6400), ("web", "stock", 50051), ("web", "stock", 6400)]
    for key in dict.fromkeys([*expected, *(key for key in found if key[0] in MESHED and key[1] in MESHED)]):
        _check_encrypted(show, found.get(key) or Journey(*key))
    for key, one in found.items():
        if one.size and (key[0] not in MESHED or key[1] not in MESHED):
            text = f"{one.client} -> {one.server}:{one.port}: {_size(one)}, {one.marked} with the note in plain sight"
            show.check(one.marked and not one.encrypted, f"for contrast {text}", "the note is not to be seen, so the search proves nothing")
    seen = next((one for key, one in found.items() if key[:2] == ("stranger", "web")), None)
    show.check(seen and seen.excerpt, f"for contrast stranger -> web is: {(seen.excerpt if seen else '')!r}", "no such connection")


def _check_encrypted(show: Show, one: Journey) -> None:
    text = f"{one.client} -> {one.server}:{one.port}: {_size(one)}, TLS 1.3 from ServerHello to end, the note nowhere"
    why = "no such connection" if not one.count else "; ".join(one.problems[:3]) or f"{one.marked} hold the note in plaintext"
    show.check(one.count and one.encrypted == one.count and not one.marked, text, why)


def _size(one: Journey) -> str:
    return f"{one.count} connection{'' if one.count == 1 else 's'}, {one.size:,} bytes"


def live_policy(show: Show, shop: Shop, manifest: Path, note: str) -> None:
    """Apply a manifest to the running shop, and delete it again, with a connection open that it permits."""
    show.chapter(f"A policy changes while everything runs: {manifest.parent.name}/{manifest.name}")
    allowed = Call("web", "stock", "", _QUOTE, "OK", "authorizationpolicy shop/web-asks-prices")
    denied = Call("web", "stock", "", _QUOTE, "PERMISSION_DENIED", why="shop/cart-asks-prices admits")
    text = manifest.read_text(encoding="utf-8")
    outcome = Outcome("", "", None)

    def comes_out(call: Call) -> Callable[[], bool]:
        def ask() -> bool:
            nonlocal outcome
            outcome = shop.call(call, note, f"live-{secrets.token_hex(4)}")
            return not outcome.wrong(call, note)

        return ask

    show.check(comes_out(denied)(), "before: web asks stock for a price: PERMISSION_DENIED", outcome.wrong(denied, note))
    shop.mesh.ask(protocol.ApplyText(text, manifest.name, is_json=False))
    took = until(comes_out(allowed), _LIVE_WITHIN_S)
    show.check(took is not None, f"applied: OK after {took or 0:.1f} s, {told(outcome.decision)}", outcome.wrong(allowed, note))
    held = Background(shop, "web", "python3", "/tools/call.py", *_CONSOLE, "--hold")
    opened = until(held.lines, _LIVE_WITHIN_S)
    show.check(opened is not None and "220" in held.lines()[0], "web opens stock's console and stays connected", str(held.lines()))
    log = LogEnd(shop, "stock")
    shop.mesh.ask(protocol.DeleteText(text, manifest.name, is_json=False))
    cut = until(lambda: len(held.lines()) > 1, _LIVE_WITHIN_S)
    held.end_input()
    why = next((str(line.get("reason", "")) for line in log.lines() if line.get("event") == "inbound terminated"), "")
    good = cut is not None and '"cut"' in held.lines()[-1] and why
    show.check(
        good, f"deleted: the open connection is cut after {cut or 0:.1f} s: {why}", f"{held.lines()} {why or 'no reason in the log'}"
    )
    took = until(comes_out(denied), _LIVE_WITHIN_S)
    show.check(took is not None, "and web asks stock for a price: PERMISSION_DENIED", outcome.wrong(denied, note))


def rotate(show: Show, shop: Shop) -> None:
    """Another trust anchor, step by step, while every kind of traffic goes on."""
    show.chapter("The trust anchor is replaced under load: `pillion identity rotate`, three steps")
    admin = shop.mesh.identity()
    before, certs, processes = admin.status(), _certs(shop), _processes(shop)
    loads = [Load(shop, "web", "basket"), Load(shop, "cart", "quote", "console")]
    try:
        until(lambda: all(load.started for load in loads), _LIVE_WITHIN_S)
        time.sleep(_LOAD_AROUND_S)
        for step in ("add", "switch", "drop"):
            _rotate_step(show, admin, step)
        time.sleep(_LOAD_AROUND_S)
    finally:
        results = [result for load in loads for result in load.stop()]
    after, certs_now = admin.status(), _certs(shop)
    fresh = {one.id for one in after.anchors}.isdisjoint(one.id for one in before.anchors) and before.issuer != after.issuer
    show.check(fresh, f"trust anchor {_ids(before)} is gone, {_ids(after)} is the only one", "the old one is still there")
    changed = all(certs_now[app] != certs[app] and len(certs_now[app][1]) == 1 for app in MESHED)
    show.check(changed, "every sidecar has a new certificate and trusts the new anchor only", str(certs_now))
    show.check(processes == _processes(shop), "no process was restarted for it", "another pid, or a restart")
    show.table(("LOAD", "CALLS", "FAILED"), [_load_row(result) for result in results])


def _rotate_step(show: Show, admin: IdentityAdmin, step: str) -> None:
    started, refusal = time.monotonic(), ""
    while time.monotonic() - started < _STEP_WITHIN_S:
        try:
            done, status = admin.rotate()
        except AdminRefused as refused:
            refusal = refused.sentence
            if not refused.blocking:
                break
            time.sleep(0.1)
            continue
        picked_up = until(lambda: _all_follow(admin.status()), _STEP_WITHIN_S)
        shown = f"{step}: {len(status.anchors)} anchor(s), issuer {status.issuer}; with every workload after {picked_up or 0:.1f} s"
        show.check(done == step and picked_up is not None, shown, "not every workload followed" if done == step else f"it did {done}")
        return
    show.check(False, f"{step}: done", refusal)


def _all_follow(status: Status) -> bool:
    """Everybody who is there has the newest bundle and a leaf of the issuer in force."""
    present = [one for one in status.workloads if not one.absent]
    return bool(present) and all(one.generation == status.generation and one.issuer == status.issuer for one in present)


def _load_row(result: Result) -> tuple[bool, tuple[str, ...], str]:
    enough = result.requests >= _LOAD_CALLS_MIN
    why = "; ".join(result.failures[:3]) or ("" if enough else f"fewer than {_LOAD_CALLS_MIN} calls prove nothing")
    name, _, kind = result.name.partition(" ")
    shown = f"{name}, {'connections kept' if kind == 'kept' else 'a new connection each'}"
    return result.failed == 0 and enough, (shown, str(result.requests), str(result.failed)), why


def _ids(status: Status) -> str:
    return ", ".join(one.id for one in status.anchors)


def _certs(shop: Shop) -> Mapping[str, tuple[str, tuple[str, ...]]]:
    """App -> (serial of its leaf, its trust anchors), as its sidecar has them."""
    found = {}
    for app in MESHED:
        certs = msgspec.json.decode(shop.mesh.sidecar(shop.pods[app], "/certs"))
        found[app] = (certs["chain"][0]["serial"], tuple(str(anchor) for anchor in certs["trust_anchors"]))
    return found


def _processes(shop: Shop) -> list[tuple[str, int | None, int]]:
    """(container, pid, restarts) of all."""
    now = Shop(shop.mesh)
    return [(f"{app}/{container.name}", container.pid, container.restarts) for app, pod in now.pods.items() for container in pod.containers]


def costs(show: Show, shop: Shop, name: str, idle: Mapping[str, float]) -> None:
    """Memory of each sidecar, how traffic is captured, and what of it was accelerated. idle: resident bytes before the first call."""
    show.chapter("What it costs")
    levels = sorted({shop.pods[app].capture for app in MESHED})
    text = f"level of capture in use: {' '.join(levels)}; IPv4 and IPv6, the sidecar exempt by its uid"
    show.check(len(levels) == 1 and levels[0], text, f"levels: {levels}")
    _accelerated(show, shop, hops(name))
    for app, before in idle.items():
        now = memory(shop)[app]
        text = f"sidecar of {app}: {before / (1 << 20):.1f} MiB resident when idle, {now / (1 << 20):.1f} MiB after the load"
        show.check(before > 0 and 0 < now < _MEMORY_MAX_BYTES, text, f"expected less than {_MEMORY_MAX_BYTES >> 20} MiB")


def _accelerated(show: Show, shop: Shop, found: Hops | None) -> None:
    """The bytes that went between apps and sidecars past the TCP stack."""
    if found is None:
        for note in shop.notes:
            show.say(note)
        return
    fallbacks = ", ".join(f"{count:,} {cause}" for cause, count in found.fallbacks.items() if count) or "none"
    text = f"{found.bytes:,} bytes in {found.messages:,} messages went past the TCP stack, on {found.accelerated:,} connection ends"
    show.check(found.bytes > 0, f"accelerated: {text}; by TCP instead: {fallbacks}", "no byte was accelerated")


def memory(shop: Shop) -> dict[str, float]:
    """App -> resident bytes of its sidecar, 0 when it does not say."""
    return {app: next((value for name, _, value in shop.samples(app) if name == "process_resident_memory_bytes"), 0.0) for app in MESHED}
