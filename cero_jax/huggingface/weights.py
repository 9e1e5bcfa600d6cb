"""The weights of Hugging Face model folders, as safetensors files, read and written one tensor at a time.

The package `safetensors` is imported on first use.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cero_jax import lora, model, sharding
from cero_jax.checksums import checksums, text_checksum
from cero_jax.huggingface.families import read_config, read_json
from cero_jax.model import Dtype, ModelConfig, Params

# How the axes of a tensor in the file come from ours, a layer's own axes counted from 0. Our q, [D, H, Dh], lies in the
# file as [H * Dh, D], since a linear layer's weight is [out, in] there: ((1, 2), (0,)) says that the file's first axis
# is our axes 1 and 2 merged, and its second our axis 0.
VECTOR = ((0,),)
TABLE = ((0,), (1,))
LINEAR = ((1,), (0,))
HEADS_OUT = ((1, 2), (0,))  # q, k, v
HEADS_IN = ((2,), (0, 1))  # o
HEADS = ((0, 1),)  # biases of q, k, v

NAMES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {  # path of the parameter -> (name in the file, axes)
    "embed": ("model.embed_tokens.weight", TABLE),
    "unembed": ("lm_head.weight", LINEAR),
    "final_norm": ("model.norm.weight", VECTOR),
    "layers/attn_norm": ("input_layernorm.weight", VECTOR),
    "layers/attn/q": ("self_attn.q_proj.weight", HEADS_OUT),
    "layers/attn/k": ("self_attn.k_proj.weight", HEADS_OUT),
    "layers/attn/v": ("self_attn.v_proj.weight", HEADS_OUT),
    "layers/attn/o": ("self_attn.o_proj.weight", HEADS_IN),
    "layers/attn/q_bias": ("self_attn.q_proj.bias", HEADS),
    "layers/attn/k_bias": ("self_attn.k_proj.bias", HEADS),
    "layers/attn/v_bias": ("self_attn.v_proj.bias", HEADS),
    "layers/attn/q_norm": ("self_attn.q_norm.weight", VECTOR),
    "layers/attn/k_norm": ("self_attn.k_norm.weight", VECTOR),
    "layers/attn_post_norm": ("post_attention_layernorm.weight", VECTOR),
    "layers/mlp_norm": ("post_attention_layernorm.weight", VECTOR),  # pre_feedforward_layernorm if post_norms
    "layers/mlp/gate": ("mlp.gate_proj.weight", LINEAR),
    "layers/mlp/up": ("mlp.up_proj.weight", LINEAR),
    "layers/mlp/down": ("mlp.down_proj.weight", LINEAR),
    "layers/mlp_post_norm": ("post_feedforward_layernorm.weight", VECTOR),
}

READABLE = ("F32", "BF16", "F16")
BLOCK_BYTES = 64 * 2**20  # of a tensor that are read at once
COPIED = ("generation_config.json", "token*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
          "chat_template*", "LICENSE*", "NOTICE*")  # fmt: skip


class Stored(NamedTuple):
    """How a parameter is stored in the folder's files."""

    names: tuple[str, ...]  # of its tensors: one for each layer, or a single one
    shape: tuple[int, ...]  # of each of these tensors
    axes: tuple[tuple[int, ...], ...]  # for each axis of such a tensor, which of our axes are merged in it
    stacked: bool  # whether our first axis is the layer


def _stored(key_path: tuple, leaf: Any, config: ModelConfig) -> Stored:
    path = "/".join(key.key for key in key_path)
    name, axes = NAMES[path]
    if path == "layers/mlp_norm" and config.post_norms:
        name = "pre_feedforward_layernorm.weight"
    stacked = path.startswith("layers/")
    shape = leaf.shape[1:] if stacked else leaf.shape
    names = tuple(f"model.layers.{i}.{name}" for i in range(config.num_layers)) if stacked else (name,)
    return Stored(names, tuple(math.prod(shape[axis] for axis in merged) for merged in axes), axes, stacked)


