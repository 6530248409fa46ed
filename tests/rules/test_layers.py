"""Rules of the layout that no other test would notice."""

import ast
import graphlib
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

# a package imports from floors below its own alone
FLOORS = [
    {"errors", "hardware", "progress", "version"},
    {"config", "forward"},
    {"artifacts"},
    {"models"},
    {"pairs", "store"},
    {"engines"},
    {"precompute", "judges"},
    {"rollouts"},
    {"training"},
    {"evaluation", "planning"},
    {"report", "exchange"},
    {"view"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# what a floor would allow and the design does not: training reads pairs.parquet alone, forward knows no files
FORBIDDEN = {
    ("training", "engines"), ("training", "store"), ("training", "pairs"), ("judges", "precompute"), ("report", "engines"),
    ("report", "store"), ("forward", "hardware"),
}  # fmt: skip
# the names for scripts and notebooks, looked up when they are used
API = ROOT / "pipeline" / "__init__.py"
# plain tensors in the only form that another trainer loads, read with weights_only alone
FOREIGN_FORMS = {
    "pipeline/exchange/scored_pairs.py": {"torch.save"},
    "pipeline/exchange/imported_scores.py": {"torch.load"},
}
SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])


def named(path):
    return str(path.relative_to(ROOT))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, inside functions and for types alone too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 110


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_keeps_its_place(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not tree.body
    if path.relative_to(ROOT).parts[0] == "pipeline":
        assert not [module for module in imported(tree) if module.split(".")[0] in {"stages", "tests"}]
        assert "sys.argv" not in text
        assert not re.search(r"\bprint\(", text)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = {"eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads"}
    assert not called & forbidden - FOREIGN_FORMS.get(named(path), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert {word.arg: ast.unparse(word.value) for word in node.keywords}.get("weights_only") == "True"


def modules_of(path) -> Iterator[str]:
    """The modules of this project that a file imports, each as the file that is read."""
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        while parts and not (ROOT.joinpath(*parts).with_suffix(".py")).is_file():
            parts.pop()
        if parts and parts[0] in {"pipeline", "stages"}:
            yield ".".join(parts)


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_package_is_on_a_floor_and_of_a_size_one_can_see():
    entries = {path.stem: path for path in (ROOT / "pipeline").iterdir() if not path.name.startswith("__")}
    assert entries.keys() - {"presets", "py"} == set(FLOOR)  # py.typed
    for file in (ROOT / "pipeline").glob("*/**/__init__.py"):
        assert 3 <= len(list(file.parent.glob("*.py"))) - 1 <= 13, file.parent


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.name != "stages" and path != API], ids=named)
def test_imports_go_down(path):
    own = module_name(path).split(".")[1]
    for module in modules_of(path):
        other = module.split(".")[1]
        if other != own:
            assert FLOOR[other] < FLOOR[own], f"{named(path)} imports {module}"
            assert (own, other) not in FORBIDDEN, f"{named(path)} imports {module}"


def test_no_file_imports_itself_through_others():
    graph = {module_name(path): set(modules_of(path)) for path in SOURCES if path != API}
    assert sum(map(len, graph.values())) > 400  # a resolver that finds nothing must not pass
    graphlib.TopologicalSorter(graph).prepare()
