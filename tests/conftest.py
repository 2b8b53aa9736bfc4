"""What all tests share. No test reaches a network."""

import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real models and texts; the test is skipped where it does not lie."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the folder of real models and texts beside the repository")
    return SHARED_DATA


@pytest.fixture
def store_path(tmp_path, monkeypatch) -> Path:
    """A folder for a store, which is also the default one meanwhile."""
    path = tmp_path / "store"
    monkeypatch.setenv("WORKBENCH_HOME", str(path))
    return path


def _save_byte_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>").save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A GPT-2 of two layers with random weights and one token a byte, as a folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = GPT2Config(
        vocab_size=_save_byte_tokenizer(folder),
        n_positions=48,
        n_embd=16,
        n_layer=2,
        initializer_range=0.3,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
