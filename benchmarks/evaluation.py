"""What docs/results.md and docs/selection.md show: runs of `vllm-infllm eval` on the demo model, hours in all.

Each run has a folder under build/evaluation and goes on where it was cut off. After each of its invocations, its
results are copied to docs/results, and tables and pictures of all of them are made.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.tables import fill_in
from vllm_infllm.selection import RULES
from vllm_infllm.tools import cli
from vllm_infllm.tools.eval import pictures, report
from vllm_infllm.tools.eval.command import DEMO_INFLLM
from vllm_infllm.tools.eval.results import Record
from vllm_infllm.tools.eval.tasks import TASKS
from vllm_infllm.tools.tables import Table

Options = Mapping[str, int]
UNCHANGED: Options = {}
FOLDER, DOCS = Path("build/evaluation"), Path("docs/results")
RULE_ROWS = {
    "full": "full attention",
    "infllm": "`mean`",
    **{f"infllm-{rule}": f"`{rule}`" for rule in RULES},
}
"""By backend, how the table of selection rules calls it."""
VARIANTS: dict[str, tuple[str, Options, Options]] = {
    "representatives": ("`mean`, `repr_topk` 16", {"repr_topk": 16}, {}),
    "units": ("`mean`, blocks of 64, `topk` 16", {"topk": 16}, {"block_size": 64}),
    "question": ("`mean`, `exc_block_size` 64", {"exc_block_size": 64}, {}),
}
"""The paper's rule with as many attended tokens, otherwise configured: its row, and what is set of InfLLM and vLLM."""
TEXTS = {"grass": "passkey", "plays": "passkey-plain", "manual": "passkey-plain"}
"""By haystack, the wording that stock attention answers in it."""
PICTURED = ("full", "streaming", "infllm", "infllm-peak", "infllm-peak-last")
UNPICTURED = ("tasks",)
"""Runs of which a table says all: one depth, one length."""
TIMED = ("grass",)
"""Runs that had a machine to themselves; scores do not depend on it."""
FIRST = ("--backends", "full,infllm,infllm-peak,infllm-peak-last")
"""What tells most."""
INTERIOR = "0.25,0.5,0.75"
"""Where at 4K and beyond the needle is neither initial nor in the window: there a rule decides."""
ELSEWHERE = ("passkey", "passkey-plain", "perplexity")
"""Tasks that have runs of their own."""


def keys(text: str, *more: str, infllm: Options = UNCHANGED, vllm: Options = UNCHANGED) -> list[str]:
    """Arguments of `vllm-infllm eval` for pass keys in a text."""
    return [TEXTS[text], *configured(text, *more, infllm=infllm, vllm=vllm)]


def configured(text: str | None, *more: str, infllm: Options = UNCHANGED, vllm: Options = UNCHANGED) -> list[str]:
    """Arguments for any task, in each benchmark's own text if none is named; float32, the same on every machine."""
    engine = {"dtype": "float32", **vllm}
    haystack = ["--haystack", text] if text else []
    return [
        *haystack,
        "--infllm",
        json.dumps({**DEMO_INFLLM, **infllm}),
        "--engine",
        json.dumps(engine),
        *more,
    ]


def _rules(text: str) -> list[list[str]]:
    """What tells most comes first."""
    all_rules = ("--backends", ",".join(RULE_ROWS))
    return [
        keys(text, "--lengths", "8k", "--depths", INTERIOR, "--samples", "2", *FIRST),
        keys(text, "--lengths", "8k", "--depths", INTERIOR, *all_rules),
        keys(text, "--lengths", "4k,16k", "--depths", INTERIOR, *FIRST),
        keys(text, "--lengths", "4k", "--depths", INTERIOR, *all_rules),
        keys(text, "--lengths", "16k", "--depths", INTERIOR, *all_rules),
    ]


