"""Models and data sets by name on the Hugging Face hub: found, pinned to a commit, and read from the hub's own cache.

    hf:Qwen/Qwen2.5-0.5B-Instruct       a model's folder
    hf:openai/gsm8k:main/train          files of a data set: of a configuration and split, or by a path or glob in it
    hf:openai/gsm8k@740312a:main/train  the same at a commit, a tag or a branch

Once a name has its commit the hub is asked for nothing that the cache holds. HF_HOME says where that is, HF_ENDPOINT
where the hub is, HF_TOKEN who asks. The package `huggingface_hub` is imported on first use.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cero_jax.paths import local_path
from cero_jax.starting import install
from cero_jax.terminal import one_line

Kind = Literal["model", "dataset"]

PREFIX = "hf:"
WORDS: dict[Kind, str] = {"model": "model", "dataset": "data set"}
WRITTEN = re.compile(PREFIX + r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s:@]+))?(?::(?P<split>[^\s:@]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
MODEL_FILES = ("*.json", "*.jinja", "token*", "vocab*", "merges.txt", "model*.safetensors", "LICENSE*", "NOTICE*")
README = "README.md"  # whose head says which files are which split
ROWS = re.compile(r".*\.(parquet|(jsonl|json|csv)(\.gz)?)", re.IGNORECASE)  # files that are read


class Name(NamedTuple):
    """What stands for files on the hub."""

    repo: str  # owner/name
    revision: str  # a commit, tag or branch; "": the newest of the main branch
    split: str  # of a data set; "" of a model

    def __str__(self) -> str:
        revision, split = self.revision and f"@{self.revision}", self.split and f":{self.split}"
        return f"{PREFIX}{self.repo}{revision}{split}"


def is_name(given: str) -> bool:
    """Whether this names something on the hub, and is no path."""
    return given.startswith(PREFIX)


def without_revision(given: str) -> str:
    """A name as OWNER/NAME/CONFIGURATION/SPLIT, for people to read; a path as it is."""
    found = WRITTEN.fullmatch(given)
    return f"{found['repo']}/{found['split']}" if found and found["split"] else given


def model_folder(given: str) -> Path:
    """The folder of a model: at a path, or, by its name on the hub, in the hub's cache, downloaded where it is not.

    Raises ValueError for a name that is none, OSError, in one line, for what cannot be had.
    """
    return _snapshot(_read(given, "model"), "model", MODEL_FILES) if is_name(given) else local_path(given)


def data_files(given: str) -> list[Path]:
    """The files of a data set's split, by its name on the hub, in its cache. Raises as `model_folder`."""
    name, library = _read(given, "dataset"), _library(given)
    folder = _snapshot(name, "dataset", [README, ".gitattributes"])
    tree = library.get_cached_repo_tree(name.repo, repo_type="dataset", revision=folder.name)
    there, head = sorted(each.path for each in tree), {}
    if README in there:
        with suppress(Exception):  # of whatever kind its reader of YAML raises: the files' names say it, too
            head = library.metadata_load(folder / README)
    files = _files_of(name, there, head if isinstance(head, dict) else {})
    _snapshot(name._replace(revision=folder.name), "dataset", [escape(file) for file in files])
    return [folder / file for file in files]


def pinned(given: str, kind: Kind, before: Sequence[str] = ()) -> str:
    """The name with the commit that it stands for now; a path as it is.

    before: names that an earlier start pinned: a repository that stands there without a revision here keeps its commit.
    Raises as `model_folder`.
    """
    if not is_name(given):
        return given
    name = _read(given, kind)
    kept = [_read(each, kind).revision for each in before if is_name(each) and _read(each, kind).repo == name.repo]
    if not name.revision and kept:
        return str(name._replace(revision=kept[0]))
    if COMMIT.fullmatch(name.revision):
        return given
    files = MODEL_FILES if kind == "model" else [README, ".gitattributes"]
    return str(name._replace(revision=_snapshot(name, kind, files).name))


def _read(given: str, kind: Kind) -> Name:
    """The parts of a name. Raises ValueError where it is none of that kind."""
    found = WRITTEN.fullmatch(given)
    if not found or bool(found["split"]) != (kind == "dataset"):
        split = ":CONFIGURATION/SPLIT" if kind == "dataset" else ""
        raise ValueError(
            f"{given}: not the name of a {WORDS[kind]} on the hub: write hf:OWNER/NAME{split}, or "
            f"hf:OWNER/NAME@REVISION{split}"
        )
    return Name(found["repo"], found["revision"] or "", found["split"] or "")


