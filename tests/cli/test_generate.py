"""``workbench generate``: text, stock and edited."""

import json

import pytest


@pytest.fixture
def generate(command, tiny_folder):
    def run(*more):
        fixed = ("generate", "-m", tiny_folder, "--prompt", "abc", "--max-new-tokens", "8")
        return command(*fixed, *more)

    return run


def test_text_goes_to_stdout_alone(generate):
    first, second = generate(), generate()
    assert first.code == 0
    assert first.err == ""
    assert first.out == second.out


def test_compare_shows_both_and_a_no_op_changes_nothing(generate):
    same = generate("--intervention", "zerotuning", "--set", "gamma=1", "--compare", "--json").json
    assert same["continuation"] == same["stock"] == generate("--json").json["continuation"]
    table = generate("--intervention", "zerotuning", "--set", "gamma=1", "--compare").out
    assert table.split()[:2] == ["stock", "zerotuning"]


def test_an_intervention_changes_the_text(generate):
    # Silencing every head of a model with random weights leaves a different next token.
    found = generate("--intervention", "zero-heads", "--set", "heads=L0H0,L0H1,L1H0,L1H1",
                     "--compare", "--json").json  # fmt: skip
    assert found["continuation"] != found["stock"]
    assert found["intervention"]["heads"] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_file_may_be_changed_by_settings(generate, tmp_path):
    path = tmp_path / "change.json"
    path.write_text(json.dumps({"name": "zerotuning", "gamma": 3.0}))
    found = generate("--intervention", path, "--set", "gamma=1.0", "--set", "heads=L0H1", "--json")
    assert found.json["intervention"]["gamma"] == 1.0
    assert found.json["intervention"]["heads"] == [[0, 1]]


def test_compare_needs_something_to_compare(generate):
    assert generate("--compare").code == 2


def test_every_listed_intervention_works_by_name(generate, command, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"vector": torch.ones(16)}, tmp_path / "vector.safetensors")
    save_file({"mean": torch.ones(1, 8)}, tmp_path / "mean.safetensors")
    settings = {
        "zerotuning": ["gamma=3,0.5", "heads=L0H1,L1H0"],
        "scale-keys": ["positions=0,1", "factor=3"],
        "zero-heads": ["heads=L0H0"],
        "mean-heads": ["heads=L0H0", f"mean={tmp_path / 'mean.safetensors'}"],
        "add-vector": [
            "site=L0.resid_post",
            f"vector={tmp_path / 'vector.safetensors'}",
            "scale=9",
        ],
    }
    listed = [
        row["name"] for row in command("list", "interventions", "--json").json["interventions"]
    ]
    assert set(settings) <= set(listed)
    for name in listed:
        given = [part for text in settings.get(name, []) for part in ("--set", text)]
        found = generate("--intervention", name, *given, "--json")
        assert found.code == 0, (name, found.err)
        assert found.json["intervention"]["name"] == name


def test_one_gamma_a_head_changes_those_heads(generate):
    both = generate("--intervention", "zerotuning", "--set", "gamma=50,1", "--set", "heads=L0H0,L1H1",
                    "--json").json  # fmt: skip
    one = generate("--intervention", "zerotuning", "--set", "gamma=50", "--set", "heads=L0H0",
                   "--json").json  # fmt: skip
    assert both["continuation"] == one["continuation"]
    assert both["intervention"]["gamma"] == [50.0, 1.0]
