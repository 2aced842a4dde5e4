"""Starts the ranks of a program: by DeepSpeed's launcher, or by srun in a job of Slurm.

    python utils/launch.py step1_sft/main.py --output_dir FOLDER [--flag value …]

Their output is shown and kept in FOLDER/log.txt, their exit code returned. $LAUNCH holds flags of
DeepSpeed's launcher, e.g. LAUNCH="--num_gpus 4" or LAUNCH="--hostfile hosts"; by default it takes
every GPU of this machine, or two processes on a CPU. LAUNCH="srun [flags]" starts one task of Slurm
a rank. On SIGTERM or SIGUSR1 the ranks are asked to save and stop.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PYTHON = os.environ.get("PYTHON", sys.executable)
SHELL_CHARACTERS = re.compile(r"""[][;&|<>$`\\"'(){}*?!#~\n]""")
# What other machines get of our environment beside PYTHON* and NCCL*, which DeepSpeed's launcher
# hands over by itself.
HANDED_OVER = (
    "DS_ACCELERATOR OMP_NUM_THREADS GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME HF_HOME HF_HUB_OFFLINE "
    "HF_DATASETS_OFFLINE TORCH_EXTENSIONS_DIR"
).split()
# A task of Slurm becomes a rank of torch.
SLURM_TASK = """
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$(((SLURM_NTASKS + SLURM_NNODES - 1) / SLURM_NNODES)); exec "$@"
"""


def value_of(words: list[str], *names: str) -> str:
    """What stands after the first of these flags, or behind its =."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return ""


def launcher_words() -> list[str]:
    """$LAUNCH, with the number of ranks and a port where they are ours to choose."""
    words = os.environ.get("LAUNCH", "").split()
    if not words:
        with socket.socket() as s:  # a free port, so that two runs can share a machine
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        return ["--num_accelerators", str(ranks_here()), "--master_port", str(port)]
    counted = value_of(words, "--num_gpus", "--num_accelerators")
    if gives_visible_devices(words) and not counted:
        words += ["--num_accelerators", str(ranks_here())]
    return words


def ranks_here() -> int:
    """All GPUs, or two processes on a CPU: they use two cores better than two threads do. At most
    $MAX_RANKS, where that is above 0."""
    gpus = 0
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        count = "import torch; print(torch.cuda.device_count())"
        gpus = int(subprocess.check_output([PYTHON, "-c", count]))
    ranks = gpus or min(2, os.cpu_count() or 1)
    return min(ranks, int(os.environ.get("MAX_RANKS") or 0) or ranks)


def gives_visible_devices(words: list[str]) -> bool:
    """Must ranks be given CUDA_VISIBLE_DEVICES by us? Not on other machines or by Slurm, nor where
    the launcher's flags name devices themselves, of which DeepSpeed then says that they count."""
    elsewhere = re.compile(r"srun$|--(hostfile|include|exclude)|-[Hie]")
    given = os.environ.get("CUDA_VISIBLE_DEVICES") and not Path("/job/hostfile").exists()
    return bool(given) and not any(elsewhere.match(word) for word in words)


def ranks_of(words: list[str]) -> int:
    """How many ranks the launcher starts; 0 where only the launcher knows."""
    if words[0] == "srun":
        return int(os.environ.get("SLURM_NTASKS") or 0)
    hosts = value_of(words, "--hostfile", "-H")
    here = value_of(words, "--num_accelerators", "--num_gpus")
    chosen = value_of(words, "--include", "--exclude", "-i", "-e", "--num_nodes")
    if chosen or (hosts and here):
        return 0
    if hosts and Path(hosts).is_file():
        lines = Path(hosts).read_text(encoding="utf-8")
        return sum(map(int, re.findall(r"^[^#\s]+\s+slots=(\d+)", lines, re.MULTILINE)))
    return int(here or 0)


def environment_for_machines() -> str:
    """The lines of a file of environment variables that DeepSpeed's launcher reads."""
    own = [Path(folder, ".deepspeed_env") for folder in (os.environ["HOME"], ".")]
    lines = [x for f in own if f.exists() for x in f.read_text().splitlines() if "=" in x]
    lines += [f"{name}={os.environ[name]}" for name in HANDED_OVER if os.environ.get(name)]
    return "".join(f"{line}\n" for line in lines)


def srun_command(flags: list[str], program: list[str], environment: dict) -> list[str]:
    """The first node's address is the one that Slurm itself has for it."""

    def scontrol_show(*words: str) -> str:
        return subprocess.check_output(["scontrol", "show", *words], text=True)

    first = scontrol_show("hostnames", environment["SLURM_JOB_NODELIST"]).split()[0]
    address = re.search(r"NodeAddr=(\S+)", scontrol_show("node", first))[1]
    port = 15000 + int(environment["SLURM_JOB_ID"]) % 10000
    environment |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    # A rank that ends by an error ends the others by itself; Slurm would be in the way of those
    # that end with 75. It ends what is left after a minute.
    words = ["srun", "--kill-on-bad-exit=0", "--wait=60"]
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS") or cpus
        words.append(f"--cpus-per-task={cpus}")
    return [*words, *flags[1:], "bash", "-c", SLURM_TASK, "rank", PYTHON, "-u", *program]


def deepspeed_command(flags: list[str], program: list[str], environment: dict) -> list[str]:
    given = []
    if gives_visible_devices(flags):
        # DeepSpeed's launcher drops the variable where it is told how many GPUs to take, gives its
        # ranks 0, 1, … for it, and knows no UUIDs. So only the ranks see it.
        devices = environment.pop("CUDA_VISIBLE_DEVICES")
        flags = [*flags, "--no_python", "--no_local_rank"]
        given = ["env", f"CUDA_VISIBLE_DEVICES={devices}", PYTHON, "-u"]
    # ssh waits for a machine that is lost without end, unless told to ask it.
    alive = "-o ServerAliveInterval=5 -o ServerAliveCountMax=4"
    environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {alive}"
    runner = [PYTHON, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    return [*runner, *flags, *given, *program]


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """Once there are any. DeepSpeed's launcher needs seconds to start its ranks; ended meanwhile,
    it would leave behind a process of its own that starts them all the same."""
    while not (children := process.children()) and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    return children


def ask_ranks_to_stop(pid: int) -> None:
    """Not by way of DeepSpeed's launcher: it would ask one rank after the other, kill each after
    30 s and lose the exit code 75."""
    launcher = psutil.Process(pid)
    if launcher.name() == "srun":
        launcher.send_signal(signal.SIGUSR1)  # which it hands to every task
        return
    if not (children := children_of(launcher)):
        return
    (spawner,) = children[:1]
    words = spawner.cmdline()
    if any(os.path.basename(word) == "pdsh" for word in words[:2]):
        # On every machine, by the same way: the children of the launcher with this run's address.
        there = [re.escape(w) for w in words if w.startswith(("--master_addr=", "--master_port="))]
        pattern = "^[^ ]+ -u -m deepspeed[.]launcher[.]launch .*" + " ".join(there) + " "
        pattern = pattern.replace("\\-", "-")
        command = f'pkill -USR1 -P "$(pgrep -d, -f {shlex.quote(pattern)})"'
        end = words.index("-w") + 2
        environment = spawner.environ()
        subprocess.run([*words[:end], command], env=environment, timeout=60, check=True)
    else:
        for rank in children_of(spawner):
            rank.send_signal(signal.SIGUSR1)


def launch(program: str, argv: list[str]) -> int:
    """Runs a program of this repository as ranks; → its exit code, 75 where asked to stop."""
    file = Path(value_of(argv, "--output_file") or ".")
    folder = Path(value_of(argv, "--output_dir") or file.parent)
    folder.mkdir(parents=True, exist_ok=True)
    words, flags = [str(ROOT / program), *argv], launcher_words()
    hosts = value_of(flags, "--hostfile", "-H")
    elsewhere = bool(hosts) or Path("/job/hostfile").exists()
    if elsewhere:
        # To other machines DeepSpeed's launcher hands the words through a shell, unquoted.
        for word in filter(SHELL_CHARACTERS.search, words):
            print(
                f"launch: {word} holds characters that a shell of another machine would obey; put "
                "the setting into a file and name it with --config",
                file=sys.stderr,
            )
            return 2
        if hosts and not Path(hosts).is_file():
            print(f"launch: no hostfile {hosts}; name one in $LAUNCH or $HOSTS", file=sys.stderr)
            return 2
    environment = dict(os.environ)
    with tempfile.NamedTemporaryFile("w") as exported:
        if elsewhere:
            exported.write(environment_for_machines())
            exported.flush()
            environment.setdefault("DS_ENV_FILE", exported.name)
        start = srun_command if flags[0] == "srun" else deepspeed_command
        return run_and_keep(start(flags, words, environment), environment, folder / "log.txt")


def run_and_keep(command: list[str], environment: dict, log: Path) -> int:
    """Runs a launcher until it ends, its output shown and added to `log`; → its exit code."""
    tee = subprocess.Popen(["tee", "-ia", log], stdin=subprocess.PIPE)
    launcher = subprocess.Popen(command, env=environment, stdout=tee.stdin, stderr=tee.stdin)
    tee.stdin.close()
    asked = []

    def ask(*_) -> None:
        asked.append(True)
        print("asked to stop: waiting for the end of the step, and a checkpoint", file=sys.stderr)
        try:
            ask_ranks_to_stop(launcher.pid)
        except (psutil.Error, subprocess.SubprocessError) as error:
            print(f"launch: not every rank could be asked: {error}", file=sys.stderr)

    def interrupted(*_) -> None:
        print("interrupted: waiting for the ranks to end", file=sys.stderr)

    handlers = {signal.SIGTERM: ask, signal.SIGUSR1: ask, signal.SIGINT: interrupted}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    code = launcher.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    tee.wait()
    code = 128 - code if code < 0 else code
    # Ranks that were still importing torch died of SIGUSR1, with nothing to save.
    return 75 if asked and code in (246, 138) else code


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1], sys.argv[2:]))
