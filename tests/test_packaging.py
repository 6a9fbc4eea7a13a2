"""What a wheel holds: every package of the tree, its data, and nothing at the top level but scg."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    on_disk = {"scg"}
    for folder, name in ((ROOT / "scg", "scg"), (ROOT / "passes", "scg.passes"), (ROOT / "backends", "scg.backends")):
        for init in folder.rglob("__init__.py"):
            inside = init.parent.relative_to(folder).parts
            if not (inside and (folder / inside[0]).is_symlink()):
                on_disk.add(".".join((name, *inside)))
    assert on_disk == set(CONFIG["tool"]["setuptools"]["packages"])


def test_links_are_relative() -> None:
    for name in ("passes", "backends"):
        assert (ROOT / "scg" / name).readlink() == Path("..") / name


def test_wheel(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("scg", "passes", "backends"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(tree)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"scg", wheel.name.split("-py3")[0] + ".dist-info"}
    for folder in ("passes", "backends"):
        for source in (ROOT / folder).iterdir():
            if source.suffix in (".py", ".html"):
                assert f"scg/{folder}/{source.name}" in names
    assert "scg/py.typed" in names
