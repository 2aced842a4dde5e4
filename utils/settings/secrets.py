"""Tokens, keys and passwords, which belong into the environment and not into logs and files."""

import re

# Access tokens of Hugging Face, OpenAI and Anthropic, GitHub, Amazon; a password in an address.
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)


def hidden(text: str) -> str:
    """The text without what looks like a secret."""
    return SECRET.sub("(secret)", text)
