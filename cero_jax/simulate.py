"""What an allocation is worth, without training anything: a drifting policy, or the log of a run of yours.

    python -m cero_jax.simulate                       all allocators on a policy that learns from what it is given
    python -m cero_jax.simulate --log rollouts.jsonl  its headroom, and what they would have done with that run's budget

A log has one row a rollout, with the fields prompt, epoch and reward (other names: --fields), as JSONL, JSON, CSV or
Parquet; a prompt may be text, a number or messages, and a row may hold the rewards of several rollouts in a list. JSON
may instead hold one row a prompt: {"group_size": 8, "num_correct": [0, 3, 8]}, one count a visit.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cero_jax import starting

if __name__ == "__main__":
    starting.name_what_is_missing()

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cero_jax.allocator import Allocator, AllocatorState, cero, cero_dual, knapsack, uniform, variance
from cero_jax.headroom import explain, headroom
from cero_jax.paths import local_path
from cero_jax.rollout_log import read_log
from cero_jax.terminal import printable

ALLOCATORS = (uniform, variance, knapsack, cero_dual, cero)
SMOOTHING = 2.0  # visits: width of the Gaussian that turns a prompt's logged counts into a success curve
CANNOT_KNOW = """\
What a replay cannot know: the logged policy learned from the logged rollouts. Here every allocator meets the same
success curves, smoothed from the log, as if its own choices had taught the policy nothing more and nothing less; a
prompt seldom visited has a curve that is mostly guess; and rollouts in live groups are not yet accuracy. Read it as how
much of the budget was spent on groups that could teach nothing, and how much of that could be found out in time."""


class World(NamedTuple):
    """A policy's success on N prompts, and how it moves."""

    init: Callable[[Array], Array]  # key -> logits [N]
    success: Callable[[Array, Array], Array]  # (logits [N], share of the budget spent []) -> probability [N]
    learn: Callable[
        [Array, Array, Array], Array
    ]  # (logits, probability, rollouts / budget a prompt) -> logits, all [N]


class Outcome(NamedTuple):
    """What a run came to."""

    value: Array  # [] sum over epochs and prompts of p(1 - p), true at the time, times the increment of h(X / tau)
    live_share: Array  # [] share of the rollouts drawn that were in live groups, which hold two different rewards
    hopeless_share: Array  # [] share of the rollouts that went to prompts with p = 0
    spent_share: Array  # [] of the budget
    accuracy: Array  # [] mean success at the end on prompts that can be solved
    rollouts: Array  # [N] int32, cumulative
    success: Array  # [N] success probability at the start


def drifting(num_prompts: int, *, hopeless: float = 0.0, own: float = 1.0, transfer: float = 1.0) -> World:
    """A policy that learns fastest where the variance and the allocation are.

    Logits are N(-0.5, 2.5). A prompt's logit rises by `own` times the signal that it gets (4 p (1 - p) times its
    rollouts, in units of the run's budget a prompt) and by `transfer` times the mean signal of all. With `hopeless` >
    0, that share can never be solved, half of the rest begin easy, N(0.5, 1), and half hard, N(-4, 2).
    """

    def init(key):
        normal_key, order_key = jax.random.split(key)
        noise = jax.random.normal(normal_key, (num_prompts,))
        if not hopeless:
            return -0.5 + 2.5 * noise
        rank = jax.random.permutation(order_key, num_prompts) / num_prompts
        logits = jnp.where(rank < hopeless + (1 - hopeless) / 2, 0.5 + noise, -4 + 2 * noise)
        return jnp.where(rank < hopeless, -jnp.inf, logits)

    def learn(logits, probability, rollouts):
        signal = 4 * probability * (1 - probability) * rollouts
        return logits + own * signal + transfer * jnp.mean(signal) / (1 - hopeless)

    return World(init, lambda logits, _: jax.nn.sigmoid(logits), learn)


