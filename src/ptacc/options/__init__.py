"""Options of a trainer on the command line and in files.

```python
given = parse_options(MyTrainer)  # of sys.argv, and of the file that --config names
trainer = MyTrainer(model, optimizer=optimizer, loss_func=loss_func, **given.of_trainer())
trainer.train(data, **given.of_train())
```
"""

import ptacc.public
from ptacc.options.fields import CommandLineOptions, options
from ptacc.options.parsing import parse_options

__all__ = ["CommandLineOptions", "options", "parse_options"]

ptacc.public.set_public_module(__name__, __all__)
