"""Weights on disk: whole Hugging Face folders, written beside and moved into place.

Saving is two things: `gather` copies what is to be saved, on every rank; the function that it
returns writes the copy, on rank 0 alone, and may do so in another thread while training goes on.
"""

import copy as copying
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import whole_files
from utils.checkpoints import manifest
from utils.distributed import process_group, zero
from utils.models import model_code
from utils.settings import command_line

Copy = Callable[..., torch.Tensor]  # (tensor, dtype=its own) → a copy on the CPU


def to_cpu(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True)


@torch.no_grad()
def whole_state_dict(module: nn.Module, copy: Copy = to_cpu) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0 (an empty dict elsewhere); every rank must call it.

    Gathers one weight at a time, so the peak is the largest weight and not the model.
    """
    state = {}
    for name, p in module.named_parameters():
        with zero.gathered([p]):
            if process_group.is_main():
                state[name] = copy(p)
    if process_group.is_main():
        persistent = module.state_dict(keep_vars=True)
        for name, b in module.named_buffers():
            if name in persistent:
                state[name] = copy(b)
    return state


@dataclass(frozen=True)
class ModelFolder:
    """A transformers model, maybe sharded, as a folder that plain transformers loads.

    The folder holds config, safetensors, generation config, tokenizer with its chat template, the
    Python files that came with either and `config.yaml`. average: the EMA whose weights are saved
    in place of the model's.
    """

    model: nn.Module
    tokenizer: object
    config: object
    average: object = None

    def gather(self, copy: Copy = to_cpu) -> Callable[[Path], None]:
        """The weights of now, and what writes them. Every rank must call it."""
        if self.average is None:
            state = whole_state_dict(self.model, copy)
        else:
            state = self.average.state_dict(copy=copy)
        # A model beside the model, with the same layers: transformers writes its settings, some of
        # which change while it generates.
        shown = copying.copy(self.model)
        shown.config = copying.deepcopy(self.model.config)
        ranks = process_group.world_size()

        def write(folder: Path) -> None:
            # All is written to a temporary folder first, so a full disk or a killed run leaves the
            # weights that were there.
            with whole_files.folder_beside(folder) as temporary:
                # Tied weights are one parameter under two names; transformers ties them on loading.
                shown.save_pretrained(temporary, state_dict=state)
                # (Saving a tokenizer only reads it: the main thread may encode meanwhile.)
                self.tokenizer.save_pretrained(temporary)
                model_code.save(Path(temporary), self.model, self.tokenizer)
                command_line.save(self.config, temporary, ranks)
                replace_files(temporary, folder)

        return write


def save(folder, parts: dict) -> None:
    """Write {name: what has `gather`} to folders of these names in `folder`, one after the other,
    so that the copy of one model is held at a time. Every rank must call it."""
    for name, part in parts.items():
        write = part.gather(to_cpu)
        with manifest.failing_together():
            if process_group.is_main():
                write(Path(folder) / name)


def replace_files(new: Path, folder: Path) -> None:
    """Move every file of `new` into `folder`, each in one step; other files there stay.

    A step's output folder holds its metrics too, so it cannot be swapped whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {file.name for file in new.iterdir()}
    for name in written:
        whole_files.sync(new / name)
    for name in sorted(written):
        os.replace(new / name, folder / name)
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in written:
            stale.unlink()  # of another sharding: transformers would read it first
    whole_files.sync(folder)
