"""A batch is chosen from the memory that there is, steps back when it was too large, and leaves nothing behind."""

import gc
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import workbench as wb
from tests.zoo import random_tokens, tiny_model
from workbench import memory
from workbench.models.base import ModelSpec
from workbench.run import Reporter

SPEC = ModelSpec(
    name="x",
    family="gpt2",
    revision="",
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    d_model=768,
    d_head=64,
    d_mlp=3072,
    d_vocab=50_257,
    n_ctx=1024,
)
GB = 1 << 30


def resident_bytes():
    """Memory of the process's own; pages of files (libraries) come and go as the kernel likes."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_the_batch_is_what_half_of_the_free_memory_holds():
    # At 1,000 tokens: activations 4 * 1000 * (16 * 768 + 4 * 3072) = 98 MB, logits 201 MB a prompt.
    sizes = {
        free: memory.automatic_batch_size(SPEC, 1000, free) for free in (0, GB, 2 * GB, 64 * GB)
    }
    assert sizes == {0: 1, GB: 1, 2 * GB: 2, 64 * GB: 2}  # 256 MB of activations are aimed at
    assert memory.automatic_batch_size(SPEC, 10, GB) == 128  # 179 prompts of 3 MB; a power of two
    assert memory.automatic_batch_size(SPEC, 10, 64 * GB) == 256  # 273 prompts of 0.98 MB


def test_the_free_memory_is_the_least_of_what_limits_us(monkeypatch, tmp_path):
    job = tmp_path / "batch" / "job"
    job.mkdir(parents=True)
    for folder, limit, used, cache in (
        (job, "max", 10, 0),
        (job.parent, 3_000_000, 1_500_000, 500_000),
    ):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    own = tmp_path / "own"
    own.write_text("0::/batch/job\n")
    assert memory.free_memory_bytes() > 2_000_000
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert list(memory._group_bytes(own)) == [2_000_000]  # cache can be dropped: it is free
    (job / "memory.max").write_text("1000010\n")
    assert sorted(memory._group_bytes(own)) == [1_000_000, 2_000_000]
    own.write_text("3:cpu,memory:/batch/job\n0::/elsewhere\n")
    assert list(memory._group_bytes(own)) == []


def test_a_limit_of_the_process_counts():
    code = (
        "import resource; from workbench.memory import free_memory_bytes as free;"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); print(free())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 * GB < int(done.stdout) < GB


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_too_little_memory(error, expected):
    assert memory.is_out_of_memory(error) is expected


def test_backing_off_halves_down_to_one_and_then_gives_up():
    asked, told = [], []

    def attempt(size):
        asked.append(size)
        if size > 2:
            raise MemoryError
        return "done"

    assert memory.backing_off(64, attempt, 24, told.append) == "done"
    assert asked == [64, 12, 6, 3, 1]
    assert len(told) == 4
    assert "going on with 1 prompts" in told[-1]
    with pytest.raises(MemoryError):
        memory.backing_off(4, lambda size: (_ for _ in ()).throw(MemoryError()), 4)
    with pytest.raises(RuntimeError, match="shapes"):
        memory.backing_off(4, lambda size: (_ for _ in ()).throw(RuntimeError("shapes")), 4)


def plant(monkeypatch, model, most, method="capture", at=0):
    """Let a method's forward pass hold ``most`` rows at a time; the batches it was given.

    ``at``: which of its arguments is the batch.
    """
    seen, whole = [], getattr(type(model), method)

    def limited(self, *arguments, **named):
        seen.append(len(arguments[at]))
        if seen[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried a lot")
        return whole(self, *arguments, **named)

    monkeypatch.setattr(type(model), method, limited)
    return seen


def test_a_run_steps_back_and_finds_the_same_numbers(tmp_path, monkeypatch):
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(12, 10)
    expected = wb.run("attention-sinks", model, tokens, batch_size=12)
    told = []
    seen = plant(monkeypatch, model, 4)
    reporter = Reporter(message=told.append)
    found = wb.run("attention-sinks", model, tokens, store=tmp_path, reporter=reporter)
    assert found.key == expected.key
    torch.testing.assert_close(found.score, expected.score)
    assert seen == [12, 6, 3, 3, 3, 3]
    assert len(told) == 2
    assert list((tmp_path / "pieces").iterdir()) == []


def test_ablated_rows_step_back_with_the_batch(monkeypatch):
    """They are passes of their own; a smaller batch with as many rows would fail as before."""
    model, tokens = wb.wrap(tiny_model("gpt2")), random_tokens(8, 12)
    domains = {"a": tokens[:4], "b": tokens[4:]}
    expected = wb.run("active-dormant", model, domains, n_examples=0)
    seen = plant(monkeypatch, model, 2, "continue_from", 1)
    found = wb.run("active-dormant", model, domains, n_examples=0)
    assert max(seen) > 2
    assert set(seen[-8:]) == {2}
    torch.testing.assert_close(found.ablation_loss, expected.ablation_loss)


def test_a_batch_size_that_was_given_is_kept(monkeypatch):
    model = wb.wrap(tiny_model("gpt2"))
    seen = plant(monkeypatch, model, 2)
    with pytest.raises(RuntimeError, match="allocate memory"):
        wb.run("attention-sinks", model, random_tokens(4, 10), batch_size=4)
    assert seen == [4]


def test_little_free_memory_makes_small_batches(monkeypatch):
    model = wb.wrap(tiny_model("gpt2"))
    seen = plant(monkeypatch, model, 99)
    spec = model.spec
    prompt_bytes = 4 * 10 * (16 * spec.d_model + 4 * spec.d_mlp + spec.d_vocab)
    free = lambda device: 2 * 2 * prompt_bytes  # noqa: E731
    monkeypatch.setattr("workbench.models.memory.free_memory_bytes", free)
    wb.run("attention-sinks", model, random_tokens(5, 10))
    assert seen == [2, 2, 1]


REAL_LIMIT = """
import resource, torch
import workbench as wb
import workbench.models.memory
from workbench.run import Reporter
from workbench import memory
from tests.zoo import tiny_model
torch.set_num_threads(1)
model = wb.wrap(tiny_model("gpt2", vocab_size=20_000, n_positions=256))
tokens = torch.randint(0, 20_000, (32, 256), generator=torch.Generator().manual_seed(0))
wb.run("attention-sinks", model, tokens[:1])
# The choice is made to believe in all the memory of the world; the process may have 160 MB more.
workbench.models.memory.free_memory_bytes = lambda device="cpu": 1 << 40
used = memory._field("/proc/self/status", "VmSize:")
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20),) * 2)
told = []
found = wb.run("active-dormant", model, {"a": tokens[:16], "b": tokens[16:]}, reporter=Reporter(message=told.append))
print(len(told), *(text.split()[7] for text in told), sep=",")
"""


@pytest.mark.slow
def test_a_process_that_may_not_have_more_steps_back_and_ends():
    done = subprocess.run(
        [sys.executable, "-c", REAL_LIMIT],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-1500:]
    n, *sizes = map(int, done.stdout.split(","))
    assert n == len(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)


def hooks_of(model):
    """Every hook on every module."""
    return sum(
        len(hooks)
        for module in model.model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


N_RUNS = 200
ALLOWED_BYTES = 4 << 20
TWO_HUNDRED = """
import gc, tempfile, torch
import workbench as wb
from tests.test_memory import N_RUNS, hooks_of, resident_bytes
from tests.zoo import random_tokens, tiny_model
from workbench.store.results import Store
torch.set_num_threads(1)
model, store = wb.wrap(tiny_model("gpt2")), Store(tempfile.mkdtemp(dir=FOLDER))
tokens = random_tokens(2, 12)
def run(number):
    with model.edit(wb.ZeroTuning(gamma=1.0 + number % 5 / 10)):
        wb.run("attention-sinks", model, tokens, store=store, cache="refresh").metrics()
        wb.run("token-dynamics", model, tokens, seed=number % 3)
