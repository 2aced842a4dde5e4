"""Starting, waiting for and ending the processes of a vLLM server, with small ones in its place."""

import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext

import psutil
import pytest
import torch

from utils.distributed import process_group
from utils.distributed.process_group import free_port
from utils.errors import UserError
from utils.generation import vllm_server
from utils.generation.vllm_client import Client, ServerError
from utils.generation.vllm_server import Launch, Server, python_of

LAUNCH = Launch("python", "folder", "float32", max_length=64, rows=8, transfer="file", port=1)
SERVES = """
import http.server, mmap, os, subprocess, sys
if len(sys.argv) > 2:
    with open(sys.argv[2], "w+b") as shared:
        shared.truncate(4096)
        kept = mmap.mmap(shared.fileno(), 4096)
print("starts with", os.environ["ROLLOUT_TOKEN"], os.environ.get("RANK"), flush=True)
child = subprocess.Popen(["sleep", "60"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
FAILS = "import sys; print('no such model', flush=True); sys.exit(3)"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """server(program text) → one that runs it."""
    made = []

    def make(text, *more):
        launch = dataclasses.replace(LAUNCH, port=free_port())
        words = [sys.executable, "-c", text, str(launch.port), *more]
        monkeypatch.setattr(Launch, "command", lambda self, name: words)
        made.append(Server(launch, "policy-1", "secret", tmp_path / "vllm/log.txt"))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_it_is_ready_and_ends_with_all_its_processes(server, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(vllm_server, "SHARED_MEMORY", f"{folder}/")
    shared, others = folder / "psm_1", folder / "psm_2"
    others.touch()
    one = server(SERVES, str(shared))
    one.start()
    assert shared.exists()
    assert one.log.read_text().startswith("starts with secret None")
    group = [one.process.pid, *(c.pid for c in psutil.Process(one.process.pid).children())]
    assert len(group) == 2
    sent, kill = [], os.killpg
    monkeypatch.setattr(os, "killpg", lambda *which: sent.append(which[1]) or kill(*which))
    os.kill(one.process.pid, signal.SIGKILL)  # its child lives on
    one.process.wait()
    one.stop()
    assert not shared.exists() and others.exists()
    one.start()
    assert not psutil.pid_exists(group[1]) and one.process.pid != group[0]
    assert signal.SIGTERM not in sent, "a child without its leader may take the whole time to end"
    pid = one.process.pid
    one.stop()
    assert not psutil.pid_exists(pid) and signal.SIGTERM in sent
    one.stop()


def test_one_that_ends_early_shows_its_last_lines(server):
    began = time.monotonic()
    with pytest.raises(ServerError, match="(?s)ended before it was ready.*log.txt.*no such model"):
        server(FAILS).start()
    assert time.monotonic() - began < 20


def test_one_that_is_never_ready_is_given_up(server, monkeypatch):
    monkeypatch.setattr(vllm_server, "SECONDS_TO_START", 0)
    with pytest.raises(ServerError, match="was not ready after 0 s"):
        server("import time; time.sleep(60)").start()


def test_the_python_of_vllm_is_looked_at_before_it_is_started(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    with pytest.raises(UserError, match="docs/vllm.md.*--vllm_python or VLLM_PYTHON"):
        python_of("")
    with pytest.raises(UserError, match="is no program"):
        python_of(str(tmp_path / "python"))
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    with pytest.raises(UserError, match="finds no vllm"):
        python_of("")
    (tmp_path / "vllm.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert python_of("") == sys.executable
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert python_of("./python") == str(tmp_path / "python"), "the server runs in another folder"


def test_a_secret_goes_over_https_where_the_address_says_so():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(f"https://127.0.0.1:{listener.getsockname()[1]}", "secret", "m", 0.2)
        asking = threading.Thread(target=client.is_healthy, daemon=True)
        asking.start()
        first = listener.accept()[0].recv(1000)
        asking.join()
    assert first[:1] == b"\x16" and b"secret" not in first, "no TLS handshake"


def settings(**how) -> vllm_server.Settings:
    empty = {field.name: "" for field in dataclasses.fields(vllm_server.Settings)}
    return vllm_server.Settings(**empty | how)


@pytest.mark.parametrize(
    "devices, visible, ranks, shared",
    [
        ("4,5", None, [("a", 0), ("a", 1)], ""),
        ("1,2", None, [("a", 0), ("a", 1)], "1 "),
        ("0, 1", "4,5", [("a", 0), ("a", 1)], ""),
        ("5,6", "4,5", [("a", 0), ("a", 1)], "5 "),
        ("1", None, [("a", 0), ("b", 1)], ""),  # another machine's
    ],
)
def test_gpus_of_vllm_are_not_the_trainings(monkeypatch, devices, visible, ranks, shared):
    visible_of = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    monkeypatch.setattr(os, "environ", visible_of)

    def gather(place):
        names = visible.split(",") if visible else "01"
        assert place == (socket.gethostname(), names[0])
        return [(machine, names[gpu]) for machine, gpu in ranks]

    monkeypatch.setattr(process_group, "gather_objects", gather)
    expected = pytest.raises(SystemExit, match=f"are on {shared}") if shared else nullcontext()
    with expected:
        vllm_server.check_places(settings(rollout_devices=devices), 1, torch.device("cuda:0"))


def test_a_place_that_cannot_be_is_refused():
    vllm_server.check_places(settings(), 1, torch.device("cpu"))
    on_gpu = torch.device("cuda:0")
    vllm_server.check_places(settings(), 0, on_gpu)
    vllm_server.check_places(settings(rollout_url="http://other:1"), 1, on_gpu)
    with pytest.raises(SystemExit, match="rollout_ahead=1: .* take turns on the same GPUs"):
        vllm_server.check_places(settings(), 1, on_gpu)


@pytest.mark.parametrize("cores", ["0", "0,1", "0-1, 3", "2-2,0"])
def test_on_a_cpu_devices_are_cores(monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    vllm_server.check_places(settings(rollout_devices=cores), 1, torch.device("cpu"))


@pytest.mark.parametrize("cores", ["4,5", "0,0", "0-2,2", "3-1", "0,", "0-", "cuda:0", "0;1"])
def test_cores_that_cannot_be_are_refused(monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    said = f"rollout_devices={cores}: on a CPU these are cores.* may use 0, 1, 2, 3. .*leave it out"
    with pytest.raises(SystemExit, match=said):
        vllm_server.check_places(settings(rollout_devices=cores), 0, torch.device("cpu"))


def test_flags_and_environment_of_each_transfer(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    on_cpu = dataclasses.replace(LAUNCH, cache_bytes=99, weights=False)
    words, environment = on_cpu.command("policy-1"), on_cpu.environment("secret")
    said = dict(zip(words, words[1:], strict=False))
    assert said["--load-format"] == "dummy" and said["--kv-cache-memory-bytes"] == "99"
    assert said["--generation-config"] == "vllm" and said["--tensor-parallel-size"] == "1"
    assert said["--logprobs-mode"] == "processed_logprobs" and "--enforce-eager" in words
    assert said["--weight-transfer-config"] == '{"backend": "counted_file"}'
    assert "secret" not in words and environment["ROLLOUT_TOKEN"] == "secret"
    split = dataclasses.replace(on_cpu, devices="0-1,3")
    said = dict(zip(split.command("p"), split.command("p")[1:], strict=False))
    assert said["--tensor-parallel-size"] == "2"
    found = split.environment("secret")
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0-1|3" and "CUDA_VISIBLE_DEVICES" not in found
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment
    assert "MASTER_PORT" not in environment and environment["TRITON_F32_DEFAULT"] == "ieee"
    in_bf16 = dataclasses.replace(LAUNCH, dtype="bfloat16").environment("secret")
    assert "TRITON_F32_DEFAULT" not in in_bf16
    apart = dataclasses.replace(LAUNCH, transfer="nccl", devices="4,5", memory=0.8)
    said = dict(zip(apart.command("p"), apart.command("p")[1:], strict=False))
    assert said["--tensor-parallel-size"] == "2" and said["--gpu-memory-utilization"] == "0.8"
    assert apart.environment("s")["CUDA_VISIBLE_DEVICES"] == "4,5"
    turns = dataclasses.replace(LAUNCH, transfer="ipc", sleeps=True, cards=4)
    assert "--enable-sleep-mode" in turns.command("p")
    said = dict(zip(turns.command("p"), turns.command("p")[1:], strict=False))
    assert said["--tensor-parallel-size"] == "4"
