"""What is asked of a vLLM server, over HTTP; whatever goes wrong is a ServerError with its cause.

The routes are those of vLLM 0.32: `/inference/v1/generate` (token ids in and out), the RL routes
(`/pause`, `/start_weight_update`, …), `/sleep`, `/wake_up`, `/metrics`.
"""

import http.client
import json
import queue
import re
import socket
import threading
import time
import urllib.parse

TOKEN = "ROLLOUT_TOKEN"  # environment variable: the secret of a server started by hand
AT_ONCE = 256  # requests that wait for their answers together
SECONDS_BETWEEN_LOOKS, SECONDS_OF_A_LOOK = 2.0, 5.0
PROGRESS = re.compile(r"^vllm:(?:generation|prompt)_tokens_total\S* (\S+)$", re.MULTILINE)


class ServerError(Exception):
    """The server is gone, stands still, refuses, or answers what was not asked."""


class Client:
    """name: the model that must answer. patience: seconds without a new token, or for any other
    request, after which the server counts as standing still."""

    def __init__(self, url: str, token: str, name: str, patience: float = 45.0):
        self.url, self.name, self.patience = url, name, patience
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme == "https"
        self._kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._address = parts.netloc
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def _connection(self, seconds: float | None) -> http.client.HTTPConnection:
        return self._kind(self._address, timeout=seconds)

    def _ask(self, connection, method: str, path: str, body=None) -> bytes:
        try:
            connection.request(method, path, body and json.dumps(body), self._headers)
            reply = connection.getresponse()
            said = reply.read()
        except TimeoutError:
            raise ServerError(
                f"vLLM's server at {self.url} stands still: no answer to {path} in "
                f"{connection.timeout:g} s"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(
                f"vLLM's server at {self.url} is gone ({path}: {type(error).__name__} {error})"
            ) from None
        if reply.status != 200:
            text = said[:500].decode("utf-8", "replace")
            raise ServerError(f"vLLM's server at {self.url}: {path}: HTTP {reply.status} {text}")
        return said

    def get(self, path: str, seconds: float | None = None) -> bytes:
        connection = self._connection(seconds or self.patience)
        try:
            return self._ask(connection, "GET", path)
        finally:
            connection.close()

    def post(self, path: str, body: dict | None = None) -> dict:
        connection = self._connection(self.patience)
        try:
            said = self._ask(connection, "POST", path, body)
        finally:
            connection.close()
        return json.loads(said) if said else {}

    def is_healthy(self) -> bool:
        try:
            self.get("/health", SECONDS_OF_A_LOOK)
        except ServerError:
            return False
        return True

    def check_name(self) -> None:
        """Is it the server that we mean?"""
        names = [model["id"] for model in json.loads(self.get("/v1/models"))["data"]]
        if names != [self.name]:
            raise ServerError(
                f"the server at {self.url} answers for another model: {names}, not {self.name!r}"
            )

    def world_size(self) -> int:
        """Workers that hold the model."""
        return json.loads(self.get("/get_world_size"))["world_size"]

    def generate(self, bodies: list[dict]) -> list[dict]:
        """The answer to each request of `/inference/v1/generate`, in order, many at a time."""
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for row, body in enumerate(bodies):
            waiting.put((row, body | {"model": self.name}))
        answers: list[dict | None] = [None] * len(bodies)
        problems: list[ServerError] = []
        connections = [self._connection(None) for _ in range(min(AT_ONCE, len(bodies)))]

        def ask(connection) -> None:
            while not problems:
                try:
                    row, body = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    said = self._ask(connection, "POST", "/inference/v1/generate", body)
                    answers[row] = json.loads(said)
                except (ServerError, ValueError) as error:
                    problems.append(ServerError(str(error)))

        # Daemons: one that waits for a server which stands still must not hold up our end.
        threads = [threading.Thread(target=ask, args=(c,), daemon=True) for c in connections]
        for thread in threads:
            thread.start()
        try:
            self._wait_for(threads, problems)
        finally:
            for connection in connections:
                cut(connection)
        if problems:
            raise problems[0]
        return answers

    def _wait_for(self, threads: list[threading.Thread], problems: list) -> None:
        """Until all have ended, one has a problem, or no token has come for `patience` seconds."""
        seen, moved = "", time.monotonic()
        next_look = moved + SECONDS_BETWEEN_LOOKS
        while any(thread.is_alive() for thread in threads) and not problems:
            next(thread for thread in threads if thread.is_alive()).join(0.05)
            now = time.monotonic()
            if now < next_look:
                continue
            try:
                tokens = self.tokens_so_far()
            except ServerError as error:
                if "stands still" not in str(error):
                    raise
                tokens = seen
            now = time.monotonic()
            if tokens != seen:
                seen, moved = tokens, now
            elif now - moved > self.patience:
                raise ServerError(
                    f"vLLM's server at {self.url} stands still: no token for {now - moved:.0f} s "
                    f"(--rollout_timeout {self.patience:g})"
                )
            next_look = now + SECONDS_BETWEEN_LOOKS

    def tokens_so_far(self) -> str:
        """What its counters of tokens say."""
        said = self.get("/metrics", SECONDS_OF_A_LOOK).decode()
        return " ".join(PROGRESS.findall(said))


def cut(connection: http.client.HTTPConnection) -> None:
    """A thread that waits for its answer gets an error."""
    try:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
