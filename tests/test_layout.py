"""The import graph: packages import only from layers below, and no module takes part in a cycle.

`python tests/test_layout.py` prints the layers, and each module with its level.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From bottom to top. A package may import from itself and from every layer below.
LAYERS = [
    ("config", "models"),
    ("utils", "solvers"),
    ("dataset", "training", "sampling"),
    ("pipeline",),
    ("evaluation",),
    ("train_vae", "create_encodings", "train_diffusion", "infer", "evaluate", "tools"),
]


def modules() -> dict[str, Path]:
    packages = {name for layer in LAYERS for name in layer}
    files = [file for name in packages for file in [ROOT / f"{name}.py", *(ROOT / name).glob("*.py")] if file.exists()]
    return {file.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): file for file in files}


def imports(file: Path, known: set[str]) -> set[str]:
    """Project modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    names |= {f"{name}.__init__" for name in names}
    return names & known


def graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imports(file, set(files)) - {name} for name, file in files.items()}


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """Length of the longest import chain below each module. Raises CycleError."""
    depth: dict[str, int] = {}
    for name in TopologicalSorter(edges).static_order():
        depth[name] = 1 + max((depth[below] for below in edges[name]), default=-1)
    return depth


def layer_of(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module.split(".")[0] in layer)


def upward_imports(edges: dict[str, set[str]]) -> list[str]:
    found = []
    for module, targets in edges.items():
        for target in targets:
            own, other = module.split(".")[0], target.split(".")[0]
            if own != other and layer_of(target) >= layer_of(module):
                found.append(f"{module} -> {target}")
    return found


def test_imports_point_down_without_cycles():
    edges = graph()
    assert len(edges) > 40
    assert upward_imports(edges) == []
    levels(edges)  # raises CycleError


def test_models_and_samplers_stand_alone():
    edges = graph()
    for module, targets in edges.items():
        if module.startswith("models."):
            assert all(target.startswith("models.") for target in targets), module
    assert edges["sampling"] <= {"models.schedules", "solvers"} and edges["solvers"] <= {"models.schedules"}


def test_the_check_finds_upward_imports():
    assert upward_imports({"models.vae": {"config"}, "config": set()}) == ["models.vae -> config"]
    assert upward_imports({"utils.files": {"pipeline.generate"}, "pipeline.generate": set()})
    assert not upward_imports({"pipeline.generate": {"utils.files"}, "utils.files": set()})


if __name__ == "__main__":
    edges = graph()
    for i, layer in reversed(list(enumerate(LAYERS))):
        print(f"layer {i}: {', '.join(layer)}")
    print("upward imports:", upward_imports(edges) or "none")
    for name, level in sorted(levels(edges).items(), key=lambda item: (-item[1], item[0])):
        print(f"level {level}: {name}")
