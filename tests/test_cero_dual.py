"""`cero_dual` against a plain transcript of Algorithm 1 of arXiv 2610.09679, and the paper's guarantees, measured."""

import functools
import heapq
import importlib
import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import cero_jax
from cero_jax.allocator.selection import first_in_order, scattered

pytestmark = pytest.mark.usefixtures("strict_dtypes")
published = importlib.import_module("cero_jax.allocator.cero_dual")  # the function of the same name hides it


def transcript(verdict, *, num_prompts, rounds, budget, nmax, capacity, lam, prior, rho, ties):
    """Algorithm 1 in plain Python, written from the paper and not from the code.

    verdict: (round, prompt, units) -> (S, F). budget: B, in units. ties: the fixed permutation, each prompt's place.
    Yields (allocation, slopes, price) of each round: executed units, vartheta and nu as they were for it.
    """
    everyone = range(num_prompts)
    exposure, mean, most = budget / num_prompts, budget / rounds, rounds * nmax
    gamma, cbar, bound = 1 / math.sqrt(rounds), lam / exposure, max(mean, capacity - mean)
    a, b = ([x] * num_prompts for x in prior)
    q = [a[i] * b[i] / ((a[i] + b[i]) * (a[i] + b[i] + 1)) for i in everyone]
    slopes, price, left = [4 * x for x in q], 0.5, budget
    for k in range(rounds):
        admitted = sorted((i for i in everyone if slopes[i] - price > 0), key=lambda i: (price - slopes[i], ties[i]))
        virtual, executed, room = [0] * num_prompts, [0] * num_prompts, capacity
        for i in admitted:
            if room >= nmax:
                virtual[i], room = nmax, room - nmax
                if left >= nmax:
                    executed[i], left = nmax, left - nmax
        yield executed, list(slopes), price
        for i in everyone:
            s, f = verdict(k, i, executed[i]) if executed[i] else (0, 0)
            a[i], b[i] = prior[0] + rho * (a[i] - prior[0]) + s, prior[1] + rho * (b[i] - prior[1]) + f
            q[i] = a[i] * b[i] / ((a[i] + b[i]) * (a[i] + b[i] + 1))
            c, theta = 4 * lam * q[i] / exposure, cbar * slopes[i]
            if theta >= c:
                target = 0
            elif theta <= c * math.exp(-c * most):
                target = most
            else:
                target = math.log(c / theta) / c
            slopes[i] = min(max(slopes[i] - gamma * (virtual[i] - target / rounds) / nmax, 0), 1)
        price = min(max(price - gamma * (mean - sum(virtual)) / bound, 0), 1)


