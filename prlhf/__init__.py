"""Personalized RLHF in plain PyTorch: a user model learned together with a language model.

Implements "Personalized Language Modeling from Personalized Human Feedback" (arXiv 2402.05133).
"""

__version__ = "0.1.0"
