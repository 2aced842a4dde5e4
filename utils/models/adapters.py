"""Adapters beside the frozen weights of a base model: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski
2023) and DoRA (Liu et al. 2024). The one module that knows peft.

peft puts its layers into the model in place, so the model keeps its class and every other module
takes it as it is. Adapters stay beside the base while sampling too: a merge rounds, in bf16 by as
much as a step of training moves them, and adding them changes nothing in any dtype.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils.distributed import zero
from utils.models import quantised
from utils.pretrained import ADAPTED_CONFIG, adapter_file, base_of, refused
from utils.seeding import undisturbed

NAME, PREFIX, WEIGHTS = "default", "base_model.model.", "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")  # of an adapter, the last of DoRA alone
INITS_BESIDE = (True, False, None, "gaussian", "eva")  # those that leave the base as it is
BASE = ".base_layer"  # what stands beside it
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@dataclass(frozen=True)
class Lora:
    """The adapters that are trained, as the settings of these names say; rank 0: none are, and all
    weights are."""

    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | tuple[str, ...] = ()
    lora_variant: str = "lora"
    seed: int = 0


def settings_of(module: nn.Module):
    """peft's config of the adapters in `module`; None where there are none."""
    found = (getattr(m, "peft_config", None) for m in module.modules())
    return next((configs[NAME] for configs in found if configs), None)


def is_scored(path: str) -> bool:
    """Is the model of an adapter folder a reward model or critic?"""
    return any(name.startswith(f"{PREFIX}score.") for name in _state_of(path))


def replaces_weights(path: str) -> bool:
    """Does an adapter folder change weights of its base, or hold others in their place, but for a
    head's? (False of other folders.) Then its model needs a base of its own."""
    if not base_of(path):
        return False
    names = (name for name in _state_of(path) if not name.startswith(f"{PREFIX}score."))
    return _changes_base(_config_of(path)) or any(".lora_" not in name for name in names)


def own_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What training may change and folders hold: adapters and the layers trained whole beside them
    (score head; embeddings that have grown), or all parameters of a module without adapters."""
    config = settings_of(module)
    whole = set(config.modules_to_save or ()) if config else set()
    for name, p in module.named_parameters():
        if config is None or ".lora_" in name or whole.intersection(name.split(".")):
            yield name, p


def put_on(model: nn.Module, path: str, lora: Lora | None, grown: bool = False) -> None:
    """The adapters of the folder `path`, where it is such a folder, and those that `lora` trains.

    lora: None where nobody trains the model; of rank 0, an adapter folder is merged into the base,
    all of which is trained. grown: have the embeddings rows that the base lacks? Then they are
    trained whole too. Raises SystemExit where folder and settings do not fit together.
    """
    saved, rank = base_of(path) is not None, lora.lora_rank if lora else 0
    if not saved and not rank:
        return
    from peft import inject_adapter_in_model  # takes a second, and only adapters need it

    if saved:
        state = _state_of(path)
        if hasattr(model, "score"):  # which does without the head of a language model
            kept = tuple(f"{PREFIX}{name}." for name in (model.base_model_prefix, "score"))
            state = {name: t for name, t in state.items() if name.startswith(kept)}
        config = _saved_settings(path, lora if rank else None)
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings)
        rows = state.get(f"{PREFIX}{name}.weight")
        if rows is not None:
            _check_head(model, path, config.modules_to_save or ())
        if rows is not None and len(rows) != embeddings.num_embeddings:
            model.resize_token_embeddings(len(rows), mean_resizing=False)
    else:
        state, config = {}, _new_settings(model, path, lora)
    whole = {*(config.modules_to_save or ()), *_trained_whole(model, grown)}
    whole &= {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config.modules_to_save = None  # for peft these would be layers of its own
    config.task_type = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    device = next(model.parameters()).device
    with undisturbed(device), refused(path, "adapters"):
        torch.manual_seed(lora.seed if lora else 0)  # the same numbers on every rank
        inject_adapter_in_model(config, model, NAME)
    config.modules_to_save = sorted(whole) or None
    _fill(model, path, state)
    own = {id(p) for _, p in own_of(model)}
    for p in model.parameters():
        p.requires_grad_(id(p) in own)
    if saved and lora is not None and not rank:
        merge(model)
        return
    for layer in layers_of(model).values():
        if zero_sharded(layer) and layer.use_dora.get(NAME):
            _gather_for_dora(layer)


def _check_head(model: nn.Module, path: str, trained_whole) -> None:
    """Refuse embeddings that were trained apart from the head, where the base ties the two."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    (name,) = (name.rpartition(".")[2] for name, m in model.named_modules() if m is head)
    if name not in trained_whole:
        raise SystemExit(
            f"{path!r} trained its embeddings apart from the head, and {base_of(path)!r} ties the "
            "two; name a base with tie_word_embeddings=false in adapter_config.json"
        )