def _library(given: object) -> Any:
    """The package huggingface_hub. Raises ValueError where it is missing."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors  # noqa: F401 (so that they are loaded)
    except ImportError as error:
        raise ValueError(f"{given}: names on the hub need huggingface_hub: {install('train')}") from error
    return huggingface_hub


def _snapshot(name: Name, kind: Kind, patterns: Sequence[str]) -> Path:
    """The folder, named by its commit, that holds a repository's files that match. Raises unless all are there."""
    library = _library(name)
    errors, missing = library.errors, library.errors.LocalEntryNotFoundError
    where = {"repo_id": name.repo, "repo_type": kind, "revision": name.revision or None}
    if COMMIT.fullmatch(name.revision):
        with suppress(missing, errors.CachedRepoTreeNotFoundError):
            library.get_cached_repo_tree(**where)  # without it nobody knows whether the folder is whole
            return Path(library.snapshot_download(**where, allow_patterns=list(patterns), local_files_only=True))
    try:
        return Path(library.snapshot_download(**where, allow_patterns=list(patterns)))
    except Exception as error:  # of whatever kind the library, and the one below it that speaks HTTP, raise
        raise OSError(f"{name}: {_why(error, name, kind, library.constants.ENDPOINT, errors)}") from error


def _why(error: Exception, name: Name, kind: Kind, hub: str, errors: Any) -> str:
    """What the hub, or the way to it, says, with the mend."""
    page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{name.repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"access to it must be granted: accept its terms at {page}, then `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such {WORDS[kind]} on {hub}, or a private one: check the name; for a private one `hf auth login`, or "
            "set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such commit, tag or branch in {page}: name another, or none for the newest"
    why = one_line(f"{type(error).__name__}: {error.__cause__ or error}", 200)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "not whole in the hub's cache, and HF_HUB_OFFLINE is set: unset it for one start, or give a folder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"not whole in the hub's cache, and {hub} cannot be reached ({why}): see to the network, or give a path"
    return f"cannot be downloaded from {hub} ({why}): the same command tries again"


def _files_of(name: Name, there: list[str], head: dict) -> list[str]:
    """The files of a data set that its split names. Raises ValueError that says what there is instead.

    Files by a path or a glob go first, then what the README declares for the hub's own viewer, then names: the split as
    a word behind the configuration's folder.

    there: every file of the repository. head: of its README.
    """
    rows = [file for file in there if ROWS.fullmatch(file)]
    declared = _declared(head, rows)
    config, _, split = name.split.rpartition("/")
    declared_default = next((each for each in declared if each.rpartition("/")[2] == split), "")
    for files in (
        _matching([name.split], there),
        declared.get(name.split if config else declared_default, []),
        [file for file in rows if _is_named(file, config if config != "default" else "", split)],
    ):
        if files:
            return files
    if not rows:
        raise ValueError(
            f"{name}: no JSONL, CSV or Parquet in it: where the hub has converted it, "
            f"hf:{name.repo}@refs/convert/parquet:CONFIGURATION/SPLIT may be had"
        )
    listed = list(declared) or rows
    raise ValueError(
        f"{name}: no such split or file: there {'are' if listed[1:] else 'is'} {', '.join(listed[:8])}"
        f"{', ...' if listed[8:] else ''}"
    )


def _declared(head: dict, rows: list[str]) -> dict[str, list[str]]:
    """Each "configuration/split" that the head of a README declares, with its files; the default configuration first.

    As in https://huggingface.co/docs/hub/datasets-manual-configuration.
    """
    configs = head.get("configs")
    configs = [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []
    configs.sort(key=lambda each: not (each.get("default") is True or each.get("config_name") == "default"))
    found = {}
    for config in configs:
        parts = config.get("data_files")
        for part in parts if isinstance(parts, list) and all(isinstance(p, dict) for p in parts) else [{"path": parts}]:
            paths = part.get("path")
            patterns = [each for each in (paths if isinstance(paths, list) else [paths]) if isinstance(each, str)]
            if files := _matching(patterns, rows):
                found[f"{config.get('config_name', 'default')}/{part.get('split', 'train')}"] = files
    return found


def _matching(patterns: Sequence[str], files: Sequence[str]) -> list[str]:
    """The files that one of the patterns matches, in order; `**/` stands for any folders or none."""
    plain = [pattern.removeprefix("./").replace("**/", "*") for pattern in patterns]
    return [file for file in files if any(fnmatchcase(file, pattern) for pattern in plain)]


def _is_named(file: str, config: str, split: str) -> bool:
    """Whether a file of the folder `config` ("": any) has the split in its name, or in a folder's, as a word."""
    if config and not file.startswith(f"{config}/"):
        return False
    word = rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9])"
    return re.search(word, file.removeprefix(f"{config}/")) is not None
