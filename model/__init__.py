"""The recommender: a small LLaMA-style decoder over a user's item sequence."""

from model.config import ModelConfig
from model.recommender import Recommender

__all__ = ["ModelConfig", "Recommender"]