@pytest.mark.parametrize("setting", range(6))
def test_every_round_is_that_of_a_plain_transcript_of_algorithm_1(setting):
    rng = random.Random(setting)
    num_prompts, rounds = rng.choice([5, 9, 14]), rng.choice([6, 16, 40])
    nmax, g = rng.choice([(2, 4), (1, 8), (4, 1)])
    groups = rng.randint(1, num_prompts) * rounds * rng.choice([0.3, 0.6, 0.9])  # of the whole run
    budget, lam = max(round(groups), rounds // 2) * nmax, rng.choice([0.5, 1.0, 3.0])
    capacity = rng.choice([None, nmax * rng.randint(1, num_prompts)])
    prior = rng.choice([(1.0, 1.0), (0.5, 2.0)])
    settings = {"group_size": g * nmax, "units_per_group": nmax, "min_group": 1, "prior": prior, "lam": lam}
    allocator = cero_jax.cero_dual(total_budget=g * budget, num_epochs=rounds, capacity=capacity, **settings)
    state = allocator.init(num_prompts, seed=setting)
    p = [rng.random() for _ in range(num_prompts)]

    @functools.cache
    def verdict(k, i, units):
        drawn = random.Random(f"{setting} {k} {i}")
        correct = sum(drawn.random() < p[i] for _ in range(g * units))
        return correct, g * units - correct

    n, state = allocator.allocate(state)
    places = scattered(jnp.arange(num_prompts), state.rule_state.order)
    if capacity is None:
        capacity = nmax * math.ceil(1.03 * budget / rounds / nmax - 1e-9)
    sizes = {"num_prompts": num_prompts, "rounds": rounds, "budget": budget, "nmax": nmax, "capacity": capacity}
    plain = transcript(verdict, lam=lam, prior=prior, rho=1.0, ties=places.tolist(), **sizes)
    for k, (units, slopes, price) in enumerate(plain):
        np.testing.assert_allclose(state.rule_state.slope, slopes, atol=2e-5)
        np.testing.assert_array_equal(n, g * np.array(units), err_msg=f"round {k} of {rounds}")
        assert float(state.budget_dual) == pytest.approx(lam * num_prompts / budget * price / g, abs=1e-5)
        correct = np.array([verdict(k, i, u)[0] if u else 0 for i, u in enumerate(units)])
        n, state = allocator.allocate(allocator.update(state, n, correct))


def test_rho_a_round_is_a_discount_where_a_round_spends_its_mean():
    num_prompts, rounds, rho = 10, 5, 0.7
    total = 8 * 4 * rounds
    discount = rho ** (8 * num_prompts * rounds / total)
    allocator = cero_jax.cero_dual(total_budget=total, num_epochs=rounds, discount=discount)
    state = allocator.init(num_prompts)._replace(alpha=jnp.full(10, 3.0), beta=jnp.full(10, 5.0))
    n = jnp.zeros(10, jnp.int32).at[:4].set(8)
    state = allocator.update(state, n, n // 2)
    np.testing.assert_allclose(state.alpha, [1 + rho * 2 + 4] * 4 + [1 + rho * 2] * 6, rtol=1e-6)
    np.testing.assert_allclose(state.beta, [1 + rho * 4 + 4] * 4 + [1 + rho * 4] * 6, rtol=1e-6)


@pytest.mark.parametrize("c", [0.0, 0.003, 0.2, 1.7])
@pytest.mark.parametrize("theta", [1e-4, 0.01, 0.15, 0.6, 2.0])
def test_conjugate_and_minimiser_are_scipys(c, theta):
    most = 40.0
    found = minimize_scalar(
        lambda z: theta * z - 1 + math.exp(-c * z), bounds=(0, most), method="bounded", options={"xatol": 1e-10}
    )
    ends = {0.0: 0.0, most: theta * most - 1 + math.exp(-c * most)}
    best = min(found.fun, *ends.values())
    assert float(published.conjugate(jnp.float32(theta), jnp.float32(c), most)) == pytest.approx(best, abs=2e-6)
    z = float(published.minimiser(jnp.float32(theta), jnp.float32(c), most))
    assert theta * z - 1 + math.exp(-c * z) == pytest.approx(best, abs=2e-6)
    assert 0 <= z <= most


def test_the_first_of_an_order_are_those_of_a_sort_and_ids_keep_their_places():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = int(rng.choice([1, 7, 40]))
        slopes = np.float32(rng.choice([0, 0.3, 0.5, 0.50001, 1], size))
        admitted, count = rng.random(size) < 0.7, int(rng.integers(0, size + 2))
        ties = np.asarray(scattered(jnp.arange(size), jnp.uint32(rng.integers(2**31))))
        chosen = published.highest_first(jnp.asarray(slopes), jnp.asarray(ties), admitted, jnp.int32(count))
        order = [i for i in np.lexsort((ties, -slopes)) if admitted[i]]
        np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(order[:count]))
    places = np.asarray(scattered(jnp.arange(100_000), jnp.uint32(12345)))
    assert len(np.unique(places)) == 100_000
    assert abs(np.corrcoef(places, np.arange(100_000))[0, 1]) < 0.02
    none = first_in_order(jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32), jnp.ones(3, bool), jnp.int32(0))
    assert not none.any()


def integer_optimum(curvature, *, units, most):
    """[M] units of the best plan for curvatures c_i known at the start (Appendix C.2): greedy by marginal gain, a heap.

    units: min(B, K C) in all. most: Z of one prompt. Spread round-robin over the rounds the plan is feasible.
    """
    plan = [0] * len(curvature)
    heap = [(-(1 - math.exp(-c)), i) for i, c in enumerate(curvature) if most > 0]
    heapq.heapify(heap)
    for _ in range(units):
        if not heap:
            break
        gain, i = heapq.heappop(heap)
        plan[i] += 1
        if plan[i] < most:
            heapq.heappush(heap, (gain * math.exp(-curvature[i]), i))
    return plan


