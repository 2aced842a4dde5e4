"""Rollout engines, one a module with a function `build(setup) → RolloutEngine`. A module that is
added here is a new value of --rollout_engine."""

import importlib
import pkgutil

# auto is what is right for most; off is our loop on the module as it stands, for debugging.
ALIASES = {"auto": "native", "off": "native"}
CHOICES = (*ALIASES, *sorted(module.name for module in pkgutil.iter_modules(__path__)))


def build(name: str, setup):
    """The engine that --rollout_engine names, from an `engine.Setup`. A collective."""
    return importlib.import_module(f"{__name__}.{ALIASES.get(name, name)}").build(setup)
