"""How faults are planted: by functions around the real ones, and by changes to what was built."""

import functools

from step3_ppo import main as step3


def around(patch, holder, name: str, change) -> None:
    """Replace holder.name by change(the real one, *its arguments)."""
    real = getattr(holder, name)
    wrapped = functools.wraps(real)(lambda *args, **kwargs: change(real, *args, **kwargs))
    patch.setattr(holder, name, wrapped)


def once_built(patch, change) -> None:
    """Call change(models) on the run's models, built but not used."""

    def build(real, *args):
        built = real(*args)
        change(built)
        return built

    around(patch, step3, "build", build)
