"""Reward model and critic: a backbone with one number a token.

On disk it is `AutoModelForSequenceClassification` with one label, so the file loads anywhere;
plain transformers gives the number at the last token that is not padding, which is our score
before the bias. `config.reward_bias` is subtracted here: these heads have no bias of their own.
`config.reward_read_at` says at which token it is to be read, see scorer.py.
"""

import math

import torch
from torch import nn

from utils.kernels import packing
from utils.models import language_model, loading, model_code
from utils.models.loading import Loading
from utils.pretrained import config_to_read


class Fp32Head(nn.Linear):
    """A linear layer that computes in fp32 whatever its weight's dtype.

    bf16 has three digits: scores of 4.01 and 4.02 would tie, and values would move in steps of
    0.03 where PPO clips at 0.2.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.weight.float())


class ScalarModel(nn.Module):
    """`forward(ids (B,T), mask (B,T) bool) → (B,T)` fp32: value of each prefix, bias taken off.

    The mask may be on the CPU, and then nothing waits for the device of the ids. shared: what the
    rows begin with and need not go through twice (packing.shared_beginnings), where rows go end to
    end; the values of those tokens are then 0 but in the first row.
    """

    def __init__(self, classifier: nn.Module):
        super().__init__()
        # The class is swapped in place: the parameter, its name and ZeRO's hooks stay.
        classifier.score.__class__ = Fp32Head
        self.classifier = classifier
        self.bias = float(getattr(classifier.config, "reward_bias", 0.0))

    def set_bias(self, bias: float) -> None:
        """Scores become raw − bias; kept in the config that is saved with the weights."""
        self.bias = self.classifier.config.reward_bias = float(bias)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, shared=None) -> torch.Tensor:
        backbone, packed = self.classifier.base_model, packing.is_on(self.classifier)
        if packed:
            mask = packing.own(mask, shared)
            inputs = packing.inputs(input_ids, mask, shared)
        else:
            inputs = language_model.forward_inputs(backbone, input_ids, mask)
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        values = self.classifier.score(hidden).squeeze(-1) - self.bias
        return packing.spread(values, mask) if packed else values


def load(
    how: Loading, path: str, *, dtype: str, zero_stage: int = 0, head: str = "saved", **settings
) -> ScalarModel:
    """A ScalarModel from a reward model's folder, or from a language model's with a new head.

    head: what to do where the folder has no head: "saved" refuses; "normal" draws
    N(0, 1/√(d+1)) as InstructGPT's reward models; "zero" starts a critic at value 0. A "saved" one
    is only asked, so it needs no embedding for the tokenizer's pad (see scorer.sequence_scores).
    tokenizer, lora, shared: see loading.load.
    """
    model_config = config_to_read(path, how.trust_remote_code, num_labels=1)
    classifier = loading.load(
        model_code.scalar_class(model_config),
        path,
        how,
        dtype=dtype,
        zero_stage=zero_stage,
        grow=head != "saved",
        config=model_config,
        **settings,
    )
    if classifier.head_was_missing:
        if head == "saved":
            raise SystemExit(
                f"{path!r} has no reward head (score.weight): expected a folder written by "
                "step2_reward/main.py; give it as --reward_model"
            )
        _fresh_head(classifier.score.weight, head)
    if head == "normal":
        classifier.config.reward_read_at = "stop"  # as step 2 trains it, whatever it was before
    return ScalarModel(classifier)


def _fresh_head(weight: nn.Parameter, kind: str) -> None:
    shape = getattr(weight, "ds_shape", weight.shape)
    std = 0.0 if kind == "zero" else 1 / math.sqrt(shape[-1] + 1)
    # By a generator of its own on the CPU: under ZeRO-3 on a GPU the model was built there, and
    # other numbers were drawn until now. Every stage and every rank draws the same head.
    generator = torch.Generator().manual_seed((torch.initial_seed() + 1) % 2**63)
    drawn = torch.empty(shape, dtype=weight.dtype).normal_(0.0, std, generator=generator)
    if not hasattr(weight, "ds_id"):
        weight.data.copy_(drawn)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.copy_(drawn)
