"""The layer x head heat map."""

import numpy as np

from probes.figures.heatmap import HeadNumbers, layer_head_heatmap

VALUES = np.array([[0.1, 0.2, 0.3], [0.4, np.nan, 0.6]])


def _scale(figure):
    return figure.data[0].colorscale[0][1]


def test_cell_is_the_number_of_its_layer_and_head():
    figure = layer_head_heatmap(HeadNumbers("score", VALUES))
    np.testing.assert_allclose(figure.data[0].z, VALUES, rtol=1e-6)
    assert figure.layout.xaxis.title.text == "head (index)"
    assert figure.layout.yaxis.title.text == "layer (index)"


def test_hover_names_the_head_and_gives_every_number():
    figure = layer_head_heatmap(
        HeadNumbers("score", VALUES), [HeadNumbers("sink rate", VALUES + 1, ".1%")]
    )
    assert figure.data[0].hovertemplate == (
        "<b>layer %{y}, head %{x}</b><br>score: %{customdata[0]:.3f}"
        "<br>sink rate: %{customdata[1]:.1%}<extra></extra>"
    )
    np.testing.assert_allclose(figure.data[0].customdata[1, 2], [0.6, 1.6], rtol=1e-6)


def test_scale_spans_the_numbers_and_diverges_only_around_a_zero():
    plain = layer_head_heatmap(HeadNumbers("score", VALUES))
    assert (plain.data[0].zmin, plain.data[0].zmax) == (0.1, 0.6)
    around = layer_head_heatmap(HeadNumbers("change", VALUES), zero=0.0)
    assert (around.data[0].zmin, around.data[0].zmax) == (-0.6, 0.6)
    assert _scale(plain) != _scale(around)


def test_numbers_that_are_all_missing_are_drawn_as_holes():
    figure = layer_head_heatmap(HeadNumbers("score", np.full((2, 2), np.nan)))
    assert np.isnan(figure.data[0].z).all()
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0.0, 1.0)
