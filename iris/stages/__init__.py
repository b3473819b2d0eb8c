"""The stages of training: from settings to finished weights, each made once and shared by whoever asks for it."""

from iris.stages.chain import model_stage, stage_of
from iris.stages.engine import Context, Finished, Stage, identity, named

__all__ = ["Context", "Finished", "Stage", "identity", "model_stage", "named", "stage_of"]
