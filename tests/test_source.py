"""Reading model folders, from the disk and from the hub."""

import gc
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from folders import CONFIG, INDEX, SINGLE, model, raises, sharded, tree
from huggingface_hub import errors as hub
from safetensors.torch import load_file
from torch import Tensor

from microtome.errors import BadCheckpoint, BadInput, NumericalFailure, UnsupportedModel
from microtome.source import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Reading


def test_a_folder_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    expected = load_file(folder / SINGLE)
    with open_source(folder) as source:
        assert source.names() == tuple(sorted(expected))
        assert (source.folder, source.name, source.revision, source.config) == (folder, str(folder), None, CONFIG)
        assert source.nbytes == (folder / SINGLE).stat().st_size
        for name, tensor in expected.items():
            assert name in source
            assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            read = source.tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
            assert read.untyped_storage().nbytes() == tensor.nbytes
    assert "embed" not in source


def test_reads_are_copies_and_work_from_threads_and_after_close(tmp_path: Path) -> None:
    source = open_source(model(tmp_path))
    source.tensor("embed.weight").zero_()
    expected = load_file(tmp_path / SINGLE)
    found: list[bool] = []

    def read() -> None:
        found.extend(torch.equal(source.tensor(name), expected[name]) for name in expected for _ in range(20))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 20 * len(expected)
    assert all(found)
    source.close()
    assert torch.equal(source.tensor("embed.weight"), expected["embed.weight"])
    source.close()


def test_shards_read_as_one_and_forgotten_tensors_are_there(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.arange(4)}
    folder = sharded(tmp_path / "m", {"a": "one.safetensors", "c": "two.safetensors"}, one=one, two=two)
    with open_source(folder) as source:
        assert source.names() == ("a", "b", "c")
        assert all(torch.equal(source.tensor(name), tensor) for name, tensor in (one | two).items())
        assert source.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_shards_may_be_links_that_leave_the_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "snapshots" / "m", one={"a": torch.ones(2)})
    blob = tmp_path / "blobs" / "f00"
    blob.parent.mkdir()
    (folder / "one.safetensors").rename(blob)
    (folder / "one.safetensors").symlink_to(Path("..") / ".." / "blobs" / "f00")
    with open_source(folder) as source:
        assert torch.equal(source.tensor("a"), torch.ones(2))


