"""Adapters: what they compute, their gradient by the chain rule, what a step and a checkpoint hold, and the export."""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny_run import tiny_config

import train
from cero_jax import lora, memory, model, sharding
from cero_jax import run as runs
from cero_jax.attention import Causal
from cero_jax.config import AllocatorConfig
from cero_jax.evaluate import restore_policy
from cero_jax.evaluation import EvaluationConfig
from cero_jax.huggingface import weights
from cero_jax.learner import Batch, Fixed, LearnerConfig, make_learner
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.sharding import MeshConfig
from cero_jax.tasks.dataset import Dataset
from cero_jax.warm_start import WarmStartConfig

pytestmark = pytest.mark.usefixtures("one_length")

PLAIN = ModelConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24, qkv_bias=True)
ADAPTED = dataclasses.replace(PLAIN, lora_rank=3, lora_alpha=6.0)
SCALE, VOCAB, ROWS, WIDTH, LIMIT = 2.0, 12, 8, 4, 5
B1 = LearnerConfig().adam_b1
LEARNER = LearnerConfig(rows_per_step=ROWS, rows_per_microbatch=4, max_grad_norm=1e9)
LINEAR = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@cache
def parameters():
    """Random parameters of a model, and of adapters whose B is no longer 0."""
    rng = np.random.default_rng(0)
    shapes = lora.split(model.abstract_params(ADAPTED, VOCAB))
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


@partial(jax.jit, static_argnames=("seed", "config"))
def fresh(seed, config=ADAPTED):
    """The adapters of a new model."""
    return lora.split(model.init_params(config, VOCAB, seed))[1]


@cache
def batch():
    """Groups of 3 and 4 rows and a padding row, with log-probabilities of no policy in particular."""
    rng = np.random.default_rng(1)
    return Batch(
        prompt_tokens=rng.integers(0, VOCAB, (ROWS, WIDTH)).astype(np.int32),
        prompt_lengths=np.array([1, 1, 1, 4, 4, 4, 4, 0], np.int32),
        tokens=rng.integers(0, VOCAB, (ROWS, LIMIT)).astype(np.int32),
        lengths=np.array([5, 1, 3, 2, 5, 5, 4, 0], np.int32),
        log_probs=np.full((ROWS, LIMIT), -1, np.float32),
        reward=np.array([1, 0, 0, 0, 1, 1, 0, 0], np.float32),
        group_ids=np.array([0, 0, 0, 1, 1, 1, 1, 0], np.int32),
        row_mask=np.arange(ROWS) < ROWS - 1,
        row_weight=np.ones(ROWS, np.float32),
    )


def gradient(config, params, frozen, ref=None, mesh=None, learner=LEARNER):
    """(gradient, state, metrics) of one step; the gradient is read from Adam's first moment."""
    made = make_learner(config, VOCAB, learner, 1.0, mesh or one_device())
    state = made.init(jax.device_put(params, made.shardings.params))
    state, metrics = made.step(
        state, Fixed(frozen, ref), batch(), made.advantages(batch()), np.float32(1e-2), batch().row_mask
    )
    return jax.tree.map(lambda m: np.asarray(m) / (1 - B1), optax.tree.get(state.opt_state, "mu")), state, metrics


