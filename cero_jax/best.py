"""The best policy so far, by held-out accuracy: which checkpoint holds it, and whether a run waits for a better one."""

from pathlib import Path

from cero_jax import hosts
from cero_jax.checkpoint import Checkpoints, Cursor
from cero_jax.evaluation import EvaluationConfig
from cero_jax.model import Params


def measured(cursor: Cursor, accuracy: float, config: EvaluationConfig) -> Cursor:
    """The cursor after an evaluation; the next checkpoint is that of the best policy, where this is it and it is kept.

    Of equal accuracies the first is the best.
    """
    cursor = cursor._replace(accuracy=accuracy, evaluated=cursor.spent)
    if cursor.best_accuracy is not None and accuracy <= cursor.best_accuracy:
        return cursor._replace(since_best=cursor.since_best + 1)
    kept = cursor.checkpoint_number + 1 if config.keep_best else 0
    return cursor._replace(best_accuracy=accuracy, since_best=0, best_checkpoint=kept)


def is_to_be_kept(cursor: Cursor) -> bool:
    """Whether the policy that was just measured is the best, to be kept, and in no checkpoint yet."""
    return cursor.best_checkpoint > cursor.checkpoint_number


def waited_enough(cursor: Cursor, config: EvaluationConfig) -> bool:
    """Whether `patience` evaluations in a row were no better than the best."""
    return config.patience is not None and cursor.since_best >= config.patience


def restored(directory: Path, like: Params) -> tuple[Cursor, Params] | None:
    """The best policy's trained parameters from a run's directory, and its cursor; None where none was kept.

    like: their dtype, shape and sharding. Raises ValueError where the checkpoint is damaged.
    """
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    cursor = hosts.of_first(checkpoints.best)
    return None if cursor is None else checkpoints.restore(cursor, like, part="policy.params")
