"""Where and how reward models from elsewhere are read: behind the stop token, without a pad, by
text in a template of their own; conversations that their templates refuse, which must be found
before anything is trained."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from step2_reward import collect
from step2_reward.config import RewardConfig
from step3_ppo import models as step3_models
from step3_ppo.rollout import Prompt
from tests.helpers import families
from tests.helpers.jobs import ppo
from tests.helpers.loading import load_step
from tests.helpers.running import metrics_of, run_ranks
from tests.helpers.small_models import Engine, config_of
from utils.data import batches, chat_template
from utils.data import prompts as prompt_data
from utils.data.rows import BadRows, DataError
from utils.data.tables import encode_all
from utils.models import scalar_model, scorer
from utils.models.loading import Loading
from utils.models.scorer import Reader, Scorer, differences, reads_text

CPU = torch.device("cpu")
USER = {"role": "user", "content": "What is 3 + 4?"}
SYSTEM = {"role": "system", "content": "Be brief."}
# As Gemma's refuses system turns and a Mistral's an answer without text.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' or not m.content %}"
    "{{ raise_exception('no such turn') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_NEWLINE = chat_template.CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")


def without_pad():
    """A tokenizer of bytes that has no pad, nor a token that could be one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template.CHATML
    return tokenizer


def write_scorer(tokenizer, folder, template=None, bias=False, settings=None):
    """A reward model whose embedding is as long as the vocabulary of `tokenizer`, a tokenizer or
    the folder of one: (its folder, its tokenizer)."""
    if not hasattr(tokenizer, "vocab_size"):
        tokenizer = chat_template.load_tokenizer(str(tokenizer / "base_model"))
    tokenizer.chat_template = template or tokenizer.chat_template
    folder = families.write(folder, "Llama", tokenizer) / "reward"
    saved = json.loads((folder / "config.json").read_text())
    if not bias:
        del saved["reward_bias"]
    (folder / "config.json").write_text(json.dumps(saved | (settings or {})))
    return str(folder), tokenizer


