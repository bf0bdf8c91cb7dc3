"""The layers of the code: each folder imports only what stands to its left.

kernels | distributed | data | models  <  objectives | evaluate  <  train  <  export | report  <  cli
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    ["kernels", "distributed", "data", "models"],
    ["objectives", "evaluate"],
    ["train"],
    ["export", "report"],
    ["cli"],
]
LEAVES = {"config", "logging", "progress", "resources", "sections"}  # open to all but the kernels
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LONGEST = 450  # lines


def sources() -> list[tuple[str, Path]]:
    inside = [(path.relative_to(ROOT / "vlscale").parts[0], path) for path in (ROOT / "vlscale").rglob("*.py")]
    kernels = [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]
    return sorted([(name, path) for name, path in inside if name in LEVEL] + kernels)


def imports(path: Path) -> set[str]:
    """Names of vlscale's own first-level parts that a file imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # of the same folder: what the kernels use, which are installed under another name
                assert node.level == 1, f"{path}: a relative import that leaves its folder"
                continue
            modules |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"}
    return {module.split(".")[1] for module in modules if module.startswith("vlscale.")}


@pytest.mark.parametrize(("layer", "path"), sources(), ids=lambda value: str(value)[-60:])
def test_a_file_imports_only_from_layers_to_its_left(layer, path):
    allowed = {layer} | {name for name in LEVEL if LEVEL[name] < LEVEL[layer]}
    allowed |= set() if layer == "kernels" else LEAVES
    assert imports(path) <= allowed


def test_only_the_engine_imports_deepspeed():
    users = [
        p
        for p in (ROOT / "vlscale").rglob("*.py")
        if "import deepspeed" in p.read_text() or "from deepspeed" in p.read_text()
    ]
    assert [p.relative_to(ROOT).as_posix() for p in users] == ["vlscale/train/engine.py"]


def test_kernels_know_no_process_groups():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "torch.distributed" not in path.read_text(), path


@pytest.mark.parametrize("folder", ["vlscale", "kernels", "launch", "benchmarks", "tests"])
def test_no_file_outgrows_its_reader(folder):
    assert [str(p) for p in (ROOT / folder).rglob("*.py") if len(p.read_text().splitlines()) > LONGEST] == []


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folders_that_must_not_be_packages(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))
