"""Every command line of the project: its help, and that what the documents show of it exists."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT
from test_project import PACKAGES

from training.config import parse_config

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in (ROOT / package).glob("*.py")
    if "ArgumentParser(" in (text := path.read_text(encoding="utf-8")) and '__name__ == "__main__"' in text
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def help_of(module: str, monkeypatch, capsys) -> str:
    if module in ("training.train", "training.schedule"):  # which take the same settings
        with pytest.raises(SystemExit) as ended:
            parse_config(["--help"])
    else:
        monkeypatch.setattr("sys.argv", [module, "--help"])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def commands(text: str):
    """The words of each command of ours in the bash blocks of a page, by its module."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "training/train.py" in words:
                yield "training.train", words[words.index("training/train.py") + 1 :]
            elif "-m" in words and (module := words[words.index("-m") + 1]).partition(".")[0] in PACKAGES:
                yield module, words[words.index("-m") + 2 :]


@pytest.mark.parametrize("module", [*MODULES, "training.train"])
def test_help_reads_as_documentation(module, monkeypatch, capsys):
    """What it does, each option once, defaults where there are any."""
    text = help_of(module, monkeypatch, capsys)
    assert text.startswith("usage: ") and len(text.split("\n\n")[1]) > 20
    assert "None" not in text and "-- " not in text.replace("--name value", "")
    options = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(options) == len(set(options))


def test_options_on_the_pages_exist(monkeypatch, capsys):
    texts, shown = {}, 0
    for page in PAGES:
        for module, words in commands(page.read_text(encoding="utf-8")):
            if module not in texts:
                texts[module] = help_of(module, monkeypatch, capsys)
            for word in words:
                if word.startswith("--"):
                    shown += 1
                    option = word.partition("=")[0]
                    if (module, option) == ("training.schedule", "--plot"):
                        continue  # the one that is its own
                    assert re.search(rf"{option}\b", texts[module]), f"{page.name}: {module} has no {option}"
    assert shown > 60


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_presets_are_listed(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--list_presets"])
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"gpt2-124m +124,439,808 +12 +768 +12 +1,024 +524,288 +6\.0e-04", line) for line in lines)
