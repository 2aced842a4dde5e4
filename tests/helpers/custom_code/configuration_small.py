from transformers import PretrainedConfig


class SmallConfig(PretrainedConfig):
    model_type = "small_custom"

    def __init__(
        self,
        padded_vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        **kwargs,
    ):
        # As ChatGLM: layers are built by a name of its own, and others read the usual one.
        self.padded_vocab_size = self.vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        kwargs.pop("vocab_size", None)
        super().__init__(**kwargs)
