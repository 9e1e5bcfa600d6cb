"""The graded equations of benchmarks/real_model.py."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import real_model  # pyright: ignore[reportMissingImports]


class Characters:
    """One id a character, spaces left out: as many tokens as the model's own, or fewer."""

    vocab_size, pad_id, eos_ids = 129, 0, (1,)

    def encode(self, text: str) -> list[int]:
        return [128 if text == "\n" * len(text) else ord(character) for character in text.replace(" ", "")]


@pytest.fixture(params=[0, 1])
def task(request):
    return real_model.Equations().build(request.param, Characters())


def test_every_answer_is_right_and_of_its_kind(task):
    for prompts in (task.train, task.heldout):
        for question, answer, kind in zip(prompts.questions, prompts.answers, prompts.labels, strict=True):
            *solved, asked = question.splitlines()
            assert tuple(solved) == real_model.SOLVED
            left, sign, right = kind.split()
            a, shown, b = asked.removesuffix(" =").split()
            assert (len(a), shown, len(b)) == (int(left), sign, int(right))
            assert int(answer) == eval(asked.removesuffix("=")) >= 0


def test_no_equation_stands_twice_or_is_solved_in_the_prompt(task):
    together = task.train.questions + task.heldout.questions
    asked = [question.splitlines()[-1] for question in together]
    assert len(set(asked)) == len(asked)
    answers = task.train.answers + task.heldout.answers
    assert not {f"{q} {a}" for q, a in zip(asked, answers, strict=True)} & set(real_model.SOLVED)


def test_as_many_of_each_kind(task):
    assert set(Counter(task.train.labels).values()) == {24}
    assert set(Counter(task.heldout.labels).values()) == {16}
    assert set(task.train.labels) == set(task.heldout.labels) == set(real_model.KINDS)


def test_a_completion_ends_with_its_line_and_the_folder_s_tokenizer_is_left_as_it_was():
    tokenizer = Characters()
    task = real_model.Equations().build(0, tokenizer)
    assert 128 in task.tokenizer.eos_ids
    assert 1 in task.tokenizer.eos_ids
    assert tokenizer.eos_ids == (1,)


def test_the_solved_equations_are_right():
    assert all(eval(left) == int(right) for left, right in (line.split(" = ") for line in real_model.SOLVED))