def utility(curvature, units):
    return float(np.sum(-np.expm1(-np.asarray(curvature) * np.asarray(units))))


def test_the_heap_finds_the_integer_optimum_and_round_robin_makes_a_plan_of_it():
    rng = np.random.default_rng(1)
    for _ in range(200):
        num_prompts, rounds, nmax = (int(x) for x in rng.integers(1, 4, 3))
        capacity, budget = int(rng.integers(1, num_prompts * nmax + 1)), int(rng.integers(0, 12))
        c = rng.uniform(0, 2, num_prompts)
        plan = integer_optimum(c, units=min(budget, rounds * capacity), most=rounds * nmax)
        everything = itertools.product(range(rounds * nmax + 1), repeat=num_prompts)
        best = max(utility(c, z) for z in everything if sum(z) <= min(budget, rounds * capacity))
        assert utility(c, plan) == pytest.approx(best, abs=1e-12)
        table = np.zeros((rounds, num_prompts), int)
        for place, i in enumerate(np.repeat(np.arange(num_prompts), plan)):
            table[place % rounds, i] += 1
        assert table.max(initial=0) <= nmax
        assert table.sum(1).max() <= capacity


def told(q):
    """The Beta parameters with E[p(1 - p)] = q in [0, 1/4]."""
    return jnp.clip(2 * q / jnp.maximum(1 - 4 * q, 1e-7), 1e-6, 1e6)


def units_drawn(proxies, *, rounds, groups, capacity, lam, nmax=2):
    """[instances, rounds, M] units handed out where the posterior says `proxies`, of the same shape."""
    settings = {"group_size": nmax, "units_per_group": nmax, "min_group": 1, "capacity": capacity, "lam": lam}
    allocator = cero_jax.cero_dual(total_budget=nmax * groups * rounds, num_epochs=rounds, **settings)

    def one_round(state, q):
        n, state = allocator.allocate(state._replace(alpha=told(q), beta=told(q)))
        return allocator.update(state, n, n * 0), n

    start = allocator.init(proxies.shape[-1])
    run = jax.jit(jax.vmap(lambda path: jax.lax.scan(one_round, start, path)[1]))
    return np.asarray(run(jnp.asarray(proxies, jnp.float32)), np.int64)


def bound(proxies, rates, *, rounds, groups, capacity, lam, nmax=2):
    """[instances], what Theorem 1 adds up to before its minimum with 1. rates: [instances, rounds or 1, M]."""
    num_prompts, mean = proxies.shape[-1], groups * nmax
    per_round = mean / num_prompts  # nbar = R / K
    error = np.abs(proxies[:, 1:] - rates[:, -proxies.shape[1] + 1 :]).sum((1, 2)) / (rounds * num_prompts)
    duals = lam * (nmax + max(mean, capacity - mean) / num_prompts) / (per_round * rounds**0.5)
    return duals + 8 * lam * nmax / per_round * error


def paths(rng, count, rounds, num_prompts, rates):
    """[count, rounds, M] proxies of the rates [count, rounds or 1, M]: told the truth, a little wrong, or the worst."""
    noise = rng.uniform(0, 0.25, (count, rounds, num_prompts))
    lagging = 0.25 + (rates - 0.25) * np.linspace(0, 1, rounds)[:, None]
    kinds = [rates + 0 * noise, rates + 0.04 * (noise - 0.125), noise, 0.25 - rates + 0 * noise, lagging]
    kinds += [np.where(rates > 0.125, 0, 0.25) + 0 * noise, np.full_like(noise, 0.25), np.zeros_like(noise)]
    swing = np.where(np.arange(rounds)[:, None] % 2, rates, 0.25 - rates)
    kinds += [swing + 0 * noise, np.where(rng.random(noise.shape) < 0.1, 0.25 - rates, rates)]
    kinds += [np.where(rng.random((count, 1, num_prompts)) < 0.1, 0.25 - rates, rates) + 0 * noise]
    kind = rng.integers(0, len(kinds), count)
    return np.clip(np.choose(kind[:, None, None], kinds), 0, 0.25)


