"""An environment replies to the policy's turns: a tool's result, a user's next question.

`--environment` names a callable (conversations, rows) → replies, one for each conversation: a text,
after which the policy speaks again, or None, with which the episode ends. A conversation is a list
of turns {"role", "content"} that ends with the policy's, a row the prompt's row of the data file.
It is called by each rank with the rank's own conversations, in any order and grouping, so a reply
may depend on its conversation and row alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from utils.data import chat_template
from utils.data.chat_template import TemplateError
from utils.data.prompts import Reader
from utils.data.rows import text_problem
from utils.rewards import functions
from utils.rewards.functions import FunctionError

ENVIRONMENT = functions.Kind(
    "environment", "--environment", ("conversations", "rows"), "conversation"
)
ROLES = ("tool", "user")


@dataclass(frozen=True)
class Environment:
    """name: what --environment says. role: of its turns, one of ROLES. timeout: seconds of one
    call, 0: any. max_turns: the policy's turns in an episode."""

    function: Callable
    name: str
    tokenizer: object
    role: str
    max_turns: int
    timeout: float

    def replies(self, conversations: list[list[dict]], rows: list[dict]) -> list[str | None]:
        """What it says to each of them. Raises FunctionError, which names the row to blame."""
        if not conversations:
            return []
        asked, said = ([c[i]["content"] for c in conversations] for i in (0, -1))
        batch = functions.Batch((conversations, rows), {"first": asked, "last": said})
        found = functions.returned(self.function, ENVIRONMENT, self.name, batch, self.timeout)
        head = f"environment {self.name!r} returned"
        advice = f"return a list of {len(batch)}, a text or None for each conversation"
        if not isinstance(found, (list, tuple)):
            raise FunctionError(f"{head} {found!r:.200}; {advice}")
        if len(found) != len(batch):
            count = f"{len(found)} replies to {len(batch)} conversations"
            raise FunctionError(f"{head} {count}; {advice}")
        for i, text in enumerate(found):
            if text is None:
                continue
            problem = text_problem(text) if isinstance(text, str) else "is no text"
            if problem:
                raise FunctionError(
                    f"{head} {text!r:.200} for row {i + 1} of {len(batch)}, which {problem}\n"
                    f"{batch.show(i)}\n{advice}"
                )
        return list(found)

    def turn(self, text: str) -> dict:
        return {"role": self.role, "content": text}

    def ids_of(self, conversation: list[dict], text: str) -> list[int]:
        """A reply to a conversation that ends with the policy's turn, as tokens: all that stands
        between the policy's stop token and its next turn. Raises FunctionError."""
        try:
            return chat_template.reply_ids(self.tokenizer, conversation, self.turn(text))
        except TemplateError as error:
            raise FunctionError(
                f"environment {self.name!r}: its reply {text!r:.200} cannot be a turn: {error}"
            ) from None


def load(config, tokenizer, readers: Sequence[Reader]) -> Environment | None:
    """That of --environment. readers: of the reward models that get conversations as text. Raises
    SystemExit with what is wrong and the flag."""
    if not config.environment:
        return None
    function = functions.load(config.environment, ENVIRONMENT)
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    refusals = {}
    for role in ROLES if config.environment_role == "auto" else (config.environment_role,):
        reply = {"role": role, "content": "c"}
        refused = [why for r in readers if (why := r.refusal([*asked, reply]))]
        try:
            chat_template.reply_ids(tokenizer, asked, reply)
        except TemplateError as error:
            refused.append(str(error))
        if not refused:
            settings = config.max_turns, config.environment_timeout
            return Environment(function, config.environment, tokenizer, role, *settings)
        refusals[role] = "; ".join(refused)
    raise SystemExit(
        "\n".join(
            f"--environment: its text cannot be a turn of role {role!r}: {why}"
            for role, why in refusals.items()
        )
        + "\ngive the tokenizer a chat template that has such turns, or set --environment_role"
    )
