"""Prompts to completions: a prompt is read once; its rollouts decode in slots; as one ends, the next takes its slot.

A window of decode steps is one dispatch. Between windows the host sees which rows have ended, takes them out, fills
their slots, longest expected first, and grows the cache where the next window would not fit.

Letters: U prompts (one a visit), R rows (rollouts), S slots, Tp prompt tokens at most, T completion tokens at most, C
places in the cache, V vocabulary, L layers, D width, Hkv key-value heads, Dh head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from cero_jax import model, prefill, sharding
from cero_jax.model import Cache, ModelConfig, Params
from cero_jax.next_token import draw
from cero_jax.prefill import Prefilled
from cero_jax.settings import check
from cero_jax.slots import Slots, cache_sizes, fill, number_of_slots

TAKEN = 32  # slots that are copied to the host together: of all, the tokens may be many MB a window
EVAL_STEP = 2**32 - 1  # stands for the step in the keys of an evaluation: training never reaches it


@dataclass(frozen=True)
class SamplerConfig:
    """How completions are drawn."""

    max_completion_tokens: int = 25
    """T, tokens; a completion that has not ended by then is cut and counts as truncated."""
    temperature: float = 1.0
    """0 is greedy (evaluation only)."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this; 1 is off."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is off."""
    slots: int | None = None
    """S, rollouts decoded at once; None: 64 on each device, or more where their keys and values take no more memory
    than the weights, or than 0.5 GB."""
    window: int = 64
    """Decode steps between two looks at which rollouts have ended."""
    allow_biased_ratio: bool = False
    """Say that training with top_p < 1 or top_k > 0 is meant: the importance ratio is then biased."""

    def __post_init__(self):
        sizes = dict.fromkeys(("max_completion_tokens", "window", "slots"), (1, 2**24))
        check(self, **sizes, temperature=(0, 1000), top_k=(0, 2**31 - 1), top_p=(1e-9, 1))
        if 0 < self.temperature < 0.001:
            raise ValueError(f"temperature={self.temperature} must be 0 or at least 0.001: float32 divides by it")

    def check_for_training(self) -> None:
        """Raise ValueError where a policy gradient on these draws would be wrong."""
        if self.temperature == 0:
            raise ValueError("temperature=0 draws the same completion for a whole group: train at temperature > 0")
        if (self.top_p < 1 or self.top_k > 0) and not self.allow_biased_ratio:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k} bias the importance ratio (log-probabilities are of the full "
                "vocabulary): use top_p=1 and top_k=0, or say allow_biased_ratio=True as well"
            )


class SamplingBatch(NamedTuple):
    """What to draw: R rows, each a rollout of one of U prompts, or padding. NumPy arrays."""

    prompt_tokens: np.ndarray  # [U, Tp] int32, padded on the right; Tp changes nothing but this array
    prompt_lengths: np.ndarray  # [U] int32 tokens
    prompt_of_row: np.ndarray  # [R] int32 in 0..U-1
    row_mask: np.ndarray  # [R] bool, False for padding: nothing is drawn there
    prompt_ids: np.ndarray  # [R] int32, for the row's key
    rollout_index: np.ndarray  # [R] int32, for the row's key: tells the rollouts of a prompt apart
    expected_tokens: np.ndarray | None = None  # [R] float32: rows begin longest first; None: in order
    max_tokens: np.ndarray | None = None  # [R] int32 in 1..T, where rows have limits of their own; None: T


class Rollouts(NamedTuple):
    """What was drawn, a row a rollout."""

    tokens: np.ndarray  # [R, T] int32, pad_id behind the end
    log_probs: np.ndarray  # [R, T] float32, of the full vocabulary at the sampling temperature; 0 behind the end
    lengths: np.ndarray  # [R] int32 tokens, the ending EOS counted; 0 for a padding row
    truncated: np.ndarray  # [R] bool, cut at T, or at its own limit, without an EOS


def row_keys(seed: Array, step: Array, prompt_ids: Array, rollout_index: Array) -> Array:
    """[R] keys, a function of (seed, step, prompt id, rollout index), not of the slot; `decode` adds the position.

    seed: [] uint32. step, prompt_ids, rollout_index: [R].
    """
    root, fold = jax.random.key(seed), jax.random.fold_in
    return jax.vmap(lambda *parts: fold(fold(fold(root, parts[0]), parts[1]), parts[2]))(
        step, prompt_ids, rollout_index
    )


def decode(
    params: Params,
    slots: Slots,
    *,
    model_config: ModelConfig,
    config: SamplerConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    stop_early: bool,
) -> Slots:
    """A window of steps: draw a token for every slot that is not done, read it, go on.

    stop_early: leave the window once all slots are done; on several devices that would cost an all-reduce a step.
    """
    eos = jnp.asarray(eos_ids, jnp.int32)
    space, width = slots.cache.k.shape[2], slots.tokens.shape[1]

    def step(carry):
        t, slots = carry
        logits = model.logits(params, model_config, slots.hidden)
        keys = jax.vmap(jax.random.fold_in)(slots.key, slots.drawn)
        token, log_prob = draw(logits, keys, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        active, place = ~slots.done, jnp.arange(width, dtype=jnp.int32)[None] == slots.drawn[:, None]
        token = jnp.where(active, token, pad_id)
        here = place & active[:, None]
        ended = slots.ended | (active & (token[:, None] == eos[None, :]).any(axis=-1))
        drawn = slots.drawn + active.astype(jnp.int32)
        sees = jnp.arange(space, dtype=jnp.int32)[None, None] <= slots.length[:, None, None]  # [S, 1, C]
        # a slot that is done reads on into the place behind its end, where nothing looks
        hidden, cache = model.forward(
            params, model_config, token[:, None], slots.length[:, None], sees, slots.cache, slots.length
        )
        return t + 1, slots._replace(
            hidden=hidden[:, 0],
            length=slots.length + active.astype(jnp.int32),
            drawn=drawn,
            done=ended | slots.done | (drawn >= slots.limit),
            ended=ended,
            tokens=jnp.where(here, token[:, None], slots.tokens),
            log_probs=jnp.where(here, log_prob[:, None], slots.log_probs),
            cache=cache,
        )

    def goes_on(carry):
        t, slots = carry
        return (t < config.window) & ~slots.done.all() if stop_early else t < config.window

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), slots))[1]


OnEnd = Callable[[np.ndarray, Rollouts], None]  # (rows [n] that have just ended, all rollouts so far)


class Sampler(Protocol):
    """Draws a batch of rollouts from one policy."""

    def __call__(
        self, params: Params, seed: ArrayLike, step: ArrayLike, batch: SamplingBatch, on_end: OnEnd | None = None
    ) -> Rollouts:
        """The rollouts, R of them. A draw depends on (seed, step, prompt id, rollout index, position) alone.

        Args:
          params: of the policy.
          seed: [] uint32.
          step: [] uint32, of the run, or [R], one a row.
          batch: what to draw.
          on_end: called between windows, so that a verifier need not wait for the last row; it must not block.

        Raises:
          ValueError where slots do not divide over the mesh, or a row's limit lies outside 1..T.
        """
        ...


class _Entries(NamedTuple):
    """What rows bring to the slots that they begin in."""

    new: np.ndarray  # [R] bool: a row begins here
    prompt: np.ndarray  # [R] int32, its place in its chunk
    prompt_ids: np.ndarray  # [R] int32
    rollout_index: np.ndarray  # [R] int32
    step: np.ndarray  # [R] uint32
    max_tokens: np.ndarray  # [R] int32


def _entries(batch: SamplingBatch, place_of_prompt: np.ndarray, step: ArrayLike, limit: int) -> _Entries:
    """The entries of all rows; place_of_prompt: [U] int32. Raises ValueError where a limit lies outside 1..limit."""
    num_rows = len(batch.row_mask)
    max_tokens = np.full(num_rows, limit, np.int32) if batch.max_tokens is None else batch.max_tokens.astype(np.int32)
    if max_tokens.min() < 1 or max_tokens.max() > limit:
        raise ValueError(
            f"max_tokens={max_tokens.min()}..{max_tokens.max()} must lie in 1..max_completion_tokens={limit}"
        )
    return _Entries(
        new=np.ones(num_rows, bool),
        prompt=place_of_prompt[batch.prompt_of_row],
        prompt_ids=batch.prompt_ids,
        rollout_index=batch.rollout_index,
        step=np.broadcast_to(np.asarray(step), num_rows),
        max_tokens=max_tokens,
    )


def _in_slots(entries: _Entries, rows: Any, slots: Any, num_slots: int) -> _Entries:
    """The entries of these `rows` [n] in these `slots` [n], and nothing in the others."""
    placed = _Entries(*(np.zeros(num_slots, column.dtype) for column in entries))
    for column, of_rows in zip(placed, entries, strict=True):
        column[slots] = of_rows[rows]
    return placed


def _longest_first(batch: SamplingBatch) -> np.ndarray:
    """The rows to draw, in the order in which they begin."""
    rows = np.flatnonzero(batch.row_mask)
    if batch.expected_tokens is None:
        return rows
    return rows[np.argsort(-batch.expected_tokens[rows], kind="stable")]


def _some(slots: Slots, chosen: Array) -> tuple[Array, Array, Array, Array]:
    """What was drawn in these slots: tokens and log-probabilities [n, T], lengths and whether an EOS ended it [n]."""
    return slots.tokens[chosen], slots.log_probs[chosen], slots.drawn[chosen], slots.ended[chosen]


def _take_out(some: Callable, slots: Slots, ended: np.ndarray, rows: np.ndarray, out: Rollouts) -> None:
    """Copy what was drawn in the slots `ended` [n] to the `rows` [n] of `out`. Waits for the device.

    some: `_some`, jitted. It is asked for TAKEN slots at a time, so that one program does for any number of them.
    """
    for start in range(0, len(ended), TAKEN):
        here = rows[start : start + TAKEN]
        chosen = np.pad(ended[start : start + TAKEN], (0, TAKEN - len(here)), mode="edge").astype(np.int32)
        tokens, log_probs, lengths, by_eos = (x[: len(here)] for x in sharding.fetch(some(slots, chosen)))
        out.tokens[here], out.log_probs[here], out.lengths[here] = tokens, log_probs, lengths
        out.truncated[here] = ~by_eos


def _decode_options(mesh: Mesh) -> dict[str, Any] | None:
    """What the compiler is told of decoding; None: its own defaults.

    On a GPU it would copy weights or slices of the cache at every layer of every token: without, 1.2 to 1.7 times as
    many tokens a second (docs/performance.md).
    """
    if mesh.devices.flat[0].platform != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def make_sampler(
    model_config: ModelConfig,
    config: SamplerConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    mesh: Mesh,
    prompt_widths: tuple[int, ...] | None = None,
) -> Sampler:
    """The sampler of a model under these settings; its functions are compiled at the first call for its shapes.

    Args:
      model_config: the model's shape.
      config: how completions are drawn.
      eos_ids: what ends a completion.
      pad_id: what stands behind its end.
      mesh: of the devices.
      prompt_widths: the lengths that prompts are padded to, rising, as `data.prompt_widths` chooses them; None: Tp.
    """
    model.kernel(model_config, mesh)  # raises before any work where there is none
    by_row = sharding.rows(mesh)
    heads = "tensor" if model_config.num_kv_heads % mesh.shape["tensor"] == 0 else None
    in_cache = NamedSharding(mesh, P(None, *sharding.ROWS, None, heads))
    layout: Any = Slots(*[by_row] * (len(Slots._fields) - 1), cache=Cache(in_cache, in_cache))  # type: ignore[arg-type]
    everywhere, whole = sharding.replicated(mesh), NamedSharding(mesh, P(None, None, None, heads))
    on_slots = partial(jax.jit, donate_argnames="slots", out_shardings=layout)

    @partial(jax.jit, static_argnames=("num_slots", "space"), out_shardings=layout)
    def empty(num_slots: int, space: int) -> Slots:
        zeros, shape = jnp.zeros(num_slots, jnp.int32), (num_slots, config.max_completion_tokens)
        return Slots(
            key=jax.random.split(jax.random.key(0), num_slots),
            hidden=jnp.zeros((num_slots, model_config.width), model_config.compute_dtype),
            length=zeros,
            drawn=zeros,
            limit=zeros,
            done=jnp.ones(num_slots, bool),
            ended=jnp.zeros(num_slots, bool),
            tokens=jnp.full(shape, pad_id, jnp.int32),
            log_probs=jnp.zeros(shape, jnp.float32),
            cache=model.init_cache(model_config, num_slots, space),
        )

    @partial(jax.jit, static_argnames="space", out_shardings=layout)  # the smaller caches cannot be reused
    def grow(slots: Slots, space: int) -> Slots:
        more = space - slots.cache.k.shape[2]
        pad = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
        return slots._replace(cache=Cache(*(jnp.pad(c, pad) for c in slots.cache)))

    @on_slots
    def begin(slots: Slots, prompts: Prefilled, seed: Array, entries: Any) -> Slots:
        # A slot may take any prompt: gathered whole, which is less than what a sum over devices would make of it.
        layout: Any = Prefilled(everywhere, everywhere, Cache(whole, whole))  # type: ignore[arg-type]
        prompts = jax.lax.with_sharding_constraint(prompts, layout)
        keys = row_keys(seed, entries.step, entries.prompt_ids, entries.rollout_index)
        return fill(slots, prompts, entries.new, entries.prompt, keys, entries.max_tokens, pad_id)

    @partial(on_slots, compiler_options=_decode_options(mesh))
    def run_window(slots: Slots, params: Params) -> Slots:
        settings = {"model_config": model_config, "config": config, "eos_ids": eos_ids, "pad_id": pad_id}
        return sharding.on(mesh, decode)(params, slots, stop_early=mesh.size == 1, **settings)

    def copy(params: Params) -> Params:
        weights = jax.eval_shape(partial(model.cast, dtype=model_config.compute_dtype), params)
        return jax.tree.map(sharding.moved, params, weights, sharding.shard_copy(weights, mesh))

    some = jax.jit(_some, out_shardings=everywhere)
    as_read: Any = Prefilled(by_row, by_row, layout.cache)  # type: ignore[arg-type]
    read = jax.jit(sharding.on(mesh, partial(prefill.read, config=model_config)), out_shardings=as_read)
    compiled = set()

    def compile_all(params: Params, seed: ArrayLike, nothing: _Entries, rows: dict[int, int], sizes: tuple[int, ...]):
        """Every program that may be needed, so that none compiles later. rows: of a chunk, for each width."""
        num_slots = len(nothing.new)
        for width, number in rows.items():
            prompts = read(params, tokens=np.zeros((number, width), np.int32), lengths=np.ones(number, np.int32))
            for size in (size for size in sizes if size >= width):
                begin(empty(num_slots, size), prompts, seed, nothing)
        slots = run_window(empty(num_slots, sizes[0]), params)
        for size in sizes[1:]:
            slots = run_window(grow(slots, size), params)
        some(slots, np.zeros(TAKEN, np.int32))

    def with_room(slots: Slots | None, num_slots: int, sizes: tuple[int, ...], reach: int) -> Slots:
        """The slots over a cache of at least `reach` places, grown a size at a time; None: fresh ones."""
        if slots is None:
            return empty(num_slots, next(size for size in sizes if size >= reach))
        grown: Slots = slots
        for size in sizes:
            if grown.cache.k.shape[2] < min(size, reach):
                grown = grow(grown, size)
        return grown

    def sample(
        params: Params, seed: ArrayLike, step: ArrayLike, batch: SamplingBatch, on_end: OnEnd | None = None
    ) -> Rollouts:
        num_rows, num_prompts, limit = len(batch.row_mask), len(batch.prompt_lengths), config.max_completion_tokens
        widths = prompt_widths or (batch.prompt_tokens.shape[1],)
        sizes, shards = cache_sizes(widths, limit, config.window), sharding.row_shards(mesh)
        num_params = sum(p.size for p in jax.tree.leaves(params))
        held = {"config": model_config, "num_params": num_params, "places": sizes[-1], "row_shards": shards}
        num_slots = number_of_slots(config.slots, num_rows, **held)
        chunk_rows = prefill.chunk_rows(model_config, widths, num_prompts, mesh)
        reading = prefill.plan(batch.prompt_lengths, batch.prompt_of_row[batch.row_mask], chunk_rows)
        chunk_of_row = reading.chunk[batch.prompt_of_row]
        entries, waiting = _entries(batch, reading.place, step, limit), _longest_first(batch)
        if model_config.param_dtype != model_config.compute_dtype or mesh.shape["fsdp"] > 1:
            params = copy(params)  # once a call, which is once a policy update
        if (shapes := (num_slots, *chunk_rows.items())) not in compiled:
            compile_all(params, seed, _in_slots(entries, [], [], num_slots), chunk_rows, sizes)
            compiled.add(shapes)

        out = Rollouts(
            tokens=np.full((num_rows, limit), pad_id, np.int32),
            log_probs=np.zeros((num_rows, limit), np.float32),
            lengths=np.zeros(num_rows, np.int32),
            truncated=np.zeros(num_rows, bool),
        )
        slots, held = None, {}  # held: chunks of prompts that rows still wait for
        row_of_slot = np.full(num_slots, -1)  # -1: idle
        length = np.zeros(num_slots, np.int32)
        while waiting.size or (row_of_slot >= 0).any():
            idle = np.flatnonzero(row_of_slot < 0)[: waiting.size]
            taken, waiting = waiting[: idle.size], waiting[idle.size :]
            row_of_slot[idle], length[idle] = taken, batch.prompt_lengths[batch.prompt_of_row[taken]]
            begun = np.unique(chunk_of_row[taken])
            reach = min(int(length[row_of_slot >= 0].max()) + config.window, sizes[-1])
            slots = with_room(slots, num_slots, sizes, max([reach, *(reading.chunks[i].width for i in begun)]))
            for i in begun:
                if i not in held:
                    tokens, lengths = prefill.inputs(reading.chunks[i], batch.prompt_tokens, batch.prompt_lengths)
                    held[i] = read(params, tokens=tokens, lengths=lengths)
                here = chunk_of_row[taken] == i
                slots = begin(slots, held[i], seed, _in_slots(entries, taken[here], idle[here], num_slots))
                if i not in chunk_of_row[waiting]:
                    del held[i]
            slots = run_window(slots, params)
            # The host waits, once a window: it decides which rollouts come next.
            done, length = map(np.array, sharding.fetch((slots.done, slots.length)))
            ready = np.flatnonzero(done & (row_of_slot >= 0))
            if ready.size:
                rows = row_of_slot[ready]
                _take_out(some, slots, ready, rows, out)
                if on_end is not None:
                    on_end(rows, out)
                row_of_slot[ready] = -1
        return out

    return sample
