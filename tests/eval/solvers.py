"""For every task, the answer read off the text of a prompt, by other means than those that made it."""

import re
from collections import Counter
from collections.abc import Callable
from statistics import median


def passkey(text: str) -> str:
    return _only(re.findall(r"pass key is (\d+)\.", text))


def number(text: str) -> str:
    return _only(re.findall(r"sequence of digits is (\d+)\.", text))


def kv(text: str) -> str:
    key = _only(re.findall(r'\nKey: "(.*)"\n', text))
    return _only(re.findall(f'"{key}": "(.*?)"', text))


def math_find(text: str) -> str:
    numbers = [int(n) for n in text[text.index("[") + 1 : text.index("]")].split(", ")]
    which = re.match(r"\w+ the (.*) number from", text)
    assert which
    if which[1] == "median":
        return str(median(numbers))
    rank = {"second": 1, "third": 2}.get(which[1].split()[0], 0)
    return str(sorted(set(numbers))[rank if which[1].endswith("smallest") else -1 - rank])


def code_run(text: str) -> str:
    """Python's own answer."""
    functions: dict[str, Callable[[int], int]] = {}
    exec(text[text.index("def ") : text.index("Please compute")], functions)
    call = re.search(r"The value of (func_\d+)\((-?\d+)\) is$", text)
    assert call
    return str(functions[call[1]](int(call[2])))


def needles(text: str) -> str:
    context, question = text.rsplit("\nWhat ", 1)
    asked = re.findall(r"[a-z]+-[a-z]+", question.split(" mentioned")[0])
    hidden = re.findall(r"magic numbers for ([a-z]+-[a-z]+) is: (\d+)", context)
    return ", ".join(value for key, value in hidden if key in asked)


def variables(text: str) -> str:
    text = text[text.rindex("Memorize and track") :]
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        values[name] = values.get(value, value)
    wanted = re.search(r"assigned the value (\d+) in", text)
    assert wanted
    return " ".join(name for name, value in values.items() if value == wanted[1])


def common_words(text: str) -> str:
    listed = re.findall(r"\d+\. (\w+)", text[text.rindex("Memorize the ones") : text.rindex("Question")])
    return " ".join(word for word, _ in Counter(listed).most_common(10))


def frequent_words(text: str) -> str:
    context = text[text.index("coded words. ") + 13 : text.index("\nQuestion")]
    ranked = Counter(word for word in context.split() if word != "...").most_common(3)
    return " ".join(word for word, _ in ranked)


SOLVERS: dict[str, Callable[[str], str]] = {
    "passkey": passkey,
    "passkey-plain": passkey,
    "number": number,
    "kv": kv,
    "math-find": math_find,
    "code-run": code_run,
    "needle-single": needles,
    "needle-multikey": needles,
    "needle-multivalue": needles,
    "needle-multiquery": needles,
    "variable-tracking": variables,
    "common-words": common_words,
    "frequent-words": frequent_words,
}


def solve(text: str) -> str:
    """The answer to a prompt of any task, or nothing: found by the words of the prompt."""
    for task, words in {
        "passkey": "The pass key is",
        "number": "The sequence of digits is",
        "kv": "JSON object below",
        "needle-single": "special magic number",
        "variable-tracking": "Memorize and track",
    }.items():
        if words in text[-400:] or text.startswith(words):
            return SOLVERS[task](text)
    return ""


def _only(found: list[str]) -> str:
    (one,) = found
    return one
