"""How the modules hang together: imports go one way, and each heavy dependency has its place."""

import ast
import re
import tomllib
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "fastdeitlt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
ONLY = {
    "torch.distributed": {"fastdeitlt.distributed"},
    "deepspeed": {"fastdeitlt.core.engine.sharded", "fastdeitlt.core.optim"},
    "apex": {"fastdeitlt.core.optim"},
    "nvidia.dali": {"fastdeitlt.data.pixels.decoder"},
    "torch.utils.tensorboard": {"fastdeitlt.run.trackers"},
    "wandb": {"fastdeitlt.run.trackers"},
    "mlflow": {"fastdeitlt.run.trackers"},
}
"""Who may import what."""
LONG_SIGNATURES = {
    "fastdeitlt.core.loss.joint_loss",
    "fastdeitlt.models.vit.create_student",
    "fastdeitlt.teachers.losses.paco_loss",
    "fastdeitlt.kernels.adamw_ema.adamw_ema",
    "fastdeitlt.kernels.adamw_ema.reference",
    "fastdeitlt.kernels.add_layernorm.add_layernorm",
    "fastdeitlt.kernels.add_layernorm.reference",
    "fastdeitlt.kernels.augment.augment",
    "fastdeitlt.kernels.augment.reference",
}
"""Documented public functions, whose keywords are their interface."""
MOST_PARAMETERS = 8
MOST_LINES = 450


def module_of(path: Path) -> str:
    """The dotted name that a file is imported by."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("fastdeitlt") else f"fastdeitlt.{name}"


def imports_of(source: str) -> set[str]:
    """What a module imports, inside its functions too: dotted names, some of attributes rather than of modules."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def in_order(imports: dict[str, set[str]]) -> list[str]:
    """The modules, each after all that it imports."""
    return list(TopologicalSorter({m: (names & imports.keys()) - {m} for m, names in imports.items()}).static_order())


IMPORTS = {module_of(path): imports_of(path.read_text(encoding="utf-8")) for path in FILES}


def texts_of(path: Path) -> list[str]:
    """The strings of a module, or a document."""
    text = path.read_text(encoding="utf-8")
    nodes = ast.walk(ast.parse(text)) if path.suffix == ".py" else [ast.Constant(text)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_modules_named_in_texts_exist():
    """In programs that are strings, such as the doctor's probes, and in commands of documents."""
    folders = ("fastdeitlt", "kernels", "benchmarks", "tests", "docs")
    paths = [path for folder in folders for kind in ("*.py", "*.md") for path in (ROOT / folder).rglob(kind)]
    for path in [*ROOT.glob("*.md"), *paths]:
        named = [name for t in texts_of(path) for name in re.findall(r"(?:from|import|-m) (fastdeitlt\.[\w.]+)", t)]
        assert {name.rstrip(".") for name in named} <= IMPORTS.keys(), path


def test_no_import_goes_round():
    assert set(in_order(IMPORTS)) == IMPORTS.keys()
    lazily = "def late():\n    from fastdeitlt.data import longtail"
    with pytest.raises(CycleError):  # the check can fail
        in_order(IMPORTS | {"fastdeitlt.data.sets.cut": imports_of(lazily)})


def test_packages_import_downwards_at_every_level():
    """The files and packages of a package, as what they hold imports, form no circle."""
    levels = defaultdict(lambda: defaultdict(set))
    for module, names in IMPORTS.items():
        for name in names & IMPORTS.keys() - {"fastdeitlt"}:
            here, there = module.split("."), name.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
            if depth is not None:
                levels[".".join(here[:depth])][here[depth]].add(there[depth])
    assert {"fastdeitlt", "fastdeitlt.data", "fastdeitlt.core"} <= levels.keys()
    for level, imports in levels.items():
        try:
            list(TopologicalSorter(imports).static_order())
        except CycleError as error:
            pytest.fail(f"in {level}: {' <- '.join(error.args[1])}")


def test_few_files_lie_at_the_top():
    assert len(list((ROOT / "fastdeitlt").glob("*.py"))) <= 12


def long_signatures(source: str) -> set[str]:
    """Names of the functions with more parameters than allowed, ``self`` and Triton's device code aside."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        given = node.args
        names = [
            arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if arg
        ]
        if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_PARAMETERS:
            found.add(node.name)
    return found


def test_what_travels_together_is_one_argument():
    found = set()
    for path in [*FILES, *(ROOT / "benchmarks").glob("*.py")]:
        found |= {f"{module_of(path)}.{name}" for name in long_signatures(path.read_text(encoding="utf-8"))}
    assert found == LONG_SIGNATURES
    assert long_signatures("class A:\n def f(self, a, b, c, d, *e, f, g, h, **i): pass") == {"f"}  # the check can fail


def test_no_file_is_too_long_to_read_at_once():
    for path in [*FILES, *(ROOT / "benchmarks").glob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, path


@pytest.mark.parametrize("package", ONLY)
def test_a_heavy_dependency_has_one_door(package):
    found = {module for module, names in IMPORTS.items() if any(f"{name}.".startswith(f"{package}.") for name in names)}
    assert found == ONLY[package]


def test_the_wheel_holds_every_package_and_what_is_no_module():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    configs = [module_of(path) for path in (ROOT / "configs").rglob("__init__.py")]
    assert set(setuptools["packages"]) == {*packages, *configs}
    data = [path for path in (ROOT / "fastdeitlt").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    for path in data:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(path.match(pattern) for pattern in setuptools["package-data"].get(package, [])), path