def _as_stored(array: np.ndarray, stored: Stored) -> np.ndarray:
    """One layer's array, given in our axes, as a view in the axes of the file."""
    order = [axis for merged in stored.axes for axis in merged]
    shape = [math.prod(array.shape[axis] for axis in merged) for merged in stored.axes]
    return array.transpose(order).reshape(shape)


def load(
    folder: str | Path, mesh: Mesh, *, param_dtype: Dtype = "float32", compute_dtype: Dtype = "float32"
) -> tuple[ModelConfig, Params]:
    """The model's shape and its parameters, sharded over the mesh by `sharding.RULES`.

    A process reads only what its own devices hold, one device's shard of one parameter at a time. Raises
    FileNotFoundError for a missing file, and one ValueError that lists all that is wrong with the folder.
    """
    config, vocab_size = read_config(folder, param_dtype=param_dtype, compute_dtype=compute_dtype)
    shapes = model.abstract_params(config, vocab_size)
    shardings = sharding.shard_params(shapes, mesh)
    layout = jax.tree_util.tree_map_with_path(partial(_stored, config=config), shapes)
    with ExitStack() as files:
        tensors = _open_checked(Path(folder), files, layout, config)
        params = jax.tree.map(partial(_load_one, tensors), layout, shapes, shardings, is_leaf=_is_stored)
    _check_numbers(Path(folder), layout, params)
    return config, params


def check(folder: str | Path) -> None:
    """Raise as `load` does for files or tensors that are missing, unknown, or of another shape; reads no values."""
    config, vocab_size = read_config(folder)
    layout = jax.tree_util.tree_map_with_path(
        partial(_stored, config=config), model.abstract_params(config, vocab_size)
    )
    with ExitStack() as files:
        _open_checked(Path(folder), files, layout, config)


def _open_checked(folder: Path, files: ExitStack, layout: Any, config: ModelConfig) -> dict[str, Any]:
    """The folder's tensors by name, once they are those that the layout asks for."""
    tensors = _open(folder, files)
    _check(folder, tensors, jax.tree.leaves(layout, is_leaf=_is_stored), config)
    return tensors


def _is_stored(node: Any) -> bool:
    return isinstance(node, Stored)


def _open(folder: Path, files: ExitStack) -> dict[str, Any]:
    """Each tensor of the folder by name, as a safetensors slice: nothing is read until it is indexed."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = _listed_files(index) if index.exists() else ["model.safetensors"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder}: no {', '.join(absent)}: download all of the model's safetensors files")
    tensors = {}
    for name in names:
        try:
            file = files.enter_context(safe_open(folder / name, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(
                f"{folder / name}: not a complete safetensors file ({error}): download it again"
            ) from error
        tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def _listed_files(index: Path) -> list[str]:
    """The files that an index names. Raises ValueError at one outside its folder: anyone may have written it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map, an object of tensors and their files, in it: download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{index}: {name!r:.200} is no safetensors file in this folder: download it again")
    return sorted(set(weight_map.values()))


def _check(folder: Path, tensors: dict[str, Any], layout: list[Stored], config: ModelConfig) -> None:
    """Raise one ValueError for all tensors that are missing, unknown, or of another shape or dtype than expected."""
    expected = {name: stored.shape for stored in layout for name in stored.names}
    ignored = {"lm_head.weight"} if config.tied_embeddings else set()  # some files hold the tied table twice
    found = {name for name in tensors if name not in ignored and not name.endswith("rotary_emb.inv_freq")}
    shapes = {name: tuple(tensors[name].get_shape()) for name in found & expected.keys()}
    dtypes = {name: tensors[name].get_dtype() for name in found & expected.keys()}
    problems = {
        "missing": sorted(expected.keys() - found),
        "unknown": sorted(found - expected.keys()),
        "of another shape": [f"{n} {s}, not {expected[n]}" for n, s in sorted(shapes.items()) if s != expected[n]],
        "of another dtype": [f"{n} {d}, not {'/'.join(READABLE)}" for n, d in dtypes.items() if d not in READABLE],
    }
    listed = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for kind, names in problems.items() if names
    ]  # fmt: skip
    if listed:
        raise ValueError(
            f"{folder}: the tensors are not those that config.json describes; {'; '.join(listed)}: is the download "
            "complete, and is config.json this model's own?"
        )


