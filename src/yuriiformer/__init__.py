"""YuriiFormer: transformer layers as steps of optimisation methods."""

__version__ = "0.1.0"
