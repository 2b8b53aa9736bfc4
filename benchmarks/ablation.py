"""The loss without each head: the workbench's batched pass against one forward pass a head.

The naive loop does what the paper's procedure does: for one head, one ablation (zeroed, or moved to
the first token) and one prompt at a time, a whole forward pass with eager attention that returns its
maps, a hook that changes the head, and the model's own loss. A second naive loop gives it all prompts
at once. A head of a naive loop costs the same in every layer, so the loops run over ``--naive-heads``
heads of each layer and the time a head is what is compared; the workbench runs all heads.

Methods run in processes of their own and are asked in turn; both must find the same numbers.

    python benchmarks/ablation.py --shape gpt2-small --prompts 2 --rounds 3 --threads 1
"""

import argparse
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import turns
from peaks import peak_flops
from record import OUT, Row, spread, write_record

SHAPES: dict[str, dict[str, int]] = {
    "gpt2-small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "gpt2-small, 2048 tokens": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 2048},
    "narrow": {"n_layer": 12, "n_head": 12, "n_embd": 192, "vocab_size": 2048},
    "tiny": {"n_layer": 12, "n_head": 12, "n_embd": 96, "vocab_size": 512},
}
TOLERANCE = 1e-4
"""Nats: how far two float32 computations of a change of loss may lie apart."""


def build(shape: str, attention: str) -> Any:
    """A GPT-2 of one of SHAPES with random weights and one kind of attention."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # Larger weights than GPT-2's own start, so that heads matter.
    config = GPT2Config(**SHAPES[shape], initializer_range=0.06, attn_implementation=attention)
    return GPT2LMHeadModel(config).eval()


class Naive:
    """One forward pass a head and ablation."""

    def __init__(self, arguments: argparse.Namespace, *, batched: bool) -> None:
        self.model = build(arguments.shape, "eager")
        self.batched, self.n_heads = batched, arguments.naive_heads

    def __call__(self, tokens: Any) -> Any:
        """Changes of loss ``[ablation prompt layer head]``, of some heads of each layer."""
        import torch

        sizes = self.model.config
        found = torch.zeros(2, len(tokens), sizes.n_layer, self.n_heads)
        parts = [tokens] if self.batched else list(tokens[:, None])
        base = torch.cat([self.loss(part) for part in parts])
        for ablation in range(2):
            for layer in range(sizes.n_layer):
                for head in range(self.n_heads):
                    with_hooks = self.hooks(layer, head, move=ablation == 1)
                    found[ablation, :, layer, head] = (
                        torch.cat([self.loss(part) for part in parts]) - base
                    )
                    for hook in with_hooks:
                        hook.remove()
        return found

    def loss(self, tokens: Any) -> Any:
        """The model's own loss; by prompt where several are given at once."""
        import torch

        if not self.batched:
            out = self.model(tokens, labels=tokens, use_cache=False, output_attentions=True)
            return out.loss[None]
        out = self.model(tokens, use_cache=False, output_attentions=True)
        scores = out.logits[:, :-1].float().transpose(1, 2)
        return torch.nn.functional.cross_entropy(scores, tokens[:, 1:], reduction="none").mean(1)

    def hooks(self, layer: int, head: int, *, move: bool) -> list[Any]:
        """Zero the head's slice of z, or put the first token's value in it."""
        attn, width = self.model.transformer.h[layer].attn, self.model.config.n_embd
        d_head = width // self.model.config.n_head
        part = slice(head * d_head, (head + 1) * d_head)
        first: list[Any] = []

        def note_value(module: Any, args: Any, output: Any) -> None:
            first[:] = [output[:, :1, 2 * width :][..., part]]

        def replace(module: Any, args: Any) -> Any:
            z = args[0].clone()
            z[..., part] = first[0] if move else 0.0
            return (z,)

        return [
            attn.c_attn.register_forward_hook(note_value),
            attn.c_proj.register_forward_pre_hook(replace),
        ]


class Batched:
    """All heads, as the probe does it."""

    def __init__(self, arguments: argparse.Namespace, *, continues: bool) -> None:
        import workbench as wb

        self.model = wb.wrap(build(arguments.shape, "sdpa"))
        self.rows = arguments.rows
        self.continues = continues

    def __call__(self, tokens: Any) -> Any:
        """Changes of loss ``[ablation prompt layer head]``, of all heads."""
        from probes import active_dormant_ablation as ablation
        from workbench.context import Context

        if not self.continues:
            capabilities = self.model.capabilities - {"continue"}
            type(self.model).capabilities = property(lambda model: capabilities)
        rows = ablation.rows_at_once(self.model.spec, tokens.shape[1], self.rows)
        return ablation.ablate_all_heads(self.model, tokens, Context(), rows)[1]


METHODS: dict[str, Callable[[argparse.Namespace], Callable[[Any], Any]]] = {
    "naive, a prompt at a time": lambda given: Naive(given, batched=False),
    "naive, all prompts at once": lambda given: Naive(given, batched=True),
    "workbench": lambda given: Batched(given, continues=True),
    "workbench, without continue_from": lambda given: Batched(given, continues=False),
}


