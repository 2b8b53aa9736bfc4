"""The whole probe: planted weights, the demo model, every backend, and what it refuses."""

import math

import pytest
import torch

import workbench as wb
from probes.figures.successor_heads import figures, finding
from probes.successor_heads import SuccessorHeadsConfig, measure_successor_heads
from probes.successor_heads_scores import TokenPath
from probes.successor_heads_tokens import ROMAN as ROMAN_NUMERALS
from probes.successor_heads_tokens import SERIES, find_token_sets
from tests.models.agreement import LIBRARY_WARNINGS
from tests.probes.planted_successors import N_POS, PlantedWeights, WordTokenizer
from tests.zoo import tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.names import demo_folder

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

NO_TOKENS = torch.zeros(0, 0, dtype=torch.long)
QUICK = SuccessorHeadsConfig(sae_steps=20, sae_seeds=2)
WEIGHTS = SuccessorHeadsConfig(sae_steps=1, sae_seeds=1)

# Card section 10, checks 2 and 3, through the whole probe: rep = digit + tens + domain

NUMBERS = [f" {number}" for number in range(1, 101)]
NUMBER_WORDS = [f" {word}" for word in SERIES[1].items]
MONTHS = [f" {word}" for word in SERIES[5].items]
ROMAN = [f" {word}" for word in ROMAN_NUMERALS.items[:10]]
N_DIGITS, N_TENS, N_DOMAINS = 10, 11, 4


def factored(order=(0, 1, 2, 3)):
    """Heads by layer 0: digits move on; all is copied; noise; nothing is written."""
    words = [*NUMBERS, *NUMBER_WORDS, *MONTHS, *ROMAN]
    tokenizer = WordTokenizer(words)
    d_model = N_DIGITS + N_TENS + N_DOMAINS
    embed = torch.zeros(len(tokenizer.words), d_model)
    for domain, items in enumerate((NUMBERS, NUMBER_WORDS, MONTHS, ROMAN)):
        for index, word in enumerate(items, start=1):
            row = embed[tokenizer.ids[word]]
            row[index % 10] += 1
            row[N_DIGITS + index // 10] += 1
            row[N_DIGITS + N_TENS + domain] += 1
    rest = torch.eye(N_TENS + N_DOMAINS)
    turn = torch.block_diag(torch.eye(10).roll(1, dims=1), rest)
    noise = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(0))
    heads = torch.stack([turn, torch.eye(d_model), noise, 0 * turn])[list(order)]
    return PlantedWeights(tokenizer, embed, embed.T, heads[None])


@pytest.fixture(scope="module")
def result():
    config = SuccessorHeadsConfig(ln="none", forms="space")
    return measure_successor_heads(factored(), NO_TOKENS, config)


def test_the_factored_head_fails_exactly_at_carries(result):
    assert result.best == (0, 0)
    assert result.labels["task"] == ("numbers", "number words", "months")
    # Numbers: 10 carries of 99 pairs; words: 9 to ten and 19 to twenty; months: 9 to October, and
    # December, which the head does not send back to January.
    expected = torch.tensor([89 / 99, 17 / 19, 10 / 12])
    torch.testing.assert_close(result.score_by_task[:, 0, 0], expected)
    torch.testing.assert_close(result.score[0, 0], torch.tensor(116 / 130))
    assert result.score[0, 1] == 0.0
    assert result.score[0, 3] == 0.0, "a head that writes nothing has nothing but ties"
    assert result.metrics()["chance"] == pytest.approx(3 / 130)
    assert result.metrics()["best_macro_score"] == pytest.approx(expected.mean().item())


def test_planted_digits_are_found(result):
    planted = torch.eye(N_DIGITS + N_TENS + N_DOMAINS)[:10]
    assert result.mod10_features.shape == (10, 25)
    cosine = torch.nn.functional.cosine_similarity(result.mod10_features, planted, dim=1)
    assert cosine.min() > 0.9
    metrics = result.metrics()
    assert metrics["probe_accuracy"] == 1.0
    assert metrics["probe_tokens"] == 32
    assert metrics["probe_accuracy_held_out_tens"] == 1.0
    assert metrics["feature_probe_cosine"] > 0.9
    assert metrics["feature_names_next"] == 1.0
    assert metrics["factoring_accuracy"] == 1.0
    assert metrics["factoring_accuracy_roman"] == 1.0


