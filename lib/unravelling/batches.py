"""What a batch may be, and bringing it to a network: device, type, labels, mode."""

from .chain import IGNORED, LABELS, device_of, eval_mode, inputs_and_labels, move

__all__ = ["IGNORED", "LABELS", "device_of", "eval_mode", "inputs_and_labels", "move"]
