"""The benchmark of a GPU, on a tiny model and a CPU: its rows, its refusals, its arithmetic."""

import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.scripts import benchmarks
from workbench.attention import streaming
from workbench.attention.column_kernel import SETTING, why_not_here
from workbench.attention.statistics import _ColumnMean

PEAK = (1e9, 1e6)
"""Operations and bytes a second."""


@pytest.fixture(scope="module")
def load():
    with benchmarks() as import_script:
        yield import_script


@pytest.fixture(scope="module")
def gpu(load):
    return load("gpu")


@pytest.fixture(scope="module")
def methods(load):
    return load("gpu_methods")


@pytest.fixture(scope="module")
def subject(methods):
    with torch.no_grad():
        yield methods.Subject.build("tiny", "cpu", torch.float32, 300)


def found(seconds, extra_mb=None):
    return {"seconds": seconds, "extra_mb": extra_mb}


def test_every_way_of_reading_has_a_row_beside_the_plain_forward(gpu, methods, subject):
    rows = gpu.capture_rows(subject, 64, 1, PEAK, [1 << 12])
    assert [row.peer for row in rows] == [
        methods.PLAIN,
        "workbench, sinks",
        "workbench, sinks + value norms + residual norms",
        "workbench, sinks, tiles of 4,096 numbers",
        "workbench, sinks, column kernel",
        methods.EAGER,
        "least by arithmetic",
        "least by bandwidth",
    ]
    assert {row.name for row in rows} == {"read, T = 64"}
    assert rows[0].ratio == 1.0
    kernel = rows.pop(4)
    if needed := why_not_here("cpu"):
        assert (kernel.note, kernel.median) == (f"not measured: it needs {needed}", None)
    else:
        assert math.isfinite(kernel.ratio)
    for row in rows[:5]:
        assert row.unit == "s"
        assert row.median > 0.0
        assert math.isfinite(row.ratio)
        assert row.peak_memory is None, "a CPU's memory is not measured in a shared process"


def test_every_way_of_decoding_has_a_row_beside_stock(gpu, methods, subject):
    ways = methods.ways(subject)
    rows = gpu.decode_rows(subject, ways, 2, 1, PEAK, {})
    ends = "T = 16, batch 2"
    assert [(row.name, row.peer) for row in rows] == [
        (f"decode, no edit; {ends}", "stock generate"),
        (f"decode, zerotuning score; {ends}", "workbench, zerotuning score"),
        (f"decode, zerotuning score; {ends}", "eager, edited score"),
        (f"decode, zerotuning key; {ends}", "workbench, zerotuning key"),
        (f"decode, zerotuning key; {ends}", "eager, edited key"),
        (f"decode, no edit; {ends}", "least by arithmetic"),
        (f"decode, no edit; {ends}", "least by bandwidth"),
    ]
    for row in rows[:5]:
        assert row.unit == "s a step"
        assert math.isfinite(row.ratio)
        assert row.note.startswith(f"{2 / row.median:,.3g} tokens/s")


def test_a_step_is_the_time_between_the_first_and_the_last_logits(
    gpu, methods, subject, monkeypatch
):
    stamps = iter([10.0, 16.0])
    monkeypatch.setattr(gpu, "clock_of", lambda device: next(stamps))
    stock = methods.ways(subject)[0]
    assert gpu.step_seconds(stock, subject.tokens(1, 5), 4, "cpu") == 2.0


