"""Actor, critic, reference, reward model, judge and EMA, each built once."""

from dataclasses import dataclass

from step3_ppo import ptx
from step3_ppo.environments import environment as environments
from utils.checkpoints.model_folder import ModelFolder
from utils.data import chat_template
from utils.distributed import process_group, zero
from utils.distributed.host_memory import FrozenOffload
from utils.generation import engines, vllm_server
from utils.generation.engine import RolloutEngine, Setup
from utils.generation.nucleus import Nucleus
from utils.models import freezing, language_model, scalar_model, shared_base
from utils.models.adapters import Lora
from utils.models.ema import EMA
from utils.models.freezing import Freezing
from utils.models.loading import Loading
from utils.models.scorer import Reader, Scorer, differences, reads_text
from utils.rewards import remote, sums


@dataclass
class Models:
    """actor and critic are trained; reference, reward and judge are frozen, maybe sharded. None
    where the run has no use for it."""

    tokenizer: object
    actor: zero.TrainEngine
    rollout_engine: RolloutEngine
    critic: zero.TrainEngine | None
    reference: object
    reward: Scorer | None
    reward_function: sums.WeightedSum | None
    environment: environments.Environment | None
    judge: Scorer | None
    ema: EMA | None
    nucleus: Nucleus | None
    ptx: ptx.Examples | None
    frozen_offload: FrozenOffload | None

    def trained(self) -> dict[str, zero.TrainEngine]:
        """The engines whose weights PPO changes, by name."""
        engines = {"actor": self.actor, "critic": self.critic}
        return {name: engine for name, engine in engines.items() if engine is not None}

    def frozen(self) -> dict[str, object]:
        """The modules whose weights must stay as they are, by name."""
        scorers = {"reward model": self.reward, "judge": self.judge}
        models = {"reference": self.reference}
        models |= {name: one.model for name, one in scorers.items() if one is not None}
        return {name: getattr(model, "module", model) for name, model in models.items()}


def readers(config) -> dict[str, Reader]:
    """How each reward model of the run reads a conversation, by the flag that names it."""
    read_at = {"reward_model": config.reward_read_at, "judge_model": "auto"}
    return {
        flag: Reader.load(getattr(config, flag), config.trust_remote_code, where, config.date)
        for flag, where in read_at.items()
        if getattr(config, flag)
    }


def build(config, tokenizer, dtype: str, device, of_scorers=None) -> Models:
    """of_scorers: what `readers` gave, where that was asked before."""
    vllm_server.check_places(config.pick(vllm_server.Settings), config.rollout_ahead, device)
    asked = config.reward_function, config.reward_weights, config.reward_function_timeout
    server = remote.Server(config.reward_url, asked[-1]) if config.reward_url else None
    reward_function = sums.load(*asked, server) if config.reward_sources() else None
    # Data first: a bad row is found before the models take their minutes to load.
    examples = ptx.load(config, tokenizer) if config.ptx_coef else None
    check_same_language(tokenizer, config)
    of_scorers = readers(config) if of_scorers is None else of_scorers
    by_text = [r for r in of_scorers.values() if reads_text(r, tokenizer)]
    environment = environments.load(config, tokenizer, by_text)
    settings, loading = config.pick(Loading), dict(dtype=dtype, tokenizer=tokenizer)
    name, stage = config.model_name_or_path, config.zero_stage
    training = dict(dtype=dtype, total_steps=config.optimizer_steps())
    lora = config.pick(Lora)
    # With adapters the actor's base is frozen, and others stand on the same weights.
    bases = {} if lora.lora_rank else None
    loading |= {"shared": bases}
    model = language_model.load(settings, name, zero_stage=stage, lora=lora, **loading)
    freezing.apply(model, config.pick(Freezing))
    actor = zero.TrainEngine(model, config.pick(zero.Training), zero_stage=stage, **training)
    reader = of_scorers.get("reward_model")
    # To a reward model with another tokenizer the policy's ids mean other text.
    same = reader is not None and not differences(tokenizer, reader.tokenizer)
    start = config.critic_model or (config.reward_model if same else "") or name
    critic = _critic(config, start, bases, loading, training) if config.has_critic() else None
    stage = config.stage_of_reference()
    frozen = dict(dtype=dtype, zero_stage=stage, device=device, offload=config.offload)
    reference = zero.frozen(
        language_model.load(settings, config.reference_model or name, zero_stage=stage, **loading),
        **frozen,
    )

    reward, judge = (
        _scorer(config, flag, of_scorers.get(flag), tokenizer, bases, frozen)
        for flag in ("reward_model", "judge_model")
    )
    frozen_offload = None
    if config.offload_frozen and device.type == "cuda":
        frozen_models = [reference, *(m.model for m in (reward, judge) if m is not None)]
        apart = [m for m in frozen_models if not shared_base.shares(m, actor.module)]
        frozen_offload = FrozenOffload(apart, device)
    ema = EMA(actor.module, config.ema_decay) if config.ema_decay > 0 else None
    nucleus = None
    if config.algorithm == "nlpo":
        said = config.mask_top_p, config.temperature, config.decode
        nucleus = Nucleus(actor.module, *said)
    return Models(
        tokenizer=tokenizer,
        actor=actor,
        rollout_engine=_rollout_engine(config, tokenizer, actor, critic),
        critic=critic,
        reference=reference,
        reward=reward,
        reward_function=reward_function,
        environment=environment,
        judge=judge,
        ema=ema,
        nucleus=nucleus,
        ptx=examples,
        frozen_offload=frozen_offload,
    )