def at(tree, path):
    """The part of a nested dict at a path of keys, joined by slashes."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def logits(config, params):
    tokens = batch().prompt_tokens
    positions = np.broadcast_to(np.arange(WIDTH, dtype=np.int32), tokens.shape)
    sees = Causal(np.full(len(tokens), WIDTH, np.int32))
    hidden, _ = model.forward(params, config, tokens, positions, sees)
    return np.asarray(model.logits(params, config, hidden))


def test_fresh_adapters_change_nothing(strict_dtypes):
    frozen, _ = parameters()
    policy = lora.join(frozen, fresh(5))
    np.testing.assert_array_equal(logits(ADAPTED, policy), logits(PLAIN, frozen))
    other = fresh(6)
    assert np.any(at(other, "layers/mlp/up_lora/lora_a") != at(policy, "layers/mlp/up_lora/lora_a"))


def test_joining_undoes_the_split_without_a_copy():
    frozen, adapters = parameters()
    whole = lora.join(frozen, adapters)
    assert jax.tree.structure(whole) == jax.tree.structure(model.abstract_params(ADAPTED, VOCAB))
    for mine, theirs in zip(jax.tree.leaves(lora.split(whole)), jax.tree.leaves((frozen, adapters)), strict=True):
        assert mine is theirs
    assert lora.split(frozen) == ({}, frozen)
    assert lora.join({}, frozen) is frozen


def merged():
    """The model with its adapters merged into the weights, in float64."""
    frozen, adapters = parameters()
    whole = jax.tree.map(np.copy, frozen)
    for name in LINEAR:
        weight, beside = at(whole, f"layers/{name}"), at(adapters, f"layers/{name}_lora")
        weight += SCALE * (beside["lora_a"].astype(float) @ beside["lora_b"]).reshape(weight.shape).astype(np.float32)
    return whole


def test_the_merged_model_is_the_same_policy():
    frozen, adapters = parameters()
    np.testing.assert_allclose(logits(PLAIN, merged()), logits(ADAPTED, lora.join(frozen, adapters)), atol=2e-4)
    assert np.abs(logits(PLAIN, merged()) - logits(PLAIN, frozen)).max() > 0.1
    for name in LINEAR:
        of_layer = [at(tree, f"layers/{name}{end}")[1] for tree, end in ((frozen, ""), (merged(), ""))]
        beside = jax.tree.map(lambda x: x[1], at(adapters, f"layers/{name}_lora"))
        np.testing.assert_allclose(lora.merge(of_layer[0], **beside, alpha=ADAPTED.lora_alpha), of_layer[1], atol=1e-5)


def test_the_gradient_follows_from_the_merged_models_by_the_chain_rule():
    """Of W + s A B: dA = s dW B^T and dB = s A^T dW, where dW is the gradient of the merged model. With a KL term."""
    frozen, adapters = parameters()
    settings = dataclasses.replace(LEARNER, kl_coef=0.3)
    full, _, want = gradient(PLAIN, merged(), {}, frozen, learner=settings)
    got, state, metrics = gradient(ADAPTED, adapters, frozen, fresh(5), learner=settings)
    assert jax.tree.structure(got) == jax.tree.structure(adapters)  # nothing else has a gradient or is moved
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    assert float(metrics["loss"]) == pytest.approx(float(want["loss"]), rel=1e-4)
    for name in LINEAR:
        a, b = (at(adapters, f"layers/{name}_lora/lora_{part}") for part in "ab")
        of_weight = at(full, f"layers/{name}").reshape(a.shape[0], a.shape[1], b.shape[2])
        for part, exact in (("a", of_weight @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ of_weight)):
            mine = at(got, f"layers/{name}_lora/lora_{part}")
            assert np.linalg.norm(exact) > 0
            assert np.linalg.norm(mine - SCALE * exact) <= 1e-4 * np.linalg.norm(mine), (name, part)


def test_a_sharded_step_is_that_of_one_device():
    frozen, adapters = parameters()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    settings = dataclasses.replace(LEARNER, rows_per_microbatch=8)
    want, _, _ = gradient(ADAPTED, adapters, frozen)
    got, state, _ = gradient(
        ADAPTED, adapters, jax.device_put(frozen, sharding.shard_params(frozen, mesh)), mesh=mesh, learner=settings
    )
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(mine - exact) <= 1e-5 * np.linalg.norm(exact)
    for leaf, layout in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(sharding.shard_params(want, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)


def test_the_memory_of_gradients_and_optimiser_is_that_of_the_adapters():
    others = VOCAB, LEARNER, SamplerConfig(), EvaluationConfig(rows=8), one_device()
    adapted, plain = (
        memory.estimate(config, *others, prompt_widths=(WIDTH,), min_group=2) for config in (ADAPTED, PLAIN)
    )
    number = sum(leaf.size for leaf in jax.tree.leaves(parameters()[1]))
    assert adapted.optimizer == adapted.gradients == 8 * number < plain.optimizer
    assert adapted.parameters == plain.parameters + 4 * number


@pytest.mark.parametrize("wrong", [{"lora_rank": 0}, {"lora_rank": 2, "lora_alpha": 0.0}])
def test_a_rank_or_an_alpha_that_is_not_positive_is_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1, or None, and lora_alpha="):
        ModelConfig(**wrong)


def adapted(work_dir, **changes):
    config = tiny_config(work_dir, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=2))


def test_a_run_trains_and_saves_adapters_alone_and_resumes(tmp_path, monkeypatch):
    config = adapted(tmp_path / "whole")
    assert train.main(config) == 0
    run, state, cursor = runs.start(config)
    run.close()
    assert cursor.optimizer_steps > 8
    assert jax.tree.structure(state.policy.params) == jax.tree.structure(fresh(0, config.model))
    assert (
        min(np.abs(leaf).max() for leaf in jax.tree.leaves(state.policy.params)) > 0
    )  # B, which starts at 0, has moved

    evaluate, seen = runs.evaluate, []

    def interrupted(*args, **kwargs):
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(runs, "evaluate", interrupted)
    cut = adapted(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train.main(cut)
    assert train.main(cut) == 0
    assert (cut.run_dir / "metrics.jsonl").read_bytes() == (config.run_dir / "metrics.jsonl").read_bytes()


def test_a_folder_is_exported_with_its_adapters_merged(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": f"{i} + 1 =", "answer": str(i + 1)}) for i in range(12)))
    folder = Path(__file__).parent / "fixtures/qwen2"
    config = tiny_config(
        tmp_path / "run",
        task=Dataset(path=str(rows), max_prompt_tokens=12, num_heldout=4, verifier="user_verifiers:even_length"),
        model_folder=str(folder),
        model=ModelConfig(lora_rank=2),
        allocator=AllocatorConfig(total_budget=64, num_epochs=2, min_group=2, max_group=8),
        sampler=SamplerConfig(max_completion_tokens=6),
        learner=LearnerConfig(rows_per_step=16, learning_rate=1e-2),
        warm_start=WarmStartConfig(),
        evaluation=EvaluationConfig(every_rollouts=64, samples=1, rows=16),
    )
    assert train.main(config) == 0
    run, state, cursor = runs.start(config)
    run.close()
    assert cursor.optimizer_steps > 0
    shape, exported = weights.load(tmp_path / "run/export-64", one_device())
    assert shape.lora_rank is None
    whole = run.params(state)
    jax.tree.map(np.testing.assert_array_equal, restore_policy(config.run_dir, {}, {}).params, whole)
    tokens = np.arange(10, 18, dtype=np.int32)[None]
    positions = np.arange(8, dtype=np.int32)[None]
    sees = Causal(np.full(1, 8, np.int32))
    of = {}
    for name, (config_of, params) in {"run": (run.config.model, whole), "export": (shape, exported)}.items():
        hidden, _ = model.forward(params, config_of, tokens, positions, sees)
        of[name] = np.asarray(model.logits(params, config_of, hidden))
    np.testing.assert_allclose(of["export"], of["run"], atol=1e-4)
    before, _ = model.forward(weights.load(folder, one_device())[1], shape, tokens, positions, sees)
    assert np.abs(np.asarray(model.logits(exported, shape, before)) - of["run"]).max() > 1e-3

    changed, other = tmp_path / "changed", weights.load(folder, one_device())[1]
    weights.save(changed, folder, shape, other | {"final_norm": other["final_norm"] + 0.5})
    with pytest.raises(ValueError, match="changed: not the weights that this run started from"):
        runs.start(dataclasses.replace(config, model_folder=str(changed)))