def replayed(curves) -> World:
    """Success curves [K, N] spread over the budget, whatever is allocated."""
    curves = jnp.asarray(curves, jnp.float32)
    last = curves.shape[0] - 1

    def success(_, progress):
        return curves[jnp.minimum((progress * (last + 1)).astype(jnp.int32), last)]

    return World(lambda key: jnp.zeros(curves.shape[1]), success, lambda logits, *_: logits)


class Course(NamedTuple):
    """How far a run has come, beside the allocator's state."""

    logits: Array  # [N]
    value: Array  # [], as in Outcome
    live: Array  # [] int32, rollouts in live groups
    hopeless: Array  # [] int32, rollouts of prompts with p = 0


def run(allocator: Allocator, world: World, key, *, num_prompts, total_budget, num_epochs, tau, told=False) -> Outcome:
    """num_epochs epochs of one run. tau: of the value that is reported. told: show the rule the true p.

    A small run is over in less time than it takes to compile, so no more is compiled than must be: the allocator's own
    functions, once for all its runs, and what comes of their decisions, once for all allocators.
    """
    course, epoch_keys, seed = _begin(world, num_epochs, key)
    start, state = course.logits, allocator.init(num_prompts, seed)
    for epoch in range(num_epochs):
        probability = _success(world, course.logits, state.ledger.spent, total_budget)
        if told:
            state = _tell(state, probability)
        n, state = allocator.allocate(state)
        drawn = probability, n, state.cumulative_rollouts
        correct, course = _draw(world, total_budget, tau, course, epoch_keys, epoch, *drawn)
        state = allocator.update(state, n, correct)
    return _outcome(world, total_budget, start, course, state.ledger.spent, state.cumulative_rollouts)


@partial(jax.jit, static_argnums=(0, 1))
def _begin(world: World, num_epochs: int, key) -> tuple[Course, Array, Array]:
    """The start of a run, the keys [K] of its epochs, and its allocator's seed []."""
    init_key, epochs_key, seed_key = jax.random.split(key, 3)
    nothing = jnp.zeros((), jnp.int32)
    course = Course(world.init(init_key), jnp.zeros(()), nothing, nothing)
    return course, jax.random.split(epochs_key, num_epochs), jax.random.randint(seed_key, (), 0, 2**30)


@partial(jax.jit, static_argnums=(0, 3))
def _success(world: World, logits: Array, spent: Array, total_budget: int) -> Array:
    """[N] success probabilities where `spent` rollouts of the budget are gone."""
    return world.success(logits, spent / total_budget)


