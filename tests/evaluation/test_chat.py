"""The chat with one checkpoint, or two."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import transformers

from evaluation import chat, checkpoints, prompt_eval
from evaluation.questions import Question
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import configured, problems_of, run_script
from utils import terminal
from utils.data import demonstrations, rows

policy = evaluated_models.policy  # a fixture, for this file too

CHAT_FLAGS = "--dtype fp32 --temperature 0 --max_new_tokens 8".split()


def test_chat_through_a_pipe(policy, tmp_path):
    lines = "Hi dog!\nHi dog!\n\n/clear\nHi dog!\n/exit\nnever read\n"
    run = run_script("chat.py", "--checkpoint", policy, *CHAT_FLAGS, cwd=tmp_path, input=lines)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    first, second, third = run.stdout.split("assistant: ")[1:]
    before_clear, cleared = second.split("(conversation forgotten)\n")
    assert third == first + "\n"
    assert before_clear != first and cleared == ""
    expected = answers_of_one(policy, "Hi dog!", 8)
    assert first == terminal.visible(expected) + "\n"


def answers_of_one(policy, prompt: str, max_new_tokens: int) -> str:
    config = configured(checkpoints=[policy], max_new_tokens=max_new_tokens)
    return prompt_eval.answer_all(config, policy, [Question((), (prompt,), "")])[0][0][0].answer


class Canned:
    """A speaker that answers in two parts and notes what it heard."""

    said = "ply \x1b[1m{}"

    def __init__(self, name: str):
        self.name, self.heard, self.temperatures = name, [], []

    def prompt(self, messages):
        return [1], len(messages) > 5

    def stream(self, messages, config, temperature):
        self.heard.append([m["content"] for m in messages])
        self.temperatures.append(temperature)
        if "too long" in self.heard[-1]:
            raise chat.TooLong("not answered: more than the 9 tokens that fit")
        yield "re"
        yield self.said.format(len(self.heard))


def talked(monkeypatch, lines, *names, **settings) -> list[Canned]:
    speakers, lines = [Canned(name) for name in names], iter(lines)

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    chat.in_terminal(chat.Talk(chat.ChatConfig(checkpoint=list(names), **settings), speakers))
    return speakers


def test_the_model_is_told_the_system_turn_and_all_before(monkeypatch, capsys):
    lines = ["one", "half a pair \ud800", "two", "too long", "short", "/reset", "three"]
    lines += ["/system Be  brief.", "four", "/system", "five"]
    (speaker,) = talked(monkeypatch, lines, "x", system="Be kind.")
    assert speaker.heard == [
        ["Be kind.", "one"],
        ["Be kind.", "one", "reply \x1b[1m1", "two"],
        ["Be kind.", "one", "reply \x1b[1m1", "two", "reply \x1b[1m2", "too long"],
        # What had no answer is gone.
        ["Be kind.", "one", "reply \x1b[1m1", "two", "reply \x1b[1m2", "short"],
        ["Be kind.", "three"],
        ["Be  brief.", "four"],
        ["five"],
    ]
    out = capsys.readouterr().out
    assert "not sent: your line holds a lone surrogate" in out
    assert "(x: not answered: more than the 9 tokens that fit; /reset starts afresh)" in out
    assert "(the oldest turns no longer fit" in out
    assert "\x1b" not in out and r"assistant: reply \x1b[1m1" in out


def test_two_checkpoints_hear_the_same_and_go_on_from_their_own_answers(monkeypatch, capsys):
    first, second = talked(monkeypatch, ["one", "two"], "a", "b")
    assert first.heard == second.heard == [["one"], ["one", "reply \x1b[1m1", "two"]]
    out = capsys.readouterr().out
    assert out.index("a: reply") < out.index("b: reply")


@pytest.mark.parametrize("read", [1, 2, 3, 4])
def test_a_reset_while_an_answer_comes_is_not_undone_by_it(read):
    speakers = [Canned("x"), Canned("y")]
    talk = chat.Talk(chat.ChatConfig(checkpoint=["x", "y"]), speakers)
    parts = talk.answer("one")
    assert [next(parts)[0] for _ in range(read)] == [0, 0, 1, 1][:read]
    talk.reset("Be brief.")
    assert list(parts) == []
    assert talk.messages == 2 * [[{"role": "system", "content": "Be brief."}]]


def test_the_temperature_can_be_changed_and_stays_where_it_is_no_number(monkeypatch, capsys):
    lines = ["one", "/temp 0", "two", "/temp hot", "/temp -1", "/temp nan", "three"]
    (speaker,) = talked(monkeypatch, lines, "x")
    assert speaker.temperatures == [0.7, 0.0, 0.0]
    assert "temperature 'hot' is no number from 0; it stays 0" in capsys.readouterr().out


def test_saved_conversations_are_demonstrations(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Canned, "said", "ply {}")
    file = tmp_path / "kept.jsonl"
    talked(monkeypatch, [f"/save {file}", "one", "two", f"/save {file}"], "a", "b", system="S")
    assert "(2 conversations added to" in capsys.readouterr().out
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["checkpoint"] for row in kept] == ["a", "b"]
    said = [m["content"] for m in kept[0]["messages"]]
    assert said == ["S", "one", "reply 1", "two", "reply 2"]
    bad = rows.BadRows()
    assert len(demonstrations.load_conversations([str(file)], bad=bad)) == 2 and len(bad) == 0
    talk = chat.Talk(chat.ChatConfig(checkpoint=["a"]), [Canned("a")])
    assert "elsewhere (/save FILE)" in chat.said(talk, f"/save {file}/of_a_file")


def test_an_error_of_the_model_ends_the_answer_and_not_in_silence(policy):
    (speaker,) = chat.load(chat.ChatConfig(checkpoint=[policy], dtype="fp32", max_new_tokens=8))
    asked = [{"role": "user", "content": "Hi dog!"}]
    config = chat.ChatConfig(max_new_tokens=8)
    text = "".join(speaker.stream(asked, config, 0.0))
    assert text == answers_of_one(policy, "Hi dog!", 8)
    speaker.model.generate = lambda **_: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        list(speaker.stream(asked, config, 0.0))


def test_who_stops_reading_stops_the_model(policy):
    (speaker,) = chat.load(chat.ChatConfig(checkpoint=[policy], dtype="fp32", max_new_tokens=400))
    speaker.tokenizer.eos_token_id = None
    made, generate = [], speaker.model.generate
    speaker.model.generate = lambda **given: made.append(generate(**given))
    asked = [{"role": "user", "content": "Write a letter."}]
    parts = speaker.stream(asked, chat.ChatConfig(max_new_tokens=400), 1.0)
    next(parts)
    parts.close()
    assert made[0].shape[1] < 300


def test_chat_ends_cleanly_on_ctrl_c(policy, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr("sys.argv", ["chat.py", "--checkpoint", policy])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    chat.main()
    assert capsys.readouterr().out.startswith(f"{policy}; /reset forgets")


def test_chat_lists_its_problems():
    message = problems_of(
        *"--checkpoint /no/where --temperature -1 --top_p 0 --max_new_tokens 0".split(),
        *"--port 70000".split(),
        of=chat.ChatConfig,
    )
    for part in ("'/no/where' does not exist", "temperature=-1.0", "top_p=0.0", "max_new_tokens=0"):
        assert part in message
    assert "port=70000" in message and "only with --web" in message
    assert "checkpoint is empty" in problems_of(of=chat.ChatConfig)
    assert "not one, or two" in problems_of("--checkpoint", "a", "a", of=chat.ChatConfig)


@pytest.mark.parametrize("positions, room", [(20, 12), (None, sys.maxsize - 8)])
def test_a_model_without_a_limit_of_positions_has_room_for_any_prompt(positions, room):
    config = transformers.PretrainedConfig(max_position_embeddings=positions)
    model = SimpleNamespace(config=config, name_or_path="m")
    assert checkpoints.prompt_room(model, 8) == room


def test_an_answer_must_leave_room_for_a_prompt():
    config = transformers.LlamaConfig(max_position_embeddings=8)
    model = SimpleNamespace(config=config, name_or_path="m")
    with pytest.raises(SystemExit, match="max_new_tokens=8 leaves no room .* the 8 positions of m"):
        checkpoints.prompt_room(model, 8)