def test_steering_the_planted_head(result):
    row = result.labels["source"].index("numbers: 35")
    assert result.steered_index[row, 7] == 38
    assert result.steering_table[row, 7] == 1.0
    assert result.steering_table[row, 9] == 0.0
    # Sources with their own digit put in again do not count; digit 9 needs a carry.
    assert result.metrics()["steering_20_29"] == pytest.approx(81 / 90)
    assert result.steering_success.shape == (3,)
    assert result.steering_by_scale.shape == (4, 3)
    torch.testing.assert_close(result.steering_by_scale[1], result.steering_success)
    assert result.steering_success[0] > 0.8


def test_a_weak_push_steers_less(result):
    assert result.steering_by_scale[0, 0] < 0.5 < result.steering_by_scale[1, 0]


def test_permuted_heads_have_permuted_scores(result):
    config = SuccessorHeadsConfig(ln="none", forms="space", sae_steps=1, sae_seeds=1)
    order = [3, 1, 0, 2]
    found = measure_successor_heads(factored(order), NO_TOKENS, config)
    assert found.best == (0, 2)
    torch.testing.assert_close(found.score, result.score[:, order])
    torch.testing.assert_close(found.greater_than_bias, result.greater_than_bias[:, order])


def test_random_weights_have_no_successor_head():
    model = factored()
    generator = torch.Generator().manual_seed(1)
    embed = torch.randn(model.weight("W_E").shape, generator=generator)
    random = PlantedWeights(
        model.tokenizer, embed, embed.T, torch.randn(2, 4, 25, 25, generator=generator)
    )
    found = measure_successor_heads(random, NO_TOKENS, QUICK)
    metrics = found.metrics()
    assert metrics["best_score"] < 0.15
    assert found.score.mean() == pytest.approx(metrics["chance"], abs=0.02)
    assert found.greater_than_bias.abs().mean() < 0.15
    assert metrics["probe_accuracy"] < 0.35
    assert metrics["factoring_accuracy"] < 0.2
    assert metrics["list_attention"] == 0.0, "the planted pattern attends to itself alone"


def test_every_metric_is_a_number_and_every_label_fits(result):
    metrics = result.metrics()
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert {"best_layer", "best_head", "best_score", "second_score"} <= set(metrics)
    assert {"probe_accuracy", "feature_probe_cosine"} <= set(metrics)
    assert len(result.labels["source"]) == len(result.steering_table)
    assert len(result.labels["filter"]) == len(result.filter_counts)
    assert len(result.labels["task"]) == len(result.n_pairs)
    table = result.table()
    assert {len(column) for column in table.values()} == {4}
    assert table["score months"][0] == pytest.approx(10 / 12)


def test_figures_show_what_was_measured(result):
    drawn = figures(result)
    assert set(drawn) == {
        "heads",
        "tasks",
        "filter",
        "attention",
        "steering",
        "steering_by_scale",
        "digit_features",
        "probe",
    }
    for figure in drawn.values():
        assert "n = " in figure.layout.title.subtitle.text
        titles = [axis.title.text for axis in figure.select_xaxes()]
        titles += [axis.title.text for axis in figure.select_yaxes()]
        assert all("(" in title for title in titles), titles
    heat = drawn["heads"].data[0]
    assert heat.z[0][0] == pytest.approx(116 / 130)
    bars = drawn["tasks"].data[0]
    assert bars.name == "L0H0"
    assert list(bars.y) == pytest.approx([89 / 99, 17 / 19, 10 / 12])
    assert "L0H0 finds the next item of 89.2% of 130 pairs" in finding(result)
    steering = drawn["steering"].data[0]
    row = list(steering.y).index("numbers: 35")
    assert steering.z[row][7] == 1.0
    assert steering.customdata[row][7] == 38


# The demo model, and the trainer's own measure


@pytest.fixture(scope="module")
def demo():
    if not (demo_folder() / "config.json").is_file():
        pytest.skip("needs the demo model")
    return wb.load("demo")


def test_scores_equal_those_of_the_demo_models_trainer(demo):
    from toy_tasks.language_figures import series_tokens, succession_score

    config = SuccessorHeadsConfig(forms="space", sae_steps=1, sae_seeds=1)
    found = measure_successor_heads(demo, NO_TOKENS, config)
    pooled, by_task = succession_score(demo.model, series_tokens(demo.tokenizer))
    torch.testing.assert_close(found.score, pooled)
    torch.testing.assert_close(found.score_by_task, by_task)
    assert found.best == (2, 0)
    assert found.metrics()["best_score"] == pytest.approx(100 / 190)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("residual", [False, True])
