"""Log-probabilities of answers: of a micro-batch with a gradient, of all rows without, and those of
the reference, computed once before training."""

import gc
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from step3_preference import ilql
from utils import whole_files
from utils.data import chat_template, comparisons
from utils.data.preferences import Answers
from utils.distributed import process_group, zero
from utils.models import language_model
from utils.models.loading import Loading
from utils.models.scorer import differences
from utils.pretrained import base_of

FILE = "reference_logprobs.npz"


def of_answers(forward, rows: Sequence[Answers], device: torch.device) -> torch.Tensor:
    """(N,) fp64, of the answers of all rows laid end to end."""
    groups, begins = [row.answers for row in rows], [row.begins for row in rows]
    return language_model.answer_logprobs(forward, groups, begins, device)


def with_values(forward, rows: Sequence[Answers], device: torch.device, how) -> torch.Tensor:
    """(N,7) fp64 of ILQL: log-probability under the language model alone, sums of ilql.TERMS."""
    groups, begins = [row.answers for row in rows], [row.begins for row in rows]
    numbers, owners = language_model.answer_tokens(forward, groups, begins, device, values=True)
    goes_on = torch.cat([owners[1:] == owners[:-1], owners.new_zeros(1, dtype=torch.bool)])
    rewards = torch.tensor([x for row in rows for x in ilql.rewards_of(row.labels)], device=device)
    terms = ilql.token_losses(numbers, rewards[owners] * ~goes_on, goes_on, how)
    columns = torch.cat([numbers[:, :1], terms], 1).double()
    sums = torch.zeros(len(rewards), columns.shape[1], dtype=torch.float64, device=device)
    return sums.index_add(0, owners, columns)


@torch.no_grad()
def of_all(
    forward, rows: Sequence[Answers], device, budget: tuple[int, int], of=of_answers
) -> list[list]:
    """Of every answer of each row, on every rank; rows are the same on every rank and dealt to
    them. budget: of comparisons.deal. of: what is measured."""
    module = getattr(forward, "module", forward)
    was_training = module.training
    module.eval()
    sums, counts = [], []
    for chosen in comparisons.deal(range(len(rows)), rows, *budget):
        # A rank whose rows have run out goes forward with the others, as ZeRO-3 needs.
        some = [rows[i] for i in chosen or [0]]
        sums.append(of(forward, some, device))
        counts.append([(i, len(row.answers)) for i, row in zip(chosen, some, strict=False)])
    module.train(was_training)
    mine = {}
    for part, of_rows in zip(sums, counts, strict=True):
        values = iter(part.tolist())
        mine |= {i: [next(values) for _ in range(count)] for i, count in of_rows}
    everywhere = {}
    for part in process_group.gather_objects(mine):
        everywhere |= part
    return [everywhere[i] for i in range(len(rows))]


def of_reference(config, parts: dict[str, Sequence], tokenizer, run) -> dict[str, list]:
    """{name: the reference model's log-probabilities of these rows}, from the file of this run
    where it has been written, else computed now; the model is gone afterwards.

    parts: views of rows by name.
    """
    path = config.reference_model or config.model_name_or_path
    other = chat_template.load_tokenizer(path, config.trust_remote_code, config.date)
    if differ := differences(tokenizer, other):
        raise SystemExit(
            f"reference_model={path!r} and model_name_or_path={config.model_name_or_path!r} differ "
            f"in {', '.join(differ)}: the same ids would mean different text; give one that shares "
            "the model's tokenizer as --reference_model"
        )
    key = _key(path, run.dtype, parts)
    file = Path(config.output_dir) / FILE
    # Rank 0's look at the file decides for all.
    found = process_group.gather_objects(process_group.is_main() and _key_in(file) == key)[0]
    if not found:
        computed = by_reference(config, parts, tokenizer, run)
        if process_group.is_main():
            _write(file, key, computed)
        process_group.barrier()
    run.say(f"log-probabilities of the reference {path}: {'read from' if found else 'in'} {file}")
    with np.load(file, allow_pickle=False) as kept:
        return {name: _rows(kept[name], rows) for name, rows in parts.items()}


def by_reference(config, parts: dict[str, Sequence], tokenizer, run) -> dict[str, list]:
    """{name: log-probabilities of these rows} by the reference, which is loaded for it and gone
    afterwards."""
    path = config.reference_model or config.model_name_or_path
    loading = dict(dtype=run.dtype, zero_stage=3 if config.zero_stage == 3 else 0)
    model = language_model.load(config.pick(Loading), path, tokenizer=tokenizer, **loading)
    model = zero.frozen(model, **loading, device=run.device, offload=config.offload)
    budget = config.micro_batch_size, config.micro_batch_tokens
    computed = {name: of_all(model, rows, run.device, budget) for name, rows in parts.items()}
    del model
    gc.collect()  # an engine's parts refer to each other
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return computed


def _rows(values: np.ndarray, rows: Sequence[Answers]) -> list[list[float]]:
    ends = np.cumsum([len(row.labels) for row in rows])[:-1]
    return [part.tolist() for part in np.split(values, ends)]


def _key(path: str, dtype: str, parts: dict) -> str:
    """What the numbers depend on: the reference's name and files, those of an adapter's base too,
    the dtype, the rows."""
    folders = [Path(p) for p in (path, base_of(path)) if p]
    files = sorted(p for f in folders if f.is_dir() for p in f.glob("*") if p.is_file())
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    rows = {name: view.fingerprint() for name, view in parts.items()}
    return hashlib.sha256(repr((path, stats, dtype, rows)).encode()).hexdigest()


def _key_in(file: Path) -> str:
    """The key of the numbers in a file; empty where there are none that can be read."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            return str(kept["key"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return ""


def _write(file: Path, key: str, computed: dict[str, list]) -> None:
    flat = {name: np.array([x for row in rows for x in row]) for name, rows in computed.items()}
    with whole_files.placing(file) as beside, open(beside, "wb") as opened:
        np.savez(opened, key=key, **flat)
