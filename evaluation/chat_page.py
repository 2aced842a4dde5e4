"""The chat as a page for the browser: a column for each checkpoint, answers while they come."""

import html
import re
import tempfile
from pathlib import Path

from evaluation import web
from evaluation.chat import COMMANDS, Talk, TooLong, said
from utils.terminal import visible

STYLE = "[data-testid=bot] *, [data-testid=user] * { white-space: pre-wrap; }"


def bubble(role: str, text: str) -> dict:
    """A turn as it may be shown. A gradio.Chatbot takes all text for HTML, and would take the
    indentation off its lines."""
    safe = html.escape(visible(text), quote=False)
    return {"role": role, "content": re.sub("^ |\t", lambda m: f"&#{ord(m[0])};", safe, flags=re.M)}


def bubbles(messages: list[dict]) -> list[dict]:
    return [bubble(m["role"], m["content"]) for m in messages if m["role"] != "system"]


class Events:
    """What the page does when something is typed or clicked. Each visitor has a conversation of its
    own."""

    def __init__(self, config, speakers):
        self.gradio, self.config, self.speakers = web.library(), config, speakers

    def fresh(self) -> Talk:
        return Talk(self.config, self.speakers)

    def shown(
        self, talk: Talk, told: str = "", asked: str = "", answers: dict | None = None
    ) -> tuple:
        """What each output becomes: state, remark, and a conversation a column."""
        columns = []
        for k, messages in enumerate(talk.messages):
            more = [bubble("user", asked)] if asked else []
            more += [bubble("assistant", answers[k])] if answers and k in answers else []
            columns.append(bubbles(messages) + more)
        return talk, self.gradio.Textbox(visible(told), visible=bool(told)), *columns

    def say(self, line: str, temperature: float, talk: Talk | None):
        talk, line = talk or self.fresh(), line.strip()
        talk.temperature = temperature
        command = line.partition(" ")[0]
        # A visitor must not choose files of this machine.
        elsewhere = command in ("/save", "/temp")
        told = "the slider and the button below do that" if elsewhere else said(talk, line)
        # The field is emptied here alone: the next line may be typed while an answer comes. What
        # could not be sent stays there.
        as_it_is = self.gradio.skip()
        yield (
            as_it_is if told and command not in COMMANDS else "",
            *self.shown(talk, told, "" if told else line),
        )
        if told or not line:
            return
        answers: dict[int, str] = {}
        before = [list(messages) for messages in talk.messages]
        try:
            for k, text in talk.answer(line):
                answers[k] = text
                now = Talk(self.config, self.speakers, messages=before)
                yield as_it_is, talk, *self.shown(now, "", line, answers)[1:]
            yield as_it_is, *self.shown(talk)
        except TooLong as problem:
            yield as_it_is, *self.shown(talk, f"{problem}; reset starts afresh. You said: {line}")

    def begin(self, system: str, talk: Talk | None):
        talk = talk or self.fresh()
        return self.shown(talk, COMMANDS["/system"](talk, system.strip()))

    def save(self, talk: Talk | None):
        path = Path(tempfile.mkdtemp()) / "conversations.jsonl"
        (talk or self.fresh()).save(str(path))
        return self.gradio.File(str(path), visible=True)


def build(config, speakers):
    """The page."""
    gradio, events = web.library(), Events(config, speakers)
    with gradio.Blocks(title="chat", analytics_enabled=False) as page:
        talk = gradio.State(None)
        with gradio.Row():
            columns = [
                gradio.Chatbot(
                    label=visible(s.name),
                    height=440,
                    render_markdown=False,
                    allow_tags=False,
                    buttons=[],  # its own would copy "&lt;" for "<"
                )
                for s in speakers
            ]
        remark = gradio.Textbox(label="remark", interactive=False, visible=False, elem_id="remark")
        line = gradio.Textbox(label="you", autofocus=True, elem_id="line")
        with gradio.Row():
            temperature = gradio.Slider(0, 2, config.temperature, label="temperature")
            system = gradio.Textbox(config.system, label="system turn; Enter begins anew with it")
        with gradio.Row():
            reset = gradio.Button("reset", elem_id="reset")
            keep = gradio.Button("save", elem_id="save")
        file = gradio.File(label="conversations", visible=False, elem_id="file")
        outputs = [talk, remark, *columns]
        # A line that is sent while an answer comes waits in its field until that is whole.
        asked = [line, temperature, talk]
        line.submit(events.say, asked, [line, *outputs], trigger_mode="always_last")
        for event in (reset.click, system.submit, *(c.clear for c in columns)):
            event(events.begin, [system, talk], outputs)
        keep.click(events.save, [talk], [file])
    return page


def serve(config, speakers) -> None:
    web.serve(build(config, speakers), config, theme=web.theme(), css=STYLE)
