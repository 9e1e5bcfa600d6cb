"""A GRPOLearner of a few thousand random parameters, and prompts of which half are hopeless."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout

from cero_jax.integrations.tunix import CeroDataset

WORDS = ["<pad>", "<eos>", *"0123456789+="]
NUM_PROMPTS, BATCH, GROUP = 40, 8, 4
HOPELESS = np.arange(NUM_PROMPTS) % 2 == 0


class Tokenizer:
    """A character a token."""

    def encode(self, text, **_):
        return [WORDS.index(character) for character in text]

    def decode(self, ids, **_):
        return "".join(WORDS[i] for i in ids if i > 1)

    def bos_id(self):
        return None

    def eos_id(self):
        return 1

    def pad_id(self):
        return 0


def rows():
    """Add the two digits, or say something that cannot be said."""
    answers = ["x" if HOPELESS[i] else str((i % 10 + i // 10) % 10) for i in range(NUM_PROMPTS)]
    return [{"prompts": f"{i % 10}+{i // 10}=", "answer": answers[i]} for i in range(NUM_PROMPTS)]


def correct(prompts, completions, answer, **kwargs):
    assert "cero_prompt_id" not in kwargs
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def short(prompts, completions, **kwargs):
    return [-0.1 * len(c) for c in completions]


def learner(
    cero, folder, reward_fns, max_steps, num_iterations=1, metric_fns=None, seed=0, learning_rate=3e-3, **batches
):
    """batches: mini_batch_size and train_micro_batch_size."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shape = {"num_layers": 1, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8, "num_kv_heads": 1}
    config = ModelConfig(vocab_size=len(WORDS), rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=False, **shape)
    with mesh:
        model = Qwen2(config, rngs=nnx.Rngs(seed))
    # at once: else a quick stop comes before the save of step 3 is whole
    every = ocp.CheckpointManagerOptions(save_interval_steps=3, max_to_keep=3, enable_async_checkpointing=False)
    training = clusters.RLTrainingConfig(
        actor_optimizer=optax.adam(learning_rate),
        max_steps=max_steps,
        eval_every_n_steps=4,
        checkpoint_root_directory=None if folder is None else str(folder),
        checkpointing_options=every,
        **batches,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=3, max_prompt_length=4, kv_cache_size=16, temperature=1.0
    )
    roles = (clusters.Role.ACTOR, clusters.Role.ROLLOUT)
    cluster = clusters.RLCluster(
        actor=model,
        tokenizer=Tokenizer(),
        cluster_config=clusters.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
        ),
    )
    algorithm = GRPOConfig(num_generations=GROUP, beta=0.0, num_iterations=num_iterations)
    return GRPOLearner(cluster, algorithm, reward_fns=reward_fns, metric_fns=metric_fns)


def dataset(steps, **settings):
    return CeroDataset(rows(), batch_size=BATCH, num_generations=GROUP, total_budget=steps * BATCH * GROUP, **settings)


def summary(cero, trained):
    """What two runs must have alike to be the same run."""
    state = cero.groups.state
    parameters = jax.tree.leaves(nnx.state(trained.rl_cluster.actor_trainer.model))
    return {
        "parameters": [np.asarray(x).tobytes() for x in parameters],
        "drawn": np.asarray(state.cumulative_rollouts).tolist(),
        "alpha": np.asarray(state.alpha).tobytes(),
        "ledger": [int(x) for x in state.ledger],
        "steps": trained.rl_cluster.actor_trainer.train_steps,
    }
