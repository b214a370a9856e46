"""What a student is compared with its teacher by, grouped by what is compared.

    logits.py     class probabilities: `kd`, `ofa`
    contrast.py   pooled features, each against a batch of them: `InfoNCE`
    features.py   feature maps: `FitNet`

Beside these, `alignment.py` has what brings pictures and the texts that fit them together: `itc`, `itm`.

All of it computes in float32 at least, whatever the models compute in, and also under autocast.
"""

from hetero_kt.nn.losses.contrast import InfoNCE
from hetero_kt.nn.losses.features import FitNet
from hetero_kt.nn.losses.logits import kd, ofa

__all__ = ["FitNet", "InfoNCE", "kd", "ofa"]
