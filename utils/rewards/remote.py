"""Scores from a server: `--reward_url`. The protocol is in docs/rewards.md.

Whoever answers is checked like a reward function. A server that cannot be reached, is busy (408,
429, 5xx) or breaks off is asked again, after pauses that double, until the time is over.
"""

import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from utils.rewards import functions
from utils.rewards.functions import Batch, FunctionError
from utils.rewards.sums import Answers
from utils.settings.secrets import hidden

TOKEN = "REWARD_TOKEN"  # environment variable; sent as "Authorization: Bearer …", never printed
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
AGAIN = (408, 429)  # and all from 500


def token() -> str:
    """Without the line end that files and secret stores add; empty where none is set. FunctionError
    where it cannot be sent, whose own message would print it."""
    found = os.environ.get(TOKEN, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise FunctionError(f"{TOKEN} holds what no header can: line ends, or letters beyond ASCII")
    return found


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token to another address."""

    def redirect_request(self, *_):
        return None


def is_this_machine(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Server:
    """timeout: seconds for one batch, all tries together; 0: none."""

    url: str
    timeout: float

    def __call__(self, answers: Answers) -> list[float]:
        asked = {"messages": answers.messages, "responses": answers.texts}
        asked |= {"finished": answers.finished, "rows": answers.rows}
        body = json.dumps(asked, default=str).encode()
        stop = time.monotonic() + (self.timeout or float("inf"))
        pause, tries = FIRST_PAUSE, 0
        while True:
            tries += 1
            try:
                scores = self._post(body, max(stop - time.monotonic(), 0.01))
                break
            except urllib.error.HTTPError as error:
                said = hidden(error.read(500).decode("utf-8", "replace"))
                said = said.replace(token(), "…") if token() else said
                problem = f"HTTP {error.code} {error.reason}: {said}"
                if error.code < 500 and error.code not in AGAIN:
                    raise FunctionError(f"reward server {self.url} refused: {problem}") from None
            # ValueError: what came is no JSON, as when a server breaks off.
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if time.monotonic() + pause > stop:
                raise FunctionError(
                    f"reward server {self.url} gave no scores for {len(answers)} responses, asked "
                    f"{tries} times in {self.timeout:g} s; last {problem}\nstart it again, raise "
                    "--reward_function_timeout (0: no limit), and go on with --resume auto"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        batch = Batch((answers.texts,), {"response": answers.texts})
        return functions.checked(scores, self.url, batch)

    def _post(self, body: bytes, seconds: float) -> object:
        headers = {"Content-Type": "application/json"}
        if token():
            headers["Authorization"] = f"Bearer {token()}"
        request = urllib.request.Request(self.url, body, headers)
        seconds = None if seconds == float("inf") else seconds
        # http_proxy and no_proxy count as elsewhere, but no proxy knows this machine's own ports.
        handlers = [NoRedirects, *[urllib.request.ProxyHandler({})] * is_this_machine(self.url)]
        with urllib.request.build_opener(*handlers).open(request, timeout=seconds) as reply:
            said = json.loads(reply.read())
        return said.get("scores") if isinstance(said, dict) else said
