"""Rotary positions. This file imports nothing: whoever wants frequencies alone needs no torch."""
