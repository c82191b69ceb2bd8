"""The workbench as a page of its own, without JupyterLab around it: python -m fastvl_lab.view.workbench --port 8866."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastvl_lab.errors import require

# Paths are meant from where the command was given, and that is where exports go.
_PAGE = """
import os

import fastvl_lab as fl

os.chdir({folder!r})
fl.workbench({settings}, query=os.environ.get("QUERY_STRING", ""))  # of the page's address, as Voila tells it
"""


# Voila's own page, without the icon font that it has from a network, and with nothing white around a dark panel.
_TEMPLATE = """
{%- extends 'voila/templates/lab/index.html.j2' -%}
{%- block notebook_css -%}
{%- for line in super().splitlines() if not ('<link' in line and '://' in line) %}
{{ line }}
{%- endfor %}
{%- endblock notebook_css -%}
""".strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve one panel until it is interrupted; what is not known here goes to Voila."""
    parser = argparse.ArgumentParser(
        prog="python -m fastvl_lab.view.workbench",
        description="The workbench as a page of its own.",
        epilog="Other options are Voila's: --no-browser, or --Voila.token=SECRET, without which all of this machine may look.",
    )
    parser.add_argument("--checkpoint", default="tiny-qwen2.5-vl", help="a folder, a hub id, a built-in name or random:<hub id>")
    parser.add_argument("--image", default="astronaut", help="a path, or a photograph that ships with scikit-image")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("W", "H"), help="what the image is resized to first; by default it is as it is"
    )
    parser.add_argument("--prompt", default="Describe this picture.")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--recipe", default="baseline", help="the recipe to begin with")
    parser.add_argument("--repeats", type=int, default=6, help="measured rounds after each click; intervals need 6")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default CUDA where present")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; by default the checkpoint's on CUDA, float32 on a CPU")
    parser.add_argument("--folder", help="where results are kept; by default in the user's cache folder")
    parser.add_argument("--port", type=int, default=8866)
    options, for_voila = parser.parse_known_args(arguments)
    voila, nbformat = require("voila.app", "notebooks"), require("nbformat", "notebooks")
    settings = {name: value for name, value in vars(options).items() if name != "port"}
    call = _PAGE.format(folder=str(Path.cwd()), settings=", ".join(f"{name}={value!r}" for name, value in settings.items()))
    with tempfile.TemporaryDirectory(prefix="fastvl-lab-") as folder:
        notebook = Path(folder, "workbench.ipynb")
        kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        cells, metadata = [nbformat.v4.new_code_cell(call.strip())], {"kernelspec": kernel, "title": "fastvl_lab"}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), notebook)
        template = Path(folder, "voila", "templates", "fastvl_lab")
        template.mkdir(parents=True)
        (template / "conf.json").write_text('{"base_template": "lab"}', encoding="utf-8")
        (template / "index.html.j2").write_text(_TEMPLATE, encoding="utf-8")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("JUPYTER_PATH"))))
        voila.Voila.launch_instance([str(notebook), f"--port={options.port}", "--template=fastvl_lab", *for_voila])


if __name__ == "__main__":
    main()
