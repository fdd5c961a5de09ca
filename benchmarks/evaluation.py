"""What docs/results.md and docs/selection.md show: runs of `vllm-infllm eval` on the demo model, hours in all.

Each run has a folder under build/evaluation and goes on where it was cut off. After each of its invocations, its
results are copied to docs/results, and tables and pictures of all of them are made.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.tables import fill_in
from vllm_infllm.selection import RULES
from vllm_infllm.tools import cli
from vllm_infllm.tools.eval import pictures, report
from vllm_infllm.tools.eval.results import Record
from vllm_infllm.tools.tables import Table

FOLDER, DOCS = Path("build/evaluation"), Path("docs/results")
RULE_ROWS = {
    "full": "full attention",
    "infllm": "`mean`",
    **{f"infllm-{rule}": f"`{rule}`" for rule in RULES},
}
"""By backend, how the table of selection rules calls it."""
PROSE = ("plays", "manual")
INTERIOR = "--depths 0.25,0.5,0.75"
"""Where at 4K and beyond the needle is neither initial nor in the window: there a rule decides."""

RUNS: dict[str, list[str]] = {
    # Folder: invocations, each of which adds to what the earlier ones left; what says most comes first.
    **{
        text: [
            f"passkey --haystack {text} --lengths 8k {INTERIOR} --backends full,infllm,infllm-peak",
            f"passkey --haystack {text} --lengths 8k {INTERIOR} --backends {','.join(RULE_ROWS)}",
            f"passkey --haystack {text} --lengths 4k,16k {INTERIOR} --backends {','.join(RULE_ROWS)}",
        ]
        for text in PROSE
    },
    "grass": [
        "passkey --lengths 4k --samples 5 --backends full",
        "passkey --lengths 4k,8k,16k --samples 5",
        "passkey --lengths 4k,8k,16k --backends streaming,full",
        "passkey --lengths 32k,64k --depths 3 --backends infllm,streaming",
    ],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what there is")
    args = parser.parse_args(argv)
    for name in () if args.tables else args.runs or RUNS:
        for invocation in RUNS[name]:
            if status := cli.main(["eval", *invocation.split(), "--output", str(FOLDER / name)]):
                parser.exit(status)
            # Not settings.json, which names the model's folder.
            (DOCS / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(FOLDER / name / "results.jsonl", DOCS / name)
            pictures.draw(_records(name), DOCS / name)
            write_tables()
    write_tables()


def write_tables() -> None:
    """Fill in the two pages from what lies in docs/results."""
    found = {name: _records(name) for name in RUNS if (DOCS / name / "results.jsonl").exists()}
    pages = {
        Path("docs/results.md"): {name: _tables(records) for name, records in found.items()},
        Path("docs/selection.md"): {
            "selection": rules({name: records for name, records in found.items() if name in PROSE}).markdown()
        },
    }
    for page, sections in pages.items():
        page.write_text(fill_in(page.read_text(), sections))


def _tables(records: list[Record]) -> str:
    tables = (report.scores(records), report.retrieved(records), report.times(records))
    return "\n\n".join(f"{table.title}:\n\n{table.markdown()}" for table in tables)


def _records(name: str) -> list[Record]:
    lines = (DOCS / name / "results.jsonl").read_text().splitlines()
    return sorted((Record(**json.loads(line)) for line in lines), key=lambda one: (one.task, one.backend, one.length))


def rules(by_text: dict[str, list[Record]]) -> Table:
    """A row a rule, a column a text and length: keys found, share of layers and steps that retrieve them.

    Keys that no rule has to retrieve do not count; stock attention is the row to compare with.
    """
    columns = sorted({(text, record.length) for text, records in by_text.items() for record in records})
    rows = []
    for backend, name in RULE_ROWS.items():
        row = [name]
        for text, length in columns:
            cell = [one for one in by_text[text] if (one.backend, one.length) == (backend, length)]
            row.append(_found(cell if backend == "full" else [one for one in cell if one.retrieved is not None]))
        rows.append(row)
    return Table("", ["rule", *(f"{text}, {length:,} tokens" for text, length in columns)], rows)


def _found(records: list[Record]) -> str:
    if not records:
        return ""
    shares = [one.retrieved for one in records if one.retrieved is not None]
    found = f"{sum(one.score or 0 for one in records):.0f} of {len(records)}"
    return f"{found}, {mean(shares):.0%}" if shares else found


if __name__ == "__main__":
    main()
