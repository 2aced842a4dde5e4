"""Weights on disk: whole Hugging Face folders, written beside and moved into place."""

import os
from pathlib import Path

import torch
from torch import nn

from utils import config as run_config
from utils import whole_files
from utils.distributed import manifest, process_group, zero


@torch.no_grad()
def whole_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0 (an empty dict elsewhere); every rank must call it.

    Gathers one weight at a time, so the peak is the largest weight and not the model.
    """
    state = {}
    for name, p in module.named_parameters():
        with zero.gathered([p]):
            if process_group.is_main():
                state[name] = p.detach().to("cpu", copy=True)
    if process_group.is_main():
        persistent = module.state_dict(keep_vars=True)
        for name, b in module.named_buffers():
            if name in persistent:
                state[name] = b.detach().to("cpu", copy=True)
    return state


def save_model(folder, model: nn.Module, tokenizer, config, state_dict=None) -> None:
    """Write `model` (a transformers model, maybe sharded) so that plain transformers loads it.

    The folder holds config, safetensors, generation config, tokenizer with its chat template and
    `config.yaml`. All is written to a temporary folder first, so a full disk or a killed run
    leaves the weights that were there. `state_dict` replaces the model's own weights (EMA).
    Every rank must call it.
    """
    state = whole_state_dict(model) if state_dict is None else state_dict
    with manifest.failing_together():
        if process_group.is_main():
            with whole_files.folder_beside(folder) as temporary:
                # Tied weights are one parameter under two names; transformers ties them on loading.
                model.save_pretrained(temporary, state_dict=state)
                tokenizer.save_pretrained(temporary)
                run_config.save(config, temporary, process_group.world_size())
                replace_files(temporary, Path(folder))


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
