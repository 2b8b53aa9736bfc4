"""Keep-sets as a research script scores them: a forward pass each, the empty prompt encoded for every one.

Written anew, from the paper's description (arXiv:2504.01137): for every token the prompt and the empty prompt are
encoded again, positions that are not kept are replaced one by one before a block, and the rest of the model runs.
"""

import torch


def encode(model, tokens, block=None, change=None):
    """The end of the model ``[pos d_model]`` and the stream before a block, which ``change`` may replace."""
    seen = {}

    def before(module, args):
        seen["stream"] = args[0][0].clone()
        if change is not None:
            return (change(args[0]), *args[1:])
        return None

    hook = model.transformer.h[block].register_forward_pre_hook(before)
    try:
        end = model(tokens[None], use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    finally:
        hook.remove()
    return end, seen["stream"]


def keep_score(model, tokens, empty, alone, kept, item, block):
    """Cosine of what is read of an item under a keep-set with the item alone, both beside the empty prompt.

    Args:
        model: A GPT-2 of transformers.
        tokens: Ids ``[pos]``.
        empty: Ids of the empty prompt, as long.
        alone: Ids of the prompt with the item alone.
        kept: Positions that stay.
        item: Positions at which the item is read.
        block: Before which the others are replaced.
    """
    pad_end, pad_stream = encode(model, empty, block)

    def patch(stream):
        stream = stream.clone()
        for pos in range(stream.shape[1]):
            if pos not in kept:
                stream[0, pos] = pad_stream[pos]
        return stream

    end, _ = encode(model, tokens, block, patch)
    prototype, _ = encode(model, alone, block)
    read = (end - pad_end)[item].sum(dim=0)
    wanted = (prototype - pad_end)[item].sum(dim=0)
    return torch.nn.functional.cosine_similarity(read, wanted, dim=0).item()
