"""The estimate of memory, compared with the arrays themselves and with the compiler's own figures for a step."""

import dataclasses
import re
import runpy
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from cero_jax import attention, memory, model, prefill, sharding
from cero_jax.evaluation import EvaluationConfig
from cero_jax.learner import Batch, LearnerConfig, grpo_loss, step_advantages
from cero_jax.model import ModelConfig
from cero_jax.sampler import SamplerConfig
from cero_jax.sharding import MeshConfig

CONFIG = ModelConfig(num_layers=6, width=128, num_heads=8, num_kv_heads=4, head_dim=16, mlp_width=512)
VOCAB, PROMPT, COMPLETION = 2000, 48, 208
LEARNER = LearnerConfig(rows_per_step=16, rows_per_microbatch=8, logit_chunk_tokens=64)
SAMPLER = SamplerConfig(COMPLETION)


EVALUATION = EvaluationConfig(samples=2, rows=8)


def estimate(model_config=CONFIG, learner=LEARNER, sampler=SAMPLER, evaluation=EVALUATION, mesh_config=None):
    devices = jax.devices() if mesh_config else jax.devices()[:1]
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), devices)
    return memory.estimate(
        model_config, VOCAB, learner, sampler, evaluation, mesh, prompt_widths=(PROMPT,), min_group=4
    )


def test_parameters_and_cache_are_those_of_the_arrays():
    params = model.init_params(CONFIG, VOCAB, 0)
    assert estimate().parameters == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # It grows from a window of 64 over 128 to all 208 places, the last two of them beside each other.
    slots = model.init_cache(CONFIG, 16, PROMPT + 128), model.init_cache(CONFIG, 16, PROMPT + COMPLETION)
    prompts = model.init_cache(CONFIG, 4, PROMPT)
    assert estimate().cache == sum(leaf.nbytes for leaf in jax.tree.leaves((slots, prompts)))
    split = estimate(mesh_config=MeshConfig(data=2, fsdp=4))
    assert split.parameters == pytest.approx(estimate().parameters / 4, rel=0.02)  # norms are on every device
    assert split.optimizer == 2 * split.parameters


def test_an_evaluation_of_more_rows_than_a_step_counts():
    much = estimate(evaluation=EvaluationConfig(samples=4, rows=256))
    assert much.cache == 256 // 16 * estimate().cache
    assert much.drawing == 256 // 16 * estimate().drawing == 3 * 256 * VOCAB * 4
    few = dataclasses.replace(SAMPLER, slots=8)
    assert estimate(sampler=few, evaluation=EvaluationConfig(samples=4, rows=256)).cache < much.cache / 8
    assert much.total > estimate().total


@pytest.mark.parametrize("remat", [False, True])
def test_activations_and_logits_are_near_the_compilers_figure(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    rows, zeros = LEARNER.rows_per_microbatch, np.zeros
    batch = Batch(
        zeros((rows, PROMPT), np.int32), zeros(rows, np.int32), zeros((rows, COMPLETION), np.int32),
        zeros(rows, np.int32), zeros((rows, COMPLETION), np.float32), zeros(rows, np.float32), zeros(rows, np.int32),
        zeros(rows, bool), zeros(rows, np.float32),
    )  # fmt: skip
    loss = partial(grpo_loss, model_config=config, config=LEARNER, temperature=1.0)
    step = jax.jit(jax.grad(lambda params, batch: loss(params, None, batch, step_advantages(batch, LEARNER))[0]))
    compiled = step.lower(model.abstract_params(config, VOCAB), batch).compile()
    needed, held = estimate(config), compiled.memory_analysis().temp_size_in_bytes
    assert 0.85 < (needed.activations + max(needed.layer, needed.logits)) / held < 1.15


def test_a_step_needs_the_larger_of_two_moments():
    """Logits are gone when most of a micro-batch's gradient is there; on a TPU that of their weights waits."""
    none = memory.Estimate(**dict.fromkeys(memory.Estimate._fields, 0))
    step = none._replace(parameters=1, gradients=20, cast=3, activations=4, layer=5)
    assert step.total == 1 + 20 + 3 + 4 + 5
    assert step._replace(logits=15).total == step.total == step._replace(logits=16).total - 1
    assert step._replace(waiting=7, logits=15).total == step.total + 7
    assert estimate().waiting == 0  # a CPU's


def test_the_copy_for_sampling_is_gathered_a_parameter_at_a_time_before_there_is_a_cache():
    split = estimate(mesh_config=MeshConfig(data=2, fsdp=4))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(model.init_params(CONFIG, VOCAB, 0)))
    assert (estimate().moving, split.moving) == (0, largest)
    none = memory.Estimate(**dict.fromkeys(memory.Estimate._fields, 0))
    drawn = none._replace(parameters=1, sampling_copy=10, moving=4, cache=2, prefill=1)
    assert drawn.total == 1 + 10 + 4
    assert drawn._replace(drawing=3).total == 1 + 10 + 2 + 3


PUBLISHED = {  # shapes and vocabularies of the models' own config.json
    "deepseek_r1_distill_qwen_1_5b": (28, 1536, 12, 2, 128, 8960, False, 151_936),
    "llama3_2_1b": (16, 2048, 32, 8, 64, 8192, True, 128_256),
    "qwen2_5_math_7b": (28, 3584, 28, 4, 128, 18_944, False, 152_064),
    "qwen3_4b": (36, 2560, 32, 8, 128, 9728, True, 151_936),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_large_models_say_what_they_need_and_fit(name, monkeypatch):
    """On as many H100 as the config splits parameters over."""
    monkeypatch.setattr(attention, "_why_not_cudnn", lambda *_: None)
    path = Path(__file__).parent.parent / "configs" / f"{name}.py"
    loaded, (*sizes, tied, vocab) = runpy.run_path(str(path)), PUBLISHED[name]
    config, fields = loaded["config"], ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
    shape = dataclasses.replace(config.model, tied_embeddings=tied, **dict(zip(fields, sizes, strict=True)))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: config.mesh.fsdp])
    needed = memory.estimate(
        shape, vocab, config.learner, config.sampler, config.evaluation, mesh,
        prompt_widths=(config.task.max_prompt_tokens,), min_group=config.allocator.min_group,
    )  # fmt: skip
    said = re.search(r"(\d+) GB on", loaded["__doc__"])
    assert said
    assert round(needed.total / memory.GB) == int(said[1]) < 70


def test_fused_attention_holds_no_scores(monkeypatch):
    """What it holds of a row grows with its tokens, not with their square."""
    monkeypatch.setattr(attention, "_why_not_cudnn", lambda *_: None)
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for num_scores in (2, 3):
        short, long = (prefill.row_bytes(CONFIG, length, num_scores, one) for length in (1000, 8000))
        assert long == 8 * short
    scores = CONFIG.num_layers * LEARNER.rows_per_microbatch * CONFIG.num_heads * (PROMPT + COMPLETION) ** 2 * 4
    fewer = estimate(dataclasses.replace(CONFIG, attention="xla")).activations - estimate().activations
    assert 1.9 * scores < fewer < 2 * scores


def test_too_much_memory_is_reported_with_advice():
    needed = estimate()
    assert "\n" not in memory.memory_report(needed, 10**12)
    said = memory.memory_report(needed, 10**6)
    assert "this will probably not fit: activations: lower learner.rows_per_microbatch, or set model.remat=True" in said
    held = memory.Estimate(**(dict.fromkeys(memory.Estimate._fields, 0) | {"parameters": 400, "sampling_copy": 500}))
    said = memory.memory_report(held, 10)
    assert "sampling_copy: raise mesh.tensor" in said
