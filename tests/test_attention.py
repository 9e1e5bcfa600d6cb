"""Attention against softmax and its gradient written out in float64, and the programs that fused kernels lower to.

The kernels themselves run where they are made for: `splash` in Pallas's interpreter here, `cudnn` on a GPU alone, by

    python -m pytest --noconftest tests/test_attention.py
"""

import functools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from cero_jax import attention, model, sharding
from cero_jax.attention import Causal
from cero_jax.model import ModelConfig
from cero_jax.sharding import MeshConfig

SPLIT = pytest.mark.skipif(jax.device_count() < 8, reason="conftest.py makes 8 devices")
ON_GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
SCALE, WIDTH, LENGTHS = 0.3, 151, (151, 1, 77)  # a width that is odd, and no multiple of a block


def drawn(heads=4, kv_heads=2, head_dim=8, width=WIDTH, lengths=LENGTHS, dtype=jnp.float32):
    """Queries, keys, values, and the gradient of a loss at their attention, which is 0 on padding."""
    rng, tokens = np.random.default_rng(0), np.arange(width)[None] < np.array(lengths)[:, None]
    sizes = (heads, kv_heads, kv_heads, heads)
    arrays = [jnp.asarray(rng.normal(size=(len(lengths), width, size, head_dim)), dtype) for size in sizes]
    return (*arrays[:3], arrays[3] * jnp.asarray(tokens, dtype)[:, :, None, None])


def seen(lengths, width, window):
    """[B, T, T] bool, what each token sees: itself and those before it, if there is a window only the last of them."""
    query, key = np.mgrid[:width, :width]
    near = (key <= query) & (key > query - (window or width))
    return near[None] & (np.arange(width) < np.array(lengths)[:, None])[:, :, None]


def reference(q, k, v, cotangent, sees):
    """Attention and its gradients to q, k and v, in float64, a head at a time. sees: [B, T, T]."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    shared = q.shape[2] // k.shape[2]
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        at, of = (row, slice(None), head), (row, slice(None), head // shared)
        score = np.where(sees[row], q[at] @ k[of].T * SCALE, -np.inf)
        weight = np.exp(score - score.max(axis=1, initial=-1e30, keepdims=True))
        weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
        out[at] = weight @ v[of]
        dv[of] += weight.T @ cotangent[at]
        slope = cotangent[at] @ v[of].T
        dscore = weight * (slope - (weight * slope).sum(axis=1, keepdims=True)) * SCALE
        dq[at], dk[of] = dscore @ k[of], dk[of] + dscore.T @ q[at]
    return out, dq, dk, dv


def check(attend, arrays, lengths, window, atol=1e-5):
    """That `attend` of q, k, v gives what the reference gives for the tokens, and its gradients, everywhere."""
    *qkv, cotangent = arrays
    got, backward = jax.vjp(attend, *qkv)
    want = reference(*arrays, seen(lengths, qkv[0].shape[1], window))
    tokens = np.arange(qkv[0].shape[1])[None] < np.array(lengths)[:, None]
    for name, a, b in zip(("out", "dq", "dk", "dv"), (got, *backward(cotangent)), want, strict=True):
        a = np.asarray(a, np.float64)
        here = tokens if name == "out" else np.ones_like(tokens)
        np.testing.assert_allclose(a[here], b[here], atol=atol, rtol=atol, err_msg=name)


def causal(lengths=LENGTHS, near=None):
    return Causal(jnp.asarray(lengths, jnp.int32), None if near is None else jnp.bool(near))


@pytest.mark.parametrize(("near", "window"), [(None, None), (True, 40)])
def test_xla_gives_what_the_reference_gives(near, window):
    check(jax.jit(functools.partial(attend_by, "xla", causal(near=near))), drawn(), LENGTHS, window)


def attend_by(kernel, sees, q, k, v):
    return attention.attend(q, k, v, sees, SCALE, kernel=kernel, window=40)


@pytest.mark.parametrize(("near", "window"), [(None, None), (False, None), (True, 40)])
def test_the_arguments_that_cudnn_gets_mean_what_tokens_see(near, window, monkeypatch):
    """jax's own reading of them, which it holds cuDNN to in its tests: without a mask, by `xla`."""
    plain, given = jax.nn.dot_product_attention, []

    def by_xla(*args, implementation, **settings):
        given.append((implementation, *settings))
        return plain(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    check(jax.jit(functools.partial(attend_by, "cudnn", causal(near=near))), drawn(), LENGTHS, window)
    assert all(each[0] == "cudnn" and "mask" not in each for each in given)


@pytest.mark.parametrize(("near", "window"), [(None, None), (True, 40)])
def test_splash_gives_what_the_reference_gives(near, window, monkeypatch):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    made = functools.partial(splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha_single_device", made)
    monkeypatch.setattr(attention, "SPLASH_BLOCKS", (128,))
    by = functools.partial(attention._splash, lengths=causal().lengths, scale=SCALE, window=window)
    check(jax.jit(by), drawn(heads=2, kv_heads=1), LENGTHS, window)


CONFIG = ModelConfig(
    num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, sliding_layers=(1,),
    sliding_window=40, compute_dtype="bfloat16", attention="cudnn", remat=True,
)  # fmt: skip


VOCAB = 12


def drawn_params(config):
    rng, shapes = np.random.default_rng(2), model.abstract_params(config, VOCAB)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype), shapes)


