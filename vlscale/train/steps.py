"""The steps by the name that `meta.mode` has for them: the joint one and CoVLR's meta steps."""

from collections.abc import Callable

from vlscale.data.batch import Batch
from vlscale.train.meta_heads import heads_step
from vlscale.train.meta_shift import finite_difference_step, first_order_step
from vlscale.train.step import StepParts, joint_step

Step = Callable[[StepParts, Batch, Batch], dict[str, float]]  # batch, and the one to test on

STEPS: dict[str, Step] = {
    "joint": joint_step,
    "heads": heads_step,
    "first_order": first_order_step,
    "finite_difference": finite_difference_step,
}
