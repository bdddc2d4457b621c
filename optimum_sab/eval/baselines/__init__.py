"""Other people's methods under the same calibration and the same accounting of bits, as dense simulations."""

from optimum_sab.eval.baselines.gptq import gptq as gptq