def rates_of(rng, shape):
    """Success rates' variances: spread, at both ends, nearly all hopeless, all alike."""
    p = rng.beta(0.5, 0.5, shape)
    kinds = [rng.uniform(0, 0.25, shape), p * (1 - p), np.where(rng.random(shape) < 0.2, 0.25, 0.001)]
    kinds += [np.full(shape, 0.25) * rng.random((shape[0], 1))]
    return np.choose(rng.integers(0, len(kinds), (shape[0], 1)), kinds)


def excess_over_theorem_1(count, *, num_prompts, rounds, groups, capacity, lam, seed=0):
    """[count], regret / M less its bound, against the integer optimum for fixed rates."""
    rng = np.random.default_rng(seed)
    rates = rates_of(rng, (count, num_prompts))
    proxies = paths(rng, count, rounds, num_prompts, rates[:, None])
    setting = {"rounds": rounds, "groups": groups, "capacity": capacity, "lam": lam}
    units = units_drawn(proxies, **setting).sum(1)
    budget, most = 2 * groups * rounds, 2 * rounds
    c = 4 * lam * rates / (budget / num_prompts)
    gains = -np.expm1(-c)[..., None] * np.exp(-c[..., None] * np.arange(most))  # of the l-th unit, falling in l
    best = -np.sort(-gains.reshape(count, -1), axis=1)[:, : min(budget, rounds * capacity)].sum(1)
    regret = (best + np.expm1(-c * units).sum(1)) / num_prompts
    most_regret = bound(proxies, rates[:, None], **setting)
    assert np.mean(most_regret < 0.8) > 0.3  # it says something of many of these
    return regret - np.minimum(1, most_regret)


