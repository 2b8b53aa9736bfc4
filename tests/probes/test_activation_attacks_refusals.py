"""What activation attacks refuse, and what they never refuse."""

import pytest
import torch

import workbench as wb
from probes.activation_attacks import measure_activation_attacks
from probes.activation_attacks_cases import (
    draw_cases,
    refuse_without_gradients,
)
from tests.models.agreement import LIBRARY_WARNINGS, through_bridge, through_nnsight
from tests.probes.attacked_models import MODELS, NO_DATA, SMALL, small, toy
from tests.zoo import D_VOCAB, FAMILIES, random_tokens, tiny_model
from toy_tasks.model import ToyModelConfig, make_model
from workbench.context import Context
from workbench.errors import CapabilityError, ConfigError, DataError
from workbench.models.toy import ToyAdapter

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_attacked": (0, 1)},
            r"n_attacked must be ascending numbers of at least 1; got \(0, 1\)",
        ),
        ({"n_attacked": (4, 2)}, "ascending"),
        ({"n_attacked": (9,)}, "at most the context, 8 tokens; got 9"),
        ({"positions": "middle"}, "first, last, random or a list"),
        ({"positions": "1"}, "2 different positions"),
        ({"positions": "1,8"}, "0 ... 7"),
        ({"positions": "-1,3"}, "0 ... 7"),
        ({"fractions": (1.5,)}, "fractions must lie in"),
        ({"dimensions": (1, 1)}, "dimensions must be different"),
        ({"context": 1, "n_attacked": (1,)}, "context must be at least 2"),
        ({"bound": 0.0}, "bound must be above 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_the_first_and_the_last_position_may_be_listed():
    assert small(positions="0,7").listed_positions() == (0, 7)


def test_what_does_not_fit_the_model_is_refused():
    model = MODELS["gpt2"]()  # n_ctx 64
    with pytest.raises(ConfigError, match=r"n_ctx = 64 tokens.*got 60 \+ 6"):
        measure_activation_attacks(model, NO_DATA, small(context=60))
    with pytest.raises(ConfigError, match=r"got 64 \+ 1"):
        measure_activation_attacks(model, NO_DATA, small(context=64, t_limit=None))
    with pytest.raises(ConfigError, match="layer must be below 2"):
        measure_activation_attacks(model, NO_DATA, small(layer=2))
    prompts = random_tokens(2, 20)
    prompts[1, 10] = D_VOCAB
    with pytest.raises(DataError, match=r"target ids must lie in 0 \.\.\. 100.*got 101 in row 1"):
        draw_cases(model, prompts, small(targets="text"), Context())


def test_tied_targets_are_refused_and_never_drawn():
    module = tiny_model("gpt2")
    with torch.no_grad():
        module.transformer.wte.weight[50:] = module.transformer.wte.weight[50]
    model = wb.wrap(module)
    prompts = random_tokens(2, 20) % 40 + 3
    prompts[1, 9] = 77
    with pytest.raises(DataError, match=r"token 77 \(row 1\) equals that of another token.*tied"):
        draw_cases(model, prompts, small(targets="text"), Context())
    drawn = draw_cases(model, NO_DATA, small(n_seeds=9), Context())
    assert (drawn.targets < 50).all()
    assert (drawn.contexts >= 50).any()
    # Equal is never distinct enough, not even where distinct asks for nothing.
    drawn = draw_cases(model, NO_DATA, small(n_seeds=9, distinct=0.0), Context())
    assert (drawn.targets < 50).all()
    with torch.no_grad():
        module.transformer.wte.weight[:] = module.transformer.wte.weight[50]
    with pytest.raises(DataError, match="lower distinct"):
        draw_cases(model, NO_DATA, small(), Context())


def test_two_tokens_have_no_per_token_half():
    config = ToyModelConfig(d_vocab=2, n_layers=1, n_heads=2, d_model=8, n_ctx=32)
    model = ToyAdapter(make_model(config, 0))
    with pytest.raises(ConfigError, match="definition=all-correct"):
        measure_activation_attacks(model, NO_DATA, small())
    measure_activation_attacks(model, NO_DATA, small(definition="all-correct", steps=5))


class _Int8Linear(torch.nn.Module):
    """As int8 kernels do it: integers in between, and no gradient."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("whole", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        x = x.detach()
        step = x.abs().max() / 127
        rounded = (x / step).round().to(torch.int8)
        return (rounded.int() @ self.whole.int().T).float() * step * self.scale


@pytest.mark.parametrize("inside", [False, True], ids=["unembedding", "an MLP"])
def test_int8_without_gradients_is_refused_with_who_could(inside):
    module = tiny_model("llama")
    if inside:  # the residual stream goes around it, so a gradient there is, but a wrong one
        for block in module.model.layers:
            block.mlp.down_proj = _Int8Linear(block.mlp.down_proj)
    else:
        module.lm_head = _Int8Linear(module.lm_head)
    with pytest.raises(CapabilityError, match=r"gives none.*--backend hf --dtype float32.*int8"):
        measure_activation_attacks(wb.wrap(module), NO_DATA, small())


@pytest.mark.parametrize("family", [*FAMILIES, "toy"])
def test_no_float_model_is_refused(family):
    model = toy() if family == "toy" else wb.wrap(tiny_model(family))
    for layer in range(2):
        refuse_without_gradients(model, layer)


@pytest.mark.parametrize("through", [through_bridge, through_nnsight], ids=["bridge", "nnsight"])
def test_backends_without_gradients_are_refused_with_who_has_them(through):
    model = through(tiny_model("gpt2", attn_implementation="eager"))
    with pytest.raises(CapabilityError, match=r"gradients .*--backend hf"):
        wb.run("activation-attacks", model, **SMALL)


def test_the_command_line_of_python(tmp_path):
    model = MODELS["gpt2"]()
    result = wb.run("activation-attacks", model, store=tmp_path, token_attack=False, **SMALL)
    again = wb.run("activation-attacks", model, store=tmp_path, token_attack=False, **SMALL)
    assert again.cached
    assert again.metrics() == result.metrics()
    assert result.provenance["model"] == model.spec.name
    assert again.measured.chi(result.metrics()["kappa"]) == pytest.approx(result.metrics()["chi"])
