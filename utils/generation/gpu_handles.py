"""GPU memory that another process may map: torch's handle of a tensor as JSON, and back.

torch itself would pickle it, and whoever reads a pickle runs what it says.
"""

import base64

import torch

PLACES = {"tensor_cls": 0, "storage_cls": 4, "dtype": 5}  # what is the same of all of ours
CLASSES = (torch.Tensor, torch.storage.TypedStorage, torch.uint8)


def to_json(handle: tuple) -> list:
    """handle: the arguments of `rebuild_cuda_tensor` that `torch.multiprocessing.reductions`
    makes of a tensor of bytes."""
    found = tuple(handle[place] for place in PLACES.values())
    if found != CLASSES:
        raise ValueError(f"the handle is of {found}, not of a tensor of bytes")
    kept = [x for place, x in enumerate(handle) if place not in PLACES.values()]
    return [plain(x) for x in kept]


def plain(x):
    if isinstance(x, bytes):
        return {"bytes": base64.b64encode(x).decode()}
    return list(x) if isinstance(x, tuple) else x


def from_json(said: list) -> tuple:
    handle = [
        base64.b64decode(x["bytes"])
        if isinstance(x, dict)
        else tuple(x)
        if isinstance(x, list)
        else x
        for x in said
    ]
    for place, one in zip(PLACES.values(), CLASSES, strict=True):
        handle.insert(place, one)
    return tuple(handle)
