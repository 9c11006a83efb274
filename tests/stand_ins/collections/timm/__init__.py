"""Stands in for timm: its optimizers are in ``timm.optim``."""
