"""Starts vLLM's server with the Python of an environment of its own, and waits until it is ready.

python -m utils.generation.vllm_server --model_name_or_path SFT --vllm_python VENV/bin/python

Step 3 with `--rollout_engine vllm` does so by itself; by hand it is for a server that outlives a
run, or on another machine (`--rollout_url`). docs/vllm.md says how the environment is made.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.distributed import process_group, program, zero
from utils.errors import UserError
from utils.generation.vllm_client import TOKEN, Client, ServerError
from utils.generation.vllm_weights import SHARED_MEMORY
from utils.settings import command_line, fields
from utils.settings.fields import setting

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = "VLLM_PYTHON"  # environment variable, in the place of --vllm_python
BY_HAND = "policy"  # how the model of a server is called that is started by hand
SECONDS_TO_START, SECONDS_TO_END = 900, 20
LINES_SHOWN = 15  # of its log, where it ends too early


@dataclass(frozen=True)
class Settings:
    """What a run says of its server, by the settings of these names."""

    output_dir: str
    vllm_python: str
    rollout_url: str
    rollout_devices: str
    rollout_memory: float
    rollout_timeout: float
    trust_remote_code: bool


@dataclass(frozen=True)
class Launch:
    """How a server is started. model: a folder or hub name; weights: are its own to be loaded?
    devices: GPUs of its own, as CUDA_VISIBLE_DEVICES has them, or a CPU's cores, as `cores_of` has
    them; empty: the first `cards` that there are. It fills each up to the share `memory`, with its
    part of every layer. cache_bytes: keys and values of each part, on a CPU. transfer: see
    vllm_weights."""

    python: str
    model: str
    dtype: str
    max_length: int
    rows: int
    transfer: str
    weights: bool = True
    devices: str = ""
    cards: int = 1
    memory: float = 0.9
    cache_bytes: int = 0
    trust_remote_code: bool = False
    sleeps: bool = False
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def parts(self) -> int:
        """Workers that each hold their part of every layer."""
        return len(self.devices.split(",")) if self.devices else self.cards

    def command(self, name: str) -> list[str]:
        words = [self.python, "-m", "utils.generation.vllm_worker"]
        flags = {
            "model": self.model,
            "served-model-name": name,
            "host": self.host,
            "port": self.port,
            "dtype": self.dtype,
            "max-model-len": self.max_length,
            "max-num-seqs": self.rows,
            "tensor-parallel-size": self.parts,
            "load-format": "auto" if self.weights else "dummy",
            # Sampling is what the request says, and not what the model's folder says.
            "generation-config": "vllm",
            # Log-probabilities at the temperature, as the trainer's are.
            "logprobs-mode": "processed_logprobs",
            "worker-extension-cls": "utils.generation.vllm_worker.Extension",
            "middleware": "utils.generation.vllm_worker.only_with_token",
            "weight-transfer-config": json.dumps({"backend": f"counted_{self.transfer}"}),
        }
        if self.cache_bytes:
            flags["kv-cache-memory-bytes"] = self.cache_bytes
        else:
            flags["gpu-memory-utilization"] = self.memory
        words += [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        words += ["--tokens-only", "--disable-uvicorn-access-log"]
        words += ["--enforce-eager"] if self.cache_bytes else []
        words += ["--enable-sleep-mode"] if self.sleeps else []
        words += ["--trust-remote-code"] if self.trust_remote_code else []
        return words

    def environment(self, token: str) -> dict[str, str]:
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONHOME")
        found = {name: value for name, value in os.environ.items() if name not in ours}
        found |= {TOKEN: token, "PYTHONPATH": str(ROOT), "VLLM_SERVER_DEV_MODE": "1"}
        found |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.cache_bytes:
            # With logprobs its sampler would compile a function with g++ at the first answer.
            found["TORCH_COMPILE_DISABLE"] = "1"
        if self.dtype == "float32":
            # Its attention in fp32 is Triton's, which would round what it multiplies to TF32.
            found["TRITON_F32_DEFAULT"] = "ieee"
        if self.devices and self.cache_bytes:
            found["VLLM_CPU_OMP_THREADS_BIND"] = self.devices.replace(",", "|")
        elif self.devices:
            found["CUDA_VISIBLE_DEVICES"] = self.devices
        return found


class Server:
    """A vLLM server of our own: a group of processes with its log."""

    def __init__(self, launch: Launch, name: str, token: str, log: Path):
        self.launch, self.name, self.token, self.log = launch, name, token, log
        self.process: subprocess.Popen | None = None
        self.shared: set[str] = set()  # its files in shared memory

    def start(self) -> None:
        """Raises ServerError where it ends before it is ready, or is not within the time."""
        self.stop()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = self.launch.environment(self.token) | {"ROLLOUT_PARENT": str(os.getpid())}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.launch.command(self.name),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its processes end together
            )
        client = Client(self.url, self.token, self.name)
        end = time.monotonic() + SECONDS_TO_START
        while not client.is_healthy():
            if self.process.poll() is not None:
                raise ServerError(f"vLLM's server ended before it was ready; {self.last_lines()}")
            if time.monotonic() > end:
                raise ServerError(
                    f"vLLM's server was not ready after {SECONDS_TO_START} s; {self.last_lines()}"
                )
            time.sleep(0.1)
        self.shared = mapped_by(self.process.pid)

    @property
    def url(self) -> str:
        return f"http://{self.launch.host}:{self.launch.port}"

    def last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
        return f"the end of {self.log}:\n" + "\n".join(f"    {line}" for line in lines)

    def stop(self) -> None:
        """Ends every process of it, whatever state they are in."""
        if self.process is None:
            return
        dead = self.process.poll() is not None  # and those that it left wait for nobody
        for number in (signal.SIGTERM, signal.SIGKILL)[dead:]:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            end = time.monotonic() + SECONDS_TO_END
            while group_lives(self.process) and time.monotonic() < end:
                time.sleep(0.1)
        self.process = None
        # One that was killed leaves them there, and between workers on a CPU vLLM always does.
        for file in self.shared:
            Path(file).unlink(missing_ok=True)
        self.shared = set()


def group_lives(process: subprocess.Popen) -> bool:
    process.poll()  # takes the leader's exit code, else it stays in the group as a zombie
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def mapped_by(group: int) -> set[str]:
    """Files in shared memory that processes of a group have mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if os.getpgid(int(maps.parent.name)) == group:
                words = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
                found |= {w[5] for w in words if len(w) > 5 and w[5].startswith(SHARED_MEMORY)}
        except OSError:  # it has ended
            continue
    return {name for name in found if not name.endswith(" (deleted)")}


