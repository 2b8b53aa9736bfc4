"""Forcing tokens by a change of activations as one writes it first: a hook, torch's Adam, early stop.

Written anew, from the description of the paper (arXiv:2312.02780), which has no release: one problem after the
other, the whole model for every step, and a token counts as forced when it is the argmax.
"""

import torch


def attack(model, context, target, places, *, steps, lr):
    """How many of the target's tokens ``[t]`` are forced behind a context ``[pos]``, at best.

    Args:
        model: A GPT-2.
        context: Tokens whose activations before the first block are changed.
        target: Tokens to be forced.
        places: Which positions of the context are changed.
        steps: Of Adam, at most.
        lr: Its learning rate.
    """
    tokens = torch.cat([context, target[:-1]])[None]
    change = torch.zeros(len(places), model.config.n_embd, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=lr)

    def perturb(module, args):
        hidden = args[0].clone()
        hidden[:, places] += change
        return (hidden, *args[1:])

    best = 0
    hook = model.transformer.h[0].register_forward_pre_hook(perturb)
    try:
        for _ in range(steps + 1):
            logits = model(tokens, use_cache=False).logits[0, len(context) - 1 :]
            best = max(best, int((logits.argmax(-1) == target).sum()))
            if best == len(target):
                break
            loss = torch.nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        hook.remove()
    return best
