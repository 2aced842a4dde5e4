"""Scores from a server that is well, busy, broken, wrong, or gone."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

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
