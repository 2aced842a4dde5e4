"""Runs a step's main and records, just before each save, what the training engine computes.

arguments: PROGRAM FILE.pt …the step's own arguments
"""

import importlib.util
import sys
from pathlib import Path

import torch

from utils.checkpoints import model_folder as checkpoint
from utils.distributed import process_group
from utils.models import language_model

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    program, target, *argv = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("step", ROOT / program)
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    engines = []
    from utils.distributed import zero

    class Recording(zero.TrainEngine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

    recorded = {}
    plain_save = checkpoint.save

    def save(folder, parts):
        for name, part in parts.items():
            # The state is no model, and the average is not what the engine holds.
            if isinstance(part, checkpoint.ModelFolder) and part.average is None:
                record(Path(folder) / name, part.model, part.tokenizer)
        plain_save(folder, parts)

    def record(folder, model, tokenizer):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}],
            tokenize=False,
        )
        text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        mask = torch.ones_like(ids, dtype=torch.bool)
        engine = next(e for e in engines if model in (e.module, getattr(e.module, "classifier", 0)))
        engine.module.eval()
        with torch.no_grad():
            if model is engine.module:
                out = engine(**language_model.forward_inputs(model, ids, mask), use_cache=False)
                found = {"kind": "language", "ids": ids, "logits": out.logits.clone()}
            else:
                found = {"kind": "scalar", "ids": ids, "logits": engine(ids, mask)[:, -1:]}
        recorded[str(folder)] = found

    plain_engine, zero.TrainEngine = zero.TrainEngine, Recording
    checkpoint.save = save
    sys.argv = [program, *argv]
    try:
        step.main()
    finally:
        checkpoint.save, zero.TrainEngine = plain_save, plain_engine
    if process_group.is_main():
        torch.save(recorded, target)


if __name__ == "__main__":
    main()
