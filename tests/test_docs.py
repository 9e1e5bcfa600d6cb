"""What the documents say holds: their snippets run, their commands parse, their files exist, and so do the examples.

The rule for snippets: all Python blocks of a file run in order, in one namespace, as a reader would paste them. Where a
line is `print(...)  # X`, X is what must be printed.
"""

import argparse
import ast
import contextlib
import doctest
import importlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import notebooks
import numpy as np
import pytest
import yaml

import train
from cero_jax import evaluate
from cero_jax.command_line import from_command_line
from cero_jax.hosts import BY_HAND
from cero_jax.report import __main__ as report

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
ELSEWHERE = "docs/integrations.md"  # whose snippets tests/integrations runs, in the environments that they need
WITH_SNIPPETS = {"README.md", "docs/allocator.md"}
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
WITH_COMMANDS = [*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in [*sorted(ROOT.glob("configs/*.py")), *EXAMPLES])]
DOCTESTED = [path for path in sorted(ROOT.glob("cero_jax/**/*.py")) if ">>> " in path.read_text()]
COMMAND = re.compile(r"python (?:train\.py|-m \S+|benchmarks/\w+\.py|examples/\w+\.py)(?:[ \t]+[^`\n]*)?")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != ELSEWHERE])
def test_the_python_snippets_run_and_print_what_they_say(document):
    text = (ROOT / document).read_text()
    assert "```" not in re.sub(r"^```(python|sh|text)\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks or document not in WITH_SNIPPETS
    scope, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, code in enumerate(blocks, 1):
            exec(compile(code, f"{document}, block {number}", "exec"), scope)
    expected = re.findall(r"^print\(.*\)  # (.+)$", "".join(blocks), re.MULTILINE)
    assert [line for line in expected if line not in printed.getvalue().splitlines()] == []


def test_the_readmes_first_screen_holds_the_picture_the_two_commands_and_a_snippet():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert all(each in first for each in ("![", "make train", "make test"))
    assert re.search(r"^```python\n.*?^```$", first, re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[list[str]]:
    """The words of every command of ours that a file shows, comments and prose behind it left out."""
    found = (
        re.split(r"\s#|   |[;,:)](?:\s|$)|\.$", each)[0] for each in COMMAND.findall((ROOT / document).read_text())
    )
    return [shlex.split(each)[1:] for each in found]


def parses(module: str, args: list[str], monkeypatch) -> None:
    """Let a module's own parser read the arguments, and stop it there."""

    class ParsedError(Exception):
        pass

    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        original(self, args, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *args])
    with pytest.raises(ParsedError):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_the_commands_exist_and_their_flags_parse(document, monkeypatch, capsys):
    for file, *args in commands(document):
        if file == "-m" and args[0] in ("pytest", "tests.notebooks"):
            continue
        if file == "-m" and args[0] == "cero_jax.train":  # an installed train.py
            file, *args = "train.py", *args[1:]
        if file == "-m":
            with monkeypatch.context() as patch:
                parses(args[0], args[1:], patch)
        elif file == "train.py" and args[-1] == "--help":
            with pytest.raises(SystemExit, match="0"):
                from_command_line(args)
        elif file == "train.py":
            from_command_line(args)
        else:
            source = (ROOT / file).read_text()
            assert [a for a in args if a.startswith("--") and a.split("=")[0].removeprefix("--") not in source] == []
    assert commands(document) or document.startswith(("docs/glossary", "docs/integrations"))


def test_the_settings_that_prose_names_exist(capsys):
    for config in ("configs/gsm8k.py", "examples/own_task.py"):
        with pytest.raises(SystemExit, match="0"):
            from_command_line([config, "--help"])
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    named = {flag for name in WITH_COMMANDS for flag in re.findall(r"`(--[a-z][\w.-]*)", (ROOT / name).read_text())}
    assert named - known - {"--help"} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_make_targets_and_extras_exist(document):
    text, makefile = (ROOT / document).read_text(), (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for named in re.findall(r"pip install -?e? ?'\.\[([\w,]+)\]'", text):
        assert set(named.split(",")) <= set(extras)


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_and_named_files_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target
    for path in re.findall(r"`((?:cero_jax|configs|docs|tests|benchmarks|examples)/[\w./]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path


def test_the_readmes_tree_names_every_file_and_no_other():
    (tree,) = re.findall(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    package = tree.partition("cero_jax/\n")[2].partition("\nbenchmarks/")[0]
    named = set(re.findall(r"\b\w+\.py\b|\b\w+/", package))
    there = {path.name for path in (ROOT / "cero_jax").glob("*.py")} - {"__init__.py"}
    assert named == there | {f"{path.parent.name}/" for path in (ROOT / "cero_jax").glob("*/__init__.py")}
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("path", DOCTESTED, ids=lambda path: path.stem)
def test_every_doctest_runs(path):
    """Of modules, classes, and functions inside functions too."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    scope, source = vars(importlib.import_module(name)), path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    tests = [doctest.DocTestParser().get_doctest(text, dict(scope), name, str(path), 0) for text in texts]
    assert sum(len(test.examples) for test in tests) == source.count(">>> ")
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.failed for result in results) == 0


def test_the_allocators_notebook_runs():
    """What it says is asserted in its cells. `make check` runs the other one, which trains."""
    for outputs in notebooks.run(ROOT / "docs/notebooks/allocator.ipynb"):
        assert all(output["output_type"] in ("stream", "display_data") for output in outputs)


def test_every_document_is_a_page_of_the_site():
    def pages(nav: list | dict | str) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in pages(each)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = [path.with_suffix(".md").relative_to(ROOT).as_posix() for path in ROOT.glob("docs/notebooks/*.ipynb")]
    assert sorted(listed) == sorted(["CHANGELOG.md", *DOCUMENTS, *written])


def test_there_are_doctests_and_examples():
    assert DOCTESTED
    assert EXAMPLES
    shown = "".join((ROOT / document).read_text() for document in DOCUMENTS)
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in shown] == []


def test_alone_the_allocator_gives_hopeless_prompts_less_than_half_of_uniforms(capsys):
    results = runpy.run_path("examples/allocator_alone.py")["main"]()
    assert results["uniform"][0] == 25_600  # four prompts in ten
    assert results["cero"][0] < 0.5 * results["uniform"][0]
    assert results["cero"][1] > 1.5 * results["uniform"][1]
    assert len(capsys.readouterr().out.splitlines()) == len(results)


def test_an_own_task_is_judged_by_its_own_verifier():
    example = runpy.run_path("examples/own_task.py")
    task, balanced = example["config"].task.build(0), example["balanced"]
    for question, completion, reward in [("([=", "])", 1), ("([=", ")]", 0), ("(=", "", 0), ("(=", "))", 0)]:
        assert balanced(question, completion, "").reward == reward
    closed = dict(zip("([{", ")]}", strict=True))
    for prompts in (task.train, task.heldout):
        for question, label in zip(prompts.questions, prompts.labels, strict=True):
            answer = "".join(closed.get(bracket, "") for bracket in reversed(question))
            assert task.verify(question, answer, "").reward == (label != "broken")
    assert task.train.labels.count("broken") == round(0.2 * 256)
    questions, answers = task.demonstrations(np.random.default_rng(0), 64)
    assert len(questions) == len(answers) == 64
    assert not set(questions) & set(task.heldout.questions)


def test_help_shows_the_settings_of_an_own_task(capsys):
    with pytest.raises(SystemExit, match="0"):
        from_command_line(["examples/own_task.py", "--help"])
    shown = capsys.readouterr().out
    assert "--task.broken-share" in shown
    assert "that nothing can close" in shown


@pytest.mark.usefixtures("one_length")
def test_an_own_task_is_trained_resumed_evaluated_and_reported(tmp_path, capsys):
    sizes = [
        "--allocator.total-budget=64", "--allocator.num-epochs=2", "--task.num-prompts=16", "--task.num-heldout=8",
        "--warm-start.num-steps=2", "--warm-start.rows-per-step=8", "--model.width=16", "--model.mlp-width=16",
        "--evaluation.samples=1", "--evaluation.rows=8",
    ]  # fmt: skip
    config = from_command_line(["examples/own_task.py", *sizes, f"--work-dir={tmp_path / 'run'}"])
    assert train.main(config) == 0
    assert (tmp_path / "run" / "report.png").is_file()
    assert train.main(config) == 0  # the same command again: the run is known, and there is nothing left to do
    evaluate.main([str(tmp_path / "run"), "--samples", "2"])
    report.main([str(tmp_path / "run"), "--prompt", "3"])
    assert "prompt 3" in capsys.readouterr().out


def test_an_own_allocator_spends_its_budget_where_its_rule_says():
    config = from_command_line(["examples/own_allocator.py", "--allocator.power=2", "--allocator.total-budget=4000"])
    allocator = config.allocator.build("grpo")
    state = allocator.init(num_prompts=100)
    success = np.where(np.arange(100) < 50, 0.0, 0.5)
    drawn = np.zeros(100, int)
    while (num_rollouts := np.asarray((allocated := allocator.allocate(state))[0])).any():
        assert np.all((num_rollouts == 0) | ((num_rollouts >= 4) & (num_rollouts <= 16)))
        state = allocator.update(allocated[1], num_rollouts, (num_rollouts * success).astype(int))
        drawn += num_rollouts
    assert drawn.sum() == 4000
    assert drawn[:50].sum() < 0.5 * drawn[50:].sum()


@pytest.mark.parametrize("name", [".github/workflows/test.yml", ".pre-commit-config.yaml", "CITATION.cff"])
def test_what_others_programs_read_is_yaml(name):
    assert yaml.safe_load((ROOT / name).read_text())


def test_the_manifests_for_kubernetes_are_whole_and_their_commands_parse():
    blocks = re.findall(r"^```text\n(apiVersion: .*?)^```$", (ROOT / "docs/clusters.md").read_text(), re.M | re.DOTALL)
    jobs = {each["kind"]: each["spec"] for block in blocks for each in yaml.safe_load_all(block)}
    assert set(jobs) == {"JobSet", "Service", "Job"}
    for job in (jobs["Job"], jobs["JobSet"]["replicatedJobs"][0]["template"]["spec"]):
        assert job["completions"] == job["parallelism"]
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        assert container["command"][:2] == ["python", "train.py"]
        (devices,) = container["resources"]["limits"].values()
        mesh = from_command_line(container["command"][2:]).mesh
        assert mesh.fsdp == job["completions"] * devices
        assert [each["name"] for each in container["volumeMounts"]] == [each["name"] for each in pod["volumes"]]
    given = {each["name"]: each.get("value") for each in jobs["Job"]["template"]["spec"]["containers"][0]["env"]}
    assert set(given) == set(BY_HAND)
    assert given["JAX_NUM_PROCESSES"] == str(jobs["Job"]["completions"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("docker/*.Dockerfile")), ids=lambda path: path.stem)
def test_a_container_gets_what_exists_and_what_the_package_needs(path):
    copied = re.findall(r"^COPY (.+) \S+$", path.read_text(), re.M)
    assert {"pyproject.toml", "README.md", "LICENSE", "cero_jax", "train.py", "configs"} <= set(
        " ".join(copied).split()
    )
    let_in = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert name in let_in
    from_command_line(ast.literal_eval(re.findall(r"^CMD (.+)$", path.read_text(), re.M)[0]))
