"""An adapter folder → a whole model's folder, which needs no base.

    python -m utils.models.merge ADAPTER OUT

The sum is made in fp32 and rounded once, to the dtype in which the base is stored (or --dtype). In
bf16 that rounding is of the size of small adapters: what the merged model says differs by it.
"""

import argparse
from pathlib import Path

from utils import whole_files
from utils.data import chat_template
from utils.distributed import zero
from utils.distributed.program import quiet_libraries, run
from utils.models import adapters, loading, model_code
from utils.pretrained import base_of, config_to_read


def write(path: str | Path, folder: str | Path, trust_remote_code: bool, dtype: str = "auto"):
    """Write the model of the adapter folder `path` to `folder`, which may be the same."""
    from transformers import AutoModelForCausalLM

    path = str(path)
    base = base_of(path)
    if base is None:
        raise SystemExit(f"{path!r} holds no adapter (adapter_config.json): nothing to merge")
    tokenizer = chat_template.load_tokenizer(path, trust_remote_code)
    scored, given = adapters.is_scored(path), {}
    if scored:
        given["config"] = config_to_read(path, trust_remote_code, num_labels=1)
    model = loading.load_whole(
        model_code.scalar_class(given["config"]) if scored else AutoModelForCausalLM,
        base,
        dtype=zero.DTYPES.get(dtype, "auto"),
        trust_remote_code=trust_remote_code,
        **given,
    )
    loading.fit_to_tokenizer(model, tokenizer, base)
    adapters.put_on(model, path, adapters.Lora())
    with whole_files.folder_beside(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        model_code.save(beside, model, tokenizer)
        whole_files.move_into(beside, Path(folder), stale=whole_files.WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapter", help="folder or hub name that names its base")
    parser.add_argument("out", help="folder of the whole model")
    parser.add_argument("--dtype", choices=("auto", *zero.DTYPES), default="auto")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the base")
    flags = parser.parse_args()
    quiet_libraries()
    write(flags.adapter, flags.out, flags.trust_remote_code, flags.dtype)
    print(f"{flags.out}: {flags.adapter} merged into {base_of(flags.adapter) or 'its base'}")


if __name__ == "__main__":
    run(main)
