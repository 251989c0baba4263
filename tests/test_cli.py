import sys
from importlib.metadata import EntryPoint

from click.testing import CliRunner
from sparrow_client import cli


def test_verb_whose_packages_are_missing_says_what_it_needs_and_hides_no_other(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("benchmarks.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    text = CliRunner().invoke(cli.sparrow, ["--help"]).output
    assert "Needs jinja2: pip install 'sparrow-serving[eval]'" in text
    assert "segment" in text
    result = CliRunner().invoke(cli.sparrow, ["eval", "mevis", "--data", "x"])
    assert result.exit_code == 1
    assert result.output == "Error: eval needs jinja2: pip install 'sparrow-serving[eval]'\n"


def test_every_verb_is_there():
    text = CliRunner().invoke(cli.sparrow, ["--help"]).output
    assert all(f"  {name} " in text for name in ("bench", "doctor", "eval", "export", "segment", "serve", "track"))
    assert "Needs" not in text


def test_verbs_name_code_that_is_there():
    for entry in cli.entry_points(group="sparrow.verbs"):
        assert isinstance(entry, EntryPoint)
        assert entry.load().name == entry.name
