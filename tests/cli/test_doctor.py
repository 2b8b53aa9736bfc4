"""``workbench doctor``."""


def test_doctor_reports_and_never_fails(command, store_path):
    found = command("doctor", "--json").json
    assert found["packages"]["torch"]
    assert found["torch"]["threads"] >= 1
    assert found["store"] == {"path": str(store_path), "exists": False, "writable": True}
    assert not store_path.exists()


def test_doctor_says_what_a_missing_package_is_for(command, monkeypatch):
    from workbench.cli import doctor

    monkeypatch.setattr(doctor, "package_version", lambda package: None)
    shown = command("doctor")
    assert shown.code == 0
    assert "pip install torch" in shown.out
    assert "the nnsight backend" in shown.out