def test_code_in_a_checkpoint_is_ignored(tmp_path: Path) -> None:
    folder = model(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    with open_source(folder, trust=True) as source:
        assert source.trust
        assert source.names()


def test_a_source_that_is_dropped_closes_its_files(tmp_path: Path) -> None:
    open_source(model(tmp_path)).tensor("scale")
    gc.collect()  # an open file would warn here, and warnings are errors


def test_an_unknown_tensor_gets_the_nearest_name(tmp_path: Path) -> None:
    with (
        open_source(model(tmp_path)) as source,
        raises(BadCheckpoint, r"no tensor named 'norms.weight'.*'norm.weight'"),
    ):
        source.tensor("norms.weight")


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    source = open_source(model(tmp_path))
    os.truncate(tmp_path / SINGLE, source.nbytes - 1)
    with source, raises(BadCheckpoint, "became shorter after it was opened"):
        for name in source.names():
            source.tensor(name)


def test_a_file_that_vanishes_after_opening_is_an_error(tmp_path: Path) -> None:
    source = open_source(model(tmp_path))
    (tmp_path / SINGLE).unlink()
    with raises(BadCheckpoint, r"cannot read .*model\.safetensors: No such file"):
        source.tensor("scale")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_finite_names_tensor_and_file(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(70, 9, dtype=dtype)
    weight[64, 3] = value
    with open_source(model(tmp_path, {"a.weight": weight, "n": torch.arange(3)})) as source:
        with raises(NumericalFailure, r"a\.weight in .*model\.safetensors is NaN or infinite in 1 of 630 places"):
            source.check_finite("a.weight", source.tensor("a.weight"))
        source.check_finite("a.weight", weight[:64])
        source.check_finite("a.weight", weight[:0])
        source.check_finite("n", source.tensor("n"))


def test_digest_depends_on_contents_and_not_on_place(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(300, 300), "b": torch.zeros(300, 300), "c": torch.zeros(300, 300)}
    digests: dict[str, str] = {}

    def take(name: str, changed: dict[str, Tensor], **config: Any) -> None:
        with open_source(model(tmp_path / name, changed, **config)) as source:
            digests[name] = source.digest()

    take("first", weights)
    take("again", weights)
    take("config", weights, hidden_size=5)
    take("middle", weights | {"b": torch.ones(300, 300)})
    take("corner", weights | {"b": weights["b"].index_put((torch.tensor(299), torch.tensor(299)), torch.tensor(1.0))})
    take("renamed", {"a": weights["a"], "b": weights["b"], "d": weights["c"]})
    assert digests.pop("first") == digests["again"]
    assert len(set(digests.values())) == 5
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values())


# The hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hub ids that were asked for; every question fails as it does offline."""
    ids: list[str] = []

    def offline(repo_id: str, **_: Any) -> str:
        ids.append(repo_id)
        raise hub.LocalEntryNotFoundError("outgoing traffic has been disabled.\nMore lines.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return ids


@pytest.mark.parametrize("name", ["./m", "../m", "/nowhere/m", "~/nowhere/m", "a/b/c", "m/", "a\\b", ""])
def test_what_looks_like_a_path_is_never_asked_for(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(BadInput, "no folder '"):
        open_source(name)
    assert asked == []


def test_a_file_is_not_a_model(asked: list[str], tmp_path: Path) -> None:
    with raises(BadInput, "is a file. Give the folder that holds it"):
        open_source(model(tmp_path) / SINGLE)
    assert asked == []


def test_offline(asked: list[str]) -> None:
    with raises(BadInput, r"no folder named 'a/b', and the hub could not be reached \(outgoing.*\).*`hf download a/b`"):
        open_source("a/b")
    assert asked == ["a/b"]


def test_offline_with_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with raises(BadInput, r"the hub could not be reached \(.+\).*hf download nobody/nothing"):
        open_source("nobody/nothing")
    with raises(BadInput, "no folder named 'no body', and no hub id looks like it"):
        open_source("no body")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub.GatedRepoError, "a/b is gated.*Accept its terms.*hf auth login"),
        (hub.RepositoryNotFoundError, "no folder and no hub model 'a/b'. Check the spelling"),
        (hub.RevisionNotFoundError, "hub model a/b has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind, "refused\nby the hub")  # its constructor wants a response of the HTTP library in use

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with raises(BadInput, words):
        open_source("a/b", revision="v9")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with raises(BadInput, "has no revision 'main'"):
        open_source(model(tmp_path), revision="main")


class Hub:
    """A hub with one model, whose cache folder fills as patterns are asked for."""

    def __init__(self, repo: Path, cache: Path) -> None:
        self.repo, self.cache = repo, cache / COMMIT
        self.calls: list[tuple[str | None, list[str]]] = []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repo_id == "owner/name"
        self.calls.append((revision, allow_patterns))
        self.cache.mkdir(exist_ok=True)
        names = [path.relative_to(self.repo).as_posix() for path in self.repo.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repo / name, self.cache / name)
        return str(self.cache)

    def list_repo_files(self, repo_id: str, *, revision: str | None) -> list[str]:
        assert (repo_id, revision) == ("owner/name", COMMIT)
        return sorted(path.name for path in self.repo.iterdir())


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    repo = tmp_path / "repo"
    repo.mkdir()
    served = Hub(repo, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", served.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", served.list_repo_files)
    return served


EXTRAS = ["tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE", "USE_POLICY.md", "generation_config.json"]
UNWANTED = [
    "pytorch_model.bin",
    "consolidated.safetensors",
    "onnx/model.onnx",
    "original/params.json",
    "training_args.bin",
]


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_a_hub_model_is_downloaded_without_what_is_not_read(served: Hub, tmp_path: Path, form: str) -> None:
    if form == "single":
        model(served.repo)
    else:
        served.repo.rmdir()
        sharded(served.repo, one={"a": torch.ones(1)}, two={"b": torch.zeros(1)})
    for name in [*EXTRAS, *UNWANTED, "tokenization_own.py"]:
        (served.repo / name).parent.mkdir(exist_ok=True)
        (served.repo / name).write_text("")
    with open_source("owner/name", revision="main") as source:
        assert (source.name, source.revision, source.folder) == ("owner/name", COMMIT, tmp_path / COMMIT)
        assert torch.equal(
            source.tensor(source.names()[0]),
            load_file(next(iter(served.cache.glob("*.safetensors"))))[source.names()[0]],
        )
    weights = {SINGLE} if form == "single" else {INDEX, "one.safetensors", "two.safetensors"}
    assert set(tree(served.cache)) == {*EXTRAS, "config.json", *weights}
    assert [revision for revision, _ in served.calls] == ["main"] + [COMMIT] * (len(served.calls) - 1)
    open_source("owner/name", trust=True).close()
    assert (served.cache / "tokenization_own.py").is_file()


def test_a_quantised_hub_model_is_refused_before_its_weights_come(served: Hub) -> None:
    model(served.repo, quantization_config={"quant_method": "aqlm", "bits": 4})
    with raises(UnsupportedModel, "aqlm, 4 bits"):
        open_source("owner/name")
    assert set(tree(served.cache)) == {"config.json"}


def test_a_hub_model_of_pickles_is_named(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (model(served.repo) / SINGLE).rename(served.repo / "pytorch_model.bin")
    with raises(UnsupportedModel, r"owner/name holds only pickle weights \(pytorch_model\.bin\).*'owner/name'"):
        open_source("owner/name")

    def offline(*_: Any, **__: Any) -> list[str]:
        raise hub.OfflineModeIsEnabled

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with raises(BadCheckpoint, "owner/name has neither"):
        open_source("owner/name")
