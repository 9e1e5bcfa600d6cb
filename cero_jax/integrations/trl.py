"""CERO in TRL's GRPOTrainer: the same arguments, the same number of rollouts, other prompts.

    from cero_jax.integrations.trl import CeroGRPOTrainer
    trainer = CeroGRPOTrainer(model, reward_funcs, args=args, train_dataset=dataset)
    trainer.train()

Over a trainer of your own: `class Mine(CeroMixin, YourGRPOTrainer)`. Torch and trl are imported when a trainer is used.

TRL draws num_generations rollouts of each prompt of a generation batch and reshapes the rewards by that number. So an
allocation is which prompts come, and how often. The sampler of the training set asks the allocator, a batch ahead of
what is drawn; the rewards, gathered over all processes, are reported to it. Every process has an allocator of its own,
and all decide alike.
"""

# pyright: reportMissingImports=false
# The environment of the checks has no torch.

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

if TYPE_CHECKING:
    from cero_jax.allocator import Allocator
    from cero_jax.integrations.groups import Groups

    GRPOTrainerOfTRL = Any
else:
    GRPOTrainerOfTRL = object  # torch is not imported here: the trainer comes behind the mixin

PROMPT_ID = "cero_prompt_id"  # the column that names a row of the training set, taken out before anyone reads the row
Advantage = Literal["group", "posterior"]
OVERRIDDEN = (
    "_get_train_sampler",
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_load_optimizer_and_scheduler",
)


class Plan(NamedTuple):
    """A budget in the trainer's own units. A micro-batch is what the trainer asks its loader for at once."""

    total_budget: int  # rollouts
    max_steps: int  # optimiser steps
    batch_groups: int  # groups of a generation batch, over all processes
    repeat: int  # micro-batches that a generation batch serves: it is drawn for the first of them
    trainer_epoch: int  # generation batches of what the trainer calls an epoch: about one group a prompt

    @property
    def trainer_epoch_micro_batches(self) -> int:
        """Micro-batches of what the trainer calls an epoch: whole optimiser steps."""
        return self.trainer_epoch * self.repeat