def plain_score(folder, ids: list[int]) -> float:
    """At the last id, whatever is taken for a pad."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden)[0, -1].item()


def alone_scores(model, rows, micro_batch_size: int) -> list[float]:
    """Of rows that are each a group of their own."""
    groups = scorer.score_groups(model, [[row] for row in rows], CPU, micro_batch_size)
    return [score for (score,) in groups]


def load(folder, reader):
    config = RewardConfig()
    return scalar_model.load(
        config, folder, dtype="fp32", zero_stage=0, tokenizer=reader.tokenizer
    ).eval()


def test_a_public_model_is_read_behind_the_newline_that_follows_the_answer(tiny, tmp_path):
    folder, tokenizer = write_scorer(tiny, tmp_path)
    reader = Reader.load(folder)
    policy = chat_template.load_tokenizer(str(tiny / "base_model"))
    assert reader.read_at == "end" and reads_text(reader, policy)
    reward = Scorer(load(folder, reader), reader, True, CPU)
    talk = (SYSTEM, USER, {"role": "assistant", "content": "7"}, {"role": "user", "content": "+ 1"})
    prompts = [Prompt((USER,), "", {}, [5]), Prompt(talk, "", {}, [5]), Prompt(talk, "", {}, [5])]
    answers, finished = ["7", "It is 8", "It is"], torch.tensor([True, True, False])
    ids = torch.ones(3, 9, dtype=torch.long)
    found = reward.scores(prompts, answers, finished, ids, ids.bool(), 2).tolist()
    for prompt, answer, done, score in zip(prompts, answers, finished, found, strict=True):
        turns = [*prompt.messages, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text.endswith(f"{answer}<|im_end|>\n")
        text = text if done else text.removesuffix("<|im_end|>\n")
        whole = tokenizer(text, add_special_tokens=False).input_ids
        assert reader.encode(prompt.messages, answer, bool(done)) == whole
        assert score == pytest.approx(plain_score(folder, whole), abs=1e-5)
        if done:
            assert abs(score - plain_score(folder, whole[:-1])) > 1e-3  # the newline counts


@pytest.mark.parametrize(
    ("bias", "settings", "asked", "expected"),
    [
        (False, {}, "auto", "end"),
        (True, {}, "auto", "stop"),
        (True, {"reward_read_at": "end"}, "auto", "end"),
        (False, {"reward_read_at": "stop"}, "auto", "stop"),
        (False, {}, "stop", "stop"),
        (True, {}, "end", "end"),
    ],
)
def test_who_says_where_a_model_is_read(tiny, tmp_path, bias, settings, asked, expected):
    folder, tokenizer = write_scorer(tiny, tmp_path, bias=bias, settings=settings)
    reader = Reader.load(folder, read_at=asked)
    last = reader.encode((USER,), "7", True)[-1]
    stop = last == tokenizer.eos_token_id
    assert reader.read_at == expected and stop == (expected == "stop")
    assert reads_text(reader, tokenizer) == (expected == "end")


@pytest.mark.parametrize("read_at", ["stop", "end"])
def test_a_prompt_longer_than_the_model_keeps_its_frame(tiny, tmp_path, read_at):
    """The left end of the question goes, not the system turn."""
    folder, tokenizer = write_scorer(tiny, tmp_path)
    reader = Reader.load(folder, read_at=read_at)
    question = {"role": "user", "content": "What is " + "9 + " * 40 + "9?"}
    whole = reader.encode((SYSTEM, question), "7", True)
    short = dataclasses.replace(reader, max_length=len(whole) - 31)
    ids = short.encode((SYSTEM, question), "7", True)
    text = tokenizer.decode(ids)
    head = tokenizer.apply_chat_template([SYSTEM], tokenize=False)
    assert len(whole) - 40 < len(ids) <= len(whole) - 31
    assert text.startswith(head + "<|im_start|>user\n") and "What is" not in text
    assert ids[-8:] == whole[-8:]


def test_a_place_that_is_none_is_refused(tiny, tmp_path):
    folder, _ = write_scorer(tiny, tmp_path, settings={"reward_read_at": "middle"})
    with pytest.raises(SystemExit, match="reward_read_at='middle'.*set --reward_read_at"):
        Reader.load(folder)


@pytest.mark.parametrize("pad", ["none", "the stop token"])
def test_a_model_without_a_pad_of_its_own_scores_batches(tmp_path, pad):
    """Its embedding has no row to spare. Its ids are the policy's, whose pad lies beyond it."""
    tokenizer = without_pad()
    tokenizer.pad_token = None if pad == "none" else "<|im_end|>"
    folder, _ = write_scorer(tokenizer, tmp_path, bias=True)
    reader = Reader.load(folder)
    rows = AutoModelForSequenceClassification.from_pretrained(folder).config.vocab_size
    model = load(folder, reader)
    assert model.classifier.get_input_embeddings().num_embeddings == rows  # it has not grown
    encoded = [reader.encode((USER,), "7" * n, True) for n in (1, 9, 4)]
    alone = [plain_score(folder, ids) - model.bias for ids in encoded]
    together = alone_scores(model, encoded, 3)
    assert together == pytest.approx(alone, abs=1e-5) and len({round(x, 4) for x in alone}) == 3
    ids = batches.pad(encoded, rows)  # a pad that the model has no embedding for
    mask = batches.pad([[True] * len(e) for e in encoded], False)
    by_ids = Scorer(model, reader, False, CPU)
    scores = by_ids.scores(None, None, torch.ones(3).bool(), ids, mask, 3)
    assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    # A critic that starts from it is trained and saved, with a row for the pad of the policy.
    critic = scalar_model.load(
        RewardConfig(), folder, dtype="fp32", zero_stage=0, tokenizer=reader.tokenizer, head="zero"
    )
    assert critic.classifier.get_input_embeddings().num_embeddings > rows


def test_a_token_other_than_the_pad_that_a_model_lacks_is_still_refused(tiny, tmp_path):
    folder, tokenizer = write_scorer(tiny, tmp_path)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit, match="of which 1 would stay random"):
        load(folder, Reader.load(folder))


