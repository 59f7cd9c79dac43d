"""A part of a model as a module of its own (`Part`)."""

from __future__ import annotations

from torch import nn


class Part(nn.Module):
    """A module with the same submodules, under the same paths, as the whole model.

    So the norms have the same names in both.

    Args:
        whole: the model; subclasses read it as `self.__dict__["whole"]`.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self._modules = whole._modules
        self._parameters, self._buffers = whole._parameters, whole._buffers
        self.__dict__["whole"] = whole  # not as a submodule, which would change the paths
        self.config = getattr(whole, "config", None)
        self.training = whole.training
