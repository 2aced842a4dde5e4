"""The chat with a checkpoint."""

import io
import sys
from types import SimpleNamespace

import pytest
import transformers

from evaluation import chat, checkpoints, prompt_eval
from evaluation.questions import Question
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import configured, problems_of, run_script
from utils import terminal

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


def test_chat_tells_the_model_the_system_turn_and_all_before(monkeypatch, capsys):
    heard = []

    def canned(model, tokenizer, messages, room):
        heard.append([m["content"] for m in messages])
        return None if "too long" in heard[-1] else f"reply {len(heard)}"

    lines = iter(["one", "half a pair \ud800", "two", "too long", "short", "/clear", "three"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(chat, "answer", canned)
    monkeypatch.setattr(checkpoints, "prompt_room", lambda model, length: 99)
    monkeypatch.setattr("builtins.input", typed)
    chat.talk(chat.ChatConfig(checkpoint="x", system="Be kind."), None, None)
    assert heard == [
        ["Be kind.", "one"],
        ["Be kind.", "one", "reply 1", "two"],
        ["Be kind.", "one", "reply 1", "two", "reply 2", "too long"],
        ["Be kind.", "one", "reply 1", "two", "reply 2", "short"],  # what had no answer is gone
        ["Be kind.", "three"],
    ]
    assert "not sent: your line holds a lone surrogate" in capsys.readouterr().out


def test_chat_ends_cleanly_on_ctrl_c(policy, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr("sys.argv", ["chat.py", "--checkpoint", policy])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    chat.main()
    assert capsys.readouterr().out.startswith(f"{policy}; /clear forgets")


def test_chat_lists_its_problems():
    message = problems_of(
        *"--checkpoint /no/where --temperature -1 --top_p 0 --max_new_tokens 0".split(),
        of=chat.ChatConfig,
    )
    for part in ("'/no/where' does not exist", "temperature=-1.0", "top_p=0.0", "max_new_tokens=0"):
        assert part in message
    assert "checkpoint is empty" in problems_of(of=chat.ChatConfig)


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
