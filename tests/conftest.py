"""Fixtures that several files share: the console script, and the one way in which it may refuse.

One thread: tiny matrices gain nothing from more, and two workers of pytest-xdist would fight for two cores.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import Ran, tree

import microtome_cli
from microtome import healing

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Healing multiplies in fp32, whatever the machine is good at, but on real models."""
    if "real" not in request.keywords:
        monkeypatch.setattr(healing, "pays", lambda _: False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The console script with these arguments; it does not ask the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["microtome", *(str(word) for word in words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            microtome_cli.main()
        out, err = capfd.readouterr()
        return Ran(int(stopped.value.code or 0), out, err)

    return run


@pytest.fixture
def refused(run: Callable[..., Ran], tmp_path: Path) -> Callable[..., None]:
    """Run and expect a refusal: exit code 2, one line, these words, and every file as it was."""

    def refused(words: str, *arguments: object) -> None:
        before = tree(tmp_path)
        folders = sorted(tmp_path.rglob("*"))
        ran = run(*arguments)
        assert re.fullmatch(r"microtome: [^\n]+\n", ran.err), ran.err
        assert re.search(words, ran.err), ran.err
        assert ran.code == 2
        assert ran.out == ""
        assert tree(tmp_path) == before
        assert sorted(tmp_path.rglob("*")) == folders

    return refused
