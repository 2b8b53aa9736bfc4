"""One new query behind a cache: against the definition, and what it must not cost."""

import pytest
import torch

import workbench as wb
from tests.zoo import padded, random_tokens, tiny_model
from workbench.attention import compute, decode
from workbench.attention.inputs import AttentionInputs
from workbench.attention.interface import AttentionSession, stock_attention

GAMMAS = (3.0, 0.01, 1.0, 1.0)
N_KEYS = 9
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-6}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def one_row(family, edit, dtype, hidden):
    """Edited and stock output of a layer's last query, and its inputs; the second prompt is padded."""
    model = wb.wrap(tiny_model(family))
    module = model.model.get_submodule(f"{model.family.blocks}.0.{model.family.attn}")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, N_KEYS, 8, generator=generator).to(dtype)
        for n in (4, model.spec.n_kv_heads, model.spec.n_kv_heads)
    )
    mask = first = valid = None
    if hidden:
        first, valid = torch.tensor([0, hidden]), torch.ones(2, N_KEYS - 1)
        valid[1, :hidden] = 0
        mask = torch.ones(2, 1, N_KEYS, N_KEYS, dtype=torch.bool).tril()
        mask[1, ..., :hidden] = False
    session = AttentionSession(
        "sdpa", {module: 0}, {}, {0: edit.plan(model.spec)[:1]}, valid, first
    )

    def attend(start, stop):
        shown = None if mask is None else mask[:, :, start:stop, :stop]
        seen = key[:, :, :stop], value[:, :, :stop]
        return session.attend(module, query[:, :, start:stop], *seen, shown, 0.4, {})

    with torch.no_grad():
        attend(0, N_KEYS - 1)
        edited = attend(N_KEYS - 1, N_KEYS)[:, 0]
        last = None if mask is None else mask[:, :, -1:]
        stock = stock_attention("sdpa", module)(
            module, query[:, :, -1:], key, value, last, scaling=0.4
        )[0][:, 0]
    return edited, stock, (query[:, :, -1].double(), key.double(), value.double())


