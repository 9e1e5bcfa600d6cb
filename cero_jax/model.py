"""The policy: a decoder-only Flax transformer, and the functions that run it on a plain tree of parameters.

RMSNorm before each half, rotary positions, grouped-query attention, gated MLP (SwiGLU), layers scanned so that compile
time does not grow with depth. One forward pass serves training, prefill and decoding: what differs is the cache.

Letters: B rows, T tokens of this call, S tokens a query may look at, D width, H heads, G key-value heads, K head size,
F hidden size of the MLP, V vocabulary, L layers.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Params = dict  # a nested dict of arrays, as nnx.to_pure_dict gives it


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the policy."""

    num_layers: int = 2
    width: int = 96
    """D, size of the residual stream."""
    num_heads: int = 4
    num_kv_heads: int = 2
    """Heads that keys and values are shared by; must divide num_heads."""
    head_dim: int = 24
    mlp_width: int = 256
    """F, hidden size of the gated MLP."""
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    """Read the output projection from the embedding table."""
    param_dtype: str = "float32"
    """What parameters and optimiser keep."""
    compute_dtype: str = "float32"
    """What the forward pass multiplies in; norms, softmax and log-probabilities are float32 always."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far."""

    k: Array  # [L, B, S, G, K] compute dtype
    v: Array  # [L, B, S, G, K] compute dtype


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Divide x [..., D] by its root mean square, in float32, times scale [D]; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return jnp.einsum("...d,d->...d", normed, scale.astype(jnp.float32)).astype(x.dtype)


def rope(x: Array, positions: Array, base: float) -> Array:
    """Rotate x [B, T, heads, K] by its positions [B, T] (Su et al. 2021, half-split pairs as Llama has them)."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [K/2]
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _normal(key: Array, shape: tuple[int, ...], fan_in: int, dtype: str) -> nnx.Param:
    return nnx.Param((jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype))


def _ones(size: int, dtype: str) -> nnx.Param:
    return nnx.Param(jnp.ones(size, dtype))


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, h, g, k, dtype = config.width, config.num_heads, config.num_kv_heads, config.head_dim, config.param_dtype
        self.config = config
        self.q = _normal(rngs.params(), (d, h, k), d, dtype)
        self.k = _normal(rngs.params(), (d, g, k), d, dtype)
        self.v = _normal(rngs.params(), (d, g, k), d, dtype)
        self.o = _normal(rngs.params(), (h, k, d), h * k * 2 * config.num_layers, dtype)

    def __call__(self, x: Array, positions: Array, mask: Array, cache: Cache | None, layer: Array, start: Array):
        """Inputs x [B, T, D], mask [B, T, S] -> [B, T, D] and the cache with this call's tokens written at `start`."""
        base, dtype = self.config.rope_base, x.dtype
        q = rope(jnp.einsum("btd,dhk->bthk", x, self.q[...].astype(dtype)), positions, base)
        k = rope(jnp.einsum("btd,dgk->btgk", x, self.k[...].astype(dtype)), positions, base)
        v = jnp.einsum("btd,dgk->btgk", x, self.v[...].astype(dtype))
        if cache is not None:
            # Written in place in the scan's carry: the cache is never copied whole.
            at = (layer, 0, start, 0, 0)
            cache = Cache(*(jax.lax.dynamic_update_slice(c, n[None], at) for c, n in zip(cache, (k, v), strict=True)))
            k, v = (jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return jnp.einsum("bthk,hkd->btd", out, self.o[...].astype(dtype)), cache


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f, dtype = config.width, config.mlp_width, config.param_dtype
        self.gate = _normal(rngs.params(), (d, f), d, dtype)
        self.up = _normal(rngs.params(), (d, f), d, dtype)
        self.down = _normal(rngs.params(), (f, d), f * 2 * config.num_layers, dtype)

    def __call__(self, x: Array) -> Array:
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class Block(nnx.Module):
    """One layer: attention, then the MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.attn_norm = _ones(config.width, config.param_dtype)
        self.attn = Attention(config, rngs)
        self.mlp_norm = _ones(config.width, config.param_dtype)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, x: Array, positions: Array, mask: Array, cache: Cache | None, layer: Array, start: Array):
        attended, cache = self.attn(
            rms_norm(x, self.attn_norm[...], self.eps), positions, mask, cache, layer=layer, start=start
        )
        x = x + attended
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)), cache


class Transformer(nnx.Module):
    """Embedding, L scanned blocks, a last norm; the output projection is `unembed`, apart, so that a caller may
    project only the positions that it needs.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        self.config = config
        # 0.02: a tied table is read as an output projection too, and wide logits at the start learn slowly.
        table = jax.random.normal(rngs.params(), (vocab_size, config.width), jnp.float32) * 0.02
        self.embed = nnx.Param(table.astype(config.param_dtype))
        self.layers = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.final_norm = _ones(config.width, config.param_dtype)
        if not config.tied_embeddings:
            self.unembed = _normal(rngs.params(), (config.width, vocab_size), config.width, config.param_dtype)

    def __call__(self, tokens: Array, positions: Array, mask: Array, cache: Cache | None, start: Array):
        # Cast behind the gather: the table's gradient is then summed in its own dtype.
        x = self.embed[...][tokens].astype(self.config.compute_dtype)

        def layer_step(carry, layer_and_index):
            layer, index = layer_and_index
            x, cache = carry
            return layer(x, positions, mask, cache, index, start), None

        indices = jnp.arange(self.config.num_layers)
        (x, cache), _ = jax.lax.scan(layer_step, (x, cache), (self.layers, indices))
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), cache

    def logits(self, hidden: Array) -> Array:
        if self.config.tied_embeddings:
            table = self.embed[...].astype(hidden.dtype)
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return jnp.einsum(
            "...d,dv->...v", hidden, self.unembed[...].astype(hidden.dtype), preferred_element_type=jnp.float32
        )