def told(model: nn.Module) -> str:
    """Of which kind the adapters of `model` are, and where."""
    config = settings_of(model)
    targets = ", ".join(_targets(config))
    return f"adapters of rank {config.r} ({variant_of(config)}) on {targets}"


def _targets(config) -> list[str]:
    """In order; a pattern, which other programs may have given, as the only one."""
    targets = config.target_modules
    return [targets] if isinstance(targets, str) else sorted(targets)


def variant_of(config) -> str:
    return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"


def _trained_whole(model: nn.Module, grown: bool) -> Iterator[str]:
    """Names of the layers that are trained beside adapters."""
    if hasattr(model, "score"):
        yield "score"
    held = (model.get_input_embeddings(), model.get_output_embeddings()) if grown else ()
    for name, module in model.named_modules():
        if any(module is one for one in held):
            yield name.rpartition(".")[2]


def _new_settings(model: nn.Module, path: str, lora: Lora):
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    heads = [getattr(model, "score", None), model.get_output_embeddings()]
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(module is head for head in heads)
    }
    asked = set(lora.lora_target_modules) or linear
    if asked - linear:
        raise SystemExit(
            f"lora_target_modules={sorted(asked)}: {path!r} has no linear layer below its head "
            f"called {', '.join(sorted(asked - linear))}; set --lora_target_modules to some of "
            f"{', '.join(sorted(linear))}"
        )
    return LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=sorted(asked),
        base_model_name_or_path=path,
        **VARIANTS[lora.lora_variant],
    )


def _config_of(path: str):
    from peft import PeftConfig

    with refused(path, "an adapter's settings"):
        return PeftConfig.from_pretrained(str(Path(adapter_file(path)).parent))


def _changes_base(config) -> bool:
    """Does peft take the adapter's first numbers out of the base's weights (PiSSA, OLoRA, …)?"""
    return getattr(config, "init_lora_weights", True) not in INITS_BESIDE


def _saved_settings(path: str, lora: Lora | None):
    """Of an adapter folder; where `lora` is to go on training it, they must agree with that."""
    from peft import LoraConfig

    config = _config_of(path)
    if not isinstance(config, LoraConfig) or config.bias != "none":
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise SystemExit(
            f"{path!r} holds adapters of kind {kind} with bias {getattr(config, 'bias', '')!r}; "
            "LoRA, rsLoRA and DoRA without biases can be loaded"
        )
    config.base_model_name_or_path = base_of(path)
    if lora is None:
        return config
    if _changes_base(config):
        raise SystemExit(
            f"{path!r} has init_lora_weights={config.init_lora_weights!r}, which changes its base: "
            "without the adapter that is no reference; merge it first (python -m "
            f"utils.models.merge {path} FOLDER)"
        )
    targets = _targets(config)
    there = (config.r, config.lora_alpha, variant_of(config), targets)
    asked = (lora.lora_rank, lora.lora_alpha, lora.lora_variant)
    asked += (sorted(lora.lora_target_modules) or targets,)
    names = ("lora_rank", "lora_alpha", "lora_variant", "lora_target_modules")
    apart = [
        f"--{name} {was} (now {now})"
        for name, was, now in zip(names, there, asked, strict=True)
        if was != now
    ]
    if apart:
        raise SystemExit(
            f"{path!r} is an adapter that is trained on: set {', '.join(apart)}; or merge it into "
            f"its base first (python -m utils.models.merge {path} FOLDER)"
        )
    config.lora_dropout = lora.lora_dropout
    return config


# Folders, as peft writes them. The names of parameters there:


def _on_disk(name: str) -> str:
    vector = name.replace(f"lora_magnitude_vector.{NAME}.weight", "lora_magnitude_vector")
    return PREFIX + vector.replace(f".{NAME}.weight", ".weight")


def _state_of(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    with refused(path, "an adapter's weights"):
        return load_file(cached_file(path, WEIGHTS))


def _fill(model: nn.Module, path: str, state: dict[str, torch.Tensor]) -> None:
    """Copy the tensors of a folder, which may hold weights of layers trained whole, too."""
    places = {_on_disk(name): p for name, p in model.named_parameters()}
    ours = {_on_disk(name) for name, _ in own_of(model) if ".lora_" in name}
    if any(name.startswith(f"{PREFIX}score.") for name in state.keys() - places.keys()):
        raise SystemExit(
            f"{path!r} is a reward model or critic and writes no text; give a language model's "
            "folder, such as step 1's output"
        )
    wrong = sorted(state.keys() - places.keys()) + sorted(ours - state.keys() if state else ())
    shape = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in places.items()}
    wrong += [name for name in state.keys() & shape if tuple(state[name].shape) != shape[name]]
    if wrong:
        raise SystemExit(
            f"{path!r} does not fit its base {base_of(path)!r}: {', '.join(wrong[:5])} "
            f"({len(wrong)} in all) are missing, unknown or of another shape"
        )
    for name, tensor in state.items():
        zero.fill(places[name], tensor)
    if f"{PREFIX}score.weight" in state:
        model.head_was_missing = False


