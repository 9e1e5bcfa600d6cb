"""Hostile strings and real gold answers through every verifier: which are accepted, and how long each takes.

    python benchmarks/fuzz.py [--count 100000] [--data FOLDER]

FOLDER may hold gsm8k_train.jsonl, gsm8k_test.jsonl, math500.jsonl, aime24.jsonl and amc23.jsonl; a missing file is
skipped. With the default count this takes three to five minutes on two idle cores, nearly all of it in `math`, and half
an hour where other work runs as well.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from cero_jax.rewards import RIGHT, STATUSES, Verdict, verdict
from cero_jax.rewards.choice import choice
from cero_jax.rewards.exact import exact
from cero_jax.rewards.final_number import final_number
from cero_jax.rewards.pool import Pool

MATHEMATICS = "cero_jax.rewards.mathematics:mathematics"
GOLD = {"exact": "the gold answer", "final_number": "#### 7919", "choice": "Q", "math": r"\frac{7919}{104729}"}
CANARY = "EXECUTED"  # the file that strings of code try to make; it must not appear

LATEX = str.split(
    r"\frac \sqrt \left( \right) \left[ \right] \{ \} { } ( ) [ ] ^ _ + - * / = < > , ; : ! | & \\ \cdot \times \pm"
    r" \infty \pi \theta \alpha x y n i e 0 1 2 9 10 100 0.5 \sum_{n=1}^{10} \prod \int_0^1 dx \lim_{x\to0} \log \sin"
    r" \binom \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases} \text{ \mathrm{ \overline \vec \in \cup"
    r" \subset \emptyset \mathbb{R} \le \ge \neq \approx \equiv \pmod \lfloor \rfloor \lceil \rceil \% \$ ^\circ \, ~"
)
ANSWERS = str.split(
    r"5 -3 3/4 \frac{3}{4} 2\sqrt{3} (1,2) [2,\infty) x^2+1 \{4,6\} 90^\circ 1,234 10\% y=2x+3 3+4i \pi A (B) 3.14e2"
)
MONSTERS = [
    "9^9^9", "9**9**9", "9^{9^{9}}", "10^8!", "(10^8)!", "99999999!", "3!!!!!!", "(" * 1000, "{" * 1000,
    r"\boxed{" * 20000, r"\frac{1}{" * 1000, r"\sqrt{" * 300 + "2" + "}" * 300, "x^{" * 100 + "2" + "}" * 100,
    "1+" * 5000 + "1", "9" * 100000, r"\binom{10000000}{5000000}", r"\sum_{n=1}^{100000000} n^{n}",
    r"\int_0^1 x^{x^{x}} dx", r"\prod_{n=1}^{99999} n!", r"\left(" * 500, r"\begin{pmatrix}" * 200, "1,111" * 10000,
    "$" * 9999, "####" * 2000, "answer is " * 2000, "\\" * 9999, "0/0", r"\frac{1}{0}", "nan", "inf", "-0",
    "1e999999999", "0x41", "1_000", "\ufeff7", "\x00", "\ud800", "\u202e", "\u0661\u0662",
]  # fmt: skip
CODE = [
    f"open('{CANARY}','w')", f"__import__('os').system('touch {CANARY}')", f"exec(\"open('{CANARY}','w')\")",
    f"(lambda: open('{CANARY}','w'))()", f"[x for x in ().__class__.__base__.__subclasses__()][0]('{CANARY}')",
    f"$(touch {CANARY})", f"`touch {CANARY}`", r"\input{/etc/passwd}", rf"\write18{{touch {CANARY}}}",
    "import os; os.abort()", "x.__class__", "Symbol('x').subs", "{0.__class__}", "%(x)s %n",
    "'; drop table rewards; --", "<script>alert(1)</script>",
]  # fmt: skip
WAYS = {  # in which models write an answer
    "boxed": r"so $3 + 4$ is \boxed{@}.",
    "boxed display": "\\[\n\\boxed{@}\n\\]",
    "answer is": "With 3 and 4, the answer is @.",
    "answer is: $": "The final answer is: $@$. I hope it is correct.",
    r"answer is \(": r"So the answer is \( @ \).",
    "next line": "The answer is:\n\n@",
    "next line display": "The answer is:\n\n\\[\n@\n\\]\n",
    "next line $$": "**Final answer:**\n$$\n@\n$$",
    "bold": "Therefore, the answer is **@**.",
    "bold label": "**Answer:** @",
    "bold line": "I add 3 and 4.\n\n**@**",
    "bold all": "**Answer: @**",
    "heading": "### Final Answer\n\n@",
    "own line": "I add 3 and 4.\n@",
    "own line $": "I add 3 and 4.\n\n$@$",
    r"own line \[": "I add 3 and 4.\n\n\\[ @ \\]",
    "hashes": "3 + 4\n#### @",
    "reason": "The answer is @ because $x = 3$ and 4 are given.",
    "tag": "<think>3 or 4?</think>\n<answer>@</answer>",
}
DRESSES = [
    "{}",
    r"\boxed{{{}}}",
    r"so \boxed{{{}}}.",
    "#### {}",
    "The answer is {}",
    "Answer: ${}$",
    "${}$",
    "it is\n{}",
]


def hostile(count: int, seed: int = 0) -> Iterator[str]:
    """`count` strings, the same for the same seed: noise, LaTeX in no order, broken answers, code and monsters."""
    rng = random.Random(seed)
    for i in range(count):
        text = (_noise, _ascii, _latex, _latex, _broken, _digits, _code, _monster)[i % 8](rng)
        yield rng.choice(DRESSES).format(text)


def _noise(rng: random.Random) -> str:
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000))))
                   for _ in range(rng.randrange(200)))  # fmt: skip


def _ascii(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(200)))


def _latex(rng: random.Random) -> str:
    return rng.choice(("", " ")).join(rng.choices(LATEX, k=rng.randrange(1, 25)))


def _broken(rng: random.Random) -> str:
    """An answer with a few random edits."""
    text = rng.choice(ANSWERS) + rng.choice(("", " or ", ",", "=")) + rng.choice(("", *ANSWERS))
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(("", *LATEX)) * rng.choice((1, 1, 1, 3)) + text[place + rng.randrange(2) :]
    return text


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789.,/%-+^*!eE{}()$ _", k=rng.randrange(1, 60)))


def _code(rng: random.Random) -> str:
    return rng.choice(CODE) + rng.choice(("", "", "+1", "=5", "\n"))


def _monster(rng: random.Random) -> str:
    return rng.choice(("", "5+", "-")) + rng.choice(MONSTERS) + rng.choice(("", "", "=5", "+x"))


def judge(verifier: str, pool: Pool, asked: list[tuple[str, str, str]]) -> list[Verdict]:
    """The named verifier's verdict on each (question, completion, gold answer)."""
    if verifier == "math":
        return pool.many(asked)
    return [
        verdict({"exact": exact, "final_number": final_number, "choice": choice}[verifier](*each)) for each in asked
    ]