def test_limits_are_those_of_a_llama(load, methods, subject):
    """Operations by torch's own count, less what eager attention multiplies behind the causal mask."""
    from torch.utils.flop_counter import FlopCounterMode

    decoder = load("peaks").Decoder.llama(methods.SHAPES["tiny"])
    model = methods.twin(subject.model, "eager")
    tokens = torch.zeros(3, 5, dtype=torch.long)
    hidden = 2 * 3 * (25 - 15) * 2 * 2 * 64
    for unembed in (True, False):
        with FlopCounterMode(display=False) as counter:
            model(tokens) if unembed else model.model(tokens)
        # Positions are turned by a product with one number for each: nothing a model must do.
        turning = 3 * 5 * 2 * (64 // 4 // 2)
        flops = decoder.flops(5, unembed=unembed, batch=3)
        assert counter.get_total_flops() - hidden - flops in (0, turning, turning // 3)
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert decoder.n_bytes(unembed=False, word=2) == 2 * weights
    assert decoder.n_bytes(unembed=True, word=2) == 2 * (weights + model.lm_head.weight.numel())


def test_the_seven_billion_are_seven_billion(load, methods):
    decoder = load("peaks").Decoder.llama(methods.SHAPES["llama-7b"])
    # Touvron et al. 2023, table 2: 6.7B parameters, the embedding (131M) among them.
    words = decoder.n_bytes(unembed=True, word=1) + decoder.d_model * decoder.d_vocab
    assert round(words / 1e9, 1) == 6.7


def test_weights_are_made_in_their_precision_the_same_each_time_and_once(methods):
    one, two = (methods.Subject.build("tiny", "cpu", torch.bfloat16, 64).model for _ in range(2))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))
    other = methods.twin(one, "eager")
    assert all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert (one.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")


def test_sinks_that_are_not_eagers_stop_it(load, subject, monkeypatch):
    checks = load("gpu_checks")
    checks.check_sinks(subject)
    # The mean over all rows, those that cannot see the key included.
    monkeypatch.setattr(_ColumnMean, "finish", lambda self: self.total / self.shape.n_q)
    with pytest.raises(
        SystemExit, match="sinks must be those of eager attention's maps; workbench"
    ):
        checks.check_sinks(subject)


@pytest.mark.parametrize("mode", ["score", "key"])
def test_an_edit_that_is_not_eagers_stops_it(mode, load, subject, monkeypatch):
    checks = load("gpu_checks")
    ways = load("gpu_methods").ways

    def wrong(subject, gamma, key_gamma):
        right, other = ways(subject, gamma, key_gamma), ways(subject, 0.9 * gamma, 0.9 * key_gamma)
        peer = f"workbench, zerotuning {mode}"
        return [
            replace(way, run=each.run) if way.peer == peer else way
            for way, each in zip(right, other, strict=True)
        ]

    monkeypatch.setattr(checks, "ways", wrong)
    with pytest.raises(SystemExit, match=f"zerotuning {mode} must make the edit of eager"):
        checks.check_edits(subject)


def test_an_edit_that_does_nothing_stops_it(load, subject, monkeypatch):
    checks = load("gpu_checks")
    monkeypatch.setattr(checks, "GAMMA", 1.0)
    with pytest.raises(SystemExit, match="score must change the logits"):
        checks.check_edits(subject)


def test_a_way_that_cannot_be_checked_is_not_timed(gpu, load, methods, subject, monkeypatch):
    checks = load("gpu_checks")

    def broken(*given, **options):
        raise RuntimeError("no compiler\nand more")

    def ways(*given):
        found = methods.ways(*given)
        return [*found, replace(found[1], peer="workbench, other", run=broken)]

    monkeypatch.setattr(checks, "ways", ways)
    not_run = checks.check_edits(subject)
    assert not_run == {"workbench, other": "RuntimeError: no compiler"}
    rows = gpu.decode_rows(subject, ways(subject), 1, 1, PEAK, not_run)
    row = next(row for row in rows if row.peer == "workbench, other")
    assert (row.note, row.median) == ("not measured: RuntimeError: no compiler", None)


def test_a_tile_of_another_size_is_for_one_reading_alone(methods):
    seen = []
    wrapped = SimpleNamespace(
        spec=SimpleNamespace(n_layers=1),
        capture=lambda *given: seen.append(streaming._budget(torch.device("cpu"))),
    )
    subject = methods.Subject("tiny", "cpu", torch.float32, None, wrapped)
    methods.reading(subject, tile=7)(torch.zeros(1, 2))
    methods.reading(subject)(torch.zeros(1, 2))
    assert seen == [(7, 1024), (streaming.TILE_FLOATS, streaming.TILE_ROWS)]


def test_the_column_kernel_is_asked_for_in_its_own_reading_alone(methods, monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    seen = []
    wrapped = SimpleNamespace(
        spec=SimpleNamespace(n_layers=1),
        capture=lambda *given: seen.append(os.environ.get(SETTING)),
    )
    subject = methods.Subject("tiny", "cpu", torch.float32, None, wrapped)
    methods.reading(subject, kernel=True)(torch.zeros(1, 2))
    methods.reading(subject)(torch.zeros(1, 2))
    assert seen == ["triton", None]


def test_eager_is_not_run_where_its_maps_do_not_fit(gpu, methods, subject, monkeypatch):
    # Two layers' maps, 4 heads of 64 x 64, and one layer's scores and softmax: 16 bytes an entry.
    needed = 4 * 64 * 64 * 16
    monkeypatch.setattr(methods, "free_memory_bytes", lambda device: needed + 1)
    assert methods.too_large(subject, 64) == ""
    monkeypatch.setattr(methods, "free_memory_bytes", lambda device: needed)
    row = next(r for r in gpu.capture_rows(subject, 64, 1, PEAK, []) if r.peer == methods.EAGER)
    assert row.note == "not measured: its maps take 0.000262 GB and 0.000262 GB are free"
    assert row.median is None


def test_aims_that_are_missed_stand_in_the_note(load, methods, subject):
    rows = load("gpu_rows").reading_rows(
        subject,
        64,
        {
            methods.PLAIN: found([1.0, 2.0, 4.0], 10.0),
            "workbench, near": found([1.3, 2.6, 5.2], 11.0),
            "workbench, far": found([1.4, 2.8, 5.6], 12.0),
            methods.EAGER: found([9.0, 9.0, 9.0], 90.0),
        },
        PEAK,
    )
    plain, near, far, eager = (row.note for row in rows[:4])
    assert (plain, near, eager) == ("", "1.1 times the plain memory", "9 times the plain memory")
    assert far == (
        "1.2 times the plain memory; misses the aim of 1.1 for memory; misses the aim of 1.3 for time"
    )
    # Its weights, four bytes each: four 64 x 64 and three 64 x 176 in two layers.
    limit = 4 * 2 * (4 * 64 * 64 + 3 * 64 * 176) / PEAK[1]
    assert (rows[2].limit, rows[2].distance) == pytest.approx((limit, 2.8 / limit))


def test_a_decoded_token_has_an_aim_too(load, methods, subject):
    edits = dict.fromkeys((methods.STOCK, "workbench, near", "workbench, far"), "edit")
    seconds = {methods.STOCK: found([0.095]), "workbench, near": found([0.1])}
    seconds["workbench, far"] = found([0.11])
    rows = load("gpu_rows").decoding_rows(subject, edits, 8, seconds, PEAK)
    assert [row.note for row in rows[:2]] == ["84.2 tokens/s", "80 tokens/s, 0.95 of stock's"]
    assert rows[2].note == "72.7 tokens/s, 0.864 of stock's; misses the aim of 0.95"
    assert [bool(row.why) for row in rows[:3]] == [False, True, True]


def test_without_the_plain_forward_nothing_is_reported(gpu, methods, subject, monkeypatch):
    def no_kernel(tokens):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(methods, "plain", lambda subject: no_kernel)
    with pytest.raises(SystemExit, match=r"flash attention must run.*No available kernel"):
        gpu.capture_rows(subject, 64, 1, PEAK, [])


def test_without_a_gpu_one_line_says_so(gpu, load, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        gpu.main([])
    assert left.value.code == load("record").NOT_HERE == 77
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("cuda must be a CUDA device; torch ")


def test_weights_that_do_not_fit_are_refused_before_they_are_made(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "free_memory_bytes", lambda device: 8e9)
    with pytest.raises(SystemExit) as left:
        gpu.main(["--device", "cpu"])
    assert left.value.code == 77
    assert "llama-7b takes 13.5 GB and 8.0 GB are free" in capsys.readouterr().err


def test_what_is_written_is_a_record_that_the_page_can_show(gpu, load, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "peak_flops", lambda **given: PEAK[0])
    monkeypatch.setattr(gpu, "peak_bandwidth", lambda **given: PEAK[1])
    monkeypatch.setattr(gpu, "name_of", lambda device: "A card, 80 GiB")
    path, given = tmp_path / "gpu.json", "--device cpu --shape tiny --lengths 32 --rounds 1"
    gpu.main([*given.split(), "--dtype", "float32", "-o", str(path)])
    record = load("record").read_record(path)
    assert record["benchmark"] == "gpu"
    assert record["machine"].startswith("A card, 80 GiB; ")
    assert len(record["rows"]) == 9 + 2 * 7
    shown = load("render").table(record)
    assert "| **workbench, sinks** |" in shown
    assert (
        "`python benchmarks/gpu.py --device cpu --shape tiny --lengths 32 --dtype float32`" in shown
    )


@pytest.mark.gpu
def test_it_runs_on_a_gpu(gpu, load, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = tmp_path / "gpu.json"
    gpu.main(["--shape", "tiny", "--lengths", "64", "--rounds", "1", "-o", str(path)])
    record = load("record").read_record(path)
    assert torch.cuda.get_device_name() in record["machine"]
    measured = [row for row in record["rows"] if row.ratio is not None]
    kernel = "workbench, sinks, column kernel"
    assert {"workbench, sinks", kernel, "workbench, zerotuning score"} <= {
        row.peer for row in measured
    }
    assert all(row.peak_memory is not None for row in measured)
