"""The settings that an allocator takes where a caller names none; a run's configuration takes the same."""

MIN_GROUP = 4  # rollouts of the smallest group that is drawn at all
MAX_GROUP = 32  # rollouts of the largest
MULTIPLE_OF = 1  # a group's rollouts are a multiple of it
GROUP_SIZE = 8  # rollouts of a group under `uniform` and `cero_dual`, on average under `variance` and `knapsack`
PRIOR = (0.5, 0.5)  # Beta(alpha, beta) of a prompt's success probability
DISCOUNT = 0.9  # share of the evidence that is kept over a pass of 8 N rollouts
EXPLORE = 0.1  # share of an epoch's budget for prompts whose evidence has faded
PASS_RATE_ROLLOUTS = 2.0  # what a pass rate of another model is worth, in rollouts of the policy
UTILITY = "exponential"  # how a prompt's utility saturates in its cumulative rollouts
ADVANTAGE = "rloo"  # whose variance `variance` minimises
