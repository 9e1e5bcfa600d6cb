"""The allocator alone, in a NumPy loop: no model, no text, no trainer.

1,000 prompts, 400 of which can never be solved. What a fixed group size spends on those is wasted; what `cero` spends
on them is what it takes to find out. The success rates stand for your sampler and your verifier.

    python examples/allocator_alone.py
"""

import numpy as np

import cero_jax

NUM_PROMPTS, NUM_HOPELESS, TOTAL_BUDGET, NUM_EPOCHS = 1_000, 400, 64_000, 16  # 64 rollouts a prompt


def train(allocator: cero_jax.Allocator, success: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Spend the whole budget; returns, for each prompt, its rollouts and those in groups with two different rewards.

    success: [N] float, the probability that a rollout of the prompt is right. A group whose rewards are all alike has
    no gradient.
    """
    rng = np.random.default_rng(seed)
    drawn, useful = np.zeros(len(success), int), np.zeros(len(success), int)
    state = allocator.init(num_prompts=len(success), seed=seed)
    while True:
        num_rollouts, state = allocator.allocate(state)
        num_rollouts = np.asarray(num_rollouts)
        if not num_rollouts.any():
            return drawn, useful
        num_correct = rng.binomial(num_rollouts, success)  # here you draw, verify and train
        state = allocator.update(state, num_rollouts, num_correct)
        drawn += num_rollouts
        useful += np.where((num_correct > 0) & (num_correct < num_rollouts), num_rollouts, 0)


def main() -> dict[str, tuple[int, int]]:
    """Print and return what each allocator spends on hopeless prompts, and in groups that have a gradient."""
    hopeless = np.arange(NUM_PROMPTS) < NUM_HOPELESS
    success = np.where(hopeless, 0.0, np.random.default_rng(0).beta(0.5, 0.5, NUM_PROMPTS))
    results = {}
    for make in (cero_jax.uniform, cero_jax.cero):
        drawn, useful = train(make(total_budget=TOTAL_BUDGET, num_epochs=NUM_EPOCHS), success, seed=0)
        wasted, taught = int(drawn[hopeless].sum()), int(useful.sum())
        results[make.__name__] = wasted, taught
        print(
            f"{make.__name__:>8}: {drawn.sum():,} rollouts, {wasted:,} of them on hopeless prompts, "
            f"{taught:,} in groups with a gradient"
        )
    return results


if __name__ == "__main__":
    main()
