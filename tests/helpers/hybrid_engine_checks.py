"""What must hold of rollouts on every rank, run by test_hybrid_engine.py.

arguments: base model folder, then the checks' names
"""

import sys
from types import SimpleNamespace

import torch
import transformers

from benchmarks import zero_gathers
from step3_ppo.config import PPOConfig
from tests.helpers.families import FAMILIES
from utils.data import chat_template
from utils.distributed import host_memory, process_group, zero
from utils.generation import engine as rollout_engines
from utils.generation import hybrid_engine, injected_kernels
from utils.generation import sampling as generation
from utils.generation.hybrid_engine import HybridEngine
from utils.models import language_model

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
    sampling = rollout_engines.Sampling(NEW, stop_id=STOP, pad_id=PAD)
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
            engine = zero_gathers.engine_of(model_of(family, **more), stage)
            native = rollout_engines.NativeRollout(HybridEngine(engine))
            with native.hybrid.generating():
                batch = native.generate(rollout_engines.Request(ids, mask), sampling)
            assert torch.equal(batch.response_ids, expected), f"{family}, stage {stage}"
            assert torch.equal(batch.attention_mask[:, -NEW:].bool(), kept)
            assert torch.equal(batch.attention_mask[:, :-NEW].bool(), mask)
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
    engine = zero_gathers.engine_of(big_llama())
    ids, limit = torch.randint(3, 2048, (1, 5), generator=torch.Generator().manual_seed(1)), 4
    mask = torch.ones_like(ids, dtype=torch.bool)
    counts, answers = {}, {}
    for gather, times in (("rollout", 100), ("layer", 20)):
        hybrid, seen = HybridEngine(engine, gather), []
        for _ in range(times):
            responses, whole, inside = zero_gathers.rollout(hybrid, ids, mask, limit)
            length = int((responses != PAD).sum())
            assert length == (1 if process_group.rank() == 0 else limit), (gather, responses)
            seen.append((sum(whole.values()), sum(inside.values())))
        counts[gather], answers[gather] = seen, process_group.gather_objects(responses)[-1]
    assert torch.equal(*answers.values())
    assert counts["rollout"] == [(1, 0)] * 100, set(counts["rollout"])
    # Every token gathers layers and, but for the last, asks whether all ranks have stopped.
    assert min(inside for _, inside in counts["layer"]) >= 2 * limit - 1, set(counts["layer"])
    # Weights of more than one bucket: a collective for each.
    real, hybrid_engine.BUCKET_BYTES = hybrid_engine.BUCKET_BYTES, 2**19
    buckets = hybrid_engine._buckets(list(engine.module.parameters()))
    assert len(buckets) > 2 and sum(map(len, buckets)) == len(list(engine.module.parameters()))
    _, whole, inside = zero_gathers.rollout(HybridEngine(engine), ids, mask, limit)
    assert (sum(whole.values()), inside) == (len(buckets), {})
    hybrid_engine.BUCKET_BYTES = real
    print("held: uneven rollouts, one set of gathers each")


def modes(folder):
    """Training mode, checkpointing and memory come back after a rollout, also one that fails."""
    for stage, gather in ((0, "rollout"), (3, "rollout"), (3, "layer")):
        engine = zero_gathers.engine_of(big_llama(), stage)
        module = engine.module
        module.gradient_checkpointing_enable({"use_reentrant": False})
        hybrid = HybridEngine(engine, gather)
        ids = torch.ones(1, 4, dtype=torch.int64)

        def assert_as_before(module=module, hybrid=hybrid):
            assert module.training and module.model.gradient_checkpointing
            assert all(m.training for m in module.modules()) and hybrid.generator is None
            plain = hybrid._plain
            assert plain is None or not any(p.numel() for p in plain.parameters())

        drawn = torch.get_rng_state()
        for fails in (False, True):
            try:
                with hybrid.generating() as model:
                    assert not any(m.training for m in model.modules())
                    assert not any(getattr(m, "gradient_checkpointing", 0) for m in model.modules())
                    assert model(input_ids=ids, use_cache=True).past_key_values is not None
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert fails
            assert_as_before()
        # A resumed run builds the plain twin later than the uninterrupted one did.
        assert torch.equal(torch.get_rng_state(), drawn)
        del engine
    print("held: modes")


