"""The house as its imports draw it: arrows point down, no circles, reward functions apart, one place for CUDA."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_vlmr1"

# From the roof to the ground. Rooms of one floor don't see each other.
FLOORS = [
    {"cli"},
    {"launch", "drill"},
    {"train"},
    {"evaluate", "report"},
    {"plan"},
    {"grpo"},
    {"rollout"},
    {"rewards"},
    {"data"},
    {"checkpoint"},
    {"models"},
    {"parallel"},
    {"runtime"},
    {"telemetry"},
]
GROUND = {"", "config", "types", "errors", "progress", "assets"}  # "" is the package itself
HEIGHT = {room: height for height, rooms in enumerate(reversed([*FLOORS, GROUND])) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
IS_PACKAGE = {module_name(path.parent / "__init__.py") for path in PACKAGE.rglob("__init__.py")}


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Every module that `tree` imports, anywhere in it: functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if module in IS_PACKAGE else module.split(".")[:-1]
                above = here[: len(here) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in TREES else base


def own_imports(module: str) -> set[str]:
    return {name for name in imported(module, TREES[module]) if name.split(".")[0] == "megatron_vlmr1"}


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of `graph`, or []."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        found = next(filter(None, map(visit, sorted(graph.get(node, ())))), [])
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), [])


def test_every_room_has_its_floor():
    assert {room(module) for module in TREES} - HEIGHT.keys() == set()


def test_imports_of_our_own_modules_exist():
    missing = {f"{module} -> {name}" for module in TREES for name in own_imports(module) if name not in TREES}
    assert missing == set()


def test_arrows_point_down():
    upward = [
        f"{module} -> {name}"
        for module in TREES
        for name in sorted(own_imports(module))
        if room(module) != room(name) and HEIGHT[room(module)] <= HEIGHT[room(name)] and room(name) not in GROUND
    ]
    assert upward == []


def test_ground_sees_only_the_ground():
    seen = {module: {room(name) for name in own_imports(module)} for module in TREES if room(module) in GROUND}
    assert {module: rooms - GROUND for module, rooms in seen.items() if rooms - GROUND} == {}


def test_no_circle_between_modules():
    assert circle({module: own_imports(module) - {module} for module in TREES}) == []


def test_no_circle_between_rooms():
    rooms: dict[str, set[str]] = {}
    for module in TREES:
        rooms.setdefault(room(module), set()).update({room(name) for name in own_imports(module)} - {room(module)})
    assert circle(rooms) == []


def test_the_checks_see_what_they_should():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
    tree = ast.parse("def f():\n    from ..runtime import children\n    import torch.cuda\n    from . import x")
    names = list(imported("megatron_vlmr1.launch.local", tree))
    assert names == ["megatron_vlmr1.runtime.children", "torch.cuda", "megatron_vlmr1.launch"]
    assert HEIGHT["cli"] > HEIGHT["train"] > HEIGHT["rewards"] > HEIGHT["runtime"] > HEIGHT["types"]


def test_imports_by_name_stay_in_their_own_package():
    away = [
        f"{module}: {ast.unparse(node)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
        if not ast.unparse(node.args[0]).startswith(("f'{__name__}.", "f'{__package__}."))
    ]
    assert away == []


def test_reward_functions_import_neither_torch_nor_anything_above():
    functions = {module for module in TREES if module.startswith("megatron_vlmr1.rewards.functions")}
    reached, new = set(functions), set(functions)
    while new:
        new = {name for module in new for name in own_imports(module)} - reached
        reached |= new
    assert functions
    assert {room(module) for module in reached} <= {"rewards", *GROUND}
    heavy = {"torch", "megatron", "transformers", "pebble", "zmq"}  # pebble and zmq: the processes around them
    libraries = {module: {name.split(".")[0] for name in imported(module, TREES[module])} for module in reached}
    assert {module: names & heavy for module, names in libraries.items() if names & heavy} == {}
    code = f"import sys, {', '.join(functions)}; sys.exit(bool({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def patches(tree: ast.Module) -> list[str]:
    """Assignments to attributes of torch's or megatron-core's modules and classes."""
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        foreign |= {bound for name, bound in names if name.split(".")[0] in {"torch", "megatron", "transformers"}}
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"setattr", "mock.patch.object"} and node.args:
            targets = [ast.Attribute(node.args[0], "?", ast.Store())]
        for target in targets:
            text = ast.unparse(target)
            if isinstance(target, ast.Attribute) and text.split(".")[0] in foreign:
                found.append(text)
    return found


def test_libraries_are_redirected_only_in_runtime_device():
    assert patches(ast.parse("import torch\ntorch.cuda.x = 1\nsetattr(torch.cuda, 'y', 2)")) == [
        "torch.cuda.x",
        "torch.cuda.?",
    ]
    found = {module: patches(tree) for module, tree in TREES.items() if module != "megatron_vlmr1.runtime.device"}
    assert {module: what for module, what in found.items() if what} == {}
