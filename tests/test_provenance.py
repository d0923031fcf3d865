"""What a result says about where it came from."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from layerlens import provenance as module
from layerlens.provenance import git_commit, provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit of pkg/__init__.py, from which layerlens seems to run."""
    for key in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(key, raising=False)
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "first")
    monkeypatch.setattr(module, "__file__", str(package / "provenance.py"))
    return tmp_path


def git(where: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(where), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_provenance_names_software_and_hardware():
    found = provenance()
    assert set(found) == {"python", "versions", "commit", "device", "threads"}
    extras = {"transformers", "tokenizers", "sentence-transformers", "torch-geometric"}  # which the tests install
    assert set(found["versions"]) == {"layerlens-torch", "torch", "torchvision", "numpy", "scikit-learn", *extras}
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["device"].startswith("cpu (")
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_caller_may_change_what_it_got():
    provenance()["device"] = "changed"
    assert provenance()["device"] != "changed"


def test_the_commit_is_forty_digits_with_a_plus_if_changed():
    here = Path(module.__file__).parent
    if subprocess.run(["git", "-C", str(here), "rev-parse"], capture_output=True, check=False).returncode:
        pytest.skip("layerlens does not run from a checkout here")
    assert re.fullmatch(r"[0-9a-f]{40}\+?", git_commit() or "")


def test_a_clean_checkout_gives_its_head(checkout: Path):
    assert git_commit() == git(checkout, "rev-parse", "HEAD")


def test_a_changed_checkout_gives_its_head_and_a_plus(checkout: Path):
    (checkout / "pkg" / "__init__.py").write_text("changed = True\n")
    assert git_commit() == git(checkout, "rev-parse", "HEAD") + "+"


def test_a_package_inside_somebody_elses_repository_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    installed = checkout / ".venv" / "layerlens"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(installed / "provenance.py"))
    assert git_commit() is None


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "provenance.py"))
    assert git_commit() is None


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git"), subprocess.TimeoutExpired("git", 10)],
    ids=["no git", "git fails", "git hangs"],
)
def test_without_a_working_git_there_is_no_commit(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(module.subprocess, "run", fail)
    assert git_commit() is None


def test_a_package_that_is_missing_is_named_as_such(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package-at-all"))
    module._software.cache_clear()
    try:
        assert provenance()["versions"]["no-such-package-at-all"] == "not installed"
    finally:
        module._software.cache_clear()