def choice_of_gather(folder):
    """By the memory that AdamW's moments leave free, and the numbers are said."""
    engine, critic = zero_gathers.engine_of(big_llama()), zero_gathers.engine_of(big_llama(), 0)
    hybrid, free = HybridEngine(engine), host_memory.free_bytes
    weights = 4 * sum(p.ds_numel for p in engine.module.parameters())
    cache = 2 * 1 * 64 * 4 * 3 * 40  # keys and values, layers, hidden, bytes, rows, tokens
    needed = (weights + cache) / 0.9

    def chosen(spare, *trained) -> bool:
        host_memory.free_bytes = lambda: round(needed) + spare
        said = hybrid.choose_gather("auto", rows=3, length=40, trained=trained)
        assert (hybrid.all_finished is bool) is hybrid._copies, said
        assert ("do not fit" in said) is not hybrid._copies and "GiB" in said, said
        return hybrid._copies

    for trained, moments in (((), 2 * weights), ((critic,), 4 * weights)):
        assert chosen(moments + 10, *trained) and not chosen(moments - 10, *trained)
    for one in (engine, critic):
        one.backward(one(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum(), normaliser=1)
        one.step()
    # They are there now, and what is free is without them.
    assert chosen(10, critic) and not chosen(-10, critic)
    host_memory.free_bytes = free
    for asked in ("rollout", "layer"):
        assert "as asked" in hybrid.choose_gather(asked, 3, 40)
        assert hybrid._copies is (asked == "rollout")
    real = hybrid_engine._free_bytes
    found = set(process_group.gather_objects(real(torch.device("cpu"), 2**10)))
    assert len(found) == 1 and found.pop() > 2**20
    print("held: choice of gather")


def config_of(folder, **settings):
    given = dict(output_dir="-", model_name_or_path=folder, reward_model="-", prompt_data=["-"])
    given |= dict(max_prompt_length=20, max_response_length=12, dtype="fp32")
    return PPOConfig(**(given | settings))


def built(folder, patches=(), **settings):
    """(engine, rollout engine, times the model was loaded) of one --hybrid_engine."""
    config, loads = config_of(folder, **settings), []
    tokenizer = chat_template.load_tokenizer(folder)
    stage = config.zero_stage

    def load():
        loads.append(1)
        return language_model.load(
            config, folder, dtype="fp32", zero_stage=stage, tokenizer=tokenizer
        )

    def train(model, tokens):
        return zero.TrainEngine(
            model,
            config,
            dtype="fp32",
            zero_stage=stage,
            learning_rate=1e-3,
            total_steps=9,
            injected_tokens=tokens,
        )

    kept = [(holder, name, getattr(holder, name)) for holder, name, _ in patches]
    for holder, name, fake in patches:
        setattr(holder, name, fake)
    try:
        actor, engine = rollout_engines.build(config, load, train, tokenizer, "fp32")
    finally:
        for holder, name, real in kept:
            setattr(holder, name, real)
    said = rollout_engines.settle(engine, config, rows=4)
    return SimpleNamespace(actor=actor, engine=engine, said=said, loads=len(loads))


def answers(one, noise=None):
    tokenizer = chat_template.load_tokenizer(one.actor.module.config._name_or_path)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 300, (4, 6), generator=generator)
    mask = torch.arange(6)[None] >= torch.tensor([0, 3, 1, 5])[:, None]
    sampling = rollout_engines.Sampling(
        10, stop_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id
    )
    request = rollout_engines.Request(ids.where(mask, tokenizer.pad_token_id), mask, noise)
    with one.engine.hybrid.generating():
        return one.engine.generate(request, sampling).response_ids


