"""Numbers of ours beside TRL's: what is equal, what differs by design, what differs."""

from dataclasses import dataclass

import torch

HEADER = ("quantity", "max |difference|", "scale (std of ours)", "verdict")
KINDS = ("log-probs", "reference log-probs", "KL", "advantages", "loss", "gradient", "weights")
# fp32 in another order of summing differs in the seventh digit. Relative to the spread; of
# gradients to their norm.
CLOSE = 1e-5
# From the second update on the gradients are taken at weights that differ by what follows.
GRADIENTS_CLOSE = (1e-5, 1e-4)  # of the first update, of later ones
# Adam's first steps move a weight by the learning rate however small its gradient is. Where that
# is below 1e-8 rounding shows in full, so weights are held to the norm of all moves together.
WEIGHTS_CLOSE = 5e-3


@dataclass
class Row:
    """One line of the table. tolerance None: differs by design, and `note` says why."""

    quantity: str
    difference: float  # largest absolute
    scale: float  # standard deviation of ours; of losses and weights see update_rows
    tolerance: float | None  # of the relative error
    note: str = ""
    norms: float | None = None  # ‖ours − theirs‖ / ‖ours − start‖; the start of gradients is 0

    @property
    def relative(self) -> float:
        """The error as the tolerance means it."""
        if self.norms is not None:
            return self.norms
        if not self.difference:
            return 0.0
        return self.difference / self.scale if self.scale else float("inf")

    @property
    def agrees(self) -> bool:
        return self.tolerance is None or self.relative <= self.tolerance

    def cells(self) -> tuple[str, ...]:
        of = "scale" if self.norms is None else "its norm"
        if self.tolerance is None:
            verdict = f"by design: {self.note}"
        elif self.agrees:
            verdict = f"equal within {self.tolerance:g} × {of}"
        else:
            verdict = f"DIFFERS by more than {self.tolerance:g} × {of}"
        if self.norms is not None:
            verdict += f" ({self.norms:.1e})"
        return self.quantity, f"{self.difference:.2e}", f"{self.scale:.2e}", verdict


def compare(quantity, ours, theirs, mask=None, tolerance=CLOSE, note="", scale=None) -> Row:
    """Row of two tensors of one shape, over `mask` (same shape, bool) where given."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
    if ours.shape != theirs.shape:
        raise ValueError(f"{quantity}: {tuple(ours.shape)} beside {tuple(theirs.shape)}")
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    difference = (ours - theirs).abs().max().item()
    return Row(quantity, difference, scale or ours.std().item(), tolerance, note)


def by_design(quantity, ours, theirs, note, mask=None) -> Row:
    return compare(quantity, ours, theirs, mask, tolerance=None, note=note)


def weight_row(quantity, start, ours, theirs, tolerance, note="") -> Row:
    """Row of two {name: weight}; the scale is the root mean square of ours' moves from `start`."""
    assert ours.keys() == theirs.keys() == start.keys()
    moved = torch.cat([(ours[k] - start[k]).flatten() for k in ours])
    apart = torch.cat([(ours[k] - theirs[k]).flatten() for k in ours])
    scale = moved.square().mean().sqrt().item()
    norms = (apart.norm() / moved.norm()).item()
    return Row(quantity, apart.abs().max().item(), scale, tolerance, note, norms)


def of_norm(quantity: str, ours: dict, theirs: dict, tolerance: float | None, note="") -> Row:
    """Row of two {name: tensor}, by the norm of their difference."""
    zero = {name: torch.zeros_like(x) for name, x in theirs.items()}
    return weight_row(quantity, zero, ours, theirs, tolerance, note)


def summary(tables: dict) -> list[tuple[str, ...]]:
    """One line a method: the largest relative error of each kind of number, over all updates."""
    lines = []
    for name, rows in tables.items():
        kinds = {kind: [r.relative for r in rows if r.quantity.startswith(kind)] for kind in KINDS}
        lines.append((name, *(f"{max(e):.1e}" if e else "" for e in kinds.values())))
    return lines
