"""The training batches of Bigram-Backcopy, drawn for many steps in one go.

Drawing is a loop over positions, whose cost hardly depends on how many rows there are: a batch of
32 sequences costs as much as sixteen such batches. So the steps are cut into chunks of a fixed
length; the generator of a chunk is seeded by (seed, chunk), and a run resumed in the middle of a
chunk draws the whole of it again. The length of the run does not matter.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from toy_tasks.bigram_law import BigramLaw, draw, follow
from toy_tasks.training import batch_generator

STEPS_AT_ONCE = 16
"""Steps of a chunk. Part of what a seed means: another number draws other batches."""


def draw_chunk(
    law: BigramLaw, size: tuple[int, int], seeds: Sequence[int], chunk: int
) -> Int[Tensor, "step seed row longer"]:
    """Draw the batches of one chunk of steps for every seed, whatever the other seeds are.

    Args:
        law: Of the sequences.
        size: Rows and positions of a batch; sequences have one token more.
        seeds: Of the runs.
        chunk: The first step over ``STEPS_AT_ONCE``.
    """
    n_rows, n_pos = size
    drawn = [draw(STEPS_AT_ONCE * n_rows, n_pos, batch_generator(seed, chunk)) for seed in seeds]
    rows = follow(law, torch.cat(drawn, dim=1))
    return rows.unflatten(0, (len(seeds), STEPS_AT_ONCE, n_rows)).transpose(0, 1)


class Batches:
    """The batch of any step; a chunk is kept until a step of another one is asked for."""

    def __init__(
        self, law: BigramLaw, size: tuple[int, int], seeds: Sequence[int], device: str = "cpu"
    ) -> None:
        self.law, self.size, self.seeds, self.device = law, size, seeds, device
        self._chunk, self._rows = -1, torch.zeros(0)

    def at(self, step: int) -> Int[Tensor, "seed row longer"]:
        """The batches of one step, of every seed."""
        chunk, within = divmod(step, STEPS_AT_ONCE)
        if chunk != self._chunk:
            self._chunk = chunk
            self._rows = draw_chunk(self.law, self.size, self.seeds, chunk).to(self.device)
        return self._rows[within]
