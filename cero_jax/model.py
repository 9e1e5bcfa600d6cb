"""The policy: a decoder-only Flax transformer, and functions that run it on a nested dict of parameters.

A layer is attention, then a gated MLP, each behind an RMSNorm. Attention has rotary positions and may share keys and
values between heads. The layers are scanned, so compile time does not grow with depth. Training, prefill and decoding
use the same forward function; they differ only in the cache. What Qwen2, Qwen3, Llama 3 and Gemma 3 add to this is
switched on by settings of ModelConfig.

Letters: B rows of this call, T tokens of this call in each row, C keys that a query may look at (the cache's places
where there is a cache, else T), V vocabulary, L layers, D width, H heads, Hkv key-value heads, Dh head size,
F hidden size of the MLP.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from cero_jax import rope, sharding
from cero_jax.attention import Causal, Choice, Kernel, attend, kernel_for, write
from cero_jax.lora import Adapter
from cero_jax.projection import project
from cero_jax.rope import LARGEST_BASE, RopeScaling
from cero_jax.settings import check

Dtype = Literal["float32", "bfloat16", "float16"]
Params = dict  # a nested dict of arrays; `init_params` makes one, sharding.RULES lists the paths
MOST_LAYERS = 10_000  # many times what any model has: a number beyond is a slip, and would cost hours before it fails
LARGEST_SIZE = 2**22  # of any other dimension


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the policy, and the dtypes it is stored and computed in. Raises ValueError for an impossible shape."""

    num_layers: int = 2
    width: int = 96
    """D, the size of a token's hidden state between layers."""
    num_heads: int = 4
    num_kv_heads: int = 2
    """Heads of keys and values; each serves num_heads / num_kv_heads query heads."""
    head_dim: int = 24
    """Dh, even."""
    mlp_width: int = 256
    """F, hidden size of the gated MLP."""
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_embeddings: bool = True
    """Use the embedding table as output projection, too."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys (Qwen3, Gemma 3)."""
    post_norms: bool = False
    """RMSNorm after attention and after the MLP as well as before them (Gemma 3)."""
    norm_offset: float = 0.0
    """Added to every norm's stored scale; 1 for Gemma 3, which stores each scale minus one."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """What the MLP's gate goes through."""
    scaled_embeddings: bool = False
    """Multiply embeddings by sqrt(D) (Gemma 3)."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by the square root of this; None: by that of head_dim."""
    sliding_layers: tuple[int, ...] = ()
    """Layers, counted from 0, in which a token sees only the last `sliding_window` tokens, itself included."""
    sliding_window: int = 4096
    """Tokens."""
    sliding_rope_base: float | None = None
    """Rotary base of the sliding layers, without rope_scaling; None: they rotate as the other layers do."""
    lora_rank: int | None = None
    """Rank of LoRA adapters: they are trained, one beside each linear layer, and the model itself is frozen. None: no
    adapters, every parameter is trained."""
    lora_alpha: float = 32.0
    """An adapter's output is multiplied by lora_alpha / lora_rank."""
    max_positions: int | None = None
    """The longest context that the model is made for, in tokens; None: no limit."""
    remat: bool = False
    """Compute each layer's inner activations again in the backward, to save memory, instead of keeping them."""
    param_dtype: Dtype = "float32"
    """Dtype of the stored parameters; adapters and the optimiser's state are always float32. In fewer bits an update is
    rounded up or down at random, so that small ones add up: right on average, with some noise."""
    compute_dtype: Dtype = "float32"
    """Dtype of matrix products; norms, softmax and log-probabilities are always float32."""
    attention: Choice = "auto"
    """What computes attention in training and in reading prompts: fused by `cudnn` on NVIDIA's GPUs (bfloat16 or
    float16) or by `splash` on TPUs, or by `xla`, which holds all scores. auto: fused where it can be."""

    def __post_init__(self):
        sizes = dict.fromkeys(("width", "num_heads", "num_kv_heads", "head_dim", "mlp_width"), (1, LARGEST_SIZE))
        bases = dict.fromkeys(("rope_base", "sliding_rope_base"), (1, LARGEST_BASE))
        rest = {"norm_eps": (1e-30, 1), "query_pre_attn_scalar": (1e-6, LARGEST_SIZE), "max_positions": (1, 2**31 - 1)}
        check(self, num_layers=(1, MOST_LAYERS), norm_offset=(-1e6, 1e6), **sizes, **bases, **rest)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn a head's values in pairs")
        if self.lora_rank is not None and (not 1 <= self.lora_rank <= LARGEST_SIZE or not self.lora_alpha > 0):
            raise ValueError(
                f"lora_rank={self.lora_rank} must be at least 1, or None, and lora_alpha={self.lora_alpha} positive"
            )
        if any(not 0 <= layer < self.num_layers for layer in self.sliding_layers) or not (
            1 <= self.sliding_window < 2**31
        ):
            raise ValueError(
                f"sliding_layers={self.sliding_layers} must lie in 0..num_layers-1={self.num_layers - 1}, and "
                f"sliding_window={self.sliding_window} be at least 1"
            )


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far."""

    k: Array  # [L, B, C, Hkv, Dh] compute dtype
    v: Array  # [L, B, C, Hkv, Dh] compute dtype


class View(NamedTuple):
    """Where the tokens of this call stand and what they may look at, for one kind of layer (full or sliding)."""

    positions: Array  # [B, T] int32
    sees: Array | Causal  # [B, T, C] bool, or without a mask
    frequency: Array  # [Dh/2] float32, radians a position


def kernel(config: ModelConfig, mesh: Mesh | None = None) -> Kernel:
    """What computes attention on the mesh; None: the one in use, else the first device. ValueError: see kernel_for."""
    device = jax.sharding.get_abstract_mesh().abstract_device if mesh is None else mesh.devices.flat[0]
    return kernel_for(config.attention, config.compute_dtype, config.head_dim, device or jax.devices()[0])


# Of what is cheap to compute again, the backward keeps no inner values: in float32 they would be most of a layer's.
_again = functools.partial(jax.checkpoint, prevent_cse=False)  # False: not needed inside a scan


@functools.partial(_again, static_argnums=2)
def rms_norm(x: Array, scale: Array, config: ModelConfig) -> Array:
    """[..., D]: x over its root mean square, times (scale [D] + norm_offset), computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    return jnp.einsum("...d,d->...d", normed, scale.astype(jnp.float32) + config.norm_offset).astype(x.dtype)


