"""`python -m utils.data.inspect`: what it says of a data set is counted here by hand."""

import json
import re
import sys

import pytest

from utils.data import inspect
from utils.models import from_scratch

ROWS = [
    *({"instruction": f"Name {n} birds.", "input": "", "output": "wren " * n} for n in range(1, 9)),
    {"instruction": "Name 1 birds.", "input": "", "output": "a robin"},
    {"instruction": "Name 1 birds.", "input": "", "output": "wren "},
    {"instruction": "说出一种鸟。", "input": "", "output": "麻雀 \x1b[2J"},
    {"instruction": "とりは何ですか", "input": "", "output": ""},
    {"instruction": "鳥の名は？", "input": "", "output": "すずめ"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    texts = [f"{row['instruction']} {row['output']}" for row in ROWS] * 20
    from_scratch.train_tokenizer(texts, 400).save_pretrained(path)
    return path


def said(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, words)])
    inspect.main()
    return capsys.readouterr().out


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(out, name):
    """The numbers behind `name` in the table of lengths, the first that is printed."""
    return [int(n) for n in re.search(rf"^ +{name} +([\d ]+)$", out, re.M)[1].split()]


def test_a_set_of_demonstrations(tmp_path, capsys, monkeypatch):
    path = save(tmp_path / "a.jsonl", ROWS)
    out = said(capsys, monkeypatch, path, "--row", 9)
    assert "--sft_data: schema alpaca, by the columns 'instruction', 'input', 'output'" in out
    assert f"13 rows → 12 demonstrations; 1 bad\n    {path}:12: output is empty" in out
    assert "--prompt_data: schema alpaca" in out and "13 rows → 13 prompts; 0 bad" in out
    assert "not for --preference_data: " in out and "fit no schema known here" in out
    prompts = sorted(len(row["instruction"]) for row in ROWS if row["output"])
    answers = sorted(len(row["output"]) for row in ROWS if row["output"])
    # Nearest rank of 12: the 6th, the 11th, the last.
    assert table(out, "prompt") == [prompts[5], prompts[10], prompts[11], prompts[11]]
    assert table(out, "answer") == [answers[5], answers[10], answers[11], answers[11]]
    assert "duplicates: 2 with the prompt of an earlier one, 1 equal to one" in out
    assert "Latin 83.3%, Han 8.3%, Japanese 8.3%" in out
    assert out.endswith(
        f"row 9: {path}:10\nuser: \033[90mName 1 birds.\033[0m\nassistant: \033[32mwren \033[0m\n\n"
    )


def test_tokens_limits_and_the_supervised_ones_in_green(tmp_path, folder, capsys, monkeypatch):
    rows = [{"instruction": "Name birds.", "output": "wren " * n} for n in (1, 10, 150, 300)]
    path = save(tmp_path / "a.jsonl", rows)
    out = said(capsys, monkeypatch, path, "--tokenizer", folder)
    tokenizer = inspect.chat_template.load_tokenizer(str(folder)).backend_tokenizer
    texts = [row["output"] + "<|im_end|>" for row in rows]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    assert table(out, "answer") == [lengths[1], lengths[3], lengths[3], lengths[3]]
    (prompt,) = set(table(out, "prompt"))
    assert table(out, "together")[-1] == prompt + lengths[3]
    for limit in (128, 256):
        shares = [
            float(prompt > limit),
            sum(size > limit for size in lengths) / 4,
            sum(prompt + size > limit for size in lengths) / 4,
        ]
        line = re.search(rf"^ +{limit} +(\S+) +(\S+) +(\S+)$", out, re.M)
        assert list(line.groups()) == [f"{share:.1%}" for share in shares]
    green = "".join(re.findall("\033\\[32m(.*?)\033\\[0m", out, re.S))
    assert green == "wren <|im_end|>"
    assert f"{prompt + lengths[0]} tokens, {lengths[0]} supervised (green)" in out


def test_comparisons_and_prompts(tmp_path, folder, capsys, monkeypatch):
    ranked = [
        {"prompt": f"q{n}", "responses": ["one", "three", "two"], "scores": [1, 3 - 2 * (n > 5), 1]}
        for n in range(8)
    ]
    out = said(capsys, monkeypatch, save(tmp_path / "a.jsonl", ranked), "--tokenizer", folder)
    assert "--preference_data: schema kwise" in out and "answers a comparison: 8 of 3; 2 are" in out
    assert "three" in re.sub("\033\\[\\d+m", "", out[out.index("row 0:") :])
    path = save(tmp_path / "b.jsonl", [{"topic": "q"}, {"topic": "\x1b[2J"}])
    out = said(capsys, monkeypatch, path, "--columns", "prompt=topic", "--row", "1")
    assert "2 rows → 2 prompts; 0 bad" in out and "\x1b[2J" not in out and "\\x1b[2J" in out
    with pytest.raises(SystemExit, match="no step can read it"):
        said(capsys, monkeypatch, path)
    with pytest.raises(SystemExit, match="--row 2: there are rows 0 to 1"):
        said(capsys, monkeypatch, path, "--columns", "prompt=topic", "--row", "2")


@pytest.mark.parametrize(
    "text, script",
    [
        ("Where is it?", "Latin"),
        ("Wo ist es, Grüße", "Latin"),
        ("那是什么 ok", "Han"),
        ("それは何ですか", "Japanese"),
        ("이것은 무엇입니까", "Hangul"),
        ("Что это", "Cyrillic"),
        ("ما هذا", "Arabic"),
        ("यह क्या है", "Devanagari"),
        ("12 + 3 = ?", "no letters"),
    ],
)
def test_scripts(text, script):
    assert inspect.script_of(text) == script
