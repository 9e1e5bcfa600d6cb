"""CERO in Tunix's GRPOLearner: its training set is a generator that asks the allocator.

    from cero_jax.integrations.tunix import CeroDataset
    cero = CeroDataset(rows, batch_size=8, num_generations=4, total_budget=3_200)
    learner = GRPOLearner(rl_cluster, algo_config, reward_fns=cero.watch(correct))
    cero.train(learner)

Tunix repeats each prompt of a batch num_generations times and reshapes the rewards by that number. So an allocation is
which prompts come, and how often. The function that judges completions is watched, and what it says is reported. Its
checkpoints hold the allocator too. Nothing of Tunix is imported here.
"""

import base64
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cero_jax.allocator import Allocator, diagnostics
from cero_jax.integrations.groups import Groups, budget_of, one_size_allocator

PROMPT_ID = "cero_prompt_id"  # what names a row in Tunix's batches, and in the arguments of its reward functions
SAVED = "cero"  # the allocator's place in the metadata of a checkpoint


class CeroDataset:
    """A training set of batches whose prompts an allocator chooses, each batch when Tunix asks for it.

    Args:
        rows: the prompts: dicts with "prompts", a text, and whatever the reward functions want, alike in all rows.
        batch_size: prompts of a batch, which may come more than once in it.
        num_generations: rollouts of a prompt, as in GRPOConfig.
        total_budget: rollouts of the run, a multiple of batch_size num_generations. None: the allocator's.
        allocator: made with the run's budget and min_group = max_group = num_generations (or multiples of it and
            multiple_of). None: `cero_jax.cero`, whose epoch is one batch.
        success_threshold: the watched function's reward from which on a rollout is a success.
        seed: of the order of prompts.

    Raises:
        ValueError: the budget is no whole number of batches, or given twice, or a row has no prompt.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        batch_size: int,
        num_generations: int,
        total_budget: int | None = None,
        allocator: Allocator | None = None,
        success_threshold: float = 0.5,
        seed: int = 0,
    ):
        drawn = batch_size * num_generations
        if allocator is None and total_budget is not None:
            allocator, budget = one_size_allocator(total_budget, drawn, num_generations), total_budget
        elif allocator is not None and total_budget is None:
            budget = budget_of(allocator)
        else:
            raise ValueError("give total_budget, or an allocator, which has its budget")
        if budget <= 0 or budget % drawn:
            below = budget // drawn * drawn
            near = f"{below} or {below + drawn}" if below > 0 else f"{drawn}"
            raise ValueError(f"a budget of {budget} rollouts is no whole number of batches of {drawn}: give {near}")
        wrong = next((i for i, row in enumerate(rows) if row.keys() != rows[0].keys() or "prompts" not in row), None)
        if wrong is not None:
            raise ValueError(
                f'row {wrong} has the fields {list(rows[wrong])}: each needs "prompts", and all the same ones'
            )
        self.rows, self.batch_size, self.total_budget = rows, batch_size, budget
        self.success_threshold = success_threshold
        self.groups = Groups(allocator, len(rows), num_generations, seed)
        self._skipped = 0  # prompts that were trained on before a resume: Tunix reads past as many

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches until the budget is spent: each field an array [batch_size]."""
        skipped, self._skipped = self._skipped, 0
        while True:
            past = min(skipped, self.batch_size)
            skipped -= past
            batch = [0] * past + self.groups.take(self.batch_size - past)
            if len(batch) < self.batch_size:
                return
            fields = {name: np.array([self.rows[i][name] for i in batch]) for name in self.rows[0]}
            yield {**fields, PROMPT_ID: np.array(batch)}

    def watch(self, reward_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The reward function that says whether a completion is right, made to report it; an evaluation is not counted.

        A reward that is None or NaN is no evidence, and paid for all the same.
        """

        @functools.wraps(reward_fn)
        def watched(prompts, completions, **kwargs):
            prompt_ids = kwargs.pop(PROMPT_ID, None)
            rewards = reward_fn(prompts=prompts, completions=completions, **kwargs)
            if prompt_ids is not None:
                verdict = np.array(rewards, float).reshape(-1, self.groups.group_size)
                success = (verdict >= self.success_threshold).sum(1)
                judged = (~np.isnan(verdict)).sum(1)
                self.groups.report(np.asarray(prompt_ids)[:: self.groups.group_size], success, judged)
            return rewards

        return watched

    def metrics(self, **_) -> dict[str, tuple[float, Callable]]:
        """The ledger and the posterior as a metric function: GRPOLearner(..., metric_fns=[cero.metrics])."""
        scalars = diagnostics(self.groups.state)
        names = ("spent", "left", "success_rate", "expected_variance", "visited_share")
        return {f"cero/{name}": (float(scalars[name]), np.mean) for name in names}

    def train(self, learner: Any, eval_ds: Iterable | None = None, skip_jit: bool = False) -> None:
        """`learner.train` on this data, or the rest of it where the learner has restored a checkpoint.

        Raises ValueError where the learner would not spend the budget, or its checkpoint is of another run.
        """
        trainer = learner.rl_cluster.actor_trainer
        config = learner.rl_cluster.cluster_config.training_config
        mini_batch = config.mini_batch_size or self.batch_size
        generations = learner.algo_config.num_generations
        if generations != self.groups.group_size:
            raise ValueError(f"the learner has num_generations={generations}, this data {self.groups.group_size}")
        steps = self.total_budget // (mini_batch * generations) * learner.algo_config.num_iterations
        if config.max_steps is None or config.max_steps < steps:
            raise ValueError(
                f"the budget of {self.total_budget} rollouts takes {steps} steps, and the learner has "
                f"max_steps={config.max_steps}: give it {steps}"
            )
        if trainer.train_steps:
            self._restore(trainer)
            self._skipped = trainer.iter_steps * (config.train_micro_batch_size or mini_batch)
        save = trainer.checkpoint_manager.save

        def save_with_allocator(*args, custom_metadata=None, **kwargs):
            saved = base64.b64encode(self.groups.to_bytes()).decode()
            return save(*args, custom_metadata={**(custom_metadata or {}), SAVED: saved}, **kwargs)

        trainer.checkpoint_manager.save = save_with_allocator
        learner.train(self, eval_ds, skip_jit)

    def _restore(self, trainer: Any) -> None:
        saved = trainer._restored_custom_metadata.get(SAVED)
        step = trainer.train_steps
        if saved is None:
            raise ValueError(
                f"the checkpoint of step {step} has no allocator: it was written without CERO, begin a run"
            )
        self.groups.from_bytes(base64.b64decode(saved), f"the checkpoint of step {step}")
