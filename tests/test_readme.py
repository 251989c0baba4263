"""What the README shows is run as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_of_the_readme_runs(block, server, capsys):
    assert "localhost:8001" in block
    exec(block.replace("localhost:8001", server.url), {})
    assert capsys.readouterr().out


def test_targets_and_files_of_the_readme_are_there():
    root = Path(__file__).parent.parent
    targets = set(re.findall(r"^([a-z-]+):.*##", (root / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (root / link).exists(), link
