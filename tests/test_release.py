"""What is released: the wheel holds what git has of the package, and its version comes from the tag."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# One of each kind of data that is no Python: lost, it would only be missed by who installs the wheel.
DATA = [
    "deepen/py.typed",
    "deepen/families/llama.toml",
    "deepen/demo/base/model.safetensors",
    "deepen/demo/settings.yaml",
    "deepen/evaluation/suites/open-llm.yaml",
]


def git(*words: str, where: Path = ROOT) -> str:
    return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=True).stdout


def hatchling(*words: str, where: Path = ROOT) -> str:
    command = [sys.executable, "-m", "hatchling", *words]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    return git("ls-files", "src/deepen").split()


def test_the_wheel_holds_what_git_has(tracked, tmp_path):
    pytest.importorskip("hatchling")
    hatchling("build", "-t", "wheel", "-d", str(tmp_path))
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if ".dist-info/" in name}
    present = {name for name in tracked if (ROOT / name).is_file()}
    assert {name.removeprefix("src/") for name in present} <= names
    # A new file not yet committed may be in the wheel; nothing but the package is.
    assert all(name.startswith("deepen/") for name in names - info)
    assert set(DATA) <= names
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_the_version_comes_from_the_tag(tracked, tmp_path):
    pytest.importorskip("hatchling")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "src" / "deepen").mkdir(parents=True)
    (tmp_path / "src" / "deepen" / "__init__.py").write_text("")
    assert hatchling("version", where=tmp_path).strip() == "0.1.0.dev0"
    git("init", "-q", where=tmp_path)
    git("add", "-A", where=tmp_path)
    commit = (
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@example.org",
        "commit",
        "-q",
        "--allow-empty",
        "-m",
        "x",
    )
    git(*commit, where=tmp_path)
    assert hatchling("version", where=tmp_path).startswith("0.1.0.dev1+g")
    git("tag", "v0.2.0", where=tmp_path)
    assert hatchling("version", where=tmp_path).strip() == "0.2.0"
    git(*commit, where=tmp_path)
    assert hatchling("version", where=tmp_path).startswith("0.2.1.dev1+g")
