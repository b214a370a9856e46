"""What a student is compared with its teacher by, grouped by what is compared.

    logits.py     class probabilities: `kd`, `dkd`, `nkd`, `ofa`; without a teacher: `tf_kd`, `uskd`
    relations.py  distances and angles between a batch's features: `rkd_distance`, `rkd_angle`
    contrast.py   pooled features, each against a batch of them: `InfoNCE`
    memory.py     pooled features, each against a memory of all samples: `crd`
    features.py   feature maps: `FitNet`, `fcfd`

Beside these, `alignment.py` has what brings pictures and the texts that fit them together: `itc`, `itm`.

All of it computes in float32 at least, whatever the models compute in, and also under autocast.
"""

from hetero_kt.nn.losses.contrast import InfoNCE
from hetero_kt.nn.losses.features import FitNet, fcfd
from hetero_kt.nn.losses.logits import dkd, kd, nkd, ofa, tf_kd, uskd
from hetero_kt.nn.losses.memory import crd
from hetero_kt.nn.losses.relations import rkd_angle, rkd_distance

__all__ = ["FitNet", "InfoNCE", "crd", "dkd", "fcfd", "kd", "nkd", "ofa", "rkd_angle", "rkd_distance", "tf_kd", "uskd"]
