"""The mesh of devices, and one table: which axis of each parameter is split over which axis of the mesh.

The mesh has three axes. `data` splits rows, `fsdp` splits rows and parameters, `tensor` splits heads, the MLP's hidden
units and the vocabulary. One device is a 1 x 1 x 1 mesh and runs the same code. Letters in shapes: as in model.py.

What a jitted function computes `on` a mesh stays split as its rows are (`keep_rows`): left to itself the compiler
follows the parameters, gives every device all rows and adds activations over devices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cero_jax.hosts import several
from cero_jax.settings import check

ROWS = P(("data", "fsdp"))

RULES: dict[str, P] = {  # path of the parameter -> for each of its axes, the axis of the mesh that splits it
    "embed": P("tensor", "fsdp"),  # [V, D]
    "unembed": P("fsdp", "tensor"),  # [D, V]
    "final_norm": P(),  # [D]
    "layers/attn_norm": P(),  # [L, D]
    "layers/attn/q": P(None, "fsdp", "tensor", None),  # [L, D, H, Dh]
    "layers/attn/k": P(None, "fsdp", "tensor", None),  # [L, D, Hkv, Dh]
    "layers/attn/v": P(None, "fsdp", "tensor", None),  # [L, D, Hkv, Dh]
    "layers/attn/o": P(None, "tensor", None, "fsdp"),  # [L, H, Dh, D]
    "layers/attn/q_bias": P(None, "tensor", None),  # [L, H, Dh]
    "layers/attn/k_bias": P(None, "tensor", None),  # [L, Hkv, Dh]
    "layers/attn/v_bias": P(None, "tensor", None),  # [L, Hkv, Dh]
    "layers/attn/q_norm": P(),  # [L, Dh]
    "layers/attn/k_norm": P(),  # [L, Dh]
    "layers/attn_post_norm": P(),  # [L, D]
    "layers/mlp_norm": P(),  # [L, D]
    "layers/mlp_post_norm": P(),  # [L, D]
    "layers/mlp/gate": P(None, "fsdp", "tensor"),  # [L, D, F]
    "layers/mlp/up": P(None, "fsdp", "tensor"),  # [L, D, F]
    "layers/mlp/down": P(None, "tensor", "fsdp"),  # [L, F, D]
}
for _layer in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"):
    RULES[f"layers/{_layer}_lora/lora_a"] = P(None, "fsdp", None)  # [L, D, rank]
    RULES[f"layers/{_layer}_lora/lora_b"] = P(None, None, "tensor")  # [L, rank, heads * Dh or F]
for _layer in ("attn/o", "mlp/down"):
    RULES[f"layers/{_layer}_lora/lora_a"] = P(None, "tensor", None)  # [L, H * Dh or F, rank]
    RULES[f"layers/{_layer}_lora/lora_b"] = P(None, None, "fsdp")  # [L, rank, D]


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh."""

    data: int = -1
    """Rows are split over this many devices; -1: all devices / (fsdp * tensor)."""
    fsdp: int = 1
    """Rows and parameters are split over this many devices."""
    tensor: int = 1
    """Attention heads and the MLP's hidden units are split over this many devices."""

    def __post_init__(self):
        check(self)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over `devices` (None: all). Raises ValueError where its sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = len(devices) // max(inner, 1) if config.data == -1 else config.data
    if min(data, config.fsdp, config.tensor) < 1 or data * inner != len(devices):
        raise ValueError(
            f"mesh.data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not cover the {len(devices)} "
            "device(s) here: choose fsdp and tensor so that their product divides that number, and leave data=-1"
        )
    # Auto: with Explicit axes (jax.make_mesh's default), indexing into sharded rows raises.
    return jax.make_mesh(
        (data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices
    )


def _path(key_path: tuple) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in key_path)


def _fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    return all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=False))


def shard_params(params: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each parameter, by RULES; `params` holds arrays or their shapes (model.abstract_params).

    Raises ValueError for a parameter without a rule, or with an axis that cannot be split evenly.
    """

    def sharding(key_path, leaf) -> NamedSharding:
        path = _path(key_path)
        if path not in RULES:
            raise ValueError(f"parameter {path} {tuple(leaf.shape)} has no rule in sharding.RULES: add one")
        if not _fits(RULES[path], leaf.shape, mesh):
            raise ValueError(
                f"parameter {path} {tuple(leaf.shape)} does not divide evenly over the mesh {dict(mesh.shape)} as "
                f"{RULES[path]} says: choose a smaller mesh.fsdp or mesh.tensor"
            )
        return NamedSharding(mesh, RULES[path])

    return jax.tree_util.tree_map_with_path(sharding, params)


def shard_copy(params: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each parameter in the copy that completions are drawn with: by RULES, without `fsdp`.

    So a decode step gathers no parameter. Raises ValueError as shard_params does.
    """
    return jax.tree.map(lambda layout: NamedSharding(mesh, _without_fsdp(layout.spec)), shard_params(params, mesh))


@partial(jax.jit, static_argnums=(1, 2))
def moved(x: Array, like: jax.ShapeDtypeStruct, layout: NamedSharding) -> Array:
    """The array in the dtype of `like`, in another layout.

    One parameter at a time: a program that gathers all of them holds them twice, as gathered and as results.
    """
    return jax.lax.with_sharding_constraint(x.astype(like.dtype), layout)


def _without_fsdp(spec: P) -> P:
    return P(*(None if axis == "fsdp" else axis for axis in spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is rows: split over `data` and `fsdp`."""
    return NamedSharding(mesh, ROWS)


def row_shards(mesh: Mesh) -> int:
    """The number of pieces that rows are split into; rows_per_step must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place(tree: Any, where: NamedSharding) -> Any:
    """NumPy arrays, the same in every process, on the mesh: each process gives its own devices what they hold."""
    if not several():
        return jax.device_put(tree, where)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), where, lambda part: np.asarray(x)[part]), tree
    )


def fetch(tree: Any) -> Any:
    """Whole arrays as NumPy's, in every process. Waits for the devices; a collective, as those in hosts.py."""
    if not several():
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(x) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True), tree
    )


# --- in a jitted function ---


def on(mesh: Mesh, function: Callable) -> Callable:
    """The function, to be jitted, with this mesh in use: the functions below lay out its arrays over it."""

    @wraps(function)
    def inside(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return inside


def pieces_in_use(*axes: str) -> int:
    """The number of pieces that these axes of the mesh in use split an array in; 1 where none is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)


def lay(x: Array, *axes: Any) -> Array:
    """The array, its first axes split over these axes of the mesh in use, the others whole; unchanged if none is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes, *[None] * (x.ndim - len(axes))))


def keep_rows(x: Array) -> Array:
    """The array [rows, ...], split as rows are."""
    return lay(x, *ROWS)


def copy_to_pieces(x: Array, path: str) -> Array:
    """[pieces, *x.shape]: the parameter of that path once for each piece of the rows, split over `tensor` alone.

    The gradient of x is the sum of the pieces' gradients.
    """
    copies = jnp.broadcast_to(x, (pieces_in_use("data", "fsdp"), *x.shape))
    return lay(copies, *ROWS, *_without_fsdp(RULES[path]))
