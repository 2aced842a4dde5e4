"""Python files that come with a model: which class scores it, and what a saved folder needs."""

import json
import shutil
import sys
from pathlib import Path

LISTS = ("config.json", "tokenizer_config.json")  # where auto_map stands


def scalar_class(model_config):
    """The class that loads one number a token: transformers' own for this config, else ours.

    Never one that comes with the model: not all have one, and the heads' names differ.
    """
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
    )

    from utils.models.scored_backbone import BackboneForSequenceClassification

    if type(model_config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return AutoModelForSequenceClassification
    return BackboneForSequenceClassification


def is_remote(x) -> bool:
    """Is the class of `x` (config, tokenizer or module) from a file that came with a model?"""
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return type(x).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def save(folder: Path, model, tokenizer) -> None:
    """Complete a folder that transformers has saved: every Python file that `model` or `tokenizer`
    came with, and an `auto_map` that names these and not where they were downloaded from.

    transformers itself copies the file of the outermost class only, and leaves entries of classes
    that were not loaded as they were.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    from utils.models.scored_backbone import BackboneForSequenceClassification

    parts = (model.config, tokenizer, *model.modules())
    for module in sorted({type(x).__module__ for x in parts if is_remote(x)}):
        file = sys.modules[module].__file__
        for needed in (file, *get_relative_import_files(file)):
            shutil.copyfile(needed, folder / Path(needed).name)

    if isinstance(model, BackboneForSequenceClassification):
        # transformers takes a class that comes with a model for one kind of config only.
        kind = type(model.config)
        source = f".{kind.__module__.split('.')[-1]}" if is_remote(model.config) else "transformers"
        with open(folder / "scored_backbone.py", "a", encoding="utf-8") as file:
            file.write(f"\n\nfrom {source} import {kind.__name__}  # noqa: E402\n\n")
            file.write(f"{type(model).__name__}.config_class = {kind.__name__}\n")

    def here(entry):
        """ "REPOSITORY--module.Class" → "module.Class", where the module lies in the folder."""
        if isinstance(entry, list):
            return [here(e) for e in entry]
        local = (entry or "").rpartition("--")[2]
        return local if (folder / f"{local.split('.')[0]}.py").exists() else entry

    for path in (folder / name for name in LISTS if (folder / name).exists()):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if "auto_map" in settings:
            settings["auto_map"] = {k: here(v) for k, v in settings["auto_map"].items()}
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
