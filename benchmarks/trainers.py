"""A whole GRPO step on a CPU, here and in the trainers that users have: TRL and Tunix, side by side in one run.

    make test-integrations                                                # makes the environments of both
    python benchmarks/trainers.py --trl .venv-trl/bin/python --tunix .venv-tunix/bin/python --path gsm8k_train.jsonl

One model, Qwen2's shape with 4.07 million random parameters in float32; 64 rollouts of up to 64 tokens in groups of 8,
a KL term to a frozen reference, a reward by the hash of what was drawn. Two sets of prompts: `even`, of 32 random
words, and `gsm8k`, the questions of that file, a token for each word and mark, whose lengths have a long tail.

Each side is the trainer's own loop, with what it logs; ours is a run of train.py. A step is the time from its last
reward to the next step's, so everything between counts: learning, logging, planning, drawing. The sides alternate, each
run a process of its own, and its first steps, which compile, are left out. CPU seconds stand beside wall seconds: other
work on the machine adds to those. Where other work runs, `--threads 1` gives the fairer ratio, since threads then wait
for each other at every operation, and torch's burn the processor while they do.
"""

# pyright: reportMissingImports=false
# The environment of the checks has neither torch nor tunix.

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, WORDS = 4, 256, 4, 2, 64, 1024, 512
ROLLOUTS, GROUP, TOKENS, KL, RATE = 64, 8, 64, 0.04, 1e-6
WARM = 2  # steps left out at a run's beginning
LONGEST = 256  # words of a prompt


def prompts(name: str, path: str | None) -> list[str]:
    """Prompts of words "w2" to "w511", each a token."""
    if name == "even":
        return [said(ids) for ids in np.random.default_rng(0).integers(2, WORDS, (512, 32))]
    assert path
    questions = [json.loads(line)["question"] for line in Path(path).read_text().splitlines()[:512]]
    words = [re.findall(r"\w+|[^\w\s]", question)[:LONGEST] for question in questions]
    return [said(2 + zlib.crc32(word.encode()) % (WORDS - 2) for word in each) for each in words]


def said(ids) -> str:
    return " ".join(f"w{i}" for i in ids)


class Judge:
    """The reward of completions, which notes the clocks at each step's last one."""

    __name__ = "judge"

    def __init__(self):
        self.judged, self.tokens = 0, 0
        self.marks: list[list[float]] = []

    def __call__(self, prompts, completions, **_) -> list[float]:
        self.judged += len(completions)
        self.tokens += sum(len(text.split()) for text in completions)
        if self.judged % ROLLOUTS == 0:
            self.mark()
        return [float(zlib.crc32(text.encode()) % 2) for text in completions]

    def mark(self) -> None:
        self.marks.append([time.perf_counter(), time.process_time()])


JUDGE = Judge()  # of this process


# --- the sides ---


@dataclass(frozen=True)
class Words:
    """The task of our run: the prompts, and the judge."""

    prompts: str
    path: str | None

    def build(self, seed, tokenizer=None):
        from cero_jax.data import Task, encode_prompts

        texts, tokenizer = prompts(self.prompts, self.path), Tokenizer()
        every, few = (encode_prompts(some, some, ["all"] * len(some), tokenizer) for some in (texts, texts[:GROUP]))
        reward = lambda question, completion, answer: float(zlib.crc32(completion.encode()) % 2)  # noqa: E731
        return Task(every, few, tokenizer, reward)


def ours(steps: int, name: str, path: str | None) -> None:
    """A run of train.py: GRPO in groups of one size, without evaluations or saves in between."""
    from cero_jax import train
    from cero_jax.config import AllocatorConfig, Config
    from cero_jax.evaluation import EvaluationConfig
    from cero_jax.learner import LearnerConfig
    from cero_jax.model import ModelConfig
    from cero_jax.sampler import SamplerConfig

    settle = train.settle

    def settled(run, state, cursor, scored):
        JUDGE.mark()  # the step's rewards are there; completions that were cut have theirs unasked
        JUDGE.tokens += int(scored.batch.lengths.sum())
        return settle(run, state, cursor, scored)

    train.settle = settled
    budget, never = ROLLOUTS * steps, 10**9
    with tempfile.TemporaryDirectory() as folder:
        train.main(
            Config(
                name="trainers",
                task=Words(name, path),
                allocator=AllocatorConfig("uniform", budget, num_epochs=1, max_group=GROUP, group_size=GROUP),
                model=ModelConfig(LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, qkv_bias=True, rope_base=1e6),
                sampler=SamplerConfig(TOKENS),
                learner=LearnerConfig(rows_per_step=ROLLOUTS, kl_coef=KL, learning_rate=RATE),
                evaluation=EvaluationConfig(every_rollouts=never, samples=ROLLOUTS // GROUP, rows=ROLLOUTS),
                checkpoint_every_steps=never,
                work_dir=f"{folder}/run",
            )
        )
        rows = [json.loads(line) for line in Path(folder, "run/timings.jsonl").read_text().splitlines()]
    phases = [row["phase_seconds"] for row in rows if row["kind"] == "step"][WARM + 1 :]
    print({name: round(float(np.median([each[name] for each in phases])), 3) for name in phases[0]}, file=sys.stderr)


class Tokenizer:
    """A word a token, in the ways that this project and Tunix ask."""

    vocab_size, pad_id, eos_ids, chat = WORDS, 0, (1,), None

    def encode(self, text, **_):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_):
        ids = [int(i) for i in ids]
        return said(i for i in ids[: ids.index(1) if 1 in ids else None] if i != 0)


