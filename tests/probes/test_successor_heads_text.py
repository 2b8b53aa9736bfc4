"""Direct-effect mean ablation against a hand-made one, and the categories of what heads win."""

import pytest
import torch

import workbench as wb
from probes.figures.successor_heads import figures
from probes.successor_heads import SuccessorHeadsConfig, measure_successor_heads
from probes.successor_heads_attention import list_attention, list_prompts
from probes.successor_heads_categories import (
    CATEGORIES,
    categorise,
    category,
    is_acronym,
    is_greater,
    is_next,
)
from probes.successor_heads_text import ablate_on_text, most_attended, winners
from probes.successor_heads_tokens import find_token_sets
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.probes.planted_successors import WordTokenizer
from tests.zoo import padded, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.errors import CapabilityError, DataError
from workbench.testing import PlantedModel, identity_pattern

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]

# Categories


@pytest.mark.parametrize(
    ("word", "after", "expected"),
    [
        ("7", "8", True),
        ("1999", "2000", True),
        ("7", "9", False),
        ("Monday", "Tuesday", True),
        ("sunday", "Monday", True),
        ("tenth", "first", False),
        ("Dec", "Jan", True),
        ("May", "June", True),
        ("May", "Jun", True),
        ("A", "B", True),
        ("a", "b", False),
        ("IV", "V", True),
        ("seven", "8", False),
        ("", "", False),
    ],
)
def test_what_follows_what(word, after, expected):
    assert is_next(word, after) is expected


@pytest.mark.parametrize(
    ("word", "than", "expected"),
    [("45", "32", True), ("32", "45", False), ("five", "two", True), ("Friday", "Monday", False)],
)
def test_what_is_greater(word, than, expected):
    assert is_greater(word, than) is expected


@pytest.mark.parametrize(
    ("word", "of", "expected"),
    [
        ("D", "Defense", True),
        ("DA", "Defense", True),
        ("Da", "Defense", False),
        ("D", "D", False),
        ("E", "Defense", False),
        ("DEFENS", "Defense", False),
        ("", "A", False),
    ],
)
def test_what_is_an_acronym(word, of, expected):
    assert is_acronym(word, of) is expected


def test_the_first_category_that_applies_is_taken():
    assert category("8", ["8", "7"]) == "succession"
    assert category("9", ["9", "7"]) == "copying"
    assert category("9", ["x", "7"]) == "greater-than"
    assert category("N", ["National"]) == "acronym"
    assert category("dog", ["cat", ""]) == "other"
    assert category("", [""]) == "other"


def test_shares_by_five_tokens_and_by_one():
    tokenizer = WordTokenizer([" 7", " 8", " 9", " cat"])
    seven, eight, nine, cat = 2, 3, 4, 5
    correct = torch.tensor([eight, eight, nine, cat])
    seen = torch.tensor([[seven, cat, -1], [cat, seven, -1], [cat, nine, seven], [seven, -1, -1]])
    shares = categorise(tokenizer, correct, seen)
    by = dict(zip(CATEGORIES, shares.T.tolist(), strict=True))
    assert by["succession"] == [0.5, 0.25]
    assert by["copying"] == [0.25, 0.0]
    assert by["other"] == [0.25, 0.75]
    assert categorise(tokenizer, correct[:0], seen[:0]) is None


def test_most_attended_never_names_what_a_query_cannot_see():
    pattern = torch.tensor([[[1.0, 0, 0], [0.3, 0.7, 0], [0.2, 0.0, 0.8]]])
    assert most_attended(pattern)[0].tolist() == [
        [0, -1, -1, -1, -1],
        [1, 0, -1, -1, -1],
        [2, 0, -1, -1, -1],
    ]


def test_no_head_wins_where_every_ablation_helps():
    effect = torch.tensor([[0.1, 0.3, -1.0], [-0.5, -0.1, -0.2], [0.0, 0.0, 0.0]])
    assert winners(effect).tolist() == [1, -1, -1]


# The ablation, against one made by hand from a GPT-2's own modules


def by_hand(module, tokens, layer, head):
    """Fall of the correct logit and rise of the loss, position by position."""
    seen = {}
    width = slice(8 * head, 8 * head + 8)
    attention = module.transformer.h[layer].attn.c_proj
    hook = attention.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
    end = module.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    with torch.no_grad():
        logits = module(tokens).logits
        hook.remove()
        end.remove()
        z = seen["z"][..., width]
        written = (z - z.mean(dim=(0, 1))) @ attention.weight[width]
        changed = module.lm_head(module.transformer.ln_f(seen["h"] - written))
    target = tokens[:, 1:, None]
    fall = (logits - changed)[:, :-1].gather(2, target)[..., 0]
    loss = [-each[:, :-1].log_softmax(-1).gather(2, target)[..., 0] for each in (logits, changed)]
    return fall, loss[1] - loss[0]


