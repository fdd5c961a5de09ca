"""The tables of configuration fields, made of `InfLLMConfig` and its field docstrings.

`python -m docs.configuration` brings those of configuration.md and README.md up to date.

A page says where a table stands, and of which fields if not of all:

    <!-- fields: n_local topk -->
    <!-- /fields -->
"""

import re
from pathlib import Path
from typing import Any

from vllm_infllm.config import InfLLMConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "configuration.md", ROOT / "README.md"]
_PLACE = re.compile(r"(<!-- fields:?(.*?) -->\n).*?(<!-- /fields -->)", re.DOTALL)
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def fill_in(page: str) -> str:
    """The text of a page with its tables as they should be."""
    return _PLACE.sub(lambda found: f"{found[1]}{_table(found[2].split())}{found[3]}", page)


def _table(names: list[str]) -> str:
    """A Markdown table of the fields `names`, of all if there are none; KeyError if there is no such field."""
    # block_size is a field of the effective configuration, but no key that a user may give.
    fields = {name: f for name, f in InfLLMConfig.model_json_schema()["properties"].items() if name != "block_size"}
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name in names or fields:
        field = fields[name]
        # A bar would end the cell.
        meaning = " ".join(field["description"].split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field)} | {_default(field['default'])} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type(field: dict[str, Any]) -> str:
    """The type and range of a field, from its JSON schema; null, which no user writes, aside."""
    (field,) = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    return ", ".join([field["type"], *(f"{words} {field[key]:g}" for key, words in _BOUNDS.items() if key in field)])


def _default(value: Any) -> str:
    return "not set" if value is None else f"`{value}`"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill_in(path.read_text()))
