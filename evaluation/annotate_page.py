"""The page of annotate.py: one prompt at a time, its answers without their names."""

import math

from evaluation import web
from evaluation.annotate import LONGEST_NAME, Annotations
from utils.terminal import visible

# A digit ranks the first answer that has no rank yet; Enter goes on. Not while somebody types.
KEYS = """<script>
addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, input:not([type=radio])");
  if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
  const answers = [...document.querySelectorAll("[id^=rank]")].filter((e) => e.offsetParent);
  const open = answers.find((e) => !e.querySelector("input:checked"));
  const choice = open && [...open.querySelectorAll("input")][Number(event.key) - 1];
  if (/^[1-9]$/.test(event.key) && choice) { event.preventDefault(); choice.click(); }
  if (event.key === "Enter" && !event.target.matches("button")) {
    event.preventDefault();
    document.querySelector("#next").click();
  }
});
</script>"""
HOW = (
    "1 is the best; equal ranks are a tie. Keys: a digit ranks the first answer without a rank, "
    "Enter goes on. Each click is saved."
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


def shown(kept: Annotations, most: int, person: str, row: int) -> list:
    """What each output becomes: row, status, work, prompt, and of each of `most` places answer,
    rank and rating."""
    gradio = web.library()
    order, judgement = kept.order(person, row), kept.of(person, row)
    texts = kept.rows[row]["responses"]
    found = [row, status(kept, person, row), gradio.Column(visible=True)]
    found.append(visible(said(kept.rows[row]["prompt"])))
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
        outputs = [row, told, work, prompt, *(part for parts in places for part in parts)]
        for event in (start.click, name.submit):
            event(begin, [name], [person, *outputs])
        for place, (_, _, rank, rating) in enumerate(places):
            here = gradio.State(place)
            for part, column in ((rank, "ranks"), (rating, "ratings")):
                part.input(changed(column), [person, row, here, part], [told])
        leave.click(skip, [person, row], outputs)
        on.click(lambda p, r: at(p, kept.next_row(p, r)), [person, row], outputs)
        back.click(lambda p, r: at(p, max(r - 1, 0)), [person, row], outputs)
    return page


def serve(config, kept: Annotations) -> None:
    print(f"rankings: {kept.file}; every click: {kept.clicks}", flush=True)
    web.serve(build(kept), config, theme=web.theme(), head=KEYS)
