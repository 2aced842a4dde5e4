"""What must hold of rollouts on every rank, run by test_weights.py and the engines' tests.

arguments: base model folder, then the checks' names
"""

import sys

import torch
import transformers

from benchmarks import zero_gathers
from step3_ppo import models
from step3_ppo.config import PPOConfig
from tests.helpers.families import FAMILIES
from utils.data import chat_template
from utils.distributed import host_memory, process_group, zero
from utils.generation import engines, weights
from utils.generation import sampling as generation
from utils.generation.engine import Request, Sampling, Setup, synced
from utils.generation.engines.native import NativeEngine
from utils.models import adapters, language_model, loading
from utils.models.adapters import Lora

PAD, STOP, VOCAB, NEW, LENGTHS = 0, 2, 96, 8, [7, 1, 4, 6]


def left_padded(seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, n in enumerate(LENGTHS):
        ids[row, -n:] = torch.randint(3, VOCAB, (n,), generator=generator)
    return ids, ids != PAD


def model_of(family, **more):
    """A random model whose greedy answers depend on the prompt."""
    sizes = FAMILIES[family] | more
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=STOP, **sizes
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) * (0.05 if family == "Gemma" else 0.4))
    return model


def families(folder):
    """Through the native engine each family answers as transformers' generate does alone."""
    ids, mask = left_padded()
    sampling = Sampling(NEW, STOP, PAD)
    for family, more in (("Llama", {"num_key_value_heads": 4}), *((f, {}) for f in FAMILIES)):
        model = model_of(family, **more)
        theirs = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=PAD,
        )[:, ids.shape[1] :]
        expected = torch.nn.functional.pad(theirs, (0, NEW - theirs.shape[1]), value=PAD)
        kept = generation.mask_through_stop(expected, STOP)
        assert len({tuple(row) for row in expected.tolist()}) > 1, f"{family}: all answers alike"
        for stage in (0, 3):
            actor = zero_gathers.engine_of(model_of(family, **more), stage)
            with synced(NativeEngine(), actor) as native:
                samples = native.generate(Request(ids, mask), sampling)
            width = int(kept.sum(1).max())
            assert torch.equal(samples.response_ids, expected[:, :width]), f"{family}, {stage}"
            assert torch.equal(samples.response_mask, kept[:, :width])
            stopped = [STOP in row for row in expected.tolist()]
            assert [r == "stop" for r in samples.finish_reasons] == stopped
            assert samples.logprobs is None and samples.entropies is None
            print(f"family held: {family}, stage {stage}")


