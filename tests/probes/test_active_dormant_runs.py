"""The active-dormant probe however it is run: backends, batches, padding, stops; and what it refuses."""

import pytest
import torch

import workbench as wb
from probes.active_dormant import ActiveDormantConfig, measure_active_dormant
from tests.probes.planted_switch import domains
from tests.probes.stopped import Stopped
from tests.zoo import padded, random_tokens, tiny_model
from workbench.context import Context
from workbench.errors import ConfigError, DataError

# Independent of how it is run


def compare(found, expected, **close):
    close = {"rtol": 1e-4, "atol": 2e-4, "equal_nan": True} | close
    for name in ("sink_attention", "sink_logit_gap", "value_norm_ratio", "ablation_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    for name in ("bos_loss", "row_entropy", "column_entropy", "loss", "peak_without"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)
    for name in ("resid_norm_bos", "resid_norm_rest", "value_norm", "example_pattern"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **close)


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_backends_agree(backend, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tokens = random_tokens(8, 8)
    results = [
        measure_active_dormant(
            wb.load(str(tmp_path), backend=name), tokens, ActiveDormantConfig(), domains(4, 4)
        )
        for name in ("hf", backend)
    ]
    compare(results[1], results[0])
    torch.testing.assert_close(results[1].p_sink, results[0].p_sink)


def test_batches_and_order_do_not_change_the_numbers():
    model, tokens = wb.wrap(tiny_model("llama")), random_tokens(9, 10)
    config = ActiveDormantConfig(n_examples=0)
    whole = measure_active_dormant(model, tokens, config, domains(4, 5))
    parts = measure_active_dormant(
        model, tokens, ActiveDormantConfig(n_rows=3, n_examples=0), domains(4, 5, batch_size=2)
    )
    compare(parts, whole)
    torch.testing.assert_close(parts.p_loss, whole.p_loss)
    order = torch.tensor([0, 8, 2, 1, 4, 3, 7, 6, 5])
    labels = [("first",) * 4 + ("second",) * 5][0]
    context = Context(labels={"domain": tuple(labels[i] for i in order)})
    compare(measure_active_dormant(model, tokens[order], config, context), whole)


def test_a_padded_prompt_counts_as_it_does_alone():
    lengths = [12, 7, 12, 9, 12, 6, 12, 8]
    tokens, mask = padded(random_tokens(8), lengths, "right")
    model, config = wb.wrap(tiny_model("llama")), ActiveDormantConfig()
    found = measure_active_dormant(model, tokens, config, domains(4, 4, attention_mask=mask))
    # Each domain's means, from prompts that were measured in batches of their own length.
    from probes.active_dormant_prompts import measure_prompts

    alone = [
        measure_prompts(model, tokens[i : i + 1, :n], Context()) for i, n in enumerate(lengths)
    ]
    for d, rows in enumerate((range(4), range(4, 8))):
        for array, name in (("sink_attention", "sink"), ("sink_logit_gap", "gap")):
            expected = torch.cat([alone[i].activity[name] for i in rows]).mean(0)
            torch.testing.assert_close(getattr(found, array)[d], expected, rtol=1e-4, atol=1e-4)
        expected = torch.cat([alone[i].change[0] for i in rows]).mean(0)
        torch.testing.assert_close(found.ablation_loss[d], expected, rtol=0, atol=1e-4)
    assert found.example_tokens[1, 6:].tolist() != [-1] * 6  # its first prompt is whole


def test_progress_counts_layers_and_a_killed_run_goes_on():
    keep, seen = Stopped(after=5), []

    def progress(done, total):
        seen.append((done, total))

    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(8, 8)
    context = domains(4, 4, batch_size=4, keep=keep, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        measure_active_dormant(model, tokens, ActiveDormantConfig(), context)
    keep.after = None
    seen.clear()
    found = measure_active_dormant(model, tokens, ActiveDormantConfig(), context)
    assert seen == [(n, 6) for n in range(1, 7)]  # two batches: activity and two layers each
    compare(found, measure_active_dormant(model, tokens, ActiveDormantConfig(), domains(4, 4)))


# Refusals


def test_one_domain_or_too_few_prompts_are_refused():
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(6, 8)
    with pytest.raises(DataError, match="two or more domains"):
        measure_active_dormant(model, tokens, ActiveDormantConfig())
    with pytest.raises(DataError, match=r"at least 4 prompts a domain.*3 of first, 3 of second"):
        measure_active_dormant(model, tokens, ActiveDormantConfig(), domains(3, 3))


def test_short_prompts_are_refused():
    tokens, mask = padded(random_tokens(8, 8), [8] * 7 + [2], "right")
    with pytest.raises(DataError, match=r"at least 3 tokens.*prompt 7 has 2"):
        measure_active_dormant(
            wb.wrap(tiny_model("gpt2")),
            tokens,
            ActiveDormantConfig(),
            domains(4, 4, attention_mask=mask),
        )


@pytest.mark.parametrize(
    "wrong", [{"sink_threshold": 1.0}, {"fdr": 0.0}, {"n_rows": 0}, {"loss_threshold": -0.1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ActiveDormantConfig(**wrong)


def test_too_few_permutations_are_refused():
    config = ActiveDormantConfig(n_permutations=20)
    with pytest.raises(ConfigError, match="at least 160"):
        measure_active_dormant(
            wb.wrap(tiny_model("gpt2")), random_tokens(8, 8), config, domains(4, 4)
        )
