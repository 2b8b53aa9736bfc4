"""The model that is shipped: measured here anew, by another way than the trainer's."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import workbench
from toy_tasks.language_figures import series_tokens, succession_score
from toy_tasks.language_series import (
    CYCLIC,
    SERIES,
)

SHIPPED = Path(workbench.__file__).parent / "assets" / "demo"

SINK_RATE = 0.18
SUCCESSION = 0.52
CONTINUATIONS = [
    (" Monday, Tuesday,", " Wednesday"),
    (" 37, 38, 39,", " 40"),
    (" March, April, May,", " June"),
    (" third, fourth, fifth,", " sixth"),
    (" Sat | Sun |", " Mon"),
]
"""What docs/demo_model.md promises of the shipped model."""


@pytest.fixture(scope="module")
def shipped() -> tuple[torch.nn.Module, object]:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(SHIPPED)


def test_shipped_files_are_complete_and_small() -> None:
    names = {path.name for path in SHIPPED.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12_000_000
    assert all(
        weight.isfinite().all() for weight in load_file(SHIPPED / "model.safetensors").values()
    )


def test_shipped_tokenizer_puts_bos_first_unless_told_not_to(shipped: tuple) -> None:
    _, tokenizer = shipped
    with_bos = tokenizer("hello").input_ids
    assert with_bos[0] == tokenizer.bos_token_id
    assert with_bos[1:] == tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer.bos_token_id not in with_bos[1:]


def test_shipped_tokenizer_gives_text_back(shipped: tuple) -> None:
    _, tokenizer = shipped
    text = "Na\u00efve caf\u00e9, 37 \u20ac;\n\tdef f(x): return 'x'\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_every_item_of_the_series_is_one_token(shipped: tuple) -> None:
    _, tokenizer = shipped
    tokens = series_tokens(tokenizer)
    assert [len(tokens[name]) for name in SERIES] == [100, 20, 10, 7, 7, 12, 12, 26]
    for number in range(1, 101):
        assert len(tokenizer(str(number), add_special_tokens=False).input_ids) == 1


PROMPTS = (
    "The museum stands on a low hill above the harbour. It was built in 1904 as a customs "
    "house, and for sixty years every barrel and crate that came ashore was weighed in its "
    "long hall. When the port moved south the building was left empty, until a group of "
    "fishermen asked the city to let them keep their boats and nets in it.",
    "When she opened the door the dog was already waiting, with one ear up and a shoe in its "
    "mouth. She laughed, put down the basket of apples, and sat beside it on the step. "
    "Nobody had written for a month, and the road to the village was white with snow, but "
    "the evening was quiet and there was bread in the oven.",
    "KING:\nWhat news, my lord? Speak plainly, for the night is short and I have little "
    "patience.\n\nMESSENGER:\nThe ships are lost, my liege, and with them all the men that "
    "sailed from the northern coast. The wind turned on them before the dawn.\n\nKING:\nThen we "
    "must hold the bridge alone, and trust to God and to our walls.",
    "Members of the Congress, my fellow citizens: we meet tonight in a time of hope and of "
    "trial. Our farms have given more than in any year before, and our schools are open to "
    "every child. Yet too many families cannot find work, and too many of the sick are not "
    "cared for. I ask you to join with me to change that.",
    "def count_words(text):\n    counts = {}\n    for word in text.split():\n        word = "
    "word.lower()\n        if word not in counts:\n            counts[word] = 0\n        "
    "counts[word] += 1\n    return counts\n\ndef longest(words):\n    best = ''\n    for word in "
    "words:\n        if len(word) > len(best):\n            best = word\n    return best",
    "The grey heron is a tall wading bird that lives beside lakes, rivers and marshes across "
    "Europe and Asia. It eats fish, frogs and small mammals, which it hunts by standing "
    "quite still in shallow water. The nest, a large heap of sticks, is used by the same "
    "pair for many years and grows with each season.",
    "I had called upon my old friend one cold morning in the autumn of last year and found "
    'him deep in talk with a stout, red-faced gentleman who held a letter in his hand. "You '
    'come at the right time," said he. "Our visitor has lost a thing of no value, and yet he '
    'tells me that three men have tried to buy it."',
    "The band was formed in Leeds in 1987 by two brothers and a friend from school. Their "
    "first record was made in a kitchen and sold at concerts, but the second reached the "
    "charts in four countries. After a long tour the singer left to study law, and the "
    "others went on under another name until the end of the next decade.",
)
"""Written for this test, in the manner of what the model was trained on."""


@torch.no_grad()
def test_shipped_model_has_attention_sinks_on_natural_text(shipped: tuple) -> None:
    model, tokenizer = shipped
    rows = [tokenizer(prompt).input_ids[:64] for prompt in PROMPTS]
    assert {len(row) for row in rows} == {64}
    patterns = model(torch.tensor(rows), output_attentions=True).attentions
    alpha = torch.stack([pattern.sum(dim=2)[..., 0] / 64 for pattern in patterns])
    sink_rate = (alpha > 0.3).float().mean().item()
    assert sink_rate > SINK_RATE
    fifth = torch.stack([pattern.sum(dim=2)[..., 4] / 60 for pattern in patterns])
    assert (fifth > 0.3).float().mean().item() < sink_rate / 4


@torch.no_grad()
def test_shipped_model_has_a_head_that_does_succession(shipped: tuple) -> None:
    scores = hits_by_head(*shipped)
    best, second = scores.flatten().topk(2).values.tolist()
    assert best > SUCCESSION
    assert second < best
    model, tokenizer = shipped
    pooled, _ = succession_score(model, series_tokens(tokenizer))
    torch.testing.assert_close(pooled, scores)


def hits_by_head(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    """Score every head, one pair at a time."""
    W_E, W_U, blocks = model.transformer.wte.weight, model.lm_head.weight, model.transformer.h
    n_heads, d_model = model.config.n_head, model.config.n_embd
    d_head = d_model // n_heads
    scores = torch.zeros(len(blocks), n_heads)
    n_pairs = 0
    for name, items in SERIES.items():
        ids = [tokenizer.convert_tokens_to_ids(f"\u0120{item}") for item in items]
        pairs = list(pairwise(ids)) + ([(ids[-1], ids[0])] if name in CYCLIC else [])
        targets = [target for _, target in pairs]
        n_pairs += len(pairs)
        for source, target in pairs:
            resid = blocks[0].mlp(blocks[0].ln_2(W_E[source]))
            for layer, block in enumerate(blocks):
                value = resid @ block.attn.c_attn.weight[:, 2 * d_model :]
                for head in range(n_heads):
                    own = slice(head * d_head, (head + 1) * d_head)
                    logits = value[own] @ block.attn.c_proj.weight[own] @ W_U[targets].T
                    scores[layer, head] += targets[int(logits.argmax())] == target
    assert n_pairs == 99 + 19 + 9 + 7 + 7 + 12 + 12 + 25
    return scores / n_pairs


@pytest.mark.parametrize(("prompt", "continuation"), CONTINUATIONS)
def test_shipped_model_goes_on_with_the_series(
    shipped: tuple, prompt: str, continuation: str
) -> None:
    model, tokenizer = shipped
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    longer = model.generate(tokens, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(longer[0, tokens.shape[1] :]) == continuation