hooks = hooks_of(model)
for number in range(40):  # to warm up
    run(number)
before, objects = resident_bytes(), len(gc.get_objects())
for number in range(N_RUNS):
    run(number)
print(resident_bytes() - before, len(gc.get_objects()) - objects, hooks_of(model) - hooks)
"""


@pytest.mark.slow
def test_two_hundred_runs_end_with_the_memory_they_began_with(tmp_path):
    """In a process without the checks of shapes, which keep 132 objects of their own for every run."""
    code = TWO_HUNDRED.replace("FOLDER", repr(str(tmp_path)))
    line = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-1500:]
    n_bytes, n_objects, n_hooks = map(int, done.stdout.split())
    assert n_bytes < ALLOWED_BYTES
    assert n_objects < N_RUNS  # not one object a run
    assert n_hooks == 0


def tensors_alive():
    """How many tensors Python's collector knows."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_two_models_take_turns_and_leave_nothing():
    tokens = random_tokens(2, 12)
    gone = []

    def turn(family):
        model = wb.wrap(tiny_model(family))
        gone.append(weakref.ref(model.model))
        wb.run("attention-sinks", model, tokens)

    for _ in range(2):
        turn("gpt2")
        turn("llama")
    before = tensors_alive()
    for _ in range(6):
        turn("gpt2")
        turn("llama")
    assert tensors_alive() == before
    assert [ref() for ref in gone if ref() is not None] == []


@pytest.mark.gpu
def test_two_hundred_runs_leave_no_memory_of_the_gpu_taken(tmp_path):
    model = wb.wrap(tiny_model("gpt2").to("cuda"))
    tokens = random_tokens(2, 12)
    for _ in range(5):
        wb.run("attention-sinks", model, tokens)
    before = torch.cuda.memory_allocated()
    for _ in range(N_RUNS):
        wb.run("attention-sinks", model, tokens)
    assert torch.cuda.memory_allocated() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
