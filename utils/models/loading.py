"""Model folders → models with every weight from the file, or a refusal that says what is wrong."""

import re
from collections.abc import Callable
from pathlib import Path

from torch import nn

from utils.models.model_files import refused


def load_whole(auto_class, path: str, finish: Callable | None = None, **how) -> nn.Module:
    """`auto_class.from_pretrained(path, **how)`, of which no weight is left at random or left out.

    A new score head alone may be missing: `head_was_missing` of the model says so. `finish(model)`
    runs before all is checked. Pickled weights (pytorch_model.bin) are read as plain tensors only.
    Raises SystemExit with what was expected and found.
    """
    with refused(path, f"a model ({auto_class.__name__})"):
        model, info = auto_class.from_pretrained(
            path,
            output_loading_info=True,
            # Other shapes are refused below, by name; transformers' own error names none.
            ignore_mismatched_sizes=True,
            weights_only=True,
            **how,
        )
    # Under ZeRO-3 transformers reports neither names nor shapes that do not fit.
    unexpected = set(info["unexpected_keys"]) | (names_on_disk(path) - model.state_dict().keys())
    if any(name.startswith("score.") for name in unexpected):
        raise SystemExit(
            f"{path!r} is a reward model or critic and writes no text; give a language model's "
            "folder, such as step 1's output"
        )
    kind = type(model).__name__
    missing = {name for name in info["missing_keys"] if not name.startswith("score.")}
    _refuse(path, f"lacks weights of {kind}, which would stay random", missing)
    shapes = {
        f"{name} (found {list(found)}, expected {list(expected)})"
        for name, found, expected in info["mismatched_keys"]
    }
    _refuse(path, f"holds weights of another shape than its config.json gives {kind}", shapes)
    _refuse(path, f"holds weights that do not load into {kind}", set(info.get("error_msgs", ())))
    _refuse(
        path, f"holds layers that its config.json leaves out of {kind}", left_out(model, unexpected)
    )
    model.head_was_missing = any(name.startswith("score.") for name in info["missing_keys"])
    if finish is not None:
        finish(model)
    return model


def _refuse(path: str, what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (" …" if len(names) > 5 else "")
        raise SystemExit(f"{path!r} {what}: {shown} ({len(names)} in all); is it the right folder?")


def names_on_disk(path: str) -> set[str]:
    """Names of the weights in a folder's safetensors files; empty for hub names and pickles."""
    from safetensors import safe_open

    names = set()
    for file in Path(path).glob("model*.safetensors"):
        with safe_open(str(file), framework="pt") as weights:
            names |= set(weights.keys())
    return names


def left_out(model: nn.Module, unexpected: set[str]) -> set[str]:
    """Of weights that found no place those that are like one of a layer which the model has.

    Others have a right to be there: a vocabulary head that a reward model does without, the eyes
    of a model that is used for its text, a layer that its family says it leaves out.
    """
    own = {_of_any_layer(name) for name in model.state_dict() if _of_any_layer(name) != name}
    unused = "|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ["(?!)"])
    return {n for n in unexpected if _of_any_layer(n) in own and not re.search(unused, n)}


def _of_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)
