"""A cluster of Slurm on this machine: munged, slurmctld and two slurmd, all in one folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from tests.helpers.machines import DIES_WITH_US
from utils.distributed.process_group import free_port

NODES = ("n1", "n2")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=5,bf_interval=5
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
# Of a job's first run until its second may begin Slurm waits so long, for the first one's
# credentials to end: 120 s where slurm.conf does not say otherwise.
CREDENTIALS_EXPIRE = 10


class Cluster:
    """Nodes n1 and n2 of one core each. Call `close`."""

    def __init__(self, folder: Path):
        self.folder, self._daemons = folder, []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        try:
            self._start_munge()
            self._start_slurm()
        except BaseException:
            self.close()
            raise

    def _daemon(self, *words) -> None:
        name = Path(words[0]).name
        with open(self.folder / f"{name}.out", "a") as out:
            started = subprocess.Popen(
                [
                    *DIES_WITH_US,
                    shutil.which(words[0], path=self.environment["PATH"]),
                    *map(str, words[1:]),
                ],
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._daemons.append(started)

    def _start_munge(self) -> None:
        folder = self.folder
        folder.chmod(0o755)  # munge wants its socket where everybody may go
        (folder / "munge").mkdir(mode=0o700)
        key = folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.socket"}
        files |= {f"{kind}-file": folder / f"munge/{kind}" for kind in ("pid", "log", "seed")}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self._wait_for(lambda: (folder / "munge.socket").exists(), "munged.out")

    def _start_slurm(self) -> None:
        host, (folder) = socket.gethostname().split(".")[0], self.folder
        (folder / "state").mkdir()
        node = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=1 State=UNKNOWN"
        nodes = "\n".join(node.format(name, host, free_port()) for name in NODES)
        values = {"host": host, "port": free_port(), "folder": folder, "nodes": nodes}
        text = CONFIG.format(expire=CREDENTIALS_EXPIRE, **values)
        (folder / "slurm.conf").write_text(text)
        self._daemon("slurmctld", "-D", "-i")
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            self._daemon("slurmd", "-D", "-N", name)
        self._wait_for(
            lambda: self.ask("sinfo", "-h", "-o", "%t %D") == "idle 2\n", "slurmctld.log"
        )

    def _wait_for(self, condition, log: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            text = (self.folder / log).read_text() if (self.folder / log).exists() else ""
            assert all(d.poll() is None for d in self._daemons), text
            assert time.monotonic() < end, text
            time.sleep(0.2)

    def ask(self, *words) -> str:
        """What a command of Slurm prints; "" where it fails."""
        done = subprocess.run(
            [str(w) for w in words], env=self.environment, capture_output=True, text=True
        )
        return done.stdout if done.returncode == 0 else ""

    def submit(self, root: Path, *words, **environment) -> str:
        """sbatch in `root`; → the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            cwd=root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ExitCode, …"""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def close(self) -> None:
        self.ask("scancel", "--full", "--signal=KILL", "--me")
        left = [child for d in self._daemons for child in children(d.pid)]
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        steps = f"{self.folder}/"
        for process in left + psutil.Process().children(recursive=True):
            if process.is_running() and steps in " ".join(process.cmdline()):
                process.kill()


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
