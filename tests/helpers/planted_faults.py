"""Runs a step's main with one fault (or several) planted in the code that it runs.

arguments: FAULTS OUTCOME.json PROGRAM …the step's own arguments

FAULTS are names of functions in this file, misaligned_faults.py or not_finite_faults.py, joined by
+, or "none". The outcome tells how the run ended: {"stopped": message or null, "kind": class of
what ended it, "said": all its lines}.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from step3_ppo import algorithm, rollout  # noqa: E402
from step3_ppo import main as step3  # noqa: E402
from tests.helpers import (
    misaligned_faults,  # noqa: E402
    not_finite_faults,  # noqa: E402
)
from tests.helpers.planting import around, once_built  # noqa: E402
from tests.helpers.vllm_stand_in import StandIn  # noqa: E402
from utils.data import chat_template  # noqa: E402
from utils.distributed import process_group, zero  # noqa: E402
from utils.generation import engine, vllm_server, vllm_weights, weights
from utils.generation import sampling as generation  # noqa: E402
from utils.generation.engines import native
from utils.models import adapters, ema, language_model, shared_base
from utils.models.loading import Loading  # noqa: E402
from utils.report import Report  # noqa: E402

# The generator under ZeRO-3.


def stale_generator(patch):
    """The weights are copied before the first rollout and never again."""
    first = {}

    def copy(real, module, plain):
        if not first:
            real(module, plain)
            first.update({name: p.detach().clone() for name, p in plain.named_parameters()})
        for name, p in plain.named_parameters():
            p.data = first[name].clone()

    around(patch, weights, "_copy_weights", copy)


def generator_of_the_models_as_loaded(patch):
    """Copied once before the checkpoint is read, and never again."""
    stale_generator(patch)

    def generate(built):
        with engine.synced(built.rollout_engine, built.actor):
            pass

    once_built(patch, generate)


def damaged_generator(patch, ranks=(0, 1)):
    """Two rows of a matrix change places, as where heads are laid out in another order."""

    def copy(real, module, plain):
        real(module, plain)
        if process_group.rank() in ranks:
            weight = plain.model.layers[1].self_attn.v_proj.weight
            weight.data = weight.data.roll(8, 0)

    around(patch, weights, "_copy_weights", copy)


def generator_damaged_on_one_rank(patch):
    damaged_generator(patch, ranks=(1,))


def stale_server(patch):
    """A stand-in for vLLM samples; it is always sent the weights of the first time."""
    first, started = [], []

    class Server:
        def __init__(self, launch, name, token, log):
            self.launch, self.name, self.token = launch, name, token

        def start(self):
            config = AutoConfig.from_pretrained(self.launch.model)
            model = AutoModelForCausalLM.from_config(config).eval()
            started.append(StandIn(model, self.name, self.token))
            self.url = started[-1].url

        def stop(self):
            started[-1].stop()

    def buckets(real, module):
        if not first:
            first.extend({name: x.clone() for name, x in b.items()} for b in real(module))
        yield from first

    patch.setattr(vllm_server, "Server", Server)
    patch.setattr(vllm_server, "python_of", lambda given: given)
    around(patch, vllm_weights, "buckets_as_saved", buckets)


# Positions and masks.


def positions_shifted_while_decoding(patch):
    from transformers import LlamaForCausalLM

    def forward(real, self, *args, **kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return real(self, *args, **kwargs)

    around(patch, LlamaForCausalLM, "forward", forward)


def positions_count_pads(patch):
    def positions(real, mask):
        return torch.arange(mask.shape[1]).expand(mask.shape)

    around(patch, language_model, "positions", positions)


def mask_ignored(patch):
    from transformers import LlamaModel

    def forward(real, self, *args, **kwargs):
        # Not None, in whose place transformers infers one from the position ids.
        mask = torch.ones_like(kwargs["attention_mask"])
        return real(self, *args, **kwargs | {"attention_mask": mask})

    around(patch, LlamaModel, "forward", forward)


# Modes.


def _with_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1


def dropout_in_the_actor(patch):
    once_built(patch, lambda built: _with_dropout(built.actor.module))


def dropout_in_the_critic(patch):
    once_built(patch, lambda built: _with_dropout(built.critic.module))


# The stop token.


def pad_is_eos(patch):
    def set_up(real, tokenizer):
        real(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token

    around(patch, chat_template, "set_up", set_up)


def eos_outside_the_mask(patch):
    def mask(real, ids, stop_id):
        return (ids == stop_id).long().cumsum(-1) == 0

    around(patch, generation, "mask_through_stop", mask)


def score_one_token_early(patch):
    def rewards(real, scores, logprobs, refs, mask, *args):
        late, kl = real(scores, logprobs, refs, mask, *args)
        none, _ = real(torch.zeros_like(scores), logprobs, refs, mask, *args)
        return none + (late - none).roll(-1, 1), kl

    around(patch, algorithm, "token_rewards", rewards)


def cut_answers_called_finished(patch):
    def collect(real, *args, **kwargs):
        found, seconds = real(*args, **kwargs)
        found.finished |= True
        return found, seconds

    around(patch, rollout, "collect", collect)


def other_stop_id_in_the_config(patch):
    def change(built):
        built.actor.module.config.eos_token_id += 1

    once_built(patch, change)


# Template and data.


def prompts_without_assistant_header(patch):
    def encode(real, tokenizer, messages):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
        return tokenizer(text, add_special_tokens=False).input_ids

    around(patch, chat_template, "encode_prompt", encode)


# Averages.


def average_thrown_away(patch):
    """The average lives in a sharded model and is written while gathered, for reading only."""
    import deepspeed

    def start(real, self, module, decay):
        real(self, module, decay)
        config = step3.command_line.parse(step3.PPOConfig, step3.__doc__)
        how, path = config.pick(Loading), config.model_name_or_path
        model = language_model.load(how, path, dtype="fp32", zero_stage=3)
        self.twin = zero.frozen(
            model, dtype="fp32", zero_stage=3, device=torch.device("cpu")
        ).module
        self.shadow = {name: p.ds_tensor for name, p in self.twin.named_parameters()}

    @torch.no_grad()
    def update(real, self):
        twins = dict(self.twin.named_parameters())
        for name, p in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p, twins[name]]):
                twins[name].data.lerp_(p.data, 1 - self.decay)

    around(patch, ema.EMA, "__init__", start)
    around(patch, ema.EMA, "update", update)


def average_never_updated(patch):
    around(patch, ema.EMA, "update", lambda real, self: None)


def average_is_a_copy(patch):
    def update(real, self):
        self.decay = 0.0
        real(self)

    around(patch, ema.EMA, "update", update)


# Sampling.


def greedy_sampling(patch):
    around(patch, generation, "sample_tokens", lambda real, logits, noise, t: logits.argmax(-1))


def top_k_sampling(patch):
    def sample(real, logits, noise, temperature):
        least = logits.topk(20).values[:, -1:]
        return real(logits.where(logits >= least, float("-inf")), noise, temperature)

    around(patch, generation, "sample_tokens", sample)


def sampling_colder_than_scored(patch):
    around(
        patch,
        generation,
        "sample_tokens",
        lambda real, logits, noise, t: real(logits, noise, 0.6 * t),
    )


def sampling_hotter_than_scored(patch):
    around(
        patch,
        generation,
        "sample_tokens",
        lambda real, logits, noise, t: real(logits, noise, 1.6 * t),
    )


def ranks_share_noise(patch):
    def noise(real, rows, *args):
        return real(rows, *args)[torch.arange(rows) // process_group.world_size()]

    around(patch, rollout, "uniform_noise", noise)


def rows_share_noise(patch):
    around(
        patch,
        rollout,
        "uniform_noise",
        lambda real, rows, *a: real(rows, *a)[:1].expand(rows, -1),
    )


# Models that are not what they are taken for.


def reference_differs(patch):
    def change(built):
        for p in built.reference.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))

    once_built(patch, change)


def values_read_one_token_late(patch):
    def values(real, ids, mask, actions, critic):
        return (critic(ids, mask)[:, -actions.shape[1] :],)

    around(patch, rollout, "values_of", values)


def layer_frozen_in_the_actor(patch):
    def train(real, engine, model, *args, **kwargs):
        if hasattr(model, "lm_head"):
            model.model.layers[0].requires_grad_(False)
        real(engine, model, *args, **kwargs)

    around(patch, zero.TrainEngine, "__init__", train)


def reference_takes_gradients(patch):
    once_built(patch, lambda built: built.reference.requires_grad_(True))


def _share(mine, theirs):
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        p.data = q.data


def reference_shares_the_actors_weights(patch):
    once_built(patch, lambda built: _share(built.reference, built.actor.module))


def adapter_left_on_in_the_reference(patch):
    """Its layers hold the actor's adapters, numbers and all, and want no gradient."""

    def change(built):
        built.reference = shared_base.twin(built.actor.module)
        for module in built.reference.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(p.data, requires_grad=False)

    once_built(patch, change)


