"""The hub: what may not be pushed is refused early and in one line; what is pushed loads by its id; cards hold good.

No test asks the hub: `Shelf` stands in for its API, refuses as it does, and keeps what is uploaded as a cache of it is
laid out, from which transformers and huggingface_hub then read by the repository's name.
"""

import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from folders import Ran, raises, tree
from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub import errors as failures
from huggingface_hub.repocard_data import model_index_to_eval_results
from models import error, logits
from tinies import CALIBRATION, HELD_OUT, compress, folder, spoken
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import microtome
from microtome import hub, report
from microtome.errors import BadInput, BadOutput

COMMIT = "0123456789abcdef0123456789abcdef01234567"
JUNCTION = {"basis": "junction"}


class Shelf:
    """Some repositories of a hub, and everything that was asked of it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.user: dict[str, Any] = {
            "name": "ada", "orgs": [{"name": "engines"}], "auth": {"accessToken": {"role": "write"}}
        }  # fmt: skip
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}  # by name and branch
        self.public: set[str] = set()
        self.broken: dict[str, Exception] = {}

    def __call__(self, *_: Any, **__: Any) -> "Shelf":
        return self

    def _heard(self, verb: str, **said: Any) -> None:
        self.asked.append((verb, said))
        if verb in self.broken:
            raise self.broken[verb]

    def whoami(self) -> dict[str, Any]:
        self._heard("whoami")
        return self.user

    def repo_info(self, repo_id: str) -> Any:
        self._heard("repo_info", repo_id=repo_id)
        if (repo_id, "main") not in self.repos:
            raise failures.RepositoryNotFoundError("404", response=answer(404))
        return SimpleNamespace(private=repo_id not in self.public)

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        self._heard("list_repo_files", repo_id=repo_id, revision=revision)
        if (repo_id, revision or "main") not in self.repos:
            raise failures.RevisionNotFoundError("404", response=answer(404))
        return sorted(self.repos[repo_id, revision or "main"])

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        self._heard("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        self.repos.setdefault((repo_id, "main"), {".gitattributes": b""})
        return f"https://hub/{repo_id}"

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self._heard("create_branch", repo_id=repo_id, branch=branch, exist_ok=exist_ok)
        self.repos.setdefault((repo_id, branch), dict(self.repos[repo_id, "main"]))

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str, delete_patterns: str
    ) -> None:
        self._heard("upload_folder", repo_id=repo_id, revision=revision, commit_message=commit_message)
        files = self.repos[repo_id, revision or "main"]
        for name in [name for name in files if fnmatch(name, delete_patterns) and name != ".gitattributes"]:
            del files[name]
        files |= tree(folder_path)
        home = self.cache / f"models--{repo_id.replace('/', '--')}"
        place = home / "snapshots" / COMMIT
        shutil.rmtree(place, ignore_errors=True)
        for name, data in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / (revision or "main")).write_text(COMMIT)

    @property
    def changes(self) -> list[str]:
        """What was asked that leaves a trace."""
        return [verb for verb, _ in self.asked if verb.startswith(("create", "upload"))]


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A hub with a user who is logged in; its verbs are called as HfApi's can be."""
    made = Shelf(tmp_path / "cache")
    for verb in ("whoami", "repo_info", "list_repo_files", "create_repo", "create_branch", "upload_folder"):
        assert callable(getattr(HfApi, verb))
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return made


# --- what is pushed -------------------------------------------------------------------------------------------------


def test_a_stock_result_loads_by_its_name(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compress(spoken(), tmp_path / "out", slice=0.3)
    before = tree(tmp_path / "out")
    assert microtome.push(result.folder, "ada/small", private=True) == "https://hub/ada/small"
    assert tree(tmp_path / "out") == before
    assert ("create_repo", {"repo_id": "ada/small", "private": True, "exist_ok": True}) in shelf.asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found: dict[str, Any] = {"cache_dir": shelf.cache, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained("ada/small", **found)
    assert error(logits(model, HELD_OUT), logits(result.load(), HELD_OUT)) == 0
    assert transformers.AutoTokenizer.from_pretrained("ada/small", **found)("abc").input_ids
    pushed = shelf.repos["ada/small", "main"]
    assert set(pushed) == {".gitattributes", *before}
    assert {name for name in before if pushed[name] != before[name]} == {"README.md"}
    assert b'from_pretrained("ada/small")' in pushed["README.md"]
    assert b"PATH" not in pushed["README.md"]


def test_our_own_format_brings_its_code(shelf: Shelf, tmp_path: Path) -> None:
    """What `trust_remote_code` runs is a file of the repository, found by the name in its config."""
    result = compress(folder("llama"), tmp_path / "out", slice=0.3, options=JUNCTION)
    microtome.push(result.folder, "engines/own")
    found: dict[str, Any] = {"cache_dir": shelf.cache, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained("engines/own", **found)
    made = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], "engines/own", **found)
    assert made.__module__.startswith("transformers_modules")
    model = made.from_pretrained("engines/own", **found).eval()
    assert error(logits(model, HELD_OUT), logits(result.load(), HELD_OUT)) == 0


def test_hidden_files_stay_and_folders_go(shelf: Shelf, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder("llama"), place)
    (place / ".secret").write_text("no")
    (place / ".cache").mkdir()
    (place / ".cache" / "state").write_text("no")
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "tools.jinja").write_text("yes")
    hub.push(place, "ada/model")
    files = shelf.repos["ada/model", "main"]
    assert files["additional_chat_templates/tools.jinja"] == b"yes"
    assert not any("secret" in name or "state" in name for name in files)


