"""Figures of a short Bigram-Backcopy run draw the run's own numbers."""

import pytest
import torch

from probes.figures.bigram_backcopy import figures, finding
from probes.figures.theme import log_axis
from toy_tasks.bigram_backcopy import BigramBackcopyConfig, train_bigram_backcopy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = BigramBackcopyConfig(
        n_pos=16, d_model=16, batch_size=4, steps=8, n_held_out=8, n_heads=2
    )
    return train_bigram_backcopy(config, tmp_path_factory.mktemp("run") / "toy")


def test_curves_are_those_of_the_record(run):
    drawn = figures(run)
    assert list(drawn["dormancy"].data[0].y) == run.sink_attention[1:].tolist()
    assert list(drawn["risks"].data[1].y) == run.bigram_risk[1:].tolist()
    assert list(drawn["risks"].data[0].x) == run.step[1:].tolist()
    axis = log_axis(run.step[1:].double().numpy())
    assert drawn["risks"].layout.xaxis.type == "log"
    assert list(drawn["risks"].layout.xaxis.tickvals) == axis["tickvals"]
    assert drawn["risks"].layout.yaxis.title.text == "excess risk (nats)"
    assert "n = 8 held-out sequences of 16 tokens" in drawn["risks"].layout.title.subtitle.text


def test_the_finding_names_step_and_seed(run):
    assert "(step 8, seed 0)" in finding(run)


def test_theory_lies_over_the_training_it_is_compared_with(run):
    drawn = {(trace.name, trace.xaxis): trace for trace in figures(run)["theory"].data}
    assert list(drawn["first token", "x"].y) == run.sink_logit_gap[1:].tolist()
    grown = torch.tensor(drawn["theory: 1/2 ln t + c", "x"].y)
    log_step = run.step[1:].double().log()
    assert torch.allclose(grown.diff() / log_step.diff(), torch.tensor(0.5).double())
    last = slice(-round(0.5 * len(grown)), None)
    assert grown[last].mean().item() == pytest.approx(run.sink_logit_gap[1:][last].mean().item())
    assert list(drawn["theory: at rest", "x2"].y) == run.value_norm_stationary[1:].tolist()


def test_patterns_are_those_of_the_strongest_sink_and_hide_the_future(run):
    drawn = figures(run)["patterns"]
    assert len(drawn.data) == len(run.pattern_step)
    layer, head = divmod(int(run.sink_attention_by_head[-1].argmax()), run.config.n_heads)
    shown = torch.tensor(drawn.data[-1].z)
    assert torch.equal(shown.tril().nan_to_num(), run.pattern[-1, layer, head].tril())
    assert shown[0, 1:].isnan().all()
    assert f"L{layer}H{head}" in drawn.layout.title.text


def test_sink_logits_are_by_character_without_triggers(run):
    drawn = figures(run)["sink_logits"].data[-1]
    letters = run.labels["token"]
    assert not {"␣", "e", "t"} & set(drawn.x)
    at = letters.index(drawn.x[0])
    assert drawn.y[0] == run.sink_logit_gap_by_token[-1, at].item()


def test_bars_are_the_end_of_training_whole_and_ablated(run):
    drawn = figures(run)["ablations"].data
    assert list(drawn[0].y) == ["nothing taken away", *run.labels["ablation"]]
    assert list(drawn[0].x) == [
        run.backcopy_risk[-1].item(),
        *run.backcopy_risk_ablated[:, -1].tolist(),
    ]
    # After the embedding, before any block, nothing stands out yet.
    peak = max(
        first / rest
        for first, rest in zip(
            run.resid_norm_bos_by_depth[-1].tolist()[1:],
            run.resid_norm_rest_by_depth[-1].tolist()[1:],
            strict=True,
        )
    )
    assert drawn[2].x[0] == pytest.approx(peak)
    assert list(drawn[2].x)[1:] == run.resid_peak_ablated[:, -1].tolist()
