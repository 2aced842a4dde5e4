"""Machines of their own on this one: network, host name, processes and mounts, each with an sshd.

Everything lies in a temporary folder or in namespaces without a name, which end with the process
that made them, however it ends.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

NAMES = ("node-a", "node-b")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
SSH = """
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    LogLevel ERROR
"""
# A root whose password is locked by "!" may not come in with a key either; in these mounts he may.
BOOT = """
hostname {name}
mount -t tmpfs tmpfs /run && mkdir /run/sshd
sed -n 's/^root:[^:]*/root:*/p' /etc/shadow >{folder}/{name}.shadow
mount --bind {folder}/{name}.shadow /etc/shadow
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config 2>>{folder}/{name}.log
"""


def tidy_up_when_terminated() -> None:
    """SIGTERM ends the tests as Ctrl-C does: what they made is taken away."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def command(*words) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


class Machines:
    """node-a and node-b at 10.77.0.1 and .2, a cable between them. Call `close`."""

    addresses = {name: f"10.77.0.{i}" for i, name in enumerate(NAMES, 1)}

    def __init__(self, folder: Path):
        self.folder = folder
        self._booted: dict[str, subprocess.Popen] = {}
        try:
            self._write_ssh()
            for name in NAMES:
                self._boot(name)
            self._lay_cable()
        except BaseException:
            self.close()
            raise

    def _write_ssh(self) -> None:
        for key in ("host_key", "key"):
            command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        wrapper = self.folder / "bin/ssh"  # ~/.ssh is the user's: neither read nor written
        wrapper.parent.mkdir()
        ssh = shutil.which("ssh")
        wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def _boot(self, name: str) -> None:
        script = BOOT.format(name=name, folder=self.folder)
        spaces = ["--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        booted = subprocess.Popen([*DIES_WITH_US, "unshare", *spaces, "bash", "-ec", script])
        self._booted[name] = booted
        end = time.monotonic() + 30
        while "listening on" not in self.log(name):
            assert booted.poll() is None and time.monotonic() < end, self.log(name)
            time.sleep(0.05)

    def _lay_cable(self) -> None:
        a, b = NAMES
        cable = ["eth0", "type", "veth", "peer", "name", "eth0", "netns", self._init(b)]
        self._ip(a, "link", "add", *cable)
        for name in NAMES:
            self._ip(name, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
            self._ip(name, "link", "set", "lo", "up")
            self.cable(name, "up")

    def cable(self, name: str, state: str) -> None:
        """Pull out ("down") or plug in ("up") the machine's cable."""
        self._ip(name, "link", "set", "eth0", state)

    def _ip(self, name: str, *words) -> None:
        command("nsenter", "--target", self._init(name), "--net", "ip", *words)

    def log(self, name: str) -> str:
        log = self.folder / f"{name}.log"
        return log.read_text() if log.exists() else ""

    def _init(self, name: str) -> int:
        """The machine's first process, as this machine numbers it."""
        return psutil.Process(self._booted[name].pid).children()[0].pid

    def start(self, name: str, words, **kwargs) -> subprocess.Popen:
        """A program on machine `name`, as somebody there would start it."""
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        enter = ["nsenter", "--target", self._init(name), "--net", "--uts", "--pid", "--mount"]
        words = [*enter, f"--wd={kwargs.pop('cwd')}", "--", *words]
        environment = os.environ | {"PATH": path} | kwargs.pop("env", {})
        return subprocess.Popen([str(w) for w in words], env=environment, **kwargs)

    def run(self, name: str, words, timeout: float = 60) -> str:
        process = self.start(
            name, words, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output
        return output

    def ranks(self, name: str | None = None) -> list[psutil.Process]:
        """The ranks at work on a machine, or on all."""
        names = NAMES if name is None else [name]
        networks = {os.readlink(f"/proc/{self._init(each)}/ns/net") for each in names}
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                script = words[2] if words[1:2] == ["-u"] else ""
                if not script.endswith(".py") or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if os.readlink(f"/proc/{process.pid}/ns/net") in networks:
                    found.append(process)
            except (psutil.NoSuchProcess, FileNotFoundError):
                continue
        return found

    def close(self) -> None:
        for booted in self._booted.values():
            for process in psutil.Process(booted.pid).children():  # init: all else ends with it
                process.send_signal(signal.SIGKILL)
            booted.kill()
            booted.wait()
