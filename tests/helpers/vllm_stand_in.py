"""A server with the routes of vLLM that we use, around a model of ours, with faults to order.

faults: names of what goes wrong once, and then no more; with "always" every time.
    die     hangs up in the middle of an answer and listens no more
    hang    answers nothing, and its counters stand still
    other   answers for another model
    stale   says that it has taken an update, and has not
    lost    a weight arrives with one bit turned
    cut     breaks answers off
    awake   does not go to sleep
"""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from utils.generation import sampling
from utils.generation.checksum import checksum
from utils.generation.decoder import Decoder


class Listening(ThreadingHTTPServer):
    request_queue_size = 512  # all rows of a rollout knock at once; by default five may wait


class StandIn:
    def __init__(self, model, name="policy", token="secret", faults=()):
        self.model, self.name, self.token, self.faults = model, name, token, set(faults)
        self.version, self.arrived, self.asked, self.tokens = "default", {}, [], 0
        self.released, self.lock = threading.Event(), threading.Lock()
        self.longest = 1000  # tokens of a sequence, its prompt included
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer(b"")

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers["Content-Length"] or 0)))

            def answer(self, body):
                if self.headers["Authorization"] != f"Bearer {stand_in.token}":
                    return self.reply(401, {"error": "token"})
                path = self.path.partition("?")[0]
                stand_in.asked.append(self.path)
                said = getattr(stand_in, path.strip("/").replace("/", "_"))(
                    json.loads(body or "{}")
                )
                if said is None:
                    self.close_connection = True
                    return
                self.reply(200, said)

            def reply(self, status, said):
                said = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_):
                pass

        self.server = Listening(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # whoever asked has hung up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def has(self, fault) -> bool:
        """Does it go wrong now? Not again, unless always."""
        with self.lock:
            found = fault in self.faults
            if found and "always" not in self.faults:
                self.faults.discard(fault)
            return found

    # The routes.

    def health(self, _):
        return {}

    def metrics(self, _):
        counters = (
            f'vllm:prompt_tokens_total{{a="b"}} 1.0\nvllm:generation_tokens_total {self.tokens}'
        )
        return f"# HELP x\n{counters}\n"

    def v1_models(self, _):
        return {"data": [{"id": self.name}]}

    def get_world_size(self, _):
        return {"world_size": 1}

    init_weight_transfer_engine = pause = resume = wake_up = health

    def sleep(self, _):
        return None if self.has("awake") else {}

    def start_weight_update(self, _):
        self.arrived, self.coming = {}, {}
        return {}

    def update_weights(self, asked):
        info = asked["update_info"]
        whole = torch.from_file(info["path"], shared=True, size=info["size"], dtype=torch.uint8)
        rows = (info[name] for name in ("names", "dtype_names", "shapes", "offsets"))
        for name, dtype, shape, offset in zip(*rows, strict=True):
            dtype = getattr(torch, dtype)
            part = whole[offset:][: torch.Size(shape).numel() * dtype.itemsize]
            weight = part.view(dtype).view(shape).clone()
            if self.has("lost"):
                weight.view(-1).view(torch.int32)[-1] ^= 1
            self.coming[name], self.arrived[name] = weight, str(checksum(weight))
        return {}

    def finish_weight_update(self, asked):
        if not self.has("stale"):
            self.version = asked["weight_version"]
            self.model.load_state_dict(self.coming, strict=False)
        return {}

    def collective_rpc(self, asked):
        assert asked["method"] == "arrived_weights"
        return {"results": [self.arrived]}

    def inference_v1_generate(self, asked):
        params = asked["sampling_params"]
        if self.has("die"):
            threading.Thread(target=self.stop, daemon=True).start()
            return None
        if self.has("hang"):
            self.released.wait()
            return None
        ids = torch.tensor([asked["token_ids"]])
        # vLLM ends an answer where the sequence is as long as it may be.
        limit, noise = min(params["max_tokens"], self.longest - len(asked["token_ids"])), None
        if "seed" in params:
            generator = torch.Generator().manual_seed(params["seed"])
            noise = torch.rand(1, limit, generator=generator)
        numbers = torch.zeros(1, limit), torch.zeros(1, limit)
        (stop,) = params["stop_token_ids"]
        with self.lock, torch.no_grad():
            answer = sampling.generate(
                self.model,
                ids,
                torch.ones_like(ids, dtype=torch.bool),
                max_new_tokens=limit,
                stop_id=stop,
                pad_id=0,
                temperature=params["temperature"] or 1.0,
                noise=noise,
                logprobs_and_entropies=numbers,
                decoder=Decoder("eager"),
            )
        size = int(sampling.mask_through_stop(answer, stop).sum())
        size -= self.has("cut")
        self.tokens += size
        tokens = answer[0, :size].tolist()
        logprobs = [{"logprob": p} for p in numbers[0][0, :size].tolist()]
        choice = {"token_ids": tokens, "logprobs": {"content": logprobs}, "finish_reason": "stop"}
        choice["weight_versions"] = [{"version": self.version, "start": 0, "end": size}]
        return {"model": "else" if self.has("other") else self.name, "choices": [choice]}


def untrained(model):
    """A model of the same shape with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return other
