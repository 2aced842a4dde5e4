"""An engine over the model of a folder, for the checks that run on every rank."""

from step1_sft.config import SFTConfig
from utils.data import chat_template
from utils.distributed import zero
from utils.models import language_model

RATE = 1e-2  # the schedule's peak


def engine_of(
    folder: str,
    stage: int,
    dtype: str,
    offload: str,
    *,
    total_steps: int,
    frozen: str = "",
    tokens: int = 0,
    **settings,
) -> zero.TrainEngine:
    """Before its first step. frozen: weights with this in their names are; tokens: so many does the
    tokenizer have, with new ones at its end; settings: of SFTConfig."""
    config = SFTConfig(
        model_name_or_path=folder,
        zero_stage=stage,
        dtype=dtype,
        offload=offload,
        output_dir="-",
        micro_batch_size=2,
        **settings,
    )
    tokenizer = chat_template.load_tokenizer(folder)
    new = [f"<new {i}>" for i in range(tokens - len(tokenizer))]
    tokenizer.add_tokens(new, special_tokens=True)
    model = language_model.load(config, folder, dtype=dtype, zero_stage=stage, tokenizer=tokenizer)
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    how = config.pick(zero.Training, learning_rate=RATE)
    return zero.TrainEngine(model, how, dtype=dtype, zero_stage=stage, total_steps=total_steps)
