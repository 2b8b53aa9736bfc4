"""Settings of a demo language model."""

from dataclasses import dataclass

from toy_tasks.training import TrainingConfig
from workbench.errors import ConfigError
from workbench.settings import check_settings, setting


@dataclass(frozen=True)
class LanguageModelConfig:
    """Settings of a demo language model; docs/demo_model.md says which made the shipped one."""

    n_layers: int = setting(4, "blocks", low=1.0)
    n_heads: int = setting(4, "attention heads of a block", low=1.0)
    d_model: int = setting(128, "width of the residual stream, a multiple of n_heads", low=1.0)
    n_ctx: int = setting(256, "tokens of a training sequence, BOS included", low=64.0)
    d_vocab: int = setting(2048, "tokens of the vocabulary", low=300.0)
    batch_size: int = setting(8, "sequences of a step", low=1.0)
    n_steps: int = setting(7200, "updates", low=1.0)
    lr: float = setting(3e-3, "learning rate between warm-up and decay", low=0.0, exclusive=True)
    warmup_steps: int = setting(200, "steps over which the learning rate rises", low=0.0)
    decay_share: float = setting(
        0.25,
        "share of the steps, at the end, over which it falls",
        low=0.0,
        high=1.0,
    )
    final_lr_share: float = setting(0.05, "last learning rate, as a share of lr", low=0.0, high=1.0)
    weight_decay: float = setting(0.1, "pull of all matrices to zero", low=0.0)
    beta2: float = setting(0.99, "memory of AdamW for the squared gradient", low=0.0, high=1.0)
    succession_share: float = setting(
        0.2, "share of the sequences cut from generated succession text", low=0.0, high=1.0
    )
    copy_share: float = setting(
        0.08, "share of the sequences cut from generated copying text", low=0.0, high=1.0
    )
    backcopy_share: float = setting(
        0.4,
        "share of the sequences cut from marked text, from backcopy_from on",
        low=0.0,
        high=1.0,
    )
    backcopy_from: int = setting(3350, "step from which marked text is mixed in", low=0.0)
    held_out_share: float = setting(
        0.04,
        "share of every file, at its end, kept for measuring",
        low=0.0,
        high=0.5,
        exclusive=True,
    )
    start_from: str = setting(
        "", "a checkpoint of an earlier run on this text whose weights are the first ones"
    )
    exclude: tuple[str, ...] = setting(
        (), "files of the text folder, or zip/member, to leave out; * is allowed"
    )
    seed: int = setting(0, "seed of weights, batches and generated text", low=0.0)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_settings(self)
        if self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model must be a multiple of n_heads={self.n_heads}; got {self.d_model}. "
                "Change one of them."
            )
        generated = self.succession_share + self.copy_share + self.backcopy_share
        if generated > 1:
            raise ConfigError(
                "succession_share, copy_share and backcopy_share must leave room for the text; "
                f"they sum to {generated}. Lower one of them."
            )

    def shares_at(self, step: int) -> tuple[float, ...]:
        """Return the shares of text, succession, copying and, later, marked text."""
        natural = 1 - self.succession_share - self.copy_share
        if step < self.backcopy_from:
            return (natural, self.succession_share, self.copy_share)
        rest = (self.succession_share, self.copy_share, self.backcopy_share)
        return (natural - self.backcopy_share, *rest)

    def training(self) -> TrainingConfig:
        """Return the settings of the shared loop."""
        return TrainingConfig(
            n_steps=self.n_steps,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_share=self.decay_share,
            final_lr_share=self.final_lr_share,
            weight_decay=self.weight_decay,
            beta2=self.beta2,
            seed=self.seed,
        )
