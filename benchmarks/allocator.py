"""The allocator's figures: every bar of the design, by K and by allocator, with the seeds that were run.

    python benchmarks/allocator.py --log grpo_counts.jsonl --out benchmarks/allocator.md

Sections (--only): fixed, dual, drift, log, short, choices, pace, published. A quarter of an hour on two cores. Speed:
allocator_speed.py.
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import replication

import cero_jax
from cero_jax import simulate

PROMPTS = 1000
SECTIONS = ("fixed", "dual", "drift", "log", "short", "choices", "pace", "published")


def fixed_utilities(make, num_epochs, tau, **own):
    """Utility [] of one run with v known and constant, its optimum, and the share of the budget spent."""
    p = np.clip(np.random.default_rng(0).beta(0.5, 0.5, PROMPTS), 1e-6, 1 - 1e-6)
    alpha, beta = jnp.asarray(1e6 * p, jnp.float32), jnp.asarray(1e6 * (1 - p), jnp.float32)
    total = 8 * PROMPTS * num_epochs
    allocator = make(total_budget=total, num_epochs=num_epochs, min_group=2, discount=1.0, **own)

    def one_epoch(state, _):
        n, state = allocator.allocate(state._replace(alpha=alpha, beta=beta))
        return allocator.update(state, n, n // 2), None

    state = jax.jit(lambda: jax.lax.scan(one_epoch, allocator.init(PROMPTS), length=num_epochs)[0])()
    v = p * (1 - p)
    best, _ = cero_jax.offline_optimum(v, total_budget=total, num_epochs=num_epochs, tau=tau)
    utility = [np.sum(v * -np.expm1(-np.asarray(x, np.float64) / tau)) for x in (state.cumulative_rollouts, best)]
    return utility[0], utility[1], int(state.ledger.spent) / total


def fixed():
    """Bar 1: known, constant utilities, tau = 8K: at least 0.999 of the offline optimum."""
    makers = {
        "cero": lambda tau: partial(cero_jax.cero, explore=0.0, tau=tau),
        "cero_dual": lambda tau: cero_jax.cero_dual,
        "uniform": lambda tau: cero_jax.uniform,
        "variance": lambda tau: cero_jax.variance,
        "knapsack": lambda tau: cero_jax.knapsack,
    }
    yield "| K | " + " | ".join(makers) + " |"
    yield "|---" * (len(makers) + 1) + "|"
    for num_epochs in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        tau = 8.0 * num_epochs
        found = [fixed_utilities(make(tau), num_epochs, tau) for make in makers.values()]
        yield f"| {num_epochs} | " + " | ".join(f"{value / best:.5f}" for value, best, _ in found) + " |"


def dual():
    """Bar 2: regret of `cero_dual` under its own utility, known rates, half the prompts a round, and Theorem 1."""
    p = np.clip(np.random.default_rng(0).beta(0.5, 0.5, PROMPTS), 1e-6, 1 - 1e-6)
    v, told = p * (1 - p), {"alpha": jnp.asarray(1e6 * p, jnp.float32), "beta": jnp.asarray(1e6 * (1 - p), jnp.float32)}
    yield "| K | regret a prompt, of the optimum's | Theorem 1 | budget spent |"
    yield "|---|---|---|---|"
    sizes, regrets = (16, 64, 256, 1024, 4096), []
    for num_epochs in sizes:
        total = 4 * PROMPTS * num_epochs
        allocator = cero_jax.cero_dual(total_budget=total, num_epochs=num_epochs)

        def one_epoch(state, _, allocator=allocator):
            n, state = allocator.allocate(state._replace(**told))
            return allocator.update(state, n, n // 2), None

        start = allocator.init(PROMPTS)
        state = jax.jit(lambda: jax.lax.scan(one_epoch, start, length=num_epochs)[0])()  # noqa: B023
        exposure = total / PROMPTS
        setup = {"total_budget": total, "num_epochs": num_epochs, "max_group": 8, "tau": exposure}
        best = float(cero_jax.offline_optimum(v, **setup, utility="capture")[1]) / PROMPTS
        ours = np.mean(-np.expm1(-4 * v * np.asarray(state.cumulative_rollouts, np.float64) / exposure))
        regrets.append(best - ours)
        bound = (2 + 1) / (1 * num_epochs**0.5)  # Nmax 2, GB / M 1, nbar 1 unit a round
        spent = int(state.ledger.spent) / total
        yield f"| {num_epochs} | {regrets[-1]:.4f} of {best:.4f} | {min(1, bound):.3f} | {spent:.4f} |"
    yield f"| slope in K | **{np.polyfit(np.log(sizes), np.log(regrets), 1)[0]:.3f}** | -0.5 | |"


def settings(num_prompts, num_epochs, total_budget, min_group, first_seed):
    sizes = {"num_prompts": num_prompts, "num_epochs": num_epochs, "total_budget": total_budget}
    return {**sizes, "min_group": min_group, "tau": total_budget / num_prompts, "first_seed": first_seed}


def row(name, world, seeds, setup):
    """Values relative to uniform, `cero` relative to the same rule told the truth, and where the rollouts went."""
    outcomes = simulate.compare(world, seeds=seeds, settings=setup)
    uniform, cero, told = (outcomes[x] for x in ("uniform", "cero", "cero, told p"))
    ratio = {key: np.asarray(outcome.value / uniform.value) for key, outcome in outcomes.items()}
    error = ratio["cero"].std(ddof=1) / seeds**0.5
    cells = [f"{ratio[key].mean():.3f}" for key in ("variance", "knapsack", "cero_dual")]
    cells += [f"**{ratio['cero'].mean():.3f}** ± {error:.3f}", f"{ratio['cero, told p'].mean():.3f}"]
    cells += [f"{float((cero.value / told.value).mean()):.3f}"]
    cells += [f"{100 * float(x.live_share.mean()):.0f}" for x in (uniform, cero)]
    cells += [f"{100 * float(x.hopeless_share.mean()):.0f}" for x in (uniform, cero)]
    return f"| {name} | " + " | ".join(cells) + " |"


HEADER = (
    "| | variance | knapsack | cero_dual | cero | told p | cero / told | live %, uniform | live %, cero "
    "| hopeless %, uniform | hopeless %, cero |"
)


def drift(seeds, first_seed):
    """Bar 3: a policy that learns from what it is given; values relative to uniform."""
    yield HEADER
    yield "|---" * 11 + "|"
    for num_epochs in (4, 8, 16, 32):
        setup = settings(PROMPTS, num_epochs, 8 * PROMPTS * num_epochs, 2, first_seed)
        yield row(f"K = {num_epochs}", simulate.drifting(PROMPTS), seeds, setup)


def log(path, seeds, first_seed):
    """Bar 4: success curves of a real run."""
    successes, rollouts = simulate.read_log(path)
    yield HEADER
    yield "|---" * 11 + "|"
    for num_epochs in (4, 8, 16, 44):
        setup = settings(len(rollouts), num_epochs, 8 * len(rollouts) * num_epochs, 2, first_seed)
        world = simulate.replayed(simulate.success_curves(successes, rollouts, num_epochs))
        yield row(f"K = {num_epochs}", world, seeds, setup)


def short(seeds, first_seed):
    """Bar 5: epochs of N rollouts, groups from 4, 50 rollouts a prompt in all."""
    yield HEADER
    yield "|---" * 11 + "|"
    yield row("drift of bar 3", simulate.drifting(PROMPTS), seeds, settings(PROMPTS, 50, 50 * PROMPTS, 4, first_seed))
    for hopeless in (0.4, 0.6):
        world = simulate.drifting(512, hopeless=hopeless, own=2.0, transfer=3.0)
        yield row(f"{100 * hopeless:.0f} % hopeless", world, seeds, settings(512, 50, 25_600, 4, first_seed))


def worlds_of(path, first_seed):
    """{name: (world, settings)} in which variants of `cero` are compared."""
    worlds = {}
    for num_epochs in (8, 32):
        setup = settings(PROMPTS, num_epochs, 8 * PROMPTS * num_epochs, 2, first_seed)
        worlds[f"drift, K = {num_epochs}"] = simulate.drifting(PROMPTS), setup
    if path:
        successes, rollouts = simulate.read_log(path)
        for num_epochs in (4, 8, 44):
            setup = settings(len(rollouts), num_epochs, 8 * len(rollouts) * num_epochs, 2, first_seed)
            curves = simulate.success_curves(successes, rollouts, num_epochs)
            worlds[f"log, K = {num_epochs}"] = simulate.replayed(curves), setup
    for hopeless in (0.4, 0.6):
        world = simulate.drifting(512, hopeless=hopeless, own=2.0, transfer=3.0)
        worlds[f"short, {100 * hopeless:.0f} % hopeless"] = world, settings(512, 50, 25_600, 4, first_seed)
    return worlds


def choices(path, seeds, first_seed):
    """What each constant of `cero` buys: value relative to uniform, and the share that goes to hopeless prompts."""
    worlds = worlds_of(path, first_seed)
    variants = {
        "default": {},
        "explore 0": {"explore": 0.0},
        "explore 0.2": {"explore": 0.2},
        "prior not fitted": {"fit_prior": False},
        "prior not fitted, explore 0": {"fit_prior": False, "explore": 0.0},
        "prior not fitted, (0.3, 0.5), explore 0": {"fit_prior": False, "prior": (0.3, 0.5), "explore": 0.0},
        "discount 1": {"discount": 1.0},
        "discount 0.95": {"discount": 0.95},
        "discount 0.8": {"discount": 0.8},
        "tau halved": {"tau": 0.5},
        "tau doubled": {"tau": 2.0},
        "rational utility": {"utility": "rational"},
        "capture utility": {"utility": "capture"},
    }
    yield "| | " + " | ".join(worlds) + " |"
    yield "|---" * (len(worlds) + 1) + "|"
    base = {key: simulate.run_seeds(cero_jax.uniform, w, seeds=seeds, settings=s) for key, (w, s) in worlds.items()}
    for name, own in variants.items():
        cells = []
        for key, (world, setup) in worlds.items():
            scaled = {"tau": own["tau"] * setup["tau"]} if "tau" in own else {}
            outcome = simulate.run_seeds(cero_jax.cero, world, seeds=seeds, settings=setup, **{**own, **scaled})
            hopeless = f", {100 * float(outcome.hopeless_share.mean()):.0f} %" if "hopeless" in key else ""
            cells.append(f"{float((outcome.value / base[key].value).mean()):.3f}{hopeless}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def paced(pace: Callable[[float, float], float], *, total_budget, num_epochs, **own):
    """`cero` whose epochs get pace(progress in [0, 1), price over that of the last epochs) times their even share.

    The price: what a rollout more would add at the even share. Runs outside jit, one run at a time.
    """
    base = cero_jax.cero(total_budget=total_budget, num_epochs=num_epochs, **own)
    prices: list[float] = []

    def init(num_prompts, seed=0):
        prices.clear()
        return base.init(num_prompts, seed)

    def allocate(state):
        left, epoch = total_budget - int(state.ledger.spent), len(prices)
        prices.append(float(base.allocate(state)[1].budget_dual))
        if epoch == num_epochs - 1:
            return base.allocate(state, None, left)
        usual = np.exp(np.mean(np.log(np.maximum(prices[-9:-1] or prices, 1e-12))))
        share = pace(epoch / num_epochs, max(prices[-1], 1e-12) / usual)
        return base.allocate(state, None, round(left / (num_epochs - epoch) * share))

    return base._replace(init=init, allocate=allocate)


def pace(path, seeds, first_seed):
    """When, not only where: `cero` whose epochs get more or less than their even share; value relative to uniform."""
    paces = {
        "even (default)": lambda _, price: 1.0,
        "from 1.1 down to 0.9": lambda x, _: 1.1 - 0.2 * x,
        "from 1.3 down to 0.7": lambda x, _: 1.3 - 0.6 * x,
        "from 0.9 up to 1.1": lambda x, _: 0.9 + 0.2 * x,
        "from 0.7 up to 1.3": lambda x, _: 0.7 + 0.6 * x,
        "price, within 3 %": lambda _, price: np.clip(price, 0.97, 1.03),
        "price, within 30 %": lambda _, price: np.clip(price, 0.7, 1.3),
    }
    worlds = worlds_of(path, first_seed)
    yield "| | " + " | ".join(worlds) + " |"
    yield "|---" * (len(worlds) + 1) + "|"
    base = {key: simulate.run_seeds(cero_jax.uniform, w, seeds=seeds, settings=s) for key, (w, s) in worlds.items()}
    for name, each in paces.items():
        cells = []
        for key, (world, setup) in worlds.items():
            outcome = simulate.run_seeds(partial(paced, each), world, seeds=seeds, settings=setup)
            cells.append(f"{float((outcome.value / base[key].value).mean()):.3f}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--log", help="a log of a real run; without it the sections log and published are left out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", help="file that the tables are appended to")
    args = parser.parse_args()
    seeds = {"seeds": args.seeds, "first_seed": args.first_seed}
    sections = {
        "fixed": fixed,
        "dual": dual,
        "drift": partial(drift, **seeds),
        "log": partial(log, args.log, **seeds),
        "short": partial(short, **seeds),
        "choices": partial(choices, args.log, **seeds),
        "pace": partial(pace, args.log, **seeds),
        "published": partial(replication.published, args.log, **seeds),
    }
    for name in args.only:
        if name in ("log", "published") and not args.log:
            continue
        drawn = "One population, seed 0" if name in ("fixed", "dual") else f"{args.seeds} seeds from {args.first_seed}"
        section = sections[name]
        what = (getattr(section, "func", section).__doc__ or "").strip()
        lines = [f"\n## {name}\n", f"{what} {drawn}.\n"]
        print(*lines, sep="\n")
        for line in section():
            print(line, flush=True)
            lines.append(line)
        if args.out:
            with open(args.out, "a") as file:
                print(*lines, sep="\n", file=file)


if __name__ == "__main__":
    main()
