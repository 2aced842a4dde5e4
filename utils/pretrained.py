"""Reading what transformers has saved: a model's config, and words for what does not load."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN_FILES = 12


def config_of(path: str, trust_remote_code: bool, **settings):
    """The config of a model's folder or hub name. Raises SystemExit with the path and the cause."""
    from transformers import AutoConfig

    with refused(path, "the model's config"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **settings)


def positions_of(model_config) -> int | None:
    """How many tokens a row may have; None where the model has no such limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def refused(path: str, what: str) -> Iterator[None]:
    """Ends the run with path and cause where `what` does not load from `path`.

    Only around calls of transformers: a damaged file leads it into exceptions of every kind, and
    tokenizers raises the bare class.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's own message goes on to say how to run whatever code the file holds.
        raise SystemExit(
            f"cannot load {what} from {path!r}: its pickled weights hold more than tensors, which "
            "could be a program; ask its authors for safetensors"
        ) from error
    except Exception as error:
        raise SystemExit(
            f"cannot load {what} from {path!r}: {type(error).__name__}: {error}\n{_advice(path)}"
        ) from error


def _advice(path: str) -> str:
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        shown = ", ".join(names[:SHOWN_FILES]) + (" …" if len(names) > SHOWN_FILES else "")
        return (
            "the folder must hold config.json, *.safetensors, and tokenizer.json; it holds "
            f"{shown or 'nothing'}"
        )
    if os.path.exists(path):
        return f"{path!r} is a file; give the folder it is in"
    return (
        f"there is no folder {path!r}; a hub name needs the network once: download it first "
        "(hf download NAME) and give its folder"
    )
