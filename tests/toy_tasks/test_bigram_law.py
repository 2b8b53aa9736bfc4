"""The law holds on a million tokens, and the oracle is exact."""

import time

import pytest
import torch

from toy_tasks.bigram_law import (
    CharacterCounts,
    count_characters,
    decode,
    excess_risk,
    make_law,
    oracle,
    read_counts,
    sample,
    split_risk,
)
from workbench.errors import ConfigError, DataError


def draw(law, n_rows, n_pos, seed=0):
    return sample(law, n_rows, n_pos, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def law():
    return make_law(read_counts())


@pytest.fixture(scope="module")
def million(law):
    return draw(law, 4096, 256)


def test_counts_of_a_short_text_are_right_by_hand():
    counts = count_characters("abcab")
    assert counts.characters == ("a", "b", "c")
    assert counts.single.tolist() == [2, 2, 1]
    assert counts.pair.tolist() == [[0, 2, 0], [0, 0, 1], [1, 0, 0]]


def test_the_reference_statistics_are_those_of_the_paper(law):
    assert law.d_vocab == 66
    assert law.triggers.tolist() == [1, 43, 58]
    assert decode(law, law.triggers.tolist()) == " et"
    shares = law.unigram[law.triggers].float()
    assert torch.allclose(shares, torch.tensor([0.1523, 0.0848, 0.0601]), atol=5e-5)


def test_every_row_of_the_law_is_a_distribution(law):
    assert torch.allclose(law.transition.sum(dim=1), torch.ones(66, dtype=torch.float64))
    assert torch.all(law.transition[law.bos, law.triggers] == 0)
    assert torch.all(law.transition[:, law.bos] == 0)


def test_triggers_are_never_adjacent_and_copy_what_stood_before_them(law, million):
    is_trigger = law.is_trigger[million]
    assert not (is_trigger[:, 1:] & is_trigger[:, :-1]).any()
    after = is_trigger[:, 1:-1]
    assert torch.equal(million[:, 2:][after], million[:, :-2][after])
    assert torch.all(million[:, 0] == law.bos)
    assert not is_trigger[:, 1].any()


def test_the_share_of_triggers_is_the_papers(law, million):
    share = law.is_trigger[million[:, 1:]].float().mean().item()
    assert share == pytest.approx(0.257, abs=0.001)


def test_conditional_frequencies_lie_within_their_sampling_error(law, million):
    current, following = million[:, :-1], million[:, 1:]
    free = ~law.is_trigger[current]
    seen = torch.bincount(
        current[free] * law.d_vocab + following[free], minlength=law.d_vocab**2
    ).view(law.d_vocab, law.d_vocab)
    total = seen.sum(dim=1, keepdim=True)
    assert torch.all(seen[law.transition == 0] == 0)
    expected = total * law.transition
    many = expected > 20
    deviation = (seen - expected) / (expected * (1 - law.transition)).clamp(min=1e-9).sqrt()
    assert deviation[many].abs().max() < 5.0
    assert deviation[many].square().mean() == pytest.approx(1.0, abs=0.25)


def test_it_draws_a_million_tokens_a_second(law):
    start = time.perf_counter()
    draw(law, 2048, 256)
    # A tenth of what is reached on an idle core: the machine may be shared.
    assert 2048 * 256 / (time.perf_counter() - start) > 1e6


def test_the_same_seed_draws_the_same_tokens(law):
    assert torch.equal(draw(law, 3, 20, seed=7), draw(law, 3, 20, seed=7))
    assert not torch.equal(draw(law, 3, 20, seed=7), draw(law, 3, 20, seed=8))


def test_the_oracle_copies_after_triggers_and_knows_position_0(law, million):
    tokens = million[:8, :40]
    truth = oracle(law, tokens)
    assert torch.equal(truth[0, 0], law.transition[law.bos])
    row, pos = law.is_trigger[tokens].nonzero()[0].tolist()
    assert truth[row, pos].argmax() == tokens[row, pos - 1]
    assert truth[row, pos].max() == 1.0
    row, pos = (~law.is_trigger[tokens]).nonzero()[9].tolist()
    assert torch.equal(truth[row, pos], law.transition[tokens[row, pos]])


def test_the_oracle_has_no_excess_risk_and_guessing_has(law, million):
    tokens = million[:8, :40]
    truth = oracle(law, tokens)
    assert excess_risk(truth.log().clamp(min=-1e30), truth).abs().max() == 0.0
    guess = torch.full_like(truth, 1 / law.d_vocab).log()
    backcopy, bigram = split_risk(excess_risk(guess, truth), law, tokens)
    assert backcopy == pytest.approx(torch.tensor(66.0).log().item())
    assert 0.5 < bigram < backcopy


def test_position_0_counts_for_neither_risk(law, million):
    tokens = million[:4, :30]
    risk = torch.zeros(4, 30, dtype=torch.float64)
    risk[:, 0] = 1e9
    assert split_risk(risk, law, tokens) == (0.0, 0.0)


def test_a_text_of_the_users_makes_its_own_law(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat " * 50, encoding="utf-8")
    law = make_law(read_counts(str(path)), triggers=" ")
    assert decode(law, law.triggers.tolist()) == " "
    assert decode(law, draw(law, 1, 30)[0].tolist()).startswith("<s>")


def test_a_last_character_without_successor_is_followed_by_anything():
    law = make_law(count_characters("aabbaabbc"), triggers=1)
    assert torch.equal(law.transition[2, :3], law.unigram[:3])


@pytest.mark.parametrize(
    ("triggers", "words"),
    [(0, "at least 1"), (3, "at most 2"), ("", "at least 1"), ("abc", "got 3"), ("z", "'z'")],
)
def test_impossible_triggers_are_refused(triggers, words):
    with pytest.raises(ConfigError, match=words):
        make_law(count_characters("abcab"), triggers)


@pytest.mark.parametrize("text", ["", "a", "abababab"])
def test_too_few_characters_are_refused(text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="3 distinct characters"):
        read_counts(str(path))


def test_a_text_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt"):
        read_counts(str(tmp_path / "missing.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DataError, match="UTF-8"):
        read_counts(str(tmp_path / "bytes.txt"))


def test_rare_events_are_neither_lost_nor_invented():
    characters = ("a", "b", "c")
    pair = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    law = make_law(CharacterCounts(characters, torch.tensor([5, 4, 4]), pair), triggers="a")
    text = "".join(decode(law, row) for row in draw(law, 8, 60).tolist())
    assert not {"bb", "cb", "ba", "cc"} & {text[index : index + 2] for index in range(len(text))}
    assert set(text.replace("<s>", "")) == set("abc")
