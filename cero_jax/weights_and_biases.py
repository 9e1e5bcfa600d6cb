"""A run in Weights & Biases, where --wandb=PROJECT asks for it: scalars, settings, completions, the picture at its end.

What it misses is lost there alone: its first failure is said, and the run goes on without it. WANDB_MODE=offline keeps
all under <work_dir>/wandb, for `wandb sync`. The package `wandb` is imported where it is asked for.
"""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cero_jax.starting import install
from cero_jax.terminal import one_line, say

COLUMNS = ("prompt_id", "question", "completion", "answer", "extracted", "status", "reward")
MOST_ROWS = 100  # of the table of an evaluation's completions
FINISH_SECONDS = 60.0  # that a run waits at its end for what is still to be sent


def check(project: str) -> None:
    """Raise ValueError where this is no project's name, or the package is missing."""
    if not re.fullmatch(r"([^/\\#?%:]+/)?[^/\\#?%:]{1,128}", project):
        raise ValueError(f"wandb={project!r}: give PROJECT or ENTITY/PROJECT, without any of \\ # ? % :")
    _package(project)


def new_id() -> str:
    """An id for a run, under which it goes on after a resume."""
    return secrets.token_hex(8)


def _package(project: str) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports] (of no other extra)
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder wandb/, as W&B leaves, is imported, too
        raise ValueError(f"wandb={project!r} needs the package wandb: {install('train,wandb')}")
    return wandb


class WeightsAndBiases:
    """The W&B run of that id, begun or gone on with. Nothing here raises, but for what `check` refuses.

    settings: the config, as `to_json` gives it.
    """

    def __init__(self, project: str, run_dir: Path, run_id: str, settings: dict):
        self._wandb, self._run = _package(project), None
        entity, _, name = project.rpartition("/")
        quietly = {"console": "off", "silent": True, "finish_timeout": FINISH_SECONDS}
        with self._may_fail():
            self._run = self._wandb.init(
                entity=entity or None, project=name, dir=run_dir, id=run_id, name=run_dir.name, resume="allow",
                config=settings, allow_val_change=True, settings=self._wandb.Settings(**quietly),
            )  # fmt: skip
            kept = f"offline, in {Path(self._run.dir).parent}: `wandb sync` sends it"
            say(f"W&B: {kept if self._run.offline else self._run.url}")

    def write(self, spent: int, scalars: dict[str, float]) -> None:
        """Log scalars by their tags, over the rollouts spent. What W&B has from before a resume is not sent again."""
        if self._run is not None:
            with self._may_fail():
                if spent >= self._run.step:
                    self._run.log(scalars, step=spent)

    def write_completions(self, spent: int, samples: list[dict[str, Any]]) -> None:
        """Log the first completions of an evaluation as a table, in the same way."""
        if self._run is not None:
            with self._may_fail():
                rows = [[each.get(column) for column in COLUMNS] for each in samples[:MOST_ROWS]]
                if spent >= self._run.step:
                    self._run.log({"completions": self._wandb.Table(columns=list(COLUMNS), data=rows)}, step=spent)

    def end(self, picture: Path | None) -> None:
        """Log the report's picture, where there is one, and close."""
        if self._run is not None:
            with self._may_fail():
                if picture is not None:
                    self._run.log({"report": self._wandb.Image(str(picture))})
                self._run.finish()
            self._run = None

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Say what fails, and leave W&B alone from then on."""
        try:
            yield
        except Exception as error:  # of whatever kind: a network's, the service's, the server's
            self._run = None
            why = one_line(f"{type(error).__name__}: {error}")
            say(f"warning: W&B failed ({why}): the run goes on without it; metrics.jsonl has its metrics all the same")
