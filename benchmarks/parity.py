"""A real model in cero_jax and in transformers, float32 on a CPU: greedy tokens, log-probabilities, sampled tokens.

It has two halves, since this project does not depend on torch (model_folder.py says how to make torch's environment):

    reference/bin/python benchmarks/parity.py reference models/gemma-3-270m reference.npz gsm8k_test.jsonl
    .venv/bin/python benchmarks/parity.py compare models/gemma-3-270m reference.npz

The first writes what transformers computes. The second compares it with cero_jax, and exits with 1 where they differ by
more than a tolerance. The last argument of the first is any JSONL file with a `question` on each line. With Gemma 3
270M on two cores that had other work as well, the first took 18 minutes and 2.2 GB of memory, the second 12 minutes and
6 GB.
"""

import json
import sys
from pathlib import Path

import numpy as np

PROMPTS = (
    "The capital of France is",
    "3 + 4 = 7\n5 + 1 = 6\n2 + 2 = 4\n12 + 5 =",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "To be, or not to be,",
    "The three primary colours are",
    "Die Hauptstadt von Deutschland ist",
    "La tour Eiffel se trouve à",
    "東京は日本の",
    "SELECT name FROM users WHERE",
    "Q: How many legs does a spider have?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "The derivative of x^2 is",
    "1, 1, 2, 3, 5, 8, 13,",
    "import numpy as np\n\nx = np.",
    "In 1969, Neil Armstrong",
    "Ingredients:\n- 2 eggs\n- 200 g flour\n-",
    "The opposite of hot is",
)
NEW_TOKENS = 64
NUM_QUESTIONS = 50
SAMPLED = (0, 1, 6, 12)  # prompts whose next two tokens are sampled
NUM_SAMPLES, ROWS = 2048, 256  # of each of these prompts; drawn at once
LOG_PROB_TOLERANCE = 1e-3
P_VALUE = 1e-3  # a right sampler falls below it once in a thousand tests


def reference(folder: str, out: str, questions: str) -> None:
    """Write what transformers computes, one row at a time and unpadded. Runs in the environment that has torch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    result = {}
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            drawn = model.generate(
                ids, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            best = torch.cat(drawn.logits).topk(2).values
            result |= {f"prompt_{i}": ids[0], f"greedy_{i}": drawn.sequences[0, ids.shape[1] :]}
            result[f"gap_{i}"] = best[:, 0] - best[:, 1]
        texts = [json.loads(line)["question"] for line in Path(questions).read_text().splitlines()[:NUM_QUESTIONS]]
        for i, text in enumerate(texts):
            ids = tokenizer(text, return_tensors="pt").input_ids
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            result |= {f"question_{i}": ids[0], f"log_probs_{i}": log_probs.gather(-1, ids[0, 1:, None])[:, 0]}
        for i in SAMPLED:
            prompt = result[f"prompt_{i}"][None]
            first = model(prompt).logits[0, -1].softmax(-1)
            second = model(torch.cat([prompt, first.argmax()[None, None]], dim=1)).logits[0, -1].softmax(-1)
            result |= {f"first_{i}": first, f"second_{i}": second}
    np.savez(out, texts=np.array(texts), **{name: array.numpy() for name, array in result.items()})


def compare(folder: str, reference: str) -> bool:
    """Whether cero_jax agrees with the reference in everything; prints how far."""
    from cero_jax import sharding
    from cero_jax.huggingface import weights
    from cero_jax.huggingface.tokenizer import FolderTokenizer

    want, tokenizer, mesh = np.load(reference), FolderTokenizer(folder), sharding.make_mesh(sharding.MeshConfig())
    config, params = weights.load(folder, mesh)
    texts = [*PROMPTS, *want["texts"].tolist()]
    ids = [want[f"prompt_{i}"].tolist() for i in range(len(PROMPTS))]
    ids += [want[f"question_{i}"].tolist() for i in range(len(want["texts"]))]
    wrong = [text for text, row in zip(texts, ids, strict=True) if tokenizer.encode(text) != row]
    print(f"tokenization: {len(texts) - len(wrong)} of {len(texts)} texts give the same ids", *wrong, sep="\n  ")
    same = [
        greedy(params, config, tokenizer, mesh, want),
        question_log_probs(params, config, want),
        sampling(params, config, tokenizer, mesh, want),
    ]
    return not wrong and all(same)


def _draw(
    params, config, tokenizer, mesh, prompts: list[np.ndarray], rows_each: int, temperature: float, num_tokens: int
):
    """A function that, for a step number, draws `rows_each` completions of each prompt: [R, num_tokens] tokens."""
    from cero_jax.sampler import SamplerConfig, SamplingBatch, make_sampler

    width, rows = max(map(len, prompts)), len(prompts) * rows_each
    settings = SamplerConfig(max_completion_tokens=num_tokens, temperature=temperature)
    sample = make_sampler(config, settings, tokenizer.eos_ids, tokenizer.pad_id, mesh)
    prompt_of_row = np.repeat(np.arange(len(prompts), dtype=np.int32), rows_each)
    batch = SamplingBatch(
        prompt_tokens=np.stack([np.pad(p, (0, width - len(p))) for p in prompts]).astype(np.int32),
        prompt_lengths=np.array([len(p) for p in prompts], np.int32),
        prompt_of_row=prompt_of_row,
        row_mask=np.ones(rows, bool),
        prompt_ids=prompt_of_row,
        rollout_index=np.arange(rows, dtype=np.int32),
    )
    return lambda step: np.asarray(sample(params, np.uint32(0), np.uint32(step), batch).tokens)


def greedy(params, config, tokenizer, mesh, want) -> bool:
    """Whether every greedy continuation is the reference's; prints where one differs and how near a tie that was."""
    prompts = [want[f"prompt_{i}"] for i in range(len(PROMPTS))]
    drawn = _draw(params, config, tokenizer, mesh, prompts, 1, 0.0, NEW_TOKENS)(0)
    same, gaps = 0, []
    for i in range(len(PROMPTS)):
        expected = want[f"greedy_{i}"]
        got = drawn[i, : len(expected)]
        differs = np.flatnonzero(got != expected)
        gaps.append(want[f"gap_{i}"].min())
        if len(differs):
            place = differs[0]
            print(f"  prompt {i} differs from token {place} on: {got[place]}, not {expected[place]}, whose logit is "
                  f"{want[f'gap_{i}'][place]:.2e} above the second largest in the reference")  # fmt: skip
        same += not len(differs)
    print(f"greedy: {same} of {len(PROMPTS)} prompts give the same {NEW_TOKENS} tokens (or fewer, up to an eos); "
          f"the smallest gap between the two largest logits is {min(gaps):.1e}")  # fmt: skip
    return same == len(PROMPTS)


