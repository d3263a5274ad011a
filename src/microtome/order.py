"""The steps of a recipe: what a list of them may be, and how a plan keeps it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from microtome import healing, passes
from microtome.edit import Plan
from microtome.errors import BadInput
from microtome.passes import Allocation, Step
from microtome.planner import Outcome
from microtome.restore import Restore
from microtome.target import Target
from microtome.training import Heal

AnyStep = Step | Restore | Heal  # only the first cuts


def word_of(step: Restore | Heal) -> str:
    """What a recipe calls a step that does not cut."""
    return "restore" if isinstance(step, Restore) else "heal"


def is_coded(step: AnyStep) -> bool:
    """Whether a step puts weights in codes."""
    return isinstance(step, Step) and step.is_coded


def check_order(steps: Sequence[AnyStep]) -> None:
    """Refuse restoration behind a step that changes single weights, and all but healing behind one that codes them.

    Restoration refits whole matrices, and would undo the first; what changes weights takes them out of their codes,
    and healing alone leaves these as they are.
    """
    coded = single = ""
    for step in steps:
        if coded:
            check_behind_codes(coded, step)
        coded = step.name if isinstance(step, Step) and step.is_coded else coded
    for step in steps:
        if isinstance(step, Step):
            single = step.name if step.is_weights else single
        elif single and isinstance(step, Restore):
            raise BadInput(
                f"restore refits whole matrices, and would undo what {single} did to single weights: "
                f"put restore before {single}."
            )


def remarks(steps: Sequence[AnyStep]) -> list[str]:
    """What a user should know of the order: a cut may fill up the zeros that an earlier step has made."""
    single, found = "", list[str]()
    for step in steps:
        if not isinstance(step, Step):
            continue
        if step.is_weights:
            single = step.name
        elif single and not step.drops_blocks:
            behind = f"{step.name} changes matrices that {single} has made zeros in"
            found.append(f"{behind}: put it before {single} to keep all zeros.")
    return found


def check_behind_codes(coded: str, step: AnyStep) -> None:
    """Refuse a step that would change what another has put in codes."""
    if not isinstance(step, Heal):
        later = step.name if isinstance(step, Step) else word_of(step)
        raise BadInput(
            f"{coded} puts weights in codes, and {later} would change them: put {coded} last; only heal may follow it."
        )
    healing.check_coded(step, f"what {coded} has made")


def check_packed(step: Step, out: Outcome) -> None:
    """Refuse to heal codes that are stored as plain numbers: nothing would hold those to their grid."""
    if step.is_coded and out.packing is None:
        why = out.unpacked or "store=dense"
        raise BadInput(
            f"{step.name} stores plain numbers here ({why}), and healing would take them off their grid: put heal in "
            f"front of {step.name}."
        )


def recorded(steps: Sequence[AnyStep], outs: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The steps as a plan keeps them."""
    return [
        passes.recorded(step, out)
        if isinstance(step, Step)
        else {"method": word_of(step), "options": step.to_json(), "keep": None, "slice": None, "widths": {}}
        for step, out in zip(steps, outs, strict=True)
    ]


def replayed(plan: Plan) -> list[AnyStep]:
    """The steps of a plan, with the widths that it records."""
    first = {name: getattr(plan, name) for name in ("method", "options", "keep", "slice", "widths", "allocation")}
    target = Target.parsed(plan.target)
    return [
        replace(step, target=target) if isinstance(step, Step) else step for step in map(again, (first, *plan.then))
    ]


def again(recorded: Mapping[str, Any]) -> AnyStep:
    """One recorded step."""
    if recorded["method"] == "restore":
        return Restore(**recorded["options"])
    if recorded["method"] == "heal":
        return Heal(**recorded["options"])
    spends = recorded.get("allocation")
    return passes.stepped(
        recorded["method"],
        recorded["options"],
        keep=recorded["keep"],
        slice=recorded["slice"],
        allocation=None if spends is None else Allocation(**spends),
        widths=recorded["widths"],
    )
