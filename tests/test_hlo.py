"""What is read from a compiled program's text: times, bytes, operations; of each compiler's way to write them."""

import hlo
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cero_jax import sharding

TPU = """
%batch (left: bf16[16,1024,512], right: bf16[16,512,256]) -> bf16[16,1024,256] {
  %left = bf16[16,1024,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %right = bf16[16,512,256]{2,1,0} parameter(1)
  %row = bf16[1024,1,512]{2,1,0} parameter(2)
  %heads = bf16[512,12,32]{2,1,0} parameter(3)
  %outer = bf16[1024,12,32]{2,1,0} convolution(%row, %heads), window={size=12 pad=11_11 rhs_reversal=1}, \
dim_labels=b0f_i0o->b0f
  ROOT %out = bf16[16,1024,256]{2,1,0} convolution(%left, %right), window={size=16 stride=15 lhs_dilate=16}, \
dim_labels=0bf_0io->0bf
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %part = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %begun = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%part), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = bf16[16,8]{1,0} all-gather-done(%begun)
  %sum = f32[4,8]{1,0} all-reduce(%part), replica_groups=mesh['x'=4,'y'=2] {'y'}, metadata={op_name="jit(f)/sum"}
}

%limit (q: (s32[], bf16[4,8])) -> pred[] {
  %q = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[] constant(28)
}

ENTRY %main (a: bf16[16,1024,512], b: bf16[16,512,256]) -> bf16[16,1024,256] {
  %a = bf16[16,1024,512]{2,1,0} parameter(0)
  %b = bf16[16,512,256]{2,1,0} parameter(1)
  %loop = (s32[], bf16[4,8]{1,0}) while(%a), condition=%limit, body=%body
  %splash_mha_dq.1 = (f32[9]{0}, f32[3,8,4]{2,1,0}) custom-call(%a), custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,2,2]{2,1,0}, f32[3,8,4]{2,1,0}, f32[1,8,4]{2,1,0}}
  ROOT %fused = bf16[16,1024,256]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%batch
}
"""
CUDA = """
ENTRY %main (a: bf16[32,64], b: bf16[64,16]) -> bf16[32,16] {
  %q = bf16[5,6,3,4]{3,2,1,0} parameter(2)
  %mask = pred[6,6]{1,0} parameter(3)
  %scores = f32[5,3,6,6]{3,2,1,0} parameter(4)
  %filled = f32[128,100]{1,0} parameter(5)
  %attended = (bf16[5,3,6,4]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[5,6,3,4]{3,2,1,0}, bf16[5,6,3,4]{3,2,1,0}}, \
backend_config={"bmm1_dot_dimension_numbers":{"lhs_contracting_dimensions":["3"]}}
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[64,16]{1,0} parameter(1)
  %out = (bf16[32,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""


def test_a_tpus_text():
    lines = hlo.instructions(TPU)
    gather, reduce = hlo.collectives(lines)
    assert gather == ("all-gather", 16 * 8 * 2, ((16, 8),), 4, 28, "")
    assert reduce == ("all-reduce", 4 * 8 * 4, ((4, 8),), 2, 28, "jit(f)/sum")
    assert hlo.sent([gather, reduce]) == 28 * (256 * 3 / 4 + 2 * 128 / 2)
    assert hlo.flops(lines) == 2 * 16 * 1024 * 512 * 256 + 2 * 1024 * 512 * 12 * 32 + 3 * 2 * (3 * 8 * 8 * 4) / 2
    assert hlo.kernels(lines) == ["splash_mha_dq"]


def test_a_gpus_text():
    lines = hlo.instructions(CUDA)
    assert hlo.flops(lines) == 2 * 32 * 64 * 16 + 2 * 2 * (5 * 6 * 6 * 3 * 4) / 2
    assert hlo.kernels(lines) == ["fmhaSoftmax"]
    assert hlo.squares(lines, 6) == ["f32[5, 3, 6, 6]", "pred[6, 6]"]
    assert hlo.squares(lines, 100) == ["f32[128, 100]"]


def test_a_loop_that_counts_in_steps():
    steps = TPU.replace(
        "%sum = ",
        """%counter = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %more = s32[] add(%counter, %two)
  %sum = """,
    )
    steps = steps.replace(
        '{op_name="jit(f)/sum"}\n', '{op_name="jit(f)/sum"}\n  ROOT %next = (s32[], f32[4,8]) tuple(%more, %sum)\n'
    )
    steps = steps.replace("%n = s32", "%seen = s32[] get-tuple-element(%q), index=0\n  %n = s32")
    assert {each.times for each in hlo.collectives(hlo.instructions(steps))} == {14}


def test_a_loop_that_does_not_say_how_often_it_runs_is_refused():
    with pytest.raises(ValueError, match="the loop loop does not say how often it runs"):
        hlo.instructions(TPU.replace("constant(28)", "add(%q, %q)"))


def test_a_program_of_this_machine():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding.rows(mesh))
    w = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    product = jax.jit(
        lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], out_shardings=x.sharding
    )
    lines = hlo.instructions(product.lower(x, w).compile().as_text())
    assert hlo.flops(lines) == 5 * 2 * (16 / 8) * 8 * 8
    assert hlo.by_kind(hlo.collectives(lines)) == {"all-gather": 5 * 8 * 8 * 4}
