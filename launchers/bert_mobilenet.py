"""BERT answers questions (SQuAD v2) while MobileNetV2 names pictures (CIFAR-100); each learns from the other's weight
(MergeNet, Table 4).

Table 4:  deepspeed launchers/bert_mobilenet.py --compare none noise shuffled --seeds 0 1 2
Data:     squad_v2/, tokenizer/vocab.txt and cifar100/ in the data folder.
Hardware: one GPU with 24 GB; about 14 hours a run (an estimate).
Expected: MobileNetV2's top-1 63.87 -> 65.96, BERT's EM/F1 70.17/73.06 -> 71.49/74.85.
"""

from hetero_kt import main
from hetero_kt.config import AdapterConfig, Data, MergeNet, Model, Optim, Recipe, Schedule, Transfer

EPOCH = 390  # steps of 128 pictures
ANSWERING = Optim("adamw", lr=5e-5, weight_decay=1e-5, clip=1.0)


def default() -> Recipe:
    answering = Schedule("cosine", warmup=800)
    models = {
        "bert": Model("hf:bert-base-uncased", "questions", optim=ANSWERING, schedule=answering, steps=8240),
        "mobilenetv2": Model(
            "cifar:mobilenetv2",
            "cifar100",
            optim=Optim("adamw", lr=1e-2, weight_decay=1e-4),
            schedule=Schedule("cosine"),
        ),
    }
    value, classifier = "bert:bert.encoder.layer.11.attention.self.value.weight", "mobilenetv2:classifier.weight"
    adapter = AdapterConfig(heads=12)
    transfers = {
        # Of BERT's trained weight only a part moves: A of its decomposition, the rest stays.
        "to_mobilenetv2": Transfer(value, classifier, cycle=2, mode="svd", adapter=adapter),
        "to_bert": Transfer(classifier, value, cycle=2, mode="svd", adapter=adapter),
    }
    data = {"questions": Data("squad", batch=32), "cifar100": Data()}
    steps = 100 * EPOCH
    return Recipe("bert_mobilenet", models, data, MergeNet(transfers), steps, eval_every=5 * EPOCH, save_every=EPOCH)


VARIANTS = {"default": default}

if __name__ == "__main__":
    main(VARIANTS)
