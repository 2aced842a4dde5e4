"""Reading what transformers has saved: a model's config, and words for what does not load."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHOWN_FILES = 12
# An adapter folder's; with a config.json, transformers would look for whole weights there.
ADAPTED_CONFIG = "adapter_model_config.json"


def adapter_file(path: str) -> str | None:
    """Where the settings of an adapter folder, or of a hub name that is one, lie; None: a model."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if not path or os.path.isdir(path):
        file = os.path.join(path, "adapter_config.json")
        return file if os.path.isfile(file) else None
    with refused(path, "a model"):
        return find_adapter_config_file(path)


def base_of(path: str) -> str | None:
    """Folder or hub name of the model that an adapter folder belongs to; None where `path` is no
    such folder. Raises SystemExit where the base is not there."""
    file = adapter_file(path)
    if file is None:
        return None
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    missing = os.path.isabs(base) and not os.path.isdir(base)
    if not base or missing or (not os.path.isdir(base) and base.count("/") > 1):
        raise SystemExit(
            f"{path!r} is an adapter of the model {base!r}, which is not there; name its folder "
            "as base_model_name_or_path in adapter_config.json"
        )
    if adapter_file(base):
        raise SystemExit(
            f"{path!r} is an adapter of {base!r}, which is an adapter itself; merge that one "
            f"first: python -m utils.models.merge {base} FOLDER"
        )
    return base


def config_of(path: str, trust_remote_code: bool, **settings):
    """The config of a model's folder or hub name. Raises SystemExit with the path and the cause."""
    from transformers import AutoConfig

    if base := base_of(path):
        own = os.path.join(path, ADAPTED_CONFIG)  # not where other programs have written it
        path = own if os.path.isfile(own) else base
    with refused(path, "the model's config"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **settings)


def config_to_read(path: str, trust_remote_code: bool, **settings):
    """The config with which the weights on disk are read: an adapter folder's own, with the
    vocabulary of its base, which has fewer rows where embeddings have grown."""
    config, base = config_of(path, trust_remote_code, **settings), base_of(path)
    if base:
        whole = config_of(base, trust_remote_code)
        for own, its in ((config, whole), (config.get_text_config(), whole.get_text_config())):
            for name, value in vars(its).items():
                if "vocab_size" in name or name == "pad_token_id":
                    setattr(own, name, value)
    return config


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