def _normal(key: Array, shape: tuple[int, ...], fan_in: int, dtype: str) -> nnx.Param:
    return nnx.Param((jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype))


def _scale(size: int, config: ModelConfig) -> nnx.Param:
    return nnx.Param(jnp.full(size, 1 - config.norm_offset, config.param_dtype))


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, h, hkv, dh, dtype = config.width, config.num_heads, config.num_kv_heads, config.head_dim, config.param_dtype
        self.config = config
        self.q = _normal(rngs.params(), (d, h, dh), d, dtype)
        self.k = _normal(rngs.params(), (d, hkv, dh), d, dtype)
        self.v = _normal(rngs.params(), (d, hkv, dh), d, dtype)
        self.o = _normal(rngs.params(), (h, dh, d), h * dh * 2 * config.num_layers, dtype)
        if config.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = (nnx.Param(jnp.zeros((n, dh), dtype)) for n in (h, hkv, hkv))
        if config.qk_norm:
            self.q_norm, self.k_norm = _scale(dh, config), _scale(dh, config)
        if config.lora_rank:
            adapter = functools.partial(Adapter, rank=config.lora_rank, alpha=config.lora_alpha, rngs=rngs)
            self.q_lora, self.o_lora = adapter(d, h * dh), adapter(h * dh, d)
            self.k_lora, self.v_lora = adapter(d, hkv * dh), adapter(d, hkv * dh)

    def _heads(self, x: Array, name: str) -> Array:
        """Queries, keys or values (`name` q, k or v) of x [B, T, D] -> [B, T, H or Hkv, Dh], bias and norm applied."""
        heads = jnp.einsum("btd,dhk->bthk", x, getattr(self, name)[...].astype(x.dtype))
        if self.config.lora_rank:
            heads = heads + getattr(self, f"{name}_lora")(x).reshape(heads.shape)
        if self.config.qkv_bias:
            heads = heads + getattr(self, f"{name}_bias")[...].astype(x.dtype)[None, None]
        if self.config.qk_norm and name != "v":
            heads = rms_norm(heads, getattr(self, f"{name}_norm")[...], self.config)
        return heads

    def __call__(self, x: Array, view: View, cache: Cache | None, layer: Array, start: Array):
        """From x [B, T, D]: [B, T, D], and the cache with row b's new keys and values from place start[b] on."""
        q, k = (rope.rotate(self._heads(x, name), view.positions, view.frequency) for name in ("q", "k"))
        v = self._heads(x, "v")
        if cache is not None:
            # The cache is the scan's carry, which XLA updates in place: it is never copied whole.
            places = start[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            cache = Cache(*(write(c, new, layer, places) for c, new in zip(cache, (k, v), strict=True)))
            if not isinstance(view.sees, Causal):  # else nothing was there before this call
                k, v = (jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)
        config = self.config
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        out = attend(q, k, v, view.sees, scale, kernel=kernel(config), window=config.sliding_window)
        half = jnp.einsum("bthk,hkd->btd", out, self.o[...].astype(x.dtype))
        if self.config.lora_rank:
            half = half + self.o_lora(out.reshape(*out.shape[:2], -1))
        return half, cache


class GatedMLP(nnx.Module):
    """The gated MLP, down(activation(gate(x)) * up(x)): [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f, dtype = config.width, config.mlp_width, config.param_dtype
        self.config = config
        self.activation = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[config.activation]
        self.gate = _normal(rngs.params(), (d, f), d, dtype)
        self.up = _normal(rngs.params(), (d, f), d, dtype)
        self.down = _normal(rngs.params(), (f, d), f * 2 * config.num_layers, dtype)
        if config.lora_rank:
            adapter = functools.partial(Adapter, rank=config.lora_rank, alpha=config.lora_alpha, rngs=rngs)
            self.gate_lora, self.up_lora, self.down_lora = adapter(d, f), adapter(d, f), adapter(f, d)

    def _linear(self, x: Array, name: str) -> Array:
        out = x @ getattr(self, name)[...].astype(x.dtype)
        return out + getattr(self, f"{name}_lora")(x) if self.config.lora_rank else out

    def __call__(self, x: Array) -> Array:
        gated = _again(lambda gate, up: self._linear(self.activation(gate) * up, "down"))
        return gated(self._linear(x, "gate"), self._linear(x, "up"))


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.attn_norm = _scale(config.width, config)
        self.attn = Attention(config, rngs)
        self.mlp_norm = _scale(config.width, config)
        self.mlp = GatedMLP(config, rngs)
        if config.post_norms:
            self.attn_post_norm, self.mlp_post_norm = _scale(config.width, config), _scale(config.width, config)

    def __call__(self, x: Array, view: View, cache: Cache | None, layer: Array, start: Array):
        config = self.config
        half, cache = self.attn(rms_norm(x, self.attn_norm[...], config), view, cache, layer, start)
        x = x + (rms_norm(half, self.attn_post_norm[...], config) if config.post_norms else half)
        half = self.mlp(rms_norm(x, self.mlp_norm[...], config))
        return x + (rms_norm(half, self.mlp_post_norm[...], config) if config.post_norms else half), cache


class Transformer(nnx.Module):
    """Embedding, L scanned blocks, a last norm. The output projection is a function of its own, `logits`, so that a
    caller may project only the positions that it needs.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        self.config = config
        # 0.02: a tied table is the output projection, too, and a policy that starts with large logits learns slowly.
        table = jax.random.normal(rngs.params(), (vocab_size, config.width), jnp.float32) * 0.02
        self.embed = nnx.Param(table.astype(config.param_dtype))
        self.layers = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.final_norm = _scale(config.width, config)
        if not config.tied_embeddings:
            self.unembed = _normal(rngs.params(), (config.width, vocab_size), config.width, config.param_dtype)

    def __call__(self, tokens: Array, positions: Array, sees: Array | Causal, cache: Cache | None, start: Array):
        config = self.config
        # Cast after the look-up and not before it: gradients of one token's row are then summed in the table's dtype.
        x = sharding.keep_rows(self.embed[...][tokens]).astype(config.compute_dtype)
        if config.scaled_embeddings:
            x = x * jnp.asarray(config.width**0.5, x.dtype)
        frequency = rope.frequencies(config.head_dim, config.rope_base, config.rope_scaling)
        full = View(positions, sees, frequency)
        if config.sliding_layers:
            if isinstance(sees, Causal):
                full, near = full._replace(sees=sees._replace(near=jnp.bool(False))), sees._replace(near=jnp.bool(True))
            else:
                near = _keep_last(sees, config.sliding_window)
            if config.sliding_rope_base is not None:
                frequency = rope.frequencies(config.head_dim, config.sliding_rope_base)
            sliding = View(positions, near, frequency)

        def layer_step(carry, layer_and_flags):
            (x, cache), (layer, index, is_sliding) = carry, layer_and_flags
            view = full
            if config.sliding_layers:
                view = jax.tree.map(functools.partial(jnp.where, is_sliding), sliding, full)
            x, cache = layer(x, view, cache, index, start)
            return (sharding.keep_rows(x), cache), None

        indices = np.arange(config.num_layers)
        flags = jnp.asarray(indices), jnp.asarray(np.isin(indices, config.sliding_layers))
        if config.remat:
            layer_step = _again(layer_step)
        (x, cache), _ = jax.lax.scan(layer_step, (x, cache), (self.layers, *flags))
        return rms_norm(x, self.final_norm[...], config), cache


@functools.cache
def _graphdef(config: ModelConfig, vocab_size: int) -> nnx.GraphDef:
    """The module without its arrays. graph=False: flax treats it as a plain tree, which is cheap in every call."""
    module = jax.eval_shape(lambda: Transformer(config, vocab_size, nnx.Rngs(0)))
    return nnx.split(module, graph=False)[0]


def init_params(config: ModelConfig, vocab_size: int, seed: int) -> Params:
    """Random parameters, a nested dict of arrays in `param_dtype` (adapters: float32), reproducible from the seed."""
    _, state = nnx.split(Transformer(config, vocab_size, nnx.Rngs(seed)), graph=False)
    return nnx.to_pure_dict(state)


def abstract_params(config: ModelConfig, vocab_size: int) -> Params:
    """Shape and dtype of every parameter: `init_params` with jax.ShapeDtypeStruct leaves; nothing is allocated."""
    return jax.eval_shape(functools.partial(init_params, config, vocab_size, 0))


def init_cache(config: ModelConfig, num_rows: int, length: int) -> Cache:
    """A cache of zeros for `num_rows` rows of `length` tokens each."""
    shape = (config.num_layers, num_rows, length, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    sees: Array | Causal,
    cache: Cache | None = None,
    start: Array | None = None,
) -> tuple[Array, Cache | None]:
    """The last hidden states of `tokens`.

    Args:
      params: as `init_params` gives them.
      config: the model's shape.
      tokens: [B, T] int32.
      positions: [B, T] int32, each token's place in its own row, padding not counted.
      sees: [B, T, C] bool, which of the C keys each token looks at; C = T without a cache, else the cache's length. Or
        Causal, where these are the first tokens of their rows: no such array is made, and attention may be fused.
      cache: keys and values of earlier calls; this call's are added. A token beyond the cache's end is not written.
      start: [B] int32, the cache place of each row's first token of this call; None: 0.

    Returns:
      [B, T, D] in compute dtype, after the last norm (`logits` takes it), and the cache with this call's tokens.
    """
    vocab_size = params["embed"].shape[0]
    model = nnx.merge(_graphdef(config, vocab_size), params)
    start = jnp.zeros(tokens.shape[0], jnp.int32) if start is None else start
    return model(tokens, positions, sees, cache, start)


def logits(params: Params, config: ModelConfig, hidden: Array) -> Array:
    """Output projection: hidden [..., D] -> [..., V] float32."""
    name, product = ("embed", "...d,vd->...v") if config.tied_embeddings else ("unembed", "...d,dv->...v")
    return project(product, hidden, params[name])


def chunked_logits(params: Params, config: ModelConfig) -> Callable[[Array], Array]:
    """`logits` as a function of hidden [B, ..., D] alone, to be called for one chunk of a row's tokens after another.

    The projection is gathered here, once, and not in each call. Each of the pieces that rows are split in has a copy of
    it and sums the gradient of its own calls, in float32; the pieces' sums are added once.
    """
    name, product = ("embed", "s...d,svd->s...v") if config.tied_embeddings else ("unembed", "s...d,sdv->s...v")
    copies = sharding.copy_to_pieces(params[name].astype(config.compute_dtype), name).astype(jnp.float32)

    def logits_of(hidden: Array) -> Array:
        pieces = sharding.keep_rows(hidden.reshape(len(copies), -1, *hidden.shape[1:]))
        return project(product, pieces, copies).reshape(*hidden.shape[:-1], -1)

    return logits_of


def cast(params: Params, dtype: Any) -> Params:
    """The parameters in `dtype`, except for the scales of norms: these stay, since norms compute in float32."""

    def one(path, leaf: Array) -> Array:
        return leaf if path[-1].key.endswith("norm") else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def _keep_last(mask: Array, window: int) -> Array:
    """[B, T, C] the mask of a sliding window: of the keys that `mask` allows a token, only the last `window` are left.

    Keys must lie along C in the order of their positions.
    """
    allowed_from_here = jax.lax.cumsum(mask.astype(jnp.int32), axis=2, reverse=True)  # the key itself included
    return mask & (allowed_from_here <= window)
