"""Other formats for a checkpoint: one file (or folder) each, looked up here.

A format is a module with plain functions and data:

    SUMMARY                          one line
    EXTRA                            the pip extra with its libraries, "" where it needs none
    QUANTIZE                         the types that it can store beside those of --dtype
    SUFFIX                           ".gguf" where a result is one file of that ending, "" where it is a folder
    OPTIONS                          names of options of its own, if it has any
    unfit(opened)                    why it cannot say a checkpoint, with what would make it fit; None where it can
    write(opened, folder, request)   writes into an empty folder, and returns the files
    verify(opened, files, request)   loads them in the engine, and compares with the checkpoint itself: a Verdict

`write` and `verify` raise Absent where a library or the engine is not installed. What is written lies in a hidden
folder until it is complete and, where it can be, verified; then it takes its name. A failure leaves nothing.
"""

import importlib
import pkgutil
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from microtome import layout, planner
from microtome.calibrate import Progress, free_memory
from microtome.checkpoint import check_replaced, hidden, replace
from microtome.errors import BadInput, BadOutput, MicrotomeError, NumericalFailure, UnknownName, UnsupportedModel
from microtome.loading import dtype_of
from microtome.planner import Opened
from microtome.report import bytes_text
from microtome.source import open_source
from microtome.verdict import Absent, Verdict

LABELS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}


@dataclass(frozen=True)
class Request:
    """What a user wants of a format: a name for the files, the type to store (None: as it is), types to quantise to.

    `say` takes a line that the user should read when all is done.
    """

    name: str
    dtype: torch.dtype | None = None
    quantize: tuple[str, ...] = ()
    files: tuple[str, ...] = ()  # what a format with a SUFFIX has to write, one for each type
    progress: Progress | None = None
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])

    def say(self, line: str) -> None:
        """Tell the user something, once."""
        if line not in self.notes:
            self.notes.append(line)

    def report(self, what: str, fraction: float) -> None:
        """Show how far a stage is."""
        if self.progress is not None:
            self.progress(what, fraction)


class Format(Protocol):
    """The module of one format; see the head of this file."""

    SUMMARY: str
    EXTRA: str
    QUANTIZE: tuple[str, ...]
    SUFFIX: str

    def unfit(self, opened: Opened) -> str | None: ...  # noqa: D102
    def write(self, opened: Opened, folder: Path, request: Request) -> list[Path]: ...  # noqa: D102
    def verify(self, opened: Opened, files: Sequence[Path], request: Request) -> Verdict: ...  # noqa: D102


@dataclass(frozen=True)
class Exported:
    """What was written, and what the engine made of it."""

    format: str
    places: tuple[Path, ...]  # the folder, or the files of a format of single files
    files: tuple[Path, ...]
    nbytes: int
    verdict: Verdict | None  # None where nothing was verified
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "format": self.format,
            "places": [str(place) for place in self.places],
            "files": [str(file) for file in self.files],
            "nbytes": self.nbytes,
            "verdict": None if self.verdict is None else asdict(self.verdict),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """As text."""
        said = [*self.notes, *([] if self.verdict is None else [f"verified with {self.verdict.words}."])]
        alone = {place: place.stat().st_size if place.is_file() else self.nbytes for place in self.places}
        return [*said, *(f"written to {place}, {bytes_text(size)}" for place, size in alone.items())]


