"""Every setting of a run, gathered from the dataclass of each piece."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import cero_jax
from cero_jax.allocator import defaults
from cero_jax.data import TaskConfig
from cero_jax.evaluation import EvaluationConfig
from cero_jax.grpo import BY_POSTERIOR, WITHOUT_GROUP, AdvantageKind
from cero_jax.learner import LearnerConfig
from cero_jax.model import ModelConfig
from cero_jax.pace import parsed as profiled
from cero_jax.paths import local_path
from cero_jax.rewards import MAX_REWARD
from cero_jax.rollout import Rules
from cero_jax.sampler import SamplerConfig
from cero_jax.settings import check
from cero_jax.sharding import MeshConfig
from cero_jax.warm_start import WarmStartConfig

ALLOCATORS = ("cero", "uniform", "cero_dual", "variance", "knapsack")


@dataclass(frozen=True)
class AllocatorConfig:
    """Who gets the rollouts. A rule's own settings are read under that rule only.

    For an allocator of your own inherit from this, add its settings, and override `name` and `build`.
    """

    name: str = "cero"
    """cero: this project's; cero_dual: as published; uniform: GRPO's; variance: VIP's; knapsack: Knapsack RL's."""
    total_budget: int = 12_800
    """Rollouts of the whole run: it ends when they are spent."""
    num_epochs: int = 25
    """Calls of `allocate` that the budget is spread over; an epoch may be a few steps or more than a pass."""
    min_group: int = defaults.MIN_GROUP
    """Fewest rollouts of a group, and of each part of one that is cut over two steps."""
    max_group: int = defaults.MAX_GROUP
    """Most rollouts of a prompt in an epoch."""
    group_size: int = defaults.GROUP_SIZE
    """Rollouts of a group (uniform, cero_dual), or of one on average (variance, knapsack)."""
    multiple_of: int = defaults.MULTIPLE_OF
    """Every group's rollouts are a multiple of this."""
    tau: float | None = None
    """Rollouts at which returns diminish; None is total_budget / prompts (cero)."""
    prior: tuple[float, float] | None = None
    """Beta prior of a prompt's success; None is (0.5, 0.5), and the paper's (1, 1) under cero_dual."""
    discount: float | None = None
    """Share of the evidence that survives a pass, of 8 rollouts a prompt; None is 0.9, and the paper's 1 under
    cero_dual."""
    explore: float = defaults.EXPLORE
    """Share of an epoch for prompts whose evidence has faded, stalest first (cero)."""
    pass_rate_rollouts: float = defaults.PASS_RATE_ROLLOUTS
    """Rollouts of the policy that a prompt's pass rate is worth, where the task's data have one."""
    utility: Literal["exponential", "rational", "capture"] = defaults.UTILITY
    """How utility saturates in a prompt's cumulative rollouts (cero); capture is the paper's."""

    def __post_init__(self):
        check(self, tau=(1e-3, 1e12), discount=(1e-9, 1), explore=(0, 1), pass_rate_rollouts=(0, 2**24))

    def build(self, advantage: AdvantageKind = "grpo") -> cero_jax.Allocator:
        """The allocator. Raises ValueError naming what does not fit.

        advantage: the learner's, which `variance` depends on; it has no rule for "grpo", and takes that of "rloo".
        """
        if self.name not in ALLOCATORS:
            raise ValueError(f"allocator.name={self.name!r} is none of {', '.join(ALLOCATORS)}: name one of them")
        shared = ("total_budget", "num_epochs", "min_group", "max_group", "multiple_of", "prior", "discount")
        own: dict[str, Any] = {
            "cero": {"tau": self.tau, "utility": self.utility, "explore": self.explore},
            "cero_dual": {"group_size": self.group_size},
            "uniform": {"group_size": self.group_size},
            "variance": {"group_size": self.group_size, "advantage": "dr_grpo" if advantage == "dr_grpo" else "rloo"},
            "knapsack": {"group_size": self.group_size},
        }[self.name]
        settings = dataclasses.asdict(self.resolved())
        return getattr(cero_jax, self.name)(**{key: settings[key] for key in shared}, **own)

    def resolved(self) -> Self:
        """The same with the rule's own prior and discount where none are named."""
        prior, discount = ((1.0, 1.0), 1.0) if self.name == "cero_dual" else (defaults.PRIOR, defaults.DISCOUNT)
        return dataclasses.replace(
            self,
            prior=prior if self.prior is None else self.prior,
            discount=discount if self.discount is None else self.discount,
        )


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str
    """Of the experiment; part of the work directory's name."""
    task: TaskConfig
    """What is trained on: a task of cero_jax.tasks, or any frozen dataclass of yours with `build(seed, tokenizer)`."""
    seed: int = 0
    """Of everything drawn: data, parameters, allocation, rollouts."""
    allocator: AllocatorConfig = field(default_factory=AllocatorConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    model_folder: str | None = None
    """Hugging Face folder, or hf:OWNER/NAME for one on the hub: its weights, shape and tokenizer take the place of
    `model` (except its dtypes, remat, attention and LoRA) and of the task's tokenizer. The trained model is written to
    <work_dir>/export-<rollouts>, in that format."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dynamic_sampling: bool = False
    """DAPO's remedy: live groups are collected until they fill an optimiser step; the others are paid for alone."""
    success_threshold: float = 0.5
    """A reward of at least this is a success to the posterior."""
    lowest_reward: float = 0.0
    """Of the verifier's scale (-1 where it gives +1 and -1): what a completion gets that was cut, or whose verification
    timed out or failed; a lower reward in the same step takes its place, so that no wrong answer is worse than none."""
    truncated: Literal["wrong", "mask"] = "wrong"
    """What becomes of a completion cut at the length limit: it has the lowest reward; under mask it is left out of the
    loss and its group, too."""
    overlong_tokens: int = 0
    """DAPO's soft overlong punishment: over the last so many of sampler.max_completion_tokens a completion's reward
    falls linearly, by overlong_penalty in all, which one that is cut pays whole; 0 is off. Correctness stays."""
    overlong_penalty: float = 1.0
    """What the longest completion's reward is lowered by, under overlong_tokens."""
    max_unjudged_steps: int = 3
    """Steps in a row of whose rollouts the verifier judged none (errors, time-outs), after which the run saves and
    stops."""
    checkpoint_every_steps: int = 100
    """Steps (of learner.rows_per_step rollouts) between two checkpoints; a stop by signal saves one more."""
    profile_steps: str | None = None
    """FIRST:END: a trace of these steps, END not among them, by JAX's profiler, in <work_dir>/profile."""
    wandb: str | None = None
    """Log to Weights & Biases too: PROJECT or ENTITY/PROJECT. WANDB_MODE=offline keeps it in <work_dir>/wandb."""
    work_dir: str | None = None
    """Where everything of the run goes; None is runs/<name>-<allocator>-<seed>."""
    extend: bool = False
    """Go on with a run under a larger total_budget than it was started with."""

    dry_run: bool = False
    """Say what the run would begin with (a prompt, its gold answer judged, memory, steps, the time to compile), or fail
    as it would; draw and write nothing. --dry-run alone will do."""

    def __post_init__(self):
        check(self)
        check_seed(self.seed)
        profiled(self.profile_steps)
        if isinstance(self.task, type) or not (dataclasses.is_dataclass(self.task) and hasattr(self.task, "build")):
            raise ValueError(
                f"task={self.task!r} must be a dataclass of settings with a method build(seed, tokenizer), which gives "
                "a cero_jax.data.Task"
            )

    @property
    def run_dir(self) -> Path:
        """The work directory, resolved. Raises ValueError for an address like gs://bucket."""
        return local_path(self.work_dir or f"runs/{self.name}-{self.allocator.name}-{self.seed}").absolute()

    @property
    def rules(self) -> Rules:
        """What a reward makes of a rollout."""
        return Rules(*(getattr(self, name) for name in Rules._fields))

    def check(self, num_prompts: int) -> None:
        """Raise ValueError for settings that do not fit each other, before any work is done."""
        allocator, learner = self.allocator, self.learner
        self.sampler.check_for_training()
        if self.checkpoint_every_steps < 1 or allocator.num_epochs < 1:
            raise ValueError(
                f"checkpoint_every_steps={self.checkpoint_every_steps} and allocator.num_epochs="
                f"{allocator.num_epochs} must be at least 1"
            )
        if not -MAX_REWARD <= self.lowest_reward < self.success_threshold <= MAX_REWARD:
            raise ValueError(
                f"success_threshold={self.success_threshold} must be above lowest_reward={self.lowest_reward}, both "
                f"within {MAX_REWARD:g} of 0: a reward of at least the threshold is a success"
            )
        limit = self.sampler.max_completion_tokens
        if not (0 <= self.overlong_tokens <= limit and 0 <= self.overlong_penalty <= MAX_REWARD):
            raise ValueError(
                f"overlong_tokens={self.overlong_tokens} must lie in 0..sampler.max_completion_tokens={limit}, "
                f"overlong_penalty={self.overlong_penalty} in 0..{MAX_REWARD:g}"
            )
        if self.overlong_tokens and learner.advantage in BY_POSTERIOR:
            raise ValueError(
                f"overlong_tokens={self.overlong_tokens} makes rewards negative, and learner.advantage="
                f"{learner.advantage} cuts them to 0..1: choose one of the two"
            )
        if self.max_unjudged_steps < 1:
            raise ValueError(f"max_unjudged_steps={self.max_unjudged_steps} must be at least 1")
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
                f"than one group of {allocator.min_group} an epoch: raise the budget or lower num_epochs"
            )
        if self.dynamic_sampling and learner.advantage in WITHOUT_GROUP:
            raise ValueError(
                f"dynamic_sampling leaves out groups without variance, which teach under learner.advantage="
                f"{learner.advantage}: choose one of the two"
            )
        if allocator.min_group < 2 and learner.advantage not in WITHOUT_GROUP:
            raise ValueError(
                f"allocator.min_group={allocator.min_group}: a group of one has no advantage under learner.advantage="
                f"{learner.advantage}: set min_group to 2 or more, or learner.advantage to reward or posterior"
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


def check_seed(seed: int) -> None:
    """Raise ValueError where it is none: the keys of all draws take 32 bits of it."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must not be negative, and below 2^32 = {2**32}")
