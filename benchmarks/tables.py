"""The places of a Markdown file that the benchmark writes."""

import re
from collections.abc import Mapping


def fill_in(text: str, sections: Mapping[str, str]) -> str:
    """Replace what stands between `<!-- bench:NAME -->` and `<!-- /bench -->` in `text`; all else stays as it is.

    A section that `text` has no place for is added at its end, so that no figure is lost.
    """
    for name, section in sections.items():
        place = re.compile(rf"(<!-- bench:{re.escape(name)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
        if not place.search(text):
            text = f"{text.rstrip()}\n\n<!-- bench:{name} -->\n<!-- /bench -->\n"
        text = place.sub(lambda found, section=section: f"{found[1]}{section}\n{found[2]}", text, count=1)  # type: ignore[misc]
    return text
