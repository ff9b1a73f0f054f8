"""The kinds of machine that Kaggle lends for free: what each is called, how long a session and a week of it are.

Beside the data path: the laptop's verbs and the session ask for them. Only the standard library is imported.
"""

import os
from dataclasses import dataclass

from jgpt.errors import UserError
from jgpt.hardware.pci import tpu_chips

TPU_V5E_8 = "TpuV5E8"  # Kaggle's name of it (kaggle-cli docs/kernels.md, September 2026)
ACCELERATOR_VARIABLE = "JGPT_KAGGLE_ACCELERATOR"  # set in a session that a push started: what it asked for


@dataclass(frozen=True)
class Lent:
    """A kind of machine: `session_hours` until Kaggle kills a session, of which training gets `deadline_hours`.

    The rest is for packing, the last upload and Kaggle's own copying. `weekly_hours` are those of most accounts.
    """

    unit: str  # whose hours Kaggle counts
    session_hours: float
    deadline_hours: float
    weekly_hours: float

    def check_deadline(self, hours: float) -> None:
        """Raise UserError for a deadline that a session here does not live to see."""
        if hours >= self.session_hours:
            raise UserError(
                f"deadline_hours={hours:g}: Kaggle kills a {self.unit} session after {self.session_hours:g} hours, and"
                f" may delete what it wrote. Allowed: less than {self.session_hours:g}; {self.deadline_hours:g} leaves"
                " time to pack and upload. Take --config.deadline_hours=0, which is that limit."
            )


GPU = Lent("GPU", session_hours=12.0, deadline_hours=11.0, weekly_hours=30.0)  # and a machine without an accelerator
TPU = Lent("TPU", session_hours=9.0, deadline_hours=8.25, weekly_hours=20.0)


PLANNED = {"t4x2": GPU, "p100": GPU, "v5e8": TPU}  # by the name that jgpt.plan gives the devices


def lends(device: str) -> Lent | None:
    """Return the kind of machine that Kaggle lends with these devices of jgpt.plan; None where it does not."""
    return PLANNED.get(device)


def machine_of(accelerator: str) -> Lent:
    """Return the kind of machine that a kernel asks for by Kaggle's name of its accelerator.

    >>> machine_of("TpuV5E8").deadline_hours, machine_of("NvidiaTeslaT4").deadline_hours
    (8.25, 11.0)
    """
    return TPU if accelerator == TPU_V5E_8 else GPU


def this_machine() -> Lent:
    """Return the kind of machine that this session has: what its push asked for, else what is in the machine."""
    asked = os.environ.get(ACCELERATOR_VARIABLE)
    if asked is not None:
        return machine_of(asked)
    return TPU if tpu_chips() else GPU
