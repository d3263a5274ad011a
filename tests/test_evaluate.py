"""Perplexity against its definition, computed naively."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from microtome import evaluate
from microtome.data import Tokens, calibration
from microtome.errors import BadInput, NumericalFailure
from microtome.evaluate import perplexity

VOCABULARY = 31


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A random Llama whose logits are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def random_tokens(windows: int, length: int, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return calibration(
        torch.randint(VOCABULARY, (windows, length), generator=generator), None, samples=None, length=None
    )


def naive(model: nn.Module, tokens: Tokens) -> float:
    """The inverse geometric mean of the probabilities of the tokens, one after another, in plain floats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in tokens.ids:
            for scores, token in zip(model(input_ids=row[None]).logits[0].tolist(), row[1:].tolist(), strict=False):
                total += scores[token] - math.log(math.fsum(map(math.exp, scores)))
                count += 1
    return math.exp(-total / count)


class Fixed(nn.Module):
    """Predicts from the present token alone: logits are rows of a table."""

    def __init__(self, table_VV: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table_VV)
        self.widest = 0
        self.cached = True

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        self.cached = use_cache
        self.widest = max(self.widest, input_ids.numel())
        return SimpleNamespace(logits=self.table[input_ids])


def test_it_is_the_definition(llama: LlamaForCausalLM) -> None:
    tokens = random_tokens(7, 11)
    result = perplexity(llama, tokens)
    assert result.value == pytest.approx(naive(llama, tokens), rel=1e-6)
    assert result.value == math.exp(result.nll)
    assert result.value > 2 * VOCABULARY, "the model is too close to uniform to test anything"


def test_one_window_is_the_loss_of_hugging_face(llama: LlamaForCausalLM) -> None:
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        loss = llama(input_ids=tokens.ids, labels=tokens.ids).loss
    assert perplexity(llama, tokens).nll == pytest.approx(float(loss), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    windows=st.integers(1, 9),
    length=st.integers(2, 13),
    batch=st.integers(0, 60),
    chunk=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_batches_and_chunks_do_not_change_it(windows: int, length: int, batch: int, chunk: int, seed: int) -> None:
    model = Fixed(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3)
    tokens = random_tokens(windows, length, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "CHUNK", chunk)
        result = perplexity(model, tokens, batch_tokens=batch)
    assert model.widest <= max(batch, length)
    assert not model.cached
    assert result.value == pytest.approx(naive(model, tokens), rel=1e-6)
    assert (result.windows, result.tokens) == (windows, windows * (length - 1))


def test_uniform_and_certain_models() -> None:
    tokens = random_tokens(5, 8)
    assert perplexity(Fixed(torch.zeros(VOCABULARY, VOCABULARY)), tokens).value == pytest.approx(VOCABULARY, rel=1e-6)
    counting = calibration(torch.arange(VOCABULARY).view(1, -1), None)
    assert perplexity(Fixed(torch.eye(VOCABULARY).roll(1, dims=1) * 100), counting).value == 1.0


def test_every_predicted_token_weighs_the_same() -> None:
    # the batches have 2 windows and 1: a mean of batch means would weigh the last one double
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[0, 0] = 5.0
    rows = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 2, 3]])
    easy, hard = math.log(math.exp(5) + VOCABULARY - 1) - 5, math.log(VOCABULARY)
    expected = math.exp((4 * easy + 2 * hard) / 6)
    assert perplexity(Fixed(table), calibration(rows, None), batch_tokens=6).value == pytest.approx(expected, rel=1e-6)


def test_it_says_what_was_measured(llama: LlamaForCausalLM) -> None:
    tokens = random_tokens(1205, 3)
    result = perplexity(llama, tokens)
    assert result.protocol() == (
        "ppl over 2,410 predicted tokens: 1,205 windows of 3, stride 3, float32, "
        f"the tensor of ids (sha256 {tokens.sha256[:12]})"
    )
    assert (result.length, result.stride, result.source, result.sha256) == (3, 3, tokens.source, tokens.sha256)
    assert result.seconds > 0


def test_half_precision_models_are_summed_in_full(llama: LlamaForCausalLM) -> None:
    tokens = random_tokens(6, 20)
    model = Fixed(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)).bfloat16())
    result = perplexity(model, tokens)
    assert result.value == pytest.approx(naive(model, tokens), rel=1e-6)
    assert "bfloat16" in result.protocol()
    assert perplexity(llama, tokens).dtype == "float32"


def test_sums_keep_what_fp32_would_round_away() -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[0, 1] = 2.0**24
    result = perplexity(Fixed(table), calibration(torch.tensor([[0, 0, *range(2, 30)]]), None))
    # the token after the first 0 costs 2**24, so does the one after the second; the other 27 are uniform
    assert result.nll * result.tokens == pytest.approx(2 * 2**24 + 27 * math.log(VOCABULARY), abs=1e-3)


def test_progress_ends_at_one_and_the_mode_comes_back() -> None:
    told: list[tuple[float, bool]] = []
    model = Fixed(torch.zeros(VOCABULARY, VOCABULARY)).train()
    perplexity(model, random_tokens(5, 8), batch_tokens=16, progress=lambda done: told.append((done, model.training)))
    assert told == [(0.4, False), (0.8, False), (1.0, False)]
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_the_window(value: float) -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[30, 0] = value
    rows = torch.zeros(6, 4, dtype=torch.int64)
    rows[4, 2] = 30
    model = Fixed(table).train()
    for batch in (1, 12, 4096):
        with pytest.raises(NumericalFailure, match=r"window 4 \(from 0\) of the tensor of ids is (nan|inf)"):
            perplexity(model, calibration(rows, None), batch_tokens=batch)
    assert model.training


def test_a_hopeless_model_is_infinite_rather_than_an_overflow() -> None:
    hopeless = torch.zeros(VOCABULARY, VOCABULARY)
    hopeless[0, 1] = 5000.0
    result = perplexity(Fixed(hopeless), calibration(torch.zeros(1, 4, dtype=torch.int64), None))
    assert (result.value, result.nll) == (math.inf, 5000.0)


def test_windows_that_predict_nothing_are_refused(llama: LlamaForCausalLM) -> None:
    for shape in ((0, 5), (3, 1)):
        with pytest.raises(BadInput, match="windows of at least 2 tokens"):
            perplexity(llama, Tokens(torch.zeros(shape, dtype=torch.int64), "nothing", "0" * 64))
