"""Text that a model writes itself, for users without data: sampled at temperature 1 from its whole distribution.

A row begins with the token that begins documents; where a document ends, the next one begins, as in a stream of text.
Each token is drawn by a uniform number of its own, so that rows do not depend on each other.

Shapes: N rows, T tokens in each, B rows at a time, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.errors import BadInput, NumericalFailure


@dataclass(frozen=True, eq=False)
class Marks:
    """The id that begins documents, those that end one, and the ids of plain text, to begin with where none does."""

    begin: int | None
    ends: Tensor
    plain: Tensor

    def openings(self, uniform_BT: Tensor) -> Tensor:
        """What begins a document at each place: always the same id, or any of plain text."""
        if self.begin is not None:
            return torch.full(uniform_BT.shape, self.begin, device=uniform_BT.device)
        return self.plain[(uniform_BT * len(self.plain)).long()]


def marks_of(tokenizer: Any | None, config: Any, device: torch.device) -> Marks:
    """What the tokenizer says, else the model's config. An id that both begins and ends documents only begins them."""
    size = int(config.vocab_size)
    begin = _ids(tokenizer, config, "bos_token_id", size)[:1]
    ends = _ids(tokenizer, config, "eos_token_id", size)
    special = {*begin, *ends, *(tokenizer.all_special_ids if tokenizer is not None else ())}
    known = size if tokenizer is None else min(size, len(tokenizer))
    plain = [number for number in range(known) if number not in special]
    return Marks(
        begin[0] if begin else None,
        torch.tensor([one for one in ends if one not in begin], dtype=torch.int64, device=device),
        torch.tensor(plain, dtype=torch.int64, device=device),
    )


def _ids(tokenizer: Any | None, config: Any, name: str, size: int) -> list[int]:
    """One or more ids of a name, as far as the model has them."""
    found = getattr(tokenizer, name, None)
    found = getattr(config, name, None) if found is None else found
    return [one for one in (found if isinstance(found, list) else [found]) if one is not None and 0 <= one < size]


def sampled(  # noqa: PLR0913
    model: Any,
    tokenizer: Any | None,
    *,
    samples: int,
    length: int,
    seed: int,
    rows: int,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Ids int64 [N, T] on the CPU that the model samples, `rows` at a time; the same seed gives the same ids.

    `progress` is told the fraction done. Raises BadInput for a seed out of range, and NumericalFailure where the
    model's logits are not finite.
    """
    if not 0 <= seed < 2**63:
        raise BadInput(f"seed must lie between 0 and 2**63 - 1, not {seed}")
    marks = marks_of(tokenizer, model.config.get_text_config(), model.device)
    generator = torch.Generator().manual_seed(seed)
    uniform_NT = torch.rand(samples, length, generator=generator, dtype=torch.float64)
    found: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, samples, rows):
            found.append(_written(model, marks, uniform_NT[start : start + rows].to(model.device)))
            if progress:
                progress(min(1.0, (start + rows) / samples))
    return torch.cat(found)


def _written(model: Any, marks: Marks, uniform_BT: Tensor) -> Tensor:
    """Rows that are written side by side, a token at a time."""
    opening_BT = marks.openings(uniform_BT)
    ids_BT, cache = opening_BT.clone(), None
    for place in range(1, ids_BT.shape[1]):
        last_B1 = ids_BT[:, place - 1 : place]
        out = model(input_ids=last_B1, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ended_B = torch.isin(last_B1[:, 0], marks.ends)
        ids_BT[:, place] = torch.where(ended_B, opening_BT[:, place], drawn(out.logits[:, -1], uniform_BT[:, place]))
    return ids_BT.cpu()


def drawn(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which the cumulated probabilities pass a uniform number, so that p_v of all numbers lead to id v."""
    below_BV = logits_BV.double().softmax(-1).cumsum(-1)
    total_B = below_BV[:, -1:]
    if not bool(torch.isfinite(total_B).all()):
        raise NumericalFailure("the model's logits are not finite while it writes text: try a wider dtype")
    return torch.searchsorted(below_BV, uniform_B[:, None] * total_B, right=True)[:, 0]


__all__ = ["Marks", "drawn", "marks_of", "sampled"]
