"""One mesh, one table: which axis of each parameter lies on which axis of the mesh.

Axes: `data` splits rows, `fsdp` splits rows and parameters, `tensor` splits heads and hidden units. One device is a
1 x 1 x 1 mesh and runs the same code.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = P(("data", "fsdp"))

RULES: dict[str, P] = {  # path of the parameter -> spec
    "embed": P("tensor", "fsdp"),  # [V, D]
    "unembed": P("fsdp", "tensor"),  # [D, V]
    "final_norm": P(),  # [D]
    "layers/attn_norm": P(),  # [L, D]
    "layers/attn/q": P(None, "fsdp", "tensor", None),  # [L, D, H, K]
    "layers/attn/k": P(None, "fsdp", "tensor", None),  # [L, D, G, K]
    "layers/attn/v": P(None, "fsdp", "tensor", None),  # [L, D, G, K]
    "layers/attn/o": P(None, "tensor", None, "fsdp"),  # [L, H, K, D]
    "layers/attn/q_bias": P(None, "tensor", None),  # [L, H, K]
    "layers/attn/k_bias": P(None, "tensor", None),  # [L, G, K]
    "layers/attn/v_bias": P(None, "tensor", None),  # [L, G, K]
    "layers/attn/q_norm": P(),  # [L, K]
    "layers/attn/k_norm": P(),  # [L, K]
    "layers/attn_post_norm": P(),  # [L, D]
    "layers/mlp_norm": P(),  # [L, D]
    "layers/mlp_post_norm": P(),  # [L, D]
    "layers/mlp/gate": P(None, "fsdp", "tensor"),  # [L, D, F]
    "layers/mlp/up": P(None, "fsdp", "tensor"),  # [L, D, F]
    "layers/mlp/down": P(None, "tensor", "fsdp"),  # [L, F, D]
}
for _layer in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"):
    RULES[f"layers/{_layer}_lora/lora_a"] = P(None, "fsdp", None)  # [L, D, rank]
    RULES[f"layers/{_layer}_lora/lora_b"] = P(None, None, "tensor")  # [L, rank, H K or F]
for _layer in ("attn/o", "mlp/down"):
    RULES[f"layers/{_layer}_lora/lora_a"] = P(None, "tensor", None)  # [L, H K or F, rank]
    RULES[f"layers/{_layer}_lora/lora_b"] = P(None, None, "fsdp")  # [L, rank, D]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = -1
    """Rows are split over these; -1 takes every device that is left."""
    fsdp: int = 1
    """Rows and parameters are split over these."""
    tensor: int = 1
    """Heads and hidden units are split over these."""


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh. Raises ValueError where the sizes do not multiply to the number of devices."""
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = len(devices) // max(inner, 1) if config.data == -1 else config.data
    if min(data, config.fsdp, config.tensor) < 1 or data * inner != len(devices):
        raise ValueError(
            f"mesh.data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not cover the {len(devices)} "
            "device(s) here: the product must be their number; data=-1 takes what a divisor fsdp x tensor leaves"
        )
    # Auto: an Explicit axis (make_mesh's default) makes gathers over sharded rows raise.
    return jax.make_mesh(
        (data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices
    )


def _path(key_path: tuple) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in key_path)


def _fits(spec: P, shape: tuple[int, ...], mesh: Mesh) -> bool:
    return all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=False))


def shard_params(params: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings for a tree of parameters (arrays or shapes), by RULES.

    Raises ValueError for a parameter without a rule, or one whose axis the mesh does not divide.
    """

    def sharding(key_path, leaf) -> NamedSharding:
        path = _path(key_path)
        if path not in RULES:
            raise ValueError(f"parameter {path} {tuple(leaf.shape)} has no rule in sharding.RULES: add one")
        if not _fits(RULES[path], leaf.shape, mesh):
            raise ValueError(
                f"parameter {path} {tuple(leaf.shape)} does not divide over the mesh {dict(mesh.shape)} by "
                f"{RULES[path]}: choose a smaller fsdp or tensor axis"
            )
        return NamedSharding(mesh, RULES[path])

    return jax.tree_util.tree_map_with_path(sharding, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """The leading axis, rows, over `data` and `fsdp`."""
    return NamedSharding(mesh, ROWS)


def row_shards(mesh: Mesh) -> int:
    """Into how many pieces rows are cut: rows a step must be a multiple."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