def choice_of_engine(folder):
    """Who samples, by the flag and by what passes; a failure leaves nothing half-applied."""
    no_problems = (injected_kernels, "problems", lambda *_: [])
    fails = (rollout_engines, "_differs", lambda *_: "planted")
    slow = (rollout_engines, "_speed", lambda one, _: {"native": 1.0, "deepspeed": 2.0}[one.name])
    for stage in (0, 3):
        native = built(folder, zero_stage=stage, hybrid_engine="native")
        assert native.engine.name == "native" and native.loads == 1
        expected = answers(native)
        assert (expected != expected[0]).any(), "the prompt must matter"

        automatic = built(folder, zero_stage=stage)
        assert automatic.engine.name == "native" and automatic.loads == 1
        assert "not implemented on cpu" in automatic.said, automatic.said

        off = built(folder, zero_stage=stage, hybrid_engine="off")
        with off.engine.hybrid.generating() as module:
            assert module is off.actor.module

        theirs = built(folder, zero_stage=stage, hybrid_engine="deepspeed")
        assert theirs.engine.name == "deepspeed" and theirs.loads == 1, theirs.said
        assert "without its inference layers" in theirs.said, theirs.said
        for one in (automatic, off, theirs):
            assert torch.equal(answers(one), expected), one.said
        noise = generation.uniform_noise(8, 10, seed=1, step=2).chunk(2)
        first, again, other = (answers(theirs, noise[i]) for i in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)

        failed = built(folder, [fails], zero_stage=stage, hybrid_engine="deepspeed")
        assert failed.engine.name == "native" and "planted" in failed.said and failed.loads == 1
        assert torch.equal(answers(failed), expected)

        # DeepSpeed's layers believed possible: its initialize fails, and the actor is built anew.
        forced = built(folder, [no_problems], zero_stage=stage)
        assert forced.engine.name == "native" and forced.loads == 2
        assert "initialize failed (ValueError" in forced.said, forced.said
        assert type(forced.actor.engine).__name__ == "DeepSpeedEngine"
        assert torch.equal(answers(forced), expected)
        print(f"choice held: stage {stage}")
    family_without_layers(folder, no_problems, fails, slow)


def family_without_layers(folder, no_problems, fails, slow):
    """DeepSpeed's hybrid engine itself, which initializes here for families it has no layer for."""
    real = language_model.load

    def load(config, path, **kwargs):
        model = real(config, path, **kwargs)
        settings = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
        settings["architectures"] = ["Qwen2ForCausalLM"]
        torch.manual_seed(0)
        other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)).float()
        other.config._name_or_path = folder
        return other

    language_model.load = load
    expected = answers(built(folder, hybrid_engine="native"))
    faster = built(folder, [no_problems, slow])
    assert type(faster.actor.engine).__name__ == "DeepSpeedHybridEngine"
    assert faster.engine.name == "deepspeed" and "native 1, deepspeed 2" in faster.said
    assert torch.equal(answers(faster), expected)
    timed = built(folder, [no_problems])
    assert "tokens a second on a probe" in timed.said, timed.said
    damaged = built(folder, [no_problems, fails])
    assert damaged.engine.name == "native" and damaged.loads == 2 and "planted" in damaged.said
    assert type(damaged.actor.engine).__name__ == "DeepSpeedEngine"
    language_model.load = real
    print("held: DeepSpeedHybridEngine")


def parity_sees_faults(folder):
    """The check itself: another answer, another distribution, settings that change draws."""
    one = built(folder, hybrid_engine="deepspeed")
    tokenizer = chat_template.load_tokenizer(folder)
    assert rollout_engines._differs(one.engine, tokenizer, "fp32") == ""
    real = one.engine.generate

    def other_token(request, sampling):
        batch = real(request, sampling)
        batch.input_ids[0, -sampling.max_new_tokens] += 1
        return batch

    one.engine.generate = other_token
    assert "nats below" in rollout_engines._differs(one.engine, tokenizer, "fp32")
    one.engine.generate = real
    module = one.actor.module
    hook = module.register_forward_hook(
        lambda m, _, output: None if m.training else setattr(output, "logits", output.logits * 2)
    )
    assert " off (allowed" in rollout_engines._differs(one.engine, tokenizer, "fp32")
    hook.remove()
    module.generation_config.repetition_penalty = 1.2
    assert "repetition_penalty" in rollout_engines._fault_of_settings(module)
    print("held: parity")


def main() -> None:
    for name in sys.argv[2:]:
        globals()[name](sys.argv[1])


if __name__ == "__main__":
    main()