def test_a_public_model_whose_pad_is_its_stop_token_is_read_as_transformers_trained_it(tmp_path):
    """Which passes over the stop token at the end of a text, as over any pad."""
    tokenizer = without_pad()
    tokenizer.pad_token = "<|im_end|>"
    folder, tokenizer = write_scorer(tokenizer, tmp_path, template=WITHOUT_NEWLINE)
    turns = [USER, {"role": "assistant", "content": "It is 7"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("<|im_end|>")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        expected = plain(input_ids=ids).logits.item()
    reader = Reader.load(folder)
    encoded = [reader.encode((USER,), "It is 7", True)]
    found = alone_scores(load(folder, reader), encoded, 1)
    assert found == pytest.approx([expected], abs=1e-5)
    assert abs(expected - plain_score(folder, ids[0].tolist())) > 1e-3


@pytest.mark.parametrize("read_at", ["stop", "end"])
def test_no_answer_is_refused_for_its_text(tiny, tmp_path, read_at):
    folder, tokenizer = write_scorer(tiny, tmp_path, template=STRICT)
    reader = Reader.load(folder, read_at=read_at)
    before = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    after = "<|im_end|>\n" if read_at == "end" else "<|im_end|>"
    twice = "<|im_<|im_end|>end|>"  # what is left once the stop token is taken out is another
    for text in ("", twice):
        for finished in (True, False):
            expected = tokenizer(before + after * finished, add_special_tokens=False).input_ids
            assert reader.encode((USER,), text, finished) == expected


def write_prompts(path):
    rows = [[USER], [SYSTEM, USER], [{"role": "user", "content": "Spell lamp."}]]
    rows.append([{"role": "system", "content": "Be long."}, USER])
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return str(path)


def test_prompts_that_a_scorers_template_refuses_are_bad_rows_before_models_are_loaded(
    tiny, tmp_path
):
    """For the reward model and for the judge, among training prompts and held-out ones."""
    folder, _ = write_scorer(tiny, tmp_path, template=STRICT)
    policy = chat_template.load_tokenizer(str(tiny / "base_model"))
    path = write_prompts(tmp_path / "p.jsonl")
    for scorers in ({"reward_model": folder}, {"reward_model": "", "judge_model": folder}):
        for flags in ({"eval_fraction": 0.4, "seed": seed} for seed in range(2)):
            config = config_of(
                prompt_data=[path],
                output_dir=str(tmp_path),
                max_bad_rows=0.0,
                **flags,
                **scorers,
            )
            with pytest.raises(
                DataError, match=r"p\.jsonl:[24]: as .*reward reads it.*no such turn"
            ):
                load_step(config, policy)


def test_collecting_refuses_them_before_it_samples(tiny, tmp_path):
    folder, _ = write_scorer(tiny, tmp_path, template=STRICT)
    policy = chat_template.load_tokenizer(str(tiny / "base_model"))
    config = collect.CollectConfig(
        prompt_data=[write_prompts(tmp_path / "p.jsonl")],
        labeller="reward_model",
        reward_model=folder,
        output_dir=str(tmp_path),
    )
    with pytest.raises(DataError, match=r"p\.jsonl:[24]: as .*reward reads it.*no such turn"):
        collect.load_prompts(config, policy, Reader.load(folder))


def test_the_prompts_that_it_takes_stay(tiny, tmp_path):
    reader = Reader.load(write_scorer(tiny, tmp_path, template=STRICT)[0])
    prompts = [
        Prompt((USER,), "a", {}),
        Prompt((SYSTEM, USER), "b", {}),
    ]
    bad = BadRows()
    policy = chat_template.load_tokenizer(str(tiny / "base_model"))
    for readers, kept in (((reader,), ["a"]), ((), ["a", "b"])):
        taken, _ = encode_all(prompts, prompt_data.Encode(policy, 99, "cut", readers), bad)
        assert [prompt.where for prompt in taken] == kept and len(bad) == 1


def test_a_critic_may_start_from_a_public_model_that_shares_the_tokenizer(
    tiny, tmp_path, monkeypatch
):
    """It is read as text, but the policy's ids mean the same to it."""
    folder, tokenizer = write_scorer(tiny, tmp_path)

    def train(model, *args, **kwargs):
        engine = Engine(model)
        engine.zero_stage = 0
        return engine

    monkeypatch.setattr(step3_models.zero, "TrainEngine", train)
    config = config_of(
        model_name_or_path=str(tiny / "base_model"), reward_model=folder, rollout_engine="off"
    )
    built = step3_models.build(config, tokenizer, "fp32", torch.device("cpu"))
    assert built.reward.by_text and built.reward.reader.read_at == "end"
    backbone = built.critic.module.classifier.base_model
    own = AutoModelForSequenceClassification.from_pretrained(folder).base_model
    weights = [next(m.layers.parameters()) for m in (backbone, own)]
    assert torch.equal(*weights)


# A reward model of another family, tokenizer and template than the policy's reads text.


def test_scores_are_those_of_the_text_in_its_own_template(tiny, other):
    tokenizer = chat_template.load_tokenizer(str(other))
    policy = chat_template.load_tokenizer(str(tiny / "base_model"))
    assert differences(policy, tokenizer) == ["vocabulary", "chat template"]
    model = scalar_model.load(RewardConfig(), str(other), dtype="fp32", zero_stage=0).eval()
    prompts = [
        Prompt(({"role": "user", "content": "What is 3 + 4?"},), "", {}, [5, 6]),
        Prompt(({"role": "user", "content": "从小到大排列：1 7 6"},), "", {}, [5, 6, 9]),
        Prompt(({"role": "user", "content": "Spell the word lamp."},), "", {}, [5]),
    ]
    answers, finished = ["7", "1 6 7", "l a<|im_end|> m"], torch.tensor([True, False, True])
    texts = [
        "user<|im_start|>What is 3 + 4?|assistant<|im_start|>7<|im_end|>",
        "user<|im_start|>从小到大排列：1 7 6|assistant<|im_start|>1 6 7",
        "user<|im_start|>Spell the word lamp.|assistant<|im_start|>l a m<|im_end|>",
    ]
    # What the policy's ids are must not matter.
    ids = torch.randint(3, 400, (3, 12))
    reader = Reader.load(str(other))
    assert (reader.max_length, reader.read_at) == (1024, "stop")  # it has a bias
    reward = Scorer(model, reader, True, torch.device("cpu"))
    found = reward.scores(prompts, answers, finished, ids, torch.ones_like(ids).bool(), 2)
    plain = AutoModelForSequenceClassification.from_pretrained(other).eval()
    expected = []
    for prompt, answer, done, text in zip(prompts, answers, finished, texts, strict=True):
        encoded = tokenizer(text, add_special_tokens=False).input_ids
        assert reader.encode(prompt.messages, answer, bool(done)) == encoded
        assert (encoded[-1] == tokenizer.eos_token_id) == done
        assert encoded.count(tokenizer.eos_token_id) == done
        with torch.no_grad():
            expected.append(plain(input_ids=torch.tensor([encoded])).logits[0, 0] - 0.25)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert len({round(x, 3) for x in found.tolist()}) == 3
    short = Reader(tokenizer, 5, "stop")
    kept = reader.encode(prompts[0].messages, "7", True)[-5:]
    assert short.encode(prompts[0].messages, "7", True) == kept


def test_ppo_runs_with_it_under_every_sharding(tiny, chain, other, tmp_path):
    """The critic then starts from the SFT model: the reward model cannot read the policy's ids."""
    flags = ("--max_steps", 2, "--prompts_per_rollout", 8)
    jobs = [
        ppo(tiny, chain / "sft", other, tmp_path / str(stage), "--zero_stage", stage, *flags)
        for stage in (0, 3)
    ]
    said = run_ranks(jobs, 1)
    assert said.count("the reward model has another tokenizer or template") == 2
    assert "FAULT" not in said and "DOUBT" not in said
    scores = [metrics_of(tmp_path / str(stage), "score") for stage in (0, 3)]
    assert len(scores[0]) == 2 and scores[0][0] != 0 and scores[0] == pytest.approx(scores[1])
    for stage in (0, 3):
        config = json.loads((tmp_path / str(stage) / "critic/config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        critic = chat_template.load_tokenizer(str(tmp_path / str(stage) / "critic"))
        assert not differences(critic, chat_template.load_tokenizer(str(chain / "sft")))


@pytest.mark.parametrize("packed", ["auto", "off"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_groups_are_dealt_to_the_ranks_and_score_as_each_row_alone(
    tiny, monkeypatch, world, packed
):
    """Answers that share their prompt, and a rank without any group of its own."""
    how = Loading(packing=packed)
    model = scalar_model.load(how, str(tiny / "base_model"), dtype="fp32", head="normal").train()
    prompts = [[20, 21, 22], [30], [40, 41, 42, 43]]
    answers = [[[5], [6, 7], [8, 9, 10]], [[11, 12]], [[13], [14, 15, 16]]]
    groups = [
        [prompt + answer for answer in some] for prompt, some in zip(prompts, answers, strict=True)
    ]
    parts: list[dict] = []
    monkeypatch.setattr(scorer.process_group, "world_size", lambda: world)

    def gather_objects(part: dict) -> list[dict]:
        parts.append(part)
        return [dict.fromkeys(range(len(groups)), [])]  # the other ranks' parts do not matter here

    monkeypatch.setattr(scorer.process_group, "gather_objects", gather_objects)
    for rank in range(world):
        monkeypatch.setattr(scorer.process_group, "rank", lambda rank=rank: rank)
        scorer.score_groups(model, groups, CPU, 2)
    assert model.training and sum(map(len, parts)) == len(groups)
    scores = {i: group for part in parts for i, group in part.items()}
    model.eval()
    for i, group in enumerate(groups):
        for ids, score in zip(group, scores[i], strict=True):
            alone = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0, -1]
            assert score == pytest.approx(alone.item(), abs=1e-5)
