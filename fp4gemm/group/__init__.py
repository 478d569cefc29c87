"""Groups: tensors in one buffer whose sizes may stand on the device (docs/grouped.md)."""
