"""Files of answers: ours, read again, and those of AlpacaEval and MT-Bench, by their schemas."""

import json

import jsonschema
import pytest

from evaluation import answers, pages, prompt_eval, questions
from evaluation.answers import Answer
from evaluation.questions import Question
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import configured, problems_of
from utils.data.rows import DataError

policy = evaluated_models.policy
# What alpaca_eval.utils and FastChat's llm_judge/common.py (load_model_answers) take.
ALPACA_EVAL = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "instruction": {"type": "string"},
            "output": {"type": "string"},
            "generator": {"type": "string", "pattern": "^[^/]+$"},
            "dataset": {"type": "string"},
        },
        "required": ["instruction", "output", "generator"],
        "additionalProperties": False,
    },
}
MT_BENCH = {
    "type": "object",
    "properties": {
        "question_id": {"type": "integer"},
        "answer_id": {"type": "string", "minLength": 22},
        "model_id": {"type": "string", "pattern": "^[^/]+$"},
        "choices": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "index": {"const": 0},
                    "turns": {"type": "array", "items": {"type": "string"}, "minItems": 2},
                },
                "required": ["index", "turns"],
            },
        },
        "tstamp": {"type": "number"},
    },
    "required": ["question_id", "answer_id", "model_id", "choices", "tstamp"],
}


def talked(name: str, question: Question, *texts: str) -> list[Answer]:
    talk, found = question.context, []
    for turn, (asked, said) in enumerate(zip(question.turns, texts, strict=True), 1):
        talk += ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
        found.append(Answer(name, turn, talk, 4, turn == 1))
    return found


def two_turns():
    rows = [{"question_id": 81 + n, "category": "math"} for n in range(2)]
    asked = [Question((), (f"q{n}", "and?"), f"mt:{n}", row) for n, row in enumerate(rows, 1)]
    names = ("out/step1_sft", "./out/step3_ppo/actor/")
    return asked, {
        name: [talked(name, q, f"{name} says \u2028{n}", "so") for n, q in enumerate(asked)]
        for name in names
    }


def test_what_is_written_is_read_again(tmp_path):
    asked, results = two_turns()
    path = tmp_path / "answers.jsonl"
    answers.write(path, asked, results, scored=False)
    assert answers.read(str(path), asked, list(results)) == results
    one = "out/step1_sft"
    assert answers.read(str(path), asked[1:], [one]) == {one: results[one][1:]}
    with pytest.raises(DataError, match="holds no answer of(?s:.*)base, turn 1 of mt:1"):
        answers.read(str(path), asked, [one, "base"])


def test_a_file_of_other_content_is_refused_with_its_lines_and_keys(tmp_path):
    asked, results = two_turns()
    path = tmp_path / "answers.jsonl"
    answers.write(path, asked, results, scored=True)
    line = path.read_bytes().split(b"\n")[0]
    record = json.loads(line)
    del record["where"], record["tokens"]
    lines = [line, b"", b"{", b"[1]", json.dumps(record | {"turn": "1"}).encode(), b"\xff"]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        answers.read(str(path), asked, list(results))
    problems = [str(p).removeprefix(f"{path}:") for p in caught.value.problems]
    assert [p[0] for p in problems] == list("3456")
    assert "without where, turn is '1', not int, tokens" in problems[2]
    path.write_bytes(line)  # without the line end
    with pytest.raises(DataError, match="holds no answer of"):
        answers.read(str(path), asked, list(results))


def test_mt_bench_reads_both_turns(tmp_path):
    asked, results = two_turns()
    answers.for_mt_bench(tmp_path, asked, results)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["out__step1_sft.jsonl", "out__step3_ppo__actor.jsonl"]
    for path, groups in zip(sorted(tmp_path.iterdir()), results.values(), strict=True):
        lines = [json.loads(line) for line in path.read_text().split("\n") if line]
        for line, group in zip(lines, groups, strict=True):
            jsonschema.validate(line, MT_BENCH)
            assert line["choices"][0]["turns"] == [a.answer for a in group]
            assert line["model_id"] == path.stem
        assert [line["question_id"] for line in lines] == [81, 82]
        assert lines[0]["answer_id"] != lines[1]["answer_id"]


