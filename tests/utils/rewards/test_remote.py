"""Scores from a server that is well, busy, broken, wrong, or gone."""

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

import pytest

from tests.helpers.jobs import ppo
from tests.helpers.running import metrics_of, run_ranks
from utils.rewards import remote
from utils.rewards.functions import FunctionError
from utils.rewards.remote import Server
from utils.rewards.sums import Answers

ANSWERS = Answers(
    [({"role": "user", "content": "1?"},), ({"role": "user", "content": "2?"},)],
    ["a", "bb"],
    [{"x": 3}, {"x": {1, 2}}],  # a set is no JSON: it goes as text
    [True, False],
)


@pytest.fixture
def serve(monkeypatch):
    """serve(reply, …): the address of a server that answers one request with each, and the last
    again; and the requests. A reply: (status, body), or None to break off."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    servers = []

    def start(*replies):
        seen, left = [], list(replies)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen.append((dict(self.headers), json.loads(body)))
                reply = left.pop(0) if len(left) > 1 else left[0]
                if reply is None:
                    self.send_response(200)
                    self.send_header("Content-Length", "99")
                    self.end_headers()
                    self.wfile.write(b'{"scores": [1')
                    return
                self.send_response(reply[0])
                if reply[0] == 302:
                    self.send_header("Location", reply[1])
                self.end_headers()
                self.wfile.write(reply[1].encode())

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


GOOD = (200, '{"scores": [1.5, -2]}')


def test_a_proxy_is_asked_for_other_machines_alone(serve, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")  # nobody listens there
    url, seen = serve((200, '{"scores": [1, 2]}'))
    assert Server(url, 5)(ANSWERS) == Server(url.replace("127.0.0.1", "localhost"), 5)(ANSWERS)
    assert len(seen) == 2
    proxy, asked = serve((200, '{"scores": [3, 4]}'))
    monkeypatch.setenv("http_proxy", proxy)
    assert Server("http://scorer.invalid/score", 5)(ANSWERS) == [3, 4] and len(asked) == 1


def test_what_is_sent_and_what_comes_back(serve, monkeypatch):
    monkeypatch.delenv(remote.TOKEN, raising=False)
    url, seen = serve(GOOD)
    assert Server(url, 5.0)(ANSWERS) == [1.5, -2.0]
    ((headers, body),) = seen
    assert "Authorization" not in headers
    assert body == {
        "messages": [[{"role": "user", "content": "1?"}], [{"role": "user", "content": "2?"}]],
        "responses": ["a", "bb"],
        "finished": [True, False],
        "rows": [{"x": 3}, {"x": "{1, 2}"}],
    }


@pytest.mark.parametrize("ill", [(503, "busy"), (429, ""), (500, "oh"), None, (200, "<html>")])
def test_it_is_asked_again(serve, ill):
    url, seen = serve(ill, ill, GOOD)
    assert Server(url, 5.0)(ANSWERS) == [1.5, -2.0]
    assert len(seen) == 3 and seen[0][1] == seen[2][1]


def test_a_busy_server_that_breaks_off_while_it_says_so_is_asked_again(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        busy, _ = listener.accept()
        busy.recv(65536)
        busy.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nhalf")
        # Closed without lingering, the connection is reset before the text is whole.
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.1)  # its status has been read
        busy.close()
        well, _ = listener.accept()
        well.recv(65536)
        well.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[1,2]")
        well.close()

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    assert Server(url, 10.0)(ANSWERS) == [1.0, 2.0]
    listener.close()


def test_a_server_that_is_gone_is_told_with_what_to_do(serve):
    url, seen = serve((503, "busy"))
    with pytest.raises(FunctionError) as caught:
        Server(url, 0.2)(ANSWERS)
    said = str(caught.value)
    assert f"{url} gave no scores for 2 responses, asked {len(seen)} times in 0.2 s" in said
    assert "HTTP 503 Service Unavailable: busy" in said and "--resume auto" in said
    assert 3 <= len(seen) <= 6  # pauses of 10, 20, 40, 80 ms
    with pytest.raises(FunctionError, match="ConnectionRefusedError|Connection refused"):
        Server("http://127.0.0.1:9/", 0.05)(ANSWERS)


def test_a_refusal_is_not_repeated(serve):
    url, seen = serve((400, "no such model"))
    with pytest.raises(FunctionError, match="refused: HTTP 400 Bad Request: no such model"):
        Server(url, 5.0)(ANSWERS)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "scores, said",
    [
        ("[1.0]", "returned 1 scores for 2 responses"),
        ("[1.0, NaN]", "returned nan, not a finite number, for row 2 of 2"),
        ('[1.0, "x"]', "returned 'x' of type str for row 2 of 2"),
        ("null", "returned 'None' of type NoneType"),
    ],
)
def test_scores_are_checked_like_a_functions(serve, scores, said):
    url, _ = serve((200, f'{{"scores": {scores}}}'))
    with pytest.raises(FunctionError, match=said):
        Server(url, 5.0)(ANSWERS)


def test_the_token_goes_to_the_server_and_nowhere_else(serve, monkeypatch):
    monkeypatch.setenv(remote.TOKEN, "a-secret-word")
    other, at_other = serve(GOOD)
    url, seen = serve((302, other))
    with pytest.raises(FunctionError, match="refused: HTTP 302") as caught:
        Server(url, 5.0)(ANSWERS)
    assert seen[0][0]["Authorization"] == "Bearer a-secret-word" and not at_other
    assert "a-secret-word" not in str(caught.value) + repr(Server(url, 5.0))
    echo, _ = serve((403, "not a-secret-word"))
    with pytest.raises(FunctionError, match="not …"):
        Server(echo, 5.0)(ANSWERS)


def test_a_token_as_files_hold_it(serve, monkeypatch):
    """With a line end behind it; one within it is refused, and the refusal does not print it."""
    url, seen = serve(GOOD)
    monkeypatch.setenv(remote.TOKEN, "a-secret-word\n")
    Server(url, 5.0)(ANSWERS)
    assert seen[0][0]["Authorization"] == "Bearer a-secret-word"
    monkeypatch.setenv(remote.TOKEN, "a-secret\nword")
    with pytest.raises(FunctionError, match="REWARD_TOKEN holds what no header can") as caught:
        Server(url, 5.0)(ANSWERS)
    assert "secret" not in str(caught.value) and len(seen) == 1


@pytest.mark.slow
def test_where_the_server_dies_the_run_is_saved_and_goes_on(tiny, tmp_path):
    """After three rollouts; and to the same end, bit for bit, once the server is there again."""
    asked, alive = [], [4]  # requests that it lives for: the evaluation before, three rollouts

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([len(r) / 10 for r in asked["responses"]]).encode())

        def log_message(self, *_):
            pass

    class Mortal(ThreadingHTTPServer):
        def verify_request(self, *_):
            asked.append(1)
            return len(asked) <= alive[0]

    server = Mortal(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    flags = ("--reward_url", url, "--max_steps", 5, "--self_check", "off")
    flags += ("--reward_function_timeout", 4, "--learning_rate", 1e-3)

    def job(name, *more):
        return ppo(tiny, tiny / "base_model", "", tmp_path / name, *flags, *more)

    try:
        with pytest.raises(AssertionError, match=r"(?s)exit codes \[1\].*gave no scores.*--resume"):
            run_ranks([job("died")], 1)
        saved = [p.name for p in (tmp_path / "died/checkpoints").iterdir()]
        assert saved == ["step-000003"] and len(metrics_of(tmp_path / "died", "score")) == 3
        alive[0] = 10**6
        run_ranks([job("whole"), job("died", "--resume", "auto")], 1)
    finally:
        server.shutdown()
        server.server_close()
    for name in ("score", "kl", "policy_loss", "eval/score"):
        found = metrics_of(tmp_path / "died", name)
        assert len(found) >= 2 and found == metrics_of(tmp_path / "whole", name)