def question_log_probs(params, config, want) -> bool:
    """Whether the learner's log-probabilities of each question's tokens after the first are the reference's."""
    import jax

    from cero_jax.learner import Batch, completion_log_probs

    count = len(want["texts"])
    tokens = [want[f"question_{i}"] for i in range(count)]
    limit, size = max(map(len, tokens)) - 1, 5
    worst, total = 0.0, 0
    log_probs = jax.jit(lambda p, batch: completion_log_probs(p, config, batch, temperature=1.0, chunk=32))
    for start in range(0, count, size):
        some = tokens[start : start + size]
        lengths = np.array([len(ids) - 1 for ids in some], np.int32)
        ones, no = np.ones(len(some), np.float32), np.zeros(len(some), np.int32)
        batch = Batch(
            prompt_tokens=np.stack([ids[:1] for ids in some]).astype(np.int32),
            prompt_lengths=np.ones(len(some), np.int32),
            tokens=np.stack([np.pad(ids[1:], (0, limit + 1 - len(ids))) for ids in some]).astype(np.int32),
            lengths=lengths,
            log_probs=np.zeros((len(some), limit), np.float32),
            reward=ones, group_ids=no, row_mask=ones.astype(bool), row_weight=ones,
        )  # fmt: skip
        got = np.asarray(log_probs(params, batch))
        for row, length in enumerate(lengths):
            worst = max(worst, np.abs(got[row, :length] - want[f"log_probs_{start + row}"]).max())
            total += length
    print(f"log-probabilities: {total} tokens of {count} questions, largest difference {worst:.1e}")
    return worst <= LOG_PROB_TOLERANCE


def sampling(params, config, tokenizer, mesh, want) -> bool:
    """Whether sampled tokens pass a chi-square test: the first, and the second in samples with the likeliest first."""
    fine = True
    for i in SAMPLED:
        draw = _draw(params, config, tokenizer, mesh, [want[f"prompt_{i}"]], ROWS, 1.0, 2)
        tokens = np.concatenate([draw(step) for step in range(NUM_SAMPLES // ROWS)])
        after = tokens[tokens[:, 0] == want[f"first_{i}"].argmax(), 1]
        for name, got in (("first", tokens[:, 0]), ("second", after)):
            p_value, cells = chi_square(got, want[f"{name}_{i}"])
            print(f"sampling: prompt {i}, {name} token of {len(got)} rollouts: p = {p_value:.3f} ({cells} cells)")
            fine &= p_value >= P_VALUE
    return fine


def chi_square(drawn: np.ndarray, probability: np.ndarray) -> tuple[float, int]:
    """(p-value, number of cells) of drawn tokens [n] under `probability` [V].

    Each token that is expected at least 5 times has a cell; all others share one.
    """
    from scipy.stats import chisquare

    expected = probability.astype(np.float64) / probability.sum(dtype=np.float64) * len(drawn)
    observed = np.bincount(drawn, minlength=len(expected))
    common = expected >= 5
    observed, expected = (np.append(x[common], x[~common].sum()) for x in (observed, expected))
    return float(chisquare(observed, expected).pvalue), len(expected)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["reference", folder, out, questions]:
            reference(folder, out, questions)
        case ["compare", folder, out]:
            sys.exit(0 if compare(folder, out) else 1)
        case _:
            sys.exit(__doc__)
