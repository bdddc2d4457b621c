"""What the model is shown: every accepted form of data, read, or written by the model, and encoded."""

from optimum_sab.calibration.samples.encoding import encode_samples as encode_samples
from optimum_sab.calibration.samples.reading import read_samples as read_samples
