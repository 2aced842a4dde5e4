"""Whether DeepSpeed's own hybrid engine can be right for a model, asked before it is built.

`hybrid_engine.enabled` makes `deepspeed.initialize` put inference layers of DeepSpeed in the place
of the model's while it generates. That re-points the trained weights, so what cannot work must be
known first. Each answer is read off the installed DeepSpeed and transformers.
"""

import inspect

import torch
from deepspeed.ops.op_builder.builder import MissingCUDAException
from torch import nn

# What DeepSpeed raises where a container or an op is not made for the model at hand, or cannot be
# compiled: MissingCUDAException is a plain Exception.
ERRORS = (
    RuntimeError,
    ValueError,
    AttributeError,
    TypeError,
    KeyError,
    AssertionError,
    MissingCUDAException,
)


def policies() -> dict[type, type]:
    """{layer class of transformers: DeepSpeed's policy for it}, as the hybrid engine finds them."""
    from deepspeed.module_inject.replace_policy import replace_policies

    found = {}
    for policy in replace_policies:
        policy(None)  # fills in _orig_layer_class
        classes = policy._orig_layer_class
        for layer_class in classes if isinstance(classes, list) else [classes]:
            if layer_class is not None:
                found[layer_class] = policy
    return found


def problems(module: nn.Module, zero_stage: int) -> list[str]:
    """Why DeepSpeed's inference layers cannot generate for `module` (maybe sharded); [] if they
    may. Changes nothing."""
    from deepspeed.accelerator import get_accelerator

    known = policies()
    layer = next((m for m in module.modules() if type(m) in known), None)
    if layer is None:
        return [f"DeepSpeed has no inference layer for {type(module).__name__}"]
    name, found = type(layer).__name__, []
    accelerator = get_accelerator()
    builder = accelerator.get_op_builder("InferenceBuilder")
    if builder is None or builder.__name__ == "NotImplementedBuilder":
        found.append(f"its inference op is not implemented on {accelerator.device_name()}")
    else:
        try:
            if not builder().is_compatible():
                found.append("its inference op cannot be compiled here")
        except ERRORS as error:  # no CUDA toolkit, or an nvcc that says what nobody expects
            found.append(f"its inference op cannot be compiled here ({error})")
    try:
        container = _container(module, layer, known[type(layer)])
    except ERRORS as error:
        return [*found, f"its container refuses {name} ({type(error).__name__}: {error})"]
    return found + _problems_of(container, module, layer, zero_stage)


def _container(module: nn.Module, layer: nn.Module, policy: type):
    """DeepSpeed's container around `layer`, before it takes hold of any weight."""
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.module_inject.utils import policy_to_ds_container

    policy = policy(layer, inference=True)
    policy.get_hidden_heads()  # reads attributes that transformers may have renamed
    return policy_to_ds_container(
        policy=policy,
        config=DeepSpeedInferenceConfig(
            set_empty_params=True, dtype=next(layer.parameters()).dtype
        ),
        model_config=module.config,
        layer_id=0,
        child=layer,
    )


def _problems_of(container, module: nn.Module, layer: nn.Module, zero_stage: int) -> list[str]:
    from deepspeed.module_inject.containers.features import HybridSplitQKVContainer

    name, found = type(layer).__name__, []
    own = type(container).__name__
    if not hasattr(container, "set_params_wo_copy"):
        found.append(f"{own} has no set_params_wo_copy, which the hybrid engine calls")
    heads = module.config.num_attention_heads
    kv_heads = getattr(module.config, "num_key_value_heads", None) or heads
    split = isinstance(container, HybridSplitQKVContainer)
    if split and kv_heads != heads and zero_stage < 3:
        # reset_qkv cuts the joint matrix at multiples of q's rows, and k and v have fewer.
        found.append(
            f"{own} would point q, k and v at wrong rows of one another: {heads} heads, {kv_heads} "
            "of keys and values"
        )
    cache = inspect.signature(type(module).forward).parameters.get("past_key_values")
    if cache is not None and "Cache" in str(cache.annotation) and "uple" not in str(cache):
        # DeepSpeed's own reason to leave OPT alone (populate_all_inference_policies).
        found.append(f"{name} fills transformers' Cache, the layer in its place only its own")
    if inspect.signature(type(layer).forward).return_annotation is torch.Tensor:
        found.append(f"{name} returns a tensor, the layer in its place a tuple")
    return found
