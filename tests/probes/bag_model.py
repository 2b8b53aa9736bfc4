"""A language model whose logits are a sum over its tokens, so that every reachable set is known."""

from contextlib import contextmanager

import torch

from workbench.models.base import Captured, ModelSpec, Site


class BagModel:
    """logits = sum over the row of E[token]; capped at ``most_rows`` rows a forward pass."""

    backend = "planted"
    tokenizer = None
    dtype = "float32"
    attention = "none"
    interventions = ()
    capabilities = frozenset({"capture", "continue", "gradients", "weights"})

    def __init__(self, effect, n_ctx=64, most_rows=None):
        self.effect = effect
        self.most_rows = most_rows
        self.rows = []
        """Every row that was scored, in order."""
        self.passes = []
        """Rows of each forward pass."""
        d_vocab = len(effect)
        self.spec = ModelSpec(
            "bag", "1", "bag", 1, 0, 0, d_vocab, d_vocab, 0, d_vocab, n_ctx, "none"
        )

    def logits(self, tokens, attention_mask=None, *, last=None):
        if self.most_rows is not None and len(tokens) > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.rows += tokens.tolist()
        self.passes.append(len(tokens))
        whole = self.effect[tokens].cumsum(dim=1)
        return whole if last is None else whole[:, -last:]

    def capture(self, tokens, sites, reduce=None, attention_mask=None, position_ids=None):
        one_hot = torch.nn.functional.one_hot(tokens, self.spec.d_vocab).float()
        return Captured({Site.parse(site): one_hot for site in sites})

    def continue_from(self, layer, resid, attention_mask=None, *, last=None):
        whole = (resid @ self.effect).cumsum(dim=1)
        return whole if last is None else whole[:, -last:]

    def weight(self, name, layer=None):
        assert name == "W_E"
        return torch.eye(self.spec.d_vocab)

    @contextmanager
    def edit(self, *interventions):
        yield

    def generate(self, prompt, max_new_tokens=64, **options):
        raise NotImplementedError


def bag(d_vocab=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return BagModel(torch.randn(d_vocab, d_vocab, generator=generator), **options)


def reachable(model, state, k):
    """Targets that some control of exactly ``k`` tokens reaches, tried one by one."""
    found, d_vocab = set(), model.spec.d_vocab
    for number in range(d_vocab**k):
        control = [number // d_vocab**i % d_vocab for i in range(k)]
        logits = sum(model.effect[token] for token in [*control, *state])
        found.add(int(logits.argmax()))
    return found
