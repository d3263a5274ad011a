"""Side by side: the arithmetic, one real pair of processes, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from tinies import folder

import microtome_cli
from microtome import bench
from microtome.bench import Report, Workload, timing
from microtome.errors import BadInput, MicrotomeError


def test_rates_and_ratios_are_medians_over_rounds() -> None:
    work = Workload("decode", batch=4, prompt=16, tokens=10)
    found = timing(work, [(2.0, 1.0), (4.0, 1.0), (1.0, 2.0)])
    assert (found.baseline, found.compressed) == (40 / 2.0, 40 / 1.0)
    assert (found.speedup, found.slowest, found.fastest) == (2.0, 0.5, 4.0)
    assert Workload("prefill", 4, 16, 10).count == 64


def test_a_cut_that_is_not_faster_is_explained() -> None:
    fast, slow = Workload("prefill", 1, 8, 2), Workload("decode", 8, 8, 2)
    report = Report(
        (timing(fast, [(2.0, 1.0)]), timing(slow, [(1.0, 2.0)])), 2, "cpu", "float32", 1, (200, 100), (10, 10)
    )
    first, why = report.remarks()
    assert "1 rounds, 2 threads, cpu, float32" in first
    assert re.match(r"not faster: decode 2 behind 8, batch 8\. The weights shrink 2\.00 times", why)
    assert len(Report(report.timings[:1], 2, "cpu", "float32", 1, (200, 100), (10, 10)).remarks()) == 1


def test_decoding_with_a_cache_takes_the_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is real work: the ids that go in are those of greedy generation."""
    from microtome.loading import load

    model = load(folder("llama"), device=torch.device("cpu"))
    seen: list[torch.Tensor] = []
    forward = model.forward

    def watched(**inputs: torch.Tensor) -> object:
        seen.append(inputs["input_ids"])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    assert bench.timed(model, Workload("decode", 2, 7, 5), torch.device("cpu")) > 0
    monkeypatch.undo()
    prompt, *steps = seen
    want = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(torch.cat(steps, 1), want[:, prompt.shape[1] :])


def test_two_processes_answer_in_turn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(folder("llama"))
    command = ["bench", place, "--baseline", place, "--batch", "2", "--prompt", "9", "--tokens", "3", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["microtome", *command, "--threads", "1", "--json"])
    with pytest.raises(SystemExit) as stopped:
        microtome_cli.main()
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["workload"]["kind"] for one in found["timings"]] == ["prefill", "decode"]
    assert all(0 < one["slowest"] <= one["speedup"] <= one["fastest"] for one in found["timings"])
    assert (found["threads"], found["dtype"], found["rounds"]) == (1, "float32", 2)
    assert found["file_bytes"][0] == found["file_bytes"][1] > 0
    assert min(found["peak_bytes"]) > 1e7


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 1"):
        bench.compare(folder("llama"), folder("llama"), batches=(0,))
    with pytest.raises(MicrotomeError, match="no folder"):
        bench.compare(tmp_path / "nothing", folder("llama"))
