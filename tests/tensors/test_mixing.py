from random import Random

import pytest
import torch

from ptacc.errors import DataError
from ptacc.tensors.mixing import Mix, draw_box, draw_mix, mix_pair


def test_mixup_keeps_a_share_of_each_sample_and_of_its_target() -> None:
    inputs, targets = mix_pair((torch.tensor([[0.0], [1.0]]), torch.tensor([0, 2])), Mix(0.75), classes=3)
    assert inputs.tolist() == [[0.25], [0.75]]
    assert targets.tolist() == [[0.75, 0, 0.25], [0.25, 0, 0.75]]


def test_targets_in_floating_point_are_mixed_as_they_are() -> None:
    _, targets = mix_pair((torch.zeros(2, 1), torch.tensor([0.0, 8.0])), Mix(0.75), classes=None)
    assert targets.tolist() == [2.0, 6.0]


def test_classes_of_pixels_get_the_shape_that_cross_entropy_takes() -> None:
    _, targets = mix_pair((torch.zeros(2, 1, 4, 5), torch.zeros(2, 4, 5).long()), Mix(0.5), classes=3)
    assert targets.shape == (2, 3, 4, 5)


def test_cutmix_pastes_a_box_and_weights_targets_by_its_area() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[1] = 1
    mix = draw_box(Random(1), 0.5, images.shape)
    mixed, targets = mix_pair((images, torch.tensor([0, 1])), mix, classes=2)
    assert 0 < mixed[0].mean().item() < 1
    assert mixed[0].mean().item() == pytest.approx(targets[0, 1].item())
    assert images[0].sum() == 0


def test_with_both_each_batch_gets_one_of_them() -> None:
    drawn = [draw_mix(Random(seed), 1.0, 1.0, torch.zeros(2, 3, 8, 8)) for seed in range(200)]
    assert 70 < sum(mix.box is None for mix in drawn) < 130


def test_integer_inputs_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match=r"got torch\.int64"):
        mix_pair((torch.zeros(2, 1).long(), torch.zeros(2)), Mix(0.5), classes=None)
