"""A small Llama-shaped model with random weights and a sentencepiece tokenizer trained on text.

    python -m utils.models.from_scratch --output_dir FOLDER --data FILE [FILE …] --vocab_size 768

For machines without a hub: the embedded run and from-scratch runs on real data start here.
"""

import argparse
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from utils import whole_files
from utils.data import chat_template, comparisons, demonstrations, rows
from utils.distributed.program import quiet_libraries, run
from utils.settings.run_config import columns_of

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
# One token each: they stand in every rendered turn, and a small vocabulary would spell them out.
TEMPLATE_WORDS = ["system", "user", "assistant"]


def texts_of(names: Iterable[str], columns: Mapping[str, str] | None = None) -> Iterator[str]:
    """Every message and answer in the data sets, whatever their schema. columns: as --columns."""
    for name in names:
        bad = rows.BadRows(1.0)
        try:
            for row in comparisons.load_comparisons([name], columns=columns, bad=bad):
                yield from (m["content"] for m in row.prompt)
                yield from row.responses
            continue
        except rows.DataError:
            pass  # not a preference set
        bad = rows.BadRows(1.0)
        for row in demonstrations.load_conversations([name], columns=columns, bad=bad):
            yield from (m["content"] for m in row.messages)


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A BPE tokenizer with byte fallback: any text encodes, and decodes to itself.

    sentencepiece trains it; it is saved in the `tokenizers` format, which `AutoTokenizer` loads.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=100_000,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=["\n", *TEMPLATE_WORDS, *SPECIAL],
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.get_piece_size())}
    merges = generate_merges(vocab, scores)
    backend = Tokenizer(
        BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    # No merges lead to sentencepiece's user-defined symbols: here they are added tokens.
    backend.add_tokens([AddedToken(word, normalized=False) for word in TEMPLATE_WORDS])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        extra_special_tokens=SPECIAL[1:2],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template.CHATML
    return tokenizer


def build(
    folder,
    texts: Iterable[str],
    *,
    vocab_size: int = 8192,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    intermediate_size: int = 344,
    max_positions: int = 2048,
    seed: int = 42,
) -> None:
    """Write tokenizer and randomly initialised weights to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, vocab_size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with whole_files.folder_beside(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        whole_files.move_into(beside, Path(folder), stale=whole_files.WEIGHTS)
    count = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {count:,} random weights, {len(tokenizer)} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="data sets whose text to learn")
    parser.add_argument("--columns", nargs="*", default=[], help="as in the steps' --columns")
    sizes = build.__kwdefaults__
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    quiet_libraries()
    texts = texts_of(flags.data, columns_of(flags.columns))
    build(flags.output_dir, texts, **{name: getattr(flags, name) for name in sizes})


if __name__ == "__main__":
    run(main)
