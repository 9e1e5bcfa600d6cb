"""Runs a notebook's cells in order, in one namespace, as its reader would: `python -m tests.notebooks FILE [--write]`.

With --write, what they print and draw is stored in the notebook, for code hosts and the site to show. With --quick, a
warm start is cut to a few steps, and compiled with little optimisation: all cells run, on a policy that knows little.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import matplotlib

from tests.little_optimisation import with_little_optimisation

matplotlib.use("agg")
from matplotlib import pyplot as plt


def run(path: Path, quick: bool = False) -> list[list[dict]]:
    """The outputs of each code cell, as a notebook stores them. Raises what a cell raises."""
    scope: dict = {"__name__": "__main__"}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if quick:
        codes = [re.sub(r"WarmStartConfig\(num_steps=\d+", "WarmStartConfig(num_steps=5", code) for code in codes]
    return [_run_cell(code, f"{path.name}, code cell {number}", scope) for number, code in enumerate(codes, 1)]


def _run_cell(code: str, name: str, scope: dict) -> list[dict]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.parse(code), name, "exec"), scope)
    text = [{"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}]
    return (text if printed.getvalue() else []) + [_picture(number) for number in plt.get_fignums()]


def _picture(number: int) -> dict:
    figure, file = plt.figure(number), io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
    png = base64.b64encode(file.getvalue()).decode()
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": png}}


def write(path: Path, outputs: list[list[dict]]) -> None:
    """Store the outputs in the notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(each for each in notebook["cells"] if each["cell_type"] == "code"):
        cell |= {"outputs": outputs[number], "execution_count": number + 1}
    path.write_text(json.dumps(notebook, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    quick = "--quick" in sys.argv[2:]
    if quick:
        os.environ["XLA_FLAGS"] = with_little_optimisation(os.environ.get("XLA_FLAGS", ""))
    outputs = run(Path(sys.argv[1]), quick)
    if "--write" in sys.argv[2:]:
        write(Path(sys.argv[1]), outputs)