def test_scores_equal_brute_force_on_transformers_own_modules(family, residual):
    letters = [f" {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    tokenizer = WordTokenizer(letters)
    module = tiny_model(family)
    config = SuccessorHeadsConfig(include_residual=residual)
    found = measure_successor_heads(wb.wrap(module, tokenizer), NO_TOKENS, config)
    ids = torch.tensor([tokenizer.ids[word] for word in letters])
    with torch.no_grad():
        embedded = module.get_input_embeddings().weight[ids]
        base = module.base_model.layers
        out = base[0].mlp(base[0].post_attention_layernorm(embedded))
        out = out + embedded if residual else out
        for layer in range(2):
            for head in range(4):
                written = _through_head(base[layer], out, head, family)
                logits = (written @ module.get_output_embeddings().weight.T)[:, ids]
                hits = 0
                for row in range(25):
                    # The model's padding token is among them: all its logits are 0, a tie.
                    others = [logits[row, k] for k in range(1, 26) if k != row + 1]
                    hits += all(logits[row, row + 1] > other for other in others)
                assert found.score[layer, head].item() == pytest.approx(hits / 25)


def _through_head(block, x, head, family):
    """What one head writes when it attends to x alone; 4 heads of 8, llama with 2 value heads."""
    rows = slice(8 * head, 8 * head + 8)
    if family == "gpt_neox":
        weight = block.attention.query_key_value.weight[24 * head + 16 : 24 * head + 24]
        return x @ weight.T @ block.attention.dense.weight[:, rows].T
    group = slice(8 * (head // 2), 8 * (head // 2) + 8)
    values = x @ block.self_attn.v_proj.weight[group].T
    return values @ block.self_attn.o_proj.weight[:, rows].T


# Backends


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_backends_agree(tiny_folder, backend):
    expected = measure_successor_heads(wb.load(str(tiny_folder)), NO_TOKENS, WEIGHTS)
    other = wb.load(str(tiny_folder), backend=backend)
    found = measure_successor_heads(other, NO_TOKENS, WEIGHTS)
    torch.testing.assert_close(found.score, expected.score)
    torch.testing.assert_close(
        found.greater_than_bias, expected.greater_than_bias, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(found.list_attention, expected.list_attention)
    assert expected.labels["task"] == ("numbers", "letters")


def test_a_toy_model_with_a_tokenizer():
    tokenizer = WordTokenizer([*NUMBERS, *MONTHS])
    config = ToyModelConfig(
        d_vocab=len(tokenizer.words), d_model=32, d_mlp=64, n_heads=2, n_layers=2, n_ctx=32
    )
    model = wb.wrap(make_model(config, seed=0))
    model.tokenizer = tokenizer
    found = measure_successor_heads(model, NO_TOKENS, WEIGHTS)
    assert found.score.shape == (2, 2)
    assert found.score_by_task.shape == (2, 2, 2)
    assert found.list_attention.shape == (2, 2)


def test_lists_are_attended_to_where_they_are(demo):
    found = measure_successor_heads(demo, NO_TOKENS, WEIGHTS)
    ids = demo.tokenizer(" Monday, Tuesday, Wednesday,")["input_ids"]
    assert len(ids) == 7
    pattern = demo.capture(torch.tensor([ids]), ["L2.pattern"])["L2.pattern"]
    assert pattern[0, 0, -1, 5] > 0.5
    assert found.list_attention[2, 0] > 0.5


# What is absent, and what is refused


def test_what_a_tokenizer_cannot_show_is_absent(tiny_folder):
    found = measure_successor_heads(wb.load(str(tiny_folder)), NO_TOKENS, WEIGHTS)
    assert found.mod10_features is None
    assert found.steering_success is None
    assert found.direct_effect is None
    assert "probe_accuracy" not in found.metrics()
    assert "there are 0 with 0 and 9 numbers in all" in found.labels["left_out"][0]
    assert "features and steering left out" in finding(found)
    assert "steering" not in figures(found)


def test_without_an_ordered_series_there_is_no_greater_than_bias():
    tokenizer = WordTokenizer(MONTHS)
    model = wb.wrap(tiny_model("gpt2"), tokenizer)
    found = measure_successor_heads(model, NO_TOKENS, WEIGHTS)
    assert found.greater_than_bias is None
    assert found.wrong_above is None
    assert "greater_than_bias" not in found.metrics()
    assert "factoring_accuracy" not in found.metrics()
    assert all(figure.data for figure in figures(found).values())


def test_a_model_of_one_head_has_no_second_score():
    model = factored(order=(0,))
    found = measure_successor_heads(model, NO_TOKENS, WEIGHTS)
    assert "second_score" not in found.metrics()


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(DataError, match=r"has none; give one with wb\.wrap"):
        measure_successor_heads(wb.wrap(tiny_model("gpt2")), NO_TOKENS, WEIGHTS)


def test_a_model_without_heads_is_refused():
    model = wb.wrap(tiny_model("mamba"), WordTokenizer(MONTHS))
    with pytest.raises(CapabilityError, match="probe successor-heads needs attention"):
        wb.run("successor-heads", model)
    with pytest.raises(CapabilityError, match="needs attention heads"):
        measure_successor_heads(model, NO_TOKENS, WEIGHTS)


def test_a_tokenizer_without_series_is_refused():
    model = wb.wrap(tiny_model("gpt2"), WordTokenizer([" Monday"]))
    with pytest.raises(DataError, match=r"as single tokens; it has none: numbers \(space\) 0 of"):
        measure_successor_heads(model, NO_TOKENS, WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forms": "upper"}, "forms must be one of all, space, bare"),
        ({"ln": "ln1"}, "ln must be one of ln2, none"),
        ({"sae_features": 9}, "sae_features must be at least 10"),
        ({"steering_scale": 0.0}, "steering_scale must be above 0"),
    ],
    ids=["forms", "ln", "features", "scale"],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SuccessorHeadsConfig(**settings)


def test_options_of_the_path_change_the_numbers(demo):
    bare = measure_successor_heads(
        demo, NO_TOKENS, SuccessorHeadsConfig(mlp0=False, sae_steps=1, sae_seeds=1)
    )
    whole = measure_successor_heads(demo, NO_TOKENS, WEIGHTS)
    assert bare.score[2, 0] < 0.15 < whole.score[2, 0]
    assert "embedding without the first MLP" in finding(bare)
    assert SuccessorHeadsConfig(ln="none", include_residual=True).path == TokenPath(
        True, False, True
    )


# Going on in the middle


def test_a_killed_run_goes_on_where_it_was():
    kept, computed = {}, []

    class KilledError(Exception):
        pass

    def keep(limit):
        def get(name, compute):
            if name not in kept:
                if len(computed) == limit:
                    raise KilledError
                computed.append(name)
                kept[name] = compute()
            return kept[name]

        return Context(keep=get)

    with pytest.raises(KilledError):
        measure_successor_heads(factored(), NO_TOKENS, QUICK, keep(2))
    assert computed == ["layer-0", "autoencoder-0"]
    found = measure_successor_heads(factored(), NO_TOKENS, QUICK, keep(100))
    assert computed == ["layer-0", "autoencoder-0", "autoencoder-1", "lists-0"]
    whole = measure_successor_heads(factored(), NO_TOKENS, QUICK)
    assert found.metrics() == whole.metrics()
    assert torch.equal(found.mod10_features, whole.mod10_features)


def test_seeds_give_other_features_and_the_same_scores():
    one, two = (
        measure_successor_heads(factored(), NO_TOKENS, QUICK, Context(seed=seed)) for seed in (0, 1)
    )
    assert torch.equal(one.score, two.score)
    assert not torch.equal(one.mod10_features, two.mod10_features)


def test_a_result_survives_the_store(tmp_path, tiny_folder):
    settings = {"sae_steps": 1, "sae_seeds": 1, "store": tmp_path}
    first = wb.run("successor-heads", str(tiny_folder), **settings)
    second = wb.run("successor-heads", str(tiny_folder), **settings)
    assert second.cached
    assert second.metrics() == first.metrics()
    assert second.tasks == ["numbers", "letters"]
    assert "mod10_features" not in second.arrays
    assert second.figures().keys() == first.figures().keys()


def test_the_planted_lists_fit_the_model():
    model = factored()
    assert model.spec.n_ctx == N_POS
    sets = find_token_sets(model.tokenizer, "space", "m")
    assert sets.tasks == ("numbers", "number words", "months")
