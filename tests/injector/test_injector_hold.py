"""The sidecar holds the other containers until it is ready. With capture to be proven: tests/proxy/test_proxy_hold.py."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from injector import hold


@contextmanager
def admin(*answers: tuple[int, str]) -> Iterator[int]:
    left = list(answers)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status if self.path == "/ready" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_it_says_what_the_sidecar_says() -> None:
    with admin((503, "no certificate yet")) as port:
        assert hold.ask(port) == (503, "no certificate yet")
    assert hold.ask(port)[0] == 0


def test_it_waits_until_the_sidecar_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    with admin((503, "not yet"), (503, "not yet"), (200, "ready")) as port:
        asked = hold.ask
        monkeypatch.setattr(hold, "ask", lambda: asked(port))
        monkeypatch.setattr(hold, "_ASK_AGAIN_S", 0.001)
        assert hold.main([]) == 0


def test_it_gives_up_with_the_sidecars_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hold, "ask", lambda: (503, "no certificate yet"))
    monkeypatch.setattr(hold, "_WITHIN_S", 0.01)
    monkeypatch.setattr(hold, "_ASK_AGAIN_S", 0.001)
    assert hold.main([]) == 1
    assert "no certificate yet" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["injector.hold", "ebpf.redirect_self"])
def test_what_a_pods_start_waits_for_imports_little(module: str) -> None:
    code = (
        f"import sys, {module}; print(len([name for name in sys.modules if name in {{'trio', 'msgspec', 'yaml', 'cryptography', 'ssl'}}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
