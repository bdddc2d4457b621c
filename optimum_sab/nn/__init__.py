"""The packed layer as a module, and which modules of a model become one."""

from optimum_sab.nn.linear import SABLinear as SABLinear
