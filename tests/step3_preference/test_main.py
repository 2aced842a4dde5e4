"""Step 3 by preferences as a whole: one trajectory, resumed runs, the reference's numbers."""

import json
import math

import pytest
from safetensors.torch import load_file

from step3_preference.gold import KEPT
from step3_preference.losses import LOSSES
from tests.helpers.jobs import preference
from tests.helpers.running import CLOSE, assert_same_path, built_once, metrics_of, run_ranks
from tests.helpers.same_end import assert_same_end
from tests.utils.checkpoints.test_checkpoints import stopped
from utils.data import toy_tasks

# Every way to divide the same rows: (ranks, flags).
WAYS = {
    "plain": (1, ["--micro_batch_size", 8]),
    "packed": (1, ["--packing", "on", "--micro_batch_tokens", 300]),
    "two ranks": (2, ["--micro_batch_size", 1]),
    "two ranks in shards": (2, ["--zero_stage", 3, "--packing", "on"]),
}
FLAGS = {"dpo": [], "kto": ["--loss", "kto", "--beta", 0.5, "--ema_decay", 0.5]}
NUMBERS = ["loss", "grad_norm", "margin", "chosen_logprob", "rejected_logprob"]


def write_comparisons(tiny, path) -> None:
    """48 rows of two to four answers to prompts of step 1's data: the right one, others'."""
    rows = [json.loads(line) for line in (tiny / "data/sft.jsonl").read_text().splitlines()]
    texts, made = [row["output"] for row in rows], []
    for n in range(48):
        others = [texts[(n + 7 * k) % len(texts)] for k in range(1, 2 + n % 3)]
        answers = dict.fromkeys([texts[n], *others, f"{texts[n]}, well"])
        scores = [float(len(answers) - i) for i in range(len(answers))]
        made.append({"prompt": rows[n]["instruction"], "responses": [*answers], "scores": scores})
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


@pytest.fixture(scope="module")
def walked(tiny, chain, tmp_path_factory):
    """{loss: {way: its folder}}."""

    def build(root):
        write_comparisons(tiny, root / "comparisons.jsonl")
        data = ["--preference_data", root / "comparisons.jsonl"]
        prompts = (tiny / "data/prompts.jsonl").read_text().splitlines(keepends=True)
        (root / "prompts.jsonl").write_text("".join(prompts[:50]))
        own = ["--prompt_data", root / "prompts.jsonl", "--judge_model", chain / "reward"]
        own += ["--max_prompt_length", 48, "--max_response_length", 8]
        for ranks in (1, 2):
            jobs = [
                preference(
                    tiny,
                    chain / "sft",
                    root / f"{loss} {name}",
                    *data,
                    *flags,
                    *more,
                    *(own if loss == "dpo" else ()),
                )
                for name, (n, flags) in WAYS.items()
                for loss, more in FLAGS.items()
                if n == ranks
            ]
            if ranks == 2:
                again = data + WAYS["two ranks in shards"][1] + FLAGS["kto"]
                begun = preference(tiny, chain / "sft", root / "asked", *again)
                resumed = preference(
                    tiny, chain / "sft", root / "asked", *again, "--resume", "auto"
                )
                jobs += [stopped(begun, 3, "SIGTERM"), resumed]
            (root / f"said {ranks}").write_text(run_ranks(jobs, ranks))

    root = built_once(tmp_path_factory, "preferences", build)
    return {loss: {name: root / f"{loss} {name}" for name in WAYS} for loss in FLAGS}


@pytest.mark.parametrize("loss", FLAGS)
def test_one_path_on_any_ranks_stages_and_micro_batches(walked, loss):
    names = [*NUMBERS, *(["kl"] if loss == "kto" else [])]
    assert_same_path(walked[loss], names)
    start = {"dpo": math.log(2), "kto": 0.5}[loss]  # of margins that are 0
    for name, folder in walked[loss].items():
        assert metrics_of(folder, "loss")[0] == pytest.approx(start, abs=1e-5), name
        assert abs(metrics_of(folder, "margin")[0]) < 1e-4, name
    results = [json.loads((f / "result.json").read_text()) for f in walked[loss].values()]
    for name in ("loss_after", "accuracy_after", "margin_after"):
        assert [r[name] for r in results] == pytest.approx([results[0][name]] * 4, **CLOSE), name


