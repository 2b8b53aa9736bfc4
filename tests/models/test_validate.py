import json
from contextlib import contextmanager

import pytest
import torch

from tests.models.agreement import LIBRARY_WARNINGS
from tests.zoo import tiny_model
from workbench.attention import streaming
from workbench.attention.edits import AttentionEdit
from workbench.errors import EngineError
from workbench.models.base import Captured, Site
from workbench.models.huggingface import HuggingFaceModel
from workbench.models.validate import Check, Unavailable, companions, to_rows, validate_model

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]


def failed(checks):
    return {check.name for check in checks if check.passed is False}


def skipped(checks):
    return {check.name: check.detail for check in checks if check.passed is None}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "gpt_oss", "olmo2"])
def test_a_sound_model_passes_every_check(family):
    checks = validate_model(HuggingFaceModel(tiny_model(family)))
    assert failed(checks) == set()
    assert set(skipped(checks)) == {"backends-agree"}


def test_all_backends_pass_and_agree():
    model = HuggingFaceModel(tiny_model("llama"))
    others = companions(model)
    checks = validate_model(model, other_backends=others)
    assert all(check.passed for check in checks)
    assert {"agrees-with-transformer-lens", "agrees-with-nnsight"} <= {c.name for c in checks}
    for other in others:
        assert failed(validate_model(other)) == set()


def test_what_a_model_cannot_do_is_skipped_with_the_reason():
    checks = validate_model(HuggingFaceModel(tiny_model("mamba")))
    assert failed(checks) == set()
    reasons = skipped(checks)
    assert "lacks patterns" in reasons["rows-sum-to-one"]
    assert "pad on the right" in reasons["padded-left"]
    assert "no attention" in reasons["heads-are-zeroed"]


def test_an_unavailable_backend_is_skipped_with_the_reason():
    model = HuggingFaceModel(tiny_model("gpt2"))
    checks = validate_model(model, other_backends=[Unavailable("nnsight", "not installed")])
    assert skipped(checks) == {"agrees-with-nnsight": "not installed"}


def test_half_precision_states_its_own_bound():
    model = HuggingFaceModel(tiny_model("llama").to(torch.bfloat16))
    checks = {check.name: check for check in validate_model(model)}
    assert checks["stock-logits"].bound == 0.1
    assert failed(checks.values()) == set()


def test_rows_are_json():
    rows = to_rows([Check("a", None, None, None, "why"), Check("b", True, 0.0, 1e-4, "")])
    assert json.loads(json.dumps(rows))[0] == {
        "name": "a",
        "passed": None,
        "value": None,
        "bound": None,
        "detail": "why",
    }


# Every check can fail: models that are broken in one way each.


class Broken(HuggingFaceModel):
    """A sound model whose captures pass through ``spoil``."""

    def capture(self, tokens, sites, reduce=None, attention_mask=None, position_ids=None):
        parsed = [Site.parse(site) for site in sites]
        read = [self.instead(site) for site in parsed]
        found = super().capture(tokens, read, reduce, attention_mask, position_ids)
        return Captured(
            {site: self.spoil(site, found[other]) for site, other in zip(parsed, read, strict=True)}
        )

    def instead(self, site):
        return site

    def spoil(self, site, value):
        return value


class IgnoresEdits(Broken):
    @contextmanager
    def edit(self, *interventions):
        yield


class KeepsEdits(Broken):
    @contextmanager
    def edit(self, *interventions):
        self._edits._active = (*self.interventions, *interventions)
        yield


class ReadsTheWrongLayer(Broken):
    def instead(self, site):
        return site if site.layer is None else Site(site.name, 1 - site.layer)


class ReadsTheWrongPost(Broken):
    def instead(self, site):
        return Site("resid_post", 0) if site.name == "resid_post" else site


class LosesAttention(Broken):
    def spoil(self, site, value):
        whole = site.name == "pattern" and isinstance(value, torch.Tensor)
        return value * 0.99 if whole else value


class MiscountsStatistics(Broken):
    def spoil(self, site, value):
        return {k: v + 0.01 for k, v in value.items()} if isinstance(value, dict) else value


class MovesWhenWatched(Broken):
    watching = False

    def capture(self, tokens, sites, *args, **options):
        self.watching = len(sites) > 1
        return super().capture(tokens, sites, *args, **options)

    def spoil(self, site, value):
        return value + 0.01 if self.watching and site.name == "ln_final" else value


