"""One contract for every allocator, a user's own too: bounds, exact sums, ledger, padding, parts, jit, structure."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cero_jax

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def allocator_of_the_documentation():
    """`greedy`, the ten lines under "Write your own"."""
    text = (Path(__file__).resolve().parent.parent / "docs/allocator.md").read_text()
    (code,) = re.findall(r"^## Write your own$.*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    scope = {}
    exec(code, scope)
    return scope["greedy"]


GREEDY = allocator_of_the_documentation()
SPEND_ALL = [GREEDY, cero_jax.cero, cero_jax.uniform, cero_jax.variance, cero_jax.knapsack]
ALLOCATORS = [*SPEND_ALL, cero_jax.cero_dual]  # which spends what its duals say
PROMPTS, BUDGET, EPOCHS = 60, 3000, 50


@pytest.fixture(params=ALLOCATORS, ids=lambda make: make.__name__)
def make(request):
    return request.param


def check_groups(n, min_group=4, max_group=32, multiple_of=1):
    n = np.asarray(n)
    assert n.dtype == np.int32
    assert np.all((n == 0) | ((n >= min_group) & (n <= max_group)))
    assert not np.any(n % multiple_of)


def check_ledger(state, total=BUDGET):
    spent, reserved, left = (int(x) for x in (state.ledger.spent, state.ledger.reserved, state.ledger.left))
    assert spent + reserved + left == total == int(state.ledger.total)
    assert spent == int(state.cumulative_rollouts.sum())
    assert reserved == int(state.reserved.sum())


def test_a_run_spends_the_budget_to_the_rollout_in_epochs_shorter_than_a_pass(make):
    allocator = make(total_budget=BUDGET, num_epochs=EPOCHS)
    allocate, update = jax.jit(allocator.allocate), jax.jit(allocator.update)
    state, rng = allocator.init(PROMPTS, seed=1), np.random.default_rng(0)
    sums = []
    for _ in range(EPOCHS + 1):
        n, state = allocate(state)
        check_groups(n)
        check_ledger(state)
        sums.append(int(n.sum()))
        drawn = np.flatnonzero(n)
        for part in np.array_split(drawn, 2):  # a step settles some prompts, padded to a fixed length
            ids = np.concatenate([part, np.full(40 - len(part), rng.choice([-1, PROMPTS]))]).astype(np.int32)
            counts = np.where(ids == np.clip(ids, 0, PROMPTS - 1), np.asarray(n)[np.clip(ids, 0, PROMPTS - 1)], 7)
            correct = rng.binomial(counts, 0.4).astype(np.int32)
            state = update(state, counts.astype(np.int32), correct, prompt_ids=ids)
            check_ledger(state)
    if make in SPEND_ALL:
        assert sums == [BUDGET // EPOCHS] * EPOCHS + [0]
        assert int(state.ledger.spent) == BUDGET
    assert 0.9 * BUDGET <= sum(sums) <= BUDGET
    check_the_end_of_the_largest_budget(make, allocate, update, allocator.init(PROMPTS))
    assert allocate._cache_size() == update._cache_size() == 1


def check_the_end_of_the_largest_budget(make, allocate, update, state, rest=BUDGET):
    """Near 2^31 - 1 rollouts every count is exact, and one that is passed stays there."""
    total, ids = 2**31 - 1, np.arange(40, dtype=np.int32)
    before = np.full(PROMPTS, (total - rest) // PROMPTS, np.int32)
    before[0] += (total - rest) % PROMPTS
    ledger = state.ledger._replace(total=jnp.int32(total), spent=jnp.int32(total - rest))
    state, handed = state._replace(ledger=ledger, cumulative_rollouts=jnp.asarray(before)), -1
    while handed:
        n, state = allocate(state)
        check_groups(n)
        check_ledger(state, total)
        handed = int(n.sum())
        for part in (ids, ids + 40):  # 20 of them are padding
            counts = np.pad(np.asarray(n), (0, 20))[part]
            state = update(state, counts, counts // 2, prompt_ids=part)
        check_ledger(state, total)
    assert int(state.ledger.left) == 0 if make in SPEND_ALL else int(state.ledger.left) < 8
    state = update(state, np.full(40, 9, np.int32), np.zeros(40, np.int32), prompt_ids=ids)  # drawn without being given
    assert int(state.ledger.spent) == total


def small_groups(make, **settings):
    """An allocator that can hand out any multiple of 4; the published one has groups of one size."""
    own = {"group_size": 4} if make is cero_jax.cero_dual else {}
    return make(**settings, **own)


def test_two_batches_in_flight_cannot_overspend(make):
    allocator = small_groups(make, total_budget=100, num_epochs=1)
    state = allocator.init(PROMPTS)
    first, state = allocator.allocate(state, jnp.arange(30), budget=80)
    second, state = allocator.allocate(state, jnp.arange(30, 60), budget=80)
    assert int(first.sum()) == 80
    assert int(second.sum()) == 20
    check_ledger(state, 100)
    state = allocator.update(state, first // 2, first * 0, prompt_ids=jnp.arange(30))  # half of each was not drawn
    check_ledger(state, 100)
    assert int(state.ledger.spent) == int((first // 2).sum())
    assert int(state.reserved[:30].sum()) == 0
    assert int(state.reserved[30:].sum()) == 20


def test_a_group_cut_over_two_steps_settles_in_two_parts(make):
    allocator = make(total_budget=100, num_epochs=1)
    n, state = allocator.allocate(allocator.init(8), budget=32)
    ids = jnp.arange(8)
    half = n // 2
    once = allocator.update(state, n, half, prompt_ids=ids)
    for release in (True, False):
        twice = allocator.update(state, half, half, prompt_ids=ids, release=release)
        assert int(twice.ledger.reserved) == (0 if release else 32 - int(half.sum()))
        twice = allocator.update(twice, n - half, half * 0, prompt_ids=ids)
        check_ledger(twice, 100)
        assert int(twice.ledger.spent) == 32
        np.testing.assert_array_equal(twice.cumulative_rollouts, once.cumulative_rollouts)


def test_rows_that_are_no_evidence_are_charged_and_left_out_of_the_posterior(make):
    allocator = make(total_budget=100, num_epochs=1, discount=1.0, prior=(0.5, 0.5))
    counts = {"num_rollouts": jnp.array([8]), "num_correct": jnp.array([3]), "num_evidence": jnp.array([5])}
    state = allocator.update(allocator.init(4), prompt_ids=jnp.array([2]), **counts)
    np.testing.assert_allclose(state.alpha, [0.5, 0.5, 3.5, 0.5])
    np.testing.assert_allclose(state.beta, [0.5, 0.5, 2.5, 0.5])
    assert int(state.ledger.spent) == 8


def test_padding_gets_nothing_and_changes_nothing(make):
    allocator = make(total_budget=BUDGET, num_epochs=EPOCHS)
    state = allocator.init(PROMPTS)
    ids = jnp.array([3, -1, 7, PROMPTS, 9, 2**31 - 1])
    n, after = allocator.allocate(state, ids, budget=24)
    assert n[jnp.array([1, 3, 5])].sum() == 0
    assert int(n.sum()) == 24
    np.testing.assert_array_equal(np.flatnonzero(after.reserved), np.sort(np.asarray(ids)[np.asarray(n) > 0]))
    settled = allocator.update(after, jnp.full(6, 4), jnp.full(6, 1), prompt_ids=ids)
    assert int(settled.ledger.spent) == 12
    np.testing.assert_array_equal(np.flatnonzero(settled.cumulative_rollouts), [3, 7, 9])


def test_shares_of_a_stream_of_batches_sum_to_an_epochs_budget(make):
    num_prompts, total, epochs = 50, 7777, 10
    allocator = make(total_budget=total, num_epochs=epochs, min_group=2)
    allocate = jax.jit(allocator.allocate)
    state = allocator.init(num_prompts)
    for _ in range(3):
        before = int(state.ledger.left)
        for start in range(0, num_prompts, 8):  # the last batch is short
            ids = np.arange(start, start + 8, dtype=np.int32)
            n, state = allocate(state, ids)
            check_groups(n, 2)
        assert make not in SPEND_ALL or before - int(state.ledger.left) == total // epochs
    assert allocate._cache_size() == 1


@pytest.mark.parametrize("multiple_of", [2, 4])
def test_groups_are_multiples_and_a_run_loses_nothing_by_it(make, multiple_of):
    total, epochs = 3001, 23  # epochs of 130.5 rollouts
    allocator = make(total_budget=total, num_epochs=epochs, min_group=4, max_group=16, multiple_of=multiple_of)
    allocate, update = jax.jit(allocator.allocate), jax.jit(allocator.update)
    state, sums = allocator.init(PROMPTS), []
    for _ in range(epochs + 1):
        n, state = allocate(state)
        check_groups(n, 4, 16, multiple_of)
        sums.append(int(n.sum()))
        state = update(state, n, n // 3)
        check_ledger(state, total)
    if make in SPEND_ALL:
        assert sums[-1] == 0
        assert np.all(np.abs(np.array(sums[:-1]) - total / epochs) < multiple_of)
        assert sum(sums) == total - total % multiple_of
    state = allocator.init(PROMPTS)
    for start in range(0, multiple_of * PROMPTS, 20):  # a stream of batches: a whole number of each comes round
        n, state = allocate(state, np.arange(start, start + 20) % PROMPTS)
        check_groups(n, 4, 16, multiple_of)
    assert make not in SPEND_ALL or int(state.ledger.reserved) == multiple_of * (total // epochs)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize(("total", "epochs"), [(1600, 16), (3333, 70), (64, 16)])
def test_groups_of_one_size_lose_nothing_and_need_no_more_epochs(make, group, total, epochs):
    if make is cero_jax.variance and group == 1:
        with pytest.raises(ValueError, match="min_group=1 must be at least 2"):
            make(total_budget=total, num_epochs=epochs, min_group=group, max_group=group, group_size=group)
        return
    own = {} if make in (GREEDY, cero_jax.cero) else {"group_size": group}
    own |= {"units_per_group": 1} if make is cero_jax.cero_dual else {}
    allocator = make(total_budget=total, num_epochs=epochs, min_group=group, max_group=group, **own)
    allocate, update = jax.jit(allocator.allocate), jax.jit(allocator.update)
    state, sums = allocator.init(100), []
    for _ in range(epochs):
        n, state = allocate(state)
        check_groups(n, group, group)
        sums.append(int(n.sum()))
        state = update(state, n, n // 3)
    if make in SPEND_ALL:
        assert int(state.ledger.left) == total % group
        assert max(sums) - min(sums) <= group
        assert not allocate(state)[0].any()


def test_structure_is_stable_under_cond_scan_vmap_and_eval_shape(make):
    def run(total_budget, seed):
        allocator = make(total_budget=total_budget, num_epochs=5)
        state = allocator.init(PROMPTS, seed)

        def epoch(state, _):
            n, state = allocator.allocate(state)
            state = jax.lax.cond(n[0] > 3, lambda s: allocator.update(s, n, n // 2), lambda s: s, state)
            return state, n

        return jax.lax.scan(epoch, state, length=5)

    budgets = jnp.array([300, 3000, 0])
    shape = jax.eval_shape(run, budgets[0], 0)
    states, n = jax.jit(jax.vmap(run))(budgets, jnp.arange(3))
    assert jax.tree.map(lambda x: x.shape, states.ledger) == jax.tree.map(lambda x: (3, *x.shape), shape[0].ledger)
    assert np.all(np.asarray(states.ledger.spent + states.ledger.reserved) <= np.asarray(budgets))
    alone = jax.jit(run)(budgets[1], 1)[1]
    np.testing.assert_array_equal(n[1], alone)


def test_jit_equals_eager(make):
    allocator = make(total_budget=BUDGET, num_epochs=EPOCHS)
    state = allocator.init(PROMPTS, seed=3)
    jitted_n, jitted = jax.jit(allocator.allocate)(state)
    n, eager = allocator.allocate.__wrapped__(state)
    np.testing.assert_array_equal(n, jitted_n)
    np.testing.assert_array_equal(jax.random.key_data(eager.key), jax.random.key_data(jitted.key))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_group": 0}, "min_group=0"),
        ({"min_group": 9, "max_group": 8}, "max_group=8"),
        ({"multiple_of": 3}, "multiple_of=3 must divide"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"total_budget": 2**31}, "2147483648"),
        ({"prior": (0.0, 1.0)}, r"prior=\(0.0, 1.0\)"),
        ({"prior": (np.array([1.0, np.nan]), 1.0)}, r"prior=.*nan"),
        ({"discount": 1.5}, "discount=1.5"),
    ],
)
def test_static_misuse_names_the_values(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**{"total_budget": 100, "num_epochs": 2, **wrong})


def test_a_users_rule_decides_the_shares_and_keeps_a_state_of_its_own():
    """A rule that counts how often each prompt was asked for, in an array over all N, and names a price."""

    def rule(state, candidates, budget, key):
        seen = candidates.take(state.rule_state) + 1
        shares = jnp.where(candidates.valid, jnp.float32(4), 0)
        return shares, state._replace(rule_state=candidates.put(state.rule_state, seen), budget_dual=jnp.float32(0.25))

    allocator = cero_jax.build_allocator(
        rule, total_budget=96, num_epochs=4, spends_all=False, init_rule=lambda n: jnp.zeros(n, jnp.int32)
    )
    state = allocator.init(6)
    assert float(cero_jax.diagnostics(state)["budget_dual"]) == 0
    for ids, expected in (([4, -1, 1], [0, 1, 0, 0, 1, 0]), (None, [1, 2, 1, 1, 2, 1]), ([6, 4], [1, 2, 1, 1, 3, 1])):
        n, state = allocator.allocate(state, ids)
        np.testing.assert_array_equal(n, [4] * 6 if ids is None else [4 if 0 <= i < 6 else 0 for i in ids])
        np.testing.assert_array_equal(state.rule_state, expected)
    assert float(cero_jax.diagnostics(state)["budget_dual"]) == 0.25


def test_the_documented_rule_gives_more_where_the_variance_is():
    allocator = GREEDY(total_budget=400, num_epochs=1, discount=1.0)
    state = allocator.init(40)._replace(alpha=jnp.repeat(jnp.array([0.5, 20.0]), 20), beta=jnp.full(40, 20.0))
    n, _ = allocator.allocate(state)
    assert int(n.sum()) == 400
    assert int(n[20:].sum()) > 5 * int(n[:20].sum())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -5.0, 1e9])
def test_a_rule_whose_shares_are_no_numbers_still_ends(bad):
    def rule(state, candidates, budget, key):
        del budget, key
        return jnp.where(jnp.arange(candidates.alpha.shape[0]) % 2 == 0, jnp.float32(bad), 8.0), state

    allocator = cero_jax.build_allocator(rule, total_budget=BUDGET, num_epochs=EPOCHS)
    n, state = allocator.allocate(allocator.init(PROMPTS))
    check_groups(n)
    check_ledger(state)
    assert int(n.sum()) == BUDGET // EPOCHS


def test_a_rule_of_the_wrong_shape_is_refused():
    allocator = cero_jax.build_allocator(lambda s, c, b, k: (jnp.zeros(3), s), total_budget=BUDGET, num_epochs=EPOCHS)
    with pytest.raises(ValueError, match=rf"the rule gave shares of shape \(3,\) to {PROMPTS} prompts"):
        allocator.allocate(allocator.init(PROMPTS))