def test_own_answers_are_judged_alike_on_any_ranks(walked, tiny, chain):
    from tests.evaluation.test_prompt_eval import BIAS, scored_by_transformers

    folders = walked["dpo"].values()
    results = [json.loads((f / "result.json").read_text()) for f in folders]
    for name in ("kl_k1", "judge", "judge_std", "verifier", "eos_share", "response_length"):
        after = [r[f"{name}_after"] for r in results]
        assert after == pytest.approx([after[0]] * len(WAYS), **CLOSE), name
    assert results[0]["kl_k1_before"] == pytest.approx(0, abs=1e-4), "reference and policy are one"
    lines = (tiny / "data/prompts.jsonl").read_text().splitlines()
    data = {row["prompt"]: row for row in map(json.loads, lines)}
    kept = json.loads((walked["dpo"]["plain"] / "samples.json").read_text())
    assert kept["before"] != kept["after"] and 4 < len(kept["after"]) < KEPT
    for moment, rows in kept.items():
        talks = [[*r["prompt"], {"role": "assistant", "content": r["answer"]}] for r in rows]
        finished = [r["finished"] for r in rows]
        bias = json.loads((chain / "reward/config.json").read_text())["reward_bias"]
        judged = [
            scored_by_transformers(str(chain / "reward"), talk, done) + BIAS - bias
            for talk, done in zip(talks, finished, strict=True)
        ]
        assert [r["score"] for r in rows] == pytest.approx(judged, abs=2e-4)
        right = [toy_tasks.verify(data[r["prompt"][0]["content"]], r["answer"]) for r in rows]
        mean = {"judge": judged, "verifier": right, "eos_share": finished}
        mean["response_length"] = [r["tokens"] for r in rows]
        for name, values in mean.items():
            found = results[0][f"{name}_{moment}"]
            assert found == pytest.approx(sum(values) / len(values), abs=1e-4), name
    steps = [m["step"] for m in map(json.loads, open(walked["dpo"]["plain"] / "metrics.jsonl"))]
    assert steps == list(range(len(steps))), "before training too"


def test_the_average_follows_the_weights(walked):
    for folder in walked["kto"].values():
        own, average = (load_file(folder / f"{x}model.safetensors") for x in ("", "ema/"))
        gaps = [float((own[name] - average[name]).abs().max()) for name in own]
        assert 1e-5 < max(gaps) < 5e-3


def test_a_resumed_run_ends_as_one_that_was_not_stopped(walked):
    """To the last bit, its average too; the reference's numbers are read, not computed again."""
    whole = walked["kto"]["two ranks in shards"]
    assert_same_end(whole.parent / "asked", whole)
    said = (whole.parent / "said 2").read_text()
    assert said.count(f"read from {whole.parent / 'asked'}") == 1


@pytest.mark.slow
def test_every_loss_takes_one_path_and_resumes(tiny, chain, tmp_path):
    """One rank, and two in shards, stopped after the third step: the path and the last bit."""
    write_comparisons(tiny, tmp_path / "comparisons.jsonl")
    data = ["--preference_data", tmp_path / "comparisons.jsonl"]
    shards, losses = WAYS["two ranks in shards"][1], [x for x in LOSSES if x != "kto"]
    (tmp_path / "prompts.jsonl").write_text(
        "".join((tiny / "data/prompts.jsonl").read_text().splitlines(keepends=True)[:50])
    )
    more = {"ilql": ["--target_rate", 0.5, "--ema_decay", 0.5, "--awac_beta", 1.0, "--beta", 8]}
    more["ilql"] += ["--prompt_data", tmp_path / "prompts.jsonl", "--max_prompt_length", 48]
    more["ilql"] += ["--max_response_length", 8]  # sampled from the policy that the values make
    own = {"ilql": ["ilql_q", "ilql_v", "ilql_q_loss", "ilql_v_loss", "ilql_cql_loss"]}

    def job(loss, name, *flags):
        flags = [*data, "--loss", loss, *more.get(loss, ()), *flags]
        return preference(tiny, chain / "sft", tmp_path / f"{loss} {name}", *flags)

    run_ranks([job(loss, "plain") for loss in losses], 1)
    jobs = []
    for loss in losses:
        jobs += [job(loss, "shards", *shards)]
        jobs += [stopped(job(loss, "asked", *shards), 3, "SIGTERM")]
        jobs += [job(loss, "asked", *shards, "--resume", "auto")]
    run_ranks(jobs, 2)
    for loss in losses:
        folders = {name: tmp_path / f"{loss} {name}" for name in ("plain", "shards")}
        assert_same_path(folders, [*NUMBERS, *own.get(loss, ())])
        assert min(metrics_of(folders["plain"], "grad_norm")) > 0, loss
        assert_same_end(tmp_path / f"{loss} asked", folders["shards"])
    plain, shards = (json.loads((f / "result.json").read_text()) for f in folders.values())
    assert loss == "ilql" and plain["kl_k1_before"] == pytest.approx(0, abs=1e-4)
    assert plain["kl_k1_after"] == pytest.approx(shards["kl_k1_after"], **CLOSE) != 0