class IgnoresMasks(Broken):
    def logits(self, tokens, attention_mask=None):
        return super().logits(tokens)


class MixesPrompts(Broken):
    def logits(self, tokens, attention_mask=None):
        logits = super().logits(tokens, attention_mask)
        return logits + 0.01 * (tokens.shape[0] - 1)


class NoOpLeavesATrace(Broken):
    def logits(self, tokens, attention_mask=None):
        logits = super().logits(tokens, attention_mask)
        return logits + 1e-6 if self.interventions else logits


class GeneratesWithoutEdits(Broken):
    def _generate_tokens(self, tokens, attention_mask, options):
        before, self._edits._active = self.interventions, ()
        try:
            return super()._generate_tokens(tokens, attention_mask, options)
        finally:
            self._edits._active = before


class SilencesTheWrongHead(Broken):
    def spoil(self, site, value):
        return value.roll(1, dims=2) if site.name == "z" else value


class EditsThePatternTwice(Broken):
    def spoil(self, site, value):
        if site.name != "pattern" or not self.interventions:
            return value
        (edit,) = [e for e in self.interventions[0].plan(self.spec) if e.layer == site.layer]
        assert isinstance(edit, AttentionEdit)
        return edit.pattern(value, torch.zeros(value.shape[0], dtype=torch.long))


class HookDoesNotRun(Broken):
    def spoil(self, site, value):
        raise EngineError("every hook must run")


BREAKAGES = {
    IgnoresEdits: {"edit-changes-logits", "edit-acts-where-it-says", "heads-are-zeroed"},
    KeepsEdits: {"edit-changes-logits"},
    ReadsTheWrongLayer: {"edit-acts-where-it-says", "residual-adds-up"},
    ReadsTheWrongPost: {"residual-adds-up"},
    LosesAttention: {"rows-sum-to-one", "streaming-equals-whole"},
    MiscountsStatistics: {"streaming-equals-whole"},
    MovesWhenWatched: {"hooked-equals-unhooked"},
    IgnoresMasks: {"padded-left"},
    MixesPrompts: {"batch-equals-alone", "stock-logits"},
    NoOpLeavesATrace: {"no-op-is-bitwise"},
    GeneratesWithoutEdits: {"cached-equals-uncached"},
    SilencesTheWrongHead: {"heads-are-zeroed"},
    EditsThePatternTwice: {"pattern-edit-is-exact"},
    HookDoesNotRun: {"hooked-equals-unhooked", "residual-adds-up"},
}


@pytest.mark.parametrize("kind", BREAKAGES, ids=lambda kind: kind.__name__)
def test_a_broken_model_fails(kind):
    checks = validate_model(kind(tiny_model("gpt2")))
    assert failed(checks) >= BREAKAGES[kind]


def test_a_pattern_that_is_cut_wrongly_fails_although_these_prompts_fit_into_one_tile(monkeypatch):
    whole = streaming._tiles

    def without_the_last(inputs, *, whole_heads):
        tiles = list(whole(inputs, whole_heads=whole_heads))
        return tiles[: max(1, len(tiles) - 1)]

    model = HuggingFaceModel(tiny_model("gpt2"))
    assert not failed(validate_model(model))
    monkeypatch.setattr(streaming, "_tiles", without_the_last)
    assert failed(validate_model(model)) == {"streaming-equals-whole"}


def test_ignored_right_padding_fails():
    class ReadsPadding(Broken):
        # Right padding is invisible to a causal model unless positions or masks go wrong.
        def logits(self, tokens, attention_mask=None):
            logits = super().logits(tokens, attention_mask)
            return logits if attention_mask is None else logits.roll(1, dims=1)

    assert {"padded-right", "padded-left"} <= failed(
        validate_model(ReadsPadding(tiny_model("gpt2")))
    )


def test_another_models_numbers_do_not_agree():
    model = HuggingFaceModel(tiny_model("gpt2"))
    other = HuggingFaceModel(tiny_model("gpt2", seed=1))
    checks = validate_model(model, other_backends=[other])
    assert failed(checks) == {"agrees-with-hf"}


def test_nan_never_passes():
    class GivesNaN(Broken):
        def spoil(self, site, value):
            return value * float("nan") if isinstance(value, torch.Tensor) else value

    bad = failed(validate_model(GivesNaN(tiny_model("gpt2"))))
    assert {"residual-adds-up", "rows-sum-to-one", "hooked-equals-unhooked"} <= bad
