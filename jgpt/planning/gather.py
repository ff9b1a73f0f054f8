"""Choose when devices that split a state exchange parameters, where a config leaves it open: by what fits.

Beside the data path: training and the planner ask here, before anything is compiled, so both choose the same way.
"""

import logging

from ml_collections import ConfigDict

from jgpt.model.shapes import ModelConfig
from jgpt.parallel.build import make_parts
from jgpt.planning.devices import Target
from jgpt.planning.execution import Execution, execution_of
from jgpt.wording import GIB

log = logging.getLogger("jgpt")

FOR_ACTIVATIONS = 0.1  # of the memory


def with_gather(config: ConfigDict, shapes: ModelConfig, target: Target) -> ConfigDict:
    """Return a config with execution.gather=step or layer in the place of auto; unchanged where nothing is split.

    "step" sends least. It is chosen where a tenth of a device's memory is left beside its part of the state, all
    parameters in the compute dtype, the fp32 sums of their gradients, and the gradients of one micro-batch. Where
    nobody knows how much memory there is, it is chosen, too.
    """
    own = execution_of(config)
    if own.gather != "auto" or config.execution.parallel != "fsdp":
        return config
    least = make_parts(Execution(1, "none", 0, "plain", "step").put_into(config), shapes, target.devices)
    needed, limit = least.least_bytes() + least.gathered_bytes(), target.memory_bytes
    fits = limit is None or needed <= (1 - FOR_ACTIVATIONS) * limit
    gather = "step" if fits else "layer"
    of = "" if limit is None else f" of {limit / GIB:.2f} GiB"
    log.info(
        "execution.gather=%s: with all parameters and gradients on each device, a step takes %.2f GiB%s, activations"
        " not counted",
        gather,
        needed / GIB,
        of,
    )
    return own._replace(gather=gather).put_into(config)
