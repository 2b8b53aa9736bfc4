"""``workbench train`` writes a toy for transformers too, where one of its models is the same."""

import pytest
import torch

import workbench as wb
from tests.models.agreement import LIBRARY_WARNINGS

pytestmark = [pytest.mark.filterwarnings(text) for text in LIBRARY_WARNINGS]
TINY = [
    word
    for pair in ("n_pos=16", "d_model=16", "batch_size=4", "steps=6", "n_held_out=4")
    for word in ("--set", pair)
]


def test_a_toy_that_transformers_can_express_lies_beside_itself(command, tmp_path):
    folder = tmp_path / "toy"
    assert command("train", "bigram-backcopy", *TINY, "-o", folder).code == 0
    tokens = torch.arange(32).view(2, 16)
    wanted = wb.load(f"toy:{folder}").logits(tokens)
    found = wb.load(str(folder / "transformers")).logits(tokens)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("bigram-backcopy", *TINY, "--set", "attention=relu"), "attention=relu"),
        (("scan-snap", "--set", "steps=3"), "hides a query from itself"),
    ],
    ids=["relu", "scan-snap"],
)
def test_another_says_why_not(command, tmp_path, words, reason):
    done = command("train", *words, "-o", tmp_path / "toy")
    assert done.code == 0
    assert reason in done.err
    assert not (tmp_path / "toy" / "transformers").exists()
