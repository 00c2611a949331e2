"""Measurements of what a method costs over the frozen base it adapts."""