def _tell(state: AllocatorState, probability: Array) -> AllocatorState:
    """The state with a posterior that is as good as certain of the true success probability."""
    return state._replace(alpha=probability * 1e6, beta=(1 - probability) * 1e6)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    world: World, total_budget: int, tau: float, course: Course, keys, epoch, probability: Array, n: Array, had: Array
) -> tuple[Array, Course]:
    """The successes [N] among n [N] rollouts of prompts that have `had` [N] before, and where they leave the run."""

    def utility(rollouts):
        return -jnp.expm1(-rollouts.astype(jnp.float32) / tau)

    correct = jax.random.binomial(keys[epoch], n.astype(jnp.float32), probability).astype(jnp.int32)
    gain = probability * (1 - probability) * (utility(had + n) - utility(had))
    return correct, Course(
        logits=world.learn(course.logits, probability, n * (n.size / total_budget)),
        value=course.value + jnp.sum(gain),
        live=course.live + jnp.sum(jnp.where((correct > 0) & (correct < n), n, 0)),
        hopeless=course.hopeless + jnp.sum(jnp.where(probability == 0, n, 0)),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _outcome(world: World, total_budget: int, start: Array, course: Course, spent: Array, rollouts: Array) -> Outcome:
    """What a run that began at the logits `start` [N] came to."""
    drawn = jnp.maximum(spent, 1)
    first, final = world.success(start, jnp.zeros(())), world.success(course.logits, jnp.ones(()))
    accuracy = jnp.sum(final) / jnp.maximum(jnp.sum(first > 0), 1)
    shares = course.live / drawn, course.hopeless / drawn, spent / total_budget
    return Outcome(course.value, *shares, accuracy, rollouts, first)


def run_seeds(
    make: Callable[..., Allocator], world: World, *, seeds: int, settings: dict, told=False, **own
) -> Outcome:
    """`run` over seeds: every field of the outcome with a leading axis. make: an allocator; own: its keywords."""
    return _over_seeds(_made(make, settings, **own), world, seeds, settings, told)


def compare(
    world: World, *, seeds: int, settings: dict, say: Callable[[str], object] = lambda line: None
) -> dict[str, Outcome]:
    """Every allocator, and `cero` told the truth, on the same seeds. say: is told of each that is done."""
    allocators = {make.__name__: _made(make, settings) for make in ALLOCATORS}
    arms = [(name, allocator, False) for name, allocator in allocators.items()]
    outcomes = {}
    for name, allocator, told in [*arms, ("cero, told p", allocators["cero"], True)]:
        since = time.monotonic()
        outcomes[name] = _over_seeds(allocator, world, seeds, settings, told)
        say(f"{name}: {seeds} runs of {settings['num_epochs']} epochs in {time.monotonic() - since:.1f} s")
    return outcomes


def _made(make: Callable[..., Allocator], settings: dict, **own) -> Allocator:
    return make(**{name: settings[name] for name in ("total_budget", "num_epochs", "min_group")}, **own)


def _over_seeds(allocator: Allocator, world: World, seeds: int, settings: dict, told: bool) -> Outcome:
    sizes = {name: settings[name] for name in ("num_prompts", "total_budget", "num_epochs", "tau")}
    keys = jax.random.split(jax.random.key(settings.get("first_seed", 0)), seeds)
    outcomes = [run(allocator, world, key, told=told, **sizes) for key in keys]
    return jax.tree.map(lambda *fields: jnp.stack(fields), *outcomes)


def success_curves(successes: np.ndarray, rollouts: np.ndarray, num_epochs: int) -> np.ndarray:
    """Success probability [K, N]: each prompt's counts [N, visits] smoothed over them, K epochs spread over them."""
    num_visits = np.maximum((rollouts > 0).sum(1), 1)
    at = (np.arange(num_epochs)[:, None] + 0.5) / num_epochs * num_visits - 0.5  # [K, N], in visits
    curves = np.empty(at.shape)
    for k, where in enumerate(at):
        weight = np.exp(-0.5 * ((where[:, None] - np.arange(rollouts.shape[1])) / SMOOTHING) ** 2)
        curves[k] = (weight * successes).sum(1) / np.maximum((weight * rollouts).sum(1), 1e-300)
    return curves


def outcome_table(outcomes: dict[str, Outcome]) -> str:
    """A Markdown table: means over seeds, value relative to uniform of the same seed with its standard error."""
    lines = [
        "| allocator | value / uniform | rollouts in live groups | to hopeless prompts | budget spent | end accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        ratio = np.asarray(outcome.value / outcomes["uniform"].value)
        error = ratio.std(ddof=1) / np.sqrt(len(ratio)) if len(ratio) > 1 else float("nan")
        shares = (outcome.live_share, outcome.hopeless_share, outcome.spent_share)
        cells = " | ".join(f"{100 * float(x.mean()):.1f} %" for x in shares)
        lines.append(f"| {name} | {ratio.mean():.3f} ± {error:.3f} | {cells} | {float(outcome.accuracy.mean()):.3f} |")
    return "\n".join(lines)


def picture(outcomes: dict[str, Outcome], path: Path) -> None:
    """Rollouts a prompt against the success probability at the start, one line an allocator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    edges = np.linspace(0, 1, 11)
    for name, outcome in outcomes.items():
        place = np.clip(np.digitize(np.asarray(outcome.success).ravel(), edges) - 1, 0, 9)
        total = np.bincount(place, np.asarray(outcome.rollouts).ravel(), minlength=10)
        prompts = np.bincount(place, minlength=10)
        some = prompts > 0
        axes.plot((edges[1:] + edges[:-1])[some] / 2, total[some] / prompts[some], "o-", label=name)
    axes.set(xlabel="success probability at the start", ylabel="rollouts a prompt", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def replay_settings(rollouts: np.ndarray, num_epochs: int, min_group: int) -> dict:
    """The budget of a logged run, in num_epochs epochs."""
    num_prompts, total = rollouts.shape[0], int(rollouts.sum())
    sizes = {"num_prompts": num_prompts, "total_budget": total, "num_epochs": num_epochs}
    return {**sizes, "min_group": min_group, "tau": total / num_prompts}


def _at_least_one(text: str) -> int:
    """A number of the command line, which shows the error in one line."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**8:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be a whole number from 1 to {10**8}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cero_jax.simulate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--log",
        help="JSONL, JSON, CSV or Parquet files (a path or a glob) of (prompt, epoch, reward) rows; default: simulate",
    )
    parser.add_argument(
        "--fields",
        nargs=3,
        default=("prompt", "epoch", "reward"),
        metavar=("PROMPT", "EPOCH", "REWARD"),
        help="what these fields are called in the log (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=_at_least_one, help="epochs of a run; default 16, or the longest prompt's visits in a log"
    )
    parser.add_argument("--prompts", type=_at_least_one, default=1000, help="prompts of the simulated data set")
    parser.add_argument("--hopeless", type=float, default=0.0, help="share of prompts that can never be solved")
    parser.add_argument("--min-group", type=_at_least_one, default=4, help="rollouts of the smallest group")
    parser.add_argument("--seeds", type=_at_least_one, default=4, help="runs of each allocator (default: %(default)s)")
    parser.add_argument("--picture", default="simulate.png", help="where the picture goes (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        args.picture = local_path(args.picture)
    except ValueError as error:
        parser.error(printable(str(error)))
    if not 0 <= args.hopeless < 1:
        parser.error(f"--hopeless={args.hopeless} must lie in [0, 1): a share of the prompts")
    if not args.picture.parent.is_dir():
        parser.error(f"--picture={args.picture}: no such folder: make it first")
    if args.log:
        try:
            successes, rollouts = read_log(args.log, tuple(args.fields))
        except (FileNotFoundError, ValueError) as error:
            parser.error(printable(str(error)))
        num_epochs = args.epochs or rollouts.shape[1]
        settings = replay_settings(rollouts, num_epochs, args.min_group)
        wasted = rollouts[(successes == 0) | (successes == rollouts)].sum() / rollouts.sum()
        never = rollouts[successes.sum(1) == 0].sum() / rollouts.sum()
        print(f"{settings['total_budget']} rollouts of {len(rollouts)} prompts in {args.log}.")
        print(f"{100 * wasted:.1f} % of them went to groups without variance,", end=" ")
        print(f"{100 * never:.1f} % to prompts never solved.\n")
        print(f"{explain(headroom(successes, rollouts))}\n", flush=True)
        world = replayed(success_curves(successes, rollouts, num_epochs))
    else:
        num_epochs, total = args.epochs or 16, 8 * args.prompts * (args.epochs or 16)
        sizes = {"num_prompts": args.prompts, "total_budget": total, "num_epochs": num_epochs}
        settings = {**sizes, "min_group": args.min_group, "tau": total / args.prompts}
        world = drifting(args.prompts, hopeless=args.hopeless)
        print(f"{total} rollouts, {args.prompts} prompts, {num_epochs} epochs, {args.seeds} seeds.\n")
    try:
        outcomes = compare(world, seeds=args.seeds, settings=settings, say=partial(print, file=sys.stderr, flush=True))
    except ValueError as error:  # of an allocator, to its settings
        parser.error(str(error))
    print(outcome_table(outcomes))
    if args.log:
        print(f"\n{CANNOT_KNOW}")
    try:
        picture(outcomes, args.picture)
        print(f"\npicture: {args.picture}")
    except ImportError:
        print("\nno picture: it needs matplotlib (pip install matplotlib)")
    except (OSError, ValueError) as error:
        print(f"\nno picture: {args.picture}: {error}")


if __name__ == "__main__":
    main()
