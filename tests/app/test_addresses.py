"""Every selection is in the URL: wrong addresses are told, right ones survive a reload."""

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("plotly")

from app import jobs
from tests.app.opening import key_of, open_page, told

pytestmark = pytest.mark.usefixtures("fresh_caches")

WRONG = [
    ("attention-sinks", {"key": "nonsense"}, "key"),
    ("attention-sinks", {"key": "0" * 64}, "key"),
    ("attention-sinks", {"figure": "no-such"}, "no figure is called"),
    ("attention-sinks", {"head": "L99H99"}, "no head is called"),
    ("attention-sinks", {"job": "../../etc/passwd"}, "job must be the id"),
    ("attention-sinks", {"s.threshold": "many"}, "threshold must be a number"),
    ("attention-sinks", {"seed": "-1"}, "seed must be a whole number"),
    ("attention-sinks", {"figur": "x"}, "Did you mean 'figure'"),
    ("overview", {"model": "nobody"}, "no model is called"),
    ("compare", {"keys": "zz"}, "at least 6"),
    ("compare", {"keys": ",".join([key_of("one")[:12]] * 7)}, "at most 6 results"),
    ("compare", {"probe": "attention-sink"}, "Did you mean 'attention-sinks'"),
    ("jobs", {"job": "x"}, "job must be the id"),
    ("jobs", {"state": "lost"}, "no state is called"),
    ("training", {"toy": "bigram"}, "no toy is called"),
    ("sweeps", {"sweep": "../../etc"}, "sweep must be the key"),
    ("attention-sinks", {"edited": "perhaps"}, "no edited is called"),
    ("attention-sinks", {"edited": "yes", "gamma": "-3"}, "gamma must be a number from 0.05 to 4"),
    ("attention-sinks", {"edited": "yes", "heads": "L9H9"}, "no head of this model is called"),
]


@pytest.mark.parametrize(("page", "query", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_address_says_so(page, query, words, full, store_path):
    jobs.jobs_folder(store_path).mkdir(parents=True)
    tab = open_page(page, **query)
    assert not tab.exception
    assert words in told(tab)


def test_selections_survive_a_reload(full):
    tab = open_page("attention-sinks")
    figure = next(box for box in tab.selectbox if box.label == "Figure")
    second = figure.options[1].replace(" ", "_")
    figure.set_value(second).run()
    threshold = next(box for box in tab.number_input if box.label.startswith("threshold"))
    threshold.set_value(0.5).run()
    query = dict(tab.query_params)
    assert query["figure"] == second
    assert query["s.threshold"] == "0.5"
    again = open_page("attention-sinks", **query)
    assert next(box.value for box in again.selectbox if box.label == "Figure") == second
    assert next(box.value for box in again.number_input if box.label.startswith("threshold")) == 0.5
    assert dict(again.query_params) == query


def test_a_complaint_goes_when_something_is_chosen(full):
    tab = open_page("attention-sinks", figure="no-such")
    assert "no figure is called" in told(tab)
    figure = next(box for box in tab.selectbox if box.label == "Figure")
    figure.set_value(figure.options[1].replace(" ", "_")).run()
    assert "no figure is called" not in told(tab)


def test_a_choice_that_comes_with_an_old_url_does_not_undo_the_last_one(full):
    """A quick typist: the browser sends the second choice before it has the URL of the first."""
    tab = open_page("attention-sinks")

    def numbers():
        return {box.label: box.value for box in tab.number_input}

    next(box for box in tab.number_input if box.label == "Seed").set_value(7).run()
    assert dict(tab.query_params)["seed"] == "7"
    del tab.query_params["seed"]
    next(box for box in tab.number_input if box.label == "Prompts at most").set_value(3).run()
    assert (numbers()["Seed"], numbers()["Prompts at most"]) == (7, 3)
    query = dict(tab.query_params)
    assert (query["seed"], query["limit"]) == ("7", "3")


def test_going_back_in_the_browser_takes_a_choice_back(full):
    tab = open_page("attention-sinks")
    next(box for box in tab.number_input if box.label == "Seed").set_value(7).run()
    del tab.query_params["seed"]
    tab.run()
    assert next(box.value for box in tab.number_input if box.label == "Seed") is None
    tab.query_params["seed"] = "7"
    tab.run()
    assert next(box.value for box in tab.number_input if box.label == "Seed") == 7
