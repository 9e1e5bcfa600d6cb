"""Whose group is drawn next, for a trainer that draws groups of one size and asks before it has reported.

Such a trainer reshapes its rewards by the size of a group, so a prompt that gets n rollouts comes n / group_size times.
"""

import io

import jax
import numpy as np

from cero_jax.allocator import Allocator, AllocatorState, cero
from cero_jax.allocator.posterior import under_fitted_prior


def one_size_allocator(total_budget: int, batch_size: int, group_size: int) -> Allocator:
    """`cero` for such a trainer: every group has group_size rollouts, and an epoch is a batch of batch_size rollouts.

    A longer epoch knows no more when it is shared out, a shorter one cannot be drawn.
    """
    epochs = max(total_budget // batch_size, 1)
    return cero(total_budget=total_budget, num_epochs=epochs, min_group=group_size, max_group=group_size)


def budget_of(allocator: Allocator) -> int:
    """The rollouts of the whole run that an allocator was made with. Raises ValueError where they are tokens."""
    state = allocator.init(1)
    if state.tokens is not None:
        raise ValueError(
            "this allocator's budget is in tokens, and steps cannot be planned in them: leave out expected_tokens"
        )
    return int(state.ledger.total)


class Groups:
    """An allocator's groups, one after the other, and what came of those that were drawn.

    A trainer may ask several batches ahead: what it holds is reserved in the ledger. It reports in the order in which
    the groups were handed out.
    """

    def __init__(self, allocator: Allocator, num_prompts: int, group_size: int, seed: int = 0):
        self.allocator, self.group_size, self.seed = allocator, group_size, seed
        self.state: AllocatorState = allocator.init(num_prompts, seed)
        self.epochs = 0  # calls of `allocate` so far
        self.held: list[int] = []  # prompt ids, one a group: handed out, not reported yet
        self.waiting: list[int] = []  # allocated, not handed out yet

    def take(self, count: int) -> list[int]:
        """The prompt ids of the next `count` groups; fewer where the budget is spent."""
        while len(self.waiting) < count and (more := self._allocate()):
            self.waiting += more
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.held += taken
        return taken

    def _allocate(self) -> list[int]:
        """The prompt ids of the next epoch's groups in an order of chance, those of one prompt behind each other."""
        sizes, self.state = self.allocator.allocate(self.state)
        sizes = np.asarray(sizes)
        wrong = np.flatnonzero(sizes % self.group_size)
        if len(wrong):
            raise ValueError(
                f"the allocator gave prompt {wrong[0]} {sizes[wrong[0]]} rollouts, and this trainer draws groups of "
                f"{self.group_size}: make the allocator with min_group={self.group_size} and "
                f"max_group={self.group_size}, or with multiples of it and multiple_of={self.group_size}"
            )
        self.epochs += 1
        order = np.random.default_rng([self.seed, self.epochs]).permutation(np.flatnonzero(sizes))
        return np.repeat(order, sizes[order] // self.group_size).tolist()

    def report(self, prompt_ids: np.ndarray, successes: np.ndarray, judged: np.ndarray) -> None:
        """Takes in groups that were drawn: the next of those that were handed out.

        Args:
            prompt_ids: [K] int, one a group, to be checked.
            successes: [K] int, rollouts of the group that were right, among those judged.
            judged: [K] int, rollouts whose reward is known; the others are paid for, and no evidence.

        Raises:
            ValueError: these are not the groups that were handed out next.
        """
        expected = self.held[: len(prompt_ids)]
        if list(prompt_ids) != expected:
            raise ValueError(
                f"rewards came for the prompts {list(prompt_ids)[:8]}, where {expected[:8]} were to be drawn next: the "
                "trainer's order of rows must be the allocator's, alike in all processes"
            )
        del self.held[: len(prompt_ids)]
        size = len(self.state.alpha)
        drawn, correct, evidence = np.zeros((3, size), np.int32)
        np.add.at(drawn, prompt_ids, self.group_size)
        np.add.at(correct, prompt_ids, successes)
        np.add.at(evidence, prompt_ids, judged)
        # What else is reserved is a group that some later batch holds.
        self.state = self.allocator.update(self.state, drawn, correct, num_evidence=evidence, release=False)

    def belief(self) -> tuple[np.ndarray, np.ndarray]:
        """The posterior [N], alpha and beta, under the prior fitted to the population where prompts began alike."""
        alpha, beta = self.state.alpha, self.state.beta
        start = self.allocator.init(len(alpha))
        a0, b0 = np.asarray(start.alpha), np.asarray(start.beta)
        if np.ptp(a0) == np.ptp(b0) == 0:
            alpha, beta = under_fitted_prior(alpha, beta, (a0[0], b0[0]))
        return np.asarray(alpha), np.asarray(beta)

    def to_bytes(self) -> bytes:
        """All of it as an .npz file. What is held will be handed out again: its rewards have not come."""
        plain = self.state._replace(key=jax.random.key_data(self.state.key))
        file = io.BytesIO()
        waiting = np.array([*self.held, *self.waiting], np.int32)
        np.savez(file, *jax.tree.leaves(plain), waiting=waiting, counts=np.array([self.epochs, self.group_size]))
        return file.getvalue()

    def from_bytes(self, saved: bytes, whose: str) -> None:
        """Goes on from what `to_bytes` gave, to the bit. `whose`: names it in messages.

        Raises ValueError where it is of other prompts, another budget or another size of groups.
        """
        with np.load(io.BytesIO(saved)) as file:
            leaves = [file[f"arr_{i}"] for i in range(sum(name.startswith("arr_") for name in file))]
            waiting, (epochs, group_size) = file["waiting"].tolist(), file["counts"].tolist()
        ours = jax.tree.structure(self.state)
        if ours.num_leaves != len(leaves):
            raise ValueError(f"{whose} was written with another allocator: resume with the one that it was begun with")
        state = jax.tree.unflatten(ours, leaves)
        compared = {
            "prompts": (len(state.alpha), len(self.state.alpha)),
            "rollouts of total_budget": (int(state.ledger.total), int(self.state.ledger.total)),
            "rollouts a group": (group_size, self.group_size),
        }
        for name, (then, now) in compared.items():
            if then != now:
                raise ValueError(
                    f"{whose} has {then} {name}, this trainer {now}: resume with the settings it was begun with"
                )
        state = jax.tree.map(jax.numpy.asarray, state)
        self.state = state._replace(key=jax.random.wrap_key_data(state.key))
        self.held, self.waiting, self.epochs = [], waiting, epochs
