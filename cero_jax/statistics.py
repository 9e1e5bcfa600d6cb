"""How sure a measured accuracy is: unbiased pass@k, and confidence intervals over prompts."""

import numpy as np
from scipy import stats


def pass_at_k(num_correct: np.ndarray, num_samples: int, k: int) -> np.ndarray:
    """[N] float64, for each prompt the probability that at least one of k samples is right, without bias.

    num_correct: [N] int, how many of a prompt's num_samples samples are right. Raises ValueError where k is not in
    1..num_samples. Source: Chen et al. 2021 (arXiv 2107.03374), equation 1: 1 - C(n - c, k) / C(n, k) with
    n = num_samples and c = num_correct; here as a product, which does not overflow.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs k in 1..{num_samples}, the number of samples of each prompt")
    wrong = num_samples - np.asarray(num_correct, int)
    drawn = np.arange(k)  # after j wrong draws without replacement, the next is wrong with (wrong - j) / (n - j)
    all_wrong = np.prod(np.maximum(wrong[..., None] - drawn, 0) / (num_samples - drawn), axis=-1)
    return 1 - all_wrong


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, draws: int = 2000, scale: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """(low, high): a confidence interval for the mean over all prompts like these, by a bootstrap over prompts.

    values: [N] each prompt's mean reward or pass@k. The generator is seeded, so the result is reproducible. The
    percentiles are widened for small N as Student's t widens the normal (the expanded percentile interval: Hesterberg
    2015, arXiv 1411.5279). scale: the least and the largest that a value can be; where values lie beyond, it reaches to
    them. Where all values are the same a bootstrap sees no spread: the interval is then the exact binomial one over
    prompts (Clopper and Pearson), of the share that the value is of the scale. N = 1 gives the scale, and so does a
    scale of one value.
    """
    values = np.asarray(values, float)
    number, tail = len(values), (1 - confidence) / 2
    least, most = min(scale[0], values.min()), max(scale[1], values.max())
    if number < 2 or least == most:
        return float(least), float(most)
    if np.all(values == values[0]):
        share = (values[0] - least) / (most - least)
        right, wrong = number * share, number * (1 - share)
        low = stats.beta.ppf(tail, right, wrong + 1) if right else 0.0
        high = stats.beta.ppf(1 - tail, right + 1, wrong) if wrong else 1.0
        return float(least + (most - least) * low), float(least + (most - least) * high)
    times = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=draws)
    tail = stats.norm.cdf(np.sqrt(number / (number - 1)) * stats.t.ppf(tail, number - 1))
    low, high = np.quantile(times @ values / number, [tail, 1 - tail])
    return float(low), float(high)
