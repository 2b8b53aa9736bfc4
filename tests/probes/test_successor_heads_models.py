"""Successor heads of real modules: the demo model, transformers' own blocks, every backend, a toy."""

import pytest
import torch

import workbench as wb
from probes.figures.successor_heads import finding
from probes.successor_heads import SuccessorHeadsConfig, measure_successor_heads
from probes.successor_heads_scores import TokenPath
from tests.models.agreement import LIBRARY_WARNINGS
from tests.probes.factored_successors import MONTHS, NO_TOKENS, NUMBERS, WEIGHTS
from tests.probes.planted_successors import WordTokenizer
from tests.zoo import tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.models.names import demo_folder

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]


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