def trl(steps: int, name: str, path: str | None) -> None:
    """TRL's GRPOTrainer, all rollouts of a step at once, without checkpointed gradients: the quickest here."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer as Core
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    core = Core(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    shape = {"hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": True}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **ids, max_position_embeddings=512)).save_pretrained(folder)
        config = GRPOConfig(
            output_dir=f"{folder}/out", per_device_train_batch_size=ROLLOUTS, num_generations=GROUP,
            max_completion_length=TOKENS, beta=KL, learning_rate=RATE, max_steps=steps, gradient_checkpointing=False,
            logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        GRPOTrainer(
            model=folder, reward_funcs=JUDGE, args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts(name, path)}),
        ).train()  # fmt: skip


class TunixTokenizer(Tokenizer):
    def bos_id(self):
        return None

    def eos_id(self):
        return 1

    pad_id = lambda self: 0  # noqa: E731


def tunix(steps: int, name: str, path: str | None) -> None:
    """Tunix's GRPOLearner with its own sampler, all rollouts of a step at once."""
    import jax
    import optax
    from flax import nnx
    from tunix.models.qwen2.model import ModelConfig, Qwen2
    from tunix.rl import rl_cluster as clusters
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout import base_rollout

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shape = {"num_layers": LAYERS, "embed_dim": WIDTH, "hidden_dim": MLP, "head_dim": HEAD_DIM, "vocab_size": WORDS}
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "use_tied_embedding": True}
    config = ModelConfig(**shape, **heads, rope_theta=1_000_000, norm_eps=1e-6)
    with mesh:
        actor, reference = (Qwen2(config, rngs=nnx.Rngs(0)) for _ in range(2))
    texts = prompts(name, path)
    longest = max(len(text.split()) for text in texts)
    roles = (clusters.Role.ACTOR, clusters.Role.ROLLOUT, clusters.Role.REFERENCE)
    cluster = clusters.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=TunixTokenizer(),
        cluster_config=clusters.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=clusters.RLTrainingConfig(
                actor_optimizer=optax.adam(RATE), max_steps=steps, eval_every_n_steps=10**9
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=TOKENS,
                max_prompt_length=longest,
                kv_cache_size=longest + TOKENS,
                temperature=1.0,
            ),
        ),
    )
    learner = GRPOLearner(cluster, GRPOConfig(num_generations=GROUP, beta=KL), reward_fns=JUDGE)
    at_once = ROLLOUTS // GROUP
    chosen = [texts[i * at_once : (i + 1) * at_once] for i in range(steps)]
    learner.train([{"prompts": np.array(each)} for each in chosen])


SIDES = {"ours": ours, "TRL": trl, "Tunix": tunix}


# --- all sides, alternating ---


def measure(args: argparse.Namespace) -> None:
    """One side on one set of prompts: prints wall and CPU seconds of its steps, and tokens drawn a step."""
    SIDES[args.side](args.steps + WARM + 1, args.prompts, args.path)
    seconds = np.diff(JUDGE.marks, axis=0)[WARM:]
    print(json.dumps({"seconds": seconds.tolist(), "tokens": JUDGE.tokens / len(JUDGE.marks)}))


def compare(args: argparse.Namespace) -> None:
    """Print a row for each side and set of prompts: medians, and the ratio to ours of each round, its range beside."""
    pythons = {"ours": sys.executable, "TRL": args.trl, "Tunix": args.tunix}
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | dict.fromkeys(("OMP_NUM_THREADS", "PJRT_NPROC"), str(args.threads))
    if args.threads == 1:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    print("| prompts | trainer | tokens drawn | a step, wall s | CPU s | times ours, wall (range) | CPU (range) |")
    print("|---|---|---|---|---|---|---|")
    for name in ("even", "gsm8k") if args.path else ("even",):
        taken, tokens = {side: [] for side in pythons}, {}
        for _ in range(args.rounds):
            for side, python in pythons.items():
                given = ["--side", side, "--prompts", name, "--steps", str(args.steps)]
                given += ["--path", args.path] if args.path else []
                run = subprocess.run([python, __file__, *given], env=env, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(run.stdout.splitlines()[-1])
                taken[side].append(np.median(found["seconds"], axis=0))
                tokens[side] = found["tokens"]
                print(name, side, found, f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        for side, rounds in taken.items():
            ratio = np.array(rounds) / np.array(taken["ours"])
            wall, cpu = np.median(rounds, axis=0)
            spread = [f"{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})" for r in ratio.T]
            print(
                f"| {name} | {side} | {tokens[side]:,.0f} | {wall:.2f} | {cpu:.2f} | {' | '.join(spread)} |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python with trl")
    parser.add_argument("--tunix", help="Python with google-tunix")
    parser.add_argument("--path", help="GSM8K's training rows, JSONL; without it only `even`")
    parser.add_argument("--steps", type=int, default=8, help="of a run, beside those that are left out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", choices=("even", "gsm8k"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    measure(args) if args.side else compare(args)


if __name__ == "__main__":
    main()