def test_what_is_replaced_is_gone(shelf: Shelf) -> None:
    """Shards of what lay there before would be downloaded with every other file."""
    shelf.repos["ada/model", "main"] = {".gitattributes": b"kept", "model-00001-of-00002.safetensors": b"old"}
    hub.push(folder("llama"), "ada/model", overwrite=True)
    assert set(shelf.repos["ada/model", "main"]) == {".gitattributes", *tree(folder("llama"))}
    assert shelf.repos["ada/model", "main"][".gitattributes"] == b"kept"


def test_a_branch_leaves_the_main_one(shelf: Shelf) -> None:
    shelf.repos["ada/model", "main"] = {"config.json": b"{}"}
    address = hub.push(folder("llama"), "ada/model", revision="keep-0.7")
    assert address == "https://hub/ada/model/tree/keep-0.7"
    assert shelf.repos["ada/model", "main"] == {"config.json": b"{}"}
    assert shelf.repos["ada/model", "keep-0.7"] == tree(folder("llama"))
    with raises(BadOutput, r"ada/model at keep-0.7 holds \d files on the hub"):
        hub.push(folder("llama"), "ada/model", revision="keep-0.7")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "ada/model/x", "ada/", "/model", "ada/mo del", "ada/-model", "ada/a--b", ""])
def test_names(name: str, shelf: Shelf) -> None:
    with raises(BadInput, f"{re.escape(repr(name))} names no model on the hub: write owner/name"):
        hub.destination(name)
    assert shelf.asked == []