def check_places(how: Settings, ahead: int, device: torch.device) -> None:
    """SystemExit where vLLM cannot be where it is to be. ahead: --rollout_ahead; device: this
    rank's. A collective, before anything is loaded: two processes that fill one GPU end late, or
    hang."""
    devices = how.rollout_devices
    if ahead and device.type != "cpu" and not (devices or how.rollout_url):
        raise SystemExit(
            f"rollout_ahead={ahead}: vLLM and the training take turns on the same GPUs; set "
            "--rollout_devices to some of vLLM's own, or leave it out"
        )
    if not devices:
        return
    if device.type == "cpu":
        groups, allowed = cores_of(devices), os.sched_getaffinity(0)
        named = set().union(*groups)
        if not all(groups) or not named <= allowed or len(named) < sum(map(len, groups)):
            raise SystemExit(
                f"rollout_devices={devices}: on a CPU these are cores, for each worker of vLLM one "
                "or a range, none of them twice, as 0-3,4-7; this process may use "
                f"{', '.join(map(str, sorted(allowed)))}. Name some of these, or leave it out"
            )
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = visible.split(",")[device.index].strip() if visible else str(device.index)
    places = process_group.gather_objects((socket.gethostname(), own))
    trained = {gpu for machine, gpu in places if machine == places[0][0]}
    if shared := sorted(trained & {gpu.strip() for gpu in devices.split(",")}):
        raise SystemExit(
            f"rollout_devices={devices}: ranks of the training are on {', '.join(shared)} (and on "
            f"{', '.join(sorted(trained))} in all); name others, or none for taking turns"
        )


