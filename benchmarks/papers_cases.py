"""The papers' procedures that ``papers.py`` measures: each as the workbench does it and as the paper's code does."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from reference import (
    act_loop,
    attention_sinks_loop,
    concepts_loop,
    information_flow_loop,
    state_space_loop,
    successor_heads_loop,
)

import workbench as wb
from probes import information_flow_batch, information_flow_cross, information_flow_tokens
from probes import successor_heads_scores as successor
from probes.attention_sinks import AttentionSinkConfig, measure_attention_sinks
from probes.state_space_dynamics import Systems, velocity
from probes.successor_heads_tokens import SERIES, TokenSet
from probes.token_dynamics_concepts import concept_vector
from probes.token_dynamics_state_space import short_eigenvalues
from workbench.context import Batch, Context
from workbench.interventions.act import ACT
from workbench.models.base import Site

VOCABULARY = 4096


class Case(NamedTuple):
    """One procedure, both ways."""

    name: str
    shape: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    note: str
    dtype: torch.dtype = torch.float32


def gpt2(attention: str, n_pos: int, n_layer: int = 6, width: int = 384) -> Any:
    """A GPT-2 with random weights, larger than its own start has them, so that patterns are not uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": n_layer, "n_head": width // 64, "n_embd": width, "n_positions": n_pos}
    config = GPT2Config(
        **sizes,
        vocab_size=VOCABULARY,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config).eval()


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids, none of them the pad 0."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def sinks(n_prompts: int = 32, n_pos: int = 64) -> Case:
    """Scores and norms of prompts of the paper's length."""
    plain, model, tokens = gpt2("eager", n_pos), wb.wrap(gpt2("sdpa", n_pos)), ids(n_prompts, n_pos)

    def ours() -> Any:
        found = measure_attention_sinks(model, tokens, AttentionSinkConfig())
        # The paper's norms end before the final norm, which transformers' last hidden state is behind.
        return found.score, found.value_norm.mean(dim=1), found.resid_norm[:-1]

    def theirs() -> Any:
        score, value, stream = attention_sinks_loop.measure(plain, tokens)
        return score, value, stream[:-1]

    shape = f"6 layers, 6 heads, {n_prompts} prompts of {n_pos} tokens"
    note = "ours measures key, output and query-key norms besides"
    return Case("attention sinks", shape, ours, theirs, note)


def successor_heads(n_layer: int = 12, width: int = 768) -> Case:
    """All pairs of all series that a tokenizer with whole words would keep."""
    plain = gpt2("sdpa", 16, n_layer, width)
    model = wb.wrap(plain)
    sets, start = [], 1
    for series in SERIES:
        count = len(series.items)
        numbers = tuple(range(start, start + count))
        sets.append(TokenSet(series, "space", tuple(range(1, count + 1)), numbers))
        start += count
    vocabulary = successor.vocabulary_of(model, sets, successor.TokenPath())
    layers = range(model.spec.n_layers)
    tasks = [(vocabulary.rows(at), one.pairs()) for at, one in enumerate(sets)]

    def ours() -> Any:
        return torch.stack(
            [successor.score_layer(model, layer, vocabulary)["found"] for layer in layers]
        )

    def theirs() -> Any:
        heads = [successor.head_weights(model, layer) for layer in layers]
        found = successor_heads_loop.found_pairs(
            *zip(*heads, strict=True), vocabulary.reps, vocabulary.unembed, tasks
        )
        return found.float()

    n_pairs = sum(len(pairs) for _, pairs in tasks)
    shape = f"{n_layer} layers, {model.spec.n_heads} heads, d_model {width}, {n_pairs} pairs"
    return Case(
        "succession scores", shape, ours, theirs, "ours measures the greater-than bias besides"
    )


def information_flow(n_prompts: int = 4, n_pos: int = 24) -> Case:
    """Every token of three items of three tokens, and every item whole."""
    plain = gpt2("sdpa", n_pos)
    model, tokens = wb.wrap(plain), ids(n_prompts, n_pos, seed=3)
    block, spans = 3, [[2, 3, 4], [9, 10, 11], [17, 18, 19]]
    rows = tuple({"items": [row[span].tolist() for span in spans]} for row in tokens)
    config = information_flow_batch.InformationFlowConfig(
        layer=block, common="left-in", sweep=False
    )
    context = Context(rows=rows)

    def ours() -> Any:
        job = information_flow_batch.prepare(model, tokens, config, context)
        encoded, _ = information_flow_batch.encode_batch(model, Batch(tokens, None, 0), job, 16)
        alone = information_flow_cross.encode_alone(encoded, job.padding)
        read = information_flow_cross.read_alone(encoded, alone.end)
        found = information_flow_tokens.measure_tokens(encoded, read, job.lengths, config.tau)
        return found.keep_score[:, torch.tensor(spans).flatten()], found.keep_set_score[..., 3]

    def theirs() -> Any:
        single, whole, empty = [], [], torch.zeros(n_pos, dtype=torch.long)
        for row in tokens:
            for span in spans:
                alone = empty.clone()
                alone[span] = row[span]
                score = [
                    information_flow_loop.keep_score(plain, row, empty, alone, kept, span, block)
                    for kept in [*([pos] for pos in span), span]
                ]
                single += score[:-1]
                whole.append(score[-1])
        return (
            torch.tensor(single).view(n_prompts, -1),
            torch.tensor(whole).view(n_prompts, -1),
        )

    shape = f"6 layers, {n_prompts} prompts of {n_pos} tokens, 3 items of 3 tokens each"
    return Case(
        "keep-sets of tokens", shape, ours, theirs, "ours scores four more keep-sets an item"
    )


