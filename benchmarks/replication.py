"""CERO's published experiment on the log of a real run: its mechanism figures and its controls, beside every rule.

A section of allocator.py. What the paper saw stands beside ours; the policy is the logged one, and learns nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import cero_jax
from cero_jax import simulate
from cero_jax.allocator import Allocator
from cero_jax.allocator.cero_dual import highest_first
from cero_jax.allocator.selection import scattered
from cero_jax.report import mechanism

GROUP, NMAX, ROUNDS = 8, 2, 128
ONE_SIZE = {"min_group": GROUP, "max_group": GROUP}


def fixed(*, total_budget, num_epochs, shares=(1.0,), **settings) -> Allocator:
    """Where, and not when: Algorithm 1 at price 0, so that every round takes its capacity.

    shares: capacity of a round over the mean, for equal parts of the budget, one after the other.
    """
    mean = total_budget / num_epochs / GROUP
    parts = [
        cero_jax.cero_dual(
            total_budget=total_budget, num_epochs=num_epochs, capacity=NMAX * round(mean * share), **settings
        )
        for share in shares
    ]

    def allocate(state, prompt_ids=None, budget=None):
        if prompt_ids is not None or budget is not None:
            raise ValueError("a control hands out whole rounds over all prompts")
        state = state._replace(rule_state=state.rule_state._replace(price=jnp.float32(0)))
        part = (state.ledger.spent * len(parts)) // total_budget
        return jax.lax.switch(part, [each.allocate for each in parts], state)

    return parts[0]._replace(allocate=allocate)


def preset(**settings) -> Allocator:
    """The paper's plan of sizes: 528 responses a round, then 496, of 512 on average."""
    return fixed(**settings, shares=(528 / 512, 496 / 512))


def greedy(*, total_budget, num_epochs, prior=(1.0, 1.0), lam=1.0) -> Allocator:
    """Each round's prompts of the largest U(q, z + Nmax) - U(q, z): no dual variable."""

    def rule(state, candidates, budget, key):
        exposure = total_budget / state.alpha.shape[0]
        c = 4 * lam * cero_jax.expected_variance(candidates.alpha, candidates.beta) / exposure  # a rollout
        gain = -jnp.expm1(-c * GROUP) * jnp.exp(-c * candidates.rollouts)
        ties = scattered(jnp.arange(len(gain)), jnp.uint32(7))
        return jnp.where(highest_first(gain, ties, candidates.valid, budget // GROUP), float(GROUP), 0.0), state

    return cero_jax.build_allocator(
        rule,
        total_budget=total_budget,
        num_epochs=num_epochs,
        min_group=GROUP,
        max_group=GROUP,
        prior=prior,
        discount=1.0,
    )


ARMS = {
    "uniform, groups of 8": partial(cero_jax.uniform, **ONE_SIZE),
    "`cero_dual`, as published": cero_jax.cero_dual,
    "its counts, prompts permuted": "`cero_dual`, as published",
    "fixed (price 0, b each round)": fixed,
    "preset": preset,
    "greedy": greedy,
    "greedy, Beta(1/2, 1/2)": partial(greedy, prior=(0.5, 0.5)),
    "`variance`, 4 to 32": cero_jax.variance,
    "`knapsack`, 4 to 32": cero_jax.knapsack,
    "`cero`, groups of 8": partial(cero_jax.cero, **ONE_SIZE),
    "its counts, permuted": "`cero`, groups of 8",
    "`cero`, groups of 8, capture": partial(cero_jax.cero, **ONE_SIZE, utility="capture"),
    "`cero`, 4 to 32": cero_jax.cero,
}


def follow(allocator: Allocator, curves, num_prompts: int, total_budget: int, key, plan=None):
    """One run, each [K, N]: alpha and beta before, rollouts, successes, true success. plan: counts [K, N]."""
    rounds_key, seed_key = jax.random.split(key)

    def one_round(state, given):
        key, plan = given
        p = curves[jnp.minimum(state.ledger.spent / total_budget * len(curves), len(curves) - 1).astype(jnp.int32)]
        before = state.alpha, state.beta
        if plan is None:
            n, state = allocator.allocate(state)
        else:
            n = plan
        correct = jax.random.binomial(key, n.astype(jnp.float32), p).astype(jnp.int32)
        return allocator.update(state, n, correct), (*before, n, correct, p)

    start = allocator.init(num_prompts, jax.random.randint(seed_key, (), 0, 2**30))
    return jax.lax.scan(one_round, start, (jax.random.split(rounds_key, ROUNDS), plan))[1]


def runs_of_all_arms(path, visits, seeds, first_seed, arms):
    """{arm: its runs over seeds}, each as `follow` returns it with an axis of seeds before."""
    successes, rollouts = simulate.read_log(path)
    curves = jnp.asarray(simulate.success_curves(successes, rollouts, ROUNDS), jnp.float32)
    num_prompts, total = len(rollouts), int(visits * len(rollouts)) * GROUP
    keys, found = jax.random.split(jax.random.key(first_seed), seeds), {}
    for name in arms:
        make, plan = ARMS[name], None
        if isinstance(make, str):  # the counts of a finished run, given to other prompts
            orders = jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, 1), num_prompts))(keys)
            plan = jax.vmap(lambda n, order: n[:, order])(found[make][2], orders)
            make = ARMS[make]
        allocator = make(total_budget=total, num_epochs=ROUNDS)  # type: ignore[operator]
        run = partial(follow, allocator, curves, num_prompts, total)
        found[name] = jax.jit(jax.vmap(run))(keys, plan) if plan is not None else jax.jit(jax.vmap(run))(keys)
    return found


