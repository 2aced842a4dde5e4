"""The page of annotate.py: one prompt at a time, its answers without their names."""

import html
import math
from pathlib import Path

from evaluation import web
from evaluation.annotate import LONGEST_NAME, Annotations, Judgement
from utils.terminal import visible

TEMPLATES = Path(__file__).parent / "templates"
HOW = (
    "Drag the answers into their order, the best on top (with a finger at ⠿), or give ranks: 1 is "
    "the best; equal ranks are a tie. Keys: a digit ranks the first answer without a rank, Enter "
    "goes on. Each change is saved."
)


def said(turns) -> str:
    """A prompt as text."""
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def status(kept: Annotations, person: str, row: int) -> str:
    text = f"prompt {row + 1} of {len(kept.rows)}; {person} has ranked {kept.done(person)}"
    alpha, prompts = kept.agreement()
    if not math.isnan(alpha):
        text += f"; agreement over {prompts} prompts ranked by several: alpha {alpha:.2f}"
    return visible(text)


def to_drag(texts: list[str], order: list[int], judgement: Judgement) -> str:
    """HTML: the answers by their ranks; equal ones, and then those without, as they are shown."""
    rows = []
    for place, answer in enumerate(order):
        rank = judgement.ranks[answer]
        text = html.escape(visible(texts[answer]))
        item = f'<li data-place="{place}" data-rank="{rank or ""}">'
        item += '<span class="handle" aria-hidden="true">⠿</span>'
        rows.append(
            (rank or len(order) + 1, f"{item}<b>answer {place + 1}</b><bdi>{text}</bdi></li>")
        )
    return f"<ol>{''.join(item for _, item in sorted(rows, key=lambda row: row[0]))}</ol>"


def shown(kept: Annotations, most: int, person: str, row: int) -> list:
    """What each output becomes: row, status, work, prompt, the list, and of each of `most` places
    answer, rank and rating."""
    gradio = web.library()
    order, judgement = kept.order(person, row), kept.of(person, row)
    texts = kept.rows[row]["responses"]
    found = [row, status(kept, person, row), gradio.Column(visible=True)]
    found += [visible(said(kept.rows[row]["prompt"])), to_drag(texts, order, judgement)]
    for place in range(most):
        here = place < len(order)
        answer = order[place] if here else 0
        rank = judgement.ranks[answer] or None
        rating = judgement.ratings[answer] or None
        found += [
            gradio.Column(visible=here),
            visible(texts[answer]) if here else "",
            gradio.Radio(list(range(1, len(order) + 1)), value=rank if here else None),
            rating if here else None,
        ]
    return found


def build(kept: Annotations):
    gradio = web.library()
    most = max(len(row["responses"]) for row in kept.rows)

    def at(person: str, row: int) -> list:
        return shown(kept, most, person, row)

    def begin(name: str):
        person = name.strip()[:LONGEST_NAME]
        if not person:
            raise gradio.Error("Give a name, so that your rankings are yours.")
        return [person, *at(person, kept.next_row(person))]

    def changed(column: str):
        """Saves a click on the rank or the rating at a place."""

        def save(person: str, row: int, place: int, value: int | None):
            answer = kept.order(person, row)[place]
            kept.click(person, row, column, answer, int(value or 0))
            return status(kept, person, row)

        return save

    def skip(person: str, row: int):
        kept.skip(person, row)
        return at(person, kept.next_row(person, row))

    with gradio.Blocks(title="which answer is better?", analytics_enabled=False) as page:
        person, row = gradio.State(""), gradio.State(0)
        with gradio.Row():
            name = gradio.Textbox(label="your name", max_length=LONGEST_NAME, elem_id="name")
            start = gradio.Button("begin, or go on", elem_id="begin")
        told = gradio.Textbox(HOW, label="status", interactive=False, elem_id="status")
        with gradio.Column(visible=False) as work:
            prompt = gradio.Textbox(label="prompt", interactive=False, elem_id="prompt")
            dragging = gradio.HTML(elem_id="order", js_on_load=None)
            places = []
            for place in range(most):
                with gradio.Column(variant="panel") as panel:
                    text = gradio.Textbox(
                        label=f"answer {place + 1}", interactive=False, elem_id=f"answer{place}"
                    )
                    rank = gradio.Radio([], label="rank", elem_id=f"rank{place}")
                    rating = gradio.Radio(
                        list(range(1, 8)),
                        label="rating, 7 the best (may be left out)",
                        elem_id=f"rating{place}",
                    )
                places.append((panel, text, rank, rating))
            with gradio.Row():
                back = gradio.Button("back", elem_id="back")
                leave = gradio.Button("skip: none can be ranked", elem_id="skip")
                on = gradio.Button("next", variant="primary", elem_id="next")
            gradio.Textbox(HOW, show_label=False, interactive=False, container=False)
        outputs = [row, told, work, prompt, dragging, *(part for parts in places for part in parts)]
        # One after the other as they came: a click is of the prompt that was there when it was
        # made. Each counts: by default gradio drops one that comes while the one before it runs.
        in_turn = {"concurrency_id": "page", "concurrency_limit": 1}
        for event in (start.click, name.submit):
            event(begin, [name], [person, *outputs], **in_turn)
        for place, (_, _, rank, rating) in enumerate(places):
            here = gradio.State(place)
            for part, column in ((rank, "ranks"), (rating, "ratings")):
                inputs = [person, row, here, part]
                part.input(changed(column), inputs, [told], trigger_mode="multiple", **in_turn)
        leave.click(skip, [person, row], outputs, **in_turn)
        on.click(lambda p, r: at(p, kept.next_row(p, r)), [person, row], outputs, **in_turn)
        back.click(lambda p, r: at(p, max(r - 1, 0)), [person, row], outputs, **in_turn)
    return page


def serve(config, kept: Annotations) -> None:
    print(f"rankings: {kept.file}; every click: {kept.clicks}", flush=True)
    script, style = ((TEMPLATES / f"annotate.{kind}").read_text() for kind in ("js", "css"))
    head = f'<script type="module">{script}</script>'
    web.serve(build(kept), config, theme=web.theme(), head=head, css=style)
