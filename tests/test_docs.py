"""The documentation says what the code does: drawings, configuration tables, messages, links, programs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from docs import configuration, drawings
from tests.messages import ROOT, stable_parts
from tests.oracle import OracleConfig, visible_tokens
from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.plugin import SUPPORTED_VLLM

PAGES = sorted(ROOT.glob("docs/*.md"))


def squeezed(text: str) -> str:
    """Without line breaks and marks of code."""
    return " ".join(text.replace("`", "").split())


# ---- drawings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_init", [0, 32])
def test_what_is_drawn_is_what_the_oracle_sees(n_init: int) -> None:
    """Every query of a text: the spans drawn hold the tokens of each part, each once."""
    geometry = Geometry(block_size=16, n_init=n_init, n_local=64, exc_block_size=48)
    config = OracleConfig(block_size=16, n_init=n_init, n_local=64, topk=2, repr_topk=1, exc=48)
    for s, e in geometry.execution_blocks(0, 400, 300):
        chosen = sorted({0, geometry.sealed_units(s) // 2}) if geometry.sealed_units(s) else []
        visible = visible_tokens(config, s, e, chosen)
        for t in range(s, e):
            spans = drawings.seen(geometry, s, t, chosen)
            assert sum(span.end - span.start for span in spans) == len(tokens(spans))
            for part in ("local", "initial", "remainder", "retrieved"):
                expected = set(torch.nonzero(getattr(visible, part)[t - s])[:, 0].tolist())
                assert tokens([span for span in spans if span.part == part]) == expected, (part, s, t)


def tokens(spans: list[drawings.Span]) -> set[int]:
    return {token for span in spans for token in range(span.start, span.end)}


def test_drawings_are_current(tmp_path: Path) -> None:
    """`python -m docs.drawings` would change nothing; and each is shown."""
    pages = "".join(page.read_text() for page in PAGES)
    for drawn in drawings.draw(tmp_path):
        assert drawn.read_text() == (drawings.FOLDER / drawn.name).read_text(), f"run python -m docs.drawings: {drawn}"
        assert f"(drawings/{drawn.name})" in pages


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", configuration.PAGES, ids=lambda page: page.name)
def test_configuration_tables_are_current(page: Path) -> None:
    text = page.read_text()
    assert "<!-- /fields -->" in text
    assert configuration.fill_in(text) == text, "run python -m docs.configuration"


def test_a_table_follows_the_code() -> None:
    """Type, range, default and docstring of a field, of those that the page names only."""
    filled = configuration.fill_in("<!-- fields: topk cache_strategy -->\nold\n<!-- /fields -->\n")
    assert "| `topk` | integer, at least 0 | `16` | Units retrieved" in filled
    assert "| `cache_strategy` | `lru`, `fifo`, `lru-s` | `lru` |" in filled
    assert "old" not in filled and "n_local" not in filled
    with pytest.raises(KeyError, match="top_k"):
        configuration.fill_in("<!-- fields: top_k -->\n<!-- /fields -->\n")


def test_every_message_is_explained() -> None:
    """What does not depend on values in each refusal and log line of the plugin stands in troubleshooting.md."""
    page = squeezed((ROOT / "docs" / "troubleshooting.md").read_text())
    parts = stable_parts()
    assert len(parts) > 50
    missing = {part: place for part, place in parts.items() if squeezed(part) not in page}
    assert not missing


def test_supported_versions_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = re.findall(r"^\| (\d+\.\d+) \| yes", page, re.MULTILINE)
    assert rows == [f"{major}.{minor}" for major, minor in SUPPORTED_VLLM]


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the site are checked when it is built (make docs). External ones are looked at, not followed."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", link), link
        else:
            assert (ROOT / path).exists(), link
            assert not anchor or anchor in anchors(ROOT / path), link


def anchors(page: Path) -> set[str]:
    """The anchors that headings of a page get."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_faults_in_pages_fail_the_build(tmp_path: Path) -> None:
    """The command of `make docs`, on the site with bad links and with a page that no menu leads to."""
    (command,) = re.findall(r"mkdocs (build .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for folder in ("docs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "docs" / "lost.md").touch()
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[a](gone.md) [b](serving.md#gone) [c](../README.md) [d](/index.md)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Aborted with 5 warnings in strict mode" in said, said
    assert all(fault in said for fault in ("lost.md", "gone.md", "#gone", "../README.md", "/index.md"))


def test_programs_are_shown_and_named() -> None:
    """Each example is on its page; what the site and the README name of the repository is there."""
    page = (ROOT / "docs" / "examples.md").read_text()
    for program in ROOT.glob("examples/*.py"):
        assert f'--8<-- "examples/{program.name}"' in page
    for text in [ROOT / "README.md", *PAGES]:
        named = re.findall(
            r"`((?:vllm_infllm|tests|examples|docs|csrc|benchmarks|requirements)/[\w./-]+)`", text.read_text()
        )
        assert [name for name in named if not (ROOT / name).exists()] == [], text
