"""What keeps a model's folder from loading, in words that say what to do."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN_FILES = 12


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
            f"cannot load {what} from {path!r}: {type(error).__name__}: {error}\n{advice(path)}"
        ) from error


def advice(path: str) -> str:
    """What to do about a model that does not load from `path`."""
    if os.path.isdir(path):
        found = sorted(os.listdir(path))
        there = ", ".join(found[:SHOWN_FILES]) + (" …" if len(found) > SHOWN_FILES else "")
        return (
            "the folder must hold config.json, *.safetensors, and tokenizer.json; it holds "
            f"{there or 'nothing'}"
        )
    if os.path.exists(path):
        return f"{path!r} is a file; give the folder it is in"
    return (
        f"there is no folder {path!r}; a hub name needs the network once: download it first "
        "(hf download NAME) and give its folder"
    )