def big_llama():
    """Weights large enough that ZeRO-3 shards them (and not so large as to be slow)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=1600,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    return transformers.AutoModelForCausalLM.from_config(config).float()


def uneven_rollouts(folder):
    """Ranks that stop at token 1 and at the limit; and how many collectives that takes."""
    actor = zero_gathers.engine_of(big_llama())
    ids, limit = torch.randint(3, 2048, (1, 5), generator=torch.Generator().manual_seed(1)), 4
    mask = torch.ones_like(ids, dtype=torch.bool)
    counts, answers = {}, {}
    for gather, times in (("rollout", 100), ("layer", 20)):
        engine, seen = NativeEngine(gather), []
        for _ in range(times):
            responses, whole, inside = zero_gathers.rollout(engine, actor, ids, mask, limit)
            length = int((responses != PAD).sum())
            assert length == (1 if process_group.rank() == 0 else limit), (gather, responses)
            seen.append((sum(whole.values()), sum(inside.values())))
        counts[gather], answers[gather] = seen, process_group.gather_objects(responses)[-1]
    assert torch.equal(*answers.values())
    assert counts["rollout"] == [(1, 0)] * 100, set(counts["rollout"])
    # Every token gathers layers and, but for the last, asks whether all ranks have stopped.
    assert min(inside for _, inside in counts["layer"]) >= 2 * limit - 1, set(counts["layer"])
    # Weights of more than one bucket: a collective for each.
    real, weights.BUCKET_BYTES = weights.BUCKET_BYTES, 2**19
    buckets = weights._buckets(list(actor.module.parameters()))
    assert len(buckets) > 2 and sum(map(len, buckets)) == len(list(actor.module.parameters()))
    _, whole, inside = zero_gathers.rollout(NativeEngine(), actor, ids, mask, limit)
    assert (sum(whole.values()), inside) == (len(buckets), {})
    weights.BUCKET_BYTES = real
    print("held: uneven rollouts, one set of gathers each")


def modes(folder):
    """Training mode, checkpointing and memory come back after a rollout, also one that fails."""
    for stage, gather in ((0, "rollout"), (3, "rollout"), (3, "layer")):
        actor = zero_gathers.engine_of(big_llama(), stage)
        module, engine = actor.module, NativeEngine(gather)
        loading.checkpoint(module, 1)
        flags = [getattr(m, "gradient_checkpointing", None) for m in module.modules()]
        assert flags.count(True) == 2  # the model's own and one layer's
        ids = torch.ones(1, 4, dtype=torch.int64)

        drawn = torch.get_rng_state()
        for fails in (False, True):
            try:
                with synced(engine, actor):
                    model = engine.generator
                    assert not any(m.training for m in model.modules())
                    assert not any(getattr(m, "gradient_checkpointing", 0) for m in model.modules())
                    assert model(input_ids=ids, use_cache=True).past_key_values is not None
                    engine.sync(actor)  # again, as one that asks for the weights of now
                    assert engine.generator is model and not model.training
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert fails
            assert all(m.training for m in module.modules()) and engine.generator is None
            now = [getattr(m, "gradient_checkpointing", None) for m in module.modules()]
            assert now == flags
            assert engine._twin is None or not any(p.numel() for p in engine._twin.parameters())
        # A resumed run builds the plain twin later than the uninterrupted one did.
        assert torch.equal(torch.get_rng_state(), drawn)
        del actor
    print("held: modes")


def choice_of_gather(folder):
    """By the memory that AdamW's moments leave free, and the numbers are said."""
    engine, critic = zero_gathers.engine_of(big_llama()), zero_gathers.engine_of(big_llama(), 0)
    free = host_memory.free_bytes
    needed = 4 * sum(p.ds_numel for p in engine.module.parameters())
    cache = 2 * 1 * 64 * 4 * 3 * 40  # keys and values, layers, hidden, bytes, rows, tokens
    moments, needed = 2 * needed, (needed + cache) / 0.9

    def chosen(spare, *others) -> bool:
        host_memory.free_bytes = lambda: round(needed) + spare
        gather, said = weights.choose_gather("auto", engine, rows=3, length=40, others=others)
        assert ("do not fit" in said) is (gather == "layer") and "GiB" in said, said
        return gather == "rollout"

    for others, more in (((), moments), ((critic,), 2 * moments)):
        assert chosen(more + 10, *others) and not chosen(more - 10, *others)
    for one in (engine, critic):
        one.backward(one(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum(), normaliser=1)
        one.step()
    # They are there now, and what is free is without them.
    assert chosen(10, critic) and not chosen(-10, critic)
    host_memory.free_bytes = free
    for asked in ("rollout", "layer"):
        gather, said = weights.choose_gather(asked, engine, 3, 40)
        assert gather == asked and "as asked" in said
    free = set(process_group.gather_objects(weights._free_bytes(torch.device("cpu"), 2**10)))
    assert len(free) == 1 and free.pop() > 2**20
    print("held: choice of gather")


def built(folder, **settings):
    """(actor, rollout engine) of a run with these settings."""
    given = dict(output_dir="-", model_name_or_path=folder, reward_model="-", prompt_data=["-"])
    given |= dict(max_prompt_length=20, max_response_length=12, dtype="fp32")
    config = PPOConfig(**(given | settings))
    tokenizer = chat_template.load_tokenizer(folder)
    how = dict(dtype="fp32", zero_stage=config.zero_stage)
    model = language_model.load(config, folder, tokenizer=tokenizer, **how)
    actor = zero.TrainEngine(
        model, config.pick(zero.Training, learning_rate=1e-3), total_steps=9, **how
    )
    return actor, models._rollout_engine(config, tokenizer, actor, None)


def answers(actor, engine, noise=None):
    tokenizer = chat_template.load_tokenizer(actor.module.config._name_or_path)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 300, (4, 6), generator=generator)
    mask = torch.arange(6)[None] >= torch.tensor([0, 3, 1, 5])[:, None]
    sampling = Sampling(10, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with synced(engine, actor):
        request = Request(ids.where(mask, tokenizer.pad_token_id), mask, noise)
        return engine.generate(request, sampling).response_ids


def a_budget_of_tokens_counts_for_deepspeed(folder, actor, expected):
    tokenizer, shapes = chat_template.load_tokenizer(folder), []
    engine = engines.build("deepspeed", Setup(actor, tokenizer, tokens_at_once=2 * (6 + 10)))
    hook = actor.module.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    assert torch.equal(answers(actor, engine), expected)
    hook.remove()
    assert [s for s in shapes if s[1] > 1] == [(2, 6), (2, 5)], shapes


def choice_of_engine(folder):
    """Who samples, by the flag: all of them give the same greedy answers."""
    for stage in (0, 3):
        native = built(folder, zero_stage=stage, rollout_engine="native")
        expected = answers(*native)
        assert native[1].name == "native"
        assert (expected != expected[0]).any(), "the prompt must matter"

        automatic = built(folder, zero_stage=stage)
        assert type(automatic[1]) is type(native[1])

        off = built(folder, zero_stage=stage, rollout_engine="off")
        with synced(off[1], off[0]):
            assert off[1].generator is off[0].module and off[1].in_step is (stage == 3)

        theirs = built(folder, zero_stage=stage, rollout_engine="deepspeed")
        assert theirs[1].name == "deepspeed" and "decoded to the limit" in theirs[1].description
        for one in (automatic, off, theirs):
            assert torch.equal(answers(*one), expected), one[1].description
        noise = generation.uniform_noise(8, 10, seed=1, step=2).chunk(2)
        first, again, other = (answers(*theirs, noise[i]) for i in (0, 0, 1))
        assert torch.equal(first, again) and (
            first.shape != other.shape or not torch.equal(first, other)
        )
        if stage == 0:
            a_budget_of_tokens_counts_for_deepspeed(folder, theirs[0], expected)
        print(f"choice held: stage {stage}")

    setup = Setup(theirs[0], chat_template.load_tokenizer(folder))
    theirs[0].module.generation_config.repetition_penalty = 1.2
    try:
        engines.build("deepspeed", setup)
    except SystemExit as refusal:
        assert "repetition_penalty" in str(refusal) and "--rollout_engine native" in str(refusal)
        print("held: settings that change draws")


def merged_adapters(folder):
    """Under ZeRO-3 what goes to vLLM is what it is without."""
    for variant in adapters.VARIANTS:
        found = []
        for stage in (0, 3):
            model = big_llama()
            adapters.put_on(model, "", Lora(60, lora_variant=variant))
            generator = torch.Generator().manual_seed(4)
            for _, p in adapters.own_of(model):
                p.data += 0.1 * torch.randn(p.shape, generator=generator)
            module = zero_gathers.engine_of(model, stage).module
            sharded = {p.ds_tensor.numel() < p.ds_numel for p in module.parameters() if stage}
            buckets = list(weights.merged_buckets(module))
            found.append({name: w.clone() for bucket in buckets for name, w in bucket.items()})
        assert sharded == {True} and found[0].keys() == found[1].keys()
        assert all(torch.equal(w, found[1][name]) for name, w in found[0].items())
    print("held: merged adapters")


def main() -> None:
    for name in sys.argv[2:]:
        globals()[name](sys.argv[1])


if __name__ == "__main__":
    main()
