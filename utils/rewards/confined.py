"""The program of a child process that runs what must not be trusted, or may take too long.

It gives up, for good and before anything else runs, what it could do harm with:

- Landlock: it reads files below a few folders (Python's own), and no other; it writes none.
- seccomp: of the kernel's calls it may make those of the table CALLS; all others fail with EPERM.
  So it opens no socket, starts no process or thread, and signals or traces no other process.
- limits: memory, processor time, size of the output, open files.

None of this needs a privilege, and it holds for root too. It needs Linux 5.13 on x86-64 or arm64,
with Landlock on. Only the standard library is imported: children start in milliseconds.
"""

import ctypes
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
import types

# Kernel calls by their numbers on x86-64 and arm64; None: there is none (linux/unistd.h).
CALLS = {
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66)},
    **{"pread64": (17, 67), "close": (3, 57), "lseek": (8, 62), "dup": (32, 23)},
    **{"dup2": (33, None), "dup3": (292, 24), "open": (2, None), "openat": (257, 56)},
    **{"stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79)},
    **{"statx": (332, 291), "readlink": (89, None), "readlinkat": (267, 78)},
    **{"access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439)},
    **{"getdents64": (217, 61), "getcwd": (79, 17), "mmap": (9, 222), "mprotect": (10, 226)},
    **{"munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214)},
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},
    **{"sigaltstack": (131, 132), "setitimer": (38, 103), "select": (23, None)},
    **{"pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73), "nanosleep": (35, 101)},
    **{"clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114)},
    **{"gettimeofday": (96, 169), "time": (201, None), "times": (100, 153)},
    **{"getrusage": (98, 165), "sched_yield": (24, 124), "sched_getaffinity": (204, 123)},
    **{"getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174)},
    **{"geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160)},
    **{"sysinfo": (99, 179), "getrandom": (318, 278), "futex": (202, 98)},
    **{"set_robust_list": (273, 99), "rseq": (334, 293), "arch_prctl": (158, None)},
    **{"restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94)},
}
# Its other commands could make the kernel send a signal to any process of the user's.
FCNTL, FCNTL_COMMANDS = (
    (72, 25),
    (0, 1, 2, 3, 1030),
)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, …_CLOEXEC
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_…

ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # SECCOMP_RET_…; 1 is EPERM
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
NR, ARCH, SECOND = 0, 4, 24  # where seccomp_data holds the call, the machine, its second argument
SET_DEATH_SIGNAL, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 22, 38  # prctl
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's calls, on every machine
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many kinds of access each version knows; later: 16
READ_FILE, READ_DIR = 1 << 2, 1 << 3

READABLE = (sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo")
READABLE += ("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom")
libc = ctypes.CDLL(None, use_errno=True)


def _kernel(call: int, *arguments) -> int:
    """A kernel call; OSError where it fails."""
    result = libc.syscall(call, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"kernel call {call}: {os.strerror(ctypes.get_errno())}")
    return result


def _prctl(*arguments: int) -> None:
    if libc.prctl(*map(ctypes.c_ulong, (*arguments, *[0] * (5 - len(arguments))))) < 0:
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")


def read_only(paths) -> None:
    """Landlock: from here on files below `paths` can be read, and nothing else be opened."""
    version = _kernel(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    handled = struct.pack("Q", (1 << RIGHTS.get(version, 16)) - 1)
    rules = _kernel(CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    for path in filter(os.path.exists, paths):
        opened = os.open(path, os.O_PATH)
        access = READ_FILE | READ_DIR * os.path.isdir(path)
        _kernel(ADD_RULE, rules, 1, struct.pack("=Qi", access, opened), 0)
        os.close(opened)
    _kernel(RESTRICT_SELF, rules, 0)
    os.close(rules)


def only_known_calls() -> None:
    """seccomp: from here on every kernel call that is not in the table fails."""
    column, machine = ARCHITECTURES[platform.machine()]
    numbers = [pair[column] for pair in CALLS.values() if pair[column] is not None]
    commands = [(EQUAL, len(FCNTL_COMMANDS) - i, 0, n) for i, n in enumerate(FCNTL_COMMANDS)]
    program = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, machine),
        (RETURN, 0, 0, KILL),  # a call by the numbers of another machine
        (LOAD, 0, 0, NR),
        # Each jumps over the calls behind it and over the block of fcntl, to the last line.
        *(
            (EQUAL, len(numbers) - i + len(commands) + 2, 0, number)
            for i, number in enumerate(numbers)
        ),
        (EQUAL, 0, len(commands) + 1, FCNTL[column]),
        (LOAD, 0, 0, SECOND),
        *commands,
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    packed = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(packed)
    filters = struct.pack("HP", len(program), ctypes.addressof(buffer))
    held = ctypes.create_string_buffer(filters)
    _prctl(SET_SECCOMP, 2, ctypes.addressof(held))


def limit(memory: int, seconds: int, output: int) -> None:
    """Bytes of address space; seconds of processor time, 0: any; bytes written to a file."""
    limits = {"AS": memory, "FSIZE": output, "NOFILE": 64, "CORE": 0, "MEMLOCK": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    if seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # then it is killed


def confine(readable=()) -> None:
    """Give up what the module says. OSError or KeyError where this machine cannot."""
    _prctl(SET_NO_NEW_PRIVILEGES, 1)
    read_only((*READABLE, *readable))
    only_known_calls()


def attempt(memory: int, seconds: int, output: int) -> None:
    """What `run` does before a program starts. OSError, ValueError or KeyError where this machine
    or this user cannot."""
    limit(memory, seconds, output)
    confine()


def run(job: int, memory: int, seconds: int, output: int, confined: bool) -> None:
    """Run the sources of a job, which the file of this number holds as JSON: {"name": __name__,
    "sources": [Python, …]}, one after the other with the same globals."""
    _prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    with open(job, encoding="utf-8") as file:
        asked = json.load(file)
    limit(memory, seconds, output)
    if confined:
        confine()
    program = types.ModuleType(asked["name"])
    sys.modules[asked["name"]] = program
    for source in asked["sources"]:
        exec(compile(source, "answer.py", "exec"), program.__dict__)


def serve(name: str, paths: list[str], memory: int, seconds: float, confined: bool) -> None:
    """Answer calls of a function of ours: a line of JSON arguments in, a line of JSON out. A call
    that takes more than so many seconds of processor time ends the process; one that needs more
    memory, or deeper recursion, is answered with null. paths: where Python looks for modules."""
    sys.path[:] = paths
    place, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(place), attribute)
    limit(memory, 0, 1 << 20)
    if confined:
        confine(paths)
    for line in sys.stdin:
        # Without a handler the signal ends the process, whatever code is running. Processor time,
        # so that a busy machine gives the same answers; the clock in case it waits for something.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
        try:
            answer = json.dumps(function(*json.loads(line)))
        except (MemoryError, RecursionError):
            answer = "null"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    # The folder of this file is no place to import from.
    del sys.path[0]
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory runs out, the kernel ends this process first
    what, *arguments = json.loads(sys.argv[1])
    {"run": run, "serve": serve, "attempt": attempt}[what](*arguments)
