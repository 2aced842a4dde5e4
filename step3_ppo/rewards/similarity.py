"""Likeness to the row's reference, for `--reward_function step3_ppo.rewards.similarity:NAME`.

    chrf         characters' n-grams, by sacrebleu (Popović 2015)
    meteor       words, stems and synonyms, by nltk (Banerjee and Lavie 2005); needs its WordNet
    bert_score   tokens' embeddings by a local model (Zhang et al. 2020)

All are in [0, 1] (bert_score: a cosine). shipped.py has rouge_l and bleu.
"""

import functools
import os

import torch
from sacrebleu.metrics import CHRF

from step3_ppo.rewards.shipped import TOKEN, reference_of

MODEL = "BERTSCORE_MODEL"  # environment variable: a folder, or FOLDER:LAYER


def chrf(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """chrF2 of a sentence, divided by 100."""
    pairs = zip(responses, rows, strict=True)
    metric = CHRF()
    return [metric.sentence_score(r, [reference_of(row)]).score / 100 for r, row in pairs]


def meteor(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """METEOR with nltk's settings, of lower-case words (shipped.TOKEN)."""
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise LookupError(
            "METEOR needs WordNet, which is not there: python -m nltk.downloader wordnet, or put "
            "corpora/wordnet into a folder that the environment variable NLTK_DATA names"
        ) from None
    split = [(_words(reference_of(row)), _words(r)) for r, row in zip(responses, rows, strict=True)]
    return [single_meteor_score(*pair, wordnet=wordnet) for pair in split]


def _words(text: str) -> list[str]:
    return TOKEN.findall(text.lower())


@torch.no_grad()
def bert_score(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """F1 of BERTScore, without idf weights and without rescaling; 0 for an empty answer. The model
    runs where the first GPU is, else on the CPU."""
    tokenizer, model, layer = _bert(os.environ.get(MODEL, ""))

    def embeddings(text: str) -> torch.Tensor:
        """(T,D) of length 1 each, the marks at both ends left out."""
        marks = dict(truncation=True, return_special_tokens_mask=True)
        inputs = tokenizer(text, return_tensors="pt", **marks)
        kept = ~inputs.pop("special_tokens_mask")[0].bool()
        if not kept.any():
            return torch.zeros(0, 1)
        states = model(**inputs.to(model.device), output_hidden_states=True).hidden_states[layer][0]
        return torch.nn.functional.normalize(states.float().cpu()[kept], dim=-1)

    scores = []
    for response, row in zip(responses, rows, strict=True):
        mine, theirs = embeddings(response), embeddings(reference_of(row))
        if not len(mine) or not len(theirs):
            scores.append(0.0)
            continue
        likeness = mine @ theirs.T
        precision, recall = likeness.max(1).values.mean(), likeness.max(0).values.mean()
        scores.append((2 * precision * recall / (precision + recall)).item())
    return scores


@functools.cache
def _bert(named: str):
    """(tokenizer, model, layer; the last where none is named)."""
    from transformers import AutoModel, AutoTokenizer

    folder, _, layer = named.rpartition(":")
    folder, layer = (folder, layer) if layer.isdigit() else (named, "-1")
    if not folder:
        raise ValueError(
            f"bert_score needs a model: set the environment variable {MODEL} to its folder, or to "
            "FOLDER:LAYER (17 of roberta-large is the paper's)"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModel.from_pretrained(folder).eval().to(device), int(layer)