def _check_numbers(folder: Path, layout: Any, params: Params) -> None:
    """Raise ValueError, naming the tensors, where one holds a NaN or an infinity."""
    finite = jax.device_get(_finite(params))
    found = zip(jax.tree.leaves(layout, is_leaf=_is_stored), jax.tree.leaves(finite), strict=True)
    bad = [name for stored, fine in found for name, ok in zip(stored.names, np.atleast_1d(fine), strict=True) if not ok]
    if bad:
        raise ValueError(
            f"{folder}: NaN or infinity in {len(bad)} of its tensors: {', '.join(bad[:8])}"
            f"{', ...' if len(bad) > 8 else ''}: the weights are broken: download them again, or take others"
        )


@jax.jit
def _finite(params: Params) -> Params:
    """Whether each parameter is finite: [L] bool of those that have layers, [] of the others."""

    def one(path: tuple, leaf: Array) -> Array:
        return jnp.isfinite(leaf).all(axis=tuple(range(path[0].key == "layers", leaf.ndim)))

    return jax.tree_util.tree_map_with_path(one, params)


def _load_one(tensors: dict[str, Any], stored: Stored, leaf: Any, where: NamedSharding) -> Array:
    """One parameter over the mesh. A shard that several devices of this process hold is read once."""
    placed: dict[Any, Array] = {}
    by_index: dict[tuple, list] = {}
    for device, index in where.addressable_devices_indices_map(leaf.shape).items():
        full = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), leaf.shape, strict=True))
        by_index.setdefault(tuple((s.start, s.stop) for s in full), []).append(device)
    for bounds, devices in by_index.items():
        shard = _read(tensors, stored, bounds, leaf.shape, leaf.dtype)
        # Wait, so that the host holds one shard at a time.
        placed |= {device: jax.device_put(shard, device).block_until_ready() for device in devices}
    return jax.make_array_from_single_device_arrays(leaf.shape, where, list(placed.values()))