def tokenizer_of_numbers():
    return WordTokenizer([f" {number}" for number in range(1, 100)])


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(4, 10)


@pytest.fixture(scope="module")
def effects(tokens):
    model = wb.wrap(tiny_model("gpt2"), tokenizer_of_numbers())
    return ablate_on_text(model, tokens, (1, 2), Context())


def test_effects_equal_those_made_by_hand(effects, tokens):
    module = tiny_model("gpt2")
    falls = [
        by_hand(module, tokens, layer, head)[0].flatten() for layer in (0, 1) for head in range(4)
    ]
    fall = torch.stack(falls)
    expected = fall.mean(dim=1).view(2, 4)
    torch.testing.assert_close(effects.direct_effect, expected, rtol=1e-3, atol=1e-4)
    most, winner = fall.max(dim=0)
    wins = torch.bincount(winner[most > 0], minlength=8) / len(winner)
    torch.testing.assert_close(effects.winning_share, wins.view(2, 4))
    assert effects.n_prefixes == 36
    assert effects.n_winning == int(((winner == 6) & (most > 0)).sum()) > 0
    _, loss = by_hand(module, tokens, 1, 2)
    assert effects.loss_increase == pytest.approx(loss.mean().item(), abs=1e-4)


def test_categories_are_those_of_the_patterns(effects, tokens):
    module = tiny_model("gpt2", attn_implementation="eager")
    falls = torch.stack(
        [by_hand(module, tokens, layer, head)[0] for layer in (0, 1) for head in range(4)]
    )
    most, winner = falls.max(dim=0)
    with torch.no_grad():
        pattern = module(tokens, output_attentions=True).attentions[1][:, 2]
    tokenizer = tokenizer_of_numbers()
    counts = torch.zeros(2, len(CATEGORIES))
    for row, pos in ((winner == 6) & (most > 0)).nonzero().tolist():
        order = pattern[row, pos, : pos + 1].argsort(descending=True)[:5].tolist()
        words = [tokenizer.decode([int(tokens[row, k])]).strip() for k in order]
        correct = tokenizer.decode([int(tokens[row, pos + 1])]).strip()
        counts[0, CATEGORIES.index(category(correct, words))] += 1
        counts[1, CATEGORIES.index(category(correct, words[:1]))] += 1
    torch.testing.assert_close(effects.winning_categories, counts / effects.n_winning)


def test_batches_do_not_change_the_numbers(effects, tokens):
    model = wb.wrap(tiny_model("gpt2"), tokenizer_of_numbers())
    parts = ablate_on_text(model, tokens, (1, 2), Context(batch_size=1))
    torch.testing.assert_close(parts.direct_effect, effects.direct_effect, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.winning_categories, effects.winning_categories)
    assert parts.loss_increase == pytest.approx(effects.loss_increase, abs=1e-5)


def test_the_order_of_prompts_does_not_matter(effects, tokens):
    model = wb.wrap(tiny_model("gpt2"), tokenizer_of_numbers())
    turned = ablate_on_text(model, tokens.flip(0), (1, 2), Context())
    torch.testing.assert_close(turned.direct_effect, effects.direct_effect, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned.winning_share, effects.winning_share)


def test_padding_adds_no_prefix(tokens):
    model = wb.wrap(tiny_model("llama"), tokenizer_of_numbers())
    cut, mask = padded(tokens, [6, 6, 6, 6], "right")
    together = ablate_on_text(model, cut, (0, 0), Context(attention_mask=mask))
    alone = ablate_on_text(model, tokens[:, :6], (0, 0), Context())
    assert together.n_prefixes == alone.n_prefixes == 20
    torch.testing.assert_close(together.direct_effect, alone.direct_effect, rtol=1e-3, atol=1e-4)
    assert together.loss_increase == pytest.approx(alone.loss_increase, abs=1e-4)


