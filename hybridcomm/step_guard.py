"""When is a residual committed? The rules that tie error feedback to optimizer steps, apart from any tensor.

reduced     a synchronised backward ended: the step is open, the residual staged
applied     every attached optimizer stepped                      -> commit
skipped     an optimizer said so, a gradient is not finite, or the loss scale backed off -> rollback
neither     and a new synchronised backward begins                -> ResidualError, nothing is guessed
"""

from __future__ import annotations

from collections.abc import Callable

from hybridcomm.errors import ResidualError
from hybridcomm.residual import Residual

__all__ = ["StepGuard"]


class StepGuard:
    """Commits or rolls back ``residual`` once per optimizer step, all entries at once.

    ``counts``: steps are also opened where this rank holds no residual, as schedules need equal counts everywhere.
    """

    def __init__(self, residual: Residual, *, counts: bool = False) -> None:
        self.residual = residual
        self.applied = 0
        self.skipped = 0
        self._counts = counts
        self._open = False
        self._optimizers = 0
        self._stepped: dict[int, bool] = {}  # optimizer -> whether it applied the open step

    def attach(self) -> int:
        """Registers one optimizer; returns the number it reports its steps under."""
        self._optimizers += 1
        return self._optimizers - 1

    @property
    def pending(self) -> bool:
        """Whether a reduced step was neither applied nor skipped yet."""
        return self._open or self.residual.pending

    def reduced(self) -> None:
        """A synchronised backward ended."""
        self._open = self._counts

    def begin(self, was_skipped: Callable[[], bool]) -> None:
        """A synchronised backward begins; ``was_skipped`` is asked only if the last step is still open."""
        if not self.pending:
            self._stepped.clear()
            return
        if not self._stepped and was_skipped():
            self.rollback()
            return
        if self._stepped:
            raise ResidualError(
                f"{len(self._stepped)} of {self._optimizers} attached optimizers stepped since the last "
                "reduction: step all of them, or call commit() or rollback() before the next backward"
            )
        raise ResidualError(
            "the last reduced gradients were neither applied nor rolled back and a new backward begins: "
            "attach(optimizer) or call commit() after the step, call rollback() if you skipped it, "
            "or use no_sync() to accumulate"
        )

    def stepped(self, optimizer: int, *, applied: bool) -> None:
        """Optimizer number ``optimizer`` ended its step; the last attached one commits or rolls back."""
        if not self.pending:
            return
        self._stepped[optimizer] = applied
        if len(self._stepped) < self._optimizers:
            return
        if len(set(self._stepped.values())) > 1:
            raise ResidualError(
                "one attached optimizer applied its step and another skipped it: the residual of a step "
                "is kept or dropped as a whole; let one GradScaler decide for all, or decide by hand"
            )
        if applied:
            self.commit()
        else:
            self.rollback()

    def commit(self) -> None:
        """The step was applied."""
        self.applied += 1
        self._close()
        self.residual.commit()

    def rollback(self) -> None:
        """The step was skipped."""
        self.skipped += 1
        self._close()
        self.residual.rollback()

    def resume(self, applied: int) -> None:
        """Goes on after so many applied steps, with none open."""
        self.applied = applied
        self._close()

    def _close(self) -> None:
        self._open = False
        self._stepped.clear()