@functools.cache
def _graphdef(config: ModelConfig, vocab_size: int) -> nnx.GraphDef:
    """The module without its arrays; graph=False: a tree, whose walk costs nothing in the hot path."""
    module = jax.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(0)))
    return nnx.split(module, graph=False)[0]


def init_params(config: ModelConfig, vocab_size: int, seed: int) -> Params:
    """Random parameters, a nested dict of arrays in `param_dtype`; a pure function of its arguments."""
    _, state = nnx.split(Transformer(config, vocab_size, nnx.Rngs(seed)), graph=False)
    return nnx.to_pure_dict(state)


def init_cache(config: ModelConfig, num_rows: int, length: int) -> Cache:
    """An empty cache for `num_rows` rows of `length` tokens each."""
    shape = (config.num_layers, num_rows, length, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    mask: Array,
    cache: Cache | None = None,
    start: Array | int = 0,
) -> tuple[Array, Cache | None]:
    """The last hidden states of `tokens`.

    Args:
      params: as `init_params` gives them.
      config: the model's shape.
      tokens: [B, T] int32.
      positions: [B, T] int32, each token's place in its own row, padding not counted.
      mask: [B, T, S] bool, which of the S keys each token may look at; S = T without a cache, else the cache's length.
      cache: keys and values so far; this call's are written at `start` .. `start + T`.
      start: [] int32, where in the cache this call's tokens go.

    Returns:
      [B, T, D] in compute dtype, behind the last norm (feed it to `logits`), and the cache.
    """
    vocab_size = params["embed"].shape[0]
    model = nnx.merge(_graphdef(config, vocab_size), params)
    return model(tokens, positions, mask, cache, jnp.asarray(start, jnp.int32))


def logits(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """Output projection: hidden [..., D] -> [..., V] float32."""
    model = nnx.merge(_graphdef(config, params["embed"].shape[0]), params)
    return model.logits(hidden)


def left_padded(lengths: Array, width: int) -> tuple[Array, Array]:
    """Which of `width` places hold a token, and each token's position, for rows padded on the left.

    lengths: [B] int32. Returns valid [B, width] bool and positions [B, width] int32 (0 on padding).
    """
    place = jnp.arange(width, dtype=jnp.int32)[None, :] - (width - lengths[:, None])
    return place >= 0, jnp.maximum(place, 0)


def causal_mask(valid: Array) -> Array:
    """[B, T] which places hold a token -> [B, T, T]: a query sees the tokens up to its own, and itself on padding.

    (A padded query that saw nothing would be a softmax over an empty set: NaN, which leaks into gradients.)
    """
    width = valid.shape[1]
    causal = jnp.tril(jnp.ones((width, width), bool))
    return (causal[None] & valid[:, None, :]) | jnp.eye(width, dtype=bool)[None]
