"""A result on the Hugging Face hub: what can be refused is refused before anything slow, and uploaded is all of it."""

import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as failures

from microtome.errors import BadInput, BadOutput, MicrotomeError
from microtome.shards import CARD, CONFIG

LOGIN = "set HF_TOKEN to one that may write, or run `hf auth login`"
PLACEHOLDER = '("PATH")'  # in the program of a card, until a result has an address


@dataclass(frozen=True)
class Destination:
    """A model repository that may be written to; `revision` is a branch, made if it is not there."""

    repo: str
    private: bool = False
    revision: str | None = None
    overwrite: bool = False


def destination(
    repo: str, *, private: bool = False, revision: str | None = None, overwrite: bool = False
) -> Destination:
    """Ask the hub whether a result may go to `owner/name`; nothing is made there yet.

    Raises BadInput without a token, with one that may not write there, or where the hub cannot be reached, and
    BadOutput where files lie there already and `overwrite` was not said.
    """
    check_name(repo)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise BadInput(f"{repo} cannot be pushed to, for HF_HUB_OFFLINE is set. Unset it.")
    if not huggingface_hub.get_token():
        raise BadInput(f"there is no token to push to {repo} with: {LOGIN}.")
    place, api = Destination(repo, private, revision, overwrite), huggingface_hub.HfApi()
    try:
        check_owner(repo, api.whoami())
        check_there(place, api)
    except MicrotomeError:
        raise
    except Exception as error:  # the hub's, and those of the HTTP library below, which differ between versions
        raise BadInput(f"{repo} cannot be pushed to: {reason(error)}.") from error
    return place


def check_name(repo: str) -> None:
    """Raise BadInput unless a name reads as `owner/name`."""
    fits = repo.count("/") == 1
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except failures.HFValidationError:
        fits = False
    if not fits:
        raise BadInput(f"{repo!r} names no model on the hub: write owner/name, in letters, digits, '-', '_' and '.'.")


def check_owner(repo: str, user: dict[str, Any]) -> None:
    """Raise BadInput where a token may only read, or is of somebody else."""
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise BadInput(f"the token may only read, and {repo} is to be written: {LOGIN}.")
    owners = [str(user.get("name")), *(str(one.get("name")) for one in user.get("orgs", []))]
    owner = repo.partition("/")[0]
    if owner.lower() not in {one.lower() for one in owners}:
        raise BadInput(f"the token is of {owners[0]}, and {owner} is none of theirs. They own: {', '.join(owners)}.")


def check_there(place: Destination, api: Any) -> None:
    """Raise where a repository has files that nobody said may go, or is public and should not be."""
    try:
        found = api.repo_info(place.repo)
    except failures.RepositoryNotFoundError:
        return
    if place.private and not found.private:
        raise BadInput(f"{place.repo} is there and public. Make it private on its page, or leave out --private.")
    try:
        files = api.list_repo_files(place.repo, revision=place.revision)
    except failures.RevisionNotFoundError:
        return
    if not place.overwrite and (there := [name for name in files if name != ".gitattributes"]):
        where = place.repo if place.revision is None else f"{place.repo} at {place.revision}"
        raise BadOutput(f"{where} holds {len(there)} files on the hub. Choose another name, or pass --overwrite.")


def push(
    folder: str | Path,
    repo: str | Destination,
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
) -> str:
    """Upload a model folder to the hub as `owner/name`; returns its address there.

    A `private` repository is seen by its owners only. `revision` is a branch, made if it is not there. `overwrite`
    replaces what lies there, and what is no part of the folder goes. The folder itself stays as it is: in the uploaded
    card the program names the repository. Raises BadInput or BadOutput.
    """
    source = Path(folder).expanduser().resolve()
    if not (source / CONFIG).is_file() or not any(source.glob("*.safetensors")):
        raise BadInput(f"{folder} is no model folder: it has no {CONFIG}, or no weights. Give one that was written.")
    if isinstance(repo, Destination):
        place = repo
    else:
        place = destination(repo, private=private, revision=revision, overwrite=overwrite)
    api = huggingface_hub.HfApi()
    try:
        with staged(source, place.repo) as whole:
            address = api.create_repo(place.repo, private=place.private or None, exist_ok=True)
            if place.revision is not None:
                api.create_branch(place.repo, branch=place.revision, exist_ok=True)
            api.upload_folder(
                repo_id=place.repo,
                folder_path=whole,
                revision=place.revision,
                commit_message=f"{source.name}, by Microtome",
                delete_patterns="*",
            )
    except Exception as error:  # as above
        fact = f"{folder} is complete, but was not pushed to {place.repo}: {reason(error)}"
        raise BadOutput(f"{fact}. Run `microtome push {folder} {place.repo}` again.") from error
    return str(address) if place.revision is None else f"{address}/tree/{place.revision}"


@contextmanager
def staged(source: Path, repo: str) -> Generator[Path]:
    """A folder of links to what is uploaded, hidden files left out, and the card with the address in its program."""
    with tempfile.TemporaryDirectory(prefix="microtome-push-") as made:
        whole = Path(made)
        for path in sorted(source.rglob("*")):
            inner = path.relative_to(source)
            if path.is_file() and not any(part.startswith(".") for part in inner.parts):
                (whole / inner).parent.mkdir(parents=True, exist_ok=True)
                (whole / inner).symlink_to(path)
        card = whole / CARD
        if card.exists():
            text = card.read_text(encoding="utf-8").replace(PLACEHOLDER, f'("{repo}")')
            card.unlink()
            card.write_text(text, encoding="utf-8")
        yield whole


def reason(error: Exception) -> str:
    """What the hub said, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[0] if lines else type(error).__name__
    return re.sub(r"\s*\(Request ID: [^)]*\)", "", words).rstrip(".")