def figures(run) -> dict:
    """Of one arm: means over seeds, in percent where a share. The prompts of all seeds count as those of one run."""
    alpha, beta, n, correct, p = (np.asarray(x, np.float64).swapaxes(0, 1) for x in run)  # [K, seeds, N]
    n, correct = n.astype(int), correct.astype(int)
    epochs = (mechanism.epoch(*(x.ravel() for x in each)) for each in zip(alpha, beta, n, correct, strict=True))
    selection, groups = mechanism.observe(epochs)
    bins, live = mechanism.calibration(groups, 20), (correct > 0) & (correct < n)
    by_seed = 100 * live.sum((0, 2)) / (n > 0).sum((0, 2))
    return {
        "effective": (by_seed.mean(), by_seed.std(ddof=1) / len(by_seed) ** 0.5),
        "rows": 100 * n[live].sum() / n.sum(),
        "teaches": (p * (1 - p) * np.maximum(n - 1, 0)).sum() / n.sum(),
        "lift": mechanism.lift(selection),
        "predicted": groups.expected.mean(),
        "seen": mechanism.unbiased_variance(groups).mean(),
        "pearson": np.corrcoef(bins.expected, bins.seen)[0, 1],
        "exposure": mechanism.exposure(n.sum(0).ravel()),
        "spent": n.sum((0, 2)).mean(),
    }


def published(path, *, seeds, first_seed, visits=3.6):
    """CERO's published experiment on the log of a real run: 3.6 visits a prompt, groups of 8, 128 rounds."""
    found = {name: figures(run) for name, run in runs_of_all_arms(path, visits, seeds, first_seed, ARMS).items()}
    yield "| arm | effective groups | rows in live groups | p(1-p)(n-1) a rollout | rollouts spent |"
    yield "|---|---|---|---|---|"
    for name, x in found.items():
        mean, error = x["effective"]
        yield f"| {name} | {mean:.1f} ± {error:.1f} % | {x['rows']:.1f} % | {x['teaches']:.3f} | {x['spent']:.0f} |"
    yield "| *the paper: CERO; random-matched; Knapsack RL* | *57.3; 52.7; 48.7 %* | | | |"
    yield ""
    edges = list(mechanism.BIN_NAMES)
    yield "Selection lift by predicted success; variance expected and seen in the groups drawn, with Pearson's r over"
    yield "20 bins; exposure at the end over its mean, 10, 50 and 90 % of the prompts."
    yield ""
    yield "| arm | " + " | ".join(edges) + " | expected | seen | r | exposure |"
    yield "|---" * (len(edges) + 5) + "|"
    for name, x in found.items():
        cells = [f"{each:.2f}" for each in x["lift"]]
        cells += [f"{x['predicted']:.3f}", f"{x['seen']:.3f}", f"{x['pearson']:.3f}"]
        yield f"| {name} | " + " | ".join([*cells, " / ".join(f"{each:.2f}" for each in x["exposure"])]) + " |"
    yield "| *the paper: CERO* | *0.65* | | *1.72* | | *0.65* | *0.154* | *0.119* | *0.971* | *0.84 / 0.84 / 1.40* |"
    yield ""
    yield "Effective groups where prompts are visited more often:"
    yield ""
    longer = ["uniform, groups of 8", "`cero_dual`, as published", "greedy", "`cero`, groups of 8"]
    longer += ["`cero`, groups of 8, capture"]
    yield "| visits a prompt | " + " | ".join(longer) + " |"
    yield "|---" * (len(longer) + 1) + "|"
    for more in (12, 44):
        runs = runs_of_all_arms(path, more, seeds, first_seed, longer)
        yield f"| {more} | " + " | ".join(f"{figures(runs[name])['effective'][0]:.1f} %" for name in longer) + " |"
