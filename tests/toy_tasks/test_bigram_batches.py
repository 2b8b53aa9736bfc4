"""Batches drawn by the chunk: the same for every way of asking, and of the law's speed."""

import time

import pytest
import torch

from toy_tasks.bigram_batches import STEPS_AT_ONCE, Batches, draw_chunk
from toy_tasks.bigram_law import draw, follow, make_law, read_counts, sample
from toy_tasks.training import batch_generator

SIZE = (3, 20)


@pytest.fixture(scope="module")
def law():
    return make_law(read_counts())


def test_sampling_is_drawing_and_following(law):
    def generator():
        return torch.Generator().manual_seed(5)

    assert torch.equal(sample(law, 4, 9, generator()), follow(law, draw(4, 9, generator())))


def test_a_run_that_begins_in_the_middle_of_a_chunk_has_the_same_batches(law):
    steps = [0, 1, STEPS_AT_ONCE - 1, STEPS_AT_ONCE, STEPS_AT_ONCE + 7]
    running = Batches(law, SIZE, (2,))
    in_turn = [running.at(step) for step in steps]
    for step, wanted in zip(steps, in_turn, strict=True):
        assert torch.equal(Batches(law, SIZE, (2,)).at(step), wanted)
    assert torch.equal(running.at(0), in_turn[0]), "and back again"
    distinct = {tuple(batch.flatten().tolist()) for batch in in_turn}
    assert len(distinct) == len(steps)


def test_a_seed_has_the_same_batches_whatever_the_other_seeds_are(law):
    together = draw_chunk(law, SIZE, (7, 1, 4), 2)
    assert together.shape == (STEPS_AT_ONCE, 3, 3, 21)
    for index, seed in enumerate((7, 1, 4)):
        assert torch.equal(together[:, index], draw_chunk(law, SIZE, (seed,), 2)[:, 0])
    assert not torch.equal(together[:, 0], together[:, 1])


def test_a_chunk_is_a_sample_of_its_generator_cut_into_steps(law):
    whole = sample(law, STEPS_AT_ONCE * 3, 20, batch_generator(6, 1))
    wanted = whole.unflatten(0, (STEPS_AT_ONCE, 3))
    assert torch.equal(draw_chunk(law, SIZE, (6,), 1)[:, 0], wanted)


def test_training_batches_are_drawn_at_a_million_tokens_a_second(law):
    rates = []
    for attempt in range(3):  # the machine may be shared
        batches = Batches(law, (32, 64), (attempt,))
        start = time.process_time()
        for step in range(2 * STEPS_AT_ONCE):
            batches.at(step)
        rates.append(2 * STEPS_AT_ONCE * 32 * 64 / (time.process_time() - start))
    assert max(rates) > 1e6
