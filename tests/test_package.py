"""The package as a whole: what imports what, what an import costs, and that a bare GPU box needs no extra."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import fastvl_lab
from fastvl_lab.families import FAMILIES
from fastvl_lab.trace import STAGES

PACKAGE = Path(fastvl_lab.__file__).parent
SLOTS = ("preprocessor", "vit", "cache", "capture", "streaming")

# Lowest first; a module imports from its own layer or below. Parts of the package that do not exist yet have their place too.
LAYERS = (
    (
        "account",
        "errors",
        "image_input",
        "inputs",
        "messages",
        "request",
        "sampling",
        "schemas",
        "tools",
        "channels",
        "shown",
        "trace",
        "kernels",
        "catalogue",
        "elsewhere",
        "machine",
        "engine_thread",
        "whole",
    ),
    ("recipe", "families"),
    ("checkpoint",),
    ("decoder",),
    ("tokenizer", "grammars", "processes", *SLOTS),
    ("outcome", "schedule", "learnt", "lasting"),
    ("pipeline",),
    ("engine", "equivalents", "peer", "run"),  # a peer registers with the engine, which knows of `peer` its folder alone
    ("lab",),
    ("measure",),
    ("grid",),
    ("view", "serve"),
)
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}

OPTIONAL = (
    "plotly",
    "pandas",
    "pyarrow",
    "ipywidgets",
    "anywidget",
    "IPython",
    "papermill",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "skimage",
    "kaleido",
    "simplejpeg",
    "ray",
    "submitit",
    "llguidance",
)


def _modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            yield path, relative.parts[0].removesuffix(".py")


def _name(path: Path) -> str:
    """The module of a file as imports name it, without the package's own name; "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILE_OF = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(path: Path, *, for_types: bool = True) -> set[str]:
    """Our own modules that a file imports, anywhere in it; for_types: also those that only a type checker imports."""
    tree = ast.parse(path.read_text())
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")]
    skipped = set() if for_types else {inside for block in checked for node in block.body for inside in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [(node.module or "", alias.name) for alias in node.names]
            # What is imported of a package may be a module of it.
            found |= {f"{module}.{name}" if _ours(f"{module}.{name}") in FILE_OF else module for module, name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {_ours(name) for name in found if name.split(".")[0] == "fastvl_lab"}


def _ours(name: str) -> str:
    return name.removeprefix("fastvl_lab").removeprefix(".")


@pytest.mark.parametrize(("path", "part"), list(_modules()), ids=lambda value: str(value).removeprefix(str(PACKAGE)))
def test_imports_point_one_way(path: Path, part: str) -> None:
    for module in _imports(path) - {""}:
        assert LAYER_OF[module.split(".")[0]] <= LAYER_OF[part], f"{path.name} imports {module}"


def _circle(imported: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not inside a function either: there a circle waits for the first call."""
    imported = {name: _imports(path, for_types=False) for name, path in FILE_OF.items()}
    assert imported["view"] > {"view.figures", "view.tables"}
    assert _circle(imported) == []


def test_a_circle_is_found_inside_a_function(tmp_path: Path) -> None:
    inside = tmp_path / "run.py"
    inside.write_text("def draw():\n    from fastvl_lab.view import waterfall\n")
    assert _imports(inside, for_types=False) == {"view.waterfall"}
    imported = {name: _imports(path, for_types=False) for name, path in FILE_OF.items()} | {"run": {"view.waterfall"}}
    assert {"run", "view.waterfall"} <= set(_circle(imported))
    inside.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastvl_lab.view import waterfall\n")
    assert _imports(inside, for_types=False) == set()


def test_the_registry_of_engines_imports_no_engine_of_others() -> None:
    found = {module for module in _imports(PACKAGE / "engine.py") if module.startswith("peer")}
    assert found == {"peer"}
    assert not _imports(PACKAGE / "peer" / "__init__.py")


def test_slots_do_not_import_each_other() -> None:
    for path, part in _modules():
        if part in SLOTS:
            others = {module.split(".")[0] for module in _imports(path)} & set(SLOTS) - {part}
            assert not others, f"{path} imports {others}"


# Names of one family's modules and settings.
OF_A_FAMILY = {
    "visual",
    "language_model",
    "lm_head",
    "deepstack_merger_list",
    "deepstack_visual_indexes",
    "fullatt_block_indexes",
    "mrope_section",
    "num_position_embeddings",
    "spatial_merge_size",
    "window_size",
    "image_token_id",
    "video_token_id",
}


def test_what_is_true_of_one_family_stands_in_its_file() -> None:
    """Elsewhere no code names a family, compares one with another, or reads what only one of them has."""
    named = {family.model_type for family in FAMILIES}
    for path, part in _modules():
        if part == "families":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant):
                assert node.value not in named, where
            if isinstance(node, ast.Attribute) and not _is_the_labs_own(node):
                assert node.attr not in OF_A_FAMILY, where
            if isinstance(node, ast.Compare | ast.Match):
                asked = {inside.attr for inside in ast.walk(node) if isinstance(inside, ast.Attribute)}
                assert not asked & {"family", "model_type"}, where


def _is_the_labs_own(node: ast.Attribute) -> bool:
    """Names that the lab uses too: a checkpoint's image token, a decoder's LM head."""
    return (ast.unparse(node.value), node.attr) in {
        ("checkpoint", "image_token_id"),
        ("self.checkpoint", "image_token_id"),
        ("decoder.weights", "lm_head"),
        ("weights", "lm_head"),
    }


def test_what_a_text_or_a_recipe_means_is_asked_of_engine_alone() -> None:
    """Elsewhere nobody tells a recipe from a text: `engine.find` and `engine.find_recipe` take both."""
    asks = {
        path.relative_to(PACKAGE).as_posix()
        for path, _ in _modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and "Recipe" in _names(node.args[1])
    }
    assert asks == {"engine.py"}


def _names(node: ast.expr) -> set[str]:
    return {inside.id for inside in ast.walk(node) if isinstance(inside, ast.Name)}


def test_options_of_a_slot_do_not_import_each_other() -> None:
    options = {
        "preprocessor": {"stock", "resize", "patchify", "patchify_triton"},
        "vit": {"stock", "lean"},
        "decoder": {"eager", "sdpa", "varlen", "slotted"},
        "cache": {"concat", "slotted"},
        "capture": {"compiled", "graphs"},
        "streaming": {"one_by_one", "rounds"},
    }
    for slot, names in options.items():
        for name in names:
            imported = {module.removeprefix(f"{slot}.") for module in _imports(PACKAGE / slot / f"{name}.py")}
            assert not imported & (names - {name}), f"{slot}/{name}.py"


def test_every_stage_names_a_file_of_the_package() -> None:
    for stage, file in STAGES.items():
        assert (PACKAGE / file).exists(), f"{stage}: {file}"


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavier_than_it_must() -> None:
    code = "import sys, fastvl_lab; print([m for m in ('torch', 'transformers', *%r) if m in sys.modules])"
    assert _python(code % (OPTIONAL,)).strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in fastvl_lab.__all__:
        assert getattr(fastvl_lab, name) is not None
        assert name in dir(fastvl_lab)
    with pytest.raises(AttributeError, match="the public names are Lab, Request"):
        fastvl_lab.Labs  # noqa: B018


BARE_BOX = """
import sys

class Without:
    # A finder that does not find some packages, as if they were not installed.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import numpy, fastvl_lab as fl
lab = fl.Lab("tiny-qwen3-vl", device="cpu")
request = fl.Request(images=[numpy.full((64, 96, 3), 127, numpy.uint8)], prompt="Hello.", max_new_tokens=2, ignore_eos=True)
run = lab.run(request, "fastest")
assert run.tokens == lab.run(request, "transformers").tokens
assert "prefill" in repr(run) and "fastvl_lab.view" not in sys.modules
assert set(run._repr_mimebundle_()) == {{"text/plain", "text/html"}} and "fastvl_lab.view" in sys.modules
comparison = fl.compare(lab, request, {{"a": "baseline", "b": "fastest"}}, repeats=1)
assert len(comparison.summary()) == 2
for need in (run.waterfall, comparison.frame, lambda: fl.photo("coffee")):
    try:
        need()
    except fl.MissingExtraError as error:
        print(error)
"""


def test_the_core_runs_without_any_extra_and_names_the_extra_for_the_rest() -> None:
    """torch, transformers, numpy, pillow (and triton) alone, as on a bare GPU box."""
    lines = _python(BARE_BOX.format(blocked=(*OPTIONAL, "accelerate", "torchvision", "scipy"))).splitlines()
    assert len(lines) == 3
    assert all("pip install 'fastvl-lab[notebooks]'" in line for line in lines)


def test_the_oldest_constraints_are_the_lower_bounds_and_the_newest_lie_within_all_bounds(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    wanted = {found[1]: found[2] for found in (re.match(r"([\w-]+)(>=[^;]*)", name) for name in named) if found}
    pinned = {
        file: dict(re.findall(r"^([\w-]+)==(.*)$", (repository / file).read_text(), re.MULTILINE))
        for file in ("constraints-oldest.txt", "constraints.txt")
    }
    assert pinned["constraints-oldest.txt"] == {name: limits.split(",")[0].removeprefix(">=") for name, limits in wanted.items()}
    for name, version in pinned["constraints.txt"].items():
        assert version in SpecifierSet(wanted.get(name, "")), name


def test_pages_name_files_and_links_that_there_are(repository: Path) -> None:
    package = repository / "fastvl_lab"
    for page in (repository / "README.md", *(repository / "docs").glob("*.md")):
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), (page.name, link)
        for file in re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+(?:\.py|/))`", text):
            assert (package / file).exists() or (repository / file).exists(), (page.name, file)
    assert len((repository / "README.md").read_text().splitlines()) < 200


def test_the_oldest_versions_are_tested_by_tests_that_there_are(repository: Path) -> None:
    (named,) = re.findall(r"^OLDEST := (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in named.split() if not (repository / "tests" / name).exists()] == []
