"""The config of a run from its file and what the command line says otherwise."""

import dataclasses
import difflib
import sys
from pathlib import Path

import tyro

from cero_jax.config import Config
from cero_jax.saved_config import flat, load_file

INSTALLED = Path(__file__).parent / "configs"  # a copy, or in a clone a link


def from_command_line(args: list[str]) -> Config:
    """The config of a file, `configs/NAME.py`, with overrides: ["configs/chain_sum.py", "--seed=3"].

    Where there is no such file, as without a clone, a config of that name that is installed with the package is meant.
    An unknown key is refused with the nearest names; --help lists all with units and defaults. Exits on bad usage.
    """
    if not args or args[0].startswith("-"):
        sys.exit("usage: python train.py configs/NAME.py [--key=value ...]   (configs/NAME.py --help lists the keys)")
    file = Path(args[0])
    if not file.is_file() and file.parent == Path("configs"):
        file = INSTALLED / file.name
    if not file.is_file():
        there = ", ".join(sorted(f"configs/{path.name}" for path in INSTALLED.glob("*.py")))
        sys.exit(f"error: no config file {args[0]}; there are: {there}")
    args = ["--dry-run=True" if arg == "--dry-run" else arg for arg in args]
    default = getattr(load_file(file, again=True), "config", None)
    if not isinstance(default, Config):
        sys.exit(f"error: {args[0]} must set `config` to a cero_jax.config.Config")
    _refuse_unknown(args[1:], default)
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(Config, default=default, args=args[1:], prog=f"train.py {args[0]}", config=markers)


def _refuse_unknown(args: list[str], config: Config) -> None:
    """Exit at a key that no field has, with the nearest there are."""
    known = [key.replace("_", "-") for key in flat(dataclasses.asdict(config))]
    for arg in args:
        key = arg.removeprefix("--").partition("=")[0].replace("_", "-")
        if not arg.startswith("--") or key == "help" or any(f"{key}.".startswith(f"{each}.") for each in known):
            continue
        last = key.rpartition(".")[2]
        initials = {each: "".join(word[0] for word in each.rpartition(".")[2].split("-")) for each in known}
        near = [each for each in known if initials[each] == last]
        near += difflib.get_close_matches(key, known, 3, 0.6) + [each for each in known if last in each]
        shown = ", ".join(f"--{each}" for each in dict.fromkeys(near[:4]))
        sys.exit(f"error: no field --{key}; {f'nearest: {shown}; ' if near else ''}--help lists all")