def test_alpaca_eval_reads_single_questions(tmp_path):
    asked = [Question((), ("Hi!",), "f:1", {"dataset": "koala"}), Question((), ("Why?",), "f:2")]
    results = {"m": [talked("m", q, f"<b>{q.where}\u202e") for q in asked]}
    answers.for_alpaca_eval(tmp_path, asked, results)
    rows = json.loads((tmp_path / "m.json").read_text())
    jsonschema.validate(rows, ALPACA_EVAL)
    assert [(r["instruction"], r["output"]) for r in rows] == [
        ("Hi!", "<b>f:1\u202e"),
        ("Why?", "<b>f:2\u202e"),
    ]
    assert [r["dataset"] for r in rows] == ["koala", ""] and rows[0]["generator"] == "m"


def test_prompts_that_other_programs_cannot_read_are_refused():
    asked, _ = two_turns()
    plain = [Question((), ("Hi!",), "f:1")]
    answers.refuse_unreadable(asked, ["mt_bench_output"])
    answers.refuse_unreadable(plain, ["alpaca_eval_output"])
    answers.refuse_unreadable([*asked, *plain], [])
    with pytest.raises(DataError, match="f:1: it has no question_id, which --mt_bench_output"):
        answers.refuse_unreadable([*asked, *plain], ["mt_bench_output"])
    with pytest.raises(DataError, match="mt:1: it asks single questions, which --alpaca_eval"):
        answers.refuse_unreadable([*asked, *plain], ["alpaca_eval_output"])


def test_two_checkpoints_of_one_file_name_are_refused():
    flags = ["--checkpoints", "a/b", "a__b", "--mt_bench_output", "out"]
    assert "have one file name for two" in problems_of(*flags)
    assert "one file name" not in problems_of(*flags[:3], "--batch_size", "0")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_prompts_of_alpaca_evals_set_in_every_format(tmp_path, kind):
    import pandas

    path = tmp_path / f"set.{kind}"
    rows = [
        {"dataset": "koala", "instruction": f"Q{n}, <b>?", "output": "o", "generator": "davinci"}
        for n in range(3)
    ]
    table = pandas.DataFrame(rows)
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        (table.to_csv if kind == "csv" else table.to_parquet)(path, index=False)
    asked = questions.load([str(path)])
    assert [q.turns for q in asked] == [(r["instruction"],) for r in rows]
    assert [q.row["dataset"] for q in asked] == ["koala"] * 3
    answers.refuse_unreadable(asked, ["alpaca_eval_output"])


def test_the_program_writes_all_of_them(policy, tmp_path, monkeypatch, capsys):
    """MT-Bench's turns with history, sampled; each answer as it comes."""
    file = tmp_path / "question.jsonl"
    rows = [{"question_id": n, "category": "c", "turns": [f"Q{n}", "More?"]} for n in (81, 82)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--checkpoints", policy, "--prompts", str(file), "--max_new_tokens", "6"]
    flags += ["--strategy", "sample", "--temperature", "1.3", "--dtype", "fp32"]
    flags += ["--mt_bench_output", str(tmp_path / "mt"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["prompt_eval.py", *flags])
    prompt_eval.main()
    (path,) = (tmp_path / "mt").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        jsonschema.validate(line, MT_BENCH)
    asked = questions.load([str(file)])
    read = answers.read(str(tmp_path / "out/answers.jsonl"), asked, [policy])[policy]
    assert [x["choices"][0]["turns"] for x in lines] == [[a.answer for a in g] for g in read]
    assert f"── {file}:1: More?" in capsys.readouterr().out
    # The noise is each prompt's own: the same answers one by one as together.
    config = configured(
        checkpoints=[policy],
        prompts=[str(file)],
        strategy="sample",
        temperature=1.3,
        batch_size=1,
        max_new_tokens=6,
        show_answers=False,
    )
    alone, _ = prompt_eval.answer_all(config, policy, asked)
    assert alone == read


def test_a_page_shows_text_as_text():
    nasty = '<script>alert(1)</script>&lt;\u202eabc\x1b[2J"</pre>'
    question = Question(({"role": "system", "content": nasty},), (nasty,), f"f<{nasty}")
    results = {nasty: [talked(nasty, question, nasty)]}
    page = pages.as_html([question], results, {nasty: nasty}, nasty)
    assert "<script" not in page and "\u202e" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;lt;\\u202eabc\\x1b[2J") == 8
    assert page.count("<pre>") == page.count("</pre>") == 5
    assert "http" not in page and "src=" not in page
