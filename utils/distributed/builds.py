"""DeepSpeed's just-in-time builds: announced before they begin, and refused under a stale lock.

An op is compiled when it is first used, 1 to 2 minutes, under a lock file. A killed process leaves
the file behind, and the next one would silently wait for it for ever.
"""

import functools
import glob
import os
import shutil


def watch() -> None:
    """From now on each build is announced, and one that a stale lock would stop ends the run."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    build = OpBuilder.jit_load
    if getattr(build, "is_watched", False):
        return

    @functools.wraps(build)
    def watched(self, *args, **kwargs):
        from torch.utils.cpp_extension import _get_build_directory

        folder = _get_build_directory(self.name, False)
        if lock := stale_lock(folder):
            raise SystemExit(
                f"{lock} is left of a build of DeepSpeed's {self.name} that was killed: no process "
                "of this machine holds it, and this run would wait for it for ever. Unless another "
                f"machine builds there, delete it: rm {lock}"
            )
        if os.environ.get("RANK", "0") == "0" and not glob.glob(os.path.join(folder, "*.so")):
            print(f"DeepSpeed compiles {self.name} into {folder}, 1 to 2 minutes", flush=True)
        return build(self, *args, **kwargs)

    watched.is_watched = True
    OpBuilder.jit_load = watched


def stale_lock(folder: str) -> str | None:
    """The lock file in a build folder that no process of this machine has open, or None."""
    lock = os.path.join(folder, "lock")
    if not os.path.exists(lock):
        return None
    for handle in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            if os.path.samefile(handle, lock):
                return None
        except OSError:
            continue  # of another user, or closed by now
    # Between the two looks the build may have ended and taken its lock away.
    return lock if os.path.exists(lock) else None


def missing_tools() -> str | None:
    """One line on what cannot be compiled here and what does without it, or None."""
    compiler = os.environ.get("CXX", "c++")
    missing = [tool for tool in (compiler, "ninja") if not shutil.which(tool)]
    if not missing:
        return None
    return (
        f"no {' and no '.join(missing)} here: nothing is compiled; AdamW is torch's own, "
        "collectives are gloo's or NCCL's, and rollouts are generated natively"
    )
