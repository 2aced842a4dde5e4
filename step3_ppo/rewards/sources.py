"""Each row by its own verifier: `--reward_function step3_ppo.rewards.sources:by_data_source`.

For mixed data as verl's Parquet files hold it: the column `data_source` says where a row is from,
and reward_model = {"style": "rule", "ground_truth": …} what is right.
"""

from collections import defaultdict
from fnmatch import fnmatch

from step3_ppo.rewards import code, formats, maths, shipped
from step3_ppo.rewards.rows import columns, given

# Names of data sets, * for any letters; the first that fits counts.
VERIFIERS = {
    "*gsm8k*": maths.final_answer,
    "*MATH*": maths.final_answer,
    "math*": maths.final_answer,
    "*aime*": maths.final_answer,
    "*amc*": maths.final_answer,
    "numina_*": maths.final_answer,
    "hiyouga/geometry3k": maths.final_answer,
    "codecontests": code.all_tests,
    "apps": code.all_tests,
    "codeforces": code.all_tests,
    "taco": code.all_tests,
    "*mbpp*": code.all_tests,
    "*humaneval*": code.all_tests,
    "*mmlu*": formats.multiple_choice,
    "allenai/ai2_arc*": formats.multiple_choice,
    "toy": shipped.toy_verifier,
}


def by_data_source(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """The scores of the verifier that VERIFIERS names for each row's data_source; ValueError with
    the names where there is none, or where the row wants a model to judge."""
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[verifier_of(row)].append(i)
    scores = [0.0] * len(rows)
    for verifier, chosen in groups.items():
        parts = ([column[i] for i in chosen] for column in (prompts, responses, rows))
        for i, value in zip(chosen, verifier(*parts), strict=True):
            scores[i] = value
    return scores


def verifier_of(row: dict):
    source = row.get("data_source")
    if not given(source):
        raise ValueError(f"the row has no column 'data_source'; it has {columns(row)}")
    own = row.get("reward_model")
    style = own.get("style", "rule") if isinstance(own, dict) else "rule"
    if style != "rule":
        raise ValueError(
            f"a row of {source!r} has reward_model.style {style!r}: no program can verify it; "
            "leave such rows out, or score them by --reward_model"
        )
    for name, verifier in VERIFIERS.items():
        if fnmatch(source, name):
            return verifier
    raise ValueError(
        f"data_source {source!r} has no verifier; there are {', '.join(VERIFIERS)}; add one to "
        "VERIFIERS in step3_ppo/rewards/sources.py, or name your own --reward_function"
    )
