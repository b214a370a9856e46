"""What a student learns besides its labels, an objective each.

    objective.py      what they have in common
    probabilities.py  `KD`, `DKD`, `NKD`, `OFA`; without a teacher: `TfKD`, `USKD`
    features.py       `RKD`, `FitNet`
    memory.py         `CRD`
    functions.py      `FCFD`

`FBT` is in `hetero_kt.methods.fbt`.
"""

from hetero_kt.methods.objectives.features import RKD, FitNet
from hetero_kt.methods.objectives.functions import FCFD, check_cnns
from hetero_kt.methods.objectives.memory import CRD, Drawn
from hetero_kt.methods.objectives.objective import Alone, Evolving, Objective, Teachers, Terms
from hetero_kt.methods.objectives.probabilities import DKD, KD, NKD, OFA, USKD, TfKD

__all__ = [
    "CRD",
    "DKD",
    "FCFD",
    "KD",
    "NKD",
    "OFA",
    "RKD",
    "USKD",
    "Alone",
    "Drawn",
    "Evolving",
    "FitNet",
    "Objective",
    "Teachers",
    "Terms",
    "TfKD",
    "check_cnns",
]