def known() -> list[str]:
    """Names of all formats in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> Format:
    """The module of a format."""
    if name not in known():
        raise UnknownName("format", name, known())
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def types(name: str, wanted: Iterable[str]) -> tuple[str, ...]:
    """Quantised types as a format spells them; raises BadInput or UnknownName where it has none such."""
    known_types = find(name).QUANTIZE
    spelled = {one.lower(): one for one in known_types}
    found: list[str] = []
    for one in wanted:
        if not known_types:
            raise BadInput(f"--to {name} stores no quantised types: leave out --quantize {one}, or use --to gguf.")
        if one.lower() not in spelled:
            raise UnknownName(f"type of {name}", one, known_types)
        found.append(spelled[one.lower()])
    return tuple(dict.fromkeys(found))


def export(  # noqa: PLR0913
    model: str | Path,
    *,
    to: str,
    out: str | Path | None = None,
    quantize: Iterable[str] = (),
    verify: bool | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
) -> Exported:
    """Write a model in another format: DIR-FORMAT, or DIR-TYPE.gguf, beside it unless `out` says where.

    `options` are the format's own, by name (docs/export.md). `verify` None loads the result in the engine where that is
    installed; True wants it; False does not.

    Raises UnsupportedModel where the format cannot say the checkpoint, Absent where a library is missing, BadOutput
    where the result cannot be placed, and NumericalFailure where the engine computes something else: then nothing is
    left behind.
    """
    form, chosen, more = find(to), types(to, quantize), dict(options or {})
    for name in more:
        if name not in (known_options := getattr(form, "OPTIONS", ())):
            raise UnknownName(f"option of {to}", name, known_options or ["(it has none)"])
    given = None if out is None else Path(out).expanduser()
    if given is not None and len(chosen) > 1 and form.SUFFIX and given.suffix == form.SUFFIX:
        raise BadInput(f"--out {given} is one file, and {len(chosen)} types are asked for: give a folder.")
    stored = dtype_of(dtype)
    with open_source(model, revision=revision) as source:
        opened = planner.opened(source)
        if (reason := form.unfit(opened)) is not None:
            raise UnsupportedModel(f"--to {to} cannot say {model}: {reason}")
        name = stem(source.name)
        names = file_names(form, name, opened, stored, chosen)
        request = Request(name, stored, chosen, names, progress, more)
        if opened.wrapper is not None:
            request.say(f"written is the text decoder of this {opened.wrapper.model_type}, without the rest.")
        place = placed(form, to, source.folder, source.name, given)
        check_place(form, place, request, source.folder, overwrite=overwrite)
        with staged(form, place) as folder:
            files = form.write(opened, folder, request)
            verdict = None if verify is False else verified(form, opened, files, request, wanted=bool(verify))
            final = settled(form, place, folder, files)
    places = final if form.SUFFIX else (place,)
    return Exported(to, places, final, sum(file.stat().st_size for file in final), verdict, tuple(request.notes))


def verified(form: Format, opened: Opened, files: Sequence[Path], request: Request, *, wanted: bool) -> Verdict | None:
    """What the engine makes of the files; None, and a line for the user, where it is absent and need not be there."""
    need, free = 8 * layout.count(opened.config), free_memory()
    if not wanted and need > free:
        request.say(
            f"not verified: that takes {bytes_text(need)} of memory, and {bytes_text(free)} are free (--verify)."
        )
        return None
    try:
        verdict = form.verify(opened, files, request)
    except Absent as fact:
        if wanted:
            raise
        request.say(f"not verified: {fact}")
        return None
    if not verdict.passed:
        raise NumericalFailure(
            f"the export is not what the checkpoint computes, and was removed: {verdict.words}. "
            "This is a fault of Microtome or of the engine; --no-verify keeps the files."
        )
    return verdict


# --- places ---------------------------------------------------------------------------------------------------------


def stem(name: str) -> str:
    """The last word of a folder or hub id."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name.rsplit("/", 1)[-1]


def file_names(
    form: Format, name: str, opened: Opened, dtype: torch.dtype | None, quantize: Sequence[str]
) -> tuple[str, ...]:
    """NAME-TYPE.gguf for every type of a format of single files; of a folder nobody needs them."""
    if not form.SUFFIX:
        return ()
    kinds = quantize or [LABELS[dtype or opened.dtype]]
    return tuple(f"{name}-{kind}{form.SUFFIX}" for kind in kinds)


def placed(form: Format, to: str, folder: Path, name: str, out: Path | None) -> Path:
    """What is written: a folder, one file, or for formats of single files the folder that they go to.

    Without `out` it lies beside a local model, and else where the user stands.
    """
    if out is not None:
        return out.resolve()
    beside = folder.resolve().parent if Path(name).expanduser().is_dir() else Path.cwd()
    return beside if form.SUFFIX else beside / f"{stem(name)}-{to}"


def targets(form: Format, place: Path, names: Sequence[str]) -> list[Path]:
    """The final paths of a format of single files."""
    return [place] if place.suffix == form.SUFFIX else [place / name for name in names]


def check_place(form: Format, place: Path, request: Request, source: Path, *, overwrite: bool) -> None:
    """Raise BadOutput, before anything is done, where the result would replace what it must not."""
    if form.SUFFIX:
        for path in targets(form, place, request.files):
            if path.is_dir():
                raise BadOutput(f"{path} is a folder. Choose another output.")
            if path.exists() and not overwrite:
                raise BadOutput(f"{path} exists. Choose another output, or pass --overwrite.")
        return
    check_replaced(place, source, overwrite=overwrite)


@contextmanager
def staged(form: Format, place: Path) -> Generator[Path]:
    """A hidden, empty folder on the disk of the result, which goes when the block is left."""
    above = place if form.SUFFIX and place.is_dir() else next(folder for folder in place.parents if folder.exists())
    if not above.is_dir():
        raise BadOutput(f"{above} is a file, so {place} cannot be made. Choose another output.")
    folder = hidden(above / place.name, "partial")
    try:
        folder.mkdir()
        yield folder
    except MicrotomeError:
        raise
    except OSError as error:
        raise BadOutput(f"could not write {place} ({error}). Choose another output.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settled(form: Format, place: Path, folder: Path, files: Sequence[Path]) -> tuple[Path, ...]:
    """Give finished files their names, and return these."""
    if form.SUFFIX:
        final = targets(form, place, [file.name for file in files])
        for file, path in zip(files, final, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            file.replace(path)
        return tuple(final)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        replace(place, folder)
    else:
        folder.rename(place)
    return tuple(place / file.relative_to(folder) for file in files)