def _critic(config, start: str, bases, loading: dict, training: dict) -> zero.TrainEngine:
    """start: the model that it begins as. bases: see build."""
    stage = config.stage_of_critic()
    given = loading | dict(zero_stage=stage, head="zero", lora=config.pick(Lora))
    given["shared"] = config.on_actors_base("critic", start, bases)
    model = scalar_model.load(config.pick(Loading), start, **given)
    how = config.pick(zero.Training, learning_rate=config.rate_of_critic())
    return zero.TrainEngine(model, how, zero_stage=stage, **training)


def _scorer(
    config, flag: str, reader: Reader | None, tokenizer, bases, frozen: dict
) -> Scorer | None:
    """The model that `flag` names, ready to be asked; frozen: for zero.frozen."""
    path = getattr(config, flag)
    if not path:
        return None
    model = scalar_model.load(
        config.pick(Loading),
        path,
        dtype=frozen["dtype"],
        zero_stage=frozen["zero_stage"],
        tokenizer=reader.tokenizer,
        shared=config.on_actors_base(flag.removesuffix("_model"), path, bases),
    )
    model = zero.frozen(model, **frozen)
    return Scorer(model, reader, reads_text(reader, tokenizer), frozen["device"])


def _rollout_engine(config, tokenizer, actor, critic) -> RolloutEngine:
    """Built last: how weights are gathered depends on the memory that all models leave."""
    setup = Setup(
        actor=actor,
        tokenizer=tokenizer,
        others=() if critic is None else (critic,),
        gather="layer" if config.rollout_engine == "off" else config.rollout_gather,
        decode=config.decode,
        tokens_at_once=config.generation_tokens,
        rows_at_once=config.decoded_at_once(process_group.world_size()),
        longest=config.max_prompt_length + config.max_response_length,
        keep_memory=not config.release_decode_memory,
        vllm=config.pick(vllm_server.Settings),
    )
    engine = engines.build(config.rollout_engine, setup)
    if config.logprobs_from == "decode" and not engine.returns_entropies:
        raise SystemExit(
            f"logprobs_from=decode: the {engine.name} engine does not return log-probabilities and "
            "entropies as the trainer's; set --logprobs_from auto or --rollout_engine native"
        )
    if config.importance_cap and not engine.returns_logprobs:
        raise SystemExit(
            f"importance_cap={config.importance_cap}: the {engine.name} engine returns no "
            "log-probabilities to compare with; leave it out or set --rollout_engine native"
        )
    return engine


def outputs(models: Models, settings: str) -> dict[str, ModelFolder]:
    """The folders that are written at the end. settings: their config.yaml."""
    actor, tokenizer = models.actor.module, models.tokenizer
    folders = {"actor": ModelFolder(actor, tokenizer, settings)}
    if models.critic is not None:
        folders["critic"] = ModelFolder(models.critic.module.classifier, tokenizer, settings)
    if models.ema is not None:
        folders["actor_ema"] = ModelFolder(actor, tokenizer, settings, models.ema)
    return folders


def check_same_language(tokenizer, config) -> None:
    """Refuse a reference or critic for which the actor's ids mean other text. For a reward model
    they may: answers go to it as text."""
    problems = []
    for flag in ("critic_model", "reference_model"):
        path = getattr(config, flag)
        if not path:
            continue
        other = chat_template.load_tokenizer(path, config.trust_remote_code, config.date)
        found = differences(tokenizer, other)
        if not found:
            continue
        problems.append(
            f"{flag}={path!r} and model_name_or_path={config.model_name_or_path!r} differ in "
            f"{', '.join(found)}: the same ids would mean different text; give one that shares the "
            f"SFT model's tokenizer as --{flag}"
        )
    if problems:
        raise SystemExit("\n".join(problems))
