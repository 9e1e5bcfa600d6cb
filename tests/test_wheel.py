"""What `pip install` brings: a wheel is built from the files of the repository, unpacked, and used without a clone."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("cero_jax", "configs", "train.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    command = [sys.executable, *build, folder, folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("cero_jax-*-py3-none-any.whl")
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_holds_the_package_its_configs_and_its_program(wheel):
    here = {path.relative_to(ROOT) for path in ROOT.glob("cero_jax/**/*.py")}
    here |= {Path("cero_jax/configs") / path.name for path in ROOT.glob("configs/*.py")}
    here |= {Path("cero_jax/py.typed"), Path("cero_jax/report/page.html")}
    packed = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file() and "dist-info" not in str(path)}
    assert packed == here
    assert (wheel / "cero_jax/train.py").read_text() == (ROOT / "train.py").read_text()
    assert not (wheel / "cero_jax/train.py").is_symlink()
    assert [path.name for path in wheel.glob("*.dist-info/licenses/*")] == ["LICENSE"]


def test_an_installed_package_works_without_a_clone(wheel, tmp_path):
    """The allocator imports jax and numpy alone; a config's name is enough to train it from any folder."""
    code = """
import sys, cero_jax
allocator = cero_jax.uniform(total_budget=64, num_epochs=1)
print(cero_jax.__file__)
print(*sorted({"flax", "optax", "orbax", "tyro", "scipy", "matplotlib", "torch"} & sys.modules.keys()) or ["none"])
from cero_jax.command_line import from_command_line
print(from_command_line(["configs/chain_sum.py", "--seed=3"]).seed)
from_command_line(["configs/nothing.py"])
"""
    environment = {"PYTHONPATH": str(wheel), "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(wheel / "cero_jax/__init__.py"), "none", "3"]
    assert done.stderr.startswith("error: no config file configs/nothing.py; there are: configs/chain_sum.py, ")


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Runs Python where nothing is installed but the wheel, jax, numpy and what these two need: no extra."""
    folder, linked = tmp_path_factory.mktemp("bare"), set()
    (info,) = wheel.glob("*.dist-info")
    wanted = [metadata.Distribution.at(info)]
    while wanted:
        for asked in wanted.pop().requires or []:
            name = re.match(r"[\w.-]+", asked).group()
            if ";" in asked or name in linked:  # of an extra, or of other systems
                continue
            linked.add(name)
            found = metadata.distribution(name)
            for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
                (folder / top).symlink_to(found.locate_file(top))
            wanted.append(found)
    assert {"jax", "jaxlib", "numpy"} <= linked

    def run(*args, packages=folder):
        environment = {"PYTHONPATH": f"{wheel}:{packages}", "PATH": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-S", *args]  # -S: without the folder of installed packages
        return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("name", ["train", "evaluate", "report", "simulate"])
def test_a_command_without_what_it_needs_says_what_to_install_in_one_line(bare, name):
    needs_more = name in ("train", "evaluate")  # than jax and numpy
    done = bare("-m", f"cero_jax.{name}", "x", **({} if needs_more else {"packages": "nothing"}))
    assert re.fullmatch(r"error: \w+ is not installed: pip install 'cero_jax\[train\]'\n", done.stderr)
    assert (done.returncode, done.stdout) == (1, "")


def test_what_needs_no_extra_works_and_what_does_names_it(bare, tmp_path):
    code = """
import cero_jax, sys
from cero_jax import read_files, simulate, starting, weights_and_biases
from cero_jax.huggingface import hub
from cero_jax.report.__main__ import main as report

allocator = cero_jax.uniform(total_budget=64, num_epochs=1)
print(int(allocator.init(num_prompts=8).ledger.total))

def own_file():
    exec("import no_such_module", {"__name__": "config file /x.py"})

def mathematics():
    import cero_jax.rewards.mathematics

def tensorboard():
    import cero_jax.metrics

for missing in (
    lambda: list(read_files.read_rows(read_files.Path(sys.argv[1]))),
    lambda: hub.model_folder("hf:a/b"),
    lambda: weights_and_biases.check("rollouts"),
    mathematics,
    lambda: report(["runs/x"]),
    lambda: simulate.picture({}, "x.png"),
    tensorboard,
    own_file,
):
    try:
        missing()
    except BaseException as error:
        print(starting.what_to_install(error) or error, file=sys.stderr)
"""
    parquet = tmp_path / "x.parquet"
    parquet.write_bytes(b"PAR1")
    done = bare("-c", code, parquet)
    assert done.stdout == "64\n", done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith((" ", "usage"))]
    train = r"pip install 'cero_jax\[train\]'"
    expected = [
        f"{parquet}: Parquet needs pyarrow: {train}, or give JSONL or CSV",
        f"hf:a/b: names on the hub need huggingface_hub: {train}",
        r"wandb='rollouts' needs the package wandb: pip install 'cero_jax\[train,wandb\]'",
        f"verifier 'math' needs math-verify: {train}",
        r".*No module named 'matplotlib': the picture needs it \(pip install matplotlib\); --html, .* do not",
        "2",
        f"matplotlib is not installed: {train}",
        f"tensorboardX is not installed: {train}",
        "No module named 'no_such_module'",
    ]
    assert len(said) == len(expected), done.stderr
    for line, pattern in zip(said, expected, strict=True):
        assert re.fullmatch(pattern, line)