def gradient(config, lengths):
    """A function of parameters and tokens: the gradient of the sum of hidden states."""

    def loss(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        hidden, _ = model.forward(params, config, tokens, positions, Causal(lengths))
        real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        return jnp.where(real[:, :, None], hidden.astype(jnp.float32), 0.0).sum()

    return jax.grad(loss)


def kernel_calls(text):
    """Of a lowered program: each call of cuDNN's with its mask and its window, and its operands' types."""
    found = re.findall(r"@(__cudnn\S+?)\(.*?backend_config = \"(.*?)\",.*? : \((.*?)\) -> ", text)
    for name, settings, operands in found:
        settings = json.loads(settings.replace(r"\22", '"'))["cudnn_fmha_backend_config"]
        yield name, settings["mask_type"], settings["sliding_window_length"], re.findall(r"tensor<(\S+?)>", operands)


@SPLIT
def test_on_gpus_a_step_calls_cudnn_on_each_devices_part_and_makes_no_scores(monkeypatch):
    monkeypatch.setattr(attention, "_why_not_cudnn", lambda *_: None)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)  # else jax asks the library
    mesh, lengths = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), jnp.asarray([WIDTH, 1, 9, 77], jnp.int32)
    step = jax.jit(sharding.on(mesh, gradient(CONFIG, lengths)))
    inputs = model.abstract_params(CONFIG, VOCAB), jax.ShapeDtypeStruct((4, WIDTH), jnp.int32)
    text = step.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    calls = list(kernel_calls(text))
    part = [f"1x{WIDTH + 1}x{heads}x8xbf16" for heads in (2, 1, 1)]  # a row and half of the heads
    assert {(name, kind, window) for name, kind, window, _ in calls} == {
        (f"__cudnn$fmhaSoftmax{back}", *mask)
        for back in ("", "Backward")
        for mask in (("PADDING_CAUSAL", 0), ("CAUSAL", 40))
    }
    for _, kind, _, operands in calls:
        assert operands[:3] == part
        assert (operands[-2:] == ["1xi32", "1xi32"]) is (kind == "PADDING_CAUSAL")  # lengths of queries and keys
    assert not re.findall("15[12]x15[12]x", text)
    by_xla = jax.jit(gradient(ModelConfig(**vars(CONFIG) | {"attention": "xla"}), lengths))
    assert f"{WIDTH}x{WIDTH}x" in by_xla.lower(*inputs).as_text()


