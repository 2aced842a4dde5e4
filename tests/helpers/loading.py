"""The data of a step, loaded as its main.py loads it."""

from collections.abc import Callable

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.models import readers
from utils.data import comparisons, demonstrations, prompts
from utils.data.loading import DataSettings
from utils.models.scorer import reads_text


def load_step(config, tokenizer, say: Callable[[str], None] = lambda text: None) -> tuple:
    """What the step of this config trains and evaluates on."""
    settings = config.pick(DataSettings)
    if isinstance(config, SFTConfig):
        limits = config.max_length, config.long_answers
        return demonstrations.load(config.sft_data, tokenizer, settings, *limits, say)
    if isinstance(config, RewardConfig):
        names = config.preference_data, config.sft_data
        return comparisons.load(*names, tokenizer, settings, config.max_length, say)
    by_text = [r for r in readers(config).values() if reads_text(r, tokenizer)]
    return prompts.load(
        config.prompt_data, tokenizer, settings, config.max_prompt_length, by_text, say
    )
