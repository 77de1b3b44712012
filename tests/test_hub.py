"""Whether a server is there is found out within seconds, and without one the cache is used."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from tracefl import hub


@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_server_is_reachable_whatever_it_answers(status):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert hub.reachable(f"http://127.0.0.1:{server.server_port}/")
    server.server_close()


def test_a_closed_port_is_not_reachable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        assert not hub.reachable(f"http://127.0.0.1:{taken.getsockname()[1]}/")


@pytest.mark.parametrize(
    ("offline", "answers", "expected"), [(False, True, False), (False, False, True), (True, True, True)]
)
def test_the_cache_is_used_without_a_hub_or_when_asked_to(monkeypatch, offline, answers, expected):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "reachable", lambda url: answers)
    hub.use_cache_if_offline()
    assert expected == constants.HF_HUB_OFFLINE