def defined(query, key, value, mode, hidden):
    """The row under GAMMAS in double precision. ``[batch head d]``."""
    key, value = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in (key, value))
    scores = 0.4 * torch.einsum("bhd,bhkd->bhk", query, key)
    gammas = torch.tensor(GAMMAS, dtype=torch.float64)
    for prompt, first in enumerate((0, hidden)):
        if mode == "score":
            scores[prompt, :, first] += gammas.log()
        else:
            scores[prompt, :, first] *= gammas
    scores[1, :, :hidden] = -torch.inf
    return torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), value)


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["score", "key"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoded_row_is_the_definition_and_heads_left_alone_keep_their_bits(
    family, mode, dtype, hidden
):
    edit = wb.ZeroTuning(GAMMAS * 2, mode=mode)
    edited, stock, inputs = one_row(family, edit, dtype, hidden)
    wanted = defined(*inputs, mode, hidden)
    scale = inputs[2].abs().max()
    torch.testing.assert_close(edited.double() / scale, wanted / scale, rtol=0, atol=DTYPES[dtype])
    assert torch.equal(edited[:, 2:], stock[:, 2:])
    assert (edited[:, :2].double() - stock[:, :2].double()).abs().max() > 0.05


EDITS = {
    "score": wb.ZeroTuning(5.0),
    "key": wb.ZeroTuning(1.7, mode="key"),
    "act": wb.ACT(alpha=1.2, beta=0.2),
    "some heads": wb.ACT(alpha=1.2, beta=0.2, heads=((0, 1), (1, 0), (1, 3))),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_a_decoded_token_needs_no_tiles(family, name, monkeypatch):
    compare_tiles(family, EDITS[name], 6, monkeypatch)


@pytest.mark.parametrize("name", ["score", "act"])
def test_nor_does_the_second_token_after_a_prompt_of_one(name, monkeypatch):
    compare_tiles("llama", EDITS[name], 1, monkeypatch)


def compare_tiles(family, edit, n_pos, monkeypatch):
    """The prompt alone may be cut into tiles."""
    model, tokens = wb.wrap(tiny_model(family)), random_tokens(2, n_pos)
    tiles, whole = [], compute.attend
    monkeypatch.setattr(
        compute, "attend", lambda inputs, *a, **b: tiles.append(inputs) or whole(inputs, *a, **b)
    )
    with model.edit(edit):
        model.generate(tokens, **GREEDY)
    assert all(inputs.key.shape[2] == n_pos for inputs in tiles)


def test_layers_that_are_edited_alike_share_one_mask_a_pass(monkeypatch):
    model = wb.wrap(tiny_model("gpt2"))
    made, make = [], decode._at_first

    def noted(*each):
        made.append(make(*each))
        return made[-1]

    monkeypatch.setattr(decode, "_at_first", noted)
    n_decoded = GREEDY["max_new_tokens"] - 1
    # One row serves all heads that gain the same.
    for gamma, n_masks, n_rows in (
        (3.0, 1, 1),
        ((3.0,) * 4 + (2.0,) * 4, 2, 1),
        ((3.0, 2.0, 3.0, 3.0) * 2, 1, 4),
    ):
        made.clear()
        with model.edit(wb.ZeroTuning(gamma)):
            model.generate(random_tokens(2, 6), **GREEDY)
        assert len(made) == n_masks * n_decoded
        assert all(mask.shape[:3] == (1, n_rows, 1) for mask in made)


@pytest.mark.parametrize(
    "edits",
    [
        [wb.ZeroTuning(5.0), wb.ZeroTuning(3.0)],
        [wb.ZeroTuning(1.7, mode="key"), wb.ZeroTuning(5.0), wb.ZeroTuning(0.5, mode="key")],
        [wb.ACT(1.2, 0.2, ((0, 1), (0, 2))), wb.ACT(0.6, 0.2, ((1, 1), (1, 2)), False)],
        [wb.ZeroTuning(5.0), wb.ACT(1.2, 0.2), wb.ZeroHeads(((0, 1),))],
    ],
    ids=["scores", "keys and scores", "rules by layer", "all"],
)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_edits_of_several_kinds_decode_as_the_whole_text_does(family, edits):
    model = wb.wrap(tiny_model(family))
    tokens, mask = padded(random_tokens(2, 8), [8, 5], "left")
    options = {**GREEDY, "max_new_tokens": 5, "attention_mask": mask}
    with model.edit(*edits):
        cached = model.generate(tokens, **options)
        whole = model.generate(tokens, use_cache=False, **options)
        for row, length in enumerate((8, 5)):
            text = model.logits(cached[row : row + 1, 8 - length :])[0, length - 1 : -1]
            assert torch.equal(cached[row, 8:], text.argmax(-1))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.generate(tokens, **options))


def one_query(*, width=8, value=None, kv_heads=2, dtype=torch.float32, device="cpu"):
    query = torch.zeros(1, 4, 1, width, dtype=dtype, device=device)
    key = torch.zeros(1, kv_heads, N_KEYS, width, dtype=dtype, device=device)
    other = torch.zeros(1, kv_heads, N_KEYS, value or width, dtype=dtype, device=device)
    return AttentionInputs(query, key, other, None, 1.0)


MASK = torch.ones(1, 1, 1, N_KEYS, dtype=torch.bool)
HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("handed", "changes", "expected"),
    [
        ((None, N_KEYS, True), {}, True),
        ((None, N_KEYS, False), {}, True),
        ((None, N_KEYS, True), {"value": 4}, True),
        ((None, N_KEYS, True), {"dtype": HALF}, True),
        ((None, N_KEYS, False), {"dtype": HALF}, False),  # eager goes on in float32
        ((None, N_KEYS, True), {"dtype": torch.float16, "value": 4}, False),  # rounds the mask
        ((None, N_KEYS + 1, True), {}, False),  # a static cache without a mask
        ((MASK, N_KEYS + 1, True), {}, True),
        ((None, N_KEYS, True), {"device": "meta"}, False),
    ],
)
def test_a_kernel_takes_a_bias_where_it_adds_it_as_it_is(handed, changes, expected):
    assert decode.Handed(*handed).takes_bias(one_query(**changes)) == expected


@pytest.mark.parametrize(
    ("handed", "changes", "expected"),
    [
        ((None, N_KEYS, True), {}, True),
        ((None, N_KEYS, True), {"width": 256}, True),
        ((None, N_KEYS, True), {"width": 257}, False),
        ((None, N_KEYS, True), {"kv_heads": 4}, False),
        ((None, N_KEYS, True), {"value": 4}, False),
        ((None, N_KEYS, False), {}, False),
        ((MASK, N_KEYS, True), {}, False),
    ],
)
def test_queries_are_grouped_by_the_kernel_where_transformers_leaves_it_to_it(
    handed, changes, expected
):
    assert decode.Handed(*handed).is_grouped(one_query(**changes)) == expected
