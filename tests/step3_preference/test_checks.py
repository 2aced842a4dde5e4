"""Each check finds the fault that is planted, and finds none where there is none."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from step3_preference import checks, logprobs
from step3_preference.checks import SelfCheck
from step3_preference.config import PreferenceConfig
from step3_preference.main import Rows
from utils.data import chat_template
from utils.data.comparisons import Comparison
from utils.data.fitting import Counts
from utils.data.preferences import Encode
from utils.distributed.process_group import StopRun


class View(list):
    """What the checks ask of tables.View, of rows that a test may change."""

    def __init__(self, items, rows, counts):
        super().__init__(rows)
        self.items, self.made = items, counts

    def item(self, i):
        return self.items[i]

    def numbers(self, name):
        return torch.tensor([getattr(row, name) for row in self], dtype=torch.float64).numpy()

    def counts(self):
        return self.made


def view(tokenizer, first: int) -> View:
    items = [
        Comparison(
            ({"role": "user", "content": f"What is {n} + 1?"},),
            (f"It is {n + 1}", f"{n}", f"{n + 1}, you see"),
            (2.0, 0.0, 1.0) if n % 2 else (0.0, 2.0, 1.0),
            f"rows:{n}",
        )
        for n in range(first, first + 6)
    ]
    return View(items, [Encode(tokenizer, 96, "cut")(item)[0] for item in items], Counts(kept=18))


@pytest.fixture
def given(tiny, tmp_path):
    start = str(tiny / "base_model")
    tokenizer, said = chat_template.load_tokenizer(start), []
    config = PreferenceConfig(output_dir=str(tmp_path), model_name_or_path=start)
    run = SimpleNamespace(say=said.append, said=said, dtype="fp32", device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(start)
    parts = [Rows(view(tokenizer, n), name, config) for n, name in ((0, "train"), (6, "held"))]
    for part in parts:
        part.refer({part.name: logprobs.of_all(model, part.rows, run.device, (4, 0))})
    return SelfCheck(config, run, tokenizer, model, *parts)


def change(part, **how):
    """Give every row of a part other values, each made of the row."""
    for i, row in enumerate(part.rows):
        part.rows[i] = dataclasses.replace(row, **{n: f(row) for n, f in how.items()})


def test_nothing_is_found_in_a_sound_run(given):
    given.before_the_first_step(0)
    optimizer = torch.optim.SGD(given.engine.parameters(), lr=0.1)
    step(given, optimizer, sign=1)
    verdicts = [line for text in given.run.said for line in text.splitlines() if line[0] == " "]
    assert len(verdicts) == 8 and all(line.startswith("  passed") for line in verdicts), verdicts


def step(given, optimizer, sign: int):
    from step3_preference import losses

    chosen, loss = [0, 1, 2, 3], losses.LOSSES["dpo"]
    policy = logprobs.of_answers(
        given.engine, [given.train.rows[i] for i in chosen], given.run.device
    )
    total, sums = losses.batch_loss(loss, *given.train.of(chosen, policy), given.config.how())
    (sign * total / 4).backward()
    optimizer.step()
    measured = losses.means({k: v.item() if torch.is_tensor(v) else v for k, v in sums.items()})
    given.after_a_step(chosen, 0.0, measured)


FAULTS = {
    "answers share their prompt": lambda g: change(
        g.train, begins=lambda row: [b - (k == 1) for k, b in enumerate(row.begins)]
    ),
    "stop token": lambda g: change(g.train, answers=lambda row: [a[:-1] for a in row.answers]),
    "label order": lambda g: change(
        g.train, labels=lambda row: [-x for x in row.labels], prompt=lambda row: row.prompt
    ),
    "data": lambda g: setattr(g, "held", g.train),
    "margins 0 at the start": lambda g: setattr(
        g.held, "reference", [[x + 1e-3 * 20 for x in row] for row in g.held.reference]
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(given, name):
    FAULTS[name](given)
    with pytest.raises(StopRun, match=f"found 1 fault, .*\n  - {name}: "):
        given.before_the_first_step(0)


def test_a_resumed_run_need_not_be_the_reference(given):
    FAULTS["margins 0 at the start"](given)
    given.before_the_first_step(3)
    assert "resumed at step 4" in given.run.said[0]


def test_pad_and_stop_token_must_differ(given):
    given.tokenizer.pad_token = given.tokenizer.eos_token
    with pytest.raises(checks.Fault, match="pad and stop token are both"):
        checks.answers_stop(given)


def test_a_reference_that_changes_is_found(given):
    given.before_the_first_step(0)
    given.train.reference[2][0] += 1e-12
    with pytest.raises(checks.Fault, match="changed in the first step"):
        checks.reference_is_unchanged(given)


def test_a_step_the_wrong_way_is_doubted(given):
    given.before_the_first_step(0)
    step(given, torch.optim.SGD(given.engine.parameters(), lr=0.1), sign=-1)
    assert "DOUBT  the first step: loss of its rows 0.693" in given.run.said[-1]


def test_many_answers_cut_and_longer_ones_preferred_are_doubted(given):
    given.train.rows.made = Counts(kept=18, cut_answers=5)
    with pytest.raises(checks.Doubt, match="27.8% of the answers are cut to --max_length 1024"):
        checks.parts_are_apart(given)
    change(given.train, characters=lambda row: [int(x) for x in row.labels])
    change(given.held, characters=lambda row: [int(x) for x in row.labels])
    with pytest.raises(checks.Doubt, match="longer one in 100% of 36 pairs, and --loss dpo sums"):
        checks.better_is_not_longer(given)
    given.config.loss = "simpo"
    assert "100%" in checks.better_is_not_longer(given)


def test_off_checks_nothing_and_warn_goes_on(given):
    FAULTS["stop token"](given)
    given.config.self_check = "off"
    given.before_the_first_step(0)
    assert not given.run.said
    given.config.self_check = "warn"
    given.before_the_first_step(0)
    assert any("FAULT  stop token" in line for line in given.run.said)