def cores_of(devices: str) -> list[set[int]]:
    """The cores of each worker: "0-2,5" → [{0, 1, 2}, {5}]; empty where the text is no such."""
    found = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in devices.split(",")]
    return [set(range(int(m[1]), int(m[2] or m[1]) + 1)) if m else set() for m in found]


REMEDY = f"make it as docs/vllm.md says, and set --vllm_python or {PYTHON} to its bin/python"


def python_named(given: str) -> str:
    """--vllm_python or $VLLM_PYTHON as an absolute path, since the server runs in a folder of its
    own; UserError where that is no program."""
    python = given or os.environ.get(PYTHON, "")
    if not python:
        raise UserError(f"rollout_engine=vllm needs an environment of vLLM's own: {REMEDY}")
    found = shutil.which(python)
    if found is None:
        raise UserError(f"vllm_python={python} is no program: {REMEDY}")
    return os.path.abspath(found)


def python_of(given: str) -> str:
    """The same; UserError where it finds no vLLM."""
    python = python_named(given)
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", look]).returncode:
        raise UserError(f"vllm_python={python} finds no vllm: {REMEDY}")
    return python


@dataclass
class ServerConfig(fields.Settings):
    model_name_or_path: str = setting("", "folder or hub name of the policy", needed=True)
    vllm_python: str = setting("", f"Python of vLLM's environment; empty: ${PYTHON}")
    port: int = setting(8200, "port", at_least=1, at_most=65535)
    host: str = setting("127.0.0.1", "address; other machines reach it by 0.0.0.0 only")
    dtype: str = setting("bf16", "of the weights, as step 3's", choices=tuple(zero.DTYPES))
    max_length: int = setting(1024, "tokens of prompt and answer at most", at_least=2)
    rows: int = setting(256, "sequences decoded together, at most", at_least=1)
    devices: str = setting("", "GPUs, e.g. 4,5: split over them (tensor parallelism); empty: a CPU")
    memory: float = setting(0.9, "share of each GPU's memory", above=0, below=1)
    cache_gib: int = setting(1, "GiB of keys and values, on a CPU", at_least=1)
    trust_remote_code: bool = setting(False, "run Python code that comes with a model (a risk)")
    log: str = setting("vllm_server.log", "file for what it prints")


def main() -> None:
    config = command_line.parse(ServerConfig, __doc__)
    program.quiet_libraries()
    token = os.environ.get(TOKEN, "")
    if not token:
        raise UserError(
            f"whoever reaches the server may change its weights: set {TOKEN} to a secret, here and "
            "for step 3"
        )
    name = config.model_name_or_path
    launch = config.pick(
        Launch,
        python=python_of(config.vllm_python),
        model=os.path.abspath(name) if os.path.isdir(name) else name,
        dtype=str(zero.DTYPES[config.dtype]).removeprefix("torch."),
        transfer="nccl" if config.devices else "file",
        cache_bytes=0 if config.devices else config.cache_gib * 2**30,
    )
    server = Server(launch, BY_HAND, token, Path(config.log))
    stop_on_signals(server.stop)
    server.start()
    print(f"ready: --rollout_url http://{config.host}:{config.port}; log: {config.log}", flush=True)
    code = server.process.wait()
    raise SystemExit(code)


def stop_on_signals(stop: Callable[[], None]) -> None:
    def end(number, _):
        stop()
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


if __name__ == "__main__":
    program.run(main)
