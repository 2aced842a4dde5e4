"""Weights on disk: whole Hugging Face folders, written beside and moved into place.

Saving is two things: `snapshot` copies what is to be saved, on every rank; the function that it
returns writes the copy, on rank 0 alone, and may do so in another thread while training goes on.
"""

import copy as copying
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from utils import whole_files
from utils.checkpoints import manifest
from utils.distributed import process_group, zero
from utils.models import adapters, model_code, value_heads
from utils.models.ema import EMA


@dataclass(frozen=True)
class ModelFolder:
    """A transformers model, maybe sharded, as a folder that plain transformers loads; one with
    adapters as a folder of these, which names its base.

    The folder holds config, safetensors, generation config, tokenizer with its chat template, the
    Python files that came with either and, as config.yaml, the `settings` it was trained with.
    average: the EMA whose weights are saved in place of the model's.
    """

    model: nn.Module
    tokenizer: object
    settings: str
    average: EMA | None = None

    def snapshot(self, copy: zero.Copy = zero.to_cpu) -> Callable[[Path], None]:
        """Copies the weights of now; → what writes them. Every rank must call it."""
        if self.average is None:
            state = zero.whole_state_dict(self.model, copy, adapters.own_of(self.model))
        else:
            state = self.average.state_dict(copy=copy)
        # A model beside the model, with the same layers: transformers writes its settings, some of
        # which change while it generates.
        shown = copying.copy(self.model)
        shown.config = copying.deepcopy(self.model.config)

        def write(folder: Path) -> None:
            # All is written to a temporary folder first, so a full disk or a killed run leaves the
            # weights that were there.
            with whole_files.folder_beside(folder) as temporary:
                # Tied weights are one parameter under two names; transformers ties them on loading.
                if adapters.settings_of(shown) is None:
                    own, heads = value_heads.part_of(state)
                    shown.save_pretrained(temporary, state_dict=own)
                    if heads:
                        save_file(heads, temporary / value_heads.FILE, {"format": "pt"})
                else:
                    adapters.save(shown, state, temporary)
                # (Saving a tokenizer only reads it: the main thread may encode meanwhile.)
                self.tokenizer.save_pretrained(temporary)
                model_code.save(temporary, self.model, self.tokenizer)
                whole_files.write_text(temporary / "config.yaml", self.settings)
                whole_files.move_into(temporary, folder, stale=whole_files.WEIGHTS)

        return write


def save(folder, outputs: dict) -> None:
    """Write {name: what has `snapshot`} to folders of these names in `folder`, one after the other,
    so that the copy of one model is held at a time. Every rank must call it."""
    for name, output in outputs.items():
        write = output.snapshot(zero.to_cpu)
        with manifest.failing_together():
            if process_group.is_main():
                write(Path(folder) / name)
