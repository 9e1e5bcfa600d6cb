"""A GRPOTrainer of a few thousand random parameters, and prompts of which some are hopeless, some easy.

As a program, for the tests of resuming and of several processes: trains, and writes what came of it.

    python trl_toy.py FOLDER '{"max_steps": 8}' '{"advantage": "posterior"}' [CHECKPOINT]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<eos>", *"0123456789+="]
NUM_PROMPTS, GROUP = 40, 4
HOPELESS = np.arange(NUM_PROMPTS) % 2 == 0  # their answer is no word of the model's


def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def model(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(
        vocab_size=len(WORDS), num_key_value_heads=1, max_position_embeddings=64, attention_dropout=0.0, **shape, **ids
    )
    return Qwen2ForCausalLM(config)


def dataset():
    """Add the two digits, or say something that cannot be said."""
    rows = [
        {"prompt": f"{i % 10}+{i // 10}=", "answer": "x" if HOPELESS[i] else str((i % 10 + i // 10) % 10)}
        for i in range(NUM_PROMPTS)
    ]
    return Dataset.from_list(rows)


def correct(completions, answer, **kwargs):
    assert "cero_prompt_id" not in kwargs  # whose rows these are is nobody else's business
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def shape(completions, **kwargs):
    """Not what is right: short completions."""
    return [-0.1 * len(c) for c in completions]


def sometimes(completions, answer, **kwargs):
    """A judge that gives no reward for completions that begin with a digit below 5."""
    judged = correct(completions, answer)
    return [None if c[:1] in set("01234") else r for c, r in zip(completions, judged, strict=True)]


def build(
    folder, *, trainer=GRPOTrainer, reward_funcs=correct, seed=0, config=None, config_class=GRPOConfig, **settings
):
    """A trainer of batches of 32 rollouts, 8 groups of 4. `config`: a GRPOConfig's settings; the rest the trainer's."""
    given = {
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_generations": GROUP,
        "max_completion_length": 3, "learning_rate": 3e-3, "max_steps": 8, "beta": 0.0, "temperature": 1.0,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "bf16": False, "seed": seed,
    }  # fmt: skip
    args = config_class(output_dir=str(folder), **{**given, **(config or {})})
    settings = {"train_dataset": dataset(), "model": model(seed), **settings}
    return trainer(reward_funcs=reward_funcs, args=args, processing_class=tokenizer(), **settings)


def summary(trainer):
    """What two runs must have alike to be the same run."""
    state = trainer.cero_groups.state
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {
        "parameters": parameters.numpy().tobytes().hex(),
        "drawn": np.asarray(state.cumulative_rollouts).tolist(),
        "alpha": np.asarray(state.alpha).tobytes().hex(),
        "spent": int(state.ledger.spent),
        "reserved": int(state.ledger.reserved),
        "left": int(state.ledger.left),
        "steps": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "rewards": [row["reward"] for row in trainer.state.log_history if "reward" in row],
    }


if __name__ == "__main__":
    from cero_jax.integrations.trl import CeroGRPOTrainer

    folder, config, settings, checkpoint = [*sys.argv[1:], None][:4]
    run = build(folder, trainer=CeroGRPOTrainer, config=json.loads(config), **json.loads(settings))
    run.train(resume_from_checkpoint=checkpoint)
    Path(folder, f"summary_{run.accelerator.process_index}.json").write_text(json.dumps(summary(run)))