def merge_not_undone(patch):
    """The adapters are put into the base for each rollout, and stay there."""

    def sync(real, self, actor):
        for layer in adapters.layers_of(actor.module).values():
            layer.get_base_layer().weight.data.add_(layer.get_delta_weight("default").detach())
        real(self, actor)

    around(patch, native.NativeEngine, "sync", sync)


def reward_model_shares_the_critics_weights(patch):
    once_built(patch, lambda built: _share(built.reward.model, built.critic.module))


def reward_head_negated(patch, factor=-1):
    once_built(patch, lambda built: built.reward.model.classifier.score.weight.data.mul_(factor))


def reward_head_zero(patch):
    reward_head_negated(patch, factor=0)


def main() -> None:
    faults, outcome, program, *argv = sys.argv[1:]
    step = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    said, ended = [], None
    with pytest.MonkeyPatch.context() as patch:
        around(patch, Report, "say", lambda real, self, text: said.append(text))
        for name in faults.split("+"):
            if name != "none":
                (globals() | vars(misaligned_faults) | vars(not_finite_faults))[name](patch)
        patch.setattr(sys, "argv", [program, *argv])
        try:
            step.main()
        except SystemExit as error:
            ended = error
    if process_group.is_main():
        text = None if ended is None else str(ended)
        found = {"stopped": text, "kind": type(ended).__name__, "said": "\n".join(said)}
        Path(outcome).write_text(json.dumps(found, indent=1))
    process_group.shut_down()


if __name__ == "__main__":
    main()
