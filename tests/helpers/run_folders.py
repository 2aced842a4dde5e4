"""Output folders of runs, as the steps would have written them."""

import json
from dataclasses import replace
from pathlib import Path

from evaluation import run_folder
from step3_ppo.config import PPOConfig
from utils.settings import command_line

# Markup, control and direction characters, as a model may write them.
HOSTILE = "<script>alert(1)</script> &amp; \x1b[31m\u202egnirts\u2066 \x00 </bdi>{{ 7 * 7 }}"
ROLLOUTS = 12
# Metrics from the first rollout to the last, of which the others lie in between.
GOOD = {
    "score": (0.0, 4.0),
    "verifier": (0.4, 0.7),
    "kl": (0.1, 2.0),
    "kl_k3": (0.1, 2.0),
    "entropy": (1.0, 0.6),
    "eos_share": (0.95, 1.0),
    "response_length": (8.0, 9.0),
}
KINDS = {
    "good": {},
    "collapsed": {"entropy": (1.0, 0.0), "verifier": (0.4, 0.2), "score": (2.0, 1.0)},
    "over-optimised": {"verifier": (0.6, 0.2), "kl": (0.1, 15.0)},
    "never stops": {"eos_share": (0.9, 0.01), "response_length": (8.0, 20.0)},
}


def answers(said: list[str], scores: float) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": f"Say {HOSTILE} {i}."}], "answer": text}
        | {"score": scores + i, "finished": i != 1, "verifier": 0.5, "tokens": 5}
        for i, text in enumerate(said)
    ]


def ppo(folder: Path, *, finished: bool = True, **changed) -> Path:
    """Step 3 of a run. changed: (first, last) of metrics in place of those of GOOD."""
    folder.mkdir(parents=True)
    config = PPOConfig(output_dir=str(folder), model_name_or_path=HOSTILE, max_steps=ROLLOUTS)
    command_line.save(config, folder, 2)
    ends, lines = GOOD | changed, []
    for n in range(ROLLOUTS + 1):
        at = {name: a + (b - a) * n / ROLLOUTS for name, (a, b) in ends.items()}
        own = {name: value for name, value in at.items() if name != "verifier"} if n else {}
        held_out = {f"eval/{name}": value for name, value in at.items()} if n % 4 == 0 else {}
        lines.append({"step": n} | own | held_out | ({"seconds": 1.0} if n else {}))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "log.txt").write_text(
        "prompts: 90 rows kept\nplan: 0.12 GB of CPU memory a rank at most: fits\n"
        f"  passed  data: {HOSTILE}\nsome noise\n"
    )
    row = {"prompt": answers([""], 0)[0]["prompt"], "score": 1.0, "finished": True, "length": 3}
    row |= {"pieces": ["a ", HOSTILE, "<|im_end|>"], "reward": [0.0, -0.5, 2.0]}
    row |= {"advantage": [0.5, None, -1.0], "kl": [0.0, 0.1, -0.2]}
    content = {"step": ROLLOUTS, "action_level": "token", "rows": [row]}
    (folder / "tokens.json").write_text(json.dumps(content))
    said = ["It is red.", HOSTILE, "三只猫"], ["It was red!", HOSTILE, "四只猫"]
    both = {"before": answers(said[0], 0.0), "after": answers(said[1], 1.0)}
    (folder / "samples.json").write_text(json.dumps(both))
    if finished:
        result = {"seconds": 30.0, "score_se_change": 0.2}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def reconfigure(folder: Path, **values) -> Path:
    """The same run with other settings in its config.yaml."""
    command_line.save(replace(run_folder.read_step(folder).config, **values), folder, 1)
    return folder
