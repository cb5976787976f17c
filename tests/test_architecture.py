"""Who may import whom, what `import anomem` must not load, and the words that name an operator on every floor."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "anomem"

# Which parts of anomem each part may import, at any level of nesting. Parts not named here may import nothing.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "files": {"errors"},
    "reference": set(),
    "kernels": set(),
    "validation": {"errors"},
    "rules": set(),
    "obstacles": {"kernels", "ops", "rules"},
    "machine": {"errors", "files", "kernels", "obstacles", "ops", "rules"},
    "measuring": {"machine", "obstacles", "ops", "reference", "rules", "testing"},
    "choice": {"errors", "files", "machine", "measuring", "obstacles", "rules"},
    "backends": {"choice", "errors", "machine", "obstacles", "ops", "rules", "validation"},
    "calibrate": {"backends", "choice", "errors", "machine", "measuring", "rules"},
    "ops": {"reference", "kernels"},
    "functional": {"backends", "choice", "errors", "ops", "reference", "rules", "validation"},
    "nn": {"errors", "functional", "reference", "rules", "validation"},
    "testing": {"reference", "errors"},
    "env": {"__init__", "calibrate", "choice", "files", "machine", "obstacles", "rules"},
    "data": {"errors", "validation"},
    "augment": {"errors", "functional", "reference", "rules", "validation"},
    "models": {"errors", "functional", "nn", "reference", "rules", "validation"},
    "scoring": {"augment", "data", "errors", "functional", "models", "nn", "reference", "validation"},
    "train": {
        "augment", "backends", "choice", "data", "errors", "files", "functional", "models", "nn", "reference", "rules",
        "scoring", "validation",
    },
    "evaluate": {"augment", "data", "errors", "models", "scoring", "train", "validation"},
    "plots": {
        "data", "errors", "evaluate", "files", "functional", "models", "nn", "reference", "scoring", "validation",
    },
    "export": {"__init__", "data", "errors", "files", "models", "reference", "scoring", "train", "validation"},
    "sklearn": {"data", "errors", "models", "scoring", "train", "validation"},
    "anomalib": {"data", "errors", "functional", "ops", "scoring", "train", "validation"},
    "report": {
        "__init__", "data", "drift", "errors", "evaluate", "files", "models", "reference", "scoring", "train",
        "validation",
    },
    "drift": {"errors", "validation"},
    "reproduce": {
        "__init__", "augment", "data", "errors", "evaluate", "files", "models", "plots", "reference", "scoring",
        "train", "validation",
    },
    "cli": {
        "__init__", "augment", "data", "drift", "env", "errors", "evaluate", "export", "files",
        "functional", "models", "nn", "plots", "reference", "report", "reproduce", "scoring", "train", "validation",
    },
    "demo": {
        "cli", "augment", "data", "errors", "evaluate", "functional", "models", "nn", "plots", "reference", "train",
        "validation",
    },
}  # fmt: skip
# What a part may import from outside at its top level, where that is the point of the part.
ONLY_TORCH = {"reference": {"torch"}, "kernels": {"torch", "triton"}}
# Slow or optional packages that no module may import at its top level, except where they are the module's business.
LAZY = {
    "sklearn", "skimage", "matplotlib", "tensorboard", "triton", "PIL", "scipy", "onnx", "onnxscript", "onnxruntime",
    "openvino", "jinja2", "pyod", "anomalib",
}  # fmt: skip
LAZY_EXCEPTIONS = {"sklearn": {"sklearn"}, "triton": {"kernels"}, "matplotlib": {"plots"}}


def modules() -> list[tuple[str, Path]]:
    """(part of the house, file) of every module of the package and of the kernels."""
    files = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]
    files = [(part, path) for part, path in files if part != "kernels"]
    return files + [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names a file imports, `from a import b` as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("part", "path"), modules(), ids=lambda value: str(value).replace(str(ROOT), ""))
def test_arrows_point_one_way(part: str, path: Path) -> None:
    assert part in ALLOWED, f"{part} is not part of the house: give it a place in ALLOWED"
    for name in imports(path):
        if name.split(".")[0] != "anomem":
            continue
        target = [*name.split("."), "__init__"][1]
        if not (PACKAGE / target).exists() and not (PACKAGE / f"{target}.py").exists() and target != "kernels":
            target = "__init__"
        assert target == part or target in ALLOWED[part], f"{path.name} imports {name}: {part} may not see {target}"


def test_no_part_may_see_itself_through_others() -> None:
    order = graphlib.TopologicalSorter(ALLOWED)
    order.prepare()  # raises CycleError, which names the parts


@pytest.mark.parametrize(("part", "path"), modules(), ids=lambda value: str(value).replace(str(ROOT), ""))
def test_outside_imports_are_few_and_lazy(part: str, path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path, top_level_only=True)} - {"anomem"}
    if part in ONLY_TORCH:
        assert outside - set(sys.stdlib_module_names) <= ONLY_TORCH[part], outside
    for name in outside & LAZY:
        assert part in LAZY_EXCEPTIONS.get(name, set()), f"{path.name} imports {name} at its top level"


def test_importing_anomem_is_cheap() -> None:
    code = (
        "import sys, anomem; heavy = {'torch', 'triton', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'import anomem loads {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_layers_and_commands_load_no_kernel_and_no_compiler() -> None:
    """torch's compiler brings Triton, its sharded tensors bring sympy: each takes half a second to import."""
    code = (
        "import sys, anomem.nn, anomem.functional, torch; "
        "from anomem.cli import commands, elsewhere, reproduce, score; "
        "slow = 'anomem.kernels triton torch._dynamo torch._inductor torch.distributed.tensor sympy torchvision'; "
        "loaded = [*(set(slow.split()) & set(sys.modules)), *torch.ops.loaded_libraries]; "
        "sys.exit(f'importing layers and commands loads {loaded}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


WORDS = (
    "retrieve", "contrast", "sampling", "deviation_map", "usage", "nearest", "read", "augment", "batch_norm",
    "downsample", "conv3x3",
)  # fmt: skip
"""One word names an operator on every floor: hopfield_retrieve with shrink; nt_xent and info_nce; gather, variance and
the positions; deviation_map; memory_diagnostics; nearest and k_center; read_memory;
augment; batch_norm; downsample; conv3x3."""


class Floor(NamedTuple):
    """A folder whose files are named after operators: `<word>.*` and, for parts of one, `<word>_<part>.*`."""

    folder: str
    words: set[str]
    """Operators that this floor has."""
    shared: set[str]
    """Files that serve several operators or none, without suffix."""
    prefix: str = ""


FLOORS = [
    Floor("anomem/functional", set(WORDS), {"__init__", "_inputs", "distributed", "joint", "memory_loss"}),
    Floor("anomem/reference", set(WORDS), {"__init__"}),
    Floor("anomem/ops", set(WORDS), {"__init__", "library", "native", "sources"}),
    Floor(
        "kernels",
        {"retrieve", "contrast", "nearest", "read"},
        {
            "__init__", "ahead_of_time", "kernel_resources", "launching", "passes", "primitives", "rows",
            "shipped_kernels", "tile_search", "tile_table",
        },
    ),
    Floor(
        "csrc/cpu",
        set(WORDS),
        {
            "arguments", "candidates", "factors", "isa", "isa_avx2", "isa_avx512", "isa_avx512_bf16", "isa_baseline",
            "kernels", "library_product", "memory", "operands", "pages", "panels", "parallel", "product", "quads",
            "raw_scores", "rows", "scratch", "selection", "simd", "softmax", "tile_product", "types",
        },
    ),
    Floor(
        "csrc/cuda",
        {"retrieve", "deviation_map", "sampling"},
        {
            "entry", "launch", "memory", "moments", "operands", "primitives", "product", "registers", "rows", "scatter",
            "softmax", "take",
        },
    ),
    Floor(
        "tests/operators",
        set(WORDS),
        {"__init__", "conftest", "contract", "contrast_calls", "retrieve_calls"},
        prefix="test_",
    ),
]  # fmt: skip


def misnamed(floor: Floor, names: Iterable[str]) -> list[str]:
    """What is wrong with the names of a floor's files, in words."""
    stems = {name.split(".")[0] for name in names}
    words = {stem.removeprefix(floor.prefix) for stem in stems - floor.shared if stem.startswith(floor.prefix)}
    strangers = {stem for stem in stems - floor.shared if not stem.startswith(floor.prefix)}
    strangers |= {word for word in words if not any(word == w or word.startswith(f"{w}_") for w in floor.words)}
    missing = {word for word in floor.words if word not in words}
    return [f"no file for {word}" for word in sorted(missing)] + [
        f"{name} is no operator" for name in sorted(strangers)
    ]


def names_of(folder: str) -> list[str]:
    """Names of the source files of a folder, empty where it is not there."""
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    return [path.name for path in (ROOT / folder).glob("*") if path.suffix in suffixes]


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.folder)
def test_an_operator_has_one_word_on_every_floor(floor: Floor) -> None:
    assert misnamed(floor, names_of(floor.folder)) == []