def test_no_token(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with raises(
        BadInput, r"no token to push to ada/x with: set HF_TOKEN to one that may write, or run `hf auth login`"
    ):
        hub.destination("ada/x")
    assert shelf.asked == []


def test_offline(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with raises(BadInput, "ada/x cannot be pushed to, for HF_HUB_OFFLINE is set. Unset it"):
        hub.destination("ada/x")
    assert shelf.asked == []


def test_owners(shelf: Shelf) -> None:
    with raises(BadInput, "the token is of ada, and google is none of theirs. They own: ada, engines"):
        hub.destination("google/x")
    assert hub.destination("Engines/x").repo == "Engines/x"
    shelf.user["auth"]["accessToken"]["role"] = "read"
    with raises(BadInput, "the token may only read, and ada/x is to be written: set HF_TOKEN"):
        hub.destination("ada/x")


def test_what_is_there(shelf: Shelf) -> None:
    shelf.repos["ada/new", "main"] = {".gitattributes": b""}
    shelf.repos["ada/old", "main"] = {".gitattributes": b"", "README.md": b""}
    shelf.public.add("ada/new")
    assert hub.destination("ada/new").private is False
    with raises(BadOutput, "ada/old holds 1 files on the hub. Choose another name, or pass --overwrite"):
        hub.destination("ada/old")
    assert hub.destination("ada/old", private=True, overwrite=True).overwrite
    with raises(BadInput, "ada/new is there and public. Make it private on its page, or leave out --private"):
        hub.destination("ada/new", private=True)
    assert shelf.changes == []


def test_a_hub_that_does_not_answer(shelf: Shelf) -> None:
    shelf.broken["whoami"] = failures.HfHubHTTPError(
        "401 Unauthorized. (Request ID: Root=1-2;3)\nmore", response=answer(401)
    )
    with raises(BadInput, r"ada/x cannot be pushed to: 401 Unauthorized\."):
        hub.destination("ada/x")
    shelf.broken["whoami"] = ConnectionError("")
    with raises(BadInput, "ada/x cannot be pushed to: ConnectionError"):
        hub.destination("ada/x")


def test_an_upload_that_fails_says_what_is_left(shelf: Shelf) -> None:
    shelf.broken["upload_folder"] = OSError("connection reset")
    with raises(
        BadOutput, r"is complete, but was not pushed to ada/x: connection reset\. Run `microtome push .* ada/x`"
    ):
        hub.push(folder("llama"), "ada/x")


def test_a_folder_without_a_model(shelf: Shelf, tmp_path: Path) -> None:
    for name in ("", "config.json"):
        if name:
            (tmp_path / name).write_text("{}")
        with raises(BadInput, "is no model folder: it has no config.json, or no weights"):
            hub.push(tmp_path, "ada/x")
    assert shelf.asked == []


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def online(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]) -> Shelf:
    """The stand-in for console scripts, whose fixture says that there is no hub."""
    assert run
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return shelf


@pytest.fixture
def asked(tmp_path: Path) -> list[object]:
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    data = ["--data", tmp_path / "ids.pt", "--no-evaluate", "--slice", 0.3]
    return ["compress", folder("llama"), "--out", tmp_path / "out", *data]


def test_compress_and_push(online: Shelf, run: Callable[..., Ran], asked: list[object], tmp_path: Path) -> None:
    ran = run(*asked, "--push", "ada/small", "--private")
    assert ran.code == 0, ran.err
    assert ran.out.endswith(f"written to {tmp_path / 'out'}\npushed to https://hub/ada/small\n")
    assert set(online.repos["ada/small", "main"]) == {".gitattributes", *tree(tmp_path / "out")}
    again = run(*asked, "--push", "ada/other", "--overwrite", "--json")
    assert '"pushed": "https://hub/ada/other"' in again.out


def test_push_alone(online: Shelf, run: Callable[..., Ran]) -> None:
    ran = run("push", folder("llama"), "ada/small", "--revision", "half")
    assert (ran.code, ran.out) == (0, "pushed to https://hub/ada/small/tree/half\n")
    assert ("create_branch", {"repo_id": "ada/small", "branch": "half", "exist_ok": True}) in online.asked
    ran = run("push", folder("llama"), "ada/small", "--overwrite", "--json")
    assert '"pushed": "https://hub/ada/small"' in ran.out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--push", "small"], "'small' names no model on the hub: write owner/name"),
        (["--push", "google/small"], "google is none of theirs"),
        (["--push", "ada/old"], r"ada/old holds 1 files on the hub\. .* --overwrite"),
        (["--private"], "--private is of a repository on the hub: give --push owner/name with it"),
    ],
)
def test_refused_before_anything_is_read(
    more: list[str],
    words: str,
    online: Shelf,
    refused: Callable[..., None],
    asked: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    online.repos["ada/old", "main"] = {"config.json": b"{}"}
    monkeypatch.setattr("microtome.pipeline.compress", never)
    refused(words, *asked, *more)
    assert online.changes == []


# --- cards ----------------------------------------------------------------------------------------------------------


def test_results_in_the_metadata(tmp_path: Path) -> None:
    """The hub's own reader finds the perplexity with what it was measured by."""
    result = compress(spoken(), tmp_path / "small", slice=0.3, eval_data=HELD_OUT, measure=True)
    found = result.perplexity_after
    assert found is not None
    data = ModelCard.load(tmp_path / "small" / "README.md").data.to_dict()
    name, (one,) = model_index_to_eval_results(data["model-index"])
    assert name == "small"
    assert isinstance(one, EvalResult)
    assert (one.task_type, one.metric_type, one.metric_value) == ("text-generation", "perplexity", found.value)
    assert one.metric_args == {
        "windows": 4, "length": 24, "stride": 24, "tokens": 92, "dtype": "float32", "sha256": found.sha256
    }  # fmt: skip
    assert (one.dataset_type, one.dataset_name) == ("text", found.source)
    compress(spoken(), tmp_path / "unmeasured", slice=0.3)
    assert "model-index" not in ModelCard.load(tmp_path / "unmeasured" / "README.md").data.to_dict()


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("wikitext2 (test)", ("Salesforce/wikitext", "test", "b08601e04326c79dfdd32d625aee71d232d685c3")),
        ("ptb (test, revision not pinned)", ("ptb-text-only/ptb_text_only", "test", "refs/convert/parquet")),
        ("owner/text:en (train)", ("owner/text:en", "train", None)),
        ("book.txt", ("text", None, None)),
    ],
)
def test_the_data_set_of_a_result(source: str, want: tuple[str | None, ...]) -> None:
    found = microtome.Perplexity(9.5, 2.25, 2, 8, 8, 14, "float32", source, "ab" * 32, 0.1)
    (one,) = report.evaluated(found) or []
    assert (one.dataset_type, one.dataset_split, one.dataset_revision) == want


def test_a_card_of_a_healed_model_has_its_own_perplexity(tmp_path: Path) -> None:
    result = compress(spoken(), tmp_path / "small", slice=0.3, eval_data=HELD_OUT, measure=True)
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    healed = microtome.heal(
        result.folder, data=tmp_path / "ids.pt", out=tmp_path / "healed", teacher=spoken(), eval_data=HELD_OUT,
        options={"steps": 6, "samples": 4, "batch": 2, "rate": 0.01}, device="cpu",
    )  # fmt: skip
    assert healed.after is not None
    assert result.perplexity_after is not None
    assert healed.after.value != result.perplexity_after.value
    card = ModelCard.load(tmp_path / "healed" / "README.md")
    name, (one,) = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert (name, one.metric_value) == ("healed", healed.after.value)
    assert card.data.to_dict()["license"] == "mit"
    assert "## Healed" in card.text
    assert "made smaller by Microtome" in card.text
