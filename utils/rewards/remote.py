"""What servers answer: scores of `--reward_url` (the protocol is in docs/rewards.md), and for
utils/rewards/judge.py verdicts.

A server that cannot be reached, is busy (408, 429, 5xx) or breaks off is asked again, after pauses
that double, until the time is over. Scores are checked like a reward function's.
"""

import contextlib
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


def token(variable: str = TOKEN) -> str:
    """Without the line end that files and secret stores add; empty where none is set. FunctionError
    where it cannot be sent, whose own message would print it."""
    found = os.environ.get(variable, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise FunctionError(
            f"{variable} holds what no header can: line ends, or letters beyond ASCII"
        )
    return found


class Refused(FunctionError):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


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


def post(url: str, asked: object, timeout: float, secret: str, who: str, failed: str) -> object:
    """The JSON that a server answers to the JSON `asked`.

    timeout: seconds for all tries together; 0: none. secret: goes into a header and nowhere else.
    who, failed: for messages, the server and what it did not do, with what to do then. Raises
    FunctionError.
    """
    # http_proxy and no_proxy count as elsewhere, but no proxy knows this machine's own ports.
    handlers = [NoRedirects, *[urllib.request.ProxyHandler({})] * is_this_machine(url)]
    body, headers = json.dumps(asked, default=str).encode(), {"Content-Type": "application/json"}
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    stop = time.monotonic() + (timeout or float("inf"))
    pause, tries = FIRST_PAUSE, 0
    while True:
        tries, wait = tries + 1, pause
        try:
            request = urllib.request.Request(url, body, headers)
            left = max(stop - time.monotonic(), 0.01) if timeout else None
            with urllib.request.build_opener(*handlers).open(request, timeout=left) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = b""
            with contextlib.suppress(OSError, http.client.HTTPException):  # it may break off here
                said = error.read(500)
            said = hidden(said.decode("utf-8", "replace"))
            said = said.replace(secret, "…") if secret else said
            problem = f"HTTP {error.code} {error.reason}: {said}"
            if error.code < 500 and error.code not in AGAIN:
                raise Refused(f"{who} refused: {problem}", error.code) from None
            asked_for = error.headers.get("Retry-After", "")
            wait = max(pause, float(asked_for)) if asked_for.isdecimal() else pause
        # ValueError: what came is no JSON, as when a server breaks off.
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if time.monotonic() + wait > stop:
            what, _, remedy = failed.partition("\n")
            raise FunctionError(
                f"{who} {what}, asked {tries} times in {timeout:g} s; last {problem}\n{remedy}"
            )
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)


@dataclass(frozen=True)
class Server:
    """timeout: seconds for one batch, all tries together; 0: none."""

    url: str
    timeout: float

    def __call__(self, answers: Answers) -> list[float]:
        asked = {"messages": answers.messages, "responses": answers.texts}
        asked |= {"finished": answers.finished, "rows": answers.rows}
        failed = (
            f"gave no scores for {len(answers)} responses\nstart it again, raise "
            "--reward_function_timeout (0: no limit), and go on with --resume auto"
        )
        who = f"reward server {self.url}"
        said = post(self.url, asked, self.timeout, token(), who, failed)
        scores = said.get("scores") if isinstance(said, dict) else said
        batch = Batch((answers.texts,), {"response": answers.texts})
        return functions.checked(scores, self.url, batch)
