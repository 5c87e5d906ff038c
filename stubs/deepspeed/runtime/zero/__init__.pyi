from deepspeed.runtime.zero.partition_parameters import GatheredParameters as GatheredParameters
from deepspeed.runtime.zero.partition_parameters import Init as Init