def _read(tensors: dict[str, Any], stored: Stored, bounds: tuple, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The part of a parameter within `bounds`, (start, stop) for each of our axes; read in blocks of BLOCK_BYTES.

    shape: of the whole parameter, in our axes.
    """
    out = np.empty([stop - start for start, stop in bounds], dtype)
    layers = range(*bounds[0]) if stored.stacked else (0,)
    inner, sizes = (bounds[1:], shape[1:]) if stored.stacked else (bounds, shape)
    rows, *columns = (_merge([(inner[axis], sizes[axis]) for axis in merged]) for merged in stored.axes)
    for place, layer in enumerate(layers):
        into = _as_stored(out[place] if stored.stacked else out, stored)
        tensor = tensors[stored.names[layer]]
        step = max(1, BLOCK_BYTES // (4 * into[0].size))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            into[start - rows.start : stop - rows.start] = tensor[(slice(start, stop), *columns)]
    return out


def _merge(bounds: list[tuple[tuple[int, int], int]]) -> slice:
    """The slice of several axes merged into one, from ((start, stop), size) of each: only the first may be cut."""
    ((start, stop), _), *rest = bounds
    assert all(inner == (0, size) for inner, size in rest)
    inner = math.prod(size for _, size in rest)
    return slice(start * inner, stop * inner)


def save(
    folder: str | Path, source: str | Path, config: ModelConfig, params: Params, *, max_shard_bytes: int = 2 * 10**9
) -> None:
    """Write a folder that transformers and vLLM can load, with parameters in the dtype that they have here.

    Args:
      folder: the folder to make; it appears only when it is complete.
      source: the folder that the model came from; config.json, tokenizer and licence files are copied from it.
      config: the model's shape, as `load` returned it.
      params: the parameters, as `load` returned them or as trained since; adapters are merged into their weights.
      max_shard_bytes: the most bytes in one safetensors file, which are held in host memory; a larger tensor gets a
        file of its own. Several files get an index.

    Raises ValueError where `folder` exists, OSError where it cannot be written: then nothing is left of it. In a run of
    several processes all must call it; the first one writes.
    """
    from safetensors import SafetensorError

    folder, writes = Path(folder), jax.process_index() == 0
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another folder, or move it away")
    scratch = folder.with_name(folder.name + ".partial")
    if writes:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        _write(scratch, Path(source), config, params, max_shard_bytes, writes)
        if writes:
            scratch.rename(folder)
    except SafetensorError as error:  # a full disk's
        raise OSError(str(error)) from error
    finally:
        if writes:
            shutil.rmtree(scratch, ignore_errors=True)


def _write(scratch: Path, source: Path, config: ModelConfig, params: Params, max_bytes: int, writes: bool) -> None:
    """Gather all tensors, a file's at a time, and write them, with what is copied, where this process `writes`."""
    from safetensors.numpy import save_file

    shards = _shards(config, params, max_bytes)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        one = "model.safetensors"
        file = one if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(_fetch(shard, config.lora_alpha))
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
        if writes:
            save_file(tensors, scratch / file, metadata={"format": "pt"})
    if not writes:
        return
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for path in {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}:
        shutil.copy(path, scratch)
    raw = read_json(source / "config.json")
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = config.param_dtype
    (scratch / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Piece(NamedTuple):
    """A tensor to write."""

    name: str  # in the file
    leaf: Array  # the parameter that holds it, of all layers
    adapter: dict[str, Array]  # lora_a and lora_b of that parameter; {} where it has none
    layer: int | None  # which layer of the parameter to write; None where it has no layers
    stored: Stored


def _shards(config: ModelConfig, params: Params, max_bytes: int) -> list[list[Piece]]:
    """The tensors to write, in order, one list for each file of at most `max_bytes`."""
    shards: list[list[Piece]] = [[]]
    room = max_bytes
    frozen, trained = lora.split(params)
    adapters: Any = flatten_dict(trained, is_leaf=lambda _, node: "lora_a" in node) if frozen else {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(frozen or params):
        stored = _stored(key_path, leaf, config)
        *above, last = (key.key for key in key_path)
        adapter = adapters.get((*above, f"{last}_lora"), {})
        size = math.prod(stored.shape) * leaf.dtype.itemsize
        for i, name in enumerate(stored.names):
            if size > room and shards[-1]:
                shards.append([])
                room = max_bytes
            shards[-1].append(Piece(name, leaf, adapter, i if stored.stacked else None, stored))
            room -= size
    return shards


@partial(jax.jit, static_argnames=("alpha", "where"))
def _gather(leaf: Array, adapter: dict[str, Array], layer: Array | None, alpha: float, where: NamedSharding) -> Array:
    """One layer of a parameter with its adapter merged in, sharded as `where`."""
    if layer is not None:
        take = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        leaf, adapter = jax.tree.map(take, (leaf, adapter))
    array = lora.merge(leaf, **adapter, alpha=alpha) if adapter else leaf
    return jax.lax.with_sharding_constraint(array, where)


def _fetch(shard: list[Piece], alpha: float) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of each piece, in the file's axes, on the host; one at a time."""
    for name, leaf, adapter, layer, stored in shard:
        assert isinstance(leaf.sharding, NamedSharding)
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        array = _gather(leaf, adapter, None if layer is None else jnp.int32(layer), alpha, everywhere)
        yield name, np.ascontiguousarray(_as_stored(np.asarray(array), stored))


def fingerprint(params: Params) -> str:
    """16 hex digits that change with the parameters' values but not with their sharding."""
    return text_checksum(checksums(flatten_dict(params, sep="/")))
