"""Actor, critic, reference, reward model and EMA, each built once."""

from dataclasses import dataclass
from pathlib import Path

from utils.data import chat_template
from utils.distributed import checkpoint, zero
from utils.distributed.hybrid_engine import HybridEngine
from utils.models import language_model, scalar_model
from utils.models.ema import EMA


@dataclass
class Models:
    """actor and critic are trained; reference and reward are frozen, maybe sharded."""

    tokenizer: object
    actor: zero.TrainEngine
    hybrid: HybridEngine
    critic: zero.TrainEngine
    reference: object
    reward: object
    ema: EMA | None


def build(config, tokenizer, dtype: str, device) -> Models:
    check_same_language(tokenizer, config)
    actor = _train(
        language_model.load(
            config,
            config.model_name_or_path,
            dtype=dtype,
            zero_stage=config.zero_stage,
            tokenizer=tokenizer,
        ),
        config,
        dtype,
        config.zero_stage,
        config.learning_rate,
    )
    critic_stage = config.stage_of_critic()
    critic = _train(
        scalar_model.load(
            config,
            config.critic_model or config.reward_model,
            dtype=dtype,
            zero_stage=critic_stage,
            tokenizer=tokenizer,
            head="zero",
        ),
        config,
        dtype,
        critic_stage,
        config.critic_learning_rate or config.learning_rate,
    )
    stage = config.stage_of_reference()
    frozen = dict(config=config, dtype=dtype, zero_stage=stage, device=device)
    reference = zero.frozen(
        language_model.load(
            config,
            config.reference_model or config.model_name_or_path,
            dtype=dtype,
            zero_stage=stage,
            tokenizer=tokenizer,
        ),
        **frozen,
    )
    reward = zero.frozen(
        scalar_model.load(config, config.reward_model, dtype=dtype, zero_stage=stage), **frozen
    )
    ema = EMA(actor.module, config.ema_decay) if config.ema_decay > 0 else None
    return Models(
        tokenizer, actor, HybridEngine(actor, config.rollout_gather), critic, reference, reward, ema
    )


def _train(model, config, dtype, zero_stage, learning_rate) -> zero.TrainEngine:
    return zero.TrainEngine(
        model,
        config,
        dtype=dtype,
        zero_stage=zero_stage,
        learning_rate=learning_rate,
        total_steps=config.optimizer_steps(),
    )


def save(models: Models, config) -> None:
    """Write actor/, critic/ and actor_ema/ under the output folder. Every rank must call it."""
    folder, tokenizer = Path(config.output_dir), models.tokenizer
    actor, critic = models.actor.module, models.critic.module.classifier
    checkpoint.save_model(folder / "actor", actor, tokenizer, config)
    checkpoint.save_model(folder / "critic", critic, tokenizer, config)
    if models.ema is not None:
        average = models.ema.state_dict()
        checkpoint.save_model(folder / "actor_ema", actor, tokenizer, config, state_dict=average)


def check_same_language(tokenizer, config) -> None:
    """The actor's ids go straight into reward model and critic: they must mean the same there."""
    for flag in ("reward_model", "critic_model", "reference_model"):
        path = getattr(config, flag)
        if not path:
            continue
        other = chat_template.load_tokenizer(path, config.trust_remote_code)
        for what, mine, theirs in (
            ("vocabulary", tokenizer.get_vocab(), other.get_vocab()),
            ("chat template", tokenizer.chat_template, other.chat_template),
            ("stop token", tokenizer.eos_token, other.eos_token),
            ("pad token", tokenizer.pad_token, other.pad_token),
        ):
            if mine != theirs:
                raise SystemExit(
                    f"{flag}={path!r} and model_name_or_path={config.model_name_or_path!r} differ "
                    f"in {what}: the same ids would mean different text; train step 2 from this "
                    f"SFT model, or give one that shares its tokenizer as --{flag}"
                )
