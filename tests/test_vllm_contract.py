"""The plugin's contract with vLLM (tests/vllm_contract.py) holds in the installed vLLM and in all other supported ones.

Those are not installed: their sources are read out of the wheel, which is downloaded once. What is kept of it, a zip of
the sources, lies in the user's cache folder.
"""

import ast
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

import vllm_infllm
from tests.vllm_contract import CONTRACT, Entry, Index, Place, Sources, differences, parse_contract
from vllm_infllm.plugin import SUPPORTED_VLLM
from vllm_infllm.tools.model import cache_folder

# The release that stands for each supported vLLM.
RELEASES = {(0, 32): "0.32.0", (0, 33): "0.33.0"}
INSTALLED = "installed"
DOWNLOAD_SECONDS = 1500


def installed() -> Sources:
    """The vLLM that the tests run with, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations, "the tests need vLLM: pip install 'vllm-infllm[cpu]'"
    root = Path(spec.submodule_search_locations[0]).parent

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text() if file.is_file() else None

    def paths() -> list[str]:
        return [file.relative_to(root).as_posix() for file in (root / "vllm").rglob("*.py")]

    return Sources(_version(read), functools.cache(read), paths)


def released(version: str) -> Sources:
    """A vLLM release, downloaded if it has not been yet."""
    folder = cache_folder() / "wheels"
    file = folder / f"vllm-{version}-sources.zip"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"vllm-{version}.lock"):
        if not file.exists():
            _download(version, file)
    archive = zipfile.ZipFile(file)
    names = frozenset(archive.namelist())

    def read(path: str) -> str | None:
        return archive.read(path).decode() if path in names else None

    return Sources(_version(read), functools.cache(read), lambda: names)


def _download(version: str, file: Path) -> None:
    """Keep the Python sources of a release's wheel in `file`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
        command += ["--dest", scratch, f"vllm=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            status, said = f"exit status {done.returncode}", done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            status, said = f"no end after {DOWNLOAD_SECONDS} s", ""
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            end = "\n".join(said.splitlines()[-10:])
            pytest.fail(
                f"vLLM {version} is supported but not installed, so its wheel has to be read, and it could not be "
                f"downloaded ({status}): {' '.join(command)}\n{end}\nRepeat the test where the package index can be "
                f"reached; what it keeps is {file}.",
                pytrace=False,
            )
        kept = Path(scratch, file.name)
        with zipfile.ZipFile(wheels[0]) as wheel, zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as sources:
            for name in wheel.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    sources.writestr(name, wheel.read(name))
        os.replace(kept, file)


def _version(read: Callable[[str], str | None]) -> str:
    """vllm.version.__version__, without its local part."""
    for node in ast.parse(read("vllm/_version.py") or "").body:
        if isinstance(node, ast.Assign) and any(ast.unparse(t) == "__version__" for t in node.targets):
            return str(ast.literal_eval(node.value)).partition("+")[0]
    raise AssertionError("vllm/_version.py does not say __version__")


def test_there_is_a_release_for_every_supported_vllm() -> None:
    assert set(RELEASES) == set(SUPPORTED_VLLM)
    assert installed().minor in SUPPORTED_VLLM


@pytest.mark.timeout(DOWNLOAD_SECONDS + 300)
@pytest.mark.parametrize("version", [INSTALLED, *(v for minor, v in RELEASES.items() if minor != installed().minor)])
def test_vllm_keeps_the_contract(version: str) -> None:
    found = differences(installed() if version == INSTALLED else released(version))
    assert not found, f"{len(found)} differences from tests/vllm_contract.py:\n" + "\n".join(found)


# ---- nothing is forgotten -----------------------------------------------------------------------------------------


def plugin_modules() -> dict[str, ast.Module]:
    """The plugin's sources by module name."""
    root = Path(vllm_infllm.__file__).parent
    files = {f.relative_to(root.parent).with_suffix("").as_posix().replace("/", "."): f for f in root.rglob("*.py")}
    return {name: ast.parse(file.read_text()) for name, file in files.items()}


def imported_names() -> Iterator[tuple[str, str, str]]:
    """What the plugin imports of vLLM: (our module, vLLM's module, name)."""
    for ours, tree in plugin_modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from ((ours, node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((ours, a.name, "") for a in node.names if a.name.partition(".")[0] == "vllm")


def test_every_import_of_vllm_is_in_the_contract() -> None:
    """`import vllm...` has no name that the contract could hold: the plugin has to use `from vllm... import`."""
    known = {f"{entry.module}:{entry.path[0]}" for entry in CONTRACT}
    missing = [f"{ours} imports {module}:{name}" for ours, module, name in imported_names()]
    missing = [line for line in missing if line.partition(" imports ")[2] not in known]
    assert not missing, "not in tests/vllm_contract.py: " + "; ".join(missing)


@pytest.mark.parametrize(("module", "name"), sorted({(m, n) for _, m, n in imported_names()}))
def test_import_works(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def derived_classes(index: Index) -> Iterator[tuple[str, list[ast.ClassDef], list[Place]]]:
    """Our classes that derive from vLLM's: (name, the class and its bases that are ours, bases that are vLLM's)."""
    classes = {
        node.name: node for tree in plugin_modules().values() for node in tree.body if type(node) is ast.ClassDef
    }
    origins = {name: module for _, module, name in imported_names()}

    def bases(node: ast.ClassDef) -> tuple[list[ast.ClassDef], list[Place]]:
        ours, theirs = [node], []
        for name in (ast.unparse(base).partition("[")[0] for base in node.bases):
            if name in classes:
                more, others = bases(classes[name])
                ours, theirs = [*ours, *more], [*theirs, *others]
            elif name in origins and (place := index.find(origins[name], name)):
                theirs += index.bases(place)
        return ours, theirs

    for name, node in classes.items():
        ours, theirs = bases(node)
        if theirs:
            yield name, ours, theirs


def test_everything_that_our_classes_override_is_in_the_contract() -> None:
    index = Index(installed())
    known: dict[str, set[str]] = {}
    for entry in CONTRACT:
        names = {*entry.overrides, *(name for text in entry.given("has") for name in text.split())}
        known.setdefault(entry.path[0], set()).update(names)
    missing = []
    for name, ours, theirs in derived_classes(index):
        listed = set().union(*(known.get(place.node.name, set()) for place in theirs))
        members = {n for node in ours for n in index.members(Place(index, "", node))}
        inherited = {n for place in theirs for n in index.members(place)}
        missing += [f"{name}.{n}" for n in sorted((members & inherited) - listed)]
    assert not missing, "overridden or set, and not in tests/vllm_contract.py: " + ", ".join(missing)


def test_retained_tokens_fit_where_vllm_puts_them() -> None:
    """vLLM 0.33 puts them into an int32 tensor, one for each KV cache group (BlockTables)."""
    import torch

    from vllm_infllm.config import InfLLMConfig
    from vllm_infllm.memory.manager import InfLLMSpec

    config = InfLLMConfig()
    spec = InfLLMSpec(
        block_size=config.block_size,
        num_kv_heads=1,
        head_size=64,
        dtype=torch.float32,
        sliding_window=config.n_local,
        geometry=config.geometry,
        kept_blocks=config.kept_blocks,
    )
    assert int(torch.tensor([spec.num_retained_tokens], dtype=torch.int32)[0]) > 100_000_000


# ---- the checker does fail ----------------------------------------------------------------------------------------

SCHEDULER = "vllm/v1/core/sched/scheduler.py"
SCHEDULER_ENTRIES = tuple(entry for entry in CONTRACT if entry.name.startswith("vllm.v1.core.sched.scheduler:"))


@pytest.fixture
def doctored(tmp_path: Path) -> Callable[[str, str, str], Sources]:
    """The installed sources with a text replaced in one file."""
    here = installed()

    def doctor(path: str, old: str, new: str) -> Sources:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text() if file.exists() else here.read(path)
        assert text is not None and old in text
        file.write_text(text.replace(old, new))
        return Sources("0.99.0", read, lambda: [path])

    def read(path: str) -> str | None:
        file = tmp_path / path
        return file.read_text() if file.is_file() else here.read(path)

    return doctor


def test_checker_names_a_method_that_is_gone(doctored: Callable[[str, str, str], Sources]) -> None:
    sources = doctored(SCHEDULER, "def _mamba_block_aligned_split(", "def _split_for_mamba(")
    (line,) = differences(sources, SCHEDULER_ENTRIES)
    assert line == (
        f"vllm 0.99.0 {SCHEDULER}: Scheduler._mamba_block_aligned_split(self, request, num_new_tokens, "
        "num_new_local_computed_tokens, num_external_computed_tokens) expected, found none "
        "[prefill chunks are cut by what cuts them for Mamba]"
    )


def test_checker_names_a_parameter_that_is_renamed(doctored: Callable[[str, str, str], Sources]) -> None:
    sources = doctored(SCHEDULER, "        num_new_local_computed_tokens: int = 0,\n", "        num_local: int = 0,\n")
    (line,) = differences(sources, SCHEDULER_ENTRIES)
    assert "found (self, request, num_new_tokens, num_local, num_external_computed_tokens) [" in line


def test_checker_says_everything_at_once(doctored: Callable[[str, str, str], Sources]) -> None:
    doctored(SCHEDULER, "self.need_mamba_block_aligned_split", "self.aligned_split")
    sources = doctored(SCHEDULER, "self.connector.bind_kv_cache_manager(", "self.connector.bind(")
    expected = [
        "attribute Scheduler.need_mamba_block_aligned_split expected, found none",
        "calls of KVCacheManager, then self.connector.bind_kv_cache_manager expected, found KVCacheManager",
        "2 calls of self._mamba_block_aligned_split if self.need_mamba_block_aligned_split expected, found 0",
    ]
    found = differences(sources, SCHEDULER_ENTRIES)
    assert len(found) == len(expected)
    assert all(text in line for text, line in zip(expected, found, strict=True))


LIBRARY = """
import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.other import Elsewhere


class Base(abc.ABC):
    kept = 1

    def __init__(self, a, b=None):
        self.a = a
        self.register_buffer("table", b)

    @abc.abstractmethod
    def must(self): ...

    @property
    def view(self): ...

    @classmethod
    def make(cls, x, *, y, z=0): ...


class Derived(Base):
    field: int


class Record:
    first: int
    second: int = 0
    third: list = field(default_factory=list)


def function(a, b, c=None): ...
"""

HOLDS = """
vllm.library:Derived
    overrides must(self)
    overrides property view
    overrides classmethod make(cls, ...)
    calls Derived(a)
    calls Derived(a, b=)
    calls classmethod make(cls, x, y=)
    subclassed
    has kept a table view field
vllm.library:Record
    calls Record(first=)
vllm.library:function
    calls function(a, b)
vllm.library:Elsewhere
    has here
"""

# Each with what is found instead.
FAILS = {
    "vllm.library:Derived\n    subclassed": "must(self)",
    "vllm.library:Derived\n    overrides must(self, more)": "(self)",
    "vllm.library:Derived\n    overrides view(self)": "property (self)",
    "vllm.library:Derived\n    overrides gone(self)": "none",
    "vllm.library:Derived\n    calls Derived(other)": "(self, a, b)",
    "vllm.library:Derived\n    calls Derived()": "(self, a, b)",
    "vllm.library:Derived\n    calls classmethod make(cls, x)": "classmethod (cls, x, *, y, z)",
    "vllm.library:Derived\n    calls classmethod make(cls, x, y=, w=)": "classmethod (cls, x, *, y, z)",
    "vllm.library:Derived\n    has must": "a method (self)",
    "vllm.library:Derived\n    has gone": "none",
    "vllm.library:Record\n    calls Record(second=)": "(self, first, second, third)",
    "vllm.library:function\n    calls function(a)": "(a, b, c)",
    "vllm.library:gone": "none, nor in any other file",
    "vllm.library:Moved": "none, but it is in vllm/other.py",
    "vllm.nowhere:Moved": "no such file, but it is in vllm/other.py",
    "vllm.library:Derived.gone\n    says x": "none",
    "vllm.library:Base.__init__\n    does self.b, self.register_buffer": "self.register_buffer",
    "vllm.library:Base.__init__\n    does 1 x self.register_buffer if b": "0",
    "vllm.library:Base.__init__\n    says self.c": "nothing of the kind",
    "vllm.library:function\n    takes vllm.library:Record": "none for first, second, third",
}


def _library() -> Sources:
    files = {"vllm/library.py": LIBRARY, "vllm/other.py": "class Elsewhere:\n    here = 1\n\n\nMoved = 1\n"}
    return Sources("0.99.0", files.get, lambda: files)


def test_checker_accepts_what_is_there() -> None:
    """Through base classes, imports, and all ways to define an attribute."""
    assert differences(_library(), parse_contract(HOLDS)) == []


@pytest.mark.parametrize(("entry", "found"), FAILS.items())
def test_checker_refuses_what_is_not_there(entry: str, found: str) -> None:
    entries: tuple[Entry, ...] = parse_contract(entry)
    (line,) = differences(_library(), entries)
    assert f" expected, found {found} [" in line


def test_checker_leaves_out_what_a_version_need_not_have() -> None:
    assert differences(_library(), parse_contract("vllm.library:gone\n    since 1.0")) == []
