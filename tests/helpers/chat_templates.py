"""Chat templates with the habits of models that people bring, in our own words, and tokenizers
that know their special tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Turns meet at special tokens: by hand a text is encoded whole, in the code turn by turn.
AT_SPECIAL_TOKENS = (
    "{% for m in messages %}{{ m.role + '<|im_start|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|im_end|>' }}{% else %}{{ '|' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant<|im_start|>' }}{% endif %}"
)

# As Qwen3's: thoughts stand before the last answer, empty ones too, and earlier answers lose them.
QWEN3 = r"""{%- for m in messages -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\n') -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.last -%}
{%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1] -%}
{%- set thoughts = thoughts if '</think>' in m.content else '' -%}
{{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + said -}}
{%- elif m.role == 'assistant' -%}{{- said -}}
{%- else -%}{{- m.content -}}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# As DeepSeek-R1's: a prompt opens the thoughts, and no rendered answer has any.
R1 = r"""{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}
{%- else -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}"""

# As Llama-3.2's: the system turn is always there and states the day.
LLAMA32 = r"""{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' -%}
{{- bos_token + '<|head|>system<|/head|>\n\nToday Date: ' + today + '\n\n' -}}
{{- (messages[0].content if messages[0].role == 'system' else '') + '<|eot|>' -}}
{%- for m in rest -%}
{{- '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|head|>assistant<|/head|>\n\n' -}}{%- endif -%}"""

# As Gemma's: no system turn, the assistant is called model, texts are trimmed.
GEMMA = r"""{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' -}}
{{- m.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""

# As Mistral's: the system turn stands in front of the last question, so it moves from turn to turn.
MISTRAL = r"""{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}
{%- set last = rest | selectattr('role', 'equalto', 'user') | list | last -%}
{{- bos_token -}}
{%- for m in rest -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + (system if m == last else '') + m.content + '[/INST]' -}}
{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}
{%- endfor -%}"""

TEMPLATES = {"qwen3": QWEN3, "r1": R1, "llama3.2": LLAMA32, "gemma": GEMMA, "mistral": MISTRAL}
STOPS = {
    "qwen3": "<|im_end|>",
    "r1": "<|end|>",
    "llama3.2": "<|eot|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}
SPECIAL = (
    "<|im_start|> <|User|> <|Assistant|> <|head|> <|/head|> <start_of_turn> [INST] [/INST]".split()
    + list(STOPS.values())
)


def byte_level(merges=()):
    """Bytes as tokens, as in GPT-2 and Qwen, and no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocab = {text: i for i, text in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def put_in_front(tokenizer, *start: str) -> None:
    """Let the tokenizer put special tokens before every text, as Llama's, Gemma's and GLM's do."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(start)})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in start],
    )


def with_template(name: str, tokenizer=None):
    """A tokenizer (bytes, unless given) with the template of that name, its special tokens, and
    where the template has a BOS one that it puts before every text."""
    tokenizer = tokenizer or byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token = STOPS[name]
    if name != "qwen3":
        tokenizer.bos_token = "<s>"
        put_in_front(tokenizer, "<s>")
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer
