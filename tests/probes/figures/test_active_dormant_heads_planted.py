"""A head's page: patterns, tokens and numbers of each domain."""

import dataclasses

import pytest
import torch

from probes.figures.active_dormant import (
    figure_residual_peak,
)
from probes.figures.active_dormant_heads import figure_head
from tests.probes.figures.plant import same, title_of
from tests.probes.figures.test_active_dormant import planted_result


@pytest.fixture
def result():
    found = planted_result(3)
    q = torch.linspace(0.001, 0.6, 6).reshape(2, 3)
    return dataclasses.replace(found, q_sink=q, q_loss=q.flip(0))


def test_a_heads_page_has_each_domains_pattern_and_numbers(result):
    figure = figure_head(result, 0, 1)
    for domain, heatmap in enumerate(figure.data):
        length = 3 if domain == 0 else 4
        seen = result.example_pattern[0, domain, :length, :length].clone()
        seen[~torch.ones(length, length, dtype=torch.bool).tril()] = torch.nan
        same(heatmap.z, seen)
        tokens = [f"t{4 * domain + pos}" for pos in range(length)]
        for query in range(length):
            for key in range(length):
                pair = list(heatmap.customdata[query][key])
                assert pair == [tokens[query], tokens[key]]
        across, down = (
            figure.layout[f"{letter}axis{domain + 1 if domain else ''}"] for letter in "xy"
        )
        assert list(across.tickvals) == list(down.tickvals) == list(range(length))
        assert list(across.ticktext) == list(down.ticktext) == tokens
        assert across.dtick is None
        assert down.autorange == "reversed"
        assert down.title.text == "query (token)"
        assert across.title.text == f"key (token)<br><i>{''.join(tokens)}</i>"
        note = figure.layout.annotations[domain].text
        state = "dormant" if domain == 0 else "active"
        assert note == (
            f"<b>{('prose', 'code', 'chess')[domain]}</b>: {state}<br>"
            f"sink {result.sink_attention[domain, 0, 1]:.2f}, "
            f"loss {result.ablation_loss[domain, 0, 1]:+.3f}, "
            f"value {result.value_norm_ratio[domain, 0, 1]:.2f}"
        )
        assert heatmap.coloraxis == "coloraxis"
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (0, 1)
    assert scale.colorbar.title.text == "attention (share)"
    said = figure.layout.title.subtitle.text.replace("<br>", " ")
    q = result.q_sink[0, 1], result.q_loss[0, 1]
    assert f"sink {q[0]:.2g}, loss {q[1]:.2g};" in said
    assert said.endswith(
        "n = 4 prompts of prose, 5 prompts of code, 6 prompts of chess; 1 of each shown"
    )
    assert figure.layout.title.text == "Head L0H1: active-dormant"


def test_headings_of_two_lines_have_room_under_the_subtitle(result):
    lines = 1 + figure_head(result, 0, 1).layout.title.subtitle.text.count("<br>")
    other = figure_residual_peak(result)
    others = 1 + other.layout.title.subtitle.text.count("<br>")
    line = 17
    room = figure_head(result, 0, 1).layout.margin.t - other.layout.margin.t
    assert room > (lines - others) * line + 10


@pytest.mark.parametrize(("length", "step"), [(24, 1), (25, 2), (64, 5), (65, None)])
def test_long_examples_name_some_tokens_and_longer_ones_none(length, step):
    found = planted_result()
    texts = tuple(f"w{pos}" for pos in range(2 * length))
    figure = figure_head(
        dataclasses.replace(
            found,
            example_tokens=torch.arange(2 * length).view(2, length),
            example_pattern=torch.rand(2, 2, length, length),
            labels=found.labels | {"example_token": texts},
        ),
        1,
        2,
    )
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        if step is None:
            assert axis.tickvals is None
            assert axis.dtick == 10
        else:
            assert list(axis.tickvals) == list(range(0, length, step))
            assert list(axis.ticktext) == [f"w{pos}" for pos in range(0, length, step)]


def test_the_beginning_of_a_long_example_is_two_lines():
    found = planted_result()
    tokens = found.example_tokens.abs()
    found = dataclasses.replace(found, example_tokens=tokens)
    texts = ("many words & more ",) * 8
    figure = figure_head(
        dataclasses.replace(found, labels=found.labels | {"example_token": texts}), 1, 2
    )
    _, first, second = title_of(figure).replace("</i>", "").split("<br>")
    assert first == "<i>many words &amp; more many words &amp; more many words &amp;"
    assert second == "more many words &amp; more"
    long = dataclasses.replace(found, labels=found.labels | {"example_token": ("x " * 60,) * 8})
    lines = title_of(figure_head(long, 1, 2)).split("<br>")
    assert len(lines) == 3
    assert lines[-1].endswith(" ...</i>")