def test_a_head_that_always_writes_the_same_wins_nothing():
    module = tiny_model("gpt2")
    with torch.no_grad():
        # Its values are the bias alone, whatever is attended to.
        module.transformer.h[0].attn.c_attn.weight[:, 64 + 8 : 64 + 16] = 0.0
    model = wb.wrap(module, tokenizer_of_numbers())
    found = ablate_on_text(model, random_tokens(3, 10), (0, 1), Context())
    assert found.direct_effect[0, 1].abs() < 1e-4
    assert found.winning_share[0, 1] == 0
    assert found.winning_categories is None
    assert found.loss_increase == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("through", [through_bridge, through_nnsight], ids=["bridge", "nnsight"])
def test_backends_agree(effects, tokens, through):
    model = through(tiny_model("gpt2", attn_implementation="eager"))
    model.tokenizer = tokenizer_of_numbers()
    found = ablate_on_text(model, tokens, (1, 2), Context(batch_size=2))
    torch.testing.assert_close(found.direct_effect, effects.direct_effect, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.winning_categories, effects.winning_categories)
    assert found.loss_increase == pytest.approx(effects.loss_increase, abs=1e-4)


def test_a_toy_model(tokens):
    config = ToyModelConfig(d_vocab=101, d_model=32, d_mlp=64, n_heads=2, n_layers=2, n_ctx=32)
    model = wb.wrap(make_model(config, seed=0))
    model.tokenizer = tokenizer_of_numbers()
    found = ablate_on_text(model, tokens, (0, 1), Context())
    assert found.direct_effect.shape == (2, 2)
    assert found.winning_share.sum() <= 1


# In the probe


def test_prompts_add_their_arrays_and_numbers(tokens):
    model = wb.wrap(tiny_model("gpt2"), tokenizer_of_numbers())
    config = SuccessorHeadsConfig(sae_steps=1, sae_seeds=1)
    found = measure_successor_heads(model, tokens, config)
    assert found.metrics()["n_prefixes"] == 36
    assert found.direct_effect.shape == found.winning_share.shape == (2, 4)
    assert {"text"} <= set(figures(found))
    assert found.labels["category"] == CATEGORIES
    assert "winning_share" in found.table()


# Attention in lists


def test_lists_worked_by_hand():
    tokenizer = WordTokenizer([" Monday", " Tuesday", " Wednesday", " Thursday"])
    sets = find_token_sets(tokenizer, "all", "m")
    prompts, item = list_prompts(tokenizer, sets)
    assert [tokenizer.decode(row) for row in prompts.tolist()] == [
        " Monday, Tuesday, Wednesday,",
        " Tuesday, Wednesday, Thursday,",
    ]
    assert item == 4


def test_list_attention_reads_the_last_item_from_the_end():
    tokenizer = WordTokenizer([" Monday", " Tuesday", " Wednesday", " Thursday"])
    sets = find_token_sets(tokenizer, "all", "m")
    pattern = identity_pattern(6).repeat(2, 1, 3, 1, 1)
    pattern[:, 0, 1, 5] = torch.tensor([0, 0, 0, 0, 1.0, 0])
    pattern[0, 0, 2, 5] = torch.tensor([0.5, 0, 0, 0, 0.5, 0])
    model = PlantedModel(pattern)
    model.tokenizer = tokenizer
    found = list_attention(model, sets, Context())
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0, 0.25]]))


# Refusals


def test_too_few_prompts_are_refused_with_how_many():
    model = wb.wrap(tiny_model("gpt2"), tokenizer_of_numbers())
    config = SuccessorHeadsConfig(sae_steps=1, sae_seeds=1)
    with pytest.raises(DataError, match=r"at least 2 prompts.*got 1"):
        measure_successor_heads(model, random_tokens(1, 10), config)


def test_a_prompt_of_one_token_is_refused():
    model = wb.wrap(tiny_model("gpt2"), tokenizer_of_numbers())
    cut, mask = padded(random_tokens(3, 10), [5, 1, 7], "right")
    with pytest.raises(DataError, match=r"at least 2 tokens a prompt.*prompt 1 has 1"):
        ablate_on_text(model, cut, (0, 0), Context(attention_mask=mask))


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_heads_behind_a_norm_are_refused(family, tokens):
    model = wb.wrap(tiny_model(family), tokenizer_of_numbers())
    with pytest.raises(CapabilityError, match="normalises what they write"):
        ablate_on_text(model, tokens, (0, 0), Context())


def test_a_model_that_cannot_be_edited_is_refused(tokens):
    model = PlantedModel(identity_pattern(10).repeat(4, 1, 1, 1, 1))
    with pytest.raises(CapabilityError, match=r"needs edits, which planted on planted"):
        ablate_on_text(model, tokens, (0, 0), Context())
