"""vLLM as the engine that samples: in processes and an environment of its own, asked over HTTP.

The trainer's weights go over whenever `sync` is called. Each request has its own seed, so that the
same request gives the same answers, up to rounding: vLLM batches by what has come so far. A server
of ours that dies, stands still or answers with other weights is started again with the present
weights and asked once more; then the run ends.
"""

import atexit
import copy
import dataclasses
import hashlib
import os
import secrets
import threading
from pathlib import Path

import torch

from utils.distributed import host_memory, peers, process_group
from utils.distributed.process_group import StopRun, free_port
from utils.errors import UserError
from utils.generation import vllm_server, vllm_weights
from utils.generation.engine import Request, Samples, Sampling, Setup, samples_of, steps_of
from utils.generation.kv_cache import numbers_a_token
from utils.generation.vllm_client import TOKEN, Client, ServerError

IMPOSSIBLE = -9000.0  # JSON has −9999 in the place of what is −∞ or no number
BLOCK = 128  # tokens of vLLM's cache that are given out together, on a CPU


def build(setup: Setup) -> "VllmEngine":
    return VllmEngine(setup)


class VllmEngine:
    name, returns_logprobs, returns_entropies, generator = "vllm", True, False, None

    def __init__(self, setup: Setup):
        self.how, self.actor, self.updates, self.version = setup.vllm, setup.actor, 0, ""
        self.longest = setup.longest
        on_cpu = next(setup.actor.module.parameters()).device.type == "cpu"
        beside = self.how.rollout_devices or self.how.rollout_url
        kind = "file" if on_cpu else "nccl" if beside else "ipc"
        if kind == "ipc" and len(peers.leaders()) > 1:
            raise SystemExit(
                "rollout_engine=vllm takes turns with the training on the GPUs of one machine "
                "only; set --rollout_devices to some of the first machine's, or --rollout_url"
            )
        self.transfer, self.sleeps = vllm_weights.TRANSFERS[kind](), kind == "ipc"
        self.asleep, self.policy_step = False, 0
        self.ahead: Ahead | None = None
        self.server = self.client = None
        self._start(setup, kind)
        alone = self.how.rollout_devices and "cores " * on_cpu + self.how.rollout_devices
        places = alone or ("CPU" if on_cpu else "the trainer's GPUs, in turns")
        where = "started by hand" if self.how.rollout_url else f"on {places}, log {self._log}"
        self.description = f"vLLM at {self.client.url}, {where}; weights by {kind}"

    # The server.

    @property
    def _log(self) -> Path:
        return Path(self.how.output_dir, "vllm", "log.txt")

    def _start(self, setup: Setup | None = None, kind: str = "") -> None:
        """Rank 0 starts or finds the server, and all ranks get to know it. A collective."""
        self._make_room()
        found, problem = None, ""
        if process_group.is_main():
            try:
                found = self._found(setup, kind)
            except (ServerError, UserError) as error:
                problem = str(error)
        found, problem = process_group.gather_objects((found, problem))[0]
        if not problem:
            self.client = Client(*found, self.how.rollout_timeout)
            problem = self._agreed(self.transfer.connect)
        if problem:
            raise StopRun(f"rollout_engine=vllm: {problem}")
        self.asleep = False

    def _found(self, setup: Setup | None, kind: str) -> tuple[str, str, str]:
        """Address, secret and model of the server."""
        if self.how.rollout_url:
            token = os.environ.get(TOKEN, "")
            client = Client(self.how.rollout_url, token, vllm_server.BY_HAND)
            client.check_name()
            return client.url, token, client.name
        if self.server is None:
            self.server = self._own_server(setup, kind)
            atexit.register(self.server.stop)
        self.server.start()
        return self.server.url, self.server.token, self.server.name

    def _own_server(self, setup: Setup, kind: str) -> vllm_server.Server:
        """Not started yet. It has the shape of the actor and no weights before the first `sync`."""
        module, dtype = setup.actor.module, next(setup.actor.module.parameters()).dtype
        config = copy.deepcopy(module.config)
        config.architectures = [type(module).__name__]
        config.save_pretrained(self._log.parent)
        rows = setup.rows_at_once * process_group.world_size()
        launch = vllm_server.Launch(
            python=vllm_server.python_of(self.how.vllm_python),
            model=str(self._log.parent.absolute()),
            weights=False,
            dtype=str(dtype).removeprefix("torch."),
            max_length=setup.longest,
            rows=rows,
            transfer=kind,
            devices=self.how.rollout_devices,
            cards=process_group.world_size() if kind == "ipc" else 1,
            memory=self.how.rollout_memory,
            trust_remote_code=self.how.trust_remote_code,
            sleeps=self.sleeps,
            host=os.environ["MASTER_ADDR"] if len(peers.leaders()) > 1 else "127.0.0.1",
            port=free_port(),
        )
        if kind == "file":
            tokens = (rows + 1) * -(-setup.longest // BLOCK) * BLOCK
            cache = numbers_a_token(module.config, launch.parts) * dtype.itemsize * tokens
            most = host_memory.free_bytes() // 2 // launch.parts
            launch = dataclasses.replace(launch, cache_bytes=min(cache, most))
        name, token = f"policy-{secrets.token_hex(4)}", secrets.token_hex(16)
        return vllm_server.Server(launch, name, token, self._log)

    def _start_again(self, problem: str) -> None:
        """With the present weights. A collective."""
        if self.how.rollout_url:
            raise StopRun(
                f"{problem}. It was started by hand: start it again, and go on with --resume auto"
            )
        again = f"it is started again with the present weights; its log: {self._log}"
        process_group.say(f"{problem}: {again}")
        if self.ahead is not None and self.ahead.problem is not None:
            self.ahead = None
        self._start()
        if again := self._send():
            raise StopRun(f"{again}. It had just been started again, as {problem}")

    def _agreed(self, ask) -> str:
        """`ask(client)` on rank 0, `ask(None)` elsewhere; → on all ranks what went wrong there."""
        problem = ""
        try:
            ask(self.client if process_group.is_main() else None)
        except ServerError as error:
            problem = str(error)
        return next(filter(None, process_group.gather_objects(problem)), "")

    # The protocol of utils/generation/engine.py.

    def sync(self, actor) -> None:
        if self.ahead is not None:
            self.ahead.join()  # its answers are by the weights of before
        self.actor = actor
        if problem := self._send():
            self._start_again(problem)

    def _send(self) -> str:
        """The actor's weights of now; → what went wrong."""
        self.updates += 1
        self.version = f"{self.updates}.{steps_of(self.actor)}"

        if self.asleep:
            self._make_room()

        def wake(what: str):
            return lambda client: client and self.asleep and client.post(f"/wake_up?tags={what}")

        problem = self._agreed(wake("weights"))
        speaker = None if problem or not process_group.is_main() else self.client
        sent = vllm_weights.send_all(self.transfer, speaker, self.actor.module, self.version)
        problem = problem or process_group.gather_objects(sent)[0]
        problem = problem or self._agreed(wake("kv_cache"))
        self.asleep = self.asleep and bool(problem)
        return problem

    def _make_room(self) -> None:
        """Memory that torch keeps for later on this rank's GPU is none that vLLM could have."""
        if self.sleeps:
            torch.cuda.empty_cache()
            process_group.barrier()  # it takes memory on the GPUs of all ranks at once

    def begin(self, request: Request, sampling: Sampling) -> None:
        """Start to answer, with the weights sent last; `generate` of the same request, on this and
        every other rank, has these answers."""
        bodies = bodies_of(request, sampling, self.longest)
        self.ahead = Ahead(self.client, bodies, self.version)
        self.ahead.start()

    def generate(self, request: Request, sampling: Sampling) -> Samples:
        bodies = bodies_of(request, sampling, self.longest)
        asked = Ahead(self.client, bodies, self.version)
        if self.ahead is not None and self.ahead.bodies == bodies:
            asked, self.ahead = self.ahead, None
        for last_try in (False, True):
            problem = self._agreed(asked.wait)
            if not problem:
                self.policy_step = int(asked.version.partition(".")[2])
                return samples_from(asked.answers, request, sampling)
            if last_try:
                raise StopRun(f"{problem}, and so after it had been started again: see {self._log}")
            self._start_again(problem)
            asked = Ahead(self.client, bodies, self.version)

    def release(self) -> None:
        if self.sleeps and not self.asleep:
            # Level 2: the weights come anew before the next answers anyway.
            problem = self._agreed(lambda client: client and client.post("/sleep?level=2"))
            self.asleep = not problem
            if problem:
                process_group.say(f"vLLM keeps its memory while the training goes on: {problem}")


class Ahead(threading.Thread):
    """Asks for answers by the weights of `version`, in the background if it is started."""

    def __init__(self, client: Client, bodies: list[dict], version: str):
        super().__init__(daemon=True)
        self.client, self.bodies, self.version = client, bodies, version
        self.answers: list[dict] = []
        self.problem: ServerError | None = None

    def run(self) -> None:
        try:
            answers = self.client.generate(self.bodies)
            for answer, body in zip(answers, self.bodies, strict=True):
                check(answer, self.client.name, self.version, body["sampling_params"])
            self.answers = answers
        except ServerError as error:
            self.problem = error

    def wait(self, _=None) -> None:
        """Until all is answered; ServerError where it is not."""
        if self.ident is None:
            self.run()
        else:
            self.join()
        if self.problem is not None:
            raise self.problem


def bodies_of(request: Request, sampling: Sampling, longest: int) -> list[dict]:
    """One request of `/inference/v1/generate` a row, `longest` tokens with its answer at most."""
    drawn = request.noise is not None
    params = {
        "temperature": sampling.temperature if drawn else 0.0,
        "stop_token_ids": [sampling.stop_id],
        "ignore_eos": True,  # only our own stop token ends an answer
        "detokenize": False,
        "logprobs": 0,  # of the drawn token alone
    }
    bodies = []
    for row, mask in enumerate(request.prompt_mask):
        seed = {"seed": seed_of(request.noise[row])} if drawn else {}
        # With an environment some rows are asked for more tokens than they have room for, or have
        # no room at all: every rank asks for as many. What is drawn beyond it is dropped.
        ids = request.prompt_ids[row][mask].tolist()[: longest - 1]
        most = {"max_tokens": min(sampling.max_new_tokens, longest - len(ids))}
        bodies.append({"token_ids": ids, "sampling_params": params | most | seed})
    return bodies


def seed_of(noise: torch.Tensor) -> int:
    """(R,) noise of a row → 63 bits."""
    digest = hashlib.blake2b(noise.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check(answer: dict, name: str, version: str, params: dict) -> None:
    """ServerError where it is not our policy's, with the weights of now, or was broken off. params:
    the sampling_params that were sent."""
    choice = answer["choices"][0]
    ids, versions = choice["token_ids"], {s["version"] for s in choice["weight_versions"] or ()}
    if answer["model"] != name:
        raise ServerError(f"vLLM's server answers for another model: {answer['model']!r}")
    if versions != {version}:
        raise ServerError(
            f"vLLM's server is stale: it answered with weights {sorted(versions)}, and not with "
            f"{version!r}, which were sent last"
        )
    whole = len(ids) == params["max_tokens"] or (ids and ids[-1] in params["stop_token_ids"])
    if not whole or len(choice["logprobs"]["content"]) != len(ids):
        full = "; one started by hand needs a larger --max_length"
        raise ServerError(
            f"vLLM broke an answer off after {len(ids)} tokens ({choice['finish_reason']})"
            + full * (choice["finish_reason"] == "length")
        )


def samples_from(answers: list[dict], request: Request, sampling: Sampling) -> Samples:
    shape = len(answers), sampling.max_new_tokens
    ids = torch.full(shape, sampling.pad_id)
    logprobs = torch.zeros(shape)
    for row, answer in enumerate(answers):
        choice = answer["choices"][0]
        size = len(choice["token_ids"])
        ids[row, :size] = torch.tensor(choice["token_ids"])
        logprobs[row, :size] = torch.tensor([t["logprob"] for t in choice["logprobs"]["content"]])
    logprobs[logprobs < IMPOSSIBLE] = torch.nan
    # Those of greedy answers are not at the temperature.
    wanted = sampling.logprobs and request.noise is not None
    return samples_of(ids, sampling, logprobs if wanted else None)
