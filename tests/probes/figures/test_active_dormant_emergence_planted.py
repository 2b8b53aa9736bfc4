"""Curves over revisions: which heads get a line, and where the revisions stand."""

import dataclasses

import pytest

from probes.figures.active_dormant_emergence import figure_emergence, revision_axis
from probes.figures.theme import INK
from tests.probes.figures.plant import place, same
from tests.probes.figures.test_active_dormant import planted_result
from workbench.errors import ConfigError


@pytest.fixture
def revisions():
    found = []
    for index, peak in enumerate((2.0, 50.0, 400.0)):
        one = planted_result(peak=peak)
        gap, value = one.sink_logit_gap + index, one.value_norm_ratio + 2 * index
        found.append(dataclasses.replace(one, sink_logit_gap=gap, value_norm_ratio=value))
    dormant = found[0].dormant.clone()
    dormant[:, 0, 1] = False
    found[0] = dataclasses.replace(found[0], dormant=dormant)
    return found


def test_revisions_have_a_line_for_the_mean_and_for_the_heads_that_sink_most(revisions):
    figure = figure_emergence(revisions, ["step0", "step8", "step64"])
    last = revisions[-1].sink_attention.mean(dim=0).flatten()
    strongest = [divmod(int(index), 3) for index in last.argsort(descending=True)[:3]]
    names = ["mean of all heads", *(f"L{layer}H{head}" for layer, head in strongest)]
    for column, field in enumerate(("sink_logit_gap", "value_norm_ratio")):
        lines = [trace for trace in figure.data if place(trace) == column + 1]
        assert [line.name for line in lines] == names
        values = [getattr(one, field).mean(dim=0) for one in revisions]
        same(lines[0].y, [value.mean() for value in values])
        for line, head in zip(lines[1:], strongest, strict=True):
            same(line.y, [value[head] for value in values])
        assert [line.showlegend for line in lines] == [column == 0] * 4
        assert lines[0].line.color == INK
        assert list(lines[0].x) == [1, 9, 65]
    residual = [trace for trace in figure.data if place(trace) == 3]
    assert [line.name for line in residual] == [
        "first token, 2 blocks passed",
        "mean elsewhere, 2 blocks passed",
    ]
    same(residual[0].y, [one.resid_norm_bos[:, 2].mean() for one in revisions])
    same(residual[1].y, [one.resid_norm_rest[:, 2].mean() for one in revisions])
    counts = {trace.name: list(trace.y) for trace in figure.data if place(trace) == 4}
    assert counts == {
        "always active": [5, 4, 4],
        "active-dormant": [0, 1, 1],
        "always dormant": [1, 1, 1],
    }
    axes = [*figure.select_yaxes()]
    assert [axis.type for axis in axes] == [None, None, "log", None]
    assert axes[3].rangemode == "tozero"
    assert (min(axes[2].tickvals), max(axes[2].tickvals)) == (3, 300)  # from 1.1 to 400
    assert {axis.title.text for axis in figure.select_xaxes()} == {"step + 1 (updates)"}
    assert [note.text for note in figure.layout.annotations] == [
        "sink-logit gap",
        "value norm",
        "residual norm",
        "heads by class",
    ]
    assert figure.layout.title.subtitle.text.endswith("n = 9 prompts at each of 3 revisions")


def test_revisions_without_names_are_counted_from_zero(revisions):
    figure = figure_emergence(revisions[:2])
    assert list(figure.data[0].x) == [1, 2]
    assert list(figure.layout.xaxis.tickvals)


def test_names_that_are_equal_or_have_no_number_are_categories():
    assert revision_axis(["step2", "step2"])[0] == ["step2", "step2"]
    x, axis = revision_axis(["step1", "<main>"])
    assert x == ["step1", "&lt;main&gt;"]
    assert axis == {"title": "revision (name)", "type": "category"}
    x, axis = revision_axis(["a", "step9"])
    assert axis["type"] == "category"


def test_every_revision_needs_a_name(revisions):
    with pytest.raises(ConfigError, match="3 results and 2 names"):
        figure_emergence(revisions, ["a", "b"])
    with pytest.raises(ConfigError, match="1 results and 1 names"):
        figure_emergence(revisions[:1], ["a"])