@pytest.mark.parametrize(
    ("names", "complaints"),
    [
        (["retrieve.py", "contrast.py", "rows.py", "retrieve_flash.py", "notes.json"], ["notes is no operator"]),
        (["retrieval.py", "contrast.py"], ["no file for retrieve", "retrieval is no operator"]),
        (["retrieve_flash.py", "contrast.py", "nt_xent.py"], ["no file for retrieve", "nt_xent is no operator"]),
        (["retrieve.py", "contrast.py", "contrastive.py"], ["contrastive is no operator"]),
        ([], ["no file for contrast", "no file for retrieve"]),
    ],
)
def test_a_wrong_word_is_found(names: list[str], complaints: list[str]) -> None:
    assert misnamed(Floor("kernels", {"retrieve", "contrast"}, {"rows"}), names) == complaints


def test_a_test_without_its_prefix_or_its_word_is_found() -> None:
    floor = Floor("tests/operators", {"retrieve"}, {"conftest"}, prefix="test_")
    assert misnamed(floor, ["conftest.py", "test_retrieve.py", "test_retrieve_large.py"]) == []
    assert misnamed(floor, ["retrieve.py", "test_retrieval.py"]) == [
        "no file for retrieve", "retrieval is no operator", "retrieve is no operator",
    ]  # fmt: skip
