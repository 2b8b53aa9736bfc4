"""FlexAttention's score_mod against the output form and the definition."""

import pytest
import torch

import workbench as wb
from tests.attention.test_streaming import make_inputs
from tests.zoo import random_tokens, tiny_model
from workbench.attention.edits import AttentionCall
from workbench.attention.flex import _block_mask, flex_first_key, flex_on_cuda
from workbench.attention.inputs import AttentionInputs
from workbench.attention.streaming import attend, attention_scores
from workbench.errors import CapabilityError
from workbench.interventions.zerotuning import ZeroTuning
from workbench.models.base import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
GAMMAS = torch.tensor([2.0, 0.5, 1.0, 8.0])
SPEC = ModelSpec(
    name="made", revision="", family="made", n_layers=1, n_heads=4, n_kv_heads=2,
    d_model=32, d_head=8, d_mlp=8, d_vocab=10, n_ctx=64,
)  # fmt: skip


def wide(device="cpu", **changes):
    """Heads of width 16, as the kernel wants them."""
    made = make_inputs(**changes)
    query, key = (torch.cat([x, x], -1).to(device) for x in (made.query, made.key))
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(1)).to(device)
    return AttentionInputs(query, key, value, None, made.scaling)


def left_padded(inputs):
    n_q, n_k = inputs.query.shape[2], inputs.key.shape[2]
    mask = torch.ones(2, 1, n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    mask[1, :, :, :3] = False
    device = inputs.query.device
    return AttentionInputs(
        inputs.query, inputs.key, inputs.value, mask.to(device), inputs.scaling
    ), torch.tensor([0, 3], device=device)


def compare(inputs, first):
    found = flex_first_key(inputs, GAMMAS.log(), first)
    (edit,) = ZeroTuning(tuple(GAMMAS.tolist())).plan(SPEC)
    whole = attend(inputs, {}, want=("output", "log_sum"))
    output_form = edit.output(AttentionCall(0, inputs, whole.log_sum, first), whole.output)
    scores = attention_scores(inputs).double().cpu()
    at = torch.zeros(2, dtype=torch.long) if first is None else first.cpu()
    for prompt in range(2):
        scores[prompt, :, :, at[prompt]] += GAMMAS.log()[:, None]
    value = inputs.value.double().cpu().repeat_interleave(inputs.n_groups, dim=1)
    defined = (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)
    real = inputs.visible().any(-1).expand(2, 4, -1).transpose(1, 2).cpu()
    for each in (found, output_form):
        torch.testing.assert_close(each.double().cpu()[real], defined[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_q", [13, 2, 1])
@pytest.mark.parametrize("padding", [False, True])
def test_score_mod_output_form_and_definition_are_one_map(n_q, padding):
    inputs, first = wide(n_q=n_q), None
    if padding:
        inputs, first = left_padded(inputs)
    compare(inputs, first)


@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (2, 4)])
def test_blocks_hold_every_edge_of_their_prompt_and_head(shape):
    # On a CPU the operator looks at every edge; a compiled kernel skips the blocks that are left out.
    mask = torch.ones(*shape, 300, 300, dtype=torch.bool).tril()
    mask[-1, -1, :, :150] = False
    query, key = torch.zeros(2, 4, 300, 16), torch.zeros(2, 2, 300, 16)
    found = _block_mask(AttentionInputs(query, key, key, mask, 1.0)).to_dense().bool()
    whole = torch.nn.functional.pad(mask, (0, 84, 0, 84)).view(*shape, 3, 128, 3, 128)
    assert torch.equal(found, whole.any(dim=-1).any(dim=-2))


@pytest.mark.gpu
def test_the_compiled_kernel_is_the_same_map():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    compare(wide("cuda"), None)
    compare(*left_padded(wide("cuda")))


def test_it_is_refused_where_it_is_not_compiled():
    model = wb.wrap(tiny_model("llama"))
    with (
        flex_on_cuda(),
        model.edit(wb.ZeroTuning(2.0)),
        pytest.raises(CapabilityError, match="leave flex_on_cuda"),
    ):
        model.logits(random_tokens(1, 4))


@pytest.mark.parametrize("edits", [[wb.ZeroTuning(0.01)], [wb.ZeroTuning(2.0), wb.ZeroTuning(3.0)]])
def test_an_edit_that_would_run_in_tiles_is_refused_not_run_in_another_kernel(edits, monkeypatch):
    monkeypatch.setattr("workbench.attention.flex.is_asked", lambda inputs: True)
    model = wb.wrap(tiny_model("llama"))
    with model.edit(*edits), pytest.raises(CapabilityError, match="one edit to itself"):
        model.logits(random_tokens(1, 8))
