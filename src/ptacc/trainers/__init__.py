"""Ready trainers."""

import ptacc.public
from ptacc.trainers.hf import HFTrainer, SequenceClassificationTrainer
from ptacc.trainers.save_pretrained import SavePretrained
from ptacc.trainers.seq2seq import Seq2SeqTrainer
from ptacc.trainers.tokens import CausalLMTrainer, TokenClassificationTrainer

__all__ = [
    "CausalLMTrainer",
    "HFTrainer",
    "SavePretrained",
    "Seq2SeqTrainer",
    "SequenceClassificationTrainer",
    "TokenClassificationTrainer",
]

ptacc.public.set_public_module(__name__, __all__)
