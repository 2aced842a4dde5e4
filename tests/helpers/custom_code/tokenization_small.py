import json
import os

from transformers import PreTrainedTokenizer


class SmallTokenizer(PreTrainedTokenizer):
    """Bytes and some words, from a file of its own kind. No special token at all."""

    vocab_files_names = {"vocab_file": "small.vocab"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        with open(vocab_file, encoding="utf-8") as file:
            self.words = json.load(file)
        self.names = [f"<{byte:02x}>" for byte in range(256)] + self.words
        self.ids = {name: i for i, name in enumerate(self.names)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.names)

    def get_vocab(self):
        return self.ids | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        found = []
        while text:
            word = next((w for w in self.words if text.startswith(w)), None)
            first = word or text[0]
            found += [word] if word else [f"<{byte:02x}>" for byte in first.encode()]
            text = text[len(first) :]
        return found

    def _convert_token_to_id(self, token):
        return self.ids[token]

    def _convert_id_to_token(self, index):
        return self.names[index] if index < len(self.names) else "<3f>"

    def convert_tokens_to_string(self, tokens):
        parts = [
            bytes.fromhex(t[1:-1]) if t in self.ids and self.ids[t] < 256 else t.encode()
            for t in tokens
        ]
        return b"".join(parts).decode(errors="replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, self.vocab_files_names["vocab_file"])
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.words, file, ensure_ascii=False)
        return (path,)