def serve(name: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """Run one method whenever it is asked; says how many heads and ablations it has, and changes of loss."""
    import torch

    def build() -> turns.Built:
        torch.set_num_threads(arguments.threads)
        run = METHODS[name](arguments)
        shape = SHAPES[arguments.shape]
        heads = arguments.naive_heads if name.startswith("naive") else shape["n_head"]
        generator = torch.Generator().manual_seed(1)
        size = (arguments.prompts, arguments.n_pos)
        tokens = torch.randint(shape["vocab_size"], size, generator=generator)

        def said(found: Any) -> turns.Answer:
            return {"found": found[..., : arguments.naive_heads].tolist()}

        return {"runs": 2 * shape["n_layer"] * heads}, lambda: run(tokens), said

    with torch.no_grad():
        turns.serve(pipe, build)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds over all methods; seconds are of one head and ablation."""
    tasks = {name: (name, arguments) for name in arguments.methods}
    rows = turns.in_turn(serve, tasks, arguments.rounds)
    for name, row in rows.items():
        if "error" in row:
            raise SystemExit(f"{name}: {row['error']}")
        runs = row.pop("runs")
        for key in ("seconds", "cpu"):
            row[key] = [taken / runs for taken in row[key]]
        row["found"] = row["found"][-1]
    return rows


def summarise(rows: dict[str, Any]) -> None:
    """How many times faster than the first method, round by round; and that they agree."""
    import torch

    reference = next(iter(rows.values()))
    expected = torch.tensor(reference["found"])
    for name, row in rows.items():
        apart = (torch.tensor(row.pop("found")) - expected).abs().max().item()
        if apart > TOLERANCE:
            raise SystemExit(f"{name} lies {apart:g} nats from the naive loop")
        row["apart"], row["largest_change"] = apart, expected.abs().max().item()
        for key in ("seconds", "cpu"):
            ratios = [a / b for a, b in zip(reference[key], row[key], strict=True)]
            row[f"{key}_median"] = statistics.median(row[key])
            row[f"{key}_speed"] = statistics.median(ratios)
            row[f"{key}_range"] = [min(ratios), max(ratios)]


def fewest_products(shape: dict[str, int]) -> float:
    """Multiplications a token of one ablated head that no exact method can leave out.

    Behind the ablated head there are (L - 1) / 2 blocks on average, the MLP of its own, and the
    unembedding; everything else is free.
    """
    d, n_layers = shape["n_embd"], shape["n_layer"]
    block, mlp, unembed = 12 * d * d, 8 * d * d, d * shape["vocab_size"]
    return (n_layers - 1) / 2 * block + mlp + unembed


def least_milliseconds(arguments: argparse.Namespace) -> float:
    """Of a head, by its multiplications at the rate of one large product on so many threads."""
    import torch

    torch.set_num_threads(arguments.threads)
    n_tokens = arguments.prompts * arguments.n_pos
    return 2000 * n_tokens * fewest_products(SHAPES[arguments.shape]) / peak_flops()


def row_of(name: str, row: dict[str, Any], arguments: argparse.Namespace, least: float) -> Row:
    """One method as a row; ``least``: milliseconds of a head by multiplications."""
    milliseconds = [1000 * seconds for seconds in row["seconds"]]
    return Row(
        name=f"{arguments.shape}, {arguments.prompts} x {arguments.n_pos} tokens",
        peer=name,
        shape=", ".join(f"{key} {size}" for key, size in SHAPES[arguments.shape].items()),
        threads=arguments.threads,
        unit="ms a head",
        **spread(milliseconds),
        ratio=row["seconds_speed"],
        ratio_least=row["seconds_range"][0],
        ratio_most=row["seconds_range"][1],
        cpu_ratio=row["cpu_speed"],
        limit=least,
        distance=statistics.median(milliseconds) / least,
    )


def main() -> None:
    """Measure, print and write the record; the options are in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="gpt2-small")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--n-pos", type=int, default=64)
    parser.add_argument("--rows", type=int, default=None, help="rows of one pass of ours")
    parser.add_argument("--naive-heads", type=int, default=1, help="heads of each layer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=None)
    parser.add_argument("-o", "--output", type=Path, default=OUT / "ablation.json")
    arguments = parser.parse_args()
    if arguments.methods is None:  # one prompt is all prompts
        some = [name for name in METHODS if "all prompts" not in name]
        arguments.methods = list(METHODS) if arguments.prompts > 1 else some
    rows = measure(arguments)
    summarise(rows)
    least = least_milliseconds(arguments)
    print(
        f"{arguments.shape}, {arguments.prompts} x {arguments.n_pos} tokens, "
        f"at least {least:.0f} ms a head by arithmetic"
    )
    for name, row in rows.items():
        low, high = row["seconds_range"]
        print(
            f"  {name:36s} {1000 * row['seconds_median']:8.1f} ms a head, x{row['seconds_speed']:.2f} "
            f"({low:.2f}-{high:.2f}), CPU x{row['cpu_speed']:.2f}, {row['apart']:.1g} nats apart "
            f"(largest change {row['largest_change']:.2g})",
            flush=True,
        )
    options = (
        f"--shape '{arguments.shape}' --prompts {arguments.prompts} --rounds {arguments.rounds}"
    )
    write_record(
        "ablation",
        [row_of(name, row, arguments, least) for name, row in rows.items()],
        command=f"python benchmarks/ablation.py {options}",
        ratio_means="how many times faster a head is than in the first naive loop, by wall time",
        better="higher",
        conditions=f"{arguments.rounds} interleaved rounds; all found the same losses",
        path=arguments.output,
    )


if __name__ == "__main__":
    main()
