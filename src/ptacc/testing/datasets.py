"""Small datasets to train on, one synthetic and one real, with a model for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ptacc.rng import streams_seeded

# Four measurements of each flower, two digits each, in millimetres: 50 setosa, 50 versicolor, 50 virginica.
FLOWERS = (
    "51351402493014024732130246311502503614025439170446341403503415024429140249311501"
    "54371502483416024830140143301101584012025744150454391304513514035738170351381503"
    "54341702513715044636100251331705483419025030160250341604523515025234140247321602"
    "48311602543415045241150155421402493115025032120255351302493614014430130251341502"
    "50351303452313034432130250351606513819044830140351381602463214025337150250331402"
    "70324714643245156931491555234013652846155728451363334716492433106629461352273914"
    "50203510593042156022401061294714562936136731441456304515582741106222451556253911"
    "59324818612840136325491561284712642943136630441468284814673050176029451557263510"
    "55243811552437105827391260275116543045156034451667314715632344135630411355254013"
    "55264412613046145826401250233310562742135730421257294213622943135125301157284113"
    "63336025582751197130592163295618653058227630662149254517732963186725581872366125"
    "65325120642753196830552157255020582851246432532365305518773867227726692360225015"
    "69325723562849207728672063274918673357217232601862284818613049186428562172305816"
    "74286119793864206428562263285115612656147730612363345624643155186030481869315421"
    "67315624693151235827511968325923673357256730522363255019653052206234542359305118"
)


def tiny_data(samples: int = 24) -> TensorDataset:
    """Return two linearly separable classes: inputs `(samples, 4)` in float64, targets `(samples,)`."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 4, generator=generator, dtype=torch.float64, device="cpu")
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


def tiny_parts() -> dict[str, Any]:
    """Return a model, a loss function, an optimizer and no default callbacks for `tiny_data`, the same at each call."""
    model = nn.Linear(4, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-0.5, 0.5, 8, dtype=torch.float64).reshape(2, 4))
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "loss_func": nn.CrossEntropyLoss(), "optimizer": optimizer, "default_callbacks": ()}


def iris() -> TensorDataset:
    """Return Fisher's iris dataset: 150 flowers of three species, 50 of each, sorted by species.

    Inputs `(150, 4)` in float32: length and width of the sepals, length and width of the petals, each standardised to
    mean 0 and standard deviation 1 over all flowers. Targets `(150,)` in int64: 0 for setosa, 1 for versicolor, 2 for
    virginica.

    Source: R. A. Fisher, "The use of multiple measurements in taxonomic problems", Annals of Eugenics 7 (1936),
    https://doi.org/10.1111/j.1469-1809.1936.tb02137.x. The values are Fisher's, as in scikit-learn. The copy in
    the UCI repository (https://archive.ics.uci.edu/dataset/53/iris) is wrong for two flowers.

    Example:
        >>> inputs, targets = iris().tensors
        >>> inputs.shape, targets.bincount().tolist()
        (torch.Size([150, 4]), [50, 50, 50])
    """
    numbers = [int(FLOWERS[start : start + 2]) for start in range(0, len(FLOWERS), 2)]
    millimetres = torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(150, 4)
    inputs = (millimetres - millimetres.mean(dim=0)) / millimetres.std(dim=0, correction=0)
    return TensorDataset(inputs.float(), torch.arange(3, device="cpu").repeat_interleave(50))


def iris_split() -> tuple[TensorDataset, TensorDataset]:
    """Split `iris()` in two: the first of every five flowers is held out (30), and the others are for training (120).

    Both parts have equally many flowers of each species. A trainer of `iris_parts()` classifies 29 of the 30 correctly
    after 10 epochs.

    Example:
        >>> train, held_out = iris_split()
        >>> len(train), len(held_out), held_out.tensors[1].bincount().tolist()
        (120, 30, [10, 10, 10])
    """
    tensors = iris().tensors
    is_held_out = torch.arange(150, device="cpu") % 5 == 0
    train, held_out = (TensorDataset(*(tensor[part] for tensor in tensors)) for part in (~is_held_out, is_held_out))
    return train, held_out


def iris_parts() -> dict[str, Any]:
    """Return a model, a loss function, an optimizer and no default callbacks for `iris`, the same at each call.

    The model maps `(items, 4)` to logits `(items, 3)`, in float32. Its initial weights do not depend on the global
    generators, which keep their state.

    Example:
        >>> from ptacc import Trainer
        >>> history = Trainer(**iris_parts()).train(iris(), num_epochs=10)
        >>> history[-1].train_loss < 0.2
        True
    """
    with streams_seeded(0):
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return {"model": model, "loss_func": nn.CrossEntropyLoss(), "optimizer": optimizer, "default_callbacks": ()}