SETTINGS = [
    {"num_prompts": 4, "rounds": 256, "groups": 2, "capacity": 6, "lam": 1.0},
    {"num_prompts": 8, "rounds": 100, "groups": 6, "capacity": 14, "lam": 0.5},
    {"num_prompts": 3, "rounds": 900, "groups": 2, "capacity": 4, "lam": 1.0},
    {"num_prompts": 6, "rounds": 144, "groups": 5, "capacity": 10, "lam": 2.0},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_theorem_1_bounds_the_regret_of_any_proxies(setting):
    assert excess_over_theorem_1(500, **setting).max() <= 1e-5


def best_of_moving_rates(c, *, budget, capacity, nmax):
    """The best sum over rounds and two prompts of U(q_ik, z_ik) - U(q_ik, z_i,k-1), c [rounds, 2]: dynamic program."""
    z = np.arange(len(c) * nmax + 1)
    beyond = np.where(z[:, None] + z <= budget, 0.0, -np.inf)
    value = beyond  # of what is still to come, by the units of both so far
    for before in range(len(c))[::-1]:
        (c1, c2), here = c[before], before * nmax + 1  # no prompt has more units yet
        after = np.full((here, here), -np.inf)
        for n1, n2 in itertools.product(range(nmax + 1), repeat=2):
            if n1 + n2 > capacity:
                continue
            gain1, gain2 = (-np.exp(-c * z[:here]) * np.expm1(-c * n) for c, n in ((c1, n1), (c2, n2)))
            np.maximum(after, gain1[:, None] + gain2 + value[n1 : n1 + here, n2 : n2 + here], out=after)
        value = after + beyond[:here, :here]
    return value[0, 0]


def excess_over_theorem_2(count, *, rounds, groups, capacity, lam, seed=0):
    """[count], regret / M less its bound, where the rates of two prompts move; the value is summed along the path."""
    rng = np.random.default_rng(seed)
    ends = np.stack([rates_of(rng, (count, 2)) for _ in range(2)])
    near = ends[0] + rng.choice([0.02, 0.1, 1.0], (count, 1)) * (ends[1] - ends[0])
    late = np.clip((np.arange(rounds) - rng.uniform(0, rounds, (count, 1))) / rng.choice([1, rounds], (count, 1)), 0, 1)
    rates = ends[0][:, None] + late[..., None] * (near - ends[0])[:, None]
    proxies = paths(rng, count, rounds, 2, rates)
    setting = {"rounds": rounds, "groups": groups, "capacity": capacity, "lam": lam, "nmax": 1}
    units = units_drawn(proxies, **setting)
    c = 4 * lam * rates / (groups * rounds / 2)
    before = np.cumsum(units, 1) - units
    value = -(np.exp(-c * before) * np.expm1(-c * units)).sum((1, 2))
    best = [best_of_moving_rates(each, budget=groups * rounds, capacity=capacity, nmax=1) for each in c]
    moved = np.abs(np.diff(rates, axis=1)).max(2).sum(1)
    most_regret = bound(proxies, rates, **setting) + 4 * lam * (1 + 2 / groups) * moved
    assert np.mean(most_regret < 0.8 * lam) > 0.1
    return (np.array(best) - value) / 2 - np.minimum(lam, most_regret)


@pytest.mark.parametrize(
    "setting", [{"rounds": 64, "groups": 1, "capacity": 2}, {"rounds": 196, "groups": 1, "capacity": 2}]
)
def test_theorem_2_bounds_the_regret_where_the_rates_move(setting):
    assert excess_over_theorem_2(80, lam=1.0, **setting).max() <= 1e-5


def test_the_theorems_would_fail_with_a_step_turned_round(monkeypatch):
    right = published.step_price
    monkeypatch.setattr(published, "step_price", lambda nu, *rest: jnp.clip(2 * nu - right(nu, *rest), 0, 1))
    assert excess_over_theorem_1(300, **SETTINGS[0]).max() > 0.1
    assert excess_over_theorem_2(40, rounds=196, groups=1, capacity=2, lam=1.0).max() > 0.03
    monkeypatch.undo()
    slope = published.step_slope
    monkeypatch.setattr(published, "step_slope", lambda x, *rest: jnp.clip(2 * x - slope(x, *rest), 0, 1))
    assert excess_over_theorem_1(300, **SETTINGS[2]).max() > 0.01


def test_a_named_budget_and_the_end_of_the_run_cut_the_lowest_slopes_first():
    allocator = cero_jax.cero_dual(total_budget=8 * 30, num_epochs=2)
    state = allocator.init(20)._replace(alpha=jnp.linspace(1, 20, 20), beta=jnp.linspace(2, 21, 20))  # q rises
    whole, after = allocator.allocate(state)
    assert int(whole.sum()) == 8 * 16  # C: 3 % above 15 groups, rounded up
    np.testing.assert_array_equal(np.flatnonzero(whole), np.arange(4, 20))
    cut, cut_after = allocator.allocate(state, budget=30)
    np.testing.assert_array_equal(np.flatnonzero(cut), [17, 18, 19])
    np.testing.assert_array_equal(after.rule_state.virtual, cut_after.rule_state.virtual)  # which does not see the cut
    rest, _ = allocator.allocate(state._replace(ledger=state.ledger._replace(spent=jnp.int32(8 * 30 - 19))))
    np.testing.assert_array_equal(np.flatnonzero(rest), [18, 19])


def test_a_stream_of_batches_follows_the_even_pace_and_tokens_buy_groups():
    num_prompts, epochs = 60, 40
    for tokens in (None, 50):
        total = 8 * 30 * epochs
        allocator = cero_jax.cero_dual(
            total_budget=total * (tokens or 1), num_epochs=epochs, prior=(0.5, 0.5), expected_tokens=tokens
        )
        state, rng = allocator.init(num_prompts), np.random.default_rng(0)
        for _ in range(epochs):
            for ids in np.split(rng.permutation(num_prompts).astype(np.int32), 3):
                n, state = allocator.allocate(state, ids)
                n = np.asarray(n)
                assert set(n) <= {0, 8}
                paid = {} if tokens is None else {"num_tokens": n * tokens}
                state = allocator.update(state, n, rng.binomial(n, 0.4).astype(np.int32), prompt_ids=ids, **paid)
        assert 0.8 * total <= int(state.ledger.spent) <= total


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"group_size": 3}, "group_size=3 must lie in min_group=4"),
        ({"units_per_group": 3}, "units_per_group=3 must divide group_size=8"),
        ({"capacity": 3}, "capacity=3 units a round must be a positive multiple of units_per_group=2"),
        ({"group_size": 10, "multiple_of": 4}, "multiple_of=4 must divide group_size=10"),
        ({"lam": 0.0}, "lam=0.0"),
        ({"gamma": -1.0}, "gamma=-1.0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        cero_jax.cero_dual(**{"total_budget": 800, "num_epochs": 4, **wrong})
