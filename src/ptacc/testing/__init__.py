"""Checks for authors of mixins and trainers, and small datasets to run them on.

```python
@pytest.mark.parametrize("mixin", [MyMixin, MyOtherMixin])
def test_my_mixins(mixin: type[Mixin]) -> None:
    check_mixin(mixin)


def test_my_trainer_is_split_invariant() -> None:
    assert_split_invariant(make_my_trainer, my_data)


def test_my_trainer_learns() -> None:
    assert_overfits_one_batch(make_my_trainer(), my_data)
```
"""

from ptacc.data.shuffling import epoch_order
from ptacc.testing.datasets import iris, iris_parts, iris_split, tiny_data, tiny_parts
from ptacc.testing.laws import check_mixin, check_order_changes_nothing
from ptacc.testing.overfitting import assert_overfits_one_batch
from ptacc.testing.split_invariance import assert_split_invariant

__all__ = [
    "assert_overfits_one_batch",
    "assert_split_invariant",
    "check_mixin",
    "check_order_changes_nothing",
    "epoch_order",
    "iris",
    "iris_parts",
    "iris_split",
    "tiny_data",
    "tiny_parts",
]