def plan(args: Any, num_prompts: int, total_budget: int | None) -> Plan:
    """How a GRPOConfig spends a budget.

    Args:
        args: a GRPOConfig.
        num_prompts: N, rows of the training set.
        total_budget: rollouts of the run. None: what TRL itself would draw in max_steps or num_train_epochs.

    Returns:
        The plan, whose max_steps is to replace the config's.

    Raises:
        ValueError: the budget is no whole number of steps, or not that of the max_steps that is set too.
    """
    batch, accumulated = args.generation_batch_size, args.gradient_accumulation_steps
    repeat = args.num_iterations * args.steps_per_generation
    whole = accumulated // math.gcd(repeat, accumulated)  # generation batches that fill whole optimiser steps
    groups = batch // args.num_generations
    trainer_epoch = max(num_prompts // groups // whole, 1) * whole
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * (trainer_epoch * repeat // accumulated))
    if total_budget is None or args.max_steps > 0:
        drawn = math.ceil(steps * accumulated / repeat) * batch
        if total_budget not in (None, drawn):
            raise ValueError(
                f"total_budget={total_budget} rollouts, and max_steps={steps} draws {drawn}: leave out one of the two"
            )
        return Plan(drawn, steps, groups, repeat, trainer_epoch)
    unit = whole * batch
    if total_budget <= 0 or total_budget % unit:
        below = total_budget // unit * unit
        near = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise ValueError(
            f"total_budget={total_budget} rollouts is no whole number of steps, which take {unit} "
            f"(generation_batch_size {batch}, gradient_accumulation_steps {accumulated}): give {near}"
        )
    return Plan(total_budget, total_budget // batch * repeat // accumulated, groups, repeat, trainer_epoch)


class GroupSampler:
    """The rows of the training set as TRL's loader wants them: each group's prompt num_generations times, in turn.

    A generation batch comes once for each micro-batch that it serves.
    """

    def __init__(self, groups: Groups, steps: Plan):
        self.groups, self.plan = groups, steps
        self.skipped = 0  # micro-batches of the trainer's epoch that were trained on before a resume

    def __len__(self) -> int:
        return self.plan.trainer_epoch_micro_batches * self.plan.batch_groups * self.groups.group_size

    def __iter__(self):
        groups, steps = self.groups, self.plan
        done, self.skipped = math.ceil(self.skipped / steps.repeat), 0
        # Stand for the batches whose rollouts the checkpoint has. The trainer skips them, or reads only their number.
        yield from [0] * (done * steps.repeat * steps.batch_groups * groups.group_size)
        for _ in range(done, steps.trainer_epoch):
            batch = groups.take(steps.batch_groups)
            if len(batch) < steps.batch_groups:
                return
            for _ in range(steps.repeat):
                yield from np.repeat(batch, groups.group_size).tolist()


class CeroMixin(GRPOTrainerOfTRL):
    """Goes before a GRPOTrainer among the bases of a class, and lets an allocator choose the prompts.

    `cero_groups.state`, while and after training, is the allocator's state.

    Args:
        total_budget: rollouts of the run. None: as many as TRL would draw in max_steps or num_train_epochs. Given, it
            decides max_steps, and num_train_epochs is not asked.
        allocator: made with the run's budget and min_group = max_group = num_generations (or multiples of it and
            multiple_of). None: `cero_jax.cero`, whose epoch is one generation batch.
        correct: the reward function that says whether a rollout is right, by its place or its name.
        success_threshold: its reward from which on a rollout is a success. No reward (None) is no evidence.
        advantage: "group", TRL's own, of each num_generations rollouts; "posterior", success over what the allocator
            expected of the prompt, given the batch's other rollouts of it (`cero_jax.grpo.posterior_advantages`), times
            the function's weight; other rewards count over their mean over the prompt. Nothing is divided by a
            deviation then: scale_rewards is not asked.
        args, kwargs: the trainer's own.

    Raises:
        ValueError: a setting, of these or of the trainer's, under which rollouts would be drawn or counted wrongly.
    """

    def __init__(
        self,
        *args,
        total_budget: int | None = None,
        allocator: Allocator | None = None,
        correct: int | str = 0,
        success_threshold: float = 0.5,
        advantage: Advantage = "group",
        **kwargs,
    ):
        if advantage not in get_args(Advantage):
            raise ValueError(f"advantage={advantage!r} must be one of {get_args(Advantage)}")
        missing = [name for name in OVERRIDDEN if not hasattr(super(CeroMixin, self), name)]
        if missing:
            name = type(self).__name__
            raise ValueError(f"{name} has no {missing[0]}: CeroMixin goes before a GRPOTrainer, of trl 1.16 or nearly")
        backend = _jax_backend()
        from cero_jax.integrations.groups import budget_of, one_size_allocator

        super().__init__(*args, **kwargs)
        _check_trainer(self, advantage)
        if allocator is not None:
            if total_budget is not None:
                raise ValueError("an allocator has its budget: leave out total_budget")
            total_budget = budget_of(allocator)
        num_prompts = len(self.train_dataset)
        self._cero_plan = plan(self.args, num_prompts, total_budget)
        batch = self.args.generation_batch_size
        self._cero_allocator = allocator or one_size_allocator(
            self._cero_plan.total_budget, batch, self.num_generations
        )
        self._cero_correct = _column(correct, self.reward_func_names)
        self._cero_threshold, self._cero_advantage = success_threshold, advantage
        self.args.max_steps = self._cero_plan.max_steps
        self.train_dataset = self.train_dataset.add_column(PROMPT_ID, list(range(num_prompts)))
        if self.accelerator.is_main_process:
            steps, right = self._cero_plan, self.reward_func_names[self._cero_correct]
            print(
                f"cero_jax: {steps.total_budget:,} rollouts over {num_prompts:,} prompts in {steps.max_steps:,} steps, "
                f"groups of {self.num_generations}, {steps.batch_groups} a generation batch; right is {right} >= "
                f"{success_threshold}; {backend}"
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if PROMPT_ID not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, PROMPT_ID]

    def _get_train_sampler(self, dataset=None):
        """A sampler of a new run: its allocator has seen nothing."""
        from cero_jax.integrations.groups import Groups

        num_prompts = len(self.train_dataset)
        self.cero_groups = Groups(self._cero_allocator, num_prompts, self.num_generations, self.args.seed)
        self._cero_sampler = GroupSampler(self.cero_groups, self._cero_plan)
        self._step, self._buffered_inputs = 0, None
        return self._cero_sampler

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        import torch

        device = self.accelerator.device
        ids = torch.tensor([row.pop(PROMPT_ID) for row in inputs], device=device)
        self._cero_ids = self.accelerator.gather(ids).cpu().numpy()
        output = super()._generate_and_score_completions(inputs)
        if self._cero_advantage == "posterior":
            start = self.accelerator.process_index * len(inputs)
            everyone = torch.tensor(self._cero_advantages, dtype=torch.float32, device=device)
            output["advantages"] = everyone[start : start + len(inputs)]
            logged = self._logs["advantages"]
            logged.extend(everyone.tolist())  # holds one generation batch: TRL's own fall out
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """As TRL's, [B, F] over all processes; reports what came of each group."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            self._cero_report(rewards.double().cpu().numpy())
        return rewards

    def _cero_report(self, rewards: np.ndarray) -> None:
        """rewards: [B, F] of the batch, num_generations rows a group, NaN where a function gave none."""
        from cero_jax.allocator import diagnostics

        verdict = rewards[:, self._cero_correct]
        judged, success = ~np.isnan(verdict), verdict >= self._cero_threshold
        if self._cero_advantage == "posterior":
            alpha, beta = (x[self._cero_ids] for x in self.cero_groups.belief())
            weights = self.reward_weights.double().cpu().numpy()
            self._cero_advantages = posterior_advantages(
                rewards, weights, self._cero_correct, success, self._cero_ids, alpha, beta
            )
        per_group = (x.reshape(-1, self.num_generations).sum(1) for x in (success, judged))
        self.cero_groups.report(self._cero_ids[:: self.num_generations], *per_group)
        scalars = diagnostics(self.cero_groups.state)
        for name in ("spent", "left", "success_rate", "expected_variance", "visited_share"):
            self._metrics["train"][f"cero/{name}"] = [float(scalars[name])]

    def _save_checkpoint(self, model, trial):
        """The allocator first, so that a checkpoint that TRL calls complete has it."""
        import torch

        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            (folder / "cero.npz").write_bytes(self.cero_groups.to_bytes())
        if self._step % self._cero_plan.repeat:  # rollouts that were paid for and have steps to come
            torch.save(self._buffered_inputs, folder / f"cero_rollouts_{self.accelerator.process_index}.pt")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        import torch
        from accelerate.utils import send_to_device

        path = Path(checkpoint) / "cero.npz"
        if not path.is_file():
            raise ValueError(f"{checkpoint} has no cero.npz: it was written without CERO, begin a run or take another")
        self.cero_groups.from_bytes(path.read_bytes(), str(path))
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._cero_sampler.skipped = self._step % self._cero_plan.trainer_epoch_micro_batches
        if self._step % self._cero_plan.repeat:
            path = path.with_name(f"cero_rollouts_{self.accelerator.process_index}.pt")
            if not path.is_file():
                raise ValueError(f"{path} is missing: resume with as many processes as the run was begun with")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self._buffered_inputs = send_to_device(saved, self.accelerator.device)


def posterior_advantages(
    rewards: np.ndarray,
    weights: np.ndarray,
    correct: int,
    success: np.ndarray,
    prompt_ids: np.ndarray,
    alpha: np.ndarray,
    beta: np.ndarray,
) -> np.ndarray:
    """Advantages [B] by the posterior for one reward function, over the prompt's mean for the others.

    Args:
        rewards: [B, F] of all functions, NaN where one gave none.
        weights: [F].
        correct: the function whose verdict is `success`.
        success: [B] bool.
        prompt_ids: [B] int.
        alpha, beta: [B] float32, the posterior of the row's prompt before the batch.
    """
    import jax.numpy as jnp

    from cero_jax import grpo

    _, group_ids = np.unique(prompt_ids, return_inverse=True)
    judged = ~np.isnan(rewards[:, correct])
    rows = (success.astype(np.float32), alpha, beta, group_ids.astype(np.int32), judged)
    ours = grpo.posterior_advantages(*(jnp.asarray(x) for x in rows), num_groups=len(group_ids))
    advantages = weights[correct] * np.asarray(ours, np.float64)
    for function in set(range(rewards.shape[1])) - {correct}:
        given = ~np.isnan(rewards[:, function])
        reward = np.where(given, rewards[:, function], 0)
        mean = np.bincount(group_ids, reward) / np.maximum(np.bincount(group_ids, given), 1)
        advantages += weights[function] * np.where(given, reward - mean[group_ids], 0)
    return advantages


def _jax_backend() -> str:
    """Keeps JAX off the GPU, unless JAX_PLATFORMS says otherwise, and says where it is."""
    asked = os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_platforms", asked)  # jax may have been imported before
    backend = jax.default_backend()
    if backend == "cpu":
        return "JAX on the CPU"
    return f"JAX on the {backend}, of whose memory it takes three quarters: start with JAX_PLATFORMS=cpu"


def _column(correct: int | str, names: list[str]) -> int:
    """The place of a reward function that is named by its place or by its name. Raises ValueError: there is none."""
    if correct in names:
        return names.index(correct)
    if isinstance(correct, int) and -len(names) <= correct < len(names):
        return correct % len(names)
    raise ValueError(f"correct={correct!r} is no reward function: give one of {names}, or its place")


def _check_trainer(trainer: Any, advantage: Advantage) -> None:
    """Raises ValueError on what a trainer was given that an allocation cannot be combined with."""
    args, dataset = trainer.args, trainer.train_dataset
    if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}: an allocator needs rows with numbers, a Dataset"
        )
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip=True: leave it False, a resumed run skips nothing that has not been drawn")
    if args.accelerator_config.dispatch_batches or args.accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches and split_batches must be off, every process asks for itself"
        )
    if advantage == "posterior" and getattr(args, "multi_objective_aggregation", "") == "normalize_then_sum":
        raise ValueError('advantage="posterior" needs multi_objective_aggregation="sum_then_normalize"')


def __getattr__(name: str):
    """`CeroGRPOTrainer`, made on first use."""
    if name == "CeroGRPOTrainer":
        from trl import GRPOTrainer

        globals()[name] = type(name, (CeroMixin, GRPOTrainer), {"__doc__": CeroMixin.__doc__, "__module__": __name__})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has CeroGRPOTrainer and CeroMixin")
