"""Experiments with many runs of the trainer: ``python -m training.experiments.sweep SPEC.yaml``."""
