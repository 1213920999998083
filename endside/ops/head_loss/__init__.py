"""The output head and its loss in one operation, so that logits live by pieces."""
