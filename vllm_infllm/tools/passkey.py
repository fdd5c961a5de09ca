"""Pass-key prompts: a five-digit number hidden at a chosen depth of a long and repetitive text.

The wording is that of "Landmark Attention" (arXiv 2305.16300), which InfLLM's own evaluation uses too.
"""

from typing import Protocol

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


class Tokenizer(Protocol):
    """What is asked of a tokenizer: Hugging Face's do it."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, with the special tokens that the model expects at its start."""


def passkey_prompt(tokenizer: Tokenizer, num_tokens: int, depth: float, key: int) -> list[int]:
    """Token ids of the longest prompt of at most `num_tokens` tokens that has `key` at `depth` of its filler.

    Depth 0 is before all filler, 1 after it. The filler comes in whole lines, so the prompt is less than one line short
    of `num_tokens`.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth {depth} is not between 0 and 1")
    if not 10000 <= key <= 99999:
        raise ValueError(f"pass key {key} has not five digits")

    def tokens(lines: int) -> list[int]:
        before = round(depth * lines)
        return tokenizer.encode(
            TASK + FILLER * before + NEEDLE.format(key=key) + FILLER * (lines - before) + QUESTION,
        )

    empty = len(tokens(0))
    if num_tokens < empty:
        raise ValueError(f"a pass-key prompt takes at least {empty} tokens, and {num_tokens} were asked for")
    tokens_per_line = (len(tokens(16)) - empty) / 16
    lines = int((num_tokens - empty) / tokens_per_line) + 1
    while len(prompt := tokens(lines)) > num_tokens:
        lines -= 1
    return prompt
