"""A tokenizer of chosen words, and a model whose heads do to its tokens what is planted."""

from dataclasses import replace

import torch

from workbench.testing import PlantedModel, identity_pattern

N_POS = 12


class WordTokenizer:
    """One token a known text; anything else is cut into characters, each a token of its own."""

    bos_token_id = None
    unk_token_id = None

    def __init__(self, words):
        self.words = ["\n", ",", *dict.fromkeys(words)]
        self.ids = {word: index for index, word in enumerate(self.words)}

    def __call__(self, text, add_special_tokens=True):
        ids, text = [], str(text)
        if text.startswith("\n"):
            ids, text = [0], text[1:]
        if not text:
            return {"input_ids": ids}
        known = [self.ids[text]] if text in self.ids else [1] * max(len(text), 2)
        return {"input_ids": ids + known}

    def decode(self, ids):
        return "".join(self.words[index] for index in ids)


class PlantedWeights(PlantedModel):
    """Embeddings, a first MLP and heads that are given; every head of d_model dimensions."""

    def __init__(self, tokenizer, embed, unembed, heads, mlp=lambda x: x):
        n_layers, n_heads, d_model = heads.shape[:3]
        super().__init__(identity_pattern(N_POS).repeat(64, n_layers, n_heads, 1, 1))
        self.tokenizer, self.mlp = tokenizer, mlp
        self.weights = {"W_E": embed, "W_U": unembed}
        self.heads = heads
        self.spec = replace(
            self.spec, d_model=d_model, d_head=d_model, d_vocab=len(embed), n_ctx=N_POS
        )

    def weight(self, name, layer=None):
        if name == "W_V":
            return self.heads[layer]
        if name == "W_O":
            return torch.eye(self.spec.d_model).repeat(self.spec.n_heads, 1, 1)
        return self.weights[name]

    def mlp_of_embedding(self, layer, x, *, norm):
        assert layer == 0
        return self.mlp(torch.nn.functional.layer_norm(x, x.shape[-1:]) if norm else x)

    def final_norm(self, resid):
        return resid


def head_that_maps(reps, unembed, rule):
    """OV = pinv(R) S pinv(W_U): token s's representation is sent to the logits S[s]."""
    return torch.linalg.pinv(reps) @ rule @ torch.linalg.pinv(unembed)
