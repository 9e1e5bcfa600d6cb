"""Every setting of a run, gathered from the dataclass of each piece; and which of them a resumed run may change."""

import dataclasses
import difflib
import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jax
import tyro

import cero_jax
from cero_jax.checkpoint import Cursor
from cero_jax.data import Task
from cero_jax.evaluate import EvaluationConfig
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.sharding import MeshConfig
from cero_jax.tasks.chain_sum import ChainSum
from cero_jax.tasks.dataset import Dataset
from cero_jax.warm_start import WarmStartConfig

FREE = (
    "work_dir",
    "mesh",
    "evaluation",
    "checkpoint_every_steps",
    "extend",
    "model_folder",
    "task.path",
    "task.heldout_path",
)


@dataclass(frozen=True)
class AllocatorConfig:
    """Who gets the rollouts. A rule's own settings are read under that rule only."""

    name: Literal["cero", "uniform", "cero_dual", "variance", "knapsack"] = "cero"
    """cero: this project's; cero_dual: as published; uniform: GRPO's; variance: VIP's; knapsack: Knapsack RL's."""
    total_budget: int = 12_800
    """Rollouts of the whole run: it ends when they are spent."""
    num_epochs: int = 25
    """Rounds of allocation that the budget is cut into."""
    min_group: int = 4
    """Fewest rollouts of a visit."""
    max_group: int = 32
    """Most rollouts of a prompt in a round."""
    group_size: int = 8
    """Rollouts of a visit (uniform), or of one on average (variance, knapsack)."""
    tau: float | None = None
    """Rollouts at which returns diminish; None is total_budget / prompts (cero, cero_dual)."""
    prior: tuple[float, float] = (0.5, 0.5)
    """Beta prior of a prompt's success."""
    discount: float = 0.9
    """Share of the evidence that survives a pass, of 8 rollouts a prompt."""
    explore: float = 0.1
    """Share of a round for prompts whose evidence has faded, stalest first (cero)."""
    utility: Literal["exponential", "rational"] = "exponential"
    """How utility saturates in a prompt's cumulative rollouts (cero, cero_dual)."""

    def build(self) -> cero_jax.Allocator:
        """The allocator. Raises ValueError naming what does not fit."""
        common: dict[str, Any] = dict(  # noqa: C408
            total_budget=self.total_budget,
            num_epochs=self.num_epochs,
            min_group=self.min_group,
            max_group=self.max_group,
            prior=self.prior,
            discount=self.discount,
        )
        match self.name:
            case "cero":
                return cero_jax.cero(**common, tau=self.tau, utility=self.utility, explore=self.explore)
            case "cero_dual":
                return cero_jax.cero_dual(**common, tau=self.tau, utility=self.utility)
            case "uniform":
                return cero_jax.uniform(**common, group_size=self.group_size)
            case "variance":
                return cero_jax.variance(**common, group_size=self.group_size)
            case "knapsack":
                return cero_jax.knapsack(**common, group_size=self.group_size)


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str
    """Of the experiment; part of the work directory's name."""
    task: ChainSum | Dataset
    seed: int = 0
    """Of everything drawn: data, parameters, allocation, rollouts."""
    allocator: AllocatorConfig = field(default_factory=AllocatorConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    model_folder: str | None = None
    """Hugging Face folder: its weights, shape and tokenizer take the place of `model` (less its dtypes, remat and
    LoRA) and of the task's tokenizer. The trained model is written to <work_dir>/export-<rollouts>, in that format."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dynamic_sampling: bool = False
    """DAPO's remedy: groups without variance are drawn, charged and left out until a step is full of others."""
    success_threshold: float = 0.5
    """A reward of at least this is a success to the posterior."""
    truncated: Literal["wrong", "mask"] = "wrong"
    """What a completion cut at the length limit is: reward 0, or reward 0 and left out of the loss and its group."""
    checkpoint_every_steps: int = 100
    """Batches of rollouts between two checkpoints; a stop by signal saves one more."""
    work_dir: str | None = None
    """Where everything of the run goes; None is runs/<name>-<allocator>-<seed>."""
    extend: bool = False
    """Go on with a run under a larger total_budget than it was started with."""

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")

    @property
    def run_dir(self) -> Path:
        """The work directory, resolved."""
        return Path(self.work_dir or f"runs/{self.name}-{self.allocator.name}-{self.seed}").absolute()

    def check(self, num_prompts: int) -> None:
        """Raise ValueError for settings that do not fit each other, before any work is done."""
        allocator, learner = self.allocator, self.learner
        self.sampler.check_for_training()
        if self.checkpoint_every_steps < 1 or allocator.num_epochs < 1:
            raise ValueError(
                f"checkpoint_every_steps={self.checkpoint_every_steps} and allocator.num_epochs="
                f"{allocator.num_epochs} must be at least 1"
            )
        if not 0 < self.success_threshold <= 1:
            raise ValueError(f"success_threshold={self.success_threshold} must lie in (0, 1]")
        if allocator.max_group > learner.rows_per_step:
            raise ValueError(
                f"allocator.max_group={allocator.max_group} must be at most learner.rows_per_step="
                f"{learner.rows_per_step}: a group is drawn within a step"
            )
        if allocator.total_budget < allocator.min_group:
            raise ValueError(
                f"allocator.total_budget={allocator.total_budget} is smaller than one group of "
                f"{allocator.min_group}: raise the budget"
            )
        if allocator.total_budget // allocator.num_epochs < allocator.min_group:
            raise ValueError(
                f"allocator.total_budget={allocator.total_budget} over num_epochs={allocator.num_epochs} leaves less "
                f"than one group of {allocator.min_group} a round: raise the budget or lower num_epochs"
            )
        if self.dynamic_sampling and learner.steps_per_batch > 1:
            raise ValueError("dynamic_sampling fills one step from several batches: it needs learner.steps_per_batch=1")
        if num_prompts == 0:
            raise ValueError("the task has no training prompts")
        if self.model_folder is not None and self.warm_start.num_steps > 0:
            raise ValueError(
                f"warm_start.num_steps={self.warm_start.num_steps} teaches a model from scratch: set it to 0 with a "
                "model_folder, whose weights are trained already"
            )


def from_command_line(args: list[str]) -> Config:
    """The config of a file, `configs/NAME.py`, with overrides: ["configs/chain_sum.py", "--seed=3"].

    An unknown key is refused with the nearest names; --help lists all with units and defaults. Exits on bad usage.
    """
    if not args or args[0].startswith("-"):
        sys.exit("usage: python train.py configs/NAME.py [--key=value ...]   (configs/NAME.py --help lists the keys)")
    if not Path(args[0]).is_file():
        there = ", ".join(sorted(str(path) for path in Path("configs").glob("*.py")))
        sys.exit(f"no config file {args[0]}; there are: {there}")
    default = runpy.run_path(args[0]).get("config")
    if not isinstance(default, Config):
        sys.exit(f"{args[0]} must set `config` to a cero_jax.config.Config")
    _refuse_unknown(args[1:], default)
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(Config, default=default, args=args[1:], prog=f"train.py {args[0]}", config=markers)


def _refuse_unknown(args: list[str], config: Config) -> None:
    """Exit at a key that no field has, with the nearest there are."""
    known = [key.replace("_", "-") for key in _flat(dataclasses.asdict(config))]
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


def to_json(config: Config) -> dict:
    """The resolved config as nested plain values, the task's class among them."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    plain["task"] = {"kind": type(config.task).__name__} | plain["task"]
    return plain


def from_json(plain: dict) -> Config:
    """The config that `to_json` wrote. Raises ValueError where a field is unknown, as after a change of version."""
    tasks = {kind.__name__: kind for kind in get_args(get_type_hints(Config)["task"])}
    try:
        task = dict(plain["task"])
        kind = tasks[task.pop("kind")]
        return _from_plain(Config, plain | {"task": _from_plain(kind, task)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the config of a run of this version: {error}") from error


def _from_plain(kind: type, plain: dict) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for key, value in plain.items():
        if isinstance(value, dict):  # of a dataclass, or of one that may be None
            nested = next(
                (each for each in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(each)), None
            )
            value = value if nested is None else _from_plain(nested, value)  # type: ignore[arg-type]
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _flat(plain: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in plain.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_resumable(cursor: Cursor, config: Config, prompts_hash: str) -> None:
    """Raise ValueError, naming each, where a field that changes the mathematics differs from the saved run's."""
    before, now = _flat(cursor.config), _flat(to_json(config))
    grown = ("allocator.total_budget", "allocator.num_epochs") if config.extend else ()
    changed = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE) and key not in grown
    ]
    if changed:
        raise ValueError(
            f"{config.run_dir} holds a run with other settings: {'; '.join(changed)}. Give them back, or choose "
            "another --work-dir" + ("" if config.extend else "; to go on with a larger budget say --extend=True")
        )
    if prompts_hash != cursor.prompts_hash:
        raise ValueError(f"{config.run_dir} holds a run on other prompts, or in another order: give the same data back")
    if config.allocator.total_budget < cursor.config["allocator"]["total_budget"]:
        raise ValueError(f"extend: total_budget may only grow, from {cursor.config['allocator']['total_budget']}")


def open_run_dir(config: Config) -> tuple[Path, Path]:
    """The run directory, and the cache beside it for all runs.

    Turns on JAX's persistent compilation cache there: a restart is quick. Raises ValueError where it cannot be written.
    """
    run_dir = config.run_dir
    cache_dir = run_dir.parent / ".cache"
    try:
        for directory in (run_dir, cache_dir / "jax"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return run_dir, cache_dir


def write_settings(run_dir: Path, config: Config, task: Task) -> None:
    """What a reader of the run needs, as it is now: the resolved config, and the prompts with their labels.

    Raises ValueError where they cannot be written.
    """
    prompts = {"labels": task.train.labels, "questions": task.train.questions, "answers": task.train.answers}
    try:
        (run_dir / "config.json").write_text(json.dumps(to_json(config), indent=2))
        (run_dir / "prompts.json").write_text(json.dumps(prompts))
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def _unwritable(run_dir: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to the work directory {run_dir}: {error}: choose another --work-dir")
