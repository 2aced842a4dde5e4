"""One number a token from a language model whose family has no class for that in transformers.

A folder that is saved of it holds this file, and plain transformers loads it with
`trust_remote_code=True`; so it imports torch and transformers only.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

# What transformers reads from the outer model and only the family's own class says.
ASKED = ("_supports_sdpa", "_supports_flash_attn", "supports_gradient_checkpointing")


class BackboneForSequenceClassification(PreTrainedModel):
    """The language model of `config` without its vocabulary head, under the names that its weights
    have there, and `score`."""

    def __init__(self, config):
        # The family's own code is run where it has made the config already, and only there.
        remote = not type(config).__module__.startswith("transformers.")
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
        for name in ASKED:
            setattr(self, name, getattr(whole, name, False))
        super().__init__(config)
        self.base_model_prefix = whole.base_model_prefix
        setattr(self, self.base_model_prefix, whole.base_model)
        width = whole.get_input_embeddings().embedding_dim
        self.score = nn.Linear(width, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def from_config(cls, config, **kwargs):
        return cls._from_config(config)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """(B,T) ids → logits (B,labels) at each row's last token that is not padding."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        output = self.base_model(input_ids, attention_mask=attention_mask.long(), **kwargs)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask.long() * places).argmax(-1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return SequenceClassifierOutput(logits=self.score(output.last_hidden_state)[rows, last])


BackboneForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
