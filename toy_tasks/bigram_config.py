"""Settings of a Bigram-Backcopy run; see ``toy_tasks.bigram_backcopy``."""

import math
from dataclasses import dataclass

from toy_tasks.model import BIASES, KERNELS, ToyModelConfig
from toy_tasks.training import TrainingConfig
from workbench.settings import check_settings, setting


@dataclass(frozen=True)
class BigramBackcopyConfig:
    """A run. The paper takes d_model 256, 256 positions, batches of 512, lr 3e-4, 10000 steps."""

    n_layers: int = setting(1, "blocks (paper: 1 and 3)", low=1, high=12)
    n_heads: int = setting(1, "heads of a block", low=1)
    d_model: int = setting(64, "width of the residual stream", low=2)
    n_pos: int = setting(64, "tokens that the model reads, <s> included", low=4)
    batch_size: int = setting(32, "sequences of one step", low=1)
    lr: float = setting(3e-3, "learning rate, without warm-up or decay", low=0.0, exclusive=True)
    steps: int = setting(700, "updates", low=1)
    seed: int = setting(0, "of weights, batches and held-out sequences", low=0)
    attention: str = setting("softmax", "kernel of the attention", choices=tuple(KERNELS))
    row_sum: float = setting(1.0, "sum of a row of softmax-scale", low=0.0, exclusive=True)
    bias: str = setting("none", "what a head can attend to besides tokens", choices=BIASES)
    norm: str = setting("pre", "where the norms stand", choices=("pre", "post"))
    positions: str = setting(
        "learned", "how positions enter", choices=("learned", "rotary", "none")
    )
    mlp: bool = setting(True, "an MLP of four times the width in every block")
    optimizer: str = setting("adamw", "method of descent", choices=("adamw", "adam", "sgd"))
    momentum: float = setting(0.9, "beta1, or the momentum of sgd", low=0.0, high=1.0)
    weight_decay: float = setting(1e-4, "pull to zero of matrices", low=0.0)
    triggers: int | str = setting(
        3, "how many of the most frequent characters are triggers, or the characters themselves"
    )
    text: str | None = setting(None, "a text file whose characters are imitated; none: the paper's")
    n_held_out: int = setting(64, "held-out sequences that are measured", low=1)
    checkpoints_per_doubling: float = setting(
        2.0, "checkpoints kept while the step doubles", low=0.0, exclusive=True
    )
    device: str = setting("cpu", "where it trains", choices=("cpu", "cuda"))

    def __post_init__(self) -> None:
        check_settings(self)

    def model(self, d_vocab: int) -> ToyModelConfig:
        """The model's part."""
        return ToyModelConfig(
            d_vocab=d_vocab,
            n_ctx=self.n_pos,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            d_mlp=4 * self.d_model if self.mlp else 0,
            norm=self.norm,
            positions=self.positions,
            attention=self.attention,
            row_sum=self.row_sum,
            bias=self.bias,
        )

    def training(self) -> TrainingConfig:
        """The training loop's part: a constant learning rate, and no clipping, as in the paper."""
        return TrainingConfig(
            n_steps=self.steps,
            lr=self.lr,
            warmup_steps=0,
            decay_share=0.0,
            optimizer=self.optimizer,
            beta1=self.momentum,
            weight_decay=self.weight_decay,
            grad_clip=math.inf,
            seed=self.seed,
            checkpoints_per_doubling=self.checkpoints_per_doubling,
            report_every=50,
        )