def save(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write adapters with the name of their base, as peft does, and the model's config. state: the
    tensors of own_of(model); buffers, which some experts' routers save, are the base's."""
    from safetensors.torch import save_file

    own = {name for name, _ in own_of(model)}
    tensors = {_on_disk(name): t.contiguous() for name, t in state.items() if name in own}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = settings_of(model)
    saved = copy.copy(settings)
    base = Path(settings.base_model_name_or_path)
    saved.base_model_name_or_path = str(base.resolve() if base.is_dir() else base)
    saved.inference_mode = True
    if not isinstance(settings.target_modules, str):
        saved.target_modules = _targets(settings)
    saved.save_pretrained(folder)
    model.config.to_json_file(folder / ADAPTED_CONFIG)


# The layers, and merging them.


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def zero_sharded(layer: nn.Module) -> bool:
    return hasattr(layer.get_base_layer().weight, "ds_id")


def _gather_for_dora(layer: nn.Module) -> None:
    """DoRA reads the weight of the layer beside it, which ZeRO-3 would have released by then."""
    import deepspeed

    weight = layer.get_base_layer().weight
    deepspeed.zero.register_external_parameter(layer.lora_magnitude_vector[NAME], weight)


def merged_weight(layer: nn.Module, weight, low, high, magnitude=None) -> torch.Tensor:
    """The fp32 weight of one linear layer that computes what base and adapter do together. weight:
    of the base. low (rank, in), high (out, rank); of DoRA magnitude (out,)."""
    flipped = layer.fan_in_fan_out  # GPT-2's Conv1D: (in, out)
    weight = weight.float().T if flipped else weight.float()
    weight = weight + layer.scaling[NAME] * (high.float() @ low.float())
    if magnitude is not None:
        weight = weight * (magnitude.float() / weight.norm(dim=1))[:, None]
    return weight.T if flipped else weight


def parts_of(layer_name: str, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What merged_weight takes of one layer's adapter, out of tensors by their names in a model."""
    names = (f"{layer_name}.{part}.{NAME}.weight" for part in PARTS)
    return [weights[name] for name in names if name in weights]


def check_apart(model: nn.Module) -> None:
    """SystemExit where an adapter's layer shares its weight with the embeddings, which a merge
    would change too."""
    shared, base = model.get_input_embeddings().weight, settings_of(model).base_model_name_or_path
    for name, layer in layers_of(model).items():
        if layer.get_base_layer().weight is shared:
            raise SystemExit(
                f"the adapter of {name} cannot be merged, as {base!r} ties that layer to its "
                "embeddings; name a base with tie_word_embeddings=false in adapter_config.json"
            )


def merged(
    model: nn.Module, bucket: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole weights of `model` by name, without those of adapters → the same weights of a model
    that computes as much without adapters, by its names. Each is rounded once, to the dtype it has
    or, where it is in few bits, that of the adapters. own: their whole weights by name."""
    found, dtype = {}, next(iter(own.values())).dtype
    for name, weight in bucket.items():
        path, _, leaf = name.rpartition(".")
        layer = path.removesuffix(BASE)
        whole = weight
        if not weight.is_floating_point():
            whole = quantised.dequantised(model.get_submodule(path))
        if layer != path and leaf == "weight":
            whole = merged_weight(model.get_submodule(layer), whole, *parts_of(layer, own))
        to = weight.dtype if weight.is_floating_point() else dtype
        found[f"{layer}.{leaf}" if path else name] = whole.to(to)
    return found


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put the adapters into the weights of the base, each rounded once to its dtype. The model has
    no adapters afterwards, and all of it can be trained."""
    check_apart(model)
    own = dict(own_of(model))
    for name, layer in layers_of(model).items():
        base = layer.get_base_layer()
        with zero.gathered([base.weight]):
            weight = merged_weight(layer, base.weight, *parts_of(name, own))
        zero.fill(base.weight, weight)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    del model.peft_config
    model.requires_grad_(True)


def same_layers(plain: nn.Module, module: nn.Module) -> None:
    """Adapters in `plain` as in `module`, with other numbers."""
    config = settings_of(module)
    if config is not None:
        from peft import inject_adapter_in_model

        config = copy.deepcopy(config)
        config.modules_to_save = None
        inject_adapter_in_model(config, plain, NAME)
