"""Provenance: code, packages and command line of every session, without secrets."""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from stepladder.core.files import read_json
from stepladder.train import provenance

CPU = torch.device("cpu")


def test_every_session_adds_an_entry(tmp_path):
    provenance.record(tmp_path, CPU, 0)
    sessions = provenance.record(tmp_path, CPU, 7)
    assert read_json(tmp_path / "provenance.json") == {"sessions": sessions}
    assert [session["from_step"] for session in sessions] == [0, 7]
    assert sessions[0]["packages"]["torch"] == torch.__version__
    assert sessions[0]["device"].startswith("cpu ")
    assert len(sessions[0]["code"]["sources"]) == 64


def test_secrets_on_the_command_line_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/stepladder", "train", "--hf-token=abc123", "x=hf_abcdefgh12345"])
    text = str(provenance.record(tmp_path, CPU, 0)) + (tmp_path / "provenance.json").read_text()
    assert "abc123" not in text
    assert "hf_abcdefgh12345" not in text
    assert "somewhere" not in text
    assert "'stepladder', 'train'" in text


def copy_of_package(monkeypatch, folder):
    package = folder / "stepladder"
    shutil.copytree(provenance.PACKAGE / "core", package)
    (package / "run.py").write_text("")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    return package


def test_code_changes_show_in_the_digest_and_the_commit_is_the_packages_own(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = copy_of_package(monkeypatch, tmp_path)
    before = provenance.code()
    git("init")
    (tmp_path / "other.txt").write_text("somebody's own repository around an installed package")
    git("add", "other.txt")
    git("commit", "-m", "one")
    assert provenance.code() == before
    assert before["commit"] is None

    git("add", ".")
    git("commit", "-m", "two")
    tracked = provenance.code()
    assert len(tracked["commit"]) == 40
    assert tracked["modified"] is False
    (package / "run.py").write_text("changed = 1\n")
    assert provenance.code()["modified"] is True
    assert provenance.code()["sources"] != before["sources"]


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    copy_of_package(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", "")
    assert provenance.code()["commit"] is None
