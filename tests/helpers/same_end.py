"""Did two runs of the same settings end alike, to the last bit?"""

import json

TIMES = ("seconds", "tokens_per_second")  # and what begins so


def metrics_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def assert_same_end(folder, reference) -> None:
    """Metrics apart from times, final weights and PPO's state are equal to the last bit."""
    assert metrics_of(folder) == metrics_of(reference)
    weights = sorted(p.relative_to(reference) for p in reference.rglob("*.safetensors"))
    weights = [p for p in weights if p.parts[0] != "checkpoints"]
    assert weights
    for name in [*weights, *(["state.json"] if (reference / "state.json").exists() else [])]:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    results = [json.loads((f / "result.json").read_text()) for f in (folder, reference)]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in results][0] == {
        k: v for k, v in results[1].items() if k != "seconds"
    }
    assert not list(folder.rglob("*.writing")) and not list(folder.rglob(".step-*"))
