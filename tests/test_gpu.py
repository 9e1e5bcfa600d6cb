"""What benchmarks/gpu.py counts and how it reads its rows: FLOPs and bytes by hand, shares, the latest run of each."""

import generation
import gpu
import gpu_sections
import pytest

from cero_jax.model import ModelConfig

SHAPE = {"num_layers": 3, "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48}


@pytest.mark.parametrize("tied", [True, False])
def test_decode_reads_every_weight_and_what_is_in_the_cache(tied):
    config = ModelConfig(**SHAPE, qkv_bias=True, tied_embeddings=tied, compute_dtype="bfloat16")
    projections = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + (4 + 2 + 2) * 8  # queries, keys, values; output; biases
    layer = 2 * (projections + 3 * 32 * 48) + 4 * 2 * 32  # the scales of norms stay float32
    weights = 3 * layer + 4 * 32 + 2 * 100 * 32  # the last norm; the table that gives logits, tied or not
    token = 2 * 2 * 3 * 2 * 8  # bfloat16; keys and values of 3 layers, 2 heads of 8
    assert gpu_sections.decode_bytes(config, 100, rows=5, length=7.5) == weights + 5 * 7.5 * token


def test_flops_of_attention_pair_by_pair():
    pairs = sum(1 for query in range(9) for key in range(9) if key <= query)
    assert gpu_sections.attention_flops(rows=2, length=9, heads=4, head_dim=8) == 2 * 4 * pairs * 7 * 2 * 8


def test_flops_of_a_step_token_by_token():
    config, forward = ModelConfig(**SHAPE), 0
    for token in range(5 + 6 - 1):  # the last is not read
        projections = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32
        forward += 3 * 2 * (projections + 3 * 32 * 48)
        forward += 3 * (token + 1) * 4 * 2 * 2 * 8  # scores and what they weigh, of each token seen, 4 heads of 8
    forward += 6 * 2 * 32 * 100  # logits of completion tokens
    assert generation.step_flops(config, 100, rows=2, width=5, limit=6) == 3 * 2 * forward


def row(section, case, began, card="NVIDIA H200", **figures):
    shared = {"section": section, "case": case, "began": began, "card": card, "jax": "1.0", "command": "c"}
    return shared | {"seconds": 0.002, "compile_seconds": 1.0} | figures


COPY = row("ceilings", "copy", "day 1", bytes_per_second=4e12)
MATMUL = row("ceilings", "matmul", "day 1", flops_per_second=8e14)


def test_shares_are_of_the_ceiling_measured_and_of_the_data_sheet():
    rows = [COPY, MATMUL, row("decode", "a", "day 1", bytes_per_second=2.4e12, tokens_per_second=32_000.4)]
    rows += [row("training", "b", "day 1", flops_per_second=4e14, note="n")]
    lines = gpu.table(rows).splitlines()
    assert "| decode | a | 2 ms | 32,000 | 2.4 TB/s | 60% | 50% | 1.0 |  |" in lines
    assert "| training | b | 2 ms |  | 400 TFLOP/s | 50% | 40% | 1.0 | n |" in lines


def test_shares_are_blank_without_a_ceiling_or_on_an_unknown_card():
    rows = [row("decode", "a", "day 1", "another", bytes_per_second=2.4e12), COPY]
    assert "| decode | a | 2 ms |  | 2.4 TB/s |  |  | 1.0 |  |" in gpu.table(rows)


def test_a_section_is_shown_of_its_last_run_on_each_card():
    rows = [row("decode", "a", "day 1"), row("decode", "b", "day 1"), row("decode", "a", "day 2"), MATMUL]
    rows += [row("decode", "b", "day 1", "NVIDIA H100 80GB HBM3")]
    kept = [(each["card"], each["case"], each["began"]) for each in gpu.latest(rows) if each["section"] == "decode"]
    assert kept == [("NVIDIA H200", "a", "day 2"), ("NVIDIA H100 80GB HBM3", "b", "day 1")]


def test_a_section_that_was_stopped_is_a_row_of_the_card_before_it():
    stopped = {"section": "decode", "began": "day 1", "command": "c", "error": "stopped"}
    assert "| decode |  | | | | | | | stopped |" in gpu.table([COPY, stopped])
    assert gpu.table([COPY, stopped]).count("| section |") == 1
