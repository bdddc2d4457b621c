"""Other people's methods under the same calibration and the same accounting of bits, as dense simulations."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.eval.baselines.arb import arb_rc as arb_rc
from optimum_sab.eval.baselines.arb import sab_published as sab_published
from optimum_sab.eval.baselines.billm import billm as billm
from optimum_sab.eval.baselines.gptq import gptq as gptq
from optimum_sab.eval.baselines.pb_llm import pb_llm as pb_llm
from optimum_sab.eval.baselines.rtn import rtn_sign as rtn_sign
from optimum_sab.eval.baselines.simulated import Simulated as Simulated

Baseline = Callable[[Tensor, InputStatistics], Simulated]

BASELINES: dict[str, Baseline] = {
    "rtn-sign": rtn_sign,
    "gptq-2": partial(gptq, bits=2),
    "gptq-3": partial(gptq, bits=3),
    "gptq-4": partial(gptq, bits=4),
    "pb-llm": pb_llm,
    "billm": billm,
    "arb-rc": arb_rc,
    "arb-rc-cgb": partial(arb_rc, column_groups=True),
    "arb-rc-cgb-rows": partial(arb_rc, column_groups=True, row_thresholds=True),
    "sab-published": sab_published,
}
