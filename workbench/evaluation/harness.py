"""A model of ours, edits included, as lm-evaluation-harness takes it.

    from workbench.evaluation.harness import HarnessModel
    with model.edit(wb.ZeroTuning(2.0)):
        lm_eval.simple_evaluate(HarnessModel(model), tasks=["arc_easy"])

Needs the extra ``lm_eval``. The harness tokenises and asks; the answers come from the model as it is
at that moment, so whatever is edited around the call is what is evaluated. Nothing is truncated: a
request that does not fit the model is refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor

from workbench.errors import CapabilityError, DataError
from workbench.evaluation.scoring import pad_left
from workbench.models.base import ModelAdapter

Request = tuple[Any, Sequence[int], Sequence[int]]
"""What the harness hands over: texts, tokens of the context, tokens of the continuation."""


class HarnessModel(TemplateLM):
    """See the module's docstring."""

    def __init__(self, model: ModelAdapter, batch_size: int = 8) -> None:
        """Wrap a model with a tokenizer."""
        super().__init__()
        if model.tokenizer is None:
            raise CapabilityError(f"the harness needs a tokenizer; {model.spec.name} has none")
        self.model = model
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, and begins one where there is no other."""
        tokenizer = self.model.tokenizer
        found = tokenizer.eos_token_id
        return int(tokenizer.bos_token_id if found is None else found)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of an empty context."""
        found = self.model.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.model.spec.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, with what the tokenizer puts in front unless told otherwise."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.model.tokenizer(string, add_special_tokens=special)["input_ids"])

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch_size):
            found += self._answer(requests[start : start + self.batch_size])
        return found

    def _answer(self, batch: Sequence[Request]) -> list[tuple[float, bool]]:
        rows = [[*context, *continuation][:-1] for _, context, continuation in batch]
        self._check_length(max(map(len, rows)))
        tokens, mask = pad_left(rows)
        longest = max(len(continuation) for _, _, continuation in batch)
        logits = self.model.logits(tokens, mask, last=longest).log_softmax(dim=-1)
        return [
            _read(row, continuation)
            for row, (_, _, continuation) in zip(logits, batch, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each cut into windows as the harness defines it."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for request in requests:
            (text,) = request.args
            windows: Iterator[Any] = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=min(self.model.spec.n_ctx, 2048),
                    context_len=1,
                ),
            )
            parts = self._loglikelihood_tokens([(None, *window) for window in windows])
            totals.append(sum(score for score, _ in parts))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until one of its stop strings, most likely token first.

        Raises:
            DataError: A task asks for sampling.
        """
        written = []
        for request in requests:
            context, options = request.args
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            tokens = torch.tensor([self.tok_encode(context)])
            n_new = int(options.get("max_gen_toks", 64))
            self._check_length(tokens.shape[1] + n_new)
            if options.get("do_sample"):
                raise DataError(
                    "the adapter takes the most likely token; got do_sample=True in a task"
                )
            output = self.model.generate(tokens, max_new_tokens=n_new, do_sample=False)
            text = self.model.tokenizer.decode(
                output[0, tokens.shape[1] :], skip_special_tokens=True
            )
            for stop in stops:
                text = text.split(stop)[0] if stop else text
            written.append(text)
        return written

    def _check_length(self, n_pos: int) -> None:
        if n_pos > self.model.spec.n_ctx:
            raise DataError(
                f"a request must fit in n_ctx = {self.model.spec.n_ctx} of {self.model.spec.name}; the "
                f"harness asks for {n_pos} tokens; use fewer examples, or a task of shorter texts"
            )


def _read(log_probs: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation that ends at the last row, and whether it is the likeliest."""
    wanted = torch.tensor(list(continuation))
    rows = log_probs[-len(wanted) :]
    score = rows.gather(-1, wanted[:, None]).sum()
    return float(score), bool((rows.argmax(dim=-1) == wanted).all())
