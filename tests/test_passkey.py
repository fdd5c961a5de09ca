"""Pass-key prompts have the length, the depth and the wording that were asked for."""

import pytest

from vllm_infllm.tools.model import demo_model
from vllm_infllm.tools.passkey import FILLER, QUESTION, TASK, passkey_prompt

KEY = 68302


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model(), model_max_length=1 << 20)


@pytest.mark.parametrize("num_tokens", [200, 1024, 1025, 16384])
def test_as_long_as_whole_lines_allow(tokenizer, num_tokens):
    """Never longer than asked, and one more line of filler would be."""
    length = len(passkey_prompt(tokenizer, num_tokens, 0.3, KEY))
    assert num_tokens - len(tokenizer.encode(FILLER)) < length <= num_tokens


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_key_lies_at_its_depth(tokenizer, depth):
    """The share of the filler in front of the key is the depth, to within one line."""
    text = tokenizer.decode(passkey_prompt(tokenizer, 4096, depth, KEY))
    before, after = text.split("\nThe pass key is", 1)[0].count(FILLER), text.count(FILLER)
    assert abs(before - depth * after) <= 0.5


def test_wording(tokenizer):
    """Task first, question last, the key twice in one sentence pair, filler everywhere else."""
    text = tokenizer.decode(passkey_prompt(tokenizer, 1024, 0.5, KEY))
    needle = f"\nThe pass key is {KEY}. Remember it. {KEY} is the pass key.\n"
    assert text.startswith(TASK) and text.endswith(QUESTION) and text.count(needle) == 1
    assert text.removeprefix(TASK).removesuffix(QUESTION).replace(needle, "").replace(FILLER, "") == ""


def test_same_arguments_same_prompt(tokenizer):
    """A prompt is a function of its arguments, and only the digits depend on the key."""
    first, again, other = (passkey_prompt(tokenizer, 2048, 0.4, key) for key in (KEY, KEY, 91547))
    assert first == again
    assert len(first) == len(other) and sum(a != b for a, b in zip(first, other, strict=True)) == 2 * 5


@pytest.mark.parametrize(
    ("num_tokens", "depth", "key", "message"),
    [
        (10, 0.5, KEY, "at least"),
        (1024, 1.5, KEY, "depth 1.5"),
        (1024, -0.1, KEY, "depth -0.1"),
        (1024, 0.5, 1234, "five digits"),
    ],
)
def test_bad_arguments_are_named(tokenizer, num_tokens, depth, key, message):
    with pytest.raises(ValueError, match=message):
        passkey_prompt(tokenizer, num_tokens, depth, key)