def fuzz(verifier: str, pool: Pool, count: int, seed: int = 0) -> tuple[Counter, list[str], float]:
    """(how many strings got each status, those accepted, the longest time of one in seconds).

    The time of `math`, which judges in parallel, is the mean over 1,000 strings.
    """
    status, accepted, longest, batch = Counter(), [], 0.0, []
    for i, text in enumerate(hostile(count, seed)):
        batch.append(text)
        if len(batch) < (1 if verifier != "math" else 1000) and i < count - 1:
            continue
        began = time.perf_counter()
        found = judge(verifier, pool, [("q", each, GOLD[verifier]) for each in batch])
        longest = max(longest, (time.perf_counter() - began) / len(batch))
        status.update(each.status for each in found)
        right = rf"\boxed{{{GOLD[verifier]}}}".lower()  # a random string may hold the gold answer by chance
        accepted += [each for each, of in zip(batch, found, strict=True) if of.reward and right not in each.lower()]
        batch = []
        if i % 10_000 == 9_999:
            print(f"  {verifier}: {i + 1:,} so far, {dict(status)}, accepted {accepted}", file=sys.stderr, flush=True)
    assert status.total() == count
    assert set(status) <= set(STATUSES)
    return status, accepted, longest


class Gold(NamedTuple):
    """A gold answer as its file has it, and the solution that comes with it: "" where there is none."""

    answer: str
    solution: str

    @property
    def final(self) -> str:
        """The answer without its solution."""
        return self.answer.rpartition("####")[2].strip()


def read_golds(folder: Path) -> dict[str, list[Gold]]:
    """The gold answers of each file in the folder, by its name."""
    golds = {}
    for name in ("gsm8k_train", "gsm8k_test", "math500", "aime24", "amc23"):
        if (path := folder / f"{name}.jsonl").is_file():
            rows = [json.loads(line, parse_float=str, parse_int=str) for line in path.read_text().splitlines()]
            golds[name] = [Gold(row["answer"], row.get("solution", row["answer"])) for row in rows]
    return golds