def test_an_odd_number_of_tokens_has_a_gradient_on_gpus(monkeypatch):
    """jax refuses one of cuDNN's; a row of the learner has its tokens less one."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)
    shapes = [jax.ShapeDtypeStruct((2, 63, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]

    def total(q, k, v):
        sees = Causal(jnp.asarray([63, 5], jnp.int32))
        return attention.attend(q, k, v, sees, 1.0, kernel="cudnn").astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*shapes)
    assert [each.shape for each in jax.tree.leaves(traced.out_info)] == [each.shape for each in shapes]
    calls = list(kernel_calls(traced.lower(lowering_platforms=("cuda",)).as_text()))
    assert [operands[0] for *_, operands in calls] == ["2x64x4x8xbf16"] * 2  # forward and backward


@SPLIT
def test_each_device_attends_for_its_own_rows_and_heads(monkeypatch):
    """With plain attention in the place of the two kernels that a layer chooses of."""
    shapes = set()

    def kernel(q, k, v, lengths, *, scale, window):
        shapes.add((q.shape, k.shape, lengths.shape))
        here = Causal(lengths, None if window is None else jnp.bool(True))
        return attention.attend(q, k, v, here, scale, kernel="xla", window=window or 0)

    monkeypatch.setattr(attention, "_cudnn", kernel)
    mesh, lengths = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), (60, 1, 9, 47)
    by = sharding.on(mesh, functools.partial(attend_by, "cudnn", causal(lengths, True)))
    check(jax.jit(by), jax.device_put(drawn(width=60, lengths=lengths), sharding.rows(mesh)), lengths, 40)
    assert shapes == {((1, 60, 2, 8), (1, 60, 1, 8), (1,))}


H100, T4, MI300 = ((kind, "gpu") for kind in ("NVIDIA H100 80GB HBM3", "Tesla T4", "AMD Instinct MI300X"))
V5E, CPU = ("TPU v5 lite", "tpu"), ("cpu", "cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "by_itself", "refused"),
    [
        (H100, "bfloat16", 64, "cudnn", {"splash": "needs a TPU, and this is NVIDIA H100"}),
        (H100, "float16", 256, "cudnn", {}),
        (H100, "float32", 64, "xla", {"cudnn": "needs model.compute_dtype bfloat16 or float16, not float32"}),
        (H100, "bfloat16", 36, "xla", {"cudnn": "model.head_dim to be a multiple of 8 and at most 256, not 36"}),
        (H100, "bfloat16", 264, "xla", {"cudnn": "a multiple of 8 and at most 256, not 264"}),
        (T4, "float16", 64, "xla", {"cudnn": "needs a GPU of NVIDIA, Ampere or later, and this is Tesla T4"}),
        (MI300, "bfloat16", 64, "xla", {"cudnn": "and this is AMD Instinct MI300X"}),
        (V5E, "bfloat16", 256, "splash", {"cudnn": "needs a GPU of NVIDIA.* this is TPU v5 lite"}),
        (V5E, "float32", 36, "splash", {}),
        (V5E, "float16", 64, "xla", {"splash": "needs model.compute_dtype bfloat16 or float32, not float16"}),
        (CPU, "bfloat16", 64, "xla", {"cudnn": "this is cpu: say", "splash": "this is cpu: say"}),
    ],
)
def test_the_kernel_is_the_platforms_and_one_that_cannot_be_is_refused(device, dtype, head_dim, by_itself, refused):
    device = SimpleNamespace(device_kind=device[0], platform=device[1])
    assert attention.kernel_for("auto", dtype, head_dim, device) == by_itself
    assert attention.kernel_for("xla", dtype, head_dim, device) == "xla"
    assert attention.kernel_for(by_itself, dtype, head_dim, device) == by_itself
    for wanted, message in refused.items():
        with pytest.raises(ValueError, match=f"model.attention='{wanted}' .*{message}"):
            attention.kernel_for(wanted, dtype, head_dim, device)


@ON_GPU
@pytest.mark.parametrize("width", [256, 331])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("near", [None, False, True])
def test_cudnn_gives_what_the_reference_gives(near, head_dim, width):
    lengths = (width, 1, 77, 200)
    arrays = drawn(8, 2, head_dim, width, lengths, jnp.bfloat16)
    by = functools.partial(attend_by, "cudnn", causal(lengths, near))
    check(jax.jit(by), arrays, lengths, 40 if near else None, atol=0.06)


@ON_GPU
def test_with_cudnn_the_gradient_of_a_model_is_that_with_xla():
    lengths = jnp.asarray([WIDTH, 1, 9, 77], jnp.int32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (4, WIDTH)), jnp.int32)
    params = drawn_params(CONFIG)
    exact = ModelConfig(**vars(CONFIG) | {"compute_dtype": "float32", "attention": "xla"})
    got, want = (jax.jit(gradient(config, lengths))(params, tokens) for config in (CONFIG, exact))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)
