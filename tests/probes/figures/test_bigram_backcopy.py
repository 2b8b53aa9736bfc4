"""Figures of a short Bigram-Backcopy run draw the run's own numbers."""

import pytest

from probes.figures.bigram_backcopy import figures, finding
from toy_tasks.bigram_backcopy import BigramBackcopyConfig, train_bigram_backcopy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = BigramBackcopyConfig(n_pos=16, d_model=16, batch_size=4, steps=8, n_held_out=8)
    return train_bigram_backcopy(config, tmp_path_factory.mktemp("run") / "toy")


def test_curves_are_those_of_the_record(run):
    drawn = figures(run)
    assert list(drawn["dormancy"].data[0].y) == run.sink_attention[1:].tolist()
    assert list(drawn["risks"].data[1].y) == run.bigram_risk[1:].tolist()
    assert list(drawn["risks"].data[0].x) == run.step[1:].tolist()
    assert drawn["risks"].layout.yaxis.title.text == "excess risk (nats)"
    assert f"n = {len(run.step)} checkpoints" in drawn["risks"].layout.title.subtitle.text


def test_the_finding_names_step_and_seed(run):
    assert "(step 8, seed 0)" in finding(run)
