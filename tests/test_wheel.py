"""What `pip install` brings: a wheel is built from the files of the repository, unpacked, and used without a clone."""

import shutil
import subprocess
import sys
import zipfile
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