def concepts(n_questions: int = 16, n_choices: int = 4, sizes: tuple[int, int] = (48, 12)) -> Case:
    """Context vectors against the choices', one padded batch of contexts and one of choices."""
    plain = gpt2("sdpa", sizes[0])
    model, end = wb.wrap(plain), Site("ln_final")
    contexts = ids(n_questions, sizes[0], seed=4)
    choices = ids(n_questions, n_choices, sizes[1], seed=5)
    questions = list(zip(contexts, choices, strict=True))

    def ours() -> Any:
        context = concept_vector(model.capture(contexts, [end])[end])
        choice = concept_vector(model.capture(choices.flatten(0, 1), [end])[end])
        dots = torch.einsum("qd,qcd->qc", context, choice.view(n_questions, n_choices, -1))
        return dots.softmax(dim=1)

    shape = (
        f"6 layers, {n_questions} questions of {sizes[0]} tokens, {n_choices} choices of {sizes[1]}"
    )
    theirs = lambda: concepts_loop.scores(plain, questions)  # noqa: E731
    return Case("concept similarity", shape, ours, theirs, "")


def state_space(n_systems: int = 32, n_tokens: int = 24, dim: int = 2) -> Case:
    """The right-hand side of the tokens' equation for many systems."""
    draw = torch.Generator().manual_seed(6)
    shape = (n_systems, dim, dim)
    m, s_delta = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    decay = torch.rand(n_systems, dim, generator=draw, dtype=torch.float64) + 0.5
    x = torch.randn(n_systems, n_tokens, dim, generator=draw, dtype=torch.float64)
    systems = Systems(m, s_delta, decay)

    def theirs() -> Any:
        each = zip(m, s_delta, decay, x, strict=True)
        return torch.stack([state_space_loop.velocity(*one) for one in each])

    what = f"{n_systems} systems of {n_tokens} tokens, {dim} dimensions"
    ours = lambda: velocity(systems, x)  # noqa: E731
    return Case("velocity of tokens", what, ours, theirs, "", torch.float64)


def eigenvalues(d_state: int = 16, d_in: int = 1536) -> Case:
    """Those of S_C^T S_B that are not 0, of a layer of Mamba's size."""
    draw = torch.Generator().manual_seed(7)
    s_b, s_c = (torch.randn(d_state, d_in, generator=draw, dtype=torch.float64) for _ in range(2))

    def in_order(values: torch.Tensor) -> Any:
        largest = values[values.abs().argsort(descending=True)[:d_state]]
        return largest.real.sort().values / d_in

    shape = f"d_state {d_state}, d_in {d_in}"
    ours = lambda: in_order(short_eigenvalues(s_b, s_c))  # noqa: E731
    theirs = lambda: in_order(state_space_loop.eigenvalues(s_b, s_c))  # noqa: E731
    return Case("eigenvalues of a layer", shape, ours, theirs, "", torch.float64)


def act(n_pos: int = 256, alpha: float = 1.2, beta: float = 0.4) -> Case:
    """A forward pass with all heads edited, by the rule over all rows."""
    plain, model = gpt2(act_loop.register(alpha, beta), n_pos), wb.wrap(gpt2("sdpa", n_pos))
    tokens, edit = ids(2, n_pos, seed=8), ACT(alpha=alpha, beta=beta, mode="full")

    def ours() -> Any:
        with model.edit(edit):
            return model.logits(tokens)

    if torch.allclose(ours(), model.logits(tokens), atol=1e-3):
        raise SystemExit("ACT changes nothing here: there would be nothing to compare")
    shape = f"6 layers, 6 heads, 2 prompts of {n_pos} tokens"
    return Case("forward pass under ACT", shape, ours, lambda: plain(tokens).logits, "")


CASES: dict[str, Callable[[], Case]] = {
    each.__name__: each
    for each in (sinks, successor_heads, information_flow, concepts, state_space, eigenvalues, act)
}
