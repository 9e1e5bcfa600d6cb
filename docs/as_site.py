"""The documents as a site, by mkdocs (mkdocs.yml). They keep their places in the repository, and so do links to them.

Formulas become MathML and notebooks pages as the site is built, so that a reader's browser fetches nothing from
elsewhere.
"""

import html
import json
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("*.md", "docs/*.md", "benchmarks/*.md", "benchmarks/*.png", "train.py")
NOTEBOOKS = "docs/notebooks/*.ipynb"
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The repository's documents, at the addresses that they have there, in the place of those of docs_dir."""
    for file in [each for each in files if each.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(each for pattern in DOCUMENTS for each in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted(ROOT.glob(NOTEBOOKS)):
        page = path.relative_to(ROOT).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links to notebooks lead to their pages; formulas stand aside while Markdown is read."""
    markdown = re.sub(r"(\]\([^)\s]+)\.ipynb\)", r"\1.md)", markdown)
    if "$$" not in markdown:  # a dollar is one of the shell's, or of money
        return markdown
    page.meta["formulas"] = formulas = []

    def aside(found: re.Match) -> str:
        block = found[1] is not None
        formula = convert(found[1] or found[2], display="block" if block else "inline")
        formulas.append(f'<span style="display: block; overflow-x: auto">{formula}</span>' if block else formula)
        return f"FORMULA{len(formulas) - 1}END"

    return FORMULA.sub(aside, markdown)


def on_page_content(content: str, page, **_) -> str:
    """Formulas come back."""
    formulas = page.meta.get("formulas", [])
    return re.sub(r"FORMULA(\d+)END", lambda found: formulas[int(found[1])], content)


def notebook_page(path: Path) -> str:
    """A notebook's cells and what they gave, as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts.extend(_shown(output) for output in cell.get("outputs", []))
    return "\n\n".join(parts)


def _shown(output: dict) -> str:
    data = output.get("data", {})
    if picture := data.get("image/png"):
        return f'<img alt="the picture that this cell draws" src="data:image/png;base64,{"".join(picture).strip()}">'
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"<pre>{html.escape(text)}</pre>"
