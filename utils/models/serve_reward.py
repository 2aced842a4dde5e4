"""Serve a reward model over HTTP, for `--reward_url` of step 3. docs/rewards.md has the protocol.

python -m utils.models.serve_reward --model RM --port 8100
"""

import hmac
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch

from utils.data.chat_template import READ_AT, READ_AT_HELP, TemplateError
from utils.distributed import program, zero
from utils.errors import UserError
from utils.models import scalar_model
from utils.models.loading import Loading
from utils.models.scorer import Reader, Scorer
from utils.rewards import remote
from utils.rewards.functions import FunctionError
from utils.rewards.remote import TOKEN
from utils.settings import command_line
from utils.settings.fields import Settings, setting

LOCAL = ("127.0.0.1", "localhost")
LARGEST, CHUNK = 1 << 28, 1 << 20  # bytes of a request; of one that is thrown away, at a time


@dataclass
class ServeConfig(Settings):
    model: str = setting("", "folder written by step2_reward/main.py, or a hub name", needed=True)
    port: int = setting(8100, "port; 0: one that is free", at_most=65535)
    host: str = setting("127.0.0.1", "address; other machines reach it by 0.0.0.0 only")
    reward_read_at: str = setting("auto", READ_AT_HELP, choices=("auto", *READ_AT))
    date: str = setting("", "the day that chat templates may state, as step 3's --date")
    dtype: str = setting("auto", "of the weights", choices=("auto", "fp32", "bf16", "fp16"))
    attn_implementation: str = setting("auto", "sdpa, eager, …; auto: transformers' choice")
    trust_remote_code: bool = setting(False, "run Python code that comes with a model (a risk)")
    micro_batch_size: int = setting(8, "answers a forward pass", at_least=1)
    micro_batch_tokens: int = setting(0, "tokens a forward pass; 0: by micro_batch_size")


def scorer_of(config: ServeConfig) -> Scorer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = Reader.load(config.model, config.trust_remote_code, config.reward_read_at, config.date)
    how = Loading(config.attn_implementation, config.trust_remote_code, packing="off")
    dtype = zero.resolve_dtype(config.dtype, device)
    model = scalar_model.load(how, config.model, dtype=dtype, tokenizer=reader.tokenizer)
    return Scorer(model.eval().to(device), reader, True, device)


class Asked(ValueError):
    """A request that cannot be answered: why."""


def scores_of(scorer: Scorer, config: ServeConfig, asked: object) -> list[float]:
    """The scores of a request's answers; Asked where it is none."""
    if not isinstance(asked, dict):
        raise Asked("not a JSON object")
    prompts, texts = asked.get("messages"), asked.get("responses")
    finished = asked.get("finished", [True] * len(texts) if isinstance(texts, list) else None)
    columns = (texts, prompts, finished)
    if not all(isinstance(column, list) and len(column) == len(texts) for column in columns):
        raise Asked("messages, responses and finished must be lists of one length")
    if not all(isinstance(text, str) for text in texts):
        raise Asked("a response is no text")
    if not all(isinstance(one, bool) for one in finished):
        raise Asked("finished holds what is neither true nor false")
    for turns in prompts:
        if not isinstance(turns, list) or not turns or not all(
            isinstance(t, dict) and all(isinstance(t.get(x), str) for x in ("role", "content"))
            for t in turns
        ):  # fmt: skip
            raise Asked("messages must hold lists of turns, each with role and content")
        if why := scorer.reader.refusal(turns):
            raise Asked(why)
    if not texts:
        return []
    said = [SimpleNamespace(messages=tuple(turns)) for turns in prompts]
    limits = config.micro_batch_size, config.micro_batch_tokens
    return scorer.scores(said, texts, torch.tensor(finished), None, None, *limits).tolist()


def server_of(scorer: Scorer, config: ServeConfig) -> ThreadingHTTPServer:
    """Listens at once; answers with serve_forever(). One batch is scored at a time."""
    one_at_a_time, token = threading.Lock(), remote.token()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > LARGEST:
                return self.reply(413, {"error": f"Content-Length must be at most {LARGEST}"})
            given = self.headers.get("Authorization", "")
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                # Read, or the connection is reset before a long request's sender sees the reply.
                for begin in range(0, int(length), CHUNK):
                    self.rfile.read(min(CHUNK, int(length) - begin))
                return self.reply(401, {"error": f"set {TOKEN} to the server's"})
            try:
                asked = json.loads(self.rfile.read(int(length)))
                with one_at_a_time:
                    scores = scores_of(scorer, config, asked)
            except (ValueError, RecursionError, TemplateError) as error:
                return self.reply(400, {"error": str(error)})
            self.reply(200, {"scores": scores})

        def reply(self, status: int, what: dict) -> None:
            body = json.dumps(what).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """A line for each request would drown what matters."""

    return ThreadingHTTPServer((config.host, config.port), Handler)


def main() -> None:
    config = command_line.parse(ServeConfig, __doc__)
    program.quiet_libraries()
    try:
        remote.token()
    except FunctionError as error:
        raise UserError(str(error)) from None
    server = server_of(scorer_of(config), config)
    who = "this machine only" if config.host in LOCAL else "every machine that reaches it"
    open_ = "" if remote.token() else f"; without a token ({TOKEN} is not set)"
    host, port = server.server_address[:2]
    print(f"{config.model} answers {who} at http://{host}:{port}/{open_}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    program.run(main)
