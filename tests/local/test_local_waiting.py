"""How long `up` waits: until everything is ready, and no longer than waiting can help."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from local import client, protocol


def status(*reasons: str, refused: tuple[str, ...] = (), settled: bool = True) -> protocol.MeshStatus:
    return protocol.MeshStatus(
        name="x",
        ready=not reasons,
        settled=settled,
        reasons=reasons,
        notes=(),
        pods=(),
        services=(),
        control_plane={},
        pid=1,
        state="/run",
        refused=refused,
    )


WRONG, SLOW = "policy.yaml: kind: found Servr; it is ignored", "pod shop/web-0: not ready"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ([status(SLOW), status()], status()),
        ([status(settled=False), status(SLOW), status()], status()),
        ([status(SLOW, WRONG, refused=(WRONG,)), status(WRONG, refused=(WRONG,))], status(WRONG, refused=(WRONG,))),
        ([status(WRONG, refused=(WRONG,), settled=False), status(WRONG, refused=(WRONG,))], status(WRONG, refused=(WRONG,))),
    ],
    ids=["a pod becomes ready", "the folder is read first", "what is refused is told once the rest is ready", "and the folder was read"],
)
def test_the_first_status_that_waiting_cannot_make_better_is_shown(
    monkeypatch: pytest.MonkeyPatch, said: list[protocol.MeshStatus], shown: protocol.MeshStatus
) -> None:
    answers: Iterator[protocol.MeshStatus] = iter(said)
    monkeypatch.setattr(client, "ask", lambda *_: next(answers))
    monkeypatch.setattr(client.time, "sleep", lambda _: None)
    assert client.wait_ready("x", 3600) == shown
    assert next(answers, None) is None


def test_what_takes_long_is_told_once_and_what_is_refused_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    again = "pod shop/web-0: container web exited with 1, starts again in 2 s"
    answers = iter([status(SLOW, WRONG, refused=(WRONG,)), status(again, WRONG, refused=(WRONG,)), status()])
    monkeypatch.setattr(client, "ask", lambda *_: next(answers))
    monkeypatch.setattr(client.time, "sleep", lambda _: None)
    monkeypatch.setattr(client, "_SILENT_S", -1)
    told: list[str] = []
    client.wait_ready("x", 3600, told.append)
    assert told == [SLOW]
