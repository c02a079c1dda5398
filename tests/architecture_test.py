"""The rules of the house, read from the sources: how imports run, what only one place says, what loads when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptoughts"

ROWS = (  # top to bottom: a file imports from its own folder or from a row below
    {"training"},
    {"inference", "planning"},
    {"checkpoint"},
    {"engine", "data"},
    {"models"},
    {"objectives", "precision", "parallel"},
    {"platform", "config"},
    {"errors"},
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
FORBIDDEN_PAIRS = {("engine", "models"), ("engine", "data")}

DEEPSPEED_PLACES = ("platform/", "parallel/deepspeed_mpu.py", "engine/", "checkpoint/")
HEAVY = {"torch", "megatron", "deepspeed", "transformers"}
LIGHT_FILES = ("models/registry.py", "models/family.py", "models/flops.py", "data/corpus.py", "errors.py")

FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "launchers").glob("*.py"), *(ROOT / "tools").glob("*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path, *, at_module_level: bool = False) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports (``from a import b`` gives ``a.b``) and their lines."""
    for node in _module_level(tree_of(path)) if at_module_level else ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif _is_import_call(node):
            yield node.args[0].value, node.lineno  # type: ignore[attr-defined]


def _is_import_call(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
    )


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _module_level(child)


def folder_of(dotted_or_path: str) -> str:
    """``gptoughts.engine.x`` and ``engine/x.py`` -> ``engine``; ``gptoughts.errors.X`` -> ``errors``."""
    parts = dotted_or_path.removeprefix("gptoughts.").removesuffix(".py").replace("/", ".").split(".")
    return parts[0]


def test_every_folder_has_a_row() -> None:
    assert {folder_of(name_of(p)) for p in FILES} - {"__init__"} <= ROW_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path: Path) -> None:
    mine = folder_of(name_of(path))
    wrong = []
    for name, line in imported(path):
        if not name.startswith("gptoughts.") or mine == "__init__":
            continue
        theirs = folder_of(name)
        if mine == theirs:
            continue
        if ROW_OF[theirs] <= ROW_OF[mine] or (mine, theirs) in FORBIDDEN_PAIRS:
            wrong.append(f"line {line}: {mine} imports {name}")
    assert wrong == []


def test_no_circles_between_files() -> None:
    def dotted(path: Path) -> str:
        return "gptoughts." + name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    modules = {dotted(path): path for path in FILES}

    def module_of(name: str) -> str | None:
        return name if name in modules else name.rpartition(".")[0] if name.rpartition(".")[0] in modules else None

    graph = {m: {t for n, _ in imported(p) if (t := module_of(n)) and t != m} for m, p in modules.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_the_platform_says_torch_cuda(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "platform"):
        return
    said = [n for n, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if "torch.cuda" in text]
    assert said == [], f"lines {said}: ask gptoughts.platform.device"


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_deepspeed_stays_in_its_places(path: Path) -> None:
    if path.is_relative_to(PACKAGE) and name_of(path).startswith(DEEPSPEED_PLACES):
        return
    assert [line for name, line in imported(path) if name.split(".")[0] == "deepspeed"] == []


def is_light(path: Path) -> bool:
    name = name_of(path)
    return (
        path.name == "__init__.py"
        or name in LIGHT_FILES
        or name.startswith(("config/", "planning/"))
        or re.fullmatch(r"models/\w+/(config|presets)\.py", name) is not None
    )


@pytest.mark.parametrize("path", [p for p in FILES if is_light(p)], ids=name_of)
def test_light_files_import_no_heavy_library(path: Path) -> None:
    everywhere = name_of(path).startswith("config/")  # not even inside a function
    heavy = [
        f"line {line}: {name}"
        for name, line in imported(path, at_module_level=not everywhere)
        if name.split(".")[0] in HEAVY
    ]
    assert heavy == []


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_the_registry_tells_families_apart(path: Path) -> None:
    if path == PACKAGE / "models" / "registry.py":
        return

    def is_family(node: ast.AST) -> bool:
        return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).endswith("model_type")

    def is_text(node: ast.AST) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(isinstance(p, ast.Constant) and isinstance(p.value, str) for p in parts)

    lines = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Match) and is_family(node.subject))
        or (
            isinstance(node, ast.Compare)
            and any(map(is_family, [node.left, *node.comparators]))
            and any(map(is_text, [node.left, *node.comparators]))
        )
    ]
    assert lines == [], "a family's own folder or its registry entry is the place for this"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 330, f"{lines} lines hold two ideas"
    long = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 80
    }
    assert long == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)) or not tree_of(path).body
    assert path.name != "utils.py"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_programs_are_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 15, "logic belongs into the library"


_RUN = """
import runpy, sys
sys.argv = ["launchers/pretrain.py", *{arguments!r}]
try:
    runpy.run_path("launchers/pretrain.py", run_name="__main__")
except SystemExit as left:
    status = left.code
print(status or 0, *sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--dry_run"], ["--dry_run", "--model_type", "mla", "--size", "xl", "--deepspeed_config",
                                 "ds_configs/zero3.json"]],
    ids=" ".join,
)  # fmt: skip
def test_help_and_dry_run_load_no_heavy_library(arguments: list[str], tmp_path: Path) -> None:
    """Seconds of imports would be waited for; ``benchmarks.startup`` takes the time."""
    arguments = [*arguments, *(["--output_dir", str(tmp_path / "run")] if "--dry_run" in arguments else [])]
    code = _RUN.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.split() == ["0"], done.stderr
    assert done.stdout
    assert not (tmp_path / "run").exists()
