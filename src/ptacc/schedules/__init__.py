"""Learning-rate schedules with a warm-up, as values of `create_scheduler`.

```python
class MyTrainer(LRSchedulerMixin, Trainer):
    create_scheduler: SchedulerFactory = warmup_cosine(0.1)
```

Each is a factor of the settings that the optimizer was created with, as a function of the number of completed steps. It
takes its length from the plan of the run.
"""

import ptacc.public
from ptacc.schedules.factors import FactorSchedule, FactorScheduler, join_schedules
from ptacc.schedules.warmup import decay_start, inverse_sqrt, warmup_cosine, warmup_linear, warmup_stable_decay

__all__ = [
    "FactorSchedule",
    "FactorScheduler",
    "decay_start",
    "inverse_sqrt",
    "join_schedules",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]

ptacc.public.set_public_module(__name__, __all__)
