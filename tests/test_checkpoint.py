"""Writing model folders: an output is complete, or it is absent."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import CONFIG, INDEX, SINGLE, model, raises, tensors, tree
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from microtome import checkpoint as checkpoint_module
from microtome.checkpoint import Writer, copy_companions
from microtome.errors import BadInput, BadOutput
from microtome.source import open_source

# Writing


def write(out: Path, weights: dict[str, Tensor], **options: Any) -> Writer:
    with Writer(out, **options) as writer:
        writer.write_json("config.json", CONFIG)
        for name, tensor in weights.items():
            writer.add(name, tensor)
    return writer


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    weights = tensors()
    writer = write(tmp_path / "new" / "parents" / "out", weights)
    assert writer.files == ("config.json", SINGLE)
    assert writer.total_bytes == sum(tensor.nbytes for tensor in weights.values())
    with open_source(tmp_path / "new" / "parents" / "out") as source:
        assert source.names() == tuple(sorted(weights))
        assert all(torch.equal(source.tensor(name), tensor) for name, tensor in weights.items())
        assert all(source.dtype(name) == tensor.dtype for name, tensor in weights.items())
    with safe_open(tmp_path / "new" / "parents" / "out" / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    original = transformers.LlamaForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    with open_source(tmp_path / "source") as source, Writer(tmp_path / "out", max_shard_size=3000) as writer:
        writer.write_json("config.json", source.config)
        assert copy_companions(source, writer) == ["generation_config.json"]
        for name in source.names():
            writer.add(name, source.tensor(name))
    assert sum(name.endswith(".safetensors") for name in writer.files) > 2
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(tokens).logits, original(tokens).logits)


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert write(tmp_path / "out", tensors()).files == ("config.json", SINGLE)


def test_shards_split_where_the_next_tensor_would_overflow(tmp_path: Path) -> None:
    weights = {f"w{n}": torch.full((10,), float(n)) for n in range(5)} | {"big": torch.zeros(50), "last": torch.ones(1)}
    writer = write(tmp_path / "out", weights, max_shard_size=80)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 40 + 200 + 4}
    assert list(index["weight_map"]) == sorted(weights)
    shards = [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    assert writer.files == ("config.json", *shards, INDEX)
    assert sorted(tree(tmp_path / "out")) == sorted(writer.files)
    found = [load_file(tmp_path / "out" / shard) for shard in shards]
    assert [sorted(shard) for shard in found] == [["w0", "w1"], ["w2", "w3"], ["w4"], ["big"], ["last"]]
    for shard, content in zip(shards, found, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in content.items())
        assert all(index["weight_map"][name] == shard for name in content)
    with open_source(tmp_path / "out") as source:
        assert source.names() == tuple(sorted(weights))


def test_two_writes_are_byte_identical(tmp_path: Path) -> None:
    for size in (60, 5_000_000_000):
        write(tmp_path / f"a{size}", tensors(), max_shard_size=size)
        write(tmp_path / f"b{size}", tensors(), max_shard_size=size)
        assert tree(tmp_path / f"a{size}") == tree(tmp_path / f"b{size}")


def test_views_shared_and_later_changed_tensors_are_stored_as_they_were(tmp_path: Path) -> None:
    large = torch.randn(1000, 1000)
    weights = {
        "view": large[:2, :3],
        "turned": large[:3, :2].T,
        "wide": large[:1, :1].expand(4, 4),
        "same": large[:2, :3],
    }
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    with Writer(tmp_path / "out") as writer:
        for name, tensor in weights.items():
            writer.add(name, tensor)
        writer.add("gradient", torch.ones(2, requires_grad=True))
        large.zero_()
    assert (tmp_path / "out" / SINGLE).stat().st_size < 1000
    stored = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


def test_text_json_and_copies(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\x00words\r\n")
    (tmp_path / "tokenizer.json").chmod(0o444)
    (tmp_path / "link").symlink_to("tokenizer.json")
    with Writer(tmp_path / "out") as writer:
        writer.write_text("README.md", "größer\n")
        writer.write_json("plan.json", {"b": 1, "a": "ü"})
        writer.copy(tmp_path / "tokenizer.json")
        writer.copy(tmp_path / "link", "deep/copy.json")
    assert tree(tmp_path / "out") == {
        "README.md": "größer\n".encode(),
        "deep/copy.json": b"\x00words\r\n",
        "plan.json": '{\n  "b": 1,\n  "a": "ü"\n}\n'.encode(),
        "tokenizer.json": b"\x00words\r\n",
    }
    assert not (tmp_path / "out" / "deep" / "copy.json").is_symlink()
    assert os.access(tmp_path / "out" / "tokenizer.json", os.W_OK)
    assert writer.files == ("README.md", "deep/copy.json", "plan.json", "tokenizer.json")


def test_the_output_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "out", tensors())
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Atomicity


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Writer(tmp_path / "new" / "out", max_shard_size=8) as writer:  # noqa: PT012
        writer.add("a", torch.ones(2))
        writer.add("b", torch.ones(2))
        assert len(list(tmp_path.glob("new/.out.partial-*/*.safetensors"))) == 1
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_output(tmp_path: Path) -> None:
    old = tree(model(tmp_path / "out"))
    with pytest.raises(RuntimeError), Writer(tmp_path / "out", overwrite=True) as writer:  # noqa: PT012
        writer.write_json("config.json", {})
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == old


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    (model(tmp_path / "out") / "stale.txt").write_text("old")
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        write(tmp_path / name, {"a": torch.ones(1)}, overwrite=True)
        assert sorted(tree(tmp_path / name)) == ["config.json", SINGLE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_overwrite_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    model(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", {"a": torch.ones(1)}, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert list(load_file(tmp_path / "real" / SINGLE)) == ["a"]


def test_a_failing_swap_brings_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tree(model(tmp_path / "out"))
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.partial") and target.name == "out":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with raises(BadOutput, "could not write the finished folder of .*Input/output error"):
        write(tmp_path / "out", tensors(), overwrite=True)
    assert tree(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_files_that_cannot_be_removed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "out")
    rmtree = shutil.rmtree

    def fail(path: Path, **options: Any) -> None:
        if ".old-" in path.name:
            raise OSError(errno.EBUSY, "busy")
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", fail)
    with raises(BadOutput, r"out is complete, but its old files could not be removed\. Delete .*\.out\.old-"):
        write(tmp_path / "out", {"a": torch.ones(1)}, overwrite=True)
    assert list(load_file(tmp_path / "out" / SINGLE)) == ["a"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with raises(BadOutput, "out exists"), Writer(tmp_path / "out"):
        model(tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["config.json", SINGLE]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_constructing_makes_nothing(tmp_path: Path) -> None:
    Writer(tmp_path / "a" / "out")
    assert list(tmp_path.iterdir()) == []


# Outputs that are refused


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    with raises(BadOutput, r"out exists\. .*--overwrite"):
        Writer(model(tmp_path / "out"))


def test_only_model_folders_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with raises(BadOutput, "not a model folder"):
        Writer(tmp_path, overwrite=True)
    with raises(BadOutput, "is a file"):
        Writer(tmp_path / "thesis.tex", overwrite=True)
    with raises(BadOutput, r"thesis\.tex is a file, so .*out cannot be made"):
        Writer(tmp_path / "thesis.tex" / "out")


@pytest.mark.parametrize("out", ["models/source", "models", "models/link", "models/source/../source"])
def test_the_source_is_never_overwritten(tmp_path: Path, out: str) -> None:
    source = model(tmp_path / "models" / "source")
    (tmp_path / "models" / "link").symlink_to("source")
    (tmp_path / "models" / "config.json").write_text("{}")
    for overwrite in (False, True):
        with raises(BadOutput, "is or contains the model that is read"):
            Writer(tmp_path / out, overwrite=overwrite, source=source)
    write(source / "smaller", {"a": torch.ones(1)}, source=source)
    open_source(source).close()


def test_a_shard_size_must_be_positive(tmp_path: Path) -> None:
    with raises(BadInput, "max_shard_size is 0"):
        Writer(tmp_path / "out", max_shard_size=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with raises(BadOutput, "no permission to write in .*locked"):
        Writer(tmp_path / "locked" / "deep" / "out")


def test_permission_as_the_system_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any, **__: Any) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", deny)
        with raises(BadOutput, "no permission to write in"):
            Writer(tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with Writer(tmp_path / "first") as writer, monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with raises(BadOutput, r"no permission to write README\.md of .*first"):
            writer.write_text("README.md", "")
    monkeypatch.setattr(Path, "mkdir", fail)
    with raises(BadOutput, "no permission to write the folder"), Writer(tmp_path / "out"):
        pass


# Full disks


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))


def test_require_compares_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)
    writer = Writer(tmp_path / "not" / "yet" / "out")
    writer.require(1234)
    with raises(BadOutput, "disk of .*out is full: 1,235 bytes are needed, 1,234 are free"):
        writer.require(1235)


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "full")]
)
def test_a_full_disk_while_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    full_disk(monkeypatch)
    old = tree(model(tmp_path / "out"))

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with raises(BadOutput, "is full: 400 bytes are needed, 1,234 are free"):
        write(tmp_path / "out", {"a": torch.zeros(100)}, overwrite=True)
    assert tree(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", ["write_text", "copy", "fsync"])
def test_a_full_disk_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = model(tmp_path / "source")
    where = {"write_text": (Path, "write_bytes"), "copy": (shutil, "copyfile"), "fsync": (os, "fsync")}
    monkeypatch.setattr(*where[call], fail)
    with raises(BadOutput, "is full: .* are needed, .* are free"), Writer(tmp_path / "out") as writer:
        writer.copy(source / "config.json")
        writer.write_text("README.md", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_errors_of_the_serialiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("something else")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with raises(BadOutput, r"could not write the weights of .*out \(something else\)"):
        write(tmp_path / "out", tensors())
