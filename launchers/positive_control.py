"""Where knowledge has to move if anything does: a source that has seen all of CIFAR-100, a target that has seen 5 % of
it, the same classes; from a setting that cannot fail to that of MergeNet's Table 1, one change at a time.

All rows: hetero-kt table positive-control --budget cpu --seeds 3 --run
One:      deepspeed launchers/positive_control.py --variant layers --compare none noise shuffled --seeds 0 1 2
Variants: layers (same model; every matrix is drawn to the source's own, nothing of the adapters learns), mapped (as
          that, through maps that begin as the identity and learn), learned (and the gates learn too), classifier (the
          last matrix alone, drawn), turned (the source's classifier into another model's, by the nearest rotation),
          width (through a map that learns), attention (the paper's adapter), convolution (the paper's kind of target).
Hardware: a CPU core, one to two minutes a run.
Expected: `layers` ends where the source ends, far above `none`; how far down the list that holds is what is measured.
"""

from dataclasses import replace
from functools import partial

from hetero_kt import main
from hetero_kt.config import AdapterConfig, Data, MergeNet, Model, Optim, Recipe, Schedule, Transfer

CLASSIFIER = "fc.weight"
MATRICES = (
    "conv1.weight",
    *(f"layer{stage}.0.conv{k}.weight" for stage in (1, 2, 3, 4) for k in (1, 2)),
    *(f"layer{stage}.0.downsample.0.weight" for stage in (2, 3, 4)),
    CLASSIFIER,
)
ADAMW = Optim("adamw", lr=2e-3, weight_decay=1e-2)
IDENTITY = AdapterConfig("aligned", input="raw", output="mix", hold=True)
DRAWN = Transfer("source:", "target:", 1, "full", adapter=IDENTITY, update="none")
MAPPED = replace(DRAWN, update="exact")
LEARNED = replace(MAPPED, adapter=replace(IDENTITY, hold=False))
MAP = replace(MAPPED, adapter=AdapterConfig("aligned", hold=True))
TURNED = replace(DRAWN, adapter=AdapterConfig("procrustes", gate=0.4, hold=True))
ATTENTION = replace(MAPPED, adapter=AdapterConfig("lpka", hold=True))


def recipe(name: str, target: str, weights: tuple[str, ...], transfer: Transfer) -> Recipe:
    """`transfer` from each of `weights`, or from the source's classifier, into that weight of the target."""
    models = {
        "source": Model("cifar:resnet_tiny", "all", optim=ADAMW, schedule=Schedule("cosine")),
        "target": Model(target, "few", optim=ADAMW, schedule=Schedule("cosine")),
    }
    everything = Data(batch=64, augment=("crop", "flip"))
    data = {"all": everything, "few": replace(everything, per_class=25)}
    transfers = {
        weight.removesuffix(".weight").replace(".", "_"): replace(
            transfer, source=f"source:{weight if weight in MATRICES else CLASSIFIER}", target=f"target:{weight}"
        )
        for weight in weights
    }
    return Recipe(f"positive_control_{name}", models, data, MergeNet(transfers), steps=2000, eval_every=1000)


VARIANTS = {
    "layers": partial(recipe, "layers", "cifar:resnet_tiny", MATRICES, DRAWN),
    "mapped": partial(recipe, "mapped", "cifar:resnet_tiny", MATRICES, MAPPED),
    "learned": partial(recipe, "learned", "cifar:resnet_tiny", MATRICES, LEARNED),
    "classifier": partial(recipe, "classifier", "cifar:resnet_tiny", (CLASSIFIER,), DRAWN),
    "turned": partial(recipe, "turned", "cifar:mobilenetv2_tiny", ("classifier.weight",), TURNED),
    "width": partial(recipe, "width", "cifar:mobilenetv2_tiny", ("classifier.weight",), MAP),
    "attention": partial(recipe, "attention", "cifar:mobilenetv2_tiny", ("classifier.weight",), ATTENTION),
    "convolution": partial(recipe, "convolution", "cifar:mobilenetv2_tiny", ("blocks.2.1.conv_pwl.weight",), ATTENTION),
}

if __name__ == "__main__":
    main(VARIANTS)
