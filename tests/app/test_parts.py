"""The dashboard's parts on numbers worked by hand."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

import plotly.graph_objects as go
import torch

import workbench as wb
from app import models, playing, server
from app.components import compare_figures as compare
from app.components.arrays import array_of
from app.components.config_form import as_arguments, text_of
from app.components.figures import add_targets, is_head_map
from app.components.head_view import pattern_rows
from app.components.pickers import data_arguments, data_value
from app.server import ADDRESS
from probes.figures.heatmap import HeadNumbers, layer_head_heatmap
from workbench.errors import ConfigError
from workbench.models.base import Site


def head_map(values):
    return layer_head_heatmap(HeadNumbers("score (share)", np.asarray(values, dtype=float)))


def lines(**by_name):
    figure = go.Figure()
    for name, (x, y) in by_name.items():
        figure.add_scatter(x=x, y=y, name=name, mode="lines")
    return figure


def test_maps_are_subtracted_cell_by_cell_from_the_first():
    figures = {"a": head_map([[1, 2], [3, 4]]), "b": head_map([[1, 5], [3, 0]])}
    gap, note = compare.map_differences(figures)
    assert array_of(gap.data[0].z).tolist() == [[0, 3], [0, -4]]
    assert (gap.layout.coloraxis.cmin, gap.layout.coloraxis.cmax) == (-4, 4)
    assert note == "Each minus a."


def test_equal_maps_are_said_to_be_equal():
    figures = {"a": head_map([[1, 2]]), "b": head_map([[1, 2]])}
    assert "The maps are equal." in compare.map_differences(figures)[1]


def test_maps_of_another_size_have_no_difference_and_it_is_said():
    gap, note = compare.map_differences({"a": head_map([[1, 2]]), "b": head_map([[1], [2]])})
    assert gap is None
    assert "different sizes" in note


def test_maps_side_by_side_share_one_scale():
    drawn = compare.side_by_side({"a": head_map([[1, 2]]), "b": head_map([[np.nan, 7]])})
    assert (drawn.layout.coloraxis.cmin, drawn.layout.coloraxis.cmax) == (1, 7)
    assert len(drawn.data) == 2


def test_lines_of_the_same_name_and_x_are_subtracted():
    first = lines(up=([0, 1], [1, 2]), only=([0, 1], [5, 5]))
    other = lines(up=([0, 1], [4, 2]), moved=([0, 1], [0, 0]))
    gap, _ = compare.line_differences({"a": first, "b": other})
    assert [array_of(trace.y).tolist() for trace in gap.data] == [[3, 0]]


def test_lines_over_other_positions_are_not_subtracted():
    gap, note = compare.line_differences(
        {"a": lines(up=([0, 1], [1, 2])), "b": lines(up=([0, 2], [1, 2]))}
    )
    assert gap is None
    assert "no two lines" in note


def test_what_does_not_fit_in_a_comparison_is_counted():
    many = lines(**{f"line{number}": ([0], [number]) for number in range(40)})
    drawn, note = compare.overlaid({"a": many, "b": many})
    assert len(drawn.data) == compare.MOST_LINES
    assert note.startswith("20 lines are not drawn")


def test_figures_of_several_panels_are_not_laid_over_each_other():
    from plotly.subplots import make_subplots

    panels = make_subplots(1, 2).add_scatter(x=[0], y=[0], row=1, col=2)
    assert compare.kind_of(panels) == ""
    assert compare.kind_of(lines(up=([0], [1]))) == "lines"
    assert compare.kind_of(head_map([[1, 2]])) == "map"


def test_every_cell_of_a_head_map_can_be_clicked():
    figure = go.Figure(head_map([[1, 2, 3], [4, 5, 6]]))
    assert is_head_map(figure)
    add_targets(figure)
    points = list(zip(figure.data[-1].y, figure.data[-1].x, strict=True))
    assert points == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert array_of(figure.data[-1].customdata)[:, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_chosen_head_does_not_fade_the_marks_of_the_others():
    figure = head_map([[1, 2], [3, 4]])
    figure.add_scatter(x=[0], y=[1], mode="markers", name="sinks on every prompt")
    add_targets(figure)
    marks = next(trace for trace in figure.data if trace.name == "sinks on every prompt")
    assert marks.unselected.marker.opacity == 1


def test_no_tick_of_a_compared_map_lies_between_two_heads():
    figures = {"a": head_map([[1, 2], [3, 4]]), "b": head_map([[1, 2], [3, 5]])}
    for drawn in (compare.side_by_side(figures), compare.map_differences(figures)[0]):
        assert (drawn.layout.xaxis.dtick, drawn.layout.yaxis.dtick) == (1, 1)


def test_attention_that_moved_is_half_the_sum_of_differences():
    stock = np.array([[[0.5, 0.5, 0.0]]])
    edited = np.array([[[0.2, 0.5, 0.3]]])
    assert playing.moved(stock, edited)[0, 0] == pytest.approx(0.3)
    assert playing.moved(stock, stock)[0, 0] == 0


def test_pattern_rows_are_those_of_the_whole_pattern(tiny_folder):
    model = wb.load(str(tiny_folder))
    tokens = torch.arange(1, 25)[None]
    whole = model.capture(tokens, [Site("pattern", 1)])[Site("pattern", 1)][0]
    rows = pattern_rows(model, tokens, 1, [3, 10, 23])
    np.testing.assert_allclose(rows, whole[:, [3, 10, 23]].numpy(), atol=1e-5)


def test_probabilities_are_those_of_one_pass_over_the_answer(tiny_folder):
    model, heard = wb.load(str(tiny_folder)), []
    ids = playing.prompt_ids(model, "one two", 5)
    said = playing.continue_prompt(model, ids, 5, None, heard.append)
    assert heard[-1] == said.text
    assert len(heard) >= 5  # it was told while it grew
    logits = model.logits(torch.tensor([ids]))[0, -1]
    assert said.probability[0] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    assert said.candidates[0][0][1] == pytest.approx(said.probability[0], abs=1e-6)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.3, "0.3"), (1e-4, "0.0001"), ((1, 2), "1,2"), (True, "True"), ("a=b", "a=b")],
    ids=str,
)
def test_settings_are_written_as_the_command_line_reads_them(value, text):
    assert text_of(value) == text
    assert as_arguments({"name": value}) == (f"--set=name={text}",)


def test_domains_become_several_options_and_a_dict():
    both = "prose=builtin:natural, code=builtin:code"
    assert data_arguments(both) == ("--data=prose=builtin:natural", "--data=code=builtin:code")
    assert data_value(both) == {"prose": "builtin:natural", "code": "builtin:code"}
    assert data_arguments("my, file.txt") == ("--data=my, file.txt",)


def test_the_server_listens_here_only_and_tells_nobody():
    line = server.command(8501, browser=False)
    for option in (
        f"--server.address={ADDRESS}",
        "--server.enableXsrfProtection=true",
        "--browser.gatherUsageStats=false",
        "--client.showErrorDetails=none",
        "--server.allowedHosts=127.0.0.1",
    ):
        assert option in line
    assert ADDRESS == "127.0.0.1"


def test_a_taken_port_is_refused_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        taken.listen()
        with pytest.raises(ConfigError, match="--port must be free"):
            server.serve(tmp_path, taken.getsockname()[1], browser=False)


def test_tabs_share_one_loaded_model_and_use_it_one_at_a_time(tiny_folder, monkeypatch):
    from workbench.models import load as loading

    loads, load = [], loading.load
    monkeypatch.setattr(loading, "load", lambda name: loads.append(name) or load(name))
    models._load.clear()
    entered = threading.Event()

    def other_tab():
        with models.using(str(tiny_folder)) as model:
            entered.set()
            return model

    with ThreadPoolExecutor(1) as tabs:
        with models.using(str(tiny_folder)) as model:
            waiting = tabs.submit(other_tab)
            assert not entered.wait(0.5)
        assert waiting.result(60) is model
    assert loads == [str(tiny_folder)]
