"""An answer that was cut at the length limit has no stop token for whoever scores it: in PPO, in
comparisons and what step 2 learns from them, in the side-by-side evaluation."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from evaluation import prompt_eval
from evaluation.prompt_eval import Answer, PromptEvalConfig
from step2_reward import collect, labellers
from step3_ppo.checks import data as check_data
from tests.helpers.small_models import config_of
from utils.data import batches, chat_template, comparisons
from utils.data import prompts as prompt_data
from utils.data.comparisons import Comparison, load_comparisons
from utils.data.rows import BadRows, DataError
from utils.data.tables import encode_all
from utils.generation import sampling as generation
from utils.models import language_model, scalar_model
from utils.models.scorer import Reader, Scorer

CPU = torch.device("cpu")
USER = {"role": "user", "content": "What is 3 + 4?"}
ANSWERS = [collect.Sampled("7", True), collect.Sampled("It is", False)]


@pytest.fixture(scope="module")
def scorer(chain):
    folder = str(chain / "reward")
    reader = Reader.load(folder)
    config = collect.CollectConfig()
    loaded = scalar_model.load(
        config, folder, dtype="fp32", zero_stage=0, tokenizer=reader.tokenizer
    )
    return SimpleNamespace(folder=folder, reader=reader, model=loaded.eval())


@pytest.fixture(scope="module")
def expected(scorer):
    """(ids, score) of each of ANSWERS, by hand and by plain transformers."""
    head = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    plain = AutoModelForSequenceClassification.from_pretrained(scorer.folder).eval()
    found = []
    for text in (f"{head}7<|im_end|>", f"{head}It is"):
        ids = scorer.reader.tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            raw = plain(input_ids=torch.tensor([ids])).logits.item()
        found.append((ids, raw - plain.config.reward_bias))
    return found


def test_ppo_scores_them_so_by_ids_and_by_text(scorer, expected):
    ids = batches.pad([ids for ids, _ in expected], 0)
    mask = batches.pad([[True] * len(ids) for ids, _ in expected], False)
    prompts = [SimpleNamespace(messages=(USER,))] * 2
    texts, finished, _ = zip(*ANSWERS, strict=True)
    for by_text in (False, True):
        reward = Scorer(scorer.model, scorer.reader, by_text, CPU)
        found = reward.scores(prompts, texts, torch.tensor(finished), ids, mask, 2)
        assert found.tolist() == pytest.approx([score for _, score in expected], abs=1e-5)


def test_so_does_a_labeller(scorer, expected):
    config = collect.CollectConfig()
    prompts = [prompt_data.Prompt((USER,), "a", {})]
    reward = Scorer(scorer.model, scorer.reader, True, CPU)
    found = labellers.by_reward_model(config, prompts, [ANSWERS], reward)
    assert found == [pytest.approx([score for _, score in expected], abs=1e-5)]


def test_so_does_the_evaluation(scorer, expected):
    answers = [
        Answer("m", 1, (USER, {"role": "assistant", "content": text}), 9, finished)
        for text, finished, _ in ANSWERS
    ]
    config = PromptEvalConfig(reward_model=scorer.folder, dtype="fp32")
    assert prompt_eval.score_all(config, answers) == []
    assert [a.score for a in answers] == pytest.approx([s for _, s in expected], abs=1e-5)


def test_so_does_the_self_check(scorer, expected, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    row = {"responses": [a.text for a in ANSWERS], "finished": [True, False], "scores": [1, 0]}
    rows = [row | {"prompt": prompt} for prompt in ([USER], "What is 3 + 5?")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(preference_data=[str(path)], reward_model=scorer.folder, eval_fraction=0.5)
    reward, seen = Scorer(scorer.model, scorer.reader, False, CPU), []

    def score_groups(model, groups, *args):
        seen.extend(ids for group in groups for ids in group)
        return real(model, groups, *args)

    real = check_data.scorer.score_groups
    monkeypatch.setattr(check_data.scorer, "score_groups", score_groups)
    models = SimpleNamespace(reward=reward, tokenizer=scorer.reader.tokenizer)
    check = SimpleNamespace(config=config, models=models, device=CPU)
    assert check_data._held_out_accuracy(check)["pairs"] == 1
    # The same ids, though which of the two prompts is held out the seed decides.
    tails = [ids[-2:] for ids, _ in expected]
    assert [ids[-2:] for ids in seen] == tails and len(seen) == 2


def test_step_2_learns_from_the_same_ids(scorer, expected):
    texts, finished, _ = zip(*ANSWERS, strict=True)
    bad, tokenizer = BadRows(), scorer.reader.tokenizer
    row = Comparison((USER,), texts, (1.0, 0.0), "a", finished)
    (ranked,), counts = encode_all([row], comparisons.Encode(tokenizer, 96, "cut"), bad)
    assert list(ranked.answers) == [ids for ids, _ in expected] and counts.kept == 2
    unmarked = Comparison((USER,), texts, (1.0, 0.0), "a")
    (ranked,), _ = encode_all([unmarked], comparisons.Encode(tokenizer, 96, "cut"), bad)
    assert ranked.answers[1] == [*expected[1][0], tokenizer.eos_token_id]
    # Cut again to fit: still none. One that was finished is ranked as a whole, and keeps its own.
    room = len(expected[0][0])
    longer = Comparison((USER,), ("7 " * 40, "8 " * 40), (1.0, 0.0), "a", finished)
    (ranked,), counts = encode_all([longer], comparisons.Encode(tokenizer, room, "cut"), bad)
    ends = [ids[-1] == tokenizer.eos_token_id for ids in ranked.answers]
    assert ends == [True, False] and counts.cut_answers == 2 and not len(bad)


def test_sampled_answers_say_whether_they_were_cut(chain, monkeypatch):
    folder = str(chain / "sft")
    tokenizer = chat_template.load_tokenizer(folder)
    config = collect.CollectConfig(
        max_response_length=12, answers_per_prompt=4, micro_batch_size=2, temperature=1.5
    )
    model = language_model.load(config, folder, dtype="fp32", zero_stage=0).eval()
    questions = ["What is 3 + 4?", "Spell the word lamp.", "Sort 3 1 2.", "What is 1 + 1?"]
    encoded = [
        chat_template.encode_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions
    ]
    drawn, real = {}, generation.generate

    def generate(model, ids, mask, **how):
        found = real(model, ids, mask, **how)
        for prompt, kept, row in zip(ids.tolist(), mask.tolist(), found.tolist(), strict=True):
            key = tuple(i for i, on in zip(prompt, kept, strict=True) if on)
            drawn.setdefault(key, []).append(row)
        return found

    monkeypatch.setattr(generation, "generate", generate)
    answers = collect.sample_answers(config, encoded, tokenizer, model, CPU)
    expected = [
        [(tokenizer.decode(r, skip_special_tokens=True), tokenizer.eos_token_id in r) for r in rows]
        for rows in (drawn[tuple(ids)] for ids in encoded)
    ]
    assert [[(a.text, a.finished) for a in group] for group in answers] == expected
    assert {a.finished for group in answers for a in group} == {True, False}
    stop = tokenizer.eos_token_id
    for a in (a for group in answers for a in group):
        assert tokenizer.decode(a.ids, skip_special_tokens=True) == a.text
        assert a.ids.count(stop) == a.finished == (a.ids[-1] == stop)


def test_comparisons_carry_the_mark_to_people_and_back(tmp_path):
    config = collect.CollectConfig(labeller="none", output_file=str(tmp_path / "c.jsonl"))
    prompts = [prompt_data.Prompt((USER,), "f:1", {})]
    collect.write(config, collect.rows_of(config, prompts, [ANSWERS]), None)
    (line,) = (tmp_path / "c.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["responses"], row["finished"]) == (["7", "It is"], [True, False])
    (tmp_path / "ranked.jsonl").write_text(json.dumps(row | {"ranks": [2, 1]}))
    config.labeller, config.rankings = "file", str(tmp_path / "ranked.jsonl")
    config.output_file = str(tmp_path / "people.jsonl")
    collect.import_rankings(config)
    (found,) = load_comparisons([config.output_file], bad=BadRows())
    assert found.responses == ("7", "It is") and found.finished == (True, False)
    assert found.scores[1] > found.scores[0]


@pytest.mark.parametrize("mark", [[True], [True, "no"], "yes", [1, 0], {}])
def test_a_mark_that_does_not_fit_is_a_bad_row(tmp_path, mark):
    path, bad = tmp_path / "c.jsonl", BadRows()
    data = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0], "finished": mark}
    path.write_text(json.dumps(data) + "\n")
    assert load_comparisons([str(path)], bad=bad) == []
    with pytest.raises(DataError, match="finished is .*not a list of 2 true or false"):
        bad.finish("comparisons")


def test_answers_without_a_mark_are_whole(tmp_path):
    path = tmp_path / "c.jsonl"
    data = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 0, 2]}
    path.write_text(json.dumps(data) + "\n" + json.dumps(data | {"finished": None}) + "\n")
    for found in load_comparisons([str(path)], bad=BadRows()):
        assert found.finished == (True, True, True)


def test_what_was_sampled_outlives_a_labeller_that_fails(tiny, chain, tmp_path, monkeypatch):
    output = tmp_path / "c.jsonl"
    flags = {
        "--policy": chain / "sft",
        "--prompt_data": tiny / "data/prompts.jsonl",
        "--labeller": "reward_model",
        "--reward_model": chain / "reward",
        "--output_file": output,
        "--max_response_length": 4,
        "--num_prompts": 3,
        "--dtype": "fp32",
    }
    monkeypatch.setattr("sys.argv", ["collect.py", *map(str, sum(flags.items(), ()))])
    monkeypatch.setattr(collect.process_group, "init", lambda timeout: CPU)
    monkeypatch.setattr(collect.process_group, "shut_down", lambda: None)

    def fails(*args):
        raise MemoryError("no room")

    monkeypatch.setitem(labellers.LABELLERS, "reward_model", fails)
    with pytest.raises(MemoryError):
        collect.main()
    kept = tmp_path / "c.sampled.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 3 and not output.exists()
    assert all(len(r["responses"]) == len(r["finished"]) == 4 for r in rows)
    monkeypatch.setitem(labellers.LABELLERS, "reward_model", labellers.by_reward_model)
    collect.main()
    labelled = [json.loads(line) for line in output.read_text().splitlines()]
    assert labelled and not kept.exists()
    for row in labelled:
        (same,) = [r for r in rows if r["prompt"] == row["prompt"]]
        assert set(row["responses"]) <= set(same["responses"])