RUNS: dict[str, list[list[str]]] = {
    # Folder: invocations, each of which adds to what the earlier ones left.
    **{f"rules/{text}": _rules(text) for text in ("plays", "grass")},
    "rules/manual": [
        *_rules("manual"),
        # Stock attention takes longest and comes last.
        keys("manual", "--lengths", "32k,64k", "--depths", "0.5", "--backends", ",".join(reversed(RULE_ROWS))),
    ],
    **{
        f"{name}/{text}": [
            keys(text, "--lengths", "8k", "--depths", INTERIOR, infllm=infllm, vllm=vllm),
            keys(text, "--lengths", "4k,16k", "--depths", INTERIOR, infllm=infllm, vllm=vllm),
        ]
        for name, (_, infllm, vllm) in VARIANTS.items()
        for text in TEXTS
    },
    "needles": [
        ["needle-multivalue", "needle-multiquery", *configured("plays", "--lengths", "8k", "--samples", "3", *FIRST)],
    ],
    "perplexity": [
        ["perplexity", *configured("plays", "--lengths", "8k", "--samples", "2", *FIRST)],
    ],
    "grass": [
        keys("grass", "--lengths", "4k", "--samples", "5", "--backends", "full"),
        keys("grass", "--lengths", "4k,8k,16k", "--samples", "5"),
    ],
    "lengths": [
        keys("grass", "--lengths", "4k,8k,16k,32k,64k", "--depths", INTERIOR, "--backends", "infllm,streaming"),
        keys("grass", "--lengths", "4k,8k,16k", "--depths", INTERIOR, "--backends", "full"),
        keys("grass", "--lengths", "32k,64k", "--depths", "0.5", "--backends", "full"),
        keys("grass", "--lengths", "4k,8k,16k,32k,64k", "--depths", INTERIOR, "--backends", "infllm-peak-last"),
    ],
    "tasks": [
        [
            *(task for task in TASKS if task not in ELSEWHERE),
            *configured(None, "--lengths", "4k", "--depths", "0.5", "--samples", "2"),
            *("--backends", "full,streaming,infllm,infllm-peak-last"),
        ],
    ],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what there is")
    args = parser.parse_args(argv)
    if unknown := set(args.runs) - set(RUNS):
        parser.error(f"there is no run {', '.join(sorted(unknown))}; the runs are {', '.join(RUNS)}")
    for name in () if args.tables else args.runs or RUNS:
        for invocation in RUNS[name]:
            if status := evaluate(name, invocation):
                parser.exit(status)
    write_tables()


def evaluate(name: str, invocation: Sequence[str]) -> int:
    """Go on with a run, and show what it gave; returns the exit status of `vllm-infllm eval`."""
    if status := cli.main(["eval", *invocation, "--output", str(FOLDER / name)]):
        return status
    # Not settings.json, which names the model's folder.
    (DOCS / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(FOLDER / name / "results.jsonl", DOCS / name)
    write_tables()
    return 0


def write_tables() -> None:
    """Fill in the two pages from what lies in docs/results, and draw its pictures."""
    found = {name: _records(name) for name in RUNS if (DOCS / name / "results.jsonl").exists()}
    shown = {name.removeprefix("rules/"): name for name in found if name.split("/")[0] not in VARIANTS}
    results = {
        section: _tables(found[name], timed=name in TIMED) for section, name in shown.items() if name != "rules/grass"
    }
    pages = {
        Path("docs/results.md"): results,
        Path("docs/selection.md"): {"selection": rules(found).markdown()},
    }
    for page, sections in pages.items():
        page.write_text(fill_in(page.read_text(), sections))
    for section in results.keys() - set(UNPICTURED):
        pictured = [record for record in found[shown[section]] if record.backend in PICTURED]
        pictures.draw(pictured, DOCS / shown[section])


def _tables(records: list[Record], timed: bool) -> str:
    tables = [report.scores(records), report.retrieved(records), *([report.times(records)] if timed else [])]
    return "\n\n".join(f"{table.title}:\n\n{table.markdown()}" for table in tables if table.rows)


def _records(name: str) -> list[Record]:
    lines = (DOCS / name / "results.jsonl").read_text().splitlines()
    order = [*RULE_ROWS, "streaming"]
    records = (Record(**json.loads(line)) for line in lines)
    return sorted(records, key=lambda one: (one.task, order.index(one.backend), one.length))


def rules(by_run: Mapping[str, list[Record]]) -> Table:
    """A row a rule or variant, a column a text and length: keys found, share of layers and steps that retrieve them.

    Keys that no rule has to retrieve do not count; stock attention is the row to compare with.
    """
    rows = [("rules", backend, label) for backend, label in RULE_ROWS.items()]
    rows += [(name, "infllm", label) for name, (label, _, _) in VARIANTS.items()]
    columns = [
        (text, length)
        for text in TEXTS
        for length in sorted({record.length for record in by_run.get(f"rules/{text}", [])})
    ]
    cells = [
        [
            _found([one for one in by_run.get(f"{run}/{text}", []) if (one.backend, one.length) == (backend, length)])
            for text, length in columns
        ]
        for run, backend, _ in rows
    ]
    table = [[label, *row] for (_, _, label), row in zip(rows, cells, strict=True)]
    return Table("", ["rule", *(f"{text}, {length // 1024}K" for text, length in columns)], table)


def _found(records: list[Record]) -> str:
    """Keys found, of those that have to be retrieved if some were; in how many of layers and steps they were."""
    retrieved = [one for one in records if one.retrieved is not None]
    found = f"{sum(one.score or 0 for one in retrieved or records):.0f} of {len(retrieved or records)}"
    share = f", {mean(one.retrieved or 0 for one in retrieved):.0%}" if retrieved else ""
    return found + share if records else ""


if __name__ == "__main__":
    main()
