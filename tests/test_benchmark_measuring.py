"""What benchmarks measure with: processes that are asked in turn, memory, products; and the loops they compare with."""

import json
import subprocess
import sys

import pytest
import torch

from tests.scripts import BENCHMARKS, benchmarks
from tests.zoo import tiny_model


@pytest.fixture(scope="module")
def load():
    with benchmarks() as import_script:
        yield import_script


SCRIPT = """
import json, os, signal, sys

sys.path.insert(0, {benchmarks!r})
import turns

def task(number, pipe):
    asked = []

    def run():
        asked.append(number)
        if number == 2 and len(asked) == 2:
            raise ArithmeticError("twice")
        return len(asked)

    def build():
        if number == 1:
            import no_such_package
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {{"number": number}}, run, lambda result: {{"count": result}}

    turns.serve(pipe, build)

if __name__ == "__main__":
    print(json.dumps(turns.in_turn(task, json.loads(sys.argv[1]), 3)))
"""


def in_turn(folder, tasks):
    """The processes of a program of its own."""
    script = folder / "program.py"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    line = [sys.executable, str(script), json.dumps(tasks)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def test_methods_are_asked_in_turn_and_one_that_fails_is_said_to(tmp_path):
    """The second cannot be built, the third fails when it is asked twice, the fourth is killed."""
    found = json.loads(in_turn(tmp_path, {"a": [0], "b": [1], "c": [2], "d": [3]}).stdout)
    assert (found["a"]["number"], found["a"]["count"]) == (0, [1, 2, 3])
    assert len(found["a"]["seconds"]) == len(found["a"]["cpu"]) == 3
    assert found["b"] == {"error": "no_such_package is not installed"}
    assert found["c"] == {"error": "ArithmeticError: twice"}
    assert "ended without an answer" in found["d"]["error"]


def test_a_method_of_ours_that_fails_is_no_row(tmp_path):
    done = in_turn(tmp_path, {"workbench, b": [1]})
    assert done.returncode == 1
    assert "workbench, b failed: no_such_package is not installed" in done.stderr


def test_products_are_counted_where_a_gradient_is_taken_in_between(load):
    layer, x = torch.nn.Linear(5, 7, bias=False), torch.ones(3, 5, requires_grad=True)

    def work():
        return torch.autograd.grad(layer(x).sum(), x)

    # 3 x 5 x 7 multiplications and additions, forwards and for the gradient of x.
    assert load("race").products(work) == 2 * 2 * 3 * 5 * 7


def test_the_plain_loop_of_attacks_forces_a_token(load):
    attack = load("reference.activation_attack_loop").attack
    model = tiny_model("gpt2")
    context = torch.arange(3, 11)
    wanted = model(context[None]).logits[0, -1].argsort()
    options = {"places": [6, 7], "lr": 0.3}
    assert attack(model, context, wanted[-1:], **options, steps=0) == 1
    assert attack(model, context, wanted[-5:-4], **options, steps=0) == 0
    assert attack(model, context, wanted[-5:-4], **options, steps=60) == 1


def test_the_least_work_of_an_ablated_head_is_what_stands_behind_it(load):
    """Counted block by block: of the ablated head's own block the MLP, of those behind it all, and the unembedding."""
    ablation = load("ablation")
    shape = {"n_layer": 4, "n_embd": 3, "vocab_size": 7}
    attention, mlp = 4 * 9, 8 * 9
    each = [mlp + (3 - layer) * (attention + mlp) + 3 * 7 for layer in range(4)]
    assert ablation.fewest_products(shape) == sum(each) / 4


def test_memory_is_what_a_piece_of_work_takes_though_the_process_has_had_it_before(load):
    """64 MiB, written to; a second time what the first has given back counts again."""
    extra_mb = load("resident").extra_mb

    def work():
        return torch.ones(64 << 18)

    for _ in range(2):
        assert 60 < extra_mb(work) < 90
    assert extra_mb(lambda: None) < 8
