"""The package as a whole: what imports what, what an import costs, and that a bare GPU box needs no extra."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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
    ("errors", "image_input", "inputs", "messages", "request", "trace", "kernels", "catalogue", "engine_thread"),
    ("recipe", "families"),
    ("checkpoint",),
    ("decoder",),
    ("tokenizer", *SLOTS),
    ("pipeline",),
    ("engine", "peers", "run"),  # a peer registers with the engine, which knows of `peers` its folder alone
    ("lab",),
    ("measure",),
    ("view", "serve"),
)
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}

# A run and a comparison draw themselves, and a sweep writes its report: these imports stand inside the function that draws.
DRAWN_ON_REQUEST = {("run", "view"), ("measure", "view")}

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
)


def _modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            yield path, relative.parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module path inside the package, whether at the top of the file) of every import of our own."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastvl_lab":
            if node.module == "fastvl_lab":
                yield from ((alias.name, top) for alias in node.names)
            else:
                yield node.module.removeprefix("fastvl_lab."), top
        elif isinstance(node, ast.Import):
            yield from ((a.name.removeprefix("fastvl_lab."), top) for a in node.names if a.name.startswith("fastvl_lab."))


@pytest.mark.parametrize(("path", "part"), list(_modules()), ids=lambda value: str(value).removeprefix(str(PACKAGE)))
def test_imports_point_one_way(path: Path, part: str) -> None:
    for module, top in _imports(path):
        other = module.split(".")[0]
        if (part, other) in DRAWN_ON_REQUEST:
            assert not top or _type_checking_only(path, module), f"{path.name} imports {module} at its top"
        else:
            assert LAYER_OF[other] <= LAYER_OF[part], f"{path.name} imports {module}"


def _type_checking_only(path: Path, module: str) -> bool:
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return any(f"fastvl_lab.{module}" in ast.unparse(block) for block in blocks)


def test_the_registry_of_engines_imports_no_engine_of_others() -> None:
    found = {module for module, _ in _imports(PACKAGE / "engine.py") if module.startswith("peers")}
    assert found == {"peers"}
    assert not list(_imports(PACKAGE / "peers" / "__init__.py"))


def test_slots_do_not_import_each_other() -> None:
    for path, part in _modules():
        if part in SLOTS:
            others = {module.split(".")[0] for module, _ in _imports(path)} & set(SLOTS) - {part}
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
    }


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
            imported = {module.removeprefix(f"{slot}.") for module, _ in _imports(PACKAGE / slot / f"{name}.py")}
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
assert "prefill" in repr(run) and "application/vnd.plotly.v1+json" not in run._repr_mimebundle_()
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
