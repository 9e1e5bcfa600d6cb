"""What an epoch costs: allocate + update by N, beside NumPy, solvers, and reading and writing the state once.

    pip install cvxpy && python benchmarks/allocator_speed.py --out benchmarks/allocator_speed.md

Medians of fifteen calls after the first (of three for NumPy and the convex solver). `stream` reads and writes every
array of the state once. NumPy runs the same rule (water-filling by bisection, systematic sampling, decay) in vectorised
float32. Peak memory is XLA's own analysis of allocate: arguments + outputs + temporaries. A GPU, where there is one, is
used without further ado.
"""

import argparse
import time

import jax
import numpy as np

import cero_jax

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)


def median_seconds(function, repeats=15):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def numpy_epoch(alpha, beta, rollouts, budget, tau, rng, low=4, high=32):
    """The same rule on NumPy arrays: shares by bisection, groups by systematic sampling, then the posterior."""
    total = alpha + beta
    log_v = np.log((alpha / total) * (beta / total) * (total / (total + 1)))
    bottom, top = np.min(log_v - (rollouts + high) / tau), np.max(log_v - rollouts / tau)
    for _ in range(36):
        middle = (bottom + top) / 2
        enough = np.clip(tau * (log_v - middle) - rollouts, 0, high).sum() >= budget
        bottom, top = (middle, top) if enough else (bottom, middle)
    shares = np.clip(tau * (log_v - bottom) - rollouts, 0, high)
    chance = np.minimum(shares / low, 1)
    place = np.cumsum(chance, dtype=np.float64) + rng.random()
    chosen = np.floor(place) > np.floor(place - chance)
    size = np.maximum(shares, low)
    n = np.where(chosen, np.floor(size) + (rng.random(len(size), np.float32) < size % 1), 0)
    keep = np.float32(0.9 ** (budget / (8 * len(alpha))))
    return 0.5 + keep * (alpha - 0.5) + n // 2, 0.5 + keep * (beta - 0.5) + (n - n // 2), rollouts + n


def state_of(make, num_prompts):
    allocator = make(total_budget=50 * num_prompts, num_epochs=50)
    state = allocator.init(num_prompts)
    p = jax.random.beta(jax.random.key(1), 0.5, 0.5, (num_prompts,))
    return allocator, state._replace(alpha=0.5 + 16 * p, beta=0.5 + 16 * (1 - p))


def sizes():
    yield "| N | allocate ms | update ms | stream ms | both / stream | NumPy ms | peak float32 a prompt |"
    yield "|---|---|---|---|---|---|---|"
    for num_prompts in SIZES:
        allocator, state = state_of(cero_jax.cero, num_prompts)
        n, after = allocator.allocate(state)
        correct = n // 2
        allocate = median_seconds(lambda a=allocator, s=state: a.allocate(s))
        update = median_seconds(lambda a=allocator, s=after, n=n, c=correct: a.update(s, n, c))
        arrays = (state.alpha, state.beta, state.cumulative_rollouts, state.reserved)
        stream = jax.jit(lambda arrays: [x + 1 for x in arrays])
        streamed = median_seconds(lambda f=stream, x=arrays: f(x))
        alpha, beta = np.asarray(state.alpha), np.asarray(state.beta)
        plain = np.zeros(num_prompts, np.float32), np.float32(num_prompts), np.float32(50), np.random.default_rng(0)
        in_numpy = median_seconds(lambda a=alpha, b=beta, rest=plain: numpy_epoch(a, b, *rest), repeats=3)
        memory = jax.jit(allocator.allocate).lower(state).compile().memory_analysis()
        assert memory is not None
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        both = allocate + update
        cells = [f"{1e3 * x:.2f}" for x in (allocate, update, streamed)]
        yield (
            f"| {num_prompts:,} | "
            + " | ".join(cells)
            + (f" | {both / streamed:.1f} | {1e3 * in_numpy:.2f} | {held / 4 / num_prompts:.1f} |")
        )


def solvers(num_prompts):
    """One epoch of the rivals at N prompts against a convex solver and a dynamic program."""
    import cvxpy  # pyright: ignore[reportMissingImports]

    budget = 8 * num_prompts
    yield "| objective | ours ms | solver | solver ms | ratio |"
    yield "|---|---|---|---|---|"
    allocator, state = state_of(cero_jax.variance, num_prompts)
    ours = median_seconds(lambda: allocator.allocate(state, budget=budget))
    a = np.asarray(state.alpha * state.beta / ((state.alpha + state.beta) * (state.alpha + state.beta + 1)), float)
    n = cvxpy.Variable(num_prompts)
    variance = cvxpy.Minimize(cvxpy.sum(cvxpy.multiply(a, cvxpy.inv_pos(n - 1))))
    problem = cvxpy.Problem(variance, [cvxpy.sum(n) == budget, n >= 4, n <= 32])
    taken = median_seconds(lambda: problem.solve(solver=cvxpy.CLARABEL), repeats=3)
    yield f"| variance (VIP) | {1e3 * ours:.2f} | cvxpy, Clarabel | {1e3 * taken:.0f} | {taken / ours:.0f} |"
    allocator, state = state_of(cero_jax.knapsack, num_prompts)
    ours = median_seconds(lambda: allocator.allocate(state, budget=budget))
    p = np.asarray(state.alpha / (state.alpha + state.beta), float)
    rows = 32  # of the dynamic program; each prompt costs the same, so the rest is scaled
    start = time.perf_counter()
    best = np.full(budget + 1, -np.inf)
    best[0] = 0
    for q in p[:rows]:
        new = np.full(budget + 1, -np.inf)
        for n in range(4, 33):
            np.maximum(new[n:], best[: budget + 1 - n] + (1 - q**n - (1 - q) ** n) * q * (1 - q) ** 2, out=new[n:])
        best = new
    taken = (time.perf_counter() - start) * num_prompts / rows
    yield f"| knapsack | {1e3 * ours:.2f} | dynamic program, NumPy (scaled) | {1e3 * taken:.0f} | {taken / ours:.0f} |"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", help="file that the tables are written to")
    args = parser.parse_args()
    lines = [f"# An epoch of the allocator on {jax.devices()[0].device_kind}, jax {jax.__version__}\n"]
    for title, rows in (("Every N", sizes()), ("Solvers at N = 4,096", solvers(4096))):
        lines += [f"\n## {title}\n", *rows]
    print(*lines, sep="\n")
    if args.out:
        with open(args.out, "w") as file:
            print(*lines, sep="\n", file=file)


if __name__ == "__main__":
    main()
