"""Tables, for the terminal and for Markdown, and the places of a Markdown file that the benchmark writes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells; all columns but the first hold figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


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
