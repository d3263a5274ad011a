"""Text that a model writes itself: the distribution that it is drawn from, documents that follow each other, refusals."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import stock
from torch import Tensor, nn

from microtome.errors import BadInput, NumericalFailure
from microtome.sampler import Marks, drawn, marks_of, sampled

CPU = torch.device("cpu")


class Chain(nn.Module):
    """A model that knows the last token only: row i of its table holds the logits of what follows token i."""

    def __init__(self, table_VV: Tensor, **marks: Any) -> None:
        super().__init__()
        self.table_VV = table_VV
        fields = SimpleNamespace(vocab_size=len(table_VV), **{"bos_token_id": None, "eos_token_id": None, **marks})
        self.config = SimpleNamespace(get_text_config=lambda: fields)
        self.device = CPU
        self.widest = 0

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        assert use_cache
        assert input_ids.shape[1] == 1, "with a cache one token is enough"
        assert (past_key_values or 0) < 100
        self.widest = max(self.widest, len(input_ids))
        return SimpleNamespace(logits=self.table_VV[input_ids], past_key_values=(past_key_values or 0) + 1)


class Words:
    """What a tokenizer tells of its ids."""

    def __init__(
        self, size: int, special: list[int], bos_token_id: int | None = None, eos_token_id: int | None = None
    ) -> None:
        self.size, self.all_special_ids = size, special
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id

    def __len__(self) -> int:
        return self.size


def sure(*pairs: tuple[int, int], size: int) -> Tensor:
    """Logits of a chain in which one token follows another for certain."""
    table_VV = torch.full((size, size), -torch.inf)
    for here, there in pairs:
        table_VV[here, there] = 0.0
    return table_VV


def test_a_number_falls_to_the_id_whose_share_it_lies_in() -> None:
    logits_V = torch.tensor([0.25, 0.0, 0.25, 0.5, 0.0]).log()
    numbers = [0.0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 1 - 2**-53]
    found = drawn(logits_V.expand(len(numbers), -1), torch.tensor(numbers, dtype=torch.float64))
    assert found.tolist() == [0, 0, 2, 2, 3, 3, 3]


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12))
def test_evenly_spread_numbers_give_every_id_its_probability(logits: list[float]) -> None:
    count = 1000
    logits_V = torch.tensor(logits)
    number = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    have = drawn(logits_V.expand(count, -1), number).bincount(minlength=len(logits)) / count
    assert (have - logits_V.double().softmax(0)).abs().max() < 1.5 / count


@pytest.mark.parametrize("name", ["llama", "gpt2-tied", "opt-untied-gelu", "mistral-window"])
def test_what_is_written_with_a_cache_is_what_the_whole_text_would_give(name: str) -> None:
    """Each token again, from logits of everything before it, by a plain loop over cumulated probabilities."""
    model, length = copy.deepcopy(stock(name)), 20
    model.config.bos_token_id, model.config.eos_token_id = 1, None
    ids_NT = sampled(model, None, samples=3, length=length, seed=5, rows=2)
    assert torch.equal(ids_NT, sampled(model, None, samples=3, length=length, seed=5, rows=3)), "rows are on their own"
    assert not torch.equal(ids_NT, sampled(model, None, samples=3, length=length, seed=6, rows=2))
    number_NT = torch.rand(3, length, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
    for row in range(3):
        assert ids_NT[row, 0] == 1
        for place in range(1, length):
            total, wanted = 0.0, -1
            for token, share in enumerate(logits_NTV[row, place - 1].double().softmax(0).tolist()):
                total += share
                if total > number_NT[row, place]:
                    wanted = token
                    break
            assert ids_NT[row, place] == wanted, (row, place)


def test_frequencies_are_those_of_the_model() -> None:
    """Half of the tokens of a chain that forgets are of one kind: within four standard deviations."""
    share_V = torch.tensor([0.5, 0.3, 0.2])
    ids_NT = sampled(Chain(share_V.log().expand(3, 3)), None, samples=50, length=81, seed=0, rows=7)
    have_V = ids_NT[:, 1:].flatten().bincount(minlength=3) / 4000
    assert ((have_V - share_V).abs() < 4 * (share_V * (1 - share_V) / 4000).sqrt()).all()


def test_a_document_follows_the_one_that_ended() -> None:
    """0 begins, then 2 3, then 1 ends; what the model would write after the end does not count."""
    table_VV = sure((0, 2), (2, 3), (3, 1), (1, 3), size=4)
    model = Chain(table_VV, bos_token_id=0, eos_token_id=[1])
    ids_NT = sampled(model, None, samples=5, length=10, seed=0, rows=2)
    assert ids_NT.tolist() == [[0, 2, 3, 1, 0, 2, 3, 1, 0, 2]] * 5
    assert model.widest == 2
    same = Chain(sure((0, 2), (2, 0), size=3), bos_token_id=0, eos_token_id=0)  # as in GPT-2
    assert sampled(same, None, samples=1, length=5, seed=0, rows=1).tolist() == [[0, 2, 0, 2, 0]]


def test_without_a_beginning_a_document_begins_with_plain_text() -> None:
    words = Words(6, [1, 4], eos_token_id=1)
    table_VV = sure(*((here, 1) for here in range(8)), size=8)  # every document is one token long
    ids_NT = sampled(Chain(table_VV), words, samples=40, length=8, seed=0, rows=64)
    assert set(ids_NT[:, 0::2].unique().tolist()) == {0, 2, 3, 5}, "neither special nor beyond the tokenizer"
    assert (ids_NT[:, 1::2] == 1).all()


def test_the_tokenizer_comes_before_the_config() -> None:
    fields = SimpleNamespace(vocab_size=6, bos_token_id=5, eos_token_id=4)
    words = Words(9, [1], bos_token_id=1)
    found = marks_of(words, fields, CPU)
    assert (found.begin, found.ends.tolist(), found.plain.tolist()) == (1, [4], [0, 2, 3, 5])
    words.bos_token_id = 8  # the model has no such id
    assert marks_of(words, fields, CPU).begin is None
    alone = marks_of(None, fields, CPU)
    assert (alone.begin, alone.ends.tolist(), alone.plain.tolist()) == (5, [4], [0, 1, 2, 3])
    assert isinstance(alone, Marks)


def test_progress_comes_to_an_end() -> None:
    told: list[float] = []
    sampled(Chain(torch.zeros(3, 3)), None, samples=5, length=3, seed=0, rows=2, progress=told.append)
    assert told == [0.4, 0.8, 1.0]


def test_what_cannot_be_sampled() -> None:
    with pytest.raises(NumericalFailure, match="logits are not finite while it writes text: try a wider dtype"):
        sampled(Chain(torch.full((3, 3), torch.nan)), None, samples=1, length=3, seed=0, rows=1)
    with pytest.raises(BadInput, match="seed must lie between 0 and"):
        sampled(Chain(torch.zeros(3, 3)), None, samples=1, length=3, seed=-1, rows=1)
