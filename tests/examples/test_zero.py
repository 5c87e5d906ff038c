"""The example of DeepSpeed, which has to be compiled first."""

import pytest

from tests.examples.qualities import EXAMPLES, run
from tests.marks import DEEPSPEED

pytestmark = DEEPSPEED


@pytest.mark.timeout(120)
def test_the_example_of_deepspeed_reaches_its_quality() -> None:
    (example,) = (example for example in EXAMPLES if example.script == "zero.py")
    assert run(example).value >= example.least
