"""Ready trainers for common tasks. Each composes with mixins, and its steps, losses and hooks can be overridden."""

import ptacc.public
from ptacc.trainers.classification import ClassificationTrainer
from ptacc.trainers.contrastive import ContrastiveTrainer
from ptacc.trainers.distillation import DistillationTrainer
from ptacc.trainers.gan import GANTrainer
from ptacc.trainers.hf import HFTrainer, SequenceClassificationTrainer
from ptacc.trainers.regression import RegressionTrainer
from ptacc.trainers.save_pretrained import SavePretrained
from ptacc.trainers.segmentation import SegmentationTrainer
from ptacc.trainers.seq2seq import Seq2SeqTrainer
from ptacc.trainers.tokens import CausalLMTrainer, TokenClassificationTrainer

__all__ = [
    "CausalLMTrainer",
    "ClassificationTrainer",
    "ContrastiveTrainer",
    "DistillationTrainer",
    "GANTrainer",
    "HFTrainer",
    "RegressionTrainer",
    "SavePretrained",
    "SegmentationTrainer",
    "Seq2SeqTrainer",
    "SequenceClassificationTrainer",
    "TokenClassificationTrainer",
]

ptacc.public.set_public_module(__name__, __all__)
