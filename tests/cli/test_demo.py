"""``workbench demo`` and ``workbench report``, on a tiny model."""


def test_demo_writes_a_page_and_a_second_run_only_reads(
    command, tiny_folder, tmp_path, monkeypatch
):
    from workbench import discovery
    from workbench.cli import demo

    monkeypatch.setattr(demo, "N_POS", 24)
    monkeypatch.setattr(demo, "RECIPES", {})
    # One probe and one toy: ``.ci/run`` runs the whole demo.
    monkeypatch.setattr(discovery, "load_probes", lambda: [discovery.find_probe("attention-sinks")])
    monkeypatch.setattr(demo, "TOYS", {"scan-snap": {"steps": "10"}})
    first = command("demo", "-o", tmp_path / "demo", "-m", tiny_folder)
    assert first.code == 0
    assert "sink at position 0" in first.out
    assert "next: open" in first.err
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "attention-sinks" in page
    assert "https://" not in page.split("<script")[0]
    second = command("demo", "-o", tmp_path / "demo", "-m", tiny_folder)
    assert second.out == first.out
    assert "loading" not in second.err


def test_report_of_a_store(run_tiny, command, tmp_path):
    run_tiny()
    done = command("report", "-o", tmp_path / "page.html")
    assert done.out == f"{tmp_path / 'page.html'}\n"
    assert "attention-sinks" in (tmp_path / "page.html").read_text()


def test_report_into_a_missing_folder(command, tmp_path):
    failed = command("report", "-o", tmp_path / "missing" / "page.html")
    assert failed.failed_with("must exist")


def test_demo_onto_a_file(command, tmp_path):
    (tmp_path / "demo").write_text("mine")
    assert command("demo", "-o", tmp_path / "demo").failed_with("must be a folder")
    assert (tmp_path / "demo").read_text() == "mine"
