"""Bigram-Backcopy as a plain PyTorch script writes it: tokens one by one, every map kept.

Written anew, from the paper's description (arXiv:2410.13835), in the manner of research code: the
generator is a Python loop over sequences and tokens, attention is eager, each block leaves its
scores and its pattern in a dictionary, and the optimiser has torch's defaults.
"""

import math

import numpy as np
import torch
from torch import nn


def generate(law, n_rows, n_pos, rng):
    """Sequences of n_pos + 1 tokens; ``law`` is a ``toy_tasks.bigram_law.BigramLaw``."""
    transition = law.transition.numpy()
    transition = transition / transition.sum(axis=1, keepdims=True).clip(1e-12)
    triggers = set(law.triggers.tolist())
    rows = []
    for _ in range(n_rows):
        row = [law.bos]
        while len(row) < n_pos + 1:
            if row[-1] in triggers:
                row.append(row[-2])
            else:
                row.append(int(rng.choice(law.d_vocab, p=transition[row[-1]])))
        rows.append(row)
    return torch.tensor(rows)


class Block(nn.Module):
    """Pre-norm attention with its map kept, then a ReLU MLP."""

    def __init__(self, width, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1 = nn.Linear(width, 4 * width, bias=False)
        self.w2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, h, maps):
        """Leave the maps behind."""
        batch, n_pos, width = h.shape
        x = self.ln1(h)
        shape = (batch, n_pos, self.n_heads, width // self.n_heads)
        q = self.wq(x).view(shape).transpose(1, 2)
        k = self.wk(x).view(shape).transpose(1, 2)
        v = self.wv(x).view(shape).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(shape[-1])
        mask = torch.triu(torch.full((n_pos, n_pos), float("-inf")), diagonal=1)
        scores = scores + mask
        pattern = torch.softmax(scores.float(), dim=-1)
        maps["scores"].append(scores.detach().clone())
        maps["pattern"].append(pattern.detach().clone())
        out = (pattern @ v).transpose(1, 2).contiguous().view(batch, n_pos, width)
        h = h + self.wo(out)
        return h + self.w2(torch.relu(self.w1(self.ln2(h))))


class Transformer(nn.Module):
    """Learned positions, blocks, a norm, an output that is not tied."""

    def __init__(self, d_vocab, n_pos, n_layers, n_heads, width):
        super().__init__()
        self.embed, self.position = nn.Embedding(d_vocab, width), nn.Embedding(n_pos, width)
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
        self.ln = nn.LayerNorm(width)
        self.out = nn.Linear(width, d_vocab, bias=False)

    def forward(self, tokens):
        """Logits, and the maps of every block."""
        maps = {"scores": [], "pattern": []}
        h = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            h = block(h, maps)
        return self.out(self.ln(h)), maps


def with_weights_of(toy):
    """The same model, from a ``toy_tasks.model.ToyModel``."""
    config = toy.config
    model = Transformer(
        config.d_vocab, config.n_ctx, config.n_layers, config.n_heads, config.d_model
    )
    names = {
        "embed.weight": "embed.weight",
        "position.weight": "position.weight",
        "ln.weight": "ln_final.weight",
        "ln.bias": "ln_final.bias",
        "out.weight": "unembed.weight",
    }
    parts = {
        "ln1.weight": "ln_attn.weight",
        "ln1.bias": "ln_attn.bias",
        "ln2.weight": "ln_mlp.weight",
        "ln2.bias": "ln_mlp.bias",
        "wq.weight": "attention.W_Q.weight",
        "wk.weight": "attention.W_K.weight",
        "wv.weight": "attention.W_V.weight",
        "wo.weight": "attention.W_O.weight",
        "w1.weight": "mlp.0.weight",
        "w2.weight": "mlp.2.weight",
    }
    for layer in range(config.n_layers):
        names |= {f"blocks.{layer}.{its}": f"blocks.{layer}.{ours}" for its, ours in parts.items()}
    weights = toy.state_dict()
    model.load_state_dict({its: weights[ours].clone() for its, ours in names.items()})
    return model


def optimizer_of(model, lr, weight_decay):
    """AdamW with torch's defaults, no decay of the norms."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    gains = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def step(model, optimizer, batch):
    """One update; returns the loss and the maps that research code keeps."""
    logits, maps = model(batch[:, :-1])
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), maps


def make_rng(seed):
    return np.random.default_rng(seed)