def near_misses(gold: Gold, neighbour: Gold) -> list[str]:
    """Answers that are not the gold one: its neighbour, one digit or its sign changed, five numbers of the solution."""
    own = gold.final
    digits = [found.start() for found in re.finditer("[0-9]", own)][:4]
    wrong = [own[:i] + str((int(own[i]) + 1) % 10) + own[i + 1 :] for i in digits]
    if re.fullmatch(r"[0-9.,]*[1-9][0-9.,]*", own):
        wrong.append("-" + own)
    numbers = dict.fromkeys(re.findall(r"[0-9]+(?:\.[0-9]+)?", gold.solution[-2000:]))
    wrong += [each for each in numbers if not _same(each, own)][-5:]
    if neighbour.final != own and not _same(neighbour.final, own):
        wrong.append(neighbour.final)
    return wrong


def _same(one: str, other: str) -> bool:
    """Whether two answers are one as far as a plain reading goes."""
    fraction = re.compile(r"\\frac\{?([0-9]+)\}?\{?([0-9]+)\}?")
    try:
        return math.isclose(*(float(Fraction(fraction.sub(r"\1/\2", each).replace(",", ""))) for each in (one, other)))
    except ValueError:
        return re.sub(r"[\s,]|\\[!,;]", "", one) in re.sub(r"[\s,]|\\[!,;]", "", other)  # 40 for 40_9, 5 for x=5


def check_golds(verifier: str, pool: Pool, golds: list[Gold]) -> tuple[Counter, list, list, int, int]:
    """Each gold answer in each of the WAYS against itself, and near misses in three of them against it.

    Returns (how many were not accepted, by way; those (way, gold); near misses accepted (way, gold, given); how many
    right ones and how many near misses were asked).
    """
    right = [(way, gold, gold.final) for gold in golds for way in WAYS]
    wrong = [
        (way, gold, given)
        for i, gold in enumerate(golds)
        for given in near_misses(gold, golds[(i + 1) % len(golds)])
        for way in ("boxed", "answer is", "own line")
    ]
    found = judge(
        verifier, pool, [("q", WAYS[way].replace("@", given), gold.answer) for way, gold, given in right + wrong]
    )
    missed = [each for each, of in zip(right, found, strict=False) if of.status != RIGHT]
    passed = [each for each, of in zip(wrong, found[len(right) :], strict=True) if of.reward]
    return (
        Counter(way for way, _, _ in missed),
        [(way, given) for way, _, given in missed],
        [(way, gold.final, given) for way, gold, given in passed],
        len(right),
        len(wrong),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--data", type=Path, help="folder with the data sets' JSONL files")
    parser.add_argument("--verifiers", nargs="+", default=list(GOLD))
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="time limit of an answer in `math` (default: %(default)s)"
    )
    given = parser.parse_args()
    golds = read_golds(given.data) if given.data else {}
    os.chdir(tempfile.mkdtemp())  # an empty folder, so that a file that a string makes is seen
    pool = Pool(MATHEMATICS, seconds=given.seconds)
    for verifier in given.verifiers:
        began = time.perf_counter()
        status, accepted, longest = fuzz(verifier, pool, given.count)
        print(f"{verifier}: {given.count:,} hostile strings in {time.perf_counter() - began:.0f} s: {dict(status)}")
        print(
            f"  accepted: {accepted or 'none'}; longest {1000 * longest:.1f} ms an answer"
            + " on average of 1,000" * (verifier == "math")
        )
        for name, answers in golds.items():
            if verifier not in (("final_number", "math") if name != "math500" else ("math",)):
                continue
            began = time.perf_counter()
            ways, missed, passed, right, wrong = check_golds(verifier, pool, answers)
            seconds = time.perf_counter() - began
            cores = pool.workers if verifier == "math" else 1
            print(f"  {name}: {len(answers):,} gold answers in {len(WAYS)} ways, {right:,} asked")
            print(f"    not accepted: {len(missed):,} {dict(ways)} {missed[:8]}")
            print(f"    near misses accepted: {len(passed):,} of {wrong:,}: {passed[:40]}")
            print(f"    {(right + wrong) / seconds / cores:,.0f} verified answers a second on each core")
    made = os.listdir()
    print(f"files made by a string: {made or 'none'}")
    pool.close()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest verifying process: {peak:,.0f} MiB (address space capped at {pool.memory_mb:,})")


if __name__ == "__main__":
    main()
