"""A run's config as JSON and back, with the user's files that its task and its allocator come from."""

import dataclasses
import importlib
import importlib.util
import json
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import cero_jax
from cero_jax.config import Config

_FILE = "config file "  # begins the name of a module that is a user's file


def load_file(path: Path, again: bool = False) -> ModuleType:
    """A user's Python file as a module, run where it was not yet or is to be run again."""
    path = path.resolve()
    name = f"{_FILE}{path}"
    if again or name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ValueError(f"{path}: not a Python file that is there: put it back")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def to_json(config: Config) -> dict:
    """The resolved config as nested plain values; where its task's and its allocator's classes are found; the version.

    Raises ValueError for a setting that JSON cannot hold.
    """
    try:
        plain = json.loads(json.dumps(dataclasses.asdict(config)))
    except TypeError as error:
        raise ValueError(f"a setting of the config cannot be saved as JSON ({error}): make it plain values") from error
    for name in ("task", "allocator"):
        plain[name] = {"class": _class_of(getattr(config, name))} | plain[name]
    return {"version": cero_jax.__version__} | plain


def default_values(settings: Any) -> dict:
    """The defaults of a dataclass's fields and of those nested in it, plain as in `to_json`; not of what has none."""
    found = {}
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(value) and each.default is not None:
            found[each.name] = default_values(value)
        elif each.default is not dataclasses.MISSING:
            found[each.name] = each.default
    return json.loads(json.dumps(found, default=repr))


def from_json(plain: dict) -> Config:
    """The config that `to_json` wrote. It runs the file, or imports the module, of a task or an allocator of one's own.

    Raises ValueError where a class is not found, or a field is unknown, as after a change of version.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"{plain!r:.80} is not the config of a run: an object is")
    version = plain.get("version", "an older one")
    try:
        own = {name: _find_class(**plain[name]["class"]) for name in ("task", "allocator")}
        return _from_plain(Config, {key: value for key, value in plain.items() if key != "version"}, own)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"not the config of a run of this version of cero_jax ({cero_jax.__version__}; it was {version}): {error}"
        ) from error


def check_saved_as_it_is(config: Config) -> None:
    """Raise ValueError where the config would be read back as another: an evaluation would measure another task."""
    plain = to_json(config)
    for name in ("task", "allocator"):
        settings, kind = getattr(config, name), type(getattr(config, name))
        read = _from_plain(kind, {key: value for key, value in plain[name].items() if key != "class"}, {})
        changed = [f.name for f in dataclasses.fields(kind) if getattr(read, f.name) != getattr(settings, f.name)]
        if changed or "<locals>" in kind.__qualname__:
            what = f"{name}.{changed[0]}={getattr(settings, changed[0])!r}" if changed else f"{kind.__qualname__}"
            raise ValueError(
                f"{what} cannot be read back from a run's config.json: use numbers, text, tuples of them and nested "
                "dataclasses, in a class that stands at the top of its file"
            )


def _class_of(settings: Any) -> dict[str, str]:
    """The name of a settings' class, and the module or the user's file that it is found in again."""
    kind = type(settings)
    if kind.__module__ == "__main__" or kind.__module__.startswith(_FILE):
        file = getattr(sys.modules[kind.__module__], "__file__", None)
        if file is None:
            raise ValueError(f"{kind.__qualname__} has no file to be found in again: put the class in one")
        return {"name": kind.__qualname__, "file": str(Path(file).resolve())}
    return {"name": kind.__qualname__, "module": kind.__module__}


def _find_class(name: str, module: str = "", file: str = "") -> type:
    """The dataclass of that name in a user's file, which is run, or in a module. Raises ValueError where it is none."""
    try:
        kind = attrgetter(name)(load_file(Path(file)) if file else importlib.import_module(module))
    except (AttributeError, ImportError) as error:
        raise ValueError(f"the class {name} that the run was configured by is not found: {error}") from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):  # nothing else is called by a config.json
        raise ValueError(f"{name} of {file or module} is no dataclass of settings")
    return kind


def _from_plain(kind: type, plain: dict, own: dict[str, type]) -> Any:
    """The dataclass `kind` with nested ones inside it. own: the classes of the fields that say theirs."""
    hints = get_type_hints(kind)
    values = {}
    for key, value in plain.items():
        if key == "class":
            continue
        if isinstance(value, dict):  # of a dataclass, or of one that may be None
            types = (own.get(key), hints[key], *get_args(hints[key]))
            nested = next((each for each in types if isinstance(each, type) and dataclasses.is_dataclass(each)), None)
            value = value if nested is None else _from_plain(nested, value, {})
        values[key] = _tuples(value)
    return kind(**values)


def _tuples(value: Any) -> Any:
    """Lists as the tuples that they were before JSON."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def flat(plain: dict, prefix: str = "") -> dict:
    """Nested values by their dotted names."""
    found = {}
    for key, value in plain.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
